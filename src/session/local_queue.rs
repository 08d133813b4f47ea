//! The calls of this process that wait for a key on one pool: one waits in the server's queue, the others in line
//! behind it, here.
//!
//! A call in the server's queue has a connection. If each of them stood there, those of one busy key would have all
//! the connections that locks may use. So the first call is at the [`Front`]: it waits on the server, and the next
//! one takes its place when its wait is over, however that ends. If it was granted the lock, the next one first
//! waits here a moment for the lock itself, which its holder may pass on:
//! see [`Session::hand_on`](super::Session::hand_on).
//!
//! Only a call whose handle holds nothing waits here: the server, which looks for deadlocks, can't see it. What
//! is in line here decides only who asks the server when. It excludes nobody.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sqlx::PgPool;
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::time::{timeout, timeout_at};

use super::hand_on::Handed;
use super::policy::WaitPolicy;
use crate::error::{Error, Result};
use crate::key::KeyId;
use crate::mode::Mode;
use crate::options::LockOptions;
use crate::request::Request;

/// The lines of a pool, by key.
#[derive(Debug, Default)]
pub(crate) struct LocalQueues {
    // Invariant: a key has a line exactly as long as a call is at its front, or was sent there.
    lines: Mutex<HashMap<KeyId, Line>>,
    /// How many there are, readable without the mutex. Usually none.
    count: AtomicUsize,
    next_number: AtomicU64,
}

/// The calls behind the front, in the order in which they came.
#[derive(Debug, Default)]
struct Line {
    waiters: BTreeMap<u64, Waiter>,
}

/// A call that waits.
#[derive(Debug)]
pub(crate) struct Waiter {
    pub(super) request: Request,
    pub(super) options: LockOptions,
    pub(super) runtime: Handle,
    /// It is at the front, and no call of this process waits on the server.
    pub(super) is_first: bool,
    sender: oneshot::Sender<Next>,
}

/// What a call in line is told.
#[derive(Debug)]
pub(crate) enum Next {
    /// To wait here until then, where a holder of this process may pass on the lock, and after that on the server.
    First(Front, Instant, oneshot::Receiver<Next>),
    /// To wait on the server; beside others, if all of them want the shared lock.
    Front(Arc<Front>),
    /// The lock is its own.
    Granted(Handed),
    /// The pool had no connection for the call at the front, and would have none for this one.
    Failed(Error),
}

/// The right to wait for a key in the server's queue.
///
/// # Drop
///
/// Passes it to the next in line.
#[derive(Debug)]
pub(crate) struct Front {
    key: KeyId,
    // `None` once it is passed on.
    queues: Option<Arc<LocalQueues>>,
}

/// A place in line.
///
/// # Drop
///
/// Leaves the line. What the call was told, and has not heard, goes to the next one.
#[derive(Debug)]
pub(crate) struct Place {
    request: Request,
    number: u64,
    queues: Arc<LocalQueues>,
    receiver: oneshot::Receiver<Next>,
}

impl LocalQueues {
    /// Gets in line. `None` if there is none. O(log n), as all else here, for n calls that wait.
    pub(crate) fn join(
        self: &Arc<Self>,
        request: &Request,
        options: &LockOptions,
    ) -> Option<Place> {
        if self.count.load(Ordering::Relaxed) == 0 {
            return None;
        }
        let mut lines = self.lines();
        lines.get_mut(&request.key().id()).map(|line| self.stand(line, request, options))
    }

    /// Gets in line, or to the front if there is none.
    pub(crate) fn enter(
        self: &Arc<Self>,
        request: &Request,
        options: &LockOptions,
    ) -> Result<Arc<Front>, Place> {
        let key = request.key().id();
        let mut lines = self.lines();
        if let Some(line) = lines.get_mut(&key) {
            return Err(self.stand(line, request, options));
        }
        lines.insert(key, Line::default());
        self.count.store(lines.len(), Ordering::Relaxed);
        Ok(Arc::new(Front { key, queues: Some(Arc::clone(self)) }))
    }

    fn stand(self: &Arc<Self>, line: &mut Line, request: &Request, options: &LockOptions) -> Place {
        let (sender, receiver) = oneshot::channel();
        let (request, options, runtime) = (request.clone(), options.clone(), Handle::current());
        let number = self.next_number.fetch_add(1, Ordering::Relaxed);
        let waiter = Waiter { request: request.clone(), options, runtime, is_first: false, sender };
        line.waiters.insert(number, waiter);
        Place { request, number, queues: Arc::clone(self), receiver }
    }

    /// Takes the first out of a line, if it fits.
    pub(super) fn take_first(
        &self,
        key: KeyId,
        fits: impl FnOnce(&Waiter) -> bool,
    ) -> Option<Waiter> {
        if self.count.load(Ordering::Relaxed) == 0 {
            return None;
        }
        let mut lines = self.lines();
        let first = lines.get_mut(&key)?.waiters.first_entry()?;
        fits(first.get()).then(|| first.remove())
    }

    fn lines(&self) -> MutexGuard<'_, HashMap<KeyId, Line>> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiter {
    /// Tells the call. If it has gone meanwhile, `next` is dropped.
    pub(super) fn tell(self, next: Next) {
        self.sender.send(next).ok();
    }
}

impl Front {
    /// Tells all that are in line that the pool has no connection.
    pub(crate) fn fail(&self, error: &Error) {
        let Some(queues) = &self.queues else { return };
        let failed =
            queues.lines().get_mut(&self.key).map(|line| std::mem::take(&mut line.waiters));
        for waiter in failed.unwrap_or_default().into_values() {
            waiter.tell(Next::Failed(error.clone()));
        }
    }

    /// Passes it on after the lock was granted in this mode: an exclusive one may be passed on too, until then.
    pub(crate) fn granted(mut self, mode: Mode, until: Instant) {
        let Some(queues) = &self.queues else { return };
        let mut lines = queues.lines();
        let Some(line) = lines.get_mut(&self.key) else { return };
        let mut sharing = Vec::new();
        while mode == Mode::Shared
            && let Some(first) = line.waiters.first_entry()
            && first.get().request.mode() == Mode::Shared
        {
            sharing.push(first.remove());
        }
        let first = line.waiters.first_entry();
        let first =
            first.filter(|first| mode == first.get().request.mode() && Instant::now() < until);
        let first = first.map(|mut first| {
            let (sender, receiver) = oneshot::channel();
            first.get_mut().is_first = true;
            (std::mem::replace(&mut first.get_mut().sender, sender), receiver)
        });
        drop(lines);
        let front = Self { key: self.key, queues: self.queues.take() };
        if let Some((sender, receiver)) = first {
            // If the call has gone meanwhile, this drops it.
            sender.send(Next::First(front, until, receiver)).ok();
        } else {
            // It is passed on when all of them have an answer.
            let front = Arc::new(front);
            for waiter in sharing {
                waiter.tell(Next::Front(Arc::clone(&front)));
            }
        }
    }

    /// Passes it to the first in line. Returns it if that call has gone meanwhile.
    fn pass_on(mut self) -> Option<Self> {
        let queues = self.queues.take()?;
        let waiter = {
            let mut lines = queues.lines();
            let waiter = lines.get_mut(&self.key)?.waiters.pop_first();
            if waiter.is_none() {
                lines.remove(&self.key);
                queues.count.store(lines.len(), Ordering::Relaxed);
            }
            waiter?.1
        };
        let front = Self { key: self.key, queues: Some(queues) };
        match waiter.sender.send(Next::Front(Arc::new(front))) {
            Err(Next::Front(front)) => Arc::into_inner(front),
            Ok(()) | Err(_) => None,
        }
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        // Not by its own drop, which would nest for each call that has gone.
        let mut front =
            self.queues.take().map(|queues| Self { key: self.key, queues: Some(queues) });
        while let Some(passed) = front.take() {
            front = passed.pass_on();
        }
    }
}

impl Place {
    /// Waits until the call is told what is next. `None` if the time is over.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: it leaves the line.
    pub(crate) async fn next(
        mut self,
        pool: &PgPool,
        options: &LockOptions,
        policy: WaitPolicy,
    ) -> Result<Option<Next>> {
        let key = self.request.key().clone();
        let waiting = policy.bound(self.told(options.slice()));
        tokio::select! {
            biased;
            next = waiting => match next.flatten() {
                Some(Next::Failed(error)) => Err(error),
                next => Ok(next),
            },
            () = pool.close_event() => Err(Error::PoolClosed { key }),
        }
    }

    async fn told(&mut self, slice: Duration) -> Option<Next> {
        let started = Instant::now();
        let (front, until) = loop {
            match timeout(slice, &mut self.receiver).await {
                Ok(Ok(Next::First(front, until, receiver))) => {
                    self.receiver = receiver;
                    break (front, until);
                }
                // It is told something in any case.
                Ok(next) => return next.ok(),
                Err(_) => tracing::debug!(
                    lock.key = %self.request.key().id(),
                    waited_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
                    "still waiting for a busy lock, behind another task"
                ),
            }
        };
        let next = match timeout_at(until.into(), &mut self.receiver).await {
            Ok(next) => next.ok()?,
            Err(_) if self.leave() => return Some(Next::Front(Arc::new(front))),
            // It was told something at the last moment.
            Err(_) => (&mut self.receiver).await.ok()?,
        };
        if let Next::Granted(_) = next {
            front.granted(Mode::Exclusive, until);
        }
        Some(next)
    }

    /// Leaves the line. Returns false if it was taken out of it, and is told something.
    fn leave(&self) -> bool {
        let mut lines = self.queues.lines();
        let line = lines.get_mut(&self.request.key().id());
        let waiter = line.and_then(|line| line.waiters.remove(&self.number));
        drop(lines);
        waiter.is_some()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // If it was taken out, the drop of the receiver passes on what is in there.
        self.leave();
    }
}
