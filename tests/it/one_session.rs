//! Locks on the session of a guard have one owner and are lost together, and the server detects their deadlocks.

use std::time::{Duration, Instant};

use pglock::{Error, Lock, LockOptions, MultiLock, Result};
use pglock_testkit::{Proxy, Server, TestDb, eventually, replace_function};
use sqlx::PgPool;
use tokio::sync::Barrier;
use tokio::time::timeout;

use crate::support::{
    Behind, SOON, borrow_all, execute, has_waiter, locks_are, no_locks, pool_of, spawn, terminate,
    without_runtime,
};

/// Acquires one key, and another on the same session once both sides hold their first key. Releases both at the end.
async fn crosswise(pool: &PgPool, first: i64, second: i64, both: &Barrier) -> Result<()> {
    let guard = Lock::new(pool, first).acquire().await?;
    both.wait().await;
    let taken = Lock::new(&guard, second).acquire().await;
    // The side whose acquire failed still holds its first key.
    guard.verify().await?;
    guard.release().await?;
    taken?.release().await
}

/// A wait keeps the connection for a slice, which is a minute if nothing else needs the session.
#[tokio::test]
async fn a_wait_leaves_the_session_to_other_handles_after_the_guard_is_released() {
    let (db, pool, mut admin) = TestDb::scene(2).await;
    let busy = Lock::new(&db.pool(1).await, 2).acquire().await.unwrap();
    let guard = Lock::new(&pool, 1).acquire().await.unwrap();
    let (mut waits, mut other) = (Lock::new(&guard, 2), Lock::new(&guard, 3));
    let waiting = spawn(async move { waits.acquire().await });
    has_waiter(&mut admin).await;
    timeout(SOON * 20, guard.release()).await.unwrap().unwrap();
    has_waiter(&mut admin).await;
    let tried = timeout(SOON * 20, other.try_acquire()).await.unwrap();
    tried.unwrap().unwrap().release().await.unwrap();
    busy.release().await.unwrap();
    waiting.await.unwrap().unwrap().release().await.unwrap();
}

#[tokio::test]
async fn a_circle_of_locks_on_one_session_each_is_a_deadlock_for_exactly_one() {
    let server = Server::options().setting("deadlock_timeout", "200ms").start();
    let db = TestDb::on(&server).await;
    let mut admin = db.admin().await;
    let pool = db.pool(2).await;
    for _ in 0..10 {
        let both = Barrier::new(2);
        let started = Instant::now();
        let ends =
            async { tokio::join!(crosswise(&pool, 1, 2, &both), crosswise(&pool, 2, 1, &both)) };
        let ends = timeout(SOON * 20, ends).await.unwrap();
        let took = started.elapsed();
        assert!(
            matches!(
                &ends,
                (Ok(()), Err(Error::Deadlock { .. })) | (Err(Error::Deadlock { .. }), Ok(()))
            ),
            "{ends:?}"
        );
        // This is before the first slice of the wait has ended, so the server has reported the deadlock.
        assert!(took < Duration::from_secs(4), "{took:?}");
        no_locks(&mut admin).await;
    }
    borrow_all(&pool).await;
}

/// This is why locks can share a session: the server can't detect that two sessions belong together.
#[tokio::test]
async fn a_circle_of_locks_on_sessions_of_their_own_is_not_detected() {
    const WHILE: Duration = Duration::from_secs(3);
    let server = Server::options().setting("deadlock_timeout", "200ms").start();
    let db = TestDb::on(&server).await;
    let pool = db.pool(4).await;
    let one = Lock::new(&pool, 1).acquire().await.unwrap();
    let two = Lock::new(&pool, 2).acquire().await.unwrap();
    let (mut third, mut fourth) = (Lock::new(&pool, 1), Lock::new(&pool, 2));
    let started = Instant::now();
    let waits = tokio::join!(third.try_acquire_for(WHILE), fourth.try_acquire_for(WHILE));
    assert!(matches!(waits, (Ok(None), Ok(None))), "{waits:?}");
    assert!(started.elapsed() >= WHILE);
    one.release().await.unwrap();
    two.release().await.unwrap();
    no_locks(&mut db.admin().await).await;
    borrow_all(&pool).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_key_on_two_handles_of_one_session_stacks() {
    let (_db, pool, mut admin) = TestDb::scene(2).await;
    let mut other = Lock::new(&pool, 1);
    for round in 0..200 {
        let anchor = Lock::new(&pool, 0).acquire().await.unwrap();
        let (mut one, mut two) = (Lock::new(&anchor, 1), Lock::new(&anchor, 1));
        let (first, second) = tokio::join!(
            spawn(async move { one.acquire().await }),
            spawn(async move { two.try_acquire().await }),
        );
        let (first, second) =
            (first.unwrap().unwrap(), second.unwrap().unwrap().expect("one owner"));
        assert_eq!(first.backend_pid(), anchor.backend_pid());
        assert_eq!(second.backend_pid(), anchor.backend_pid());
        locks_are(&mut admin, 2, SOON * 4).await;
        if round % 2 == 0 {
            anchor.release().await.unwrap();
        }
        first.release().await.unwrap();
        assert!(other.try_acquire_shared().await.unwrap().is_none(), "round {round}");
        // The release runs at the same time as an acquire of the lock that is being released.
        let mut again = Lock::new(&second, 1);
        let (released, third) = tokio::join!(
            spawn(second.release()),
            spawn(async move { timeout(SOON * 10, again.acquire()).await.unwrap() }),
        );
        released.unwrap().unwrap();
        let third = third.unwrap().unwrap();
        assert!(other.try_acquire_shared().await.unwrap().is_none(), "round {round}");
        third.verify().await.unwrap();
        third.release().await.unwrap();
        other.try_acquire().await.unwrap().unwrap().release().await.unwrap();
    }
    no_locks(&mut admin).await;
    borrow_all(&pool).await;
}

/// An acquire that is dropped does not release the lock that another acquire was granted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_acquire_that_is_dropped_takes_nothing_from_another_on_the_session() {
    let (_db, pool, mut admin) = TestDb::scene(2).await;
    let mut other = Lock::new(&pool, 1);
    for round in 0..200 {
        let anchor = Lock::new(&pool, 0).acquire().await.unwrap();
        let (mut one, mut two) = (Lock::new(&anchor, 1), Lock::new(&anchor, 1));
        let (first, _) = tokio::join!(
            spawn(async move { one.acquire().await }),
            spawn(async move {
                drop(pglock_testkit::cancel_after(round % 10 + 1, two.acquire()).await);
            }),
        );
        let first = first.unwrap().unwrap();
        assert!(other.try_acquire_shared().await.unwrap().is_none(), "round {round}");
        first.verify().await.unwrap();
        anchor.verify().await.unwrap();
        first.release().await.unwrap();
        eventually("only the anchor holds", SOON * 5, || async {
            other.clone().try_acquire().await.unwrap().is_some()
        })
        .await;
        anchor.release().await.unwrap();
    }
    no_locks(&mut admin).await;
    borrow_all(&pool).await;
}

#[tokio::test]
async fn the_session_ends_with_its_last_guard_and_its_handles_open_their_own() {
    let (_db, pool, mut admin) = TestDb::scene(2).await;
    for _ in 0..50 {
        let first = Lock::new(&pool, 1).acquire().await.unwrap();
        let mut handle = Lock::new(&first, 2);
        let second = handle.acquire_shared().await.unwrap();
        let third = Lock::new(&second, (3, 4)).acquire().await.unwrap();
        assert_eq!(first.backend_pid(), third.backend_pid());
        first.release().await.unwrap();
        third.release().await.unwrap();
        assert!(pool.num_idle() < pool.size() as usize, "the session has ended under a guard");
        second.verify().await.unwrap();
        // The session ends, and the handle is used a moment later: it finds the lock free.
        drop(second);
        let again = handle.try_acquire().await.unwrap().unwrap();
        locks_are(&mut admin, 1, SOON * 4).await;
        again.release().await.unwrap();
        no_locks(&mut admin).await;
    }
    borrow_all(&pool).await;
}

#[tokio::test]
async fn the_loss_of_a_session_is_reported_by_the_guards_of_all_its_handles() {
    let (_db, pool, mut admin) = TestDb::scene(3).await;
    let first = Lock::new(&pool, 1).acquire().await.unwrap();
    let mut handle = Lock::new(&first, 2);
    let second = handle.acquire_shared().await.unwrap();
    terminate(&mut admin, first.backend_pid()).await;
    let both = async { tokio::join!(first.lost(), second.lost()) };
    timeout(SOON * 10, both).await.unwrap();
    assert!(matches!(first.verify().await, Err(Error::Lost { .. })));
    assert!(matches!(second.verify().await, Err(Error::Lost { .. })));
    no_locks(&mut admin).await;

    let again = handle.acquire().await.unwrap();
    assert_ne!(again.backend_pid(), first.backend_pid());
    assert!(!again.is_lost());
    // A handle made from a guard that is already lost has a session of its own from the start.
    let apart = Lock::new(&first, 5).acquire().await.unwrap();
    assert_ne!(apart.backend_pid(), first.backend_pid());
    drop((first, second));
    locks_are(&mut admin, 2, SOON * 4).await;
    again.release().await.unwrap();
    apart.release().await.unwrap();
    no_locks(&mut admin).await;
    borrow_all(&pool).await;
}

/// The release waits for the connection, which the application has borrowed.
#[tokio::test]
async fn an_acquire_behind_a_release_that_waits_ends_with_the_pool() {
    let (db, pool) = TestDb::with_pool(2).await;
    let mut lock = Lock::new(&pool, 1);
    let guard = lock.acquire().await.unwrap();
    let connection = guard.connection().await.unwrap();
    assert!(timeout(SOON / 10, lock.release_all()).await.is_err());
    let acquiring = spawn(async move { lock.acquire().await.map(drop) });
    tokio::task::yield_now().await;
    let closing = spawn({
        let pool = pool.clone();
        async move { pool.close().await }
    });
    let error = timeout(SOON * 10, acquiring).await.unwrap().unwrap().unwrap_err();
    assert!(matches!(error, Error::PoolClosed { .. }), "{error:?}");
    drop(connection);
    timeout(SOON * 4, closing).await.unwrap().unwrap();
    no_locks(&mut db.admin().await).await;
}

/// The task would wait for the connection that it keeps itself.
#[tokio::test]
async fn a_call_behind_a_connection_that_its_own_task_keeps_ends_with_an_error() {
    let (db, pool) = TestDb::with_pool(4).await;
    let mut lock = Lock::new(&pool, 1);
    let (guard, other) =
        (lock.acquire_shared().await.unwrap(), lock.acquire_shared().await.unwrap());
    let mut beside = Lock::new(&guard, 2);
    let connection = guard.connection().await.unwrap();
    let calls = async {
        tokio::join!(
            guard.fencing_token(),
            guard.verify(),
            beside.acquire(),
            lock.try_acquire(),
            other.try_upgrade(),
        )
    };
    let calls = timeout(Duration::from_mins(1), calls).await.unwrap();
    for error in [
        calls.0.unwrap_err(),
        calls.1.unwrap_err(),
        calls.2.unwrap_err(),
        calls.3.unwrap_err(),
        calls.4.unwrap_err(),
    ] {
        assert!(matches!(error, Error::ConnectionBorrowed { .. }), "{error:?}");
    }
    drop(connection);
    guard.release().await.unwrap();
    no_locks(&mut db.admin().await).await;
    borrow_all(&pool).await;
}

#[tokio::test]
async fn a_handle_acquires_again_although_the_connection_of_its_lost_session_is_kept() {
    let (_db, pool, mut admin) = TestDb::scene(4).await;
    let mut lock = Lock::new(&pool, 1);
    let guard = lock.acquire().await.unwrap();
    let connection = guard.connection().await.unwrap();
    terminate(&mut admin, guard.backend_pid()).await;
    timeout(SOON * 10, guard.lost()).await.unwrap();
    let again = timeout(SOON * 5, lock.acquire()).await.unwrap().unwrap();
    assert_ne!(again.backend_pid(), guard.backend_pid());
    drop(connection);
    drop(guard);
    again.release().await.unwrap();
    no_locks(&mut admin).await;
}

/// The acquire is on a session that holds another lock.
#[tokio::test]
async fn a_bounded_acquire_on_a_frozen_link_ends_in_its_time() {
    const TIME: Duration = Duration::from_millis(200);
    let behind = Behind::a_proxy(2).await;
    let guard = Lock::new(&behind.pool, 1).acquire().await.unwrap();
    let mut beside = Lock::new(&guard, 2);
    behind.proxy.freeze();
    let started = Instant::now();
    let bounded = timeout(SOON * 20, beside.try_acquire_for(TIME)).await.unwrap();
    let took = started.elapsed();
    behind.proxy.thaw();
    assert!(!matches!(bounded, Ok(Some(_))), "{bounded:?}");
    assert!(took < SOON * 10, "only after {took:?}");
    drop(guard);
    no_locks(&mut behind.db.admin().await).await;
}

/// Outside of a runtime, there is no timer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_release_that_waits_for_the_connection_may_be_awaited_outside_of_a_runtime() {
    let (db, pool) = TestDb::with_pool(2).await;
    let guard = Lock::new(&pool, 1).acquire().await.unwrap();
    let other = Lock::new(&guard, 2).acquire().await.unwrap();
    let connection = guard.connection().await.unwrap();
    let releasing = std::thread::spawn(move || without_runtime(other.release()));
    tokio::time::sleep(SOON / 10).await;
    assert!(!releasing.is_finished());
    drop(connection);
    eventually("it is released", SOON * 4, async || releasing.is_finished()).await;
    releasing.join().unwrap().unwrap();
    guard.release().await.unwrap();
    no_locks(&mut db.admin().await).await;
}

/// A session stays on the server where it was opened, so its heartbeats go to that server.
#[tokio::test]
async fn a_pool_that_turns_to_another_server_loses_no_session() {
    let (db, elsewhere) = (TestDb::new().await, Server::start());
    let elsewhere = TestDb::on(&elsewhere).await;
    let pool = db.pool(2).await;
    let options = LockOptions::new().heartbeat_interval(SOON / 5).on(&pool).unwrap();
    let guard = Lock::new(&options, 1).acquire().await.unwrap();
    pool.set_connect_options(elsewhere.options());
    // While the connection is borrowed, another one sends the heartbeats.
    let mut connection = guard.connection().await.unwrap();
    assert!(timeout(SOON, guard.lost()).await.is_err());
    sqlx::query("SELECT 1").execute(&mut *connection).await.unwrap();
    drop(connection);
    guard.release().await.unwrap();
}

/// The answer to a heartbeat may be late by the heartbeat's interval, and other answers may be, too.
#[tokio::test]
async fn a_short_timeout_of_the_heartbeat_is_enough_on_a_slow_link() {
    let server = Server::options().tcp().start();
    let db = TestDb::on(&server).await;
    let proxy = Proxy::to(server.port()).await;
    proxy.delay(SOON / 13);
    let options = server.tcp_options().database(db.name()).port(proxy.address().port());
    let pool = pool_of(options, 1).await;
    let options = LockOptions::new().heartbeat_timeout(SOON / 10).on(&pool).unwrap();
    let mut lock = Lock::new(&options, 1);
    let guard = lock.acquire().await.unwrap();
    let pid = guard.backend_pid();
    guard.verify().await.unwrap();
    guard.release().await.unwrap();
    let guard = lock.acquire().await.unwrap();
    assert_eq!(guard.backend_pid(), pid, "the idle connection was closed");
}

/// The wait is cancelled on an idle connection of the pool, which is dead, and then on another one. The release waits
/// for the cancellation, and is not affected by it.
#[tokio::test]
async fn a_release_behind_a_wait_that_is_hard_to_cancel_is_no_loss() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let (pool, elsewhere) = (db.pool(2).await, db.pool(1).await);
    let held = Lock::new(&elsewhere, 2).acquire().await.unwrap();
    let guard = Lock::new(&pool, 1).acquire().await.unwrap();
    let mut idle = pool.acquire().await.unwrap();
    let dead: i32 =
        sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(&mut *idle).await.unwrap();
    drop(idle);
    let mut other = Lock::new(&guard, 2);
    let waiting = spawn(async move { other.acquire().await.map(drop) });
    locks_are(&mut admin, 3, SOON * 4).await;
    terminate(&mut admin, dead).await;
    waiting.abort();
    assert!(waiting.await.unwrap_err().is_cancelled());
    guard.release().await.unwrap();
    locks_are(&mut admin, 1, SOON * 4).await;
    held.release().await.unwrap();
}

/// An administrator cancels the statement of a release, before or after the server has released the lock.
#[tokio::test]
async fn a_release_that_is_cancelled_is_no_loss() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    execute(
        &mut admin,
        "CREATE SEQUENCE unlocks; CREATE TABLE cancels (first_unlocks boolean); \
         GRANT ALL ON SEQUENCE unlocks TO PUBLIC; GRANT ALL ON cancels TO PUBLIC; \
         INSERT INTO cancels VALUES (NULL)",
    )
    .await;
    let cancel_the_first = "BEGIN \
           IF $1 OPERATOR(pg_catalog.=) 1 AND pg_catalog.nextval('public.unlocks') OPERATOR(pg_catalog.=) 1 THEN \
             IF (SELECT first_unlocks FROM public.cancels) THEN \
               PERFORM original.pg_advisory_unlock($1); \
             END IF; \
             RAISE query_canceled; \
           END IF; \
           RETURN original.pg_advisory_unlock($1); \
         END";
    replace_function(&mut admin, "pg_advisory_unlock(bigint)", cancel_the_first).await;
    let pool = db.pool(1).await;
    for first_unlocks in [false, true] {
        let cancel_again = format!(
            "UPDATE cancels SET first_unlocks = {first_unlocks}; ALTER SEQUENCE unlocks RESTART"
        );
        execute(&mut admin, cancel_again.as_str()).await;
        let other = Lock::new(&pool, 2).acquire().await.unwrap();
        let pid = other.backend_pid();
        let mut lock = Lock::new(&other, 1);

        lock.acquire().await.unwrap().release().await.unwrap();
        locks_are(&mut admin, 1, SOON * 4).await;

        execute(&mut admin, cancel_again).await;
        let (exclusive, shared) =
            (lock.acquire().await.unwrap(), lock.acquire_shared().await.unwrap());
        exclusive.release().await.unwrap();
        shared.verify().await.unwrap();
        let elsewhere = db.pool(1).await;
        let beside = Lock::new(&elsewhere, 1).try_acquire_shared().await.unwrap();
        beside.expect("it is only shared").release().await.unwrap();
        shared.release().await.unwrap();
        locks_are(&mut admin, 1, SOON * 4).await;

        other.verify().await.unwrap();
        other.release().await.unwrap();
        no_locks(&mut admin).await;
        let guard = Lock::new(&pool, 2).acquire().await.unwrap();
        assert_eq!(guard.backend_pid(), pid, "the session was lost");
        guard.release().await.unwrap();
    }
}

#[tokio::test]
async fn the_close_of_the_pool_ends_waits_on_the_session_of_a_guard_and_for_several_keys() {
    let (db, pool, mut admin) = TestDb::scene(3).await;
    let held = Lock::new(&db.pool(1).await, 1).acquire().await.unwrap();
    let guard = Lock::new(&pool, 9).acquire().await.unwrap();
    let (mut beside, mut several) = (Lock::new(&guard, 1), MultiLock::new(&pool, [1, 2]));
    let waits = timeout(SOON * 20, async { tokio::join!(beside.acquire(), several.acquire()) });
    let closing = pool.clone();
    let closing = spawn(async move {
        // Two are held, and two are waited for.
        locks_are(&mut admin, 4, SOON * 10).await;
        closing.close().await;
    });
    let waited = waits.await;
    let (beside, several) = waited.unwrap();
    assert!(matches!(beside, Err(Error::PoolClosed { .. })), "{beside:?}");
    assert!(matches!(several, Err(Error::PoolClosed { .. })), "{several:?}");
    guard.release().await.unwrap();
    timeout(SOON * 20, closing).await.unwrap().unwrap();
    held.release().await.unwrap();
}
