//! Hostile names and hostile schemas: neither becomes a part of a statement.

use std::time::Duration;

use pglock::{
    Election, Key, Lock, LockOptions, MultiLock, Semaphore, Source, inspect, interop, transaction,
};
use pglock_testkit::{HIJACKED, Server, TestDb, hostile_schema};
use sqlx::PgPool;
use sqlx::postgres::PgPoolOptions;
use tokio::time::timeout;

use crate::support::{TIMEOUT, slow_heartbeat, upgraded, waits_in_vain};

/// The timeout of a wait that is meant to time out in the server's queue.
const MOMENT: Duration = Duration::from_millis(500);

/// Each name would leave a trace in a statement that contained it, or break the statement.
const NAMES: [&str; 9] = [
    "'; DROP TABLE canary; --",
    "')); DROP TABLE canary; --",
    "$$; DROP TABLE canary; --",
    "END $$; DROP TABLE canary; DO $$ BEGIN",
    "\\'; DROP TABLE canary; --",
    "\"; DROP TABLE canary; /*",
    "canary\0'\n\r\t; DROP TABLE canary",
    "canary {} {0} %s %1$s $1 ? :canary",
    "canary \u{2019}; \u{202e}\u{0}\u{10ffff}",
];

/// Every function that takes a name gets every name, with a free lock, with a busy lock, and with a cancelled wait.
#[tokio::test]
async fn no_name_gets_into_a_statement() {
    let server = Server::options().setting("log_statement", "all").start();
    let db = TestDb::on(&server).await;
    let pool = db.pool(30).await;
    sqlx::raw_sql("CREATE TABLE canary (alive int)").execute(&pool).await.unwrap();

    let mark = server.log_len();
    let longest = "canary'".repeat(100_000);
    for name in NAMES.into_iter().chain([longest.as_str()]) {
        // On a busy machine, a name of 700 kB blocks the runtime for longer than the default heartbeat allows.
        let options = if name == longest { slow_heartbeat() } else { LockOptions::new() };
        let plain = options.clone().on(&pool).unwrap();
        let shown = options.application_name(name).on(&pool).unwrap();
        let of_election = format!("{name}, of an election");
        let of_transactions = format!("{name}, of a transaction");
        tokio::join!(
            locks(&plain, Key::from(name)),
            locks(&plain, interop::fnv1a(name)),
            locks(&shown, Key::from(format!("{name}, shown"))),
            semaphores(&pool, name),
            elections(&pool, &of_election),
            transactions(&pool, &of_transactions),
        );
    }
    let several = || MultiLock::new(&pool, NAMES.into_iter().chain(["canary"]));
    let guard = several().acquire().await.unwrap();
    waits_in_vain(MOMENT, async |time| several().try_acquire_for(time).await).await;
    guard.verify().await.unwrap();
    guard.release().await.unwrap();
    let log = server.log_since(mark);

    let named: Vec<&str> = log.lines().filter(|line| line.contains("canary")).collect();
    assert!(log.contains("pg_try_advisory_lock"), "the log has no statements: {log}");
    assert!(named.is_empty(), "{named:#?}");
    sqlx::raw_sql("SELECT alive FROM canary").execute(&pool).await.unwrap();
}

async fn locks(source: &(impl Source + Sync), key: Key) {
    let mut lock = Lock::new(source, &key);
    let mut other = lock.clone();
    let guard = lock.acquire().await.unwrap();
    assert!(other.try_acquire().await.unwrap().is_none());
    waits_in_vain(MOMENT, async |time| other.try_acquire_for(time).await).await;
    assert!(other.try_acquire_shared().await.unwrap().is_none());
    waits_in_vain(MOMENT, async |time| other.try_acquire_shared_for(time).await).await;
    assert!(timeout(MOMENT, other.acquire()).await.is_err());
    guard.verify().await.unwrap();
    guard.fencing_token().await.unwrap();
    drop(guard.connection().await.unwrap());
    let shared = guard.downgrade().await.unwrap();
    let also = timeout(TIMEOUT, other.acquire_shared()).await.unwrap().unwrap();
    also.release().await.unwrap();
    let guard = upgraded(shared.try_upgrade().await.unwrap());
    drop(Lock::new(&guard, format!("{key} on the same session")).acquire().await.unwrap());
    guard.release().await.unwrap();
}

async fn semaphores(pool: &PgPool, name: &str) {
    let semaphore = Semaphore::new(pool, name, 1).unwrap();
    let permit = semaphore.acquire().await.unwrap();
    assert!(semaphore.try_acquire().await.unwrap().is_none());
    waits_in_vain(MOMENT, async |time| semaphore.try_acquire_for(time).await).await;
    permit.release().await.unwrap();
}

async fn elections(pool: &PgPool, name: &str) {
    let mut election = Election::new(pool, name).candidate(name);
    let leadership = election.campaign().await.unwrap();
    let leader = election.leader().await.unwrap().unwrap();
    assert_eq!(leader.term, Some(leadership.term()));
    let start = name.split(|c| !matches!(c, ' '..='~')).next().unwrap();
    let start = start.get(..start.len().min(30)).unwrap();
    assert!(leader.name.starts_with(start), "{:?} is not {name:?}", leader.name);
    leadership.resign().await.unwrap();
}

async fn transactions(pool: &PgPool, name: &str) {
    let mut tx = pool.begin().await.unwrap();
    let mut other = pool.begin().await.unwrap();
    transaction::acquire_shared(&mut tx, name).await.unwrap();
    transaction::acquire(&mut tx, name).await.unwrap();
    assert!(!transaction::try_acquire(&mut other, name).await.unwrap());
    assert!(!transaction::try_acquire_for(&mut other, name, MOMENT).await.unwrap());
    assert!(!transaction::try_acquire_shared(&mut other, name).await.unwrap());
    assert!(!transaction::try_acquire_shared_for(&mut other, name, MOMENT).await.unwrap());
    tx.commit().await.unwrap();
    other.rollback().await.unwrap();
}

/// Pools whose search path has a schema that shadows all functions and operators without a qualified name.
async fn hostile_pools(db: &TestDb) -> Vec<PgPool> {
    hostile_schema(&mut db.admin().await, "evil").await;
    ["evil,pg_catalog", "pg_catalog,evil"]
        .map(|path| {
            let options = db.options().options([("search_path", path)]);
            PgPoolOptions::new().max_connections(8).connect_lazy_with(options)
        })
        .into()
}

/// PostgreSQL prefers an exact overload from any schema of the search path (CVE-2018-1058).
#[tokio::test]
async fn no_schema_takes_over_a_statement_of_a_transaction_or_an_inspection() {
    let (server, db) = TestDb::with_server().await;
    for pool in hostile_pools(&db).await {
        transactions(&pool, "ledger").await;
        let mut tx = pool.begin().await.unwrap();
        transaction::acquire(&mut tx, "ledger").await.unwrap();
        assert_eq!(inspect::locks(&pool).await.unwrap().len(), 1);
        let locks = inspect::locks_of(&pool, "ledger").await.unwrap();
        let session = locks.first().unwrap().session.as_ref().unwrap();
        assert!(inspect::terminate(&pool, session).await.unwrap());
    }
    assert!(!server.log().contains(HIJACKED), "{}", server.log());
}

#[tokio::test]
async fn no_schema_takes_over_a_statement_of_a_lock() {
    let (server, db) = TestDb::with_server().await;
    for pool in hostile_pools(&db).await {
        locks(&pool, Key::from("ledger")).await;
        let named = LockOptions::new().application_name("billing").on(&pool).unwrap();
        locks(&named, Key::from("ledger")).await;
        locks(&pool, Key::from((7, -7))).await;
        semaphores(&pool, "ledger").await;
        elections(&pool, "ledger").await;
    }
    assert!(!server.log().contains(HIJACKED), "{}", server.log());
}

/// Where a key is logged, a name with a line break can't forge a line of its own.
#[test]
fn a_key_prints_on_one_line() {
    for name in NAMES {
        let printed = Key::from(name).to_string();
        assert!(printed.starts_with(&format!("{name:?} (")), "{printed:?}");
        assert!(!printed.contains(char::is_control), "{printed:?}");
        assert!(!printed.contains('\u{202e}'), "{printed:?}");
        assert_eq!(format!("{:?}", Key::from(name)), format!("Key({printed})"));
    }
}
