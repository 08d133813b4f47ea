//! The waiters for a key, in order.

use std::collections::{BTreeMap, BTreeSet};

use super::Caller;
use super::entry::Waiter;
use crate::mode::Mode;

/// Waiters of one key. Every operation takes logarithmic time.
#[derive(Debug)]
pub(super) struct Queue<W> {
    /// By the place in the queue: waiters that go before all others have negative places.
    waiters: BTreeMap<i64, Waiter<W>>,
    /// The places of the waiters that do not wait for a busy lock.
    trying: BTreeSet<i64>,
    exclusive: usize,
}

impl<W> Default for Queue<W> {
    fn default() -> Self {
        Self { waiters: BTreeMap::new(), trying: BTreeSet::new(), exclusive: 0 }
    }
}

impl<W> Queue<W> {
    pub(super) fn is_empty(&self) -> bool {
        self.waiters.is_empty()
    }

    pub(super) fn front(&self) -> Option<&Waiter<W>> {
        self.waiters.first_key_value().map(|(_, waiter)| waiter)
    }

    pub(super) fn wants_exclusive(&self) -> bool {
        self.exclusive > 0
    }

    /// Adds a waiter, at the back or before all others. `place` grows from call to call.
    pub(super) fn push(&mut self, place: u64, waiter: Waiter<W>, first: bool) -> i64 {
        let place = i64::try_from(place).unwrap_or(i64::MAX);
        let place = if first { -place } else { place };
        if !waiter.waits {
            self.trying.insert(place);
        }
        self.exclusive += usize::from(waiter.mode == Mode::Exclusive);
        self.waiters.insert(place, waiter);
        place
    }

    pub(super) fn pop_front(&mut self) -> Option<Waiter<W>> {
        let (&place, _) = self.waiters.first_key_value()?;
        self.remove(place)
    }

    pub(super) fn remove(&mut self, place: i64) -> Option<Waiter<W>> {
        let waiter = self.waiters.remove(&place)?;
        self.trying.remove(&place);
        self.exclusive -= usize::from(waiter.mode == Mode::Exclusive);
        Some(waiter)
    }

    /// Takes out a waiter that does not wait for a busy lock.
    pub(super) fn pop_trying(&mut self) -> Option<Waiter<W>> {
        let &place = self.trying.first()?;
        self.remove(place)
    }

    /// Notifies all waiters that the lock was found busy.
    pub(super) fn all_wait(&mut self)
    where
        W: Caller,
    {
        for waiter in self.waiters.values_mut() {
            waiter.tell.waits();
        }
    }

    pub(super) fn take_all(&mut self) -> impl Iterator<Item = Waiter<W>> + use<W> {
        std::mem::take(self).waiters.into_values()
    }
}
