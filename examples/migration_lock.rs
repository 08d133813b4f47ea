//! Migrate a database once, though all machines start at the same time.
//!
//! You want this when everything must be in place before any machine serves: the schema, and data that a
//! program has to fill in. The first machine does it all; the others wait, and find it done.
//!
//! sqlx's migrator takes a lock of its own, waits for it without a timeout, and leaves it on the pooled
//! connection when a migration fails. To run the migrator under this lock instead:
//!
//! ```text
//! migrator.set_locking(false).run_direct(None, &mut *connection, false).await?;
//! ```

#![expect(clippy::print_stdout, reason = "an example tells what it does")]

use std::error::Error;
use std::time::Duration;

use pglock::Lock;
use pglock_testkit::TestDb;
use sqlx::{Connection, PgConnection, PgPool};
use tokio::task::JoinSet;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

const STEPS: [&str; 3] = [
    "CREATE TABLE city (name text PRIMARY KEY)",
    "INSERT INTO city VALUES ('New York'), ('Lisbon'), ('Sao Paulo')",
    "ALTER TABLE city ADD COLUMN slug text UNIQUE",
];

#[tokio::main]
async fn main() -> Result<()> {
    // A database of the testkit. In your program, each pool is `PgPool::connect(&url).await?`.
    let db = TestDb::new().await;
    let mut machines = JoinSet::new();
    for name in ["red", "green", "blue"] {
        machines.spawn(start(name, db.pool(2).await));
    }
    let (mut steps, mut filled_in) = (0, 0);
    while let Some(machine) = machines.join_next().await {
        let did = machine??;
        steps += did.0;
        filled_in += did.1;
    }
    assert_eq!(steps, STEPS.len(), "each step was taken by one machine");
    assert_eq!(filled_in, 3, "each row was filled in by one machine");
    Ok(())
}

/// Brings the database up to date, then serves. Returns how many steps and rows there were to do.
async fn start(machine: &str, pool: PgPool) -> Result<(usize, u64)> {
    let mut lock = Lock::new(&pool, "migrate");
    let Some(guard) = lock.try_acquire_for(Duration::from_secs(30)).await? else {
        return Err("another machine has been migrating for 30 s: start again later".into());
    };

    // The migration runs on the session that holds the lock: if the session breaks, the migration does not continue
    // without the lock. Only `CREATE INDEX CONCURRENTLY` belongs on a connection of the pool: on this session, it and
    // a waiter for the lock would wait for each other, and the server would end one of them.
    let mut connection = guard.connection().await?;
    let steps = migrate(&mut connection).await?;
    let filled_in = fill_in(&mut connection).await?;
    drop(connection);
    guard.release().await?;

    // From here on, the migration is done for all processes, whichever of them did it.
    let missing: i64 =
        sqlx::query_scalar("SELECT count(*) FROM city WHERE slug IS NULL").fetch_one(&pool).await?;
    assert_eq!(missing, 0);
    println!("{machine} took {steps} steps, filled in {filled_in} rows, and serves");
    Ok((steps, filled_in))
}

/// Takes the steps that were not taken yet, and records each in the same transaction.
async fn migrate(connection: &mut PgConnection) -> Result<usize> {
    sqlx::raw_sql("CREATE TABLE IF NOT EXISTS step (number int PRIMARY KEY)")
        .execute(&mut *connection)
        .await?;
    let taken: i64 =
        sqlx::query_scalar("SELECT count(*) FROM step").fetch_one(&mut *connection).await?;
    let mut steps = 0;
    for (number, step) in (1..).zip(STEPS).skip(usize::try_from(taken)?) {
        let mut transaction = connection.begin().await?;
        sqlx::raw_sql(step).execute(&mut *transaction).await?;
        let note = sqlx::query("INSERT INTO step VALUES ($1)").bind::<i32>(number);
        note.execute(&mut *transaction).await?;
        transaction.commit().await?;
        steps += 1;
    }
    Ok(steps)
}

/// Fills in the data that are easier to compute in a program than in SQL.
async fn fill_in(connection: &mut PgConnection) -> Result<u64> {
    let names: Vec<String> = sqlx::query_scalar("SELECT name FROM city WHERE slug IS NULL")
        .fetch_all(&mut *connection)
        .await?;
    let mut filled_in = 0;
    for name in names {
        let slug = name.to_lowercase().replace(' ', "-");
        let update = sqlx::query("UPDATE city SET slug = $2 WHERE name = $1").bind(name).bind(slug);
        filled_in += update.execute(&mut *connection).await?.rows_affected();
    }
    Ok(filled_in)
}
