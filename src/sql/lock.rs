//! Acquires locks that are free.

use sqlx::postgres::PgRow;
use sqlx::{Connection, PgConnection, Row};

use super::backend::{TIME_STANDS_STILL, end_transaction};
use super::{bind, call, calls, fetch, pair, parameters, suffix};
use crate::error::is_not_prepared;
use crate::key::KeyId;
use crate::mode::Mode;
use crate::options::LockOptions;
use crate::request::Need;

/// The answer to [`try_lock`].
pub(crate) struct Tried {
    pub(crate) backend_pid: i32,
    /// For [`Need::All`], how many locks were granted before one was busy; for [`Need::Any`], how many were busy before
    /// one was granted. `None` on a standby.
    pub(crate) count: Option<usize>,
    /// Whether the role has a limit on idle sessions.
    pub(crate) idle_limited: bool,
    /// Whether the session does without the settings of [`Keepalives`](crate::options::Keepalives).
    pub(crate) refused: bool,
}

/// The mark of a session on which the server rejected the settings.
const REFUSED: &str = "none";

/// Acquires locks that are free, returns the backend's pid, and makes the server monitor this client.
///
/// The locks are tried in order. [`Need::All`] stops at the first that is busy, [`Need::Any`] at the first that is
/// free.
///
/// A connection with prepared statements has usually been used for a lock before, and has the mark. Then one short
/// prepared statement acquires one lock. Without the mark, a second statement does the rest. On a fresh connection, one
/// statement does everything.
pub(crate) async fn try_lock(
    conn: &mut PgConnection,
    locks: &[(KeyId, Mode)],
    need: Need,
    options: &LockOptions,
    with_settings: bool,
) -> Result<Tried, sqlx::Error> {
    // The mark of a session that has the settings, or does without them.
    let wanted = if with_settings { &*options.mark } else { REFUSED };
    let mut granted = None;
    if let &[(key, mode)] = locks
        && conn.cached_statements_size() > 0
    {
        match try_one_lock(conn, key, mode).await {
            Ok((backend_pid, is_granted, mark)) => {
                let refused = mark.as_deref() == Some(REFUSED);
                // `All` counts the locks that were granted, and `Any` those that were busy.
                let count = Some(usize::from(is_granted == (need == Need::All)));
                let tried = Tried { backend_pid, count, idle_limited: false, refused };
                let has_mark = mark.as_deref() == Some(wanted);
                if has_mark || (refused && !options.require_settings) {
                    return Ok(tried);
                }
                granted = is_granted.then_some(tried);
            }
            // The prepared statement was deallocated, for example by `DISCARD ALL`.
            Err(error) if is_not_prepared(&error) => {
                Box::pin(conn.clear_cached_statements()).await?;
            }
            Err(error) => return Err(error),
        }
    }
    // Boxed, because usually it is not needed.
    Box::pin(async {
        let Some(granted) = granted else {
            return try_with_settings(conn, locks, need, options, wanted).await;
        };
        let set = try_with_settings(conn, &[], need, options, wanted).await?;
        if set.count.is_none() {
            super::release::unlock_all(conn, locks).await?;
        }
        let count = set.count.and(granted.count);
        Ok(Tried { backend_pid: granted.backend_pid, count, ..set })
    })
    .await
}

/// Acquires a lock if it is free. Returns the backend's pid, whether the lock was granted, and the mark of the session.
///
/// The server spends as much time on each function in the statement as on the lock, so the client computes whatever it
/// can.
async fn try_one_lock(
    conn: &mut PgConnection,
    key: KeyId,
    mode: Mode,
) -> Result<(i32, bool, Option<String>), sqlx::Error> {
    let (suffix, parameters) = (suffix(mode), parameters(key));
    let statement = format!(
        "SELECT pg_catalog.pg_backend_pid(), pg_catalog.now(), pg_catalog.statement_timestamp(), \
         pg_catalog.current_setting('pglock.keepalives', true), \
         pg_catalog.pg_try_advisory_lock{suffix}({parameters})"
    );
    let row = bind(statement, key).fetch_one(&mut *conn).await?;
    let tried = (row.try_get(0)?, row.try_get(4)?, row.try_get(3)?);
    if microseconds(&row, 2)? - microseconds(&row, 1)? > STANDS_STILL_FOR {
        end_transaction(conn).await?;
    }
    Ok(tried)
}

/// The difference in microseconds above which a transaction may have been left open. In a prepared statement, the time
/// of the transaction and that of the statement differ by what the server spends on binding. A transaction that was
/// left open is older, because the pool has pinged the connection since. Asking once too often does no harm.
const STANDS_STILL_FOR: i64 = 100;

/// Reads a timestamp of a prepared statement, in microseconds since a fixed time in the past.
fn microseconds(row: &PgRow, column: usize) -> Result<i64, sqlx::Error> {
    let bytes = row.try_get_raw(column)?.as_bytes().map_err(sqlx::Error::Decode)?;
    let bytes = bytes.try_into().map_err(|error| sqlx::Error::Decode(Box::new(error)))?;
    Ok(i64::from_be_bytes(bytes))
}

/// The role's limit on idle sessions. Unknown before PostgreSQL 14.
const IDLE_LIMIT: &str = "pg_catalog.current_setting('idle_session_timeout', true)";

const TRY: &str = call!("pg_try_advisory_lock");

/// Does all of [`try_lock`], on a session that may not have the mark.
///
/// The settings come before the locks, so if a setting is rejected, no lock was acquired. The server tries the keys in
/// order, and stops at the first that decides.
async fn try_with_settings(
    conn: &mut PgConnection,
    locks: &[(KeyId, Mode)],
    need: Need,
    options: &LockOptions,
    mark: &str,
) -> Result<Tried, sqlx::Error> {
    let refused = mark == REFUSED;
    let settings = if refused { String::new() } else { options.keepalives.keepalives() };
    let count = locks.len();
    let tries = if locks.is_empty() {
        count.to_string()
    } else {
        let calls = calls(locks);
        let not = if need == Need::All { "NOT " } else { "" };
        format!(
            "coalesce((SELECT n OPERATOR(pg_catalog.-) 1 FROM {calls} WHERE {not}{TRY} LIMIT 1), {count})"
        )
    };
    let standby = if options.allow_standby { "false" } else { "pg_catalog.pg_is_in_recovery()" };
    // A session on a standby never gets the mark, so that each acquire checks whether the server is still a standby.
    // Nor does a session with a limit on idle sessions, which each holder disables.
    let statement = format!(
        "SELECT pg_catalog.pg_backend_pid(), {TIME_STANDS_STILL}, {IDLE_LIMIT}, {settings}\
         CASE WHEN NOT pg_catalog.pg_is_in_recovery() \
           AND coalesce({IDLE_LIMIT}, '0') OPERATOR(pg_catalog.=) '0' \
         THEN pg_catalog.set_config('pglock.keepalives', '{mark}', false) END, \
         CASE WHEN NOT {standby} THEN ({tries})::bigint END AS count"
    );
    let row = fetch(conn, statement).await?;
    let limit: Option<&str> = row.try_get(2)?;
    let count: Option<i64> = row.try_get("count")?;
    let answer = Tried {
        backend_pid: row.try_get(0)?,
        count: count.and_then(|count| usize::try_from(count).ok()),
        idle_limited: limit.is_some_and(|limit| limit != "0"),
        refused,
    };
    if row.try_get(1)? && end_transaction(conn).await? {
        // The rollback has undone the settings, but no lock.
        Box::pin(try_with_settings(conn, &[], need, options, mark)).await?;
    }
    Ok(answer)
}
