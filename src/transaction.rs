//! Transaction-level advisory locks, acquired on a transaction of yours and released by its end.
//!
//! These functions call `pg_advisory_xact_lock` and its variants. There is no guard, because there is
//! nothing to release, and a lock can't be lost while the transaction lives: when the session ends, the
//! server rolls back the transaction and releases its locks together. Use this module where the
//! protected work *is* one transaction. It works behind every pooler, including one in transaction mode.
//!
//! | | waits | waits up to a timeout | never waits |
//! |---|---|---|---|
//! | exclusive | [`acquire`] | [`try_acquire_for`] | [`try_acquire`] |
//! | shared | [`acquire_shared`] | [`try_acquire_shared_for`] | [`try_acquire_shared`] |
//!
//! Transaction-level locks and the session-level locks of [`Lock`](crate::Lock) exclude each other if
//! the keys are equal. Locks are re-entrant within a session: a transaction is excluded neither by a
//! lock that it already holds, nor by a guard whose
//! [`connection`](crate::Guard::connection) it runs on.
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let pool = pglock_testkit::pool().await;
//! # sqlx::raw_sql("CREATE TABLE ledger (amount int)").execute(&pool).await?;
//! use pglock::transaction;
//!
//! let mut tx = pool.begin().await?;
//! transaction::acquire(&mut tx, "ledger").await?;
//! // No other session, on any machine, holds this lock until the commit.
//! sqlx::query("INSERT INTO ledger VALUES (100)").execute(&mut *tx).await?;
//! tx.commit().await?;
//! # Ok(()) }
//! ```
//!
//! # Release
//!
//! The lock is released by the commit or rollback of the transaction. It is released earlier only by a
//! rollback to a savepoint that was set before the acquire, such as the rollback of a nested sqlx
//! transaction. The commit of a nested transaction leaves its locks to the outer one.
//!
//! # Isolation
//!
//! Under `READ COMMITTED`, the default, each statement sees what was committed before the statement
//! began. So a statement after the acquire sees everything that previous holders have committed.
//!
//! **Under `REPEATABLE READ` and `SERIALIZABLE` this does not hold.** There, all statements of a
//! transaction see what was committed before its first statement began, and that may be the statement
//! that waits for the lock. Changes that the previous holder commits during the wait stay invisible until the
//! end of the transaction: a read after the acquire may be stale, and an update of such a row fails with
//! SQLSTATE 40001. Acquire in a `READ COMMITTED` transaction, or acquire a [`Lock`](crate::Lock) first
//! and begin the transaction under its guard.
//!
//! # Settings
//!
//! The timeout is an argument, as with every lock of this crate: a `lock_timeout` or
//! `statement_timeout` of the role, the session or the transaction does not end the wait. Limits on the
//! transaction stay in force: `transaction_timeout`, and `idle_in_transaction_session_timeout`. Setting
//! the latter is recommended with these locks, because it releases the locks of a client that hangs.
//!
//! While a statement waits, these settings are changed for the transaction, and then restored to the
//! transaction's own values:
//!
//! * `lock_timeout` limits the slice, and `statement_timeout` is 0.
//! * `client_connection_check_interval` is 0 (PostgreSQL 14 and later), because each check can write a
//!   line to the server's log. So a client that dies while it waits keeps its place in the server's
//!   queue until the end of the slice.
//! * `log_lock_waits` is off, if the role may set it.
//!
//! # Waiting
//!
//! Waiters queue on the server, in FIFO order. A wait is divided into slices of 54 to 60 seconds, each
//! one message to the server. The length is random, so that waiters don't re-queue in step. A slice is
//! longer if `deadlock_timeout` is: at least `deadlock_timeout` plus a second, so that deadlocks are
//! detected. Between two slices, the waiter goes to the end of the queue: sessions that arrived during
//! the slice may overtake it, at most once per slice.
//!
//! Under `READ COMMITTED`, a wait holds a snapshot no longer than a slice, unless the transaction has
//! written something. A wait that times out leaves the transaction usable and writes nothing to the
//! server's log, by the default settings up to PostgreSQL 18. With `log_lock_waits` on, and a role that may
//! not turn it off, the server logs a "still waiting" line per wait and slice, and before PostgreSQL 19
//! another whenever something wakes the waiting process. With `log_min_duration_statement`, a slice that
//! takes longer is logged: see [operations](crate::guide::operations#the-server). In `pg_stat_statements`,
//! waits have a fixed number of entries, independent of keys and timeouts.
//!
//! A wait runs in a PL/pgSQL block. For a role that may not use PL/pgSQL, or if the language was dropped,
//! the wait is a plain function call after a `SAVEPOINT`. The result is the same, but the server logs one
//! error when it refuses the block, and one more for each slice that ends without a grant.
//! [`doctor`](crate::doctor) reports that.
//!
//! # Cancel safety
//!
//! If a future of this module is dropped, its statement keeps running on your connection, as with every
//! query of sqlx. Whether the transaction holds the lock is then unknown until the transaction ends; its
//! end releases the lock. Nothing is logged.
//!
//! **A wait that is dropped delays the next use of the connection**, including the rollback, until the
//! lock is granted or the slice ends: up to a minute. The connection is missing from the pool for that
//! time. No other connection is at hand through which the wait could be cancelled. To limit a wait, call
//! [`try_acquire_for`] instead of wrapping [`acquire`] in a timeout.
//!
//! # Errors
//!
//! Contention is not an error: the `try_` functions return `false`. After an error from the server the
//! transaction has failed and can only be rolled back. It then holds no lock.
//!
//! * [`Error::Deadlock`] if two transactions waited for each other. Retry the transaction, and acquire in
//!   the same order everywhere. A wait whose timeout is shorter than the server's `deadlock_timeout` (1 s
//!   by default) returns `false` instead.
//! * [`Error::Standby`] if the server is a hot standby. The transaction has not failed. There is no
//!   option to allow it, as [`LockOptions::allow_standby`](crate::LockOptions::allow_standby) does for
//!   other locks.
//! * [`Error::OutOfLocks`] if the server's lock table is full.
//! * [`Error::Cancelled`] if the statement was cancelled.
//! * [`Error::Disconnected`] if the connection broke, or if the server does not answer: half a second after the timeout
//!   of the call; without a timeout, ten seconds after the statement, or after its slice.
//! * [`Error::Database`] for all other errors, for example because the transaction had failed before.

use std::hash::{BuildHasher, RandomState};
use std::io;
use std::time::{Duration, Instant};

use sqlx::{Postgres, Transaction};
use tokio::time::timeout_at;

use crate::error::{Error, Result};
use crate::key::Key;
use crate::mode::Mode;
use crate::session::{DEADLINE, within};
use crate::sql::transaction::{self as statements, Tried};

/// The maximum time for which one statement waits, and holds its snapshot.
const SLICE: Duration = Duration::from_mins(1);

/// The maximum time by which a slice is shortened at random, in milliseconds.
const JITTER: u64 = 6000;

/// How long a deadlock check may take after `deadlock_timeout`.
const DEADLOCK_CHECK: Duration = Duration::from_secs(1);

/// How long a bounded call waits for the server's answer after its timeout.
const GRACE: Duration = Duration::from_millis(500);

/// Acquires the lock exclusively (`pg_advisory_xact_lock`), waiting until it is available.
///
/// Sends one statement if the lock is free (`pg_try_advisory_xact_lock`), and one message per minute of
/// waiting otherwise: see [Waiting](self#waiting).
///
/// # Cancel safety
///
/// If the future is dropped while it waits, the connection stays busy until the lock is granted or the
/// slice ends, up to a minute: see [the module](self#cancel-safety).
///
/// # Errors
///
/// See [the module](self#errors).
///
/// # Panics
///
/// If called outside a tokio runtime.
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

/// Acquires the lock exclusively if it is free (`pg_try_advisory_xact_lock`). Returns `false` otherwise.
///
/// Sends one statement. Returns `false` also while others wait for the lock, because it does not
/// overtake them.
///
/// # Cancel safety
///
/// If the future is dropped, the transaction may hold the lock until it ends.
///
/// # Errors
///
/// See [the module](self#errors). There is no deadlock, because the call does not wait.
///
/// # Panics
///
/// If called outside a tokio runtime.
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
///     // No other session holds this lock until the commit.
/// }
/// tx.commit().await?;
/// # Ok(()) }
/// ```
#[must_use = "`false` means that another session holds the lock"]
pub async fn try_acquire(tx: &mut Transaction<'_, Postgres>, key: impl Into<Key>) -> Result<bool> {
    try_now(tx, &key.into(), Mode::Exclusive).await
}

/// Acquires the lock exclusively, waiting for at most `timeout`. Returns `false` if it times out.
///
/// The server ends the wait (`lock_timeout`), so the transaction stays usable after a timeout. The
/// server counts in milliseconds, and rounds a timeout of zero to a single try.
///
/// # Cancel safety
///
/// If the future is dropped while it waits, the connection stays busy until the lock is granted or the
/// slice ends, up to a minute but never longer than `timeout`: see [the module](self#cancel-safety).
///
/// # Errors
///
/// See [the module](self#errors).
///
/// # Panics
///
/// If called outside a tokio runtime.
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
#[must_use = "`false` means that another session holds the lock"]
pub async fn try_acquire_for(
    tx: &mut Transaction<'_, Postgres>,
    key: impl Into<Key>,
    timeout: Duration,
) -> Result<bool> {
    wait_until(tx, &key.into(), Mode::Exclusive, timeout).await
}

/// Acquires the lock shared (`pg_advisory_xact_lock_shared`), waiting until it is available.
///
/// Waits while another session holds the lock exclusively, or waits for it exclusively and came
/// earlier. Sends the same statements as [`acquire`].
///
/// # Cancel safety
///
/// If the future is dropped while it waits, the connection stays busy until the lock is granted or the
/// slice ends, up to a minute: see [the module](self#cancel-safety).
///
/// # Errors
///
/// See [the module](self#errors).
///
/// # Panics
///
/// If called outside a tokio runtime.
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

/// Acquires the lock shared if no other session holds it exclusively
/// (`pg_try_advisory_xact_lock_shared`). Returns `false` otherwise.
///
/// Sends one statement. Returns `false` also while others wait for the lock exclusively.
///
/// # Cancel safety
///
/// If the future is dropped, the transaction may hold the lock until it ends.
///
/// # Errors
///
/// See [the module](self#errors). There is no deadlock, because the call does not wait.
///
/// # Panics
///
/// If called outside a tokio runtime.
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
#[must_use = "`false` means that another session holds the lock"]
pub async fn try_acquire_shared(
    tx: &mut Transaction<'_, Postgres>,
    key: impl Into<Key>,
) -> Result<bool> {
    try_now(tx, &key.into(), Mode::Shared).await
}

/// Acquires the lock shared, waiting for at most `timeout`. Returns `false` if it times out.
///
/// The server ends the wait (`lock_timeout`), so the transaction stays usable after a timeout.
///
/// # Cancel safety
///
/// If the future is dropped while it waits, the connection stays busy until the lock is granted or the
/// slice ends, up to a minute but never longer than `timeout`: see [the module](self#cancel-safety).
///
/// # Errors
///
/// See [the module](self#errors).
///
/// # Panics
///
/// If called outside a tokio runtime.
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
/// let timeout = Duration::from_millis(200);
/// assert!(transaction::try_acquire_shared_for(&mut tx, "ledger", timeout).await?);
/// # Ok(()) }
/// ```
#[must_use = "`false` means that another session holds the lock"]
pub async fn try_acquire_shared_for(
    tx: &mut Transaction<'_, Postgres>,
    key: impl Into<Key>,
    timeout: Duration,
) -> Result<bool> {
    wait_until(tx, &key.into(), Mode::Shared, timeout).await
}

async fn wait_for(tx: &mut Transaction<'_, Postgres>, key: &Key, mode: Mode) -> Result<()> {
    // Without a deadline, `queue` never returns `false`.
    queue(tx, key, mode, None).await.map(drop)
}

async fn wait_until(
    tx: &mut Transaction<'_, Postgres>,
    key: &Key,
    mode: Mode,
    timeout: Duration,
) -> Result<bool> {
    // A deadline that can't be represented is no limit.
    let Some(deadline) = Instant::now().checked_add(timeout) else {
        return wait_for(tx, key, mode).await.map(|()| true);
    };
    let queued = timeout_at((deadline + GRACE).into(), queue(tx, key, mode, Some(deadline)));
    queued.await.unwrap_or_else(|_| {
        let silence = io::Error::new(io::ErrorKind::TimedOut, "the server does not answer");
        Err(Error::acquiring(key, silence.into()))
    })
}

/// Tries once, and then waits in the server's queue, slice by slice.
async fn queue(
    tx: &mut Transaction<'_, Postgres>,
    key: &Key,
    mode: Mode,
    deadline: Option<Instant>,
) -> Result<bool> {
    let Some(deadlock_timeout) = try_once(tx, key, mode).await? else { return Ok(true) };
    let mut plainly = false;
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            return Ok(false);
        }
        let jitter = Duration::from_millis(RandomState::new().hash_one(()) % JITTER);
        let slice = slice(deadlock_timeout, jitter);
        let limit = left.map_or(slice, |left| left.min(slice));
        let waiting = statements::wait(tx, key.id(), mode, limit, &mut plainly);
        let waited = within(limit.saturating_add(DEADLINE), waiting).await;
        if waited.map_err(|error| Error::acquiring(key, error))? {
            return Ok(true);
        }
    }
}

/// Returns the length of a slice. One that is shorter than `deadlock_timeout` would end before each deadlock check.
fn slice(deadlock_timeout: Duration, jitter: Duration) -> Duration {
    SLICE.saturating_sub(jitter).max(deadlock_timeout + DEADLOCK_CHECK)
}

async fn try_now(tx: &mut Transaction<'_, Postgres>, key: &Key, mode: Mode) -> Result<bool> {
    Ok(try_once(tx, key, mode).await?.is_none())
}

/// Tries to acquire the lock. Returns the server's `deadlock_timeout` if the lock is busy.
async fn try_once(
    tx: &mut Transaction<'_, Postgres>,
    key: &Key,
    mode: Mode,
) -> Result<Option<Duration>> {
    match within(DEADLINE, statements::try_lock(tx, key.id(), mode)).await {
        Ok(Tried::Busy { deadlock_timeout }) => Ok(Some(deadlock_timeout)),
        Ok(Tried::Granted) => Ok(None),
        Ok(Tried::Standby) => Err(Error::Standby { key: key.clone() }),
        Err(error) => Err(Error::acquiring(key, error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slice_lasts_a_minute_and_is_longer_than_the_deadlock_timeout() {
        let seconds = Duration::from_secs;
        for (deadlock_timeout, jitter, expected) in
            [(1, 0, 60), (1, 6, 54), (20, 6, 54), (58, 0, 60), (58, 6, 59), (90, 0, 91)]
        {
            assert_eq!(slice(seconds(deadlock_timeout), seconds(jitter)), seconds(expected));
        }
    }
}
