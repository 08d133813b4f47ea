//! Many locks on few connections: a process holds all that is free on one session.

mod batch;
#[cfg(not(test))]
mod dedicated;
mod managed;
mod shared;
mod table;

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
#[cfg(not(test))]
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

#[cfg(test)]
use shuttle::sync::{Mutex, MutexGuard};
use sqlx::PgPool;
use tokio::sync::{Notify, mpsc, oneshot};

use crate::error::{Error, Loss};
use crate::key::{Key, KeyId};
use crate::lock::Lock;
use crate::options::LockOptions;
use crate::owner::Owner;
use crate::session::Session;
use crate::session::ledger::Modes;
use batch::Batch;
pub(crate) use managed::{Farewell, Managed};
use table::{Bound, Effect, OwnerId, Seat, Step, Table, Taken};
#[cfg(test)]
use threads::dedicated;

/// A lock is passed on inside the process this often, and for this long, before others get their turn.
const BOUND: Bound = Bound { count: 100, time: Duration::from_millis(10) };

/// Makes locks that share a connection.
///
/// A [`Lock`] from [`Lock::new`] uses a connection of the pool while it is held or waited for.
/// The locks of a manager share one connection: a thousand held locks, or a hundred thousand, are one
/// connection. They are the same [`Lock`] and the same guards, and exclude all other locks on the
/// same keys.
///
/// * Concurrent requests of many tasks travel in one statement.
/// * Tasks of one process that want the same key queue in the process, in FIFO order, and hand it on without
///   a round trip: at most 100 times, and for 10 ms. Then the key goes back to the server's queue, so
///   that other processes get their turn.
/// * The shared session never waits. For a key that another session holds, the manager waits on a separate
///   connection, one for the key however many tasks want it, which then holds the key.
///
/// So a process needs one connection for all uncontended locks, and one more for each key that it
/// waits for, or acquired by waiting. The shared connection goes back to the pool after a second without a
/// lock, and immediately when the pool is closed and the last guard was dropped.
///
/// # What is different
///
/// * [`connection`](crate::ExclusiveGuard::connection) returns [`Error::SharedSession`], because the guard has
///   no connection of its own.
/// * A loss of the shared session is a loss of all locks on it; every guard reports it.
/// * [`release`](crate::ExclusiveGuard::release) sends a statement only if the lock leaves the process. A lock
///   that is handed on inside, or that other guards share, is released when the next one has it.
/// * The unlock of a dropped guard is sent by the manager's task, so the runtime must be driven. If it is
///   not, the lock is held until the connection closes.
/// * A handle that holds a lock shared, and acquires it exclusively, is granted it if no other handle shares
///   it. It waits for other handles of the process; if another process shares the lock, the result is
///   [`Error::Deadlock`].
/// * The server's deadlock detection sees the process, not its tasks: two tasks that acquire two keys in
///   opposite order deadlock without being detected, as with two mutexes.
/// * Elections, several keys at once ([`MultiLock`](crate::MultiLock)) and permits
///   ([`Semaphore`](crate::Semaphore)) use a session of their own.
///
/// # Sent to the server
///
/// One prepared statement for up to 1,000 keys that are acquired or released at once; nothing for a
/// lock that is passed on in the process.
///
/// # Examples
///
/// ```
/// use pglock::LockManager;
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
/// # let pool = pglock_testkit::pool().await;
/// let manager = LockManager::new(&pool);
/// let mut guards = Vec::new();
/// for invoice in 0..100 {
///     guards.push(manager.lock(invoice).acquire().await?);
/// }
/// assert!(guards.iter().all(|guard| guard.backend_pid() == guards[0].backend_pid()));
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct LockManager {
    manager: Arc<Manager>,
}

impl LockManager {
    /// Makes a manager with the default options. Sends nothing.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::LockManager;
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// let manager = LockManager::new(&pool);
    /// let _guard = manager.lock("invoice-17").acquire().await?;
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn new(pool: &PgPool) -> Self {
        Self::with_options(pool, LockOptions::new())
    }

    pub(crate) fn with_options(pool: &PgPool, options: LockOptions) -> Self {
        Self { manager: Arc::new(Manager::new(pool, options)) }
    }

    /// Makes a handle for a lock, which shares the manager's connection. Sends nothing.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::LockManager;
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// let manager = LockManager::new(&pool);
    /// let mut lock = manager.lock((17, 4));
    /// let mut other = manager.lock((17, 4));
    ///
    /// let _guard = lock.acquire().await?;
    /// assert!(other.try_acquire().await?.is_none());
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn lock(&self, key: impl Into<Key>) -> Lock {
        let manager = &self.manager;
        let owner = Owner::new(&manager.pool, manager.options.clone());
        Lock::with_owner(key.into(), owner.managed_by(Managed::new(manager)))
    }
}

impl fmt::Debug for LockManager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LockManager")
            .field("options", &self.manager.options)
            .finish_non_exhaustive()
    }
}

/// What a manager's handles and guards have in common.
pub(crate) struct Manager {
    pool: PgPool,
    options: LockOptions,
    state: Mutex<State>,
    /// There are steps to take for the shared session.
    work: Notify,
    owners: AtomicU64,
}

struct State {
    table: Table<Place, Tell>,
    /// Keys with a step to take on the shared session. Some may have been called off.
    to_do: VecDeque<KeyId>,
    /// Who waits for a key on a session of its own, or holds it there.
    dedicated: HashMap<KeyId, mpsc::UnboundedSender<Taken>>,
    /// Somebody takes the steps.
    driven: bool,
    /// He opens the session, so that the server was asked for nothing yet.
    opening: bool,
    /// What [`effects`](Self::effects) gives out, so that it need not be allocated each time.
    spare: Vec<Effect<Place, Tell>>,
}

impl State {
    /// What follows from a change is written here, and goes to [`Manager::settle`].
    fn effects(&mut self) -> Vec<Effect<Place, Tell>> {
        std::mem::take(&mut self.spare)
    }
}

/// A session on which the manager holds something.
#[derive(Clone)]
struct Place {
    session: Arc<Session>,
    shared: bool,
}

/// How somebody is told how it went.
type Tell = oneshot::Sender<Told>;

/// How it went.
enum Told {
    Granted(Place),
    Refused,
    Deadlock,
    Released(Result<(), Loss>),
    Failed(Arc<Error>),
}

impl Seat for Place {
    fn is_shared(&self) -> bool {
        self.shared
    }
}

impl PartialEq for Place {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.session, &other.session)
    }
}

impl Manager {
    fn new(pool: &PgPool, options: LockOptions) -> Self {
        let state = State {
            table: Table::new(BOUND),
            to_do: VecDeque::new(),
            dedicated: HashMap::new(),
            driven: false,
            opening: false,
            spare: Vec::new(),
        };
        Self {
            pool: pool.clone(),
            options,
            state: Mutex::new(state),
            work: Notify::new(),
            owners: AtomicU64::new(0),
        }
    }

    fn next_owner(&self) -> OwnerId {
        self.owners.fetch_add(1, Ordering::Relaxed)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The steps that are to be taken on the shared session.
    fn next_batch(&self) -> Batch {
        let mut batch = Batch::default();
        let mut state = self.state();
        while !batch.is_full()
            && let Some(key) = state.to_do.pop_front()
        {
            if let Some(taken) = state.table.take_for_shared(key) {
                batch.add(key, taken);
            }
        }
        batch
    }

    /// A step was taken. Returns whether it still counted.
    fn taken(self: &Arc<Self>, key: KeyId, id: u64, place: &Place, yes: bool) -> bool {
        let mut state = self.state();
        let mut effects = state.effects();
        let counted = state.table.taken(key, id, (place, yes), Instant::now(), &mut effects);
        self.settle(&mut state, effects);
        counted
    }

    /// Many steps were taken, and the state is asked for once, as all who are told will want it.
    fn all_taken(self: &Arc<Self>, place: &Place, steps: impl Iterator<Item = (KeyId, u64, bool)>) {
        let now = Instant::now();
        let mut state = self.state();
        let mut effects = state.effects();
        for (key, id, yes) in steps {
            state.table.taken(key, id, (place, yes), now, &mut effects);
        }
        self.settle(&mut state, effects);
    }

    /// A step failed. Tells who waited for it; without an error they ask again.
    fn failed(&self, key: KeyId, id: u64, error: Option<&Arc<Error>>) {
        let mut state = self.state();
        let waiters = state.table.failed(key, id);
        if waiters.is_some() {
            state.dedicated.remove(&key);
        }
        for tell in waiters.into_iter().flatten() {
            if let Some(error) = error {
                drop(tell.send(Told::Failed(Arc::clone(error))));
            }
        }
        self.rest_if_empty(&state);
    }

    /// This is what the server has granted, after a step that failed half-way.
    fn corrected(self: &Arc<Self>, key: KeyId, place: &Place, server: Modes) {
        let mut state = self.state();
        let mut effects = state.effects();
        state.table.corrected(key, (place, server), Instant::now(), &mut effects);
        self.settle(&mut state, effects);
    }

    /// A key was given up that had a session of its own.
    fn gave_up(self: &Arc<Self>, key: KeyId, id: u64, place: &Place) {
        let mut state = self.state();
        let mut effects = state.effects();
        if state.table.is_seated(key, place) {
            state.dedicated.remove(&key);
        }
        state.table.taken(key, id, (place, true), Instant::now(), &mut effects);
        self.settle(&mut state, effects);
        self.rest_if_empty(&state);
    }

    /// A session was lost, and with it all that was held there.
    fn lost(self: &Arc<Self>, place: &Place, loss: &Loss) {
        let mut state = self.state();
        let mut effects = state.effects();
        let farewells = state.table.lost(place, Instant::now(), &mut effects);
        self.tell_lost(&mut state, effects, farewells, loss);
    }

    /// The same for a key that had a session of its own.
    fn lost_key(self: &Arc<Self>, key: KeyId, place: &Place, loss: &Loss) {
        let mut state = self.state();
        let mut effects = state.effects();
        if state.table.is_seated(key, place) {
            state.dedicated.remove(&key);
        }
        let farewells = state.table.lost_key(key, place, Instant::now(), &mut effects);
        self.tell_lost(&mut state, effects, farewells, loss);
        self.rest_if_empty(&state);
    }

    /// Lets the driver end if nobody needs anything. Returns whether it may.
    fn retire(&self) -> bool {
        let mut state = self.state();
        state.driven = !state.table.is_empty();
        !state.driven
    }

    /// Lets the driver see that nobody needs it any more, where that was not its own doing.
    fn rest_if_empty(&self, state: &State) {
        if state.table.is_empty() {
            self.work.notify_one();
        }
    }

    fn tell_lost(
        self: &Arc<Self>,
        state: &mut State,
        effects: Vec<Effect<Place, Tell>>,
        farewells: Vec<Tell>,
        loss: &Loss,
    ) {
        for tell in farewells {
            drop(tell.send(Told::Released(Err(loss.clone()))));
        }
        self.settle(state, effects);
    }

    /// Does what follows from a change. Whoever is told, is told before anybody can see the change.
    fn settle(self: &Arc<Self>, state: &mut State, mut effects: Vec<Effect<Place, Tell>>) {
        for effect in effects.drain(..) {
            // Who has gone meanwhile, looks himself whether he was told.
            match effect {
                Effect::Granted(tell, place) => drop(tell.send(Told::Granted(place))),
                Effect::Refused(tell) => drop(tell.send(Told::Refused)),
                Effect::Deadlock(tell) => drop(tell.send(Told::Deadlock)),
                Effect::Released(tell) => drop(tell.send(Told::Released(Ok(())))),
                Effect::Start(key) => {
                    state.to_do.push_back(key);
                    self.work.notify_one();
                }
                Effect::StartApart(key) => self.start_apart(state, key),
                Effect::Abandon(key) => drop(state.dedicated.remove(&key)),
            }
        }
        state.spare = effects;
    }

    fn start_apart(self: &Arc<Self>, state: &mut State, key: KeyId) {
        let Some(taken) = state.table.take_apart(key) else { return };
        if let Step::Wait(mode) = taken.step {
            let orders = dedicated::start(self, key, taken.id, mode);
            state.dedicated.insert(key, orders);
        } else if let Some(orders) = state.dedicated.get(&key) {
            // If it has just gone, it says itself that the session is lost.
            orders.send(taken).ok();
        }
    }
}

#[cfg(test)]
mod threads;
