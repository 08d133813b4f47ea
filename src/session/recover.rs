//! Getting a connection back into a known state: read off what was interrupted, end what is open.

use std::io;
use std::pin::pin;
use std::time::{Duration, Instant};

use sqlx::{Connection, PgConnection};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::conn::Conn;
use super::{DEADLINE, Session};
use crate::sql;

/// How many connections of a process may be open beside its pools, just to cancel something.
static BESIDE_THE_POOL: Semaphore = Semaphore::const_new(4);

/// How long a cancel is given to take effect before it is sent again: the first may have arrived
/// before the statement that it was for.
const AGAIN: Duration = Duration::from_millis(50);

impl Session {
    /// Makes a connection that the application has used fit for a statement of ours.
    pub(super) async fn tidy(&self, conn: &mut Conn) -> Result<(), sqlx::Error> {
        if conn.lent {
            // A query of the application whose future was dropped still runs; most end by themselves.
            self.drain(conn, Duration::from_millis(500)).await?;
            if sql::end_transaction(conn).await? {
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
    /// When this returns, no cancel is under way: each was answered before the connection was used
    /// again, so none can strike a later statement.
    pub(super) async fn drain(
        &self,
        conn: &mut PgConnection,
        grace: Duration,
    ) -> Result<(), sqlx::Error> {
        let started = Instant::now();
        let mut answered = pin!(conn.ping());
        let mut patience = grace;
        loop {
            match timeout(patience, &mut answered).await {
                // Or the interrupted statement's own failure: an answer like any other.
                Ok(Ok(()) | Err(sqlx::Error::Database(_))) => return Ok(()),
                Ok(Err(error)) => return Err(error),
                Err(_) if started.elapsed() > DEADLINE => {
                    let message = "the server does not end an interrupted statement";
                    return Err(sqlx::Error::Io(io::Error::new(io::ErrorKind::TimedOut, message)));
                }
                Err(_) => {}
            }
            if let Err(error) = timeout(DEADLINE, self.cancel()).await.unwrap_or(Ok(())) {
                tracing::debug!(
                    backend_pid = self.backend_pid(),
                    error = &error as &dyn std::error::Error,
                    "could not cancel an interrupted statement"
                );
            }
            patience = AGAIN;
        }
    }

    /// Cancels what the session's backend is doing, from another connection: an idle one of the
    /// pool, else one beside it, for the pool may be full of those who wait.
    async fn cancel(&self) -> Result<(), sqlx::Error> {
        let Some(&backend) = self.backend.get() else { return Ok(()) };
        if let Some(pooled) = self.pool.try_acquire() {
            let mut conn = Conn::new(pooled, self.runtime.clone());
            let known_for = backend.known_since.elapsed();
            if sql::cancel_backend(&mut conn, backend.pid, known_for).await.is_ok() {
                conn.give_back();
                return Ok(());
            }
            // It was dead; dropping it closes it.
        }
        // Never closed, so never an error.
        let _permit = BESIDE_THE_POOL.acquire().await;
        let mut conn = PgConnection::connect_with(&self.pool.connect_options()).await?;
        sql::cancel_backend(&mut conn, backend.pid, backend.known_since.elapsed()).await?;
        conn.close().await
    }
}
