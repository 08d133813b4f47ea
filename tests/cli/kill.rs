//! `pglock kill`: ends the session that it showed, if that is confirmed.

use pglock::Lock;
use pglock_testkit::{TestDb, advisory_locks};
use tokio::time::timeout;

use crate::ls::sql;
use crate::support::{LIMIT, Running, hold, locks_are, pglock, run};
use crate::terminal::Terminal;

#[tokio::test]
async fn a_holder_is_ended_and_notified() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let holder = hold(&db, &["run", "key"]).await;
    let locks = advisory_locks(&mut admin).await;
    let pid = locks.first().unwrap().pid.to_string();

    let killed = run(&db, &["kill", "--yes", "-n", "key", &pid]).await;
    assert_eq!(killed.code(), Some(0), "{}", killed.errors);
    assert!(killed.output.contains("\nkey  ") && killed.output.contains(&pid), "{}", killed.output);
    assert!(killed.errors.contains("is ended"), "{}", killed.errors);
    locks_are(&mut admin, 0, 0).await;
    assert_eq!(holder.finish().await.code(), Some(125));
    assert_eq!(run(&db, &["kill", "--yes", &pid]).await.code(), Some(1));
}

#[tokio::test]
async fn a_waiter_is_ended_too() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let holder = hold(&db, &["run", "key"]).await;
    let waiter = Running::start(pglock(&db, &["run", "--no-retry", "key", "echo", "ran"]));
    locks_are(&mut admin, 1, 1).await;
    let locks = advisory_locks(&mut admin).await;
    let pid = locks.iter().find(|lock| !lock.granted).unwrap().pid.to_string();
    assert_eq!(run(&db, &["kill", "-y", &pid]).await.code(), Some(0));
    let waiter = waiter.finish().await;
    assert_eq!((waiter.code(), &*waiter.output), (Some(69), ""), "{}", waiter.errors);
    assert_eq!(holder.finish().await.code(), Some(0));
}

/// Not without a confirmation, and not a session that has no lock.
#[tokio::test]
async fn nothing_is_ended_unasked() {
    let (db, pool, mut admin) = TestDb::scene(1).await;
    let guard = Lock::new(&pool, 42).acquire().await.unwrap();
    let pid = guard.backend_pid().to_string();
    let asked = run(&db, &["kill", &pid]).await;
    assert_eq!(asked.code(), Some(2));
    assert!(asked.output.contains("\n42  "), "{}", asked.output);
    assert!(asked.errors.contains("--yes"), "{}", asked.errors);
    guard.verify().await.unwrap();

    let own: i32 =
        sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(&mut admin).await.unwrap();
    let other = run(&db, &["kill", "--yes", &own.to_string()]).await;
    assert_eq!((other.code(), &*other.output), (Some(1), ""));
    assert!(other.errors.contains("neither holds nor waits"), "{}", other.errors);
    sql(&mut admin, "SELECT 1").await;
    guard.release().await.unwrap();
}

#[tokio::test]
async fn a_missing_privilege_is_named() {
    let (_server, db) = TestDb::with_server().await;
    let mut admin = db.admin().await;
    sql(&mut admin, "CREATE ROLE onlooker LOGIN").await;
    let pool = db.pool(1).await;
    let guard = Lock::new(&pool, 42).acquire().await.unwrap();
    let pid = guard.backend_pid().to_string();
    let url = db.url().replacen("postgres@", "onlooker@", 1);
    for missing in ["pg_read_all_stats", "pg_signal_backend"] {
        let ended = run(&db, &["kill", "--url", &url, "--yes", &pid]).await;
        assert_eq!(ended.code(), Some(77), "{}", ended.errors);
        assert!(ended.errors.contains(missing), "{}", ended.errors);
        sql(&mut admin, &format!("GRANT {missing} TO onlooker")).await;
    }
    let ended = run(&db, &["ls", "--url", &url]).await;
    assert!(ended.output.contains("\n42 "), "{}", ended.output);
    guard.verify().await.unwrap();
    guard.release().await.unwrap();
}

#[tokio::test]
async fn in_a_terminal_it_asks() {
    let db = TestDb::new().await;
    let Some(terminal) = Terminal::open(&db).await else { return };
    let pool = db.pool(2).await;
    let guard = Lock::new(&pool, 4711).acquire().await.unwrap();
    let pid = guard.backend_pid();
    for (answer, said, code) in
        [("n", "the session continues", 1), ("", "the session continues", 1), ("y", "is ended", 0)]
    {
        guard.verify().await.unwrap();
        // What is on the screen from before is gone when this is shown.
        let start = format!("clear; echo; echo start-{answer}");
        terminal.types(&format!("{start}; pglock kill {pid}; echo code-{answer}-$?"));
        terminal.shows(&format!("\nstart-{answer}\n")).await;
        terminal.shows(&format!("End session {pid}? [y/N]")).await;
        assert!(terminal.screen().contains("\n4711 "), "{}", terminal.screen());
        terminal.types(answer);
        terminal.shows(&format!("\ncode-{answer}-{code}\n")).await;
        assert!(terminal.screen().contains(said), "{}", terminal.screen());
    }
    timeout(LIMIT, guard.lost()).await.unwrap();
}
