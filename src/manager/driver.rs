//! The driver: the task that takes the steps of a manager's keys, on the session that they share.
//!
//! It runs while a key is held or has a step to be taken, and a little longer. It opens the session for the first step
//! that needs it, and sends all steps that have come up since the last statement in one statement. It hands the answers
//! to the table while the server executes the next statement.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use tokio::task::yield_now;
use tokio::time::{sleep, sleep_until};

use super::batch::{Answer, LARGEST, calls, keep_only_locks, read};
use super::table::{Step, Taken};
use super::{Manager, WAIT_SESSION_PAUSE, fail};
use crate::error::{Error, Loss};
use crate::guard::Guard;
use crate::key::{Key, KeyId};
use crate::metrics;
use crate::mode::{Mode, Modes};
use crate::owner::Owner;
use crate::request::Request;
use crate::session::Session;
use crate::session::shared::Called;
use crate::sql::backend::Held;

/// How long the session is unused before its idle connection is polled for closure again.
const QUIET: Duration = Duration::from_millis(20);

/// If at least this number of callers got an answer at once, the tasks that are ready run before the next
/// statement is sent, so that their requests join it. Otherwise, in a busy runtime, which polls for the server's
/// answer only every 61 tasks, the driver would send 61 requests at a time, at the cost of one statement each
/// time, and make the runtime busier.
///
/// For fewer callers, this costs more than it gains.
const YIELD_ABOVE: usize = 16;

/// The maximum number of answers that are handed to the table under one acquisition of its mutex.
const AT_ONCE: usize = 64;

/// How often the driver checks whether the pool is exhausted while the session is unused. If it is, the session's
/// connection returns to the pool.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// After this time without a key, the connection returns to the pool.
const IDLE: Duration = Duration::from_secs(1);

/// Takes the steps until there is nothing left to do, or another driver has taken over.
pub(super) async fn run(manager: Arc<Manager>, number: u64) {
    let pulse = manager.options.heartbeat.bound() / 8;
    let mut driver = Driver {
        owner: Owner::new(&manager.pool, manager.options.clone()),
        number,
        keeper: None,
        in_flight: Vec::new(),
        answered: None,
        is_stuck: false,
        manager,
    };
    let manager = Arc::clone(&driver.manager);
    let is_replaced = async {
        while manager.is_driven_by(number) {
            sleep(pulse).await;
        }
    };
    tokio::select! {
        biased;
        () = is_replaced => {}
        () = driver.run() => {}
    }
}

/// The state of the driver task.
///
/// # Drop
///
/// If this still is the manager's driver, its runtime was shut down: all sessions of the manager are lost, and waiting
/// acquires retry.
struct Driver {
    manager: Arc<Manager>,
    number: u64,
    owner: Owner,
    /// Keeps the session open.
    keeper: Option<Guard>,
    in_flight: Vec<(KeyId, Taken)>,
    /// The answers that the table has not received yet.
    answered: Option<Answered>,
    /// Whether neither the shared session nor a wait session is open for the keys in the line.
    is_stuck: bool,
}

/// The session on which steps were taken, and the key, the number and the answer of each step.
type Answered = (Arc<Session>, Vec<(KeyId, u64, Answer)>);

impl Driver {
    async fn run(&mut self) {
        loop {
            if self.answered.as_ref().is_some_and(|(_, answers)| answers.len() >= YIELD_ABOVE) {
                yield_now().await;
            }
            let tries_line = self.keeper.is_some() || std::mem::take(&mut self.is_stuck);
            let Some(batch) = self.manager.next_batch(self.number, tries_line) else {
                // This driver may have consumed a notification that was meant for its successor.
                self.manager.work.notify_one();
                return;
            };
            self.in_flight = batch;
            if !self.in_flight.is_empty() {
                self.step().await;
            } else if self.answered.is_some() {
                if !hand_over(&self.manager, &mut self.answered) {
                    self.session_failed(&Loss::NotHeld);
                }
            } else if !self.rest().await {
                break;
            }
        }
    }

    /// Waits for something to do. Returns false if the driver is not needed any more.
    async fn rest(&mut self) -> bool {
        let manager = Arc::clone(&self.manager);
        let mut quiet_since = None;
        loop {
            let session = self.keeper.as_ref().map(|keeper| Arc::clone(keeper.session()));
            if session.is_none() && manager.retire(self.number) {
                return false;
            }
            let is_closed = manager.pool.is_closed();
            if is_closed {
                let waiters = manager.change(|state, now| state.table.dismiss_all(now));
                fail(waiters, Some(&Error::PoolClosed { key: self.first_key() }));
                if session.is_some() && self.let_go() {
                    continue;
                }
            }
            let time = match quiet_since {
                None => QUIET,
                Some(_) if manager.needs_shared() => IDLE,
                // A query of the application may need the connection.
                Some(_) => POLL_INTERVAL,
            };
            let retry = session.as_ref().and_then(|_| manager.state().table.next_retry());
            tokio::select! {
                biased;
                () = manager.work.notified() => return true,
                loss = lost(session.as_ref()) => {
                    self.lose(&loss);
                    return true;
                }
                () = manager.pool.close_event(), if !is_closed => {}
                () = sleep_until(retry.unwrap_or_else(Instant::now).into()), if retry.is_some() => {
                    return true;
                }
                () = sleep(WAIT_SESSION_PAUSE), if session.is_none() => {
                    self.is_stuck = manager.is_stuck();
                    if self.is_stuck {
                        return true;
                    }
                }
                () = sleep(time), if session.is_some() => {
                    if let Some(session) = &session {
                        session.resume_polling();
                    }
                    let is_idle = quiet_since.is_some_and(|since: Instant| since.elapsed() >= IDLE);
                    // A task may be waiting for a connection.
                    let is_exhausted = manager.pool.num_idle() == 0
                        && manager.pool.size() >= manager.pool.options().get_max_connections();
                    let is_wanted = is_exhausted && quiet_since.is_some();
                    if is_idle || is_wanted || manager.state().awaits_connection() {
                        self.let_go();
                    }
                    quiet_since.get_or_insert_with(Instant::now);
                }
            }
        }
    }

    /// Releases the session's connection to the pool, unless the session is needed. Returns whether no session is open
    /// any more.
    fn let_go(&mut self) -> bool {
        let needed = self.manager.needs_shared();
        if !needed {
            // Detach: no task waits for the release.
            drop(self.keeper.take());
            let mut state = self.manager.state();
            self.manager.staff_line(&mut state);
        }
        self.keeper.is_none()
    }

    /// Takes the steps that are in flight, in one statement.
    async fn step(&mut self) {
        if let Some(loss) = self.keeper.as_ref().and_then(Guard::loss) {
            hand_over(&self.manager, &mut self.answered);
            self.lose(&loss);
        }
        let is_new = self.keeper.is_none();
        if is_new {
            // The steps for locks that were held on the old session have been called off.
            keep_only_locks(&mut self.in_flight);
            self.manager.set_opening(self.number, true);
            let opened = self.open().await;
            self.manager.set_opening(self.number, false);
            match opened {
                Ok(keeper) => {
                    if let Some(keeper) = &keeper {
                        self.manager.name_keys(keeper.session());
                    }
                    self.keeper = keeper;
                }
                Err(error) => {
                    end_with_the_runtime().await;
                    self.fail_all_steps(&error);
                }
            }
        }
        let Some(keeper) = &self.keeper else { return };
        let session = Arc::clone(keeper.session());
        metrics::batch(self.in_flight.len());
        let calls = calls(&self.in_flight);
        let calling = async {
            tokio::select! {
                biased;
                called = session.call(&calls) => called,
                loss = session.lost() => Called::Lost(loss),
            }
        };
        let called = {
            let mut calling = pin!(calling);
            // The first poll sends the statement.
            let called = poll_fn(|cx| Poll::Ready(calling.as_mut().poll(cx))).await;
            if !hand_over(&self.manager, &mut self.answered) {
                return self.ask_again(&Loss::NotHeld);
            }
            match called {
                Poll::Ready(called) => called,
                Poll::Pending => calling.await,
            }
        };
        match called {
            Called::Answers(answers) => match read(&self.in_flight, &answers) {
                Some(answers) => self.answered = Some((Arc::clone(&session), answers)),
                None => self.session_failed(&Loss::NotHeld),
            },
            Called::Failed(error, held) => self.sort_out(&session, error, &held),
            Called::Lost(loss) => {
                end_with_the_runtime().await;
                // If a session that was open before turns out to be dead, an acquire gets no error, as with a dead idle
                // connection of a pool. If a new session breaks, it gets one.
                if !is_new && matches!(loss, Loss::Disconnected(_)) {
                    self.ask_again(&loss);
                } else {
                    self.session_failed(&loss);
                }
            }
        }
        self.in_flight.clear();
    }

    /// Opens the session for the first of the steps.
    async fn open(&mut self) -> Result<Option<Guard>, Error> {
        let Some((key, _)) = self.in_flight.first() else { return Ok(None) };
        self.owner.try_acquire(&Request::session(&Key::from_id(*key))).await
    }

    /// Handles a statement that failed half-way: determines for each step whether it was taken.
    fn sort_out(&self, session: &Arc<Session>, error: sqlx::Error, held: &Held) {
        let pid = session.backend_pid();
        let holds = |key, mode| held.contains(&(pid, key, mode));
        let error = Error::acquiring(&self.first_key(), error);
        for (key, taken) in &self.in_flight {
            let server = Modes {
                exclusive: holds(*key, Mode::Exclusive),
                shared: holds(*key, Mode::Shared),
            };
            let granted = match taken.step {
                Step::Lock(Mode::Exclusive) | Step::Upgrade => server.exclusive,
                Step::Lock(Mode::Shared) => server.shared,
                Step::Unlock | Step::Downgrade => true,
                Step::Look | Step::Renew(_) | Step::Wait(_) => false,
            };
            let waiters = self.manager.change(|state, now| {
                let found = (session, server);
                state.table.failed_half_way(*key, taken.id, granted, found, now)
            });
            fail(waiters, Some(&error));
        }
    }

    /// Fails the acquires that wait for the steps in flight, and for those that were added since. Acquires that callers
    /// start because of this error are not failed.
    fn fail_all_steps(&mut self, error: &Error) {
        let batches = {
            let state = self.manager.state();
            1 + (state.to_do.len() + state.to_release.len()) / LARGEST
        };
        for _ in 0..batches {
            let more = self.manager.next_batch(self.number, false);
            self.in_flight.extend(more.unwrap_or_default());
        }
        self.fail(Some(error));
    }

    /// Notifies the callers that wait for the [`Step::Lock`]s in flight; without an error they retry. The other steps
    /// were called off when the session was lost.
    fn fail(&mut self, error: Option<&Error>) {
        keep_only_locks(&mut self.in_flight);
        for (key, taken) in std::mem::take(&mut self.in_flight) {
            self.manager.failed(key, taken.id, error);
        }
    }

    /// Handles a session that broke before the steps in flight were taken. They are retried on another session.
    fn ask_again(&mut self, loss: &Loss) {
        self.lose(loss);
        self.fail(None);
    }

    /// Handles a session that broke while the steps were in flight. Their callers get an error.
    fn session_failed(&mut self, loss: &Loss) {
        self.lose(loss);
        let error = Error::broken(&self.first_key(), loss);
        self.fail(Some(&error));
    }

    fn first_key(&self) -> Key {
        let first = self.in_flight.first();
        Key::from_id(first.map_or(KeyId::BigInt(0), |(key, _)| *key))
    }

    /// Reports the loss to the guards on the session.
    fn lose(&mut self, loss: &Loss) {
        let Some(keeper) = self.keeper.take() else { return };
        let session = Arc::clone(keeper.session());
        session.give_up(loss);
        self.manager.lost(&session, loss);
    }
}

/// Hands the answers to the table. Returns whether the session held every lock that it should have released.
fn hand_over(manager: &Arc<Manager>, answered: &mut Option<Answered>) -> bool {
    let Some((session, answers)) = answered.take() else { return true };
    for answers in answers.chunks(AT_ONCE) {
        // Locks the mutex once for the whole chunk, because the notified callers will lock it too.
        manager.change(|state, now| {
            for (key, id, answer) in answers {
                if let Some(yes) = *answer {
                    state.table.taken(*key, *id, (&session, yes), now);
                }
            }
        });
    }
    answers.iter().all(|(.., answer)| answer.is_some())
}

/// Ends the task here if its runtime is shutting down: such a runtime fails the I/O in flight, and then drops its tasks
/// when they yield. Callers that wait for a dropped task retry on another runtime, and get no error.
pub(super) async fn end_with_the_runtime() {
    yield_now().await;
}

/// Waits for the loss of a session. Never returns if there is no session.
async fn lost(session: Option<&Arc<Session>>) -> Loss {
    match session {
        Some(session) => session.lost().await,
        None => std::future::pending().await,
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.manager.clear(self.number, &Loss::RuntimeShutdown);
        // Another driver may have replaced this one, or is about to. The pool must not get a connection that holds
        // locks.
        self.lose(&Loss::RuntimeShutdown);
    }
}
