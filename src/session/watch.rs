//! Noticing that a session is lost: the watch, and how long its word may be trusted.
//!
//! While guards live, a task listens to the idle connection, so a closed session is noticed at once,
//! and asks it a question at every heartbeat, so a silent one is noticed in time. The answer to a
//! question proves that the session held its locks when it was asked. From then on its word is good
//! for the heartbeat's interval and deadline, by the clock, even if nobody looks: a process that was
//! stopped for longer must not believe that it holds.
//!
//! The listener never has the connection: it looks when it is woken, so it is in nobody's way.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::task::Poll;
use std::time::{Duration, Instant};

use sqlx::postgres::PgListener;
use tokio::sync::Semaphore;
use tokio::time::{sleep, sleep_until, timeout, timeout_at};

use super::conn::Conn;
use super::{Session, within};
use crate::error::{Error, Loss, Result};
use crate::mode::Mode;
use crate::request::Request;
use crate::sql;

/// How often a session is asked, and how long it may take to answer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Heartbeat {
    pub(crate) interval: Duration,
    pub(crate) deadline: Duration,
}

impl Heartbeat {
    /// How long the answer to a question is good for, from when it was asked.
    pub(crate) fn bound(self) -> Duration {
        self.interval + self.deadline
    }
}

/// How many connections of a process may be open beside its pools, to ask about lent sessions.
static ASKING: Semaphore = Semaphore::const_new(16);

/// How long to wait before what could not be done is tried again.
const AGAIN: Duration = Duration::from_millis(100);

/// What the watch saw.
enum Event {
    /// Time to ask.
    Beat,
    /// The other side closed the connection.
    Closed(sqlx::Error),
    /// Time to try once more to listen.
    Listen,
    /// The session ended well, or somebody else saw the loss.
    Ended,
}

/// Starts to watch a session, until it ends.
pub(super) fn start(session: Weak<Session>) {
    // Most have ended by now.
    let Some(living) = session.upgrade() else { return };
    // Detach: it ends with the session.
    drop(living.runtime.spawn(watch(Watching::new(session))));
}

/// The promise to notice the loss of a session.
///
/// # Drop
///
/// Whoever should have noticed it goes down with its runtime. So does the connection: gives the
/// session up at once, rather than let its guards believe until the clock tells them.
pub(super) struct Watching(Weak<Session>);

impl Watching {
    pub(super) fn new(session: Weak<Session>) -> Self {
        Self(session)
    }

    /// Nothing is left to notice.
    fn keep(mut self) {
        self.0 = Weak::new();
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        if let Some(session) = self.0.upgrade()
            && session.ledger().has_guards()
        {
            session.lose(&Loss::Abandoned);
        }
    }
}

async fn watch(watching: Watching) {
    let Some(session) = watching.0.upgrade() else { return };
    session.listen().await;
    loop {
        let lost = match session.next_event().await {
            Event::Beat => session.beat().await,
            Event::Closed(error) => Err(Loss::broken(error)),
            Event::Listen => {
                // To open a connection for it, once in a heartbeat is often enough.
                if session.pool.num_idle() > 0 {
                    session.listen().await;
                }
                Ok(())
            }
            Event::Ended => break,
        };
        if let Err(loss) = lost {
            // Without a guard, it is just being released: then that is why it holds nothing.
            if session.ledger().has_guards() {
                session.give_up(&loss);
            }
            break;
        }
    }
    watching.keep();
}

fn is_plain(conn: Option<&Conn>) -> bool {
    conn.is_some_and(|conn| !conn.lent && !conn.is_listening())
}

impl Session {
    /// Makes the connection one that can be listened to, if the pool has one to spare just now.
    ///
    /// Without, a loss is noticed by the heartbeat only, and the next one tries again.
    pub(super) async fn listen(&self) {
        let Ok(plain) = self.conn.try_lock().map(|slot| is_plain(slot.as_ref())) else { return };
        let spare = self.pool.num_idle() > 0
            || self.pool.size() < self.pool.options().get_max_connections();
        if !plain || !spare {
            return;
        }
        // The session's own connection is free meanwhile, but the heartbeat must not wait.
        let connecting =
            timeout(self.heartbeat.interval / 2, Box::pin(PgListener::connect_with(&self.pool)));
        let Ok(Ok(listener)) = connecting.await else { return };
        let Ok(mut slot) = self.conn.try_lock() else { return };
        if is_plain(slot.as_ref())
            && let Some(conn) = slot.as_mut()
        {
            match conn.move_into(Box::new(listener)) {
                Ok(()) => self.listened_to.store(true, Ordering::Relaxed),
                Err(error) => tracing::debug!(
                    backend_pid = self.backend_pid(),
                    error = &error as &dyn std::error::Error,
                    "cannot listen to a lock session; the heartbeat watches it"
                ),
            }
        }
    }

    /// Waits until the connection is closed, the session ends, or it is time to do something.
    async fn next_event(&self) -> Event {
        let beat = self.asked() + self.heartbeat.interval;
        let again = Instant::now() + AGAIN;
        let listening = self.listened_to.load(Ordering::Relaxed);
        let due = if listening { beat } else { beat.min(again) };
        let mut alarm = pin!(sleep_until(due.into()));
        loop {
            // Made first: a connection that is used and given back between the look and the wait
            // must not be missed, for whoever used it is woken in our place.
            let mut used = pin!(self.used.notified());
            let event = poll_fn(|cx| {
                if let Poll::Ready(event) = self.poll_closed(cx) {
                    return Poll::Ready(Some(event));
                }
                if alarm.as_mut().poll(cx).is_ready() {
                    let event = if due < beat { Event::Listen } else { Event::Beat };
                    return Poll::Ready(Some(event));
                }
                used.as_mut().poll(cx).map(|()| None)
            });
            if let Some(event) = event.await {
                return event;
            }
        }
    }

    fn poll_closed(&self, cx: &mut std::task::Context<'_>) -> Poll<Event> {
        // Who uses it, will notice; and will wake us when it is free.
        let Ok(mut slot) = self.conn.try_lock() else { return Poll::Pending };
        let Some(conn) = slot.as_mut() else { return Poll::Ready(Event::Ended) };
        // It was just given back, and is tidied next.
        if conn.lent {
            return Poll::Pending;
        }
        pin!(conn.closed()).poll(cx).map(Event::Closed)
    }

    /// Asks the session; if its connection is lent, asks about it through another.
    async fn beat(self: &Arc<Self>) -> Result<(), Loss> {
        let asked = Instant::now();
        let mut pooled = None;
        let answer = async {
            loop {
                // Whoever tells of a loss meanwhile finds it in use, so it is closed when it is given back.
                let Some(mut slot) = self.free_connection() else {
                    // It may hold nothing just now, which others could not tell from a loss. Its
                    // connection is not lent, but in use for a moment, and then it has answered.
                    if self.ledger().is_kept() {
                        if self.asked() >= asked {
                            return Ok(Ok(()));
                        }
                        sleep(AGAIN / 10).await;
                        continue;
                    }
                    match self.ask_elsewhere().await {
                        Ok(answer) => return Ok(answer),
                        // That says nothing about the session. It may be asked itself by now.
                        Err(error) => tracing::debug!(
                            backend_pid = self.backend_pid(),
                            error = &error as &dyn std::error::Error,
                            "cannot ask about a session whose connection is lent; trying again"
                        ),
                    }
                    sleep(AGAIN).await;
                    continue;
                };
                let Some(conn) = slot.as_mut() else { return Ok(Ok(())) };
                self.tidy(conn).await?;
                if sql::backend_pid(conn.pg()?).await? != self.backend_pid() {
                    pooled = Some(slot);
                    return Ok(Err(Loss::Pooled));
                }
                return Ok::<_, sqlx::Error>(Ok(()));
            }
        };
        match timeout_at(self.trusted_until().into(), answer).await {
            Ok(Ok(Ok(()))) => {
                self.trust(asked);
                self.listen().await;
                Ok(())
            }
            Ok(Ok(Err(loss))) => {
                // Else it is just being released, which finds the pooler too.
                if self.ledger().has_guards()
                    && let Some(mut slot) = pooled
                    && let Some(conn) = slot.as_mut()
                {
                    let locks = self.ledger().granted_by_server();
                    // First, for to give up what a pooler has may take long.
                    self.give_up(&loss);
                    self.retrieve(conn, self.backend_pid(), &locks).await;
                }
                Err(loss)
            }
            Ok(Err(error)) => Err(Loss::broken(error)),
            Err(_) => Err(Loss::Silent),
        }
    }

    /// Asks on another connection whether the session still holds its locks.
    async fn ask_elsewhere(&self) -> Result<Result<(), Loss>, sqlx::Error> {
        let holds = |holds| if holds { Ok(()) } else { Err(Loss::NotHeld) };
        if let Some(pooled) = self.pool.try_acquire() {
            let mut conn = Conn::new(pooled, self.runtime.clone());
            if let Ok(answer) = sql::backend_holds_locks(conn.pg()?, self.backend_pid()).await {
                conn.give_back();
                return Ok(holds(answer));
            }
            // It was dead; dropping it closes it.
        }
        let mut beside = self.connect_beside(&ASKING).await?;
        let answer = sql::backend_holds_locks(&mut beside.conn, self.backend_pid()).await?;
        beside.close().await;
        Ok(holds(answer))
    }

    /// Asks the session whether it holds what a guard stands for.
    pub(crate) async fn verify(self: &Arc<Self>, request: &Request) -> Result<()> {
        let key = request.key();
        let mut slot = self.connection().await;
        if let Some(reason) = self.loss() {
            return Err(Error::lost(key, reason));
        }
        let Some(conn) = slot.as_mut() else { return Err(Error::lost(key, Loss::NotHeld)) };
        let asked = Instant::now();
        let answer = within(self.heartbeat.deadline, async {
            self.tidy(conn).await?;
            for (key, mode) in request.ids() {
                let holding = sql::holds(conn.pg()?, key, mode).await?;
                if holding.backend_pid != self.backend_pid() {
                    return Ok(Err(Loss::Pooled));
                }
                // A shared guard may be covered by the exclusive lock of another one.
                let held = holding.held
                    || mode == Mode::Shared
                        && sql::holds(conn.pg()?, key, Mode::Exclusive).await?.held;
                if !held {
                    return Ok(Err(Loss::NotHeld));
                }
            }
            Ok(Ok(()))
        });
        let loss = match answer.await {
            Ok(Ok(())) => {
                self.trust(asked);
                return Ok(());
            }
            Ok(Err(loss)) => loss,
            Err(error) => Loss::broken(error),
        };
        let locks = self.ledger().granted_by_server();
        // First, for to give up what a pooler has may take long.
        self.lose(&loss);
        if matches!(loss, Loss::Pooled) {
            self.retrieve(conn, self.backend_pid(), &locks).await;
        }
        drop(slot.take());
        Err(Error::lost(key, loss))
    }
}
