//! An acquire under way: from the pool's connection to the guard.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use sqlx::pool::PoolConnection;
use sqlx::{PgPool, Postgres};
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio::time::{timeout, timeout_at};

use super::conn::Conn;
use super::recover::silence;
use super::task::Task;
use super::{Backend, ConnGuard, DEADLINE, Session, servers, within, within_task};
use crate::error::{Error, Loss, Result, is_answer, sqlstate};
use crate::guard::Held;
use crate::key::Key;
use crate::mode::Mode;
use crate::options::LockOptions;
use crate::sql::{self, Tried, Verdict, WaitLimit};

/// For how long an acquire waits for a busy lock.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Patience {
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
    key: Key,
    mode: Mode,
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

/// How many connections of a process may be open beside its pools, to look for a pooler.
static PROBING: Semaphore = Semaphore::const_new(4);

/// How much later than the server a bounded wait gives up, if the server does not answer.
const GRACE: Duration = Duration::from_millis(500);

impl Patience {
    /// Waits for what is not the lock itself. `None` if the patience runs out.
    pub(crate) async fn bound<T>(self, future: impl Future<Output = T>) -> Option<T> {
        match self {
            Self::Forever | Self::Never => Some(future.await),
            Self::Until(deadline) => timeout_at(deadline.into(), future).await.ok(),
        }
    }

    /// How long an answer may take that needs no wait.
    fn deadline(self) -> Duration {
        match self {
            Self::Forever | Self::Never => DEADLINE,
            Self::Until(_) => self.left().map_or(DEADLINE, |left| DEADLINE.min(left + GRACE)),
        }
    }

    fn left(self) -> Option<Duration> {
        match self {
            Self::Forever => None,
            Self::Never => Some(Duration::ZERO),
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
        key: &Key,
        mode: Mode,
        options: &LockOptions,
    ) -> Option<Self> {
        let mut pending = Self {
            session: Arc::clone(&session),
            slot: None,
            key: key.clone(),
            mode,
            options: options.clone(),
            idle_limited: false,
            stage: Stage::Nothing,
            settled: false,
        };
        let slot = session.connection().await;
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
        key: &Key,
        mode: Mode,
        options: &LockOptions,
        patience: Patience,
    ) -> Result<(Self, Verdict)> {
        let runtime = Handle::current();
        if let Some(idle) = pool.try_acquire() {
            let mut pending = Self::start(pool, idle, &runtime, key, mode, options).await;
            match pending.ask(patience).await {
                Ok(verdict) => return Ok((pending, verdict)),
                Err(error) if is_answer(&error) => return Err(pending.fail(error).await),
                Err(error) => tracing::debug!(
                    %key,
                    error = &error as &dyn std::error::Error,
                    "an idle connection of the pool was dead; taking another"
                ),
            }
            // Before the pool is asked: this may be its only connection.
            pending.close();
        }
        let pooled = lend(pool, key, patience).await?;
        let mut pending = Self::start(pool, pooled, &runtime, key, mode, options).await;
        match pending.ask(patience).await {
            Ok(verdict) => Ok((pending, verdict)),
            Err(error) => Err(pending.fail(error).await),
        }
    }

    async fn start(
        pool: &PgPool,
        pooled: PoolConnection<Postgres>,
        runtime: &Handle,
        key: &Key,
        mode: Mode,
        options: &LockOptions,
    ) -> Self {
        let conn = Conn::new(pooled, runtime.clone());
        let session = Session::open(pool, conn, runtime.clone(), options.beat());
        // Nobody else knows the session yet, so this does not wait.
        let slot = session.connection().await;
        Self {
            session,
            slot: Some(slot),
            key: key.clone(),
            mode,
            options: options.clone(),
            idle_limited: false,
            stage: Stage::Nothing,
            settled: false,
        }
    }

    /// Asks the server once: the whole of an acquire of a free lock.
    ///
    /// A transaction that somebody left open on the pooled connection is ended; a session lock does
    /// not depend on it.
    async fn ask(&mut self, patience: Patience) -> Result<Verdict, sqlx::Error> {
        let Self { session, slot, key, mode, options, idle_limited, stage, .. } = self;
        let Some(conn) = slot.as_mut().and_then(|slot| slot.as_mut()) else {
            return Err(sqlx::Error::PoolClosed);
        };
        let asked = Instant::now();
        let allow_standby = options.standby_allowed();
        let answer = within(patience.deadline(), async {
            session.tidy(conn).await?;
            *stage = Stage::Trying;
            let pg = conn.pg()?;
            let found = servers::findings(&session.pool);
            let vigilance = (!found.refuses_settings).then(|| options.vigilance());
            match sql::try_lock(pg, key.id(), *mode, vigilance, allow_standby).await {
                Err(error) if sqlstate(&error).as_deref() == Some("25P02") => {
                    sql::end_transaction(pg).await?;
                    sql::try_lock(pg, key.id(), *mode, vigilance, allow_standby).await
                }
                Err(error) if refuses_settings(&error) && !options.settings_required() => {
                    // In case the server took the lock first.
                    sql::unlock_if_held(pg, key.id(), *mode, false).await?;
                    servers::learn(&session.pool, |found| found.refuses_settings = true);
                    tracing::warn!(
                        error = &error as &dyn std::error::Error,
                        "the server refuses a setting by which it would notice a dead client; a host \
                         that vanishes keeps its locks for as long as the server's own settings say"
                    );
                    sql::try_lock(pg, key.id(), *mode, None, allow_standby).await
                }
                tried => tried,
            }
        });
        let Tried { backend_pid, verdict, idle_limited: limited } = answer.await?;
        *idle_limited = limited;
        session.backend.get_or_init(|| Backend { pid: backend_pid, known_since: Instant::now() });
        if !matches!(verdict, Verdict::Granted) {
            *stage = Stage::Nothing;
        }
        session.trust(asked);
        Ok(verdict)
    }

    /// Makes sure, once for each server, that the session has a server connection to itself.
    ///
    /// A transaction pooler gives it to whoever comes next: then another session of ours is answered
    /// by the same process that is to hold the lock. One question may miss that, four hardly do.
    async fn is_pooled(&self) -> bool {
        const QUESTIONS: usize = 4;

        let session = &self.session;
        if servers::findings(&session.pool).direct {
            return false;
        }
        let asked = timeout(Duration::from_secs(1), async {
            let mut beside = session.connect_beside(&PROBING).await?;
            for _ in 0..QUESTIONS {
                if sql::backend_pid(&mut beside.conn).await? == session.backend_pid() {
                    return Ok(true);
                }
            }
            beside.close().await;
            Ok::<_, sqlx::Error>(false)
        });
        match asked.await {
            Ok(Ok(pooled)) => {
                servers::learn(&session.pool, |found| found.direct = !pooled);
                pooled
            }
            // No connection to be had: the next acquire asks again.
            Ok(Err(_)) | Err(_) => false,
        }
    }

    /// Takes the answer of [`ask`](Self::ask) on a session that other guards need.
    pub(crate) async fn try_now(mut self, patience: Patience) -> Result<(Self, Verdict)> {
        match self.ask(patience).await {
            Ok(verdict) => Ok((self, verdict)),
            Err(error) => Err(self.fail(error).await),
        }
    }

    /// Waits in the server's queue, slice by slice. `None` if the patience ran out.
    pub(crate) async fn wait(
        mut self,
        slice: Duration,
        patience: Patience,
    ) -> Result<Option<Held>> {
        loop {
            let left = patience.left();
            if left.is_some_and(|left| left.is_zero()) {
                self.withdraw();
                return Ok(None);
            }
            let Some(conn) = self.slot.as_mut().and_then(|slot| slot.as_mut()) else {
                return Err(self.fail(sqlx::Error::PoolClosed).await);
            };
            self.stage = Stage::Waiting;
            let limit = WaitLimit { slice, left };
            let asked = Instant::now();
            let pg = match conn.pg() {
                Ok(pg) => pg,
                Err(error) => return Err(self.fail(error).await),
            };
            let waiting = sql::wait(pg, self.key.id(), self.mode, limit);
            let answer = match timeout(limit.longest() + GRACE, waiting).await {
                Ok(answer) => answer,
                // The server is silent; the drop of `self` cleans up.
                Err(_) if left.is_some_and(|left| limit.longest() == left) => return Ok(None),
                Err(_) => return Err(Error::acquiring(&self.key, silence())),
            };
            match answer {
                Ok(true) => {
                    self.stage = Stage::Trying;
                    self.session.trust(asked);
                    return self.confirm(asked).await.map(Some);
                }
                Ok(false) => self.stage = Stage::Nothing,
                // The timeout was not caught, so the slice is over, and the lock may be held.
                Err(error) if sqlstate(&error).as_deref() == Some("55P03") => {
                    self.stage = Stage::Trying;
                    let held = sql::unlock_if_held(pg, self.key.id(), self.mode, false);
                    if let Err(error) = held.await {
                        return Err(self.fail(error).await);
                    }
                    self.stage = Stage::Nothing;
                }
                Err(error) => return Err(self.fail(error).await),
            }
        }
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

    /// Lifts the limit that a role may have on idle sessions, as long as the session holds something.
    async fn lift_idle_timeout(&mut self) -> Result<(), sqlx::Error> {
        let Some(conn) = self.slot.as_mut().and_then(|slot| slot.as_mut()) else { return Ok(()) };
        if self.idle_limited && !self.session.idle_limited.swap(true, Ordering::Relaxed) {
            within(DEADLINE, async { sql::lift_idle_timeout(conn.pg()?).await }).await?;
        }
        Ok(())
    }

    /// Makes the guard's part of what the server granted.
    pub(crate) async fn granted(mut self) -> Result<Held> {
        if let Err(error) = self.lift_idle_timeout().await {
            return Err(self.fail(error).await);
        }
        if self.is_pooled().await {
            // The drop of `self` gives the lock up.
            return Err(Error::Pooled { key: self.key.clone() });
        }
        let counted = self.session.ledger().granted(self.key.id(), self.mode);
        if let Err(reason) = counted {
            // The drop of `self` gives the lock up.
            return Err(Error::lost(&self.key, reason));
        }
        self.settled = true;
        self.session.watch();
        Ok(Held::new(Arc::clone(&self.session), self.key.clone(), self.mode))
    }

    /// Takes an acquire back that was refused: the server has granted nothing.
    pub(crate) fn withdraw(mut self) {
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
            return Error::Settings { key: self.key.clone(), source: error };
        }
        Error::acquiring(&self.key, error)
    }

    fn undo(&mut self) -> Task<()> {
        self.settled = true;
        let session = Arc::clone(&self.session);
        let undo = session.undo(self.slot.take(), self.key.clone(), self.mode, self.stage);
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
    async fn undo(self: Arc<Self>, slot: Option<ConnGuard>, key: Key, mode: Mode, stage: Stage) {
        let mut slot = match slot {
            Some(slot) => slot,
            None => self.connection().await,
        };
        if let Some(conn) = slot.as_mut()
            && stage != Stage::Nothing
        {
            tracing::debug!(
                %key, %mode, backend_pid = self.backend_pid(), ?stage,
                "giving up an acquire that was abandoned or failed"
            );
            // A try ends by itself; a wait does not.
            let waiting = stage == Stage::Waiting;
            let grace = if waiting { Duration::ZERO } else { Duration::from_secs(1) };
            let ends = !self.ledger().has_guards();
            let settled = within_task(DEADLINE, async {
                self.drain(conn.pg()?, grace).await?;
                sql::unlock_if_held(conn.pg()?, key.id(), mode, ends).await
            });
            if let Err(error) = settled.await {
                self.fail(slot, Loss::Disconnected(Arc::new(error)));
                return;
            }
        }
        self.done(slot);
    }
}

/// A setting may be out of the role's rights, unknown, fixed, or not supported by the platform.
fn refuses_settings(error: &sqlx::Error) -> bool {
    let codes = ["0A000", "22023", "42501", "42704", "55P02"];
    sqlstate(error).is_some_and(|code| codes.contains(&code.as_str()))
}

/// Asks the pool for a connection, for no longer than the caller has patience.
///
/// One who only tries has no patience with the lock, but waits for the pool like any query.
async fn lend(pool: &PgPool, key: &Key, patience: Patience) -> Result<PoolConnection<Postgres>> {
    let key = key.clone();
    let Some(lent) = patience.bound(pool.acquire()).await else {
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
