//! A failover: a standby is promoted, and from then on the name of the primary points to it.

use std::time::{Duration, Instant};

use pglock::{Election, Error, LeaderState, LeaderStatus, Lock, LockManager, LockOptions, Loss};
use pglock_testkit::{Proxy, Server, Shutdown, advisory_locks, eventually};
use sqlx::{ConnectOptions, PgPool};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use crate::support::{SOON, has_waiter, pool_of, report, spawn};

const KEY: &str = "invoice-7";

/// The time after which a loss is reported at the latest, with the defaults: a heartbeat and its timeout.
const LOST: Duration = Duration::from_secs(4);

/// A primary and its standby, behind a name that points to one of them.
struct Pair {
    primary: Server,
    standby: Server,
    name: Proxy,
}

impl Pair {
    async fn start() -> Self {
        let (primary, standby) = Server::options().tcp().start_with_standby();
        let name = Proxy::to(primary.port()).await;
        Self { primary, standby, name }
    }

    /// The pool of a process.
    async fn pool(&self) -> PgPool {
        let options = self.primary.tcp_options().port(self.name.address().port());
        pool_of(options, 5).await
    }

    fn fail_over(&self) {
        self.standby.promote();
        self.name.move_to(self.standby.port());
    }
}

/// A candidate of a process. It reports the port of each server on which it begins to lead.
struct Candidate {
    terms: mpsc::UnboundedReceiver<u16>,
    status: LeaderStatus,
    stop: oneshot::Sender<()>,
    ended: JoinHandle<pglock::Result<()>>,
}

impl Candidate {
    fn run(pool: PgPool) -> Self {
        Self::run_with(&LockOptions::new(), pool)
    }

    fn run_with(options: &LockOptions, pool: PgPool) -> Self {
        let (began, terms) = mpsc::unbounded_channel();
        let (stop, stopped) = oneshot::channel::<()>();
        let mut election =
            Election::new(&options.on(&pool).unwrap(), "billing").candidate("node-7");
        let status = election.status();
        let ended = spawn(async move {
            let stop = async { drop(stopped.await) };
            let run = election.run(stop, |leadership| {
                let (began, pool) = (began.clone(), pool.clone());
                async move {
                    // An idle connection of the pool may be to another server.
                    let mut here = pool.connect_options().connect().await?;
                    let port = sqlx::query_scalar("SELECT current_setting('port')::int4");
                    let port: i32 = port.fetch_one(&mut here).await?;
                    began.send(u16::try_from(port).unwrap()).unwrap();
                    leadership.stopping().await;
                    Ok::<_, sqlx::Error>(())
                }
            });
            run.await
        });
        Self { terms, status, stop, ended }
    }

    async fn leads(&mut self, limit: Duration) -> u16 {
        timeout(limit, self.terms.recv()).await.unwrap().unwrap()
    }

    async fn stop(self) {
        self.stop.send(()).unwrap();
        self.ended.await.unwrap().unwrap();
    }
}

/// Acquires the lock as soon as the new primary is available.
async fn acquire_again(lock: &mut Lock) -> pglock::ExclusiveGuard {
    loop {
        match lock.acquire().await {
            Ok(guard) => return guard,
            Err(error) => {
                assert!(error.is_transient(), "{error:?}");
                sleep(Duration::from_millis(20)).await;
            }
        }
    }
}

#[tokio::test]
async fn a_crash_ends_holds_and_waits_and_all_go_on_at_the_new_primary() {
    let pair = Pair::start().await;
    let (one, another) = (pair.pool().await, pair.pool().await);
    let mut admin = pair.primary.connect_options().connect().await.unwrap();
    let mut candidate = Candidate::run(one.clone());
    assert_eq!(candidate.leads(SOON * 10).await, pair.primary.port());
    let manager = LockManager::new(&one);
    let held = Lock::new(&one, KEY).acquire().await.unwrap();
    let through_it = Lock::new(&manager, "customer-4").acquire().await.unwrap();
    let mut lock = Lock::new(&another, KEY);
    let waiting = spawn(async move { lock.acquire().await });
    has_waiter(&mut admin).await;

    let crashed = Instant::now();
    pair.primary.kill();
    for loss in [timeout(LOST, held.lost()).await, timeout(LOST, through_it.lost()).await] {
        assert!(matches!(loss.unwrap(), Loss::Disconnected(_)));
    }
    let waited = timeout(SOON * 10, waiting).await.unwrap().unwrap();
    assert!(waited.unwrap_err().is_transient());

    pair.fail_over();
    assert_eq!(candidate.leads(SOON * 10).await, pair.standby.port());
    report(format_args!("the candidate leads again {:?} after the crash", crashed.elapsed()));
    let again = acquire_again(&mut Lock::new(&another, KEY)).await;
    acquire_again(&mut Lock::new(&manager, "customer-4")).await.release().await.unwrap();
    assert!(Lock::new(&one, KEY).try_acquire().await.unwrap().is_none());
    again.release().await.unwrap();
    candidate.stop().await;
}

/// The old primary hangs, and a new one grants locks that are held on the old one. A lock is then held on both, for as
/// long as the documentation says. No heartbeat is sent for sessions that wait, so a wait ends after its slice and the
/// time that an answer may take then.
#[tokio::test]
async fn a_primary_that_hangs_is_trusted_until_its_heartbeat_is_overdue() {
    const SLICE: Duration = Duration::from_secs(2);
    const LATE: Duration = Duration::from_secs(8);

    let pair = Pair::start().await;
    let mut admin = pair.primary.connect_options().connect().await.unwrap();
    let mut candidate = Candidate::run(pair.pool().await);
    assert_eq!(candidate.leads(SOON * 10).await, pair.primary.port());
    let short_slices = LockOptions::new().wait_slice(SLICE);
    let mut another = Candidate::run_with(&short_slices, pair.pool().await);
    has_waiter(&mut admin).await;
    let held = Lock::new(&pair.pool().await, KEY).acquire().await.unwrap();
    let mut lock = Lock::new(&short_slices.on(&pair.pool().await).unwrap(), KEY);
    let waiting = spawn(async move { lock.acquire().await });
    let both_wait = async {
        while advisory_locks(&mut admin).await.iter().filter(|lock| !lock.granted).count() < 2 {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(SOON * 10, both_wait).await.unwrap();

    pair.primary.pause();
    let hangs = Instant::now();
    pair.fail_over();
    // This is a process that starts now.
    let theirs = acquire_again(&mut Lock::new(&pair.pool().await, KEY)).await;
    let granted = hangs.elapsed();
    let loss = timeout(LOST + SOON, held.lost()).await.unwrap();
    assert!(matches!(loss, Loss::Unresponsive), "{loss:?}");
    report(format_args!("granted after {granted:?}, lost after {:?}", hangs.elapsed()));
    assert_eq!(candidate.leads(SOON * 10).await, pair.standby.port());
    report(format_args!("the candidate leads again after {:?}", hangs.elapsed()));
    theirs.verify().await.unwrap();
    let waited = timeout(SLICE + LATE + SOON * 3, waiting).await.unwrap().unwrap();
    assert!(waited.unwrap_err().is_transient());
    report(format_args!("a wait ended after {:?}", hangs.elapsed()));
    candidate.stop().await;
    // The other candidate has detected the failover, and waits on the new primary.
    assert_eq!(another.leads(SLICE + LATE + SOON * 10).await, pair.standby.port());

    // The old primary resumes, and a lost lock stays lost.
    pair.primary.resume();
    assert!(matches!(held.release().await, Err(Error::Lost { .. })));
    theirs.release().await.unwrap();
    another.stop().await;
}

#[tokio::test]
async fn a_name_that_still_leads_to_the_old_primary_is_refused_once_that_is_a_standby() {
    let pair = Pair::start().await;
    let pool = pair.pool().await;
    Lock::new(&pool, KEY).acquire().await.unwrap().release().await.unwrap();
    pair.primary.stop(Shutdown::Fast);
    pair.standby.promote();
    pair.primary.demote(&pair.standby);

    let mut lock = Lock::new(&pool, KEY);
    eventually("it is refused as a standby", SOON * 10, || async {
        matches!(lock.clone().try_acquire().await, Err(Error::Standby { .. }))
    })
    .await;
    let mut candidate = Candidate::run(pool.clone());
    eventually("the candidate is refused, too, and goes on", SOON * 10, || async {
        let state = candidate.status.state();
        matches!(state, LeaderState::Failing { error: Error::Standby { .. }, .. })
    })
    .await;
    // These connections stay open, and in the pool.
    let stale = (pool.acquire().await.unwrap(), pool.acquire().await.unwrap());
    drop(stale);
    eventually("they are idle", SOON * 10, || async { pool.num_idle() >= 2 }).await;
    pair.name.move_to(pair.standby.port());
    let guard = timeout(SOON * 10, acquire_again(&mut lock)).await.unwrap();
    assert_eq!(candidate.leads(SOON * 10).await, pair.standby.port());
    guard.release().await.unwrap();
    candidate.stop().await;
}

/// sqlx connects to one host, so an application that knows several hosts sets the pool's connect options.
#[tokio::test]
async fn a_pool_that_is_given_another_host_goes_on_there() {
    let pair = Pair::start().await;
    let pool = pair.pool().await;
    let mut candidate = Candidate::run(pool.clone());
    assert_eq!(candidate.leads(SOON * 10).await, pair.primary.port());
    let held = Lock::new(&pool, KEY).acquire().await.unwrap();
    pair.primary.stop(Shutdown::Immediate);
    timeout(LOST, held.lost()).await.unwrap();

    pair.standby.promote();
    pool.set_connect_options(pair.standby.tcp_options());
    assert_eq!(candidate.leads(SOON * 10).await, pair.standby.port());
    acquire_again(&mut Lock::new(&pool, KEY)).await.release().await.unwrap();
    candidate.stop().await;
}
