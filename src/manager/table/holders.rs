//! The owners that hold a key: usually one, which then needs no allocation.

use std::collections::BTreeMap;

use super::OwnerId;
use crate::mode::Mode;

/// The owners that hold a key, and how many guards of it each owner has.
#[derive(Debug, Default)]
pub(super) enum Holders {
    #[default]
    Free,
    One(OwnerId, Holder),
    Many(Box<Many>),
}

#[derive(Debug)]
pub(super) struct Many {
    holders: BTreeMap<OwnerId, Holder>,
    /// The number of owners that have an exclusive guard.
    exclusive: usize,
}

#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Holder {
    exclusive: u32,
    shared: u32,
}

impl Holders {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Free => 0,
            Self::One(..) => 1,
            Self::Many(many) => many.holders.len(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) fn get(&self, owner: OwnerId) -> Option<Holder> {
        match self {
            Self::One(one, holder) if *one == owner => Some(*holder),
            Self::Free | Self::One(..) => None,
            Self::Many(many) => many.holders.get(&owner).copied(),
        }
    }

    pub(super) fn has_exclusive(&self) -> bool {
        match self {
            Self::Free => false,
            Self::One(_, holder) => holder.is_exclusive(),
            Self::Many(many) => many.exclusive > 0,
        }
    }

    /// Counts another guard of an owner.
    pub(super) fn count(&mut self, owner: OwnerId, mode: Mode) {
        let mut holder = self.get(owner).unwrap_or_default();
        *holder.of(mode) += 1;
        self.set(owner, holder);
    }

    /// Subtracts one guard of an owner. Returns whether the owner had such a guard.
    pub(super) fn uncount(&mut self, owner: OwnerId, mode: Mode) -> bool {
        let Some(mut holder) = self.get(owner) else { return false };
        let Some(left) = holder.of(mode).checked_sub(1) else { return false };
        *holder.of(mode) = left;
        if holder.exclusive + holder.shared == 0 {
            self.remove(owner);
        } else {
            self.set(owner, holder);
        }
        true
    }

    fn set(&mut self, owner: OwnerId, holder: Holder) {
        match self {
            Self::Free => *self = Self::One(owner, holder),
            Self::One(one, before) if *one == owner => *before = holder,
            Self::One(one, before) => {
                let mut many = Many { holders: BTreeMap::new(), exclusive: 0 };
                many.set(*one, *before);
                many.set(owner, holder);
                *self = Self::Many(Box::new(many));
            }
            Self::Many(many) => many.set(owner, holder),
        }
    }

    /// Removes all guards of an owner. Returns whether the owner had any.
    pub(super) fn remove(&mut self, owner: OwnerId) -> bool {
        if self.get(owner).is_none() {
            return false;
        }
        match self {
            Self::Free | Self::One(..) => *self = Self::Free,
            Self::Many(many) => {
                let before = many.holders.remove(&owner);
                many.exclusive -= usize::from(before.is_some_and(Holder::is_exclusive));
                if many.holders.len() == 1
                    && let Some((one, holder)) = many.holders.pop_first()
                {
                    *self = Self::One(one, holder);
                }
            }
        }
        true
    }
}

impl Many {
    fn set(&mut self, owner: OwnerId, holder: Holder) {
        let before = self.holders.insert(owner, holder);
        self.exclusive -= usize::from(before.is_some_and(Holder::is_exclusive));
        self.exclusive += usize::from(holder.is_exclusive());
    }
}

impl Holder {
    pub(super) fn is_exclusive(self) -> bool {
        self.exclusive > 0
    }

    fn of(&mut self, mode: Mode) -> &mut u32 {
        match mode {
            Mode::Exclusive => &mut self.exclusive,
            Mode::Shared => &mut self.shared,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;

    use super::*;

    fn mode(exclusive: bool) -> Mode {
        if exclusive { Mode::Exclusive } else { Mode::Shared }
    }

    proptest! {
        /// After any operations, the holders equal a plain map of counts.
        #[test]
        fn are_a_map_of_counts(
            steps in prop::collection::vec((0_usize..4, any::<bool>(), 0_u8..5), 0..60),
        ) {
            let mut holders = Holders::default();
            let mut model: BTreeMap<(OwnerId, bool), u32> = BTreeMap::new();
            for (owner, exclusive, what) in steps {
                let has = |model: &BTreeMap<_, _>| {
                    model.range((owner, false)..=(owner, true)).next().is_some()
                };
                match what {
                    0..2 => {
                        holders.count(owner, mode(exclusive));
                        *model.entry((owner, exclusive)).or_default() += 1;
                    }
                    2..4 => {
                        let count = model.get_mut(&(owner, exclusive));
                        prop_assert_eq!(holders.uncount(owner, mode(exclusive)), count.is_some());
                        if let Some(count) = count {
                            *count -= 1;
                        }
                        model.retain(|_, count| *count > 0);
                    }
                    _ => {
                        prop_assert_eq!(holders.remove(owner), has(&model));
                        model.retain(|&(other, _), _| other != owner);
                    }
                }
                let owners: BTreeSet<OwnerId> = model.keys().map(|(owner, _)| *owner).collect();
                prop_assert_eq!((holders.len(), holders.is_empty()), (owners.len(), owners.is_empty()));
                let exclusively = |owner| model.contains_key(&(owner, true));
                for owner in 0..4 {
                    let found = holders.get(owner).map(Holder::is_exclusive);
                    prop_assert_eq!(found, owners.contains(&owner).then(|| exclusively(owner)));
                }
                prop_assert_eq!(holders.has_exclusive(), (0..4).any(exclusively));
            }
        }
    }

    #[test]
    fn need_no_more_room_than_a_list() {
        assert_eq!(size_of::<Holders>(), size_of::<Vec<Holder>>());
    }
}
