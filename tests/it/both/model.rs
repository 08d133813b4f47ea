//! Whatever the order of calls, the server holds the locks that a small model of it predicts.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::env;
use std::time::Duration;

use pglock::{
    Error, ExclusiveGuard, Lock, Loss, Mode, MultiGuard, MultiLock, SharedGuard, Upgrade,
};
use pglock_testkit::{TestDb, advisory_locks};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use sqlx::{PgConnection, PgPool};
use tokio::runtime::Builder;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use super::{ALONE, new_lock};
use crate::support::rounds;

const KEYS: i64 = 3;
const HANDLES: usize = 6;
/// The number of handles on several keys.
const GROUPS: usize = 2;
/// The maximum number of owners that hold locks at a time.
const SESSIONS: usize = 15;
/// How long a release by drop may take to reach the server.
const TIMEOUT: Duration = Duration::from_secs(5);

/// One step of a program that uses locks. Indices are taken modulo the number of items.
#[derive(Clone, Debug)]
enum Step {
    /// Acquires through a handle, without waiting or with a short timeout.
    Acquire {
        handle: usize,
        mode: Mode,
        bounded: bool,
    },
    /// Acquires a lock that is free according to the model, and so may wait without a limit.
    AcquireIfFree {
        handle: usize,
        mode: Mode,
    },
    /// Replaces a handle by a clone of another, which is a new owner. The guards of the replaced handle stay alive.
    Clone {
        from: usize,
        to: usize,
    },
    /// Replaces a handle by a new one, on another key.
    New {
        handle: usize,
        key: i64,
    },
    /// Replaces a handle by one on the session of a guard.
    Beside {
        guard: usize,
        handle: usize,
        key: i64,
    },
    /// Makes a new handle on several keys.
    Group {
        group: usize,
        locks: Vec<(i64, Mode)>,
    },
    AcquireGroup {
        group: usize,
        bounded: bool,
    },
    Close {
        handle: usize,
    },
    CloseGroup {
        group: usize,
    },
    Downgrade {
        guard: usize,
    },
    Upgrade {
        guard: usize,
    },
    Drop {
        guard: usize,
    },
    Release {
        guard: usize,
    },
}

fn any_mode() -> impl Strategy<Value = Mode> {
    prop_oneof![Just(Mode::Exclusive), Just(Mode::Shared)]
}

fn any_step() -> impl Strategy<Value = Step> {
    let handle = 0..HANDLES;
    let guard = any::<usize>();
    prop_oneof![
        6 => (handle.clone(), any_mode(), prop::bool::weighted(0.2))
            .prop_map(|(handle, mode, bounded)| Step::Acquire { handle, mode, bounded }),
        3 => (handle.clone(), any_mode())
            .prop_map(|(handle, mode)| Step::AcquireIfFree { handle, mode }),
        1 => (handle.clone(), handle.clone()).prop_map(|(from, to)| Step::Clone { from, to }),
        1 => (handle.clone(), 0..KEYS).prop_map(|(handle, key)| Step::New { handle, key }),
        2 => (guard, handle.clone(), 0..KEYS)
            .prop_map(|(guard, handle, key)| Step::Beside { guard, handle, key }),
        1 => (0..GROUPS, vec((0..KEYS, any_mode()), 1..5))
            .prop_map(|(group, locks)| Step::Group { group, locks }),
        2 => (0..GROUPS, prop::bool::weighted(0.2))
            .prop_map(|(group, bounded)| Step::AcquireGroup { group, bounded }),
        1 => handle.prop_map(|handle| Step::Close { handle }),
        1 => (0..GROUPS).prop_map(|group| Step::CloseGroup { group }),
        1 => guard.prop_map(|guard| Step::Downgrade { guard }),
        2 => guard.prop_map(|guard| Step::Upgrade { guard }),
        3 => guard.prop_map(|guard| Step::Drop { guard }),
        3 => guard.prop_map(|guard| Step::Release { guard }),
    ]
}

/// An owner of locks: a handle, even after its variable was assigned another one; or several handles that share a
/// session.
type Owner = usize;

/// The expected state of the server: the guards of each owner, with their keys and modes.
#[derive(Debug, Default)]
struct Model {
    guards: BTreeMap<Owner, Vec<(i64, Mode)>>,
}

impl Model {
    /// PostgreSQL's rule: an owner never excludes itself; different owners are compatible only if both share.
    fn grants(&self, owner: Owner, wanted: &[(i64, Mode)]) -> bool {
        let others = self.guards.iter().filter(|(other, _)| **other != owner);
        others.flat_map(|(_, held)| held).all(|&(held, theirs)| {
            let sharers = |ours| ours == Mode::Shared && theirs == Mode::Shared;
            wanted.iter().all(|&(key, ours)| key != held || sharers(ours))
        })
    }

    fn take(&mut self, owner: Owner, locks: &[(i64, Mode)]) {
        self.guards.entry(owner).or_default().extend(locks);
    }

    fn give_up(&mut self, owner: Owner, locks: &[(i64, Mode)]) {
        let Some(held) = self.guards.get_mut(&owner) else { return };
        for lock in locks {
            let place = held.iter().position(|held| held == lock).unwrap();
            held.swap_remove(place);
        }
        if held.is_empty() {
            self.guards.remove(&owner);
        }
    }
}

#[derive(Debug)]
enum Guard {
    Exclusive(ExclusiveGuard),
    Shared(SharedGuard),
    Several(MultiGuard),
}

impl Guard {
    fn backend_pid(&self) -> i32 {
        match self {
            Self::Exclusive(guard) => guard.backend_pid(),
            Self::Shared(guard) => guard.backend_pid(),
            Self::Several(guard) => guard.backend_pid(),
        }
    }

    /// A handle on the guard's session. `None` for a guard of several locks.
    fn lock(&self, key: i64) -> Option<Lock> {
        match self {
            Self::Exclusive(guard) => Some(Lock::new(guard, key)),
            Self::Shared(guard) => Some(Lock::new(guard, key)),
            Self::Several(_) => None,
        }
    }

    async fn release(self) -> pglock::Result<()> {
        match self {
            Self::Exclusive(guard) => guard.release().await,
            Self::Shared(guard) => guard.release().await,
            Self::Several(guard) => guard.release().await,
        }
    }
}

fn exclusive(held: Option<ExclusiveGuard>) -> Option<Guard> {
    held.map(Guard::Exclusive)
}

fn shared(held: Option<SharedGuard>) -> Option<Guard> {
    held.map(Guard::Shared)
}

/// A handle, until it is closed.
type HandleId = usize;

/// A guard, its owner and handle, and the locks that it holds.
struct Hold {
    owner: Owner,
    handle: HandleId,
    locks: Vec<(i64, Mode)>,
    guard: Guard,
}

/// The program under test, beside its model.
struct Run {
    handles: Vec<(Owner, HandleId, i64, Lock)>,
    groups: Vec<(Owner, HandleId, MultiLock)>,
    holds: Vec<Hold>,
    /// The handles that were closed while guards of theirs lived.
    closed: Vec<HandleId>,
    owners: usize,
    model: Model,
    pool: PgPool,
}

impl Run {
    fn new(pool: &PgPool) -> Self {
        let handle = |owner: Owner| {
            let key = i64::try_from(owner).unwrap() % KEYS;
            (owner, owner, key, new_lock(pool, key))
        };
        let group = |group| {
            let id = HANDLES + group;
            (id, id, MultiLock::new(pool, [0, 1]))
        };
        Self {
            handles: (0..HANDLES).map(handle).collect(),
            groups: (0..GROUPS).map(group).collect(),
            holds: Vec::new(),
            closed: Vec::new(),
            owners: HANDLES + GROUPS,
            model: Model::default(),
            pool: pool.clone(),
        }
    }

    #[expect(clippy::indexing_slicing, reason = "the steps know how many handles there are")]
    fn handle(&mut self, handle: usize) -> &mut (Owner, HandleId, i64, Lock) {
        &mut self.handles[handle]
    }

    #[expect(clippy::indexing_slicing, reason = "the steps know how many groups there are")]
    fn group(&mut self, group: usize) -> &mut (Owner, HandleId, MultiLock) {
        &mut self.groups[group]
    }

    fn new_owner(&mut self) -> Owner {
        self.owners += 1;
        self.owners - 1
    }

    async fn step(&mut self, step: &Step) {
        match *step {
            // Each owner that holds a lock uses a connection of the pool.
            Step::Acquire { .. } | Step::AcquireIfFree { .. } | Step::AcquireGroup { .. }
                if self.model.guards.len() >= SESSIONS => {}
            Step::Acquire { handle, mode, bounded } => self.acquire(handle, mode, bounded).await,
            Step::AcquireIfFree { handle, mode } => self.acquire_if_free(handle, mode).await,
            Step::AcquireGroup { group, bounded } => self.acquire_group(group, bounded).await,
            Step::Clone { from, to } => {
                let owner = self.new_owner();
                let (_, _, key, lock) = self.handle(from);
                let clone = (owner, owner, *key, lock.clone());
                *self.handle(to) = clone;
            }
            Step::New { handle, key } => {
                let owner = self.new_owner();
                *self.handle(handle) = (owner, owner, key, new_lock(&self.pool, key));
            }
            Step::Beside { guard, handle, key } => {
                let index = guard.checked_rem(self.holds.len());
                let hold = index.and_then(|index| self.holds.get(index));
                let Some(&Hold { owner, handle: of, ref guard, .. }) = hold else { return };
                // The session of a closed guard may have ended.
                if !self.closed.contains(&of)
                    && let Some(lock) = guard.lock(key)
                {
                    let id = self.new_owner();
                    // The handles of a session that a manager shares are not one owner.
                    let owner = if ALONE { owner } else { id };
                    *self.handle(handle) = (owner, id, key, lock);
                }
            }
            Step::Group { group, ref locks } => {
                let several = MultiLock::with_modes(&self.pool, locks.iter().copied());
                let owner = self.new_owner();
                *self.group(group) = (owner, owner, several);
            }
            Step::Close { handle } => {
                let (_, id, _, lock) = self.handle(handle);
                let id = *id;
                lock.release_all().await.unwrap();
                self.was_closed(id);
                // Locks that the handle acquires from now on are not closed.
                let id = self.new_owner();
                self.handle(handle).1 = id;
                if !ALONE {
                    self.handle(handle).0 = id;
                }
            }
            Step::CloseGroup { group } => {
                let (_, id, several) = self.group(group);
                let id = *id;
                several.release_all().await.unwrap();
                self.was_closed(id);
                self.group(group).1 = self.new_owner();
            }
            Step::Downgrade { guard } => self.downgrade(guard).await,
            Step::Upgrade { guard } => self.upgrade(guard).await,
            Step::Drop { guard } => {
                if let Some(hold) = self.take_hold(guard) {
                    drop(hold.guard);
                }
            }
            Step::Release { guard } => {
                if let Some(Hold { handle, guard, .. }) = self.take_hold(guard) {
                    let released = guard.release().await;
                    self.is_reported_correctly(handle, released);
                }
            }
        }
        self.part_handles();
    }

    /// Removes a guard from the program under test and from the model.
    fn take_hold(&mut self, guard: usize) -> Option<Hold> {
        let index = guard.checked_rem(self.holds.len())?;
        let hold = self.holds.swap_remove(index);
        if !self.closed.contains(&hold.handle) {
            self.model.give_up(hold.owner, &hold.locks);
        }
        Some(hold)
    }

    fn hold(&mut self, hold: Hold) {
        self.model.take(hold.owner, &hold.locks);
        self.holds.push(hold);
    }

    /// Closing a handle releases the locks that it holds, and no lock of other handles on the session.
    fn was_closed(&mut self, handle: HandleId) {
        for hold in self.holds.iter().filter(|hold| hold.handle == handle) {
            self.model.give_up(hold.owner, &hold.locks);
        }
        self.closed.push(handle);
    }

    /// A session that no guard needs any more ends sooner or later, and its handles then become separate owners. In the
    /// model, they do so at once.
    fn part_handles(&mut self) {
        let mut seen = Vec::new();
        for (owner, id, _, lock) in &mut self.handles {
            if !self.model.guards.contains_key(owner) {
                if seen.contains(owner) {
                    *lock = lock.clone();
                    self.owners += 1;
                    *owner = self.owners - 1;
                    *id = *owner;
                }
                seen.push(*owner);
            }
        }
    }

    /// A guard reports that its owner was closed, and no other loss.
    fn is_reported_correctly<T: std::fmt::Debug>(
        &self,
        handle: HandleId,
        answer: pglock::Result<T>,
    ) -> Option<T> {
        if !self.closed.contains(&handle) {
            return Some(answer.unwrap());
        }
        let lost = answer.unwrap_err();
        assert!(
            matches!(lost, Error::Lost { reason: Loss::Released, .. }),
            "a guard of a closed handle: {lost:?}"
        );
        None
    }

    async fn downgrade(&mut self, guard: usize) {
        let Some(Hold { owner, handle, locks, guard }) = self.take_hold(guard) else { return };
        let Guard::Exclusive(exclusive) = guard else {
            return self.put_back(Hold { owner, handle, locks, guard });
        };
        let pid = exclusive.backend_pid();
        let answer = exclusive.downgrade().await;
        if let Some(shared) = self.is_reported_correctly(handle, answer) {
            assert_eq!(shared.backend_pid(), pid);
            let locks = locks.iter().map(|&(key, _)| (key, Mode::Shared)).collect();
            self.hold(Hold { owner, handle, locks, guard: Guard::Shared(shared) });
        }
    }

    async fn upgrade(&mut self, guard: usize) {
        let Some(Hold { owner, handle, locks, guard }) = self.take_hold(guard) else { return };
        let Guard::Shared(shared) = guard else {
            return self.put_back(Hold { owner, handle, locks, guard });
        };
        let pid = shared.backend_pid();
        let wanted: Vec<_> = locks.iter().map(|&(key, _)| (key, Mode::Exclusive)).collect();
        let granted = self.model.grants(owner, &wanted);
        let answer = shared.try_upgrade().await;
        match self.is_reported_correctly(handle, answer) {
            Some(Upgrade::Upgraded(exclusive)) => {
                assert!(granted, "owner {owner} wants more of {locks:?}");
                assert_eq!(exclusive.backend_pid(), pid);
                self.hold(Hold {
                    owner,
                    handle,
                    locks: wanted,
                    guard: Guard::Exclusive(exclusive),
                });
            }
            Some(Upgrade::Refused(shared)) => {
                assert!(!granted, "owner {owner} is refused more of {locks:?}");
                self.hold(Hold { owner, handle, locks, guard: Guard::Shared(shared) });
            }
            None => {}
        }
    }

    /// Puts a guard back with which nothing was done.
    fn put_back(&mut self, hold: Hold) {
        if self.closed.contains(&hold.handle) {
            self.holds.push(hold);
        } else {
            self.hold(hold);
        }
    }

    async fn acquire(&mut self, handle: usize, mode: Mode, bounded: bool) {
        let &mut (owner, id, key, _) = self.handle(handle);
        let granted = self.model.grants(owner, &[(key, mode)]);
        let limit = limit(granted);
        let (_, _, _, lock) = self.handle(handle);
        let answer = match (mode, bounded) {
            (Mode::Exclusive, false) => lock.try_acquire().await.map(exclusive),
            (Mode::Exclusive, true) => lock.try_acquire_for(limit).await.map(exclusive),
            (Mode::Shared, false) => lock.try_acquire_shared().await.map(shared),
            (Mode::Shared, true) => lock.try_acquire_shared_for(limit).await.map(shared),
        };
        let held = unless_timed_out(answer, bounded && !granted);
        assert_eq!(held.is_some(), granted, "owner {owner} wants key {key} {mode}");
        if let Some(guard) = held {
            self.hold(Hold { owner, handle: id, locks: vec![(key, mode)], guard });
        }
    }

    async fn acquire_group(&mut self, group: usize, bounded: bool) {
        let (owner, id, several) = self.group(group);
        let (owner, id) = (*owner, *id);
        let number = |key: &pglock::Key| key.to_string().parse().unwrap();
        let locks: Vec<(i64, Mode)> =
            several.keys().map(|(key, mode)| (number(key), mode)).collect();
        let granted = self.model.grants(owner, &locks);
        let (_, _, several) = self.group(group);
        let answer = if bounded {
            several.try_acquire_for(limit(granted)).await
        } else {
            several.try_acquire().await
        };
        let answer = answer.map(|held| held.map(Guard::Several));
        let held = unless_timed_out(answer, bounded && !granted);
        assert_eq!(held.is_some(), granted, "owner {owner} wants {locks:?}");
        if let Some(guard) = held {
            self.hold(Hold { owner, handle: id, locks, guard });
        }
    }

    async fn acquire_if_free(&mut self, handle: usize, mode: Mode) {
        let &mut (owner, id, key, _) = self.handle(handle);
        if !self.model.grants(owner, &[(key, mode)]) {
            return;
        }
        let (_, _, _, lock) = self.handle(handle);
        let guard = match mode {
            Mode::Exclusive => Guard::Exclusive(lock.acquire().await.unwrap()),
            Mode::Shared => Guard::Shared(lock.acquire_shared().await.unwrap()),
        };
        self.hold(Hold { owner, handle: id, locks: vec![(key, mode)], guard });
    }

    /// The strongest mode in which each session should hold each key. (`Exclusive` sorts first.)
    fn expected(&self) -> BTreeMap<(i32, i64), Mode> {
        let mut strongest = BTreeMap::new();
        for hold in &self.holds {
            if !self.closed.contains(&hold.handle) {
                for &(key, mode) in &hold.locks {
                    let known = strongest.entry((hold.guard.backend_pid(), key)).or_insert(mode);
                    *known = mode.min(*known);
                }
            }
        }
        strongest
    }

    /// For locks with a session of their own, each owner has exactly one session, which no other owner shares.
    fn each_has_a_session(&self) {
        let mut sessions = BTreeMap::new();
        for hold in self.holds.iter().filter(|hold| !self.closed.contains(&hold.handle)) {
            let owner = *sessions.entry(hold.guard.backend_pid()).or_insert(hold.owner);
            assert_eq!(owner, hold.owner, "two owners share a session");
        }
        assert_eq!(sessions.len(), self.model.guards.len(), "an owner has two sessions");
    }

    /// Waits until the server holds exactly the locks of the model.
    async fn agrees_with_server(&self, admin: &mut PgConnection) {
        if ALONE {
            self.each_has_a_session();
        }
        let expected = self.expected();
        let started = Instant::now();
        loop {
            let mut found = BTreeMap::new();
            let mut unknown = Vec::new();
            for lock in advisory_locks(admin).await {
                let mode = match lock.mode.as_str() {
                    "ExclusiveLock" => Mode::Exclusive,
                    _ => Mode::Shared,
                };
                if lock.granted && lock.classid == 0 && lock.objsubid == 1 {
                    let strongest = found.entry((lock.pid, lock.objid)).or_insert(mode);
                    *strongest = mode.min(*strongest);
                } else {
                    unknown.push(lock);
                }
            }
            if found == expected && unknown.is_empty() {
                return;
            }
            assert!(
                started.elapsed() < TIMEOUT,
                "the server has {found:?} and {unknown:?}, the model {expected:?}"
            );
            sleep(Duration::from_millis(1)).await;
        }
    }
}

/// A wait that is refused takes all its time, so its limit is short.
fn limit(granted: bool) -> Duration {
    if granted { TIMEOUT } else { Duration::from_millis(50) }
}

/// A hasty call has a timeout so short that it may pass before the pool has returned a connection or the server has
/// answered.
fn unless_timed_out(answer: pglock::Result<Option<Guard>>, hasty: bool) -> Option<Guard> {
    match answer {
        Err(Error::PoolTimedOut { .. } | Error::Connect { .. } | Error::Disconnected { .. })
            if hasty =>
        {
            None
        }
        // An owner that shares a lock through a manager and upgrades it does not wait for other processes.
        Err(Error::Deadlock { .. }) if hasty && !ALONE => None,
        answer => answer.unwrap(),
    }
}

/// `PROPTEST_CASES` sets the number of programs to test.
#[test]
fn the_server_agrees_with_the_model_after_every_step() {
    let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let db = runtime.block_on(TestDb::new());
    let pool = runtime.block_on(db.pool(20));
    let admin = RefCell::new(runtime.block_on(db.admin()));
    let mut config =
        Config { failure_persistence: None, max_shrink_time: 30_000, ..Config::default() };
    if env::var_os("PROPTEST_CASES").is_none() {
        config.cases = 64;
    }
    let outcome = TestRunner::new(config).run(&vec(any_step(), 1..60), |steps| {
        let mut admin = admin.borrow_mut();
        runtime.block_on(async {
            let mut run = Run::new(&pool);
            // The locks that the last run has left are released when it is dropped.
            run.agrees_with_server(&mut admin).await;
            for step in &steps {
                run.step(step).await;
                run.agrees_with_server(&mut admin).await;
            }
        });
        Ok(())
    });
    assert!(outcome.is_ok(), "{}", outcome.unwrap_err());

    // Every connection is in the pool again, so none is broken or leaked.
    runtime.block_on(async {
        let started = Instant::now();
        while pool.num_idle() != pool.size() as usize {
            assert!(started.elapsed() < TIMEOUT, "{pool:?}");
            sleep(Duration::from_millis(1)).await;
        }
    });
}

/// The guards of a handle are released in any order, on any thread, at the same time. The server confirms for each
/// guard that its lock was held to the end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn guards_of_one_handle_can_be_released_at_once() {
    let (_db, pool) = TestDb::with_pool(1).await;
    let mut lock = new_lock(&pool, 42);
    for round in 0..rounds(1000) {
        let exclusive = lock.acquire().await.unwrap();
        let shared = lock.acquire_shared().await.unwrap();
        let mut releases = JoinSet::new();
        releases.spawn(exclusive.release());
        releases.spawn(shared.release());
        for released in releases.join_all().await {
            assert!(released.is_ok(), "round {round}: {released:?}");
        }
    }
}
