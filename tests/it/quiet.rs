//! A wait costs others nothing: it adds nothing to the server's log, its statistics or the application's log.

use std::time::Duration;

use pglock::{Error, Lock};
use pglock_testkit::{Server, ServerOptions, TestDb, replace_function};
use sqlx::postgres::PgConnection;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tracing::Level;

use crate::logged::Logged;
use crate::support::{
    all_are_idle, ask, borrow_all, execute, has_waiter, locks_are, pool_of, prove_exclusion,
    report, with_statement_statistics,
};

const KEY: i64 = 7;
const WAITERS: u32 = 10;
/// How long the waiters wait: several times the server's `deadlock_timeout`, and the interval of its checks.
const WAIT: Duration = Duration::from_secs(4);
/// How long the server may take for statements in flight.
const LATE: Duration = Duration::from_secs(10);

#[tokio::test]
async fn waits_write_nothing_into_the_log_of_the_server() {
    let (log, _) = log_of_waits(Server::options(), "postgres").await;
    assert_eq!(log, "");
}

/// A role that may not switch `log_lock_waits` off.
#[tokio::test]
async fn a_wait_is_logged_once_at_most_where_the_server_logs_waits() {
    let (log, waiting) = log_of_waits(logging_waits(), "ordinary").await;
    report(format_args!("{waiting} of {WAITERS} waits of {WAIT:?} are logged by an ordinary role"));
    let some: Vec<_> = log.lines().take(8).collect();
    assert!(waiting <= WAITERS as usize, "{waiting} messages of {WAITERS} waits: {some:#?}");
}

#[tokio::test]
async fn a_wait_is_not_logged_where_the_role_may_prevent_it() {
    let (log, waiting) = log_of_waits(logging_waits(), "postgres").await;
    report(format_args!("{waiting} of {WAITERS} waits of {WAIT:?} are logged by a superuser"));
    let some: Vec<_> = log.lines().take(8).collect();
    assert_eq!(waiting, 0, "{some:#?}");
}

fn logging_waits() -> ServerOptions {
    Server::options().setting("log_lock_waits", "on").setting("deadlock_timeout", "100ms")
}

/// Starts several waits for a lock, half of them with a timeout that passes. Returns the server's log, and how often it
/// reports that a process waits.
async fn log_of_waits(options: ServerOptions, role: &str) -> (String, usize) {
    let server = options.start();
    let db = TestDb::on(&server).await;
    let mut holder = db.admin().await;
    if role != "postgres" {
        sqlx::raw_sql("CREATE ROLE ordinary LOGIN").execute(&mut holder).await.unwrap();
    }
    // Each waiter has a pool of its own, because of one pool, only one call would wait on the server.
    let mut pools = Vec::new();
    for _ in 0..WAITERS {
        let pool = pool_of(db.options().username(role), 2).await;
        // The first acquire of a pool also examines the server.
        drop(Lock::new(&pool, KEY + 1).acquire().await.unwrap());
        pools.push(pool);
    }
    hold(&mut holder, KEY).await;

    let mark = server.log_len();
    let mut tasks = JoinSet::new();
    for (number, pool) in pools.iter().enumerate() {
        let mut lock = Lock::new(pool, KEY);
        tasks.spawn(async move {
            if number % 2 == 0 {
                drop(lock.acquire().await.unwrap());
            } else {
                assert!(lock.try_acquire_for(WAIT / 8 * 7).await.unwrap().is_none());
            }
        });
    }
    let mut admin = db.admin().await;
    locks_are(&mut admin, 1 + WAITERS as usize, LATE).await;
    sleep(WAIT).await;
    unlock(&mut holder, KEY).await;
    timeout(LATE, tasks.join_all()).await.unwrap();
    locks_are(&mut admin, 0, LATE).await;

    let log = server.log_since(mark);
    let waiting = log.lines().filter(|line| line.contains("still waiting for")).count();
    (log, waiting)
}

/// The operating system may not support the check: Windows, and before PostgreSQL 15 some others.
#[tokio::test]
async fn a_server_that_cannot_check_connections_lets_a_session_wait() {
    let (_server, db) = TestDb::with_server().await;
    let (mut admin, mut holder) = (db.admin().await, db.admin().await);
    let body = "BEGIN
            IF $1 = 'client_connection_check_interval' AND $2 <> '0' THEN
                RAISE 'must be set to 0 on this platform' USING ERRCODE = '22023';
            END IF;
            RETURN original.set_config($1, $2, $3);
        END";
    replace_function(&mut admin, "set_config(text, text, boolean)", body).await;
    let role = "CREATE ROLE ordinary LOGIN; REVOKE USAGE ON LANGUAGE plpgsql FROM PUBLIC";
    execute(&mut admin, role).await;
    // One role may use PL/pgSQL, and one may not.
    for role in ["postgres", "ordinary"] {
        hold(&mut holder, KEY).await;
        let pool = pool_of(db.options().username(role), 2).await;
        let mut lock = Lock::new(&pool, KEY);
        let (granted, ()) = tokio::join!(lock.acquire(), async {
            has_waiter(&mut admin).await;
            unlock(&mut holder, KEY).await;
        });
        let guard = granted.unwrap();
        // A wait sets `tcp_user_timeout`, which would end the connection of a slow reader if it were not restored.
        let mut connection = guard.connection().await.unwrap();
        // Over a unix socket, the setting itself has no value.
        assert_eq!(ask(&mut connection, "current_setting('pglock.tcp_user_timeout')").await, "");
        drop(connection);
        guard.release().await.unwrap();
    }
}

/// PostgreSQL 19 has a view of lock statistics. A backend reports its counts when it ends.
#[tokio::test]
async fn the_lock_statistics_count_long_waits_that_were_granted() {
    let server = Server::options().setting("deadlock_timeout", "50ms").start();
    let db = TestDb::on(&server).await;
    let (mut admin, mut holder) = (db.admin().await, db.admin().await);
    if admin.server_version_num() < Some(190_000) {
        return;
    }
    for (is_granted, counted) in [(false, 0_i64), (true, 1)] {
        hold(&mut holder, KEY).await;
        let pool = db.pool(2).await;
        let mut lock = Lock::new(&pool, KEY);
        if is_granted {
            let (guard, ()) = tokio::join!(lock.acquire(), async {
                locks_are(&mut admin, 2, LATE).await;
                sleep(Duration::from_millis(500)).await;
                unlock(&mut holder, KEY).await;
            });
            guard.unwrap().release().await.unwrap();
        } else {
            let time = Duration::from_millis(500);
            assert!(lock.try_acquire_for(time).await.unwrap().is_none());
            unlock(&mut holder, KEY).await;
        }
        pool.close().await;
        let others = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'";
        let only_ours_are_left = async {
            while sqlx::query_scalar::<_, i64>(others).fetch_one(&mut admin).await.unwrap() > 2 {
                sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(LATE, only_ours_are_left).await.unwrap();
        let waits = "SELECT waits FROM pg_stat_lock WHERE locktype = 'advisory'";
        let waits: i64 = sqlx::query_scalar(waits).fetch_one(&mut admin).await.unwrap();
        assert_eq!(waits, counted);
    }
}

#[tokio::test]
async fn waits_leave_few_entries_in_the_statement_statistics() {
    const WAITS: u32 = 200;
    const MOST: i64 = 10;

    let Some(options) = with_statement_statistics(Server::options()).await else { return };
    let server = options.start();
    let db = TestDb::on(&server).await;
    let mut admin = db.admin().await;
    sqlx::raw_sql("CREATE EXTENSION pg_stat_statements").execute(&mut admin).await.unwrap();
    prove_exclusion(&db).await;
    let pool = db.pool(WAITERS).await;
    // Some of the timeouts are shorter than opening a connection takes.
    borrow_all(&pool).await;
    let mut holder = db.admin().await;
    let hold = "SELECT count(pg_advisory_lock(key)) FROM generate_series(1, $1::int8) AS key";
    sqlx::query(hold).bind(i64::from(WAITS)).execute(&mut holder).await.unwrap();
    sqlx::raw_sql("SELECT pg_stat_statements_reset()").execute(&mut admin).await.unwrap();

    let mut tasks = JoinSet::new();
    for waiter in 0..WAITERS {
        let pool = pool.clone();
        tasks.spawn(async move {
            for key in (1..=WAITS).filter(|key| key % WAITERS == waiter) {
                let time = Duration::from_millis(u64::from(5 + key % 40));
                let mut lock = Lock::new(&pool, i64::from(key));
                // On a busy machine, the timeout may pass before the pool has returned a connection.
                match lock.try_acquire_for(time).await {
                    Ok(granted) => assert!(granted.is_none()),
                    Err(error) => assert!(
                        matches!(error, Error::PoolTimedOut { .. } | Error::Connect { .. }),
                        "{error:?}"
                    ),
                }
            }
        });
    }
    tasks.join_all().await;

    let entries: Vec<String> = sqlx::query_scalar(
        "SELECT left(query, 200) FROM pg_stat_statements
         WHERE dbid = (SELECT oid FROM pg_database WHERE datname = current_database())
           AND query NOT LIKE '%pg_stat_statements%'",
    )
    .fetch_all(&mut admin)
    .await
    .unwrap();
    let count = i64::try_from(entries.len()).unwrap();
    report(format_args!("{WAITS} waits on as many keys leave {count} entries"));
    assert!(count > 0, "the waits are not seen in the statistics");
    let some = entries.iter().take(12).map(String::as_str).collect::<Vec<_>>().join("\n\n");
    assert!(count <= MOST, "{count} entries, among them:\n{some}");
}

#[tokio::test]
async fn a_dropped_wait_warns_of_nothing_in_the_application() {
    /// Longer than the second after which sqlx warns of a slow statement.
    const SLOW: Duration = Duration::from_millis(1300);

    let (db, pool) = TestDb::with_pool(3).await;
    let (mut holder, mut admin) = (db.admin().await, db.admin().await);
    hold(&mut holder, KEY).await;
    let logged = Logged::from_now_on();

    let mut lock = Lock::new(&pool, KEY);
    assert!(timeout(SLOW, lock.acquire()).await.is_err());
    locks_are(&mut admin, 1, LATE).await;
    // A wait that is granted as late logs nothing either.
    let (granted, ()) = tokio::join!(lock.acquire(), async {
        sleep(SLOW).await;
        unlock(&mut holder, KEY).await;
    });
    granted.unwrap().release().await.unwrap();
    locks_are(&mut admin, 0, LATE).await;
    all_are_idle(&pool).await;

    let warnings = logged.events_from(Level::WARN);
    assert!(warnings.is_empty(), "{warnings:#?}");
}

async fn hold(holder: &mut PgConnection, key: i64) {
    sqlx::query("SELECT pg_advisory_lock($1)").bind(key).execute(holder).await.unwrap();
}

async fn unlock(holder: &mut PgConnection, key: i64) {
    sqlx::query("SELECT pg_advisory_unlock($1)").bind(key).execute(holder).await.unwrap();
}
