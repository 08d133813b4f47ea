//! The holders and waiters of a database's advisory locks, and a way to end a session.
//!
//! It asks the server, so it shows the locks of all programs, whatever they are written in: those of this
//! crate, of migration tools, of a person at `psql`. It shows those of one database, that of the
//! connection; keys belong to a database, so an equal key elsewhere is another lock.
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
//! Everything here takes what a query of sqlx takes: a pool, a connection, a transaction. Each call is one
//! statement, for which the server stops granting locks for a moment, once for each waiter; don't call it
//! many times a second. Of a transaction it also clears the snapshot of statistics, which would show sessions
//! as they were.
//!
//! # Names
//!
//! The server stores only numbers. A name was hashed, and can't be recovered from its hash. A program that
//! has the names can hash them again: [`name_keys`] does that, and [`locks`] with those that sessions show, with
//! [`LockOptions::application_name`](crate::LockOptions::application_name). The name of an election's leader is shown on
//! the server, too: [`LockInfo::leader`].
//!
//! # Since when
//!
//! The server remembers when a wait began, from PostgreSQL 14 on. It does **not** remember when a lock
//! was granted. Of a holder it says when the [session](Session) was started, which was before; when its
//! transaction was, if it is in one; and since when it is in its state: if it is idle since then, it has
//! held all its locks at least since then. (A session of this crate is asked at every
//! [heartbeat](crate::LockOptions::heartbeat_interval), and idle since then.) A leader shows when it was elected.
//!
//! A waiter of this crate waits in [slices](crate::LockOptions::wait_slice), and its wait begins anew with
//! each.
//!
//! All times are by the server's clock. [`LockInfo::ago`] tells how long ago one was, without ours.
//!
//! With the feature `serde`, they are numbers of seconds since 1970, and the key of a lock is two fields: `key`, which
//! is its number or pair as a text, and `name`.
//!
//! # Privileges
//!
//! Every role sees every lock: key, mode, whether it is held, by which process, who blocks whom; and of
//! each session the user and the `application_name`. The rest of a session, from its address to its
//! times, shows to its own role, to members of that, of `pg_read_all_stats` or of `pg_monitor`, and to
//! superusers. It is `None` to others. On a hardened server, the views `pg_locks` and `pg_stat_activity` may be
//! revoked, but not the functions behind them, `pg_lock_status` and `pg_stat_get_activity`: a call that is refused
//! one returns [`Error::Inspect`], which names the function to grant.
//!
//! [`terminate`] takes the session's own role, or a member of that or of `pg_signal_backend`; only a
//! superuser can end a superuser's session. And it takes the right to see when the session was started,
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
/// Ordered by key; the holders of each before its waiters, and those by how long they wait.
///
/// # Cancel safety
///
/// Cancel safe: it only asks.
///
/// # Errors
///
/// [`Error::Inspect`] if the query fails, or is not answered within ten seconds, with the wait for a connection.
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
/// Ordered as by [`locks`]. The permits of a semaphore have keys of their own, which [`name_keys`]
/// recognizes.
///
/// # Cancel safety
///
/// Cancel safe: it only asks.
///
/// # Errors
///
/// [`Error::Inspect`] if the query fails, or is not answered within ten seconds, with the wait for a connection.
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

/// Gives the keys of locks the names that they were made from, of those that you know.
///
/// Pass a [`Key`] where it was not made as sqlx does, such as those of
/// [`interop`](crate::interop). Permits and the queue of a [`Semaphore`](crate::Semaphore) are recognized by the
/// semaphore's key. What has a name keeps it.
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
    // There may be many of both.
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

/// Ends a session at the server, and with it all that it holds and waits for.
///
/// The session is ended only if it still is the one that was shown, by process id and by the time at
/// which it was started, which the statement compares. Returns whether the server was asked to end it. `false`
/// if it has ended, or if our role can't see when it was started.
///
/// Its holder is notified of the loss: a guard of this crate at once. The holder's work may still go on
/// outside the database for a moment, so the next holder of the lock should be
/// [fenced](crate::Guard::fencing_token).
///
/// # Cancel safety
///
/// The session may have been ended.
///
/// # Errors
///
/// [`Error::Inspect`] if the query fails or is not answered within ten seconds, with the wait for a connection, or if our
/// role must not end the session.
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
    /// The key, without a name unless it was asked for by name, or a session shows it: see
    /// [names](crate::inspect#names).
    #[cfg_attr(
        feature = "serde",
        serde(flatten, serialize_with = "crate::serialize::key_and_name")
    )]
    pub key: Key,
    /// In which mode it is held or wanted.
    pub mode: Mode,
    /// Whether it is held. If not, it is waited for.
    pub held: bool,
    /// Since when a waiter waits, in this statement. `None` before PostgreSQL 14.
    #[cfg_attr(feature = "serde", serde(serialize_with = "crate::serialize::maybe_seconds"))]
    pub waiting_since: Option<SystemTime>,
    /// The backends that a waiter waits for: holders, and waiters that are ahead of it. 0 stands for a
    /// prepared transaction.
    pub blocked_by: Vec<i32>,
    /// The session that holds or waits. `None` if a prepared transaction holds the lock.
    pub session: Option<Session>,
    /// The identifier of the prepared transaction that holds the lock, which `ROLLBACK PREPARED` takes.
    pub prepared: Option<String>,
    /// As which leader the session shows itself, if it holds the lock exclusively. If it holds others
    /// too, the server does not say which of them is that of the election.
    pub leader: Option<Leader>,
    /// When the server was asked, by its own clock.
    #[cfg_attr(feature = "serde", serde(serialize_with = "crate::serialize::seconds"))]
    pub seen_at: SystemTime,
}

impl LockInfo {
    /// Returns how long ago a time of the server's clock was when it was asked. Zero if it was later.
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

/// A session of the server, and what our role may see of it.
///
/// # Examples
///
/// As for [`terminate`].
#[derive(Clone, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Session {
    /// The process id of its backend.
    pub backend_pid: i32,
    /// When it was started. Together with the process id, this identifies the session.
    #[cfg_attr(feature = "serde", serde(serialize_with = "crate::serialize::maybe_seconds"))]
    pub started_at: Option<SystemTime>,
    /// The role that it was started by.
    pub user: Option<String>,
    /// What the application calls itself.
    pub application_name: Option<String>,
    /// The address of the client. `None` over a unix socket too.
    pub client_addr: Option<String>,
    /// What it is doing, in PostgreSQL's words: `active`, `idle`, `idle in transaction`, …
    pub state: Option<String>,
    /// Since when it is in that state.
    #[cfg_attr(feature = "serde", serde(serialize_with = "crate::serialize::maybe_seconds"))]
    pub state_since: Option<SystemTime>,
    /// When its transaction was started, if it is in one.
    #[cfg_attr(feature = "serde", serde(serialize_with = "crate::serialize::maybe_seconds"))]
    pub transaction_since: Option<SystemTime>,
    /// When its statement was started, or its last one if it is idle.
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
