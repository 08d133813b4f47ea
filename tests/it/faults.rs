//! Tests of the table of faults in the guide: the report to the holder, and the time at which the lock is free for
//! others.
//!
//! Each test here covers a row that no other file covers. Another service waits for the lock before the fault, and is
//! granted it afterwards; then no lock is left on the server, and no connection is missing from the pool.

use std::env;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use pglock::{Error, ExclusiveGuard, Lock, Loss};
use pglock_testkit::{Role, Server, TestDb, WallClock, cues, monotonic, say};
use sqlx::postgres::PgPoolOptions;
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, PgConnection, PgPool};
use tokio::runtime::Runtime;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::support::{
    Behind, SOON, TIMEOUT, all_are_idle, borrow_all, fast_heartbeat, lenient_heartbeat, locks_are,
    no_locks, terminate,
};

const SECOND: Duration = Duration::from_secs(1);

/// The time after which a holder with a lenient heartbeat times out.
const BOUND: Duration = Duration::from_secs(3);

/// Another service, which waits for lock 1.
struct Next {
    pool: PgPool,
    waiting: JoinSet<Duration>,
}

impl Next {
    /// Queues for the lock, behind `others` that hold it or wait for it.
    async fn after(others: usize, db: &TestDb) -> Self {
        let pool = db.pool(2).await;
        let mut waiting = JoinSet::new();
        let mut lock = Lock::new(&pool, 1);
        waiting.spawn(async move {
            let guard = lock.acquire().await.unwrap();
            let granted = monotonic();
            guard.release().await.unwrap();
            granted
        });
        locks_are(&mut db.admin().await, others + 1, TIMEOUT).await;
        Self { pool, waiting }
    }

    fn still_waits(&mut self) -> bool {
        self.waiting.try_join_next().is_none()
    }

    /// Waits until this service was granted the lock, and returns the time of the grant. Checks that no session holds
    /// the lock afterwards.
    async fn had_it(mut self, limit: Duration, db: &TestDb) -> Duration {
        let granted = timeout(limit, self.waiting.join_next()).await.unwrap().unwrap().unwrap();
        no_locks(&mut db.admin().await).await;
        borrow_all(&self.pool).await;
        granted
    }
}

/// Checks that no loss is reported to the holder for a time.
async fn keeps(guard: &ExclusiveGuard, time: Duration) {
    let told = timeout(time, guard.lost()).await;
    assert!(told.is_err(), "lost: {told:?}");
}

/// Holds lock 1 on command, and reports its state.
#[tokio::test]
#[ignore = "is a role: the tests below run it as a process"]
async fn service() {
    let pool = PgPoolOptions::new().max_connections(4);
    let pool = pool.connect(&env::var("URL").unwrap()).await.unwrap();
    // The slice is so long that it ends no wait here.
    let mut lock = Lock::new(&lenient_heartbeat().wait_slice(TIMEOUT * 3).on(&pool).unwrap(), 1);
    let mut cues = cues();
    let mut guard = None;
    while let Some(cue) = cues.next_line().await.unwrap() {
        match cue.as_str() {
            "acquire" => {
                guard = Some(lock.acquire().await.unwrap());
                say("holds");
            }
            "clock" => say(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()),
            "verify" => say(guard.as_ref().unwrap().verify().await.is_ok()),
            "backend" => say(guard.as_ref().unwrap().backend_pid()),
            "lost" => {
                guard.take().unwrap().lost().await;
                say("lost");
            }
            _ => {
                guard.take().unwrap().release().await.unwrap();
                say("released");
            }
        }
    }
}

#[tokio::test]
async fn the_holder_is_killed() {
    let db = TestDb::new().await;
    let mut holder = Role::start("faults::service", &[("URL", &db.url())]);
    assert_eq!(holder.ask("acquire").await, "holds");
    let next = Next::after(1, &db).await;
    holder.kill().await;
    next.had_it(SOON * 5, &db).await;
}

#[tokio::test]
async fn a_waiter_is_killed() {
    let (db, pool, mut admin) = TestDb::scene(2).await;
    let guard = Lock::new(&pool, 1).acquire().await.unwrap();
    let mut waiter = Role::start("faults::service", &[("URL", &db.url())]);
    waiter.tell("acquire").await;
    locks_are(&mut admin, 2, TIMEOUT).await;
    let next = Next::after(2, &db).await;
    waiter.kill().await;
    if admin.server_version_num() >= Some(140_000) {
        locks_are(&mut admin, 2, SOON * 5).await;
    }
    guard.release().await.unwrap();
    next.had_it(SOON * 5, &db).await;
    borrow_all(&pool).await;
}

#[tokio::test]
async fn the_server_crashes() {
    let (server, db) = TestDb::with_server().await;
    let pool = db.pool(3).await;
    let guard = Lock::new(&pool, 1).acquire().await.unwrap();
    let mut waiter = Lock::new(&pool, 1);
    let (failed, loss) = tokio::join!(timeout(TIMEOUT, waiter.acquire()), async {
        locks_are(&mut db.admin().await, 2, TIMEOUT).await;
        server.kill();
        timeout(SOON * 5, guard.lost()).await.unwrap()
    });
    let error = failed.unwrap().unwrap_err();
    assert!(matches!(error, Error::Disconnected { .. }), "{error:?}");
    assert!(matches!(loss, Loss::Disconnected(_)), "{loss:?}");
    assert!(matches!(guard.release().await, Err(Error::Lost { .. })));

    server.restart();
    waiter.acquire().await.unwrap().release().await.unwrap();
    no_locks(&mut db.admin().await).await;
    borrow_all(&pool).await;
}

#[tokio::test]
async fn the_server_stands_still_for_a_moment() {
    let (server, db) = TestDb::with_server().await;
    let pool = db.pool(3).await;
    let guard = Lock::new(&pool, 1).acquire().await.unwrap();
    let mut next = Next::after(1, &db).await;
    server.pause();
    // The test waits for no event here: it lets half of the time pass that the default allows.
    sleep(SECOND * 2).await;
    server.resume();
    guard.verify().await.unwrap();
    assert!(!guard.is_lost() && next.still_waits());
    guard.release().await.unwrap();
    next.had_it(SOON * 5, &db).await;
    borrow_all(&pool).await;
}

#[tokio::test]
async fn the_connection_is_reset() {
    let Behind { db, proxy, pool, server: _server } = Behind::a_proxy(3).await;
    for lent in [false, true] {
        let guard = Lock::new(&lenient_heartbeat().on(&pool).unwrap(), 1).acquire().await.unwrap();
        let connection = if lent { Some(guard.connection().await.unwrap()) } else { None };
        let mut waiter = Lock::new(&pool, 1);
        let ((failed, loss), next) = tokio::join!(
            async {
                tokio::join!(timeout(TIMEOUT, waiter.acquire()), timeout(TIMEOUT, guard.lost()))
            },
            async {
                locks_are(&mut db.admin().await, 2, TIMEOUT).await;
                let next = Next::after(2, &db).await;
                proxy.reset();
                next
            }
        );
        let error = failed.unwrap().unwrap_err();
        assert!(matches!(error, Error::Disconnected { .. }), "{error:?}");
        // The heartbeat of a borrowed connection uses another one, and the answer may be that the session holds the
        // lock no longer.
        let loss = loss.unwrap();
        assert!(matches!(loss, Loss::Disconnected(_) | Loss::NotHeld), "{loss:?}");
        drop(connection);
        drop(guard);
        next.had_it(SOON * 5, &db).await;
        borrow_all(&pool).await;
    }
}

/// An answer takes 600 ms, or twice that if a connection must be opened first.
#[tokio::test]
async fn the_link_is_slow() {
    let (idle, lent) = (Behind::a_proxy(3).await, Behind::a_proxy(3).await);
    tokio::join!(is_kept_over_a_slow_link(&idle, false), is_kept_over_a_slow_link(&lent, true));
}

async fn is_kept_over_a_slow_link(behind: &Behind, lent: bool) {
    let Behind { db, proxy, pool, .. } = behind;
    let guard = Lock::new(&lenient_heartbeat().on(pool).unwrap(), 1).acquire().await.unwrap();
    proxy.delay(Duration::from_millis(300));
    let mut next = Next::after(1, db).await;
    let connection = if lent { Some(guard.connection().await.unwrap()) } else { None };
    // The hold lasts so long that every answer is needed.
    keeps(&guard, SECOND * 5).await;
    assert!(next.still_waits());
    drop(connection);
    guard.release().await.unwrap();
    next.had_it(SOON * 5, db).await;
    proxy.delay(Duration::ZERO);
    all_are_idle(pool).await;
    borrow_all(pool).await;
}

#[tokio::test]
async fn the_link_is_too_slow() {
    let Behind { db, proxy, pool, server: _server } = Behind::a_proxy(3).await;
    let guard = Lock::new(&fast_heartbeat().on(&pool).unwrap(), 1).acquire().await.unwrap();
    let next = Next::after(1, &db).await;
    proxy.delay(SECOND * 2);
    let loss = timeout(TIMEOUT, guard.lost()).await.unwrap();
    let told = monotonic();
    assert!(matches!(loss, Loss::Unresponsive), "{loss:?}");
    // The end of the connection reaches the server late, too.
    let granted = next.had_it(TIMEOUT, &db).await;
    assert!(told < granted, "told at {told:?}, granted at {granted:?}");
    proxy.delay(Duration::ZERO);
    drop(guard);
    // The answers to the pool's statements are still in flight.
    all_are_idle(&pool).await;
    borrow_all(&pool).await;
}

/// The link passes nothing for a while, and then all that was delayed, which does no harm.
#[tokio::test]
async fn the_link_stands_still() {
    let Behind { db, proxy, pool, server: _server } = Behind::a_proxy(3).await;
    let guard = Lock::new(&fast_heartbeat().on(&pool).unwrap(), 1).acquire().await.unwrap();
    let mut next = Next::after(1, &db).await;
    proxy.freeze();
    let loss = timeout(TIMEOUT, guard.lost()).await.unwrap();
    let told = monotonic();
    assert!(matches!(loss, Loss::Unresponsive), "{loss:?}");
    // The server has a live connection to the proxy, so for the server the client is alive.
    assert!(next.still_waits());
    proxy.thaw();
    let granted = next.had_it(SOON * 5, &db).await;
    assert!(told < granted, "told at {told:?}, granted at {granted:?}");
    drop(guard);
    // The answers to the pool's statements are still in flight.
    all_are_idle(&pool).await;
    borrow_all(&pool).await;
}

/// Leaves a transaction open on the borrowed connection until a limit of the database ends the session.
async fn a_limit_ends_the_borrowed_session(setting: &str, since: u32, last: &str) {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    if admin.server_version_num() < Some(since) {
        return;
    }
    let limit = format!(
        "CREATE TABLE entry (amount int); ALTER DATABASE {} SET {setting} = '2s'",
        db.name()
    );
    sqlx::raw_sql(AssertSqlSafe(limit)).execute(&mut admin).await.unwrap();
    let pool = db.pool(2).await;
    let guard = Lock::new(&lenient_heartbeat().on(&pool).unwrap(), 1).acquire().await.unwrap();
    let next = Next::after(1, &db).await;
    let mut connection = guard.connection().await.unwrap();
    let write = format!("BEGIN; INSERT INTO entry VALUES (100); {last}");
    let (said, loss) = tokio::join!(
        sqlx::raw_sql(AssertSqlSafe(write)).execute(&mut *connection),
        timeout(TIMEOUT, guard.lost())
    );
    next.had_it(SOON * 5, &db).await;
    let count = sqlx::query_scalar::<_, i64>("SELECT count(*) FROM entry");
    assert_eq!(count.fetch_one(&mut admin).await.unwrap(), 0, "it outlives the lock");
    let loss = loss.unwrap();
    assert!(matches!(loss, Loss::Disconnected(_) | Loss::NotHeld), "{said:?} {loss:?}");
    drop(connection);
    assert!(matches!(guard.release().await, Err(Error::Lost { .. })));
    borrow_all(&pool).await;
}

#[tokio::test]
async fn a_limit_ends_an_idle_transaction_on_the_borrowed_connection() {
    let setting = "idle_in_transaction_session_timeout";
    a_limit_ends_the_borrowed_session(setting, 0, "SELECT 1").await;
}

#[tokio::test]
async fn a_limit_ends_a_long_transaction_on_the_borrowed_connection() {
    a_limit_ends_the_borrowed_session("transaction_timeout", 170_000, "SELECT pg_sleep(60)").await;
}

/// Connects until the server has refused connections for a second, because the connections of a proof end soon and make
/// room.
async fn fill(db: &TestDb) -> Vec<PgConnection> {
    let (mut conns, mut full_since) = (Vec::new(), None);
    while full_since.is_none_or(|since: Instant| since.elapsed() < SECOND) {
        match db.options().connect().await {
            Ok(conn) => {
                conns.push(conn);
                full_since = None;
            }
            Err(error) => {
                assert_eq!(error.as_database_error().unwrap().code().unwrap(), "53300");
                full_since.get_or_insert_with(Instant::now);
                sleep(SECOND / 50).await;
            }
        }
    }
    conns
}

#[tokio::test]
async fn the_server_has_no_connection_left() {
    let server = Server::options().setting("max_connections", "12").start();
    let db = TestDb::on(&server).await;
    let pool = db.pool(1).await;
    let mut lock = Lock::new(&lenient_heartbeat().on(&pool).unwrap(), 1);
    let guard = lock.acquire().await.unwrap();
    let mut next = Next::after(1, &db).await;
    let mut filling = fill(&db).await;

    let late = PgPoolOptions::new().acquire_timeout(SECOND / 2).connect_lazy_with(db.options());
    let refused = timeout(TIMEOUT, async { Lock::new(&late, 1).acquire().await.map(drop) });
    let error = refused.await.unwrap().unwrap_err();
    assert!(matches!(error, Error::Connect { .. }) && error.is_transient(), "{error:?}");
    // The holder and the waiter are connected already.
    keeps(&guard, BOUND + SECOND).await;
    assert!(next.still_waits());

    // The heartbeat of a borrowed connection needs another connection. A login that is refused is a sign of life.
    let connection = guard.connection().await.unwrap();
    keeps(&guard, BOUND * 2).await;
    drop(connection);
    drop(guard);
    for _ in 0..2 {
        filling.pop().unwrap().close().await.unwrap();
    }
    next.had_it(SOON * 5, &db).await;
    borrow_all(&pool).await;
}

#[tokio::test]
async fn the_clock_of_the_holder_is_set() {
    let Some(clock) = WallClock::new() else { return };
    let db = TestDb::new().await;
    let url = db.url();
    let mut env = vec![("URL", url.as_str())];
    env.extend(clock.env());
    let mut holder = Role::start("faults::service", &env);
    for hour in [1, -1] {
        assert_eq!(holder.ask("acquire").await, "holds");
        let mut next = Next::after(1, &db).await;
        clock.set(hour * 3600);
        let shown: i64 = holder.ask("clock").await.parse().unwrap();
        assert!((shown - now() - hour * 3600).abs() < 60, "the clock was not set");
        // The test waits for no event here: it lets the bound pass.
        sleep(BOUND + SECOND).await;
        assert_eq!(holder.ask("verify").await, "true");
        assert!(next.still_waits());
        assert_eq!(holder.ask("release").await, "released");
        next.had_it(SOON * 5, &db).await;

        // A loss is still reported.
        assert_eq!(holder.ask("acquire").await, "holds");
        let pid = holder.ask("backend").await;
        holder.tell("lost").await;
        clock.set(0);
        terminate(&mut db.admin().await, pid.parse().unwrap()).await;
        assert_eq!(holder.answer().await, "lost");
    }
}

fn now() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    i64::try_from(now).unwrap()
}

/// Starts a server whose clock can be set. Its timers use the correct clock, because libfaketime does not affect their
/// signal handler.
fn server_with(clock: &WallClock) -> Server {
    let options = Server::options();
    clock.env().iter().fold(options, |options, (name, value)| options.env(name, value)).start()
}

#[tokio::test]
async fn the_clock_of_the_server_is_set() {
    let Some(clock) = WallClock::new() else { return };
    let server = server_with(&clock);
    let db = TestDb::on(&server).await;
    let pool = db.pool(3).await;
    for hour in [1, -1] {
        clock.set(0);
        let guard = Lock::new(&lenient_heartbeat().on(&pool).unwrap(), 1).acquire().await.unwrap();
        clock.set(hour * 3600);
        let shown: i64 = sqlx::query_scalar("SELECT extract(epoch FROM clock_timestamp())::int8")
            .fetch_one(&pool)
            .await
            .unwrap();
        assert!((shown - now() - hour * 3600).abs() < 60, "the clock was not set");
        keeps(&guard, BOUND + SECOND).await;
        guard.verify().await.unwrap();
        let next = Next::after(1, &db).await;
        guard.release().await.unwrap();
        next.had_it(SOON * 5, &db).await;
    }
    borrow_all(&pool).await;
}

/// A cancelled wait still leaves the queue, at the latest at the end of its slice.
#[tokio::test]
async fn the_clock_of_the_server_is_set_while_another_waits() {
    let Some(clock) = WallClock::new() else { return };
    let server = server_with(&clock);
    let db = TestDb::on(&server).await;
    let pool = db.pool(3).await;
    let mut admin = db.admin().await;
    let guard = Lock::new(&pool, 1).acquire().await.unwrap();
    // `limit` is how long it may take until the wait is cancelled. If the clock is set back by much, the waiter's
    // session looks like a new one, so it leaves the queue only at the end of its slice.
    for (seconds, limit) in [(3600, SOON * 4), (-1, SOON * 4), (-3600, TIMEOUT)] {
        clock.set(0);
        let mut waiter = Lock::new(&pool, 1);
        let acquired = tokio::select! {
            acquired = waiter.acquire() => Some(acquired),
            () = locks_are(&mut admin, 2, TIMEOUT) => None,
        };
        assert!(acquired.is_none(), "{acquired:?}");
        clock.set(seconds);
        locks_are(&mut admin, 1, limit).await;
        guard.verify().await.unwrap();
    }
    drop(guard);
    no_locks(&mut admin).await;
    borrow_all(&pool).await;
}

/// No task is left to check the session, so the lock is lost at once.
#[test]
fn the_runtime_is_shut_down() {
    let watcher = Runtime::new().unwrap();
    let runtime = Runtime::new().unwrap();
    let db = watcher.block_on(TestDb::new());
    let guard = runtime.block_on(async {
        let pool = db.pool(2).await;
        Lock::new(&fast_heartbeat().on(&pool).unwrap(), 1).acquire().await.unwrap()
    });
    let next = watcher.block_on(Next::after(1, &db));
    runtime.shutdown_timeout(SECOND);
    watcher.block_on(async {
        let loss = timeout(SOON * 5, guard.lost()).await.unwrap();
        assert!(matches!(loss, Loss::RuntimeShutdown), "{loss:?}");
        next.had_it(SOON * 5, &db).await;
    });
    assert!(watcher.block_on(guard.release()).is_err());
}

#[tokio::test]
async fn the_pool_is_closed() {
    let (db, pool) = TestDb::with_pool(2).await;
    let guard = Lock::new(&lenient_heartbeat().on(&pool).unwrap(), 1).acquire().await.unwrap();
    let mut next = Next::after(1, &db).await;
    // The test sleeps for longer than the heartbeat's interval, after which the session is monitored.
    sleep(SECOND).await;
    let closed = pool.close();
    for lent in [false, true] {
        let connection = if lent { Some(guard.connection().await.unwrap()) } else { None };
        keeps(&guard, BOUND + SECOND).await;
        drop(connection);
    }
    guard.verify().await.unwrap();
    assert!(next.still_waits());
    guard.release().await.unwrap();
    timeout(SOON * 5, closed).await.unwrap();
    next.had_it(SOON * 5, &db).await;
}

#[test]
fn every_row_of_the_table_names_a_test_that_exists() {
    check_rows("faults.md", "Faults", |cell| cell.starts_with("the same"));
}

#[test]
fn every_row_of_the_table_of_poolers_names_a_test_that_exists_or_a_source() {
    check_rows("servers.md", "Poolers", |cell| cell.contains("](") || cell.contains("]["));
}

/// Checks the last cell of each row of the first table of a section.
fn check_rows(page: &str, section: &str, is_excused: impl Fn(&str) -> bool) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = fs::read_to_string(root.join("src/guide").join(page)).unwrap();
    let (_, section) = page.split_once(&format!("\n# {section}\n")).unwrap();
    let rows = section.lines().skip_while(|line| !line.starts_with("| "));
    let rows: Vec<_> = rows.take_while(|line| line.starts_with('|')).skip(2).collect();
    assert!(!rows.is_empty());
    for row in rows {
        let cell = row.trim_end_matches([' ', '|']).rsplit(" | ").next().unwrap();
        let names: Vec<_> = cell.split('`').filter(|name| name.contains("::")).collect();
        assert!(!names.is_empty() || is_excused(cell), "no test: {row}");
        for name in names {
            let (file, path) = name.split_once("::").unwrap();
            let test = path.rsplit("::").next().unwrap();
            // `cargo test` finds it by that name in both places.
            let found = ["tests/it", "tests/it/both"].iter().any(|dir| {
                let code = fs::read_to_string(root.join(dir).join(file).with_extension("rs"));
                code.is_ok_and(|code| code.contains(&format!("fn {test}()")))
            });
            assert!(found, "there is no {name}");
        }
    }
}
