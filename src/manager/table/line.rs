//! The keys that wait for a wait session.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

#[cfg(doc)]
use super::Step;
use crate::key::KeyId;

/// How soon a key in the line is tried again at first, and how soon at last: the pause doubles.
pub(super) const FIRST_RETRY: Duration = Duration::from_millis(5);
pub(super) const LAST_RETRY: Duration = Duration::from_secs(1);

/// How long a wait session waits for a key the first time, and at most: its time doubles whenever it was not
/// enough.
pub(super) const FIRST_SLICE: Duration = Duration::from_millis(250);
pub(super) const LAST_SLICE: Duration = Duration::from_mins(1);

/// How long at most while other keys wait for their turn.
pub(super) const CROWDED_SLICE: Duration = Duration::from_secs(1);

/// The keys that wait for a wait session: those whose turn is a [`Step::Wait`] that is not taken yet.
#[derive(Debug, Default)]
pub(super) struct Line {
    /// By their places.
    pub(super) keys: BTreeMap<u64, KeyId>,
    /// When each is to be tried again.
    pub(super) retries: BTreeSet<(Instant, KeyId)>,
    /// The last number given to a waiter, a step or a place.
    pub(super) numbers: u64,
}

impl Line {
    pub(super) fn next_number(&mut self) -> u64 {
        self.numbers += 1;
        self.numbers
    }

    pub(super) fn enter(&mut self, key: KeyId, stand: &Stand) {
        self.keys.insert(stand.place, key);
        self.retries.insert((stand.retry, key));
    }

    pub(super) fn leave(&mut self, key: KeyId, stand: &Stand) {
        self.keys.remove(&stand.place);
        self.retries.remove(&(stand.retry, key));
    }
}

/// What is known of a key that another session holds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stand {
    pub(super) place: u64,
    pub(super) retry: Instant,
    pub(super) pause: Duration,
    /// How long the next wait session waits for it.
    pub(super) slice: Duration,
}
