//! What several tests ask of the server and of the pool.

use std::time::{Duration, Instant};

use pglock_testkit::advisory_locks;
use sqlx::{PgConnection, PgPool, Row};

/// The bound within which nothing may be left behind.
pub(crate) const SOON: Duration = Duration::from_secs(1);

/// Waits until the server knows of exactly `count` advisory locks, held or waited for.
pub(crate) async fn locks_are(admin: &mut PgConnection, count: usize, limit: Duration) {
    let started = Instant::now();
    loop {
        let locks = advisory_locks(admin).await;
        if locks.len() == count {
            return;
        }
        assert!(started.elapsed() < limit, "not {count} locks within {limit:?}: {locks:#?}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Waits until the server knows of no advisory lock and no waiter.
pub(crate) async fn no_locks(admin: &mut PgConnection) {
    locks_are(admin, 0, SOON).await;
}

/// Waits until a backend is in a state of `pg_stat_activity`.
pub(crate) async fn backend_is(admin: &mut PgConnection, pid: i32, state: &str, limit: Duration) {
    let started = Instant::now();
    loop {
        let now: Option<String> =
            sqlx::query_scalar("SELECT state FROM pg_stat_activity WHERE pid = $1")
                .bind(pid)
                .fetch_optional(&mut *admin)
                .await
                .unwrap();
        if now.as_deref() == Some(state) {
            return;
        }
        assert!(started.elapsed() < limit, "backend {pid} is {now:?}, not {state}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Borrows every connection of the pool at once; returns their backends, after asking each whether
/// it holds a lock or is inside a transaction.
pub(crate) async fn borrow_all(pool: &PgPool) -> Vec<i32> {
    let mut lent = Vec::new();
    let mut pids = Vec::new();
    for _ in 0..pool.options().get_max_connections() {
        // The pool lends all its connections within a second.
        let mut conn = tokio::time::timeout(SOON, pool.acquire()).await.unwrap().unwrap();
        // By the simple protocol, in which both times are the same outside a transaction.
        let row = sqlx::raw_sql(
            "SELECT pg_backend_pid(), now() <> statement_timestamp(), \
             (SELECT count(*) FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = 'advisory')",
        )
        .fetch_one(&mut *conn)
        .await
        .unwrap();
        let (pid, in_transaction, locks): (i32, bool, i64) = (row.get(0), row.get(1), row.get(2));
        assert_eq!(locks, 0, "a pooled connection holds a lock");
        assert!(!in_transaction, "a pooled connection is inside a transaction");
        pids.push(pid);
        lent.push(conn);
    }
    pids
}
