//! Releases locks that a pooler in transaction mode has left on a server connection.

use std::time::Duration;

use sqlx::postgres::PgConnectOptions;
use sqlx::{Connection, PgConnection};
use tokio::sync::Semaphore;

use super::conn::Conn;
use super::{DEADLINE, Session, within};
use crate::error::chain;
use crate::key::KeyId;
use crate::mode::Mode;
use crate::sql;

/// How many server connections a search looks through at most.
const MAX_CONNECTIONS: usize = 100;

/// How long a search may take, including the wait for its turn.
const LIMIT: Duration = Duration::from_mins(1);

/// Allows one search at a time in the whole process.
static SEARCHES: Semaphore = Semaphore::const_new(1);

impl Session {
    /// Releases locks, if there are any, on a backend that the pooler had assigned to one of our connections before.
    /// Detach: no caller waits for the task.
    pub(super) fn retrieve(&self, conn: Option<Conn>, backend_pid: i32, locks: Vec<(KeyId, Mode)>) {
        if locks.is_empty() {
            return;
        }
        let options = self.connect_options();
        let releasing = async move { release(conn, &options, backend_pid, &locks).await };
        drop(self.runtime.spawn(releasing));
    }
}

/// Releases locks that exclude nothing: through the connection that has acquired them, or, if a pooler has since
/// assigned another backend to that connection, through new ones.
async fn release(
    conn: Option<Conn>,
    options: &PgConnectOptions,
    backend_pid: i32,
    locks: &[(KeyId, Mode)],
) {
    if let Some(mut conn) = conn
        && !conn.untidy
        && let Ok(pg) = conn.pg()
        && let unlocking = sql::release::unlock_on(pg, backend_pid, locks)
        && within(DEADLINE, unlocking).await.is_ok_and(|is_there| is_there)
    {
        return;
    }
    let searching = async {
        // Each search may open many connections.
        let _turn = SEARCHES.acquire().await;
        within(DEADLINE, retrieve(options, backend_pid, locks)).await
    };
    let error = match within(LIMIT, Box::pin(searching)).await {
        Ok(true) => return,
        Ok(false) => sqlx::Error::RowNotFound,
        Err(error) => error,
    };
    tracing::warn!(
        backend_pid,
        error = %chain(&error),
        "cannot give up a lock that was taken through a pooler in transaction mode"
    );
}

/// Releases locks on this backend. Returns whether it was found.
///
/// Inside a transaction, a connection keeps the server connection that the pooler has assigned to it. So each further
/// connection is assigned another one, until it is the right one.
pub(super) async fn retrieve(
    options: &PgConnectOptions,
    backend_pid: i32,
    locks: &[(KeyId, Mode)],
) -> Result<bool, sqlx::Error> {
    let mut pinned = Vec::new();
    let mut found = false;
    while !found && pinned.len() < MAX_CONNECTIONS {
        let mut conn = PgConnection::connect_with(options).await?;
        sql::proof::begin(&mut conn).await?;
        found = sql::release::unlock_on(&mut conn, backend_pid, locks).await?;
        pinned.push(conn);
    }
    for mut conn in pinned {
        // A pooler closes the server connection of a client that disconnects inside a transaction.
        sql::proof::rollback(&mut conn).await?;
        conn.close().await?;
    }
    Ok(found)
}
