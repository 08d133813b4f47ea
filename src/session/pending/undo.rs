//! Undoes an acquire that was refused, has failed, or was dropped.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Pending, Stage};
use crate::error::{Error, Loss, is_answer};
use crate::key::KeyId;
use crate::metrics;
use crate::mode::Mode;
use crate::request::Request;
use crate::session::slot::ConnGuard;
use crate::session::task::Task;
use crate::session::{DEADLINE, Session, within_task};

impl Pending {
    /// Undoes an acquire that was refused, and releases the locks that it was granted before.
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

    /// Undoes an acquire that failed, and waits until it holds nothing, unless the server does not answer.
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
        // If the runtime is shut down, the connection is closed with it.
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
        let cleaning = clean_up(
            Arc::clone(&self.session),
            self.slot.take(),
            self.request.clone(),
            std::mem::take(&mut self.claimed),
            std::mem::take(&mut self.missing),
            self.stage,
        );
        Task::start(&self.session.runtime, cleaning)
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

/// Stops the server's work for an acquire that was refused or dropped, or has failed, and releases the locks that the
/// server has granted.
async fn clean_up(
    session: Arc<Session>,
    slot: Option<ConnGuard>,
    request: Request,
    claimed: Vec<(KeyId, Mode)>,
    missing: Vec<(KeyId, Mode)>,
    stage: Stage,
) {
    let mut slot = match slot {
        Some(slot) => slot,
        // There is nothing to undo, and another guard or call will end the session.
        None if stage == Stage::Idle && claimed.is_empty() && session.ledger().done_early() => {
            return;
        }
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
            lock.key = %request.key().id(),
            lock.name = request.key().name(),
            mode = %request.mode(),
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
            session.fail(slot, Loss::broken(error), Vec::new());
            return;
        }
    }
    session.done(slot);
}
