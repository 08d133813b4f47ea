//! An owner: acquires locks, on the session that holds its other locks, or on a new one.

use std::pin::pin;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use sqlx::PgPool;
use tokio::task;
use tracing::Instrument;
use tracing::field::{Empty, display};

use crate::error::{Error, Result};
use crate::guard::Guard;
use crate::holdings::Holdings;
use crate::key::Key;
use crate::manager::Manager;
use crate::metrics;
use crate::options::LockOptions;
use crate::progress::reported;
use crate::request::Request;
use crate::session::Session;
use crate::session::hand_off;
use crate::session::ledger::Join;
use crate::session::local_queue::{LineId, Next};
use crate::session::pending::{Granted, Pending, Verdict};
use crate::session::policy::WaitPolicy;
use crate::session::servers::PoolServer;
use crate::session::slot::Unavailable;

/// The part that all kinds of handles have in common: it acquires locks re-entrantly on one session.
#[derive(Clone)]
#[expect(
    missing_debug_implementations,
    unnameable_types,
    reason = "the sealed trait of `Source` names it"
)]
pub struct Owner {
    pool: PgPool,
    server: PoolServer,
    pub(crate) options: LockOptions,
    /// The session of this owner's guards, while any of them is alive.
    session: Weak<Session>,
    /// The part of this handle that its guards share.
    holdings: Arc<Holdings>,
    /// The manager that acquires the locks, if there is one.
    manager: Option<Arc<Manager>>,
    /// The task that acquired last.
    task: Option<task::Id>,
    /// Whether the warning that several tasks use the handle was logged.
    warned: bool,
}

impl Owner {
    pub(crate) fn new(pool: &PgPool, options: LockOptions) -> Self {
        let server = PoolServer::of(pool);
        let (session, holdings) = (Weak::new(), Arc::default());
        Self {
            pool: pool.clone(),
            server,
            options,
            session,
            holdings,
            manager: None,
            task: None,
            warned: false,
        }
    }

    /// Returns this owner, but with a manager that acquires its locks.
    pub(crate) fn managed_by(self, manager: &Arc<Manager>) -> Self {
        Self { manager: Some(Arc::clone(manager)), ..self }
    }

    /// Returns an owner in the same pool that opens sessions of its own, and holds nothing.
    pub(crate) fn apart(&self) -> Self {
        Self::new(&self.pool, self.options.clone())
    }

    /// Returns this owner, or, if a manager acquires its locks, an owner [`apart`](Self::apart).
    pub(crate) fn unmanaged(self) -> Self {
        if self.manager.is_some() { self.apart() } else { self }
    }

    /// Returns the owner of a session's locks.
    pub(crate) fn of(session: &Arc<Session>, manager: Option<Arc<Manager>>) -> Self {
        let session_of = Self::new(session.pool(), session.options().clone());
        Self { session: Arc::downgrade(session), manager, ..session_of }
    }

    /// Returns an owner like this one that holds nothing.
    pub(crate) fn another(&self) -> Self {
        Self { session: Weak::new(), holdings: Arc::default(), task: None, ..self.clone() }
    }

    /// Releases everything, however many guards are alive.
    pub(crate) async fn release_all(&mut self, key: &Key) -> Result<()> {
        let holdings = self.take_holdings();
        match &self.manager {
            Some(manager) => manager.release_all(&holdings, key).await,
            None => holdings.release_all().await,
        }
    }

    /// Takes the holdings of this owner's guards. The owner holds nothing from then on.
    pub(crate) fn take_holdings(&mut self) -> Arc<Holdings> {
        std::mem::take(&mut self.holdings)
    }

    pub(crate) async fn acquire(&mut self, request: &Request) -> Result<Guard> {
        loop {
            // Without a deadline, this never returns `None`.
            let held = self.take(request, WaitPolicy::Forever).await?;
            if let Some(held) = held {
                return Ok(held);
            }
        }
    }

    pub(crate) async fn try_acquire(&mut self, request: &Request) -> Result<Option<Guard>> {
        self.take(request, WaitPolicy::Never).await
    }

    pub(crate) async fn try_acquire_for(
        &mut self,
        request: &Request,
        timeout: Duration,
    ) -> Result<Option<Guard>> {
        self.take(request, policy(timeout)).await
    }

    pub(crate) fn pool(&self) -> &PgPool {
        &self.pool
    }

    /// Acquires, inside a span that records the outcome.
    pub(crate) async fn take(
        &mut self,
        request: &Request,
        policy: WaitPolicy,
    ) -> Result<Option<Guard>> {
        let span = tracing::debug_span!(
            "acquire",
            lock.key = %request.key().id(),
            lock.name = request.key().name(),
            mode = %request.mode(),
            outcome = Empty,
            waited_ms = Empty,
        );
        let ending = Ending::of(&span);
        let acquire = metrics::Acquire::start(request.labels(&self.options));
        let slice = self.options.slice();
        let key = (!request.internal).then(|| request.key());
        let taken = {
            let acquiring = pin!(self.take_from_session(request, policy));
            reported(key, slice, acquiring).instrument(span).await
        };
        let taken = taken.map(|guard| guard.map(Guard::traced));
        ending.was(match &taken {
            Ok(Some(_)) => "acquired",
            Ok(None) => "busy",
            Err(_) => "failed",
        });
        acquire.end(&taken, matches!(policy, WaitPolicy::Until(_)));
        if matches!(taken, Ok(Some(_))) {
            self.task = task::try_id();
        }
        taken
    }

    async fn take_from_session(
        &mut self,
        request: &Request,
        policy: WaitPolicy,
    ) -> Result<Option<Guard>> {
        if let Some(manager) = self.manager.clone() {
            // A guard of the handle is alive.
            if Arc::strong_count(&self.holdings) > 1 {
                self.check_task(request.key());
            }
            return manager.acquire(&self.holdings, request, policy).await;
        }
        let joined = match self.session.upgrade().map(|session| (session.join(request), session)) {
            Some((Join::Covered, session)) => {
                self.check_task(request.key());
                let granted = Granted { session, request: request.clone() };
                return Ok(Some(Guard::new(granted, &self.holdings)));
            }
            joined => joined,
        };
        // Boxed, because otherwise each waiter in a manager's queue would reserve space for this future.
        Box::pin(self.take_from_own_session(joined, request, policy)).await
    }

    /// Warns once if this task re-enters a lock that another task acquired, because then both tasks hold it.
    fn check_task(&mut self, key: &Key) {
        let (last, this) = (self.task, task::try_id());
        if last.is_some() && this.is_some() && last != this && !self.warned {
            self.warned = true;
            tracing::warn!(
                lock.key = %key.id(),
                lock.name = key.name(),
                "a task re-enters a lock that another task acquired through the same handle, so both hold it; \
                 clone the handle for each task"
            );
        }
    }

    async fn take_from_own_session(
        &mut self,
        joined: Option<(Join, Arc<Session>)>,
        request: &Request,
        policy: WaitPolicy,
    ) -> Result<Option<Guard>> {
        let joined = match joined {
            Some((Join::Ask, session)) => {
                match Box::pin(Pending::join(session, request, policy)).await {
                    Ok(joined) => joined,
                    // The time was over while another wait of the session used the connection.
                    Err(Unavailable::TimedOut) => return Ok(None),
                    Err(reason) => return Err(reason.error(request.key())),
                }
            }
            Some((Join::Released, session)) => {
                // Otherwise this handle could find a lock busy that it has just released. The task that releases the
                // lock is already in the queue for the connection.
                match Box::pin(session.connection_for_acquire(policy)).await {
                    Ok(_) | Err(Unavailable::Lost(_)) => None,
                    Err(Unavailable::TimedOut) => return Ok(None),
                    Err(reason) => return Err(reason.error(request.key())),
                }
            }
            Some((Join::Covered | Join::Lost, _)) | None => None,
        };
        let granted = if let Some(pending) = joined {
            let waiting = &mut metrics::Waiting::new(request.labels(&self.options));
            let (pending, verdict) = Box::pin(pending.try_now(policy)).await?;
            pending.settle(verdict, policy, waiting).await?
        } else {
            self.take_on_new_session(request, policy).await?
        };
        Ok(granted.map(|granted| {
            self.session = Arc::downgrade(&granted.session);
            Guard::new(granted, &self.holdings)
        }))
    }

    /// Acquires for a handle that holds nothing. Waits behind other calls of this process for the same key.
    async fn take_on_new_session(
        &mut self,
        request: &Request,
        policy: WaitPolicy,
    ) -> Result<Option<Granted>> {
        let Self { pool, server, options, .. } = self;
        let queues = Arc::clone(&server.budget.local_queues);
        let line = LineId::new(server.server(pool), request.key().id());
        let mut in_line = request.in_line && policy.waits();
        let mut waiting = metrics::Waiting::new(request.labels(options));
        let mut place = if in_line { queues.join(line, request, options) } else { None };
        let mut front = None;
        loop {
            let has_waited = place.is_some();
            if let Some(place) = place.take() {
                waiting.start();
                let next = Box::pin(place.next(request.key(), pool, policy)).await?;
                match next {
                    Some(Next::Granted(handed)) => return handed.granted(request).map(Some),
                    Some(Next::Front(next)) => front = Some(next),
                    Some(Next::Alone) => in_line = false,
                    Some(Next::First(..) | Next::Failed(_) | Next::Released) | None => {}
                }
            }
            let opened = Pending::open(pool, server, request, options, policy).await;
            if let Err(error @ (Error::PoolTimedOut { .. } | Error::Connect { .. })) = &opened {
                // Meanwhile another call may have found the lock busy.
                let is_busy = has_waited || (in_line && queues.has(line));
                if is_busy && policy.left().is_some_and(|left| left.is_zero()) {
                    // The call's own time was over, and the lock was busy.
                    return Ok(None);
                }
                if let Some(front) = &front {
                    front.fail(error);
                }
            }
            let (pending, verdict) = match opened {
                Err(error) if error.is_of_ended_runtime() => continue,
                opened => opened?,
            };
            if matches!(verdict, Verdict::Busy) && in_line && front.is_none() {
                match queues.enter(line, request, options) {
                    Ok(first) => front = Some(first),
                    Err(behind) => {
                        pending.withdraw().await;
                        place = Some(behind);
                        continue;
                    }
                }
            }
            let granted = match pending.settle(verdict, policy, &mut waiting).await {
                // The runtime of a pooled connection has ended. The next connection may belong to this runtime, or be a
                // new one.
                Err(error) if error.is_of_ended_runtime() => continue,
                granted => granted?,
            };
            if let (Some(front), Some(_)) = (front.and_then(Arc::into_inner), &granted) {
                front.granted(request.mode(), Instant::now() + hand_off::TIME);
            }
            return Ok(granted);
        }
    }
}

/// Returns the timeout of a call that has a deadline: zero if the deadline has passed, so that the call tries once.
pub(crate) fn time_until(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now())
}

/// Returns the policy for a timeout: `Never` if the timeout is zero, and `Forever` if it is too long to be added.
fn policy(timeout: Duration) -> WaitPolicy {
    if timeout.is_zero() {
        return WaitPolicy::Never;
    }
    Instant::now().checked_add(timeout).map_or(WaitPolicy::Forever, WaitPolicy::Until)
}

/// Records in the span how the acquire ended, even if its future was dropped.
struct Ending {
    span: tracing::Span,
    /// `None` if the span is disabled.
    started: Option<Instant>,
    outcome: &'static str,
}

impl Ending {
    fn of(span: &tracing::Span) -> Self {
        let started = (!span.is_disabled()).then(Instant::now);
        Self { span: span.clone(), started, outcome: "cancelled" }
    }

    fn was(mut self, outcome: &'static str) {
        self.outcome = outcome;
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        let Some(started) = self.started else { return };
        let waited = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.span.record("outcome", display(self.outcome)).record("waited_ms", waited);
    }
}
