//! The calls of this process that wait for a key on one pool: one waits in the server's queue, and the others wait in
//! line behind it, here.
//!
//! A call in the server's queue uses a connection. If all calls waited there, those for one busy key would use all the
//! connections that locks may have. So only the first call, at the [`Front`], waits on the server. When its wait is
//! over, however it ends, the next call takes its place. If the first call was granted the lock, the next one first
//! waits here for a moment, because the holder may pass the lock itself on to it: see
//! [`Session::next_in_line`](super::Session::next_in_line).
//!
//! Only a call whose handle holds nothing waits here, because the server, which detects deadlocks, can't see these
//! waits. The line decides only which call asks the server, and when. Only the server excludes.
//!
//! The work for one call takes O(log n) if n calls wait. No call is notified while the mutex is held.

use std::collections::{BTreeMap, HashMap};
use std::mem;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use sqlx::PgPool;
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::time::{timeout, timeout_at};

use super::budget::A_YEAR;
use super::hand_off::Handed;
use super::policy::WaitPolicy;
use super::servers::Server;
use crate::error::{Error, Result};
use crate::key::{Key, KeyId};
use crate::mode::Mode;
use crate::options::LockOptions;
use crate::request::Request;

/// The lines of a pool.
#[derive(Default)]
pub(crate) struct LocalQueues {
    // Invariant: a line exists exactly while a call is at its front, or was sent there.
    lines: Mutex<HashMap<LineId, Line>>,
    /// The number of lines, readable without the mutex. Usually zero.
    count: AtomicUsize,
    next_number: AtomicU64,
}

/// Identifies a line: a key on a server, because a pool may be pointed to another server.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub(crate) struct LineId {
    server: usize,
    key: KeyId,
}

/// The calls behind the front, in order of arrival.
type Line = BTreeMap<u64, Waiter>;

/// A call that waits.
pub(crate) struct Waiter {
    pub(super) request: Request,
    pub(super) options: LockOptions,
    pub(super) runtime: Handle,
    /// Whether the call waits for the lock to be handed off, while no call of this process waits on the server.
    is_first: bool,
    sender: oneshot::Sender<Next>,
}

/// The message to a call in line.
pub(crate) enum Next {
    /// The call waits on the server, without a place in line.
    Alone,
    /// The call waits on the server; beside others, if all of them request the shared lock.
    Front(Arc<Front>),
    /// The call waits here until this time, because the holder may hand off the lock, and after that on the server.
    First(Front, Instant, oneshot::Receiver<Self>),
    /// The lock was handed off to the call.
    Granted(Handed),
    /// The lock is being released, so it is not handed off.
    Released,
    /// The pool had no connection for the call at the front, and would have none for this one.
    Failed(Error),
}

/// The right to wait for a key in the server's queue.
///
/// # Drop
///
/// Passes the right on to the next call in line.
pub(crate) struct Front {
    id: LineId,
    // `None` once the right was passed on.
    queues: Option<Arc<LocalQueues>>,
}

/// A place in line.
///
/// # Drop
///
/// Leaves the line. The drop of a message that was not received passes on what it contains.
pub(crate) struct Place {
    id: LineId,
    number: u64,
    queues: Arc<LocalQueues>,
    receiver: oneshot::Receiver<Next>,
}

impl LocalQueues {
    /// Joins the line. Returns `None` if there is none.
    pub(crate) fn join(
        self: &Arc<Self>,
        id: LineId,
        request: &Request,
        options: &LockOptions,
    ) -> Option<Place> {
        if self.is_empty() {
            return None;
        }
        self.lines().get_mut(&id).map(|line| self.stand(line, id, request, options))
    }

    /// Joins the line, or becomes its front if there is none.
    pub(crate) fn enter(
        self: &Arc<Self>,
        id: LineId,
        request: &Request,
        options: &LockOptions,
    ) -> Result<Arc<Front>, Place> {
        let mut lines = self.lines();
        if let Some(line) = lines.get_mut(&id) {
            return Err(self.stand(line, id, request, options));
        }
        lines.insert(id, Line::default());
        self.count.store(lines.len(), Ordering::Relaxed);
        Ok(Arc::new(Front { id, queues: Some(Arc::clone(self)) }))
    }

    fn stand(
        self: &Arc<Self>,
        line: &mut Line,
        id: LineId,
        request: &Request,
        options: &LockOptions,
    ) -> Place {
        let (sender, receiver) = oneshot::channel();
        let (request, options, runtime) = (request.clone(), options.clone(), Handle::current());
        let number = self.next_number.fetch_add(1, Ordering::Relaxed);
        line.insert(number, Waiter { request, options, runtime, is_first: false, sender });
        Place { id, number, queues: Arc::clone(self), receiver }
    }

    /// Whether calls of this process wait for the key.
    pub(crate) fn has(&self, id: LineId) -> bool {
        !self.is_empty() && self.lines().contains_key(&id)
    }

    /// Whether the first call in a line waits for the lock to be handed off.
    pub(super) fn has_first(&self, id: LineId) -> bool {
        let has_first = |line: &Line| line.values().next().is_some_and(|first| first.is_first);
        !self.is_empty() && self.lines().get(&id).is_some_and(has_first)
    }

    /// Takes the first call out of a line, if it waits for the lock to be handed off.
    pub(super) fn take_first(&self, id: LineId) -> Option<Waiter> {
        let mut lines = self.lines();
        let first = lines.get_mut(&id)?.first_entry()?;
        first.get().is_first.then(|| first.remove())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.count.load(Ordering::Relaxed) == 0
    }

    fn lines(&self) -> MutexGuard<'_, HashMap<LineId, Line>> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl LineId {
    pub(crate) fn new(server: &Arc<Server>, key: KeyId) -> Self {
        // A process never drops a `Server`, so no other one gets its address.
        Self { server: Arc::as_ptr(server).addr(), key }
    }
}

impl Waiter {
    /// Sends the message. If the call was dropped meanwhile, `next` is dropped too.
    pub(super) fn tell(self, next: Next) {
        self.sender.send(next).ok();
    }
}

impl Front {
    /// Fails all calls in line, because the pool has no connection.
    pub(crate) fn fail(&self, error: &Error) {
        let Some(queues) = &self.queues else { return };
        let failed = queues.lines().get_mut(&self.id).map(mem::take);
        for waiter in failed.unwrap_or_default().into_values() {
            waiter.tell(Next::Failed(error.clone()));
        }
    }

    /// Passes the right on after the lock was granted in this mode. An exclusive lock may itself be handed off, until
    /// `until`.
    pub(crate) fn granted(mut self, mode: Mode, until: Instant) {
        let Some(queues) = &self.queues else { return };
        let mut lines = queues.lines();
        let Some(line) = lines.get_mut(&self.id) else { return };
        let mut sharing = Vec::new();
        let mut first = None;
        match mode {
            Mode::Exclusive => {
                let next = line.first_entry();
                let wants_it = next.filter(|next| next.get().request.mode() == mode);
                if let Some(mut next) = wants_it.filter(|_| Instant::now() < until) {
                    let (sender, receiver) = oneshot::channel();
                    next.get_mut().is_first = true;
                    first = Some((mem::replace(&mut next.get_mut().sender, sender), receiver));
                }
            }
            Mode::Shared => {
                while let Some(next) = line.first_entry()
                    && next.get().request.mode() == mode
                {
                    sharing.push(next.remove());
                }
            }
        }
        drop(lines);
        let front = Self { id: self.id, queues: self.queues.take() };
        if let Some((sender, receiver)) = first {
            // If the call was dropped meanwhile, this drops the front, which passes the right on.
            sender.send(Next::First(front, until, receiver)).ok();
        } else {
            // The right is passed on when all of these calls have an answer.
            let front = Arc::new(front);
            for waiter in sharing {
                waiter.tell(Next::Front(Arc::clone(&front)));
            }
        }
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        while let Some(queues) = self.queues.take() {
            let waiter = {
                let mut lines = queues.lines();
                let Some(line) = lines.get_mut(&self.id) else { return };
                let Some((_, waiter)) = line.pop_first() else {
                    lines.remove(&self.id);
                    queues.count.store(lines.len(), Ordering::Relaxed);
                    return;
                };
                waiter
            };
            let front = Self { id: self.id, queues: Some(queues) };
            // If that call was dropped, the loop continues with the next one, because dropping this front instead would
            // nest.
            if let Err(Next::Front(front)) = waiter.sender.send(Next::Front(Arc::new(front)))
                && let Some(mut front) = Arc::into_inner(front)
            {
                self.queues = front.queues.take();
            }
        }
    }
}

impl Place {
    /// Waits for the message that says how the call continues. Returns `None` if no message came, because the holder
    /// that would have handed off the lock no longer exists.
    ///
    /// A call that has a deadline waits here for a quarter of its time, and then on the server. If it reached the front
    /// at the last moment, it would leave the server's queue soon after, and the next call would begin at the end of
    /// that queue. Where others held the lock for longer than the calls' deadlines, a quarter served 16 calls in a time
    /// in which half served 8, and all of it 3; 24 were served if all calls waited on the server.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: if the future is dropped, the call leaves the line.
    pub(crate) async fn next(
        mut self,
        key: &Key,
        pool: &PgPool,
        policy: WaitPolicy,
    ) -> Result<Option<Next>> {
        let share = policy.left().map_or(A_YEAR, |left| left / 4);
        tokio::select! {
            biased;
            next = timeout(share, self.message()) => {
                match next.unwrap_or(Some(Next::Alone)) {
                    Some(Next::Failed(error)) => Err(error),
                    next => Ok(next),
                }
            }
            () = pool.close_event() => Err(Error::PoolClosed { key: key.clone() }),
        }
    }

    async fn message(&mut self) -> Option<Next> {
        let (front, until) = match (&mut self.receiver).await {
            Ok(Next::First(front, until, receiver)) => {
                self.receiver = receiver;
                (front, until)
            }
            next => return next.ok(),
        };
        let next = match timeout_at(until.into(), &mut self.receiver).await {
            Ok(next) => next.ok(),
            Err(_) if self.leave() => Some(Next::Released),
            // The message was sent at the last moment.
            Err(_) => (&mut self.receiver).await.ok(),
        };
        match next {
            Some(Next::Granted(_)) => front.granted(Mode::Exclusive, until),
            Some(Next::Released) | None => return Some(Next::Front(Arc::new(front))),
            Some(Next::Alone | Next::Failed(_) | Next::First(..) | Next::Front(_)) => {}
        }
        next
    }

    /// Leaves the line. Returns false if the call was already taken out of it.
    fn leave(&self) -> bool {
        let mut lines = self.queues.lines();
        let waiter = lines.get_mut(&self.id).and_then(|line| line.remove(&self.number));
        drop(lines);
        waiter.is_some()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // If the call was already taken out of the line, the drop of the receiver passes on what the message contains.
        self.leave();
    }
}
