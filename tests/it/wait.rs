//! A deadlock is not mistaken for the end of a wait's slice.

use std::time::Duration;

use pglock::{Error, Lock, LockOptions};
use pglock_testkit::{Server, TestDb};
use tokio::time::timeout;

/// A slice shorter than `deadlock_timeout` would make a deadlock look like a timeout, for ever.
#[tokio::test]
async fn a_deadlock_is_found_however_late_the_server_looks_for_it() {
    let server = Server::options().setting("deadlock_timeout", "3s").start();
    let db = TestDb::on(&server).await;
    let pool = db.pool(2).await;
    let options = LockOptions::new().wait_slice(Duration::from_secs(2));
    let mut one = Lock::new(&options.on(&pool).unwrap(), 1);
    let mut two = Lock::new(&options.on(&pool).unwrap(), 1);
    let readers = (one.acquire_shared().await.unwrap(), two.acquire_shared().await.unwrap());

    let upgrade = async |lock: &mut Lock| match lock.acquire().await {
        Ok(guard) => guard.release().await.map(|()| true),
        Err(Error::Deadlock { .. }) => Ok(false),
        Err(error) => Err(error),
    };
    let (readers_one, readers_two) = readers;
    let both = async {
        tokio::join!(
            async {
                let upgraded = upgrade(&mut one).await.unwrap();
                drop(readers_one);
                upgraded
            },
            async {
                let upgraded = upgrade(&mut two).await.unwrap();
                drop(readers_two);
                upgraded
            },
        )
    };
    let (one, two) = timeout(Duration::from_secs(20), both).await.expect("the deadlock is found");
    assert!(one != two, "one gives way, the other gets through: {one} {two}");
}
