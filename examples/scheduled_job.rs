//! Run a scheduled job on one machine, though the schedule fires on all of them.
//!
//! You want this for a job that a clock starts, and that must run once each time: a nightly report, a clean-up
//! every minute. All machines are set up alike, and any of them may be down.

#![expect(clippy::print_stdout, reason = "an example tells what it does")]

use std::error::Error;
use std::time::Duration;

use pglock::Lock;
use pglock_testkit::TestDb;
use sqlx::PgPool;
use tokio::task::JoinSet;
use tokio::time::{Instant, interval_at, sleep};

const PERIOD: Duration = Duration::from_millis(400);
const TICKS: i32 = 3;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

#[tokio::main]
async fn main() -> Result<()> {
    // A database of the testkit. In your program, each pool is `PgPool::connect(&url).await?`.
    let db = TestDb::new().await;
    let pool = db.pool(2).await;
    sqlx::raw_sql("CREATE TABLE run (tick int PRIMARY KEY, machine text NOT NULL)")
        .execute(&pool)
        .await?;

    let start = Instant::now() + Duration::from_millis(200);
    let mut machines = JoinSet::new();
    for name in ["red", "green", "blue"] {
        machines.spawn(schedule(name, db.pool(2).await, start));
    }
    while let Some(machine) = machines.join_next().await {
        machine??;
    }

    let runs: Vec<i32> =
        sqlx::query_scalar("SELECT tick FROM run ORDER BY tick").fetch_all(&pool).await?;
    assert_eq!(runs, (1..=TICKS).collect::<Vec<_>>());
    println!("{TICKS} ticks on three machines, {} runs", runs.len());
    Ok(())
}

async fn schedule(machine: &str, pool: PgPool, start: Instant) -> Result<()> {
    let mut lock = Lock::new(&pool, "clean-up");
    let mut clock = interval_at(start, PERIOD);
    for tick in 1..=TICKS {
        clock.tick().await;
        let Some(guard) = lock.try_acquire().await? else {
            println!("tick {tick}: {machine} leaves it to another");
            continue;
        };

        // The clocks of machines differ: one machine may acquire the lock when another one has finished already. So the
        // job records the tick, on the session that holds the lock.
        let mut connection = guard.connection().await?;
        let first = sqlx::query("INSERT INTO run VALUES ($1, $2) ON CONFLICT DO NOTHING")
            .bind(tick)
            .bind(machine)
            .execute(&mut *connection)
            .await?
            .rows_affected()
            == 1;
        drop(connection);
        if first {
            println!("tick {tick}: {machine} cleans up");
            sleep(PERIOD / 2).await;
        }
        guard.release().await?;
    }
    Ok(())
}
