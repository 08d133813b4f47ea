//! Short holds are not watched, and cost nothing; those that last grow up to be watched.
//!
//! To start a task for every hold would wake a thread of the runtime each time, which costs a short
//! hold a tenth of its time. So each runtime has one task that looks every [`TICK`] which of the young
//! sessions still live, and sleeps while there are none.

use std::collections::HashMap;
use std::mem;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::runtime::{Handle, Id};
use tokio::sync::Notify;
use tokio::time::sleep;

use super::{Session, watch};

/// A session is watched when it has lived for one to two of these.
const TICK: Duration = Duration::from_millis(20);

static NURSERIES: LazyLock<Mutex<HashMap<Id, Arc<Nursery>>>> = LazyLock::new(Mutex::default);

/// The young sessions of one runtime.
#[derive(Debug, Default)]
struct Nursery {
    young: Mutex<Young>,
    /// Somebody came while nobody was there.
    woken: Notify,
}

#[derive(Debug, Default)]
struct Young {
    /// Came since the last tick.
    newborn: Vec<Weak<Session>>,
    /// Came in the tick before.
    grown: Vec<Weak<Session>>,
    asleep: bool,
}

/// Has a session watched if it lives for longer than a short hold does.
pub(super) fn admit(session: &Arc<Session>) {
    let nursery = Nursery::of(&session.runtime);
    let mut young = nursery.young();
    young.newborn.push(Arc::downgrade(session));
    if mem::take(&mut young.asleep) {
        nursery.woken.notify_one();
    }
}

impl Nursery {
    /// The nursery of a runtime, with a task that looks after it.
    fn of(runtime: &Handle) -> Arc<Self> {
        let id = runtime.id();
        let mut all = nurseries();
        if let Some(nursery) = all.get(&id) {
            return Arc::clone(nursery);
        }
        let nursery = Arc::new(Self::default());
        all.insert(id, Arc::clone(&nursery));
        drop(all);
        // Detach: it ends with the runtime, and at once if that is gone.
        drop(runtime.spawn(look_after(Nanny { id, nursery: Arc::clone(&nursery) })));
        nursery
    }

    fn young(&self) -> MutexGuard<'_, Young> {
        self.young.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The task's hold on its nursery.
///
/// # Drop
///
/// The runtime is going down. Closes the nursery, and gives up the sessions in it: nobody will watch
/// them.
struct Nanny {
    id: Id,
    nursery: Arc<Nursery>,
}

impl Drop for Nanny {
    fn drop(&mut self) {
        nurseries().remove(&self.id);
        let Young { newborn, grown, .. } = mem::take(&mut *self.nursery.young());
        for session in newborn.into_iter().chain(grown) {
            drop(watch::Watching::new(session));
        }
    }
}

async fn look_after(nanny: Nanny) {
    loop {
        sleep(TICK).await;
        let (grown, empty) = {
            let mut young = nanny.nursery.young();
            let newborn = mem::take(&mut young.newborn);
            let grown = mem::replace(&mut young.grown, newborn);
            young.asleep = grown.is_empty() && young.grown.is_empty();
            (grown, young.asleep)
        };
        for session in grown {
            watch::start(session);
        }
        if empty {
            nanny.nursery.woken.notified().await;
        }
    }
}

fn nurseries() -> MutexGuard<'static, HashMap<Id, Arc<Nursery>>> {
    NURSERIES.lock().unwrap_or_else(PoisonError::into_inner)
}
