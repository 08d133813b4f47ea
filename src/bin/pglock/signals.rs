//! The signals that are not for this program, but for the command that it runs.

use std::fs;
use std::future::pending;
use std::task::{Context, Poll};
use std::thread;

use nix::sys::signal::Signal;
use signal_hook::iterator::SignalsInfo;
use signal_hook::iterator::exfiltrator::WithOrigin;
use signal_hook::low_level::siginfo::Cause;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use crate::exit::Failure;

const HEARD: [Signal; 6] = [
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGTERM,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
];

/// A signal that this process was sent.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Told {
    pub(crate) signal: Signal,
    /// The kernel sent it, for the terminal: to the whole foreground process group, so the command has
    /// it already.
    pub(crate) by_terminal: bool,
}

impl Told {
    /// Whether it asks a process to end, and for nothing else.
    pub(crate) fn is_stop(self) -> bool {
        matches!(self.signal, Signal::SIGINT | Signal::SIGQUIT | Signal::SIGTERM)
    }

    /// Whether it ends a process that has nothing to read anew.
    pub(crate) fn is_hang_up(self) -> bool {
        self.signal == Signal::SIGHUP
    }
}

/// The signals that this process is sent, from now on.
///
/// What was ignored when the program started stays ignored, here and by the command: nohup(1), and
/// shells that put a job into the background, count on it.
#[derive(Debug)]
pub(crate) struct Signals(UnboundedReceiver<Told>);

impl Signals {
    pub(crate) fn listen() -> Result<Self, Failure> {
        let ignored = ignored();
        let heard = HEARD.iter().filter(|&&signal| ignored >> (signal as i32 - 1) & 1 == 0);
        let mut signals = SignalsInfo::<WithOrigin>::new(heard.map(|&signal| signal as i32))
            .map_err(|error| Failure::System("cannot listen to signals", error))?;
        let (tell, told) = unbounded_channel();
        thread::spawn(move || {
            for origin in signals.forever() {
                let Ok(signal) = Signal::try_from(origin.signal) else { continue };
                let by_terminal = matches!(origin.cause, Cause::Kernel);
                if tell.send(Told { signal, by_terminal }).is_err() {
                    return;
                }
            }
        });
        Ok(Self(told))
    }

    /// Waits for the next signal.
    pub(crate) async fn next(&mut self) -> Told {
        match self.0.recv().await {
            Some(told) => told,
            None => pending().await,
        }
    }

    /// Waits for a signal that ends a program that has no command to pass it on to.
    pub(crate) fn poll_stop(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            match self.0.poll_recv(cx) {
                Poll::Ready(Some(told)) if told.is_stop() || told.is_hang_up() => {
                    return Poll::Ready(());
                }
                Poll::Ready(Some(_)) => {}
                Poll::Ready(None) | Poll::Pending => return Poll::Pending,
            }
        }
    }

    /// The next signal, if there was one.
    pub(crate) fn try_next(&mut self) -> Option<Told> {
        self.0.try_recv().ok()
    }
}

/// The signals that are ignored, a bit each, as Linux tells of a process. None where it does not.
fn ignored() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or_default()
}
