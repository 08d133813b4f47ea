//! The waiters for a key, in order.

use std::collections::{BTreeMap, BTreeSet};

use super::entry::Waiter;
use crate::mode::Mode;

/// The waiters of one key. Adding and removing a waiter takes logarithmic time.
///
/// Each waiter has a place. Waiters that were queued before all others have negative places.
pub(super) struct Queue<W> {
    /// Usually the only waiter, which then needs no allocation.
    first: Option<(i64, Waiter<W>)>,
    others: Option<Box<Others<W>>>,
    exclusive: usize,
}

struct Others<W> {
    waiters: BTreeMap<i64, Waiter<W>>,
    /// The places of the waiters that do not wait for a busy lock.
    trying: BTreeSet<i64>,
}

impl<W> Default for Others<W> {
    fn default() -> Self {
        Self { waiters: BTreeMap::new(), trying: BTreeSet::new() }
    }
}

impl<W> Others<W> {
    fn insert(&mut self, place: i64, waiter: Waiter<W>) {
        if !waiter.waits {
            self.trying.insert(place);
        }
        self.waiters.insert(place, waiter);
    }

    fn pop_first(&mut self) -> Option<(i64, Waiter<W>)> {
        let (place, waiter) = self.waiters.pop_first()?;
        self.trying.remove(&place);
        Some((place, waiter))
    }

    fn remove(&mut self, place: i64) -> Option<Waiter<W>> {
        self.trying.remove(&place);
        self.waiters.remove(&place)
    }
}

impl<W> Default for Queue<W> {
    fn default() -> Self {
        Self { first: None, others: None, exclusive: 0 }
    }
}

impl<W> Queue<W> {
    pub(super) fn is_empty(&self) -> bool {
        self.first.is_none()
    }

    pub(super) fn front(&self) -> Option<&Waiter<W>> {
        self.first.as_ref().map(|(_, waiter)| waiter)
    }

    pub(super) fn wants_exclusive(&self) -> bool {
        self.exclusive > 0
    }

    /// Adds a waiter at the back, or before all others. Returns its place. `number` must grow from call to call.
    pub(super) fn push(&mut self, number: u64, waiter: Waiter<W>, before_all: bool) -> i64 {
        let number = i64::try_from(number).unwrap_or(i64::MAX);
        let place = if before_all { -number } else { number };
        self.exclusive += usize::from(waiter.mode == Mode::Exclusive);
        let behind = match self.first.take() {
            None => {
                self.first = Some((place, waiter));
                return place;
            }
            Some(first) if before_all => {
                self.first = Some((place, waiter));
                first
            }
            Some(first) => {
                self.first = Some(first);
                (place, waiter)
            }
        };
        self.others.get_or_insert_default().insert(behind.0, behind.1);
        place
    }

    pub(super) fn pop_front(&mut self) -> Option<Waiter<W>> {
        let (_, waiter) = self.first.take()?;
        self.first = self.others.as_mut().and_then(|others| others.pop_first());
        self.exclusive -= usize::from(waiter.mode == Mode::Exclusive);
        Some(waiter)
    }

    pub(super) fn remove(&mut self, place: i64) -> Option<Waiter<W>> {
        if self.first.as_ref()?.0 == place {
            return self.pop_front();
        }
        let waiter = self.others.as_mut()?.remove(place)?;
        self.exclusive -= usize::from(waiter.mode == Mode::Exclusive);
        Some(waiter)
    }

    /// Removes a waiter that does not wait for a busy lock, and returns it.
    pub(super) fn pop_trying(&mut self) -> Option<Waiter<W>> {
        if !self.front()?.waits {
            return self.pop_front();
        }
        let &place = self.others.as_ref()?.trying.first()?;
        self.remove(place)
    }

    /// Starts to measure the waits of all waiters, because the lock was found busy.
    pub(super) fn all_wait(&mut self) {
        let others = self.others.as_mut().map(|others| others.waiters.values_mut());
        let first = self.first.as_mut().map(|(_, waiter)| waiter);
        for waiter in first.into_iter().chain(others.into_iter().flatten()) {
            waiter.waiting.start();
        }
    }

    pub(super) fn take_all(&mut self) -> impl Iterator<Item = Waiter<W>> + use<W> {
        let Self { first, others, .. } = std::mem::take(self);
        let others = others.map(|others| others.waiters.into_values());
        first.map(|(_, waiter)| waiter).into_iter().chain(others.into_iter().flatten())
    }
}
