//! Every statement that is sent to the server; nothing else, but the files below, spells `pg_`.
//!
//! Nearly all go by the simple query protocol: one message, one answer, always one round trip, nothing
//! left behind on the application's connection. The values in them are integers, written by
//! [`Display`](std::fmt::Display), so there is nothing to inject.
//!
//! The two of a free acquire and its awaited release are prepared, once on each connection that is used
//! again: the server would spend more time on their plans than on the lock.

pub(crate) mod inspect;

use std::sync::Arc;
use std::time::Duration;

use sqlx::postgres::{PgArguments, PgRow};
use sqlx::query::Query;
use sqlx::{AssertSqlSafe, Connection, PgConnection, Postgres, Row, SqlSafeStr};
use tracing::Dispatch;
use tracing::instrument::WithSubscriber;

use crate::key::KeyId;
use crate::mode::Mode;
use crate::request::Need;
use crate::semaphore::BITS;
use crate::session::ledger::Modes;

/// The answer to [`try_lock`].
#[derive(Debug)]
pub(crate) struct Tried {
    pub(crate) backend_pid: i32,
    /// How many of all locks were granted before one was not; of any, how many were not before one
    /// was. `None` on a standby.
    pub(crate) count: Option<usize>,
    /// The role has a limit on idle sessions.
    pub(crate) idle_limited: bool,
}

/// Takes locks that are free, asks who and what the server is, and has it look after this client.
///
/// The locks are tried in their order. Of [`Need::All`], the first that is busy ends it; of
/// [`Need::Any`], the first that is free.
///
/// The settings of [`Vigilance`] stay on the pooled connection, where the application can't notice
/// them; one of our own, the mark, tells the next acquire that they are there. `None` leaves them alone.
///
/// A connection on which something is prepared has mostly been here before, and has the mark. Then one
/// lock is one prepared statement, as short as can be. Without the mark, a second statement does the
/// rest; on a connection that is fresh, one does it all.
pub(crate) async fn try_lock(
    conn: &mut PgConnection,
    locks: &[(KeyId, Mode)],
    need: Need,
    vigilance: Option<(Vigilance, &str)>,
    allow_standby: bool,
) -> Result<Tried, sqlx::Error> {
    let mut granted = None;
    if let &[(key, mode)] = locks
        && conn.cached_statements_size() > 0
    {
        let one = try_one_lock(conn, key, mode, mark(vigilance)).await?;
        // One of all was granted, or none of any was refused.
        let count = usize::from(one.granted == (need == Need::All));
        let tried = Tried { backend_pid: one.backend_pid, count: Some(count), idle_limited: false };
        if one.marked {
            return Ok(tried);
        }
        granted = one.granted.then_some(tried);
    }
    // Boxed: mostly it is not needed.
    Box::pin(async {
        let Some(granted) = granted else {
            return try_with_settings(conn, locks, need, vigilance, allow_standby).await;
        };
        let set = try_with_settings(conn, &[], need, vigilance, allow_standby).await?;
        if set.count.is_none() {
            unlock_if_held(conn, locks).await?;
        }
        Ok(Tried { count: set.count.and(granted.count), idle_limited: set.idle_limited, ..granted })
    })
    .await
}

/// The answer to [`try_one_lock`].
struct TriedOne {
    backend_pid: i32,
    granted: bool,
    /// The session has the mark: it is on a primary, and stays there; has no limit on idle sessions; and
    /// the server looks after its client.
    marked: bool,
}

/// Takes a lock if it is free, and looks for the mark.
///
/// The server spends as much time on each function in the statement as on the lock, so all that can be
/// worked out here is worked out here.
async fn try_one_lock(
    conn: &mut PgConnection,
    key: KeyId,
    mode: Mode,
    mark: &str,
) -> Result<TriedOne, sqlx::Error> {
    macro_rules! statement {
        ($call:literal) => {
            concat!(
                "SELECT pg_backend_pid(), now(), statement_timestamp(), \
                 current_setting('pglock.vigilance', true), ",
                $call
            )
        };
    }
    let statement = match (key, mode) {
        (KeyId::BigInt(_), Mode::Exclusive) => statement!("pg_try_advisory_lock($1)"),
        (KeyId::BigInt(_), Mode::Shared) => statement!("pg_try_advisory_lock_shared($1)"),
        (KeyId::IntPair(..), Mode::Exclusive) => statement!("pg_try_advisory_lock($1, $2)"),
        (KeyId::IntPair(..), Mode::Shared) => statement!("pg_try_advisory_lock_shared($1, $2)"),
    };
    let row = bind(statement, key).fetch_one(&mut *conn).await?;
    let tried = TriedOne {
        backend_pid: row.try_get(0)?,
        granted: row.try_get(4)?,
        marked: row.try_get::<Option<&str>, _>(3)? == Some(mark),
    };
    if microseconds(&row, 2)? - microseconds(&row, 1)? > STANDS_STILL_FOR {
        end_transaction(conn).await?;
    }
    Ok(tried)
}

/// A timestamp of a prepared statement, in microseconds since some time in the past.
fn microseconds(row: &PgRow, column: usize) -> Result<i64, sqlx::Error> {
    let bytes = row.try_get_raw(column)?.as_bytes().map_err(sqlx::Error::Decode)?;
    let bytes = bytes.try_into().map_err(|error| sqlx::Error::Decode(Box::new(error)))?;
    Ok(i64::from_be_bytes(bytes))
}

/// The whole of [`try_lock`], on a session that may not have the mark.
///
/// The settings come before the locks: where one is refused, no lock was taken.
async fn try_with_settings(
    conn: &mut PgConnection,
    locks: &[(KeyId, Mode)],
    need: Need,
    vigilance: Option<(Vigilance, &str)>,
    allow_standby: bool,
) -> Result<Tried, sqlx::Error> {
    let version = conn.server_version_num();
    let settings = vigilance.map_or_else(String::new, |(vigilance, _)| vigilance.settings(version));
    let mark = mark(vigilance);
    let standby = if allow_standby { "false" } else { "pg_is_in_recovery()" };
    let not = if need == Need::All { "NOT " } else { "" };
    let mut tries = Vec::new();
    for (count, &(key, mode)) in locks.iter().enumerate() {
        tries.push(format!("WHEN {not}{}({}) THEN {count}", try_function(mode), Args(key)));
    }
    let tries = tries.join(" ");
    let count = locks.len();
    // A session on a standby is never marked, so that each acquire asks whether it still is one; nor is
    // one with a limit on idle sessions, which each holder has lifted.
    let statement = format!(
        "SELECT pg_backend_pid(), {TIME_STANDS_STILL}, {IDLE_LIMIT}, {settings}\
         CASE WHEN NOT pg_is_in_recovery() AND coalesce({IDLE_LIMIT}, '0') = '0' \
         THEN set_config('pglock.vigilance', '{mark}', false) END, \
         CASE WHEN {standby} THEN NULL {tries} ELSE {count} END AS count"
    );
    let row = fetch(conn, statement).await?;
    let limit: Option<&str> = row.try_get(2)?;
    let idle_limited = limit.is_some_and(|limit| limit != "0");
    let count: Option<i32> = row.try_get("count")?;
    let count = count.and_then(|count| usize::try_from(count).ok());
    let answer = Tried { backend_pid: row.try_get(0)?, count, idle_limited };
    if row.try_get(1)? && end_transaction(conn).await? {
        // That has undone the settings, and no lock.
        Box::pin(try_with_settings(conn, &[], need, vigilance, allow_standby)).await?;
    }
    Ok(answer)
}

/// What tells that the settings are in place.
fn mark(vigilance: Option<(Vigilance, &str)>) -> &str {
    vigilance.map_or("none", |(_, mark)| mark)
}

/// Whether a transaction is open. Inside one, time stands still while statements go on. Outside, and in a
/// message of one statement, both are the time of that.
const TIME_STANDS_STILL: &str = "now() <> statement_timestamp()";

/// In a prepared statement, the two differ by some microseconds anyway; looking once too often does no
/// harm.
const STANDS_STILL_FOR: i64 = 2000;

/// The role's limit on idle sessions. Unknown before PostgreSQL 14.
const IDLE_LIMIT: &str = "current_setting('idle_session_timeout', true)";

fn try_function(mode: Mode) -> &'static str {
    match mode {
        Mode::Exclusive => "pg_try_advisory_lock",
        Mode::Shared => "pg_try_advisory_lock_shared",
    }
}

/// When the server gives a silent client up: [`LockOptions::server_gives_up`].
///
/// [`LockOptions::server_gives_up`]: crate::LockOptions::server_gives_up
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Vigilance {
    pub(crate) keepalives_idle_s: u32,
    pub(crate) keepalives_interval_s: u32,
    pub(crate) keepalives_count: u32,
    pub(crate) check_interval_ms: u32,
}

impl Vigilance {
    /// What tells these settings from others.
    pub(crate) fn mark(self) -> Arc<str> {
        let Self { keepalives_idle_s, keepalives_interval_s, keepalives_count, check_interval_ms } =
            self;
        format!(
            "{keepalives_idle_s}/{keepalives_interval_s}/{keepalives_count}/{check_interval_ms}"
        )
        .into()
    }

    /// Columns that set what is to be set, each with a comma behind it.
    fn settings(self, version: Option<u32>) -> String {
        let Self { keepalives_idle_s, keepalives_interval_s, keepalives_count, check_interval_ms } =
            self;
        // A cut-off client that still owes the server an answer is not probed, but retransmitted to.
        let user_timeout_ms = 1000 * (keepalives_idle_s + keepalives_interval_s * keepalives_count);
        // New in PostgreSQL 14.
        let check_interval = if version >= Some(140_000) {
            format!(
                "set_config('client_connection_check_interval', '{check_interval_ms}', false), "
            )
        } else {
            String::new()
        };
        format!(
            "set_config('tcp_keepalives_idle', '{keepalives_idle_s}', false), \
             set_config('tcp_keepalives_interval', '{keepalives_interval_s}', false), \
             set_config('tcp_keepalives_count', '{keepalives_count}', false), \
             set_config('tcp_user_timeout', '{user_timeout_ms}', false), {check_interval}"
        )
    }
}

/// Lifts the role's limit on idle sessions, which a holder may be.
///
/// The application would notice, so the old value is kept on the server, where whoever ends the
/// session finds it.
pub(crate) async fn lift_idle_timeout(conn: &mut PgConnection) -> Result<(), sqlx::Error> {
    let statement = "SELECT \
        set_config('pglock.idle_session_timeout', current_setting('idle_session_timeout'), false), \
        set_config('idle_session_timeout', '0', false)";
    fetch(conn, statement.to_owned()).await.map(drop)
}

/// Shows a name in `application_name`, which is all that others see of a session.
///
/// The old one is kept on the server, as above; with a mark in front, for it may be empty.
pub(crate) async fn show_name(conn: &mut PgConnection, name: &str) -> Result<(), sqlx::Error> {
    let statement = "SELECT \
        CASE WHEN coalesce(current_setting('pglock.application_name', true), '') = '' THEN \
          set_config('pglock.application_name', '=' || current_setting('application_name'), false) END, \
        set_config('application_name', $1, false)";
    sqlx::query(statement).persistent(false).bind(name).execute(conn).await.map(drop)
}

/// Puts back what the application would notice: the role's limit on idle sessions, the name.
const PUT_BACK: &str = "CASE WHEN current_setting('pglock.idle_session_timeout', true) <> '' THEN \
     set_config('idle_session_timeout', current_setting('pglock.idle_session_timeout'), false) || \
     set_config('pglock.vigilance', '', false) || \
     set_config('pglock.idle_session_timeout', '', false) END, \
     CASE WHEN current_setting('pglock.application_name', true) <> '' THEN \
     set_config('application_name', substr(current_setting('pglock.application_name'), 2), false) || \
     set_config('pglock.application_name', '', false) END";

/// Puts back what the application would notice.
pub(crate) async fn put_back(conn: &mut PgConnection) -> Result<(), sqlx::Error> {
    fetch(conn, format!("SELECT {PUT_BACK}")).await.map(drop)
}

/// A prepared statement on a key.
fn bind(statement: impl SqlSafeStr, key: KeyId) -> Query<'static, Postgres, PgArguments> {
    let query = sqlx::query(statement);
    match key {
        KeyId::BigInt(number) => query.bind(number),
        KeyId::IntPair(first, second) => query.bind(first).bind(second),
    }
}

/// How long one statement waits: a slice, or what is left of the caller's patience if that is less.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WaitLimit {
    pub(crate) slice: Duration,
    pub(crate) left: Option<Duration>,
}

impl WaitLimit {
    /// How long the server may take at most: a slice is made longer if `deadlock_timeout` is.
    pub(crate) fn longest(self) -> Duration {
        let longest = self.slice + Duration::from_secs(8);
        self.left.map_or(longest, |left| left.min(longest))
    }

    /// An expression for the server's `lock_timeout`: above `deadlock_timeout` if there is time for
    /// that, or a deadlock would look like a timeout.
    fn milliseconds(self) -> String {
        let slice = milliseconds(self.slice);
        let left = self.left.map_or(i32::MAX, milliseconds);
        let longest = milliseconds(self.longest());
        format!(
            "least({left}, greatest({slice}, least({longest}, 1000 + \
             1000 * extract(epoch FROM current_setting('deadlock_timeout')::interval))))::int::text"
        )
    }
}

/// The answer to a wait.
#[derive(Debug)]
pub(crate) struct Waited {
    pub(crate) backend_pid: i32,
    pub(crate) granted: bool,
}

/// Waits for a lock in the server's queue.
///
/// One message of several statements, which the server runs as one transaction, so what is set here
/// is gone with it, and so is the snapshot that a waiting statement holds:
///
/// 1. Lift the role's own limits on statements.
/// 2. Set the limit of this wait, above `deadlock_timeout`, or a deadlock would look like a timeout.
///    Then wait. The timeout is caught, so the server logs no error. It can strike after the grant:
///    whether the lock is held, only `pg_locks` knows.
/// 3. Tell the result, which `DO` can't: the server's process, with a minus if the lock is not held. What
///    comes after the grant is on the way from one holder to the next, and so is little: `SHOW` needs no
///    plan.
///
/// sqlx warns of statements that take more than a second. This one is meant to, so it runs where no
/// subscriber listens.
pub(crate) async fn wait(
    conn: &mut PgConnection,
    key: KeyId,
    mode: Mode,
    limit: WaitLimit,
) -> Result<Waited, sqlx::Error> {
    // New in PostgreSQL 17.
    let transaction_timeout = if conn.server_version_num() >= Some(170_000) {
        "SET LOCAL transaction_timeout = 0; "
    } else {
        ""
    };
    let function = match mode {
        Mode::Exclusive => "pg_advisory_lock",
        Mode::Shared => "pg_advisory_lock_shared",
    };
    let statement = format!(
        "SET LOCAL statement_timeout = 0; {transaction_timeout}\
         DO $$ BEGIN \
           PERFORM set_config('pglock.granted', pg_backend_pid()::text, true); \
           PERFORM set_config('lock_timeout', {}, true); \
           BEGIN \
             PERFORM {function}({}); \
           EXCEPTION WHEN lock_not_available THEN \
             IF NOT EXISTS ({}) THEN \
               PERFORM set_config('pglock.granted', '-' || pg_backend_pid(), true); \
             END IF; \
           END; \
         END $$; \
         SHOW pglock.granted",
        limit.milliseconds(),
        Args(key),
        Held { key, mode, select: "SELECT FROM" },
    );
    let row = sqlx::raw_sql(AssertSqlSafe(statement))
        .fetch_one(conn)
        .with_subscriber(Dispatch::none())
        .await?;
    let answer: &str = row.try_get(0)?;
    let backend_pid: i32 = answer.parse().map_err(|error| sqlx::Error::Decode(Box::new(error)))?;
    Ok(Waited { backend_pid: backend_pid.abs(), granted: backend_pid > 0 })
}

/// Takes a lock of the transaction that the connection is in, if it is free. `None` on a standby.
///
/// By the simple protocol: behind a transaction pooler nothing prepared is where it was.
pub(crate) async fn try_lock_transaction(
    conn: &mut PgConnection,
    key: KeyId,
    mode: Mode,
) -> Result<Option<bool>, sqlx::Error> {
    let function = match mode {
        Mode::Exclusive => "pg_try_advisory_xact_lock",
        Mode::Shared => "pg_try_advisory_xact_lock_shared",
    };
    let key = Args(key);
    let statement =
        format!("SELECT CASE WHEN pg_is_in_recovery() THEN NULL ELSE {function}({key}) END");
    fetch(conn, statement).await?.try_get(0)
}

/// Waits in the server's queue for a lock of the transaction that the connection is in. Returns
/// whether it was granted.
///
/// As [`wait`], but the transaction is the caller's, so it must find all as it was:
///
/// 1. Lift its limit on statements, and remember it where a rollback forgets it too.
/// 2. Wait inside a subtransaction. A timeout rolls it back, and with it the limit of the wait, and the
///    lock itself if that was granted just before: so there is nothing to adopt.
/// 3. Tell the result, and put the limit back.
pub(crate) async fn wait_transaction(
    conn: &mut PgConnection,
    key: KeyId,
    mode: Mode,
    limit: WaitLimit,
) -> Result<bool, sqlx::Error> {
    let function = match mode {
        Mode::Exclusive => "pg_advisory_xact_lock",
        Mode::Shared => "pg_advisory_xact_lock_shared",
    };
    let statement = format!(
        "SELECT set_config('pglock.statement_timeout', current_setting('statement_timeout'), true), \
           set_config('statement_timeout', '0', true); \
         DO $$ DECLARE lock_timeout text := current_setting('lock_timeout'); BEGIN \
           PERFORM set_config('pglock.granted', 'true', true); \
           BEGIN \
             PERFORM set_config('lock_timeout', {}, true); \
             PERFORM {function}({}); \
             PERFORM set_config('lock_timeout', lock_timeout, true); \
           EXCEPTION WHEN lock_not_available THEN \
             PERFORM set_config('pglock.granted', 'false', true); \
           END; \
         END $$; \
         SELECT current_setting('pglock.granted'), \
           set_config('statement_timeout', current_setting('pglock.statement_timeout'), true)",
        limit.milliseconds(),
        Args(key),
    );
    let rows = sqlx::raw_sql(AssertSqlSafe(statement))
        .fetch_all(conn)
        .with_subscriber(Dispatch::none())
        .await?;
    let granted: &str = rows.last().ok_or(sqlx::Error::RowNotFound)?.try_get(0)?;
    Ok(granted == "true")
}

/// How an unlock is sent.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Protocol {
    /// As a prepared statement: cheaper, but the first on a connection takes two messages.
    Extended,
    /// As one message: on its way with the first write to the socket, after which nobody may be left
    /// to write another.
    Simple,
}

/// The answer to an unlock.
#[derive(Debug)]
pub(crate) struct Unlocked {
    pub(crate) backend_pid: i32,
    /// The session held every one of the locks.
    pub(crate) all: bool,
}

/// Gives locks up, and puts settings back if told to.
///
/// One lock in one mode, as most are, by the protocol that was asked for; all else in one message.
pub(crate) async fn unlock(
    conn: &mut PgConnection,
    locks: &[(KeyId, Modes)],
    protocol: Protocol,
    put_back: bool,
) -> Result<Unlocked, sqlx::Error> {
    macro_rules! statement {
        ($call:literal) => {
            concat!("SELECT ", $call, ", pg_backend_pid()")
        };
    }
    let (&[(key, Modes { exclusive, shared })], Protocol::Extended, false) =
        (locks, protocol, put_back)
    else {
        return unlock_all(conn, locks, put_back).await;
    };
    let statement = match (key, exclusive, shared) {
        (KeyId::BigInt(_), true, false) => statement!("pg_advisory_unlock($1)"),
        (KeyId::BigInt(_), false, true) => statement!("pg_advisory_unlock_shared($1)"),
        (KeyId::IntPair(..), true, false) => statement!("pg_advisory_unlock($1, $2)"),
        (KeyId::IntPair(..), false, true) => statement!("pg_advisory_unlock_shared($1, $2)"),
        (_, true, true) | (_, false, false) => return unlock_all(conn, locks, put_back).await,
    };
    let row = bind(statement, key).fetch_one(conn).await?;
    Ok(Unlocked { backend_pid: row.try_get(1)?, all: row.try_get(0)? })
}

/// Gives locks up, all in one message, and puts settings back if told to.
pub(crate) async fn unlock_all(
    conn: &mut PgConnection,
    locks: &[(KeyId, Modes)],
    put_back: bool,
) -> Result<Unlocked, sqlx::Error> {
    let put_back = if put_back { format!(", {PUT_BACK}") } else { String::new() };
    let unlocks = unlocks(locks);
    let statement = format!("SELECT pg_backend_pid(), true = ALL ({unlocks}){put_back}");
    let row = fetch(conn, statement).await?;
    Ok(Unlocked { backend_pid: row.try_get(0)?, all: row.try_get(1)? })
}

/// The calls that give locks up, as one array: there may be more of them than a row has columns.
fn unlocks(locks: &[(KeyId, Modes)]) -> String {
    let mut calls = Vec::new();
    for &(key, modes) in locks {
        if modes.exclusive {
            calls.push(format!("pg_advisory_unlock({})", Args(key)));
        }
        if modes.shared {
            calls.push(format!("pg_advisory_unlock_shared({})", Args(key)));
        }
    }
    format!("ARRAY[{}]::bool[]", calls.join(", "))
}

/// Turns an exclusive lock into a shared one, without a moment in which nobody holds it.
///
/// The session's own exclusive lock lets it in, ahead of whoever waits; `pg_try_…` would not.
pub(crate) async fn downgrade(conn: &mut PgConnection, key: KeyId) -> Result<bool, sqlx::Error> {
    let key = Args(key);
    let statement =
        format!("SELECT pg_advisory_lock_shared({key}); SELECT pg_advisory_unlock({key})");
    let rows = sqlx::raw_sql(AssertSqlSafe(statement)).fetch_all(conn).await?;
    rows.last().ok_or(sqlx::Error::RowNotFound)?.try_get(0)
}

/// Gives locks up if the session holds them, which is not known after a statement was interrupted.
pub(crate) async fn unlock_if_held(
    conn: &mut PgConnection,
    locks: &[(KeyId, Mode)],
) -> Result<(), sqlx::Error> {
    let mut statements = Vec::new();
    for &(key, mode) in locks {
        let select = match mode {
            Mode::Exclusive => format!("SELECT pg_advisory_unlock({}) FROM", Args(key)),
            Mode::Shared => format!("SELECT pg_advisory_unlock_shared({}) FROM", Args(key)),
        };
        statements.push(Held { key, mode, select: &select }.to_string());
    }
    if statements.is_empty() {
        return Ok(());
    }
    sqlx::raw_sql(AssertSqlSafe(statements.join("; "))).fetch_all(conn).await.map(drop)
}

/// One call of one of the server's functions, with a key.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Call {
    TryLock(Mode),
    Unlock(Mode),
    /// Shared, beside the session's own exclusive lock, which lets it in at once.
    LockShared,
    /// Whether another session waits for the key.
    IsWaitedFor,
}

impl Call {
    /// What answers it, if that is one function.
    fn function(self) -> Option<&'static str> {
        match self {
            Self::TryLock(mode) => Some(try_function(mode)),
            Self::Unlock(Mode::Exclusive) => Some("pg_advisory_unlock"),
            Self::Unlock(Mode::Shared) => Some("pg_advisory_unlock_shared"),
            Self::LockShared | Self::IsWaitedFor => None,
        }
    }

    /// Its number in [`call_all`]; with a pair of numbers, one more.
    fn number(self, key: KeyId) -> i16 {
        let number = match self {
            Self::TryLock(Mode::Exclusive) => 0,
            Self::Unlock(Mode::Exclusive) => 2,
            Self::TryLock(Mode::Shared) => 4,
            Self::Unlock(Mode::Shared) => 6,
            Self::LockShared => 8,
            Self::IsWaitedFor => 10,
        };
        number + i16::from(matches!(key, KeyId::IntPair(..)))
    }
}

/// The answer to [`call_all`].
#[derive(Debug)]
pub(crate) struct Called {
    pub(crate) backend_pid: i32,
    pub(crate) answers: Vec<bool>,
}

/// Makes calls one after the other, in one prepared statement.
///
/// They travel as two arrays; a pair of numbers as the halves of one. The server goes through them in
/// their order: that is how it scans a function, and aggregates without a sort. It plans the statement
/// anew each time, for it cannot know how long the arrays will be; so one call alone goes without them,
/// and the view of all locks is only in the statement if somebody asks for it.
pub(crate) async fn call_all(
    conn: &mut PgConnection,
    calls: &[(KeyId, Call)],
) -> Result<Called, sqlx::Error> {
    macro_rules! statement {
        ($other:literal) => {
            concat!(
                "SELECT pg_backend_pid(), string_agg(CASE CASE call \
                 WHEN 0 THEN pg_try_advisory_lock(k) \
                 WHEN 1 THEN pg_try_advisory_lock((k >> 32)::int4, (k << 32 >> 32)::int4) \
                 WHEN 2 THEN pg_advisory_unlock(k) \
                 WHEN 3 THEN pg_advisory_unlock((k >> 32)::int4, (k << 32 >> 32)::int4) \
                 WHEN 4 THEN pg_try_advisory_lock_shared(k) \
                 WHEN 5 THEN pg_try_advisory_lock_shared((k >> 32)::int4, (k << 32 >> 32)::int4) \
                 WHEN 6 THEN pg_advisory_unlock_shared(k) \
                 WHEN 7 THEN pg_advisory_unlock_shared((k >> 32)::int4, (k << 32 >> 32)::int4) \
                 WHEN 8 THEN pg_advisory_lock_shared(k) IS NOT NULL \
                 WHEN 9 THEN \
                   pg_advisory_lock_shared((k >> 32)::int4, (k << 32 >> 32)::int4) IS NOT NULL ",
                $other,
                "END WHEN true THEN '1' ELSE '0' END, '') \
                 FROM unnest($1::int8[], $2::int2[]) AS calls (k, call)"
            )
        };
    }
    let number = |key| match key {
        KeyId::BigInt(number) => number,
        KeyId::IntPair(first, second) => i64::from(first) << 32 | i64::from(second.cast_unsigned()),
    };
    if let &[(key, call)] = calls
        && let Some(function) = call.function()
    {
        return call_one(conn, key, function).await;
    }
    let statement = if calls.iter().any(|(_, call)| *call == Call::IsWaitedFor) {
        statement!(
            "ELSE EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted \
             AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) \
             AND classid::int8 = k >> 32 & 4294967295 AND objid::int8 = k & 4294967295 \
             AND objsubid = call - 9) "
        )
    } else {
        statement!("")
    };
    let keys: Vec<i64> = calls.iter().map(|&(key, _)| number(key)).collect();
    let numbers: Vec<i16> = calls.iter().map(|&(key, call)| call.number(key)).collect();
    let row = sqlx::query(statement).bind(keys).bind(numbers).fetch_one(conn).await?;
    let answers: &str = row.try_get(1)?;
    let answers = answers.bytes().map(|answer| answer == b'1').collect();
    Ok(Called { backend_pid: row.try_get(0)?, answers })
}

async fn call_one(
    conn: &mut PgConnection,
    key: KeyId,
    function: &str,
) -> Result<Called, sqlx::Error> {
    let args = match key {
        KeyId::BigInt(_) => "$1",
        KeyId::IntPair(..) => "$1, $2",
    };
    let statement = format!("SELECT pg_backend_pid(), {function}({args})");
    let row = bind(AssertSqlSafe(statement), key).fetch_one(conn).await?;
    Ok(Called { backend_pid: row.try_get(0)?, answers: vec![row.try_get(1)?] })
}

/// Asks a session what it holds.
pub(crate) async fn held(conn: &mut PgConnection) -> Result<Vec<(KeyId, Mode)>, sqlx::Error> {
    let statement = "SELECT classid::int8, objid::int8, objsubid, mode FROM pg_locks \
        WHERE locktype = 'advisory' AND granted AND pid = pg_backend_pid()";
    let rows = sqlx::raw_sql(statement).fetch_all(conn).await?;
    let mut held = Vec::with_capacity(rows.len());
    for row in rows {
        let (class, object): (i64, i64) = (row.try_get(0)?, row.try_get(1)?);
        let half = |bits| {
            i32::try_from(bits).ok().or_else(|| u32::try_from(bits).ok().map(u32::cast_signed))
        };
        let key = match (row.try_get::<i16, _>(2)?, half(class), half(object)) {
            (2, Some(first), Some(second)) => KeyId::IntPair(first, second),
            _ => KeyId::BigInt(class << 32 | object),
        };
        let exclusive = row.try_get::<&str, _>(3)? == "ExclusiveLock";
        held.push((key, if exclusive { Mode::Exclusive } else { Mode::Shared }));
    }
    Ok(held)
}

/// What [`holds`] says of a session.
#[derive(Debug)]
pub(crate) struct Holding {
    pub(crate) backend_pid: i32,
    pub(crate) held: bool,
}

/// Asks the session whether it holds a lock.
pub(crate) async fn holds(
    conn: &mut PgConnection,
    key: KeyId,
    mode: Mode,
) -> Result<Holding, sqlx::Error> {
    let held = Held { key, mode, select: "SELECT FROM" };
    let row = fetch(conn, format!("SELECT pg_backend_pid(), EXISTS ({held})")).await?;
    Ok(Holding { backend_pid: row.try_get(0)?, held: row.try_get(1)? })
}

/// Asks on any connection whether a session of the same database still holds some advisory lock.
pub(crate) async fn backend_holds_locks(
    conn: &mut PgConnection,
    backend_pid: i32,
) -> Result<bool, sqlx::Error> {
    let statement = format!(
        "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND granted \
         AND pid = {backend_pid} AND {OF_THIS_DATABASE})"
    );
    fetch(conn, statement).await?.try_get(0)
}

/// The process of the server that answers.
#[derive(Debug)]
pub(crate) struct Backend {
    pid: i32,
    /// When it was started, by the server's clock, in seconds.
    pub(crate) started: f64,
    /// When it was asked.
    pub(crate) asked: f64,
}

impl Backend {
    pub(crate) fn is(&self, other: &Self) -> bool {
        self.pid == other.pid && self.started.total_cmp(&other.started).is_eq()
    }
}

/// Asks who answers.
pub(crate) async fn backend(conn: &mut PgConnection) -> Result<Backend, sqlx::Error> {
    let statement = "SELECT pid, extract(epoch FROM backend_start)::float8, \
         extract(epoch FROM clock_timestamp())::float8 \
         FROM pg_stat_activity WHERE pid = pg_backend_pid()";
    let row = fetch(conn, statement.to_owned()).await?;
    Ok(Backend { pid: row.try_get(0)?, started: row.try_get(1)?, asked: row.try_get(2)? })
}

/// Asks whether a permit of a semaphore is held whose key says that there are more or fewer of them.
pub(crate) async fn other_count(
    conn: &mut PgConnection,
    permit: KeyId,
) -> Result<Option<i64>, sqlx::Error> {
    let KeyId::BigInt(id) = permit else { return Ok(None) };
    let whole = "(classid::int8 << 32 | objid::int8)";
    let mask = (1 << BITS) - 1;
    let statement = format!(
        "SELECT ({whole} >> {BITS} & {mask}) + 1 FROM pg_locks WHERE locktype = 'advisory' \
         AND granted AND objsubid = 1 AND {OF_THIS_DATABASE} \
         AND {whole} >> {hash} = {id}::int8 >> {hash} AND ({whole} >> {BITS} & {mask}) <> {count} \
         LIMIT 1",
        hash = 2 * BITS,
        id = format_args!("'{id}'"),
        count = id >> BITS & mask,
    );
    let row = sqlx::raw_sql(AssertSqlSafe(statement)).fetch_optional(conn).await?;
    row.map(|row| row.try_get(0)).transpose()
}

/// Who holds a key exclusively.
#[derive(Debug)]
pub(crate) struct Holder {
    pub(crate) backend_pid: i32,
    pub(crate) application_name: String,
    /// `None` over a unix socket, and if our role may not know.
    pub(crate) client_addr: Option<String>,
}

/// Asks on any connection who holds a key exclusively.
pub(crate) async fn holder(
    conn: &mut PgConnection,
    key: KeyId,
) -> Result<Option<Holder>, sqlx::Error> {
    let statement = format!(
        "SELECT pid, coalesce(application_name, ''), host(client_addr) \
         FROM pg_locks JOIN pg_stat_activity USING (pid) WHERE locktype = 'advisory' AND granted \
         AND {OF_THIS_DATABASE} AND {} AND mode = 'ExclusiveLock'",
        Place(key),
    );
    let row = sqlx::raw_sql(AssertSqlSafe(statement)).fetch_optional(conn).await?;
    let Some(row) = row else { return Ok(None) };
    Ok(Some(Holder {
        backend_pid: row.try_get(0)?,
        application_name: row.try_get(1)?,
        client_addr: row.try_get(2)?,
    }))
}

/// Keys belong to a database.
const OF_THIS_DATABASE: &str =
    "database = (SELECT oid FROM pg_database WHERE datname = current_database())";

/// What bears on the locks of a role, as the server tells it: see [`circumstances`].
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
#[derive(Debug)]
pub(crate) struct Circumstances {
    /// As in `150018`.
    pub(crate) version: u32,
    pub(crate) role: String,
    pub(crate) standby: bool,
    /// Not over a unix socket.
    pub(crate) tcp: bool,
    /// What the role may not call of all that is called for a lock.
    pub(crate) forbidden: Option<String>,
    pub(crate) sees_all: bool,
    pub(crate) ends_all: bool,
    pub(crate) locks: i64,
    /// How many more sessions there may be, for such a role in such a database.
    pub(crate) free_connections: i64,
    pub(crate) settings: Vec<(String, i64)>,
}

impl Circumstances {
    /// A setting, in the unit that the server has for it. 0 if it knows none of that name.
    pub(crate) fn setting(&self, name: &str) -> i64 {
        let found = self.settings.iter().find(|(known, _)| known == name);
        found.map_or(0, |(_, value)| *value)
    }
}

/// What to be granted to see the sessions of all roles.
pub(crate) const SEES_ALL: &str = "pg_read_all_stats";

/// What to be granted to end the sessions of all roles but superusers.
pub(crate) const ENDS_ALL: &str = "pg_signal_backend";

/// Asks for all that bears on locks.
pub(crate) async fn circumstances(conn: &mut PgConnection) -> Result<Circumstances, sqlx::Error> {
    const SETTINGS: [&str; 15] = [
        "client_connection_check_interval",
        "idle_in_transaction_session_timeout",
        "idle_session_timeout",
        "lock_timeout",
        "max_connections",
        "max_locks_per_transaction",
        "max_prepared_transactions",
        "reserved_connections",
        "statement_timeout",
        "superuser_reserved_connections",
        "tcp_keepalives_count",
        "tcp_keepalives_idle",
        "tcp_keepalives_interval",
        "tcp_user_timeout",
        "transaction_timeout",
    ];
    const FUNCTIONS: [&str; 9] = [
        "pg_try_advisory_lock(bigint)",
        "pg_try_advisory_lock_shared(bigint)",
        "pg_advisory_lock(bigint)",
        "pg_advisory_lock_shared(bigint)",
        "pg_advisory_unlock(bigint)",
        "pg_advisory_unlock_shared(bigint)",
        "pg_try_advisory_xact_lock(bigint)",
        "pg_advisory_xact_lock(bigint)",
        "pg_cancel_backend(integer)",
    ];

    let version = conn.server_version_num().unwrap_or_default();
    let names = SETTINGS.map(|name| format!("'{name}'")).join(", ");
    let statement = format!("SELECT name, setting::int8 FROM pg_settings WHERE name IN ({names})");
    let rows = sqlx::raw_sql(AssertSqlSafe(statement)).fetch_all(&mut *conn).await?;
    let settings: Result<Vec<_>, sqlx::Error> =
        rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).collect();

    // What is not held in the lock table proper has `fastpath`; several may hold one lock. A limit of
    // -1 is none. The connections that are reserved are not for a role like this one.
    let functions = FUNCTIONS.map(|function| format!("('{function}')")).join(", ");
    let statement = format!(
        "SELECT current_user::text, pg_is_in_recovery(), inet_client_addr() IS NOT NULL, \
         (SELECT string_agg(function, ', ') FROM (VALUES {functions}) AS called (function) \
           WHERE NOT has_function_privilege(function, 'execute')), \
         pg_has_role('{SEES_ALL}', 'usage'), pg_has_role('{ENDS_ALL}', 'usage'), \
         (SELECT count(DISTINCT concat_ws('/', locktype, database, relation, page, tuple, \
           virtualxid, transactionid, classid, objid, objsubid)) FROM pg_locks WHERE NOT fastpath), \
         least( \
           current_setting('max_connections')::int8 \
             - CASE WHEN rolsuper THEN 0 ELSE \
               current_setting('superuser_reserved_connections')::int8 \
               + coalesce(current_setting('reserved_connections', true), '0')::int8 END \
             - (SELECT sum(numbackends)::int8 FROM pg_stat_database), \
           CASE WHEN rolconnlimit >= 0 AND NOT rolsuper THEN rolconnlimit \
             - (SELECT count(*) FROM pg_stat_activity WHERE usesysid = pg_roles.oid) END, \
           CASE WHEN datconnlimit >= 0 AND NOT rolsuper THEN datconnlimit \
             - (SELECT count(*) FROM pg_stat_activity WHERE datid = pg_database.oid) END) \
         FROM pg_roles, pg_database \
         WHERE rolname = current_user AND datname = current_database()"
    );
    let row = fetch(conn, statement).await?;
    Ok(Circumstances {
        version,
        role: row.try_get(0)?,
        standby: row.try_get(1)?,
        tcp: row.try_get(2)?,
        forbidden: row.try_get(3)?,
        sees_all: row.try_get(4)?,
        ends_all: row.try_get(5)?,
        locks: row.try_get(6)?,
        free_connections: row.try_get(7)?,
        settings: settings?,
    })
}

/// Has the server look after this client, as each acquire does.
pub(crate) async fn look_after(
    conn: &mut PgConnection,
    vigilance: Vigilance,
) -> Result<(), sqlx::Error> {
    let settings = vigilance.settings(conn.server_version_num());
    fetch(conn, format!("SELECT {settings}true")).await.map(drop)
}

/// Gives locks up if the statement is answered by this backend. Returns whether it was.
pub(crate) async fn unlock_on(
    conn: &mut PgConnection,
    backend_pid: i32,
    locks: &[(KeyId, Modes)],
) -> Result<bool, sqlx::Error> {
    let unlocks = unlocks(locks);
    let statement = format!(
        "SELECT pg_backend_pid(), CASE WHEN pg_backend_pid() = {backend_pid} THEN {unlocks} END"
    );
    let row = fetch(conn, statement).await?;
    Ok(row.try_get::<i32, _>(0)? == backend_pid)
}

/// Returns the process of the server behind a connection.
pub(crate) async fn backend_pid(conn: &mut PgConnection) -> Result<i32, sqlx::Error> {
    fetch(conn, "SELECT pg_backend_pid()".to_owned()).await?.try_get(0)
}

/// Draws a number that is greater than every one drawn before on this server: a transaction id.
///
/// The server could forget after a crash that it gave an id to a transaction that wrote nothing. So
/// this one writes a message into the write-ahead log, which nobody reads, and its commit waits until
/// the log is on disk, whatever `synchronous_commit` says.
pub(crate) async fn draw_token(conn: &mut PgConnection) -> Result<i64, sqlx::Error> {
    let transaction_id = if conn.server_version_num() >= Some(130_000) {
        "pg_current_xact_id()::text::int8"
    } else {
        "txid_current()"
    };
    let statement = format!(
        "SELECT {transaction_id}, set_config('synchronous_commit', 'on', true), \
         pg_logical_emit_message(true, 'pglock', '')"
    );
    fetch(conn, statement).await?.try_get(0)
}

/// Ends a transaction that was left open. Returns whether there was one.
pub(crate) async fn end_transaction(conn: &mut PgConnection) -> Result<bool, sqlx::Error> {
    let asked = fetch(conn, format!("SELECT {TIME_STANDS_STILL}")).await;
    let open = match asked {
        Ok(row) => row.try_get(0)?,
        // 25P02: a failed transaction answers nothing but its end.
        Err(error) if crate::error::sqlstate(&error).as_deref() == Some("25P02") => true,
        Err(error) => return Err(error),
    };
    if open {
        sqlx::raw_sql("ROLLBACK").execute(conn).await?;
    }
    Ok(open)
}

/// Cancels what a backend is doing, if it is still the backend that we have known for so long.
///
/// A cancel names a process, not a session: the age keeps it from a newcomer with the same number. The
/// server's clock may be set, and goes at another pace than ours, so the age is taken with a grain of
/// salt; numbers don't come again so soon.
pub(crate) async fn cancel_backend(
    conn: &mut PgConnection,
    backend_pid: i32,
    known_for: Duration,
) -> Result<(), sqlx::Error> {
    let known_for = 0.99 * known_for.as_secs_f64() - 2.0;
    let statement = format!(
        "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE pid = {backend_pid} \
         AND backend_start <= clock_timestamp() - make_interval(secs => {known_for})"
    );
    sqlx::raw_sql(AssertSqlSafe(statement)).fetch_all(conn).await.map(drop)
}

/// A key as arguments of a function.
struct Args(KeyId);

impl std::fmt::Display for Args {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            // Quoted: the smallest numbers have no literal of their own.
            KeyId::BigInt(number) => write!(f, "'{number}'::bigint"),
            KeyId::IntPair(first, second) => write!(f, "'{first}'::int, '{second}'::int"),
        }
    }
}

/// A query of `pg_locks` for a lock that this session holds: a row if it does.
struct Held<'s> {
    key: KeyId,
    mode: Mode,
    select: &'s str,
}

impl std::fmt::Display for Held<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mode = match self.mode {
            Mode::Exclusive => "ExclusiveLock",
            Mode::Shared => "ShareLock",
        };
        write!(
            f,
            "{} pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid() AND granted \
             AND {} AND mode = '{mode}'",
            self.select,
            Place(self.key),
        )
    }
}

/// A condition on where `pg_locks` shows a key.
///
/// How a key is laid out there: <https://www.postgresql.org/docs/current/view-pg-locks.html>.
struct Place(KeyId);

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (classid, objid, objsubid) = match self.0 {
            KeyId::BigInt(number) => {
                let bits = number.cast_unsigned();
                (bits >> 32, bits & u64::from(u32::MAX), 1)
            }
            KeyId::IntPair(first, second) => {
                (u64::from(first.cast_unsigned()), u64::from(second.cast_unsigned()), 2)
            }
        };
        write!(f, "classid = {classid} AND objid = {objid} AND objsubid = {objsubid}")
    }
}

async fn fetch(conn: &mut PgConnection, statement: String) -> Result<PgRow, sqlx::Error> {
    sqlx::raw_sql(AssertSqlSafe(statement)).fetch_one(conn).await
}

/// For a timeout of the server: at least 1, for 0 means none.
fn milliseconds(duration: Duration) -> i32 {
    i32::try_from(duration.as_millis()).unwrap_or(i32::MAX).max(1)
}
