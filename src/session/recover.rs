//! Getting a connection back into a known state: read off what was interrupted, end what is open.

use std::io;
use std::pin::pin;
use std::time::{Duration, Instant};

use sqlx::{Connection, PgConnection};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::timeout;

use super::conn::Conn;
use super::{DEADLINE, Session};
use crate::sql;

/// How many connections of a process may be open beside its pools, to cancel something.
static CANCELLING: Semaphore = Semaphore::const_new(16);

/// A connection beside the pool.
#[derive(Debug)]
pub(super) struct Beside {
    pub(super) conn: PgConnection,
    _permit: Option<SemaphorePermit<'static>>,
}

impl Beside {
    /// Says goodbye to the server. If that fails, the connection is closed all the same.
    pub(super) async fn close(self) {
        drop(self.conn.close().await);
    }
}

/// How long a cancel is given to take effect before it is sent again: the first may have arrived
/// before the statement that it was for.
const AGAIN: Duration = Duration::from_millis(50);

impl Session {
    /// Makes a connection that the application has used fit for a statement of ours.
    pub(super) async fn tidy(&self, conn: &mut Conn) -> Result<(), sqlx::Error> {
        if conn.lent {
            // A query of the application whose future was dropped still runs; most end by themselves.
            // Boxed: it is large, for it may have to log in, and part of almost everything else.
            Box::pin(self.drain(conn.pg()?, Duration::from_millis(100))).await?;
            if sql::end_transaction(conn.pg()?).await? {
                tracing::debug!(
                    backend_pid = self.backend_pid(),
                    "rolled back the transaction that was left open on a lock's connection"
                );
            }
            conn.lent = false;
        }
        Ok(())
    }

    /// Reads the answer to a statement that nobody awaits any more, and cancels it after `grace`.
    ///
    /// A cancel names a process, and not a statement. It can't strike a later one: the server has
    /// signalled the process before it answers the cancel, and the process drops a cancel that finds
    /// it idle. So every cancel must have been answered, or the connection is not to be used again.
    pub(super) async fn drain(
        &self,
        conn: &mut PgConnection,
        grace: Duration,
    ) -> Result<(), sqlx::Error> {
        // This may be the first step of a task, which must not poll the timers below.
        tokio::task::yield_now().await;
        let started = Instant::now();
        let mut answered = pin!(conn.ping());
        let mut patience = grace;
        let mut cancelled = Ok(());
        loop {
            match timeout(patience, &mut answered).await {
                // Or the interrupted statement's own failure: an answer like any other.
                Ok(Ok(()) | Err(sqlx::Error::Database(_))) => return cancelled,
                Ok(Err(error)) => return Err(error),
                Err(_) if started.elapsed() > DEADLINE => return Err(silence()),
                Err(_) => {}
            }
            if let Err(error) =
                timeout(DEADLINE, self.cancel()).await.unwrap_or_else(|_| Err(silence()))
            {
                cancelled = Err(error);
            }
            patience = AGAIN;
        }
    }

    /// Cancels what the session's backend is doing, from another connection: an idle one of the
    /// pool, else one beside it, for the pool may be full of those who wait.
    ///
    /// An error leaves open whether the cancel was sent. Where no connection could be had, it was not.
    async fn cancel(&self) -> Result<(), sqlx::Error> {
        let Some(&backend) = self.backend.get() else { return Ok(()) };
        if let Some(pooled) = self.pool.try_acquire() {
            let mut conn = Conn::new(pooled, self.runtime.clone());
            let known_for = backend.known_since.elapsed();
            sql::cancel_backend(conn.pg()?, backend.pid, known_for).await?;
            conn.give_back();
            return Ok(());
        }
        let mut beside = match self.connect_beside(&CANCELLING).await {
            Ok(beside) => beside,
            Err(error) => {
                tracing::debug!(
                    backend_pid = backend.pid,
                    error = &error as &dyn std::error::Error,
                    "no connection to cancel a wait that was given up; trying again"
                );
                return Ok(());
            }
        };
        let known_for = backend.known_since.elapsed();
        sql::cancel_backend(&mut beside.conn, backend.pid, known_for).await?;
        beside.close().await;
        Ok(())
    }

    /// Opens a connection beside the pool, for one short question.
    pub(super) async fn connect_beside(
        &self,
        at_once: &'static Semaphore,
    ) -> Result<Beside, sqlx::Error> {
        // Never closed, so never an error.
        let permit = at_once.acquire().await.ok();
        let conn = PgConnection::connect_with(&self.pool.connect_options()).await?;
        Ok(Beside { conn, _permit: permit })
    }
}

pub(super) fn silence() -> sqlx::Error {
    let message = "the server does not answer";
    sqlx::Error::Io(io::Error::new(io::ErrorKind::TimedOut, message))
}
