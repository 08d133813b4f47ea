//! The owners that hold a key: mostly one, who then needs no memory of his own.

use super::OwnerId;
use crate::mode::Mode;

/// Who holds a key, and how many guards of it each owner has.
#[derive(Debug, Default)]
pub(super) enum Holders {
    #[default]
    Nobody,
    One(Holder),
    /// Sorted by owner.
    Many(Vec<Holder>),
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Holder {
    owner: OwnerId,
    exclusive: u32,
    shared: u32,
}

impl Holders {
    fn all(&self) -> &[Holder] {
        match self {
            Self::Nobody => &[],
            Self::One(holder) => std::slice::from_ref(holder),
            Self::Many(holders) => holders,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.all().len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.all().is_empty()
    }

    pub(super) fn get(&self, owner: OwnerId) -> Option<Holder> {
        let holders = self.all();
        let place = holders.binary_search_by_key(&owner, |holder| holder.owner).ok()?;
        holders.get(place).copied()
    }

    pub(super) fn has_exclusive(&self) -> bool {
        self.all().iter().any(|holder| holder.is_exclusive())
    }

    /// Counts another guard of an owner.
    pub(super) fn count(&mut self, owner: OwnerId, mode: Mode) {
        if let Some(holder) = self.get_mut(owner) {
            *holder.of(mode) += 1;
            return;
        }
        let mut new = Holder { owner, exclusive: 0, shared: 0 };
        *new.of(mode) += 1;
        match self {
            Self::Nobody => *self = Self::One(new),
            Self::One(one) => {
                let mut both = vec![*one, new];
                both.sort_unstable_by_key(|holder| holder.owner);
                *self = Self::Many(both);
            }
            Self::Many(holders) => {
                let place = holders.partition_point(|holder| holder.owner < owner);
                holders.insert(place, new);
            }
        }
    }

    /// Counts one guard less. Returns whether the owner had such a guard.
    pub(super) fn uncount(&mut self, owner: OwnerId, mode: Mode) -> bool {
        let Some(holder) = self.get_mut(owner) else { return false };
        let Some(left) = holder.of(mode).checked_sub(1) else { return false };
        *holder.of(mode) = left;
        if holder.exclusive + holder.shared == 0 {
            self.remove(owner);
        }
        true
    }

    /// Forgets all guards of an owner. Returns whether he had any.
    pub(super) fn remove(&mut self, owner: OwnerId) -> bool {
        if self.get(owner).is_none() {
            return false;
        }
        match self {
            Self::Nobody | Self::One(_) => *self = Self::Nobody,
            Self::Many(holders) => {
                holders.retain(|holder| holder.owner != owner);
                if let &[last] = holders.as_slice() {
                    *self = Self::One(last);
                }
            }
        }
        true
    }

    fn get_mut(&mut self, owner: OwnerId) -> Option<&mut Holder> {
        let holders = match self {
            Self::Nobody => return None,
            Self::One(holder) => std::slice::from_mut(holder),
            Self::Many(holders) => holders.as_mut_slice(),
        };
        let place = holders.binary_search_by_key(&owner, |holder| holder.owner).ok()?;
        holders.get_mut(place)
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
        /// Whatever happens, they are what a plain map of counts says.
        #[test]
        fn are_a_map_of_counts(
            steps in prop::collection::vec((0_u64..4, any::<bool>(), 0_u8..5), 0..60),
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
                let found: Vec<OwnerId> = holders.all().iter().map(|holder| holder.owner).collect();
                prop_assert_eq!(found, Vec::from_iter(owners.clone()));
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
