//! Time under control: cancel at a chosen point, wait for what must come.

use std::future::poll_fn;
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use tokio::time::{sleep, timeout};

/// Polls `future` at most `polls` times, then drops it: cancellation at a chosen point, without
/// sleeps.
///
/// Returns its output if it completed within that many polls. Once it was pending for the last
/// time allowed, `None` comes at once, from that same poll.
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

/// Waits until `condition` is true, looking every 5 ms; panics after `limit`, naming `what`.
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
