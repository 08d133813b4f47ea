//! Checks that random operations on a few keys, from many handles and tasks at once, keep every guarantee. If the
//! number of operations is set, they run in an environment of the testkit that the seed chooses.
//!
//! Throughout a run, the tests check mutual exclusion among guards that are not lost, that fencing tokens grow, that
//! errors are of expected kinds only, and that every call ends within its bound. At the end, they check that there is
//! no lock and no waiter, and that the pool has all its connections back, idle and outside of a transaction.
//!
//! | variable | meaning |
//! |---|---|
//! | `PGLOCK_STRESS_OPERATIONS` | the number of operations of both tests together (6,000) |
//! | `PGLOCK_STRESS_SEED` | repeats the choices of a run, though not its interleaving |
//! | `PGLOCK_TEST_ENVIRONMENT` | the environment, instead of the one that the seed chooses |
//! | `PGLOCK_STRESS_WITHOUT` | verbs to leave out, separated by spaces, to look past a known failure |

#![expect(
    clippy::expect_used,
    clippy::large_futures,
    clippy::unwrap_used,
    reason = "in a test, what cannot go on panics, and the message says why"
)]

mod world;
mod table;
mod guard;
mod member;
mod family;
mod hold;
mod borrow;
mod faults;
mod calls;
#[path = "../history/dice.rs"]
mod dice;

use std::env;
use std::iter;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, SystemTime};

use pglock_testkit::{ENVIRONMENTS, Environment, PLAIN, TestDb, advisory_locks, eventually};
use sqlx::{PgPool, Row as _};
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio::time::timeout;

use dice::Dice;
use world::{Weather, World};

/// The number of tasks that share nothing but the pool and the keys.
const LONERS: u64 = 4;
/// The number of sessions that several tasks share.
const FAMILIES: u64 = 3;
/// The size of the pool, more than all guards of all tasks need at once, so that a timeout of the pool is a failure.
const CONNECTIONS: u32 = 30;
/// How long abandoned calls may take to leave the server.
const SETTLED: Duration = Duration::from_secs(15);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_operations_without_faults_keep_every_guarantee() {
    stress(Weather::Calm).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_operations_among_killed_and_cancelled_backends_keep_every_guarantee() {
    stress(Weather::Stormy).await;
}

async fn stress(weather: Weather) {
    let operations = number("PGLOCK_STRESS_OPERATIONS").unwrap_or(6_000) / 2;
    let seed = *SEED;
    let environment = environment(seed);
    // With a longer round trip, each operation takes longer, so there are fewer of them.
    let operations = operations / environment.limit(Duration::from_secs(1)).as_secs();
    let db = TestDb::new().await;
    let pool = db.pool(CONNECTIONS).await;
    let world = World::new(&db, &pool, weather, seed, operations).await;

    let mut dice = Dice::new(seed);
    let mut tasks = JoinSet::new();
    for _ in 0..LONERS {
        tasks.spawn(member::run_alone(Arc::clone(&world), Dice::new(dice.below(u64::MAX))));
    }
    for number in 0..FAMILIES {
        tasks.spawn(family::run(Arc::clone(&world), number, Dice::new(dice.below(u64::MAX))));
    }
    while let Some(ended) = tasks.join_next().await {
        if let Err(panic) = ended {
            world.fail(format!("a task ended early: {panic}"));
        }
    }
    world.summarize();
    world.assert_no_failure();

    drop(world);
    nothing_is_left(&db, &pool).await;
    timeout(settled(), pool.close()).await.expect("the pool closes");
}

/// Both tests of the process have the same seed, and so the same environment.
static SEED: LazyLock<u64> = LazyLock::new(|| {
    number("PGLOCK_STRESS_SEED").unwrap_or_else(|| {
        u64::from(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().subsec_nanos())
    })
});

/// Returns the environment of the process. In a long run, the seed chooses among those in which a pool can have more
/// connections than guards need. On a server of the user's, it is the plain one, because the others need a server of
/// their own.
fn environment(seed: u64) -> &'static Environment {
    let is_long = number("PGLOCK_STRESS_OPERATIONS").is_some();
    if !is_long || env::var("DATABASE_URL").is_ok_and(|url| !url.is_empty()) {
        return Environment::current();
    }
    let rows = iter::once(&PLAIN).chain(ENVIRONMENTS);
    let rows: Vec<_> = rows.filter(|row| row.has_connections(CONNECTIONS)).collect();
    let chosen = rows.get(Dice::new(seed).place(rows.len())).copied();
    // The choice is the same on each machine, because it does not depend on what the machine lacks.
    let available = chosen.filter(|row| row.is_available());
    Environment::current_or(available.unwrap_or(&PLAIN))
}

fn settled() -> Duration {
    Environment::current().limit(SETTLED)
}

/// Waits until nothing is left of the operations: on the server, and in the pool.
async fn nothing_is_left(db: &TestDb, pool: &PgPool) {
    let admin = Mutex::new(db.admin().await);
    let no_locks = async || advisory_locks(&mut *admin.lock().await).await.is_empty();
    eventually("the server has no advisory lock and no waiter", settled(), no_locks).await;
    let idle = async || pool.num_idle() == usize::try_from(pool.size()).unwrap();
    eventually("the pool has all its connections back, idle", settled(), idle).await;

    // A lost slot of the pool does not show in its counts, but in how many connections can still be acquired.
    let mut borrowed = Vec::new();
    for _ in 0..CONNECTIONS {
        let mut connection = timeout(settled(), pool.acquire()).await.expect("a slot").unwrap();
        // With the simple protocol, both times are the same outside of a transaction.
        let row = sqlx::raw_sql(
            "SELECT pg_catalog.now() OPERATOR(pg_catalog.<>) pg_catalog.statement_timestamp()",
        );
        let row = row.fetch_one(&mut *connection).await.unwrap();
        assert!(!row.get::<bool, _>(0), "a pooled connection is inside of a transaction");
        borrowed.push(connection);
    }
}

fn number(variable: &str) -> Option<u64> {
    env::var(variable).ok().map(|number| number.parse().expect("a number"))
}
