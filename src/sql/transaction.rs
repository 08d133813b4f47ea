//! The statements of [`transaction`](crate::transaction), on a transaction of the caller.

use std::time::Duration;

use sqlx::{AssertSqlSafe, PgConnection, Row};

use super::quiet::quietly;
use super::{args, fetch, suffix, units};
use crate::error::sqlstate;
use crate::key::KeyId;
use crate::mode::Mode;

/// The answer to [`try_lock`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Tried {
    Busy { deadlock_timeout: Duration },
    Granted,
    Standby,
}

/// Acquires a transaction-level lock on the connection if it is free.
///
/// Uses the simple protocol, because behind a pooler in transaction mode the next transaction does not find prepared
/// statements.
pub(crate) async fn try_lock(
    conn: &mut PgConnection,
    key: KeyId,
    mode: Mode,
) -> Result<Tried, sqlx::Error> {
    let (suffix, key) = (suffix(mode), args(key));
    let statement = format!(
        "SELECT CASE WHEN pg_catalog.pg_is_in_recovery() THEN NULL \
           ELSE pg_catalog.pg_try_advisory_xact_lock{suffix}({key}) END, \
         pg_catalog.current_setting('deadlock_timeout', true)"
    );
    let row = fetch(conn, statement).await?;
    Ok(match row.try_get(0)? {
        None => Tried::Standby,
        Some(true) => Tried::Granted,
        Some(false) => {
            let timeout = row.try_get::<Option<&str>, _>(1)?.and_then(units::milliseconds);
            let timeout = timeout.and_then(|timeout| u64::try_from(timeout).ok());
            Tried::Busy { deadlock_timeout: Duration::from_millis(timeout.unwrap_or(1000)) }
        }
    })
}

/// Waits in the server's queue for a transaction-level lock. Returns whether the lock was granted: `false` after the
/// limit, or at once if this call has set `plainly`.
///
/// The transaction is the caller's, so its settings are restored, and it stays usable after a timeout.
///
/// Waits in a PL/pgSQL block, which catches the timeout, so the server logs nothing. If the role may not use PL/pgSQL,
/// sets `plainly`. With `plainly`, waits in a plain call, of which the server logs each timeout as an error.
pub(crate) async fn wait(
    conn: &mut PgConnection,
    key: KeyId,
    mode: Mode,
    limit: Duration,
    plainly: &mut bool,
) -> Result<bool, sqlx::Error> {
    if *plainly {
        return wait_in_call(conn, key, mode, limit).await;
    }
    match wait_in_block(conn, key, mode, limit).await {
        // 42704: there is no such language. 42501: the role may not use it. Where the role may not call the function,
        // the plain call fails with the same error.
        Err(error) if matches!(sqlstate(&error).as_deref(), Some("42704" | "42501")) => {
            roll_back(conn).await?;
            *plainly = true;
            Ok(false)
        }
        waited => waited,
    }
}

/// Waits, and returns the result in `pglock.granted`.
///
/// The text is constant and the values travel as settings, because the server's statement statistics
/// have one entry per text of a `DO` statement.
///
/// The body is a subtransaction. A timeout rolls it back, and with it the settings, and the lock if it
/// was granted just before the timeout. While it waits:
///
/// * `client_connection_check_interval` is 0, because before PostgreSQL 19 each check writes another
///   "still waiting" to the log if `log_lock_waits` is on. It is unknown before PostgreSQL 14.
/// * `log_lock_waits` is off, where the role may set it.
const WAIT: &str = "DO $$ DECLARE \
      old_lock_timeout pg_catalog.text := pg_catalog.current_setting('lock_timeout'); \
      old_check_interval pg_catalog.text := \
        pg_catalog.current_setting('client_connection_check_interval', true); \
      logs boolean := pg_catalog.current_setting('log_lock_waits') OPERATOR(pg_catalog.=) 'on'; \
      shared boolean := pg_catalog.current_setting('pglock.mode') OPERATOR(pg_catalog.=) 'shared'; \
      key1 pg_catalog.text := pg_catalog.current_setting('pglock.key1'); \
      key2 pg_catalog.text := pg_catalog.current_setting('pglock.key2'); \
    BEGIN \
      PERFORM pg_catalog.set_config('lock_timeout', pg_catalog.current_setting('pglock.limit'), true); \
      IF old_check_interval OPERATOR(pg_catalog.<>) '0' THEN \
        PERFORM pg_catalog.set_config('client_connection_check_interval', '0', true); \
      END IF; \
      IF logs THEN \
        BEGIN \
          PERFORM pg_catalog.set_config('log_lock_waits', 'off', true); \
        EXCEPTION WHEN insufficient_privilege THEN logs := false; \
        END; \
      END IF; \
      IF key2 OPERATOR(pg_catalog.=) '' AND NOT shared THEN \
        PERFORM pg_catalog.pg_advisory_xact_lock(key1::bigint); \
      ELSIF key2 OPERATOR(pg_catalog.=) '' THEN \
        PERFORM pg_catalog.pg_advisory_xact_lock_shared(key1::bigint); \
      ELSIF NOT shared THEN \
        PERFORM pg_catalog.pg_advisory_xact_lock(key1::integer, key2::integer); \
      ELSE \
        PERFORM pg_catalog.pg_advisory_xact_lock_shared(key1::integer, key2::integer); \
      END IF; \
      PERFORM pg_catalog.set_config('pglock.granted', 'true', true); \
      PERFORM pg_catalog.set_config('lock_timeout', old_lock_timeout, true); \
      IF old_check_interval OPERATOR(pg_catalog.<>) '0' THEN \
        PERFORM pg_catalog.set_config('client_connection_check_interval', old_check_interval, true); \
      END IF; \
      IF logs THEN \
        PERFORM pg_catalog.set_config('log_lock_waits', 'on', true); \
      END IF; \
    EXCEPTION WHEN lock_not_available THEN NULL; \
    END $$";

/// Sends one message, which disables `statement_timeout` before the statement that it would end. The savepoint is
/// needed if the server refuses the block.
async fn wait_in_block(
    conn: &mut PgConnection,
    key: KeyId,
    mode: Mode,
    limit: Duration,
) -> Result<bool, sqlx::Error> {
    let (key1, key2) = match key {
        KeyId::BigInt(number) => (number, String::new()),
        KeyId::IntPair(first, second) => (first.into(), second.to_string()),
    };
    let limit = super::milliseconds(limit);
    let statement = format!(
        "SAVEPOINT pglock; \
         SELECT pg_catalog.set_config('pglock.statement_timeout', \
             pg_catalog.current_setting('statement_timeout'), true), \
           pg_catalog.set_config('statement_timeout', '0', true), \
           pg_catalog.set_config('pglock.mode', '{mode}', true), \
           pg_catalog.set_config('pglock.key1', '{key1}', true), \
           pg_catalog.set_config('pglock.key2', '{key2}', true), \
           pg_catalog.set_config('pglock.limit', '{limit}', true), \
           pg_catalog.set_config('pglock.granted', 'false', true); \
         {WAIT}; \
         SELECT pg_catalog.current_setting('pglock.granted'), \
           pg_catalog.set_config('statement_timeout', \
             pg_catalog.current_setting('pglock.statement_timeout'), true); \
         RELEASE SAVEPOINT pglock"
    );
    let rows = quietly(sqlx::raw_sql(AssertSqlSafe(statement)).fetch_all(conn)).await?;
    let granted: &str = rows.last().ok_or(sqlx::Error::RowNotFound)?.try_get(0)?;
    Ok(granted == "true")
}

/// Waits in a plain call. Without PL/pgSQL, nothing catches the timeout, so the wait is rolled back here.
/// `log_lock_waits` is turned off for superusers only, because an attempt that fails would end the statement.
async fn wait_in_call(
    conn: &mut PgConnection,
    key: KeyId,
    mode: Mode,
    limit: Duration,
) -> Result<bool, sqlx::Error> {
    let limit = super::milliseconds(limit);
    let (suffix, key) = (suffix(mode), args(key));
    let statement = format!(
        "SAVEPOINT pglock; \
         SELECT pg_catalog.set_config('pglock.statement_timeout', \
             pg_catalog.current_setting('statement_timeout'), true), \
           pg_catalog.set_config('pglock.lock_timeout', \
             pg_catalog.current_setting('lock_timeout'), true), \
           pg_catalog.set_config('pglock.check_interval', coalesce( \
             pg_catalog.current_setting('client_connection_check_interval', true), '0'), true), \
           pg_catalog.set_config('pglock.log_lock_waits', \
             pg_catalog.current_setting('log_lock_waits'), true); \
         SELECT pg_catalog.set_config('statement_timeout', '0', true), \
           pg_catalog.set_config('lock_timeout', '{limit}', true), \
           CASE WHEN pg_catalog.current_setting('pglock.check_interval') OPERATOR(pg_catalog.<>) '0' \
             THEN pg_catalog.set_config('client_connection_check_interval', '0', true) END, \
           CASE WHEN pg_catalog.current_setting('is_superuser') OPERATOR(pg_catalog.=) 'on' \
             THEN pg_catalog.set_config('log_lock_waits', 'off', true) END; \
         SELECT pg_catalog.pg_advisory_xact_lock{suffix}({key}); \
         SELECT pg_catalog.set_config('lock_timeout', \
             pg_catalog.current_setting('pglock.lock_timeout'), true), \
           CASE WHEN pg_catalog.current_setting('pglock.check_interval') OPERATOR(pg_catalog.<>) '0' \
             THEN pg_catalog.set_config('client_connection_check_interval', \
               pg_catalog.current_setting('pglock.check_interval'), true) END, \
           CASE WHEN pg_catalog.current_setting('is_superuser') OPERATOR(pg_catalog.=) 'on' \
             THEN pg_catalog.set_config('log_lock_waits', \
               pg_catalog.current_setting('pglock.log_lock_waits'), true) END, \
           pg_catalog.set_config('statement_timeout', \
             pg_catalog.current_setting('pglock.statement_timeout'), true); \
         RELEASE SAVEPOINT pglock"
    );
    match quietly(sqlx::raw_sql(AssertSqlSafe(statement)).fetch_all(&mut *conn)).await {
        Ok(_) => Ok(true),
        Err(error) if sqlstate(&error).as_deref() == Some("55P03") => {
            roll_back(conn).await?;
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

/// Undoes a wait that failed. The transaction is then as it was before the wait.
async fn roll_back(conn: &mut PgConnection) -> Result<(), sqlx::Error> {
    let statement = "ROLLBACK TO SAVEPOINT pglock; RELEASE SAVEPOINT pglock";
    sqlx::raw_sql(statement).execute(conn).await.map(drop)
}
