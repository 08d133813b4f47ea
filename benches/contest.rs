//! Runs contestants in turns, and publishes a table that compares them.

#![expect(clippy::print_stdout, reason = "a bench is there to print")]

#[path = "quantile.rs"]
mod quantile;

use std::time::{Duration, Instant};

use sqlx::error::BoxDynError;

use crate::table::Table;
use quantile::quantile;

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

/// A target in words, and a function that returns whether a ratio and a time in microseconds meet it.
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

/// Runs the contestants in turns for about as long as `time`, so that a disturbance of the machine affects all of
/// them. The first round, in which caches fill, does not count.
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

/// Publishes the quantile `q` of each contestant's samples, and its ratio to that of the first contestant. `table` is the
/// name of the table in the guide, if it is there.
///
/// A missed target is printed, but is not a failure, because the machine may be busy.
pub(crate) fn publish<C>(
    table: impl Into<Option<&'static str>>,
    title: &str,
    q: f64,
    contests: &[Contest<C>],
) -> Result<(), BoxDynError> {
    let one = contests.first().map_or(f64::NAN, |first| quantile(&first.samples, q));
    let mut table = Table::new(table, title, ["relative", "µs"]);
    let mut verdicts = Vec::new();
    for Contest { name, target, samples, .. } in contests {
        let micros = quantile(samples, q);
        let ratio = micros / one;
        table.row(*name, [format!("{ratio:.2}"), format!("{micros:.2}")]);
        if let Some((words, is_met)) = target {
            let verdict = if is_met(ratio, micros) { "met" } else { "missed" };
            verdicts.push(format!("{name} {words}: {verdict}"));
        }
    }
    table.publish()?;
    for verdict in verdicts {
        println!("{verdict}");
    }
    Ok(())
}
