//! The guards of a lock: it is held for as long as one lives.

use crate::error::{Error, Loss, Result};
use crate::held::{Held, methods};
use crate::key::Key;
use crate::lock::Lock;
use crate::mode::Mode;
use crate::request::Request;

/// What the two guards have in common. They differ in name so that a signature can demand one.
macro_rules! guard {
    ($Guard:ident, $make:literal) => {
        impl $Guard {
            pub(crate) fn new(held: Held) -> Self {
                Self { held }
            }

            /// Returns the key of the lock.
            ///
            /// # Examples
            ///
            /// ```
            /// # use pglock::{Key, Lock};
            /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
            /// # let pool = pglock_testkit::pool().await;
            #[doc = concat!("let guard = ", $make, ";")]
            /// assert_eq!(guard.key(), &Key::from("invoice-17"));
            /// # Ok(()) }
            /// ```
            #[must_use]
            pub fn key(&self) -> &Key {
                self.held.key()
            }

            /// Makes a handle of another lock, or the same one, on the session of this guard.
            ///
            /// Acquires on handles of different sessions can deadlock without being detected, because
            /// the server does not know that the sessions belong to one program. On one session the
            /// server detects the deadlock within its `deadlock_timeout`, and one side gets
            /// [`Error::Deadlock`](crate::Error::Deadlock). (To avoid deadlocks altogether, acquire locks
            /// in the same order everywhere, or several at once with [`MultiLock`](crate::MultiLock).)
            ///
            /// Locks are re-entrant within the session. The session ends with its last guard; after that,
            /// the handle opens a session of its own. While the handle waits for a busy lock, the session's
            /// connection is in use: borrowing it, and releases of other guards, wait for the end of
            /// the slice, at most 5 s (or `deadlock_timeout` plus a second, if that is longer). If the
            /// session is lost, all its guards are.
            ///
            /// # Examples
            ///
            /// ```
            /// # use pglock::Lock;
            /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
            /// # let pool = pglock_testkit::pool().await;
            #[doc = concat!("let guard = ", $make, ";")]
            /// let customer = guard.lock("customer-4").acquire().await?;
            /// assert_eq!(customer.backend_pid(), guard.backend_pid());
            /// # Ok(()) }
            /// ```
            #[must_use]
            pub fn lock(&self, key: impl Into<Key>) -> Lock {
                Lock::with_owner(key.into(), self.held.owner())
            }
        }

        methods!($Guard, release, "Lock", $make);
    };
}

/// An exclusive lock that is held. Dropping it releases the lock.
///
/// # Drop
///
/// Starts the release and returns immediately; usually the unlock was sent by then. To wait for the
/// server's answer, use [`release`](Self::release). A guard may be dropped anywhere: on a thread
/// without a runtime, after its runtime was shut down, during a panic. The connection goes back to
/// the pool when the server has confirmed the unlock, and is closed otherwise.
///
/// If the process dies, the server releases the lock as soon as it detects the closed connection.
///
/// # Examples
///
/// ```
/// use pglock::Lock;
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
/// # let pool = pglock_testkit::pool().await;
/// let mut lock = Lock::new(&pool, "nightly-report");
/// {
///     let _guard = lock.acquire().await?;
///     // No other task runs this, on any machine.
/// }
/// # Ok(()) }
/// ```
#[must_use = "if unused, the lock is released at once"]
#[clippy::has_significant_drop]
pub struct ExclusiveGuard {
    held: Held,
}

impl ExclusiveGuard {
    /// Turns the exclusive lock into a shared one, without releasing it in between.
    ///
    /// Waiters that want to share the lock are granted it then. If other guards of the same handle hold
    /// it exclusively, it stays exclusive until the last of them is dropped. Sends one statement, or none.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future releases the lock, because the guard is consumed.
    ///
    /// # Errors
    ///
    /// [`Error::Lost`] if the session no longer held the lock; [`Error::Borrowed`] if the session's
    /// connection stays borrowed for ten seconds.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::Lock;
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// let mut lock = Lock::new(&pool, "app-config");
    /// let mut reader = lock.clone();
    /// let writing = lock.acquire().await?;
    /// // Change the configuration, then go on to read what was written.
    /// let _reading = writing.downgrade().await?;
    /// let _another = reader.acquire_shared().await?;
    /// # Ok(()) }
    /// ```
    pub async fn downgrade(self) -> Result<SharedGuard> {
        let request = Request::one(self.held.key(), Mode::Shared);
        // What is held exclusively covers it, so this sends nothing, and is not refused.
        let shared = self.held.and(&request).await?;
        self.held.release().await?;
        shared.map(SharedGuard::new).ok_or_else(|| Error::lost(request.key(), Loss::NotHeld))
    }
}

guard! { ExclusiveGuard, "Lock::new(&pool, \"invoice-17\").acquire().await?" }

/// A shared lock that is held. Dropping it releases the lock.
///
/// Other sessions may hold the same lock shared at the same time; none holds it exclusively.
///
/// # Drop
///
/// As for [`ExclusiveGuard`].
///
/// # Examples
///
/// ```
/// use pglock::Lock;
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
/// # let pool = pglock_testkit::pool().await;
/// let mut lock = Lock::new(&pool, "app-config");
/// let mut other = lock.clone();
///
/// let _reader = lock.acquire_shared().await?;
/// let _another = other.acquire_shared().await?;
/// # Ok(()) }
/// ```
#[must_use = "if unused, the lock is released at once"]
#[clippy::has_significant_drop]
pub struct SharedGuard {
    held: Held,
}

impl SharedGuard {
    /// Turns the shared lock into an exclusive one if no other session holds it, without releasing it
    /// in between. Otherwise returns the guard.
    ///
    /// Before PostgreSQL 17, it is also refused while another session waits for the lock; from then on,
    /// it goes ahead of those.
    ///
    /// It never waits for the lock, because two holders that wait for each other's share would
    /// deadlock. Sends one statement.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future releases the lock, because the guard is consumed.
    ///
    /// # Errors
    ///
    /// As for [`Lock::try_acquire`], and [`Error::Borrowed`] if the session's connection stays borrowed
    /// for ten seconds. After an error this guard's share is released.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::Lock;
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// let reading = Lock::new(&pool, "app-config").acquire_shared().await?;
    /// match reading.try_upgrade().await? {
    ///     Ok(_writing) => { /* no other session reads or writes */ }
    ///     Err(_reading) => { /* another one reads, and this still does */ }
    /// }
    /// # Ok(()) }
    /// ```
    pub async fn try_upgrade(self) -> Result<std::result::Result<ExclusiveGuard, Self>> {
        let request = Request::one(self.held.key(), Mode::Exclusive);
        let exclusive = self.held.and(&request).await?;
        Ok(exclusive.map(ExclusiveGuard::new).ok_or(self))
    }
}

guard! { SharedGuard, "Lock::new(&pool, \"invoice-17\").acquire_shared().await?" }
