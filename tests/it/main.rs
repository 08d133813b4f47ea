//! Every behaviour that users can rely on, against a real server: one file per behaviour.

#![expect(clippy::duplicate_mod, reason = "some tests run on two kinds of lock")]
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod support;

mod auto_traits;
mod cancel;
mod clean;
mod election;
mod election_run;
mod engines;
mod environments;
mod errors;
mod failover;
mod served_in_time;
mod turns;
mod faults;
mod guide;
mod hostile;
mod in_line;
mod inspect;
mod interop;
mod keys;
mod logged;
mod loss;
mod managed;
mod manager;
#[cfg(feature = "metrics")]
mod metrics;
mod multi;
mod one_session;
mod own_session;
mod partition;
mod pglite;
mod pgpool;
mod pinning;
mod pooler;
mod promotion;
mod quiet;
mod scoped;
mod semaphore;
mod service;
mod shown;
mod standby;
mod statements;
mod tidy;
mod tokens;
mod traces;
mod transaction;
mod wait;
