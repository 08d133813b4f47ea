//! A PgBouncer stands in front of a server, in the mode that was asked for.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use pglock_testkit::{PgBouncer, Server, TestDb};
use sqlx::{ConnectOptions, PgConnection, Row};

async fn backend_pid(conn: &mut PgConnection) -> i32 {
    sqlx::raw_sql("SELECT pg_backend_pid()").fetch_one(conn).await.unwrap().get(0)
}

#[tokio::test]
async fn clients_share_a_server_connection_in_transaction_mode_only() {
    let (server, db) = TestDb::with_server().await;
    for (mode, shared) in [("transaction", true), ("session", false)] {
        let Some(pooler) = PgBouncer::start(&server, &[("pool_mode", mode)]) else { return };
        let options = pooler.connect_options().database(db.name());
        let mut one = options.connect().await.unwrap();
        let mut two = options.connect().await.unwrap();
        let same = backend_pid(&mut one).await == backend_pid(&mut two).await;
        assert_eq!(same, shared, "{mode}: {}", pooler.log());
    }
}

#[tokio::test]
async fn nothing_is_left_of_a_dropped_one() {
    let server = Server::start();
    let Some(pooler) = PgBouncer::start(&server, &[]) else { return };
    let options = pooler.connect_options();
    let mut conn = options.connect().await.unwrap();
    let dir = options.get_socket().unwrap().clone();
    assert!(dir.exists());
    drop(pooler);
    assert!(!dir.exists());
    sqlx::raw_sql("SELECT 1").execute(&mut conn).await.unwrap_err();
}
