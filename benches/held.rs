//! Measures what it costs to monitor many locks that are held for long.
//!
//! Each handle has a session of its own, on which the crate listens and sends heartbeats. The benchmark
//! measures this process by the figures of Linux, and compares it with the same number of connections that are
//! merely open.

#![expect(clippy::print_stdout, reason = "a bench is there to print")]

mod support;

use std::fs;
use std::time::Duration;

use pglock::{ExclusiveGuard, Lock};
use pglock_testkit::{Server, TestDb};
use sqlx::PgPool;
use sqlx::error::BoxDynError;
use tokio::time::sleep;

/// The clock ticks by which Linux counts CPU time, the same on all machines.
const TICKS_PER_SECOND: f64 = 100.0;

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

    // One connection is spare, because listening to the sessions takes another one.
    let pool = db.pool(locks + 1).await;
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
    println!(
        "\n{locks} for {seconds} s                     CPU, 1 core = 100 %    memory each, KiB"
    );
    let row = |what, from: &Usage, to: &Usage, before: &Usage| {
        let cpu = 100.0 * (to.cpu_s - from.cpu_s) / seconds;
        let memory = (to.resident_kib - before.resident_kib) / count;
        println!("{what:<36} {cpu:>10.2} {memory:>22.1}");
    };
    row("connections, open and idle", &open, &idled, &start);
    row("locks, held and watched", &watched, &held, &idled);
    Ok(())
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
    cpu_s: f64,
    resident_kib: f64,
}

impl Usage {
    /// Reads `/proc`. Returns zeros if there is none.
    fn now() -> Result<Self, BoxDynError> {
        let Ok(stat) = fs::read_to_string("/proc/self/stat") else {
            return Ok(Self { cpu_s: 0.0, resident_kib: 0.0 });
        };
        // The name, in parentheses, may contain spaces. User and system time are the 12th and 13th field after it.
        let (_, fields) = stat.rsplit_once(") ").ok_or("/proc/self/stat has no name")?;
        let ticks = fields.split(' ').skip(11).take(2).map(str::parse::<f64>);
        let cpu_s = ticks.sum::<Result<f64, _>>()? / TICKS_PER_SECOND;
        let status = fs::read_to_string("/proc/self/status")?;
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let resident = resident.and_then(|line| line.trim().strip_suffix(" kB"));
        Ok(Self { cpu_s, resident_kib: resident.ok_or("/proc/self/status has no VmRSS")?.parse()? })
    }
}
