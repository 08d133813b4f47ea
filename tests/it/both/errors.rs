//! Each failure has a variant and a message that says what to do, and leaves nothing behind.

use std::collections::BTreeSet;
use std::net::TcpListener;
use std::time::{Duration, Instant};

use pglock::{Error, ExclusiveGuard, Lock, LockOptions, Loss, SharedGuard};
use pglock_testkit::{Environment, Server, Shutdown, TestDb, advisory_locks};
use sqlx::postgres::PgConnectOptions;
use sqlx::{AssertSqlSafe, PgConnection, PgPool};
use tokio::time::{sleep, timeout};

use super::{new_lock, new_lock_with};
use crate::errors::{
    KEY, MOMENT, becomes, has_a_clear_message, is_deadlock, is_exhausted, lazy, nothing_is_left,
    one_connection, works,
};
use crate::support::{TIMEOUT, all_are_idle, borrow_all, execute};

mod connecting {
    use super::*;

    async fn fails(pool: PgPool, transient: bool) -> Error {
        let mut lock = new_lock(&pool, KEY);
        let mut failure = None;
        for limit in [None, Some(Duration::ZERO), Some(TIMEOUT)] {
            let error = match limit {
                None => lock.acquire().await.unwrap_err(),
                Some(Duration::ZERO) => lock.try_acquire().await.unwrap_err(),
                Some(limit) => lock.try_acquire_shared_for(limit).await.unwrap_err(),
            };
            assert!(matches!(error, Error::Connect { .. }), "{error:?}");
            has_a_clear_message(&error, "check its address, that it runs, and the login");
            assert_eq!(error.is_transient(), transient, "{error:?}");
            assert_eq!(pool.num_idle(), 0);
            failure = Some(error);
        }
        failure.unwrap()
    }

    #[tokio::test]
    async fn to_a_socket_that_is_not_there() {
        let options = PgConnectOptions::new_without_pgpass().username("postgres");
        fails(lazy(options.socket("/nonexistent/pglock").port(5432), MOMENT), true).await;
    }

    #[tokio::test]
    async fn to_a_closed_port() {
        // The port was free a moment ago.
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let options = PgConnectOptions::new_without_pgpass().username("postgres");
        let options = options.host("127.0.0.1").port(port);
        fails(lazy(options.clone(), MOMENT), true).await;
        // The caller's timeout ends before the pool's, and the pool has room for a connection.
        let error = new_lock(&lazy(options, TIMEOUT), KEY).try_acquire_for(MOMENT).await;
        assert!(matches!(error, Err(Error::Connect { .. })), "{error:?}");
    }

    #[tokio::test]
    async fn with_a_wrong_password() {
        let server = Server::options().tcp().hba("host all all all scram-sha-256").start();
        let db = TestDb::on(&server).await;
        let mut admin = db.admin().await;
        let password = "SET password_encryption = 'scram-sha-256'; \
                        ALTER ROLE postgres PASSWORD 'right'";
        execute(&mut admin, password.to_owned()).await;
        let options = server.tcp_options().database(db.name());

        let error = fails(lazy(options.clone().password("wrong"), TIMEOUT), false).await;
        let Error::Connect { source, .. } = error else { panic!("{error:?}") };
        assert_eq!(source.as_database_error().unwrap().code().unwrap(), "28P01");
        becomes(&mut admin, 0, 0).await;
        works(&mut new_lock(&lazy(options.password("right"), TIMEOUT), KEY)).await;
    }

    /// When a server that was down is up again, the handle needs no help.
    #[tokio::test]
    async fn while_the_server_is_down() {
        let (server, db) = TestDb::with_server().await;
        let pool = lazy(db.options(), Environment::current().limit(MOMENT));
        // On a busy machine, connecting takes longer than the pool allows.
        borrow_all(&pool).await;
        all_are_idle(&pool).await;
        let mut lock = new_lock(&pool, KEY);
        works(&mut lock).await;
        all_are_idle(&pool).await;

        server.stop(Shutdown::Fast);
        let error = lock.acquire().await.unwrap_err();
        assert!(matches!(error, Error::Connect { .. }), "{error:?}");
        assert!(error.is_transient());
        server.restart();
        let works_again = async {
            while let Err(error) = lock.acquire().await.map(drop) {
                assert!(error.is_transient(), "{error:?}");
            }
        };
        timeout(TIMEOUT, works_again).await.unwrap();
        nothing_is_left(&mut db.admin().await, &pool).await;
    }
}

mod the_pool {
    use super::*;

    #[tokio::test]
    async fn is_exhausted_when_its_own_time_runs_out() {
        let db = TestDb::new().await;
        let pool = one_connection(&db, MOMENT).await;
        let mut lock = new_lock(&pool, KEY);
        let taken = pool.acquire().await.unwrap();

        is_exhausted(&lock.acquire().await.unwrap_err());
        is_exhausted(&lock.try_acquire().await.unwrap_err());
        is_exhausted(&lock.acquire_shared().await.unwrap_err());
        drop(taken);
        works(&mut lock).await;
        nothing_is_left(&mut db.admin().await, &pool).await;
    }

    /// `None` would mean that another session holds the lock, but the server was never asked for the lock.
    #[tokio::test]
    async fn is_exhausted_when_the_callers_time_runs_out() {
        let db = TestDb::new().await;
        let pool = one_connection(&db, Duration::from_mins(5)).await;
        let mut lock = new_lock(&pool, KEY);
        let taken = pool.acquire().await.unwrap();

        let asked = timeout(TIMEOUT, lock.try_acquire_for(MOMENT)).await;
        is_exhausted(&asked.expect("the caller's timeout counts").unwrap_err());
        let asked = timeout(TIMEOUT, lock.try_acquire_shared_for(MOMENT)).await;
        is_exhausted(&asked.expect("the caller's timeout counts").unwrap_err());
        drop(taken);
        works(&mut lock).await;
        nothing_is_left(&mut db.admin().await, &pool).await;
    }

    #[tokio::test]
    async fn is_closed() {
        let db = TestDb::new().await;
        let pool = one_connection(&db, TIMEOUT).await;
        let mut lock = new_lock(&pool, KEY);
        works(&mut lock).await;
        timeout(TIMEOUT, pool.close()).await.expect("nothing keeps the pool from closing");

        for error in [
            lock.acquire().await.unwrap_err(),
            lock.try_acquire().await.unwrap_err(),
            lock.try_acquire_for(MOMENT).await.unwrap_err(),
        ] {
            assert!(matches!(error, Error::PoolClosed { .. }), "{error:?}");
            has_a_clear_message(&error, "the pool is closed; acquire before it is closed");
            assert!(!error.is_transient());
        }
        becomes(&mut db.admin().await, 0, 0).await;
    }
}

mod waiting {
    use super::*;

    struct Scene {
        db: TestDb,
        admin: PgConnection,
        pool: PgPool,
        lock: Lock,
    }

    impl Scene {
        async fn new() -> Self {
            let db = TestDb::new().await;
            let (admin, pool) = (db.admin().await, db.pool(2).await);
            let lock = new_lock(&pool, KEY);
            Self { db, admin, pool, lock }
        }

        /// Waits behind another service, and runs `statement` against the waiting backend.
        async fn struck_by(&mut self, statement: &str) -> Error {
            let holder = new_lock(&self.db.pool(1).await, KEY).acquire().await.unwrap();
            let admin = &mut self.admin;
            let (failed, ()) = tokio::join!(timeout(TIMEOUT, self.lock.acquire()), async {
                let waiter = becomes(admin, 1, 1).await.remove(0);
                execute(admin, format!("SELECT {statement}({waiter})")).await;
            });
            let error = failed.unwrap().unwrap_err();
            becomes(admin, 1, 0).await;
            holder.release().await.unwrap();
            error
        }
    }

    #[tokio::test]
    async fn is_disconnected_when_its_backend_is_killed() {
        let mut scene = Scene::new().await;
        let error = scene.struck_by("pg_terminate_backend").await;
        assert!(matches!(error, Error::Disconnected { .. }), "{error:?}");
        has_a_clear_message(&error, "acquire again");
        assert!(error.is_transient());

        works(&mut scene.lock).await;
        nothing_is_left(&mut scene.admin, &scene.pool).await;
    }

    #[tokio::test]
    async fn is_cancelled_by_an_administrator() {
        let mut scene = Scene::new().await;
        let error = scene.struck_by("pg_cancel_backend").await;
        assert!(matches!(error, Error::Cancelled { .. }), "{error:?}");
        has_a_clear_message(&error, "acquire again if the lock is still wanted");
        assert!(error.is_transient());

        works(&mut scene.lock).await;
        nothing_is_left(&mut scene.admin, &scene.pool).await;
    }

    #[tokio::test]
    async fn fails_when_the_server_goes_away() {
        let (server, db) = TestDb::with_server().await;
        let pool = lazy(db.options(), TIMEOUT);
        let mut lock = new_lock(&pool, KEY);
        let mut admin = db.admin().await;
        execute(&mut admin, "SELECT pg_advisory_lock_shared(1)".to_owned()).await;
        let mut holder = new_lock(&lazy(db.options(), TIMEOUT), KEY);
        let guard = holder.acquire().await.unwrap();

        let (failed, ()) = tokio::join!(timeout(TIMEOUT, lock.acquire()), async {
            becomes(&mut admin, 2, 1).await;
            server.stop(Shutdown::Immediate);
        });
        let error = failed.unwrap().unwrap_err();
        assert!(matches!(error, Error::Disconnected { .. }), "{error:?}");
        assert!(error.is_transient());
        let lost = guard.release().await.unwrap_err();
        assert!(matches!(lost, Error::Lost { reason: Loss::Disconnected(_), .. }), "{lost:?}");
        has_a_clear_message(&lost, "stop what it protects, then acquire again");

        server.restart();
        works(&mut lock).await;
        works(&mut holder).await;
        nothing_is_left(&mut db.admin().await, &pool).await;
    }
}

mod deadlock {
    use super::*;

    /// Waits for an upgrade. If it fails because of the deadlock, releases the shared lock.
    async fn upgrade(mut lock: Lock, shared: SharedGuard) -> (Lock, Result<ExclusiveGuard, Error>) {
        let upgraded = timeout(TIMEOUT, lock.acquire()).await.unwrap();
        if upgraded.is_err() {
            // The failed upgrade has not released the shared lock.
            let still_shared = lock.try_acquire_shared().await.unwrap().unwrap();
            assert_eq!(still_shared.backend_pid(), shared.backend_pid());
            still_shared.release().await.unwrap();
            shared.release().await.unwrap();
        } else {
            shared.release().await.unwrap();
        }
        (lock, upgraded)
    }

    /// Two shared holders wait for an upgrade: one fails, and the other is upgraded.
    #[tokio::test]
    async fn between_two_sharers_hits_exactly_one() {
        let (_db, pool, mut admin) = TestDb::scene(2).await;
        let mut one = new_lock(&pool, KEY);
        let mut two = one.clone();
        let shared_one = one.acquire_shared().await.unwrap();
        let shared_two = two.acquire_shared().await.unwrap();

        let ((mut one, got_one), (mut two, got_two)) =
            tokio::join!(upgrade(one, shared_one), upgrade(two, shared_two));
        match (got_one, got_two) {
            (Ok(guard), Err(error)) | (Err(error), Ok(guard)) => {
                is_deadlock(&error);
                becomes(&mut admin, 1, 0).await;
                guard.release().await.unwrap();
            }
            both => panic!("exactly one must give way: {both:?}"),
        }
        works(&mut one).await;
        works(&mut two).await;
        nothing_is_left(&mut admin, &pool).await;
    }
}

/// A server with a full lock table refuses an acquire, keeps nothing of it, and grants locks again once there is room.
#[tokio::test]
async fn a_full_lock_table_is_out_of_locks() {
    let server = Server::options()
        .setting("max_connections", "10")
        .setting("max_locks_per_transaction", "10")
        .start();
    let db = TestDb::on(&server).await;
    let pool = db.pool(2).await;
    let mut lock = new_lock(&pool, KEY);
    // While the table is full, a new connection could not even log in.
    borrow_all(&pool).await;
    let mut filler = db.admin().await;
    let lock_many = "SELECT count(pg_advisory_lock(n)) FROM generate_series(1, 1000000) n";
    let full = sqlx::raw_sql(lock_many).execute(&mut filler).await.unwrap_err();
    assert_eq!(full.as_database_error().unwrap().code().unwrap(), "53200");
    for error in [
        lock.acquire().await.unwrap_err(),
        lock.try_acquire().await.unwrap_err(),
        lock.acquire_shared().await.unwrap_err(),
        lock.try_acquire_for(TIMEOUT).await.unwrap_err(),
    ] {
        assert!(matches!(error, Error::OutOfLocks { .. }), "{error:?}");
        has_a_clear_message(&error, "raise max_locks_per_transaction or max_connections");
        assert!(error.is_transient());
    }
    // The filler makes room for a query, which shows that no other session holds a lock.
    execute(&mut filler, "SELECT pg_advisory_unlock(n) FROM generate_series(1, 20) n".to_owned())
        .await;
    let locks = advisory_locks(&mut filler).await;
    let holders: BTreeSet<_> = locks.iter().map(|lock| lock.pid).collect();
    assert_eq!(holders.len(), 1);

    execute(&mut filler, "SELECT pg_advisory_unlock_all()".to_owned()).await;
    works(&mut lock).await;
    nothing_is_left(&mut filler, &pool).await;
}

/// Limits that a role or a database sets for its statements are not meant for locks. The crate lifts them while it
/// waits for a lock, and only then.
mod a_wait_outlasts {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(2);

    async fn wait_longer_than(setting: &str, since: i32) {
        let db = TestDb::new().await;
        let mut admin = db.admin().await;
        let version: String =
            sqlx::query_scalar("SHOW server_version_num").fetch_one(&mut admin).await.unwrap();
        if version.parse::<i32>().unwrap() < since {
            return;
        }
        let mut holder = db.admin().await;
        let key = sqlx::postgres::PgAdvisoryLock::new(KEY).key().as_bigint().unwrap();
        execute(&mut holder, format!("SELECT pg_advisory_lock({key})")).await;
        // From now on every new connection has the limit.
        let set = format!("ALTER DATABASE {} SET {setting} = '{LIMIT:?}'", db.name());
        execute(&mut admin, set).await;
        let pool = db.pool(1).await;
        let mut lock = new_lock(&pool, KEY);

        let (waited, ()) = tokio::join!(timeout(TIMEOUT, lock.acquire()), async {
            becomes(&mut admin, 1, 1).await;
            // The test waits for no event here: it lets the limit pass.
            sleep(LIMIT * 2).await;
            execute(&mut holder, format!("SELECT pg_advisory_unlock({key})")).await;
        });
        let guard = waited.unwrap().unwrap();
        let pid = guard.backend_pid();
        guard.release().await.unwrap();

        let mut conn = pool.acquire().await.unwrap();
        let show: AssertSqlSafe<String> = AssertSqlSafe(format!("SHOW {setting}"));
        let shown: String = sqlx::query_scalar(show).fetch_one(&mut *conn).await.unwrap();
        assert_eq!(shown, format!("{LIMIT:?}"));
        let same: i32 = sqlx::query_scalar("SELECT pg_catalog.pg_backend_pid()")
            .fetch_one(&mut *conn)
            .await
            .unwrap();
        assert_eq!(same, pid, "the connection that waited is in the pool again");
        drop(conn);
        becomes(&mut admin, 0, 0).await;
    }

    #[tokio::test]
    async fn statement_timeout() {
        wait_longer_than("statement_timeout", 0).await;
    }

    #[tokio::test]
    async fn lock_timeout() {
        wait_longer_than("lock_timeout", 0).await;
    }

    #[tokio::test]
    async fn idle_in_transaction_session_timeout() {
        wait_longer_than("idle_in_transaction_session_timeout", 0).await;
    }

    #[tokio::test]
    async fn idle_session_timeout() {
        wait_longer_than("idle_session_timeout", 140_000).await;
    }

    #[tokio::test]
    async fn transaction_timeout() {
        wait_longer_than("transaction_timeout", 170_000).await;
    }

    /// One wait has no bound, and one has a bound.
    #[tokio::test]
    async fn several_slices_of_its_own() {
        const ANOTHER: i64 = 1;
        let db = TestDb::new().await;
        let mut admin = db.admin().await;
        let [pool, bounded_pool] = [db.pool(1).await, db.pool(1).await];
        let [other, another] = [db.pool(1).await, db.pool(1).await];
        let guard = new_lock(&other, KEY).acquire().await.unwrap();
        let another = new_lock(&another, ANOTHER).acquire().await.unwrap();
        let options = LockOptions::new().wait_slice(Duration::from_secs(2));
        let mut lock = new_lock_with(&options, &pool, KEY);
        let mut bounded = new_lock_with(&options, &bounded_pool, ANOTHER);
        let waits = async { tokio::join!(lock.acquire(), bounded.try_acquire_for(TIMEOUT)) };
        let (waited, ()) = tokio::join!(timeout(TIMEOUT, waits), async {
            becomes(&mut admin, 2, 2).await;
            sleep(Duration::from_millis(4500)).await;
            guard.release().await.unwrap();
            another.release().await.unwrap();
        });
        let (waited, bounded) = waited.unwrap();
        waited.unwrap().release().await.unwrap();
        bounded.unwrap().expect("the lock came free in time").release().await.unwrap();
        for pool in [&pool, &bounded_pool] {
            nothing_is_left(&mut admin, pool).await;
        }
    }
}

mod a_dead_idle_connection_is_replaced {
    use super::*;

    #[tokio::test]
    async fn when_an_administrator_has_killed_all() {
        let (_db, pool, mut admin) = TestDb::scene(3).await;
        let mut lock = new_lock(&pool, KEY);
        let before = borrow_all(&pool).await;
        all_are_idle(&pool).await;
        execute(
            &mut admin,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
             WHERE datname = current_database() AND pid <> pg_backend_pid()"
                .to_owned(),
        )
        .await;

        let alive = "SELECT count(*) FROM pg_stat_activity WHERE pid = ANY($1)";
        let started = Instant::now();
        while sqlx::query_scalar::<_, i64>(alive).bind(&before).fetch_one(&mut admin).await.unwrap()
            > 0
        {
            assert!(started.elapsed() < TIMEOUT, "the backends still live");
        }

        let guard = timeout(TIMEOUT, lock.try_acquire()).await.unwrap().unwrap().unwrap();
        assert!(!before.contains(&guard.backend_pid()));
        guard.release().await.unwrap();
        nothing_is_left(&mut admin, &pool).await;
    }

    #[tokio::test]
    async fn after_a_restart_of_the_server() {
        let (server, db) = TestDb::with_server().await;
        let pool = db.pool(3).await;
        let mut lock = new_lock(&pool, KEY);
        borrow_all(&pool).await;
        all_are_idle(&pool).await;
        server.restart();
        works(&mut lock).await;
        nothing_is_left(&mut db.admin().await, &pool).await;
    }
}
