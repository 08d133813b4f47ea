//! Job control of a terminal: the guardian stops and continues with `pglock`, and takes all below it along. While
//! `pglock` is stopped, it can't notice a loss, so nothing may work under the lock.

use std::fs::File;
use std::io;

use nix::sys::signal::{SigSet, Signal, kill, raise};
use nix::unistd::{Pid, getpgid, getpgrp, getppid, tcgetpgrp, tcsetpgrp};

use crate::descendants::{self, Sender};

/// What was stopped, and is to be continued.
#[derive(Debug, Default)]
pub(crate) struct Jobs {
    stopped: Vec<Pid>,
    /// The process group that had the terminal.
    foreground: Option<Pid>,
}

impl Jobs {
    /// ^Z was pressed: it stops the foreground process group, and `pglock` is a part of that. Stops what has left the
    /// group, as timeout(1) and setsid(1) do, and then this process.
    pub(crate) fn stop(&mut self, sender: &mut Sender) {
        let group = getpgrp();
        self.stopped = descendants::of(Pid::this());
        self.stopped.retain(|&pid| getpgid(Some(pid)) != Ok(group));
        sender.send(&self.stopped, Signal::SIGSTOP);
        raise(Signal::SIGSTOP).ok();
    }

    /// The command has been stopped. If it is a shell that had the terminal for itself, nothing else would stop
    /// `pglock`, and no key would reach it.
    pub(crate) fn command_has_stopped(&mut self, command: Pid, sender: &mut Sender) {
        let group = getpgrp();
        if let Ok(terminal) = terminal()
            && let (Ok(its), Ok(foreground)) = (getpgid(Some(command)), tcgetpgrp(&terminal))
            && its == foreground
            && its != group
        {
            give(&terminal, group);
            self.foreground = Some(its);
            kill(getppid(), Signal::SIGSTOP).ok();
            self.stop(sender);
        }
    }

    /// The job continues, in the foreground or not.
    pub(crate) fn resume(&self, sender: &mut Sender) {
        if let Some(group) = self.foreground
            && let Ok(terminal) = terminal()
            && tcgetpgrp(&terminal) == Ok(getpgrp())
        {
            give(&terminal, group);
        }
        sender.send(&self.stopped, Signal::SIGCONT);
    }
}

/// The terminal of this process, if it has one.
fn terminal() -> io::Result<File> {
    File::open("/dev/tty")
}

/// Makes a process group the one that the terminal's keys reach. For a process in the background, this takes a blocked
/// signal.
fn give(terminal: &File, group: Pid) {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTTOU);
    if signals.thread_block().is_ok() {
        // The group may have gone.
        tcsetpgrp(terminal, group).ok();
        signals.thread_unblock().ok();
    }
}
