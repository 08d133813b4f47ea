//! Every behaviour that users can rely on, against a real server: one file per behaviour.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod support;

mod auto_traits;
mod cancel;
mod clean;
mod drop;
mod errors;
mod go_pglock;
mod interop;
mod loss;
mod model;
mod statements;
mod tidy;
mod traces;
mod wait;
