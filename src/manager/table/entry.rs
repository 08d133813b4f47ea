//! One key: its holders, its waiters and its next step.

use std::collections::VecDeque;
use std::time::Instant;

use super::holders::Holders;
use super::line::{Line, Stand};
use super::queue::Queue;
use super::{Bound, Common, Effect, OwnerId, Step, Taken};
use crate::key::KeyId;
use crate::metrics;
use crate::mode::{Mode, Modes};

pub(super) struct Entry<S, W> {
    pub(super) holders: Holders,
    pub(super) server: Modes,
    /// `Some` while the server has granted something.
    pub(super) seat: Option<S>,
    /// Whether the seat is a wait session, which has waited for the key. Has no meaning without a seat.
    pub(super) apart: bool,
    pub(super) turn: Option<Turn>,
    /// When the server granted the lock.
    pub(super) granted: Instant,
    /// When the process's turn began, and how often the lock was handed off since.
    pub(super) since: Instant,
    pub(super) handed: u32,
    /// Another session was seen waiting, so no owner is admitted until those that share the lock have released
    /// it, even if that session stops waiting.
    pub(super) draining: bool,
    pub(super) queue: Queue<W>,
    /// `Some` if another session holds the key. Boxed, because usually none does.
    pub(super) stand: Option<Box<Stand>>,
    /// The owners to notify when the key has been released.
    pub(super) pending_releases: Vec<W>,
}

pub(super) struct Waiter<W> {
    pub(super) owner: OwnerId,
    pub(super) mode: Mode,
    pub(super) waits: bool,
    pub(super) reply: W,
    /// Measures the wait, once it has begun.
    pub(super) waiting: metrics::Waiting,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Turn {
    pub(super) id: u64,
    pub(super) step: Step,
    /// Whether the step is in flight. Until then, it can still be called off.
    pub(super) taken: bool,
}

impl<S: Clone + PartialEq, W> Entry<S, W> {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            holders: Holders::default(),
            server: Modes::default(),
            seat: None,
            apart: false,
            turn: None,
            granted: now,
            since: now,
            handed: 0,
            draining: false,
            queue: Queue::default(),
            stand: None,
            pending_releases: Vec::new(),
        }
    }

    /// Admits the waiters that can be admitted, and finds the next step.
    pub(super) fn advance(&mut self, key: KeyId, common: &mut Common<S, W>, now: Instant) {
        if !self.may_change() {
            if self.queue.is_empty()
                && let Some(Turn { step: Step::Wait(_), .. }) = self.turn
            {
                self.turn = None;
                common.effects.push_back(Effect::Abandon(key));
            }
            return;
        }
        let before = self.turn;
        while let Some((owner, mode)) = self.queue.front().map(|first| (first.owner, first.mode))
            && self.admits(owner, mode, common.bound, now)
            && let Some(seat) = self.seat.clone()
            && let Some(first) = self.queue.pop_front()
        {
            self.admit(owner, mode);
            self.part(&mut common.effects, false);
            common.effects.push_back(Effect::Granted(first.reply, seat));
        }
        let Some(step) = self.next_step() else {
            self.leave_line(key, &mut common.line);
            self.turn = None;
            self.stand = None;
            return;
        };
        // For a key that was found busy, `Wait` stands in for `Lock`.
        let same = |turn: &Turn| {
            turn.step == step || matches!((turn.step, step), (Step::Wait(_), Step::Lock(_)))
        };
        if before.as_ref().is_some_and(same) {
            return;
        }
        self.leave_line(key, &mut common.line);
        self.turn = Some(Turn { id: common.line.next_number(), step, taken: false });
        let shared = self.is_for_shared() == Some(true);
        let start = if shared { Effect::Start(key, step) } else { Effect::StartApart(key) };
        common.effects.push_back(start);
    }

    /// Handles a refusal by the server: refuses the requests that do not wait. If others wait, the key enters the line.
    pub(super) fn refused(&mut self, key: KeyId, common: &mut Common<S, W>, now: Instant) {
        self.dismiss(&mut common.effects);
        let Some(first) = self.queue.front() else {
            self.stand = None;
            return;
        };
        let mode = first.mode;
        if self.stand.is_none() {
            metrics::update(|| self.queue.all_wait());
        }
        self.turn =
            Some(Turn { id: common.line.next_number(), step: Step::Wait(mode), taken: false });
        let stand = self.stand.get_or_insert_with(|| Box::new(Stand::new(now)));
        stand.retry = now + stand.pause;
        common.line.enter(key, stand);
        common.effects.push_back(Effect::Line);
    }

    /// Takes the key out of the line: no wait session takes it, and it is not retried.
    pub(super) fn leave_line(&self, key: KeyId, line: &mut Line) {
        if let Some(stand) = &self.stand {
            line.leave(key, stand);
        }
    }

    pub(super) fn take(&mut self) -> Option<Taken> {
        let turn = self.turn.as_mut().filter(|turn| !turn.taken)?;
        turn.taken = true;
        Some(Taken { id: turn.id, step: turn.step, server: self.server })
    }

    pub(super) fn is_for_shared(&self) -> Option<bool> {
        let turn = self.turn.filter(|turn| !turn.taken)?;
        Some(!self.is_apart() && !matches!(turn.step, Step::Wait(_)))
    }

    fn is_apart(&self) -> bool {
        self.apart && self.seat.is_some()
    }

    /// Whether no step is in flight, so that the next step can be replaced.
    pub(super) fn may_change(&self) -> bool {
        self.turn.is_none_or(|turn| !turn.taken)
    }

    /// Whether another owner holds the key, or will be granted it first, so that asking the server is of no use.
    pub(super) fn is_plainly_busy(&self, mode: Mode) -> bool {
        let waits = self.stand.is_some();
        match mode {
            Mode::Exclusive => waits || !self.holders.is_empty() || !self.queue.is_empty(),
            Mode::Shared => {
                waits
                    || self.holders.has_exclusive()
                    || self.draining && !self.holders.is_empty()
                    || self.queue.wants_exclusive()
            }
        }
    }

    /// Whether an owner can be admitted in the current state.
    pub(super) fn admits(&self, owner: OwnerId, mode: Mode, bound: Bound, now: Instant) -> bool {
        if !self.server.covers(mode) {
            return false;
        }
        // An owner that holds the lock already does not wait for another turn.
        if self.holders.get(owner).is_some() {
            return self.holders.len() == 1;
        }
        let free = match mode {
            Mode::Exclusive => self.holders.is_empty(),
            Mode::Shared => !self.holders.has_exclusive(),
        };
        free && !self.draining && !self.is_due(bound, now)
    }

    /// Whether it is another process's turn.
    pub(super) fn is_due(&self, bound: Bound, now: Instant) -> bool {
        // The first admission is the one that the lock was taken for.
        self.handed > 0
            && (self.handed >= bound.count
                || now.saturating_duration_since(self.since) >= bound.time)
    }

    pub(super) fn admit(&mut self, owner: OwnerId, mode: Mode) {
        if self.holders.get(owner).is_none() {
            self.handed = self.handed.saturating_add(1);
        }
        self.holders.count(owner, mode);
    }

    /// Whether a waiter holds the lock already, and wants to upgrade it to exclusive.
    pub(super) fn upgrades(&self, waiter: &Waiter<W>) -> bool {
        waiter.mode == Mode::Exclusive && self.holders.get(waiter.owner).is_some()
    }

    /// Refuses the requests that do not wait.
    pub(super) fn dismiss(&mut self, effects: &mut VecDeque<Effect<S, W>>) {
        while let Some(waiter) = self.queue.pop_trying() {
            effects.push_back(Effect::Refused(waiter.reply));
        }
    }

    /// The next step towards what the owners need.
    pub(super) fn next_step(&self) -> Option<Step> {
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
                Mode::Shared if !self.draining => Some(Step::Look),
                Mode::Exclusive | Mode::Shared => None,
            };
        }
        match first {
            None => held.then_some(Step::Unlock),
            Some(first) if !held => Some(Step::Lock(first.mode)),
            // The lock of a wait session is released, and not renewed: the shared session then tries the key.
            Some(_) if self.is_apart() => Some(Step::Unlock),
            Some(first) => Some(Step::Renew(first.mode)),
        }
    }

    pub(super) fn granted(&mut self, mode: Mode, seat: &S, now: Instant) {
        self.server = Modes::only(mode);
        self.seat = Some(seat.clone());
        self.stand = None;
        self.granted = now;
        self.renew(now);
    }

    pub(super) fn renew(&mut self, now: Instant) {
        self.draining = false;
        self.handed = 0;
        self.since = now;
    }

    pub(super) fn given_up(&mut self, effects: &mut VecDeque<Effect<S, W>>) {
        self.server = Modes::default();
        self.seat = None;
        self.part(effects, true);
    }

    /// Notifies the owners that wait for their release: the server has answered, or the key was handed off.
    pub(super) fn part(&mut self, effects: &mut VecDeque<Effect<S, W>>, answered: bool) {
        let released = |reply| Effect::Released(reply, answered);
        effects.extend(std::mem::take(&mut self.pending_releases).into_iter().map(released));
    }

    pub(super) fn is_unused(&self) -> bool {
        self.holders.is_empty()
            && self.queue.is_empty()
            && self.turn.is_none()
            && self.seat.is_none()
            && self.pending_releases.is_empty()
    }
}
