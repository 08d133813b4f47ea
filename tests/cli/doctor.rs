//! `pglock doctor`: what it finds, and what it returns to a script.

use pglock_testkit::{PgBouncer, Server, ServerOptions, TestDb, replace_function};
use sqlx::AssertSqlSafe;
use sqlx::postgres::{PgConnectOptions, PgConnection};
use tokio::time::timeout;

use crate::support::{Ended, LIMIT, Running, pglock, run, url};

/// The finding of a check, of those that were printed with `--json`.
fn finding(ended: &Ended, check: &str) -> serde_json::Value {
    let findings: serde_json::Value = serde_json::from_str(&ended.output).unwrap();
    let found = findings.as_array().unwrap().iter().find(|finding| finding["check"] == check);
    found.expect("the check is there").clone()
}

/// Waits until the role `app` has no session: one that a doctor has closed counts for a limit until it has ended.
async fn app_is_gone(admin: &mut PgConnection) {
    let sessions = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'app'";
    let gone = async {
        while sqlx::query_scalar::<_, i64>(sessions).fetch_one(&mut *admin).await.unwrap() > 0 {}
    };
    timeout(LIMIT, gone).await.unwrap();
}

/// From PostgreSQL 14 on there is nothing to find on a new server.
#[tokio::test]
async fn a_new_server_is_fine() {
    let server = Server::options().tcp().start();
    let port = server.port();
    let tcp = format!("postgres://postgres@127.0.0.1:{port}/postgres?sslmode=disable");
    let db = TestDb::on(&server).await;
    let expected = i32::from(server.version() < 14);
    for url in [db.url(), tcp] {
        let lines = run(&db, &["doctor", "--url", &url]).await;
        assert_eq!(lines.code(), Some(expected), "{}{}", lines.output, lines.errors);
        assert!(lines.output.starts_with("fine     primary "), "{}", lines.output);
        let json = run(&db, &["doctor", "--url", &url, "--json"]).await;
        assert_eq!(json.code(), Some(expected));
        assert_eq!(finding(&json, "dead holder")["severity"], "fine");
        assert_eq!(finding(&json, "fencing token")["advice"], serde_json::Value::Null);
    }
}

#[tokio::test]
async fn the_privileges_and_limits_of_a_role_are_reported() {
    let (server, db) = TestDb::with_server().await;
    let mut admin = db.admin().await;
    let as_role = async |admin: &mut PgConnection, change: &str| {
        app_is_gone(admin).await;
        sqlx::raw_sql(AssertSqlSafe(change.to_owned())).execute(admin).await.unwrap();
        let mut doctor = pglock(&db, &["doctor", "--json"]);
        doctor.env("DATABASE_URL", db.url().replace("postgres@", "app@"));
        Running::start(doctor).finish().await
    };

    let plain = as_role(&mut admin, "CREATE ROLE app LOGIN").await;
    let advice = finding(&plain, "other roles")["advice"].as_str().unwrap().to_owned();
    assert!(advice.contains("GRANT pg_read_all_stats TO \"app\""), "{advice}");
    let grants = "GRANT pg_read_all_stats TO app; GRANT pg_signal_backend TO app";
    let granted = as_role(&mut admin, grants).await;
    assert_eq!(finding(&granted, "other roles")["advice"], serde_json::Value::Null);

    let logs = as_role(&mut admin, "ALTER ROLE app SET log_lock_waits = on").await;
    let advice = finding(&logs, "log of waits")["advice"].as_str().unwrap().to_owned();
    assert!(advice.contains("GRANT SET ON PARAMETER log_lock_waits TO \"app\""), "{advice}");
    let silent = as_role(&mut admin, "ALTER ROLE app RESET ALL").await;
    if server.version() < 19 {
        assert_eq!(finding(&silent, "log of waits")["advice"], serde_json::Value::Null);
    }

    for (change, check, severity, code, back) in [
        (
            "ALTER ROLE app SET idle_in_transaction_session_timeout = '1min'",
            "limits on transactions",
            "warning",
            1,
            "ALTER ROLE app RESET ALL",
        ),
        (
            "ALTER ROLE app SET statement_timeout = 300",
            "statement_timeout",
            "warning",
            1,
            "ALTER ROLE app RESET ALL",
        ),
        (
            // One more than the doctor needs: the server may still count the one that it has closed.
            "ALTER ROLE app CONNECTION LIMIT 4",
            "connections",
            "warning",
            1,
            "ALTER ROLE app CONNECTION LIMIT -1",
        ),
        (
            "REVOKE EXECUTE ON FUNCTION pg_advisory_lock(bigint) FROM PUBLIC",
            "functions",
            "broken",
            2,
            "GRANT EXECUTE ON FUNCTION pg_advisory_lock(bigint) TO PUBLIC",
        ),
    ] {
        let ended = as_role(&mut admin, change).await;
        assert_eq!(ended.code(), Some(code), "{change}: {}{}", ended.output, ended.errors);
        assert_eq!(finding(&ended, check)["severity"], severity, "{}", ended.output);
        let ended = as_role(&mut admin, back).await;
        assert_eq!(finding(&ended, check)["severity"], "fine", "{back}: {}", ended.output);
    }
}

/// A role may have to work without the catalog's views. What can't be determined is not reported as fine.
#[tokio::test]
async fn a_role_that_may_not_read_the_catalog_is_examined_all_the_same() {
    let (_server, db) = TestDb::with_server().await;
    let mut admin = db.admin().await;
    let run = async |admin: &mut PgConnection, change: &str| {
        sqlx::raw_sql(AssertSqlSafe(change.to_owned())).execute(admin).await.unwrap();
        let mut doctor = pglock(&db, &["doctor", "--json"]);
        doctor.env("DATABASE_URL", db.url().replace("postgres@", "app@"));
        Running::start(doctor).finish().await
    };

    let views = "CREATE ROLE app LOGIN; \
                 REVOKE ALL ON pg_stat_activity, pg_locks, pg_settings, pg_stat_database FROM PUBLIC";
    let ended = run(&mut admin, views).await;
    for check in ["functions", "plpgsql", "list of locks", "lock table", "connections"] {
        assert_eq!(finding(&ended, check)["severity"], "fine", "{}{}", ended.output, ended.errors);
    }

    let cannot = "cannot tell: ";
    for (change, check, seen, back) in [
        (
            "REVOKE ALL ON pg_roles FROM PUBLIC",
            "connections",
            cannot,
            "GRANT SELECT ON pg_roles TO PUBLIC",
        ),
        (
            "REVOKE ALL ON pg_language FROM PUBLIC",
            "plpgsql",
            cannot,
            "GRANT SELECT ON pg_language TO PUBLIC",
        ),
        (
            "REVOKE USAGE ON LANGUAGE plpgsql FROM PUBLIC",
            "plpgsql",
            "the role can't use",
            "GRANT USAGE ON LANGUAGE plpgsql TO PUBLIC",
        ),
    ] {
        let ended = run(&mut admin, change).await;
        let found = finding(&ended, check);
        assert_eq!(found["severity"], "warning", "{change}: {}{}", ended.output, ended.errors);
        assert!(found["seen"].as_str().unwrap().starts_with(seen), "{found}");
        assert!(found["advice"].as_str().unwrap().contains("TO \"app\""), "{found}");
        let ended = run(&mut admin, back).await;
        assert_eq!(finding(&ended, check)["severity"], "fine", "{}", ended.output);
    }
    let change = "REVOKE ALL ON FUNCTION pg_stat_get_activity(int) FROM PUBLIC";
    let found = finding(&run(&mut admin, change).await, "connections").clone();
    assert!(found["seen"].as_str().unwrap().starts_with(cannot), "{found}");
    let grant = "GRANT EXECUTE ON FUNCTION pg_catalog.pg_stat_get_activity(integer) TO \"app\"";
    assert!(found["advice"].as_str().unwrap().contains(grant), "{found}");
    let ended = run(&mut admin, "REVOKE ALL ON FUNCTION pg_lock_status() FROM PUBLIC").await;
    for (check, seen) in [("list of locks", "the role can't list locks: "), ("lock table", cannot)]
    {
        let found = finding(&ended, check);
        assert_eq!(found["severity"], "warning", "{}{}", ended.output, ended.errors);
        assert!(found["seen"].as_str().unwrap().starts_with(seen), "{found}");
    }
}

/// The limit on connections is that of the role that logged in; the grants are for the current role.
#[tokio::test]
async fn a_role_that_becomes_another_is_examined() {
    let (_server, db) = TestDb::with_server().await;
    let mut admin = db.admin().await;
    let roles = "CREATE ROLE owner NOLOGIN CONNECTION LIMIT 1; \
                 CREATE ROLE app LOGIN CONNECTION LIMIT 3 IN ROLE owner; \
                 ALTER ROLE app SET role = owner";
    sqlx::raw_sql(roles).execute(&mut admin).await.unwrap();
    let examine = async || {
        let mut doctor = pglock(&db, &["doctor", "--json"]);
        doctor.env("DATABASE_URL", db.url().replace("postgres@", "app@"));
        Running::start(doctor).finish().await
    };
    let mut ended = examine().await;
    // The server may still count the connection that the program has opened first, and closed.
    for _ in 0..20 {
        if finding(&ended, "connections")["seen"] == "2 more are free" {
            break;
        }
        app_is_gone(&mut admin).await;
        ended = examine().await;
    }
    assert_eq!(finding(&ended, "connections")["seen"], "2 more are free", "{}", ended.output);
    let advice = finding(&ended, "other roles")["advice"].as_str().unwrap().to_owned();
    assert!(advice.contains("TO \"owner\""), "{advice}");
}

#[tokio::test]
async fn a_standby_is_broken() {
    let (primary, standby) = ServerOptions::default().start_with_standby();
    is_broken(&primary, standby.connect_options(), "primary").await;
}

#[tokio::test]
async fn a_pooler_in_transaction_mode_is_broken() {
    let server = Server::start();
    let settings = [("pool_mode", "transaction")];
    let Some(pooler) = PgBouncer::start(&server, &settings) else { return };
    is_broken(&server, pooler.connect_options(), "exclusion").await;
}

/// Each engine has locks that do nothing, and is known by what it calls itself.
#[tokio::test]
async fn an_engine_without_locks_is_named() {
    let (_server, db) = TestDb::with_server().await;
    let mut admin = db.admin().await;
    for function in ["pg_try_advisory_lock(bigint)", "pg_advisory_unlock(bigint)"] {
        replace_function(&mut admin, function, "BEGIN RETURN true; END").await;
    }
    let stub = async |admin: &mut PgConnection, product: &str| {
        let call_itself = format!(
            "CREATE OR REPLACE FUNCTION pg_catalog.version() RETURNS text \
             LANGUAGE sql AS $$ SELECT '{product}'::text $$"
        );
        sqlx::raw_sql(AssertSqlSafe(call_itself)).execute(admin).await.unwrap();
        let ended = run(&db, &["doctor", "--json"]).await;
        assert_eq!(ended.code(), Some(2), "{}{}", ended.output, ended.errors);
        finding(&ended, "exclusion")["seen"].as_str().unwrap().to_owned()
    };
    for (product, engine) in [
        ("CockroachDB CCL v24.1.0 (x86_64-pc-linux-gnu)", "CockroachDB"),
        ("PostgreSQL 11.2-YB-2.21.0.0-b0 on x86_64", "YugabyteDB"),
        ("PostgreSQL 18.6 (PGlite 0.5.14) on wasm32-unknown-emscripten", "PGlite"),
    ] {
        let seen = stub(&mut admin, product).await;
        assert!(seen.starts_with(&format!("the server is {engine},")), "{seen}");
    }
    let seen = stub(&mut admin, "PostgreSQL 15.18 on x86_64").await;
    assert!(seen.ends_with("or the server's locks do nothing"), "{seen}");
}

#[tokio::test]
async fn a_pooler_that_does_not_reset_its_sessions_is_found() {
    const UNLOCK: &str = "SELECT pg_advisory_unlock_all()";

    let (server, db) = TestDb::with_server().await;
    for (reset, severity) in
        [("", "warning"), ("RESET ALL", "warning"), ("DISCARD ALL", "fine"), (UNLOCK, "fine")]
    {
        let settings = [("pool_mode", "session"), ("server_reset_query", reset)];
        let Some(pooler) = PgBouncer::start(&server, &settings) else { return };
        let url = url(&pooler.connect_options());
        let ended = run(&db, &["doctor", "--json", "--url", &url]).await;
        assert_eq!(finding(&ended, "end of a session")["severity"], severity, "{}", ended.output);
    }
}

async fn is_broken(server: &Server, options: PgConnectOptions, check: &str) {
    let db = TestDb::on(server).await;
    let ended = run(&db, &["doctor", "--json", "--url", &url(&options)]).await;
    assert_eq!(ended.code(), Some(2), "{}{}", ended.output, ended.errors);
    assert_eq!(finding(&ended, check)["severity"], "broken", "{}", ended.output);
}

#[tokio::test]
async fn a_server_that_is_not_there_is_no_finding() {
    let db = TestDb::new().await;
    let url = "postgres://postgres@127.0.0.1:1/postgres";
    let ended = run(&db, &["doctor", "--url", url]).await;
    assert_eq!((ended.code(), &*ended.output), (Some(69), ""));
}
