//! An acquire in flight: from the pool's connection to the guard.

use std::hash::{BuildHasher, RandomState};
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use sqlx::pool::PoolConnection;
use sqlx::{PgConnection, PgPool, Postgres};
use tokio::runtime::Handle;
use tokio::time::{timeout, timeout_at};

use super::budget::{self, Permit};
use super::conn::Conn;
use super::servers::{PoolServer, Server};
use super::slot::{ConnGuard, Unavailable};
use super::task::Task;
use super::{DEADLINE, Session, silence, within, within_task};
use crate::error::{Error, Loss, Result, is_answer, sqlstate};
use crate::key::{Key, KeyId};
use crate::mode::Mode;
use crate::options::LockOptions;
use crate::request::{Need, Request};
use crate::sql;
use crate::sql::lock::{Tried, Wanted};
use crate::sql::wait::{Slice, Waited};

/// What the server said.
#[derive(Debug)]
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

/// For how long an acquire waits for a busy lock.
#[derive(Clone, Copy, Debug)]
pub(crate) enum WaitPolicy {
    /// Not for the lock, and until then for the pool.
    ForPool(Instant),
    Forever,
    Never,
    Until(Instant),
}

/// An acquire in flight.
///
/// # Drop
///
/// Undoes the acquire on a task. A statement that only tries is allowed to finish; one that waits is
/// cancelled from another connection. Then any lock that was granted meanwhile is released. If any of
/// that fails, the connection is closed.
#[derive(Debug)]
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

/// How much later than the server a bounded wait gives up, if the server does not answer.
const GRACE: Duration = Duration::from_millis(500);

/// How long a slice lasts in which the session keeps its other guards waiting.
const JOINED_SLICE: Duration = Duration::from_secs(5);

/// How much later than the server an unbounded wait gives up.
const LATE: Duration = Duration::from_secs(8);

impl WaitPolicy {
    /// Waits for what is not the lock itself. `None` if the time is over.
    pub(crate) async fn bound<T>(self, future: impl Future<Output = T>) -> Option<T> {
        match self.deadline() {
            None => Some(future.await),
            Some(deadline) => timeout_at(deadline.into(), future).await.ok(),
        }
    }

    pub(crate) fn deadline(self) -> Option<Instant> {
        match self {
            Self::Forever | Self::Never => None,
            Self::ForPool(deadline) | Self::Until(deadline) => Some(deadline),
        }
    }

    /// How long an answer may take that needs no wait.
    fn answer_limit(self) -> Duration {
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
    /// An acquire on a session that is open and counts it as in flight.
    ///
    /// Waits for its connection. `Ok(None)` if the session ended before it was free.
    pub(crate) async fn join(
        session: Arc<Session>,
        request: &Request,
        policy: WaitPolicy,
    ) -> Result<Option<Self>, Unavailable> {
        let mut pending = Self::new(session, request);
        match pending.session.connection_for_acquire(policy.deadline()).await {
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
    /// Where the pool has idle connections, they are taken as they are, without sqlx's ping: the try
    /// shows whether a connection is alive, and a dead one is replaced. (The pool's `before_acquire`
    /// hook goes with the ping.) Only then the pool is asked properly, which may wait and connect.
    pub(crate) async fn open(
        pool: &PgPool,
        server: &mut PoolServer,
        request: &Request,
        options: &LockOptions,
        policy: WaitPolicy,
    ) -> Result<(Self, Verdict)> {
        let runtime = Handle::current();
        let started = Instant::now();
        let budget = Arc::clone(server.budget());
        let server = server.server(pool);
        let mut permit = budget.permit(request.key(), options.reserve(), policy).await?;
        while let Some(idle) = pool.try_acquire() {
            let mut pending = Self::start(pool, server, idle, permit, &runtime, request, options);
            // A connection on which nothing arrives must not use up the time of the others.
            let limit = policy.answer_limit().min(options.beat().answer_limit());
            let error = match pending.ask(limit).await {
                Ok(verdict) => return Ok((pending, verdict)),
                Err(error) if is_answer(&error) => return Err(Box::pin(pending.fail(error)).await),
                Err(error) => error,
            };
            tracing::debug!(
                key = %request.key(),
                error = &error as &dyn std::error::Error,
                "an idle connection of the pool was dead; taking another"
            );
            // Before the pool is asked: this may be its only connection.
            pending.close();
            if started.elapsed() >= policy.answer_limit() {
                return Err(Error::acquiring(request.key(), error));
            }
            permit = budget.permit(request.key(), options.reserve(), policy).await?;
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
        let Self { session, slot, request, claimed, missing, stage, .. } = self;
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
                let (need, required) = (request.need, options.settings_required());
                let wanted: Wanted<'_> = (required || !session.server.refuses_settings())
                    .then(|| (options.keepalives(), options.mark()));
                let allow_standby = options.standby_allowed();
                match sql::lock::try_lock(pg, missing, need, wanted, required, allow_standby).await
                {
                    Err(error) if needs_another_try(&error, required) => {
                        Box::pin(async {
                            if sqlstate(&error).as_deref() == Some("25P02") {
                                sql::backend::end_transaction(pg).await?;
                                return sql::lock::try_lock(
                                    pg, missing, need, wanted, required, allow_standby,
                                )
                                .await;
                            }
                            // In case the server took a lock first.
                            session.give_up_unknown(pg, missing).await.ok();
                            let tried =
                                sql::lock::try_lock(pg, missing, need, None, false, allow_standby).await?;
                            if session.server.set_refused() {
                                tracing::warn!(
                                    error = &error as &dyn std::error::Error,
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
            Box::pin(session.retrieve(backend_pid, missing)).await;
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
        let lost = self.count(granted);
        if lost.is_err() || self.missing.is_empty() { Verdict::Granted } else { Verdict::Busy }
    }

    /// Counts shares of the first ones that are missing: the server has granted them.
    fn count(&mut self, granted: std::ops::Range<usize>) -> Result<(), Loss> {
        let mut ledger = self.session.ledger();
        for (key, mode) in self.missing.drain(granted) {
            ledger.granted(key, mode)?;
            self.claimed.push((key, mode));
        }
        Ok(())
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
    ) -> Result<Option<Granted>> {
        match verdict {
            Verdict::Granted => self.granted(policy).await.map(Some),
            Verdict::Busy => Box::pin(self.wait(policy)).await,
            // The drop of `self` releases what may have been granted.
            Verdict::Pooled => Err(Error::NoExclusion { key: self.request.key().clone() }),
            Verdict::Standby => {
                let key = self.request.key().clone();
                self.withdraw().await;
                Err(Error::Standby { key })
            }
        }
    }

    /// Waits in the server's queue, slice by slice, for one lock after the other. `None` if the
    /// time is over.
    ///
    /// Between two slices the session's connection is free for its other handles.
    async fn wait(mut self, policy: WaitPolicy) -> Result<Option<Granted>> {
        let mut plainly = self.session.server.waits_plainly();
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
            let limit = self.slice(left).await;
            let keepalives = (!session.settings_refused.load(Ordering::Relaxed))
                .then(|| self.session.options().keepalives());
            let asked = Instant::now();
            let slice = Slice { key, mode, limit, keepalives };
            let granted = match self.wait_once(slice, left, plainly).await {
                Waiting::Answered(waited) => {
                    if plainly {
                        session.server.set_waits_plainly();
                    }
                    if waited.backend_pid != session.backend_pid() {
                        return Err(self.found_pooler(waited.backend_pid).await);
                    }
                    waited.granted
                }
                Waiting::Failed(error) => match sqlstate(&error).as_deref() {
                    // The timeout was not caught, so the slice is over, and the lock may be held.
                    Some("55P03") => false,
                    // The role may not use plpgsql, or not make a setting.
                    Some("42501" | "42704") if !plainly => {
                        self.stage = Stage::Idle;
                        plainly = true;
                        continue;
                    }
                    Some("0A000" | "22023" | "42501" | "42704" | "55P02")
                        if keepalives.is_some() =>
                    {
                        self.stage = Stage::Idle;
                        session.settings_refused.store(true, Ordering::Relaxed);
                        plainly = session.server.waits_plainly();
                        continue;
                    }
                    _ => return Err(self.fail(error).await),
                },
                // The drop of `self` cleans up.
                Waiting::Ended(error) => return Err(error),
                Waiting::TimedOut => return Ok(None),
            };
            self.stage = Stage::Trying;
            let limit = policy.answer_limit();
            let granted = match timeout(limit, self.is_granted(granted, key, mode)).await {
                Ok(Ok(granted)) => granted,
                Ok(Err(error)) => return Err(self.fail(error).await),
                // The drop of `self` cleans up.
                Err(_) if left.is_some() => return Ok(None),
                Err(_) => return Err(self.fail(silence(limit)).await),
            };
            if granted {
                // Before it counts as held, which the clock would find too old.
                if let Err(error) = self.confirm(asked).await {
                    return Err(self.fail(error).await);
                }
                // A loss shows when the acquire is settled.
                self.count(0..1).ok();
            }
            self.stage = Stage::Idle;
            if granted {
                if self.missing.is_empty() {
                    return self.granted(policy).await.map(Some);
                }
                // The next ones may be free.
                match self.ask(policy.answer_limit()).await {
                    Ok(Verdict::Granted) => return self.granted(policy).await.map(Some),
                    Ok(Verdict::Busy) => {}
                    // It was neither when the first one was granted.
                    Ok(Verdict::Pooled | Verdict::Standby) => {
                        return Err(Error::NoExclusion { key: self.request.key().clone() });
                    }
                    Err(error) => return Err(self.fail(error).await),
                }
            }
            self.slot = None;
            match session.connection_for_acquire(policy.deadline()).await {
                Ok(slot) => self.slot = Some(slot),
                Err(Unavailable::TimedOut) => return Ok(None),
                Err(Unavailable::Lost(loss)) => {
                    return Err(Error::broken(self.request.key(), &loss));
                }
                Err(reason) => return Err(reason.error(self.request.key())),
            }
        }
    }

    /// Waits for a slice.
    async fn wait_once(&mut self, slice: Slice, left: Option<Duration>, plainly: bool) -> Waiting {
        let session = Arc::clone(&self.session);
        let key = self.request.key().clone();
        if slice.keepalives.is_some() {
            session.restore_settings();
        }
        self.stage = Stage::Waiting(Instant::now() + slice.limit);
        let slot = self.slot.as_mut();
        let waiting = async {
            // The application may have had it between two slices.
            let pg = slot.ok_or(sqlx::Error::PoolClosed)?.tidied().await?;
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
                Ok(Ok(waited)) => Waiting::Answered(waited),
                Ok(Err(error)) => Waiting::Failed(error),
                Err(_) if over.is_some() => Waiting::TimedOut,
                Err(_) => Waiting::Ended(Error::acquiring(&key, silence(slice.limit))),
            },
            () = session.pool.close_event() => {
                Waiting::Ended(Error::PoolClosed { key })
            }
            loss = session.lost() => Waiting::Ended(Error::broken(&key, &loss)),
        }
    }

    /// How long the next statement waits at most.
    ///
    /// A waiter that is re-queued loses its place, so slices are long; but a snapshot must not get old. They
    /// vary, so that waiters don't re-queue in step. A session with other guards waits for a shorter time,
    /// because their releases wait for the connection.
    async fn slice(&mut self, left: Option<Duration>) -> Duration {
        let deadlock_timeout = self.deadlock_timeout().await;
        let longest = self.session.options().slice();
        let slice = if self.session.ledger().has_more_than(self.claimed.len()) {
            longest.min(JOINED_SLICE)
        } else {
            let jitter = u32::try_from(RandomState::new().hash_one(0) % 100).unwrap_or_default();
            longest / 1000 * (1000 - jitter)
        };
        // Otherwise a deadlock would look like a timeout.
        let slice = slice.max(deadlock_timeout + Duration::from_secs(1));
        left.map_or(slice, |left| left.min(slice))
    }

    /// The server's `deadlock_timeout`, which is asked for once.
    async fn deadlock_timeout(&mut self) -> Duration {
        let server = Arc::clone(&self.session.server);
        if let Some(known) = server.deadlock_timeout().get() {
            return *known;
        }
        let limit = self.session.heartbeat.answer_limit();
        let asking = within(limit, async { sql::backend::deadlock_timeout(self.pg()?).await });
        // If the connection is broken, the wait will say so.
        let asked = asking.await.ok().flatten().and_then(|asked| u64::try_from(asked).ok());
        let Some(milliseconds) = asked else { return Duration::from_secs(1) };
        *server.deadlock_timeout().get_or_init(|| Duration::from_millis(milliseconds))
    }

    /// Whether a wait has got the lock: its timeout can strike after the grant.
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
            // The role may not ask. Then the server warns of what was not held.
            Err(error) if is_answer(&error) => {
                sql::release::unlock_all(pg, &[(key, mode)], false).await?;
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// Another backend has answered.
    async fn found_pooler(self, backend_pid: i32) -> Error {
        self.session.retrieve(backend_pid, &self.missing).await;
        Error::NoExclusion { key: self.request.key().clone() }
    }

    /// Makes sure that the server still receives from us, after a wait in which nothing was sent to it.
    ///
    /// The grant proves only that we receive from the server. An answer proves that the server receives from us,
    /// and is not about to close the connection.
    async fn confirm(&mut self, waiting_since: Instant) -> Result<(), sqlx::Error> {
        let mut asked = waiting_since;
        let heartbeat = self.session.heartbeat;
        if waiting_since.elapsed() > heartbeat.interval {
            asked = Instant::now();
            let answer = async { sql::backend::heartbeat(self.pg()?, None).await };
            within(heartbeat.answer_limit(), answer).await?;
        }
        self.session.trust(asked);
        Ok(())
    }

    /// Lifts the limit that a role has on idle sessions, for as long as the session holds something.
    async fn lift_idle_timeout(&mut self) -> Result<(), sqlx::Error> {
        self.session.restore_settings();
        within(DEADLINE, async { sql::settings::lift_idle_timeout(self.pg()?).await }).await
    }

    /// Counts what the server has granted.
    async fn granted(mut self, policy: WaitPolicy) -> Result<Granted> {
        if self.idle_limited
            && let Err(error) = Box::pin(self.lift_idle_timeout()).await
        {
            return Err(Box::pin(self.fail(error)).await);
        }
        let Session { server, pool, .. } = &*self.session;
        if !server.proof.is_positive()
            && !Box::pin(server.proof.allows(pool, policy.deadline())).await
        {
            if let Some(slot) = self.slot.as_mut() {
                Box::pin(self.session.give_up_pooled(slot, Vec::new())).await;
            }
            return Err(Error::NoExclusion { key: self.request.key().clone() });
        }
        let settled = self.session.ledger().settle(self.request.need);
        if let Err(reason) = settled {
            // The drop of `self` closes the connection.
            return Err(Error::lost(self.request.key(), reason));
        }
        self.settled = true;
        self.session.keep();
        Ok(Granted { session: Arc::clone(&self.session), request: self.request.clone() })
    }

    /// Takes an acquire back that was refused, and what it was granted before.
    async fn withdraw(mut self) {
        if let Some(slot) = self.slot.take_if(|_| self.claimed.is_empty()) {
            self.settled = true;
            self.session.done(slot);
            return;
        }
        self.undo().await;
    }

    /// Closes the connection of an acquire on a session of its own.
    fn close(mut self) {
        self.settled = true;
        if let Some(mut slot) = self.slot.take() {
            drop(slot.take());
            self.session.done(slot);
        }
    }

    /// Takes an acquire back that failed, and waits until it holds nothing, unless the server is silent.
    async fn fail(mut self, error: sqlx::Error) -> Error {
        let answered = is_answer(&error);
        // The server has answered, so there is nothing to cancel.
        if answered && matches!(self.stage, Stage::Waiting(_)) {
            self.stage = Stage::Trying;
        }
        let is_late =
            matches!(&error, sqlx::Error::Io(error) if error.kind() == io::ErrorKind::TimedOut);
        if !answered && !is_late {
            // First, so that no guard joins the session while the acquire is undone.
            let broken =
                sqlx::Error::Io(io::Error::new(io::ErrorKind::BrokenPipe, error.to_string()));
            self.session.give_up(&Loss::broken(broken));
        }
        // If the runtime is shut down, so is the connection.
        let undo = self.undo();
        if answered {
            undo.await;
        }
        if refuses_settings(&error) && self.session.options().settings_required() {
            return Error::SettingsRejected {
                key: self.request.key().clone(),
                source: Arc::new(error),
            };
        }
        Error::acquiring(self.request.key(), error)
    }

    fn undo(&mut self) -> Task<()> {
        self.settled = true;
        let abandoned = Abandoned {
            session: Arc::clone(&self.session),
            key: self.request.key().clone(),
            mode: self.request.mode(),
            claimed: std::mem::take(&mut self.claimed),
            missing: std::mem::take(&mut self.missing),
            stage: self.stage,
        };
        Task::start(&self.session.runtime, abandoned.clean_up(self.slot.take()))
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if !self.settled {
            // Detach: no caller waits for it.
            drop(self.undo());
        }
    }
}

/// What came of a slice.
enum Waiting {
    Answered(Waited),
    /// The session was lost, or the pool closed, or the server is silent.
    Ended(Error),
    Failed(sqlx::Error),
    /// The server is silent, and the caller's time is over.
    TimedOut,
}

/// An acquire that was dropped, or has failed.
struct Abandoned {
    session: Arc<Session>,
    key: Key,
    mode: Mode,
    claimed: Vec<(KeyId, Mode)>,
    missing: Vec<(KeyId, Mode)>,
    stage: Stage,
}

impl Abandoned {
    /// Has the server stop what it is doing for the acquire, and releases what it has granted.
    async fn clean_up(self, slot: Option<ConnGuard>) {
        let Self { session, key, mode, claimed, missing, stage } = self;
        let mut slot = match slot {
            Some(slot) => slot,
            None => session.connection_at_last().await,
        };
        if session.is_lost() {
            drop(slot.take());
        }
        if let Some(conn) = slot.as_mut()
            && (stage != Stage::Idle || !claimed.is_empty())
        {
            tracing::debug!(
                %key, %mode, backend_pid = session.backend_pid(), ?stage,
                "undoing an acquire that was abandoned or failed"
            );
            // A try ends by itself; a wait ends at the end of its slice.
            let (grace, limit) = match stage {
                Stage::Waiting(until) => {
                    let left = until.saturating_duration_since(Instant::now());
                    (Duration::ZERO, left + DEADLINE)
                }
                Stage::Idle | Stage::Trying => (Duration::from_secs(1), DEADLINE),
            };
            let cleaned = within_task(limit + DEADLINE, async {
                if stage == Stage::Idle {
                    return session.undo(conn, &claimed, &[]).await;
                }
                Box::pin(session.drain(conn.pg()?, grace, limit)).await?;
                session.undo(conn, &claimed, &missing).await
            });
            if let Err(error) = cleaned.await {
                session.fail(slot, Loss::broken(error));
                return;
            }
        }
        session.done(slot);
    }
}

/// A setting may be out of the role's rights, unknown, fixed, or not supported by the platform.
fn refuses_settings(error: &sqlx::Error) -> bool {
    let codes = ["0A000", "22023", "42501", "42704", "55P02"];
    sqlstate(error).is_some_and(|code| codes.contains(&code.as_str()))
}

/// Whether a statement that tries may succeed another time: in a failed transaction, or with settings that
/// are rejected.
fn needs_another_try(error: &sqlx::Error, settings_required: bool) -> bool {
    sqlstate(error).as_deref() == Some("25P02") || (refuses_settings(error) && !settings_required)
}

/// Asks the pool for a connection, for no longer than the caller waits, and for no longer than the pool's
/// timeout, counted from `since`.
///
/// A caller that only tries does not wait for the lock, but for the pool like any query.
pub(crate) async fn lend(
    pool: &PgPool,
    key: &Key,
    policy: WaitPolicy,
    since: Instant,
) -> Result<PoolConnection<Postgres>> {
    let key = key.clone();
    // Boxed, or every acquire would be a future of 18 kB: as large as what may have to log in.
    let acquiring =
        timeout_at(budget::deadline(pool, policy, since).into(), Box::pin(pool.acquire()));
    let source = match acquiring.await {
        Ok(Ok(lent)) => return Ok(lent),
        Ok(Err(source)) => source,
        // The pool's own time is over, of which a part was spent in the queue of the locks.
        Err(_) if policy.deadline().is_none_or(|deadline| deadline > Instant::now()) => {
            sqlx::Error::PoolTimedOut
        }
        // The caller's time is over.
        Err(_) => {
            return Err(Error::pool_timed_out(&key, None));
        }
    };
    let timed_out = matches!(source, sqlx::Error::PoolTimedOut);
    // With room for more connections, it was the server that did not answer.
    let exhausted = timed_out && pool.size() >= pool.options().get_max_connections();
    Err(if sqlstate(&source).as_deref() == Some("53200") {
        // A login takes locks too.
        Error::OutOfLocks { key, source: Arc::new(source) }
    } else if exhausted {
        Error::pool_timed_out(&key, None)
    } else if matches!(source, sqlx::Error::PoolClosed) {
        Error::PoolClosed { key }
    } else {
        Error::Connect { key, source: Arc::new(source) }
    })
}
