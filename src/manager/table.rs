//! Who in this process holds a key, who waits for it, and what the server is to be asked: pure, no I/O.
//!
//! The process holds a key at the server once, on one session, which is its *seat*, and passes it on
//! among its owners, who queue here. A key's entry has one [`Step`] under way at a time, and works
//! towards what its owners need: the first in the queue gets the key when the server's lock covers him
//! and nobody who holds it is in his way; when nobody needs the lock any more, it is given up.
//!
//! So that other processes get their turn, a lock is passed on only so often, and for so long: see
//! [`Bound`]. Then it goes back to the server, behind all who wait there.

mod holders;

use std::collections::VecDeque;
use std::collections::hash_map::{Entry as Slot, HashMap, OccupiedEntry};
use std::time::{Duration, Instant};

use crate::key::KeyId;
use crate::mode::Mode;
use crate::session::ledger::Modes;
use holders::Holders;

/// Tells owners apart: each handle is one.
pub(super) type OwnerId = u64;

/// A session on which the server can grant a key.
pub(super) trait Seat: Clone + PartialEq {
    /// Whether many keys share it, so that it must never wait.
    fn is_shared(&self) -> bool;
}

/// The keys of a process: `S` is where they are held, `W` tells a waiter how it went.
#[derive(Debug)]
pub(super) struct Table<S, W> {
    // Invariant: every entry has a holder, a waiter, a step, or something that the server has granted.
    // Boxed, for a map has room for a third more than it holds.
    keys: HashMap<KeyId, Box<Entry<S, W>>>,
    bound: Bound,
    numbers: Numbers,
}

/// Tells waiters and steps apart.
#[derive(Debug, Default)]
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 += 1;
        self.0
    }
}

/// How often, and for how long, a lock is passed on inside the process before others get their turn.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bound {
    pub(super) count: u32,
    pub(super) time: Duration,
}

/// What the server, or somebody who waits there for us, is to do for a key.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Step {
    /// Take it if it is free.
    Lock(Mode),
    /// Wait for it, on a session of its own.
    Wait(Mode),
    /// Look whether another session waits for it.
    Look,
    /// Take it exclusively beside the shared lock, if nobody else shares it.
    Upgrade,
    /// Keep only the shared lock.
    Downgrade,
    /// Give it up, then take it if it is still free.
    Renew(Mode),
    /// Give it up.
    Unlock,
}

/// What follows from a change.
#[derive(Debug, Eq, PartialEq)]
pub(super) enum Effect<S, W> {
    /// The waiter holds the key, on this seat.
    Granted(W, S),
    /// It is busy, and the request does not wait.
    Refused(W),
    /// It would wait for one who waits for it.
    Deadlock(W),
    /// The key was given up, or passed on.
    Released(W),
    /// There is a step to take on the shared session, with [`Table::take_for_shared`].
    Start(KeyId),
    /// There is one for a session of its own, with [`Table::take_apart`].
    StartApart(KeyId),
    /// Nobody needs the wait for this key any more.
    Abandon(KeyId),
}

/// What came of a wish.
#[derive(Debug, Eq, PartialEq)]
pub(super) enum Want<S> {
    Granted(S),
    Busy,
    Deadlock,
    /// The waiter has this number.
    Queued(u64),
}

/// What came of a departure.
#[derive(Debug, Eq, PartialEq)]
pub(super) enum Left {
    /// The lock is passed on, or others share it.
    Done,
    /// The server is told. Whoever said farewell hears of it.
    Told,
    /// That grant ended with its session.
    Stale,
}

/// A step that is to be taken.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Taken {
    pub(super) id: u64,
    pub(super) step: Step,
    /// What the server has granted so far.
    pub(super) server: Modes,
}

#[derive(Debug)]
struct Entry<S, W> {
    holders: Holders,
    server: Modes,
    /// `Some` while the server has granted something.
    seat: Option<S>,
    turn: Option<Turn>,
    /// When the server granted the lock, and how often it was passed on since.
    since: Instant,
    handed: u32,
    /// Another session was seen waiting, so nobody is let in until those who share the lock are through,
    /// even if it gives up.
    closing: bool,
    queue: VecDeque<Waiter<W>>,
    /// Who wants to hear that the key was given up. Boxed, for a key that is held has none.
    farewells: Option<Box<Farewells<W>>>,
}

#[derive(Debug)]
struct Farewells<W> {
    first: W,
    others: Vec<W>,
}

#[derive(Debug)]
struct Waiter<W> {
    id: u64,
    owner: OwnerId,
    mode: Mode,
    patient: bool,
    tell: W,
}

#[derive(Clone, Copy, Debug)]
struct Turn {
    id: u64,
    step: Step,
    /// Before that it can still be called off.
    taken: bool,
}

impl<S: Seat, W> Table<S, W> {
    pub(super) fn new(bound: Bound) -> Self {
        Self { keys: HashMap::new(), bound, numbers: Numbers::default() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    pub(super) fn holds(&self, key: KeyId, owner: OwnerId) -> bool {
        self.keys.get(&key).is_some_and(|entry| entry.holders.get(owner).is_some())
    }

    /// Whether a key is held on this seat.
    pub(super) fn is_seated(&self, key: KeyId, seat: &S) -> bool {
        self.keys.get(&key).is_some_and(|entry| entry.seat.as_ref() == Some(seat))
    }

    /// Whether the server has not answered for a key yet, with anything.
    pub(super) fn is_unasked(&self, key: KeyId) -> bool {
        let asks = |turn: Turn| matches!(turn.step, Step::Lock(_));
        let entry = self.keys.get(&key);
        entry.is_some_and(|entry| entry.seat.is_none() && entry.turn.is_some_and(asks))
    }

    /// Whether anything is held on the shared session, or to be done there.
    pub(super) fn needs_shared(&self) -> bool {
        self.keys.values().any(|entry| match (&entry.seat, entry.turn) {
            (Some(seat), _) => seat.is_shared(),
            (None, turn) => turn.is_some_and(|turn| !matches!(turn.step, Step::Wait(_))),
        })
    }

    /// An owner wants a key. If he has to wait, `tell` makes what he is told by.
    pub(super) fn want(
        &mut self,
        key: KeyId,
        owner: OwnerId,
        (mode, patient): (Mode, bool),
        tell: impl FnOnce() -> W,
        now: Instant,
        effects: &mut Vec<Effect<S, W>>,
    ) -> Want<S> {
        let mut slot = match self.keys.entry(key) {
            Slot::Occupied(slot) => slot,
            Slot::Vacant(slot) => slot.insert_entry(Box::new(Entry::new(now))),
        };
        let entry = slot.get_mut();
        let mine = entry.holders.get(owner);
        if let (Some(mine), Some(seat)) = (mine, &entry.seat) {
            // Stacking: an exclusive guard covers all that the same owner wants.
            if mode == Mode::Shared || mine.is_exclusive() {
                let seat = seat.clone();
                entry.holders.count(owner, mode);
                return Want::Granted(seat);
            }
            if !patient && entry.holders.len() > 1 {
                return Want::Busy;
            }
            // Two who share the lock would wait for each other for ever.
            let by_another = |first: &Waiter<W>| first.owner != owner && entry.upgrades(first);
            if entry.queue.front().is_some_and(by_another) {
                return if patient { Want::Deadlock } else { Want::Busy };
            }
        }
        if !patient && mine.is_none() && entry.is_plainly_busy(mode) {
            return Want::Busy;
        }
        // Mostly no number is needed: what is free to be passed on is granted at once.
        if entry.queue.is_empty()
            && entry.may_change()
            && entry.admits(owner, mode, self.bound, now)
            && let Some(seat) = entry.seat.clone()
        {
            entry.turn = None;
            entry.admit(owner, mode);
            entry.part(effects);
            advance(slot, self.bound, &mut self.numbers, now, effects);
            return Want::Granted(seat);
        }
        let id = self.numbers.next();
        let waiter = Waiter { id, owner, mode, patient, tell: tell() };
        if entry.queue.is_empty() {
            // Mostly nobody follows.
            entry.queue.reserve_exact(1);
        }
        if mine.is_some() {
            entry.queue.push_front(waiter);
        } else {
            entry.queue.push_back(waiter);
        }
        advance(slot, self.bound, &mut self.numbers, now, effects);
        Want::Queued(id)
    }

    /// A guard goes that was granted on this seat.
    pub(super) fn leave(
        &mut self,
        key: KeyId,
        (owner, mode): (OwnerId, Mode),
        seat: &S,
        farewell: Option<impl FnOnce() -> W>,
        now: Instant,
        effects: &mut Vec<Effect<S, W>>,
    ) -> Left {
        let Slot::Occupied(mut slot) = self.keys.entry(key) else { return Left::Stale };
        let entry = slot.get_mut();
        if entry.seat.as_ref() != Some(seat) || !entry.holders.uncount(owner, mode) {
            return Left::Stale;
        }
        let entry = advance(slot, self.bound, &mut self.numbers, now, effects);
        left(entry, farewell)
    }

    /// All guards of an owner go.
    pub(super) fn close(
        &mut self,
        key: KeyId,
        owner: OwnerId,
        farewell: impl FnOnce() -> W,
        now: Instant,
        effects: &mut Vec<Effect<S, W>>,
    ) -> Left {
        let Slot::Occupied(mut slot) = self.keys.entry(key) else { return Left::Stale };
        if !slot.get_mut().holders.remove(owner) {
            return Left::Stale;
        }
        let entry = advance(slot, self.bound, &mut self.numbers, now, effects);
        left(entry, Some(farewell))
    }

    /// A waiter gives up. Returns whether it still waited.
    pub(super) fn cancel(
        &mut self,
        key: KeyId,
        waiter: u64,
        now: Instant,
        effects: &mut Vec<Effect<S, W>>,
    ) -> bool {
        let Slot::Occupied(mut slot) = self.keys.entry(key) else { return false };
        let queue = &mut slot.get_mut().queue;
        let before = queue.len();
        queue.retain(|queued| queued.id != waiter);
        let cancelled = queue.len() < before;
        if cancelled {
            advance(slot, self.bound, &mut self.numbers, now, effects);
        }
        cancelled
    }

    /// The step to take for a key on the shared session, if there still is one. From here on it is under
    /// way.
    pub(super) fn take_for_shared(&mut self, key: KeyId) -> Option<Taken> {
        let entry = self.keys.get_mut(&key)?;
        if entry.is_for_shared()? { entry.take() } else { None }
    }

    /// The same on a session of the key's own.
    pub(super) fn take_apart(&mut self, key: KeyId) -> Option<Taken> {
        let entry = self.keys.get_mut(&key)?;
        if entry.is_for_shared()? { None } else { entry.take() }
    }

    /// A step was taken, with this answer, which only [`Step::Unlock`] and [`Step::Downgrade`] do not
    /// depend on.
    pub(super) fn taken(
        &mut self,
        key: KeyId,
        id: u64,
        (seat, yes): (&S, bool),
        now: Instant,
        effects: &mut Vec<Effect<S, W>>,
    ) -> bool {
        let Slot::Occupied(mut slot) = self.keys.entry(key) else { return false };
        let entry = slot.get_mut();
        let Some(turn) = entry.turn.filter(|turn| turn.id == id && turn.taken) else {
            return false;
        };
        entry.turn = None;
        match (turn.step, yes) {
            (Step::Lock(mode) | Step::Wait(mode), true) => entry.granted(mode, seat, now),
            (Step::Lock(_) | Step::Wait(_), false) => {
                entry.refused(key, &mut self.numbers, effects);
            }
            (Step::Look, true) => {
                entry.closing = true;
                entry.dismiss(effects);
            }
            (Step::Look, false) => entry.renew(now),
            (Step::Upgrade, true) => entry.server.exclusive = true,
            (Step::Upgrade, false) => {
                if entry.queue.front().is_some_and(|first| entry.upgrades(first))
                    && let Some(waiter) = entry.queue.pop_front()
                {
                    effects.push(waiter.turned_away());
                }
            }
            (Step::Downgrade, _) => {
                entry.server = Modes { exclusive: false, shared: true };
                entry.part(effects);
            }
            (Step::Renew(mode), true) => {
                entry.part(effects);
                entry.granted(mode, seat, now);
            }
            (Step::Renew(_), false) => {
                entry.given_up(effects);
                entry.refused(key, &mut self.numbers, effects);
            }
            (Step::Unlock, _) => entry.given_up(effects),
        }
        advance(slot, self.bound, &mut self.numbers, now, effects);
        true
    }

    /// A step failed. Returns who waited for it, unless it was called off before.
    pub(super) fn failed(&mut self, key: KeyId, id: u64) -> Option<Vec<W>> {
        let Slot::Occupied(mut slot) = self.keys.entry(key) else { return None };
        let entry = slot.get_mut();
        entry.turn.filter(|turn| turn.id == id)?;
        entry.turn = None;
        let waiters = entry.queue.drain(..).map(|waiter| waiter.tell).collect();
        if entry.is_unused() {
            slot.remove();
        }
        Some(waiters)
    }

    /// After a step of which nobody knew how far it came: this is what the server has granted.
    pub(super) fn corrected(
        &mut self,
        key: KeyId,
        (seat, server): (&S, Modes),
        now: Instant,
        effects: &mut Vec<Effect<S, W>>,
    ) {
        let Slot::Occupied(mut slot) = self.keys.entry(key) else { return };
        let entry = slot.get_mut();
        entry.turn = None;
        if server == Modes::default() {
            entry.given_up(effects);
        } else {
            if entry.seat.is_none() {
                entry.renew(now);
            }
            entry.server = server;
            entry.seat = Some(seat.clone());
        }
        advance(slot, self.bound, &mut self.numbers, now, effects);
    }

    /// A session was lost, and with it all that was held there. Returns who wanted to hear that a key
    /// of it was given up; those who wait for one ask again.
    pub(super) fn lost(
        &mut self,
        seat: &S,
        now: Instant,
        effects: &mut Vec<Effect<S, W>>,
    ) -> Vec<W> {
        let of_it = self.keys.iter().filter(|(_, entry)| entry.seat.as_ref() == Some(seat));
        let keys: Vec<KeyId> = of_it.map(|(key, _)| *key).collect();
        let mut farewells = Vec::new();
        for key in keys {
            farewells.append(&mut self.lost_key(key, seat, now, effects));
        }
        farewells
    }

    /// The same for one key, if it was held there.
    pub(super) fn lost_key(
        &mut self,
        key: KeyId,
        seat: &S,
        now: Instant,
        effects: &mut Vec<Effect<S, W>>,
    ) -> Vec<W> {
        let Slot::Occupied(mut slot) = self.keys.entry(key) else { return Vec::new() };
        let entry = slot.get_mut();
        if entry.seat.as_ref() != Some(seat) {
            return Vec::new();
        }
        let farewells =
            entry.farewells.take().map_or_else(Vec::new, |farewells| farewells.all().collect());
        entry.holders = Holders::default();
        entry.server = Modes::default();
        entry.seat = None;
        entry.turn = None;
        advance(slot, self.bound, &mut self.numbers, now, effects);
        farewells
    }
}

/// Lets in who can be let in, and finds the next step. Returns the entry, if somebody still needs it.
///
/// Every change of an entry ends with this. It has the place in the map, so that the key, which anybody
/// may have chosen and is hashed for that, is looked up only once.
fn advance<'t, S: Seat, W>(
    mut slot: OccupiedEntry<'t, KeyId, Box<Entry<S, W>>>,
    bound: Bound,
    numbers: &mut Numbers,
    now: Instant,
    effects: &mut Vec<Effect<S, W>>,
) -> Option<&'t mut Entry<S, W>> {
    let key = *slot.key();
    slot.get_mut().advance(key, bound, numbers, now, effects);
    if slot.get().is_unused() {
        slot.remove();
        return None;
    }
    Some(slot.into_mut())
}

/// Somebody has left. He hears how it went, if the server is told.
fn left<S: Seat, W>(entry: Option<&mut Entry<S, W>>, farewell: Option<impl FnOnce() -> W>) -> Left {
    let told = |turn: Turn| matches!(turn.step, Step::Unlock | Step::Downgrade);
    match (entry, farewell) {
        (Some(entry), Some(farewell)) if entry.turn.is_some_and(told) => {
            if let Some(farewells) = &mut entry.farewells {
                farewells.others.push(farewell());
            } else {
                let first = Farewells { first: farewell(), others: Vec::new() };
                entry.farewells = Some(Box::new(first));
            }
            Left::Told
        }
        _ => Left::Done,
    }
}

impl<S: Seat, W> Entry<S, W> {
    fn new(now: Instant) -> Self {
        Self {
            holders: Holders::default(),
            server: Modes::default(),
            seat: None,
            turn: None,
            since: now,
            handed: 0,
            closing: false,
            queue: VecDeque::new(),
            farewells: None,
        }
    }

    /// Lets in who can be let in, and finds the next step.
    fn advance(
        &mut self,
        key: KeyId,
        bound: Bound,
        numbers: &mut Numbers,
        now: Instant,
        effects: &mut Vec<Effect<S, W>>,
    ) {
        if !self.may_change() {
            if self.queue.is_empty()
                && let Some(Turn { step: Step::Wait(_), .. }) = self.turn
            {
                self.turn = None;
                effects.push(Effect::Abandon(key));
            }
            return;
        }
        let before = self.turn.take();
        while let Some((owner, mode)) = self.queue.front().map(|first| (first.owner, first.mode))
            && self.admits(owner, mode, bound, now)
            && let Some(seat) = self.seat.clone()
            && let Some(first) = self.queue.pop_front()
        {
            self.admit(owner, mode);
            self.part(effects);
            effects.push(Effect::Granted(first.tell, seat));
        }
        if self.queue.is_empty() {
            // Mostly a key is held, and nobody waits: then it needs no room for him.
            self.queue = VecDeque::new();
        }
        let Some(step) = self.next_step() else { return };
        // To take what was found busy a moment ago, is to wait for it.
        let same = |turn: &Turn| {
            turn.step == step || matches!((turn.step, step), (Step::Wait(_), Step::Lock(_)))
        };
        if let Some(before) = before.filter(same) {
            self.turn = Some(before);
            return;
        }
        self.turn = Some(Turn { id: numbers.next(), step, taken: false });
        let shared = self.is_for_shared() == Some(true);
        effects.push(if shared { Effect::Start(key) } else { Effect::StartApart(key) });
    }

    /// The lock was busy: requests that do not wait are refused, the others wait on a session of their own.
    fn refused(&mut self, key: KeyId, numbers: &mut Numbers, effects: &mut Vec<Effect<S, W>>) {
        self.dismiss(effects);
        if let Some(first) = self.queue.front() {
            let step = Step::Wait(first.mode);
            self.turn = Some(Turn { id: numbers.next(), step, taken: false });
            effects.push(Effect::StartApart(key));
        }
    }

    fn take(&mut self) -> Option<Taken> {
        let turn = self.turn.as_mut().filter(|turn| !turn.taken)?;
        turn.taken = true;
        Some(Taken { id: turn.id, step: turn.step, server: self.server })
    }

    fn is_for_shared(&self) -> Option<bool> {
        let turn = self.turn.filter(|turn| !turn.taken)?;
        let own = self.seat.as_ref().is_some_and(|seat| !seat.is_shared());
        Some(!own && !matches!(turn.step, Step::Wait(_)))
    }

    fn covers(&self, mode: Mode) -> bool {
        self.server.exclusive || mode == Mode::Shared && self.server.shared
    }

    /// No step is under way that cannot be called off.
    fn may_change(&self) -> bool {
        self.turn.is_none_or(|turn| !turn.taken)
    }

    /// Somebody has it, or will have it first, so asking the server is no use.
    fn is_plainly_busy(&self, mode: Mode) -> bool {
        let waits = self.turn.is_some_and(|turn| matches!(turn.step, Step::Wait(_)));
        let exclusive = |waiter: &Waiter<W>| waiter.mode == Mode::Exclusive;
        match mode {
            Mode::Exclusive => waits || !self.holders.is_empty() || !self.queue.is_empty(),
            Mode::Shared => {
                waits
                    || self.holders.has_exclusive()
                    || self.closing && !self.holders.is_empty()
                    || self.queue.iter().any(exclusive)
            }
        }
    }

    /// Whether an owner can be let in as things are.
    fn admits(&self, owner: OwnerId, mode: Mode, bound: Bound, now: Instant) -> bool {
        if !self.covers(mode) {
            return false;
        }
        // Who holds it already waits for nobody else's turn.
        if self.holders.get(owner).is_some() {
            return self.holders.len() == 1;
        }
        let free = match mode {
            Mode::Exclusive => self.holders.is_empty(),
            Mode::Shared => !self.holders.has_exclusive(),
        };
        free && !self.closing && !self.is_due(bound, now)
    }

    /// Others are to get their turn.
    fn is_due(&self, bound: Bound, now: Instant) -> bool {
        // The first one is who it was taken for.
        self.handed > 0
            && (self.handed >= bound.count
                || now.saturating_duration_since(self.since) >= bound.time)
    }

    fn admit(&mut self, owner: OwnerId, mode: Mode) {
        if self.holders.get(owner).is_none() {
            self.handed = self.handed.saturating_add(1);
        }
        self.holders.count(owner, mode);
    }

    /// Whether a waiter holds the lock already, and wants it for itself.
    fn upgrades(&self, waiter: &Waiter<W>) -> bool {
        waiter.mode == Mode::Exclusive && self.holders.get(waiter.owner).is_some()
    }

    /// Refuses the requests that do not wait.
    fn dismiss(&mut self, effects: &mut Vec<Effect<S, W>>) {
        let waiters = std::mem::take(&mut self.queue);
        for waiter in waiters {
            if waiter.patient {
                self.queue.push_back(waiter);
            } else {
                effects.push(Effect::Refused(waiter.tell));
            }
        }
    }

    /// What works towards what is needed.
    fn next_step(&self) -> Option<Step> {
        let first = self.queue.front();
        let held = self.server.exclusive || self.server.shared;
        if !self.holders.is_empty() {
            if self.holders.has_exclusive() {
                return None;
            }
            if self.server.exclusive {
                return Some(Step::Downgrade);
            }
            let first = first?;
            let alone = self.holders.len() == 1;
            return match first.mode {
                Mode::Exclusive if alone && self.upgrades(first) => Some(Step::Upgrade),
                Mode::Shared if !self.closing => Some(Step::Look),
                Mode::Exclusive | Mode::Shared => None,
            };
        }
        match first {
            None => held.then_some(Step::Unlock),
            Some(first) if !held => Some(Step::Lock(first.mode)),
            // Its own session can only be given back.
            Some(_) if self.seat.as_ref().is_some_and(|seat| !seat.is_shared()) => {
                Some(Step::Unlock)
            }
            Some(first) => Some(Step::Renew(first.mode)),
        }
    }

    fn granted(&mut self, mode: Mode, seat: &S, now: Instant) {
        self.server = Modes { exclusive: mode == Mode::Exclusive, shared: mode == Mode::Shared };
        self.seat = Some(seat.clone());
        self.renew(now);
    }

    fn renew(&mut self, now: Instant) {
        self.closing = false;
        self.handed = 0;
        self.since = now;
    }

    fn given_up(&mut self, effects: &mut Vec<Effect<S, W>>) {
        self.server = Modes::default();
        self.seat = None;
        self.part(effects);
    }

    /// Whoever left need not wait any longer.
    fn part(&mut self, effects: &mut Vec<Effect<S, W>>) {
        if let Some(farewells) = self.farewells.take() {
            effects.extend(farewells.all().map(Effect::Released));
        }
    }

    fn is_unused(&self) -> bool {
        self.holders.is_empty()
            && self.queue.is_empty()
            && self.turn.is_none()
            && self.seat.is_none()
            && self.farewells.is_none()
    }
}

impl<W> Farewells<W> {
    fn all(self) -> impl Iterator<Item = W> {
        std::iter::once(self.first).chain(self.others)
    }
}

impl<W> Waiter<W> {
    /// Somebody else shares what this one wants for himself.
    fn turned_away<S>(self) -> Effect<S, W> {
        if self.patient { Effect::Deadlock(self.tell) } else { Effect::Refused(self.tell) }
    }
}

#[cfg(test)]
mod tests;
