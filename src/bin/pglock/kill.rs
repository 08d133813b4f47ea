//! `pglock kill`: ends a session that holds or waits.

use std::io::{BufRead, IsTerminal, Write, stderr, stdin};
use std::time::{Duration, Instant};

use clap::Args;
use pglock::Error;
use pglock::inspect::{self, LockInfo, Session};
use sqlx::PgConnection;
use tokio::time::sleep;

use crate::connection::close;
use crate::database::{Database, DatabaseArgs};
use crate::exit::{Exit, Failure, complain, print, say};
use crate::show::{self, Names};
use crate::table;
use crate::target::Target;
use crate::who;

/// End a session, and with it all the locks that it holds and waits for
///
/// Shows what the session holds, asks for confirmation, and ends the session that was shown, never another one that
/// got its pid meanwhile. Its client gets an error; a holder that uses pglock is notified at once that its
/// lock is lost.
#[derive(Args, Debug)]
#[command(after_long_help = MORE)]
pub(crate) struct KillArgs {
    /// Don't ask
    #[arg(short, long)]
    yes: bool,

    #[command(flatten)]
    names: Names,

    /// The pid of the session, as pglock ls shows it; or a key, for the session that holds its lock
    #[arg(value_name = "PID|KEY", allow_negative_numbers = true)]
    target: Target,
}

const MORE: &str = "\
A number is a pid. To end the holder of the lock 42, take its pid from
pglock who 42. name:42 is a name that looks like a number.

Exit codes:
   0  the session is ended
   1  it is not: it holds no lock and waits for none, has ended before, or the
      answer was no
   2  there is no terminal to ask on, and no --yes; or several sessions hold
      the lock
  69  the database can't be reached, or failed
  77  the role is not allowed to end it; that takes the session's own role or
      pg_signal_backend, and pg_read_all_stats to see which session it is; and
      a superuser for a superuser's";

const NOT_ENDED: Exit = Exit::Code(1);

/// `EX_NOPERM` of sysexits.h.
const FORBIDDEN: Exit = Exit::Code(77);

/// How many of a session's locks are shown.
const SHOWN: usize = 20;

/// How long to wait until the session has ended.
const ENDING: Duration = Duration::from_secs(10);

pub(crate) async fn run(args: KillArgs, database: DatabaseArgs) -> Result<Exit, Failure> {
    let database = database.database("pglock kill")?;
    let mut conn = database.connect().await?;
    let ended = kill(&args, &database, &mut conn).await;
    close(conn).await;
    ended
}

async fn kill(
    args: &KillArgs,
    database: &Database,
    conn: &mut PgConnection,
) -> Result<Exit, Failure> {
    let pid = match args.target.text.parse() {
        Ok(pid) => pid,
        Err(_) => match holder(&args.target, database, conn).await? {
            Ok(pid) => pid,
            Err(exit) => return Ok(exit),
        },
    };
    let mut locks = locks_of(conn, pid).await?;
    let Some(session) = locks.first().and_then(|lock| lock.session.clone()) else {
        say(format_args!(
            "session {pid} neither holds nor waits for an advisory lock of this database; pglock ls \
             shows those that do"
        ));
        return Ok(NOT_ENDED);
    };
    inspect::name_keys(&mut locks, args.names.keys()?.into_iter().chain([args.target.key.clone()]));
    let shown = locks.get(..SHOWN).unwrap_or(&locks);
    print(show::table(shown, database.name(), table::width()).as_bytes())?;
    if locks.len() > SHOWN {
        say(format_args!("and {} more locks, which pglock ls shows", locks.len() - SHOWN));
    }
    if session.started_at.is_none() {
        say(format_args!("this role can't see which session {pid} is; grant it pg_read_all_stats"));
        return Ok(FORBIDDEN);
    }
    if !args.yes {
        if !stdin().is_terminal() {
            say(format_args!("there is no terminal to ask on; add --yes to end the session"));
            return Ok(Exit::USAGE);
        }
        if !confirmed(pid)? {
            say(format_args!("the session continues"));
            return Ok(NOT_ENDED);
        }
    }
    match inspect::terminate(&mut *conn, &session).await {
        Ok(true) => wait(conn, &session).await,
        Ok(false) => {
            say(format_args!("the session has ended already"));
            Ok(NOT_ENDED)
        }
        Err(error @ Error::Inspect { privilege: Some(_), .. }) => {
            complain(&error);
            Ok(FORBIDDEN)
        }
        Err(error) => Err(error.into()),
    }
}

/// Finds the session that holds a lock. Unless exactly one session does, reports that and returns the exit code as the
/// inner `Err`.
async fn holder(
    target: &Target,
    database: &Database,
    conn: &mut PgConnection,
) -> Result<Result<i32, Exit>, Failure> {
    let locks = who::locks_of(&mut *conn, &target.key).await?;
    let sessions = locks.iter().filter(|lock| lock.held).filter_map(|lock| lock.session.as_ref());
    let mut pids: Vec<i32> = sessions.map(|session| session.backend_pid).collect();
    pids.sort_unstable();
    pids.dedup();
    match pids.as_slice() {
        [pid] => Ok(Ok(*pid)),
        [] => {
            say(format_args!("no session holds {target}"));
            Ok(Err(NOT_ENDED))
        }
        _ => {
            print(show::table(&locks, database.name(), table::width()).as_bytes())?;
            say(format_args!("several sessions hold {target}; name one by its pid"));
            Ok(Err(Exit::USAGE))
        }
    }
}

async fn locks_of(conn: &mut PgConnection, pid: i32) -> Result<Vec<LockInfo>, Failure> {
    let mut locks = inspect::locks(conn).await?;
    locks.retain(|lock| lock.session.as_ref().is_some_and(|session| session.backend_pid == pid));
    Ok(locks)
}

/// Waits until the session no longer holds or waits for a lock.
async fn wait(conn: &mut PgConnection, session: &Session) -> Result<Exit, Failure> {
    let started = Instant::now();
    let is_there = |lock: &LockInfo| {
        lock.session.as_ref().is_some_and(|now| now.started_at == session.started_at)
    };
    let mut pause = Duration::from_millis(20);
    while locks_of(conn, session.backend_pid).await?.iter().any(is_there) {
        if started.elapsed() > ENDING {
            say(format_args!(
                "session {} was sent the signal to end, and has not ended within {ENDING:?}",
                session.backend_pid
            ));
            return Ok(NOT_ENDED);
        }
        sleep(pause).await;
        // Each query of `pg_locks` blocks the server's lock table for a moment.
        pause = Duration::from_secs(1).min(2 * pause);
    }
    say(format_args!("session {} is ended", session.backend_pid));
    Ok(Exit::FINE)
}

fn confirmed(pid: i32) -> Result<bool, Failure> {
    let mut answer = String::new();
    let asked = write!(stderr(), "End session {pid}? [y/N] ")
        .and_then(|()| stderr().flush())
        .and_then(|()| stdin().lock().read_line(&mut answer));
    asked.map_err(|error| Failure::System("cannot ask", error))?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}
