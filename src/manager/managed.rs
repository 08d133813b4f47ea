//! An owner whose locks a manager takes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::sync::oneshot::{self, error::RecvError};

use super::table::{Left, OwnerId, Want};
use super::{Manager, Place, Tell, Told};
use crate::error::{Error, Loss, Result};
use crate::guard::Guard;
use crate::key::{Key, KeyId};
use crate::metrics;
use crate::mode::Mode;
use crate::request::Request;
use crate::session::Session;
use crate::session::policy::WaitPolicy;
use crate::session::pool::timed_out;

/// An owner whose locks a manager takes, and each of its guards.
#[derive(Clone)]
pub(crate) struct Managed {
    manager: Arc<Manager>,
    owner: Arc<Owner>,
}

struct Owner {
    id: OwnerId,
    closed: AtomicBool,
    told: Notify,
}

impl Managed {
    pub(super) fn new(manager: &Arc<Manager>) -> Self {
        let id = manager.next_owner();
        let owner = Owner { id, closed: AtomicBool::new(false), told: Notify::new() };
        Self { manager: Arc::clone(manager), owner: Arc::new(owner) }
    }

    /// An owner like this one, that holds nothing.
    pub(crate) fn another(&self) -> Self {
        Self::new(&self.manager)
    }

    /// Acquires. `None` if the time is over.
    pub(crate) async fn acquire(
        &self,
        request: &Request,
        policy: WaitPolicy,
    ) -> Result<Option<Guard>> {
        let key = request.key();
        loop {
            let Some(waiting) = self.want(request, policy)? else { return Ok(None) };
            let place = match waiting {
                Wish::Granted(place) => place,
                Wish::Waits(mut waiting) => match waiting.answer(policy).await {
                    // The time was spent waiting for a connection, not for the lock.
                    None if waiting.is_unasked() => {
                        return Err(timed_out(&self.manager.pool, key));
                    }
                    None => return Ok(None),
                    Some(answer) => match waiting.told(answer.ok()) {
                        Some(Told::Granted(place)) => place,
                        Some(Told::Refused) => return Ok(None),
                        Some(Told::Deadlock) => return Err(Error::deadlock(key)),
                        Some(Told::Failed(error)) => return Err(error.for_key(key)),
                        // The driver ended with its runtime: retry.
                        Some(Told::Released(_) | Told::PassedOn) | None => continue,
                    },
                },
            };
            if let Some(loss) = place.session.loss() {
                // The task that monitors it has not reported that yet.
                self.manager.lost_key(key.id(), &place, &loss);
                continue;
            }
            return Ok(Some(Guard::managed(place.session, request.clone(), self.clone())));
        }
    }

    fn want(&self, request: &Request, policy: WaitPolicy) -> Result<Option<Wish<'_>>> {
        let (key, mode) = (request.key(), request.mode());
        let waits = matches!(policy, WaitPolicy::Forever | WaitPolicy::Until(_));
        let mut answer = None;
        let tell = || {
            let (tell, told) = oneshot::channel();
            answer = Some(told);
            let waiting = metrics::Waiting::new(request.labels(&self.manager.options));
            Tell { told: tell, waiting }
        };
        let manager = &self.manager;
        // First, because without a runtime this panics.
        let runtime = Handle::current();
        let mut state = manager.state();
        if manager.pool.is_closed() && !state.table.holds(key.id(), self.owner.id) {
            return Err(Error::PoolClosed { key: key.clone() });
        }
        let now = Instant::now();
        let wanted = (mode, waits);
        let mut effects = state.effects();
        let want = state.table.want(key.id(), self.owner.id, wanted, tell, now, &mut effects);
        manager.settle(&mut state, effects);
        manager.drive(&runtime, &mut state);
        let elsewhere = state.is_driven_elsewhere(&runtime);
        drop(state);
        match (want, answer) {
            (Want::Granted(place), _) => Ok(Some(Wish::Granted(place))),
            (Want::Queued(id), Some(answer)) => Ok(Some(Wish::Waits(Waiting {
                managed: self,
                key: key.id(),
                mode,
                id,
                answer,
                elsewhere,
                settled: false,
                _queued: metrics::queued(),
            }))),
            (Want::Deadlock, _) => Err(Error::deadlock(key)),
            (Want::Busy | Want::Queued(_), _) => Ok(None),
        }
    }

    /// Releases a guard. Of a release that is not awaited, the result is not told.
    pub(crate) fn leave(
        &self,
        key: &Key,
        mode: Mode,
        session: &Arc<Session>,
        awaited: bool,
    ) -> PendingRelease {
        // A release may be awaited outside of a runtime, where there is no timer.
        let here = if awaited { Handle::try_current().ok() } else { None };
        let mut answer = None;
        let farewell = awaited.then_some(|| {
            let (tell, told) = oneshot::channel();
            answer = Some(told);
            tell.into()
        });
        // Of either kind, because places are compared by their sessions.
        let place = Place { session: Arc::clone(session), shared: true };
        let (left, elsewhere) = self.manager.change(|state, now, effects| {
            let guard = (self.owner.id, mode);
            let left = state.table.leave(key.id(), guard, &place, farewell, now, effects);
            (left, here.is_some_and(|here| state.is_driven_elsewhere(&here)))
        });
        let answer = match left {
            Left::Stale => Err(self.closed().or_else(|| session.loss()).unwrap_or(Loss::NotHeld)),
            Left::Told | Left::Done => Ok(answer.map(|answer| (answer, elsewhere))),
        };
        PendingRelease {
            manager: Arc::clone(&self.manager),
            session: place.session,
            key: key.clone(),
            since: Instant::now(),
            answer,
        }
    }

    /// Releases everything, however many guards are alive; they are notified. From now on this is
    /// another owner.
    pub(crate) async fn release_all(&mut self, key: &Key) -> Result<()> {
        let another = self.another();
        let closed = std::mem::replace(self, another);
        let (tell, told) = oneshot::channel();
        let here = Handle::try_current().ok();
        let (left, elsewhere) = closed.manager.change(|state, now, effects| {
            let left = state.table.close(key.id(), closed.owner.id, || tell.into(), now, effects);
            closed.owner.closed.store(true, Ordering::Relaxed);
            (left, here.is_some_and(|here| state.is_driven_elsewhere(&here)))
        });
        closed.owner.told.notify_waiters();
        if left != Left::Told {
            return Ok(());
        }
        let released = match closed.manager.unless_stalled(told, elsewhere).await {
            Ok(Told::Released(Err(loss))) => Err(loss),
            Ok(_) => Ok(()),
            Err(_) => Err(Loss::RuntimeShutdown),
        };
        released.map_err(|loss| Error::lost(key, loss))
    }

    /// Whether a guard of the handle lives.
    pub(crate) fn has_guards(&self) -> bool {
        Arc::strong_count(&self.owner) > 1
    }

    /// Whether the handle was closed while a guard of it lived.
    pub(crate) fn closed(&self) -> Option<Loss> {
        self.owner.closed.load(Ordering::Relaxed).then_some(Loss::Released)
    }

    /// Waits until the handle is closed.
    pub(crate) async fn is_closed(&self) -> Loss {
        loop {
            let told = self.owner.told.notified();
            if let Some(loss) = self.closed() {
                return loss;
            }
            told.await;
        }
    }
}

enum Wish<'m> {
    Granted(Place),
    Waits(Waiting<'m>),
}

/// An acquire that waits for its turn.
///
/// # Drop
///
/// Leaves the queue; a lock that was granted meanwhile is released.
struct Waiting<'m> {
    managed: &'m Managed,
    key: KeyId,
    mode: Mode,
    id: i64,
    answer: oneshot::Receiver<Told>,
    /// The driver is on another runtime.
    elsewhere: bool,
    settled: bool,
    _queued: metrics::One,
}

impl Waiting<'_> {
    /// `None` if the time is over.
    async fn answer(&mut self, policy: WaitPolicy) -> Option<Result<Told, RecvError>> {
        let manager = &self.managed.manager;
        policy.bound(manager.unless_stalled(&mut self.answer, self.elsewhere)).await
    }

    /// Whether the server was not asked yet, because there was no connection.
    fn is_unasked(&self) -> bool {
        let manager = &self.managed.manager;
        let state = manager.state();
        state.driver.as_ref().is_some_and(|driver| driver.opening)
            && state.table.is_unasked(self.key)
    }

    fn told(mut self, told: Option<Told>) -> Option<Told> {
        self.settled = true;
        told
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if self.settled {
            return;
        }
        let Managed { manager, owner } = self.managed;
        manager.change(|state, now, effects| {
            // Answers are sent with the state locked, so it still waits or has its answer.
            if !state.table.cancel(self.key, self.id, now, effects)
                && let Ok(Told::Granted(place)) = self.answer.try_recv()
            {
                let guard = (owner.id, self.mode);
                let no_waiter = None::<fn() -> Tell>;
                state.table.leave(self.key, guard, &place, no_waiter, now, effects);
            }
        });
    }
}

/// A release that is in flight.
pub(crate) struct PendingRelease {
    manager: Arc<Manager>,
    session: Arc<Session>,
    key: Key,
    since: Instant,
    /// From the driver, which may be on another runtime. `None` if the process keeps the key, or the release is not
    /// awaited.
    answer: Result<Option<(oneshot::Receiver<Told>, bool)>, Loss>,
}

impl PendingRelease {
    /// Waits for the server's answer. Dropping this does not stop the release.
    ///
    /// If the process keeps the key, for another guard or another handle, asks whether the session still lives:
    /// one question for all that are released at once.
    pub(crate) async fn done(self) -> Result<()> {
        let Self { manager, session, key, since, answer } = self;
        let released = match answer {
            Err(loss) => Err(loss),
            Ok(None) => session.confirm(since).await,
            Ok(Some((answer, elsewhere))) => {
                match manager.unless_stalled(answer, elsewhere).await {
                    Ok(Told::Released(released)) => released,
                    Ok(Told::PassedOn) => session.confirm(since).await,
                    // The driver ended with its runtime, and the session with it.
                    Ok(Told::Granted(_) | Told::Refused | Told::Deadlock | Told::Failed(_))
                    | Err(_) => Err(session.loss().unwrap_or(Loss::RuntimeShutdown)),
                }
            }
        };
        released.map_err(|loss| Error::lost(&key, loss))
    }
}
