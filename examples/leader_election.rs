//! Have one leader among several candidates, and another as soon as it is gone.
//!
//! You want this when something must run all the time, on one machine of many: a scheduler, a consumer
//! of a feed. Who holds the lock leads; the others wait for it.

#![expect(clippy::print_stdout, reason = "an example tells what it does")]

use std::error::Error;
use std::time::Duration;

use pglock::Lock;
use pglock_testkit::TestDb;
use sqlx::PgPool;
use tokio::task::JoinSet;
use tokio::time::sleep;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// How often a leader acts before it resigns.
const ACTS: usize = 3;

#[tokio::main]
async fn main() -> Result<()> {
    let db = TestDb::new().await;
    let pool = db.pool(2).await;
    sqlx::raw_sql("CREATE TABLE act (number serial PRIMARY KEY, leader text NOT NULL)")
        .execute(&pool)
        .await?;

    let mut candidates = JoinSet::new();
    for name in ["ada", "bob", "cleo"] {
        // A pool each, as on machines of their own.
        candidates.spawn(candidate(name, db.pool(2).await));
    }
    while let Some(candidate) = candidates.join_next().await {
        candidate??;
    }

    // Everybody led once, and nobody while another did.
    let acts: Vec<String> =
        sqlx::query_scalar("SELECT leader FROM act ORDER BY number").fetch_all(&pool).await?;
    assert_eq!(acts.len(), 3 * ACTS);
    for term in acts.chunks(ACTS) {
        assert!(term.iter().all(|leader| Some(leader) == term.first()), "two led: {acts:?}");
    }
    println!("three terms, one leader in each");
    Ok(())
}

async fn candidate(name: &str, pool: PgPool) -> Result<()> {
    let mut lock = Lock::new(&pool, "scheduler");
    println!("{name} is a candidate");
    let leadership = lock.acquire().await?;
    println!("{name} leads");

    for _ in 0..ACTS {
        // On the session that makes it the leader: if that is gone, and another was elected, this is
        // an error, which ends the term. On another connection it would go through.
        sqlx::query("INSERT INTO act (leader) VALUES ($1)")
            .bind(name)
            .execute(&mut *leadership.connection().await?)
            .await?;
        sleep(Duration::from_millis(100)).await;
    }

    println!("{name} resigns");
    leadership.release().await?;
    Ok(())
}
