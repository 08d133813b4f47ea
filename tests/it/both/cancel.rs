//! A future dropped at any await leaves nothing behind.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use pglock::Lock;
use pglock_testkit::{TestDb, amount, cancel_after};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::new_lock;
use crate::cancel::{POLLS, dropped_at_every_poll_on};
use crate::support::{borrow_all, locks_are, no_locks, refused, rounds, soon, terminate, upgraded};

/// Drops a call on a fresh handle after every number of polls.
#[expect(clippy::future_not_send, reason = "it runs where it is made")]
async fn dropped_at_every_poll(held: usize, db: &TestDb, call: impl AsyncFn(&mut Lock)) {
    dropped_at_every_poll_on(held, db, async |pool| {
        call(&mut new_lock(pool, "nightly-report")).await;
    })
    .await;
}

/// Drops each of the six ways to acquire after every number of polls.
async fn every_acquire_dropped(held: usize, db: &TestDb) {
    let limit = Duration::from_millis(30);
    dropped_at_every_poll(held, db, async |lock| drop(lock.acquire().await)).await;
    dropped_at_every_poll(held, db, async |lock| drop(lock.try_acquire().await)).await;
    dropped_at_every_poll(held, db, async |lock| drop(lock.try_acquire_for(limit).await)).await;
    dropped_at_every_poll(held, db, async |lock| drop(lock.acquire_shared().await)).await;
    dropped_at_every_poll(held, db, async |lock| drop(lock.try_acquire_shared().await)).await;
    dropped_at_every_poll(held, db, async |lock| {
        drop(lock.try_acquire_shared_for(limit).await);
    })
    .await;
}

#[tokio::test]
async fn acquiring_a_free_lock() {
    every_acquire_dropped(0, &TestDb::new().await).await;
}

#[tokio::test]
async fn acquiring_a_busy_lock() {
    let (db, pool) = TestDb::with_pool(1).await;
    let _held = new_lock(&pool, "nightly-report").acquire().await.unwrap();
    every_acquire_dropped(1, &db).await;
}

#[tokio::test]
async fn acquiring_when_the_pool_has_only_dead_connections() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    for polls in 1.. {
        assert!(polls < POLLS);
        let pool = db.pool(2).await;
        for pid in borrow_all(&pool).await {
            terminate(&mut admin, pid).await;
        }
        let mut lock = new_lock(&pool, "nightly-report");
        let outcome = cancel_after(polls, async { drop(lock.acquire().await.unwrap()) }).await;
        no_locks(&mut admin).await;
        borrow_all(&pool).await;
        if outcome.is_some() {
            break;
        }
    }
}

#[tokio::test]
async fn releasing() {
    let db = TestDb::new().await;
    dropped_at_every_poll(0, &db, async |lock| {
        lock.acquire().await.unwrap().release().await.unwrap();
    })
    .await;

    // If the call to `release` itself is dropped, the lock is still released, and the connection is kept.
    let pool = db.pool(1).await;
    let mut admin = db.admin().await;
    let mut lock = new_lock(&pool, "nightly-report");
    for polls in 1..5 {
        let guard = lock.acquire().await.unwrap();
        let pid = guard.backend_pid();
        drop(cancel_after(polls, guard.release()).await);
        no_locks(&mut admin).await;
        assert_eq!(borrow_all(&pool).await, [pid]);
    }
}

#[tokio::test]
async fn a_release_that_was_never_polled() {
    let (db, pool) = TestDb::with_pool(1).await;
    let guard = new_lock(&pool, 1).acquire().await.unwrap();
    drop(guard.release());
    no_locks(&mut db.admin().await).await;
    borrow_all(&pool).await;
}

#[tokio::test]
async fn closing() {
    let (_db, pool, mut admin) = TestDb::scene(1).await;
    let mut lock = new_lock(&pool, "nightly-report");
    for polls in 1..5 {
        let guard = lock.acquire().await.unwrap();
        drop(cancel_after(polls, lock.release_all()).await);
        no_locks(&mut admin).await;
        borrow_all(&pool).await;
        guard.release().await.unwrap_err();
    }
}

#[tokio::test]
async fn downgrading_and_upgrading() {
    let db = TestDb::new().await;
    dropped_at_every_poll(0, &db, async |lock| {
        let writing = lock.acquire().await.unwrap();
        let reading = writing.downgrade().await.unwrap();
        let writing = upgraded(reading.try_upgrade().await.unwrap());
        let also_writing = lock.acquire().await.unwrap();
        drop(writing.downgrade().await.unwrap());
        also_writing.downgrade().await.unwrap().release().await.unwrap();
    })
    .await;

    let pool = db.pool(1).await;
    let _also_reading = new_lock(&pool, "nightly-report").acquire_shared().await.unwrap();
    dropped_at_every_poll(1, &db, async |lock| {
        let reading = lock.acquire_shared().await.unwrap();
        refused(reading.try_upgrade().await.unwrap()).release().await.unwrap();
    })
    .await;
}

/// The guard is dropped while an upgrade on the same handle waits, and then the wait is dropped too.
#[tokio::test]
async fn an_upgrade_that_outlives_its_guard_and_is_dropped() {
    let (_db, pool, mut admin) = TestDb::scene(3).await;
    let mut lock = new_lock(&pool, "nightly-report");
    let mine = lock.acquire_shared().await.unwrap();
    let theirs = lock.clone().acquire_shared().await.unwrap();

    let mut upgrade = Box::pin(lock.acquire());
    timeout(Duration::from_millis(50), &mut upgrade).await.unwrap_err();
    drop(mine);
    drop(upgrade);
    drop(theirs);
    no_locks(&mut admin).await;
    borrow_all(&pool).await;

    // If the upgrade is not dropped, it is granted, and its guard is then the only holder.
    let mine = lock.acquire_shared().await.unwrap();
    let theirs = lock.clone().acquire_shared().await.unwrap();
    let mut upgrade = Box::pin(lock.acquire());
    timeout(Duration::from_millis(50), &mut upgrade).await.unwrap_err();
    drop((mine, theirs));
    let upgraded = timeout(soon() * 10, upgrade).await.unwrap().unwrap();
    upgraded.release().await.unwrap();
    no_locks(&mut admin).await;
    borrow_all(&pool).await;
}

/// sqlx's own `PgAdvisoryLock` fails this test: after ten cancelled acquires, its pool of ten connections is exhausted
/// until the holder releases the lock.
#[tokio::test]
async fn a_hundred_timeouts_leave_the_pool_to_its_other_users() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let holder_pool = db.pool(1).await;
    let held = new_lock(&holder_pool, "nightly-report").acquire().await.unwrap();

    let pool = db.pool(10).await;
    let mut waits = JoinSet::new();
    for _ in 0..rounds(100) {
        let mut lock = new_lock(&pool, "nightly-report");
        waits.spawn(async move {
            timeout(Duration::from_millis(20), lock.acquire()).await.unwrap_err();
        });
    }
    while let Some(finished) = waits.join_next().await {
        finished.unwrap();
    }
    let query = sqlx::query("SELECT 1").execute(&pool);
    timeout(soon() * 10, query).await.unwrap().unwrap();
    locks_are(&mut admin, 1, soon() * 4).await;
    borrow_all(&pool).await;
    held.release().await.unwrap();
}

/// 10,000 acquires are dropped at random points, while 20 contenders complete theirs; no lock is left.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storm_of_dropped_acquires_leaves_nothing() {
    const CONTENDERS: usize = 20;
    const DROPPERS: usize = 12;

    let enough = rounds(amount(4_000, 10_000));
    // The test has a server of its own, because it also opens many connections: sqlx closes those that it was about to
    // return to a caller that timed out.
    let (_server, db) = TestDb::with_server().await;
    let mut admin = db.admin().await;
    let pool = db.pool(u32::try_from(CONTENDERS + DROPPERS).unwrap()).await;
    borrow_all(&pool).await;
    let stop = Arc::new(AtomicBool::new(false));
    let inside = Arc::new(AtomicBool::new(false));
    let cut_off = Arc::new(AtomicUsize::new(0));

    let mut contenders = JoinSet::new();
    for _ in 0..CONTENDERS {
        let mut lock = new_lock(&pool, "nightly-report");
        let (stop, inside) = (Arc::clone(&stop), Arc::clone(&inside));
        contenders.spawn(async move {
            let mut left = 10;
            while left > 0 || !stop.load(Ordering::Relaxed) {
                let guard = match lock.acquire().await {
                    Ok(guard) => guard,
                    Err(error) => {
                        assert!(error.is_transient(), "{error:?}");
                        continue;
                    }
                };
                assert!(!inside.swap(true, Ordering::SeqCst), "two exclusive holders");
                tokio::task::yield_now().await;
                assert!(inside.swap(false, Ordering::SeqCst));
                left = i32::max(left - 1, 0);
                guard.release().await.unwrap();
            }
        });
    }
    let mut droppers = JoinSet::new();
    for seed in 0..DROPPERS as u64 {
        let mut lock = new_lock(&pool, "nightly-report");
        let cut_off = Arc::clone(&cut_off);
        droppers.spawn(async move {
            let mut random = seed + 1;
            while cut_off.load(Ordering::Relaxed) < enough {
                // xorshift64
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                let polls = usize::try_from(random % 12).unwrap() + 1;
                let wait = Duration::from_micros(random / 16 % 5_000);
                let outcome = timeout(wait, cancel_after(polls, lock.acquire())).await;
                if !matches!(outcome, Ok(Some(_))) {
                    cut_off.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
    }
    while let Some(finished) = droppers.join_next().await {
        finished.unwrap();
    }
    stop.store(true, Ordering::Relaxed);
    while let Some(finished) = contenders.join_next().await {
        finished.unwrap();
    }
    no_locks(&mut admin).await;
    borrow_all(&pool).await;
}
