//! Hold a lock for as long as a block of code runs.
//!
//! You want this wherever a `Mutex` would do, if only all of it ran in one process.

#![expect(clippy::print_stdout, reason = "an example tells what it does")]

use std::error::Error;

use pglock::Lock;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    // A database to play with. Yours comes from `PgPool::connect(&url).await?`.
    let pool = pglock_testkit::pool().await;

    let mut lock = Lock::new(&pool, "invoice-17");
    // A clone is another owner, and excluded just as another machine is.
    let mut elsewhere = lock.clone();

    {
        let guard = lock.acquire().await?;
        println!("we hold {}, by way of backend {}", guard.key(), guard.backend_pid());

        assert!(elsewhere.try_acquire().await?.is_none());
        println!("no other owner can acquire it now");
    } // Here the guard is dropped, and the lock with it: also on `?`, also in a panic.

    let guard = elsewhere.acquire().await?;
    println!("the other owner holds it, by way of backend {}", guard.backend_pid());

    // Dropping would do. Releasing also waits for the server, which says whether the lock was held
    // to the end.
    guard.release().await?;
    assert!(lock.try_acquire().await?.is_some());
    println!("and now it is free");
    Ok(())
}
