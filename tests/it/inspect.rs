//! `inspect` shows the locks of a server, and ends only the session that was shown.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use pglock::inspect::{self, LockInfo, Session};
use pglock::{Election, Error, Key, Lock, Loss, Mode, Semaphore, interop, transaction};
use pglock_testkit::{Server, TestDb, eventually};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, PgConnection, PgPool};
use tokio::time::timeout;

use crate::support::{SOON, TIMEOUT, has_waiter, locks_are, no_locks, prove_exclusion, spawn};

async fn run(conn: &mut PgConnection, statement: &str) {
    sqlx::raw_sql(AssertSqlSafe(statement)).execute(conn).await.unwrap();
}

async fn pid(conn: &mut PgConnection) -> i32 {
    sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(conn).await.unwrap()
}

/// The only lock of the database.
async fn only(pool: &PgPool) -> LockInfo {
    let mut locks = inspect::locks(pool).await.unwrap();
    assert_eq!(locks.len(), 1, "{locks:#?}");
    locks.remove(0)
}

fn first(locks: &[LockInfo]) -> &LockInfo {
    locks.first().unwrap()
}

fn session(lock: &LockInfo) -> &Session {
    lock.session.as_ref().unwrap()
}

fn pids(locks: &[LockInfo]) -> Vec<i32> {
    locks.iter().map(|lock| session(lock).backend_pid).collect()
}

fn sqlstate(error: &Error) -> Option<String> {
    let source = std::error::Error::source(error)?.downcast_ref::<Arc<sqlx::Error>>()?;
    Some(source.as_database_error()?.code()?.into_owned())
}

#[tokio::test]
async fn every_number_is_shown_as_its_key() {
    let (db, pool) = TestDb::with_pool(2).await;
    prove_exclusion(&db).await;
    let mut other = db.admin().await;
    let numbers = [i64::MIN, i64::MIN + 1, -1, 0, 1, 0x1_0000_002a, i64::MAX].map(Key::from);
    let halves = [i32::MIN, -1, 0, 42, i32::MAX];
    let pairs = halves.iter().flat_map(|&first| halves.map(|second| Key::from((first, second))));
    for key in numbers.into_iter().chain(pairs) {
        let guard = Lock::new(&pool, &key).acquire().await.unwrap();
        let locks = inspect::locks(&mut other).await.unwrap();
        assert_eq!(locks.iter().map(|lock| &lock.key).collect::<Vec<_>>(), [&key]);
        assert_eq!(pids(&locks), [guard.backend_pid()]);
        assert_eq!(inspect::locks_of(&mut other, &key).await.unwrap().len(), 1, "{key}");
        guard.release().await.unwrap();
        assert_eq!(inspect::locks_of(&mut other, &key).await.unwrap(), []);
    }
}

/// All holders and waiters are shown, in whatever way they lock, with the sessions that they wait for.
#[tokio::test]
async fn holders_and_waiters_of_all_programs_are_shown() {
    let (db, pool, mut admin) = TestDb::scene(3).await;
    prove_exclusion(&db).await;
    let options = db.options().application_name("psql");
    let mut sql = options.connect().await.unwrap();
    run(&mut sql, "BEGIN; SELECT pg_advisory_xact_lock_shared(42)").await;
    let holder = pid(&mut sql).await;

    let mut writer = Lock::new(&pool, 42);
    // The reader is on another pool, because of one pool, only one call waits on the server.
    let mut reader = Lock::new(&db.pool(1).await, 42);
    let writer = spawn(async move { writer.acquire().await.unwrap() });
    locks_are(&mut admin, 2, TIMEOUT).await;
    let reader = spawn(async move { reader.acquire_shared().await.unwrap() });
    locks_are(&mut admin, 3, TIMEOUT).await;

    let locks = inspect::locks(&pool).await.unwrap();
    let [held, exclusive, shared] = locks.as_slice() else { panic!("{locks:#?}") };
    assert!(held.held && !exclusive.held && !shared.held);
    assert_eq!(
        [held.mode, exclusive.mode, shared.mode],
        [Mode::Shared, Mode::Exclusive, Mode::Shared]
    );
    // A waiter is also blocked by the waiters ahead of it.
    assert!(held.blocked_by.is_empty());
    assert_eq!(exclusive.blocked_by, [holder]);
    assert_eq!(shared.blocked_by, [session(exclusive).backend_pid]);

    let seen = session(held);
    assert_eq!(seen.backend_pid, holder);
    assert_eq!(seen.application_name.as_deref(), Some("psql"));
    assert_eq!(seen.state.as_deref(), Some("idle in transaction"));
    assert!(seen.user.as_ref().is_some_and(|user| !user.is_empty()));
    let (started, began) = (seen.started_at.unwrap(), seen.transaction_since.unwrap());
    assert!(started <= began && began <= held.seen_at);
    assert!(seen.query_since.unwrap() <= seen.state_since.unwrap());
    assert!(held.ago(started) >= held.ago(began) && held.ago(started) < TIMEOUT);
    assert_eq!(held.waiting_since, None);
    assert_eq!(held.leader, None);

    let version: i32 = sqlx::query_scalar("SELECT current_setting('server_version_num')::int")
        .fetch_one(&mut admin)
        .await
        .unwrap();
    for waiter in [exclusive, shared] {
        assert_eq!(session(waiter).state.as_deref(), Some("active"));
        match waiter.waiting_since {
            Some(since) if version >= 140_000 => assert!(since <= waiter.seen_at),
            None if version < 140_000 => {}
            other => panic!("{other:?} on {version}"),
        }
    }

    run(&mut sql, "COMMIT").await;
    let writer = timeout(TIMEOUT, writer).await.unwrap().unwrap();
    let locks = inspect::locks(&pool).await.unwrap();
    assert_eq!((first(&locks).held, session(first(&locks)).transaction_since), (true, None));
    drop(writer);
    drop(timeout(TIMEOUT, reader).await.unwrap().unwrap());
    no_locks(&mut admin).await;
}

/// A session that holds one lock and waits for another is shown as blocked only for the other lock.
#[tokio::test]
async fn a_holder_is_not_blocked() {
    let (db, pool, mut admin) = TestDb::scene(1).await;
    prove_exclusion(&db).await;
    let guard = Lock::new(&pool, 2).acquire().await.unwrap();
    let mut sql = db.admin().await;
    run(&mut sql, "SELECT pg_advisory_lock(1)").await;
    let waiter = spawn(async move { run(&mut sql, "SELECT pg_advisory_lock(2)").await });
    locks_are(&mut admin, 3, TIMEOUT).await;
    let held = inspect::locks_of(&mut admin, 1).await.unwrap();
    assert!(first(&held).held && first(&held).blocked_by.is_empty(), "{held:#?}");
    let waiting = inspect::locks_of(&mut admin, 2).await.unwrap();
    assert_eq!(waiting.last().unwrap().blocked_by, [guard.backend_pid()]);
    guard.release().await.unwrap();
    timeout(TIMEOUT, waiter).await.unwrap().unwrap();
}

#[tokio::test]
async fn over_tcp_the_address_is_shown() {
    let server = Server::options().tcp().start();
    let db = TestDb::on(&server).await;
    let mut far = server.tcp_options().database(db.name()).connect().await.unwrap();
    run(&mut far, "SELECT pg_advisory_lock(1)").await;
    let pool = db.pool(1).await;
    assert_eq!(session(&only(&pool).await).client_addr.as_deref(), Some("127.0.0.1"));
    run(&mut far, "SELECT pg_advisory_unlock(1)").await;
    let guard = Lock::new(&pool, 1).acquire().await.unwrap();
    let mut near = db.admin().await;
    let locks = inspect::locks(&mut near).await.unwrap();
    assert_eq!(session(first(&locks)).client_addr, None);
    guard.release().await.unwrap();
}

#[tokio::test]
async fn equal_keys_in_other_databases_are_not_shown() {
    let (one, two) = (TestDb::new().await, TestDb::new().await);
    prove_exclusion(&one).await;
    prove_exclusion(&two).await;
    let (one, two) = (one.pool(2).await, two.pool(2).await);
    let first = Lock::new(&one, 42).acquire().await.unwrap();
    let second = Lock::new(&two, 42).acquire().await.unwrap();
    assert_eq!(pids(&inspect::locks(&one).await.unwrap()), [first.backend_pid()]);
    assert_eq!(pids(&inspect::locks_of(&two, 42).await.unwrap()), [second.backend_pid()]);
}

#[tokio::test]
async fn one_key_is_that_key_alone() {
    let (db, pool) = TestDb::with_pool(4).await;
    prove_exclusion(&db).await;
    let _pair = Lock::new(&pool, (0, 42)).acquire().await.unwrap();
    let _other = Lock::new(&pool, 0x1_0000_002a_i64).acquire().await.unwrap();
    assert_eq!(inspect::locks_of(&pool, 42).await.unwrap(), []);
    let guard = Lock::new(&pool, 42).acquire().await.unwrap();
    assert_eq!(pids(&inspect::locks_of(&pool, 42).await.unwrap()), [guard.backend_pid()]);
    assert_eq!(inspect::locks(&pool).await.unwrap().len(), 3);
}

#[tokio::test]
async fn names_can_be_given() {
    let (db, pool) = TestDb::with_pool(6).await;
    prove_exclusion(&db).await;
    let printers = Semaphore::new(&pool, "printers", 2).unwrap();
    let _guards = (
        Lock::new(&pool, "nightly-report").acquire().await.unwrap(),
        Lock::new(&pool, interop::fnv1a("foobar")).acquire().await.unwrap(),
        Lock::new(&pool, "unknown").acquire().await.unwrap(),
        printers.acquire().await.unwrap(),
        printers.acquire().await.unwrap(),
    );
    let named = async |keys: &[Key]| {
        let mut locks = inspect::locks(&pool).await.unwrap();
        assert!(locks.iter().all(|lock| lock.key.name().is_none()));
        inspect::name_keys(&mut locks, keys);
        let mut names: Vec<_> =
            locks.iter().filter_map(|lock| lock.key.name().map(str::to_owned)).collect();
        names.sort();
        names
    };
    assert_eq!(named(&["foobar".into()]).await, Vec::<String>::new());
    let keys = [Key::from("nightly-report"), interop::fnv1a("foobar"), Key::from("printers")];
    assert_eq!(
        named(&keys).await,
        ["foobar", "nightly-report", "printers, permit 0", "printers, permit 1"]
    );
    let locks = inspect::locks_of(&pool, "nightly-report").await.unwrap();
    assert_eq!(first(&locks).key.name(), Some("nightly-report"));
}

/// Of two names with the same CRC-32, the first one that was given is kept.
#[tokio::test]
async fn a_key_keeps_its_name() {
    let (db, pool) = TestDb::with_pool(2).await;
    prove_exclusion(&db).await;
    let [plumless, buckeroo] = ["plumless", "buckeroo"].map(interop::django_pglocks_v1);
    assert_eq!(plumless, buckeroo);
    let _guard = Lock::new(&pool, &plumless).acquire().await.unwrap();
    let mut locks = inspect::locks(&pool).await.unwrap();
    inspect::name_keys(&mut locks, [&buckeroo, &plumless]);
    assert_eq!(first(&locks).key.name(), Some("buckeroo"));
}

#[tokio::test]
async fn the_queue_of_a_semaphore_has_a_name() {
    let (db, pool) = TestDb::with_pool(4).await;
    prove_exclusion(&db).await;
    let semaphore = Semaphore::new(&pool, 7, 1).unwrap();
    let permit = semaphore.acquire().await.unwrap();
    let waiter = semaphore.clone();
    let waiter = spawn(async move { waiter.acquire().await.unwrap() });
    eventually("the queue shows", TIMEOUT, || async {
        let mut locks = inspect::locks(&pool).await.unwrap();
        inspect::name_keys(&mut locks, [7]);
        let names: Vec<_> = locks.iter().filter_map(|lock| lock.key.name()).collect();
        names.contains(&"7, queue of the semaphore") && names.contains(&"7, permit 0")
    })
    .await;
    permit.release().await.unwrap();
    drop(timeout(TIMEOUT, waiter).await.unwrap().unwrap());
}

#[tokio::test]
async fn a_leader_shows_its_name_and_term() {
    let (db, pool) = TestDb::with_pool(3).await;
    prove_exclusion(&db).await;
    let mut election = Election::new(&pool, "billing").candidate("node-7");
    let leadership = election.campaign().await.unwrap();
    let lock = only(&pool).await;
    let leader = lock.leader.unwrap();
    assert_eq!((leader.name.as_str(), leader.term), ("node-7", Some(leadership.term())));
    assert!(leader.since.unwrap() <= SystemTime::now());
    leadership.resign().await.unwrap();

    // This application name only resembles the one of a leader.
    let mut other = db.options().application_name("node 7@x").connect().await.unwrap();
    run(&mut other, "SELECT pg_advisory_lock(1)").await;
    let lock = only(&pool).await;
    assert_eq!(lock.leader, None);
    assert_eq!(session(&lock).application_name.as_deref(), Some("node 7@x"));
    // A session with a leader's name is not shown as the leader of a lock that it only shares.
    run(&mut other, "SELECT pg_advisory_unlock(1), pg_advisory_lock_shared(1)").await;
    run(&mut other, "SET application_name = 'node-7 5@1764000000'").await;
    assert_eq!(only(&pool).await.leader, None);
}

/// The functions accept every executor of sqlx, on any thread.
#[tokio::test]
async fn it_runs_on_whatever_runs_a_query() {
    let (db, pool) = TestDb::with_pool(3).await;
    prove_exclusion(&db).await;
    let guard = Lock::new(&pool, 1).acquire().await.unwrap();
    let look = spawn(async move {
        let mut seen = Vec::new();
        let mut conn = pool.acquire().await.unwrap();
        seen.push(pids(&inspect::locks(&pool).await.unwrap()));
        seen.push(pids(&inspect::locks(&mut *conn).await.unwrap()));
        let mut tx = conn.begin().await.unwrap();
        seen.push(pids(&inspect::locks_of(&mut *tx, 1).await.unwrap()));
        tx.rollback().await.unwrap();
        let session = session(first(&inspect::locks(&mut *conn).await.unwrap())).clone();
        assert!(inspect::terminate(&mut *conn, &session).await.unwrap());
        seen
    });
    assert_eq!(look.await.unwrap(), vec![vec![guard.backend_pid()]; 3]);
}

/// The session is identified by its process id and its start time.
#[tokio::test]
async fn only_the_session_that_was_shown_is_ended() {
    let (db, pool, mut admin) = TestDb::scene(2).await;
    prove_exclusion(&db).await;
    let mut lock = Lock::new(&pool, 1);
    let guard = lock.acquire().await.unwrap();
    let shown = session(&only(&pool).await).clone();

    // The process id is in use again, by a session that was started a microsecond later.
    let mut another = shown.clone();
    another.started_at = shown.started_at.map(|time| time + Duration::from_micros(1));
    assert!(!inspect::terminate(&pool, &another).await.unwrap());
    // Another process was started at the same time.
    let mut another = shown.clone();
    another.backend_pid = pid(&mut admin).await;
    assert!(!inspect::terminate(&pool, &another).await.unwrap());
    // The start time of the session is unknown.
    let mut another = shown.clone();
    another.started_at = None;
    assert!(!inspect::terminate(&pool, &another).await.unwrap());
    guard.verify().await.unwrap();

    assert!(inspect::terminate(&pool, &shown).await.unwrap());
    let loss = timeout(SOON * 5, guard.lost()).await.unwrap();
    assert!(matches!(loss, Loss::Disconnected(_)), "{loss:?}");
    assert!(matches!(guard.release().await, Err(Error::Lost { .. })));
    no_locks(&mut admin).await;
    let guard = lock.acquire().await.unwrap();
    assert!(!inspect::terminate(&pool, &shown).await.unwrap());
    guard.verify().await.unwrap();
}

/// The server shows a transaction the sessions as they were when the transaction first queried them.
#[tokio::test]
async fn a_transaction_that_has_looked_before_sees_what_is() {
    let (db, pool, mut admin) = TestDb::scene(3).await;
    prove_exclusion(&db).await;
    let mut tx = admin.begin().await.unwrap();
    let look = "SELECT count(*) FROM pg_stat_activity";
    let before: i64 = sqlx::query_scalar(look).fetch_one(&mut *tx).await.unwrap();

    let mut newcomer = db.options().application_name("newcomer").connect().await.unwrap();
    run(&mut newcomer, "SELECT pg_advisory_lock(1)").await;
    let after: i64 = sqlx::query_scalar(look).fetch_one(&mut *tx).await.unwrap();
    assert_eq!(before, after, "the server has no snapshot any more");
    let locks = inspect::locks(&mut *tx).await.unwrap();
    assert_eq!(session(first(&locks)).application_name.as_deref(), Some("newcomer"));

    let mut another = db.admin().await;
    run(&mut another, "SELECT pg_advisory_lock(2)").await;
    let shown = session(first(&inspect::locks_of(&pool, 2).await.unwrap())).clone();
    assert!(inspect::terminate(&mut *tx, &shown).await.unwrap());
    eventually("it is ended", TIMEOUT, || async {
        inspect::locks_of(&pool, 2).await.unwrap().is_empty()
    })
    .await;
}

#[tokio::test]
async fn a_role_sees_and_ends_what_it_may() {
    let (_server, db) = TestDb::with_server().await;
    let mut admin = db.admin().await;
    run(&mut admin, "CREATE ROLE holder LOGIN; CREATE ROLE onlooker LOGIN").await;
    let pool = PgPool::connect_with(db.options().username("holder")).await.unwrap();
    let guard = Lock::new(&pool, 1).acquire().await.unwrap();
    let waiter = spawn({
        let mut lock = Lock::new(&pool, 1);
        async move { lock.acquire().await }
    });
    has_waiter(&mut admin).await;

    // Keys, modes, processes and users are visible to every role.
    let mut onlooker = db.options().username("onlooker").connect().await.unwrap();
    // The proof of exclusion of the role has keys of its own.
    let locks = inspect::locks_of(&mut onlooker, 1).await.unwrap();
    let [held, waiting] = locks.as_slice() else { panic!("{locks:#?}") };
    assert_eq!((&held.key, held.mode, held.held), (&Key::from(1), Mode::Exclusive, true));
    assert_eq!(waiting.blocked_by, [guard.backend_pid()]);
    let hidden = session(held);
    assert_eq!(hidden.backend_pid, guard.backend_pid());
    assert_eq!(hidden.user.as_deref(), Some("holder"));
    assert_eq!((hidden.started_at, hidden.state.as_ref(), hidden.state_since), (None, None, None));
    assert!(!inspect::terminate(&mut onlooker, hidden).await.unwrap());

    run(&mut admin, "GRANT pg_read_all_stats TO onlooker").await;
    let locks = inspect::locks_of(&mut onlooker, 1).await.unwrap();
    let shown = session(first(&locks));
    assert!(shown.started_at.is_some() && shown.state.is_some());
    let refused = inspect::terminate(&mut onlooker, shown).await.unwrap_err();
    let expected = format!(
        "cannot end session {}: the role lacks a privilege; grant it pg_signal_backend, or be a superuser to end a \
         superuser's session",
        shown.backend_pid
    );
    assert_eq!(refused.to_string(), expected);
    assert_eq!(sqlstate(&refused).as_deref(), Some("42501"));
    assert!(!refused.is_transient());
    guard.verify().await.unwrap();

    run(&mut admin, "GRANT pg_signal_backend TO onlooker").await;
    assert!(inspect::terminate(&mut onlooker, shown).await.unwrap());
    timeout(TIMEOUT, guard.lost()).await.unwrap();
    drop(timeout(TIMEOUT, waiter).await.unwrap().unwrap().unwrap());

    // A role sees all details of its own sessions.
    let _guard = Lock::new(&pool, 1).acquire().await.unwrap();
    let locks = inspect::locks_of(&pool, 1).await.unwrap();
    assert!(session(first(&locks)).started_at.is_some());
}

/// The crate calls the functions behind the views, which a hardened server may forbid.
#[tokio::test]
async fn a_call_that_is_refused_a_function_names_it() {
    let (_server, db) = TestDb::with_server().await;
    let mut admin = db.admin().await;
    run(&mut admin, "CREATE ROLE app LOGIN").await;
    let mut app = db.options().username("app").connect().await.unwrap();
    run(&mut app, "SELECT pg_advisory_lock(1)").await;
    let shown = session(first(&inspect::locks(&mut app).await.unwrap())).clone();
    for (function, arguments) in
        [("pg_stat_get_activity", "int"), ("pg_lock_status", ""), ("pg_blocking_pids", "int")]
    {
        let function_of = format!("ALL ON FUNCTION {function}({arguments})");
        run(&mut admin, &format!("REVOKE {function_of} FROM PUBLIC")).await;
        let refused = [
            inspect::locks(&mut app).await.unwrap_err(),
            inspect::locks_of(&mut app, 1).await.unwrap_err(),
        ];
        for error in refused {
            let expected = format!(
                "cannot list the locks of the database: the role lacks a privilege; grant it EXECUTE \
                 on the function {function}"
            );
            assert_eq!(error.to_string(), expected);
            assert_eq!(sqlstate(&error).as_deref(), Some("42501"));
            assert_eq!(error.key(), None);
        }
        run(&mut admin, &format!("GRANT {function_of} TO PUBLIC")).await;
    }
    run(&mut admin, "REVOKE ALL ON FUNCTION pg_stat_get_activity(int) FROM PUBLIC").await;
    let error = inspect::terminate(&mut app, &shown).await.unwrap_err();
    let message = error.to_string();
    assert!(message.ends_with("EXECUTE on the function pg_stat_get_activity"), "{message}");
    run(&mut admin, "GRANT ALL ON FUNCTION pg_stat_get_activity(int) TO PUBLIC").await;
    inspect::locks(&mut app).await.unwrap();
}

/// One error is worth a retry, the other is not; neither is about privileges.
#[tokio::test]
async fn a_call_that_fails_otherwise_shows_whether_to_retry() {
    let (db, pool) = TestDb::with_pool(1).await;
    prove_exclusion(&db).await;
    let mut conn = pool.acquire().await.unwrap();
    let own = pid(&mut conn).await;
    run(&mut db.admin().await, &format!("SELECT pg_terminate_backend({own})")).await;
    let broken = inspect::locks(&mut *conn).await.unwrap_err();
    drop(conn);
    pool.close().await;
    let closed = inspect::locks(&pool).await.unwrap_err();
    for (error, is_transient) in [(broken, true), (closed, false)] {
        let expected = "cannot list the locks of the database: the query failed; see its source";
        assert_eq!(error.to_string(), expected);
        assert_eq!(error.is_transient(), is_transient, "{error:?}");
    }
}

/// The prepared transaction belongs to no session, and blocks the waiter.
#[tokio::test]
async fn a_prepared_transaction_is_shown_by_its_identifier() {
    let server = Server::options().setting("max_prepared_transactions", "1").start();
    let db = TestDb::on(&server).await;
    prove_exclusion(&db).await;
    let (pool, mut admin) = (db.pool(2).await, db.admin().await);
    let mut tx = pool.begin().await.unwrap();
    transaction::acquire(&mut tx, 42).await.unwrap();
    // After `PREPARE TRANSACTION`, the transaction has ended for its connection.
    run(&mut tx, "PREPARE TRANSACTION 'order 17'").await;
    let waiter = spawn({
        let mut lock = Lock::new(&pool, 42);
        async move { lock.acquire().await.unwrap() }
    });
    locks_are(&mut admin, 2, TIMEOUT).await;
    let locks = inspect::locks(&mut admin).await.unwrap();
    let [held, waiting] = locks.as_slice() else { panic!("{locks:#?}") };
    assert_eq!((held.held, held.session.as_ref()), (true, None));
    assert_eq!(held.prepared.as_deref(), Some("order 17"));
    assert_eq!(waiting.blocked_by, [0]);
    run(&mut admin, "ROLLBACK PREPARED 'order 17'").await;
    drop(timeout(TIMEOUT, waiter).await.unwrap().unwrap());
}
