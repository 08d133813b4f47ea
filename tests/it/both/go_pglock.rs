//! The checks of go-pglock's own tests, so that a service can move from go-pglock to this crate.
//!
//! Two services have two pools on one database; a third connection inspects the server.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use pglock::{Error, Loss};
use pglock_testkit::{Environment, TestDb};
use sqlx::{PgConnection, PgPool};
use tokio::sync::Barrier;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::{new_lock, sessions};
use crate::support::{TIMEOUT, locks_become};

/// The bound within which the server must show the effect of a call: less than a slice of a wait.
fn soon() -> Duration {
    Environment::current().limit(Duration::from_secs(3))
}
/// The timeout of a wait that is meant to time out, but not before the pool has returned a connection.
fn moment() -> Duration {
    Environment::current().limit(Duration::from_secs(1))
}

struct Scene {
    one: PgPool,
    two: PgPool,
    admin: PgConnection,
    db: TestDb,
}

impl Scene {
    async fn new() -> Self {
        let db = TestDb::new().await;
        Self { one: db.pool(10).await, two: db.pool(10).await, admin: db.admin().await, db }
    }

    /// Waits until the server shows these numbers of holders and waiters.
    async fn becomes(&mut self, holders: usize, waiters: usize) {
        let what = format!("{holders} holders and {waiters} waiters");
        locks_become(&mut self.admin, &what, soon() * 4, |locks| {
            let held = locks.iter().filter(|lock| lock.granted).count();
            (held, locks.len() - held) == (holders, waiters)
        })
        .await;
    }

    /// Whether the second service is granted the lock when it tries.
    async fn two_can_lock(&self, key: i64) -> bool {
        let granted = new_lock(&self.two, key).try_acquire().await.unwrap();
        match granted {
            Some(guard) => guard.release().await.is_ok(),
            None => false,
        }
    }

    /// Whether the second service is granted a shared lock when it tries.
    async fn two_can_share(&self, key: i64) -> bool {
        let granted = new_lock(&self.two, key).try_acquire_shared().await.unwrap();
        match granted {
            Some(guard) => guard.release().await.is_ok(),
            None => false,
        }
    }
}

/// A new lock takes no connection, holds nothing, and knows its key.
#[tokio::test]
async fn a_new_lock_holds_nothing() {
    let mut scene = Scene::new().await;
    let lock = new_lock(&scene.one, 10);
    assert_eq!(lock.key(), &10.into());
    assert_eq!(scene.one.num_idle(), scene.one.size() as usize);
    scene.becomes(0, 0).await;
}

/// An acquire that is cancelled before it starts holds nothing.
#[tokio::test]
async fn an_acquire_never_polled_holds_nothing() {
    let mut scene = Scene::new().await;
    let mut lock = new_lock(&scene.one, 10);
    drop(lock.acquire());
    drop(lock.try_acquire());
    drop(lock.acquire_shared());
    scene.becomes(0, 0).await;
    assert_eq!(scene.one.num_idle(), scene.one.size() as usize);
    assert!(scene.two_can_lock(10).await);
}

/// A wait whose time has passed before it starts is refused, and leaves no waiter behind.
#[tokio::test]
async fn an_expired_wait_for_a_busy_lock_holds_nothing() {
    let mut scene = Scene::new().await;
    let guard = new_lock(&scene.one, 10).acquire().await.unwrap();
    // Each call has a pool of its own, because there is no time to wait for a connection. On a busy machine, the pool
    // returns even an idle connection too late, or the server answers too late.
    let expired = new_lock(&scene.two, 10).try_acquire_for(Duration::ZERO).await;
    assert!(expired.map_or_else(|error| error.is_transient(), |granted| granted.is_none()));
    let mut other = new_lock(&scene.db.pool(1).await, 10);
    let expired = other.try_acquire_shared_for(Duration::ZERO).await;
    assert!(expired.map_or_else(|error| error.is_transient(), |granted| granted.is_none()));
    scene.becomes(1, 0).await;
    guard.release().await.unwrap();
    scene.becomes(0, 0).await;
}

#[tokio::test]
async fn what_is_acquired_is_excluded_until_released() {
    let mut scene = Scene::new().await;
    let guard = new_lock(&scene.one, 10).try_acquire().await.unwrap().unwrap();
    assert!(!scene.two_can_lock(10).await);
    guard.release().await.unwrap();
    assert!(scene.two_can_lock(10).await);
    scene.becomes(0, 0).await;
}

/// One handle can acquire and release repeatedly.
#[tokio::test]
async fn a_handle_is_reusable() {
    let scene = Scene::new().await;
    let mut lock = new_lock(&scene.one, 10);
    for _ in 0..5 {
        let guard = lock.acquire().await.unwrap();
        assert!(!scene.two_can_lock(10).await);
        guard.release().await.unwrap();
        assert!(scene.two_can_lock(10).await);
    }
}

/// A re-entrant lock is free after as many releases as acquires, and not before: each guard releases its own share.
#[tokio::test]
async fn stacking_needs_as_many_releases() {
    let mut scene = Scene::new().await;
    let mut lock = new_lock(&scene.one, 10);
    let mut guards = Vec::new();
    for _ in 0..3 {
        guards.push(lock.acquire().await.unwrap());
    }
    let pid = guards.first().unwrap().backend_pid();
    assert!(guards.iter().all(|guard| guard.backend_pid() == pid));
    for guard in guards {
        assert!(!scene.two_can_lock(10).await);
        guard.release().await.unwrap();
    }
    assert!(scene.two_can_lock(10).await);
    scene.becomes(0, 0).await;
}

/// A blocked acquire continues when the lock is released.
#[tokio::test]
async fn acquire_waits_for_the_release() {
    let mut scene = Scene::new().await;
    let guard = new_lock(&scene.one, 10).acquire().await.unwrap();
    let mut other = new_lock(&scene.two, 10);

    let (acquired, ()) = tokio::join!(timeout(TIMEOUT, other.acquire()), async {
        scene.becomes(1, 1).await;
        guard.release().await.unwrap();
    });
    let acquired = acquired.unwrap().unwrap();
    scene.becomes(1, 0).await;
    acquired.release().await.unwrap();
    scene.becomes(0, 0).await;
}

/// A deadline ends a wait; the waiter leaves the queue, and the holder keeps the lock.
#[tokio::test]
async fn a_deadline_ends_the_wait() {
    let mut scene = Scene::new().await;
    let guard = new_lock(&scene.one, 10).acquire().await.unwrap();
    let mut other = new_lock(&scene.two, 10);

    assert!(other.try_acquire_for(moment()).await.unwrap().is_none());
    assert!(timeout(moment(), other.acquire()).await.is_err());
    scene.becomes(1, 0).await;
    guard.release().await.unwrap();
    other.acquire().await.unwrap().release().await.unwrap();
}

/// Ten workers of two services exclude each other, and each has its turn.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_workers_exclude_each_other_and_all_finish() {
    let mut scene = Scene::new().await;
    let inside = Arc::new(AtomicUsize::new(0));
    let mut workers = JoinSet::new();
    for worker in 0..10 {
        let pool = if worker % 2 == 0 { &scene.one } else { &scene.two };
        let mut lock = new_lock(pool, 10);
        let inside = Arc::clone(&inside);
        workers.spawn(async move {
            for _ in 0..3 {
                let guard = lock.acquire().await.unwrap();
                assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0, "another holder is inside");
                // This gives other workers the time to enter, if they could.
                sleep(Duration::from_millis(2)).await;
                inside.fetch_sub(1, Ordering::SeqCst);
                guard.release().await.unwrap();
            }
        });
    }
    assert_eq!(timeout(TIMEOUT, workers.join_all()).await.unwrap().len(), 10);
    scene.becomes(0, 0).await;
}

/// Closing the handle releases all that it holds, however many guards are alive.
#[tokio::test]
async fn close_releases_everything() {
    let mut scene = Scene::new().await;
    let mut lock = new_lock(&scene.one, 10);
    let first = lock.acquire().await.unwrap();
    let second = lock.acquire().await.unwrap();
    let shared = lock.acquire_shared().await.unwrap();
    assert!(!scene.two_can_share(10).await);

    lock.release_all().await.unwrap();
    assert!(scene.two_can_lock(10).await);
    scene.becomes(0, 0).await;

    // Now the other service holds the lock, and no earlier guard can release it.
    let other = new_lock(&scene.two, 10).acquire().await.unwrap();
    drop(shared);
    for guard in [first, second] {
        let lost = guard.release().await.unwrap_err();
        assert!(matches!(lost, Error::Lost { reason: Loss::Released, .. }), "{lost:?}");
    }
    scene.becomes(1, 0).await;
    other.release().await.unwrap();

    // The handle itself can be used again.
    lock.acquire().await.unwrap().release().await.unwrap();
    lock.release_all().await.unwrap();
}

#[tokio::test]
async fn different_ids_are_independent() {
    let mut scene = Scene::new().await;
    let ten = new_lock(&scene.one, 10).acquire().await.unwrap();
    let eleven = new_lock(&scene.two, 11).acquire().await.unwrap();
    scene.becomes(2, 0).await;
    ten.release().await.unwrap();
    assert!(scene.two_can_lock(10).await);
    assert!(!scene.two_can_lock(11).await);
    eleven.release().await.unwrap();
}

/// One task can hold several locks, and releases each one separately.
#[tokio::test]
async fn locks_held_by_one_task_add_up() {
    let mut scene = Scene::new().await;
    let mut guards = Vec::new();
    for key in 1..=5_i64 {
        guards.push((key, new_lock(&scene.one, key).acquire().await.unwrap()));
        scene.becomes(guards.len(), 0).await;
    }
    while let Some((key, guard)) = guards.pop() {
        assert!(!scene.two_can_lock(key).await);
        guard.release().await.unwrap();
        assert!(scene.two_can_lock(key).await);
        scene.becomes(guards.len(), 0).await;
    }
}

#[tokio::test]
async fn three_can_share() {
    let mut scene = Scene::new().await;
    let first = new_lock(&scene.one, 10).acquire_shared().await.unwrap();
    let second = new_lock(&scene.one, 10).try_acquire_shared().await.unwrap().unwrap();
    let third = new_lock(&scene.two, 10).try_acquire_shared_for(TIMEOUT).await.unwrap().unwrap();
    scene.becomes(sessions(3, 2), 0).await;
    for guard in [first, second, third] {
        assert!(!scene.two_can_lock(10).await);
        guard.release().await.unwrap();
    }
    assert!(scene.two_can_lock(10).await);
}

#[tokio::test]
async fn exclusive_blocks_shared() {
    let mut scene = Scene::new().await;
    let exclusive = new_lock(&scene.one, 10).acquire().await.unwrap();
    let mut reader = new_lock(&scene.two, 10);
    assert!(reader.try_acquire_shared().await.unwrap().is_none());
    assert!(reader.try_acquire_shared_for(moment()).await.unwrap().is_none());

    let (shared, ()) = tokio::join!(timeout(TIMEOUT, reader.acquire_shared()), async {
        scene.becomes(1, 1).await;
        exclusive.release().await.unwrap();
    });
    shared.unwrap().unwrap().release().await.unwrap();
}

#[tokio::test]
async fn shared_blocks_exclusive() {
    let mut scene = Scene::new().await;
    let shared = new_lock(&scene.one, 10).acquire_shared().await.unwrap();
    let mut writer = new_lock(&scene.two, 10);
    assert!(writer.try_acquire().await.unwrap().is_none());
    assert!(writer.try_acquire_for(moment()).await.unwrap().is_none());

    let (exclusive, ()) = tokio::join!(timeout(TIMEOUT, writer.acquire()), async {
        scene.becomes(1, 1).await;
        shared.release().await.unwrap();
    });
    exclusive.unwrap().unwrap().release().await.unwrap();
}

/// Readers of two services that wait for a writer are all granted the lock when the writer releases it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_wait_for_the_writer_and_then_all_share() {
    let mut scene = Scene::new().await;
    let exclusive = new_lock(&scene.one, 10).acquire().await.unwrap();
    let mut readers = JoinSet::new();
    for reader in 0..10 {
        let pool = if reader % 2 == 0 { &scene.one } else { &scene.two };
        let mut lock = new_lock(pool, 10);
        readers.spawn(async move { lock.acquire_shared().await.unwrap() });
    }
    // One reader of each pool waits on the server: the others are in line behind it.
    scene.becomes(1, sessions(2, 1)).await;
    exclusive.release().await.unwrap();

    let shared = timeout(TIMEOUT, readers.join_all()).await.unwrap();
    scene.becomes(sessions(10, 2), 0).await;
    assert!(!scene.two_can_lock(10).await);
    drop(shared);
    scene.becomes(0, 0).await;
}

/// A reader's wait that is cancelled leaves no waiter behind.
#[tokio::test]
async fn a_shared_wait_can_be_cancelled() {
    let mut scene = Scene::new().await;
    let exclusive = new_lock(&scene.one, 10).acquire().await.unwrap();
    let mut reader = new_lock(&scene.two, 10);
    tokio::select! {
        _ = reader.acquire_shared() => panic!("the lock is held exclusively"),
        () = scene.becomes(1, 1) => {}
    }
    scene.becomes(1, 0).await;
    exclusive.release().await.unwrap();
    scene.becomes(0, 0).await;
    reader.acquire_shared().await.unwrap().release().await.unwrap();
}

#[tokio::test]
async fn a_shared_release_lets_the_writer_in() {
    let mut scene = Scene::new().await;
    let shared = new_lock(&scene.one, 10).acquire_shared().await.unwrap();
    assert!(scene.two_can_share(10).await);
    assert!(!scene.two_can_lock(10).await);
    shared.release().await.unwrap();
    assert!(scene.two_can_lock(10).await);
    scene.becomes(0, 0).await;
}

#[tokio::test]
async fn shared_stacking_needs_as_many_releases() {
    let mut scene = Scene::new().await;
    let mut lock = new_lock(&scene.one, 10);
    let mut guards = Vec::new();
    for _ in 0..3 {
        guards.push(lock.acquire_shared().await.unwrap());
    }
    for guard in guards {
        assert!(!scene.two_can_lock(10).await);
        assert!(scene.two_can_share(10).await);
        guard.release().await.unwrap();
    }
    assert!(scene.two_can_lock(10).await);
    scene.becomes(0, 0).await;
}

/// Readers and writers of two services mix: a writer excludes all others, and readers exclude writers.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reads_and_writes_mix() {
    const WRITER: usize = 1000;

    let mut scene = Scene::new().await;
    let inside = Arc::new(AtomicUsize::new(0));
    let mut workers = JoinSet::new();
    for worker in 0..12 {
        let pool = if worker % 2 == 0 { &scene.one } else { &scene.two };
        let mut lock = new_lock(pool, 10);
        let inside = Arc::clone(&inside);
        workers.spawn(async move {
            for round in 0..4 {
                if (worker + round) % 3 == 0 {
                    let guard = lock.acquire().await.unwrap();
                    assert_eq!(inside.fetch_add(WRITER, Ordering::SeqCst), 0);
                    sleep(Duration::from_millis(1)).await;
                    inside.fetch_sub(WRITER, Ordering::SeqCst);
                    guard.release().await.unwrap();
                } else {
                    let guard = lock.acquire_shared().await.unwrap();
                    assert!(inside.fetch_add(1, Ordering::SeqCst) < WRITER);
                    sleep(Duration::from_millis(1)).await;
                    inside.fetch_sub(1, Ordering::SeqCst);
                    drop(guard);
                }
            }
        });
    }
    let limit = Environment::current().limit(TIMEOUT);
    assert_eq!(timeout(limit, workers.join_all()).await.unwrap().len(), 12);
    scene.becomes(0, 0).await;
}

/// Readers hold the lock at the same time: none releases it before all have it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_are_parallel() {
    let scene = Scene::new().await;
    let all_are_in = Arc::new(Barrier::new(10));
    let mut readers = JoinSet::new();
    for reader in 0..10 {
        let pool = if reader % 2 == 0 { &scene.one } else { &scene.two };
        let mut lock = new_lock(pool, 10);
        let all_are_in = Arc::clone(&all_are_in);
        readers.spawn(async move {
            let guard = lock.acquire_shared().await.unwrap();
            all_are_in.wait().await;
            guard.release().await.unwrap();
        });
    }
    assert_eq!(timeout(TIMEOUT, readers.join_all()).await.unwrap().len(), 10);
    assert!(scene.two_can_lock(10).await);
}
