//! A permit of a semaphore, held.

#[cfg(doc)]
use crate::error::Error;
use crate::error::Result;
use crate::guard::{Guard, into_guard, is_guard};
use crate::key::Key;

/// A permit of a semaphore that is held. Dropping it releases the permit.
///
/// # Drop
///
/// As for [`ExclusiveGuard`](crate::ExclusiveGuard).
///
/// # Examples
///
/// ```
/// use pglock::Semaphore;
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
/// # let pool = pglock_testkit::pool().await;
/// let printers = Semaphore::new(&pool, "printers", 2)?;
/// let first = printers.acquire().await?;
/// let second = printers.acquire().await?;
/// assert_ne!(first.slot(), second.slot());
/// # Ok(()) }
/// ```
#[must_use = "if unused, the permit is released at once"]
#[clippy::has_significant_drop]
pub struct Permit {
    pub(super) guard: Guard,
    pub(super) slot: usize,
    pub(super) key: Key,
}

impl Permit {
    /// Returns the key of the semaphore.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::{Key, Semaphore};
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// let permit = Semaphore::new(&pool, "printers", 2)?.acquire().await?;
    /// assert_eq!(permit.key(), &Key::from("printers"));
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn key(&self) -> &Key {
        &self.key
    }

    /// Returns the index of the permit, from 0, which no other holder has.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::Semaphore;
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// let permit = Semaphore::new(&pool, "printers", 2)?.acquire().await?;
    /// assert_eq!(permit.slot(), 0);
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn slot(&self) -> usize {
        self.slot
    }

    /// Releases the permit (`pg_advisory_unlock`), and waits for the server's answer.
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

is_guard!(Permit);
into_guard!(Permit);
