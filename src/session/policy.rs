//! For how long an acquire waits.

use std::time::{Duration, Instant};

use tokio::time::timeout_at;

use super::DEADLINE;

/// For how long an acquire waits for a busy lock.
#[derive(Clone, Copy)]
pub(crate) enum WaitPolicy {
    /// Waits for the pool until this time, but not for the lock.
    ForPool(Instant),
    Forever,
    Never,
    Until(Instant),
}

/// How much longer than its deadline a bounded wait lasts if the server does not answer.
pub(crate) const GRACE: Duration = Duration::from_millis(500);

impl WaitPolicy {
    /// Awaits something other than the lock itself. Returns `None` if the deadline passes first.
    pub(crate) async fn bound<T>(self, future: impl Future<Output = T>) -> Option<T> {
        match self.deadline() {
            None => Some(future.await),
            Some(deadline) => timeout_at(deadline.into(), future).await.ok(),
        }
    }

    /// Whether the acquire waits for the lock at all.
    pub(crate) fn waits(self) -> bool {
        matches!(self, Self::Forever | Self::Until(_))
    }

    pub(crate) fn deadline(self) -> Option<Instant> {
        match self {
            Self::Forever | Self::Never => None,
            Self::ForPool(deadline) | Self::Until(deadline) => Some(deadline),
        }
    }

    /// Returns how long the answer to a statement that does not wait may take.
    pub(super) fn answer_limit(self) -> Duration {
        match self {
            Self::ForPool(_) | Self::Forever | Self::Never => DEADLINE,
            Self::Until(_) => self.left().map_or(DEADLINE, |left| DEADLINE.min(left + GRACE)),
        }
    }

    pub(crate) fn left(self) -> Option<Duration> {
        match self {
            Self::Forever => None,
            Self::ForPool(_) | Self::Never => Some(Duration::ZERO),
            Self::Until(deadline) => Some(deadline.saturating_duration_since(Instant::now())),
        }
    }
}
