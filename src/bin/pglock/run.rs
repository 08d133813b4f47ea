//! `pglock run`: a command that runs while a lock is held.

use std::ffi::OsString;
use std::time::Duration;

use clap::Args;
use pglock::{Error, ExclusiveGuard, Lock, Loss, Permit, Result, Semaphore, SharedGuard};
use sqlx::PgPool;

use crate::child::Child;
use crate::connect::{connect, disconnect};
use crate::exit::{Exit, Failure, LOST, complain};
use crate::signals::Signals;
use crate::target::Target;

/// Run a command while a lock is held, as flock(1) does, but for all machines together
///
/// Waits for the lock, runs the command, and releases the lock when the command has ended. If the lock
/// is lost before, because the connection broke or somebody ended the session, the command is sent
/// SIGTERM, and SIGKILL if it has not ended after the time of --grace.
#[derive(Args, Debug)]
#[command(after_long_help = MORE)]
pub(crate) struct RunArgs {
    /// Hold the lock together with others who do so too
    #[arg(short, long, conflicts_with = "permits")]
    shared: bool,

    /// Hold one of so many permits of a semaphore; of different numbers, the largest counts
    #[arg(short, long, value_name = "N")]
    permits: Option<usize>,

    /// Don't wait for a lock that is not free
    #[arg(short, long, visible_alias = "nb", alias = "nonblock", conflicts_with = "wait")]
    no_wait: bool,

    /// Wait for so long at most; fractions are allowed
    #[arg(short, long, visible_alias = "timeout", value_name = "SECONDS", value_parser = seconds)]
    wait: Option<Duration>,

    /// The exit code if the lock was not got
    #[arg(
        short = 'E',
        long,
        visible_alias = "conflict-exit-code",
        value_name = "CODE",
        default_value_t = 1
    )]
    exit_code: u8,

    /// After a loss, how long the command may take to end before it is killed
    #[arg(long, value_name = "SECONDS", value_parser = seconds, default_value = "10")]
    grace: Duration,

    /// What is locked: a number, a pair like 1,2, or a name
    #[arg(allow_negative_numbers = true)]
    key: Target,

    /// The command, and its arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
    command: Vec<OsString>,
}

const MORE: &str = "\
The command finds in its environment:
  PGLOCK_KEY    the key, as it was given
  PGLOCK_TOKEN  a number greater than that of every holder before; what the command writes to can
                refuse a smaller one than the greatest it has seen
  PGLOCK_SLOT   with --permits, the number of the permit, from 0; nobody else has it

Exit codes, beside those of the command:
    1  the lock was not got (-n, -w); another with -E
    2  the command line is wrong
   69  the database can't be reached, or failed
   71  the operating system refuses something
   78  a lock would mean nothing there: a standby, a pooler in transaction mode, wrong settings
  125  the lock was lost before the command had ended, however that ended
  126  the command can't be run
  127  the command was not found
  128  and more: the number of the signal that ended the command, or the wait for the lock

Signals: SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1 and SIGUSR2 are passed on to the command; while
the lock is waited for, they end the wait. What the terminal sends (^C), the command gets from
the terminal. Only the command itself is told and waited for: a script should end what it has
started, or exec its last command.

The command is in the same process group, so ^Z stops both. A pglock that stands still for more than
4 s can't know whether the lock is still held: when it goes on, the lock counts as lost.

If pglock is killed (SIGKILL), the lock is free at once. On Linux the command is killed with it,
unless it runs with the rights of another user, as sudo(8) does; elsewhere it goes on.

Examples:
  pglock run nightly-report -- ./report.sh
  pglock run -n backup -- ./backup.sh
  pglock run -w 2.5 -E 75 deploy -- make deploy
  pglock run --permits 3 encoders -- sh -c 'exec encode --gpu \"$PGLOCK_SLOT\"'";

/// A lock that is held.
enum Held {
    Exclusive(ExclusiveGuard),
    Shared(SharedGuard),
    Permit(Permit),
}

pub(crate) async fn run(args: RunArgs, url: Option<&str>) -> Result<Exit, Failure> {
    let mut signals = Signals::listen()?;
    let pool = tokio::select! {
        biased;
        told = signals.next() => return Ok(told.signal.into()),
        pool = connect(url) => pool?,
    };
    let ended = run_on(&pool, &mut signals, args).await;
    disconnect(pool).await;
    ended
}

async fn run_on(pool: &PgPool, signals: &mut Signals, args: RunArgs) -> Result<Exit, Failure> {
    let acquired = tokio::select! {
        biased;
        told = signals.next() => return Ok(told.signal.into()),
        acquired = args.acquire(pool) => acquired?,
    };
    let Some((held, token)) = acquired else { return Ok(Exit::Code(args.exit_code)) };
    let mut env = vec![("PGLOCK_KEY", args.key.text), ("PGLOCK_TOKEN", token.to_string())];
    if let Held::Permit(permit) = &held {
        env.push(("PGLOCK_SLOT", permit.slot().to_string()));
    }
    // What comes from now on, the command gets, from the terminal or from us.
    if let Some(told) = signals.try_next() {
        held.release().await?;
        return Ok(told.signal.into());
    }
    let child = Child::start(&args.command, env)?;
    let ended = child.supervise(signals, held.lost(), args.grace).await?;
    if ended.lost {
        return Ok(Exit::Code(LOST));
    }
    // It may have been lost already, and nobody knew.
    match held.release().await {
        Ok(()) => Ok(Exit::of(ended.status)),
        Err(error) => {
            complain(&error);
            Ok(Exit::Code(LOST))
        }
    }
}

impl RunArgs {
    /// Acquires what is asked for, as patiently as is asked for, and draws a token.
    async fn acquire(&self, pool: &PgPool) -> Result<Option<(Held, u64)>> {
        let key = &self.key.key;
        let policy = if self.no_wait { Some(Duration::ZERO) } else { self.wait };
        let held = if let Some(permits) = self.permits {
            let semaphore = Semaphore::new(pool, key, permits)?;
            let permit = match policy {
                Some(policy) => semaphore.try_acquire_for(policy).await?,
                None => Some(semaphore.acquire().await?),
            };
            permit.map(Held::Permit)
        } else if self.shared {
            let mut lock = Lock::new(pool, key);
            let guard = match policy {
                Some(policy) => lock.try_acquire_shared_for(policy).await?,
                None => Some(lock.acquire_shared().await?),
            };
            guard.map(Held::Shared)
        } else {
            let mut lock = Lock::new(pool, key);
            let guard = match policy {
                Some(policy) => lock.try_acquire_for(policy).await?,
                None => Some(lock.acquire().await?),
            };
            guard.map(Held::Exclusive)
        };
        let Some(held) = held else { return Ok(None) };
        let token = held.token().await?;
        Ok(Some((held, token)))
    }
}

impl Held {
    async fn token(&self) -> Result<u64> {
        match self {
            Self::Exclusive(guard) => guard.fencing_token().await,
            Self::Shared(guard) => guard.fencing_token().await,
            Self::Permit(permit) => permit.fencing_token().await,
        }
    }

    async fn lost(&self) -> Loss {
        match self {
            Self::Exclusive(guard) => guard.lost().await,
            Self::Shared(guard) => guard.lost().await,
            Self::Permit(permit) => permit.lost().await,
        }
    }

    async fn release(self) -> Result<(), Error> {
        match self {
            Self::Exclusive(guard) => guard.release().await,
            Self::Shared(guard) => guard.release().await,
            Self::Permit(permit) => permit.release().await,
        }
    }
}

/// A time in seconds, as it is written on the command line.
pub(crate) fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number of seconds".to_owned())?;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}
