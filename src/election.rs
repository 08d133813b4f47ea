//! Leader election: one leader among many candidates.

mod observer;
mod pause;
mod status;

use std::fmt;
use std::pin::{Pin, pin};
use std::process;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use crate::error::{Error, Result, chain};
use crate::guard::{Guard, is_guard};
use crate::holdings::Holdings;
use crate::key::Key;
use crate::metrics;
use crate::mode::Mode;
use crate::owner::Owner;
use crate::request::Request;
use crate::source::Source;
pub use observer::{Leader, Observer};
use pause::Pauses;
use status::Campaigning;
pub use status::{LeaderState, LeaderStatus};

/// A candidate for the leadership, which one candidate holds at a time.
///
/// Candidates wait in the server's queue, so the next one is elected as soon as the leader
/// resigns or its session ends, without polling. The leader's name, term, time of election and key are shown
/// on the server, in `application_name`, where every session can [look up the leader](Self::leader);
/// there is no table.
///
/// A leader that loses its session reports it ([`Guard::lost`]) before another candidate can be elected, with few
/// exceptions; see the [page on loss](crate#loss). Use the [term](Leadership::term) to fence
/// work that can't be stopped in time.
///
/// A candidate uses one connection of the pool while it waits or leads. It waits in
/// [slices](crate::LockOptions::wait_slice) of 110 seconds, unless the options say otherwise.
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
    grace: Duration,
}

/// How long a candidate waits in one statement, unless the options say otherwise. A hundred candidates then send 8,600
/// statements an hour, including the leader's heartbeats.
const SLICE: Duration = Duration::from_secs(110);

/// The pause before a campaign that failed with a transient error is retried.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

impl Election {
    /// Makes a candidate, named `process-PID`. Sends nothing.
    ///
    /// In containers the PID is usually 1 everywhere, so set a [`candidate`](Self::candidate) name there.
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
    pub fn new(source: &impl Source, key: impl Into<Key>) -> Self {
        let (key, mut owner) = (key.into(), source.owner().apart());
        owner.options.default_slice(SLICE);
        let candidate = format!("process-{}", process::id());
        Self { key, candidate, owner, status: LeaderStatus::default(), grace: Duration::ZERO }
    }

    /// Sets the candidate's name, which others see when it leads.
    ///
    /// The server shows 63 bytes, of which term and time of election take up to 33; a longer name is
    /// truncated. Characters other than printable ASCII are shown as `?`.
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

    /// Sets how long the future passed to [`run`](Self::run) may continue after its term has ended, to finish a step.
    /// Zero by default: the future is dropped at once.
    ///
    /// [`Leadership::stopping`] notifies the future, which is dropped when this time is over. After a loss,
    /// another candidate may be elected meanwhile.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::{Election, Error};
    /// use std::time::Duration;
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// let stop = tokio::time::sleep(Duration::from_millis(50));
    /// let mut election = Election::new(&pool, "billing").grace(Duration::from_secs(10));
    /// election
    ///     .run(stop, |leadership| async move {
    ///         while !leadership.is_stopping() {
    ///             // Send an invoice. It is not interrupted, unless it takes longer than the grace period.
    ///             tokio::select! {
    ///                 () = leadership.stopping() => {}
    ///                 () = tokio::time::sleep(Duration::from_secs(60)) => {}
    ///             }
    ///         }
    ///         Ok::<_, Error>(())
    ///     })
    ///     .await?;
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn grace(mut self, grace: Duration) -> Self {
        self.grace = grace;
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
    /// Sends the statements of [`Lock::acquire`](crate::Lock::acquire), and two more when elected,
    /// to draw the term and to show the name. If this candidate already leads, it keeps its term, and
    /// nothing is sent.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: the candidate loses its place in the queue, or resigns, and leaves nothing behind.
    ///
    /// # Errors
    ///
    /// As for [`Lock::acquire`](crate::Lock::acquire); [`Error::Lost`] if the leadership was lost at once;
    /// [`Error::Database`] where standbys are [allowed](crate::LockOptions::allow_standby), because they can't draw a
    /// term.
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
        let _campaigning = Campaigning(self.status.clone());
        self.status.set(LeaderState::Waiting);
        self.elect().await
    }

    async fn elect(&mut self) -> Result<Leadership> {
        let request = self.request();
        metrics::candidate(&request.labels(&self.owner.options));
        // A candidate that has failed counts as failing until the server has answered.
        let mut held = None;
        if self.status.is_failing() {
            held = self.owner.try_acquire(&request).await?;
            self.status.set(LeaderState::Waiting);
        }
        let held = match held {
            Some(held) => held,
            None => self.owner.acquire(&request).await?,
        };
        self.lead(held).await
    }

    /// Elects this candidate if there is neither a leader nor a waiting candidate. Returns `None` otherwise.
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
        let request = self.request();
        metrics::candidate(&request.labels(&self.owner.options));
        let held = self.owner.try_acquire(&request).await?;
        match held {
            Some(held) => self.lead(held).await.map(Some),
            None => Ok(None),
        }
    }

    /// Campaigns, leads, steps down, and campaigns again, until `stop` is ready.
    ///
    /// `lead` is called with each leadership; the future that it returns runs while the term lasts.
    ///
    /// | the term ends because | then |
    /// |---|---|
    /// | the future is done | the candidate resigns, and campaigns again; at once, or after a pause |
    /// | `stop` is ready | the candidate resigns, and `run` returns |
    /// | the pool is closed | the candidate resigns, and `run` returns the pool's error |
    /// | the leadership is lost | the candidate campaigns again |
    ///
    /// Unless the future is done, it is dropped. Before that, it may continue for the [grace period](Self::grace), and
    /// [`Leadership::stopping`] notifies it that it should end. If it panics, the
    /// candidate resigns, and the panic continues. Tasks that it has spawned are not stopped.
    ///
    /// After a term of less than a second, or of less than a minute if the future returned an error, the
    /// candidate pauses before it campaigns again, so that others can be elected: one to two seconds at first, then
    /// twice as long after each such term, up to a minute. The error is logged as a warning, and
    /// [`status`](Self::status) shows it.
    ///
    /// A campaign that fails with a transient error ([`Error::is_transient`]) is retried every second.
    ///
    /// A clone of the leadership does not prolong it: at the end of the term, the leadership is closed, and all
    /// its clones report a loss.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future drops that of `lead`, and the candidate resigns.
    ///
    /// # Errors
    ///
    /// * [`Error::LeaderFailed`] with the error of the last term, if that ended with one.
    /// * [`Error::PoolClosed`] if the pool is closed.
    /// * As for [`campaign`](Self::campaign), if the error is not transient.
    ///
    /// # Panics
    ///
    /// If called outside a tokio runtime.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::{Election, Error, Leadership};
    /// use std::sync::Arc;
    /// use std::time::Duration;
    /// use tokio::sync::oneshot;
    ///
    /// /// Sends the invoices, until the term ends.
    /// async fn lead(leadership: Arc<Leadership>) -> Result<(), Error> {
    ///     println!("leading, term {}", leadership.term());
    ///     loop {
    ///         // An invoice.
    ///         tokio::time::sleep(Duration::from_secs(60)).await;
    ///     }
    /// }
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// let (shut_down, notified) = oneshot::channel::<()>();
    /// # drop(shut_down);
    /// let stop = async { drop(notified.await) };
    /// Election::new(&pool, "billing").run(stop, lead).await?;
    /// # Ok(()) }
    /// ```
    // The leadership is an `Arc`, because a closure that borrows it (`AsyncFnMut(&Leadership)`) makes a
    // future that is not `Send` for all lifetimes, so it could not be spawned.
    pub async fn run<F, L, E>(&mut self, stop: impl Future<Output = ()>, mut lead: F) -> Result<()>
    where
        F: FnMut(Arc<Leadership>) -> L,
        L: Future<Output = Result<(), E>>,
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let mut stop = pin!(stop);
        let mut closed = pin!(self.owner.pool().close_event());
        let _campaigning = Campaigning(self.status.clone());
        self.status.set(LeaderState::Waiting);
        let mut pauses = Pauses::default();
        let mut failure: Option<Error> = None;
        loop {
            let leadership = tokio::select! {
                biased;
                () = &mut stop => break,
                () = &mut closed => return Err(self.pool_closed()),
                elected = self.campaign_until_elected() => Arc::new(elected?),
            };
            let turn = Turn(self.owner.take_holdings());
            let elected = Instant::now();
            let end = {
                let leading = lead(Arc::clone(&leadership));
                let leading = pin!(async { leading.await.map_err(Into::into) });
                self.serve(&leadership, stop.as_mut(), closed.as_mut(), leading).await
            };
            // The result is ignored, because a lost leadership needs no release.
            drop(turn.0.release_all().await);
            drop(leadership);
            let (term, stopped) = (elected.elapsed(), matches!(end, End::Stopped(_)));
            failure = match end {
                End::Done(Err(error)) | End::Stopped(Some(Err(error))) => {
                    let (key, source) = (self.key.clone(), Arc::from(error));
                    Some(Error::LeaderFailed { key, source })
                }
                End::Closed => return Err(self.pool_closed()),
                End::Done(Ok(())) | End::Lost | End::Stopped(_) => None,
            };
            if stopped {
                break;
            }
            match &failure {
                Some(error) => self.status.fails(error.clone()),
                None => self.status.set(LeaderState::Waiting),
            }
            let pause = pauses.after(term, failure.is_some());
            if let Some(error) = &failure {
                tracing::warn!(
                    lock.key = %self.key.id(),
                    lock.name = self.key.name(),
                    error = std::error::Error::source(error).map(chain),
                    pause_ms = pause.map(|pause| u64::try_from(pause.as_millis()).unwrap_or(u64::MAX)),
                    "a term ended with an error"
                );
            }
            if let Some(pause) = pause {
                tokio::select! {
                    biased;
                    () = &mut stop => break,
                    () = &mut closed => return Err(self.pool_closed()),
                    () = sleep(pause) => {}
                }
            }
        }
        failure.map_or(Ok(()), Err)
    }

    /// Runs the future that leads until the term ends, and for the grace period after that.
    async fn serve(
        &self,
        leadership: &Leadership,
        stop: Pin<&mut impl Future<Output = ()>>,
        closed: Pin<&mut impl Future<Output = ()>>,
        mut leading: Pin<&mut impl Future<Output = Led>>,
    ) -> End {
        let end = tokio::select! {
            biased;
            () = stop => End::Stopped(None),
            () = closed => End::Closed,
            _loss = leadership.guard.lost() => End::Lost,
            output = &mut leading => return End::Done(output),
        };
        leadership.stopping.send_replace(true);
        if self.grace.is_zero() {
            return end;
        }
        let output = timeout(self.grace, leading).await.ok();
        if let End::Stopped(_) = end { End::Stopped(output) } else { end }
    }

    async fn campaign_until_elected(&mut self) -> Result<Leadership> {
        loop {
            match self.elect().await {
                Err(error) if error.is_transient() => {
                    tracing::warn!(
                        lock.key = %self.key.id(),
                        lock.name = self.key.name(),
                        error = %chain(&error),
                        "a campaign failed; trying again"
                    );
                    self.status.fails(error);
                    sleep(RETRY_INTERVAL).await;
                }
                result => return result,
            }
        }
    }

    fn pool_closed(&self) -> Error {
        Error::PoolClosed { key: self.key.clone() }
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
    /// Cancel safe: the call only reads.
    ///
    /// # Errors
    ///
    /// [`Error::PoolTimedOut`], [`Error::PoolClosed`] or [`Error::Connect`] if no connection was available,
    /// [`Error::Database`] if the server or the connection failed.
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
        observer::leader(self.owner.pool(), &self.key).await
    }

    /// Observes the leader from now on: returns a [`Stream`](futures_core::Stream) of its changes.
    ///
    /// The stream queries the server while it is polled: every half second at first, and less often the longer nothing
    /// changes, down to every 5 s.
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
    pub fn observe(&self) -> Observer {
        Observer::new(self.owner.pool().clone(), self.key.clone())
    }

    fn request(&self) -> Request {
        Request::one(&self.key, Mode::Exclusive)
    }

    /// Makes this candidate, which was granted the lock, the leader.
    async fn lead(&self, held: Guard) -> Result<Leadership> {
        let term = if let Some(term) = self.status.term() {
            held.set_token(term);
            term
        } else {
            let term = held.fencing_token().await?;
            let name = Leader::show(&self.candidate, term, SystemTime::now(), &self.key);
            held.session().show_name(&self.key, &name).await?;
            held.session().leading.start(&self.request().labels(&self.owner.options));
            self.status.leads(Arc::downgrade(held.session()), self.key.clone(), term);
            term
        };
        let stopping = watch::Sender::new(false);
        Ok(Leadership { guard: held, term, stopping, _share: Share(self.status.clone()) })
    }
}

/// Why a term has ended, and the output of the future that led, if it was ready.
enum End {
    Closed,
    Done(Led),
    Lost,
    Stopped(Option<Led>),
}

/// The output of a future that leads.
type Led = std::result::Result<(), Box<dyn std::error::Error + Send + Sync>>;

/// A leadership's share in the status.
///
/// # Drop
///
/// Notifies the status that the candidate may not lead any more.
struct Share(LeaderStatus);

impl Drop for Share {
    fn drop(&mut self) {
        self.0.look();
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

/// A term of [`Election::run`]. When it ends, the clones of the leadership report a loss.
///
/// # Drop
///
/// Ends the term, on a background task.
struct Turn(Arc<Holdings>);

impl Drop for Turn {
    fn drop(&mut self) {
        // Detach: no caller waits for the release.
        drop(self.0.release_all());
    }
}

/// A leadership that is held. Dropping it resigns.
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
    // The first field, so that the lock is released before `_share` notifies the status.
    guard: Guard,
    term: i64,
    /// Whether [`Election::run`] is ending the term.
    stopping: watch::Sender<bool>,
    _share: Share,
}

impl Leadership {
    /// Returns the term: a number greater than that of every leader before.
    ///
    /// It is the [fencing token](Guard::fencing_token), drawn when the leader was elected.
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
    pub fn term(&self) -> i64 {
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
        self.guard.key()
    }

    /// Returns whether [`Election::run`] is ending the term, because it is stopped, the pool is closed, or the
    /// leadership is lost. Always `false` for a leadership from [`campaign`](Election::campaign). Sends nothing.
    ///
    /// # Examples
    ///
    /// As for [`Election::grace`].
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        *self.stopping.borrow()
    }

    /// Waits until [`Election::run`] ends the term, because it is stopped, the pool is closed, or the leadership is
    /// lost. Never ready for a leadership from [`campaign`](Election::campaign). Sends nothing.
    ///
    /// The future that leads is dropped after the [grace period](Election::grace), at once by default.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: it only waits.
    ///
    /// # Examples
    ///
    /// As for [`Election::grace`].
    pub async fn stopping(&self) {
        // The sender lives as long as `self`.
        drop(self.stopping.subscribe().wait_for(|stopping| *stopping).await);
    }

    /// Resigns: releases the lock (`pg_advisory_unlock`), and waits for the server's answer.
    ///
    /// # Cancel safety
    ///
    /// As for [`Guard::release`].
    ///
    /// # Errors
    ///
    /// As for [`Guard::release`].
    pub async fn resign(self) -> Result<()> {
        self.guard.release().await
    }
}

is_guard!(Leadership);
