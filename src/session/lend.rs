//! The session's own connection, lent to the application.

use std::fmt;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use sqlx::PgConnection;
use tokio::sync::{OwnedMappedMutexGuard, OwnedMutexGuard};

use super::conn::Conn;
use super::task::Task;
use super::{DEADLINE, Session, within, within_task};
use crate::error::{Error, Loss, Result};
use crate::key::Key;
use crate::sql;

/// The connection of the session that holds the lock, lent by a guard.
///
/// What is written through it can't outlive the lock: when the session ends, the server frees the
/// lock and rolls back the open transaction in one.
///
/// Dereferences to sqlx's [`PgConnection`]: pass `&mut *connection` where an executor is wanted.
///
/// # Drop
///
/// Gives the connection back to the session. A transaction that is still open is rolled back, and a
/// query whose future was dropped is cancelled after 100 ms, both on a task. Settings changed
/// with `SET` stay, as on any pooled connection.
///
/// # Examples
///
/// ```
/// use pglock::Lock;
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let pool = pglock_testkit::pool().await;
/// let guard = Lock::new(&pool, "ledger").acquire().await?;
/// let mut connection = guard.connection().await?;
/// let pid: i32 = sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(&mut *connection).await?;
/// assert_eq!(pid, guard.backend_pid());
/// # Ok(()) }
/// ```
#[must_use = "a connection that is not used was lent for nothing"]
#[clippy::has_significant_drop]
pub struct SessionConnection<'g> {
    session: Arc<Session>,
    // Invariant: `Some` until dropped.
    conn: Option<OwnedMappedMutexGuard<Option<Conn>, PgConnection>>,
    guard: PhantomData<&'g ()>,
}

const TAKEN: &str = "BUG: the connection is used after it was given back";

impl Session {
    /// Lends the connection; waits while it is lent to somebody else or used for a statement of ours.
    pub(crate) async fn lend<'g>(self: &Arc<Self>, key: &Key) -> Result<SessionConnection<'g>> {
        let mut slot = Arc::clone(&self.conn).lock_owned().await;
        let tidied = match slot.as_mut() {
            Some(conn) => within(DEADLINE, self.make_fit(conn)).await,
            None => Ok(()),
        };
        if let Err(error) = tidied {
            drop(slot.take());
            self.lose(&Loss::broken(error));
        }
        if let Some(reason) = self.loss() {
            return Err(Error::lost(key, reason));
        }
        let lent = OwnedMutexGuard::try_map(slot, |slot| {
            let conn = slot.as_mut()?;
            conn.lent = true;
            conn.pg().ok()
        });
        match lent {
            Ok(conn) => Ok(SessionConnection {
                session: Arc::clone(self),
                conn: Some(conn),
                guard: PhantomData,
            }),
            // Only an ended session is empty, and a guard is proof that this one was not released.
            Err(_) => Err(Error::lost(key, Loss::NotHeld)),
        }
    }

    async fn make_fit(&self, conn: &mut Conn) -> std::result::Result<(), sqlx::Error> {
        self.tidy(conn).await?;
        // Or what the application writes would end with somebody else's transaction.
        if !conn.checked {
            sql::end_transaction(conn.pg()?).await?;
            conn.checked = true;
        }
        Ok(())
    }

    /// Tidies the connection that was lent, so that it keeps nothing open while the guard lives on.
    async fn take_back(self: Arc<Self>) {
        let mut slot = self.connection().await;
        if self.is_broken() {
            return;
        }
        let Some(conn) = slot.as_mut() else { return };
        if let Err(error) = within_task(DEADLINE, self.tidy(conn)).await {
            drop(slot.take());
            self.lose(&Loss::broken(error));
        }
    }
}

impl Drop for SessionConnection<'_> {
    fn drop(&mut self) {
        drop(self.conn.take());
        let session = Arc::clone(&self.session);
        // Detach: nobody is left to wait for it.
        drop(Task::start(&self.session.runtime, session.take_back()));
    }
}

#[expect(clippy::expect_used, reason = "the field is only empty in Drop")]
impl Deref for SessionConnection<'_> {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        self.conn.as_deref().expect(TAKEN)
    }
}

#[expect(clippy::expect_used, reason = "the field is only empty in Drop")]
impl DerefMut for SessionConnection<'_> {
    fn deref_mut(&mut self) -> &mut PgConnection {
        self.conn.as_deref_mut().expect(TAKEN)
    }
}

impl fmt::Debug for SessionConnection<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SessionConnection")
            .field("backend_pid", &self.session.backend_pid())
            .finish_non_exhaustive()
    }
}
