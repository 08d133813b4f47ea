//! Counts, at the server, the connections that holders and waiters need.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use pglock_testkit::TestDb;
use sqlx::error::BoxDynError;
use sqlx::{PgConnection, query, query_scalar};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::who::{Means, Who};

/// The application name of the connections that are counted.
const NAME: &str = "pglock bench";

/// The key that all wait for.
const BUSY: i64 = -1;

/// The ways that can hold, for the picture and the table. Only one way with a manager is listed, because both hold in
/// the same way.
pub(crate) const HOLDERS: [Who; 5] = [Who::Sqlx, Who::ByHand, Who::Lock, Who::Floor, Who::Manager];

/// The ways that can wait.
pub(crate) const WAITERS: [Who; 4] = [Who::Sqlx, Who::ByHand, Who::Lock, Who::Manager];

/// Counts the connections of tasks that hold a key each, from a pool that is as large as it needs to be.
pub(crate) async fn of_holders(db: &TestDb, who: Who, tasks: u32) -> Result<u32, BoxDynError> {
    let mut scene = Scene::start(db, who, tasks, i64::from).await?;
    while scene.held.available_permits() < tasks as usize {
        scene.rest().await?;
    }
    let connections = count(&mut db.admin().await).await?;
    scene.end().await?;
    Ok(connections)
}

/// Counts the connections of tasks that all wait for one key, which another session holds.
pub(crate) async fn of_waiters(db: &TestDb, who: Who, tasks: u32) -> Result<u32, BoxDynError> {
    let mut holder = db.admin().await;
    query("SELECT pg_advisory_lock($1)").bind(BUSY).execute(&mut holder).await?;
    let mut scene = Scene::start(db, who, tasks, |_| BUSY).await?;
    // With a manager, or a `Lock` on a pool, one task waits at the server; the others wait in line behind it.
    let is_one = who.is_manager() || who == Who::Lock;
    let queue = if is_one { 1 } else { i64::from(tasks) };
    while scene.started.load(Ordering::Relaxed) < tasks || queued(&mut holder).await? < queue {
        scene.rest().await?;
    }
    let connections = count(&mut holder).await?;
    query("SELECT pg_advisory_unlock($1)").bind(BUSY).execute(&mut holder).await?;
    scene.end().await?;
    Ok(connections)
}

/// Tasks that acquire a lock, and hold it until the end.
struct Scene {
    started: Arc<AtomicU32>,
    held: Arc<Semaphore>,
    over: Arc<Semaphore>,
    tasks: JoinSet<Result<(), BoxDynError>>,
    means: Means,
}

impl Scene {
    async fn start(
        db: &TestDb,
        who: Who,
        tasks: u32,
        key: fn(u32) -> i64,
    ) -> Result<Self, BoxDynError> {
        // Waits until the connections of the last scene are closed.
        let mut admin = db.admin().await;
        while count(&mut admin).await? > 0 {
            sleep(Duration::from_millis(10)).await;
        }
        // Plain locks need a spare connection, because the crate listens to their sessions.
        let connections = if who.is_manager() { 2 } else { tasks + 2 };
        let means = Means::new(who, db.options().application_name(NAME), connections)?;
        let mut scene = Self {
            started: Arc::default(),
            held: Arc::new(Semaphore::new(0)),
            over: Arc::new(Semaphore::new(0)),
            tasks: JoinSet::new(),
            means,
        };
        for task in 0..tasks {
            let task = scene.means.task(key(task));
            let (held, over) = (Arc::clone(&scene.held), Arc::clone(&scene.over));
            let started = Arc::clone(&scene.started);
            scene.tasks.spawn(async move {
                started.fetch_add(1, Ordering::Relaxed);
                task.hold(&held, &over).await
            });
            // Tasks do not start all at once, because the server limits how many connections wait to be accepted.
            sleep(Duration::from_millis(2)).await;
        }
        Ok(scene)
    }

    /// Waits a little, and returns an error if a task has failed.
    async fn rest(&mut self) -> Result<(), BoxDynError> {
        if let Some(ended) = self.tasks.try_join_next() {
            ended??;
        }
        sleep(Duration::from_millis(10)).await;
        Ok(())
    }

    async fn end(mut self) -> Result<(), BoxDynError> {
        self.over.close();
        while let Some(done) = self.tasks.join_next().await {
            done??;
        }
        self.means.close().await;
        Ok(())
    }
}

async fn count(admin: &mut PgConnection) -> Result<u32, BoxDynError> {
    let sql = "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1";
    let count: i64 = query_scalar(sql).bind(NAME).fetch_one(admin).await?;
    Ok(u32::try_from(count)?)
}

async fn queued(admin: &mut PgConnection) -> Result<i64, BoxDynError> {
    let sql = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted";
    Ok(query_scalar(sql).fetch_one(admin).await?)
}
