//! `pglock who`: shows which sessions hold a lock, and which wait for it.

use clap::Args;
use pglock::Key;
use pglock::inspect::{self, LockInfo};
use sqlx::PgExecutor;
use sqlx::postgres::PgAdvisoryLockKey;

use crate::connection::close;
use crate::database::DatabaseArgs;
use crate::exit::{Exit, Failure, print, say};
use crate::show;
use crate::table;
use crate::target::{Target, application};

/// Show which sessions hold a lock, and which wait for it
///
/// For a semaphore, its permits. The exit code is 0 if the lock is held, and 1 if it is free.
#[derive(Args, Debug)]
#[command(after_long_help = show::JSON)]
pub(crate) struct WhoArgs {
    /// Print JSON
    #[arg(long)]
    json: bool,

    /// Print nothing; only the exit code counts
    #[arg(short, long, conflicts_with = "json")]
    quiet: bool,

    /// The lock: a number, a pair like 1,2, or a name
    #[arg(allow_negative_numbers = true)]
    key: Target,
}

/// The lock is free.
const FREE: Exit = Exit::Code(1);

pub(crate) async fn run(args: WhoArgs, database: DatabaseArgs) -> Result<Exit, Failure> {
    let database = database.database(&application("who", &args.key.text, None))?;
    let mut conn = database.connect().await?;
    let locks = locks_of(&mut conn, &args.key.key).await?;
    close(conn).await;
    let held = locks.iter().any(|lock| lock.held);
    if args.json {
        print(format!("{:#}\n", show::json(&locks, database.name())).as_bytes())?;
    } else if !args.quiet && locks.is_empty() {
        say(format_args!("no session holds {}", args.key));
    } else if !args.quiet {
        print(show::table(&locks, database.name(), table::width()).as_bytes())?;
        show::warn_of_hidden(&locks);
    }
    Ok(if held { Exit::FINE } else { FREE })
}

/// Returns the holders and waiters of a key, and of the permits of its semaphore.
pub(crate) async fn locks_of(db: impl PgExecutor<'_>, key: &Key) -> pglock::Result<Vec<LockInfo>> {
    let mut locks = inspect::locks(db).await?;
    for lock in &mut locks {
        // Drops the name that a session shows, because it may be the name of another key.
        lock.key = PgAdvisoryLockKey::from(&lock.key).into();
    }
    inspect::name_keys(&mut locks, [key]);
    // Only this key, and the keys of its semaphore's permits, have a name now.
    locks.retain(|lock| lock.key == *key || lock.key.name().is_some());
    Ok(locks)
}
