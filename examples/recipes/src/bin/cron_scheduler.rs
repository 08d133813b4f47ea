//! Run a job of tokio-cron-scheduler on one of two instances.
//!
//! The schedule fires on every instance. The lock allows one run at a time, but if the job is short, an instance that
//! wakes a moment later acquires the lock too. So the job records the tick, on the session that holds the lock. A tick
//! that comes while the job runs is skipped; the example `cron` catches up on it.

#![expect(clippy::print_stdout, reason = "an example tells what it does")]

use std::error::Error;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime};

use pglock::Lock;
use pglock_testkit::TestDb;
use sqlx::PgPool;
use tokio::time::sleep;
use tokio_cron_scheduler::{Job, JobScheduler};

const PERIOD: Duration = Duration::from_secs(1);

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

// Counted for the check at the end.
static WAKES: AtomicU32 = AtomicU32::new(0);
static RUNS: AtomicU32 = AtomicU32::new(0);
static RUNNING: AtomicU32 = AtomicU32::new(0);
static MOST_RUNNING: AtomicU32 = AtomicU32::new(0);

#[tokio::main]
async fn main() -> Result<()> {
    // A database for the recipe. Yours has a pool from `PgPool::connect(&url).await?` for each instance.
    let db = TestDb::new().await;
    let pool = db.pool(2).await;
    sqlx::raw_sql("CREATE TABLE tick (job text, number bigint, PRIMARY KEY (job, number))")
        .execute(&pool)
        .await?;

    let first = start(db.pool(2).await).await?;
    sleep(PERIOD / 4).await; // The second instance is always a moment later.
    let mut instances = [first, start(db.pool(2).await).await?];
    while WAKES.load(Ordering::Relaxed) < 6 {
        sleep(PERIOD / 10).await;
    }
    for instance in &mut instances {
        instance.shutdown().await?;
    }
    // A shut-down scheduler starts no further job, and does not wait for those that run.
    sleep(PERIOD).await;

    let ticks: i64 = sqlx::query_scalar("SELECT count(*) FROM tick").fetch_one(&pool).await?;
    let (wakes, runs) = (WAKES.load(Ordering::Relaxed), RUNS.load(Ordering::Relaxed));
    assert_eq!(i64::from(runs), ticks, "one run for each tick");
    assert_eq!(MOST_RUNNING.load(Ordering::Relaxed), 1, "one run at a time");
    println!("two instances woke {wakes} times: {runs} runs, each for a tick of its own");
    Ok(())
}

/// Starts the scheduler of an instance.
async fn start(pool: PgPool) -> Result<JobScheduler> {
    let scheduler = JobScheduler::new().await?;
    // Every second. Every minute is `0 * * * * *`.
    let job = Job::new_async("* * * * * *", move |_id, _scheduler| {
        let pool = pool.clone();
        Box::pin(async move {
            // The scheduler ignores what a job returns.
            if let Err(error) = clean_up(&pool).await {
                println!("the clean-up failed: {error}");
            }
        })
    })?;
    scheduler.add(job).await?;
    scheduler.start().await?;
    Ok(scheduler)
}

/// Runs the job, if this instance is the first to acquire the lock.
async fn clean_up(pool: &PgPool) -> Result<()> {
    WAKES.fetch_add(1, Ordering::Relaxed);
    // The tick is computed from this instance's own clock, which the scheduler reads as well.
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
    let tick = i64::try_from(now.as_secs() / PERIOD.as_secs())?;

    let Some(guard) = Lock::new(pool, "clean-up").try_acquire().await? else {
        return Ok(());
    };
    let record = "INSERT INTO tick VALUES ('clean-up', $1) ON CONFLICT DO NOTHING";
    let recorded = sqlx::query(record).bind(tick).execute(&mut *guard.connection().await?).await?;
    if recorded.rows_affected() == 1 {
        guard.while_held(work()).await?;
    }
    Ok(guard.release().await?)
}

/// Takes longer than a period the first time, and then much less.
async fn work() {
    MOST_RUNNING.fetch_max(RUNNING.fetch_add(1, Ordering::Relaxed) + 1, Ordering::Relaxed);
    let is_first = RUNS.fetch_add(1, Ordering::Relaxed) == 0;
    sleep(if is_first { PERIOD * 3 / 2 } else { PERIOD / 20 }).await;
    RUNNING.fetch_sub(1, Ordering::Relaxed);
}
