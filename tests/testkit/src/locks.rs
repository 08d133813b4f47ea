//! The advisory locks that PostgreSQL shows, for assertions.

use sqlx::PgConnection;
use sqlx::Row;

/// A row of `pg_locks`: an advisory lock held or waited for.
#[derive(Clone, Debug, Eq, PartialEq)]
#[expect(clippy::exhaustive_structs, reason = "tests compare whole rows")]
pub struct AdvisoryLock {
    /// The pid of the session's backend.
    pub pid: i32,
    /// The first `int` of a pair, or the upper half of a `bigint`.
    pub classid: i64,
    /// The second `int` of a pair, or the lower half of a `bigint`.
    pub objid: i64,
    /// 1 for a `bigint`, 2 for a pair.
    pub objsubid: i16,
    /// `ExclusiveLock` or `ShareLock`.
    pub mode: String,
    /// True if held, false if waited for.
    pub granted: bool,
}

/// Returns the advisory locks of the database that `conn` is connected to, ordered by key.
///
/// Leaves out the locks of the proof of exclusion, which runs beside the first acquires of a process, and takes
/// seconds over a slow link. The last statement of its session identifies a lock of the proof, because the connections
/// of the proof send no other statement that locks. The proof's unlock looks like any other, so it identifies the lock
/// only while it runs.
pub async fn advisory_locks(conn: &mut PgConnection) -> Vec<AdvisoryLock> {
    let rows = sqlx::query(
        "SELECT coalesce(pid, 0), classid::int8, objid::int8, objsubid, mode, granted
         FROM pg_locks AS held
         WHERE locktype = 'advisory'
           AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
           -- A prepared transaction has no session. Any other has ended, if it is not there after the locks were read.
           AND (pid IS NULL OR (SELECT query !~
                '^(BEGIN; )?SELECT pg_catalog.pg_backend_pid.., pg_catalog.pg_try_advisory_lock[(]''-?[0-9]+''::bigint[)]$'
                AND NOT (
                    query = 'SELECT pg_catalog.pg_backend_pid(), pg_catalog.pg_advisory_unlock('''
                        || (classid::int8 << 32 | objid::int8) || '''::bigint)'
                    AND (state = 'active' OR state_change >= statement_timestamp())
                )
                FROM pg_stat_activity AS session WHERE session.pid = held.pid))
         ORDER BY classid, objid, objsubid, granted DESC, pid, mode",
    );
    let rows = rows.fetch_all(conn).await.expect("pg_locks is readable");
    let lock = |row: &sqlx::postgres::PgRow| AdvisoryLock {
        pid: row.get(0),
        classid: row.get(1),
        objid: row.get(2),
        objsubid: row.get(3),
        mode: row.get(4),
        granted: row.get(5),
    };
    rows.iter().map(lock).collect()
}
