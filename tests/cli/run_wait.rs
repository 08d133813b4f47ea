//! `pglock run`: the wait for the lock, its limits, and what is said meanwhile.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use pglock_testkit::{Proxy, Server, Shutdown, TestDb};

use crate::support::{Running, hold, locks_are, pglock, run, send};

#[tokio::test]
async fn a_wait_survives_a_restart_of_the_server() {
    let (server, db) = TestDb::with_server().await;
    let holder = hold(&db, &["run", "--grace", "1", "key"]).await;
    let mut waiter = Running::start(pglock(&db, &["run", "key", "--", "echo", "ran"]));
    let strict = Running::start(pglock(&db, &["run", "--no-retry", "key", "--", "echo", "ran"]));
    locks_are(&mut db.admin().await, 1, 2).await;
    server.stop(Shutdown::Fast);
    assert_eq!(holder.finish().await.code(), Some(125));
    let strict = strict.finish().await;
    assert_eq!((strict.code(), &*strict.output), (Some(69), ""), "{}", strict.errors);
    server.restart();
    waiter.says("ran").await;
    let ended = waiter.finish().await;
    assert_eq!(ended.code(), Some(0));
    // Why, and that it is retried; once.
    assert!(ended.errors.contains("retrying every second"), "{}", ended.errors);
    assert_eq!(ended.errors.lines().count(), 2, "{}", ended.errors);
}

/// Connecting counts.
#[tokio::test]
async fn a_silent_server_delays_no_longer_than_the_limit() {
    let server = Server::options().tcp().start();
    let db = TestDb::on(&server).await;
    let proxy = Proxy::to(server.port()).await;
    let address = proxy.address();
    let url = format!("postgres://postgres@{address}/{}?sslmode=disable", db.name());
    let holder = hold(&db, &["run", "key"]).await;
    proxy.freeze();
    for args in [&["-w", "1"][..], &["-n", "--connect-timeout", "1"]] {
        let started = Instant::now();
        let ended = run(&db, &[&["run", "--url", &url], args, &["key", "true"]].concat()).await;
        assert_eq!(ended.code(), Some(69), "{}", ended.errors);
        assert!(ended.errors.contains("within 1.0 s"), "{}", ended.errors);
        assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    }
    // One that falls silent while the lock is waited for.
    proxy.thaw();
    let waiter = pglock(&db, &["run", "--url", &url, "-w", "3", "key", "true"]);
    let waiter = Running::start(waiter);
    locks_are(&mut db.admin().await, 1, 1).await;
    proxy.freeze();
    let started = Instant::now();
    let ended = waiter.finish().await;
    assert!(matches!(ended.code(), Some(1 | 69)), "{}", ended.errors);
    // Closing the connections counts.
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
    drop(holder);
}

#[tokio::test]
async fn a_session_that_does_not_answer_is_waited_for_within_the_limit() {
    let (_server, db) = TestDb::with_server().await;
    let mut admin = db.admin().await;
    let holder = hold(&db, &["run", "key"]).await;
    let waiter = Running::start(pglock(&db, &["run", "-w", "3", "key", "true"]));
    locks_are(&mut admin, 1, 1).await;
    let locks = pglock_testkit::advisory_locks(&mut admin).await;
    let backend = locks.iter().find(|lock| !lock.granted).unwrap().pid;
    send(backend, Signal::SIGSTOP);
    let started = Instant::now();
    let ended = waiter.finish().await;
    let elapsed = started.elapsed();
    send(backend, Signal::SIGCONT);
    assert_eq!(ended.code(), Some(69), "{}", ended.errors);
    assert!(ended.errors.contains("within 3.0 s"), "{}", ended.errors);
    assert!(elapsed < Duration::from_secs(10), "{elapsed:?}");
    // What is left of the wait holds nothing.
    holder.finish().await;
    locks_are(&mut admin, 0, 0).await;
}

#[tokio::test]
async fn with_v_it_prints_what_it_does() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let holder = hold(&db, &["run", "key"]).await;
    let pid = pglock_testkit::advisory_locks(&mut admin).await.first().unwrap().pid;
    let mut waiter = Running::start(pglock(&db, &["run", "-v", "key", "true"]));
    locks_are(&mut admin, 1, 1).await;
    waiter.complains("pglock: waiting for \"key\" (").await;
    holder.finish().await;
    let ended = waiter.finish().await;
    let lines: Vec<&str> = ended.errors.lines().collect();
    let behind = format!("held by session {pid} (pglock run key sh@");
    for expected in
        ["pglock: waiting for \"key\" (", &behind, "acquired \"key\"", "exit code 0", "released"]
    {
        assert!(lines.iter().any(|line| line.contains(expected)), "{expected}: {lines:?}");
    }
    assert!(!ended.errors.contains('\u{1b}'));
}

#[tokio::test]
async fn a_session_is_named_after_what_it_does() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let holder = hold(&db, &["run", "nightly-report"]).await;
    let names: Vec<String> = sqlx::query_scalar(
        "SELECT application_name FROM pg_stat_activity WHERE datname = current_database() \
         AND application_name LIKE 'pglock %'",
    )
    .fetch_all(&mut admin)
    .await
    .unwrap();
    let host = nix::unistd::gethostname().unwrap().into_string().unwrap();
    let host: String = host.chars().take(14).collect();
    let expected = format!("pglock run nightly-report sh@{host}");
    assert!(!names.is_empty() && names.iter().all(|name| *name == expected), "{names:?}");
    holder.finish().await;
}

#[tokio::test]
async fn warnings_of_the_library_are_shown() {
    let db = TestDb::new().await;
    let other = hold(&db, &["run", "--permits", "3", "key"]).await;
    let another = hold(&db, &["run", "--permits", "3", "key"]).await;
    // The third permit is in use, and a smaller semaphore does not have it.
    let third = hold(&db, &["run", "--permits", "3", "key"]).await;
    other.finish().await;
    another.finish().await;
    let ended = run(&db, &["run", "--permits", "2", "key", "true"]).await;
    assert_eq!(ended.code(), Some(0), "{}", ended.errors);
    assert!(ended.errors.contains("pglock: warning: "), "{}", ended.errors);
    third.finish().await;
}
