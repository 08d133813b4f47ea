//! Finds the descendants of a process in Linux's /proc, and sends signals to them.

use std::collections::{HashMap, HashSet};
use std::fs;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::exit::say;

/// Returns all descendants of a process. Returns none if there is no /proc.
pub(crate) fn of(root: Pid) -> Vec<Pid> {
    let mut children: HashMap<i32, Vec<i32>> = HashMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let stat = fs::read(entry.path().join("stat")).unwrap_or_default();
        if let Some(parent) = parent(&String::from_utf8_lossy(&stat)) {
            children.entry(parent).or_default().push(pid);
        }
    }
    let mut found = vec![root.as_raw()];
    let mut next = 0;
    while let Some(&pid) = found.get(next) {
        found.extend(children.remove(&pid).unwrap_or_default());
        next += 1;
    }
    found.drain(..).skip(1).map(Pid::from_raw).collect()
}

/// Parses the process ID of the parent, the second field after the name. The name may contain brackets and spaces.
fn parent(stat: &str) -> Option<i32> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

/// Sends signals to processes. Reports a failure once per process.
#[derive(Debug, Default)]
pub(crate) struct Sender {
    refused: HashSet<Pid>,
}

impl Sender {
    /// Sends a signal to each process. Returns whether at least one of them accepted it.
    pub(crate) fn send(&mut self, pids: &[Pid], signal: Signal) -> bool {
        let mut accepted = false;
        for &pid in pids {
            match kill(pid, signal) {
                Ok(()) => accepted = true,
                // The process has ended.
                Err(nix::Error::ESRCH) => {}
                // The process belongs to another user, for example because sudo(8) has started it.
                Err(error) => {
                    if self.refused.insert(pid) {
                        say(format_args!("cannot send {signal} to process {pid}: {error}"));
                    }
                }
            }
        }
        accepted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_may_look_like_the_end_of_a_name() {
        assert_eq!(parent("17 (a) S 5 b) S 42 17"), Some(42));
        assert_eq!(parent(""), None);
    }
}
