//! A pooled connection that may be dropped anywhere, which closes it.

use std::sync::Arc;

use sqlx::pool::PoolConnection;
use sqlx::{PgConnection, Postgres};
use tokio::runtime::Handle;

use super::budget::Permit;
use super::local_queue::LocalQueues;
use crate::key::KeyId;

/// A connection that the pool gets back only through [`give_back`](Self::give_back).
///
/// # Drop
///
/// Closes the socket at once, so the server ends the session and frees its locks. This is safe for a connection that
/// may hold anything: after a future was dropped, the runtime of a task was shut down, or a statement failed.
pub(crate) struct Conn {
    // Invariant: `Some` until it is given back or dropped.
    pooled: Option<PoolConnection<Postgres>>,
    runtime: Handle,
    /// The permit to use a connection for locks. `None` for a connection that is used for a question.
    permit: Option<Permit>,
    /// Whether the application, or a statement whose future was dropped, may have left something on the connection.
    pub(crate) untidy: bool,
    /// Whether the application has borrowed the connection since the session's locks were last checked.
    pub(super) lent: bool,
    /// Whether the server was asked if a transaction had been left open on the connection.
    pub(crate) checked: bool,
    pub(super) settings: Settings,
}

/// The state of the session's settings.
#[derive(Default)]
pub(super) struct Settings {
    /// Whether one that the application would notice was changed, and must be restored.
    pub(super) to_restore: bool,
    /// Whether the server rejects those of [`made_for`](Self::made_for).
    pub(super) rejected: bool,
    pub(super) made_for: Use,
    pub(super) shown: Shown,
}

impl Settings {
    /// Records that the caller makes the settings of a longer hold. Returns false if they are made already, or the
    /// server rejects them; then the caller makes none.
    pub(super) fn make_for_hold(&mut self) -> bool {
        if self.rejected || self.made_for == Use::Hold {
            return false;
        }
        self.to_restore = true;
        self.made_for = Use::Hold;
        true
    }

    /// Records that the caller shows a key. Returns false if the session shows that already, or shows a leader.
    pub(super) fn show(&mut self, key: KeyId) -> bool {
        if matches!(self.shown, Shown::Leader(_)) || self.shown == Shown::Key(key) {
            return false;
        }
        self.to_restore = true;
        self.shown = Shown::Key(key);
        true
    }
}

/// The use for which the connection has the right settings.
#[derive(Default, Eq, PartialEq)]
pub(super) enum Use {
    /// Acquires, waits and releases.
    #[default]
    Statements,
    /// A hold that is longer than a moment.
    Hold,
    /// Statements of the application.
    Application,
}

/// What a session shows in `application_name`.
#[derive(Default, Eq, PartialEq)]
pub(super) enum Shown {
    #[default]
    Nothing,
    Key(KeyId),
    /// A leader's name and term, which observers read, while this key is locked.
    Leader(KeyId),
}

impl Conn {
    /// Wraps a connection. Keeps the runtime, because `PoolConnection` panics when it is dropped without one.
    pub(crate) fn new(
        pooled: PoolConnection<Postgres>,
        runtime: Handle,
        permit: Option<Permit>,
    ) -> Self {
        Self {
            pooled: Some(pooled),
            runtime,
            permit,
            untidy: false,
            lent: false,
            checked: false,
            settings: Settings::default(),
        }
    }

    /// Returns the connection, to run a statement on it.
    pub(crate) fn pg(&mut self) -> Result<&mut PgConnection, sqlx::Error> {
        self.pooled.as_deref_mut().ok_or(sqlx::Error::PoolClosed)
    }

    pub(crate) fn as_pg(&self) -> Option<&PgConnection> {
        self.pooled.as_deref()
    }

    /// Returns the lines of the pool in which calls of this process wait. `None` for a connection that is used for a
    /// question.
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
            // Detached, because the pool's own `close` runs on a task, which may never be polled.
            enter(&self.runtime, || drop(pooled.detach()));
        }
    }
}

/// Runs `f` with the runtime as the current one.
pub(crate) fn enter<T>(runtime: &Handle, f: impl FnOnce() -> T) -> T {
    // While the locals of an ending thread are destroyed, a runtime can't be entered any more.
    let gone = Handle::try_current().is_err_and(|error| error.is_thread_local_destroyed());
    let _entered = (!gone).then(|| runtime.enter());
    f()
}

/// Runs `f` with the runtime as the current one, unless the thread is inside a runtime already.
pub(crate) fn enter_unless_inside<T>(runtime: &Handle, f: impl FnOnce() -> T) -> T {
    if Handle::try_current().is_ok() { f() } else { enter(runtime, f) }
}
