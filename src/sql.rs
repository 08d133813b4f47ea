//! Every statement that is sent to the server; nothing else spells `pg_`.
//!
//! Nearly all go by the simple query protocol: one message, one answer, always one round trip, nothing
//! left behind on the application's connection. The values in them are integers, written by
//! [`Display`](std::fmt::Display), so there is nothing to inject.
//!
//! The two of a free acquire and its awaited release are prepared, once on each connection: the server
//! would spend more time on their plans than on the lock.

use std::time::Duration;

use sqlx::postgres::{PgArguments, PgRow};
use sqlx::query::Query;
use sqlx::{AssertSqlSafe, PgConnection, Postgres, Row};
use tracing::Dispatch;
use tracing::instrument::WithSubscriber;

use crate::key::KeyId;
use crate::mode::Mode;
use crate::session::ledger::Modes;

/// The answer to [`try_lock`].
#[derive(Debug)]
pub(crate) struct Tried {
    pub(crate) backend_pid: i32,
    pub(crate) verdict: Verdict,
}

#[derive(Debug)]
pub(crate) enum Verdict {
    Busy,
    Granted,
    Standby,
}

/// Takes a lock if it is free, and asks who and what the server is, in one statement.
pub(crate) async fn try_lock(
    conn: &mut PgConnection,
    key: KeyId,
    mode: Mode,
) -> Result<Tried, sqlx::Error> {
    macro_rules! statement {
        ($call:literal) => {
            concat!(
                "SELECT pg_backend_pid(), \
                 CASE WHEN pg_is_in_recovery() THEN NULL ELSE ",
                $call,
                " END, statement_timestamp() - now() > interval '2 ms'"
            )
        };
    }
    let row = match (key, mode) {
        (KeyId::BigInt(_), Mode::Exclusive) => statement!("pg_try_advisory_lock($1)"),
        (KeyId::BigInt(_), Mode::Shared) => statement!("pg_try_advisory_lock_shared($1)"),
        (KeyId::IntPair(..), Mode::Exclusive) => statement!("pg_try_advisory_lock($1, $2)"),
        (KeyId::IntPair(..), Mode::Shared) => statement!("pg_try_advisory_lock_shared($1, $2)"),
    };
    let row = bind(row, key).fetch_one(&mut *conn).await?;
    let tried = Tried {
        backend_pid: row.try_get(0)?,
        verdict: match row.try_get(1)? {
            Some(true) => Verdict::Granted,
            Some(false) => Verdict::Busy,
            None => Verdict::Standby,
        },
    };
    // A transaction that somebody left open on the pooled connection stands still in time. So does, for
    // some microseconds, that of a prepared statement. Looking once too often does no harm.
    if row.try_get(2)? {
        end_transaction(conn).await?;
    }
    Ok(tried)
}

/// A prepared statement on a key.
fn bind(statement: &'static str, key: KeyId) -> Query<'static, Postgres, PgArguments> {
    let query = sqlx::query(statement);
    match key {
        KeyId::BigInt(number) => query.bind(number),
        KeyId::IntPair(first, second) => query.bind(first).bind(second),
    }
}

/// How long one statement waits: a slice, or what is left of the caller's patience if that is less.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WaitLimit {
    pub(crate) slice: Duration,
    pub(crate) left: Option<Duration>,
}

/// Waits for a lock in the server's queue. Returns whether it was granted.
///
/// One message of several statements, which the server runs as one transaction, so what is set here
/// is gone with it, and so is the snapshot that a waiting statement holds:
///
/// 1. Lift the role's own limits on statements.
/// 2. Ask the server to look after a dead client even while it waits. Where it can't (before
///    PostgreSQL 14, or a platform without the means), go on without.
/// 3. Set the limit of this wait, above `deadlock_timeout`, or a deadlock would look like a timeout.
///    Then wait. The timeout is caught, so the server logs no error. It can strike after the grant:
///    whether the lock is held, only `pg_locks` knows.
/// 4. Tell the result, which `DO` can't. What comes after the grant is on the way from one holder
///    to the next, and so is little.
///
/// sqlx warns of statements that take more than a second. This one is meant to, so it runs where no
/// subscriber listens.
pub(crate) async fn wait(
    conn: &mut PgConnection,
    key: KeyId,
    mode: Mode,
    limit: WaitLimit,
) -> Result<bool, sqlx::Error> {
    // New in PostgreSQL 17.
    let transaction_timeout = if conn.server_version_num() >= Some(170_000) {
        "SET LOCAL transaction_timeout = 0; "
    } else {
        ""
    };
    let function = match mode {
        Mode::Exclusive => "pg_advisory_lock",
        Mode::Shared => "pg_advisory_lock_shared",
    };
    let slice = milliseconds(limit.slice);
    let left = limit.left.map_or(i32::MAX, milliseconds);
    let statement = format!(
        "SET LOCAL statement_timeout = 0; {transaction_timeout}\
         DO $$ BEGIN \
           PERFORM set_config('client_connection_check_interval', '1000', true); \
         EXCEPTION WHEN OTHERS THEN NULL; END $$; \
         DO $$ BEGIN \
           PERFORM set_config('pglock.granted', 'true', true); \
           PERFORM set_config('lock_timeout', least({left}, greatest({slice}, 1000 + 1000 * \
             extract(epoch FROM current_setting('deadlock_timeout')::interval)))::int::text, true); \
           BEGIN \
             PERFORM {function}({}); \
           EXCEPTION WHEN lock_not_available THEN \
             PERFORM set_config('pglock.granted', EXISTS ({})::text, true); \
           END; \
         END $$; \
         SHOW pglock.granted",
        Args(key),
        Held { key, mode, select: "SELECT FROM" },
    );
    let shown: Option<String> = sqlx::raw_sql(AssertSqlSafe(statement))
        .fetch_one(conn)
        .with_subscriber(Dispatch::none())
        .await?
        .try_get(0)?;
    Ok(shown.as_deref() == Some("true"))
}

/// How an unlock is sent.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Protocol {
    /// As a prepared statement: cheaper, but the first on a connection takes two messages.
    Extended,
    /// As one message: on its way with the first write to the socket, after which nobody may be left
    /// to write another.
    Simple,
}

/// Gives a lock up, in every mode in which it is held. Returns whether the session held it in all.
pub(crate) async fn unlock(
    conn: &mut PgConnection,
    key: KeyId,
    modes: Modes,
    protocol: Protocol,
) -> Result<bool, sqlx::Error> {
    let statement = match (protocol, key, modes) {
        (Protocol::Simple, ..) | (.., Modes { exclusive: true, shared: true }) => {
            return unlock_all(conn, &[(key, modes)]).await;
        }
        (.., Modes { exclusive: false, shared: false }) => return Ok(true),
        (_, KeyId::BigInt(_), Modes { exclusive: true, .. }) => "SELECT pg_advisory_unlock($1)",
        (_, KeyId::BigInt(_), Modes { shared: true, .. }) => "SELECT pg_advisory_unlock_shared($1)",
        (_, KeyId::IntPair(..), Modes { exclusive: true, .. }) => {
            "SELECT pg_advisory_unlock($1, $2)"
        }
        (_, KeyId::IntPair(..), Modes { shared: true, .. }) => {
            "SELECT pg_advisory_unlock_shared($1, $2)"
        }
    };
    bind(statement, key).fetch_one(conn).await?.try_get(0)
}

/// Gives locks up, all in one message. Returns whether the session held every one of them.
pub(crate) async fn unlock_all(
    conn: &mut PgConnection,
    locks: &[(KeyId, Modes)],
) -> Result<bool, sqlx::Error> {
    let mut calls = Vec::with_capacity(locks.len());
    for &(key, modes) in locks {
        if modes.exclusive {
            calls.push(format!("pg_advisory_unlock({})", Args(key)));
        }
        if modes.shared {
            calls.push(format!("pg_advisory_unlock_shared({})", Args(key)));
        }
    }
    if calls.is_empty() {
        return Ok(true);
    }
    let row = fetch(conn, format!("SELECT {}", calls.join(", "))).await?;
    let mut all = true;
    for column in 0..row.len() {
        all &= row.try_get::<bool, _>(column)?;
    }
    Ok(all)
}

/// Turns an exclusive lock into a shared one, without a moment in which nobody holds it.
///
/// The session's own exclusive lock lets it in, ahead of whoever waits; `pg_try_…` would not.
pub(crate) async fn downgrade(conn: &mut PgConnection, key: KeyId) -> Result<bool, sqlx::Error> {
    let key = Args(key);
    let statement =
        format!("SELECT pg_advisory_lock_shared({key}); SELECT pg_advisory_unlock({key})");
    let rows = sqlx::raw_sql(AssertSqlSafe(statement)).fetch_all(conn).await?;
    rows.last().ok_or(sqlx::Error::RowNotFound)?.try_get(0)
}

/// Gives a lock up if the session holds it, which is not known after a statement was interrupted.
pub(crate) async fn unlock_if_held(
    conn: &mut PgConnection,
    key: KeyId,
    mode: Mode,
) -> Result<(), sqlx::Error> {
    let select = match mode {
        Mode::Exclusive => format!("SELECT pg_advisory_unlock({}) FROM", Args(key)),
        Mode::Shared => format!("SELECT pg_advisory_unlock_shared({}) FROM", Args(key)),
    };
    let statement = Held { key, mode, select: &select }.to_string();
    sqlx::raw_sql(AssertSqlSafe(statement)).fetch_all(conn).await.map(drop)
}

/// Ends a transaction that was left open. Returns whether there was one.
pub(crate) async fn end_transaction(conn: &mut PgConnection) -> Result<bool, sqlx::Error> {
    // Inside a transaction, time stands still while statements go on. Outside, and in a message of one
    // statement, both are the time of that.
    let asked = fetch(conn, "SELECT now() <> statement_timestamp()".to_owned()).await;
    let open = match asked {
        Ok(row) => row.try_get(0)?,
        // 25P02: a failed transaction answers nothing but its end.
        Err(error) if crate::error::sqlstate(&error).as_deref() == Some("25P02") => true,
        Err(error) => return Err(error),
    };
    if open {
        sqlx::raw_sql("ROLLBACK").execute(conn).await?;
    }
    Ok(open)
}

/// Cancels what a backend is doing, if it is still the backend that we have known for so long.
///
/// A cancel names a process, not a session: the age keeps it from a newcomer with the same number.
pub(crate) async fn cancel_backend(
    conn: &mut PgConnection,
    backend_pid: i32,
    known_for: Duration,
) -> Result<(), sqlx::Error> {
    let known_for = known_for.as_secs_f64();
    let statement = format!(
        "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE pid = {backend_pid} \
         AND backend_start <= clock_timestamp() - make_interval(secs => {known_for})"
    );
    sqlx::raw_sql(AssertSqlSafe(statement)).fetch_all(conn).await.map(drop)
}

/// A key as arguments of a function.
struct Args(KeyId);

impl std::fmt::Display for Args {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            // Quoted: the smallest numbers have no literal of their own.
            KeyId::BigInt(number) => write!(f, "'{number}'::bigint"),
            KeyId::IntPair(first, second) => write!(f, "'{first}'::int, '{second}'::int"),
        }
    }
}

/// A query of `pg_locks` for a lock that this session holds: a row if it does.
///
/// How a key is laid out there: <https://www.postgresql.org/docs/current/view-pg-locks.html>.
struct Held<'s> {
    key: KeyId,
    mode: Mode,
    select: &'s str,
}

impl std::fmt::Display for Held<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (classid, objid, objsubid) = match self.key {
            KeyId::BigInt(number) => {
                let bits = number.cast_unsigned();
                (bits >> 32, bits & u64::from(u32::MAX), 1)
            }
            KeyId::IntPair(first, second) => {
                (u64::from(first.cast_unsigned()), u64::from(second.cast_unsigned()), 2)
            }
        };
        let mode = match self.mode {
            Mode::Exclusive => "ExclusiveLock",
            Mode::Shared => "ShareLock",
        };
        write!(
            f,
            "{} pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid() AND granted \
             AND classid = {classid} AND objid = {objid} AND objsubid = {objsubid} \
             AND mode = '{mode}'",
            self.select
        )
    }
}

async fn fetch(conn: &mut PgConnection, statement: String) -> Result<PgRow, sqlx::Error> {
    sqlx::raw_sql(AssertSqlSafe(statement)).fetch_one(conn).await
}

/// For a timeout of the server: at least 1, for 0 means none.
fn milliseconds(duration: Duration) -> i32 {
    i32::try_from(duration.as_millis()).unwrap_or(i32::MAX).max(1)
}
