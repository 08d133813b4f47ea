//! A candidate that runs campaigns, leads, steps down, and campaigns again.

use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use pglock::{Election, Error, LeaderState, Leadership, Loss};
use pglock_testkit::{TestDb, advisory_locks, eventually};
use sqlx::PgPool;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::support::{SOON, locks_are, no_locks, quick_heartbeat, quick_pool, report, terminate};

fn election(pool: &PgPool) -> Election {
    Election::new(pool, "billing").candidate("node-7")
}

/// A future that leads until it is dropped.
async fn lead() -> Result<(), Error> {
    std::future::pending().await
}

#[tokio::test]
async fn all_lead_in_turn_until_they_are_stopped() {
    const CANDIDATES: usize = 3;
    const TURNS: usize = 3;

    let db = TestDb::new().await;
    let admin = Arc::new(tokio::sync::Mutex::new(db.admin().await));
    let inside = Arc::new(AtomicBool::new(false));
    let terms = Arc::new(Mutex::new(Vec::new()));
    let (stop, stopped) = watch::channel(false);
    let (led, mut turns) = mpsc::unbounded_channel();
    let mut candidates = JoinSet::new();
    for candidate in 0..CANDIDATES {
        let mut election = election(&db.pool(2).await);
        let (inside, terms, led) = (Arc::clone(&inside), Arc::clone(&terms), led.clone());
        let admin = Arc::clone(&admin);
        let mut stopped = stopped.clone();
        candidates.spawn(async move {
            let stop = async move { drop(stopped.wait_for(|stop| *stop).await) };
            let run = election.run(stop, |leadership| {
                let (inside, terms, led) = (Arc::clone(&inside), Arc::clone(&terms), led.clone());
                let admin = Arc::clone(&admin);
                async move {
                    assert!(!inside.swap(true, Ordering::SeqCst), "two lead");
                    terms.lock().unwrap().push(leadership.term());
                    // The other candidates are in the queue.
                    locks_are(&mut *admin.lock().await, CANDIDATES, SOON * 10).await;
                    // The term is long enough for no pause to follow.
                    sleep(Duration::from_millis(1050)).await;
                    assert!(inside.swap(false, Ordering::SeqCst));
                    led.send(candidate).unwrap();
                    Ok::<_, Error>(())
                }
            });
            run.await
        });
    }
    let mut each = [0; CANDIDATES];
    while each.iter().any(|&turns| turns < TURNS) {
        let candidate = timeout(SOON * 30, turns.recv()).await.unwrap().unwrap();
        *each.get_mut(candidate).unwrap() += 1;
        // A candidate that resigns queues behind the others.
        let (least, most) = (each.iter().min().unwrap(), each.iter().max().unwrap());
        assert!(most - least <= 1, "{each:?}");
    }
    stop.send(true).unwrap();
    while let Some(finished) = candidates.join_next().await {
        finished.unwrap().unwrap();
    }
    no_locks(&mut *admin.lock().await).await;
    let terms = terms.lock().unwrap();
    assert!(terms.is_sorted_by(|one, next| one < next), "{terms:?}");
}

#[tokio::test]
async fn stopping_ends_a_campaign() {
    let (_db, pool, mut admin) = TestDb::scene(3).await;
    let leadership = election(&pool).campaign().await.unwrap();
    let mut election = election(&pool);
    let (stop, stopped) = oneshot::channel::<()>();
    let (ran, ()) = tokio::join!(
        election.run(async { drop(stopped.await) }, |_| async {
            assert!(pool.is_closed(), "another candidate leads");
            Ok::<_, Error>(())
        }),
        async {
            locks_are(&mut admin, 2, SOON * 4).await;
            drop(stop);
        }
    );
    ran.unwrap();
    locks_are(&mut admin, 1, SOON * 4).await;
    leadership.verify().await.unwrap();
}

#[tokio::test]
async fn stopping_ends_what_leads_and_resigns() {
    let (_db, pool, mut admin) = TestDb::scene(1).await;
    let mut election = election(&pool);
    let status = election.status();
    let (stop, stopped) = oneshot::channel::<()>();
    let counts = Counts::default();
    let mut stop = Some(stop);
    let run = election.run(async { drop(stopped.await) }, |_| {
        drop(stop.take());
        let running = counts.begin();
        async move {
            let led = lead().await;
            drop(running);
            led
        }
    });
    timeout(SOON * 5, run).await.unwrap().unwrap();
    assert!(!counts.run());
    assert!(!status.is_leader());
    // The candidate has already resigned when `run` returns.
    assert_eq!(advisory_locks(&mut admin).await, []);
    eventually("the pool has it back", SOON * 10, || async { pool.num_idle() == 1 }).await;
}

#[tokio::test]
async fn a_stopped_candidate_does_not_campaign() {
    let (_db, pool) = TestDb::with_pool(1).await;
    let lead = |_| async { Err("it leads") };
    election(&pool).run(std::future::ready(()), lead).await.unwrap();
}

/// Counts the leading futures that have begun and ended, and checks that no two run at once.
#[derive(Clone, Default)]
struct Counts {
    begun: Arc<AtomicUsize>,
    ended: Arc<AtomicUsize>,
}

impl Counts {
    fn begin(&self) -> Running {
        let ended = self.ended();
        assert_eq!(self.begun.fetch_add(1, Ordering::SeqCst), ended, "the one before still runs");
        Running { counts: self.clone(), ends_after: Duration::ZERO }
    }

    fn run(&self) -> bool {
        self.begun.load(Ordering::SeqCst) > self.ended()
    }

    fn ended(&self) -> usize {
        self.ended.load(Ordering::SeqCst)
    }
}

/// A leading future that runs until it is dropped, and may take some time to end.
struct Running {
    counts: Counts,
    ends_after: Duration,
}

impl Drop for Running {
    fn drop(&mut self) {
        std::thread::sleep(self.ends_after);
        self.counts.ended.fetch_add(1, Ordering::SeqCst);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_loss_what_leads_has_ended_before_the_next_campaign_begins() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let configured = quick_heartbeat().on(&db.pool(3).await).unwrap();
    let mut election = Election::new(&configured, "billing").candidate("node-7");
    let counts = Counts::default();
    let (told, mut leads) = mpsc::unbounded_channel();
    let mut tasks = JoinSet::new();
    let there = counts.clone();
    tasks.spawn(async move {
        let run = election.run(std::future::pending(), |leadership| {
            let mut running = there.begin();
            running.ends_after = Duration::from_millis(300);
            told.send((leadership.backend_pid(), leadership.term())).unwrap();
            async move {
                let led = lead().await;
                drop(running);
                led
            }
        });
        run.await
    });
    let mut last = 0;
    for turn in 0..3 {
        let (pid, term) = timeout(SOON * 10, leads.recv()).await.unwrap().unwrap();
        assert!(term > last);
        last = term;
        // By then, the session is monitored, and no pause follows a term that was longer than a second.
        sleep(SOON * 11 / 10).await;
        assert!(counts.run());
        terminate(&mut admin, pid).await;
        let started = Instant::now();
        while counts.ended() == turn {
            let locks = advisory_locks(&mut admin).await;
            if counts.ended() == turn {
                // The only lock left is that of the terminated session.
                assert!(locks.iter().all(|lock| lock.pid == pid), "campaigns too early");
            }
            assert!(started.elapsed() < SOON * 10, "the loss was not told");
        }
    }
    tasks.shutdown().await;
    no_locks(&mut admin).await;
}

/// Leaderships of which the test keeps a clone, as a careless program does.
type Kept = Arc<Mutex<Vec<Arc<Leadership>>>>;

async fn is_closed(kept: &Kept) {
    let leadership = kept.lock().unwrap().pop().unwrap();
    assert!(leadership.is_lost());
    assert!(matches!(leadership.lost().await, Loss::Released));
    assert!(matches!(leadership.verify().await, Err(Error::Lost { .. })));
}

#[tokio::test]
async fn a_clone_that_somebody_keeps_is_lost_when_the_turn_is_over() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let mut election = election(&db.pool(3).await);
    let status = election.status();
    let kept = Kept::default();
    let (next, elected) = oneshot::channel();
    let mut next = Some(next);
    let mut turns = 0;
    let run = election.run(std::future::pending(), |leadership| {
        turns += 1;
        kept.lock().unwrap().push(Arc::clone(&leadership));
        let next = if turns == 2 { next.take() } else { None };
        async move {
            let Some(next) = next else { return Ok(()) };
            next.send(leadership.term()).unwrap();
            lead().await
        }
    });
    let second = async {
        let term = elected.await.unwrap();
        assert_eq!(status.term(), Some(term));
        let (first, second) = {
            let kept = kept.lock().unwrap();
            let [first, second] = kept.as_slice() else { panic!("{kept:?}") };
            (Arc::clone(first), Arc::clone(second))
        };
        assert!(first.is_lost() && !second.is_lost());
        assert!(first.term() < second.term());
        second.verify().await.unwrap();
    };
    tokio::select! {
        ran = run => panic!("{ran:?}"),
        checked = timeout(SOON * 10, second) => checked.unwrap(),
    }
    // The future was dropped, and the clone is still alive.
    assert!(!status.is_leader());
    is_closed(&kept).await;
    no_locks(&mut admin).await;
}

#[tokio::test]
async fn a_panic_resigns_and_goes_on() {
    let (_db, pool, mut admin) = TestDb::scene(1).await;
    let kept = Kept::default();
    for synchronous in [false, true] {
        let (mut election, there) = (election(&pool), Arc::clone(&kept));
        let status = election.status();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let lead = move |leadership| {
                there.lock().unwrap().push(leadership);
                assert!(!synchronous, "as the test demands");
                async move {
                    assert!(synchronous, "as the test demands");
                    Ok::<_, Error>(())
                }
            };
            election.run(std::future::pending(), lead).await
        });
        let ended = timeout(SOON * 10, tasks.join_next()).await.unwrap().unwrap();
        assert!(ended.unwrap_err().is_panic());
        assert!(!status.is_leader());
        is_closed(&kept).await;
        no_locks(&mut admin).await;
        eventually("the pool has it back", SOON * 10, || async { pool.num_idle() == 1 }).await;
    }
}

#[tokio::test]
async fn a_caught_panic_leaves_a_candidate_that_can_run_again() {
    use std::future::poll_fn;
    use std::panic::catch_unwind;
    use std::pin::pin;
    use std::task::Poll;

    let db = TestDb::new().await;
    let mut election = election(&db.pool(1).await);
    {
        let mut run = pin!(election.run(std::future::pending(), |_| async {
            assert!(db.name().is_empty(), "as asked");
            Ok::<_, Error>(())
        }));
        let caught = poll_fn(|cx| match catch_unwind(AssertUnwindSafe(|| run.as_mut().poll(cx))) {
            Ok(Poll::Pending) => Poll::Pending,
            Ok(Poll::Ready(ran)) => panic!("{ran:?}"),
            Err(_) => Poll::Ready(()),
        });
        timeout(SOON * 10, caught).await.unwrap();
    }
    election.campaign().await.unwrap().resign().await.unwrap();
}

#[tokio::test]
async fn dropping_the_future_ends_what_leads_and_resigns() {
    let (_db, pool, mut admin) = TestDb::scene(1).await;
    let mut election = election(&pool);
    let counts = Counts::default();
    let (told, leads) = oneshot::channel();
    let mut told = Some(told);
    let run = election.run(std::future::pending(), |_| {
        told.take().map(|told| told.send(()));
        let running = counts.begin();
        async move {
            let led = lead().await;
            drop(running);
            led
        }
    });
    tokio::select! {
        ran = run => panic!("{ran:?}"),
        led = timeout(SOON * 10, leads) => led.unwrap().unwrap(),
    }
    assert!(!counts.run());
    no_locks(&mut admin).await;
    eventually("the pool has it back", SOON * 10, || async { pool.num_idle() == 1 }).await;
}

#[tokio::test]
async fn what_passes_is_tried_again() {
    let (server, db) = TestDb::with_server().await;
    let mut election = election(&quick_pool(&db).await);
    let (told, mut leads) = mpsc::unbounded_channel();
    let run = election.run(std::future::pending(), |leadership| {
        told.send(leadership.term()).unwrap();
        lead()
    });
    let restarts = async {
        let first = leads.recv().await.unwrap();
        server.restart();
        let second = leads.recv().await.unwrap();
        // The server is down for long enough that more than one campaign fails.
        server.kill();
        sleep(Duration::from_millis(2500)).await;
        server.restart();
        let third = leads.recv().await.unwrap();
        assert!(first < second && second < third, "{first} {second} {third}");
    };
    tokio::select! {
        ran = run => panic!("{ran:?}"),
        restarted = timeout(SOON * 60, restarts) => restarted.unwrap(),
    }
}

#[tokio::test]
async fn what_does_not_pass_is_returned() {
    let (db, pool) = TestDb::with_pool(1).await;
    let mut election = election(&pool);
    let turns = AtomicUsize::new(0);
    let run = election.run(std::future::pending(), |_| {
        turns.fetch_add(1, Ordering::SeqCst);
        // The pool is closed as soon as `close` is called, though the close waits for the connection that leads.
        let closing = pool.close();
        async move {
            drop(timeout(Duration::from_millis(10), closing).await);
            Ok::<_, Error>(())
        }
    });
    let error = timeout(SOON * 10, run).await.unwrap().unwrap_err();
    assert!(matches!(error, Error::PoolClosed { .. }), "{error:?}");
    assert!(!error.is_transient());
    assert_eq!(turns.load(Ordering::SeqCst), 1);
    no_locks(&mut db.admin().await).await;
}

#[tokio::test]
async fn a_leader_that_fails_pauses_and_reports_its_error() {
    let (_db, pool) = TestDb::with_pool(3).await;
    let mut failing = election(&pool);
    let status = failing.status();
    let terms = Mutex::new(Vec::new());
    let started = Instant::now();
    let run = failing.run(sleep(Duration::from_millis(5500)), |_| {
        terms.lock().unwrap().push(Instant::now());
        async { Err("the mail server refuses connections") }
    });
    let watched = async {
        let mut changes = status.clone();
        let (error, since) = loop {
            if let LeaderState::Failing { error, since, .. } = changes.changed().await {
                break (error, since);
            }
        };
        sleep(Duration::from_millis(200)).await;
        assert!(matches!(&error, Error::LeaderFailed { .. }));
        // The failed candidate pauses, so another candidate is elected.
        let other = election(&pool).try_campaign().await.unwrap().expect("no candidate leads");
        sleep(Duration::from_secs(2)).await;
        // The candidate now waits for the other one, so it does not count as failing any more.
        assert!(matches!(status.state(), LeaderState::Waiting), "{:?}", status.state());
        assert!(since >= started && since.elapsed() > Duration::from_secs(2));
        other.resign().await.unwrap();
    };
    let (ran, ()) = tokio::join!(run, watched);
    let error = ran.unwrap_err();
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert_eq!(source, "the mail server refuses connections");
    assert!(!error.is_transient());
    let terms = terms.into_inner().unwrap();
    // The pauses are at least one second, then two.
    let pauses: Vec<_> = terms.array_windows().map(|[one, next]| *next - *one).collect();
    report(format_args!("{pauses:?}"));
    assert!((2..=3).contains(&terms.len()), "{pauses:?}");
    let least = [1, 2].map(Duration::from_secs);
    assert!(pauses.iter().zip(least).all(|(pause, least)| *pause >= least), "{pauses:?}");
    assert!(matches!(status.state(), LeaderState::Idle));
}

#[tokio::test]
async fn a_leader_is_stopped_gracefully() {
    let (_db, pool, mut admin) = TestDb::scene(1).await;
    for (grace, finishes) in [(SOON * 30, true), (Duration::from_millis(100), false)] {
        let (stop, stopped) = oneshot::channel::<()>();
        let mut stop = Some(stop);
        let steps = AtomicUsize::new(0);
        let mut election = election(&pool).grace(grace);
        let run = election.run(async { drop(stopped.await) }, |leadership| {
            let (stop, steps) = (stop.take(), &steps);
            async move {
                assert!(!leadership.is_stopping());
                drop(stop);
                leadership.stopping().await;
                assert!(leadership.is_stopping());
                steps.fetch_add(1, Ordering::SeqCst);
                // The candidate still leads.
                leadership.verify().await.unwrap();
                if !finishes {
                    lead().await?;
                }
                sleep(Duration::from_millis(50)).await;
                steps.fetch_add(1, Ordering::SeqCst);
                Err::<(), Box<dyn std::error::Error + Send + Sync>>("as asked".into())
            }
        });
        let ran = timeout(SOON * 10, run).await.unwrap();
        assert_eq!(steps.load(Ordering::SeqCst), 1 + usize::from(finishes));
        assert_eq!(ran.is_err(), finishes, "{ran:?}");
        assert_eq!(advisory_locks(&mut admin).await, []);
    }
}

/// A service manager asks a service to end, and the service only closes its pool.
#[tokio::test]
async fn closing_the_pool_ends_a_leader_a_candidate_an_observer_and_a_pause() {
    let db = TestDb::new().await;
    let (pool, other) = (db.pool(4).await, db.pool(2).await);
    let leads = Arc::new(tokio::sync::Notify::new());
    let mut tasks = JoinSet::new();
    let (mut leader, there) = (election(&pool), Arc::clone(&leads));
    tasks.spawn(async move {
        let lead = |_| {
            there.notify_one();
            lead()
        };
        leader.run(std::future::pending(), lead).await
    });
    timeout(SOON * 10, leads.notified()).await.unwrap();
    let mut candidate = election(&pool);
    tasks.spawn(async move { candidate.run(std::future::pending(), |_| lead()).await });
    let mut pausing = Election::new(&pool, "another");
    tasks.spawn(async move {
        // The third pause takes at least four seconds.
        let fail = |_| async { Err("as asked") };
        pausing.run(std::future::pending(), fail).await
    });
    let mut observer = Election::new(&pool, "nothing").observe();
    tasks.spawn(async move {
        while observer.changed().await?.is_none() {}
        Ok(())
    });
    locks_are(&mut db.admin().await, 2, SOON * 10).await;
    sleep(Duration::from_millis(6500)).await;

    let started = Instant::now();
    timeout(SOON * 10, pool.close()).await.unwrap();
    while let Some(ended) = timeout(SOON * 10, tasks.join_next()).await.unwrap() {
        let error = ended.unwrap().unwrap_err();
        let closed = matches!(error, Error::PoolClosed { .. });
        assert!(closed, "{error:?}");
    }
    let took = started.elapsed();
    report(format_args!("closed after {took:?}"));
    assert!(took < SOON * 2, "{took:?}");
    drop(election(&other).try_campaign().await.unwrap().expect("it was not resigned"));
}

#[tokio::test]
async fn a_status_can_be_awaited() {
    let (server, db) = TestDb::with_server().await;
    let pool = quick_pool(&db).await;
    let first = election(&pool).campaign().await.unwrap();
    let mut candidate = election(&pool);
    let mut status = candidate.status();
    assert!(matches!(status.state(), LeaderState::Idle));
    let watched = async {
        let mut next = async || timeout(SOON * 20, status.changed()).await.unwrap();
        assert!(matches!(next().await, LeaderState::Waiting));
        first.resign().await.unwrap();
        let term = loop {
            if let LeaderState::Leading { term, .. } = next().await {
                break term;
            }
        };
        // The loss is reported without any action of the candidate.
        server.kill();
        let state = next().await;
        assert!(!matches!(state, LeaderState::Leading { .. }), "{state:?}");
        let mut state = state;
        while !matches!(state, LeaderState::Failing { .. }) {
            state = next().await;
        }
        server.restart();
        loop {
            match next().await {
                LeaderState::Leading { term: later, .. } => return assert!(later > term),
                LeaderState::Failing { .. } | LeaderState::Waiting => {}
                state @ (LeaderState::Idle | _) => panic!("{state:?}"),
            }
        }
    };
    tokio::select! {
        ran = candidate.run(std::future::pending(), |_| lead()) => panic!("{ran:?}"),
        () = watched => {}
    }
    assert!(matches!(status.changed().await, LeaderState::Idle));
}

#[tokio::test]
async fn a_status_sees_every_end_of_a_leadership() {
    let (_db, pool, mut admin) = TestDb::scene(3).await;
    let mut election = election(&pool);
    let mut status = election.status();
    for way in ["drop", "resign", "loss"] {
        let leadership = election.campaign().await.unwrap();
        assert!(matches!(status.changed().await, LeaderState::Leading { .. }));
        let ends = async {
            match way {
                "drop" => drop(leadership),
                "resign" => leadership.resign().await.unwrap(),
                _ => {
                    terminate(&mut admin, leadership.backend_pid()).await;
                    leadership.lost().await;
                }
            }
        };
        let (state, ()) = tokio::join!(timeout(SOON * 10, status.changed()), ends);
        assert!(matches!(state, Ok(LeaderState::Idle)), "{way}: {state:?}");
    }
    // This campaign is cancelled.
    let other = Election::new(&pool, "billing").campaign().await.unwrap();
    let campaign = timeout(SOON, election.campaign());
    let (campaign, state) = tokio::join!(campaign, status.changed());
    assert!(campaign.is_err());
    assert!(matches!(state, LeaderState::Waiting));
    assert!(matches!(status.changed().await, LeaderState::Idle));
    drop(other);
}
