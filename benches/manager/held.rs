//! Measures the memory that a lock takes while a manager holds it.

use std::time::Duration;

use pglock::{Lock, LockManager};
use pglock_testkit::{TestDb, eventually};
use sqlx::error::BoxDynError;
use tokio::task::JoinSet;

use crate::usage::resident;

/// The cost of locks that are held at the same time.
pub(crate) struct Held {
    pub(crate) bytes_each: f64,
    pub(crate) connections: usize,
}

pub(crate) async fn held(db: &TestDb, locks: i64) -> Result<Held, BoxDynError> {
    let pool = db.pool(2).await;
    let manager = LockManager::new(&pool);
    drop(Lock::new(&manager, 0).acquire().await?);
    let before = resident()?;
    let mut asking = JoinSet::new();
    let mut guards = Vec::with_capacity(usize::try_from(locks)?);
    for key in 0..locks {
        let mut lock = Lock::new(&manager, key);
        asking.spawn(async move { lock.acquire().await });
        // Tasks do not run all at once, because otherwise their memory would be measured too.
        if asking.len() >= 1000 {
            while let Some(acquired) = asking.join_next().await {
                guards.push(acquired??);
            }
        }
    }
    while let Some(acquired) = asking.join_next().await {
        guards.push(acquired??);
    }
    let bytes_each = (resident()? - before) / f64::from(i32::try_from(locks)?);
    // Listening to the session takes a second connection for a moment.
    let in_use = || pool.size() as usize - pool.num_idle();
    let limit = Duration::from_secs(10);
    eventually("one connection is in use", limit, async || in_use() == 1).await;
    let connections = in_use();
    drop(guards);
    Ok(Held { bytes_each, connections })
}
