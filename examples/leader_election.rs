//! Elect one leader among several candidates, and another one as soon as it fails.
//!
//! You want this when something must run all the time, on one machine of many: a scheduler, a consumer
//! of a feed. Every machine is a candidate. One leads, and the others wait to be elected.

#![expect(clippy::print_stdout, reason = "an example tells what it does")]

use std::collections::BTreeMap;
use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use pglock::{Election, Leadership};
use pglock_testkit::TestDb;
use sqlx::PgPool;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::sleep;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// How many leaders lose their connection before all stop.
const LOSSES: usize = 2;

#[tokio::main]
async fn main() -> Result<()> {
    // A database of the testkit. In your program, each pool is `PgPool::connect(&url).await?`.
    let db = TestDb::new().await;
    let pool = db.pool(2).await;
    sqlx::raw_sql("CREATE TABLE act (number serial PRIMARY KEY, term int8, leader text)")
        .execute(&pool)
        .await?;

    let (stop, stopped) = watch::channel(false);
    let mut candidates = JoinSet::new();
    for name in ["ada", "bob", "cleo"] {
        // Each candidate has a pool of its own, as on a machine of its own.
        candidates.spawn(candidate(name, db.pool(2).await, stopped.clone()));
    }

    // Any session can see on the server which candidate leads.
    let mut observer = Election::new(&pool, "scheduler").observe();
    let mut losses = 0;
    while losses < LOSSES {
        let Some(leader) = observer.changed().await? else { continue };
        println!("everybody can see that {} leads", leader.name);
        sleep(Duration::from_millis(200)).await;
        println!("the connection of {} breaks", leader.name);
        sqlx::query("SELECT pg_terminate_backend($1)")
            .bind(leader.backend_pid)
            .execute(&pool)
            .await?;
        losses += 1;
    }
    sleep(Duration::from_millis(200)).await;
    stop.send(true)?;
    while let Some(candidate) = candidates.join_next().await {
        candidate??;
    }

    // All acts of a term are by one leader, and none of them comes after an act of a later term.
    let acts: Vec<(i64, String)> =
        sqlx::query_as("SELECT term, leader FROM act ORDER BY number").fetch_all(&pool).await?;
    assert!(acts.is_sorted_by_key(|(term, _)| *term), "an old leader acted: {acts:?}");
    let mut leaders = BTreeMap::new();
    for (term, leader) in &acts {
        assert_eq!(leaders.entry(term).or_insert(leader), &leader, "two led: {acts:?}");
    }
    assert!(leaders.len() > LOSSES, "no candidate took over: {acts:?}");
    println!("{} acts in {} terms, one leader in each", acts.len(), leaders.len());
    Ok(())
}

async fn candidate(name: &str, pool: PgPool, mut stopped: watch::Receiver<bool>) -> Result<()> {
    let mut election = Election::new(&pool, "scheduler").candidate(name);
    let stop = async move { drop(stopped.wait_for(|stop| *stop).await) };
    // Campaigns, leads, and campaigns again, until it is stopped.
    // Boxed, because the futures of sqlx are large.
    match election.run(stop, |leadership| Box::pin(lead(name, leadership))).await {
        // The connection broke, and `lead` failed before the loss was reported.
        Err(pglock::Error::LeaderFailed { source, .. }) => println!("{name} has failed: {source}"),
        stopped => stopped?,
    }
    println!("{name} has stopped");
    Ok(())
}

/// Leads until the future is dropped, because the leadership is lost or the election is stopped.
async fn lead(name: &str, leadership: Arc<Leadership>) -> Result<()> {
    println!("{name} is elected, term {}", leadership.term());
    loop {
        if let Err(error) = act(name, &leadership).await {
            // Returning resigns. After an error, other candidates are elected before this one campaigns again.
            println!("{name} can't act, and steps down: {error}");
            return Err(error);
        }
        sleep(Duration::from_millis(50)).await;
    }
}

async fn act(name: &str, leadership: &Leadership) -> Result<()> {
    // The statement runs on the session of the leadership: if that session has ended, and another candidate was
    // elected, the statement fails. On another connection it would take effect.
    sqlx::query("INSERT INTO act (term, leader) VALUES ($1, $2)")
        .bind(leadership.term())
        .bind(name)
        .execute(&mut *leadership.connection().await?)
        .await?;
    Ok(())
}
