//! Skip the work if another process is doing it already.
//!
//! You want this when the work needs to be done by one, no matter who, and a second would only do the
//! same again: clearing a cache, sending what is queued.

#![expect(clippy::print_stdout, reason = "an example tells what it does")]

use std::error::Error;

use pglock::Lock;
use pglock_testkit::TestDb;
use sqlx::PgPool;
use tokio::sync::Barrier;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    // Two pools on one database, as two machines have.
    let db = TestDb::new().await;
    let (here, there) = (db.pool(3).await, db.pool(3).await);

    // Both set out at once. One of them finds the lock taken.
    let both = Barrier::new(2);
    let (first, second) =
        tokio::try_join!(send_queued("here", &here, &both), send_queued("there", &there, &both))?;
    assert!(first != second, "one of them sent, the other skipped");

    // Later it is free again.
    assert!(send_queued("there", &there, &Barrier::new(1)).await?);
    Ok(())
}

/// Sends what is queued, unless another process does already. Returns whether it did.
async fn send_queued(machine: &str, pool: &PgPool, tried: &Barrier) -> pglock::Result<bool> {
    let mut lock = Lock::new(pool, "send-queued-mail");
    let Some(guard) = lock.try_acquire().await? else {
        println!("{machine}: another machine is sending, nothing to do");
        tried.wait().await;
        return Ok(false);
    };

    println!("{machine}: sending");
    // In this example, it takes until the other has tried.
    tried.wait().await;
    println!("{machine}: sent");
    guard.release().await?;
    Ok(true)
}
