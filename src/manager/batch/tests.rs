//! Batches against a simulated server with one session, whose keys other sessions may hold or wait for.

use proptest::prelude::*;

use super::*;

const NOTHING: Modes = Modes { exclusive: false, shared: false };
const EXCLUSIVE: Modes = Modes { exclusive: true, shared: false };
const SHARED: Modes = Modes { exclusive: false, shared: true };
const BOTH: Modes = Modes { exclusive: true, shared: true };

/// A key on the simulated server.
#[derive(Clone, Debug)]
struct Played {
    step: Step,
    /// The modes that the session has been granted.
    mine: Modes,
    /// Whether other sessions hold the key, so that the server refuses it.
    busy: bool,
    waited_for: bool,
    /// Whether the server answers that the session did not hold the lock that it releases.
    lies: bool,
}

impl Played {
    fn answer(&mut self, call: Call) -> bool {
        match call {
            Call::TryLock(mode) => {
                *self.of(mode) |= !self.busy;
                !self.busy
            }
            Call::Unlock(mode) => {
                assert!(*self.of(mode), "{self:?} releases what it does not hold");
                *self.of(mode) = self.lies;
                !self.lies
            }
            Call::LockShared => {
                assert!(self.mine.exclusive, "{self:?} would wait");
                self.mine.shared = true;
                true
            }
            Call::IsWaitedFor => self.waited_for,
        }
    }

    fn of(&mut self, mode: Mode) -> &mut bool {
        match mode {
            Mode::Exclusive => &mut self.mine.exclusive,
            Mode::Shared => &mut self.mine.shared,
        }
    }

    /// The answer to the step, and the modes that the session must hold after it.
    fn expected(&self, before: Modes) -> (Option<bool>, Option<Modes>) {
        let free = !self.busy;
        let granted = |modes: Modes| if free { modes } else { NOTHING };
        match self.step {
            Step::Upgrade => (Some(free), Some(if free { BOTH } else { SHARED })),
            Step::Look => (Some(self.waited_for), Some(before)),
            Step::Downgrade | Step::Renew(_) | Step::Unlock if self.lies => (None, None),
            Step::Downgrade => (Some(true), Some(SHARED)),
            Step::Lock(mode) | Step::Wait(mode) | Step::Renew(mode) => {
                (Some(free), Some(granted(only(mode))))
            }
            Step::Unlock => (Some(true), Some(NOTHING)),
        }
    }
}

fn only(mode: Mode) -> Modes {
    match mode {
        Mode::Exclusive => EXCLUSIVE,
        Mode::Shared => SHARED,
    }
}

/// A step, and a state in which it is taken.
fn played() -> impl Strategy<Value = Played> {
    let mode = || prop_oneof![Just(Mode::Exclusive), Just(Mode::Shared)];
    let something = || prop_oneof![Just(EXCLUSIVE), Just(SHARED), Just(BOTH)];
    let step = prop_oneof![
        mode().prop_map(|mode| (Step::Lock(mode), NOTHING)),
        Just((Step::Upgrade, SHARED)),
        Just((Step::Look, SHARED)),
        prop_oneof![Just(EXCLUSIVE), Just(BOTH)].prop_map(|mine| (Step::Downgrade, mine)),
        (mode(), something()).prop_map(|(mode, mine)| (Step::Renew(mode), mine)),
        something().prop_map(|mine| (Step::Unlock, mine)),
    ];
    (step, any::<[bool; 3]>()).prop_map(|((step, mine), [busy, waited_for, lies])| Played {
        step,
        mine,
        busy,
        waited_for,
        lies,
    })
}

fn batch(keys: &[Played]) -> Vec<(KeyId, Taken)> {
    let step = |(key, Played { step, mine, .. }): (i64, &_)| {
        (KeyId::BigInt(key), Taken { id: 0, step: *step, server: *mine })
    };
    (0..).zip(keys).map(step).collect()
}

proptest! {
    /// Each step leaves its key in the expected modes, and has the expected answer.
    #[test]
    fn do_what_the_steps_say(mut keys in prop::collection::vec(played(), 0..20)) {
        let batch = batch(&keys);
        let before: Vec<Modes> = keys.iter().map(|key| key.mine).collect();
        let mut answers = Vec::new();
        for (key, call) in &calls(&batch) {
            let KeyId::BigInt(key) = key else { panic!("there is no such key") };
            if let Some(key) = keys.get_mut(usize::try_from(*key).unwrap()) {
                answers.push(key.answer(*call));
            }
        }
        let answered = read(&batch, &answers).unwrap();
        prop_assert_eq!(answered.len(), keys.len());
        for ((key, before), (.., answer)) in keys.iter().zip(before).zip(answered) {
            let (expected, modes) = key.expected(before);
            prop_assert_eq!(answer, expected, "{:?}", key);
            if let Some(modes) = modes {
                prop_assert_eq!(key.mine, modes, "{:?}", key);
            }
        }

        // Too many or too few answers are rejected.
        answers.push(true);
        prop_assert_eq!(read(&batch, &answers), None);
        answers.pop();
        if answers.pop().is_some() {
            prop_assert_eq!(read(&batch, &answers), None);
        }
    }

    /// Steps that were to be taken on a lost session are not taken on the next one, unless they need no session.
    #[test]
    fn keep_what_needs_no_session(keys in prop::collection::vec(played(), 0..20)) {
        let mut kept = batch(&keys);
        keep_only_locks(&mut kept);
        let locks = keys.iter().filter(|key| matches!(key.step, Step::Lock(_))).count();
        prop_assert_eq!((kept.len(), calls(&kept).len()), (locks, locks));
        prop_assert!(calls(&kept).iter().all(|(_, call)| matches!(call, Call::TryLock(_))));
    }
}
