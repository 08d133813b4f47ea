//! The statement of an observer of an [`Election`](crate::Election).

use sqlx::{AssertSqlSafe, PgConnection, Row};

use super::place::{ADVISORY, LOCKS, place};
use crate::key::KeyId;

/// The session that holds a key exclusively.
pub(crate) struct Holder {
    pub(crate) backend_pid: i32,
    pub(crate) application_name: String,
    /// `None` over a unix socket, and if the role may not see it.
    pub(crate) client_addr: Option<String>,
}

/// Returns the session that holds a key exclusively, asked on any connection.
pub(crate) async fn holder(
    conn: &mut PgConnection,
    key: KeyId,
) -> Result<Option<Holder>, sqlx::Error> {
    let statement = format!(
        "SELECT a.pid, coalesce(a.application_name, ''), pg_catalog.host(a.client_addr) \
         FROM {LOCKS} JOIN pg_catalog.pg_stat_get_activity(NULL) AS a \
           ON a.pid OPERATOR(pg_catalog.=) l.pid \
         WHERE {ADVISORY} AND l.granted AND l.mode OPERATOR(pg_catalog.=) 'ExclusiveLock' AND {}",
        place(key),
    );
    let row = sqlx::raw_sql(AssertSqlSafe(statement)).fetch_optional(conn).await?;
    let Some(row) = row else { return Ok(None) };
    Ok(Some(Holder {
        backend_pid: row.try_get(0)?,
        application_name: row.try_get(1)?,
        client_addr: row.try_get(2)?,
    }))
}
