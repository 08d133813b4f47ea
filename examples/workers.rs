//! Let concurrent workers take turns at something that only one of them can do at a time.
//!
//! You want this when most of the work can run side by side, but one step of it can't: a ledger to
//! append to, a remote interface that takes one caller.

#![expect(clippy::print_stdout, reason = "an example tells what it does")]

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use pglock::Lock;
use tokio::task::JoinSet;
use tokio::time::sleep;

const WORKERS: usize = 5;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    // One worker waits on the server. The others queue in this process, without a connection.
    // A database of the testkit. In your program: `PgPool::connect(&url).await?`.
    let pool = pglock_testkit::pool().await;
    let inside = Arc::new(AtomicUsize::new(0));
    let lock = Lock::new(&pool, "append-to-ledger");

    let mut workers = JoinSet::new();
    for number in 1..=WORKERS {
        // Each worker has a clone, because a `Lock` is an owner, and can't be shared by mistake.
        workers.spawn(work(number, lock.clone(), Arc::clone(&inside)));
    }

    let mut done = 0;
    while let Some(worker) = workers.join_next().await {
        worker??;
        done += 1;
    }
    assert_eq!(done, WORKERS);
    println!("all {done} had their turn, and never two at once");
    Ok(())
}

async fn work(number: usize, mut lock: Lock, inside: Arc<AtomicUsize>) -> pglock::Result<()> {
    println!("worker {number} prepares");
    sleep(Duration::from_millis(50)).await;

    let guard = lock.acquire().await?;
    assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0, "another worker is in here");
    println!("worker {number} appends");
    sleep(Duration::from_millis(100)).await;
    assert_eq!(inside.fetch_sub(1, Ordering::SeqCst), 1, "another worker came in");
    guard.release().await
}
