//! A lock you hold like a `MutexGuard`, shared by every machine that can reach your database.
//!
//! RAII guards for PostgreSQL's [advisory locks], on [sqlx] and tokio.
//!
//! ```
//! use pglock::Lock;
//!
//! # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
//! # let pool = pglock_testkit::pool().await;
//! let done = Lock::new(&pool, "nightly-report")
//!     .try_run(async {
//!         // This machine makes the report. If it loses the lock, this future is dropped.
//!     })
//!     .await?;
//! if done.is_none() {
//!     println!("another machine makes it");
//! }
//! # Ok(()) }
//! ```
//!
//! # The guide
//!
//! * [Cookbook](guide::cookbook): tasks, each with code to copy; how to migrate from go-pglock, sqlx or Ruby.
//! * [Guarantees and their limits](guide::guarantees): what always holds, and what no advisory lock can
//!   promise.
//! * [Faults](guide::faults): what the holder sees when something breaks, and when the lock is free.
//! * [Operations](guide::operations): pools, poolers, settings, monitoring, queries for `psql`.
//! * [Cost](guide::cost): what it costs, and how that grows; the server's limits; more than one server.
//! * [Comparison](guide::comparison): what else there is, and when that is the better choice.
//! * [Architecture](guide::architecture): how it works inside.
//!
//! # Overview
//!
//! * [`Lock`] is a handle with methods that acquire, and [`run`](Lock::run), which runs a future under the lock.
//!   Handles are re-entrant; two handles exclude each other.
//! * [`ExclusiveGuard`] and [`SharedGuard`] are proof of holding; dropping one releases its share. [`Guard`] is what
//!   all guards have in common.
//! * [`Source`] is where a handle gets its session: a pool, a manager, or a guard.
//! * [`LockManager`] holds thousands of locks on one connection.
//! * [`MultiLock`] holds several keys, all or none, and never in a deadlock with another `MultiLock`.
//! * [`Semaphore`] is a counting semaphore; each permit has an index.
//! * [`Election`] makes one candidate the leader, notifies it when it no longer leads, and shows to all
//!   others which candidate leads.
//! * [`Key`] is what is locked: a number, a pair, or a name; [`interop`] makes the keys of other libraries.
//! * [`LockOptions`] are the settings that have a good default.
//! * [`transaction`] has locks that end with a transaction of yours.
//! * [`inspect`] lists holders and waiters, and ends a session.
//! * [`doctor`] reports whether locks exclude other sessions on a server, and what to change there.
//! * [`Error`] is everything that can fail; each message names the key and says what to do.
//!
//! # Cancel safety
//!
//! Every future of this crate may be dropped at any await. (Those of [`transaction`] run on a connection
//! of yours, [at a cost](transaction#cancel-safety).) A statement that was sent can't be withdrawn, so a
//! dropped future hands it to a background task. The task cancels a wait through another connection
//! (`pg_cancel_backend`), reads the outstanding answer, and releases a lock that was granted meanwhile.
//! Then the connection returns to the pool. If any of that fails, the connection is closed, and the server
//! releases its locks. Each method documents what dropping its future costs.
//!
//! A guard may be dropped on a thread without a runtime, after its runtime was shut down, or during a
//! panic.
//!
//! # Loss
//!
//! The server releases a lock when its session ends, and a session can end without its client: an
//! administrator terminates it, the server restarts, the network fails. A guard whose session has ended is
//! *lost*: [`lost`](Guard::lost) resolves, [`is_lost`](Guard::is_lost) returns `true`, and
//! all other methods return [`Error::Lost`].
//!
//! A background task monitors the sessions that hold a lock, one task for each tokio runtime that
//! acquires. If the runtime is shut down, the guards acquired on it are lost immediately.
//!
//! * At each [heartbeat](LockOptions::heartbeat_interval), the task sends a statement to the session. A session that
//!   is silent is lost after the heartbeat's interval plus its timeout, by default 4 s after the last
//!   question that was answered.
//! * When the session has been held for two seconds, or for the heartbeat's interval if that is shorter, the
//!   task also polls its idle connection, so a closed one is detected within 50 ms. For that, the task opens
//!   one connection beside the pool for each server, the *monitor connection*, whatever the number of
//!   sessions. If it can't be opened, a closed session is detected at the next heartbeat.
//! * While the session's connection is in use (the application has borrowed it, or the session waits for
//!   another lock), the task asks on the monitor connection whether the session still holds its locks: one
//!   statement for all such sessions of a server.
//!
//! Only three things are a loss: silence, a closed connection, and the server's answer that the lock is
//! not held. An answer that is an error is a sign of life.
//!
//! The server ends the session of a [silent client](LockOptions::keepalives_interval) only later, so a holder
//! that is cut off stops before another session is granted the lock. This requires TCP, and a server that
//! accepts the settings.
//!
//! # What is sent to the server
//!
//! | | statements |
//! |---|---|
//! | a free lock acquired, or a `try_` of a busy one | 1 |
//! | a busy lock waited for | 2, and 2 for each full [slice](LockOptions::wait_slice), a minute by default; 1 more after a wait longer than a heartbeat's interval; 1 more once per server, for `deadlock_timeout` |
//! | the first acquire of a process on a server | 26 on two connections beside the pool, in the background, to prove that locks exclude other sessions |
//! | the first acquire on a connection with prepared statements of the application | 1 more, for the settings |
//! | a re-entrant guard acquired or released | 0 |
//! | locks of a [`LockManager`] acquired or released concurrently | 1 for up to 1,000 keys; 0 for a hand-off inside the process |
//! | several free locks acquired at once | 1; refused half-way, 1 more |
//! | a permit of a semaphore acquired | 3, and 1 per ten seconds; 1 every 20 ms for the first waiter |
//! | a leader elected | 2 more than a lock acquired |
//! | the leader looked up, or observed | 1, or 1 every 500 ms |
//! | a lock held | 1 at each [heartbeat](LockOptions::heartbeat_interval) |
//! | the connection [borrowed](Guard::connection) | 2 the first time, at most 1 later; 2 when it is returned |
//! | a guard [verified](Guard::verify), or a [token](Guard::fencing_token) drawn | 1 |
//! | the last guard released | 1 |
//! | an exclusive guard released while shared ones stay | 1 |
//! | a free lock of a [`transaction`] acquired, or a `try_` of a busy one | 1 |
//! | a busy lock of a [`transaction`] waited for | 1, and 1 for each slice of a minute |
//! | a lock of a [`transaction`] released | 0 |
//! | locks [inspected](inspect), or a session ended | 1 |
//!
//! Functions, operators and relations in these statements are qualified with `pg_catalog`, so the role's
//! `search_path` has no effect on them.
//!
//! Nothing is installed in the database. `tcp_keepalives_idle`, `tcp_keepalives_interval` and
//! `tcp_keepalives_count` stay set on the pooled connection. `tcp_user_timeout`,
//! `client_connection_check_interval`, a role's `idle_session_timeout` and, for a leader,
//! `application_name` are changed while they are needed, and reset with the release.
//! [Operations](guide::operations#settings) has the table.
//!
//! # Tracing
//!
//! The target is `pglock` and its modules. In the normal path no event is above `debug`.
//!
//! | | level | what | fields |
//! |---|---|---|---|
//! | span `acquire` | debug | one acquire | `key`, `name`, `mode`, `outcome` (`acquired`, `busy`, `failed`, `cancelled`), `waited_ms` |
//! | event | trace | the server confirmed a release | `backend_pid`, `locks` |
//! | event | debug | an acquire was abandoned or has failed, and is undone | `key`, `mode`, `backend_pid`, `stage` |
//! | event | debug | an idle connection of the pool was dead, and another is taken | `key`, `error` |
//! | event | debug | the proof that locks exclude other sessions has no answer yet; it is retried | `error` |
//! | event | debug | the monitor connection can't be opened; a closed session is detected at its next heartbeat | `backend_pid`, `error` |
//! | event | debug | the monitor connection can't be asked about sessions whose connections are in use | `sessions`, `error` |
//! | event | debug | an abandoned wait can't be cancelled; the cancel is retried | `backend_pid`, `error` |
//! | event | debug | a transaction left open on a borrowed connection was rolled back | `backend_pid` |
//! | event | debug | a runtime was shut down, and a session that held locks with it | `backend_pid`, `locks`, `reason` |
//! | event | warn | the server rejects a setting by which it detects a dead client | `error` |
//! | event | warn | a connection was closed instead of returned to the pool | `backend_pid`, `locks`, `reason` |
//! | event | warn | a lock that was taken through a pooler in transaction mode could not be released | `backend_pid`, `error` |
//! | event | warn | a task re-entered a lock that another task acquired through the same handle; once per handle | `key`, `name` |
//! | event | warn | a campaign of [`Election::run`] failed; it is retried | `key`, `error` |
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
mod holdings;
mod owner;
mod request;
mod session;
mod source;
mod sql;
#[cfg(doc)]
pub mod guide;

pub use election::{Election, Leader, LeaderState, LeaderStatus, Leadership, Observer};
pub use error::{Error, Loss, Result};
pub use guard::{ExclusiveGuard, Guard, SharedGuard, Upgrade};
pub use key::Key;
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
