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
//! | guards live and nobody uses it | the session itself | the socket is closed |
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
pub(crate) mod task;

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use sqlx::PgPool;
use tokio::runtime::Handle;
use tokio::sync::OwnedMutexGuard;
use tokio::time::timeout;

use crate::error::{Error, Loss, Result};
use crate::key::{Key, KeyId};
use crate::mode::Mode;
use crate::sql::{self, Protocol};
use conn::Conn;
use ledger::{Join, Leave, Ledger, Modes, Tell};
use task::Task;

/// How long a statement may take that never waits for a lock. After that the connection is given up.
pub(crate) const DEADLINE: Duration = Duration::from_secs(10);

/// One connection, and the guards that depend on it.
#[derive(Debug)]
pub(crate) struct Session {
    // Empty once the session has ended.
    conn: Arc<tokio::sync::Mutex<Option<Conn>>>,
    ledger: Mutex<Ledger>,
    backend: OnceLock<Backend>,
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
pub(crate) type ConnGuard = OwnedMutexGuard<Option<Conn>>;

impl Session {
    /// A session that takes over `conn` for a pending acquire.
    fn open(pool: &PgPool, conn: Conn, runtime: Handle) -> Arc<Self> {
        Arc::new(Self {
            conn: Arc::new(tokio::sync::Mutex::new(Some(conn))),
            ledger: Mutex::new(Ledger::opening()),
            backend: OnceLock::new(),
            pool: pool.clone(),
            runtime,
        })
    }

    pub(crate) fn join(&self, key: &Key, mode: Mode) -> Join {
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

    pub(crate) fn loss(&self) -> Option<Loss> {
        self.ledger().loss()
    }

    /// Gives up one guard's share. Only if that changes what the server knows, a task tells it.
    pub(crate) fn release(self: Arc<Self>, key: &Key, mode: Mode, protocol: Protocol) -> Release {
        let leave = self.ledger().leave(key.id(), mode);
        match leave {
            Leave::Keep => return Release::Done(Ok(())),
            Leave::Lost(reason) => {
                return Release::Done(Err(Error::Lost { key: key.clone(), reason }));
            }
            Leave::Tell => {}
        }
        let runtime = self.runtime.clone();
        let key = key.clone();
        Release::Running(Task::start(&runtime, async move {
            let told = self.let_go(LetGo::Excess(key.id(), protocol)).await;
            told.map_err(|reason| Error::Lost { key, reason })
        }))
    }

    /// Ends the session under its guards, which are told that it is lost.
    pub(crate) fn close(self: Arc<Self>) -> Task<Result<(), Loss>> {
        let locks = self.ledger().close();
        let runtime = self.runtime.clone();
        Task::start(&runtime, async move { self.let_go(LetGo::All(locks)).await })
    }

    /// Tells the server, and puts the connection back into the pool if nothing needs it any more.
    ///
    /// The pool gets it only when the server has confirmed that every lock was held and is free now.
    async fn let_go(self: Arc<Self>, what: LetGo) -> Result<(), Loss> {
        let mut slot = Arc::clone(&self.conn).lock_owned().await;
        let Some(conn) = slot.as_mut() else {
            self.done(slot);
            return self.loss().map_or(Ok(()), Err);
        };
        let answer = within(DEADLINE, async {
            self.tidy(conn).await?;
            match &what {
                LetGo::All(locks) => sql::unlock_all(conn, locks).await,
                LetGo::Excess(key, protocol) => {
                    let tell = self.ledger().tell(*key);
                    match tell {
                        Some(Tell::Downgrade) => sql::downgrade(conn, *key).await,
                        Some(Tell::Unlock(modes)) => {
                            sql::unlock(conn, *key, modes, *protocol).await
                        }
                        // A release that came later was sooner here, and told the server for both.
                        None => Ok(true),
                    }
                }
            }
        });
        match answer.await {
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
        let loss = self.discard(&mut slot, loss);
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

    /// Closes the connection, which the pool must not have: the bad end of a session.
    fn discard(&self, slot: &mut ConnGuard, loss: Loss) -> Loss {
        let locks = self.ledger().lose(loss.clone());
        drop(slot.take());
        tracing::warn!(
            backend_pid = self.backend_pid(),
            locks = locks.len(),
            reason = &loss as &dyn std::error::Error,
            "closed a lock session instead of returning it to the pool"
        );
        loss
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
