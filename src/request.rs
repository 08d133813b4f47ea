//! The request of an acquire: one lock, several, one of several, or a session to hold some later.

use std::sync::Arc;

use crate::key::{Key, KeyId};
use crate::metrics::Labels;
use crate::mode::Mode;
use crate::options::LockOptions;

/// The requested locks, in the order in which they are acquired.
#[derive(Clone)]
pub(crate) struct Request {
    locks: Locks,
    pub(crate) need: Need,
    /// Whether the crate made this request for an acquire of the application, which is counted and reported instead.
    pub(crate) internal: bool,
    /// Whether the call waits in line with others of this process for the key.
    pub(crate) in_line: bool,
}

/// Invariant: not empty, and no key twice.
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
    /// None yet: only a session, on which locks will be acquired later.
    Nothing,
}

impl Request {
    pub(crate) fn one(key: &Key, mode: Mode) -> Self {
        let locks = Locks::One((key.clone(), mode));
        Self { locks, need: Need::All, internal: false, in_line: false }
    }

    /// Requests the first of these keys that is free, exclusively. There must be at least one key.
    pub(crate) fn any(keys: Vec<Key>) -> Self {
        let locks = keys.into_iter().map(|key| (key, Mode::Exclusive));
        let locks = Locks::Many(locks.collect());
        Self { locks, need: Need::Any, internal: false, in_line: false }
    }

    /// Requests a session without a lock. Errors name the key.
    pub(crate) fn session(key: &Key) -> Self {
        Self { need: Need::Nothing, ..Self::one(key, Mode::Shared).internal() }
    }

    /// Requests all of these locks, each key once. They are sorted, so that all requests for the same keys acquire them
    /// in the same order. Returns `None` if there are none.
    pub(crate) fn all(mut locks: Vec<(Key, Mode)>) -> Option<Self> {
        // The exclusive mode sorts first, so for equal keys it is the one that stays.
        locks.sort_by_key(|(key, mode)| (key.id(), *mode));
        locks.dedup_by_key(|(key, _)| key.id());
        (!locks.is_empty()).then(|| {
            let locks = Locks::Many(locks.into());
            Self { locks, need: Need::All, internal: false, in_line: false }
        })
    }

    /// Marks the request as made by the crate for an acquire of the application.
    pub(crate) fn internal(self) -> Self {
        Self { internal: true, ..self }
    }

    /// Makes the call wait in line with others of this process while the key is busy; only one of them waits on the
    /// server.
    pub(crate) fn in_line(self) -> Self {
        Self { in_line: true, ..self }
    }

    /// Returns the key whose lock calls in line hand off to each other, if this is an exclusive request in line.
    pub(crate) fn hand_off_key(&self) -> Option<KeyId> {
        (self.in_line && self.mode() == Mode::Exclusive).then(|| self.key().id())
    }

    /// The labels of its metrics.
    pub(crate) fn labels(&self, options: &LockOptions) -> Labels {
        Labels::new(!self.internal, options.label_by_key, self.key(), self.mode())
    }

    /// Returns the first key, which errors name for the whole request.
    #[expect(clippy::indexing_slicing, reason = "never empty")]
    pub(crate) fn key(&self) -> &Key {
        &self.locks()[0].0
    }

    /// Returns the mode of the first key.
    #[expect(clippy::indexing_slicing, reason = "never empty")]
    pub(crate) fn mode(&self) -> Mode {
        self.locks()[0].1
    }

    /// Returns the request for only one of the locks.
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

    /// Returns the locks that the server is asked for.
    pub(crate) fn ids(&self) -> impl Iterator<Item = (KeyId, Mode)> {
        let locks = if self.need == Need::Nothing { &[][..] } else { self.locks() };
        locks.iter().map(|(key, mode)| (key.id(), *mode))
    }
}
