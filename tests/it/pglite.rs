//! PGlite has one session for all its clients: no lock is granted there for long.

use std::time::Duration;

use pglock::doctor::{Severity, examine};
use pglock::{Error, Lock, LockManager, LockOptions, Result};
use pglock_testkit::{Pglite, eventually};

use crate::support::pool_of;

const KEY: &str = "nightly-report";
/// Longer than anything here takes, unless it hangs.
const LIMIT: Duration = Duration::from_secs(30);

/// Whether an acquire was refused. It waits for the proof for 250 ms, and a busy machine may take longer.
fn is_refused<T>(acquired: Result<T>) -> bool {
    match acquired {
        Err(error @ Error::NoExclusion { .. }) => {
            let said = error.to_string();
            assert!(
                said.contains("the server itself; connect directly to a PostgreSQL server"),
                "{said}"
            );
            true
        }
        other => other.map(|_| false).unwrap(),
    }
}

#[tokio::test]
async fn locks_are_refused_and_doctor_names_the_engine() {
    let Some(server) = Pglite::start(10) else { return };
    let pool = pool_of(server.connect_options(), 3).await;
    let exclusive = async || is_refused(Lock::new(&pool, KEY).acquire().await);
    eventually("a lock is refused", LIMIT, exclusive).await;
    let shared = async || is_refused(Lock::new(&pool, KEY).try_acquire_shared().await);
    eventually("a shared lock is refused", LIMIT, shared).await;
    let manager = LockManager::new(&pool);
    let through_it = async || is_refused(Lock::new(&manager, KEY).acquire().await);
    eventually("a manager's lock is refused", LIMIT, through_it).await;

    let is_named = async || {
        let findings = examine(&pool, &LockOptions::new()).await.unwrap();
        let found = findings.iter().find(|finding| finding.check == "exclusion").unwrap();
        found.severity == Severity::Broken
            && found.seen == "the server is PGlite, where locks exclude no other session"
    };
    eventually("the engine is named", LIMIT, is_named).await;
}
