//! A command that runs while a lock is held, and is ended in stages if the lock is lost.

use std::collections::HashSet;
use std::ffi::OsString;
use std::io;
use std::io::{PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::process::Command;
use std::time::Duration;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use pglock::Loss;
use tokio::time::{Instant, sleep, sleep_until};

use crate::become_command::cannot_run;
use crate::descendants::{self, Sender};
use crate::exit::{Exit, Failure, complain, say};
use crate::guardian::{self, forward};
use crate::signals::{Event, Received, Signals};

/// How a command is run.
#[derive(Debug, Default)]
pub(crate) struct How {
    /// The key of the lock, which the list of processes shows.
    pub(crate) key: String,
    pub(crate) env: Vec<(&'static str, String)>,
    /// Whether to wait for all that the command has started.
    pub(crate) wait_descendants: bool,
    /// After a loss, or SIGTERM, how long the command may take to end before it is killed.
    pub(crate) grace: Duration,
    /// A file to remove if this process is killed.
    pub(crate) remove: Option<PathBuf>,
}

/// A command that runs: below a guardian on Linux, otherwise as a child of this process.
#[derive(Debug)]
pub(crate) struct Child {
    pid: Pid,
    guardian: Option<Pipes>,
    grace: Duration,
    sender: Sender,
}

#[derive(Debug)]
struct Pipes {
    control: PipeWriter,
    report: PipeReader,
    /// The descendants that this process had before it started the command, which are not the command's.
    others: HashSet<Pid>,
}

/// How a command has ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) exit: Exit,
    /// Whether the lock was lost before the command ended.
    pub(crate) lost: bool,
    /// The signals that this process received meanwhile.
    pub(crate) received: Vec<Received>,
}

/// How long to wait between two rounds of killing.
const ROUND: Duration = Duration::from_millis(20);

impl Child {
    /// Starts a command in this process group, on this terminal, with this standard input. If the command can't be run,
    /// reports that, and returns the exit code as the inner `Err`.
    pub(crate) fn start(
        command: &[OsString],
        how: &How,
        signals: &Signals,
    ) -> Result<Result<Self, Exit>, Failure> {
        let failed = |error| Failure::System("cannot start the command", error);
        let grace = how.grace;
        if cfg!(target_os = "linux") && Path::new("/proc/self/exe").exists() {
            let (pid, pipes) = start_guardian(command, how, signals).map_err(failed)?;
            return Ok(Ok(Self { pid, guardian: Some(pipes), grace, sender: Sender::default() }));
        }
        let Some((program, arguments)) = command.split_first() else {
            return Ok(Err(Exit::Code(126)));
        };
        let mut process = Command::new(program);
        process.args(arguments).envs(how.env.iter().map(|(name, value)| (name, value)));
        Ok(match signals.spawn(&mut process) {
            Ok(pid) => Ok(Self { pid, guardian: None, grace, sender: Sender::default() }),
            Err(error) => Err(cannot_run(program, &error)),
        })
    }

    /// Waits until the command has ended, and forwards signals to it.
    ///
    /// If the lock is lost, all that the command has started receives SIGTERM, and SIGKILL after the grace period, and
    /// has ended when this method returns. A SIGTERM to this process starts the same grace period.
    pub(crate) async fn supervise(
        mut self,
        signals: &mut Signals,
        lost: impl Future<Output = Loss>,
        mut on_loss: impl FnMut(&Signals),
    ) -> Ended {
        let mut lost = pin!(lost);
        let mut ended = Ended { exit: Exit::FINE, lost: false, received: Vec::new() };
        let mut deadline = None;
        let mut killed = false;
        for received in signals.received_until_now().await {
            ended.received.push(received);
            self.forward(Received { from_terminal: false, ..received });
            if received.signal == Signal::SIGTERM {
                deadline.get_or_insert_with(|| Instant::now() + self.grace);
            }
        }
        loop {
            tokio::select! {
                biased;
                event = signals.event() => match event {
                    Event::Ended(pid, exit) if pid == self.pid => {
                        ended.exit = exit;
                        break;
                    }
                    Event::Ended(..) | Event::NoChildren | Event::Stopped(_) | Event::UntilNow => {}
                    Event::Received(received) => {
                        ended.received.push(received);
                        self.forward(received);
                        if received.signal == Signal::SIGTERM && !killed {
                            deadline.get_or_insert_with(|| Instant::now() + self.grace);
                        }
                    }
                },
                reason = &mut lost, if !ended.lost => {
                    ended.lost = true;
                    say(format_args!("the lock is lost, so the command is ended"));
                    complain(&reason);
                    on_loss(signals);
                    self.end(guardian::END, Signal::SIGTERM);
                    if !killed {
                        deadline.get_or_insert_with(|| Instant::now() + self.grace);
                    }
                }
                () = sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => {
                    (deadline, killed) = (None, true);
                    let grace = self.grace.as_secs_f64();
                    say(format_args!("the command has not ended within {grace} s, so it is killed"));
                    self.end(guardian::KILL, Signal::SIGKILL);
                }
            }
        }
        if let Some(pipes) = &mut self.guardian {
            let mut report = String::new();
            drop(pipes.report.read_to_string(&mut report));
            match guardian::read_report(&report) {
                Some(exit) => ended.exit = exit,
                None if matches!(ended.exit, Exit::Signal(_)) => kill_orphans(&pipes.others).await,
                // The guardian could not start the command, and has reported why.
                None => {}
            }
        }
        ended
    }

    fn forward(&mut self, received: Received) {
        match &mut self.guardian {
            // The guardian is in the foreground process group too, and has received the signal itself.
            Some(_) if received.from_terminal => {}
            Some(pipes) => pipes.send(u8::try_from(received.signal as i32).unwrap_or_default()),
            None => forward(self.pid, received, &mut self.sender),
        }
    }

    fn end(&mut self, order: u8, signal: Signal) {
        if let Some(pipes) = &mut self.guardian {
            pipes.send(order);
        } else {
            self.sender.send(&[self.pid], signal);
        }
        // A stopped process does nothing until it is continued.
        self.sender.send(&[self.pid], Signal::SIGCONT);
    }
}

impl Pipes {
    fn send(&mut self, byte: u8) {
        // If this fails, the guardian has ended, and its end is about to be reported.
        self.control.write_all(&[byte]).ok();
    }
}

fn start_guardian(command: &[OsString], how: &How, signals: &Signals) -> io::Result<(Pid, Pipes)> {
    #[cfg(target_os = "linux")]
    nix::sys::prctl::set_child_subreaper(true)?;
    let (control, to_guardian) = io::pipe()?;
    let (from_guardian, report) = io::pipe()?;
    let mut process = Command::new("/proc/self/exe");
    process.arg0(format!("pglock (holds {})", how.key)).arg("guardian");
    process.arg("--control").arg(inherit(&control)?).arg("--report").arg(inherit(&report)?);
    if how.wait_descendants {
        process.arg("--wait-descendants");
    }
    if let Some(file) = &how.remove {
        process.arg("--remove").arg(file);
    }
    process.arg("--").args(command).envs(how.env.iter().map(|(name, value)| (name, value)));
    let others = descendants::of(Pid::this()).into_iter().collect();
    let pid = signals.spawn(&mut process)?;
    Ok((pid, Pipes { control: to_guardian, report: from_guardian, others }))
}

/// Makes a descriptor inheritable by the next process that is started. Returns its number.
fn inherit(pipe: &(impl AsFd + AsRawFd)) -> io::Result<String> {
    fcntl(pipe, FcntlArg::F_SETFD(FdFlag::empty()))?;
    Ok(pipe.as_raw_fd().to_string())
}

/// Kills the processes that a killed guardian has left behind. This process has adopted them.
async fn kill_orphans(others: &HashSet<Pid>) {
    say(format_args!("the process that guards the command was killed, so all of it is killed"));
    let mut sender = Sender::default();
    loop {
        let mut left = descendants::of(Pid::this());
        left.retain(|pid| !others.contains(pid));
        if left.is_empty() {
            return;
        }
        sender.send(&left, Signal::SIGKILL);
        sleep(ROUND).await;
    }
}

/// Starts a script of the user, which runs beside this program. Returns its process ID if it could be started.
pub(crate) fn start_hook(
    script: &str,
    env: &[(&'static str, String)],
    signals: &Signals,
) -> Option<Pid> {
    let mut shell = Command::new("sh");
    shell.args(["-c", script]).envs(env.iter().map(|(name, value)| (name, value)));
    signals
        .spawn(&mut shell)
        .inspect_err(|error| say(format_args!("cannot start {script:?}: {error}")))
        .ok()
}

impl Ended {
    /// Returns whether the end was intended: this process received a signal to stop, or the command died of a signal
    /// that was forwarded to it.
    pub(crate) fn is_stopped(&self) -> bool {
        self.received.iter().any(|received| received.is_stop()) || self.by_what_it_received()
    }

    /// Returns whether the command died of a signal that was forwarded to it.
    pub(crate) fn by_what_it_received(&self) -> bool {
        self.received.iter().any(|received| self.exit == received.signal.into())
    }
}
