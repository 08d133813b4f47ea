//! Questions to a backend, and about backends.

use std::collections::HashSet;

use sqlx::postgres::PgRow;
use sqlx::{AssertSqlSafe, PgConnection, Row};

use super::units::milliseconds;
use super::{fetch, place};
use crate::error::sqlstate;
use crate::key::KeyId;
use crate::mode::Mode;
use crate::options::Keepalives;

/// A condition: a transaction is open. Inside a transaction, `now()` stays the same from statement to statement.
/// Outside, and in a message of one statement, both functions return the time of that statement.
pub(super) const TIME_STANDS_STILL: &str =
    "pg_catalog.now() OPERATOR(pg_catalog.<>) pg_catalog.statement_timestamp()";

/// Returns the process id of the backend that answers. If `set` is given, first applies the settings of a session that
/// is held for longer.
///
/// Also calls a volatile function, because pgpool-II sends a query of stable functions to a standby.
pub(crate) async fn heartbeat(
    conn: &mut PgConnection,
    set: Option<Keepalives>,
) -> Result<i32, sqlx::Error> {
    let Some(keepalives) = set else {
        let statement = "SELECT pg_catalog.pg_backend_pid(), pg_catalog.clock_timestamp()";
        return fetch(conn, statement).await?.try_get(0);
    };
    let settings = keepalives.settings(conn.server_version_num());
    fetch(conn, format!("SELECT pg_catalog.pg_backend_pid(), {settings}true")).await?.try_get(0)
}

/// Advisory locks, and the process ids of the backends that hold them.
pub(crate) type Held = HashSet<(i32, KeyId, Mode)>;

/// Whether a backend holds a lock, or the exclusive one that covers a shared one.
pub(crate) fn is_covered(held: &Held, pid: i32, (key, mode): (KeyId, Mode)) -> bool {
    held.contains(&(pid, key, mode)) || held.contains(&(pid, key, Mode::Exclusive))
}

/// Returns the process id of the backend that answers, and the advisory locks that these backends hold.
///
/// Asks the function behind `pg_locks`, because a role may be denied the view.
pub(crate) async fn holdings(
    conn: &mut PgConnection,
    pids: &[i32],
) -> Result<(i32, Held), sqlx::Error> {
    let pids: Vec<_> = pids.iter().map(ToString::to_string).collect();
    let statement = format!(
        "SELECT pg_catalog.pg_backend_pid(); \
         SELECT pid, classid::bigint, objid::bigint, objsubid, mode FROM pg_catalog.pg_lock_status() \
         WHERE locktype OPERATOR(pg_catalog.=) 'advisory' AND granted \
         AND pid OPERATOR(pg_catalog.=) ANY ('{{{}}}'::integer[])",
        pids.join(",")
    );
    let rows = sqlx::raw_sql(AssertSqlSafe(statement)).fetch_all(conn).await?;
    let (first, rest) = rows.split_first().ok_or(sqlx::Error::RowNotFound)?;
    Ok((first.try_get(0)?, rest.iter().map(holding).collect::<Result<_, _>>()?))
}

fn holding(row: &PgRow) -> Result<(i32, KeyId, Mode), sqlx::Error> {
    let key = place::key(row.try_get(1)?, row.try_get(2)?, row.try_get::<i16, _>(3)?);
    let exclusive = row.try_get::<&str, _>(4)? == "ExclusiveLock";
    Ok((row.try_get(0)?, key, if exclusive { Mode::Exclusive } else { Mode::Shared }))
}

/// Draws a number that is greater than every one drawn before on this server: a transaction id.
///
/// After a crash, the server could forget that it gave an id to a transaction that wrote nothing. So this transaction
/// writes a message, which nothing reads, to the write-ahead log. Its commit waits for the log as the session's
/// `synchronous_commit` says, but at least until the log is on the server's own disk.
pub(crate) async fn draw_token(conn: &mut PgConnection) -> Result<i64, sqlx::Error> {
    let transaction_id = if conn.server_version_num() >= Some(130_000) {
        "pg_catalog.pg_current_xact_id()::pg_catalog.text::bigint"
    } else {
        "pg_catalog.txid_current()"
    };
    let statement = format!(
        "SELECT {transaction_id}, {TIME_STANDS_STILL}, \
         CASE WHEN pg_catalog.current_setting('synchronous_commit') OPERATOR(pg_catalog.=) 'off' \
         THEN pg_catalog.set_config('synchronous_commit', 'local', true) END, \
         pg_catalog.pg_logical_emit_message(true, 'pglock', '')"
    );
    let row = fetch(conn, statement).await?;
    if row.try_get(1)? && end_transaction(conn).await? {
        // All numbers that are drawn in a transaction are the same.
        return Box::pin(draw_token(conn)).await;
    }
    row.try_get(0)
}

/// Ends a transaction that was left open. Returns whether there was one.
pub(crate) async fn end_transaction(conn: &mut PgConnection) -> Result<bool, sqlx::Error> {
    let answer = fetch(conn, format!("SELECT {TIME_STANDS_STILL}")).await;
    end_if_open(conn, answer).await
}

/// Ends a transaction that was left open, if there is one according to the answer to a query whose first column is
/// [`TIME_STANDS_STILL`]. Returns whether there was one.
pub(super) async fn end_if_open(
    conn: &mut PgConnection,
    answer: Result<PgRow, sqlx::Error>,
) -> Result<bool, sqlx::Error> {
    let open = match answer {
        Ok(row) => row.try_get(0)?,
        // 25P02: a failed transaction rejects everything but its end.
        Err(error) if sqlstate(&error).as_deref() == Some("25P02") => true,
        Err(error) => return Err(error),
    };
    if open {
        sqlx::raw_sql("ROLLBACK").execute(conn).await?;
    }
    Ok(open)
}

/// Cancels the statement that a backend runs, if the backend holds or waits for an advisory lock. Returns whether the
/// server has signalled the backend.
///
/// A cancel names a process, not a session, so the condition makes sure that the process is still a session of ours.
/// The role may have been changed with `SET ROLE`, so it is reset first: the role that has logged in may cancel its own
/// sessions.
pub(crate) async fn cancel(conn: &mut PgConnection, backend_pid: i32) -> Result<bool, sqlx::Error> {
    let statement = format!(
        "SET LOCAL ROLE NONE; \
         SELECT pg_catalog.pg_cancel_backend({backend_pid}) WHERE EXISTS (\
           SELECT FROM pg_catalog.pg_lock_status() \
           WHERE locktype OPERATOR(pg_catalog.=) 'advisory' \
           AND pid OPERATOR(pg_catalog.=) {backend_pid})"
    );
    let row = sqlx::raw_sql(AssertSqlSafe(statement)).fetch_optional(conn).await?;
    row.map_or(Ok(false), |row| row.try_get(0))
}

/// Returns the server's `deadlock_timeout`, in milliseconds.
pub(crate) async fn deadlock_timeout(conn: &mut PgConnection) -> Result<Option<i64>, sqlx::Error> {
    let row = fetch(conn, "SELECT pg_catalog.current_setting('deadlock_timeout')").await?;
    Ok(milliseconds(row.try_get(0)?))
}
