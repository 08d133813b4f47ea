//! The holder times out before the server admits another session: links that are cut, processes that stop.
//!
//! The far side is a process in a network of its own, behind a link that is cut; the near side is the
//! test, which already waits for the same locks when that happens. Both read one clock.

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

/// After which a holder times out: the heartbeat's interval and deadline. On a busy machine an answer may be late.
const HOLDER: Duration = Duration::from_secs(3);

/// After which the server gives a silent session up, if it is busy or waits: the keepalives, then the
/// interval of its look at the connection.
const SERVER: Duration = Duration::from_secs(9);

/// What a busy machine may add to either.
const ALLOWANCE: Duration = Duration::from_secs(5);

/// How many locks each kind has in a stage.
const EACH: usize = 5;

/// How much later a stage of locks begins than the one before. So the stages differ in what their heartbeats and
/// keepalives are about to do when the link is cut.
const STEP: Duration = Duration::from_millis(230);

/// The variable with the key of a sleeper, which is 1 without it.
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
    /// Waits for what the near side holds.
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

/// Holds and waits on command, and reports when it detects a loss.
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

/// A server, and what is on both sides of a link to it.
struct Scene {
    network: Network,
    server: Server,
    db: TestDb,
    near: PgPool,
}

impl Scene {
    /// `None` if we may not make a network.
    async fn new() -> Option<Self> {
        let network = Network::new()?;
        let server =
            Server::options().listen(network.address()).setting("max_connections", "400").start();
        let db = TestDb::on(&server).await;
        let near = db.pool(110).await;
        Some(Self { network, server, db, near })
    }

    /// A process on the far side, with more environment variables than its URL.
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

/// When things happened to one lock, as time since the link was cut.
#[derive(Clone, Copy, Debug)]
struct Run {
    kind: Kind,
    /// When the far side timed out, if it lived to report that.
    lost: Option<Duration>,
    /// When the near side was let in.
    granted: Duration,
}

/// Has locks of all kinds held on the far side, in stages, cuts the link, and records when each lock was lost and
/// granted.
async fn round(scene: &Scene, direction: Direction, stages: usize) -> Vec<Run> {
    let mut admin = scene.db.admin().await;
    // The connections are opened now, because opening many of them at once would delay the heartbeats.
    borrow_all(&scene.near).await;
    let mut far = scene.role("partition::far_side", &[]);
    let mut victim = scene.role("partition::far_side", &[]);
    // Before PostgreSQL 14, a server that is busy or waits does not notice that its client has gone.
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
    // These begin last, because they wait for a limited time.
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
    // By its first heartbeat the server has `tcp_user_timeout`; before, it retransmits for longer to a client
    // that has not acknowledged its last answer.
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
            // Whether it was told that it holds, and of its loss, or neither.
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

/// What the far side says of its locks, until it has said all: when they were lost.
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
            // Granted to a waiter that is cut off: it may trust that for as long as a holder.
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

/// Tells the least, the middle and the greatest of the times.
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
async fn cut_in_both_directions_the_holder_gives_up_first() {
    gives_up_first(Direction::Both, 3).await;
}

#[tokio::test]
async fn cut_towards_the_server_the_holder_gives_up_first() {
    gives_up_first(Direction::FromFarSide, 2).await;
}

#[tokio::test]
async fn cut_away_from_the_server_the_holder_gives_up_first() {
    gives_up_first(Direction::ToFarSide, 2).await;
}

/// One connection is cut off, as by a firewall that has forgotten it, and all others pass.
///
/// An idle holder is asked on that very connection, and gives up first. One that is lent is asked about
/// on another, which says that it holds for as long as the server believes so: it learns of the loss at
/// the next heartbeat after.
#[tokio::test]
async fn cut_off_alone_a_lent_connection_is_told_at_the_next_heartbeat() {
    let Some(scene) = Scene::new().await else { return };
    tokio::join!(cut_off_alone(&scene, Kind::Idle, 1), cut_off_alone(&scene, Kind::Lent, 2));
    scene.network.heal();
    no_locks(&mut scene.db.admin().await).await;
}

/// Cuts off the session that holds the key, in a process of its own.
async fn cut_off_alone(scene: &Scene, kind: Kind, key: i64) {
    let mut admin = scene.db.admin().await;
    let mut far = scene.role("partition::far_side", &[]);
    assert_eq!(far.ask(&format!("{kind:?} {key}")).await, format!("{key} holds"));
    let next = Scene::contend(scene.near.clone(), kind, key);
    let (contended, ()) = tokio::join!(timeout(SERVER + ALLOWANCE * 2, next), async {
        // Both kinds are held and waited for.
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

/// Is stopped while it holds, and reports what it finds when it goes on.
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
            // The body is not to be given another poll, whether the process stops in the middle of one
            // or before the next.
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

/// What the role found, and when.
fn found(said: &str) -> (&str, Duration) {
    let (found, at) = said.split_once(' ').unwrap();
    (found, Duration::from_nanos(at.parse().unwrap()))
}

/// The kernel still answers for a stopped process, so the server admits no other session before the
/// process goes on; and then the process detects the loss at once.
#[tokio::test]
async fn a_process_that_was_stopped_knows_of_the_loss_in_its_first_statement() {
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
            // Not to wait for something, but to let the bound pass.
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
async fn a_process_that_was_stopped_and_cut_off_knows_of_the_loss_in_its_first_statement() {
    let Some(scene) = Scene::new().await else { return };
    let mut admin = scene.db.admin().await;
    // A process for each cue, with a key of its own.
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

/// A stop that is shorter is not a loss.
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
            // A busy machine may have made it too long.
            if found(&said).1 < stopped + HOLDER / 8 {
                break said;
            }
            sleeper.tell(cue).await;
            assert_eq!(sleeper.answer().await, "holds");
        };
        assert_eq!(found(&said).0, "false", "{cue}");
    }
}
