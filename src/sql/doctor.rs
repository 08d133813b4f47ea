//! The statements of [`doctor`](crate::doctor).

use sqlx::postgres::PgRow;
use sqlx::{AssertSqlSafe, PgConnection, Row};

use super::place::LOCKS;
use super::{fetch, units};
use crate::error::is_answer;

/// The server's answer, or the reason why there is none.
pub(crate) type Seen<T> = Result<T, String>;

/// Everything that affects the locks of a role: see [`circumstances`].
pub(crate) struct Circumstances {
    /// A number such as `150018`.
    pub(crate) version: u32,
    /// The answer of `version()`.
    pub(crate) product: String,
    /// The role as a quoted identifier, for statements that are advised.
    pub(crate) role: String,
    pub(crate) standby: bool,
    /// Whether the connection uses TCP, and not a unix socket.
    pub(crate) tcp: bool,
    pub(crate) settings: Vec<(&'static str, i64)>,
    /// Those functions that a lock needs and that the role may not call.
    pub(crate) forbidden: Seen<Option<String>>,
    pub(crate) rights: Seen<Rights>,
    pub(crate) plpgsql: Seen<bool>,
    /// The extensions that spread a database over several nodes, each with a lock table of its own.
    pub(crate) distributed: Seen<Option<String>>,
    /// Whether the server logs waits for locks.
    pub(crate) logs_waits: Seen<bool>,
    /// Whether the role may turn that off.
    pub(crate) may_be_quiet: Seen<()>,
    /// The number of locks in the lock table.
    pub(crate) locks: Seen<i64>,
    pub(crate) connections: Seen<Connections>,
}

/// What the role may do to the sessions of other roles.
#[derive(Clone, Copy)]
pub(crate) struct Rights {
    pub(crate) sees_all: bool,
    pub(crate) ends_all: bool,
}

/// The sessions of a server. A limit of -1 means no limit.
#[derive(Clone, Copy)]
pub(crate) struct Connections {
    pub(crate) all: i64,
    pub(crate) of_role: i64,
    pub(crate) of_database: i64,
    pub(crate) superuser: bool,
    pub(crate) role_limit: i32,
    pub(crate) database_limit: i32,
}

impl Circumstances {
    /// Returns a setting, with times in the unit of `pg_settings`; 0 if the server has no setting of this name.
    pub(crate) fn setting(&self, name: &str) -> i64 {
        let found = self.settings.iter().find(|(known, _)| *known == name);
        found.map_or(0, |(_, value)| *value)
    }
}

/// The role that lets its members see the sessions of all roles.
pub(crate) const SEES_ALL: &str = "pg_read_all_stats";

/// The role that lets its members end the sessions of all roles except superusers.
pub(crate) const ENDS_ALL: &str = "pg_signal_backend";

/// The function that lists the lock table.
pub(crate) const LOCK_LIST: &str = "pg_catalog.pg_lock_status()";

/// The function that lists the sessions.
pub(crate) const SESSION_LIST: &str = "pg_catalog.pg_stat_get_activity(integer)";

/// The catalog that lists the languages of a database.
pub(crate) const LANGUAGES: &str = "pg_catalog.pg_language";

/// The catalogs that contain the limits on connections.
pub(crate) const LIMITS: &str = "pg_catalog.pg_roles, pg_catalog.pg_database";

/// The settings that are read. Each time is in milliseconds, as `pg_settings` shows it, or in the unit of the TCP
/// settings.
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

/// Returns everything that affects locks, as far as the role may see it.
///
/// Each question is a statement of its own, because a server may refuse any of them.
pub(crate) async fn circumstances(conn: &mut PgConnection) -> Result<Circumstances, sqlx::Error> {
    let version = conn.server_version_num().unwrap_or_default();
    let settings =
        SETTINGS.map(|name| format!(", pg_catalog.current_setting('{name}', true)")).concat();
    let statement = format!(
        "SELECT current_user::pg_catalog.text, pg_catalog.pg_is_in_recovery(), \
         pg_catalog.inet_client_addr() IS NOT NULL, pg_catalog.version(){settings}"
    );
    let row = fetch(conn, statement).await?;
    let role = format!("\"{}\"", row.try_get::<&str, _>(0)?.replace('"', "\"\""));
    let (standby, tcp) = (row.try_get(1)?, row.try_get(2)?);
    let product = row.try_get(3)?;
    let mut settings = Vec::with_capacity(SETTINGS.len());
    for (name, column) in SETTINGS.into_iter().zip(4..) {
        let value = row.try_get::<Option<&str>, _>(column)?;
        settings.extend(value.and_then(units::milliseconds).map(|value| (name, value)));
    }

    let functions = FUNCTIONS.map(|function| format!("('pg_catalog.{function}')")).join(", ");
    let forbidden = format!(
        "SELECT pg_catalog.string_agg(called.function, ', ') \
         FROM (VALUES {functions}) AS called (function) \
         WHERE NOT pg_catalog.has_function_privilege(called.function, 'execute')"
    );
    let rights = format!(
        "SELECT pg_catalog.pg_has_role('{SEES_ALL}', 'usage'), \
         pg_catalog.pg_has_role('{ENDS_ALL}', 'usage')"
    );
    let plpgsql = "SELECT EXISTS (SELECT FROM pg_catalog.pg_language AS l \
        WHERE l.lanname OPERATOR(pg_catalog.=) 'plpgsql' \
        AND pg_catalog.has_language_privilege(l.oid, 'usage'))";
    let distributed = "SELECT pg_catalog.string_agg(e.extname::pg_catalog.text, ', ') \
        FROM pg_catalog.pg_extension AS e \
        WHERE e.extname OPERATOR(pg_catalog.=) 'bdr' OR e.extname OPERATOR(pg_catalog.=) 'citus'";
    let logs_waits =
        "SELECT pg_catalog.current_setting('log_lock_waits') OPERATOR(pg_catalog.=) 'on'";
    // Applies to this statement only.
    let be_quiet = "SELECT pg_catalog.set_config('log_lock_waits', 'off', true)";
    // A lock with `fastpath` is not in the shared lock table. Several sessions may hold one lock.
    let locks = format!(
        "SELECT pg_catalog.count(DISTINCT pg_catalog.concat_ws('/', l.locktype, l.database, l.relation, l.page, \
         l.tuple, l.virtualxid, l.transactionid, l.classid, l.objid, l.objsubid)) \
         FROM {LOCKS} WHERE NOT l.fastpath"
    );
    // A limit counts the sessions by the role that logged in, whatever `SET ROLE` says.
    let connections = "SELECT pg_catalog.count(a.datid), \
         pg_catalog.count(a.datid) FILTER (WHERE a.usesysid OPERATOR(pg_catalog.=) r.oid), \
         pg_catalog.count(a.datid) FILTER (WHERE a.datid OPERATOR(pg_catalog.=) d.oid), \
         r.rolsuper, r.rolconnlimit, d.datconnlimit \
         FROM pg_catalog.pg_roles AS r, pg_catalog.pg_database AS d, \
           pg_catalog.pg_stat_get_activity(NULL) AS a \
         WHERE r.rolname OPERATOR(pg_catalog.=) session_user \
         AND d.datname OPERATOR(pg_catalog.=) pg_catalog.current_database() \
         GROUP BY r.rolsuper, r.rolconnlimit, d.datconnlimit";
    Ok(Circumstances {
        version,
        product,
        role,
        standby,
        tcp,
        settings,
        forbidden: ask(conn, &forbidden, |row| row.try_get(0)).await?,
        rights: ask(conn, &rights, |row| {
            Ok(Rights { sees_all: row.try_get(0)?, ends_all: row.try_get(1)? })
        })
        .await?,
        plpgsql: ask(conn, plpgsql, |row| row.try_get(0)).await?,
        distributed: ask(conn, distributed, |row| row.try_get(0)).await?,
        logs_waits: ask(conn, logs_waits, |row| row.try_get(0)).await?,
        may_be_quiet: ask(conn, be_quiet, |_| Ok(())).await?,
        locks: ask(conn, &locks, |row| row.try_get(0)).await?,
        connections: ask(conn, connections, |row| {
            Ok(Connections {
                all: row.try_get(0)?,
                of_role: row.try_get(1)?,
                of_database: row.try_get(2)?,
                superuser: row.try_get(3)?,
                role_limit: row.try_get(4)?,
                database_limit: row.try_get(5)?,
            })
        })
        .await?,
    })
}

/// Asks a question that the server may refuse.
async fn ask<T>(
    conn: &mut PgConnection,
    statement: &str,
    read: impl FnOnce(&PgRow) -> Result<T, sqlx::Error>,
) -> Result<Seen<T>, sqlx::Error> {
    match sqlx::raw_sql(AssertSqlSafe(statement)).fetch_optional(conn).await {
        Ok(Some(row)) => read(&row).map(Ok),
        Ok(None) => Ok(Err("the server shows nothing".to_owned())),
        Err(error) if is_answer(&error) => {
            Ok(Err(error.as_database_error().map(ToString::to_string).unwrap_or_default()))
        }
        Err(error) => Err(error),
    }
}
