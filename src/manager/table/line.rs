//! The keys that wait for a wait session.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

#[cfg(doc)]
use super::Step;
use crate::key::KeyId;

/// How soon a key in the line is tried again at first, and how soon at last: the pause doubles.
const FIRST_RETRY: Duration = Duration::from_millis(5);
pub(super) const LAST_RETRY: Duration = Duration::from_secs(1);

/// How long a wait session waits for a key the first time, and at most.
const FIRST_SLICE: Duration = Duration::from_millis(250);
pub(super) const LAST_SLICE: Duration = Duration::from_mins(1);

/// While other keys wait for their turn, a wait session waits for this part of the time that a key has waited.
const SHARE: u32 = 8;

/// The keys that wait for a wait session: those whose turn is a [`Step::Wait`] that is not taken yet.
#[derive(Debug, Default)]
pub(super) struct Line {
    /// When it is the turn of each.
    pub(super) turns: BTreeSet<(Instant, KeyId)>,
    /// When each is to be tried again.
    pub(super) retries: BTreeSet<(Instant, KeyId)>,
    /// The last number given to a waiter or a step.
    pub(super) numbers: u64,
}

impl Line {
    pub(super) fn next_number(&mut self) -> u64 {
        self.numbers += 1;
        self.numbers
    }

    pub(super) fn enter(&mut self, key: KeyId, stand: &Stand) {
        self.turns.insert((stand.turn, key));
        self.retries.insert((stand.retry, key));
    }

    pub(super) fn leave(&mut self, key: KeyId, stand: &Stand) {
        self.turns.remove(&(stand.turn, key));
        self.retries.remove(&(stand.retry, key));
    }
}

/// What is known of a key that another session holds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stand {
    /// When it was found busy.
    since: Instant,
    /// From when on a wait session is to wait for it: the key with the earliest is next.
    turn: Instant,
    pub(super) retry: Instant,
    pub(super) pause: Duration,
}

impl Stand {
    pub(super) fn new(now: Instant) -> Self {
        Self { since: now, turn: now, retry: now, pause: FIRST_RETRY }
    }

    /// Its turn has come. Returns how long a wait session waits for it, if there are this many others.
    ///
    /// That grows with the time that the key has waited, or the server's queue might be too long for ever. Until its
    /// next turn, each of the others may have as much time.
    pub(super) fn turn(&mut self, now: Instant, others: usize) -> Duration {
        let waited = now.saturating_duration_since(self.since);
        let slice = if others == 0 { waited } else { waited / SHARE };
        let slice = slice.clamp(FIRST_SLICE, LAST_SLICE);
        self.turn = now + slice * u32::try_from(others + 1).unwrap_or(u32::MAX);
        slice
    }
}
