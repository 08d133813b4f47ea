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
use std::sync::{Arc, Weak};
use std::task::Poll;
use std::time::{Duration, Instant};

use sqlx::postgres::PgListener;
use tokio::sync::Semaphore;
use tokio::time::{sleep, sleep_until, timeout, timeout_at};

use super::conn::Conn;
use super::{DEADLINE, Session, within};
use crate::error::{Error, Loss, Result, is_answer};
use crate::key::Key;
use crate::mode::Mode;
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

/// Holds that are shorter are not watched, and cost nothing.
const SHORT: Duration = Duration::from_millis(20);

/// How many connections of a process may be open beside its pools, to ask about lent sessions.
static ASKING: Semaphore = Semaphore::const_new(16);

/// How long to wait before a question is asked again that could not be asked.
const AGAIN: Duration = Duration::from_millis(100);

/// What the watch saw.
enum Event {
    /// Time to ask.
    Beat,
    /// The other side closed the connection.
    Closed(sqlx::Error),
    /// The session ended well, or somebody else saw the loss.
    Ended,
}

/// Watches a session until it ends.
pub(super) async fn watch(session: Weak<Session>) {
    sleep(SHORT).await;
    let Some(session) = session.upgrade() else { return };
    session.listen().await;
    loop {
        let lost = match session.next_event().await {
            Event::Beat => session.beat().await,
            Event::Closed(error) => Err(Loss::Disconnected(Arc::new(error))),
            Event::Ended => return,
        };
        if let Err(loss) = lost {
            // Without a guard, it is just being released: then that is why it holds nothing.
            if session.ledger().has_guards() {
                session.lose(&loss);
            }
            return;
        }
    }
}

fn is_plain(conn: Option<&Conn>) -> bool {
    conn.is_some_and(|conn| !conn.lent && !conn.is_listening())
}

impl Session {
    /// Makes the connection one that can be listened to, if the pool has one to spare just now.
    ///
    /// Without, a loss is noticed by the heartbeat only, and the next one tries again.
    async fn listen(&self) {
        let Ok(plain) = self.conn.try_lock().map(|slot| is_plain(slot.as_ref())) else { return };
        let spare = self.pool.num_idle() > 0
            || self.pool.size() < self.pool.options().get_max_connections();
        if !plain || !spare {
            return;
        }
        // The session's own connection is free meanwhile, but the heartbeat must not wait.
        let connecting = timeout(self.heartbeat.interval / 2, PgListener::connect_with(&self.pool));
        let Ok(Ok(listener)) = connecting.await else { return };
        if let Ok(mut slot) = self.conn.try_lock()
            && is_plain(slot.as_ref())
            && let Some(conn) = slot.as_mut()
            && let Err(error) = conn.move_into(Box::new(listener))
        {
            tracing::debug!(
                backend_pid = self.backend_pid(),
                error = &error as &dyn std::error::Error,
                "cannot listen to a lock session; the heartbeat watches it"
            );
        }
    }

    /// Waits until the connection is closed, the session ends, or it is time to ask.
    async fn next_event(&self) -> Event {
        let mut beat = pin!(sleep_until((self.asked() + self.heartbeat.interval).into()));
        loop {
            // Made first: a connection that is used and given back between the look and the wait
            // must not be missed, for whoever used it is woken in our place.
            let mut used = pin!(self.used.notified());
            let event = poll_fn(|cx| {
                if let Poll::Ready(event) = self.poll_closed(cx) {
                    return Poll::Ready(Some(event));
                }
                if beat.as_mut().poll(cx).is_ready() {
                    return Poll::Ready(Some(Event::Beat));
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
    pub(super) async fn beat(&self) -> Result<(), Loss> {
        let asked = Instant::now();
        let answer = async {
            loop {
                let Ok(mut slot) = Arc::clone(&self.conn).try_lock_owned() else {
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
                let same = sql::backend_pid(conn.pg()?).await? == self.backend_pid();
                return Ok::<_, sqlx::Error>(if same { Ok(()) } else { Err(Loss::Pooled) });
            }
        };
        match timeout_at(self.trusted_until().into(), answer).await {
            Ok(Ok(Ok(()))) => {
                self.trust(asked);
                self.used.notify_one();
                self.listen().await;
                Ok(())
            }
            Ok(Ok(Err(loss))) => Err(loss),
            Ok(Err(error)) => Err(Loss::Disconnected(Arc::new(error))),
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

    /// Asks the session whether it holds a lock, on behalf of a guard.
    pub(crate) async fn verify(self: &Arc<Self>, key: &Key, mode: Mode) -> Result<()> {
        let mut slot = self.connection().await;
        if let Some(reason) = self.loss() {
            return Err(Error::lost(key, reason));
        }
        let Some(conn) = slot.as_mut() else { return Err(Error::lost(key, Loss::NotHeld)) };
        // A shared guard may be covered by the exclusive lock of another one.
        let modes = match mode {
            Mode::Exclusive => &[Mode::Exclusive][..],
            Mode::Shared => &[Mode::Shared, Mode::Exclusive],
        };
        let asked = Instant::now();
        let answer = within(self.heartbeat.deadline, async {
            self.tidy(conn).await?;
            let mut held = false;
            for &mode in modes {
                let holding = sql::holds(conn.pg()?, key.id(), mode).await?;
                if holding.backend_pid != self.backend_pid() {
                    return Ok(Err(Loss::Pooled));
                }
                held |= holding.held;
            }
            Ok(if held { Ok(()) } else { Err(Loss::NotHeld) })
        });
        let loss = match answer.await {
            Ok(Ok(())) => {
                self.trust(asked);
                return Ok(());
            }
            Ok(Err(loss)) => loss,
            Err(error) => Loss::Disconnected(Arc::new(error)),
        };
        drop(slot.take());
        self.lose(&loss);
        Err(Error::lost(key, loss))
    }

    /// Draws a fencing token for a guard.
    pub(crate) async fn draw_token(self: &Arc<Self>, key: &Key) -> Result<u64> {
        let mut slot = self.connection().await;
        if let Some(reason) = self.loss() {
            return Err(Error::lost(key, reason));
        }
        let Some(conn) = slot.as_mut() else { return Err(Error::lost(key, Loss::NotHeld)) };
        let answer = within(DEADLINE, async {
            self.tidy(conn).await?;
            sql::draw_token(conn.pg()?).await
        });
        match answer.await {
            Ok(token) => Ok(token.cast_unsigned()),
            // The session lives, and its lock is held.
            Err(source) if is_answer(&source) => Err(Error::Database { key: key.clone(), source }),
            Err(error) => {
                let loss = Loss::Disconnected(Arc::new(error));
                drop(slot.take());
                self.lose(&loss);
                Err(Error::lost(key, loss))
            }
        }
    }
}
