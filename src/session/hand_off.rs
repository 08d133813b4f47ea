//! Hands a lock off to the next call of this process that waits for it, without asking the server.

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

/// For how long after the server's grant a lock is handed off inside the process. After that, the lock is released, and
/// the first waiter in the server's queue is next, in this process or in another one.
pub(crate) const TIME: Duration = Duration::from_millis(20);

/// A lock that was handed off, until its guard is made.
///
/// # Drop
///
/// Releases the lock.
pub(crate) struct Handed {
    // Invariant: `Some` until it is taken or dropped.
    session: Option<Arc<Session>>,
    request: Request,
}

impl Handed {
    /// Returns the grant from which a guard is made, or an error if the session was lost meanwhile.
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
    /// Whether a call is in line to which the lock of the last guard may be handed off.
    pub(super) fn has_next_in_line(&self, conn: &Conn, request: &Request) -> bool {
        conn.local_queues().is_some_and(|queues| {
            request.hand_off_key().is_some_and(|key| queues.has_first(self.line(key)))
        })
    }

    /// Takes the first call out of the line for the last guard's lock. Returns the call if the lock can be handed off to
    /// it without a release; then this session has ended. Otherwise sends the call to the server.
    ///
    /// A lock is handed off only if it is as good as a fresh grant: the server's answer is younger than [`TIME`], the
    /// session holds nothing else, and `is_clean` says that the application has not used the connection, where it may
    /// have left something, or released the lock.
    pub(super) fn next_in_line(
        &self,
        conn: &Conn,
        request: &Request,
        is_clean: bool,
    ) -> Option<Waiter> {
        let queues = conn.local_queues().filter(|queues| !queues.is_empty())?;
        let is_fresh = self.kept_since.get().is_some_and(|since| since.elapsed() < TIME);
        let can_hand_off = is_clean
            && is_fresh
            && self.loss().is_none()
            && !self.pool.is_closed()
            && self.server.proof.is_positive();
        for (key, _) in request.ids() {
            // If the first call does not wait here, an earlier call of this process waits on the server.
            let Some(first) = queues.take_first(self.line(key)) else { continue };
            if can_hand_off && request.hand_off_key() == Some(key) && self.suits(&first) {
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

    /// Hands the lock and the connection off to a call, in a new session, so that nothing that knows this session can
    /// reach them.
    pub(super) fn hand_off(&self, mut slot: ConnGuard, waiter: Waiter) {
        let runtime = waiter.runtime.clone();
        let next = Self::open(&self.pool, &self.server, slot.take(), runtime, &waiter.options);
        drop(slot);
        next.take_over(self, &waiter.request);
        let request = waiter.request.clone();
        waiter.tell(Next::Granted(Handed { session: Some(next), request }));
    }

    /// Whether the waiter would open a session like this one, on the same runtime.
    fn suits(&self, waiter: &Waiter) -> bool {
        let (mine, other) = (&self.options, &waiter.options);
        waiter.request.hand_off_key().is_some()
            && waiter.runtime.id() == self.runtime.id()
            && Arc::ptr_eq(&self.connect_options, &self.pool.connect_options())
            && mine.heartbeat == other.heartbeat
            && mine.keepalives == other.keepalives
            && mine.require_settings == other.require_settings
            && mine.allow_standby == other.allow_standby
            && mine.application_name == other.application_name
    }

    /// Takes over the lock and the state of another session, whose connection this session already has.
    fn take_over(self: &Arc<Self>, other: &Self, request: &Request) {
        self.backend_pid.get_or_init(|| other.backend_pid());
        *self.last_answered.lock().unwrap_or_else(PoisonError::into_inner) = other.last_answered();
        let mut ledger = self.ledger();
        for (key, mode) in request.ids() {
            ledger.granted(key, mode);
        }
        // This can't fail, because this session is new, and has not ended.
        ledger.settle(request.need).ok();
        drop(ledger);
        self.keep(other.kept_since.get().copied().unwrap_or_else(Instant::now));
    }
}
