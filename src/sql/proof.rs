//! The statements that prove that a lock excludes another session.

use sqlx::{AssertSqlSafe, PgConnection, Row};

/// Takes a lock if it is free. Returns the backend's process id, and whether the lock was granted.
pub(crate) async fn lock(conn: &mut PgConnection, key: i64) -> Result<(i32, bool), sqlx::Error> {
    call(conn, "", "pg_try_advisory_lock", key).await
}

/// The same inside a transaction that is left open. A pooler can't assign its server connection to another
/// client meanwhile.
pub(crate) async fn lock_in_transaction(
    conn: &mut PgConnection,
    key: i64,
) -> Result<(i32, bool), sqlx::Error> {
    call(conn, "BEGIN; ", "pg_try_advisory_lock", key).await
}

/// Gives a lock up. Returns the backend's process id, and whether it held the lock.
pub(crate) async fn unlock(conn: &mut PgConnection, key: i64) -> Result<(i32, bool), sqlx::Error> {
    call(conn, "", "pg_advisory_unlock", key).await
}

/// Ends the transaction.
pub(crate) async fn end_transaction(conn: &mut PgConnection) -> Result<(), sqlx::Error> {
    sqlx::raw_sql("ROLLBACK").execute(conn).await.map(drop)
}

async fn call(
    conn: &mut PgConnection,
    before: &str,
    function: &str,
    key: i64,
) -> Result<(i32, bool), sqlx::Error> {
    let statement = format!(
        "{before}SELECT pg_catalog.pg_backend_pid(), pg_catalog.{function}('{key}'::bigint)"
    );
    let row = sqlx::raw_sql(AssertSqlSafe(statement)).fetch_one(conn).await?;
    Ok((row.try_get(0)?, row.try_get(1)?))
}
