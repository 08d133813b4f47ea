//! An owner whose locks a manager takes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use tokio::runtime::Handle;
use tokio::sync::{Notify, oneshot};

use super::table::{Left, OwnerId, Want};
use super::{Manager, Place, Told, shared};
use crate::error::{Error, Loss, Result};
use crate::held::Held;
use crate::key::{Key, KeyId};
use crate::mode::Mode;
use crate::request::Request;
use crate::session::Session;
use crate::session::pending::WaitPolicy;

/// An owner whose locks a manager takes, and each of his guards.
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

    /// Acquires. `None` if the policy ran out.
    pub(crate) async fn acquire(
        &self,
        request: &Request,
        policy: WaitPolicy,
    ) -> Result<Option<Held>> {
        let (key, mode) = (request.key(), request.mode());
        loop {
            let Some(waiting) = self.want(key, mode, policy)? else { return Ok(None) };
            let place = match waiting {
                Wish::Granted(place) => place,
                Wish::Waits(mut waiting) => match policy.bound(&mut waiting.answer).await {
                    // It was not the lock that was busy.
                    None if waiting.is_unasked() => {
                        let source = sqlx::Error::PoolTimedOut;
                        return Err(Error::Pool { key: key.clone(), source, locks: None });
                    }
                    None => return Ok(None),
                    Some(answer) => match waiting.told(answer.ok()) {
                        Some(Told::Granted(place)) => place,
                        Some(Told::Refused) => return Ok(None),
                        Some(Told::Deadlock) => return Err(Error::deadlock(key)),
                        Some(Told::Failed(error)) => return Err(error.again(key)),
                        // Whoever asked for us has gone down with its runtime: ask again.
                        Some(Told::Released(_)) | None => continue,
                    },
                },
            };
            if let Some(loss) = place.session.loss() {
                // Whoever watches it was not in time to say so.
                self.manager.lost_key(key.id(), &place, &loss);
                continue;
            }
            return Ok(Some(Held::managed(place.session, request.clone(), self.clone())));
        }
    }

    fn want(&self, key: &Key, mode: Mode, policy: WaitPolicy) -> Result<Option<Wish<'_>>> {
        let patient = matches!(policy, WaitPolicy::Forever | WaitPolicy::Until(_));
        let mut answer = None;
        let tell = || {
            let (tell, told) = oneshot::channel();
            answer = Some(told);
            tell
        };
        let manager = &self.manager;
        // First, for without a runtime this panics.
        let runtime = Handle::current();
        let mut state = manager.state();
        if manager.pool.is_closed() && !state.table.holds(key.id(), self.owner.id) {
            return Err(Error::Pool {
                key: key.clone(),
                source: sqlx::Error::PoolClosed,
                locks: None,
            });
        }
        let now = Instant::now();
        let wants = (mode, patient);
        let mut effects = state.effects();
        let want = state.table.want(key.id(), self.owner.id, wants, tell, now, &mut effects);
        manager.settle(&mut state, effects);
        shared::drive(manager, &runtime, &mut state);
        drop(state);
        match (want, answer) {
            (Want::Granted(place), _) => Ok(Some(Wish::Granted(place))),
            (Want::Queued(id), Some(answer)) => Ok(Some(Wish::Waits(Waiting {
                managed: self,
                key: key.id(),
                mode,
                id,
                answer,
                settled: false,
            }))),
            (Want::Deadlock, _) => Err(Error::deadlock(key)),
            (Want::Busy | Want::Queued(_), _) => Ok(None),
        }
    }

    /// A guard goes.
    pub(crate) fn leave(&self, key: &Key, mode: Mode, session: &Arc<Session>) -> Option<Farewell> {
        let mut answer = None;
        let farewell = || {
            let (tell, told) = oneshot::channel();
            answer = Some(told);
            tell
        };
        // Of whichever kind: places are told apart by their sessions.
        let place = Place { session: Arc::clone(session), shared: true };
        let mut state = self.manager.state();
        let mut effects = state.effects();
        let left = state.table.leave(
            key.id(),
            (self.owner.id, mode),
            &place,
            Some(farewell),
            Instant::now(),
            &mut effects,
        );
        self.manager.settle(&mut state, effects);
        drop(state);
        match left {
            Left::Stale => Some(Farewell::stale(key, self.closed().or_else(|| session.loss()))),
            Left::Told | Left::Done => answer.map(|answer| Farewell::new(key, answer)),
        }
    }

    /// Lets go of everything, however many guards are alive; they are told. From now on this is
    /// another owner.
    pub(crate) async fn close(&mut self, key: &Key) -> Result<()> {
        let another = self.another();
        let closed = std::mem::replace(self, another);
        let mut answer = None;
        let farewell = || {
            let (tell, told) = oneshot::channel();
            answer = Some(told);
            tell
        };
        {
            let mut state = closed.manager.state();
            let mut effects = state.effects();
            let (id, now) = (closed.owner.id, Instant::now());
            state.table.close(key.id(), id, farewell, now, &mut effects);
            closed.owner.closed.store(true, Ordering::Relaxed);
            closed.manager.settle(&mut state, effects);
        }
        closed.owner.told.notify_waiters();
        match answer {
            Some(answer) => Farewell::new(key, answer).answered().await,
            None => Ok(()),
        }
    }

    /// Whether the handle was closed while a guard of it lived.
    pub(crate) fn closed(&self) -> Option<Loss> {
        self.owner.closed.load(Ordering::Relaxed).then_some(Loss::Closed)
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
/// Leaves the queue; what was granted all the same is given up.
struct Waiting<'m> {
    managed: &'m Managed,
    key: KeyId,
    mode: Mode,
    id: u64,
    answer: oneshot::Receiver<Told>,
    settled: bool,
}

impl Waiting<'_> {
    /// Whether the server was not asked yet, for want of a connection.
    fn is_unasked(&self) -> bool {
        let manager = &self.managed.manager;
        let state = manager.state();
        state.opening && state.table.is_unasked(self.key) && shared::is_exhausted(&manager.pool)
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
        let now = Instant::now();
        let mut state = manager.state();
        let mut effects = state.effects();
        // Whoever tells holds the state, so there is no third way.
        if !state.table.cancel(self.key, self.id, now, &mut effects)
            && let Ok(Told::Granted(place)) = self.answer.try_recv()
        {
            let guard = (owner.id, self.mode);
            let nobody = None::<fn() -> super::Tell>;
            state.table.leave(self.key, guard, &place, nobody, now, &mut effects);
        }
        manager.settle(&mut state, effects);
        manager.rest_if_empty(&state);
    }
}

/// The answer to a release that is under way.
pub(crate) struct Farewell {
    key: Key,
    answer: std::result::Result<oneshot::Receiver<Told>, Loss>,
}

impl Farewell {
    fn new(key: &Key, answer: oneshot::Receiver<Told>) -> Self {
        Self { key: key.clone(), answer: Ok(answer) }
    }

    fn stale(key: &Key, loss: Option<Loss>) -> Self {
        Self { key: key.clone(), answer: Err(loss.unwrap_or(Loss::NotHeld)) }
    }

    /// Waits for the server's answer. Dropping this does not stop the release.
    pub(crate) async fn answered(self) -> Result<()> {
        let error = |loss| Error::lost(&self.key, loss);
        match self.answer {
            Ok(answer) => match answer.await {
                Ok(Told::Released(released)) => released.map_err(error),
                // Whoever told the server has gone down with its runtime, and the session with it.
                Ok(Told::Granted(_) | Told::Refused | Told::Deadlock | Told::Failed(_))
                | Err(_) => Err(error(Loss::Abandoned)),
            },
            Err(loss) => Err(error(loss)),
        }
    }
}

impl std::fmt::Debug for Farewell {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Farewell").field("key", &self.key).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Managed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Managed").field("owner", &self.owner.id).finish_non_exhaustive()
    }
}
