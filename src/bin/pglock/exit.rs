//! How the program ends: the exit codes, and what it prints on standard error.

use std::error::Error;
use std::fmt;
use std::io::{self, Write, stderr, stdout};
use std::process::{self, ExitCode};
use std::sync::Arc;

use nix::sys::signal::Signal;

/// The database can't be reached, or failed. `EX_UNAVAILABLE` of sysexits.h.
const UNAVAILABLE: u8 = 69;

/// The operating system refuses something. `EX_OSERR`.
const SYSTEM: u8 = 71;

/// A lock would exclude nothing on the server. `EX_CONFIG`.
const CONFIGURATION: u8 = 78;

/// The lock was lost while the command ran.
pub(crate) const LOST: u8 = 125;

/// How the program ends.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Exit {
    Code(u8),
    /// Exits like a process that this signal has ended.
    Signal(i32),
}

impl Exit {
    pub(crate) const FINE: Self = Self::Code(0);

    /// The command line or the environment is wrong. clap uses the same code.
    pub(crate) const USAGE: Self = Self::Code(2);

    /// Returns whether the command or the wait succeeded.
    pub(crate) fn is_success(self) -> bool {
        self == Self::FINE
    }

    /// Ends the program.
    ///
    /// For a signal, returns the exit code that a shell reports for a command that the signal has ended. Only SIGINT
    /// really ends the process, because a shell that runs a loop ends the loop only then. The first process of a
    /// container can't be ended by a signal.
    pub(crate) fn leave(self) -> ExitCode {
        match self {
            Self::Code(code) => ExitCode::from(code),
            Self::Signal(signal) => {
                if signal == Signal::SIGINT as i32 && process::id() != 1 {
                    // This returns only if it fails. The exit code below has the same meaning.
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
    /// Reports what went wrong, and returns the exit code for it.
    fn from(failure: Failure) -> Self {
        complain(&failure);
        Self::Code(match failure {
            Failure::Lock(
                pglock::Error::InvalidArgument { .. }
                | pglock::Error::NoExclusion { .. }
                | pglock::Error::SettingsRejected { .. }
                | pglock::Error::Standby { .. },
            ) => CONFIGURATION,
            Failure::Connect { .. } | Failure::Lock(_) | Failure::Unanswered(..) => UNAVAILABLE,
            Failure::System(..) => SYSTEM,
            Failure::Usage(_) => return Self::USAGE,
        })
    }
}

/// Why the program did not do what it was asked for.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The connection to this server failed.
    Connect {
        error: sqlx::Error,
        server: String,
    },
    Lock(pglock::Error),
    /// The operation that failed, and the error of the operating system.
    System(&'static str, io::Error),
    /// The server did not answer in time whether this lock is free. The error contains the limit.
    Unanswered(String, sqlx::Error),
    /// The command line or the environment is wrong.
    Usage(String),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connect { server, .. } => write!(
                f,
                "cannot connect to {server}; check --url, DATABASE_URL or PGHOST, that the server \
                 runs, and the login"
            ),
            Self::Lock(error) => error.fmt(f),
            Self::System(what, _) => f.write_str(what),
            Self::Unanswered(key, _) => write!(
                f,
                "cannot determine whether the lock {key} is free; check the server and the network"
            ),
            Self::Usage(what) => f.write_str(what),
        }
    }
}

impl Error for Failure {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Connect { error, .. } | Self::Unanswered(_, error) => Some(error),
            Self::Lock(error) => error.source(),
            Self::System(_, error) => Some(error),
            Self::Usage(_) => None,
        }
    }
}

impl From<pglock::Error> for Failure {
    fn from(error: pglock::Error) -> Self {
        Self::Lock(error)
    }
}

/// Prints on standard output. Returns `false` if the reader has closed it, as `head` does.
pub(crate) fn print(text: &[u8]) -> Result<bool, Failure> {
    match stdout().write_all(text).and_then(|()| stdout().flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(Failure::System("cannot print", error)),
    }
}

/// Reports an error and its causes, in one line on standard error.
pub(crate) fn complain(error: &dyn Error) {
    say(format_args!("{}", chain(error)));
}

/// Formats an error and its causes, in one line.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        // Uses only the message, because sqlx's text of a database error has the line of the server's source code too.
        let database = sqlx_error(error).and_then(sqlx::Error::as_database_error);
        let reason = database.map_or_else(|| error.to_string(), |error| error.message().to_owned());
        // Some errors of other crates already contain their cause.
        if !line.ends_with(&reason) {
            line = format!("{line}: {reason}");
        }
        source = error.source();
    }
    line
}

/// Returns the driver's error, which the library's errors share.
fn sqlx_error<'e>(error: &'e (dyn Error + 'static)) -> Option<&'e sqlx::Error> {
    error.downcast_ref().or_else(|| error.downcast_ref::<Arc<_>>().map(Arc::as_ref))
}

/// Prints a line on standard error. Ignores a failure, because standard error may be closed.
pub(crate) fn say(what: fmt::Arguments<'_>) {
    // Written in one piece, so that the lines of several processes do not mix.
    drop(stderr().write_all(format!("pglock: {what}\n").as_bytes()));
}
