//! An acquire under way: from the pool's connection to the guard.

use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sqlx::pool::PoolConnection;
use sqlx::{PgPool, Postgres};
use tokio::runtime::Handle;
use tokio::time::{timeout, timeout_at};

use super::conn::Conn;
use super::ledger::Modes;
use super::recover::silence;
use super::servers::Server;
use super::task::Task;
use super::{Backend, ConnGuard, DEADLINE, Session, within, within_task};
use crate::error::{Error, Loss, Result, is_answer, sqlstate};
use crate::held::Held;
use crate::key::{Key, KeyId};
use crate::mode::Mode;
use crate::options::LockOptions;
use crate::request::{Need, Request};
use crate::sql::{self, WaitLimit, Waited};

/// What the server said.
#[derive(Debug)]
pub(crate) enum Verdict {
    Busy,
    Granted,
    /// A pooler in transaction mode sits in between.
    Pooled,
    Standby,
}

/// For how long an acquire waits for a busy lock.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Patience {
    /// Never for the lock, and until then for the pool.
    ForPool(Instant),
    Forever,
    Never,
    Until(Instant),
}

/// An acquire under way.
///
/// # Drop
///
/// Takes the acquire back on a task. A statement that tries is let finish; one that waits is
/// cancelled from another connection. Then what was granted all the same is given up. If any of that
/// fails, the connection is closed.
#[derive(Debug)]
pub(crate) struct Pending {
    session: Arc<Session>,
    // Invariant: `Some` until the acquire is settled one way or the other.
    slot: Option<ConnGuard>,
    request: Request,
    /// What of it the session did not hold before; the server has granted the first `taken`.
    missing: Vec<(KeyId, Mode)>,
    taken: usize,
    options: LockOptions,
    /// The role has a limit on idle sessions, which a holder may be.
    idle_limited: bool,
    stage: Stage,
    settled: bool,
}

/// What the server is doing for the acquire.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Stage {
    /// Nothing, and it has granted nothing.
    Nothing,
    /// Nothing that waits; it may have granted the lock.
    Trying,
    /// It has the session in the lock's queue, and may have granted the lock.
    Waiting,
}

/// How long an acquire looks for a pooler.
const PROBE: Duration = Duration::from_secs(1);

/// How much later than the server a bounded wait gives up, if the server does not answer.
const GRACE: Duration = Duration::from_millis(500);

impl Patience {
    /// Waits for what is not the lock itself. `None` if the patience runs out.
    pub(crate) async fn bound<T>(self, future: impl Future<Output = T>) -> Option<T> {
        match self {
            Self::Forever | Self::Never => Some(future.await),
            Self::ForPool(deadline) | Self::Until(deadline) => {
                timeout_at(deadline.into(), future).await.ok()
            }
        }
    }

    /// How long an answer may take that needs no wait.
    fn deadline(self) -> Duration {
        match self {
            Self::ForPool(_) | Self::Forever | Self::Never => DEADLINE,
            Self::Until(_) => self.left().map_or(DEADLINE, |left| DEADLINE.min(left + GRACE)),
        }
    }

    fn left(self) -> Option<Duration> {
        match self {
            Self::Forever => None,
            Self::ForPool(_) | Self::Never => Some(Duration::ZERO),
            Self::Until(deadline) => Some(deadline.saturating_duration_since(Instant::now())),
        }
    }
}

impl Pending {
    /// An acquire on a session that is open and counts it as pending.
    ///
    /// Waits for its connection. `None` if the session ended before it was free.
    pub(crate) async fn join(
        session: Arc<Session>,
        request: &Request,
        options: &LockOptions,
    ) -> Option<Self> {
        let mut pending = Self::new(session, request, options);
        let slot = pending.session.connection().await;
        let open = slot.is_some();
        pending.slot = Some(slot);
        open.then_some(pending)
    }

    /// An acquire on a session of its own, and the answer to its first try.
    ///
    /// Where the pool has an idle connection, it is taken as it is, without sqlx's ping: the try
    /// will tell whether it is alive, and a dead one is replaced. (The pool's `before_acquire` hook
    /// goes with the ping.) Only then the pool is asked properly, which may wait and connect.
    pub(crate) async fn open(
        pool: &PgPool,
        server: &Arc<Server>,
        request: &Request,
        options: &LockOptions,
        patience: Patience,
    ) -> Result<(Self, Verdict)> {
        let runtime = Handle::current();
        if let Some(idle) = pool.try_acquire() {
            let mut pending = Self::start(pool, server, idle, &runtime, request, options);
            match pending.ask(patience).await {
                Ok(verdict) => return Ok((pending, verdict)),
                Err(error) if is_answer(&error) => return Err(Box::pin(pending.fail(error)).await),
                Err(error) => tracing::debug!(
                    key = %request.key(),
                    error = &error as &dyn std::error::Error,
                    "an idle connection of the pool was dead; taking another"
                ),
            }
            // Before the pool is asked: this may be its only connection.
            pending.close();
        }
        Box::pin(async {
            let pooled = lend(pool, request.key(), patience).await?;
            let pending = Self::start(pool, server, pooled, &runtime, request, options);
            pending.try_now(patience).await
        })
        .await
    }

    fn start(
        pool: &PgPool,
        server: &Arc<Server>,
        pooled: PoolConnection<Postgres>,
        runtime: &Handle,
        request: &Request,
        options: &LockOptions,
    ) -> Self {
        let conn = Conn::new(pooled, runtime.clone());
        let session = Session::open(pool, server, conn, runtime.clone(), options);
        let mut pending = Self::new(session, request, options);
        // Nobody else knows the session yet.
        pending.slot = pending.session.free_connection();
        pending
    }

    fn new(session: Arc<Session>, request: &Request, options: &LockOptions) -> Self {
        Self {
            session,
            slot: None,
            request: request.clone(),
            missing: Vec::new(),
            taken: 0,
            options: options.clone(),
            idle_limited: false,
            stage: Stage::Nothing,
            settled: false,
        }
    }

    /// Asks the server once: the whole of an acquire of what is free.
    ///
    /// A transaction that somebody left open on the pooled connection is ended; a session lock does
    /// not depend on it.
    async fn ask(&mut self, patience: Patience) -> Result<Verdict, sqlx::Error> {
        let Self { session, slot, request, missing, taken, options, stage, .. } = self;
        let Some(conn) = slot.as_mut().and_then(|slot| slot.as_mut()) else {
            return Err(sqlx::Error::PoolClosed);
        };
        let asked = Instant::now();
        let need = request.need;
        if *taken == 0 {
            // Another handle of the session may have been here since it was joined.
            *missing = session.ledger().missing(request);
            if missing.is_empty() && need != Need::Nothing {
                return Ok(Verdict::Granted);
            }
        }
        let rest = missing.get(*taken..).unwrap_or_default();
        let allow_standby = options.standby_allowed();
        // Pinned here, and boxed below what is rare: all that an acquire may have to do is 3 kB of future.
        let tried = {
            let answer = pin!(async {
                session.tidy(conn).await?;
                let pg = conn.pg()?;
                let server = &session.server;
                if !server.is_direct() {
                    let limit = patience.deadline().min(PROBE);
                    // Without an answer the next acquire asks again.
                    match timeout(limit, Box::pin(session.is_pooled(pg))).await {
                        Ok(Ok(Some(true))) => return Ok(None),
                        Ok(Ok(Some(false))) => server.set_direct(true),
                        Ok(Ok(None)) | Err(_) => {}
                        Ok(Err(error)) => return Err(error),
                    }
                }
                *stage = Stage::Trying;
                let without = server.refuses_settings() && !options.settings_required();
                let vigilance = (!without).then(|| (options.vigilance(), options.mark()));
                let tried = match sql::try_lock(pg, rest, need, vigilance, allow_standby).await {
                    Err(error) if sqlstate(&error).as_deref() == Some("25P02") => {
                        Box::pin(async {
                            sql::end_transaction(pg).await?;
                            sql::try_lock(pg, rest, need, vigilance, allow_standby).await
                        })
                        .await
                    }
                    Err(error) if refuses_settings(&error) && !options.settings_required() => {
                        server.refused_settings();
                        tracing::warn!(
                            error = &error as &dyn std::error::Error,
                            "the server refuses a setting by which it would notice a dead client; a host \
                         that vanishes keeps its locks for as long as the server's own settings say"
                        );
                        Box::pin(async {
                            // In case the server took a lock first.
                            sql::unlock_if_held(pg, rest).await?;
                            sql::try_lock(pg, rest, need, None, allow_standby).await
                        })
                        .await
                    }
                    tried => tried,
                };
                tried.map(Some)
            });
            within(patience.deadline(), answer).await?
        };
        let Some(tried) = tried else { return Ok(Verdict::Pooled) };
        let backend = Backend { pid: tried.backend_pid, known_since: Instant::now() };
        if session.backend.get_or_init(|| backend).pid != tried.backend_pid {
            Box::pin(session.retrieve(conn, tried.backend_pid, &all_modes(rest))).await;
            return Ok(Verdict::Pooled);
        }
        session.trust(asked);
        self.idle_limited = tried.idle_limited;
        Ok(self.judge(tried.count))
    }

    /// Takes in what was granted of what was tried.
    fn judge(&mut self, count: Option<usize>) -> Verdict {
        let granted = match (count, self.request.need) {
            (None, _) => {
                self.stage = self.at_rest();
                return Verdict::Standby;
            }
            (Some(count), Need::All) => {
                self.taken += count;
                self.taken == self.missing.len()
            }
            (Some(_), Need::Nothing) => true,
            (Some(count), Need::Any) => {
                let granted = self.missing.get(count).and_then(|&(key, _)| self.request.only(key));
                if let Some(request) = granted {
                    self.missing = request.ids().collect();
                    self.request = request;
                    self.taken = 1;
                }
                self.taken == 1
            }
        };
        if granted {
            return Verdict::Granted;
        }
        self.stage = self.at_rest();
        Verdict::Busy
    }

    /// Asks, and takes the acquire back if that fails.
    pub(crate) async fn try_now(mut self, patience: Patience) -> Result<(Self, Verdict)> {
        match self.ask(patience).await {
            Ok(verdict) => Ok((self, verdict)),
            Err(error) => Err(self.fail(error).await),
        }
    }

    /// Does what the server's answer calls for. `None` if the patience ran out.
    pub(crate) async fn settle(self, verdict: Verdict, patience: Patience) -> Result<Option<Held>> {
        match verdict {
            Verdict::Granted => self.granted().await.map(Some),
            Verdict::Busy => Box::pin(self.wait(patience)).await,
            // The drop of `self` gives up what may have been granted.
            Verdict::Pooled => Err(Error::Pooled { key: self.request.key().clone() }),
            Verdict::Standby => {
                let key = self.request.key().clone();
                self.withdraw().await;
                Err(Error::Standby { key })
            }
        }
    }

    /// Waits in the server's queue, slice by slice, for one lock after the other. `None` if the
    /// patience ran out.
    async fn wait(mut self, patience: Patience) -> Result<Option<Held>> {
        let slice = self.options.slice();
        loop {
            let left = patience.left();
            if left.is_some_and(|left| left.is_zero()) {
                self.withdraw().await;
                return Ok(None);
            }
            let wanted = self.missing.get(self.taken).copied();
            let conn = self.slot.as_mut().and_then(|slot| slot.as_mut());
            let (Some((key, mode)), Some(conn)) = (wanted, conn) else {
                return Err(self.fail(sqlx::Error::PoolClosed).await);
            };
            self.stage = Stage::Waiting;
            let limit = WaitLimit { slice, left };
            let asked = Instant::now();
            let pg = match conn.pg() {
                Ok(pg) => pg,
                Err(error) => return Err(self.fail(error).await),
            };
            let waiting = sql::wait(pg, key, mode, limit);
            let answer = match timeout(limit.longest() + GRACE, waiting).await {
                Ok(answer) => answer,
                // The server is silent; the drop of `self` cleans up.
                Err(_) if left.is_some_and(|left| limit.longest() == left) => return Ok(None),
                Err(_) => return Err(Error::acquiring(self.request.key(), silence())),
            };
            match answer {
                Ok(Waited { backend_pid, .. }) if backend_pid != self.session.backend_pid() => {
                    self.session.retrieve(conn, backend_pid, &all_modes(&[(key, mode)])).await;
                    return Err(Error::Pooled { key: self.request.key().clone() });
                }
                Ok(Waited { granted: true, .. }) => {
                    self.stage = Stage::Trying;
                    self.session.trust(asked);
                    self.taken += 1;
                    if self.taken == self.missing.len() {
                        return self.confirm(asked).await.map(Some);
                    }
                    // The next ones may be free.
                    match self.ask(patience).await {
                        Ok(Verdict::Granted) => return self.granted().await.map(Some),
                        Ok(Verdict::Busy) => {}
                        // It was neither when the first one was granted.
                        Ok(Verdict::Pooled | Verdict::Standby) => {
                            return Err(Error::Pooled { key: self.request.key().clone() });
                        }
                        Err(error) => return Err(self.fail(error).await),
                    }
                }
                Ok(Waited { granted: false, .. }) => self.stage = self.at_rest(),
                // The timeout was not caught, so the slice is over, and the lock may be held.
                Err(error) if sqlstate(&error).as_deref() == Some("55P03") => {
                    self.stage = Stage::Trying;
                    if let Err(error) = sql::unlock_if_held(pg, &[(key, mode)]).await {
                        return Err(self.fail(error).await);
                    }
                    self.stage = self.at_rest();
                }
                Err(error) => return Err(self.fail(error).await),
            }
        }
    }

    /// What is left of the acquire between two statements that did not grant anything.
    fn at_rest(&self) -> Stage {
        if self.taken == 0 { Stage::Nothing } else { Stage::Trying }
    }

    /// Makes sure that the server still hears us, after a wait in which it was not told anything.
    ///
    /// The grant says that we hear the server. Only an answer says that the server hears us, and has
    /// not begun to give us up.
    async fn confirm(mut self, waiting_since: Instant) -> Result<Held> {
        if waiting_since.elapsed() > self.options.beat().interval
            && let Some(conn) = self.slot.as_mut().and_then(|slot| slot.as_mut())
        {
            let asked = Instant::now();
            let answer = async { sql::backend_pid(conn.pg()?).await };
            match within(self.options.beat().deadline, answer).await {
                Ok(_) => self.session.trust(asked),
                Err(error) => return Err(self.fail(error).await),
            }
        }
        self.granted().await
    }

    /// Lifts the limit that a role has on idle sessions, as long as the session holds something.
    async fn lift_idle_timeout(&mut self) -> Result<(), sqlx::Error> {
        let Some(conn) = self.slot.as_mut().and_then(|slot| slot.as_mut()) else { return Ok(()) };
        self.session.to_put_back();
        within(DEADLINE, async { sql::lift_idle_timeout(conn.pg()?).await }).await
    }

    /// Makes the guard's part of what the server granted.
    async fn granted(mut self) -> Result<Held> {
        if self.idle_limited
            && let Err(error) = Box::pin(self.lift_idle_timeout()).await
        {
            return Err(Box::pin(self.fail(error)).await);
        }
        let counted = self.session.ledger().granted(&self.request, &self.missing);
        if let Err(reason) = counted {
            // The drop of `self` gives the locks up.
            return Err(Error::lost(self.request.key(), reason));
        }
        self.settled = true;
        self.session.watch();
        Ok(Held::new(Arc::clone(&self.session), self.request.clone()))
    }

    /// Takes an acquire back that was refused, and what it was granted before.
    async fn withdraw(mut self) {
        if self.taken > 0 {
            self.undo().await;
            return;
        }
        self.settled = true;
        if let Some(slot) = self.slot.take() {
            self.session.done(slot);
        }
    }

    /// Closes the connection of an acquire on a session of its own.
    fn close(mut self) {
        self.settled = true;
        if let Some(mut slot) = self.slot.take() {
            drop(slot.take());
            self.session.done(slot);
        }
    }

    /// Takes an acquire back that failed, and waits until it holds nothing.
    async fn fail(mut self, error: sqlx::Error) -> Error {
        // The server has answered, so there is nothing to cancel.
        if self.stage == Stage::Waiting {
            self.stage = Stage::Trying;
        }
        // If the runtime is going down, so is the connection.
        self.undo().await;
        if refuses_settings(&error) && self.options.settings_required() {
            return Error::Settings { key: self.request.key().clone(), source: error };
        }
        Error::acquiring(self.request.key(), error)
    }

    fn undo(&mut self) -> Task<()> {
        self.settled = true;
        let session = Arc::clone(&self.session);
        let missing = std::mem::take(&mut self.missing);
        let undo = session.undo(self.slot.take(), self.request.clone(), missing, self.stage);
        Task::start(&self.session.runtime, undo)
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if !self.settled {
            // Detach: nobody is left to wait for it.
            drop(self.undo());
        }
    }
}

impl Session {
    async fn undo(
        self: Arc<Self>,
        slot: Option<ConnGuard>,
        request: Request,
        missing: Vec<(KeyId, Mode)>,
        stage: Stage,
    ) {
        let mut slot = match slot {
            Some(slot) => slot,
            None => self.connection().await,
        };
        if let Some(conn) = slot.as_mut()
            && stage != Stage::Nothing
        {
            tracing::debug!(
                key = %request.key(), mode = %request.mode(), backend_pid = self.backend_pid(), ?stage,
                "giving up an acquire that was abandoned or failed"
            );
            // A try ends by itself; a wait does not.
            let waiting = stage == Stage::Waiting;
            let grace = if waiting { Duration::ZERO } else { Duration::from_secs(1) };
            let settled = within_task(DEADLINE, async {
                Box::pin(self.drain(conn.pg()?, grace)).await?;
                sql::unlock_if_held(conn.pg()?, &missing).await
            });
            if let Err(error) = settled.await {
                self.fail(slot, Loss::broken(error));
                return;
            }
        }
        self.done(slot);
    }
}

/// What an unlock says of locks that one statement has taken.
fn all_modes(locks: &[(KeyId, Mode)]) -> Vec<(KeyId, Modes)> {
    let modes = |mode| match mode {
        Mode::Exclusive => Modes { exclusive: true, shared: false },
        Mode::Shared => Modes { exclusive: false, shared: true },
    };
    locks.iter().map(|&(key, mode)| (key, modes(mode))).collect()
}

/// A setting may be out of the role's rights, unknown, fixed, or not supported by the platform.
fn refuses_settings(error: &sqlx::Error) -> bool {
    let codes = ["0A000", "22023", "42501", "42704", "55P02"];
    sqlstate(error).is_some_and(|code| codes.contains(&code.as_str()))
}

/// Asks the pool for a connection, for no longer than the caller has patience.
///
/// One who only tries has no patience with the lock, but waits for the pool like any query.
pub(crate) async fn lend(
    pool: &PgPool,
    key: &Key,
    patience: Patience,
) -> Result<PoolConnection<Postgres>> {
    let key = key.clone();
    // Boxed, or every acquire would be a future of 18 kB: as large as what may have to log in.
    let Some(lent) = patience.bound(Box::pin(pool.acquire())).await else {
        return Err(Error::Pool { key, source: sqlx::Error::PoolTimedOut });
    };
    lent.map_err(|source| {
        let timed_out = matches!(source, sqlx::Error::PoolTimedOut);
        // With room for more connections, it was the server that did not answer.
        let exhausted = timed_out && pool.size() >= pool.options().get_max_connections();
        if sqlstate(&source).as_deref() == Some("53200") {
            // A login takes locks too.
            Error::OutOfLocks { key, source }
        } else if exhausted || matches!(source, sqlx::Error::PoolClosed) {
            Error::Pool { key, source }
        } else {
            Error::Connect { key, source }
        }
    })
}
