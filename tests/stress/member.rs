//! A task that acquires, holds and releases locks, in randomly chosen ways.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use pglock::{Lock, Mode, MultiLock, Result};

use crate::calls::{Ended, Interruption};
use crate::dice::Dice;
use crate::faults;
use crate::guard::Guard;
use crate::table::Owner;
use crate::world::{KEYS, World};

/// The limit of a call that does not wait for a lock.
pub(crate) const ANSWERED: Duration = Duration::from_secs(10);
/// The limit of a call that waits for a lock without a timeout. All holds are short.
const GRANTED: Duration = Duration::from_secs(40);
/// How long after its timeout a call may end on a busy machine.
const LATE: Duration = Duration::from_secs(10);

/// The kind of session that a handle is on.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Kind {
    /// The session of another guard.
    Child,
    /// The session of a manager. The number is that of the handle, which is an owner.
    Managed(u64),
    /// A session of its own.
    Own,
}

#[derive(Debug)]
pub(crate) struct Handle {
    pub(crate) lock: Lock,
    pub(crate) kind: Kind,
}

#[derive(Debug)]
pub(crate) struct Member {
    pub(crate) world: Arc<World>,
    pub(crate) dice: Dice,
    pub(crate) handles: Vec<Handle>,
}

/// Works with handles of its own until the run ends.
pub(crate) async fn run_alone(world: Arc<World>, mut dice: Dice) {
    let mut handles = Vec::new();
    for key in 0..KEYS {
        let number = i64::try_from(key).unwrap();
        let lock = Lock::new(&world.options.on(&world.pool).unwrap(), number);
        // A clone excludes the handle that it is made of.
        handles.push(Handle { lock: lock.clone(), kind: Kind::Own });
        handles.push(Handle { lock, kind: Kind::Own });
        let id = dice.below(u64::MAX);
        handles.push(Handle { lock: Lock::new(&world.manager(), number), kind: Kind::Managed(id) });
    }
    let mut member = Member { world, dice, handles };
    while member.world.goes_on() {
        member.cycle().await;
    }
}

impl Member {
    /// Acquires in some way, and holds what was acquired, or strikes with a fault.
    pub(crate) async fn cycle(&mut self) {
        if self.world.is_stormy() && self.dice.one_in(40) {
            return faults::strike(&self.world, &mut self.dice).await;
        }
        let place = self.dice.place(self.handles.len());
        if self.world.has("multi") && self.dice.one_in(8) {
            if let Some(guard) = self.acquire_several().await {
                let owner = Owner::Session(guard.backend_pid());
                self.hold(None, guard, owner).await;
            }
            return;
        }
        if let Some((guard, owner)) = self.acquire(place).await {
            self.hold(Some(place), guard, owner).await;
        }
    }

    /// Acquires one lock in any of the six ways.
    pub(crate) async fn acquire(&mut self, place: usize) -> Option<(Guard, Owner)> {
        let interruption = Interruption::any(&mut self.dice);
        let time = Duration::from_micros(self.dice.below(30_000));
        let way = self.dice.below(6);
        let (world, handle) = (&self.world, self.handles.get_mut(place)?);
        let (kind, lock) = (handle.kind, &mut handle.lock);
        let make = |verb, limit| {
            world.spend(verb);
            (verb, limit, interruption)
        };
        let guard = match way {
            0 => {
                let call = async { lock.acquire().await.map(Some) };
                acquired(world, make("acquire", GRANTED), call).await
            }
            1 => {
                let call = async { lock.acquire_shared().await.map(Some) };
                acquired(world, make("acquire_shared", GRANTED), call).await
            }
            2 => acquired(world, make("try_acquire", ANSWERED), lock.try_acquire()).await,
            3 => {
                let call = lock.try_acquire_shared();
                acquired(world, make("try_acquire_shared", ANSWERED), call).await
            }
            4 => {
                let call = lock.try_acquire_for(time);
                acquired(world, make("try_acquire_for", time + LATE), call).await
            }
            _ => {
                let call = lock.try_acquire_shared_for(time);
                acquired(world, make("try_acquire_shared_for", time + LATE), call).await
            }
        }?;
        let owner = match kind {
            Kind::Child | Kind::Own => Owner::Session(guard.backend_pid()),
            Kind::Managed(id) => Owner::Handle(id),
        };
        Some((guard, owner))
    }

    /// Acquires two locks or three at once, each in any mode.
    async fn acquire_several(&mut self) -> Option<Guard> {
        let interruption = Interruption::any(&mut self.dice);
        let time = Duration::from_micros(self.dice.below(30_000));
        let mut key = || i64::try_from(self.dice.below(KEYS)).unwrap();
        let (first, second, third) = (key(), key(), key());
        let mode = if self.dice.one_in(2) { Mode::Exclusive } else { Mode::Shared };
        let mut keys = vec![(first, Mode::Exclusive), (second, mode)];
        if self.dice.one_in(2) {
            keys.push((third, Mode::Shared));
        }
        let source = self.world.options.on(&self.world.pool).unwrap();
        let mut locks = MultiLock::with_modes(&source, keys);
        let way = self.dice.below(3);
        let world = &self.world;
        let make = |verb, limit| {
            world.spend(verb);
            (verb, limit, interruption)
        };
        match way {
            0 => {
                let call = async { locks.acquire().await.map(Some) };
                acquired(world, make("multi: acquire", GRANTED), call).await
            }
            1 => acquired(world, make("multi: try_acquire", ANSWERED), locks.try_acquire()).await,
            _ => {
                let call = locks.try_acquire_for(time);
                acquired(world, make("multi: try_acquire_for", time + LATE), call).await
            }
        }
    }

    /// Makes a call on a guard. Returns the output if the call succeeded.
    pub(crate) async fn ask<T>(
        &mut self,
        verb: &'static str,
        backend: i32,
        call: impl Future<Output = Result<T>>,
    ) -> Option<T> {
        let interruption = Interruption::any(&mut self.dice);
        self.ask_until(verb, backend, interruption, call).await
    }

    pub(crate) async fn ask_until<T>(
        &self,
        verb: &'static str,
        backend: i32,
        interruption: Interruption,
        call: impl Future<Output = Result<T>>,
    ) -> Option<T> {
        self.world.spend(verb);
        match self.world.calls.make(verb, ANSWERED, interruption, call).await {
            Ended::Returned(Ok(answer)) => Some(answer),
            Ended::Returned(Err(error)) => {
                self.world.check_error(verb, &error, Some(backend));
                None
            }
            Ended::Interrupted => {
                self.world.count(format!("{verb}: interrupted"));
                None
            }
            Ended::TooLate => {
                self.too_late(verb);
                None
            }
        }
    }

    pub(crate) fn too_late(&self, verb: &str) {
        let others = self.world.calls.describe();
        self.world.fail(format!("{verb} did not end in time; in flight besides: {others}"));
    }

    /// Releases a guard, in any way.
    pub(crate) async fn release(&mut self, guard: Guard) {
        let backend = guard.backend_pid();
        match self.dice.below(4) {
            0 => {
                self.world.spend("drop on a plain thread");
                drop(thread::spawn(move || drop(guard)));
            }
            1 => {
                self.world.spend("drop");
                drop(guard);
            }
            _ => {
                self.ask("release", backend, guard.release()).await;
            }
        }
    }
}

/// Makes a call that acquires. Returns the guard if the lock was granted.
async fn acquired<G: Into<Guard>>(
    world: &World,
    (verb, limit, interruption): (&'static str, Duration, Interruption),
    call: impl Future<Output = Result<Option<G>>>,
) -> Option<Guard> {
    let outcome = match world.calls.make(verb, limit, interruption, call).await {
        Ended::Returned(Ok(Some(guard))) => return Some(guard.into()),
        Ended::Returned(Ok(None)) => "busy",
        Ended::Returned(Err(error)) => {
            world.check_error(verb, &error, None);
            return None;
        }
        Ended::Interrupted => "interrupted",
        Ended::TooLate => {
            let others = world.calls.describe();
            world.fail(format!("{verb} did not end within {limit:?}; in flight besides: {others}"));
            return None;
        }
    };
    world.count(format!("{verb}: {outcome}"));
    None
}
