//! A fencing token lets a store detect which holder came later.

use std::env;
use std::str::FromStr;

use pglock::{ExclusiveGuard, Lock, Result, Upgrade};
use pglock_testkit::{Role, Shutdown, TestDb, cues, say};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use tokio::time::timeout;

use super::new_lock;
use crate::support::{SOON, rounds, terminate};

const URL: &str = "PGLOCK_TOKENS_URL";

/// Acquires the lock and reports its token, releases it and reports the result, and so on.
#[tokio::test]
#[ignore = "is a role: another test runs it as a process"]
async fn holder() {
    // Without the URL of a database, no test runs this process as a role.
    let Ok(url) = env::var(URL) else { return };
    let options = PgConnectOptions::from_str(&url).unwrap();
    let pool = PgPoolOptions::new().max_connections(3).connect_lazy_with(options);
    let mut lock = new_lock(&pool, "turn");
    let mut cues = cues();
    while cues.next_line().await.unwrap().is_some() {
        let (guard, token) = loop {
            match take(&mut lock).await {
                Ok(taken) => break taken,
                // The server is restarted meanwhile.
                Err(error) => assert!(error.is_transient(), "{error:?}"),
            }
        };
        say(token);
        cues.next_line().await.unwrap();
        say(if guard.release().await.is_ok() { "released" } else { "lost" });
    }
}

async fn take(lock: &mut Lock) -> Result<(ExclusiveGuard, i64)> {
    let guard = lock.acquire().await?;
    let token = guard.fencing_token().await?;
    assert_eq!(guard.fencing_token().await?, token);
    Ok((guard, token))
}

#[tokio::test]
async fn tokens_grow_over_a_thousand_hand_offs_a_restart_and_crashes() {
    let (server, db) = TestDb::with_server().await;
    let (_, here) = module_path!().split_once("::").unwrap();
    let start = || Role::start(&format!("{here}::holder"), &[(URL, &db.url())]);
    let (mut holder, mut next) = (start(), start());
    let mut last: u64 = holder.ask("take").await.parse().unwrap();
    let turns = rounds(1000);
    let (quarter, half, last_quarter) = (turns / 4, turns / 2, turns - turns / 4);
    for turn in 1..=turns {
        next.tell("take").await;
        let ended = match turn {
            // The server is killed in two turns in a row, with nothing in between that would persist the drawn tokens, and
            // once later.
            _ if [quarter, quarter + 1, last_quarter].contains(&turn) => {
                server.kill();
                server.restart();
                "lost"
            }
            _ if turn == half => {
                server.stop(Shutdown::Fast);
                server.restart();
                "lost"
            }
            _ => "released",
        };
        let answer = holder.ask("release").await;
        // A server that terminates its sessions one by one may grant the lock once more in between.
        let granted_at_the_end =
            [quarter + 2, half + 1, last_quarter + 1].contains(&turn) && answer == "lost";
        assert!(answer == ended || granted_at_the_end, "turn {turn}: {answer}");
        let token = next.answer().await.parse().unwrap();
        assert!(token > last, "turn {turn}: {token} after {last}");
        last = token;
        std::mem::swap(&mut holder, &mut next);
    }
}

/// Otherwise a store would refuse the later write of the first guard.
#[tokio::test]
async fn guards_of_one_hold_have_one_token() {
    let (db, pool) = TestDb::with_pool(3).await;
    let mut lock = new_lock(&pool, 1);
    let outer = lock.acquire().await.unwrap();
    let first = outer.fencing_token().await.unwrap();
    let inner = lock.acquire().await.unwrap();
    assert_eq!(inner.fencing_token().await.unwrap(), first);
    drop(outer);
    assert_eq!(lock.acquire().await.unwrap().fencing_token().await.unwrap(), first);

    // Between a downgrade and an upgrade, another session may hold the lock.
    let shared = inner.downgrade().await.unwrap();
    let second = shared.fencing_token().await.unwrap();
    assert!(second > first, "{second}");
    let Upgrade::Upgraded(upgraded) = shared.try_upgrade().await.unwrap() else { panic!("alone") };
    let third = upgraded.fencing_token().await.unwrap();
    assert!(third > second, "{third}");

    // The next hold begins with the session's end, though a lost guard of the previous one is alive.
    terminate(&mut db.admin().await, upgraded.backend_pid()).await;
    timeout(SOON * 20, upgraded.lost()).await.unwrap();
    let again = lock.acquire().await.unwrap();
    assert!(again.fencing_token().await.unwrap() > third);
}
