//! A handle, as its guards know it: what they hold, and whether it was closed.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::error::{Loss, Result};
use crate::request::Request;
use crate::session::Session;
use crate::session::release::Release;
use crate::sql::release::Protocol;

/// What a handle holds, so that closing it releases that, and nothing of other handles on the session.
#[derive(Default)]
pub(crate) struct Holdings {
    closed: AtomicBool,
    notify: Notify,
    entries: Mutex<Entries>,
}

#[derive(Default)]
struct Entries {
    next: u64,
    /// Usually one. None of a manager's, which counts them itself.
    all: Vec<(u64, Arc<Session>, Request)>,
}

impl Holdings {
    /// Identifies the handle for as long as it, or a guard of it, lives.
    pub(crate) fn id(&self) -> usize {
        std::ptr::from_ref(self).addr()
    }

    /// Returns the number of what is added.
    pub(crate) fn add(&self, session: &Arc<Session>, request: &Request) -> u64 {
        let mut entries = self.entries();
        let number = entries.next;
        entries.next += 1;
        entries.all.push((number, Arc::clone(session), request.clone()));
        number
    }

    /// Takes it out. Returns false if the close of the handle has done so.
    pub(crate) fn end(&self, number: u64) -> bool {
        let mut entries = self.entries();
        let found = entries.all.iter().rposition(|(other, ..)| *other == number);
        found.map(|at| entries.all.swap_remove(at)).is_some()
    }

    /// Releases everything, however many guards are alive, which then report a loss.
    ///
    /// The release is in flight when this returns; what it returns waits for the server's answers.
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

    /// From now on, the guards report a loss. They are notified when what they hold is being released.
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
