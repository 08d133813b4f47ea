//! Converts steps for many keys to the calls of one statement, and its answer to the answers to the steps: pure, no
//! I/O.

use super::table::{Step, Taken};
use crate::key::KeyId;
use crate::mode::{Mode, Modes};
use crate::sql::batch::Call;

/// The maximum number of steps in one statement: enough to spread its cost, and few enough that the first step does not
/// wait long for the last.
pub(super) const LARGEST: usize = 1000;

/// Removes all steps but [`Step::Lock`]: the others are void without the session on which they were to be taken.
pub(super) fn keep_only_locks(steps: &mut Vec<(KeyId, Taken)>) {
    steps.retain(|(_, taken)| matches!(taken.step, Step::Lock(_)));
}

/// Returns the calls that take the steps, in the order of the steps.
pub(super) fn calls(steps: &[(KeyId, Taken)]) -> Vec<(KeyId, Call)> {
    let of_step = |(key, taken): &(KeyId, Taken)| {
        let key = *key;
        calls_of(taken).into_iter().flatten().map(move |call| (key, call))
    };
    steps.iter().flat_map(of_step).collect()
}

/// Whether the server did what a step asked for. `None` if the session did not hold the lock that it should have
/// released.
pub(super) type Answer = Option<bool>;

/// Converts the answers to the calls to the key, the number and the answer of each step. Returns `None` if the number
/// of answers is not that of the calls.
pub(super) fn read(
    steps: &[(KeyId, Taken)],
    answers: &[bool],
) -> Option<Vec<(KeyId, u64, Answer)>> {
    let mut rest = answers.iter().copied();
    let mut read = Vec::with_capacity(steps.len());
    for (key, taken) in steps {
        let mut answer = Some(true);
        for call in calls_of(taken).into_iter().flatten() {
            match (call, rest.next()?) {
                (Call::Unlock(_), false) => answer = None,
                (Call::TryLock(_) | Call::IsWaitedFor, yes) => answer = answer.map(|_| yes),
                _ => {}
            }
        }
        read.push((*key, taken.id, answer));
    }
    rest.next().is_none().then_some(read)
}

/// Returns the calls that take a step.
fn calls_of(taken: &Taken) -> [Option<Call>; 3] {
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
