//! A lost lock is reported, and the holder times out before the server.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};
use pglock::{Error, LockOptions, Loss};
use pglock_testkit::{Shutdown, TestDb, amount, replace_function};
use tokio::task::yield_now;
use tokio::time::{sleep, timeout};

use super::{new_lock, new_lock_with};
use crate::support::{
    SOON, borrow_all, fast_heartbeat, lenient_heartbeat, locks_are, no_locks, quick_heartbeat,
    quickly_watched, report, rounds, says_lost, slow_heartbeat, soon, terminate, watched,
};

/// Ten sessions are held at a time, each in a pool of its own, and terminated one after another.
#[tokio::test]
async fn the_end_of_a_session_is_reported_at_once() {
    const AT_A_TIME: usize = 10;
    let count = rounds(amount(20, 50));
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let mut took = Vec::new();
    while took.len() < count {
        let mut held = Vec::new();
        for key in 0..AT_A_TIME.min(count) {
            let pool = db.pool(3).await;
            let mut lock = new_lock_with(&slow_heartbeat(), &pool, i64::try_from(key).unwrap());
            held.push((lock.acquire().await.unwrap(), pool));
        }
        sleep(watched()).await;
        for (guard, pool) in held {
            let (lost, at) = tokio::join!(
                async {
                    // No heartbeat is due before this timeout.
                    let loss = timeout(SOON * 20, guard.lost()).await.unwrap();
                    (loss, Instant::now())
                },
                async {
                    terminate(&mut admin, guard.backend_pid()).await;
                    Instant::now()
                },
            );
            assert!(matches!(lost.0, Loss::Disconnected(_)), "{:?}", lost.0);
            took.push(lost.1.saturating_duration_since(at));
            says_lost(guard).await;
            borrow_all(&pool).await;
            // The monitor has lost its connection together with the session's, and reconnects, which takes several
            // round trips.
            sleep(if rounds(50) < 50 { soon() / 2 } else { soon() / 5 }).await;
        }
    }
    took.sort();
    let median = took.get(took.len() / 2).copied();
    report(format!("reported after {median:?}, at most {:?}", took.last()));
    // On an idle machine, the median is a few milliseconds.
    assert!(median < Some(soon() / 4), "{took:?}");
    no_locks(&mut admin).await;
}

#[tokio::test]
async fn every_guard_of_a_lost_session_reports_it() {
    let (_db, pool, mut admin) = TestDb::scene(3).await;
    let mut lock = new_lock_with(&quick_heartbeat(), &pool, 1);
    let exclusive = lock.acquire().await.unwrap();
    let shared = lock.acquire_shared().await.unwrap();
    sleep(quickly_watched()).await;
    terminate(&mut admin, exclusive.backend_pid()).await;
    let both = async { tokio::join!(exclusive.lost(), shared.lost()) };
    timeout(soon() * 5, both).await.unwrap();
    assert!(exclusive.is_lost() && shared.is_lost());

    // A guard acquired now is on a new session, and is not one of the lost guards.
    let again = lock.acquire().await.unwrap();
    assert!(!again.is_lost());
    assert_ne!(again.backend_pid(), exclusive.backend_pid());
}

#[tokio::test]
async fn the_stop_of_a_server_is_reported_at_once() {
    for how in [Shutdown::Fast, Shutdown::Immediate] {
        let (server, db) = TestDb::with_server().await;
        let pool = db.pool(3).await;
        let mut lock = new_lock_with(&quick_heartbeat(), &pool, 1);
        let guard = lock.acquire().await.unwrap();
        sleep(quickly_watched()).await;
        server.stop(how);
        timeout(soon() * 3, guard.lost()).await.unwrap();
        says_lost(guard).await;
        server.restart();
        lock.acquire().await.unwrap().release().await.unwrap();
    }
}

#[tokio::test]
async fn a_silent_server_is_reported_within_the_heartbeat_bound() {
    let (server, db) = TestDb::with_server().await;
    // One pool has a free connection, and one has none.
    for connections in [3, 1] {
        let pool = db.pool(connections).await;
        let guard = new_lock_with(&lenient_heartbeat(), &pool, 1).acquire().await.unwrap();
        sleep(soon() * 7 / 2).await;
        assert!(!guard.is_lost());
        let started = Instant::now();
        server.pause();
        let loss = timeout(soon() * 10, guard.lost()).await;
        let took = started.elapsed();
        server.resume();
        // The bound is three times `soon()`.
        assert!(took < soon() * 9 / 2, "reported only after {took:?}");
        assert!(matches!(loss.unwrap(), Loss::Unresponsive));
        says_lost(guard).await;
        no_locks(&mut db.admin().await).await;
    }
}

#[tokio::test]
async fn a_loss_that_is_seen_before_the_heartbeat_ends_frees_the_lock_under_its_guard() {
    let (server, db) = TestDb::with_server().await;
    let guard = new_lock_with(&fast_heartbeat(), &db.pool(3).await, 1).acquire().await.unwrap();
    server.pause();
    // `is_lost` compares the time with the clock; the heartbeat's timer is rounded up to the next millisecond.
    while !guard.is_lost() {
        yield_now().await;
    }
    server.resume();
    locks_are(&mut db.admin().await, 0, soon() * 5).await;
    says_lost(guard).await;
}

/// The monitor's connection is not one of the pool's.
#[tokio::test]
async fn the_end_of_a_session_is_reported_at_once_though_the_pool_is_exhausted() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let guard = new_lock_with(&slow_heartbeat(), &db.pool(1).await, 1).acquire().await.unwrap();
    sleep(watched()).await;
    terminate(&mut admin, guard.backend_pid()).await;
    timeout(soon() * 5, guard.lost()).await.unwrap();
    says_lost(guard).await;
}

#[tokio::test]
async fn a_monitored_session_asks_nothing_of_the_pool() {
    let db = TestDb::new().await;
    let taken = Arc::new(AtomicUsize::new(0));
    let pool = db.pool_options().max_connections(3).before_acquire({
        let taken = Arc::clone(&taken);
        move |_, _| {
            taken.fetch_add(1, Ordering::Relaxed);
            Box::pin(async { Ok(true) })
        }
    });
    let pool = pool.connect_with(db.options()).await.unwrap();
    let options = LockOptions::new().heartbeat_interval(SOON / 10).heartbeat_timeout(SOON * 3);
    let guard = new_lock_with(&options, &pool, 1).acquire().await.unwrap();
    sleep(quickly_watched()).await;
    let before = taken.load(Ordering::Relaxed);
    sleep(Duration::from_millis(500)).await;
    assert_eq!(taken.load(Ordering::Relaxed), before);
    assert!(!guard.is_lost());
}

#[tokio::test]
async fn a_monitored_session_is_quiet_between_heartbeats() {
    // The CPU time of this thread, the only one on which the session is monitored.
    let time = || {
        let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap();
        Duration::from(time)
    };
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let guard = new_lock_with(&slow_heartbeat(), &db.pool(1).await, 1).acquire().await.unwrap();
    let mut asked = async || -> String {
        let asked = "SELECT query_start::text FROM pg_stat_activity WHERE pid = $1";
        let asked = sqlx::query_scalar(asked).bind(guard.backend_pid());
        asked.fetch_one(&mut admin).await.unwrap()
    };
    sleep(watched()).await;
    let (before, then) = (asked().await, time());
    sleep(SOON / 2).await;
    let took = time().saturating_sub(then);
    assert!(took < SOON / 20, "{took:?}");
    assert_eq!(asked().await, before);
    assert!(!guard.is_lost());
}

#[test]
fn a_lock_whose_runtime_is_shut_down_is_lost_at_once() {
    let runtime = || tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let reports = runtime();
    let db = reports.block_on(TestDb::new());
    // One hold is short, and one is long enough to be monitored.
    for held_for in [Duration::ZERO, watched()] {
        let goes_down = runtime();
        let guard = goes_down.block_on(async {
            let guard =
                new_lock_with(&slow_heartbeat(), &db.pool(2).await, 1).acquire().await.unwrap();
            sleep(held_for).await;
            guard
        });
        assert!(!guard.is_lost());
        goes_down.shutdown_timeout(soon() * 5);
        reports.block_on(async {
            let loss = timeout(soon() * 5, guard.lost()).await.unwrap();
            assert!(matches!(loss, Loss::RuntimeShutdown), "{loss:?}");
            no_locks(&mut db.admin().await).await;
            says_lost(guard).await;
        });
    }
}

#[tokio::test]
async fn while_held_returns_the_output() {
    let (_db, pool) = TestDb::with_pool(1).await;
    let guard = new_lock(&pool, 1).acquire().await.unwrap();
    assert_eq!(guard.while_held(async { 42 }).await.unwrap(), 42);
    guard.release().await.unwrap();
}

#[tokio::test]
async fn while_held_drops_the_future_before_it_reports_the_loss() {
    struct Running(Arc<AtomicBool>);
    impl Drop for Running {
        fn drop(&mut self) {
            self.0.store(false, Ordering::SeqCst);
        }
    }
    let (_db, pool, mut admin) = TestDb::scene(2).await;
    let guard = new_lock_with(&quick_heartbeat(), &pool, 1).acquire().await.unwrap();
    let runs = Arc::new(AtomicBool::new(true));
    let running = Running(Arc::clone(&runs));
    let work = guard.while_held(async move {
        let _running = running;
        std::future::pending::<()>().await;
    });
    let (worked, ()) = tokio::join!(timeout(soon() * 10, work), async {
        sleep(quickly_watched()).await;
        terminate(&mut admin, guard.backend_pid()).await;
    });
    assert!(matches!(worked.unwrap(), Err(Error::Lost { .. })));
    assert!(!runs.load(Ordering::SeqCst));
}

#[tokio::test]
async fn a_panic_inside_while_held_releases() {
    let (db, pool) = TestDb::with_pool(2).await;
    let mut lock = new_lock(&pool, 1);
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(async move {
        let guard = lock.acquire().await.unwrap();
        guard.while_held(async { panic!("as the test demands") }).await.unwrap();
    });
    assert!(tasks.join_next().await.unwrap().unwrap_err().is_panic());
    no_locks(&mut db.admin().await).await;
}

#[tokio::test]
async fn a_server_that_refuses_a_setting_is_used_without_unless_it_is_required() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    sqlx::raw_sql("CREATE SEQUENCE refused; GRANT ALL ON SEQUENCE refused TO PUBLIC")
        .execute(&mut admin)
        .await
        .unwrap();
    let refuse = "BEGIN \
           IF $1 OPERATOR(pg_catalog.=) 'tcp_keepalives_idle' THEN \
             PERFORM pg_catalog.nextval('public.refused'); \
             RAISE insufficient_privilege; \
           END IF; \
           RETURN original.set_config($1, $2, $3); \
         END";
    replace_function(&mut admin, "set_config(text, text, boolean)", refuse).await;
    let pool = db.pool(1).await;

    let mut lock = new_lock_with(&LockOptions::new().require_settings(), &pool, 1);
    for _ in 0..2 {
        let error = lock.acquire().await.unwrap_err();
        assert!(matches!(error, Error::SettingsRejected { .. }), "{error:?}");
        assert!(!error.is_transient());
        no_locks(&mut admin).await;
    }

    let mut lock = new_lock(&pool, 1);
    for _ in 0..2 {
        let guard = lock.acquire().await.unwrap();
        guard.verify().await.unwrap();
        guard.release().await.unwrap();
    }
    no_locks(&mut admin).await;

    // The crate now knows that the server rejects the settings, and does not try them on a new connection.
    let mut refused = async || -> i64 {
        let refused = sqlx::query_scalar("SELECT last_value FROM refused");
        refused.fetch_one(&mut admin).await.unwrap()
    };
    let before = refused().await;
    let other_pool = db.pool(2).await;
    for _ in 0..3 {
        let guard = new_lock(&other_pool, 1).acquire().await.unwrap();
        guard.release().await.unwrap();
    }
    assert_eq!(refused().await, before);
    // A lock that requires the settings still tries them.
    let mut lock = new_lock_with(&LockOptions::new().require_settings(), &pool, 1);
    let error = lock.acquire().await.unwrap_err();
    assert!(matches!(error, Error::SettingsRejected { .. }), "{error:?}");
}

/// A missing privilege for the lock itself must not be treated as a rejected setting.
#[tokio::test]
async fn a_function_that_the_role_may_not_call_is_not_a_rejected_setting() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let deny = "BEGIN RAISE insufficient_privilege; END";
    replace_function(&mut admin, "pg_try_advisory_lock(bigint)", deny).await;
    let pool = db.pool(1).await;
    for options in [LockOptions::new(), LockOptions::new().require_settings()] {
        let error = new_lock_with(&options, &pool, 1).acquire().await.unwrap_err();
        assert!(matches!(error, Error::Database { .. }), "{error:?}");
    }
    no_locks(&mut admin).await;
}

/// Otherwise, after a server was short of memory once, the crate would not set the settings for detecting dead holders
/// on it again.
#[tokio::test]
async fn an_error_that_refuses_nothing_is_no_reason_to_do_without_settings() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    sqlx::raw_sql("CREATE SEQUENCE asked; GRANT ALL ON SEQUENCE asked TO PUBLIC")
        .execute(&mut admin)
        .await
        .unwrap();
    let fail_once = "BEGIN \
           IF $1 OPERATOR(pg_catalog.=) 'tcp_keepalives_idle' THEN \
             IF pg_catalog.nextval('public.asked') OPERATOR(pg_catalog.=) 1 THEN \
               RAISE out_of_memory; \
             END IF; \
           END IF; \
           RETURN original.set_config($1, $2, $3); \
         END";
    replace_function(&mut admin, "set_config(text, text, boolean)", fail_once).await;
    let mut lock = new_lock(&db.pool(1).await, 1);
    let error = lock.acquire().await.unwrap_err();
    assert!(error.to_string().contains("lock 1"), "{error}");
    assert!(!matches!(error, Error::SettingsRejected { .. }), "{error:?}");
    no_locks(&mut admin).await;
    lock.acquire().await.unwrap().release().await.unwrap();
    let asked = sqlx::query_scalar("SELECT last_value FROM asked");
    let asked: i64 = asked.fetch_one(&mut admin).await.unwrap();
    assert_eq!(asked, 2);
}

#[tokio::test]
async fn verify_asks_the_server() {
    let (_db, pool, mut admin) = TestDb::scene(1).await;
    let mut lock = new_lock(&pool, (1, -1));
    let guard = lock.acquire().await.unwrap();
    let shared = lock.acquire_shared().await.unwrap();
    guard.verify().await.unwrap();
    shared.verify().await.unwrap();
    guard.release().await.unwrap();
    shared.verify().await.unwrap();
    // The loss may not have been detected yet.
    terminate(&mut admin, shared.backend_pid()).await;
    no_locks(&mut admin).await;
    assert!(matches!(shared.verify().await, Err(Error::Lost { .. })));
    assert!(shared.is_lost());
}
