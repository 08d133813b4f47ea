//! The tests of every kind of lock, and of the types that are made of locks, once more in the [`ENVIRONMENTS`] of the
//! testkit.

use std::env;
use std::fs::{self, File};
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pglock_testkit::{ENVIRONMENTS, Environment, VARIABLE};
use tokio::process::Command;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::support::report;

/// The variable that selects environments: `all`, or names with commas. They run all tests; without
/// the variable all environments run [`FEW`].
const SELECTION: &str = "PGLOCK_TEST_ENVIRONMENTS";
/// The tests that run in an environment, with those that its row names.
const ALL: &[&str] = &["own_session::", "managed::"];
/// Those of them that each `cargo test` runs, of acquiring, waiting and releasing.
const FEW: &[&str] = &[
    "::both::clean::",
    "::both::go_pglock::acquire_waits_for_the_release",
    "::both::go_pglock::exclusive_blocks_shared",
    "::both::go_pglock::stacking_needs_as_many_releases",
];
/// How long the tests of an environment may take, of which the slowest takes two minutes.
const LIMIT: Duration = Duration::from_mins(10);
/// How many environments run at a time: most tests wait for a time that must pass, or for a disk.
const AT_A_TIME: usize = 2;

/// Runs each environment in a process of its own, [`AT_A_TIME`].
#[tokio::test]
async fn every_kind_of_lock_behaves_the_same_everywhere() {
    let selection = env::var(SELECTION).unwrap_or_default();
    let is_brief = selection.is_empty();
    let rows: Vec<&Environment> = match selection.as_str() {
        "" | "all" => ENVIRONMENTS.iter().collect(),
        names => names.split(',').map(|name| Environment::named(name).unwrap()).collect(),
    };
    let turns = Arc::new(Semaphore::new(AT_A_TIME));
    let mut runs = JoinSet::new();
    for row in rows.into_iter().filter(|row| row.is_available()) {
        let turns = Arc::clone(&turns);
        let filters = if is_brief { FEW.to_vec() } else { [ALL, row.types].concat() };
        runs.spawn(async move {
            let _turn = turns.acquire_owned().await.unwrap();
            let started = Instant::now();
            let outcome = run(row, &filters).await;
            (row.name, outcome, started.elapsed().as_secs())
        });
    }
    let mut failures = Vec::new();
    while let Some(ended) = runs.join_next().await {
        let (name, outcome, took) = ended.unwrap();
        match outcome {
            Ok(passed) => report(format!("{name}: {passed} passed in {took} s")),
            Err(printed) => {
                report(format!("{name} failed after {took} s:\n{printed}"));
                failures.push(name);
            }
        }
    }
    assert!(failures.is_empty(), "failed in {failures:?}");
}

/// A test that is renamed must not take its exception along unnoticed.
#[tokio::test]
async fn every_exception_is_of_a_test_that_exists() {
    let mut list = Command::new(env::current_exe().unwrap());
    let list = list.arg("--list").output().await.unwrap();
    let list = String::from_utf8(list.stdout).unwrap();
    for row in ENVIRONMENTS {
        for test in row.types.iter().chain(row.except.iter().map(|(test, _)| test)) {
            assert!(list.contains(test), "{}: there is no test {test}", row.name);
        }
    }
}

/// Runs the tests in an environment. Returns how many passed, or what was printed of failures.
async fn run(row: &Environment, filters: &[&str]) -> Result<usize, String> {
    let path = Output::new(row.name);
    let output = File::create(&path.0).unwrap();
    let mut command = Command::new(env::current_exe().unwrap());
    command.args(filters).arg(format!("--test-threads={}", row.threads));
    for (test, _) in row.except {
        command.args(["--skip", test]);
    }
    command.env(VARIABLE, row.name).env("PROPTEST_CASES", row.rounds(64).to_string());
    command.env("RUST_BACKTRACE", "0");
    command.stdin(Stdio::null()).stdout(output.try_clone().unwrap()).stderr(output);
    let mut process = command.kill_on_drop(true).spawn().unwrap();
    let ended = timeout(LIMIT, process.wait()).await.map(Result::unwrap);
    drop(process);

    let printed = String::from_utf8_lossy(&fs::read(&path.0).unwrap()).into_owned();
    match ended {
        Ok(status) if status.success() => match passed(&printed) {
            0 => Err(format!("no test was run:\n{printed}")),
            passed => Ok(passed),
        },
        Ok(_) => Err(failures(&printed).to_owned()),
        Err(_) => Err(format!("{printed}\nnot finished within {LIMIT:?}")),
    }
}

/// What the test runner says of the tests that failed, without the lines of those that passed; or all of it, if a
/// process ended before that.
fn failures(printed: &str) -> &str {
    printed.find("\nfailures:\n").map_or(printed, |begin| &printed[begin..])
}

/// How many tests passed, according to the last line of the test runner.
fn passed(printed: &str) -> usize {
    let summary = printed.lines().rfind(|line| line.starts_with("test result:"));
    let words = summary.and_then(|line| line.split_once(" passed")).map(|(before, _)| before);
    words.and_then(|before| before.rsplit(' ').next()?.parse().ok()).unwrap_or_default()
}

/// A file for what a process prints, which may be more than a pipe takes.
///
/// # Drop
///
/// Removes the file.
struct Output(PathBuf);

impl Output {
    fn new(name: &str) -> Self {
        let name = format!("pglock-{}-{name}.log", std::process::id());
        Self(env::temp_dir().join(name))
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        drop(fs::remove_file(&self.0));
    }
}
