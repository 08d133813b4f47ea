//! The proof that a lock excludes other sessions, which an acquire demands once per server.
//!
//! While one connection holds a key that nothing else uses, another connection must be refused it, by
//! another backend. Behind a pooler in transaction mode, a load balancer or a server that runs all its
//! clients in one session, and on an engine whose advisory locks do nothing or are local to a node, it is
//! granted, or answered by the same backend.
//!
//! The proof uses two connections beside the pool, and runs on a task. An acquire waits for it for
//! [`WAIT`], once per server. Without an answer, for example because there is no room for two more
//! connections, the task tries again later, and the sessions are used meanwhile. If the answer is
//! negative, the keeper ends the guards that exist, and acquires fail.
//!
//! A busy pooler can send two statements of one client to the same backend, so the question is asked
//! several times. Answers to heartbeats and releases are compared as well: each says which backend sent
//! it.

use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use sqlx::postgres::PgConnectOptions;
use sqlx::{Connection, PgConnection, PgPool};
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::time::{sleep, timeout, timeout_at};

use super::retrieve::retrieve;
use super::servers::Server;
use super::{DEADLINE, within};
use crate::key::KeyId;
use crate::mode::{Mode, Modes};
use crate::sql;

/// How long acquires wait for the first answer.
const WAIT: Duration = Duration::from_millis(250);

/// How long an attempt may take.
const ATTEMPT: Duration = DEADLINE;

/// How much longer than twice a login the first statement of a connection may take. Behind a session pooler
/// without a free connection it waits for one, and is in the way of others.
const GRACE: Duration = Duration::from_millis(100);

/// The pause before the next attempt; it doubles each time.
const PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_mins(1);

/// How long a negative answer counts. Then an acquire asks again: the configuration may have changed.
const NEGATIVE: Duration = Duration::from_secs(1);

/// How often the question is asked.
const ROUNDS: usize = 6;

/// What is known of a server.
#[derive(Debug, Default)]
pub(super) struct Proof {
    state: AtomicU8,
    /// What changes with the state.
    attempt: Mutex<Attempt>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Attempt {
    running: bool,
    /// When the first acquire began to wait.
    since: Option<Instant>,
    disproven: Option<Instant>,
}

const UNKNOWN: u8 = 0;
const PROVEN: u8 = 1;
const DISPROVEN: u8 = 2;

impl Proof {
    /// Whether it is known that locks exclude other sessions.
    pub(super) fn is_positive(&self) -> bool {
        self.state.load(Ordering::Relaxed) == PROVEN
    }

    /// Whether it is known that locks exclude nothing.
    pub(super) fn is_negative(&self) -> bool {
        self.state.load(Ordering::Relaxed) == DISPROVEN
    }

    /// A session has found that another backend answers.
    pub(super) fn disprove(&self) {
        self.set(DISPROVEN);
    }

    fn set(&self, state: u8) {
        let mut attempt = self.attempt.lock().unwrap_or_else(PoisonError::into_inner);
        attempt.disproven = (state == DISPROVEN).then(Instant::now);
        self.state.store(state, Ordering::Relaxed);
        drop(attempt);
        self.changed.notify_waiters();
    }

    /// Returns whether a lock may be granted. Starts the proof if there is none, and waits for it, but not
    /// beyond the caller's deadline.
    pub(super) async fn allows(
        &self,
        server: &Arc<Server>,
        pool: &PgPool,
        deadline: Option<Instant>,
    ) -> bool {
        if self.state.load(Ordering::Relaxed) == PROVEN {
            return true;
        }
        let wait_until = self.start(server, pool);
        let wait_until = deadline.map_or(wait_until, |deadline| deadline.min(wait_until));
        let mut known = self.state.load(Ordering::Relaxed);
        while known == UNKNOWN && Instant::now() < wait_until {
            let changed = self.changed.notified();
            known = self.state.load(Ordering::Relaxed);
            if known == UNKNOWN && timeout_at(wait_until.into(), changed).await.is_err() {
                break;
            }
            known = self.state.load(Ordering::Relaxed);
        }
        known != DISPROVEN
    }

    /// Starts an attempt unless one is running. Returns until when to wait for it.
    fn start(&self, server: &Arc<Server>, pool: &PgPool) -> Instant {
        let now = Instant::now();
        let mut attempt = self.attempt.lock().unwrap_or_else(PoisonError::into_inner);
        if attempt.disproven.is_some_and(|at| at.elapsed() < NEGATIVE) {
            return now;
        }
        if attempt.disproven.take().is_some() {
            self.state.store(UNKNOWN, Ordering::Relaxed);
            attempt.since = None;
        }
        let since = *attempt.since.get_or_insert(now);
        if !attempt.running {
            attempt.running = true;
            let running = Running(Arc::downgrade(server));
            // Detach: it ends with an answer, or with the runtime.
            drop(Handle::current().spawn(prove(running, pool.clone())));
        }
        since + WAIT
    }
}

/// An attempt that is running.
///
/// # Drop
///
/// Lets the next acquire start another: the runtime may be shut down before there is an answer.
struct Running(Weak<Server>);

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(server) = self.0.upgrade() {
            let mut attempt = server.proof.attempt.lock().unwrap_or_else(PoisonError::into_inner);
            attempt.running = false;
        }
    }
}

async fn prove(running: Running, pool: PgPool) {
    let options = pool.connect_options();
    // The pool must not be kept open, nor the server be asked when nothing uses it.
    drop(pool);
    let mut pause = PAUSE;
    loop {
        let answer = timeout(ATTEMPT, Box::pin(excludes(&options))).await;
        let Some(server) = running.0.upgrade() else { return };
        match answer {
            Ok(Ok(excludes)) => {
                server.proof.set(if excludes { PROVEN } else { DISPROVEN });
                return;
            }
            Ok(Err(error)) => tracing::debug!(
                error = &error as &dyn std::error::Error,
                "cannot prove yet that locks exclude other sessions; trying again"
            ),
            Err(_) => tracing::debug!(
                "cannot prove yet that locks exclude other sessions: no answer; trying again"
            ),
        }
        // A release or a heartbeat may have found out meanwhile.
        if server.proof.is_negative() {
            return;
        }
        drop(server);
        sleep(pause).await;
        pause = LONGEST_PAUSE.min(2 * pause);
    }
}

/// Asks whether what one session has locked is refused to another.
async fn excludes(options: &PgConnectOptions) -> Result<bool, sqlx::Error> {
    let started = Instant::now();
    let mut holder = PgConnection::connect_with(options).await?;
    let limit = 2 * started.elapsed() + GRACE;
    let mut other = PgConnection::connect_with(options).await?;
    for conn in [&mut holder, &mut other] {
        within(limit, sql::backend::heartbeat(conn, None)).await?;
    }
    // Nothing else uses a random key.
    let key = RandomState::new().hash_one(0).cast_signed();
    let mut excludes = Ok(true);
    for _ in 0..ROUNDS {
        if matches!(excludes, Ok(true)) {
            excludes = ask(options, &mut holder, &mut other, key).await;
        }
    }
    // Each is closed even if that fails, which frees what it holds.
    drop(tokio::join!(holder.close(), other.close()));
    excludes
}

async fn ask(
    options: &PgConnectOptions,
    holder: &mut PgConnection,
    other: &mut PgConnection,
    key: i64,
) -> Result<bool, sqlx::Error> {
    let (holding, locked) = sql::proof::lock(holder, key).await?;
    let (asked, granted) = sql::proof::lock_in_transaction(other, key).await?;
    let (unlocking, unlocked) = sql::proof::unlock(holder, key).await?;
    let excludes = locked && !granted && holding != asked && holding == unlocking && unlocked;
    // The backend may be another client's, and would keep what it was granted.
    if granted {
        sql::proof::unlock(other, key).await?;
    }
    let left = locked && !unlocked;
    if left && holding == asked {
        sql::proof::unlock(other, key).await?;
    }
    sql::proof::end_transaction(other).await?;
    if left && holding != asked {
        let lock = [(KeyId::BigInt(key), Modes::only(Mode::Exclusive))];
        retrieve(options, holding, &lock).await?;
    }
    Ok(excludes)
}
