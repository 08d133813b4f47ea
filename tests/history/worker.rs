//! A worker, which takes locks, records what it does under them, and continues after every loss.
//!
//! Some workers have locks with a session of their own, through which they write. The others have a manager, whose
//! session can't be borrowed: the register, which has the tokens, guards all that they write.

use std::env;
use std::process;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pglock::{Error, ExclusiveGuard, Lock, LockManager, LockOptions, Result as LockResult};
use pglock_testkit::{Role, cancel_after, cues, eventually, say};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{Acquire, PgConnection, PgPool};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::checker::Kind;
use crate::dice::Dice;
use crate::support::borrow_all;

/// How long a worker waits for an answer of the server before it reports a loss. The server times out after three
/// seconds.
pub(crate) const GIVES_UP: Duration = Duration::from_secs(1);

pub(crate) const KEYS: i64 = 4;

/// How many tasks of a worker acquire locks.
const TASKS: u64 = 2;

/// The tables that the workers write. The register has the token of a hold before the hold writes anything else.
pub(crate) const SCHEMA: &str = "
    CREATE TABLE register (key int8 PRIMARY KEY, token int8 NOT NULL);
    CREATE TABLE event (
        id bigserial PRIMARY KEY,
        at timestamptz NOT NULL DEFAULT clock_timestamp(),
        key int8 NOT NULL,
        token int8 NOT NULL,
        kind text NOT NULL,
        worker int4 NOT NULL,
        pid int4 NOT NULL DEFAULT pg_backend_pid()
    )";

/// Admits any token, even one that is not greater than the register's, because the checker checks that tokens grow.
const BEGIN: &str = "
    WITH raised AS
        (UPDATE register SET token = greatest(token, $2) WHERE key = $1 RETURNING key)
    INSERT INTO event (key, token, kind, worker) SELECT $1, $2, $3, $4 FROM raised";

/// Changes nothing if the register has seen a greater token.
const GUARDED: &str = "
    WITH admitted AS
        (UPDATE register SET token = $2 WHERE key = $1 AND token <= $2 RETURNING key)
    INSERT INTO event (key, token, kind, worker) SELECT $1, $2, $3, $4 FROM admitted";

const NOTE: &str = "INSERT INTO event (key, token, kind, worker) VALUES ($1, $2, $3, $4)";

const URL: &str = "PGLOCK_SOAK_URL";
const HAS_MANAGER: &str = "PGLOCK_SOAK_MANAGER";
const NUMBER: &str = "PGLOCK_SOAK_WORKER";
const SEED: &str = "PGLOCK_SOAK_WORKER_SEED";

/// Starts a worker on a database.
pub(crate) fn start(url: &str, number: i32, has_manager: bool, seed: u64) -> Role {
    let (number, seed) = (number.to_string(), seed.to_string());
    let has_manager = if has_manager { "1" } else { "0" };
    let env = [(URL, url), (NUMBER, &number), (HAS_MANAGER, has_manager), (SEED, &seed)];
    Role::start("worker::works", &env)
}

/// Asks workers to stop, and waits until each has checked that its pool is intact.
pub(crate) async fn stop(mut workers: Vec<&mut Role>) {
    for worker in &mut workers {
        worker.tell("stop").await;
    }
    for worker in &mut workers {
        assert_eq!(worker.answer().await, "intact");
    }
}

#[tokio::test]
#[ignore = "is a role: the history runs it as a process"]
async fn works() {
    // Without a URL, no test runs this as a role.
    let Ok(url) = env::var(URL) else { return };
    let number = |name| env::var(name).unwrap().parse().unwrap();
    let mut dice = Dice::new(number(SEED));
    let options = PgConnectOptions::from_str(&url).unwrap();
    // `Chaos` finds the sessions of a worker by this name.
    let options = options.application_name(&format!("worker {}", number(NUMBER)));
    let pool = PgPoolOptions::new().max_connections(6).connect_lazy_with(options);
    let manager = (number(HAS_MANAGER) == 1)
        .then(|| LockManager::new(&options_of_a_lock().on(&pool).unwrap()));
    let lock = |key| match &manager {
        Some(manager) => Lock::new(&manager, key),
        None => Lock::new(&options_of_a_lock().on(&pool).unwrap(), key),
    };
    let stopping = Arc::new(AtomicBool::new(false));
    let mut tasks = JoinSet::new();
    for _ in 0..TASKS {
        let mut task = Task {
            pool: pool.clone(),
            locks: (0..KEYS).map(lock).collect(),
            has_manager: manager.is_some(),
            worker: i32::try_from(number(NUMBER)).unwrap(),
            dice: Dice::new(dice.below(u64::MAX)),
        };
        let stopping = Arc::clone(&stopping);
        tasks.spawn(async move {
            while !stopping.load(Ordering::Relaxed) {
                task.go_round().await;
            }
        });
    }

    let mut cues = cues();
    tokio::select! {
        cue = cues.next_line() => drop(cue),
        // A task has panicked, and printed why. The runtime would not end before the next cue.
        _ = tasks.join_next() => process::exit(1),
    }
    stopping.store(true, Ordering::Relaxed);
    while let Some(ended) = tasks.join_next().await {
        ended.unwrap();
    }
    let back = async || usize::try_from(pool.size()).unwrap() == pool.num_idle();
    eventually("every connection is back in the pool", Duration::from_secs(20), back).await;
    borrow_all(&pool).await;
    say("intact");
}

fn options_of_a_lock() -> LockOptions {
    let second = Duration::from_secs(1);
    let options =
        LockOptions::new().heartbeat_interval(GIVES_UP / 2).heartbeat_timeout(GIVES_UP / 2);
    options.keepalives_idle(second).keepalives_interval(second).keepalives_retries(2)
}

/// A task that acquires locks, one at a time.
#[derive(Debug)]
struct Task {
    pool: PgPool,
    locks: Vec<Lock>,
    /// Whether the locks have a manager, so that no lock's session can be borrowed.
    has_manager: bool,
    worker: i32,
    dice: Dice,
}

/// The identity of a hold.
#[derive(Clone, Copy, Debug)]
struct Hold {
    key: i64,
    token: i64,
    worker: i32,
}

/// Why an operation failed.
#[derive(Debug)]
enum Trouble {
    Lock(Error),
    Statement(sqlx::Error),
}

impl Task {
    /// Acquires, works and releases. Panics if one of these fails for a reason that is not transient.
    async fn go_round(&mut self) {
        let key = i64::try_from(self.dice.below(KEYS.unsigned_abs())).unwrap();
        let (guard, hold) = match self.begin(key).await {
            Ok(Some(begun)) => begun,
            Ok(None) => return,
            Err(trouble) => return trouble.passes(),
        };
        let worked = self.work(&guard, hold).await.map_err(Trouble::passes);
        // After an error, the task always asks whether it has lost the lock.
        let asks = worked.is_err() || !self.dice.one_in(3);
        let told = match let_go(guard, asks).await {
            Some(Ok(())) => hold.note(Kind::Released, &self.pool).await.map_err(Trouble::from),
            Some(Err(_)) => self.reports_a_loss(hold).await,
            None => Ok(()),
        };
        if let Err(trouble) = told {
            trouble.passes();
        }
    }

    /// Acquires a lock in one of several ways, and records the begin of the hold.
    async fn begin(&mut self, key: i64) -> Result<Option<(ExclusiveGuard, Hold)>, Trouble> {
        let lock = &mut self.locks[usize::try_from(key).unwrap()];
        if self.dice.one_in(10) {
            // Another owner; the first one may still be releasing.
            *lock = lock.clone();
        }
        let limit = Duration::from_millis(self.dice.below(100));
        let polls = self.dice.place(6);
        let acquired = match self.dice.below(7) {
            0 => lock.try_acquire().await?,
            1 => lock.try_acquire_for(limit).await?,
            2 => timeout(limit, lock.acquire()).await.ok().transpose()?,
            3 | 4 => cancel_after(polls, lock.acquire()).await.transpose()?,
            _ => Some(lock.acquire().await?),
        };
        let Some(guard) = acquired else { return Ok(None) };
        let token = guard.fencing_token().await?;
        let hold = Hold { key, token, worker: self.worker };
        if !self.has_manager {
            hold.write(BEGIN, Kind::Begin, &mut *guard.connection().await?).await?;
        } else if !hold.row(GUARDED, Kind::Begin, &self.pool).await? {
            // The next hold has begun already, so this one was lost. Its release reports that.
            hold.note(Kind::Refused, &self.pool).await?;
        }
        Ok(Some((guard, hold)))
    }

    /// Writes and sleeps at random, and records that the hold is about to end.
    async fn work(&mut self, guard: &ExclusiveGuard, hold: Hold) -> Result<(), Trouble> {
        for _ in 0..self.dice.below(4) {
            let anything = self.dice.below(5);
            match anything {
                0 | 1 | 4 if self.has_manager => hold.write_guarded(&self.pool).await?,
                0 => hold.write(NOTE, Kind::Write, &mut *guard.connection().await?).await?,
                1 => hold.write_several(&mut *guard.connection().await?).await?,
                2 => {
                    // The register is asked some time after the guard was checked.
                    let time = self.time();
                    let late = async {
                        sleep(time).await;
                        hold.write_guarded(&self.pool).await
                    };
                    guard.while_held(late).await??;
                }
                3 => guard.while_held(sleep(self.time())).await?,
                _ => {
                    // Borrowed for longer than the heartbeat's interval, so that the heartbeat uses another connection.
                    let mut conn = guard.connection().await?;
                    sleep(self.time()).await;
                    hold.write(NOTE, Kind::Write, &mut conn).await?;
                }
            }
        }
        if self.has_manager {
            hold.write_guarded(&self.pool).await?;
        } else {
            hold.write(NOTE, Kind::End, &mut *guard.connection().await?).await?;
        }
        Ok(())
    }

    /// Records the loss, and then tries to write as if it had not been reported.
    async fn reports_a_loss(&mut self, hold: Hold) -> Result<(), Trouble> {
        hold.note(Kind::Lost, &self.pool).await?;
        sleep(self.time()).await;
        hold.write_guarded(&self.pool).await?;
        Ok(())
    }

    /// Returns a random time, usually of some milliseconds, sometimes longer than a heartbeat.
    fn time(&mut self) -> Duration {
        let longest = if self.dice.one_in(20) { 1200 } else { 20 };
        Duration::from_millis(self.dice.below(longest))
    }
}

/// Releases or drops the guard. Returns whether the hold was kept to the end, or lost, if that is known.
async fn let_go(guard: ExclusiveGuard, asks: bool) -> Option<LockResult<()>> {
    if !asks {
        let lost = guard.is_lost();
        return if lost { Some(guard.release().await) } else { None };
    }
    let released = guard.release().await;
    let told = matches!(released, Ok(()) | Err(Error::Lost { .. }));
    assert!(told, "a release can only tell a loss: {released:?}");
    Some(released)
}

impl Hold {
    /// Writes one row, if the statement admits it. Returns whether it does.
    async fn row<'c, C>(self, statement: &'static str, kind: Kind, conn: C) -> sqlx::Result<bool>
    where
        C: sqlx::PgExecutor<'c>,
    {
        let query = sqlx::query(statement).bind(self.key).bind(self.token);
        let query = query.bind(kind.name()).bind(self.worker);
        Ok(query.execute(conn).await?.rows_affected() == 1)
    }

    /// Writes one row through the lock's session.
    async fn write(
        self,
        statement: &'static str,
        kind: Kind,
        conn: &mut PgConnection,
    ) -> sqlx::Result<()> {
        assert!(self.row(statement, kind, conn).await?);
        Ok(())
    }

    /// Writes some rows in one transaction of the lock's session.
    async fn write_several(self, conn: &mut PgConnection) -> sqlx::Result<()> {
        let mut transaction = conn.begin().await?;
        for _ in 0..3 {
            self.write(NOTE, Kind::Write, &mut transaction).await?;
        }
        transaction.commit().await
    }

    /// Writes through a connection of the pool if the register admits it, and otherwise records the refusal.
    async fn write_guarded(self, pool: &PgPool) -> sqlx::Result<()> {
        if self.row(GUARDED, Kind::Guarded, pool).await? {
            return Ok(());
        }
        self.note(Kind::Refused, pool).await
    }

    async fn note(self, kind: Kind, pool: &PgPool) -> sqlx::Result<()> {
        self.row(NOTE, kind, pool).await.map(drop)
    }
}

impl Trouble {
    /// Panics unless the reason is transient: an error that the library promises to be transient, or one that a
    /// statement returns when its session ends.
    fn passes(self) {
        let passes = match &self {
            Self::Lock(error) => error.is_transient(),
            Self::Statement(sqlx::Error::Database(error)) => {
                error.code().is_some_and(|code| code.starts_with("57P"))
            }
            Self::Statement(error) => {
                matches!(error, sqlx::Error::Io(_) | sqlx::Error::PoolTimedOut)
            }
        };
        assert!(passes, "this does not pass: {self:?}");
    }
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        Self::Lock(error)
    }
}

impl From<sqlx::Error> for Trouble {
    fn from(error: sqlx::Error) -> Self {
        Self::Statement(error)
    }
}
