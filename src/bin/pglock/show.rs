//! Locks as a table for people, or as JSON for programs.

use std::io::{self, Write, stdout};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pglock::inspect::{LockInfo, Session};
use pglock::{Key, Leader, interop};
use serde_json::{Value, json};
use sqlx::postgres::PgAdvisoryLockKey;

use crate::exit::Failure;
use crate::table;
use crate::tree::{self, Row};

/// What `--json` prints, for the help of each command that has it.
pub(crate) const JSON: &str = "\
With --json the output is an array of locks; later versions may add to it, and take nothing away:
  key          as on the command line, without its name: \"42\", or \"1,2\"
  name         the name of the key, if it is known
  classid, objid, objsubid   where pg_locks shows it
  mode         \"exclusive\" or \"shared\"
  held         true if it is held, false if it is waited for
  waiting_since   for a waiter; from PostgreSQL 14 on
  blocked_by   for a waiter, the pids that it waits for; 0 is a prepared transaction
  prepared     the identifier of the prepared transaction that holds it
  leader       null, or the leader of an election: name, term, since
  session      null for a prepared transaction, or else: pid, started, user, application_name,
               client_addr, state, state_since, transaction_since, query_since
  seen_at      when the server was asked
Times are in seconds since 1970, by the server's clock. What is not known, or not to be seen by this
role, is null.";

/// Names that are known, as an argument of several commands.
#[derive(clap::Args, Debug)]
pub(crate) struct Names {
    /// A name to recognize, of a lock, an election or a semaphore; may be given several times
    #[arg(short, long = "name", value_name = "NAME")]
    names: Vec<String>,
}

impl Names {
    /// The keys that these are the names of, whoever hashes them.
    pub(crate) fn keys(&self) -> impl Iterator<Item = Key> {
        self.names.iter().flat_map(|name| schemes(name).map(|(_, key)| key))
    }
}

/// The ways to make a key of a name, and what they are called.
pub(crate) fn schemes(name: &str) -> [(&'static str, Key); 9] {
    [
        ("pglock, sqlx", Key::from(name)),
        ("go-pglock (FNV-1a)", interop::fnv1a(name)),
        ("SQL hashtext", interop::hashtext(name)),
        ("SQL hashtextextended", interop::hashtextextended(name)),
        ("Ruby with_advisory_lock", interop::with_advisory_lock(name)),
        ("Rails migrations of", interop::rails_migrations(name)),
        ("django-pglock", interop::django_pglock(name)),
        ("django-pglocks 2", interop::django_pglocks_v2(name)),
        ("django-pglocks 1", interop::django_pglocks_v1(name)),
    ]
}

/// A key as it is written on the command line, without its name.
pub(crate) fn written(key: &Key) -> String {
    match PgAdvisoryLockKey::from(key) {
        PgAdvisoryLockKey::BigInt(number) => number.to_string(),
        PgAdvisoryLockKey::IntPair(first, second) => format!("{first},{second}"),
        unknown => format!("{unknown:?}"),
    }
}

/// Where `pg_locks` shows a key: classid, objid, objsubid.
pub(crate) fn place(key: &Key) -> Option<[u64; 3]> {
    match PgAdvisoryLockKey::from(key) {
        PgAdvisoryLockKey::BigInt(number) => {
            let bits = number.cast_unsigned();
            Some([bits >> 32, bits & u64::from(u32::MAX), 1])
        }
        PgAdvisoryLockKey::IntPair(first, second) => {
            Some([first.cast_unsigned().into(), second.cast_unsigned().into(), 2])
        }
        _ => None,
    }
}

/// The locks as a table, in which waiters are below those that they wait for.
pub(crate) fn table(locks: &[LockInfo], width: Option<usize>) -> String {
    let headline = ["KEY", "MODE", "PID", "USER", "APPLICATION", "CLIENT", "STATE", "SESSION"];
    let rows: Vec<_> = tree::tree(locks).iter().map(row).collect();
    table::lay_out(headline, &rows, width)
}

fn row(row: &Row<'_>) -> [String; 8] {
    let Row { lock, branches } = row;
    let name = lock.key.name().map_or_else(|| written(&lock.key), str::to_owned);
    // A waiter below its holder waits for the same key.
    let key = if branches.is_empty() { name } else { format!("{branches}waits") };
    let mode = lock.mode.to_string();
    let since = |time: Option<SystemTime>| time.map(|time| age(lock.ago(time)));
    let Some(session) = &lock.session else {
        let prepared = lock.prepared.as_deref().unwrap_or("?");
        let [pid, user, client, session] = ["-"; 4].map(str::to_owned);
        let application = format!("prepared transaction {prepared:?}");
        return [key, mode, pid, user, application, client, "prepared".to_owned(), session];
    };
    let unknown = || "?".to_owned();
    let state = if lock.held {
        session.state.as_ref().map(|state| match since(session.state_since) {
            Some(since) => format!("{state} {since}"),
            None => state.clone(),
        })
    } else {
        Some(match since(lock.waiting_since) {
            Some(since) => format!("waiting {since}"),
            None => "waiting".to_owned(),
        })
    };
    let application = match &lock.leader {
        Some(Leader { name, term: Some(term), .. }) => Some(format!("{name} (leads, term {term})")),
        _ => session.application_name.clone().map(or_dash),
    };
    [
        key,
        mode,
        session.backend_pid.to_string(),
        session.user.clone().unwrap_or_else(unknown),
        application.unwrap_or_else(unknown),
        client(session),
        state.unwrap_or_else(unknown),
        since(session.started_at).unwrap_or_else(unknown),
    ]
}

/// An empty cell would not be seen as one.
fn or_dash(text: String) -> String {
    if text.is_empty() { "-".to_owned() } else { text }
}

fn client(session: &Session) -> String {
    match &session.client_addr {
        Some(address) => address.clone(),
        // Whoever may see when it was started may see the address too.
        None if session.started_at.is_some() => "local".to_owned(),
        None => "?".to_owned(),
    }
}

/// A time in the largest of its units.
fn age(age: Duration) -> String {
    let seconds = age.as_secs();
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..86_400 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// The locks as [`JSON`] says.
pub(crate) fn json(locks: &[LockInfo]) -> Value {
    locks.iter().map(lock_json).collect()
}

fn lock_json(lock: &LockInfo) -> Value {
    let [classid, objid, objsubid] = place(&lock.key).unwrap_or_default();
    json!({
        "key": written(&lock.key),
        "name": lock.key.name(),
        "classid": classid,
        "objid": objid,
        "objsubid": objsubid,
        "mode": lock.mode.to_string(),
        "held": lock.held,
        "waiting_since": seconds(lock.waiting_since),
        "blocked_by": lock.blocked_by,
        "prepared": lock.prepared,
        "leader": lock.leader.as_ref().map(|leader| json!({
            "name": leader.name,
            "term": leader.term,
            "since": seconds(leader.since),
        })),
        "session": lock.session.as_ref().map(|session| json!({
            "pid": session.backend_pid,
            "started": seconds(session.started_at),
            "user": session.user,
            "application_name": session.application_name,
            "client_addr": session.client_addr,
            "state": session.state,
            "state_since": seconds(session.state_since),
            "transaction_since": seconds(session.transaction_since),
            "query_since": seconds(session.query_since),
        })),
        "seen_at": seconds(Some(lock.seen_at)),
    })
}

fn seconds(time: Option<SystemTime>) -> Option<f64> {
    Some(time?.duration_since(UNIX_EPOCH).ok()?.as_secs_f64())
}

/// Prints. Returns whether anybody still reads it: `head` has seen enough sooner.
pub(crate) fn print(text: &str) -> Result<bool, Failure> {
    match stdout().write_all(text.as_bytes()).and_then(|()| stdout().flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(Failure::System("cannot print", error)),
    }
}
