//! Serialise the jobs of each customer with apalis, on two workers.
//!
//! A queue hands each job to one worker, but two jobs of the same customer may run at the same time. With a lock per
//! customer they take turns, and jobs of other customers run beside them. All jobs of a worker share one
//! `LockManager`, which needs a few connections, however many jobs hold a lock or wait. A job that waits counts as one
//! that runs: leave room for it in a limit such as `concurrency`.

#![expect(clippy::print_stdout, reason = "an example tells what it does")]

use std::error::Error;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use apalis::prelude::{BoxDynError, Data, MemoryStorage, TaskSink, WorkerBuilder, WorkerError};
use pglock::{Lock, LockManager};
use pglock_testkit::TestDb;
use sqlx::PgPool;
use tokio::time::sleep;

const CUSTOMERS: i32 = 3;
const JOBS: i32 = 24;

/// The state that the jobs of a worker use.
#[derive(Clone)]
struct Instance {
    pool: PgPool,
    manager: LockManager,
}

/// The number of jobs that are done. The workers end when all jobs are done.
static DONE: AtomicU32 = AtomicU32::new(0);

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    // A database for the recipe. Yours has a pool from `PgPool::connect(&url).await?` for each instance.
    let db = TestDb::new().await;
    let pool = db.pool(2).await;
    sqlx::raw_sql(
        "CREATE TABLE customer (id int PRIMARY KEY, jobs int NOT NULL);
         INSERT INTO customer SELECT id, 0 FROM generate_series(1, 3) id",
    )
    .execute(&pool)
    .await?;

    // Each worker has a queue in memory. Both queues have jobs of every customer, as if one queue in a database had
    // distributed them.
    let mut queues = [MemoryStorage::new(), MemoryStorage::new()];
    for queue in &mut queues {
        for job in 0..JOBS / 2 {
            queue.push(job % CUSTOMERS + 1).await?;
        }
    }
    let [first, second] = queues;
    tokio::try_join!(
        work("first", first, db.pool(4).await),
        work("second", second, db.pool(4).await),
    )?;

    let jobs: Vec<i32> = sqlx::query_scalar("SELECT jobs FROM customer").fetch_all(&pool).await?;
    assert_eq!(jobs, [JOBS / CUSTOMERS; CUSTOMERS as usize], "no job overwrites another's result");
    println!("{JOBS} jobs of {CUSTOMERS} customers on two workers: no update is lost");
    Ok(())
}

/// Runs the jobs of a queue, until the jobs of both queues are done.
async fn work(name: &str, queue: MemoryStorage<i32>, pool: PgPool) -> Result<(), WorkerError> {
    let instance = Instance { manager: LockManager::new(&pool), pool };
    let worker = WorkerBuilder::new(name).backend(queue).data(instance).build(bill);
    let all_done = async {
        while DONE.load(Ordering::Relaxed) < JOBS.cast_unsigned() {
            sleep(Duration::from_millis(20)).await;
        }
        Ok::<_, WorkerError>(())
    };
    worker.run_until(all_done).await
}

/// Runs a job, which reads, computes for a while, and writes. Two jobs at once for one customer would lose an update.
async fn bill(customer: i32, instance: Data<Instance>) -> Result<(), BoxDynError> {
    let Instance { pool, manager } = &*instance;
    let guard = Lock::new(manager, format!("customer-{customer}")).acquire().await?;
    let select = sqlx::query_scalar("SELECT jobs FROM customer WHERE id = $1").bind(customer);
    let jobs: i32 = select.fetch_one(pool).await?;
    guard.while_held(sleep(Duration::from_millis(20))).await?;
    let update = sqlx::query("UPDATE customer SET jobs = $1 WHERE id = $2").bind(jobs + 1);
    update.bind(customer).execute(pool).await?;
    guard.release().await?;
    DONE.fetch_add(1, Ordering::Relaxed);
    Ok(())
}
