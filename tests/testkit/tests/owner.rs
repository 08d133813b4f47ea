//! However the owner of a server ends, nothing stays behind.

#![expect(
    clippy::panic,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a failed unwrap is a failed test; the test run as a process answers by printing"
)]

use std::fs::{self, Permissions};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};
use std::{env, process};

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use pglock_testkit::{PgBouncer, Pgpool, Server, Shutdown, amount};

const SITUATION: &str = "PGLOCK_TESTKIT_SITUATION";

#[test]
#[ignore = "is the owner: the other tests run it as a process to be killed"]
fn owner() {
    let server = Server::shared();
    let situation = env::var(SITUATION);
    let is_in = |name| situation.as_deref() == Ok(name);
    let _pooler = is_in("pooled").then(|| PgBouncer::start(server, &[]).unwrap());
    let _balancer = is_in("balanced").then(|| Pgpool::start(server, server, &[]).unwrap());
    match situation.as_deref() {
        Ok("paused") => server.pause(),
        Ok("killed") => server.kill(),
        Ok("stopped") => server.stop(Shutdown::Fast),
        Ok("restarted") => {
            server.kill();
            server.restart();
        }
        Ok("ends") | Err(_) => return,
        _ => {}
    }
    // A child must not keep the watchdog's pipe open.
    let mut child = Command::new("sleep").arg("60").spawn().unwrap();
    println!("\nchild {}", child.id());
    child.wait().unwrap();
}

/// The owner as a process, and the temporary directory to look for its remains in.
struct Owner {
    process: Child,
    tmp: PathBuf,
}

impl Owner {
    fn start(tmp: PathBuf, situation: &str) -> Self {
        let process = Command::new(env::current_exe().unwrap())
            .args(["owner", "--exact", "--ignored", "--nocapture"])
            .env("TMPDIR", &tmp)
            .env(SITUATION, situation)
            .stdout(Stdio::piped())
            .process_group(0)
            .spawn()
            .unwrap();
        Self { process, tmp }
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.process.id().cast_signed())
    }

    /// Waits until the owner is in its situation. Returns the child that the owner has started.
    fn ready(&mut self) -> Pid {
        for line in BufReader::new(self.process.stdout.take().unwrap()).lines() {
            if let Some(pid) = line.unwrap().strip_prefix("child ") {
                return Pid::from_raw(pid.parse().unwrap());
            }
        }
        panic!("the owner ended early");
    }

    /// Waits until the owner's directory is removed, and every process that works in it has ended.
    fn leaves_nothing(mut self) {
        let prefix = format!("pglock-{}-", self.pid());
        drop(self.process.wait());
        let start = Instant::now();
        loop {
            let files = fs::read_dir(&self.tmp).unwrap().map(|entry| entry.unwrap().file_name());
            let files: Vec<_> =
                files.filter(|name| name.to_string_lossy().starts_with(&prefix)).collect();
            let processes = processes_in(&self.tmp.join(&prefix));
            if files.is_empty() && processes.is_empty() {
                return;
            }
            assert!(start.elapsed() < Duration::from_secs(20), "left: {files:?} {processes:?}");
            sleep(Duration::from_millis(10));
        }
    }
}

/// Returns the command lines of processes that mention `dir`.
fn processes_in(dir: &Path) -> Vec<String> {
    let lines: Vec<_> = if let Ok(processes) = fs::read_dir("/proc") {
        let files = processes.filter_map(|entry| fs::read(entry.ok()?.path().join("cmdline")).ok());
        files.map(|line| String::from_utf8_lossy(&line).replace('\0', " ")).collect()
    } else {
        let ps = Command::new("ps").args(["-A", "-o", "args="]).output().unwrap();
        String::from_utf8_lossy(&ps.stdout).lines().map(str::to_owned).collect()
    };
    lines.into_iter().filter(|line| line.contains(dir.to_str().unwrap())).collect()
}

#[test]
fn an_owner_that_ends_leaves_nothing() {
    Owner::start(env::temp_dir(), "ends").leaves_nothing();
}

#[test]
fn an_owner_that_is_killed_leaves_nothing() {
    for situation in ["running", "paused", "killed", "stopped", "restarted"] {
        killed_it_leaves_nothing(situation);
    }
}

#[test]
fn an_owner_of_a_pgbouncer_that_is_killed_leaves_nothing() {
    let Some(_) = PgBouncer::find() else { return };
    killed_it_leaves_nothing("pooled");
}

#[test]
fn an_owner_of_a_pgpool_that_is_killed_leaves_nothing() {
    let Some(_) = Pgpool::find() else { return };
    killed_it_leaves_nothing("balanced");
}

fn killed_it_leaves_nothing(situation: &str) {
    let mut owner = Owner::start(env::temp_dir(), situation);
    let child = owner.ready();
    kill(owner.pid(), Signal::SIGKILL).unwrap();
    owner.leaves_nothing();
    kill(child, Signal::SIGKILL).unwrap();
}

#[test]
fn an_owner_that_is_closed_leaves_nothing() {
    for signal in [Signal::SIGINT, Signal::SIGHUP, Signal::SIGTERM] {
        let mut owner = Owner::start(env::temp_dir(), "running");
        owner.ready();
        // Sent to the whole process group, as a terminal does.
        killpg(owner.pid(), signal).unwrap();
        owner.leaves_nothing();
    }
}

#[test]
fn an_owner_that_is_killed_while_starting_leaves_nothing() {
    // There is no template at first, so that `initdb` is killed as well.
    let tmp = PathBuf::from(format!("/tmp/pglock-owner-{}", process::id()));
    fs::create_dir(&tmp).unwrap();
    // The mode is that of /tmp.
    fs::set_permissions(&tmp, Permissions::from_mode(0o1777)).unwrap();
    for delay in (0..800).step_by(amount(100, 50)) {
        let owner = Owner::start(tmp.clone(), "running");
        sleep(Duration::from_millis(delay));
        killpg(owner.pid(), Signal::SIGKILL).unwrap();
        owner.leaves_nothing();
    }
    fs::remove_dir_all(&tmp).unwrap();
}
