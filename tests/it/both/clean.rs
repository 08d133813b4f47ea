//! A connection is returned to the pool only when it holds no lock and is in its original state.

use std::time::Duration;

use pglock::{Error, Loss};
use pglock_testkit::{TestDb, eventually};
use sqlx::{PgPool, Row};

use super::new_lock;
use crate::support::{backend_is, borrow_all, no_locks, soon, terminate, waits_in_vain};

#[tokio::test]
async fn a_released_connection_is_used_again() {
    let (_db, pool) = TestDb::with_pool(1).await;
    let mut lock = new_lock(&pool, 1);
    let guard = lock.acquire().await.unwrap();
    let pid = guard.backend_pid();
    guard.release().await.unwrap();
    assert_eq!(borrow_all(&pool).await, [pid]);
}

#[tokio::test]
async fn a_session_killed_while_it_holds_is_a_loss_and_is_replaced() {
    let (_db, pool, mut admin) = TestDb::scene(1).await;
    let mut lock = new_lock(&pool, "nightly-report");
    let guard = lock.acquire().await.unwrap();
    let pid = guard.backend_pid();
    terminate(&mut admin, pid).await;
    no_locks(&mut admin).await;

    let error = guard.release().await.unwrap_err();
    assert!(matches!(error, Error::Lost { reason: Loss::Disconnected(_), .. }), "{error:?}");
    assert!(error.to_string().contains("nightly-report"), "{error}");
    assert!(error.is_transient());

    // The same handle acquires again, on a new session.
    let again = lock.acquire().await.unwrap();
    assert_ne!(again.backend_pid(), pid);
    again.release().await.unwrap();
    borrow_all(&pool).await;
}

#[tokio::test]
async fn the_pool_gets_its_settings_back_unchanged() {
    // The settings by which the server detects a dead client stay, because nothing else depends on them. The query
    // qualifies its names, and calls the function behind the view, because both unqualified names and the view may be
    // out of the role's reach.
    const SETTINGS: &str = "SELECT pg_catalog.concat(name, '=', setting) \
         FROM pg_catalog.pg_show_all_settings() \
         WHERE source OPERATOR(pg_catalog.=) 'session' \
           AND name OPERATOR(pg_catalog.!~~) 'tcp_%' \
           AND name OPERATOR(pg_catalog.<>) 'client_connection_check_interval' \
         ORDER BY 1";
    // The query uses the simple protocol, because the pool may discard prepared statements.
    async fn settings(pool: &PgPool) -> Vec<String> {
        let rows = sqlx::raw_sql(SETTINGS).fetch_all(pool).await.unwrap();
        rows.iter().map(|row| row.get(0)).collect()
    }
    let (db, pool) = TestDb::with_pool(1).await;
    let before = settings(&pool).await;

    // The acquires end in each way: at once, after a wait, refused, timed out.
    let mut lock = new_lock(&pool, 1);
    lock.acquire().await.unwrap().release().await.unwrap();
    let other_pool = db.pool(1).await;
    let held = new_lock(&other_pool, 1).acquire().await.unwrap();
    assert!(lock.try_acquire().await.unwrap().is_none());
    waits_in_vain(soon() / 3, async |time| lock.try_acquire_for(time).await).await;
    let (waited, ()) = tokio::join!(lock.acquire(), async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        held.release().await.unwrap();
    });
    waited.unwrap().release().await.unwrap();

    let after = settings(&pool).await;
    assert_eq!(before, after);
}

#[tokio::test]
async fn an_old_transaction_left_open_in_the_pool_is_ended_by_the_acquire() {
    let (_db, pool, mut admin) = TestDb::scene(1).await;
    let mut lock = new_lock(&pool, 1);
    // At first, the connection is fresh. Later, the lock's statement is prepared on it.
    for left_open in ["BEGIN", "BEGIN", "BEGIN; SELECT 1 / 0", "BEGIN"] {
        let mut conn = pool.acquire().await.unwrap();
        drop(sqlx::raw_sql(left_open).execute(&mut *conn).await);
        drop(conn);
        eventually("the pool has it back", soon() * 10, || async { pool.num_idle() == 1 }).await;
        // The transaction gets old enough to be detected.
        tokio::time::sleep(Duration::from_millis(20)).await;

        let guard = lock.acquire().await.unwrap();
        backend_is(&mut admin, guard.backend_pid(), "idle", soon() * 10).await;
        guard.release().await.unwrap();
    }
}
