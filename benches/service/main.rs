//! Measures a service of several processes, whose tasks draw a key, work under its lock on the one pool of the process,
//! and draw the next key.
//!
//! By default, the benchmark runs each of the [`SERVICES`] in a closed loop, in which a task begins a cycle when it
//! has ended the previous one, and in open loops, in which cycles begin at random times, as often as [`LOADS`] says.
//! It draws the results as `benches/service.svg`. With `matrix` in `PGLOCK_BENCH_SERVICE`, it runs every combination
//! of pools, processes, tasks and keys, but only with row locks and the manager, and each for a shorter time.

#![expect(clippy::print_stdout, reason = "a bench is there to print")]

#[path = "../support.rs"]
mod support;

#[path = "../../tests/history/dice.rs"]
#[expect(
    clippy::unwrap_used,
    dead_code,
    reason = "a part of it is enough here, and is the tests' own"
)]
mod dice;
mod picture;
mod process;
#[path = "../quantile.rs"]
mod quantile;
#[path = "../table.rs"]
mod table;
#[path = "../usage.rs"]
#[expect(dead_code, reason = "a part of it is enough here")]
mod usage;
mod way;

use std::env;
use std::time::Duration;

use pglock_testkit::{Proxy, Server, TestDb};
use sqlx::error::BoxDynError;
use sqlx::{AssertSqlSafe, ConnectOptions, PgConnection};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval};

use picture::Row;
use process::{Measured, Process, WARM_UP};
use table::Table;
use usage::cpu_of_server;
use way::Way;

/// An environment variable whose value is `matrix`, or the parameters of a process of a service.
const VARIABLE: &str = "PGLOCK_BENCH_SERVICE";

/// A service that is measured.
#[derive(Clone, Copy, Debug)]
struct Service {
    processes: u64,
    tasks: u64,
    /// The number of keys. They are drawn by Zipf's law: the n-th is drawn 1/n times as often as the first.
    keys: u64,
    /// The connections of the pool of a process.
    pool: u32,
    round_trip: Duration,
}

const SERVICE: Service =
    Service { processes: 4, tasks: 200, keys: 1000, pool: 20, round_trip: Duration::ZERO };

/// The services, and the names of their tables in the guide.
const SERVICES: [(Service, &str); 3] = [
    (SERVICE, "service"),
    (Service { pool: 7, ..SERVICE }, "service_small_pool"),
    (Service { round_trip: Duration::from_millis(1), ..SERVICE }, "service_link"),
];

/// How often cycles begin in the open loops, in percent of the rate of row locks in the closed loop.
const LOADS: [u64; 2] = [60, 90];

fn main() -> Result<(), BoxDynError> {
    let told = env::var(VARIABLE).unwrap_or_default();
    if told.contains(' ') {
        return support::spawn(async move { process::run(Process::parse(&told)?).await });
    }
    support::run(async move |time| service(time, told == "matrix").await)
}

async fn service(time: Duration, matrix: bool) -> Result<(), BoxDynError> {
    let quick = time <= Duration::from_secs(1);
    let server = Server::options().tcp().setting("max_connections", "400").start();
    let db = TestDb::on(&server).await;
    let mut admin = db.admin().await;
    let rows = "CREATE TABLE bench (id bigint PRIMARY KEY);
                INSERT INTO bench SELECT generate_series(1, 100000)";
    sqlx::raw_sql(rows).execute(&mut admin).await?;
    support::print_title("service: processes that work under hot keys", &db.pool(1).await).await?;

    let (services, ways): (_, &[Way]) = match (quick, matrix) {
        (true, _) => (vec![(Service { processes: 2, tasks: 10, ..SERVICE }, "")], &Way::ALL),
        (false, false) => (SERVICES.to_vec(), &Way::ALL),
        (false, true) => (all_services(), &[Way::RowLock, Way::Manager]),
    };
    let (turns, time) = match (quick, matrix) {
        (true, _) => (1, Duration::from_millis(200)),
        (false, false) => (1, Duration::from_secs(8)),
        (false, true) => (1, Duration::from_secs(3)),
    };
    let mut rows = Vec::new();
    for (service, name) in services {
        let proxy = Proxy::to(server.port()).await;
        proxy.delay(service.round_trip / 2);
        let mut options = server.tcp_options().database(db.name());
        if !service.round_trip.is_zero() {
            options = options.port(proxy.address().port());
        }
        let url = options.to_url_lossy().to_string();
        let mut row_locks = 0;
        let loads: &[u64] = if matrix { &[] } else { &LOADS };
        let first = rows.len();
        for load in [0].iter().chain(loads) {
            let arrivals = row_locks * load / 100 / service.processes;
            let mut measured: Vec<_> = ways.iter().map(|&way| (way, Measured::default())).collect();
            for turn in 0..turns {
                for (way, measured) in &mut measured {
                    let run = Run { service, way: *way, url: &url, time, turn, arrivals };
                    measured.add(run.all(&mut admin, server.postmaster_pid()).await?);
                    let leave = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                                 WHERE datname = current_database() AND pid <> pg_backend_pid()";
                    sqlx::raw_sql(AssertSqlSafe(leave)).execute(&mut admin).await?;
                }
            }
            let row = Row { service, load: *load, time: time * turns, measured };
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "a rate is a number of cycles"
            )]
            let rate = row.rate_of_row_locks() as u64;
            if *load == 0 {
                row_locks = rate;
            }
            print(&row, (WARM_UP + time) * turns);
            rows.push(row);
        }
        if !quick && !matrix {
            let all_time = (WARM_UP + time) * turns;
            publish(name, service, rows.get(first..).unwrap_or_default(), all_time)?;
        }
    }
    if !quick && !matrix {
        picture::draw(&rows)?;
    }
    Ok(())
}

fn all_services() -> Vec<(Service, &'static str)> {
    let mut services = Vec::new();
    for pool in [3, 5, 7, 10, 20] {
        for (processes, tasks) in [(3, 50), (3, 400), (8, 50), (8, 400)] {
            for keys in [50, 1000, 100_000] {
                services.push((Service { processes, tasks, keys, pool, ..SERVICE }, ""));
            }
        }
    }
    services
}

/// A turn of a way to serialize work.
struct Run<'r> {
    service: Service,
    way: Way,
    url: &'r str,
    time: Duration,
    turn: u32,
    arrivals: u64,
}

impl Run<'_> {
    /// Runs all processes of the service at once.
    async fn all(self, admin: &mut PgConnection, postmaster: u32) -> Result<Measured, BoxDynError> {
        let Self { service, way, url, time, turn, arrivals } = self;
        let mut running = JoinSet::new();
        for number in 0..service.processes {
            let seed = u64::from(turn) * 1000 + number;
            let Service { tasks, keys, pool, .. } = service;
            let url = url.to_owned();
            let process = Process { way, tasks, keys, pool, time, seed, arrivals, url };
            running.spawn(process.start());
        }
        let mut all = Measured::default();
        let before = cpu_of_server(postmaster)?;
        let mut tick = interval(Duration::from_millis(100));
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                ended = running.join_next() => match ended {
                    Some(ended) => all.add(ended??),
                    None => break,
                },
                _ = tick.tick() => {
                    let count = "SELECT count(*) FROM pg_stat_activity
                                 WHERE datname = current_database() AND pid <> pg_backend_pid()";
                    let count: i64 = sqlx::query_scalar(count).fetch_one(&mut *admin).await?;
                    all.connections = all.connections.max(count);
                }
            }
        }
        all.server_cpu = cpu_of_server(postmaster)?.saturating_sub(before);
        Ok(all)
    }
}

/// Prints a table that compares the ways with the first one.
fn print(row: &Row, all_time: Duration) {
    let Service { processes, tasks, keys, pool, round_trip } = row.service;
    let load = match row.load {
        0 => format!("{tasks} tasks each"),
        load => format!("cycles begin as often as {load} % of row locks' above"),
    };
    println!(
        "\n{processes} processes, a pool of {pool} each, {keys} keys, round trip {round_trip:?}, {load}"
    );
    println!(
        "{:<31}{:>6}{:>8}{:>9}{:>9}{:>9}{:>8}{:>8}{:>7}{:>7}{:>7}{:>7}",
        "",
        "ratio",
        "cycles",
        "p50 ms",
        "p99 ms",
        "max ms",
        "query",
        "q. p99",
        "conns",
        "CPU",
        "server",
        "errors"
    );
    let mut first = None;
    for (way, measured) in &row.measured {
        let rate = row.rate(measured);
        let ratio = rate / *first.get_or_insert(rate);
        let [p50, p99, max] = [0.5, 0.99, 1.0].map(|q| measured.wait(q));
        let [query, query_p99] = [0.5, 0.99].map(|q| measured.query(q));
        let cpu = [measured.client_cpu, measured.server_cpu]
            .map(|cpu| cpu.as_secs_f64() / all_time.as_secs_f64());
        let [client, server] = cpu;
        let Measured { connections, errors, .. } = measured;
        println!(
            "{:<31}{ratio:>6.2}{rate:>8.0}{p50:>9.2}{p99:>9.1}{max:>9.1}{query:>8.2}{query_p99:>8.1}\
             {connections:>7}{client:>7.2}{server:>7.2}{errors:>7}",
            way.name()
        );
    }
}

/// Publishes a summary of a service: the closed loop, and the longest waits of the open loops.
fn publish(
    name: &'static str,
    service: Service,
    rows: &[Row],
    time: Duration,
) -> Result<(), BoxDynError> {
    let Some((closed, open)) = rows.split_first() else { return Ok(()) };
    let heads = ["cycles, relative", "wait, ms", "99 %", "query, ms", "clients", "server"];
    let late = LOADS.map(|load| format!("99 % at {load} % load"));
    let heads = heads.map(str::to_owned).into_iter().chain(late);
    let Service { pool, round_trip, .. } = service;
    let mut table = Table::new(name, format!("pool of {pool}, link of {round_trip:?}"), heads);
    let first = closed.rate_of_row_locks();
    for (at, (way, measured)) in closed.measured.iter().enumerate() {
        let cores = |cpu: Duration| cpu.as_secs_f64() / time.as_secs_f64();
        let figures = [
            closed.rate(measured) / first,
            measured.wait(0.5),
            measured.wait(0.99),
            measured.query(0.5),
            cores(measured.client_cpu),
            cores(measured.server_cpu),
        ];
        let late = open.iter().filter_map(|row| Some(row.measured.get(at)?.1.wait(0.99)));
        table.row(way.name(), figures.into_iter().chain(late).map(shortened));
    }
    table.publish()
}

/// Formats a figure with two or three digits.
fn shortened(figure: f64) -> String {
    let places = if figure < 10.0 { 2 } else { usize::from(figure < 100.0) };
    format!("{figure:.places$}")
}
