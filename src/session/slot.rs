//! The only way to a session's connection.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use sqlx::PgConnection;
use tokio::sync::OwnedMutexGuard;
use tokio::time::sleep;

use super::conn::Conn;
use super::policy::WaitPolicy;
use super::{DEADLINE, Session};
use crate::error::{Error, Loss};
use crate::key::Key;

/// Exclusive access to the session's connection.
///
/// # Drop
///
/// Returns the connection to the session, and makes the keeper poll it for closure again. If the session was lost
/// meanwhile, the connection is closed.
pub(crate) struct ConnGuard {
    slot: OwnedMutexGuard<Option<Conn>>,
    // Dropped after `slot`, because the keeper must find the slot free.
    wakeup: Wakeup,
}

/// # Drop
///
/// Makes the keeper poll the connection for closure.
struct Wakeup {
    session: Arc<Session>,
    /// Whether the connection will be used again so soon that the keeper need not poll it before.
    skip: bool,
}

impl Drop for Wakeup {
    fn drop(&mut self) {
        self.session.close_if_lost();
        if !self.skip {
            self.session.resume_polling();
        }
    }
}

/// Why the connection is not available.
pub(crate) enum Unavailable {
    /// The application has borrowed it for longer than [`DEADLINE`].
    Borrowed,
    /// The session was lost.
    Lost(Loss),
    /// The pool was closed.
    PoolClosed,
    /// The caller's deadline has passed.
    TimedOut,
}

impl Unavailable {
    /// Converts the reason to the error that a method returns.
    pub(crate) fn error(self, key: &Key) -> Error {
        let key = key.clone();
        match self {
            Self::Borrowed | Self::TimedOut => Error::ConnectionBorrowed { key },
            Self::Lost(loss) => Error::lost(&key, loss),
            Self::PoolClosed => Error::PoolClosed { key },
        }
    }
}

impl ConnGuard {
    fn new(slot: OwnedMutexGuard<Option<Conn>>, session: &Arc<Session>) -> Self {
        session.uses.fetch_add(1, Ordering::Relaxed);
        Self { slot, wakeup: Wakeup { session: Arc::clone(session), skip: false } }
    }

    pub(super) fn session(&self) -> &Arc<Session> {
        &self.wakeup.session
    }

    /// Returns the connection, to run a statement on it.
    pub(super) fn pg(&mut self) -> Result<&mut PgConnection, sqlx::Error> {
        self.slot.as_mut().ok_or(sqlx::Error::PoolClosed)?.pg()
    }

    /// Returns the connection after removing what the application may have left on it.
    pub(super) async fn tidied(&mut self) -> Result<&mut PgConnection, sqlx::Error> {
        let conn = self.slot.as_mut().ok_or(sqlx::Error::PoolClosed)?;
        self.wakeup.session.tidy(conn).await?;
        conn.pg()
    }
}

impl Deref for ConnGuard {
    type Target = Option<Conn>;

    fn deref(&self) -> &Option<Conn> {
        &self.slot
    }
}

impl DerefMut for ConnGuard {
    fn deref_mut(&mut self) -> &mut Option<Conn> {
        &mut self.slot
    }
}

impl Drop for ConnGuard {
    fn drop(&mut self) {
        let session = &self.wakeup.session;
        if session.is_lost() {
            session.close(self.slot.take());
        }
    }
}

impl Session {
    /// Waits for the connection on behalf of a guard, behind all earlier callers, until the connection is free or the
    /// session is lost. While the application has borrowed the connection, waits for at most [`DEADLINE`].
    pub(super) async fn connection_for_guard(self: &Arc<Self>) -> Result<ConnGuard, Unavailable> {
        let free = self.free_connection();
        if let Some(loss) = self.loss() {
            return Err(Unavailable::Lost(loss));
        }
        if let Some(free) = free {
            return Ok(free);
        }
        // Boxed, because usually it is not needed.
        Box::pin(async {
            tokio::select! {
                biased;
                loss = self.lost() => Err(Unavailable::Lost(loss)),
                conn = self.connection_at_last() => Ok(conn),
                () = self.borrowed_for_too_long() => Err(Unavailable::Borrowed),
            }
        })
        .await
    }

    /// As [`connection_for_guard`](Self::connection_for_guard), but on behalf of an acquire: the wait also ends when
    /// the deadline has passed, or the pool is closed.
    pub(crate) async fn connection_for_acquire(
        self: &Arc<Self>,
        policy: WaitPolicy,
    ) -> Result<ConnGuard, Unavailable> {
        let connection = async {
            tokio::select! {
                biased;
                conn = self.connection_for_guard() => conn,
                () = self.pool.close_event() => Err(Unavailable::PoolClosed),
            }
        };
        policy.bound(connection).await.unwrap_or(Err(Unavailable::TimedOut))
    }

    pub(super) async fn borrowed_for_too_long(&self) {
        loop {
            sleep(DEADLINE).await;
            if self.borrowed.load(Ordering::Relaxed) {
                return;
            }
        }
    }

    /// Waits for the connection without a limit. For tasks that no caller waits for.
    pub(super) async fn connection_at_last(self: &Arc<Self>) -> ConnGuard {
        // If this future is dropped while it waits, it may already own the connection.
        let _abandoned = Wakeup { session: Arc::clone(self), skip: true };
        ConnGuard::new(Arc::clone(&self.conn).lock_owned().await, self)
    }

    /// Returns the connection, if it is not in use.
    pub(super) fn free_connection(self: &Arc<Self>) -> Option<ConnGuard> {
        Arc::clone(&self.conn).try_lock_owned().ok().map(|slot| ConnGuard::new(slot, self))
    }

    /// Waits for the connection, whose return then does not wake the keeper. For a caller that uses the connection too
    /// often for that.
    pub(super) async fn quiet_connection(self: &Arc<Self>) -> ConnGuard {
        let mut conn = self.connection_at_last().await;
        conn.wakeup.skip = true;
        conn
    }
}
