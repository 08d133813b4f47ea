//! Run a job once per tick of the clock, on one node of the cluster, whatever is late.
//!
//! You want this for a job that runs every minute, and must neither be skipped nor run twice: a node's
//! clock may be behind, a run may take longer than a minute, and any node may be down. (If a skipped run
//! does no harm, see `scheduled_job`, which is simpler.)
//!
//! The lock alone is not enough: it ensures that no other node runs the job *now*, but it does not show whether
//! a node whose clock is ahead did this minute's run a moment ago. So the session that holds the lock records the
//! last tick in a row. The row shows which ticks are due, and the lock ensures that only one node runs them.

#![expect(clippy::print_stdout, reason = "an example tells what it does")]

use std::error::Error;
use std::time::Duration;

use pglock::{ExclusiveGuard, Lock};
use pglock_testkit::TestDb;
use sqlx::PgPool;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

/// The period of the job, which stands for a minute in this example.
const PERIOD: Duration = Duration::from_secs(1);
const TICKS: u32 = 5;
/// The tick whose run takes longer than a period.
const LONG: u32 = 2;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// A node of the cluster.
struct Node {
    name: &'static str,
    pool: PgPool,
    clock: Clock,
}

/// A node's clock. In a program of yours, the tick is the time in minutes: `unix_seconds / 60`.
struct Clock {
    start: Instant,
    behind: Duration,
}

#[tokio::main]
async fn main() -> Result<()> {
    // A database of the testkit. In your program, each pool is `PgPool::connect(&url).await?`.
    let db = TestDb::new().await;
    let pool = db.pool(2).await;
    sqlx::raw_sql(
        "CREATE TABLE cron (job text PRIMARY KEY, last_tick int NOT NULL);
         INSERT INTO cron VALUES ('billing', 0);
         CREATE TABLE run (tick int, node text, began timestamptz, ended timestamptz)",
    )
    .execute(&pool)
    .await?;

    // All nodes wake at each tick; one of them always does so late.
    let start = Instant::now();
    let mut nodes = JoinSet::new();
    for (name, behind) in [("red", 0), ("green", 0), ("blue", 300)] {
        let clock = Clock { start, behind: Duration::from_millis(behind) };
        nodes.spawn(Node { name, pool: db.pool(2).await, clock }.serve());
    }
    while let Some(node) = nodes.join_next().await {
        node??;
    }

    let ticks: Vec<i32> =
        sqlx::query_scalar("SELECT tick FROM run ORDER BY began").fetch_all(&pool).await?;
    assert_eq!(ticks, (1..=TICKS.cast_signed()).collect::<Vec<_>>(), "each tick, once, in order");
    let overlaps: i64 = sqlx::query_scalar(
        "SELECT count(*) FROM run a JOIN run b
         ON a.tick < b.tick AND coalesce(a.ended, 'infinity') > b.began",
    )
    .fetch_one(&pool)
    .await?;
    assert_eq!(overlaps, 0, "never two at once");
    println!("{TICKS} ticks on three nodes: {} runs, one for each, never two at once", ticks.len());
    Ok(())
}

impl Node {
    /// Wakes at each tick, and runs the job for the ticks that are due.
    async fn serve(self) -> Result<()> {
        let mut lock = Lock::new(&self.pool, "cron:billing");
        for tick in 1..=TICKS {
            sleep_until(self.clock.at(tick)).await;
            let guard = lock.try_acquire().await?;
            match guard {
                Some(guard) => self.run_what_is_due(tick, guard).await?,
                // The node that runs the job looks for due ticks again after the run, so no tick is skipped because
                // a run took long.
                None => println!("tick {tick}: {} leaves it to another", self.name),
            }
        }
        Ok(())
    }

    /// Runs the job for each tick that no node has run yet, oldest first.
    async fn run_what_is_due(&self, woken_for: u32, guard: ExclusiveGuard) -> Result<()> {
        let mut runs = 0;
        while let Some(tick) = self.next_due(&guard).await? {
            println!("tick {tick}: {} runs the job", self.name);
            // If the lock is lost, the job is stopped, because another node may begin the next run.
            guard.while_held(self.job(tick)).await??;
            runs += 1;
        }
        if runs == 0 {
            println!("tick {woken_for}: {} comes, and finds it done", self.name);
        }
        Ok(guard.release().await?)
    }

    /// Takes the next tick that is due, if there is one.
    ///
    /// The tick is recorded before the job runs: if the node dies during the run, the run stays half done, and no node
    /// repeats it. If you record the tick after the job instead, the next node repeats the run from the beginning. If
    /// the job itself is a transaction, record the tick in it, and the job is done once.
    async fn next_due(&self, guard: &ExclusiveGuard) -> Result<Option<i32>> {
        // The statement runs on the session that holds the lock, so a node that has lost the lock can't take a tick
        // from another node.
        Ok(sqlx::query_scalar(
            "UPDATE cron SET last_tick = last_tick + 1 WHERE job = 'billing' AND last_tick < $1
             RETURNING last_tick",
        )
        .bind(self.clock.tick().cast_signed())
        .fetch_optional(&mut *guard.connection().await?)
        .await?)
    }

    /// The job. Notes when it ran.
    async fn job(&self, tick: i32) -> Result<()> {
        let began = "INSERT INTO run VALUES ($1, $2, clock_timestamp())";
        sqlx::query(began).bind(tick).bind(self.name).execute(&self.pool).await?;
        let long = tick == LONG.cast_signed();
        sleep(if long { PERIOD * 3 / 2 } else { PERIOD / 10 }).await;
        let ended = "UPDATE run SET ended = clock_timestamp() WHERE tick = $1 AND node = $2";
        sqlx::query(ended).bind(tick).bind(self.name).execute(&self.pool).await?;
        Ok(())
    }
}

impl Clock {
    /// When a tick comes, by this clock.
    fn at(&self, tick: u32) -> Instant {
        self.start + self.behind + PERIOD * tick
    }

    /// The latest tick that has come, by this clock.
    fn tick(&self) -> u32 {
        (1..=TICKS).take_while(|tick| self.at(*tick) <= Instant::now()).last().unwrap_or(0)
    }
}
