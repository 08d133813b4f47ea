//! The part of a handle that its guards share: what they hold, and whether the handle was closed.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use tokio::sync::Notify;

use crate::error::{Loss, Result};
use crate::mode::Mode;
use crate::request::Request;
use crate::session::Session;
use crate::session::release::Release;
use crate::sql::release::Protocol;

/// The locks that a handle holds, so that closing the handle releases these, and no locks of other handles on the
/// session.
#[derive(Default)]
pub(crate) struct Holdings {
    closed: AtomicBool,
    notify: Notify,
    entries: Mutex<Entries>,
}

#[derive(Default)]
struct Entries {
    next: u64,
    /// Usually one. Empty if a manager acquires the locks, because the manager counts them itself.
    all: Vec<(u64, Arc<Session>, Request)>,
    /// The tokens of the guards, by the address of the session and the mode. An address is not used again while a token
    /// lives, because a guard with the token has the session.
    tokens: Vec<(usize, Mode, Weak<OnceLock<i64>>)>,
}

/// The fencing token of one hold, once it was drawn.
pub(crate) type Token = Arc<OnceLock<i64>>;

impl Holdings {
    /// Identifies the handle for as long as it, or a guard of it, lives.
    pub(crate) fn id(&self) -> usize {
        std::ptr::from_ref(self).addr()
    }

    /// Adds a lock. Returns the number of its entry.
    pub(crate) fn add(&self, session: &Arc<Session>, request: &Request) -> u64 {
        let mut entries = self.entries();
        let number = entries.next;
        entries.next += 1;
        entries.all.push((number, Arc::clone(session), request.clone()));
        number
    }

    /// Removes an entry. Returns false if closing the handle has already removed it.
    pub(crate) fn end(&self, number: u64) -> bool {
        let mut entries = self.entries();
        let found = entries.all.iter().rposition(|(other, ..)| *other == number);
        found.map(|at| entries.all.swap_remove(at)).is_some()
    }

    /// Returns the token that the guards of this handle share, as long as one of them lives. Guards with other modes
    /// have other tokens, because between a downgrade and an upgrade, other sessions may hold the lock shared.
    pub(crate) fn token(&self, session: &Arc<Session>, mode: Mode) -> Token {
        let (session, mut entries) = (Arc::as_ptr(session).addr(), self.entries());
        let tokens = &mut entries.tokens;
        tokens.retain(|(.., token)| token.strong_count() > 0);
        let known = tokens.iter().find(|(other, of, _)| (*other, *of) == (session, mode));
        known.and_then(|(.., token)| token.upgrade()).unwrap_or_else(|| {
            let token = Token::default();
            tokens.push((session, mode, Arc::downgrade(&token)));
            token
        })
    }

    /// Releases everything, however many guards are alive. The guards then report a loss.
    ///
    /// The releases are in flight when this returns. The returned future waits for the server's answers.
    pub(crate) fn release_all(&self) -> impl Future<Output = Result<()>> + use<> {
        let releases: Vec<Release> = self.close(|| {
            let all = std::mem::take(&mut self.entries().all);
            let release = |(_, session, request): (u64, Arc<Session>, Request)| {
                session.release(&request, Protocol::Simple)
            };
            all.into_iter().map(release).collect()
        });
        async move {
            let mut result = Ok(());
            for release in releases {
                result = result.and(release.done().await);
            }
            result
        }
    }

    /// Closes the handle: from now on, its guards report a loss. They are notified after `release` has run.
    pub(crate) fn close<T>(&self, release: impl FnOnce() -> T) -> T {
        self.closed.store(true, Ordering::Relaxed);
        let released = release();
        self.notify.notify_waiters();
        released
    }

    pub(crate) fn closed(&self) -> Option<Loss> {
        self.closed.load(Ordering::Relaxed).then_some(Loss::Released)
    }

    /// Waits until the handle is closed.
    pub(crate) async fn is_closed(&self) -> Loss {
        loop {
            let notified = self.notify.notified();
            if let Some(loss) = self.closed() {
                return loss;
            }
            notified.await;
        }
    }

    fn entries(&self) -> MutexGuard<'_, Entries> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
