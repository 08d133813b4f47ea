//! Services of several processes acquire hot locks, and work on the same pool.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pglock::{Error, Lock, LockManager, LockOptions, Loss};
use pglock_testkit::{Proxy, Server, TestDb, eventually};
use sqlx::PgPool;
use sqlx::postgres::PgPoolOptions;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::support::{
    SOON, borrow_all, fast_heartbeat, no_locks, opened, pool_of, slow_heartbeat, spawn, terminate,
    without_runtime,
};

const TIMEOUT: Duration = Duration::from_mins(1);

/// The kind of lock that a task of a service acquires repeatedly.
#[derive(Clone)]
enum Way {
    Lock,
    Manager(LockManager),
}

/// Acquires a key, works on the pool while it holds the key, and releases it.
async fn cycle(way: &Way, pool: &PgPool, key: i64) {
    let mut lock = match way {
        Way::Lock => Lock::new(pool, key),
        Way::Manager(manager) => Lock::new(&manager, key),
    };
    let guard = lock.acquire().await.unwrap();
    sqlx::query("SELECT pg_sleep(0.001)").execute(pool).await.unwrap();
    drop(guard);
}

/// The tasks of three services, each with a pool of `connections`, compete for few keys: all complete without an error,
/// and a query unrelated to locks is answered meanwhile.
async fn serve(connections: u32, managed: bool) {
    const CYCLES: usize = 8;
    let db = TestDb::new().await;
    let mut tasks = JoinSet::new();
    let mut pools = Vec::new();
    for service in 0..3_i64 {
        let pool = db.pool_options().max_connections(connections).acquire_timeout(TIMEOUT);
        let pool = pool.connect_with(db.options()).await.unwrap();
        let way = if managed { Way::Manager(LockManager::new(&pool)) } else { Way::Lock };
        for task in 0..30_i64 {
            let (pool, way) = (pool.clone(), way.clone());
            tasks.spawn(async move {
                for round in 0..i64::try_from(CYCLES).unwrap() {
                    // Half of the cycles use the hottest key.
                    let step = service * 31 + task * 7 + round * 3;
                    let key = if step % 2 == 0 { 0 } else { step % 12 };
                    cycle(&way, &pool, key).await;
                }
            });
        }
        pools.push(pool);
    }
    let query = sqlx::query("SELECT 1").execute(pools.first().unwrap());
    timeout(SOON * 4, query).await.unwrap().unwrap();
    timeout(TIMEOUT, async {
        while let Some(task) = tasks.join_next().await {
            task.unwrap();
        }
    })
    .await
    .unwrap();
    no_locks(&mut db.admin().await).await;
}

#[tokio::test]
async fn hot_keys_of_managers_leave_connections_to_the_work() {
    for connections in [3, 5, 8] {
        serve(connections, true).await;
    }
}

#[tokio::test]
async fn hot_locks_leave_connections_to_the_work() {
    for connections in [2, 5, 8] {
        serve(connections, false).await;
    }
}

/// Returns the sessions of the database that hold or await an advisory lock, apart from one.
async fn sessions_at_locks(db: &TestDb, except: i32) -> HashSet<i32> {
    let sessions = "SELECT DISTINCT pid FROM pg_locks WHERE locktype = 'advisory' AND pid <> $1
         AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
    let mut admin = db.admin().await;
    sqlx::query_scalar(sessions)
        .bind(except)
        .fetch_all(&mut admin)
        .await
        .unwrap()
        .into_iter()
        .collect()
}

/// A manager waits on `wait_sessions` sessions, however many keys are busy, and acquires each key when it is free.
async fn waits_on(wait_sessions: usize, locks: u32) {
    const KEYS: i64 = 40;
    let db = TestDb::new().await;
    let (one, other) = (db.pool(1).await, db.pool(locks).await);
    let holder = LockManager::new(&one);
    let mut held = Vec::new();
    for key in 0..KEYS {
        held.push(Lock::new(&holder, key).acquire().await.unwrap());
    }
    let manager = LockManager::new(&other);
    let mut waiters = JoinSet::new();
    for key in 0..KEYS {
        let mut lock = Lock::new(&manager, key);
        waiters.spawn(async move { lock.acquire().await.unwrap().release().await.unwrap() });
    }
    let holder = held.first().unwrap().backend_pid();
    let waiting = async || sessions_at_locks(&db, holder).await.len() == wait_sessions;
    eventually("as many connections as there should be wait", TIMEOUT, waiting).await;
    let size = other.size();
    assert!(size <= u32::try_from(wait_sessions).unwrap() + 2, "{size} connections");
    // Waiters whose key no session waits for on the server are granted it, too.
    for guard in held {
        guard.release().await.unwrap();
    }
    timeout(TIMEOUT, async { while waiters.join_next().await.is_some() {} }).await.unwrap();
    no_locks(&mut db.admin().await).await;
}

#[tokio::test]
async fn a_manager_waits_on_one_connection_of_a_small_pool() {
    waits_on(1, 10).await;
}

#[tokio::test]
async fn a_manager_waits_on_four_connections_of_a_large_pool() {
    waits_on(4, 25).await;
}

/// The session that has waited for a key holds it afterwards, and can't wait for another key meanwhile.
#[tokio::test]
async fn a_manager_waits_for_a_key_beside_one_that_it_holds_for_long() {
    let db = TestDb::new().await;
    let (one, other) = (db.pool(1).await, db.pool(5).await);
    let holder = LockManager::new(&one);
    let [first, second] = [Lock::new(&holder, 1), Lock::new(&holder, 2)];
    let [first, second] = [{ first }.acquire().await.unwrap(), { second }.acquire().await.unwrap()];
    let pid = first.backend_pid();
    let manager = LockManager::new(&other);
    let waiting = |key| {
        let mut lock = Lock::new(&manager, key);
        spawn(async move { lock.acquire().await.unwrap() })
    };
    let is_at = async |sessions| sessions_at_locks(&db, pid).await.len() == sessions;

    let held = waiting(1);
    eventually("a session waits", TIMEOUT, async || is_at(1).await).await;
    first.release().await.unwrap();
    let held = held.await.unwrap();
    let next = waiting(2);
    eventually("another one waits beside it", TIMEOUT, async || is_at(2).await).await;
    second.release().await.unwrap();
    drop((held, next.await.unwrap()));
    no_locks(&mut db.admin().await).await;
}

/// On a pool that can spare one connection for locks, the manager polls a busy key on that connection.
#[tokio::test]
async fn a_busy_key_is_acquired_where_nothing_can_wait_for_it() {
    for connections in [1, 2] {
        let db = TestDb::new().await;
        let small = pool_of(db.options(), connections).await;
        let held = Lock::new(&db.pool(1).await, 1).acquire().await.unwrap();
        let manager = LockManager::new(&small);
        let waiter = spawn({
            let mut lock = Lock::new(&manager, 1);
            async move { lock.acquire().await.unwrap().release().await }
        });
        // Other keys are granted meanwhile.
        Lock::new(&manager, 2).acquire().await.unwrap().release().await.unwrap();
        assert!(!waiter.is_finished());
        held.release().await.unwrap();
        timeout(SOON * 4, waiter).await.unwrap().unwrap().unwrap();
    }
}

/// When the pool has no free connection in time, all queued waiters fail at once, not one after another.
#[tokio::test]
async fn an_exhausted_pool_fails_all_queued_calls_at_once() {
    let db = TestDb::new().await;
    let limit = SOON * 3;
    let pool = PgPoolOptions::new().max_connections(1).acquire_timeout(limit);
    let pool = opened(pool, &db).await;
    let _taken = pool.acquire().await.unwrap();
    let manager = LockManager::new(&pool);
    let mut waiters = JoinSet::new();
    for key in 0..5000_i64 {
        let mut lock = Lock::new(&manager, key);
        waiters.spawn(async move { lock.acquire().await });
    }
    let started = Instant::now();
    while let Some(failed) = waiters.join_next().await {
        let error = failed.unwrap().unwrap_err();
        assert!(matches!(error, Error::PoolTimedOut { .. }), "{error:?}");
    }
    // A second timeout, for each thousand waiters, would take as long again.
    assert!(started.elapsed() < 3 * limit, "{:?}", started.elapsed());
}

#[tokio::test]
async fn the_close_of_the_pool_ends_the_waits_of_a_manager() {
    let db = TestDb::new().await;
    let held = Lock::new(&db.pool(1).await, 1).acquire().await.unwrap();
    for connections in [1, 5] {
        let pool = pool_of(db.options(), connections).await;
        let manager = LockManager::new(&pool);
        let guard = Lock::new(&manager, 2).acquire().await.unwrap();
        let waiters: Vec<_> = [1, 2]
            .map(|key| {
                let mut lock = Lock::new(&manager, key);
                spawn(async move { lock.acquire().await.map(drop) })
            })
            .into();
        let waiting = async || pool.num_idle() == 0;
        if connections > 1 {
            eventually("it waits for one of them", TIMEOUT, async || {
                sessions_at_locks(&db, held.backend_pid()).await.len() == 2
            })
            .await;
        } else {
            eventually("its only connection is used", TIMEOUT, waiting).await;
        }
        let closing = spawn({
            let pool = pool.clone();
            async move { pool.close().await }
        });
        for waiter in waiters {
            let error = timeout(SOON * 10, waiter).await.unwrap().unwrap().unwrap_err();
            assert!(matches!(error, Error::PoolClosed { .. }), "{error:?}");
        }
        assert!(!closing.is_finished());
        assert!(!guard.is_lost());
        guard.release().await.unwrap();
        timeout(SOON * 4, closing).await.unwrap().unwrap();
    }
}

/// A lock that is handed off inside the process is still checked when its release is awaited.
#[tokio::test]
async fn the_release_of_a_lock_that_is_handed_off_reports_a_loss() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let manager = LockManager::new(&db.pool(2).await);
    let guard = Lock::new(&manager, 1).acquire().await.unwrap();
    let next = spawn({
        let mut lock = Lock::new(&manager, 1);
        async move { lock.acquire().await.map(drop) }
    });
    tokio::task::yield_now().await;
    terminate(&mut admin, guard.backend_pid()).await;
    // No task on this runtime has run since then that could have detected the loss.
    assert!(!guard.is_lost());
    let error = timeout(SOON * 10, guard.release()).await.unwrap().unwrap_err();
    assert!(matches!(error, Error::Lost { reason: Loss::Disconnected(_), .. }), "{error:?}");
    timeout(SOON * 4, next).await.unwrap().unwrap().unwrap();
}

/// Outside of a runtime, there is no timer. The first release leaves the lock to the other owner, and the last one
/// sends a statement to the server.
#[test]
fn a_release_may_be_awaited_outside_of_a_runtime() {
    let runtime = runtime();
    let db = runtime.block_on(TestDb::new());
    let pool = runtime.block_on(db.pool(2));
    let manager = LockManager::new(&pool);
    let (mut one, mut other) = (Lock::new(&manager, 1), Lock::new(&manager, 1));
    let guards = runtime.block_on(async {
        [one.acquire_shared().await.unwrap(), other.acquire_shared().await.unwrap()]
    });
    for guard in guards {
        without_runtime(guard.release()).unwrap();
    }
    runtime.block_on(async { no_locks(&mut db.admin().await).await });
}

/// The waiter for a busy key finds no connection to wait on, because another task has taken the pool's only one
/// meanwhile.
#[tokio::test]
async fn a_waiter_without_a_connection_fails_or_continues() {
    let db = TestDb::new().await;
    for comes_back in [false, true] {
        let small = PgPoolOptions::new().max_connections(1).acquire_timeout(SOON * 3);
        let small = opened(small, &db).await;
        let held = Lock::new(&db.pool(1).await, 1).acquire().await.unwrap();
        let manager = LockManager::new(&small);
        let guard = Lock::new(&manager, 2).acquire().await.unwrap();
        // The manager tries the key on the shared session, which the other key keeps open.
        let waiter = spawn({
            let mut lock = Lock::new(&manager, 1);
            async move { lock.acquire().await.map(drop) }
        });
        let successor = spawn({
            let small = small.clone();
            async move { small.acquire().await.unwrap() }
        });
        tokio::task::yield_now().await;
        guard.release().await.unwrap();
        // The successor requested its connection before the manager requested one for the wait.
        let taken = timeout(TIMEOUT, successor).await.unwrap().unwrap();
        if comes_back {
            drop(taken);
            held.release().await.unwrap();
            timeout(TIMEOUT, waiter).await.unwrap().unwrap().unwrap();
        } else {
            let error = timeout(TIMEOUT, waiter).await.unwrap().unwrap().unwrap_err();
            assert!(matches!(error, Error::PoolTimedOut { .. }), "{error:?}");
            held.release().await.unwrap();
        }
    }
}

fn runtime() -> Runtime {
    Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

/// A pool of a database. Each of its connections is opened by the runtime that requests it.
async fn fresh_pool(db: &TestDb) -> PgPool {
    let pool = PgPoolOptions::new().max_connections(8).min_connections(0);
    pool.connect_with(db.options()).await.unwrap()
}

/// A waiter on another runtime continues without help.
#[test]
fn a_waiter_outlives_the_runtime_that_acquired_first() {
    for _ in 0..5 {
        let (first, second) = (runtime(), runtime());
        let (db, pool) = second.block_on(async {
            let db = TestDb::new().await;
            let pool = fresh_pool(&db).await;
            (db, pool)
        });
        let manager = LockManager::new(&pool);
        let mut lock = Lock::new(&manager, 1);
        let guard = first.block_on(lock.acquire()).unwrap();
        let waiter = second.spawn({
            let mut lock = Lock::new(&manager, 1);
            async move { lock.acquire().await }
        });
        thread::yield_now();
        drop(first);
        let acquired = second.block_on(async { timeout(TIMEOUT, waiter).await });
        let next = acquired.unwrap().unwrap().unwrap();
        assert!(guard.is_lost());
        second.block_on(next.release()).unwrap();
        drop(guard);
        second.block_on(async { no_locks(&mut db.admin().await).await });
    }
}

/// Other runtimes do not wait for a current-thread runtime that is no longer driven.
#[test]
fn a_runtime_that_is_not_driven_is_replaced() {
    let idle = Builder::new_current_thread().enable_all().build().unwrap();
    let second = runtime();
    let (db, pool) = second.block_on(async {
        let db = TestDb::new().await;
        let pool = fresh_pool(&db).await;
        (db, pool)
    });
    let manager = LockManager::new(&fast_heartbeat().on(&pool).unwrap());
    let mut lock = Lock::new(&manager, 1);
    // From here on, no thread drives this runtime.
    let guard = idle.block_on(lock.acquire()).unwrap();
    let (waits, both) = second.block_on(async {
        let mut tasks = JoinSet::new();
        let (tell, told) = oneshot::channel();
        let mut same = Lock::new(&manager, 1);
        tasks.spawn(async move {
            tell.send(()).unwrap();
            let guard = same.acquire().await.unwrap();
            guard.release().await.unwrap();
        });
        told.await.unwrap();
        let mut other = Lock::new(&manager, 2);
        let started = Instant::now();
        let guard = timeout(TIMEOUT, other.acquire()).await.unwrap().unwrap();
        guard.release().await.unwrap();
        let waits = started.elapsed();
        (waits, timeout(TIMEOUT, async { tasks.join_next().await.unwrap().unwrap() }).await)
    });
    both.unwrap();
    assert!(guard.is_lost());
    assert!(waits < SOON * 10, "{waits:?}");
    drop(guard);
    second.block_on(async { drop(db.admin().await) });
}

/// With this number of waiters, a cost per waiter that grows with their number would show.
#[tokio::test]
async fn many_give_up_together() {
    const WAITERS: usize = 10_000;
    let db = TestDb::new().await;
    let held = Lock::new(&db.pool(1).await, 1).acquire().await.unwrap();
    let manager = LockManager::new(&db.pool(4).await);
    let gave_up = Arc::new(AtomicUsize::new(0));
    let mut waiters = JoinSet::new();
    for _ in 0..WAITERS {
        let (mut lock, gave_up) = (Lock::new(&manager, 1), Arc::clone(&gave_up));
        waiters.spawn(async move {
            assert!(lock.try_acquire_for(Duration::from_secs(2)).await.unwrap().is_none());
            gave_up.fetch_add(1, Ordering::Relaxed);
        });
    }
    let mut others = 0;
    while gave_up.load(Ordering::Relaxed) < WAITERS {
        // A waiter that has panicked is never counted, so the test propagates the panic here.
        while let Some(waiter) = waiters.try_join_next() {
            waiter.unwrap();
        }
        timeout(TIMEOUT, Lock::new(&manager, 2).acquire())
            .await
            .unwrap()
            .unwrap()
            .release()
            .await
            .unwrap();
        others += 1;
    }
    while let Some(waiter) = waiters.join_next().await {
        waiter.unwrap();
    }
    assert!(others > 1);
    held.release().await.unwrap();
    Lock::new(&manager, 1).acquire().await.unwrap().release().await.unwrap();
}

/// When several sessions end at once, the end of each is detected, not only that of the first.
#[tokio::test]
async fn all_sessions_that_are_closed_at_once_are_reported_at_once() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let options = slow_heartbeat().on(&db.pool(3).await).unwrap();
    let mut guards = Vec::new();
    for key in 0..3 {
        guards.push(Lock::new(&options, key).acquire().await.unwrap());
    }
    // By then, the connections are polled.
    tokio::time::sleep(Duration::from_millis(2500)).await;
    let pids: Vec<i32> = guards.iter().map(|guard| guard.backend_pid()).collect();
    let end = sqlx::query("SELECT count(pg_terminate_backend(pid)) FROM unnest($1) AS pid");
    end.bind(pids).execute(&mut admin).await.unwrap();
    for guard in &guards {
        timeout(SOON * 4, guard.lost()).await.unwrap();
    }
}

/// The release finds the connection in use by a heartbeat, and the server does not answer any more.
#[tokio::test]
async fn a_release_during_a_heartbeat_that_is_not_answered_ends() {
    let (server, db) = TestDb::with_server().await;
    let options = fast_heartbeat().heartbeat_interval(SOON).heartbeat_timeout(SOON * 4);
    let options = options.keepalives_retries(6).on(&db.pool(1).await).unwrap();
    let guard = Lock::new(&options, 1).acquire().await.unwrap();
    server.pause();
    // A heartbeat is in flight, and the guard is not lost yet.
    tokio::time::sleep(SOON * 3 / 2).await;
    assert!(!guard.is_lost());
    let released = timeout(TIMEOUT, guard.release()).await.unwrap();
    server.resume();
    let error = released.unwrap_err();
    assert!(matches!(error, Error::Lost { .. }), "{error:?}");
    no_locks(&mut db.admin().await).await;
}

/// The link is frozen, as after a restart of a firewall. Each idle connection is replaced after the heartbeat's
/// timeout.
#[tokio::test]
async fn idle_connections_on_a_frozen_link_delay_an_acquire_and_do_not_fail_it() {
    let server = Server::options().tcp().start();
    let db = TestDb::on(&server).await;
    let proxy = Proxy::to(server.port()).await;
    let direct = server.tcp_options().database(db.name());
    let pool = PgPoolOptions::new()
        .max_connections(3)
        .connect_lazy_with(direct.clone().port(proxy.address().port()));
    borrow_all(&pool).await;
    eventually("all are idle", SOON * 10, async || pool.num_idle() == 3).await;
    proxy.freeze();
    pool.set_connect_options(direct);
    let options = LockOptions::new().heartbeat_timeout(SOON);
    let mut lock = Lock::new(&options.on(&pool).unwrap(), 1);
    let started = Instant::now();
    let guard = timeout(SOON * 20, lock.acquire()).await.unwrap().unwrap();
    let took = started.elapsed();
    assert!((SOON..SOON * 10).contains(&took), "{took:?}");
    guard.release().await.unwrap();
    proxy.thaw();
    no_locks(&mut db.admin().await).await;
}
