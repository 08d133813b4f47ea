//! `pglock ls`: what people and programs read of it.

use std::process::Stdio;
use std::time::Instant;

use pglock::{Lock, Semaphore, interop};
use pglock_testkit::{TestDb, eventually};
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, ConnectOptions, PgConnection};
use tokio::process::Command;
use tokio::time::timeout;

use crate::support::{Ended, LIMIT, PGLOCK, Running, hold, locks_are, pglock, run};
use crate::terminal::Terminal;

pub(crate) async fn sql(conn: &mut PgConnection, statement: &str) {
    sqlx::raw_sql(AssertSqlSafe(statement)).execute(conn).await.unwrap();
}

/// Lists the locks until the output fits: the proof of exclusion of another process may show as one more.
async fn list(db: &TestDb, args: &[&str], fits: impl Fn(&str) -> bool) -> Ended {
    let until = Instant::now() + LIMIT;
    loop {
        let ended = run(db, &[&["ls"][..], args].concat()).await;
        if fits(&ended.output) || Instant::now() > until {
            return ended;
        }
    }
}

/// The columns of a table, which two spaces and more divide.
fn columns(line: &str) -> Vec<&str> {
    line.split("  ").map(str::trim).filter(|column| !column.is_empty()).collect()
}

#[tokio::test]
async fn no_lock_is_no_output() {
    let db = TestDb::new().await;
    let ended = run(&db, &["ls"]).await;
    assert_eq!((ended.code(), &*ended.output), (Some(0), ""));
    assert!(ended.errors.contains("no advisory lock"), "{}", ended.errors);
    let ended = run(&db, &["ls", "--json"]).await;
    assert_eq!((ended.code(), &*ended.output, &*ended.errors), (Some(0), "[]\n", ""));
}

#[tokio::test]
async fn waiters_are_below_those_that_they_wait_for() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let mut other = db.options().application_name("psql").connect().await.unwrap();
    sql(&mut other, "SELECT pg_advisory_lock_shared(1, 2), pg_advisory_lock(-7)").await;
    let first = Running::start(pglock(&db, &["run", "1,2", "true"]));
    locks_are(&mut admin, 2, 1).await;
    let second = Running::start(pglock(&db, &["run", "--shared", "1,2", "true"]));
    locks_are(&mut admin, 2, 2).await;

    let ended = list(&db, &[], |output| output.lines().count() == 5).await;
    assert_eq!((ended.code(), &*ended.errors), (Some(0), ""));
    let lines: Vec<Vec<&str>> = ended.output.lines().map(columns).collect();
    let [headline, pair, writer, reader, number] = lines.as_slice() else {
        panic!("{}", ended.output);
    };
    let expected = ["KEY", "MODE", "PID", "USER", "APPLICATION", "CLIENT", "STATE", "SESSION"];
    assert_eq!(headline, &expected);
    let starts = |line: &[&str], start: [&str; 2]| assert!(line.starts_with(&start), "{line:?}");
    starts(pair, ["1,2", "shared"]);
    // What waits for a waiter, and not for the holder, is below the waiter.
    starts(writer, ["└─ waits", "exclusive"]);
    starts(reader, ["└─ waits", "shared"]);
    assert!(ended.output.lines().any(|line| line.starts_with("   └─ waits")), "{}", ended.output);
    starts(number, ["-7", "exclusive"]);
    let is_named = |column: &&str| column.starts_with("pglock run 1,2 true@");
    assert!(pair.contains(&"psql") && writer.iter().any(is_named), "{}", ended.output);
    assert!(writer.iter().any(|column| column.starts_with("waiting")), "{}", ended.output);

    sql(&mut other, "SELECT pg_advisory_unlock_all()").await;
    assert_eq!(first.finish().await.code(), Some(0));
    assert_eq!(second.finish().await.code(), Some(0));
}

#[tokio::test]
async fn programs_read_all_of_it() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let mut other = db.options().application_name("a \"name\"").connect().await.unwrap();
    sql(&mut other, "BEGIN; SELECT pg_advisory_xact_lock(-1)").await;
    let waiter = Running::start(pglock(&db, &["run", "--", "-1", "true"]));
    locks_are(&mut admin, 1, 1).await;

    let ended = list(&db, &["--json"], |output| output.matches("\"held\"").count() == 2).await;
    let locks: Value = serde_json::from_str(&ended.output).unwrap();
    let (held, waiting) = (locks.get(0).unwrap(), locks.get(1).unwrap());
    let of = |lock: &Value, name: &str| lock.pointer(name).cloned();
    for (name, value) in [
        ("/key", json!("-1")),
        ("/name", Value::Null),
        ("/classid", json!(u32::MAX)),
        ("/objid", json!(u32::MAX)),
        ("/objsubid", json!(1)),
        ("/mode", json!("exclusive")),
        ("/held", json!(true)),
        ("/waiting_since", Value::Null),
        ("/blocked_by", json!([])),
        ("/prepared", Value::Null),
        ("/leader", Value::Null),
        ("/session/application_name", json!("a \"name\"")),
        ("/session/state", json!("idle in transaction")),
        ("/session/client_addr", Value::Null),
    ] {
        assert_eq!(of(held, name), Some(value), "{name}");
    }
    let time = |lock, name| of(lock, name).and_then(|time| time.as_f64());
    let times = ["/session/started_at", "/session/transaction_since", "/seen_at"];
    let times: Vec<f64> = times.into_iter().filter_map(|name| time(held, name)).collect();
    assert!(times.len() == 3 && times.is_sorted(), "{times:?}");
    assert_eq!(of(waiting, "/held"), Some(json!(false)));
    let holder = of(held, "/session/backend_pid").unwrap();
    assert_eq!(of(waiting, "/blocked_by"), Some(json!([holder])));

    sql(&mut other, "COMMIT").await;
    assert_eq!(waiter.finish().await.code(), Some(0));
}

#[tokio::test]
async fn names_that_are_given_are_recognized() {
    let (db, pool) = TestDb::with_pool(4).await;
    let _guards = (
        Lock::new(&pool, "nightly-report").acquire().await.unwrap(),
        Lock::new(&pool, interop::with_advisory_lock("job")).acquire().await.unwrap(),
        Semaphore::new(&pool, "printers", 2).unwrap().acquire().await.unwrap(),
    );
    let args = ["ls", "-n", "nightly-report", "--name", "job", "--name", "printers"];
    let ended = run(&db, &args).await;
    for name in ["nightly-report", "job", "printers, permit 0"] {
        let is_named = |line: &str| line.starts_with(&format!("{name}  "));
        assert!(ended.output.lines().any(is_named), "{name}: {}", ended.output);
    }
    let leader = hold(&db, &["elect", "--once", "--name", "node-7", "billing"]).await;
    let ended = run(&db, &["ls", "-n", "billing"]).await;
    assert!(ended.output.contains("node-7 (leads, term "), "{}", ended.output);
    leader.finish().await;
}

/// A line each time, until it is not read any more.
#[tokio::test]
async fn a_watch_continues_until_its_reader_ends() {
    let db = TestDb::new().await;
    let mut watch = Running::start(pglock(&db, &["ls", "--watch", "--json"]));
    watch.says("[]").await;
    let pool = db.pool(1).await;
    let guard = Lock::new(&pool, 42).acquire().await.unwrap();
    let shown = async { while !watch.line().await.contains(r#""key":"42""#) {} };
    timeout(LIMIT, shown).await.unwrap();
    drop(watch);

    let mut pipe = Command::new("bash");
    pipe.args(["-c", "\"$PGLOCK\" ls --watch=1 | sed '/^42 /q'; echo ${PIPESTATUS[0]}"]);
    pipe.env("PGLOCK", PGLOCK).env("DATABASE_URL", db.url()).kill_on_drop(true);
    let output = timeout(LIMIT, pipe.stdin(Stdio::null()).output()).await.unwrap().unwrap();
    let output = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<&str> = output.lines().collect();
    assert!(matches!(lines[..], [.., lock, "0"] if lock.starts_with("42 ")), "{output}");
    assert!(!output.contains('\u{1b}'), "{output:?}");
    guard.release().await.unwrap();
}

#[tokio::test]
async fn a_missing_database_is_an_error() {
    let mut command = Command::new(PGLOCK);
    command.args(["ls", "--url", "postgres://postgres@127.0.0.1:1/postgres"]).kill_on_drop(true);
    let ended = Running::start(command).finish().await;
    assert_eq!((ended.code(), &*ended.output), (Some(69), ""));
    assert!(ended.errors.contains("cannot connect"), "{}", ended.errors);
}

#[tokio::test]
async fn a_table_fits_the_terminal() {
    let db = TestDb::new().await;
    let Some(terminal) = Terminal::open(&db).await else { return };
    let pool = db.pool(1).await;
    let name = "a-name-that-is-much-too-long-for-the-column-of-a-narrow-terminal";
    let guard = Lock::new(&pool, name).acquire().await.unwrap();
    terminal.types(&format!("NAME={name}"));
    for width in [120, 80, 50, 20] {
        let narrow = format!("clear; stty cols {width}; pglock ls -n $NAME; stty cols 120");
        terminal.types(&format!("{narrow}; echo end-{width}"));
        terminal.shows(&format!("\nend-{width}\n")).await;
        let screen = terminal.screen();
        let table: Vec<&str> = screen.lines().filter(|line| line.starts_with(['K', 'a'])).collect();
        assert_eq!(table.len(), 2, "{screen}");
        assert!(table.iter().all(|line| line.chars().count() <= width), "{screen}");
        assert!(screen.contains('…'), "{screen}");
    }
    guard.release().await.unwrap();
}

#[tokio::test]
async fn a_watch_shows_in_a_terminal_what_is() {
    let db = TestDb::new().await;
    let Some(terminal) = Terminal::open(&db).await else { return };
    let pool = db.pool(1).await;
    terminal.types("pglock ls --watch");
    terminal.shows("KEY").await;
    let guard = Lock::new(&pool, 4711).acquire().await.unwrap();
    terminal.shows("\n4711 ").await;
    guard.release().await.unwrap();
    let gone = || async { !terminal.screen().contains("\n4711 ") };
    eventually("the lock is gone from the screen", LIMIT, gone).await;
    assert_eq!(terminal.screen().matches("KEY").count(), 1, "{}", terminal.screen());
    terminal.presses("C-c");
    terminal.exit_code_is(130).await;
}
