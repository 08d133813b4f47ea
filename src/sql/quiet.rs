//! Statements that the driver does not log.

use std::pin::Pin;
use std::task::{Context, Poll};

use tracing::Dispatch;
use tracing::dispatcher::{has_been_set, with_default};

/// Suppresses everything that `future` logs: while it is polled, and while it is dropped.
///
/// sqlx warns about each statement that takes longer than a second, and logs it when the statement
/// completes or when its future is dropped. A statement that waits for a lock takes longer by design.
///
/// In a process without a `tracing` subscriber, nothing is suppressed. There, `tracing` forwards
/// events to the `log` crate, and setting any subscriber, even for a moment, ends that for the rest of
/// the process.
pub(crate) fn quietly<F: Future>(future: F) -> impl Future<Output = F::Output> {
    Quiet { future: Some(Box::pin(future)) }
}

struct Quiet<F> {
    /// `None` once it has completed.
    future: Option<Pin<Box<F>>>,
}

impl<F: Future> Future for Quiet<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let future = &mut self.future;
        silenced(|| {
            let Some(inner) = future else { return Poll::Pending };
            let polled = inner.as_mut().poll(cx);
            if polled.is_ready() {
                *future = None;
            }
            polled
        })
    }
}

impl<F> Drop for Quiet<F> {
    fn drop(&mut self) {
        if let Some(future) = self.future.take() {
            silenced(|| drop(future));
        }
    }
}

fn silenced<T>(work: impl FnOnce() -> T) -> T {
    if has_been_set() { with_default(&Dispatch::none(), work) } else { work() }
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Waker;

    use tracing::span::{Attributes, Id, Record};
    use tracing::{Event, Metadata, Subscriber};

    use super::*;

    #[derive(Default)]
    struct Counter(Arc<AtomicUsize>);

    impl Subscriber for Counter {
        fn enabled(&self, _: &Metadata<'_>) -> bool {
            true
        }

        fn new_span(&self, _: &Attributes<'_>) -> Id {
            Id::from_u64(1)
        }

        fn record(&self, _: &Id, _: &Record<'_>) {}

        fn record_follows_from(&self, _: &Id, _: &Id) {}

        fn event(&self, _: &Event<'_>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }

        fn enter(&self, _: &Id) {}

        fn exit(&self, _: &Id) {}
    }

    struct LogsOnDrop;

    impl Drop for LogsOnDrop {
        fn drop(&mut self) {
            tracing::warn!("dropped");
        }
    }

    async fn noisy(rest: impl Future<Output = ()>) {
        let _logs = LogsOnDrop;
        tracing::warn!("polled");
        rest.await;
    }

    /// The number of events of a future that is polled once and then dropped.
    fn events(future: impl Future<Output = ()>) -> usize {
        let counter = Counter::default();
        let events = Arc::clone(&counter.0);
        with_default(&Dispatch::new(counter), || {
            let mut future = Box::pin(future);
            let _ = future.as_mut().poll(&mut Context::from_waker(Waker::noop()));
            drop(future);
        });
        events.load(Ordering::Relaxed)
    }

    #[test]
    fn neither_a_completed_nor_a_dropped_future_logs() {
        assert_eq!((events(noisy(ready(()))), events(noisy(pending()))), (2, 2));
        assert_eq!((events(quietly(noisy(ready(())))), events(quietly(noisy(pending())))), (0, 0));
    }
}
