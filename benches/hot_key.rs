//! Measures a hot key: many tasks of one process that acquire the same lock, and a query that needs the same pool.
//!
//! For each way to lock, the benchmark prints how many cycles it has completed per second, how many connections the
//! lock had at most, and how long the query took, beside how long the query takes on an idle pool.

#![expect(clippy::print_stdout, reason = "a bench is there to print")]

mod quantile;
mod support;

use std::time::{Duration, Instant};

use pglock::{Lock, LockManager};
use pglock_testkit::{Server, TestDb};
use sqlx::error::BoxDynError;
use sqlx::postgres::{PgAdvisoryLock, PgAdvisoryLockKey};
use sqlx::{PgConnection, PgPool, query, query_scalar};
use tokio::task::JoinSet;
use tokio::time::sleep;

use quantile::quantile;

const KEY: i64 = 17;
const CONNECTIONS: u32 = 10;

/// How often each way has its turn.
const ROUNDS: u32 = 4;

/// The interval at which the connections of the lock are counted.
const LOOK: Duration = Duration::from_millis(20);

/// A way to lock.
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
            Self::Lock => "Lock, releases awaited",
            Self::LockDropped => "Lock, guards dropped",
            Self::Manager => "LockManager, releases awaited",
            Self::Sqlx => "sqlx's PgAdvisoryLock",
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
    let pool = db.pool(CONNECTIONS).await;
    support::print_title("hot key: tasks of one process that want the same lock", &pool).await?;
    drop(Lock::new(&pool, KEY).acquire().await?);
    let idle = quantile(&ask(&pool, Instant::now() + time / 10).await?, 0.5);

    let mut measured = Way::ALL.map(|way| (way, Measured::default()));
    for _ in 0..ROUNDS {
        for (way, measured) in &mut measured {
            run(*way, &pool, &mut admin, tasks, time / ROUNDS / 4, measured).await?;
        }
    }

    println!("\n{tasks} tasks, pool of {CONNECTIONS}; a query on the idle pool takes {idle:.0} µs");
    println!(
        "{:<32}{:>8}{:>12}{:>14}{:>12}{:>8}",
        "", "ratio", "cycles/s", "connections", "query, µs", "p99"
    );
    let rate = |measured: &Measured| {
        #[expect(clippy::cast_precision_loss, reason = "there are few enough")]
        let cycles = measured.cycles as f64;
        cycles / measured.time.as_secs_f64()
    };
    let first = measured.first().map_or(f64::NAN, |(_, first)| rate(first));
    for (way, measured) in &measured {
        let rate = rate(measured);
        println!(
            "{:<32}{:>8.2}{rate:>12.0}{:>14}{:>12.0}{:>8.0}",
            way.name(),
            rate / first,
            measured.connections,
            quantile(&measured.queries, 0.5),
            quantile(&measured.queries, 0.99),
        );
    }
    Ok(())
}

async fn run(
    way: Way,
    pool: &PgPool,
    admin: &mut PgConnection,
    tasks: usize,
    time: Duration,
    measured: &mut Measured,
) -> Result<(), BoxDynError> {
    let manager = LockManager::new(pool);
    let started = Instant::now();
    let end = started + time;
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
    let others = pool.clone();
    asking.spawn(async move { ask(&others, end).await });
    while Instant::now() < end {
        let connections = "SELECT count(DISTINCT pid) FROM pg_locks WHERE locktype = 'advisory'";
        let connections: i64 = query_scalar(connections).fetch_one(&mut *admin).await?;
        measured.connections = measured.connections.max(connections);
        sleep(LOOK).await;
    }
    for asked in asking.join_all().await {
        measured.queries.extend(asked?);
    }
    while let Some(cycles) = running.join_next().await {
        measured.cycles += cycles??;
    }
    measured.time += started.elapsed();
    Ok(())
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
