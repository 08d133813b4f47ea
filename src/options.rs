//! How a lock behaves: the settings that have a good default.

use std::time::Duration;

use sqlx::PgPool;

use crate::error::{Error, Result};
use crate::key::Key;
use crate::lock::Lock;

/// Settings of a lock, each with a default that suits most.
///
/// # Examples
///
/// ```
/// use pglock::LockOptions;
/// use std::time::Duration;
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
/// # let pool = pglock_testkit::pool().await;
/// let mut lock = LockOptions::new().wait_slice(Duration::from_secs(10)).lock(&pool, "migrate")?;
/// let guard = lock.acquire().await?;
/// # drop(guard); Ok(()) }
/// ```
#[expect(missing_copy_implementations, reason = "settings to come need not be Copy")]
#[derive(Clone, Debug)]
pub struct LockOptions {
    wait_slice: Duration,
}

impl LockOptions {
    /// Returns the default settings.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// use pglock::{Lock, LockOptions};
    ///
    /// let one = LockOptions::new().lock(&pool, 7)?;
    /// let same = Lock::new(&pool, 7);
    /// # let _ = (one, same); Ok(()) }
    /// ```
    #[must_use]
    pub fn new() -> Self {
        Self { wait_slice: Duration::from_secs(5) }
    }

    /// Sets for how long one statement waits for a busy lock. Default: 5 s; from 2 s to 1 h.
    ///
    /// A wait is made of slices, because a statement that waits holds a snapshot, which keeps
    /// `VACUUM` and `CREATE INDEX CONCURRENTLY` waiting in turn. Within a slice the waiter keeps its
    /// place in the server's queue; between two slices it goes to the end. A longer slice is fairer,
    /// a shorter one holds others up less.
    ///
    /// A slice always lasts one second longer than the server's `deadlock_timeout`, however short
    /// it is set, so that deadlocks are found.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::LockOptions;
    /// use std::time::Duration;
    ///
    /// let options = LockOptions::new().wait_slice(Duration::from_secs(30));
    /// # let _ = options;
    /// ```
    #[must_use]
    pub fn wait_slice(mut self, wait_slice: Duration) -> Self {
        self.wait_slice = wait_slice;
        self
    }

    /// Makes a lock with these settings. Sends nothing to the server.
    ///
    /// # Errors
    ///
    /// [`Error::Options`] if a setting is out of its range; the message says which, and the range.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::LockOptions;
    /// use std::time::Duration;
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() {
    /// # let pool = pglock_testkit::pool().await;
    /// let error = LockOptions::new().wait_slice(Duration::ZERO).lock(&pool, 7).unwrap_err();
    /// assert_eq!(error.to_string(), "lock 7: wait_slice is 0ns; it must be from 2s to 3600s");
    /// # }
    /// ```
    pub fn lock(&self, pool: &PgPool, key: impl Into<Key>) -> Result<Lock> {
        const SHORTEST: Duration = Duration::from_secs(2);
        const LONGEST: Duration = Duration::from_hours(1);

        let key = key.into();
        if !(SHORTEST..=LONGEST).contains(&self.wait_slice) {
            let reason = format!(
                "wait_slice is {:?}; it must be from {SHORTEST:?} to {LONGEST:?}",
                self.wait_slice
            );
            return Err(Error::Options { key, reason });
        }
        Ok(Lock::with_options(pool, key, self.clone()))
    }

    pub(crate) fn slice(&self) -> Duration {
        self.wait_slice
    }
}

impl Default for LockOptions {
    fn default() -> Self {
        Self::new()
    }
}
