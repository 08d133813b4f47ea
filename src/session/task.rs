//! Work that is finished even if no task waits for it any more.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use tokio::runtime::Handle;

use super::conn::{enter, enter_unless_inside};

/// A future that is finished even if its caller stops awaiting it.
///
/// [`start`](Self::start) polls it once. Usually that writes the statement to the socket, and the server does the rest,
/// even if the runtime is no longer driven (a current-thread runtime between two calls of `block_on`).
///
/// In this first poll, the future must not poll a timer, because a timer panics if the runtime was shut down. Use
/// [`later`].
///
/// # Drop
///
/// Spawns the rest of the future on the runtime. If the runtime was shut down, the future is dropped, which closes the
/// connection.
#[must_use = "a task that is dropped at once runs on the runtime, though it may be awaited here"]
pub(crate) struct Task<T: Send + 'static> {
    // Invariant: `Pending` until polled to the end.
    state: State<T>,
    runtime: Handle,
}

enum State<T> {
    Pending(Pin<Box<dyn Future<Output = T> + Send>>),
    Ready(T),
    Taken,
}

impl<T: Send + 'static> Task<T> {
    /// Creates a task that is not polled until it is awaited. For a caller that awaits it immediately.
    pub(crate) fn to_await(
        runtime: &Handle,
        future: impl Future<Output = T> + Send + 'static,
    ) -> Self {
        Self { state: State::Pending(Box::pin(future)), runtime: runtime.clone() }
    }

    /// Creates a task, and polls it once.
    pub(crate) fn start(
        runtime: &Handle,
        future: impl Future<Output = T> + Send + 'static,
    ) -> Self {
        let mut future: Pin<Box<dyn Future<Output = T> + Send>> = Box::pin(future);
        let first =
            enter(runtime, || future.as_mut().poll(&mut Context::from_waker(Waker::noop())));
        let state = match first {
            Poll::Ready(output) => State::Ready(output),
            Poll::Pending => State::Pending(future),
        };
        Self { state, runtime: runtime.clone() }
    }
}

// The future is pinned in its box, and the output is never pinned.
impl<T: Send + 'static> Unpin for Task<T> {}

impl<T: Send + 'static> Future for Task<T> {
    type Output = T;

    #[expect(clippy::panic, reason = "as for every future that is polled after its end")]
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        match std::mem::replace(&mut self.state, State::Taken) {
            State::Ready(output) => Poll::Ready(output),
            State::Pending(mut future) => {
                // The caller may await this on another runtime, or outside of a runtime.
                let polled = enter_unless_inside(&self.runtime, || future.as_mut().poll(cx));
                if polled.is_pending() {
                    self.state = State::Pending(future);
                }
                polled
            }
            State::Taken => panic!("BUG: a task is polled after its end"),
        }
    }
}

/// Polls a future once, and returns its output if it is ready. Otherwise yields, which ends the first poll of the task,
/// and returns the future, which may then be awaited together with a timer.
pub(crate) async fn later<F: Future + Unpin>(mut future: F) -> Result<F::Output, F> {
    let first = poll_fn(|cx| Poll::Ready(Pin::new(&mut future).poll(cx))).await;
    if let Poll::Ready(output) = first {
        return Ok(output);
    }
    tokio::task::yield_now().await;
    Err(future)
}

impl<T: Send + 'static> Drop for Task<T> {
    fn drop(&mut self) {
        if let State::Pending(future) = std::mem::replace(&mut self.state, State::Taken) {
            // Detach: no task is left to wait for it.
            drop(self.runtime.spawn(future));
        }
    }
}
