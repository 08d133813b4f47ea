//! The calls that handles and guards make to a manager: acquire and release.

use std::sync::Arc;
use std::time::Instant;

use tokio::runtime::Handle;
use tokio::sync::oneshot::{self, error::RecvError};

use super::table::{Left, OwnerId, Want};
use super::{Manager, Outcome, Reply};
use crate::error::{Error, Loss, Result};
use crate::guard::{Guard, Home};
use crate::holdings::Holdings;
use crate::key::{Key, KeyId};
use crate::metrics;
use crate::mode::Mode;
use crate::request::Request;
use crate::session::Session;
use crate::session::pending::Granted;
use crate::session::policy::WaitPolicy;
use crate::session::pool::timed_out;

impl Manager {
    /// Acquires a lock. Returns `None` if it was busy, or not granted within the time that the policy allows.
    pub(crate) async fn acquire(
        self: &Arc<Self>,
        handle: &Arc<Holdings>,
        request: &Request,
        policy: WaitPolicy,
    ) -> Result<Option<Guard>> {
        let key = request.key();
        loop {
            let Some(waiting) = self.want(handle, request, policy)? else { return Ok(None) };
            let session = match waiting {
                Wish::Granted(session) => session,
                Wish::Waits(mut waiting) => match waiting.answer(policy).await {
                    // The time was spent waiting for a connection, not for the lock.
                    None if waiting.is_unasked() => {
                        return Err(timed_out(&self.pool, key));
                    }
                    None => return Ok(None),
                    Some(answer) => {
                        waiting.settled = true;
                        match answer {
                            Ok(Outcome::Granted(session)) => session,
                            Ok(Outcome::Refused) => return Ok(None),
                            Ok(Outcome::Deadlock) => return Err(Error::deadlock(key)),
                            Ok(Outcome::Failed(error)) => return Err(error.for_key(key)),
                            // The driver ended with its runtime: retry.
                            Ok(Outcome::Released(_) | Outcome::HandedOff) | Err(_) => continue,
                        }
                    }
                },
            };
            if let Some(loss) = session.loss() {
                // The manager was not notified of the loss yet.
                self.lost_key(key.id(), &session, &loss);
                continue;
            }
            let granted = Granted { session, request: request.clone() };
            let home = Home::Manager(Arc::clone(self));
            return Ok(Some(Guard::at(home, granted, handle)));
        }
    }

    fn want<'m>(
        self: &'m Arc<Self>,
        handle: &'m Holdings,
        request: &Request,
        policy: WaitPolicy,
    ) -> Result<Option<Wish<'m>>> {
        let owner = handle.id();
        let (key, mode) = (request.key(), request.mode());
        let waits = policy.waits();
        let mut answer = None;
        let reply = || {
            let (reply, outcome) = oneshot::channel();
            answer = Some(outcome);
            let waiting = metrics::Waiting::new(request.labels(&self.options));
            (reply, waiting)
        };
        // Called first, because it panics without a runtime.
        let runtime = Handle::current();
        let mut state = self.state();
        if self.pool.is_closed() && !state.table.holds(key.id(), owner) {
            return Err(Error::PoolClosed { key: key.clone() });
        }
        let now = Instant::now();
        let wanted = (mode, waits);
        let want = state.table.want(key.id(), owner, wanted, reply, now);
        self.settle(&mut state);
        self.drive(&runtime, &mut state);
        let elsewhere = state.is_driven_elsewhere();
        drop(state);
        match (want, answer) {
            (Want::Granted(session), _) => Ok(Some(Wish::Granted(session))),
            (Want::Queued(id), Some(answer)) => Ok(Some(Wish::Waits(Waiting {
                manager: self,
                owner,
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

    /// Releases a guard. If the release is not awaited, its result is discarded.
    pub(crate) fn leave(
        self: &Arc<Self>,
        handle: &Holdings,
        key: &Key,
        mode: Mode,
        session: &Arc<Session>,
        awaited: bool,
    ) -> PendingRelease {
        let mut answer = None;
        let on_release = awaited.then_some(|| {
            let (reply, outcome) = oneshot::channel();
            answer = Some(outcome);
            reply
        });
        let (left, elsewhere) = self.change(|state, now| {
            let guard = (handle.id(), mode);
            let left = state.table.leave(key.id(), guard, session, on_release, now);
            (left, awaited && state.is_driven_elsewhere())
        });
        let answer = match left {
            Left::Stale => Err(handle.closed().or_else(|| session.loss()).unwrap_or(Loss::NotHeld)),
            Left::Unlocking | Left::Done => Ok(answer.map(|answer| (answer, elsewhere))),
        };
        PendingRelease {
            manager: Arc::clone(self),
            session: Arc::clone(session),
            key: key.clone(),
            since: Instant::now(),
            answer,
        }
    }

    /// Releases everything that a handle holds, even if guards are alive; they are notified.
    pub(crate) async fn release_all(self: &Arc<Self>, handle: &Holdings, key: &Key) -> Result<()> {
        let (reply, outcome) = oneshot::channel();
        let (left, elsewhere) = handle.close(|| {
            self.change(|state, now| {
                let left = state.table.close(key.id(), handle.id(), || reply, now);
                (left, state.is_driven_elsewhere())
            })
        });
        if left != Left::Unlocking {
            return Ok(());
        }
        let released = match self.unless_stalled(outcome, elsewhere).await {
            Ok(Outcome::Released(Err(loss))) => Err(loss),
            Ok(_) => Ok(()),
            Err(_) => Err(Loss::RuntimeShutdown),
        };
        released.map_err(|loss| Error::lost(key, loss))
    }
}

enum Wish<'m> {
    Granted(Arc<Session>),
    Waits(Waiting<'m>),
}

/// An acquire that waits for its turn.
///
/// # Drop
///
/// Removes the waiter from the queue, and releases the lock if it was granted meanwhile.
struct Waiting<'m> {
    manager: &'m Arc<Manager>,
    owner: OwnerId,
    key: KeyId,
    mode: Mode,
    id: i64,
    answer: oneshot::Receiver<Outcome>,
    /// Whether the driver runs on another runtime.
    elsewhere: bool,
    settled: bool,
    _queued: metrics::One,
}

impl Waiting<'_> {
    /// Waits for the answer. Returns `None` if the policy's time is over.
    async fn answer(&mut self, policy: WaitPolicy) -> Option<Result<Outcome, RecvError>> {
        policy.bound(self.manager.unless_stalled(&mut self.answer, self.elsewhere)).await
    }

    /// Whether the server was not asked yet, because there was no connection.
    fn is_unasked(&self) -> bool {
        let state = self.manager.state();
        state.driver.as_ref().is_some_and(|driver| driver.opening)
            && state.table.is_unasked(self.key)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if self.settled {
            return;
        }
        self.manager.change(|state, now| {
            // Answers are sent with the state locked, so the waiter is either still queued or has its answer.
            if !state.table.cancel(self.key, self.id, now)
                && let Ok(Outcome::Granted(session)) = self.answer.try_recv()
            {
                let guard = (self.owner, self.mode);
                let no_waiter = None::<fn() -> Reply>;
                state.table.leave(self.key, guard, &session, no_waiter, now);
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
    /// The driver's answer, and whether the driver runs on another runtime. `None` if the process keeps the key, or the
    /// release is not awaited.
    answer: Result<Option<(oneshot::Receiver<Outcome>, bool)>, Loss>,
}

impl PendingRelease {
    /// Waits for the server's answer. Dropping this does not stop the release.
    ///
    /// If the process keeps the key for another guard or another handle, asks the server whether the session is still
    /// alive. One statement serves all guards that are released at once.
    pub(crate) async fn done(self) -> Result<()> {
        let Self { manager, session, key, since, answer } = self;
        let released = match answer {
            Err(loss) => Err(loss),
            Ok(None) => session.confirm(since).await,
            Ok(Some((answer, elsewhere))) => {
                match manager.unless_stalled(answer, elsewhere).await {
                    Ok(Outcome::Released(released)) => released,
                    Ok(Outcome::HandedOff) => session.confirm(since).await,
                    // The driver ended with its runtime, and the session with it.
                    Ok(
                        Outcome::Granted(_)
                        | Outcome::Refused
                        | Outcome::Deadlock
                        | Outcome::Failed(_),
                    )
                    | Err(_) => Err(session.loss().unwrap_or(Loss::RuntimeShutdown)),
                }
            }
        };
        released.map_err(|loss| Error::lost(&key, loss))
    }
}
