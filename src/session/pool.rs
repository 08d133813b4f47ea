//! Acquires connections of the pool, for no longer than the caller waits.

use std::sync::Arc;
use std::time::Instant;

use sqlx::pool::PoolConnection;
use sqlx::{PgPool, Postgres};
use tokio::time::timeout_at;

use super::budget;
use super::policy::WaitPolicy;
use crate::error::{Error, Result, sqlstate};
use crate::key::Key;

/// Acquires a connection of the pool. Waits until the caller's deadline, but for no longer than the pool's
/// `acquire_timeout`, counted from `since`.
///
/// A caller that only tries does not wait for the lock, but it waits for the pool like any query.
pub(crate) async fn lend(
    pool: &PgPool,
    key: &Key,
    policy: WaitPolicy,
    since: Instant,
) -> Result<PoolConnection<Postgres>> {
    let key = key.clone();
    // Boxed, because it may have to log in; otherwise every acquire would be a future of 18 kB.
    let acquiring =
        timeout_at(budget::deadline(pool, policy, since).into(), Box::pin(pool.acquire()));
    let source = match acquiring.await {
        Ok(Ok(lent)) => return Ok(lent),
        Ok(Err(source)) => source,
        // The time of the pool or of the caller is over.
        Err(_) => sqlx::Error::PoolTimedOut,
    };
    Err(if sqlstate(&source).as_deref() == Some("53200") {
        // A login takes locks too.
        Error::OutOfLocks { key, source: Arc::new(source) }
    } else if matches!(source, sqlx::Error::PoolTimedOut) {
        timed_out(pool, &key)
    } else if matches!(source, sqlx::Error::PoolClosed) {
        Error::PoolClosed { key }
    } else {
        Error::Connect { key, source: Arc::new(source) }
    })
}

/// Returns the error for a pool that provided no connection in time.
pub(crate) fn timed_out(pool: &PgPool, key: &Key) -> Error {
    if pool.size() >= pool.options().get_max_connections() {
        return Error::pool_timed_out(key, None);
    }
    // The pool has room for more connections, so the server did not answer.
    Error::Connect { key: key.clone(), source: Arc::new(sqlx::Error::PoolTimedOut) }
}
