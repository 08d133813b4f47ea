//! A command that runs for as long as a lock is held, and is ended in stages if that is lost.

use std::ffi::OsString;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pglock::Loss;
use tokio::process::{Child as Process, Command};
use tokio::time::timeout;

use crate::become_command;
use crate::exit::{Failure, complain, say};
use crate::signals::{Signals, Told};

/// A command that runs.
#[derive(Debug)]
pub(crate) struct Child(Process);

/// How a command has ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    /// The lock was lost before.
    pub(crate) lost: bool,
    /// What it, or this process, was sent meanwhile.
    pub(crate) told: Vec<Told>,
}

impl Child {
    /// Starts a command in this process group, on this terminal, with this standard input.
    ///
    /// On Linux it is killed if this thread dies.
    pub(crate) fn start(
        command: &[OsString],
        env: Vec<(&'static str, String)>,
    ) -> Result<Self, Failure> {
        become_command::of(command)
            .and_then(|command| Command::from(command).envs(env).spawn())
            .map(Self)
            .map_err(|error| Failure::System("cannot start the command", error))
    }

    /// Waits until the command has ended, and passes signals on to it.
    ///
    /// If the lock is lost, the command is told to end, and after `grace` it is killed.
    pub(crate) async fn supervise(
        mut self,
        signals: &mut Signals,
        lost: impl Future<Output = Loss>,
        grace: Duration,
    ) -> Result<Ended, Failure> {
        let mut told = Vec::new();
        let ended = tokio::select! {
            biased;
            status = self.pass_on(signals, &mut told) => Ok(status),
            reason = lost => Err(reason),
        };
        let (status, lost) = match ended {
            Ok(status) => (status, false),
            Err(reason) => {
                say(format_args!("the lock is lost, so the command is told to end"));
                complain(&reason);
                (self.end(signals, &mut told, grace).await, true)
            }
        };
        let status =
            status.map_err(|error| Failure::System("cannot wait for the command", error))?;
        Ok(Ended { status, lost, told })
    }

    async fn end(
        &mut self,
        signals: &mut Signals,
        told: &mut Vec<Told>,
        grace: Duration,
    ) -> io::Result<ExitStatus> {
        self.send(Signal::SIGTERM);
        // A process that stands still takes no other signal.
        self.send(Signal::SIGCONT);
        if let Ok(status) = timeout(grace, self.pass_on(signals, told)).await {
            return status;
        }
        say(format_args!("the command has not ended within {grace:?}, so it is killed"));
        self.send(Signal::SIGKILL);
        self.pass_on(signals, told).await
    }

    /// Passes signals on until the command has ended. Cancel safe.
    async fn pass_on(
        &mut self,
        signals: &mut Signals,
        told: &mut Vec<Told>,
    ) -> io::Result<ExitStatus> {
        loop {
            tokio::select! {
                biased;
                status = self.0.wait() => return status,
                next = signals.next() => {
                    told.push(next);
                    if !next.by_terminal {
                        self.send(next.signal);
                    }
                }
            }
        }
    }

    fn send(&self, signal: Signal) {
        // Its number is not given out again before it was waited for.
        if let Some(pid) = self.0.id() {
            // It may belong to another user by now, if it is sudo(8).
            if let Err(error) = kill(Pid::from_raw(pid.cast_signed()), signal) {
                say(format_args!("cannot send {signal} to the command: {error}"));
            }
        }
    }
}

impl Ended {
    /// Whether that was meant to be the end: it was told to stop, or died of what it was told.
    pub(crate) fn is_stopped(&self) -> bool {
        self.told.iter().any(|told| told.is_stop()) || self.by_what_it_was_told()
    }

    /// Whether it died of a signal that it was told.
    pub(crate) fn by_what_it_was_told(&self) -> bool {
        let by = self.status.signal();
        by.is_some() && self.told.iter().any(|told| Some(told.signal as i32) == by)
    }
}
