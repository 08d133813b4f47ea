//! Calls of one process for the same key: one waits on the server, and the others wait in line behind it.

use std::future::poll_fn;
use std::ops::AsyncFnMut;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Poll;
use std::thread;
use std::time::Duration;

use pglock::{Error, ExclusiveGuard, Lock, LockManager, LockOptions};
use pglock_testkit::{Server, TestDb, advisory_locks, cancel_after};
use sqlx::postgres::PgPoolOptions;
use sqlx::{PgConnection, PgPool, Row};
use tokio::runtime::Builder;
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::support::{
    SOON, borrow_all, has_waiter, locks_are, no_locks, opened, soon, spawn, terminate,
};

const KEY: &str = "nightly-report";
const LATE: Duration = Duration::from_mins(1);

/// Polls a future once, which must not be ready.
async fn begin<F: Future>(future: &mut Pin<&mut F>) {
    assert!(poll_fn(|cx| Poll::Ready(future.as_mut().poll(cx))).await.is_pending());
}

/// Returns the guard of the first handle, which has waited on the server, and the acquire of the second one, which is
/// in line behind it.
pub(crate) async fn line_up<'l>(
    pool: &PgPool,
    admin: &mut PgConnection,
    first: &'l mut Lock,
    second: &'l mut Lock,
) -> (ExclusiveGuard, Pin<Box<impl Future<Output = pglock::Result<ExclusiveGuard>> + use<'l>>>) {
    let held = Lock::new(pool, KEY).acquire().await.unwrap();
    let mut front = pin!(first.acquire());
    let mut behind = Box::pin(second.acquire());
    tokio::select! {
        _ = &mut front => panic!("the lock is held"),
        () = locks_are(admin, 2, soon() * 4) => {}
    }
    begin(&mut behind.as_mut()).await;
    held.release().await.unwrap();
    (front.await.unwrap(), behind)
}

/// Retries until a lock is handed off. A busy machine may be too slow for the hand-off.
pub(crate) async fn until_handed_off(mut attempt: impl AsyncFnMut() -> bool) {
    let attempts = async { while !attempt().await {} };
    assert!(timeout(LATE, attempts).await.is_ok(), "no lock is handed off");
}

#[tokio::test]
async fn a_handle_does_not_reach_the_session_that_it_has_handed_off() {
    let (_db, pool, mut admin) = TestDb::scene(6).await;
    until_handed_off(async || {
        let (mut first, mut second) = (Lock::new(&pool, KEY), Lock::new(&pool, KEY));
        let (before, behind) = line_up(&pool, &mut admin, &mut first, &mut second).await;
        let pid = before.backend_pid();
        before.release().await.unwrap();
        let guard = behind.await.unwrap();
        if guard.backend_pid() != pid {
            return false;
        }
        assert!(first.try_acquire().await.unwrap().is_none());
        assert!(first.try_acquire_shared().await.unwrap().is_none());
        // The handle re-enters the session that holds the lock now.
        let again = second.acquire().await.unwrap();
        assert_eq!(again.backend_pid(), guard.backend_pid());
        drop(again);
        first.release_all().await.unwrap();
        assert!(!guard.is_lost());
        guard.verify().await.unwrap();
        guard.release().await.unwrap();
        true
    })
    .await;
    no_locks(&mut admin).await;
}

#[tokio::test]
async fn another_lock_of_the_guard_does_not_reach_the_session_either() {
    let (_db, pool, mut admin) = TestDb::scene(9).await;
    until_handed_off(async || {
        let (mut first, mut second) = (Lock::new(&pool, KEY), Lock::new(&pool, KEY));
        let (guard, behind) = line_up(&pool, &mut admin, &mut first, &mut second).await;
        let pid = guard.backend_pid();
        let mut same = Lock::new(&guard, KEY);
        let mut other = Lock::new(&guard, "another");
        drop(guard);
        let passed = behind.await.unwrap();
        assert!(same.try_acquire().await.unwrap().is_none());
        let other = other.acquire().await.unwrap();
        assert_ne!(other.backend_pid(), passed.backend_pid());
        passed.backend_pid() == pid
    })
    .await;
    no_locks(&mut admin).await;
}

/// The pool resets such a connection first, and the application may have released the lock on it.
#[tokio::test]
async fn a_connection_that_the_application_has_used_is_not_handed_off() {
    let db = TestDb::new().await;
    let pool = db.pool_options().max_connections(6).after_release(|connection, _| {
        Box::pin(async move {
            sqlx::raw_sql("DISCARD ALL").execute(connection).await?;
            Ok(true)
        })
    });
    let pool = pool.connect_with(db.options()).await.unwrap();
    let mut admin = db.admin().await;
    for round in 0..20 {
        let (mut first, mut second) = (Lock::new(&pool, KEY), Lock::new(&pool, KEY));
        let (guard, behind) = line_up(&pool, &mut admin, &mut first, &mut second).await;
        let mut connection = guard.connection().await.unwrap();
        let unlock = if round % 2 == 0 { "" } else { "SELECT pg_advisory_unlock_all()" };
        let leave = sqlx::AssertSqlSafe(format!("SET test.mark = 'left'; {unlock}"));
        sqlx::raw_sql(leave).execute(&mut *connection).await.unwrap();
        drop(connection);
        drop(guard);
        let next = behind.await.unwrap();
        next.verify().await.unwrap();
        let mut connection = next.connection().await.unwrap();
        let mark = "SELECT pg_catalog.current_setting('test.mark', true)";
        let row = sqlx::raw_sql(mark).fetch_one(&mut *connection).await.unwrap();
        let mark: Option<String> = row.get(0);
        assert!(mark.is_none_or(|mark| mark.is_empty()), "it meets what the one before has left");
    }
    no_locks(&mut admin).await;
}

/// The awaited `release` reports whether the lock was held until then.
#[tokio::test]
async fn a_release_that_is_awaited_asks_a_session_that_it_passes_on() {
    let (_db, pool, mut admin) = TestDb::scene(6).await;
    for _ in 0..20 {
        let (mut first, mut second) = (Lock::new(&pool, KEY), Lock::new(&pool, KEY));
        let (guard, behind) = line_up(&pool, &mut admin, &mut first, &mut second).await;
        terminate(&mut admin, guard.backend_pid()).await;
        let gone =
            async { while advisory_locks(&mut admin).await.iter().any(|lock| lock.granted) {} };
        timeout(LATE, gone).await.unwrap();
        assert!(matches!(guard.release().await, Err(Error::Lost { .. })));
        behind.await.unwrap().verify().await.unwrap();
    }
    no_locks(&mut admin).await;
}

#[tokio::test]
async fn one_connection_waits_however_many_tasks_do() {
    const TASKS: usize = 200;
    let (_db, pool, mut admin) = TestDb::scene(6).await;
    let held = Lock::new(&pool, KEY).acquire().await.unwrap();
    let inside = Arc::new(AtomicUsize::new(0));
    let mut tasks = JoinSet::new();
    for _ in 0..TASKS {
        let (mut lock, inside) = (Lock::new(&pool, KEY), Arc::clone(&inside));
        tasks.spawn(async move {
            let guard = lock.acquire().await.unwrap();
            assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
            tokio::task::yield_now().await;
            inside.fetch_sub(1, Ordering::SeqCst);
            drop(guard);
        });
    }
    locks_are(&mut admin, 2, soon() * 4).await;
    // The pool has connections left for everything else.
    let query = timeout(SOON * 4, sqlx::query("SELECT 1").execute(&pool)).await;
    query.expect("a query finds no connection").unwrap();
    assert_eq!(advisory_locks(&mut admin).await.len(), 2);
    held.release().await.unwrap();
    timeout(LATE, tasks.join_all()).await.unwrap();
    no_locks(&mut admin).await;
}

#[tokio::test]
async fn readers_behind_a_writer_share_it() {
    const READERS: usize = 4;
    let (_db, pool, mut admin) = TestDb::scene(12).await;
    let held = Lock::new(&pool, KEY).acquire().await.unwrap();
    let mut readers = JoinSet::new();
    for _ in 0..READERS {
        let mut lock = Lock::new(&pool, KEY);
        let mut reader = Box::pin(async move { lock.acquire_shared().await.unwrap() });
        begin(&mut reader.as_mut()).await;
        readers.spawn(reader);
        // The first reader waits on the server; the others are in line as soon as they are polled.
        locks_are(&mut admin, 2, soon() * 4).await;
    }
    let mut lock = Lock::new(&pool, KEY);
    let mut writer = pin!(lock.acquire());
    begin(&mut writer).await;
    held.release().await.unwrap();
    let readers = timeout(LATE, readers.join_all()).await.unwrap();
    assert!(timeout(Duration::from_millis(50), &mut writer).await.is_err());
    drop(readers);
    timeout(LATE, writer).await.unwrap().unwrap().release().await.unwrap();
    no_locks(&mut admin).await;
}

/// The call is dropped after every number of polls, while the lock is handed from call to call.
#[tokio::test]
async fn a_call_in_line_can_be_dropped() {
    const POLLS: usize = 12;
    let (_db, pool, mut admin) = TestDb::scene(6).await;
    for polls in 1..POLLS {
        let mut tasks = JoinSet::new();
        for task in 0..10 {
            let mut lock = Lock::new(&pool, KEY);
            tasks.spawn(async move {
                for _ in 0..10 {
                    if task % 2 == 0 {
                        drop(cancel_after(polls, lock.acquire()).await);
                    } else {
                        lock.acquire().await.unwrap().release().await.unwrap();
                    }
                    tokio::task::yield_now().await;
                }
            });
        }
        timeout(LATE, tasks.join_all()).await.unwrap();
        no_locks(&mut admin).await;
    }
}

#[tokio::test]
async fn the_next_call_waits_on_the_server_when_the_first_times_out() {
    let (_db, pool, mut admin) = TestDb::scene(6).await;
    let held = Lock::new(&pool, KEY).acquire().await.unwrap();
    let (mut one, mut two) = (Lock::new(&pool, KEY), Lock::new(&pool, KEY));
    let mut short = Box::pin(one.try_acquire_for(SOON * 5));
    tokio::select! {
        _ = &mut short => panic!("the lock is held"),
        () = has_waiter(&mut admin) => {}
    }
    let mut long = pin!(two.acquire());
    begin(&mut long).await;
    tokio::select! {
        timed_out = short => assert!(timed_out.unwrap().is_none()),
        _ = &mut long => panic!("the lock is held"),
    }
    tokio::select! {
        _ = &mut long => panic!("the lock is held"),
        () = locks_are(&mut admin, 2, soon() * 4) => {}
    }
    held.release().await.unwrap();
    drop(timeout(LATE, long).await.unwrap().unwrap());
}

/// The timeout of one call is no error for the others, either.
#[tokio::test]
async fn a_timeout_in_line_is_no_error() {
    let (_db, pool, mut admin) = TestDb::scene(6).await;
    // Opening a connection may take longer than the shortest timeout, which is an error.
    borrow_all(&pool).await;
    let held = Lock::new(&pool, KEY).acquire().await.unwrap();
    let (mut bounded, mut unbounded) = (JoinSet::new(), JoinSet::new());
    for number in 0..100 {
        let mut lock = Lock::new(&pool, KEY);
        if number % 10 == 9 {
            unbounded.spawn(async move { lock.acquire().await });
        } else {
            let time = Duration::from_millis(1_500 + 3 * number);
            bounded.spawn(async move { lock.try_acquire_for(time).await });
        }
    }
    for timed_out in timeout(LATE, bounded.join_all()).await.unwrap() {
        assert!(timed_out.unwrap().is_none());
    }
    held.release().await.unwrap();
    while let Some(served) = timeout(LATE, unbounded.join_next()).await.unwrap() {
        drop(served.unwrap().unwrap());
    }
    no_locks(&mut admin).await;
}

/// The calls wait for a connection before the process knows that the key is busy.
#[tokio::test]
async fn a_timeout_before_the_first_try_is_no_error_if_others_wait() {
    const CALLS: usize = 20;
    let db = TestDb::new().await;
    let held = Lock::new(&db.pool(1).await, KEY).acquire().await.unwrap();
    // Locks may use one connection of two, or two of three.
    let mut calls = JoinSet::new();
    for connections in [2, 3] {
        let pool = opened(PgPoolOptions::new().max_connections(connections), &db).await;
        for call in 0..CALLS {
            let mut lock = Lock::new(&pool, KEY);
            // The first call still waits when the others time out.
            let seconds = if call == 0 { 4 } else { 2 };
            calls.spawn(async move { lock.try_acquire_for(Duration::from_secs(seconds)).await });
        }
    }
    for timed_out in timeout(LATE, calls.join_all()).await.unwrap() {
        assert!(timed_out.unwrap().is_none());
    }
    held.release().await.unwrap();
}

/// The call has not tried the lock on the server, so the lock may be free.
#[tokio::test]
async fn a_try_that_finds_no_connection_is_an_error_though_others_wait() {
    let db = TestDb::new().await;
    let held = Lock::new(&db.pool(1).await, KEY).acquire().await.unwrap();
    let pool = PgPoolOptions::new().max_connections(2).acquire_timeout(SOON / 2);
    let pool = opened(pool, &db).await;
    let mut waiting = Lock::new(&pool, KEY);
    let wait = spawn(async move { waiting.acquire().await });
    has_waiter(&mut db.admin().await).await;
    let refused = Lock::new(&pool, KEY).try_acquire().await;
    assert!(matches!(refused, Err(Error::PoolTimedOut { .. })), "{refused:?}");
    let manager = LockManager::new(&pool);
    let refused = timeout(LATE, async { Lock::new(&manager, KEY).acquire().await.map(drop) });
    let refused = refused.await.unwrap();
    assert!(matches!(refused, Err(Error::PoolTimedOut { .. })), "{refused:?}");
    held.release().await.unwrap();
    wait.await.unwrap().unwrap().release().await.unwrap();
}

/// If the call waited in line for all of its time, it would reach the front with no time left.
#[tokio::test]
async fn a_call_with_a_timeout_stays_in_line_for_a_part_of_it() {
    const TIMEOUT: Duration = Duration::from_secs(6);
    let (_db, pool, mut admin) = TestDb::scene(6).await;
    let held = Lock::new(&pool, KEY).acquire().await.unwrap();
    let (mut first, mut second) = (Lock::new(&pool, KEY), Lock::new(&pool, KEY));
    let first = spawn(async move { first.acquire().await });
    locks_are(&mut admin, 2, soon() * 4).await;
    let second = spawn(async move { second.try_acquire_for(TIMEOUT).await });
    // The second call waits on the server after a quarter of its time. Waiting there only at the end of its time would
    // be too late.
    locks_are(&mut admin, 3, TIMEOUT * 11 / 12).await;
    held.release().await.unwrap();
    first.await.unwrap().unwrap().release().await.unwrap();
    assert!(second.await.unwrap().unwrap().is_some());
}

#[tokio::test]
async fn the_end_of_the_pool_ends_the_waits_in_line() {
    let (_db, pool, mut admin) = TestDb::scene(6).await;
    let held = Lock::new(&pool, KEY).acquire().await.unwrap();
    let mut tasks = JoinSet::new();
    for _ in 0..20 {
        let mut lock = Lock::new(&pool, KEY);
        tasks.spawn(async move { lock.acquire().await });
    }
    has_waiter(&mut admin).await;
    let closing = pool.clone();
    let closed = spawn(async move { closing.close().await });
    for ended in timeout(LATE, tasks.join_all()).await.unwrap() {
        assert!(matches!(ended, Err(Error::PoolClosed { .. })), "{ended:?}");
    }
    drop(held);
    timeout(LATE, closed).await.unwrap().unwrap();
}

/// The calls in line fail together, not one after the other.
#[tokio::test]
async fn all_in_line_hear_that_the_pool_is_exhausted() {
    // The timeout is longer than a dropped wait takes to return its connection.
    const TIMEOUT: Duration = Duration::from_secs(3);
    let db = TestDb::new().await;
    let pool = opened(db.pool_options().max_connections(3).acquire_timeout(TIMEOUT), &db).await;
    let mut admin = db.admin().await;
    sqlx::raw_sql("SELECT pg_advisory_lock(7)").execute(&mut admin).await.unwrap();
    let mut first = Lock::new(&pool, 7);
    let mut front = Box::pin(first.acquire());
    let mut watcher = db.admin().await;
    tokio::select! {
        _ = &mut front => panic!("the lock is held"),
        () = has_waiter(&mut watcher) => {}
    }
    let mut tasks = JoinSet::new();
    for _ in 0..10 {
        let mut lock = Lock::new(&pool, 7);
        tasks.spawn(async move { lock.acquire().await });
    }
    tokio::task::yield_now().await;
    // The queries take the other connections, and the one that the first wait returns.
    let mut queries = vec![pool.acquire().await.unwrap(), pool.acquire().await.unwrap()];
    drop(front);
    queries.push(timeout(LATE, pool.acquire()).await.unwrap().unwrap());
    let failed =
        timeout(TIMEOUT * 5, tasks.join_all()).await.expect("they wait one after the other");
    for failed in failed {
        assert!(matches!(failed, Err(Error::PoolTimedOut { .. })), "{failed:?}");
    }
}

/// The first in line and the task that waits on the server for the others are on a runtime that ends.
#[tokio::test]
async fn the_end_of_a_runtime_moves_the_line_on() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    for ended in 0..3 {
        // The pool is new, because a connection opened by a runtime that has ended can't be used.
        let pool = db.pool(6).await;
        let held = Lock::new(&pool, KEY).acquire().await.unwrap();
        let (end, until_end) = oneshot::channel::<()>();
        let (tell, begun) = oneshot::channel();
        let theirs = pool.clone();
        let thread = thread::spawn(move || {
            let runtime = Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async move {
                for _ in 0..3 {
                    let mut lock = Lock::new(&theirs, KEY);
                    drop(spawn(async move { lock.acquire().await }));
                }
                tokio::task::yield_now().await;
                tell.send(()).unwrap();
                until_end.await.unwrap_err();
            });
        });
        begun.await.unwrap();
        has_waiter(&mut admin).await;
        let mut lock = Lock::new(&pool, KEY);
        let mut ours = pin!(lock.acquire());
        begin(&mut ours).await;
        if ended > 0 {
            drop(end);
            tokio::task::spawn_blocking(move || thread.join().unwrap()).await.unwrap();
            held.release().await.unwrap();
            drop(timeout(LATE, ours).await.unwrap().unwrap());
        } else {
            // The lock passes through the calls of both runtimes.
            held.release().await.unwrap();
            drop(timeout(LATE, ours).await.unwrap().unwrap());
            drop(end);
            tokio::task::spawn_blocking(move || thread.join().unwrap()).await.unwrap();
        }
        no_locks(&mut admin).await;
    }
}

/// The server restarts repeatedly while the lock is handed from call to call.
#[tokio::test]
async fn the_line_outlives_a_restart() {
    let (server, db) = TestDb::with_server().await;
    let pool = db.pool(4).await;
    let inside = Arc::new(AtomicUsize::new(0));
    let done = Arc::new(AtomicUsize::new(0));
    let mut tasks = JoinSet::new();
    for _ in 0..50 {
        let (mut lock, inside, done) =
            (Lock::new(&pool, KEY), Arc::clone(&inside), Arc::clone(&done));
        tasks.spawn(async move {
            let mut cycles = 0;
            while cycles < 40 {
                match lock.acquire().await {
                    Ok(guard) => {
                        // A lost guard does not exclude the others.
                        let before = inside.fetch_add(1, Ordering::SeqCst);
                        tokio::task::yield_now().await;
                        assert!(before == 0 || guard.verify().await.is_err());
                        inside.fetch_sub(1, Ordering::SeqCst);
                        cycles += 1;
                    }
                    Err(_) => sleep(Duration::from_millis(20)).await,
                }
                done.fetch_add(1, Ordering::SeqCst);
            }
        });
    }
    for _ in 0..2 {
        let so_far = done.load(Ordering::SeqCst);
        let progress = async {
            while done.load(Ordering::SeqCst) < so_far + 200 {
                sleep(Duration::from_millis(2)).await;
            }
        };
        timeout(LATE, progress).await.unwrap();
        server.kill();
        server.restart();
    }
    timeout(LATE, tasks.join_all()).await.unwrap();
    no_locks(&mut db.admin().await).await;
}

/// On the server, the session has the keepalive settings of the first lock.
#[tokio::test]
async fn a_lock_with_other_keepalives_gets_no_session_that_is_handed_off() {
    let server = Server::options().tcp().start();
    let db = TestDb::on(&server).await;
    let options = server.tcp_options().database(db.name());
    let pool = db.pool_options().max_connections(6).connect_with(options).await.unwrap();
    let mut admin = db.admin().await;
    let others = LockOptions::new().keepalives_idle(Duration::from_secs(2)).on(&pool).unwrap();
    for _ in 0..20 {
        let (mut first, mut second) = (Lock::new(&pool, KEY), Lock::new(&others, KEY));
        let (before, behind) = line_up(&pool, &mut admin, &mut first, &mut second).await;
        before.release().await.unwrap();
        let guard = behind.await.unwrap();
        let mut connection = guard.connection().await.unwrap();
        let idle = sqlx::query_scalar("SHOW tcp_keepalives_idle").fetch_one(&mut *connection);
        let idle: String = idle.await.unwrap();
        assert_eq!(idle, "2");
    }
    no_locks(&mut admin).await;
}
