//! The questions that a guard's methods ask on its session.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::timeout;

use super::conn::Shown;
use super::slot::ConnGuard;
use super::{DEADLINE, Session, silence, within};
use crate::error::{Error, Loss, Result, is_answer};
use crate::key::Key;
use crate::request::Request;
use crate::sql::{self, backend::is_covered};

impl Session {
    /// Draws a fencing token.
    ///
    /// The commit may wait for a synchronous standby that is missing. Then it is cancelled, and the lock is still held.
    /// If this future is dropped, the next use of the connection cancels it.
    pub(crate) async fn draw_token(self: &Arc<Self>, key: &Key) -> Result<i64> {
        let mut slot = self.for_guard(key).await?;
        let drawing = async {
            slot.tidied().await?;
            let conn = slot.as_mut().ok_or(sqlx::Error::PoolClosed)?;
            conn.untidy = true;
            let answer = sql::backend::draw_token(conn.pg()?).await;
            conn.untidy = false;
            answer
        };
        let answer = self.unless_lost(key, timeout(DEADLINE, drawing)).await?;
        let Ok(answer) = answer else { return Err(self.interrupt(key, slot).await) };
        self.sort_out(key, slot, answer)
    }

    /// Shows a leader's name on the server for as long as the session holds something.
    pub(crate) async fn show_name(self: &Arc<Self>, key: &Key, name: &str) -> Result<()> {
        let mut slot = self.for_guard(key).await?;
        let answer = within(DEADLINE, async {
            slot.tidied().await?;
            let conn = slot.as_mut().ok_or(sqlx::Error::PoolClosed)?;
            conn.settings.to_restore = true;
            sql::settings::show_name(conn.pg()?, name).await?;
            conn.settings.shown = Shown::Leader(key.id());
            Ok(())
        });
        let answer = self.unless_lost(key, answer).await?;
        self.sort_out(key, slot, answer)
    }

    /// Returns the greatest of these numbers whose lock any session holds.
    pub(crate) async fn greatest_held(
        self: &Arc<Self>,
        key: &Key,
        numbers: RangeInclusive<i64>,
    ) -> Result<Option<i64>> {
        let mut slot = self.for_guard(key).await?;
        let answer = within(DEADLINE, async {
            sql::semaphore::greatest_held(slot.tidied().await?, numbers).await
        });
        let answer = self.unless_lost(key, answer).await?;
        self.sort_out(key, slot, answer)
    }

    /// Asks the server whether the session holds the locks of a guard.
    ///
    /// A missing answer is not a loss: the next heartbeat decides.
    pub(crate) async fn verify(self: &Arc<Self>, request: &Request) -> Result<()> {
        let key = request.key();
        let mut slot = self.for_guard(key).await?;
        let asked = Instant::now();
        let limit = self.heartbeat.answer_limit();
        let answer = timeout(limit, async {
            sql::backend::holdings(slot.tidied().await?, &[self.backend_pid()]).await
        });
        let loss = match answer.await {
            Ok(Ok((pid, held))) if pid == self.backend_pid() => {
                // A shared guard may be covered by the exclusive lock of another one.
                if request.ids().all(|lock| is_covered(&held, pid, lock)) {
                    self.trust(asked);
                    return Ok(());
                }
                // Another task has released the handle's locks meanwhile. (The guards of a manager are not in the
                // ledger.)
                let ledger = self.ledger();
                let has_all = request.ids().all(|(key, _)| ledger.has_guard(key));
                if !has_all && !ledger.is_pinned() && ledger.loss().is_none() {
                    return Err(Error::lost(key, Loss::Released));
                }
                Loss::NotHeld
            }
            Ok(Ok(_)) => {
                self.server.proof.disprove();
                self.give_up_pooled(&mut slot, Vec::new());
                return Err(Error::NoExclusion { key: key.clone() });
            }
            Ok(Err(error)) => return self.sort_out(key, slot, Err(error)),
            Err(_) => return Err(Error::database(key, silence(limit))),
        };
        Err(self.give_up_with(slot, key, loss))
    }

    /// Waits for the connection, behind all earlier callers.
    pub(super) async fn for_guard(self: &Arc<Self>, key: &Key) -> Result<ConnGuard> {
        let slot = self.connection_for_guard().await.map_err(|reason| reason.error(key))?;
        if slot.is_none() {
            return Err(Error::lost(key, self.loss().unwrap_or(Loss::NotHeld)));
        }
        Ok(slot)
    }

    /// Cancels a statement that has not been answered in time.
    async fn interrupt(self: &Arc<Self>, key: &Key, mut slot: ConnGuard) -> Error {
        let drained = async { self.drain(slot.pg()?, Duration::ZERO, DEADLINE).await };
        match self.unless_lost(key, drained).await {
            Ok(Ok(())) => Error::database(key, silence(DEADLINE)),
            Err(lost) => lost,
            Ok(Err(source)) => self.give_up_with(slot, key, Loss::broken(source)),
        }
    }

    /// Waits for an answer, but not beyond the loss of the session.
    async fn unless_lost<T>(
        self: &Arc<Self>,
        key: &Key,
        answer: impl Future<Output = T>,
    ) -> Result<T> {
        tokio::select! {
            biased;
            answer = answer => Ok(answer),
            loss = self.lost() => Err(Error::lost(key, loss)),
        }
    }

    /// Distinguishes a failure of the question from a failure of the session.
    fn sort_out<T>(&self, key: &Key, slot: ConnGuard, answer: Result<T, sqlx::Error>) -> Result<T> {
        answer.map_err(|source| {
            // The session is alive, and its lock is held.
            if is_answer(&source) {
                return Error::database(key, source);
            }
            self.give_up_with(slot, key, Loss::broken(source))
        })
    }

    /// Ends the session with a loss, and closes its connection.
    pub(super) fn give_up_with(&self, mut slot: ConnGuard, key: &Key, loss: Loss) -> Error {
        // First, because the server grants the lock to another session once the connection is closed.
        self.give_up(&loss);
        drop(slot.take());
        Error::lost(key, self.loss().unwrap_or(loss))
    }
}
