//! What an acquire asks for: one lock, several, one of several, or a session to hold some later.

use std::sync::Arc;

use crate::key::{Key, KeyId};
use crate::metrics::Labels;
use crate::mode::Mode;
use crate::options::LockOptions;

/// Locks, in the order in which they are taken.
#[derive(Clone)]
pub(crate) struct Request {
    locks: Locks,
    pub(crate) need: Need,
    /// The crate made it for an acquire of the application, which is counted and reported instead.
    pub(crate) internal: bool,
    /// It waits in line with others of this process for the key.
    pub(crate) in_line: bool,
}

/// Never empty, and no key twice.
#[derive(Clone)]
enum Locks {
    /// The usual case: nothing to allocate.
    One((Key, Mode)),
    Many(Arc<[(Key, Mode)]>),
}

/// How many of the locks an acquire needs.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Need {
    All,
    /// The first that is free.
    Any,
    /// None yet: a session, on which they will be taken.
    Nothing,
}

impl Request {
    pub(crate) fn one(key: &Key, mode: Mode) -> Self {
        let locks = Locks::One((key.clone(), mode));
        Self { locks, need: Need::All, internal: false, in_line: false }
    }

    /// The first of these keys that is free, exclusively. There must be one at least.
    pub(crate) fn any(keys: Vec<Key>) -> Self {
        let locks = keys.into_iter().map(|key| (key, Mode::Exclusive));
        let locks = Locks::Many(locks.collect());
        Self { locks, need: Need::Any, internal: false, in_line: false }
    }

    /// A session, opened for the sake of a key.
    pub(crate) fn session(key: &Key) -> Self {
        Self { need: Need::Nothing, ..Self::one(key, Mode::Shared).internal() }
    }

    /// All of these locks, each key once. Sorted, so that all requests for the same keys take them in one
    /// order. `None` if there are none.
    pub(crate) fn all(mut locks: Vec<(Key, Mode)>) -> Option<Self> {
        // The exclusive mode is the lesser of the two, so of equal keys it is the one that stays.
        locks.sort_by_key(|(key, mode)| (key.id(), *mode));
        locks.dedup_by_key(|(key, _)| key.id());
        (!locks.is_empty()).then(|| {
            let locks = Locks::Many(locks.into());
            Self { locks, need: Need::All, internal: false, in_line: false }
        })
    }

    /// The same, made by the crate for an acquire of the application.
    pub(crate) fn internal(self) -> Self {
        Self { internal: true, ..self }
    }

    /// The same; while the key is busy, it waits in line with others of this process, and one of them on the server.
    pub(crate) fn in_line(self) -> Self {
        Self { in_line: true, ..self }
    }

    /// The key that it passes to the next in line, or has from the one before: if it is the exclusive one.
    pub(crate) fn hand_over_key(&self) -> Option<KeyId> {
        (self.in_line && self.mode() == Mode::Exclusive).then(|| self.key().id())
    }

    /// The labels of its metrics.
    pub(crate) fn labels(&self, options: &LockOptions) -> Labels {
        Labels::new(!self.internal, options.label_by_key, self.key(), self.mode())
    }

    /// The key that stands for all of them: errors name it.
    #[expect(clippy::indexing_slicing, reason = "never empty")]
    pub(crate) fn key(&self) -> &Key {
        &self.locks()[0].0
    }

    /// The mode of that key.
    #[expect(clippy::indexing_slicing, reason = "never empty")]
    pub(crate) fn mode(&self) -> Mode {
        self.locks()[0].1
    }

    /// The same for one of the locks.
    pub(crate) fn only(&self, id: KeyId) -> Option<Self> {
        let (key, mode) = self.locks().iter().find(|(key, _)| key.id() == id)?;
        Some(Self { internal: self.internal, ..Self::one(key, *mode) })
    }

    pub(crate) fn locks(&self) -> &[(Key, Mode)] {
        match &self.locks {
            Locks::One(lock) => std::slice::from_ref(lock),
            Locks::Many(locks) => locks,
        }
    }

    /// What the server is asked for.
    pub(crate) fn ids(&self) -> impl Iterator<Item = (KeyId, Mode)> {
        let locks = if self.need == Need::Nothing { &[][..] } else { self.locks() };
        locks.iter().map(|(key, mode)| (key.id(), *mode))
    }
}
