//! Skip the work if another process is doing it already.
//!
//! You want this when one process has to do the work, no matter which, and a second one would only repeat
//! it: clearing a cache, sending queued mail.

#![expect(clippy::print_stdout, reason = "an example tells what it does")]

use std::error::Error;

use pglock::Lock;
use pglock_testkit::TestDb;
use sqlx::PgPool;
use tokio::sync::Barrier;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    // Two pools on one database, as on two machines.
    // A database of the testkit. In your program, each pool is `PgPool::connect(&url).await?`.
    let db = TestDb::new().await;
    let (here, there) = (db.pool(3).await, db.pool(3).await);

    // Both try at once, and one of them finds the lock held.
    let both = Barrier::new(2);
    let (first, second) =
        tokio::try_join!(send_queued("here", &here, &both), send_queued("there", &there, &both))?;
    assert!(first != second, "one of them sent, the other skipped");

    // Later, the lock is free again.
    assert!(send_queued("there", &there, &Barrier::new(1)).await?);
    Ok(())
}

/// Sends the queued mail, unless another process is sending it. Returns whether this call sent it.
async fn send_queued(machine: &str, pool: &PgPool, tried: &Barrier) -> pglock::Result<bool> {
    let mut lock = Lock::new(pool, "send-queued-mail");
    let Some(guard) = lock.try_acquire().await? else {
        println!("{machine}: another machine is sending, nothing to do");
        tried.wait().await;
        return Ok(false);
    };

    println!("{machine}: sending");
    // In this example, sending takes until the other machine has tried.
    tried.wait().await;
    println!("{machine}: sent");
    guard.release().await?;
    Ok(true)
}
