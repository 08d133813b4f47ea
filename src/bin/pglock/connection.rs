//! Connecting to the database, within a limit, and taking leave of it.

use std::io;
use std::time::Duration;

use sqlx::postgres::PgPoolOptions;
use sqlx::{ConnectOptions, Connection, PgConnection, PgPool};
use tokio::time::timeout;

use crate::database::Database;
use crate::exit::Failure;
use crate::signals::Signals;

/// How long the end of a connection may take.
pub(crate) const CLOSING: Duration = Duration::from_secs(10);

/// For the lock, a waiter for a permit, the heartbeat, and the question which session is ahead.
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

    /// Returns a pool, after a first connection that checks whether the server can be reached, within the limit if
    /// that is shorter than the connect timeout.
    pub(crate) async fn pool(&self, limit: Option<Duration>) -> Result<PgPool, Failure> {
        let limit = [limit, self.connect_timeout].into_iter().flatten().min();
        // A pool would retry until its time is over, and then report only that.
        let first = self.connect_within(limit).await?;
        // Detach: if it does not close in order, it is closed by its drop.
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

    /// The address of the server, for errors: without a password.
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

/// Waits within the limit until what was begun on the pool is done, and closes its connections in order. A signal
/// ends the wait.
pub(crate) async fn disconnect(pool: PgPool, signals: &mut Signals, limit: Duration) {
    tokio::select! {
        biased;
        _ = signals.next() => {}
        () = close_pool(pool, limit) => {}
    }
}

/// Waits until what was begun on the pool is done, and closes its connections in order.
pub(crate) async fn close_pool(pool: PgPool, limit: Duration) {
    // A server that does not answer closes them, too.
    drop(timeout(limit, pool.close()).await);
}

/// Closes a connection in order.
pub(crate) async fn close(conn: PgConnection) {
    drop(timeout(CLOSING, conn.close()).await);
}

/// The error of a server that did not answer within a limit.
pub(crate) fn silent(limit: Duration) -> sqlx::Error {
    let reason = format!("the server did not answer within {:.1} s", limit.as_secs_f64());
    sqlx::Error::Io(io::Error::new(io::ErrorKind::TimedOut, reason))
}
