//! The guards: a lock is held for as long as one of its guards lives.

mod exclusive;
mod shared;

use std::fmt;
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::{Arc, OnceLock};

use tracing::Span;
use tracing::field::{Empty, display};

use crate::error::{Error, Loss, Result};
use crate::holdings::{Holdings, Token};
use crate::key::Key;
use crate::manager::{Manager, PendingRelease};
use crate::metrics::{self, Held};
use crate::mode::Mode;
use crate::owner::Owner;
use crate::request::{Need, Request};
use crate::session::Session;
use crate::session::ledger::Join;
use crate::session::lend::SessionConnection;
use crate::session::pending::{Granted, Pending};
use crate::session::policy::WaitPolicy;
use crate::session::release::Release;
use crate::source::sealed::Sealed;
use crate::sql::release::Protocol;
pub use exclusive::ExclusiveGuard;
pub use shared::{SharedGuard, Upgrade};

/// The common part of all guards: a lock that is held on a session, which may be lost.
///
/// [`ExclusiveGuard`], [`SharedGuard`], [`MultiGuard`](crate::MultiGuard), [`Permit`](crate::Permit) and
/// [`Leadership`](crate::Leadership) dereference to it, so they have all its methods, and a function that
/// takes a `&Guard` takes a reference to any of them. All but a `Leadership` can also be converted to an owned `Guard`.
///
/// # Drop
///
/// Releases the lock, as for [`ExclusiveGuard`].
///
/// # Examples
///
/// ```
/// use pglock::{Guard, Lock, Semaphore};
///
/// fn log(guard: &Guard) {
///     println!("held by backend {}", guard.backend_pid());
/// }
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
/// # let pool = pglock_testkit::pool().await;
/// let guard = Lock::new(&pool, "invoice-17").acquire().await?;
/// let permit = Semaphore::new(&pool, "printers", 2)?.acquire().await?;
/// log(&guard);
/// log(&permit);
///
/// let guards: Vec<Guard> = vec![guard.into(), permit.into()];
/// for guard in guards {
///     guard.release().await?;
/// }
/// # Ok(()) }
/// ```
#[must_use = "if unused, the lock is released at once"]
#[clippy::has_significant_drop]
pub struct Guard {
    session: Arc<Session>,
    request: Request,
    token: OnceLock<Token>,
    released: bool,
    /// The handle, which can also release the lock.
    handle: Arc<Holdings>,
    home: Home,
    held: Held,
    // Unwind safe, because a subscriber receives only the end of the span.
    span: AssertUnwindSafe<Span>,
}

/// What counts the lock of a guard, besides its session.
pub(crate) enum Home {
    /// The handle, under this number.
    Handle(u64),
    /// A manager, which has other locks on the session, too.
    Manager(Arc<Manager>),
}

impl Guard {
    /// Returns the process id of the server's backend whose session holds the lock.
    ///
    /// That is the `pid` of `pg_stat_activity` and `pg_locks`.
    ///
    /// # Examples
    ///
    /// ```
    /// # use pglock::Lock;
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// let guard = Lock::new(&pool, "invoice-17").acquire().await?;
    /// println!("held by backend {}", guard.backend_pid());
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn backend_pid(&self) -> i32 {
        self.session.backend_pid()
    }

    /// Returns the keys that the guard holds, each with its mode. Sends nothing.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::{Key, Mode, MultiLock};
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// let guard = MultiLock::new(&pool, [1]).acquire().await?;
    /// assert_eq!(guard.keys().next(), Some((&Key::from(1), Mode::Exclusive)));
    /// # Ok(()) }
    /// ```
    pub fn keys(&self) -> impl Iterator<Item = (&Key, Mode)> {
        self.request.locks().iter().map(|(key, mode)| (key, *mode))
    }

    /// Drops this guard, releases the lock if it was the last of its handle (`pg_advisory_unlock`), and waits for the
    /// server's answer.
    ///
    /// Equivalent to dropping the guard, but returns any error, so it shows whether the lock was held until now. Sends
    /// one statement if this was the last guard of its handle, or the last exclusive one, otherwise none. If the lock
    /// is [handed off](crate::guide::guarantees#fairness) to another task of the process, the statement asks whether
    /// the session is alive; dropping the guard sends none then. Settings that were changed are restored by another
    /// statement, which this call does not wait for.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: the release continues if the future is dropped.
    ///
    /// # Errors
    ///
    /// [`Error::Lost`] if the session no longer held the lock: its connection broke, or other code unlocked it. Another
    /// session may have held the lock since. [`Error::NoExclusion`] if locks exclude no other session there.
    /// [`Error::ConnectionBorrowed`] if another guard's [`connection`](Self::connection) stays borrowed for ten
    /// seconds; the release continues when it is returned.
    ///
    /// # Examples
    ///
    /// ```
    /// # use pglock::Lock;
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// let guard = Lock::new(&pool, "invoice-17").acquire().await?;
    /// guard.release().await?;
    /// # Ok(()) }
    /// ```
    pub async fn release(mut self) -> Result<()> {
        match self.start_release(Protocol::Extended) {
            Some(release) => release.done().await,
            None => Ok(()),
        }
    }

    /// Returns whether the lock was lost: `true` as soon as the loss is detected.
    ///
    /// Sends nothing. `false` means that no loss was detected; it is as recent as the session's last answer. A silent
    /// session is lost when the heartbeat's interval and timeout
    /// ([`LockOptions::heartbeat_interval`](crate::LockOptions::heartbeat_interval)) have passed since the last
    /// answered statement was sent: over a direct TCP connection, [before](crate::guide::guarantees#loss) the server
    /// grants the lock to another session. A closed connection is detected within 50 ms if it is idle and the lock has
    /// been held for more than two seconds, otherwise at the next heartbeat. After a system suspend, `is_lost` returns
    /// `false` until the first heartbeat, because the monotonic clock does not advance during suspend.
    ///
    /// # Examples
    ///
    /// ```
    /// # use pglock::Lock;
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// let guard = Lock::new(&pool, "invoice-17").acquire().await?;
    /// assert!(!guard.is_lost());
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.loss().is_some()
    }

    /// Waits until the lock is lost, and returns the reason. Pending while the lock is held.
    ///
    /// Sends nothing. See [`is_lost`](Self::is_lost) for how soon a loss is detected.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    ///
    /// # Panics
    ///
    /// If called on a runtime other than the session's that has no time driver.
    ///
    /// # Examples
    ///
    /// ```
    /// # use pglock::Lock;
    /// # async fn work() {}
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// let guard = Lock::new(&pool, "invoice-17").acquire().await?;
    /// tokio::select! {
    ///     loss = guard.lost() => eprintln!("stop at once: {loss}"),
    ///     () = work() => {}
    /// }
    /// # Ok(()) }
    /// ```
    pub async fn lost(&self) -> Loss {
        tokio::select! {
            biased;
            loss = self.handle.is_closed() => loss,
            loss = self.session.lost() => loss,
        }
    }

    /// Asks the server whether the session still holds the lock (`pg_lock_status`).
    ///
    /// Sends one statement on the session's own connection, for any number of keys. Waits while the connection is in
    /// use. For a guard of a [`LockManager`](crate::LockManager), the answer has a row for each lock of the manager's
    /// session.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: the answer is ignored.
    ///
    /// # Errors
    ///
    /// [`Error::Lost`] if the session does not hold the lock;
    /// [`Error::NoExclusion`] if another session answers;
    /// [`Error::Database`] if the server returns an error, or does not
    /// answer within the heartbeat's timeout, which is not a loss: the next heartbeat decides;
    /// [`Error::ConnectionBorrowed`] if the connection stays borrowed for ten
    /// seconds.
    ///
    /// # Panics
    ///
    /// If called outside a tokio runtime.
    ///
    /// # Examples
    ///
    /// ```
    /// # use pglock::Lock;
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// let guard = Lock::new(&pool, "invoice-17").acquire().await?;
    /// guard.verify().await?;
    /// # Ok(()) }
    /// ```
    pub async fn verify(&self) -> Result<()> {
        self.check_open()?;
        self.session.verify(&self.request).await
    }

    /// Runs a future while the lock is held.
    ///
    /// If the lock is lost, the future is dropped, and then the loss is returned. The guard is
    /// borrowed, so the lock is not released before the future has ended; if the future panics,
    /// the guard is dropped while the panic unwinds.
    ///
    /// Tasks that the future has spawned are not stopped.
    ///
    /// # Cancel safety
    ///
    /// Dropping the returned future drops the one that it runs.
    ///
    /// # Errors
    ///
    /// [`Error::Lost`], or [`Error::NoExclusion`], if the lock is lost before the future has ended.
    ///
    /// # Panics
    ///
    /// As [`lost`](Self::lost).
    ///
    /// # Examples
    ///
    /// ```
    /// # use pglock::Lock;
    /// # async fn make_report() -> u32 { 1 }
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// let guard = Lock::new(&pool, "invoice-17").acquire().await?;
    /// let pages = guard.while_held(make_report()).await?;
    /// assert_eq!(pages, 1);
    /// # Ok(()) }
    /// ```
    pub async fn while_held<T>(&self, future: impl Future<Output = T>) -> Result<T> {
        let ended = {
            let future = pin!(future);
            tokio::select! {
                biased;
                reason = self.lost() => Err(reason),
                output = future => Ok(output),
            }
            // The future is dropped here, before the caller is notified of the loss.
        };
        let ended = ended.and_then(|output| self.loss().map_or(Ok(output), Err));
        ended.map_err(|reason| Error::lost(self.key(), reason))
    }

    /// Returns a fencing token: a number that is greater than that of every previous holder.
    ///
    /// A store that does not know the lock can check the token: it refuses a write whose token is
    /// less than the greatest one seen. The first call sends one statement on the session's
    /// own connection; later calls return the same number without a round trip. Guards of one handle that are alive
    /// at the same time, and in the same mode, have the same token.
    ///
    /// The token is a transaction id of the server (`pg_current_xact_id`), so it also grows from
    /// lock to lock, and it survives restarts and crashes. It does not survive a failover to a
    /// standby that had not received the last transactions, because that standby can assign the
    /// same ids again. Nor is it a part of a logical dump into another server.
    ///
    /// The transaction changes no row. It writes an empty logical message with the prefix `pglock`, which
    /// consumers of [logical decoding](crate::guide::operations#the-server) may see.
    ///
    /// The transaction is committed with the session's `synchronous_commit`, and at least
    /// `local`: the token is on the server's disk. If the commit waits for a synchronous standby
    /// for longer than ten seconds, the statement is cancelled and an error is returned. The lock
    /// is still held.
    ///
    /// # A guarded write
    ///
    /// ```sql
    /// UPDATE invoice SET paid = true, token = $1 WHERE id = $2 AND token <= $1
    /// ```
    ///
    /// The column must be `NOT NULL`, for example `token bigint NOT NULL DEFAULT 0`. If no row was changed, a later
    /// holder has written, or there is no such row: stop, and don't retry. This `UPDATE` is safe at every isolation
    /// level; above `READ COMMITTED`, it may also fail with 40001. A statement that only reads the token, and writes
    /// elsewhere, is not safe: under `REPEATABLE READ` and above it sees the row as it was when the transaction began,
    /// and admits a late holder. See [fencing](crate::guide::guarantees#fencing).
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: at worst a number is drawn and not used.
    ///
    /// # Errors
    ///
    /// [`Error::Lost`] if the session has ended;
    /// [`Error::Database`] if the server returns an error, for example on
    /// a standby, which can't assign transaction ids, or if the commit took longer than ten
    /// seconds; [`Error::ConnectionBorrowed`] if the connection stays borrowed for
    /// ten seconds.
    ///
    /// # Panics
    ///
    /// If called outside a tokio runtime.
    ///
    /// # Examples
    ///
    /// ```
    /// # use pglock::Lock;
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// let first = Lock::new(&pool, "invoice-17").acquire().await?;
    /// let token = first.fencing_token().await?;
    /// first.release().await?;
    ///
    /// let next = Lock::new(&pool, "invoice-17").acquire().await?;
    /// assert!(next.fencing_token().await? > token);
    /// # Ok(()) }
    /// ```
    pub async fn fencing_token(&self) -> Result<i64> {
        self.check_open()?;
        let token = self.token();
        if let Some(&token) = token.get() {
            return Ok(token);
        }
        let drawn = self.session.draw_token(self.key()).await?;
        // Of two concurrent calls, the token of the first one counts for both.
        Ok(*token.get_or_init(|| drawn))
    }

    /// Sets the token that was drawn for another guard of the same hold.
    pub(crate) fn set_token(&self, token: i64) {
        self.token().get_or_init(|| token);
    }

    fn token(&self) -> &Token {
        self.token.get_or_init(|| self.handle.token(&self.session, self.request.mode()))
    }

    /// Borrows the connection of the session that holds the lock. A guard of a [`LockManager`](crate::LockManager) has
    /// no connection of its own, and returns [`Error::SharedSession`].
    ///
    /// A statement that is sent through the connection takes no effect after the session has ended, and the lock with
    /// it: the server rolls back the open transaction. Waits while the connection is in use, for example borrowed from
    /// another guard of the session. The first call sends one statement, which applies the settings of a borrowed
    /// connection, and finds a transaction that was left open on the pooled connection; later calls send at most one.
    /// When the connection is returned, one statement ends what was left open; if the lock stays held, another one
    /// checks that the session still holds it.
    ///
    /// While the connection is borrowed, a closed session is detected only at the next heartbeat.
    ///
    /// The pool's `before_acquire` hook may not have run on the connection; `after_connect` has.
    ///
    /// `CREATE INDEX CONCURRENTLY` waits for every older snapshot, including that of a session
    /// that waits for this lock. On this connection that is a deadlock, and one of the two
    /// statements fails. Run it on another connection.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: if the future is dropped, nothing is borrowed.
    ///
    /// # Errors
    ///
    /// [`Error::Lost`] if the session has ended;
    /// [`Error::ConnectionBorrowed`] if the connection stays borrowed elsewhere for
    /// ten seconds; [`Error::SharedSession`] for a guard of a
    /// [`LockManager`](crate::LockManager).
    ///
    /// # Panics
    ///
    /// If called outside a tokio runtime.
    ///
    /// # Examples
    ///
    /// ```
    /// # use pglock::Lock;
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let pool = pglock_testkit::pool().await;
    /// # sqlx::raw_sql("CREATE TABLE entry (amount int)").execute(&pool).await?;
    /// let guard = Lock::new(&pool, "invoice-17").acquire().await?;
    /// let mut connection = guard.connection().await?;
    /// sqlx::query("INSERT INTO entry VALUES (100)").execute(&mut *connection).await?;
    /// # Ok(()) }
    /// ```
    pub async fn connection(&self) -> Result<SessionConnection<'_>> {
        self.check_open()?;
        if let Home::Manager(_) = self.home {
            let key = self.key();
            return Err(match self.loss() {
                Some(loss) => Error::lost(key, loss),
                None => Error::SharedSession { key: key.clone() },
            });
        }
        self.session.lend(self.key()).await
    }

    /// Makes a guard of a handle, which counts it.
    pub(crate) fn new(granted: Granted, handle: &Arc<Holdings>) -> Self {
        let number = handle.add(&granted.session, &granted.request);
        Self::at(Home::Handle(number), granted, handle)
    }

    pub(crate) fn at(home: Home, granted: Granted, handle: &Arc<Holdings>) -> Self {
        let Granted { session, request } = granted;
        let held = Held::start(&request.labels(session.options()));
        let (token, span) = (OnceLock::new(), AssertUnwindSafe(Span::none()));
        let handle = Arc::clone(handle);
        Self { session, request, token, released: false, handle, home, held, span }
    }

    pub(crate) fn session(&self) -> &Arc<Session> {
        &self.session
    }

    pub(crate) fn key(&self) -> &Key {
        self.request.key()
    }

    /// Runs a future while the lock is held, and then releases the lock.
    pub(crate) async fn run<T>(self, future: impl Future<Output = T>) -> Result<T> {
        let output = self.while_held(future).await?;
        self.release().await?;
        Ok(output)
    }

    /// Acquires more locks on this very session, if they are free.
    pub(crate) async fn and(&self, request: &Request) -> Result<Option<Self>> {
        self.check_open()?;
        let session = &self.session;
        let ended = || Error::lost(request.key(), self.loss().unwrap_or(Loss::NotHeld));
        if let Home::Manager(manager) = &self.home {
            if self.is_lost() {
                return Err(ended());
            }
            let more = manager.acquire(&self.handle, request, WaitPolicy::Never).await?;
            // If the session was lost meanwhile, the lock was granted on another session.
            let is_elsewhere =
                more.as_ref().is_some_and(|more| !Arc::ptr_eq(&more.session, session));
            return if is_elsewhere { Err(ended()) } else { Ok(more.map(Self::traced)) };
        }
        let joined = match session.join(request) {
            Join::Covered => {
                Some(Granted { session: Arc::clone(session), request: request.clone() })
            }
            Join::Ask => {
                let joining = Pending::join(Arc::clone(session), request, WaitPolicy::Never).await;
                let pending = joining.map_err(|reason| reason.error(request.key()))?;
                let (pending, verdict) =
                    pending.ok_or_else(ended)?.try_now(WaitPolicy::Never).await?;
                let waiting = &mut metrics::Waiting::default();
                pending.settle(verdict, WaitPolicy::Never, waiting).await?
            }
            Join::Lost | Join::Released => return Err(ended()),
        };
        Ok(joined.map(|granted| Self::new(granted, &self.handle).traced()))
    }

    pub(crate) fn loss(&self) -> Option<Loss> {
        self.handle.closed().or_else(|| self.session.loss())
    }

    fn check_open(&self) -> Result<()> {
        self.handle.closed().map_or(Ok(()), |closed| Err(Error::lost(self.key(), closed)))
    }

    /// Begins the span of the hold, as a child of the current span. A manager's request for a session without a lock
    /// has no span.
    pub(crate) fn traced(mut self) -> Self {
        if self.request.need == Need::Nothing {
            return self;
        }
        let key = self.key();
        *self.span = tracing::debug_span!(
            "hold",
            lock.key = %key.id(),
            lock.name = key.name(),
            mode = %self.request.mode(),
            backend_pid = self.backend_pid(),
            outcome = Empty,
        );
        self
    }

    /// Ends the span: when the guard is dropped, or when its release begins.
    fn end_span(&mut self) {
        if !self.span.is_disabled() {
            let outcome = if self.loss().is_some() { "lost" } else { "released" };
            self.span.record("outcome", display(outcome));
            *self.span = Span::none();
        }
    }

    /// Starts the release, once. Every release of a guard takes this path.
    fn start_release(&mut self, protocol: Protocol) -> Option<Releasing> {
        if self.released {
            return None;
        }
        self.released = true;
        self.held.end();
        self.end_span();
        Some(match &self.home {
            Home::Manager(manager) => {
                let awaited = matches!(protocol, Protocol::Extended);
                let (key, mode) = (self.key(), self.request.mode());
                Releasing::ByManager(manager.leave(&self.handle, key, mode, &self.session, awaited))
            }
            // The lock was released when the handle was closed.
            Home::Handle(number) if !self.handle.end(*number) => {
                let closed = Err(Error::lost(self.key(), Loss::Released));
                Releasing::BySession(Release::Done(closed))
            }
            Home::Handle(_) => {
                Releasing::BySession(Arc::clone(&self.session).release(&self.request, protocol))
            }
        })
    }
}

/// The release of a guard.
enum Releasing {
    ByManager(PendingRelease),
    BySession(Release),
}

impl Releasing {
    /// Waits for the server's answer. Dropping this does not stop the release.
    async fn done(self) -> Result<()> {
        match self {
            Self::ByManager(release) => release.done().await,
            Self::BySession(release) => release.done().await,
        }
    }
}

impl Sealed for Guard {
    /// Returns an owner that acquires other locks on the same session, or through the same manager.
    fn owner(&self) -> Owner {
        let manager = match &self.home {
            Home::Manager(manager) => Some(Arc::clone(manager)),
            Home::Handle(_) => None,
        };
        Owner::of(&self.session, manager)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // Detach: no caller waits for the answer.
        drop(self.start_release(Protocol::Simple));
    }
}

impl fmt::Debug for Guard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guard")
            .field("locks", &self.request.locks())
            .field("backend_pid", &self.backend_pid())
            .finish_non_exhaustive()
    }
}

/// Implements the traits that all guard types have in common, by their [`Guard`].
macro_rules! is_guard {
    ($Type:ty) => {
        impl std::ops::Deref for $Type {
            type Target = $crate::Guard;

            fn deref(&self) -> &$crate::Guard {
                &self.guard
            }
        }

        impl $crate::source::sealed::Sealed for $Type {
            fn owner(&self) -> $crate::owner::Owner {
                self.guard.owner()
            }
        }

        impl std::fmt::Debug for $Type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.debug_tuple(stringify!($Type)).field(&self.guard).finish()
            }
        }
    };
}
pub(crate) use is_guard;

/// Converts a guard type that is nothing but a [`Guard`]. A [`Leadership`](crate::Leadership) is more: its drop reports
/// the end of the term.
macro_rules! into_guard {
    ($Type:ty) => {
        impl From<$Type> for $crate::Guard {
            fn from(guard: $Type) -> Self {
                guard.guard
            }
        }
    };
}
pub(crate) use into_guard;
