//! Locks that end with the transaction: taken on one of yours, released by its commit or rollback.
//!
//! There is no guard, for there is nothing to release, and nothing can be lost: when the session ends,
//! the server rolls the transaction back and frees its locks in one. So this is the better tool where
//! the work *is* one transaction. It works behind every pooler, one in transaction mode included.
//!
//! | | waits | waits so long | never waits |
//! |---|---|---|---|
//! | exclusive | [`acquire`] | [`try_acquire_for`] | [`try_acquire`] |
//! | shared | [`acquire_shared`] | [`try_acquire_shared_for`] | [`try_acquire_shared`] |
//!
//! Whoever holds the same key excludes whoever else wants it, be it with a transaction or with a
//! [`Lock`](crate::Lock). The owner is the session: a transaction is not excluded by what it holds
//! already, nor by a guard whose [`connection`](crate::ExclusiveGuard::connection) it runs on.
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let pool = pglock_testkit::pool().await;
//! # sqlx::raw_sql("CREATE TABLE ledger (amount int)").execute(&pool).await?;
//! use pglock::transaction;
//!
//! let mut tx = pool.begin().await?;
//! transaction::acquire(&mut tx, "ledger").await?;
//! // Nobody else is in here, on any machine, until the commit.
//! sqlx::query("INSERT INTO ledger VALUES (100)").execute(&mut *tx).await?;
//! tx.commit().await?;
//! # Ok(()) }
//! ```
//!
//! # When it is released
//!
//! By the commit or rollback of the transaction. Nothing else releases it, but one thing: rolling back
//! to a savepoint, such as that of a nested sqlx transaction, releases what was acquired after it. A
//! nested transaction that commits leaves its locks to the outer one.
//!
//! # Isolation
//!
//! Under `READ COMMITTED`, the default, every statement sees what was committed before it began. So what
//! is read after the lock was acquired includes all that its previous holders have committed.
//!
//! **Under `REPEATABLE READ` and `SERIALIZABLE` it does not.** There, all statements of a transaction
//! see what was committed before its first one began, and that may be the very statement that waits for
//! the lock. What the previous holder has committed meanwhile stays invisible, to the end of the
//! transaction: a read after the lock may be stale, and a write to such a row fails with SQLSTATE 40001.
//! Acquire in a transaction that is `READ COMMITTED`; or acquire a [`Lock`](crate::Lock) first, and begin
//! the transaction under its guard.
//!
//! # Settings
//!
//! How long to wait is told by the function that is called, here as with every lock: a `lock_timeout` or
//! `statement_timeout` of the role, the session or the transaction does not end the wait. Both are as
//! they were afterwards. Limits on the whole transaction stay in force: `transaction_timeout`, and
//! `idle_in_transaction_session_timeout`, which is well set where these locks are used, for it frees
//! them from a client that hangs.
//!
//! # Waiting
//!
//! The wait is in the server's queue, in slices: one statement each, of five seconds, or one more than
//! `deadlock_timeout` if that is longer. So under `READ COMMITTED` it holds no snapshot for longer than
//! that, unless the transaction has written something. A wait that runs out leaves the transaction
//! usable, and no line in the server's log.
//!
//! # Cancel safety
//!
//! A future of this module that is dropped leaves its statement running on your connection, as every
//! query of sqlx does. So you don't know whether the transaction holds the lock, until it ends: then it
//! does not.
//!
//! **A wait that is dropped delays whatever the connection is used for next**, the rollback included,
//! by what is left of its slice, or until it is granted. It occupies a connection of the pool for as
//! long. There is no other connection here through which it could be cancelled. To give up after a
//! time, don't wrap [`acquire`] in a timeout, but call [`try_acquire_for`], which leaves nothing
//! behind.
//!
//! # Errors
//!
//! That somebody else holds the lock is `false`. After an error of the server the transaction has
//! failed, and all that it can do is to roll back. Then it holds nothing.
//!
//! * [`Error::Deadlock`] if two transactions waited for each other. Begin anew, and acquire everywhere in
//!   the same order. A wait with a limit shorter than the server's `deadlock_timeout` (1 s) just ends
//!   with `false`.
//! * [`Error::Standby`] if the server is a hot standby. Its transactions write nothing, so there is no
//!   option to allow it, as there is for a [`Lock`](crate::LockOptions::allow_standby); and the
//!   transaction has not failed.
//! * [`Error::OutOfLocks`] and [`Error::Cancelled`] as with every lock.
//! * [`Error::Disconnected`] if the connection broke, or if the server has not answered half a second
//!   after a time that you have set.
//! * [`Error::Database`] for all else: among others, that the transaction had failed before.

use std::io;
use std::time::{Duration, Instant};

use sqlx::{Postgres, Transaction};
use tokio::time::timeout_at;

use crate::error::{Error, Result};
use crate::key::Key;
use crate::mode::Mode;
use crate::sql::{self, WaitLimit};

/// How long one statement waits, and holds its snapshot; and by how much a dropped one is in the way.
const SLICE: Duration = Duration::from_secs(5);

/// How much later than the server a bounded wait gives up, if the server does not answer.
const GRACE: Duration = Duration::from_millis(500);

/// Acquires the lock exclusively, and waits for as long as others hold it.
///
/// Takes one statement if the lock is free.
///
/// # Cancel safety
///
/// A dropped wait goes on for up to a slice, and your connection is busy until then: see
/// [the module](self#cancel-safety).
///
/// # Errors
///
/// See [the module](self#errors).
///
/// # Examples
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let pool = pglock_testkit::pool().await;
/// use pglock::{Lock, transaction};
///
/// let mut tx = pool.begin().await?;
/// transaction::acquire(&mut tx, "ledger").await?;
/// assert!(Lock::new(&pool, "ledger").try_acquire().await?.is_none());
/// tx.commit().await?;
/// assert!(Lock::new(&pool, "ledger").try_acquire().await?.is_some());
/// # Ok(()) }
/// ```
pub async fn acquire(tx: &mut Transaction<'_, Postgres>, key: impl Into<Key>) -> Result<()> {
    wait_for(tx, &key.into(), Mode::Exclusive).await
}

/// Acquires the lock exclusively if that is possible at once. `false` if others hold it.
///
/// Takes one statement. It is also refused while others wait for the lock, which it does not overtake.
///
/// # Cancel safety
///
/// The transaction may have the lock: see [the module](self#cancel-safety).
///
/// # Errors
///
/// See [the module](self#errors); there is no deadlock.
///
/// # Examples
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let pool = pglock_testkit::pool().await;
/// use pglock::transaction;
///
/// let mut tx = pool.begin().await?;
/// if transaction::try_acquire(&mut tx, "ledger").await? {
///     // Nobody else is in here, until the commit.
/// }
/// tx.commit().await?;
/// # Ok(()) }
/// ```
#[must_use = "`false` means that somebody else has the lock"]
pub async fn try_acquire(tx: &mut Transaction<'_, Postgres>, key: impl Into<Key>) -> Result<bool> {
    try_now(tx, &key.into(), Mode::Exclusive).await
}

/// Acquires the lock exclusively, and waits for at most `timeout`. `false` if that passes.
///
/// The server ends the wait itself, so giving up costs nothing, and the transaction goes on.
///
/// # Cancel safety
///
/// As for [`acquire`], but never for longer than `timeout`.
///
/// # Errors
///
/// See [the module](self#errors).
///
/// # Examples
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let pool = pglock_testkit::pool().await;
/// # fn busy() {}
/// use pglock::transaction;
/// use std::time::Duration;
///
/// let mut tx = pool.begin().await?;
/// if !transaction::try_acquire_for(&mut tx, "ledger", Duration::from_secs(2)).await? {
///     return Ok(busy()); // and `tx` is rolled back
/// }
/// tx.commit().await?;
/// # Ok(()) }
/// ```
#[must_use = "`false` means that somebody else has the lock"]
pub async fn try_acquire_for(
    tx: &mut Transaction<'_, Postgres>,
    key: impl Into<Key>,
    timeout: Duration,
) -> Result<bool> {
    wait_until(tx, &key.into(), Mode::Exclusive, timeout).await
}

/// Acquires the lock shared, and waits for as long as others hold it exclusively.
///
/// Who waits for the lock exclusively is ahead of those who come later to share it. Else as
/// [`acquire`].
///
/// # Cancel safety
///
/// As for [`acquire`].
///
/// # Errors
///
/// See [the module](self#errors).
///
/// # Examples
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let pool = pglock_testkit::pool().await;
/// use pglock::transaction;
///
/// let mut reader = pool.begin().await?;
/// let mut another = pool.begin().await?;
/// transaction::acquire_shared(&mut reader, "ledger").await?;
/// transaction::acquire_shared(&mut another, "ledger").await?;
/// # Ok(()) }
/// ```
pub async fn acquire_shared(tx: &mut Transaction<'_, Postgres>, key: impl Into<Key>) -> Result<()> {
    wait_for(tx, &key.into(), Mode::Shared).await
}

/// Acquires the lock shared if that is possible at once. `false` if it is held exclusively.
///
/// Else as [`try_acquire`]: it is also refused while others wait for the lock exclusively.
///
/// # Cancel safety
///
/// As for [`try_acquire`].
///
/// # Errors
///
/// See [the module](self#errors); there is no deadlock.
///
/// # Examples
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let pool = pglock_testkit::pool().await;
/// use pglock::transaction;
///
/// let mut writer = pool.begin().await?;
/// let mut reader = pool.begin().await?;
/// transaction::acquire(&mut writer, "ledger").await?;
/// assert!(!transaction::try_acquire_shared(&mut reader, "ledger").await?);
/// # Ok(()) }
/// ```
#[must_use = "`false` means that somebody else has the lock"]
pub async fn try_acquire_shared(
    tx: &mut Transaction<'_, Postgres>,
    key: impl Into<Key>,
) -> Result<bool> {
    try_now(tx, &key.into(), Mode::Shared).await
}

/// Acquires the lock shared, and waits for at most `timeout`. `false` if that passes.
///
/// Else as [`try_acquire_for`].
///
/// # Cancel safety
///
/// As for [`try_acquire_for`].
///
/// # Errors
///
/// See [the module](self#errors).
///
/// # Examples
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let pool = pglock_testkit::pool().await;
/// use pglock::transaction;
/// use std::time::Duration;
///
/// let mut tx = pool.begin().await?;
/// let patience = Duration::from_millis(200);
/// assert!(transaction::try_acquire_shared_for(&mut tx, "ledger", patience).await?);
/// # Ok(()) }
/// ```
#[must_use = "`false` means that somebody else has the lock"]
pub async fn try_acquire_shared_for(
    tx: &mut Transaction<'_, Postgres>,
    key: impl Into<Key>,
    timeout: Duration,
) -> Result<bool> {
    wait_until(tx, &key.into(), Mode::Shared, timeout).await
}

async fn wait_for(tx: &mut Transaction<'_, Postgres>, key: &Key, mode: Mode) -> Result<()> {
    // Without a deadline it never ends in `false`.
    while !queue(tx, key, mode, None).await? {}
    Ok(())
}

async fn wait_until(
    tx: &mut Transaction<'_, Postgres>,
    key: &Key,
    mode: Mode,
    timeout: Duration,
) -> Result<bool> {
    // A time too far to count is no limit.
    let Some(deadline) = Instant::now().checked_add(timeout) else {
        return wait_for(tx, key, mode).await.map(|()| true);
    };
    let queued = timeout_at((deadline + GRACE).into(), queue(tx, key, mode, Some(deadline)));
    queued.await.unwrap_or_else(|_| {
        let silence = io::Error::new(io::ErrorKind::TimedOut, "the server does not answer");
        Err(Error::acquiring(key, silence.into()))
    })
}

/// Tries, and then waits in the server's queue, slice by slice.
async fn queue(
    tx: &mut Transaction<'_, Postgres>,
    key: &Key,
    mode: Mode,
    deadline: Option<Instant>,
) -> Result<bool> {
    let mut granted = try_now(tx, key, mode).await?;
    while !granted {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            break;
        }
        let limit = WaitLimit { slice: SLICE, left };
        let waited = sql::wait_transaction(tx, key.id(), mode, limit).await;
        granted = waited.map_err(|error| Error::acquiring(key, error))?;
    }
    Ok(granted)
}

async fn try_now(tx: &mut Transaction<'_, Postgres>, key: &Key, mode: Mode) -> Result<bool> {
    match sql::try_lock_transaction(tx, key.id(), mode).await {
        Ok(Some(granted)) => Ok(granted),
        Ok(None) => Err(Error::Standby { key: key.clone() }),
        Err(error) => Err(Error::acquiring(key, error)),
    }
}
