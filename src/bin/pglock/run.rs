//! `pglock run`: runs a command while it holds a lock.

use std::ffi::OsString;
use std::future::poll_fn;
use std::pin::pin;
use std::time::{Duration, Instant};

use clap::Args;
use sqlx::PgPool;
use tokio::time::timeout;

use crate::acquire::{Held, SLACK, Wanted, acquire};
use crate::child::{Child, How};
use crate::connection::{CLOSING, disconnect};
use crate::database::DatabaseArgs;
use crate::exit::{Exit, Failure, LOST, complain};
use crate::signals::Signals;
use crate::target::{Target, application};

/// Run a command while a lock is held: flock(1) for all machines together
///
/// Waits for the lock, runs the command, and releases the lock when the command has ended. If the lock is lost
/// before, because the connection broke or the session was ended, all that the command has started is sent SIGTERM,
/// and SIGKILL if it has not ended after the time of --grace. Then pglock exits with 125.
#[derive(Args, Debug)]
#[command(after_long_help = MORE)]
#[expect(clippy::struct_excessive_bools, reason = "they are flags")]
pub(crate) struct RunArgs {
    /// Hold the lock alone (the default)
    #[arg(short = 'x', long, visible_short_alias = 'e', conflicts_with_all = ["shared", "permits"])]
    exclusive: bool,

    /// Hold the lock together with other shared holders
    #[arg(short, long, conflicts_with = "permits")]
    shared: bool,

    /// Hold one of N permits of a semaphore; of different numbers, the largest counts
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    permits: Option<u16>,

    /// Don't wait for a lock that is not free
    #[arg(short, long, visible_alias = "nb", alias = "nonblock", conflicts_with = "wait")]
    no_wait: bool,

    /// Wait at most this long, the connecting included; fractions are allowed
    #[arg(short, long, visible_alias = "timeout", value_name = "SECONDS", value_parser = seconds)]
    wait: Option<Duration>,

    /// The exit code if the lock was not acquired
    #[arg(
        short = 'E',
        long,
        visible_alias = "conflict-exit-code",
        value_name = "CODE",
        default_value_t = 1
    )]
    exit_code: u8,

    /// Fail if the database fails while the lock is waited for, instead of waiting until it is back
    #[arg(long)]
    no_retry: bool,

    /// Hold the lock until all processes that the command has started have ended, as flock(1) does
    #[arg(long)]
    wait_descendants: bool,

    /// After a loss, or SIGTERM, how long the command may take to end before it is killed
    #[arg(long, value_name = "SECONDS", value_parser = seconds, default_value = "10")]
    grace: Duration,

    /// Run this string in sh(1)
    #[arg(short = 'c', long = "command", value_name = "STRING", conflicts_with = "command")]
    script: Option<OsString>,

    /// The lock: a number, a pair like 1,2, or a name
    #[arg(allow_negative_numbers = true)]
    key: Target,

    /// The command, and its arguments: all that follows is for the command
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required_unless_present = "script")]
    command: Vec<OsString>,
}

const MORE: &str = "\
The command finds in its environment:
  PGLOCK_KEY    the key, as it was given
  PGLOCK_TOKEN  a number greater than that of every previous holder; what the
                command writes to can refuse a smaller one than the greatest
                it has seen
  PGLOCK_SLOT   with --permits, the number of the permit, from 0; no other
                holder has it

Exit codes, beside those of the command:
    1  the lock was not acquired (-n, -w); another code with -E
    2  the command line or the environment is wrong
   69  the database can't be reached, or failed
   71  the operating system refused something
   78  a lock would exclude nothing there: a standby, a pooler in transaction
       mode, wrong settings
  125  the lock was lost before the command had ended; nothing of the command
       runs any more
  126  the command can't be run
  127  the command was not found
  128  and more: the number of the signal that ended the command, or the wait
       for the lock

Processes: if the lock is lost, pglock ends all that the command has started,
daemons and processes in other process groups included, and exits after the
last one has ended. If pglock is killed (SIGKILL), all of it is killed. That
is so on Linux with /proc; elsewhere, only the command itself is ended, and
nothing if pglock is killed. What runs with the rights of another user, as
with sudo(8), can't be killed; pglock waits for it. By default the lock is
released when the command itself has ended, and what it leaves in the
background continues without the lock; with --wait-descendants, the lock is
held for that, too.

Signals: SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1 and SIGUSR2 are passed on
to the command; while the lock is waited for, they end the wait. After
SIGTERM, the command has the time of --grace before all that it has started is
killed. The keys of a terminal (^C) reach the command from the terminal. ^Z
stops all of it: pglock, the command, and all that it has started. A pglock
that is stopped for more than 4 s can't know whether the lock is still held:
when it continues, the lock counts as lost.

A wait survives a restart of the server, unless --no-retry is given; its place
in the queue is lost. At the start, the database has to be there. With -n,
connecting is limited by --connect-timeout only.

Examples:
  pglock run nightly-report -- ./report.sh
  pglock run -n backup -- ./backup.sh
  pglock run -w 2.5 -E 75 deploy -- make deploy
  pglock run -c 'date >> log' deploy
  pglock run --permits 3 encoders -- sh -c 'exec encode --gpu \"$PGLOCK_SLOT\"'";

pub(crate) async fn run(mut args: RunArgs, database: DatabaseArgs) -> Result<Exit, Failure> {
    if let Some(script) = args.script.take() {
        args.command = vec!["sh".into(), "-c".into(), script];
    }
    let name = application("run", &args.key.text, args.command.first());
    let database = database.database(&name)?;
    let mut signals = Signals::listen()?;
    let wanted = args.wanted();
    let pool = tokio::select! {
        biased;
        received = signals.next() => return Ok(received.signal.into()),
        pool = database.pool(wanted.remaining()) => pool?,
    };
    let (ended, limit) = match wait(&pool, &mut signals, &args, &wanted).await {
        Ok(Ok(held)) => (run_under(held, &mut signals, args).await, CLOSING),
        Ok(Err(exit)) => (Ok(exit), wanted.closing_limit()),
        Err(failure) => (Err(failure), wanted.closing_limit()),
    };
    disconnect(pool, &mut signals, limit).await;
    ended
}

/// Waits for the lock. The inner `Err` is the exit code if the lock was not acquired.
async fn wait(
    pool: &PgPool,
    signals: &mut Signals,
    args: &RunArgs,
    wanted: &Wanted,
) -> Result<Result<Held, Exit>, Failure> {
    let acquired = tokio::select! {
        biased;
        received = signals.next() => return Ok(Err(received.signal.into())),
        acquired = acquire(pool, wanted) => acquired?,
    };
    if acquired.is_none() {
        tracing::info!("{} is held by another session", args.key);
    }
    Ok(acquired.ok_or(Exit::Code(args.exit_code)))
}

/// Runs the command, and releases the lock.
async fn run_under(held: Held, signals: &mut Signals, args: RunArgs) -> Result<Exit, Failure> {
    let Held { guard, token, slot } = held;
    tracing::info!("acquired {}, token {token}", args.key);
    let mut env = vec![("PGLOCK_KEY", args.key.text.clone()), ("PGLOCK_TOKEN", token.to_string())];
    env.extend(slot.map(|slot| ("PGLOCK_SLOT", slot.to_string())));
    // A signal that arrived before this point ends the program. Later signals are for the command.
    if let Some(received) = signals.try_next() {
        guard.release().await?;
        return Ok(received.signal.into());
    }
    let how = How {
        key: args.key.text.clone(),
        env,
        wait_descendants: args.wait_descendants,
        grace: args.grace,
        remove: None,
    };
    let child = match Child::start(&args.command, &how, signals)? {
        Ok(child) => child,
        Err(exit) => {
            guard.release().await?;
            return Ok(exit);
        }
    };
    let ended = child.supervise(signals, guard.lost(), |_| ()).await;
    tracing::info!("the command ended with {}", ended.exit);
    if ended.lost {
        return Ok(Exit::Code(LOST));
    }
    // The signals until now were for the command.
    while signals.try_next().is_some() {}
    let mut releasing = pin!(guard.release());
    // The release also detects a loss of which the guard was not notified.
    let released = tokio::select! {
        biased;
        released = &mut releasing => released,
        received = poll_fn(|cx| signals.poll_stop(cx)) => {
            // After a signal to stop, does not wait long for a server that does not answer.
            match timeout(SLACK, releasing).await {
                Ok(released) => released,
                Err(_) => return Ok(received.signal.into()),
            }
        }
    };
    match released {
        Ok(()) => {
            tracing::info!("released {}", args.key);
            Ok(ended.exit)
        }
        Err(error) => {
            complain(&error);
            Ok(Exit::Code(LOST))
        }
    }
}

impl RunArgs {
    fn wanted(&self) -> Wanted {
        Wanted {
            key: self.key.clone(),
            shared: self.shared,
            permits: self.permits.map(usize::from),
            limit: if self.no_wait { Some(Duration::ZERO) } else { self.wait },
            retry: !self.no_retry,
            started: Instant::now(),
        }
    }
}

/// Thirty years, to which longer times are shortened, because an `Instant` plus the longest `Duration` overflows.
pub(crate) const LONGEST: Duration = Duration::from_secs(1_000_000_000);

/// Reads a time in seconds from the command line.
pub(crate) fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number of seconds".to_owned())?;
    let duration = Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())?;
    Ok(duration.min(LONGEST))
}
