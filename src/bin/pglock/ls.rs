//! `pglock ls`: the holders and waiters of all locks of a database.

use std::io::{IsTerminal, stdout};
use std::time::Duration;

use clap::Args;
use pglock::Key;
use pglock::inspect::{self, LockInfo};
use sqlx::PgConnection;
use tokio::time::sleep;

use crate::connection::close;
use crate::database::{Database, DatabaseArgs};
use crate::exit::{Exit, Failure, print, say};
use crate::show::{self, Names};
use crate::table;
use crate::watch;

/// List the holders and waiters of the advisory locks of the database
///
/// Those of all programs, not only of pglock. Waiters are below those that they wait for. STATE is what
/// the session does, and for how long; SESSION is its age. PostgreSQL does not know since when a lock is
/// held, only that its session is at least as old.
#[derive(Args, Debug)]
#[command(after_long_help = format!("{LONG}\n\n{}", show::JSON))]
pub(crate) struct LsArgs {
    /// Continue, and show it again every N seconds, 1 by default; with --json, one line each
    #[arg(short, long, value_name = "N", num_args = 0..=1, require_equals = true)]
    #[arg(default_missing_value = "1", value_parser = clap::value_parser!(u16).range(1..))]
    watch: Option<u16>,

    /// Print JSON
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    names: Names,
}

const LONG: &str = "\
In a terminal, --watch fills the screen: q or ^C quits, s sorts by key, by the
time of a wait or by the age of the session, arrows, Page Up, Page Down, Home
and End scroll.

The keys of migrations of Prisma, node-pg-migrate, goose, golang-migrate,
Flyway, sqlx and Rails are shown by name; other names that were hashed can't
be read back, but are recognized if they are given with --name or --names.";

pub(crate) async fn run(args: LsArgs, database: DatabaseArgs) -> Result<Exit, Failure> {
    let database = database.database("pglock ls")?;
    let keys = args.names.keys()?;
    if let Some(interval) = args.watch.map(|seconds| Duration::from_secs(seconds.into())) {
        if stdout().is_terminal() && !args.json {
            return watch::run(&database, &keys, interval).await;
        }
        return repeat(&database, &keys, interval, args.json).await;
    }
    let mut conn = database.connect().await?;
    let locks = locks(&mut conn, &keys).await?;
    close(conn).await;
    if args.json {
        print(format!("{:#}\n", show::json(&locks, database.name())).as_bytes())?;
    } else if locks.is_empty() {
        say(format_args!("no advisory lock of database {} is held or waited for", database.name()));
    } else {
        print(show::table(&locks, database.name(), table::width()).as_bytes())?;
        show::warn_of_hidden(&locks);
    }
    Ok(Exit::FINE)
}

/// Prints the list at each interval until the reader of standard output closes it.
async fn repeat(
    database: &Database,
    keys: &[Key],
    interval: Duration,
    json: bool,
) -> Result<Exit, Failure> {
    let mut conn = database.connect().await?;
    loop {
        let locks = locks(&mut conn, keys).await?;
        let text = if json {
            format!("{}\n", show::json(&locks, database.name()))
        } else {
            format!("{}\n", show::table(&locks, database.name(), table::width()))
        };
        if !print(text.as_bytes())? {
            close(conn).await;
            return Ok(Exit::FINE);
        }
        sleep(interval).await;
    }
}

/// Returns all locks, with a name for each that matches one of `keys`.
pub(crate) async fn locks(conn: &mut PgConnection, keys: &[Key]) -> Result<Vec<LockInfo>, Failure> {
    let mut locks = inspect::locks(conn).await?;
    inspect::name_keys(&mut locks, keys);
    Ok(locks)
}
