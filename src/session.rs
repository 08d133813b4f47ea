//! One connection, and the guards that depend on it.
//!
//! A session is opened by an acquire and ends with its last guard. What the guards hold is counted
//! in the [`ledger`], under a lock of its own that is never held across an await; the connection is
//! under an async mutex, whose queue puts the statements in order. Who has the connection at every
//! await:
//!
//! | while | owner | if dropped |
//! |---|---|---|
//! | it is asked for, tried, waited for | [`Pending`](pending::Pending) | what was sent is undone on a task, see there |
//! | guards live and nobody uses it | the session itself, while the [`watch`] listens | the socket is closed |
//! | the application uses it | [`SessionConnection`](lend::SessionConnection) | it is tidied on a task |
//! | a lock is given up | the task of [`Session::release`] | the socket is closed |
//!
//! What must be finished is a [`Task`]: whoever awaits it runs it, and if he gives up, the runtime of
//! the acquire does.

pub(crate) mod conn;
pub(crate) mod ledger;
pub(crate) mod lend;
mod nursery;
pub(crate) mod pending;
mod pooler;
mod question;
pub(crate) mod recover;
pub(crate) mod servers;
pub(crate) mod shared;
pub(crate) mod task;
pub(crate) mod watch;

use std::future::poll_fn;
use std::io;
use std::ops::{Deref, DerefMut};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::Poll;
use std::time::{Duration, Instant};

use sqlx::PgPool;
use tokio::runtime::Handle;
use tokio::sync::{Notify, OwnedMutexGuard};
use tokio::time::timeout;

use crate::error::{Error, Loss, Result};
use crate::key::{Key, KeyId};
use crate::manager::Farewell;
use crate::options::LockOptions;
use crate::request::Request;
use crate::sql::{self, Protocol};
use conn::Conn;
use ledger::{Join, Leave, Ledger, Modes};
use servers::Server;
use task::Task;
use watch::Heartbeat;

/// How long a statement may take that never waits for a lock. After that the connection is given up.
pub(crate) const DEADLINE: Duration = Duration::from_secs(10);

/// One connection, and the guards that depend on it.
#[derive(Debug)]
pub(crate) struct Session {
    // Empty once the session has ended.
    conn: Arc<tokio::sync::Mutex<Option<Conn>>>,
    /// Somebody has used the connection, and it is free again.
    used: Notify,
    ledger: Mutex<Ledger>,
    backend: OnceLock<Backend>,
    heartbeat: Heartbeat,
    options: LockOptions,
    /// When the question was asked that the session answered last.
    asked: Mutex<Instant>,
    /// The session is lost: the ledger says how.
    told: Notify,
    /// How the connection broke, if it did: after the last guard has left the ledger does not say.
    broke: OnceLock<Loss>,
    watched: AtomicBool,
    /// The watch hears at once when the idle connection is closed.
    listened_to: AtomicBool,
    /// A setting was changed that the application would notice, and is to be put back.
    changed: AtomicBool,
    /// How many locks a manager holds on the session, beside those of the ledger.
    managed: AtomicUsize,
    pool: PgPool,
    server: Arc<Server>,
    runtime: Handle,
}

/// The server's process for the session.
#[derive(Clone, Copy, Debug)]
struct Backend {
    pid: i32,
    known_since: Instant,
}

/// The connection, for the exclusive use of who has this.
///
/// # Drop
///
/// Gives it back to the session, and wakes who listens to it. If the session was lost meanwhile, the
/// connection is closed.
#[derive(Debug)]
pub(crate) struct ConnGuard {
    slot: OwnedMutexGuard<Option<Conn>>,
    session: Arc<Session>,
    /// It is used again so soon that nobody need listen until then.
    quiet: bool,
}

impl Deref for ConnGuard {
    type Target = Option<Conn>;

    fn deref(&self) -> &Option<Conn> {
        &self.slot
    }
}

impl DerefMut for ConnGuard {
    fn deref_mut(&mut self) -> &mut Option<Conn> {
        &mut self.slot
    }
}

impl Drop for ConnGuard {
    fn drop(&mut self) {
        if self.session.is_broken() {
            drop(self.slot.take());
        }
        if !self.quiet {
            self.session.used.notify_one();
        }
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
            used: Notify::new(),
            ledger: Mutex::new(Ledger::opening()),
            backend: OnceLock::new(),
            heartbeat: options.beat(),
            options: options.clone(),
            asked: Mutex::new(Instant::now()),
            told: Notify::new(),
            broke: OnceLock::new(),
            watched: AtomicBool::new(false),
            listened_to: AtomicBool::new(false),
            changed: AtomicBool::new(false),
            managed: AtomicUsize::new(0),
            pool: pool.clone(),
            server: Arc::clone(server),
            runtime,
        })
    }

    /// Waits for the connection, behind all who asked before.
    async fn connection(self: &Arc<Self>) -> ConnGuard {
        let slot = Arc::clone(&self.conn).lock_owned().await;
        ConnGuard { slot, session: Arc::clone(self), quiet: false }
    }

    /// The connection, if nobody uses it.
    fn free_connection(self: &Arc<Self>) -> Option<ConnGuard> {
        let slot = Arc::clone(&self.conn).try_lock_owned().ok()?;
        Some(ConnGuard { slot, session: Arc::clone(self), quiet: false })
    }

    /// The same for one who uses it so often that it would cost too much to wake the watch each time.
    async fn quietly(self: &Arc<Self>) -> ConnGuard {
        let slot = Arc::clone(&self.conn).lock_owned().await;
        ConnGuard { slot, session: Arc::clone(self), quiet: true }
    }

    pub(crate) fn join(&self, request: &Request) -> Join {
        // Nobody is to join a session that has been silent for too long.
        drop(self.loss());
        self.ledger().join(request)
    }

    /// Waits until the connection of an ended session has gone, and its locks with it.
    pub(crate) async fn ended(&self) {
        // Whoever ends the session is in the mutex's queue already.
        drop(self.conn.lock().await);
    }

    pub(crate) fn pool(&self) -> &PgPool {
        &self.pool
    }

    pub(crate) fn options(&self) -> &LockOptions {
        &self.options
    }

    pub(crate) fn backend_pid(&self) -> i32 {
        self.backend.get().map_or(0, |backend| backend.pid)
    }

    /// How the session was lost, if it was.
    ///
    /// A session that has not answered for too long is lost, whether or not the watch has woken up to
    /// that: the process may have been stopped.
    pub(crate) fn loss(&self) -> Option<Loss> {
        let loss = self.ledger().loss();
        if loss.is_none()
            && self.watched.load(Ordering::Relaxed)
            && Instant::now() > self.trusted_until()
        {
            self.lose(&Loss::Silent);
            return self.ledger().loss();
        }
        loss
    }

    /// Waits until the session is lost.
    ///
    /// Looks at the clock whenever it is polled: in a process that was stopped for too long, whoever
    /// awaits this may be polled before the watch is.
    pub(crate) async fn lost(&self) -> Loss {
        loop {
            // Made first: a loss that is told between the look and the wait must not be missed.
            let mut told = pin!(self.told.notified());
            let loss = poll_fn(|cx| match self.loss() {
                Some(loss) => Poll::Ready(Some(loss)),
                None => told.as_mut().poll(cx).map(|()| None),
            });
            if let Some(loss) = loss.await {
                return loss;
            }
        }
    }

    fn is_broken(&self) -> bool {
        self.ledger().loss().is_some_and(|loss| !matches!(loss, Loss::Closed))
    }

    fn asked(&self) -> Instant {
        *self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The session has answered a question that was asked then.
    fn trust(&self, asked: Instant) {
        let mut latest = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        *latest = asked.max(*latest);
    }

    fn trusted_until(&self) -> Instant {
        self.asked() + self.heartbeat.bound()
    }

    /// Has a session watched that holds something.
    fn watch(self: &Arc<Self>) {
        if !self.watched.swap(true, Ordering::Relaxed) {
            nursery::admit(self);
        }
    }

    /// Has what the application would notice put back at the end.
    fn to_put_back(&self) {
        self.changed.store(true, Ordering::Relaxed);
    }

    /// Whether a guard of this key is alive, and may be believed.
    pub(crate) fn guards(&self, key: &Key) -> bool {
        self.loss().is_none() && self.ledger().has_guard(key.id())
    }

    /// Gives up one guard's share. Only if that changes what the server knows, a task tells it.
    pub(crate) fn release(self: Arc<Self>, request: &Request, protocol: Protocol) -> Release {
        let leave = self.ledger().leave(request);
        match leave {
            Leave::Keep => return Release::Done(Ok(())),
            Leave::Lost(reason) => {
                return Release::Done(Err(Error::lost(request.key(), reason)));
            }
            Leave::Tell => {}
        }
        let runtime = self.runtime.clone();
        let request = request.clone();
        let telling = async move {
            let key = request.key().clone();
            let told = self.let_go(LetGo::Excess(request, protocol)).await;
            told.map_err(|reason| Error::lost(&key, reason))
        };
        Release::Running(match protocol {
            Protocol::Extended => Task::to_await(&runtime, telling),
            Protocol::Simple => Task::start(&runtime, telling),
        })
    }

    /// Ends the session under its guards, which are told that it is lost.
    pub(crate) fn close(self: Arc<Self>) -> Task<Result<(), Loss>> {
        let locks = self.ledger().close();
        self.told.notify_waiters();
        let runtime = self.runtime.clone();
        Task::start(&runtime, async move { self.let_go(LetGo::All(locks)).await })
    }

    /// Tells the server, and puts the connection back into the pool if nothing needs it any more.
    ///
    /// The pool gets it only when the server has confirmed that every lock was held and is free now.
    async fn let_go(self: Arc<Self>, what: LetGo) -> Result<(), Loss> {
        let mut slot = self.connection().await;
        let Some(conn) = slot.as_mut() else {
            self.done(slot);
            // Another release has told the server for both; or the connection broke while this one waited
            // for it, and nobody has told the server anything.
            let loss = self.ledger().loss().or_else(|| self.broke.get().cloned());
            return loss.map_or(Ok(()), Err);
        };
        let put_back = self.changed.load(Ordering::Relaxed) && self.ledger().is_last();
        let mut locks = Vec::new();
        let protocol = what.protocol();
        let unlocked = {
            let unlocking = pin!(async {
                self.tidy(conn).await?;
                let given_up = match &what {
                    LetGo::All(locks) => locks.clone(),
                    LetGo::Excess(request, _) => {
                        let tell = self.ledger().tell(request);
                        for key in tell.downgrade {
                            if !sql::downgrade(conn.pg()?, key).await? {
                                return Ok(Some(false));
                            }
                        }
                        tell.unlock
                    }
                };
                if given_up.is_empty() && !put_back {
                    return Ok(Some(true));
                }
                locks = given_up;
                let unlocked = sql::unlock(conn.pg()?, &locks, protocol, put_back).await?;
                Ok((unlocked.backend_pid == self.backend_pid()).then_some(unlocked.all))
            });
            match protocol {
                // Whoever awaits this lets it poll a timer at once, which spares the runtime a step.
                Protocol::Extended => within(DEADLINE, unlocking).await,
                Protocol::Simple => within_task(DEADLINE, unlocking).await,
            }
        };
        let loss = match unlocked {
            Ok(Some(true)) => {
                tracing::trace!(backend_pid = self.backend_pid(), ?what, "released");
                if put_back {
                    self.changed.store(false, Ordering::Relaxed);
                }
                self.done(slot);
                return Ok(());
            }
            Ok(Some(false)) => Loss::NotHeld,
            // Another session than the one that was asked has answered.
            Ok(None) => Loss::Pooled,
            Err(error) => Loss::broken(error),
        };
        if matches!(loss, Loss::Pooled) {
            locks.extend(self.ledger().granted_by_server());
            // First, for to give up what a pooler has may take long.
            self.give_up(&loss);
            self.retrieve(conn, self.backend_pid(), &locks).await;
            drop(slot.take());
            self.done(slot);
            return Err(loss);
        }
        Err(self.fail(slot, loss))
    }

    /// Counts a statement as done that failed, after which nobody knows what the session holds.
    fn fail(&self, mut slot: ConnGuard, loss: Loss) -> Loss {
        drop(slot.take());
        self.lose(&loss);
        self.done(slot);
        loss
    }

    /// Counts a statement as done, and returns the connection to the pool if nothing needs it any
    /// more: the good end of a session.
    fn done(&self, mut slot: ConnGuard) {
        if self.ledger().done()
            && let Some(mut conn) = slot.take()
        {
            if !self.changed.load(Ordering::Relaxed) {
                conn.give_back();
                return;
            }
            // Mostly the last unlock has put it back. Detach: if it fails, the connection is closed.
            drop(Task::start(&self.runtime, async move {
                let put_back = within_task(DEADLINE, async { sql::put_back(conn.pg()?).await });
                if put_back.await.is_ok() {
                    conn.give_back();
                }
            }));
        }
    }

    /// Tells all guards, and closes the connection, which the pool must not have: the bad end of a
    /// session. If somebody uses the connection, it is closed when he gives it back.
    fn lose(&self, loss: &Loss) {
        if matches!(loss, Loss::Pooled) {
            // Whoever found none before was wrong.
            self.server.set_direct(false);
        }
        // The first one counts.
        self.broke.set(loss.clone()).ok();
        let locks = self.ledger().lose(loss.clone());
        if let Ok(mut slot) = self.conn.try_lock() {
            drop(slot.take());
        }
        if self.ledger().loss().is_some() {
            self.told.notify_waiters();
        }
        let backend_pid = self.backend_pid();
        let locks = locks.len() + self.managed.swap(0, Ordering::Relaxed);
        let reason = loss as &dyn std::error::Error;
        // A runtime that goes down takes its guards along, mostly as it is meant to.
        if matches!(loss, Loss::Abandoned) {
            tracing::debug!(backend_pid, locks, reason, "closed a lock session with its runtime");
        } else {
            tracing::warn!(
                backend_pid,
                locks,
                reason,
                "closed a lock session instead of returning it to the pool"
            );
        }
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the server is told to give up.
#[derive(Debug)]
enum LetGo {
    /// These locks, whatever the ledger says.
    All(Vec<(KeyId, Modes)>),
    /// What no guard of these keys needs any more.
    Excess(Request, Protocol),
}

impl LetGo {
    fn protocol(&self) -> Protocol {
        match self {
            Self::All(_) => Protocol::Simple,
            Self::Excess(_, protocol) => *protocol,
        }
    }
}

/// A release that is done, or on its way.
#[derive(Debug)]
pub(crate) enum Release {
    Done(Result<()>),
    Running(Task<Result<()>>),
    /// A manager does it.
    Told(Farewell),
}

impl Release {
    /// Waits for the server's answer. Dropping this does not stop the release.
    pub(crate) async fn done(self) -> Result<()> {
        match self {
            Self::Done(result) => result,
            Self::Running(task) => task.await,
            Self::Told(farewell) => farewell.answered().await,
        }
    }
}

/// Bounds a statement that never waits for a lock.
pub(crate) async fn within<T>(
    limit: Duration,
    statement: impl Future<Output = Result<T, sqlx::Error>>,
) -> Result<T, sqlx::Error> {
    timeout(limit, statement).await.unwrap_or_else(|_| {
        Err(sqlx::Error::Io(io::Error::new(
            io::ErrorKind::TimedOut,
            format!("the server did not answer within {limit:?}"),
        )))
    })
}

/// The same inside a [`Task`], whose first step must not poll the timer.
pub(crate) async fn within_task<T>(
    limit: Duration,
    statement: impl Future<Output = Result<T, sqlx::Error>>,
) -> Result<T, sqlx::Error> {
    match task::later(pin!(statement)).await {
        Ok(output) => output,
        Err(statement) => within(limit, statement).await,
    }
}
