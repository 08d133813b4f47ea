//! Returns a connection to a known state: reads the answer to an interrupted statement, and ends an open transaction.

use std::pin::pin;
use std::time::{Duration, Instant};

use sqlx::{Connection, PgConnection};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::conn::Conn;
use super::{DEADLINE, Session, is_alive, silence};
use crate::error::{chain, is_answer};
use crate::sql;

/// How many connections a process may open outside of its pools, to cancel statements.
static CANCELLING: Semaphore = Semaphore::const_new(16);

/// How long a cancel may take to have an effect before it is sent again: it may have arrived before the statement that
/// it was meant for.
const RETRY: Duration = Duration::from_millis(50);

/// The longest time between two cancels that had no effect.
const LONGEST_RETRY: Duration = Duration::from_secs(1);

/// How long a connection may take to send a cancel, before another one is tried.
const SEND_LIMIT: Duration = Duration::from_secs(2);

impl Session {
    /// Makes a connection on which something may have been left fit for a statement of ours.
    pub(super) async fn tidy(&self, conn: &mut Conn) -> Result<(), sqlx::Error> {
        if conn.untidy {
            // A statement whose future was dropped still runs; most end by themselves. Boxed, because this future is
            // large (it may have to log in), and is part of almost every other one.
            Box::pin(self.drain(conn.pg()?, Duration::from_millis(100), DEADLINE)).await?;
            if sql::backend::end_transaction(conn.pg()?).await? {
                tracing::debug!(
                    backend_pid = self.backend_pid(),
                    "rolled back the transaction that was left open on a lock's connection"
                );
            }
            conn.untidy = false;
        }
        Ok(())
    }

    /// Reads the answer to a statement whose future was dropped, and cancels the statement after `grace`. Takes `limit`
    /// at most.
    ///
    /// A cancel names a process, not a statement. It can't strike a later statement, because the server has signalled
    /// the process before it answers the cancel, and an idle process ignores the signal. A cancel without an answer may
    /// still be in flight, so the connection must not be used, and this returns an error; unless guards, or other calls
    /// in flight, depend on the connection too.
    pub(super) async fn drain(
        &self,
        conn: &mut PgConnection,
        grace: Duration,
        limit: Duration,
    ) -> Result<(), sqlx::Error> {
        // This may be the first step of a task, which must not poll the timers below.
        tokio::task::yield_now().await;
        let started = Instant::now();
        let mut answered = pin!(conn.ping());
        let mut pause = grace;
        let mut next_pause = RETRY;
        let mut cancelled = Ok(());
        loop {
            match timeout(pause, &mut answered).await {
                // An error may be the interrupted statement's own failure: an answer like any other.
                Ok(Ok(()) | Err(sqlx::Error::Database(_))) => {
                    return if self.ledger().is_last() { cancelled } else { Ok(()) };
                }
                Ok(Err(error)) => return Err(error),
                Err(_) if started.elapsed() > limit => return Err(silence(limit)),
                Err(_) => {}
            }
            if let Err(error) = self.cancel().await {
                cancelled = Err(error);
            }
            pause = next_pause;
            next_pause = LONGEST_RETRY.min(2 * next_pause);
        }
    }

    /// Cancels the statement that the session's backend runs, on another connection: an idle one of the pool, otherwise
    /// one outside of the pool, because waiters may use all connections of the pool.
    ///
    /// After an error, it is unknown whether the cancel was sent. It is not an error if no connection could be opened,
    /// or the server refused the cancel, because then the cancel was not sent.
    async fn cancel(&self) -> Result<(), sqlx::Error> {
        let Some(&backend_pid) = self.backend_pid.get() else { return Ok(()) };
        let mut unknown = Ok(());
        if self.server.is_at(&self.pool.connect_options())
            && let Some(pooled) = self.pool.try_acquire()
        {
            let mut conn = Conn::new(pooled, self.runtime.clone(), None);
            let cancelling = async { sql::backend::cancel(conn.pg()?, backend_pid).await };
            match timeout(SEND_LIMIT, cancelling).await {
                Ok(answer) if is_alive(&answer) => {
                    conn.give_back();
                    if answer.is_ok_and(|sent| sent) {
                        return Ok(());
                    }
                }
                Ok(Err(error)) => unknown = Err(error),
                Ok(Ok(_)) => {}
                Err(_) => unknown = Err(silence(SEND_LIMIT)),
            }
        }
        let mut is_connected = false;
        let cancelling = timeout(SEND_LIMIT, async {
            // The semaphore is never closed, so this is never an error.
            let _turn = CANCELLING.acquire().await.ok();
            let mut beside = PgConnection::connect_with(&self.connect_options()).await?;
            is_connected = true;
            let sent = sql::backend::cancel(&mut beside, backend_pid).await;
            // If this fails, the connection is closed all the same.
            beside.close().await.ok();
            sent
        });
        let error = match cancelling.await {
            Ok(Ok(_)) => return unknown,
            Ok(Err(error)) => error,
            Err(_) => silence(SEND_LIMIT),
        };
        tracing::debug!(
            backend_pid,
            error = %chain(&error),
            "cannot cancel a wait that was abandoned; trying again"
        );
        if is_connected && !is_answer(&error) { Err(error) } else { unknown }
    }
}
