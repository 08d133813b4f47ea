//! Runs every statement with a schema in the search path that overrides whatever is looked up by name.

use std::time::Duration;

use pglock_testkit::{HIJACKED, Server, TestDb, hostile_schema};
use sqlx::{AssertSqlSafe, PgConnection};

use super::batch::{Call, call_all};
use super::transaction::Tried;
use super::{doctor, election, inspect, semaphore, transaction};
use crate::key::KeyId;
use crate::mode::Mode;

const KEYS: [KeyId; 4] = [
    KeyId::BigInt(i64::MIN),
    KeyId::BigInt(7),
    KeyId::IntPair(i32::MIN, -1),
    KeyId::IntPair(7, i32::MAX),
];

async fn execute(conn: &mut PgConnection, statement: &str) {
    sqlx::raw_sql(AssertSqlSafe(statement)).execute(conn).await.unwrap();
}

#[tokio::test]
async fn no_statement_uses_a_hostile_function() {
    let server = Server::start();
    let db = TestDb::on(&server).await;
    hostile_schema(&mut db.admin().await, "evil").await;
    for path in ["evil, pg_catalog", "pg_catalog, evil", "evil"] {
        let (mut one, mut two) = (db.admin().await, db.admin().await);
        let set = format!("SET search_path = {path}");
        execute(&mut one, &set).await;
        execute(&mut two, &set).await;
        batches(&mut one).await;
        observers(&mut one, &mut two).await;
        transactions(&mut one, &mut two).await;
    }
    assert!(!server.log().contains(HIJACKED), "{}", server.log());
}

/// The schema does override what is looked up by name, both in front of `pg_catalog` and behind it.
#[tokio::test]
async fn a_statement_that_looks_up_names_uses_a_hostile_function() {
    let db = TestDb::new().await;
    let mut conn = db.admin().await;
    hostile_schema(&mut conn, "evil").await;
    for (path, statement) in [
        ("evil, pg_catalog", "SELECT pg_backend_pid()"),
        ("evil, pg_catalog", "SELECT pg_try_advisory_lock(7::bigint)"),
        ("evil, pg_catalog", "SELECT count(*) FROM pg_lock_status()"),
        ("evil, pg_catalog", "SELECT 1 = 1"),
        ("evil, pg_catalog", "SELECT CASE 1 WHEN 1 THEN 2 END"),
        ("evil, pg_catalog", "SELECT '1'::int8"),
        ("evil, pg_catalog", "SELECT pid FROM pg_locks"),
        ("pg_catalog, evil", "SELECT 1::oid = 1"),
    ] {
        execute(&mut conn, &format!("SET search_path = {path}")).await;
        let taken_over = sqlx::raw_sql(statement).execute(&mut conn).await;
        assert!(taken_over.is_err(), "{path}: {statement}");
    }
}

async fn batches(conn: &mut PgConnection) {
    use Mode::{Exclusive, Shared};
    for key in KEYS {
        for mode in [Exclusive, Shared] {
            for call in [Call::TryLock(mode), Call::Unlock(mode)] {
                assert_eq!(call_all(conn, &[(key, call)]).await.unwrap().answers, [true]);
            }
        }
        let calls = [
            Call::TryLock(Exclusive),
            Call::LockShared,
            Call::Unlock(Exclusive),
            Call::TryLock(Shared),
            Call::IsWaitedFor,
            Call::Unlock(Shared),
            Call::Unlock(Shared),
        ];
        let calls = calls.map(|call| (key, call));
        let answers = call_all(conn, &calls).await.unwrap().answers;
        assert_eq!(answers, [true, true, true, true, false, true, true], "{key:?}");
    }
}

async fn observers(conn: &mut PgConnection, other: &mut PgConnection) {
    for key in KEYS {
        let lock = [(key, Call::TryLock(Mode::Exclusive))];
        let pid = call_all(conn, &lock).await.unwrap().backend_pid;
        let holder = election::holder(other, key).await.unwrap().unwrap();
        assert_eq!(holder.backend_pid, pid);
        for of in [None, Some(key)] {
            let rows = inspect::locks(&mut *other, of).await.unwrap();
            let [row] = rows.as_slice() else { panic!("one lock, not {rows:?}") };
            assert_eq!((row.key, row.backend_pid), (key, Some(pid)));
            let started = row.backend_start.unwrap();
            assert!(!inspect::terminate(&mut *other, pid, started - 1).await.unwrap());
        }
        call_all(conn, &[(key, Call::Unlock(Mode::Exclusive))]).await.unwrap();
    }
    for base in [77_i64 << 10, -77 << 10, i64::MIN] {
        let permit = KeyId::BigInt(base + 3);
        call_all(conn, &[(permit, Call::TryLock(Mode::Exclusive))]).await.unwrap();
        for (first, found) in [(0, Some(base + 3)), (3, Some(base + 3)), (4, None)] {
            let beyond = base + first..=base + 1023;
            assert_eq!(semaphore::greatest_held(other, beyond).await.unwrap(), found);
        }
        call_all(conn, &[(permit, Call::Unlock(Mode::Exclusive))]).await.unwrap();
    }

    let seen = doctor::circumstances(other).await.unwrap();
    assert_eq!((seen.forbidden, seen.plpgsql), (Ok(None), Ok(true)));
    assert!(seen.rights.unwrap().ends_all);
    assert!(seen.locks.unwrap() >= 0);
    assert!(seen.connections.unwrap().all >= 2);
}

async fn transactions(holder: &mut PgConnection, conn: &mut PgConnection) {
    const LIMIT: Duration = Duration::from_millis(20);

    execute(holder, "BEGIN").await;
    for key in KEYS {
        let granted = transaction::try_lock(holder, key, Mode::Exclusive).await.unwrap();
        assert_eq!(granted, Tried::Granted);
        for mode in [Mode::Exclusive, Mode::Shared] {
            execute(conn, "BEGIN").await;
            let busy = transaction::try_lock(conn, key, mode).await.unwrap();
            assert_eq!(busy, Tried::Busy { deadlock_timeout: Duration::from_secs(1) });
            for mut plainly in [false, true] {
                assert!(!transaction::wait(conn, key, mode, LIMIT, &mut plainly).await.unwrap());
                let free = match key {
                    KeyId::BigInt(number) => KeyId::BigInt(number + 1),
                    KeyId::IntPair(first, second) => KeyId::IntPair(first + 1, second),
                };
                let expected = plainly;
                assert!(transaction::wait(conn, free, mode, LIMIT, &mut plainly).await.unwrap());
                assert_eq!(plainly, expected);
            }
            execute(conn, "ROLLBACK").await;
        }
    }
    execute(holder, "ROLLBACK").await;
}
