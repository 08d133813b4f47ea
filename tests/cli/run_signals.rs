//! `pglock run`: signals.

use std::pin::pin;
use std::time::Duration;

use nix::sys::signal::Signal;
use pglock_testkit::TestDb;
use tokio::time::timeout;

use crate::support::{PGLOCK, Running, hold, is_gone, locks_are, pglock, run, send};

/// Says `ready`, and the name of each signal that it gets.
const LISTEN: &str = "for signal in HUP INT QUIT TERM USR1 USR2; do \
        trap \"echo $signal\" $signal; \
    done; \
    trap 'exit 3' CHLD; echo ready; \
    while :; do read line && exit 4; done";

#[tokio::test]
async fn signals_are_passed_on_to_the_command_once() {
    let db = TestDb::new().await;
    let mut listener = Running::start(pglock(&db, &["run", "key", "--", "sh", "-c", LISTEN]));
    listener.says("ready").await;
    for (signal, name) in [
        (Signal::SIGHUP, "HUP"),
        (Signal::SIGINT, "INT"),
        (Signal::SIGQUIT, "QUIT"),
        (Signal::SIGTERM, "TERM"),
        (Signal::SIGUSR1, "USR1"),
        (Signal::SIGUSR2, "USR2"),
    ] {
        listener.send(signal);
        listener.says(name).await;
    }
    listener.tell("end").await;
    let ended = listener.finish().await;
    assert_eq!((ended.code(), &*ended.output), (Some(4), ""), "{}", ended.errors);
}

#[tokio::test]
async fn the_exit_code_shows_the_signal_that_ended_the_command() {
    let db = TestDb::new().await;
    let args = ["run", "key", "--", "sh", "-c", "echo ready; exec sleep 1000"];
    // On SIGINT it kills itself with that signal, because a shell checks for that.
    for (signal, expected) in [
        (Signal::SIGTERM, (Some(128 + 15), None)),
        (Signal::SIGQUIT, (Some(128 + 3), None)),
        (Signal::SIGINT, (None, Some(2))),
    ] {
        let mut sleeper = Running::start(pglock(&db, &args));
        sleeper.says("ready").await;
        sleeper.send(signal);
        let ended = sleeper.finish().await;
        assert_eq!((ended.code(), ended.signal()), expected, "{signal}");
    }
}

#[tokio::test]
async fn the_lock_is_held_until_the_command_has_ended() {
    let db = TestDb::new().await;
    let script = "trap 'echo told' TERM; echo held; while :; do read line && exit 6; done";
    let mut holder = Running::start(pglock(&db, &["run", "key", "--", "sh", "-c", script]));
    holder.says("held").await;
    holder.send(Signal::SIGTERM);
    holder.says("told").await;
    assert_eq!(run(&db, &["run", "-n", "key", "true"]).await.code(), Some(1));
    holder.tell("end").await;
    assert_eq!(holder.finish().await.code(), Some(6));
    assert_eq!(run(&db, &["run", "-n", "key", "true"]).await.code(), Some(0));
}

#[tokio::test]
async fn a_signal_ends_the_wait_and_leaves_nothing_behind() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let holder = hold(&db, &["run", "key"]).await;
    for signal in [Signal::SIGTERM, Signal::SIGHUP, Signal::SIGUSR1] {
        let waiter = Running::start(pglock(&db, &["run", "key", "--", "echo", "ran"]));
        locks_are(&mut admin, 1, 1).await;
        waiter.send(signal);
        let ended = waiter.finish().await;
        assert_eq!(ended.code(), Some(128 + signal as i32), "{}", ended.errors);
        assert_eq!((&*ended.output, &*ended.errors), ("", ""));
        locks_are(&mut admin, 1, 0).await;
    }
    holder.finish().await;
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_command_is_killed_with_its_pglock() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let args = ["run", "key", "--", "sh", "-c", "echo $$; exec sleep 1000"];
    let mut holder = Running::start(pglock(&db, &args));
    let pid = holder.line().await.parse().unwrap();
    let mut waiter = Running::start(pglock(&db, &["run", "key", "--", "echo", "next"]));
    locks_are(&mut admin, 1, 1).await;
    holder.send(Signal::SIGKILL);
    waiter.says("next").await;
    is_gone(pid).await;
}

/// As nohup(1) does it, and a shell for a job in the background.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn what_was_ignored_stays_ignored() {
    let db = TestDb::new().await;
    let mut shell = tokio::process::Command::new("sh");
    let script = "trap '' HUP; exec \"$0\" run key -- sh -c 'echo $$; kill -HUP $$; cat'";
    shell.args(["-c", script, PGLOCK]).env("DATABASE_URL", db.url()).kill_on_drop(true);
    let mut holder = Running::start(shell);
    holder.line().await;
    holder.send(Signal::SIGHUP);
    holder.tell("alive").await;
    holder.says("alive").await;
    assert_eq!(holder.finish().await.code(), Some(0));
}

/// The command has ended, and the server does not answer to the release.
#[tokio::test]
async fn a_signal_ends_a_release_that_is_not_answered() {
    let (server, db) = TestDb::with_server().await;
    let mut listener = Running::start(pglock(&db, &["run", "key", "--", "sh", "-c", LISTEN]));
    listener.says("ready").await;
    server.pause();
    listener.tell("end").await;
    // The first ones may reach the command, which ignores them. Without them, the heartbeat would end it by code 125.
    let pid = listener.pid();
    let mut ending = pin!(listener.finish());
    let ended = loop {
        send(pid, Signal::SIGTERM);
        if let Ok(ended) = timeout(Duration::from_millis(100), ending.as_mut()).await {
            break ended;
        }
    };
    server.resume();
    assert_eq!(ended.code(), Some(128 + Signal::SIGTERM as i32), "{}", ended.errors);
}
