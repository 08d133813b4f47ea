//! One connection, and the guards that depend on it.
//!
//! A session is opened by an acquire and ends with its last guard. What the guards hold is counted
//! in the [`ledger`], under a lock of its own that is never held across an await; the connection is
//! in a [`slot`], whose queue puts the statements in order. Who owns the connection at every await:
//!
//! | while | owner | if dropped |
//! |---|---|---|
//! | an acquire is in flight | [`Pending`](pending::Pending) | what was sent is undone on a task, see there |
//! | guards live and no statement runs | the session itself; the [`keeper`] polls it for closure | the socket is closed |
//! | the application uses it | [`SessionConnection`](lend::SessionConnection) | it is tidied on a task |
//! | a lock is released | the task of [`Session::release`] | the socket is closed |
//!
//! What must be finished is a [`Task`](task::Task): the caller that awaits it runs it, and if the caller
//! stops, the runtime of the acquire does.

pub(crate) mod budget;
mod cancel;
pub(crate) mod conn;
pub(crate) mod hand_on;
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

use crate::application_name;
use crate::error::{Loss, chain, is_answer};
use crate::key::{Key, KeyId};
use crate::metrics;
use crate::mode::Mode;
use crate::options::{Heartbeat, Keepalives, LockOptions};
use crate::request::Request;
use conn::Conn;
use ledger::{Join, Ledger};
use servers::Server;

/// How long a statement may take that never waits for a lock. After that the connection is closed.
pub(crate) const DEADLINE: Duration = Duration::from_secs(10);

/// One connection, and the guards that depend on it.
pub(crate) struct Session {
    // Empty once the session has ended.
    conn: Arc<tokio::sync::Mutex<Option<Conn>>>,
    /// The application has the connection.
    borrowed: AtomicBool,
    /// How often the connection was taken.
    uses: AtomicU64,
    ledger: Mutex<Ledger>,
    backend_pid: OnceLock<i32>,
    heartbeat: Heartbeat,
    options: LockOptions,
    /// When the question was asked that the session answered last.
    last_answered: Mutex<Instant>,
    /// The session is lost: the ledger says how.
    loss_notify: Notify,
    /// Since when it holds something, so that the clock decides whether it is trusted.
    kept_since: OnceLock<Instant>,
    /// Has the keeper poll the idle connection again.
    wake: OnceLock<Arc<keeper::Wake>>,
    /// A setting was changed that the application would notice, and is to be put back.
    settings_to_restore: AtomicBool,
    /// From when on the limit of the options on a hold counts, unless from the first lock.
    held_from: Mutex<Option<Instant>>,
    /// It has the settings of a session that is held for longer.
    has_long_settings: AtomicBool,
    /// A wait has set `tcp_user_timeout`, which a slow reader would notice.
    has_user_timeout: AtomicBool,
    /// The server rejects those settings.
    settings_refused: AtomicBool,
    shown: Mutex<Shown>,
    /// What a session had locked that was lost behind a pooler while its connection was in use.
    left_behind: Mutex<Vec<(KeyId, Mode)>>,
    /// How many locks a manager holds on the session, beside those of the ledger.
    managed_locks: AtomicUsize,
    /// Names the keys of those locks when the session is lost: a few, and none if the manager is busy just then.
    managed_keys: OnceLock<Box<dyn Fn() -> Vec<KeyId> + Send + Sync>>,
    /// Whether it is that of a leader.
    pub(crate) leading: metrics::Leading,
    pool: PgPool,
    server: Arc<Server>,
    /// How to reach the server, as the pool was told when the session was opened.
    connect_options: Arc<PgConnectOptions>,
    runtime: Handle,
}

/// What a session shows in `application_name`.
#[derive(Clone, Copy, Default, Eq, PartialEq)]
enum Shown {
    #[default]
    Nothing,
    Key(KeyId),
    /// A leader's name and term, for the observers, while this is locked.
    Leader(KeyId),
}

impl PartialEq for Session {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self, other)
    }
}

impl Session {
    /// A session that takes over `conn` for a pending acquire.
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
            settings_to_restore: AtomicBool::new(false),
            held_from: Mutex::default(),
            has_long_settings: AtomicBool::new(false),
            has_user_timeout: AtomicBool::new(false),
            settings_refused: AtomicBool::new(false),
            shown: Mutex::default(),
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
        // No guard may join a session that has been silent for too long.
        drop(self.loss());
        self.ledger().join(request)
    }

    pub(crate) fn pool(&self) -> &PgPool {
        &self.pool
    }

    /// How to open another connection to the session's server. The application may have pointed its pool to
    /// another server since, or given it another password for this one.
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

    /// How the session was lost, if it was.
    ///
    /// A session that has not answered for too long is lost even if the keeper has not noticed: the process
    /// may have been stopped.
    pub(crate) fn loss(&self) -> Option<Loss> {
        let (loss, holds) = {
            let ledger = self.ledger();
            (ledger.loss(), !ledger.has_ended() && ledger.holds_locks())
        };
        // One that holds nothing, or was released, can't lose anything by silence. It may be waiting.
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
    /// Looks at the clock whenever it is polled: in a process that was stopped for too long, this may be
    /// polled before the keeper is.
    pub(crate) async fn lost(&self) -> Loss {
        loop {
            // Created first, so that a loss between the look and the wait is not missed.
            let mut notified = pin!(self.loss_notify.notified());
            let loss = poll_fn(|cx| match self.loss() {
                Some(loss) => Poll::Ready(Some(loss)),
                None => notified.as_mut().poll(cx).map(|()| None),
            });
            // Boxed, because usually there is one runtime.
            let loss = if self.is_elsewhere() {
                let (now, bound) = (Instant::now(), self.heartbeat.bound());
                let due = self.last_answered() + bound + Duration::from_millis(1);
                // Nothing is due while nothing is held.
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

    /// Whether this runs on another runtime than the session, whose keeper may stand still with it.
    fn is_elsewhere(&self) -> bool {
        Handle::try_current().is_ok_and(|here| here.id() != self.runtime.id())
    }

    fn is_lost(&self) -> bool {
        self.ledger().loss().is_some()
    }

    fn last_answered(&self) -> Instant {
        *self.last_answered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The session has answered a question that was asked then.
    fn trust(&self, asked: Instant) {
        let mut latest = self.last_answered.lock().unwrap_or_else(PoisonError::into_inner);
        *latest = asked.max(*latest);
    }

    /// The session has answered a heartbeat that was sent then.
    fn answered(&self, asked: Instant) {
        metrics::heartbeat(asked, || self.last_answered());
        self.trust(asked);
    }

    /// Starts to monitor a session that holds something since then.
    fn keep(self: &Arc<Self>, since: Instant) {
        if self.kept_since.set(since).is_ok() {
            keeper::admit(self);
        }
    }

    /// Until when it may hold what it holds since then, if that is limited. That of a manager is not.
    fn hold_ends(&self, since: Instant) -> Option<Instant> {
        let longest = self.options.max_hold?;
        let anew = *self.held_from.lock().unwrap_or_else(PoisonError::into_inner);
        let since = anew.unwrap_or(since);
        let ledger = self.ledger();
        (ledger.holds_locks() && !ledger.is_pinned()).then(|| since + longest)
    }

    /// Has the limit of the options on a hold count from now on. A waiter for a permit holds its place in the queue.
    pub(crate) fn hold_anew(&self) {
        *self.held_from.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// The settings of a session that is held for longer, if it does not have them.
    fn long_settings(&self) -> Option<Keepalives> {
        let none = self.settings_refused.load(Ordering::Relaxed)
            || self.has_long_settings.swap(true, Ordering::Relaxed);
        if none {
            return None;
        }
        self.restore_settings();
        Some(self.options.keepalives)
    }

    /// Has the settings put back at the end that the application would notice.
    fn restore_settings(&self) {
        self.settings_to_restore.store(true, Ordering::Relaxed);
    }

    /// What to show in `application_name` for a request, if it is not shown already.
    fn to_show(&self, request: &Request) -> Option<String> {
        let name = self.options.application_name.as_deref()?;
        let mut shown = self.shown();
        let key = Shown::Key(request.key().id());
        if matches!(*shown, Shown::Leader(_)) || *shown == key {
            return None;
        }
        *shown = key;
        Some(application_name::of(name, request))
    }

    fn shown(&self) -> MutexGuard<'_, Shown> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a guard of this key is alive, and may be trusted.
    pub(crate) fn guards(&self, key: &Key) -> bool {
        self.loss().is_none() && self.ledger().has_guard(key.id())
    }

    /// Notifies all guards, and closes the connection, which the pool must not have: the bad end of a
    /// session. If the connection is in use, it is closed when it is returned.
    fn lose(&self, loss: &Loss) {
        if matches!(loss, Loss::NoExclusion) {
            self.server.proof.disprove();
        }
        self.end(loss);
    }

    /// The same, of a loss that says nothing new of the server.
    fn end(&self, loss: &Loss) {
        let locks = {
            let mut ledger = self.ledger();
            let Some(locks) = ledger.lose(loss.clone()) else { return };
            if matches!(loss, Loss::NoExclusion) {
                // Before the loss can be seen where the connection is in use.
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

    /// Loses the session, unless it was lost before.
    pub(crate) fn give_up(&self, loss: &Loss) {
        if self.loss().is_none() {
            self.lose(loss);
        }
    }

    /// Closes the connection that has just come free, if the session was lost while it was in use.
    fn close_if_lost(&self) {
        if self.is_lost()
            && let Ok(mut slot) = self.conn.try_lock()
        {
            self.close(slot.take());
        }
    }

    /// Closes the connection of a session that was lost. What that has locked is released first where the server would
    /// keep it. Detach: no caller waits for it.
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

/// How many keys the report of a loss names.
pub(crate) const MOST_KEYS: usize = 5;

/// The first of these keys, for an event.
fn first_keys(mut all: impl Iterator<Item = KeyId>) -> Option<String> {
    let mut keys: Vec<_> = all.by_ref().take(MOST_KEYS).map(|key| key.to_string()).collect();
    if all.next().is_some() {
        keys.push("…".to_owned());
    }
    (!keys.is_empty()).then(|| keys.join(", "))
}

/// Bounds a statement that never waits for a lock.
pub(crate) async fn within<T>(
    limit: Duration,
    statement: impl Future<Output = Result<T, sqlx::Error>>,
) -> Result<T, sqlx::Error> {
    timeout(limit, statement).await.unwrap_or_else(|_| Err(silence(limit)))
}

/// The same inside a [`Task`](task::Task), whose first step must not poll the timer.
pub(crate) async fn within_task<T>(
    limit: Duration,
    statement: impl Future<Output = Result<T, sqlx::Error>>,
) -> Result<T, sqlx::Error> {
    match task::later(pin!(statement)).await {
        Ok(output) => output,
        Err(statement) => within(limit, statement).await,
    }
}

/// The error of a server that did not answer within the limit.
fn silence(limit: Duration) -> sqlx::Error {
    let message = format!("the server did not answer within {limit:?}");
    sqlx::Error::Io(io::Error::new(io::ErrorKind::TimedOut, message))
}

/// Whether the server has answered a statement, if only with an error: the session lives, and holds what it held.
fn is_alive<T>(answer: &Result<T, sqlx::Error>) -> bool {
    answer.as_ref().err().is_none_or(is_answer)
}
