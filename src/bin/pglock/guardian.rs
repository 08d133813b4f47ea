//! The guardian, a process that runs between `pglock` and the command, and ends all that the command has started.
//!
//! ```text
//! pglock          holds the lock; if it is killed, the guardian reads the end of the control pipe
//! └─ guardian     adopts orphans of the command, so all that the command starts stays below it
//!    └─ command   is killed by the kernel if the guardian dies
//! ```
//!
//! If the guardian is killed, `pglock` adopts the processes that it leaves behind. See [`Child`](crate::child::Child).

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use clap::Args;
use nix::sys::signal::Signal;
use nix::unistd::{Pid, close};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::time::sleep;

use crate::become_command;
use crate::descendants::{self, Sender};
use crate::exit::{Exit, Failure};
use crate::jobs::Jobs;
use crate::signals::{Event, Received, Signals};

/// Run a command for pglock, and end all that it has started when pglock asks for it, or dies
#[derive(Args, Debug)]
pub(crate) struct GuardianArgs {
    /// The descriptor of the pipe from pglock.
    #[arg(long)]
    control: i32,

    /// The descriptor of the pipe to pglock.
    #[arg(long)]
    report: i32,

    /// Wait for all that the command has started.
    #[arg(long)]
    wait_descendants: bool,

    /// A file to remove if pglock dies.
    #[arg(long)]
    remove: Option<PathBuf>,

    #[arg(last = true, required = true)]
    command: Vec<OsString>,
}

/// The control byte that makes the guardian send SIGTERM to all that the command has started, and wait for all of it.
/// Bytes other than this and [`KILL`] are the numbers of signals to forward.
pub(crate) const END: u8 = b'E';

/// The control byte that makes the guardian kill all that the command has started, and wait for all of it.
pub(crate) const KILL: u8 = b'K';

/// The first pause between two rounds of killing. One round may not be enough, because a process may start another one
/// meanwhile.
const FIRST_ROUND: Duration = Duration::from_millis(20);

/// The longest pause between two rounds. The pause grows because a process of another user does not accept the signal,
/// so there may be rounds until it ends on its own.
const LAST_ROUND: Duration = Duration::from_secs(1);

/// A guardian that runs its command.
struct Guardian {
    command: Pid,
    signals: Signals,
    /// The bytes from pglock; the channel is closed if pglock has died.
    control: UnboundedReceiver<u8>,
    sender: Sender,
    jobs: Jobs,
    report: File,
}

pub(crate) async fn run(args: GuardianArgs) -> Result<Exit, Failure> {
    #[cfg(target_os = "linux")]
    {
        use nix::sys::prctl::{set_child_subreaper, set_name};

        set_child_subreaper(true)
            .map_err(|error| Failure::System("cannot adopt orphans", error.into()))?;
        // Renamed so that `pkill pglock` does not find the guardian, which has to outlive pglock.
        set_name(c"lock-guardian").ok();
    }
    let signals = Signals::listen_with_job()?;
    let control = File::open(inherited(args.control)).map_err(no_pipe)?;
    let report = OpenOptions::new().write(true).open(inherited(args.report)).map_err(no_pipe)?;
    // The command inherits no pipe: the original descriptors are closed here, the reopened ones by its exec.
    for descriptor in [args.control, args.report] {
        close(descriptor).map_err(|error| no_pipe(error.into()))?;
    }
    let command = signals
        .spawn(&mut become_command::of(&args.command))
        .map_err(|error| Failure::System("cannot start the command", error))?;
    let control = listen(control);
    let (sender, jobs) = (Sender::default(), Jobs::default());
    let mut guardian = Guardian { command, signals, control, sender, jobs, report };
    if !guardian.serve(args.wait_descendants).await {
        if let Some(file) = args.remove {
            fs::remove_file(file).ok();
        }
        guardian.kill_all(true).await;
    }
    Ok(Exit::FINE)
}

/// Returns the path by which a descriptor of this process can be reopened as an owned one.
fn inherited(descriptor: i32) -> String {
    format!("/proc/self/fd/{descriptor}")
}

fn no_pipe(error: std::io::Error) -> Failure {
    Failure::System("cannot open the pipes to pglock", error)
}

fn listen(mut control: File) -> UnboundedReceiver<u8> {
    let (sender, bytes) = unbounded_channel();
    thread::spawn(move || {
        let mut byte = [0];
        while control.read_exact(&mut byte).is_ok() && sender.send(byte[0]).is_ok() {}
    });
    bytes
}

impl Guardian {
    /// Executes the orders of pglock until the command has ended, or with `wait_for_all`, until all that it has started
    /// has ended. Returns `false` if pglock died before.
    async fn serve(&mut self, mut wait_for_all: bool) -> bool {
        let mut has_ended = false;
        for received in self.signals.received_until_now().await {
            self.forward(Received { from_terminal: false, ..received }, has_ended);
            if received.signal == Signal::SIGTSTP {
                self.jobs.stop(&mut self.sender);
            }
        }
        loop {
            tokio::select! {
                biased;
                byte = self.control.recv() => match byte {
                    None => return false,
                    Some(END) => {
                        wait_for_all = true;
                        let all = descendants::of(Pid::this());
                        self.sender.send(&all, Signal::SIGTERM);
                        // A stopped process does not handle SIGTERM until it is continued.
                        self.sender.send(&all, Signal::SIGCONT);
                    }
                    Some(KILL) => {
                        self.kill_all(false).await;
                        return true;
                    }
                    Some(byte) => if let Ok(signal) = Signal::try_from(i32::from(byte)) {
                        self.forward(Received { signal, from_terminal: false }, has_ended);
                    }
                },
                event = self.signals.event() => match event {
                    Event::Received(Received { signal: Signal::SIGTSTP, .. }) => {
                        self.jobs.stop(&mut self.sender);
                    }
                    Event::Received(Received { signal: Signal::SIGCONT, .. }) => {
                        self.jobs.resume(&mut self.sender);
                    }
                    Event::Received(received) if received.from_terminal => {
                        self.forward(received, has_ended);
                    }
                    Event::Stopped(pid) if pid == self.command => {
                        self.jobs.command_has_stopped(pid, &mut self.sender);
                    }
                    Event::Ended(pid, exit) if pid == self.command => {
                        has_ended = true;
                        self.report(exit);
                        if !wait_for_all {
                            return true;
                        }
                    }
                    // Ignores a signal that is not from the terminal, because pglock forwards its own through the pipe.
                    Event::Ended(..) | Event::Received(_) | Event::Stopped(_) | Event::UntilNow => {}
                    Event::NoChildren => return true,
                },
            }
        }
    }

    /// Kills all descendants, and waits until they have ended. With `may_leave`, also returns when none of them accepts
    /// the signal.
    async fn kill_all(&mut self, may_leave: bool) {
        let mut interval = FIRST_ROUND;
        loop {
            let accepted = self.sender.send(&descendants::of(Pid::this()), Signal::SIGKILL);
            if may_leave && !accepted {
                return;
            }
            let round = sleep(interval);
            tokio::pin!(round);
            interval = LAST_ROUND.min(interval * 2);
            loop {
                tokio::select! {
                    biased;
                    event = self.signals.event() => match event {
                        Event::Ended(pid, exit) if pid == self.command => self.report(exit),
                        Event::NoChildren => return,
                        Event::Ended(..) | Event::Received(_) | Event::Stopped(_) | Event::UntilNow => {}
                    },
                    () = &mut round => break,
                }
            }
        }
    }

    /// Forwards a signal to the command, or if the command has ended, to all processes that it has left behind.
    fn forward(&mut self, received: Received, has_ended: bool) {
        if !has_ended {
            return forward(self.command, received, &mut self.sender);
        }
        for pid in descendants::of(Pid::this()) {
            forward(pid, received, &mut self.sender);
        }
    }

    fn report(&mut self, exit: Exit) {
        let line = match exit {
            Exit::Code(code) => format!("code {code}\n"),
            Exit::Signal(signal) => format!("signal {signal}\n"),
        };
        // If pglock has died, no process reads it.
        self.report.write_all(line.as_bytes()).ok();
    }
}

/// Parses the guardian's report of how the command has ended. `None` if the guardian died before that.
pub(crate) fn read_report(report: &str) -> Option<Exit> {
    match report.trim_end().split_once(' ')? {
        ("code", code) => code.parse().ok().map(Exit::Code),
        ("signal", signal) => signal.parse().ok().map(Exit::Signal),
        _ => None,
    }
}

/// Forwards a signal to a child, unless the child has already received it.
///
/// A key of the terminal sends its signal to the foreground process group. A child that has left that group gets the
/// signal from here: with its whole group if it leads one, as under timeout(1) and setsid(1), otherwise alone.
pub(crate) fn forward(child: Pid, received: Received, sender: &mut Sender) {
    use nix::unistd::{getpgid, getpgrp};

    if !received.from_terminal {
        sender.send(&[child], received.signal);
    } else if let Ok(group) = getpgid(Some(child))
        && group != getpgrp()
    {
        let target = if group == child { Pid::from_raw(-group.as_raw()) } else { child };
        sender.send(&[target], received.signal);
    }
}
