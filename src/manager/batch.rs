//! Steps for many keys as one statement, and its answer as the answers to the steps: pure, no I/O.

use super::table::{Step, Taken};
use crate::key::KeyId;
use crate::mode::{Mode, Modes};
use crate::sql::batch::Call;

/// How many steps go into one statement: enough that its cost is spread, and few enough that the first
/// does not wait long for the last.
pub(super) const LARGEST: usize = 1000;

/// What goes into one statement.
#[derive(Debug, Default)]
pub(super) struct Batch {
    steps: Vec<(KeyId, Taken)>,
}

/// What the server did for a step.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Answer {
    /// As asked, or not.
    Taken(bool),
    /// It did not hold what it should have released.
    NotHeld,
}

impl Batch {
    pub(super) fn add(&mut self, key: KeyId, taken: Taken) {
        self.steps.push((key, taken));
    }

    /// Leaves the other steps out: with the session on which they were to be taken, they are void.
    pub(super) fn keep_only_locks(&mut self) {
        self.steps.retain(|(_, taken)| matches!(taken.step, Step::Lock(_)));
    }

    pub(super) fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    pub(super) fn is_full(&self) -> bool {
        self.steps.len() >= LARGEST
    }

    pub(super) fn steps(&self) -> &[(KeyId, Taken)] {
        &self.steps
    }

    /// In the order in which they are to be made.
    pub(super) fn calls(&self) -> Vec<(KeyId, Call)> {
        let of_step = |(key, taken): &(KeyId, Taken)| {
            let key = *key;
            calls(taken).into_iter().flatten().map(move |call| (key, call))
        };
        self.steps.iter().flat_map(of_step).collect()
    }

    /// Reads the answers to the calls. `None` if there are not as many.
    pub(super) fn read(&self, answers: &[bool]) -> Option<Vec<Answer>> {
        let mut rest = answers.iter().copied();
        let mut read = Vec::with_capacity(self.steps.len());
        for (_, taken) in &self.steps {
            let mut answer = Answer::Taken(true);
            for call in calls(taken).into_iter().flatten() {
                match (call, rest.next()?) {
                    (Call::Unlock(_), false) => answer = Answer::NotHeld,
                    (Call::TryLock(_) | Call::IsWaitedFor, yes) if answer != Answer::NotHeld => {
                        answer = Answer::Taken(yes);
                    }
                    _ => {}
                }
            }
            read.push(answer);
        }
        rest.next().is_none().then_some(read)
    }
}

/// The calls that make a step.
fn calls(taken: &Taken) -> [Option<Call>; 3] {
    let Modes { exclusive, shared } = taken.server;
    let unlock_exclusive = exclusive.then_some(Call::Unlock(Mode::Exclusive));
    let unlock_shared = shared.then_some(Call::Unlock(Mode::Shared));
    match taken.step {
        Step::Lock(mode) | Step::Wait(mode) => [Some(Call::TryLock(mode)), None, None],
        Step::Upgrade => [Some(Call::TryLock(Mode::Exclusive)), None, None],
        Step::Look => [Some(Call::IsWaitedFor), None, None],
        Step::Downgrade => [(!shared).then_some(Call::LockShared), unlock_exclusive, None],
        Step::Renew(mode) => [unlock_exclusive, unlock_shared, Some(Call::TryLock(mode))],
        Step::Unlock => [unlock_exclusive, unlock_shared, None],
    }
}

#[cfg(test)]
mod tests;
