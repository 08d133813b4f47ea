//! One leader among many candidates.

mod observer;

use std::fmt;
use std::pin::pin;
use std::process;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, SystemTime};

use sqlx::PgPool;
use tokio::time::sleep;

use crate::error::{Error, Result};
use crate::held::{Held, methods};
use crate::holdings::Holdings;
use crate::key::Key;
use crate::mode::Mode;
use crate::options::LockOptions;
use crate::owner::Owner;
use crate::request::Request;
use crate::session::{DEADLINE, Session, within};
use crate::sql;
pub use observer::{Leader, Observer};

/// A candidate for a post that one candidate holds at a time.
///
/// Candidates wait in the server's queue, so the next one is elected as soon as the leader
/// resigns or its session ends, without polling. The leader's name, term and time of election are shown
/// on the server, in `application_name`, where every session can [look up the leader](Self::leader);
/// there is no table.
///
/// A leader that loses its session reports it ([`Leadership::lost`]), and steps down before another candidate
/// can be elected; see the [page on loss](crate#loss). What can't be stopped in time, fence with the
/// [term](Leadership::term).
///
/// A candidate uses one connection of the pool while it waits or leads.
///
/// # Examples
///
/// ```
/// use pglock::Election;
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
/// # let pool = pglock_testkit::pool().await;
/// let mut election = Election::new(&pool, "billing").candidate("node-7");
/// let leadership = election.campaign().await?; // waits to be elected
/// println!("leading, term {}", leadership.term());
/// leadership.resign().await?;
/// # Ok(()) }
/// ```
pub struct Election {
    key: Key,
    candidate: String,
    owner: Owner,
    status: LeaderStatus,
}

/// How long to wait before a campaign is retried that failed with a transient error.
const AGAIN: Duration = Duration::from_secs(1);

impl Election {
    /// Makes a candidate with the default options, named after its process. Sends nothing.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() {
    /// # let pool = pglock_testkit::pool().await;
    /// use pglock::Election;
    ///
    /// let election = Election::new(&pool, "billing");
    /// # let _ = election; }
    /// ```
    #[must_use]
    pub fn new(pool: &PgPool, key: impl Into<Key>) -> Self {
        Self::with_owner(key.into(), Owner::new(pool, LockOptions::new()))
    }

    pub(crate) fn with_owner(key: Key, owner: Owner) -> Self {
        let candidate = format!("process-{}", process::id());
        Self { key, candidate, owner, status: LeaderStatus::default() }
    }

    /// Sets the candidate's name, which others see when it leads.
    ///
    /// The server shows 63 bytes, of which term and time of election take up to 33; what is longer is
    /// cut off. Characters other than printable ASCII show as `?`.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() {
    /// # let pool = pglock_testkit::pool().await;
    /// use pglock::Election;
    ///
    /// let election = Election::new(&pool, "billing").candidate("node-7");
    /// # let _ = election; }
    /// ```
    #[must_use]
    pub fn candidate(mut self, name: impl Into<String>) -> Self {
        self.candidate = name.into();
        self
    }

    /// Returns the key.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() {
    /// # let pool = pglock_testkit::pool().await;
    /// use pglock::{Election, Key};
    ///
    /// assert_eq!(Election::new(&pool, "billing").key(), &Key::from("billing"));
    /// # }
    /// ```
    #[must_use]
    pub fn key(&self) -> &Key {
        &self.key
    }

    /// Waits until this candidate is elected.
    ///
    /// Sends what [`Lock::acquire`](crate::Lock::acquire) does, and two statements more when elected,
    /// to draw the term and to show the name. If this candidate leads already, it is the same term, and
    /// nothing is sent.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: the candidate loses its place in the queue, or resigns, and leaves nothing behind.
    ///
    /// # Errors
    ///
    /// As for [`Lock::acquire`](crate::Lock::acquire); [`Error::Lost`] if the post was lost at once;
    /// [`Error::Database`] on a standby, which can't draw a term.
    ///
    /// # Panics
    ///
    /// If called outside a tokio runtime.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::Election;
    ///
    /// # async fn lead() {}
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// let leadership = Election::new(&pool, "billing").campaign().await?;
    /// leadership.while_held(lead()).await?;
    /// # Ok(()) }
    /// ```
    pub async fn campaign(&mut self) -> Result<Leadership> {
        let held = self.owner.acquire(&self.request()).await?;
        self.lead(held).await
    }

    /// Is elected if there is neither a leader nor a waiting candidate. Returns `None` otherwise.
    ///
    /// # Cancel safety
    ///
    /// As for [`campaign`](Self::campaign).
    ///
    /// # Errors
    ///
    /// As for [`campaign`](Self::campaign).
    ///
    /// # Panics
    ///
    /// If called outside a tokio runtime.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::Election;
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// let leadership = Election::new(&pool, "billing").try_campaign().await?;
    /// assert!(leadership.is_some());
    /// assert!(Election::new(&pool, "billing").try_campaign().await?.is_none());
    /// # Ok(()) }
    /// ```
    pub async fn try_campaign(&mut self) -> Result<Option<Leadership>> {
        let held = self.owner.try_acquire(&self.request()).await?;
        match held {
            Some(held) => self.lead(held).await.map(Some),
            None => Ok(None),
        }
    }

    /// Campaigns, leads, steps down, and campaigns again, until `stop` is ready.
    ///
    /// `lead` is called with each leadership; the future that it returns runs while the leadership lasts.
    /// When it ends, the candidate resigns, so that others get their turn, and campaigns again. On loss the
    /// future is dropped, and then the next campaign begins. If it panics, the candidate resigns,
    /// and the panic continues. Tasks that it has spawned are not stopped.
    ///
    /// A campaign that fails with a transient error ([`Error::is_transient`]) is retried every second.
    ///
    /// A clone of the leadership does not prolong it: at the end of the turn, the leadership is closed, and all
    /// its clones report a loss.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future drops what leads, and resigns.
    ///
    /// # Errors
    ///
    /// As for [`campaign`](Self::campaign), if the reason does not pass.
    ///
    /// # Panics
    ///
    /// If called outside a tokio runtime.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::Election;
    /// use std::time::Duration;
    /// use tokio::sync::oneshot;
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// let (shut_down, told) = oneshot::channel::<()>();
    /// # drop(shut_down);
    /// let stop = async { drop(told.await) };
    /// let mut election = Election::new(&pool, "billing");
    /// election
    ///     .run(stop, |leadership| async move {
    ///         println!("leading, term {}", leadership.term());
    ///         loop {
    ///             // Send the invoices.
    ///             tokio::time::sleep(Duration::from_secs(60)).await;
    ///         }
    ///     })
    ///     .await?;
    /// # Ok(()) }
    /// ```
    pub async fn run<F, L>(&mut self, stop: impl Future<Output = ()>, mut lead: F) -> Result<()>
    where
        F: FnMut(Arc<Leadership>) -> L,
        L: Future<Output = ()>,
    {
        let mut stop = pin!(stop);
        loop {
            let leadership = tokio::select! {
                biased;
                () = &mut stop => return Ok(()),
                elected = self.campaign_until_elected() => Arc::new(elected?),
            };
            let turn = Turn(Some(self.owner.take_holdings()));
            let stopped = tokio::select! {
                biased;
                () = &mut stop => true,
                // A loss ends it too; the next campaign tells of it.
                _ended = leadership.while_held(lead(Arc::clone(&leadership))) => false,
            };
            turn.end().await;
            if stopped {
                return Ok(());
            }
        }
    }

    async fn campaign_until_elected(&mut self) -> Result<Leadership> {
        loop {
            match self.campaign().await {
                Err(error) if error.is_transient() => {
                    tracing::warn!(
                        key = %self.key,
                        error = &error as &dyn std::error::Error,
                        "a campaign failed; trying again"
                    );
                    sleep(AGAIN).await;
                }
                result => return result,
            }
        }
    }

    /// Returns a status that shows, anywhere and at any time, whether this candidate leads.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::Election;
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// let mut election = Election::new(&pool, "billing");
    /// let status = election.status(); // give a clone to every handler
    /// assert!(!status.is_leader());
    ///
    /// let leadership = election.campaign().await?;
    /// assert!(status.is_leader());
    /// drop(leadership);
    /// assert!(!status.is_leader());
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn status(&self) -> LeaderStatus {
        self.status.clone()
    }

    /// Looks up the leader on the server. Sends one statement, on a connection of the pool.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: it only asks.
    ///
    /// # Errors
    ///
    /// [`Error::Pool`] or [`Error::Connect`] if no connection was available, [`Error::Database`] if the
    /// server or the connection failed.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::Election;
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// let mut election = Election::new(&pool, "billing").candidate("node-7");
    /// assert!(election.leader().await?.is_none());
    ///
    /// let leadership = election.campaign().await?;
    /// let leader = election.leader().await?.expect("node-7 leads");
    /// assert_eq!(leader.name, "node-7");
    /// assert_eq!(leader.term, Some(leadership.term()));
    /// # Ok(()) }
    /// ```
    pub async fn leader(&self) -> Result<Option<Leader>> {
        let mut conn = self.owner.connection(&self.key).await?;
        let holder =
            within(DEADLINE, async { sql::election::holder(conn.pg()?, self.key.id()).await });
        let holder =
            holder.await.map_err(|source| Error::Database { key: self.key.clone(), source })?;
        conn.give_back();
        Ok(holder.map(Leader::from))
    }

    /// Observes the leader, from now on.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::Election;
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// let mut election = Election::new(&pool, "billing").candidate("node-7");
    /// let mut observer = election.observe();
    /// assert!(observer.changed().await?.is_none());
    ///
    /// let leadership = election.campaign().await?;
    /// assert_eq!(observer.changed().await?.map(|leader| leader.name), Some("node-7".into()));
    /// # drop(leadership); Ok(()) }
    /// ```
    #[must_use]
    pub fn observe(&self) -> Observer {
        let election = Self {
            key: self.key.clone(),
            candidate: String::new(),
            owner: self.owner.another(),
            status: LeaderStatus::default(),
        };
        Observer::new(election)
    }

    fn request(&self) -> Request {
        Request::one(&self.key, Mode::Exclusive)
    }

    /// Makes a leader of who was granted the lock.
    async fn lead(&self, held: Held) -> Result<Leadership> {
        if let Some(term) = self.status.term() {
            return Ok(Leadership { held, term });
        }
        let term = held.fencing_token().await?;
        let name = Leader::show(&self.candidate, term, SystemTime::now());
        held.session().show_name(&self.key, &name).await?;
        let session = Arc::downgrade(held.session());
        *self.status.post() = Some(Post { session, key: self.key.clone(), term });
        Ok(Leadership { held, term })
    }
}

impl fmt::Debug for Election {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Election")
            .field("key", &self.key)
            .field("candidate", &self.candidate)
            .finish_non_exhaustive()
    }
}

/// A turn of [`Election::run`]. When it ends, whoever has kept a clone of the leadership does not lead
/// any more.
///
/// # Drop
///
/// Ends it, on a task.
struct Turn(Option<Arc<Holdings>>);

impl Turn {
    async fn end(mut self) {
        if let Some(holdings) = self.0.take() {
            // What was lost needs no resigning.
            drop(holdings.close().done().await);
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if let Some(holdings) = self.0.take() {
            // Detach: no caller waits for it.
            drop(holdings.close());
        }
    }
}

/// The post, held. Dropping it resigns.
///
/// # Drop
///
/// As for [`ExclusiveGuard`](crate::ExclusiveGuard).
///
/// # Examples
///
/// ```
/// use pglock::Election;
///
/// # async fn send_invoices() {}
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
/// # let pool = pglock_testkit::pool().await;
/// let leadership = Election::new(&pool, "billing").campaign().await?;
/// tokio::select! {
///     loss = leadership.lost() => eprintln!("stepping down: {loss}"),
///     () = send_invoices() => leadership.resign().await?,
/// }
/// # Ok(()) }
/// ```
#[must_use = "if unused, the candidate resigns at once"]
#[clippy::has_significant_drop]
pub struct Leadership {
    held: Held,
    term: u64,
}

impl Leadership {
    /// Returns the term: a number greater than that of every leader before.
    ///
    /// It is the [fencing token](Self::fencing_token), drawn when the leader was elected.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::Election;
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// let mut election = Election::new(&pool, "billing");
    /// let first = election.campaign().await?.term();
    /// let second = election.campaign().await?.term();
    /// assert!(second > first);
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn term(&self) -> u64 {
        self.term
    }

    /// Returns the key of the election.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::{Election, Key};
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// let leadership = Election::new(&pool, "billing").campaign().await?;
    /// assert_eq!(leadership.key(), &Key::from("billing"));
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn key(&self) -> &Key {
        self.held.key()
    }
}

methods!(Leadership, resign, "Election", "Election::new(&pool, \"billing\").campaign().await?");

/// Shows whether a candidate leads. Cheap to clone.
///
/// # Examples
///
/// As for [`Election::status`].
#[derive(Clone, Debug, Default)]
pub struct LeaderStatus {
    post: Arc<Mutex<Option<Post>>>,
}

#[derive(Debug)]
struct Post {
    session: Weak<Session>,
    key: Key,
    term: u64,
}

impl LeaderStatus {
    /// Returns whether the candidate leads: `false` as soon as a loss is detected, or the candidate
    /// resigns. Sends nothing.
    ///
    /// # Examples
    ///
    /// As for [`Election::status`].
    #[must_use]
    pub fn is_leader(&self) -> bool {
        self.term().is_some()
    }

    /// Returns the term of the candidate, if it leads.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::Election;
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// let mut election = Election::new(&pool, "billing");
    /// let leadership = election.campaign().await?;
    /// assert_eq!(election.status().term(), Some(leadership.term()));
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn term(&self) -> Option<u64> {
        let post = self.post();
        let Post { session, key, term } = post.as_ref()?;
        session.upgrade()?.guards(key).then_some(*term)
    }

    fn post(&self) -> MutexGuard<'_, Option<Post>> {
        self.post.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
