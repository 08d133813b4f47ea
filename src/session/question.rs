//! Questions that a guard puts to its session.

use std::sync::Arc;

use super::{ConnGuard, DEADLINE, Session, within};
use crate::error::{Error, Loss, Result, is_answer};
use crate::key::Key;
use crate::sql;

impl Session {
    /// Draws a fencing token.
    pub(crate) async fn draw_token(self: &Arc<Self>, key: &Key) -> Result<u64> {
        let mut slot = self.for_guard(key).await?;
        let answer = within(DEADLINE, async {
            let conn = slot.as_mut().ok_or(sqlx::Error::PoolClosed)?;
            self.tidy(conn).await?;
            sql::draw_token(conn.pg()?).await
        });
        let answer = answer.await;
        self.sort_out(key, slot, answer).map(i64::cast_unsigned)
    }

    /// Shows a name on the server for as long as the session holds something.
    pub(crate) async fn show_name(self: &Arc<Self>, key: &Key, name: &str) -> Result<()> {
        let mut slot = self.for_guard(key).await?;
        self.to_put_back();
        let answer = within(DEADLINE, async {
            let conn = slot.as_mut().ok_or(sqlx::Error::PoolClosed)?;
            self.tidy(conn).await?;
            sql::show_name(conn.pg()?, name).await
        });
        let answer = answer.await;
        self.sort_out(key, slot, answer)
    }

    /// Asks whether a permit of a semaphore is held that counts its permits differently.
    pub(crate) async fn other_count(
        self: &Arc<Self>,
        key: &Key,
        permit: &Key,
    ) -> Result<Option<i64>> {
        let mut slot = self.for_guard(key).await?;
        let answer = within(DEADLINE, async {
            let conn = slot.as_mut().ok_or(sqlx::Error::PoolClosed)?;
            self.tidy(conn).await?;
            sql::other_count(conn.pg()?, permit.id()).await
        });
        let answer = answer.await;
        self.sort_out(key, slot, answer)
    }

    /// Waits for the connection, behind all who asked before.
    async fn for_guard(self: &Arc<Self>, key: &Key) -> Result<ConnGuard> {
        let slot = self.connection().await;
        match self.loss() {
            Some(reason) => Err(Error::lost(key, reason)),
            None if slot.is_none() => Err(Error::lost(key, Loss::NotHeld)),
            None => Ok(slot),
        }
    }

    /// Tells what is wrong with the question from what is wrong with the session.
    fn sort_out<T>(
        &self,
        key: &Key,
        mut slot: ConnGuard,
        answer: Result<T, sqlx::Error>,
    ) -> Result<T> {
        answer.map_err(|source| {
            // The session lives, and its lock is held.
            if is_answer(&source) {
                return Error::Database { key: key.clone(), source };
            }
            let loss = Loss::broken(source);
            drop(slot.take());
            self.lose(&loss);
            Error::lost(key, loss)
        })
    }
}
