//! Measures how costs grow with the number of waiters that have a pool each, as if each were a process, of locks that
//! are held, and of tasks of a manager.

#![expect(clippy::print_stdout, reason = "a bench is there to print")]

mod quantile;
mod support;
mod table;
mod usage;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pglock::{Lock, LockManager, LockOptions};
use pglock_testkit::{Server, TestDb};
use sqlx::error::BoxDynError;
use sqlx::postgres::PgPoolOptions;
use sqlx::{PgPool, query, query_scalar};
use tokio::task::{JoinSet, consume_budget};
use tokio::time::{sleep, sleep_until};

use quantile::quantile;
use table::Table;
use usage::{cpu_of_server, resident};

fn main() -> Result<(), BoxDynError> {
    support::run(scale)
}

async fn scale(time: Duration) -> Result<(), BoxDynError> {
    let quick = time <= Duration::from_secs(1);
    let server = Server::options()
        .setting("max_connections", if quick { "100" } else { "1100" })
        .setting("max_locks_per_transaction", "400")
        .start();
    let db = TestDb::on(&server).await;
    let title = "scale: many processes, many held locks, many tasks";
    support::print_title(title, &db.pool(1).await).await?;
    // First, because later the process would have spare memory that earlier parts have freed.
    tasks(&db, quick).await?;
    held(&db, quick).await?;
    waiting(&db, server.postmaster_pid(), quick).await
}

/// Measures a manager with a growing number of tasks: cycles per second, and the memory of a task that waits.
async fn tasks(db: &TestDb, quick: bool) -> Result<(), BoxDynError> {
    let numbers: &[u32] =
        if quick { &[1, 20] } else { &[100_000, 30_000, 10_000, 1000, 100, 10, 1] };
    let time = Duration::from_millis(if quick { 100 } else { 2000 });
    let turns = if quick { 1 } else { 3 };
    let heads = [
        "a key each: cycles/s",
        "relative to the best",
        "one key: cycles/s",
        "relative to its best",
        "bytes per waiting task",
    ];
    let mut measured = Vec::new();
    // Only once, because then the process has spare memory.
    let most = numbers.iter().copied().max().unwrap_or_default();
    let memory = memory_of_waiters(db, most).await?;
    for &tasks in numbers {
        let (mut distinct, mut one) = (Vec::new(), Vec::new());
        for _ in 0..turns {
            distinct.push(cycles(db, tasks, i64::from, time).await?);
            one.push(cycles(db, tasks, |_| 0, time).await?);
        }
        let median = |rates: &mut Vec<f64>| {
            rates.sort_by(f64::total_cmp);
            rates.get(turns / 2).copied().unwrap_or_default()
        };
        measured.push((tasks, median(&mut distinct), median(&mut one)));
    }
    let best = |of: fn(&(u32, f64, f64)) -> f64| measured.iter().map(of).fold(0.0, f64::max);
    let (best_distinct, best_one) = (best(|row| row.1), best(|row| row.2));
    let mut table = Table::new("scale_tasks", "tasks of a manager, releases awaited", heads);
    for (tasks, distinct, one) in measured.iter().rev() {
        let ratios = [distinct / best_distinct, one / best_one];
        let [of_distinct, of_one] = ratios.map(|ratio| format!("{ratio:.2}"));
        let memory = if *tasks == most { format!("{memory:.0}") } else { String::new() };
        let cells = [format!("{distinct:.0}"), of_distinct, format!("{one:.0}"), of_one, memory];
        table.row(tasks.to_string(), cells);
    }
    table.publish()
}

/// Returns how many cycles the tasks complete per second.
async fn cycles(
    db: &TestDb,
    tasks: u32,
    key: fn(u32) -> i64,
    time: Duration,
) -> Result<f64, BoxDynError> {
    let manager = LockManager::new(&db.pool(2).await);
    let (stop, count) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let mut running = JoinSet::new();
    for task in 0..tasks {
        let mut lock = Lock::new(&manager, key(task));
        let (stop, count) = (Arc::clone(&stop), Arc::clone(&count));
        running.spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                lock.acquire().await?.release().await?;
                count.fetch_add(1, Ordering::Relaxed);
                consume_budget().await;
            }
            Ok::<_, pglock::Error>(())
        });
    }
    sleep(time / 4).await;
    let (before, started) = (count.load(Ordering::Relaxed), Instant::now());
    sleep(time).await;
    let (after, took) = (count.load(Ordering::Relaxed), started.elapsed());
    stop.store(true, Ordering::Relaxed);
    while let Some(done) = running.join_next().await {
        done??;
    }
    #[expect(clippy::cast_precision_loss, reason = "there are few enough")]
    Ok((after - before) as f64 / took.as_secs_f64())
}

/// Returns the bytes of memory for each task that waits for a key, which another session holds.
async fn memory_of_waiters(db: &TestDb, tasks: u32) -> Result<f64, BoxDynError> {
    let mut holder = db.admin().await;
    query("SELECT pg_advisory_lock(-1)").execute(&mut holder).await?;
    let manager = LockManager::new(&db.pool(2).await);
    drop(Lock::new(&manager, 0).acquire().await?);
    let waiting = Arc::new(AtomicU64::new(0));
    let mut running = JoinSet::new();
    let before = resident()?;
    for _ in 0..tasks {
        let (mut lock, waiting) = (Lock::new(&manager, -1), Arc::clone(&waiting));
        running.spawn(async move {
            waiting.fetch_add(1, Ordering::Relaxed);
            lock.acquire().await.map(drop)
        });
    }
    while waiting.load(Ordering::Relaxed) < u64::from(tasks) {
        sleep(Duration::from_millis(10)).await;
    }
    let bytes = (resident()? - before) / f64::from(tasks);
    query("SELECT pg_advisory_unlock(-1)").execute(&mut holder).await?;
    while let Some(done) = running.join_next().await {
        done??;
    }
    Ok(bytes)
}

/// Measures acquires of a free key beside many held locks, by the same manager and by another one.
async fn held(db: &TestDb, quick: bool) -> Result<(), BoxDynError> {
    let (all, rate, seconds) = if quick { (1000, 100, 1) } else { (100_000, 10_000, 5) };
    let title = format!("{rate} acquires per second of {seconds} s");
    let mut table = Table::new("scale_held", title, ["acquires/s", "median, µs", "99 %, µs"]);
    let other = LockManager::new(&db.pool(2).await);
    for held in [0, all] {
        let manager = LockManager::new(&db.pool(2).await);
        let mut guards = Vec::new();
        let mut running = JoinSet::new();
        for key in 0..held {
            let mut lock = Lock::new(&manager, key);
            running.spawn(async move { lock.acquire().await });
        }
        while let Some(guard) = running.join_next().await {
            guards.push(guard??);
        }
        for (whose, manager) in [("the same manager", &manager), ("another manager", &other)] {
            let (times, took) = acquires(manager, rate, rate * seconds).await?;
            #[expect(clippy::cast_precision_loss, reason = "there are few enough")]
            let reached = times.len() as f64 / took.as_secs_f64();
            let [median, late] = [0.5, 0.99].map(|q| format!("{:.0}", quantile(&times, q)));
            table.row(format!("{held} held, {whose}"), [format!("{reached:.0}"), median, late]);
        }
    }
    table.publish()
}

/// Begins acquires at a constant rate, and returns how long each took.
async fn acquires(
    manager: &LockManager,
    rate: u32,
    count: u32,
) -> Result<(Vec<Duration>, Duration), BoxDynError> {
    let started = Instant::now();
    let mut running = JoinSet::new();
    for number in 0..count {
        let due = started + Duration::from_secs(1) * number / rate;
        // The timer is coarser than the rate, so several acquires begin together.
        if due > Instant::now() {
            sleep_until(due.into()).await;
        }
        let mut lock = Lock::new(manager, 1_000_000 + i64::from(number));
        let requested = Instant::now();
        running.spawn(async move {
            drop(lock.acquire().await?);
            Ok::<_, pglock::Error>(requested.elapsed())
        });
    }
    let mut times = Vec::new();
    while let Some(time) = running.join_next().await {
        times.push(time??);
    }
    Ok((times, started.elapsed()))
}

/// How the processes of [`waiting`] wait.
#[derive(Clone, Copy)]
enum Wait {
    /// All for one key, by a statement that just waits.
    ByHand,
    /// Each for a key of its own.
    Distinct,
    /// All for one key.
    One,
}

/// Measures processes that wait, each with a pool of its own, for one key or for a key each.
async fn waiting(db: &TestDb, postmaster: u32, quick: bool) -> Result<(), BoxDynError> {
    let numbers: &[i64] = if quick { &[10] } else { &[100, 300, 1000] };
    let (early, late) = if quick { (1, 1) } else { (10, 60) };
    let heads = ["until all wait, s", "first 10 s, %", "then, %", "µs per hand-off", "errors"];
    let mut table = Table::new("scale_waiting", "processes that wait; server", heads);
    for (&waiters, wait) in numbers
        .iter()
        .flat_map(|waiters| [Wait::ByHand, Wait::One, Wait::Distinct].map(|wait| (waiters, wait)))
    {
        let keys = if matches!(wait, Wait::Distinct) { waiters } else { 1 };
        let mut holder = db.admin().await;
        let all = "SELECT pg_advisory_lock(key) FROM generate_series(0, $1 - 1) key";
        query(all).bind(keys).execute(&mut holder).await?;
        let mut pools = Vec::new();
        for _ in 0..waiters {
            let pool = PgPoolOptions::new().max_connections(1).connect_with(db.options()).await?;
            pools.push(pool);
        }
        let started = Instant::now();
        let mut running = JoinSet::new();
        for (process, pool) in (0..).zip(&pools) {
            running.spawn(wait_once(wait, pool.clone(), process % keys));
        }
        let mut errors = 0;
        loop {
            while let Some(ended) = running.try_join_next() {
                errors += count_error(&ended?);
            }
            let queued =
                "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted";
            if query_scalar::<_, i64>(queued).fetch_one(&mut holder).await? + errors >= waiters {
                break;
            }
            sleep(Duration::from_millis(100)).await;
        }
        let all_wait = started.elapsed().as_secs_f64();
        let first = usage(postmaster, early).await?;
        let then = usage(postmaster, late).await?;

        let started = Instant::now();
        query("SELECT pg_advisory_unlock_all()").execute(&mut holder).await?;
        while let Some(ended) = running.join_next().await {
            errors += count_error(&ended?);
        }
        let each = started.elapsed().as_secs_f64() * 1e6 / f64::from(u32::try_from(waiters)?);
        for pool in pools {
            pool.close().await;
        }
        let name = match wait {
            Wait::ByHand => format!("{waiters}, one key, `SELECT pg_advisory_lock`"),
            Wait::Distinct => format!("{waiters}, a key each, `Lock`"),
            Wait::One => format!("{waiters}, one key, `Lock`"),
        };
        let figures = [all_wait, first, then].map(|figure| format!("{figure:.1}"));
        table.row(name, figures.into_iter().chain([format!("{each:.0}"), errors.to_string()]));
    }
    table.publish()
}

/// Prints an error. Returns the number of errors.
fn count_error(ended: &Result<(), BoxDynError>) -> i64 {
    if let Err(error) = ended {
        println!("{error}");
    }
    i64::from(ended.is_err())
}

/// Waits for a key, and releases it.
async fn wait_once(wait: Wait, pool: PgPool, key: i64) -> Result<(), BoxDynError> {
    if let Wait::ByHand = wait {
        let mut connection = pool.acquire().await?;
        query("SELECT pg_advisory_lock($1)").bind(key).execute(&mut *connection).await?;
        query("SELECT pg_advisory_unlock($1)").bind(key).execute(&mut *connection).await?;
        return Ok(());
    }
    let configured = LockOptions::new().reserve_connections(0).on(&pool)?;
    Ok(Lock::new(&configured, key).acquire().await?.release().await?)
}

/// Returns the processor time that the server uses meanwhile, in percent of a core.
async fn usage(postmaster: u32, seconds: u64) -> Result<f64, BoxDynError> {
    let before = cpu_of_server(postmaster)?;
    let started = Instant::now();
    sleep(Duration::from_secs(seconds)).await;
    let used = cpu_of_server(postmaster)?.saturating_sub(before);
    Ok(100.0 * used.as_secs_f64() / started.elapsed().as_secs_f64())
}
