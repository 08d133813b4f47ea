//! Tasks that share a session: a parent's guard, and child handles made of it.

use std::sync::Arc;
use std::time::Duration;

use pglock::Lock;
use tokio::task::JoinSet;

use crate::calls::{Ended, Interruption};
use crate::dice::Dice;
use crate::member::{ANSWERED, Handle, Kind, Member};
use crate::world::{KEYS, World};

const MEMBERS: usize = 3;

/// Runs generations of tasks until the run ends. The tasks of a generation share a session.
pub(crate) async fn run(world: Arc<World>, number: u64, mut dice: Dice) {
    // The parent's key is free: only this family uses it.
    let key = i64::try_from(KEYS + number).unwrap();
    let mut parent = Lock::new(&world.options.on(&world.pool).unwrap(), key);
    while world.goes_on() {
        generation(&world, &mut parent, &mut dice).await;
    }
}

async fn generation(world: &Arc<World>, parent: &mut Lock, dice: &mut Dice) {
    let acquiring = parent.acquire();
    let make = world.calls.make("parent: acquire", ANSWERED, Interruption::Never, acquiring);
    let guard = match make.await {
        Ended::Returned(Ok(guard)) => guard,
        Ended::Returned(Err(error)) => {
            return world.check_error("parent: acquire", &error, None);
        }
        Ended::Interrupted | Ended::TooLate => {
            return world.fail("parent: acquire did not end in time".to_owned());
        }
    };
    let mut members = JoinSet::new();
    for _ in 0..MEMBERS {
        let child = |key| Handle {
            lock: Lock::new(&guard, i64::try_from(key).unwrap()),
            kind: Kind::Child,
        };
        let handles = (0..KEYS).map(child).collect();
        let own = Dice::new(dice.below(u64::MAX));
        let mut member = Member { world: Arc::clone(world), dice: own, handles };
        members.spawn(async move {
            for _ in 0..member.dice.below(20) {
                if member.world.goes_on() {
                    member.cycle().await;
                }
            }
        });
    }
    let backend = guard.backend_pid();
    // The parent's guard is released first, or last, or its handle is closed meanwhile.
    match dice.below(4) {
        0 => drop(guard),
        1 if world.has("close_parent") => {
            tokio::time::sleep(Duration::from_millis(dice.below(20))).await;
            world.spend("close_parent");
            let closing = parent.release_all();
            match world.calls.make("close_parent", ANSWERED, Interruption::Never, closing).await {
                Ended::Returned(Ok(())) | Ended::Interrupted => {}
                Ended::Returned(Err(error)) => {
                    world.check_error("close_parent", &error, Some(backend));
                }
                Ended::TooLate => world.fail(format!(
                    "close_parent did not end in time; in flight besides: {}",
                    world.calls.describe()
                )),
            }
            if !guard.is_lost() {
                world.fail("close_parent: the parent's guard is not lost".to_owned());
            }
        }
        _ => {
            join(world, &mut members).await;
            let release = guard.release();
            let ended = world.calls.make("parent: release", ANSWERED, Interruption::Never, release);
            match ended.await {
                Ended::Returned(Ok(())) | Ended::Interrupted => {}
                Ended::Returned(Err(error)) => {
                    world.check_error("parent: release", &error, Some(backend));
                }
                Ended::TooLate => world.fail("parent: release did not end in time".to_owned()),
            }
        }
    }
    join(world, &mut members).await;
}

async fn join(world: &World, members: &mut JoinSet<()>) {
    while let Some(ended) = members.join_next().await {
        if let Err(panic) = ended {
            world.fail(format!("a member ended early: {panic}"));
        }
    }
}
