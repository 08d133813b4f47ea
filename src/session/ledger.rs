//! How many guards hold each key of a session, in each mode: pure counts, no database.
//!
//! The ledger knows what the guards need and what the server has granted. A guard is wanted: is it
//! covered? A guard goes: does the server hold more than is needed? Whoever has the connection tells
//! the server, and asks the ledger what at that moment, so it does not matter in which order guards
//! that go at once get their turn.

use std::collections::HashMap;

use crate::error::Loss;
use crate::key::KeyId;
use crate::mode::Mode;

/// The guards of one session.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    // Invariant: every entry has a guard, or something that the server has granted.
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

/// What a guard that goes leaves to do.
#[derive(Debug)]
pub(crate) enum Leave {
    /// Nothing: other guards need all that the session holds.
    Keep,
    /// Nothing: the session was lost before.
    Lost(Loss),
    /// A statement: the server holds more than is needed. It counts as under way.
    Tell,
}

/// What the server is to be told, so that it holds no more of a key than is needed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Tell {
    /// Take the key shared, then give its exclusive lock up: only shared guards are left.
    Downgrade,
    /// Give the key up in these modes.
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
        let unused = self.under_way == 0 && !self.has_guards();
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
        if counts.excess().is_none() {
            return Leave::Keep;
        }
        if !self.has_guards() && self.under_way == 0 {
            self.ended = Some(Ended::Released);
        }
        self.under_way += 1;
        Leave::Tell
    }

    /// Returns what the server is to be told of a key, and counts it as told.
    ///
    /// For whoever has the connection; if the server then does not do it, the session is lost.
    pub(crate) fn tell(&mut self, key: KeyId) -> Option<Tell> {
        let counts = self.keys.get_mut(&key)?;
        let tell = counts.excess()?;
        match tell {
            Tell::Downgrade => counts.server = Modes { exclusive: false, shared: true },
            Tell::Unlock(modes) => {
                counts.server.exclusive &= !modes.exclusive;
                counts.server.shared &= !modes.shared;
            }
        }
        if counts.is_unused() {
            self.keys.remove(&key);
        }
        Some(tell)
    }

    pub(crate) fn has_guards(&self) -> bool {
        self.keys.values().any(|counts| counts.exclusive + counts.shared > 0)
    }

    /// Whether a statement under way is the last that the session needs.
    pub(crate) fn is_last(&self) -> bool {
        !self.has_guards() && self.under_way == 1
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

    /// What the server has granted beyond what the guards need.
    ///
    /// A shared lock beside an exclusive one is left until both go: it costs nothing to keep.
    fn excess(&self) -> Option<Tell> {
        let Modes { exclusive, shared } = self.server;
        if self.exclusive > 0 {
            None
        } else if self.shared > 0 {
            exclusive.then_some(if shared {
                Tell::Unlock(Modes { exclusive: true, shared: false })
            } else {
                Tell::Downgrade
            })
        } else {
            (exclusive || shared).then_some(Tell::Unlock(self.server))
        }
    }

    fn is_unused(&self) -> bool {
        self.exclusive + self.shared == 0 && self.server == Modes::default()
    }

    fn of(&mut self, mode: Mode) -> &mut usize {
        match mode {
            Mode::Exclusive => &mut self.exclusive,
            Mode::Shared => &mut self.shared,
        }
    }
}
