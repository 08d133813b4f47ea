//! An acquire in flight: from the pool's connection to the guard.

mod undo;
mod wait;

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use sqlx::pool::PoolConnection;
use sqlx::{PgConnection, PgPool, Postgres};
use tokio::runtime::Handle;

use super::budget::Permit;
use super::conn::Conn;
use super::policy::WaitPolicy;
use super::pool::lend;
use super::servers::{PoolServer, Server};
use super::slot::{ConnGuard, Unavailable};
use super::{DEADLINE, Session, within};
use crate::error::{Error, Loss, Result, chain, is_answer, refuses_settings, sqlstate};
use crate::key::KeyId;
use crate::metrics;
use crate::mode::Mode;
use crate::options::LockOptions;
use crate::request::{Need, Request};
use crate::sql;
use crate::sql::lock::Tried;

/// What the server said.
pub(crate) enum Verdict {
    Busy,
    Granted,
    /// Locks exclude nothing on this connection.
    Pooled,
    Standby,
}

/// What a guard stands for.
pub(crate) struct Granted {
    pub(crate) session: Arc<Session>,
    /// Of several keys of which one was asked for, that one.
    pub(crate) request: Request,
}

/// An acquire in flight.
///
/// # Drop
///
/// Undoes the acquire on a task. A statement that only tries is allowed to finish; one that waits is
/// cancelled from another connection. Then any lock that was granted meanwhile is released. If any of
/// that fails, the connection is closed.
pub(crate) struct Pending {
    session: Arc<Session>,
    /// `None` between two slices of a wait.
    slot: Option<ConnGuard>,
    request: Request,
    /// Shares that are counted: the session holds what they need.
    claimed: Vec<(KeyId, Mode)>,
    /// What the server is still to grant.
    missing: Vec<(KeyId, Mode)>,
    /// The role has a limit on idle sessions, which a holder may be.
    idle_limited: bool,
    /// The server has rejected the settings, and not the lock.
    settings_rejected: bool,
    stage: Stage,
    settled: bool,
}

/// What the server is doing for the acquire.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Stage {
    /// Nothing, and what it has granted is counted.
    Idle,
    /// Nothing that waits; it may have granted what is missing.
    Trying,
    /// It has the session in the lock's queue, until then, and may have granted the lock.
    Waiting(Instant),
}

impl Pending {
    /// An acquire on a session that is open and counts it as in flight.
    ///
    /// Waits for its connection. `Ok(None)` if the session ended before it was free.
    pub(crate) async fn join(
        session: Arc<Session>,
        request: &Request,
        policy: WaitPolicy,
    ) -> Result<Option<Self>, Unavailable> {
        let mut pending = Self::new(session, request);
        match pending.session.connection_for_acquire(policy).await {
            Ok(slot) => {
                let open = slot.is_some();
                pending.slot = Some(slot);
                Ok(open.then_some(pending))
            }
            Err(Unavailable::Lost(_)) => Ok(None),
            Err(reason) => Err(reason),
        }
    }

    /// An acquire on a session of its own, and the answer to its first try.
    ///
    /// Where the pool has idle connections, they are taken as they are, without sqlx's ping: the try shows whether a
    /// connection is alive, and a dead one is replaced. (The pool's `before_acquire` hook goes with the ping.) So is
    /// one to a standby: after a failover the primary may be elsewhere. Only then the pool is asked properly, which may
    /// wait and connect.
    pub(crate) async fn open(
        pool: &PgPool,
        server: &mut PoolServer,
        request: &Request,
        options: &LockOptions,
        policy: WaitPolicy,
    ) -> Result<(Self, Verdict)> {
        let runtime = Handle::current();
        let started = Instant::now();
        let budget = Arc::clone(&server.budget);
        let server = server.server(pool);
        let mut permit = budget.permit(request.key(), options.reserve_connections, policy).await?;
        while let Some(idle) = pool.try_acquire() {
            let mut pending = Self::start(pool, server, idle, permit, &runtime, request, options);
            // A connection on which nothing arrives must not use up the time of the others.
            let limit = policy.answer_limit().min(options.heartbeat.answer_limit());
            let failed = match pending.ask(limit).await {
                Ok(Verdict::Standby) => Error::Standby { key: request.key().clone() },
                Ok(verdict) => return Ok((pending, verdict)),
                Err(error) if is_answer(&error) => return Err(Box::pin(pending.fail(error)).await),
                Err(error) => Error::acquiring(request.key(), error),
            };
            tracing::debug!(
                lock.key = %request.key().id(),
                lock.name = request.key().name(),
                error = %chain(&failed),
                "an idle connection of the pool was of no use; taking another"
            );
            // Before the pool is asked: this may be its only connection.
            pending.close();
            if started.elapsed() >= policy.answer_limit() {
                return Err(failed);
            }
            permit = budget.permit(request.key(), options.reserve_connections, policy).await?;
        }
        Box::pin(async {
            let pooled = lend(pool, request.key(), policy, started).await?;
            let pending = Self::start(pool, server, pooled, permit, &runtime, request, options);
            pending.try_now(policy).await
        })
        .await
    }

    fn start(
        pool: &PgPool,
        server: &Arc<Server>,
        pooled: PoolConnection<Postgres>,
        permit: Permit,
        runtime: &Handle,
        request: &Request,
        options: &LockOptions,
    ) -> Self {
        let conn = Conn::new(pooled, runtime.clone(), Some(permit));
        let session = Session::open(pool, server, conn, runtime.clone(), options);
        let mut pending = Self::new(session, request);
        // Nothing else knows the session yet.
        pending.slot = pending.session.free_connection();
        pending
    }

    fn new(session: Arc<Session>, request: &Request) -> Self {
        Self {
            session,
            slot: None,
            request: request.clone(),
            claimed: Vec::new(),
            missing: request.ids().collect(),
            idle_limited: false,
            settings_rejected: false,
            stage: Stage::Idle,
            settled: false,
        }
    }

    fn pg(&mut self) -> Result<&mut PgConnection, sqlx::Error> {
        self.slot.as_mut().ok_or(sqlx::Error::PoolClosed)?.pg()
    }

    /// Asks the server once: the whole of an acquire of what is free.
    ///
    /// A transaction that was left open on the pooled connection is ended; a session lock does
    /// not depend on it.
    async fn ask(&mut self, limit: Duration) -> Result<Verdict, sqlx::Error> {
        let Self { session, slot, request, claimed, missing, stage, settings_rejected, .. } = self;
        let options = session.options();
        let Some(conn) = slot.as_mut().and_then(|slot| slot.as_mut()) else {
            return Err(sqlx::Error::PoolClosed);
        };
        // Another handle of the session may have acquired some of it meanwhile.
        session.ledger().claim(missing, claimed);
        if missing.is_empty() && request.need == Need::All {
            return Ok(Verdict::Granted);
        }
        let asked = Instant::now();
        // Pinned here, and boxed below what is rare: all that an acquire may have to do is 3 kB of future.
        let tried = {
            let answer = pin!(async {
                session.tidy(conn).await?;
                *stage = Stage::Trying;
                let pg = conn.pg()?;
                let need = request.need;
                let with_settings = options.require_settings || !session.server.refuses_settings();
                match sql::lock::try_lock(pg, missing, need, options, with_settings).await {
                    Err(error) if needs_another_try(&error) => {
                        Box::pin(async {
                            if sqlstate(&error).as_deref() == Some("25P02") {
                                sql::backend::end_transaction(pg).await?;
                                return sql::lock::try_lock(
                                    pg,
                                    missing,
                                    need,
                                    options,
                                    with_settings,
                                )
                                .await;
                            }
                            // In case the server took a lock first.
                            session.give_up_unknown(pg, missing).await.ok();
                            let tried =
                                sql::lock::try_lock(pg, missing, need, options, false).await?;
                            if options.require_settings {
                                *settings_rejected = true;
                                return Err(error);
                            }
                            if session.server.set_refused() {
                                tracing::warn!(
                                    error = %chain(&error),
                                    "the server rejects a setting by which it detects a dead client; a \
                                     host that vanishes keeps its locks for as long as the server's own \
                                     settings say"
                                );
                            }
                            Ok(tried)
                        })
                        .await
                    }
                    tried => tried,
                }
            });
            within(limit, answer).await?
        };
        let Tried { backend_pid, count, idle_limited, refused } = tried;
        if *session.backend_pid.get_or_init(|| backend_pid) != backend_pid {
            session.server.proof.disprove();
            session.retrieve(None, backend_pid, missing.clone());
            return Ok(Verdict::Pooled);
        }
        session.trust(asked);
        if refused {
            session.settings_refused.store(true, Ordering::Relaxed);
        } else {
            session.server.set_accepted();
        }
        self.idle_limited |= idle_limited;
        Ok(self.judge(count))
    }

    /// Counts what was granted of what was tried.
    fn judge(&mut self, count: Option<usize>) -> Verdict {
        self.stage = Stage::Idle;
        let Some(count) = count else { return Verdict::Standby };
        let granted = match self.request.need {
            Need::Nothing => return Verdict::Granted,
            Need::All => 0..count,
            Need::Any => {
                let only = self.missing.get(count).and_then(|&(key, _)| self.request.only(key));
                let Some(only) = only else { return Verdict::Busy };
                self.missing = only.ids().collect();
                self.request = only;
                0..1
            }
        };
        // A loss shows when the acquire is settled.
        if !self.count(granted) || self.missing.is_empty() {
            Verdict::Granted
        } else {
            Verdict::Busy
        }
    }

    /// Counts shares of the first ones that are missing: the server has granted them. Returns false if the session was
    /// lost while the answer was on its way: then nothing is counted, and the connection is closed.
    fn count(&mut self, granted: std::ops::Range<usize>) -> bool {
        if granted.is_empty() {
            return true;
        }
        let mut ledger = self.session.ledger();
        let granted = self.missing.drain(granted);
        match ledger.loss() {
            None => {
                self.claimed.extend(granted.inspect(|&(key, mode)| ledger.granted(key, mode)));
                return true;
            }
            Some(Loss::NoExclusion) => self.session.left_behind().extend(granted),
            Some(_) => {}
        }
        false
    }

    /// Asks, and takes the acquire back if that fails.
    pub(crate) async fn try_now(mut self, policy: WaitPolicy) -> Result<(Self, Verdict)> {
        match self.ask(policy.answer_limit()).await {
            Ok(verdict) => Ok((self, verdict)),
            Err(error) => Err(self.fail(error).await),
        }
    }

    /// Does what the server's answer calls for. `None` if the time is over.
    pub(crate) async fn settle(
        self,
        verdict: Verdict,
        policy: WaitPolicy,
        waiting: &mut metrics::Waiting,
    ) -> Result<Option<Granted>> {
        match verdict {
            Verdict::Granted => self.granted(policy).await.map(Some),
            Verdict::Busy => Box::pin(self.wait(policy, waiting)).await,
            // The drop of `self` releases what may have been granted.
            Verdict::Pooled => Err(Error::NoExclusion { key: self.request.key().clone() }),
            Verdict::Standby => {
                let key = self.request.key().clone();
                self.withdraw().await;
                Err(Error::Standby { key })
            }
        }
    }

    /// Lifts the limit that a role has on idle sessions, for as long as the session holds something.
    async fn lift_idle_timeout(&mut self) -> Result<(), sqlx::Error> {
        self.session.restore_settings();
        within(DEADLINE, async { sql::settings::lift_idle_timeout(self.pg()?).await }).await
    }

    /// Shows in `application_name` what the session holds or waits for, if the application wants that.
    async fn show(&mut self, policy: WaitPolicy) -> Result<(), sqlx::Error> {
        let Some(name) = self.session.to_show(&self.request) else { return Ok(()) };
        self.session.restore_settings();
        let showing = async { sql::settings::show_name(self.pg()?, &name).await };
        Box::pin(within(policy.answer_limit(), showing)).await
    }

    /// Counts what the server has granted.
    async fn granted(mut self, policy: WaitPolicy) -> Result<Granted> {
        if self.idle_limited
            && let Err(error) = Box::pin(self.lift_idle_timeout()).await
        {
            return Err(Box::pin(self.fail(error)).await);
        }
        if let Err(error) = self.show(policy).await {
            return Err(Box::pin(self.fail(error)).await);
        }
        let Session { server, pool, .. } = &*self.session;
        if !server.proof.is_positive()
            && !Box::pin(server.proof.allows(pool, policy.deadline())).await
        {
            if let Some(slot) = self.slot.as_mut() {
                self.session.give_up_pooled(slot, Vec::new());
            }
            return Err(Error::NoExclusion { key: self.request.key().clone() });
        }
        let settled = self.session.ledger().settle(self.request.need);
        if let Err(reason) = settled {
            // The drop of `self` closes the connection.
            return Err(Error::lost(self.request.key(), reason));
        }
        self.settled = true;
        self.session.keep(Instant::now());
        Ok(Granted { session: Arc::clone(&self.session), request: self.request.clone() })
    }
}

/// Whether a statement that tries may succeed another time: in a failed transaction, or with settings that may be
/// what is rejected.
fn needs_another_try(error: &sqlx::Error) -> bool {
    sqlstate(error).as_deref() == Some("25P02") || refuses_settings(error)
}
