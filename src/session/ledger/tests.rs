//! The ledger beside a server as simple as can be: whatever happens in whatever order, every guard is
//! covered, and nothing is held that no guard needs.

use std::collections::BTreeMap;
use std::mem;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::subsequence;

use super::*;
use crate::key::Key;

/// What happens to a session. A number picks one of those that are there, if there are any.
#[derive(Clone, Debug)]
enum Step {
    /// A guard is acquired.
    Join(Vec<(i64, Mode)>),
    /// The first key that is free is acquired.
    JoinAny(Vec<i64>),
    /// The server answers an acquire for its next key: yes or no.
    Answer(usize, bool),
    /// A guard is released.
    Leave(usize),
    /// A release gets the connection.
    Unlock(usize),
    Lose,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let mode = prop_oneof![Just(Mode::Exclusive), Just(Mode::Shared)];
    let pick = 0_usize..8;
    let step = prop_oneof![
        8 => vec((0..3_i64, mode), 1..3).prop_map(Step::Join),
        1 => subsequence(vec![0, 1, 2], 1..3).prop_map(Step::JoinAny),
        12 => (pick.clone(), prop::bool::weighted(0.8)).prop_map(|(pick, yes)| Step::Answer(pick, yes)),
        8 => pick.clone().prop_map(Step::Leave),
        8 => pick.prop_map(Step::Unlock),
        // Rarely, or little else would happen.
        1 => prop::bool::weighted(0.1).prop_map(|is_lost| if is_lost { Step::Lose } else { Step::Leave(0) }),
    ];
    vec(step, 0..60)
}

/// An acquire in flight.
struct Asking {
    request: Request,
    claimed: Vec<(KeyId, Mode)>,
    missing: Vec<(KeyId, Mode)>,
}

impl Asking {
    fn new(request: Request) -> Self {
        let missing = request.ids().collect();
        Self { request, claimed: Vec::new(), missing }
    }
}

/// A session: its ledger, what the server has granted it, and who is there.
struct Scene {
    ledger: Ledger,
    server: BTreeMap<KeyId, Modes>,
    guards: Vec<Request>,
    asking: Vec<Asking>,
    unlocking: Vec<Request>,
    lost: bool,
    /// Its last guard was released, so that no guard can join.
    released: bool,
}

fn request(locks: &[(i64, Mode)]) -> Request {
    Request::all(locks.iter().map(|&(key, mode)| (Key::from(key), mode)).collect()).unwrap()
}

fn take<T>(from: &mut Vec<T>, pick: usize) -> Option<T> {
    let count = from.len();
    (count > 0).then(|| from.remove(pick % count))
}

impl Scene {
    /// A session that was just opened for an acquire.
    fn new() -> Self {
        Self {
            ledger: Ledger::opening(),
            server: BTreeMap::new(),
            guards: Vec::new(),
            asking: vec![Asking::new(request(&[(0, Mode::Exclusive)]))],
            unlocking: Vec::new(),
            lost: false,
            released: false,
        }
    }

    fn in_flight(&self) -> usize {
        self.asking.len() + self.unlocking.len()
    }

    /// The shares of guards and of acquires in flight.
    fn shares(&self) -> impl Iterator<Item = (KeyId, Mode)> {
        let claimed = self.asking.iter().flat_map(|asking| asking.claimed.iter().copied());
        self.guards.iter().flat_map(Request::ids).chain(claimed)
    }

    fn holds(&self, key: KeyId, mode: Mode) -> bool {
        let modes = self.server.get(&key).copied().unwrap_or_default();
        modes.exclusive || mode == Mode::Shared && modes.shared
    }

    /// What the shares of a key need.
    fn needed(&self, wanted: KeyId) -> Option<Mode> {
        // Exclusive is the lesser of the two.
        self.shares().filter(|&(key, _)| key == wanted).map(|(_, mode)| mode).min()
    }

    /// Whether the server holds something of these keys that no share needs.
    fn excess(&self, keys: impl Iterator<Item = KeyId>) -> bool {
        keys.into_iter().any(|key| match self.needed(key) {
            Some(Mode::Exclusive) => false,
            Some(Mode::Shared) => self.holds(key, Mode::Exclusive),
            None => self.holds(key, Mode::Shared),
        })
    }

    fn is_unused(&self) -> bool {
        (self.lost || self.shares().next().is_none()) && self.in_flight() == 0
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Join(locks) => self.join(request(&locks)),
            Step::JoinAny(keys) => {
                self.join(Request::any(keys.into_iter().map(Key::from).collect()));
            }
            Step::Answer(pick, yes) => {
                if let Some(asking) = take(&mut self.asking, pick) {
                    self.answer(asking, yes);
                }
            }
            Step::Leave(pick) => {
                if let Some(request) = take(&mut self.guards, pick) {
                    self.leave(request);
                }
            }
            Step::Unlock(pick) => {
                if let Some(request) = take(&mut self.unlocking, pick) {
                    let keys: Vec<_> = request.ids().map(|(key, _)| key).collect();
                    self.unlock(&keys);
                    self.done();
                }
            }
            Step::Lose if !self.released => {
                let lost = self.ledger.lose(Loss::Unresponsive);
                assert_eq!(lost.is_none(), self.lost);
                assert_eq!(granted(lost.unwrap_or_default()), mem::take(&mut self.server));
                self.lost = true;
                for asking in &mut self.asking {
                    asking.claimed.clear();
                }
            }
            Step::Lose => {}
        }
        self.check();
    }

    fn join(&mut self, request: Request) {
        let covered =
            request.need == Need::All && request.ids().all(|(key, mode)| self.holds(key, mode));
        let joined = self.ledger.join(&request);
        if self.lost {
            assert_eq!(joined, Join::Lost);
        } else if self.released {
            assert_eq!(joined, Join::Released);
        } else if covered {
            assert_eq!(joined, Join::Covered);
            self.guards.push(request);
        } else {
            assert_eq!(joined, Join::Ask);
            self.asking.push(Asking::new(request));
        }
    }

    /// The server answers for the first key that is missing.
    fn answer(&mut self, mut asking: Asking, yes: bool) {
        let covered: Vec<_> =
            asking.missing.iter().copied().filter(|&(key, mode)| self.holds(key, mode)).collect();
        let before = asking.claimed.len();
        self.ledger.claim(&mut asking.missing, &mut asking.claimed);
        assert_eq!(asking.claimed.get(before..), Some(&covered[..]));
        // Of any, the server grants the first that is free.
        if asking.request.need == Need::Any && asking.claimed.is_empty() {
            asking.missing.truncate(1);
        }
        let decided = !asking.claimed.is_empty() && asking.request.need == Need::Any;
        if let (false, Some(&(key, mode))) = (decided, asking.missing.first()) {
            if !yes {
                return self.undo(&asking);
            }
            if self.lost {
                return self.undo(&asking);
            }
            self.ledger.granted(key, mode);
            asking.missing.remove(0);
            asking.claimed.push((key, mode));
            let modes = self.server.entry(key).or_default();
            modes.exclusive |= mode == Mode::Exclusive;
            modes.shared |= mode == Mode::Shared;
        }
        if asking.request.need == Need::All && !asking.missing.is_empty() {
            self.asking.push(asking);
            return;
        }
        if self.ledger.settle(asking.request.need).is_err() {
            assert!(self.lost);
            return self.undo(&asking);
        }
        // Of any, more than one may have been covered.
        let (&first, rest) = asking.claimed.split_first().unwrap();
        if asking.request.need == Need::Any {
            let only = asking.request.only(first.0).unwrap();
            self.guards.push(only);
            for &(key, mode) in rest {
                self.guards.push(Request::one(asking.request.only(key).unwrap().key(), mode));
            }
        } else {
            self.guards.push(asking.request);
        }
    }

    fn undo(&mut self, asking: &Asking) {
        let keys: Vec<_> = asking.claimed.iter().map(|&(key, _)| key).collect();
        let excess = self.ledger.withdraw(asking.claimed.iter().copied());
        assert_eq!(excess, !self.lost && self.excess(keys.iter().copied()));
        self.unlock(&keys);
        self.done();
    }

    fn leave(&mut self, request: Request) {
        match self.ledger.leave(&request) {
            Leave::Lost(_) => assert!(self.lost),
            Leave::Keep => assert!(!self.excess(request.ids().map(|(key, _)| key))),
            Leave::Unlock => {
                assert!(self.excess(request.ids().map(|(key, _)| key)));
                self.released = self.is_unused();
                self.unlocking.push(request);
            }
        }
    }

    fn unlock(&mut self, keys: &[KeyId]) {
        let Surplus { downgrade, unlock } = self.ledger.surplus(keys.iter().copied());
        for key in downgrade {
            let before = self.server.insert(key, Modes::only(Mode::Shared));
            assert_eq!(before, Some(Modes::only(Mode::Exclusive)));
        }
        for (key, mode) in unlock {
            let held = self.server.get_mut(&key).expect("unlocks what it does not hold");
            let held_in_mode = match mode {
                Mode::Exclusive => &mut held.exclusive,
                Mode::Shared => &mut held.shared,
            };
            assert!(mem::take(held_in_mode), "unlocks what it does not hold");
            if *held == Modes::default() {
                self.server.remove(&key);
            }
        }
        assert!(!self.excess(keys.iter().copied()), "the server holds more than is needed");
        assert_eq!(self.ledger.is_last(), self.is_unused());
    }

    /// An acquire or a release is done that was taken off its list.
    fn done(&mut self) {
        let unused = self.is_unused();
        assert_eq!(self.ledger.done(), unused);
        if unused && !self.lost {
            self.released = true;
            assert!(self.server.is_empty(), "the pool would get a connection that holds a lock");
        }
    }

    /// What holds at any time.
    fn check(&self) {
        assert_eq!(self.ledger.loss().is_some(), self.lost);
        assert_eq!(self.ledger.has_ended(), self.lost || self.released);
        if self.lost {
            assert!(!self.ledger.has_guards());
            return;
        }
        assert_eq!(granted(self.ledger.granted_by_server()), self.server);
        assert_eq!(self.ledger.has_guards(), self.shares().next().is_some());
        for key in (0..3).map(|key| Key::from(key).id()) {
            assert_eq!(self.ledger.has_guard(key), self.needed(key).is_some());
        }
        for (key, mode) in self.shares() {
            assert!(self.holds(key, mode), "a share is not covered");
        }
        // No entry outlives its use.
        let used = |key: &KeyId| self.needed(*key).is_some() || self.server.contains_key(key);
        assert!(self.ledger.keys.keys().all(used), "{:?}", self.ledger);
    }
}

fn granted(locks: Vec<(KeyId, Mode)>) -> BTreeMap<KeyId, Modes> {
    let mut granted: BTreeMap<_, Modes> = BTreeMap::new();
    for (key, mode) in locks {
        let modes = granted.entry(key).or_default();
        modes.exclusive |= mode == Mode::Exclusive;
        modes.shared |= mode == Mode::Shared;
    }
    granted
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn guards_are_covered_and_nothing_else_is_held(steps in steps()) {
        let mut scene = Scene::new();
        for step in steps {
            scene.step(step);
        }
        // Then all go, and the session ends with nothing held.
        while scene.in_flight() > 0 || !scene.guards.is_empty() {
            for step in [Step::Answer(0, false), Step::Leave(0), Step::Unlock(0)] {
                scene.step(step);
            }
        }
        prop_assert!(scene.server.is_empty());
        let ended = if scene.lost { Join::Lost } else { Join::Released };
        prop_assert_eq!(scene.ledger.join(&request(&[(0, Mode::Shared)])), ended);
    }
}

#[test]
fn the_last_acquire_is_not_done_early() {
    let mut ledger = Ledger::opening();
    assert!(!ledger.done_early());
    assert_eq!(ledger.join(&request(&[(0, Mode::Exclusive)])), Join::Ask);
    assert!(ledger.done_early());
    assert!(!ledger.done_early());
    ledger.granted(KeyId::BigInt(0), Mode::Exclusive);
    ledger.settle(Need::All).unwrap();
    assert_eq!(ledger.join(&request(&[(1, Mode::Exclusive)])), Join::Ask);
    assert!(ledger.done_early());
    assert!(ledger.has_guards() && !ledger.has_ended());
}
