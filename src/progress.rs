//! Reports an acquire that takes long, while it lasts.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::Poll;
use std::time::{Duration, Instant};

use tokio::time::sleep;

use crate::key::Key;

/// The time before the first report. Each of the next pauses is twice as long, up to a limit.
const FIRST: Duration = Duration::from_secs(5);

/// Awaits an acquire. If there is a key, and debug events are enabled, reports the wait from time to time.
pub(crate) fn reported<'a, T: Send>(
    key: Option<&'a Key>,
    longest: Duration,
    mut acquire: Pin<&'a mut (impl Future<Output = T> + Send)>,
) -> impl Future<Output = T> + Send {
    // Boxed, because otherwise each acquire would reserve space for this future.
    let mut reporting = key.filter(|_| tracing::enabled!(tracing::Level::DEBUG)).map(|key| {
        Box::pin(async move {
            let started = Instant::now();
            let mut pause = FIRST.min(longest);
            loop {
                sleep(pause).await;
                tracing::debug!(
                    lock.key = %key.id(),
                    lock.name = key.name(),
                    waited_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
                    "still waiting for a lock"
                );
                pause = longest.min(2 * pause);
            }
        })
    });
    poll_fn(move |cx| {
        let acquired = acquire.as_mut().poll(cx);
        if let (Poll::Pending, Some(reporting)) = (&acquired, &mut reporting) {
            let _: Poll<()> = reporting.as_mut().poll(cx);
        }
        acquired
    })
}
