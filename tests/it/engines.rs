//! Servers that speak PostgreSQL's protocol and have no advisory locks, played by functions of the same names.

use std::time::Duration;

use pglock::doctor::{Finding, Severity, examine};
use pglock::{Election, Error, Lock, LockManager, LockOptions, MultiLock, Result, Semaphore};
use pglock_testkit::{Server, TestDb, eventually, replace_function};
use sqlx::{AssertSqlSafe, PgConnection, PgPool};

const KEY: &str = "nightly-report";
const LIMIT: Duration = Duration::from_secs(20);

const FUNCTIONS: [&str; 4] = [
    "pg_try_advisory_lock(bigint)",
    "pg_try_advisory_lock_shared(bigint)",
    "pg_advisory_unlock(bigint)",
    "pg_advisory_unlock_shared(bigint)",
];

/// A server of its own, because the proof of a server is made once.
struct Engine {
    db: TestDb,
    pool: PgPool,
    server: Server,
}

impl Engine {
    /// `body` is what the functions do, in PL/pgSQL.
    async fn start(product: &str, body: &str) -> Self {
        let server = Server::options().setting("log_connections", "on").start();
        let db = TestDb::on(&server).await;
        let mut admin = db.admin().await;
        for function in FUNCTIONS {
            replace_function(&mut admin, function, body).await;
        }
        call_itself(&mut admin, product).await;
        let pool = db.pool(3).await;
        Self { db, pool, server }
    }

    async fn finding(&self, check: &str) -> Finding {
        let findings = examine(&self.pool, &LockOptions::new()).await.unwrap();
        findings.into_iter().find(|finding| finding.check == check).unwrap()
    }
}

async fn call_itself(admin: &mut PgConnection, product: &str) {
    let version = format!(
        "CREATE OR REPLACE FUNCTION pg_catalog.version() RETURNS text \
         LANGUAGE sql AS $$ SELECT '{product}'::text $$"
    );
    sqlx::raw_sql(AssertSqlSafe(version)).execute(admin).await.unwrap();
}

/// Acquires in each way.
async fn acquire(pool: &PgPool) -> [Result<()>; 6] {
    let strict = LockOptions::new().require_settings();
    [
        Lock::new(pool, KEY).acquire().await.map(drop),
        Lock::new(&strict.on(pool).unwrap(), KEY).try_acquire_shared().await.map(drop),
        Lock::new(&LockManager::new(pool), KEY).acquire().await.map(drop),
        MultiLock::new(pool, ["one", "two"]).acquire().await.map(drop),
        Semaphore::new(pool, KEY, 2).unwrap().acquire().await.map(drop),
        Election::new(pool, "billing").candidate("node-7").campaign().await.map(drop),
    ]
}

/// All functions return true to all clients, and the views of locks are empty: `CockroachDB` before 26.3, and
/// `YugabyteDB` where it does not report that it has no locks.
#[tokio::test]
async fn locks_that_are_always_granted_are_refused() {
    let engine = Engine::start("CockroachDB CCL v24.1.0", "BEGIN RETURN true; END").await;
    let mut admin = engine.db.admin().await;
    let views = "ALTER VIEW pg_catalog.pg_locks SET SCHEMA original;
                 CREATE VIEW pg_catalog.pg_locks AS SELECT * FROM original.pg_locks WHERE false;
                 ALTER VIEW pg_catalog.pg_stat_activity SET SCHEMA original;
                 CREATE VIEW pg_catalog.pg_stat_activity AS
                     SELECT * FROM original.pg_stat_activity WHERE false";
    sqlx::raw_sql(views).execute(&mut admin).await.unwrap();
    // The first acquires wait for the proof, but not for long.
    eventually("all are refused", LIMIT, async || {
        let refused = |acquired: &_| matches!(acquired, Err(Error::NoExclusion { .. }));
        acquire(&engine.pool).await.iter().all(refused)
    })
    .await;
    let mark = engine.server.log_len();
    drop(acquire(&engine.pool).await);
    // Each closes its connection, and each proof takes two. The search for a pooler's backend would take a hundred.
    let opened = engine.server.log_since(mark).matches("connection authorized").count();
    assert!((1..50).contains(&opened), "{opened} connections");

    for (product, name) in [
        ("CockroachDB CCL v24.1.0", "CockroachDB"),
        ("PostgreSQL 11.2-YB-2.21.0.0-b0 on x86_64", "YugabyteDB"),
    ] {
        call_itself(&mut admin, product).await;
        let Finding { severity, seen, .. } = engine.finding("exclusion").await;
        assert_eq!(severity, Severity::Broken);
        assert_eq!(seen, format!("the server is {name}, where locks exclude no other session"));
    }
}

/// The functions fail: `YugabyteDB` before 2.25.1 (0A000), and Aurora DSQL, which has none (42883).
#[tokio::test]
async fn functions_that_fail_fail_the_acquire_with_the_servers_error() {
    for (product, code, name) in [
        ("PostgreSQL 11.2-YB-2.21.0.0-b0 on x86_64", "0A000", Some("YugabyteDB")),
        ("PostgreSQL 16", "42883", None),
    ] {
        let body =
            format!("BEGIN RAISE 'advisory locks are no part of it' USING ERRCODE = '{code}'; END");
        let engine = Engine::start(product, &body).await;
        for acquired in acquire(&engine.pool).await {
            let error = acquired.unwrap_err();
            assert!(!error.is_transient());
            let Error::Database { source, .. } = &error else { panic!("{error:?}") };
            assert_eq!(source.as_database_error().unwrap().code().as_deref(), Some(code));
        }
        let Finding { severity, seen, .. } = engine.finding("exclusion").await;
        assert_eq!(severity, Severity::Broken);
        assert!(seen.contains("advisory locks are no part of it"), "{seen}");
        assert_eq!(seen.contains("the server is "), name.is_some(), "{seen}");
        assert!(name.is_none_or(|name| seen.contains(name)), "{seen}");
    }
}
