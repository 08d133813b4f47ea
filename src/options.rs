//! How a lock behaves: the settings that have a good default.

use std::sync::Arc;
use std::time::Duration;

use sqlx::PgPool;

use crate::election::Election;
use crate::error::{Error, Result};
use crate::key::Key;
use crate::lock::Lock;
use crate::manager::LockManager;
use crate::mode::Mode;
use crate::multi::MultiLock;
use crate::owner::Owner;
use crate::semaphore::Semaphore;
use crate::sql::settings::Vigilance;

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
#[derive(Clone, Debug)]
pub struct LockOptions {
    wait_slice: Duration,
    heartbeat: Heartbeat,
    server_gives_up: ServerGivesUp,
    /// What tells these settings from others on the server.
    mark: Arc<str>,
    require_settings: bool,
    allow_standby: bool,
    reserve_connections: Option<u32>,
}

/// How often a session is asked, and how long it may take to answer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Heartbeat {
    pub(crate) interval: Duration,
    pub(crate) timeout: Duration,
}

impl Heartbeat {
    /// How long the answer to a question is trusted, from when it was asked.
    pub(crate) fn bound(self) -> Duration {
        self.interval + self.timeout
    }
}

/// When the server gives a silent client up.
#[derive(Clone, Copy, Debug)]
struct ServerGivesUp {
    idle: Duration,
    interval: Duration,
    count: u32,
}

impl ServerGivesUp {
    /// How long a client is silent at least before it is given up.
    ///
    /// A client whose connection is lent says nothing of its own accord, so it may have been idle
    /// already: only the probes count.
    fn bound(self) -> Duration {
        self.interval * self.count
    }

    fn vigilance(self) -> Vigilance {
        // Whole seconds, and no more than an hour: checked when the lock was made.
        let seconds = |duration: Duration| u32::try_from(duration.as_secs()).unwrap_or(u32::MAX);
        Vigilance {
            idle_s: seconds(self.idle),
            interval_s: seconds(self.interval),
            count: self.count,
        }
    }
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
        let server_gives_up = ServerGivesUp {
            idle: Duration::from_secs(3),
            interval: Duration::from_secs(1),
            count: 5,
        };
        Self {
            wait_slice: Duration::from_mins(1),
            heartbeat: Heartbeat {
                interval: Duration::from_secs(2),
                timeout: Duration::from_secs(2),
            },
            server_gives_up,
            mark: server_gives_up.vigilance().mark(),
            require_settings: false,
            allow_standby: false,
            reserve_connections: None,
        }
    }

    /// Sets the interval of the heartbeat of a session that holds a lock, and the timeout of its answer.
    /// Default: 2 s and 2 s.
    ///
    /// A guard whose session has not answered for the sum of both is lost: see
    /// [`ExclusiveGuard::lost`](crate::ExclusiveGuard::lost). The sum must be at least a second less
    /// than the probes of [`server_gives_up`](Self::server_gives_up) take, so that the holder always
    /// stops before the server grants the lock to another session. A closed connection is detected
    /// within 50 ms, if it is idle and the lock has been held for two seconds, or for the interval if
    /// that is shorter.
    ///
    /// A background task sends the heartbeats. If the runtime makes no progress for the sum of both, because
    /// it is blocked or not driven, its guards are lost, because the server may have ended the sessions
    /// meanwhile. An answer that is an error is a sign of life.
    ///
    /// A lock that is released before the first interval is over costs no heartbeat.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::LockOptions;
    /// use std::time::Duration;
    ///
    /// let options = LockOptions::new().heartbeat(Duration::from_secs(1), Duration::from_secs(3));
    /// # let _ = options;
    /// ```
    #[must_use]
    pub fn heartbeat(mut self, interval: Duration, timeout: Duration) -> Self {
        self.heartbeat = Heartbeat { interval, timeout };
        self
    }

    /// Sets when the server ends the session of a silent client. Default: after 3 s of silence, then 5
    /// probes, one per second; so after 8 s. Whole seconds.
    ///
    /// The probes must take at least a second longer than the sum of the [`heartbeat`](Self::heartbeat).
    /// The idle time does not count, because a session whose connection is borrowed may have been idle for
    /// as long when the network fails.
    ///
    /// These are the server's `tcp_keepalives_idle`, `tcp_keepalives_interval` and
    /// `tcp_keepalives_count` for the lock's session; `tcp_user_timeout` is set to their sum.
    /// The keepalives stay on the pooled connection, where an application can't notice them. The
    /// timeout is set while the session waits for a lock or has held one for longer than a heartbeat's
    /// interval, and so is `client_connection_check_interval` (PostgreSQL 14 and later), to one second,
    /// while it holds. Both are reset when the session is released; the timeout also while the connection is
    /// borrowed, because it would end the connection of a client that pauses while it reads. Over a unix
    /// socket they do nothing, and nothing is needed.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::LockOptions;
    /// use std::time::Duration;
    ///
    /// // A host that vanishes keeps its locks for 20 s at most.
    /// let second = Duration::from_secs(1);
    /// let options = LockOptions::new().server_gives_up(second * 10, second * 2, 5); // 10 + 2 * 5
    /// # let _ = options;
    /// ```
    #[must_use]
    pub fn server_gives_up(mut self, idle: Duration, interval: Duration, count: u32) -> Self {
        self.server_gives_up = ServerGivesUp { idle, interval, count };
        self.mark = self.server_gives_up.vigilance().mark();
        self
    }

    /// Demands that the server accepts the settings of [`server_gives_up`](Self::server_gives_up).
    ///
    /// Without this, a server that rejects them (a managed service may) is used as it is, with one warning:
    /// a host that vanishes may keep its locks for as long as the server's own settings say, by default
    /// two hours. A setting counts as rejected only if the same statement succeeds without it, and is
    /// tried again after a minute.
    ///
    /// # Examples
    ///
    /// ```
    /// let options = pglock::LockOptions::new().require_settings();
    /// # let _ = options;
    /// ```
    #[must_use]
    pub fn require_settings(mut self) -> Self {
        self.require_settings = true;
        self
    }

    /// Allows locks on a hot standby, which exclude only others on the same standby.
    ///
    /// Without, an acquire there is an [`Error::Standby`].
    ///
    /// When the standby is promoted, its sessions live on, and their locks with them. A holder of the
    /// same key on the old primary keeps it there, and is not excluded. A fencing token can only be drawn
    /// once the standby is promoted.
    ///
    /// # Examples
    ///
    /// ```
    /// let options = pglock::LockOptions::new().allow_standby();
    /// # let _ = options;
    /// ```
    #[must_use]
    pub fn allow_standby(mut self) -> Self {
        self.allow_standby = true;
        self
    }

    /// Sets for how long one statement waits for a busy lock. Default: 60 s; from 2 s to 1 h.
    ///
    /// A wait is divided into slices, because a statement that waits holds a snapshot, which keeps
    /// `VACUUM` and `CREATE INDEX CONCURRENTLY` waiting in turn. Within a slice the waiter keeps its
    /// place in the server's queue; between two slices it goes to the end. A longer slice is fairer,
    /// a shorter one holds others up less. Where hundreds of connections wait for one key, a short slice
    /// is expensive: see [the cost of a waiter](crate::guide::cost#per-waiter).
    ///
    /// A slice is up to a tenth shorter, at random, so that waiters don't re-queue in step. It always lasts at
    /// least a second longer than the server's `deadlock_timeout`, so that deadlocks are detected. A session
    /// that already holds a lock waits for another one in slices of at most 5 s, because its other
    /// handles use the connection between two slices.
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

    /// Sets how many connections of the pool all locks on it together leave to queries. Default: a third of
    /// the pool, rounded up.
    ///
    /// A lock uses a connection while it is held or waited for, and what it protects usually needs another
    /// one of the same pool. If locks took them all, no query could run that leads to a release. An acquire
    /// that would leave fewer waits in the process, in FIFO order, for up to the pool's `acquire_timeout`,
    /// and then fails with [`Error::Pool`], which says how many connections locks have. A pool of one
    /// connection has none to leave, and one connection is always allowed.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::LockOptions;
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// // A pool that is used for nothing but locks.
    /// let mut lock = LockOptions::new().reserve_connections(0).lock(&pool, "migrate")?;
    /// # drop(lock.acquire().await?); Ok(()) }
    /// ```
    #[must_use]
    pub fn reserve_connections(mut self, connections: u32) -> Self {
        self.reserve_connections = Some(connections);
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
        let key = key.into();
        let owner = self.owner(pool, &key)?;
        Ok(Lock::with_owner(key, owner))
    }

    /// Makes a handle on several locks with these settings, to be held exclusively, as
    /// [`MultiLock::new`] does. Sends nothing to the server.
    ///
    /// # Errors
    ///
    /// As for [`lock`](Self::lock).
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// use pglock::LockOptions;
    ///
    /// let locks = LockOptions::new().multi_lock(&pool, ["account-1", "account-2"])?;
    /// # let _ = locks; Ok(()) }
    /// ```
    pub fn multi_lock(
        &self,
        pool: &PgPool,
        keys: impl IntoIterator<Item: Into<Key>>,
    ) -> Result<MultiLock> {
        let mut keys = keys.into_iter().map(Into::into).peekable();
        let first = keys.peek().cloned().unwrap_or_else(|| Key::from(0));
        let owner = self.owner(pool, &first)?;
        Ok(MultiLock::with_owner(keys, Mode::Exclusive, owner))
    }

    /// Makes a semaphore with these settings. Sends nothing to the server.
    ///
    /// # Errors
    ///
    /// As for [`lock`](Self::lock), and for [`Semaphore::new`].
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// use pglock::LockOptions;
    ///
    /// let printers = LockOptions::new().require_settings().semaphore(&pool, "printers", 3)?;
    /// # let _ = printers; Ok(()) }
    /// ```
    pub fn semaphore(
        &self,
        pool: &PgPool,
        key: impl Into<Key>,
        permits: usize,
    ) -> Result<Semaphore> {
        let key = key.into();
        let owner = self.owner(pool, &key)?;
        Semaphore::with_owner(key, permits, owner)
    }

    /// Makes an election with these settings. Sends nothing to the server.
    ///
    /// # Errors
    ///
    /// As for [`lock`](Self::lock).
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// use pglock::LockOptions;
    ///
    /// let election = LockOptions::new().require_settings().election(&pool, "billing")?;
    /// # let _ = election; Ok(()) }
    /// ```
    pub fn election(&self, pool: &PgPool, key: impl Into<Key>) -> Result<Election> {
        let key = key.into();
        let owner = self.owner(pool, &key)?;
        Ok(Election::with_owner(key, owner))
    }

    /// Makes a manager of many locks with these options. Sends nothing.
    ///
    /// # Errors
    ///
    /// [`Error::Options`] if the options contradict each other; its key is 0.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::time::Duration;
    ///
    /// use pglock::LockOptions;
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// let second = Duration::from_secs(1);
    /// let manager = LockOptions::new().heartbeat(second, second).manager(&pool)?;
    /// let _guard = manager.lock("invoice-17").acquire().await?;
    /// # Ok(()) }
    /// ```
    pub fn manager(&self, pool: &PgPool) -> Result<LockManager> {
        self.owner(pool, &Key::from(0))?;
        Ok(LockManager::with_options(pool, self.clone()))
    }

    fn owner(&self, pool: &PgPool, key: &Key) -> Result<Owner> {
        match self.contradiction() {
            Some(reason) => Err(Error::Options { key: key.clone(), reason }),
            None => Ok(Owner::new(pool, self.clone())),
        }
    }

    fn contradiction(&self) -> Option<String> {
        const SHORTEST: Duration = Duration::from_secs(2);
        const LONGEST: Duration = Duration::from_hours(1);
        const MARGIN: Duration = Duration::from_secs(1);
        const TICK: Duration = Duration::from_millis(100);

        let Self { wait_slice, heartbeat, server_gives_up, .. } = self;
        if !(SHORTEST..=LONGEST).contains(wait_slice) {
            return Some(format!(
                "wait_slice is {wait_slice:?}; it must be from {SHORTEST:?} to {LONGEST:?}"
            ));
        }
        let Heartbeat { interval, timeout } = heartbeat;
        for (name, value) in [("interval", interval), ("timeout", timeout)] {
            if !(TICK..=LONGEST).contains(value) {
                return Some(format!(
                    "the heartbeat's {name} is {value:?}; it must be from {TICK:?} to {LONGEST:?}"
                ));
            }
        }
        let ServerGivesUp { idle, interval: between, count } = server_gives_up;
        for (name, value) in [("idle", idle), ("interval", between)] {
            if value.subsec_nanos() != 0 || !(MARGIN..=LONGEST).contains(value) {
                return Some(format!(
                    "server_gives_up has {name} = {value:?}; it must be whole seconds, from \
                     {MARGIN:?} to {LONGEST:?}"
                ));
            }
        }
        if !(1..=100).contains(count) {
            return Some(format!("server_gives_up has count = {count}; it must be from 1 to 100"));
        }
        let (holder, server) = (heartbeat.bound(), server_gives_up.bound());
        (holder + MARGIN > server).then(|| {
            format!(
                "the holder would give up after {interval:?} + {timeout:?} = {holder:?}, and the \
                 server after {count} * {between:?} = {server:?}, if the client was idle before; \
                 the holder must be at least {MARGIN:?} earlier, or two could believe that they hold \
                 the lock"
            )
        })
    }

    pub(crate) fn slice(&self) -> Duration {
        self.wait_slice
    }

    pub(crate) fn beat(&self) -> Heartbeat {
        self.heartbeat
    }

    pub(crate) fn vigilance(&self) -> Vigilance {
        self.server_gives_up.vigilance()
    }

    /// The mark of the same, written once and not for each acquire.
    pub(crate) fn mark(&self) -> &str {
        &self.mark
    }

    pub(crate) fn settings_required(&self) -> bool {
        self.require_settings
    }

    pub(crate) fn reserve(&self) -> Option<u32> {
        self.reserve_connections
    }

    pub(crate) fn standby_allowed(&self) -> bool {
        self.allow_standby
    }
}

impl Default for LockOptions {
    fn default() -> Self {
        Self::new()
    }
}
