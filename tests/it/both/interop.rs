//! Keys are PostgreSQL's keys: other programs that use the same numbers are excluded, and exclude the crate.

use std::time::Duration;

use pglock::{Key, Lock, interop};
use pglock_testkit::{AdvisoryLock, TestDb, advisory_locks, cancel_after, eventually};
use sqlx::postgres::{PgAdvisoryLock, PgAdvisoryLockKey};
use sqlx::{Either, PgConnection};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::new_lock;
use crate::support::{TIMEOUT, locks_are};

/// Tries a lock as any SQL client would; returns whether it was acquired.
async fn sql_try_lock(conn: &mut PgConnection, key: i64) -> bool {
    let statement = sqlx::query_scalar("SELECT pg_try_advisory_lock($1)").bind(key);
    statement.fetch_one(conn).await.unwrap()
}

async fn sql_unlock(conn: &mut PgConnection, key: i64) -> bool {
    let statement = sqlx::query_scalar("SELECT pg_advisory_unlock($1)").bind(key);
    statement.fetch_one(conn).await.unwrap()
}

async fn is_free(lock: &Lock) -> bool {
    match lock.clone().try_acquire().await.unwrap() {
        Some(guard) => guard.release().await.is_ok(),
        None => false,
    }
}

/// A name excludes sqlx's own lock of that name, and is excluded by it.
#[tokio::test]
async fn a_name_is_the_same_lock_in_sqlx() {
    let (_db, pool) = TestDb::with_pool(2).await;
    for name in ["nightly-report", "", "größer", "a name with spaces, and 'quotes'"] {
        let theirs = PgAdvisoryLock::new(name);
        let mut ours = new_lock(&pool, name);

        let held = theirs.acquire(pool.acquire().await.unwrap()).await.unwrap();
        assert!(ours.try_acquire().await.unwrap().is_none(), "{name:?} is held by sqlx");
        drop(held.release_now().await.unwrap());

        let guard = ours.acquire().await.unwrap();
        let asked = theirs.try_acquire(pool.acquire().await.unwrap()).await.unwrap();
        assert!(matches!(asked, Either::Right(_)), "{name:?} is held by pglock");
        drop(asked);
        guard.release().await.unwrap();

        let asked = theirs.try_acquire(pool.acquire().await.unwrap()).await.unwrap();
        let Either::Left(held) = asked else { panic!("{name:?} was released by pglock") };
        drop(held.release_now().await.unwrap());
    }
}

/// A Go service computes `int64(fnv64a(name))`, and calls `pg_advisory_lock` with it.
#[tokio::test]
async fn fnv1a_excludes_whoever_locks_that_number() {
    let (db, pool) = TestDb::with_pool(2).await;
    let mut go = db.admin().await;
    let number = 0x8594_4171_f739_67e8_u64.cast_signed();
    let mut ours = new_lock(&pool, interop::fnv1a("foobar"));

    assert!(sql_try_lock(&mut go, number).await);
    assert!(ours.try_acquire().await.unwrap().is_none());
    assert!(sql_unlock(&mut go, number).await);

    let guard = ours.acquire().await.unwrap();
    assert!(!sql_try_lock(&mut go, number).await);
    guard.release().await.unwrap();
    assert!(sql_try_lock(&mut go, number).await);
}

/// A pair and a number are two locks, even if all their bits agree.
#[tokio::test]
async fn a_pair_never_clashes_with_a_number() {
    let (_db, pool) = TestDb::with_pool(3).await;
    for (pair, number) in [((0, 42), 42), ((1, 42), 0x1_0000_002a_i64), ((-1, -1), -1)] {
        let pair = new_lock(&pool, pair).acquire().await.unwrap();
        let number = new_lock(&pool, number).try_acquire().await.unwrap();
        let number = number.expect("the number is free while the pair is held");
        assert_ne!(pair.key(), number.key());
        pair.release().await.unwrap();
        number.release().await.unwrap();
    }
}

/// The same pair in the other order is another lock.
#[tokio::test]
async fn the_order_of_a_pair_matters() {
    let (_db, pool) = TestDb::with_pool(2).await;
    let guard = new_lock(&pool, (1, 2)).acquire().await.unwrap();
    assert!(is_free(&new_lock(&pool, (2, 1))).await);
    assert!(!is_free(&new_lock(&pool, (1, 2))).await);
    guard.release().await.unwrap();
}

/// The columns of `pg_locks` for a key: its halves without a sign, and its kind.
fn shown(key: &Key) -> (i64, i64, i16) {
    let unsigned = |half: i32| i64::from(half.cast_unsigned());
    match PgAdvisoryLockKey::from(key) {
        PgAdvisoryLockKey::BigInt(number) => {
            ((number >> 32) & 0xffff_ffff, number & 0xffff_ffff, 1)
        }
        PgAdvisoryLockKey::IntPair(first, second) => (unsigned(first), unsigned(second), 2),
        unknown => unreachable!("{unknown:?} is no key of ours"),
    }
}

/// Keys of the smallest and the largest numbers can be acquired, shown, tried while busy, awaited with a timeout and
/// until granted, and released.
#[tokio::test]
async fn every_number_is_a_key() {
    let db = TestDb::new().await;
    let numbers = [i64::MIN, i64::MIN + 1, -1, 0, 1, i64::MAX].map(Key::from);
    let halves = [i32::MIN, -1, i32::MAX];
    let pairs = halves.iter().flat_map(|&first| halves.map(|second| Key::from((first, second))));
    let keys: Vec<Key> = numbers.into_iter().chain(pairs).collect();
    let (ours, theirs) = (db.pool(15).await, db.pool(15).await);
    let mut admin = db.admin().await;

    let mut guards = Vec::new();
    let mut expected = Vec::new();
    for key in &keys {
        let guard = new_lock(&ours, key).try_acquire().await.unwrap().unwrap();
        let (classid, objid, objsubid) = shown(key);
        let (pid, mode, granted) = (guard.backend_pid(), "ExclusiveLock".to_owned(), true);
        expected.push(AdvisoryLock { pid, classid, objid, objsubid, mode, granted });
        guards.push(guard);
    }
    expected.sort_by_key(|lock| (lock.classid, lock.objid, lock.objsubid));
    assert_eq!(advisory_locks(&mut admin).await, expected);

    // All waits run at once, because each takes all its time.
    let mut waits = JoinSet::new();
    for key in keys.clone() {
        let mut lock = new_lock(&theirs, key);
        waits.spawn(async move {
            assert!(lock.try_acquire().await.unwrap().is_none(), "{lock:?}");
            let waited = lock.try_acquire_for(Duration::from_secs(1)).await.unwrap();
            assert!(waited.is_none(), "{lock:?}");
            let waited = lock.try_acquire_shared_for(Duration::from_secs(1)).await.unwrap();
            assert!(waited.is_none(), "{lock:?}");
            lock
        });
    }
    let refused = waits.join_all().await;
    let mut waits = JoinSet::new();
    for mut lock in refused {
        waits.spawn(async move { lock.acquire().await.unwrap() });
    }
    // A manager has only a few of the waits in the server's queue at a time.
    let waiting = async || advisory_locks(&mut db.admin().await).await.len() > keys.len();
    eventually("some wait in the server's queue", TIMEOUT, waiting).await;

    drop(guards);
    let mut guards = Vec::new();
    while let Some(guard) = timeout(TIMEOUT, waits.join_next()).await.unwrap() {
        guards.push(guard.unwrap());
    }
    locks_are(&mut admin, keys.len(), TIMEOUT).await;
    for guard in guards {
        guard.release().await.unwrap();
    }
    locks_are(&mut admin, 0, TIMEOUT).await;

    // A lock that was granted to an abandoned try is found by its number, and released.
    for key in &keys {
        let mut lock = new_lock(&ours, key);
        // A fast server answers within one poll; the call then returns an ordinary guard.
        drop(cancel_after(1, lock.try_acquire()).await);
    }
    let idle = || async { ours.num_idle() == ours.size() as usize };
    eventually("the tries are undone", TIMEOUT, idle).await;
    assert_eq!(advisory_locks(&mut admin).await, []);
}

#[tokio::test]
async fn an_i32_is_the_i64_of_the_same_value() {
    let (_db, pool) = TestDb::with_pool(2).await;
    for number in [i32::MIN, -1, 0, 42, i32::MAX] {
        assert_eq!(Key::from(number), Key::from(i64::from(number)));
        let guard = new_lock(&pool, number).acquire().await.unwrap();
        assert!(!is_free(&new_lock(&pool, i64::from(number))).await, "{number}");
        guard.release().await.unwrap();
        assert!(is_free(&new_lock(&pool, i64::from(number))).await, "{number}");
    }
}

/// Hand-written SQL and the crate exclude each other, in both modes.
#[tokio::test]
async fn hand_written_sql_sees_our_locks() {
    let (db, pool) = TestDb::with_pool(1).await;
    let mut sql = db.admin().await;
    let mut ours = new_lock(&pool, 42);

    let guard = ours.acquire().await.unwrap();
    assert!(!sql_try_lock(&mut sql, 42).await);
    guard.release().await.unwrap();

    let shared = ours.acquire_shared().await.unwrap();
    assert!(!sql_try_lock(&mut sql, 42).await);
    let statement = "SELECT pg_try_advisory_lock_shared(42)";
    let granted: bool = sqlx::query_scalar(statement).fetch_one(&mut sql).await.unwrap();
    assert!(granted);
    shared.release().await.unwrap();

    assert!(ours.try_acquire().await.unwrap().is_none());
    ours.try_acquire_shared().await.unwrap().unwrap().release().await.unwrap();
}

/// Transaction-level locks share the keys of session-level ones.
#[tokio::test]
async fn a_transaction_level_lock_excludes_us_until_it_ends() {
    let (db, pool) = TestDb::with_pool(1).await;
    let mut sql = db.admin().await;
    let mut ours = new_lock(&pool, 42);

    sqlx::raw_sql("BEGIN; SELECT pg_advisory_xact_lock(42)").execute(&mut sql).await.unwrap();
    assert!(ours.try_acquire().await.unwrap().is_none());
    sqlx::raw_sql("COMMIT").execute(&mut sql).await.unwrap();
    ours.try_acquire().await.unwrap().unwrap().release().await.unwrap();
}

/// Keys belong to a database: the same key in another database of the server is another lock.
#[tokio::test]
async fn databases_of_one_server_do_not_clash() {
    let (one, two) = (TestDb::new().await, TestDb::new().await);
    let (one, two) = (one.pool(2).await, two.pool(2).await);

    let guard = new_lock(&one, "nightly-report").acquire().await.unwrap();
    let other = new_lock(&two, "nightly-report").try_acquire().await.unwrap();
    let other = other.expect("another database, another lock");
    assert!(!is_free(&new_lock(&one, "nightly-report")).await);
    assert!(!is_free(&new_lock(&two, "nightly-report")).await);
    guard.release().await.unwrap();
    other.release().await.unwrap();
}
