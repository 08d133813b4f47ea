//! The statements of [`inspect`](crate::inspect), on whatever connection the caller has.

use sqlx::postgres::PgRow;
use sqlx::{AssertSqlSafe, PgExecutor, Row};

use super::{OF_THIS_DATABASE, Place};
use crate::key::KeyId;
use crate::mode::Mode;

/// A row of `pg_locks`, and what the server says of its session. Times are in microseconds since 1970.
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

/// Forgets what this transaction has seen of the sessions, and is always true.
///
/// The server shows a transaction the sessions as they were when it first looked, and its locks as they
/// are now.
const LOOK_AGAIN: &str = "pg_stat_clear_snapshot() IS NOT NULL";

/// Asks who holds and who waits for the advisory locks of this database, or for one of them.
///
/// `waitstart` is new in PostgreSQL 14, so it is asked for by name. A prepared transaction is found by
/// the lock that it holds on its own id.
pub(crate) async fn locks(
    db: impl PgExecutor<'_>,
    key: Option<KeyId>,
) -> Result<Vec<LockRow>, sqlx::Error> {
    let place = key.map_or_else(|| "true".to_owned(), |key| Place(key).to_string());
    // The sessions are an argument's subject, and so looked at after it: see `LOOK_AGAIN`.
    let statement = format!(
        "SELECT l.classid::int8, l.objid::int8, l.objsubid::int4, l.mode, l.granted, {}, \
           CASE WHEN NOT l.granted THEN pg_blocking_pids(l.pid) END, {}, l.pid, p.gid, \
           u.rolname::text, a.application_name, host(a.client_addr), a.state, {}, {}, {}, {} \
         FROM (SELECT * FROM pg_locks WHERE locktype = 'advisory' AND {OF_THIS_DATABASE} AND {place}) l \
         LEFT JOIN pg_stat_get_activity(CASE WHEN NOT ({LOOK_AGAIN}) THEN 0 END) a ON a.pid = l.pid \
         LEFT JOIN pg_roles u ON u.oid = a.usesysid \
         LEFT JOIN (pg_locks x JOIN pg_prepared_xacts p ON p.transaction = x.transactionid) \
           ON l.pid IS NULL AND x.pid IS NULL AND x.virtualtransaction = l.virtualtransaction \
         ORDER BY l.classid, l.objid, l.objsubid, l.granted DESC, 6, l.pid, l.mode",
        micros("(to_jsonb(l) ->> 'waitstart')::timestamptz"),
        micros("clock_timestamp()"),
        micros("a.backend_start"),
        micros("a.xact_start"),
        micros("a.query_start"),
        micros("a.state_change"),
    );
    let rows = sqlx::raw_sql(AssertSqlSafe(statement)).fetch_all(db).await?;
    rows.iter().map(LockRow::read).collect()
}

/// Ends a session, if it still is the one that was started then. Returns whether it was told to end.
pub(crate) async fn terminate(
    db: impl PgExecutor<'_>,
    backend_pid: i32,
    backend_start: i64,
) -> Result<bool, sqlx::Error> {
    let statement = format!(
        "SELECT pg_terminate_backend(pid) \
         FROM pg_stat_get_activity(CASE WHEN {LOOK_AGAIN} THEN {backend_pid} END) \
         WHERE pid = {backend_pid} AND {} = {backend_start}",
        micros("backend_start"),
    );
    let rows = sqlx::raw_sql(AssertSqlSafe(statement)).fetch_all(db).await?;
    rows.first().map_or(Ok(false), |row| row.try_get(0))
}

/// A time as an integer, in which nothing is lost.
fn micros(time: &str) -> String {
    format!("(extract(epoch FROM {time}) * 1000000)::int8")
}

impl LockRow {
    fn read(row: &PgRow) -> Result<Self, sqlx::Error> {
        let (classid, objid): (i64, i64) = (row.try_get(0)?, row.try_get(1)?);
        let key = if row.try_get::<i32, _>(2)? == 1 {
            KeyId::BigInt(classid << 32 | objid)
        } else {
            KeyId::IntPair(half(classid), half(objid))
        };
        let mode =
            if row.try_get::<&str, _>(3)? == "ShareLock" { Mode::Shared } else { Mode::Exclusive };
        Ok(Self {
            key,
            mode,
            granted: row.try_get(4)?,
            wait_start: row.try_get(5)?,
            blocked_by: row.try_get::<Option<_>, _>(6)?.unwrap_or_default(),
            asked: row.try_get(7)?,
            backend_pid: row.try_get(8)?,
            gid: row.try_get(9)?,
            user: row.try_get(10)?,
            application_name: row.try_get(11)?,
            client_addr: row.try_get(12)?,
            state: row.try_get(13)?,
            backend_start: row.try_get(14)?,
            xact_start: row.try_get(15)?,
            query_start: row.try_get(16)?,
            state_change: row.try_get(17)?,
        })
    }
}

/// An `int` from its bits.
fn half(oid: i64) -> i32 {
    u32::try_from(oid).unwrap_or_default().cast_signed()
}
