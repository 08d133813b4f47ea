//! A pooled connection that may be dropped anywhere, and then is closed.

use std::fmt;
use std::ops::{Deref, DerefMut};

use sqlx::pool::PoolConnection;
use sqlx::{PgConnection, Postgres};
use tokio::runtime::Handle;

/// A connection that the pool gets back only through [`give_back`](Self::give_back).
///
/// # Drop
///
/// Closes the socket at once, so the server ends the session and frees its locks. That is the safe
/// end for a connection of which nobody knows what it holds: of a future that was dropped, a task
/// whose runtime is gone, a statement that failed.
pub(crate) struct Conn {
    // Invariant: `Some` until it is given back or dropped.
    pooled: Option<PoolConnection<Postgres>>,
    runtime: Handle,
    /// The application has had the connection since it was last tidied.
    pub(crate) lent: bool,
    /// Whether somebody left a transaction open on it before, the server was asked.
    pub(crate) checked: bool,
}

const TAKEN: &str = "BUG: the connection was given back before";

impl Conn {
    /// Keeps the runtime, for `PoolConnection` panics when it is dropped without one.
    pub(crate) fn new(pooled: PoolConnection<Postgres>, runtime: Handle) -> Self {
        Self { pooled: Some(pooled), runtime, lent: false, checked: false }
    }

    /// Returns the connection to its pool. It must hold nothing of ours.
    pub(crate) fn give_back(mut self) {
        enter(&self.runtime, || drop(self.pooled.take()));
    }
}

impl Drop for Conn {
    fn drop(&mut self) {
        let Some(pooled) = self.pooled.take() else { return };
        // Detached: the pool's own way to close runs on a task, which may never be polled.
        enter(&self.runtime, || drop(pooled.detach()));
    }
}

/// Runs `f` where the runtime can be found by those who look for one.
pub(crate) fn enter<T>(runtime: &Handle, f: impl FnOnce() -> T) -> T {
    // At the very end of a thread there is no entering any more.
    let gone = Handle::try_current().is_err_and(|error| error.is_thread_local_destroyed());
    let _entered = (!gone).then(|| runtime.enter());
    f()
}

#[expect(clippy::expect_used, reason = "the field is only empty in the methods that consume it")]
impl Deref for Conn {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        self.pooled.as_deref().expect(TAKEN)
    }
}

#[expect(clippy::expect_used, reason = "the field is only empty in the methods that consume it")]
impl DerefMut for Conn {
    fn deref_mut(&mut self) -> &mut PgConnection {
        self.pooled.as_deref_mut().expect(TAKEN)
    }
}

impl fmt::Debug for Conn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Conn").field("lent", &self.lent).finish_non_exhaustive()
    }
}
