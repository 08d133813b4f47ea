//! What a handle holds, so that closing it releases that, and nothing of other handles on the session.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::error::{Loss, Result};
use crate::request::Request;
use crate::session::Session;
use crate::session::release::Release;
use crate::sql::release::Protocol;

/// What a handle holds.
#[derive(Default)]
pub(crate) struct Holdings {
    closed: AtomicBool,
    notify: Notify,
    entries: Mutex<Entries>,
}

#[derive(Default)]
struct Entries {
    next: u64,
    /// Usually one.
    all: Vec<(u64, Arc<Session>, Request)>,
}

/// One of them, as the guard knows it.
pub(crate) struct Holding {
    holdings: Arc<Holdings>,
    id: u64,
}

impl Holdings {
    pub(crate) fn add(self: &Arc<Self>, session: &Arc<Session>, request: &Request) -> Holding {
        let mut entries = self.entries();
        let id = entries.next;
        entries.next += 1;
        entries.all.push((id, Arc::clone(session), request.clone()));
        Holding { holdings: Arc::clone(self), id }
    }

    /// Releases everything, however many guards are alive, which then report a loss.
    ///
    /// The release is in flight when this returns; what it returns waits for the server.
    pub(crate) fn release_all(&self) -> Closing {
        self.closed.store(true, Ordering::Relaxed);
        let all = std::mem::take(&mut self.entries().all);
        let release = |(_, session, request): (u64, Arc<Session>, Request)| {
            session.release(&request, Protocol::Simple)
        };
        let closing = Closing(all.into_iter().map(release).collect());
        self.notify.notify_waiters();
        closing
    }

    fn entries(&self) -> MutexGuard<'_, Entries> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Releases in flight.
#[must_use]
pub(crate) struct Closing(Vec<Release>);

impl Closing {
    /// Waits for the server's answers.
    pub(crate) async fn done(self) -> Result<()> {
        let mut result = Ok(());
        for release in self.0 {
            result = result.and(release.done().await);
        }
        result
    }
}

impl Holding {
    /// Another one of the same handle.
    pub(crate) fn another(&self, session: &Arc<Session>, request: &Request) -> Self {
        self.holdings.add(session, request)
    }

    /// Takes it out. Returns false if the close of the handle has done so.
    pub(crate) fn end(&self) -> bool {
        let mut entries = self.holdings.entries();
        let found = entries.all.iter().rposition(|(id, ..)| *id == self.id);
        found.map(|at| entries.all.swap_remove(at)).is_some()
    }

    pub(crate) fn closed(&self) -> Option<Loss> {
        self.holdings.closed.load(Ordering::Relaxed).then_some(Loss::Released)
    }

    /// Waits until the handle is closed.
    pub(crate) async fn is_closed(&self) -> Loss {
        loop {
            let notified = self.holdings.notify.notified();
            if let Some(loss) = self.closed() {
                return loss;
            }
            notified.await;
        }
    }
}
