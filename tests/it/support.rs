//! Helpers that several tests share.

use std::cell::RefCell;
use std::collections::HashSet;
use std::fmt::Debug;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use pglock::{Error, ExclusiveGuard, Lock, LockManager, LockOptions, SharedGuard, Upgrade};
use pglock_testkit::{
    AdvisoryLock, Environment, Proxy, Server, ServerOptions, TestDb, advisory_locks, eventually,
    skip,
};
use sqlx::pool::PoolConnection;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{AssertSqlSafe, PgConnection, PgPool, Postgres, Row};
use tokio::runtime::Handle;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{sleep, timeout};

/// Runs a future as a task.
pub(crate) fn spawn<F>(future: F) -> JoinHandle<F::Output>
where
    F: Future<Output: Send> + Send + 'static,
{
    Handle::current().spawn(future)
}

/// Sends statements by the simple protocol.
pub(crate) async fn execute(conn: &mut PgConnection, statements: impl Into<String>) {
    sqlx::raw_sql(AssertSqlSafe(statements.into())).execute(conn).await.unwrap();
}

/// Ends a session at the server.
pub(crate) async fn terminate(admin: &mut PgConnection, pid: i32) {
    sqlx::query("SELECT pg_terminate_backend($1)").bind(pid).execute(admin).await.unwrap();
}

/// Waits until a session waits for a lock.
pub(crate) async fn has_waiter(admin: &mut PgConnection) {
    let waiting = async {
        while advisory_locks(admin).await.iter().all(|lock| lock.granted) {
            sleep(Duration::from_millis(2)).await;
        }
    };
    assert!(timeout(SOON * 20, waiting).await.is_ok(), "no session waits");
}

/// Acquires a lock, and acquires it again through the same handle; finds it busy, without a wait and after a wait of
/// `moment`; drops a wait after `moment`; and fails to acquire it, because the pool is closed.
pub(crate) async fn acquire_with_each_outcome(pool: &PgPool, moment: Duration) {
    let mut lock = Lock::new(pool, "nightly-report");
    let mut other = lock.clone();
    let guard = lock.acquire().await.unwrap();
    let stacked = lock.try_acquire_shared().await.unwrap().unwrap();
    assert!(other.try_acquire().await.unwrap().is_none());
    waits_in_vain(moment, async |time| other.try_acquire_shared_for(time).await).await;
    assert!(timeout(moment, other.acquire()).await.is_err());
    drop((guard, stacked));
    pool.close().await;
    other.acquire().await.unwrap_err();
}

/// Returns the guard of an upgrade. Panics if the upgrade was refused.
#[expect(clippy::panic, reason = "it fails the test")]
pub(crate) fn upgraded(upgrade: Upgrade) -> ExclusiveGuard {
    match upgrade {
        Upgrade::Upgraded(guard) => guard,
        Upgrade::Refused(guard) => panic!("refused: {guard:?}"),
    }
}

/// Returns the guard of an upgrade that was refused. Panics if it was not refused.
#[expect(clippy::panic, reason = "it fails the test")]
pub(crate) fn refused(upgrade: Upgrade) -> SharedGuard {
    match upgrade {
        Upgrade::Upgraded(guard) => panic!("upgraded: {guard:?}"),
        Upgrade::Refused(guard) => guard,
    }
}

/// Returns a random number, by a step of xorshift64.
pub(crate) fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// Returns `true` or `false` at random.
pub(crate) fn coin(state: &mut u64) -> bool {
    random(state).is_multiple_of(2)
}

/// Prints what a test has seen, which the test runner shows if it fails or is asked to.
#[expect(clippy::print_stdout, reason = "that is what it is for")]
pub(crate) fn report(seen: impl std::fmt::Display) {
    println!("{seen}");
}

/// Adds `pg_stat_statements` to a server. Returns `None` and skips the test if it is not installed.
pub(crate) async fn with_statement_statistics(options: ServerOptions) -> Option<ServerOptions> {
    let sql = "SELECT count(*) > 0 FROM pg_available_extensions WHERE name = 'pg_stat_statements'";
    let mut admin = TestDb::on(Server::shared()).await.admin().await;
    let is_installed: bool = sqlx::query_scalar(sql).fetch_one(&mut admin).await.unwrap();
    if !is_installed {
        return skip("there is no pg_stat_statements", "apt-get install postgresql-contrib");
    }
    Some(options.setting("shared_preload_libraries", "pg_stat_statements"))
}

thread_local! {
    /// The managers of the pools of a test, which has a thread of its own.
    static MANAGERS: RefCell<Vec<(PgPool, LockManager)>> = const { RefCell::new(Vec::new()) };
}

/// How many managers are remembered: more pools than any test has at a time.
const REMEMBERED: usize = 8;

/// Returns the manager of a pool. All locks that the thread makes on the pool share it.
pub(crate) fn manager_of(pool: &PgPool) -> LockManager {
    MANAGERS.with_borrow_mut(|managers| {
        // The address of its options identifies a pool, because all clones of the pool share them.
        let same = |known: &PgPool| std::ptr::eq(known.options(), pool.options());
        let known = managers.iter().find(|(known, _)| same(known));
        if let Some(manager) = known.map(|(_, manager)| manager.clone()) {
            return manager;
        }
        // Pools that are remembered are not closed, so their number has a limit.
        if managers.len() == REMEMBERED {
            managers.remove(0);
        }
        let manager = LockManager::new(pool);
        managers.push((pool.clone(), manager.clone()));
        manager
    })
}

/// Returns the value of an expression, as text.
pub(crate) async fn ask(conn: &mut PgConnection, statement: &str) -> String {
    let statement = AssertSqlSafe(format!("SELECT ({statement})::text"));
    sqlx::raw_sql(statement).fetch_one(conn).await.unwrap().get(0)
}

/// The bound within which nothing may be left behind.
pub(crate) const SOON: Duration = Duration::from_secs(1);

/// Returns [`SOON`], adapted to the environment.
pub(crate) fn soon() -> Duration {
    Environment::current().limit(SOON)
}

/// Longer than most calls take, unless they hang. Tests of slower operations have a limit of their own.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(20);

/// Returns how often a test repeats something in this environment: `count` times in the plain one.
pub(crate) fn rounds(count: usize) -> usize {
    Environment::current().rounds(count)
}

/// The time after which a session is monitored: the default interval of the heartbeat, and some time to start.
pub(crate) const WATCHED: Duration = Duration::from_millis(2_200);

/// Returns [`WATCHED`], adapted to the environment, because the monitor connects then, which takes several round trips.
pub(crate) fn watched() -> Duration {
    const INTERVAL: Duration = Duration::from_secs(2);
    INTERVAL + Environment::current().limit(WATCHED.saturating_sub(INTERVAL))
}

/// Returns options with which a session is monitored soon after its first lock, and trusted almost as long as by
/// default.
pub(crate) fn quick_heartbeat() -> LockOptions {
    LockOptions::new().heartbeat_interval(QUICK_INTERVAL).heartbeat_timeout(SOON * 3)
}

/// The interval of [`quick_heartbeat`].
const QUICK_INTERVAL: Duration = Duration::from_millis(200);

/// Returns [`watched`] for a session that has [`quick_heartbeat`].
pub(crate) fn quickly_watched() -> Duration {
    QUICK_INTERVAL + Environment::current().limit(Duration::from_millis(300))
}

/// Returns options with which the holder times out after a second, and the server after three.
pub(crate) fn fast_heartbeat() -> LockOptions {
    let second = soon();
    LockOptions::new()
        .heartbeat_interval(second / 2)
        .heartbeat_timeout(second / 2)
        .keepalives_idle(second)
        .keepalives_interval(second)
        .keepalives_retries(2)
}

/// Returns options with which the holder times out after three seconds, because an answer may be late on a busy
/// machine.
pub(crate) fn lenient_heartbeat() -> LockOptions {
    fast_heartbeat().heartbeat_timeout(soon() * 5 / 2).keepalives_retries(4)
}

/// Returns options with which no heartbeat is due in the time that a test takes.
pub(crate) fn slow_heartbeat() -> LockOptions {
    let second = Duration::from_secs(1);
    LockOptions::new()
        .heartbeat_interval(second * 60)
        .heartbeat_timeout(second * 60)
        .keepalives_idle(second)
        .keepalives_interval(second * 121)
        .keepalives_retries(1)
}

/// Checks that every method of a guard reports its loss.
pub(crate) async fn says_lost(guard: ExclusiveGuard) {
    assert!(guard.is_lost());
    assert!(matches!(guard.verify().await, Err(Error::Lost { .. })));
    assert!(matches!(guard.connection().await, Err(Error::Lost { .. })));
    assert!(matches!(guard.fencing_token().await, Err(Error::Lost { .. })));
    assert!(matches!(guard.release().await, Err(Error::Lost { .. })));
}

/// Waits until `condition` accepts the advisory locks that the server shows, held or waited for, and returns them.
/// Panics after `limit`, naming `what` it waits for.
pub(crate) async fn locks_become(
    admin: &mut PgConnection,
    what: &str,
    limit: Duration,
    condition: impl Fn(&[AdvisoryLock]) -> bool,
) -> Vec<AdvisoryLock> {
    let started = Instant::now();
    loop {
        let locks = timeout(limit + TIMEOUT, advisory_locks(admin)).await.unwrap();
        if condition(&locks) {
            return locks;
        }
        assert!(started.elapsed() < limit, "not {what} within {limit:?}: {locks:#?}");
        sleep(Duration::from_millis(2)).await;
    }
}

/// Waits until the server shows exactly `count` advisory locks, held or waited for.
pub(crate) async fn locks_are(admin: &mut PgConnection, count: usize, limit: Duration) {
    locks_become(admin, &format!("{count} locks"), limit, |locks| locks.len() == count).await;
}

/// Waits until the server shows no advisory lock and no waiter.
pub(crate) async fn no_locks(admin: &mut PgConnection) {
    locks_are(admin, 0, soon() * 4).await;
}

/// Waits until a backend is in a state of `pg_stat_activity`.
pub(crate) async fn backend_is(admin: &mut PgConnection, pid: i32, state: &str, limit: Duration) {
    let started = Instant::now();
    loop {
        let now: Option<String> =
            sqlx::query_scalar("SELECT state FROM pg_stat_activity WHERE pid = $1")
                .bind(pid)
                .fetch_optional(&mut *admin)
                .await
                .unwrap();
        if now.as_deref() == Some(state) {
            return;
        }
        assert!(started.elapsed() < limit, "backend {pid} is {now:?}, not {state}");
        sleep(Duration::from_millis(2)).await;
    }
}

/// Waits until a backend has answered several heartbeats.
pub(crate) async fn several_heartbeats(admin: &mut PgConnection, pid: i32) {
    let (mut times, started) = (HashSet::new(), Instant::now());
    while times.len() < 4 {
        let time: String =
            sqlx::query_scalar("SELECT query_start::text FROM pg_stat_activity WHERE pid = $1")
                .bind(pid)
                .fetch_one(&mut *admin)
                .await
                .unwrap();
        times.insert(time);
        assert!(started.elapsed() < SOON * 20, "hardly a heartbeat: {times:?}");
        sleep(Duration::from_millis(5)).await;
    }
}

/// Acquires once, and waits until the proof of exclusion is over, because the proof sends statements of its own. On a
/// busy machine, it continues after the acquire.
pub(crate) async fn prove_exclusion(db: &TestDb) {
    let (pool, mut admin) = (db.pool(1).await, db.admin().await);
    let sessions = "SELECT count(*) FROM pg_stat_activity
                    WHERE datname = current_database() AND backend_type = 'client backend'";
    let mut sessions = async || sqlx::query_scalar::<_, i64>(sessions).fetch_one(&mut admin).await;
    let before = sessions().await.unwrap();
    Lock::new(&pool, 0).acquire().await.unwrap().release().await.unwrap();
    let started = Instant::now();
    // The pool may have opened a session.
    while sessions().await.unwrap() > before + 1 {
        assert!(started.elapsed() < soon() * 20, "the proof goes on");
        sleep(Duration::from_millis(10)).await;
    }
}

/// Waits until the pool has all its connections back, so that the next acquire finds one idle.
pub(crate) async fn all_are_idle(pool: &PgPool) {
    let idle = || async { pool.num_idle() == pool.size() as usize };
    eventually("all connections are idle", soon() * 20, idle).await;
}

/// Runs a call until it completes, or evidently waits: until the server has shown for a while a
/// waiter for a lock, or one lock more than the `held` that others hold, which is a queue's.
/// Returns the output if the call completed.
///
/// A separate task watches the server, so that watching does not poll the call.
pub(crate) async fn unless_it_waits<T>(
    held: usize,
    db: &TestDb,
    call: impl Future<Output = T>,
) -> Option<T> {
    let mut admin = db.admin().await;
    let mut waits = JoinSet::new();
    waits.spawn(async move {
        loop {
            let locks = advisory_locks(&mut admin).await;
            if locks.iter().any(|lock| !lock.granted) || (held > 0 && locks.len() > held) {
                break;
            }
            sleep(Duration::from_millis(5)).await;
        }
        // A call with a short timeout times out meanwhile.
        sleep(Duration::from_millis(200)).await;
    });
    tokio::select! {
        biased;
        output = call => Some(output),
        _ = waits.join_next() => None,
    }
}

/// Repeats a sweep until calls were dropped at `points` points in all. On a busy machine, an answer has often arrived
/// before the call reads it, so the call completes at its first poll.
pub(crate) async fn dropped_at(points: usize, mut sweep: impl AsyncFnMut() -> usize) {
    let mut dropped = 0;
    for _ in 0..100 {
        dropped += Box::pin(sweep()).await;
        if dropped >= points {
            break;
        }
    }
    assert!(dropped >= points, "hardly dropped at all: at {dropped} points, not {points}");
}

/// Borrows every connection of the pool at once, and checks that none of them holds a lock or is inside a
/// transaction. Returns their backends.
pub(crate) async fn borrow_all(pool: &PgPool) -> Vec<i32> {
    let mut borrowed = Vec::new();
    let mut pids = Vec::new();
    for _ in 0..pool.options().get_max_connections() {
        // Most connections are there at once. That of a dropped wait, or of a manager, takes up to a second.
        let mut conn = timeout(soon() * 2, acquire(pool)).await.unwrap();
        // With the simple protocol, both times are the same outside a transaction.
        // All names are qualified, because other functions may be in front of these in the search path. A test may
        // revoke access to the view `pg_locks`, but never to the function behind it.
        let row = sqlx::raw_sql(
            "SELECT pg_catalog.pg_backend_pid(), \
             pg_catalog.now() OPERATOR(pg_catalog.<>) pg_catalog.statement_timestamp(), \
             (SELECT pg_catalog.count(*) FROM pg_catalog.pg_lock_status() \
              WHERE pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid() \
                AND locktype OPERATOR(pg_catalog.=) 'advisory')",
        )
        .fetch_one(&mut *conn)
        .await
        .unwrap();
        let (pid, in_transaction, locks): (i32, bool, i64) = (row.get(0), row.get(1), row.get(2));
        assert_eq!(locks, 0, "a pooled connection holds a lock");
        assert!(!in_transaction, "a pooled connection is inside a transaction");
        pids.push(pid);
        borrowed.push(conn);
    }
    pids
}

/// Borrows a connection, however short the timeout of the pool.
async fn acquire(pool: &PgPool) -> PoolConnection<Postgres> {
    loop {
        match pool.acquire().await {
            Err(sqlx::Error::PoolTimedOut) => {}
            acquired => return acquired.unwrap(),
        }
    }
}

/// Returns a pool whose first connection is open.
pub(crate) async fn pool_of(options: PgConnectOptions, max_connections: u32) -> PgPool {
    PgPoolOptions::new().max_connections(max_connections).connect_with(options).await.unwrap()
}

/// A database behind a proxy, on a server of its own.
pub(crate) struct Behind {
    pub(crate) pool: PgPool,
    pub(crate) proxy: Proxy,
    pub(crate) db: TestDb,
    pub(crate) server: Server,
}

impl Behind {
    /// Makes a database, and a pool that connects to it through a proxy.
    pub(crate) async fn a_proxy(max_connections: u32) -> Self {
        let server = Server::options().tcp().start();
        let db = TestDb::on(&server).await;
        let proxy = Proxy::to(server.port()).await;
        let options = server.tcp_options().database(db.name()).port(proxy.address().port());
        Self { pool: pool_of(options, max_connections).await, proxy, db, server }
    }
}

/// Returns a pool that soon reports that the server is down. By default, it would try to connect for half a minute.
pub(crate) async fn quick_pool(db: &TestDb) -> PgPool {
    opened(PgPoolOptions::new().max_connections(2).acquire_timeout(SOON / 4), db).await
}

/// Returns a pool whose connections are all open, because on a busy machine, opening them takes longer than its
/// timeout.
pub(crate) async fn opened(pool: PgPoolOptions, db: &TestDb) -> PgPool {
    let pool = pool.connect_lazy_with(db.options());
    borrow_all(&pool).await;
    all_are_idle(&pool).await;
    pool
}

/// Waits in vain for a lock that another session holds: for `time`, or for longer if a busy machine opens no connection
/// within it.
#[expect(clippy::panic, reason = "it fails the test")]
pub(crate) async fn waits_in_vain<T: Debug>(
    time: Duration,
    mut call: impl AsyncFnMut(Duration) -> pglock::Result<Option<T>>,
) {
    let mut time = time.max(Duration::from_millis(10));
    loop {
        match call(time).await {
            Ok(None) => return,
            Err(
                Error::PoolTimedOut { .. } | Error::Connect { .. } | Error::Disconnected { .. },
            ) if time < SOON * 20 => {
                time *= 2;
            }
            other => panic!("{other:?}"),
        }
    }
}

/// Polls a future on a thread that has no runtime.
pub(crate) fn without_runtime<T>(future: impl Future<Output = T>) -> T {
    struct Unpark(std::thread::Thread);

    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }

    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut future = pin!(future);
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return output;
        }
        std::thread::park();
    }
}
