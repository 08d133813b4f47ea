//! How many guards hold each key of a session, in each mode: pure counts, no database.
//!
//! The ledger knows what the guards need and what the server has granted. A guard is wanted: is it
//! covered? A guard goes: does the server hold more than is needed? Whoever has the connection tells
//! the server, and asks the ledger what at that moment, so it does not matter in which order guards
//! that go at once get their turn.

use std::collections::BTreeMap;
use std::mem;

use crate::error::Loss;
use crate::key::KeyId;
use crate::mode::Mode;
use crate::request::{Need, Request};

/// The guards of one session.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    // Invariant: every entry has a guard, or something that the server has granted.
    // Mostly one, of which a hash would cost as much as all else here.
    keys: BTreeMap<KeyId, Counts>,
    /// Guards of the session itself, which is open for what is not counted here.
    keepers: usize,
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

/// What the server is to be told, so that it holds no more than is needed.
#[derive(Debug, Default)]
pub(crate) struct Tell {
    /// Take these keys shared, then give their exclusive locks up: only shared guards are left.
    pub(crate) downgrade: Vec<KeyId>,
    /// Give these keys up, in these modes.
    pub(crate) unlock: Vec<(KeyId, Modes)>,
}

/// What the server holds of a key beyond what is needed.
#[derive(Clone, Copy, Debug)]
enum Excess {
    /// Exclusive, where shared would do.
    Exclusive,
    /// In these modes.
    Modes(Modes),
}

impl Ledger {
    /// A session on which an acquire is under way.
    pub(crate) fn opening() -> Self {
        Self { under_way: 1, ..Self::default() }
    }

    /// Counts a guard if what the session holds covers it.
    pub(crate) fn join(&mut self, request: &Request) -> Join {
        if self.ended.is_some() {
            return Join::Ended;
        }
        if request.need == Need::All && self.missing(request).is_empty() {
            for (key, mode) in request.ids() {
                *self.keys.entry(key).or_default().of(mode) += 1;
            }
            return Join::Covered;
        }
        self.under_way += 1;
        Join::Ask
    }

    /// What the session does not hold yet of what is wanted.
    ///
    /// For whoever has the connection: what is missing changes with every statement.
    pub(crate) fn missing(&self, request: &Request) -> Vec<(KeyId, Mode)> {
        let covered = |key, mode| self.keys.get(&key).is_some_and(|counts| counts.covers(mode));
        request.ids().filter(|&(key, mode)| !covered(key, mode)).collect()
    }

    /// Counts a guard for which the server granted what was missing, in place of the statement that
    /// asked for it.
    ///
    /// The session may have been lost while the answer was on its way; then there is no guard, and
    /// what was granted is still to be given up.
    pub(crate) fn granted(
        &mut self,
        request: &Request,
        missing: &[(KeyId, Mode)],
    ) -> Result<(), Loss> {
        if let Some(loss) = self.loss() {
            return Err(loss);
        }
        self.under_way -= 1;
        self.keepers += usize::from(request.need == Need::Nothing);
        for (key, mode) in request.ids() {
            *self.keys.entry(key).or_default().of(mode) += 1;
        }
        for &(key, mode) in missing {
            let server = &mut self.keys.entry(key).or_default().server;
            match mode {
                Mode::Exclusive => server.exclusive = true,
                Mode::Shared => server.shared = true,
            }
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
    pub(crate) fn leave(&mut self, request: &Request) -> Leave {
        if let Some(loss) = self.loss() {
            return Leave::Lost(loss);
        }
        let mut excess = request.need == Need::Nothing;
        self.keepers -= usize::from(excess);
        for (key, mode) in request.ids() {
            // A guard that is not counted has nothing to give up.
            if let Some(counts) = self.keys.get_mut(&key) {
                *counts.of(mode) -= 1;
                excess |= counts.excess().is_some();
            }
        }
        if !excess {
            return Leave::Keep;
        }
        if !self.has_guards() && self.under_way == 0 {
            self.ended = Some(Ended::Released);
        }
        self.under_way += 1;
        Leave::Tell
    }

    /// Returns what the server is to be told of the keys of a guard that left, and counts it as told.
    ///
    /// For whoever has the connection; if the server then does not do it, the session is lost.
    pub(crate) fn tell(&mut self, request: &Request) -> Tell {
        let mut tell = Tell::default();
        for (key, _) in request.ids() {
            let Some(counts) = self.keys.get_mut(&key) else { continue };
            match counts.excess() {
                Some(Excess::Exclusive) => {
                    counts.server = Modes { exclusive: false, shared: true };
                    tell.downgrade.push(key);
                }
                Some(Excess::Modes(modes)) => {
                    counts.server.exclusive &= !modes.exclusive;
                    counts.server.shared &= !modes.shared;
                    tell.unlock.push((key, modes));
                }
                // A release that came later was sooner here, and told the server for both.
                None => {}
            }
            if counts.is_unused() {
                self.keys.remove(&key);
            }
        }
        tell
    }

    /// Whether it is open for what is not counted here.
    pub(crate) fn is_kept(&self) -> bool {
        self.keepers > 0
    }

    pub(crate) fn has_guards(&self) -> bool {
        self.is_kept() || self.keys.values().any(|counts| counts.exclusive + counts.shared > 0)
    }

    /// What the server has granted.
    pub(crate) fn granted_by_server(&self) -> Vec<(KeyId, Modes)> {
        self.keys.iter().map(|(key, counts)| (*key, counts.server)).collect()
    }

    pub(crate) fn has_guard(&self, key: KeyId) -> bool {
        self.keys.get(&key).is_some_and(|counts| counts.exclusive + counts.shared > 0)
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
        mem::take(&mut self.keys).into_iter().map(|(key, counts)| (key, counts.server)).collect()
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
    fn excess(&self) -> Option<Excess> {
        let Modes { exclusive, shared } = self.server;
        if self.exclusive > 0 {
            None
        } else if self.shared > 0 {
            exclusive.then_some(if shared {
                Excess::Modes(Modes { exclusive: true, shared: false })
            } else {
                Excess::Exclusive
            })
        } else {
            (exclusive || shared).then_some(Excess::Modes(self.server))
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

#[cfg(test)]
mod tests;
