//! Contestants who take turns, and a table of how they compare.

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

/// Prints one figure of each contestant's samples: the one that the fraction `q` of them does not exceed.
///
/// The first contestant's is 1.00. A missed target is reported, but is no failure: the machine may be busy.
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
