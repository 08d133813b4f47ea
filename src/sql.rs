//! Every statement that is sent to the server; nothing else spells `pg_`.
//!
//! Nearly all go by the simple query protocol: one message, one answer, always one round trip, nothing
//! left behind on the application's connection. The values in them are integers, written by
//! [`Display`](std::fmt::Display), so there is nothing to inject.
//!
//! The two of a free acquire and its awaited release are prepared, once on each connection: the server
//! would spend more time on their plans than on the lock.

use std::time::Duration;

use sqlx::postgres::{PgArguments, PgRow};
use sqlx::query::Query;
use sqlx::{AssertSqlSafe, PgConnection, Postgres, Row, SqlSafeStr};
use tracing::Dispatch;
use tracing::instrument::WithSubscriber;

use crate::key::KeyId;
use crate::mode::Mode;
use crate::session::ledger::Modes;

/// The answer to [`try_lock`].
#[derive(Debug)]
pub(crate) struct Tried {
    pub(crate) backend_pid: i32,
    pub(crate) verdict: Verdict,
    /// The role has a limit on idle sessions.
    pub(crate) idle_limited: bool,
}

#[derive(Debug)]
pub(crate) enum Verdict {
    Busy,
    Granted,
    Standby,
}

/// Takes a lock if it is free, asks who and what the server is, and has it look after this client, in
/// one statement.
///
/// The settings of [`Vigilance`] stay on the pooled connection, where the application can't notice
/// them; one of our own tells the next acquire that they are there. They come before the lock: where
/// one is refused, none was taken. `None` leaves all settings alone.
pub(crate) async fn try_lock(
    conn: &mut PgConnection,
    key: KeyId,
    mode: Mode,
    vigilance: Option<Vigilance>,
    allow_standby: bool,
) -> Result<Tried, sqlx::Error> {
    let function = match mode {
        Mode::Exclusive => "pg_try_advisory_lock",
        Mode::Shared => "pg_try_advisory_lock_shared",
    };
    let args = match key {
        KeyId::BigInt(_) => "$1",
        KeyId::IntPair(..) => "$1, $2",
    };
    let standby = if allow_standby { "false" } else { "pg_is_in_recovery()" };
    let version = conn.server_version_num();
    let vigilant =
        vigilance.map_or_else(|| "NULL".to_owned(), |vigilance| vigilance.settings(version));
    // As many texts as there are kinds of lock and settings in use, each prepared once.
    let statement = format!(
        "SELECT pg_backend_pid(), {vigilant}, \
         CASE WHEN {standby} THEN NULL ELSE {function}({args}) END, \
         statement_timestamp() - now() > interval '2 ms', \
         current_setting('idle_session_timeout', true)"
    );
    let row = bind(AssertSqlSafe(statement), key).fetch_one(&mut *conn).await?;
    let tried = Tried {
        backend_pid: row.try_get(0)?,
        verdict: match row.try_get(2)? {
            Some(true) => Verdict::Granted,
            Some(false) => Verdict::Busy,
            None => Verdict::Standby,
        },
        // Unknown before PostgreSQL 14.
        idle_limited: row.try_get::<Option<&str>, _>(4)?.is_some_and(|limit| limit != "0"),
    };
    // A transaction that somebody left open on the pooled connection stands still in time. So does, for
    // some microseconds, that of a prepared statement. Looking once too often does no harm.
    if row.try_get(3)? {
        end_transaction(conn).await?;
    }
    Ok(tried)
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
    /// An expression that sets what is not set yet.
    fn settings(self, version: Option<u32>) -> String {
        let Self { keepalives_idle_s, keepalives_interval_s, keepalives_count, check_interval_ms } =
            self;
        // A cut-off client that still owes the server an answer is not probed, but retransmitted to.
        let user_timeout_ms = 1000 * (keepalives_idle_s + keepalives_interval_s * keepalives_count);
        // New in PostgreSQL 14.
        let check_interval = if version >= Some(140_000) {
            format!(
                "set_config('client_connection_check_interval', '{check_interval_ms}', false) || "
            )
        } else {
            String::new()
        };
        let mark = format!(
            "{keepalives_idle_s}/{keepalives_interval_s}/{keepalives_count}/{check_interval_ms}"
        );
        format!(
            "CASE WHEN current_setting('pglock.vigilance', true) IS DISTINCT FROM '{mark}' THEN \
             set_config('tcp_keepalives_idle', '{keepalives_idle_s}', false) || \
             set_config('tcp_keepalives_interval', '{keepalives_interval_s}', false) || \
             set_config('tcp_keepalives_count', '{keepalives_count}', false) || \
             set_config('tcp_user_timeout', '{user_timeout_ms}', false) || \
             {check_interval}set_config('pglock.vigilance', '{mark}', false) END"
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

/// Puts the role's limit on idle sessions back, if it was lifted.
const PUT_BACK: &str = "CASE WHEN current_setting('pglock.idle_session_timeout', true) <> '' THEN \
     set_config('idle_session_timeout', current_setting('pglock.idle_session_timeout'), false) || \
     set_config('pglock.idle_session_timeout', '', false) END";

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
}

/// Waits for a lock in the server's queue. Returns whether it was granted.
///
/// One message of several statements, which the server runs as one transaction, so what is set here
/// is gone with it, and so is the snapshot that a waiting statement holds:
///
/// 1. Lift the role's own limits on statements.
/// 2. Set the limit of this wait, above `deadlock_timeout`, or a deadlock would look like a timeout.
///    Then wait. The timeout is caught, so the server logs no error. It can strike after the grant:
///    whether the lock is held, only `pg_locks` knows.
/// 3. Tell the result, which `DO` can't. What comes after the grant is on the way from one holder
///    to the next, and so is little.
///
/// sqlx warns of statements that take more than a second. This one is meant to, so it runs where no
/// subscriber listens.
pub(crate) async fn wait(
    conn: &mut PgConnection,
    key: KeyId,
    mode: Mode,
    limit: WaitLimit,
) -> Result<bool, sqlx::Error> {
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
    let slice = milliseconds(limit.slice);
    let left = limit.left.map_or(i32::MAX, milliseconds);
    let longest = milliseconds(limit.longest());
    let statement = format!(
        "SET LOCAL statement_timeout = 0; {transaction_timeout}\
         DO $$ BEGIN \
           PERFORM set_config('pglock.granted', 'true', true); \
           PERFORM set_config('lock_timeout', least({left}, greatest({slice}, least({longest}, 1000 + \
             1000 * extract(epoch FROM current_setting('deadlock_timeout')::interval))))::int::text, true); \
           BEGIN \
             PERFORM {function}({}); \
           EXCEPTION WHEN lock_not_available THEN \
             PERFORM set_config('pglock.granted', EXISTS ({})::text, true); \
           END; \
         END $$; \
         SHOW pglock.granted",
        Args(key),
        Held { key, mode, select: "SELECT FROM" },
    );
    let shown: Option<String> = sqlx::raw_sql(AssertSqlSafe(statement))
        .fetch_one(conn)
        .with_subscriber(Dispatch::none())
        .await?
        .try_get(0)?;
    Ok(shown.as_deref() == Some("true"))
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

/// Gives a lock up, in every mode in which it is held, and puts settings back if told to.
pub(crate) async fn unlock(
    conn: &mut PgConnection,
    key: KeyId,
    modes: Modes,
    protocol: Protocol,
    put_back: bool,
) -> Result<Unlocked, sqlx::Error> {
    macro_rules! statement {
        ($call:literal) => {
            concat!("SELECT ", $call, ", pg_backend_pid()")
        };
    }
    let statement = match (protocol, key, modes) {
        (Protocol::Simple, ..)
        | (
            ..,
            Modes { exclusive: true, shared: true } | Modes { exclusive: false, shared: false },
        ) => {
            return unlock_all(conn, &[(key, modes)], put_back).await;
        }
        _ if put_back => return unlock_all(conn, &[(key, modes)], put_back).await,
        (_, KeyId::BigInt(_), Modes { exclusive: true, .. }) => {
            statement!("pg_advisory_unlock($1)")
        }
        (_, KeyId::BigInt(_), Modes { shared: true, .. }) => {
            statement!("pg_advisory_unlock_shared($1)")
        }
        (_, KeyId::IntPair(..), Modes { exclusive: true, .. }) => {
            statement!("pg_advisory_unlock($1, $2)")
        }
        (_, KeyId::IntPair(..), Modes { shared: true, .. }) => {
            statement!("pg_advisory_unlock_shared($1, $2)")
        }
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
    let mut columns = vec!["pg_backend_pid()".to_owned()];
    for &(key, modes) in locks {
        if modes.exclusive {
            columns.push(format!("pg_advisory_unlock({})", Args(key)));
        }
        if modes.shared {
            columns.push(format!("pg_advisory_unlock_shared({})", Args(key)));
        }
    }
    let count = columns.len();
    if put_back {
        columns.push(PUT_BACK.to_owned());
    }
    let row = fetch(conn, format!("SELECT {}", columns.join(", "))).await?;
    let mut all = true;
    for column in 1..count {
        all &= row.try_get::<bool, _>(column)?;
    }
    Ok(Unlocked { backend_pid: row.try_get(0)?, all })
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

/// Gives a lock up if the session holds it, which is not known after a statement was interrupted.
pub(crate) async fn unlock_if_held(
    conn: &mut PgConnection,
    key: KeyId,
    mode: Mode,
    put_back: bool,
) -> Result<(), sqlx::Error> {
    let select = match mode {
        Mode::Exclusive => format!("SELECT pg_advisory_unlock({}) FROM", Args(key)),
        Mode::Shared => format!("SELECT pg_advisory_unlock_shared({}) FROM", Args(key)),
    };
    let mut statement = Held { key, mode, select: &select }.to_string();
    if put_back {
        statement = format!("{statement}; SELECT {PUT_BACK}");
    }
    sqlx::raw_sql(AssertSqlSafe(statement)).fetch_all(conn).await.map(drop)
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
         AND pid = {backend_pid} \
         AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))"
    );
    fetch(conn, statement).await?.try_get(0)
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
    // Inside a transaction, time stands still while statements go on. Outside, and in a message of one
    // statement, both are the time of that.
    let asked = fetch(conn, "SELECT now() <> statement_timestamp()".to_owned()).await;
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
/// A cancel names a process, not a session: the age keeps it from a newcomer with the same number.
pub(crate) async fn cancel_backend(
    conn: &mut PgConnection,
    backend_pid: i32,
    known_for: Duration,
) -> Result<(), sqlx::Error> {
    let known_for = known_for.as_secs_f64();
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
///
/// How a key is laid out there: <https://www.postgresql.org/docs/current/view-pg-locks.html>.
struct Held<'s> {
    key: KeyId,
    mode: Mode,
    select: &'s str,
}

impl std::fmt::Display for Held<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (classid, objid, objsubid) = match self.key {
            KeyId::BigInt(number) => {
                let bits = number.cast_unsigned();
                (bits >> 32, bits & u64::from(u32::MAX), 1)
            }
            KeyId::IntPair(first, second) => {
                (u64::from(first.cast_unsigned()), u64::from(second.cast_unsigned()), 2)
            }
        };
        let mode = match self.mode {
            Mode::Exclusive => "ExclusiveLock",
            Mode::Shared => "ShareLock",
        };
        write!(
            f,
            "{} pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid() AND granted \
             AND classid = {classid} AND objid = {objid} AND objsubid = {objsubid} \
             AND mode = '{mode}'",
            self.select
        )
    }
}

async fn fetch(conn: &mut PgConnection, statement: String) -> Result<PgRow, sqlx::Error> {
    sqlx::raw_sql(AssertSqlSafe(statement)).fetch_one(conn).await
}

/// For a timeout of the server: at least 1, for 0 means none.
fn milliseconds(duration: Duration) -> i32 {
    i32::try_from(duration.as_millis()).unwrap_or(i32::MAX).max(1)
}
