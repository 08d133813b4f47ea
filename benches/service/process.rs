//! One process of a service, and what is measured in it.

use std::env;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sqlx::error::BoxDynError;
use sqlx::postgres::PgPoolOptions;
use sqlx::{PgPool, query};
use tokio::process::Command;
use tokio::task::JoinSet;
use tokio::time::{sleep, sleep_until, timeout_at};

use crate::VARIABLE;
use crate::dice::Dice;
use crate::quantile::quantile;
use crate::way::{Means, Way};

/// How long all processes run before the measurement begins.
const WARM_UP: Duration = Duration::from_secs(1);

/// How often a query is made that has nothing to do with locks.
const QUERY_INTERVAL: Duration = Duration::from_millis(20);

/// One process of a service.
pub(crate) struct Process {
    pub(crate) way: Way,
    pub(crate) tasks: u64,
    pub(crate) keys: u64,
    pub(crate) pool: u32,
    pub(crate) time: Duration,
    pub(crate) seed: u64,
    pub(crate) url: String,
}

/// What was measured.
#[derive(Debug, Default)]
pub(crate) struct Measured {
    /// How long each cycle waited for its lock, until it had it.
    waits: Vec<Duration>,
    /// How long the other queries took, in microseconds.
    queries: Vec<Duration>,
    pub(crate) errors: u64,
}

impl Process {
    /// Starts it, and returns what it has measured.
    pub(crate) async fn start(self) -> Result<Measured, BoxDynError> {
        let Self { way, tasks, keys, pool, time, seed, url } = self;
        let way = Way::ALL.iter().position(|known| *known == way).unwrap_or_default();
        let told = format!("{way} {tasks} {keys} {pool} {} {seed} {url}", time.as_millis());
        let mut command = Command::new(env::current_exe()?);
        let command = command.env(VARIABLE, told).stdin(Stdio::null()).stderr(Stdio::inherit());
        let output = command.kill_on_drop(true).output().await?;
        if !output.status.success() {
            return Err("a process has failed".into());
        }
        Measured::parse(&String::from_utf8(output.stdout)?)
    }

    /// The process that was told so.
    pub(crate) fn parse(told: &str) -> Result<Self, BoxDynError> {
        let fields: Vec<_> = told.split(' ').collect();
        let [way, tasks, keys, pool, time, seed, url] = fields[..] else {
            return Err("not the fields of a process".into());
        };
        Ok(Self {
            way: *Way::ALL.get(way.parse::<usize>()?).ok_or("no such way")?,
            tasks: tasks.parse()?,
            keys: keys.parse()?,
            pool: pool.parse()?,
            time: Duration::from_millis(time.parse()?),
            seed: seed.parse()?,
            url: url.to_owned(),
        })
    }
}

/// Does what the process is there for, and prints what it has measured.
pub(crate) async fn run(process: Process) -> Result<(), BoxDynError> {
    let Process { way, tasks, keys, pool, time, seed, url } = process;
    let pool =
        PgPoolOptions::new().max_connections(pool).min_connections(pool).connect(&url).await?;
    let means = Means::new(way, pool.clone());
    let zipf = Arc::new(Zipf::new(keys));
    let begin = Instant::now() + WARM_UP;
    let end = begin + time;

    let mut running = JoinSet::new();
    for task in 0..tasks {
        let (means, zipf) = (means.clone(), Arc::clone(&zipf));
        let mut dice = Dice::new(seed * 100_000 + task);
        running.spawn(async move {
            let mut measured = Measured::default();
            loop {
                let key = zipf.draw(&mut dice);
                // A cycle that has not ended by then does not count.
                match timeout_at(end.into(), means.cycle(key)).await {
                    Err(_) => return measured,
                    Ok(_) if Instant::now() < begin => {}
                    Ok(Ok(waited)) => measured.waits.push(waited),
                    Ok(Err(error)) => {
                        measured.errors += 1;
                        if measured.errors == 1 {
                            report(&*error);
                        }
                    }
                }
            }
        });
    }
    running.spawn(ask(pool.clone(), begin, end));
    let mut all = Measured::default();
    while let Some(measured) = running.join_next().await {
        all.add(measured?);
    }
    all.write();
    Ok(())
}

/// Makes queries that have nothing to do with locks.
async fn ask(pool: PgPool, begin: Instant, end: Instant) -> Measured {
    let mut measured = Measured::default();
    sleep_until(begin.into()).await;
    loop {
        let started = Instant::now();
        match timeout_at(end.into(), query("SELECT 1").execute(&pool)).await {
            Err(_) => return measured,
            Ok(Ok(_)) => measured.queries.push(started.elapsed()),
            Ok(Err(_)) => measured.errors += 1,
        }
        sleep(QUERY_INTERVAL).await;
    }
}

#[expect(clippy::print_stderr, reason = "the first error says why there are more")]
fn report(error: &dyn std::error::Error) {
    eprintln!("{error}");
}

impl Measured {
    pub(crate) fn add(&mut self, other: Self) {
        self.waits.extend(other.waits);
        self.queries.extend(other.queries);
        self.errors += other.errors;
    }

    #[expect(clippy::cast_precision_loss, reason = "the counts are small enough")]
    pub(crate) fn cycles(&self) -> f64 {
        self.waits.len() as f64
    }

    /// In milliseconds.
    pub(crate) fn wait(&self, q: f64) -> f64 {
        quantile(&self.waits, q) / 1000.0
    }

    /// In milliseconds.
    pub(crate) fn query(&self, q: f64) -> f64 {
        quantile(&self.queries, q) / 1000.0
    }

    #[expect(clippy::print_stdout, reason = "the parent reads it")]
    fn write(&self) {
        let micros = |times: &[Duration]| -> String {
            times.iter().map(|time| time.as_micros().to_string()).collect::<Vec<_>>().join(" ")
        };
        println!("{}\n{}\n{}", micros(&self.waits), micros(&self.queries), self.errors);
    }

    fn parse(written: &str) -> Result<Self, BoxDynError> {
        let lines: Vec<_> = written.lines().collect();
        let [waits, queries, errors] = lines[..] else { return Err("not three lines".into()) };
        let times = |micros: &str| -> Result<Vec<Duration>, BoxDynError> {
            let micros = micros.split_whitespace().map(str::parse);
            Ok(micros.map(|micros| micros.map(Duration::from_micros)).collect::<Result<_, _>>()?)
        };
        Ok(Self { waits: times(waits)?, queries: times(queries)?, errors: errors.parse()? })
    }
}

/// Draws keys: the n-th as often as 1/n.
struct Zipf {
    /// How often any key up to this one is drawn.
    sums: Vec<f64>,
}

impl Zipf {
    fn new(keys: u64) -> Self {
        #[expect(clippy::cast_precision_loss, reason = "there are few enough")]
        let shares = (1..=keys).map(|key| 1.0 / key as f64);
        let sums = shares.scan(0.0, |sum, share| {
            *sum += share;
            Some(*sum)
        });
        Self { sums: sums.collect() }
    }

    fn draw(&self, dice: &mut Dice) -> i64 {
        const STEPS: u64 = 1 << 32;
        let all = self.sums.last().copied().unwrap_or_default();
        #[expect(clippy::cast_precision_loss, reason = "both have 32 bits")]
        let drawn = all * (dice.below(STEPS) as f64 / STEPS as f64);
        let place = self.sums.partition_point(|sum| *sum <= drawn);
        i64::try_from(place + 1).unwrap_or(i64::MAX)
    }
}
