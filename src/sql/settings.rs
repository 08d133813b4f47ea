//! Settings of the session: those that stay on the pooled connection, and those that are restored.

use sqlx::PgConnection;

use super::backend::{TIME_STANDS_STILL, end_if_open};
use super::fetch;
use crate::options::Keepalives;

/// How often the server checks whether the client of a running statement is still connected.
const CHECK_INTERVAL_MS: u32 = 1000;

impl Keepalives {
    /// Returns columns that set the TCP keepalives, each followed by a comma. An application can't notice these
    /// settings, so they stay on the pooled connection: the operating system of the client answers the probes, even
    /// while the application does not read.
    pub(super) fn keepalives(self) -> String {
        let [idle, interval, retries] = self.seconds_and_retries();
        format!(
            "pg_catalog.set_config('tcp_keepalives_idle', '{idle}', false), \
             pg_catalog.set_config('tcp_keepalives_interval', '{interval}', false), \
             pg_catalog.set_config('tcp_keepalives_count', '{retries}', false), "
        )
    }

    /// Returns columns that set `tcp_user_timeout`, each followed by a comma: how long the server retransmits to a
    /// client that still owes it an acknowledgement.
    ///
    /// This also ends a connection whose client does not read for that time, so `tcp_user_timeout` is only set while no
    /// application uses the connection.
    pub(super) fn user_timeout(self) -> String {
        let [idle, interval, retries] = self.seconds_and_retries();
        let milliseconds = 1000 * (idle + interval * retries);
        change(USER_TIMEOUT, &format!("'{milliseconds}'")) + ", "
    }

    /// Returns columns that set the keepalives, `tcp_user_timeout` and the connection check, each followed by a comma.
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

/// The settings that an application would notice. They are restored when the session ends.
const CHANGED: [&str; 4] = [APPLICATION_NAME, CHECK_INTERVAL, IDLE_TIMEOUT, USER_TIMEOUT];
const APPLICATION_NAME: &str = "application_name";
const CHECK_INTERVAL: &str = "client_connection_check_interval";
const IDLE_TIMEOUT: &str = "idle_session_timeout";
const USER_TIMEOUT: &str = "tcp_user_timeout";

/// Returns two columns that change a setting. The first one saves the old value in a setting of ours, with `=` in front
/// because the value may be empty.
fn change(name: &str, value: &str) -> String {
    format!(
        "CASE WHEN coalesce(pg_catalog.current_setting('pglock.{name}', true), '') \
           OPERATOR(pg_catalog.=) '' \
         THEN pg_catalog.set_config('pglock.{name}', \
           '=' OPERATOR(pg_catalog.||) pg_catalog.current_setting('{name}'), false) END, \
         pg_catalog.set_config('{name}', {value}, false)"
    )
}

/// Returns a column that restores a setting if it was changed.
fn put_back_one(name: &str) -> String {
    format!(
        "CASE WHEN pg_catalog.current_setting('pglock.{name}', true) OPERATOR(pg_catalog.<>) '' \
         THEN pg_catalog.set_config('{name}', \
           pg_catalog.substr(pg_catalog.current_setting('pglock.{name}'), 2), false) \
           OPERATOR(pg_catalog.||) pg_catalog.set_config('pglock.{name}', '', false) END"
    )
}

/// Restores all settings that were changed. Also removes the mark if a role's limit on idle sessions applies again.
pub(crate) async fn put_back(conn: &mut PgConnection) -> Result<(), sqlx::Error> {
    let statement = format!(
        "SELECT CASE WHEN pg_catalog.current_setting('pglock.{IDLE_TIMEOUT}', true) OPERATOR(pg_catalog.<>) '' \
         THEN pg_catalog.set_config('pglock.keepalives', '', false) END, {}",
        CHANGED.map(put_back_one).join(", ")
    );
    fetch(conn, statement).await.map(drop)
}

/// Prepares the session for statements of the application: ends a transaction that was left open, and restores
/// `tcp_user_timeout`, which would end the connection of a slow reader. With `checks`, the server also checks during a
/// long statement whether this client is still connected.
pub(crate) async fn lend(conn: &mut PgConnection, checks: bool) -> Result<(), sqlx::Error> {
    let mut columns = put_back_one(USER_TIMEOUT);
    // New in PostgreSQL 14.
    if checks && conn.server_version_num() >= Some(140_000) {
        columns += ", ";
        columns += &check_connection();
    }
    let statement = format!("SELECT {TIME_STANDS_STILL}, {columns}");
    let answer = fetch(conn, statement.clone()).await;
    if end_if_open(conn, answer).await? {
        // The settings were rolled back with the transaction.
        fetch(conn, statement).await?;
    }
    Ok(())
}

/// Returns columns that make the server check whether the client of a running statement is still connected.
fn check_connection() -> String {
    change(CHECK_INTERVAL, &format!("'{CHECK_INTERVAL_MS}'"))
}

/// Disables the role's limit on idle sessions, because a holder may be idle.
pub(crate) async fn lift_idle_timeout(conn: &mut PgConnection) -> Result<(), sqlx::Error> {
    fetch(conn, format!("SELECT {}", change(IDLE_TIMEOUT, "'0'"))).await.map(drop)
}

/// Makes the server probe a silent client. An application can't notice that.
pub(crate) async fn probe(
    conn: &mut PgConnection,
    keepalives: Keepalives,
) -> Result<(), sqlx::Error> {
    fetch(conn, format!("SELECT {}true", keepalives.keepalives())).await.map(drop)
}

/// Shows a name in `application_name`, which is all that other clients see of a session.
///
/// The name is sent in hexadecimal digits: no text may get into a statement, and a parameter would take another round
/// trip.
pub(crate) async fn show_name(conn: &mut PgConnection, name: &str) -> Result<(), sqlx::Error> {
    let digits = name.bytes().fold(String::new(), |digits, byte| digits + &format!("{byte:02x}"));
    let name = format!("pg_catalog.convert_from(pg_catalog.decode('{digits}', 'hex'), 'UTF8')");
    fetch(conn, format!("SELECT {}", change(APPLICATION_NAME, &name))).await.map(drop)
}
