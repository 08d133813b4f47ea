//! The minimal cost of batching: batches of calls on one connection, without guards, table or safety.

use sqlx::PgPool;
use tokio::sync::{mpsc, oneshot};

/// A lock or an unlock, and the sender of its answer.
type Call = (i64, bool, oneshot::Sender<bool>);

#[derive(Clone)]
pub(crate) struct Floor(mpsc::UnboundedSender<Call>);

impl Floor {
    /// Connects at the first call.
    pub(crate) fn start(pool: PgPool) -> Self {
        let (calls, mut receiver) = mpsc::unbounded_channel::<Call>();
        let batches = async move {
            let mut batch = Vec::new();
            let mut connection = None;
            while receiver.recv_many(&mut batch, 1000).await > 0 {
                if connection.is_none() {
                    connection = pool.acquire().await.ok();
                }
                let Some(connection) = &mut connection else { return };
                let keys: Vec<i64> = batch.iter().map(|(key, ..)| *key).collect();
                let locks: Vec<bool> = batch.iter().map(|(_, lock, _)| *lock).collect();
                let answers: Result<String, _> = sqlx::query_scalar(
                    "SELECT string_agg(CASE CASE WHEN lock THEN pg_try_advisory_lock(key) \
                     ELSE pg_advisory_unlock(key) END WHEN true THEN '1' ELSE '0' END, '') \
                     FROM unnest($1::int8[], $2::bool[]) AS calls (key, lock)",
                )
                .bind(keys)
                .bind(locks)
                .fetch_one(&mut **connection)
                .await;
                let Ok(answers) = answers else { return };
                for ((_, _, tell), answer) in batch.drain(..).zip(answers.bytes()) {
                    tell.send(answer == b'1').ok();
                }
            }
        };
        // Detached, because the task ends with the last sender.
        drop(tokio::runtime::Handle::current().spawn(batches));
        Self(calls)
    }

    /// Locks a key if it is free, or unlocks it. Returns whether the server has done so.
    pub(crate) async fn call(&self, key: i64, lock: bool) -> bool {
        let (tell, told) = oneshot::channel();
        drop(self.0.send((key, lock, tell)));
        told.await.unwrap_or_default()
    }
}
