//! Whatever is done in whatever order, the server holds what a small model of it says.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::env;
use std::time::Duration;

use pglock::{Error, ExclusiveGuard, Lock, Loss, Mode, SharedGuard};
use pglock_testkit::{TestDb, advisory_locks};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use sqlx::{PgConnection, PgPool};
use tokio::runtime::Builder;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

const KEYS: i64 = 3;
const HANDLES: usize = 6;
/// How many owners hold something at a time.
const SESSIONS: usize = 15;
/// How long a release by drop may take to reach the server.
const PATIENCE: Duration = Duration::from_secs(5);

/// One step of a program that uses locks. Numbers are taken modulo what there is.
#[derive(Clone, Debug)]
enum Step {
    /// Acquires through a handle, without patience or with a little.
    Acquire {
        handle: usize,
        mode: Mode,
        patient: bool,
    },
    /// Acquires in the knowledge that nobody is in the way, and so may wait without a limit.
    AcquireIfFree {
        handle: usize,
        mode: Mode,
    },
    /// Makes a handle a clone of another: a new owner. The guards of the old one live on.
    Clone {
        from: usize,
        to: usize,
    },
    /// Makes a new handle on another key.
    New {
        handle: usize,
        key: i64,
    },
    Close {
        handle: usize,
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
            .prop_map(|(handle, mode, patient)| Step::Acquire { handle, mode, patient }),
        3 => (handle.clone(), any_mode())
            .prop_map(|(handle, mode)| Step::AcquireIfFree { handle, mode }),
        1 => (handle.clone(), handle.clone()).prop_map(|(from, to)| Step::Clone { from, to }),
        1 => (handle.clone(), 0..KEYS).prop_map(|(handle, key)| Step::New { handle, key }),
        1 => handle.prop_map(|handle| Step::Close { handle }),
        3 => guard.prop_map(|guard| Step::Drop { guard }),
        3 => guard.prop_map(|guard| Step::Release { guard }),
    ]
}

/// An owner of locks: a handle, even after the variable that held it has got another.
type Owner = usize;

/// What the server should know: how many guards each owner has, of which key, in which mode.
#[derive(Debug, Default)]
struct Model {
    guards: BTreeMap<Owner, (i64, Vec<Mode>)>,
}

impl Model {
    /// PostgreSQL's rule: an owner never excludes itself; among owners only sharers are compatible.
    fn grants(&self, owner: Owner, key: i64, mode: Mode) -> bool {
        self.guards.iter().filter(|(other, (theirs, _))| **other != owner && *theirs == key).all(
            |(_, (_, modes))| {
                mode == Mode::Shared && modes.iter().all(|&held| held == Mode::Shared)
            },
        )
    }

    fn take(&mut self, owner: Owner, key: i64, mode: Mode) {
        self.guards.entry(owner).or_insert((key, Vec::new())).1.push(mode);
    }

    fn give_up(&mut self, owner: Owner, mode: Mode) {
        let Some((_, modes)) = self.guards.get_mut(&owner) else { return };
        let place = modes.iter().position(|&held| held == mode).unwrap();
        modes.swap_remove(place);
        if modes.is_empty() {
            self.guards.remove(&owner);
        }
    }

    /// The strongest mode in which each owner holds its key. (`Exclusive` sorts first.)
    fn strongest(&self) -> BTreeMap<(Owner, i64), Mode> {
        let strongest = |(&owner, (key, modes)): (&Owner, &(i64, Vec<Mode>))| {
            ((owner, *key), *modes.iter().min().unwrap())
        };
        self.guards.iter().map(strongest).collect()
    }
}

#[derive(Debug)]
enum Guard {
    Exclusive(ExclusiveGuard),
    Shared(SharedGuard),
}

impl Guard {
    fn mode(&self) -> Mode {
        match self {
            Self::Exclusive(_) => Mode::Exclusive,
            Self::Shared(_) => Mode::Shared,
        }
    }

    fn backend_pid(&self) -> i32 {
        match self {
            Self::Exclusive(guard) => guard.backend_pid(),
            Self::Shared(guard) => guard.backend_pid(),
        }
    }

    async fn release(self) -> pglock::Result<()> {
        match self {
            Self::Exclusive(guard) => guard.release().await,
            Self::Shared(guard) => guard.release().await,
        }
    }
}

fn exclusive(held: Option<ExclusiveGuard>) -> Option<Guard> {
    held.map(Guard::Exclusive)
}

fn shared(held: Option<SharedGuard>) -> Option<Guard> {
    held.map(Guard::Shared)
}

/// The program under test, beside its model.
struct Run {
    handles: Vec<(Owner, i64, Lock)>,
    guards: Vec<(Owner, Guard)>,
    /// The owners whose guards were closed under them.
    closed: Vec<Owner>,
    owners: usize,
    model: Model,
    pool: PgPool,
}

impl Run {
    fn new(pool: &PgPool) -> Self {
        let handle = |owner: Owner| {
            let key = i64::try_from(owner).unwrap() % KEYS;
            (owner, key, Lock::new(pool, key))
        };
        Self {
            handles: (0..HANDLES).map(handle).collect(),
            guards: Vec::new(),
            closed: Vec::new(),
            owners: HANDLES,
            model: Model::default(),
            pool: pool.clone(),
        }
    }

    #[expect(clippy::indexing_slicing, reason = "the steps know how many handles there are")]
    fn handle(&mut self, handle: usize) -> &mut (Owner, i64, Lock) {
        &mut self.handles[handle]
    }

    fn new_owner(&mut self) -> Owner {
        self.owners += 1;
        self.owners - 1
    }

    async fn step(&mut self, step: &Step) {
        match *step {
            // Each owner that holds something has a connection of the pool.
            Step::Acquire { .. } | Step::AcquireIfFree { .. }
                if self.model.guards.len() >= SESSIONS => {}
            Step::Acquire { handle, mode, patient } => self.acquire(handle, mode, patient).await,
            Step::AcquireIfFree { handle, mode } => self.acquire_if_free(handle, mode).await,
            Step::Clone { from, to } => {
                let owner = self.new_owner();
                let (_, key, lock) = self.handle(from);
                let clone = (owner, *key, lock.clone());
                *self.handle(to) = clone;
            }
            Step::New { handle, key } => {
                let new = (self.new_owner(), key, Lock::new(&self.pool, key));
                *self.handle(handle) = new;
            }
            Step::Close { handle } => {
                let (owner, _, lock) = self.handle(handle);
                let owner = *owner;
                lock.close().await.unwrap();
                if self.model.guards.remove(&owner).is_some() {
                    self.closed.push(owner);
                    // What the handle acquires from now on is not closed.
                    self.handle(handle).0 = self.new_owner();
                }
            }
            Step::Drop { guard } => {
                if let Some((owner, guard)) = self.take_guard(guard) {
                    self.model.give_up(owner, guard.mode());
                    drop(guard);
                }
            }
            Step::Release { guard } => {
                if let Some((owner, guard)) = self.take_guard(guard) {
                    self.model.give_up(owner, guard.mode());
                    let released = guard.release().await;
                    if self.closed.contains(&owner) {
                        let lost = released.unwrap_err();
                        assert!(
                            matches!(lost, Error::Lost { reason: Loss::Closed, .. }),
                            "a guard of a closed handle: {lost:?}"
                        );
                    } else {
                        released.unwrap();
                    }
                }
            }
        }
    }

    fn take_guard(&mut self, guard: usize) -> Option<(Owner, Guard)> {
        let index = guard.checked_rem(self.guards.len())?;
        Some(self.guards.swap_remove(index))
    }

    async fn acquire(&mut self, handle: usize, mode: Mode, patient: bool) {
        let &mut (owner, key, _) = self.handle(handle);
        let granted = self.model.grants(owner, key, mode);
        // A wait that is refused takes all its time, so it gets little.
        let patience = if granted { PATIENCE } else { Duration::from_millis(50) };
        let (_, _, lock) = self.handle(handle);
        let answer = match (mode, patient) {
            (Mode::Exclusive, false) => lock.try_acquire().await.map(exclusive),
            (Mode::Exclusive, true) => lock.try_acquire_for(patience).await.map(exclusive),
            (Mode::Shared, false) => lock.try_acquire_shared().await.map(shared),
            (Mode::Shared, true) => lock.try_acquire_shared_for(patience).await.map(shared),
        };
        let held = match answer {
            // So little that it may run out before the pool has lent a connection.
            Err(Error::Pool { .. }) if patient && !granted => None,
            answer => answer.unwrap(),
        };
        assert_eq!(held.is_some(), granted, "owner {owner} wants key {key} {mode}");
        if let Some(guard) = held {
            self.model.take(owner, key, mode);
            self.guards.push((owner, guard));
        }
    }

    async fn acquire_if_free(&mut self, handle: usize, mode: Mode) {
        let &mut (owner, key, _) = self.handle(handle);
        if !self.model.grants(owner, key, mode) {
            return;
        }
        let (_, _, lock) = self.handle(handle);
        let guard = match mode {
            Mode::Exclusive => Guard::Exclusive(lock.acquire().await.unwrap()),
            Mode::Shared => Guard::Shared(lock.acquire_shared().await.unwrap()),
        };
        self.model.take(owner, key, mode);
        self.guards.push((owner, guard));
    }

    /// The owner behind each backend that holds something; an owner has one, and shares it with nobody.
    fn owners(&self) -> HashMap<i32, Owner> {
        let mut owners = HashMap::new();
        let live = self.guards.iter().filter(|(owner, _)| !self.closed.contains(owner));
        for (owner, guard) in live {
            let known = *owners.entry(guard.backend_pid()).or_insert(*owner);
            assert_eq!(known, *owner, "two owners share a session");
        }
        owners
    }

    /// Waits until the server knows exactly what the model knows.
    async fn agrees_with_server(&self, admin: &mut PgConnection) {
        let expected = self.model.strongest();
        let owners = self.owners();
        assert_eq!(owners.len(), expected.len(), "an owner has two sessions");
        let started = Instant::now();
        loop {
            let mut found = BTreeMap::new();
            let mut unknown = Vec::new();
            for lock in advisory_locks(admin).await {
                let mode = match lock.mode.as_str() {
                    "ExclusiveLock" => Mode::Exclusive,
                    _ => Mode::Shared,
                };
                match owners.get(&lock.pid) {
                    Some(&owner) if lock.granted && lock.classid == 0 && lock.objsubid == 1 => {
                        let strongest = found.entry((owner, lock.objid)).or_insert(mode);
                        *strongest = mode.min(*strongest);
                    }
                    Some(_) | None => unknown.push(lock),
                }
            }
            if found == expected && unknown.is_empty() {
                return;
            }
            assert!(
                started.elapsed() < PATIENCE,
                "the server has {found:?} and {unknown:?}, the model {expected:?}"
            );
            sleep(Duration::from_millis(1)).await;
        }
    }
}

/// `PROPTEST_CASES` sets how many programs are tried.
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
            // What the last run has left goes away with it.
            run.agrees_with_server(&mut admin).await;
            for step in &steps {
                run.step(step).await;
                run.agrees_with_server(&mut admin).await;
            }
        });
        Ok(())
    });
    assert!(outcome.is_ok(), "{}", outcome.unwrap_err());

    // Every connection is in the pool again, and so none is broken or forgotten.
    runtime.block_on(async {
        let started = Instant::now();
        while pool.num_idle() != pool.size() as usize {
            assert!(started.elapsed() < PATIENCE, "{pool:?}");
            sleep(Duration::from_millis(1)).await;
        }
    });
}

/// The guards of a handle go in any order, on any thread, at the same time: the server agrees with
/// each of them that it was held to the end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn guards_of_one_handle_can_be_released_at_once() {
    let db = TestDb::new().await;
    let pool = db.pool(1).await;
    let mut lock = Lock::new(&pool, 42);
    for round in 0..1000 {
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
