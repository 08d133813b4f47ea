//! Passing a lock to the next call of this process that waits for it, without asking the server.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::Session;
use super::local_queue::{Next, Waiter};
use crate::key::KeyId;
use crate::mode::Mode;
use crate::request::Request;
use crate::sql::release::Protocol;

/// For how long after the server has granted a lock it is passed on inside the process. Then the lock is released,
/// and who comes first in the server's queue is next, in this process or in another one.
pub(crate) const TIME: Duration = Duration::from_millis(10);

/// A lock that was passed on, until its guard is made.
///
/// # Drop
///
/// Releases it.
#[derive(Debug)]
pub(crate) struct Handed {
    // Invariant: `Some` until it is taken or dropped.
    session: Option<Arc<Session>>,
    request: Request,
}

impl Handed {
    /// The session that holds the lock.
    pub(crate) fn take(mut self) -> Option<Arc<Session>> {
        self.session.take()
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
    /// Passes the lock of the last guard to the first call in line for it, with the connection: on a session of
    /// its own, so that nothing that knows this one can reach it. Returns false if the lock has to be released.
    ///
    /// Only what is as good as a fresh grant is passed on: the server has granted it less than [`TIME`] ago, the
    /// session holds nothing else, and nothing was left on its connection.
    pub(super) fn hand_on(self: &Arc<Self>, request: &Request) -> bool {
        let Some(key) = request.hand_over_key() else { return false };
        let Some(&since) = self.kept_since.get() else { return false };
        if since.elapsed() > TIME || self.pool.is_closed() || !self.server.proof.is_positive() {
            return false;
        }
        let Some(mut slot) = self.free_connection_unnoticed() else { return false };
        let queues = slot.as_ref().filter(|conn| !conn.untidy).and_then(|conn| conn.local_queues());
        let Some(queues) = queues.map(Arc::clone) else { return false };
        let waiter = {
            let mut ledger = self.ledger();
            let is_only = ledger.is_only_exclusive(key);
            let waiter = is_only.then(|| {
                // Otherwise another call of this process, which came before it, waits on the server.
                queues.take_first(key, |waiter| waiter.is_first && self.suits(waiter))
            });
            let Some(waiter) = waiter.flatten() else { return false };
            ledger.end();
            waiter
        };
        let runtime = waiter.runtime.clone();
        let next = Self::open(&self.pool, &self.server, slot.take(), runtime, &waiter.options);
        next.take_over(self, key, since);
        let request = waiter.request.clone();
        waiter.tell(Next::Granted(Handed { session: Some(next), request }));
        true
    }

    /// Whether the session is what the waiter would open, on its own runtime.
    fn suits(&self, waiter: &Waiter) -> bool {
        let (mine, other) = (&self.options, &waiter.options);
        waiter.request.hand_over_key().is_some()
            && waiter.runtime.id() == self.runtime.id()
            && Arc::ptr_eq(&self.connect_options, &self.pool.connect_options())
            && mine.keepalives() == other.keepalives()
            && mine.settings_required() == other.settings_required()
            && mine.standby_allowed() == other.standby_allowed()
    }

    /// Becomes a session that holds the key, on the connection of another one.
    fn take_over(self: &Arc<Self>, other: &Self, key: KeyId, since: Instant) {
        let copy = |to: &AtomicBool, from: &AtomicBool| {
            to.store(from.load(Ordering::Relaxed), Ordering::Relaxed);
        };
        copy(&self.settings_to_restore, &other.settings_to_restore);
        copy(&self.has_long_settings, &other.has_long_settings);
        copy(&self.settings_refused, &other.settings_refused);
        self.backend_pid.get_or_init(|| other.backend_pid());
        self.trust(other.last_answered());
        let mut ledger = self.ledger();
        // It is new, so neither can fail.
        ledger.granted(key, Mode::Exclusive).ok();
        ledger.settle(crate::request::Need::All).ok();
        drop(ledger);
        self.keep(since);
    }
}
