//! A wait session: waits in the server's queue for keys that other sessions hold, one at a time.
//!
//! It takes the next key in the line, waits for it, holds it while the process hands it off, releases it, and
//! takes the next one. It ends if there is no key to wait for during [`IDLE`], or if its connection breaks.

use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::sleep;

use super::driver::end_with_the_runtime;
use super::table::{Step, Taken};
use super::{Manager, Next, Reply, State, Wait, fail, report_loss};
use crate::error::{Error, Loss, Result, chain};
use crate::guard::Guard;
use crate::key::{Key, KeyId};
use crate::mode::Mode;
use crate::owner::Owner;
use crate::request::Request;
use crate::session::Session;
use crate::session::shared::Called;
use crate::sql::batch::Call;

/// After this time without a key, the connection returns to the pool.
const IDLE: Duration = Duration::from_millis(100);

/// Starts a wait session for a driver. It waits for keys until there are none.
pub(super) fn start(manager: &Arc<Manager>, runtime: &Handle, driver: u64) {
    // Detach: the task ends by itself.
    drop(runtime.spawn(run(Arc::clone(manager), driver)));
}

async fn run(manager: Arc<Manager>, driver: u64) {
    let owner = Owner::new(&manager.pool, manager.options.clone());
    let mut waiter = WaitSession { manager, driver, owner, busy: None };
    let failed = match waiter.open().await {
        Ok(Some(keeper)) => {
            waiter.work(&keeper).await;
            false
        }
        Ok(None) => false,
        Err(error) => {
            // The keys are still tried on the shared session, which reports an error if it can't be opened either.
            tracing::debug!(
                error = %chain(&error),
                "no connection to wait for busy keys on; they are tried again and again"
            );
            true
        }
    };
    waiter.manager.ends_apart(driver, failed);
}

/// The state of a wait session's task.
///
/// # Drop
///
/// A key that the session holds is lost. If the session waits for a key, the owners that want the key retry.
struct WaitSession {
    manager: Arc<Manager>,
    driver: u64,
    owner: Owner,
    busy: Option<Busy>,
}

/// The key that a wait session waits for, or holds.
struct Busy {
    key: KeyId,
    wait: u64,
    /// The session that holds the key, once it is granted.
    session: Option<Arc<Session>>,
}

impl WaitSession {
    /// Opens the session, on which nothing is held yet.
    async fn open(&mut self) -> Result<Option<Guard>> {
        let Some(key) = self.manager.state().table.first_in_line() else { return Ok(None) };
        self.owner.try_acquire(&Request::session(&Key::from_id(key))).await
    }

    async fn work(&mut self, keeper: &Guard) {
        let manager = Arc::clone(&self.manager);
        while !keeper.is_lost() {
            match manager.next_wait(self.driver) {
                Next::Wait(wait) => {
                    self.busy = Some(Busy { key: wait.key, wait: wait.taken.id, session: None });
                    self.serve(wait, keeper).await;
                    self.busy = None;
                    continue;
                }
                Next::Idle => {}
                Next::Over => return,
            }
            let is_over = tokio::select! {
                biased;
                () = manager.line.notified() => false,
                _ = keeper.lost() => true,
                () = manager.pool.close_event() => true,
                () = sleep(IDLE) => true,
            };
            let has_work = manager.stop_idling(self.driver);
            if !has_work && (is_over || manager.is_short()) {
                return;
            }
        }
    }

    /// Waits for one key, and holds it until it is released.
    async fn serve(&mut self, wait: Wait, keeper: &Guard) {
        let Wait { key, taken, slice, mut orders } = wait;
        let Step::Wait(mode) = taken.step else { return };
        let manager = Arc::clone(&self.manager);
        let request = request(key, mode);
        let acquired = tokio::select! {
            biased;
            // No orders are sent before the session holds the key, so the channel is closed: no owner wants the key any
            // more.
            _ = orders.recv() => return,
            loss = keeper.lost() => Err(Error::broken(request.key(), &loss)),
            acquired = self.owner.try_acquire_for(&request, slice) => acquired,
        };
        let held = match acquired {
            Ok(Some(held)) => held,
            Ok(None) => {
                // Puts the key back into the line.
                manager.done_apart(key, taken.id, |state, now| {
                    state.table.not_granted(key, taken.id, now)
                });
                return;
            }
            Err(error) => {
                end_with_the_runtime().await;
                return fail(self.ends(key, taken.id), Some(&error));
            }
        };
        let session = Arc::clone(held.session());
        let mut holds = vec![held];
        if !manager.taken(key, taken.id, &session, true) {
            // No owner wants the key any more.
            return;
        }
        self.busy = Some(Busy { key, wait: taken.id, session: Some(Arc::clone(&session)) });
        let loss = hold(&manager, key, &session, &mut holds, &mut orders).await;
        match loss {
            Ok(unlock) => {
                let mut released = Ok(());
                for held in holds {
                    released = released.and(held.release().await);
                }
                if released.is_ok() {
                    self.busy = None;
                    manager.done_apart(key, taken.id, |state, now| {
                        state.table.taken(key, unlock, (&session, true), now)
                    });
                    return;
                }
                self.lose(&session.loss().unwrap_or(Loss::NotHeld));
            }
            Err(loss) => self.lose(&loss),
        }
    }

    /// Records that the session stopped waiting for the key. Returns the waiters, which retry if they are not notified.
    fn ends(&self, key: KeyId, wait: u64) -> Vec<Reply> {
        self.manager.done_apart(key, wait, |state, _| state.table.failed(key, wait))
    }

    /// Handles the loss of the session: a key that it held is lost; waiters for a key that was not granted yet retry.
    fn lose(&mut self, loss: &Loss) {
        let Some(Busy { key, wait, session }) = self.busy.take() else { return };
        let Some(session) = session else { return drop(self.ends(key, wait)) };
        session.give_up(loss);
        let lost_key = |state: &mut State, now| state.table.lost_key(key, &session, now);
        report_loss(self.manager.done_apart(key, wait, lost_key), loss);
    }
}

impl Drop for WaitSession {
    fn drop(&mut self) {
        self.lose(&Loss::RuntimeShutdown);
    }
}

fn request(key: KeyId, mode: Mode) -> Request {
    Request::one(&Key::from_id(key), mode).internal()
}

/// Holds a key, and takes the steps for it. Returns the number of the step that releases it, which is not taken here.
async fn hold(
    manager: &Arc<Manager>,
    key: KeyId,
    session: &Arc<Session>,
    holds: &mut Vec<Guard>,
    orders: &mut UnboundedReceiver<Taken>,
) -> Result<u64, Loss> {
    loop {
        let order = tokio::select! {
            biased;
            loss = session.lost() => return Err(loss),
            order = orders.recv() => order,
        };
        let Some(order) = order else { return Err(Loss::NotHeld) };
        if order.step == Step::Unlock {
            return Ok(order.id);
        }
        let yes = take(key, session, holds, order.step).await?;
        manager.taken(key, order.id, session, yes);
    }
}

/// Takes any step but [`Step::Unlock`].
async fn take(
    key: KeyId,
    session: &Arc<Session>,
    holds: &mut Vec<Guard>,
    step: Step,
) -> Result<bool, Loss> {
    let Some(held) = holds.first() else { return Err(Loss::NotHeld) };
    match step {
        Step::Downgrade => {
            let shared = held.and(&request(key, Mode::Shared)).await;
            let Ok(Some(shared)) = shared else {
                // The server refused the shared lock, so the exclusive one is held for longer than necessary.
                return session.loss().map_or(Ok(true), Err);
            };
            for before in std::mem::replace(holds, vec![shared]) {
                let released = before.release().await;
                released.map_err(|_| session.loss().unwrap_or(Loss::NotHeld))?;
            }
            Ok(true)
        }
        Step::Upgrade => match held.and(&request(key, Mode::Exclusive)).await {
            Ok(Some(exclusive)) => {
                holds.push(exclusive);
                Ok(true)
            }
            Ok(None) => Ok(false),
            Err(_) => session.loss().map_or(Ok(false), Err),
        },
        Step::Look => match session.call(&[(key, Call::IsWaitedFor)]).await {
            Called::Answers(answers) => Ok(answers.contains(&true)),
            // The server did not say, so assume that another session waits for the key.
            Called::Failed(..) => Ok(true),
            Called::Lost(loss) => Err(loss),
        },
        Step::Lock(_) | Step::Wait(_) | Step::Renew(_) | Step::Unlock => Ok(true),
    }
}
