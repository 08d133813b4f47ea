//! Every test has a database of its own, to which a URL leads.

#![expect(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a failed unwrap is a failed test; the test run as a process answers by printing"
)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;
use std::time::Duration;
use std::{env, fs};

use pglock_testkit::{AdvisoryLock, Server, TestDb, advisory_locks, eventually, pool};
use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{AssertSqlSafe, ConnectOptions, Executor};

async fn current_database(conn: &mut PgConnection) -> String {
    sqlx::query_scalar("SELECT current_database()").fetch_one(conn).await.unwrap()
}

async fn test_databases(server: &Server) -> Vec<String> {
    let mut conn = server.connect_options().connect().await.unwrap();
    let names = sqlx::query_scalar(
        "SELECT datname FROM pg_database WHERE datname LIKE 'pglock_test%' ORDER BY oid",
    );
    names.fetch_all(&mut conn).await.unwrap()
}

#[tokio::test]
async fn databases_of_one_process_differ() {
    let server = Server::start();
    let (one, other) = tokio::join!(TestDb::on(&server), TestDb::on(&server));
    assert_ne!(one.name(), other.name());
    for db in [one, other] {
        assert_eq!(current_database(&mut db.admin().await).await, db.name());
        assert_eq!(
            current_database(&mut db.pool(1).await.acquire().await.unwrap()).await,
            db.name()
        );
    }
}

#[tokio::test]
async fn a_url_leads_to_the_database() {
    let (server, db) = TestDb::with_server().await;
    let mut conn = PgConnectOptions::from_str(&db.url()).unwrap().connect().await.unwrap();
    assert_eq!(current_database(&mut conn).await, db.name());

    // psql connects too, where it runs: npm's packages have no psql, and one of its libraries may be missing.
    let runs = |psql: &PathBuf| {
        let version = Command::new(psql).arg("--version").output();
        version.is_ok_and(|version| version.status.success())
    };
    let path = env::var_os("PATH").unwrap_or_default();
    let dirs = [server.bin_dir().to_owned()].into_iter().chain(env::split_paths(&path));
    if let Some(psql) = dirs.map(|dir| dir.join("psql")).find(runs) {
        let mut psql = Command::new(psql);
        psql.args(["-XAtc", "SELECT current_database()", &db.url()]);
        psql.env("PGHOST", "elsewhere.invalid").env("PGPORT", "1").env("PGSSLMODE", "require");
        let output = psql.output().unwrap();
        assert!(output.status.success(), "{output:?}");
        assert_eq!(String::from_utf8(output.stdout).unwrap().trim(), db.name());
    }
}

#[tokio::test]
async fn only_the_locks_of_the_database_are_listed() {
    let server = Server::start();
    let (db, other) = (TestDb::on(&server).await, TestDb::on(&server).await);
    let mut conn = db.admin().await;
    conn.execute("SELECT pg_advisory_lock((1::bigint << 32) + 2), pg_advisory_lock_shared(3, -4)")
        .await
        .unwrap();
    let pid = sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(&mut conn).await.unwrap();
    let lock = |classid, objid, objsubid, mode: &str| AdvisoryLock {
        pid,
        classid,
        objid,
        objsubid,
        mode: mode.to_owned(),
        granted: true,
    };
    let expected = [
        lock(1, 2, 1, "ExclusiveLock"),
        // PostgreSQL shows the int as an oid, which has no sign.
        lock(3, (1 << 32) - 4, 2, "ShareLock"),
    ];
    assert_eq!(advisory_locks(&mut db.admin().await).await, expected);
    assert_eq!(advisory_locks(&mut other.admin().await).await, []);
}

#[tokio::test]
async fn the_lock_of_a_proof_is_not_listed() {
    let db = TestDb::new().await;
    let (mut conn, mut admin) = (db.admin().await, db.admin().await);
    // The unlock leaves one of the two locks.
    for (function, listed) in
        [("pg_try_advisory_lock", 0), ("pg_advisory_lock", 1), ("pg_advisory_unlock", 1)]
    {
        let call = format!("pg_catalog.pg_backend_pid(), pg_catalog.{function}('-1'::bigint)");
        let statement = AssertSqlSafe(format!("SELECT {call}"));
        sqlx::raw_sql(statement).execute(&mut conn).await.unwrap();
        assert_eq!(advisory_locks(&mut admin).await.len(), listed, "{function}");
    }
}

#[tokio::test]
async fn a_lock_waited_for_is_listed_as_such() {
    let (_server, db) = TestDb::with_server().await;
    let (mut holder, mut waiter) = (db.admin().await, db.admin().await);
    holder.execute("SELECT pg_advisory_lock(1)").await.unwrap();
    let granted = async || -> Vec<bool> {
        advisory_locks(&mut db.admin().await).await.iter().map(|lock| lock.granted).collect()
    };
    tokio::select! {
        _ = waiter.execute("SELECT pg_advisory_lock(1)") => panic!("the lock is held"),
        () = eventually("one holds, one waits", Duration::from_secs(10), async || {
            granted().await == [true, false]
        }) => {}
    }
}

#[tokio::test]
#[ignore = "is the client: the test below runs it with DATABASE_URL set"]
async fn client() {
    let db = TestDb::new().await;
    println!("\ndatabase {}", current_database(&mut db.admin().await).await);
    let pool = pool().await;
    println!("\ndatabase {}", current_database(&mut pool.acquire().await.unwrap()).await);
    let other = PgConnectOptions::from_str(&db.url()).unwrap().connect().await.unwrap();
    drop((db, pool));
    drop(other);
}

#[tokio::test]
async fn with_a_database_url_databases_are_made_there_and_dropped() {
    let server = Server::start();
    let url = TestDb::on(&server).await.url();
    let before = test_databases(&server).await;
    // A server of the client's own would be in this directory.
    let tmp = PathBuf::from(format!("{}/client", server.socket_dir().display()));
    fs::create_dir(&tmp).unwrap();

    let client = Command::new(env::current_exe().unwrap())
        .args(["client", "--exact", "--ignored", "--nocapture"])
        .env("DATABASE_URL", url)
        .env("TMPDIR", &tmp)
        .output()
        .unwrap();
    assert!(client.status.success(), "{client:?}");
    let printed = String::from_utf8(client.stdout).unwrap();
    let made: Vec<_> = printed.lines().filter_map(|line| line.strip_prefix("database ")).collect();
    assert!(
        made.len() == 2 && made.iter().all(|name| name.starts_with("pglock_test_")),
        "{made:?}"
    );
    assert_eq!(test_databases(&server).await, before);
    assert_eq!(fs::read_dir(&tmp).unwrap().count(), 0);
}

#[tokio::test]
async fn a_pool_has_a_database_of_its_own() {
    let db = TestDb::new().await;
    assert!(Path::new(&Server::shared().data_dir()).exists());
    assert!(db.url().starts_with("postgres"));
    let pool = pool().await;
    assert_eq!(pool.options().get_max_connections(), 10);
    assert_ne!(current_database(&mut pool.acquire().await.unwrap()).await, db.name());
}
