//! The holders and waiters of a database's advisory locks, and a way to end a session.
//!
//! The functions query the server, so they show the locks of all programs, in whatever language: of this
//! crate, of migration tools, of a person at `psql`. They show the locks of one database, that of the
//! connection. Keys belong to a database, so an equal key in another database is another lock.
//!
//! ```
//! use pglock::{Lock, inspect};
//!
//! # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
//! # let pool = pglock_testkit::pool().await;
//! let guard = Lock::new(&pool, "nightly-report").acquire().await?;
//!
//! let mut locks = inspect::locks(&pool).await?;
//! inspect::name_keys(&mut locks, ["nightly-report", "billing"]);
//! assert_eq!(locks[0].key.name(), Some("nightly-report"));
//! assert!(locks[0].held);
//! assert_eq!(locks[0].session.as_ref().map(|s| s.backend_pid), Some(guard.backend_pid()));
//! # Ok(()) }
//! ```
//!
//! Each function takes any sqlx executor: a pool, a connection, a transaction. Each call sends one statement, during
//! which the server stops granting locks for a moment, and for longer if there are many waiters; call the functions a
//! few times a minute, not a second. In a transaction, the statement also clears the statistics snapshot, which would
//! show the sessions in an old state.
//!
//! # Names
//!
//! The server stores only numbers. A name is hashed, and can't be recovered from its hash. A program that
//! has the names can hash them again. [`name_keys`] does that, and so does [`locks`], with the names that sessions show
//! with [`LockOptions::application_name`](crate::LockOptions::application_name). The server also shows the name of an
//! election's leader: [`LockInfo::leader`].
//!
//! # Times
//!
//! From PostgreSQL 14 on, the server records when a wait began. It does **not** record when a lock was granted. For a
//! holder, it shows when the [session](Session) was started, which was before the grant; when its transaction was
//! started, if it is in one; and when its state last changed. If the session has been idle since then, it has held all
//! its locks at least since then. (A session of this crate answers a statement at every
//! [heartbeat](crate::LockOptions::heartbeat_interval), and is idle from then on.) A leader shows when it was elected.
//!
//! A waiter of this crate waits in [slices](crate::LockOptions::wait_slice), and its wait begins anew with
//! each slice.
//!
//! All times are by the server's clock. [`LockInfo::ago`] returns how long ago a time was, without the local clock.
//!
//! With the feature `serde`, times are numbers of seconds since 1970, and the key of a lock is two fields: `key`, which
//! is its number or pair as a text, and `name`.
//!
//! # Privileges
//!
//! Every role sees the key and the mode of every lock, whether it is held, by which process, and which processes block
//! which; and the user and the `application_name` of each session. The other fields of a session, from its address to
//! its times, are visible to its own role, to members of that role, of `pg_read_all_stats` or of `pg_monitor`, and to
//! superusers. They are `None` for other roles. On a hardened server, a role that is denied the views `pg_locks`
//! and `pg_stat_activity` still needs the functions behind them, `pg_lock_status` and `pg_stat_get_activity`: a call
//! that is refused one of them returns [`Error::Inspect`], which names the function to grant.
//!
//! [`terminate`] requires the session's own role, or a member of that role or of `pg_signal_backend`; only a
//! superuser can end a superuser's session. It also requires the right to see when the session was started,
//! as above.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use sqlx::PgExecutor;

use crate::application_name;
use crate::election::Leader;
use crate::error::{Error, Result};
use crate::key::{Key, KeyId};
use crate::mode::Mode;
use crate::semaphore::layout::Layout;
use crate::session::{DEADLINE, within};
use crate::sql::doctor::ENDS_ALL;
use crate::sql::election::Holder;
use crate::sql::inspect::{self as sql, LockRow};

/// Returns the holders and the waiters of the advisory locks of this database.
///
/// The result is ordered by key, with the holders of each key before its waiters, and the waiters by how long they have
/// waited.
///
/// # Cancel safety
///
/// Cancel safe: the call only reads.
///
/// # Errors
///
/// [`Error::Inspect`] if the query fails, or is not answered within ten seconds, including the wait for a connection.
///
/// # Panics
///
/// If called outside a tokio runtime.
///
/// # Examples
///
/// ```
/// use pglock::{Lock, inspect};
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
/// # let pool = pglock_testkit::pool().await;
/// let guard = Lock::new(&pool, 42).acquire().await?;
/// for lock in inspect::locks(&pool).await? {
///     let who = lock.session.and_then(|session| session.user);
///     println!("{} is {} by {who:?}", lock.key, if lock.held { "held" } else { "waited for" });
/// }
/// # Ok(()) }
/// ```
pub async fn locks(db: impl PgExecutor<'_>) -> Result<Vec<LockInfo>> {
    let rows = within(DEADLINE, sql::locks(db, None)).await.map_err(not_listed)?;
    let mut locks: Vec<_> = rows.into_iter().map(LockInfo::from).collect();
    let sessions = locks.iter().filter_map(|lock| lock.session.as_ref());
    let shown: BTreeSet<_> =
        sessions.filter_map(|session| session.application_name.clone()).collect();
    name_keys(&mut locks, shown.iter().flat_map(|shown| application_name::names(shown)));
    Ok(locks)
}

/// Returns the holders and the waiters of one lock of this database.
///
/// The result is ordered as that of [`locks`]. The permits of a semaphore have keys of their own, which [`name_keys`]
/// recognizes.
///
/// # Cancel safety
///
/// Cancel safe: the call only reads.
///
/// # Errors
///
/// [`Error::Inspect`] if the query fails, or is not answered within ten seconds, including the wait for a connection.
///
/// # Panics
///
/// If called outside a tokio runtime.
///
/// # Examples
///
/// ```
/// use pglock::{Lock, inspect};
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
/// # let pool = pglock_testkit::pool().await;
/// assert!(inspect::locks_of(&pool, "nightly-report").await?.is_empty());
///
/// let guard = Lock::new(&pool, "nightly-report").acquire().await?;
/// let locks = inspect::locks_of(&pool, "nightly-report").await?;
/// assert_eq!(locks[0].key.name(), Some("nightly-report"));
/// # Ok(()) }
/// ```
pub async fn locks_of(db: impl PgExecutor<'_>, key: impl Into<Key>) -> Result<Vec<LockInfo>> {
    let key = key.into();
    let rows = within(DEADLINE, sql::locks(db, Some(key.id()))).await.map_err(not_listed)?;
    let named = |row| LockInfo { key: key.clone(), ..LockInfo::from(row) };
    Ok(rows.into_iter().map(named).collect())
}

/// Names each key in `locks` that was made from one of `keys`.
///
/// Pass a [`Key`] for a key that is not made from its name as sqlx does, such as those of
/// [`interop`](crate::interop). Permits and the queue of a [`Semaphore`](crate::Semaphore) are recognized by the
/// semaphore's key. A key that has a name keeps it.
///
/// # Examples
///
/// ```
/// use pglock::{Semaphore, inspect};
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
/// # let pool = pglock_testkit::pool().await;
/// let permit = Semaphore::new(&pool, "printers", 3)?.acquire().await?;
///
/// let mut locks = inspect::locks(&pool).await?;
/// assert_eq!(locks[0].key.name(), None);
/// inspect::name_keys(&mut locks, ["nightly-report", "printers"]);
/// assert_eq!(locks[0].key.name(), Some("printers, permit 0"));
/// # Ok(()) }
/// ```
pub fn name_keys(locks: &mut [LockInfo], keys: impl IntoIterator<Item = impl Into<Key>>) {
    // There may be many locks, and many keys.
    let mut places: BTreeMap<KeyId, Vec<usize>> = BTreeMap::new();
    for (place, lock) in locks.iter().enumerate().filter(|(_, lock)| lock.key.name().is_none()) {
        places.entry(lock.key.id()).or_default().push(place);
    }
    let mut name = |places: &mut BTreeMap<KeyId, Vec<usize>>, key: &Key| {
        for place in places.remove(&key.id()).unwrap_or_default() {
            if let Some(lock) = locks.get_mut(place) {
                lock.key = key.clone();
            }
        }
    };
    for known in keys {
        let known = known.into();
        name(&mut places, &known);
        if places.is_empty() {
            return;
        }
        let semaphore = Layout::of(&known);
        name(&mut places, semaphore.queue());
        let (first, last) = semaphore.beyond(0).into_inner();
        let permits = KeyId::BigInt(first)..=KeyId::BigInt(last);
        let permits: Vec<KeyId> = places.range(permits).map(|(id, _)| *id).collect();
        for permit in permits {
            if let Some(permit) = semaphore.find(&Key::from_id(permit)) {
                name(&mut places, &permit);
            }
        }
    }
}

/// Ends a session on the server (`pg_terminate_backend`), which releases its locks and ends its waits.
///
/// The session is ended only if it still is the one that was shown: the statement compares the process id, and the time
/// at which the session was started. Returns whether the server was asked to end the session: `false` if it has
/// already ended, or if the role of the caller can't see when it was started.
///
/// The holder is notified of the loss; a guard of this crate at once. The holder's work may still continue
/// outside the database for a moment, so the next holder of the lock should be
/// [fenced](crate::Guard::fencing_token).
///
/// # Cancel safety
///
/// The session may have been ended.
///
/// # Errors
///
/// [`Error::Inspect`] if the query fails or is not answered within ten seconds, including the wait for a connection, or
/// if the role of the caller may not end the session.
///
/// # Panics
///
/// If called outside a tokio runtime.
///
/// # Examples
///
/// ```
/// use pglock::{Lock, inspect};
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
/// # let pool = pglock_testkit::pool().await;
/// let guard = Lock::new(&pool, "nightly-report").acquire().await?;
/// for lock in inspect::locks_of(&pool, "nightly-report").await? {
///     let session = lock.session.expect("a session holds it");
///     assert!(inspect::terminate(&pool, &session).await?);
/// }
/// println!("{}", guard.lost().await);
/// # Ok(()) }
/// ```
pub async fn terminate(db: impl PgExecutor<'_>, session: &Session) -> Result<bool> {
    let Some(started) = session.started_at.and_then(to_micros) else { return Ok(false) };
    let terminating = within(DEADLINE, sql::terminate(db, session.backend_pid, started));
    terminating.await.map_err(|source| {
        let otherwise = format!("{ENDS_ALL}, or be a superuser to end a superuser's session");
        let action = format!("end session {}", session.backend_pid);
        Error::inspect(action, sql::missing_privilege(&source, &otherwise), source)
    })
}

fn not_listed(source: sqlx::Error) -> Error {
    let privilege = sql::missing_privilege(&source, "what the server names");
    Error::inspect("list the locks of the database".to_owned(), privilege, source)
}

/// A lock that is held or waited for, as the server showed it.
///
/// # Examples
///
/// As for [`locks`].
#[derive(Clone, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct LockInfo {
    /// The key. It has a name only if the lock was looked up by name, or if a session shows the name: see
    /// [names](crate::inspect#names).
    #[cfg_attr(
        feature = "serde",
        serde(flatten, serialize_with = "crate::serialize::key_and_name")
    )]
    pub key: Key,
    /// The mode in which the lock is held or waited for.
    pub mode: Mode,
    /// Whether the lock is held. Otherwise, the session waits for it.
    pub held: bool,
    /// When the current statement of a waiter began to wait. `None` before PostgreSQL 14.
    #[cfg_attr(feature = "serde", serde(serialize_with = "crate::serialize::maybe_seconds"))]
    pub waiting_since: Option<SystemTime>,
    /// The backends that a waiter waits for: holders, and waiters that are ahead of it. 0 stands for a
    /// prepared transaction.
    pub blocked_by: Vec<i32>,
    /// The session that holds or waits. `None` if a prepared transaction holds the lock.
    pub session: Option<Session>,
    /// The identifier of the prepared transaction that holds the lock, which `ROLLBACK PREPARED` takes.
    pub prepared: Option<String>,
    /// The leader that the session shows, if it holds the lock exclusively. If the session holds other locks
    /// too, the server does not show which of them is that of the election.
    pub leader: Option<Leader>,
    /// When the server answered the query, by its own clock.
    #[cfg_attr(feature = "serde", serde(serialize_with = "crate::serialize::seconds"))]
    pub seen_at: SystemTime,
}

impl LockInfo {
    /// Returns how long before [`seen_at`](LockInfo::seen_at) a time of the server's clock was. Zero if it was later.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::{Lock, inspect};
    /// use std::time::Duration;
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// let guard = Lock::new(&pool, 42).acquire().await?;
    /// let lock = inspect::locks_of(&pool, 42).await?.remove(0);
    /// let session = lock.session.as_ref().expect("a session holds it");
    /// let age = lock.ago(session.started_at.expect("it is of our own role"));
    /// assert!(age < Duration::from_secs(3600));
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn ago(&self, time: SystemTime) -> Duration {
        self.seen_at.duration_since(time).unwrap_or_default()
    }
}

impl From<LockRow> for LockInfo {
    fn from(row: LockRow) -> Self {
        let session = row.backend_pid.map(|backend_pid| Session {
            backend_pid,
            started_at: row.backend_start.and_then(from_micros),
            user: row.user,
            application_name: row.application_name,
            client_addr: row.client_addr,
            state: row.state,
            state_since: row.state_change.and_then(from_micros),
            transaction_since: row.xact_start.and_then(from_micros),
            query_since: row.query_start.and_then(from_micros),
        });
        let leads = row.granted && row.mode == Mode::Exclusive;
        Self {
            key: Key::from_id(row.key),
            mode: row.mode,
            held: row.granted,
            waiting_since: row.wait_start.and_then(from_micros),
            blocked_by: row.blocked_by,
            leader: session.as_ref().filter(|_| leads).and_then(Session::leader),
            session,
            prepared: row.gid,
            seen_at: from_micros(row.asked).unwrap_or(UNIX_EPOCH),
        }
    }
}

/// A session of the server, with the fields that the role of the caller may see.
///
/// # Examples
///
/// As for [`terminate`].
#[derive(Clone, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Session {
    /// The process id of the session's backend.
    pub backend_pid: i32,
    /// When the session was started. Together with the process id, this identifies the session.
    #[cfg_attr(feature = "serde", serde(serialize_with = "crate::serialize::maybe_seconds"))]
    pub started_at: Option<SystemTime>,
    /// The role that started the session.
    pub user: Option<String>,
    /// The session's `application_name`.
    pub application_name: Option<String>,
    /// The address of the client. `None` over a unix socket too.
    pub client_addr: Option<String>,
    /// The state of the session, in PostgreSQL's words: `active`, `idle`, `idle in transaction`, …
    pub state: Option<String>,
    /// When the state last changed.
    #[cfg_attr(feature = "serde", serde(serialize_with = "crate::serialize::maybe_seconds"))]
    pub state_since: Option<SystemTime>,
    /// When the session's transaction was started, if it is in one.
    #[cfg_attr(feature = "serde", serde(serialize_with = "crate::serialize::maybe_seconds"))]
    pub transaction_since: Option<SystemTime>,
    /// When the session's statement was started, or the last one if the session is idle.
    #[cfg_attr(feature = "serde", serde(serialize_with = "crate::serialize::maybe_seconds"))]
    pub query_since: Option<SystemTime>,
}

impl Session {
    fn leader(&self) -> Option<Leader> {
        let leader = Leader::from(Holder {
            backend_pid: self.backend_pid,
            application_name: self.application_name.clone()?,
            client_addr: self.client_addr.clone(),
        });
        leader.term.is_some().then_some(leader)
    }
}

fn from_micros(micros: i64) -> Option<SystemTime> {
    UNIX_EPOCH.checked_add(Duration::from_micros(micros.try_into().ok()?))
}

fn to_micros(time: SystemTime) -> Option<i64> {
    time.duration_since(UNIX_EPOCH).ok()?.as_micros().try_into().ok()
}
