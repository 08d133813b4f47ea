//! Where the sessions of a handle come from.

use std::sync::Arc;

use sqlx::PgPool;

use crate::options::{ConfiguredPool, LockOptions};
use crate::owner::Owner;

/// A source of the sessions that hold a handle's locks: the first argument of each constructor.
///
/// | source | what [`Lock`](crate::Lock) and [`MultiLock`](crate::MultiLock) hold their locks on |
/// |---|---|
/// | [`PgPool`] | a connection of the pool for each handle that holds, and for each key that is waited for |
/// | [`ConfiguredPool`] | the same, with [`LockOptions`] |
/// | [`LockManager`](crate::LockManager) | for `Lock`, one connection for all that the manager holds; for `MultiLock`, as for the manager's pool |
/// | [`Guard`](crate::Guard), and each type of guard | the session of that guard |
///
/// A [`Semaphore`](crate::Semaphore), an [`Election`](crate::Election) and a
/// [`LockManager`](crate::LockManager) always open sessions of their own, in the pool of their source.
///
/// # The session of a guard
///
/// Acquires on handles of different sessions can deadlock without being detected, because the server can't tell that
/// the sessions belong to one program. On one session, the server detects the deadlock within its
/// `deadlock_timeout`, and one side gets [`Error::Deadlock`](crate::Error::Deadlock). (To avoid deadlocks
/// altogether, acquire locks in the same order everywhere, or several at once with
/// [`MultiLock`](crate::MultiLock).)
///
/// Locks are re-entrant within the session: two handles made from one guard don't exclude each other, so don't give
/// that guard to two tasks. (Handles made from a guard of a [`LockManager`](crate::LockManager) exclude each other. So
/// do clones and calls of [`run`](crate::Lock::run), which use sessions of their own.) The session ends with its last
/// guard; after that, the handle opens a session of its own. While the handle waits for a busy lock, the session's
/// connection is in use: calls that borrow it, and releases of other guards, wait for the end of the slice, at most 5 s
/// (or `deadlock_timeout` plus a second, if that is longer). If the session is lost, all its guards are lost.
///
/// # Examples
///
/// ```
/// use pglock::{Lock, LockManager, LockOptions};
/// use std::time::Duration;
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
/// # let pool = pglock_testkit::pool().await;
/// let guard = Lock::new(&pool, "invoice-17").acquire().await?;
/// let customer = Lock::new(&guard, "customer-4").acquire().await?;
/// assert_eq!(customer.backend_pid(), guard.backend_pid());
///
/// let manager = LockManager::new(&pool);
/// let _invoice = Lock::new(&manager, "invoice-18").acquire().await?;
///
/// let configured = LockOptions::new().wait_slice(Duration::from_secs(10)).on(&pool)?;
/// let _report = Lock::new(&configured, "nightly-report").acquire().await?;
/// # Ok(()) }
/// ```
///
/// A handle is not a guard, and nothing that is called `lock` returns one:
///
/// ```compile_fail,E0599
/// # async fn f(pool: sqlx::PgPool) {
/// let manager = pglock::LockManager::new(&pool);
/// let _guard = manager.lock("invoice-17"); // error: no method named `lock`
/// # }
/// ```
pub trait Source: sealed::Sealed {}

impl<S: sealed::Sealed + ?Sized> Source for S {}

pub(crate) mod sealed {
    use crate::owner::Owner;

    #[expect(unnameable_types, reason = "so nothing else can implement it")]
    pub trait Sealed {
        /// Returns an owner that holds nothing.
        fn owner(&self) -> Owner;
    }
}

impl sealed::Sealed for PgPool {
    fn owner(&self) -> Owner {
        Owner::new(self, LockOptions::new())
    }
}

impl<S: sealed::Sealed + ?Sized> sealed::Sealed for &S {
    fn owner(&self) -> Owner {
        (**self).owner()
    }
}

impl<S: sealed::Sealed + ?Sized> sealed::Sealed for Arc<S> {
    fn owner(&self) -> Owner {
        (**self).owner()
    }
}

impl sealed::Sealed for ConfiguredPool {
    fn owner(&self) -> Owner {
        Owner::new(&self.pool, self.options.clone())
    }
}
