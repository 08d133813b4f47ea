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

            /// Makes a handle of another lock, or the same, on the session of this guard.
            ///
            /// Acquires on handles of different sessions can wait for each other in a circle for ever,
            /// for the server does not know that they belong to one program. On one session it sees
            /// the circle, and one side gets [`Error::Deadlock`](crate::Error::Deadlock), within the
            /// server's `deadlock_timeout`. (Better still, have no circles: take locks in the same
            /// order everywhere, or several at once with [`MultiLock`](crate::MultiLock).)
            ///
            /// All guards of a session are one owner: the same key stacks, and the session ends with
            /// the last of them; after that, the handle opens one of its own. While it waits for a
            /// busy lock, the session's connection can't be lent, and releases of its other guards
            /// take effect at the end of the wait's slice. If the session is lost, all are.
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
/// Starts the release and returns at once; mostly the unlock is on its way to the server by
/// then. To wait for the server's answer, use [`release`](Self::release). A guard may be dropped
/// anywhere: on a thread without a runtime, after the runtime is gone, during a panic. The
/// connection goes back to the pool when the server has confirmed the unlock, and is closed
/// otherwise.
///
/// If the process dies, the server releases the lock as soon as it sees the connection closed.
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
///     // Nobody else runs this, on any machine.
/// }
/// # Ok(()) }
/// ```
#[must_use = "if unused, the lock is released at once"]
#[clippy::has_significant_drop]
pub struct ExclusiveGuard {
    held: Held,
}

impl ExclusiveGuard {
    /// Turns the exclusive lock into a shared one, without a moment in which nobody holds it.
    ///
    /// Others that wait to share the lock get it then. If other guards of the same handle hold it
    /// exclusively, it stays exclusive until the last of them goes. One statement, or none.
    ///
    /// # Cancel safety
    ///
    /// The guard is used up: dropping the future releases the lock.
    ///
    /// # Errors
    ///
    /// [`Error::Lost`] if the session did not hold the lock any more.
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
/// Others may hold the same lock shared at the same time; nobody holds it exclusively.
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
    /// Turns the shared lock into an exclusive one if nobody else holds it, without a moment in which
    /// it is not held. Else gives the guard back.
    ///
    /// Before PostgreSQL 17, it is also refused while somebody waits for the lock; from then on, it goes
    /// ahead of those.
    ///
    /// It never waits: two that share a lock and wait to have it alone would wait for each other. One
    /// statement.
    ///
    /// # Cancel safety
    ///
    /// The guard is used up: dropping the future releases the lock.
    ///
    /// # Errors
    ///
    /// As for [`Lock::try_acquire`]. After an error this guard's share is given up.
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
    ///     Ok(_writing) => { /* nobody else reads or writes */ }
    ///     Err(_reading) => { /* somebody does, and this still reads */ }
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
