//! The holders and the waiters of a key in this process, and the next step on the server: pure, no I/O.
//!
//! The process holds a key at the server once, on one session, which is its *seat*, and passes it on
//! among its owners, which queue here. A key's entry has one [`Step`] in flight at a time, and works
//! towards what its owners need: the first waiter gets the key when the server's lock covers its mode
//! and no holder conflicts with it; when no owner needs the lock any more, it is released.
//!
//! So that other processes get their turn, the number of local hand-offs and the time for them are limited:
//! see [`Bound`]. Then the lock is released, and the process queues behind the waiters on the server.
//!
//! A key that another session holds stands in a *line* for a wait session, which waits in the server's queue
//! for one key at a time. Meanwhile the shared session retries the key.
//!
//! Every operation takes time that is at most logarithmic in the number of keys and waiters. An operation that
//! notifies several waiters takes that time for each of them.

mod entry;
mod holders;
mod line;
mod queue;

use std::collections::VecDeque;
use std::collections::hash_map::{Entry as Slot, HashMap, OccupiedEntry};
use std::time::{Duration, Instant};

use crate::key::KeyId;
use crate::metrics;
use crate::mode::{Mode, Modes};
use crate::session::MOST_KEYS;
use entry::{Entry, Turn, Waiter};
use line::{LAST_RETRY, Line};

/// Identifies an owner: each handle is one, by its address. Only an acquire whose future was forgotten leaves it to a
/// later handle.
pub(super) type OwnerId = usize;

/// The keys of a process: `S` is a session where they are held, `W` notifies a waiter of the result.
pub(super) struct Table<S, W> {
    // Invariant: every entry has a holder, a waiter, a step, or something that the server has granted.
    // Boxed, because a map has room for a third more than it holds.
    keys: HashMap<KeyId, Box<Entry<S, W>>>,
    common: Common<S, W>,
}

/// What the entries of a table have in common.
struct Common<S, W> {
    bound: Bound,
    line: Line,
    /// What has followed from changes so far.
    effects: VecDeque<Effect<S, W>>,
}

/// How often, and for how long, a lock is handed off inside the process before other processes get their turn.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bound {
    pub(super) count: u32,
    pub(super) time: Duration,
}

/// What the server, or a session that waits there for us, is to do for a key.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Step {
    /// Take it if it is free.
    Lock(Mode),
    /// Wait for it, on a session of its own.
    Wait(Mode),
    /// Look whether another session waits for it.
    Look,
    /// Take it exclusively in addition to the shared lock, if no other session shares it.
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
    /// It would wait for an owner that waits for it.
    Deadlock(W),
    /// The key was released: `true` if the server has answered, `false` if the key was handed off without asking it.
    Released(W, bool),
    /// There is a step to take on the shared session, with [`Table::take`].
    Start(KeyId),
    /// There is one for the wait session that holds the key, with [`Table::take`].
    StartApart(KeyId),
    /// A key has entered the line, see [`Table::take_wait`].
    Line,
    /// No owner needs the wait for this key any more.
    Abandon(KeyId),
}

/// The result of [`Table::want`].
#[derive(Debug, Eq, PartialEq)]
pub(super) enum Want<S> {
    Granted(S),
    Busy,
    Deadlock,
    /// The waiter has this number.
    Queued(i64),
}

/// The result of [`Table::leave`] and [`Table::close`].
#[derive(Debug, Eq, PartialEq)]
pub(super) enum Left {
    /// The lock is handed off, or other owners share it.
    Done,
    /// The server is asked to release it. The owner that passed a farewell is notified of the result.
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

impl<S: Clone + PartialEq, W> Table<S, W> {
    pub(super) fn new(bound: Bound) -> Self {
        let common = Common { bound, line: Line::default(), effects: VecDeque::new() };
        Self { keys: HashMap::new(), common }
    }

    /// What has followed from changes, to be taken out by the caller.
    pub(super) fn effects(&mut self) -> &mut VecDeque<Effect<S, W>> {
        &mut self.common.effects
    }

    pub(super) fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    pub(super) fn holds(&self, key: KeyId, owner: OwnerId) -> bool {
        self.keys.get(&key).is_some_and(|entry| entry.holders.get(owner).is_some())
    }

    /// Whether the server has not answered for a key yet, with anything.
    pub(super) fn is_unasked(&self, key: KeyId) -> bool {
        let asks = |turn: Turn| matches!(turn.step, Step::Lock(_));
        self.keys.get(&key).is_some_and(|entry| {
            entry.seat.is_none() && entry.stand.is_none() && entry.turn.is_some_and(asks)
        })
    }

    /// Since when the process has held a key on its seat.
    pub(super) fn held_since(&self, key: KeyId) -> Option<Instant> {
        let entry = self.keys.get(&key)?;
        entry.seat.is_some().then_some(entry.granted)
    }

    pub(super) fn len(&self) -> usize {
        self.keys.len()
    }

    /// How many keys stand in the line.
    pub(super) fn line_len(&self) -> usize {
        self.common.line.turns.len()
    }

    /// The key that is next in the line.
    pub(super) fn first_in_line(&self) -> Option<KeyId> {
        self.common.line.turns.first().map(|(_, key)| *key)
    }

    /// When a key in the line is to be tried again.
    pub(super) fn next_retry(&self) -> Option<Instant> {
        self.common.line.retries.first().map(|(retry, _)| *retry)
    }

    /// Has the keys tried again that are due.
    pub(super) fn retry(&mut self, now: Instant) {
        while let Some(&(due, key)) = self.common.line.retries.first()
            && due <= now
        {
            let Some(entry) = self.keys.get_mut(&key) else {
                self.common.line.retries.pop_first();
                continue;
            };
            entry.leave_line(key, &mut self.common.line);
            if let (Some(Turn { step: Step::Wait(mode), .. }), Some(stand)) =
                (entry.turn, &mut entry.stand)
            {
                stand.pause = LAST_RETRY.min(2 * stand.pause);
                let id = self.common.line.next_number();
                entry.turn = Some(Turn { id, step: Step::Lock(mode), taken: false });
                self.common.effects.push_back(Effect::Start(key));
            }
        }
    }

    /// An owner wants a key. If it has to wait, `tell` makes the value that notifies it.
    pub(super) fn want(
        &mut self,
        key: KeyId,
        owner: OwnerId,
        (mode, waits): (Mode, bool),
        tell: impl FnOnce() -> (W, metrics::Waiting),
        now: Instant,
    ) -> Want<S> {
        let mut slot = match self.keys.entry(key) {
            Slot::Occupied(slot) => slot,
            Slot::Vacant(slot) => slot.insert_entry(Box::new(Entry::new(now))),
        };
        let entry = slot.get_mut();
        let mine = entry.holders.get(owner);
        if let (Some(mine), Some(seat)) = (mine, &entry.seat) {
            // Re-entrant: an exclusive guard covers all that the same owner wants.
            if mode == Mode::Shared || mine.is_exclusive() {
                let seat = seat.clone();
                entry.holders.count(owner, mode);
                return Want::Granted(seat);
            }
            if !waits && entry.holders.len() > 1 {
                return Want::Busy;
            }
            // Two owners that share the lock would wait for each other for ever.
            let by_another = |first: &Waiter<W>| first.owner != owner && entry.upgrades(first);
            if entry.queue.front().is_some_and(by_another) {
                return if waits { Want::Deadlock } else { Want::Busy };
            }
        }
        if !waits && mine.is_none() && entry.is_plainly_busy(mode) {
            return Want::Busy;
        }
        // Usually no number is needed: a lock that can be handed off is granted at once.
        if entry.queue.is_empty()
            && entry.may_change()
            && entry.admits(owner, mode, self.common.bound, now)
            && let Some(seat) = entry.seat.clone()
        {
            entry.leave_line(key, &mut self.common.line);
            entry.turn = None;
            entry.admit(owner, mode);
            entry.part(&mut self.common.effects, false);
            advance(slot, &mut self.common, now);
            return Want::Granted(seat);
        }
        let (tell, waiting) = tell();
        let mut waiter = Waiter { owner, mode, waits, tell, waiting };
        // An owner that upgrades its lock waits for others only.
        if entry.is_plainly_busy(mode) && (mine.is_none() || entry.holders.len() > 1) {
            waiter.waiting.start();
        }
        let id = entry.queue.push(self.common.line.next_number(), waiter, mine.is_some());
        advance(slot, &mut self.common, now);
        Want::Queued(id)
    }

    /// A guard that was granted on this seat is released.
    pub(super) fn leave(
        &mut self,
        key: KeyId,
        (owner, mode): (OwnerId, Mode),
        seat: &S,
        farewell: Option<impl FnOnce() -> W>,
        now: Instant,
    ) -> Left {
        let Slot::Occupied(mut slot) = self.keys.entry(key) else { return Left::Stale };
        let entry = slot.get_mut();
        if entry.seat.as_ref() != Some(seat) || !entry.holders.uncount(owner, mode) {
            return Left::Stale;
        }
        let entry = advance(slot, &mut self.common, now);
        left(entry, farewell)
    }

    /// All guards of an owner are released.
    pub(super) fn close(
        &mut self,
        key: KeyId,
        owner: OwnerId,
        farewell: impl FnOnce() -> W,
        now: Instant,
    ) -> Left {
        let Slot::Occupied(mut slot) = self.keys.entry(key) else { return Left::Stale };
        if !slot.get_mut().holders.remove(owner) {
            return Left::Stale;
        }
        let entry = advance(slot, &mut self.common, now);
        left(entry, Some(farewell))
    }

    /// A waiter stops waiting. Returns whether it still waited.
    pub(super) fn cancel(&mut self, key: KeyId, waiter: i64, now: Instant) -> bool {
        let Slot::Occupied(mut slot) = self.keys.entry(key) else { return false };
        let cancelled = slot.get_mut().queue.remove(waiter).is_some();
        if cancelled {
            advance(slot, &mut self.common, now);
        }
        cancelled
    }

    /// The step to take for a key on the shared session, or on the wait session that holds the key, if there still is
    /// one. From here on it is in flight.
    pub(super) fn take(&mut self, key: KeyId, on_shared: bool) -> Option<Taken> {
        let entry = self.keys.get_mut(&key)?;
        if entry.is_for_shared()? == on_shared { entry.take() } else { None }
    }

    /// The next key in the line, and how long to wait for it: the step is a [`Step::Wait`], which from
    /// here on is in flight.
    pub(super) fn take_wait(&mut self, now: Instant) -> Option<(KeyId, Taken, Duration)> {
        while let Some((_, key)) = self.common.line.turns.pop_first() {
            let Some(entry) = self.keys.get_mut(&key) else { continue };
            entry.leave_line(key, &mut self.common.line);
            let Some(stand) = &mut entry.stand else { continue };
            let slice = stand.turn(now, self.common.line.turns.len());
            if let Some(taken) = entry.take() {
                return Some((key, taken, slice));
            }
        }
        None
    }

    /// A step was taken, with this answer, which only [`Step::Unlock`] and [`Step::Downgrade`] do not
    /// depend on.
    pub(super) fn taken(
        &mut self,
        key: KeyId,
        id: u64,
        (seat, yes): (&S, bool),
        now: Instant,
    ) -> bool {
        let Slot::Occupied(mut slot) = self.keys.entry(key) else { return false };
        let entry = slot.get_mut();
        let Some(turn) = entry.turn.filter(|turn| turn.id == id && turn.taken) else {
            return false;
        };
        entry.turn = None;
        match (turn.step, yes) {
            (Step::Lock(mode) | Step::Wait(mode), true) => {
                entry.apart = matches!(turn.step, Step::Wait(_));
                entry.granted(mode, seat, now);
            }
            (Step::Lock(_) | Step::Wait(_), false) => {
                entry.refused(key, &mut self.common, now);
            }
            (Step::Look, true) => {
                entry.closing = true;
                metrics::update(|| entry.queue.all_wait());
                entry.dismiss(&mut self.common.effects);
            }
            (Step::Look, false) => entry.renew(now),
            (Step::Upgrade, true) => entry.server.exclusive = true,
            (Step::Upgrade, false) => {
                if entry.queue.front().is_some_and(|first| entry.upgrades(first))
                    && let Some(waiter) = entry.queue.pop_front()
                {
                    // Another session shares the lock that it wants exclusively.
                    let turned_away = if waiter.waits { Effect::Deadlock } else { Effect::Refused };
                    self.common.effects.push_back(turned_away(waiter.tell));
                }
            }
            (Step::Downgrade, _) => {
                entry.server = Modes { exclusive: false, shared: true };
                entry.part(&mut self.common.effects, true);
            }
            (Step::Renew(mode), true) => {
                entry.part(&mut self.common.effects, true);
                entry.granted(mode, seat, now);
            }
            (Step::Renew(_), false) => {
                entry.given_up(&mut self.common.effects);
                entry.refused(key, &mut self.common, now);
            }
            (Step::Unlock, _) => entry.given_up(&mut self.common.effects),
        }
        advance(slot, &mut self.common, now);
        true
    }

    /// A wait was over before the key was granted. Returns whether the key still waited.
    pub(super) fn not_granted(&mut self, key: KeyId, id: u64, now: Instant) -> bool {
        let Slot::Occupied(mut slot) = self.keys.entry(key) else { return false };
        let entry = slot.get_mut();
        if entry.turn.is_none_or(|turn| turn.id != id) {
            return false;
        }
        entry.turn = None;
        entry.refused(key, &mut self.common, now);
        advance(slot, &mut self.common, now);
        true
    }

    /// A step failed. Returns the waiters for it: none if it was called off before.
    pub(super) fn failed(&mut self, key: KeyId, id: u64) -> Vec<W> {
        let Slot::Occupied(mut slot) = self.keys.entry(key) else { return Vec::new() };
        let entry = slot.get_mut();
        if entry.turn.is_none_or(|turn| turn.id != id) {
            return Vec::new();
        }
        entry.leave_line(key, &mut self.common.line);
        entry.turn = None;
        entry.stand = None;
        let waiters = entry.queue.take_all().map(|waiter| waiter.tell).collect();
        if entry.is_unused() {
            slot.remove();
        }
        waiters
    }

    /// A step failed half-way: this is what the server has granted. Returns the waiters for it, unless it was `done`,
    /// or called off before.
    pub(super) fn failed_half_way(
        &mut self,
        key: KeyId,
        id: u64,
        done: bool,
        (seat, server): (&S, Modes),
        now: Instant,
    ) -> Vec<W> {
        let Slot::Occupied(mut slot) = self.keys.entry(key) else { return Vec::new() };
        let entry = slot.get_mut();
        let Some(turn) = entry.turn.filter(|turn| turn.id == id) else { return Vec::new() };
        entry.leave_line(key, &mut self.common.line);
        entry.turn = None;
        let mut waiters = Vec::new();
        entry.stand = None;
        if !done {
            waiters.extend(entry.queue.take_all().map(|waiter| waiter.tell));
        }
        if server == Modes::default() {
            entry.given_up(&mut self.common.effects);
        } else {
            if turn.step == Step::Downgrade && !server.exclusive {
                // It was taken before the statement failed.
                entry.part(&mut self.common.effects, true);
            }
            if entry.seat.is_none() {
                entry.apart = false;
                entry.granted = now;
                entry.renew(now);
            }
            entry.server = server;
            entry.seat = Some(seat.clone());
        }
        advance(slot, &mut self.common, now);
        waiters
    }

    /// A session was lost, and with it all that was held there. Returns the owners to notify of a release of
    /// its keys; the waiters for those keys ask again.
    pub(super) fn lost(&mut self, seat: &S, now: Instant) -> Vec<W> {
        let of_it = self.keys.iter().filter(|(_, entry)| entry.seat.as_ref() == Some(seat));
        let keys: Vec<KeyId> = of_it.map(|(key, _)| *key).collect();
        let mut farewells = Vec::new();
        for key in keys {
            farewells.append(&mut self.lost_key(key, seat, now));
        }
        farewells
    }

    /// Some of the keys that are held there.
    pub(super) fn some_at(&self, seat: &S) -> Vec<KeyId> {
        let there = self.keys.iter().filter(|(_, entry)| entry.seat.as_ref() == Some(seat));
        let mut keys: Vec<_> = there.map(|(key, _)| *key).take(MOST_KEYS + 1).collect();
        keys.sort_unstable();
        keys
    }

    /// One key was lost with its session, if it was held there. Returns the same as [`lost`](Self::lost).
    pub(super) fn lost_key(&mut self, key: KeyId, seat: &S, now: Instant) -> Vec<W> {
        let Slot::Occupied(mut slot) = self.keys.entry(key) else { return Vec::new() };
        let entry = slot.get_mut();
        if entry.seat.as_ref() != Some(seat) {
            return Vec::new();
        }
        let farewells = std::mem::take(&mut entry.farewells);
        entry.holders = holders::Holders::default();
        entry.server = Modes::default();
        entry.seat = None;
        entry.turn = None;
        advance(slot, &mut self.common, now);
        farewells
    }

    /// Takes out all waiters.
    pub(super) fn dismiss_all(&mut self, now: Instant) -> Vec<W> {
        let awaited = self.keys.iter().filter(|(_, entry)| !entry.queue.is_empty());
        let keys: Vec<KeyId> = awaited.map(|(key, _)| *key).collect();
        let mut waiters = Vec::new();
        for key in keys {
            let Slot::Occupied(mut slot) = self.keys.entry(key) else { continue };
            waiters.extend(slot.get_mut().queue.take_all().map(|waiter| waiter.tell));
            advance(slot, &mut self.common, now);
        }
        waiters
    }

    /// Forgets everything, because all sessions were lost. Returns the sessions, and the owners to notify of a
    /// release; the waiters ask again.
    pub(super) fn clear(&mut self) -> (Vec<S>, Vec<W>) {
        self.common.line.turns.clear();
        self.common.line.retries.clear();
        let (mut seats, mut farewells) = (Vec::new(), Vec::new());
        for (_, entry) in self.keys.drain() {
            seats.extend(entry.seat);
            farewells.extend(entry.farewells);
        }
        (seats, farewells)
    }
}

/// Admits the waiters that can be admitted, and finds the next step. Returns the entry, if it is still in use.
///
/// Every change of an entry ends with this. It takes the place in the map, so that the key is hashed and looked
/// up only once. (The hash is slow, because a key may be chosen by an attacker.)
fn advance<'t, S: Clone + PartialEq, W>(
    mut slot: OccupiedEntry<'t, KeyId, Box<Entry<S, W>>>,
    common: &mut Common<S, W>,
    now: Instant,
) -> Option<&'t mut Entry<S, W>> {
    let key = *slot.key();
    slot.get_mut().advance(key, common, now);
    if slot.get().is_unused() {
        slot.remove();
        return None;
    }
    Some(slot.into_mut())
}

/// An owner has left. It is notified of the result, if the server is asked to release the lock.
fn left<S, W>(entry: Option<&mut Entry<S, W>>, farewell: Option<impl FnOnce() -> W>) -> Left {
    let told = |turn: Turn| matches!(turn.step, Step::Unlock | Step::Downgrade);
    match (entry, farewell) {
        (Some(entry), Some(farewell)) if entry.turn.is_some_and(told) => {
            entry.farewells.push(farewell());
            Left::Told
        }
        _ => Left::Done,
    }
}

#[cfg(test)]
mod tests;
