//! The keeper's own connection to a server, on which it queries the state of sessions that it can't ask.
//!
//! The connection serves two purposes. On it, the keeper asks about sessions whose own connection is in use, about all
//! of them in one statement. And it is the only way to detect that an idle connection is closed: sqlx reads from an
//! idle connection only inside a [`PgListener`]. So to poll a session, the monitor swaps the session's connection with
//! that of the listener for the moment of the poll, which registers the task's waker. (Connections are boxed inside
//! sqlx, so this moves a pointer.) One connection serves all sessions, and a session needs no connection besides its
//! own.

use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use sqlx::postgres::{PgConnectOptions, PgListener, PgPoolOptions};
use sqlx::{Acquire, Connection, PgConnection};

use tokio::time::sleep;

use super::{DEADLINE, is_alive, within};
use crate::error::is_answer;
use crate::options::Keepalives;
use crate::sql;
use crate::sql::backend::Held;

/// How long to wait after a failure before connecting again.
const PAUSE: Duration = Duration::from_secs(1);

/// The connection of a keeper to a server.
#[derive(Default)]
pub(super) struct Monitor {
    /// Has a pool of its own, through which it reconnects if its connection is lost.
    listener: Option<Box<PgListener>>,
    /// When the last attempt to connect failed.
    failed: Option<Instant>,
    /// Whether the connection was lost, and [`take_lost`](Self::take_lost) has not yet returned that.
    lost: bool,
    /// Whether the server was asked to probe the connection while it is silent, or rejects the settings for that.
    is_probed: bool,
}

impl Monitor {
    /// Connects the monitor, if it is not connected. If that takes longer than `threshold`, or than half a second,
    /// another login finds out whether the server rejects it, and why.
    pub(super) async fn connect(
        &mut self,
        options: &PgConnectOptions,
        threshold: Duration,
    ) -> Result<(), sqlx::Error> {
        if self.failed.is_some_and(|at| at.elapsed() < PAUSE) {
            return Err(sqlx::Error::PoolTimedOut);
        }
        let connecting = async {
            if let Some(listener) = &mut self.listener {
                return listener.acquire().await.map(drop);
            }
            let pool = PgPoolOptions::new()
                .max_connections(1)
                .acquire_timeout(DEADLINE / 2)
                .idle_timeout(None)
                .max_lifetime(None)
                .connect_lazy_with(options.clone());
            let mut listener = tokio::select! {
                listener = PgListener::connect_with(&pool) => Box::new(listener?),
                error = why_rejected(options, threshold) => return Err(error),
            };
            listener.eager_reconnect(false);
            self.listener = Some(listener);
            self.is_probed = false;
            Ok(())
        };
        let connected = within(DEADLINE, connecting).await;
        // An error that the server returned does not delay the next attempt, because it shows that the server is alive.
        self.failed = (!is_alive(&connected)).then(Instant::now);
        connected
    }

    /// Returns the advisory locks that these backends hold.
    pub(super) async fn holdings(
        &mut self,
        pids: &[i32],
        limit: Duration,
    ) -> Result<Held, sqlx::Error> {
        let listener = self.listener.as_mut().ok_or(sqlx::Error::PoolClosed)?;
        let asking = async { sql::backend::holdings(listener.acquire().await?, pids).await };
        let answer = within(limit, asking).await;
        if !is_alive(&answer) {
            // The next question connects again.
            self.lost |= self.listener.take().is_some();
        }
        answer.map(|(_, held)| held)
    }

    /// Makes the server probe this connection, like those of the sessions, unless the server rejects the settings.
    /// Nothing is sent on this connection while the sessions are idle, so if a firewall dropped it, that would be
    /// detected only when a question gets no answer.
    pub(super) async fn keep_alive(&mut self, keepalives: Option<Keepalives>, limit: Duration) {
        let Some(listener) = self.listener.as_mut().filter(|_| !self.is_probed) else { return };
        self.is_probed = true;
        let Some(keepalives) = keepalives else { return };
        let setting = async { sql::settings::probe(listener.acquire().await?, keepalives).await };
        if !is_alive(&within(limit, setting).await) {
            self.lost |= self.listener.take().is_some();
        }
    }

    pub(super) fn is_ready(&self) -> bool {
        self.listener.is_some() && self.is_probed
    }

    /// Polls an idle connection. Returns `Ready` with the reason if the other side has closed the connection.
    pub(super) fn poll_closed(
        &mut self,
        conn: &mut PgConnection,
        cx: &mut Context<'_>,
    ) -> Poll<sqlx::Error> {
        let Some(mut listener) = self.listener.take() else { return Poll::Pending };
        let Some(own) = inside(&mut listener) else { return Poll::Pending };
        std::mem::swap(own, conn);
        let polled = poll(&mut listener, cx);
        if let Some(own) = inside(&mut listener) {
            std::mem::swap(own, conn);
            self.listener = Some(listener);
        } else {
            // The listener has dropped the closed connection. The session is left with the listener's connection, which
            // is closed with the session.
            self.lost = true;
        }
        polled
    }

    /// Returns whether the connection was lost since the last call. Until the monitor is connected again, no idle
    /// connection is polled.
    pub(super) fn take_lost(&mut self) -> bool {
        std::mem::take(&mut self.lost)
    }
}

/// Returns why the server rejects a login, and never completes if it does not. A pool retries for a long time, and does
/// not return the reason.
async fn why_rejected(options: &PgConnectOptions, threshold: Duration) -> sqlx::Error {
    sleep(threshold.min(Duration::from_millis(500))).await;
    match PgConnection::connect_with(options).await {
        Ok(conn) => drop(conn.close().await),
        Err(error) if is_answer(&error) => return error,
        Err(_) => {}
    }
    std::future::pending().await
}

/// Reads the unsolicited messages that the server has sent, until there are none left.
fn poll(listener: &mut PgListener, cx: &mut Context<'_>) -> Poll<sqlx::Error> {
    loop {
        let mut receiving = std::pin::pin!(listener.try_recv());
        match receiving.as_mut().poll(cx) {
            Poll::Pending => return Poll::Pending,
            // A notification for a channel that the application listens on.
            Poll::Ready(Ok(Some(_))) => {}
            Poll::Ready(Ok(None)) => {
                return Poll::Ready(sqlx::Error::Io(std::io::ErrorKind::UnexpectedEof.into()));
            }
            Poll::Ready(Err(error)) => return Poll::Ready(error),
        }
    }
}

/// Returns the connection inside a listener, if there is one: then `acquire` is ready at the first poll.
fn inside(listener: &mut PgListener) -> Option<&mut PgConnection> {
    let mut connection = listener.acquire();
    match connection.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(connection) => connection.ok(),
        Poll::Pending => None,
    }
}
