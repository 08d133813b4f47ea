//! Send reminders with Diesel, on one of three instances.
//!
//! Diesel's connections are not those of sqlx, so locks have a small sqlx pool of their own. No query uses it, so
//! `reserve_connections(0)` leaves all of it to locks. If all the work were one transaction, it would need no lock of
//! pglock: `SELECT pg_advisory_xact_lock(…)` can be the first statement of Diesel's transaction.

#![expect(clippy::print_stdout, reason = "an example tells what it does")]

use std::error::Error;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use diesel::prelude::*;
use diesel_async::pooled_connection::AsyncDieselConnectionManager;
use diesel_async::pooled_connection::deadpool::Pool;
use diesel_async::{AsyncConnection, AsyncPgConnection, RunQueryDsl, SimpleAsyncConnection};
use pglock::{ExclusiveGuard, Lock, LockOptions};
use pglock_testkit::TestDb;
use sqlx::postgres::PgPoolOptions;
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::schema::reminder;

mod schema {
    diesel::table! {
        reminder (id) { id -> Integer, sent -> Bool }
    }
}

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

static SENT: AtomicU32 = AtomicU32::new(0);

#[tokio::main]
async fn main() -> Result<()> {
    // A database for the recipe. Your URL comes from `std::env::var("DATABASE_URL")?`.
    let db = TestDb::new().await;

    let mut connection = AsyncPgConnection::establish(&db.url()).await?;
    let create = "CREATE TABLE reminder (id int PRIMARY KEY, sent bool NOT NULL DEFAULT false);
                  INSERT INTO reminder SELECT generate_series(1, 5)";
    connection.batch_execute(create).await?;

    let instances: JoinSet<_> = (0..3).map(|_| instance(db.url())).collect();
    for ended in instances.join_all().await {
        ended?;
    }
    let unsent = reminder::table.filter(reminder::sent.eq(false)).count();
    assert_eq!(unsent.get_result::<i64>(&mut connection).await?, 0);
    assert_eq!(AtomicU32::load(&SENT, Ordering::Relaxed), 5, "each reminder was sent once");
    println!("3 instances set out to send 5 reminders: each was sent once");
    Ok(())
}

/// An instance, with a pool for the work and one for locks.
async fn instance(url: String) -> Result<()> {
    let work = AsyncDieselConnectionManager::<AsyncPgConnection>::new(&url);
    let work = Pool::builder(work).max_size(8).build()?;
    let locks = PgPoolOptions::new().max_connections(2).connect_lazy(&url)?;
    let locks = LockOptions::new().reserve_connections(0).on(&locks)?;

    let Some(guard) = Lock::new(&locks, "reminders").try_acquire().await? else {
        return Ok(()); // Another instance sends them.
    };
    // An instance that acquires the lock later comes here too, and finds nothing to send.
    guard.while_held(send_all(&guard, &work)).await??;
    Ok(guard.release().await?)
}

async fn send_all(guard: &ExclusiveGuard, work: &Pool<AsyncPgConnection>) -> Result<()> {
    let mut connection = work.get().await?;
    let unsent = reminder::table.filter(reminder::sent.eq(false)).select(reminder::id);
    for id in unsent.load::<i32>(&mut connection).await? {
        // Asks the server whether the lock is still held, before a step that can't be undone.
        guard.verify().await?;
        send(id).await;
        let sent = diesel::update(reminder::table.find(id)).set(reminder::sent.eq(true));
        sent.execute(&mut connection).await?;
    }
    Ok(())
}

async fn send(_reminder: i32) {
    sleep(Duration::from_millis(20)).await;
    SENT.fetch_add(1, Ordering::Relaxed);
}
