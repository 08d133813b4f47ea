//! Random operations on a guard while it is held.

use std::time::Duration;

use pglock::{Error, Loss, Mode};
use tokio::time::sleep;

use crate::calls::{Ended, Interruption};
use crate::faults;
use crate::guard::Guard;
use crate::member::{ANSWERED, Handle, Kind, Member};
use crate::table::{Owner, Table, Ticket};
use crate::world::KEYS;

impl Member {
    /// Holds a guard for a few operations, and releases it.
    ///
    /// `place` is the index of the handle that acquired the guard, if there is such a handle and it has no other
    /// guards.
    pub(crate) async fn hold(&mut self, place: Option<usize>, guard: Guard, owner: Owner) {
        self.hold_at(place, guard, owner, 0).await;
    }

    async fn hold_at(&mut self, place: Option<usize>, guard: Guard, owner: Owner, depth: u8) {
        let mut ticket = self.enter(guard, owner);
        for _ in 0..self.dice.below(4) {
            let backend = ticket.guard().backend_pid();
            match self.dice.below(16) {
                0 => {
                    self.ask("verify", backend, ticket.guard().verify()).await;
                }
                1 | 2 => self.draw_token(&mut ticket).await,
                3 | 4 if !matches!(owner, Owner::Handle(_)) => {
                    self.borrow(ticket.guard()).await;
                }
                5 | 6 if !matches!(ticket.guard(), Guard::Multi(_)) => {
                    match self.convert(ticket).await {
                        Some(converted) => ticket = converted,
                        None => return,
                    }
                }
                7 | 8 if depth < 2 => self.nest(place, &ticket, depth).await,
                9 => {
                    let work = sleep(self.moment());
                    self.ask("while_held", backend, ticket.guard().while_held(work)).await;
                }
                10 if self.dice.one_in(8) => {
                    if let Some(place) = place {
                        return self.close(place, ticket).await;
                    }
                }
                11 if self.world.is_stormy() && self.dice.one_in(8) => {
                    faults::strike_backend(&self.world, &mut self.dice, backend).await;
                }
                _ => sleep(self.moment()).await,
            }
        }
        let guard = self.world.table.leave(ticket);
        self.release(guard).await;
    }

    fn moment(&mut self) -> Duration {
        Duration::from_micros(self.dice.below(3000))
    }

    fn enter(&self, guard: Guard, owner: Owner) -> Ticket {
        self.entered(self.world.table.enter(guard, owner))
    }

    fn entered(&self, entered: Result<Ticket, (String, Ticket)>) -> Ticket {
        entered.unwrap_or_else(|(violation, ticket)| {
            self.world.fail(violation);
            ticket
        })
    }

    async fn draw_token(&mut self, ticket: &mut Ticket) {
        let backend = ticket.guard().backend_pid();
        let call = ticket.guard().fencing_token();
        if let Some(token) = self.ask("fencing_token", backend, call).await
            && let Err(violation) = Table::note_token(ticket, token)
        {
            self.world.fail(violation);
        }
    }

    /// Converts the guard to the other mode, if that is possible. `None` if the call failed or was interrupted,
    /// which releases the guard.
    async fn convert(&mut self, ticket: Ticket) -> Option<Ticket> {
        let (backend, owner) = (ticket.guard().backend_pid(), ticket.owner);
        let was_shared = ticket.guard().locks().iter().any(|(_, mode)| *mode == Mode::Shared);
        let verb = if was_shared { "try_upgrade" } else { "downgrade" };
        let then = self.world.table.now();
        let token = ticket.token();
        let guard = self.world.table.leave(ticket);
        let converted = self.ask(verb, backend, guard.convert()).await?;
        let is_shared = matches!(converted, Guard::Shared(_));
        let ticket = if was_shared && is_shared {
            self.entered(self.world.table.enter_again(converted, owner, token))
        } else {
            self.enter(converted, owner)
        };
        if let Err(violation) = self.world.table.is_unbroken(&ticket, then) {
            self.world.fail(violation);
        }
        Some(ticket)
    }

    /// Acquires again: the same lock by the same handle, or another one on the same session.
    async fn nest(&mut self, place: Option<usize>, ticket: &Ticket, depth: u8) {
        if let Some(place) = place.filter(|_| self.dice.one_in(2)) {
            if let Some((guard, owner)) = self.acquire(place).await {
                // The place is left out, because closing the handle would end the outer guard too.
                Box::pin(self.hold_at(None, guard, owner, depth + 1)).await;
            }
            return;
        }
        let other = self.dice.below(KEYS);
        let Owner::Session(_) = ticket.owner else { return };
        let Some(lock) = ticket.guard().lock(other) else { return };
        self.handles.push(Handle { lock, kind: Kind::Child });
        let place = self.handles.len() - 1;
        if let Some((guard, owner)) = self.acquire(place).await {
            Box::pin(self.hold_at(Some(place), guard, owner, depth + 1)).await;
        }
        self.handles.pop();
    }

    /// Closes the handle while its guard lives. That ends the guard, but no guard of another handle.
    async fn close(&mut self, place: usize, ticket: Ticket) {
        let Some(handle) = self.handles.get_mut(place) else { return };
        let verb = if handle.kind == Kind::Child { "close_child" } else { "close" };
        let backend = ticket.guard().backend_pid();
        if !self.world.has(verb) {
            let guard = self.world.table.leave(ticket);
            return self.release(guard).await;
        }
        self.world.spend(verb);
        let closing = handle.lock.release_all();
        match self.world.calls.make(verb, ANSWERED, Interruption::Never, closing).await {
            Ended::Returned(Ok(())) | Ended::Interrupted => {}
            Ended::Returned(Err(error)) => self.world.check_error(verb, &error, Some(backend)),
            Ended::TooLate => self.too_late(verb),
        }
        // The guard is still in the table, which checks that the close ends the guard before the lock.
        if !ticket.guard().is_lost() {
            self.world.fail(format!("{verb}: the guard of backend {backend} is not lost"));
        }
        let guard = self.world.table.leave(ticket);
        match guard.release().await {
            Err(Error::Lost { reason: Loss::Released, .. }) => {}
            Err(error) => self.world.check_error(verb, &error, Some(backend)),
            Ok(()) => self.world.fail(format!("{verb}: the guard of backend {backend} releases")),
        }
    }
}
