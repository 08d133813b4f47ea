//! Allow only so many at once: a pool of N slots, shared by all machines.
//!
//! You want this when something bears a few users but not all of them: three licences, five requests
//! at a time to somebody else's service.

#![expect(clippy::print_stdout, reason = "an example tells what it does")]

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use pglock::{ExclusiveGuard, Lock};
use pglock_testkit::TestDb;
use sqlx::PgPool;
use tokio::sync::Barrier;
use tokio::task::JoinSet;
use tokio::time::sleep;

/// The first half of the keys: which pool of slots. The second half is the slot.
const LICENCES: i32 = 7;
const SLOTS: i32 = 3;
const MACHINES: usize = 5;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let db = TestDb::new().await;
    let all_have_asked = Arc::new(Barrier::new(MACHINES));

    let mut machines = JoinSet::new();
    for number in 1..=MACHINES {
        machines.spawn(machine(number, db.pool(2).await, Arc::clone(&all_have_asked)));
    }
    let mut granted = Vec::new();
    while let Some(slot) = machines.join_next().await {
        granted.extend(slot??);
    }

    // As many as there are slots, and each of them once.
    granted.sort_unstable();
    assert_eq!(granted, (1..=SLOTS).collect::<Vec<_>>());
    println!("{SLOTS} of {MACHINES} had a licence");

    let again = any_slot(&db.pool(2).await).await?;
    assert!(again.is_some());
    println!("and they have all been given back");
    Ok(())
}

/// Works with a licence, if one can be had. Returns its number.
async fn machine(number: usize, pool: PgPool, asked: Arc<Barrier>) -> pglock::Result<Option<i32>> {
    let licence = any_slot(&pool).await?;
    // Only so that the example always ends in the same way: nobody gives back before all have asked.
    asked.wait().await;
    let Some((slot, guard)) = licence else {
        println!("machine {number}: no licence is free");
        return Ok(None);
    };
    println!("machine {number}: works with licence {slot}");
    sleep(Duration::from_millis(200)).await;
    guard.release().await?;
    Ok(Some(slot))
}

/// Tries one slot after the other. The guard of the first that is free keeps it.
async fn any_slot(pool: &PgPool) -> pglock::Result<Option<(i32, ExclusiveGuard)>> {
    for slot in 1..=SLOTS {
        let mut lock = Lock::new(pool, (LICENCES, slot));
        let Some(guard) = lock.try_acquire().await? else { continue };
        return Ok(Some((slot, guard)));
    }
    Ok(None)
}
