//! Properties of all errors, and failures that only locks with a session of their own can have.

use std::collections::BTreeSet;
use std::error;
use std::time::Duration;

use pglock::{Error, Key, Lock, LockOptions, Loss};
use pglock_testkit::TestDb;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{PgConnection, PgPool};
use tokio::time::timeout;

use crate::support::{TIMEOUT, all_are_idle, borrow_all, execute, locks_become, opened};

pub(crate) const KEY: &str = "nightly-report";

/// The timeout of a wait that is meant to time out.
pub(crate) const MOMENT: Duration = Duration::from_millis(300);

/// Checks the properties of every message: it has the key and its name, says what to do, and does not repeat the
/// message of its source.
pub(crate) fn has_a_clear_message(error: &Error, advice: &str) {
    let message = error.to_string();
    let key = error.key().unwrap();
    assert_eq!(key.name(), Some(KEY));
    assert!(message.starts_with(&format!("lock {key}: ")), "{message}");
    assert!(message.contains(advice), "{message}");
    assert!(!message.ends_with('.') && !message.contains('\n'), "{message}");
    let mut source = error::Error::source(error);
    while let Some(cause) = source {
        assert!(!message.contains(&cause.to_string()), "repeats its source: {message}");
        source = cause.source();
    }
}

/// Waits until the server shows these numbers of holders and waiters; returns the waiters.
pub(crate) async fn becomes(admin: &mut PgConnection, holders: usize, waiters: usize) -> Vec<i32> {
    let what = format!("{holders} holders and {waiters} waiters");
    let locks = locks_become(admin, &what, TIMEOUT, |locks| {
        let held = locks.iter().filter(|lock| lock.granted);
        // A session may hold a key in both modes.
        let sessions: BTreeSet<_> = held.map(|lock| (lock.pid, lock.classid, lock.objid)).collect();
        let waited = locks.iter().filter(|lock| !lock.granted).count();
        (sessions.len(), waited) == (holders, waiters)
    });
    locks.await.iter().filter(|lock| !lock.granted).map(|lock| lock.pid).collect()
}

/// Checks that nothing is held or waited for, and that all connections of the pool can be acquired.
pub(crate) async fn nothing_is_left(admin: &mut PgConnection, pool: &PgPool) {
    becomes(admin, 0, 0).await;
    borrow_all(pool).await;
}

pub(crate) async fn works(lock: &mut Lock) {
    let guard = timeout(TIMEOUT, lock.acquire()).await.unwrap().unwrap();
    guard.release().await.unwrap();
}

/// A pool that connects lazily, and tries to reach an absent server for `acquire_timeout`.
pub(crate) fn lazy(options: PgConnectOptions, acquire_timeout: Duration) -> PgPool {
    let pool = PgPoolOptions::new().max_connections(2).acquire_timeout(acquire_timeout);
    pool.connect_lazy_with(options)
}

/// A pool of one connection, with the given timeout of its own.
pub(crate) async fn one_connection(db: &TestDb, acquire_timeout: Duration) -> PgPool {
    opened(PgPoolOptions::new().max_connections(1).acquire_timeout(acquire_timeout), db).await
}

/// The message distinguishes the pool's timeout from the lock's.
pub(crate) fn is_exhausted(error: &Error) {
    assert!(matches!(error, Error::PoolTimedOut { .. }), "{error:?}");
    has_a_clear_message(error, "waiting for a connection of the pool");
    has_a_clear_message(error, "max_connections");
    assert!(error.is_transient());
}

pub(crate) fn is_deadlock(error: &Error) {
    assert!(matches!(error, Error::Deadlock { .. }), "{error:?}");
    has_a_clear_message(error, "release what you hold, then acquire again");
    assert!(error.is_transient());
}

/// Other code unlocked the lock, and the guard detects this when it is released. The connection is closed, because its
/// state is unknown.
#[tokio::test]
async fn a_lock_that_other_code_unlocked_is_lost() {
    let (db, pool) = TestDb::with_pool(1).await;
    let mut lock = Lock::new(&pool, KEY);
    let guard = lock.acquire().await.unwrap();
    let pid = guard.backend_pid();
    let mut conn = guard.connection().await.unwrap();
    execute(&mut conn, "SELECT pg_advisory_unlock_all()".to_owned()).await;
    drop(conn);

    let lost = guard.release().await.unwrap_err();
    assert!(matches!(lost, Error::Lost { reason: Loss::NotHeld, .. }), "{lost:?}");
    has_a_clear_message(&lost, "another session may hold it");
    assert!(lost.is_transient());
    let guard = lock.acquire().await.unwrap();
    assert_ne!(guard.backend_pid(), pid);
    guard.release().await.unwrap();
    nothing_is_left(&mut db.admin().await, &pool).await;
}

/// The range includes both of its ends.
#[tokio::test]
async fn options_out_of_range_are_refused_at_once() {
    let pool = lazy(PgConnectOptions::new_without_pgpass().socket("/nonexistent/pglock"), MOMENT);
    for slice in [2_000, 3_600_000].map(Duration::from_millis) {
        let lock = Lock::new(&LockOptions::new().wait_slice(slice).on(&pool).unwrap(), KEY);
        assert_eq!(lock.key(), &Key::from(KEY));
    }
    for slice in [0, 1_999, 3_600_001, u64::MAX].map(Duration::from_millis) {
        let error = LockOptions::new().wait_slice(slice).on(&pool).unwrap_err();
        assert!(matches!(error, Error::InvalidArgument { .. }), "{error:?}");
        let message =
            format!("invalid argument: wait_slice is {slice:?}; it must be from 2s to 3600s");
        assert_eq!(error.to_string(), message);
        assert_eq!(error.key(), None);
        assert!(!error.is_transient());
    }
}

/// While one lock is held, a pool of one connection has none for another lock.
#[tokio::test]
async fn a_pool_is_exhausted_by_guards_too() {
    let db = TestDb::new().await;
    let pool = one_connection(&db, MOMENT).await;
    let guard = Lock::new(&pool, 1).acquire().await.unwrap();
    let mut lock = Lock::new(&pool, KEY);
    is_exhausted(&lock.acquire().await.unwrap_err());
    guard.release().await.unwrap();
    all_are_idle(&pool).await;
    works(&mut lock).await;
}

/// When the wait for an upgrade is cancelled, the shared guard keeps its lock.
#[tokio::test]
async fn a_wait_is_cancelled_without_harm_to_a_guard_of_the_same_handle() {
    let db = TestDb::new().await;
    let (mut admin, pool) = (db.admin().await, db.pool(2).await);
    let mut lock = Lock::new(&pool, KEY);
    let shared = lock.acquire_shared().await.unwrap();
    let other = Lock::new(&pool, KEY).acquire_shared().await.unwrap();

    let (failed, ()) = tokio::join!(timeout(TIMEOUT, lock.acquire()), async {
        let waiter = becomes(&mut admin, 2, 1).await.remove(0);
        assert_eq!(waiter, shared.backend_pid());
        execute(&mut admin, format!("SELECT pg_cancel_backend({waiter})")).await;
    });
    let error = failed.unwrap().unwrap_err();
    assert!(matches!(error, Error::Cancelled { .. }), "{error:?}");
    becomes(&mut admin, 2, 0).await;
    other.release().await.unwrap();
    lock.acquire().await.unwrap().release().await.unwrap();
    shared.release().await.unwrap();
    nothing_is_left(&mut admin, &pool).await;
}

/// The other side is a program that uses SQL: each side waits for the lock that the other holds.
#[tokio::test]
async fn a_deadlock_between_two_keys_hits_exactly_one() {
    let (db, pool, mut admin) = TestDb::scene(2).await;
    let mut lock = Lock::new(&pool, KEY);
    let shared = lock.acquire_shared().await.unwrap();
    let mut sql = db.admin().await;
    let mut other = shared.connection().await.unwrap();
    execute(&mut other, "SELECT pg_advisory_lock(2)".to_owned()).await;
    drop(other);
    let key = sqlx::postgres::PgAdvisoryLock::new(KEY).key().as_bigint().unwrap();
    execute(&mut sql, format!("SELECT pg_advisory_lock_shared({key})")).await;

    let theirs = async {
        let waited = sqlx::raw_sql("SELECT pg_advisory_lock(2)").execute(&mut sql).await;
        // In either case, the program releases the lock that the crate waits for.
        execute(&mut sql, "SELECT pg_advisory_unlock_all()".to_owned()).await;
        waited
    };
    let ours = async {
        becomes(&mut admin, 3, 1).await;
        let ours = timeout(TIMEOUT, lock.acquire()).await.unwrap();
        if ours.is_err() {
            // The crate's side fails, and releases the other key first, which only this session uses.
            let mut other = shared.connection().await.unwrap();
            execute(&mut other, "SELECT pg_advisory_unlock(2)".to_owned()).await;
        }
        ours
    };
    match tokio::join!(theirs, ours) {
        (Ok(_), Err(error)) => is_deadlock(&error),
        (Err(_), Ok(guard)) => {
            let mut other = guard.connection().await.unwrap();
            execute(&mut other, "SELECT pg_advisory_unlock(2)".to_owned()).await;
            drop(other);
            guard.release().await.unwrap();
        }
        both => panic!("exactly one must give way: {both:?}"),
    }
    shared.release().await.unwrap();
    works(&mut lock).await;
    nothing_is_left(&mut admin, &pool).await;
}
