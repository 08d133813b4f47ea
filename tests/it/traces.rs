//! What the crate reports to `tracing`: a span for every acquire, an event for every release, and no warning or error
//! unless something is wrong.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pglock::{Election, Error, Lock, LockManager, LockOptions, Loss, MultiLock, Semaphore};
use pglock_testkit::{TestDb, eventually, replace_function};
use tokio::time::{sleep, timeout};
use tracing::{Instrument, Level};

use crate::logged::{Entry, Logged, capture};
use crate::support::{
    TIMEOUT, acquire_with_each_outcome, borrow_all, has_waiter, spawn, terminate,
};

/// Longer than an answer of the server takes. Opening a connection may take longer, so the tests that depend on this
/// open all connections first.
const MOMENT: Duration = Duration::from_millis(1_500);

/// Each acquire has one span, with its result, including re-entrant acquires.
#[tokio::test]
async fn every_acquire_has_a_span() {
    let (_db, pool) = TestDb::with_pool(3).await;
    borrow_all(&pool).await;
    let told = Logged::from_now_on();

    acquire_with_each_outcome(&pool, MOMENT).await;

    let spans = told.acquires();
    let summary: Vec<_> = spans
        .iter()
        .map(|span| (span.field("mode").unwrap(), span.field("outcome").unwrap()))
        .collect();
    assert_eq!(
        summary,
        [
            ("exclusive", "acquired"),
            ("shared", "acquired"),
            ("exclusive", "busy"),
            ("shared", "busy"),
            ("exclusive", "cancelled"),
            ("exclusive", "failed"),
        ]
    );
    let key = sqlx::postgres::PgAdvisoryLock::new("nightly-report").key().as_bigint().unwrap();
    for span in &spans {
        assert_eq!(span.field("lock.key"), Some(key.to_string().as_str()));
        assert_eq!(span.field("lock.name"), Some("nightly-report"));
        assert!(*span.metadata.level() >= Level::DEBUG);
        assert!(span.is_ours());
    }
    let waited: Vec<u64> =
        spans.iter().map(|span| span.field("waited_ms").unwrap().parse().unwrap()).collect();
    // These are the two acquires that timed out. The timer of the second one began before its acquire.
    let moment = u64::try_from((MOMENT * 9 / 10).as_millis()).unwrap();
    let long = waited.iter().map(|&waited| waited >= moment);
    assert_eq!(long.skip(3).take(2).collect::<Vec<_>>(), [true, true], "{waited:?}");
}

/// The span of a hold is not part of the acquire's span, which ends before.
#[tokio::test]
async fn every_hold_has_a_span() {
    let (_db, pool, mut admin) = TestDb::scene(4).await;
    let told = Logged::from_now_on();
    let holds = || {
        let all = told.all().into_iter();
        let holds = all.filter(|entry| entry.metadata.name() == "hold").collect::<Vec<_>>();
        let field = |entry: &Entry, name| entry.field(name).unwrap().to_owned();
        let told = holds.iter().map(|hold| {
            assert!(hold.is_ours() && *hold.metadata.level() == Level::DEBUG);
            (field(hold, "lock.name"), field(hold, "mode"), field(hold, "outcome"))
        });
        told.collect::<Vec<_>>()
    };
    let hold = |name: &str, mode: &str, outcome: &str| {
        (name.to_owned(), mode.to_owned(), outcome.to_owned())
    };
    let parent = tracing::debug_span!("request");

    let mut lock = Lock::new(&pool, "invoice-17");
    let guard = lock.acquire().instrument(parent.clone()).await.unwrap();
    let again = lock.acquire_shared().await.unwrap();
    assert_eq!((told.acquires().len(), holds().len()), (2, 0));
    drop(again);
    assert_eq!(holds(), [hold("invoice-17", "shared", "released")]);
    drop(parent);
    let is_request = |entry: &Entry| entry.metadata.name() == "request";
    assert!(!told.all().iter().any(is_request), "the hold is a part of the request");
    let shared = guard.downgrade().await.unwrap();
    shared.release().await.unwrap();
    assert!(told.all().iter().any(is_request));

    let manager = LockManager::new(&pool);
    let guard = Lock::new(&manager, "managed").acquire().await.unwrap();
    terminate(&mut admin, guard.backend_pid()).await;
    guard.lost().await;
    drop(guard);
    assert_eq!(
        holds(),
        [
            hold("invoice-17", "shared", "released"),
            hold("invoice-17", "exclusive", "released"),
            hold("invoice-17", "shared", "released"),
            hold("managed", "exclusive", "lost"),
        ]
    );
}

/// A number has no name, and a pair is one field.
#[tokio::test]
async fn a_span_shows_the_key_as_it_is() {
    let (_db, pool) = TestDb::with_pool(1).await;
    let told = Logged::from_now_on();
    Lock::new(&pool, 42).acquire().await.unwrap().release().await.unwrap();
    Lock::new(&pool, (1, -2)).acquire().await.unwrap().release().await.unwrap();
    let spans = told.acquires();
    let keys: Vec<_> =
        spans.iter().map(|span| (span.field("lock.key"), span.field("lock.name"))).collect();
    assert_eq!(keys, [(Some("42"), None), (Some("(1, -2)"), None)]);
}

/// The locks that a semaphore is made of are named after it.
#[tokio::test]
async fn a_semaphore_is_reported_by_its_name() {
    let (_db, pool) = TestDb::with_pool(1).await;
    let semaphore = Semaphore::new(&pool, "printers", 3).unwrap();
    let told = Logged::from_now_on();
    semaphore.acquire().await.unwrap().release().await.unwrap();
    pool.close().await;
    let error = semaphore.acquire().await.unwrap_err();
    assert_eq!(error.key(), Some(semaphore.key()));
    let spans = told.acquires();
    assert!(!spans.is_empty());
    for span in spans {
        assert_eq!(span.field("lock.name"), Some("printers, queue of the semaphore"));
    }
}

#[tokio::test]
async fn a_permit_of_a_larger_semaphore_is_warned_of_once() {
    let (_db, pool) = TestDb::with_pool(4).await;
    let large = Semaphore::new(&pool, "printers", 3).unwrap();
    let small = Semaphore::new(&pool, "printers", 2).unwrap();
    let mut permits = Vec::new();
    for _ in 0..3 {
        permits.push(large.acquire().await.unwrap());
    }
    // Two of the three permits are also permits of the smaller semaphore.
    permits.retain(|permit| permit.slot() > 0);
    let told = Logged::from_now_on();
    large.acquire().await.unwrap().release().await.unwrap();
    assert_eq!(told.events(Level::WARN).len(), 0);
    for _ in 0..2 {
        small.acquire().await.unwrap().release().await.unwrap();
    }
    let warned = told.events(Level::WARN);
    let [warning] = warned.as_slice() else { panic!("{warned:#?}") };
    assert_eq!((warning.field("permits"), warning.field("others")), (Some("2"), Some("3")));
}

#[tokio::test]
async fn the_error_of_a_leader_is_warned_of() {
    let (_db, pool) = TestDb::with_pool(1).await;
    let mut election = Election::new(&pool, "billing");
    let told = Logged::from_now_on();
    let led = tokio::sync::Notify::new();
    let run = election.run(led.notified(), |_| async {
        led.notify_one();
        Err("the mail server is down")
    });
    assert!(matches!(run.await, Err(Error::LeaderFailed { .. })));
    let warned = told.events(Level::WARN);
    let [warning] = warned.as_slice() else { panic!("{warned:#?}") };
    assert_eq!(warning.field("error"), Some("the mail server is down"));
    assert!(warning.field("pause_ms").is_some());
}

/// A future that was never polled has acquired nothing, so it has no span.
#[tokio::test]
async fn an_acquire_never_polled_has_no_span() {
    let (_db, pool) = TestDb::with_pool(1).await;
    let mut lock = Lock::new(&pool, 42);
    let told = Logged::from_now_on();
    drop(lock.acquire());
    assert!(told.acquires().is_empty());
}

/// The release is logged by the task that makes it, whether or not a caller awaits it.
#[tokio::test]
async fn a_release_is_a_trace_event() {
    let (_db, pool) = TestDb::with_pool(1).await;
    let mut lock = Lock::new(&pool, 42);
    let told = Logged::from_now_on();

    let guard = lock.acquire().await.unwrap();
    let pid = guard.backend_pid().to_string();
    guard.release().await.unwrap();
    drop(lock.acquire().await.unwrap());
    eventually("both releases are logged", TIMEOUT, || async {
        told.events(Level::TRACE).len() == 2
    })
    .await;
    for release in told.events(Level::TRACE) {
        assert_eq!(release.field("message"), Some("released"));
        assert_eq!(release.field("backend_pid"), Some(pid.as_str()));
    }
    assert!(told.events(Level::DEBUG).is_empty(), "{:#?}", told.all());
    told.nothing_loud();
}

/// After an acquire was dropped, its background task logs how it ends the wait.
#[tokio::test]
async fn an_abandoned_wait_is_a_debug_event() {
    let db = TestDb::new().await;
    let (pool, other) = (db.pool(1).await, db.pool(1).await);
    let mut admin = db.admin().await;
    let guard = Lock::new(&other, "nightly-report").acquire().await.unwrap();
    let mut lock = Lock::new(&pool, "nightly-report");
    let told = Logged::from_now_on();

    tokio::select! {
        _ = lock.acquire() => panic!("the lock is held"),
        () = has_waiter(&mut admin) => {}
    }
    eventually("the abandonment is logged", TIMEOUT, || async {
        !told.events(Level::DEBUG).is_empty()
    })
    .await;
    let events = told.events(Level::DEBUG);
    let [event] = events.as_slice() else { panic!("{events:#?}") };
    assert!(event.field("lock.name").unwrap().contains("nightly-report"));
    assert_eq!(event.field("mode"), Some("exclusive"));
    guard.release().await.unwrap();
    told.nothing_loud();
}

/// No other report says that a connection must not return to the pool.
#[tokio::test]
async fn a_connection_that_is_closed_instead_is_a_warning() {
    let (_db, pool) = TestDb::with_pool(1).await;
    let guard = Lock::new(&pool, 42).acquire().await.unwrap();
    let pid = guard.backend_pid().to_string();
    let mut conn = guard.connection().await.unwrap();
    sqlx::raw_sql("SELECT pg_advisory_unlock_all()").execute(&mut *conn).await.unwrap();
    drop(conn);

    let told = Logged::from_now_on();
    let lost = guard.release().await.unwrap_err();
    assert!(matches!(lost, Error::Lost { reason: Loss::NotHeld, .. }), "{lost:?}");
    let warnings = told.events(Level::WARN);
    let [warning] = warnings.as_slice() else { panic!("{warnings:#?}") };
    assert_eq!(warning.field("backend_pid"), Some(pid.as_str()));
    assert!(warning.field("reason").unwrap().contains("no longer holds the lock"));
    assert_eq!(warning.field("lock.keys"), Some("42"));
}

/// One session holds many locks: the warning has the number of guards that have lost their locks.
#[tokio::test]
async fn the_warning_of_a_managers_session_counts_its_locks() {
    let (_db, pool, mut admin) = TestDb::scene(3).await;
    let manager = LockManager::new(&pool);
    let mut guards = Vec::new();
    for key in 1..=5 {
        guards.push(Lock::new(&manager, key).acquire().await.unwrap());
    }
    guards.pop().unwrap().release().await.unwrap();
    let reading = guards.pop().unwrap().downgrade().await.unwrap();
    let pid = reading.backend_pid();

    let told = Logged::from_now_on();
    terminate(&mut admin, pid).await;
    timeout(TIMEOUT, reading.lost()).await.unwrap();
    let warnings = told.events(Level::WARN);
    let [warning] = warnings.as_slice() else { panic!("{warnings:#?}") };
    assert_eq!(warning.field("locks"), Some("4"));
    assert_eq!(warning.field("lock.keys"), Some("1, 2, 3, 4"));
}

/// A handle in a mutex does not exclude the tasks that share it: the second one re-enters.
#[tokio::test]
async fn a_handle_that_two_tasks_share_is_a_warning() {
    let (_db, pool) = TestDb::with_pool(2).await;
    let manager = LockManager::new(&pool);
    let handles = [Lock::new(&pool, "nightly-report"), Lock::new(&manager, "nightly-report")];
    for lock in handles {
        let in_mutex = Arc::new(tokio::sync::Mutex::new(lock));
        let told = Logged::from_now_on();
        let acquire = || {
            let in_mutex = Arc::clone(&in_mutex);
            spawn(async move { in_mutex.lock().await.acquire().await.unwrap() })
        };
        let first = acquire().await.unwrap();
        told.nothing_loud();
        let inside = [acquire().await.unwrap(), acquire().await.unwrap()];
        let warnings = told.events(Level::WARN);
        let [warning] = warnings.as_slice() else { panic!("{warnings:#?}") };
        assert_eq!(warning.field("lock.name"), Some("nightly-report"));
        drop((first, inside));

        // A single task may re-enter without a warning.
        let mut own = in_mutex.lock().await.clone();
        let told = Logged::from_now_on();
        let twice = (own.acquire().await.unwrap(), own.acquire().await.unwrap());
        told.nothing_loud();
        drop(twice);
    }
}

/// Even a wait of 2.5 s is silent, though sqlx reports a slow statement after one second.
#[tokio::test]
async fn the_normal_path_is_silent() {
    let db = TestDb::new().await;
    let (pool, other) = (db.pool(2).await, db.pool(2).await);
    let mut admin = db.admin().await;
    let mut lock = Lock::new(&pool, "nightly-report");
    let mut contender = Lock::new(&other, "nightly-report");
    let told = Logged::from_now_on();

    let guard = lock.acquire().await.unwrap();
    let (waited, ()) = tokio::join!(contender.acquire(), async {
        has_waiter(&mut admin).await;
        sleep(Duration::from_millis(2500)).await;
        guard.release().await.unwrap();
    });
    let guard = waited.unwrap();
    assert!(lock.try_acquire_for(Duration::from_millis(1500)).await.unwrap().is_none());
    let stacked = contender.acquire_shared().await.unwrap();
    guard.release().await.unwrap();
    stacked.release().await.unwrap();
    drop(lock.acquire_shared().await.unwrap());
    lock.release_all().await.unwrap();

    // A span is closed with the last future that was created in it.
    let closed = || async { told.acquires().len() == 5 };
    eventually("five acquires are closed", TIMEOUT, closed).await;
    told.nothing_loud();
    assert!(told.events(Level::DEBUG).is_empty(), "{:#?}", told.events(Level::DEBUG));
}

/// A long wait is reported before it ends, for every kind of lock.
#[tokio::test]
async fn a_long_wait_is_reported_while_it_lasts() {
    let db = TestDb::new().await;
    let (pool, other) = (db.pool(8).await, db.pool(8).await);
    let options = LockOptions::new().wait_slice(Duration::from_secs(2));
    let (source, manager) =
        (options.on(&pool).unwrap(), LockManager::new(&options.on(&pool).unwrap()));
    let permits = Semaphore::new(&source, "permits", 1).unwrap();
    let held = (
        Lock::new(&other, "plain").acquire().await.unwrap(),
        Lock::new(&other, "several").acquire().await.unwrap(),
        Lock::new(&manager, "managed").acquire().await.unwrap(),
        permits.acquire().await.unwrap(),
    );

    let told = Logged::from_now_on();
    let (mut plain, mut through_it) = (Lock::new(&source, "plain"), Lock::new(&manager, "managed"));
    let mut several = MultiLock::new(&source, ["several"]);
    let waiting = [
        spawn(async move { plain.acquire().await.map(drop) }),
        spawn(async move { several.acquire().await.map(drop) }),
        spawn(async move { through_it.acquire().await.map(drop) }),
        spawn(async move { permits.acquire().await.map(drop) }),
    ];
    let told_of = |name: &str| {
        let events = told.events(Level::DEBUG).into_iter();
        let events = events.filter(|event| event.field("lock.name") == Some(name));
        let waited = events.filter_map(|event| event.field("waited_ms")?.parse::<u64>().ok());
        waited.collect::<Vec<_>>()
    };
    for name in ["plain", "several", "managed", "permits"] {
        eventually("it is reported twice", TIMEOUT, || async { told_of(name).len() >= 2 }).await;
        let (waited, least) = (told_of(name), [2000, 4000]);
        assert!(waited.iter().zip(least).all(|(waited, least)| *waited >= least), "{waited:?}");
    }
    drop(held);
    for waiting in waiting {
        waiting.await.unwrap().unwrap();
    }
}

/// A JSON formatter puts the fields of a span beside the span's own name, and writes values that are not strings as
/// text.
#[tokio::test]
async fn names_and_causes_survive_json() {
    let db = TestDb::new().await;
    let (pool, other) = (db.pool(2).await, db.pool(1).await);
    let mut admin = db.admin().await;
    let held = Lock::new(&other, "nightly-report").acquire().await.unwrap();
    let slice = LockOptions::new().wait_slice(Duration::from_secs(2)).on(&pool).unwrap();
    let mut lock = Lock::new(&slice, "nightly-report");

    let written = Arc::new(Mutex::new(Vec::new()));
    let writer = Arc::clone(&written);
    let writer = move || Written(Arc::clone(&writer));
    let json = tracing_subscriber::fmt::layer().json().with_writer(writer);
    let capturing = capture(json);
    let entries = || {
        let text = String::from_utf8(written.lock().unwrap().clone()).unwrap();
        let entries = text.lines().map(|line| serde_json::from_str(line).unwrap());
        entries.collect::<Vec<serde_json::Value>>()
    };
    let waiting = spawn(async move { lock.acquire().await });
    let is_told = |entry: &serde_json::Value| {
        let text = |pointer| entry.pointer(pointer).and_then(serde_json::Value::as_str);
        text("/fields/lock.name") == Some("nightly-report")
            && text("/span/lock.name") == Some("nightly-report")
            && text("/span/name") == Some("acquire")
            && text("/span/lock.key") == text("/fields/lock.key")
    };
    eventually("the wait is reported", TIMEOUT, || async { entries().iter().any(is_told) }).await;

    terminate(&mut admin, held.backend_pid()).await;
    timeout(TIMEOUT, held.lost()).await.unwrap();
    let is_warning = |entry: &serde_json::Value| entry.get("level").is_some_and(|l| l == "WARN");
    let warning = entries().into_iter().find(is_warning).unwrap();
    assert_eq!(warning.pointer("/fields/locks").unwrap(), 1);
    let reason = warning.pointer("/fields/reason").unwrap().as_str().unwrap();
    assert!(reason.contains(": "), "{reason}");
    drop(capturing);
    waiting.await.unwrap().unwrap().release().await.unwrap();
}

/// A buffer that the test can read.
struct Written(Arc<Mutex<Vec<u8>>>);

impl io::Write for Written {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The application's own statements on the lock's connection are logged as usual.
#[tokio::test]
async fn the_applications_own_statements_are_not_silenced() {
    let (_db, pool) = TestDb::with_pool(1).await;
    let guard = Lock::new(&pool, 42).acquire().await.unwrap();
    let told = Logged::from_now_on();
    let mut conn = guard.connection().await.unwrap();
    sqlx::raw_sql("SELECT 'ours to see'").execute(&mut *conn).await.unwrap();
    let seen = told.all().iter().any(|entry| entry.metadata.target() == "sqlx::query");
    assert!(seen, "{:#?}", told.all());
}

/// An unlock takes the locks out of the ledger before the server answers that it did not hold them.
#[tokio::test]
async fn the_warning_of_an_unlock_that_finds_no_lock_names_the_lock() {
    let (_server, db) = TestDb::with_server().await;
    let guard = Lock::new(&db.pool(1).await, 42).acquire().await.unwrap();
    let unlock = "pg_advisory_unlock(bigint)";
    replace_function(&mut db.admin().await, unlock, "BEGIN RETURN false; END").await;
    let told = Logged::from_now_on();
    let lost = guard.release().await.unwrap_err();
    assert!(matches!(lost, Error::Lost { reason: Loss::NotHeld, .. }), "{lost:?}");
    let warnings = told.events(Level::WARN);
    let [warning] = warnings.as_slice() else { panic!("{warnings:#?}") };
    assert_eq!(warning.field("locks"), Some("1"));
    assert_eq!(warning.field("lock.keys"), Some("42"));
}
