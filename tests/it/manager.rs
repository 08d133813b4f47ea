//! A manager holds many locks on few connections.

use std::collections::HashSet;
use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Poll;
use std::time::{Duration, Instant};

use nix::sys::signal::kill;
use nix::unistd::Pid;
use pglock::{Error, ExclusiveGuard, Lock, LockManager, LockOptions, Loss};
use pglock_testkit::{
    Server, TestDb, advisory_locks, amount, cancel_after, eventually, replace_function,
};
use sqlx::PgPool;
use tokio::task::{JoinSet, unconstrained};
use tokio::time::{sleep, sleep_until, timeout};

use crate::cancel::dropped_at_every_poll_on;
use crate::support::{
    SOON, WATCHED, backend_is, borrow_all, execute, fast_heartbeat, locks_are, no_locks, pool_of,
    refused, report, slow_heartbeat, spawn, terminate, upgraded, waits_in_vain,
};

const TIMEOUT: Duration = Duration::from_secs(30);
/// How long a lock is handed off in the process before other processes get their turn.
const BOUND: Duration = Duration::from_millis(20);

#[tokio::test]
async fn verify_finds_what_the_server_does_not_hold() {
    let (_server, db) = TestDb::with_server().await;
    let guard = Lock::new(&LockManager::new(&db.pool(2).await), 1).acquire().await.unwrap();
    replace_function(&mut db.admin().await, "pg_lock_status()", "BEGIN RETURN; END").await;
    let error = guard.verify().await.unwrap_err();
    assert!(matches!(error, Error::Lost { reason: Loss::NotHeld, .. }), "{error:?}");
    assert!(guard.is_lost());
}

/// Once the first reader has held the lock for long, the manager checks for a second reader whether another session
/// waits for the lock.
#[tokio::test]
async fn readers_share_a_lock_where_the_role_may_not_list_locks() {
    let (_server, db) = TestDb::with_server().await;
    let mut admin = db.admin().await;
    let hide =
        "CREATE ROLE unseeing LOGIN; REVOKE EXECUTE ON FUNCTION pg_lock_status() FROM PUBLIC";
    execute(&mut admin, hide).await;
    let pool = pool_of(db.options().username("unseeing"), 3).await;
    let manager = LockManager::new(&pool);
    let first = Lock::new(&manager, 1).acquire_shared().await.unwrap();
    let other = Lock::new(&manager, 2).acquire().await.unwrap();
    sleep(BOUND * 2).await;
    let mut lock = Lock::new(&manager, 1);
    // The manager assumes for each lock that another session waits for it, so it is the other sessions' turn first.
    let waiting = spawn(async move { lock.acquire_shared().await });
    sleep(BOUND * 2).await;
    assert!(!first.is_lost() && !other.is_lost());
    first.release().await.unwrap();
    let second = timeout(TIMEOUT, waiting).await.unwrap().unwrap().unwrap();
    assert!(!second.is_lost() && !other.is_lost());
}

#[tokio::test]
async fn a_thousand_locks_are_one_connection() {
    let (_db, pool, mut admin) = TestDb::scene(2).await;
    let manager = LockManager::new(&pool);
    let mut guards = Vec::new();
    for key in 0..1000 {
        guards.push(Lock::new(&manager, key).acquire().await.unwrap());
    }
    let pids: HashSet<i32> = guards.iter().map(|guard| guard.backend_pid()).collect();
    assert_eq!(pids.len(), 1);
    locks_are(&mut admin, 1000, SOON * 4).await;
    drop(guards);
    no_locks(&mut admin).await;
    // The manager returns the connection to the pool.
    borrow_all(&pool).await;
}

/// The caller gets no error, as with a pool that had a dead connection idle.
#[tokio::test]
async fn a_session_that_ended_while_it_held_nothing_is_replaced() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let mut lock = Lock::new(&LockManager::new(&db.pool(2).await), 1);
    let guard = lock.acquire().await.unwrap();
    let pid = guard.backend_pid();
    guard.release().await.unwrap();

    terminate(&mut admin, pid).await;
    // No task on this runtime runs meanwhile, so none detects the end of the session.
    while kill(Pid::from_raw(pid), None).is_ok() {
        std::thread::sleep(Duration::from_millis(5));
    }
    let guard = lock.acquire().await.unwrap();
    assert_ne!(guard.backend_pid(), pid);
    guard.release().await.unwrap();
}

/// A database whose unlock of a key in `trap.lie` returns `false` and releases nothing, after the `seconds` given
/// there.
async fn with_a_trap() -> (TestDb, PgPool) {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let lies = "CREATE SCHEMA trap; CREATE TABLE trap.lie (key int8, seconds float8)";
    sqlx::raw_sql(lies).execute(&mut admin).await.unwrap();
    let body = "BEGIN \
        IF EXISTS (SELECT FROM trap.lie WHERE key = $1) THEN \
          PERFORM pg_sleep((SELECT seconds FROM trap.lie WHERE key = $1)); \
          RETURN false; \
        END IF; \
        RETURN original.pg_advisory_unlock($1); \
      END";
    replace_function(&mut admin, "pg_advisory_unlock(bigint)", body).await;
    let pool = db.pool(2).await;
    (db, pool)
}

/// After such an answer, it is unknown which locks the session holds.
#[tokio::test]
async fn an_unlock_answered_false_is_a_loss_of_all() {
    let (db, pool) = with_a_trap().await;
    let mut admin = db.admin().await;
    let manager = LockManager::new(&pool);
    let (guard, other) =
        (Lock::new(&manager, 1).acquire().await.unwrap(), Lock::new(&manager, 2).acquire().await);
    let other = other.unwrap();

    sqlx::raw_sql("INSERT INTO trap.lie VALUES (1, 0)").execute(&mut admin).await.unwrap();
    let error = timeout(TIMEOUT, guard.release()).await.unwrap().unwrap_err();
    assert!(matches!(error, Error::Lost { reason: Loss::NotHeld, .. }), "{error:?}");
    timeout(SOON * 4, other.lost()).await.unwrap();
    assert!(matches!(other.release().await, Err(Error::Lost { reason: Loss::NotHeld, .. })));
    no_locks(&mut admin).await;

    Lock::new(&manager, 2).acquire().await.unwrap().release().await.unwrap();
}

/// The session answers no heartbeat while it runs a statement, and the statement itself serves as the heartbeat.
#[tokio::test]
async fn an_answer_that_takes_longer_than_a_heartbeat_is_no_loss() {
    let db = TestDb::new().await;
    let slow = "BEGIN \
        IF $1 = 2 THEN PERFORM pg_sleep(4); END IF; \
        RETURN original.pg_try_advisory_lock($1); \
      END";
    replace_function(&mut db.admin().await, "pg_try_advisory_lock(bigint)", slow).await;
    let pool = db.pool(2).await;
    let beat = SOON * 3;
    let options = fast_heartbeat().heartbeat_interval(beat).heartbeat_timeout(beat);
    let manager = LockManager::new(&options.keepalives_retries(7).on(&pool).unwrap());
    let guard = Lock::new(&manager, 1).acquire().await.unwrap();
    let slow = Lock::new(&manager, 2).acquire().await.unwrap();
    sleep(beat).await;
    assert!(!guard.is_lost());
    assert!(!slow.is_lost());
    guard.release().await.unwrap();
    slow.release().await.unwrap();
}

/// A statement in flight does not count as an answer of the server.
#[tokio::test]
async fn a_silent_server_is_reported_in_time_while_a_statement_is_in_flight() {
    let (server, db) = TestDb::with_server().await;
    let options = fast_heartbeat().heartbeat_interval(SOON * 6).heartbeat_timeout(SOON * 2);
    let options = options.keepalives_retries(9).on(&db.pool(2).await).unwrap();
    let manager = LockManager::new(&options);
    let guard = Lock::new(&manager, 1).acquire().await.unwrap();
    let answered = Instant::now();
    // The guard times out after 8 s, and the statement only after 12 s.
    sleep_until((answered + SOON * 4).into()).await;
    server.pause();
    let mut other = Lock::new(&manager, 2);
    let acquiring = other.acquire();
    let told = timeout(SOON * 7, async {
        tokio::select! {
            _ = acquiring => {}
            _ = guard.lost() => {}
        }
    });
    let told = told.await;
    server.resume();
    told.unwrap();
    assert!(guard.is_lost());
}

/// An acquire that was sent before the unlock was answered with `false` is retried on another session.
#[tokio::test]
async fn an_unlock_answered_false_is_no_error_of_a_later_call() {
    let (db, pool) = with_a_trap().await;
    let mut admin = db.admin().await;
    let manager = LockManager::new(&pool);
    let (guard, other) =
        (Lock::new(&manager, 1).acquire().await.unwrap(), Lock::new(&manager, 2).acquire().await);
    let other = other.unwrap();

    sqlx::raw_sql("INSERT INTO trap.lie VALUES (1, 2)").execute(&mut admin).await.unwrap();
    let mut late = Lock::new(&manager, 3);
    let (released, late) = tokio::join!(timeout(TIMEOUT, guard.release()), async {
        // The server is executing the unlock.
        backend_is(&mut admin, other.backend_pid(), "active", SOON * 10).await;
        timeout(TIMEOUT, late.acquire()).await
    });
    let error = released.unwrap().unwrap_err();
    assert!(matches!(error, Error::Lost { reason: Loss::NotHeld, .. }), "{error:?}");
    let late = late.unwrap().unwrap();
    assert_ne!(late.backend_pid(), other.backend_pid());
    timeout(SOON * 4, other.lost()).await.unwrap();
    late.release().await.unwrap();
    drop(other);
    no_locks(&mut admin).await;
}

#[tokio::test]
async fn it_excludes_and_is_excluded() {
    let (_db, pool) = TestDb::with_pool(4).await;
    let manager = LockManager::new(&pool);
    let mut ours = Lock::new(&manager, "invoice-17");
    let mut sibling = Lock::new(&manager, "invoice-17");
    let mut theirs = Lock::new(&pool, "invoice-17");

    let guard = ours.acquire().await.unwrap();
    assert!(sibling.try_acquire().await.unwrap().is_none());
    assert!(sibling.try_acquire_shared().await.unwrap().is_none());
    assert!(theirs.try_acquire().await.unwrap().is_none());
    let stacked = ours.try_acquire().await.unwrap().unwrap();
    guard.release().await.unwrap();
    assert!(theirs.try_acquire().await.unwrap().is_none());
    stacked.release().await.unwrap();

    let guard = theirs.try_acquire().await.unwrap().unwrap();
    assert!(ours.try_acquire().await.unwrap().is_none());
    waits_in_vain(SOON / 10, async |time| ours.try_acquire_for(time).await).await;
    guard.release().await.unwrap();
    ours.try_acquire_for(SOON * 10).await.unwrap().unwrap().release().await.unwrap();
}

#[tokio::test]
async fn shared_locks_admit_each_other() {
    let (_db, pool, mut admin) = TestDb::scene(4).await;
    let manager = LockManager::new(&pool);
    let one = Lock::new(&manager, 1).acquire_shared().await.unwrap();
    let two = Lock::new(&manager, 1).acquire_shared().await.unwrap();
    let three = Lock::new(&pool, 1).try_acquire_shared().await.unwrap().unwrap();
    assert!(Lock::new(&manager, 1).try_acquire().await.unwrap().is_none());
    locks_are(&mut admin, 2, SOON * 4).await;
    drop((one, two, three));
    no_locks(&mut admin).await;
}

/// Counts the holders that are inside at a time.
#[derive(Clone, Default)]
struct Inside(Arc<AtomicUsize>);

impl Inside {
    async fn alone(&self) {
        assert_eq!(self.0.fetch_add(1, Ordering::SeqCst), 0, "another holder is inside");
        tokio::task::yield_now().await;
        assert_eq!(self.0.fetch_sub(1, Ordering::SeqCst), 1);
    }
}

/// Acquires the key `rounds` times in each of `tasks` tasks, which take turns.
fn contend(manager: &LockManager, inside: &Inside, tasks: usize, rounds: usize) -> JoinSet<()> {
    let mut contenders = JoinSet::new();
    for _ in 0..tasks {
        let mut lock = Lock::new(&manager, "busy");
        let inside = inside.clone();
        contenders.spawn(async move {
            for round in 0..rounds {
                let guard = lock.acquire().await.unwrap();
                inside.alone().await;
                if round % 2 == 0 {
                    guard.release().await.unwrap();
                }
            }
        });
    }
    contenders
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_managers_and_a_plain_lock_take_turns() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let inside = Inside::default();
    let [first, second, third] = [db.pool(2).await, db.pool(2).await, db.pool(1).await];
    let one = contend(&LockManager::new(&first), &inside, 20, 50);
    let two = contend(&LockManager::new(&second), &inside, 20, 50);
    let mut plain = Lock::new(&third, "busy");
    for _ in 0..10 {
        let guard = timeout(TIMEOUT, plain.acquire()).await.unwrap().unwrap();
        inside.alone().await;
        guard.release().await.unwrap();
    }
    timeout(TIMEOUT, one.join_all()).await.unwrap();
    timeout(TIMEOUT, two.join_all()).await.unwrap();
    no_locks(&mut admin).await;
    for pool in [&first, &second, &third] {
        borrow_all(pool).await;
    }
}

/// Each heartbeat finds a session that is in use and holds nothing.
#[tokio::test]
async fn a_busy_session_that_holds_nothing_just_now_is_not_lost() {
    let (db, pool) = TestDb::with_pool(3).await;
    let second = Duration::from_secs(1);
    let options = LockOptions::new().heartbeat_interval(second / 10).heartbeat_timeout(second * 4);
    let manager = LockManager::new(
        &options
            .keepalives_idle(second)
            .keepalives_interval(second * 3)
            .keepalives_retries(3)
            .on(&pool)
            .unwrap(),
    );
    let mut lock = Lock::new(&manager, 1);
    let started = Instant::now();
    while started.elapsed() < second * 2 {
        let guard = lock.acquire().await.unwrap();
        guard.release().await.unwrap();
    }
    no_locks(&mut db.admin().await).await;
}

/// Acquires the keys below `count` all at once, so that the manager batches them into few statements.
async fn acquire_all(manager: &LockManager, count: i64) -> Vec<ExclusiveGuard> {
    let mut acquiring = JoinSet::new();
    for key in 0..count {
        let mut lock = Lock::new(manager, key);
        acquiring.spawn(async move { lock.acquire().await.unwrap() });
    }
    acquiring.join_all().await
}

#[tokio::test]
async fn many_guards_report_a_loss_and_acquire_again() {
    let count: i64 = amount(2_000, 10_000);
    let server = Server::options().setting("max_locks_per_transaction", "200").start();
    let db = TestDb::on(&server).await;
    let mut admin = db.admin().await;
    let pool = db.pool(2).await;
    let manager = LockManager::new(&slow_heartbeat().on(&pool).unwrap());
    let guards: Vec<_> = acquire_all(&manager, count).await.into_iter().map(Arc::new).collect();
    let mut told = JoinSet::new();
    for guard in &guards {
        let guard = Arc::clone(guard);
        told.spawn(async move {
            let loss = guard.lost().await;
            assert!(matches!(loss, Loss::Disconnected(_)), "{loss:?}");
            Instant::now()
        });
    }
    // By then the manager polls the session's connection. No heartbeat is due before the timeout.
    sleep(WATCHED).await;
    let killed = Instant::now();
    terminate(&mut admin, guards.first().unwrap().backend_pid()).await;
    let mut last = killed;
    while let Some(at) = timeout(TIMEOUT, told.join_next()).await.unwrap() {
        last = last.max(at.unwrap());
    }
    report(format_args!("{count} guards told within {:?}", last - killed));
    assert!(guards.iter().all(|guard| guard.is_lost()));

    // The server may still be releasing the locks, and the manager would wait for a busy key on another session.
    locks_are(&mut admin, 0, TIMEOUT).await;
    let again = acquire_all(&manager, count).await;
    drop(guards);
    assert!(again.iter().all(|guard| !guard.is_lost()));
    locks_are(&mut admin, usize::try_from(count).unwrap(), TIMEOUT).await;
    drop(again);
    locks_are(&mut admin, 0, TIMEOUT).await;
    borrow_all(&pool).await;
}

#[tokio::test]
async fn closing_a_handle_notifies_its_guards_and_no_others() {
    let (_db, pool, mut admin) = TestDb::scene(2).await;
    let manager = LockManager::new(&pool);
    let mut lock = Lock::new(&manager, 1);
    let guard = lock.acquire().await.unwrap();
    let other = Lock::new(&manager, 2).acquire().await.unwrap();
    lock.release_all().await.unwrap();
    locks_are(&mut admin, 1, SOON * 4).await;
    assert!(guard.is_lost() && !other.is_lost());
    assert!(matches!(timeout(SOON * 4, guard.lost()).await.unwrap(), Loss::Released));
    let again = lock.acquire().await.unwrap();
    guard.release().await.unwrap_err();
    assert!(!again.is_lost());
    locks_are(&mut admin, 2, SOON * 4).await;
    again.release().await.unwrap();
    other.release().await.unwrap();
    no_locks(&mut admin).await;
}

#[tokio::test]
async fn a_full_lock_table_fails_some_and_loses_none() {
    let server = Server::options()
        .setting("max_connections", "10")
        .setting("max_locks_per_transaction", "10")
        .start();
    let db = TestDb::on(&server).await;
    let mut admin = db.admin().await;
    let pool = db.pool(2).await;
    borrow_all(&pool).await;
    let manager = LockManager::new(&pool);
    let mut asking = JoinSet::new();
    for key in 0..10_000 {
        let mut lock = Lock::new(&manager, key);
        asking.spawn(async move { lock.acquire().await });
    }
    let mut guards = Vec::new();
    let mut failed = 0;
    while let Some(acquired) = asking.join_next().await {
        match acquired.unwrap() {
            Ok(guard) => guards.push(guard),
            Err(Error::OutOfLocks { .. }) => failed += 1,
            Err(error) => panic!("{error:?}"),
        }
    }
    assert!(failed > 0);
    assert!(guards.iter().all(|guard| !guard.is_lost()));
    // While the lock table is full, no session can query it.
    for guard in guards {
        guard.release().await.unwrap();
    }
    no_locks(&mut admin).await;
    borrow_all(&pool).await;
}

#[tokio::test]
async fn the_connection_is_not_borrowed() {
    let (_db, pool) = TestDb::with_pool(2).await;
    let guard = Lock::new(&LockManager::new(&pool), "invoice-17").acquire().await.unwrap();
    let error = guard.connection().await.unwrap_err();
    assert!(matches!(error, Error::SharedSession { .. }), "{error:?}");
    assert!(error.to_string().contains("invoice-17"), "{error}");
    guard.verify().await.unwrap();
    assert!(guard.fencing_token().await.unwrap() > 0);
    guard.release().await.unwrap();
}

#[tokio::test]
async fn a_closed_pool_gets_its_connection_back() {
    let (db, pool) = TestDb::with_pool(2).await;
    let manager = LockManager::new(&pool);
    // A manager whose session is idle does not delay the close.
    Lock::new(&manager, 1).acquire().await.unwrap().release().await.unwrap();
    timeout(SOON * 4, pool.close()).await.unwrap();
    assert!(matches!(
        Lock::new(&manager, 1).acquire().await.unwrap_err(),
        Error::PoolClosed { .. }
    ));

    // While a guard is alive, the close waits for it.
    let pool = db.pool(2).await;
    let guard = Lock::new(&LockManager::new(&pool), 1).acquire().await.unwrap();
    let mut closing = Box::pin(pool.close());
    timeout(SOON / 5, &mut closing).await.unwrap_err();
    guard.verify().await.unwrap();
    drop(guard);
    timeout(SOON * 4, closing).await.unwrap();
    no_locks(&mut db.admin().await).await;
}

#[tokio::test]
async fn one_connection_is_enough_to_wait_with() {
    let (db, pool, mut admin) = TestDb::scene(1).await;
    let other = db.pool(1).await;
    let held = Lock::new(&other, 1).acquire().await.unwrap();
    let manager = LockManager::new(&pool);
    let mut lock = Lock::new(&manager, 1);
    let (waited, ()) = tokio::join!(timeout(TIMEOUT, lock.acquire()), async {
        eventually("it waits on the server", TIMEOUT, || async {
            let mut admin = db.admin().await;
            advisory_locks(&mut admin).await.len() == 2
        })
        .await;
        held.release().await.unwrap();
    });
    drop(waited.unwrap().unwrap());
    no_locks(&mut admin).await;
    borrow_all(&pool).await;
}

#[tokio::test]
async fn dropped_at_every_poll() {
    let db = TestDb::new().await;
    let acquire = async |pool: &PgPool| {
        let manager = LockManager::new(pool);
        // This acquire opens the session.
        drop(Lock::new(&manager, 0).acquire().await.unwrap());
        let guard = Lock::new(&manager, "nightly-report").acquire().await.unwrap();
        guard.release().await.unwrap();
    };
    let change = async |pool: &PgPool| {
        let mut lock = Lock::new(&LockManager::new(pool), "nightly-report");
        let shared = lock.acquire_shared().await.unwrap();
        let exclusive = upgraded(shared.try_upgrade().await.unwrap());
        exclusive.downgrade().await.unwrap().release().await.unwrap();
    };
    let bounded = async |pool: &PgPool| {
        let mut lock = Lock::new(&LockManager::new(pool), "nightly-report");
        drop(lock.try_acquire_for(Duration::from_millis(30)).await);
    };
    dropped_at_every_poll_on(0, &db, acquire).await;
    dropped_at_every_poll_on(0, &db, change).await;
    dropped_at_every_poll_on(0, &db, bounded).await;

    // The key is busy, so the manager waits on a session of its own.
    let pool = db.pool(1).await;
    let _held = Lock::new(&pool, "nightly-report").acquire().await.unwrap();
    dropped_at_every_poll_on(1, &db, acquire).await;
    dropped_at_every_poll_on(1, &db, bounded).await;
}

/// Another task of the process holds the key, and the waiter times out.
#[tokio::test]
async fn dropped_in_the_process_queue() {
    let (db, pool) = TestDb::with_pool(2).await;
    let manager = LockManager::new(&pool);
    let guard = Lock::new(&manager, 1).acquire().await.unwrap();
    let mut first = Lock::new(&manager, 1);
    let mut last = Lock::new(&manager, 1);
    let mut waits = Box::pin(first.acquire());
    let mut waits_too = Box::pin(last.acquire());
    assert!(cancel_after(1, &mut waits).await.is_none());
    assert!(cancel_after(1, &mut waits_too).await.is_none());
    drop(waits);
    guard.release().await.unwrap();
    let guard = timeout(SOON * 4, waits_too).await.unwrap().unwrap();
    // The lock is granted to the waiter, which is not polled again.
    let mut waits = Box::pin(first.acquire());
    assert!(cancel_after(1, &mut waits).await.is_none());
    drop(guard);
    drop(waits);
    no_locks(&mut db.admin().await).await;
    borrow_all(&pool).await;
}

#[tokio::test]
async fn changing_the_mode() {
    let (_db, pool) = TestDb::with_pool(4).await;
    let manager = LockManager::new(&pool);
    let mut plain = Lock::new(&pool, 1);
    let mut lock = Lock::new(&manager, 1);

    let exclusive = lock.acquire().await.unwrap();
    assert!(plain.try_acquire_shared().await.unwrap().is_none());
    let shared = exclusive.downgrade().await.unwrap();
    let theirs = plain.try_acquire_shared().await.unwrap().unwrap();
    let shared = refused(shared.try_upgrade().await.unwrap());
    // Waiting for another process's lock is refused, because that process may wait for ours.
    let error = lock.acquire().await.unwrap_err();
    assert!(matches!(error, Error::Deadlock { .. }), "{error:?}");
    theirs.release().await.unwrap();
    let sibling = Lock::new(&manager, 1).acquire_shared().await.unwrap();
    let (exclusive, ()) = tokio::join!(timeout(SOON * 4, lock.acquire()), async {
        sibling.release().await.unwrap();
    });
    let exclusive = exclusive.unwrap().unwrap();
    assert!(plain.try_acquire_shared().await.unwrap().is_none());
    exclusive.release().await.unwrap();
    shared.release().await.unwrap();
    plain.try_acquire().await.unwrap().unwrap().release().await.unwrap();
}

#[tokio::test]
async fn two_that_share_a_key_and_want_it_alone_are_a_deadlock_for_one() {
    let (db, pool) = TestDb::with_pool(2).await;
    let manager = LockManager::new(&pool);
    let (mut one, mut two) = (Lock::new(&manager, 1), Lock::new(&manager, 1));
    let shared = one.acquire_shared().await.unwrap();
    let also_shared = two.acquire_shared().await.unwrap();
    let mut waits = Box::pin(one.acquire());
    assert!(cancel_after(1, &mut waits).await.is_none());
    let error = two.acquire().await.unwrap_err();
    assert!(matches!(error, Error::Deadlock { .. }), "{error:?}");
    drop(also_shared);
    drop(timeout(SOON * 4, waits).await.unwrap().unwrap());
    drop(shared);
    no_locks(&mut db.admin().await).await;
}

/// A key that the manager waited for has a session of its own, which is lost alone.
#[tokio::test]
async fn a_key_of_its_own_session_is_lost_alone() {
    let (db, pool, mut admin) = TestDb::scene(3).await;
    let other = db.pool(1).await;
    let held = Lock::new(&other, 1).acquire().await.unwrap();
    let manager = LockManager::new(&pool);
    let free = Lock::new(&manager, 2).acquire().await.unwrap();
    let mut lock = Lock::new(&manager, 1);
    let (waited, ()) = tokio::join!(timeout(TIMEOUT, lock.acquire()), async {
        locks_are(&mut admin, 3, TIMEOUT).await;
        held.release().await.unwrap();
    });
    let guard = waited.unwrap().unwrap();
    assert_ne!(guard.backend_pid(), free.backend_pid());
    terminate(&mut admin, guard.backend_pid()).await;
    timeout(SOON * 5, guard.lost()).await.unwrap();
    // The handle acquires the key again, on the session of the other keys.
    let again = timeout(TIMEOUT, lock.acquire()).await.unwrap().unwrap();
    assert_eq!(again.backend_pid(), free.backend_pid());
    assert!(guard.release().await.is_err());
    assert!(!free.is_lost() && !again.is_lost());
    drop((free, again));
    no_locks(&mut admin).await;
    borrow_all(&pool).await;
}

#[tokio::test]
async fn a_restart_of_the_server_loses_all_and_all_can_be_acquired_again() {
    let (server, db) = TestDb::with_server().await;
    let pool = db.pool(2).await;
    let manager = LockManager::new(&pool);
    let mut guards = Vec::new();
    for key in 0..100 {
        guards.push(Lock::new(&manager, key).acquire().await.unwrap());
    }
    server.restart();
    for (key, guard) in (0..).zip(&guards) {
        timeout(SOON * 5, guard.lost()).await.unwrap();
        let again = timeout(TIMEOUT, Lock::new(&manager, key).acquire()).await.unwrap().unwrap();
        again.release().await.unwrap();
    }
    drop(guards);
    no_locks(&mut db.admin().await).await;
    borrow_all(&pool).await;
}

/// Acquires the lock, and retries because a pooled connection may die with the runtime that opened it.
async fn acquire_in_the_end(manager: &LockManager) -> ExclusiveGuard {
    loop {
        match Lock::new(&manager, 1).acquire().await {
            Ok(guard) => return guard,
            Err(error) => assert!(error.is_transient(), "{error:?}"),
        }
    }
}

/// A waiter in another runtime continues without the runtime that has ended.
#[test]
fn a_runtime_that_ends_leaves_no_waiter() {
    let runtime = || {
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
    };
    let (first, second) = (runtime(), runtime());
    let db = second.block_on(TestDb::new());
    let pool = second.block_on(db.pool(4));
    let manager = LockManager::new(&pool);
    let guard = first.block_on(async { Lock::new(&manager, 1).acquire().await.unwrap() });
    let waiter = second.spawn({
        let manager = manager.clone();
        async move { drop(acquire_in_the_end(&manager).await) }
    });
    // The waiter is usually in the queue; a late one finds the key free.
    second.block_on(async { sleep(Duration::from_millis(50)).await });
    first.shutdown_timeout(SOON);
    second.block_on(async { timeout(TIMEOUT, waiter).await }).unwrap().unwrap();
    assert!(guard.is_lost());
    drop(guard);
    second.block_on(async {
        drop(acquire_in_the_end(&manager).await);
        no_locks(&mut db.admin().await).await;
    });
}

/// An unused manager leaves nothing running: the pool is dropped with the last handle.
#[tokio::test]
async fn an_unused_manager_keeps_no_pool_alive() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let other = db.pool(1).await;
    let held = Lock::new(&other, 1).acquire().await.unwrap();
    {
        let pool = db.pool(3).await;
        let manager = LockManager::new(&pool);
        let mut lock = Lock::new(&manager, 1);
        // One wait times out, and one is granted after the shared session has ended.
        waits_in_vain(SOON / 10, async |time| lock.try_acquire_for(time).await).await;
        let mut waits = Box::pin(lock.acquire());
        timeout(SOON * 2, &mut waits).await.unwrap_err();
        held.release().await.unwrap();
        drop(timeout(TIMEOUT, waits).await.unwrap().unwrap());
    }
    other.close().await;
    let others = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() \
        AND pid <> pg_backend_pid()";
    let started = Instant::now();
    while sqlx::query_scalar::<_, i64>(others).fetch_one(&mut admin).await.unwrap() > 0 {
        assert!(started.elapsed() < TIMEOUT, "a connection is left open");
        sleep(Duration::from_millis(5)).await;
    }
}

/// A guard may be dropped where there is no runtime.
#[tokio::test]
async fn dropped_on_a_plain_thread() {
    let (db, pool) = TestDb::with_pool(2).await;
    let manager = LockManager::new(&pool);
    let guard = Lock::new(&manager, 1).acquire().await.unwrap();
    std::thread::spawn(move || drop(guard)).join().unwrap();
    no_locks(&mut db.admin().await).await;
    borrow_all(&pool).await;
}

/// The server looks at all locks of a session at the end of each statement, so locks that no task needs must not pile up
/// while thousands of others are acquired.
#[tokio::test]
async fn a_release_overtakes_acquires_that_were_not_sent_yet() {
    const ACQUIRES: i64 = 3000;

    let (_db, pool) = TestDb::with_pool(2).await;
    let manager = LockManager::new(&pool);
    let released = Lock::new(&manager, -1).acquire().await.unwrap();
    let mut locks: Vec<Lock> = (0..ACQUIRES).map(|key| Lock::new(&manager, key)).collect();
    let mut acquires: Vec<_> = locks.iter_mut().map(|lock| Box::pin(lock.acquire())).collect();
    let mut guards = Vec::new();
    let mut poll_all = async || {
        // Without tokio's limit on a task's progress, which would leave most of them unpolled.
        unconstrained(poll_fn(|cx| {
            acquires.retain_mut(|acquire| match acquire.as_mut().poll(cx) {
                Poll::Ready(guard) => {
                    guards.push(guard.unwrap());
                    false
                }
                Poll::Pending => true,
            });
            Poll::Ready(acquires.len())
        }))
        .await
    };
    poll_all().await;
    // Until now, the manager's task could not run.
    released.release().await.unwrap();
    let left = poll_all().await;
    assert!(left >= 1000, "the release was sent behind all but {left} acquires");
}
