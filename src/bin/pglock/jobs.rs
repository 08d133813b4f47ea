//! Job control of a terminal: the guardian and its descendants stop and continue together with `pglock`. While `pglock`
//! is stopped, it can't detect a loss, so no process may work under the lock.

use std::fs::File;
use std::io;

use nix::sys::signal::{SigSet, Signal, kill, raise};
use nix::unistd::{Pid, getpgid, getpgrp, getppid, tcgetpgrp, tcsetpgrp};

use crate::descendants::{self, Sender};

/// The processes that were stopped and have to be continued.
#[derive(Debug, Default)]
pub(crate) struct Jobs {
    stopped: Vec<Pid>,
    /// The process group that was in the foreground before the command stopped.
    foreground: Option<Pid>,
}

impl Jobs {
    /// Handles ^Z, which stops the foreground process group with `pglock` in it. Stops the descendants that have left
    /// the group, as timeout(1) and setsid(1) do, and then this process.
    pub(crate) fn stop(&mut self, sender: &mut Sender) {
        let group = getpgrp();
        self.stopped = descendants::of(Pid::this());
        self.stopped.retain(|&pid| getpgid(Some(pid)) != Ok(group));
        sender.send(&self.stopped, Signal::SIGSTOP);
        raise(Signal::SIGSTOP).ok();
    }

    /// Handles a stop of the command. If the command is a shell that had the terminal for itself, stops `pglock` and
    /// this process, because nothing else would stop `pglock`, and no key would reach it.
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

    /// Continues the job, in the foreground or in the background.
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

/// Opens the terminal of this process, if it has one.
fn terminal() -> io::Result<File> {
    File::open("/dev/tty")
}

/// Makes a process group the foreground group of the terminal. A process in the background has to block SIGTTOU for
/// this.
fn give(terminal: &File, group: Pid) {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTTOU);
    if signals.thread_block().is_ok() {
        // The group may have ended.
        tcsetpgrp(terminal, group).ok();
        signals.thread_unblock().ok();
    }
}
