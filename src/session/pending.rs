//! An acquire in flight: from the pool's connection to the guard.

mod undo;
mod wait;

use std::pin::pin;
use std::sync::Arc;
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
use crate::application_name;
use crate::error::{Error, Loss, Result, chain, is_answer, refuses_settings, sqlstate};
use crate::key::KeyId;
use crate::metrics;
use crate::mode::Mode;
use crate::options::LockOptions;
use crate::request::{Need, Request};
use crate::sql;
use crate::sql::lock::Tried;

/// The server's answer to a try.
pub(crate) enum Verdict {
    Busy,
    Granted,
    /// Locks exclude nothing on this connection.
    Pooled,
    Standby,
}

/// A granted acquire, from which a guard is made.
pub(crate) struct Granted {
    pub(crate) session: Arc<Session>,
    /// If one of several keys was requested, this contains only the key that was granted.
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
    /// The shares that the ledger counts, because the session holds their locks.
    claimed: Vec<(KeyId, Mode)>,
    /// The locks that the server has not granted yet.
    missing: Vec<(KeyId, Mode)>,
    /// Whether the role has a limit on idle sessions. A session that holds a lock may be idle.
    idle_limited: bool,
    /// Whether the server has rejected the settings, and not the lock.
    settings_rejected: bool,
    stage: Stage,
    settled: bool,
}

/// The state of the acquire on the server.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Stage {
    /// No statement is in flight, and the ledger counts everything that was granted.
    Idle,
    /// No statement waits for the lock, but the server may have granted what is missing.
    Trying,
    /// The session is in the lock's queue, until this time at most, and the server may have granted the lock.
    Waiting(Instant),
}

impl Pending {
    /// Starts an acquire on an open session, which already counts it as in flight.
    ///
    /// Waits for the session's connection. Returns `Ok(None)` if the session ended before the connection was free.
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

    /// Starts an acquire on a session of its own. Returns it with the answer to its first try.
    ///
    /// Idle connections of the pool are used as they are, without sqlx's ping, because the try shows whether a
    /// connection is alive. (The pool's `before_acquire` hook is skipped with the ping.) A dead connection is replaced,
    /// and so is a connection to a standby, because after a failover the primary may be another server. If no idle
    /// connection is left, `PgPool::acquire` is called, which may wait and connect.
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
            // A connection that gets no answer must not use up the time of the others.
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
            // Closed before the pool is asked again, because this may be the pool's only connection.
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
        // The connection is free, because nothing else knows the session yet.
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
        self.conn()?.pg()
    }

    fn conn(&mut self) -> Result<&mut Conn, sqlx::Error> {
        self.slot.as_mut().and_then(|slot| slot.as_mut()).ok_or(sqlx::Error::PoolClosed)
    }

    /// Asks the server once. If the locks are free, this is the whole acquire.
    ///
    /// A transaction that was left open on the pooled connection is rolled back, which does not affect session-level
    /// locks.
    async fn ask(&mut self, limit: Duration) -> Result<Verdict, sqlx::Error> {
        let Self { session, slot, request, claimed, missing, stage, settings_rejected, .. } = self;
        let options = session.options();
        let Some(conn) = slot.as_mut().and_then(|slot| slot.as_mut()) else {
            return Err(sqlx::Error::PoolClosed);
        };
        // Another handle of the session may have acquired some of the locks meanwhile.
        session.ledger().claim(missing, claimed);
        if missing.is_empty() && request.need == Need::All {
            return Ok(Verdict::Granted);
        }
        let asked = Instant::now();
        // Pinned here, and the rare cases are boxed below, because the future of everything that an acquire may have to
        // do is 3 kB.
        let tried = {
            let answer = pin!(async {
                session.tidy(conn).await?;
                *stage = Stage::Trying;
                let pg = conn.pg()?;
                let need = request.need;
                let with_settings = options.require_settings || !session.server.refuses_settings();
                let tried = sql::lock::try_lock(pg, missing, need, options, with_settings).await;
                let Err(error) = tried else { return tried };
                if sqlstate(&error).as_deref() == Some("25P02") {
                    return Box::pin(async {
                        sql::backend::end_transaction(pg).await?;
                        sql::lock::try_lock(pg, missing, need, options, with_settings).await
                    })
                    .await;
                }
                if !refuses_settings(&error) {
                    return Err(error);
                }
                Box::pin(session.try_without_settings(pg, missing, need, error, settings_rejected))
                    .await
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
            conn.settings.rejected = true;
        } else {
            session.server.set_accepted();
        }
        self.idle_limited |= idle_limited;
        Ok(self.judge(count))
    }

    /// Counts the locks that a try was granted, and returns the verdict.
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
        // A loss is reported when the acquire is settled.
        if !self.count(granted) || self.missing.is_empty() {
            Verdict::Granted
        } else {
            Verdict::Busy
        }
    }

    /// Counts shares of these missing locks, which the server has granted. Returns false if the session was lost while
    /// the answer was in flight; then nothing is counted, and the connection is closed.
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

    /// Asks the server once, and undoes the acquire if that fails.
    pub(crate) async fn try_now(mut self, policy: WaitPolicy) -> Result<(Self, Verdict)> {
        match self.ask(policy.answer_limit()).await {
            Ok(verdict) => Ok((self, verdict)),
            Err(error) => Err(self.fail(error).await),
        }
    }

    /// Completes the acquire as the server's answer requires, which may be to wait. Returns `None` if the time is over.
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

    /// Disables the role's limit on idle sessions, for as long as the session holds something.
    async fn lift_idle_timeout(&mut self) -> Result<(), sqlx::Error> {
        let conn = self.conn()?;
        conn.settings.to_restore = true;
        within(DEADLINE, async { sql::settings::lift_idle_timeout(conn.pg()?).await }).await
    }

    /// Shows the requested lock in `application_name`, if the options say so.
    async fn show(&mut self, policy: WaitPolicy) -> Result<(), sqlx::Error> {
        let key = self.request.key().id();
        if self.session.options().application_name.is_none() || !self.conn()?.settings.show(key) {
            return Ok(());
        }
        let name = self.session.options().application_name.as_deref().unwrap_or_default();
        let name = application_name::of(name, &self.request);
        let showing = async { sql::settings::show_name(self.pg()?, &name).await };
        Box::pin(within(policy.answer_limit(), showing)).await
    }

    /// Completes an acquire whose locks the server has granted.
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

impl Session {
    /// Tries locks without the settings that the server may have rejected. If they are required, returns that error,
    /// and sets `settings_rejected`.
    async fn try_without_settings(
        &self,
        pg: &mut PgConnection,
        locks: &[(KeyId, Mode)],
        need: Need,
        error: sqlx::Error,
        settings_rejected: &mut bool,
    ) -> Result<Tried, sqlx::Error> {
        // In case it was another error, and the server had granted a lock before.
        self.give_up_unknown(pg, locks).await.ok();
        let tried = sql::lock::try_lock(pg, locks, need, &self.options, false).await?;
        if self.options.require_settings {
            *settings_rejected = true;
            return Err(error);
        }
        if self.server.set_refused() {
            tracing::warn!(
                error = %chain(&error),
                "the server rejects a setting by which it detects a dead client; a host that vanishes keeps its locks \
                 for as long as the server's own settings say"
            );
        }
        Ok(tried)
    }
}
