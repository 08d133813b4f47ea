//! Measures acquiring and releasing a free lock, each time with a connection from the pool.

mod contest;
mod support;
mod table;
mod warm;

use std::sync::Arc;
use std::time::{Duration, Instant};

use pglock::Lock;
use pglock_testkit::TestDb;
use sqlx::error::BoxDynError;
use sqlx::postgres::{PgAdvisoryLock, PgAdvisoryLockKey};
use sqlx::{PgConnection, PgPool};
use tokio::runtime::Builder;
use tokio::task::spawn_blocking;

use contest::{Contest, Contestant};
use warm::warm_pool;

const KEY: i64 = 42;
const CONNECTIONS: u32 = 10;
/// How many cycles make a turn.
const CYCLES: u32 = 25;

fn main() -> Result<(), BoxDynError> {
    support::run(free)
}

async fn free(time: Duration) -> Result<(), BoxDynError> {
    let db = Arc::new(TestDb::new().await);
    let contests = compete(&db, time / 2).await?;
    // On a current-thread runtime of its own, the thread is woken only by the answer that its task waits for.
    let alone = {
        let db = Arc::clone(&db);
        let runtime = Builder::new_current_thread().enable_all().build()?;
        spawn_blocking(move || runtime.block_on(compete(&db, time / 2))).await??
    };

    let title = "free: acquire and release a free lock, from a pool of 10 open connections";
    support::print_title(title, &db.pool(1).await).await?;
    contest::publish("free", "acquire and release, median", 0.5, &contests)?;
    contest::publish(None, "the same on a current-thread runtime", 0.5, &alone)
}

async fn compete(db: &TestDb, time: Duration) -> Result<[Contest<Cycle>; 4], BoxDynError> {
    let sqlx = PgAdvisoryLock::with_key(PgAdvisoryLockKey::BigInt(KEY));
    let pglock = Lock::new(&warm_pool(&db.options(), CONNECTIONS).await?, KEY);
    let mut contests = [
        Contest::new(
            "sqlx's `PgAdvisoryLock`",
            Cycle::Sqlx(warm_pool(&db.options(), CONNECTIONS).await?, sqlx),
        ),
        Contest::new("`Lock`", Cycle::Pglock(Box::new(pglock)))
            .target("<= 1.00", |ratio, _| ratio <= 1.0),
        Contest::new("SQL by hand", Cycle::ByHand(warm_pool(&db.options(), CONNECTIONS).await?)),
        Contest::new("two round trips, no pool", Cycle::RoundTrips(db.admin().await)),
    ];
    contest::compete(&mut contests, time).await?;
    Ok(contests)
}

/// Acquires and releases a lock. The connection goes back to its pool each time.
enum Cycle {
    ByHand(PgPool),
    Pglock(Box<Lock>),
    /// The minimum: one round trip to acquire and one to release.
    RoundTrips(PgConnection),
    Sqlx(PgPool, PgAdvisoryLock),
}

impl Contestant for Cycle {
    async fn turn(&mut self) -> Result<Duration, BoxDynError> {
        let started = Instant::now();
        for _ in 0..CYCLES {
            match self {
                Self::ByHand(pool) => {
                    let mut connection = pool.acquire().await?;
                    for sql in ["SELECT pg_advisory_lock($1)", "SELECT pg_advisory_unlock($1)"] {
                        sqlx::query(sql).bind(KEY).execute(&mut *connection).await?;
                    }
                }
                Self::Pglock(lock) => lock.acquire().await?.release().await?,
                Self::RoundTrips(connection) => {
                    for _ in 0..2 {
                        sqlx::query("SELECT 1").execute(&mut *connection).await?;
                    }
                }
                Self::Sqlx(pool, lock) => {
                    let guard = lock.acquire(pool.acquire().await?).await?;
                    drop(guard.release_now().await?);
                }
            }
        }
        Ok(started.elapsed() / CYCLES)
    }
}
