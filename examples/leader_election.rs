//! Have one leader among several candidates, and another as soon as it is gone.
//!
//! You want this when something must run all the time, on one machine of many: a scheduler, a consumer
//! of a feed. Who holds the lock leads; the others wait for it.

#![expect(clippy::print_stdout, reason = "an example tells what it does")]

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use pglock::Lock;
use pglock_testkit::TestDb;
use sqlx::PgPool;
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio::time::sleep;

/// What the leaders did, in order: the name of each, at each step.
type Log = Arc<Mutex<Vec<&'static str>>>;

const STEPS: usize = 3;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let db = TestDb::new().await;
    let log = Log::default();

    let mut candidates = JoinSet::new();
    for name in ["ada", "bob", "cleo"] {
        // A pool each, as on machines of their own.
        candidates.spawn(candidate(name, db.pool(2).await, Arc::clone(&log)));
    }
    while let Some(candidate) = candidates.join_next().await {
        candidate??;
    }

    // Everybody led once, and nobody while another did.
    let log = log.lock().await;
    assert_eq!(log.len(), 3 * STEPS);
    for term in log.chunks(STEPS) {
        assert!(term.iter().all(|name| Some(name) == term.first()), "two led at once: {log:?}");
    }
    println!("three terms, one leader in each");
    Ok(())
}

async fn candidate(name: &'static str, pool: PgPool, log: Log) -> pglock::Result<()> {
    let mut lock = Lock::new(&pool, "scheduler");
    println!("{name} is a candidate");
    let leadership = lock.acquire().await?;
    println!("{name} leads");

    for _ in 0..STEPS {
        // A leader asks before each step whether it still leads: its connection may have broken, and
        // another may have been elected. That is an error here, and ends the term.
        let _still_ours = leadership.connection().await?;
        log.lock().await.push(name);
        sleep(Duration::from_millis(100)).await;
    }

    println!("{name} resigns");
    leadership.release().await
}
