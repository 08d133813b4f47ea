//! A pooled connection that may be dropped anywhere, and then is closed.

use std::sync::Arc;

use sqlx::pool::PoolConnection;
use sqlx::{PgConnection, Postgres};
use tokio::runtime::Handle;

use super::budget::Permit;
use super::local_queue::LocalQueues;

/// A connection that the pool gets back only through [`give_back`](Self::give_back).
///
/// # Drop
///
/// Closes the socket at once, so the server ends the session and frees its locks. That is the safe
/// end for a connection that may hold anything: of a future that was dropped, a task whose runtime is
/// gone, a statement that failed.
pub(crate) struct Conn {
    // Invariant: `Some` until it is given back or dropped.
    pooled: Option<PoolConnection<Postgres>>,
    runtime: Handle,
    /// The share of the pool that locks have. `None` for a connection that is used for a question.
    permit: Option<Permit>,
    /// The application, or a statement whose caller has gone, may have left something on it.
    pub(crate) untidy: bool,
    /// The application has returned it, and it was not checked since what the session holds.
    pub(super) lent: bool,
    /// The server was asked whether a transaction was left open on it before.
    pub(crate) checked: bool,
}

impl Conn {
    /// Keeps the runtime, because `PoolConnection` panics when it is dropped without one.
    pub(crate) fn new(
        pooled: PoolConnection<Postgres>,
        runtime: Handle,
        permit: Option<Permit>,
    ) -> Self {
        Self { pooled: Some(pooled), runtime, permit, untidy: false, lent: false, checked: false }
    }

    /// The connection, to run a statement on.
    pub(crate) fn pg(&mut self) -> Result<&mut PgConnection, sqlx::Error> {
        self.pooled.as_deref_mut().ok_or(sqlx::Error::PoolClosed)
    }

    pub(crate) fn as_pg(&self) -> Option<&PgConnection> {
        self.pooled.as_deref()
    }

    /// The lines of the pool in which calls of this process wait. `None` for a connection that is used for a question.
    pub(super) fn local_queues(&self) -> Option<&Arc<LocalQueues>> {
        self.permit.as_ref().map(|permit| &permit.budget.local_queues)
    }

    /// Returns the connection to its pool. It must hold nothing of ours.
    pub(crate) fn give_back(mut self) {
        enter(&self.runtime, || drop(self.pooled.take()));
    }
}

impl Drop for Conn {
    fn drop(&mut self) {
        if let Some(pooled) = self.pooled.take() {
            // Detached: the pool's own way to close runs on a task, which may never be polled.
            enter(&self.runtime, || drop(pooled.detach()));
        }
    }
}

/// Runs `f` with the runtime as the current one.
pub(crate) fn enter<T>(runtime: &Handle, f: impl FnOnce() -> T) -> T {
    // At the very end of a thread, a runtime can't be entered any more.
    let gone = Handle::try_current().is_err_and(|error| error.is_thread_local_destroyed());
    let _entered = (!gone).then(|| runtime.enter());
    f()
}

/// The same, unless the thread is inside a runtime already.
pub(crate) fn enter_unless_inside<T>(runtime: &Handle, f: impl FnOnce() -> T) -> T {
    if Handle::try_current().is_ok() { f() } else { enter(runtime, f) }
}
