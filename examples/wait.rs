//! Wait for a lock for as long as it takes.
//!
//! You want this when the work must be done, and it does not matter when: each process gets its turn.

#![expect(clippy::print_stdout, reason = "an example tells what it does")]

use std::error::Error;
use std::time::{Duration, Instant};

use pglock::Lock;
use tokio::time::sleep;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    // A database of the testkit. In your program: `PgPool::connect(&url).await?`.
    let pool = pglock_testkit::pool().await;
    let mut ours = Lock::new(&pool, "ledger-2026");
    let mut theirs = ours.clone();

    let guard = theirs.acquire().await?;
    println!("they hold the lock");

    let started = Instant::now();
    let (released, acquired) = tokio::join!(
        async {
            sleep(Duration::from_millis(500)).await;
            println!("they release the lock");
            guard.release().await
        },
        // The server keeps the queue, so there is no polling, and `acquire` returns as soon as the lock is released. To
        // stop waiting, drop the future, which leaves nothing behind.
        ours.acquire(),
    );
    released?;
    let guard = acquired?;
    println!("we hold the lock, after {} ms", started.elapsed().as_millis());

    assert!(started.elapsed() >= Duration::from_millis(500));
    guard.release().await?;
    Ok(())
}
