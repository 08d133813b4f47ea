//! The guard of a shared lock.

use super::{ExclusiveGuard, Guard, into_guard, is_guard};
#[cfg(doc)]
use crate::error::Error;
use crate::error::Result;
use crate::key::Key;
#[cfg(doc)]
use crate::lock::Lock;
use crate::mode::Mode;
use crate::request::Request;

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
    guard: Guard,
}

impl SharedGuard {
    pub(crate) fn new(guard: Guard) -> Self {
        Self { guard }
    }

    /// Turns the shared lock into an exclusive one if no other session holds it, without releasing it
    /// in between. Otherwise returns the guard.
    ///
    /// Before PostgreSQL 17, the upgrade is also refused while another session waits for the lock; from PostgreSQL 17
    /// on, it overtakes such waiters.
    ///
    /// The upgrade never waits for the lock, because two holders that wait for each other's share would
    /// deadlock. Sends one statement.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future releases the lock, because the guard is consumed.
    ///
    /// # Errors
    ///
    /// As for [`Lock::try_acquire`], and [`Error::ConnectionBorrowed`] if the session's connection stays borrowed
    /// for ten seconds. After an error this guard's share is released.
    ///
    /// # Panics
    ///
    /// If called outside a tokio runtime.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::{Lock, Upgrade};
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// let reading = Lock::new(&pool, "app-config").acquire_shared().await?;
    /// match reading.try_upgrade().await? {
    ///     Upgrade::Upgraded(_writing) => { /* no other session reads or writes */ }
    ///     Upgrade::Refused(_reading) => { /* another one reads, and this still does */ }
    /// }
    /// # Ok(()) }
    /// ```
    pub async fn try_upgrade(self) -> Result<Upgrade> {
        let request = Request::one(self.guard.key(), Mode::Exclusive);
        let exclusive = self.guard.and(&request).await?;
        Ok(match exclusive {
            Some(exclusive) => Upgrade::Upgraded(ExclusiveGuard::new(exclusive)),
            None => Upgrade::Refused(self),
        })
    }

    /// Releases this guard's share of the lock (`pg_advisory_unlock`), and waits for the server's answer.
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

    /// Returns the key of the lock.
    #[must_use]
    pub fn key(&self) -> &Key {
        self.guard.key()
    }
}

is_guard!(SharedGuard);
into_guard!(SharedGuard);

/// The result of [`SharedGuard::try_upgrade`].
#[derive(Debug)]
#[must_use = "if unused, the lock is released at once"]
#[clippy::has_significant_drop]
#[expect(clippy::exhaustive_enums, reason = "there is no third outcome")]
pub enum Upgrade {
    /// The lock is held exclusively.
    Upgraded(ExclusiveGuard),
    /// The upgrade was refused: another session holds the lock too or, before PostgreSQL 17, waits for it. This guard
    /// still holds it shared.
    Refused(SharedGuard),
}
