//! The statements that are sent to the server: one to acquire, one to release, none to re-enter.

use std::time::Duration;

use pglock::{Election, Key, Lock, LockOptions, Mode, MultiLock, Semaphore};
use pglock_testkit::{Server, TestDb, eventually};
use tokio::time::sleep;

use crate::support::{prove_exclusion, slow_heartbeat, upgraded};

/// A server that logs every statement.
fn logging_server() -> Server {
    Server::options().setting("log_statement", "all").start()
}

/// The query whether a transaction was left open. It is sent if the server took long between two messages of a
/// statement, as a busy server does.
const IS_OPEN: &str = "statement: SELECT pg_catalog.now() OPERATOR(pg_catalog.<>)";

/// The statements that were logged since `mark`, without those of the test itself, and without [`IS_OPEN`].
fn statements(server: &Server, mark: usize) -> Vec<String> {
    let log = server.log_since(mark);
    let logged = log.lines().filter(|line| line.contains("statement:") || line.contains("execute"));
    logged.filter(|line| !line.contains(IS_OPEN)).map(str::to_owned).collect()
}

#[tokio::test]
async fn a_free_lock_costs_one_statement_to_acquire_and_one_to_release() {
    let server = logging_server();
    let db = TestDb::on(&server).await;
    prove_exclusion(&db).await;
    let pool = db.pool(1).await;
    let mut lock = Lock::new(&pool, "nightly-report");

    // The first round is on a fresh connection, the second on one that was used before.
    for round in ["fresh", "used"] {
        let mark = server.log_len();
        let guard = lock.acquire().await.unwrap();
        let acquired = statements(&server, mark);
        assert_eq!(acquired.len(), 1, "{round}: {acquired:#?}");

        let mark = server.log_len();
        guard.release().await.unwrap();
        let released = statements(&server, mark);
        assert_eq!(released.len(), 1, "{round}: {released:#?}");
        eventually("the pool has its connection back", Duration::from_secs(10), || async {
            pool.num_idle() == 1
        })
        .await;
    }
}

/// The query is sent only if the server was slow. If it were always sent, an acquire would need two statements.
#[tokio::test]
async fn whether_a_transaction_was_left_open_is_rarely_queried() {
    const ROUNDS: usize = 40;
    let server = logging_server();
    let db = TestDb::on(&server).await;
    prove_exclusion(&db).await;
    let mut lock = Lock::new(&db.pool(1).await, 1);
    let mark = server.log_len();
    for _ in 0..ROUNDS {
        lock.acquire().await.unwrap().release().await.unwrap();
    }
    let asked = server.log_since(mark).matches(IS_OPEN).count();
    assert!(asked <= ROUNDS / 2, "{asked} of {ROUNDS} acquires asked");
    assert_eq!(statements(&server, mark).len(), 2 * ROUNDS);
}

#[tokio::test]
async fn every_kind_of_first_acquire_costs_one_statement() {
    let server = logging_server();
    let db = TestDb::on(&server).await;
    prove_exclusion(&db).await;
    let pool = db.pool(1).await;
    let mut lock = Lock::new(&pool, (1, 2));
    let mark = server.log_len();

    lock.try_acquire().await.unwrap().unwrap().release().await.unwrap();
    let limit = Duration::from_secs(5);
    lock.try_acquire_for(limit).await.unwrap().unwrap().release().await.unwrap();
    lock.acquire_shared().await.unwrap().release().await.unwrap();
    lock.try_acquire_shared().await.unwrap().unwrap().release().await.unwrap();
    lock.try_acquire_shared_for(limit).await.unwrap().unwrap().release().await.unwrap();

    let sent = statements(&server, mark);
    assert_eq!(sent.len(), 10, "{sent:#?}");
}

#[tokio::test]
async fn stacking_and_unstacking_send_nothing() {
    let server = logging_server();
    let db = TestDb::on(&server).await;
    prove_exclusion(&db).await;
    let pool = slow_heartbeat().on(&db.pool(1).await).unwrap();
    let mut lock = Lock::new(&pool, 42);

    let first = lock.acquire().await.unwrap();
    let mark = server.log_len();
    let second = lock.acquire().await.unwrap();
    // The exclusive lock covers a shared guard.
    let shared = lock.try_acquire_shared().await.unwrap().unwrap();
    let third = lock.try_acquire_for(Duration::from_secs(1)).await.unwrap().unwrap();
    drop(first);
    third.release().await.unwrap();
    shared.release().await.unwrap();
    let sent = statements(&server, mark);
    assert_eq!(sent, Vec::<String>::new());

    second.release().await.unwrap();
    assert_eq!(statements(&server, mark).len(), 1);
}

#[tokio::test]
async fn a_downgrade_by_dropping_the_exclusive_guard_is_one_message() {
    let server = logging_server();
    let db = TestDb::on(&server).await;
    prove_exclusion(&db).await;
    let pool = slow_heartbeat().on(&db.pool(2).await).unwrap();
    let mut lock = Lock::new(&pool, 42);
    let exclusive = lock.acquire().await.unwrap();
    let shared = lock.acquire_shared().await.unwrap();

    let mark = server.log_len();
    exclusive.release().await.unwrap();
    assert_eq!(statements(&server, mark).len(), 1);

    // Now the lock is shared, so another reader is granted the lock, and a writer is not.
    let mut other = lock.clone();
    assert!(other.try_acquire().await.unwrap().is_none());
    other.try_acquire_shared().await.unwrap().unwrap().release().await.unwrap();
    shared.release().await.unwrap();
    other.try_acquire().await.unwrap().unwrap().release().await.unwrap();
}

#[tokio::test]
async fn a_downgrade_and_an_upgrade_cost_one_statement_or_none() {
    let server = logging_server();
    let db = TestDb::on(&server).await;
    prove_exclusion(&db).await;
    let pool = slow_heartbeat().on(&db.pool(1).await).unwrap();
    let mut lock = Lock::new(&pool, 42);
    let writing = lock.acquire().await.unwrap();

    let mark = server.log_len();
    let reading = writing.downgrade().await.unwrap();
    assert_eq!(statements(&server, mark).len(), 1);
    let mark = server.log_len();
    let writing = upgraded(reading.try_upgrade().await.unwrap());
    assert_eq!(statements(&server, mark).len(), 1);

    // Another guard of the handle holds the lock exclusively.
    let mark = server.log_len();
    let also_writing = lock.acquire().await.unwrap();
    let reading = writing.downgrade().await.unwrap();
    let writing = upgraded(reading.try_upgrade().await.unwrap());
    also_writing.release().await.unwrap();
    assert_eq!(statements(&server, mark), Vec::<String>::new());
    // By now, the lock is held in both modes, and one statement releases both.
    writing.release().await.unwrap();
    assert_eq!(statements(&server, mark).len(), 1);
}

#[tokio::test]
async fn several_free_locks_cost_one_statement_to_acquire_and_one_to_release() {
    let server = logging_server();
    let db = TestDb::on(&server).await;
    prove_exclusion(&db).await;
    let pool = slow_heartbeat().on(&db.pool(2).await).unwrap();
    let keys = (0..200).map(|key| match key % 3 {
        0 => (Key::from(key), Mode::Shared),
        1 => (Key::from((key, key)), Mode::Exclusive),
        _ => (Key::from(key), Mode::Exclusive),
    });
    let mut locks = MultiLock::with_modes(&pool, keys);
    for round in ["fresh", "used"] {
        let mark = server.log_len();
        let guard = locks.acquire().await.unwrap();
        let acquired = statements(&server, mark);
        assert_eq!(acquired.len(), 1, "{round}: {acquired:#?}");
        let mark = server.log_len();
        let stacked = locks.acquire().await.unwrap();
        guard.release().await.unwrap();
        assert_eq!(statements(&server, mark), Vec::<String>::new());
        stacked.release().await.unwrap();
        assert_eq!(statements(&server, mark).len(), 1);
    }

    // The acquire is refused at the last of many locks: one statement tries them, and one releases the granted locks.
    let mut many = MultiLock::new(&pool, 10_000..14_000);
    let busy = Lock::new(&pool, 13_999).acquire().await.unwrap();
    for _ in 0..2 {
        let mark = server.log_len();
        assert!(many.try_acquire().await.unwrap().is_none());
        let refused = statements(&server, mark);
        assert!(refused.len() <= 3, "{} statements", refused.len());
    }
    busy.release().await.unwrap();

    // The acquire is refused half-way: one statement tries the locks, and one releases the granted locks.
    let busy = Lock::new(&pool, 198).acquire().await.unwrap();
    let mark = server.log_len();
    assert!(locks.try_acquire().await.unwrap().is_none());
    let refused = statements(&server, mark);
    assert_eq!(refused.len(), 2, "{refused:#?}");
    busy.release().await.unwrap();
}

#[tokio::test]
async fn a_free_permit_costs_three_statements_to_acquire_and_one_to_release() {
    let server = logging_server();
    let db = TestDb::on(&server).await;
    prove_exclusion(&db).await;
    let pool = db.pool(1).await;
    for permits in [1, 1024] {
        let semaphore = Semaphore::new(&pool, "printers", permits).unwrap();
        let mark = server.log_len();
        let permit = semaphore.acquire().await.unwrap();
        permit.release().await.unwrap();
        let mut sent = statements(&server, mark);
        // Every ten seconds, the semaphore checks for a larger one of its key.
        sent.retain(|statement| !statement.contains("pg_lock_status"));
        assert_eq!(sent.len(), 4, "{sent:#?}");
    }
}

#[tokio::test]
async fn making_handles_and_options_sends_nothing() {
    let server = logging_server();
    let db = TestDb::on(&server).await;
    prove_exclusion(&db).await;
    let pool = db.pool(2).await;
    let mark = server.log_len();

    let lock = Lock::new(&pool, "nightly-report");
    let clone = lock.clone();
    let mut third = Lock::new(&LockOptions::new().on(&pool).unwrap(), lock.key());
    third.release_all().await.unwrap();
    let mut several = MultiLock::new(&pool, [1, 2]);
    several.release_all().await.unwrap();
    let semaphore = Semaphore::new(&pool, "printers", 3).unwrap();
    drop((lock, clone, third, several, semaphore));

    // After this acquire and release, a background task has sent all its statements.
    Lock::new(&pool, 42).acquire().await.unwrap().release().await.unwrap();
    let sent = statements(&server, mark);
    assert_eq!(sent.len(), 2, "{sent:#?}");
}

/// A statement that is prepared for one use takes two round trips.
#[tokio::test]
async fn a_campaign_takes_three_round_trips() {
    let server = logging_server();
    let db = TestDb::on(&server).await;
    prove_exclusion(&db).await;
    let mut election = Election::new(&db.pool(1).await, "billing");
    let mark = server.log_len();
    let leadership = election.campaign().await.unwrap();
    let sent = statements(&server, mark);
    assert_eq!(sent.len(), 3, "{sent:#?}");
    assert!(sent.iter().all(|line| !line.contains("<unnamed>")), "{sent:#?}");
    leadership.resign().await.unwrap();
}

#[tokio::test]
async fn a_borrow_costs_three_statements() {
    let server = logging_server();
    let db = TestDb::on(&server).await;
    prove_exclusion(&db).await;
    let pool_of_one = db.pool(1).await;
    let pool = slow_heartbeat().on(&pool_of_one).unwrap();
    let guard = Lock::new(&pool, "ledger").acquire().await.unwrap();
    let mark = server.log_len();
    let connection = guard.connection().await.unwrap();
    // The question whether a transaction was left open is a part of it.
    assert_eq!(server.log_since(mark).matches("statement:").count(), 1);
    let mark = server.log_len();
    drop(connection);
    guard.release().await.unwrap();
    drop(pool_of_one.acquire().await.unwrap());
    // One asks whether a transaction is open, one releases, and one restores the settings.
    let log = server.log_since(mark);
    let count = |kind| log.matches(kind).count();
    assert_eq!((count("statement:"), count("execute sqlx")), (2, 1), "{log}");
}

#[tokio::test]
async fn a_session_younger_than_two_seconds_costs_nothing_extra() {
    let server = logging_server();
    let db = TestDb::on(&server).await;
    prove_exclusion(&db).await;
    let pool = LockOptions::new().reserve_connections(0).on(&db.pool(5).await).unwrap();
    let mut guards = Vec::new();
    for key in 0..5 {
        guards.push(Lock::new(&pool, key).acquire().await.unwrap());
    }
    let mut admin = db.admin().await;
    let sessions = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()";
    let before: i64 = sqlx::query_scalar(sessions).fetch_one(&mut admin).await.unwrap();
    let mark = server.log_len();
    sleep(Duration::from_secs(1)).await;
    assert_eq!(statements(&server, mark), Vec::<String>::new());
    let after: i64 = sqlx::query_scalar(sessions).fetch_one(&mut admin).await.unwrap();
    assert_eq!(after, before);
    for guard in guards {
        guard.release().await.unwrap();
    }
}
