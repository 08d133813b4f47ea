//! Tests the table against a simulated server: in random histories, and step by step.

mod model;
mod turns;

use std::collections::HashSet;

use pglock_testkit::amount;
use proptest::prelude::*;

use self::model::{Act, Session, World, act};
use super::{Effect, Left, Modes, Step, Table, Taken, Want};
use crate::key::KeyId;
use crate::metrics::Waiting;
use crate::mode::Mode;

proptest! {
    #![proptest_config(ProptestConfig {
        cases: amount(1_000, 3_000),
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn holds_what_it_grants_and_leaves_no_waiter(acts in prop::collection::vec(act(), 0..80)) {
        let mut world = World::new();
        for act in acts {
            world.act(act);
        }
        world.finish();
    }
}

/// A key that was handed off the maximum number of times is renewed, so that other processes get their turn.
#[test]
fn others_get_their_turn() {
    let mut world = World::new();
    for owner in 0..5 {
        world.act(Act::Want { owner, key: 1, mode: Mode::Exclusive, waits: true });
    }
    let mut steps = Vec::new();
    for _ in 0..20 {
        steps.extend(world.in_flight.iter().map(|(_, taken, _)| taken.step));
        world.act(Act::Answer);
        world.act(Act::Leave { which: 0 });
    }
    let steps: HashSet<String> = steps.iter().map(|step| format!("{step:?}")).collect();
    assert!(steps.contains("Renew(Exclusive)"), "{steps:?}");
    world.finish();
}

const KEY: KeyId = KeyId::BigInt(1);
const SHARED_SESSION: Session = Session(0);

/// Takes the step for [`KEY`].
fn take(world: &mut World) -> Taken {
    world.table.take(KEY, true).unwrap()
}

/// Takes out the effects of changes.
fn effects(world: &mut World) -> Vec<Effect<Session, u64>> {
    std::mem::take(world.table.effects()).into()
}

/// A world in which these owners share [`KEY`].
fn shared_by(owners: usize) -> World {
    let mut world = World::new();
    for owner in 0..owners {
        world.act(Act::Want { owner, key: 1, mode: Mode::Shared, waits: true });
    }
    world.act(Act::Answer);
    world
}

/// An owner that shares a lock and tries to upgrade it gets it only if no other owner shares it.
#[test]
fn an_upgrade_is_tried_by_the_only_holder() {
    for sharers in [1, 2] {
        let mut world = shared_by(sharers);
        let wanted = (Mode::Exclusive, false);
        let want = world.table.want(KEY, 0, wanted, || (99, Waiting::default()), world.now);
        if sharers == 1 {
            assert!(matches!(want, Want::Queued(_)), "{want:?}");
            assert_eq!(take(&mut world).step, Step::Upgrade);
        } else {
            assert_eq!((want, effects(&mut world)), (Want::Busy, vec![]));
        }
    }
}

/// A request that does not wait is refused at once if asking the server is of no use, and only then.
#[test]
fn a_try_behind_a_waiter_returns_at_once() {
    use Mode::{Exclusive, Shared};
    const BUSY: Option<Want<Session>> = Some(Want::Busy);
    const GRANTED: Option<Want<Session>> = Some(Want::Granted(SHARED_SESSION));
    const ASKED: Option<Want<Session>> = None;

    let wanted = |mode| {
        let mut world = World::new();
        world.act(Act::Want { owner: 0, key: 1, mode, waits: true });
        world
    };
    let held = |mode| {
        let mut world = wanted(mode);
        world.act(Act::Answer);
        world
    };
    let awaited = |mode| {
        let mut world = World::new();
        world.act(Act::Others { key: 1, mode: Some(Exclusive) });
        world.act(Act::Want { owner: 0, key: 1, mode, waits: true });
        world.act(Act::Answer);
        world
    };
    // Another process was seen waiting for a lock that is shared.
    let draining = || {
        let mut world = shared_by(3);
        world.act(Act::Others { key: 1, mode: Some(Shared) });
        world.act(Act::Want { owner: 3, key: 1, mode: Shared, waits: true });
        world.act(Act::Answer);
        world.act(Act::Cancel { which: 0 });
        world
    };
    let closed = || {
        let mut world = draining();
        for _ in 0..3 {
            world.act(Act::Leave { which: 0 });
        }
        world
    };
    let cases = [
        ("no owner", World::new(), ASKED, ASKED),
        ("a waiter for a shared lock", wanted(Shared), BUSY, ASKED),
        ("a waiter for an exclusive lock", wanted(Exclusive), BUSY, BUSY),
        ("a shared holder", held(Shared), BUSY, GRANTED),
        ("an exclusive holder", held(Exclusive), BUSY, BUSY),
        ("a waiter on the server for a shared lock", awaited(Shared), BUSY, BUSY),
        ("a waiter on the server for an exclusive lock", awaited(Exclusive), BUSY, BUSY),
        ("shared holders while others wait", draining(), BUSY, BUSY),
        ("the release of the last of those", closed(), ASKED, ASKED),
    ];
    for (who, world, exclusive, shared) in cases {
        // A request in one mode must not block the other.
        let modes = if shared == GRANTED { [Exclusive, Shared] } else { [Shared, Exclusive] };
        let mut table = world.table;
        for mode in modes {
            let expected = if mode == Exclusive { &exclusive } else { &shared };
            let want = table.want(KEY, 9, (mode, false), || (99, Waiting::default()), world.now);
            if let Some(expected) = expected {
                assert_eq!(want, *expected, "{mode:?} behind {who}");
            } else {
                let Want::Queued(id) = want else { panic!("{want:?} for {mode:?} behind {who}") };
                assert!(table.cancel(KEY, id, world.now));
            }
        }
    }
}

/// The last owner to release the lock is notified when the server has answered; the others need not wait.
#[test]
fn the_last_release_reports_the_loss() {
    let mut world = shared_by(2);
    let mut leave = |owner| {
        let guard = (owner, Mode::Shared);
        let left = world.table.leave(KEY, guard, &SHARED_SESSION, Some(|| 7), world.now);
        (left, effects(&mut world))
    };
    assert_eq!(leave(0), (Left::Done, vec![]));
    assert_eq!(leave(1), (Left::Unlocking, vec![Effect::Start(KEY, Step::Unlock)]));
    let Taken { id, step, .. } = take(&mut world);
    assert_eq!(step, Step::Unlock);
    assert!(world.table.taken(KEY, id, (&SHARED_SESSION, true), world.now));
    assert_eq!(effects(&mut world), [Effect::Released(7, true)]);
}

/// An answer counts only for its own step, only after that was taken, and only once.
#[test]
fn answers_to_other_steps_do_not_count() {
    let mut world = World::new();
    world.act(Act::Hurry(false));
    world.act(Act::Want { owner: 0, key: 1, mode: Mode::Exclusive, waits: true });
    let id = world.table.keys.get(&KEY).and_then(|entry| entry.turn).unwrap().id;
    let counts = |table: &mut Table<Session, u64>, id| {
        table.taken(KEY, id, (&SHARED_SESSION, true), world.now)
    };
    assert!(!counts(&mut world.table, id));
    assert_eq!(world.table.take(KEY, true).unwrap().id, id);
    assert!(!counts(&mut world.table, id + 1));
    assert!(counts(&mut world.table, id));
    assert!(!counts(&mut world.table, id));
}

/// After a step with an unknown result, the table goes on from what the server has granted.
#[test]
fn a_grant_of_the_server_counts() {
    for granted in [true, false] {
        let mut world = World::new();
        world.act(Act::Hurry(false));
        world.act(Act::Want { owner: 0, key: 1, mode: Mode::Exclusive, waits: true });
        let id = take(&mut world).id;
        let server = Modes { exclusive: granted, shared: false };
        let found = (&SHARED_SESSION, server);
        assert!(world.table.failed_half_way(KEY, id + 1, false, found, world.now).is_empty());
        assert!(world.table.failed_half_way(KEY, id, true, found, world.now).is_empty());
        if granted {
            assert_eq!(effects(&mut world), [Effect::Granted(1, SHARED_SESSION)]);
            let seat = world.table.keys.get(&KEY).and_then(|entry| entry.seat);
            assert_eq!(seat, Some(SHARED_SESSION));
        } else {
            assert_eq!(effects(&mut world), [Effect::Start(KEY, Step::Lock(Mode::Exclusive))]);
            assert_eq!(take(&mut world).step, Step::Lock(Mode::Exclusive));
        }
    }
}

/// An owner that awaits a downgrade is notified of it, although the statement that contained it has failed.
#[test]
fn a_downgrade_that_took_effect_is_reported_after_a_failure() {
    let mut world = World::new();
    for mode in [Mode::Exclusive, Mode::Shared] {
        world.act(Act::Want { owner: 0, key: 1, mode, waits: true });
        world.act(Act::Answer);
    }
    let guard = (0, Mode::Exclusive);
    let left = world.table.leave(KEY, guard, &SHARED_SESSION, Some(|| 7), world.now);
    assert_eq!(left, Left::Unlocking);
    let Taken { id, step, .. } = take(&mut world);
    assert_eq!(step, Step::Downgrade);
    effects(&mut world);
    let server = Modes::only(Mode::Shared);
    let failed = world.table.failed_half_way(KEY, id, true, (&SHARED_SESSION, server), world.now);
    assert!(failed.is_empty());
    assert_eq!(effects(&mut world), [Effect::Released(7, true)]);
}

/// An upgrade overtakes an owner that holds nothing. A second upgrade is a deadlock, because each would wait for the
/// other forever.
#[test]
fn an_upgrade_goes_ahead_of_waiters_that_hold_nothing() {
    let mut world = World::new();
    for owner in 0..2 {
        world.act(Act::Want { owner, key: 1, mode: Mode::Shared, waits: true });
    }
    world.act(Act::Answer);
    world.act(Act::Want { owner: 2, key: 1, mode: Mode::Exclusive, waits: true });
    let wanted = (Mode::Exclusive, true);
    let want = world.table.want(KEY, 0, wanted, || (99, Waiting::default()), world.now);
    assert!(matches!(want, Want::Queued(_)), "{want:?}");
    let want = world.table.want(KEY, 1, wanted, || (100, Waiting::default()), world.now);
    assert_eq!(want, Want::Deadlock);
}

/// A step that was not taken yet is called off when another is needed.
#[test]
fn a_step_follows_what_is_needed() {
    let mut world = World::new();
    world.act(Act::Hurry(false));
    world.act(Act::Want { owner: 0, key: 1, mode: Mode::Exclusive, waits: true });
    world.act(Act::Want { owner: 1, key: 1, mode: Mode::Shared, waits: true });
    let (guard, id) = world.waiting.remove(&1).unwrap();
    assert!(world.table.cancel(guard.key, id, world.now));
    assert_eq!(effects(&mut world), [Effect::Start(KEY, Step::Lock(Mode::Shared))]);
    assert_eq!(take(&mut world).step, Step::Lock(Mode::Shared));
}

/// While another owner shares a lock, the server is not asked on behalf of an exclusive waiter, nor on behalf of a
/// shared waiter once another process was seen waiting.
#[test]
fn no_query_waits() {
    let mut world = shared_by(1);
    world.act(Act::Want { owner: 1, key: 1, mode: Mode::Exclusive, waits: true });
    assert_eq!(world.in_flight, []);

    let mut world = shared_by(3);
    world.act(Act::Others { key: 1, mode: Some(Mode::Shared) });
    world.act(Act::Want { owner: 3, key: 1, mode: Mode::Shared, waits: true });
    let steps: Vec<Step> = world.in_flight.iter().map(|(_, taken, _)| taken.step).collect();
    assert_eq!(steps, [Step::Look]);
    world.act(Act::Answer);
    assert_eq!(world.in_flight, []);
    assert_eq!(world.waiting.len(), 1);
}

/// Of the requests for a busy lock, only those that wait stay queued.
#[test]
fn a_try_is_refused_when_the_server_refuses_it() {
    let mut world = World::new();
    world.act(Act::Others { key: 1, mode: Some(Mode::Exclusive) });
    world.act(Act::Want { owner: 0, key: 1, mode: Mode::Shared, waits: false });
    world.act(Act::Want { owner: 1, key: 1, mode: Mode::Shared, waits: true });
    world.act(Act::Answer);
    let waiting: Vec<usize> = world.waiting.values().map(|(wish, _)| wish.owner).collect();
    assert_eq!(waiting, [1]);
    let steps: Vec<Step> = world.in_flight.iter().map(|(_, taken, _)| taken.step).collect();
    assert_eq!(steps, [Step::Wait(Mode::Shared)]);
}

/// The lock of a wait session is released, and not renewed, when it is another process's turn.
#[test]
fn a_key_on_a_session_of_its_own_is_released_and_requested_anew() {
    let mut world = World::new();
    world.act(Act::Others { key: 1, mode: Some(Mode::Exclusive) });
    world.act(Act::Want { owner: 0, key: 1, mode: Mode::Exclusive, waits: true });
    world.act(Act::Answer);
    world.act(Act::Others { key: 1, mode: None });
    world.act(Act::Answer);
    assert!(world.guards.iter().all(|guard| !guard.seat.is_shared()));
    world.act(Act::Want { owner: 1, key: 1, mode: Mode::Exclusive, waits: true });
    // After this, it is another process's turn.
    world.act(Act::Later);
    world.act(Act::Leave { which: 0 });
    let steps: Vec<Step> = world.in_flight.iter().map(|(_, taken, _)| taken.step).collect();
    assert_eq!(steps, [Step::Unlock]);
    world.finish();
}
