//! A pooler in transaction mode: how it is found out, and what is left to do then.
//!
//! Such a pooler lends its server connections to one transaction after another. So a second
//! connection of ours is answered by the process that answered the first, or the first by another one
//! than before: either is proof. On an idle pooler nearly every question shows it, on a busy one about
//! every second; and every answer that a session gives later, to a heartbeat or a release, is looked
//! at again.

use sqlx::PgConnection;
use tokio::sync::Semaphore;

use super::conn::Conn;
use super::ledger::Modes;
use super::{DEADLINE, Session, within};
use crate::error::sqlstate;
use crate::key::KeyId;
use crate::sql;

/// How many connections of a process may be open beside its pools, to look for a pooler.
static PROBING: Semaphore = Semaphore::const_new(4);

/// How often two connections are asked where nothing speaks for a pooler.
const QUESTIONS: usize = 4;

/// And where something does.
const MORE_QUESTIONS: usize = 40;

impl Session {
    /// Makes sure that the session has a server connection to itself. `None` if there is no telling
    /// just now, for want of a second connection.
    pub(super) async fn is_pooled(
        &self,
        conn: &mut PgConnection,
    ) -> Result<Option<bool>, sqlx::Error> {
        let ours = match sql::backend(conn).await {
            // Somebody left a failed transaction on the pooled connection.
            Err(error) if sqlstate(&error).as_deref() == Some("25P02") => {
                sql::end_transaction(conn).await?;
                sql::backend(conn).await?
            }
            answer => answer?,
        };
        let Ok(mut beside) = self.connect_beside(&PROBING).await else { return Ok(None) };
        let mut asked = 0;
        let mut questions = QUESTIONS;
        while asked < questions {
            let Ok(theirs) = sql::backend(&mut beside.conn).await else { return Ok(None) };
            // Older than our connection to it: somebody had it before. A pooler, of whatever mode.
            if theirs.started < ours.asked {
                questions = MORE_QUESTIONS;
            }
            if theirs.is(&ours) || !sql::backend(conn).await?.is(&ours) {
                return Ok(Some(true));
            }
            asked += 1;
        }
        beside.close().await;
        Ok(Some(false))
    }

    /// Tries to give up what a pooler has left locked on the server connection that it lent first.
    ///
    /// The pooler decides where a statement goes, so it may take many, and may fail.
    pub(super) async fn retrieve(
        &self,
        conn: &mut Conn,
        backend_pid: i32,
        locks: &[(KeyId, Modes)],
    ) {
        if locks.is_empty() {
            return;
        }
        let trying = within(DEADLINE, async {
            let pg = conn.pg()?;
            while !sql::unlock_on(pg, backend_pid, locks).await? {}
            Ok(())
        });
        if let Err(error) = trying.await {
            tracing::warn!(
                backend_pid,
                error = &error as &dyn std::error::Error,
                "cannot give up a lock that was taken through a pooler in transaction mode"
            );
        }
    }
}
