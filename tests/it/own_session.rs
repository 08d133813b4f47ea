//! Creates locks with a session of their own, for the tests that run on all kinds of locks.

use pglock::{Key, Lock, LockOptions};
use sqlx::PgPool;

pub(crate) fn new_lock(pool: &PgPool, key: impl Into<Key>) -> Lock {
    Lock::new(pool, key)
}

pub(crate) fn new_lock_with(options: &LockOptions, pool: &PgPool, key: impl Into<Key>) -> Lock {
    Lock::new(&options.on(pool).unwrap(), key)
}

/// The number of sessions that this number of handles of this number of services uses for one key.
pub(crate) fn sessions(handles: usize, _services: usize) -> usize {
    handles
}

/// Whether the locks of one handle are on a session that no other handle uses.
pub(crate) const ALONE: bool = true;

/// Whether a dropped guard releases its lock even if the runtime is not driven.
pub(crate) const LETS_GO_UNDRIVEN: bool = true;

#[path = "both/all.rs"]
mod both;
