//! Many calls as one statement, on the session that a manager's keys share.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::ledger::Modes;
use super::{Session, within};
use crate::error::{Loss, is_answer};
use crate::key::KeyId;
use crate::mode::Mode;
use crate::sql::{self, Call};

/// What came of calls.
#[derive(Debug)]
pub(crate) enum Called {
    /// Of each, in their order.
    Answers(Vec<bool>),
    /// The server failed them half-way, and the session holds these locks.
    Failed(sqlx::Error, Vec<(KeyId, Mode)>),
    /// The session was lost.
    Lost(Loss),
}

impl Session {
    /// Makes calls that never wait. If the future is dropped under way, the session must be given up.
    pub(crate) async fn call(self: &Arc<Self>, calls: &[(KeyId, Call)]) -> Called {
        let mut slot = self.quietly().await;
        let Some(conn) = slot.as_mut() else {
            return Called::Lost(self.loss().unwrap_or(Loss::NotHeld));
        };
        let asked = Instant::now();
        let called = within(self.heartbeat.bound(), async {
            let pg = conn.pg()?;
            match sql::call_all(pg, calls).await {
                Ok(called) => Ok(Ok(called)),
                Err(error) if is_answer(&error) => Ok(Err((error, sql::held(pg).await?))),
                Err(error) => Err(error),
            }
        });
        let loss = match called.await {
            Ok(Ok(called)) if called.backend_pid == self.backend_pid() => {
                self.trust(asked);
                self.count(calls, &called.answers);
                return Called::Answers(called.answers);
            }
            // Another session than the one that was asked has answered.
            Ok(Ok(called)) => {
                self.retrieve(conn, called.backend_pid, &tried(calls)).await;
                Loss::Pooled
            }
            Ok(Err((error, held))) => {
                self.trust(asked);
                let others = self.ledger().granted_by_server().len();
                self.managed.store(held.len().saturating_sub(others), Ordering::Relaxed);
                return Called::Failed(error, held);
            }
            Err(error) => Loss::broken(error),
        };
        drop(slot.take());
        drop(slot);
        self.lose(&loss);
        Called::Lost(loss)
    }

    /// Counts what calls have locked and unlocked, for who is told of a loss.
    fn count(&self, calls: &[(KeyId, Call)], answers: &[bool]) {
        let mut locks = self.managed.load(Ordering::Relaxed);
        for ((_, call), yes) in calls.iter().zip(answers) {
            match call {
                Call::TryLock(_) | Call::LockShared => locks += usize::from(*yes),
                Call::Unlock(_) => locks = locks.saturating_sub(usize::from(*yes)),
                Call::IsWaitedFor => {}
            }
        }
        self.managed.store(locks, Ordering::Relaxed);
    }

    /// Gives the session up: it does not hold what it should, or nobody knows what it holds.
    pub(crate) fn give_up(&self, loss: &Loss) {
        if self.loss().is_none() {
            self.lose(loss);
        }
    }

    /// Has the idle connection listened to again, after it was used quietly; or at last, if it was in use
    /// whenever the watch looked.
    pub(crate) async fn is_quiet(&self) {
        if !self.listened_to.load(Ordering::Relaxed) {
            self.listen().await;
        }
        self.used.notify_one();
    }
}

/// What calls may have locked.
fn tried(calls: &[(KeyId, Call)]) -> Vec<(KeyId, Modes)> {
    let modes = |call| match call {
        Call::TryLock(mode) => {
            Some(Modes { exclusive: mode == Mode::Exclusive, shared: mode == Mode::Shared })
        }
        Call::Unlock(_) | Call::LockShared | Call::IsWaitedFor => None,
    };
    calls.iter().filter_map(|&(key, call)| Some((key, modes(call)?))).collect()
}
