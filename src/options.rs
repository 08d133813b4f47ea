//! The settings of locks, each with a default.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use sqlx::PgPool;

use crate::error::{Error, Result};

/// Settings of a lock, each with a default that suits most applications.
///
/// # Examples
///
/// ```
/// use pglock::{Lock, LockOptions};
/// use std::time::Duration;
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
/// # let pool = pglock_testkit::pool().await;
/// let configured = LockOptions::new().wait_slice(Duration::from_secs(10)).on(&pool)?;
/// let _guard = Lock::new(&configured, "migrate").acquire().await?;
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct LockOptions {
    wait_slice: Option<Duration>,
    pub(crate) heartbeat: Heartbeat,
    pub(crate) keepalives: Keepalives,
    /// Identifies the keepalives on the server; formatted once, and not for each acquire.
    pub(crate) mark: Arc<str>,
    pub(crate) require_settings: bool,
    pub(crate) allow_standby: bool,
    pub(crate) reserve_connections: Option<u32>,
    pub(crate) max_hold: Option<Duration>,
    pub(crate) application_name: Option<Arc<str>>,
    pub(crate) label_by_key: bool,
}

/// How often a session is sent a heartbeat, and how long the answer may take.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Heartbeat {
    pub(crate) interval: Duration,
    pub(crate) timeout: Duration,
}

impl Heartbeat {
    /// How long a session is trusted after it was sent a heartbeat that it answered.
    pub(crate) fn bound(self) -> Duration {
        self.interval + self.timeout
    }

    /// How long the answer to a statement may take that is not a heartbeat. Over a slow link, this is longer than for
    /// heartbeats, which are to be answered before the next one.
    pub(crate) fn answer_limit(self) -> Duration {
        self.timeout.max(Duration::from_secs(1))
    }
}

/// When the server closes the connection of a silent client.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Keepalives {
    idle: Duration,
    interval: Duration,
    retries: u32,
}

impl Keepalives {
    /// The minimum time for which a client is silent before the server closes its connection.
    ///
    /// A client whose connection is borrowed sends no heartbeats, so it may have been idle already: only
    /// the probes count.
    fn bound(self) -> Duration {
        self.interval * self.retries
    }

    /// The idle time and the interval in seconds, and the retries.
    pub(crate) fn seconds_and_retries(self) -> [u64; 3] {
        [self.idle.as_secs(), self.interval.as_secs(), self.retries.into()]
    }

    /// Returns a text that distinguishes these settings from others.
    fn mark(self) -> Arc<str> {
        let [idle, interval, retries] = self.seconds_and_retries();
        format!("{idle}/{interval}/{retries}").into()
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
    /// let one = Lock::new(&LockOptions::new().on(&pool)?, 7);
    /// let same = Lock::new(&pool, 7);
    /// # let _ = (one, same); Ok(()) }
    /// ```
    #[must_use]
    pub fn new() -> Self {
        let keepalives = Keepalives {
            idle: Duration::from_secs(3),
            interval: Duration::from_secs(1),
            retries: 5,
        };
        Self {
            wait_slice: None,
            heartbeat: Heartbeat {
                interval: Duration::from_secs(2),
                timeout: Duration::from_secs(2),
            },
            keepalives,
            mark: keepalives.mark(),
            require_settings: false,
            allow_standby: false,
            reserve_connections: None,
            max_hold: None,
            application_name: None,
            label_by_key: false,
        }
    }

    /// Sets how often the session of a held lock is sent a heartbeat, to check that it is alive. Default: 2 s; from
    /// 100 ms to 1 h.
    ///
    /// A guard whose session has not answered for the sum of the interval and the
    /// [timeout](Self::heartbeat_timeout) is lost: see [`Guard::lost`](crate::Guard::lost). The sum must be at
    /// least a second less than the probes of [`keepalives_interval`](Self::keepalives_interval) take, so
    /// that the loss is reported before the server grants the lock to another session. A closed connection is
    /// detected within 50 ms, if it is idle and the lock has been held for two seconds, or for the interval if
    /// that is shorter.
    ///
    /// A background task sends the heartbeats. If the runtime makes no progress for the sum of interval and timeout,
    /// because it is blocked or not driven, its guards are lost, because the server may have ended the sessions
    /// meanwhile. An error in answer to a heartbeat is a sign of life, too, unless it ends the session.
    ///
    /// A lock that is released before the first interval is over costs no heartbeat.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::LockOptions;
    /// use std::time::Duration;
    ///
    /// let options = LockOptions::new()
    ///     .heartbeat_interval(Duration::from_secs(1))
    ///     .heartbeat_timeout(Duration::from_secs(3));
    /// # let _ = options;
    /// ```
    #[must_use]
    pub fn heartbeat_interval(mut self, interval: Duration) -> Self {
        self.heartbeat.interval = interval;
        self
    }

    /// Sets how long the answer to a [heartbeat](Self::heartbeat_interval) may take. Default: 2 s; from 100 ms to
    /// 1 h.
    #[must_use]
    pub fn heartbeat_timeout(mut self, timeout: Duration) -> Self {
        self.heartbeat.timeout = timeout;
        self
    }

    /// Sets how long a client is silent before the server sends it the first probe
    /// (`tcp_keepalives_idle`). Default: 3 s; whole seconds, up to 1 h.
    ///
    /// By default, the server ends the session of a client that has vanished after 3 s of silence and 5 probes
    /// of a second each, so after 8 s.
    #[must_use]
    pub fn keepalives_idle(mut self, idle: Duration) -> Self {
        self.keepalives.idle = idle;
        self.renew_mark()
    }

    /// Sets how long the server waits for the answer to a probe (`tcp_keepalives_interval`). Default: 1 s; whole
    /// seconds, up to 1 h.
    ///
    /// All probes together must take at least a second longer than the sum of the
    /// [heartbeat's](Self::heartbeat_interval) interval and timeout. The idle time does not count, because a
    /// session whose connection is borrowed may have been idle for as long when the network fails.
    ///
    /// `tcp_user_timeout` is set to the sum of the idle time and all probes. The keepalives stay on the pooled
    /// connection, where an application can't notice them. The timeout is set while the session waits for a
    /// lock or has held one for longer than a heartbeat's interval; so is `client_connection_check_interval`
    /// (PostgreSQL 14 and later), to one second, also while the connection is borrowed, but not during a wait that the
    /// server would log. Both are restored after the session is released; the timeout also while the connection is
    /// borrowed, because it would end the connection of a client that pauses while it reads. Over a unix socket, these
    /// settings have no effect, and none is needed.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::LockOptions;
    /// use std::time::Duration;
    ///
    /// // A host that vanishes keeps its locks for 20 s at most: 10 + 2 * 5.
    /// let options = LockOptions::new()
    ///     .keepalives_idle(Duration::from_secs(10))
    ///     .keepalives_interval(Duration::from_secs(2))
    ///     .keepalives_retries(5);
    /// # let _ = options;
    /// ```
    #[must_use]
    pub fn keepalives_interval(mut self, interval: Duration) -> Self {
        self.keepalives.interval = interval;
        self.renew_mark()
    }

    /// Sets the number of unanswered [probes](Self::keepalives_interval) after which the server ends the session
    /// (`tcp_keepalives_count`). Default: 5; from 1 to 100.
    #[must_use]
    pub fn keepalives_retries(mut self, retries: u32) -> Self {
        self.keepalives.retries = retries;
        self.renew_mark()
    }

    fn renew_mark(mut self) -> Self {
        self.mark = self.keepalives.mark();
        self
    }

    /// Requires the server to accept the settings of [`keepalives_interval`](Self::keepalives_interval).
    ///
    /// Without this option, a server that rejects them (a managed service may) is used as it is, with one warning:
    /// a host that vanishes may keep its locks for as long as the server's own settings say, by default
    /// two hours. A setting counts as rejected only if the same statement succeeds without it, and is
    /// retried after a minute.
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

    /// Allows locks on a hot standby, which exclude only other locks on the same standby.
    ///
    /// By default, an acquire there returns [`Error::Standby`].
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

    /// Sets for how long one statement waits for a busy lock. Default: 60 s, in an
    /// [`Election`](crate::Election) 110 s; from 2 s to 1 h.
    ///
    /// A wait is divided into slices, because a statement that waits holds a snapshot, which keeps
    /// `VACUUM` and `CREATE INDEX CONCURRENTLY` waiting in turn. Within a slice the waiter keeps its
    /// place in the server's queue; between two slices it goes to the end. A longer slice is fairer,
    /// a shorter one delays such commands less. Where hundreds of connections wait for one key, a short slice
    /// is expensive: see [the cost of a waiter](crate::guide::cost#what-does-a-wait-cost).
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
        self.wait_slice = Some(wait_slice);
        self
    }

    /// Sets the number of connections that all locks of a pool together leave to queries. Default: a third of
    /// the pool, rounded up.
    ///
    /// A lock that is held, or a key that is waited for, uses a connection, and the work under the lock usually needs
    /// another one of the same pool. If locks used all connections, no query that leads to a release could run. An
    /// acquire that would leave fewer connections than this number waits in the process, in FIFO order. After the
    /// pool's `acquire_timeout` it fails with [`Error::PoolTimedOut`], which says how many connections locks use. A
    /// pool of one connection has none to leave, and one connection is always allowed.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::{Lock, LockOptions};
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// // A pool that is used for nothing but locks.
    /// let configured = LockOptions::new().reserve_connections(0).on(&pool)?;
    /// let _guard = Lock::new(&configured, "migrate").acquire().await?;
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn reserve_connections(mut self, connections: u32) -> Self {
        self.reserve_connections = Some(connections);
        self
    }

    /// Sets the maximum time for which a session holds its locks, counted from its first lock, or from the grant of a
    /// permit. Default: for as long as its guards live. From a second to a year.
    ///
    /// Use this limit against holders that hang. When the time is over, the guards report
    /// [`Loss::HeldTooLong`](crate::Loss), a warning is logged, and the connection is closed, so the server grants the
    /// locks to other sessions. The work of the holder is not stopped by that: use
    /// [`Guard::while_held`](crate::Guard::while_held) or [`Lock::run`](crate::Lock::run), which cancel the work. If
    /// the connection is [borrowed](crate::Guard::connection) at that time, it is closed when it is returned. The limit
    /// needs a runtime that is driven. It also ends the term of a leader of an [`Election`](crate::Election). It has no
    /// effect on the locks of a [`LockManager`](crate::LockManager), which share a session.
    ///
    /// To limit the work without closing the connection, put a timeout around it.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::{Lock, LockOptions, Loss};
    /// use std::time::Duration;
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// let configured = LockOptions::new().max_hold(Duration::from_secs(1)).on(&pool)?;
    /// let guard = Lock::new(&configured, "nightly-report").acquire().await?;
    /// assert!(matches!(guard.lost().await, Loss::HeldTooLong));
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn max_hold(mut self, max_hold: Duration) -> Self {
        self.max_hold = Some(max_hold);
        self
    }

    /// Shows each lock on the server: while a session waits for a lock or holds one, its `application_name` is this
    /// name, a space, and the key. Default: the session keeps the `application_name` of the connection.
    ///
    /// So a DBA sees in `pg_stat_activity` which lock a session holds or waits for, and for which application or task.
    /// The key is shown as its name, or as its number if it has no name. If a session has several locks, the one that
    /// was acquired or waited for last is shown. At the end of the session, the old value is restored. The server shows
    /// 63 characters: the name is cut first, to 16. Characters other than printable ASCII are shown as `?`.
    /// [`inspect`](crate::inspect) reads the names of keys from the `application_name`.
    ///
    /// Sends one more statement for each lock that is acquired or waited for. The sessions of a
    /// [`LockManager`](crate::LockManager), which its locks share, show only the name. A leader shows its name and
    /// term instead, as described for [`Election`](crate::Election).
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::{Lock, LockOptions, inspect};
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// let configured = LockOptions::new().application_name("billing").on(&pool)?;
    /// let _guard = Lock::new(&configured, "nightly-report").acquire().await?;
    ///
    /// let lock = inspect::locks(&pool).await?.remove(0);
    /// assert_eq!(lock.key.name(), Some("nightly-report"));
    /// let session = lock.session.expect("a session holds it");
    /// assert_eq!(session.application_name.as_deref(), Some("billing nightly-report"));
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn application_name(mut self, name: impl Into<String>) -> Self {
        let name: String = name.into();
        self.application_name = Some(name.into());
        self
    }

    /// Adds the label `key` to the [metrics](crate::metrics) of these locks: the key's name, or its number if it has
    /// none. Default: no such label.
    ///
    /// Use it for locks of few keys, because each key adds a time series to each of these metrics, until the process
    /// ends. Other locks of the process are not affected.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::{Election, LockOptions};
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// // Exports `pglock_leader{key="billing"}`.
    /// let configured = LockOptions::new().label_metrics_by_key().on(&pool)?;
    /// let election = Election::new(&configured, "billing");
    /// # let _ = election; Ok(()) }
    /// ```
    #[cfg(feature = "metrics")]
    #[must_use]
    pub fn label_metrics_by_key(mut self) -> Self {
        self.label_by_key = true;
        self
    }

    /// Checks the options, and returns the pool with them: a [`Source`](crate::Source) of sessions for every
    /// constructor. Sends nothing to the server.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`] if an option is out of its range, or two contradict each other; the message
    /// names the options, and what is valid.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::LockOptions;
    /// use std::time::Duration;
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() {
    /// # let pool = pglock_testkit::pool().await;
    /// let error = LockOptions::new().wait_slice(Duration::ZERO).on(&pool).unwrap_err();
    /// let expected = "invalid argument: wait_slice is 0ns; it must be from 2s to 3600s";
    /// assert_eq!(error.to_string(), expected);
    /// # }
    /// ```
    pub fn on(&self, pool: &PgPool) -> Result<ConfiguredPool> {
        match self.contradiction() {
            Some(reason) => Err(Error::InvalidArgument { reason }),
            None => Ok(ConfiguredPool { pool: pool.clone(), options: self.clone() }),
        }
    }

    fn contradiction(&self) -> Option<String> {
        const SHORTEST: Duration = Duration::from_secs(2);
        const LONGEST: Duration = Duration::from_hours(1);
        const MARGIN: Duration = Duration::from_secs(1);
        const TICK: Duration = Duration::from_millis(100);
        const A_YEAR: Duration = Duration::from_hours(24 * 365);

        let Heartbeat { interval, timeout } = self.heartbeat;
        let Keepalives { idle, interval: between, retries } = self.keepalives;
        for (name, value, whole, shortest, longest) in [
            ("wait_slice", self.wait_slice, "", SHORTEST, LONGEST),
            ("max_hold", self.max_hold, "", MARGIN, A_YEAR),
            ("heartbeat_interval", Some(interval), "", TICK, LONGEST),
            ("heartbeat_timeout", Some(timeout), "", TICK, LONGEST),
            ("keepalives_idle", Some(idle), "whole seconds, ", MARGIN, LONGEST),
            ("keepalives_interval", Some(between), "whole seconds, ", MARGIN, LONGEST),
        ] {
            if let Some(value) = value
                && !((shortest..=longest).contains(&value)
                    && (whole.is_empty() || value.subsec_nanos() == 0))
            {
                return Some(format!(
                    "{name} is {value:?}; it must be {whole}from {shortest:?} to {longest:?}"
                ));
            }
        }
        if !(1..=100).contains(&retries) {
            return Some(format!("keepalives_retries is {retries}; it must be from 1 to 100"));
        }
        let (holder, server) = (self.heartbeat.bound(), self.keepalives.bound());
        (holder + MARGIN > server).then(|| {
            format!(
                "heartbeat_interval + heartbeat_timeout = {holder:?}, and keepalives_retries * \
                 keepalives_interval = {server:?}; the first must be at least {MARGIN:?} shorter, or two \
                 sessions could believe that they hold the lock"
            )
        })
    }

    pub(crate) fn slice(&self) -> Duration {
        self.wait_slice.unwrap_or(Duration::from_mins(1))
    }

    /// Sets how long a slice lasts if the application has not set it.
    pub(crate) fn default_slice(&mut self, slice: Duration) {
        self.wait_slice.get_or_insert(slice);
    }
}

impl Default for LockOptions {
    fn default() -> Self {
        Self::new()
    }
}

/// A pool with [`LockOptions`], from [`LockOptions::on`].
///
/// # Examples
///
/// ```
/// use pglock::{ConfiguredPool, Lock, LockManager, LockOptions};
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
/// # let pool = pglock_testkit::pool().await;
/// let configured: ConfiguredPool = LockOptions::new().require_settings().on(&pool)?;
/// let lock = Lock::new(&configured, "nightly-report");
/// let manager = LockManager::new(&configured);
/// # let _ = (lock, manager); Ok(()) }
/// ```
#[derive(Clone)]
pub struct ConfiguredPool {
    pub(crate) pool: PgPool,
    // Invariant: the options are valid.
    pub(crate) options: LockOptions,
}

impl fmt::Debug for ConfiguredPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConfiguredPool").field("options", &self.options).finish_non_exhaustive()
    }
}
