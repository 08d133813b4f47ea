//! A held lock changes its mode without a moment in which it is not held.

use std::time::{Duration, Instant};

use pglock::{Error, ExclusiveGuard, Lock, Loss, SharedGuard, Upgrade};
use pglock_testkit::{AdvisoryLock, TestDb, advisory_locks};
use sqlx::PgConnection;
use tokio::time::{sleep, timeout};

use super::new_lock;
use crate::support::{
    self, borrow_all, execute, locks_become, no_locks, rounds, soon, spawn, terminate,
};

const KEY: i64 = 42;

/// The modes in which a backend holds the key, or waits for it.
async fn modes(admin: &mut PgConnection, pid: i32) -> Vec<(String, bool)> {
    let locks = advisory_locks(admin).await;
    let modes = locks.into_iter().filter(|lock| lock.pid == pid);
    modes.map(|AdvisoryLock { mode, granted, .. }| (mode, granted)).collect()
}

fn held(mode: &str) -> Vec<(String, bool)> {
    vec![(mode.to_owned(), true)]
}

/// Waits until there are `count` rows, one of which is of a waiting backend that is not in `known`, and returns that
/// backend.
async fn last_waiter(admin: &mut PgConnection, count: usize, known: &[i32]) -> i32 {
    let is_new = |lock: &AdvisoryLock| !lock.granted && !known.contains(&lock.pid);
    let locks = locks_become(admin, "a new waiter", soon() * 10, |locks| {
        locks.len() == count && locks.iter().any(is_new)
    });
    locks.await.into_iter().find(is_new).unwrap().pid
}

/// Waits until a backend is in the queue. Between two slices, it is out of the queue for a moment.
async fn still_waits(admin: &mut PgConnection, pid: i32) {
    let started = Instant::now();
    loop {
        let modes = modes(admin, pid).await;
        if modes == [("ExclusiveLock".to_owned(), false)] {
            return;
        }
        assert!(modes.is_empty() && started.elapsed() < soon() * 10, "{modes:?}");
        sleep(Duration::from_millis(2)).await;
    }
}

async fn upgraded(guard: SharedGuard) -> ExclusiveGuard {
    support::upgraded(guard.try_upgrade().await.unwrap())
}

async fn refused(guard: SharedGuard) -> SharedGuard {
    support::refused(guard.try_upgrade().await.unwrap())
}

/// The server grants a lock that is free for an instant to the first waiter, so the writer would have it if there was
/// such an instant.
#[tokio::test]
async fn a_downgrade_admits_readers_and_no_writer() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let [pool, second, third] = [db.pool(2).await, db.pool(2).await, db.pool(2).await];
    let mut lock = new_lock(&pool, KEY);
    for _ in 0..rounds(50) {
        let writing = lock.acquire().await.unwrap();
        let pid = writing.backend_pid();
        let (mut reader, mut writer) = (new_lock(&second, KEY), new_lock(&third, KEY));
        let reader = spawn(async move { reader.acquire_shared().await.unwrap() });
        let reader_pid = last_waiter(&mut admin, 2, &[]).await;
        let writer = spawn(async move { writer.acquire().await.unwrap() });
        let writer_pid = last_waiter(&mut admin, 3, &[reader_pid]).await;

        let reading = writing.downgrade().await.unwrap();
        assert_eq!(reading.backend_pid(), pid);
        assert_eq!(modes(&mut admin, pid).await, held("ShareLock"));
        let also_reading = timeout(soon() * 10, reader).await.unwrap().unwrap();
        still_waits(&mut admin, writer_pid).await;
        reading.verify().await.unwrap();
        reading.release().await.unwrap();
        assert!(!writer.is_finished());
        also_reading.release().await.unwrap();
        timeout(soon() * 10, writer).await.unwrap().unwrap().release().await.unwrap();
        no_locks(&mut admin).await;
    }
    borrow_all(&pool).await;
}

#[tokio::test]
async fn a_downgrade_goes_ahead_of_a_waiting_writer() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let [pool, second] = [db.pool(2).await, db.pool(2).await];
    let mut lock = new_lock(&pool, KEY);
    for _ in 0..rounds(50) {
        let writing = lock.acquire().await.unwrap();
        let pid = writing.backend_pid();
        let mut writer = new_lock(&second, KEY);
        let writer = spawn(async move { writer.acquire().await.unwrap() });
        let writer_pid = last_waiter(&mut admin, 2, &[]).await;
        let reading = timeout(soon() * 10, writing.downgrade()).await.unwrap().unwrap();
        assert_eq!(modes(&mut admin, pid).await, held("ShareLock"));
        still_waits(&mut admin, writer_pid).await;
        drop(reading);
        timeout(soon() * 10, writer).await.unwrap().unwrap().release().await.unwrap();
    }
    no_locks(&mut admin).await;
    borrow_all(&pool).await;
}

#[tokio::test]
async fn a_downgrade_leaves_other_exclusive_guards_what_they_hold() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let [pool, elsewhere] = [db.pool(2).await, db.pool(2).await];
    let mut lock = new_lock(&pool, KEY);
    let mut other = new_lock(&elsewhere, KEY);
    let (first, second) = (lock.acquire().await.unwrap(), lock.acquire().await.unwrap());
    let pid = first.backend_pid();
    let reading = first.downgrade().await.unwrap();
    assert_eq!(modes(&mut admin, pid).await, held("ExclusiveLock"));
    assert!(other.try_acquire_shared().await.unwrap().is_none());

    // The last exclusive guard is released here; below, it is downgraded.
    second.release().await.unwrap();
    assert_eq!(modes(&mut admin, pid).await, held("ShareLock"));
    assert!(other.try_acquire().await.unwrap().is_none());
    let third = upgraded(reading).await;
    let reading = lock.acquire_shared().await.unwrap();
    let also_reading = third.downgrade().await.unwrap();
    assert_eq!(modes(&mut admin, pid).await, held("ShareLock"));
    reading.release().await.unwrap();
    assert_eq!(modes(&mut admin, pid).await, held("ShareLock"));
    also_reading.release().await.unwrap();
    no_locks(&mut admin).await;
    assert!(borrow_all(&pool).await.contains(&pid));
}

#[tokio::test]
async fn a_downgrade_of_a_lost_lock_is_lost() {
    let (_db, pool, mut admin) = TestDb::scene(2).await;
    let mut lock = new_lock(&pool, KEY);

    let guard = lock.acquire().await.unwrap();
    terminate(&mut admin, guard.backend_pid()).await;
    timeout(soon() * 10, guard.lost()).await.unwrap();
    assert!(matches!(guard.downgrade().await, Err(Error::Lost { .. })));
    no_locks(&mut admin).await;

    // The loss is not detected yet.
    let guard = lock.acquire().await.unwrap();
    terminate(&mut admin, guard.backend_pid()).await;
    no_locks(&mut admin).await;
    assert!(matches!(guard.downgrade().await, Err(Error::Lost { .. })));
    borrow_all(&pool).await;
}

#[tokio::test]
async fn an_upgrade_of_the_only_reader_succeeds_on_the_same_session() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let [pool, elsewhere] = [db.pool(2).await, db.pool(2).await];
    let mut lock = new_lock(&pool, KEY);
    let mut other = new_lock(&elsewhere, KEY);
    for _ in 0..rounds(50) {
        let reading = lock.acquire_shared().await.unwrap();
        let pid = reading.backend_pid();
        let writing = upgraded(reading).await;
        assert_eq!(writing.backend_pid(), pid);
        writing.verify().await.unwrap();
        assert!(other.try_acquire_shared().await.unwrap().is_none());
        // The guard is downgraded again, and upgraded once more.
        let reading = writing.downgrade().await.unwrap();
        other.try_acquire_shared().await.unwrap().unwrap().release().await.unwrap();
        let writing = upgraded(reading).await;
        assert!(other.try_acquire_shared().await.unwrap().is_none());
        writing.release().await.unwrap();
        other.try_acquire().await.unwrap().unwrap().release().await.unwrap();
    }
    no_locks(&mut admin).await;
    borrow_all(&pool).await;
}

#[tokio::test]
async fn an_upgrade_is_refused_while_another_reads() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let [pool, elsewhere] = [db.pool(2).await, db.pool(2).await];
    let mut lock = new_lock(&pool, KEY);
    let (mut other, mut third) = (new_lock(&elsewhere, KEY), new_lock(&elsewhere, KEY));
    let reading = lock.acquire_shared().await.unwrap();
    let theirs = other.acquire_shared().await.unwrap();
    let pid = reading.backend_pid();
    let reading = refused(reading).await;
    assert_eq!(modes(&mut admin, pid).await, held("ShareLock"));
    reading.verify().await.unwrap();
    theirs.release().await.unwrap();
    assert!(third.try_acquire().await.unwrap().is_none(), "it does not hold any more");
    upgraded(reading).await.release().await.unwrap();
    third.try_acquire().await.unwrap().unwrap().release().await.unwrap();
    no_locks(&mut admin).await;
    borrow_all(&pool).await;
}

/// Since version 17 the server lets a holder go ahead of the waiters that wait for that holder.
#[tokio::test]
async fn an_upgrade_is_refused_or_goes_ahead_while_another_waits() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let [pool, elsewhere] = [db.pool(2).await, db.pool(2).await];
    let mut lock = new_lock(&pool, KEY);
    // This waiter has long slices, because a manager's waiter is out of the queue now and then.
    let mut other = Lock::new(&elsewhere, KEY);
    let reading = lock.acquire_shared().await.unwrap();
    let pid = reading.backend_pid();
    let writer = spawn(async move { other.acquire().await.unwrap() });
    let writer_pid = last_waiter(&mut admin, 2, &[]).await;
    let version: i32 = sqlx::query_scalar("SELECT current_setting('server_version_num')::int")
        .fetch_one(&mut admin)
        .await
        .unwrap();
    match timeout(soon() * 10, reading.try_upgrade()).await.unwrap().unwrap() {
        Upgrade::Upgraded(writing) => {
            assert!(version >= 170_000);
            assert!(modes(&mut admin, pid).await.contains(&("ExclusiveLock".to_owned(), true)));
            still_waits(&mut admin, writer_pid).await;
            writing.release().await.unwrap();
        }
        Upgrade::Refused(reading) => {
            assert!(version < 170_000);
            assert_eq!(modes(&mut admin, pid).await, held("ShareLock"));
            still_waits(&mut admin, writer_pid).await;
            reading.release().await.unwrap();
        }
    }
    timeout(soon() * 10, writer).await.unwrap().unwrap().release().await.unwrap();
    no_locks(&mut admin).await;
    borrow_all(&pool).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_readers_that_both_want_to_write_do_not_hang() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    // With this setting, the server does not end a deadlock first.
    let set = format!("ALTER DATABASE {} SET deadlock_timeout = '1min'", db.name());
    execute(&mut admin, set).await;
    let [pool, elsewhere] = [db.pool(2).await, db.pool(2).await];
    let (mut one, mut two) = (new_lock(&pool, KEY), new_lock(&elsewhere, KEY));
    for _ in 0..rounds(100) {
        let (first, second) =
            (one.acquire_shared().await.unwrap(), two.acquire_shared().await.unwrap());
        let upgrades = async { tokio::join!(spawn(first.try_upgrade()), second.try_upgrade()) };
        let (first, second) = timeout(soon() * 10, upgrades).await.unwrap();
        // Both held the shared lock to the end, so neither upgrade can have been granted.
        let first = support::refused(first.unwrap().unwrap());
        let second = support::refused(second.unwrap());
        first.release().await.unwrap();
        upgraded(second).await.release().await.unwrap();
    }
    no_locks(&mut admin).await;
    borrow_all(&pool).await;
}

/// Guards of one handle are one owner, which does not exclude itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_guards_of_one_handle_can_both_be_upgraded() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let [pool, elsewhere] = [db.pool(2).await, db.pool(2).await];
    let mut lock = new_lock(&pool, KEY);
    let mut other = new_lock(&elsewhere, KEY);
    for _ in 0..rounds(100) {
        let (first, second) =
            (lock.acquire_shared().await.unwrap(), lock.acquire_shared().await.unwrap());
        let (first, second) = tokio::join!(spawn(first.try_upgrade()), second.try_upgrade());
        let first = support::upgraded(first.unwrap().unwrap());
        let second = support::upgraded(second.unwrap());
        first.release().await.unwrap();
        assert!(other.try_acquire_shared().await.unwrap().is_none());
        second.release().await.unwrap();
        other.try_acquire().await.unwrap().unwrap().release().await.unwrap();
    }
    no_locks(&mut admin).await;
    borrow_all(&pool).await;
}

#[tokio::test]
async fn an_upgrade_on_a_lost_session_is_an_error_and_no_lock_elsewhere() {
    let (_db, pool, mut admin) = TestDb::scene(2).await;
    let mut lock = new_lock(&pool, KEY);

    let guard = lock.acquire_shared().await.unwrap();
    terminate(&mut admin, guard.backend_pid()).await;
    timeout(soon() * 10, guard.lost()).await.unwrap();
    let lost = guard.try_upgrade().await.unwrap_err();
    assert!(matches!(lost, Error::Lost { .. }), "{lost:?}");
    no_locks(&mut admin).await;

    // The loss is not detected yet.
    for _ in 0..rounds(20) {
        let guard = lock.acquire_shared().await.unwrap();
        terminate(&mut admin, guard.backend_pid()).await;
        no_locks(&mut admin).await;
        let lost = guard.try_upgrade().await.unwrap_err();
        assert!(matches!(lost, Error::Lost { .. } | Error::Disconnected { .. }), "{lost:?}");
        no_locks(&mut admin).await;
    }

    // The handle of the guard is closed while the guard is alive.
    let guard = lock.acquire_shared().await.unwrap();
    lock.release_all().await.unwrap();
    let lost = guard.try_upgrade().await.unwrap_err();
    assert!(matches!(lost, Error::Lost { reason: Loss::Released, .. }), "{lost:?}");
    no_locks(&mut admin).await;
    borrow_all(&pool).await;
}
