//! A counting semaphore, shared by all processes.

pub(crate) mod layout;
mod permit;

use std::fmt;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{MutexGuard, watch};
use tokio::time::sleep;

use crate::error::{Error, Result, chain};
use crate::guard::Guard;
use crate::key::Key;
use crate::metrics::{self, Labels, Waiting};
use crate::mode::Mode;
use crate::owner::{Owner, time_until};
use crate::progress::reported;
use crate::request::Request;
use crate::session::budget::Budget;
use crate::session::policy::{GRACE, WaitPolicy};
use crate::source::Source;
use layout::{Layout, MAX_PERMITS};
pub use permit::Permit;

/// A counting semaphore: a fixed number of permits, shared by all processes.
///
/// Each permit is an advisory lock of its own, so the server releases a permit when its holder dies, as for any
/// lock. Each permit has an index, its [`slot`](Permit::slot), so a semaphore is also a pool of numbered
/// resources: ports, licences, workers.
///
/// Waiters are served in FIFO order: the tasks of a process wait in line, and the first of them waits in the server's
/// queue, [as for a lock](crate::guide::guarantees#fairness). The first waiter in the server's queue tries the permits
/// every 20 ms; of more than 128 permits, it tries 128 at a time, in turn. `try_acquire` does not overtake waiters,
/// except in the moment between two waiters of the same process.
///
/// A clone is the same semaphore. A permit uses one connection of the pool, and all waiters of a process use one
/// together. A pool that has fewer connections than the semaphore has permits is not an error, because other processes
/// may hold the other permits; an [`Error::PoolTimedOut`] mentions it.
///
/// # Changing the size
///
/// A semaphore has at most 1024 permits, and all processes should give the same number. To change it, deploy the new
/// number: while old and new processes run, the larger one applies, and after that the new one. Permits are numbered
/// from 0, and a semaphore uses those below its size, so there are never more permits in use than the largest size.
/// Meanwhile, a process that is first in the queue waits only for the permits of
/// its own size. A process that finds a permit beyond its own size in use logs a warning, once for each `Semaphore`; it
/// checks this when it acquires, at most every ten seconds.
///
/// # Examples
///
/// ```
/// use pglock::Semaphore;
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
/// # let pool = pglock_testkit::pool().await;
/// let printers = Semaphore::new(&pool, "printers", 3)?;
/// let permit = printers.acquire().await?;
/// println!("printing on printer {} of 3", permit.slot());
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Semaphore {
    inner: Arc<Inner>,
}

struct Inner {
    key: Key,
    permits: usize,
    layout: Layout,
    /// All permits. `windows` has the same permits in parts, of which a waiter tries one at a time.
    slots: Request,
    windows: Vec<Request>,
    owner: Owner,
    /// The waiters of this process. The first of them waits on the server.
    waiting: tokio::sync::Mutex<()>,
    /// Ends the waits of all waiters of this process with this error, because the pool has no connection.
    exhausted: watch::Sender<Option<Error>>,
    /// When to check next whether a larger semaphore has this key. `None` once one was reported, if there can be none,
    /// or if the role may not list locks.
    census_due: Mutex<Option<Instant>>,
}

/// How often the first waiter tries to acquire a permit.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// The number of permits that the first waiter tries at a time. Each is a lock that the server tries, and 1,024 of them
/// take 2 ms.
const WINDOW: usize = 128;

/// How often a semaphore checks whether a larger one has the same key. The statement reads the server's lock table.
const CENSUS_INTERVAL: Duration = Duration::from_secs(10);

impl Semaphore {
    /// Makes a semaphore, with the options of its [`Source`]. Sends nothing to the server.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`] if `permits` is not from 1 to 1024.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::Semaphore;
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() {
    /// # let pool = pglock_testkit::pool().await;
    /// assert!(Semaphore::new(&pool, "printers", 3).is_ok());
    /// assert!(Semaphore::new(&pool, "printers", 0).is_err());
    /// # }
    /// ```
    pub fn new(source: &impl Source, key: impl Into<Key>, permits: usize) -> Result<Self> {
        let (key, owner) = (key.into(), source.owner().apart());
        if !(1..=MAX_PERMITS).contains(&permits) {
            let reason = format!(
                "semaphore {key} has {permits} permits; the number must be from 1 to {MAX_PERMITS}"
            );
            return Err(Error::InvalidArgument { reason });
        }
        let layout = Layout::of(&key);
        let slots: Vec<_> = (0..permits).map(|slot| layout.permit(slot)).collect();
        let inner = Inner {
            windows: slots.chunks(WINDOW).map(|window| Request::any(window.to_vec())).collect(),
            slots: Request::any(slots),
            layout,
            permits,
            key,
            owner,
            waiting: tokio::sync::Mutex::default(),
            exhausted: watch::Sender::new(None),
            census_due: Mutex::new((permits < MAX_PERMITS).then(Instant::now)),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Returns the key.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::{Key, Semaphore};
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// assert_eq!(Semaphore::new(&pool, 42, 3)?.key(), &Key::from(42));
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn key(&self) -> &Key {
        &self.inner.key
    }

    /// Returns the number of permits, held or not.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::Semaphore;
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// assert_eq!(Semaphore::new(&pool, "printers", 3)?.permits(), 3);
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn permits(&self) -> usize {
        self.inner.permits
    }

    /// Acquires a permit, waiting until one is available.
    ///
    /// Sends three statements if one is free; every ten seconds one more, which checks for a larger semaphore of the
    /// key.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: the caller loses its place in the queue, and nothing is left behind.
    ///
    /// # Errors
    ///
    /// As for [`Lock::acquire`](crate::Lock::acquire). If the waiter's connection breaks, the wait continues on another
    /// connection, at the end of the queue. If the pool has no connection within its `acquire_timeout`, all waiters of
    /// the process get the [`Error::PoolTimedOut`].
    ///
    /// # Panics
    ///
    /// If called outside a tokio runtime.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::Semaphore;
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// let printers = Semaphore::new(&pool, "printers", 3)?;
    /// let _permit = printers.acquire().await?;
    /// // At most three are here, on all machines together.
    /// # Ok(()) }
    /// ```
    pub async fn acquire(&self) -> Result<Permit> {
        loop {
            // Without a deadline, the wait never returns `None`.
            let permit = self.wait(None).await?;
            if let Some(permit) = permit {
                return Ok(permit);
            }
        }
    }

    /// Acquires a permit if one is free, and no other task or process waits for one. Returns `None` otherwise.
    ///
    /// Sends three statements, or one if others wait; every ten seconds one more.
    ///
    /// # Cancel safety
    ///
    /// As for [`acquire`](Self::acquire).
    ///
    /// # Errors
    ///
    /// As for [`acquire`](Self::acquire).
    ///
    /// # Panics
    ///
    /// If called outside a tokio runtime.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::Semaphore;
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// let printers = Semaphore::new(&pool, "printers", 1)?;
    /// let permit = printers.try_acquire().await?;
    /// assert!(permit.is_some());
    /// assert!(printers.try_acquire().await?.is_none());
    /// # Ok(()) }
    /// ```
    pub async fn try_acquire(&self) -> Result<Option<Permit>> {
        let metric = metrics::Acquire::start(self.inner.labels());
        let permit = self.inner.pass(None).await.map_err(|error| self.inner.explain(error));
        metric.end(&permit, false);
        permit
    }

    /// Acquires a permit, waiting for at most `timeout`. Returns `None` after that.
    ///
    /// # Cancel safety
    ///
    /// As for [`acquire`](Self::acquire).
    ///
    /// # Errors
    ///
    /// As for [`acquire`](Self::acquire).
    ///
    /// # Panics
    ///
    /// If called outside a tokio runtime.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::Semaphore;
    /// use std::time::Duration;
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// let printers = Semaphore::new(&pool, "printers", 1)?;
    /// let _permit = printers.acquire().await?;
    /// let timeout = Duration::from_secs(1);
    /// assert!(printers.try_acquire_for(timeout).await?.is_none());
    /// # Ok(()) }
    /// ```
    pub async fn try_acquire_for(&self, timeout: Duration) -> Result<Option<Permit>> {
        match Instant::now().checked_add(timeout) {
            Some(deadline) => self.try_acquire_until(deadline).await,
            None => self.acquire().await.map(Some),
        }
    }

    /// Acquires a permit, waiting until `deadline`. Returns `None` after that.
    ///
    /// If the deadline has passed, this is a [`try_acquire`](Self::try_acquire).
    ///
    /// # Cancel safety
    ///
    /// As for [`acquire`](Self::acquire).
    ///
    /// # Errors
    ///
    /// As for [`try_acquire_for`](Self::try_acquire_for).
    ///
    /// # Panics
    ///
    /// If called outside a tokio runtime.
    pub async fn try_acquire_until(&self, deadline: Instant) -> Result<Option<Permit>> {
        if deadline <= Instant::now() {
            return self.try_acquire().await;
        }
        self.wait(Some(deadline)).await
    }

    /// Acquires a permit, and measures and reports the wait.
    async fn wait(&self, deadline: Option<Instant>) -> Result<Option<Permit>> {
        let metric = metrics::Acquire::start(self.inner.labels());
        let acquire = pin!(self.inner.acquire(deadline));
        let permit = reported(Some(self.key()), self.inner.owner.options.slice(), acquire).await;
        metric.end(&permit, true);
        permit
    }
}

impl Inner {
    /// Acquires a permit, waiting until the deadline if there is one. Returns `None` after that.
    async fn acquire(&self, deadline: Option<Instant>) -> Result<Option<Permit>> {
        let mut waiting = Waiting::new(self.labels());
        let (_first, queued) = if let Ok(first) = self.waiting.try_lock() {
            (first, false)
        } else {
            waiting.start();
            match until(deadline).bound(self.first()).await {
                Some(first) => (first?, true),
                None => return Ok(None),
            }
        };
        let late = queued && deadline.is_some_and(|deadline| time_until(deadline) < POLL_INTERVAL);
        // This limit is reached only if the server does not answer.
        let latest = deadline.and_then(|deadline| deadline.checked_add(GRACE));
        match until(latest).bound(self.wait(deadline, &mut waiting)).await {
            None => Ok(None),
            // The caller spent its time in the queue, so it did not time out for lack of a connection: the one of the
            // previous first waiter is just being returned.
            Some(Err(error)) if late && is_timeout(&error) => Ok(None),
            Some(found) => found.map_err(|error| self.fail(error, deadline)),
        }
    }

    fn labels(&self) -> Labels {
        Labels::new(true, self.owner.options.label_by_key, &self.key, Mode::Exclusive)
    }

    /// Waits until the earlier waiters of this process are done. Returns an error if none of them can get a connection.
    async fn first(&self) -> Result<MutexGuard<'_, ()>> {
        let mut exhausted = self.exhausted.subscribe();
        let exhausted = async {
            // The sender lives as long as `self`.
            drop(exhausted.changed().await);
            exhausted.borrow().clone()
        };
        tokio::select! {
            biased;
            Some(error) = exhausted => Err(error),
            first = self.waiting.lock() => Ok(first),
        }
    }

    /// Makes all other waiters of this process fail too if the pool has no connection, because otherwise each of them
    /// in turn would wait for one as long. Returns the error.
    fn fail(&self, error: Error, deadline: Option<Instant>) -> Error {
        let error = self.explain(error);
        // If only the caller's own time was over, the others don't fail.
        let is_late = deadline.is_some_and(|deadline| deadline <= Instant::now());
        if !is_timeout(&error) || is_late {
            return error;
        }
        self.exhausted.send_replace(Some(error.clone()));
        error
    }

    /// Returns the error with the semaphore's key instead of that of its queue or a permit, and with the number of
    /// permits if the pool can never provide a connection for each of them.
    fn explain(&self, error: Error) -> Error {
        let mut error = error.for_key(&self.key);
        let limit = Budget::of(self.owner.pool()).limit(self.owner.options.reserve_connections);
        let is_short = usize::try_from(limit).is_ok_and(|limit| limit < self.permits);
        if let Error::PoolTimedOut { permits, .. } = &mut error
            && is_short
        {
            *permits = Some(self.permits);
        }
        error
    }

    /// Acquires a permit if one is free, and there is no waiter.
    async fn pass(&self, deadline: Option<Instant>) -> Result<Option<Permit>> {
        let request = Request::one(self.layout.queue(), Mode::Shared).internal();
        let mut owner = self.owner.another();
        let policy = deadline.map_or(WaitPolicy::Never, WaitPolicy::ForPool);
        let passing = owner.take(&request, policy).await?;
        match passing {
            Some(passing) => self.look(&passing, &self.slots).await,
            None => Ok(None),
        }
    }

    /// Acquires a permit, or waits for one. Called only by the first waiter of this process.
    async fn wait(
        &self,
        deadline: Option<Instant>,
        waiting: &mut Waiting,
    ) -> Result<Option<Permit>> {
        loop {
            // Boxed, because otherwise the future of an acquire would be large.
            match Box::pin(self.wait_on_one_session(deadline, waiting)).await {
                // The session held no permit, only a place in the queue.
                Err(Error::Disconnected { .. } | Error::Lost { .. }) => sleep(POLL_INTERVAL).await,
                found => return found,
            }
        }
    }

    /// Acquires a permit, or waits in the server's queue, and then for a permit.
    async fn wait_on_one_session(
        &self,
        deadline: Option<Instant>,
        waiting: &mut Waiting,
    ) -> Result<Option<Permit>> {
        let left = || deadline.map(time_until);
        let is_over = || left().is_some_and(|left| left.is_zero());
        let permit = self.pass(deadline).await?;
        if permit.is_some() {
            return Ok(permit);
        }
        waiting.start();
        let request = Request::one(self.layout.queue(), Mode::Exclusive).internal();
        let mut owner = self.owner.another();
        let first = if is_over() { None } else { owner.take(&request, until(deadline)).await? };
        let Some(first) = first else { return Ok(None) };
        // The first attempt and the last one try all permits.
        let mut windows = self.windows.iter().cycle();
        let mut window = Some(&self.slots);
        let found = loop {
            first.session().hold_anew();
            match self.look(&first, window.unwrap_or(&self.slots)).await {
                Ok(None) if self.owner.pool().is_closed() => {
                    break Err(Error::PoolClosed { key: self.layout.queue().clone() });
                }
                Ok(None) if !is_over() => {
                    let pause = left().map_or(POLL_INTERVAL, |left| left.min(POLL_INTERVAL));
                    sleep(pause).await;
                }
                found => break found,
            }
            window = if is_over() { None } else { windows.next() };
        };
        // Awaited, because otherwise the next `try_acquire` would still find a waiter.
        let released = first.release().await;
        let found = found?;
        released.map(|()| found)
    }

    /// Acquires one of these permits if one is free, on the session of the guard that allows it.
    async fn look(&self, may: &Guard, slots: &Request) -> Result<Option<Permit>> {
        let census_due = *self.census_due.lock().unwrap_or_else(PoisonError::into_inner);
        if census_due.is_some_and(|due| due <= Instant::now()) {
            self.take_census(may).await;
        }
        let Some(held) = may.and(slots).await? else { return Ok(None) };
        held.session().hold_anew();
        let slot = self.layout.slot(held.key());
        Ok(slot.map(|slot| Permit { guard: held, slot, key: self.key.clone() }))
    }

    /// Warns if a permit is in use that this semaphore does not have.
    async fn take_census(&self, may: &Guard) {
        let beyond = self.layout.beyond(self.permits);
        let due = match may.session().greatest_held(&self.key, beyond).await {
            Ok(None) => Some(Instant::now() + CENSUS_INTERVAL),
            Ok(Some(permit)) => {
                let slot = self.layout.slot(&Key::from(permit));
                tracing::warn!(
                    lock.key = %self.key.id(),
                    lock.name = self.key.name(),
                    permits = self.permits,
                    others = slot.map(|slot| slot + 1),
                    "a semaphore has more permits elsewhere; give it the same number everywhere"
                );
                None
            }
            // If the session has failed, so will the next statement.
            Err(error) if !matches!(error, Error::Database { .. }) => Some(Instant::now()),
            // The role may not list locks.
            Err(error) => {
                tracing::debug!(
                    lock.key = %self.key.id(),
                    lock.name = self.key.name(),
                    error = %chain(&error),
                    "cannot see the size of a semaphore"
                );
                None
            }
        };
        *self.census_due.lock().unwrap_or_else(PoisonError::into_inner) = due;
    }
}

fn until(deadline: Option<Instant>) -> WaitPolicy {
    deadline.map_or(WaitPolicy::Forever, WaitPolicy::Until)
}

/// Whether the pool had no connection in time.
fn is_timeout(error: &Error) -> bool {
    let is_timeout = |source: &sqlx::Error| matches!(source, sqlx::Error::PoolTimedOut);
    matches!(error, Error::PoolTimedOut { .. })
        || matches!(error, Error::Connect { source, .. } if is_timeout(source))
}

impl fmt::Debug for Semaphore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Semaphore")
            .field("key", &self.inner.key)
            .field("permits", &self.inner.permits)
            .finish_non_exhaustive()
    }
}
