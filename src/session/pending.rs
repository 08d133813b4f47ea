//! An acquire under way: from the pool's connection to the guard.

use std::sync::Arc;
use std::time::{Duration, Instant};

use sqlx::pool::PoolConnection;
use sqlx::{PgPool, Postgres};
use tokio::runtime::Handle;
use tokio::time::{timeout, timeout_at};

use super::conn::Conn;
use super::task::Task;
use super::{Backend, ConnGuard, DEADLINE, Session, within};
use crate::error::{Error, Loss, Result, is_answer, sqlstate};
use crate::guard::Held;
use crate::key::Key;
use crate::mode::Mode;
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
    stage: Stage,
    settled: bool,
}

/// What the server is doing for the acquire.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Stage {
    /// Nothing, and it has granted nothing.
    Nothing,
    /// It was asked, and may have granted the lock.
    Trying,
    /// It has the session in the lock's queue, and may have granted the lock.
    Waiting,
}

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
    pub(crate) async fn join(session: Arc<Session>, key: &Key, mode: Mode) -> Option<Self> {
        let conn = Arc::clone(&session.conn);
        let mut pending = Self {
            session,
            slot: None,
            key: key.clone(),
            mode,
            stage: Stage::Nothing,
            settled: false,
        };
        let slot = conn.lock_owned().await;
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
        patience: Patience,
    ) -> Result<(Self, Verdict)> {
        let runtime = Handle::current();
        if let Some(idle) = pool.try_acquire() {
            let mut pending = Self::start(pool, idle, &runtime, key, mode).await;
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
        let mut pending = Self::start(pool, pooled, &runtime, key, mode).await;
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
    ) -> Self {
        let conn = Conn::new(pooled, runtime.clone());
        let session = Session::open(pool, conn, runtime.clone());
        // Nobody else knows the session yet, so this does not wait.
        let slot = Arc::clone(&session.conn).lock_owned().await;
        Self {
            session,
            slot: Some(slot),
            key: key.clone(),
            mode,
            stage: Stage::Nothing,
            settled: false,
        }
    }

    /// Asks the server once: the whole of an acquire of a free lock.
    ///
    /// A transaction that somebody left open on the pooled connection is ended; a session lock does
    /// not depend on it.
    async fn ask(&mut self, patience: Patience) -> Result<Verdict, sqlx::Error> {
        let Self { session, slot, key, mode, stage, .. } = self;
        let Some(conn) = slot.as_mut().and_then(|slot| slot.as_mut()) else {
            return Err(sqlx::Error::PoolClosed);
        };
        let answer = within(patience.deadline(), async {
            session.tidy(conn).await?;
            *stage = Stage::Trying;
            match sql::try_lock(conn, key.id(), *mode).await {
                Err(error) if sqlstate(&error).as_deref() == Some("25P02") => {
                    sql::end_transaction(conn).await?;
                    sql::try_lock(conn, key.id(), *mode).await
                }
                tried => tried,
            }
        });
        let Tried { backend_pid, verdict } = answer.await?;
        session.backend.get_or_init(|| Backend { pid: backend_pid, known_since: Instant::now() });
        if !matches!(verdict, Verdict::Granted) {
            *stage = Stage::Nothing;
        }
        Ok(verdict)
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
            let waiting = sql::wait(conn, self.key.id(), self.mode, limit);
            let answer = match left {
                None => waiting.await,
                Some(left) => match timeout(left + GRACE, waiting).await {
                    Ok(answer) => answer,
                    // The server is silent; the drop of `self` cleans up.
                    Err(_) => return Ok(None),
                },
            };
            match answer {
                Ok(true) => return self.granted().map(Some),
                Ok(false) => self.stage = Stage::Nothing,
                // The timeout was not caught, so the slice is over, and the lock may be held.
                Err(error) if sqlstate(&error).as_deref() == Some("55P03") => {
                    self.stage = Stage::Trying;
                    if let Err(error) = sql::unlock_if_held(conn, self.key.id(), self.mode).await {
                        return Err(self.fail(error).await);
                    }
                    self.stage = Stage::Nothing;
                }
                Err(error) => return Err(self.fail(error).await),
            }
        }
    }

    /// Makes the guard's part of what the server granted.
    pub(crate) fn granted(mut self) -> Result<Held> {
        let counted = self.session.ledger().granted(self.key.id(), self.mode);
        if let Err(reason) = counted {
            // The drop of `self` gives the lock up.
            return Err(Error::Lost { key: self.key.clone(), reason });
        }
        self.settled = true;
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
        self.undo().await;
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
            None => Arc::clone(&self.conn).lock_owned().await,
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
            let settled = within(DEADLINE, async {
                self.drain(conn, grace).await?;
                sql::unlock_if_held(conn, key.id(), mode).await
            });
            if let Err(error) = settled.await {
                self.fail(slot, Loss::Disconnected(Arc::new(error)));
                return;
            }
        }
        self.done(slot);
    }
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
