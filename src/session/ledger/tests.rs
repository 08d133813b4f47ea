//! The ledger beside a server as simple as can be: whatever happens in whatever order, every guard is
//! covered, and nothing is held that no guard needs.

use std::collections::BTreeMap;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::subsequence;

use super::*;
use crate::key::Key;

/// What happens to a session. A number picks one of those that are there, if there are any.
#[derive(Clone, Debug)]
enum Step {
    /// A guard is wanted.
    Join(Vec<(i64, Mode)>),
    /// The first that is free is wanted.
    JoinAny(Vec<i64>),
    /// The server answers an acquire: yes or no.
    Answer(usize, bool),
    /// A guard goes.
    Leave(usize),
    /// A release has its turn at the connection.
    Tell(usize),
    Close,
    Lose,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let mode = prop_oneof![Just(Mode::Exclusive), Just(Mode::Shared)];
    let pick = 0_usize..8;
    let step = prop_oneof![
        8 => vec((0..3_i64, mode), 1..3).prop_map(Step::Join),
        1 => subsequence(vec![0, 1, 2], 1..3).prop_map(Step::JoinAny),
        8 => (pick.clone(), prop::bool::weighted(0.8)).prop_map(|(pick, yes)| Step::Answer(pick, yes)),
        8 => pick.clone().prop_map(Step::Leave),
        8 => pick.prop_map(Step::Tell),
        // Rarely, or little else would happen.
        1 => prop::bool::weighted(0.1).prop_map(|is_close| if is_close { Step::Close } else { Step::Tell(0) }),
        1 => prop::bool::weighted(0.1).prop_map(|is_lost| if is_lost { Step::Lose } else { Step::Leave(0) }),
    ];
    vec(step, 0..60)
}

/// A session: its ledger, what the server has granted it, and who is there.
struct Scene {
    ledger: Ledger,
    server: BTreeMap<KeyId, Modes>,
    guards: Vec<Request>,
    asking: Vec<Request>,
    telling: Vec<Request>,
    /// How it was lost, in a word.
    lost: Option<&'static str>,
    /// It was closed, and the last unlock is not sent.
    closing: bool,
    /// Its last guard went, so that nobody can join.
    released: bool,
}

fn request(locks: &[(i64, Mode)]) -> Request {
    let (first, rest) = locks.split_first().unwrap();
    let one = Request::one(&Key::from(first.0), first.1);
    rest.iter().fold(one, |request, &(key, mode)| request.and(Key::from(key), mode))
}

fn take(from: &mut Vec<Request>, pick: usize) -> Option<Request> {
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
            asking: vec![request(&[(0, Mode::Exclusive)])],
            telling: Vec::new(),
            lost: None,
            closing: false,
            released: false,
        }
    }

    fn under_way(&self) -> usize {
        self.asking.len() + self.telling.len() + usize::from(self.closing)
    }

    fn holds(&self, key: KeyId, mode: Mode) -> bool {
        let modes = self.server.get(&key).copied().unwrap_or_default();
        modes.exclusive || mode == Mode::Shared && modes.shared
    }

    fn missing(&self, request: &Request) -> Vec<(KeyId, Mode)> {
        request.ids().filter(|&(key, mode)| !self.holds(key, mode)).collect()
    }

    /// What the guards of a key need.
    fn needed(&self, wanted: KeyId) -> Option<Mode> {
        let locks = self.guards.iter().flat_map(Request::ids);
        // Exclusive is the lesser of the two.
        locks.filter(|&(key, _)| key == wanted).map(|(_, mode)| mode).min()
    }

    /// Whether the server holds something of these keys that no guard needs.
    fn excess(&self, request: &Request) -> bool {
        request.ids().any(|(key, _)| match self.needed(key) {
            Some(Mode::Exclusive) => false,
            Some(Mode::Shared) => self.holds(key, Mode::Exclusive),
            None => self.holds(key, Mode::Shared),
        })
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Join(locks) => self.join(request(&locks)),
            Step::JoinAny(keys) => {
                self.join(Request::any(keys.into_iter().map(Key::from).collect()));
            }
            Step::Answer(pick, yes) => {
                if let Some(request) = take(&mut self.asking, pick) {
                    self.answer(request, yes);
                }
            }
            Step::Leave(pick) => {
                if let Some(request) = take(&mut self.guards, pick) {
                    self.leave(request);
                }
            }
            Step::Tell(pick) => {
                if self.closing {
                    self.closing = false;
                    self.done();
                } else if let Some(request) = take(&mut self.telling, pick) {
                    self.tell(&request);
                }
            }
            Step::Close if self.lost.is_none() && !self.released => {
                assert_eq!(granted(self.ledger.close()), self.server);
                self.closing = true;
                self.end("closed");
            }
            Step::Lose if !self.released => {
                let told = granted(self.ledger.lose(Loss::Silent));
                // A second loss finds nothing, and does not hide the first.
                assert_eq!(told, mem::take(&mut self.server));
                self.end("silent");
            }
            Step::Close | Step::Lose => {}
        }
        self.check();
    }

    fn end(&mut self, how: &'static str) {
        self.lost.get_or_insert(how);
        self.server.clear();
    }

    fn join(&mut self, request: Request) {
        let covered = request.need == Need::All && self.missing(&request).is_empty();
        let joined = self.ledger.join(&request);
        if self.lost.is_some() || self.released {
            assert_eq!(joined, Join::Ended);
        } else if covered {
            assert_eq!(joined, Join::Covered);
            self.guards.push(request);
        } else {
            assert_eq!(joined, Join::Ask);
            self.asking.push(request);
        }
    }

    fn answer(&mut self, request: Request, yes: bool) {
        let missing = self.ledger.missing(&request);
        assert_eq!(missing, self.missing(&request));
        let (request, missing) = match (request.need, missing.first()) {
            // Of any, the server grants the first that is free.
            (Need::Any, Some(&(key, mode))) => (request.only(key).unwrap(), vec![(key, mode)]),
            _ => (request, missing),
        };
        if !yes && !missing.is_empty() {
            self.done();
            return;
        }
        match self.ledger.granted(&request, &missing) {
            Ok(()) => {
                assert_eq!(self.lost, None);
                for (key, mode) in missing {
                    let modes = self.server.entry(key).or_default();
                    match mode {
                        Mode::Exclusive => modes.exclusive = true,
                        Mode::Shared => modes.shared = true,
                    }
                }
                self.guards.push(request);
            }
            Err(loss) => {
                assert_eq!(self.lost, Some(word(&loss)));
                self.done();
            }
        }
    }

    fn leave(&mut self, request: Request) {
        match self.ledger.leave(&request) {
            Leave::Lost(loss) => assert_eq!(self.lost, Some(word(&loss))),
            Leave::Keep => assert!(!self.excess(&request)),
            Leave::Tell => {
                assert!(self.excess(&request));
                self.released = self.guards.is_empty() && self.under_way() == 0;
                self.telling.push(request);
            }
        }
    }

    fn tell(&mut self, request: &Request) {
        let Tell { downgrade, unlock } = self.ledger.tell(request);
        for key in downgrade {
            let before = self.server.insert(key, Modes { exclusive: false, shared: true });
            assert_eq!(before, Some(Modes { exclusive: true, shared: false }));
        }
        for (key, modes) in unlock {
            let held = self.server.get_mut(&key).unwrap();
            assert!(modes.exclusive || modes.shared);
            assert!(held.exclusive || !modes.exclusive, "unlocks what it does not hold");
            assert!(held.shared || !modes.shared, "unlocks what it does not hold");
            held.exclusive &= !modes.exclusive;
            held.shared &= !modes.shared;
            if *held == Modes::default() {
                self.server.remove(&key);
            }
        }
        assert!(!self.excess(request), "the server holds more than is needed");
        assert_eq!(
            self.ledger.is_last(),
            (self.guards.is_empty() || self.lost.is_some()) && self.under_way() == 0
        );
        self.done();
    }

    /// A statement is done that was taken off its list.
    fn done(&mut self) {
        let unused = (self.guards.is_empty() || self.lost.is_some()) && self.under_way() == 0;
        assert_eq!(self.ledger.done(), unused);
        if unused && self.lost.is_none() {
            self.released = true;
            assert!(self.server.is_empty(), "the pool would get a connection that holds a lock");
        }
    }

    /// What holds at any time.
    fn check(&self) {
        assert_eq!(self.ledger.loss().map(|loss| word(&loss)), self.lost);
        if self.lost.is_some() {
            assert!(!self.ledger.has_guards());
            return;
        }
        assert_eq!(granted(self.ledger.granted_by_server()), self.server);
        assert_eq!(self.ledger.has_guards(), !self.guards.is_empty());
        for key in (0..3).map(|key| Key::from(key).id()) {
            assert_eq!(self.ledger.has_guard(key), self.needed(key).is_some());
        }
        for guard in &self.guards {
            assert_eq!(self.missing(guard), [], "a guard is not covered");
        }
        // No entry outlives its use.
        let used = |key: &KeyId| self.needed(*key).is_some() || self.server.contains_key(key);
        assert!(self.ledger.keys.keys().all(used), "{:?}", self.ledger);
    }
}

fn word(loss: &Loss) -> &'static str {
    match loss {
        Loss::Closed => "closed",
        Loss::Silent => "silent",
        Loss::Abandoned | Loss::Disconnected(_) | Loss::NotHeld | Loss::Pooled => "something else",
    }
}

fn granted(locks: Vec<(KeyId, Modes)>) -> BTreeMap<KeyId, Modes> {
    locks.into_iter().filter(|(_, modes)| *modes != Modes::default()).collect()
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
        while scene.under_way() > 0 || !scene.guards.is_empty() {
            for step in [Step::Answer(0, false), Step::Leave(0), Step::Tell(0)] {
                scene.step(step);
            }
        }
        prop_assert!(scene.server.is_empty());
        prop_assert_eq!(scene.ledger.join(&request(&[(0, Mode::Shared)])), Join::Ended);
    }
}
