//! Measures a hot key: many tasks of one process that acquire the same lock, and a query that needs the same pool.
//!
//! For each way to lock, the benchmark prints how many cycles it has completed per second, how many connections the
//! lock had at most, and how long the query took, beside how long the query takes on an idle pool.
//!
//! One way is a program in Go, which is left out if there is no Go with the package `lib/pq` as Debian installs it
//! (`apt-get install golang-go golang-github-lib-pq-dev`).

#![expect(clippy::print_stdout, reason = "a bench is there to print")]

mod quantile;
mod support;
mod table;
mod warm;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use pglock::{Lock, LockManager};
use pglock_testkit::{Server, TestDb};
use sqlx::error::BoxDynError;
use sqlx::postgres::{PgAdvisoryLock, PgAdvisoryLockKey};
use sqlx::{PgConnection, PgPool, query, query_scalar};
use tokio::process::Command;
use tokio::task::JoinSet;
use tokio::time::{interval, sleep};

use quantile::quantile;
use table::Table;
use warm::warm_pool;

const KEY: i64 = 17;
const CONNECTIONS: u32 = 10;

/// How often each way has its turn.
const ROUNDS: u32 = 4;

/// The interval at which the connections of the lock are counted.
const LOOK: Duration = Duration::from_millis(20);

/// A way to lock in this process.
#[derive(Clone, Copy)]
enum Way {
    Lock,
    LockDropped,
    Manager,
    Sqlx,
}

impl Way {
    /// All ways to lock. The others are compared with the first one.
    const ALL: [Self; 4] = [Self::Sqlx, Self::Lock, Self::LockDropped, Self::Manager];

    fn name(self) -> &'static str {
        match self {
            Self::Lock => "`Lock`, releases awaited",
            Self::LockDropped => "`Lock`, guards dropped: hand-offs in the process",
            Self::Manager => "`LockManager`, releases awaited",
            Self::Sqlx => "sqlx's `PgAdvisoryLock`",
        }
    }
}

#[derive(Default)]
struct Measured {
    cycles: usize,
    time: Duration,
    connections: i64,
    queries: Vec<Duration>,
}

fn main() -> Result<(), BoxDynError> {
    support::run(hot_key)
}

async fn hot_key(time: Duration) -> Result<(), BoxDynError> {
    let quick = time <= Duration::from_secs(1);
    let tasks = if quick { 50 } else { 1000 };
    let server = Server::options().setting("max_connections", "100").start();
    let db = TestDb::on(&server).await;
    let mut admin = db.admin().await;
    let pool = warm_pool(&db.options(), CONNECTIONS).await?;
    let mut title = "hot key: tasks of one process that acquire the same lock".to_owned();
    let go = build_go().await;
    if go.is_none() {
        title += " (without the program in Go)";
    }
    support::print_title(&title, &pool).await?;
    drop(Lock::new(&pool, KEY).acquire().await?);
    let idle = quantile(&ask(&pool, Instant::now() + time / 10).await?, 0.5);

    let here = Way::ALL.map(|way| Work::Here(way, pool.clone()));
    let (socket, port, name) = (server.socket_dir().display(), server.port(), db.name());
    let there = format!("host={socket} port={port} user=postgres dbname={name} sslmode=disable");
    let there = go.map(|program| Work::Go(program, there));
    let works = here.into_iter().chain(there);
    let mut measured: Vec<_> = works.map(|work| (work, Measured::default())).collect();
    for _ in 0..ROUNDS {
        for (work, measured) in &mut measured {
            run(work, &mut admin, tasks, time / ROUNDS / 4, measured).await?;
        }
    }

    println!("\n{tasks} tasks, pool of {CONNECTIONS}; a query on the idle pool takes {idle:.0} µs");
    let heads = ["cycles, relative", "cycles/s", "connections", "the query, µs"];
    let mut table = Table::new("hot_key", "", heads);
    let rate = |measured: &Measured| {
        #[expect(clippy::cast_precision_loss, reason = "there are few enough")]
        let cycles = measured.cycles as f64;
        cycles / measured.time.as_secs_f64()
    };
    let first = measured.first().map_or(f64::NAN, |(_, first)| rate(first));
    for (work, measured) in &measured {
        let rate = rate(measured);
        let median = format!("{:.0}", quantile(&measured.queries, 0.5));
        let [relative, rate] = [format!("{:.1}", rate / first), format!("{rate:.0}")];
        table.row(work.name(), [relative, rate, measured.connections.to_string(), median]);
    }
    let nothing = String::new;
    let idle = format!("{idle:.0}");
    table.row("nothing else", [nothing(), nothing(), "0".to_owned(), idle]);
    table.publish()
}

/// The tasks that lock, and the query beside them.
#[derive(Clone)]
enum Work {
    /// In a process of its own: the program and its connection string.
    Go(PathBuf, String),
    Here(Way, PgPool),
}

impl Work {
    fn name(&self) -> &'static str {
        match self {
            Self::Go(..) => "Go's `database/sql`, by go-pglock's statements",
            Self::Here(way, _) => way.name(),
        }
    }
}

async fn run(
    work: &Work,
    admin: &mut PgConnection,
    tasks: usize,
    time: Duration,
    measured: &mut Measured,
) -> Result<(), BoxDynError> {
    let started = Instant::now();
    let mut running = JoinSet::new();
    let work = work.clone();
    running.spawn(async move {
        match work {
            Work::Go(program, connect) => run_go(program, connect, tasks, time).await,
            Work::Here(way, pool) => run_here(way, pool, tasks, time).await,
        }
    });
    let mut tick = interval(LOOK);
    loop {
        tokio::select! {
            ended = running.join_next() => match ended {
                Some(ended) => {
                    let (cycles, queries) = ended??;
                    measured.cycles += cycles;
                    measured.queries.extend(queries);
                }
                None => break,
            },
            _ = tick.tick() => {
                let count = "SELECT count(DISTINCT pid) FROM pg_locks WHERE locktype = 'advisory'";
                let count: i64 = query_scalar(count).fetch_one(&mut *admin).await?;
                measured.connections = measured.connections.max(count);
            }
        }
    }
    measured.time += started.elapsed();
    Ok(())
}

/// The number of cycles, and the times of the queries beside them.
type Results = (usize, Vec<Duration>);

async fn run_here(
    way: Way,
    pool: PgPool,
    tasks: usize,
    time: Duration,
) -> Result<Results, BoxDynError> {
    let manager = LockManager::new(&pool);
    let end = Instant::now() + time;
    let mut running = JoinSet::new();
    for _ in 0..tasks {
        let (pool, manager) = (pool.clone(), manager.clone());
        running.spawn(async move {
            let mut cycles = 0;
            // The last cycle is not cancelled, because a wait of sqlx that is dropped costs its connection.
            while Instant::now() < end {
                cycle(way, &pool, &manager).await?;
                cycles += 1;
            }
            Ok::<usize, BoxDynError>(cycles)
        });
    }
    let mut asking = JoinSet::new();
    asking.spawn(async move { ask(&pool, end).await });
    let mut all = 0;
    while let Some(cycles) = running.join_next().await {
        all += cycles??;
    }
    let mut queries = Vec::new();
    for asked in asking.join_all().await {
        queries.extend(asked?);
    }
    Ok((all, queries))
}

/// Builds the program in Go. Returns `None` if something for that is not installed.
async fn build_go() -> Option<PathBuf> {
    let program = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("bench-go");
    let mut build = Command::new("go");
    build.args(["build", "-o"]).arg(&program);
    build.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/benches/go/main.go"));
    // Debian's packages of libraries are for this mode.
    build.env("GO111MODULE", "off").env("GOPATH", "/usr/share/gocode").env("GOFLAGS", "");
    let output = build.output().await.ok()?;
    if !output.status.success() {
        println!("{}", String::from_utf8_lossy(&output.stderr));
    }
    output.status.success().then_some(program)
}

async fn run_go(
    program: PathBuf,
    connect: String,
    tasks: usize,
    time: Duration,
) -> Result<Results, BoxDynError> {
    let numbers = [KEY.to_string(), tasks.to_string(), CONNECTIONS.to_string()];
    let mut command = Command::new(program);
    let command = command.arg(connect).args(numbers).arg(time.as_millis().to_string());
    let output = command.kill_on_drop(true).output().await?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into());
    }
    let written = String::from_utf8(output.stdout)?;
    let (cycles, queries) = written.split_once('\n').ok_or("not two lines")?;
    let queries = queries.split_whitespace().map(str::parse);
    let queries = queries.map(|micros| micros.map(Duration::from_micros));
    Ok((cycles.parse()?, queries.collect::<Result<_, _>>()?))
}

async fn cycle(way: Way, pool: &PgPool, manager: &LockManager) -> Result<(), BoxDynError> {
    match way {
        Way::Lock => Lock::new(pool, KEY).acquire().await?.release().await?,
        Way::LockDropped => drop(Lock::new(pool, KEY).acquire().await?),
        Way::Manager => Lock::new(manager, KEY).acquire().await?.release().await?,
        Way::Sqlx => {
            let lock = PgAdvisoryLock::with_key(PgAdvisoryLockKey::BigInt(KEY));
            let guard = lock.acquire(pool.acquire().await?).await?;
            drop(guard.release_now().await?);
        }
    }
    Ok(())
}

/// Measures repeatedly, until `end`, how long a query takes.
async fn ask(pool: &PgPool, end: Instant) -> Result<Vec<Duration>, sqlx::Error> {
    let mut times = Vec::new();
    while Instant::now() < end {
        let asked = Instant::now();
        query("SELECT 1").execute(pool).await?;
        times.push(asked.elapsed());
        sleep(Duration::from_millis(5)).await;
    }
    Ok(times)
}
