//! Many locks on few connections: one session holds all keys that were free when they were requested.

mod batch;
mod driver;
mod managed;
mod table;
#[cfg(not(test))]
mod wait_session;

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::{Arc, PoisonError};
#[cfg(not(test))]
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

#[cfg(test)]
use shuttle::sync::{Mutex, MutexGuard};
use sqlx::PgPool;
use tokio::runtime::Handle;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::timeout;

use crate::error::{Error, Loss};
use crate::key::KeyId;
use crate::options::LockOptions;
use crate::owner::Owner;
use crate::session::Session;
use crate::session::budget::Budget;
use crate::source::Source;
use crate::source::sealed::Sealed;
use batch::LARGEST;
pub(crate) use managed::PendingRelease;
use table::{Bound, Effect, Table, Taken};
#[cfg(test)]
use threads::wait_session;

/// The limits on local hand-offs of a lock, in number and time. After that, other processes get their turn.
const BOUND: Bound = Bound { count: 100, time: Duration::from_millis(20) };

/// The maximum number of wait sessions of a manager, and the number of connections in the pool per wait session; the
/// first is always allowed. The work under the locks needs the other connections: three services with pools of 7 and
/// 100,000 keys reached 0.97 of the throughput of row locks with one wait session each, 0.87 with two, and 0.67 with
/// four; with pools of 20 the number made no difference.
const MOST_WAIT_SESSIONS: u32 = 4;
const CONNECTIONS_FOR_EACH: u32 = 8;

/// A wait session that has held its key for this long no longer counts towards the maximum, so another one may be
/// opened.
const LONG_HOLD: Duration = Duration::from_secs(1);

/// The pause after a wait session could not be opened, before the next attempt.
const WAIT_SESSION_PAUSE: Duration = Duration::from_secs(1);

/// A [`Source`] of locks that share a few connections.
///
/// A [`Lock`](crate::Lock) made from a pool uses a connection of the pool while it is held. The locks of a manager
/// share one connection, whether there are a thousand or a hundred thousand of them, except those whose key another
/// session held when it was requested. All of them have the type [`Lock`](crate::Lock) and the same guards, and exclude
/// all other locks on the same keys.
///
/// * Concurrent requests of many tasks are sent in one statement.
/// * Tasks of one process that request the same key wait in line in the process, in FIFO order, and hand it off without
///   a round trip: at most 100 times, and for 20 ms at most. Then the process queues for the key on the server again,
///   so that other processes get their turn.
/// * The shared session never waits. For a key that another session holds, the manager waits on another connection,
///   which then holds the key. There is one such connection for every eight connections of the pool, at least one
///   and at most four. If other sessions hold more keys than that, the keys take turns on those connections, and
///   meanwhile all of them are retried in one statement: after 5 ms at first, and later once a second.
///   A connection that has held its key for a second does not count: another one waits instead, unless locks already
///   use [their share](crate::guide::operations#the-pool) of the pool.
///
/// So however many keys are busy, a manager uses one connection of a pool of one or two, two of a pool of 3 to 15, and
/// at most five of a larger one. A key that it had to wait for, and has held for more than a second, uses one more,
/// within the share of locks. The other connections are left to the work under the locks. Where other processes
/// hold many keys, and the work needs every connection, give the pool seven or more. The shared connection returns to
/// the pool after a second without a lock, the others after a tenth of a second, and all of them when the pool is
/// closed and the last guard was dropped.
///
/// # Fairness
///
/// Busy keys take turns to wait in the server's queue. The first turn of a key lasts 250 ms. Later turns last an eighth
/// of the time that the key has waited (all of it, if no other key is busy), and at most a minute. After its turn, a
/// key waits until each of the others has had as much time. So no key waits forever: if the server's queue
/// takes a time *t* of up to 50 s to reach the key, the key is granted within about 9 *t* plus two minutes for each
/// busy key of the process, or half a second for each if none of them has waited for more than two seconds. A
/// [`wait_slice`](LockOptions::wait_slice) of less than a minute limits the turns, too.
///
/// A turn needs a connection. If locks use their whole share of the pool, and each of these connections holds a key, a
/// busy key is only retried, and waiters in the server's queue may overtake it. On a pool that can spare one connection
/// for locks (by default, a pool of up to two), that connection waits only while it holds nothing and has nothing else
/// to do; and while it holds a key that it has waited for, no other key is granted.
///
/// # What is different
///
/// * [`connection`](crate::Guard::connection) returns [`Error::SharedSession`], because the guard has
///   no connection of its own.
/// * If the shared session is lost, all locks on it are lost, and every guard reports the loss.
/// * The sessions run on the runtime of a task that has acquired a lock. If that runtime is shut down, all locks of
///   the manager are lost. If it stalls, the locks are lost after the heartbeat's interval and timeout, and tasks on
///   other runtimes continue without it; if it stalled in the middle of a statement, the locks may stay held on the
///   server until the runtime resumes or its process ends. actix-web has a runtime for each worker, and ends idle
///   workers first: acquire and work on the runtime of `main` there, with
///   [`Handle::spawn`](tokio::runtime::Handle::spawn).
/// * [`release`](crate::ExclusiveGuard::release) does not unlock a lock that is handed off inside the process, or that
///   other guards share. It asks the server whether the session is still alive; one statement serves all guards that
///   are released at the same time.
/// * The unlock of a dropped guard is sent by the manager's task, so the runtime must be driven. If it is
///   not, the lock is held until the connection closes.
/// * A handle that holds a lock shared, and acquires it exclusively, is granted the exclusive lock if no other handle
///   shares it. It waits for other handles of the process. If another process shares the lock (or waits for it, before
///   PostgreSQL 17), the acquire returns [`Error::Deadlock`].
/// * [`release_all`](crate::Lock::release_all) of a lock that was lost returns `Ok`.
/// * With a role that may not list locks, the manager can't see whether another process waits for a lock that is held
///   shared. After 20 ms, it assumes that one does, and grants the lock to another handle only after all handles that
///   share it have released it.
/// * The server's deadlock detection sees the process, not its tasks: two tasks that acquire two keys in
///   opposite order deadlock without being detected, as with two mutexes.
/// * Elections, several keys at once ([`MultiLock`](crate::MultiLock)) and permits
///   ([`Semaphore`](crate::Semaphore)) use a session of their own.
///
/// # Sent to the server
///
/// The manager sends one prepared statement for up to 1,000 keys that are acquired or released at once. For a lock that
/// is handed off in the process, it sends nothing, unless the release is awaited.
///
/// # Examples
///
/// ```
/// use pglock::{Lock, LockManager};
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
/// # let pool = pglock_testkit::pool().await;
/// let manager = LockManager::new(&pool);
/// let mut guards = Vec::new();
/// for invoice in 0..100 {
///     guards.push(Lock::new(&manager, invoice).acquire().await?);
/// }
/// assert!(guards.iter().all(|guard| guard.backend_pid() == guards[0].backend_pid()));
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct LockManager {
    manager: Arc<Manager>,
}

impl LockManager {
    /// Makes a manager for the pool of a [`Source`]. Sends nothing.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::{Lock, LockManager};
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// let manager = LockManager::new(&pool);
    /// let _guard = Lock::new(&manager, "invoice-17").acquire().await?;
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn new(source: &impl Source) -> Self {
        let owner = source.owner();
        Self { manager: Arc::new(Manager::new(owner.pool(), owner.options.clone())) }
    }
}

impl Sealed for LockManager {
    fn owner(&self) -> Owner {
        let manager = &self.manager;
        let owner = Owner::new(&manager.pool, manager.options.clone());
        owner.managed_by(manager)
    }
}

impl fmt::Debug for LockManager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LockManager")
            .field("options", &self.manager.options)
            .finish_non_exhaustive()
    }
}

/// The state that a manager's handles and guards share.
pub(crate) struct Manager {
    pool: PgPool,
    options: LockOptions,
    /// The maximum number of wait sessions, not counting those that have held their key for [`LONG_HOLD`].
    most_wait_sessions: u32,
    /// The maximum number of all wait sessions.
    most_apart: u32,
    budget: Arc<Budget>,
    state: Mutex<State>,
    /// Wakes the driver: there are steps to take on the shared session, or keys to retry.
    work: Notify,
    /// Wakes an idle wait session: there is a key in the line.
    line: Notify,
}

struct State {
    table: Table<Arc<Session>, Reply>,
    /// Keys with a step to take on the shared session. Some of the steps may have been called off.
    to_do: VecDeque<KeyId>,
    /// The same, for steps that release locks.
    to_release: VecDeque<KeyId>,
    /// The keys that wait sessions wait for, or hold.
    apart: HashMap<KeyId, Apart>,
    /// The driver that takes the steps, if one runs.
    driver: Option<Driving>,
    /// The number of drivers that were started so far.
    drivers: u64,
}

/// A key that a wait session waits for, or holds.
struct Apart {
    /// The number of the step with which the session began to wait.
    wait: u64,
    /// Sends the session the steps to take. Dropping the sender ends the wait.
    orders: mpsc::UnboundedSender<Taken>,
}

/// The manager's record of its driver. All sessions of a manager run on the runtime of its driver.
struct Driving {
    number: u64,
    runtime: Handle,
    /// When the driver was last seen running.
    seen: Instant,
    /// Whether the driver is opening the shared session, so that no step was sent to the server yet.
    opening: bool,
    wait_sessions: u32,
    /// The number of wait sessions that have no key to wait for.
    idle: usize,
    /// When a wait session failed to open. Reset when another one ends without a failure.
    failed: Option<Instant>,
}

impl State {
    /// Whether there are keys in the line, and no wait session is open.
    fn awaits_connection(&self) -> bool {
        let none_is_open = |driver: &Driving| driver.idle == 0 && self.apart.is_empty();
        self.table.line_len() > 0 && self.driver.as_ref().is_some_and(none_is_open)
    }

    /// The number of wait sessions that have held their key for [`LONG_HOLD`].
    fn settled(&self, now: Instant) -> u32 {
        let is_settled = |key: &&KeyId| {
            let held_since = self.table.held_since(**key);
            held_since.is_some_and(|since| now.saturating_duration_since(since) >= LONG_HOLD)
        };
        u32::try_from(self.apart.keys().filter(is_settled).count()).unwrap_or(u32::MAX)
    }

    /// Whether the driver runs on another runtime than the caller. `false` outside of a runtime, where a release may be
    /// awaited, because there is no timer to watch the driver with.
    fn is_driven_elsewhere(&self) -> bool {
        let is_elsewhere = |driver: &Driving| {
            Handle::try_current().is_ok_and(|here| here.id() != driver.runtime.id())
        };
        self.driver.as_ref().is_some_and(is_elsewhere)
    }

    /// Returns the record of the driver, if the driver with this number is still the current one.
    fn driver_of(&mut self, number: u64) -> Option<&mut Driving> {
        self.driver.as_mut().filter(|driving| driving.number == number)
    }
}

/// Sends a caller the result.
type Reply = oneshot::Sender<Outcome>;

/// The result that a caller gets.
enum Outcome {
    Granted(Arc<Session>),
    Refused,
    Deadlock,
    Released(Result<(), Loss>),
    /// The process keeps the key: the server was not asked.
    HandedOff,
    Failed(Error),
}

impl Manager {
    fn new(pool: &PgPool, options: LockOptions) -> Self {
        let state = State {
            table: Table::new(BOUND),
            to_do: VecDeque::new(),
            to_release: VecDeque::new(),
            apart: HashMap::new(),
            driver: None,
            drivers: 0,
        };
        let budget = Budget::of(pool);
        // One connection is for the shared session.
        let spare = budget.limit(options.reserve_connections).saturating_sub(1);
        let most = pool.options().get_max_connections() / CONNECTIONS_FOR_EACH;
        let wait_sessions = spare.min(most).clamp(1, MOST_WAIT_SESSIONS);
        Self {
            pool: pool.clone(),
            options,
            most_wait_sessions: wait_sessions,
            most_apart: spare.max(wait_sessions),
            budget,
            state: Mutex::new(state),
            work: Notify::new(),
            line: Notify::new(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the table, and applies the effects.
    fn change<T>(self: &Arc<Self>, change: impl FnOnce(&mut State, Instant) -> T) -> T {
        let mut state = self.state();
        let changed = change(&mut state, Instant::now());
        self.settle(&mut state);
        if state.table.is_empty() {
            // The driver wakes, and ends because the table is empty.
            self.work.notify_one();
        }
        changed
    }

    /// Starts a driver, unless one runs or there is nothing to do.
    fn drive(self: &Arc<Self>, runtime: &Handle, state: &mut State) {
        if state.driver.is_some() || state.table.is_empty() {
            return;
        }
        state.drivers += 1;
        let number = state.drivers;
        state.driver = Some(Driving {
            number,
            runtime: runtime.clone(),
            seen: Instant::now(),
            opening: false,
            wait_sessions: 0,
            idle: 0,
            failed: None,
        });
        // Detach: the driver ends when there is nothing left to do.
        drop(runtime.spawn(driver::run(Arc::clone(self), number)));
    }

    /// Waits for an answer of the driver, which may run on [another runtime](State::is_driven_elsewhere). If the driver
    /// has not run for longer than its sessions are trusted, because its runtime is blocked or not driven, its sessions
    /// are lost, and waiting acquires retry.
    async fn unless_stalled<T>(
        self: &Arc<Self>,
        mut future: impl Future<Output = T> + Unpin,
        mut elsewhere: bool,
    ) -> T {
        while elsewhere {
            // Boxed, because usually there is one runtime.
            if let Some(output) = Box::pin(self.watch_driver(&mut future)).await {
                return output;
            }
            elsewhere = self.state().is_driven_elsewhere();
        }
        future.await
    }

    /// Waits for a future for an eighth of the heartbeat's bound, and then checks that the driver runs. Returns `None`
    /// if the future is not ready by then.
    async fn watch_driver<T>(&self, future: impl Future<Output = T>) -> Option<T> {
        let bound = self.options.heartbeat.bound();
        if let Ok(output) = timeout(bound / 8, future).await {
            return Some(output);
        }
        let stalled = self
            .state()
            .driver
            .as_ref()
            .and_then(|driver| (driver.seen.elapsed() > bound).then_some(driver.number));
        if let Some(driver) = stalled {
            self.clear(driver, &Loss::Unresponsive);
        }
        None
    }

    /// Marks all sessions as lost, because their driver has ended or is stalled. Waiting acquires retry, and the first
    /// starts another driver.
    fn clear(&self, driver: u64, loss: &Loss) {
        let (apart, (seats, pending_releases)) = {
            let mut state = self.state();
            if state.driver_of(driver).is_none() {
                return;
            }
            state.driver = None;
            state.to_do.clear();
            state.to_release.clear();
            (std::mem::take(&mut state.apart), state.table.clear())
        };
        for session in seats {
            session.give_up(loss);
        }
        // Dropped only now, so that the wait sessions see the loss first.
        drop(apart);
        report_loss(pending_releases, loss);
    }

    /// Records that a driver runs. Returns whether it still is the manager's driver.
    fn is_driven_by(&self, driver: u64) -> bool {
        let mut state = self.state();
        let Some(driving) = state.driver_of(driver) else { return false };
        driving.seen = Instant::now();
        true
    }

    /// Takes the next steps for the shared session. If that session is open, also retries the keys in the line that
    /// are due. Returns `None` if `driver` is not the manager's driver any more, because the steps are not for it then.
    fn next_batch(self: &Arc<Self>, driver: u64, is_open: bool) -> Option<Vec<(KeyId, Taken)>> {
        let mut batch = Vec::new();
        let mut state = self.state();
        state.driver_of(driver)?;
        let now = Instant::now();
        if is_open && state.table.next_retry().is_some_and(|retry| retry <= now) {
            state.table.retry(now);
            self.settle(&mut state);
            // Wait sessions that hold a key may not count any more.
            self.staff_line(&mut state);
        }
        // Releases go first, because the end of each statement takes the server some time for every lock that the
        // session holds. Acquires don't starve, because each release follows one.
        while batch.len() < LARGEST
            && let Some(key) = state.to_release.pop_front()
        {
            if state.table.releases(key)
                && let Some(taken) = state.table.take(key, true)
            {
                batch.push((key, taken));
            }
        }
        while batch.len() < LARGEST
            && let Some(key) = state.to_do.pop_front()
        {
            if let Some(taken) = state.table.take(key, true) {
                batch.push((key, taken));
            }
        }
        Some(batch)
    }

    /// Whether any key is held on the shared session, or has a step to be taken there.
    fn needs_shared(&self) -> bool {
        let state = self.state();
        // If no connection was available for a wait session, it can use that of the shared session.
        let can_wait = if state.awaits_connection() { state.table.line_len() } else { 0 };
        state.table.len() > state.apart.len() + can_wait
    }

    /// Whether no session waits for the keys in the line or retries them, and no wait session will be free soon.
    fn is_stuck(self: &Arc<Self>) -> bool {
        let mut state = self.state();
        self.staff_line(&mut state);
        if state.awaits_connection() {
            return true;
        }
        let settled = state.settled(Instant::now());
        let none_waits = u32::try_from(state.apart.len()).is_ok_and(|apart| apart == settled);
        let is_idle = state.driver.as_ref().is_some_and(|driver| driver.idle > 0);
        // If locks already use their share of the pool, a retry would only wait for a connection, and fail.
        state.table.line_len() > 0 && none_waits && !is_idle && !self.is_short()
    }

    /// Whether all connections that locks may have are in use.
    fn is_short(&self) -> bool {
        !self.budget.has_spare(self.options.reserve_connections)
    }

    /// Records whether the driver is opening the shared session. If it is, and no connection is free, all wait sessions
    /// stop waiting.
    fn set_opening(self: &Arc<Self>, driver: u64, opening: bool) {
        self.change(|state, now| {
            if let Some(driving) = state.driver_of(driver) {
                driving.opening = opening;
            }
            if opening && self.is_short() {
                let waited_for: Vec<_> =
                    state.apart.iter().map(|(key, apart)| (*key, apart.wait)).collect();
                for (key, wait) in waited_for {
                    if state.table.not_granted(key, wait, now) {
                        state.apart.remove(&key);
                    }
                }
            }
        });
    }

    /// Records the answer to a step. Returns whether the step still counted.
    fn taken(self: &Arc<Self>, key: KeyId, id: u64, seat: &Arc<Session>, yes: bool) -> bool {
        self.change(|state, now| state.table.taken(key, id, (seat, yes), now))
    }

    /// Records that a step failed, and notifies the waiters for it; without an error they retry.
    fn failed(self: &Arc<Self>, key: KeyId, id: u64, error: Option<&Error>) {
        let waiters = self.change(|state, _| state.table.failed(key, id));
        fail(waiters, error);
    }

    /// Makes the session name the keys that the manager holds on it when it reports its loss.
    fn name_keys(self: &Arc<Self>, session: &Arc<Session>) {
        let (manager, at) = (Arc::downgrade(self), Arc::downgrade(session));
        session.set_managed_keys(move || {
            let (Some(manager), Some(session)) = (manager.upgrade(), at.upgrade()) else {
                return Vec::new();
            };
            // Any method of a guard may find the loss, so this must not block on the state's lock.
            let state = manager.state.try_lock();
            state.map_or_else(|_| Vec::new(), |state| state.table.some_at(&session))
        });
    }

    /// Handles the loss of a session, and of all keys that were held on it.
    fn lost(self: &Arc<Self>, seat: &Arc<Session>, loss: &Loss) {
        let pending_releases = self.change(|state, now| state.table.lost(seat, now));
        report_loss(pending_releases, loss);
    }

    /// Handles the loss of one key, before the loss of its session was reported.
    fn lost_key(self: &Arc<Self>, key: KeyId, seat: &Arc<Session>, loss: &Loss) {
        let pending_releases = self.change(|state, now| state.table.lost_key(key, seat, now));
        report_loss(pending_releases, loss);
    }

    /// Changes the table after a wait session has stopped waiting for a key or holding it, and removes that session
    /// from the list, unless another one has the key now.
    fn done_apart<T>(
        self: &Arc<Self>,
        key: KeyId,
        wait: u64,
        change: impl FnOnce(&mut State, Instant) -> T,
    ) -> T {
        self.change(|state, now| {
            if state.apart.get(&key).is_some_and(|apart| apart.wait == wait) {
                state.apart.remove(&key);
            }
            change(state, now)
        })
    }

    /// Unregisters the driver if the table is empty. Returns whether the driver may end.
    fn retire(&self, driver: u64) -> bool {
        let mut state = self.state();
        let is_over = state.table.is_empty();
        if is_over {
            state.driver.take_if(|driving| driving.number == driver);
        }
        is_over
    }

    /// Takes the next key for a wait session. If there is none, the session counts as idle from now on.
    fn next_wait(self: &Arc<Self>, driver: u64) -> Next {
        let mut state = self.state();
        let most = self.most_sessions(&state);
        let Some(driving) = state.driver_of(driver) else { return Next::Over };
        if driving.wait_sessions > most {
            return Next::Over;
        }
        let yields = driving.opening && self.is_short();
        let next = if yields { None } else { state.table.take_wait(Instant::now()) };
        let Some((key, taken, slice)) = next else {
            if let Some(driving) = state.driver_of(driver) {
                driving.idle += 1;
            }
            return Next::Idle;
        };
        let (orders, receiver) = mpsc::unbounded_channel();
        state.apart.insert(key, Apart { wait: taken.id, orders });
        self.staff_line(&mut state);
        Next::Wait(Wait { key, taken, slice, orders: receiver })
    }

    /// Records that a wait session is not idle any more. Returns whether there is a key for it.
    fn stop_idling(&self, driver: u64) -> bool {
        let mut state = self.state();
        let has_work = state.table.first_in_line().is_some();
        let Some(driving) = state.driver_of(driver) else { return false };
        driving.idle -= 1;
        has_work && !(driving.opening && self.is_short())
    }

    /// Records that a wait session ends.
    fn ends_apart(self: &Arc<Self>, driver: u64, failed: bool) {
        let mut state = self.state();
        if let Some(driving) = state.driver_of(driver) {
            driving.wait_sessions -= 1;
            driving.failed = failed.then(Instant::now);
            // A key may have entered the line just when the session was about to end.
            self.staff_line(&mut state);
        }
    }

    /// Applies the effects of a change. Callers are notified before any other thread can see the change.
    fn settle(self: &Arc<Self>, state: &mut State) {
        while let Some(effect) = state.table.effects().pop_front() {
            // A failed send is ignored: a waiter that is being dropped checks for an answer itself.
            match effect {
                Effect::Granted(reply, session) => drop(reply.send(Outcome::Granted(session))),
                Effect::Refused(reply) => drop(reply.send(Outcome::Refused)),
                Effect::Deadlock(reply) => drop(reply.send(Outcome::Deadlock)),
                Effect::Released(reply, true) => drop(reply.send(Outcome::Released(Ok(())))),
                Effect::Released(reply, false) => drop(reply.send(Outcome::HandedOff)),
                Effect::Start(key, step) => {
                    let queue =
                        if step.releases() { &mut state.to_release } else { &mut state.to_do };
                    queue.push_back(key);
                    self.work.notify_one();
                }
                Effect::StartApart(key) => {
                    if let Some(taken) = state.table.take(key, false)
                        && let Some(apart) = state.apart.get(&key)
                    {
                        // A wait session that has just ended reports the loss itself.
                        apart.orders.send(taken).ok();
                    }
                }
                Effect::Abandon(key) => drop(state.apart.remove(&key)),
                Effect::Line => {
                    self.staff_line(state);
                    // The driver retries the key meanwhile.
                    self.work.notify_one();
                }
            }
        }
    }

    /// The number of wait sessions that are allowed now.
    fn most_sessions(&self, state: &State) -> u32 {
        let settled = state.settled(Instant::now());
        self.most_wait_sessions.saturating_add(settled).min(self.most_apart)
    }

    /// Wakes or starts a wait session for the next key in the line, if there is one.
    fn staff_line(self: &Arc<Self>, state: &mut State) {
        if state.table.first_in_line().is_none() {
            return;
        }
        let most = self.most_sessions(state);
        let Some(driving) = &mut state.driver else { return };
        let rests = driving.failed.is_some_and(|at| at.elapsed() < WAIT_SESSION_PAUSE);
        if driving.idle > 0 {
            self.line.notify_one();
        } else if driving.wait_sessions < most && !rests {
            driving.wait_sessions += 1;
            wait_session::start(self, &driving.runtime, driving.number);
        }
    }
}

/// The next task of a wait session.
enum Next {
    Wait(Wait),
    Idle,
    /// Another driver has taken over.
    Over,
}

/// A key that a wait session is to wait for.
struct Wait {
    key: KeyId,
    taken: Taken,
    slice: Duration,
    orders: mpsc::UnboundedReceiver<Taken>,
}

fn fail(waiters: Vec<Reply>, error: Option<&Error>) {
    for reply in waiters {
        if let Some(error) = error {
            drop(reply.send(Outcome::Failed(error.clone())));
        }
    }
}

fn report_loss(pending_releases: Vec<Reply>, loss: &Loss) {
    for reply in pending_releases {
        drop(reply.send(Outcome::Released(Err(loss.clone()))));
    }
}

#[cfg(test)]
mod threads;
