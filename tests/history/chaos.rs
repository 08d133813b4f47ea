//! The faults: workers are killed and paused, sessions are ended, the server restarts and crashes.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use pglock_testkit::{Role, Server, TestDb};
use sqlx::PgConnection;
use tokio::time::sleep;

use crate::dice::Dice;
use crate::worker::{self, GIVES_UP};

const WORKERS: usize = 4;

/// How long a history may take on a busy machine until each fault has been dealt and losses have been reported.
const LONGEST: Duration = Duration::from_mins(1);

#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum Fault {
    /// The server is killed, and recovers.
    Crash,
    /// The session of a holder is ended.
    EndHolder,
    /// The session of a holder is ended while its worker is paused.
    EndPausedHolder,
    /// The session of a waiter is ended.
    EndWaiter,
    /// A worker is killed, and another takes its place.
    Kill,
    /// A worker is stopped for longer than its heartbeat's interval and timeout.
    PauseLong,
    /// A worker is paused for a moment.
    PauseShort,
    /// The server is restarted in an orderly way.
    Restart,
}

impl Fault {
    /// All faults, each as often as it is dealt before the deck is refilled.
    const DECK: [Self; 13] = [
        Self::Crash,
        Self::EndHolder,
        Self::EndHolder,
        Self::EndHolder,
        Self::EndPausedHolder,
        Self::EndPausedHolder,
        Self::EndWaiter,
        Self::Kill,
        Self::Kill,
        Self::PauseLong,
        Self::PauseShort,
        Self::PauseShort,
        Self::Restart,
    ];
}

/// The workers, and the faults that strike them.
#[derive(Debug)]
pub(crate) struct Chaos<'a> {
    server: &'a Server,
    db: &'a TestDb,
    /// The URL of the database for the workers, which connect over TCP.
    url: String,
    workers: Vec<Worker>,
    /// How many workers have been started. Each has a number of its own.
    started: i32,
    admin: PgConnection,
    dice: Dice,
    deck: Vec<Fault>,
    struck: BTreeMap<Fault, usize>,
}

#[derive(Debug)]
struct Worker {
    role: Role,
    number: i32,
    has_manager: bool,
    paused_until: Option<Instant>,
}

impl<'a> Chaos<'a> {
    pub(crate) async fn start(server: &'a Server, db: &'a TestDb, seed: u64) -> Self {
        let (port, name) = (server.port(), db.name());
        let mut chaos = Self {
            server,
            db,
            url: format!("postgres://postgres@127.0.0.1:{port}/{name}?sslmode=disable"),
            workers: Vec::new(),
            started: 0,
            admin: db.admin().await,
            dice: Dice::new(seed),
            deck: Vec::new(),
            struck: BTreeMap::new(),
        };
        for place in 0..WORKERS {
            let worker = chaos.another(place % 2 == 1);
            chaos.workers.push(worker);
        }
        chaos
    }

    /// Deals faults for some time, and until each has been dealt and losses have been reported.
    /// Returns how often each struck.
    ///
    /// The last fifth of the time is quiet, because a restart would remove a lock that was left behind, and a kill
    /// would remove a worker that the lock blocks.
    pub(crate) async fn rage(mut self, duration: Duration) -> BTreeMap<Fault, usize> {
        let started = Instant::now();
        let mut dealt = 0;
        while started.elapsed() < duration * 4 / 5
            || started.elapsed() < LONGEST
                && (dealt < Fault::DECK.len() || !self.losses_were_reported().await)
        {
            sleep(Duration::from_millis(self.dice.below(300))).await;
            for worker in &mut self.workers {
                // Checked before a fault may kill the worker, which would hide its end.
                assert!(!worker.role.has_ended(), "worker {} ended by itself", worker.number);
                worker.resume_if(|until| until < Instant::now());
            }
            let fault = self.deal();
            dealt += 1;
            if self.strike(fault).await {
                *self.struck.entry(fault).or_default() += 1;
            }
        }
        for worker in &mut self.workers {
            worker.resume_if(|_| true);
        }
        sleep(duration / 5).await;
        worker::stop(self.workers.iter_mut().map(|worker| &mut worker.role).collect()).await;
        self.struck
    }

    fn another(&mut self, has_manager: bool) -> Worker {
        let number = self.started;
        self.started += 1;
        let role = worker::start(&self.url, number, has_manager, self.dice.below(u64::MAX));
        Worker { role, number, has_manager, paused_until: None }
    }

    fn deal(&mut self) -> Fault {
        if self.deck.is_empty() {
            self.deck.extend(Fault::DECK);
        }
        let place = self.dice.place(self.deck.len());
        self.deck.swap_remove(place)
    }

    /// Executes a fault. Returns `false` if there was nothing to strike.
    async fn strike(&mut self, fault: Fault) -> bool {
        match fault {
            Fault::Crash => {
                self.server.kill();
                self.server.restart();
                self.admin = self.db.admin().await;
            }
            Fault::Restart => {
                self.server.restart();
                self.admin = self.db.admin().await;
            }
            Fault::EndHolder | Fault::EndWaiter => {
                let Some((pid, _)) = self.find(fault == Fault::EndHolder).await else {
                    return false;
                };
                return self.end(pid).await;
            }
            Fault::EndPausedHolder => {
                let Some((pid, number)) = self.find(true).await else { return false };
                let pause = Duration::from_millis(self.dice.below(1500));
                let workers = &mut self.workers;
                let Some(worker) = workers.iter_mut().find(|worker| worker.number == number) else {
                    return false;
                };
                worker.pause(pause);
                return self.end(pid).await;
            }
            Fault::Kill => {
                let place = self.dice.place(self.workers.len());
                let another = self.another(self.workers[place].has_manager);
                let mut killed = std::mem::replace(&mut self.workers[place], another);
                killed.role.kill().await;
            }
            Fault::PauseLong => {
                let pause = GIVES_UP + Duration::from_millis(100 + self.dice.below(400));
                self.any_worker().pause(pause);
            }
            Fault::PauseShort => {
                let pause = Duration::from_millis(self.dice.below(500));
                self.any_worker().pause(pause);
            }
        }
        true
    }

    fn any_worker(&mut self) -> &mut Worker {
        let place = self.dice.place(self.workers.len());
        &mut self.workers[place]
    }

    /// Returns whether a loss was reported to a holder, and the register has refused a holder.
    async fn losses_were_reported(&mut self) -> bool {
        let told = sqlx::query_scalar(
            "SELECT count(DISTINCT kind) = 2 FROM event WHERE kind IN ('lost', 'refused')",
        );
        told.fetch_one(&mut self.admin).await.unwrap()
    }

    /// Finds a session that holds a lock, or one that waits for it. Returns its pid and the number of its worker.
    async fn find(&mut self, granted: bool) -> Option<(i32, i32)> {
        let sessions = sqlx::query_as(
            "SELECT pid, split_part(application_name, ' ', 2)::int4
             FROM pg_locks JOIN pg_stat_activity USING (pid)
             WHERE locktype = 'advisory' AND granted = $1 AND application_name LIKE 'worker %'
               AND pg_locks.database = (SELECT oid FROM pg_database WHERE datname = current_database())
             ORDER BY pid",
        );
        let found = sessions.bind(granted).fetch_all(&mut self.admin).await.unwrap();
        (!found.is_empty()).then(|| found[self.dice.place(found.len())])
    }

    /// Ends a session. Returns whether it was still there.
    async fn end(&mut self, pid: i32) -> bool {
        let end = sqlx::query_scalar("SELECT pg_terminate_backend($1)").bind(pid);
        end.fetch_one(&mut self.admin).await.unwrap()
    }
}

impl Worker {
    fn pause(&mut self, pause: Duration) {
        self.role.pause();
        self.paused_until = Some(Instant::now() + pause);
    }

    fn resume_if(&mut self, due: impl FnOnce(Instant) -> bool) {
        if self.paused_until.take_if(|until| due(*until)).is_some() {
            self.role.resume();
        }
    }
}
