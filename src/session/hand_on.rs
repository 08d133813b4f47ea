//! Passing a lock to the next call of this process that waits for it, without asking the server.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::Session;
use super::conn::Conn;
use super::local_queue::{LineId, Next, Waiter};
use super::pending::Granted;
use super::slot::ConnGuard;
use crate::error::{Error, Result};
use crate::key::KeyId;
use crate::request::Request;
use crate::sql::release::Protocol;

/// For how long after a session has got a lock from the server it is passed on inside the process. Then it is released,
/// and who comes first in the server's queue is next, in this process or in another one.
pub(crate) const TIME: Duration = Duration::from_millis(10);

/// A lock that was passed on, until its guard is made.
///
/// # Drop
///
/// Releases it.
pub(crate) struct Handed {
    // Invariant: `Some` until it is taken or dropped.
    session: Option<Arc<Session>>,
    request: Request,
}

impl Handed {
    /// What a guard is made of, unless the session was lost meanwhile.
    pub(crate) fn granted(mut self, request: &Request) -> Result<Granted> {
        let Some(session) = self.session.take() else {
            unreachable!("BUG: a lock is taken twice");
        };
        match session.loss() {
            Some(loss) => Err(Error::lost(request.key(), loss)),
            None => Ok(Granted { session, request: request.clone() }),
        }
    }
}

impl Drop for Handed {
    fn drop(&mut self) {
        if let Some(session) = self.session.take() {
            // Detach: no caller waits for it.
            drop(session.release(&self.request, Protocol::Simple));
        }
    }
}

impl Session {
    /// Whether a call is in line to which the lock of the last guard may be passed on.
    pub(super) fn has_next_in_line(&self, conn: &Conn, request: &Request) -> bool {
        conn.local_queues().is_some_and(|queues| {
            request.hand_over_key().is_some_and(|key| queues.has_first(self.line(key)))
        })
    }

    /// The first call in line for the lock of the last guard, if it can have it without a release. Then this session
    /// has ended. If it can't, it is sent to the server.
    ///
    /// Only what is as good as a fresh grant is passed on: the server's answer is younger than [`TIME`], the session
    /// holds nothing else, and `is_clean`: the application has not used the connection, on which it may have left
    /// something, or released the lock.
    pub(super) fn next_in_line(
        &self,
        conn: &Conn,
        request: &Request,
        is_clean: bool,
    ) -> Option<Waiter> {
        let queues = conn.local_queues().filter(|queues| !queues.is_empty())?;
        let is_fresh = self.kept_since.get().is_some_and(|since| since.elapsed() < TIME);
        let can_hand_on = is_clean
            && is_fresh
            && self.loss().is_none()
            && !self.pool.is_closed()
            && self.server.proof.is_positive();
        for (key, _) in request.ids() {
            // Unless it waits here, another call of this process, which came before it, waits on the server.
            let Some(first) = queues.take_first(self.line(key)) else { continue };
            if can_hand_on && request.hand_over_key() == Some(key) && self.suits(&first) {
                let mut ledger = self.ledger();
                if ledger.is_last_of(key) {
                    ledger.end();
                    return Some(first);
                }
            }
            first.tell(Next::Released);
        }
        None
    }

    fn line(&self, key: KeyId) -> LineId {
        LineId::new(&self.server, key)
    }

    /// Passes the lock to a call, with the connection: on a session of its own, so that nothing that knows this one
    /// can reach it.
    pub(super) fn hand_on(&self, mut slot: ConnGuard, waiter: Waiter) {
        let runtime = waiter.runtime.clone();
        let next = Self::open(&self.pool, &self.server, slot.take(), runtime, &waiter.options);
        drop(slot);
        next.take_over(self, &waiter.request);
        let request = waiter.request.clone();
        waiter.tell(Next::Granted(Handed { session: Some(next), request }));
    }

    /// Whether the session is what the waiter would open, on its own runtime.
    fn suits(&self, waiter: &Waiter) -> bool {
        let (mine, other) = (&self.options, &waiter.options);
        waiter.request.hand_over_key().is_some()
            && waiter.runtime.id() == self.runtime.id()
            && Arc::ptr_eq(&self.connect_options, &self.pool.connect_options())
            && mine.heartbeat == other.heartbeat
            && mine.keepalives == other.keepalives
            && mine.require_settings == other.require_settings
            && mine.allow_standby == other.allow_standby
            && mine.application_name == other.application_name
    }

    /// Becomes a session that holds the lock, on the connection of another one.
    fn take_over(self: &Arc<Self>, other: &Self, request: &Request) {
        let copy = |to: &AtomicBool, from: &AtomicBool| {
            to.store(from.load(Ordering::Relaxed), Ordering::Relaxed);
        };
        copy(&self.settings_to_restore, &other.settings_to_restore);
        copy(&self.has_long_settings, &other.has_long_settings);
        copy(&self.has_user_timeout, &other.has_user_timeout);
        copy(&self.settings_refused, &other.settings_refused);
        *self.shown() = *other.shown();
        self.backend_pid.get_or_init(|| other.backend_pid());
        *self.last_answered.lock().unwrap_or_else(PoisonError::into_inner) = other.last_answered();
        let mut ledger = self.ledger();
        for (key, mode) in request.ids() {
            ledger.granted(key, mode);
        }
        // It is new, and has not ended.
        ledger.settle(request.need).ok();
        drop(ledger);
        self.keep(other.kept_since.get().copied().unwrap_or_else(Instant::now));
    }
}
