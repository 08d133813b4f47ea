//! Finds processes by their parent, because PostgreSQL's backends lead process groups of their own.

use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};
use std::{fs, io};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

#[derive(Clone, Copy, Debug)]
pub(crate) struct Process {
    pub(crate) pid: u32,
    parent: u32,
    /// The state as `ps` prints it: `T` is stopped, and `Z` has ended, but its parent has not waited for it yet.
    state: char,
}

impl Process {
    fn find(pid: u32) -> Option<Self> {
        all().into_iter().find(|process| process.pid == pid)
    }

    /// Parses `/proc/<pid>/stat`: `pid (name, which may hold spaces) state parent …`
    fn from_stat(stat: &str) -> Option<Self> {
        let pid = stat.split_once(' ')?.0.parse().ok()?;
        let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
        let state = fields.next()?.chars().next()?;
        Some(Self { pid, parent: fields.next()?.parse().ok()?, state })
    }

    /// Parses a line of `ps -o pid=,ppid=,state=`.
    fn from_ps(line: &str) -> Option<Self> {
        let mut fields = line.split_whitespace();
        let pid = fields.next()?.parse().ok()?;
        let parent = fields.next()?.parse().ok()?;
        Some(Self { pid, parent, state: fields.next()?.chars().next()? })
    }
}

pub(crate) fn children(parent: u32) -> Vec<u32> {
    all().into_iter().filter(|process| process.parent == parent).map(|child| child.pid).collect()
}

pub(crate) fn signal(pid: u32, signal: Signal) -> io::Result<()> {
    Ok(kill(Pid::from_raw(pid.cast_signed()), signal)?)
}

/// Stops `pid`, and waits until it is stopped.
pub(crate) fn stop(pid: u32) {
    if signal(pid, Signal::SIGSTOP).is_ok() {
        wait_until("a process stands still", || stands_still(pid));
    }
}

/// Returns whether `pid` is stopped, or has ended.
pub(crate) fn stands_still(pid: u32) -> bool {
    Process::find(pid).is_none_or(|process| matches!(process.state, 'T' | 't' | 'Z'))
}

/// Returns whether `pid` has ended, even if its parent has not waited for it yet.
pub(crate) fn is_gone(pid: u32) -> bool {
    Process::find(pid).is_none_or(|process| process.state == 'Z')
}

pub(crate) fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_mins(1), "waited 60 s in vain until {what}");
        sleep(Duration::from_millis(2));
    }
}

fn all() -> Vec<Process> {
    if Path::new("/proc/self/stat").exists() {
        let entries = fs::read_dir("/proc").expect("/proc is readable");
        let stats =
            entries.filter_map(|entry| fs::read_to_string(entry.ok()?.path().join("stat")).ok());
        return stats.filter_map(|stat| Process::from_stat(&stat)).collect();
    }
    let ps = Command::new("ps").args(["-A", "-o", "pid=,ppid=,state="]).output();
    let ps = ps.expect("where there is no /proc, ps lists the processes");
    String::from_utf8_lossy(&ps.stdout).lines().filter_map(Process::from_ps).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_may_hold_spaces_and_parentheses() {
        let process = Process::from_stat("12 (a) b (c) T 7 12 12 0").unwrap();
        assert_eq!((process.pid, process.parent, process.state), (12, 7, 'T'));
    }

    #[test]
    fn a_line_of_ps_is_understood() {
        let process = Process::from_ps("  12     7 Ss+ ").unwrap();
        assert_eq!((process.pid, process.parent, process.state), (12, 7, 'S'));
    }
}
