//! Wait for a lock with a timeout.
//!
//! You want this when a caller in turn waits for your program: a request with a deadline, a user at a button.

#![expect(clippy::print_stdout, reason = "an example tells what it does")]

use std::error::Error;
use std::time::{Duration, Instant};

use pglock::{Error as LockError, Lock};
use pglock_testkit::TestDb;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    // A database of the testkit. In your program, each pool is `PgPool::connect(&url).await?`.
    let db = TestDb::new().await;
    let pool = db.pool(2).await;
    let mut lock = Lock::new(&pool, "seat-12a");
    let mut customer = lock.clone();

    let guard = customer.acquire().await?;
    let asked = Instant::now();
    let answer = lock.try_acquire_for(Duration::from_secs(2)).await?;
    let waited = asked.elapsed();
    assert!(answer.is_none());
    assert!(waited >= Duration::from_secs(2));
    println!("busy for 2 s; the call returned after {} ms", waited.as_millis());

    guard.release().await?;
    let asked = Instant::now();
    let Some(guard) = lock.try_acquire_for(Duration::from_secs(10)).await? else {
        return Err("it was free".into());
    };
    println!("once it is free, we need not wait: {} ms", asked.elapsed().as_millis());

    // Waiting for a connection of the pool is not waiting for the lock, and the results differ: a busy lock
    // is a `None`, a busy pool is an error.
    let others = (guard, pool.acquire().await?, pool.acquire().await?);
    let Err(error) = customer.try_acquire_for(Duration::from_millis(100)).await else {
        return Err("there was no connection to ask with".into());
    };
    assert!(matches!(error, LockError::PoolTimedOut { .. }));
    println!("with no connection left: {error}");
    drop(others);
    Ok(())
}
