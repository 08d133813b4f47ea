//! The handle: an owner of locks on one key, with six ways to acquire.

use std::fmt;
use std::time::Duration;

use sqlx::PgPool;

#[cfg(doc)]
use crate::error::Error;
use crate::error::Result;
use crate::guard::{ExclusiveGuard, SharedGuard};
use crate::key::Key;
use crate::mode::Mode;
use crate::options::LockOptions;
use crate::owner::Owner;
use crate::request::Request;

/// A handle on the lock of one key: an owner, in whose name guards are held.
///
/// Making a handle costs nothing; the first acquire takes a connection from the pool, and the last
/// guard returns it. Two handles exclude each other, in one process as on two machines. One handle
/// does not exclude itself: it stacks, and the lock goes when its last guard goes. Stacked acquires
/// are counted in memory, and send nothing.
///
/// The acquire methods take `&mut self`, so that two tasks can't share one handle by accident, and
/// both believe that they are alone. To contend, [`clone`](Clone::clone): a clone is an owner of its
/// own, that shares only the pool, the key and the options.
///
/// | | waits | waits so long | never waits |
/// |---|---|---|---|
/// | exclusive | [`acquire`](Self::acquire) | [`try_acquire_for`](Self::try_acquire_for) | [`try_acquire`](Self::try_acquire) |
/// | shared | [`acquire_shared`](Self::acquire_shared) | [`try_acquire_shared_for`](Self::try_acquire_shared_for) | [`try_acquire_shared`](Self::try_acquire_shared) |
///
/// The server queues waiters in order of arrival. A `try_` never overtakes the queue.
///
/// # Connections
///
/// A handle that holds or waits uses one connection of the pool. Give the pool at least as many as
/// the locks that you hold and await at once, and some for your queries. An idle connection is taken
/// without sqlx's ping, so the pool's `before_acquire` hook does not run on it; if it turns out to be
/// dead, another takes its place.
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
/// let inner = lock.acquire().await?; // the same owner: stacks
///
/// let mut other = lock.clone();
/// assert!(other.try_acquire().await?.is_none()); // another owner: excluded
/// # drop((outer, inner)); Ok(()) }
/// ```
///
/// A shared handle has no way to acquire:
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
    /// Makes a handle with the default options. Sends nothing to the server.
    ///
    /// For other options see [`LockOptions::lock`].
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
    pub fn new(pool: &PgPool, key: impl Into<Key>) -> Self {
        Self::with_owner(key.into(), Owner::new(pool, LockOptions::new()))
    }

    pub(crate) fn with_owner(key: Key, owner: Owner) -> Self {
        Self { key, owner }
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

    /// Acquires the lock exclusively, and waits for as long as others hold it.
    ///
    /// A free lock takes one statement, and so one round trip. A busy one is waited for in the
    /// server's queue, in slices ([`LockOptions::wait_slice`]): one statement each, which holds no
    /// snapshot for longer. If this handle holds the lock exclusively already, nothing is sent.
    ///
    /// A handle that holds the lock only shared waits until all others have let go. Two of them that
    /// do so wait for each other; the server finds the deadlock within its `deadlock_timeout`, and
    /// one gets an error.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: you lose your place in the queue, and leave nothing behind. If the future is
    /// dropped while it waits, a task has the server stop waiting (`pg_cancel_backend`, through an
    /// idle connection of the pool, else a new one beside it), gives up what may have been granted
    /// meanwhile, and returns the connection to the pool. The server logs the cancelled statement;
    /// to give up after a time, [`try_acquire_for`](Self::try_acquire_for) is cheaper and silent.
    ///
    /// # Errors
    ///
    /// Nothing is held after an error. [`Error::Pool`] and [`Error::Connect`] if there was no
    /// connection to be had; [`Error::Deadlock`], [`Error::OutOfLocks`], [`Error::Cancelled`],
    /// [`Error::Standby`], [`Error::Settings`] if the server refused; [`Error::Pooled`] behind a pooler
    /// in transaction mode; [`Error::Disconnected`] if the connection broke; [`Error::Database`] for
    /// all else.
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
    /// // Nobody else runs this, on any machine, until `_guard` is dropped.
    /// # Ok(()) }
    /// ```
    pub async fn acquire(&mut self) -> Result<ExclusiveGuard> {
        let request = self.request(Mode::Exclusive);
        self.owner.acquire(&request).await.map(ExclusiveGuard::new)
    }

    /// Acquires the lock exclusively if that is possible at once. `None` if others hold it.
    ///
    /// Takes one statement. It waits for the pool's connection as any query does, but never for the
    /// lock. It is also refused while others wait for the lock, which it does not overtake.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe. If the future is dropped while the statement is under way, its answer is read by
    /// a task, and what was granted is given up.
    ///
    /// # Errors
    ///
    /// As for [`acquire`](Self::acquire), without the deadlock.
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
        let request = self.request(Mode::Exclusive);
        let held = self.owner.try_acquire(&request).await?;
        Ok(held.map(ExclusiveGuard::new))
    }

    /// Acquires the lock exclusively, and waits for at most `timeout`. `None` if that passes.
    ///
    /// The time includes getting a connection from the pool; if it passes there, that is an
    /// [`Error::Pool`], for the lock was not even asked for. The server ends the wait itself, so
    /// giving up costs nothing; if it does not answer, the call returns half a second later.
    ///
    /// # Cancel safety
    ///
    /// As for [`acquire`](Self::acquire).
    ///
    /// # Errors
    ///
    /// As for [`acquire`](Self::acquire). A deadlock is only found if the wait is longer than the
    /// server's `deadlock_timeout` (1 s); a shorter one just ends with `None`.
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

    /// Acquires the lock shared, and waits for as long as others hold it exclusively.
    ///
    /// Else as [`acquire`](Self::acquire). Who waits for the lock exclusively is ahead of those who
    /// come later to share it, so readers can't starve a writer. If this handle holds the lock
    /// already, in either mode, nothing is sent.
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
    /// // Nobody changes the configuration until `_guard` is dropped.
    /// # Ok(()) }
    /// ```
    pub async fn acquire_shared(&mut self) -> Result<SharedGuard> {
        let request = self.request(Mode::Shared);
        self.owner.acquire(&request).await.map(SharedGuard::new)
    }

    /// Acquires the lock shared if that is possible at once. `None` if it is held exclusively.
    ///
    /// Else as [`try_acquire`](Self::try_acquire): it is also refused while others wait for the lock
    /// exclusively.
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
        let request = self.request(Mode::Shared);
        let held = self.owner.try_acquire(&request).await?;
        Ok(held.map(SharedGuard::new))
    }

    /// Acquires the lock shared, and waits for at most `timeout`. `None` if that passes.
    ///
    /// Else as [`try_acquire_for`](Self::try_acquire_for).
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
    /// let guard = config.try_acquire_shared_for(Duration::from_millis(200)).await?;
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

    /// Lets go of everything that this handle holds, however many guards are alive.
    ///
    /// The guards that still live report [`Error::Lost`] from then on. The connection goes back to
    /// the pool once the server has confirmed. The handle can acquire again. Waits while a guard has
    /// its connection lent out. Sends one statement if anything is held, else none.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: the release is under way before the first await, and dropping the future only
    /// gives up waiting for its result.
    ///
    /// # Errors
    ///
    /// [`Error::Lost`] if the lock was lost before it was closed.
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
    /// lock.close().await?;
    ///
    /// assert!(lock.clone().try_acquire().await?.is_some());
    /// assert!(guard.release().await.is_err());
    /// # Ok(()) }
    /// ```
    pub async fn close(&mut self) -> Result<()> {
        self.owner.close(&self.key).await
    }

    fn request(&self, mode: Mode) -> Request {
        Request::one(&self.key, mode)
    }
}

impl Clone for Lock {
    /// Makes another owner: it shares the pool, the key and the options, and holds nothing.
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
