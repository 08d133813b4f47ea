//! Detects lost sessions: one task per runtime monitors all sessions that are held.
//!
//! A session is admitted when its first lock is granted. From then on, it is trusted for as long as it answers. When it
//! has been held for two seconds, the keeper polls its idle connection, which detects a closed session immediately. At
//! every heartbeat, the keeper sends a statement on the session, which detects a silent one in time. A session that is
//! released earlier costs nothing.
//!
//! The answer to a question proves that the session held its locks when the question was sent. From then on, the
//! session is trusted for the heartbeat's interval plus timeout, by the clock, whether or not the keeper runs: a
//! process that was stopped for longer must not assume that it still holds its locks.
//!
//! If the connection of a session is in use, the keeper looks up the session's backend on another connection, the
//! [`monitor`](super::monitor), with one statement for all such sessions of a server. Any answer of the server is a
//! sign of life, unless it shows that the locks are not held. So neither an error nor a rejected login is a loss; only
//! silence and a closed connection are.

use std::collections::HashMap;
use std::mem;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use tokio::runtime::{Handle, Id};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::sleep_until;

use super::conn::{Conn, Use};
use super::monitor::Monitor;
use super::servers::Server;
use super::slot::ConnGuard;
use super::{Session, is_alive, within};
use crate::error::{Loss, chain, is_answer, refuses_settings};
use crate::options::Heartbeat;
use crate::sql::{self, backend::Held, backend::is_covered};

/// How long a session is held before the keeper polls its idle connection for closure, unless the heartbeat's interval
/// is shorter. Younger sessions cost nothing extra.
const GROWN_UP: Duration = Duration::from_secs(2);

/// How often the keeper checks which sessions are due.
const TICK: Duration = Duration::from_millis(25);

static KEEPERS: LazyLock<Mutex<HashMap<Id, Arc<Keeper>>>> = LazyLock::new(Mutex::default);

/// The part of a runtime's keeper that is used outside of its task.
#[derive(Default)]
struct Keeper {
    inbox: Mutex<Inbox>,
    /// Wakes the task for something in the inbox that can't wait for the next tick.
    notify: Notify,
}

#[derive(Default)]
struct Inbox {
    admitted: Vec<Weak<Session>>,
    /// The sessions whose idle connections must be polled.
    awake: Vec<Arc<Wake>>,
    asleep: bool,
}

/// Starts to monitor a session.
pub(super) fn admit(session: &Arc<Session>) {
    let keeper = Keeper::of(&session.runtime);
    let mut inbox = keeper.inbox();
    inbox.admitted.push(Arc::downgrade(session));
    if mem::take(&mut inbox.asleep) {
        keeper.notify.notify_one();
    }
}

impl Keeper {
    /// Returns the keeper of a runtime, and starts its task if there is none.
    fn of(runtime: &Handle) -> Arc<Self> {
        let id = runtime.id();
        let mut all = keepers();
        if let Some(keeper) = all.get(&id) {
            return Arc::clone(keeper);
        }
        let keeper = Arc::new(Self::default());
        all.insert(id, Arc::clone(&keeper));
        drop(all);
        let task = KeeperTask {
            id,
            keeper: Arc::clone(&keeper),
            groups: HashMap::new(),
            questions: JoinSet::new(),
        };
        // Detach: the task ends with the runtime, or immediately if the runtime was shut down.
        drop(runtime.spawn(task.run()));
        keeper
    }

    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn keepers() -> MutexGuard<'static, HashMap<Id, Arc<Keeper>>> {
    KEEPERS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The waker of a session's idle connection: makes the keeper poll that connection.
pub(super) struct Wake {
    session: Weak<Session>,
    keeper: Weak<Keeper>,
    queued: AtomicBool,
}

impl Wake {
    /// Queues the connection to be polled: it is idle again, or something has arrived on it.
    pub(super) fn again(self: &Arc<Self>) {
        if !self.queued.swap(true, Ordering::Relaxed)
            && let Some(keeper) = self.keeper.upgrade()
        {
            keeper.inbox().awake.push(Arc::clone(self));
            keeper.notify.notify_one();
        }
    }
}

impl std::task::Wake for Wake {
    fn wake(self: Arc<Self>) {
        self.again();
    }
}

/// The sessions on one server, and the connection on which the keeper asks about them.
struct Group {
    server: Arc<Server>,
    sessions: Vec<Kept>,
    /// `None` while no session needs it.
    monitor: Option<SharedMonitor>,
}

/// A session that is monitored.
///
/// Most sessions have nothing due in most ticks. Then a tick reads only this, and not the session itself, which would
/// cost more than the heartbeats.
struct Kept {
    session: Weak<Session>,
    since: Instant,
    /// Each question in flight has a clone.
    asking: Question,
    /// When the next check of the session is due.
    next_look: Instant,
    needs_monitor: bool,
}

type Question = Arc<()>;

type SharedMonitor = Arc<tokio::sync::Mutex<Monitor>>;

/// The task of a keeper.
///
/// # Drop
///
/// The task is dropped when the runtime is shut down, which closes the sockets of the sessions too. Ends the sessions
/// that have guards with a loss immediately; otherwise these guards would trust them until the clock decides.
struct KeeperTask {
    id: Id,
    keeper: Arc<Keeper>,
    /// The key is the address of the server in memory.
    groups: HashMap<usize, Group>,
    questions: JoinSet<()>,
}

impl Drop for KeeperTask {
    fn drop(&mut self) {
        keepers().remove(&self.id);
        let admitted = mem::take(&mut self.keeper.inbox().admitted);
        let groups = mem::take(&mut self.groups).into_values();
        let kept = groups.flat_map(|group| group.sessions).map(|kept| kept.session);
        for session in kept.chain(admitted).filter_map(|session| session.upgrade()) {
            if session.ledger().has_guards() {
                session.lose(&Loss::RuntimeShutdown);
            }
        }
    }
}

impl KeeperTask {
    async fn run(mut self) {
        let mut next_look = Instant::now();
        loop {
            let (admitted, awake) = {
                let mut inbox = self.keeper.inbox();
                (mem::take(&mut inbox.admitted), mem::take(&mut inbox.awake))
            };
            for session in admitted {
                self.admit(session);
            }
            if next_look <= Instant::now() {
                self.look();
                next_look = Instant::now() + TICK;
            }
            for wake in awake {
                if self.poll(&wake) {
                    // The other sessions were probably closed too.
                    next_look = Instant::now();
                }
            }
            while self.questions.try_join_next().is_some() {}
            self.rest(next_look).await;
        }
    }

    /// Waits until a connection must be polled, or the next check is due.
    async fn rest(&self, next_look: Instant) {
        let asleep = {
            let mut inbox = self.keeper.inbox();
            inbox.asleep = self.groups.is_empty() && inbox.admitted.is_empty();
            inbox.asleep
        };
        if asleep {
            self.keeper.notify.notified().await;
            return;
        }
        tokio::select! {
            biased;
            () = sleep_until(next_look.into()) => {}
            () = self.keeper.notify.notified() => {}
        }
    }

    fn admit(&mut self, admitted: Weak<Session>) {
        let Some(session) = admitted.upgrade() else { return };
        let group = self.groups.entry(Arc::as_ptr(&session.server).addr());
        let group = group.or_insert_with(|| Group {
            server: Arc::clone(&session.server),
            sessions: Vec::new(),
            monitor: None,
        });
        group.sessions.push(Kept {
            session: admitted,
            since: Instant::now(),
            asking: Question::default(),
            next_look: Instant::now(),
            needs_monitor: false,
        });
    }

    /// Checks which sessions have ended, are lost, or must be asked.
    fn look(&mut self) {
        let Self { keeper, groups, questions, .. } = self;
        groups.retain(|_, group| {
            group.look(keeper, questions);
            !group.sessions.is_empty()
        });
    }

    /// Polls an idle connection for closure. Returns whether it is closed.
    fn poll(&self, wake: &Arc<Wake>) -> bool {
        wake.queued.store(false, Ordering::Relaxed);
        let Some(session) = wake.session.upgrade() else { return false };
        let group = self.groups.get(&Arc::as_ptr(&session.server).addr());
        let Some(monitor) = group.and_then(|group| group.monitor.as_ref()) else { return false };
        let Ok(mut monitor) = monitor.try_lock() else {
            // The monitor is in use for a question. The next round of the task is soon enough.
            wake.queued.store(true, Ordering::Relaxed);
            self.keeper.inbox().awake.push(Arc::clone(wake));
            return false;
        };
        // If the connection is in use, its return wakes the keeper again, and so does the end of tidying it.
        let Ok(mut slot) = session.conn.try_lock() else { return false };
        let closed = poll_slot(&mut slot, &mut monitor, wake);
        if let Some(loss) = &closed {
            // First, so that a release that waits for the connection returns this loss.
            session.give_up(loss);
        }
        drop(slot);
        session.close_if_lost();
        closed.is_some()
    }
}

impl Group {
    /// Checks which sessions have ended, are lost, or must be asked.
    fn look(&mut self, keeper: &Arc<Keeper>, questions: &mut JoinSet<()>) {
        let now = Instant::now();
        let monitor = self.monitor.as_ref().and_then(|monitor| monitor.try_lock().ok());
        // If the monitor was lost, idle connections are not polled until it is connected again.
        let unmonitored = monitor.is_some_and(|mut monitor| monitor.take_lost());
        let disproven = self.server.proof.is_negative();
        let mut busy = Vec::new();
        self.sessions.retain_mut(|kept| {
            if now < kept.next_look && !disproven && !unmonitored {
                return true;
            }
            let Some(session) = kept.session.upgrade() else { return false };
            if session.loss().is_some() || session.ledger().has_ended() {
                return false;
            }
            if disproven {
                session.end(&Loss::NoExclusion);
                return false;
            }
            let held_until = session.hold_ends(kept.since);
            if held_until.is_some_and(|held_until| held_until <= now) {
                session.give_up(&Loss::HeldTooLong);
                return false;
            }
            let Heartbeat { interval, .. } = session.heartbeat;
            let answered = session.last_answered();
            let due = unmonitored || answered + interval <= now;
            let grown_up_at = kept.since + GROWN_UP.min(interval);
            let grown_up = grown_up_at <= now;
            let events = [grown_up_at, answered + interval, answered + session.heartbeat.bound()];
            let next = events.into_iter().chain(held_until).filter(|at| *at > now).min();
            // The next check is soon, to forget a session that was released, and to repeat a question that has failed.
            // Most sessions are released while they are young.
            let soon = now + if grown_up { interval / 8 } else { TICK };
            kept.next_look = next.map_or(soon, |next| next.min(soon));
            if due || grown_up {
                kept.needs_monitor = true;
                let monitor = self.monitor.get_or_insert_default();
                if session.wake.get().is_none() {
                    let wake = Wake {
                        session: Weak::clone(&kept.session),
                        keeper: Arc::downgrade(keeper),
                        queued: AtomicBool::new(false),
                    };
                    session.wake.set(Arc::new(wake)).ok();
                    questions.spawn(listen(Arc::clone(&session), Arc::clone(monitor)));
                }
                if due && Arc::strong_count(&kept.asking) == 1 {
                    let question = Arc::clone(&kept.asking);
                    match session.free_connection() {
                        Some(slot) => {
                            questions.spawn(beat(slot, question, Arc::clone(monitor)));
                        }
                        None => busy.push((session, question)),
                    }
                }
            }
            true
        });
        if !busy.is_empty() {
            let monitor = Arc::clone(self.monitor.get_or_insert_default());
            questions.spawn(ask_elsewhere(busy, monitor));
        }
        if !self.sessions.iter().any(|kept| kept.needs_monitor) {
            self.monitor = None;
        }
    }
}

/// Polls an idle connection for closure, and takes it out of its slot if it is closed.
fn poll_slot(slot: &mut Option<Conn>, monitor: &mut Monitor, wake: &Arc<Wake>) -> Option<Loss> {
    let pg = slot.as_mut().filter(|conn| !conn.untidy)?.pg().ok()?;
    let waker = Waker::from(Arc::clone(wake));
    let Poll::Ready(error) = monitor.poll_closed(pg, &mut Context::from_waker(&waker)) else {
        return None;
    };
    // The slot contains either the closed connection or the monitor's. Neither may return to the pool.
    drop(slot.take());
    Some(Loss::broken(error))
}

/// Sends a heartbeat on a session, and makes the keeper poll its idle connection from then on.
async fn beat(mut slot: ConnGuard, question: Question, monitor: SharedMonitor) {
    let session = Arc::clone(slot.session());
    let asked = Instant::now();
    let is_new_hold = slot.as_mut().is_some_and(|conn| conn.settings.make_for_hold());
    let set = is_new_hold.then(|| session.options().keepalives);
    // Limited here, because the clock does not end a session that has just been released.
    let answer = within(session.heartbeat.bound(), async {
        sql::backend::heartbeat(slot.tidied().await?, set).await
    });
    let answer = tokio::select! {
        biased;
        // The connection is closed when the slot is dropped.
        _loss = session.lost() => return,
        answer = answer => answer,
    };
    match answer {
        Ok(pid) if pid == session.backend_pid() => session.answered(asked),
        Ok(_) => {
            session.server.proof.disprove();
            // A session without a guard is being released, and the release detects the pooler too.
            if session.ledger().has_guards() {
                session.give_up_pooled(&mut slot, Vec::new());
            }
            return;
        }
        Err(error) if is_answer(&error) => {
            session.answered(asked);
            if let Some(conn) = slot.as_mut().filter(|_| is_new_hold) {
                conn.settings.made_for = Use::Statements;
                conn.settings.rejected |= refuses_settings(&error);
            }
        }
        Err(error) => {
            let loss = Loss::broken(error);
            let has_guards = {
                let mut ledger = session.ledger();
                let has_guards = ledger.has_guards();
                if !has_guards {
                    // A release that waits for the connection returns this loss.
                    ledger.lose(loss.clone());
                }
                has_guards
            };
            if has_guards {
                session.give_up(&loss);
            }
            drop(slot.take());
            return;
        }
    }
    drop((slot, question));
    if !monitor.lock().await.is_ready() {
        listen(session, monitor).await;
    }
}

/// Connects the monitor, and makes the keeper poll the idle connection of a session.
async fn listen(session: Arc<Session>, monitor: SharedMonitor) {
    let options = session.connect_options();
    let threshold = session.heartbeat.timeout / 4;
    let mut connection = monitor.lock().await;
    let connected = connection.connect(&options, threshold).await;
    let is_rejected = session.server.refuses_settings();
    let keepalives = (!is_rejected).then(|| session.options().keepalives);
    connection.keep_alive(keepalives, session.heartbeat.answer_limit()).await;
    drop(connection);
    if let Err(error) = connected {
        tracing::debug!(
            backend_pid = session.backend_pid(),
            error = %chain(&error),
            "cannot monitor idle sessions; a closed one is noticed at its next heartbeat"
        );
    }
    session.resume_polling();
}

/// Asks on the monitor's connection whether sessions still hold their locks.
async fn ask_elsewhere(sessions: Vec<(Arc<Session>, Question)>, monitor: SharedMonitor) {
    let Some((first, _)) = sessions.first() else { return };
    let (options, limit) = (first.connect_options(), first.heartbeat.answer_limit());
    let threshold = first.heartbeat.timeout / 4;
    let asked = Instant::now();
    let before: Vec<_> = sessions
        .iter()
        .map(|(session, _)| {
            (session.uses.load(Ordering::Relaxed), session.ledger().granted_by_server())
        })
        .collect();
    // A manager's session is left out: its locks, which may be a hundred thousand, are not in the ledger.
    let holders = sessions.iter().zip(&before).filter(|(_, (_, granted))| !granted.is_empty());
    let pids: Vec<_> = holders.map(|((session, _), _)| session.backend_pid()).collect();
    let answer = async {
        let mut monitor = monitor.lock().await;
        monitor.connect(&options, threshold).await?;
        monitor.holdings(&pids, limit).await
    };
    let answer = answer.await;
    if let Err(error) = &answer {
        tracing::debug!(
            sessions = sessions.len(),
            error = %chain(error),
            "cannot ask about lock sessions whose connections are in use"
        );
    }
    for ((session, _), (uses, granted)) in sessions.iter().zip(before) {
        // A release may have begun before the question, and have reached the server before the answer. A release
        // removes its locks from the ledger first.
        let now = session.ledger().granted_by_server();
        // During a downgrade, either the exclusive lock is still held, or the shared one is held already.
        let holds = |held: &Held, lock| is_covered(held, session.backend_pid(), lock);
        let holds_all = |held| granted.iter().all(|lock| holds(held, *lock) || !now.contains(lock));
        match &answer {
            Ok(held) if holds_all(held) => session.answered(asked),
            // The lock may have been released meanwhile, unless the connection is still in the same use.
            Ok(_) if session.uses.load(Ordering::Relaxed) == uses => {
                session.give_up(&Loss::NotHeld);
            }
            // The server is alive, but refuses to answer.
            Err(_) if is_alive(&answer) => session.answered(asked),
            Ok(_) | Err(_) => {}
        }
    }
}
