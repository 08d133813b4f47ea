//! The line: the keys that wait for a wait session.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

#[cfg(doc)]
use super::Step;
use crate::key::KeyId;

/// The first pause before a key in the line is retried, and the longest. The pause doubles each time.
const FIRST_RETRY: Duration = Duration::from_millis(5);
pub(super) const LAST_RETRY: Duration = Duration::from_secs(1);

/// How long a wait session waits for a key in its first turn, and in its longest.
const FIRST_SLICE: Duration = Duration::from_millis(250);
pub(super) const LAST_SLICE: Duration = Duration::from_mins(1);

/// While other keys are in the line, a turn lasts for the time that its key has waited, divided by this.
const SHARE: u32 = 8;

/// The keys that wait for a wait session: those whose turn is a [`Step::Wait`] that is not taken yet.
#[derive(Debug, Default)]
pub(super) struct Line {
    /// When the turn of each key begins.
    pub(super) turns: BTreeSet<(Instant, KeyId)>,
    /// When each key is to be retried.
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

/// The wait for a key that another session holds: its start, its next turn, and its next retry.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stand {
    /// When the key was found busy.
    since: Instant,
    /// When the key's next turn begins. The key with the earliest turn is the next one in the line.
    turn: Instant,
    pub(super) retry: Instant,
    pub(super) pause: Duration,
}

impl Stand {
    pub(super) fn new(now: Instant) -> Self {
        Self { since: now, turn: now, retry: now, pause: FIRST_RETRY }
    }

    /// Begins the key's turn, and returns how long a wait session waits for the key while `others` other keys are in
    /// the line.
    ///
    /// That time grows with the time that the key has waited, because otherwise the server's queue might take longer
    /// than every turn. Before the key's next turn, each of the other keys may use as much time.
    pub(super) fn turn(&mut self, now: Instant, others: usize) -> Duration {
        let waited = now.saturating_duration_since(self.since);
        let slice = if others == 0 { waited } else { waited / SHARE };
        let slice = slice.clamp(FIRST_SLICE, LAST_SLICE);
        self.turn = now + slice * u32::try_from(others + 1).unwrap_or(u32::MAX);
        slice
    }
}
