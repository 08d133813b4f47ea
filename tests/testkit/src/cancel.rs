//! Cancels a future at a chosen point, and waits for conditions.

use std::future::poll_fn;
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use tokio::time::{sleep, timeout};

/// Polls `future` at most `polls` times, then drops it: cancellation at a chosen point, without
/// sleeps.
///
/// Returns the output if the future completes within that many polls. If it is still pending after the last of them,
/// returns `None` at once, from that same poll.
pub async fn cancel_after<F: Future>(polls: usize, future: F) -> Option<F::Output> {
    let mut future = pin!(future);
    let mut left = polls;
    poll_fn(move |cx| {
        if left == 0 {
            return Poll::Ready(None);
        }
        left -= 1;
        match future.as_mut().poll(cx) {
            Poll::Ready(output) => Poll::Ready(Some(output)),
            Poll::Pending if left == 0 => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        }
    })
    .await
}

/// Waits until `condition` is true, which is checked every 5 ms. Panics after `limit`, with `what` in the message.
pub async fn eventually<Fut: Future<Output = bool>>(
    what: &str,
    limit: Duration,
    mut condition: impl FnMut() -> Fut,
) {
    let met = async {
        while !condition().await {
            sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(timeout(limit, met).await.is_ok(), "not within {limit:?}: {what}");
}
