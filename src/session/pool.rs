//! A connection of the pool, for no longer than the caller waits.

use std::sync::Arc;
use std::time::Instant;

use sqlx::pool::PoolConnection;
use sqlx::{PgPool, Postgres};
use tokio::time::timeout_at;

use super::budget;
use super::policy::WaitPolicy;
use crate::error::{Error, Result, sqlstate};
use crate::key::Key;

/// Asks the pool for a connection, for no longer than the caller waits, and for no longer than the pool's
/// timeout, counted from `since`.
///
/// A caller that only tries does not wait for the lock, but for the pool like any query.
pub(crate) async fn lend(
    pool: &PgPool,
    key: &Key,
    policy: WaitPolicy,
    since: Instant,
) -> Result<PoolConnection<Postgres>> {
    let key = key.clone();
    // Boxed, or every acquire would be a future of 18 kB: as large as what may have to log in.
    let acquiring =
        timeout_at(budget::deadline(pool, policy, since).into(), Box::pin(pool.acquire()));
    let source = match acquiring.await {
        Ok(Ok(lent)) => return Ok(lent),
        Ok(Err(source)) => source,
        // The pool's own time is over, of which a part was spent in the queue of the locks.
        Err(_) if policy.deadline().is_none_or(|deadline| deadline > Instant::now()) => {
            sqlx::Error::PoolTimedOut
        }
        // The caller's time is over.
        Err(_) => {
            return Err(Error::pool_timed_out(&key, None));
        }
    };
    let timed_out = matches!(source, sqlx::Error::PoolTimedOut);
    // With room for more connections, it was the server that did not answer.
    let exhausted = timed_out && pool.size() >= pool.options().get_max_connections();
    Err(if sqlstate(&source).as_deref() == Some("53200") {
        // A login takes locks too.
        Error::OutOfLocks { key, source: Arc::new(source) }
    } else if exhausted {
        Error::pool_timed_out(&key, None)
    } else if matches!(source, sqlx::Error::PoolClosed) {
        Error::PoolClosed { key }
    } else {
        Error::Connect { key, source: Arc::new(source) }
    })
}
