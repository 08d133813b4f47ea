//! Measures what it costs to monitor many locks that are held for long.
//!
//! Each handle has a session of its own, on which the crate listens and sends heartbeats. The benchmark
//! measures this process by the figures of Linux, and compares it with the same number of connections that are
//! merely open, and with locks held by hand, for each of which a task runs a statement as often as a heartbeat.

mod support;
mod table;
mod target;
#[expect(dead_code, reason = "a part of it is enough here")]
mod usage;

use std::process;
use std::time::Duration;

use pglock::{ExclusiveGuard, Lock};
use pglock_testkit::{Server, TestDb};
use sqlx::error::BoxDynError;
use sqlx::pool::PoolConnection;
use sqlx::{PgPool, Postgres};
use tokio::task::JoinSet;
use tokio::time::sleep;

use table::Table;
use usage::{cpu_of, resident};

fn main() -> Result<(), BoxDynError> {
    support::run(held)
}

async fn held(time: Duration) -> Result<(), BoxDynError> {
    let locks = if time > Duration::from_secs(1) { 1000 } else { 50 };
    let server =
        Server::options().setting("max_connections", &(2 * locks + 20).to_string()).start();
    let db = TestDb::on(&server).await;

    let start = Usage::now()?;
    let idle = db.pool(locks).await;
    let mut connections = Vec::new();
    for _ in 0..locks {
        connections.push(idle.acquire().await?);
    }
    let open = Usage::now()?;
    sleep(time).await;
    let idled = Usage::now()?;

    let mut beats: JoinSet<_> = connections.into_iter().zip(1_000_000..).map(hold).collect();
    sleep(Duration::from_secs(2)).await;
    let beaten = Usage::now()?;
    sleep(time).await;
    let beat = Usage::now()?;
    if let Some(failed) = beats.try_join_next() {
        failed??;
    }
    beats.shutdown().await;

    let resting = Usage::now()?;
    let pool = db.pool(locks).await;
    let mut guards = Vec::new();
    for key in 0..locks {
        guards.push(Lock::new(&pool, i64::from(key)).acquire().await?);
    }
    // Meanwhile, the crate begins to listen to the sessions, one after the other.
    sleep(Duration::from_secs(2)).await;
    let watched = Usage::now()?;
    sleep(time).await;
    let held = Usage::now()?;
    check(&pool, &guards)?;

    support::print_title(
        "held: locks that are held for long, each on a session of its own",
        &db.pool(1).await,
    )
    .await?;
    let (seconds, count) = (time.as_secs_f64(), f64::from(locks));
    let title = format!("{locks} for {seconds} s");
    let heads = ["processor, % of a core", "memory of the process each, KiB"];
    let mut table = Table::new("held", title, heads);
    let mut row = |what: &str, from: &Usage, to: &Usage, before: &Usage| {
        let cpu = 100.0 * to.cpu.saturating_sub(from.cpu).as_secs_f64() / seconds;
        let memory = (to.resident - before.resident) / 1024.0 / count;
        table.row(what, [format!("{cpu:.2}"), format!("{memory:.1}")]);
        (cpu, memory)
    };
    row("connections, open and idle", &open, &idled, &start);
    row("held by hand, and a statement every 2 s", &beaten, &beat, &start);
    let (cpu, memory) = row("held by a `Lock` each", &watched, &held, &resting);
    table.publish()?;
    if locks == 1000 {
        target::print_at_most("% of a core for a thousand held locks", &[cpu], 1.5);
        target::print_at_most("KiB for each of them", &[memory], 16.0);
    }
    Ok(())
}

/// Holds a lock, and runs a statement on its connection every two seconds.
async fn hold((mut connection, key): (PoolConnection<Postgres>, i64)) -> Result<(), sqlx::Error> {
    let acquire = sqlx::query("SELECT pg_advisory_lock($1)").bind(key);
    acquire.execute(&mut *connection).await?;
    loop {
        sleep(Duration::from_secs(2)).await;
        let beat = sqlx::raw_sql("SELECT pg_backend_pid(), clock_timestamp()");
        beat.fetch_one(&mut *connection).await?;
    }
}

/// Returns an error if a lock was lost meanwhile, because a lost lock costs nothing.
fn check(pool: &PgPool, guards: &[ExclusiveGuard]) -> Result<(), BoxDynError> {
    let lost = guards.iter().filter(|guard| guard.is_lost()).count();
    if lost > 0 {
        return Err(format!("{lost} of {} locks were lost", pool.size()).into());
    }
    Ok(())
}

/// The CPU time and the memory that this process has used.
struct Usage {
    cpu: Duration,
    resident: f64,
}

impl Usage {
    fn now() -> Result<Self, BoxDynError> {
        Ok(Self { cpu: cpu_of(process::id())?, resident: resident()? })
    }
}
