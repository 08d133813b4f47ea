//! `pglock elect`: a command that runs on one machine, as long as that leads.

use std::error::Error as _;
use std::ffi::OsString;
use std::time::Duration;

use clap::Args;
use nix::unistd::gethostname;
use pglock::{Election, Leadership, Result};
use sqlx::PgPool;
use tokio::time::sleep;

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
/// not ended after the time of --grace. When the command has ended, whatever its exit code, it
/// resigns, and after a second it waits to be elected again.
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

/// How long to wait between two turns, and before a campaign is tried again that failed.
const AGAIN: Duration = Duration::from_secs(1);

pub(crate) async fn run(args: ElectArgs, url: Option<&str>) -> Result<Exit, Failure> {
    let mut signals = Signals::listen()?;
    let pool = tokio::select! {
        biased;
        () = told_to_stop(&mut signals) => return Ok(Exit::FINE),
        pool = connect(url) => pool?,
    };
    let ended = run_on(&pool, &mut signals, &args).await;
    disconnect(pool).await;
    ended
}

async fn run_on(pool: &PgPool, signals: &mut Signals, args: &ElectArgs) -> Result<Exit, Failure> {
    let name = args.name.clone().unwrap_or_else(host);
    let mut election = Election::new(pool, &args.key.key).candidate(name);
    loop {
        let leadership = tokio::select! {
            biased;
            () = told_to_stop(signals) => return Ok(Exit::FINE),
            elected = campaign(&mut election) => elected?,
        };
        if let Some(exit) = lead(leadership, signals, args).await? {
            return Ok(exit);
        }
        tokio::select! {
            biased;
            () = told_to_stop(signals) => return Ok(Exit::FINE),
            () = sleep(AGAIN) => {}
        }
    }
}

/// Waits to be elected. What fails for a reason that passes, is tried again.
async fn campaign(election: &mut Election) -> Result<Leadership> {
    let mut complaint = None;
    loop {
        match election.campaign().await {
            Err(error) if error.is_transient() => {
                // Once, and again when something else is wrong.
                let reason = (error.to_string(), error.source().map(ToString::to_string));
                if complaint.as_ref() != Some(&reason) {
                    complain(&error);
                    say(format_args!("trying again each second"));
                    complaint = Some(reason);
                }
                sleep(AGAIN).await;
            }
            result => return result,
        }
    }
}

/// Runs the command for a turn. Returns how to exit, if that was the last.
async fn lead(
    leadership: Leadership,
    signals: &mut Signals,
    args: &ElectArgs,
) -> Result<Option<Exit>, Failure> {
    let term = leadership.term();
    say(format_args!("elected, term {term}"));
    // What comes from now on, the command gets, from the terminal or from us.
    while let Some(told) = signals.try_next() {
        if told.is_stop() || told.is_hang_up() {
            leadership.resign().await?;
            return Ok(Some(Exit::FINE));
        }
    }
    let env = vec![("PGLOCK_KEY", args.key.text.clone()), ("PGLOCK_TOKEN", term.to_string())];
    let child = Child::start(&args.command, env)?;
    let ended = child.supervise(signals, leadership.lost(), args.grace).await?;
    let lost = ended.lost || {
        let resigned = leadership.resign().await;
        // It may have been lost already, and nobody knew.
        resigned.inspect_err(|error| complain(error)).is_err()
    };
    let exit = Exit::of(ended.status);
    say(format_args!("term {term} is over; the command ended with {exit}"));
    Ok(if ended.is_stopped() {
        Some(if ended.by_what_it_was_told() { Exit::FINE } else { exit })
    } else {
        args.once.then_some(if lost { Exit::Code(LOST) } else { exit })
    })
}

/// Waits for a signal that ends a program that has no command to pass it on to.
async fn told_to_stop(signals: &mut Signals) {
    loop {
        let told = signals.next().await;
        if told.is_stop() || told.is_hang_up() {
            return;
        }
    }
}

fn host() -> String {
    gethostname()
        .ok()
        .and_then(|name| name.into_string().ok())
        .unwrap_or_else(|| format!("process-{}", std::process::id()))
}
