//! `pglock elect`: who leads, for how long, and what comes next.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use pglock::Election;
use pglock_testkit::{Shutdown, TestDb};

use crate::support::{Running, is_gone, locks_are, pglock, run, terminate_holder};

/// Says `led`, and ends by a signal.
const LEAD: [&str; 5] = ["key", "--", "sh", "-c", "echo led; exec sleep 1000"];

#[tokio::test]
async fn the_next_candidate_leads_when_the_leader_is_killed() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let args = ["elect", "key", "--", "sh", "-c", "echo $$; exec sleep 1000"];
    let mut leader = Running::start(pglock(&db, &args));
    let pid = leader.line().await.parse().unwrap();
    let mut next = Running::start(pglock(&db, &args));
    locks_are(&mut admin, 1, 1).await;
    leader.send(Signal::SIGKILL);
    next.line().await;
    if cfg!(target_os = "linux") {
        is_gone(pid).await;
    }
}

#[tokio::test]
async fn others_see_the_name() {
    let (db, pool) = TestDb::with_pool(1).await;
    let args = [&["elect", "--name", "node-7"][..], &LEAD].concat();
    let mut leader = Running::start(pglock(&db, &args));
    leader.says("led").await;
    let seen = Election::new(&pool, "key").leader().await.unwrap().unwrap();
    assert_eq!(seen.name, "node-7");
}

#[tokio::test]
async fn a_signal_ends_the_command_and_then_the_post() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let script = "trap 'echo told' TERM; echo led; while :; do read line && exit \"$line\"; done";
    for code in [0, 5] {
        let args = ["elect", "key", "--", "sh", "-c", script];
        let mut leader = Running::start(pglock(&db, &args));
        leader.says("led").await;
        leader.send(Signal::SIGTERM);
        leader.says("told").await;
        locks_are(&mut admin, 1, 0).await;
        leader.tell(&code.to_string()).await;
        assert_eq!(leader.finish().await.code(), Some(code));
        locks_are(&mut admin, 0, 0).await;
    }
}

/// A service manager shall see that all went as it was asked to.
#[tokio::test]
async fn a_graceful_stop_is_no_failure() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let args = [&["elect"][..], &LEAD].concat();
    let mut leader = Running::start(pglock(&db, &args));
    leader.says("led").await;
    let mut next = Running::start(pglock(&db, &args));
    locks_are(&mut admin, 1, 1).await;
    // For a command that there is not yet.
    next.send(Signal::SIGUSR1);
    leader.send(Signal::SIGTERM);
    assert_eq!(leader.finish().await.code(), Some(0));
    next.says("led").await;

    let waiting = Running::start(pglock(&db, &args));
    locks_are(&mut admin, 1, 1).await;
    waiting.send(Signal::SIGTERM);
    assert_eq!(waiting.finish().await.code(), Some(0));
    locks_are(&mut admin, 1, 0).await;

    next.send(Signal::SIGHUP);
    assert_eq!(next.finish().await.code(), Some(0));
    locks_are(&mut admin, 0, 0).await;
}

#[tokio::test]
async fn after_a_loss_the_command_has_ended_before_it_is_elected_again() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let script = "trap 'echo told; exit 0' TERM; echo $PGLOCK_TOKEN; while :; do read line; done";
    let mut leader = Running::start(pglock(&db, &["elect", "key", "--", "sh", "-c", script]));
    let first: u64 = leader.line().await.parse().unwrap();
    terminate_holder(&mut admin).await;
    leader.says("told").await;
    let second: u64 = leader.line().await.parse().unwrap();
    assert!(second > first);
}

#[tokio::test]
async fn a_command_that_ends_gives_others_a_turn() {
    let db = TestDb::new().await;
    let script = ["key", "--", "sh", "-c", "echo led; exit 9"];
    let started = Instant::now();
    let mut candidate = Running::start(pglock(&db, &[&["elect"][..], &script].concat()));
    for _ in 0..3 {
        candidate.says("led").await;
    }
    // A pause of one second at least, and one of two.
    assert!(started.elapsed() >= Duration::from_secs(3));
    candidate.send(Signal::SIGTERM);
    candidate.finish().await;

    let once = run(&db, &[&["elect", "--once"][..], &script].concat()).await;
    assert_eq!((once.code(), &*once.output), (Some(9), "led\n"));
}

#[tokio::test]
async fn the_exit_code_shows_a_leadership_that_was_lost() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let args = [&["elect", "--once"][..], &LEAD].concat();
    let mut leader = Running::start(pglock(&db, &args));
    leader.says("led").await;
    terminate_holder(&mut admin).await;
    assert_eq!(leader.finish().await.code(), Some(125));
}

#[tokio::test]
async fn a_restart_of_the_server_is_survived() {
    let (server, db) = TestDb::with_server().await;
    let args = [&["elect"][..], &LEAD].concat();
    let mut leader = Running::start(pglock(&db, &args));
    leader.says("led").await;
    server.stop(Shutdown::Fast);
    // For a while there is no server to elect a leader.
    tokio::time::sleep(Duration::from_secs(2)).await;
    server.restart();
    leader.says("led").await;
    leader.send(Signal::SIGTERM);
    let ended = leader.finish().await;
    assert_eq!(ended.code(), Some(0), "{}", ended.errors);
}
