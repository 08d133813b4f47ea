//! Reports an acquire that takes long, while it lasts.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;

use tokio::time::sleep;

use crate::key::Key;

/// After how long it is reported first. Each of the next pauses is twice as long, up to a limit.
const FIRST: Duration = Duration::from_secs(5);

/// Awaits an acquire. If a subscriber wants events of this level, and there is a key, it gets one now and then.
pub(crate) fn reported<'a, T: Send>(
    key: Option<&'a Key>,
    longest: Duration,
    mut acquire: Pin<&'a mut (impl Future<Output = T> + Send)>,
) -> impl Future<Output = T> + Send {
    // On the heap, or all acquires would have room for it.
    let mut reporting = key.filter(|_| tracing::enabled!(tracing::Level::DEBUG)).map(|key| {
        Box::pin(async move {
            let mut waited = Duration::ZERO;
            let mut pause = FIRST.min(longest);
            loop {
                sleep(pause).await;
                waited += pause;
                tracing::debug!(
                    lock.key = %key.id(),
                    lock.name = key.name(),
                    waited_ms = u64::try_from(waited.as_millis()).unwrap_or(u64::MAX),
                    "still waiting for a lock"
                );
                pause = longest.min(2 * pause);
            }
        })
    });
    poll_fn(move |cx| {
        if let Some(reporting) = &mut reporting {
            let _: Poll<()> = reporting.as_mut().poll(cx);
        }
        acquire.as_mut().poll(cx)
    })
}
