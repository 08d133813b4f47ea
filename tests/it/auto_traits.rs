//! What the types promise to the compiler: a guard can go wherever its holder goes.

use std::error;
use std::panic::{RefUnwindSafe, UnwindSafe};
use std::time::Duration;

use pglock::{
    Error, ExclusiveGuard, Key, Lock, LockOptions, Loss, Mode, SessionConnection, SharedGuard,
};

fn is_send<T: Send>() {}
fn is_sync<T: Sync>() {}
fn is_static<T: 'static>() {}
fn is_unpin<T: Unpin>() {}
fn is_unwind_safe<T: UnwindSafe + RefUnwindSafe>() {}
fn is_error<T: error::Error + Send + Sync + 'static>() {}
fn is_future_of<T>(_: impl Future<Output = T> + Send) {}

#[test]
fn every_type_may_be_sent_to_and_shared_with_another_thread() {
    macro_rules! check {
        ($($T:ty),*) => {$(
            is_send::<$T>();
            is_sync::<$T>();
            is_unpin::<$T>();
        )*};
    }
    check!(Key, Mode, Lock, LockOptions, ExclusiveGuard, SharedGuard, SessionConnection<'_>);
    check!(Error, Loss);
}

/// A guard borrows neither its handle nor the pool, so a task can own it.
#[test]
fn only_a_lent_connection_borrows() {
    is_static::<Key>();
    is_static::<Lock>();
    is_static::<LockOptions>();
    is_static::<ExclusiveGuard>();
    is_static::<SharedGuard>();
}

/// Plain values stay usable after a caught panic. What holds a connection promises nothing.
#[test]
fn values_are_unwind_safe() {
    is_unwind_safe::<Key>();
    is_unwind_safe::<Mode>();
    is_unwind_safe::<LockOptions>();
}

#[test]
fn errors_fit_into_a_box_of_errors() {
    is_error::<Error>();
    is_error::<Loss>();
}

/// Every future can be a task on a runtime of many threads. Compiling is the test.
#[expect(dead_code, reason = "the futures are made, and not run")]
fn every_future_may_be_sent_to_another_thread(
    lock: &mut Lock,
    (exclusive, shared): (ExclusiveGuard, SharedGuard),
) {
    is_future_of::<pglock::Result<ExclusiveGuard>>(lock.acquire());
    is_future_of::<pglock::Result<Option<ExclusiveGuard>>>(lock.try_acquire());
    is_future_of::<pglock::Result<Option<ExclusiveGuard>>>(lock.try_acquire_for(Duration::ZERO));
    is_future_of::<pglock::Result<SharedGuard>>(lock.acquire_shared());
    is_future_of::<pglock::Result<Option<SharedGuard>>>(lock.try_acquire_shared());
    is_future_of::<pglock::Result<Option<SharedGuard>>>(
        lock.try_acquire_shared_for(Duration::ZERO),
    );
    is_future_of::<pglock::Result<()>>(lock.close());
    is_future_of::<pglock::Result<SessionConnection<'_>>>(exclusive.connection());
    is_future_of::<pglock::Result<SessionConnection<'_>>>(shared.connection());
    is_future_of::<pglock::Result<()>>(exclusive.release());
    is_future_of::<pglock::Result<()>>(shared.release());
}
