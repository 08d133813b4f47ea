//! The holders and the waiters of a key in this process, and the next step on the server: pure, no I/O.
//!
//! The process holds a key on the server once, on one session, the *seat* of the key. It hands the key off
//! among its owners, which queue here. A key's entry has one [`Step`] in flight at a time, and works
//! towards what its owners need: the first waiter is granted the key when the server's lock covers its mode
//! and no holder conflicts with it; when no owner needs the lock any more, it is released.
//!
//! So that other processes get their turn, the number of local hand-offs and the time for them are limited:
//! see [`Bound`]. At the limit, the lock is released, and the process queues behind the waiters on the server.
//!
//! A key that another session holds enters the *line*: the queue of keys that wait for a wait session. A wait session
//! waits in the server's queue for one key at a time. Meanwhile the shared session retries the key.
//!
//! An operation on one key takes time that is at most logarithmic in the number of keys and waiters. An operation that
//! notifies several waiters takes that time for each of them. The loss of a session and the close of the pool, which
//! concern many keys, go through all keys.

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

/// Identifies an owner, by the address of its handle. A later handle can have the same identity only if the future of
/// an acquire was forgotten.
pub(super) type OwnerId = usize;

/// The keys of a process. `S` is the session on which a key is held, `W` notifies a waiter of the result.
pub(super) struct Table<S, W> {
    // Invariant: every entry has a holder, a waiter, a step, or something that the server has granted.
    // Boxed, because a map has room for a third more than it holds.
    keys: HashMap<KeyId, Box<Entry<S, W>>>,
    common: Common<S, W>,
}

/// The state that the entries of a table share.
struct Common<S, W> {
    bound: Bound,
    line: Line,
    /// The effects of changes that the caller has not taken out yet.
    effects: VecDeque<Effect<S, W>>,
}

/// The limits on local hand-offs of a lock, in number and time. After that, other processes get their turn.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bound {
    pub(super) count: u32,
    pub(super) time: Duration,
}

/// What a session of the manager does on the server for a key.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Step {
    /// Acquire the lock if it is free.
    Lock(Mode),
    /// Wait for the lock, on a wait session.
    Wait(Mode),
    /// Check whether another session waits for the lock.
    Look,
    /// Acquire the exclusive lock in addition to the shared one, if no other session shares it.
    Upgrade,
    /// Release the exclusive lock, and keep the shared one.
    Downgrade,
    /// Release the lock, then acquire it if it is still free.
    Renew(Mode),
    /// Release the lock.
    Unlock,
}

impl Step {
    /// Whether the step only releases a lock.
    pub(super) fn releases(self) -> bool {
        matches!(self, Self::Unlock | Self::Downgrade)
    }
}

/// A consequence of a change, which the caller of the table carries out.
#[derive(Debug, Eq, PartialEq)]
pub(super) enum Effect<S, W> {
    /// The waiter holds the key, on this seat.
    Granted(W, S),
    /// The key is busy, and the waiter's request does not wait.
    Refused(W),
    /// The waiter wants to upgrade a lock that another session shares, so waiting for it could deadlock.
    Deadlock(W),
    /// The key was released: `true` if the server has answered, `false` if the key was handed off without a round trip.
    Released(W, bool),
    /// There is a step to take on the shared session, with [`Table::take`]. It may be another one by then.
    Start(KeyId, Step),
    /// There is a step for the wait session that holds the key, with [`Table::take`].
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
    /// The server is asked to release the lock. The owner gets the result as a reply.
    Unlocking,
    /// The guard's grant had already ended, with its session.
    Stale,
}

/// A step that a session is to take.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Taken {
    pub(super) id: u64,
    pub(super) step: Step,
    /// The modes that the server has granted so far.
    pub(super) server: Modes,
}

impl<S: Clone + PartialEq, W> Table<S, W> {
    pub(super) fn new(bound: Bound) -> Self {
        let common = Common { bound, line: Line::default(), effects: VecDeque::new() };
        Self { keys: HashMap::new(), common }
    }

    /// The effects of changes, which the caller takes out.
    pub(super) fn effects(&mut self) -> &mut VecDeque<Effect<S, W>> {
        &mut self.common.effects
    }

    pub(super) fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    pub(super) fn holds(&self, key: KeyId, owner: OwnerId) -> bool {
        self.keys.get(&key).is_some_and(|entry| entry.holders.get(owner).is_some())
    }

    /// Whether the server has not answered any step of a key yet.
    pub(super) fn is_unasked(&self, key: KeyId) -> bool {
        let asks = |turn: Turn| matches!(turn.step, Step::Lock(_));
        self.keys.get(&key).is_some_and(|entry| {
            entry.seat.is_none() && entry.stand.is_none() && entry.turn.is_some_and(asks)
        })
    }

    /// When the server granted a key, if the process holds it.
    pub(super) fn held_since(&self, key: KeyId) -> Option<Instant> {
        let entry = self.keys.get(&key)?;
        entry.seat.is_some().then_some(entry.granted)
    }

    pub(super) fn len(&self) -> usize {
        self.keys.len()
    }

    /// The number of keys in the line.
    pub(super) fn line_len(&self) -> usize {
        self.common.line.turns.len()
    }

    /// The key that is next in the line.
    pub(super) fn first_in_line(&self) -> Option<KeyId> {
        self.common.line.turns.first().map(|(_, key)| *key)
    }

    /// When the next retry of a key in the line is due.
    pub(super) fn next_retry(&self) -> Option<Instant> {
        self.common.line.retries.first().map(|(retry, _)| *retry)
    }

    /// Starts a retry of each key in the line that is due.
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
                self.common.effects.push_back(Effect::Start(key, Step::Lock(mode)));
            }
        }
    }

    /// Requests a key for an owner. If the owner has to wait, `reply` makes the value that notifies it.
    pub(super) fn want(
        &mut self,
        key: KeyId,
        owner: OwnerId,
        (mode, waits): (Mode, bool),
        reply: impl FnOnce() -> (W, metrics::Waiting),
        now: Instant,
    ) -> Want<S> {
        let mut slot = match self.keys.entry(key) {
            Slot::Occupied(slot) => slot,
            Slot::Vacant(slot) => slot.insert_entry(Box::new(Entry::new(now))),
        };
        let entry = slot.get_mut();
        let mine = entry.holders.get(owner);
        if let (Some(mine), Some(seat)) = (mine, &entry.seat) {
            // Re-entrant: an exclusive guard covers every request of the same owner.
            if mode == Mode::Shared || mine.is_exclusive() {
                let seat = seat.clone();
                entry.holders.count(owner, mode);
                return Want::Granted(seat);
            }
            if !waits && entry.holders.len() > 1 {
                return Want::Busy;
            }
            // Two owners that share the lock and upgrade it would wait for each other forever.
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
        let (reply, waiting) = reply();
        let mut waiter = Waiter { owner, mode, waits, reply, waiting };
        // An owner that upgrades its lock has to wait only for other holders.
        if entry.is_plainly_busy(mode) && (mine.is_none() || entry.holders.len() > 1) {
            waiter.waiting.start();
        }
        let id = entry.queue.push(self.common.line.next_number(), waiter, mine.is_some());
        advance(slot, &mut self.common, now);
        Want::Queued(id)
    }

    /// Releases a guard that was granted on this seat.
    pub(super) fn leave(
        &mut self,
        key: KeyId,
        (owner, mode): (OwnerId, Mode),
        seat: &S,
        on_release: Option<impl FnOnce() -> W>,
        now: Instant,
    ) -> Left {
        let Slot::Occupied(mut slot) = self.keys.entry(key) else { return Left::Stale };
        let entry = slot.get_mut();
        if entry.seat.as_ref() != Some(seat) || !entry.holders.uncount(owner, mode) {
            return Left::Stale;
        }
        let entry = advance(slot, &mut self.common, now);
        left(entry, on_release)
    }

    /// Releases all guards of an owner.
    pub(super) fn close(
        &mut self,
        key: KeyId,
        owner: OwnerId,
        on_release: impl FnOnce() -> W,
        now: Instant,
    ) -> Left {
        let Slot::Occupied(mut slot) = self.keys.entry(key) else { return Left::Stale };
        if !slot.get_mut().holders.remove(owner) {
            return Left::Stale;
        }
        let entry = advance(slot, &mut self.common, now);
        left(entry, Some(on_release))
    }

    /// Removes a waiter from the queue. Returns whether it was still queued.
    pub(super) fn cancel(&mut self, key: KeyId, waiter: i64, now: Instant) -> bool {
        let Slot::Occupied(mut slot) = self.keys.entry(key) else { return false };
        let cancelled = slot.get_mut().queue.remove(waiter).is_some();
        if cancelled {
            advance(slot, &mut self.common, now);
        }
        cancelled
    }

    /// Whether the step for a key releases a lock.
    pub(super) fn releases(&self, key: KeyId) -> bool {
        let turn = self.keys.get(&key).and_then(|entry| entry.turn);
        turn.is_some_and(|turn| turn.step.releases())
    }

    /// Takes the step for a key on the shared session, or on the wait session that holds the key, if there still is
    /// one. From here on, the step is in flight.
    pub(super) fn take(&mut self, key: KeyId, on_shared: bool) -> Option<Taken> {
        let entry = self.keys.get_mut(&key)?;
        if entry.is_for_shared()? == on_shared { entry.take() } else { None }
    }

    /// Takes the next key out of the line, and returns how long to wait for it. The key's step, a [`Step::Wait`], is in
    /// flight from here on.
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

    /// Records the answer to a step in flight, and returns whether the step still counted. [`Step::Unlock`] and
    /// [`Step::Downgrade`] do not depend on the answer.
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
                entry.draining = true;
                metrics::update(|| entry.queue.all_wait());
                entry.dismiss(&mut self.common.effects);
            }
            (Step::Look, false) => entry.renew(now),
            (Step::Upgrade, true) => entry.server.exclusive = true,
            (Step::Upgrade, false) => {
                if entry.queue.front().is_some_and(|first| entry.upgrades(first))
                    && let Some(waiter) = entry.queue.pop_front()
                {
                    // Another session shares the lock that the waiter wants exclusively.
                    let turned_away = if waiter.waits { Effect::Deadlock } else { Effect::Refused };
                    self.common.effects.push_back(turned_away(waiter.reply));
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

    /// Records that a wait ended before the key was granted. Returns whether the wait still counted.
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

    /// Records that a step failed. Returns the waiters for the step, or none if it was called off before.
    pub(super) fn failed(&mut self, key: KeyId, id: u64) -> Vec<W> {
        let Slot::Occupied(mut slot) = self.keys.entry(key) else { return Vec::new() };
        let entry = slot.get_mut();
        if entry.turn.is_none_or(|turn| turn.id != id) {
            return Vec::new();
        }
        entry.leave_line(key, &mut self.common.line);
        entry.turn = None;
        entry.stand = None;
        let waiters = entry.queue.take_all().map(|waiter| waiter.reply).collect();
        if entry.is_unused() {
            slot.remove();
        }
        waiters
    }

    /// Records what the server has granted after a statement failed half-way. Returns the waiters for the step, or none
    /// if the step was `done`, or called off before.
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
            waiters.extend(entry.queue.take_all().map(|waiter| waiter.reply));
        }
        if server == Modes::default() {
            entry.given_up(&mut self.common.effects);
        } else {
            if turn.step == Step::Downgrade && !server.exclusive {
                // The downgrade was taken before the statement failed.
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

    /// Handles the loss of a session, and of all keys that were held on it. Returns the owners to notify of a release
    /// of these keys. For the waiters, the keys are acquired anew.
    pub(super) fn lost(&mut self, seat: &S, now: Instant) -> Vec<W> {
        let of_it = self.keys.iter().filter(|(_, entry)| entry.seat.as_ref() == Some(seat));
        let keys: Vec<KeyId> = of_it.map(|(key, _)| *key).collect();
        let mut pending_releases = Vec::new();
        for key in keys {
            pending_releases.append(&mut self.lost_key(key, seat, now));
        }
        pending_releases
    }

    /// Returns some of the keys that are held on a session, at most one more than [`MOST_KEYS`].
    pub(super) fn some_at(&self, seat: &S) -> Vec<KeyId> {
        let there = self.keys.iter().filter(|(_, entry)| entry.seat.as_ref() == Some(seat));
        let mut keys: Vec<_> = there.map(|(key, _)| *key).take(MOST_KEYS + 1).collect();
        keys.sort_unstable();
        keys
    }

    /// Like [`lost`](Self::lost), for one key, if it was held on that session.
    pub(super) fn lost_key(&mut self, key: KeyId, seat: &S, now: Instant) -> Vec<W> {
        let Slot::Occupied(mut slot) = self.keys.entry(key) else { return Vec::new() };
        let entry = slot.get_mut();
        if entry.seat.as_ref() != Some(seat) {
            return Vec::new();
        }
        let pending_releases = std::mem::take(&mut entry.pending_releases);
        entry.holders = holders::Holders::default();
        entry.server = Modes::default();
        entry.seat = None;
        entry.turn = None;
        advance(slot, &mut self.common, now);
        pending_releases
    }

    /// Removes all waiters, and returns them.
    pub(super) fn dismiss_all(&mut self, now: Instant) -> Vec<W> {
        let awaited = self.keys.iter().filter(|(_, entry)| !entry.queue.is_empty());
        let keys: Vec<KeyId> = awaited.map(|(key, _)| *key).collect();
        let mut waiters = Vec::new();
        for key in keys {
            let Slot::Occupied(mut slot) = self.keys.entry(key) else { continue };
            waiters.extend(slot.get_mut().queue.take_all().map(|waiter| waiter.reply));
            advance(slot, &mut self.common, now);
        }
        waiters
    }

    /// Removes all keys, because all sessions were lost. Returns the sessions, and the owners to notify of a
    /// release. The waiters are dropped, and retry.
    pub(super) fn clear(&mut self) -> (Vec<S>, Vec<W>) {
        self.common.line.turns.clear();
        self.common.line.retries.clear();
        let (mut seats, mut pending_releases) = (Vec::new(), Vec::new());
        for (_, entry) in self.keys.drain() {
            seats.extend(entry.seat);
            pending_releases.extend(entry.pending_releases);
        }
        (seats, pending_releases)
    }
}

/// Admits the waiters that can be admitted, and finds the next step. Returns the entry, if it is still in use.
///
/// Every change of an entry ends with this call. It takes the slot of the map, so that the key is hashed and looked
/// up only once. (The hash function is slow, because an attacker may choose the keys.)
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

/// Registers the owner that has just left for a notification, if the server is asked to release the lock.
fn left<S, W>(entry: Option<&mut Entry<S, W>>, on_release: Option<impl FnOnce() -> W>) -> Left {
    let unlocks = |turn: Turn| matches!(turn.step, Step::Unlock | Step::Downgrade);
    match (entry, on_release) {
        (Some(entry), Some(on_release)) if entry.turn.is_some_and(unlocks) => {
            entry.pending_releases.push(on_release());
            Left::Unlocking
        }
        _ => Left::Done,
    }
}

#[cfg(test)]
mod tests;
