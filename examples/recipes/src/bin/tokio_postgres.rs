//! Serialise work per account with tokio-postgres, and make the server refuse the write of a holder that lost its lock.
//!
//! The connections of tokio-postgres are not those of sqlx, so locks have a small sqlx pool of their own: a
//! `LockManager` holds any number of locks on one connection of it, and waits on the others.

#![expect(clippy::print_stdout, reason = "an example tells what it does")]

use std::error::Error;
use std::time::Duration;

use deadpool_postgres::{Manager, Pool};
use pglock::{Lock, LockManager, LockOptions};
use pglock_testkit::TestDb;
use sqlx::postgres::PgPoolOptions;
use tokio::task::JoinSet;
use tokio::time::sleep;
use tokio_postgres::NoTls;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

#[tokio::main]
async fn main() -> Result<()> {
    // A database for the recipe. Your URL comes from `std::env::var("DATABASE_URL")?`.
    let db = TestDb::new().await;

    let work = Pool::builder(Manager::new(db.url().parse()?, NoTls)).max_size(8).build()?;
    work.get()
        .await?
        .batch_execute(
            "CREATE TABLE account (id int PRIMARY KEY, amount bigint NOT NULL, token bigint NOT NULL);
             INSERT INTO account SELECT id, 0, 0 FROM generate_series(1, 5) id",
        )
        .await?;

    // Two instances, each with a lock manager of its own.
    let instances = [locks(&db.url())?, locks(&db.url())?];
    let deposits = (0..50).zip(instances.iter().cycle());
    let deposits: JoinSet<_> = deposits
        .map(|(number, manager)| deposit(manager.clone(), work.clone(), number % 5 + 1))
        .collect();
    for deposited in deposits.join_all().await {
        assert!(deposited?, "the lock was held to the end");
    }
    for account in 1..=5 {
        assert_eq!(read(&work, account).await?, 10, "no deposit is lost");
    }
    println!("50 deposits to 5 accounts: none was lost");

    // The session of a holder ends while the holder pauses, so the other instance acquires the lock and writes.
    let [ours, theirs] = instances;
    let paused = Lock::new(&ours, "account-1").acquire().await?;
    let (amount, token) = (read(&work, 1).await?, paused.fencing_token().await?);
    let end = "SELECT pg_terminate_backend($1)";
    work.get().await?.execute(end, &[&paused.backend_pid()]).await?;
    assert!(deposit(theirs, work.clone(), 1).await?);
    // When the paused holder continues, it writes before it has detected the loss.
    assert!(
        !write(&work, 1, amount + 1, token).await?,
        "the write of the paused holder is refused"
    );
    assert_eq!(read(&work, 1).await?, 11);
    println!("a holder that had lost its lock could not overwrite a later deposit");
    Ok(())
}

/// Makes a lock manager on a pool that nothing else uses, so no connection has to be reserved for queries.
fn locks(url: &str) -> Result<LockManager> {
    let pool = PgPoolOptions::new().max_connections(3).connect_lazy(url)?;
    Ok(LockManager::new(&LockOptions::new().reserve_connections(0).on(&pool)?))
}

/// Deposits 1. Returns whether it was written.
async fn deposit(manager: LockManager, work: Pool, account: i32) -> Result<bool> {
    let guard = Lock::new(&manager, format!("account-{account}")).acquire().await?;
    let token = guard.fencing_token().await?;
    let amount = read(&work, account).await?;
    sleep(Duration::from_millis(5)).await; // Without the lock, other deposits would be lost here.
    let written = write(&work, account, amount + 1, token).await?;
    guard.release().await?;
    Ok(written)
}

async fn read(work: &Pool, account: i32) -> Result<i64> {
    let select = "SELECT amount FROM account WHERE id = $1";
    Ok(work.get().await?.query_one(select, &[&account]).await?.try_get(0)?)
}

/// Writes an amount, unless a later holder of the lock has written. Returns whether it was written.
async fn write(work: &Pool, account: i32, amount: i64, token: i64) -> Result<bool> {
    let update = "UPDATE account SET amount = $2, token = $3 WHERE id = $1 AND token <= $3";
    Ok(work.get().await?.execute(update, &[&account, &amount, &token]).await? == 1)
}
