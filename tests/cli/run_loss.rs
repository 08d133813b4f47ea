//! `pglock run`: a lock that is lost while the command runs.

use nix::sys::signal::Signal;
use pglock_testkit::TestDb;

use crate::support::{Running, is_alive, is_gone, locks_are, pglock, run, terminate_holder};

/// Prints its process id, goes on in spite of SIGTERM, and ends with the exit code that it reads.
const STUBBORN: &str =
    "trap 'echo told' TERM; echo $$; while :; do read line && exit \"$line\"; done";

#[tokio::test]
async fn a_lost_lock_ends_the_command() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let script = "trap 'echo told; exit 0' TERM; echo held; while :; do read line; done";
    let mut holder = Running::start(pglock(&db, &["run", "key", "--", "sh", "-c", script]));
    holder.says("held").await;
    terminate_holder(&mut admin).await;
    holder.says("told").await;
    let ended = holder.finish().await;
    assert_eq!(ended.code(), Some(125));
    assert!(ended.errors.contains("the lock is lost"), "{}", ended.errors);
    // That, and why; nothing of killing it.
    assert_eq!(ended.errors.lines().count(), 2, "{}", ended.errors);
}

#[tokio::test]
async fn a_command_that_does_not_end_is_killed() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let args = ["run", "--grace", "0.5", "key", "--", "sh", "-c", STUBBORN];
    let mut holder = Running::start(pglock(&db, &args));
    let pid = holder.line().await.parse().unwrap();
    terminate_holder(&mut admin).await;
    holder.says("told").await;
    // Its standard input stays open.
    is_gone(pid).await;
    let ended = holder.finish().await;
    assert_eq!(ended.code(), Some(125));
    assert!(ended.errors.contains("killed"), "{}", ended.errors);
}

#[tokio::test]
async fn the_command_has_its_time_to_end() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let args = ["run", "--grace", "600", "key", "--", "sh", "-c", STUBBORN];
    let mut holder = Running::start(pglock(&db, &args));
    let pid = holder.line().await.parse().unwrap();
    terminate_holder(&mut admin).await;
    holder.says("told").await;
    locks_are(&mut admin, 0, 0).await;
    assert!(is_alive(pid));
    holder.tell("0").await;
    // That it ended well says nothing: another process may have had the lock.
    assert_eq!(holder.finish().await.code(), Some(125));
}

/// The program may be the last to know.
#[tokio::test]
async fn a_loss_that_is_detected_by_the_release_is_reported() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let args = ["run", "key", "--", "sh", "-c", STUBBORN];
    let mut holder = Running::start(pglock(&db, &args));
    let pid = holder.line().await.parse().unwrap();
    holder.send(Signal::SIGSTOP);
    terminate_holder(&mut admin).await;
    locks_are(&mut admin, 0, 0).await;
    holder.tell("0").await;
    is_gone(pid).await;
    holder.send(Signal::SIGCONT);
    assert_eq!(holder.finish().await.code(), Some(125));
    assert_eq!(run(&db, &["run", "-n", "key", "true"]).await.code(), Some(0));
}

#[tokio::test]
async fn a_command_that_stands_still_ends_too() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let args = ["run", "--grace", "600", "key", "--", "sh", "-c", "echo $$; exec sleep 1000"];
    let mut holder = Running::start(pglock(&db, &args));
    let pid = holder.line().await.parse().unwrap();
    crate::support::send(pid, Signal::SIGSTOP);
    terminate_holder(&mut admin).await;
    assert_eq!(holder.finish().await.code(), Some(125));
}
