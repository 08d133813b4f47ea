//! How many guards hold each key of a session, in each mode: pure counts, no database.
//!
//! The ledger answers two questions. A guard is wanted: is it covered by what the server has granted
//! already? A guard goes: what must the server be told? Who asks, tells the server.

use std::collections::HashMap;

use crate::error::Loss;
use crate::key::KeyId;
use crate::mode::Mode;

/// The guards of one session.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    // Invariant: every entry has at least one guard.
    keys: HashMap<KeyId, Counts>,
    /// Statements under way that change what the server has granted. They keep the session open.
    under_way: usize,
    ended: Option<Ended>,
}

/// Why no guard can join the session any more.
#[derive(Clone, Debug)]
enum Ended {
    /// The last guard went.
    Released,
    Lost(Loss),
}

#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    exclusive: usize,
    shared: usize,
    server: Modes,
}

/// The modes in which the server has granted a key to the session.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Modes {
    pub(crate) exclusive: bool,
    pub(crate) shared: bool,
}

/// What a wanted guard takes.
#[derive(Debug, Eq, PartialEq)]
pub(crate) enum Join {
    /// A statement: the server has to be asked. It counts as under way.
    Ask,
    /// Nothing: the guard is counted, and covered by what the session holds.
    Covered,
    /// Another session: this one has ended.
    Ended,
}

/// What a guard that goes leaves to do. Where that is a statement, it counts as under way.
#[derive(Debug)]
pub(crate) enum Leave {
    /// Take the key shared, then give its exclusive lock up: only shared guards are left.
    Downgrade,
    /// Nothing: other guards need all that the session holds.
    Keep,
    /// Nothing: the session was lost before.
    Lost(Loss),
    /// Unlock the key in these modes.
    Unlock(Modes),
}

impl Ledger {
    /// A session on which an acquire is under way.
    pub(crate) fn opening() -> Self {
        Self { under_way: 1, ..Self::default() }
    }

    /// Counts a guard if what the session holds covers it.
    pub(crate) fn join(&mut self, key: KeyId, mode: Mode) -> Join {
        if self.ended.is_some() {
            return Join::Ended;
        }
        if let Some(counts) = self.keys.get_mut(&key)
            && counts.covers(mode)
        {
            *counts.of(mode) += 1;
            return Join::Covered;
        }
        self.under_way += 1;
        Join::Ask
    }

    /// Counts the guard that the server granted, in place of the statement that asked for it.
    ///
    /// The session may have been lost while the answer was on its way; then there is no guard, and
    /// what was granted is still to be given up.
    pub(crate) fn granted(&mut self, key: KeyId, mode: Mode) -> Result<(), Loss> {
        if let Some(loss) = self.loss() {
            return Err(loss);
        }
        self.under_way -= 1;
        let counts = self.keys.entry(key).or_default();
        *counts.of(mode) += 1;
        match mode {
            Mode::Exclusive => counts.server.exclusive = true,
            Mode::Shared => counts.server.shared = true,
        }
        Ok(())
    }

    /// Counts a statement as done that granted nothing. Returns whether nothing needs the session.
    pub(crate) fn done(&mut self) -> bool {
        self.under_way -= 1;
        let unused = self.keys.is_empty() && self.under_way == 0;
        if unused && self.ended.is_none() {
            self.ended = Some(Ended::Released);
        }
        unused
    }

    /// Takes a guard out.
    pub(crate) fn leave(&mut self, key: KeyId, mode: Mode) -> Leave {
        if let Some(loss) = self.loss() {
            return Leave::Lost(loss);
        }
        // A guard that is not counted has nothing to give up.
        let Some(counts) = self.keys.get_mut(&key) else { return Leave::Keep };
        *counts.of(mode) -= 1;
        let Counts { exclusive, shared, server } = *counts;
        if exclusive > 0 {
            return Leave::Keep;
        }
        if shared == 0 {
            self.keys.remove(&key);
            if self.keys.is_empty() && self.under_way == 0 {
                self.ended = Some(Ended::Released);
            }
            self.under_way += 1;
            return Leave::Unlock(server);
        }
        if !server.exclusive {
            return Leave::Keep;
        }
        counts.server = Modes { exclusive: false, shared: true };
        self.under_way += 1;
        if server.shared {
            Leave::Unlock(Modes { exclusive: true, shared: false })
        } else {
            Leave::Downgrade
        }
    }

    /// Ends the session for all its guards, and leaves one statement to do: to unlock what the
    /// server had granted.
    pub(crate) fn close(&mut self) -> Vec<(KeyId, Modes)> {
        self.under_way += 1;
        self.lose(Loss::Closed)
    }

    /// Ends the session for all its guards. Returns what the server had granted it.
    pub(crate) fn lose(&mut self, loss: Loss) -> Vec<(KeyId, Modes)> {
        if self.ended.is_none() {
            self.ended = Some(Ended::Lost(loss));
        }
        self.keys.drain().map(|(key, counts)| (key, counts.server)).collect()
    }

    pub(crate) fn loss(&self) -> Option<Loss> {
        match &self.ended {
            Some(Ended::Lost(loss)) => Some(loss.clone()),
            Some(Ended::Released) | None => None,
        }
    }
}

impl Counts {
    /// An exclusive lock covers shared guards too: its session could not be granted less.
    fn covers(&self, mode: Mode) -> bool {
        match mode {
            Mode::Exclusive => self.server.exclusive,
            Mode::Shared => self.server.exclusive || self.server.shared,
        }
    }

    fn of(&mut self, mode: Mode) -> &mut usize {
        match mode {
            Mode::Exclusive => &mut self.exclusive,
            Mode::Shared => &mut self.shared,
        }
    }
}
