//! A connection that was borrowed from a guard is tidied, and the lock is kept.

use std::time::Duration;

use pglock::doctor::examine;
use pglock::{Error, Lock, LockOptions, Loss};
use pglock_testkit::{TestDb, advisory_locks};
use sqlx::{Connection, PgConnection};

use crate::support::{SOON, all_are_idle, backend_is, borrow_all, no_locks, terminate};

#[tokio::test]
async fn a_failed_statement_on_the_borrowed_connection_harms_nothing() {
    let (db, pool) = TestDb::with_pool(1).await;
    let mut lock = Lock::new(&pool, 1);
    let guard = lock.acquire().await.unwrap();

    let mut conn = guard.connection().await.unwrap();
    sqlx::query("SELECT 1 / 0").execute(&mut *conn).await.unwrap_err();
    sqlx::query("SELECT no_such_column").execute(&mut *conn).await.unwrap_err();
    drop(conn);

    assert!(Lock::new(&db.pool(1).await, 1).try_acquire().await.unwrap().is_none());
    let pid = guard.backend_pid();
    guard.release().await.unwrap();
    assert_eq!(borrow_all(&pool).await, [pid]);
}

/// This is the case on whichever connection the examination has used.
#[tokio::test]
async fn an_examination_leaves_no_setting_on_a_connection_of_the_pool() {
    let (_db, pool) = TestDb::with_pool(3).await;
    let settings = async || {
        let (mut settings, mut conns) = (Vec::new(), Vec::new());
        for _ in 0..3 {
            let mut conn = pool.acquire().await.unwrap();
            let setting = "SELECT current_setting('client_connection_check_interval', true)";
            let setting: Option<String> =
                sqlx::query_scalar(setting).fetch_one(&mut *conn).await.unwrap();
            settings.push(setting);
            conns.push(conn);
        }
        settings
    };
    let before = settings().await;
    all_are_idle(&pool).await;
    examine(&pool, &LockOptions::new()).await.unwrap();
    all_are_idle(&pool).await;
    assert_eq!(settings().await, before);
}

/// Leaves the borrowed connection in the middle of an operation, and checks that the lock and the connection are still
/// usable.
async fn lock_survives(leave: impl AsyncFnOnce(&mut PgConnection)) {
    let (_db, pool, mut admin) = TestDb::scene(1).await;
    // With these options, no heartbeat tidies the connection during the test.
    let minute = Duration::from_mins(1);
    let options = LockOptions::new().heartbeat_interval(minute).heartbeat_timeout(minute);
    let options =
        options.keepalives_idle(minute).keepalives_interval(minute * 3).keepalives_retries(1);
    let guard = Lock::new(&options.on(&pool).unwrap(), 1).acquire().await.unwrap();
    let pid = guard.backend_pid();

    let mut conn = guard.connection().await.unwrap();
    leave(&mut conn).await;
    drop(conn);

    // Neither a transaction nor a query stays open while the guard is alive.
    backend_is(&mut admin, pid, "idle", SOON * 3).await;
    assert_eq!(advisory_locks(&mut admin).await.len(), 1, "the lock is still held");

    // The connection can be used again, and the operation that was left open has ended.
    let mut conn = guard.connection().await.unwrap();
    sqlx::query("SELECT 1").execute(&mut *conn).await.unwrap();
    drop(conn);
    guard.release().await.unwrap();
    no_locks(&mut admin).await;
    assert_eq!(borrow_all(&pool).await, [pid]);
}

#[tokio::test]
async fn a_forgotten_begin_is_rolled_back() {
    lock_survives(async |conn| {
        sqlx::raw_sql("CREATE TABLE t (x int); BEGIN; INSERT INTO t VALUES (1)")
            .execute(conn)
            .await
            .unwrap();
    })
    .await;
}

#[tokio::test]
async fn an_aborted_transaction_is_rolled_back() {
    lock_survives(async |conn| {
        sqlx::raw_sql("BEGIN").execute(&mut *conn).await.unwrap();
        sqlx::raw_sql("SELECT 1 / 0").execute(conn).await.unwrap_err();
    })
    .await;
}

#[tokio::test]
async fn a_dropped_sqlx_transaction_is_rolled_back() {
    lock_survives(async |conn| {
        let mut transaction = conn.begin().await.unwrap();
        sqlx::raw_sql("CREATE TABLE t (x int)").execute(&mut *transaction).await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_dropped_failed_sqlx_transaction_is_rolled_back() {
    lock_survives(async |conn| {
        let mut transaction = conn.begin().await.unwrap();
        sqlx::raw_sql("SELECT 1 / 0").execute(&mut *transaction).await.unwrap_err();
    })
    .await;
}

#[tokio::test]
async fn a_query_whose_future_was_dropped_is_cancelled() {
    lock_survives(async |conn| {
        let query = sqlx::raw_sql("SELECT pg_sleep(600)").execute(conn);
        tokio::time::timeout(Duration::from_millis(50), query).await.unwrap_err();
    })
    .await;
}

#[tokio::test]
async fn a_begin_whose_future_was_dropped_is_rolled_back() {
    for polls in 1..4 {
        lock_survives(async |conn| {
            drop(pglock_testkit::cancel_after(polls, conn.begin()).await);
        })
        .await;
    }
}

#[tokio::test]
async fn dropping_the_guard_after_a_dropped_query_frees_the_lock_soon() {
    let (_db, pool, mut admin) = TestDb::scene(1).await;
    let guard = Lock::new(&pool, 1).acquire().await.unwrap();
    let mut conn = guard.connection().await.unwrap();
    let query = sqlx::raw_sql("SELECT pg_sleep(600)").execute(&mut *conn);
    tokio::time::timeout(Duration::from_millis(50), query).await.unwrap_err();
    drop(conn);
    drop(guard);
    no_locks(&mut admin).await;
    borrow_all(&pool).await;
}

#[tokio::test]
async fn a_downgrade_of_a_lock_that_other_code_unlocked_is_a_loss() {
    let (db, pool) = TestDb::with_pool(1).await;
    let guard = Lock::new(&pool, 1).acquire().await.unwrap();
    let mut conn = guard.connection().await.unwrap();
    sqlx::raw_sql("SELECT pg_advisory_unlock_all()").execute(&mut *conn).await.unwrap();
    drop(conn);
    let lost = guard.downgrade().await.unwrap_err();
    assert!(matches!(lost, Error::Lost { reason: Loss::NotHeld, .. }), "{lost:?}");
    no_locks(&mut db.admin().await).await;
    borrow_all(&pool).await;
}

#[tokio::test]
async fn every_guard_of_a_lost_session_reports_the_loss() {
    let (_db, pool, mut admin) = TestDb::scene(2).await;
    let mut lock = Lock::new(&pool, 7);
    let first = lock.acquire().await.unwrap();
    let second = lock.acquire_shared().await.unwrap();
    let mut conn = first.connection().await.unwrap();
    let pid = first.backend_pid();
    terminate(&mut admin, pid).await;
    sqlx::query("SELECT 1").execute(&mut *conn).await.unwrap_err();
    drop(conn);

    let error = second.connection().await.unwrap_err();
    assert!(matches!(error, Error::Lost { .. }), "{error:?}");
    assert!(matches!(first.release().await, Err(Error::Lost { .. })));
    assert!(matches!(second.release().await, Err(Error::Lost { .. })));
    lock.acquire().await.unwrap().release().await.unwrap();
    borrow_all(&pool).await;
}

#[tokio::test]
async fn a_transaction_left_open_in_the_pool_is_ended_and_harms_nothing() {
    let (_db, pool) = TestDb::with_pool(1).await;
    for left_open in ["BEGIN", "BEGIN; SELECT 1 / 0"].repeat(10) {
        let mut conn = pool.acquire().await.unwrap();
        drop(sqlx::raw_sql(left_open).execute(&mut *conn).await);
        drop(conn);
        // The test acquires at once, because the acquire itself ends a transaction that is older than two milliseconds.
        let idle = async {
            while pool.num_idle() == 0 {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(SOON * 4, idle).await.unwrap();

        // However young the transaction is, writes through the guard are not part of it.
        let guard = Lock::new(&pool, 1).acquire().await.unwrap();
        let mut conn = guard.connection().await.unwrap();
        let write = "CREATE TABLE IF NOT EXISTS t (x int); INSERT INTO t VALUES (1)";
        sqlx::raw_sql(write).execute(&mut *conn).await.unwrap();
        drop(conn);
        guard.release().await.unwrap();
        borrow_all(&pool).await;
    }
    let written: i64 = sqlx::query_scalar("SELECT count(*) FROM t").fetch_one(&pool).await.unwrap();
    assert_eq!(written, 20);
}
