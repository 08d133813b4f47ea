//! Measures a re-entrant acquire, in which the handle already holds the lock.

mod contest;
mod support;
mod table;

use std::time::{Duration, Instant};

use pglock::Lock;
use pglock_testkit::TestDb;
use sqlx::PgConnection;
use sqlx::error::BoxDynError;
use tokio::sync::Mutex;

use contest::{Contest, Contestant};

const KEY: i64 = 42;
/// How many re-entrant acquires make a turn, in the process and on the server.
const TIMES: u32 = 10_000;
const TIMES_ON_SERVER: u32 = 10;

fn main() -> Result<(), BoxDynError> {
    support::run(stacked)
}

async fn stacked(time: Duration) -> Result<(), BoxDynError> {
    let db = TestDb::new().await;
    let mut connection = db.admin().await;
    sqlx::query("SELECT pg_advisory_lock($1)").bind(!KEY).execute(&mut connection).await?;
    let mut lock = Lock::new(&db.pool(2).await, KEY);
    let _held = lock.acquire().await?;
    let mut contests = [
        Contest::new("tokio's `Mutex`, for comparison", Stack::Mutex(Mutex::new(()))),
        Contest::new("`Lock`, re-entrant", Stack::Pglock(Box::new(lock)))
            .target("<= 1 µs", |_, micros| micros <= 1.0),
        Contest::new("SQL by hand, counted by the server", Stack::ByHand(connection)),
    ];
    contest::compete(&mut contests, time).await?;

    let title = "stacked: acquire and drop, while the same handle holds the lock";
    support::print_title(title, &db.pool(1).await).await?;
    contest::publish("stacked", "acquire and drop, median", 0.5, &contests)
}

/// Acquires once more a lock that is already held, and releases it.
enum Stack {
    ByHand(PgConnection),
    /// A mutex that is not held, because it is not re-entrant. It involves no server.
    Mutex(Mutex<()>),
    Pglock(Box<Lock>),
}

impl Contestant for Stack {
    async fn turn(&mut self) -> Result<Duration, BoxDynError> {
        let times = if let Self::ByHand(_) = self { TIMES_ON_SERVER } else { TIMES };
        let started = Instant::now();
        for _ in 0..times {
            match self {
                Self::ByHand(connection) => {
                    for sql in ["SELECT pg_advisory_lock($1)", "SELECT pg_advisory_unlock($1)"] {
                        sqlx::query(sql).bind(!KEY).execute(&mut *connection).await?;
                    }
                }
                Self::Mutex(mutex) => drop(mutex.lock().await),
                Self::Pglock(lock) => drop(lock.acquire().await?),
            }
        }
        Ok(started.elapsed() / times)
    }
}
