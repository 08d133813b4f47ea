//! Transaction-level locks: the end of the transaction releases them, and they change nothing else in it.

use std::time::{Duration, Instant};

use pglock::{Error, Key, Lock, Result, transaction};
use pglock_testkit::{Server, Shutdown, TestDb, advisory_locks, amount, cancel_after, eventually};
use sqlx::{Acquire, PgConnection, PgPool, Postgres, Transaction};
use tokio::time::{sleep, timeout};

use crate::support::{
    SOON, TIMEOUT, ask, borrow_all, dropped_at, execute, locks_are, no_locks, pool_of,
    with_statement_statistics,
};

const KEY: &str = "ledger";
/// The timeout of a wait that is meant to time out.
const MOMENT: Duration = Duration::from_millis(100);

type Tx = Transaction<'static, Postgres>;

/// The six ways to acquire, by number; `true` if the lock was acquired.
async fn acquire_in_way(way: usize, tx: &mut Tx, limit: Duration) -> Result<bool> {
    match way {
        0 => transaction::acquire(tx, KEY).await.map(|()| true),
        1 => transaction::try_acquire(tx, KEY).await,
        2 => transaction::try_acquire_for(tx, KEY, limit).await,
        3 => transaction::acquire_shared(tx, KEY).await.map(|()| true),
        4 => transaction::try_acquire_shared(tx, KEY).await,
        _ => transaction::try_acquire_shared_for(tx, KEY, limit).await,
    }
}

async fn count_locks(conn: &mut PgConnection) -> String {
    let mine = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted \
                AND pid = pg_backend_pid()";
    ask(conn, mine).await
}

fn sqlstate(error: &sqlx::Error) -> Option<String> {
    Some(error.as_database_error()?.code()?.into_owned())
}

#[tokio::test]
async fn every_way_holds_until_the_transaction_ends() {
    let (_db, pool, mut admin) = TestDb::scene(2).await;
    for way in 0..6 {
        for end in ["commit", "rollback", "drop"] {
            let mut tx = pool.begin().await.unwrap();
            assert!(acquire_in_way(way, &mut tx, TIMEOUT).await.unwrap());
            let locks = advisory_locks(&mut admin).await;
            let mode = if way < 3 { "ExclusiveLock" } else { "ShareLock" };
            let modes: Vec<_> = locks.iter().map(|lock| lock.mode.as_str()).collect();
            assert_eq!(modes, [mode], "way {way}");
            match end {
                "commit" => tx.commit().await.unwrap(),
                "rollback" => tx.rollback().await.unwrap(),
                _ => drop(tx),
            }
            no_locks(&mut admin).await;
        }
    }
    borrow_all(&pool).await;
}

#[tokio::test]
async fn a_holder_excludes_every_other_session() {
    let (_db, pool) = TestDb::with_pool(3).await;
    for key in [Key::from("ledger"), Key::from(i64::MIN), Key::from((-1, 7))] {
        let mut lock = Lock::new(&pool, &key);
        let mut tx = pool.begin().await.unwrap();
        let mut other = pool.begin().await.unwrap();

        transaction::acquire(&mut tx, &key).await.unwrap();
        assert!(lock.try_acquire_shared().await.unwrap().is_none());
        assert!(!transaction::try_acquire_shared(&mut other, &key).await.unwrap());
        // The session owns the lock, so it can acquire it again.
        assert!(transaction::try_acquire(&mut tx, &key).await.unwrap());
        tx.rollback().await.unwrap();

        let guard = lock.acquire_shared().await.unwrap();
        assert!(transaction::try_acquire_shared(&mut other, &key).await.unwrap());
        assert!(!transaction::try_acquire(&mut other, &key).await.unwrap());
        assert!(!transaction::try_acquire_for(&mut other, &key, MOMENT).await.unwrap());
        guard.release().await.unwrap();
        assert!(transaction::try_acquire(&mut other, &key).await.unwrap());
        other.rollback().await.unwrap();
    }
}

#[tokio::test]
async fn a_wait_ends_when_the_holder_commits() {
    let (_db, pool, mut admin) = TestDb::scene(2).await;
    for way in [0, 2, 3, 5] {
        let mut holder = pool.begin().await.unwrap();
        transaction::acquire(&mut holder, KEY).await.unwrap();
        let mut tx = pool.begin().await.unwrap();
        let (granted, ()) = tokio::join!(acquire_in_way(way, &mut tx, TIMEOUT), async {
            locks_are(&mut admin, 2, TIMEOUT).await;
            holder.commit().await.unwrap();
        });
        assert!(granted.unwrap());
        // The lock was granted inside a subtransaction, and belongs to the whole transaction.
        let modes: Vec<_> =
            advisory_locks(&mut tx).await.into_iter().map(|lock| lock.mode).collect();
        assert_eq!(modes, [if way < 3 { "ExclusiveLock" } else { "ShareLock" }], "way {way}");
        tx.commit().await.unwrap();
        no_locks(&mut admin).await;
    }
}

#[tokio::test]
async fn rolling_back_to_a_savepoint_releases_what_was_acquired_after_it() {
    let (_db, pool, mut admin) = TestDb::scene(2).await;
    for busy in [false, true] {
        let mut tx = pool.begin().await.unwrap();
        transaction::acquire(&mut tx, 1).await.unwrap();
        for commit in [false, true] {
            let mut holder = pool.begin().await.unwrap();
            if busy {
                transaction::acquire(&mut holder, KEY).await.unwrap();
            }
            let mut nested = tx.begin().await.unwrap();
            let (acquired, ()) = tokio::join!(transaction::acquire(&mut nested, KEY), async {
                if busy {
                    locks_are(&mut admin, 3, TIMEOUT).await;
                }
                holder.rollback().await.unwrap();
            });
            acquired.unwrap();
            assert_eq!(count_locks(&mut nested).await, "2");
            if commit {
                nested.commit().await.unwrap();
                assert_eq!(count_locks(&mut tx).await, "2");
            } else {
                nested.rollback().await.unwrap();
                assert_eq!(count_locks(&mut tx).await, "1");
            }
        }
        tx.commit().await.unwrap();
        no_locks(&mut admin).await;
    }
}

#[tokio::test]
async fn a_wait_that_runs_out_leaves_the_transaction_usable_and_the_log_empty() {
    let (server, db) = TestDb::with_server().await;
    let mut admin = db.admin().await;
    let pool = db.pool(2).await;
    execute(&mut admin, "CREATE TABLE t (n int)").await;
    let mut holder = pool.begin().await.unwrap();
    transaction::acquire(&mut holder, KEY).await.unwrap();
    let mark = server.log_len();

    let mut tx = pool.begin().await.unwrap();
    execute(&mut tx, "INSERT INTO t VALUES (1)").await;
    for way in [1, 2, 4, 5] {
        let started = Instant::now();
        assert!(!acquire_in_way(way, &mut tx, MOMENT).await.unwrap());
        assert!(matches!(way, 1 | 4) || started.elapsed() >= MOMENT);
        assert_eq!(count_locks(&mut tx).await, "0");
    }
    assert!(!transaction::try_acquire_for(&mut tx, KEY, Duration::ZERO).await.unwrap());
    execute(&mut tx, "INSERT INTO t VALUES (2)").await;
    tx.commit().await.unwrap();

    assert_eq!(ask(&mut admin, "SELECT sum(n) FROM t").await, "3");
    assert_eq!(server.log_since(mark), "");
    holder.commit().await.unwrap();
    no_locks(&mut admin).await;
}

/// The timeout may occur after the grant. In that case, the call reports that the lock was not acquired, which must be
/// true.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_answer_is_true_however_tight_the_time() {
    let rounds: u64 = amount(600, 1_500);
    let (db, pool) = TestDb::with_pool(1).await;
    let mut others = tokio::task::JoinSet::new();
    let key = sqlx::postgres::PgAdvisoryLock::new(KEY).key().as_bigint().unwrap();
    for seed in 1..4 {
        let mut conn = db.admin().await;
        others.spawn(async move {
            for round in 0_u64.. {
                let hold = (round * 7 + seed * 3) % 20;
                let hold = format!(
                    "SELECT pg_advisory_lock({key}); SELECT pg_sleep({hold} / 10000.0); \
                     SELECT pg_advisory_unlock({key})"
                );
                execute(&mut conn, hold).await;
            }
        });
    }
    let (mut yes, mut no) = (0, 0);
    for round in 0..rounds {
        let mut tx = pool.begin().await.unwrap();
        let wait = Duration::from_millis(1 + round % 3);
        let granted = if round % 2 == 0 {
            transaction::try_acquire_for(&mut tx, KEY, wait).await
        } else {
            transaction::try_acquire_shared_for(&mut tx, KEY, wait).await
        };
        // The server answered too late, on a busy machine.
        if matches!(granted, Err(Error::Disconnected { .. })) {
            tx.rollback().await.unwrap();
            continue;
        }
        let granted = granted.unwrap();
        *if granted { &mut yes } else { &mut no } += 1;
        assert_eq!(count_locks(&mut tx).await, if granted { "1" } else { "0" });
        tx.rollback().await.unwrap();
    }
    assert!(yes > 0 && no > 0, "not tight at all: {yes} {no}");
}

mod settings {
    use super::*;

    const SETTINGS: &str = "current_setting('lock_timeout') || ' ' || \
                            current_setting('statement_timeout') || ' ' || \
                            current_setting('log_lock_waits') || ' ' || coalesce( \
                            current_setting('client_connection_check_interval', true), '-') || ' ' || \
                            current_setting('transaction_isolation') || ' ' || \
                            current_setting('transaction_read_only')";

    /// Acquires a busy lock in a transaction with special properties from `begin` and `SET LOCAL`, past every limit on
    /// statements and locks; then waits for another lock until the wait times out. Checks that the transaction's
    /// properties are unchanged.
    async fn stay(
        prepare: impl AsyncFn(&mut PgConnection, &str),
        begin: &'static str,
        local: &str,
    ) {
        let db = TestDb::new().await;
        let mut admin = db.admin().await;
        prepare(&mut admin, db.name()).await;
        let (pool, other) = (db.pool(1).await, db.pool(2).await);
        let mut holder = other.begin().await.unwrap();
        let mut busy = other.begin().await.unwrap();
        transaction::acquire(&mut holder, KEY).await.unwrap();
        transaction::acquire(&mut busy, "busy").await.unwrap();

        let mut session = pool.acquire().await.unwrap();
        let outside = ask(&mut session, SETTINGS).await;
        drop(session);
        let mut tx = pool.begin_with(begin).await.unwrap();
        execute(&mut tx, local).await;
        let before = ask(&mut tx, SETTINGS).await;
        let (acquired, ()) = tokio::join!(transaction::acquire(&mut tx, KEY), async {
            locks_are(&mut admin, 3, TIMEOUT).await;
            // The test waits for no event here: it lets the limits pass.
            sleep(MOMENT * 25).await;
            holder.commit().await.unwrap();
        });
        acquired.unwrap();
        assert_eq!(ask(&mut tx, SETTINGS).await, before);
        assert!(!transaction::try_acquire_for(&mut tx, "busy", MOMENT * 23).await.unwrap());
        assert_eq!(ask(&mut tx, SETTINGS).await, before);
        // The limits are in force as well.
        if before.contains(" 2s ") {
            let slept = sqlx::raw_sql("SELECT pg_sleep(20)").execute(&mut *tx).await.unwrap_err();
            assert_eq!(sqlstate(&slept).unwrap(), "57014");
            tx.rollback().await.unwrap();
        } else {
            tx.commit().await.unwrap();
        }
        let mut session = pool.acquire().await.unwrap();
        assert_eq!(ask(&mut session, SETTINGS).await, outside);
    }

    #[tokio::test]
    async fn of_the_role_do_not_end_a_wait_and_stay() {
        let limit = async |admin: &mut PgConnection, db: &str| {
            execute(admin, format!("ALTER DATABASE {db} SET lock_timeout = '1900ms'")).await;
            execute(admin, format!("ALTER DATABASE {db} SET statement_timeout = '2s'")).await;
            execute(admin, format!("ALTER DATABASE {db} SET log_lock_waits = on")).await;
        };
        stay(limit, "BEGIN", "SELECT 1").await;
    }

    #[tokio::test]
    async fn of_the_transaction_do_not_end_a_wait_and_stay() {
        let begin = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY";
        let local = "SET LOCAL lock_timeout = 1900; SET LOCAL statement_timeout = '2s'; \
                     SET LOCAL log_lock_waits = on; \
                     SELECT set_config(name, '700ms', true) FROM pg_settings \
                     WHERE name = 'client_connection_check_interval'";
        stay(async |_, _| {}, begin, local).await;
    }

    #[tokio::test]
    async fn that_are_usual_stay() {
        stay(async |_, _| {}, "BEGIN ISOLATION LEVEL SERIALIZABLE", "SELECT 1").await;
    }
}

mod limits {
    use super::*;

    /// The limits that were sent to the server since a mark of its log, in milliseconds.
    fn sent(server: &Server, mark: usize) -> Vec<u64> {
        let log = server.log_since(mark);
        let limits = log.split("set_config('pglock.limit', '").skip(1);
        limits.map(|rest| rest.split('\'').next().unwrap().parse().unwrap()).collect()
    }

    /// A shorter slice would end before each deadlock check, so the server would never detect a deadlock.
    #[tokio::test]
    async fn a_slice_is_longer_than_the_deadlock_timeout() {
        for (deadlock_timeout, least, most) in [("90s", 91_000, 91_000), ("3s", 54_000, 60_000)] {
            let server = Server::options()
                .setting("log_statement", "all")
                .setting("deadlock_timeout", deadlock_timeout)
                .start();
            let db = TestDb::on(&server).await;
            let pool = db.pool(2).await;
            let mut holder = pool.begin().await.unwrap();
            transaction::acquire(&mut holder, KEY).await.unwrap();
            let mut tx = pool.begin().await.unwrap();

            let mark = server.log_len();
            let (acquired, ()) = tokio::join!(transaction::acquire(&mut tx, KEY), async {
                locks_are(&mut db.admin().await, 2, TIMEOUT).await;
                holder.commit().await.unwrap();
            });
            acquired.unwrap();
            let limits = sent(&server, mark);
            assert!(matches!(limits[..], [limit] if (least..=most).contains(&limit)), "{limits:?}");
        }
    }

    #[tokio::test]
    async fn the_callers_timeout_is_the_limit_if_it_is_shorter() {
        let server = Server::options().setting("log_statement", "all").start();
        let db = TestDb::on(&server).await;
        let pool = db.pool(2).await;
        let mut holder = pool.begin().await.unwrap();
        transaction::acquire(&mut holder, KEY).await.unwrap();
        let mut tx = pool.begin().await.unwrap();
        let mark = server.log_len();
        assert!(!transaction::try_acquire_for(&mut tx, KEY, SOON).await.unwrap());
        let limits = sent(&server, mark);
        assert!(!limits.is_empty() && limits.iter().all(|limit| *limit <= 1000), "{limits:?}");
    }
}

mod logs {
    use tracing::Level;

    use super::*;
    use crate::logged::Logged;

    /// Counts the lines of the server's log that report a wait.
    async fn waits_logged(server: &Server, db: &TestDb, pool: &PgPool) -> usize {
        let mut admin = db.admin().await;
        let mut holder = db.pool(1).await.begin().await.unwrap();
        transaction::acquire(&mut holder, KEY).await.unwrap();
        let mut tx = pool.begin().await.unwrap();
        // One connection check is due before the wait can switch the checks off. The wait is not logged then, because
        // this check comes before the deadlock check.
        let set = "SELECT set_config(name, '50ms', true) FROM pg_settings \
                   WHERE name = 'client_connection_check_interval'";
        execute(&mut tx, set).await;
        let mark = server.log_len();
        let (acquired, ()) = tokio::join!(transaction::acquire(&mut tx, KEY), async {
            locks_are(&mut admin, 2, TIMEOUT).await;
            // The test waits for no event here: it gives the server time to log.
            sleep(MOMENT * 8).await;
            holder.commit().await.unwrap();
        });
        acquired.unwrap();
        tx.rollback().await.unwrap();
        server.log_since(mark).matches("still waiting").count()
    }

    #[tokio::test]
    async fn of_the_server_have_no_line_for_a_wait_where_the_role_may_switch_it_off() {
        let server = Server::options()
            .setting("log_lock_waits", "on")
            .setting("deadlock_timeout", "200ms")
            .start();
        let db = TestDb::on(&server).await;
        assert_eq!(waits_logged(&server, &db, &db.pool(2).await).await, 0);
        // There is one line for a role that may not switch `log_lock_waits` off, however often the server checks the
        // connection.
        execute(&mut db.admin().await, "CREATE ROLE app LOGIN").await;
        let as_app = pool_of(db.options().username("app"), 2).await;
        assert_eq!(waits_logged(&server, &db, &as_app).await, 1);
    }

    /// sqlx warns of a statement that takes longer than a second, also when its future is dropped.
    #[tokio::test]
    async fn of_the_application_have_no_line_for_a_wait() {
        let logged = Logged::from_now_on();
        let (db, pool) = TestDb::with_pool(2).await;
        let mut holder = pool.begin().await.unwrap();
        transaction::acquire(&mut holder, KEY).await.unwrap();
        let mut tx = pool.begin().await.unwrap();
        timeout(MOMENT * 13, transaction::acquire(&mut tx, KEY)).await.unwrap_err();
        holder.commit().await.unwrap();
        tx.rollback().await.unwrap();
        let lines = logged.events_from(Level::INFO);
        assert!(lines.is_empty(), "{lines:#?}");

        // The warnings about the application's own statements are not suppressed.
        execute(&mut db.admin().await, "SELECT pg_sleep(1.2)").await;
        assert_eq!(logged.events_from(Level::INFO).len(), 1);
    }

    /// The number does not depend on the keys and timeouts.
    #[tokio::test]
    async fn of_statements_have_a_bounded_number_of_entries() {
        let Some(options) = with_statement_statistics(Server::options()).await else { return };
        let server = options.setting("pg_stat_statements.track", "all").start();
        let db = TestDb::on(&server).await;
        let mut admin = db.admin().await;
        execute(&mut admin, "CREATE EXTENSION pg_stat_statements").await;
        let (pool, other) = (db.pool(1).await, db.pool(1).await);
        let mut counts = Vec::new();
        for round in 0..8_i32 {
            for key in [Key::from(i64::from(round) << 40), Key::from((round, -round))] {
                let mut holder = other.begin().await.unwrap();
                transaction::acquire(&mut holder, &key).await.unwrap();
                let mut tx = pool.begin().await.unwrap();
                let wait = Duration::from_millis(100 + u64::try_from(round).unwrap());
                assert!(!transaction::try_acquire_for(&mut tx, &key, wait).await.unwrap());
                assert!(!transaction::try_acquire_shared_for(&mut tx, &key, wait).await.unwrap());
            }
            eventually("both have rolled back", TIMEOUT, || async {
                pool.num_idle() == 1 && other.num_idle() == 1
            })
            .await;
            let count = "SELECT count(*) FROM pg_stat_statements";
            counts.push(ask(&mut admin, count).await);
        }
        // The first count does not include the counting statement itself.
        assert_eq!(counts.get(1), counts.last(), "{counts:?}");
    }
}

/// Tested where the role may not use PL/pgSQL, and where PL/pgSQL was dropped.
#[tokio::test]
async fn a_role_without_plpgsql_waits_all_the_same() {
    let (_server, db) = TestDb::with_server().await;
    let mut admin = db.admin().await;
    execute(&mut admin, "CREATE ROLE app LOGIN").await;
    let pool = pool_of(db.options().username("app"), 2).await;
    for lose in ["REVOKE USAGE ON LANGUAGE plpgsql FROM PUBLIC", "DROP EXTENSION plpgsql"] {
        execute(&mut admin, lose).await;
        for key in [Key::from(7), Key::from((7, -7))] {
            for shared in [false, true] {
                let mut holder = pool.begin().await.unwrap();
                transaction::acquire(&mut holder, &key).await.unwrap();
                let mut tx = pool.begin().await.unwrap();
                execute(&mut tx, "SET LOCAL lock_timeout = 900; SET LOCAL statement_timeout = 999")
                    .await;
                let timeouts =
                    "current_setting('lock_timeout') || current_setting('statement_timeout')";

                let timed_out = if shared {
                    transaction::try_acquire_shared_for(&mut tx, &key, MOMENT * 12).await
                } else {
                    transaction::try_acquire_for(&mut tx, &key, MOMENT * 12).await
                };
                assert!(!timed_out.unwrap());
                assert_eq!(ask(&mut tx, timeouts).await, "900ms999ms");
                let wait = async {
                    if shared {
                        transaction::acquire_shared(&mut tx, &key).await
                    } else {
                        transaction::acquire(&mut tx, &key).await
                    }
                };
                let (acquired, ()) = tokio::join!(wait, async {
                    locks_are(&mut admin, 2, TIMEOUT).await;
                    holder.commit().await.unwrap();
                });
                acquired.unwrap();
                assert_eq!(ask(&mut tx, timeouts).await, "900ms999ms");
                assert_eq!(count_locks(&mut tx).await, "1");
                tx.commit().await.unwrap();
                no_locks(&mut admin).await;
            }
        }
    }
}

mod isolation {
    use super::*;

    async fn update(conn: &mut PgConnection) -> Result<(), sqlx::Error> {
        sqlx::raw_sql("UPDATE account SET balance = balance + 1").execute(conn).await.map(drop)
    }

    const BALANCE: &str = "SELECT balance FROM account";

    async fn account() -> (TestDb, PgPool) {
        let db = TestDb::new().await;
        execute(&mut db.admin().await, "CREATE TABLE account AS SELECT 0 AS balance").await;
        let pool = db.pool(2).await;
        (db, pool)
    }

    /// Waits in a transaction for a holder, which updates a row before it commits.
    async fn wait_for_an_update(db: &TestDb, pool: &PgPool, begin: &'static str) -> Tx {
        let mut admin = db.admin().await;
        let mut holder = pool.begin().await.unwrap();
        transaction::acquire(&mut holder, KEY).await.unwrap();
        let mut tx = pool.begin_with(begin).await.unwrap();
        let (acquired, ()) = tokio::join!(transaction::acquire(&mut tx, KEY), async {
            locks_are(&mut admin, 2, TIMEOUT).await;
            update(&mut holder).await.unwrap();
            holder.commit().await.unwrap();
        });
        acquired.unwrap();
        tx
    }

    #[tokio::test]
    async fn read_committed_sees_what_the_previous_holder_committed() {
        let (db, pool) = account().await;
        let mut tx = wait_for_an_update(&db, &pool, "BEGIN").await;
        assert_eq!(ask(&mut tx, BALANCE).await, "1");
        update(&mut tx).await.unwrap();
        tx.commit().await.unwrap();
    }

    #[tokio::test]
    async fn repeatable_read_does_not() {
        let (db, pool) = account().await;
        for begin in ["BEGIN ISOLATION LEVEL REPEATABLE READ", "BEGIN ISOLATION LEVEL SERIALIZABLE"]
        {
            let before = ask(&mut pool.acquire().await.unwrap(), BALANCE).await;
            let mut tx = wait_for_an_update(&db, &pool, begin).await;
            assert_eq!(ask(&mut tx, BALANCE).await, before, "{begin}");
            let error = update(&mut tx).await.unwrap_err();
            assert_eq!(sqlstate(&error).unwrap(), "40001", "{begin}");
        }
    }

    #[tokio::test]
    async fn repeatable_read_does_under_a_guard() {
        let (db, pool) = account().await;
        let mut admin = db.admin().await;
        let mut holder = pool.begin().await.unwrap();
        transaction::acquire(&mut holder, KEY).await.unwrap();
        let mut lock = Lock::new(&pool, KEY);
        let (guard, ()) = tokio::join!(lock.acquire(), async {
            locks_are(&mut admin, 2, TIMEOUT).await;
            update(&mut holder).await.unwrap();
            holder.commit().await.unwrap();
        });
        let guard = guard.unwrap();
        let begin = "BEGIN ISOLATION LEVEL REPEATABLE READ";
        let mut tx = pool.begin_with(begin).await.unwrap();
        assert_eq!(ask(&mut tx, BALANCE).await, "1");
        update(&mut tx).await.unwrap();
        tx.commit().await.unwrap();
        guard.release().await.unwrap();
    }
}

mod cancelled {
    use super::*;

    /// Drops one of the ways to acquire after every number of polls. Checks that the connection answers again, and that
    /// the rollback leaves only the `held` locks of others.
    ///
    /// Returns the number of points at which the call was dropped.
    async fn at_every_poll(db: &TestDb, held: usize, way: usize) -> usize {
        let mut admin = db.admin().await;
        let pool = db.pool(1).await;
        for polls in 1.. {
            assert!(polls < 60, "the call never completes");
            for end in ["rollback", "drop"] {
                let mut tx = pool.begin().await.unwrap();
                let cut = cancel_after(polls, acquire_in_way(way, &mut tx, MOMENT));
                let outcome = cut.await;
                if end == "rollback" {
                    timeout(TIMEOUT, tx.rollback()).await.unwrap().unwrap();
                } else {
                    drop(tx);
                }
                locks_are(&mut admin, held, SOON * 4).await;
                borrow_all(&pool).await;
                if end == "drop" && outcome.is_some() {
                    return polls - 1;
                }
            }
        }
        0
    }

    #[tokio::test]
    async fn while_it_acquires_a_free_lock() {
        let db = TestDb::new().await;
        for way in 0..6 {
            dropped_at(1, async || at_every_poll(&db, 0, way).await).await;
        }
    }

    #[tokio::test]
    async fn while_it_asks_for_a_busy_lock() {
        let db = TestDb::new().await;
        let other = db.pool(1).await;
        let _held = Lock::new(&other, KEY).acquire().await.unwrap();
        for way in [1, 2, 4, 5] {
            dropped_at(1, async || at_every_poll(&db, 1, way).await).await;
        }
    }

    /// A dropped wait is granted the lock, which the transaction holds until it ends.
    #[tokio::test]
    async fn and_then_granted() {
        let (db, pool, mut admin) = TestDb::scene(1).await;
        let other = db.pool(1).await;
        let held = Lock::new(&other, KEY).acquire().await.unwrap();
        let mut tx = pool.begin().await.unwrap();
        tokio::select! {
            acquired = transaction::acquire(&mut tx, KEY) => panic!("{acquired:?}"),
            () = locks_are(&mut admin, 2, TIMEOUT) => {}
        }
        held.release().await.unwrap();
        locks_are(&mut admin, 1, TIMEOUT).await;
        assert_eq!(count_locks(&mut tx).await, "1");
        tx.rollback().await.unwrap();
        no_locks(&mut admin).await;
    }
}

mod failing {
    use super::*;

    /// Checks that an error has the key, and that the transaction can only be rolled back.
    async fn has_failed(error: &Error, mut tx: Tx) {
        assert_eq!(error.key(), Some(&Key::from(KEY)));
        let next = sqlx::raw_sql("SELECT 1").execute(&mut *tx).await.unwrap_err();
        assert_eq!(sqlstate(&next).unwrap(), "25P02");
        let error = transaction::try_acquire(&mut tx, KEY).await.unwrap_err();
        assert!(matches!(error, Error::Database { .. }), "{error:?}");
        tx.rollback().await.unwrap();
    }

    /// Each transaction waits for the lock that the other holds: one fails, and the other gets its lock.
    #[tokio::test]
    async fn by_a_deadlock() {
        let (_db, pool, mut admin) = TestDb::scene(2).await;
        let wait = async |mut tx: Tx| {
            let waited = timeout(TIMEOUT, transaction::acquire(&mut tx, KEY)).await.unwrap();
            match &waited {
                Ok(()) => tx.commit().await.unwrap(),
                Err(error) => has_failed(error, tx).await,
            }
            waited
        };
        let mut one = pool.begin().await.unwrap();
        let mut two = pool.begin().await.unwrap();
        transaction::acquire_shared(&mut one, KEY).await.unwrap();
        transaction::acquire_shared(&mut two, KEY).await.unwrap();
        match tokio::join!(wait(one), wait(two)) {
            (Ok(()), Err(error)) | (Err(error), Ok(())) => {
                assert!(matches!(error, Error::Deadlock { .. }), "{error:?}");
                assert!(error.is_transient());
            }
            both => panic!("exactly one must give way: {both:?}"),
        }
        no_locks(&mut admin).await;
        borrow_all(&pool).await;
    }

    #[tokio::test]
    async fn because_an_administrator_cancels_or_kills() {
        let db = TestDb::new().await;
        let mut admin = db.admin().await;
        let (pool, other) = (db.pool(2).await, db.pool(1).await);
        let held = Lock::new(&other, KEY).acquire().await.unwrap();
        for how in ["pg_cancel_backend", "pg_terminate_backend"] {
            let mut tx = pool.begin().await.unwrap();
            let pid = ask(&mut tx, "pg_backend_pid()").await;
            let (failed, ()) = tokio::join!(transaction::acquire(&mut tx, KEY), async {
                locks_are(&mut admin, 2, TIMEOUT).await;
                execute(&mut admin, format!("SELECT {how}({pid})")).await;
            });
            let error = failed.unwrap_err();
            if how == "pg_cancel_backend" {
                assert!(matches!(error, Error::Cancelled { .. }), "{error:?}");
                has_failed(&error, tx).await;
            } else {
                assert!(matches!(error, Error::Disconnected { .. }), "{error:?}");
            }
            locks_are(&mut admin, 1, SOON * 4).await;
        }
        held.release().await.unwrap();
        borrow_all(&pool).await;
    }

    #[tokio::test]
    async fn because_the_server_is_silent() {
        let (server, db) = TestDb::with_server().await;
        let pool = db.pool(1).await;
        let mut tx = pool.begin().await.unwrap();
        server.pause();
        let waited = timeout(TIMEOUT, transaction::try_acquire_for(&mut tx, KEY, MOMENT)).await;
        let error = waited.unwrap().unwrap_err();
        assert!(matches!(error, Error::Disconnected { .. }), "{error:?}");
        server.resume();
        // The server answers late.
        tx.rollback().await.unwrap();
        no_locks(&mut db.admin().await).await;
        server.stop(Shutdown::Fast);
        let error = pool.begin().await.unwrap_err();
        assert!(sqlstate(&error).is_none());
    }
}
