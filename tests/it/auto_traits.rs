//! The auto traits and lifetimes of the types: a guard can be moved wherever its holder is moved.

use std::error;
use std::panic::{RefUnwindSafe, UnwindSafe};
use std::sync::Arc;
use std::time::Duration;

use pglock::doctor::{Finding, Severity};
use pglock::inspect::{LockInfo, Session};
use pglock::{
    ConfiguredPool, Election, Error, ExclusiveGuard, Guard, Key, Leader, LeaderState, LeaderStatus,
    Leadership, Lock, LockManager, LockOptions, Loss, Mode, MultiGuard, MultiLock, Observer,
    Permit, Semaphore, SessionConnection, SharedGuard, Upgrade, transaction,
};
use sqlx::{Postgres, Transaction};

fn is_send<T: Send>() {}
fn is_sync<T: Sync>() {}
fn is_static<T: 'static>() {}
fn is_unpin<T: Unpin>() {}
fn is_unwind_safe<T: UnwindSafe + RefUnwindSafe>() {}
fn is_error<T: error::Error + Send + Sync + 'static>() {}
fn is_future_of<T>(_: impl Future<Output = T> + Send) {}
fn is_stream_of<T>(_: impl tokio_stream::Stream<Item = T> + Send + Unpin) {}

#[test]
fn every_type_may_be_sent_to_and_shared_with_another_thread() {
    macro_rules! check {
        ($($T:ty),*) => {$(
            is_send::<$T>();
            is_sync::<$T>();
            is_unpin::<$T>();
        )*};
    }
    check!(LockManager);
    check!(Key, Mode, Lock, LockOptions, ExclusiveGuard, SharedGuard, SessionConnection<'_>);
    check!(MultiLock, MultiGuard, Semaphore, Permit);
    check!(Election, Leader, LeaderStatus, Leadership, Observer);
    check!(LockInfo, Session);
    check!(Guard, ConfiguredPool, LeaderState, Upgrade, Finding, Severity);
    check!(Error, Loss);
}

/// A guard borrows neither its handle nor the pool, so a task can own it.
#[test]
fn only_a_borrowed_connection_borrows_the_guard() {
    is_static::<Key>();
    is_static::<Guard>();
    is_static::<Lock>();
    is_static::<LockOptions>();
    is_static::<ExclusiveGuard>();
    is_static::<SharedGuard>();
    is_static::<MultiLock>();
    is_static::<MultiGuard>();
    is_static::<Semaphore>();
    is_static::<Permit>();
    is_static::<Election>();
    is_static::<LeaderStatus>();
    is_static::<Leadership>();
    is_static::<Observer>();
}

/// Plain values stay usable after a caught panic. Types that hold a connection promise nothing.
#[test]
fn values_are_unwind_safe() {
    is_unwind_safe::<Key>();
    is_unwind_safe::<Mode>();
    is_unwind_safe::<LockOptions>();
    is_unwind_safe::<Leader>();
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
    tx: &mut Transaction<'_, Postgres>,
) {
    is_future_of::<pglock::Result<ExclusiveGuard>>(lock.acquire());
    is_future_of::<pglock::Result<Option<ExclusiveGuard>>>(lock.try_acquire());
    is_future_of::<pglock::Result<Option<ExclusiveGuard>>>(lock.try_acquire_for(Duration::ZERO));
    is_future_of::<pglock::Result<SharedGuard>>(lock.acquire_shared());
    is_future_of::<pglock::Result<Option<SharedGuard>>>(lock.try_acquire_shared());
    is_future_of::<pglock::Result<Option<SharedGuard>>>(
        lock.try_acquire_shared_for(Duration::ZERO),
    );
    is_future_of::<pglock::Result<()>>(lock.release_all());
    is_future_of::<pglock::Result<SessionConnection<'_>>>(exclusive.connection());
    is_future_of::<pglock::Result<SessionConnection<'_>>>(shared.connection());
    is_future_of::<pglock::Result<()>>(exclusive.release());
    is_future_of::<pglock::Result<()>>(shared.release());
    is_future_of::<pglock::Result<()>>(transaction::acquire(tx, "a"));
    is_future_of::<pglock::Result<bool>>(transaction::try_acquire(tx, "a".to_owned()));
    is_future_of::<pglock::Result<bool>>(transaction::try_acquire_for(tx, 1, Duration::ZERO));
    is_future_of::<pglock::Result<()>>(transaction::acquire_shared(tx, 1_i64));
    is_future_of::<pglock::Result<bool>>(transaction::try_acquire_shared(tx, (1, 2)));
    is_future_of::<pglock::Result<bool>>(transaction::try_acquire_shared_for(
        tx,
        Key::from(1),
        Duration::ZERO,
    ));
}

/// Every future of several locks, and of permits, can be sent to another thread. Compiling is the test.
#[expect(dead_code, reason = "the futures are made, and not run")]
fn the_futures_of_what_is_built_on_locks_may_be_sent_too(
    locks: &mut MultiLock,
    semaphore: &Semaphore,
    (exclusive, shared): (ExclusiveGuard, SharedGuard),
    (guard, permit): (MultiGuard, Permit),
) {
    is_future_of::<pglock::Result<MultiGuard>>(locks.acquire());
    is_future_of::<pglock::Result<Option<MultiGuard>>>(locks.try_acquire());
    is_future_of::<pglock::Result<Option<MultiGuard>>>(locks.try_acquire_for(Duration::ZERO));
    is_future_of::<pglock::Result<()>>(locks.release_all());
    is_future_of::<pglock::Result<()>>(guard.release());
    is_future_of::<pglock::Result<Permit>>(semaphore.acquire());
    is_future_of::<pglock::Result<Option<Permit>>>(semaphore.try_acquire());
    is_future_of::<pglock::Result<Option<Permit>>>(semaphore.try_acquire_for(Duration::ZERO));
    is_future_of::<pglock::Result<()>>(permit.release());
    is_future_of::<pglock::Result<SharedGuard>>(exclusive.downgrade());
    is_future_of::<pglock::Result<Upgrade>>(shared.try_upgrade());
}

/// Every future of an election can be sent to another thread; that of `run`, if its arguments can. Compiling is the
/// test.
#[expect(dead_code, reason = "the futures are made, and not run")]
fn every_future_of_an_election_may_be_sent_to_another_thread<
    L: Future<Output = Result<(), Box<dyn error::Error + Send + Sync>>> + Send,
>(
    election: &mut Election,
    (observer, status): (&mut Observer, &mut LeaderStatus),
    leadership: Leadership,
    stop: impl Future<Output = ()> + Send,
    lead: impl FnMut(Arc<Leadership>) -> L + Send,
) {
    is_future_of::<pglock::Result<Leadership>>(election.campaign());
    is_future_of::<pglock::Result<Option<Leadership>>>(election.try_campaign());
    is_future_of::<pglock::Result<()>>(election.run(stop, lead));
    is_future_of::<pglock::Result<Option<Leader>>>(election.leader());
    is_future_of::<pglock::Result<Option<Leader>>>(observer.changed());
    is_stream_of::<pglock::Result<Option<Leader>>>(observer);
    is_future_of::<LeaderState>(status.changed());
    is_future_of::<()>(leadership.stopping());
    is_future_of::<Loss>(leadership.lost());
    is_future_of::<pglock::Result<()>>(leadership.verify());
    is_future_of::<pglock::Result<i64>>(leadership.fencing_token());
    is_future_of::<pglock::Result<SessionConnection<'_>>>(leadership.connection());
    is_future_of::<pglock::Result<()>>(leadership.while_held(std::future::pending()));
    is_future_of::<pglock::Result<()>>(leadership.resign());
}

/// A task is as large as its future, and thousands of tasks may wait for a managed lock. So the state of an acquire on a
/// session of its own is not part of the future.
#[tokio::test]
async fn an_acquire_that_waits_is_small() {
    let pool = sqlx::PgPool::connect_lazy("postgres://localhost/nowhere").unwrap();
    let mut lock = Lock::new(&LockManager::new(&pool), 42);
    assert!(size_of_val(&lock.acquire()) <= 1024);
    assert!(size_of_val(&lock.try_acquire_for(Duration::from_secs(1))) <= 1024);
}
