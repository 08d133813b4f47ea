//! A simulated server, and the callers of a table, in random histories.

use std::collections::{HashMap, HashSet, VecDeque};
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::super::{Bound, Effect, Left, Modes, Step, Table, Taken, Want};
use crate::key::KeyId;
use crate::metrics::Waiting;
use crate::mode::Mode;

/// Numbers below 1000 are the shared sessions, one after another. The others are wait sessions, one for each key.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub(super) struct Session(pub(super) u32);

impl Session {
    pub(super) fn is_shared(self) -> bool {
        self.0 < 1000
    }
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Act {
    Want {
        owner: usize,
        key: i64,
        mode: Mode,
        waits: bool,
    },
    Leave {
        which: usize,
    },
    Cancel {
        which: usize,
    },
    Close {
        owner: usize,
        key: i64,
    },
    /// The server answers the oldest step.
    Answer,
    /// Another process takes or releases a key.
    Others {
        key: i64,
        mode: Option<Mode>,
    },
    /// The shared session breaks.
    Break,
    /// Sets whether each step is sent as soon as it comes up.
    Hurry(bool),
    /// A wait session stops the oldest wait.
    SliceOver,
    /// The keys in the line that are due are retried.
    Retry,
    Later,
}

pub(super) fn act() -> impl Strategy<Value = Act> {
    let mode = || prop_oneof![Just(Mode::Exclusive), Just(Mode::Shared)];
    let key = 0..3_i64;
    prop_oneof![
        6 => (0..5_usize, key.clone(), mode(), any::<bool>())
            .prop_map(|(owner, key, mode, waits)| Act::Want { owner, key, mode, waits }),
        6 => (0..20_usize).prop_map(|which| Act::Leave { which }),
        2 => (0..20_usize).prop_map(|which| Act::Cancel { which }),
        1 => (0..5_usize, key.clone()).prop_map(|(owner, key)| Act::Close { owner, key }),
        12 => Just(Act::Answer),
        2 => (key, prop_oneof![Just(None), mode().prop_map(Some)])
            .prop_map(|(key, mode)| Act::Others { key, mode }),
        1 => Just(Act::Break),
        3 => any::<bool>().prop_map(Act::Hurry),
        2 => Just(Act::SliceOver),
        2 => Just(Act::Retry),
        1 => Just(Act::Later),
    ]
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Guard {
    pub(super) key: KeyId,
    pub(super) owner: usize,
    pub(super) mode: Mode,
    pub(super) seat: Session,
}

/// A table, with its simulated server and callers.
pub(super) struct World {
    pub(super) table: Table<Session, u64>,
    pub(super) now: Instant,
    /// The number of the current shared session.
    session: u32,
    pub(super) guards: Vec<Guard>,
    /// The waiters: the guard that each wants, and the number that the table gave it.
    pub(super) waiting: HashMap<u64, (Guard, i64)>,
    wishes: u64,
    /// The modes that each session has been granted.
    server: HashMap<(KeyId, Session), Modes>,
    others: HashMap<KeyId, Mode>,
    to_do: VecDeque<(KeyId, bool)>,
    pub(super) in_flight: VecDeque<(KeyId, Taken, Session)>,
    /// A key that was found busy just now.
    busy: Option<KeyId>,
    hurry: bool,
    /// The numbers of all steps.
    ids: HashSet<u64>,
}

pub(super) const NO_WAITER: Option<fn() -> u64> = None;

impl World {
    pub(super) fn new() -> Self {
        let bound = Bound { count: 3, time: Duration::from_millis(10) };
        Self {
            table: Table::new(bound),
            now: Instant::now(),
            session: 0,
            guards: Vec::new(),
            waiting: HashMap::new(),
            wishes: 0,
            server: HashMap::new(),
            others: HashMap::new(),
            to_do: VecDeque::new(),
            in_flight: VecDeque::new(),
            busy: None,
            hurry: true,
            ids: HashSet::new(),
        }
    }

    pub(super) fn act(&mut self, act: Act) {
        match act {
            Act::Want { owner, key, mode, waits } => {
                let key = KeyId::BigInt(key);
                // An owner waits for one key at a time.
                if self.waiting.values().any(|(wish, _)| wish.key == key && wish.owner == owner) {
                    return;
                }
                self.wishes += 1;
                let wish = self.wishes;
                let wanted = (mode, waits);
                let want =
                    self.table.want(key, owner, wanted, || (wish, Waiting::default()), self.now);
                let guard = Guard { key, owner, mode, seat: Session(0) };
                match want {
                    Want::Granted(seat) => self.guards.push(Guard { seat, ..guard }),
                    Want::Queued(id) => drop(self.waiting.insert(wish, (guard, id))),
                    Want::Busy => assert!(!waits),
                    Want::Deadlock => assert!(waits && mode == Mode::Exclusive),
                }
            }
            Act::Leave { which } => {
                if which < self.guards.len() {
                    let Guard { key, owner, mode, seat } = self.guards.swap_remove(which);
                    let left = self.table.leave(key, (owner, mode), &seat, NO_WAITER, self.now);
                    assert_ne!(left, Left::Stale);
                }
            }
            Act::Cancel { which } => {
                let wish = self.waiting.keys().copied().min_by_key(|wish| wish % 7 + which as u64);
                if let Some((guard, id)) = wish.and_then(|wish| self.waiting.remove(&wish)) {
                    assert!(self.table.cancel(guard.key, id, self.now));
                }
            }
            Act::Close { owner, key } => {
                let key = KeyId::BigInt(key);
                if !self.waiting.values().any(|(wish, _)| wish.key == key && wish.owner == owner) {
                    self.table.close(key, owner, || 0, self.now);
                    self.guards.retain(|guard| guard.key != key || guard.owner != owner);
                }
            }
            Act::Answer => self.answer(),
            Act::Others { key, mode } => {
                let key = KeyId::BigInt(key);
                self.others.remove(&key);
                if let Some(mode) = mode
                    && self.is_free(key, mode, None)
                {
                    self.others.insert(key, mode);
                }
            }
            Act::Break => {
                let seat = Session(self.session);
                self.session += 1;
                self.server.retain(|(_, session), _| *session != seat);
                self.guards.retain(|guard| guard.seat != seat);
                let in_flight = std::mem::take(&mut self.in_flight);
                self.table.lost(&seat, self.now);
                for (key, taken, session) in in_flight {
                    if session.is_shared() && matches!(taken.step, Step::Lock(_)) {
                        for wish in self.table.failed(key, taken.id) {
                            assert!(self.waiting.remove(&wish).is_some());
                        }
                    } else if !session.is_shared() {
                        self.in_flight.push_back((key, taken, session));
                    }
                }
            }
            Act::Hurry(hurry) => self.hurry = hurry,
            Act::SliceOver => {
                let is_wait =
                    |(_, taken, _): &(KeyId, Taken, Session)| matches!(taken.step, Step::Wait(_));
                if let Some(oldest) = self.in_flight.iter().position(is_wait)
                    && let Some((key, taken, _)) = self.in_flight.remove(oldest)
                {
                    self.table.not_granted(key, taken.id, self.now);
                }
            }
            Act::Retry => self.table.retry(self.now),
            Act::Later => self.now += Duration::from_millis(11),
        }
        self.settle();
        if self.hurry {
            self.start();
        }
        self.busy = None;
        self.check();
        self.check_line();
        if self.to_do.is_empty() {
            self.check_what_it_says();
        }
    }

    fn is_free(&self, key: KeyId, mode: Mode, except: Option<Session>) -> bool {
        let conflicts = |held: Modes| held.exclusive || held.shared && mode == Mode::Exclusive;
        let of_others = self
            .others
            .get(&key)
            .is_some_and(|&held| held == Mode::Exclusive || mode == Mode::Exclusive);
        let of_ours = self.server.iter().any(|((held, session), modes)| {
            *held == key && Some(*session) != except && conflicts(*modes)
        });
        !of_others && !of_ours
    }

    /// Simulates the server's answer to the oldest step that need not wait.
    fn answer(&mut self) {
        for _ in 0..self.in_flight.len() {
            let Some((key, taken, session)) = self.in_flight.pop_front() else { return };
            let Modes { exclusive, shared } =
                self.server.get(&(key, session)).copied().unwrap_or_default();
            assert_eq!(taken.server, Modes { exclusive, shared }, "{key:?} {taken:?}");
            let mut held = taken.server;
            let lock = |world: &Self, mode: Mode, held: &mut Modes| {
                let free = world.is_free(key, mode, Some(session));
                held.exclusive |= free && mode == Mode::Exclusive;
                held.shared |= free && mode == Mode::Shared;
                free
            };
            let yes = match taken.step {
                Step::Lock(mode) => {
                    let free = lock(self, mode, &mut held);
                    self.busy = (!free).then_some(key);
                    free
                }
                Step::Wait(mode) => {
                    if !lock(self, mode, &mut held) {
                        self.in_flight.push_back((key, taken, session));
                        continue;
                    }
                    true
                }
                Step::Look => self.others.contains_key(&key),
                Step::Upgrade => lock(self, Mode::Exclusive, &mut held),
                Step::Downgrade => {
                    held = Modes { exclusive: false, shared: true };
                    true
                }
                Step::Renew(mode) => {
                    held = Modes::default();
                    self.server.remove(&(key, session));
                    lock(self, mode, &mut held)
                }
                Step::Unlock => {
                    held = Modes::default();
                    true
                }
            };
            if held == Modes::default() {
                self.server.remove(&(key, session));
            } else {
                self.server.insert((key, session), held);
            }
            if !self.table.taken(key, taken.id, (&session, yes), self.now) {
                // The step was called off: the session must not keep the key.
                assert!(matches!(taken.step, Step::Wait(_)), "{taken:?}");
                self.server.remove(&(key, session));
            }
            return;
        }
    }

    fn settle(&mut self) {
        for effect in std::mem::take(self.table.effects()) {
            match effect {
                Effect::Granted(wish, seat) => {
                    let (guard, _) = self.waiting.remove(&wish).expect("it waits");
                    self.guards.push(Guard { seat, ..guard });
                }
                Effect::Refused(wish) | Effect::Deadlock(wish) => {
                    assert!(self.waiting.remove(&wish).is_some());
                }
                Effect::Released(..) | Effect::Line => {}
                Effect::Start(key, _) => self.to_do.push_back((key, true)),
                Effect::StartApart(key) => self.to_do.push_back((key, false)),
                Effect::Abandon(key) => {
                    self.in_flight.retain(|(other, taken, _)| {
                        *other != key || !matches!(taken.step, Step::Wait(_))
                    });
                }
            }
        }
    }

    /// Sends all steps that have come up.
    fn start(&mut self) {
        while let Some((key, shared)) = self.to_do.pop_front() {
            let taken =
                if shared { self.table.take(key, true) } else { self.table.take(key, false) };
            let Some(taken) = taken else { continue };
            assert!(self.ids.insert(taken.id), "there was a step {taken:?} before");
            if self.busy == Some(key) {
                assert!(matches!(taken.step, Step::Wait(_)), "{taken:?} is asked for again");
            }
            let own =
                self.server.keys().find(|(held, session)| *held == key && !session.is_shared());
            let session = match (shared, own) {
                (true, _) => Session(self.session),
                (false, Some((_, own))) => *own,
                (false, None) => Session(1000 + u32::try_from(taken.id).expect("few steps")),
            };
            self.in_flight.push_back((key, taken, session));
        }
        while let Some((key, taken, _)) = self.table.take_wait(self.now) {
            assert!(self.ids.insert(taken.id), "there was a step {taken:?} before");
            assert!(matches!(taken.step, Step::Wait(_)), "{taken:?} in the line");
            let own = Session(1000 + u32::try_from(taken.id).expect("few steps"));
            self.in_flight.push_back((key, taken, own));
        }
    }

    /// Checks the invariants.
    fn check(&self) {
        for (key, taken, _) in &self.in_flight {
            let wanted = self.waiting.values().any(|(wish, _)| wish.key == *key);
            assert!(wanted || !matches!(taken.step, Step::Wait(_)), "no waiter wants {key:?}");
        }
        // With nothing in flight, a waiter that could share a lock shares it, unless others have waited for it.
        let rests = self.in_flight.is_empty()
            && self.to_do.is_empty()
            && self.table.common.line.turns.is_empty();
        for (wish, _) in self.waiting.values().filter(|_| rests) {
            let excludes = |other: &Guard| other.key == wish.key && other.mode == Mode::Exclusive;
            let waiting = self.waiting.values().map(|(wish, _)| wish);
            assert!(
                wish.mode == Mode::Exclusive
                    || self.guards.iter().chain(waiting).any(excludes)
                    || self.table.keys.get(&wish.key).is_some_and(|entry| entry.draining),
                "{wish:?} is left waiting"
            );
        }
        for guard in &self.guards {
            let held = self.server.get(&(guard.key, guard.seat)).copied().unwrap_or_default();
            assert!(
                held.exclusive || guard.mode == Mode::Shared && held.shared,
                "{guard:?} is not held at the server: {held:?}"
            );
            let others = self
                .guards
                .iter()
                .filter(|other| other.key == guard.key && other.owner != guard.owner);
            for other in others {
                assert!(
                    guard.mode == Mode::Shared && other.mode == Mode::Shared,
                    "{guard:?} and {other:?}"
                );
            }
        }
    }

    /// Checks the answers of the table's query methods.
    fn check_what_it_says(&self) {
        for key in (0..3).map(KeyId::BigInt) {
            for owner in 0..5 {
                let has_guard =
                    self.guards.iter().any(|guard| guard.key == key && guard.owner == owner);
                assert_eq!(self.table.holds(key, owner), has_guard, "{key:?} {owner}");
            }
            let is_held = self.server.keys().any(|(held, _)| *held == key);
            let is_asked = |(asked, taken, _): &(KeyId, Taken, Session)| {
                *asked == key && matches!(taken.step, Step::Lock(_))
            };
            // A key that was refused before is being retried.
            let was_asked = self.table.keys.get(&key).is_some_and(|entry| entry.stand.is_some());
            let is_unasked = !is_held && !was_asked && self.in_flight.iter().any(is_asked);
            assert_eq!(self.table.is_unasked(key), is_unasked, "{key:?}");
        }
    }

    /// Checks that the line contains the keys whose entries wait for a wait session.
    fn check_line(&self) {
        let awaited: HashSet<KeyId> = self
            .table
            .keys
            .iter()
            .filter(|(_, entry)| {
                entry.turn.is_some_and(|turn| matches!(turn.step, Step::Wait(_)) && !turn.taken)
            })
            .map(|(key, _)| *key)
            .collect();
        let line = &self.table.common.line;
        assert_eq!(line.turns.iter().map(|(_, key)| *key).collect::<HashSet<_>>(), awaited);
        assert_eq!(line.retries.iter().map(|(_, key)| *key).collect::<HashSet<_>>(), awaited);
        assert_eq!((line.turns.len(), line.retries.len()), (awaited.len(), awaited.len()));
    }

    /// Runs until everything has ended: all waiters are granted their keys, and nothing is left.
    pub(super) fn finish(&mut self) {
        self.others.clear();
        self.act(Act::Hurry(true));
        for round in 0.. {
            assert!(round < 10_000, "it never ends: {:?} wait", self.waiting.len());
            // An owner that shares a lock and wants it exclusively waits for the others, so all release it.
            if !self.guards.is_empty() {
                self.act(Act::Leave { which: 0 });
            } else if !self.in_flight.is_empty() {
                self.act(Act::Answer);
            } else {
                break;
            }
        }
        assert!(self.waiting.is_empty(), "a waiter waits for ever: {:?}", self.waiting);
        assert!(self.server.is_empty(), "something is held: {:?}", self.server);
        assert_eq!(self.table.len(), 0, "keys are left");
    }
}
