//! Waits for busy locks in the server's queue.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::time::timeout;

use super::{Granted, Pending, Stage, Verdict};
use crate::error::{Error, Loss, Result, is_answer, refuses_settings, sqlstate};
use crate::key::KeyId;
use crate::metrics;
use crate::mode::Mode;
use crate::session::conn::Use;
use crate::session::policy::{GRACE, WaitPolicy};
use crate::session::slot::Unavailable;
use crate::session::{silence, within};
use crate::sql;
use crate::sql::wait::{Slice, Waited};

/// How long a slice lasts at most if other guards of the session have to wait for the connection.
const JOINED_SLICE: Duration = Duration::from_secs(5);

/// How much longer than the slice an unbounded wait lasts if the server does not answer.
const LATE: Duration = Duration::from_secs(8);

impl Pending {
    /// Waits in the server's queue, slice by slice, for one lock after the other. Returns `None` if the time is over.
    ///
    /// Between two slices the session's connection is free for its other handles.
    pub(super) async fn wait(
        mut self,
        policy: WaitPolicy,
        waiting: &mut metrics::Waiting,
    ) -> Result<Option<Granted>> {
        let mut plainly = self.session.server.waits_plainly.load(Ordering::Relaxed);
        loop {
            let session = Arc::clone(&self.session);
            session.ledger().claim(&mut self.missing, &mut self.claimed);
            let left = policy.left();
            if left.is_some_and(|left| left.is_zero()) {
                self.withdraw().await;
                return Ok(None);
            }
            let Some(&(key, mode)) = self.missing.first() else {
                return self.granted(policy).await.map(Some);
            };
            waiting.start();
            if let Err(error) = self.show(policy).await {
                return Err(self.fail(error).await);
            }
            let limit = self.slice(left).await;
            let is_rejected = self.conn().is_ok_and(|conn| conn.settings.rejected);
            let keepalives = (!is_rejected).then(|| session.options().keepalives);
            let asked = Instant::now();
            let slice = Slice { key, mode, limit, keepalives };
            // The drop of `self` cleans up.
            let Some(answer) = self.wait_once(slice, left, plainly).await? else { return Ok(None) };
            let granted = match answer {
                Ok(waited) => {
                    if plainly {
                        session.server.waits_plainly.store(true, Ordering::Relaxed);
                    }
                    if waited.backend_pid != session.backend_pid() {
                        session.server.proof.disprove();
                        session.retrieve(None, waited.backend_pid, self.missing.clone());
                        return Err(Error::NoExclusion { key: self.request.key().clone() });
                    }
                    waited.granted
                }
                Err(error) => match sqlstate(&error).as_deref() {
                    // The timeout was not caught, so the slice is over, and the lock may be held.
                    Some("55P03") => false,
                    // The role may not use plpgsql, or may not change a setting.
                    Some("42501" | "42704") if !plainly => {
                        self.stage = Stage::Idle;
                        plainly = true;
                        continue;
                    }
                    _ if keepalives.is_some() && refuses_settings(&error) => {
                        self.stage = Stage::Idle;
                        if let Ok(conn) = self.conn() {
                            conn.settings.rejected = true;
                        }
                        plainly = session.server.waits_plainly.load(Ordering::Relaxed);
                        continue;
                    }
                    _ => return Err(self.fail(error).await),
                },
            };
            self.stage = Stage::Trying;
            let limit = policy.answer_limit();
            let granted = match timeout(limit, self.is_granted(granted, key, mode)).await {
                Ok(Ok(granted)) => granted,
                failed => return self.stop(failed.ok().and_then(Result::err), limit, policy).await,
            };
            if granted {
                // Confirmed before the lock counts as held; otherwise the clock would end the session, because its last
                // answer is too old.
                if let Err(error) = self.confirm(asked).await {
                    return Err(self.fail(error).await);
                }
                // A loss is reported when the acquire is settled.
                self.count(0..1);
            }
            self.stage = Stage::Idle;
            if granted {
                if self.missing.is_empty() {
                    return self.granted(policy).await.map(Some);
                }
                // The next locks may be free.
                match self.ask(policy.answer_limit()).await {
                    Ok(Verdict::Granted) => return self.granted(policy).await.map(Some),
                    Ok(Verdict::Busy) => {}
                    // The connection was neither when the first lock was granted.
                    Ok(Verdict::Pooled | Verdict::Standby) => {
                        return Err(Error::NoExclusion { key: self.request.key().clone() });
                    }
                    Err(error) => return Err(self.fail(error).await),
                }
            }
            self.slot = None;
            match session.connection_for_acquire(policy).await {
                Ok(slot) => {
                    // The application may have borrowed the connection between two slices.
                    let limit = policy.answer_limit();
                    let tidied = timeout(limit, self.slot.insert(slot).tidied()).await;
                    let tidied = tidied.map(|tidied| tidied.map(drop));
                    if !matches!(tidied, Ok(Ok(()))) {
                        let failed = tidied.ok().and_then(Result::err);
                        return self.stop(failed, limit, policy).await;
                    }
                }
                Err(Unavailable::TimedOut) => return Ok(None),
                Err(Unavailable::Lost(loss)) => {
                    return Err(Error::broken(self.request.key(), &loss));
                }
                Err(reason) => return Err(reason.error(self.request.key())),
            }
        }
    }

    /// Ends a wait after a statement that failed, or did not return within `limit`. Returns `None` if the caller's time
    /// is over.
    async fn stop(
        self,
        failed: Option<sqlx::Error>,
        limit: Duration,
        policy: WaitPolicy,
    ) -> Result<Option<Granted>> {
        match failed {
            Some(error) => Err(self.fail(error).await),
            // The drop of `self` cleans up.
            None if policy.left().is_some_and(|left| left.is_zero()) => Ok(None),
            None => Err(self.fail(silence(limit)).await),
        }
    }

    /// Waits for one slice. Returns an error if the session was lost, the pool was closed, or the server does not
    /// answer; `None` if the server does not answer and the caller's time is over.
    async fn wait_once(
        &mut self,
        slice: Slice,
        left: Option<Duration>,
        plainly: bool,
    ) -> Result<Option<Result<Waited, sqlx::Error>>> {
        let session = Arc::clone(&self.session);
        let key = self.request.key().clone();
        self.stage = Stage::Waiting(Instant::now() + slice.limit);
        let conn = self.conn();
        let waiting = async {
            let conn = conn?;
            if slice.keepalives.is_some() {
                conn.settings.to_restore = true;
                if conn.settings.made_for == Use::Application {
                    conn.settings.made_for = Use::Statements;
                }
            }
            let pg = conn.pg()?;
            if plainly {
                sql::wait::wait_plainly(pg, slice).await
            } else {
                sql::wait::wait(pg, slice).await
            }
        };
        let late = slice.limit + LATE;
        let over = left.map(|left| left + GRACE).filter(|over| *over < late);
        tokio::select! {
            biased;
            answer = timeout(over.unwrap_or(late), waiting) => match answer {
                Ok(answer) => Ok(Some(answer)),
                Err(_) if over.is_some() => Ok(None),
                Err(_) => Err(Error::acquiring(&key, silence(slice.limit))),
            },
            () = session.pool.close_event() => Err(Error::PoolClosed { key }),
            loss = session.lost() => Err(Error::broken(&key, &loss)),
        }
    }

    /// Returns how long the next statement waits at most.
    ///
    /// Slices are long, because a waiter that is re-queued loses its place; but the snapshot of the statement must not
    /// get old. Slices vary, so that waiters don't re-queue in step. A session with other guards or handles waits for a
    /// shorter time, because those wait for the connection.
    async fn slice(&mut self, left: Option<Duration>) -> Duration {
        let deadlock_timeout = self.deadlock_timeout().await;
        let longest = self.session.options().slice();
        let session = &self.session;
        // Other handles may join a session that was kept for a guard, even after that guard is released.
        let is_joined = session.kept_since.get().is_some() && !session.ledger().is_pinned();
        let slice = if is_joined || session.ledger().has_more_than(self.claimed.len()) {
            longest.min(JOINED_SLICE)
        } else {
            let jitter = u32::try_from(RandomState::new().hash_one(0) % 100).unwrap_or_default();
            longest / 1000 * (1000 - jitter)
        };
        // Otherwise a deadlock would look like a timeout.
        let slice = slice.max(deadlock_timeout + Duration::from_secs(1));
        left.map_or(slice, |left| left.min(slice))
    }

    /// Returns the server's `deadlock_timeout`, which is queried once.
    async fn deadlock_timeout(&mut self) -> Duration {
        let server = Arc::clone(&self.session.server);
        if let Some(known) = server.deadlock_timeout.get() {
            return *known;
        }
        let limit = self.session.heartbeat.answer_limit();
        let asking = within(limit, async { sql::backend::deadlock_timeout(self.pg()?).await });
        // If the connection is broken, the wait will fail.
        let asked = asking.await.ok().flatten().and_then(|asked| u64::try_from(asked).ok());
        let Some(milliseconds) = asked else { return Duration::from_secs(1) };
        *server.deadlock_timeout.get_or_init(|| Duration::from_millis(milliseconds))
    }

    /// Returns whether a wait was granted the lock: its timeout can strike after the grant.
    async fn is_granted(
        &mut self,
        granted: bool,
        key: KeyId,
        mode: Mode,
    ) -> Result<bool, sqlx::Error> {
        if granted {
            return Ok(true);
        }
        let pid = self.session.backend_pid();
        let pg = self.pg()?;
        match sql::backend::holdings(pg, &[pid]).await {
            Ok((_, held)) => Ok(held.contains(&(pid, key, mode))),
            // The role may not list locks. The lock is released in any case, and the server warns if it was not held.
            Err(error) if is_answer(&error) => {
                sql::release::unlock_all(pg, &[(key, mode)]).await?;
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// Makes sure that the server still receives from us, after a wait in which nothing was sent to it.
    ///
    /// The grant proves only that we receive from the server. An answer proves that the server receives from us, and is
    /// not about to close the connection. It also says which backend sent it.
    async fn confirm(&mut self, waiting_since: Instant) -> Result<(), sqlx::Error> {
        let mut asked = waiting_since;
        let heartbeat = self.session.heartbeat;
        if waiting_since.elapsed() > heartbeat.interval {
            asked = Instant::now();
            let answer = async { sql::backend::heartbeat(self.pg()?, None).await };
            let backend_pid = within(heartbeat.answer_limit(), answer).await?;
            if backend_pid != self.session.backend_pid() {
                // The connection is closed with the slot.
                self.session.give_up(&Loss::NoExclusion);
            }
        }
        self.session.trust(asked);
        Ok(())
    }
}
