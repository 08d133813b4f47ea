//! Waiting for a lock in the server's queue.

use std::time::Duration;

use sqlx::{AssertSqlSafe, PgConnection, Row};

use super::quiet::quietly;
use super::{milliseconds, suffix};
use crate::key::KeyId;
use crate::mode::Mode;
use crate::options::Keepalives;

/// One wait in the server's queue.
#[derive(Clone, Copy)]
pub(crate) struct Slice {
    pub(crate) key: KeyId,
    pub(crate) mode: Mode,
    /// How long the server waits before it ends the wait. Longer than `deadlock_timeout` if there is time for that,
    /// because otherwise a deadlock would look like a timeout.
    pub(crate) limit: Duration,
    /// The values for `tcp_user_timeout`, which is set until the session ends or its connection is borrowed, unless
    /// the server rejects it.
    pub(crate) keepalives: Option<Keepalives>,
}

/// The answer to a wait.
pub(crate) struct Waited {
    pub(crate) backend_pid: i32,
    /// If false, the slice is over; the timeout can have struck after the grant.
    pub(crate) granted: bool,
}

/// Waits for a lock in the server's queue.
///
/// Sends one message of several statements, which the server runs as one transaction. The snapshot that a waiting
/// statement holds ends with that transaction, and so do the settings that are made for the wait:
///
/// 1. Disable the role's limits on statements, and set `lock_timeout`.
/// 2. Turn `log_lock_waits` off, if the role may set it. Then the server checks whether this client is still connected.
///    If waits are logged, it must not check, because before PostgreSQL 19 each check logs again that the session still
///    waits.
/// 3. Wait. The timeout is caught, so the server logs no error.
/// 4. Return the result, which `DO` can't: the backend's process id, negative after a timeout. Everything after the
///    grant delays the hand-off from one holder to the next, so this statement is `SHOW`, which needs no plan.
///
/// The text of the third statement contains neither key nor limit, so the number of entries in `pg_stat_statements` is
/// bounded.
pub(crate) async fn wait(conn: &mut PgConnection, slice: Slice) -> Result<Waited, sqlx::Error> {
    let settings = settings(conn, slice);
    let call = call(slice, "pg_catalog.current_setting('pglock.key')");
    let check =
        check_connection(conn).map_or_else(String::new, |check| format!("PERFORM {check}; "));
    let statement = format!(
        "{settings}; \
         DO $$ BEGIN \
           BEGIN \
             PERFORM pg_catalog.set_config('log_lock_waits', 'off', true); \
           EXCEPTION WHEN insufficient_privilege THEN NULL; \
           END; \
           BEGIN \
             {check}\
           EXCEPTION WHEN OTHERS THEN NULL; \
           END; \
         END $$; \
         DO $$ BEGIN \
           PERFORM pg_catalog.set_config('pglock.granted', \
             pg_catalog.pg_backend_pid()::pg_catalog.text, true); \
           BEGIN \
             PERFORM {call}; \
           EXCEPTION WHEN lock_not_available THEN \
             PERFORM pg_catalog.set_config('pglock.granted', \
               '-' OPERATOR(pg_catalog.||) pg_catalog.current_setting('pglock.granted'), true); \
           END; \
         END $$; \
         SHOW pglock.granted"
    );
    let rows = quietly(sqlx::raw_sql(AssertSqlSafe(statement)).fetch_all(conn)).await?;
    let answer: &str = rows.last().ok_or(sqlx::Error::RowNotFound)?.try_get(0)?;
    let backend_pid: i32 = answer.parse().map_err(|error| sqlx::Error::Decode(Box::new(error)))?;
    Ok(Waited { backend_pid: backend_pid.abs(), granted: backend_pid > 0 })
}

/// Returns a call that sets whether the server checks if this client is still connected. The setting is new in
/// PostgreSQL 14, and is rejected if the server's operating system can't detect that.
fn check_connection(conn: &PgConnection) -> Option<String> {
    let interval = match conn.server_version_num() {
        Some(190_000..) => "'1000'",
        Some(140_000..) => {
            "CASE WHEN pg_catalog.current_setting('log_lock_waits')::boolean THEN '0' ELSE '1000' END"
        }
        _ => return None,
    };
    Some(format!("pg_catalog.set_config('client_connection_check_interval', {interval}, true)"))
}

/// As [`wait`], for a role that may not use the language plpgsql. The end of a slice is an error (55P03), which the
/// server logs.
pub(crate) async fn wait_plainly(
    conn: &mut PgConnection,
    slice: Slice,
) -> Result<Waited, sqlx::Error> {
    let (settings, call) =
        (settings(conn, slice), call(slice, &format!("'{}'", numbers(slice.key))));
    // If the server has rejected this setting or another one, the wait does without it.
    let check = slice.keepalives.and_then(|_| check_connection(conn));
    let check = check.map_or_else(String::new, |check| format!("SELECT {check}; "));
    let statement = format!("{settings}; {check}SELECT {call}; SELECT pg_catalog.pg_backend_pid()");
    let rows = quietly(sqlx::raw_sql(AssertSqlSafe(statement)).fetch_all(conn)).await?;
    let last = rows.last().ok_or(sqlx::Error::RowNotFound)?;
    Ok(Waited { backend_pid: last.try_get(0)?, granted: true })
}

fn settings(conn: &PgConnection, slice: Slice) -> String {
    let keepalives = slice.keepalives.map_or_else(String::new, Keepalives::user_timeout);
    let (limit, key) = (milliseconds(slice.limit), numbers(slice.key));
    let mut settings = format!(
        "SELECT {keepalives}pg_catalog.set_config('statement_timeout', '0', true), \
         pg_catalog.set_config('lock_timeout', '{limit}', true), \
         pg_catalog.set_config('pglock.key', '{key}', true)"
    );
    if conn.server_version_num() >= Some(170_000) {
        settings += ", pg_catalog.set_config('transaction_timeout', '0', true)";
    }
    settings
}

/// Returns a call of the function that waits, with the key in `text`.
fn call(slice: Slice, text: &str) -> String {
    let args = match slice.key {
        KeyId::BigInt(_) => format!("{text}::bigint"),
        KeyId::IntPair(..) => format!(
            "pg_catalog.split_part({text}, ' ', 1)::integer, \
             pg_catalog.split_part({text}, ' ', 2)::integer"
        ),
    };
    format!("pg_catalog.pg_advisory_lock{}({args})", suffix(slice.mode))
}

/// Returns a key as text.
fn numbers(key: KeyId) -> String {
    match key {
        KeyId::BigInt(number) => number.to_string(),
        KeyId::IntPair(first, second) => format!("{first} {second}"),
    }
}
