//! Read a configuration on many machines, and change it rarely, as a whole.
//!
//! You want this when the values that are read at the start must stay valid until the work is done, and when a
//! change takes several steps, some of them outside the database.

#![expect(clippy::print_stdout, reason = "an example tells what it does")]

use std::error::Error;
use std::time::Duration;

use pglock::Lock;
use pglock_testkit::TestDb;
use sqlx::{Connection, PgPool};
use tokio::task::JoinSet;
use tokio::time::sleep;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

#[tokio::main]
async fn main() -> Result<()> {
    // A database of the testkit. In your program, each pool is `PgPool::connect(&url).await?`.
    let db = TestDb::new().await;
    let pool = db.pool(3).await;
    sqlx::raw_sql(
        "CREATE TABLE config (name text PRIMARY KEY, value int NOT NULL);
         INSERT INTO config VALUES ('workers', 10), ('connections', 20)",
    )
    .execute(&pool)
    .await?;

    let mut machines = JoinSet::new();
    for number in 1..=3 {
        machines.spawn(serve(number, db.pool(2).await));
    }
    sleep(Duration::from_millis(100)).await;
    change(&pool, 16).await?;

    let mut served = 0;
    while let Some(machine) = machines.join_next().await {
        served += machine??;
    }
    assert_eq!(served, 9);
    println!("{served} requests served, none of them with a mixture of old and new");
    Ok(())
}

/// Serves three requests, each with one configuration from beginning to end.
async fn serve(machine: u32, pool: PgPool) -> Result<u32> {
    let mut lock = Lock::new(&pool, "app-config");
    for request in 1..=3 {
        let guard = lock.acquire_shared().await?;
        let workers = setting(&pool, "workers").await?;
        sleep(Duration::from_millis(80)).await;
        assert_eq!(setting(&pool, "connections").await?, 2 * workers);
        println!("machine {machine}, request {request}: {workers} workers");
        guard.release().await?;
    }
    Ok(3)
}

/// Changes both settings. Times out rather than delaying new requests for long.
async fn change(pool: &PgPool, workers: i32) -> Result<()> {
    let mut lock = Lock::new(pool, "app-config");
    let Some(guard) = lock.try_acquire_for(Duration::from_secs(5)).await? else {
        return Err("requests take too long for a change now".into());
    };

    // The transaction runs on the session that holds the lock: if the session breaks, the lock and the uncommitted
    // changes end together, so no other holder is admitted while the change is half done.
    let mut connection = guard.connection().await?;
    let mut transaction = connection.begin().await?;
    for (name, value) in [("workers", workers), ("connections", 2 * workers)] {
        sqlx::query("UPDATE config SET value = $2 WHERE name = $1")
            .bind(name)
            .bind(value)
            .execute(&mut *transaction)
            .await?;
    }
    transaction.commit().await?;
    drop(connection);
    println!("the configuration is changed to {workers} workers");
    Ok(guard.release().await?)
}

async fn setting(pool: &PgPool, name: &str) -> sqlx::Result<i32> {
    sqlx::query_scalar("SELECT value FROM config WHERE name = $1").bind(name).fetch_one(pool).await
}
