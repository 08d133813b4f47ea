//! Calls that are bounded, and sometimes interrupted; and a watchdog that reports the calls that hang.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{Write as _, stderr};
use std::process;
use std::sync::{Arc, Mutex, Weak};
use std::thread;
use std::time::{Duration, Instant};

use pglock_testkit::{Environment, cancel_after};
use tokio::time::timeout;

use crate::dice::Dice;
use crate::world::locked;

/// How much longer than its limit a call may take before the watchdog ends the run. Then not even the call's own timer
/// has woken the call.
const STUCK: Duration = Duration::from_secs(20);

/// The point at which a call is interrupted, which drops its future.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Interruption {
    After(Duration),
    AfterPolls(usize),
    Never,
}

impl Interruption {
    /// Chooses an interruption at random. One call in three is interrupted.
    pub(crate) fn any(dice: &mut Dice) -> Self {
        match dice.below(6) {
            0 => Self::AfterPolls(1 + dice.place(6)),
            1 => Self::After(Duration::from_micros(dice.below(20_000))),
            _ => Self::Never,
        }
    }
}

/// How a call ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Ended<T> {
    Interrupted,
    Returned(T),
    TooLate,
}

/// The calls that are in flight.
#[derive(Debug, Default)]
pub(crate) struct Calls {
    in_flight: Arc<InFlight>,
}

type InFlight = Mutex<(u64, BTreeMap<u64, Call>)>;

#[derive(Debug)]
struct Call {
    verb: &'static str,
    started: Instant,
    limit: Duration,
}

/// Removes a call from the list when it is dropped, however the call ends.
struct Listed<'a> {
    in_flight: &'a InFlight,
    id: u64,
}

impl Drop for Listed<'_> {
    fn drop(&mut self) {
        locked(self.in_flight).1.remove(&self.id);
    }
}

impl Calls {
    /// Starts the watchdog, which ends when the returned value is dropped.
    pub(crate) fn start(run: String) -> Self {
        let calls = Self::default();
        let in_flight = Arc::downgrade(&calls.in_flight);
        thread::spawn(move || watch(&run, &in_flight));
        calls
    }

    /// Makes a call that must end within its limit, as adapted to the environment, unless it is interrupted before.
    pub(crate) async fn make<F: Future>(
        &self,
        verb: &'static str,
        limit: Duration,
        interruption: Interruption,
        call: F,
    ) -> Ended<F::Output> {
        let limit = Environment::current().limit(limit);
        let listed = self.list(verb, limit);
        let bounded = timeout(limit, async {
            match interruption {
                Interruption::After(time) => timeout(time, call).await.ok(),
                Interruption::AfterPolls(polls) => cancel_after(polls, call).await,
                Interruption::Never => Some(call.await),
            }
        });
        let ended = match bounded.await {
            Ok(Some(output)) => Ended::Returned(output),
            Ok(None) => Ended::Interrupted,
            Err(_) => Ended::TooLate,
        };
        drop(listed);
        ended
    }

    /// The calls in flight, with their age, the oldest first.
    pub(crate) fn describe(&self) -> String {
        describe(&self.in_flight)
    }

    fn list(&self, verb: &'static str, limit: Duration) -> Listed<'_> {
        let mut in_flight = locked(&self.in_flight);
        in_flight.0 += 1;
        let id = in_flight.0;
        in_flight.1.insert(id, Call { verb, started: Instant::now(), limit });
        drop(in_flight);
        Listed { in_flight: &self.in_flight, id }
    }
}

fn describe(in_flight: &InFlight) -> String {
    let mut text = String::new();
    for Call { verb, started, limit } in locked(in_flight).1.values() {
        write!(text, "{verb} for {:?} (limit {limit:?}); ", started.elapsed()).unwrap();
    }
    text
}

/// Ends the process when a call is far beyond its limit, because no runtime is left that could do so.
fn watch(run: &str, in_flight: &Weak<InFlight>) {
    while let Some(in_flight) = in_flight.upgrade() {
        let is_stuck = |call: &Call| call.started.elapsed() > call.limit + STUCK;
        if locked(&in_flight).1.values().any(is_stuck) {
            // The test runner captures the output of `eprintln!`, and could not show it before the exit.
            drop(writeln!(stderr(), "{run}: a call hangs: {}", describe(&in_flight)));
            process::exit(101);
        }
        drop(in_flight);
        thread::sleep(Duration::from_millis(500));
    }
}
