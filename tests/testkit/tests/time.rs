//! Futures are cancelled at the poll that was chosen, and waiting has an end.

use std::future::{pending, ready};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use pglock_testkit::{cancel_after, eventually};
use tokio::task::yield_now;

struct SetOnDrop<'a>(&'a AtomicUsize, usize);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(self.1, Ordering::SeqCst);
    }
}

#[tokio::test]
async fn a_future_is_polled_so_many_times_and_then_dropped() {
    for polls in 0..5 {
        let (seen, dropped) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let guard = SetOnDrop(&dropped, 1);
        let future = async {
            let _guard = guard;
            loop {
                seen.fetch_add(1, Ordering::SeqCst);
                yield_now().await;
            }
        };
        assert_eq!(cancel_after::<_>(polls, future).await, None::<()>);
        assert_eq!((seen.into_inner(), dropped.into_inner()), (polls, 1));
    }
}

#[tokio::test]
async fn a_future_that_completes_in_time_has_its_output() {
    assert_eq!(cancel_after(1, ready(7)).await, Some(7));
    let twice = || async {
        yield_now().await;
        7
    };
    assert_eq!(cancel_after(1, twice()).await, None);
    assert_eq!(cancel_after(2, twice()).await, Some(7));
}

#[tokio::test]
async fn the_last_poll_answers_without_being_woken() {
    assert_eq!(cancel_after(1, pending::<()>()).await, None);
}

#[tokio::test]
async fn what_comes_true_is_waited_for() {
    let looks = AtomicUsize::new(0);
    let look = || async { looks.fetch_add(1, Ordering::SeqCst) == 2 };
    eventually("the third look", Duration::from_secs(10), look).await;
    assert_eq!(looks.into_inner(), 3);
}

#[tokio::test]
#[should_panic(expected = "not within 20ms: pigs fly")]
async fn what_never_comes_true_is_named() {
    eventually("pigs fly", Duration::from_millis(20), || ready(false)).await;
}
