//! Runs many calls as one statement, on the session that a manager's keys share.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::slot::Unavailable;
use super::task::Task;
use super::{Session, within};
use sqlx::{Connection, PgConnection};

use crate::error::{Loss, is_answer, is_not_prepared, sqlstate};
use crate::key::KeyId;
use crate::mode::Mode;
use crate::sql::batch::{self, Call};
use crate::sql::{self, backend::Held};

/// The result of calls.
pub(crate) enum Called {
    /// The answer to each call, in order.
    Answers(Vec<bool>),
    /// The calls failed half-way on the server, and the session now holds these locks.
    Failed(sqlx::Error, Held),
    /// The session was lost.
    Lost(Loss),
}

impl Session {
    /// Sets the function that returns the keys of the locks that a manager holds on the session.
    pub(crate) fn set_managed_keys(&self, keys: impl Fn() -> Vec<KeyId> + Send + Sync + 'static) {
        self.managed_keys.set(Box::new(keys)).ok();
    }

    /// Makes calls that never wait. If the future is dropped while the calls are in flight, the session must be closed.
    pub(crate) async fn call(self: &Arc<Self>, calls: &[(KeyId, Call)]) -> Called {
        let mut slot = self.quiet_connection().await;
        let Some(conn) = slot.as_mut() else {
            return Called::Lost(self.loss().unwrap_or(Loss::NotHeld));
        };
        let asked = Instant::now();
        let called = within(self.heartbeat.bound(), async {
            let pg = conn.pg()?;
            let mut called = batch::call_all(pg, calls).await;
            if called.as_ref().is_err_and(is_not_prepared) {
                // Nothing was called, because the prepared statement had been deallocated.
                pg.clear_cached_statements().await?;
                called = batch::call_all(pg, calls).await;
            }
            let looks = calls.iter().any(|(_, call)| *call == Call::IsWaitedFor);
            if looks && called.as_ref().is_err_and(is_forbidden) {
                called = call_blindly(pg, calls).await;
            }
            match called {
                Ok(called) => Ok(Ok(called)),
                Err(error) if is_answer(&error) && !is_not_prepared(&error) => {
                    let (_, held) = sql::backend::holdings(pg, &[self.backend_pid()]).await?;
                    Ok(Err((error, held)))
                }
                Err(error) => Err(error),
            }
        });
        let loss = match called.await {
            Ok(Ok(called)) if called.backend_pid == self.backend_pid() => {
                self.trust(asked);
                self.count(calls, &called.answers);
                return Called::Answers(called.answers);
            }
            // Another backend than the session's has answered.
            Ok(Ok(called)) => {
                self.server.proof.disprove();
                self.retrieve(None, called.backend_pid, tried(calls));
                Loss::NoExclusion
            }
            Ok(Err((error, held))) => {
                self.trust(asked);
                let others = self.ledger().granted_by_server().len();
                self.managed_locks.store(held.len().saturating_sub(others), Ordering::Relaxed);
                return Called::Failed(error, held);
            }
            Err(error) => Loss::broken(error),
        };
        self.give_up(&loss);
        drop(slot.take());
        Called::Lost(loss)
    }

    /// Makes sure that the session was alive at `since`: it has answered a statement that was sent no earlier.
    /// Concurrent callers share one statement.
    pub(crate) fn confirm(self: &Arc<Self>, since: Instant) -> Task<Result<(), Loss>> {
        let session = Arc::clone(self);
        // The caller may await this outside of a runtime.
        Task::to_await(&self.runtime, async move { session.answers_since(since).await })
    }

    async fn answers_since(self: &Arc<Self>, since: Instant) -> Result<(), Loss> {
        let mut slot = self.connection_for_guard().await.map_err(|reason| match reason {
            Unavailable::Lost(loss) => loss,
            Unavailable::Borrowed | Unavailable::PoolClosed | Unavailable::TimedOut => {
                Loss::Unresponsive
            }
        })?;
        if self.last_answered() >= since {
            return self.loss().map_or(Ok(()), Err);
        }
        let asked = Instant::now();
        let answer = within(self.heartbeat.bound(), async {
            sql::backend::heartbeat(slot.pg()?, None).await
        });
        let loss = match answer.await {
            Ok(pid) if pid == self.backend_pid() => {
                self.trust(asked);
                return Ok(());
            }
            Ok(_) => {
                self.server.proof.disprove();
                Loss::NoExclusion
            }
            // The server is alive, and so is the session.
            Err(error) if is_answer(&error) => return Ok(()),
            Err(error) => Loss::broken(error),
        };
        self.give_up(&loss);
        drop(slot.take());
        Err(loss)
    }

    /// Updates the number of the manager's locks after calls, because the report of a loss includes it.
    fn count(&self, calls: &[(KeyId, Call)], answers: &[bool]) {
        let mut locks = self.managed_locks.load(Ordering::Relaxed);
        for ((_, call), yes) in calls.iter().zip(answers) {
            match call {
                Call::TryLock(_) | Call::LockShared => locks += usize::from(*yes),
                Call::Unlock(_) => locks = locks.saturating_sub(usize::from(*yes)),
                Call::IsWaitedFor => {}
            }
        }
        self.managed_locks.store(locks, Ordering::Relaxed);
    }

    /// Makes the keeper poll the idle connection for closure again.
    pub(crate) fn resume_polling(&self) {
        if let Some(wake) = self.wake.get() {
            wake.again();
        }
    }
}

fn is_forbidden(error: &sqlx::Error) -> bool {
    sqlstate(error).as_deref() == Some("42501")
}

/// Makes calls for a role that may not list locks: every key counts as waited for. The statement that failed has called
/// nothing, because the server checks the role's rights first.
async fn call_blindly(
    pg: &mut PgConnection,
    calls: &[(KeyId, Call)],
) -> Result<batch::Called, sqlx::Error> {
    let others = calls.iter().copied().filter(|(_, call)| *call != Call::IsWaitedFor);
    let mut called = match others.collect::<Vec<_>>().as_slice() {
        [] => {
            let backend_pid = sql::backend::heartbeat(pg, None).await?;
            batch::Called { backend_pid, answers: Vec::new() }
        }
        others => batch::call_all(pg, others).await?,
    };
    let mut answers = called.answers.into_iter();
    let mut answer = |call| call == Call::IsWaitedFor || answers.next().unwrap_or_default();
    called.answers = calls.iter().map(|(_, call)| answer(*call)).collect();
    Ok(called)
}

/// Returns the locks that calls may have acquired.
fn tried(calls: &[(KeyId, Call)]) -> Vec<(KeyId, Mode)> {
    let tried = |&(key, call)| match call {
        Call::TryLock(mode) => Some((key, mode)),
        Call::Unlock(_) | Call::LockShared | Call::IsWaitedFor => None,
    };
    calls.iter().filter_map(tried).collect()
}
