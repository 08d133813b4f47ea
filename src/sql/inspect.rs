//! The statements of [`inspect`](crate::inspect), on any connection.

use sqlx::postgres::PgRow;
use sqlx::{AssertSqlSafe, PgExecutor, Row, ValueRef};

use super::place::{self, ADVISORY, LOCKS, place};
use crate::error::sqlstate;
use crate::key::KeyId;
use crate::mode::Mode;

/// A row of the lock table, and what the role may see of its session. Times are in microseconds since 1970.
#[derive(Debug)]
pub(crate) struct LockRow {
    pub(crate) key: KeyId,
    pub(crate) mode: Mode,
    pub(crate) granted: bool,
    pub(crate) wait_start: Option<i64>,
    pub(crate) blocked_by: Vec<i32>,
    pub(crate) asked: i64,
    /// `None` if a prepared transaction holds the lock.
    pub(crate) backend_pid: Option<i32>,
    /// The global identifier of the prepared transaction.
    pub(crate) gid: Option<String>,
    pub(crate) user: Option<String>,
    pub(crate) application_name: Option<String>,
    pub(crate) client_addr: Option<String>,
    pub(crate) state: Option<String>,
    pub(crate) backend_start: Option<i64>,
    pub(crate) xact_start: Option<i64>,
    pub(crate) query_start: Option<i64>,
    pub(crate) state_change: Option<i64>,
}

/// Clears the statistics snapshot of this transaction; always true.
///
/// Within a transaction the server shows the sessions as they were when they were first looked at, but
/// the locks as they are now.
const CLEAR_SNAPSHOT: &str = "pg_catalog.pg_stat_clear_snapshot() IS NOT NULL";

/// Returns the holders and waiters of the advisory locks of this database, or of one of them.
///
/// The functions behind the views are read, because a hardened role may not read the views. The column
/// `waitstart` is new in PostgreSQL 14, so it is read by name. A prepared transaction is found by the
/// lock that it holds on its own transaction id.
pub(crate) async fn locks(
    db: impl PgExecutor<'_>,
    key: Option<KeyId>,
) -> Result<Vec<LockRow>, sqlx::Error> {
    let place = key.map_or_else(|| "true".to_owned(), place);
    // The snapshot is cleared in the argument of the function that reads the sessions, so before the function runs.
    let statement = format!(
        "SELECT l.classid::bigint, l.objid::bigint, l.objsubid::integer, l.mode, l.granted, {}, \
           CASE WHEN NOT l.granted THEN pg_catalog.pg_blocking_pids(l.pid) END, {}, l.pid, {}, {}, {}, \
           pg_catalog.host(a.client_addr), a.state, {}, {}, {}, {}, {NO_ENCODING} \
         FROM (SELECT l.* FROM {LOCKS} WHERE {ADVISORY} AND {place}) AS l \
         LEFT JOIN pg_catalog.pg_stat_get_activity(CASE WHEN NOT ({CLEAR_SNAPSHOT}) THEN 0 END) AS a \
           ON a.pid OPERATOR(pg_catalog.=) l.pid \
         LEFT JOIN (pg_catalog.pg_lock_status() AS x JOIN pg_catalog.pg_prepared_xact() AS p \
             ON p.transaction OPERATOR(pg_catalog.=) x.transactionid) \
           ON l.pid IS NULL AND x.pid IS NULL \
           AND x.virtualtransaction OPERATOR(pg_catalog.=) l.virtualtransaction \
         ORDER BY l.classid, l.objid, l.objsubid, l.granted DESC, 6, l.pid, l.mode",
        micros(
            "(pg_catalog.to_jsonb(l) OPERATOR(pg_catalog.->>) 'waitstart')::timestamp with time zone"
        ),
        micros("pg_catalog.clock_timestamp()"),
        unverified("p.gid"),
        unverified("pg_catalog.pg_get_userbyid(a.usesysid)::pg_catalog.text"),
        unverified("a.application_name"),
        micros("a.backend_start"),
        micros("a.xact_start"),
        micros("a.query_start"),
        micros("a.state_change"),
    );
    let rows = sqlx::raw_sql(AssertSqlSafe(statement)).fetch_all(db).await?;
    rows.iter().map(LockRow::read).collect()
}

/// Ends a session if it was started at this time. Returns whether a signal was sent.
///
/// The process id is a constant, so that pgpool-II recognizes which of its connections ends. Otherwise pgpool-II would
/// detach the server.
pub(crate) async fn terminate(
    db: impl PgExecutor<'_>,
    backend_pid: i32,
    backend_start: i64,
) -> Result<bool, sqlx::Error> {
    let statement = format!(
        "SELECT pg_catalog.pg_terminate_backend({backend_pid}) \
         FROM pg_catalog.pg_stat_get_activity(CASE WHEN {CLEAR_SNAPSHOT} THEN {backend_pid} END) AS a \
         WHERE a.pid OPERATOR(pg_catalog.=) {backend_pid} \
         AND {} OPERATOR(pg_catalog.=) {backend_start}",
        micros("a.backend_start"),
    );
    let rows = sqlx::raw_sql(AssertSqlSafe(statement)).fetch_all(db).await?;
    rows.first().map_or(Ok(false), |row| row.try_get(0))
}

/// Those functions of these statements on which administrators revoke `EXECUTE`. Each name has one function.
const FUNCTIONS: [&str; 5] = [
    "pg_blocking_pids",
    "pg_lock_status",
    "pg_prepared_xact",
    "pg_stat_get_activity",
    "pg_terminate_backend",
];

/// Returns the privilege to grant to the role, if the server refused a statement for lack of one: `EXECUTE` on a
/// function that the message names, or `otherwise`.
pub(crate) fn missing_privilege(error: &sqlx::Error, otherwise: &str) -> Option<String> {
    if sqlstate(error).is_none_or(|code| code != "42501") {
        return None;
    }
    let message = error.as_database_error()?.message();
    let refused = FUNCTIONS.iter().find(|function| message.contains(*function));
    Some(refused.map_or_else(
        || otherwise.to_owned(),
        |function| format!("EXECUTE on the function {function}"),
    ))
}

/// Returns an expression for a time as an integer, without loss.
fn micros(time: &str) -> String {
    format!("(extract(epoch FROM {time}) OPERATOR(pg_catalog.*) 1000000)::bigint")
}

/// A condition: texts of the database may be any bytes.
const NO_ENCODING: &str = "pg_catalog.getdatabaseencoding() OPERATOR(pg_catalog.=) 'SQL_ASCII'";

/// Returns an expression for a text that the server does not verify. From a database without an encoding, the server
/// would send only UTF-8, so there the bytes are sent as hexadecimal digits.
fn unverified(text: &str) -> String {
    format!(
        "CASE WHEN {NO_ENCODING} \
         THEN pg_catalog.encode(pg_catalog.convert_to({text}, 'SQL_ASCII'), 'hex') ELSE {text} END"
    )
}

impl LockRow {
    fn read(row: &PgRow) -> Result<Self, sqlx::Error> {
        let key = place::key(row.try_get(0)?, row.try_get(1)?, row.try_get::<i32, _>(2)?);
        let mode =
            if row.try_get::<&str, _>(3)? == "ShareLock" { Mode::Shared } else { Mode::Exclusive };
        let is_hex = row.try_get(18)?;
        Ok(Self {
            key,
            mode,
            granted: row.try_get(4)?,
            wait_start: row.try_get(5)?,
            blocked_by: row.try_get::<Option<_>, _>(6)?.unwrap_or_default(),
            asked: row.try_get(7)?,
            backend_pid: row.try_get(8)?,
            gid: text(row, 9, is_hex)?,
            user: text(row, 10, is_hex)?,
            application_name: text(row, 11, is_hex)?,
            client_addr: row.try_get(12)?,
            state: row.try_get(13)?,
            backend_start: row.try_get(14)?,
            xact_start: row.try_get(15)?,
            query_start: row.try_get(16)?,
            state_change: row.try_get(17)?,
        })
    }
}

/// Reads a text of [`unverified`]. It may have another encoding: bytes that are not UTF-8 are written as `\xNN`, as the
/// server does in names of applications.
fn text(row: &PgRow, column: usize, is_hex: bool) -> Result<Option<String>, sqlx::Error> {
    let value = row.try_get_raw(column)?;
    if value.is_null() {
        return Ok(None);
    }
    let bytes = value.as_bytes().map_err(sqlx::Error::Decode)?;
    let bytes = if is_hex { from_hex(bytes) } else { bytes.to_vec() };
    let chunks = bytes.utf8_chunks();
    Ok(Some(chunks.fold(String::new(), |text, chunk| {
        let escaped = chunk.invalid().iter().map(|byte| format!("\\x{byte:02x}"));
        text + chunk.valid() + &escaped.collect::<String>()
    })))
}

fn from_hex(digits: &[u8]) -> Vec<u8> {
    let value = |digit: u8| char::from(digit).to_digit(16).unwrap_or_default();
    let byte = |pair: &[u8]| pair.iter().fold(0, |byte, &digit| byte << 4 | value(digit));
    digits.chunks(2).map(|pair| u8::try_from(byte(pair)).unwrap_or_default()).collect()
}
