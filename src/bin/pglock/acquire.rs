//! Acquires the lock of `pglock run`, within the user's limit and across restarts of the server. With `-v`, reports the
//! sessions ahead.

use std::convert::Infallible;
use std::future::pending;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use pglock::inspect::LockInfo;
use pglock::{Error, Guard, Lock, Permit, Result, Semaphore};
use sqlx::PgPool;
use tokio::time::{sleep, timeout};

use crate::connection::{CLOSING, silent};
use crate::exit::{Failure, chain, complain, say};
use crate::target::Target;
use crate::who;

/// A lock that is held.
pub(crate) struct Held {
    pub(crate) guard: Guard,
    /// The fencing token, which is greater than that of every previous holder.
    pub(crate) token: i64,
    /// The number of the permit.
    pub(crate) slot: Option<usize>,
}

/// The lock to acquire, and how long that may take.
#[derive(Debug)]
pub(crate) struct Wanted {
    pub(crate) key: Target,
    pub(crate) shared: bool,
    pub(crate) permits: Option<usize>,
    /// How long the wait may take. `None` for no limit, zero to fail at once if the lock is not free.
    pub(crate) limit: Option<Duration>,
    pub(crate) retry: bool,
    /// The start of the time that `limit` bounds.
    pub(crate) started: Instant,
}

/// How long to wait before the next attempt after a failure.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// How long after the limit an answer may arrive before the server counts as unresponsive.
pub(crate) const SLACK: Duration = Duration::from_millis(300);

/// How long a wait lasts before its first report, and the interval of the further ones.
const NARRATE_FIRST: Duration = Duration::from_millis(200);
const NARRATE_AGAIN: Duration = Duration::from_mins(1);

impl Wanted {
    /// Returns the time that is left. `None` if there is no limit, or if the program does not wait for the lock.
    pub(crate) fn remaining(&self) -> Option<Duration> {
        let limit = self.limit.filter(|limit| !limit.is_zero())?;
        Some(limit.saturating_sub(self.started.elapsed()))
    }

    /// Returns how long the connections may take to close after a wait that did not acquire the lock: no longer than
    /// the limit allows, but long enough to cancel the statement that the server still executes.
    pub(crate) fn closing_limit(&self) -> Duration {
        self.remaining().map_or(CLOSING, |left| left.clamp(SLACK, CLOSING))
    }

    /// Tries once to acquire the lock, and draws a fencing token. `None` if the lock was not free in time.
    async fn attempt(&self, pool: &PgPool) -> Result<Option<Held>> {
        let key = &self.key.key;
        // `Duration::MAX` is no limit, because the deadline would overflow.
        let limit = self.limit.map_or(Duration::MAX, |_| self.remaining().unwrap_or_default());
        let mut slot = None;
        let guard: Option<Guard> = if let Some(permits) = self.permits {
            let semaphore = Semaphore::new(pool, key, permits)?;
            let permit = semaphore.try_acquire_for(limit).await?;
            slot = permit.as_ref().map(Permit::slot);
            permit.map(Guard::from)
        } else if self.shared {
            Lock::new(pool, key).try_acquire_shared_for(limit).await?.map(Guard::from)
        } else {
            Lock::new(pool, key).try_acquire_for(limit).await?.map(Guard::from)
        };
        let Some(guard) = guard else { return Ok(None) };
        let token = guard.fencing_token().await?;
        Ok(Some(Held { guard, token, slot }))
    }
}

/// Acquires the lock, and draws a fencing token. `None` if the lock was not free in time.
pub(crate) async fn acquire(pool: &PgPool, wanted: &Wanted) -> Result<Option<Held>, Failure> {
    tokio::select! {
        acquired = acquire_with_retries(pool, wanted) => acquired,
        never = narrate(pool, &wanted.key) => match never {},
    }
}

async fn acquire_with_retries(pool: &PgPool, wanted: &Wanted) -> Result<Option<Held>, Failure> {
    let mut failing = false;
    loop {
        let attempt = wanted.attempt(pool);
        let acquired = match wanted.remaining() {
            Some(limit) => match timeout(limit + SLACK, attempt).await {
                Ok(acquired) => acquired,
                Err(_) => return Err(unanswered(wanted)),
            },
            None => attempt.await,
        };
        let error = match acquired {
            // Not retried, because the script more likely names the wrong server than one that is about to be promoted.
            Err(error @ Error::Standby { .. }) => return Err(error.into()),
            Err(error) if wanted.retry && error.is_transient() => error,
            acquired => return Ok(acquired?),
        };
        let is_over = match wanted.limit {
            Some(_) => wanted.remaining().is_none_or(|left| left < RETRY_INTERVAL),
            None => false,
        };
        if is_over {
            return Err(error.into());
        }
        if !failing {
            complain(&error);
            say(format_args!("waiting for the database; retrying every second"));
        }
        failing = true;
        sleep(RETRY_INTERVAL).await;
    }
}

fn unanswered(wanted: &Wanted) -> Failure {
    let source = silent(wanted.limit.unwrap_or_default());
    Failure::Unanswered(wanted.key.to_string(), source)
}

/// Reports at intervals which sessions hold the lock, and how many wait for it, if the info level is enabled.
async fn narrate(pool: &PgPool, key: &Target) -> Infallible {
    if !tracing::enabled!(tracing::Level::INFO) {
        return pending().await;
    }
    let (since, started) = (clock(SystemTime::now()), Instant::now());
    sleep(NARRATE_FIRST).await;
    loop {
        match who::locks_of(pool, &key.key).await {
            Ok(locks) => {
                let holders = locks.iter().filter(|lock| lock.held);
                let holders: Vec<_> = holders.map(describe).collect();
                let waiters = locks.iter().filter(|lock| !lock.held).count();
                tracing::info!(
                    "waiting for {key} since {since}, for {}s; {waiters} waiting; held by {}",
                    started.elapsed().as_secs(),
                    holders.join(", ")
                );
            }
            Err(error) => tracing::info!("waiting for {key} since {since}: {}", chain(&error)),
        }
        sleep(NARRATE_AGAIN).await;
    }
}

fn describe(lock: &LockInfo) -> String {
    let Some(session) = &lock.session else {
        return format!("prepared transaction {:?}", lock.prepared.as_deref().unwrap_or("?"));
    };
    let part = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
    let application = part(&session.application_name).unwrap_or_else(|| "?".to_owned());
    let user = part(&session.user).unwrap_or_else(|| "?".to_owned());
    let from = part(&session.client_addr).map(|from| format!(" from {from}")).unwrap_or_default();
    format!("session {} ({application}) of {user}{from}", session.backend_pid)
}

/// Formats the time of day, in UTC.
pub(crate) fn clock(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs() % 86_400;
    format!("{:02}:{:02}:{:02} UTC", seconds / 3600, seconds / 60 % 60, seconds % 60)
}
