//! Measures how many cycles tasks complete per second.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pglock_testkit::TestDb;
use sqlx::error::BoxDynError;
use tokio::task::{JoinSet, consume_budget};
use tokio::time::sleep;

use crate::picture::Line;
use crate::who::{Means, Who};

/// The number of connections of the other ways; a manager has two.
const POOL: u32 = 10;

/// The keys that the tasks lock.
#[derive(Clone, Copy, Eq, PartialEq)]
pub(crate) enum Keys {
    /// Each task locks a key of its own.
    Distinct,
    /// All tasks lock the same key.
    One,
}

/// How often, and for how long, each way to lock has its turn.
#[derive(Clone, Copy)]
pub(crate) struct Turns {
    pub(crate) count: usize,
    pub(crate) time: Duration,
}

/// Runs `tasks` tasks in each of these ways to lock, and adds to each line how many cycles they completed per
/// second, the median of several turns. The ways take turns, so that other load on the machine affects all of them.
pub(crate) async fn compare(
    db: &TestDb,
    lines: &mut [Line],
    tasks: u32,
    keys: Keys,
    turns: Turns,
) -> Result<(), BoxDynError> {
    let mut measured = vec![Vec::new(); lines.len()];
    for _ in 0..turns.count {
        for (line, measured) in lines.iter().zip(&mut measured) {
            measured.push(cycles(db, line.who, tasks, keys, turns.time).await?);
        }
    }
    for (line, measured) in lines.iter_mut().zip(&mut measured) {
        measured.sort_by(f64::total_cmp);
        line.add(tasks, measured.get(turns.count / 2).copied().unwrap_or_default());
    }
    Ok(())
}

/// Runs tasks for the given time, and returns how many cycles they completed per second.
async fn cycles(
    db: &TestDb,
    who: Who,
    tasks: u32,
    keys: Keys,
    time: Duration,
) -> Result<f64, BoxDynError> {
    let connections = if who.is_manager() { 2 } else { POOL };
    let means = Means::new(who, db.options(), connections)?;
    let stop = Arc::new(AtomicBool::new(false));
    let count = Arc::new(AtomicU64::new(0));
    let mut working = JoinSet::new();
    for task in 0..tasks {
        let mut task = means.task(if keys == Keys::One { 0 } else { i64::from(task) });
        let (stop, count) = (Arc::clone(&stop), Arc::clone(&count));
        working.spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                task.cycle().await?;
                count.fetch_add(1, Ordering::Relaxed);
                consume_budget().await;
            }
            Ok::<_, BoxDynError>(())
        });
    }
    // Gives all tasks time to connect.
    sleep(time / 4).await;
    let (before, started) = (count.load(Ordering::Relaxed), Instant::now());
    sleep(time).await;
    let (after, took) = (count.load(Ordering::Relaxed), started.elapsed());
    stop.store(true, Ordering::Relaxed);
    while let Some(done) = working.join_next().await {
        done??;
    }
    means.close().await;
    #[expect(clippy::cast_precision_loss, reason = "there are few enough")]
    Ok((after - before) as f64 / took.as_secs_f64())
}
