//! Waits are fair, whatever the length of the holds: a waiter is served about as soon as a waiter that calls
//! `pg_advisory_lock` directly, in the same set-up.
//!
//! `PGLOCK_FAIR_HOLD_MS` is the length of a hold (300). Holds that are longer than a slice of a wait take
//! minutes: `PGLOCK_FAIR_HOLD_MS=8000`.

use std::env;
use std::time::{Duration, Instant};

use pglock::{Lock, Mode, transaction};
use pglock_testkit::{TestDb, advisory_locks, eventually};
use sqlx::postgres::PgPool;
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::support::{report, spawn};

/// The lock of the crate's waiter.
const OURS: i64 = 1;
/// The lock of the waiter that calls `pg_advisory_lock`.
const BARE: i64 = 2;

/// How many times longer than the bare function a wait may take.
const FACTOR: u32 = 4;
/// The time that a wait may take in addition, on a busy machine.
const BESIDES: Duration = Duration::from_secs(2);

/// The kind of lock to test.
#[derive(Clone, Copy, Debug)]
enum Kind {
    /// Session locks, each in a process of its own as far as the crate can detect.
    Session,
    /// Session locks in one process.
    OneProcess,
    Transaction,
}

/// Tasks that hold a lock for some time, release it, and acquire it again at once.
#[derive(Clone, Copy, Debug)]
struct Holders {
    kind: Kind,
    mode: Mode,
    count: u32,
    hold: Duration,
}

#[tokio::test]
async fn a_writer_is_served_beside_readers() {
    is_served_in_time(readers(Kind::Session)).await;
}

#[tokio::test]
async fn a_writer_is_served_beside_readers_of_its_process() {
    is_served_in_time(readers(Kind::OneProcess)).await;
}

#[tokio::test]
async fn a_writer_is_served_beside_readers_of_a_transaction_lock() {
    is_served_in_time(readers(Kind::Transaction)).await;
}

#[tokio::test]
async fn a_third_writer_is_served_beside_two() {
    is_served_in_time(writers(Kind::Session)).await;
}

#[tokio::test]
async fn a_third_writer_is_served_beside_two_of_a_transaction_lock() {
    is_served_in_time(writers(Kind::Transaction)).await;
}

/// Three readers, at least one of which always holds the lock.
fn readers(kind: Kind) -> Holders {
    Holders { kind, mode: Mode::Shared, count: 3, hold: hold() }
}

fn writers(kind: Kind) -> Holders {
    Holders { kind, mode: Mode::Exclusive, count: 2, hold: hold() }
}

fn hold() -> Duration {
    let millis = env::var("PGLOCK_FAIR_HOLD_MS").map_or(300, |millis| millis.parse().unwrap());
    Duration::from_millis(millis)
}

/// Measures both waiters beside the same kind of holders, each on a key of its own.
async fn is_served_in_time(holders: Holders) {
    let db = TestDb::new().await;
    let pool = db.pool(3 * holders.count + 3).await;
    let mut tasks = JoinSet::new();
    for key in [OURS, BARE] {
        for number in 0..holders.count {
            let pool = match holders.kind {
                Kind::Session => db.pool(1).await,
                Kind::OneProcess | Kind::Transaction => pool.clone(),
            };
            holders.start(&mut tasks, pool, number, key);
        }
    }
    let admin = Mutex::new(db.admin().await);
    let all_want_it = async || {
        let locks = advisory_locks(&mut *admin.lock().await).await;
        locks.len() == 2 * usize::try_from(holders.count).unwrap()
    };
    eventually("all holders hold or wait", holders.hold * 4 + BESIDES * 10, all_want_it).await;

    let started = Instant::now();
    let mut plain = db.admin().await;
    let bare = spawn(async move {
        let wait = sqlx::query("SELECT pg_advisory_lock($1)").bind(BARE).execute(&mut plain);
        wait.await.unwrap();
        started.elapsed()
    });
    let ours = spawn(async move {
        acquire_once(holders.kind, &pool, OURS).await;
        started.elapsed()
    });
    let bare = bare.await.unwrap();
    let bound = bare * FACTOR + BESIDES;
    let ours =
        timeout(bound.saturating_sub(started.elapsed()), ours).await.ok().map(Result::unwrap);
    report(format_args!(
        "beside {holders:?}: served after {ours:?}, the bare function after {bare:?}"
    ));
    assert!(
        ours.is_some_and(|ours| ours < bound),
        "served after {ours:?}, not within {bound:?}, and the bare function after {bare:?}",
    );
    tasks.shutdown().await;
}

impl Holders {
    fn start(self, tasks: &mut JoinSet<()>, pool: PgPool, number: u32, key: i64) {
        tasks.spawn(async move {
            // Each reader's hold ends in the middle of the others' holds.
            if self.mode == Mode::Shared {
                sleep(self.hold * number / self.count).await;
            }
            match self.kind {
                Kind::Session | Kind::OneProcess => self.hold_sessions(&pool, key).await,
                Kind::Transaction => self.hold_transactions(&pool, key).await,
            }
        });
    }

    async fn hold_sessions(self, pool: &PgPool, key: i64) {
        let mut lock = Lock::new(pool, key);
        loop {
            match self.mode {
                Mode::Exclusive => {
                    let guard = lock.acquire().await.unwrap();
                    sleep(self.hold).await;
                    guard.release().await.unwrap();
                }
                Mode::Shared => {
                    let guard = lock.acquire_shared().await.unwrap();
                    sleep(self.hold).await;
                    guard.release().await.unwrap();
                }
            }
        }
    }

    async fn hold_transactions(self, pool: &PgPool, key: i64) {
        loop {
            let mut tx = pool.begin().await.unwrap();
            match self.mode {
                Mode::Exclusive => transaction::acquire(&mut tx, key).await.unwrap(),
                Mode::Shared => transaction::acquire_shared(&mut tx, key).await.unwrap(),
            }
            sleep(self.hold).await;
            tx.commit().await.unwrap();
        }
    }
}

/// Acquires exclusively, and releases at once.
async fn acquire_once(kind: Kind, pool: &PgPool, key: i64) {
    match kind {
        Kind::Session | Kind::OneProcess => drop(Lock::new(pool, key).acquire().await.unwrap()),
        Kind::Transaction => {
            let mut tx = pool.begin().await.unwrap();
            transaction::acquire(&mut tx, key).await.unwrap();
            tx.rollback().await.unwrap();
        }
    }
}
