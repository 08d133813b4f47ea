//! Compares ways to lock from many tasks: a manager, a connection for each lock, and the minimum that batching costs.
//! A full run also draws the results, as `benches/manager.svg`.

#![expect(clippy::print_stdout, reason = "a bench is there to print")]

#[path = "../support.rs"]
mod support;
#[path = "../table.rs"]
mod table;
#[path = "../usage.rs"]
#[expect(dead_code, reason = "a part of it is enough here")]
mod usage;

mod connections;
mod floor;
mod held;
mod picture;
mod tables;
mod throughput;
mod timeouts;
mod who;

use std::time::Duration;

use pglock_testkit::{Server, TestDb};
use sqlx::error::BoxDynError;

use connections::{HOLDERS, WAITERS, of_holders, of_waiters};
use picture::{Line, Panel};
use tables::{print_rates, print_targets, publish_connections, publish_ratios};
use throughput::{Keys, Turns, compare};
use who::Who;

fn main() -> Result<(), BoxDynError> {
    support::run(manager)
}

async fn manager(time: Duration) -> Result<(), BoxDynError> {
    let quick = time <= Duration::from_secs(1);
    let (held, many) = if quick { (800, 50) } else { (100_000, 1000) };
    let tasks: &[u32] = if quick { &[1, 50] } else { &[1, 10, 100, 1000, 5000, 20_000] };
    let waiters = if quick { 1000 } else { 30_000 };
    let locks: &[u32] = if quick { &[1, 10] } else { &[1, 10, 100, 300] };
    let (count, time) = if quick { (1, 100) } else { (5, 500) };
    let turns = Turns { count, time: Duration::from_millis(time) };

    let server = Server::options()
        .setting("max_connections", "100")
        .setting("max_locks_per_transaction", &(held / 80 + 64).to_string())
        .start();
    let db = TestDb::on(&server).await;
    support::print_title("manager: many tasks that lock", &db.pool(1).await).await?;

    // This part is first, because later the process would have spare memory that earlier parts have freed.
    let held::Held { bytes_each, connections } = held::held(&db, held).await?;
    println!(
        "\n{held} locks held at once: {bytes_each:.0} bytes each, connections in use: {connections}"
    );

    let timeouts = timeouts::timeouts(&db, waiters).await?;
    println!(
        "{waiters} waiters whose timeouts fire together: the last call returns {:.0?} later, target 1.5s; another key takes \
         at most {:.1?} meanwhile, target 50ms",
        timeouts.latest, timeouts.other_key
    );

    let mut distinct = Who::ALL.map(Line::new).to_vec();
    for &tasks in tasks {
        compare(&db, &mut distinct, tasks, Keys::Distinct, turns).await?;
    }
    print_rates("cycles per second, a key for each task; tasks:", &distinct)?;
    publish_ratios("manager", "the same, the first one = 1; tasks:", &distinct)?;

    // Bare batches can't wait.
    let waiting = Who::ALL.into_iter().filter(|who| *who != Who::Floor);
    let mut one: Vec<Line> = waiting.map(Line::new).collect();
    compare(&db, &mut one, many, Keys::One, turns).await?;
    print_rates("cycles per second, one key for all; tasks:", &one)?;
    publish_ratios(None, "the same, the first one = 1; tasks:", &one)?;
    if !quick {
        print_targets(many, &distinct, &one, bytes_each);
    }
    drop(db);
    drop(server);

    let server = Server::options().setting("max_connections", "400").start();
    let db = TestDb::on(&server).await;
    let (mut holders, mut waiters) = (Vec::new(), Vec::new());
    for who in HOLDERS {
        let mut line = Line::new(who);
        for &locks in locks {
            line.add(locks, of_holders(&db, who, locks).await?.into());
        }
        holders.push(line);
    }
    for who in WAITERS {
        let mut line = Line::new(who);
        for &tasks in locks {
            line.add(tasks, of_waiters(&db, who, tasks).await?.into());
        }
        waiters.push(line);
    }
    publish_connections("holders", "connections at the server; locks held:", &holders)?;
    publish_connections("waiters", "connections at the server; waiters for one key:", &waiters)?;

    if !quick {
        picture::draw(&[
            Panel::new("acquire and release, a key for each task", "tasks", "per second", distinct),
            Panel::new("holding", "locks held", "connections", holders),
            Panel::new("waiting for one key", "waiters", "connections", waiters),
        ])?;
    }
    Ok(())
}
