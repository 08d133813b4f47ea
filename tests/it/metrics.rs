//! The feature `metrics` records each metric, and nothing of the locks that the crate makes for itself.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::future::ready;
use std::pin::pin;
use std::time::Duration;

use ::metrics::{LocalRecorderGuard, Unit, set_default_local_recorder};
use metrics_util::debugging::{DebugValue, DebuggingRecorder, Snapshotter};
use pglock::{Election, Error, Lock, LockManager, LockOptions, Loss, MultiLock, Semaphore};
use pglock_testkit::{TestDb, eventually};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use crate::support::{
    TIMEOUT, acquire_with_each_outcome, borrow_all, has_waiter, spawn, terminate,
};

#[path = "../../examples/web_app/metrics.rs"]
mod exporter;

/// Longer than an answer of the server takes. Opening a connection may take longer, so the tests that depend on this
/// open all connections first.
const MOMENT: Duration = Duration::from_millis(1_500);

const HELD: &str = "pglock_locks_held{mode=exclusive}";
const WAITING: &str = "pglock_locks_waiting{mode=exclusive}";
const HOLDS: &str = "pglock_hold_duration_seconds{mode=exclusive}";
const WAITS: &str = "pglock_wait_duration_seconds{mode=exclusive}";
const ACQUIRED: &str = "pglock_acquire_duration_seconds{outcome=acquired,mode=exclusive}";
const CONNECTIONS: &str = "pglock_connections_in_use";
const QUEUE: &str = "pglock_manager_queue_length";
const LEADER: &str = "pglock_leader";
const TERMS: &str = "pglock_terms_total";
const ABANDONED: &str = "pglock_abandoned_waits_total";

/// All values that were recorded on this thread. A current-thread runtime runs its tasks there too.
struct Recorded {
    snapshotter: Snapshotter,
    so_far: RefCell<SoFar>,
    _recording: LocalRecorderGuard<'static>,
}

/// The values by name and labels. A snapshot resets the values that it returns, so they are summed up here.
#[derive(Default)]
struct SoFar {
    numbers: BTreeMap<String, f64>,
    samples: BTreeMap<String, Vec<f64>>,
}

impl Recorded {
    fn from_now_on() -> Self {
        // The recorder is leaked, because recorders of other threads may outlive a test, and the guard borrows the
        // recorder.
        let recorder: &'static DebuggingRecorder = Box::leak(Box::default());
        let snapshotter = recorder.snapshotter();
        let recording = set_default_local_recorder(recorder);
        pglock::metrics::enable();
        Self { snapshotter, so_far: RefCell::default(), _recording: recording }
    }

    fn update(&self) {
        let mut so_far = self.so_far.borrow_mut();
        for (key, _, _, value) in self.snapshotter.snapshot().into_vec() {
            let key = key.key();
            let labels = key.labels().map(|label| format!("{}={}", label.key(), label.value()));
            let labels = labels.collect::<Vec<_>>().join(",");
            let name = if labels.is_empty() {
                key.name().to_owned()
            } else {
                format!("{}{{{labels}}}", key.name())
            };
            match value {
                #[expect(clippy::cast_precision_loss, reason = "the tests count to ten")]
                DebugValue::Counter(count) => {
                    *so_far.numbers.entry(name).or_default() += count as f64;
                }
                DebugValue::Gauge(change) => {
                    *so_far.numbers.entry(name).or_default() += change.into_inner();
                }
                DebugValue::Histogram(samples) => {
                    let samples = samples.into_iter().map(f64::from);
                    so_far.samples.entry(name).or_default().extend(samples);
                }
            }
        }
    }

    /// The value of a counter or a gauge, if it was recorded.
    fn number(&self, name: &str) -> Option<f64> {
        self.update();
        self.so_far.borrow().numbers.get(name).copied()
    }

    fn samples(&self, name: &str) -> Vec<f64> {
        self.update();
        self.so_far.borrow().samples.get(name).cloned().unwrap_or_default()
    }

    /// The names of a metric with all labels for which something was recorded.
    fn all(&self, metric: &str) -> Vec<String> {
        self.update();
        let so_far = self.so_far.borrow();
        let numbers = so_far.numbers.iter().filter(|(_, number)| **number > 0.5);
        let samples = so_far.samples.iter().filter(|(_, samples)| !samples.is_empty());
        let names = numbers.map(|(name, _)| name).chain(samples.map(|(name, _)| name));
        names.filter(|name| name.starts_with(metric)).cloned().collect()
    }

    #[track_caller]
    fn is(&self, name: &str, number: f64) {
        let found = self.number(name).unwrap_or_default();
        assert!((found - number).abs() < 0.5, "{name} is {found}, not {number}");
    }

    #[expect(clippy::future_not_send, reason = "the recorder is that of a thread")]
    async fn becomes(&self, name: &str, number: f64) {
        eventually(name, TIMEOUT, || async {
            (self.number(name).unwrap_or_default() - number).abs() < 0.5
        })
        .await;
    }
}

/// Every call is counted once by its outcome, including re-entrant calls.
#[tokio::test]
async fn each_acquire_is_counted_by_outcome_and_mode() {
    let (_db, pool) = TestDb::with_pool(3).await;
    borrow_all(&pool).await;
    let recorded = Recorded::from_now_on();

    acquire_with_each_outcome(&pool, MOMENT).await;

    let prefix = "pglock_acquire_duration_seconds";
    let seen: BTreeSet<_> = recorded
        .all(prefix)
        .into_iter()
        .map(|name| {
            assert_eq!(recorded.samples(&name).len(), 1, "{name}");
            name.strip_prefix(prefix).unwrap().to_owned()
        })
        .collect();
    let expected = [
        "{outcome=acquired,mode=exclusive}",
        "{outcome=acquired,mode=shared}",
        "{outcome=busy,mode=exclusive}",
        "{outcome=cancelled,mode=exclusive}",
        "{outcome=error,mode=exclusive}",
        "{outcome=timed_out,mode=shared}",
    ];
    assert_eq!(seen, expected.map(str::to_owned).into());
    let timed_out = recorded.samples(&format!("{prefix}{{outcome=timed_out,mode=shared}}"));
    assert!(timed_out.iter().all(|&time| time >= MOMENT.as_secs_f64()), "{timed_out:?}");
}

/// A future that was never polled has acquired nothing.
#[tokio::test]
async fn an_acquire_never_polled_is_not_counted() {
    let db = TestDb::new().await;
    let mut lock = Lock::new(&db.pool(1).await, 42);
    let recorded = Recorded::from_now_on();
    drop(lock.acquire());
    assert!(recorded.all("pglock_").is_empty());
}

#[tokio::test]
async fn a_hold_lasts_from_the_grant_to_the_drop() {
    let (_db, pool) = TestDb::with_pool(2).await;
    let manager = LockManager::new(&pool);
    for by_manager in [false, true] {
        let mut lock = if by_manager { Lock::new(&manager, 42) } else { Lock::new(&pool, 42) };
        let recorded = Recorded::from_now_on();
        let guard = lock.acquire().await.unwrap();
        recorded.is(HELD, 1.0);
        let stacked = lock.acquire().await.unwrap();
        recorded.is(HELD, 2.0);
        tokio::time::sleep(MOMENT).await;
        assert!(recorded.samples(HOLDS).is_empty());
        drop(stacked);
        recorded.is(HELD, 1.0);
        let mut release = pin!(guard.release());
        let released = tokio::select! {
            biased;
            released = &mut release => Some(released),
            () = ready(()) => None,
        };
        // The release is recorded before the server answers.
        recorded.is(HELD, 0.0);
        match released {
            Some(released) => released.unwrap(),
            None => release.await.unwrap(),
        }
        let holds = recorded.samples(HOLDS);
        assert_eq!(holds.len(), 2);
        assert!(holds.iter().all(|&hold| hold >= MOMENT.as_secs_f64()), "{holds:?}");
    }
}

/// Each mode has its own series. A downgrade ends one hold and begins another.
#[tokio::test]
async fn a_downgrade_is_a_hold_in_each_mode_and_one_acquire() {
    let db = TestDb::new().await;
    let mut lock = Lock::new(&db.pool(1).await, 42);
    let recorded = Recorded::from_now_on();
    let shared = lock.acquire().await.unwrap().downgrade().await.unwrap();
    recorded.is(HELD, 0.0);
    recorded.is("pglock_locks_held{mode=shared}", 1.0);
    assert_eq!(recorded.samples(HOLDS).len(), 1);
    drop(shared);
    assert_eq!(recorded.samples("pglock_hold_duration_seconds{mode=shared}").len(), 1);
    assert_eq!(recorded.all("pglock_acquire_duration_seconds"), [ACQUIRED]);
    assert_eq!(recorded.samples(ACQUIRED).len(), 1);
}

#[tokio::test]
async fn only_acquires_that_wait_have_a_wait() {
    let (_db, pool, mut admin) = TestDb::scene(3).await;
    let recorded = Recorded::from_now_on();
    let guard = Lock::new(&pool, 42).acquire().await.unwrap();
    assert!(Lock::new(&pool, 42).try_acquire().await.unwrap().is_none());
    assert!(recorded.all("pglock_wait_duration_seconds").is_empty());

    let mut waiter = Lock::new(&pool, 42);
    let waiting = spawn(async move { waiter.acquire().await.unwrap() });
    has_waiter(&mut admin).await;
    recorded.is(WAITING, 1.0);
    recorded.is(HELD, 1.0);
    drop(guard);
    let granted = waiting.await.unwrap();
    recorded.is(WAITING, 0.0);
    recorded.is(HELD, 1.0);
    assert_eq!(recorded.samples(WAITS).len(), 1);
    drop(granted);
}

/// A wait that is dropped is cancelled through another connection.
#[tokio::test]
async fn an_abandoned_wait_is_counted() {
    let (_db, pool, mut admin) = TestDb::scene(3).await;
    borrow_all(&pool).await;
    let recorded = Recorded::from_now_on();
    let guard = Lock::new(&pool, 42).acquire().await.unwrap();
    // A wait that ends by its timeout is not counted.
    assert!(Lock::new(&pool, 42).try_acquire_for(MOMENT).await.unwrap().is_none());
    recorded.is(ABANDONED, 0.0);
    let mut waiter = Lock::new(&pool, 42);
    tokio::select! {
        _ = waiter.acquire() => panic!("the lock is held"),
        () = has_waiter(&mut admin) => {}
    }
    recorded.is(ABANDONED, 1.0);
    recorded.is(WAITING, 0.0);
    assert_eq!(recorded.samples(WAITS).len(), 2);
    guard.release().await.unwrap();
}

#[tokio::test]
async fn the_connections_of_locks_are_counted() {
    let (_db, pool) = TestDb::with_pool(3).await;
    let recorded = Recorded::from_now_on();
    let one = Lock::new(&pool, 1).acquire().await.unwrap();
    let same = Lock::new(&one, 2).acquire().await.unwrap();
    let two = Lock::new(&pool, 3).acquire().await.unwrap();
    recorded.is(CONNECTIONS, 2.0);
    two.release().await.unwrap();
    recorded.is(CONNECTIONS, 1.0);
    drop((one, same));
    recorded.becomes(CONNECTIONS, 0.0).await;
}

/// A manager's own requests are not counted as acquires.
#[tokio::test]
async fn a_manager_records_its_batches_and_its_queue() {
    let (_db, pool) = TestDb::with_pool(3).await;
    let manager = LockManager::new(&pool);
    let recorded = Recorded::from_now_on();
    let mut guards = Vec::new();
    for key in 0..3 {
        guards.push(Lock::new(&manager, key).acquire().await.unwrap());
    }
    recorded.is(HELD, 3.0);
    recorded.is(QUEUE, 0.0);
    recorded.is(CONNECTIONS, 1.0);
    assert_eq!(recorded.samples("pglock_manager_batch_size"), [1.0, 1.0, 1.0]);
    assert!(recorded.samples(WAITS).is_empty());

    let mut waiter = Lock::new(&manager, 0);
    let waiting = spawn(async move { waiter.acquire().await.unwrap() });
    recorded.becomes(QUEUE, 1.0).await;
    recorded.is(WAITING, 1.0);
    guards.remove(0).release().await.unwrap();
    drop(waiting.await.unwrap());
    recorded.is(QUEUE, 0.0);
    recorded.is(WAITING, 0.0);
    assert_eq!(recorded.samples(WAITS).len(), 1);
    assert_eq!(recorded.samples(ACQUIRED).len(), 4);
    guards.clear();
    recorded.is(HELD, 0.0);
    assert_eq!(recorded.samples(HOLDS).len(), 4);
}

/// The first waiter for a key tries the lock on the server before the process knows that it has to wait.
#[tokio::test]
async fn a_manager_records_waits_for_other_processes() {
    let db = TestDb::new().await;
    let (pool, other) = (db.pool(3).await, db.pool(1).await);
    let mut admin = db.admin().await;
    let guard = Lock::new(&other, 1).acquire().await.unwrap();
    let manager = LockManager::new(&pool);
    let recorded = Recorded::from_now_on();
    let mut waiter = Lock::new(&manager, 1);
    let waiting = spawn(async move { waiter.acquire().await.unwrap() });
    has_waiter(&mut admin).await;
    recorded.is(WAITING, 1.0);
    guard.release().await.unwrap();
    drop(waiting.await.unwrap());
    recorded.is(WAITING, 0.0);
    assert_eq!(recorded.samples(WAITS).len(), 1);
    assert_eq!(recorded.samples(ACQUIRED).len(), 1);
    assert_eq!(recorded.samples(HOLDS).len(), 1);
}

#[tokio::test]
async fn losses_are_counted_by_reason() {
    let (_db, pool, mut admin) = TestDb::scene(3).await;
    let recorded = Recorded::from_now_on();
    // Two guards hold the lock, and the session holds another lock beside it.
    let mut lock = Lock::new(&pool, 1);
    let (guard, stacked) = (lock.acquire().await.unwrap(), lock.acquire().await.unwrap());
    let beside = Lock::new(&guard, 2).acquire().await.unwrap();
    terminate(&mut admin, guard.backend_pid()).await;
    guard.verify().await.unwrap_err();
    recorded.is("pglock_losses_total{reason=disconnected}", 2.0);
    // A lost hold counts as held until its guard is dropped.
    recorded.is(HELD, 3.0);
    drop((guard, stacked, beside));
    recorded.is(HELD, 0.0);

    let guard = Lock::new(&pool, 1).acquire().await.unwrap();
    let mut connection = guard.connection().await.unwrap();
    sqlx::raw_sql("SELECT pg_advisory_unlock_all()").execute(&mut *connection).await.unwrap();
    drop(connection);
    let lost = guard.release().await.unwrap_err();
    assert!(matches!(lost, Error::Lost { reason: Loss::NotHeld, .. }), "{lost:?}");
    recorded.is("pglock_losses_total{reason=not_held}", 1.0);

    let manager = LockManager::new(&pool);
    let one = Lock::new(&manager, 1).acquire().await.unwrap();
    let two = Lock::new(&manager, 2).acquire().await.unwrap();
    terminate(&mut admin, one.backend_pid()).await;
    timeout(TIMEOUT, one.lost()).await.unwrap();
    recorded.is("pglock_losses_total{reason=disconnected}", 4.0);
    assert_eq!(recorded.all("pglock_losses_total").len(), 2);
    drop((one, two));
}

#[tokio::test]
async fn a_leader_is_shown_until_it_resigns_or_is_lost() {
    let (_db, pool, mut admin) = TestDb::scene(3).await;
    let recorded = Recorded::from_now_on();
    let mut election = Election::new(&pool, "billing");
    let leadership = election.campaign().await.unwrap();
    recorded.is(LEADER, 1.0);
    recorded.is(TERMS, 1.0);
    // A second leadership belongs to the same term.
    let same = election.campaign().await.unwrap();
    drop(leadership);
    recorded.is(LEADER, 1.0);
    recorded.is(TERMS, 1.0);
    // Another candidate does not lead.
    assert!(Election::new(&pool, "billing").try_campaign().await.unwrap().is_none());
    recorded.is(LEADER, 1.0);
    same.resign().await.unwrap();
    recorded.is(LEADER, 0.0);

    let leadership = election.try_campaign().await.unwrap().unwrap();
    recorded.is(LEADER, 1.0);
    recorded.is(TERMS, 2.0);
    terminate(&mut admin, leadership.backend_pid()).await;
    leadership.verify().await.unwrap_err();
    recorded.is(LEADER, 0.0);
    drop(leadership);
    recorded.is(LEADER, 0.0);
}

/// A clone of the leadership that outlives the term does not prolong it.
#[tokio::test]
async fn a_leader_is_not_shown_after_its_run() {
    let (_db, pool) = TestDb::with_pool(3).await;
    let recorded = Recorded::from_now_on();
    let mut election = Election::new(&pool, "billing");
    let clones = RefCell::new(Vec::new());
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let stop = RefCell::new(Some(stop));
    let run = election.run(async { drop(stopped.await) }, |leadership| {
        recorded.is(LEADER, 1.0);
        clones.borrow_mut().push(leadership);
        drop(stop.borrow_mut().take());
        std::future::pending::<Result<(), Error>>()
    });
    run.await.unwrap();
    recorded.is(LEADER, 0.0);
    recorded.is(TERMS, 1.0);
    drop(clones);
    recorded.is(LEADER, 0.0);
}

/// The gauge is shown from the candidate's first campaign on, so that there is a zero to alert on.
#[tokio::test]
async fn a_candidate_that_waits_is_shown_as_zero() {
    let (_db, pool) = TestDb::with_pool(3).await;
    let _leader = Election::new(&pool, "billing").campaign().await.unwrap();
    let recorded = Recorded::from_now_on();
    assert!(Election::new(&pool, "billing").try_campaign().await.unwrap().is_none());
    assert_eq!((recorded.number(LEADER), recorded.number(TERMS)), (Some(0.0), Some(0.0)));
}

#[tokio::test]
async fn heartbeats_are_timed() {
    let db = TestDb::new().await;
    let interval = Duration::from_millis(100);
    let options = LockOptions::new().heartbeat_interval(interval).on(&db.pool(1).await).unwrap();
    let recorded = Recorded::from_now_on();
    let guard = Lock::new(&options, 1).acquire().await.unwrap();
    let heartbeats = || recorded.samples("pglock_heartbeat_duration_seconds");
    let ages = || recorded.samples("pglock_last_answer_age_seconds");
    eventually("two heartbeats", TIMEOUT, || async { heartbeats().len() >= 2 }).await;
    // While the connection is in use, the heartbeat uses another one.
    let connection = guard.connection().await.unwrap();
    let before = heartbeats().len();
    eventually("another one", TIMEOUT, || async { heartbeats().len() > before }).await;
    drop(connection);
    assert!(ages().iter().any(|&age| age >= interval.as_secs_f64()), "{:?}", ages());
    guard.release().await.unwrap();
}

/// Neither the locks of which a permit is made are counted, nor the first waiter's tries every 20 ms.
#[tokio::test]
async fn a_permit_is_one_lock() {
    let (_db, pool) = TestDb::with_pool(6).await;
    borrow_all(&pool).await;
    let semaphore = Semaphore::new(&pool, "printers", 1).unwrap();
    let recorded = Recorded::from_now_on();
    let permit = semaphore.acquire().await.unwrap();
    recorded.is(HELD, 1.0);
    assert!(semaphore.try_acquire().await.unwrap().is_none());
    assert!(semaphore.try_acquire_for(MOMENT).await.unwrap().is_none());
    assert_eq!(recorded.samples(WAITS).len(), 1);
    let waiters = [(); 2].map(|()| {
        let semaphore = semaphore.clone();
        spawn(async move { semaphore.acquire().await.unwrap().release().await.unwrap() })
    });
    recorded.becomes(WAITING, 2.0).await;
    permit.release().await.unwrap();
    for waiter in waiters {
        waiter.await.unwrap();
    }
    recorded.is(WAITING, 0.0);
    recorded.is(HELD, 0.0);
    assert_eq!(recorded.samples(WAITS).len(), 3);
    assert_eq!(recorded.samples(HOLDS).len(), 3);
    assert_eq!(recorded.samples(ACQUIRED).len(), 3);
    let others = recorded.all("pglock_acquire_duration_seconds");
    assert_eq!(others.len(), 3, "{others:?}");
    pool.close().await;
    semaphore.acquire().await.unwrap_err();
    let failed = "pglock_acquire_duration_seconds{outcome=error,mode=exclusive}";
    assert_eq!(recorded.samples(failed).len(), 1);
}

#[tokio::test]
async fn several_keys_are_one_lock() {
    let db = TestDb::new().await;
    let recorded = Recorded::from_now_on();
    let guard = MultiLock::new(&db.pool(1).await, [1, 2, 3]).acquire().await.unwrap();
    recorded.is(HELD, 1.0);
    guard.release().await.unwrap();
    assert_eq!(recorded.samples(HOLDS).len(), 1);
}

/// Only the locks of a source whose options enable the label have it.
#[tokio::test]
async fn the_key_is_a_label_where_the_application_wants_it() {
    let (_db, pool) = TestDb::with_pool(3).await;
    let labelled = LockOptions::new().label_metrics_by_key().on(&pool).unwrap();
    let recorded = Recorded::from_now_on();
    let report = Lock::new(&labelled, "nightly-report").acquire().await.unwrap();
    let manager = LockManager::new(&labelled);
    let number = Lock::new(&manager, 7).acquire().await.unwrap();
    let plain = Lock::new(&pool, "invoice-17").acquire().await.unwrap();
    recorded.is("pglock_locks_held{mode=exclusive,key=nightly-report}", 1.0);
    recorded.is("pglock_locks_held{mode=exclusive,key=7}", 1.0);
    recorded.is(HELD, 1.0);
    drop((report, number, plain));
    recorded.is("pglock_locks_held{mode=exclusive,key=nightly-report}", 0.0);
    let acquired = "pglock_acquire_duration_seconds{outcome=acquired,mode=exclusive,key=7}";
    assert_eq!(recorded.samples(acquired).len(), 1);
    assert_eq!(recorded.samples(ACQUIRED).len(), 1);

    let mut election = Election::new(&labelled, "billing");
    let leadership = election.campaign().await.unwrap();
    recorded.is("pglock_leader{key=billing}", 1.0);
    recorded.is("pglock_terms_total{key=billing}", 1.0);
    leadership.resign().await.unwrap();
    recorded.is("pglock_leader{key=billing}", 0.0);
    assert_eq!(recorded.number(LEADER), None);
}

/// The table in the module's documentation has all metrics, with their types, and nothing else.
#[test]
fn all_metrics_are_described_as_the_table_says() {
    let page = include_str!("../../src/metrics.rs");
    let rows = page.lines().filter_map(|line| line.strip_prefix("//! | `pglock_"));
    let documented: BTreeSet<_> = rows
        .map(|row| {
            let mut cells = row.split(" | ");
            let name = format!("pglock_{}", cells.next().unwrap().trim_end_matches('`'));
            (name, cells.next().unwrap().to_owned(), cells.next() == Some("seconds"))
        })
        .collect();
    assert_eq!(documented.len(), 14);

    let recorded = Recorded::from_now_on();
    // These metrics are shown once there is a candidate.
    let _election = (::metrics::counter!("pglock_terms_total"), ::metrics::gauge!("pglock_leader"));
    let described: BTreeSet<_> = recorded
        .snapshotter
        .snapshot()
        .into_vec()
        .into_iter()
        .map(|(key, unit, description, _)| {
            let name = key.key().name().to_owned();
            assert!(description.is_some(), "{name}");
            let kind = format!("{:?}", key.kind()).to_lowercase();
            (name, kind, unit.unwrap() == Unit::Seconds)
        })
        .collect();
    assert_eq!(described, documented);
}

/// Uses the exporter of the example `web_app`. The exporter records for the whole process, so the test checks only
/// locks of this key.
#[tokio::test]
async fn prometheus_scrapes_the_metrics() {
    let (_db, pool) = TestDb::with_pool(1).await;
    let router = exporter::router().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = spawn(async move { axum::serve(listener, router).await });

    let labelled = LockOptions::new().label_metrics_by_key().on(&pool).unwrap();
    let guard = Lock::new(&labelled, "scraped").acquire().await.unwrap();
    let held = r#"pglock_locks_held{mode="exclusive",key="scraped"}"#;
    let page = scrape(address).await;
    assert!(page.contains(&format!("\n{held} 1\n")), "{page}");
    assert!(page.contains("\n# TYPE pglock_acquire_duration_seconds histogram\n"), "{page}");
    assert!(page.contains("\n# TYPE pglock_abandoned_waits_total counter\n"), "{page}");
    assert!(page.contains("\n# HELP pglock_locks_held Guards that "), "{page}");

    guard.release().await.unwrap();
    let page = scrape(address).await;
    assert!(page.contains(&format!("\n{held} 0\n")), "{page}");
    let measured = r#"pglock_hold_duration_seconds_count{mode="exclusive",key="scraped"} 1"#;
    assert!(page.contains(measured), "{page}");
    server.abort();
}

async fn scrape(address: std::net::SocketAddr) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = "GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    answer
}
