//! Counts how many guards hold each key of a session, in each mode. Pure: it knows no database.
//!
//! The ledger knows what the guards need and what the server has granted. When a guard is acquired, the ledger decides
//! whether the guard is covered; when a guard is released, whether the server holds more than is needed. The owner of
//! the connection asks for the surplus at the moment of releasing it, so the order in which concurrent releases get the
//! connection does not matter.
//!
//! An acquire that is in flight counts a share for each key as soon as the key is covered or granted, so nothing else
//! can release the key before the acquire has all of its keys.

use std::collections::BTreeMap;

use crate::error::Loss;
use crate::key::KeyId;
use crate::mode::{Mode, Modes};
use crate::request::{Need, Request};

/// The guards of one session.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    // Invariant: every entry has a guard, or something that the server has granted. Usually there is one entry. Hashing
    // its key would cost as much as everything else here.
    keys: BTreeMap<KeyId, Counts>,
    /// Guards of the session itself, which is kept open for locks that are not counted here.
    pins: usize,
    /// Acquires and releases that are in flight. They keep the session open.
    in_flight: usize,
    ended: Option<Ended>,
}

/// Why no guard can join the session any more.
#[derive(Clone, Debug)]
enum Ended {
    /// The last guard was released.
    Released,
    Lost(Loss),
}

#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    exclusive: usize,
    shared: usize,
    server: Modes,
}

/// How an acquire continues.
#[derive(Debug, Eq, PartialEq)]
pub(crate) enum Join {
    /// The server must be asked. The acquire counts as in flight.
    Ask,
    /// The guard is counted, because what the session holds covers it.
    Covered,
    /// Another session is needed, because this one was lost.
    Lost,
    /// Another session is needed, because this one is being released.
    Released,
}

/// How the release of a guard continues.
#[derive(Debug)]
pub(crate) enum Leave {
    /// Nothing is to be done, because other guards need all that the session holds.
    Keep,
    /// Nothing is to be done, because the session was lost before.
    Lost(Loss),
    /// The server must be asked to unlock, because it holds more than is needed. The release counts as in flight.
    Unlock,
}

/// The locks that the server holds beyond those that are needed.
#[derive(Debug, Default)]
pub(crate) struct Surplus {
    /// The keys to acquire shared, before their exclusive locks are released: only shared guards are left.
    pub(crate) downgrade: Vec<KeyId>,
    /// The locks to release.
    pub(crate) unlock: Vec<(KeyId, Mode)>,
}

impl Ledger {
    /// Creates the ledger of a session on which an acquire is in flight.
    pub(crate) fn opening() -> Self {
        Self { in_flight: 1, ..Self::default() }
    }

    /// Counts a guard if what the session holds covers it, otherwise an acquire in flight.
    pub(crate) fn join(&mut self, request: &Request) -> Join {
        match self.ended {
            Some(Ended::Lost(_)) => return Join::Lost,
            Some(Ended::Released) => return Join::Released,
            None => {}
        }
        if request.need == Need::All && request.ids().all(|(key, mode)| self.covers(key, mode)) {
            for (key, mode) in request.ids() {
                *self.keys.entry(key).or_default().of(mode) += 1;
            }
            return Join::Covered;
        }
        self.in_flight += 1;
        Join::Ask
    }

    fn covers(&self, key: KeyId, mode: Mode) -> bool {
        self.keys.get(&key).is_some_and(|counts| counts.server.covers(mode))
    }

    /// Counts those shares of an acquire in flight that the session's locks cover, and moves them from `missing` to
    /// `claimed`.
    pub(crate) fn claim(
        &mut self,
        missing: &mut Vec<(KeyId, Mode)>,
        claimed: &mut Vec<(KeyId, Mode)>,
    ) {
        missing.retain(|&(key, mode)| {
            let covered = self.covers(key, mode);
            if covered {
                *self.keys.entry(key).or_default().of(mode) += 1;
                claimed.push((key, mode));
            }
            !covered
        });
    }

    /// Counts a share of an acquire in flight, which the server has granted. The session must not be lost.
    pub(crate) fn granted(&mut self, key: KeyId, mode: Mode) {
        let counts = self.keys.entry(key).or_default();
        *counts.of(mode) += 1;
        match mode {
            Mode::Exclusive => counts.server.exclusive = true,
            Mode::Shared => counts.server.shared = true,
        }
    }

    /// Turns the shares of an acquire that was in flight into a guard.
    pub(crate) fn settle(&mut self, need: Need) -> Result<(), Loss> {
        if let Some(loss) = self.loss() {
            return Err(loss);
        }
        self.in_flight -= 1;
        self.pins += usize::from(need == Need::Nothing);
        Ok(())
    }

    /// Counts an acquire or a release as done. Returns whether nothing needs the session.
    pub(crate) fn done(&mut self) -> bool {
        self.in_flight -= 1;
        let unused = self.in_flight == 0 && !self.has_guards();
        if unused && self.ended.is_none() {
            self.ended = Some(Ended::Released);
        }
        unused
    }

    /// Counts an acquire that holds nothing as done, if something else needs the session. Returns whether that is so.
    pub(crate) fn done_early(&mut self) -> bool {
        let is_needed = self.in_flight > 1 || self.has_guards();
        self.in_flight -= usize::from(is_needed);
        is_needed
    }

    /// Removes a guard.
    pub(crate) fn leave(&mut self, request: &Request) -> Leave {
        if let Some(loss) = self.loss() {
            return Leave::Lost(loss);
        }
        let is_pin = request.need == Need::Nothing;
        self.pins -= usize::from(is_pin);
        if !self.withdraw(request.ids()) && !is_pin {
            return Leave::Keep;
        }
        if !self.has_guards() && self.in_flight == 0 {
            self.ended = Some(Ended::Released);
        }
        self.in_flight += 1;
        Leave::Unlock
    }

    /// Removes shares. Returns whether the server holds more than is needed.
    pub(crate) fn withdraw(&mut self, shares: impl Iterator<Item = (KeyId, Mode)>) -> bool {
        let mut excess = false;
        for (key, mode) in shares {
            // A lost session has no counts, and nothing to release.
            if let Some(counts) = self.keys.get_mut(&key) {
                *counts.of(mode) -= 1;
                excess |= counts.excess() != Modes::default();
            }
        }
        excess
    }

    /// Returns the locks that the server holds on these keys beyond those that are needed, and counts them as released.
    ///
    /// The owner of the connection calls this. If the server then does not release the locks, the session is lost.
    pub(crate) fn surplus(&mut self, keys: impl Iterator<Item = KeyId>) -> Surplus {
        let mut surplus = Surplus::default();
        for key in keys {
            let Some(counts) = self.keys.get_mut(&key) else { continue };
            // Empty if another release got the connection first, and did the work of both.
            let excess = counts.excess();
            if excess.exclusive && counts.shared > 0 && !counts.server.shared {
                counts.server = Modes::only(Mode::Shared);
                surplus.downgrade.push(key);
            } else {
                counts.server.exclusive &= !excess.exclusive;
                counts.server.shared &= !excess.shared;
                surplus.unlock.extend(excess.iter().map(|mode| (key, mode)));
            }
            if counts.is_unused() {
                self.keys.remove(&key);
            }
        }
        surplus
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.ended.is_some()
    }

    /// Whether the session is kept open for locks that are not counted here.
    pub(crate) fn is_pinned(&self) -> bool {
        self.pins > 0
    }

    /// Whether the server has granted anything.
    pub(crate) fn holds_locks(&self) -> bool {
        !self.keys.is_empty()
    }

    pub(crate) fn has_guards(&self) -> bool {
        self.is_pinned() || self.keys.values().any(|counts| counts.exclusive + counts.shared > 0)
    }

    /// Whether there are guards in addition to the `claimed` shares of an acquire in flight.
    pub(crate) fn has_more_than(&self, claimed: usize) -> bool {
        let shares = self.keys.values().map(|counts| counts.exclusive + counts.shared);
        shares.sum::<usize>() > claimed
    }

    /// Returns the locks that the server has granted.
    pub(crate) fn granted_by_server(&self) -> Vec<(KeyId, Mode)> {
        let granted = |(key, counts): (&KeyId, &Counts)| {
            let key = *key;
            counts.server.iter().map(move |mode| (key, mode))
        };
        self.keys.iter().flat_map(granted).collect()
    }

    pub(crate) fn has_guard(&self, key: KeyId) -> bool {
        self.keys.get(&key).is_some_and(|counts| counts.exclusive + counts.shared > 0)
    }

    /// Whether only the caller, which is in flight, needs the session, and the session holds only this key,
    /// exclusively.
    pub(crate) fn is_last_of(&self, key: KeyId) -> bool {
        let is_held = self.loss().is_none() && self.is_last() && self.keys.len() == 1;
        let modes = self.keys.get(&key).map(|counts| counts.server);
        is_held && modes == Some(Modes::only(Mode::Exclusive))
    }

    /// Ends the session, because another session takes over what it holds.
    pub(crate) fn end(&mut self) {
        self.keys.clear();
        self.ended = Some(Ended::Released);
    }

    /// Whether only the caller, which is in flight, needs the session.
    pub(crate) fn is_last(&self) -> bool {
        !self.has_guards() && self.in_flight == 1
    }

    /// Ends the session for all its guards. Returns the locks that the server had granted; `None` if the session had
    /// ended before.
    pub(crate) fn lose(&mut self, loss: Loss) -> Option<Vec<(KeyId, Mode)>> {
        // A released session can still be lost while its last release is in flight.
        let is_released = self.ended.is_some() && self.in_flight == 0;
        if is_released || self.loss().is_some() {
            return None;
        }
        self.ended = Some(Ended::Lost(loss));
        let granted = self.granted_by_server();
        self.keys.clear();
        Some(granted)
    }

    pub(crate) fn loss(&self) -> Option<Loss> {
        match &self.ended {
            Some(Ended::Lost(loss)) => Some(loss.clone()),
            Some(Ended::Released) | None => None,
        }
    }
}

impl Counts {
    /// Returns the modes that the server has granted beyond those that the guards need.
    ///
    /// A shared lock beside an exclusive one is kept until both are released, because keeping it costs nothing.
    fn excess(&self) -> Modes {
        match (self.exclusive, self.shared) {
            (0, 0) => self.server,
            (0, _) => Modes { shared: false, ..self.server },
            _ => Modes::default(),
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
