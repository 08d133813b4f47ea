//! A lock you hold like a `MutexGuard`, shared by every machine that can reach your database.
//!
//! RAII guards for PostgreSQL's [advisory locks], on [sqlx] and tokio. A lock is held by a session of the server,
//! until it is released or the session ends. It has no expiry.
//!
//! ```
//! use pglock::Lock;
//!
//! # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
//! # let pool = pglock_testkit::pool().await;
//! # async fn make_report() -> pglock::Result<()> { Ok(()) }
//! // If this machine loses the lock, the future is dropped.
//! match Lock::new(&pool, "nightly-report").try_run(make_report()).await? {
//!     Some(report) => report?, // the result of the future
//!     None => println!("another machine makes it"),
//! }
//! # Ok(()) }
//! ```
//!
//! # The guide
//!
//! * [Cookbook](guide::cookbook): tasks, each with code to copy; how to migrate from go-pglock, sqlx or Ruby.
//! * [Guarantees](guide::guarantees): what always holds, and what no advisory lock can promise.
//! * [Faults](guide::faults): the effect of each fault on the holder, and when the lock is free.
//! * [Operations](guide::operations): pools, settings, monitoring, queries for `psql`.
//! * [Deploying](guide::deploying): systemd, containers and Kubernetes; shutdown, probes, timeouts.
//! * [Servers](guide::servers): on which servers, services and poolers locks exclude.
//! * [Cost](guide::cost): connections, memory, time; the server's limits; more than one server.
//! * [Comparison](guide::comparison): other libraries and other kinds of lock, and when they are the better choice.
//! * [Program](guide::program): locks in a shell, in cron and under systemd.
//! * [Architecture](guide::architecture): how the crate works inside.
//!
//! # Overview
//!
//! * [`Lock`] is a handle with methods that acquire, and [`run`](Lock::run), which runs a future under the lock.
//!   Handles are re-entrant; two handles exclude each other, unless both are made from one guard of a lock
//!   on a pool.
//! * [`ExclusiveGuard`] and [`SharedGuard`] show that the lock is held; dropping the last guard of a handle releases
//!   it. [`Guard`] is the common part of all guards.
//! * [`Source`] provides the session of a handle: a pool, a manager, or a guard.
//! * [`LockManager`] holds thousands of locks on a few connections.
//! * [`MultiLock`] acquires several keys, all or none, and never deadlocks with another `MultiLock`.
//! * [`Semaphore`] is a counting semaphore; each permit has an index.
//! * [`Election`] makes one candidate the leader, notifies it when it no longer leads, and shows others the leader.
//! * [`Key`] identifies a lock: a number, a pair, or a name; [`interop`] makes the keys of other libraries.
//! * [`LockOptions`] are settings, each with a default.
//! * [`transaction`] has locks that end with a transaction of yours.
//! * [`inspect`] lists holders and waiters, and ends a session.
//! * [`doctor`] reports whether locks exclude other sessions on a server, and what to change there.
//! * [`Error`] covers all failures. Its message names the key, if there is one, and says what to do.
//!
//! # Cancel safety
//!
//! Every future of this crate may be dropped at any await. (Those of [`transaction`] run on a connection of yours, [at
//! a cost](transaction#cancel-safety).) A background task cancels the wait through another connection
//! (`pg_cancel_backend`), reads the outstanding answer, releases a lock that was granted meanwhile, and returns the
//! connection to the pool. If any of that fails, the connection is closed, and the server releases its locks. A guard
//! may be dropped on a thread without a runtime, after its runtime was shut down, or during a panic. The locks of a
//! [`LockManager`] are released by the manager's task while its runtime runs, otherwise by the end of the connection.
//!
//! # Loss
//!
//! A session can end without its client: an administrator terminates it, the server restarts, the network fails. Then
//! its guards are *lost*: [`lost`](Guard::lost) resolves, [`is_lost`](Guard::is_lost) returns `true`, and all methods
//! that ask the server return [`Error::Lost`], or [`Error::NoExclusion`] if locks exclude no other session there. If
//! the server has not answered within the [heartbeat](LockOptions::heartbeat_interval)'s bound, by default 4 s, the
//! guards are lost too; [`Loss`] lists all causes. An error in answer to a statement is no loss, unless the error ends
//! the session. Over TCP, the server ends the session of a [silent client](LockOptions::keepalives_interval) only
//! later, so a holder that is cut off reports the loss before another session is granted the lock.
//! [Guarantees](guide::guarantees#loss) has the detection times, and the exceptions.
//!
//! # What is sent to the server
//!
//! | | statements |
//! |---|---|
//! | a free lock acquired, or a `try_` of a busy one | 1 |
//! | a busy lock waited for | 2, and 2 for each full [slice](LockOptions::wait_slice), a minute by default; 1 more after a wait longer than a heartbeat's interval; 1 more once per server, for `deadlock_timeout` |
//! | the first acquire of a process on a server | 26 on two connections outside the pool, in the background, to prove that locks exclude other sessions |
//! | the first acquire on a connection with prepared statements of the application | 1 more, for the settings |
//! | a re-entrant guard acquired or released | 0 |
//! | an acquire with [`application_name`](LockOptions::application_name), or by a role with an `idle_session_timeout` | 1 more for each |
//! | a lock [handed off](guide::guarantees#fairness) to another task of the process | 0; 1 if the release is awaited |
//! | locks of a [`LockManager`] acquired or released concurrently | 1 for up to 1,000 keys; for a hand-off inside the process 0, or 1 if the release is awaited |
//! | a free [`MultiLock`] acquired | 1; by a `try_` method, 1 more if one of its keys is busy |
//! | a permit of a semaphore acquired | 3, and 1 per ten seconds; 1 every 20 ms for the first waiter |
//! | a leader elected | 2 more than a lock acquired |
//! | the leader looked up, or observed | 1, or 1 every 500 ms at first, and less and less often without a change, down to every 5 s |
//! | a lock held | 1 at each [heartbeat](LockOptions::heartbeat_interval) |
//! | the connection [borrowed](Guard::connection) | 1 the first time, at most 1 later; when it is returned 1, and 1 more if the lock stays held |
//! | the last guard of a handle released, or its last exclusive one | 1; then 1 more, if settings have to be [restored](guide::operations#settings) |
//! | a lock of a [`transaction`] | 1; waited for, 1 more for each slice of a minute; released, 0 |
//! | a guard [verified](Guard::verify), a [token](Guard::fencing_token) drawn, locks [inspected](inspect) | 1 |
//!
//! Functions, operators and relations in these statements are qualified with `pg_catalog`, so the role's
//! `search_path` has no effect on them. Nothing is installed in the database;
//! [operations](guide::operations#settings) lists the settings.
//!
//! # Features
//!
//! No feature is on by default.
//!
//! * `serde`: `Serialize` for [`Key`], [`Mode`], [`Leader`], and what [`inspect`] and [`doctor`] return; `Deserialize`
//!   for [`Key`] and [`Mode`]. Fields are serialized under their Rust names, which will not change; `inspect` describes
//!   the one exception.
//! * `metrics`: durations of acquires, waits and holds, losses, leaders, connections and more, for the exporters of the
//!   `metrics` crate. The docs of the module `metrics` list them.
//! * `cli`: the program `pglock`.
//!
//! [advisory locks]: https://www.postgresql.org/docs/current/explicit-locking.html#ADVISORY-LOCKS
//! [sqlx]: https://docs.rs/sqlx

#![doc(test(no_crate_inject, attr(deny(warnings), allow(dead_code, unused_variables))))]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod lock;
mod guard;
mod manager;
mod multi;
mod semaphore;
mod election;
mod key;
mod mode;
mod options;
pub mod transaction;
pub mod inspect;
pub mod interop;
pub mod doctor;
mod error;
#[cfg(feature = "metrics")]
pub mod metrics;
#[cfg(not(feature = "metrics"))]
#[path = "metrics/off.rs"]
mod metrics;
mod application_name;
mod holdings;
mod owner;
mod progress;
mod request;
#[cfg(feature = "serde")]
mod serialize;
mod session;
mod source;
mod sql;
#[cfg(doc)]
pub mod guide;

pub use election::{Election, Leader, LeaderState, LeaderStatus, Leadership, Observer};
pub use error::{Error, Loss, Result};
pub use guard::{ExclusiveGuard, Guard, SharedGuard, Upgrade};
pub use key::{Key, ParseKeyError};
pub use lock::Lock;
pub use manager::LockManager;
pub use mode::Mode;
pub use multi::{MultiGuard, MultiLock};
pub use options::{ConfiguredPool, LockOptions};
pub use semaphore::{Permit, Semaphore};
pub use session::lend::SessionConnection;
pub use source::Source;

/// Compiles what the README shows.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
