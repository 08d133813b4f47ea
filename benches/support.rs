//! Runs benchmarks, and prints their titles. All benches share this file.

#![expect(clippy::print_stdout, reason = "a bench is there to print")]

use std::env;
use std::fs;
use std::thread;
use std::time::Duration;

use sqlx::PgPool;
use sqlx::error::BoxDynError;
use tokio::runtime::Builder;

use crate::table;

/// How many threads the runtime has.
const WORKERS: usize = 2;

/// Runs `bench` as a task, as applications run, for about the time that it is given.
///
/// That time is 20 s under `cargo bench`, and one second with `PGLOCK_BENCH_QUICK=1`, under `cargo test`
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
    if quick && table::is_for_guide() {
        return Err("a quick run has no figures for the guide".into());
    }
    spawn(bench(Duration::from_secs(if quick { 1 } else { 20 })))
}

/// Runs `task` to its end, on a runtime of its own.
pub(crate) fn spawn<F>(task: F) -> Result<(), BoxDynError>
where
    F: Future<Output = Result<(), BoxDynError>> + Send + 'static,
{
    #[cfg(feature = "metrics")]
    record_metrics()?;
    let runtime = Builder::new_multi_thread().worker_threads(WORKERS).enable_all().build()?;
    runtime.block_on(runtime.spawn(task))?
}

/// Records the metrics of the feature as an application does, so that two runs show what they cost.
#[cfg(feature = "metrics")]
fn record_metrics() -> Result<(), BoxDynError> {
    let recorder = metrics_exporter_prometheus::PrometheusBuilder::new();
    recorder.set_buckets(&[0.001, 0.01, 0.1, 1.0, 10.0])?.install_recorder()?;
    pglock::metrics::enable();
    Ok(())
}

/// Prints the title of a benchmark, and the conditions under which it ran, which are also written into the guide.
pub(crate) async fn print_title(title: &str, pool: &PgPool) -> Result<(), BoxDynError> {
    let version: String = sqlx::query_scalar("SHOW server_version").fetch_one(pool).await?;
    println!("\n{title}");
    println!("PostgreSQL {version}; multi-thread runtime with {WORKERS} workers");
    let processor = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let processor = processor.lines().find_map(|line| line.strip_prefix("model name"));
    let processor = processor.and_then(|name| name.split_once(": ")).map_or("", |(_, name)| name);
    let system = format!("{} {}", env::consts::OS, env::consts::ARCH);
    let cores = thread::available_parallelism()?;
    let pglock = env!("CARGO_PKG_VERSION");
    let machine = format!(
        "pglock {pglock}, PostgreSQL {version}, {system},\n\
         {cores} cores for the server and its clients: {processor}\n"
    );
    table::write("machine", &machine)
}
