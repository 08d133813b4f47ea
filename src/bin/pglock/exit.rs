//! How the program ends: the exit codes, and what is said on standard error.

use std::error::Error;
use std::fmt;
use std::io::{self, Write, stderr, stdout};
use std::os::unix::process::ExitStatusExt;
use std::process::{ExitCode, ExitStatus};

use nix::sys::signal::Signal;

/// The database can't be reached, or failed. `EX_UNAVAILABLE` of sysexits.h.
const UNAVAILABLE: u8 = 69;

/// The operating system refuses something. `EX_OSERR`.
const SYSTEM: u8 = 71;

/// A lock would mean nothing there. `EX_CONFIG`.
const CONFIGURATION: u8 = 78;

/// The lock was lost while the command ran.
pub(crate) const LOST: u8 = 125;

/// How the program ends.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Exit {
    Code(u8),
    /// As one that a signal has ended, whether or not it did.
    Signal(i32),
}

impl Exit {
    pub(crate) const FINE: Self = Self::Code(0);

    /// As clap says it.
    pub(crate) const USAGE: Self = Self::Code(2);

    /// As a command has ended.
    pub(crate) fn of(status: ExitStatus) -> Self {
        match (status.code(), status.signal()) {
            (Some(code), _) => Self::Code(u8::try_from(code).unwrap_or(u8::MAX)),
            (None, signal) => Self::Signal(signal.unwrap_or_default()),
        }
    }

    /// Ends the program.
    ///
    /// By a number, as a shell tells of its commands. Only by SIGINT it really ends, for a shell looks
    /// at that to know whether the loop is to go on in which this program runs.
    pub(crate) fn leave(self) -> ExitCode {
        match self {
            Self::Code(code) => ExitCode::from(code),
            Self::Signal(signal) => {
                if signal == Signal::SIGINT as i32 {
                    // It does not return, and if it does, the number says the same.
                    drop(signal_hook::low_level::emulate_default_handler(signal));
                }
                ExitCode::from(u8::try_from(128 + signal).unwrap_or(u8::MAX))
            }
        }
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Code(code) => write!(f, "exit code {code}"),
            Self::Signal(number) => match Signal::try_from(number) {
                Ok(signal) => f.write_str(signal.as_str()),
                Err(_) => write!(f, "signal {number}"),
            },
        }
    }
}

impl From<Signal> for Exit {
    fn from(signal: Signal) -> Self {
        Self::Signal(signal as i32)
    }
}

impl From<Failure> for Exit {
    /// Says what went wrong, and what that comes to.
    fn from(failure: Failure) -> Self {
        complain(&failure);
        Self::Code(match failure {
            Failure::Lock(
                pglock::Error::InvalidArgument { .. }
                | pglock::Error::NoExclusion { .. }
                | pglock::Error::SettingsRejected { .. }
                | pglock::Error::Standby { .. },
            )
            | Failure::Url(_) => CONFIGURATION,
            Failure::Connect(_) | Failure::Inspect(_) | Failure::Lock(_) => UNAVAILABLE,
            Failure::System(..) => SYSTEM,
        })
    }
}

/// Why the program did not do what it was asked.
#[derive(Debug)]
pub(crate) enum Failure {
    Connect(sqlx::Error),
    Inspect(sqlx::Error),
    Lock(pglock::Error),
    /// What could not be done, and what the operating system said.
    System(&'static str, io::Error),
    Url(sqlx::Error),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connect(_) => f.write_str(
                "cannot connect to the database; check --url, DATABASE_URL or PGHOST, that the \
                 server runs, and the login",
            ),
            Self::Inspect(_) => {
                f.write_str("cannot ask the database for its locks; its own message says why")
            }
            Self::Lock(error) => error.fmt(f),
            Self::System(what, _) => f.write_str(what),
            Self::Url(_) => f.write_str(
                "cannot read the URL of the database; it looks like postgres://user@host/database",
            ),
        }
    }
}

impl Error for Failure {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Connect(error) | Self::Inspect(error) | Self::Url(error) => Some(error),
            Self::Lock(error) => error.source(),
            Self::System(_, error) => Some(error),
        }
    }
}

impl From<pglock::Error> for Failure {
    fn from(error: pglock::Error) -> Self {
        Self::Lock(error)
    }
}

/// Prints what was asked for on standard output.
pub(crate) fn print(text: &[u8]) -> Result<Exit, Failure> {
    let printed = stdout().write_all(text).and_then(|()| stdout().flush());
    printed.map(|()| Exit::FINE).map_err(|error| Failure::System("cannot print", error))
}

/// Says an error and what is behind it, in one line on standard error.
pub(crate) fn complain(error: &dyn Error) {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let reason = error.to_string();
        // Some errors of others repeat what is behind them.
        if !line.ends_with(&reason) {
            line = format!("{line}: {reason}");
        }
        source = error.source();
    }
    say(format_args!("{line}"));
}

/// Says something on standard error. That nobody may hear it is no reason to stop.
pub(crate) fn say(what: fmt::Arguments<'_>) {
    drop(writeln!(stderr(), "pglock: {what}"));
}
