//! Hand over from the old version of a service to the new one, without a gap and without both working at once.
//!
//! You want this when the new version is started before the old one is shut down, and only
//! one of them may work: on an outbox, a feed, a queue that keeps its order.

#![expect(clippy::print_stdout, reason = "an example tells what it does")]

use std::error::Error;
use std::time::Duration;

use pglock::{Election, Leadership};
use pglock_testkit::TestDb;
use sqlx::PgPool;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::sleep;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// How long one piece of work takes.
const PIECE: Duration = Duration::from_millis(150);

#[tokio::main]
async fn main() -> Result<()> {
    // A database of the testkit. In your program, each pool is `PgPool::connect(&url).await?`.
    let db = TestDb::new().await;
    let pool = db.pool(2).await;
    sqlx::raw_sql(
        "CREATE TABLE piece (number serial PRIMARY KEY, version text, term int8, \
         begun timestamptz DEFAULT clock_timestamp(), done timestamptz)",
    )
    .execute(&pool)
    .await?;

    let mut services = JoinSet::new();
    let (shut_down_old, told) = watch::channel(false);
    services.spawn(serve("v1", db.pool(2).await, told));
    wait_until(&pool, "SELECT count(*) >= 3 FROM piece WHERE version = 'v1'").await?;

    println!("v2 is started beside v1, and waits for its turn");
    let (shut_down_new, told) = watch::channel(false);
    services.spawn(serve("v2", db.pool(2).await, told));
    wait_until(
        &pool,
        "SELECT count(*) > 0 FROM pg_locks JOIN pg_database ON pg_database.oid = database \
         WHERE datname = current_database() AND locktype = 'advisory' AND NOT granted",
    )
    .await?;

    wait_until(&pool, "SELECT count(*) > 0 FROM piece WHERE done IS NULL").await?;
    println!("v1 is shut down, in the middle of a piece");
    shut_down_old.send(true)?;
    wait_until(&pool, "SELECT count(*) >= 3 FROM piece WHERE version = 'v2'").await?;
    shut_down_new.send(true)?;
    while let Some(service) = services.join_next().await {
        service??;
    }

    let left: i64 = ask(&pool, "SELECT count(*) FROM piece WHERE done IS NULL").await?;
    assert_eq!(left, 0, "a piece was left half done");
    let both: i64 = ask(
        &pool,
        "SELECT count(*) FROM piece AS one JOIN piece AS other \
         ON one.number < other.number AND other.begun < one.done",
    )
    .await?;
    assert_eq!(both, 0, "both were at work");
    let terms: Vec<(String, i64)> =
        sqlx::query_as("SELECT DISTINCT version, term FROM piece ORDER BY version")
            .fetch_all(&pool)
            .await?;
    let [(_, old), (_, new)] = terms.as_slice() else { return Err(format!("{terms:?}").into()) };
    assert!(old < new, "the terms do not grow");
    let gap: f64 = ask(
        &pool,
        "SELECT extract(epoch FROM min(begun) FILTER (WHERE version = 'v2') \
         - max(done) FILTER (WHERE version = 'v1'))::float8 FROM piece",
    )
    .await?;
    println!("no instance was at work for {:.0} ms", gap * 1000.0);
    Ok(())
}

/// Runs one instance of the service, which waits to be elected, works until it is shut down, and resigns.
async fn serve(version: &str, pool: PgPool, mut told: watch::Receiver<bool>) -> Result<()> {
    let mut election = Election::new(&pool, "outbox").candidate(version);
    let leadership = tokio::select! {
        elected = election.campaign() => elected?,
        // The instance was shut down before it was elected, so it just leaves the queue.
        _ = told.wait_for(|shut_down| *shut_down) => return Ok(()),
    };
    println!("{version} leads, term {}", leadership.term());

    let work = async {
        // Checks for the shutdown only between two pieces, so that none is left half done.
        while !*told.borrow() {
            work(version, &leadership).await?;
        }
        Ok::<_, Box<dyn Error + Send + Sync>>(())
    };
    // Boxed, because the futures of sqlx are large.
    leadership.while_held(Box::pin(work)).await??;
    println!("{version} has done its last piece, and resigns");
    leadership.resign().await?;
    Ok(())
}

/// Does one piece of work, and records it on the leader's session.
async fn work(version: &str, leadership: &Leadership) -> Result<()> {
    let mut connection = leadership.connection().await?;
    let number: i32 =
        sqlx::query_scalar("INSERT INTO piece (version, term) VALUES ($1, $2) RETURNING number")
            .bind(version)
            .bind(leadership.term())
            .fetch_one(&mut *connection)
            .await?;
    sleep(PIECE).await;
    sqlx::query("UPDATE piece SET done = clock_timestamp() WHERE number = $1")
        .bind(number)
        .execute(&mut *connection)
        .await?;
    println!("{version}: piece {number}");
    Ok(())
}

async fn wait_until(pool: &PgPool, condition: &'static str) -> Result<()> {
    while !ask::<bool>(pool, condition).await? {
        sleep(PIECE / 10).await;
    }
    Ok(())
}

/// Asks the server for one value.
async fn ask<T>(pool: &PgPool, question: &'static str) -> Result<T>
where
    T: for<'r> sqlx::Decode<'r, sqlx::Postgres> + sqlx::Type<sqlx::Postgres> + Send + Unpin,
{
    Ok(sqlx::query_scalar::<_, T>(question).fetch_one(pool).await?)
}
