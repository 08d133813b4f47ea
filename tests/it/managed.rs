//! Creates locks of a manager, one manager for each pool, for the tests that run on all kinds of locks.

use pglock::{Key, Lock, LockManager, LockOptions};
use sqlx::PgPool;

use crate::support::manager_of;

pub(crate) fn new_lock(pool: &PgPool, key: impl Into<Key>) -> Lock {
    Lock::new(&manager_of(pool), key)
}

/// A lock of a manager of its own.
pub(crate) fn new_lock_with(options: &LockOptions, pool: &PgPool, key: impl Into<Key>) -> Lock {
    Lock::new(&LockManager::new(&options.on(pool).unwrap()), key)
}

/// The number of sessions that this number of handles of this number of services uses for one key.
pub(crate) fn sessions(_handles: usize, services: usize) -> usize {
    services
}

/// Whether the locks of one handle are on a session that no other handle uses.
pub(crate) const ALONE: bool = false;

/// Whether a dropped guard releases its lock even if the runtime is not driven.
pub(crate) const LETS_GO_UNDRIVEN: bool = false;

#[path = "both/all.rs"]
mod both;
