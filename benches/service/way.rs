//! The ways to serialize work that are compared.

use std::time::{Duration, Instant};

use pglock::{Lock, LockManager, transaction};
use sqlx::error::BoxDynError;
use sqlx::postgres::{PgAdvisoryLock, PgAdvisoryLockKey};
use sqlx::{PgConnection, PgPool, query};

/// A way to serialize work.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Way {
    Lock,
    /// The work runs on the connection of the lock.
    LockConnection,
    Manager,
    RowLock,
    Sqlx,
    Transaction,
}

impl Way {
    /// All ways. The others are compared with the first one.
    pub(crate) const ALL: [Self; 6] = [
        Self::RowLock,
        Self::Transaction,
        Self::Sqlx,
        Self::LockConnection,
        Self::Lock,
        Self::Manager,
    ];

    /// Returns the name for a picture.
    pub(crate) fn short_name(self) -> &'static str {
        match self {
            Self::Lock => "Lock",
            Self::LockConnection => "its conn.",
            Self::Manager => "Manager",
            Self::RowLock => "row lock",
            Self::Sqlx => "sqlx",
            Self::Transaction => "transact.",
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Lock => "`Lock`, dropped, work on the pool",
            Self::LockConnection => "`Lock`, work on its connection",
            Self::Manager => "`LockManager`, dropped, work on the pool",
            Self::RowLock => "`SELECT … FOR UPDATE`",
            Self::Sqlx => "sqlx's `PgAdvisoryLock`",
            Self::Transaction => "`transaction::acquire`",
        }
    }
}

/// The state that the tasks of a process share.
#[derive(Clone)]
pub(crate) struct Means {
    way: Way,
    pool: PgPool,
    manager: LockManager,
}

impl Means {
    pub(crate) fn new(way: Way, pool: PgPool) -> Self {
        Self { way, manager: LockManager::new(&pool), pool }
    }

    /// Works under the lock of a key. Returns how long it took until the work began.
    pub(crate) async fn cycle(&self, key: i64) -> Result<Duration, BoxDynError> {
        let started = Instant::now();
        let waited;
        match self.way {
            Way::RowLock => {
                let mut transaction = self.pool.begin().await?;
                let lock = query("SELECT id FROM bench WHERE id = $1 FOR UPDATE").bind(key);
                lock.execute(&mut *transaction).await?;
                waited = started.elapsed();
                work(&mut transaction).await?;
                transaction.commit().await?;
            }
            Way::Transaction => {
                let mut transaction = self.pool.begin().await?;
                transaction::acquire(&mut transaction, key).await?;
                waited = started.elapsed();
                work(&mut transaction).await?;
                transaction.commit().await?;
            }
            Way::Sqlx => {
                let lock = PgAdvisoryLock::with_key(PgAdvisoryLockKey::BigInt(key));
                let mut guard = lock.acquire(self.pool.acquire().await?).await?;
                waited = started.elapsed();
                work(&mut guard).await?;
                drop(guard.release_now().await?);
            }
            Way::LockConnection => {
                let guard = Lock::new(&self.pool, key).acquire().await?;
                waited = started.elapsed();
                work(&mut *guard.connection().await?).await?;
                guard.release().await?;
            }
            Way::Lock => {
                let _guard = Lock::new(&self.pool, key).acquire().await?;
                let mut connection = self.pool.acquire().await?;
                waited = started.elapsed();
                work(&mut connection).await?;
            }
            Way::Manager => {
                let _guard = Lock::new(&self.manager, key).acquire().await?;
                let mut connection = self.pool.acquire().await?;
                waited = started.elapsed();
                work(&mut connection).await?;
            }
        }
        Ok(waited)
    }
}

/// Does the work under the lock, which takes the server two milliseconds.
async fn work(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    query("SELECT pg_sleep(0.002)").execute(connection).await.map(drop)
}
