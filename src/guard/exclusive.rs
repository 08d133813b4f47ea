//! The guard of an exclusive lock.

use super::{Guard, SharedGuard, into_guard, is_guard};
use crate::error::{Error, Loss, Result};
use crate::key::Key;
use crate::mode::Mode;
use crate::request::Request;

/// An exclusive lock that is held. Dropping it releases the lock.
///
/// # Drop
///
/// Starts the release and returns immediately; usually the unlock has been sent by then. To wait for the
/// server's answer, use [`release`](Self::release). A guard may be dropped anywhere: on a thread
/// without a runtime, after its runtime was shut down, during a panic. The connection returns to
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
    guard: Guard,
}

impl ExclusiveGuard {
    pub(crate) fn new(guard: Guard) -> Self {
        Self { guard }
    }

    /// Turns the exclusive lock into a shared one, without releasing it in between.
    ///
    /// Waiters for the shared lock are then granted it. If other guards of the same handle hold the lock
    /// exclusively, it stays exclusive until the last of them is dropped. Sends one statement, or none.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future releases the lock, because the guard is consumed.
    ///
    /// # Errors
    ///
    /// [`Error::Lost`], or [`Error::NoExclusion`], if the session no longer held the lock;
    /// [`Error::ConnectionBorrowed`] if the session's connection stays borrowed for ten seconds.
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
        let request = Request::one(self.guard.key(), Mode::Shared);
        // The exclusive lock covers the shared one, so this sends nothing, and is not refused.
        let shared = self.guard.and(&request).await?;
        self.guard.release().await?;
        shared.map(SharedGuard::new).ok_or_else(|| Error::lost(request.key(), Loss::NotHeld))
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

is_guard!(ExclusiveGuard);
into_guard!(ExclusiveGuard);
