//! The table of guards that report holding a lock, in which a second holder is detected.
//!
//! A guard enters after its grant, and leaves before its release. So two guards that exclude each other and
//! are in the table at the same time are two holders, unless one of them was lost.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use pglock::Mode;

use crate::guard::Guard;
use crate::world::locked;

/// The owner of a guard. An owner does not exclude itself.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum Owner {
    /// A handle of a manager, whose sessions have many owners.
    Handle(u64),
    /// A session, known by its backend.
    Session(i32),
}

#[derive(Debug, Default)]
pub(crate) struct Table {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    entered: u64,
    holds: BTreeMap<u64, Hold>,
    keys: BTreeMap<u64, History>,
    /// Backends that were killed. Their guards may report the loss late.
    killed: BTreeSet<i32>,
    /// Backends that were killed, or had a statement cancelled.
    struck: BTreeSet<i32>,
    /// The last events, for the report of a violation.
    events: VecDeque<(Instant, String)>,
}

/// How many events a violation is reported with.
const EVENTS: usize = 40;

#[derive(Debug)]
struct Hold {
    guard: Arc<Guard>,
    owner: Owner,
    locks: Vec<(u64, Mode)>,
}

/// The previous holds of a key.
#[derive(Debug, Default)]
struct History {
    /// The greatest token of each owner's holds that have ended, by mode.
    tokens: BTreeMap<(Owner, Mode), i64>,
    /// The last owner that was granted the lock exclusively, and when.
    exclusive: Option<(Owner, u64)>,
}

/// A hold in the table.
#[derive(Debug)]
pub(crate) struct Ticket {
    id: u64,
    guard: Arc<Guard>,
    pub(crate) owner: Owner,
    /// The greatest token of other owners that held the locks earlier. The token of this hold must be greater.
    floor: i64,
    token: i64,
}

impl Ticket {
    /// Returns the floor and the token, for [`Table::enter_again`].
    pub(crate) fn token(&self) -> (i64, i64) {
        (self.floor, self.token)
    }

    pub(crate) fn guard(&self) -> &Guard {
        &self.guard
    }
}

impl State {
    /// Returns whether the owner of a guard can rely on it: its backend was not killed, and it is not lost.
    fn stands(&self, guard: &Guard) -> bool {
        !self.killed.contains(&guard.backend_pid()) && !guard.is_lost()
    }

    fn note(&mut self, event: String) {
        if self.events.len() == EVENTS {
            self.events.pop_front();
        }
        self.events.push_back((Instant::now(), event));
    }

    fn story(&self) -> String {
        let line =
            |(at, event): &(Instant, String)| format!("\n    {:?} ago: {event}", at.elapsed());
        self.events.iter().map(line).collect()
    }

    fn history(&mut self, key: u64) -> &mut History {
        self.keys.entry(key).or_default()
    }
}

impl Table {
    /// Enters a guard that was just granted. Fails if that makes two holders.
    pub(crate) fn enter(&self, guard: Guard, owner: Owner) -> Result<Ticket, (String, Ticket)> {
        let locks = guard.locks();
        let guard = Arc::new(guard);
        let mut state = locked(&self.state);
        state.entered += 1;
        let id = state.entered;
        let mut floor = 0;
        let stands = state.stands(&guard);
        for (key, mode) in &locks {
            let history = state.history(*key);
            // The guards of a handle share a token, and those of another handle of this owner may have a greater one.
            // Shared holds of others may have begun and ended while this owner held the lock shared, too.
            let others = history.tokens.iter().filter(|((other, of), _)| {
                *other != owner && [*of, *mode].contains(&Mode::Exclusive)
            });
            floor = others.map(|(_, token)| *token).fold(floor, i64::max);
            if stands && *mode == Mode::Exclusive {
                history.exclusive = Some((owner, id));
            }
        }
        let conflicts = |hold: &&Hold| {
            hold.owner != owner
                && hold.locks.iter().any(|lock| locks.iter().any(|other| excludes(*lock, *other)))
                && state.stands(&hold.guard)
        };
        let other = state.holds.values().find(conflicts);
        // The new guard is checked last, because it may have been lost meanwhile, and the lock granted to another
        // owner.
        let violation = other.filter(|_| state.stands(&guard)).map(|other| {
            format!(
                "two holders: {owner:?} with {locks:?}, {:?} with {:?}{}",
                other.owner,
                other.locks,
                state.story()
            )
        });
        state.note(format!("hold {id} of {owner:?} begins: {locks:?}"));
        state.holds.insert(id, Hold { guard: Arc::clone(&guard), owner, locks });
        drop(state);
        let ticket = Ticket { id, guard, owner, floor, token: 0 };
        match violation {
            Some(violation) => Err((violation, ticket)),
            None => Ok(ticket),
        }
    }

    /// Enters a guard again that was not converted, and so keeps its token.
    pub(crate) fn enter_again(
        &self,
        guard: Guard,
        owner: Owner,
        (floor, token): (i64, i64),
    ) -> Result<Ticket, (String, Ticket)> {
        let same = |ticket| Ticket { floor, token, ..ticket };
        self.enter(guard, owner).map(same).map_err(|(violation, ticket)| (violation, same(ticket)))
    }

    /// Takes a guard out of the table, before it is released.
    pub(crate) fn leave(&self, ticket: Ticket) -> Guard {
        let Ticket { id, guard, token, .. } = ticket;
        let mut state = locked(&self.state);
        if let Some(hold) = state.holds.remove(&id) {
            state.note(format!("hold {id} of {:?} ends: {:?}", hold.owner, hold.locks));
            for (key, mode) in hold.locks {
                let history = state.history(key);
                let greatest = history.tokens.entry((hold.owner, mode)).or_default();
                *greatest = token.max(*greatest);
            }
        }
        drop(state);
        Arc::into_inner(guard).expect("the guard is the table's and the ticket's")
    }

    /// Notes the token of a hold. Fails if an earlier holder had a greater one.
    pub(crate) fn note_token(ticket: &mut Ticket, token: i64) -> Result<(), String> {
        let (floor, known) = (ticket.floor, ticket.token);
        ticket.token = token;
        if token <= floor {
            return Err(format!("token {token} after an earlier holder's {floor}"));
        }
        if known != 0 && known != token {
            return Err(format!("token {token} of a guard that had {known}"));
        }
        Ok(())
    }

    /// The number of the last entry so far.
    pub(crate) fn now(&self) -> u64 {
        locked(&self.state).entered
    }

    /// Fails if another owner was granted the lock exclusively since `then`.
    pub(crate) fn is_unbroken(&self, ticket: &Ticket, then: u64) -> Result<(), String> {
        let state = locked(&self.state);
        for (key, _) in ticket.guard.locks() {
            let last = state.keys.get(&key).and_then(|history| history.exclusive);
            if let Some((owner, at)) = last
                && owner != ticket.owner
                && at > then
                && state.stands(&ticket.guard)
            {
                return Err(format!("key {key} was granted to {owner:?} during a conversion"));
            }
        }
        Ok(())
    }

    /// Notes that a backend is about to be killed, or that its statement is about to be cancelled.
    pub(crate) fn note_fault(&self, backend: i32, is_killed: bool) {
        let mut state = locked(&self.state);
        state.struck.insert(backend);
        state.note(format!("{} backend {backend}", if is_killed { "kills" } else { "cancels" }));
        if is_killed {
            state.killed.insert(backend);
        }
    }

    pub(crate) fn is_struck(&self, backend: i32) -> bool {
        locked(&self.state).struck.contains(&backend)
    }
}

fn excludes((key, mode): (u64, Mode), (other, with): (u64, Mode)) -> bool {
    key == other && (mode == Mode::Exclusive || with == Mode::Exclusive)
}
