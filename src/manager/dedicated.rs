//! A session for one key: somebody else holds it, so it has to be waited for.
//!
//! A task waits for it, as a plain [`Lock`](crate::Lock) does, and holds it while the process passes it
//! on. It takes the steps for the key, and ends when the key is given up or the session lost.

use std::sync::Arc;

use tokio::runtime::Handle;
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};

use super::shared::end_with_the_runtime;
use super::table::{Step, Taken};
use super::{Manager, Place};
use crate::error::{Loss, Result};
use crate::held::Held;
use crate::key::{Key, KeyId};
use crate::mode::Mode;
use crate::owner::Owner;
use crate::request::Request;
use crate::session::Session;
use crate::session::shared::Called;
use crate::sql::batch::Call;

/// Starts to wait for a key. Dropping what is returned ends the wait.
pub(super) fn start(
    manager: &Arc<Manager>,
    key: KeyId,
    id: u64,
    mode: Mode,
) -> UnboundedSender<Taken> {
    let (orders, receiver) = mpsc::unbounded_channel();
    let attendant =
        Attendant { manager: Arc::clone(manager), key, id, holds: Vec::new(), place: None };
    // Detach: it ends with its session, and with the last who wants the key.
    drop(Handle::current().spawn(attendant.attend(mode, receiver)));
    orders
}

/// Waits for a key, and holds it.
///
/// # Drop
///
/// If it still holds the key, that is lost; if it waits, whoever wants the key asks again.
struct Attendant {
    manager: Arc<Manager>,
    key: KeyId,
    id: u64,
    /// Empty until the key is granted. All on one session.
    holds: Vec<Held>,
    place: Option<Place>,
}

impl Attendant {
    async fn attend(mut self, mode: Mode, mut orders: UnboundedReceiver<Taken>) {
        let manager = Arc::clone(&self.manager);
        let mut owner = Owner::new(&manager.pool, manager.options.clone());
        let request = self.request(mode);
        let acquired = tokio::select! {
            biased;
            // There are no orders before it holds: nobody wants the key any more.
            _ = orders.recv() => return,
            acquired = owner.acquire(&request) => acquired,
        };
        let held = match acquired {
            Ok(held) => held,
            Err(error) => {
                end_with_the_runtime().await;
                return manager.failed(self.key, self.id, Some(&Arc::new(error)));
            }
        };
        held.session().poll_early();
        let place = Place { session: Arc::clone(held.session()), shared: false };
        self.holds.push(held);
        self.place = Some(place.clone());
        if !manager.taken(self.key, self.id, &place, true) {
            // Nobody wants it any more.
            self.place = None;
            return;
        }
        loop {
            let order = tokio::select! {
                biased;
                loss = place.session.lost() => return self.lose(&place, &loss),
                order = orders.recv() => order,
            };
            let Some(order) = order else { return };
            if order.step == Step::Unlock {
                return self.unlock(&place, order.id).await;
            }
            match self.take(order.step).await {
                Ok(yes) => manager.taken(self.key, order.id, &place, yes),
                Err(loss) => return self.lose(&place, &loss),
            };
        }
    }

    fn request(&self, mode: Mode) -> Request {
        Request::one(&Key::unnamed(self.key), mode)
    }

    async fn unlock(mut self, place: &Place, id: u64) {
        let mut released = Ok(());
        for held in std::mem::take(&mut self.holds) {
            released = released.and(held.release().await);
        }
        if released.is_ok() {
            self.place = None;
            self.manager.gave_up(self.key, id, place);
        } else {
            let loss = place.session.loss().unwrap_or(Loss::NotHeld);
            self.lose(place, &loss);
        }
    }

    /// Takes any other step.
    async fn take(&mut self, step: Step) -> Result<bool, Loss> {
        let Some(held) = self.holds.first() else { return Err(Loss::NotHeld) };
        let why = |session: &Session| session.loss().unwrap_or(Loss::NotHeld);
        match step {
            Step::Downgrade => {
                let shared = held.and(&self.request(Mode::Shared)).await;
                let Ok(Some(shared)) = shared else { return Err(why(held.session())) };
                for before in std::mem::replace(&mut self.holds, vec![shared]) {
                    let session = Arc::clone(before.session());
                    before.release().await.map_err(|_| why(&session))?;
                }
                Ok(true)
            }
            Step::Upgrade => match held.and(&self.request(Mode::Exclusive)).await {
                Ok(Some(exclusive)) => {
                    self.holds.push(exclusive);
                    Ok(true)
                }
                Ok(None) => Ok(false),
                Err(_) => Err(why(held.session())),
            },
            Step::Look => match held.session().call(&[(self.key, Call::IsWaitedFor)]).await {
                Called::Answers(answers) => Ok(answers.contains(&true)),
                // Then others get their turn.
                Called::Failed(..) => Ok(true),
                Called::Lost(loss) => Err(loss),
            },
            Step::Lock(_) | Step::Wait(_) | Step::Renew(_) | Step::Unlock => Ok(true),
        }
    }

    fn lose(&self, place: &Place, loss: &Loss) {
        place.session.give_up(loss);
        self.manager.lost_key(self.key, place, loss);
    }
}

impl Drop for Attendant {
    fn drop(&mut self) {
        match self.place.take() {
            Some(place) => self.lose(&place, &Loss::Abandoned),
            // Did it fail, they have been told.
            None => self.manager.failed(self.key, self.id, None),
        }
    }
}
