//! For how long an acquire waits.

use std::time::{Duration, Instant};

use tokio::time::timeout_at;

use super::DEADLINE;

/// For how long an acquire waits for a busy lock.
#[derive(Clone, Copy)]
pub(crate) enum WaitPolicy {
    /// Not for the lock, and until then for the pool.
    ForPool(Instant),
    Forever,
    Never,
    Until(Instant),
}

/// How much later than the server a bounded wait gives up, if the server does not answer.
pub(crate) const GRACE: Duration = Duration::from_millis(500);

impl WaitPolicy {
    /// Waits for what is not the lock itself. `None` if the time is over.
    pub(crate) async fn bound<T>(self, future: impl Future<Output = T>) -> Option<T> {
        match self.deadline() {
            None => Some(future.await),
            Some(deadline) => timeout_at(deadline.into(), future).await.ok(),
        }
    }

    /// Whether it waits for the lock at all.
    pub(crate) fn waits(self) -> bool {
        matches!(self, Self::Forever | Self::Until(_))
    }

    pub(crate) fn deadline(self) -> Option<Instant> {
        match self {
            Self::Forever | Self::Never => None,
            Self::ForPool(deadline) | Self::Until(deadline) => Some(deadline),
        }
    }

    /// How long an answer may take that needs no wait.
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
