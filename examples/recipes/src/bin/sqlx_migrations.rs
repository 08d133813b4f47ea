//! Run sqlx's migrations under a lock of pglock, on many instances that start at once.
//!
//! `Migrator::run` takes an advisory lock by itself, so two instances never migrate at the same time. Where that is
//! all you need, use it as it is. A lock of pglock around it adds:
//!
//! * a timeout for the wait: sqlx waits without one;
//! * a release after a migration that fails: sqlx's lock stays on the pooled connection, and blocks every other
//!   instance;
//! * other work in the same lock, such as data to fill in (see the example `migration_lock`).
//!
//! The key is that of sqlx. So instances of an earlier release, which still call `Migrator::run`, are excluded too.

#![expect(clippy::print_stdout, reason = "an example tells what it does")]

use std::error::Error;
use std::path::Path;
use std::time::Duration;

use pglock::{Lock, interop};
use pglock_testkit::TestDb;
use sqlx::PgPool;
use sqlx::migrate::Migrator;
use tokio::task::JoinSet;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

#[tokio::main]
async fn main() -> Result<()> {
    // A database for the recipe. Yours has a pool from `PgPool::connect(&url).await?` for each instance.
    let db = TestDb::new().await;

    let mut instances = JoinSet::new();
    for _instance in 0..3 {
        instances.spawn(migrate(db.pool(2).await));
    }
    instances.spawn(migrate_in_the_earlier_release(db.pool(2).await));
    for migrated in instances.join_all().await {
        migrated?;
    }

    let pool = db.pool(2).await;
    let applied: i64 = sqlx::query_scalar("SELECT count(*) FROM _sqlx_migrations WHERE success")
        .fetch_one(&pool)
        .await?;
    let cities: i64 = sqlx::query_scalar("SELECT count(*) FROM city").fetch_one(&pool).await?;
    assert_eq!((applied, cities), (2, 3));
    println!("4 instances started at once: {applied} migrations were applied, each once");
    Ok(())
}

/// Applies the migrations that have not been applied.
async fn migrate(pool: PgPool) -> Result<()> {
    let mut migrator = migrations().await?;
    // This function holds the lock, and the migrator's own lock on the same key would wait for it.
    migrator.set_locking(false);

    let database: String = sqlx::query_scalar("SELECT current_database()").fetch_one(&pool).await?;
    let mut lock = Lock::new(&pool, interop::sqlx_migrations(database));
    let Some(guard) = lock.try_acquire_for(Duration::from_secs(30)).await? else {
        return Err("another instance has been migrating for 30 s; start again later".into());
    };
    // The migrations run on the session that holds the lock: if the session ends, none continues without the lock.
    let mut connection = guard.connection().await?;
    // `run` does the same, but its future can't be spawned if it has the connection of a guard.
    migrator.run_direct(None, &mut *connection, false).await?;
    drop(connection);
    Ok(guard.release().await?)
}

async fn migrate_in_the_earlier_release(pool: PgPool) -> Result<()> {
    Ok(migrations().await?.run(&pool).await?)
}

/// Reads the migrations. `sqlx::migrate!()` embeds them, with the feature `macros` of sqlx.
async fn migrations() -> Result<Migrator> {
    Ok(Migrator::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("migrations")).await?)
}
