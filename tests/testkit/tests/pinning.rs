//! A pinning pooler multiplexes transactions, until a client is pinned.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::time::Duration;

use pglock_testkit::{Pinning, PinningPooler, Server};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, PgConnection, Row};
use tokio::time::timeout;

/// Runs a statement, and returns which backend answers the next one.
async fn after(conn: &mut PgConnection, statement: &str) -> i32 {
    sqlx::raw_sql(AssertSqlSafe(statement)).execute(&mut *conn).await.unwrap();
    sqlx::raw_sql("SELECT pg_backend_pid()").fetch_one(conn).await.unwrap().get(0)
}

#[tokio::test]
async fn clients_share_a_server_connection() {
    let server = Server::start();
    let pooler = PinningPooler::start(&server, 1, Pinning::UntilDisconnected).await;
    let mut one = pooler.connect_options().connect().await.unwrap();
    let mut two = pooler.connect_options().connect().await.unwrap();
    let pid = after(&mut one, "SELECT 1").await;
    for _ in 0..3 {
        assert_eq!(after(&mut one, "SELECT 1").await, pid);
        // The statement is unnamed, so it leaves nothing on the server connection.
        let unnamed = sqlx::query("SELECT pg_backend_pid()").persistent(false);
        assert_eq!(unnamed.fetch_one(&mut two).await.unwrap().get::<i32, _>(0), pid);
    }
}

#[tokio::test]
async fn a_transaction_and_a_pinned_client_have_a_server_connection_of_their_own() {
    let server = Server::start();
    for (pinning, undo) in [
        ("BEGIN", Some("COMMIT")),
        ("SELECT pg_try_advisory_lock(1)", None),
        ("select PG_ADVISORY_LOCK(1)", None),
        ("SET work_mem = '1MB'", None),
        ("SELECT set_config('work_mem', '1MB', false)", None),
    ] {
        let pooler = PinningPooler::start(&server, 2, Pinning::UntilDisconnected).await;
        let mut one = pooler.connect_options().connect().await.unwrap();
        let mut two = pooler.connect_options().connect().await.unwrap();
        let pid = after(&mut one, pinning).await;
        for _ in 0..3 {
            assert_ne!(after(&mut two, "SELECT 1").await, pid, "{pinning}");
            assert_eq!(after(&mut one, "SELECT 1").await, pid, "{pinning}");
        }
        if let Some(undo) = undo {
            after(&mut one, undo).await;
            let shared = after(&mut two, "SELECT 1").await == after(&mut one, "SELECT 1").await;
            assert!(shared, "{pinning}");
        }
    }
}

#[tokio::test]
async fn what_a_pinned_client_held_is_free_when_it_disconnects() {
    let server = Server::start();
    let pooler = PinningPooler::start(&server, 1, Pinning::UntilDisconnected).await;
    for _ in 0..3 {
        let mut conn = pooler.connect_options().connect().await.unwrap();
        // A named statement, which waits while the server ends the session of the previous client.
        let lock = sqlx::query("SELECT pg_advisory_lock(1)").execute(&mut conn);
        timeout(Duration::from_secs(20), lock).await.unwrap().unwrap();
        conn.close().await.unwrap();
    }
}

#[tokio::test]
async fn a_client_is_pinned_until_it_unlocks() {
    let server = Server::start();
    let pooler = PinningPooler::start(&server, 2, Pinning::UntilUnlocked).await;
    let mut one = pooler.connect_options().connect().await.unwrap();
    let mut two = pooler.connect_options().connect().await.unwrap();
    for function in ["pg_advisory_lock(1)", "pg_catalog.pg_try_advisory_lock_shared(1)"] {
        let pid = after(&mut one, &format!("SELECT {function}")).await;
        assert_ne!(after(&mut two, "SELECT 1").await, pid, "{function}");
        let unlock = function.replace("try_", "").replace("_lock", "_unlock");
        let freed = after(&mut one, &format!("SELECT {unlock}")).await;
        assert_eq!(after(&mut two, "SELECT 1").await, freed, "{function}");
    }
    // The pooler does not see a call in a `DO` block.
    let pid = after(&mut one, "DO $$ BEGIN PERFORM pg_advisory_lock(2); END $$").await;
    assert_eq!(after(&mut two, "SELECT pg_advisory_unlock(2)").await, pid);
}
