//! The statement of [`Semaphore`](crate::Semaphore).

use std::ops::RangeInclusive;

use sqlx::{AssertSqlSafe, PgConnection, Row};

use super::place::{ADVISORY, LOCKS};

/// Returns the greatest of these numbers whose lock is held by any session.
pub(crate) async fn greatest_held(
    conn: &mut PgConnection,
    numbers: RangeInclusive<i64>,
) -> Result<Option<i64>, sqlx::Error> {
    let (first, last) = numbers.into_inner();
    // The server shows a number as two halves.
    let statement = format!(
        "SELECT pg_catalog.max(number) FROM (SELECT (l.classid::bigint OPERATOR(pg_catalog.<<) 32) \
           OPERATOR(pg_catalog.|) l.objid::bigint AS number FROM {LOCKS} \
           WHERE {ADVISORY} AND l.granted AND l.objsubid OPERATOR(pg_catalog.=) 1) AS held \
         WHERE number OPERATOR(pg_catalog.>=) '{first}'::bigint \
           AND number OPERATOR(pg_catalog.<=) '{last}'::bigint"
    );
    sqlx::raw_sql(AssertSqlSafe(statement)).fetch_one(conn).await?.try_get(0)
}
