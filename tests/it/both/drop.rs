//! A guard may be dropped anywhere, without a panic or a leak.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use pglock::ExclusiveGuard;
use pglock_testkit::TestDb;
use tokio::runtime::{Builder, Runtime};

use super::{LETS_GO_UNDRIVEN, new_lock};
use crate::support::{all_are_idle, locks_are, no_locks, rounds, soon};

fn current_thread() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

fn multi_thread() -> Runtime {
    Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// Runtimes that are alive but that no thread drives, and on which a dropped guard still releases its lock.
fn left_alone() -> Vec<Runtime> {
    if LETS_GO_UNDRIVEN { vec![current_thread(), multi_thread()] } else { vec![multi_thread()] }
}

/// A lock on a runtime of its own, and a second runtime from which the test watches it.
struct Scene {
    watcher: Runtime,
    db: TestDb,
}

impl Scene {
    fn new() -> Self {
        let watcher = current_thread();
        let db = watcher.block_on(TestDb::new());
        Self { watcher, db }
    }

    fn acquire(&self, runtime: &Runtime) -> ExclusiveGuard {
        runtime.block_on(async {
            let pool = self.db.pool(2).await;
            new_lock(&pool, "nightly-report").acquire().await.unwrap()
        })
    }

    /// Waits until the server shows no lock, as another process would see it.
    fn lock_is_gone(&self) {
        self.watcher.block_on(async {
            no_locks(&mut self.db.admin().await).await;
        });
    }
}

#[test]
fn on_a_plain_thread() {
    for runtime in left_alone() {
        let scene = Scene::new();
        let guard = scene.acquire(&runtime);
        std::thread::spawn(move || drop(guard)).join().unwrap();
        scene.lock_is_gone();
    }
}

#[test]
fn at_the_end_of_a_thread_that_owns_it() {
    thread_local! {
        static GUARD: std::cell::RefCell<Option<ExclusiveGuard>> = const { std::cell::RefCell::new(None) };
    }
    for runtime in [current_thread(), multi_thread()] {
        let scene = Scene::new();
        let guard = scene.acquire(&runtime);
        std::thread::spawn(move || GUARD.with_borrow_mut(|slot| *slot = Some(guard)))
            .join()
            .unwrap();
        drop(runtime);
        scene.lock_is_gone();
    }
}

#[test]
fn during_a_panic() {
    for runtime in left_alone() {
        let scene = Scene::new();
        let guard = scene.acquire(&runtime);
        let caught = catch_unwind(AssertUnwindSafe(move || {
            let _guard = guard;
            panic!("as the test demands");
        }));
        assert!(caught.is_err());
        scene.lock_is_gone();
    }
}

#[test]
fn during_a_panic_inside_the_runtime() {
    for runtime in left_alone() {
        let scene = Scene::new();
        let guard = scene.acquire(&runtime);
        let caught = catch_unwind(AssertUnwindSafe(|| {
            runtime.block_on(async move {
                let _guard = guard;
                panic!("as the test demands");
            });
        }));
        assert!(caught.is_err());
        scene.lock_is_gone();
    }
}

#[test]
fn in_the_drop_of_something_else() {
    struct Owner(#[expect(dead_code, reason = "it is only there to be dropped")] ExclusiveGuard);
    impl Drop for Owner {
        fn drop(&mut self) {}
    }
    let runtime = multi_thread();
    let scene = Scene::new();
    drop(Owner(scene.acquire(&runtime)));
    scene.lock_is_gone();
}

#[test]
fn after_the_runtime_was_shut_down() {
    for runtime in [current_thread(), multi_thread()] {
        let scene = Scene::new();
        let guard = scene.acquire(&runtime);
        runtime.shutdown_timeout(Duration::from_secs(1));
        drop(guard);
        scene.lock_is_gone();
    }
}

#[test]
fn after_the_runtime_was_shut_down_inside_another() {
    let runtime = multi_thread();
    let scene = Scene::new();
    let guard = scene.acquire(&runtime);
    runtime.shutdown_background();
    current_thread().block_on(async move { drop(guard) });
    scene.lock_is_gone();
}

#[test]
fn with_the_runtime_and_unfinished_futures() {
    let runtime = multi_thread();
    let scene = Scene::new();
    let guard = scene.acquire(&runtime);
    runtime.spawn(async move {
        let _guard = guard;
        std::future::pending::<()>().await;
    });
    drop(runtime);
    scene.lock_is_gone();
}

#[test]
fn a_wait_that_goes_down_with_its_runtime_leaves_nothing() {
    let scene = Scene::new();
    let holder = multi_thread();
    let guard = scene.acquire(&holder);
    let runtime = multi_thread();
    let pool = runtime.block_on(scene.db.pool(2));
    runtime.spawn(async move { new_lock(&pool, "nightly-report").acquire().await });
    scene.watcher.block_on(async {
        let mut admin = scene.db.admin().await;
        locks_are(&mut admin, 2, soon() * 4).await;
        runtime.shutdown_background();
        // No task is left to cancel the wait. The server detects that its client has disconnected: within a second from
        // PostgreSQL 14 on, otherwise when the lock is granted or the slice ends.
        if admin.server_version_num() >= Some(140_000) {
            locks_are(&mut admin, 1, Duration::from_secs(8)).await;
        }
    });
    drop(guard);
    scene.lock_is_gone();
}

#[test]
fn at_the_end_of_block_on_in_a_runtime_that_is_kept() {
    for runtime in left_alone() {
        let scene = Scene::new();
        runtime.block_on(async {
            let pool = scene.db.pool(2).await;
            drop(new_lock(&pool, "nightly-report").acquire().await.unwrap());
        });
        scene.lock_is_gone();
        drop(runtime);
    }
}

#[test]
fn again_and_again_in_a_runtime_that_goes_on() {
    for runtime in left_alone() {
        let scene = Scene::new();
        runtime.block_on(async {
            let pool = scene.db.pool(1).await;
            let mut lock = new_lock(&pool, "nightly-report");
            for _ in 0..10 {
                drop(lock.acquire().await.unwrap());
            }
        });
        scene.lock_is_gone();
    }
}

#[test]
fn after_the_pool_was_closed() {
    for runtime in [current_thread(), multi_thread()] {
        let scene = Scene::new();
        runtime.block_on(async {
            let pool = scene.db.pool(2).await;
            let guard = new_lock(&pool, "nightly-report").acquire().await.unwrap();
            let closed = pool.close();
            drop(guard);
            tokio::time::timeout(soon() * 10, closed).await.expect("close does not hang");
        });
        scene.lock_is_gone();
    }
}

#[test]
fn after_the_pool_was_closed_and_dropped() {
    let runtime = multi_thread();
    let scene = Scene::new();
    let guard = runtime.block_on(async {
        let pool = scene.db.pool(2).await;
        let guard = new_lock(&pool, "nightly-report").acquire().await.unwrap();
        drop(tokio::time::timeout(Duration::from_millis(10), pool.close()).await);
        guard
    });
    drop(guard);
    scene.lock_is_gone();
}

#[test]
fn forgotten_pool_with_minimum_connections() {
    for runtime in [current_thread(), multi_thread()] {
        let scene = Scene::new();
        let guard = runtime.block_on(async {
            let options = scene.db.pool_options().min_connections(1);
            let pool = options.connect_with(scene.db.options()).await.unwrap();
            new_lock(&pool, "nightly-report").acquire().await.unwrap()
        });
        runtime.shutdown_background();
        drop(guard);
        scene.lock_is_gone();
    }
}

#[tokio::test]
async fn a_drop_then_a_try_on_the_same_handle_succeeds() {
    let (_db, pool) = TestDb::with_pool(5).await;
    let mut lock = new_lock(&pool, "nightly-report");
    for _ in 0..rounds(100) {
        let guard = lock.try_acquire().await.unwrap().expect("no other task wants it");
        drop(guard);
    }
    all_are_idle(&pool).await;
}
