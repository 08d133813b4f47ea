//! Everything that can go wrong, and what to do about it.

use std::io;
use std::sync::Arc;

use tokio::runtime::is_rt_shutdown_err;

use crate::key::Key;

/// The result of an operation on a lock.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why an operation on a lock failed.
///
/// Contention is never an error: the `try_` methods return `None`. After an error from an acquire, no more is held
/// than before. Every message names the key, or the action that failed, and says what to do; the message of the database or
/// the driver is the [`source`](std::error::Error::source). That is an [`Arc`], because errors can be cloned: to find
/// the [`sqlx::Error`], match the variant, or downcast to `Arc<sqlx::Error>`.
///
/// # Examples
///
/// ```
/// use pglock::{Error, Lock};
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() {
/// # let pool = pglock_testkit::pool().await;
/// pool.close().await;
/// let error = Lock::new(&pool, "nightly-report").acquire().await.unwrap_err();
/// assert!(matches!(error, Error::PoolClosed { .. }));
/// assert!(error.to_string().contains("nightly-report"));
/// assert!(!error.is_transient());
/// # }
/// ```
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The statement was cancelled on the server (SQLSTATE 57014), by `pg_cancel_backend` or a tool that
    /// calls it.
    #[error(
        "lock {key}: the statement was cancelled on the server, by an administrator or a tool; \
         acquire again if the lock is still wanted"
    )]
    #[non_exhaustive]
    Cancelled {
        /// The key of the lock.
        key: Key,
        /// The server's error.
        source: Arc<sqlx::Error>,
    },

    /// No connection could be opened: the server is unreachable, or rejects the login.
    #[error(
        "lock {key}: cannot connect to the server; check its address, that it runs, and the login"
    )]
    #[non_exhaustive]
    Connect {
        /// The key of the lock.
        key: Key,
        /// The error of the driver or the server.
        source: Arc<sqlx::Error>,
    },

    /// The session's connection is borrowed ([`connection`](crate::Guard::connection)), and was not returned within ten
    /// seconds.
    #[error(
        "lock {key}: the session's connection is borrowed, and was not returned in time; drop the \
         SessionConnection first, or use another handle"
    )]
    #[non_exhaustive]
    ConnectionBorrowed {
        /// The key of the lock.
        key: Key,
    },

    /// The server or the driver reported an error that has no variant of its own.
    #[error("lock {key}: the database returned an error; see its source")]
    #[non_exhaustive]
    Database {
        /// The key of the lock.
        key: Key,
        /// The error of the driver or the server.
        source: Arc<sqlx::Error>,
    },

    /// Two sessions waited for each other, and the server ended the wait of this one (SQLSTATE 40P01). Or a holder of a
    /// shared lock of a [`LockManager`](crate::LockManager) wanted the exclusive one, and another holder wanted it too,
    /// or another process shared the lock; then the source is an I/O error of the kind `Deadlock`.
    #[error(
        "lock {key}: deadlock, two sessions waited for each other; release what you hold, then \
         acquire again, and everywhere in the same order"
    )]
    #[non_exhaustive]
    Deadlock {
        /// The key of the lock.
        key: Key,
        /// The server's error.
        source: Arc<sqlx::Error>,
    },

    /// The connection broke before the lock was granted.
    #[error("lock {key}: the connection broke before the lock was granted; acquire again")]
    #[non_exhaustive]
    Disconnected {
        /// The key of the lock.
        key: Key,
        /// The error of the driver or the server.
        source: Arc<sqlx::Error>,
    },

    /// A call of [`inspect`](crate::inspect) failed. The error is about no lock in particular.
    #[error("cannot {action}: {}", inspect_hint(privilege.as_deref()))]
    #[non_exhaustive]
    Inspect {
        /// The action that failed, such as `list the locks of the database` or `end session 4711`.
        action: String,
        /// The privilege to grant to the role, if the server refused the call for lack of one (SQLSTATE
        /// 42501).
        privilege: Option<String>,
        /// The error of the driver or the server.
        source: Arc<sqlx::Error>,
    },

    /// An argument is out of its range, or two options contradict each other.
    #[error("invalid argument: {reason}")]
    #[non_exhaustive]
    InvalidArgument {
        /// Names the argument, and its valid values.
        reason: String,
    },

    /// The last term of [`Election::run`](crate::Election::run) ended with an error. The candidate has
    /// resigned.
    #[error("lock {key}: the future of the last term returned an error; see its source")]
    #[non_exhaustive]
    LeaderFailed {
        /// The key of the election.
        key: Key,
        /// The error of the future that led.
        source: Arc<dyn std::error::Error + Send + Sync>,
    },

    /// The session ended while a guard lived: the lock is lost, and another session may hold it.
    #[error(
        "lock {key}: lost while it was held, another session may hold it; stop what it protects, \
         then acquire again"
    )]
    #[non_exhaustive]
    Lost {
        /// The key of the lock.
        key: Key,
        /// How the lock was lost.
        #[source]
        reason: Loss,
    },

    /// Locks exclude no other session on this connection: it goes through a transaction-mode pooler or a
    /// load balancer, or the server's advisory locks have no effect.
    /// [Guarantees](crate::guide::guarantees#poolers) describes how that is detected.
    #[error(
        "lock {key}: session locks exclude no other session on this connection, because of a pooler in \
         transaction mode, a load balancer, or the server itself; connect directly to a PostgreSQL \
         server, or through a pooler in session mode"
    )]
    #[non_exhaustive]
    NoExclusion {
        /// The key of the lock.
        key: Key,
    },

    /// The server's lock table is full (SQLSTATE 53200).
    #[error(
        "lock {key}: the server's lock table is full; hold fewer locks, or raise \
         max_locks_per_transaction or max_connections"
    )]
    #[non_exhaustive]
    OutOfLocks {
        /// The key of the lock.
        key: Key,
        /// The server's error.
        source: Arc<sqlx::Error>,
    },

    /// The pool is closed, or was closed during the wait. The lock is not held.
    #[error("lock {key}: the pool is closed; acquire before it is closed")]
    #[non_exhaustive]
    PoolClosed {
        /// The key of the lock.
        key: Key,
    },

    /// No connection of the pool became available in time. The lock was not requested.
    #[error("lock {key}: timed out waiting for a connection of the pool{}", pool_hint(*locks, *permits))]
    #[non_exhaustive]
    PoolTimedOut {
        /// The key of the lock.
        key: Key,
        /// The number of the pool's connections that locks used, if their share of the pool was used up
        /// ([`LockOptions::reserve_connections`](crate::LockOptions::reserve_connections)).
        locks: Option<u32>,
        /// The number of permits of the [`Semaphore`](crate::Semaphore), if the pool can't provide a connection
        /// for each of them.
        permits: Option<usize>,
    },

    /// The server rejects a setting by which it detects a dead client, and
    /// [`LockOptions::require_settings`](crate::LockOptions::require_settings) demands it.
    #[error(
        "lock {key}: the server rejects a setting by which it detects a dead client; allow it, or \
         don't require the settings"
    )]
    #[non_exhaustive]
    SettingsRejected {
        /// The key of the lock.
        key: Key,
        /// The server's error.
        source: Arc<sqlx::Error>,
    },

    /// The guard belongs to a [manager](crate::LockManager), and has no connection of its own to borrow.
    #[error(
        "lock {key}: its session is shared by all locks of its manager, so its connection can't be borrowed; \
         make the lock from the pool"
    )]
    #[non_exhaustive]
    SharedSession {
        /// The key of the lock.
        key: Key,
    },

    /// The server is a hot standby, whose locks exclude no session on the primary.
    #[error(
        "lock {key}: the server is a hot standby, whose advisory locks exclude no session on the primary; \
         connect the pool to the primary"
    )]
    #[non_exhaustive]
    Standby {
        /// The key of the lock.
        key: Key,
    },
}

/// How a held lock was lost.
///
/// # Examples
///
/// ```
/// use pglock::{Error, Lock, Loss};
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
/// # let pool = pglock_testkit::pool().await;
/// let mut lock = Lock::new(&pool, "nightly-report");
/// let guard = lock.acquire().await?;
/// lock.release_all().await?;
///
/// let error = guard.release().await.unwrap_err();
/// assert!(matches!(error, Error::Lost { reason: Loss::Released, .. }));
/// # Ok(()) }
/// ```
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Loss {
    /// The session's connection broke, or the server ended it.
    #[error("the session's connection broke")]
    Disconnected(#[source] Arc<sqlx::Error>),
    /// The lock was held for longer than [`LockOptions::max_hold`](crate::LockOptions::max_hold).
    #[error("the lock was held for longer than max_hold")]
    HeldTooLong,
    /// Statements were answered by another session than the one that holds the lock, or the server's locks
    /// were found to exclude no other session.
    #[error("locks exclude no other session on this connection")]
    NoExclusion,
    /// According to the server, the session does not hold the lock: other code unlocked it, or the server
    /// ended the session while its connection was borrowed.
    #[error("the session no longer holds the lock: other code unlocked it")]
    NotHeld,
    /// The handle released the lock: by [`Lock::release_all`](crate::Lock::release_all), by
    /// [`MultiLock::release_all`](crate::MultiLock::release_all), or at the end of a term of
    /// [`Election::run`](crate::Election::run).
    #[error("the handle released the lock")]
    Released,
    /// The tokio runtime of the acquire was shut down, and with it the task that monitors the session.
    #[error("the runtime on which the lock was acquired was shut down")]
    RuntimeShutdown,
    /// No answer was processed within the heartbeat's interval and timeout: the server or the network is silent, or
    /// this process was stopped, or its runtime blocked.
    #[error("no answer was processed within the heartbeat's interval and timeout")]
    Unresponsive,
}

impl Loss {
    /// Returns the loss of a session whose connection failed with this error.
    pub(crate) fn broken(error: sqlx::Error) -> Self {
        if is_not_prepared(&error) {
            Self::NoExclusion
        } else {
            Self::Disconnected(Arc::new(error))
        }
    }
}

/// Borrows the key of an error in the same way as the error: as `Option<&Key>` or `Option<&mut Key>`.
macro_rules! key_of {
    ($error:expr) => {
        match $error {
            Error::Cancelled { key, .. }
            | Error::Connect { key, .. }
            | Error::ConnectionBorrowed { key }
            | Error::Database { key, .. }
            | Error::Deadlock { key, .. }
            | Error::Disconnected { key, .. }
            | Error::LeaderFailed { key, .. }
            | Error::Lost { key, .. }
            | Error::NoExclusion { key }
            | Error::OutOfLocks { key, .. }
            | Error::PoolClosed { key }
            | Error::PoolTimedOut { key, .. }
            | Error::SettingsRejected { key, .. }
            | Error::SharedSession { key }
            | Error::Standby { key } => Some(key),
            Error::Inspect { .. } | Error::InvalidArgument { .. } => None,
        }
    };
}

impl Error {
    /// Returns the key of the lock that the error is about. `None` for an invalid argument, and for errors of
    /// [`inspect`](crate::inspect).
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::{Key, Lock};
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() {
    /// # let pool = pglock_testkit::pool().await;
    /// # pool.close().await;
    /// let error = Lock::new(&pool, "invoice-17").acquire().await.unwrap_err();
    /// assert_eq!(error.key(), Some(&Key::from("invoice-17")));
    /// # }
    /// ```
    #[must_use]
    pub fn key(&self) -> Option<&Key> {
        key_of!(self)
    }

    /// Returns whether a retry of the same call may succeed; after a lost lock, another acquire.
    ///
    /// `true` if the reason is temporary: a deadlock, a broken connection, a lost lock, a cancelled statement, a full
    /// lock table, a busy pool, a borrowed connection, a server that is starting, a standby that may be promoted.
    /// `false` if something has to be changed: a closed pool, a wrong password, an invalid argument.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::Semaphore;
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() {
    /// # let pool = pglock_testkit::pool().await;
    /// let error = Semaphore::new(&pool, "printers", 0).unwrap_err();
    /// assert!(!error.is_transient());
    /// # }
    /// ```
    #[must_use]
    pub fn is_transient(&self) -> bool {
        let (Self::Connect { source, .. }
        | Self::Database { source, .. }
        | Self::Inspect { source, .. }) = self
        else {
            return matches!(
                self,
                Self::Cancelled { .. }
                    | Self::ConnectionBorrowed { .. }
                    | Self::Deadlock { .. }
                    | Self::Disconnected { .. }
                    | Self::Lost { .. }
                    | Self::OutOfLocks { .. }
                    | Self::PoolTimedOut { .. }
                    | Self::Standby { .. }
            );
        };
        // Connection exceptions, insufficient resources, a cancelled statement, and a server that starts or stops:
        // https://www.postgresql.org/docs/current/errcodes-appendix.html
        let passes =
            |code: String| ["08", "53", "57014", "57P"].iter().any(|c| code.starts_with(c));
        matches!(**source, sqlx::Error::Io(_) | sqlx::Error::PoolTimedOut)
            || sqlstate(source).is_some_and(passes)
    }

    /// Returns the same error for another key that was requested in the same statement, or on the same session.
    pub(crate) fn for_key(mut self, other: &Key) -> Self {
        if let Some(key) = key_of!(&mut self) {
            other.clone_into(key);
        }
        self
    }

    pub(crate) fn deadlock(key: &Key) -> Self {
        let reason =
            "a holder of a shared lock wants the exclusive one, which another holder prevents";
        let source = sqlx::Error::Io(io::Error::new(io::ErrorKind::Deadlock, reason));
        Self::Deadlock { key: key.clone(), source: Arc::new(source) }
    }

    /// Makes the error of a pool whose connections were in use. `locks` is the number of connections that locks used,
    /// if their share was used up.
    pub(crate) fn pool_timed_out(key: &Key, locks: Option<u32>) -> Self {
        Self::PoolTimedOut { key: key.clone(), locks, permits: None }
    }

    pub(crate) fn database(key: &Key, source: sqlx::Error) -> Self {
        Self::Database { key: key.clone(), source: Arc::new(source) }
    }

    pub(crate) fn inspect(action: String, privilege: Option<String>, source: sqlx::Error) -> Self {
        Self::Inspect { action, privilege, source: Arc::new(source) }
    }

    /// Makes the error of a session that was lost before it answered an acquire.
    pub(crate) fn broken(key: &Key, loss: &Loss) -> Self {
        if matches!(loss, Loss::NoExclusion) {
            return Self::lost(key, loss.clone());
        }
        let source = io::Error::new(io::ErrorKind::ConnectionAborted, loss.clone());
        Self::Disconnected { key: key.clone(), source: Arc::new(sqlx::Error::Io(source)) }
    }

    pub(crate) fn lost(key: &Key, reason: Loss) -> Self {
        let key = key.clone();
        if matches!(reason, Loss::NoExclusion) {
            Self::NoExclusion { key }
        } else {
            Self::Lost { key, reason }
        }
    }

    /// Classifies the error that the driver returned for a statement that should have acquired the lock.
    pub(crate) fn acquiring(key: &Key, source: sqlx::Error) -> Self {
        let (key, source) = (key.clone(), Arc::new(source));
        match sqlstate(&source).as_deref() {
            Some("40P01") => Self::Deadlock { key, source },
            Some("53200") => Self::OutOfLocks { key, source },
            _ if is_not_prepared(&source) => Self::NoExclusion { key },
            Some("57014") => Self::Cancelled { key, source },
            Some(_) if is_answer(&source) => Self::Database { key, source },
            None if !matches!(*source, sqlx::Error::Io(_)) => Self::Database { key, source },
            Some(_) | None => Self::Disconnected { key, source },
        }
    }

    /// Whether the connection belongs to a runtime that has ended, so that no other runtime can use it.
    pub(crate) fn is_of_ended_runtime(&self) -> bool {
        let Self::Disconnected { source, .. } = self else { return false };
        matches!(&**source, sqlx::Error::Io(error) if is_rt_shutdown_err(error))
    }
}

/// Returns the advice for a pool that is exhausted.
fn pool_hint(locks: Option<u32>, permits: Option<usize>) -> String {
    let share = locks.map_or_else(String::new, |locks| {
        format!("; locks use {locks} of its connections, and leave the others to queries")
    });
    let advice = match (locks, permits) {
        (_, Some(permits)) => format!(
            "each permit uses one, and the pool does not have one for each of the semaphore's \
             {permits} permits; raise max_connections, or hold fewer permits at once"
        ),
        (Some(_), None) => {
            "raise max_connections, or hold and await fewer locks at once".to_owned()
        }
        (None, None) => {
            "raise max_connections or acquire_timeout, or hold connections for less time".to_owned()
        }
    };
    format!("{share}; {advice}")
}

/// Returns why a call of `inspect` failed, and the privilege to grant.
fn inspect_hint(privilege: Option<&str>) -> String {
    privilege.map_or_else(
        || "the query failed; see its source".to_owned(),
        |privilege| format!("the role lacks a privilege; grant it {privilege}"),
    )
}

/// Returns the SQLSTATE, if the error is one that the server returned.
pub(crate) fn sqlstate(error: &sqlx::Error) -> Option<String> {
    Some(error.as_database_error()?.code()?.into_owned())
}

/// Whether a prepared statement is missing, or one of another client is in its place, as behind a pooler in
/// transaction mode.
pub(crate) fn is_not_prepared(error: &sqlx::Error) -> bool {
    sqlstate(error).is_some_and(|code| code == "26000" || code == "42P05")
}

/// Formats an error with its causes for a `tracing` event, because a subscriber may print only the error itself.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        let next_text = next.to_string();
        // Some errors of other crates repeat their cause.
        if !text.ends_with(&next_text) {
            text = format!("{text}: {next_text}");
        }
        cause = next.source();
    }
    text
}

/// Whether the server rejects a setting: the role may lack the right to it, or it may be unknown, fixed, or not
/// supported by the platform.
pub(crate) fn refuses_settings(error: &sqlx::Error) -> bool {
    let codes = ["0A000", "22023", "42501", "42704", "55P02"];
    sqlstate(error).is_some_and(|code| codes.contains(&code.as_str()))
}

/// Whether the server answered a statement, and the session can run the next one.
///
/// `false` if the server ended the session: by a shutdown, a crash, a termination, or a limit on idle time.
pub(crate) fn is_answer(error: &sqlx::Error) -> bool {
    let ended = ["57P01", "57P02", "57P03", "57P05", "25P03", "25P04"];
    sqlstate(error).is_some_and(|code| !ended.contains(&code.as_str()))
}
