//! The release of guards, and the end of a session.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;

use sqlx::PgConnection;

use super::conn::{Conn, Shown, enter_unless_inside};
use super::ledger::Leave;
use super::local_queue::Waiter;
use super::slot::ConnGuard;
use super::task::Task;
use super::{DEADLINE, Session, within, within_task};
use crate::error::{Error, Loss, Result, is_answer};
use crate::key::{Key, KeyId};
use crate::mode::Mode;
use crate::request::Request;
use crate::sql;
use crate::sql::release::{Protocol, Unlocked};

/// A release that is done, or in flight.
pub(crate) enum Release {
    Done(Result<()>),
    Running(Key, Arc<Session>, Task<Result<()>>),
}

impl Release {
    /// Waits for the server's answer. Dropping this future does not stop the release.
    ///
    /// While the application has borrowed the connection, waits for at most [`DEADLINE`].
    pub(crate) async fn done(self) -> Result<()> {
        match self {
            Self::Done(result) => result,
            Self::Running(key, session, task) => {
                let mut late = pin!(session.borrowed_for_too_long());
                // The caller may await this outside of a runtime, where there is no timer.
                let late =
                    poll_fn(|cx| enter_unless_inside(&session.runtime, || late.as_mut().poll(cx)));
                tokio::select! {
                    biased;
                    released = task => released,
                    () = late => Err(Error::ConnectionBorrowed { key }),
                }
            }
        }
    }
}

/// The result of a release.
enum Answer {
    Released,
    /// The server was not asked, because the lock is handed off to this call.
    HandedOff(Box<Waiter>),
    NotHeld,
    /// Another backend than the session's has answered.
    Elsewhere,
}

impl Session {
    /// Releases one guard's share. If the server then holds more than is needed, a task sends a statement, or hands
    /// the lock off to another call of this process.
    pub(crate) fn release(self: Arc<Self>, request: &Request, protocol: Protocol) -> Release {
        let leave = self.ledger().leave(request);
        match leave {
            Leave::Keep => return Release::Done(Ok(())),
            Leave::Lost(reason) => {
                return Release::Done(Err(Error::lost(request.key(), reason)));
            }
            Leave::Unlock => {}
        }
        let runtime = self.runtime.clone();
        let key = request.key().clone();
        let session = Arc::clone(&self);
        let request = request.clone();
        let unlocking = async move {
            let unlocked = self.unlock(&request, protocol).await;
            unlocked.map_err(|reason| Error::lost(request.key(), reason))
        };
        let task = match protocol {
            Protocol::Extended => Task::to_await(&runtime, unlocking),
            Protocol::Simple => Task::start(&runtime, unlocking),
        };
        Release::Running(key, session, task)
    }

    /// Releases the locks that no guard needs any more, and returns the connection to the pool if nothing needs the
    /// session.
    ///
    /// The connection is returned only after the server has confirmed that every lock was held and is now free.
    async fn unlock(self: Arc<Self>, request: &Request, protocol: Protocol) -> Result<(), Loss> {
        let mut slot = self.connection_at_last().await;
        let Some(conn) = slot.as_mut() else {
            self.done(slot);
            // Another release has done the work of both; or the connection broke while this one waited
            // for it.
            return self.ledger().loss().map_or(Ok(()), Err);
        };
        let mut locks = Vec::new();
        let answer = {
            let keys = request.ids().map(|(key, _)| key);
            let is_clean = !conn.untidy && !conn.checked;
            let unlocking = pin!(async {
                self.tidy(conn).await?;
                // A release that is awaited must report whether the lock was held until now.
                if matches!(protocol, Protocol::Extended)
                    && is_clean
                    && self.has_next_in_line(conn, request)
                {
                    let answer = sql::backend::heartbeat(conn.pg()?, None).await;
                    // An error that the server returns is a sign of life.
                    if !answer.as_ref().is_err_and(is_answer) && answer? != self.backend_pid() {
                        return Ok(Answer::Elsewhere);
                    }
                }
                match self.next_in_line(conn, request, is_clean) {
                    Some(waiter) => Ok(Answer::HandedOff(Box::new(waiter))),
                    None => self.give_up_surplus(conn, keys, protocol, &mut locks).await,
                }
            });
            match protocol {
                // The caller awaits this, so the first poll may poll a timer, which spares the runtime a step.
                Protocol::Extended => within(DEADLINE, unlocking).await,
                Protocol::Simple => within_task(DEADLINE, unlocking).await,
            }
        };
        let loss = match answer {
            Ok(Answer::Released) => {
                tracing::trace!(backend_pid = self.backend_pid(), ?locks, "released");
                // If the session was lost, nothing is left to release.
                let loss = if locks.is_empty() { self.loss() } else { None };
                self.done(slot);
                return loss.map_or(Ok(()), Err);
            }
            Ok(Answer::HandedOff(waiter)) => {
                self.hand_off(slot, *waiter);
                return Ok(());
            }
            Ok(Answer::NotHeld) => Loss::NotHeld,
            Ok(Answer::Elsewhere) => {
                self.server.proof.disprove();
                self.give_up_pooled(&mut slot, locks);
                self.done(slot);
                return Err(Loss::NoExclusion);
            }
            Err(error) => Loss::broken(error),
        };
        Err(self.fail(slot, loss, locks))
    }

    /// Releases the locks that the server holds on these keys beyond those that the guards need.
    async fn give_up_surplus(
        &self,
        conn: &mut Conn,
        keys: impl Iterator<Item = KeyId>,
        protocol: Protocol,
        locks: &mut Vec<(KeyId, Mode)>,
    ) -> Result<Answer, sqlx::Error> {
        let surplus = self.ledger().surplus(keys);
        for key in surplus.downgrade {
            let Unlocked { backend_pid, all } = self.downgrade(conn.pg()?, key).await?;
            if backend_pid != self.backend_pid() {
                // The other backend has the shared lock now.
                locks.push((key, Mode::Shared));
                return Ok(Answer::Elsewhere);
            }
            if !all {
                return Ok(Answer::NotHeld);
            }
        }
        *locks = surplus.unlock;
        if locks.is_empty() {
            return Ok(Answer::Released);
        }
        let answer = sql::release::unlock(conn.pg()?, locks, protocol).await;
        // The statement was cancelled, or failed in another way that leaves the session alive. The server may have
        // released some of the locks.
        if answer.as_ref().is_err_and(is_answer) {
            self.give_up_unknown(conn.pg()?, locks).await?;
            return Ok(if self.is_lost() { Answer::NotHeld } else { Answer::Released });
        }
        let Unlocked { backend_pid, all } = answer?;
        if backend_pid != self.backend_pid() {
            return Ok(Answer::Elsewhere);
        }
        if locks.iter().any(|(key, _)| conn.settings.shown == Shown::Leader(*key)) {
            conn.settings.shown = Shown::Nothing;
        }
        Ok(if all { Answer::Released } else { Answer::NotHeld })
    }

    /// Replaces the exclusive lock that the server has granted on a key with a shared one.
    async fn downgrade(&self, pg: &mut PgConnection, key: KeyId) -> Result<Unlocked, sqlx::Error> {
        let answer = sql::release::downgrade(pg, key).await;
        if !answer.as_ref().is_err_and(is_answer) {
            return answer;
        }
        let pid = self.backend_pid();
        let (_, held) = sql::backend::holdings(pg, &[pid]).await?;
        let holds = |mode| held.contains(&(pid, key, mode));
        match (holds(Mode::Exclusive), holds(Mode::Shared)) {
            (true, false) => sql::release::downgrade(pg, key).await,
            (true, true) => sql::release::unlock_all(pg, &[(key, Mode::Exclusive)]).await,
            (false, all) => Ok(Unlocked { backend_pid: pid, all }),
        }
    }

    /// Undoes an acquire that was in flight: releases what the server granted of `missing` without an answer, and the
    /// shares that were counted. Ends the session with a loss if it did not hold these shares, or if another backend
    /// answers.
    pub(super) async fn undo(
        &self,
        conn: &mut Conn,
        claimed: &[(KeyId, Mode)],
        missing: &[(KeyId, Mode)],
    ) -> Result<(), sqlx::Error> {
        self.give_up_unknown(conn.pg()?, missing).await?;
        let excess = self.ledger().withdraw(claimed.iter().copied());
        if excess {
            self.tidy(conn).await?;
            let keys = claimed.iter().map(|&(key, _)| key);
            let mut locks = Vec::new();
            let answer = self.give_up_surplus(conn, keys, Protocol::Simple, &mut locks).await?;
            let loss = match answer {
                Answer::Released | Answer::HandedOff(_) => return Ok(()),
                Answer::NotHeld => Loss::NotHeld,
                Answer::Elsewhere => {
                    self.left_behind().extend(locks);
                    Loss::NoExclusion
                }
            };
            // The connection is closed with the slot.
            self.give_up(&loss);
        }
        Ok(())
    }

    /// Releases those of these locks that the server holds. It should hold none of them.
    pub(super) async fn give_up_unknown(
        &self,
        pg: &mut PgConnection,
        locks: &[(KeyId, Mode)],
    ) -> Result<(), sqlx::Error> {
        if locks.is_empty() {
            return Ok(());
        }
        let pid = match self.backend_pid.get() {
            Some(&pid) => pid,
            // The answer to the first statement was not read.
            None => sql::backend::heartbeat(pg, None).await?,
        };
        let held: Vec<_> = match sql::backend::holdings(pg, &[pid]).await {
            Ok((_, held)) => {
                let is_held = |&(key, mode): &_| held.contains(&(pid, key, mode));
                locks.iter().copied().filter(is_held).collect()
            }
            // The role may not list locks. All are released in any case, and the server warns about those that were not
            // held.
            Err(error) if is_answer(&error) => locks.to_vec(),
            Err(error) => return Err(error),
        };
        if !held.is_empty() {
            let unlocked = sql::release::unlock_all(pg, &held).await?;
            if unlocked.backend_pid != pid {
                self.left_behind().extend(held);
                // The connection is closed with the slot.
                self.give_up(&Loss::NoExclusion);
            }
        }
        Ok(())
    }

    /// Counts a failed statement as done, and ends the session with a loss, because it is not known what the session
    /// holds. `released` are the locks that the statement should have released, which are not in the ledger any more.
    pub(super) fn fail(
        &self,
        mut slot: ConnGuard,
        loss: Loss,
        released: Vec<(KeyId, Mode)>,
    ) -> Loss {
        // First, because the server grants the lock to another session once the connection is closed.
        self.end_with(&loss, released);
        drop(slot.take());
        self.done(slot);
        loss
    }

    /// Counts an acquire or a release as done, and returns the connection to the pool if nothing needs the session any
    /// more.
    pub(super) fn done(&self, mut slot: ConnGuard) {
        let is_released = {
            let mut ledger = self.ledger();
            // A lost session still holds its locks on the server. Its connection is closed with the slot.
            ledger.done() && ledger.loss().is_none()
        };
        if is_released && let Some(mut conn) = slot.take() {
            if !conn.settings.to_restore {
                conn.give_back();
                return;
            }
            // After the locks are free, because the statement is long. If it fails, the connection is closed.
            drop(Task::start(&self.runtime, async move {
                let put_back = async { sql::settings::put_back(conn.pg()?).await };
                if within_task(DEADLINE, put_back).await.is_ok() {
                    conn.give_back();
                }
            }));
        }
    }

    /// Ends a session whose locks exclude nothing with a loss, and releases these locks. A pooler would keep them, and
    /// may have assigned another backend to the connection since.
    pub(super) fn give_up_pooled(&self, slot: &mut ConnGuard, locks: Vec<(KeyId, Mode)>) {
        if self.loss().is_none() {
            self.end(&Loss::NoExclusion);
        }
        self.left_behind().extend(locks);
        self.close(slot.take());
    }
}
