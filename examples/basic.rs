//! Hold a lock for as long as a block of code runs.
//!
//! You want this wherever a `Mutex` would do if all the code ran in one process.

#![expect(clippy::print_stdout, reason = "an example tells what it does")]

use std::error::Error;

use pglock::Lock;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    // A pool on a database for this example. Your pool comes from `PgPool::connect(&url).await?`.
    let pool = pglock_testkit::pool().await;

    let mut lock = Lock::new(&pool, "invoice-17");
    // A clone is another owner, which the lock excludes like another machine.
    let mut elsewhere = lock.clone();

    {
        let guard = lock.acquire().await?;
        println!("we hold {}, by way of backend {}", guard.key(), guard.backend_pid());

        assert!(elsewhere.try_acquire().await?.is_none());
        println!("no other owner can acquire it now");
    } // The guard is dropped here, which releases the lock, also on `?` and in a panic.

    let guard = elsewhere.acquire().await?;
    println!("the other owner holds it, by way of backend {}", guard.backend_pid());

    // Dropping the guard would be enough. `release` also waits for the server, and returns an error if the lock was not
    // held to the end.
    guard.release().await?;
    assert!(lock.try_acquire().await?.is_some());
    println!("and now it is free");
    Ok(())
}
