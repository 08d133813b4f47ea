//! Show a report to many viewers, but to none of them while it is being made.
//!
//! You want this when making a report takes long, a half-made report must not be seen, and viewers would rather get
//! the answer "in a moment" than wait.

#![expect(clippy::print_stdout, reason = "an example tells what it does")]

use std::error::Error;
use std::time::Duration;

use pglock::{ExclusiveGuard, Lock};
use pglock_testkit::TestDb;
use sqlx::PgPool;
use tokio::time::sleep;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    // A database of the testkit. In your program, each pool is `PgPool::connect(&url).await?`.
    let db = TestDb::new().await;
    let (office, home, machine) = (db.pool(2).await, db.pool(2).await, db.pool(2).await);

    // Viewers share the lock, so they do not block each other.
    let (one, two) = tokio::join!(view("ada", &office), view("bob", &home));
    assert!(one? && two?);

    // While the report is being made, no viewer sees it, and no other machine makes it.
    let Some(making) = start(&machine).await? else { return Err("no viewer is looking".into()) };
    assert!(!view("ada", &office).await?);
    assert!(start(&home).await?.is_none());
    sleep(Duration::from_millis(200)).await;
    making.release().await?;
    println!("the report is made");
    assert!(view("ada", &office).await?);

    // While a viewer looks at the report, the machine that makes it can't start either, and has to retry later.
    let mut lock = Lock::new(&home, "report:sales");
    let looking = lock.acquire_shared().await?;
    assert!(start(&machine).await?.is_none());
    looking.release().await?;
    Ok(())
}

/// Looks at the report, unless it is being made. Returns whether it could be seen.
async fn view(who: &str, pool: &PgPool) -> pglock::Result<bool> {
    let mut lock = Lock::new(pool, "report:sales");
    let Some(guard) = lock.try_acquire_shared().await? else {
        println!("{who}: being made, come back in a moment");
        return Ok(false);
    };
    println!("{who}: looks at the report");
    sleep(Duration::from_millis(200)).await;
    guard.release().await?;
    Ok(true)
}

/// Starts to make the report, if no viewer looks at it and no machine makes it. The report is being made for as long
/// as the guard lives.
async fn start(pool: &PgPool) -> pglock::Result<Option<ExclusiveGuard>> {
    let guard = Lock::new(pool, "report:sales").try_acquire().await?;
    match &guard {
        Some(_) => println!("the report is being made"),
        None => println!("the report can't be made now"),
    }
    Ok(guard)
}
