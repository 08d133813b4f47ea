//! The keys that a semaphore is made of: one for each permit, and one for the queue.
//!
//! The key of a permit is a hash of the semaphore's key, with the number of the permit in its lowest bits. It
//! does not depend on how many permits there are, so semaphores of one key and of different sizes exclude each
//! other where they overlap: all of them together never have more permits than the largest.

use std::ops::RangeInclusive;

use crate::key::{Key, KeyId};

/// The maximum number of permits: as many as [`SLOT_BITS`] bits can count. Larger numbers are better kept in a table.
pub(crate) const MAX_PERMITS: usize = 1 << SLOT_BITS;

/// The number of bits of a permit's key that contain the permit's number.
const SLOT_BITS: u32 = 10;

/// The keys of one semaphore.
pub(crate) struct Layout {
    name: String,
    queue: Key,
    /// The key of the first permit.
    base: i64,
}

impl Layout {
    pub(crate) fn of(semaphore: &Key) -> Self {
        let name = semaphore.name().map_or_else(|| semaphore.to_string(), str::to_owned);
        // Hashes the key as the server stores it, because the number 42 is not the name "42".
        let id = semaphore.id();
        let queue = Key::from(format!("{id}, queue of the semaphore"))
            .called(format!("{name}, queue of the semaphore"));
        let base = match Key::from(format!("{id}, semaphore")).id() {
            KeyId::BigInt(hash) => hash >> SLOT_BITS << SLOT_BITS,
            KeyId::IntPair(..) => 0,
        };
        Self { name, queue, base }
    }

    pub(crate) fn queue(&self) -> &Key {
        &self.queue
    }

    /// The key of a permit.
    pub(crate) fn permit(&self, slot: usize) -> Key {
        Key::from(self.id(slot)).called(format!("{}, permit {slot}", self.name))
    }

    /// The number of the permit that has this key.
    pub(crate) fn slot(&self, key: &Key) -> Option<usize> {
        let KeyId::BigInt(id) = key.id() else { return None };
        usize::try_from(id ^ self.base).ok().filter(|slot| *slot < MAX_PERMITS)
    }

    /// The keys of the permits that only a larger semaphore has.
    pub(crate) fn beyond(&self, permits: usize) -> RangeInclusive<i64> {
        self.id(permits)..=self.id(MAX_PERMITS - 1)
    }

    /// Returns the key with its name, if it is one of the semaphore's keys.
    pub(crate) fn find(&self, key: &Key) -> Option<Key> {
        if key == &self.queue {
            return Some(self.queue.clone());
        }
        self.slot(key).map(|slot| self.permit(slot))
    }

    fn id(&self, slot: usize) -> i64 {
        // The lowest bits of the base are zero, so nothing is carried.
        self.base + i64::try_from(slot).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_permit_is_found_by_its_key() {
        for semaphore in
            ["seats", "", "printers"].map(Key::from).into_iter().chain((-50..50).map(Key::from))
        {
            let layout = Layout::of(&semaphore);
            for slot in [0, 1, 511, 1022, 1023] {
                assert_eq!(layout.slot(&layout.permit(slot)), Some(slot));
                assert_eq!(layout.find(&layout.permit(slot)), Some(layout.permit(slot)));
            }
            for key in
                [Key::from(layout.base - 1), Key::from(layout.base + 1024), semaphore.clone()]
            {
                assert_eq!(layout.slot(&key), None);
            }
            assert_eq!(layout.find(&layout.queue), Some(layout.queue.clone()));
            assert_eq!(layout.beyond(3), layout.base + 3..=layout.base + 1023);
        }
    }
}
