//! One of many candidates leads, and every process can see which one it is.

use std::time::{Duration, Instant, SystemTime};

use pglock::{Election, Error, Lock, LockOptions, Loss};
use pglock_testkit::{Server, TestDb, advisory_locks, cancel_after};
use sqlx::{PgConnection, PgPool};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_stream::StreamExt;

use crate::support::{
    SOON, borrow_all, dropped_at, locks_are, no_locks, pool_of, quick_heartbeat, quick_pool,
    quickly_watched, random, spawn, terminate, unless_it_waits,
};

/// More polls than any call that does not wait can take.
const POLLS: usize = 200;

fn election(pool: &PgPool) -> Election {
    Election::new(pool, "billing").candidate("node-7")
}

/// Like `election`, but the session of the leader is monitored soon.
fn monitored_election(pool: &PgPool) -> Election {
    Election::new(&quick_heartbeat().on(pool).unwrap(), "billing").candidate("node-7")
}

/// Counts the sessions that show the name of a leader.
async fn names_shown(admin: &mut PgConnection) -> i64 {
    let count = "SELECT count(*) FROM pg_stat_activity \
         WHERE datname = current_database() AND application_name ~ ' [0-9]+@[0-9]{10} billing$'";
    sqlx::query_scalar(count).fetch_one(admin).await.unwrap()
}

#[tokio::test]
async fn one_leads_and_the_others_wait_for_their_turn() {
    let (_db, pool, mut admin) = TestDb::scene(3).await;
    let mut other = election(&pool);
    let leadership = election(&pool).campaign().await.unwrap();
    assert!(other.try_campaign().await.unwrap().is_none());
    assert!(!other.status().is_leader());

    let (next, ()) = tokio::join!(other.campaign(), async {
        locks_are(&mut admin, 2, SOON * 4).await;
        leadership.resign().await.unwrap();
    });
    let next = next.unwrap();
    assert!(election(&pool).try_campaign().await.unwrap().is_none());
    next.verify().await.unwrap();
    next.resign().await.unwrap();

    let tried = other.try_campaign().await.unwrap().expect("no candidate leads");
    drop(tried);
    no_locks(&mut admin).await;
    borrow_all(&pool).await;
}

#[tokio::test]
async fn terms_grow_from_leader_to_leader_and_over_a_restart() {
    let (server, db) = TestDb::with_server().await;
    let pools = [db.pool(2).await, db.pool(2).await];
    let mut last = 0;
    for turn in 0..20 {
        if turn == 10 {
            server.restart();
        }
        for pool in &pools {
            let leadership = election(pool).campaign().await.unwrap();
            assert!(leadership.term() > last, "{} after {last}", leadership.term());
            last = leadership.term();
            assert_eq!(leadership.fencing_token().await.unwrap(), last);
            leadership.resign().await.unwrap();
        }
    }
}

#[tokio::test]
async fn a_second_campaign_of_a_leader_has_the_same_term() {
    let (_db, pool, mut admin) = TestDb::scene(3).await;
    let mut election = election(&pool);
    let status = election.status();
    let first = election.campaign().await.unwrap();
    let leader = election.leader().await.unwrap();
    // The test sleeps until a new election would show another time of election.
    sleep(Duration::from_millis(1100)).await;

    let second = election.campaign().await.unwrap();
    let third = election.try_campaign().await.unwrap().expect("this candidate leads");
    assert_eq!([second.term(), third.term()], [first.term(); 2]);
    // A greater number for one of them would make a store refuse the writes of the others.
    assert_eq!(second.fencing_token().await.unwrap(), first.term());
    assert_eq!(election.leader().await.unwrap(), leader);
    locks_are(&mut admin, 1, SOON * 4).await;

    // The term ends when the last of its leaderships is dropped.
    drop(first);
    second.resign().await.unwrap();
    assert_eq!(status.term(), Some(third.term()));
    assert_eq!(election.leader().await.unwrap(), leader);
    let term = third.term();
    third.resign().await.unwrap();
    assert!(!status.is_leader());
    assert!(election.campaign().await.unwrap().term() > term);
}

#[tokio::test]
async fn a_status_is_false_as_soon_as_the_candidate_resigns() {
    let (_db, pool) = TestDb::with_pool(2).await;
    let mut election = election(&pool);
    let status = election.status();
    assert_eq!(status.term(), None);

    let leadership = election.campaign().await.unwrap();
    assert!(status.is_leader());
    assert_eq!(status.term(), Some(leadership.term()));
    drop(leadership);
    assert!(!status.is_leader());

    let leadership = election.campaign().await.unwrap();
    assert!(status.clone().is_leader());
    let mut resigning = Box::pin(leadership.resign());
    // Usually, the server has not answered yet.
    let resigned = cancel_after(1, &mut resigning).await;
    assert!(!status.is_leader());
    assert_eq!(status.term(), None);
    if resigned.is_none() {
        resigning.await.unwrap();
    }

    // A leadership does not need its `Election`, either.
    let leadership = election.campaign().await.unwrap();
    drop(election);
    assert!(status.is_leader());
    drop(leadership);
    assert!(!status.is_leader());
}

#[tokio::test]
async fn a_leader_that_lost_its_session_is_notified_and_its_status_is_false() {
    let (_db, pool, mut admin) = TestDb::scene(3).await;
    let mut election = monitored_election(&pool);
    let status = election.status();
    let leadership = election.campaign().await.unwrap();
    sleep(quickly_watched()).await;
    assert_eq!(leadership.while_held(async { 42 }).await.unwrap(), 42);

    let (loss, worked, ()) = tokio::join!(
        async {
            let loss = timeout(SOON * 5, leadership.lost()).await.unwrap();
            assert!(!status.is_leader(), "the loss is known");
            loss
        },
        timeout(SOON * 5, leadership.while_held(std::future::pending::<()>())),
        terminate(&mut admin, leadership.backend_pid()),
    );
    assert!(matches!(loss, Loss::Disconnected(_)), "{loss:?}");
    assert!(matches!(worked.unwrap(), Err(Error::Lost { .. })));
    assert!(leadership.is_lost());

    // The same candidate can be elected again, while the old leadership still lives.
    let again = election.campaign().await.unwrap();
    assert!(again.term() > leadership.term());
    assert_eq!(status.term(), Some(again.term()));
    assert!(matches!(leadership.resign().await, Err(Error::Lost { .. })));
    again.resign().await.unwrap();
}

/// The heartbeat's bound passes without a check of the session, because no task can run.
#[tokio::test]
async fn a_status_is_false_by_the_clock_alone() {
    let (_db, pool) = TestDb::with_pool(2).await;
    let mut election = monitored_election(&pool);
    let status = election.status();
    let leadership = election.campaign().await.unwrap();
    // This is longer than a leader is trusted without an answer, so the server has answered.
    let long = Duration::from_millis(3_400);
    sleep(long).await;
    assert!(status.is_leader());
    // This blocks the only thread of the runtime.
    std::thread::sleep(long);
    assert!(!status.is_leader());
    drop(leadership);
}

#[tokio::test]
async fn every_role_can_see_the_leader() {
    let (db, pool) = TestDb::with_pool(3).await;
    let mut election = election(&pool);
    assert_eq!(election.leader().await.unwrap(), None);

    let before = SystemTime::now() - Duration::from_secs(1);
    let leadership = election.campaign().await.unwrap();
    let other_pool = db.pool(1).await;
    let leader = Election::new(&other_pool, "billing").leader().await.unwrap().unwrap();
    assert_eq!(leader.name, "node-7");
    assert_eq!(leader.term, Some(leadership.term()));
    assert_eq!(leader.backend_pid, leadership.backend_pid());
    let since = leader.since.unwrap();
    assert!(before <= since && since <= SystemTime::now(), "{since:?} is not after {before:?}");
    assert_eq!(Election::new(&other_pool, "shipping").leader().await.unwrap(), None);

    leadership.resign().await.unwrap();
    assert_eq!(election.leader().await.unwrap(), None);
    // A candidate without a name of its own has the name of its process.
    let mut nameless = Election::new(&pool, "billing");
    let _leadership = nameless.campaign().await.unwrap();
    let leader = nameless.leader().await.unwrap().unwrap();
    assert_eq!(leader.name, format!("process-{}", std::process::id()));
    borrow_all(&other_pool).await;
}

#[tokio::test]
async fn a_pair_of_numbers_is_an_election_too() {
    let (_db, pool) = TestDb::with_pool(2).await;
    let mut election = Election::new(&pool, (-1, 7)).candidate("node-7");
    let _leadership = election.campaign().await.unwrap();
    assert_eq!(election.leader().await.unwrap().unwrap().name, "node-7");
    assert_eq!(Election::new(&pool, (7, -1)).leader().await.unwrap(), None);
}

#[tokio::test]
async fn a_leader_is_seen_with_its_address_by_a_role_with_that_privilege() {
    let server = Server::options().tcp().start();
    let db = TestDb::on(&server).await;
    let mut admin = db.admin().await;
    sqlx::raw_sql("CREATE ROLE nosy LOGIN").execute(&mut admin).await.unwrap();
    let tcp = server.tcp_options().database(db.name());
    let (over_tcp, over_socket) = (pool_of(tcp.clone(), 2).await, db.pool(2).await);
    let nosy = pool_of(tcp.username("nosy"), 1).await;
    let seen_by = async |pool: &PgPool| election(pool).leader().await.unwrap().unwrap();

    let leadership = election(&over_tcp).campaign().await.unwrap();
    let mut leader = seen_by(&over_socket).await;
    assert_eq!(leader.client_addr.take().as_deref(), Some("127.0.0.1"));
    // The leader's data agree in all but the address.
    assert_eq!(seen_by(&nosy).await, leader);
    leadership.resign().await.unwrap();

    let leadership = election(&over_socket).campaign().await.unwrap();
    let leader = seen_by(&over_tcp).await;
    assert_eq!(leader.client_addr, None);
    assert_eq!(leader.term, Some(leadership.term()));
}

#[tokio::test]
async fn a_name_that_the_server_cannot_show_is_shown_as_far_as_it_can() {
    let (_db, pool) = TestDb::with_pool(2).await;
    for (name, shown) in [
        ("", ""),
        ("two words @ home", "two words @ home"),
        ("it's \"mine\" \\ $1", "it's \"mine\" \\ $1"),
        ("café \0\n", "caf? ??"),
        (&"é".repeat(70), &"?".repeat(70)),
        (&"long-".repeat(20), &"long-".repeat(20)),
    ] {
        let mut election = Election::new(&pool, "billing").candidate(name);
        let leadership = election.campaign().await.unwrap();
        let leader = election.leader().await.unwrap().unwrap();
        assert_eq!(leader.term, Some(leadership.term()), "{name:?}");
        assert!(leader.since.is_some(), "{name:?}");
        assert!(shown.starts_with(&leader.name), "{name:?} shows as {:?}", leader.name);
        assert!(leader.name.len() >= shown.len().min(30), "{:?}", leader.name);
        leadership.resign().await.unwrap();
    }
}

#[tokio::test]
async fn another_programs_lock_is_a_leader_without_a_term() {
    let (db, pool) = TestDb::with_pool(2).await;
    let election = election(&pool);
    let others = pool_of(db.options().application_name("their program"), 1).await;
    let mut lock = Lock::new(&others, "billing");

    // A session that shares the lock keeps candidates from leading, and does not lead.
    let shared = lock.acquire_shared().await.unwrap();
    assert_eq!(election.leader().await.unwrap(), None);
    shared.release().await.unwrap();

    let guard = lock.acquire().await.unwrap();
    let leader = election.leader().await.unwrap().unwrap();
    assert_eq!(leader.name, "their program");
    assert_eq!((leader.term, leader.since), (None, None));
    assert_eq!(leader.backend_pid, guard.backend_pid());
    // Before its second query, an observer can't know that no term will follow.
    let told = timeout(SOON * 10, election.observe().changed()).await.unwrap();
    assert_eq!(told.unwrap(), Some(leader));
}

#[tokio::test]
async fn an_observer_returns_each_change_once() {
    let (_db, pool) = TestDb::with_pool(4).await;
    let (mut ada, mut bob) =
        ["ada", "bob"].map(|name| Election::new(&pool, "billing").candidate(name)).into();
    let mut observer = ada.observe();
    let mut next = async || {
        let told = timeout(SOON * 10, observer.changed()).await.unwrap().unwrap();
        told.map(|leader| (leader.name, leader.term))
    };
    assert_eq!(next().await, None);

    let leadership = ada.campaign().await.unwrap();
    let first = Some(("ada".to_owned(), Some(leadership.term())));
    assert_eq!(next().await, first);
    // The observer has no change to report. A dropped call does not lose a change, either.
    timeout(Duration::from_millis(1200), next()).await.unwrap_err();
    leadership.resign().await.unwrap();
    assert_eq!(next().await, None);

    let leadership = ada.campaign().await.unwrap();
    let second = Some(("ada".to_owned(), Some(leadership.term())));
    assert_ne!(first, second);
    assert_eq!(next().await, second);
    // The same leader has another term; the observer has not queried the server in between.
    leadership.resign().await.unwrap();
    let leadership = ada.campaign().await.unwrap();
    assert_eq!(next().await, Some(("ada".to_owned(), Some(leadership.term()))));
    leadership.resign().await.unwrap();
    let leadership = bob.campaign().await.unwrap();
    assert_eq!(next().await, Some(("bob".to_owned(), Some(leadership.term()))));
    drop(leadership);
}

/// An observer works with the combinators of another crate. The stream has no end.
#[tokio::test]
async fn an_observer_is_a_stream() {
    let (_db, pool) = TestDb::with_pool(3).await;
    let mut ada = Election::new(&pool, "billing").candidate("ada");
    let mut names = ada.observe().map(|told| told.unwrap().map(|leader| leader.name));
    let mut next = async || timeout(SOON * 10, names.next()).await.unwrap().unwrap();
    assert_eq!(next().await, None);
    let leadership = ada.campaign().await.unwrap();
    assert_eq!(next().await.as_deref(), Some("ada"));
    leadership.resign().await.unwrap();
    // A timeout while waiting for an item does not lose the item.
    timeout(Duration::ZERO, next()).await.unwrap_err();
    assert_eq!(next().await, None);
}

/// The test drops the whole observer, or only the call, after each number of polls.
#[tokio::test]
async fn an_observer_that_is_dropped_leaves_the_pool_its_connection() {
    let (db, pool) = TestDb::with_pool(1).await;
    dropped_at(5, async || {
        let mut dropped = 0;
        for polls in 1..POLLS {
            let mut observer = election(&pool).observe();
            drop(cancel_after(polls, observer.changed()).await);
            // The pool has all its connections while the observer is alive.
            borrow_all(&pool).await;
            drop(cancel_after(polls, observer.next()).await);
            drop(observer);
            borrow_all(&pool).await;
            if cancel_after(polls, election(&pool).leader()).await.is_some() {
                break;
            }
            dropped += 1;
        }
        dropped
    })
    .await;
    no_locks(&mut db.admin().await).await;
}

/// An observer that reports each error and continues queries the server no more often than without errors.
#[tokio::test]
async fn an_observer_pauses_after_an_error() {
    let pool = TestDb::new().await.pool(1).await;
    pool.close().await;
    let mut observer = election(&pool).observe();
    let started = Instant::now();
    for count in 0..3 {
        let error = observer.next().await.unwrap().unwrap_err();
        assert!(matches!(error, Error::PoolClosed { .. }), "{error:?}");
        assert!(started.elapsed() >= Duration::from_millis(500) * count);
    }
}

#[tokio::test]
async fn an_observer_goes_on_after_an_error() {
    let (server, db) = TestDb::with_server().await;
    let pool = quick_pool(&db).await;
    let mut observer = election(&pool).observe();
    assert_eq!(observer.changed().await.unwrap(), None);
    let mut election = election(&pool);
    server.kill();
    observer.changed().await.unwrap_err();
    server.restart();
    let elected = async {
        loop {
            // Opening a connection may take longer than the pool's timeout.
            if let Ok(leadership) = election.campaign().await {
                break leadership;
            }
        }
    };
    let _leadership = timeout(SOON * 20, elected).await.unwrap();
    let told = loop {
        // The pool may still hold connections from before the restart.
        if let Ok(told) = timeout(SOON * 10, observer.changed()).await.unwrap() {
            break told;
        }
    };
    assert_eq!(told.unwrap().name, "node-7");
}

/// Otherwise a lock on the leader's session would show its own name.
#[tokio::test]
async fn a_lock_of_the_leader_leaves_its_name_shown() {
    let (_db, pool, _) = TestDb::scene(2).await;
    let named = LockOptions::new().application_name("billing").on(&pool).unwrap();
    let mut election = Election::new(&named, "billing").candidate("node-7");
    let leadership = election.campaign().await.unwrap();
    let _more = Lock::new(&leadership, "another").acquire().await.unwrap();
    let leader = election.leader().await.unwrap().unwrap();
    assert_eq!((&*leader.name, leader.term), ("node-7", Some(leadership.term())));
}

/// Tests every way to end a term, on a pool whose application has a name, and on one whose application has none.
#[tokio::test]
async fn the_applications_own_name_is_put_back() {
    let mut names = JoinSet::new();
    for name in ["", "invoices", "it's \"mine\" \\ 1@2"] {
        names.spawn(name_is_put_back(name));
    }
    while let Some(name) = names.join_next().await {
        name.unwrap();
    }
}

async fn name_is_put_back(name: &str) {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    // The pool has one connection, which is held shortly, or three, one of which is polled.
    for (connections, held_for) in [(1, Duration::ZERO), (3, quickly_watched())] {
        let pool = pool_of(db.options().application_name(name), connections).await;
        for way in ["resign", "drop", "second resigns", "stop", "end", "drop run", "cancel"] {
            let pid = let_go(&pool, way, held_for, &mut admin).await;
            no_locks(&mut admin).await;
            // The pool returns the connection again once its name is restored, which takes a moment longer than the
            // release.
            let pids = names_are(&pool, name).await;
            assert_eq!(names_shown(&mut admin).await, 0, "{way}");
            assert!(pids.contains(&pid), "{way}: the connection was not given back");
        }
    }
}

/// Leads, and ends its term. Returns the backend that led.
async fn let_go(pool: &PgPool, way: &str, held_for: Duration, admin: &mut PgConnection) -> i32 {
    let mut election = monitored_election(pool);
    if way == "resign" || way == "drop" || way == "second resigns" {
        let leadership = election.campaign().await.unwrap();
        sleep(held_for).await;
        assert_eq!(names_shown(admin).await, 1);
        let pid = leadership.backend_pid();
        match way {
            "resign" => leadership.resign().await.unwrap(),
            "drop" => drop(leadership),
            _ => {
                let second = election.campaign().await.unwrap();
                drop(leadership);
                assert_eq!(names_shown(admin).await, 1);
                second.resign().await.unwrap();
            }
        }
        return pid;
    }
    if way == "cancel" {
        // The campaign is cancelled after every number of polls, until the candidate is elected.
        let mut polls = 0;
        let leadership = loop {
            polls += 1;
            assert!(polls < POLLS, "the campaign never ends");
            if let Some(elected) = cancel_after(polls, election.campaign()).await {
                break elected.unwrap();
            }
            no_locks(admin).await;
        };
        return leadership.backend_pid();
    }
    let (tell, told) = oneshot::channel();
    let (stop, stopped) = oneshot::channel::<()>();
    let mut tell = Some(tell);
    // In its second term, "end" stops, too.
    let mut stop = Some(stop);
    let run = election.run(async { drop(stopped.await) }, |leadership| {
        let again = tell.take().map(|tell| tell.send(leadership.backend_pid()).unwrap()).is_none();
        if way == "stop" || again {
            drop(stop.take());
        }
        async move {
            sleep(held_for).await;
            if way != "end" {
                std::future::pending::<()>().await;
            }
            Ok::<_, Error>(())
        }
    });
    if way == "drop run" {
        let led = async {
            let pid = told.await.unwrap();
            sleep(held_for).await;
            pid
        };
        return tokio::select! {
            ran = run => panic!("{ran:?}"),
            pid = timeout(SOON * 10, led) => pid.unwrap(),
        };
    }
    timeout(SOON * 10, run).await.unwrap().unwrap();
    told.await.unwrap()
}

/// Checks that all connections of the pool show the application's own name. Returns their backends.
async fn names_are(pool: &PgPool, name: &str) -> Vec<i32> {
    let pids = borrow_all(pool).await;
    let shown: Vec<String> = sqlx::query_scalar(
        "SELECT a.application_name FROM pg_catalog.pg_stat_get_activity(NULL) AS a
             WHERE a.pid OPERATOR(pg_catalog.=) ANY ($1)",
    )
    .bind(&pids)
    .fetch_all(pool)
    .await
    .unwrap();
    assert_eq!(shown, vec![name; pids.len()]);
    pids
}

#[tokio::test]
async fn a_name_is_put_back_on_a_connection_that_the_application_has_used() {
    let db = TestDb::new().await;
    let pool = pool_of(db.options().application_name("invoices"), 1).await;
    let leadership = election(&pool).campaign().await.unwrap();
    let mut conn = leadership.connection().await.unwrap();
    // The transaction has failed, and is left open.
    sqlx::raw_sql("BEGIN; SELECT 1 / 0").execute(&mut *conn).await.unwrap_err();
    drop(conn);
    leadership.resign().await.unwrap();
    names_are(&pool, "invoices").await;
}

/// Runs `call` on a fresh candidate and drops it after every number of polls until it completes, with a cold and with a
/// warm pool. After each run, only the `held` locks of others may be left. Repeats this until `call` was dropped at
/// `points` points in all.
#[expect(clippy::future_not_send, reason = "it runs where it is made")]
async fn dropped_at_every_poll(
    points: usize,
    held: usize,
    db: &TestDb,
    call: impl AsyncFn(&mut Election),
) {
    dropped_at(points, async || sweep(held, db, &call).await).await;
}

/// Returns the number of points at which the call was dropped.
async fn sweep(held: usize, db: &TestDb, call: impl AsyncFn(&mut Election)) -> usize {
    let mut admin = db.admin().await;
    let mut dropped = 0;
    for warm in [false, true] {
        for polls in 1.. {
            assert!(polls < POLLS, "the call never completes");
            let pool = pool_of(db.options().application_name("invoices"), 2).await;
            if warm {
                borrow_all(&pool).await;
            }
            let mut election = election(&pool);
            let call = Box::pin(call(&mut election));
            let outcome = unless_it_waits(held, db, cancel_after(polls, call)).await;

            assert!(!election.status().is_leader());
            locks_are(&mut admin, held, SOON * 4).await;
            names_are(&pool, "invoices").await;
            assert_eq!(names_shown(&mut admin).await, i64::try_from(held).unwrap());
            // The call has completed, or was dropped while it waited.
            if !matches!(outcome, Some(None)) {
                break;
            }
            dropped += 1;
        }
    }
    dropped
}

#[tokio::test]
async fn campaigning_dropped_at_every_poll() {
    let db = TestDb::new().await;
    let campaign = async |election: &mut Election| drop(election.campaign().await.unwrap());
    let try_campaign = async |election: &mut Election| drop(election.try_campaign().await.unwrap());
    let resign = async |election: &mut Election| {
        election.campaign().await.unwrap().resign().await.unwrap();
    };
    dropped_at_every_poll(3, 0, &db, campaign).await;
    dropped_at_every_poll(3, 0, &db, try_campaign).await;
    dropped_at_every_poll(3, 0, &db, resign).await;

    let pool = db.pool(1).await;
    let _leadership = election(&pool).campaign().await.unwrap();
    dropped_at_every_poll(2, 1, &db, campaign).await;
    dropped_at_every_poll(2, 1, &db, try_campaign).await;
}

#[tokio::test]
async fn running_dropped_at_every_poll() {
    let db = TestDb::new().await;
    let one_term = async |election: &mut Election| {
        let (stop, stopped) = oneshot::channel::<()>();
        let mut stop = Some(stop);
        let run = election.run(async { drop(stopped.await) }, |_leadership| {
            let stop = stop.take();
            async {
                tokio::task::yield_now().await;
                drop(stop);
                Ok::<_, Error>(())
            }
        });
        run.await.unwrap();
    };
    dropped_at_every_poll(4, 0, &db, one_term).await;
}

#[tokio::test]
async fn looking_dropped_at_every_poll() {
    let (db, pool) = TestDb::with_pool(1).await;
    let _leadership = election(&pool).campaign().await.unwrap();
    let leader = async |election: &mut Election| {
        assert_eq!(election.leader().await.unwrap().unwrap().name, "node-7");
    };
    let changed = async |election: &mut Election| {
        let told = election.observe().changed().await.unwrap();
        assert_eq!(told.unwrap().name, "node-7");
    };
    dropped_at_every_poll(2, 1, &db, leader).await;
    dropped_at_every_poll(2, 1, &db, changed).await;
}

/// Candidates that stop at random points do not keep the others from being elected.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn never_two_lead_while_others_give_up_at_random() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let pool = pool_of(db.options().application_name("invoices"), 6).await;
    // A leader takes the post only if the post is free.
    let post = "CREATE TABLE post AS SELECT NULL::int8 AS term; GRANT ALL ON post TO PUBLIC";
    sqlx::raw_sql(post).execute(&mut admin).await.unwrap();
    let mut tasks = JoinSet::new();
    for seed in 0..5_u64 {
        let (pool, mut election) = (pool.clone(), election(&pool));
        tasks.spawn(async move {
            let mut state = seed + 1;
            let mut led = 0;
            while led < 20 {
                let random = random(&mut state);
                let polls =
                    if random.is_multiple_of(3) { POLLS } else { usize::try_from(random % 12).unwrap() };
                let wait = Duration::from_millis(random / 16 % 100);
                let campaign = timeout(wait, cancel_after(polls + 1, election.campaign()));
                let Ok(Some(elected)) = campaign.await else { continue };
                let leadership = elected.unwrap();
                let term = leadership.term();
                let mut conn = leadership.connection().await.unwrap();
                for (now, next) in [(None, Some(term)), (Some(term), None)] {
                    let took =
                        sqlx::query("UPDATE public.post SET term = $2
                                     WHERE coalesce(term, 0) OPERATOR(pg_catalog.=) coalesce($1, 0)")
                            .bind(now)
                            .bind(next)
                            .execute(&mut *conn)
                            .await
                            .unwrap();
                    assert_eq!(took.rows_affected(), 1, "two lead");
                }
                drop(conn);
                led += 1;
                if random.is_multiple_of(2) {
                    leadership.resign().await.unwrap();
                }
            }
        });
        drop(pool);
    }
    while let Some(finished) = tasks.join_next().await {
        finished.unwrap();
    }
    no_locks(&mut admin).await;
    names_are(&pool, "invoices").await;
    assert_eq!(advisory_locks(&mut admin).await, []);
}

#[tokio::test]
async fn a_leadership_outlives_its_candidate_and_ends_anywhere() {
    let (_db, pool, mut admin) = TestDb::scene(1).await;
    // The handle is dropped first, and its leadership is still held.
    let leadership = election(&pool).campaign().await.unwrap();
    leadership.verify().await.unwrap();
    std::thread::spawn(move || drop(leadership)).join().unwrap();
    no_locks(&mut admin).await;
    names_are(&pool, "").await;
}

/// A hundred candidates must send fewer than 10,000 statements an hour. A wait sends two for each slice.
#[tokio::test]
async fn a_candidate_waits_in_long_slices() {
    let (_db, pool, mut admin) = TestDb::scene(2).await;
    let leading = Election::new(&pool, "billing").campaign().await.unwrap();
    let mut other = Election::new(&pool, "billing");
    let waiting = spawn(async move { other.campaign().await });
    locks_are(&mut admin, 2, SOON * 4).await;
    let limit: String = sqlx::query_scalar(
        "SELECT substring(query FROM 'lock_timeout[^0-9]*([0-9]+)') FROM pg_stat_activity \
         WHERE datname = current_database() AND wait_event_type = 'Lock' AND wait_event = 'advisory'",
    )
    .fetch_one(&mut admin)
    .await
    .unwrap();
    let limit: u32 = limit.parse().unwrap();
    assert!((99_000..=110_000).contains(&limit), "{limit} ms");
    waiting.abort();
    leading.resign().await.unwrap();
}
