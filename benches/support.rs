//! What the benches share: contestants who take turns, and a table of how they compare.

#![expect(clippy::print_stdout, reason = "a bench is there to print")]

use std::env;
use std::time::{Duration, Instant};

use sqlx::PgPool;
use sqlx::error::BoxDynError;
use tokio::runtime::Builder;

/// How many threads the runtime has.
const WORKERS: usize = 2;

/// Runs `bench` for about as long as it is told, the way that applications run: as a task.
///
/// That is 20 s under `cargo bench`, and one second with `PGLOCK_BENCH_QUICK=1`, under `cargo test`
/// and under `cargo bench -- --test`, where all that matters is that nothing fails.
pub(crate) fn run<F>(bench: impl FnOnce(Duration) -> F) -> Result<(), BoxDynError>
where
    F: Future<Output = Result<(), BoxDynError>> + Send + 'static,
{
    let has = |flag| env::args().any(|argument| argument == flag);
    if has("--list") {
        // A test runner asks for the names of tests. There are none.
        return Ok(());
    }
    let quick = env::var_os("PGLOCK_BENCH_QUICK").is_some_and(|value| value == "1");
    let quick = quick || has("--test") || !has("--bench");
    spawn(bench(Duration::from_secs(if quick { 1 } else { 20 })))
}

/// Runs `task` to its end, on a runtime of its own.
pub(crate) fn spawn<F>(task: F) -> Result<(), BoxDynError>
where
    F: Future<Output = Result<(), BoxDynError>> + Send + 'static,
{
    let runtime = Builder::new_multi_thread().worker_threads(WORKERS).enable_all().build()?;
    runtime.block_on(runtime.spawn(task))?
}

pub(crate) trait Contestant {
    /// Measures one operation, or the mean of a few.
    fn turn(&mut self) -> impl Future<Output = Result<Duration, BoxDynError>> + Send;
}

pub(crate) struct Contest<C> {
    name: &'static str,
    contestant: C,
    target: Option<Target>,
    samples: Vec<Duration>,
}

/// What is aimed at, in words, and whether a ratio and a time in microseconds meet it.
type Target = (&'static str, fn(ratio: f64, micros: f64) -> bool);

impl<C: Contestant> Contest<C> {
    pub(crate) fn new(name: &'static str, contestant: C) -> Self {
        Self { name, contestant, target: None, samples: Vec::new() }
    }

    pub(crate) fn target(mut self, words: &'static str, is_met: fn(f64, f64) -> bool) -> Self {
        self.target = Some((words, is_met));
        self
    }
}

/// Lets the contestants take turns for about as long as `time`, so that whatever disturbs the
/// machine disturbs them all. The first round, in which caches fill, does not count.
pub(crate) async fn compete<C: Contestant + Send>(
    contests: &mut [Contest<C>],
    time: Duration,
) -> Result<(), BoxDynError> {
    for contest in contests.iter_mut() {
        contest.contestant.turn().await?;
    }
    let started = Instant::now();
    while started.elapsed() < time {
        for contest in contests.iter_mut() {
            contest.samples.push(contest.contestant.turn().await?);
        }
    }
    Ok(())
}

/// Prints what was measured, and under which conditions.
pub(crate) async fn print_title(title: &str, pool: &PgPool) -> Result<(), BoxDynError> {
    let version: String = sqlx::query_scalar("SHOW server_version").fetch_one(pool).await?;
    println!("\n{title}");
    println!("PostgreSQL {version}; multi-thread runtime with {WORKERS} workers");
    Ok(())
}

/// Prints one figure of everybody's samples: the one that the fraction `q` of them does not exceed.
///
/// The first contestant's is 1.00. A missed target is told, and no failure: the machine may be busy.
pub(crate) fn print_table<C>(figure: &str, q: f64, contests: &[Contest<C>]) {
    let one = contests.first().map_or(f64::NAN, |first| quantile(&first.samples, q));
    println!("\n{figure:<44}{:>10}{:>12}   target", "ratio", "µs");
    for Contest { name, target, samples, .. } in contests {
        let micros = quantile(samples, q);
        let ratio = micros / one;
        let target = target.map_or_else(String::new, |(words, is_met)| {
            format!("   {words}: {}", if is_met(ratio, micros) { "met" } else { "missed" })
        });
        println!("{name:<44}{ratio:>10.2}{micros:>12.2}{target}");
    }
}

/// In microseconds.
fn quantile(samples: &[Duration], q: f64) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_unstable();
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_precision_loss,
        clippy::cast_sign_loss,
        reason = "a fraction of a length is a length"
    )]
    let index = (q * sorted.len().saturating_sub(1) as f64) as usize;
    sorted.get(index).map_or(f64::NAN, |sample| sample.as_secs_f64() * 1e6)
}
