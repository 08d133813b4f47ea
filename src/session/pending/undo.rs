//! Taking an acquire back that was refused, has failed, or was dropped.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Pending, Stage};
use crate::error::{Error, Loss, is_answer};
use crate::key::{Key, KeyId};
use crate::metrics;
use crate::mode::Mode;
use crate::session::slot::ConnGuard;
use crate::session::task::Task;
use crate::session::{DEADLINE, Session, within_task};

impl Pending {
    /// Takes an acquire back that was refused, and what it was granted before.
    pub(crate) async fn withdraw(mut self) {
        if let Some(slot) = self.slot.take_if(|_| self.claimed.is_empty()) {
            self.settled = true;
            self.session.done(slot);
            return;
        }
        self.undo().await;
    }

    /// Closes the connection of an acquire on a session of its own.
    pub(super) fn close(mut self) {
        self.settled = true;
        if let Some(mut slot) = self.slot.take() {
            drop(slot.take());
            self.session.done(slot);
        }
    }

    /// Takes an acquire back that failed, and waits until it holds nothing, unless the server is silent.
    pub(super) async fn fail(mut self, error: sqlx::Error) -> Error {
        let answered = is_answer(&error);
        // The server has answered, so there is nothing to cancel.
        if answered && matches!(self.stage, Stage::Waiting(_)) {
            self.stage = Stage::Trying;
        }
        let is_late =
            matches!(&error, sqlx::Error::Io(error) if error.kind() == io::ErrorKind::TimedOut);
        if !answered && !is_late {
            // First, so that no guard joins the session while the acquire is undone.
            let broken =
                sqlx::Error::Io(io::Error::new(io::ErrorKind::BrokenPipe, error.to_string()));
            self.session.give_up(&Loss::broken(broken));
        }
        // If the runtime is shut down, so is the connection.
        let undo = self.undo();
        if answered {
            undo.await;
        }
        if self.settings_rejected {
            return Error::SettingsRejected {
                key: self.request.key().clone(),
                source: Arc::new(error),
            };
        }
        Error::acquiring(self.request.key(), error)
    }

    fn undo(&mut self) -> Task<()> {
        self.settled = true;
        let abandoned = Abandoned {
            session: Arc::clone(&self.session),
            key: self.request.key().clone(),
            mode: self.request.mode(),
            claimed: std::mem::take(&mut self.claimed),
            missing: std::mem::take(&mut self.missing),
            stage: self.stage,
        };
        Task::start(&self.session.runtime, abandoned.clean_up(self.slot.take()))
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if !self.settled {
            metrics::abandoned(matches!(self.stage, Stage::Waiting(_)));
            // Detach: no caller waits for it.
            drop(self.undo());
        }
    }
}

/// An acquire that was dropped, or has failed.
struct Abandoned {
    session: Arc<Session>,
    key: Key,
    mode: Mode,
    claimed: Vec<(KeyId, Mode)>,
    missing: Vec<(KeyId, Mode)>,
    stage: Stage,
}

impl Abandoned {
    /// Has the server stop what it is doing for the acquire, and releases what it has granted.
    async fn clean_up(self, slot: Option<ConnGuard>) {
        let Self { session, key, mode, claimed, missing, stage } = self;
        let mut slot = match slot {
            Some(slot) => slot,
            None => session.connection_at_last().await,
        };
        if session.is_lost() {
            // The connection is closed with the slot.
            return session.done(slot);
        }
        if let Some(conn) = slot.as_mut()
            && (stage != Stage::Idle || !claimed.is_empty())
        {
            tracing::debug!(
                lock.key = %key.id(),
                lock.name = key.name(),
                %mode,
                backend_pid = session.backend_pid(),
                ?stage,
                "undoing an acquire that was abandoned or failed"
            );
            // A try ends by itself; a wait ends at the end of its slice.
            let (grace, limit) = match stage {
                Stage::Waiting(until) => {
                    let left = until.saturating_duration_since(Instant::now());
                    (Duration::ZERO, left + DEADLINE)
                }
                Stage::Idle | Stage::Trying => (Duration::from_secs(1), DEADLINE),
            };
            let cleaned = within_task(limit + DEADLINE, async {
                if stage == Stage::Idle {
                    return session.undo(conn, &claimed, &[]).await;
                }
                Box::pin(session.drain(conn.pg()?, grace, limit)).await?;
                session.undo(conn, &claimed, &missing).await
            });
            if let Err(error) = cleaned.await {
                session.fail(slot, Loss::broken(error));
                return;
            }
        }
        session.done(slot);
    }
}
