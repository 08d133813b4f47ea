//! Behind a pooler: in session mode, everything works; in transaction mode, no lock is granted silently.

use std::collections::BTreeMap;
use std::error::Error as _;
use std::time::{Duration, Instant};

use pglock::{Error, Lock, LockManager, Loss, Result, transaction};
use pglock_testkit::{PgBouncer, Server, TestDb, advisory_locks, amount, eventually};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{ConnectOptions, Connection, PgConnection, PgPool, Row};
use tokio::runtime::Builder;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::support::{
    TIMEOUT, borrow_all, execute, has_waiter, locks_are, pool_of, quick_heartbeat, report,
    several_heartbeats, spawn, terminate, waits_in_vain,
};

const KEY: &str = "nightly-report";
/// How long the search for a lock on a pooler's connection may take. The searches of a process take turns.
const SEARCHED: Duration = Duration::from_secs(70);
/// The sizes of sqlx's cache of prepared statements: with the cache, and without it.
const CACHES: [usize; 2] = [100, 0];

/// Other clients of the pooler, which run short transactions one after the other until they are dropped.
///
/// The clients sleep in their transactions. Otherwise they would take all of the machine's processors, and Linux 6.18
/// may then let a process that has just begun wait for seconds.
async fn busy(options: &PgConnectOptions, clients: usize) -> JoinSet<()> {
    let mut busy = JoinSet::new();
    for _ in 0..clients {
        let mut conn = options.connect().await.unwrap();
        busy.spawn(async move {
            loop {
                execute(&mut conn, "BEGIN; SELECT pg_sleep(0.001); COMMIT").await;
            }
        });
    }
    busy
}

/// `None` if the pooler was detected. Any other error fails the test.
fn is_found<T>(result: Result<T>) -> Option<T> {
    match result {
        Err(Error::NoExclusion { .. }) => None,
        other => Some(other.unwrap()),
    }
}

mod in_transaction_mode {
    use super::*;

    /// The number of poolers in a measurement, all of them new to the process.
    fn poolers() -> usize {
        amount(10, 30)
    }

    /// Acquires the lock. If the acquire does not detect the pooler, holds the lock until the pooler is detected.
    async fn hold(pool: &PgPool) -> &'static str {
        let mut lock = Lock::new(&quick_heartbeat().on(pool).unwrap(), KEY);
        let Some(guard) = is_found(lock.acquire().await) else { return "acquire" };
        if is_found(guard.verify().await).is_none() {
            return "verify";
        }
        let lost = timeout(TIMEOUT, guard.lost()).await.unwrap();
        if matches!(lost, Loss::Unresponsive) {
            // A pooler that is slow for a moment can't be distinguished from one that does not answer any more.
            return "silence";
        }
        assert!(matches!(lost, Loss::NoExclusion), "{lost:?}");
        assert!(is_found(guard.release().await).is_none());
        "heartbeat"
    }

    /// Acquires the lock, and releases it at once.
    async fn hold_shortly(pool: &PgPool) -> &'static str {
        let mut lock = Lock::new(pool, KEY);
        let Some(guard) = is_found(lock.acquire().await) else { return "acquire" };
        // By chance, the unlock may reach the server connection that has the lock. In that case, nothing was wrong.
        is_found(guard.release().await).map_or("release", |()| "nothing was wrong")
    }

    /// Uses poolers with this number of other clients, and prints at which step each pooler was detected.
    #[expect(clippy::print_stdout, reason = "a measurement is to be read")]
    ///
    /// `None` if there is no PgBouncer.
    async fn meet(clients: usize) -> Option<BTreeMap<&'static str, usize>> {
        let (server, db) = TestDb::with_server().await;
        let mut admin = db.admin().await;
        let mut total = BTreeMap::new();
        for cache in CACHES {
            let mut found = BTreeMap::<_, usize>::new();
            for round in 0..poolers() {
                let pooler = PgBouncer::start(&server, &[("pool_mode", "transaction")])?;
                let options = pooler.connect_options().database(db.name());
                let others = busy(&options, clients).await;
                let pool = pool_of(options.statement_cache_capacity(cache), 2).await;
                let when =
                    if round % 2 == 0 { hold(&pool).await } else { hold_shortly(&pool).await };
                *found.entry(when).or_default() += 1;
                *total.entry(when).or_default() += 1;
                // A caller that got the error holds no lock on any server connection.
                if when != "silence" {
                    locks_are(&mut admin, 0, TIMEOUT).await;
                }
                drop(others);
            }
            println!("a pooler with {clients} other clients, statement cache {cache}: {found:?}");
        }
        Some(total)
    }

    #[tokio::test]
    async fn an_idle_one_is_found_out_by_the_first_acquire() {
        let Some(found) = meet(0).await else { return };
        // Acquires wait for the proof for 250 ms; a busy machine may take longer.
        let by_acquire = found.get("acquire").copied().unwrap_or_default();
        assert!(by_acquire * 10 > poolers() * CACHES.len() * 9, "hardly by the acquire: {found:?}");
    }

    /// A transaction of one client keeps all other clients from the only server connection.
    #[tokio::test]
    async fn one_with_a_single_server_connection_is_found_out() {
        let (server, db) = TestDb::with_server().await;
        for cache in CACHES {
            let settings = [("pool_mode", "transaction"), ("default_pool_size", "1")];
            let Some(pooler) = PgBouncer::start(&server, &settings) else { return };
            let options = pooler.connect_options().database(db.name());
            let pool = pool_of(options.statement_cache_capacity(cache), 2).await;
            // Acquires wait for the proof for 250 ms; a busy machine may take longer.
            let is_refused =
                async || is_found(Lock::new(&pool, KEY).acquire().await.map(drop)).is_none();
            eventually("an acquire is refused", TIMEOUT, is_refused).await;
            locks_are(&mut db.admin().await, 0, TIMEOUT).await;
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_busy_one_is_found_out_before_a_lock_is_trusted_for_long() {
        let Some(found) = meet(4).await else { return };
        let by_acquire = found.get("acquire").copied().unwrap_or_default();
        assert!(by_acquire * 2 > poolers() * CACHES.len(), "hardly by the acquire: {found:?}");
    }

    /// Many tasks read a counter, then write it, each under a transaction-level lock.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn locks_of_a_transaction_exclude() {
        const TASKS: usize = 6;
        const ROUNDS: usize = 20;

        let (server, db) = TestDb::with_server().await;
        let mut admin = db.admin().await;
        execute(&mut admin, "CREATE TABLE counter AS SELECT 0 AS n").await;
        for cache in CACHES {
            let settings = [("pool_mode", "transaction"), ("default_pool_size", "4")];
            let Some(pooler) = PgBouncer::start(&server, &settings) else { return };
            let options = pooler.connect_options().database(db.name());
            let others = busy(&options, 4).await;
            execute(&mut admin, "UPDATE counter SET n = 0").await;
            let mut counting = JoinSet::new();
            for task in 0..TASKS {
                // Each task is a client of its own: the clients share only the pooler.
                let pool = pool_of(options.clone().statement_cache_capacity(cache), 1).await;
                counting.spawn(async move {
                    for round in 0..ROUNDS {
                        let mut tx = pool.begin().await.unwrap();
                        if (task + round) % 2 == 0 {
                            transaction::acquire(&mut tx, KEY).await.unwrap();
                        } else {
                            let wait = transaction::try_acquire_for(&mut tx, KEY, TIMEOUT);
                            assert!(wait.await.unwrap());
                        }
                        let read = sqlx::raw_sql("SELECT n FROM counter").fetch_one(&mut *tx).await;
                        let n: i32 = read.unwrap().get(0);
                        execute(&mut tx, &format!("UPDATE counter SET n = {}", n + 1)).await;
                        tx.commit().await.unwrap();
                    }
                });
            }
            while let Some(counted) = counting.join_next().await {
                counted.unwrap();
            }
            let read = sqlx::raw_sql("SELECT n FROM counter").fetch_one(&mut admin).await;
            let n: i32 = read.unwrap().get(0);
            assert_eq!(usize::try_from(n).unwrap(), TASKS * ROUNDS);
            locks_are(&mut admin, 0, TIMEOUT).await;
            drop(others);
        }
    }

    /// Clients share the server connections, so another client would see a setting that one client's wait has changed.
    #[tokio::test]
    async fn a_transaction_that_waited_leaves_no_setting() {
        let (server, db) = TestDb::with_server().await;
        let mut admin = db.admin().await;
        let limit = format!("ALTER DATABASE {} SET statement_timeout = '1min'", db.name());
        execute(&mut admin, &limit).await;
        let settings = [("pool_mode", "transaction"), ("default_pool_size", "1")];
        let Some(pooler) = PgBouncer::start(&server, &settings) else { return };
        let pool = pool_of(pooler.connect_options().database(db.name()), 1).await;
        let mut holder = db.pool(1).await.begin().await.unwrap();
        transaction::acquire(&mut holder, KEY).await.unwrap();

        let mut tx = pool.begin().await.unwrap();
        let moment = Duration::from_millis(50);
        assert!(!transaction::try_acquire_for(&mut tx, KEY, moment).await.unwrap());
        let (acquired, ()) = tokio::join!(transaction::acquire(&mut tx, KEY), async {
            locks_are(&mut admin, 2, TIMEOUT).await;
            holder.commit().await.unwrap();
        });
        acquired.unwrap();
        tx.commit().await.unwrap();

        // Another client uses the same server connection.
        let mut another = pooler.connect_options().database(db.name()).connect().await.unwrap();
        let shown = "SELECT current_setting('statement_timeout') || ' ' || \
                     current_setting('lock_timeout') || ' ' || \
                     coalesce(current_setting('pglock.granted', true), '') || \
                     coalesce(current_setting('pglock.statement_timeout', true), '')";
        let shown: String = sqlx::raw_sql(shown).fetch_one(&mut another).await.unwrap().get(0);
        assert_eq!(shown, "1min 0 ");
    }
}

/// The pooler changes its mode after the first check, so that no check detects it before the lock is acquired.
mod that_turns_from_session_to_transaction_mode {
    use super::*;

    /// The number of tries. In most of them, two server connections answer one client.
    fn tries() -> usize {
        amount(8, 20)
    }

    /// A busy pooler that passed the check before it changed to transaction mode, and a pool of one connection to it.
    ///
    /// `None` if there is no PgBouncer.
    async fn turned(
        server: &Server,
        db: &TestDb,
        cache: usize,
    ) -> Option<(PgBouncer, PgPool, JoinSet<()>)> {
        let settings = [("pool_mode", "session"), ("admin_users", "postgres")];
        let pooler = PgBouncer::start(server, &settings)?;
        let options = pooler.connect_options().database(db.name());
        let pool = pool_of(options.clone().statement_cache_capacity(cache), 1).await;
        Lock::new(&pool, KEY).acquire().await.unwrap().release().await.unwrap();
        let mut console = pooler.connect_options().database("pgbouncer").connect().await.unwrap();
        execute(&mut console, "SET pool_mode = 'transaction'").await;
        let others = busy(&options, 4).await;
        Some((pooler, pool, others))
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_lock_is_released_when_that_is_detected() {
        let (server, db) = TestDb::with_server().await;
        let mut count = 0;
        for cache in CACHES.into_iter().cycle().take(tries()) {
            let Some((_pooler, pool, _others)) = turned(&server, &db, cache).await else { return };
            let guard = is_found(Lock::new(&pool, KEY).acquire().await);
            let found = match &guard {
                Some(guard) => is_found(guard.verify().await).is_none(),
                None => true,
            };
            drop(guard);
            // The lock is released on the server connection that has it, which the pooler keeps open.
            locks_are(&mut db.admin().await, 0, SEARCHED).await;
            count += usize::from(found);
        }
        report(format!("found out {count} times of {}", tries()));
        assert!(count > 0);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_release_detects_it_and_releases_the_lock() {
        let (server, db) = TestDb::with_server().await;
        let mut count = 0;
        for cache in CACHES.into_iter().cycle().take(tries()) {
            let Some((pooler, pool, _others)) = turned(&server, &db, cache).await else { return };
            if let Some(guard) = is_found(Lock::new(&pool, KEY).acquire().await) {
                let mut another = Lock::new(&guard, "another");
                let another = is_found(another.acquire().await);
                // By chance, the unlock may reach the server connection that has the lock. In that case, nothing was
                // wrong.
                let released = guard.release().await;
                // The server session that the lock was left on is ended, and the guard may detect that first.
                let is_lost = matches!(&released, Err(Error::Lost { .. }));
                let is_closed =
                    matches!(&released, Err(Error::Lost { reason: Loss::Disconnected(_), .. }));
                if cache > 0 && is_closed {
                    // PgBouncer 1.21 and later closes a client that uses a statement prepared before the mode changed.
                    // It keeps the server connection, with the lock, so the lock ends only with the PgBouncer.
                    drop(pooler);
                }
                if is_lost || is_found(released).is_none() {
                    // Both locks were on that connection.
                    assert!(another.is_none_or(|guard| guard.is_lost()));
                    count += 1;
                }
            }
            // When a client connection is closed, the pooler keeps its server connection.
            locks_are(&mut db.admin().await, 0, SEARCHED).await;
        }
        report(format!("a release found out {count} times of {}", tries()));
        assert!(count > 0);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_heartbeat_detects_it_and_the_lock_is_released() {
        let (server, db) = TestDb::with_server().await;
        let mut count = 0;
        for _ in 0..tries() {
            let Some((_pooler, pool, _others)) = turned(&server, &db, 0).await else { return };
            let options = quick_heartbeat();
            let Some(guard) = is_found(Lock::new(&options.on(&pool).unwrap(), KEY).acquire().await)
            else {
                continue;
            };
            let loss = timeout(TIMEOUT, guard.lost()).await.unwrap();
            if matches!(loss, Loss::NoExclusion) {
                let another = Lock::new(&options.on(&pool).unwrap(), "another");
                assert!(is_found({ another }.acquire().await).is_none(), "granted after that");
                locks_are(&mut db.admin().await, 0, SEARCHED).await;
                count += 1;
            } else {
                // A pooler that is slow for a moment can't be distinguished from one that does not answer any more.
                assert!(matches!(loss, Loss::Unresponsive), "{loss:?}");
            }
        }
        report(format!("a heartbeat found out {count} times of {}", tries()));
        assert!(count > 0);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_wait_in_another_session_is_found_out() {
        let (server, db) = TestDb::with_server().await;
        let mut admin = db.admin().await;
        let mut count = 0;
        for _ in 0..tries() {
            // With a statement cache, a statement prepared on another server connection would reveal the pooler before
            // the wait.
            let Some((_pooler, pool, _others)) = turned(&server, &db, 0).await else { return };
            let held = Lock::new(&db.pool(1).await, KEY).acquire().await.unwrap();
            let mut lock = Lock::new(&pool, KEY);
            let (waited, ()) = tokio::join!(lock.acquire(), async {
                locks_are(&mut admin, 2, TIMEOUT).await;
                held.release().await.unwrap();
            });
            let found = matches!(&waited, Err(Error::NoExclusion { .. }));
            assert!(found || waited.is_ok(), "{waited:?}");
            if let Ok(guard) = waited {
                // The lock is on the session that the guard reports.
                let locks = advisory_locks(&mut admin).await;
                let pids: Vec<i32> = locks.iter().map(|lock| lock.pid).collect();
                assert_eq!(pids, [guard.backend_pid()]);
            }
            locks_are(&mut admin, 0, SEARCHED).await;
            count += usize::from(found);
        }
        report(format!("found out {count} times of {}", tries()));
        assert!(count > 0);
    }
}

/// A pooler in this mode refuses transactions, and the proof needs one.
#[tokio::test]
async fn one_in_statement_mode_is_found_out_by_the_first_acquire() {
    // Acquires wait for the proof for 250 ms; a busy machine may take longer.
    const POOLERS: usize = 5;

    let (server, db) = TestDb::with_server().await;
    let mut found = 0;
    for _ in 0..POOLERS {
        let settings = [("pool_mode", "statement")];
        let Some(pooler) = PgBouncer::start(&server, &settings) else { return };
        let pool = pool_of(pooler.connect_options().database(db.name()), 2).await;
        let is_refused =
            async || is_found(Lock::new(&pool, KEY).acquire().await.map(drop)).is_none();
        found += usize::from(is_refused().await);
        eventually("an acquire is refused", TIMEOUT, is_refused).await;
        locks_are(&mut db.admin().await, 0, TIMEOUT).await;
    }
    assert!(found > 0, "no first acquire was refused");
}

mod in_session_mode {
    use super::*;

    /// The pooler has as many server connections as the pool, so the monitor gets none while a session waits, and no
    /// heartbeat of that session is answered. The session holds no lock, so none can be lost.
    #[tokio::test]
    async fn a_manager_waits_longer_than_the_heartbeat_without_a_monitor() {
        let (server, db) = TestDb::with_server().await;
        let settings = [("pool_mode", "session"), ("default_pool_size", "2")];
        let Some(pooler) = PgBouncer::start(&server, &settings) else { return };
        let pool = pool_of(pooler.connect_options().database(db.name()), 2).await;
        let options = quick_heartbeat().reserve_connections(0).on(&pool).unwrap();
        let held = Lock::new(&db.pool(1).await, KEY).acquire().await.unwrap();

        let manager = LockManager::new(&options);
        // Both sessions of the manager are open during the wait below: this lock keeps the first one open.
        let other = Lock::new(&manager, "another").acquire().await.unwrap();
        let mut lock = Lock::new(&manager, KEY);
        let waiting = timeout(Duration::from_secs(5), lock.acquire()).await;
        assert!(waiting.is_err(), "the wait has ended: {waiting:?}");
        assert!(!other.is_lost());
        held.release().await.unwrap();
        timeout(TIMEOUT, lock.acquire()).await.unwrap().unwrap().release().await.unwrap();
        other.release().await.unwrap();
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn all_works() {
        let (server, db) = TestDb::with_server().await;
        let mut admin = db.admin().await;
        for cache in CACHES {
            let settings = [("pool_mode", "session")];
            let Some(pooler) = PgBouncer::start(&server, &settings) else { return };
            let options = pooler.connect_options().database(db.name());
            let others = busy(&options, 2).await;
            let pool = pool_of(options.statement_cache_capacity(cache), 3).await;
            let mut lock = Lock::new(&pool, KEY);
            let mut other = lock.clone();

            let guard = lock.acquire().await.unwrap();
            let stacked = lock.acquire().await.unwrap();
            assert!(other.try_acquire().await.unwrap().is_none());
            guard.verify().await.unwrap();
            assert!(guard.fencing_token().await.unwrap() > 0);
            let mut conn = guard.connection().await.unwrap();
            let pid = sqlx::raw_sql("SELECT pg_backend_pid()").fetch_one(&mut *conn).await.unwrap();
            assert_eq!(pid.get::<i32, _>(0), guard.backend_pid());
            drop(conn);

            // One wait is dropped, one times out, and one is granted. A second is long enough for the pool to return a
            // connection.
            let second = Duration::from_secs(1);
            timeout(second, other.acquire()).await.unwrap_err();
            locks_are(&mut admin, 1, TIMEOUT).await;
            waits_in_vain(second, async |time| other.try_acquire_for(time).await).await;
            guard.release().await.unwrap();
            let (waited, ()) = tokio::join!(other.acquire_shared(), async {
                locks_are(&mut admin, 2, TIMEOUT).await;
                stacked.release().await.unwrap();
            });
            let shared = waited.unwrap();
            shared.verify().await.unwrap();

            // A loss is reported.
            terminate(&mut admin, shared.backend_pid()).await;
            let lost = timeout(TIMEOUT, shared.lost()).await.unwrap();
            assert!(matches!(lost, Loss::Disconnected(_)), "{lost:?}");
            assert!(matches!(shared.release().await, Err(Error::Lost { .. })));

            lock.acquire().await.unwrap().release().await.unwrap();
            locks_are(&mut admin, 0, SEARCHED).await;
            borrow_all(&pool).await;
            drop(others);
        }
    }

    /// Starts a PgBouncer with this number of server connections, whose console admits the tests.
    ///
    /// `None` if there is no PgBouncer.
    fn start(server: &Server, connections: &str, more: &[(&str, &str)]) -> Option<PgBouncer> {
        let usual = [
            ("pool_mode", "session"),
            ("admin_users", "postgres"),
            ("default_pool_size", connections),
        ];
        PgBouncer::start(server, &[&usual, more].concat())
    }

    async fn console(pooler: &PgBouncer) -> PgConnection {
        pooler.connect_options().database("pgbouncer").connect().await.unwrap()
    }

    /// Waits until a list of the console shows a number for the database that meets the condition.
    async fn shows(
        console: &mut PgConnection,
        list: &'static str,
        db: &TestDb,
        column: &str,
        is_such: impl Fn(i32) -> bool,
    ) {
        let started = Instant::now();
        loop {
            let rows = sqlx::raw_sql(list).fetch_all(&mut *console).await.unwrap();
            let row = rows.iter().find(|row| row.get::<&str, _>("database") == db.name());
            // The console sends values of every type as text.
            let seen = row.map(|row| row.get_unchecked::<&str, _>(column).parse().unwrap());
            if seen.is_some_and(&is_such) {
                return;
            }
            assert!(started.elapsed() < TIMEOUT, "{column} is {seen:?}");
            sleep(Duration::from_millis(5)).await;
        }
    }

    /// A pool that connects when it is used.
    fn lazy_pool(options: PgConnectOptions) -> PgPool {
        PgPoolOptions::new().max_connections(1).connect_lazy_with(options)
    }

    #[tokio::test]
    async fn a_full_one_lets_an_acquire_wait() {
        let (server, db) = TestDb::with_server().await;
        let Some(pooler) = start(&server, "1", &[]) else { return };
        let options = pooler.connect_options().database(db.name());
        let mut console = console(&pooler).await;
        let mut other = options.connect().await.unwrap();
        execute(&mut other, "SELECT 1").await;

        let mut lock = Lock::new(&lazy_pool(options), KEY);
        let (acquired, ()) = tokio::join!(lock.acquire(), async {
            shows(&mut console, "SHOW POOLS", &db, "cl_waiting", |clients| clients > 0).await;
            locks_are(&mut db.admin().await, 0, SEARCHED).await;
            other.close().await.unwrap();
        });
        let guard = acquired.unwrap();
        guard.verify().await.unwrap();
        guard.release().await.unwrap();
    }

    #[tokio::test]
    async fn a_full_one_that_ends_its_clients_fails_an_acquire() {
        let (server, db) = TestDb::with_server().await;
        let Some(pooler) = start(&server, "1", &[("query_wait_timeout", "1")]) else { return };
        let options = pooler.connect_options().database(db.name());
        let mut other = options.connect().await.unwrap();
        execute(&mut other, "SELECT 1").await;

        let mut lock = Lock::new(&lazy_pool(options), KEY);
        let error = lock.acquire().await.unwrap_err();
        assert!(error.is_transient(), "{error:?}");
        let cause = error.source().unwrap().to_string();
        assert!(cause.contains("query_wait_timeout"), "{cause}");
        other.close().await.unwrap();
        lock.acquire().await.unwrap().release().await.unwrap();
    }

    #[tokio::test]
    async fn a_restart_loses_what_is_held_and_the_next_acquire_works() {
        let (server, db) = TestDb::with_server().await;
        let mut admin = db.admin().await;
        let Some(mut pooler) = start(&server, "10", &[]) else { return };
        let pool = pool_of(pooler.connect_options().database(db.name()), 3).await;
        let mut lock = Lock::new(&quick_heartbeat().on(&pool).unwrap(), KEY);
        let mut other = lock.clone();
        let guard = lock.acquire().await.unwrap();
        several_heartbeats(&mut admin, guard.backend_pid()).await;

        let (waited, ()) = tokio::join!(other.acquire(), async {
            has_waiter(&mut admin).await;
            pooler.restart();
        });
        assert!(waited.as_ref().is_err_and(Error::is_transient), "{waited:?}");
        let lost = timeout(TIMEOUT, guard.lost()).await.unwrap();
        assert!(matches!(lost, Loss::Disconnected(_)), "{lost:?}");
        assert!(matches!(guard.release().await, Err(Error::Lost { .. })));
        locks_are(&mut admin, 0, SEARCHED).await;
        for lock in [&mut lock, &mut other] {
            let guard = lock.acquire().await.unwrap();
            guard.verify().await.unwrap();
            guard.release().await.unwrap();
        }
    }

    /// Existing sessions of clients continue. A client that connects during the pause waits for its end.
    #[tokio::test]
    async fn a_pause_ends_nothing_and_delays_new_sessions() {
        let (server, db) = TestDb::with_server().await;
        let mut admin = db.admin().await;
        let Some(pooler) = start(&server, "10", &[]) else { return };
        let through = pooler.connect_options().database(db.name());
        let pool = pool_of(through.clone(), 3).await;
        let mut lock = Lock::new(&quick_heartbeat().on(&pool).unwrap(), KEY);
        let mut waiter = lock.clone();
        let mut late = Lock::new(&lazy_pool(through), KEY);
        let guard = lock.acquire().await.unwrap();
        several_heartbeats(&mut admin, guard.backend_pid()).await;

        let mut pausing = console(&pooler).await;
        let mut console = console(&pooler).await;
        let waiting = spawn(async move { waiter.acquire().await });
        has_waiter(&mut admin).await;
        // `PAUSE` returns when the last client has disconnected.
        let pause = format!("PAUSE {}", db.name());
        let pausing = spawn(async move { execute(&mut pausing, pause).await });
        shows(&mut console, "SHOW DATABASES", &db, "paused", |paused| paused == 1).await;

        // The holder still holds its lock, and another lock on its session is granted.
        several_heartbeats(&mut admin, guard.backend_pid()).await;
        guard.verify().await.unwrap();
        let another = Lock::new(&guard, "another").acquire().await.unwrap();
        another.release().await.unwrap();
        // The waiter keeps its session, too.
        guard.release().await.unwrap();
        let guard = timeout(TIMEOUT, waiting).await.unwrap().unwrap().unwrap();
        guard.verify().await.unwrap();

        // A new client waits in the pooler, without a server connection.
        let acquiring = spawn(async move { late.acquire().await });
        shows(&mut console, "SHOW POOLS", &db, "cl_waiting", |clients| clients > 0).await;
        assert_eq!(pids(&mut admin).await, [guard.backend_pid()]);
        guard.release().await.unwrap();
        locks_are(&mut admin, 0, SEARCHED).await;
        assert!(!acquiring.is_finished() && !pausing.is_finished());

        execute(&mut console, format!("RESUME {}", db.name())).await;
        let guard = timeout(TIMEOUT, acquiring).await.unwrap().unwrap().unwrap();
        assert_eq!(pids(&mut admin).await, [guard.backend_pid()]);
        guard.verify().await.unwrap();
        guard.release().await.unwrap();
        pausing.abort();
    }

    /// The backends that hold or wait for an advisory lock.
    async fn pids(admin: &mut PgConnection) -> Vec<i32> {
        advisory_locks(admin).await.iter().map(|lock| lock.pid).collect()
    }

    #[tokio::test]
    async fn a_reconnect_ends_a_held_lock_only_with_its_client() {
        let (server, db) = TestDb::with_server().await;
        let mut admin = db.admin().await;
        let Some(pooler) = start(&server, "10", &[]) else { return };
        let through = pooler.connect_options().database(db.name());
        let pool = pool_of(through.clone(), 2).await;
        let guard = Lock::new(&quick_heartbeat().on(&pool).unwrap(), KEY).acquire().await.unwrap();
        let pid = guard.backend_pid();
        execute(&mut console(&pooler).await, "RECONNECT").await;

        several_heartbeats(&mut admin, pid).await;
        guard.verify().await.unwrap();
        let mut other = Lock::new(&lazy_pool(through), KEY);
        assert!(other.try_acquire().await.unwrap().is_none());
        guard.release().await.unwrap();
        pool.close().await;
        let ended = async || {
            let there = "SELECT count(*) FROM pg_stat_activity WHERE pid = $1";
            let there = sqlx::query_scalar::<_, i64>(there).bind(pid);
            there.fetch_one(&mut db.admin().await).await.unwrap() == 0
        };
        eventually("the server connection is closed", TIMEOUT, ended).await;
        other.acquire().await.unwrap().release().await.unwrap();
    }

    /// When a process ends, its sockets are closed, and it sends nothing to the server.
    #[tokio::test]
    async fn the_reset_query_releases_the_lock_of_a_client_that_dies() {
        let (server, db) = TestDb::with_server().await;
        let mut admin = db.admin().await;
        for (reset, left) in [("DISCARD ALL", 0), ("", 1)] {
            let more = [("server_reset_query", reset)];
            let Some(pooler) = start(&server, "10", &more) else { return };
            let options = pooler.connect_options().database(db.name());
            let client = std::thread::spawn(|| {
                let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build();
                let runtime = runtime.unwrap();
                let mut lock = runtime.block_on(async { Lock::new(&lazy_pool(options), KEY) });
                let guard = runtime.block_on(lock.acquire()).unwrap();
                drop(runtime);
                assert!(guard.is_lost());
            });
            client.join().unwrap();
            let mut console = console(&pooler).await;
            shows(&mut console, "SHOW POOLS", &db, "cl_active", |clients| clients == 0).await;
            locks_are(&mut admin, left, TIMEOUT).await;
            let free = Lock::new(&db.pool(1).await, KEY).try_acquire().await.unwrap();
            assert_eq!(free.is_some(), left == 0);
        }
    }
}
