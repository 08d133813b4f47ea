//! The statement that proves that a lock excludes another session.

use sqlx::{AssertSqlSafe, PgConnection, Row};

/// Acquires a lock if it is free. Returns the backend's process id, and whether the lock was granted.
///
/// Inside a transaction that is left open, a pooler can't assign the server connection to another client.
pub(crate) async fn lock(
    conn: &mut PgConnection,
    key: i64,
    in_transaction: bool,
) -> Result<(i32, bool), sqlx::Error> {
    let begin = if in_transaction { "BEGIN; " } else { "" };
    let statement = format!(
        "{begin}SELECT pg_catalog.pg_backend_pid(), pg_catalog.pg_try_advisory_lock('{key}'::bigint)"
    );
    let row = sqlx::raw_sql(AssertSqlSafe(statement)).fetch_one(conn).await?;
    Ok((row.try_get(0)?, row.try_get(1)?))
}

/// Begins a transaction, inside which a pooler can't assign the server connection to another client.
pub(crate) async fn begin(conn: &mut PgConnection) -> Result<(), sqlx::Error> {
    sqlx::raw_sql("BEGIN").execute(conn).await.map(drop)
}

pub(crate) async fn rollback(conn: &mut PgConnection) -> Result<(), sqlx::Error> {
    sqlx::raw_sql("ROLLBACK").execute(conn).await.map(drop)
}
