//! The session's own connection, borrowed by the application.

use std::fmt;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use sqlx::PgConnection;

use super::conn::{Conn, Use};
use super::slot::ConnGuard;
use super::task::Task;
use super::{DEADLINE, Session, within, within_task};
use crate::error::{Error, Loss, Result, is_answer, refuses_settings};
use crate::key::Key;
use crate::sql;

/// The connection of the session that holds the lock, borrowed from a guard.
///
/// A transaction on it can't outlive the lock: when the session ends, the server frees the lock and rolls back the open
/// transaction at once.
///
/// Dereferences to sqlx's [`PgConnection`]: pass `&mut *connection` where an executor is wanted.
///
/// While the connection is borrowed, a lost session is detected only at the next heartbeat. Methods of the session's
/// guards and handles that need the connection wait for it, for at most ten seconds ([`Error::ConnectionBorrowed`]).
///
/// # Drop
///
/// Returns the connection to the session. A transaction that is still open is rolled back, and a
/// query whose future was dropped is cancelled after 100 ms, both on a task. While a guard is alive, the task also
/// asks the server whether the session still holds its locks, because `DISCARD ALL` and `pg_advisory_unlock_all()`
/// release them. Settings changed with `SET` stay, as on any pooled connection.
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
#[must_use = "a connection that is not used was borrowed for nothing"]
#[clippy::has_significant_drop]
pub struct SessionConnection<'g> {
    session: Arc<Session>,
    // Invariant: `Some`, and with a connection inside, until dropped.
    slot: Option<ConnGuard>,
    guard: PhantomData<&'g ()>,
}

const RETURNED: &str = "BUG: the connection is used after it was returned";

impl Session {
    /// Borrows the connection for the application. Waits while it is borrowed already, or used for a statement of ours.
    pub(crate) async fn lend<'g>(self: &Arc<Self>, key: &Key) -> Result<SessionConnection<'g>> {
        let mut slot = self.for_guard(key).await?;
        if let Some(conn) = slot.as_mut() {
            if let Err(error) = within(DEADLINE, self.make_fit(conn)).await {
                return Err(self.give_up_with(slot, key, Loss::broken(error)));
            }
            if let Some(loss) = self.loss() {
                return Err(Error::lost(key, loss));
            }
            conn.untidy = true;
            conn.lent = true;
        }
        self.borrowed.store(true, Ordering::Relaxed);
        Ok(SessionConnection { session: Arc::clone(self), slot: Some(slot), guard: PhantomData })
    }

    async fn make_fit(&self, conn: &mut Conn) -> std::result::Result<(), sqlx::Error> {
        self.tidy(conn).await?;
        if conn.settings.made_for != Use::Application {
            conn.settings.to_restore = true;
            // If this future is dropped, the server may still make the settings.
            conn.settings.made_for = Use::Statements;
            let is_rejected = conn.settings.rejected;
            let mut made = sql::settings::lend(conn.pg()?, !is_rejected).await;
            if !is_rejected && made.as_ref().is_err_and(refuses_settings) {
                conn.settings.rejected = true;
                made = sql::settings::lend(conn.pg()?, false).await;
            }
            match made {
                Ok(()) => {
                    conn.settings.made_for = Use::Application;
                    conn.checked = true;
                }
                // If the statement was cancelled, for example, it is retried the next time that the connection is
                // borrowed.
                Err(error) if is_answer(&error) => {}
                Err(error) => return Err(error),
            }
        }
        // Otherwise the application's writes would become part of a transaction that other code has left open.
        if !conn.checked {
            sql::backend::end_transaction(conn.pg()?).await?;
            conn.checked = true;
        }
        Ok(())
    }

    /// Tidies the connection that was borrowed, so that it keeps nothing open while the guard lives on, and
    /// makes sure that the session still holds its locks.
    async fn take_back(self: Arc<Self>) {
        let mut slot = self.connection_at_last().await;
        if self.is_lost() {
            return;
        }
        // Another call may have tidied it.
        let Some(conn) = slot.as_mut().filter(|conn| conn.lent) else { return };
        conn.lent = false;
        let answer = within_task(DEADLINE, async {
            self.tidy(conn).await?;
            // The release that follows reports a lock that is not held.
            if self.ledger().has_ended() {
                return Ok(true);
            }
            match sql::backend::holdings(conn.pg()?, &[self.backend_pid()]).await {
                Ok((_, held)) => {
                    let pid = self.backend_pid();
                    let granted = self.ledger().granted_by_server();
                    Ok(granted.into_iter().all(|(key, mode)| held.contains(&(pid, key, mode))))
                }
                // The role may not list locks.
                Err(error) if is_answer(&error) => Ok(true),
                Err(error) => Err(error),
            }
        });
        let loss = match answer.await {
            Ok(true) => return,
            Ok(false) => Loss::NotHeld,
            Err(error) => Loss::broken(error),
        };
        // First, because the server grants the lock to another session once the connection is closed.
        self.give_up(&loss);
        drop(slot.take());
    }
}

impl Drop for SessionConnection<'_> {
    fn drop(&mut self) {
        self.session.borrowed.store(false, Ordering::Relaxed);
        // If the session was lost, this closes the connection.
        drop(self.slot.take());
        let session = Arc::clone(&self.session);
        // Detach: no caller waits for it.
        drop(Task::start(&self.session.runtime, session.take_back()));
    }
}

#[expect(clippy::expect_used, reason = "the field is only empty in Drop")]
impl Deref for SessionConnection<'_> {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        let conn = self.slot.as_ref().and_then(|slot| slot.as_ref());
        conn.and_then(Conn::as_pg).expect(RETURNED)
    }
}

#[expect(clippy::expect_used, reason = "the field is only empty in Drop")]
impl DerefMut for SessionConnection<'_> {
    fn deref_mut(&mut self) -> &mut PgConnection {
        let conn = self.slot.as_mut().and_then(|slot| slot.as_mut());
        conn.and_then(|conn| conn.pg().ok()).expect(RETURNED)
    }
}

impl fmt::Debug for SessionConnection<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SessionConnection")
            .field("backend_pid", &self.session.backend_pid())
            .finish_non_exhaustive()
    }
}
