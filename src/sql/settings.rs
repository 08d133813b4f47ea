//! Settings of the session: those that stay on the pooled connection, and those that are put back.

use sqlx::PgConnection;

use super::fetch;
use crate::options::Keepalives;

/// How often the server looks whether the client of a running statement is still connected.
const CHECK_INTERVAL_MS: u32 = 1000;

impl Keepalives {
    /// Columns that set what an application can't notice, each followed by a comma. These settings
    /// stay on the pooled connection: the operating system of the client answers the probes, also
    /// while the application does not read.
    pub(super) fn keepalives(self) -> String {
        let [idle, interval, retries] = self.seconds_and_retries();
        format!(
            "pg_catalog.set_config('tcp_keepalives_idle', '{idle}', false), \
             pg_catalog.set_config('tcp_keepalives_interval', '{interval}', false), \
             pg_catalog.set_config('tcp_keepalives_count', '{retries}', false), "
        )
    }

    /// Columns that set how long the server retransmits to a client that still owes it an
    /// acknowledgement, each followed by a comma.
    ///
    /// This also ends a connection whose client does not read for that time, so it is only set while no
    /// application uses the connection.
    pub(super) fn user_timeout(self) -> String {
        let [idle, interval, retries] = self.seconds_and_retries();
        let milliseconds = 1000 * (idle + interval * retries);
        change(USER_TIMEOUT, &format!("'{milliseconds}'")) + ", "
    }

    /// Columns that set all of this, each followed by a comma.
    pub(super) fn settings(self, version: Option<u32>) -> String {
        let mut columns = self.keepalives() + &self.user_timeout();
        // New in PostgreSQL 14.
        if version >= Some(140_000) {
            columns += &check_connection();
            columns += ", ";
        }
        columns
    }
}

/// The settings that an application would notice. They are put back when the session ends.
const CHANGED: [&str; 4] = [APPLICATION_NAME, CHECK_INTERVAL, IDLE_TIMEOUT, USER_TIMEOUT];
const APPLICATION_NAME: &str = "application_name";
const CHECK_INTERVAL: &str = "client_connection_check_interval";
const IDLE_TIMEOUT: &str = "idle_session_timeout";
const USER_TIMEOUT: &str = "tcp_user_timeout";

/// Two columns that change a setting. The first one saves its old value in a setting of ours, with a
/// mark in front because the value may be empty.
fn change(name: &str, value: &str) -> String {
    format!(
        "CASE WHEN coalesce(pg_catalog.current_setting('pglock.{name}', true), '') \
           OPERATOR(pg_catalog.=) '' \
         THEN pg_catalog.set_config('pglock.{name}', \
           '=' OPERATOR(pg_catalog.||) pg_catalog.current_setting('{name}'), false) END, \
         pg_catalog.set_config('{name}', {value}, false)"
    )
}

/// A column that puts a setting back if it was changed.
fn put_back_one(name: &str) -> String {
    format!(
        "CASE WHEN pg_catalog.current_setting('pglock.{name}', true) OPERATOR(pg_catalog.<>) '' \
         THEN pg_catalog.set_config('{name}', \
           pg_catalog.substr(pg_catalog.current_setting('pglock.{name}'), 2), false) \
           OPERATOR(pg_catalog.||) pg_catalog.set_config('pglock.{name}', '', false) END"
    )
}

/// Columns that put back all that was changed, and remove the mark: a role's limit on idle sessions applies
/// again.
pub(super) fn put_back_all() -> String {
    format!(
        "CASE WHEN pg_catalog.current_setting('pglock.{IDLE_TIMEOUT}', true) OPERATOR(pg_catalog.<>) '' \
         THEN pg_catalog.set_config('pglock.keepalives', '', false) END, {}",
        CHANGED.map(put_back_one).join(", ")
    )
}

/// Puts back all settings that were changed.
pub(crate) async fn put_back(conn: &mut PgConnection) -> Result<(), sqlx::Error> {
    fetch(conn, format!("SELECT {}", put_back_all())).await.map(drop)
}

/// Prepares the session for statements of the application: puts back what a slow reader would notice, and
/// has the server check during a long statement whether this client is still connected.
pub(crate) async fn lend(conn: &mut PgConnection) -> Result<(), sqlx::Error> {
    let mut columns = put_back_one(USER_TIMEOUT);
    // New in PostgreSQL 14.
    if conn.server_version_num() >= Some(140_000) {
        columns += ", ";
        columns += &check_connection();
    }
    fetch(conn, format!("SELECT {columns}")).await.map(drop)
}

/// Columns that have the server check whether the client of a running statement is still connected.
fn check_connection() -> String {
    change(CHECK_INTERVAL, &format!("'{CHECK_INTERVAL_MS}'"))
}

/// Lifts the role's limit on idle sessions, because a holder may be idle.
pub(crate) async fn lift_idle_timeout(conn: &mut PgConnection) -> Result<(), sqlx::Error> {
    fetch(conn, format!("SELECT {}", change(IDLE_TIMEOUT, "'0'"))).await.map(drop)
}

/// Has the server probe a client that is silent. An application can't notice that.
pub(crate) async fn probe(
    conn: &mut PgConnection,
    keepalives: Keepalives,
) -> Result<(), sqlx::Error> {
    fetch(conn, format!("SELECT {}true", keepalives.keepalives())).await.map(drop)
}

/// Shows a name in `application_name`, which is all that others see of a session.
pub(crate) async fn show_name(conn: &mut PgConnection, name: &str) -> Result<(), sqlx::Error> {
    let statement = format!("SELECT {}", change(APPLICATION_NAME, "$1"));
    let query = sqlx::query(sqlx::AssertSqlSafe(statement)).persistent(false);
    query.bind(name).execute(conn).await.map(drop)
}
