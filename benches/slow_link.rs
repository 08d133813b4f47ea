//! Measures free locks over links with round trips of some 1, 10 and 50 ms, and prints the times in round trips, which
//! are measured, too.

mod quantile;
mod support;
mod table;
mod target;
mod warm;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use pglock::{Election, Lock, LockManager, MultiLock, Semaphore};
use pglock_testkit::{Proxy, Server, TestDb};
use sqlx::error::BoxDynError;
use sqlx::postgres::{PgAdvisoryLock, PgAdvisoryLockKey, PgConnectOptions};
use sqlx::{ConnectOptions, PgConnection, PgPool, query};
use tokio::task::JoinSet;
use tokio::time::sleep;

use quantile::quantile;
use table::Table;
use warm::warm_pool;

const KEY: i64 = 42;
const CONNECTIONS: u32 = 3;
const ROUND_TRIPS: [Duration; 3] =
    [Duration::from_millis(1), Duration::from_millis(10), Duration::from_millis(50)];
/// How many keys the `MultiLock` has.
const KEYS: i64 = 100;
/// How many tasks use the manager at once.
const TASKS: i64 = 1000;

fn main() -> Result<(), BoxDynError> {
    support::run(slow_link)
}

async fn slow_link(time: Duration) -> Result<(), BoxDynError> {
    let server = Server::options().tcp().start();
    let db = TestDb::on(&server).await;
    let proxy = Proxy::to(server.port()).await;
    let options = server.tcp_options().database(db.name()).port(proxy.address().port());
    let title = "slow_link: free locks over a slow link";
    support::print_title(title, &db.pool(1).await).await?;

    let mut rows = Way::all(&options).await?.map(Row::new);
    let (mut manager, mut round_trips) = (Vec::new(), Vec::new());
    for round_trip in ROUND_TRIPS {
        // Each direction takes half of it.
        proxy.delay(round_trip / 2);
        let one = measure(&mut rows, time).await?;
        let cycle = cycles_of_manager(&options, time / 10).await?;
        manager.push(cycle.as_secs_f64() * 1e6 / one);
        round_trips.push(one / 1e3);
        proxy.delay(Duration::ZERO);
    }
    print(&rows, &manager, &round_trips)
}

/// A way to lock, and the medians of its times for each round trip.
struct Row {
    way: Way,
    /// In round trips.
    acquire: Vec<f64>,
    cycle: Vec<f64>,
}

impl Row {
    fn new(way: Way) -> Self {
        Self { way, acquire: Vec::new(), cycle: Vec::new() }
    }
}

/// Measures each way in turns, and returns the median of a round trip in microseconds.
async fn measure(rows: &mut [Row], time: Duration) -> Result<f64, BoxDynError> {
    let mut samples = vec![(Vec::new(), Vec::new()); rows.len()];
    let started = Instant::now();
    // The first round, in which caches fill, does not count.
    for round in 0_u32.. {
        if round > 1 && started.elapsed() > time {
            break;
        }
        for (row, (acquires, cycles)) in rows.iter_mut().zip(&mut samples) {
            let started = Instant::now();
            let acquired = row.way.cycle(started).await?;
            if round > 0 {
                acquires.push(acquired);
                cycles.push(started.elapsed());
            }
        }
    }
    let one = samples.first().map_or(f64::NAN, |(acquires, _)| quantile(acquires, 0.5));
    for (row, (acquires, cycles)) in rows.iter_mut().zip(&samples) {
        row.acquire.push(quantile(acquires, 0.5) / one);
        row.cycle.push(quantile(cycles, 0.5) / one);
    }
    Ok(one)
}

/// Prints the times in round trips, and the targets.
fn print(rows: &[Row], manager: &[f64], round_trips: &[f64]) -> Result<(), BoxDynError> {
    let heads = ["acquire", "and release"]
        .into_iter()
        .flat_map(|what| round_trips.iter().map(move |millis| format!("{what}, {millis:.1} ms")));
    let mut table = Table::new("slow_link", "median, in round trips", heads);
    for Row { way, acquire, cycle } in rows {
        let times = acquire.iter().chain(cycle).map(|time| format!("{time:.2}"));
        // A round trip is the unit.
        if !matches!(way, Way::RoundTrip(_)) {
            table.row(way.name(), times);
        }
    }
    let share = manager.iter().map(|share| format!("{share:.3}"));
    let unknown = manager.iter().map(|_| String::new());
    table.row(format!("`LockManager`, {TASKS} tasks, per cycle"), unknown.chain(share));
    table.publish()?;
    for Row { way, acquire, cycle } in rows {
        if let Some((of_acquire, of_cycle)) = way.targets() {
            target::print_at_most(&format!("{}, acquire", way.name()), acquire, of_acquire);
            target::print_at_most(&format!("{}, and release", way.name()), cycle, of_cycle);
        }
    }
    target::print_at_most("a cycle of the manager under load", manager, 0.1);
    Ok(())
}

/// A way to lock, with connections of its own.
enum Way {
    ByHand(PgPool),
    Election(Box<Election>),
    Lock(Box<Lock>),
    MultiLock(Box<MultiLock>),
    /// The minimum that it takes to get an answer.
    RoundTrip(PgConnection),
    Semaphore(Semaphore),
    Sqlx(PgPool, PgAdvisoryLock),
}

impl Way {
    /// Opens all connections, and acquires a lock a few times, because the crate examines the server at first.
    async fn all(options: &PgConnectOptions) -> Result<[Self; 7], BoxDynError> {
        let mut lock = Lock::new(&warm_pool(options, CONNECTIONS).await?, KEY);
        for _ in 0..CONNECTIONS {
            lock.acquire().await?.release().await?;
        }
        let sqlx = PgAdvisoryLock::with_key(PgAdvisoryLockKey::BigInt(KEY));
        let keys = (0..KEYS).map(|key| 1000 + key);
        Ok([
            Self::RoundTrip(options.connect().await?),
            Self::Lock(Box::new(lock)),
            Self::ByHand(warm_pool(options, CONNECTIONS).await?),
            Self::Sqlx(warm_pool(options, CONNECTIONS).await?, sqlx),
            Self::MultiLock(Box::new(MultiLock::new(
                &warm_pool(options, CONNECTIONS).await?,
                keys,
            ))),
            Self::Semaphore(Semaphore::new(&warm_pool(options, CONNECTIONS).await?, "slow", 3)?),
            Self::Election(Box::new(Election::new(
                &warm_pool(options, CONNECTIONS).await?,
                "slow",
            ))),
        ])
    }

    fn name(&self) -> &'static str {
        match self {
            Self::ByHand(_) => "SQL by hand",
            Self::Election(_) => "`Election`",
            Self::Lock(_) => "`Lock`",
            Self::MultiLock(_) => "`MultiLock` of 100 keys",
            Self::RoundTrip(_) => "a round trip",
            Self::Semaphore(_) => "`Semaphore`",
            Self::Sqlx(..) => "sqlx's `PgAdvisoryLock`",
        }
    }

    /// Returns how many round trips an acquire, and one with its release, may take.
    fn targets(&self) -> Option<(f64, f64)> {
        match self {
            Self::Lock(_) | Self::MultiLock(_) => Some((1.05, 2.05)),
            Self::Semaphore(_) => Some((2.05, 3.05)),
            Self::Election(_) => Some((3.05, 4.05)),
            Self::ByHand(_) | Self::RoundTrip(_) | Self::Sqlx(..) => None,
        }
    }

    /// Acquires and releases the lock. Returns how long after `started` it was acquired.
    async fn cycle(&mut self, started: Instant) -> Result<Duration, BoxDynError> {
        let acquired;
        match self {
            Self::ByHand(pool) => {
                let mut connection = pool.acquire().await?;
                let acquire = query("SELECT pg_advisory_lock($1)").bind(KEY);
                acquire.execute(&mut *connection).await?;
                acquired = started.elapsed();
                let release = query("SELECT pg_advisory_unlock($1)").bind(KEY);
                release.execute(&mut *connection).await?;
            }
            Self::Election(election) => {
                let leadership = election.campaign().await?;
                acquired = started.elapsed();
                leadership.resign().await?;
            }
            Self::Lock(lock) => {
                let guard = lock.acquire().await?;
                acquired = started.elapsed();
                guard.release().await?;
            }
            Self::MultiLock(lock) => {
                let guard = lock.acquire().await?;
                acquired = started.elapsed();
                guard.release().await?;
            }
            Self::RoundTrip(connection) => {
                query("SELECT 1").execute(connection).await?;
                acquired = started.elapsed();
            }
            Self::Semaphore(semaphore) => {
                let permit = semaphore.acquire().await?;
                acquired = started.elapsed();
                permit.release().await?;
            }
            Self::Sqlx(pool, lock) => {
                let guard = lock.acquire(pool.acquire().await?).await?;
                acquired = started.elapsed();
                drop(guard.release_now().await?);
            }
        }
        Ok(acquired)
    }
}

/// Returns the time of a cycle if many tasks use a manager, that is, the time divided by the number of all cycles.
async fn cycles_of_manager(
    options: &PgConnectOptions,
    time: Duration,
) -> Result<Duration, BoxDynError> {
    let manager = LockManager::new(&warm_pool(options, CONNECTIONS).await?);
    let stop = Arc::new(AtomicBool::new(false));
    let mut running = JoinSet::new();
    let count = Arc::new(AtomicU32::new(0));
    for key in 0..TASKS {
        let (mut lock, stop, count) =
            (Lock::new(&manager, key), Arc::clone(&stop), Arc::clone(&count));
        running.spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                lock.acquire().await?.release().await?;
                count.fetch_add(1, Ordering::Relaxed);
            }
            Ok::<_, pglock::Error>(())
        });
    }
    sleep(time / 4).await;
    let (before, started) = (count.load(Ordering::Relaxed), Instant::now());
    sleep(time).await;
    let (cycles, took) = (count.load(Ordering::Relaxed) - before, started.elapsed());
    stop.store(true, Ordering::Relaxed);
    while let Some(ended) = running.join_next().await {
        ended??;
    }
    Ok(took / cycles.max(1))
}
