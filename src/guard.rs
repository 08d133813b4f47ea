//! Proof of holding: a lock is held for as long as its guard lives.

use std::fmt;
use std::pin::pin;
use std::sync::Arc;

use tokio::sync::OnceCell;

use crate::error::{Error, Loss, Result};
use crate::key::Key;
use crate::mode::Mode;
use crate::session::lend::SessionConnection;
use crate::session::{Release, Session};
use crate::sql::Protocol;

/// One share in a lock that a session holds: what both guards are made of.
pub(crate) struct Held {
    session: Arc<Session>,
    key: Key,
    mode: Mode,
    token: OnceCell<u64>,
    released: bool,
}

impl Held {
    pub(crate) fn new(session: Arc<Session>, key: Key, mode: Mode) -> Self {
        Self { session, key, mode, token: OnceCell::new(), released: false }
    }

    pub(crate) fn session(&self) -> &Arc<Session> {
        &self.session
    }

    async fn while_held<T>(&self, future: impl Future<Output = T>) -> Result<T> {
        let ended = {
            let future = pin!(future);
            tokio::select! {
                biased;
                reason = self.session.lost() => Err(reason),
                output = future => Ok(output),
            }
            // Here it is dropped, before anybody hears of the loss.
        };
        let ended = ended.and_then(|output| self.session.loss().map_or(Ok(output), Err));
        ended.map_err(|reason| Error::lost(&self.key, reason))
    }

    /// Starts the release, once. The only path by which a guard lets go.
    fn start_release(&mut self, protocol: Protocol) -> Option<Release> {
        if self.released {
            return None;
        }
        self.released = true;
        Some(Arc::clone(&self.session).release(&self.key, self.mode, protocol))
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
            .field("key", &self.key)
            .field("mode", &self.mode)
            .field("backend_pid", &self.session.backend_pid())
            .finish_non_exhaustive()
    }
}

/// The two guards differ in name only, so that a signature can demand one of them.
macro_rules! guard {
    ($(#[$docs:meta])* $Guard:ident, $acquire:literal) => {
        $(#[$docs])*
        #[must_use = "if unused, the lock is released at once"]
        #[clippy::has_significant_drop]
        pub struct $Guard {
            held: Held,
        }

        impl $Guard {
            pub(crate) fn new(held: Held) -> Self {
                Self { held }
            }

            /// Returns the key of the lock.
            ///
            /// # Examples
            ///
            /// ```
            /// # use pglock::{Key, Lock};
            /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
            /// # let pool = pglock_testkit::pool().await;
            #[doc = concat!("let guard = Lock::new(&pool, \"invoice-17\").", $acquire, "().await?;")]
            /// assert_eq!(guard.key(), &Key::from("invoice-17"));
            /// # Ok(()) }
            /// ```
            #[must_use]
            pub fn key(&self) -> &Key {
                &self.held.key
            }

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
            #[doc = concat!("let guard = Lock::new(&pool, \"invoice-17\").", $acquire, "().await?;")]
            /// println!("held by backend {}", guard.backend_pid());
            /// # Ok(()) }
            /// ```
            #[must_use]
            pub fn backend_pid(&self) -> i32 {
                self.held.session.backend_pid()
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
            /// # use pglock::Lock;
            /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
            /// # let pool = pglock_testkit::pool().await;
            #[doc = concat!("let guard = Lock::new(&pool, \"invoice-17\").", $acquire, "().await?;")]
            /// guard.release().await?;
            /// # Ok(()) }
            /// ```
            pub async fn release(mut self) -> Result<()> {
                match self.held.start_release(Protocol::Extended) {
                    Some(release) => release.done().await,
                    None => Ok(()),
                }
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
            /// # use pglock::Lock;
            /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
            /// # let pool = pglock_testkit::pool().await;
            #[doc = concat!("let guard = Lock::new(&pool, \"invoice-17\").", $acquire, "().await?;")]
            /// assert!(!guard.is_lost());
            /// # Ok(()) }
            /// ```
            #[must_use]
            pub fn is_lost(&self) -> bool {
                self.held.session.loss().is_some()
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
            /// # use pglock::Lock;
            /// # async fn work() {}
            /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
            /// # let pool = pglock_testkit::pool().await;
            #[doc = concat!("let guard = Lock::new(&pool, \"invoice-17\").", $acquire, "().await?;")]
            /// tokio::select! {
            ///     loss = guard.lost() => eprintln!("stop at once: {loss}"),
            ///     () = work() => {}
            /// }
            /// # Ok(()) }
            /// ```
            pub async fn lost(&self) -> Loss {
                self.held.session.lost().await
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
            /// # use pglock::Lock;
            /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
            /// # let pool = pglock_testkit::pool().await;
            #[doc = concat!("let guard = Lock::new(&pool, \"invoice-17\").", $acquire, "().await?;")]
            /// guard.verify().await?;
            /// # Ok(()) }
            /// ```
            pub async fn verify(&self) -> Result<()> {
                self.held.session.verify(&self.held.key, self.held.mode).await
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
            /// # use pglock::Lock;
            /// # async fn make_report() -> u32 { 1 }
            /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
            /// # let pool = pglock_testkit::pool().await;
            #[doc = concat!("let guard = Lock::new(&pool, \"invoice-17\").", $acquire, "().await?;")]
            /// let pages = guard.while_held(make_report()).await?;
            /// assert_eq!(pages, 1);
            /// # Ok(()) }
            /// ```
            pub async fn while_held<T>(&self, future: impl Future<Output = T>) -> Result<T> {
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
            /// # use pglock::Lock;
            /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
            /// # let pool = pglock_testkit::pool().await;
            #[doc = concat!("let first = Lock::new(&pool, \"invoice-17\").", $acquire, "().await?;")]
            /// let token = first.fencing_token().await?;
            /// first.release().await?;
            ///
            #[doc = concat!("let next = Lock::new(&pool, \"invoice-17\").", $acquire, "().await?;")]
            /// assert!(next.fencing_token().await? > token);
            /// # Ok(()) }
            /// ```
            pub async fn fencing_token(&self) -> Result<u64> {
                let draw = || self.held.session.draw_token(&self.held.key);
                self.held.token.get_or_try_init(draw).await.copied()
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
            /// # use pglock::Lock;
            /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
            /// # let pool = pglock_testkit::pool().await;
            /// # sqlx::raw_sql("CREATE TABLE entry (amount int)").execute(&pool).await?;
            #[doc = concat!("let guard = Lock::new(&pool, \"ledger\").", $acquire, "().await?;")]
            /// let mut connection = guard.connection().await?;
            /// sqlx::query("INSERT INTO entry VALUES (100)").execute(&mut *connection).await?;
            /// # Ok(()) }
            /// ```
            pub async fn connection(&self) -> Result<SessionConnection<'_>> {
                self.held.session.lend(&self.held.key).await
            }
        }

        impl fmt::Debug for $Guard {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.debug_struct(stringify!($Guard))
                    .field("key", &self.held.key)
                    .field("backend_pid", &self.held.session.backend_pid())
                    .finish_non_exhaustive()
            }
        }
    };
}

guard! {
    /// An exclusive lock that is held. Dropping it releases the lock.
    ///
    /// # Drop
    ///
    /// Starts the release and returns at once; mostly the unlock is on its way to the server by
    /// then. To wait for the server's answer, use [`release`](Self::release). A guard may be dropped
    /// anywhere: on a thread without a runtime, after the runtime is gone, during a panic. The
    /// connection goes back to the pool when the server has confirmed the unlock, and is closed
    /// otherwise.
    ///
    /// If the process dies, the server releases the lock as soon as it sees the connection closed.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::Lock;
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// let mut lock = Lock::new(&pool, "nightly-report");
    /// {
    ///     let _guard = lock.acquire().await?;
    ///     // Nobody else runs this, on any machine.
    /// }
    /// # Ok(()) }
    /// ```
    ExclusiveGuard, "acquire"
}

guard! {
    /// A shared lock that is held. Dropping it releases the lock.
    ///
    /// Others may hold the same lock shared at the same time; nobody holds it exclusively.
    ///
    /// # Drop
    ///
    /// As for [`ExclusiveGuard`].
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::Lock;
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// let mut lock = Lock::new(&pool, "app-config");
    /// let mut other = lock.clone();
    ///
    /// let _reader = lock.acquire_shared().await?;
    /// let _another = other.acquire_shared().await?;
    /// # Ok(()) }
    /// ```
    SharedGuard, "acquire_shared"
}
