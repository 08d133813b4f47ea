//! `pglock elect`: runs a command on one machine at a time, while that machine leads.

use std::ffi::OsString;
use std::future::poll_fn;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::Poll;
use std::time::Duration;

use clap::Args;
use nix::sys::signal::Signal;
use pglock::{Election, Error, LeaderState, LeaderStatus, Leadership};
use sqlx::PgPool;
use tokio::sync::Mutex;

use crate::child::{self, Child, How};
use crate::connection::{CLOSING, disconnect};
use crate::database::DatabaseArgs;
use crate::exit::{Exit, Failure, LOST, complain, say};
use crate::observe;
use crate::ready::Readiness;
use crate::run::seconds;
use crate::signals::Signals;
use crate::target::{Target, application, host};

/// Run a command on one machine at a time, the leader, and on another one if that fails
///
/// Waits to be elected, and runs the command. If the leadership is lost, because the connection broke or the session
/// was ended, all that the command has started is sent SIGTERM, and SIGKILL if it has not ended after the time
/// of --grace. When the command has ended, pglock resigns, and waits to be elected again; after a pause, if
/// the command has ended within a second, or failed within a minute. The pause is one to two seconds at first, and
/// grows to a minute.
#[derive(Args, Debug)]
#[command(after_long_help = MORE)]
pub(crate) struct ElectArgs {
    /// The name of this candidate, which others see when it leads [default: the name of the host]
    #[arg(long)]
    name: Option<String>,

    /// Run the command once, and exit with its exit code
    #[arg(long)]
    once: bool,

    /// After a loss, or SIGTERM, how long the command may take to end before it is killed
    #[arg(long, value_name = "SECONDS", value_parser = seconds, default_value = "10")]
    grace: Duration,

    /// A file that exists while it leads, and its command runs; it contains the term
    #[arg(long, value_name = "PATH")]
    ready_file: Option<PathBuf>,

    /// Run this string in sh(1) when the leadership is lost, while the command is ended
    #[arg(long, value_name = "STRING")]
    on_lost: Option<String>,

    /// Run no command; print each change of the leader instead
    #[arg(long, conflicts_with_all = ["name", "once", "ready_file", "on_lost"])]
    observe: bool,

    #[command(flatten)]
    observing: observe::ObserveArgs,

    /// What is led: a number, a pair like 1,2, or a name
    #[arg(allow_negative_numbers = true)]
    key: Target,

    /// The command, and its arguments: all that follows is for the command
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    #[arg(required_unless_present = "observe", conflicts_with = "observe")]
    command: Vec<OsString>,
}

const MORE: &str = "\
The command finds in its environment:
  PGLOCK_KEY    the key, as it was given
  PGLOCK_TOKEN  the term: a number greater than that of every previous leader;
                what the command writes to can refuse a smaller one than the
                greatest it has seen

Signals: SIGINT, SIGQUIT and SIGTERM are passed on to the command; when it has
ended, pglock resigns and exits. It also exits if the command dies of a
SIGHUP, SIGUSR1 or SIGUSR2 that was passed on to it. While no command runs,
SIGHUP, SIGINT, SIGQUIT and SIGTERM end pglock at once.

Under systemd with Type=notify, the service is ready when it is first elected,
and its status shows whether it waits or leads; with TimeoutStartSec=infinity,
candidates may wait for as long as they have to.

With --observe, one line is printed for each change: the time, the name, the
term, the address and the pid of the session, or that there is no leader. With
--json it is an object: name, term, since, backend_pid, client_addr; null
without a leader. The command of --hook finds PGLOCK_KEY, PGLOCK_LEADER and
PGLOCK_TOKEN, both empty without a leader.

Exit codes:
    0  a signal stopped it while no command ran, or the command died of the
       signal that was passed on
    2  the command line or the environment is wrong
   69  the database can't be reached at the start, or failed for a reason that
       does not pass
   71  the operating system refused something
   78  a lock would exclude nothing there: a pooler in transaction mode, wrong
       settings
  125  with --once: the leadership was lost before the command had ended
  126  the command can't be run (after three terms; with --once, after the
       first)
  127  the command was not found (the same)
otherwise that of the command; 128 and more is the number of the signal that
ended it.

While no campaign succeeds for a reason that passes, such as a restart of the
server, it is retried every second. For terminals, and for what happens if
pglock is killed, see pglock run --help.

Examples:
  pglock elect billing -- ./send-invoices --daemon
  pglock elect --name \"$POD_NAME\" --grace 30 --ready-file ./leads scheduler -- ./scheduler
  pglock elect --observe --hook './route-to \"$PGLOCK_LEADER\"' billing";

/// How many terms in a row may end because the command can't be run.
const ATTEMPTS: u8 = 3;

pub(crate) async fn run(args: ElectArgs, database: DatabaseArgs) -> Result<Exit, Failure> {
    if !args.observe && args.observing.is_given() {
        return Err(Failure::Usage("--json and --hook are for --observe".to_owned()));
    }
    // This is first, because it removes a file that an earlier process has left.
    let ready = (!args.observe).then(|| Readiness::new(args.ready_file.clone(), &args.key));
    let verb = if args.observe { "observe" } else { "elect" };
    let database = database.database(&application(verb, &args.key.text, args.command.first()))?;
    let mut signals = Signals::listen()?;
    let pool = tokio::select! {
        biased;
        received = poll_fn(|cx| signals.poll_stop(cx)) => {
            return Ok(stopped(args.observe, received.signal));
        }
        pool = database.pool(None) => pool?,
    };
    let signals = Mutex::new(signals);
    let ended = match ready {
        Some(ready) => run_on(&pool, &signals, &args, ready).await,
        None => observe::run(&pool, &mut *signals.lock().await, &args.key, &args.observing).await,
    };
    disconnect(pool, &mut *signals.lock().await, CLOSING).await;
    ended
}

/// Returns the exit code after a signal to stop: success for a candidate, which has done its job, but the signal for an
/// observer, whose list is cut off.
fn stopped(observes: bool, signal: Signal) -> Exit {
    if observes { signal.into() } else { Exit::FINE }
}

async fn run_on(
    pool: &PgPool,
    signals: &Mutex<Signals>,
    args: &ElectArgs,
    ready: Readiness,
) -> Result<Exit, Failure> {
    let name = args.name.clone().unwrap_or_else(host);
    // The election has no grace period of its own, because `supervise` applies the one of the command.
    let mut election = Election::new(pool, &args.key.key).candidate(name).grace(Duration::MAX);
    let status = election.status();
    // The exit code of the program, once it is known.
    let exit = OnceLock::new();
    let stop = poll_fn(|cx| {
        if exit.get().is_some() {
            return Poll::Ready(());
        }
        // While a command runs, `lead` holds the mutex of the signals.
        signals.try_lock().map_or(Poll::Pending, |mut signals| signals.poll_stop(cx).map(|_| ()))
    });
    let failed = AtomicU8::new(0);
    let lead = |leadership: Arc<Leadership>| {
        let (exit, ready, failed) = (&exit, &ready, &failed);
        async move {
            if leadership.is_stopping() {
                return Ok(());
            }
            let ended = lead(&leadership, &mut *signals.lock().await, args, ready).await;
            ready.waits();
            let exit_code = match ended {
                Ok(Ended::Term(code @ Exit::Code(126 | 127)))
                    if failed.fetch_add(1, Ordering::Relaxed) + 1 == ATTEMPTS =>
                {
                    Ok(code)
                }
                Ok(Ended::Term(ended)) => {
                    if !matches!(ended, Exit::Code(126 | 127)) {
                        failed.store(0, Ordering::Relaxed);
                    }
                    // An error makes the pause before the next term grow.
                    let failure = || Err(format!("the command ended with {ended}"));
                    return if ended.is_success() { Ok(()) } else { failure() };
                }
                Ok(Ended::Program(code)) => Ok(code),
                Err(failure) => Err(failure),
            };
            exit.set(exit_code).ok();
            Ok(())
        }
    };
    tokio::select! {
        biased;
        ran = election.run(stop, lead) => match ran {
            // The command has failed, which was reported.
            Ok(()) | Err(Error::LeaderFailed { .. }) => {}
            Err(error) => return Err(error.into()),
        },
        () = report(status) => {}
    }
    exit.into_inner().unwrap_or(Ok(Exit::FINE))
}

/// Reports why no campaign succeeds, each time that the reason changes.
async fn report(mut status: LeaderStatus) {
    loop {
        match status.changed().await {
            LeaderState::Failing { error, .. } if !matches!(error, Error::LeaderFailed { .. }) => {
                complain(&error);
                say(format_args!("retrying every second"));
            }
            LeaderState::Waiting => tracing::info!("waiting to be elected"),
            // `lead` reports the start and the end of a term.
            LeaderState::Failing { .. } | LeaderState::Idle | LeaderState::Leading { .. } | _ => {}
        }
    }
}

/// What ends with a command: the whole program, or only the term.
enum Ended {
    Program(Exit),
    Term(Exit),
}

/// Runs the command for a term.
async fn lead(
    leadership: &Leadership,
    signals: &mut Signals,
    args: &ElectArgs,
    ready: &Readiness,
) -> Result<Ended, Failure> {
    let term = leadership.term();
    say(format_args!("elected, term {term}"));
    // A signal to stop that arrived before this point ends the program. Later signals are for the command.
    while let Some(received) = signals.try_next() {
        if received.is_stop() || received.is_hang_up() {
            return Ok(Ended::Program(Exit::FINE));
        }
    }
    let env = vec![("PGLOCK_KEY", args.key.text.clone()), ("PGLOCK_TOKEN", term.to_string())];
    let how = How {
        key: args.key.text.clone(),
        env: env.clone(),
        wait_descendants: false,
        grace: args.grace,
        remove: args.ready_file.clone(),
    };
    // Called before the command starts, so that a failure here does not end a running command.
    ready.leads(term)?;
    let ended = match Child::start(&args.command, &how, signals)? {
        Ok(child) => {
            let on_loss = |signals: &Signals| {
                if let Some(script) = &args.on_lost {
                    child::start_hook(script, &env, signals);
                }
            };
            child.supervise(signals, leadership.lost(), on_loss).await
        }
        Err(exit) => child::Ended { exit, lost: false, received: Vec::new() },
    };
    let lost = ended.lost || {
        // The leadership may have been lost without a notification.
        leadership.verify().await.inspect_err(|error| complain(error)).is_err()
    };
    say(format_args!("term {term} is over; the command ended with {}", ended.exit));
    Ok(if ended.is_stopped() {
        Ended::Program(if ended.by_what_it_received() { Exit::FINE } else { ended.exit })
    } else if args.once {
        Ended::Program(if lost { Exit::Code(LOST) } else { ended.exit })
    } else {
        Ended::Term(ended.exit)
    })
}
