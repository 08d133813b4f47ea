//! Futures that run under a lock: `run`, `try_run_for` and `try_run`.

use std::future::pending;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pglock::{Error, Lock, LockManager};
use pglock_testkit::{TestDb, advisory_locks};
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};

use crate::support::{TIMEOUT, locks_are, no_locks, terminate, waits_in_vain};

const KEY: &str = "nightly-report";

/// Sets a flag when it is dropped.
struct Flag<'f>(&'f AtomicBool);

impl Drop for Flag<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// A second acquire through the handle would be re-entrant; these calls are not.
#[tokio::test]
async fn calls_through_one_handle_exclude_each_other() {
    let (db, pool) = TestDb::with_pool(2).await;
    let manager = LockManager::new(&pool);
    let handles = [Lock::new(&pool, KEY), Lock::new(&manager, KEY)];
    for lock in handles {
        let inside = AtomicBool::new(false);
        let work = async || {
            assert!(!inside.swap(true, Ordering::SeqCst), "two are inside");
            sleep(Duration::from_millis(50)).await;
            assert!(inside.swap(false, Ordering::SeqCst));
            1
        };
        let both = async { tokio::join!(lock.run(work()), lock.run(work())) };
        let (one, other) = timeout(TIMEOUT, both).await.unwrap();
        assert_eq!(one.unwrap() + other.unwrap(), 2);
    }
    no_locks(&mut db.admin().await).await;
}

#[tokio::test]
async fn a_future_is_not_polled_while_another_session_holds_the_lock() {
    let db = TestDb::new().await;
    let (pool, elsewhere) = (db.pool(1).await, db.pool(1).await);
    let held = Lock::new(&elsewhere, KEY).acquire().await.unwrap();
    let lock = Lock::new(&pool, KEY);
    let ran = AtomicBool::new(false);
    let work = async || ran.store(true, Ordering::SeqCst);
    assert_eq!(lock.try_run(work()).await.unwrap(), None);
    let moment = Duration::from_millis(100);
    waits_in_vain(moment, async |time| lock.try_run_for(time, work()).await).await;
    assert!(!ran.load(Ordering::SeqCst));

    let waiting = async { tokio::join!(lock.try_run_for(TIMEOUT, work()), held.release()) };
    let (done, released) = waiting.await;
    released.unwrap();
    assert_eq!(done.unwrap(), Some(()));
    assert!(ran.load(Ordering::SeqCst));
    no_locks(&mut db.admin().await).await;
}

#[tokio::test]
async fn a_loss_drops_the_future_before_it_is_returned() {
    let (_db, pool, mut admin) = TestDb::scene(1).await;
    let dropped = AtomicBool::new(false);
    let lock = Lock::new(&pool, KEY);
    // If the connection broke before the answer to the acquire, the acquire would retry on another one.
    let (ready, begun) = oneshot::channel();
    let run = lock.run(async {
        let _flag = Flag(&dropped);
        ready.send(()).unwrap();
        pending::<()>().await;
    });
    let end = async {
        begun.await.unwrap();
        let locks = advisory_locks(&mut admin).await;
        terminate(&mut admin, locks.first().unwrap().pid).await;
    };
    let (lost, ()) = timeout(TIMEOUT, async { tokio::join!(run, end) }).await.unwrap();
    assert!(matches!(lost, Err(Error::Lost { .. })), "{lost:?}");
    assert!(dropped.load(Ordering::SeqCst));
}

/// The result of the future is worthless if another session may have held the lock meanwhile.
#[tokio::test]
async fn a_lock_that_other_code_unlocked_is_an_error_although_the_future_has_ended() {
    let (db, pool) = TestDb::with_pool(2).await;
    let guard = Lock::new(&pool, "outer").acquire().await.unwrap();
    let inner = Lock::new(&pool, KEY);
    let mut admin = db.admin().await;
    let work = async {
        let locks = advisory_locks(&mut admin).await;
        let pid = locks.iter().map(|lock| lock.pid).find(|pid| *pid != guard.backend_pid());
        terminate(&mut admin, pid.unwrap()).await;
        locks_are(&mut admin, 1, TIMEOUT).await;
        "done"
    };
    let lost = timeout(TIMEOUT, inner.run(work)).await.unwrap();
    assert!(matches!(lost, Err(Error::Lost { .. })), "{lost:?}");
    guard.release().await.unwrap();
}
