//! Run each task on one machine only, whichever gets to it first.
//!
//! You want this when every machine sees the same list of tasks, and only their names distinguish
//! them: files in a folder, accounts to bill. There is no queue, and none is needed.

#![expect(clippy::print_stdout, reason = "an example tells what it does")]

use std::error::Error;
use std::time::Duration;

use pglock::Lock;
use pglock_testkit::TestDb;
use sqlx::PgPool;
use tokio::task::JoinSet;
use tokio::time::sleep;

const TASKS: [&str; 4] = ["bill-berlin", "bill-lisbon", "bill-oslo", "bill-rome"];

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

#[tokio::main]
async fn main() -> Result<()> {
    // A database of the testkit. In your program, each pool is `PgPool::connect(&url).await?`.
    let db = TestDb::new().await;
    let pool = db.pool(2).await;
    sqlx::raw_sql("CREATE TABLE done (task text PRIMARY KEY, machine text NOT NULL)")
        .execute(&pool)
        .await?;

    let mut machines = JoinSet::new();
    for name in ["red", "green", "blue"] {
        machines.spawn(machine(name, db.pool(3).await));
    }
    while let Some(machine) = machines.join_next().await {
        machine??;
    }

    let done: Vec<String> =
        sqlx::query_scalar("SELECT task FROM done ORDER BY task").fetch_all(&pool).await?;
    assert_eq!(done, TASKS);
    println!("every task is done, and once");
    Ok(())
}

async fn machine(name: &str, pool: PgPool) -> Result<()> {
    for task in TASKS {
        // The name is the key: the machines need not agree on numbers.
        let mut lock = Lock::new(&pool, task);
        let Some(guard) = lock.try_acquire().await? else { continue };
        let mut connection = guard.connection().await?;

        // The lock excludes other machines only during the work. So the machine also records that the work is
        // done, for the machines that acquire the lock later.
        let done: bool = sqlx::query_scalar("SELECT EXISTS (SELECT FROM done WHERE task = $1)")
            .bind(task)
            .fetch_one(&mut *connection)
            .await?;
        if !done {
            println!("{name} does {task}");
            sleep(Duration::from_millis(100)).await;
            sqlx::query("INSERT INTO done VALUES ($1, $2)")
                .bind(task)
                .bind(name)
                .execute(&mut *connection)
                .await?;
        }
        drop(connection);
        guard.release().await?;
    }
    Ok(())
}
