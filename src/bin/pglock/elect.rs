//! `pglock elect`: a command that runs on one machine, as long as that leads.

use std::ffi::OsString;
use std::future::poll_fn;
use std::process::ExitStatus;
use std::sync::{Arc, OnceLock};
use std::task::Poll;
use std::time::Duration;

use clap::Args;
use nix::unistd::gethostname;
use pglock::{Election, Error, LeaderState, LeaderStatus, Leadership};
use sqlx::PgPool;
use tokio::sync::Mutex;

use crate::child::Child;
use crate::connect::{connect, disconnect};
use crate::exit::{Exit, Failure, LOST, complain, say};
use crate::run::seconds;
use crate::signals::Signals;
use crate::target::Target;

/// Run a command on one machine at a time, the leader, and on another when that fails
///
/// Waits until it is elected, and runs the command. If it does not lead any more, because the
/// connection broke or somebody ended the session, the command is sent SIGTERM, and SIGKILL if it has
/// not ended after the time of --grace. When the command has ended, it resigns, and waits to be elected again;
/// after a pause, if the command has ended within a second, or failed within a minute. The pause is one to two
/// seconds at first, and grows to a minute.
#[derive(Args, Debug)]
#[command(after_long_help = MORE)]
pub(crate) struct ElectArgs {
    /// The name of this candidate, which others see when it leads [default: the name of the host]
    #[arg(long)]
    name: Option<String>,

    /// Run the command once, and exit as it does
    #[arg(long)]
    once: bool,

    /// After a loss, how long the command may take to end before it is killed
    #[arg(long, value_name = "SECONDS", value_parser = seconds, default_value = "10")]
    grace: Duration,

    /// What is led: a number, a pair like 1,2, or a name
    #[arg(allow_negative_numbers = true)]
    key: Target,

    /// The command, and its arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
    command: Vec<OsString>,
}

const MORE: &str = "\
The command finds in its environment:
  PGLOCK_KEY    the key, as it was given
  PGLOCK_TOKEN  the term: a number greater than that of every leader before; what the command writes
                to can refuse a smaller one than the greatest it has seen

Signals: SIGINT, SIGQUIT and SIGTERM are passed on to the command; when it has ended, pglock resigns,
and exits. So it does if the command dies of a SIGHUP, SIGUSR1 or SIGUSR2 that was passed on to it.
While no command runs, SIGHUP, SIGINT, SIGQUIT and SIGTERM end pglock at once.

Exit codes:
    0  it was told to stop while no command ran, or the command died of the signal that told it
    2  the command line is wrong
   69  the database can't be reached at the start, or failed for a reason that does not pass
   71  the operating system refuses something
   78  a lock would mean nothing there: a standby, a pooler in transaction mode, wrong settings
  125  with --once: the post was lost before the command had ended
  126  with --once: the command can't be run
  127  with --once: the command was not found
otherwise that of the command; 128 and more is the number of the signal that ended it.

While nobody can be elected for a reason that passes, as a server that is restarted, it tries again
each second. As for the terminal, and what happens if pglock is killed, see `pglock run --help`.

Examples:
  pglock elect billing -- ./send-invoices --daemon
  pglock elect --name \"$POD_NAME\" --grace 30 scheduler -- ./scheduler";

pub(crate) async fn run(args: ElectArgs, url: Option<&str>) -> Result<Exit, Failure> {
    let mut signals = Signals::listen()?;
    let pool = tokio::select! {
        biased;
        () = poll_fn(|cx| signals.poll_stop(cx)) => return Ok(Exit::FINE),
        pool = connect(url) => pool?,
    };
    let ended = run_on(&pool, signals, &args).await;
    disconnect(pool).await;
    ended
}

async fn run_on(pool: &PgPool, signals: Signals, args: &ElectArgs) -> Result<Exit, Failure> {
    let name = args.name.clone().unwrap_or_else(host);
    // The command has a grace period of its own.
    let mut election = Election::new(pool, &args.key.key).candidate(name).grace(Duration::MAX);
    let status = election.status();
    let signals = Mutex::new(signals);
    // How to exit, once that is known.
    let exit = OnceLock::new();
    let stop = poll_fn(|cx| {
        if exit.get().is_some() {
            return Poll::Ready(());
        }
        // A command that runs has them.
        signals.try_lock().map_or(Poll::Pending, |mut signals| signals.poll_stop(cx))
    });
    let lead = |leadership: Arc<Leadership>| {
        let (signals, exit) = (&signals, &exit);
        async move {
            if leadership.is_stopping() {
                return Ok(());
            }
            match lead(&leadership, &mut *signals.lock().await, args).await {
                Ok(Ended::Term(status)) if status.success() => Ok(()),
                // The pause before the next term grows.
                Ok(Ended::Term(status)) => Err(format!("the command ended with {status}")),
                Ok(Ended::Program(code)) => {
                    exit.set(Ok(code)).ok();
                    Ok(())
                }
                Err(failure) => {
                    exit.set(Err(failure)).ok();
                    Ok(())
                }
            }
        }
    };
    tokio::select! {
        biased;
        ran = election.run(stop, lead) => match ran {
            // The command has failed, which was said.
            Ok(()) | Err(Error::LeaderFailed { .. }) => {}
            Err(error) => return Err(error.into()),
        },
        () = complain_of_failures(status) => {}
    }
    exit.into_inner().unwrap_or(Ok(Exit::FINE))
}

/// Says why no campaign succeeds: once, and again when something else is wrong.
async fn complain_of_failures(mut status: LeaderStatus) {
    loop {
        if let LeaderState::Failing { error, .. } = status.changed().await
            && !matches!(error, Error::LeaderFailed { .. })
        {
            complain(&error);
            say(format_args!("trying again each second"));
        }
    }
}

/// What has ended with a command.
enum Ended {
    Program(Exit),
    Term(ExitStatus),
}

/// Runs the command for a term.
async fn lead(
    leadership: &Leadership,
    signals: &mut Signals,
    args: &ElectArgs,
) -> Result<Ended, Failure> {
    let term = leadership.term();
    say(format_args!("elected, term {term}"));
    // What comes from now on, the command gets, from the terminal or from us.
    while let Some(told) = signals.try_next() {
        if told.is_stop() || told.is_hang_up() {
            return Ok(Ended::Program(Exit::FINE));
        }
    }
    let env = vec![("PGLOCK_KEY", args.key.text.clone()), ("PGLOCK_TOKEN", term.to_string())];
    let child = Child::start(&args.command, env)?;
    let ended = child.supervise(signals, leadership.lost(), args.grace).await?;
    let lost = ended.lost || {
        // It may have been lost without a notice.
        leadership.verify().await.inspect_err(|error| complain(error)).is_err()
    };
    let exit = Exit::of(ended.status);
    say(format_args!("term {term} is over; the command ended with {exit}"));
    Ok(if ended.is_stopped() {
        Ended::Program(if ended.by_what_it_was_told() { Exit::FINE } else { exit })
    } else if args.once {
        Ended::Program(if lost { Exit::Code(LOST) } else { exit })
    } else {
        Ended::Term(ended.status)
    })
}

fn host() -> String {
    gethostname()
        .ok()
        .and_then(|name| name.into_string().ok())
        .unwrap_or_else(|| format!("process-{}", std::process::id()))
}
