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
pub(crate) mod pending;
pub(crate) mod recover;
pub(crate) mod servers;
pub(crate) mod task;
pub(crate) mod watch;

use std::io;
use std::ops::{Deref, DerefMut};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use sqlx::PgPool;
use tokio::runtime::Handle;
use tokio::sync::{Notify, OwnedMutexGuard};
use tokio::time::timeout;

use crate::error::{Error, Loss, Result};
use crate::key::{Key, KeyId};
use crate::mode::Mode;
use crate::sql::{self, Protocol};
use conn::Conn;
use ledger::{Join, Leave, Ledger, Modes, Tell};
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
    /// When the question was asked that the session answered last.
    asked: Mutex<Instant>,
    loss: tokio::sync::watch::Sender<Option<Loss>>,
    watched: AtomicBool,
    /// The role's limit on idle sessions was lifted, and is to be put back.
    idle_limited: AtomicBool,
    pool: PgPool,
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
        self.session.used.notify_one();
    }
}

impl Session {
    /// A session that takes over `conn` for a pending acquire.
    fn open(pool: &PgPool, conn: Conn, runtime: Handle, heartbeat: Heartbeat) -> Arc<Self> {
        Arc::new(Self {
            conn: Arc::new(tokio::sync::Mutex::new(Some(conn))),
            used: Notify::new(),
            ledger: Mutex::new(Ledger::opening()),
            backend: OnceLock::new(),
            heartbeat,
            asked: Mutex::new(Instant::now()),
            loss: tokio::sync::watch::Sender::new(None),
            watched: AtomicBool::new(false),
            idle_limited: AtomicBool::new(false),
            pool: pool.clone(),
            runtime,
        })
    }

    /// Waits for the connection, behind all who asked before.
    async fn connection(self: &Arc<Self>) -> ConnGuard {
        let slot = Arc::clone(&self.conn).lock_owned().await;
        ConnGuard { slot, session: Arc::clone(self) }
    }

    pub(crate) fn join(&self, key: &Key, mode: Mode) -> Join {
        // Nobody is to join a session that has been silent for too long.
        drop(self.loss());
        self.ledger().join(key.id(), mode)
    }

    /// Waits until the connection of an ended session has gone, and its locks with it.
    pub(crate) async fn ended(&self) {
        // Whoever ends the session is in the mutex's queue already.
        drop(self.conn.lock().await);
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
    pub(crate) async fn lost(&self) -> Loss {
        let mut loss = self.loss.subscribe();
        // The sender lives as long as `self`, so this is never an error.
        match loss.wait_for(Option::is_some).await.map(|loss| loss.clone()) {
            Ok(Some(loss)) => loss,
            Ok(None) | Err(_) => std::future::pending().await,
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
            // Detach: it ends with the session.
            drop(self.runtime.spawn(watch::watch(Arc::downgrade(self))));
        }
    }

    /// Gives up one guard's share. Only if that changes what the server knows, a task tells it.
    pub(crate) fn release(self: Arc<Self>, key: &Key, mode: Mode, protocol: Protocol) -> Release {
        let leave = self.ledger().leave(key.id(), mode);
        match leave {
            Leave::Keep => return Release::Done(Ok(())),
            Leave::Lost(reason) => {
                return Release::Done(Err(Error::lost(key, reason)));
            }
            Leave::Tell => {}
        }
        let runtime = self.runtime.clone();
        let key = key.clone();
        Release::Running(Task::start(&runtime, async move {
            let told = self.let_go(LetGo::Excess(key.id(), protocol)).await;
            told.map_err(|reason| Error::lost(&key, reason))
        }))
    }

    /// Ends the session under its guards, which are told that it is lost.
    pub(crate) fn close(self: Arc<Self>) -> Task<Result<(), Loss>> {
        let locks = self.ledger().close();
        self.tell(&Loss::Closed);
        let runtime = self.runtime.clone();
        Task::start(&runtime, async move { self.let_go(LetGo::All(locks)).await })
    }

    /// Tells the server, and puts the connection back into the pool if nothing needs it any more.
    ///
    /// The pool gets it only when the server has confirmed that every lock was held and is free now.
    async fn let_go(self: Arc<Self>, what: LetGo) -> Result<(), Loss> {
        // Whether the answer came from another session than the one that was asked.
        let mut elsewhere = false;
        let mut slot = self.connection().await;
        let Some(conn) = slot.as_mut() else {
            self.done(slot);
            return self.ledger().loss().map_or(Ok(()), Err);
        };
        let put_back = self.idle_limited.load(Ordering::Relaxed) && self.ledger().is_last();
        let answer = within_task(DEADLINE, async {
            self.tidy(conn).await?;
            match &what {
                LetGo::All(locks) => {
                    let unlocked = sql::unlock_all(conn.pg()?, locks, put_back).await?;
                    elsewhere = unlocked.backend_pid != self.backend_pid();
                    Ok(unlocked.all)
                }
                LetGo::Excess(key, protocol) => {
                    let tell = self.ledger().tell(*key);
                    match tell {
                        Some(Tell::Downgrade) => sql::downgrade(conn.pg()?, *key).await,
                        Some(Tell::Unlock(modes)) => {
                            let unlocked =
                                sql::unlock(conn.pg()?, *key, modes, *protocol, put_back).await?;
                            elsewhere = unlocked.backend_pid != self.backend_pid();
                            Ok(unlocked.all)
                        }
                        // A release that came later was sooner here, and told the server for both.
                        None => Ok(true),
                    }
                }
            }
        });
        match answer.await {
            _ if elsewhere => Err(self.fail(slot, Loss::Pooled)),
            Ok(true) => {
                tracing::trace!(backend_pid = self.backend_pid(), ?what, "released");
                self.done(slot);
                Ok(())
            }
            Ok(false) => Err(self.fail(slot, Loss::NotHeld)),
            Err(error) => Err(self.fail(slot, Loss::Disconnected(Arc::new(error)))),
        }
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
            && let Some(conn) = slot.take()
        {
            conn.give_back();
        }
    }

    /// Tells all guards, and closes the connection, which the pool must not have: the bad end of a
    /// session. If somebody uses the connection, it is closed when he gives it back.
    fn lose(&self, loss: &Loss) {
        let locks = self.ledger().lose(loss.clone());
        if let Ok(mut slot) = self.conn.try_lock() {
            drop(slot.take());
        }
        if self.ledger().loss().is_some() {
            self.tell(loss);
        }
        tracing::warn!(
            backend_pid = self.backend_pid(),
            locks = locks.len(),
            reason = loss as &dyn std::error::Error,
            "closed a lock session instead of returning it to the pool"
        );
    }

    /// Tells whoever waits for a loss; the first one counts.
    fn tell(&self, loss: &Loss) {
        self.loss.send_if_modified(|told| {
            let first = told.is_none();
            if first {
                *told = Some(loss.clone());
            }
            first
        });
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
    /// What no guard of this key needs any more.
    Excess(KeyId, Protocol),
}

/// A release that is done, or on its way.
#[derive(Debug)]
pub(crate) enum Release {
    Done(Result<()>),
    Running(Task<Result<()>>),
}

impl Release {
    /// Waits for the server's answer. Dropping this does not stop the release.
    pub(crate) async fn done(self) -> Result<()> {
        match self {
            Self::Done(result) => result,
            Self::Running(task) => task.await,
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
