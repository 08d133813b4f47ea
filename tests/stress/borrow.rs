//! Uses the connection of a session, as an application does.

use std::time::Duration;

use sqlx::postgres::{PgArguments, Postgres};
use sqlx::query::QueryScalar;
use sqlx::{Connection as _, PgConnection};
use tokio::time::timeout;

use crate::calls::{Ended, Interruption};
use crate::guard::Guard;
use crate::member::{ANSWERED, Member};

/// A use of a borrowed connection.
#[derive(Clone, Copy, Debug)]
enum Use {
    /// A transaction by hand, which is not ended.
    Begin,
    /// A transaction that is committed.
    Commit,
    /// A statement that fails inside of a transaction.
    Fail,
    /// A statement.
    Query,
    /// A transaction whose commit is never sent.
    Rollback,
}

impl Member {
    /// Borrows the connection of the guard's session, and leaves it in any state.
    pub(crate) async fn borrow(&mut self, guard: &Guard) {
        let backend = guard.backend_pid();
        let interruption = Interruption::any(&mut self.dice);
        let call = guard.connection();
        let Some(mut connection) = self.ask_until("connection", backend, interruption, call).await
        else {
            return;
        };
        let (verb, purpose) = match self.dice.below(5) {
            0 => ("statement: begin", Use::Begin),
            1 => ("statement: commit", Use::Commit),
            2 => ("statement: fail", Use::Fail),
            3 => ("statement: rollback", Use::Rollback),
            _ => ("statement: query", Use::Query),
        };
        // Like the calls of an application, the work may time out in the middle of a statement.
        let time = Duration::from_micros(self.dice.below(8000));
        self.world.spend(verb);
        let work = timeout(time, work(&mut connection, purpose));
        match self.world.calls.make(verb, ANSWERED, Interruption::Never, work).await {
            Ended::Returned(Ok(Ok(pid))) if pid != backend => {
                self.world.fail(format!("{verb}: backend {pid} answers for {backend}"));
            }
            Ended::Returned(Ok(Err(error))) => self.world.check_statement(verb, &error, backend),
            Ended::Returned(Err(_)) => self.world.count(format!("{verb}: interrupted")),
            Ended::Returned(Ok(Ok(_))) | Ended::Interrupted => {}
            Ended::TooLate => self.world.fail(format!("{verb} did not end in time")),
        }
    }
}

/// Returns a query that leaves no prepared statement, because the pool may run `DISCARD ALL` on its connections.
fn query() -> QueryScalar<'static, Postgres, i32, PgArguments> {
    const QUERY: &str = "SELECT pg_catalog.pg_backend_pid() FROM pg_catalog.pg_sleep(0.002)";
    sqlx::query_scalar(QUERY).persistent(false)
}

/// Uses the connection. Returns the backend that has answered.
async fn work(connection: &mut PgConnection, purpose: Use) -> sqlx::Result<i32> {
    match purpose {
        Use::Begin => {
            sqlx::raw_sql("BEGIN").execute(&mut *connection).await?;
            query().fetch_one(connection).await
        }
        Use::Commit => {
            let mut transaction = connection.begin().await?;
            let pid = query().fetch_one(&mut *transaction).await?;
            transaction.commit().await?;
            Ok(pid)
        }
        Use::Fail => {
            let pid = query().fetch_one(&mut *connection).await?;
            sqlx::raw_sql("BEGIN").execute(&mut *connection).await?;
            match sqlx::raw_sql("SELECT 1 OPERATOR(pg_catalog./) 0").execute(connection).await {
                Err(sqlx::Error::Database(error)) if error.code().as_deref() == Some("22012") => {
                    Ok(pid)
                }
                Err(error) => Err(error),
                Ok(_) => Err(sqlx::Error::Protocol("a division by zero succeeds".to_owned())),
            }
        }
        Use::Query => query().fetch_one(connection).await,
        Use::Rollback => {
            let mut transaction = connection.begin().await?;
            query().fetch_one(&mut *transaction).await
        }
    }
}
