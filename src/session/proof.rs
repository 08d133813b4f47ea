//! The proof that a lock excludes other sessions, which an acquire demands once per server.
//!
//! While one connection holds a key that nothing else uses, another backend must refuse that key to another connection.
//! Behind a pooler in transaction mode, a load balancer or a server that runs all its clients in one session, and on an
//! engine whose advisory locks do nothing or are local to a node, the key is granted instead, or the same backend
//! answers.
//!
//! The proof runs on a task, and uses two connections that do not belong to the pool. Acquires wait for it for
//! [`WAIT`], once per server. Without an answer, for example because there is no room for two more connections, the
//! task retries later, and the sessions are used meanwhile. If the answer is negative, the keeper ends the guards that
//! exist, and acquires fail until another attempt succeeds.
//!
//! A busy pooler can send two statements of one client to the same backend, so the question is asked several times. The
//! answers to heartbeats, waits, undos and releases are checked as well, because each says which backend sent it.

use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use sqlx::postgres::PgConnectOptions;
use sqlx::{Connection, PgConnection, PgPool};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout, timeout_at};

use super::retrieve::retrieve;
use super::{DEADLINE, within};
use crate::error::{chain, sqlstate};
use crate::key::KeyId;
use crate::mode::Mode;
use crate::sql::{self, release::Unlocked};

/// How long acquires wait for the first answer.
const WAIT: Duration = Duration::from_millis(250);

/// How long an attempt may take.
const ATTEMPT: Duration = DEADLINE;

/// How much longer than twice the login the first statement of a connection may take. Behind a session pooler without a
/// free connection, the statement waits for one, and delays other clients.
const GRACE: Duration = Duration::from_millis(100);

/// The pause before the next attempt; it doubles each time.
const PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_mins(1);

/// How long a negative answer stands without another attempt. After that, the configuration may have changed.
const NEGATIVE: Duration = Duration::from_secs(1);

/// How often an attempt asks the question.
const ROUNDS: usize = 6;

/// The known state of a server: whether its locks exclude other sessions.
#[derive(Default)]
pub(super) struct Proof {
    state: watch::Sender<State>,
    attempt: Mutex<Option<Attempt>>,
}

#[derive(Clone, Copy, Default)]
enum State {
    #[default]
    Unknown,
    Proven,
    Disproven(Instant),
}

struct Attempt {
    /// When the first acquire began to wait.
    since: Instant,
    /// Has changed if an answer was found since the attempt began.
    begun: watch::Receiver<State>,
    task: JoinHandle<()>,
    /// When the task last did something.
    stepped: Arc<Mutex<Instant>>,
}

impl Attempt {
    /// Whether it is too early for another attempt. The task of an attempt ends with its runtime, and makes no progress
    /// while the runtime is not driven.
    fn is_enough(&self, known: State) -> bool {
        let age = self.since.elapsed();
        let stepped = *self.stepped.lock().unwrap_or_else(PoisonError::into_inner);
        let is_running =
            !self.task.is_finished() && stepped.elapsed() < ATTEMPT + LONGEST_PAUSE + PAUSE;
        !self.begun.has_changed().unwrap_or(true)
            && match known {
                State::Unknown => is_running,
                State::Disproven(_) if is_running => age < ATTEMPT + PAUSE,
                State::Proven | State::Disproven(_) => age < PAUSE,
            }
    }
}

impl Proof {
    /// Whether it is known that locks exclude other sessions.
    pub(super) fn is_positive(&self) -> bool {
        matches!(*self.state.borrow(), State::Proven)
    }

    /// Whether it is known that locks exclude nothing.
    pub(super) fn is_negative(&self) -> bool {
        matches!(*self.state.borrow(), State::Disproven(_))
    }

    /// Records that a session was answered by another backend.
    ///
    /// Only for a new finding: a session that is ended because of a negative answer must not call this, because refused
    /// acquires would then undo each answer.
    pub(super) fn disprove(&self) {
        self.state.send_modify(|state| *state = State::Disproven(Instant::now()));
    }

    /// Returns whether a lock may be granted. Starts the proof if there is none, and waits for it, but not
    /// beyond the caller's deadline.
    pub(super) async fn allows(&self, pool: &PgPool, deadline: Option<Instant>) -> bool {
        if self.is_positive() {
            return true;
        }
        if let Some((mut begun, wait_until)) = self.start(pool) {
            let wait_until = deadline.map_or(wait_until, |deadline| deadline.min(wait_until));
            drop(timeout_at(wait_until.into(), begun.changed()).await);
        }
        !self.is_negative()
    }

    /// Starts an attempt if one is needed and none is running. Returns the receiver to wait on, and the time until
    /// which to wait.
    fn start(&self, pool: &PgPool) -> Option<(watch::Receiver<State>, Instant)> {
        let mut attempt = self.attempt.lock().unwrap_or_else(PoisonError::into_inner);
        let begun = self.state.subscribe();
        let known = *begun.borrow();
        let waiting_since = match known {
            State::Unknown => attempt.as_ref().map(|attempt| attempt.since),
            State::Disproven(at) if at.elapsed() >= NEGATIVE => None,
            State::Disproven(_) | State::Proven => return None,
        };
        if !attempt.as_ref().is_some_and(|attempt| attempt.is_enough(known)) {
            let stepped = Arc::new(Mutex::new(Instant::now()));
            let proving =
                prove(self.state.clone(), begun.clone(), pool.clone(), Arc::clone(&stepped));
            let since = waiting_since.unwrap_or_else(Instant::now);
            let task = Handle::current().spawn(proving);
            *attempt = Some(Attempt { since, begun, task, stepped });
        }
        attempt.as_ref().map(|attempt| (attempt.begun.clone(), attempt.since + WAIT))
    }
}

async fn prove(
    state: watch::Sender<State>,
    mut begun: watch::Receiver<State>,
    pool: PgPool,
    stepped: Arc<Mutex<Instant>>,
) {
    let options = pool.connect_options();
    // The task must not keep the pool open.
    drop(pool);
    let mut pause = PAUSE;
    loop {
        *stepped.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        match timeout(ATTEMPT, Box::pin(excludes(&options))).await {
            Ok(Ok(excludes)) => return answer(&state, &begun, excludes),
            Ok(Err(error)) => tracing::debug!(
                error = %chain(&error),
                "cannot prove yet that locks exclude other sessions; trying again"
            ),
            Err(_) => tracing::debug!(
                "cannot prove yet that locks exclude other sessions: no answer; trying again"
            ),
        }
        // While acquires are refused, they start the next attempts.
        if matches!(*state.borrow(), State::Disproven(_)) {
            return;
        }
        // A release or a heartbeat may have found the answer meanwhile.
        if timeout(pause, begun.changed()).await.is_ok() {
            return;
        }
        pause = LONGEST_PAUSE.min(2 * pause);
    }
}

/// Sets the answer of an attempt. A positive answer counts only if no other answer was found since the attempt began.
fn answer(state: &watch::Sender<State>, begun: &watch::Receiver<State>, excludes: bool) {
    state.send_if_modified(|state| {
        let counts = !excludes || !begun.has_changed().unwrap_or(true);
        if counts {
            *state = if excludes { State::Proven } else { State::Disproven(Instant::now()) };
        }
        counts
    });
}

/// The SQLSTATE `protocol_violation`.
const PROTOCOL_VIOLATION: &str = "08P01";

/// Asks whether a lock that one session holds is refused to another.
pub(crate) async fn excludes(options: &PgConnectOptions) -> Result<bool, sqlx::Error> {
    let started = Instant::now();
    let mut holder = PgConnection::connect_with(options).await?;
    let limit = 2 * started.elapsed() + GRACE;
    let mut other = PgConnection::connect_with(options).await?;
    for conn in [&mut holder, &mut other] {
        within(limit, sql::backend::heartbeat(conn, None)).await?;
    }
    let key = unused_key();
    let mut excludes = Ok(true);
    for _ in 0..ROUNDS {
        if matches!(excludes, Ok(true)) {
            excludes = ask(options, &mut holder, &mut other, key).await;
        }
    }
    // Each connection is closed even if `close` fails, and the server then frees its locks.
    drop(tokio::join!(holder.close(), other.close()));
    excludes
}

/// Returns a random key, which nothing else uses.
fn unused_key() -> i64 {
    RandomState::new().hash_one(0).cast_signed()
}

/// How long the server may need to end a session whose connection was closed.
const ENDING: Duration = Duration::from_secs(5);
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Asks whether a lock stays when its connection is closed, because a pooler keeps the session as it is.
pub(crate) async fn outlives_connection(options: &PgConnectOptions) -> Result<bool, sqlx::Error> {
    let key = unused_key();
    let lock = (KeyId::BigInt(key), Mode::Exclusive);
    let mut conn = PgConnection::connect_with(options).await?;
    let (pid, _) = sql::proof::lock(&mut conn, key, false).await?;
    conn.close().await?;
    let mut conn = PgConnection::connect_with(options).await?;
    let closed = Instant::now();
    let stays = loop {
        let (_, held) = sql::backend::holdings(&mut conn, &[pid]).await?;
        let stays = sql::backend::is_covered(&held, pid, lock);
        if !stays || closed.elapsed() > ENDING {
            break stays;
        }
        sleep(POLL_INTERVAL).await;
    };
    if stays {
        // Releases the lock if the pooler has assigned that session to this connection. Otherwise the lock stays, on a
        // random key that nothing else uses.
        drop(sql::release::unlock_on(&mut conn, pid, &[lock]).await);
    }
    conn.close().await?;
    Ok(stays)
}

async fn ask(
    options: &PgConnectOptions,
    holder: &mut PgConnection,
    other: &mut PgConnection,
    key: i64,
) -> Result<bool, sqlx::Error> {
    let lock = [(KeyId::BigInt(key), Mode::Exclusive)];
    let (holding, locked) = sql::proof::lock(holder, key, false).await?;
    let (asked, granted) = match sql::proof::lock(other, key, true).await {
        // A pooler that assigns a server connection to each statement allows no transaction.
        Err(error) if sqlstate(&error).as_deref() == Some(PROTOCOL_VIOLATION) => {
            sql::release::unlock_all(holder, &lock).await.ok();
            return Ok(false);
        }
        answer => answer?,
    };
    let same = holding == asked;
    let mut excludes = locked && !granted && !same;
    let mut unlocked = None;
    if excludes {
        unlocked = Some(sql::release::unlock_all(holder, &lock).await?);
    } else {
        // The backend may belong to another client, and would keep the lock that it was granted. A server that runs all
        // clients in one session makes the holder wait until the transaction ends.
        for _ in 0..u8::from(granted) + u8::from(locked && same) {
            sql::release::unlock_all(other, &lock).await?;
        }
    }
    sql::proof::rollback(other).await?;
    if locked && !same {
        let Unlocked { backend_pid, all } = match unlocked {
            Some(answer) => answer,
            None => sql::release::unlock_all(holder, &lock).await?,
        };
        excludes &= all && backend_pid == holding;
        if !all {
            retrieve(options, holding, &lock).await?;
        }
    }
    Ok(excludes)
}

#[cfg(test)]
mod tests {
    use sqlx::postgres::PgPoolOptions;
    use tokio::task::Id;

    use super::*;

    fn make_expire(proof: &Proof) {
        let then = Instant::now().checked_sub(NEGATIVE).unwrap();
        proof.state.send_modify(|state| *state = State::Disproven(then));
    }

    fn task(proof: &Proof) -> Option<Id> {
        proof.attempt.lock().unwrap().as_ref().map(|attempt| attempt.task.id())
    }

    /// A pool of a server that never answers.
    fn no_server() -> PgPool {
        let options = PgConnectOptions::new().host("127.0.0.1").port(1);
        PgPoolOptions::new().connect_lazy_with(options)
    }

    #[test]
    fn an_attempt_that_began_before_a_disproof_proves_nothing() {
        let proof = Proof::default();
        let begun = proof.state.subscribe();
        proof.disprove();
        answer(&proof.state, &begun, true);
        assert!(proof.is_negative());

        answer(&proof.state, &proof.state.subscribe(), true);
        assert!(proof.is_positive());
    }

    #[test]
    fn a_negative_answer_always_counts() {
        let proof = Proof::default();
        let begun = proof.state.subscribe();
        answer(&proof.state, &begun, true);
        answer(&proof.state, &begun, false);
        assert!(proof.is_negative());
    }

    #[tokio::test]
    async fn a_disproof_counts_until_another_attempt_succeeds() {
        let (proof, pool) = (Proof::default(), no_server());
        assert!(proof.allows(&pool, None).await);
        let first = task(&proof);
        assert!(proof.allows(&pool, None).await);
        assert_eq!(task(&proof), first);

        proof.disprove();
        assert!(!proof.allows(&pool, None).await);
        assert_eq!(task(&proof), first);

        make_expire(&proof);
        assert!(!proof.allows(&pool, None).await);
        let second = task(&proof);
        assert_ne!(second, first);
        assert!(!proof.allows(&pool, None).await);
        assert_eq!(task(&proof), second);

        let begun = proof.attempt.lock().unwrap().as_ref().unwrap().begun.clone();
        answer(&proof.state, &begun, true);
        assert!(proof.allows(&pool, None).await);
    }

    /// The attempt's task makes no progress, as if its runtime were not driven.
    #[tokio::test]
    async fn an_attempt_that_stands_still_is_made_again() {
        let (proof, pool) = (Proof::default(), no_server());
        assert!(proof.allows(&pool, None).await);
        let first = task(&proof);
        let long = ATTEMPT + LONGEST_PAUSE + PAUSE;
        let then = Instant::now().checked_sub(long).unwrap();
        *proof.attempt.lock().unwrap().as_ref().unwrap().stepped.lock().unwrap() = then;
        assert!(proof.allows(&pool, None).await);
        assert_ne!(task(&proof), first);
    }

    #[tokio::test]
    async fn an_attempt_that_pauses_ends_with_a_disproof() {
        let (proof, pool) = (Proof::default(), no_server());
        assert!(proof.allows(&pool, None).await);
        let first = proof.attempt.lock().unwrap().take().unwrap().task;
        proof.disprove();
        timeout(PAUSE / 2, first).await.unwrap().unwrap();
    }
}
