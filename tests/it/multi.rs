//! Several locks are held all at once or not at all, and never deadlock.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use pglock::{Error, Key, Lock, Loss, Mode, MultiGuard, MultiLock};
use pglock_testkit::{AdvisoryLock, Server, TestDb, advisory_locks, amount, eventually};
use sqlx::{PgConnection, PgPool};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::support::{
    SOON, borrow_all, coin, locks_are, locks_become, no_locks, random, report, spawn, terminate,
    waits_in_vain,
};

/// A handle on these numbers, exclusively.
fn exclusive(pool: &PgPool, keys: &[i64]) -> MultiLock {
    MultiLock::new(pool, keys.iter().copied())
}

/// A handle on 1 and 3, exclusively, and 2, shared.
fn shares_the_second(pool: &PgPool) -> MultiLock {
    let keys = [(1, Mode::Exclusive), (3, Mode::Exclusive), (2, Mode::Shared)];
    MultiLock::with_modes(pool, keys)
}

/// The number that a row of `pg_locks` is about, and whether it is held.
fn number(lock: &AdvisoryLock) -> (i64, bool) {
    (lock.classid << 32 | lock.objid, lock.granted)
}

/// Waits until the server shows exactly these numbers, held or waited for.
async fn becomes(admin: &mut PgConnection, expected: &[(i64, bool)]) {
    locks_become(admin, &format!("{expected:?}"), SOON * 10, |locks| {
        locks.iter().map(number).eq(expected.iter().copied())
    })
    .await;
}

#[tokio::test]
async fn any_number_of_keys_of_any_kind_is_held_by_one_session() {
    let (_db, pool, mut admin) = TestDb::scene(1).await;
    // A server's `SELECT` has 1664 columns at most.
    for count in [1, 2, 200, 2000] {
        let keys = (0..count).map(|number| match number % 4 {
            0 => (Key::from(number), Mode::Exclusive),
            1 => (Key::from((number, -number)), Mode::Shared),
            2 => (Key::from((number, number)), Mode::Exclusive),
            _ => (Key::from(format!("key {number}")), Mode::Shared),
        });
        let mut locks = MultiLock::with_modes(&pool, keys);
        let guard = locks.acquire().await.unwrap();
        let held = advisory_locks(&mut admin).await;
        assert_eq!(held.len(), usize::try_from(count).unwrap());
        assert!(held.iter().all(|lock| lock.granted && lock.pid == guard.backend_pid()));
        let modes = |mode| guard.keys().filter(|(_, held)| *held == mode).count();
        let rows = |mode| held.iter().filter(|lock| lock.mode == mode).count();
        assert_eq!(modes(Mode::Exclusive), rows("ExclusiveLock"));
        assert_eq!(modes(Mode::Shared), rows("ShareLock"));
        assert_eq!(guard.keys().count(), held.len());

        let pid = guard.backend_pid();
        guard.release().await.unwrap();
        no_locks(&mut admin).await;
        assert_eq!(borrow_all(&pool).await, [pid], "the connection was not kept");
    }
}

#[tokio::test]
async fn keys_are_acquired_in_one_order_and_once_each() {
    let pool = TestDb::new().await.pool(1).await;
    let key = |text: &str| Key::from(text);
    let keys = [
        (Key::from(1), Mode::Exclusive),
        (key("a"), Mode::Shared),
        (Key::from((2, 3)), Mode::Shared),
        (Key::from((-1, 7)), Mode::Exclusive),
        (Key::from(1), Mode::Shared),
        (Key::from(-5), Mode::Shared),
        (key("a"), Mode::Exclusive),
    ];
    let forwards = MultiLock::with_modes(&pool, keys.clone());
    let backwards = MultiLock::with_modes(&pool, keys.into_iter().rev());
    let sorted = |locks: &MultiLock| -> Vec<_> {
        locks.keys().map(|(key, mode)| (key.clone(), mode)).collect()
    };
    assert_eq!(sorted(&forwards), sorted(&backwards));
    assert_eq!(forwards.keys().count(), 5);
    let exclusively: BTreeSet<_> = forwards
        .keys()
        .filter(|(_, mode)| *mode == Mode::Exclusive)
        .map(|(key, _)| key.to_string())
        .collect();
    let expected = [Key::from(1), key("a"), Key::from((-1, 7))].map(|key| key.to_string());
    assert_eq!(exclusively, BTreeSet::from(expected));
    let again = MultiLock::with_modes(&pool, forwards.keys());
    assert_eq!(sorted(&again), sorted(&forwards));
}

/// With a million keys, searching for each among the others would take hours.
#[tokio::test]
async fn a_handle_is_built_in_the_time_of_one_sort() {
    const KEYS: i64 = 1_000_000;
    let pool = TestDb::new().await.pool(1).await;
    let started = Instant::now();
    let locks = MultiLock::new(&pool, (0..KEYS).map(|key| key * 7919 % KEYS));
    report(format_args!("a handle on {KEYS} keys made in {:?}", started.elapsed()));
    assert_eq!(locks.keys().count(), usize::try_from(KEYS).unwrap());
    assert!(started.elapsed() < SOON * 120, "{:?}", started.elapsed());
}

#[tokio::test]
async fn no_keys_are_an_error() {
    let db = TestDb::new().await;
    let mut none = MultiLock::new(&db.pool(1).await, Vec::<String>::new());
    assert_eq!(none.keys().count(), 0);
    assert!(matches!(none.acquire().await, Err(Error::InvalidArgument { .. })));
    assert!(matches!(none.try_acquire().await, Err(Error::InvalidArgument { .. })));
    none.release_all().await.unwrap();
}

#[tokio::test]
async fn what_is_refused_half_way_holds_nothing() {
    let (_db, pool, mut admin) = TestDb::scene(2).await;
    for busy in [1, 2, 3] {
        let held = Lock::new(&pool, busy).acquire().await.unwrap();
        let mut locks = shares_the_second(&pool);
        assert!(locks.try_acquire().await.unwrap().is_none());
        becomes(&mut admin, &[(busy, true)]).await;
        waits_in_vain(SOON / 20, async |time| locks.try_acquire_for(time).await).await;
        becomes(&mut admin, &[(busy, true)]).await;
        held.release().await.unwrap();
        locks.try_acquire().await.unwrap().unwrap().release().await.unwrap();
    }
    no_locks(&mut admin).await;
    borrow_all(&pool).await;
}

#[tokio::test]
async fn many_keys_of_which_the_last_is_busy_are_released() {
    let (_db, pool, mut admin) = TestDb::scene(2).await;
    let held = Lock::new(&pool, 3999).acquire().await.unwrap();
    let mut locks = MultiLock::new(&pool, 0..4000);
    let started = Instant::now();
    assert!(locks.try_acquire().await.unwrap().is_none());
    report(format_args!("refused and released after {:?}", started.elapsed()));
    becomes(&mut admin, &[(3999, true)]).await;
    held.release().await.unwrap();
    no_locks(&mut admin).await;
    borrow_all(&pool).await;
}

#[tokio::test]
async fn what_fails_half_way_holds_nothing() {
    let (_db, pool, mut admin) = TestDb::scene(3).await;
    let held = Lock::new(&pool, 2).acquire().await.unwrap();
    for strike in ["pg_terminate_backend", "pg_cancel_backend"] {
        let mut locks = exclusive(&pool, &[3, 2, 1]);
        let waiting = spawn(async move { locks.acquire().await });
        becomes(&mut admin, &[(1, true), (2, true), (2, false)]).await;
        let waiters = advisory_locks(&mut admin).await;
        let waiter = waiters.iter().find(|lock| !lock.granted).unwrap().pid;
        let strike = sqlx::AssertSqlSafe(format!("SELECT {strike}({waiter})"));
        sqlx::raw_sql(strike).execute(&mut admin).await.unwrap();
        let error = timeout(SOON * 10, waiting).await.unwrap().unwrap().unwrap_err();
        assert!(matches!(error, Error::Disconnected { .. } | Error::Cancelled { .. }), "{error:?}");
        becomes(&mut admin, &[(2, true)]).await;
    }
    held.release().await.unwrap();
    no_locks(&mut admin).await;
    borrow_all(&pool).await;
}

#[tokio::test]
async fn more_than_the_lock_table_takes_is_an_error_that_holds_nothing() {
    let server = Server::options()
        .setting("max_connections", "10")
        .setting("max_locks_per_transaction", "10")
        .start();
    let db = TestDb::on(&server).await;
    let mut admin = db.admin().await;
    let pool = db.pool(1).await;
    let room: Vec<_> = (0..50).collect();
    let too_many: Vec<_> = (0..5000).collect();
    for _ in 0..2 {
        let error = exclusive(&pool, &too_many).acquire().await.unwrap_err();
        assert!(matches!(error, Error::OutOfLocks { .. }), "{error:?}");
        no_locks(&mut admin).await;
        exclusive(&pool, &room).acquire().await.unwrap().release().await.unwrap();
    }
    borrow_all(&pool).await;
}

#[tokio::test]
async fn a_bounded_wait_has_one_bound_for_all_keys() {
    const TIMEOUT: Duration = Duration::from_secs(6);
    let (_db, pool, mut admin) = TestDb::scene(4).await;
    let first = Lock::new(&pool, 1).acquire().await.unwrap();
    let second = Lock::new(&pool, 2).acquire().await.unwrap();
    let third = Lock::new(&pool, 3).acquire().await.unwrap();
    let mut locks = exclusive(&pool, &[1, 2, 3]);
    let started = Instant::now();
    let (refused, ()) = tokio::join!(timeout(SOON * 20, locks.try_acquire_for(TIMEOUT)), async {
        sleep(TIMEOUT / 2).await;
        first.release().await.unwrap();
        sleep(TIMEOUT / 3).await;
        second.release().await.unwrap();
    });
    let waited = started.elapsed();
    assert!(refused.unwrap().unwrap().is_none());
    // If each key had the full timeout, the wait would take 11 s.
    assert!(waited >= TIMEOUT && waited < TIMEOUT * 7 / 4, "{waited:?}");
    becomes(&mut admin, &[(3, true)]).await;
    third.release().await.unwrap();
}

#[tokio::test]
async fn one_key_after_another_is_waited_for() {
    let (_db, pool, mut admin) = TestDb::scene(4).await;
    let second = Lock::new(&pool, 2).acquire().await.unwrap();
    let fourth = Lock::new(&pool, 4).acquire_shared().await.unwrap();
    let mut locks = exclusive(&pool, &[4, 3, 2, 1]);
    let waiting = spawn(async move { locks.acquire().await.unwrap() });
    // The acquire takes the free locks before the busy one, and none after it.
    becomes(&mut admin, &[(1, true), (2, true), (2, false), (4, true)]).await;
    Lock::new(&pool, 3).try_acquire().await.unwrap().unwrap().release().await.unwrap();
    second.release().await.unwrap();
    becomes(&mut admin, &[(1, true), (2, true), (3, true), (4, true), (4, false)]).await;
    fourth.release().await.unwrap();
    let guard = timeout(SOON * 10, waiting).await.unwrap().unwrap();
    becomes(&mut admin, &[(1, true), (2, true), (3, true), (4, true)]).await;
    guard.release().await.unwrap();
    no_locks(&mut admin).await;
    borrow_all(&pool).await;
}

#[tokio::test]
async fn a_handle_stacks_and_a_clone_is_another_owner() {
    let (_db, pool, mut admin) = TestDb::scene(3).await;
    let mut locks = exclusive(&pool, &[1, 2]);
    let mut clone = locks.clone();
    let first = locks.acquire().await.unwrap();
    let second = locks.try_acquire().await.unwrap().unwrap();
    assert_eq!(first.backend_pid(), second.backend_pid());
    becomes(&mut admin, &[(1, true), (2, true)]).await;
    assert!(clone.try_acquire().await.unwrap().is_none());

    first.release().await.unwrap();
    second.verify().await.unwrap();
    assert!(clone.try_acquire().await.unwrap().is_none());
    // A handle on one more key is another owner.
    let mut wider = exclusive(&pool, &[1, 2, 3]);
    assert!(wider.try_acquire().await.unwrap().is_none());
    second.release().await.unwrap();
    let third = wider.try_acquire().await.unwrap().unwrap();
    assert!(clone.try_acquire().await.unwrap().is_none());
    third.release().await.unwrap();
    clone.try_acquire().await.unwrap().unwrap().release().await.unwrap();
    no_locks(&mut admin).await;
    borrow_all(&pool).await;
}

#[tokio::test]
async fn closing_releases_all_and_notifies_the_guards() {
    let (_db, pool, mut admin) = TestDb::scene(1).await;
    let mut locks = exclusive(&pool, &[1, 2]);
    let (first, second) = (locks.acquire().await.unwrap(), locks.acquire().await.unwrap());
    let pid = first.backend_pid();
    locks.release_all().await.unwrap();
    no_locks(&mut admin).await;
    assert!(matches!(first.lost().await, Loss::Released));
    assert!(second.is_lost());
    assert_eq!(borrow_all(&pool).await, [pid], "the connection was not kept");
    locks.acquire().await.unwrap().release().await.unwrap();
}

/// Checks that the guard of a lost session reports the loss.
async fn says_lost(guard: MultiGuard) {
    timeout(SOON * 10, guard.lost()).await.unwrap();
    assert!(guard.is_lost());
    assert!(matches!(guard.verify().await, Err(Error::Lost { .. })));
    assert!(matches!(guard.release().await, Err(Error::Lost { .. })));
}

#[tokio::test]
async fn a_loss_is_reported_for_each_key() {
    let (_db, pool, mut admin) = TestDb::scene(2).await;
    let mut locks = shares_the_second(&pool);

    let (first, second) = (locks.acquire().await.unwrap(), locks.acquire().await.unwrap());
    terminate(&mut admin, first.backend_pid()).await;
    says_lost(first).await;
    says_lost(second).await;
    no_locks(&mut admin).await;

    // Other code unlocks one of the guard's locks.
    for unlock in ["pg_advisory_unlock(1)", "pg_advisory_unlock_shared(2)", "pg_advisory_unlock(3)"]
    {
        let guard = locks.acquire().await.unwrap();
        let unlock = || sqlx::AssertSqlSafe(format!("SELECT pg_catalog.{unlock}"));
        let mut conn = guard.connection().await.unwrap();
        sqlx::raw_sql(unlock()).execute(&mut *conn).await.unwrap();
        drop(conn);
        assert!(matches!(guard.verify().await, Err(Error::Lost { reason: Loss::NotHeld, .. })));
        says_lost(guard).await;

        let guard = locks.acquire().await.unwrap();
        let mut conn = guard.connection().await.unwrap();
        sqlx::raw_sql(unlock()).execute(&mut *conn).await.unwrap();
        drop(conn);
        let released = guard.release().await;
        assert!(matches!(released, Err(Error::Lost { reason: Loss::NotHeld, .. })));
        no_locks(&mut admin).await;
    }
}

/// The holders of each key: -1 for a writer, otherwise the number of readers.
#[derive(Debug, Default)]
struct Inside([AtomicI32; 6]);

impl Inside {
    fn enter(&self, key: usize, mode: Mode) {
        let inside = self.0.get(key).unwrap();
        match mode {
            Mode::Exclusive => {
                let found = inside.swap(-1, Ordering::SeqCst);
                assert_eq!(found, 0, "a writer finds another holder of key {key}");
            }
            Mode::Shared => {
                let found = inside.fetch_add(1, Ordering::SeqCst);
                assert!(found >= 0, "a reader finds a writer with key {key}");
            }
        }
    }

    fn leave(&self, key: usize, mode: Mode) {
        let inside = self.0.get(key).unwrap();
        match mode {
            Mode::Exclusive => assert_eq!(inside.swap(0, Ordering::SeqCst), -1),
            Mode::Shared => assert!(inside.fetch_sub(1, Ordering::SeqCst) > 0),
        }
    }
}

/// Every task acquires several of a few keys, in an order and in modes of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_random_rounds_without_a_deadlock() {
    const TASKS: u64 = 8;
    let in_all: usize = amount(1_500, 10_000);
    // The timeout is short, so that a deadlock is detected, and not waited out.
    let server = Server::options().setting("deadlock_timeout", "50ms").start();
    let db = TestDb::on(&server).await;
    let pool = db.pool(u32::try_from(TASKS).unwrap()).await;
    let inside = Arc::new(Inside::default());
    let rounds = Arc::new(AtomicUsize::new(0));
    let mut tasks = JoinSet::new();
    for seed in 1..=TASKS {
        let (pool, inside, rounds) = (pool.clone(), Arc::clone(&inside), Arc::clone(&rounds));
        tasks.spawn(async move {
            let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let mut refused = 0;
            while rounds.fetch_add(1, Ordering::Relaxed) < in_all {
                // From one to four draws; the same key may come twice.
                let draws = 0..=random(&mut state) % 4;
                let keys = draws.map(|_| {
                    let key = i64::try_from(random(&mut state) % 6).unwrap();
                    (key, if coin(&mut state) { Mode::Shared } else { Mode::Exclusive })
                });
                let mut locks = MultiLock::with_modes(&pool, keys);
                let guard = match random(&mut state) % 8 {
                    0 => locks.try_acquire().await.unwrap(),
                    _ => Some(locks.acquire().await.unwrap()),
                };
                let Some(guard) = guard else {
                    refused += 1;
                    continue;
                };
                let keys: Vec<_> = (0..6)
                    .filter_map(|key| {
                        let id = Key::from(i64::try_from(key).unwrap());
                        let (_, mode) = guard.keys().find(|(held, _)| **held == id)?;
                        Some((key, mode))
                    })
                    .collect();
                for &(key, mode) in &keys {
                    inside.enter(key, mode);
                }
                tokio::task::yield_now().await;
                for &(key, mode) in &keys {
                    inside.leave(key, mode);
                }
                if coin(&mut state) {
                    guard.release().await.unwrap();
                }
            }
            refused
        });
    }
    let refused: usize = timeout(SOON * 300, tasks.join_all()).await.unwrap().iter().sum();
    report(format_args!("{refused} of {in_all} rounds were refused"));
    assert!(refused > 0 && refused < in_all / 8);
    eventually("all connections are back", SOON * 10, || async {
        pool.num_idle() == pool.size() as usize
    })
    .await;
    locks_are(&mut db.admin().await, 0, SOON * 10).await;
    borrow_all(&pool).await;
}
