//! Measures a free lock over a link with a round trip of 5 ms, and prints the times in round trips.

mod contest;
mod support;

use std::time::{Duration, Instant};

use pglock::Lock;
use pglock_testkit::{Proxy, Server, TestDb};
use sqlx::error::BoxDynError;
use sqlx::postgres::{PgAdvisoryLock, PgAdvisoryLockKey, PgConnectOptions, PgPoolOptions};
use sqlx::{ConnectOptions, PgConnection, PgPool};

use contest::{Contest, Contestant};

const KEY: i64 = 42;
const CONNECTIONS: u32 = 3;
const ROUND_TRIP: Duration = Duration::from_millis(5);
/// How many cycles make a turn.
const CYCLES: u32 = 5;

fn main() -> Result<(), BoxDynError> {
    support::run(slow_link)
}

async fn slow_link(time: Duration) -> Result<(), BoxDynError> {
    let server = Server::options().tcp().start();
    let db = TestDb::on(&server).await;
    let proxy = Proxy::to(server.port()).await;
    let options = server.tcp_options().database(db.name()).port(proxy.address().port());

    let round_trip = Contestants::new(&options).await?;
    let both = Contestants::new(&options).await?;
    // Each direction takes half of it.
    proxy.delay(ROUND_TRIP / 2);
    let mut acquires = round_trip.compete(Measured::Acquire, "<= 1.10", |ratio, _| ratio <= 1.1);
    contest::compete(&mut acquires, time / 2).await?;
    let mut cycles = both.compete(Measured::Both, "<= 2.20", |ratio, _| ratio <= 2.2);
    contest::compete(&mut cycles, time / 2).await?;
    proxy.delay(Duration::ZERO);

    let title = "slow_link: a free lock over a link with a round trip of 5 ms";
    support::print_title(title, &db.pool(1).await).await?;
    contest::print_table("acquire, median, in round trips", 0.5, &acquires);
    contest::print_table("acquire and release, median, in round trips", 0.5, &cycles);
    Ok(())
}

/// The part of a cycle that is measured.
#[derive(Clone, Copy)]
enum Measured {
    Acquire,
    Both,
}

/// The connections of the contestants, of which each has its own.
struct Contestants {
    by_hand: PgPool,
    pglock: Lock,
    round_trip: PgConnection,
    sqlx: PgPool,
}

impl Contestants {
    /// Opens all connections, and acquires a few times, because the crate examines the server at the first acquire.
    async fn new(options: &PgConnectOptions) -> Result<Self, BoxDynError> {
        let mut pglock = Lock::new(&warm_pool(options).await?, KEY);
        for _ in 0..CONNECTIONS {
            pglock.acquire().await?.release().await?;
        }
        Ok(Self {
            by_hand: warm_pool(options).await?,
            pglock,
            round_trip: options.connect().await?,
            sqlx: warm_pool(options).await?,
        })
    }

    /// Returns the contests. The first one is a round trip, so that the ratios of the others are in round trips.
    fn compete(
        self,
        measured: Measured,
        words: &'static str,
        is_met: fn(f64, f64) -> bool,
    ) -> [Contest<Cycles>; 4] {
        let sqlx = PgAdvisoryLock::with_key(PgAdvisoryLockKey::BigInt(KEY));
        let cycles = |of| Cycles { of, measured };
        [
            Contest::new("a round trip", cycles(Cycle::RoundTrip(self.round_trip))),
            Contest::new("pglock", cycles(Cycle::Pglock(Box::new(self.pglock))))
                .target(words, is_met),
            Contest::new("sqlx's PgAdvisoryLock", cycles(Cycle::Sqlx(self.sqlx, sqlx))),
            Contest::new("SQL by hand", cycles(Cycle::ByHand(self.by_hand))),
        ]
    }
}

/// A pool that has opened all its connections.
async fn warm_pool(options: &PgConnectOptions) -> Result<PgPool, BoxDynError> {
    let pool = PgPoolOptions::new().max_connections(CONNECTIONS);
    let pool = pool.connect_with(options.clone()).await?;
    let mut connections = Vec::new();
    for _ in 0..CONNECTIONS {
        connections.push(pool.acquire().await?);
    }
    Ok(pool)
}

/// Acquires and releases a lock several times, and measures one of the two or both.
struct Cycles {
    of: Cycle,
    measured: Measured,
}

enum Cycle {
    ByHand(PgPool),
    Pglock(Box<Lock>),
    /// The minimum that it takes to get an answer.
    RoundTrip(PgConnection),
    Sqlx(PgPool, PgAdvisoryLock),
}

impl Contestant for Cycles {
    async fn turn(&mut self) -> Result<Duration, BoxDynError> {
        let mut sum = Duration::ZERO;
        for _ in 0..CYCLES {
            let started = Instant::now();
            let acquired = self.of.cycle(started).await?;
            sum += match self.measured {
                Measured::Acquire => acquired,
                Measured::Both => started.elapsed(),
            };
        }
        Ok(sum / CYCLES)
    }
}

impl Cycle {
    /// Acquires and releases the lock. Returns how long after `started` it was acquired.
    async fn cycle(&mut self, started: Instant) -> Result<Duration, BoxDynError> {
        Ok(match self {
            Self::ByHand(pool) => {
                let mut connection = pool.acquire().await?;
                let acquire = sqlx::query("SELECT pg_advisory_lock($1)").bind(KEY);
                acquire.execute(&mut *connection).await?;
                let acquired = started.elapsed();
                let release = sqlx::query("SELECT pg_advisory_unlock($1)").bind(KEY);
                release.execute(&mut *connection).await?;
                acquired
            }
            Self::Pglock(lock) => {
                let guard = lock.acquire().await?;
                let acquired = started.elapsed();
                guard.release().await?;
                acquired
            }
            Self::RoundTrip(connection) => {
                sqlx::query("SELECT 1").execute(connection).await?;
                started.elapsed()
            }
            Self::Sqlx(pool, lock) => {
                let guard = lock.acquire(pool.acquire().await?).await?;
                let acquired = started.elapsed();
                drop(guard.release_now().await?);
                acquired
            }
        })
    }
}
