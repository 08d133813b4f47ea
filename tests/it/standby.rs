//! A hot standby has locks of its own, which are refused unless the options allow them, and are kept when it is
//! promoted.

use std::error::Error as _;

use pglock::{Error, Lock, LockOptions, Result, transaction};
use pglock_testkit::{Server, advisory_locks};
use sqlx::{ConnectOptions, PgPool};

use crate::support::{
    SOON, TIMEOUT, borrow_all, locks_are, no_locks, pool_of, quick_heartbeat, several_heartbeats,
};

const KEY: &str = "nightly-report";

async fn pool(server: &Server) -> PgPool {
    pool_of(server.connect_options(), 3).await
}

fn is_refused<T: std::fmt::Debug>(acquired: Result<T>) {
    let error = acquired.unwrap_err();
    assert!(matches!(error, Error::Standby { .. }), "{error:?}");
    assert!(error.to_string().contains(KEY));
    assert!(error.is_transient());
}

#[tokio::test]
async fn it_refuses_and_holds_nothing() {
    let (_primary, standby) = Server::options().start_with_standby();
    let pool = pool(&standby).await;
    let mut admin = standby.connect_options().connect().await.unwrap();
    let mut lock = Lock::new(&pool, KEY);

    for used_before in [false, true] {
        if used_before {
            let mut conns = Vec::new();
            for _ in 0..pool.options().get_max_connections() {
                let mut conn = pool.acquire().await.unwrap();
                sqlx::query("SELECT 1").execute(&mut *conn).await.unwrap();
                conns.push(conn);
            }
        }
        is_refused(lock.acquire().await);
        is_refused(lock.try_acquire().await);
        is_refused(lock.try_acquire_for(TIMEOUT).await);
        is_refused(lock.acquire_shared().await);
        is_refused(lock.try_acquire_shared().await);
        is_refused(lock.try_acquire_shared_for(TIMEOUT).await);
        assert_eq!(advisory_locks(&mut admin).await, []);
    }

    let mut tx = pool.begin().await.unwrap();
    is_refused(transaction::acquire(&mut tx, KEY).await);
    is_refused(transaction::try_acquire(&mut tx, KEY).await);
    is_refused(transaction::try_acquire_for(&mut tx, KEY, TIMEOUT).await);
    is_refused(transaction::acquire_shared(&mut tx, KEY).await);
    is_refused(transaction::try_acquire_shared(&mut tx, KEY).await);
    is_refused(transaction::try_acquire_shared_for(&mut tx, KEY, TIMEOUT).await);
    assert_eq!(advisory_locks(&mut admin).await, []);
    // The transaction has not failed.
    sqlx::raw_sql("SELECT 1").execute(&mut *tx).await.unwrap();
    tx.commit().await.unwrap();
    borrow_all(&pool).await;
}

#[tokio::test]
async fn it_locks_for_itself_if_that_is_allowed() {
    let (primary, standby) = Server::options().start_with_standby();
    let (there, here) = (pool(&primary).await, pool(&standby).await);
    let mut admin = standby.connect_options().connect().await.unwrap();
    let mut lock = Lock::new(&quick_heartbeat().allow_standby().on(&here).unwrap(), KEY);
    let mut other = lock.clone();

    let guard = lock.acquire().await.unwrap();
    guard.verify().await.unwrap();
    assert!(other.try_acquire().await.unwrap().is_none());
    // The lock is not held on the primary.
    Lock::new(&there, KEY).try_acquire().await.unwrap().unwrap().release().await.unwrap();

    let error = guard.fencing_token().await.unwrap_err();
    assert!(matches!(error, Error::Database { .. }), "{error:?}");
    assert!(error.to_string().contains(KEY));
    assert!(error.source().unwrap().to_string().contains("recovery"));
    guard.verify().await.unwrap();
    // Another lock on the same session is granted, too.
    Lock::new(&guard, "another").try_acquire().await.unwrap().unwrap().release().await.unwrap();

    let (waited, ()) = tokio::join!(other.acquire_shared(), async {
        locks_are(&mut admin, 2, TIMEOUT).await;
        guard.release().await.unwrap();
    });
    let shared = waited.unwrap();
    let another = lock.try_acquire_shared().await.unwrap().unwrap();
    // By then, their connections are polled, too, which leaves nothing on them either.
    for guard in [&shared, &another] {
        several_heartbeats(&mut admin, guard.backend_pid()).await;
        assert!(!guard.is_lost());
    }
    another.release().await.unwrap();
    shared.release().await.unwrap();
    no_locks(&mut admin).await;
    borrow_all(&here).await;
}

/// The sessions survive the promotion, and so do their locks. Locks that were held on the old primary are not held
/// here.
#[tokio::test]
async fn a_promotion_ends_no_session_and_takes_no_lock() {
    let (primary, standby) = Server::options().start_with_standby();
    let (there, here) = (pool(&primary).await, pool(&standby).await);
    let mut admin = standby.connect_options().connect().await.unwrap();
    let mut lock = Lock::new(&here, KEY);
    is_refused(lock.try_acquire().await);
    let old = borrow_all(&here).await;

    let theirs = Lock::new(&there, KEY).acquire().await.unwrap();
    let allowed = LockOptions::new().allow_standby();
    let ours = Lock::new(&allowed.on(&here).unwrap(), KEY).acquire().await.unwrap();
    standby.promote();

    ours.verify().await.unwrap();
    assert!(!ours.is_lost());
    assert!(lock.try_acquire().await.unwrap().is_none());
    // Two sessions hold the key, one on each server. Only their writes distinguish them.
    theirs.verify().await.unwrap();
    assert!(ours.fencing_token().await.unwrap() > 0);

    // One session is from before the promotion, and one is new.
    for pool in [&here, &pool(&standby).await] {
        let guard = Lock::new(pool, "another").acquire().await.unwrap();
        assert_eq!(old.contains(&guard.backend_pid()), std::ptr::eq(pool, &raw const here));
        guard.release().await.unwrap();
        let mut tx = pool.begin().await.unwrap();
        transaction::acquire(&mut tx, "another").await.unwrap();
        tx.commit().await.unwrap();
    }
    ours.release().await.unwrap();
    lock.acquire().await.unwrap().release().await.unwrap();
    theirs.release().await.unwrap();
    locks_are(&mut admin, 0, SOON * 4).await;
    borrow_all(&here).await;
}
