//! The signals that this process receives, and the ends of its child processes.

use std::collections::VecDeque;
use std::fs;
use std::future::pending;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::thread;

use nix::sys::signal::{Signal, raise};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use signal_hook::iterator::SignalsInfo;
use signal_hook::iterator::exfiltrator::WithOrigin;
use signal_hook::low_level::siginfo::Cause;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use crate::exit::{Exit, Failure};

const HEARD: [Signal; 6] = [
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGTERM,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
];

/// The signals that stop and continue a job from a terminal.
const JOB: [Signal; 2] = [Signal::SIGTSTP, Signal::SIGCONT];

/// An event in a process that runs a command.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Event {
    /// A child process has ended, and was reaped.
    Ended(Pid, Exit),
    /// A child process was stopped.
    Stopped(Pid),
    /// This process has no children any more.
    NoChildren,
    /// All signals that arrived before [`Signals::received_until_now`] was called have been reported.
    UntilNow,
    Received(Received),
}

/// A signal that this process received.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Received {
    pub(crate) signal: Signal,
    /// Whether the kernel sent it for the terminal, to the whole foreground process group.
    pub(crate) from_terminal: bool,
}

impl Received {
    /// Returns whether the signal asks a process to end.
    pub(crate) fn is_stop(self) -> bool {
        matches!(self.signal, Signal::SIGINT | Signal::SIGQUIT | Signal::SIGTERM)
    }

    /// Returns whether the signal is SIGHUP, which ends a process that has no configuration to reload.
    pub(crate) fn is_hang_up(self) -> bool {
        self.signal == Signal::SIGHUP
    }
}

/// Receives the signals of this process, and reaps its children.
///
/// A signal that was ignored when the program started stays ignored, by this process and by the command, because
/// nohup(1), and shells that start a background job, rely on it. Children that this process has adopted are reaped,
/// too.
#[derive(Debug)]
pub(crate) struct Signals {
    events: UnboundedReceiver<Event>,
    /// Events that `received_until_now` has read, but not returned.
    kept: VecDeque<Event>,
    reaping: Arc<Mutex<()>>,
    asked: Arc<AtomicBool>,
}

impl Signals {
    pub(crate) fn listen() -> Result<Self, Failure> {
        Self::listen_to(&HEARD)
    }

    /// Listens to the signals of a job, too. The caller has to stop itself when it receives SIGTSTP.
    pub(crate) fn listen_with_job() -> Result<Self, Failure> {
        Self::listen_to(&[&HEARD[..], &JOB[..]].concat())
    }

    fn listen_to(heard: &[Signal]) -> Result<Self, Failure> {
        let ignored = ignored();
        let heard = heard.iter().filter(|&&signal| ignored >> (signal as i32 - 1) & 1 == 0);
        let heard = heard.chain(&[Signal::SIGCHLD]).map(|&signal| signal as i32);
        let mut signals = SignalsInfo::<WithOrigin>::new(heard)
            .map_err(|error| Failure::System("cannot listen to signals", error))?;
        let (sender, events) = unbounded_channel();
        let reaping = Arc::new(Mutex::new(()));
        let lock = Arc::clone(&reaping);
        let asked = Arc::new(AtomicBool::new(false));
        let question = Arc::clone(&asked);
        thread::spawn(move || {
            loop {
                let round = signals.wait();
                // Every signal that arrived before the question is in this round or was in an earlier one.
                let is_asked = question.swap(false, Ordering::Acquire);
                for origin in round {
                    let Ok(signal) = Signal::try_from(origin.signal) else { continue };
                    if signal == Signal::SIGCHLD {
                        let _reaping = lock.lock().unwrap_or_else(PoisonError::into_inner);
                        reap(&sender);
                        continue;
                    }
                    let from_terminal = matches!(origin.cause, Cause::Kernel);
                    if sender.send(Event::Received(Received { signal, from_terminal })).is_err() {
                        return;
                    }
                }
                if is_asked {
                    sender.send(Event::UntilNow).ok();
                }
            }
        });
        Ok(Self { events, kept: VecDeque::new(), reaping, asked })
    }

    /// Returns the signals that have arrived since the last event, to be forwarded to a child process that was just
    /// started: a key of the terminal that was pressed before the start did not reach it.
    pub(crate) async fn received_until_now(&mut self) -> Vec<Received> {
        self.asked.store(true, Ordering::Release);
        let mut received = Vec::new();
        if raise(Signal::SIGCHLD).is_err() {
            return received;
        }
        loop {
            match self.events.recv().await {
                Some(Event::Received(signal)) => received.push(signal),
                Some(Event::UntilNow) | None => return received,
                Some(event) => self.kept.push_back(event),
            }
        }
    }

    /// Starts a process. Reaping pauses until the start has succeeded or failed, because the standard library itself
    /// waits for a process that could not be started.
    pub(crate) fn spawn(&self, command: &mut std::process::Command) -> io::Result<Pid> {
        let _reaping = self.reaping.lock().unwrap_or_else(PoisonError::into_inner);
        let child = command.spawn()?;
        Ok(Pid::from_raw(child.id().cast_signed()))
    }

    /// Waits for the next event. Cancel safe.
    pub(crate) async fn event(&mut self) -> Event {
        if let Some(kept) = self.kept.pop_front() {
            return kept;
        }
        match self.events.recv().await {
            Some(event) => event,
            None => pending().await,
        }
    }

    /// Waits for the next signal. Cancel safe.
    pub(crate) async fn next(&mut self) -> Received {
        loop {
            if let Event::Received(received) = self.event().await {
                return received;
            }
        }
    }

    /// Returns the next signal, if there was one.
    pub(crate) fn try_next(&mut self) -> Option<Received> {
        loop {
            if let Event::Received(received) = self.events.try_recv().ok()? {
                return Some(received);
            }
        }
    }

    /// Polls for a signal that ends the program while it runs no command.
    pub(crate) fn poll_stop(&mut self, cx: &mut Context<'_>) -> Poll<Received> {
        loop {
            match self.events.poll_recv(cx) {
                Poll::Ready(Some(Event::Received(received)))
                    if received.is_stop() || received.is_hang_up() =>
                {
                    return Poll::Ready(received);
                }
                Poll::Ready(Some(_)) => {}
                Poll::Ready(None) | Poll::Pending => return Poll::Pending,
            }
        }
    }
}

/// Reaps the children that have ended.
fn reap(sender: &UnboundedSender<Event>) {
    loop {
        let event = match waitpid(None, Some(WaitPidFlag::WNOHANG | WaitPidFlag::WUNTRACED)) {
            Ok(WaitStatus::Exited(pid, code)) => {
                Event::Ended(pid, Exit::Code(u8::try_from(code).unwrap_or(u8::MAX)))
            }
            Ok(WaitStatus::Signaled(pid, signal, _)) => Event::Ended(pid, signal.into()),
            Ok(WaitStatus::Stopped(pid, _)) => Event::Stopped(pid),
            Ok(WaitStatus::StillAlive) => return,
            Ok(_) | Err(nix::Error::EINTR) => continue,
            Err(_) => {
                sender.send(Event::NoChildren).ok();
                return;
            }
        };
        sender.send(event).ok();
    }
}

/// Returns the mask of ignored signals, one bit per signal, as Linux shows it. Returns 0 if there is no /proc.
fn ignored() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn a_signal_that_arrives_while_children_are_reaped_is_not_missed() {
        let mut signals = Signals::listen().unwrap();
        let reaping = Arc::clone(&signals.reaping);
        let paused = reaping.lock().unwrap();
        raise(Signal::SIGCHLD).unwrap();
        // Usually enough for the thread to wait for the mutex. If it comes later, the test is only weaker.
        thread::sleep(Duration::from_millis(100));
        raise(Signal::SIGUSR1).unwrap();
        let (received, ()) = tokio::join!(signals.received_until_now(), async { drop(paused) });
        assert!(received.iter().any(|received| received.signal == Signal::SIGUSR1), "{received:?}");
    }
}
