//! The holder times out before the server admits another session, whether a link is cut or a process is stopped.
//!
//! The far side is a process in a network of its own, behind a link that the test cuts. The near side is the test,
//! which already waits for the same locks at that time. Both sides read the same clock.

use std::collections::BTreeMap;
use std::env;
use std::future::poll_fn;
use std::pin::pin;
use std::task::Poll;
use std::thread;
use std::time::Duration;

use pglock::{Election, Error, Lock, LockOptions, Loss};
use pglock_testkit::{
    Direction, Network, Role, Server, TestDb, cancel_after, cues, monotonic, say, stand_still,
};
use sqlx::PgPool;
use sqlx::postgres::PgPoolOptions;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::support::{borrow_all, locks_are, no_locks};

const SECOND: Duration = Duration::from_secs(1);

/// The time after which a holder times out: the heartbeat's interval and deadline. On a busy machine, an answer may be
/// late.
const HOLDER: Duration = Duration::from_secs(3);

/// The time after which the server ends a silent session that is busy or waits: the keepalives, then the interval at
/// which the server checks the connection.
const SERVER: Duration = Duration::from_secs(9);

/// The time that a busy machine may add to either.
const ALLOWANCE: Duration = Duration::from_secs(5);

/// The number of locks of each kind in a stage.
const EACH: usize = 5;

/// The delay between one stage of locks and the next. When the link is cut, the stages are at different points of their
/// heartbeats and keepalives.
const STEP: Duration = Duration::from_millis(230);

/// The environment variable with the key of a sleeper. The key is 1 if it is not set.
const KEY: &str = "PGLOCK_SLEEPER_KEY";

/// What the session on the far side does when the link is cut.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Kind {
    /// Holds, and is idle.
    Idle,
    /// Leads an election.
    Leading,
    /// Holds, and its connection is borrowed.
    Lent,
    /// Holds, and its connection is borrowed and runs a long query.
    Busy,
    /// Holds, and its process is killed as well.
    Killed,
    /// Waits for a lock that the near side holds.
    Waiting,
}

const KINDS: [Kind; 6] =
    [Kind::Idle, Kind::Leading, Kind::Lent, Kind::Busy, Kind::Killed, Kind::Waiting];

fn options() -> LockOptions {
    LockOptions::new()
        .heartbeat_interval(HOLDER / 3)
        .heartbeat_timeout(HOLDER * 2 / 3)
        .keepalives_idle(SECOND)
        .keepalives_interval(SECOND)
        .keepalives_retries(7)
        .wait_slice(SECOND * 2)
}

/// Holds locks and waits for locks on command, and reports when it detects a loss.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "is a role: the tests below run it as a process on the far side"]
async fn far_side() {
    let pool = PgPoolOptions::new().max_connections(150);
    let pool = pool.connect(&env::var("URL").unwrap()).await.unwrap();
    let mut tasks = JoinSet::new();
    let mut cues = cues();
    while let Some(cue) = cues.next_line().await.unwrap() {
        let (kind, key) = cue.split_once(' ').unwrap();
        let lock = Lock::new(&options().on(&pool).unwrap(), key.parse::<i64>().unwrap());
        match kind {
            "Waiting" => drop(tasks.spawn(wait(lock))),
            "Leading" => {
                let election = Election::new(&options().on(&pool).unwrap(), lock.key());
                drop(tasks.spawn(lead(election)));
            }
            kind => drop(tasks.spawn(hold(lock, kind.to_owned()))),
        }
    }
}

async fn hold(mut lock: Lock, kind: String) {
    let guard = lock.acquire().await.unwrap();
    let key = lock.key();
    let told = async {
        say(format!("{key} holds"));
        guard.lost().await;
        say(format!("{key} lost {}", monotonic().as_nanos()));
    };
    match kind.as_str() {
        "Lent" => {
            let _lent = guard.connection().await.unwrap();
            told.await;
        }
        "Busy" => {
            let mut lent = guard.connection().await.unwrap();
            let query = sqlx::query("SELECT pg_sleep(60)").execute(&mut *lent);
            tokio::select! {
                ended = query => assert!(ended.is_err(), "the query sleeps for longer"),
                () = told => {}
            }
        }
        _ => told.await,
    }
    assert!(guard.is_lost());
}

async fn lead(mut election: Election) {
    let leadership = election.campaign().await.unwrap();
    let key = election.key();
    say(format!("{key} holds"));
    leadership.lost().await;
    assert!(!election.status().is_leader());
    say(format!("{key} lost {}", monotonic().as_nanos()));
}

/// Waits for longer than the server takes to end the session.
async fn wait(mut lock: Lock) {
    let waited = lock.try_acquire_for(SERVER + HOLDER).await;
    let (key, now) = (lock.key(), monotonic().as_nanos());
    match waited {
        Ok(None) => say(format!("{key} gave-up {now}")),
        Err(_) => say(format!("{key} failed {now}")),
        Ok(Some(guard)) => {
            say(format!("{key} holds {now}"));
            guard.lost().await;
            say(format!("{key} lost {}", monotonic().as_nanos()));
        }
    }
}

/// A server, and the clients on both sides of a link to it.
struct Scene {
    network: Network,
    server: Server,
    db: TestDb,
    near: PgPool,
}

impl Scene {
    /// `None` if the test may not create a network.
    async fn new() -> Option<Self> {
        let network = Network::new()?;
        let server =
            Server::options().listen(network.address()).setting("max_connections", "400").start();
        let db = TestDb::on(&server).await;
        let near = db.pool(110).await;
        Some(Self { network, server, db, near })
    }

    /// Starts a process on the far side, with more environment variables than its URL.
    fn role(&self, name: &str, more: &[(&str, &str)]) -> Role {
        let (address, port) = (self.network.address(), self.server.port());
        let name_of_db = self.db.name();
        let url = format!("postgres://postgres@{address}:{port}/{name_of_db}?sslmode=disable");
        let mut env = vec![("URL", url.as_str())];
        env.extend(more);
        Role::start_under(&self.network.far_side(), name, &env)
    }

    /// A service on the near side that waits for a lock of the far side.
    async fn contend(near: PgPool, kind: Kind, key: i64) -> (i64, Duration) {
        if kind == Kind::Leading {
            let leadership = Election::new(&near, key).campaign().await.unwrap();
            let elected = monotonic();
            leadership.resign().await.unwrap();
            return (key, elected);
        }
        let mut lock = Lock::new(&near, key);
        let guard = lock.acquire().await.unwrap();
        let granted = monotonic();
        guard.verify().await.unwrap();
        guard.release().await.unwrap();
        (key, granted)
    }
}

/// The times of the events of one lock, since the link was cut.
#[derive(Clone, Copy, Debug)]
struct Run {
    kind: Kind,
    /// When the far side timed out, if it was alive to report that.
    lost: Option<Duration>,
    /// When the near side was granted the lock.
    granted: Duration,
}

/// Acquires or awaits locks of all kinds on the far side, in stages, cuts the link, and records when each lock was lost
/// and granted.
async fn round(scene: &Scene, direction: Direction, stages: usize) -> Vec<Run> {
    let mut admin = scene.db.admin().await;
    // The connections are opened now, because opening many of them at once would delay the heartbeats.
    borrow_all(&scene.near).await;
    let mut far = scene.role("partition::far_side", &[]);
    let mut victim = scene.role("partition::far_side", &[]);
    // Before PostgreSQL 14, a backend that is busy or waits does not detect that its client has disconnected.
    let noticed =
        |kind: &Kind| scene.server.version() >= 14 || !matches!(kind, Kind::Busy | Kind::Waiting);
    let stage: Vec<Kind> = KINDS
        .into_iter()
        .filter(noticed)
        .flat_map(|kind| std::iter::repeat_n(kind, EACH))
        .collect();
    let keys: Vec<(Kind, i64)> = stage.repeat(stages).into_iter().zip(1_i64..).collect();
    let (waiting, held): (Vec<_>, Vec<_>) =
        keys.iter().copied().partition(|(kind, _)| *kind == Kind::Waiting);
    for stage in held.chunks(held.len() / stages) {
        for &(kind, key) in stage {
            let role = if kind == Kind::Killed { &mut victim } else { &mut far };
            assert_eq!(role.ask(&format!("{kind:?} {key}")).await, format!("{key} holds"));
        }
        sleep(STEP).await;
    }
    let mut near_holds = Vec::new();
    for &(_, key) in &waiting {
        near_holds.push(Lock::new(&scene.near, key).acquire().await.unwrap());
    }
    let mut contenders = JoinSet::new();
    for &(kind, key) in &held {
        contenders.spawn(Scene::contend(scene.near.clone(), kind, key));
    }
    let mut count = keys.len() + held.len();
    locks_are(&mut admin, count, ALLOWANCE * 2).await;
    // The waits begin last, because their time is limited.
    for stage in waiting.chunks(EACH) {
        for &(kind, key) in stage {
            far.tell(&format!("{kind:?} {key}")).await;
        }
        sleep(STEP).await;
    }
    count += waiting.len();
    locks_are(&mut admin, count, ALLOWANCE).await;
    for &(kind, key) in &waiting {
        contenders.spawn(Scene::contend(scene.near.clone(), kind, key));
    }
    count += waiting.len();
    locks_are(&mut admin, count, ALLOWANCE).await;
    // A session's first heartbeat sets `tcp_user_timeout` on the server. Before, the server retransmits for longer to a
    // client that has not acknowledged its last answer.
    sleep(HOLDER).await;

    let cutting = monotonic();
    scene.network.cut(direction);
    let cut = monotonic();
    victim.kill().await;
    for guard in near_holds {
        guard.release().await.unwrap();
    }
    let granted = async {
        let mut granted = BTreeMap::new();
        while let Some(contended) = contenders.join_next().await {
            let (key, at) = contended.unwrap();
            granted.insert(key, at);
        }
        granted
    };
    let granted = timeout(SERVER + ALLOWANCE * 2, granted).await.unwrap();
    let lost = outcomes(&mut far, &keys).await;
    scene.network.heal();

    let mut runs = Vec::new();
    for &(kind, key) in &keys {
        let (lost, granted) = (lost.get(&key).copied(), granted.get(&key).copied().unwrap());
        let gap = lost.map(|lost| granted.as_secs_f64() - lost.as_secs_f64());
        let times = format!("{kind:?} {direction:?} {key}: gap {gap:?}");
        match kind {
            Kind::Idle | Kind::Leading | Kind::Lent | Kind::Busy => {
                assert!(lost.unwrap() < granted, "two held the lock: {times}");
                assert!(lost.unwrap() < cut + HOLDER + ALLOWANCE, "told too late: {times}");
            }
            // The waiter has reported either both the grant and the loss, or neither.
            Kind::Waiting => assert!(lost.is_none_or(|lost| lost < granted), "{times}"),
            Kind::Killed => assert!(lost.is_none()),
        }
        assert!(granted < cut + SERVER + ALLOWANCE, "free too late: {times}");
        let since = |at: Duration| at.saturating_sub(cutting);
        runs.push(Run { kind, lost: lost.map(since), granted: since(granted) });
    }
    locks_are(&mut admin, 0, ALLOWANCE).await;
    borrow_all(&scene.near).await;
    runs
}

/// Reads the reports of the far side until it has reported all its locks. Returns when each lock was lost.
async fn outcomes(far: &mut Role, keys: &[(Kind, i64)]) -> BTreeMap<i64, Duration> {
    let mut open = keys.iter().filter(|(kind, _)| *kind != Kind::Killed).count();
    let mut held = BTreeMap::new();
    let mut lost = BTreeMap::new();
    while open > 0 {
        let said = far.answer().await;
        let mut words = said.split(' ');
        let (key, what) = (words.next().unwrap().parse().unwrap(), words.next().unwrap());
        let at = Duration::from_nanos(words.next().unwrap().parse().unwrap());
        match what {
            // The lock was granted to a waiter that is cut off, which may trust the grant for as long as a holder.
            "holds" => drop(held.insert(key, at)),
            "lost" => {
                let since = held.get(&key).copied().unwrap_or(at);
                let believed = at.saturating_sub(since);
                assert!(believed < HOLDER + ALLOWANCE, "believed to hold for {believed:?}");
                lost.insert(key, at);
                open -= 1;
            }
            _ => open -= 1,
        }
    }
    lost
}

/// Prints the minimum, the median and the maximum of the times.
#[expect(clippy::print_stdout, reason = "shown with --nocapture")]
fn report(direction: Direction, runs: &[Run]) {
    let shown = |mut times: Vec<f64>| {
        times.sort_by(f64::total_cmp);
        let at = |index: usize| times.get(index).copied().unwrap_or(f64::NAN);
        let (middle, last) = (times.len() / 2, times.len().saturating_sub(1));
        format!("{:6.3} {:6.3} {:6.3}", at(0), at(middle), at(last))
    };
    println!("{direction:?}, seconds since the cut (least, median, greatest)");
    for kind in KINDS {
        let of_kind: Vec<_> = runs.iter().filter(|run| run.kind == kind).collect();
        let lost = of_kind.iter().filter_map(|run| Some(run.lost?.as_secs_f64())).collect();
        let granted = of_kind.iter().map(|run| run.granted.as_secs_f64()).collect();
        let gap = |run: &&Run| Some(run.granted.as_secs_f64() - run.lost?.as_secs_f64());
        let gap = of_kind.iter().filter_map(gap).collect();
        println!(
            "{:>8}, {} runs: lost {}, granted {}, gap {}",
            format!("{kind:?}"),
            of_kind.len(),
            shown(lost),
            shown(granted),
            shown(gap),
        );
    }
}

async fn gives_up_first(direction: Direction, stages: usize) {
    let Some(scene) = Scene::new().await else { return };
    let runs = round(&scene, direction, stages).await;
    report(direction, &runs);
}

#[tokio::test]
async fn cut_in_both_directions_the_holder_reports_the_loss_first() {
    gives_up_first(Direction::Both, 3).await;
}

#[tokio::test]
async fn cut_towards_the_server_the_holder_reports_the_loss_first() {
    gives_up_first(Direction::FromFarSide, 2).await;
}

#[tokio::test]
async fn cut_away_from_the_server_the_holder_reports_the_loss_first() {
    gives_up_first(Direction::ToFarSide, 2).await;
}

/// The link drops one connection, like a firewall that has forgotten it, and passes all others.
///
/// The heartbeat of an idle holder uses that very connection, so the holder times out before the server ends the
/// session. The heartbeat of a borrowed connection uses another one, and succeeds for as long as the server has the
/// session: the holder detects the loss at the next heartbeat after that.
#[tokio::test]
async fn cut_off_alone_a_borrowed_connection_is_reported_at_the_next_heartbeat() {
    let Some(scene) = Scene::new().await else { return };
    tokio::join!(cut_off_alone(&scene, Kind::Idle, 1), cut_off_alone(&scene, Kind::Lent, 2));
    scene.network.heal();
    no_locks(&mut scene.db.admin().await).await;
}

/// Holds the key in a process of its own, and cuts off the session that holds it.
async fn cut_off_alone(scene: &Scene, kind: Kind, key: i64) {
    let mut admin = scene.db.admin().await;
    let mut far = scene.role("partition::far_side", &[]);
    assert_eq!(far.ask(&format!("{kind:?} {key}")).await, format!("{key} holds"));
    let next = Scene::contend(scene.near.clone(), kind, key);
    let (contended, ()) = tokio::join!(timeout(SERVER + ALLOWANCE * 2, next), async {
        // The locks of both kinds are held and waited for.
        locks_are(&mut admin, 4, ALLOWANCE).await;
        sleep(HOLDER).await;
        let port: i32 = sqlx::query_scalar(
            "SELECT client_port FROM pg_stat_activity JOIN pg_locks USING (pid) \
             WHERE locktype = 'advisory' AND granted AND objid::int8 = $1",
        )
        .bind(key)
        .fetch_one(&mut admin)
        .await
        .unwrap();
        scene.network.cut_connection(port.try_into().unwrap());
    });
    let (_, granted) = contended.unwrap();
    let said = far.answer().await;
    let lost = said.strip_prefix(&format!("{key} lost ")).unwrap().parse().unwrap();
    let lost = Duration::from_nanos(lost);
    let latest = if kind == Kind::Idle { granted } else { granted + HOLDER + ALLOWANCE };
    assert!(lost < latest, "{kind:?}: lost at {lost:?}, granted at {granted:?}");
}

/// Is stopped while it holds the lock, and reports what it detects when it continues.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "is a role: the tests below run it as a process that is stopped"]
async fn sleeper() {
    let pool = PgPoolOptions::new().max_connections(4);
    let pool = pool.connect(&env::var("URL").unwrap()).await.unwrap();
    let key = env::var(KEY).map_or(1, |key| key.parse::<i64>().unwrap());
    let mut lock = Lock::new(&options().on(&pool).unwrap(), key);
    let mut cues = cues();
    while let Some(cue) = cues.next_line().await.unwrap() {
        let guard = lock.acquire().await.unwrap();
        say("holds");
        cues.next_line().await.unwrap();
        match cue.as_str() {
            "is_lost" => {
                stand_still();
                let is_lost = guard.is_lost();
                let now = monotonic().as_nanos();
                say(format!("{is_lost} {now}"));
            }
            "lost" => {
                let mut lost = pin!(guard.lost());
                assert!(cancel_after(1, lost.as_mut()).await.is_none());
                stand_still();
                let told = cancel_after(1, lost).await.is_some();
                let now = monotonic().as_nanos();
                say(format!("{told} {now}"));
            }
            // The body must not be polled again, whether the process is stopped during a poll or before the next one.
            _ => {
                let mut polls = 0;
                let body = poll_fn(|cx| {
                    polls += 1;
                    let waker = cx.waker().clone();
                    let stop = move || {
                        stand_still();
                        waker.wake();
                    };
                    match (polls, cue.as_str()) {
                        (1, "in a poll") => stop(),
                        (1, _) => drop(thread::spawn(stop)),
                        _ => cx.waker().wake_by_ref(),
                    }
                    if polls < 1000 { Poll::Pending } else { Poll::Ready(()) }
                });
                let ended = guard.while_held(body).await;
                let now = monotonic().as_nanos();
                let told = matches!(ended, Err(Error::Lost { reason: Loss::Unresponsive, .. }));
                say(format!("{} {now}", told && polls == 1));
            }
        }
    }
}

const CUES: [&str; 4] = ["is_lost", "lost", "in a poll", "between polls"];

/// What the role detected, and when.
fn found(said: &str) -> (&str, Duration) {
    let (found, at) = said.split_once(' ').unwrap();
    (found, Duration::from_nanos(at.parse().unwrap()))
}

/// The kernel still answers for a stopped process, so the server admits no other session before the process continues.
/// The process then detects the loss at once.
#[tokio::test]
async fn a_process_that_was_stopped_reports_the_loss_in_its_first_statement() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let near = db.pool(2).await;
    let mut sleeper = Role::start("partition::sleeper", &[("URL", &db.url())]);
    for cue in CUES {
        assert_eq!(sleeper.ask(cue).await, "holds");
        let next = Scene::contend(near.clone(), Kind::Idle, 1);
        let (contended, ()) = tokio::join!(timeout(ALLOWANCE * 4, next), async {
            locks_are(&mut admin, 2, ALLOWANCE).await;
            sleeper.tell("now").await;
            sleeper.stands_still().await;
            // The test waits for no event here: it lets the bound pass.
            sleep(HOLDER + SECOND / 2).await;
            locks_are(&mut admin, 2, ALLOWANCE).await;
            sleeper.resume();
            let said = sleeper.answer().await;
            assert_eq!(found(&said).0, "true", "{cue}");
        });
        contended.unwrap();
        no_locks(&mut admin).await;
    }
}

#[tokio::test]
async fn a_process_that_was_stopped_and_cut_off_reports_the_loss_in_its_first_statement() {
    let Some(scene) = Scene::new().await else { return };
    let mut admin = scene.db.admin().await;
    // Each cue has a process of its own, with a key of its own.
    let sleeper = |key: i64| scene.role("partition::sleeper", &[(KEY, &key.to_string())]);
    let mut sleepers: Vec<_> =
        CUES.into_iter().zip(1..).map(|(cue, key)| (cue, key, sleeper(key))).collect();
    let mut contenders = JoinSet::new();
    for (cue, key, sleeper) in &mut sleepers {
        assert_eq!(sleeper.ask(cue).await, "holds");
        contenders.spawn(Scene::contend(scene.near.clone(), Kind::Idle, *key));
    }
    locks_are(&mut admin, 2 * CUES.len(), ALLOWANCE).await;
    sleep(HOLDER).await;
    for (_, _, sleeper) in &mut sleepers {
        sleeper.tell("now").await;
        sleeper.stands_still().await;
    }
    scene.network.cut(Direction::Both);
    timeout(SERVER + ALLOWANCE, contenders.join_all()).await.unwrap();
    // Another session has held each lock since.
    for (cue, _, sleeper) in &mut sleepers {
        sleeper.resume();
        let said = sleeper.answer().await;
        assert_eq!(found(&said).0, "true", "{cue}");
    }
    scene.network.heal();
    no_locks(&mut admin).await;
}

/// A stop that is shorter than the bound is not a loss.
#[tokio::test]
async fn a_process_that_was_stopped_for_a_moment_still_holds() {
    let db = TestDb::new().await;
    let mut sleeper = Role::start("partition::sleeper", &[("URL", &db.url())]);
    for cue in ["is_lost", "lost"] {
        assert_eq!(sleeper.ask(cue).await, "holds");
        let said = loop {
            sleeper.tell("now").await;
            let stopped = monotonic();
            sleeper.stands_still().await;
            sleeper.resume();
            let said = sleeper.answer().await;
            // On a busy machine, the stop may have been too long.
            if found(&said).1 < stopped + HOLDER / 8 {
                break said;
            }
            sleeper.tell(cue).await;
            assert_eq!(sleeper.answer().await, "holds");
        };
        assert_eq!(found(&said).0, "false", "{cue}");
    }
}
