//! Threads that use a manager's state concurrently, in interleavings that a model checker chooses.
//!
//! The state's mutex is shuttle's, which may switch threads whenever a thread locks or unlocks it. Every
//! notification is sent under that mutex, so threads can interact at no other point. The manager, its
//! table, and the code that acquires and releases through them are the real ones. The parts that need a server
//! are simulated: the driver, which takes the steps on the shared session, and the wait sessions, which wait for
//! one key each. Whether another process holds a key is random.

use std::future::poll_fn;
use std::mem::ManuallyDrop;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;

use pglock_testkit::amount;
use shuttle::future::block_on;
use shuttle::rand::{Rng, thread_rng};
use shuttle::scheduler::RandomScheduler;
use shuttle::{Config, Runner, thread};
use sqlx::PgPool;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use tokio::runtime::{Builder, Handle};

use super::table::Step;
use super::{Manager, Next, Wait, fail, report_loss};
use crate::error::{Error, Loss};
use crate::guard::Guard;
use crate::holdings::Holdings;
use crate::key::Key;
use crate::mode::Mode;
use crate::options::LockOptions;
use crate::request::Request;
use crate::session::Session;
use crate::session::policy::WaitPolicy;

const KEYS: i64 = 2;
const ROUNDS: usize = 3;

#[test]
fn no_caller_enters_beside_another_or_waits_forever() {
    // A runtime is required, but nothing runs on it. It is never dropped, because the drivers that are started
    // there would be dropped with it, and the manager's mutex does not work outside of shuttle.
    let runtime = ManuallyDrop::new(Builder::new_current_thread().enable_all().build().unwrap());
    let _entered = runtime.enter();
    let nowhere = PgConnectOptions::new_without_pgpass().socket("/nonexistent");
    let pool = PgPoolOptions::new().connect_lazy_with(nowhere);
    let mut config = Config::new();
    // Shuttle's threads have small stacks, and these futures are large.
    config.stack_size = 1 << 20;
    Runner::new(RandomScheduler::new(amount(1_000, 3_000)), config).run(move || meet(&pool));
}

/// Runs three threads with two owners, and one thread that takes the steps. Shuttle detects a thread that waits
/// forever.
fn meet(pool: &PgPool) {
    let manager = Arc::new(Manager::new(pool, LockOptions::new()));
    let over = Arc::new(AtomicBool::new(false));
    let driver = thread::spawn({
        let (manager, over) = (Arc::clone(&manager), Arc::clone(&over));
        move || drive(&manager, &over)
    });
    let inside = Arc::new(Inside::default());
    let (one, two): (Arc<Holdings>, Arc<Holdings>) = Default::default();
    let threads = [(0, Arc::clone(&one)), (0, one), (1, two)].map(|(owner, handle)| {
        let (manager, inside) = (Arc::clone(&manager), Arc::clone(&inside));
        thread::spawn(move || {
            for _ in 0..ROUNDS {
                take_a_turn(owner, &manager, &handle, &inside);
            }
        })
    });
    for thread in threads {
        thread.join().unwrap();
    }
    over.store(true, Ordering::Relaxed);
    driver.join().unwrap();
    // A wait session may be between the loss of its session and the report of that loss.
    while wait_session::RUNNING.load(Ordering::Relaxed) > 0 {
        thread::yield_now();
    }
    assert!(manager.state().apart.is_empty(), "an ended wait session is still listed");
}

/// Takes the steps, as [`driver`](super::driver) does, whenever a driver is started, until the threads have
/// ended and everything is released.
fn drive(manager: &Arc<Manager>, over: &AtomicBool) {
    let mut session = open(manager);
    loop {
        let Some(number) = manager.state().driver.as_ref().map(|driver| driver.number) else {
            if over.load(Ordering::Relaxed) {
                return;
            }
            thread::yield_now();
            continue;
        };
        if one_in(16) {
            // The driver's runtime ends, or is stalled.
            manager.clear(number, &Loss::RuntimeShutdown);
            // The old driver may still run for a moment, but must not get any steps.
            assert!(manager.next_batch(number, true).is_none());
            session.give_up(&Loss::RuntimeShutdown);
            session = open(manager);
            continue;
        }
        let Some(batch) = manager.next_batch(number, true) else { continue };
        if batch.is_empty() {
            if !manager.retire(number) {
                block_on(manager.work.notified());
            }
            continue;
        }
        if one_in(8) {
            // The server may or may not have taken the steps in flight.
            session.give_up(&Loss::Unresponsive);
            manager.lost(&session, &Loss::Unresponsive);
            let error = Error::broken(&Key::from(0), &Loss::Unresponsive);
            let error = one_in(2).then_some(&error);
            for (key, taken) in &batch {
                if matches!(taken.step, Step::Lock(_)) {
                    manager.failed(*key, taken.id, error);
                }
            }
            session = open(manager);
            continue;
        }
        for (key, taken) in &batch {
            let yes = match taken.step {
                // Another process shares the lock, or waits for it.
                Step::Look | Step::Upgrade => one_in(2),
                // Another process holds it.
                Step::Lock(_) | Step::Renew(_) => !one_in(4),
                Step::Downgrade | Step::Unlock => true,
                Step::Wait(_) => unreachable!("the shared session never waits"),
            };
            manager.taken(*key, taken.id, &session, yes);
        }
    }
}

/// Stands in for the module of that name.
pub(super) mod wait_session {
    use super::*;

    /// How many threads stand in for wait sessions.
    pub(in crate::manager) static RUNNING: AtomicUsize = AtomicUsize::new(0);

    pub(in crate::manager) fn start(manager: &Arc<Manager>, _: &Handle, driver: u64) {
        let manager = Arc::clone(manager);
        RUNNING.fetch_add(1, Ordering::Relaxed);
        thread::spawn(move || {
            run(&manager, driver);
            RUNNING.fetch_sub(1, Ordering::Relaxed);
        });
    }

    fn run(manager: &Arc<Manager>, driver: u64) {
        loop {
            match manager.next_wait(driver) {
                Next::Wait(wait) => {
                    serve(manager, wait);
                    continue;
                }
                Next::Idle => {}
                Next::Over => return,
            }
            thread::yield_now();
            if !manager.stop_idling(driver) && one_in(2) {
                return manager.ends_apart(driver, false);
            }
        }
    }

    /// Waits for a key, and holds it.
    fn serve(manager: &Arc<Manager>, wait: Wait) {
        let Wait { key, taken, slice, mut orders } = wait;
        assert!(!slice.is_zero());
        thread::yield_now();
        if orders.is_closed() {
            // No owner wants the key any more.
            return;
        }
        if one_in(8) {
            let error = Error::broken(&Key::from_id(key), &Loss::Unresponsive);
            let waiters =
                manager.done_apart(key, taken.id, |state, _| state.table.failed(key, taken.id));
            return fail(waiters, one_in(2).then_some(&error));
        }
        if one_in(4) {
            manager.done_apart(key, taken.id, |state, now| {
                state.table.not_granted(key, taken.id, now)
            });
            return;
        }
        let session = open(manager);
        if !manager.taken(key, taken.id, &session, true) {
            return;
        }
        loop {
            thread::yield_now();
            let is_lost = one_in(8) || session.loss().is_some() || orders.is_closed();
            let order = if is_lost { None } else { orders.try_recv().ok() };
            if order.is_none() && !is_lost {
                continue;
            }
            let Some(order) = order else {
                session.give_up(&Loss::Unresponsive);
                let pending_releases = manager.done_apart(key, taken.id, |state, now| {
                    state.table.lost_key(key, &session, now)
                });
                return report_loss(pending_releases, &Loss::Unresponsive);
            };
            if order.step == Step::Unlock {
                manager.done_apart(key, taken.id, |state, now| {
                    state.table.taken(key, order.id, (&session, true), now)
                });
                return;
            }
            // Another process shares the lock, or waits for it.
            let yes = order.step == Step::Downgrade || one_in(2);
            manager.taken(key, order.id, &session, yes);
        }
    }
}

fn open(manager: &Manager) -> Arc<Session> {
    let (server, options) = (Arc::default(), LockOptions::new());
    Session::open(&manager.pool, &server, None, Handle::current(), &options)
}

fn one_in(times: u32) -> bool {
    thread_rng().gen_ratio(1, times)
}

/// Acquires in one of several ways, perhaps acquires more, and releases in one of two ways.
fn take_a_turn(owner: usize, manager: &Arc<Manager>, handle: &Arc<Holdings>, inside: &Inside) {
    let key = Key::from(thread_rng().gen_range(0..KEYS));
    let request = |mode| Request::one(&key, mode);
    let mode = if one_in(2) { Mode::Exclusive } else { Mode::Shared };
    let wanted = request(mode);
    let acquired = match thread_rng().gen_range(0..4) {
        0 => block_on(manager.acquire(handle, &wanted, WaitPolicy::Never)),
        1 => {
            let polls = thread_rng().gen_range(1..4);
            let given_up = given_up(polls, manager.acquire(handle, &wanted, WaitPolicy::Forever));
            block_on(given_up).unwrap_or(Ok(None))
        }
        _ => block_on(manager.acquire(handle, &wanted, WaitPolicy::Forever)),
    };
    let Some(held) = unless_it_passes(acquired) else { return };
    let entered = inside.enter(owner, &held, mode);
    if mode == Mode::Shared && one_in(2) {
        let exclusive = request(Mode::Exclusive);
        let upgraded = if one_in(2) {
            block_on(held.and(&exclusive))
        } else {
            block_on(manager.acquire(handle, &exclusive, WaitPolicy::Forever))
        };
        if let Some(more) = unless_it_passes(upgraded) {
            let entered = inside.enter(owner, &more, Mode::Exclusive);
            thread::yield_now();
            inside.leave(&entered);
            drop(more);
        }
    }
    thread::yield_now();
    inside.leave(&entered);
    if one_in(2) {
        drop(block_on(held.release()));
    }
}

/// Returns `None` for a deadlock or a loss, and panics on any other error.
fn unless_it_passes(acquired: Result<Option<Guard>, Error>) -> Option<Guard> {
    match acquired {
        Ok(held) => held,
        Err(Error::Deadlock { .. } | Error::Disconnected { .. } | Error::Lost { .. }) => None,
        Err(error) => panic!("{error:?}"),
    }
}

/// Polls a future a given number of times, regardless of wake-ups, and then drops it.
async fn given_up<T>(polls: usize, future: impl Future<Output = T>) -> Option<T> {
    let mut future = Box::pin(future);
    let mut left = polls;
    let polled = poll_fn(|cx| {
        if let Poll::Ready(output) = future.as_mut().poll(cx) {
            return Poll::Ready(Some(output));
        }
        left -= 1;
        if left == 0 {
            return Poll::Ready(None);
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    });
    polled.await
}

/// The locks that are held, each with its owner. The mutex is std's, so shuttle does not switch threads there.
#[derive(Default)]
struct Inside(Mutex<Vec<Hold>>);

#[derive(Clone)]
struct Hold {
    owner: usize,
    key: Key,
    mode: Mode,
    session: Arc<Session>,
}

impl Hold {
    fn excludes(&self, other: &Self) -> bool {
        self.owner != other.owner
            && self.key == other.key
            && (self.mode == Mode::Exclusive || other.mode == Mode::Exclusive)
            && self.session.loss().is_none()
            && other.session.loss().is_none()
    }

    fn is(&self, other: &Self) -> bool {
        self.owner == other.owner
            && self.key == other.key
            && self.mode == other.mode
            && Arc::ptr_eq(&self.session, &other.session)
    }
}

impl Inside {
    fn enter(&self, owner: usize, guard: &Guard, mode: Mode) -> Hold {
        let (key, session) = (guard.key().clone(), Arc::clone(guard.session()));
        let hold = Hold { owner, key, mode, session };
        let mut holds = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let other = holds.iter().find(|other| hold.excludes(other));
        assert!(other.is_none(), "owner {owner} has {} {mode} beside another", hold.key);
        holds.push(hold.clone());
        hold
    }

    fn leave(&self, hold: &Hold) {
        let mut holds = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let place = holds.iter().position(|other| hold.is(other)).unwrap();
        holds.swap_remove(place);
    }
}
