//! A pooled connection that may be dropped anywhere, and then is closed; and that can be listened to.

use std::fmt;
use std::sync::LazyLock;
use std::task::{Context, Poll, Waker};

use sqlx::pool::PoolConnection;
use sqlx::postgres::PgListener;
use sqlx::{Acquire, PgConnection, Postgres};
use tokio::runtime::{Builder, Handle};

/// A connection that the pool gets back only through [`give_back`](Self::give_back).
///
/// # Drop
///
/// Closes the socket at once, so the server ends the session and frees its locks. That is the safe
/// end for a connection of which nobody knows what it holds: of a future that was dropped, a task
/// whose runtime is gone, a statement that failed.
pub(crate) struct Conn {
    // Invariant: `Some` until it is given back or dropped.
    body: Option<Body>,
    runtime: Handle,
    /// The application has had the connection since it was last tidied.
    pub(crate) lent: bool,
    /// Whether somebody left a transaction open on it before, the server was asked.
    pub(crate) checked: bool,
}

enum Body {
    Plain(PoolConnection<Postgres>),
    /// Only sqlx's listener can read from an idle connection, and so notice that it was closed.
    Listening(Box<PgListener>),
}

/// A runtime that has been shut down: what is spawned on it is dropped at once.
///
/// The listener returns its connection to the pool on a task, and has no other way to let it go. On
/// this runtime the task is dropped before it starts, and closes the connection.
static NO_RUNTIME: LazyLock<Option<Handle>> = LazyLock::new(|| {
    let runtime = Builder::new_current_thread().build().ok()?;
    let handle = runtime.handle().clone();
    runtime.shutdown_background();
    Some(handle)
});

impl Conn {
    /// Keeps the runtime, for `PoolConnection` panics when it is dropped without one.
    pub(crate) fn new(pooled: PoolConnection<Postgres>, runtime: Handle) -> Self {
        Self { body: Some(Body::Plain(pooled)), runtime, lent: false, checked: false }
    }

    /// The connection, for a statement.
    ///
    /// # Errors
    ///
    /// If the listener has seen the connection closed.
    pub(crate) fn pg(&mut self) -> Result<&mut PgConnection, sqlx::Error> {
        match &mut self.body {
            Some(Body::Plain(pooled)) => Ok(&mut **pooled),
            Some(Body::Listening(listener)) => inside(listener),
            None => Err(sqlx::Error::PoolClosed),
        }
    }

    pub(crate) fn is_listening(&self) -> bool {
        matches!(self.body, Some(Body::Listening(_)))
    }

    /// Makes the connection one that can be listened to.
    ///
    /// The listener has a connection of the pool, and the two change places: the session goes on
    /// inside the listener, and the pool gets the other one back.
    pub(crate) fn move_into(&mut self, mut listener: Box<PgListener>) -> Result<(), sqlx::Error> {
        listener.eager_reconnect(false);
        // The guards keep the session open, as with any connection that is checked out.
        listener.ignore_pool_close_event(true);
        std::mem::swap(inside(&mut listener)?, self.pg()?);
        let plain = self.body.replace(Body::Listening(listener));
        enter(&self.runtime, || drop(plain));
        Ok(())
    }

    /// Waits until the connection is closed by the other side, and returns why.
    pub(crate) async fn closed(&mut self) -> sqlx::Error {
        let Some(Body::Listening(listener)) = &mut self.body else {
            return std::future::pending().await;
        };
        loop {
            match listener.try_recv().await {
                // A notification for a channel that the application listens on.
                Ok(Some(_)) => {}
                Ok(None) => {
                    return sqlx::Error::Io(std::io::ErrorKind::UnexpectedEof.into());
                }
                Err(error) => return error,
            }
        }
    }

    /// Returns the connection to its pool. It must hold nothing of ours.
    pub(crate) fn give_back(mut self) {
        enter(&self.runtime, || drop(self.body.take()));
    }
}

impl Drop for Conn {
    fn drop(&mut self) {
        match self.body.take() {
            // Detached: the pool's own way to close runs on a task, which may never be polled.
            Some(Body::Plain(pooled)) => enter(&self.runtime, || drop(pooled.detach())),
            Some(Body::Listening(listener)) => {
                let nowhere = NO_RUNTIME.as_ref().unwrap_or(&self.runtime);
                enter(nowhere, || drop(listener));
            }
            None => {}
        }
    }
}

/// The connection inside a listener.
///
/// It is there, and this ready at the first poll, until reading from it has failed; and whoever reads
/// drops the listener then, for it would open another connection without a word.
fn inside(listener: &mut PgListener) -> Result<&mut PgConnection, sqlx::Error> {
    let mut connection = listener.acquire();
    match connection.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(connection) => connection,
        Poll::Pending => Err(sqlx::Error::WorkerCrashed),
    }
}

/// Runs `f` where the runtime can be found by those who look for one.
pub(crate) fn enter<T>(runtime: &Handle, f: impl FnOnce() -> T) -> T {
    // At the very end of a thread there is no entering any more.
    let gone = Handle::try_current().is_err_and(|error| error.is_thread_local_destroyed());
    let _entered = (!gone).then(|| runtime.enter());
    f()
}

impl fmt::Debug for Conn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Conn").field("lent", &self.lent).finish_non_exhaustive()
    }
}
