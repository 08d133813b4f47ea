//! Several locks at once: all of them or none, and never a deadlock.

use std::fmt;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::guard::{Guard, into_guard, is_guard};
use crate::key::Key;
use crate::mode::Mode;
use crate::owner::{Owner, time_until};
use crate::request::Request;
use crate::source::Source;

/// A handle on the locks of several keys. An acquire returns with all of them or none.
///
/// The keys are acquired in one order, whatever order they are given in, so two handles with the same
/// keys never deadlock. A key that is given twice is acquired once; exclusively, if either use asks for
/// that. One session holds all of them, on one connection. When all are free, they are acquired in
/// one statement.
///
/// While the handle waits for a key that is busy, it holds the keys before it in the order. Use few keys:
/// each is an entry of the server's lock table, which is of limited size.
///
/// Like a [`Lock`](crate::Lock), a handle is re-entrant, and a [clone](Clone::clone) is excluded by it.
///
/// # Examples
///
/// ```
/// use pglock::MultiLock;
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
/// # let pool = pglock_testkit::pool().await;
/// let mut accounts = MultiLock::new(&pool, ["account-1", "account-2"]);
/// let _guard = accounts.acquire().await?;
/// // No other task moves money between the two.
/// # Ok(()) }
/// ```
pub struct MultiLock {
    /// `None` if there are no keys.
    request: Option<Request>,
    owner: Owner,
}

impl MultiLock {
    /// Makes a handle on these keys, to be held exclusively, with the options of its [`Source`]. Sends nothing.
    ///
    /// An acquire on a handle without keys returns [`Error::InvalidArgument`].
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() {
    /// # let pool = pglock_testkit::pool().await;
    /// use pglock::MultiLock;
    ///
    /// let locks = MultiLock::new(&pool, [17, 4, 23].map(|id| format!("invoice-{id}")));
    /// assert_eq!(locks.keys().count(), 3);
    /// # }
    /// ```
    #[must_use]
    pub fn new(source: &impl Source, keys: impl IntoIterator<Item: Into<Key>>) -> Self {
        Self::with_modes(source, keys.into_iter().map(|key| (key, Mode::Exclusive)))
    }

    /// Makes a handle on these keys, each to be held in its mode, with the options of its [`Source`]. Sends nothing.
    ///
    /// [`keys`](Self::keys) returns the keys in the same form.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() {
    /// # let pool = pglock_testkit::pool().await;
    /// use pglock::{Mode, MultiLock};
    ///
    /// let accounts = ["account-1", "account-2"].map(|key| (key, Mode::Exclusive));
    /// let keys = accounts.into_iter().chain([("rates", Mode::Shared)]);
    /// let locks = MultiLock::with_modes(&pool, keys);
    /// assert_eq!(locks.keys().count(), 3);
    /// # }
    /// ```
    #[must_use]
    pub fn with_modes(
        source: &impl Source,
        keys: impl IntoIterator<Item = (impl Into<Key>, Mode)>,
    ) -> Self {
        let locks = keys.into_iter().map(|(key, mode)| (key.into(), mode));
        Self { request: Request::all(locks.collect()), owner: source.owner().unmanaged() }
    }

    /// Returns the keys in the order in which they are taken, each with its mode.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() {
    /// # let pool = pglock_testkit::pool().await;
    /// use pglock::{Key, Mode, MultiLock};
    ///
    /// let keys = [(2, Mode::Shared), (1, Mode::Shared), (2, Mode::Exclusive)];
    /// let locks = MultiLock::with_modes(&pool, keys);
    /// let keys: Vec<_> = locks.keys().collect();
    /// assert_eq!(keys, [(&Key::from(1), Mode::Shared), (&Key::from(2), Mode::Exclusive)]);
    /// # }
    /// ```
    pub fn keys(&self) -> impl Iterator<Item = (&Key, Mode)> {
        let locks = self.request.as_ref().map_or(&[][..], Request::locks);
        locks.iter().map(|(key, mode)| (key, *mode))
    }

    fn request(&self) -> Result<Request> {
        self.request.clone().ok_or_else(|| Error::InvalidArgument {
            reason: "a MultiLock of no keys; check for an empty list before acquiring".to_owned(),
        })
    }

    /// Acquires all the locks (`pg_advisory_lock`), waiting until each of them is available.
    ///
    /// Sends one statement if all are free. Otherwise it waits for each busy key as
    /// [`Lock::acquire`](crate::Lock::acquire) does, and tries the remaining keys in one statement after each grant.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe, as [`Lock::acquire`](crate::Lock::acquire): the locks that were granted are released.
    ///
    /// # Errors
    ///
    /// As for [`Lock::acquire`](crate::Lock::acquire); nothing is held after an error. An error names
    /// the first of the keys. [`Error::Deadlock`] only if other code acquires the same keys in another
    /// order. [`Error::InvalidArgument`] if there are no keys.
    ///
    /// # Panics
    ///
    /// If called outside a tokio runtime.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::MultiLock;
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// let one_way = MultiLock::new(&pool, ["account-1", "account-2"]).acquire().await?;
    /// one_way.release().await?;
    /// let or_the_other = MultiLock::new(&pool, ["account-2", "account-1"]).acquire().await?;
    /// # drop(or_the_other); Ok(()) }
    /// ```
    pub async fn acquire(&mut self) -> Result<MultiGuard> {
        let request = self.request()?;
        self.owner.acquire(&request).await.map(MultiGuard::new)
    }

    /// Acquires all the locks if they are available (`pg_try_advisory_lock`). Returns `None` if another
    /// session holds any of them.
    ///
    /// Whatever the number of keys, sends one statement if it succeeds, and one more if it is refused half-way, to
    /// release the keys that were granted.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe, as [`Lock::try_acquire`](crate::Lock::try_acquire).
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
    /// use pglock::MultiLock;
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// let both = MultiLock::new(&pool, [1, 2]).acquire().await?;
    /// assert!(MultiLock::new(&pool, [2, 3]).try_acquire().await?.is_none());
    /// # drop(both); Ok(()) }
    /// ```
    pub async fn try_acquire(&mut self) -> Result<Option<MultiGuard>> {
        self.try_acquire_for(Duration::ZERO).await
    }

    /// Acquires all the locks, waiting for at most `timeout` in total. Returns `None` after that.
    ///
    /// # Cancel safety
    ///
    /// As for [`acquire`](Self::acquire).
    ///
    /// # Errors
    ///
    /// As for [`Lock::try_acquire_for`](crate::Lock::try_acquire_for).
    ///
    /// # Panics
    ///
    /// If called outside a tokio runtime.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::MultiLock;
    /// use std::time::Duration;
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// let mut accounts = MultiLock::new(&pool, ["account-1", "account-2"]);
    /// let guard = accounts.try_acquire_for(Duration::from_secs(2)).await?;
    /// assert!(guard.is_some());
    /// # Ok(()) }
    /// ```
    pub async fn try_acquire_for(&mut self, timeout: Duration) -> Result<Option<MultiGuard>> {
        let request = self.request()?;
        let held = self.owner.try_acquire_for(&request, timeout).await?;
        Ok(held.map(MultiGuard::new))
    }

    /// Acquires all the locks, waiting until `deadline` in total. Returns `None` after that.
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
    pub async fn try_acquire_until(&mut self, deadline: Instant) -> Result<Option<MultiGuard>> {
        self.try_acquire_for(time_until(deadline)).await
    }

    /// Releases everything that this handle holds, while its guards are still alive. These guards report
    /// [`Error::Lost`] from then on; guards of other handles are not affected.
    ///
    /// # Cancel safety
    ///
    /// As for [`Lock::release_all`](crate::Lock::release_all).
    ///
    /// # Errors
    ///
    /// [`Error::Lost`], or [`Error::NoExclusion`], if the locks were lost before; [`Error::ConnectionBorrowed`] if a
    /// guard's connection stays borrowed for ten seconds.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::MultiLock;
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// let mut locks = MultiLock::new(&pool, [1, 2]);
    /// let guard = locks.acquire().await?;
    /// locks.release_all().await?;
    /// assert!(guard.is_lost());
    /// # Ok(()) }
    /// ```
    pub async fn release_all(&mut self) -> Result<()> {
        match &self.request {
            Some(request) => self.owner.release_all(request.key()).await,
            // A handle without keys can't have acquired anything.
            None => Ok(()),
        }
    }
}

impl Clone for MultiLock {
    /// Makes another handle: it shares the pool, the keys and the options, and holds nothing.
    fn clone(&self) -> Self {
        Self { request: self.request.clone(), owner: self.owner.another() }
    }
}

impl fmt::Debug for MultiLock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MultiLock")
            .field("keys", &self.request.as_ref().map_or(&[][..], Request::locks))
            .field("options", &self.owner.options)
            .finish_non_exhaustive()
    }
}

/// Several locks that are held. Dropping it releases them all.
///
/// # Drop
///
/// As for [`ExclusiveGuard`](crate::ExclusiveGuard); one statement releases all the locks.
///
/// # Examples
///
/// ```
/// use pglock::MultiLock;
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
/// # let pool = pglock_testkit::pool().await;
/// let guard = MultiLock::new(&pool, [1, 2]).acquire().await?;
/// assert_eq!(guard.keys().count(), 2);
/// # Ok(()) }
/// ```
#[must_use = "if unused, the locks are released at once"]
#[clippy::has_significant_drop]
pub struct MultiGuard {
    guard: Guard,
}

impl MultiGuard {
    pub(crate) fn new(guard: Guard) -> Self {
        Self { guard }
    }

    /// Releases the locks (`pg_advisory_unlock`), and waits for the server's answer.
    ///
    /// # Cancel safety
    ///
    /// As for [`Guard::release`].
    ///
    /// # Errors
    ///
    /// As for [`Guard::release`].
    pub async fn release(self) -> Result<()> {
        self.guard.release().await
    }
}

is_guard!(MultiGuard);
into_guard!(MultiGuard);
