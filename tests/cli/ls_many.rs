//! `pglock ls`, `who`, `kill`: many locks, odd names, and what a role may not see.

use std::fs;
use std::time::{Duration, Instant};

use pglock::{Lock, interop};
use pglock_testkit::{Server, TestDb};
use serde_json::Value;
use sqlx::Connection;

use crate::ls::sql;
use crate::support::{hold, locks_are, run};

/// In a debug build, on a machine that has much else to do. What is quadratic takes minutes.
const LISTING: Duration = Duration::from_secs(20);

#[tokio::test]
async fn many_locks_take_no_longer_than_few() {
    let server = Server::options().setting("max_locks_per_transaction", "1024").start();
    let db = TestDb::on(&server).await;
    let mut admin = db.admin().await;
    sql(&mut admin, "SELECT count(pg_advisory_lock(i)) FROM generate_series(1, 20000) AS i").await;
    let names = std::env::temp_dir().join(format!("pglock-names-{}", std::process::id()));
    let list: Vec<String> = (0..300).map(|number| format!("name-{number}")).collect();
    fs::write(&names, list.join("\n")).unwrap();
    let pool = db.pool(1).await;
    let guard = Lock::new(&pool, "name-7").acquire().await.unwrap();
    for args in [&["ls"][..], &["ls", "--json"], &["ls", "--names", names.to_str().unwrap()]] {
        let started = Instant::now();
        let ended = run(&db, args).await;
        assert!(started.elapsed() < LISTING, "{args:?}: {:?}", started.elapsed());
        assert!(ended.output.lines().count() > 20_000, "{}", ended.errors);
        if args.len() == 3 {
            assert!(ended.output.contains("\nname-7  "));
        }
    }
    let started = Instant::now();
    assert_eq!(run(&db, &["who", "-q", "17"]).await.code(), Some(0));
    assert!(started.elapsed() < LISTING);
    guard.release().await.unwrap();
    drop(fs::remove_file(names));
}

#[tokio::test]
async fn migrations_of_other_tools_are_named() {
    let (db, pool) = TestDb::with_pool(4).await;
    let _guards = (
        Lock::new(&pool, 72_707_369).acquire().await.unwrap(),
        Lock::new(&pool, interop::rails_migrations(db.name())).acquire().await.unwrap(),
    );
    let ended = run(&db, &["ls"]).await;
    let rails = format!("\nRails migrations of {}  ", db.name());
    assert!(ended.output.contains("\nPrisma Migrate  "), "{}", ended.output);
    assert!(ended.output.contains(&rails), "{}", ended.output);
    let json: Value =
        serde_json::from_str(&run(&db, &["who", "--json", "72707369"]).await.output).unwrap();
    assert_eq!(json[0]["name"], "Prisma Migrate");
}

/// A database without an encoding can make a role whose name is not UTF-8.
#[tokio::test]
async fn a_name_that_is_not_utf_8_is_escaped() {
    let (_server, db) = TestDb::with_server().await;
    let mut admin = db.admin().await;
    sql(
        &mut admin,
        "CREATE DATABASE raw ENCODING 'SQL_ASCII' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'",
    )
    .await;
    let url = db.url().replace(db.name(), "raw");
    let mut raw = sqlx::PgConnection::connect(&url).await.unwrap();
    let create = "DO $$BEGIN EXECUTE 'CREATE ROLE \"x' || \
        convert_from('\\xf6'::bytea, 'SQL_ASCII') || 'y\" SUPERUSER LOGIN'; END$$";
    sql(&mut raw, create).await;
    let rename = "DO $$BEGIN EXECUTE 'ALTER ROLE \"x' || \
        convert_from('\\xf6'::bytea, 'SQL_ASCII') || 'y\" RENAME TO seen'; END$$";
    sql(&mut raw, rename).await;
    let seen = db.url().replacen("postgres@", "seen@", 1);
    let mut seen = sqlx::PgConnection::connect(&seen).await.unwrap();
    sql(&mut seen, "SELECT pg_advisory_lock(42)").await;
    sql(
        &mut raw,
        "DO $$BEGIN EXECUTE 'ALTER ROLE seen RENAME TO \"x' || \
        convert_from('\\xf6'::bytea, 'SQL_ASCII') || 'y\"'; END$$",
    )
    .await;
    for args in [&["ls"][..], &["who", "42"], &["ls", "--json"]] {
        let ended = run(&db, args).await;
        assert_eq!(ended.code(), Some(0), "{}", ended.errors);
        let escaped = if args.len() == 2 && args[0] == "ls" { "x\\\\xf6y" } else { "x\\xf6y" };
        assert!(ended.output.contains(escaped), "{}", ended.output);
    }
    let ended = run(&db, &["kill", "--yes", "name:none"]).await;
    assert_eq!(ended.code(), Some(1), "{}", ended.errors);
}

/// Without an encoding, the server refuses to send a text that is not UTF-8.
#[tokio::test]
async fn a_database_without_an_encoding_shows_all_names() {
    let server = Server::options().setting("max_prepared_transactions", "1").start();
    let db = TestDb::on(&server).await;
    sql(
        &mut db.admin().await,
        "CREATE DATABASE raw ENCODING 'SQL_ASCII' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'",
    )
    .await;
    let url = db.url().replace(db.name(), "raw");
    let mut raw = sqlx::PgConnection::connect(&url).await.unwrap();
    sql(&mut raw, "CREATE ROLE seen SUPERUSER LOGIN").await;
    let seen = url.replacen("postgres@", "seen@", 1);
    let mut seen = sqlx::PgConnection::connect(&seen).await.unwrap();
    sql(&mut seen, "SET application_name = 'o\\o'; SELECT pg_advisory_lock(42)").await;
    let pid: i32 =
        sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(&mut seen).await.unwrap();
    // Two bytes that are UTF-8, and one that is not.
    let rename = "DO $$BEGIN EXECUTE E'ALTER ROLE seen RENAME TO \"x\\303\\266\\366y\"'; END$$";
    sql(&mut raw, rename).await;
    let prepare = "BEGIN; SELECT pg_advisory_xact_lock(43); PREPARE TRANSACTION E'\\303\\266\\366'";
    sql(&mut raw, prepare).await;
    // The identifier of a transaction is shown as a literal.
    let (user, identifier) = ("xö\\xf6y", "ö\\\\xf6");
    for (args, shown) in [(&["ls"][..], user), (&["who", "42"], user), (&["who", "43"], identifier)]
    {
        let ended = run(&db, &[args, &["--url", &url]].concat()).await;
        assert_eq!(ended.code(), Some(0), "{}", ended.errors);
        assert!(ended.output.contains(shown), "{}", ended.output);
    }
    let ended = run(&db, &["ls", "--json", "--url", &url]).await;
    let locks: Value = serde_json::from_str(&ended.output).unwrap();
    assert_eq!(locks[0]["session"]["user"], "xö\\xf6y");
    assert_eq!(locks[0]["session"]["application_name"], "o\\o");
    assert_eq!(locks[1]["prepared"], "ö\\xf6");
    let ended = run(&db, &["kill", "--yes", &pid.to_string(), "--url", &url]).await;
    assert_eq!(ended.code(), Some(0), "{}", ended.errors);
}

#[tokio::test]
async fn what_a_role_may_not_see_is_said() {
    let (_server, db) = TestDb::with_server().await;
    let mut admin = db.admin().await;
    sql(&mut admin, "CREATE ROLE onlooker LOGIN; SELECT pg_advisory_lock(42)").await;
    let url = db.url().replacen("postgres@", "onlooker@", 1);
    let ended = run(&db, &["ls", "--url", &url]).await;
    assert!(ended.output.contains("\n42 ") && ended.output.contains(" ? "), "{}", ended.output);
    assert!(ended.errors.contains("pg_read_all_stats"), "{}", ended.errors);
    // A hardened server: the views, then the functions behind them.
    sql(&mut admin, "REVOKE ALL ON pg_locks, pg_stat_activity FROM PUBLIC").await;
    assert_eq!(run(&db, &["ls", "--url", &url]).await.code(), Some(0));
    for function in ["pg_stat_get_activity(int)", "pg_lock_status()"] {
        sql(&mut admin, &format!("REVOKE ALL ON FUNCTION {function} FROM PUBLIC")).await;
        let ended = run(&db, &["ls", "--url", &url]).await;
        assert_eq!((ended.code(), &*ended.output), (Some(69), ""), "{function}");
        let name = function.split('(').next().unwrap();
        let advice = format!("; grant it EXECUTE on the function {name}: ");
        assert!(ended.errors.contains(&advice), "{}", ended.errors);
        sql(&mut admin, &format!("GRANT ALL ON FUNCTION {function} TO PUBLIC")).await;
    }
}

#[tokio::test]
async fn the_holder_of_a_key_is_ended() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let holder = hold(&db, &["run", "key"]).await;
    let ended = run(&db, &["kill", "key"]).await;
    assert_eq!(ended.code(), Some(2), "{}", ended.errors);
    assert!(ended.output.contains("\nkey  "), "{}", ended.output);
    let ended = run(&db, &["kill", "--yes", "key"]).await;
    assert_eq!(ended.code(), Some(0), "{}", ended.errors);
    assert_eq!(holder.finish().await.code(), Some(125));
    locks_are(&mut admin, 0, 0).await;
    let ended = run(&db, &["kill", "--yes", "key"]).await;
    assert_eq!(ended.code(), Some(1));
    assert!(ended.errors.contains("no session holds \"key\""), "{}", ended.errors);

    let readers = (hold(&db, &["run", "-s", "key"]).await, hold(&db, &["run", "-s", "key"]).await);
    let ended = run(&db, &["kill", "--yes", "key"]).await;
    assert_eq!(ended.code(), Some(2));
    assert!(ended.errors.contains("several sessions hold"), "{}", ended.errors);
    assert_eq!(readers.0.finish().await.code(), Some(0));
    assert_eq!(readers.1.finish().await.code(), Some(0));
}
