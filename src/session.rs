//! One connection, and the guards that depend on it.
//!
//! An acquire opens a session, and the session ends with its last guard. The [`ledger`] counts what the guards hold,
//! under a mutex of its own that is never held across an await. The connection is in a [`slot`], whose queue orders the
//! statements. The owner of the connection at every await:
//!
//! | while | owner | if dropped |
//! |---|---|---|
//! | an acquire is in flight | [`Pending`](pending::Pending) | a task undoes what was sent |
//! | guards live and no statement runs | the session itself; the [`keeper`] polls it for closure | the socket is closed |
//! | the application uses it | [`SessionConnection`](lend::SessionConnection) | a task tidies it |
//! | a lock is released | the task of [`Session::release`] | the socket is closed |
//!
//! Work that must be finished is a [`Task`](task::Task): the caller that awaits it polls it, and if the caller stops,
//! the runtime of the acquire finishes it.

pub(crate) mod budget;
mod cancel;
pub(crate) mod conn;
pub(crate) mod hand_off;
mod keeper;
pub(crate) mod ledger;
pub(crate) mod lend;
pub(crate) mod local_queue;
mod monitor;
pub(crate) mod pending;
pub(crate) mod policy;
pub(crate) mod pool;
pub(crate) mod proof;
mod question;
pub(crate) mod release;
mod retrieve;
pub(crate) mod servers;
pub(crate) mod shared;
pub(crate) mod slot;
pub(crate) mod task;

use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::Poll;
use std::time::{Duration, Instant};

use sqlx::PgPool;
use sqlx::postgres::PgConnectOptions;
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::time::{timeout, timeout_at};

use crate::error::{Loss, chain, is_answer};
use crate::key::{Key, KeyId};
use crate::metrics;
use crate::mode::Mode;
use crate::options::{Heartbeat, LockOptions};
use crate::request::Request;
use conn::Conn;
use ledger::{Join, Ledger};
use servers::Server;

/// The time limit of a statement that never waits for a lock. After that, the connection is closed.
pub(crate) const DEADLINE: Duration = Duration::from_secs(10);

/// One connection, and the guards that depend on it.
pub(crate) struct Session {
    // `None` once the session has ended.
    conn: Arc<tokio::sync::Mutex<Option<Conn>>>,
    /// Whether the application has borrowed the connection.
    borrowed: AtomicBool,
    /// How often the connection was taken.
    uses: AtomicU64,
    ledger: Mutex<Ledger>,
    backend_pid: OnceLock<i32>,
    heartbeat: Heartbeat,
    options: LockOptions,
    /// When the last question that the session has answered was sent.
    last_answered: Mutex<Instant>,
    /// Notified when the session is lost; the ledger has the reason.
    loss_notify: Notify,
    /// When the session began to hold something. From then on, the clock decides whether it is trusted.
    kept_since: OnceLock<Instant>,
    /// Makes the keeper poll the idle connection again.
    wake: OnceLock<Arc<keeper::Wake>>,
    /// When `max_hold` of the options begins to count, if that is not the grant of the first lock.
    held_from: Mutex<Option<Instant>>,
    /// The locks of a lost session that a pooler may keep on the server; [`close`](Self::close) releases them.
    left_behind: Mutex<Vec<(KeyId, Mode)>>,
    /// How many locks a manager holds on the session, in addition to those in the ledger.
    managed_locks: AtomicUsize,
    /// Returns keys of these locks for the report of a loss: a few, or none if the manager is busy at that moment.
    managed_keys: OnceLock<Box<dyn Fn() -> Vec<KeyId> + Send + Sync>>,
    /// Whether this is the session of a leader, for the metrics.
    pub(crate) leading: metrics::Leading,
    pool: PgPool,
    server: Arc<Server>,
    /// The connect options that the pool had when the session was opened.
    connect_options: Arc<PgConnectOptions>,
    runtime: Handle,
}

impl PartialEq for Session {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self, other)
    }
}

impl Session {
    /// Creates a session that takes over `conn` for a pending acquire.
    pub(crate) fn open(
        pool: &PgPool,
        server: &Arc<Server>,
        conn: impl Into<Option<Conn>>,
        runtime: Handle,
        options: &LockOptions,
    ) -> Arc<Self> {
        Arc::new(Self {
            conn: Arc::new(tokio::sync::Mutex::new(conn.into())),
            borrowed: AtomicBool::new(false),
            uses: AtomicU64::new(0),
            ledger: Mutex::new(Ledger::opening()),
            backend_pid: OnceLock::new(),
            heartbeat: options.heartbeat,
            options: options.clone(),
            last_answered: Mutex::new(Instant::now()),
            loss_notify: Notify::new(),
            kept_since: OnceLock::new(),
            wake: OnceLock::new(),
            held_from: Mutex::default(),
            left_behind: Mutex::default(),
            managed_locks: AtomicUsize::new(0),
            managed_keys: OnceLock::new(),
            leading: metrics::Leading::default(),
            pool: pool.clone(),
            server: Arc::clone(server),
            connect_options: pool.connect_options(),
            runtime,
        })
    }

    pub(crate) fn join(&self, request: &Request) -> Join {
        // Ends a session that has been silent for too long, because no guard may join it.
        drop(self.loss());
        self.ledger().join(request)
    }

    pub(crate) fn pool(&self) -> &PgPool {
        &self.pool
    }

    /// Returns the options for another connection to the session's server. Since the session was opened, the
    /// application may have pointed its pool to another server, or set another password for this one.
    fn connect_options(&self) -> Arc<PgConnectOptions> {
        let now = self.pool.connect_options();
        if self.server.is_at(&now) { now } else { Arc::clone(&self.connect_options) }
    }

    pub(crate) fn options(&self) -> &LockOptions {
        &self.options
    }

    pub(crate) fn backend_pid(&self) -> i32 {
        self.backend_pid.get().copied().unwrap_or_default()
    }

    /// Returns how the session was lost, if it was.
    ///
    /// A session that has not answered for too long is lost even if the keeper has not noticed: the process
    /// may have been stopped.
    pub(crate) fn loss(&self) -> Option<Loss> {
        let (loss, holds) = {
            let ledger = self.ledger();
            (ledger.loss(), !ledger.has_ended() && ledger.holds_locks())
        };
        // A session that holds nothing, or was released, can't lose anything by silence. It may be waiting for a lock.
        if (holds || self.managed_locks.load(Ordering::Relaxed) > 0)
            && loss.is_none()
            && self.kept_since.get().is_some()
            && Instant::now() > self.last_answered() + self.heartbeat.bound()
        {
            self.lose(&Loss::Unresponsive);
            return self.ledger().loss();
        }
        loss
    }

    /// Waits until the session is lost.
    ///
    /// Checks the clock at every poll, because in a process that was stopped for too long, this future may be polled
    /// before the keeper.
    pub(crate) async fn lost(&self) -> Loss {
        loop {
            // Created before the check, so that a loss between the check and the wait is not missed.
            let mut notified = pin!(self.loss_notify.notified());
            let loss = poll_fn(|cx| match self.loss() {
                Some(loss) => Poll::Ready(Some(loss)),
                None => notified.as_mut().poll(cx).map(|()| None),
            });
            // Boxed, because usually there is one runtime.
            let loss = if self.is_elsewhere() {
                let (now, bound) = (Instant::now(), self.heartbeat.bound());
                let due = self.last_answered() + bound + Duration::from_millis(1);
                // While nothing is held, `due` may have passed without a loss.
                let look = due.max(now + bound / 8);
                Box::pin(timeout_at(look.into(), loss)).await.unwrap_or_default()
            } else {
                loss.await
            };
            if let Some(loss) = loss {
                return loss;
            }
        }
    }

    /// Whether the caller runs on another runtime than the session. If the session's runtime is not driven, its keeper
    /// does not run.
    fn is_elsewhere(&self) -> bool {
        Handle::try_current().is_ok_and(|here| here.id() != self.runtime.id())
    }

    fn is_lost(&self) -> bool {
        self.ledger().loss().is_some()
    }

    fn last_answered(&self) -> Instant {
        *self.last_answered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records that the session has answered a question that was sent at `asked`.
    fn trust(&self, asked: Instant) {
        let mut latest = self.last_answered.lock().unwrap_or_else(PoisonError::into_inner);
        *latest = asked.max(*latest);
    }

    /// Records that the session has answered a heartbeat that was sent at `asked`.
    fn answered(&self, asked: Instant) {
        metrics::heartbeat(asked, || self.last_answered());
        self.trust(asked);
    }

    /// Starts to monitor the session, which has held something since `since`.
    fn keep(self: &Arc<Self>, since: Instant) {
        if self.kept_since.set(since).is_ok() {
            keeper::admit(self);
        }
    }

    /// Returns when a hold that began at `since` must end, if the options limit it. The hold of a manager's session is
    /// not limited.
    fn hold_ends(&self, since: Instant) -> Option<Instant> {
        let longest = self.options.max_hold?;
        let anew = *self.held_from.lock().unwrap_or_else(PoisonError::into_inner);
        let since = anew.unwrap_or(since);
        let ledger = self.ledger();
        (ledger.holds_locks() && !ledger.is_pinned()).then(|| since + longest)
    }

    /// Restarts the time that the options allow for a hold (`max_hold`). A waiter for a semaphore's permit holds the
    /// lock of the queue while it waits.
    pub(crate) fn hold_anew(&self) {
        *self.held_from.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// Whether a guard of this key is alive, and may be trusted.
    pub(crate) fn guards(&self, key: &Key) -> bool {
        self.loss().is_none() && self.ledger().has_guard(key.id())
    }

    /// Ends the session with a loss: notifies all guards, and closes the connection instead of returning it to the
    /// pool. If the connection is in use, it is closed when it is returned.
    fn lose(&self, loss: &Loss) {
        if matches!(loss, Loss::NoExclusion) {
            self.server.proof.disprove();
        }
        self.end(loss);
    }

    /// Ends the session as [`lose`](Self::lose) does, but with a loss that is no new finding about the server.
    fn end(&self, loss: &Loss) {
        self.end_with(loss, Vec::new());
    }

    /// As [`end`](Self::end). The locks in `released` are not in the ledger any more, but were lost, too.
    fn end_with(&self, loss: &Loss, released: Vec<(KeyId, Mode)>) {
        let locks = {
            let mut ledger = self.ledger();
            let Some(mut locks) = ledger.lose(loss.clone()) else {
                metrics::lost(loss, released.len());
                return;
            };
            locks.extend(released);
            if matches!(loss, Loss::NoExclusion) {
                // Stored before the task that uses the connection can see the loss.
                self.left_behind().extend(locks.iter().copied());
            }
            locks
        };
        if let Ok(mut slot) = self.conn.try_lock() {
            self.close(slot.take());
        }
        self.loss_notify.notify_waiters();
        let backend_pid = self.backend_pid();
        let own = locks.iter().map(|(key, _)| *key);
        let keys =
            first_keys(own.chain(self.managed_keys.get().into_iter().flat_map(|list| list())));
        let locks = locks.len() + self.managed_locks.swap(0, Ordering::Relaxed);
        metrics::lost(loss, locks);
        self.leading.end();
        let reason = chain(loss);
        // A runtime that is shut down ends its guards, usually on purpose.
        if matches!(loss, Loss::RuntimeShutdown) {
            tracing::debug!(
                backend_pid,
                locks,
                lock.keys = keys,
                %reason,
                "closed a lock session with its runtime"
            );
        } else {
            tracing::warn!(
                backend_pid,
                locks,
                lock.keys = keys,
                %reason,
                "closed a lock session instead of returning it to the pool"
            );
        }
    }

    /// Ends the session with this loss, unless it was lost before.
    pub(crate) fn give_up(&self, loss: &Loss) {
        if self.loss().is_none() {
            self.lose(loss);
        }
    }

    /// Closes the connection, which has just become free, if the session was lost while the connection was in use.
    fn close_if_lost(&self) {
        if self.is_lost()
            && let Ok(mut slot) = self.conn.try_lock()
        {
            self.close(slot.take());
        }
    }

    /// Closes the connection of a lost session. A detached task first releases the locks that the server would keep.
    fn close(&self, conn: Option<Conn>) {
        let locks = std::mem::take(&mut *self.left_behind());
        self.retrieve(conn, self.backend_pid(), locks);
    }

    fn left_behind(&self) -> MutexGuard<'_, Vec<(KeyId, Mode)>> {
        self.left_behind.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How many keys the report of a loss names at most.
pub(crate) const MOST_KEYS: usize = 5;

/// Lists the first of these keys, for a log event.
fn first_keys(mut all: impl Iterator<Item = KeyId>) -> Option<String> {
    let mut keys: Vec<_> = all.by_ref().take(MOST_KEYS).map(|key| key.to_string()).collect();
    if all.next().is_some() {
        keys.push("…".to_owned());
    }
    (!keys.is_empty()).then(|| keys.join(", "))
}

/// Limits the time of a statement that never waits for a lock.
pub(crate) async fn within<T>(
    limit: Duration,
    statement: impl Future<Output = Result<T, sqlx::Error>>,
) -> Result<T, sqlx::Error> {
    timeout(limit, statement).await.unwrap_or_else(|_| Err(silence(limit)))
}

/// As [`within`], but inside a [`Task`](task::Task), whose first poll must not poll a timer.
pub(crate) async fn within_task<T>(
    limit: Duration,
    statement: impl Future<Output = Result<T, sqlx::Error>>,
) -> Result<T, sqlx::Error> {
    match task::later(pin!(statement)).await {
        Ok(output) => output,
        Err(statement) => within(limit, statement).await,
    }
}

/// Returns the error for a server that did not answer within the limit.
fn silence(limit: Duration) -> sqlx::Error {
    let message = format!("the server did not answer within {limit:?}");
    sqlx::Error::Io(io::Error::new(io::ErrorKind::TimedOut, message))
}

/// Whether the server has answered a statement, even with an error. Then the session is alive, and holds what it held.
fn is_alive<T>(answer: &Result<T, sqlx::Error>) -> bool {
    answer.as_ref().err().is_none_or(is_answer)
}
