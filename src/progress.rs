//! Reports an acquire that takes long, while it lasts.

use std::pin::Pin;
use std::time::{Duration, Instant};

use tokio::time::timeout;

use crate::key::Key;

/// After how long it is reported first. Each of the next pauses is twice as long, up to a limit.
const FIRST: Duration = Duration::from_secs(5);

/// Awaits an acquire. If a subscriber wants events of this level, it gets one now and then.
pub(crate) async fn reported<T>(
    key: &Key,
    longest: Duration,
    mut acquire: Pin<&mut (impl Future<Output = T> + Send)>,
) -> T
where
    T: Send,
{
    if !tracing::enabled!(tracing::Level::DEBUG) {
        return acquire.await;
    }
    // On the heap, or all acquires would have room for it.
    Box::pin(async move {
        let started = Instant::now();
        let mut pause = FIRST.min(longest);
        loop {
            if let Ok(acquired) = timeout(pause, acquire.as_mut()).await {
                return acquired;
            }
            tracing::debug!(
                lock.key = %key.id(),
                lock.name = key.name(),
                waited_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
                "still waiting for a lock"
            );
            pause = longest.min(2 * pause);
        }
    })
    .await
}
