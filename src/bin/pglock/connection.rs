//! Connects to the database within a limit, and disconnects from it.

use std::io;
use std::time::Duration;

use sqlx::postgres::PgPoolOptions;
use sqlx::{ConnectOptions, Connection, PgConnection, PgPool};
use tokio::time::timeout;

use crate::database::Database;
use crate::exit::Failure;
use crate::signals::Signals;

/// How long a connection may take to close.
pub(crate) const CLOSING: Duration = Duration::from_secs(10);

/// The size of the pool. Its connections are for the lock, a waiter for a permit, the heartbeat, and the query for the
/// sessions ahead.
const CONNECTIONS: u32 = 4;

impl Database {
    /// Opens one connection.
    pub(crate) async fn connect(&self) -> Result<PgConnection, Failure> {
        self.connect_within(self.connect_timeout).await
    }

    async fn connect_within(&self, limit: Option<Duration>) -> Result<PgConnection, Failure> {
        let connecting = async {
            let mut conn = self.options.connect().await?;
            if self.read_write {
                check_read_write(&mut conn).await?;
            }
            Ok(conn)
        };
        let connected = match limit {
            Some(limit) => timeout(limit, connecting).await.unwrap_or_else(|_| Err(silent(limit))),
            None => connecting.await,
        };
        connected.map_err(|error| Failure::Connect { error, server: self.server() })
    }

    /// Opens a first connection to check that the server can be reached, and returns a pool. The check takes at most
    /// `limit` or the connect timeout, whichever is shorter.
    pub(crate) async fn pool(&self, limit: Option<Duration>) -> Result<PgPool, Failure> {
        let limit = [limit, self.connect_timeout].into_iter().flatten().min();
        // A pool would retry until its timeout, and then report only the timeout.
        let first = self.connect_within(limit).await?;
        // Ignores the timeout, because a connection that does not close in order is closed when it is dropped.
        drop(timeout(CLOSING, first.close()).await);
        let mut pool = PgPoolOptions::new().max_connections(CONNECTIONS);
        pool = pool.acquire_timeout(self.connect_timeout.unwrap_or(Duration::from_hours(24 * 365)));
        if self.read_write {
            pool = pool.after_connect(|conn, _| Box::pin(check_read_write(conn)));
        }
        Ok(pool.connect_lazy_with(self.options.clone()))
    }

    /// The name of the database.
    pub(crate) fn name(&self) -> &str {
        self.options.get_database().unwrap_or_default()
    }

    /// Describes the server for error messages, without the password.
    pub(crate) fn server(&self) -> String {
        let options = &self.options;
        let (host, port) = (options.get_host(), options.get_port());
        let database = options.get_database().unwrap_or_default();
        format!("database {database:?} on {host}, port {port}, as {:?}", options.get_username())
    }
}

async fn check_read_write(conn: &mut PgConnection) -> Result<(), sqlx::Error> {
    let read_only: String =
        sqlx::query_scalar("SHOW transaction_read_only").fetch_one(conn).await?;
    if read_only == "on" {
        let reason = "the session is read-only, and target_session_attrs asks for another one";
        return Err(sqlx::Error::Configuration(reason.into()));
    }
    Ok(())
}

/// Waits until all operations that are in flight on the pool have ended, and closes its connections in order. The limit
/// or a signal ends the wait.
pub(crate) async fn disconnect(pool: PgPool, signals: &mut Signals, limit: Duration) {
    tokio::select! {
        biased;
        _ = signals.next() => {}
        () = close_pool(pool, limit) => {}
    }
}

/// Waits, within the limit, until all operations that are in flight on the pool have ended, and closes its connections
/// in order.
pub(crate) async fn close_pool(pool: PgPool, limit: Duration) {
    // If this times out, the program exits next, and the server closes the connections when it detects that.
    drop(timeout(limit, pool.close()).await);
}

/// Closes a connection in order.
pub(crate) async fn close(conn: PgConnection) {
    drop(timeout(CLOSING, conn.close()).await);
}

/// Returns the error for a server that did not answer within a limit.
pub(crate) fn silent(limit: Duration) -> sqlx::Error {
    let reason = format!("the server did not answer within {:.1} s", limit.as_secs_f64());
    sqlx::Error::Io(io::Error::new(io::ErrorKind::TimedOut, reason))
}
