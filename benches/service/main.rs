//! A service of several processes: tasks that draw a key, work under its lock on the pool that the process has
//! for everything, and draw the next one.
//!
//! Without an argument, the services of [`SERVICES`]. With `matrix` in `PGLOCK_BENCH_SERVICE`, every
//! combination of pools, processes, tasks and keys, with row locks and the manager alone, each for a shorter
//! time.

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
mod process;
#[path = "../quantile.rs"]
mod quantile;
mod way;

use std::env;
use std::time::Duration;

use pglock_testkit::{Proxy, Server, TestDb};
use sqlx::error::BoxDynError;
use sqlx::{AssertSqlSafe, ConnectOptions};
use tokio::task::JoinSet;

use process::{Measured, Process};
use way::Way;

/// Its value is `matrix`, or what a process of a service is to do.
const VARIABLE: &str = "PGLOCK_BENCH_SERVICE";

/// A service that is measured.
#[derive(Clone, Copy, Debug)]
struct Service {
    processes: u64,
    tasks: u64,
    /// By Zipf's law: the n-th is drawn 1/n times as often as the first.
    keys: u64,
    /// The connections of the pool of a process.
    pool: u32,
    round_trip: Duration,
}

const SERVICE: Service =
    Service { processes: 4, tasks: 200, keys: 1000, pool: 20, round_trip: Duration::ZERO };

const SERVICES: [Service; 3] = [
    SERVICE,
    Service { pool: 7, ..SERVICE },
    Service { round_trip: Duration::from_millis(1), ..SERVICE },
];

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
        (true, _) => (vec![Service { processes: 2, tasks: 10, ..SERVICE }], &Way::ALL),
        (false, false) => (SERVICES.to_vec(), &Way::ALL),
        (false, true) => (all_services(), &[Way::RowLock, Way::Manager]),
    };
    let (turns, time) = match (quick, matrix) {
        (true, _) => (1, Duration::from_millis(200)),
        (false, false) => (3, Duration::from_secs(5)),
        (false, true) => (1, Duration::from_secs(3)),
    };
    for service in services {
        let proxy = Proxy::to(server.port()).await;
        proxy.delay(service.round_trip / 2);
        let mut options = server.tcp_options().database(db.name());
        if !service.round_trip.is_zero() {
            options = options.port(proxy.address().port());
        }
        let url = options.to_url_lossy().to_string();
        let mut measured: Vec<_> = ways.iter().map(|&way| (way, Measured::default())).collect();
        for turn in 0..turns {
            for (way, measured) in &mut measured {
                measured.add(run(service, *way, &url, time, turn).await?);
                let leave = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                             WHERE datname = current_database() AND pid <> pg_backend_pid()";
                sqlx::raw_sql(AssertSqlSafe(leave)).execute(&mut admin).await?;
            }
        }
        print(service, &measured, time * turns);
    }
    Ok(())
}

fn all_services() -> Vec<Service> {
    let mut services = Vec::new();
    for pool in [3, 5, 7, 10, 20] {
        for (processes, tasks) in [(3, 50), (3, 400), (8, 50), (8, 400)] {
            for keys in [50, 1000, 100_000] {
                services.push(Service { processes, tasks, keys, pool, ..SERVICE });
            }
        }
    }
    services
}

/// Runs all processes of a service at once.
async fn run(
    service: Service,
    way: Way,
    url: &str,
    time: Duration,
    turn: u32,
) -> Result<Measured, BoxDynError> {
    let mut running = JoinSet::new();
    for number in 0..service.processes {
        let seed = u64::from(turn) * 1000 + number;
        let Service { tasks, keys, pool, .. } = service;
        let process = Process { way, tasks, keys, pool, time, seed, url: url.to_owned() };
        running.spawn(process.start());
    }
    let mut all = Measured::default();
    while let Some(ended) = running.join_next().await {
        all.add(ended??);
    }
    Ok(all)
}

/// The first one is the one that the others are compared with.
fn print(service: Service, measured: &[(Way, Measured)], time: Duration) {
    let Service { processes, tasks, keys, pool, round_trip } = service;
    println!(
        "\n{processes} processes of {tasks} tasks and a pool of {pool}, {keys} keys, round trip {round_trip:?}"
    );
    println!(
        "{:<34}{:>7}{:>9}{:>10}{:>10}{:>10}{:>9}{:>9}{:>8}",
        "", "ratio", "cycles/s", "p50 ms", "p99 ms", "max ms", "query", "q. p99", "errors"
    );
    let mut first = None;
    for (way, measured) in measured {
        let rate = measured.cycles() / time.as_secs_f64();
        let ratio = rate / *first.get_or_insert(rate);
        let [p50, p99, max] = [0.5, 0.99, 1.0].map(|q| measured.wait(q));
        let [query, query_p99] = [0.5, 0.99].map(|q| measured.query(q));
        let errors = measured.errors;
        println!(
            "{:<34}{ratio:>7.2}{rate:>9.0}{p50:>10.2}{p99:>10.1}{max:>10.1}{query:>9.2}{query_p99:>9.1}{errors:>8}",
            way.name()
        );
    }
}
