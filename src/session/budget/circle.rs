//! The circular wait that a budget must prevent: the holder of a lock waits for a connection to work on, while all
//! connections are used by calls that wait for this lock.
//!
//! The test visits every state that two processes with a pool each can reach. Any number of tasks acquire one of two
//! keys. Each task acquires on a connection of its own, keeps the connection as long as the lock, and needs a second
//! one to work under the lock.

#![expect(clippy::indexing_slicing, reason = "a key or a process that is not there fails the test")]

use std::array::from_fn;
use std::collections::HashSet;

use sqlx::postgres::{PgConnectOptions, PgPoolOptions};

use super::Budget;

const KEYS: usize = 2;

#[derive(Clone, Copy, Default, Eq, Hash, PartialEq)]
struct Process {
    /// How many connections wait for each key.
    waiting: [u32; KEYS],
    /// For each key, `None` if its lock is not held here; otherwise whether the holder has a connection to work on.
    held: [Option<bool>; KEYS],
}

impl Process {
    /// How many connections locks use.
    fn of_locks(&self) -> u32 {
        let held = self.held.iter().flatten().map(|_| 1).sum::<u32>();
        self.waiting.iter().sum::<u32>() + held
    }

    fn in_use(&self) -> u32 {
        let working = self.held.iter().flatten().filter(|works| **works);
        self.of_locks() + working.map(|_| 1).sum::<u32>()
    }
}

type State = [Process; 2];

/// Returns the states that can follow this one if each pool has `size` connections, of which locks may use `limit`.
fn next(state: State, size: u32, limit: u32) -> Vec<State> {
    let mut states = Vec::new();
    for place in 0..state.len() {
        let then = |change: &dyn Fn(&mut Process)| {
            let mut changed = state;
            change(&mut changed[place]);
            changed
        };
        let process = state[place];
        let has_free = process.in_use() < size;
        for key in 0..KEYS {
            if has_free && process.of_locks() < limit {
                states.push(then(&|process| process.waiting[key] += 1));
            }
            let is_free = state.iter().all(|process| process.held[key].is_none());
            if is_free && process.waiting[key] > 0 {
                states.push(then(&|process| {
                    process.waiting[key] -= 1;
                    process.held[key] = Some(false);
                }));
            }
            match process.held[key] {
                Some(false) if has_free => {
                    states.push(then(&|process| process.held[key] = Some(true)));
                }
                Some(true) => states.push(then(&|process| process.held[key] = None)),
                _ => {}
            }
        }
    }
    states
}

/// Whether some task can make progress in every reachable state.
fn always_goes_on(size: u32, limit: u32) -> bool {
    let begin: State = from_fn(|_| Process::default());
    let (mut seen, mut left) = (HashSet::from([begin]), vec![begin]);
    while let Some(state) = left.pop() {
        let states = next(state, size, limit);
        if states.is_empty() {
            return false;
        }
        left.extend(states.into_iter().filter(|state| seen.insert(*state)));
    }
    true
}

#[tokio::test]
async fn the_circle_of_locks_and_their_work_never_closes() {
    for size in 2..=6 {
        let nowhere = PgConnectOptions::new_without_pgpass().socket("/nonexistent");
        let pool = PgPoolOptions::new().max_connections(size).connect_lazy_with(nowhere);
        let budget = Budget::of(&pool);
        for reserve in [None, Some(0), Some(1), Some(size)] {
            let limit = budget.limit(reserve);
            assert_eq!(always_goes_on(size, limit), reserve != Some(0), "{limit} of {size}");
        }
    }
}
