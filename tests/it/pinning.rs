//! Behind a pooler that pins a client to its server connection, as RDS Proxy does, everything works.

use std::time::Duration;

use pglock::doctor::{Severity, examine};
use pglock::{Error, Lock, LockManager, LockOptions, Loss, transaction};
use pglock_testkit::{Pinning, PinningPooler, Server, TestDb};
use sqlx::{ConnectOptions, PgPool};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::support::{
    TIMEOUT, borrow_all, execute, has_waiter, locks_are, pool_of, quick_heartbeat,
    several_heartbeats, terminate, waits_in_vain,
};

const KEY: &str = "nightly-report";
/// The sizes of sqlx's cache of prepared statements: with a cache, whose named statements pin too, and without.
const CACHES: [usize; 2] = [100, 0];
/// Enough server connections for the pinned clients: three of a pool, the monitor, and one for others.
const CONNECTIONS: usize = 5;

#[tokio::test]
async fn a_lock_excludes_and_is_held_and_its_loss_is_reported() {
    let (server, db) = TestDb::with_server().await;
    let mut admin = db.admin().await;
    for cache in CACHES {
        let pooler = PinningPooler::start(&server, CONNECTIONS, Pinning::UntilDisconnected).await;
        let through = pooler.connect_options().database(db.name()).statement_cache_capacity(cache);
        let pool = pool_of(through, 3).await;
        let mut lock = Lock::new(&quick_heartbeat().on(&pool).unwrap(), KEY);
        let mut other = lock.clone();
        let mut direct = Lock::new(&db.pool(1).await, KEY);

        let guard = lock.acquire().await.unwrap();
        assert!(other.try_acquire().await.unwrap().is_none());
        assert!(direct.try_acquire().await.unwrap().is_none());
        several_heartbeats(&mut admin, guard.backend_pid()).await;
        guard.verify().await.unwrap();
        assert!(guard.fencing_token().await.unwrap() > 0);

        // One wait is dropped, one times out, and one is granted.
        let moment = Duration::from_millis(300);
        timeout(moment, other.acquire()).await.unwrap_err();
        locks_are(&mut admin, 1, TIMEOUT).await;
        waits_in_vain(moment, async |time| other.try_acquire_for(time).await).await;
        let (waited, ()) = tokio::join!(other.acquire_shared(), async {
            has_waiter(&mut admin).await;
            guard.release().await.unwrap();
        });
        let shared = waited.unwrap();
        several_heartbeats(&mut admin, shared.backend_pid()).await;
        shared.verify().await.unwrap();
        assert!(direct.try_acquire().await.unwrap().is_none());

        terminate(&mut admin, shared.backend_pid()).await;
        let lost = timeout(TIMEOUT, shared.lost()).await.unwrap();
        assert!(matches!(lost, Loss::Disconnected(_)), "{lost:?}");
        assert!(matches!(shared.release().await, Err(Error::Lost { .. })));

        lock.acquire().await.unwrap().release().await.unwrap();
        locks_are(&mut admin, 0, TIMEOUT).await;
        borrow_all(&pool).await;
    }
}

#[tokio::test]
async fn a_manager_holds_its_locks() {
    let (server, db) = TestDb::with_server().await;
    let mut admin = db.admin().await;
    let pooler = PinningPooler::start(&server, CONNECTIONS, Pinning::UntilDisconnected).await;
    let pool = pool_of(pooler.connect_options().database(db.name()), 3).await;
    let manager = LockManager::new(&quick_heartbeat().on(&pool).unwrap());
    let mut direct = Lock::new(&db.pool(1).await, KEY);

    let guard = Lock::new(&manager, KEY).acquire().await.unwrap();
    let another = Lock::new(&manager, "another").acquire_shared().await.unwrap();
    several_heartbeats(&mut admin, guard.backend_pid()).await;
    assert!(direct.try_acquire().await.unwrap().is_none());
    guard.release().await.unwrap();
    another.release().await.unwrap();

    // The manager waits on another session, and holds the granted lock there.
    let held = direct.acquire().await.unwrap();
    let mut lock = Lock::new(&manager, KEY);
    let (waited, ()) = tokio::join!(lock.acquire(), async {
        has_waiter(&mut admin).await;
        held.release().await.unwrap();
    });
    let guard = waited.unwrap();
    several_heartbeats(&mut admin, guard.backend_pid()).await;
    assert!(direct.try_acquire().await.unwrap().is_none());
    guard.release().await.unwrap();
    locks_are(&mut admin, 0, TIMEOUT).await;
}

#[tokio::test]
async fn locks_of_a_transaction_exclude() {
    let (server, db) = TestDb::with_server().await;
    let pooler = PinningPooler::start(&server, CONNECTIONS, Pinning::UntilDisconnected).await;
    let pool = pool_of(pooler.connect_options().database(db.name()), 2).await;
    let (mut tx, mut other) = (pool.begin().await.unwrap(), pool.begin().await.unwrap());
    transaction::acquire(&mut tx, KEY).await.unwrap();
    assert!(!transaction::try_acquire(&mut other, KEY).await.unwrap());
    tx.commit().await.unwrap();
    transaction::acquire(&mut other, KEY).await.unwrap();
    other.commit().await.unwrap();
}

#[tokio::test]
async fn doctor_finds_that_locks_exclude() {
    let server = Server::start();
    let pooler = PinningPooler::start(&server, CONNECTIONS, Pinning::UntilDisconnected).await;
    let pool = pool_of(pooler.connect_options(), 3).await;
    let findings = examine(&pool, &LockOptions::new()).await.unwrap();
    let broken = findings.iter().any(|finding| finding.severity == Severity::Broken);
    assert!(!broken, "{findings:#?}");
    let found = findings.iter().find(|finding| finding.check == "exclusion").unwrap();
    assert_eq!(found.seen, "locks exclude other sessions");
}

/// The pooler pins like PgDog 0.1.56: by the lock functions that it detects in a statement, until the locks are
/// released.
mod until_unlocked {
    use super::*;

    /// Clients with short transactions, so that a client that isn't pinned gets another server connection each time.
    async fn start(server: &Server, db: &TestDb) -> (PinningPooler, PgPool, JoinSet<()>) {
        let pooler = PinningPooler::start(server, CONNECTIONS, Pinning::UntilUnlocked).await;
        // The pooler does not support prepared statements.
        let through = pooler.connect_options().database(db.name()).statement_cache_capacity(0);
        let mut others = JoinSet::new();
        for _ in 0..CONNECTIONS {
            let mut conn = through.connect().await.unwrap();
            others.spawn(async move {
                loop {
                    execute(&mut conn, "BEGIN; SELECT pg_sleep(0.001); COMMIT").await;
                }
            });
        }
        (pooler, pool_of(through, 3).await, others)
    }

    #[tokio::test]
    async fn a_free_lock_excludes_and_is_held_until_it_is_released() {
        let (server, db) = TestDb::with_server().await;
        let mut admin = db.admin().await;
        let (_pooler, pool, _others) = start(&server, &db).await;
        let mut lock = Lock::new(&quick_heartbeat().on(&pool).unwrap(), KEY);
        let mut direct = Lock::new(&db.pool(1).await, KEY);
        for _ in 0..5 {
            let guard = lock.acquire().await.unwrap();
            assert!(direct.try_acquire().await.unwrap().is_none());
            several_heartbeats(&mut admin, guard.backend_pid()).await;
            guard.verify().await.unwrap();
            guard.release().await.unwrap();
            locks_are(&mut admin, 0, TIMEOUT).await;
        }
    }

    /// A wait calls the lock function in a block, where the pooler does not detect it. The try before the wait has
    /// already pinned the client.
    #[tokio::test]
    async fn a_lock_that_was_waited_for_is_held() {
        let (server, db) = TestDb::with_server().await;
        let mut admin = db.admin().await;
        let (_pooler, pool, _others) = start(&server, &db).await;
        let mut lock = Lock::new(&quick_heartbeat().on(&pool).unwrap(), KEY);
        let mut direct = Lock::new(&db.pool(1).await, KEY);
        let held = direct.acquire().await.unwrap();
        let (waited, ()) = tokio::join!(lock.acquire(), async {
            has_waiter(&mut admin).await;
            held.release().await.unwrap();
        });
        let guard = waited.unwrap();
        several_heartbeats(&mut admin, guard.backend_pid()).await;
        guard.verify().await.unwrap();
        assert!(direct.try_acquire().await.unwrap().is_none());
        guard.release().await.unwrap();
        locks_are(&mut admin, 0, TIMEOUT).await;
    }
}
