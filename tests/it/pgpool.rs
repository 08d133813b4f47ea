//! Behind pgpool-II, locks are acquired and held on the primary; otherwise an acquire is refused.

use pglock::doctor::{Severity, examine};
use pglock::{Error, Lock, LockManager, LockOptions, Loss, inspect, transaction};
use pglock_testkit::{Pgpool, Server, advisory_locks};
use sqlx::{ConnectOptions, PgPool};
use tokio::time::timeout;

use crate::support::{
    TIMEOUT, has_waiter, locks_are, pool_of, quick_heartbeat, several_heartbeats,
};

const KEY: &str = "nightly-report";
/// Configurations with all queries on the standby, the same by a list of functions, with each query on either node, and
/// with all queries on the primary.
const WORKING: [&[(&str, &str)]; 4] = [
    &[],
    &[("write_function_list", "nextval,setval,pg_.*,set_config,clock_timestamp")],
    &[("statement_level_load_balance", "on"), ("backend_weight0", "1")],
    &[("load_balance_mode", "off")],
];
/// A list of functions that replaces pgpool-II's check whether a function is volatile. The lock functions are not in
/// it.
const LIST: (&str, &str) = ("write_function_list", "nextval,setval");

/// The checks of doctor, with the severity of each finding.
async fn severities(pool: &PgPool) -> Vec<(&'static str, Severity)> {
    let findings = examine(pool, &LockOptions::new()).await.unwrap();
    findings.iter().map(|finding| (finding.check, finding.severity)).collect()
}

#[tokio::test]
async fn locks_exclude_on_the_primary_and_are_held() {
    let (primary, standby) = Server::options().start_with_standby();
    let mut admin = primary.connect_options().connect().await.unwrap();
    let direct = pool_of(primary.connect_options(), 2).await;
    for settings in WORKING {
        let Some(pooler) = Pgpool::start(&primary, &standby, settings) else { return };
        let pool = pool_of(pooler.connect_options(), 3).await;
        let mut lock = Lock::new(&quick_heartbeat().on(&pool).unwrap(), KEY);
        let (mut other, mut of_primary) = (lock.clone(), Lock::new(&direct, KEY));

        let guard = lock.acquire().await.unwrap();
        assert!(other.try_acquire().await.unwrap().is_none());
        assert!(of_primary.try_acquire().await.unwrap().is_none());
        tokio::select! {
            loss = guard.lost() => panic!("{settings:?}: {loss:?}"),
            () = several_heartbeats(&mut admin, guard.backend_pid()) => {}
        }
        guard.verify().await.unwrap();
        assert!(guard.fencing_token().await.unwrap() > 0);

        // A wait queues on the primary.
        let (waited, ()) = tokio::join!(other.acquire_shared(), async {
            has_waiter(&mut admin).await;
            guard.release().await.unwrap();
        });
        let shared = waited.unwrap();
        shared.verify().await.unwrap();

        // A loss is reported. The session is ended through pgpool-II, which would otherwise detach the primary.
        let held = inspect::locks_of(&pool, KEY).await.unwrap();
        let session = held.first().unwrap().session.as_ref().unwrap();
        assert!(inspect::terminate(&pool, session).await.unwrap());
        let lost = timeout(TIMEOUT, shared.lost()).await.unwrap();
        assert!(matches!(lost, Loss::Disconnected(_)), "{lost:?}");
        assert!(matches!(shared.release().await, Err(Error::Lost { .. })));

        lock.acquire().await.unwrap().release().await.unwrap();
        locks_are(&mut admin, 0, TIMEOUT).await;
    }
}

#[tokio::test]
async fn a_manager_holds_its_locks() {
    let (primary, standby) = Server::options().start_with_standby();
    let mut admin = primary.connect_options().connect().await.unwrap();
    for settings in WORKING {
        let Some(pooler) = Pgpool::start(&primary, &standby, settings) else { return };
        let pool = pool_of(pooler.connect_options(), 3).await;
        let manager = LockManager::new(&quick_heartbeat().on(&pool).unwrap());
        let guard = Lock::new(&manager, KEY).acquire().await.unwrap();
        let another = Lock::new(&manager, "another").acquire_shared().await.unwrap();
        assert!(Lock::new(&pool, KEY).try_acquire().await.unwrap().is_none());
        tokio::select! {
            loss = guard.lost() => panic!("{settings:?}: {loss:?}"),
            () = several_heartbeats(&mut admin, guard.backend_pid()) => {}
        }
        assert!(!another.is_lost());
        another.release().await.unwrap();
        guard.release().await.unwrap();
        locks_are(&mut admin, 0, TIMEOUT).await;
    }
}

#[tokio::test]
async fn locks_of_a_transaction_exclude_on_the_primary() {
    let (primary, standby) = Server::options().start_with_standby();
    let mut admin = primary.connect_options().connect().await.unwrap();
    let direct = pool_of(primary.connect_options(), 2).await;
    for settings in WORKING {
        let Some(pooler) = Pgpool::start(&primary, &standby, settings) else { return };
        let pool = pool_of(pooler.connect_options(), 2).await;
        let (mut tx, mut other) = (pool.begin().await.unwrap(), pool.begin().await.unwrap());
        transaction::acquire(&mut tx, KEY).await.unwrap();
        assert!(!transaction::try_acquire(&mut other, KEY).await.unwrap());
        assert!(Lock::new(&direct, KEY).try_acquire().await.unwrap().is_none());
        let (waited, ()) = tokio::join!(transaction::acquire(&mut other, KEY), async {
            has_waiter(&mut admin).await;
            tx.commit().await.unwrap();
        });
        waited.unwrap();
        other.rollback().await.unwrap();
        locks_are(&mut admin, 0, TIMEOUT).await;
    }
}

#[tokio::test]
async fn doctor_finds_the_same_as_on_the_primary() {
    let (primary, standby) = Server::options().start_with_standby();
    let direct = severities(&pool_of(primary.connect_options(), 3).await).await;
    for settings in WORKING {
        let Some(pooler) = Pgpool::start(&primary, &standby, settings) else { return };
        let through = severities(&pool_of(pooler.connect_options(), 3).await).await;
        assert_eq!(through, direct, "{settings:?}");
    }
}

/// With a list of functions, volatility does not count, and the lock functions go to the standby.
#[tokio::test]
async fn lock_functions_on_the_standby_are_refused() {
    let (primary, standby) = Server::options().start_with_standby();
    let Some(pooler) = Pgpool::start(&primary, &standby, &[LIST]) else { return };
    let pool = pool_of(pooler.connect_options(), 3).await;
    let mut lock = Lock::new(&pool, KEY);
    let refused = |error| assert!(matches!(error, Error::Standby { .. }), "{error:?}");
    refused(lock.acquire().await.unwrap_err());
    refused(lock.try_acquire_shared().await.unwrap_err());
    refused(Lock::new(&LockManager::new(&pool), KEY).acquire().await.unwrap_err());
    let mut tx = pool.begin().await.unwrap();
    refused(transaction::acquire(&mut tx, KEY).await.unwrap_err());
    tx.rollback().await.unwrap();
    for server in [&primary, &standby] {
        let mut admin = server.connect_options().connect().await.unwrap();
        assert_eq!(advisory_locks(&mut admin).await, []);
    }
    let found = severities(&pool).await;
    assert!(found.contains(&("primary", Severity::Broken)), "{found:?}");
}
