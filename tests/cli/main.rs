//! The program `pglock`, as people use it: one file per command.

#![expect(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::unwrap_used,
    reason = "in a test, what cannot go on panics, and the message says why"
)]

mod support;
mod terminal;

mod database;
mod doctor;
mod elect;
mod elect_hooks;
mod help;
mod key;
mod kill;
mod ls;
mod ls_many;
mod ls_watch;
mod examples;
mod readme;
mod run;
mod run_loss;
mod run_signals;
mod run_terminal;
mod run_descendants;
mod run_keys;
mod run_wait;
mod who;
