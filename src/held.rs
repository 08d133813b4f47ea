//! Proof of holding: what all guards are made of, and what they can do.

use std::fmt;
use std::pin::pin;
use std::sync::{Arc, OnceLock};

use crate::error::{Error, Loss, Result};
use crate::key::Key;
use crate::manager::Managed;
use crate::owner::Owner;
use crate::request::Request;
use crate::session::ledger::Join;
use crate::session::lend::SessionConnection;
use crate::session::pending::{Patience, Pending};
use crate::session::{Release, Session};
use crate::sql::Protocol;

/// One share in what a session holds.
///
/// # Drop
///
/// Gives it up.
pub(crate) struct Held {
    session: Arc<Session>,
    request: Request,
    token: OnceLock<u64>,
    released: bool,
    /// Whoever took it for us has others on the session, too.
    managed: Option<Managed>,
}

impl Held {
    pub(crate) fn new(session: Arc<Session>, request: Request) -> Self {
        Self { session, request, token: OnceLock::new(), released: false, managed: None }
    }

    /// What a manager took for one of its owners.
    pub(crate) fn managed(session: Arc<Session>, request: Request, managed: Managed) -> Self {
        let mut held = Self::new(session, request);
        held.managed = Some(managed);
        held
    }

    /// Who takes other locks on the same session, or through the same manager.
    pub(crate) fn owner(&self) -> Owner {
        Owner::of(&self.session, self.managed.as_ref())
    }

    pub(crate) fn session(&self) -> &Arc<Session> {
        &self.session
    }

    pub(crate) fn request(&self) -> &Request {
        &self.request
    }

    pub(crate) fn key(&self) -> &Key {
        self.request.key()
    }

    /// Takes more, on this very session, if it is free.
    pub(crate) async fn and(&self, request: &Request) -> Result<Option<Self>> {
        let session = &self.session;
        let ended = || Error::lost(request.key(), self.loss().unwrap_or(Loss::NotHeld));
        if let Some(managed) = &self.managed {
            if self.is_lost() {
                return Err(ended());
            }
            let more = managed.acquire(request, Patience::Never).await?;
            // If the session was lost meanwhile, it was granted on another.
            let is_elsewhere =
                more.as_ref().is_some_and(|more| !Arc::ptr_eq(&more.session, session));
            return if is_elsewhere { Err(ended()) } else { Ok(more) };
        }
        match session.join(request) {
            Join::Covered => return Ok(Some(Self::new(Arc::clone(session), request.clone()))),
            Join::Ask => {}
            Join::Ended => return Err(ended()),
        }
        let joining = Pending::join(Arc::clone(session), request, session.options());
        let pending = joining.await.ok_or_else(ended)?;
        let (pending, verdict) = pending.try_now(Patience::Never).await?;
        pending.settle(verdict, Patience::Never).await
    }

    pub(crate) fn backend_pid(&self) -> i32 {
        self.session.backend_pid()
    }

    pub(crate) async fn release(mut self) -> Result<()> {
        match self.start_release(Protocol::Extended) {
            Some(release) => release.done().await,
            None => Ok(()),
        }
    }

    pub(crate) fn loss(&self) -> Option<Loss> {
        let closed = self.managed.as_ref().and_then(Managed::closed);
        closed.or_else(|| self.session.loss())
    }

    pub(crate) fn is_lost(&self) -> bool {
        self.loss().is_some()
    }

    pub(crate) async fn lost(&self) -> Loss {
        let Some(managed) = &self.managed else { return self.session.lost().await };
        tokio::select! {
            biased;
            loss = managed.is_closed() => loss,
            loss = self.session.lost() => loss,
        }
    }

    pub(crate) async fn verify(&self) -> Result<()> {
        self.check_open()?;
        self.session.verify(&self.request).await
    }

    pub(crate) async fn while_held<T>(&self, future: impl Future<Output = T>) -> Result<T> {
        let ended = {
            let future = pin!(future);
            tokio::select! {
                biased;
                reason = self.lost() => Err(reason),
                output = future => Ok(output),
            }
            // Here it is dropped, before anybody hears of the loss.
        };
        let ended = ended.and_then(|output| self.loss().map_or(Ok(output), Err));
        ended.map_err(|reason| Error::lost(self.key(), reason))
    }

    pub(crate) async fn fencing_token(&self) -> Result<u64> {
        self.check_open()?;
        if let Some(&token) = self.token.get() {
            return Ok(token);
        }
        let drawn = self.session.draw_token(self.key()).await?;
        // Of two who draw at once, the first one's counts for both.
        Ok(*self.token.get_or_init(|| drawn))
    }

    pub(crate) async fn connection(&self) -> Result<SessionConnection<'_>> {
        self.check_open()?;
        if self.managed.is_some() {
            let key = self.key();
            return Err(match self.loss() {
                Some(loss) => Error::lost(key, loss),
                None => Error::SharedSession { key: key.clone() },
            });
        }
        self.session.lend(self.key()).await
    }

    /// The session may live on, though the handle was closed.
    fn check_open(&self) -> Result<()> {
        match self.managed.as_ref().and_then(Managed::closed) {
            Some(closed) => Err(Error::lost(self.key(), closed)),
            None => Ok(()),
        }
    }

    /// Starts the release, once. The only path by which a guard lets go.
    fn start_release(&mut self, protocol: Protocol) -> Option<Release> {
        if self.released {
            return None;
        }
        self.released = true;
        if let Some(managed) = &self.managed {
            let farewell = managed.leave(self.key(), self.request.mode(), &self.session);
            return farewell.map(Release::Told);
        }
        Some(Arc::clone(&self.session).release(&self.request, protocol))
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // Detach: nobody is left to wait for the answer.
        drop(self.start_release(Protocol::Simple));
    }
}

impl fmt::Debug for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Held")
            .field("locks", &self.request.locks())
            .field("backend_pid", &self.backend_pid())
            .finish_non_exhaustive()
    }
}

/// What all proofs of holding can do: the methods of a type with a field `held`.
///
/// Takes what the release is called, and how the documentation makes one: what to import, and the
/// expression.
macro_rules! methods {
    ($Guard:ident, $release:ident, $import:literal, $make:literal) => {
        impl $Guard {
            /// Returns the process id of the server's backend whose session holds the lock.
            ///
            /// That is the `pid` of `pg_stat_activity` and `pg_locks`.
            ///
            /// # Examples
            ///
            /// ```
            #[doc = concat!("# use pglock::", $import, ";")]
            /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
            /// # let pool = pglock_testkit::pool().await;
            #[doc = concat!("let guard = ", $make, ";")]
            /// println!("held by backend {}", guard.backend_pid());
            /// # Ok(()) }
            /// ```
            #[must_use]
            pub fn backend_pid(&self) -> i32 {
                self.held.backend_pid()
            }

            /// Releases this guard's share of the lock, and waits for the server's answer.
            ///
            /// The same path as dropping the guard, awaited: use it to learn whether the lock was
            /// held to the end. One statement if this was the last guard of its handle, else none.
            ///
            /// # Cancel safety
            ///
            /// Cancel safe: the release is under way before the first await, and dropping the future
            /// only gives up waiting for its result.
            ///
            /// # Errors
            ///
            /// [`Error::Lost`](crate::Error::Lost) if the session did not hold the lock any more:
            /// its connection broke, or something else unlocked it. Somebody else may have held the
            /// lock since.
            ///
            /// # Examples
            ///
            /// ```
            #[doc = concat!("# use pglock::", $import, ";")]
            /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
            /// # let pool = pglock_testkit::pool().await;
            #[doc = concat!("let guard = ", $make, ";")]
            #[doc = concat!("guard.", stringify!($release), "().await?;")]
            /// # Ok(()) }
            /// ```
            pub async fn $release(self) -> $crate::Result<()> {
                self.held.release().await
            }

            /// Returns whether the lock was lost: true from the moment that this is known.
            ///
            /// Sends nothing. False is as good as the session's last answer: a closed connection is
            /// noticed at once, a silent one when the heartbeat's interval and deadline are over
            /// ([`LockOptions::heartbeat`](crate::LockOptions::heartbeat)), which is always before
            /// the server lets anybody else in.
            ///
            /// # Examples
            ///
            /// ```
            #[doc = concat!("# use pglock::", $import, ";")]
            /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
            /// # let pool = pglock_testkit::pool().await;
            #[doc = concat!("let guard = ", $make, ";")]
            /// assert!(!guard.is_lost());
            /// # Ok(()) }
            /// ```
            #[must_use]
            pub fn is_lost(&self) -> bool {
                self.held.is_lost()
            }

            /// Waits until the lock is lost, and returns how. Pending for as long as it is held.
            ///
            /// # Cancel safety
            ///
            /// Cancel safe: it only listens.
            ///
            /// # Examples
            ///
            /// ```
            #[doc = concat!("# use pglock::", $import, ";")]
            /// # async fn work() {}
            /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
            /// # let pool = pglock_testkit::pool().await;
            #[doc = concat!("let guard = ", $make, ";")]
            /// tokio::select! {
            ///     loss = guard.lost() => eprintln!("stop at once: {loss}"),
            ///     () = work() => {}
            /// }
            /// # Ok(()) }
            /// ```
            pub async fn lost(&self) -> $crate::Loss {
                self.held.lost().await
            }

            /// Asks the server whether the session still holds the lock.
            ///
            /// One statement, on the session's own connection; waits while that is lent out.
            ///
            /// # Cancel safety
            ///
            /// Cancel safe: dropping the future only gives up the answer.
            ///
            /// # Errors
            ///
            /// [`Error::Lost`](crate::Error::Lost) if it does not, or does not answer within the
            /// heartbeat's deadline; [`Error::Pooled`](crate::Error::Pooled) if another session
            /// answers.
            ///
            /// # Examples
            ///
            /// ```
            #[doc = concat!("# use pglock::", $import, ";")]
            /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
            /// # let pool = pglock_testkit::pool().await;
            #[doc = concat!("let guard = ", $make, ";")]
            /// guard.verify().await?;
            /// # Ok(()) }
            /// ```
            pub async fn verify(&self) -> $crate::Result<()> {
                self.held.verify().await
            }

            /// Runs a future for as long as the lock is held.
            ///
            /// If the lock is lost, the future is dropped, and then the loss returned. The lock is
            /// not released before the future has ended, one way or the other, for the guard is
            /// borrowed; if the future panics, the guard is dropped as the panic unwinds.
            ///
            /// What the future has handed to other tasks goes on; let it end there too.
            ///
            /// # Cancel safety
            ///
            /// Dropping the future that this returns drops the one that it runs.
            ///
            /// # Errors
            ///
            /// [`Error::Lost`](crate::Error::Lost) if the lock is lost before the future has ended,
            /// or by then.
            ///
            /// # Examples
            ///
            /// ```
            #[doc = concat!("# use pglock::", $import, ";")]
            /// # async fn make_report() -> u32 { 1 }
            /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
            /// # let pool = pglock_testkit::pool().await;
            #[doc = concat!("let guard = ", $make, ";")]
            /// let pages = guard.while_held(make_report()).await?;
            /// assert_eq!(pages, 1);
            /// # Ok(()) }
            /// ```
            pub async fn while_held<T>(
                &self,
                future: impl Future<Output = T>,
            ) -> $crate::Result<T> {
                self.held.while_held(future).await
            }

            /// Returns a number that is greater than that of everybody who held the lock before.
            ///
            /// It is what a store can check that does not know the lock: refuse a write whose token is
            /// less than the greatest one seen. The first call sends one statement, on the session's
            /// own connection; from then on the guard remembers it.
            ///
            /// The token is a transaction id of the server, so it also grows from lock to lock, and
            /// it survives restarts and crashes. It does not survive a failover to a standby that
            /// had not received the last transactions: then ids can be given out again. Nor does it
            /// go along with a logical dump into another server.
            ///
            /// # A guarded write
            ///
            /// ```sql
            /// UPDATE invoice SET paid = true, token = $1 WHERE id = $2 AND token <= $1
            /// ```
            ///
            /// No row changed means that a later holder was here. This needs `READ COMMITTED`,
            /// PostgreSQL's default: under `REPEATABLE READ` and above, the statement sees the row as
            /// it was when the transaction began, and either fails with 40001 or, if it only reads
            /// the token and writes elsewhere, lets a late holder through.
            ///
            /// # Cancel safety
            ///
            /// Cancel safe: at worst a number is drawn that nobody uses.
            ///
            /// # Errors
            ///
            /// [`Error::Lost`](crate::Error::Lost) if the session has ended;
            /// [`Error::Database`](crate::Error::Database) if the server refuses: a standby can't
            /// draw a number.
            ///
            /// # Examples
            ///
            /// ```
            #[doc = concat!("# use pglock::", $import, ";")]
            /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
            /// # let pool = pglock_testkit::pool().await;
            #[doc = concat!("let first = ", $make, ";")]
            /// let token = first.fencing_token().await?;
            #[doc = concat!("first.", stringify!($release), "().await?;")]
            ///
            #[doc = concat!("let next = ", $make, ";")]
            /// assert!(next.fencing_token().await? > token);
            /// # Ok(()) }
            /// ```
            pub async fn fencing_token(&self) -> $crate::Result<u64> {
                self.held.fencing_token().await
            }

            /// Lends the connection of the session that holds the lock.
            ///
            /// What is written through it can't outlive the lock. Waits while the connection is lent
            /// by another guard of the same handle. The first time, sends one statement, to make sure
            /// that nobody left a transaction open on the pooled connection; from then on none.
            ///
            /// The pool's `before_acquire` hook may not have run on it; `after_connect` has.
            ///
            /// `CREATE INDEX CONCURRENTLY` waits for every older snapshot, also that of a session
            /// that waits for this lock. Run on this connection, that is a deadlock, which costs
            /// one of the two its statement; run it on another.
            ///
            /// # Cancel safety
            ///
            /// Cancel safe: dropping the future lends nothing.
            ///
            /// # Errors
            ///
            /// [`Error::Lost`](crate::Error::Lost) if the session has ended.
            ///
            /// # Examples
            ///
            /// ```
            #[doc = concat!("# use pglock::", $import, ";")]
            /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
            /// # let pool = pglock_testkit::pool().await;
            /// # sqlx::raw_sql("CREATE TABLE entry (amount int)").execute(&pool).await?;
            #[doc = concat!("let guard = ", $make, ";")]
            /// let mut connection = guard.connection().await?;
            /// sqlx::query("INSERT INTO entry VALUES (100)").execute(&mut *connection).await?;
            /// # Ok(()) }
            /// ```
            pub async fn connection(&self) -> $crate::Result<$crate::SessionConnection<'_>> {
                self.held.connection().await
            }
        }

        impl std::fmt::Debug for $Guard {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.debug_struct(stringify!($Guard))
                    .field("key", self.held.key())
                    .field("backend_pid", &self.held.backend_pid())
                    .finish_non_exhaustive()
            }
        }
    };
}
pub(crate) use methods;
