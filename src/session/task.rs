//! Work that is finished even if no task waits for it any more.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use tokio::runtime::Handle;

use super::conn::{enter, enter_unless_inside};

/// A future that goes on without the task that awaits it.
///
/// Its first step is taken when it is started. Usually that writes the statement to the socket, and the
/// server does the rest, even if the runtime is no longer driven (a current-thread one between two
/// calls of `block_on`).
///
/// A step that [`start`](Self::start) takes may not poll a timer: where the runtime is gone, a timer
/// panics. Use [`later`].
///
/// # Drop
///
/// Hands what is left to do to the runtime. If that is gone, it is dropped, and closes the connection.
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
    /// A future that takes its first step when it is awaited, which is now.
    pub(crate) fn to_await(
        runtime: &Handle,
        future: impl Future<Output = T> + Send + 'static,
    ) -> Self {
        Self { state: State::Pending(Box::pin(future)), runtime: runtime.clone() }
    }

    /// Takes the first step of a future.
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
                // The task that awaits it may do so on another runtime, or on none.
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

/// Takes the first step of a future, and returns its output if that was all; else lets the task's own
/// first step end with it, so that what follows may have a timer.
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
