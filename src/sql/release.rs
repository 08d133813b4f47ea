//! Releases locks.

use sqlx::{AssertSqlSafe, Connection, PgConnection, Row};

use super::{args, bind, call, calls, fetch, pair, parameters, suffix};
use crate::error::is_not_prepared;
use crate::key::KeyId;
use crate::mode::Mode;

/// How an unlock is sent.
#[derive(Clone, Copy)]
pub(crate) enum Protocol {
    /// As a prepared statement: cheaper, but the first on a connection takes two messages.
    Extended,
    /// As one message, which is sent with the first write to the socket. After that, there may be no task left that
    /// could write another one.
    Simple,
}

/// The answer to an unlock.
pub(crate) struct Unlocked {
    pub(crate) backend_pid: i32,
    /// Whether the session held every one of the locks.
    pub(crate) all: bool,
}

/// Releases locks.
///
/// One lock, the usual case, is released by the requested protocol, and several in one message.
pub(crate) async fn unlock(
    conn: &mut PgConnection,
    locks: &[(KeyId, Mode)],
    protocol: Protocol,
) -> Result<Unlocked, sqlx::Error> {
    if let (&[(key, mode)], Protocol::Extended) = (locks, protocol)
        && let Some(unlocked) = unlock_one(conn, key, mode).await?
    {
        return Ok(unlocked);
    }
    unlock_all(conn, locks).await
}

/// Releases one lock. Returns `None` if the prepared statement was deallocated.
async fn unlock_one(
    conn: &mut PgConnection,
    key: KeyId,
    mode: Mode,
) -> Result<Option<Unlocked>, sqlx::Error> {
    let (suffix, parameters) = (suffix(mode), parameters(key));
    let statement = format!(
        "SELECT pg_catalog.pg_advisory_unlock{suffix}({parameters}), pg_catalog.pg_backend_pid()"
    );
    match bind(statement, key).fetch_one(&mut *conn).await {
        Ok(row) => Ok(Some(Unlocked { backend_pid: row.try_get(1)?, all: row.try_get(0)? })),
        // The prepared statement was deallocated, for example by `DISCARD ALL`.
        Err(error) if is_not_prepared(&error) => {
            Box::pin(conn.clear_cached_statements()).await?;
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

const UNLOCK: &str = call!("pg_advisory_unlock");

/// Returns an expression that releases locks, and is true if the session held all of them.
fn unlocks(locks: &[(KeyId, Mode)]) -> String {
    match *locks {
        [] => "true".to_owned(),
        // Shorter to plan, and the usual case.
        [(key, mode)] => {
            format!("pg_catalog.pg_advisory_unlock{}({})", suffix(mode), args(key))
        }
        _ => format!("(SELECT pg_catalog.bool_and({UNLOCK}) FROM {})", calls(locks)),
    }
}

/// Releases locks, all in one message.
pub(crate) async fn unlock_all(
    conn: &mut PgConnection,
    locks: &[(KeyId, Mode)],
) -> Result<Unlocked, sqlx::Error> {
    let statement = format!("SELECT pg_catalog.pg_backend_pid(), {}", unlocks(locks));
    let row = fetch(conn, statement).await?;
    Ok(Unlocked { backend_pid: row.try_get(0)?, all: row.try_get(1)? })
}

/// Releases locks if this backend answers the statement. Returns whether it did.
pub(crate) async fn unlock_on(
    conn: &mut PgConnection,
    backend_pid: i32,
    locks: &[(KeyId, Mode)],
) -> Result<bool, sqlx::Error> {
    let unlocks = unlocks(locks);
    let statement = format!(
        "SELECT pg_catalog.pg_backend_pid(), \
         CASE WHEN pg_catalog.pg_backend_pid() OPERATOR(pg_catalog.=) {backend_pid} THEN {unlocks} END"
    );
    let row = fetch(conn, statement).await?;
    Ok(row.try_get::<i32, _>(0)? == backend_pid)
}

/// Downgrades an exclusive lock to a shared one, without a moment in which neither is held.
///
/// Because the session holds the exclusive lock, it is granted the shared one ahead of all waiters; `pg_try_…` would
/// not grant it.
pub(crate) async fn downgrade(
    conn: &mut PgConnection,
    key: KeyId,
) -> Result<Unlocked, sqlx::Error> {
    let key = args(key);
    let statement = format!(
        "SELECT pg_catalog.pg_advisory_lock_shared({key}); \
         SELECT pg_catalog.pg_backend_pid(), pg_catalog.pg_advisory_unlock({key})"
    );
    let rows = sqlx::raw_sql(AssertSqlSafe(statement)).fetch_all(conn).await?;
    let row = rows.last().ok_or(sqlx::Error::RowNotFound)?;
    Ok(Unlocked { backend_pid: row.try_get(0)?, all: row.try_get(1)? })
}
