//! A future dropped at any await leaves nothing behind: tests that need a session of their own.

use std::time::{Duration, Instant};

use pglock::{Key, Lock, Mode, MultiLock, Semaphore, transaction};
use pglock_testkit::{TestDb, cancel_after, eventually};
use sqlx::PgPool;
use tokio::time::{sleep, timeout};

use crate::support::{
    SOON, ask, borrow_all, dropped_at, execute, locks_are, no_locks, unless_it_waits,
};

/// More polls than any call that does not wait can take.
pub(crate) const POLLS: usize = 60;

#[derive(Clone, Copy, Eq, PartialEq)]
enum State {
    /// The pool has no connection.
    Cold,
    /// All connections are idle, and fresh.
    Warm,
    /// All connections are idle, and a statement was prepared on each, so that the first acquire takes two statements.
    Used,
}

async fn prepare(pool: &PgPool, state: State) {
    if state == State::Used {
        let mut conns = Vec::new();
        for _ in 0..pool.options().get_max_connections() {
            let mut conn = pool.acquire().await.unwrap();
            sqlx::query("SELECT 1").execute(&mut *conn).await.unwrap();
            conns.push(conn);
        }
    }
    if state != State::Cold {
        borrow_all(pool).await;
    }
}

/// Runs `call` on a fresh pool and drops it after every number of polls until it completes, with a pool in each
/// [`State`]. After each run, only the `held` locks of others may be left.
#[expect(clippy::future_not_send, reason = "it runs where it is made")]
pub(crate) async fn dropped_at_every_poll_on(
    held: usize,
    db: &TestDb,
    call: impl AsyncFn(&PgPool),
) {
    dropped_at(1, async || sweep(held, db, &call).await).await;
}

/// Returns the number of points at which the call was dropped.
async fn sweep(held: usize, db: &TestDb, call: impl AsyncFn(&PgPool)) -> usize {
    let mut admin = db.admin().await;
    let mut dropped = 0;
    for state in [State::Cold, State::Warm, State::Used] {
        for polls in 1.. {
            assert!(polls < POLLS, "the call never completes");
            let pool = db.pool(2).await;
            prepare(&pool, state).await;
            let call = Box::pin(call(&pool));
            let outcome = unless_it_waits(held, db, cancel_after(polls, call)).await;

            locks_are(&mut admin, held, SOON * 4).await;
            borrow_all(&pool).await;
            // The call has completed, or was dropped while it waited.
            if !matches!(outcome, Some(None)) {
                break;
            }
            dropped += 1;
        }
    }
    dropped
}

/// Three keys, of which the one in the middle of their order is the busy one of these tests.
fn three(pool: &PgPool) -> MultiLock {
    let keys = [
        (Key::from(i64::MAX), Mode::Exclusive),
        (Key::from(i64::MIN), Mode::Exclusive),
        (Key::from("nightly-report"), Mode::Shared),
    ];
    MultiLock::with_modes(pool, keys)
}

async fn several_locks_dropped(held: usize, db: &TestDb) {
    let limit = Duration::from_millis(30);
    dropped_at_every_poll_on(held, db, async |pool| {
        let guard = three(pool).acquire().await.unwrap();
        guard.release().await.unwrap();
    })
    .await;
    dropped_at_every_poll_on(held, db, async |pool| {
        drop(three(pool).try_acquire().await.unwrap());
    })
    .await;
    dropped_at_every_poll_on(held, db, async |pool| {
        drop(three(pool).try_acquire_for(limit).await);
    })
    .await;
    dropped_at_every_poll_on(held, db, async |pool| {
        let mut locks = three(pool);
        let guard = locks.acquire().await.unwrap();
        locks.release_all().await.unwrap();
        guard.release().await.unwrap_err();
    })
    .await;
}

#[tokio::test]
async fn acquiring_several_free_locks() {
    several_locks_dropped(0, &TestDb::new().await).await;
}

#[tokio::test]
async fn acquiring_several_locks_of_which_one_is_busy() {
    let (db, pool) = TestDb::with_pool(1).await;
    let _held = Lock::new(&pool, "nightly-report").acquire().await.unwrap();
    several_locks_dropped(1, &db).await;
}

async fn another_lock_on_the_session_dropped(held: usize, db: &TestDb) {
    let limit = Duration::from_millis(30);
    dropped_at_every_poll_on(held, db, async |pool| {
        let guard = Lock::new(pool, 1).acquire().await.unwrap();
        drop(Lock::new(&guard, "nightly-report").acquire().await.unwrap());
    })
    .await;
    dropped_at_every_poll_on(held, db, async |pool| {
        let guard = Lock::new(pool, 1).acquire_shared().await.unwrap();
        let other = Lock::new(&guard, "nightly-report").try_acquire_for(limit).await.unwrap();
        guard.release().await.unwrap();
        drop(other);
    })
    .await;
}

#[tokio::test]
async fn acquiring_another_lock_on_the_session() {
    another_lock_on_the_session_dropped(0, &TestDb::new().await).await;
}

#[tokio::test]
async fn acquiring_another_lock_on_the_session_that_is_busy() {
    let (db, pool) = TestDb::with_pool(1).await;
    let _held = Lock::new(&pool, "nightly-report").acquire().await.unwrap();
    another_lock_on_the_session_dropped(1, &db).await;
}

/// Drops the calls of a semaphore of one permit, or of several, which send different statements.
async fn permits_dropped(held: usize, permits: usize, db: &TestDb) {
    let limit = Duration::from_millis(30);
    let semaphore = |pool: &PgPool| Semaphore::new(pool, "printers", permits).unwrap();
    dropped_at_every_poll_on(held, db, async |pool| {
        semaphore(pool).acquire().await.unwrap().release().await.unwrap();
    })
    .await;
    dropped_at_every_poll_on(held, db, async |pool| {
        drop(semaphore(pool).try_acquire().await.unwrap());
    })
    .await;
    dropped_at_every_poll_on(held, db, async |pool| {
        drop(semaphore(pool).try_acquire_for(limit).await);
    })
    .await;
}

#[tokio::test]
async fn acquiring_a_free_permit() {
    let db = TestDb::new().await;
    permits_dropped(0, 1, &db).await;
    permits_dropped(0, 3, &db).await;
}

#[tokio::test]
async fn acquiring_the_only_permit_when_it_is_not_free() {
    acquiring_when_none_is_free(1).await;
}

#[tokio::test]
async fn acquiring_a_permit_when_none_is_free() {
    acquiring_when_none_is_free(2).await;
}

async fn acquiring_when_none_is_free(permits: usize) {
    let (db, pool) = TestDb::with_pool(2).await;
    let semaphore = Semaphore::new(&pool, "printers", permits).unwrap();
    let mut held = Vec::new();
    for _ in 0..permits {
        held.push(semaphore.acquire().await.unwrap());
    }
    locks_are(&mut db.admin().await, permits, SOON * 10).await;
    permits_dropped(permits, permits, &db).await;
}

/// The dropped call waits in the process, behind another waiter that continues.
#[tokio::test]
async fn waiting_for_a_permit_behind_others() {
    let (_db, pool, mut admin) = TestDb::scene(2).await;
    let semaphore = Semaphore::new(&pool, "printers", 1).unwrap();
    let held = semaphore.acquire().await.unwrap();
    let mut first = Box::pin(semaphore.acquire());
    timeout(Duration::from_millis(200), &mut first).await.unwrap_err();
    for polls in 1..10 {
        assert!(
            cancel_after(polls, timeout(SOON / 50, semaphore.acquire()))
                .await
                .is_none_or(|waited| waited.is_err())
        );
    }
    held.release().await.unwrap();
    let permit = timeout(SOON * 10, first).await.unwrap().unwrap();
    let second = timeout(SOON * 10, async {
        permit.release().await.unwrap();
        semaphore.acquire().await.unwrap()
    });
    second.await.unwrap().release().await.unwrap();
    no_locks(&mut admin).await;
    borrow_all(&pool).await;
}

#[tokio::test]
async fn borrowing_and_using_the_connection() {
    let db = TestDb::new().await;
    dropped_at_every_poll_on(0, &db, async |pool| {
        let guard = Lock::new(pool, "nightly-report").acquire().await.unwrap();
        let mut conn = guard.connection().await.unwrap();
        sqlx::query("SELECT pg_sleep(0.001)").execute(&mut *conn).await.unwrap();
        drop(conn);
        let mut conn = guard.connection().await.unwrap();
        let mut transaction = sqlx::Connection::begin(&mut *conn).await.unwrap();
        sqlx::query("SELECT 1").execute(&mut *transaction).await.unwrap();
        transaction.commit().await.unwrap();
        drop(conn);
        guard.release().await.unwrap();
    })
    .await;
}

/// A wait for an upgrade must not release the lock that the handle already holds.
#[tokio::test]
async fn an_upgrade_that_is_dropped_keeps_the_shared_guard() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let pool = db.pool(3).await;
    let mut lock = Lock::new(&pool, "nightly-report");
    let mut other = lock.clone();
    let mine = lock.acquire_shared().await.unwrap();
    let theirs = other.acquire_shared().await.unwrap();

    for polls in 1.. {
        let outcome = unless_it_waits(2, &db, cancel_after(polls, Box::pin(lock.acquire()))).await;
        locks_are(&mut admin, 2, SOON * 4).await;
        // The session still answers, and holds the lock that it held.
        let mut conn = mine.connection().await.unwrap();
        let pid: i32 =
            sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(&mut *conn).await.unwrap();
        assert_eq!(pid, mine.backend_pid());
        if outcome.is_none() {
            break;
        }
    }
    theirs.release().await.unwrap();
    let upgraded = lock.acquire().await.unwrap();
    assert_eq!(upgraded.backend_pid(), mine.backend_pid());
    drop((mine, upgraded));
    no_locks(&mut admin).await;
    borrow_all(&pool).await;
}

/// A slice lasts a minute, so this test should begin early in a run. After a slice, a wait renews its snapshot, so that
/// vacuum can continue, and is still granted; a dropped wait frees its connection, though the holder still holds the
/// lock.
#[tokio::test]
async fn a_wait_of_a_transaction_leaves_the_queue_after_its_slice() {
    const SLICE: Duration = Duration::from_secs(62);

    let db = TestDb::new().await;
    let (mut admin, mut watcher) = (db.admin().await, db.admin().await);
    let (pool, other) = (db.pool(3).await, db.pool(1).await);
    let mut holder = other.begin().await.unwrap();
    transaction::acquire(&mut holder, "ledger").await.unwrap();
    let mut one = pool.begin().await.unwrap();
    let mut two = pool.begin().await.unwrap();
    for (locks, tx) in [(2, &mut one), (3, &mut two)] {
        tokio::select! {
            acquired = transaction::acquire(tx, "ledger") => panic!("{acquired:?}"),
            () = locks_are(&mut admin, locks, SOON * 20) => {}
        }
    }
    let mut tx = pool.begin().await.unwrap();
    let pid = ask(&mut tx, "pg_backend_pid()").await;
    let dropped = async {
        drop(one);
        timeout(SLICE, two.rollback()).await.unwrap().unwrap();
        eventually("the pool has them back", SLICE, || async { pool.num_idle() == 2 }).await;
    };

    let (acquired, (), ()) =
        tokio::join!(transaction::acquire(&mut tx, "ledger"), dropped, async {
            locks_are(&mut admin, 4, SOON * 20).await;
            let xmin = format!("SELECT backend_xmin FROM pg_stat_activity WHERE pid = {pid}");
            let first: u32 = ask(&mut admin, &xmin).await.parse().unwrap();
            let started = Instant::now();
            loop {
                // This transaction writes, so that the next snapshot differs.
                execute(&mut watcher, "CREATE TABLE t (); DROP TABLE t").await;
                let now = ask(&mut admin, &format!("coalesce(({xmin})::text, '')")).await;
                if now.parse::<u32>().is_ok_and(|now| now > first) {
                    break;
                }
                assert!(started.elapsed() < SLICE, "the snapshot is as old as the wait");
                sleep(SOON / 10).await;
            }
            locks_are(&mut admin, 2, SLICE).await;
            holder.commit().await.unwrap();
        });
    acquired.unwrap();
    tx.commit().await.unwrap();
    no_locks(&mut admin).await;
    borrow_all(&pool).await;
}
