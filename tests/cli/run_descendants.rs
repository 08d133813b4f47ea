//! `pglock run`: everything that the command has started, when the lock is lost or a process is killed.
#![cfg(target_os = "linux")]

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use pglock_testkit::{TestDb, skip};
use tokio::process::Command;

use crate::support::{
    PGLOCK, Running, is_alive, is_gone, locks_are, pglock, run, send, terminate_holder,
};

/// What would make the tests run that need namespaces.
const CONTAINERS: &str = "run the tests as root, in a container with --privileged";

/// Starts a child, a daemon in a session of its own, an orphan, and one that ignores SIGTERM. Prints the
/// ids of all.
const FAMILY: &str = "echo $$; \
    sleep 1000 & echo $!; \
    setsid sh -c 'echo $$; exec sleep 1000' & \
    sh -c 'sleep 1000 & echo $!'; \
    sh -c 'trap \"\" TERM; echo $$; while :; do sleep 1; done' & \
    wait; sleep 1000";

/// Runs the family under the lock. Returns the ids of its processes.
async fn family(db: &TestDb, args: &[&str]) -> (Running, Vec<i32>) {
    let command = ["key", "--", "sh", "-c", FAMILY];
    let mut holder = Running::start(pglock(db, &[&["run"], args, &command].concat()));
    let mut pids = Vec::new();
    for _ in 0..5 {
        pids.push(holder.line().await.parse().unwrap());
    }
    (holder, pids)
}

/// The guardian is the parent of the command.
fn parent(pid: i32) -> i32 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    stat.rsplit_once(") ").unwrap().1.split(' ').nth(1).unwrap().parse().unwrap()
}

#[tokio::test]
async fn after_a_loss_nothing_runs_any_more() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let (holder, pids) = family(&db, &["--grace", "0.5"]).await;
    terminate_holder(&mut admin).await;
    assert_eq!(holder.finish().await.code(), Some(125));
    let left: Vec<_> = pids.into_iter().filter(|pid| is_alive(*pid)).collect();
    assert!(left.is_empty(), "{left:?}");
}

/// A daemon that the command has left has the time to end, too.
#[tokio::test]
async fn after_a_loss_descendants_end_in_order() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let daemon = "trap 'echo stopped; exit' TERM; echo ready; while :; do sleep 0.1; done";
    let script = format!("setsid sh -c \"{daemon}\" & exec sleep 1000");
    let args = ["run", "--grace", "600", "key", "--", "sh", "-c", &script];
    let mut holder = Running::start(pglock(&db, &args));
    holder.says("ready").await;
    terminate_holder(&mut admin).await;
    holder.says("stopped").await;
    assert_eq!(holder.finish().await.code(), Some(125));
}

#[tokio::test]
async fn all_is_killed_with_its_pglock() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let (holder, pids) = family(&db, &[]).await;
    let mut waiter = Running::start(pglock(&db, &["run", "key", "--", "echo", "next"]));
    locks_are(&mut admin, 1, 1).await;
    holder.send(Signal::SIGKILL);
    waiter.says("next").await;
    for pid in pids {
        is_gone(pid).await;
    }
}

#[tokio::test]
async fn all_is_killed_with_its_guardian() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let (holder, pids) = family(&db, &[]).await;
    send(parent(pids[0]), Signal::SIGKILL);
    let ended = holder.finish().await;
    assert_eq!(ended.code(), Some(128 + 9), "{}", ended.errors);
    let left: Vec<_> = pids.into_iter().filter(|pid| is_alive(*pid)).collect();
    assert!(left.is_empty(), "{left:?}");
    locks_are(&mut admin, 0, 0).await;
}

#[tokio::test]
async fn the_command_is_killed_with_both() {
    let db = TestDb::new().await;
    let (holder, pids) = family(&db, &[]).await;
    let guardian = parent(pids[0]);
    for pid in [holder.pid(), guardian] {
        send(pid, Signal::SIGSTOP);
    }
    for pid in [guardian, holder.pid()] {
        send(pid, Signal::SIGKILL);
    }
    is_gone(pids[0]).await;
    // No process is left that would end the others; the kernel ends only the command itself.
    for pid in pids {
        if is_alive(pid) {
            send(pid, Signal::SIGKILL);
        }
    }
}

#[tokio::test]
async fn the_lock_is_held_for_the_background_if_that_is_wanted() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    // What is in the background has another standard output, so that its end is not waited for.
    let script = "(read line </dev/tty; cat) </dev/null >/dev/null 2>&1 & sleep 1000 >/dev/null 2>&1 & echo $!; exit 4";
    for (args, held) in [(&["run"][..], 0), (&["run", "--wait-descendants"], 1)] {
        let args = [args, &["key", "--", "sh", "-c", script]].concat();
        let mut holder = Running::start(pglock(&db, &args));
        let pid = holder.line().await.parse().unwrap();
        if held == 0 {
            assert_eq!(holder.finish().await.code(), Some(4));
            assert!(is_alive(pid));
            locks_are(&mut admin, 0, 0).await;
            send(pid, Signal::SIGKILL);
        } else {
            // The shell has ended: its child has another parent.
            is_orphan(pid, holder.pid()).await;
            locks_are(&mut admin, 1, 0).await;
            send(pid, Signal::SIGTERM);
            assert_eq!(holder.finish().await.code(), Some(4));
        }
    }
}

async fn is_orphan(pid: i32, pglock: i32) {
    let adopted = || async { is_alive(pid) && parent(parent(pid)) == pglock };
    pglock_testkit::eventually("it is adopted", crate::support::LIMIT, adopted).await;
}

#[tokio::test]
async fn after_sigterm_a_stubborn_command_is_killed() {
    let db = TestDb::new().await;
    let (holder, pids) = family_that_ignores(&db).await;
    let started = Instant::now();
    holder.send(Signal::SIGTERM);
    let ended = holder.finish().await;
    assert_eq!(ended.code(), Some(128 + 9));
    assert!(ended.errors.contains("has not ended within 0.5 s"), "{}", ended.errors);
    assert!(started.elapsed() >= Duration::from_millis(500));
    assert!(pids.into_iter().all(|pid| !is_alive(pid)));
}

async fn family_that_ignores(db: &TestDb) -> (Running, Vec<i32>) {
    let script = "trap '' TERM; echo $$; sleep 1000 & echo $!; wait";
    let args = ["run", "--grace", "0.5", "key", "--", "sh", "-c", script];
    let mut holder = Running::start(pglock(db, &args));
    let pids = vec![holder.line().await.parse().unwrap(), holder.line().await.parse().unwrap()];
    (holder, pids)
}

/// Runs the program as the first process of a container. `None`, and the test is skipped, where that is not allowed.
async fn as_first_process(db: &TestDb, script: &str) -> Option<Option<i32>> {
    let unshare = ["-pf", "--mount-proc", "--kill-child"];
    let allowed = Command::new("unshare").args(unshare).arg("true").status().await;
    if !allowed.is_ok_and(|status| status.success()) {
        return skip("no process can be the first of a container here", CONTAINERS);
    }
    let mut command = Command::new("unshare");
    command.args(unshare).args([PGLOCK, "run", "key", "--", "sh", "-c", script]);
    command.env("DATABASE_URL", db.url()).kill_on_drop(true);
    Some(Running::start(command).finish().await.code())
}

#[tokio::test]
async fn the_first_process_of_a_container_ends_with_a_code_and_reaps() {
    let db = TestDb::new().await;
    for (script, code) in [
        ("kill -INT $$; exec sleep 1000", 130),
        ("kill -TERM 1; exec sleep 1000", 143),
        ("kill -INT 1; exec sleep 1000", 130),
        // No zombie is left of an orphan.
        ("(sleep 0.1 &); sleep 0.5; while grep -q '^State:.Z' /proc/[0-9]*/status; do :; done", 0),
    ] {
        let Some(ended) = as_first_process(&db, script).await else { return };
        assert_eq!(ended, Some(code), "{script}");
    }
}

/// Without /proc there is no guardian.
#[tokio::test]
async fn it_runs_without_proc() {
    let db = TestDb::new().await;
    let hide = "mount -t tmpfs none /proc && exec \"$0\" run key -- sh -c \"$1\"";
    for (script, code) in [("exit 7", 7), ("kill -TERM $$", 143), ("exec /no/such/command", 127)] {
        let mut command = Command::new("unshare");
        command.args(["-m", "sh", "-c", hide, PGLOCK, script]);
        command.env("DATABASE_URL", db.url()).kill_on_drop(true);
        let ended = Running::start(command).finish().await;
        // Where it is not allowed to have mounts of its own.
        if ended.errors.contains("unshare") || ended.errors.contains("mount") {
            skip::<()>("no process can have mounts of its own here", CONTAINERS);
            return;
        }
        assert_eq!(ended.code(), Some(code), "{}", ended.errors);
    }
    assert_eq!(run(&db, &["run", "-n", "key", "true"]).await.code(), Some(0));
}
