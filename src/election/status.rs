//! The state of a candidate, for handlers, readiness probes and gauges.

use std::error::Error as _;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Instant;

use tokio::sync::Notify;

use crate::error::Error;
use crate::key::Key;
use crate::metrics;
use crate::session::Session;

/// Shows the state of a candidate, anywhere and at any time. Cheap to clone.
///
/// # Examples
///
/// As for [`Election::status`](crate::Election::status).
#[derive(Clone, Debug, Default)]
pub struct LeaderStatus {
    shared: Arc<Shared>,
    /// The state that [`changed`](Self::changed) returned last.
    seen: LeaderState,
}

/// The state of a candidate.
///
/// # Examples
///
/// A readiness probe, which reports a candidate only if it has failed for half a minute:
///
/// ```
/// use pglock::{LeaderState, LeaderStatus};
/// use std::time::Duration;
///
/// fn is_ready(status: &LeaderStatus) -> bool {
///     match status.state() {
///         LeaderState::Failing { since, .. } => since.elapsed() < Duration::from_secs(30),
///         _ => true,
///     }
/// }
/// # assert!(is_ready(&LeaderStatus::default()));
/// ```
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub enum LeaderState {
    /// The campaigns of [`Election::run`](crate::Election::run) fail, or the candidate's last term failed. The
    /// candidate retries.
    #[non_exhaustive]
    Failing {
        /// The most recent error.
        error: Error,
        /// When the first of the consecutive failures was.
        since: Instant,
    },
    /// The candidate neither campaigns nor leads.
    #[default]
    Idle,
    /// The candidate leads.
    #[non_exhaustive]
    Leading {
        /// The term.
        term: i64,
    },
    /// The candidate waits to be elected, or pauses after a short term.
    Waiting,
}

#[derive(Debug, Default)]
struct Shared {
    inner: Mutex<Inner>,
    notify: Notify,
}

#[derive(Debug, Default)]
struct Inner {
    post: Option<Post>,
    /// The state of the candidate while it does not lead.
    otherwise: LeaderState,
}

#[derive(Debug)]
struct Post {
    session: Weak<Session>,
    key: Key,
    term: i64,
}

impl LeaderStatus {
    /// Returns whether the candidate leads: `false` as soon as a loss is detected, or the candidate
    /// resigns. Sends nothing.
    ///
    /// # Examples
    ///
    /// As for [`Election::status`](crate::Election::status).
    #[must_use]
    pub fn is_leader(&self) -> bool {
        self.term().is_some()
    }

    /// Returns the term of the candidate, if it leads. Sends nothing.
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
    pub fn term(&self) -> Option<i64> {
        self.inner().term()
    }

    /// Returns the state of the candidate. Sends nothing.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::{Election, LeaderState};
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// let mut election = Election::new(&pool, "billing");
    /// let status = election.status();
    /// assert!(matches!(status.state(), LeaderState::Idle));
    /// let _leadership = election.campaign().await?;
    /// assert!(matches!(status.state(), LeaderState::Leading { .. }));
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn state(&self) -> LeaderState {
        let inner = self.inner();
        match inner.term() {
            Some(term) => LeaderState::Leading { term },
            None => inner.otherwise.clone(),
        }
    }

    /// Waits until the state differs from the one that this status has returned last, and returns it. The first call
    /// compares with [`Idle`](LeaderState::Idle). Sends nothing.
    ///
    /// A state that lasted only for a moment may be missed. Once the election and its leadership are dropped, the state
    /// stays [`Idle`](LeaderState::Idle), and a call that waits for a change never returns.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: the next call returns the change.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::{Election, LeaderState};
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// let mut election = Election::new(&pool, "billing");
    /// let mut status = election.status();
    /// let leadership = election.campaign().await?;
    /// assert!(matches!(status.changed().await, LeaderState::Leading { .. }));
    /// leadership.resign().await?;
    /// assert!(matches!(status.changed().await, LeaderState::Idle));
    /// # Ok(()) }
    /// ```
    pub async fn changed(&mut self) -> LeaderState {
        loop {
            let mut notified = pin!(self.shared.notify.notified());
            // Enabled before the state is read, so that a change between the read and the wait is not missed.
            notified.as_mut().enable();
            let state = self.state();
            if !state.is(&self.seen) {
                self.seen.clone_from(&state);
                return state;
            }
            let session = self.inner().post.as_ref().and_then(|post| post.session.upgrade());
            match session.filter(|_| matches!(state, LeaderState::Leading { .. })) {
                Some(session) => tokio::select! {
                    () = notified => {}
                    _loss = session.lost() => {}
                },
                None => notified.await,
            }
        }
    }

    /// Records that the candidate leads on this session.
    pub(super) fn leads(&self, session: Weak<Session>, key: Key, term: i64) {
        self.inner().post = Some(Post { session, key, term });
        self.shared.notify.notify_waiters();
    }

    /// Sets the state of the candidate while it does not lead.
    pub(super) fn set(&self, state: LeaderState) {
        self.inner().otherwise = state;
        self.look();
    }

    /// Records that the candidate fails, since the first of consecutive failures.
    pub(super) fn fails(&self, error: Error) {
        let since = match &self.inner().otherwise {
            LeaderState::Failing { error: last, .. } if is_same(last, &error) => return,
            LeaderState::Failing { since, .. } => *since,
            LeaderState::Idle | LeaderState::Leading { .. } | LeaderState::Waiting => {
                Instant::now()
            }
        };
        self.set(LeaderState::Failing { error, since });
    }

    pub(super) fn is_failing(&self) -> bool {
        matches!(self.inner().otherwise, LeaderState::Failing { .. })
    }

    /// Updates the metric, and wakes the callers of [`changed`](Self::changed), which read the state anew.
    pub(super) fn look(&self) {
        metrics::update(|| self.inner().show());
        self.shared.notify.notify_waiters();
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.shared.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn term(&self) -> Option<i64> {
        let Post { session, key, term } = self.post.as_ref()?;
        session.upgrade()?.guards(key).then_some(*term)
    }

    /// Makes the metric show that the candidate does not lead, if it does not.
    fn show(&self) {
        if self.term().is_none()
            && let Some(session) = self.post.as_ref().and_then(|post| post.session.upgrade())
        {
            session.leading.end();
        }
    }
}

impl LeaderState {
    /// Whether two states are the same.
    fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Failing { error, since }, Self::Failing { error: last, since: first }) => {
                is_same(error, last) && since == first
            }
            (Self::Leading { term }, Self::Leading { term: last }) => term == last,
            (Self::Idle, Self::Idle) | (Self::Waiting, Self::Waiting) => true,
            _ => false,
        }
    }
}

/// Whether two errors have the same messages.
fn is_same(one: &Error, other: &Error) -> bool {
    let text = |error: &Error| (error.to_string(), error.source().map(ToString::to_string));
    text(one) == text(other)
}

/// A candidate that campaigns. Dropping this sets the candidate's state to idle.
pub(super) struct Campaigning(pub(super) LeaderStatus);

impl Drop for Campaigning {
    fn drop(&mut self) {
        self.0.set(LeaderState::Idle);
    }
}
