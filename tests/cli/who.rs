//! `pglock who`: whether a lock is held, and by whom.

use pglock::{Lock, Semaphore};
use pglock_testkit::TestDb;
use serde_json::{Value, json};

use crate::support::{Running, hold, locks_are, pglock, run};

#[tokio::test]
async fn the_exit_code_shows_whether_it_is_held() {
    let (db, pool) = TestDb::with_pool(1).await;
    for (written, mut lock) in [
        ("42", Lock::new(&pool, 42)),
        ("-42", Lock::new(&pool, -42)),
        ("1,2", Lock::new(&pool, (1, 2))),
        ("1/2", Lock::new(&pool, (1, 2))),
        ("nightly-report", Lock::new(&pool, "nightly-report")),
        ("name:42", Lock::new(&pool, "42")),
    ] {
        let free = run(&db, &["who", written]).await;
        assert_eq!((free.code(), &*free.output), (Some(1), ""), "{written}");
        assert!(free.errors.contains("no session holds"), "{}", free.errors);
        let guard = lock.acquire().await.unwrap();
        let held = run(&db, &["who", written]).await;
        assert_eq!((held.code(), &*held.errors), (Some(0), ""), "{written}");
        assert!(held.output.contains(&format!("  {}  ", guard.backend_pid())), "{}", held.output);
        let quiet = run(&db, &["who", "-q", written]).await;
        assert_eq!((quiet.code(), &*quiet.output, &*quiet.errors), (Some(0), "", ""));
        guard.release().await.unwrap();
        let quiet = run(&db, &["who", "-q", written]).await;
        assert_eq!((quiet.code(), &*quiet.output, &*quiet.errors), (Some(1), "", ""));
    }
}

/// Others are not its business.
#[tokio::test]
async fn its_waiters_are_shown_and_no_other_key() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let other = hold(&db, &["run", "other"]).await;
    let holder = hold(&db, &["run", "key"]).await;
    let waiter = Running::start(pglock(&db, &["run", "key", "true"]));
    locks_are(&mut admin, 2, 1).await;

    let ended = run(&db, &["who", "key"]).await;
    let lines: Vec<&str> = ended.output.lines().collect();
    let [_, held, waiting] = lines.as_slice() else { panic!("{}", ended.output) };
    assert!(held.starts_with("key "), "{held}");
    assert!(waiting.starts_with("└─ waits"), "{waiting}");

    let ended = run(&db, &["who", "--json", "key"]).await;
    let locks: Value = serde_json::from_str(&ended.output).unwrap();
    let names: Vec<_> = locks.as_array().unwrap().iter().map(|lock| lock.get("name")).collect();
    assert_eq!(names, [Some(&json!("key")); 2]);

    holder.finish().await;
    waiter.finish().await;
    other.finish().await;
}

#[tokio::test]
async fn of_a_semaphore_it_shows_the_permits() {
    let (db, pool) = TestDb::with_pool(2).await;
    let semaphore = Semaphore::new(&pool, "printers", 2).unwrap();
    let permit = semaphore.acquire().await.unwrap();
    let ended = run(&db, &["who", "printers"]).await;
    assert_eq!(ended.code(), Some(0));
    assert!(ended.output.contains("\nprinters, permit 0  "), "{}", ended.output);
    permit.release().await.unwrap();
    assert_eq!(run(&db, &["who", "printers"]).await.code(), Some(1));
}
