//! A wait keeps its place, costs others nothing, and ends when it should.

use std::collections::HashSet;
use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::Poll;
use std::time::{Duration, Instant};

use pglock::{Error, LockOptions};
use pglock_testkit::TestDb;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::{new_lock, new_lock_with, sessions};
use crate::support::{
    all_are_idle, borrow_all, locks_are, no_locks, rounds, slow_heartbeat, soon, waits_in_vain,
};

/// Waits that last several slices hold up neither index builds nor vacuum, and write nothing to the
/// server's log.
#[tokio::test]
async fn a_long_wait_costs_others_nothing() {
    // The wait lasts three slices, and a little more.
    const WAIT: Duration = Duration::from_secs(7);
    let slice = Duration::from_secs(2);

    let (server, db) = TestDb::with_server().await;
    let mut admin = db.admin().await;
    sqlx::raw_sql("CREATE TABLE other AS SELECT generate_series(1, 1000) AS x")
        .execute(&mut admin)
        .await
        .unwrap();
    let pool = db.pool(2).await;
    let options = LockOptions::new().wait_slice(slice);
    let held = new_lock_with(&options, &pool, "migrate").acquire().await.unwrap();
    let mut lock = new_lock_with(&options, &pool, "migrate");
    let logged = server.log_len();
    // A role may have a limit on idle sessions, which ends idle connections of the pool.
    let lines_since = |logged| -> Vec<String> {
        let lines = server.log_since(logged);
        let others = lines.lines().filter(|line| !line.contains("idle-session timeout"));
        others.map(ToOwned::to_owned).collect()
    };

    let started = Instant::now();
    let waiter = tokio::task::LocalSet::new();
    let waiting = waiter.run_until(async {
        let waiting = tokio::task::spawn_local(async move {
            lock.acquire().await.unwrap().release().await.unwrap();
        });
        locks_are(&mut admin, 2, soon() * 4).await;

        let mut builder = db.admin().await;
        // From PostgreSQL 19 on, the server logs the builder's own waits by default.
        sqlx::raw_sql("SET log_lock_waits = off").execute(&mut builder).await.unwrap();
        let index = sqlx::raw_sql("CREATE INDEX CONCURRENTLY other_x ON other (x)");
        let built = timeout(slice * 3, index.execute(&mut builder)).await;
        built.expect("the index is built while the lock is waited for").unwrap();

        // Every transaction below advances the horizon, and the waiter's snapshot must follow.
        let mut seen = (None, Instant::now());
        let mut snapshots = HashSet::new();
        while started.elapsed() < WAIT {
            let xmin: Option<String> = sqlx::query_scalar(
                "SELECT backend_xmin::text FROM pg_stat_activity \
                 WHERE datname = current_database() AND wait_event_type = 'Lock' AND wait_event = 'advisory' \
                   AND txid_current() IS NOT NULL",
            )
            .fetch_optional(&mut admin)
            .await
            .unwrap()
            .flatten();
            if seen.0 != xmin {
                snapshots.extend(xmin.clone());
                seen = (xmin, Instant::now());
            }
            let age = seen.1.elapsed();
            assert!(age < slice * 2, "the waiter's snapshot is {age:?} old");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert!(snapshots.len() > 1, "the waiter has {} snapshots", snapshots.len());
        assert!(!waiting.is_finished());
        assert_eq!(lines_since(logged), Vec::<String>::new());
        held.release().await.unwrap();
        timeout(soon() * 5, waiting).await.unwrap().unwrap();
    });
    waiting.await;
    assert_eq!(lines_since(logged), Vec::<String>::new());
}

#[tokio::test]
async fn waiters_within_a_slice_are_served_in_order() {
    const WAITERS: usize = 5;
    let (_db, pool, mut admin) = TestDb::scene(3).await;
    for _ in 0..5 {
        let held = new_lock(&pool, 1).acquire().await.unwrap();
        let served = Arc::new(AtomicUsize::new(0));
        let mut waiters = JoinSet::new();
        for place in 0..WAITERS {
            let (mut lock, served) = (new_lock(&pool, 1), Arc::clone(&served));
            let mut waiter = Box::pin(async move {
                let guard = lock.acquire().await.unwrap();
                assert_eq!(served.fetch_add(1, Ordering::SeqCst), place);
                guard.release().await.unwrap();
            });
            // The first one waits on the server, the others are in line behind it as soon as they are polled.
            assert!(poll_fn(|cx| Poll::Ready(waiter.as_mut().poll(cx))).await.is_pending());
            waiters.spawn(waiter);
            locks_are(&mut admin, sessions(2, 1), soon() * 10).await;
        }
        held.release().await.unwrap();
        while let Some(finished) = waiters.join_next().await {
            finished.unwrap();
        }
    }
}

#[tokio::test]
async fn a_bounded_wait_ends_on_time() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let (other, pool) = (db.pool(1).await, db.pool(2).await);
    let _held = new_lock(&other, 1).acquire().await.unwrap();
    let mut lock = new_lock(&pool, 1);
    for limit in [0, 1, 50, 1000].map(Duration::from_millis) {
        // All connections are opened first, so that the limit is not spent on opening one.
        borrow_all(&pool).await;
        all_are_idle(&pool).await;
        let started = Instant::now();
        match lock.try_acquire_for(limit).await {
            Ok(None) => {}
            // On a busy machine, the pool returns even an idle connection too late, or the server answers too late.
            Err(
                Error::PoolTimedOut { .. } | Error::Connect { .. } | Error::Disconnected { .. },
            ) if limit < soon() / 10 => {}
            acquired => panic!("{acquired:?}"),
        }
        let waited = started.elapsed();
        assert!(waited >= limit, "gave up after {waited:?} of {limit:?}");
        assert!(waited < limit + soon() * 10, "gave up only after {waited:?} of {limit:?}");
        locks_are(&mut admin, 1, soon() * 4).await;
    }
}

/// With a deadline that has passed, the call is a try, which waits for the pool and never for the lock.
#[tokio::test]
async fn a_deadline_is_a_timeout_that_ends_then() {
    let db = TestDb::new().await;
    let (other, pool) = (db.pool(1).await, db.pool(2).await);
    let mut lock = new_lock(&pool, 1);
    let past = Instant::now();
    lock.try_acquire_until(past).await.unwrap().unwrap().release().await.unwrap();
    lock.try_acquire_shared_until(past).await.unwrap().unwrap().release().await.unwrap();
    let held = new_lock(&other, 1).acquire().await.unwrap();
    assert!(lock.try_acquire_until(past).await.unwrap().is_none());
    waits_in_vain(soon(), async |time| {
        let deadline = Instant::now() + time;
        let waited = lock.try_acquire_until(deadline).await;
        assert!(Instant::now() >= deadline);
        waited
    })
    .await;
    held.release().await.unwrap();
}

#[tokio::test]
async fn a_limit_too_long_to_count_is_for_ever() {
    let (_db, pool) = TestDb::with_pool(2).await;
    let held = new_lock(&pool, 1).acquire().await.unwrap();
    let mut lock = new_lock(&pool, 1);
    let (guard, ()) = tokio::join!(lock.try_acquire_for(Duration::MAX), async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        held.release().await.unwrap();
    });
    guard.unwrap().unwrap().release().await.unwrap();
}

/// The server's timeout can occur after the grant; the lock is then either kept or released, never both and never
/// neither.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_grant_that_races_with_the_timeout_is_never_lost() {
    const TASKS: u32 = 6;
    const TIMEOUT: Duration = Duration::from_millis(10);

    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let pool = db.pool(TASKS).await;
    let inside = Arc::new(AtomicBool::new(false));
    let mut tasks = JoinSet::new();
    for task in 0..TASKS {
        let (mut lock, inside, pool) = (new_lock(&pool, 1), Arc::clone(&inside), pool.clone());
        tasks.spawn(async move {
            let (mut granted, mut refused) = (0, 0);
            for round in 0..u32::try_from(rounds(500)).unwrap() {
                let guard = match lock.try_acquire_for(TIMEOUT).await {
                    Ok(Some(guard)) => guard,
                    Ok(None) => {
                        refused += 1;
                        continue;
                    }
                    // On a busy machine, the time may pass while a connection is opened. Opening another one each time
                    // would make the machine busier.
                    Err(Error::PoolTimedOut { .. } | Error::Connect { .. }) => {
                        drop(pool.acquire().await.unwrap());
                        continue;
                    }
                    Err(error) => panic!("{error:?}"),
                };
                granted += 1;
                assert!(!inside.swap(true, Ordering::SeqCst), "two exclusive holders");
                // The hold lasts about as long as the timeout of the others.
                let hold =
                    Duration::from_micros(u64::from((task * 500 + round) % 20) * 200 + 8_000);
                tokio::time::sleep(hold).await;
                assert!(inside.swap(false, Ordering::SeqCst));
                guard.release().await.expect("held until the end");
            }
            (granted, refused)
        });
    }
    let (mut granted, mut refused) = (0, 0);
    while let Some(finished) = tasks.join_next().await {
        let counts: (u32, u32) = finished.unwrap();
        granted += counts.0;
        refused += counts.1;
    }
    let some = u32::try_from(rounds(100)).unwrap();
    assert!(granted > some && refused > some, "no race: {granted} granted, {refused} refused");
    no_locks(&mut admin).await;
    borrow_all(&pool).await;
}

#[tokio::test]
async fn a_bounded_wait_on_a_silent_server_ends_soon_after_its_time() {
    // The server must be silent before the time is over, on a busy machine too.
    const TIME: Duration = Duration::from_secs(2);
    let (server, db) = TestDb::with_server().await;
    let (other, pool) = (db.pool(1).await, db.pool(2).await);
    let held = new_lock_with(&slow_heartbeat(), &other, 1).acquire().await.unwrap();
    let mut lock = new_lock(&pool, 1);
    let started = Instant::now();
    let (got, ()) = tokio::join!(lock.try_acquire_for(TIME), async {
        locks_are(&mut db.admin().await, 2, soon() * 10).await;
        server.pause();
    });
    let waited = started.elapsed();
    server.resume();
    assert!(got.unwrap().is_none());
    assert!(waited < TIME + soon() * 10, "gave up only after {waited:?}");
    held.release().await.unwrap();
    no_locks(&mut db.admin().await).await;
    borrow_all(&pool).await;
}

#[tokio::test]
async fn an_unbounded_wait_on_a_silent_server_ends_with_an_error() {
    let (server, db) = TestDb::with_server().await;
    let (other, pool) = (db.pool(1).await, db.pool(2).await);
    let held = new_lock(&other, 1).acquire().await.unwrap();
    let options = LockOptions::new().wait_slice(Duration::from_secs(2));
    let mut lock = new_lock_with(&options, &pool, 1);
    let (got, ()) = tokio::join!(lock.acquire(), async {
        locks_are(&mut db.admin().await, 2, soon() * 10).await;
        server.pause();
    });
    server.resume();
    let error = got.unwrap_err();
    assert!(matches!(error, Error::Disconnected { .. }), "{error:?}");
    // The server was silent for longer than a holder trusts it.
    assert!(held.is_lost());
    locks_are(&mut db.admin().await, 0, soon() * 5).await;
    borrow_all(&pool).await;
}
