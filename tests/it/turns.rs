//! Processes that compete for one key all get their turns, however many tasks each has.
//!
//! `PGLOCK_FAIRNESS_SECONDS` sets for how long they compete for it (3).

use std::env;
use std::str::FromStr;
use std::time::{Duration, Instant};

use pglock::{Lock, LockManager};
use pglock_testkit::{Role, TestDb, cues, say};
use sqlx::PgPool;
use sqlx::postgres::PgConnectOptions;
use tokio::task::JoinSet;

use crate::support::{no_locks, pool_of, report};

const URL: &str = "PGLOCK_FAIRNESS_URL";
const KEY: &str = "busy";

/// The number of tasks of a service.
const TASKS: usize = 100;

/// The time in which a service that starts opens its sessions, and checks for a pooler.
const START: Duration = Duration::from_millis(200);

/// Acquires and releases the lock until the time is over. Returns how long each acquire has waited, and whether it
/// began during the start.
async fn take_turns(mut lock: Lock, time: Duration) -> Vec<(Duration, bool)> {
    let started = Instant::now();
    let mut waits = Vec::new();
    while started.elapsed() < time {
        let asked = Instant::now();
        let guard = lock.acquire().await.unwrap();
        waits.push((asked.elapsed(), asked < started + START));
        guard.release().await.unwrap();
    }
    waits
}

/// Runs the part of a process: reads how many milliseconds to run, and prints the number of its holds, and of its waits
/// the median, the longest, and the longest after the start, in microseconds.
async fn play(locks: impl FnOnce(&PgPool) -> Vec<Lock>) {
    // Without the URL of a database, no test runs this process as a role.
    let Ok(url) = env::var(URL) else { return };
    let pool = pool_of(PgConnectOptions::from_str(&url).unwrap(), 3).await;
    let locks = locks(&pool);
    say("ready");
    let Some(cue) = cues().next_line().await.unwrap() else { return };
    let time = Duration::from_millis(cue.parse().unwrap());
    let mut tasks = JoinSet::new();
    for lock in locks {
        tasks.spawn(take_turns(lock, time));
    }
    let mut waits: Vec<_> = tasks.join_all().await.into_iter().flatten().collect();
    waits.sort_unstable();
    let micros = |wait: Option<&(Duration, bool)>| wait.map_or(0, |(wait, _)| wait.as_micros());
    say(format_args!(
        "{} {} {} {}",
        waits.len(),
        micros(waits.get(waits.len() / 2)),
        micros(waits.last()),
        micros(waits.iter().rfind(|(_, of_the_start)| !of_the_start))
    ));
}

#[tokio::test]
#[ignore = "is a role: another test runs it as a process"]
async fn service() {
    play(|pool| {
        let manager = LockManager::new(pool);
        (0..TASKS).map(|_| Lock::new(&manager, KEY)).collect()
    })
    .await;
}

#[tokio::test]
#[ignore = "is a role: another test runs it as a process"]
async fn service_of_locks() {
    play(|pool| (0..TASKS).map(|_| Lock::new(pool, KEY)).collect()).await;
}

#[tokio::test]
#[ignore = "is a role: another test runs it as a process"]
async fn loner() {
    play(|pool| vec![Lock::new(pool, KEY)]).await;
}

/// The figures that a process reports at its end.
struct Turns {
    holds: u32,
    median: Duration,
    longest: Duration,
    longest_later: Duration,
}

impl FromStr for Turns {
    type Err = std::num::ParseIntError;

    fn from_str(said: &str) -> Result<Self, Self::Err> {
        let mut numbers = said.split(' ').map(str::parse);
        let mut next = || numbers.next().unwrap_or(Ok(0));
        Ok(Self {
            holds: u32::try_from(next()?).unwrap(),
            median: Duration::from_micros(next()?),
            longest: Duration::from_micros(next()?),
            longest_later: Duration::from_micros(next()?),
        })
    }
}

#[tokio::test]
async fn two_services_and_a_plain_lock_get_their_shares() {
    get_their_shares("service").await;
}

#[tokio::test]
async fn two_services_without_a_manager_and_a_plain_lock_get_their_shares() {
    get_their_shares("service_of_locks").await;
}

async fn get_their_shares(service: &str) {
    let seconds = env::var("PGLOCK_FAIRNESS_SECONDS").map_or(3, |text| text.parse().unwrap());
    let db = TestDb::new().await;
    let start = |role: &str| Role::start(&format!("turns::{role}"), &[(URL, &db.url())]);
    let mut roles = [start(service), start(service), start("loner")];
    for role in &mut roles {
        assert_eq!(role.answer().await, "ready");
    }
    for role in &mut roles {
        role.tell(&(seconds * 1000).to_string()).await;
    }
    let mut turns = Vec::new();
    for role in &mut roles {
        let said: Turns = role.answer().await.parse().unwrap();
        let Turns { holds, median, longest, longest_later } = said;
        report(format_args!(
            "{holds} holds, waits: median {median:?}, longest {longest:?}, after the start {longest_later:?}"
        ));
        turns.push(said);
    }
    let [one, two, plain] = turns.try_into().ok().unwrap();
    let both = one.holds + two.holds;
    report(format_args!("the first service has {} %", one.holds * 100 / both));
    // A share of 40 to 60 % and a longest wait of ten times the median are fair; the test allows more on a busy
    // machine.
    assert!((25..=75).contains(&(one.holds * 100 / both)), "{} and {}", one.holds, two.holds);
    assert!(plain.holds > seconds, "{} turns of the plain lock", plain.holds);
    for Turns { median, longest, .. } in [one, two, plain] {
        let bound = median * 20 + Duration::from_secs(5);
        assert!(longest < bound, "waited for {longest:?}, where {median:?} is usual");
    }
    no_locks(&mut db.admin().await).await;
}
