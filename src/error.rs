//! Everything that can go wrong, and what to do about it.

use std::borrow::Cow;
use std::fmt;
use std::io;
use std::sync::Arc;

use sqlx::error::{DatabaseError, ErrorKind};

use crate::key::Key;

/// The result of an operation on a lock.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why an operation on a lock failed.
///
/// Contention is never an error: the `try_` methods return `None`. After an error from an acquire nothing is
/// held. Every message names the key, and says what to do; the message of the database or the driver is the
/// [`source`](std::error::Error::source).
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
/// assert!(matches!(error, Error::Pool { .. }));
/// assert!(error.to_string().contains("nightly-report"));
/// assert!(!error.is_transient());
/// # }
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The session's connection is borrowed
    /// ([`connection`](crate::ExclusiveGuard::connection)), and was not returned within ten seconds, or
    /// the caller's own timeout.
    #[error(
        "lock {key}: the session's connection is borrowed, and was not returned in time; drop the \
         SessionConnection first, or use another handle"
    )]
    #[non_exhaustive]
    Borrowed {
        /// The key of the lock.
        key: Key,
    },

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
        /// What the server said.
        source: sqlx::Error,
    },

    /// No connection could be opened: the server is unreachable, or rejects the login.
    #[error(
        "lock {key}: cannot connect to the server; check its address, that it runs, and the login"
    )]
    #[non_exhaustive]
    Connect {
        /// The key of the lock.
        key: Key,
        /// What the driver or the server said.
        source: sqlx::Error,
    },

    /// The server or the driver reported something that has no variant of its own.
    #[error("lock {key}: the database failed the operation; its own message says why")]
    #[non_exhaustive]
    Database {
        /// The key of the lock.
        key: Key,
        /// What the driver or the server said.
        source: sqlx::Error,
    },

    /// Two sessions waited for each other, and the server picked this one to give way: SQLSTATE
    /// 40P01.
    #[error(
        "lock {key}: deadlock, two sessions waited for each other; release what you hold, then \
         acquire again, and everywhere in the same order"
    )]
    #[non_exhaustive]
    Deadlock {
        /// The key of the lock.
        key: Key,
        /// What the server said.
        source: sqlx::Error,
    },

    /// The connection broke before the lock was granted.
    #[error("lock {key}: the connection broke before the lock was granted; acquire again")]
    #[non_exhaustive]
    Disconnected {
        /// The key of the lock.
        key: Key,
        /// What the driver or the server said.
        source: sqlx::Error,
    },

    /// The last term of [`Election::run`](crate::Election::run) ended with an error. The candidate has
    /// resigned.
    #[error("lock {key}: the last term ended with an error")]
    #[non_exhaustive]
    Leading {
        /// The key of the election.
        key: Key,
        /// What the future that led has returned.
        source: Arc<dyn std::error::Error + Send + Sync>,
    },

    /// The session ended while a guard lived: the lock is lost, and another session may hold it.
    #[error(
        "lock {key}: lost while it was held, somebody else may have it; stop what it protects, \
         then acquire again"
    )]
    #[non_exhaustive]
    Lost {
        /// The key of the lock.
        key: Key,
        /// How it was lost.
        #[source]
        reason: Loss,
    },

    /// The options contradict each other, or the database.
    #[error("lock {key}: {reason}")]
    #[non_exhaustive]
    Options {
        /// The key of the lock.
        key: Key,
        /// Which option, and what it may be.
        reason: String,
    },

    /// The server's lock table is full: SQLSTATE 53200.
    #[error(
        "lock {key}: the server's lock table is full; hold fewer locks, or raise \
         max_locks_per_transaction or max_connections"
    )]
    #[non_exhaustive]
    OutOfLocks {
        /// The key of the lock.
        key: Key,
        /// What the server said.
        source: sqlx::Error,
    },

    /// No connection of the pool became available in time, or the pool was closed, also during a wait. The
    /// lock is not held.
    #[error("lock {key}: {}", PoolAdvice(source, *locks, *permits))]
    #[non_exhaustive]
    Pool {
        /// The key of the lock.
        key: Key,
        /// What the pool said.
        source: sqlx::Error,
        /// How many of the pool's connections locks had, if it was their share of the pool that was
        /// used up ([`LockOptions::reserve_connections`](crate::LockOptions::reserve_connections)).
        locks: Option<u32>,
        /// How many permits the [`Semaphore`](crate::Semaphore) has, if the pool can't lend a connection
        /// for each of them.
        permits: Option<usize>,
    },

    /// Locks exclude no other session on this connection: it goes through a transaction-mode pooler or a
    /// load balancer, or the server's advisory locks have no effect.
    /// [Guarantees](crate::guide::guarantees#poolers) describes how that is detected.
    #[error(
        "lock {key}: a pooler in transaction mode sits in between, through which session locks exclude \
         nobody; connect directly, or through a pooler in session mode"
    )]
    #[non_exhaustive]
    Pooled {
        /// The key of the lock.
        key: Key,
    },

    /// The server rejects a setting by which it detects a dead client, and
    /// [`LockOptions::require_settings`](crate::LockOptions::require_settings) demands it.
    #[error(
        "lock {key}: the server refuses a setting by which it would notice a dead client; allow it, or \
         don't require the settings"
    )]
    #[non_exhaustive]
    Settings {
        /// The key of the lock.
        key: Key,
        /// What the server said.
        source: sqlx::Error,
    },

    /// The guard belongs to a [manager](crate::LockManager), and has no connection of its own to borrow.
    #[error(
        "lock {key}: it may share its session with many others, so there is no connection to lend; \
         take the lock with Lock::new for that"
    )]
    #[non_exhaustive]
    SharedSession {
        /// The lock's key.
        key: Key,
    },

    /// The server is a hot standby, whose locks exclude no session on the primary.
    #[error(
        "lock {key}: the server is a hot standby, whose advisory locks exclude nobody elsewhere; \
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
/// lock.close().await?;
///
/// let error = guard.release().await.unwrap_err();
/// assert!(matches!(error, Error::Lost { reason: Loss::Closed, .. }));
/// # Ok(()) }
/// ```
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Loss {
    /// The tokio runtime of the acquire was shut down, and with it the task that monitors the session.
    #[error("the runtime on which the lock was acquired was shut down")]
    Abandoned,
    /// The handle was closed: [`Lock::close`](crate::Lock::close).
    #[error("the handle was closed while the guard lived")]
    Closed,
    /// The session's connection broke, or the server ended it.
    #[error("the session's connection broke")]
    Disconnected(#[source] Arc<sqlx::Error>),
    /// Statements were answered by another session than the one that holds the lock, or the server's locks
    /// were found to exclude no other session.
    #[error("a pooler in transaction mode sits in between")]
    Pooled,
    /// The server did not answer within the heartbeat's interval and timeout.
    #[error("the server has not answered for too long")]
    Silent,
    /// The server's answer is that the session does not hold the lock: other code unlocked it, or the server
    /// ended the session while its connection was borrowed.
    #[error("the server says that the session does not hold the lock: something else unlocked it")]
    NotHeld,
}

impl Loss {
    /// What a statement that failed says of its session.
    pub(crate) fn broken(error: sqlx::Error) -> Self {
        if is_not_prepared(&error) { Self::Pooled } else { Self::Disconnected(Arc::new(error)) }
    }
}

/// What went wrong with the pool, told from the two waits that must never look alike.
struct PoolAdvice<'e>(&'e sqlx::Error, Option<u32>, Option<usize>);

impl Error {
    /// Returns the key of the lock that the error is about.
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
    /// assert_eq!(error.key(), &Key::from("invoice-17"));
    /// # }
    /// ```
    #[must_use]
    pub fn key(&self) -> &Key {
        match self {
            Self::Borrowed { key }
            | Self::Cancelled { key, .. }
            | Self::Connect { key, .. }
            | Self::Database { key, .. }
            | Self::Deadlock { key, .. }
            | Self::Disconnected { key, .. }
            | Self::Leading { key, .. }
            | Self::Lost { key, .. }
            | Self::Options { key, .. }
            | Self::OutOfLocks { key, .. }
            | Self::Pool { key, .. }
            | Self::Pooled { key }
            | Self::Settings { key, .. }
            | Self::SharedSession { key }
            | Self::Standby { key } => key,
        }
    }

    /// Returns whether a retry of the same call may succeed.
    ///
    /// `true` if the reason is temporary: a deadlock, a broken connection, a lost lock, a cancelled
    /// statement, a full lock table, a busy pool, a borrowed connection, a server that is starting. `false`
    /// if something has to be changed: a closed pool, a wrong password, a standby, invalid options.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::LockOptions;
    /// use std::time::Duration;
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() {
    /// # let pool = pglock_testkit::pool().await;
    /// let error = LockOptions::new().wait_slice(Duration::ZERO).lock(&pool, 1).unwrap_err();
    /// assert!(!error.is_transient());
    /// # }
    /// ```
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Borrowed { .. }
            | Self::Cancelled { .. }
            | Self::Deadlock { .. }
            | Self::Disconnected { .. }
            | Self::Lost { .. }
            | Self::OutOfLocks { .. } => true,
            Self::Pool { source, .. } => matches!(source, sqlx::Error::PoolTimedOut),
            Self::Connect { source, .. } | Self::Database { source, .. } => {
                // Connection exceptions, insufficient resources, and a server that starts or stops:
                // https://www.postgresql.org/docs/current/errcodes-appendix.html
                let passes = |code: String| ["08", "53", "57P"].iter().any(|c| code.starts_with(c));
                matches!(source, sqlx::Error::Io(_) | sqlx::Error::PoolTimedOut)
                    || sqlstate(source).is_some_and(passes)
            }
            Self::Leading { .. }
            | Self::Options { .. }
            | Self::Pooled { .. }
            | Self::Settings { .. }
            | Self::SharedSession { .. }
            | Self::Standby { .. } => false,
        }
    }

    pub(crate) fn deadlock(key: &Key) -> Self {
        let reason = "who shares it cannot wait for another who does";
        let source = sqlx::Error::Io(io::Error::new(io::ErrorKind::Deadlock, reason));
        Self::Deadlock { key: key.clone(), source }
    }

    /// The session was lost before it answered an acquire.
    pub(crate) fn broken(key: &Key, loss: &Loss) -> Self {
        let key = key.clone();
        match loss {
            Loss::Pooled => Self::Pooled { key },
            Loss::Abandoned
            | Loss::Closed
            | Loss::Disconnected(_)
            | Loss::NotHeld
            | Loss::Silent => {
                let kind = io::ErrorKind::ConnectionAborted;
                Self::Disconnected {
                    key,
                    source: sqlx::Error::Io(io::Error::new(kind, loss.clone())),
                }
            }
        }
    }

    /// The same for another key that was asked for in the same statement, or on the same session.
    pub(crate) fn again(self: &Arc<Self>, key: &Key) -> Self {
        let key = key.clone();
        let source = || again(self);
        match &**self {
            Self::Borrowed { .. } => Self::Borrowed { key },
            Self::Cancelled { .. } => Self::Cancelled { key, source: source() },
            Self::Connect { .. } => Self::Connect { key, source: source() },
            Self::Database { .. } => Self::Database { key, source: source() },
            Self::Deadlock { .. } => Self::Deadlock { key, source: source() },
            Self::Disconnected { .. } => Self::Disconnected { key, source: source() },
            Self::Leading { source, .. } => Self::Leading { key, source: Arc::clone(source) },
            Self::Lost { reason, .. } => Self::Lost { key, reason: reason.clone() },
            Self::Options { reason, .. } => Self::Options { key, reason: reason.clone() },
            Self::OutOfLocks { .. } => Self::OutOfLocks { key, source: source() },
            Self::Pool { locks, permits, .. } => {
                Self::Pool { key, source: source(), locks: *locks, permits: *permits }
            }
            Self::Pooled { .. } => Self::Pooled { key },
            Self::Settings { .. } => Self::Settings { key, source: source() },
            Self::SharedSession { .. } => Self::SharedSession { key },
            Self::Standby { .. } => Self::Standby { key },
        }
    }

    pub(crate) fn lost(key: &Key, reason: Loss) -> Self {
        let key = key.clone();
        match reason {
            Loss::Pooled => Self::Pooled { key },
            Loss::Abandoned
            | Loss::Closed
            | Loss::Disconnected(_)
            | Loss::NotHeld
            | Loss::Silent => Self::Lost { key, reason },
        }
    }

    /// Sorts what the driver said of a statement that should have acquired the lock.
    pub(crate) fn acquiring(key: &Key, source: sqlx::Error) -> Self {
        let key = key.clone();
        match sqlstate(&source).as_deref() {
            Some("40P01") => Self::Deadlock { key, source },
            Some("53200") => Self::OutOfLocks { key, source },
            _ if is_not_prepared(&source) => Self::Pooled { key },
            Some("57014") => Self::Cancelled { key, source },
            Some(_) if is_answer(&source) => Self::Database { key, source },
            None if !matches!(source, sqlx::Error::Io(_)) => Self::Database { key, source },
            Some(_) | None => Self::Disconnected { key, source },
        }
    }
}

/// The source of an error that several are told, which sqlx's own can't be cloned for.
fn again(error: &Arc<Error>) -> sqlx::Error {
    let source = std::error::Error::source(&**error).and_then(|source| source.downcast_ref());
    match source {
        Some(sqlx::Error::PoolTimedOut) => sqlx::Error::PoolTimedOut,
        Some(sqlx::Error::PoolClosed) => sqlx::Error::PoolClosed,
        Some(sqlx::Error::Database(_)) => sqlx::Error::Database(Box::new(Again(Arc::clone(error)))),
        Some(sqlx::Error::Io(source)) => {
            sqlx::Error::Io(io::Error::new(source.kind(), Again(Arc::clone(error))))
        }
        Some(_) | None => sqlx::Error::Io(io::Error::other(Again(Arc::clone(error)))),
    }
}

/// What another was told, word for word.
#[derive(Debug)]
struct Again(Arc<Error>);

impl Again {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        std::error::Error::source(&*self.0)
    }

    fn database(&self) -> Option<&dyn DatabaseError> {
        self.source()?.downcast_ref::<sqlx::Error>()?.as_database_error()
    }
}

impl fmt::Display for Again {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.source() {
            Some(source) => fmt::Display::fmt(source, f),
            None => fmt::Display::fmt(&self.0, f),
        }
    }
}

impl std::error::Error for Again {}

impl DatabaseError for Again {
    fn message(&self) -> &str {
        self.database().map_or("", DatabaseError::message)
    }

    fn code(&self) -> Option<Cow<'_, str>> {
        self.database()?.code()
    }

    fn as_error(&self) -> &(dyn std::error::Error + Send + Sync + 'static) {
        self
    }

    fn as_error_mut(&mut self) -> &mut (dyn std::error::Error + Send + Sync + 'static) {
        self
    }

    fn into_error(self: Box<Self>) -> Box<dyn std::error::Error + Send + Sync + 'static> {
        self
    }

    fn kind(&self) -> ErrorKind {
        self.database().map_or(ErrorKind::Other, DatabaseError::kind)
    }
}

impl fmt::Display for PoolAdvice<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self(sqlx::Error::PoolClosed, ..) => {
                f.write_str("the pool is closed; acquire before it is closed")
            }
            Self(_, locks, Some(permits)) => {
                let locks = locks.unwrap_or_default();
                write!(
                    f,
                    "timed out waiting for a connection of the pool, of which locks have {locks}; each permit \
                     uses one, and the pool does not have one for each of the semaphore's {permits} permits; \
                     raise max_connections, or hold fewer permits at once"
                )
            }
            Self(_, Some(locks), None) => write!(
                f,
                "timed out waiting for a connection of the pool, not for the lock: locks have {locks}, and \
                 leave the others to queries; raise max_connections, or hold and await fewer locks at once"
            ),
            Self(_, None, None) => f.write_str(
                "timed out waiting for a connection of the pool, not for the lock; raise \
                 max_connections or acquire_timeout, or hold connections for less time",
            ),
        }
    }
}

/// The five characters by which the server classifies its error.
pub(crate) fn sqlstate(error: &sqlx::Error) -> Option<String> {
    Some(error.as_database_error()?.code()?.into_owned())
}

/// Whether a prepared statement is not where it was prepared, or another's is there: a pooler in
/// transaction mode.
pub(crate) fn is_not_prepared(error: &sqlx::Error) -> bool {
    sqlstate(error).is_some_and(|code| code == "26000" || code == "42P05")
}

/// Whether the server answered a statement, and lives to hear the next.
///
/// Not if it ended the session: shutdown, crash, terminated, idle for too long.
pub(crate) fn is_answer(error: &sqlx::Error) -> bool {
    let ended = ["57P01", "57P02", "57P03", "57P05", "25P03", "25P04"];
    sqlstate(error).is_some_and(|code| !ended.contains(&code.as_str()))
}
