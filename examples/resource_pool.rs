//! Share a few numbered resources among many users, each resource with one user at a time.
//!
//! You want this when there are fewer resources than users, and it matters which of them a user has:
//! licences, ports, test devices, seats at another company's service.

#![expect(clippy::print_stdout, reason = "an example tells what it does")]

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use pglock::Semaphore;
use pglock_testkit::TestDb;
use sqlx::PgPool;
use tokio::task::JoinSet;
use tokio::time::sleep;

/// The resources that the permits stand for. Permit 0 is the first of them.
const LICENCES: [&str; 3] = ["A-17", "B-04", "C-23"];
const MACHINES: usize = 6;
const JOBS: usize = 2;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// How many users each licence has now. This is only to check the example, because real machines share no memory.
type Users = Arc<[AtomicUsize; LICENCES.len()]>;

#[tokio::main]
async fn main() -> Result<()> {
    // A database of the testkit. In your program, each pool is `PgPool::connect(&url).await?`.
    let db = TestDb::new().await;
    let users = Users::default();
    let mut machines = JoinSet::new();
    for number in 1..=MACHINES {
        machines.spawn(machine(number, db.pool(2).await, Arc::clone(&users)));
    }
    let mut jobs = 0;
    while let Some(machine) = machines.join_next().await {
        jobs += machine??;
    }
    assert_eq!(jobs, MACHINES * JOBS);
    println!("{jobs} jobs, {} licences, and never two users of one", LICENCES.len());

    none_is_left(&db.pool(5).await).await
}

/// Does the jobs of a machine, each with the first licence that is or becomes free. Returns the number of jobs.
async fn machine(number: usize, pool: PgPool, users: Users) -> Result<usize> {
    // Every process should pass the same number. With different ones, the largest counts, and a warning is logged.
    let licences = Semaphore::new(&pool, "licences", LICENCES.len())?;
    for job in 1..=JOBS {
        let permit = licences.acquire().await?;
        let licence =
            LICENCES.get(permit.slot()).ok_or("there are no more licences than permits")?;
        let users = users.get(permit.slot()).ok_or("each licence is counted")?;
        assert_eq!(users.fetch_add(1, Ordering::SeqCst), 0, "another job uses {licence}");

        println!("machine {number}: job {job} with licence {licence}");
        sleep(Duration::from_millis(100)).await;

        users.fetch_sub(1, Ordering::SeqCst);
        permit.release().await?;
    }
    Ok(JOBS)
}

/// Acquires all permits, and checks that there is no other; then releases one, and acquires the same one again.
async fn none_is_left(pool: &PgPool) -> Result<()> {
    let licences = Semaphore::new(pool, "licences", LICENCES.len())?;
    let mut permits = Vec::new();
    for _ in LICENCES {
        permits.push(licences.try_acquire().await?.ok_or("all have been given back")?);
    }
    assert!(licences.try_acquire().await?.is_none());
    println!("one machine has them all, and there is no other");

    // If a machine dies, its permits are released in the same way, and there is nothing to clean up.
    let back = permits.swap_remove(1);
    let slot = back.slot();
    back.release().await?;
    let again = licences.try_acquire().await?.ok_or("one was released")?;
    assert_eq!(again.slot(), slot);
    println!("permit {slot} was released, and acquired again");
    Ok(())
}
