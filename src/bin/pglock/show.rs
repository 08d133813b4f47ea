//! Locks as a table for people, or as JSON for programs.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use pglock::inspect::{LockInfo, Session};
use pglock::{Key, Leader, interop};
use serde_json::{Value, json};
use sqlx::postgres::PgAdvisoryLockKey;

use crate::exit::{Failure, say};
use crate::known::Tools;
use crate::table;
use crate::target::Target;
use crate::tree::{self, Row};

/// Describes the output of `--json`, for the help of each command that has it.
pub(crate) const JSON: &str = "\
With --json the output is an array of locks; later versions may add to it, and
take nothing away:
  key          as on the command line, without its name: \"42\", or \"1,2\"
  name         the name of the key, or of the tool that locks it, if it is
               known
  classid, objid, objsubid   where pg_locks shows it
  mode         \"exclusive\" or \"shared\"
  held         true if it is held, false if it is waited for
  waiting_since   for a waiter; from PostgreSQL 14 on
  blocked_by   for a waiter, the pids that it waits for; 0 is a prepared
               transaction
  prepared     the identifier of the prepared transaction that holds it
  leader       null, or the leader of an election: name, term, since,
               backend_pid, client_addr
  session      null for a prepared transaction; otherwise: backend_pid,
               started_at, user, application_name, client_addr, state,
               state_since, transaction_since, query_since
  seen_at      when the server was asked
Times are in seconds since 1970, by the server's clock. What is not known, or
not visible to this role, is null.";

/// Names that are known, as arguments of several commands.
#[derive(clap::Args, Debug)]
pub(crate) struct Names {
    /// A name to recognize, of a lock, an election or a semaphore; may be given several times
    #[arg(short, long = "name", value_name = "NAME")]
    names: Vec<String>,

    /// A file of names to recognize, one per line; empty lines and lines that start with # are skipped
    #[arg(long = "names", value_name = "FILE")]
    file: Option<PathBuf>,
}

impl Names {
    /// Returns the keys that the known schemes derive from these names.
    pub(crate) fn keys(&self) -> Result<Vec<Key>, Failure> {
        let text = match &self.file {
            Some(file) => fs::read_to_string(file).map_err(|error| {
                Failure::Usage(format!("cannot read the names in {}: {error}", file.display()))
            })?,
            None => String::new(),
        };
        let lines = text.lines().map(str::trim);
        let lines = lines.filter(|line| !line.is_empty() && !line.starts_with('#'));
        let names = self.names.iter().map(String::as_str).chain(lines);
        Ok(names.flat_map(|name| schemes(name).map(|(_, key)| key)).collect())
    }
}

/// Returns the keys that the known schemes derive from a name, each with the name of its scheme.
pub(crate) fn schemes(name: &str) -> [(&'static str, Key); 12] {
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
        ("MD5, first 8 bytes", interop::md5(name)),
        ("sqlx migrations of", interop::sqlx_migrations(name)),
        ("Symfony", interop::symfony(name)),
    ]
}

/// Formats a key as it is written on the command line, without its name.
pub(crate) fn written(key: &Key) -> String {
    match PgAdvisoryLockKey::from(key) {
        PgAdvisoryLockKey::BigInt(number) => number.to_string(),
        PgAdvisoryLockKey::IntPair(first, second) => format!("{first},{second}"),
        unknown => format!("{unknown:?}"),
    }
}

/// Returns the numbers that `pg_locks` shows for a key: classid, objid, objsubid.
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

/// The columns of the table.
pub(crate) const HEADLINE: [&str; 8] =
    ["KEY", "MODE", "PID", "USER", "APPLICATION", "CLIENT", "STATE", "SESSION"];

/// Formats the locks as a table, in which each waiter is below the session that it waits for.
pub(crate) fn table(locks: &[LockInfo], database: &str, width: Option<usize>) -> String {
    let tools = Tools::of(database);
    let rows: Vec<_> = tree::tree(locks).iter().map(|row| cells(row, &tools)).collect();
    table::lay_out(HEADLINE, &rows, width)
}

/// Warns if the role may see the locks, but not all of their sessions.
pub(crate) fn warn_of_hidden(locks: &[LockInfo]) {
    let mut sessions = locks.iter().filter_map(|lock| lock.session.as_ref());
    // A role always sees its own sessions, this one included.
    if sessions.any(|session| session.started_at.is_none()) {
        say(format_args!(
            "this role may not see all of the sessions of other roles (shown as ?); grant it pg_read_all_stats"
        ));
    }
}

/// The name of a key, or of the tool that locks it.
fn name<'k>(key: &'k Key, tools: &'k Tools) -> Option<&'k str> {
    key.name().or_else(|| tools.name(key))
}

/// How long a holder has to be idle to count as silent. A holder that uses pglock sends a heartbeat every 2 s by
/// default.
const SILENT: Duration = Duration::from_mins(1);

/// Describes the state of a holder's session, and how long the session has been in it.
fn describe(state: &str, lasts: Option<Duration>) -> String {
    match lasts {
        Some(lasts) if state == "idle" && lasts >= SILENT => format!("silent {}", age(lasts)),
        Some(lasts) => format!("{state} {}", age(lasts)),
        None => state.to_owned(),
    }
}

/// Returns whether the command line would parse this text as this very name.
fn is_read_as_it_is(name: &str) -> bool {
    name.parse::<Target>().is_ok_and(|target| target.key.name() == Some(name))
}

/// The cells of a row.
pub(crate) fn cells(row: &Row<'_>, tools: &Tools) -> [String; 8] {
    let Row { lock, branches } = row;
    let name = match name(&lock.key, tools) {
        None => written(&lock.key),
        Some(name) if is_read_as_it_is(name) => name.to_owned(),
        Some(name) => format!("name:{name}"),
    };
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
        let lasts = session.state_since.map(|time| lock.ago(time));
        session.state.as_ref().map(|state| describe(state, lasts))
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

/// Replaces an empty text with a dash, because an empty cell is not recognizable as one.
fn or_dash(text: String) -> String {
    if text.is_empty() { "-".to_owned() } else { text }
}

fn client(session: &Session) -> String {
    match &session.client_addr {
        Some(address) => address.clone(),
        // A role that sees when the session was started would also see its address.
        None if session.started_at.is_some() => "local".to_owned(),
        None => "?".to_owned(),
    }
}

/// Formats a duration in the largest unit that fits.
fn age(age: Duration) -> String {
    let seconds = age.as_secs();
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..86_400 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// Returns the locks in the format that [`JSON`] describes.
pub(crate) fn json(locks: &[LockInfo], database: &str) -> Value {
    let tools = Tools::of(database);
    let as_json = |lock: &LockInfo| {
        let [classid, objid, objsubid] = place(&lock.key).unwrap_or_default();
        let more = [
            ("name", json!(name(&lock.key, &tools))),
            ("classid", json!(classid)),
            ("objid", json!(objid)),
            ("objsubid", json!(objsubid)),
        ];
        let mut value = json!(lock);
        if let Some(fields) = value.as_object_mut() {
            fields.extend(more.map(|(field, value)| (field.to_owned(), value)));
        }
        value
    };
    locks.iter().map(as_json).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_holder_that_sends_nothing_is_marked() {
        let lasts = |seconds| Some(Duration::from_secs(seconds));
        for (state, lasts, expected) in [
            ("idle", lasts(2), "idle 2s"),
            ("idle", lasts(59), "idle 59s"),
            ("idle", lasts(60), "silent 1m"),
            ("active", lasts(7200), "active 2h"),
            ("idle in transaction", lasts(60), "idle in transaction 1m"),
            ("idle", None, "idle"),
        ] {
            assert_eq!(describe(state, lasts), expected);
        }
    }
}
