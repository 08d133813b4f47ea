//! The statement of [`Semaphore`](crate::Semaphore).

use sqlx::{AssertSqlSafe, PgConnection, Row};

use super::place::{ADVISORY, LOCKS};
use crate::key::KeyId;
use crate::semaphore::BITS;

/// Returns the size of the semaphore in the key of a permit that is held and that was made for
/// another size than this permit.
pub(crate) async fn other_count(
    conn: &mut PgConnection,
    permit: KeyId,
) -> Result<Option<i64>, sqlx::Error> {
    let KeyId::BigInt(id) = permit else { return Ok(None) };
    let mask = (1 << BITS) - 1;
    let statement = format!(
        "SELECT held.size OPERATOR(pg_catalog.+) 1 FROM (SELECT \
           permit.id OPERATOR(pg_catalog.>>) {hash} AS hash, \
           (permit.id OPERATOR(pg_catalog.>>) {BITS}) OPERATOR(pg_catalog.&) {mask} AS size \
           FROM (SELECT (l.classid::bigint OPERATOR(pg_catalog.<<) 32) \
             OPERATOR(pg_catalog.|) l.objid::bigint AS id FROM {LOCKS} \
             WHERE {ADVISORY} AND l.granted AND l.objsubid OPERATOR(pg_catalog.=) 1) AS permit) AS held \
         WHERE held.hash OPERATOR(pg_catalog.=) ('{id}'::bigint OPERATOR(pg_catalog.>>) {hash}) \
         AND held.size OPERATOR(pg_catalog.<>) {size} LIMIT 1",
        hash = 2 * BITS,
        size = id >> BITS & mask,
    );
    let row = sqlx::raw_sql(AssertSqlSafe(statement)).fetch_optional(conn).await?;
    row.map(|row| row.try_get(0)).transpose()
}
