//! Many tasks that lock: a manager beside a connection for each lock, and beside the least that batching
//! costs. A full run also draws what it measured, as `benches/manager.svg`.

#![expect(clippy::print_stdout, reason = "a bench is there to print")]

#[path = "../support.rs"]
mod support;

mod connections;
mod floor;
mod held;
mod picture;
mod tables;
mod throughput;
mod who;

use std::time::Duration;

use pglock_testkit::{Server, TestDb};
use sqlx::error::BoxDynError;

use connections::{HOLDERS, WAITERS, of_holders, of_waiters};
use picture::{Line, Panel};
use tables::{print_ratios, print_table, print_targets};
use throughput::{Keys, cycles};
use who::Who;

fn main() -> Result<(), BoxDynError> {
    support::run(manager)
}

async fn manager(time: Duration) -> Result<(), BoxDynError> {
    let quick = time <= Duration::from_secs(1);
    let (held, many, turn) = if quick { (800, 50, 100) } else { (100_000, 1000, 2000) };
    let tasks: &[u32] = if quick { &[1, 50] } else { &[1, 10, 100, 1000, 5000] };
    let locks: &[u32] = if quick { &[1, 10] } else { &[1, 10, 100, 300] };
    let turn = Duration::from_millis(turn);

    let server = Server::options()
        .setting("max_connections", "100")
        .setting("max_locks_per_transaction", &(held / 80 + 64).to_string())
        .start();
    let db = TestDb::on(&server).await;
    support::print_title("manager: many tasks that lock", &db.pool(1).await).await?;

    // First, while the process has no memory to spare that earlier parts have freed.
    let held::Held { bytes_each, connections } = held::held(&db, held).await?;
    println!(
        "\n{held} locks held at once: {bytes_each:.0} bytes each, connections in use: {connections}"
    );

    let mut distinct = Vec::new();
    for who in Who::ALL {
        let mut line = Line::new(who);
        for &tasks in tasks {
            line.add(tasks, cycles(&db, who, tasks, Keys::Distinct, turn).await?);
        }
        distinct.push(line);
    }
    print_table("cycles per second, a key for each task; tasks:", &distinct);
    print_ratios("the same, the first one = 1; tasks:", &distinct);

    let mut one = Vec::new();
    for who in Who::ALL {
        // Bare batches can't wait.
        if who != Who::Floor {
            let mut line = Line::new(who);
            line.add(many, cycles(&db, who, many, Keys::One, turn).await?);
            one.push(line);
        }
    }
    print_table("cycles per second, one key for all; tasks:", &one);
    print_ratios("the same, the first one = 1; tasks:", &one);
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
    print_table("connections at the server; locks held:", &holders);
    print_table("connections at the server; waiters for one key:", &waiters);

    if !quick {
        picture::draw(&[
            Panel::new("acquire and release, a key for each task", "tasks", "per second", distinct),
            Panel::new("holding", "locks held", "connections", holders),
            Panel::new("waiting for one key", "waiters", "connections", waiters),
        ])?;
    }
    Ok(())
}
