//! Limits how many of a pool's connections locks use at once. The rest is left to the queries that the locks protect.
//!
//! A lock is held while other connections of the same pool do the work, so if locks took the last one, the
//! work that would free them could not begin. All handles on a pool share one budget, whose queue is FIFO.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use sqlx::PgPool;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout_at;

use super::local_queue::LocalQueues;
use super::policy::WaitPolicy;
use crate::error::{Error, Result};
use crate::key::Key;
use crate::metrics;

/// Longer than any wait.
pub(super) const A_YEAR: Duration = Duration::from_hours(24 * 365);

/// The budget of one pool's connections.
pub(crate) struct Budget {
    /// One permit for each connection that the pool may open.
    permits: Arc<Semaphore>,
    max_connections: u32,
    /// How many connections locks use.
    in_use: AtomicU32,
    /// The calls that wait for a busy key.
    pub(crate) local_queues: Arc<LocalQueues>,
    // Keeps the pool alive, so that no other pool can have the address by which this budget is found.
    pool: PgPool,
}

/// The right to use one connection of a pool for locks.
///
/// # Drop
///
/// Passes the permit on to the next caller in the queue.
pub(crate) struct Permit {
    _share: OwnedSemaphorePermit,
    // Keeps the budget alive, so that the pool's handles find it for as long as a permit is in use.
    pub(super) budget: Arc<Budget>,
    _connection: metrics::One,
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.budget.in_use.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Budget {
    /// The budget of a pool, which all its clones share.
    pub(crate) fn of(pool: &PgPool) -> Arc<Self> {
        static BUDGETS: LazyLock<Mutex<HashMap<usize, Weak<Budget>>>> =
            LazyLock::new(Mutex::default);

        // The clones of a pool have their options in common.
        let address = std::ptr::from_ref(pool.options()).addr();
        let mut budgets = BUDGETS.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(budget) = budgets.get(&address).and_then(Weak::upgrade) {
            return budget;
        }
        let max_connections = pool.options().get_max_connections();
        // The limit of the pool may be more than the semaphore can count.
        let permits = usize::try_from(max_connections).unwrap_or(Semaphore::MAX_PERMITS);
        let permits = Arc::new(Semaphore::new(permits.min(Semaphore::MAX_PERMITS)));
        let in_use = AtomicU32::new(0);
        let (local_queues, pool) = (Arc::default(), pool.clone());
        let budget = Arc::new(Self { permits, max_connections, in_use, local_queues, pool });
        budgets.retain(|_, budget| budget.strong_count() > 0);
        budgets.insert(address, Arc::downgrade(&budget));
        budget
    }

    /// Returns how many connections locks can have at once if they leave `reserve` to queries.
    ///
    /// By default `reserve` is a third of the pool, rounded up. Locks can always have one connection.
    pub(crate) fn limit(&self, reserve: Option<u32>) -> u32 {
        self.max_connections - self.reserved(reserve)
    }

    /// Whether locks may have another connection now.
    pub(crate) fn has_spare(&self, reserve: Option<u32>) -> bool {
        let wanted = self.reserved(reserve) + 1;
        usize::try_from(wanted).is_ok_and(|wanted| self.permits.available_permits() >= wanted)
    }

    fn reserved(&self, reserve: Option<u32>) -> u32 {
        let reserve = reserve.unwrap_or_else(|| self.max_connections.div_ceil(3));
        reserve.min(self.max_connections.saturating_sub(1))
    }

    /// Waits until locks may have one more connection, behind all earlier callers. Waits until the caller's deadline,
    /// but for no longer than the pool's `acquire_timeout`.
    pub(crate) async fn permit(
        self: &Arc<Self>,
        key: &Key,
        reserve: Option<u32>,
        policy: WaitPolicy,
    ) -> Result<Permit> {
        // Includes the reserved connections, whose permits are released immediately.
        let number = self.reserved(reserve) + 1;
        let mut permit = match Arc::clone(&self.permits).try_acquire_many_owned(number) {
            Ok(permit) => permit,
            // Boxed, because usually it is not needed.
            Err(_) => Box::pin(self.queue(key, number, policy)).await?,
        };
        drop(permit.split(permit.num_permits().saturating_sub(1)));
        self.in_use.fetch_add(1, Ordering::Relaxed);
        let budget = Arc::clone(self);
        Ok(Permit { _share: permit, budget, _connection: metrics::connection() })
    }

    async fn queue(
        &self,
        key: &Key,
        number: u32,
        policy: WaitPolicy,
    ) -> Result<OwnedSemaphorePermit> {
        let deadline = deadline(&self.pool, policy, Instant::now());
        let acquiring = Arc::clone(&self.permits).acquire_many_owned(number);
        tokio::select! {
            biased;
            () = self.pool.close_event() => Err(Error::PoolClosed { key: key.clone() }),
            acquired = timeout_at(deadline.into(), acquiring) => match acquired {
                Ok(Ok(permit)) => Ok(permit),
                Ok(Err(_)) | Err(_) => {
                    Err(Error::pool_timed_out(key, Some(self.in_use.load(Ordering::Relaxed))))
                }
            },
        }
    }
}

/// Returns until when a caller may wait for a pool, if it has waited since `since`.
pub(super) fn deadline(pool: &PgPool, policy: WaitPolicy, since: Instant) -> Instant {
    let timeout = pool.options().get_acquire_timeout();
    // The timeout may be too long to be added.
    let limit = since.checked_add(timeout).unwrap_or_else(|| since + A_YEAR);
    policy.deadline().map_or(limit, |deadline| deadline.min(limit))
}

#[cfg(test)]
mod circle;
