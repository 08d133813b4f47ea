//! The pool that a command works with.

use std::io;
use std::str::FromStr;
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{ConnectOptions, Connection, PgPool};
use tokio::time::timeout;

use crate::exit::Failure;

/// How long the server may take to accept a connection, and to be taken leave of.
const PATIENCE: Duration = Duration::from_secs(10);

/// For the lock, for who waits for a permit, and for who listens; never all of them at once.
const CONNECTIONS: u32 = 4;

/// Connects to the database of the URL, or of the environment.
pub(crate) async fn connect(url: Option<&str>) -> Result<PgPool, Failure> {
    // Before the URL, which may say otherwise.
    let named = |options: PgConnectOptions| match options.get_application_name() {
        None => options.application_name("pglock"),
        Some(_) => options,
    };
    let options = match url {
        Some(url) => PgConnectOptions::from_str(url).map_err(Failure::Url)?,
        None => PgConnectOptions::new(),
    };
    let options = named(options);
    // The pool would try again until its time is over, and then say only that.
    let connecting = timeout(PATIENCE, options.connect());
    let first = connecting.await.unwrap_or_else(|_| Err(silent())).map_err(Failure::Connect)?;
    // Detach: if it does not close in order, it closes.
    drop(timeout(PATIENCE, first.close()).await);
    let pool = PgPoolOptions::new().max_connections(CONNECTIONS).acquire_timeout(PATIENCE);
    Ok(pool.connect_lazy_with(options))
}

/// Waits until what was begun on the pool is done, and closes its connections in order.
pub(crate) async fn disconnect(pool: PgPool) {
    // A server that does not answer closes them too.
    drop(timeout(PATIENCE, pool.close()).await);
}

fn silent() -> sqlx::Error {
    let reason = format!("the server did not answer within {PATIENCE:?}");
    sqlx::Error::Io(io::Error::new(io::ErrorKind::TimedOut, reason))
}
