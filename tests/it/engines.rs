//! Servers that speak PostgreSQL's protocol and have no advisory locks, simulated by functions of the same names.

use std::time::Duration;

use pglock::doctor::{Finding, Severity, examine};
use pglock::{
    Election, Error, Key, Lock, LockManager, LockOptions, MultiLock, Result, Semaphore, inspect,
    transaction,
};
use pglock_testkit::{Proxy, Server, TestDb, eventually, replace_function};
use sqlx::postgres::PgPoolOptions;
use sqlx::{AssertSqlSafe, PgConnection, PgPool};

use crate::support::{TIMEOUT, prove_exclusion};

const KEY: &str = "nightly-report";

const FUNCTIONS: [&str; 4] = [
    "pg_try_advisory_lock(bigint)",
    "pg_try_advisory_lock_shared(bigint)",
    "pg_advisory_unlock(bigint)",
    "pg_advisory_unlock_shared(bigint)",
];

/// A simulated engine has a server of its own, because the proof of a server is made once.
struct Engine {
    db: TestDb,
    pool: PgPool,
    server: Server,
}

impl Engine {
    /// `body` is the body of the functions, in PL/pgSQL.
    async fn start(product: &str, body: &str) -> Self {
        let server = Server::options().tcp().setting("log_connections", "on").start();
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

/// Acquires a lock in each way.
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
/// `YugabyteDB` where it does not report that it has no locks. `CockroachDB` has no function that waits.
#[tokio::test]
async fn locks_that_are_always_granted_are_refused() {
    let engine = Engine::start("CockroachDB CCL v24.1.0", "BEGIN RETURN true; END").await;
    let mut admin = engine.db.admin().await;
    let views = "ALTER VIEW pg_catalog.pg_locks SET SCHEMA original;
                 CREATE VIEW pg_catalog.pg_locks AS SELECT * FROM original.pg_locks WHERE false;
                 ALTER VIEW pg_catalog.pg_stat_activity SET SCHEMA original;
                 CREATE VIEW pg_catalog.pg_stat_activity AS
                     SELECT * FROM original.pg_stat_activity WHERE false;
                 ALTER FUNCTION pg_catalog.pg_advisory_lock(bigint) SET SCHEMA original;
                 ALTER FUNCTION pg_catalog.pg_advisory_lock_shared(bigint) SET SCHEMA original;
                 ALTER FUNCTION pg_catalog.pg_advisory_xact_lock(bigint) SET SCHEMA original;
                 ALTER FUNCTION pg_catalog.pg_try_advisory_xact_lock(bigint) SET SCHEMA original";
    sqlx::raw_sql(views).execute(&mut admin).await.unwrap();
    replace_function(&mut admin, "pg_lock_status()", "BEGIN RETURN; END").await;
    // The first acquires wait for the proof, but not for long.
    eventually("all are refused", TIMEOUT, async || {
        let refused = |acquired: &_| matches!(acquired, Err(Error::NoExclusion { .. }));
        acquire(&engine.pool).await.iter().all(refused)
    })
    .await;
    let mark = engine.server.log_len();
    drop(acquire(&engine.pool).await);
    // Each acquire closes its connection, and each proof takes two connections. The search for a pooler's backend would
    // take a hundred.
    let opened = engine.server.log_since(mark).matches("connection authorized").count();
    assert!((1..50).contains(&opened), "{opened} connections");

    let mut tx = engine.pool.begin().await.unwrap();
    let refused = transaction::try_acquire(&mut tx, KEY).await.unwrap_err();
    assert!(matches!(refused, Error::Database { .. }), "{refused:?}");
    drop(tx);

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

/// Each node of Citus and of EDB Postgres Distributed has a lock table of its own.
#[tokio::test]
async fn doctor_warns_of_a_database_on_several_nodes() {
    let (_server, db) = TestDb::with_server().await;
    let pool = db.pool(3).await;
    let nodes = async || {
        let findings = examine(&pool, &LockOptions::new()).await.unwrap();
        findings.into_iter().find(|finding| finding.check == "nodes")
    };
    assert_eq!(nodes().await, None);
    let install = "INSERT INTO pg_extension (oid, extname, extowner, extnamespace, extrelocatable, extversion)
                   SELECT 99999, 'citus', extowner, extnamespace, false, '13.0' FROM pg_extension
                   WHERE extname = 'plpgsql'";
    sqlx::raw_sql(install).execute(&pool).await.unwrap();
    let found = nodes().await.unwrap();
    assert_eq!(found.severity, Severity::Warning);
    assert_eq!(found.seen, "the database has the extension citus");
}

/// Citus locks its shards by advisory locks of kinds for which the server has no function.
#[tokio::test]
async fn advisory_locks_of_other_kinds_are_no_keys() {
    let (_server, db) = TestDb::with_server().await;
    prove_exclusion(&db).await;
    let (pool, mut admin) = (db.pool(3).await, db.admin().await);
    let shards = "BEGIN
            RETURN QUERY SELECT * FROM original.pg_lock_status();
            RETURN QUERY SELECT shard.* FROM generate_series(4, 6) AS kind, json_populate_record(
                NULL::pg_locks, json_build_object('locktype', 'advisory', 'classid', 0, 'objid', 102008,
                    'database', (SELECT oid FROM pg_database WHERE datname = current_database()),
                    'objsubid', kind, 'mode', 'ShareLock', 'granted', true, 'pid', pg_backend_pid())
                ) AS shard;
        END";
    replace_function(&mut admin, "pg_lock_status()", shards).await;
    let held = Lock::new(&pool, 102_008).acquire().await.unwrap();
    let shown = "SELECT count(*) FROM pg_lock_status() WHERE objid = 102008";
    let shown: i64 = sqlx::query_scalar(shown).fetch_one(&mut admin).await.unwrap();
    assert_eq!(shown, 4);
    let keys = inspect::locks(&pool).await.unwrap().into_iter().map(|lock| lock.key);
    assert_eq!(keys.collect::<Vec<_>>(), [Key::from(102_008)]);
    held.release().await.unwrap();
}

/// `YugabyteDB` before 2.25.1, silenced: the locks of a transaction are not proven, as the guide says.
#[tokio::test]
async fn locks_of_a_transaction_rely_on_the_server() {
    let (_server, db) = TestDb::with_server().await;
    let function = "pg_try_advisory_xact_lock(bigint)";
    replace_function(&mut db.admin().await, function, "BEGIN RETURN true; END").await;
    let pool = db.pool(2).await;
    let (mut one, mut another) = (pool.begin().await.unwrap(), pool.begin().await.unwrap());
    for tx in [&mut one, &mut another] {
        assert!(transaction::try_acquire(tx, KEY).await.unwrap());
    }
}

/// The locks exclude again, as after a correction of the configuration. The proof takes longer than acquires wait for
/// it.
#[tokio::test]
async fn locks_are_granted_again_once_they_exclude() {
    let Engine { db, server, .. } = Engine::start("PostgreSQL 16", "BEGIN RETURN true; END").await;
    let proxy = Proxy::to(server.port()).await;
    proxy.delay(Duration::from_millis(10));
    let options = server.tcp_options().database(db.name()).port(proxy.address().port());
    let pool = PgPoolOptions::new().connect_lazy_with(options);
    eventually("a lock is refused", TIMEOUT, async || {
        matches!(Lock::new(&pool, KEY).acquire().await, Err(Error::NoExclusion { .. }))
    })
    .await;
    let mut admin = db.admin().await;
    // In the oldest versions, `allow_system_table_mods` is on from the start, and can't be set.
    let allow = "SELECT set_config('allow_system_table_mods', 'on', false)
                 WHERE NOT current_setting('allow_system_table_mods')::bool";
    sqlx::raw_sql(allow).execute(&mut admin).await.unwrap();
    for function in FUNCTIONS {
        let (name, _) = function.split_once('(').unwrap();
        let original = format!(
            "CREATE OR REPLACE FUNCTION pg_catalog.{function} RETURNS boolean \
             LANGUAGE sql AS 'SELECT original.{name}($1)'"
        );
        sqlx::raw_sql(AssertSqlSafe(original)).execute(&mut admin).await.unwrap();
    }
    eventually("a lock is granted", TIMEOUT, async || {
        Lock::new(&pool, KEY).acquire().await.is_ok()
    })
    .await;
}

/// The functions fail, as in `YugabyteDB` before 2.25.1 and Aurora DSQL (0A000), or are missing (42883).
#[tokio::test]
async fn functions_that_fail_fail_the_acquire_with_the_servers_error() {
    for (product, code, name) in [
        ("PostgreSQL 11.2-YB-2.21.0.0-b0 on x86_64", "0A000", Some("YugabyteDB")),
        ("PostgreSQL 16", "0A000", None),
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
