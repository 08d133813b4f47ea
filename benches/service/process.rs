//! One process of a service, and its measurements.

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
use crate::usage::cpu_of;
use crate::way::{Means, Way};

/// How long all processes run before the measurement begins.
pub(crate) const WARM_UP: Duration = Duration::from_secs(3);

/// The interval of the queries that have nothing to do with locks.
const QUERY_INTERVAL: Duration = Duration::from_millis(20);

/// One process of a service.
pub(crate) struct Process {
    pub(crate) way: Way,
    pub(crate) tasks: u64,
    pub(crate) keys: u64,
    pub(crate) pool: u32,
    pub(crate) time: Duration,
    pub(crate) seed: u64,
    /// How many cycles begin per second, whether or not others have ended. Zero if each task begins a cycle when it has
    /// ended the previous one.
    pub(crate) arrivals: u64,
    pub(crate) url: String,
}

/// The measurements of one process, or of several.
#[derive(Debug, Default)]
pub(crate) struct Measured {
    /// How long each cycle waited, from the time at which it was due to begin until its work began under the lock.
    waits: Vec<Duration>,
    /// How long each cycle has taken that had not ended when the measurement ended. Most of them still waited.
    unfinished: Vec<Duration>,
    /// How long the other queries took.
    queries: Vec<Duration>,
    pub(crate) errors: u64,
    /// The CPU time that the processes have used.
    pub(crate) client_cpu: Duration,
    /// The CPU time that the server has used.
    pub(crate) server_cpu: Duration,
    /// The largest number of connections that the server had.
    pub(crate) connections: i64,
}

impl Process {
    /// Runs the process, and returns its measurements.
    pub(crate) async fn start(self) -> Result<Measured, BoxDynError> {
        let Self { way, tasks, keys, pool, time, seed, arrivals, url } = self;
        let way = Way::ALL.iter().position(|known| *known == way).unwrap_or_default();
        let millis = time.as_millis();
        let told = format!("{way} {tasks} {keys} {pool} {millis} {seed} {arrivals} {url}");
        let mut command = Command::new(env::current_exe()?);
        let command = command.env(VARIABLE, told).stdin(Stdio::null());
        let output = command.kill_on_drop(true).output().await?;
        let told = String::from_utf8_lossy(&output.stderr);
        if !output.status.success() {
            return Err(format!("a process has failed: {}, {told}", output.status).into());
        }
        if !told.is_empty() {
            report(&told);
        }
        Measured::parse(&String::from_utf8(output.stdout)?)
    }

    /// Parses the parameters of a process.
    pub(crate) fn parse(told: &str) -> Result<Self, BoxDynError> {
        let fields: Vec<_> = told.split(' ').collect();
        let [way, tasks, keys, pool, time, seed, arrivals, url] = fields[..] else {
            return Err("not the fields of a process".into());
        };
        Ok(Self {
            way: *Way::ALL.get(way.parse::<usize>()?).ok_or("no such way")?,
            tasks: tasks.parse()?,
            keys: keys.parse()?,
            pool: pool.parse()?,
            time: Duration::from_millis(time.parse()?),
            seed: seed.parse()?,
            arrivals: arrivals.parse()?,
            url: url.to_owned(),
        })
    }
}

/// Runs the tasks of the process, and prints their measurements.
pub(crate) async fn run(process: Process) -> Result<(), BoxDynError> {
    let Process { way, tasks, keys, pool, time, seed, arrivals, url } = process;
    let pool =
        PgPoolOptions::new().max_connections(pool).min_connections(pool).connect(&url).await?;
    let means = Means::new(way, pool.clone());
    let zipf = Arc::new(Zipf::new(keys));
    let begin = Instant::now() + WARM_UP;
    let end = begin + time;

    let mut running = JoinSet::new();
    if arrivals > 0 {
        let dice = Dice::new(seed * 100_000);
        running.spawn(arrive(means, zipf, dice, arrivals, begin, end));
    } else {
        for task in 0..tasks {
            let (means, zipf) = (means.clone(), Arc::clone(&zipf));
            let mut dice = Dice::new(seed * 100_000 + task);
            running.spawn(async move {
                let mut measured = Measured::default();
                loop {
                    let started = Instant::now();
                    let cycle = timeout_at(end.into(), means.cycle(zipf.draw(&mut dice))).await;
                    if Instant::now() > begin {
                        measured.count(cycle.ok(), started);
                    }
                    if Instant::now() >= end {
                        return measured;
                    }
                }
            });
        }
    }
    running.spawn(ask(pool.clone(), begin, end));
    let mut all = Measured::default();
    while let Some(measured) = running.join_next().await {
        all.add(measured?);
    }
    all.client_cpu = cpu_of(std::process::id())?;
    all.write();
    Ok(())
}

/// Begins cycles at random times, `rate` per second, as requests arrive. The wait of a cycle that begins late counts
/// from the time at which it was due.
async fn arrive(
    means: Means,
    zipf: Arc<Zipf>,
    mut dice: Dice,
    rate: u64,
    begin: Instant,
    end: Instant,
) -> Measured {
    let mut cycles = JoinSet::new();
    let mut due = Instant::now();
    while due < end {
        sleep_until(due.into()).await;
        let (key, means, arrived) = (zipf.draw(&mut dice), means.clone(), due);
        cycles.spawn(async move {
            let late = arrived.elapsed();
            let cycle = timeout_at(end.into(), means.cycle(key)).await.ok();
            (arrived > begin)
                .then(|| (cycle.map(|cycle| cycle.map(|waited| late + waited)), arrived))
        });
        #[expect(clippy::cast_precision_loss, reason = "there are few enough")]
        let pause = -(1.0 - dice.share()).ln() / rate as f64;
        due += Duration::from_secs_f64(pause);
    }
    let mut measured = Measured::default();
    while let Some(cycle) = cycles.join_next().await {
        if let Ok(Some((cycle, arrived))) = cycle {
            measured.count(cycle, arrived);
        }
    }
    measured
}

/// Measures queries that have nothing to do with locks.
async fn ask(pool: PgPool, begin: Instant, end: Instant) -> Measured {
    let mut measured = Measured::default();
    sleep_until(begin.into()).await;
    loop {
        let started = Instant::now();
        match timeout_at(end.into(), query("SELECT 1").execute(&pool)).await {
            Err(_) => {
                measured.queries.push(started.elapsed());
                return measured;
            }
            Ok(Ok(_)) => measured.queries.push(started.elapsed()),
            Ok(Err(_)) => measured.errors += 1,
        }
        sleep(QUERY_INTERVAL).await;
    }
}

#[expect(clippy::print_stderr, reason = "the first error says why there are more")]
fn report(error: &str) {
    eprintln!("{error}");
}

impl Measured {
    pub(crate) fn add(&mut self, other: Self) {
        self.waits.extend(other.waits);
        self.unfinished.extend(other.unfinished);
        self.queries.extend(other.queries);
        self.errors += other.errors;
        self.client_cpu += other.client_cpu;
        self.server_cpu += other.server_cpu;
        self.connections = self.connections.max(other.connections);
    }

    /// Counts a cycle that has ended, or has not ended in time.
    fn count(&mut self, cycle: Option<Result<Duration, BoxDynError>>, started: Instant) {
        match cycle {
            Some(Ok(waited)) => self.waits.push(waited),
            None => self.unfinished.push(started.elapsed()),
            Some(Err(error)) => {
                self.errors += 1;
                if self.errors == 1 {
                    report(&error.to_string());
                }
            }
        }
    }

    #[expect(clippy::cast_precision_loss, reason = "the counts are small enough")]
    pub(crate) fn cycles(&self) -> f64 {
        self.waits.len() as f64
    }

    /// Returns the quantile `q` of the waits, in milliseconds. A cycle that had not ended counts with the time that it
    /// had taken.
    pub(crate) fn wait(&self, q: f64) -> f64 {
        quantile(&[&self.waits[..], &self.unfinished[..]].concat(), q) / 1000.0
    }

    /// Returns the quantile `q` of the queries, in milliseconds.
    pub(crate) fn query(&self, q: f64) -> f64 {
        quantile(&self.queries, q) / 1000.0
    }

    #[expect(clippy::print_stdout, reason = "the parent reads it")]
    fn write(&self) {
        let micros = |times: &[Duration]| -> String {
            times.iter().map(|time| time.as_micros().to_string()).collect::<Vec<_>>().join(" ")
        };
        let Self { waits, unfinished, queries, errors, client_cpu, .. } = self;
        let times = [waits, unfinished, queries].map(|times| micros(times)).join("\n");
        println!("{times}\n{errors}\n{}", client_cpu.as_micros());
    }

    fn parse(written: &str) -> Result<Self, BoxDynError> {
        let lines: Vec<_> = written.lines().collect();
        let [waits, unfinished, queries, errors, cpu] = lines[..] else {
            return Err("not five lines".into());
        };
        let times = |micros: &str| -> Result<Vec<Duration>, BoxDynError> {
            let micros = micros.split_whitespace().map(str::parse);
            Ok(micros.map(|micros| micros.map(Duration::from_micros)).collect::<Result<_, _>>()?)
        };
        Ok(Self {
            waits: times(waits)?,
            unfinished: times(unfinished)?,
            queries: times(queries)?,
            errors: errors.parse()?,
            client_cpu: Duration::from_micros(cpu.parse()?),
            ..Self::default()
        })
    }
}

impl Dice {
    /// Returns a random number from zero to less than one.
    fn share(&mut self) -> f64 {
        const STEPS: u64 = 1 << 32;
        #[expect(clippy::cast_precision_loss, reason = "both have 32 bits")]
        let share = self.below(STEPS) as f64 / STEPS as f64;
        share
    }
}

/// Draws keys by Zipf's law: the n-th is drawn 1/n times as often as the first.
struct Zipf {
    /// For each key, how often it or a previous one is drawn.
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
        let drawn = self.sums.last().copied().unwrap_or_default() * dice.share();
        let place = self.sums.partition_point(|sum| *sum <= drawn);
        i64::try_from(place + 1).unwrap_or(i64::MAX)
    }
}
