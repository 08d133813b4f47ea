//! Measures waiters for one key whose timeouts fire together.

use std::time::{Duration, Instant};

use pglock::{Lock, LockManager};
use pglock_testkit::TestDb;
use sqlx::error::BoxDynError;
use tokio::task::JoinSet;
use tokio::time::sleep;

const BUSY: i64 = -1;

/// How late the last waiter returns, and how long acquiring another key takes at most meanwhile.
pub(crate) struct Timeouts {
    pub(crate) latest: Duration,
    pub(crate) other_key: Duration,
}

/// Makes `waiters` tasks wait, with the same deadline, for a key that another session holds.
pub(crate) async fn timeouts(db: &TestDb, waiters: u32) -> Result<Timeouts, BoxDynError> {
    let holder = db.pool(1).await;
    let _held = Lock::new(&holder, BUSY).acquire().await?;
    let manager = LockManager::new(&db.pool(3).await);
    // Long enough for all of them to enter the queue.
    let time = Duration::from_secs(3) + waiters * Duration::from_micros(50);
    let deadline = Instant::now() + time;

    let mut waiting = JoinSet::new();
    for _ in 0..waiters {
        let mut lock = Lock::new(&manager, BUSY);
        waiting.spawn(async move {
            let acquired = lock.try_acquire_until(deadline).await?;
            assert!(acquired.is_none(), "another session holds it");
            Ok::<_, pglock::Error>(deadline.elapsed())
        });
    }
    let mut other = Lock::new(&manager, 0);
    let mut others = JoinSet::new();
    others.spawn(async move {
        let mut longest = Duration::ZERO;
        sleep(time.saturating_sub(Duration::from_millis(500))).await;
        while deadline.elapsed() < Duration::from_secs(1) {
            let started = Instant::now();
            drop(other.acquire().await?);
            longest = longest.max(started.elapsed());
            sleep(Duration::from_millis(1)).await;
        }
        Ok::<_, pglock::Error>(longest)
    });
    let mut latest = Duration::ZERO;
    while let Some(heard) = waiting.join_next().await {
        latest = latest.max(heard??);
    }
    let mut other_key = Duration::ZERO;
    while let Some(longest) = others.join_next().await {
        other_key = longest??;
    }
    Ok(Timeouts { latest, other_key })
}
