//! The handle of the lock of one key: methods that acquire, and methods that run a future under the lock.

use std::fmt;
use std::time::{Duration, Instant};

#[cfg(doc)]
use crate::error::Error;
use crate::error::Result;
use crate::guard::{ExclusiveGuard, Guard, SharedGuard};
use crate::key::Key;
use crate::mode::Mode;
use crate::owner::{Owner, time_until};
use crate::request::Request;
use crate::source::Source;

/// A handle on the lock of one key (`pg_advisory_lock`).
///
/// Making a handle costs nothing. If it is made from a pool, its first acquire takes a connection, and its last
/// guard returns it. Two handles exclude each other, in one process as on two machines, unless both are made from
/// the same [guard](Source#the-session-of-a-guard) of a pool. Handles are re-entrant: acquiring a lock that the handle
/// already holds returns immediately, without a round trip, and the lock is released when the last guard is dropped.
///
/// Never share a handle between tasks, not in a `Mutex` either: the second task would re-enter, and both would hold
/// the lock. [`clone`](Clone::clone) it instead, once for each task: a clone shares only the source, the key and
/// the options, and excludes the original. Therefore the acquire methods take `&mut self`, and a re-entry from
/// another task than the one that acquired last is logged as a warning. [`run`](Self::run) never re-enters.
///
/// | | waits | waits up to a timeout | never waits for the lock |
/// |---|---|---|---|
/// | exclusive | [`acquire`](Self::acquire) | [`try_acquire_for`](Self::try_acquire_for) | [`try_acquire`](Self::try_acquire) |
/// | shared | [`acquire_shared`](Self::acquire_shared) | [`try_acquire_shared_for`](Self::try_acquire_shared_for) | [`try_acquire_shared`](Self::try_acquire_shared) |
/// | a future under the exclusive lock | [`run`](Self::run) | [`try_run_for`](Self::try_run_for) | [`try_run`](Self::try_run) |
///
/// [`try_acquire_until`](Self::try_acquire_until) and [`try_acquire_shared_until`](Self::try_acquire_shared_until) take
/// a deadline instead of a timeout.
///
/// The `try_` methods return an `Option`, which must be checked: `lock.try_acquire_for(timeout).await?;` compiles
/// without a warning, and the code after it runs without the lock. Use `let … else`, or [`try_run`](Self::try_run).
///
/// Waiters are served in FIFO order: of the handles that hold nothing, and wait for the same key on the same pool, one
/// waits in the server's queue, and the others wait [in line](crate::guide::guarantees#fairness) behind it, in the
/// process. `try_acquire` never overtakes the server's queue.
///
/// # Connections
///
/// A handle that holds a lock uses one connection of the pool. So does a key that is waited for, however many tasks
/// wait for it. A task that waits with a timeout uses a connection of its own once a quarter of its time has passed. By
/// default, locks leave [a third of the pool](crate::guide::operations#the-pool) to your queries. So count the locks
/// that you hold, and the keys that you wait for, at the same time, and give the pool one and a half times as many
/// connections.
///
/// An idle connection is taken without sqlx's ping, so the pool's `before_acquire` hook does not run on it. If it is
/// dead, the next one is tried; a connection on which no data arrives delays the acquire by the heartbeat's timeout,
/// and all such connections together by at most ten seconds.
///
/// The first acquires of a process on a server wait for the
/// [proof](crate::guide::guarantees#poolers) that locks exclude other sessions there, for at most 250 ms. Without an
/// answer by then, the lock is granted, and the proof goes on in the background.
///
/// # Examples
///
/// ```
/// use pglock::Lock;
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
/// # let pool = pglock_testkit::pool().await;
/// let mut lock = Lock::new(&pool, "nightly-report");
/// let outer = lock.acquire().await?;
/// let inner = lock.acquire().await?; // the same handle: re-entrant
///
/// let mut other = lock.clone();
/// assert!(other.try_acquire().await?.is_none()); // another handle: excluded
/// # drop((outer, inner)); Ok(()) }
/// ```
///
/// A handle behind a shared reference can't acquire:
///
/// ```compile_fail,E0596
/// # async fn f(pool: sqlx::PgPool) -> pglock::Result<()> {
/// let lock = std::sync::Arc::new(pglock::Lock::new(&pool, "nightly-report"));
/// let guard = lock.acquire().await?; // error: cannot borrow data in an `Arc` as mutable
/// # Ok(()) }
/// ```
pub struct Lock {
    key: Key,
    owner: Owner,
}

impl Lock {
    /// Makes a handle whose session comes from a pool, a manager or a guard ([`Source`]). Sends nothing to the
    /// server.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() {
    /// # let pool = pglock_testkit::pool().await;
    /// use pglock::Lock;
    ///
    /// let by_name = Lock::new(&pool, "nightly-report");
    /// let by_number = Lock::new(&pool, 42);
    /// let by_pair = Lock::new(&pool, (1, 42));
    /// # let _ = (by_name, by_number, by_pair); }
    /// ```
    #[must_use]
    pub fn new(source: &impl Source, key: impl Into<Key>) -> Self {
        Self { key: key.into(), owner: source.owner() }
    }

    /// Returns the key.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() {
    /// # let pool = pglock_testkit::pool().await;
    /// use pglock::{Key, Lock};
    ///
    /// assert_eq!(Lock::new(&pool, 42).key(), &Key::from(42));
    /// # }
    /// ```
    #[must_use]
    pub fn key(&self) -> &Key {
        &self.key
    }

    /// Acquires the lock exclusively (`pg_advisory_lock`), waiting until it is available.
    ///
    /// A free lock takes one statement, and so one round trip. For a busy lock, the call waits in the server's queue,
    /// in slices of a minute by default ([`LockOptions::wait_slice`](crate::LockOptions::wait_slice)), of two
    /// statements each. The end of a slice ends the snapshot of the wait, which would otherwise hold back `VACUUM`.
    /// Between two slices the waiter goes to the end of the queue. If this handle already holds the lock exclusively,
    /// nothing is sent.
    ///
    /// If other tasks of the process wait for the same key on the same pool, the call waits in line behind them,
    /// without a connection, and sends nothing. A task that releases the lock may hand it to the call, with its
    /// connection. Poll the future until it ends, or drop it: a future that is not polled blocks the calls behind it in
    /// line.
    ///
    /// A handle that holds the lock only shared waits until all other sessions have released it. Two
    /// handles that do so deadlock; the server detects the deadlock within its `deadlock_timeout`, and one
    /// of them gets an error.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: the caller loses its place in the queue, and nothing is left behind. If the future is
    /// dropped while it waits, a background task cancels the wait (`pg_cancel_backend`, through an
    /// idle connection of the pool, otherwise a new one outside it), releases a lock that was granted
    /// meanwhile, and returns the connection to the pool. The server logs the cancelled statement.
    /// To limit a wait, [`try_acquire_for`](Self::try_acquire_for) is cheaper, and nothing is logged.
    ///
    /// # Errors
    ///
    /// After an error, the handle holds nothing more than before.
    ///
    /// * [`Error::PoolTimedOut`] if no connection became available in time; [`Error::PoolClosed`] if the pool was
    ///   closed, also during the wait; [`Error::Connect`] if none could be opened.
    /// * [`Error::Deadlock`], [`Error::OutOfLocks`], [`Error::Cancelled`], [`Error::Standby`],
    ///   [`Error::SettingsRejected`] if the server refused.
    /// * [`Error::NoExclusion`] if locks exclude no other session on this connection, as behind a pooler in
    ///   transaction mode.
    /// * [`Error::ConnectionBorrowed`] if another guard's connection of the same session stays borrowed for ten
    ///   seconds.
    /// * [`Error::Disconnected`] if the connection broke; [`Error::Lost`] if that happened just after the grant.
    /// * [`Error::Database`] for all other errors.
    ///
    /// # Panics
    ///
    /// If called outside a tokio runtime, as all of sqlx does.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::Lock;
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// let mut lock = Lock::new(&pool, "nightly-report");
    /// let _guard = lock.acquire().await?;
    /// // No other task runs this, on any machine, until `_guard` is dropped.
    /// # Ok(()) }
    /// ```
    pub async fn acquire(&mut self) -> Result<ExclusiveGuard> {
        let request = self.request(Mode::Exclusive);
        self.owner.acquire(&request).await.map(ExclusiveGuard::new)
    }

    /// Acquires the lock exclusively if it is available (`pg_try_advisory_lock`). Returns `None` if
    /// another session holds it.
    ///
    /// Sends one statement. Waits for a connection of the pool as any query does, but never for the
    /// lock. Also returns `None` while other sessions wait for the lock, because it does not overtake them.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe. If the future is dropped while the statement is in flight, a background task reads
    /// the answer, and releases a lock that was granted.
    ///
    /// # Errors
    ///
    /// As for [`acquire`](Self::acquire), except for the deadlock.
    ///
    /// # Panics
    ///
    /// If called outside a tokio runtime.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::Lock;
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// if let Some(_guard) = Lock::new(&pool, "nightly-report").try_acquire().await? {
    ///     // This machine makes the report.
    /// }
    /// # Ok(()) }
    /// ```
    pub async fn try_acquire(&mut self) -> Result<Option<ExclusiveGuard>> {
        self.try_acquire_for(Duration::ZERO).await
    }

    /// Acquires the lock exclusively, waiting for at most `timeout`. Returns `None` after that.
    ///
    /// The timeout covers the pool and the lock. If it expires while the call waits for a connection of the pool, the
    /// result is [`Error::PoolTimedOut`], because the lock was not requested; or `None`, if other calls of the process
    /// wait for the same key already. The server ends the wait for the lock, so no statement is cancelled. If the
    /// server does not answer, the call returns half a second late: `None`, or [`Error::Disconnected`] if nothing was
    /// answered before. A timeout of zero is a [`try_acquire`](Self::try_acquire), which may wait for a connection for
    /// the pool's `acquire_timeout`.
    ///
    /// # Cancel safety
    ///
    /// As for [`acquire`](Self::acquire).
    ///
    /// # Errors
    ///
    /// As for [`acquire`](Self::acquire). A deadlock is only detected if the wait is longer than the
    /// server's `deadlock_timeout` (1 s by default); a shorter wait ends with `None`.
    ///
    /// # Panics
    ///
    /// If called outside a tokio runtime.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::Lock;
    /// use std::time::Duration;
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// # fn busy() {}
    /// let mut lock = Lock::new(&pool, "invoice-17");
    /// let Some(_guard) = lock.try_acquire_for(Duration::from_secs(2)).await? else {
    ///     return Ok(busy());
    /// };
    /// # Ok(()) }
    /// ```
    pub async fn try_acquire_for(&mut self, timeout: Duration) -> Result<Option<ExclusiveGuard>> {
        let request = self.request(Mode::Exclusive);
        let held = self.owner.try_acquire_for(&request, timeout).await?;
        Ok(held.map(ExclusiveGuard::new))
    }

    /// Acquires the lock exclusively, waiting until `deadline`. Returns `None` after that.
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
    pub async fn try_acquire_until(&mut self, deadline: Instant) -> Result<Option<ExclusiveGuard>> {
        self.try_acquire_for(time_until(deadline)).await
    }

    /// Acquires the lock shared (`pg_advisory_lock_shared`), waiting until no other session holds it
    /// exclusively.
    ///
    /// A shared acquire queues behind an exclusive waiter that came first, so readers can't starve a
    /// writer. If this handle already holds the lock, in either mode, nothing is sent. In all other
    /// respects, this call behaves like [`acquire`](Self::acquire).
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
    /// use pglock::Lock;
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// let mut config = Lock::new(&pool, "app-config");
    /// let _guard = config.acquire_shared().await?;
    /// // No session changes the configuration until `_guard` is dropped.
    /// # Ok(()) }
    /// ```
    pub async fn acquire_shared(&mut self) -> Result<SharedGuard> {
        let request = self.request(Mode::Shared);
        self.owner.acquire(&request).await.map(SharedGuard::new)
    }

    /// Acquires the lock shared if it is available (`pg_try_advisory_lock_shared`). Returns `None` if
    /// another session holds it exclusively.
    ///
    /// Also returns `None` while another session waits for the lock exclusively. In all other respects,
    /// this call behaves like [`try_acquire`](Self::try_acquire).
    ///
    /// # Cancel safety
    ///
    /// As for [`try_acquire`](Self::try_acquire).
    ///
    /// # Errors
    ///
    /// As for [`try_acquire`](Self::try_acquire).
    ///
    /// # Panics
    ///
    /// If called outside a tokio runtime.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::Lock;
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// let mut config = Lock::new(&pool, "app-config");
    /// let mut reader = config.clone();
    /// let writing = config.acquire().await?;
    /// assert!(reader.try_acquire_shared().await?.is_none());
    /// # drop(writing); Ok(()) }
    /// ```
    pub async fn try_acquire_shared(&mut self) -> Result<Option<SharedGuard>> {
        self.try_acquire_shared_for(Duration::ZERO).await
    }

    /// Acquires the lock shared, waiting for at most `timeout`. Returns `None` after that.
    ///
    /// The timeout includes the wait for a connection of the pool, as with
    /// [`try_acquire_for`](Self::try_acquire_for).
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
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::Lock;
    /// use std::time::Duration;
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// let mut config = Lock::new(&pool, "app-config");
    /// let guard = config.try_acquire_shared_for(Duration::from_secs(2)).await?;
    /// assert!(guard.is_some());
    /// # Ok(()) }
    /// ```
    pub async fn try_acquire_shared_for(
        &mut self,
        timeout: Duration,
    ) -> Result<Option<SharedGuard>> {
        let request = self.request(Mode::Shared);
        let held = self.owner.try_acquire_for(&request, timeout).await?;
        Ok(held.map(SharedGuard::new))
    }

    /// Acquires the lock shared, waiting until `deadline`. Returns `None` after that.
    ///
    /// If the deadline has passed, this is a [`try_acquire_shared`](Self::try_acquire_shared).
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
    pub async fn try_acquire_shared_until(
        &mut self,
        deadline: Instant,
    ) -> Result<Option<SharedGuard>> {
        self.try_acquire_shared_for(time_until(deadline)).await
    }

    /// Acquires the lock exclusively, runs a future under the lock, and releases it.
    ///
    /// If the lock is lost, the future is dropped the next time that it is pending, and the loss is returned. Tasks
    /// that the future has spawned are not stopped. If it panics, the lock is released while the panic unwinds.
    ///
    /// Each call excludes every other call, also through the same handle: it does not re-enter a lock that the handle
    /// holds, but acquires the lock on a session of its own, as a [clone](Clone::clone) of the handle does. So it waits
    /// forever if the caller itself holds a guard of the key meanwhile.
    ///
    /// # Cancel safety
    ///
    /// Dropping the returned future drops the one that it runs, and releases the lock.
    ///
    /// # Errors
    ///
    /// As for [`acquire`](Self::acquire), and [`Error::Lost`] or [`Error::NoExclusion`] if the lock was lost before it
    /// was released. The future may have ended by then; its output is not returned, and another session may have held
    /// the lock meanwhile.
    ///
    /// # Panics
    ///
    /// If called outside a tokio runtime.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::Lock;
    ///
    /// # async fn make_report() -> u32 { 12 }
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// let pages = Lock::new(&pool, "nightly-report").run(make_report()).await?;
    /// assert_eq!(pages, 12);
    /// # Ok(()) }
    /// ```
    pub async fn run<T>(&self, future: impl Future<Output = T>) -> Result<T> {
        let guard = self.clone().acquire().await?;
        Guard::from(guard).run(future).await
    }

    /// Runs a future under the lock if it is available. Returns `None` if another session holds it.
    ///
    /// Acquires the lock like [`try_acquire`](Self::try_acquire). In all other respects, this call behaves like
    /// [`run`](Self::run).
    ///
    /// # Cancel safety
    ///
    /// As for [`run`](Self::run).
    ///
    /// # Errors
    ///
    /// As for [`run`](Self::run).
    ///
    /// # Panics
    ///
    /// If called outside a tokio runtime.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::Lock;
    ///
    /// # async fn make_report() -> u32 { 12 }
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// match Lock::new(&pool, "nightly-report").try_run(make_report()).await? {
    ///     Some(pages) => println!("made a report of {pages} pages"),
    ///     None => println!("another machine makes it"),
    /// }
    /// # Ok(()) }
    /// ```
    pub async fn try_run<T>(&self, future: impl Future<Output = T>) -> Result<Option<T>> {
        let guard = self.clone().try_acquire().await?;
        match guard {
            Some(guard) => Guard::from(guard).run(future).await.map(Some),
            None => Ok(None),
        }
    }

    /// Runs a future under the lock, waiting for the lock for at most `timeout`. Returns `None` after that.
    ///
    /// Acquires the lock like [`try_acquire_for`](Self::try_acquire_for). In all other respects, this call behaves like
    /// [`run`](Self::run). The timeout does not bound the future.
    ///
    /// # Cancel safety
    ///
    /// As for [`run`](Self::run).
    ///
    /// # Errors
    ///
    /// As for [`run`](Self::run).
    ///
    /// # Panics
    ///
    /// If called outside a tokio runtime.
    pub async fn try_run_for<T>(
        &self,
        timeout: Duration,
        future: impl Future<Output = T>,
    ) -> Result<Option<T>> {
        let guard = self.clone().try_acquire_for(timeout).await?;
        match guard {
            Some(guard) => Guard::from(guard).run(future).await.map(Some),
            None => Ok(None),
        }
    }

    /// Releases everything that this handle holds, while its guards are still alive.
    ///
    /// These guards report [`Error::Lost`] from then on, with [`Loss::Released`](crate::Loss::Released).
    /// Guards of other handles are not affected, even on the same session
    /// (see [`Source`]). The connection returns to the pool when the server has confirmed the unlock, if no
    /// other guard needs it. The handle can acquire again. Sends one statement if anything is held,
    /// otherwise none.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: the release continues if the future is dropped.
    ///
    /// # Errors
    ///
    /// [`Error::Lost`] if the lock was lost before. [`Error::ConnectionBorrowed`] if a guard's connection stays
    /// borrowed for ten seconds; the release continues when it is returned.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::Lock;
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// let mut lock = Lock::new(&pool, "nightly-report");
    /// let guard = lock.acquire().await?;
    /// lock.release_all().await?;
    ///
    /// assert!(lock.clone().try_acquire().await?.is_some());
    /// assert!(guard.release().await.is_err());
    /// # Ok(()) }
    /// ```
    pub async fn release_all(&mut self) -> Result<()> {
        self.owner.release_all(&self.key).await
    }

    fn request(&self, mode: Mode) -> Request {
        Request::one(&self.key, mode).in_line()
    }
}

impl Clone for Lock {
    /// Makes another handle: it shares the pool, the key and the options, and holds nothing.
    fn clone(&self) -> Self {
        Self { key: self.key.clone(), owner: self.owner.another() }
    }
}

impl fmt::Debug for Lock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lock")
            .field("key", &self.key)
            .field("options", &self.owner.options)
            .finish_non_exhaustive()
    }
}
