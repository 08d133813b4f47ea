//! Names of locks that DBAs see: `LockOptions::application_name`.

use std::time::Duration;

use pglock::{Election, Key, Lock, LockManager, LockOptions, MultiLock, Semaphore, inspect};
use pglock_testkit::{TestDb, eventually};
use sqlx::{PgConnection, PgPool};
use tokio::time::{sleep, timeout};

use crate::in_line::{line_up, until_handed_off};
use crate::support::{
    SOON, has_waiter, no_locks, pool_of, prove_exclusion, soon, spawn, waits_in_vain,
};

const KEY: &str = "nightly-report";

/// The application names of the sessions of the database that hold or await advisory locks, in order.
async fn shown(admin: &mut PgConnection) -> Vec<String> {
    let names = "SELECT DISTINCT a.application_name COLLATE \"C\" FROM pg_locks l \
         JOIN pg_stat_activity a USING (pid) JOIN pg_database d ON d.oid = l.database \
         WHERE l.locktype = 'advisory' AND d.datname = current_database() ORDER BY 1";
    sqlx::query_scalar(names).fetch_all(admin).await.unwrap()
}

/// A pool of one connection, whose application has a name of its own.
async fn pool_named(db: &TestDb, name: &str) -> PgPool {
    pool_of(db.options().application_name(name), 1).await
}

/// Waits until the pool's connection shows the application's own name again.
async fn own_name_is_back(pool: &PgPool, name: &str) {
    let back = async {
        loop {
            let own = sqlx::query_scalar::<_, String>("SELECT current_setting('application_name')");
            if own.fetch_one(pool).await.unwrap() == name {
                return;
            }
            sleep(Duration::from_millis(2)).await;
        }
    };
    assert!(timeout(soon() * 4, back).await.is_ok(), "the name is not put back");
}

#[tokio::test]
async fn a_lock_shows_its_name_while_it_is_held_and_while_it_is_waited_for() {
    let db = TestDb::new().await;
    prove_exclusion(&db).await;
    let mut admin = db.admin().await;
    for own in ["", "it's \"mine\" \\"] {
        let (pool, other) = (pool_named(&db, own).await, pool_named(&db, own).await);
        let billing = LockOptions::new().application_name("billing").on(&pool).unwrap();
        let shipping = LockOptions::new().application_name("shipping").on(&other).unwrap();
        let holder = Lock::new(&billing, KEY).acquire().await.unwrap();
        assert_eq!(shown(&mut admin).await, ["billing nightly-report"]);

        let mut lock = Lock::new(&shipping, KEY);
        let waiting = spawn(async move { lock.acquire().await.unwrap() });
        has_waiter(&mut admin).await;
        let both = ["billing nightly-report", "shipping nightly-report"];
        assert_eq!(shown(&mut admin).await, both);

        holder.release().await.unwrap();
        let next = waiting.await.unwrap();
        assert_eq!(shown(&mut admin).await, ["shipping nightly-report"]);
        own_name_is_back(&pool, own).await;
        next.release().await.unwrap();
        own_name_is_back(&other, own).await;

        // This wait times out.
        let holder = Lock::new(&billing, KEY).acquire().await.unwrap();
        let mut lock = Lock::new(&shipping, KEY);
        waits_in_vain(SOON / 10, async |time| lock.try_acquire_for(time).await).await;
        own_name_is_back(&other, own).await;
        drop(holder);
        no_locks(&mut admin).await;
    }
}

#[tokio::test]
async fn a_session_shows_the_lock_that_was_requested_last() {
    let db = TestDb::new().await;
    prove_exclusion(&db).await;
    let mut admin = db.admin().await;
    let pool = pool_named(&db, "invoices").await;
    let named = LockOptions::new().application_name("billing").on(&pool).unwrap();
    let first = Lock::new(&named, "invoice-17").acquire().await.unwrap();
    let second = Lock::new(&first, 42).acquire().await.unwrap();
    assert_eq!(shown(&mut admin).await, ["billing 42"]);
    drop(second);
    let third = Lock::new(&first, (1, -2)).acquire().await.unwrap();
    assert_eq!(shown(&mut admin).await, ["billing (1, -2)"]);
    drop((first, third));
    no_locks(&mut admin).await;
    own_name_is_back(&pool, "invoices").await;
}

/// The tasks of a process hand the lock off to each other, with the connection.
#[tokio::test]
async fn a_lock_that_is_handed_off_still_shows_its_name() {
    let (db, pool, mut admin) = TestDb::scene(6).await;
    prove_exclusion(&db).await;
    let named = LockOptions::new().application_name("billing").on(&pool).unwrap();
    until_handed_off(async || {
        let (mut first, mut second) = (Lock::new(&named, KEY), Lock::new(&named, KEY));
        let (before, behind) = line_up(&pool, &mut admin, &mut first, &mut second).await;
        let pid = before.backend_pid();
        drop(before);
        let guard = behind.await.unwrap();
        assert_eq!(shown(&mut admin).await, ["billing nightly-report"]);
        guard.backend_pid() == pid
    })
    .await;
    let left = "SELECT count(*) FROM pg_stat_activity \
         WHERE datname = current_database() AND application_name LIKE 'billing%'";
    eventually("the own names are back", SOON * 20, async || {
        sqlx::query_scalar::<_, i64>(left).fetch_one(&pool).await.unwrap() == 0
    })
    .await;
}

#[tokio::test]
async fn other_handles_show_their_names_too() {
    let (db, pool, mut admin) = TestDb::scene(4).await;
    prove_exclusion(&db).await;
    let named = LockOptions::new().application_name("billing").on(&pool).unwrap();

    let both = MultiLock::new(&named, [17, 4]).acquire().await.unwrap();
    assert_eq!(shown(&mut admin).await, ["billing 4"]);
    both.release().await.unwrap();

    let permit = Semaphore::new(&named, "printers", 3).unwrap().acquire().await.unwrap();
    assert_eq!(shown(&mut admin).await, ["billing printers, permit 0"]);
    let locks = inspect::locks(&pool).await.unwrap();
    assert!(locks.iter().any(|lock| lock.key.name() == Some("printers, permit 0")), "{locks:?}");
    permit.release().await.unwrap();

    let manager = LockManager::new(&named);
    let held = Lock::new(&manager, KEY).acquire().await.unwrap();
    assert_eq!(shown(&mut admin).await, ["billing"]);
    held.release().await.unwrap();
    drop(manager);

    let leadership =
        Election::new(&named, "scheduler").candidate("node-7").campaign().await.unwrap();
    let term = leadership.term();
    let name = shown(&mut admin).await.pop().unwrap();
    assert!(name.starts_with(&format!("node-7 {term}@")), "{name}");
}

/// A name in `application_name` is shown if its hash is the key, whatever else the session's application name contains.
#[tokio::test]
async fn a_name_that_a_session_shows_is_checked() {
    let db = TestDb::new().await;
    prove_exclusion(&db).await;
    let (mut admin, long) = (db.admin().await, "n".repeat(70));
    for (application, key, known) in [
        ("nightly billing", "nightly report", Some("nightly report")),
        ("billing", "Report, weekly", Some("Report, weekly")),
        ("a name that is too long to be shown beside the key", KEY, Some(KEY)),
        ("Abrechnung für März", KEY, Some(KEY)),
        ("billing", "grün", None),
        ("billing", &long, None),
    ] {
        let pool = db.pool(1).await;
        let named = LockOptions::new().application_name(application).on(&pool).unwrap();
        let held = Lock::new(&named, key).acquire().await.unwrap();
        let lock = inspect::locks(&mut admin).await.unwrap().remove(0);
        assert_eq!((lock.key.name(), &lock.key), (known, &Key::from(key)));
        let name = lock.session.unwrap().application_name.unwrap();
        assert!(name.len() <= 63 && name.is_ascii(), "{name}");
        held.release().await.unwrap();
    }

    let liar = pool_named(&db, "billing nightly-report").await;
    let held = Lock::new(&liar, "something else").acquire().await.unwrap();
    let program = pool_named(&db, "pglock run nightly-report sh@db-1").await;
    let run = Lock::new(&program, KEY).acquire().await.unwrap();
    let locks = inspect::locks(&mut admin).await.unwrap();
    let name_of = |pid: i32| {
        let is_of = |lock: &&inspect::LockInfo| lock.session.as_ref().unwrap().backend_pid == pid;
        locks.iter().find(is_of).unwrap().key.name()
    };
    assert_eq!(name_of(held.backend_pid()), None);
    assert_eq!(name_of(run.backend_pid()), Some(KEY));
}
