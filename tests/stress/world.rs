//! The state that all tasks share: the database, the table of holders, the budget, and the failures.

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::fmt::Write as _;
use std::io::{ErrorKind, Write as _, stdout};
use std::iter;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pglock::{Error, LockManager, LockOptions, Loss};
use pglock_testkit::{Environment, TestDb, VARIABLE};
use sqlx::{PgConnection, PgPool};

use crate::calls::Calls;
use crate::table::Table;

/// The keys are the numbers below this.
pub(crate) const KEYS: u64 = 4;
/// The number of failures after which a run ends early.
const ENOUGH: usize = 20;

/// Whether faults strike.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Weather {
    /// No fault: then no session is lost, and no statement is cancelled.
    Calm,
    /// Backends are killed, and statements are cancelled on the server.
    Stormy,
}

/// The shared state.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) pool: PgPool,
    pub(crate) options: LockOptions,
    pub(crate) table: Table,
    pub(crate) calls: Calls,
    /// The connection for faults. It is not of the pool, and no fault strikes its own backend.
    pub(crate) admin: tokio::sync::Mutex<PgConnection>,
    manager: LockManager,
    weather: Weather,
    seed: u64,
    started: Instant,
    without: BTreeSet<String>,
    left: AtomicU64,
    tally: Mutex<BTreeMap<String, u64>>,
    failures: Mutex<Vec<String>>,
}

impl World {
    pub(crate) async fn new(
        db: &TestDb,
        pool: &PgPool,
        weather: Weather,
        seed: u64,
        operations: u64,
    ) -> Arc<Self> {
        // The slices and the heartbeat interval are short, so that a run has many of both.
        let options = LockOptions::new()
            .wait_slice(Duration::from_secs(2))
            .heartbeat_interval(Duration::from_millis(250))
            // The timeout is long, so that no session is lost because a slow machine does not answer in time.
            .heartbeat_timeout(Duration::from_secs(10))
            .keepalives_retries(12);
        let without = env::var("PGLOCK_STRESS_WITHOUT").unwrap_or_default();
        Arc::new(Self {
            pool: pool.clone(),
            manager: LockManager::new(&options.on(pool).unwrap()),
            options,
            table: Table::default(),
            calls: Calls::start(format!("{weather:?}, {}", repeat(seed))),
            admin: tokio::sync::Mutex::new(db.admin().await),
            weather,
            seed,
            started: Instant::now(),
            without: without.split_whitespace().map(str::to_owned).collect(),
            left: AtomicU64::new(operations),
            tally: Mutex::default(),
            failures: Mutex::default(),
        })
    }

    pub(crate) fn manager(&self) -> &LockManager {
        &self.manager
    }

    pub(crate) fn is_stormy(&self) -> bool {
        self.weather == Weather::Stormy
    }

    /// Returns whether the verb takes part in this run.
    pub(crate) fn has(&self, verb: &str) -> bool {
        !self.without.contains(verb)
    }

    /// Returns whether the run goes on.
    pub(crate) fn goes_on(&self) -> bool {
        self.left.load(Ordering::Relaxed) > 0
    }

    /// Takes one operation from the budget.
    pub(crate) fn spend(&self, verb: &str) {
        // Tasks that are in the middle of a hold spend a few more operations than the budget has.
        let spent = |left: u64| left.checked_sub(1);
        self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, spent).unwrap_or_default();
        self.count(verb.to_owned());
    }

    pub(crate) fn count(&self, what: String) {
        *locked(&self.tally).entry(what).or_default() += 1;
    }

    pub(crate) fn fail(&self, failure: impl std::fmt::Display) {
        let mut failures = locked(&self.failures);
        failures.push(format!("{:.3} s: {failure}", self.started.elapsed().as_secs_f64()));
        if failures.len() >= ENOUGH {
            self.left.store(0, Ordering::Relaxed);
        }
    }

    /// Counts an error of a verb, and fails if its kind is unexpected.
    ///
    /// `backend` is the session of the guard that the verb was called on.
    #[expect(clippy::wildcard_enum_match_arm, reason = "all other variants are unexpected")]
    pub(crate) fn check_error(&self, verb: &str, error: &Error, backend: Option<i32>) {
        self.count(format!("{verb}: error {}", kind(error)));
        // The session of an acquire is not known, so any fault may have struck it.
        let struck = backend.map_or_else(|| self.is_stormy(), |pid| self.table.is_struck(pid));
        let expected = match error {
            // Sometimes two sessions wait for each other, because each has other keys besides the one that it acquires.
            Error::Deadlock { .. } => backend.is_none(),
            // A busy server may not answer in the half second that a call has beyond its timeout.
            Error::Disconnected { source, .. } if verb.ends_with("_for") && is_late(source) => true,
            Error::Cancelled { .. }
            | Error::Disconnected { .. }
            | Error::Lost { reason: Loss::Disconnected(_) | Loss::NotHeld, .. } => struck,
            Error::Database { source, .. } => {
                // This is the answer to a cancelled statement that is not an acquire.
                struck && backend.is_some() && code(source).as_deref() == Some("57014")
            }
            // A short timeout may be over before a connection is opened.
            Error::PoolTimedOut { .. } => verb.ends_with("_for"),
            Error::Connect { source, .. } if matches!(**source, sqlx::Error::PoolTimedOut) => {
                verb.ends_with("_for")
            }
            _ => false,
        };
        if !expected {
            let causes = iter::successors(std::error::Error::source(error), |cause| cause.source());
            let mut failure = format!("{verb} of backend {backend:?}: {error}");
            causes.for_each(|cause| write!(failure, ": {cause}").unwrap());
            self.fail(failure);
        }
    }

    /// Counts an error of the application's statement on a borrowed connection, and fails if no fault struck the
    /// backend.
    pub(crate) fn check_statement(&self, verb: &str, error: &sqlx::Error, backend: i32) {
        self.count(format!("{verb}: statement failed"));
        if !self.table.is_struck(backend) {
            self.fail(format!("{verb} of backend {backend}: {error}"));
        }
    }

    /// Prints what the run has done, also if it succeeds.
    #[expect(
        clippy::explicit_write,
        reason = "the test runner keeps what `println!` prints to itself"
    )]
    pub(crate) fn summarize(&self) {
        let (weather, seconds) = (self.weather, self.started.elapsed().as_secs_f64());
        let mut lines = format!("\n{weather:?} for {seconds:.1} s; {}", repeat(self.seed));
        for (what, count) in locked(&self.tally).iter() {
            write!(lines, "\n{count:>8}  {what}").unwrap();
        }
        writeln!(stdout(), "{lines}").unwrap();
    }

    pub(crate) fn assert_no_failure(&self) {
        let failures = locked(&self.failures);
        assert!(
            failures.is_empty(),
            "{} failures with {}:\n{}",
            failures.len(),
            repeat(self.seed),
            failures.join("\n"),
        );
    }
}

/// The variables that repeat a run.
fn repeat(seed: u64) -> String {
    format!("PGLOCK_STRESS_SEED={seed} {VARIABLE}={}", Environment::current().name)
}

/// Locks a mutex whose other users may have panicked.
pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn code(error: &sqlx::Error) -> Option<String> {
    error.as_database_error()?.code().map(std::borrow::Cow::into_owned)
}

/// Returns the name of the variant, and that of the reason of a loss.
#[expect(clippy::wildcard_enum_match_arm, reason = "only a loss has a reason")]
fn kind(error: &Error) -> String {
    let text = format!("{error:?}");
    let name = |text: &str| text.split([' ', '(', '{']).next().unwrap_or_default().to_owned();
    match error {
        Error::Lost { reason, .. } => format!("Lost, {}", name(&format!("{reason:?}"))),
        _ => name(&text),
    }
}

/// Whether the server did not answer in time.
fn is_late(error: &sqlx::Error) -> bool {
    matches!(error, sqlx::Error::Io(source) if source.kind() == ErrorKind::TimedOut)
}
