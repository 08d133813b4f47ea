//! Runs contestants in turns, and prints a table that compares them.

#![expect(clippy::print_stdout, reason = "a bench is there to print")]

#[path = "quantile.rs"]
mod quantile;

use std::time::{Duration, Instant};

use sqlx::error::BoxDynError;

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

/// Prints the quantile `q` of each contestant's samples, and its ratio to that of the first contestant.
///
/// A missed target is reported, but is not a failure, because the machine may be busy.
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
