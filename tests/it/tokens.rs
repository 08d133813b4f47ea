//! A guarded write refuses a late writer, depending on the isolation level.

use pglock::{Error, ExclusiveGuard, Lock, LockOptions};
use pglock_testkit::{Server, TestDb, eventually};
use sqlx::{PgConnection, PgPool};
use tokio::time::{sleep, timeout};

use crate::support::{Behind, SOON, terminate};

/// The statement from the documentation of `fencing_token`.
const GUARDED: &str = "UPDATE invoice SET paid = true, token = $1 WHERE id = $2 AND token <= $1";

/// Checks the token in one table, and writes to another.
const ELSEWHERE: &str =
    "INSERT INTO payment SELECT id, $1 FROM invoice WHERE token <= $1 AND id = $2";

/// Runs one of the statements on the invoice; returns the number of rows that it changed, or its SQLSTATE.
async fn write(
    statement: &'static str,
    token: i64,
    conn: &mut PgConnection,
) -> Result<u64, String> {
    match sqlx::query(statement).bind(token).bind(17).execute(conn).await {
        Ok(done) => Ok(done.rows_affected()),
        Err(error) => Err(error.as_database_error().unwrap().code().unwrap().into_owned()),
    }
}

async fn hold(pool: &PgPool) -> (ExclusiveGuard, i64) {
    let guard = Lock::new(pool, "invoice-17").acquire().await.unwrap();
    let token = guard.fencing_token().await.unwrap();
    (guard, token)
}

/// Ends the session of a guard that is still alive.
async fn lose(guard: &ExclusiveGuard, admin: &mut PgConnection) {
    terminate(admin, guard.backend_pid()).await;
    timeout(SOON * 10, guard.lost()).await.unwrap();
}

/// A database with an invoice that is not paid yet.
async fn invoice() -> TestDb {
    let db = TestDb::new().await;
    let schema = "CREATE TABLE invoice (id int, paid bool, token int8);
                  CREATE TABLE payment (invoice int, token int8);
                  INSERT INTO invoice VALUES (17, false, 0)";
    sqlx::raw_sql(schema).execute(&mut db.admin().await).await.unwrap();
    db
}

#[tokio::test]
async fn a_guarded_write_refuses_a_holder_that_has_lost_the_lock() {
    let db = invoice().await;
    let pool = db.pool(4).await;
    let mut conn = pool.acquire().await.unwrap();
    let (stale, old) = hold(&pool).await;
    assert_eq!(write(GUARDED, old, &mut conn).await, Ok(1));
    lose(&stale, &mut db.admin().await).await;
    // No other holder has written yet.
    assert_eq!(write(GUARDED, old, &mut conn).await, Ok(1));

    let (guard, new) = hold(&pool).await;
    assert_eq!(write(GUARDED, new, &mut guard.connection().await.unwrap()).await, Ok(1));
    assert_eq!(write(GUARDED, old, &mut conn).await, Ok(0));
    assert_eq!(write(ELSEWHERE, old, &mut conn).await, Ok(0));
    assert_eq!(write(GUARDED, new, &mut conn).await, Ok(1));
}

/// The late write has begun, and waits for the row, when the later holder commits.
#[tokio::test]
async fn a_guarded_write_refuses_a_holder_that_is_late_by_an_instant() {
    for (isolation, refused) in [("READ COMMITTED", Ok(0)), ("REPEATABLE READ", Err("40001"))] {
        let db = invoice().await;
        let pool = db.pool(4).await;
        let (stale, old) = hold(&pool).await;
        lose(&stale, &mut db.admin().await).await;
        let (guard, new) = hold(&pool).await;
        let mut lent = guard.connection().await.unwrap();
        let mut writing = sqlx::Connection::begin(&mut *lent).await.unwrap();
        assert_eq!(write(GUARDED, new, &mut writing).await, Ok(1));

        let mut late = pool.begin_with(begin(isolation)).await.unwrap();
        let pid: i32 =
            sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(&mut *late).await.unwrap();
        let is_blocked = async || {
            let blocked = "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted AND pid = $1)";
            sqlx::query_scalar(blocked).bind(pid).fetch_one(&pool).await.unwrap()
        };
        let (written, ()) = tokio::join!(write(GUARDED, old, &mut late), async {
            eventually("the late write waits for the row", SOON * 10, is_blocked).await;
            writing.commit().await.unwrap();
        });
        assert_eq!(written, refused.map_err(str::to_owned), "{isolation}");
    }
}

/// The trap: an old snapshot still has the old token.
#[tokio::test]
async fn a_snapshot_older_than_the_next_hold_lets_a_late_write_through_elsewhere() {
    for (isolation, directly, elsewhere) in [
        ("READ COMMITTED", Ok(0), Ok(0)),
        ("REPEATABLE READ", Err("40001"), Ok(1)),
        ("SERIALIZABLE", Err("40001"), Ok(1)),
    ] {
        let db = invoice().await;
        let pool = db.pool(5).await;
        for (statement, outcome) in [(GUARDED, directly), (ELSEWHERE, elsewhere)] {
            let (stale, old) = hold(&pool).await;
            let mut late = pool.begin_with(begin(isolation)).await.unwrap();
            let seen: i64 = sqlx::query_scalar("SELECT token FROM invoice")
                .fetch_one(&mut *late)
                .await
                .unwrap();
            assert!(seen < old);
            lose(&stale, &mut db.admin().await).await;

            let (guard, new) = hold(&pool).await;
            assert_eq!(write(GUARDED, new, &mut guard.connection().await.unwrap()).await, Ok(1));
            guard.release().await.unwrap();
            let written = write(statement, old, &mut late).await;
            assert_eq!(written, outcome.map_err(str::to_owned), "{isolation}: {statement}");
            if written.is_ok() {
                late.commit().await.unwrap();
            }
        }
        let let_through: i64 =
            sqlx::query_scalar("SELECT count(*) FROM payment").fetch_one(&pool).await.unwrap();
        assert_eq!(Ok(let_through.cast_unsigned()), elsewhere, "{isolation}");
    }
}

fn begin(isolation: &str) -> sqlx::AssertSqlSafe<String> {
    sqlx::AssertSqlSafe(format!("BEGIN ISOLATION LEVEL {isolation}"))
}

/// A server whose synchronous standby is not connected, and a pool of one connection, whose commits wait for the
/// standby.
async fn without_standby() -> (Server, TestDb, PgPool) {
    let server = Server::options()
        .setting("wal_level", "replica")
        .setting("max_wal_senders", "1")
        .setting("synchronous_standby_names", "nobody")
        .start();
    let db = TestDb::on(&server).await;
    let pool = db.pool(1).await;
    // The setting is not for all sessions, because those of the test commit too.
    pool.set_connect_options(db.options().options([("synchronous_commit", "on")]));
    drop(pool.acquire().await.unwrap().detach());
    (server, db, pool)
}

/// The commit is cancelled, and the caller gets an error instead of a token; the lock is not affected.
#[tokio::test]
async fn a_token_that_waits_for_a_standby_is_an_error_and_no_loss() {
    let (_server, db, pool) = without_standby().await;
    let guard = Lock::new(&pool, 1).acquire().await.unwrap();
    let token = timeout(SOON * 60, guard.fencing_token()).await.unwrap();
    assert!(matches!(token, Err(Error::Database { .. })), "{token:?}");
    guard.verify().await.unwrap();
    guard.release().await.unwrap();
    // A session whose commits do not wait draws a token.
    let guard = Lock::new(&db.pool(1).await, 1).acquire().await.unwrap();
    assert!(timeout(SOON * 5, guard.fencing_token()).await.unwrap().unwrap() > 0);
}

/// If the caller drops a call whose commit waits for an absent standby, the release cancels the commit.
#[tokio::test]
async fn a_token_that_waits_for_a_standby_and_is_dropped_keeps_no_lock() {
    let (_server, db, pool) = without_standby().await;
    let (mut admin, elsewhere) = (db.admin().await, db.pool(1).await);
    let guard = Lock::new(&pool, 1).acquire().await.unwrap();
    tokio::select! {
        token = guard.fencing_token() => panic!("{token:?}"),
        () = waits_for_standby(&mut admin) => {}
    }
    drop(guard);
    let next = timeout(SOON * 5, Lock::new(&elsewhere, 1).acquire()).await.unwrap().unwrap();
    next.release().await.unwrap();
}

async fn waits_for_standby(admin: &mut PgConnection) {
    let waits = "SELECT count(*) > 0 FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
    while !sqlx::query_scalar::<_, bool>(waits).fetch_one(&mut *admin).await.unwrap() {
        sleep(SOON / 100).await;
    }
}

/// The loss ends the call for the token, which has a longer limit of its own.
#[tokio::test]
async fn a_token_on_a_frozen_link_ends_with_the_loss() {
    let behind = Behind::a_proxy(1).await;
    let options = LockOptions::new().heartbeat_interval(SOON / 5).heartbeat_timeout(SOON / 5);
    let guard = Lock::new(&options.on(&behind.pool).unwrap(), 1).acquire().await.unwrap();
    behind.proxy.freeze();
    let token = timeout(SOON * 5, guard.fencing_token()).await.expect("it ends with the loss");
    assert!(matches!(token, Err(Error::Lost { .. })), "{token:?}");
    behind.proxy.thaw();
}
