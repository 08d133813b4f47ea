//! How a loss is reported, and how a lock's own session is protected from loss.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;
use std::time::{Duration, Instant};

use pglock::{Error, Lock, LockManager, LockOptions, Loss};
use pglock_testkit::{Proxy, Server, TestDb, replace_function};
use sqlx::postgres::PgPoolOptions;
use tokio::runtime::Builder;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::support::{
    SOON, WATCHED, borrow_all, execute, fast_heartbeat, lenient_heartbeat, locks_are, no_locks,
    pool_of, quick_heartbeat, quickly_watched, says_lost, slow_heartbeat, soon, terminate,
    waits_in_vain,
};

/// An answer that comes after the loss must not return the connection to the pool.
#[tokio::test]
async fn a_lock_that_is_lost_during_another_call_is_released() {
    let server = Server::options().tcp().start();
    tokio::join!(
        lost_during_a_call(&server, 0),
        lost_during_a_call(&server, 1),
        lost_during_a_call(&server, 2),
    );
}

/// Loses a lock during one of the calls, in a database and through a proxy of its own.
async fn lost_during_a_call(server: &Server, call: u32) {
    const MOST: Duration = Duration::from_secs(3);
    let db = TestDb::on(server).await;
    let proxy = Proxy::to(server.port()).await;
    let options = server.tcp_options().database(db.name()).port(proxy.address().port());
    let other = db.pool(2).await;
    let pool = PgPoolOptions::new().max_connections(3).connect_lazy_with(options);
    let limited = LockOptions::new().max_hold(MOST).on(&pool).unwrap();
    let guard = Lock::new(&limited, 1).acquire_shared().await.unwrap();
    let second = Lock::new(&guard, 2).acquire().await.unwrap();
    let refused = Lock::new(&other, 3).acquire().await.unwrap();
    let reader = Lock::new(&other, 1).acquire_shared().await.unwrap();
    // The delay makes the answer to the call arrive after the end of the hold.
    sleep(MOST * 2 / 3).await;
    proxy.delay(soon() * 2);
    match call {
        0 => drop(second.release().await),
        1 => drop(Lock::new(&guard, 3).try_acquire().await),
        _ => drop(Lock::new(&guard, 1).try_acquire().await),
    }
    proxy.delay(Duration::ZERO);
    drop((refused, reader));
    timeout(SOON * 4, guard.lost()).await.unwrap();
    // The proxy may delay the end of the connection, too.
    locks_are(&mut db.admin().await, 0, SOON * 20).await;
}

/// A lock that the application unlocked on a borrowed connection is detected as lost, also if another call was waiting
/// for the connection.
#[tokio::test]
async fn what_is_unlocked_on_a_borrowed_connection_is_lost_when_it_is_returned() {
    let (_db, pool) = TestDb::with_pool(2).await;
    let guard = Lock::new(&slow_heartbeat().on(&pool).unwrap(), 1).acquire().await.unwrap();
    let mut connection = guard.connection().await.unwrap();
    sqlx::raw_sql("SELECT pg_advisory_unlock_all()").execute(&mut *connection).await.unwrap();
    let mut token = pin!(guard.fencing_token());
    let polled = poll_fn(|cx| Poll::Ready(token.as_mut().poll(cx))).await;
    assert!(polled.is_pending());
    drop(connection);
    drop(token.await);
    timeout(SOON * 20, guard.lost()).await.unwrap();
}

/// A client that reads slowly for longer than the server waits for a dead client must not be disconnected.
#[tokio::test]
async fn a_borrowed_connection_has_no_user_timeout_after_a_wait_on_it() {
    let server = Server::options().tcp().start();
    let db = TestDb::on(&server).await;
    let options = server.tcp_options().database(db.name());
    let pool = PgPoolOptions::new().max_connections(3).connect_lazy_with(options);
    let holder = Lock::new(&db.pool(1).await, 2).acquire().await.unwrap();
    let guard = Lock::new(&slow_heartbeat().on(&pool).unwrap(), 1).acquire().await.unwrap();
    let user_timeout = async || {
        let mut connection = guard.connection().await.unwrap();
        let show = sqlx::query_scalar::<_, String>("SHOW tcp_user_timeout");
        show.fetch_one(&mut *connection).await.unwrap()
    };
    assert_eq!(user_timeout().await, "0");
    let mut busy = Lock::new(&guard, 2);
    waits_in_vain(soon(), async |time| busy.try_acquire_for(time).await).await;
    assert_eq!(user_timeout().await, "0");
    drop(holder);
}

/// The session's keeper is not driven, like its runtime, and can't report the loss.
#[test]
fn a_loss_is_reported_on_another_runtime_than_the_one_that_stands_still() {
    let [idle, other] =
        [(); 2].map(|()| Builder::new_current_thread().enable_all().build().unwrap());
    let (_db, pool) = other.block_on(async {
        let (db, pool) = TestDb::with_pool(2).await;
        (db, pool)
    });
    let mut lock = Lock::new(&fast_heartbeat().on(&pool).unwrap(), 1);
    let guard = idle.block_on(lock.acquire()).unwrap();
    let started = Instant::now();
    let loss = other.block_on(async { timeout(SOON * 20, guard.lost()).await });
    assert!(matches!(loss, Ok(Loss::Unresponsive)), "{loss:?}");
    // At the end of the test's timeout, `lost` would check the clock, too.
    assert!(started.elapsed() < SOON * 10, "after {:?}", started.elapsed());
}

#[tokio::test]
async fn a_hold_that_is_too_long_is_ended() {
    const MOST: Duration = Duration::from_secs(1);
    let (_db, pool, mut admin) = TestDb::scene(4).await;
    let limited = LockOptions::new().max_hold(MOST).on(&pool).unwrap();
    let short = Lock::new(&limited, 2).acquire().await.unwrap();
    short.release().await.unwrap();

    let started = Instant::now();
    let mut lock = Lock::new(&limited, 1);
    let guard = lock.acquire().await.unwrap();
    let ended = guard.while_held(std::future::pending::<()>());
    let mut other = Lock::new(&pool, 1);
    let (ended, next) =
        timeout(SOON * 20, async { tokio::join!(ended, other.acquire()) }).await.unwrap();
    assert!(matches!(ended, Err(Error::Lost { reason: Loss::HeldTooLong, .. })), "{ended:?}");
    assert!(started.elapsed() >= MOST);
    next.unwrap().release().await.unwrap();
    says_lost(guard).await;
    // The handle can be used again.
    lock.acquire().await.unwrap().release().await.unwrap();
    no_locks(&mut admin).await;
}

/// Managed locks share a session.
#[tokio::test]
async fn the_hold_of_a_managed_lock_is_not_limited() {
    const MOST: Duration = Duration::from_secs(1);
    let db = TestDb::new().await;
    let limited = LockOptions::new().max_hold(MOST).on(&db.pool(3).await).unwrap();
    let guard = Lock::new(&LockManager::new(&limited), 1).acquire().await.unwrap();
    assert!(timeout(MOST * 2, guard.lost()).await.is_err());
    guard.release().await.unwrap();
}

#[tokio::test]
async fn a_silent_server_is_reported_while_the_connection_is_borrowed() {
    let (server, db) = TestDb::with_server().await;
    let pool = db.pool(3).await;
    let guard = Lock::new(&lenient_heartbeat().on(&pool).unwrap(), 1).acquire().await.unwrap();
    let mut conn = guard.connection().await.unwrap();
    let query = sqlx::query("SELECT pg_sleep(60)").execute(&mut *conn);
    let told = async {
        sleep(SOON * 7 / 2).await;
        assert!(!guard.is_lost(), "a long query is not a loss");
        server.pause();
        guard.lost().await
    };
    tokio::select! {
        _ = query => panic!("the query ended"),
        told = timeout(SOON * 20, told) => drop(told.unwrap()),
    }
    server.resume();
    drop(conn);
    // The connection is closed at once, though the guard is alive. Before PostgreSQL 14, a busy backend does not detect
    // that its client has disconnected.
    if server.version() >= 14 {
        locks_are(&mut db.admin().await, 0, SOON * 5).await;
    }
    says_lost(guard).await;
}

#[tokio::test]
async fn a_session_is_polled_again_after_its_connection_was_borrowed() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let guard =
        Lock::new(&slow_heartbeat().on(&db.pool(3).await).unwrap(), 1).acquire().await.unwrap();
    sleep(WATCHED).await;
    let mut conn = guard.connection().await.unwrap();
    sqlx::query("SELECT 1").execute(&mut *conn).await.unwrap();
    drop(conn);
    // The test waits for the tidying to end, so that it is not the tidying that detects the loss.
    sleep(SOON / 2).await;
    terminate(&mut admin, guard.backend_pid()).await;
    timeout(SOON * 5, guard.lost()).await.unwrap();
    says_lost(guard).await;
}

#[tokio::test]
async fn a_connection_to_listen_with_that_does_not_come_holds_up_no_heartbeat() {
    let db = TestDb::new().await;
    let first = AtomicBool::new(true);
    let pool = PgPoolOptions::new().max_connections(2).after_connect(move |_, _| {
        let first = first.swap(false, Ordering::Relaxed);
        Box::pin(async move { if first { Ok(()) } else { std::future::pending().await } })
    });
    let pool = pool.connect_with(db.options()).await.unwrap();
    let options = LockOptions::new().heartbeat_interval(SOON).heartbeat_timeout(SOON * 3);
    let guard = Lock::new(&options.on(&pool).unwrap(), 1).acquire().await.unwrap();
    // The test sleeps for a little longer than a session is trusted without a heartbeat.
    sleep(SOON * 4 + SOON / 10).await;
    assert!(!guard.is_lost());
}

#[tokio::test]
async fn the_end_of_a_borrowed_connection_is_reported() {
    let (_db, pool, mut admin) = TestDb::scene(3).await;
    let guard = Lock::new(&fast_heartbeat().on(&pool).unwrap(), 1).acquire().await.unwrap();
    let conn = guard.connection().await.unwrap();
    terminate(&mut admin, guard.backend_pid()).await;
    timeout(SOON * 3, guard.lost()).await.unwrap();
    drop(conn);
    says_lost(guard).await;
    borrow_all(&pool).await;
}

/// While sessions are idle, nothing is sent on the monitor's connection, and a firewall must not forget it.
#[tokio::test]
async fn the_monitors_connection_is_probed() {
    let (_db, pool, mut admin) = TestDb::scene(1).await;
    let guard = Lock::new(&quick_heartbeat().on(&pool).unwrap(), 1).acquire().await.unwrap();
    let probed = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
                  AND query LIKE '%tcp_keepalives_idle%' AND pid NOT IN ($1, pg_backend_pid())";
    let is_probed = async {
        let count = || sqlx::query_scalar::<_, i64>(probed).bind(guard.backend_pid());
        while count().fetch_one(&mut admin).await.unwrap() == 0 {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(SOON * 20, is_probed).await.unwrap();
    assert!(!guard.is_lost());
}

#[tokio::test]
async fn verify_finds_a_lock_that_other_code_unlocked() {
    let (_db, pool) = TestDb::with_pool(1).await;
    let mut lock = Lock::new(&pool, (1, -1));
    let shared = lock.acquire_shared().await.unwrap();
    shared.verify().await.unwrap();
    let mut conn = shared.connection().await.unwrap();
    sqlx::query("SELECT pg_advisory_unlock_all()").execute(&mut *conn).await.unwrap();
    drop(conn);
    let error = shared.verify().await.unwrap_err();
    assert!(matches!(error, Error::Lost { reason: Loss::NotHeld, .. }), "{error:?}");
    assert!(shared.is_lost());
}

#[tokio::test]
async fn settings_are_applied_whatever_the_connection_was_used_for_before() {
    let server = Server::options().tcp().start();
    let db = TestDb::on(&server).await;
    let mut admin = db.admin().await;
    let show = "SELECT current_setting('tcp_keepalives_idle') || ' ' || \
                current_setting('tcp_keepalives_interval') || ' ' || \
                current_setting('tcp_keepalives_count') || ' ' || current_setting('tcp_user_timeout')";
    for prepares in [false, true] {
        // The very first acquire also looks for a pooler.
        for left_open in ["BEGIN; SELECT 1 / 0", "BEGIN", ""] {
            let pool = pool_of(server.tcp_options().database(db.name()), 1).await;
            let mut conn = pool.acquire().await.unwrap();
            if prepares {
                sqlx::query("SELECT 1").execute(&mut *conn).await.unwrap();
            }
            drop(sqlx::raw_sql(left_open).execute(&mut *conn).await);
            drop(conn);
            // The lock is acquired at once, however young the transaction is.
            let idle = async {
                while pool.num_idle() == 0 {
                    tokio::task::yield_now().await;
                }
            };
            timeout(SOON * 4, idle).await.unwrap();

            for round in 0..3 {
                let guard = Lock::new(&pool, 1).acquire().await.unwrap();
                let mut conn = guard.connection().await.unwrap();
                let shown: String = sqlx::query_scalar(show).fetch_one(&mut *conn).await.unwrap();
                // The timeout would end the connection of a client that reads slowly.
                assert_eq!(shown, "3 1 5 0", "{prepares}, {left_open:?}, {round}");
                drop(conn);
                guard.release().await.unwrap();
                no_locks(&mut admin).await;
            }
            pool.close().await;
        }
    }
}

/// The setting would end the application's connection while a client reads slowly, and the check costs the server a
/// system call each second.
#[tokio::test]
async fn a_pooled_connection_has_its_settings_back_after_a_wait_a_hold_and_a_borrow() {
    const SHOW: &str = "SELECT concat(current_setting('tcp_user_timeout'), ' ', \
        current_setting('client_connection_check_interval', true))";
    let server = Server::options().tcp().start();
    let db = TestDb::on(&server).await;
    let pool = pool_of(server.tcp_options().database(db.name()), 1).await;
    let (mut admin, other) = (db.admin().await, db.pool(1).await);
    let before: String = sqlx::query_scalar(SHOW).fetch_one(&pool).await.unwrap();
    for way in ["wait", "hold", "loan"] {
        let options = if way == "hold" { quick_heartbeat() } else { slow_heartbeat() };
        let mut lock = Lock::new(&options.on(&pool).unwrap(), 1);
        let guard = if way == "wait" {
            let held = Lock::new(&other, 1).acquire().await.unwrap();
            let (guard, ()) = tokio::join!(lock.acquire(), async {
                locks_are(&mut admin, 2, SOON * 4).await;
                held.release().await.unwrap();
            });
            guard.unwrap()
        } else {
            lock.acquire().await.unwrap()
        };
        if way == "hold" {
            // The keeper makes the settings with the first heartbeat.
            sleep(quickly_watched()).await;
        }
        if way == "loan" {
            sqlx::query("SELECT 1").execute(&mut *guard.connection().await.unwrap()).await.unwrap();
        }
        guard.release().await.unwrap();
        let after: String = sqlx::query_scalar(SHOW).fetch_one(&pool).await.unwrap();
        assert_eq!(after, before, "after a {way}");
    }
}

/// One question on one connection is the heartbeat of all borrowed sessions.
#[tokio::test]
async fn many_borrowed_connections_on_a_slow_link_are_not_lost() {
    const SESSIONS: u32 = 120;
    let server = Server::options().tcp().setting("max_connections", "200").start();
    let db = TestDb::on(&server).await;
    let proxy = Proxy::to(server.port()).await;
    proxy.delay(Duration::from_millis(50));
    let options = server.tcp_options().database(db.name()).port(proxy.address().port());
    let pool = PgPoolOptions::new().max_connections(SESSIONS).connect_lazy_with(options);
    let pool = LockOptions::new().reserve_connections(0).on(&pool).unwrap();
    let mut acquires = JoinSet::new();
    for key in 0..SESSIONS {
        let mut lock = Lock::new(&pool, i64::from(key));
        acquires.spawn(async move { lock.acquire().await.unwrap() });
    }
    let guards = acquires.join_all().await;
    let mut borrowed = Vec::new();
    // One after the other, so the first connections are borrowed for as long as several heartbeats.
    for guard in &guards {
        borrowed.push(guard.connection().await.unwrap());
    }
    sleep(Duration::from_secs(5)).await;
    assert_eq!(guards.iter().filter(|guard| guard.is_lost()).count(), 0);
    drop(borrowed);
    for guard in guards {
        guard.release().await.unwrap();
    }
}

/// Neither the proof, nor the monitor, nor the cancel of a wait can log in.
#[tokio::test]
async fn a_role_with_one_connection_holds_waits_and_stops_waiting() {
    let server = Server::start();
    let db = TestDb::on(&server).await;
    execute(&mut db.admin().await, "CREATE ROLE lone LOGIN CONNECTION LIMIT 1").await;
    let pool = pool_of(db.options().username("lone"), 1).await;
    let mut lock = Lock::new(&pool, 1);
    timeout(SOON * 4, lock.acquire()).await.unwrap().unwrap().release().await.unwrap();

    let held = Lock::new(&db.pool(1).await, 1).acquire().await.unwrap();
    waits_in_vain(SOON / 2, async |time| lock.try_acquire_for(time).await).await;
    assert!(timeout(SOON / 2, lock.acquire()).await.is_err());
    held.release().await.unwrap();

    let guard = timeout(SOON * 20, lock.acquire()).await.unwrap().unwrap();
    assert!(timeout(SOON * 5, guard.lost()).await.is_err());
    guard.release().await.unwrap();
    borrow_all(&pool).await;
}

/// An error is an answer too.
#[tokio::test]
async fn a_heartbeat_that_the_server_refuses_is_no_loss() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let pool = lenient_heartbeat().on(&db.pool(1).await).unwrap();
    let guard = Lock::new(&pool, 1).acquire().await.unwrap();
    replace_function(&mut admin, "clock_timestamp()", "BEGIN RAISE query_canceled; END").await;
    // As long as the bound of the heartbeat, and some.
    assert!(timeout(SOON * 4, guard.lost()).await.is_err());
    guard.release().await.unwrap();
}

/// The first two leave the lock alone, and only the crate's prepared statements and settings are gone.
#[tokio::test]
async fn a_session_survives_what_the_application_discards_on_its_connection() {
    for (discard, keeps) in [("DEALLOCATE ALL", true), ("RESET ALL", true), ("DISCARD ALL", false)]
    {
        let (_db, pool) = TestDb::with_pool(1).await;
        let mut lock = Lock::new(&slow_heartbeat().on(&pool).unwrap(), 1);
        for _ in 0..2 {
            lock.acquire().await.unwrap().release().await.unwrap();
        }
        let guard = lock.acquire().await.unwrap();
        let mut connection = guard.connection().await.unwrap();
        sqlx::raw_sql(discard).execute(&mut *connection).await.unwrap();
        drop(connection);
        if keeps {
            let beside = Lock::new(&guard, 2).acquire().await.unwrap();
            assert_eq!(beside.backend_pid(), guard.backend_pid(), "{discard}");
            beside.release().await.unwrap();
            guard.release().await.unwrap();
        } else {
            timeout(SOON * 20, guard.lost()).await.unwrap();
        }
    }
}

#[tokio::test]
async fn a_limit_on_idle_sessions_does_not_end_a_holder_and_is_put_back() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    if admin.server_version_num() < Some(140_000) {
        return;
    }
    let limit = format!("ALTER DATABASE {} SET idle_session_timeout = '2s'", db.name());
    sqlx::raw_sql(sqlx::AssertSqlSafe(limit)).execute(&mut admin).await.unwrap();
    let other_pool = db.pool(1).await;
    let held = Lock::new(&other_pool, 1).acquire().await.unwrap();
    let pool = db.pool(1).await;
    let mut lock = Lock::new(&pool, 1);
    assert!(lock.try_acquire().await.unwrap().is_none());

    // One lock is acquired at once, and one after a wait.
    let (waited, ()) = tokio::join!(lock.acquire(), async {
        sleep(SOON * 3).await;
        held.verify().await.unwrap();
        held.release().await.unwrap();
    });
    let guard = waited.unwrap();
    sleep(SOON * 3).await;
    guard.verify().await.unwrap();
    // The acquire of another lock on the same session finds the limit already lifted.
    let another = Lock::new(&guard, 2).acquire().await.unwrap();
    guard.release().await.unwrap();
    sleep(SOON * 3).await;
    another.verify().await.unwrap();
    another.release().await.unwrap();
    let guard = lock.acquire().await.unwrap();
    sleep(SOON * 3).await;
    guard.verify().await.unwrap();
    guard.release().await.unwrap();
    let shown: String =
        sqlx::query_scalar("SHOW idle_session_timeout").fetch_one(&pool).await.unwrap();
    assert_eq!(shown, "2s");
}

#[tokio::test]
async fn options_under_which_the_server_would_give_up_first_are_refused() {
    let (_db, pool) = TestDb::with_pool(1).await;
    let second = Duration::from_secs(1);
    let options = LockOptions::new().heartbeat_interval(second * 4).heartbeat_timeout(second * 4);
    let error = options.on(&pool).unwrap_err();
    let said = error.to_string();
    assert!(
        said.contains("heartbeat_timeout = 8s") && said.contains("keepalives_interval = 5s"),
        "{said}"
    );

    // A borrowed connection may have been idle when the link is cut, so only the keepalive probes count, with a second
    // to spare.
    let tight = LockOptions::new().heartbeat_interval(second).heartbeat_timeout(second);
    for (idle, interval, count, good) in [(9, 1, 2, false), (1, 1, 3, true), (1, 3, 1, true)] {
        let options = tight
            .clone()
            .keepalives_idle(second * idle)
            .keepalives_interval(second * interval)
            .keepalives_retries(count);
        assert_eq!(options.on(&pool).is_ok(), good, "{idle} {interval} {count}");
    }
}

/// The release waits for the connection that was borrowed, which breaks while it is being tidied.
#[tokio::test]
async fn a_session_that_breaks_while_its_release_waits_is_no_success() {
    let (_db, pool, mut admin) = TestDb::scene(2).await;
    let guard = Lock::new(&pool, 1).acquire().await.unwrap();
    let conn = guard.connection().await.unwrap();
    let pid = guard.backend_pid();
    terminate(&mut admin, pid).await;
    no_locks(&mut admin).await;

    drop(conn);
    let released = guard.release().await;
    assert!(matches!(released, Err(Error::Lost { .. })), "{released:?}");
}
