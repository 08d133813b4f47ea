//! The ways to lock that are compared, and a task that locks in one of them.

use std::time::Duration;

use pglock::{ConfiguredPool, Lock, LockManager, LockOptions};
use sqlx::PgPool;
use sqlx::error::BoxDynError;
use sqlx::postgres::{PgAdvisoryLock, PgAdvisoryLockKey, PgConnectOptions, PgPoolOptions};
use sqlx::query;
use tokio::sync::Semaphore;

use crate::floor::Floor;

/// A way to lock.
#[derive(Clone, Copy, Eq, PartialEq)]
pub(crate) enum Who {
    ByHand,
    /// Batches of calls on one connection, without guards, table or safety.
    Floor,
    Lock,
    Manager,
    /// Each release waits for the server's answer.
    ManagerAwaited,
    Sqlx,
}

impl Who {
    /// All ways to lock. The others are compared with the first one.
    pub(crate) const ALL: [Self; 6] =
        [Self::Sqlx, Self::ByHand, Self::Lock, Self::Floor, Self::ManagerAwaited, Self::Manager];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::ByHand => "SQL by hand",
            Self::Floor => "bare batches, without guards",
            Self::Lock => "`Lock`",
            Self::Manager => "`LockManager`, re-acquired in the process",
            Self::ManagerAwaited => "`LockManager`, releases awaited",
            Self::Sqlx => "sqlx's `PgAdvisoryLock`",
        }
    }

    /// Returns the name without how the lock is released.
    pub(crate) fn short_name(self) -> &'static str {
        self.name().split(',').next().unwrap_or_default()
    }

    pub(crate) fn is_manager(self) -> bool {
        matches!(self, Self::Manager | Self::ManagerAwaited)
    }
}

/// The state that the tasks of one process share.
pub(crate) struct Means {
    who: Who,
    pool: PgPool,
    /// The pool, which reserves no connection for queries, because there are none.
    configured: ConfiguredPool,
    manager: LockManager,
    floor: Floor,
}

impl Means {
    /// Makes a pool of at most `connections` connections, of which none is open yet.
    pub(crate) fn new(
        who: Who,
        options: PgConnectOptions,
        connections: u32,
    ) -> pglock::Result<Self> {
        let pool = PgPoolOptions::new()
            .max_connections(connections)
            // All of them may have to connect, one after the other.
            .acquire_timeout(Duration::from_mins(2))
            .connect_lazy_with(options);
        let floor = Floor::start(pool.clone());
        let configured = LockOptions::new().reserve_connections(0).on(&pool)?;
        Ok(Self { who, manager: LockManager::new(&configured), floor, configured, pool })
    }

    pub(crate) fn task(&self, key: i64) -> Task {
        match self.who {
            Who::ByHand => Task::ByHand(self.pool.clone(), key),
            Who::Floor => Task::Floor(self.floor.clone(), key),
            Who::Lock => Task::Awaited(Lock::new(&self.configured, key)),
            Who::Manager => Task::Dropped(Lock::new(&self.manager, key)),
            Who::ManagerAwaited => Task::Awaited(Lock::new(&self.manager, key)),
            Who::Sqlx => {
                let lock = PgAdvisoryLock::with_key(PgAdvisoryLockKey::BigInt(key));
                Task::Sqlx(self.pool.clone(), lock)
            }
        }
    }

    /// Closes all connections. The tasks must have ended.
    pub(crate) async fn close(self) {
        let Self { pool, floor, .. } = self;
        drop(floor);
        pool.close().await;
    }
}

/// A task that locks one key.
pub(crate) enum Task {
    /// Locks with a handle of pglock, and awaits the releases.
    Awaited(Lock),
    ByHand(PgPool, i64),
    /// Locks with a handle of pglock, and drops the guards.
    Dropped(Lock),
    Floor(Floor, i64),
    Sqlx(PgPool, PgAdvisoryLock),
}

const LOCK: &str = "SELECT pg_advisory_lock($1)";
const UNLOCK: &str = "SELECT pg_advisory_unlock($1)";

impl Task {
    /// Acquires and releases the lock.
    pub(crate) async fn cycle(&mut self) -> Result<(), BoxDynError> {
        match self {
            Self::Awaited(lock) => lock.acquire().await?.release().await?,
            Self::ByHand(pool, key) => {
                let mut connection = pool.acquire().await?;
                query(LOCK).bind(*key).execute(&mut *connection).await?;
                query(UNLOCK).bind(*key).execute(&mut *connection).await?;
            }
            Self::Dropped(lock) => drop(lock.acquire().await?),
            Self::Floor(floor, key) => {
                floor.call(*key, true).await;
                floor.call(*key, false).await;
            }
            Self::Sqlx(pool, lock) => {
                let guard = lock.acquire(pool.acquire().await?).await?;
                drop(guard.release_now().await?);
            }
        }
        Ok(())
    }

    /// Acquires the lock, adds a permit to `held`, and holds the lock until `over` is closed.
    pub(crate) async fn hold(self, held: &Semaphore, over: &Semaphore) -> Result<(), BoxDynError> {
        let until_over = async {
            held.add_permits(1);
            // No task adds a permit, so this returns when `over` is closed.
            over.acquire().await.err();
        };
        match self {
            Self::Awaited(mut lock) | Self::Dropped(mut lock) => {
                let _guard = lock.acquire().await?;
                until_over.await;
            }
            Self::ByHand(pool, key) => {
                let mut connection = pool.acquire().await?;
                query(LOCK).bind(key).execute(&mut *connection).await?;
                until_over.await;
                query(UNLOCK).bind(key).execute(&mut *connection).await?;
            }
            Self::Floor(floor, key) => {
                if !floor.call(key, true).await {
                    return Err("a bare batch can't wait".into());
                }
                until_over.await;
                floor.call(key, false).await;
            }
            Self::Sqlx(pool, lock) => {
                let guard = lock.acquire(pool.acquire().await?).await?;
                until_over.await;
                drop(guard.release_now().await?);
            }
        }
        Ok(())
    }
}
