//! Let many read at once, and one write alone.
//!
//! You want this for data outside the database that are read often and replaced at times: files of a cache, an
//! index on a shared disk. Data in tables need no such lock, because they have transactions.

#![expect(clippy::print_stdout, reason = "an example tells what it does")]

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::time::Duration;

use pglock::Lock;
use tokio::task::JoinSet;
use tokio::time::sleep;

/// Two files that belong together: a reader must find the same version in both.
#[derive(Default)]
struct Cache {
    index: AtomicU32,
    data: AtomicU32,
    readers: AtomicUsize,
    most_readers: AtomicUsize,
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    // A database of the testkit. In your program: `PgPool::connect(&url).await?`.
    let pool = pglock_testkit::pool().await;
    let cache = Arc::new(Cache::default());
    let lock = Lock::new(&pool, "cache:user-123");

    let mut tasks = JoinSet::new();
    for _ in 0..5 {
        tasks.spawn(read(lock.clone(), Arc::clone(&cache)));
    }
    tasks.spawn(write(lock, Arc::clone(&cache)));
    while let Some(task) = tasks.join_next().await {
        task??;
    }

    let most = cache.most_readers.load(Ordering::SeqCst);
    assert!(most > 1, "readers should have shared the lock");
    println!("up to {most} read at once, and none saw half a version");
    Ok(())
}

async fn read(mut lock: Lock, cache: Arc<Cache>) -> pglock::Result<()> {
    for _ in 0..4 {
        let guard = lock.acquire_shared().await?;
        let readers = cache.readers.fetch_add(1, Ordering::SeqCst) + 1;
        cache.most_readers.fetch_max(readers, Ordering::SeqCst);

        let index = cache.index.load(Ordering::SeqCst);
        sleep(Duration::from_millis(50)).await;
        assert_eq!(index, cache.data.load(Ordering::SeqCst), "index and data differ");

        cache.readers.fetch_sub(1, Ordering::SeqCst);
        guard.release().await?;
    }
    Ok(())
}

async fn write(mut lock: Lock, cache: Arc<Cache>) -> pglock::Result<()> {
    for version in 1..=3 {
        sleep(Duration::from_millis(40)).await;
        // However many readers come, they queue behind a writer that waits.
        let guard = lock.acquire().await?;
        assert_eq!(cache.readers.load(Ordering::SeqCst), 0, "a reader is active");

        cache.index.store(version, Ordering::SeqCst);
        sleep(Duration::from_millis(50)).await;
        cache.data.store(version, Ordering::SeqCst);
        println!("version {version} is written");
        guard.release().await?;
    }
    Ok(())
}
