//! `pglock kill`: ends a session that holds or waits.

use std::io::{BufRead, IsTerminal, Write, stderr, stdin};
use std::time::{Duration, Instant};

use clap::Args;
use pglock::inspect::{self, LockInfo, Session};
use sqlx::PgPool;
use sqlx::error::DatabaseError;
use tokio::time::sleep;

use crate::connect::{connect, disconnect};
use crate::exit::{Exit, Failure, say};
use crate::show::{self, Names};
use crate::table;

/// End a session, and with it all the locks that it holds and waits for
///
/// Shows what the session holds, asks whether to go on, and ends the session that was shown, never
/// another one that got its pid meanwhile. Its client gets an error; a holder that uses pglock is told at
/// once that its lock is lost.
#[derive(Args, Debug)]
#[command(after_long_help = MORE)]
pub(crate) struct KillArgs {
    /// Don't ask
    #[arg(short, long)]
    yes: bool,

    #[command(flatten)]
    names: Names,

    /// The pid of the session, as pglock ls shows it
    pid: i32,
}

const MORE: &str = "\
Exit codes:
   0  the session is ended
   1  it is not: it holds no lock and waits for none, is gone, or the answer was no
   2  there is no terminal to ask on, and no --yes
  69  the database can't be reached, or failed
  77  the role must not end it; that takes the session's own role or pg_signal_backend, and
      pg_read_all_stats to see which session it is; and a superuser for a superuser's";

const NOT_ENDED: Exit = Exit::Code(1);

/// `EX_NOPERM` of sysexits.h.
const FORBIDDEN: Exit = Exit::Code(77);

/// How long to look until the session is gone.
const PATIENCE: Duration = Duration::from_secs(10);

pub(crate) async fn run(args: KillArgs, url: Option<&str>) -> Result<Exit, Failure> {
    let pool = connect(url).await?;
    let ended = kill(&args, &pool).await;
    disconnect(pool).await;
    ended
}

async fn kill(args: &KillArgs, pool: &PgPool) -> Result<Exit, Failure> {
    let mut locks = locks_of(pool, args.pid).await?;
    let Some(session) = locks.first().and_then(|lock| lock.session.clone()) else {
        say(format_args!(
            "session {} neither holds nor waits for an advisory lock of this database; \
             pglock ls shows those that do",
            args.pid
        ));
        return Ok(NOT_ENDED);
    };
    inspect::name_keys(&mut locks, args.names.keys());
    show::print(&show::table(&locks, table::width()))?;
    if session.started_at.is_none() {
        say(format_args!(
            "this role can't see which session {} is; grant it pg_read_all_stats",
            args.pid
        ));
        return Ok(FORBIDDEN);
    }
    if !args.yes {
        if !stdin().is_terminal() {
            say(format_args!("there is no terminal to ask on; say --yes to end the session"));
            return Ok(Exit::USAGE);
        }
        if !confirmed(args.pid)? {
            say(format_args!("the session goes on"));
            return Ok(NOT_ENDED);
        }
    }
    match inspect::terminate(pool, &session).await {
        Ok(true) => wait(pool, &session).await,
        Ok(false) => {
            say(format_args!("the session is gone already"));
            Ok(NOT_ENDED)
        }
        Err(error) if is_forbidden(&error) => {
            say(format_args!("this role must not end the session; grant it pg_signal_backend"));
            Ok(FORBIDDEN)
        }
        Err(error) => Err(Failure::Inspect(error)),
    }
}

async fn locks_of(pool: &PgPool, pid: i32) -> Result<Vec<LockInfo>, Failure> {
    let mut locks = inspect::locks(pool).await.map_err(Failure::Inspect)?;
    locks.retain(|lock| lock.session.as_ref().is_some_and(|session| session.backend_pid == pid));
    Ok(locks)
}

/// Waits until the session holds nothing any more.
async fn wait(pool: &PgPool, session: &Session) -> Result<Exit, Failure> {
    let told = Instant::now();
    loop {
        let is_there = |lock: &LockInfo| {
            lock.session.as_ref().is_some_and(|now| now.started_at == session.started_at)
        };
        if !locks_of(pool, session.backend_pid).await?.iter().any(is_there) {
            say(format_args!("session {} is ended", session.backend_pid));
            return Ok(Exit::FINE);
        }
        if told.elapsed() > PATIENCE {
            say(format_args!(
                "session {} was told to end, and has not within {PATIENCE:?}",
                session.backend_pid
            ));
            return Ok(NOT_ENDED);
        }
        sleep(Duration::from_millis(20)).await;
    }
}

fn confirmed(pid: i32) -> Result<bool, Failure> {
    let mut answer = String::new();
    let asked = write!(stderr(), "End session {pid}? [y/N] ")
        .and_then(|()| stderr().flush())
        .and_then(|()| stdin().lock().read_line(&mut answer));
    asked.map_err(|error| Failure::System("cannot ask", error))?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

/// SQLSTATE `insufficient_privilege`.
fn is_forbidden(error: &sqlx::Error) -> bool {
    let code = error.as_database_error().and_then(DatabaseError::code);
    code.is_some_and(|code| code == "42501")
}
