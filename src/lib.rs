//! A lock you hold like a `MutexGuard`, shared by every machine that can reach your database.
//!
//! RAII guards for PostgreSQL's [advisory locks], on [sqlx] and tokio.
//!
//! ```
//! use pglock::Lock;
//!
//! # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
//! # let pool = pglock_testkit::pool().await;
//! let mut lock = Lock::new(&pool, "nightly-report");
//! if let Some(_guard) = lock.try_acquire().await? {
//!     // This machine makes the report; the others see `None`.
//! }
//! # Ok(()) }
//! ```
//!
//! # The guide
//!
//! * [Cookbook](guide::cookbook): tasks, each with code to copy; moving here from go-pglock, sqlx or Ruby.
//! * [Guarantees and their limits](guide::guarantees): what always holds, and what no advisory lock can
//!   promise.
//! * [Operations](guide::operations): pools, poolers, settings, monitoring, queries for `psql`.
//! * [Cost](guide::cost): what it costs, and how that grows; the server's limits; more than one server.
//! * [Comparison](guide::comparison): what else there is, and when that is the better choice.
//! * [Architecture](guide::architecture): how it works inside.
//!
//! # Overview
//!
//! * [`Lock`] is a handle: an owner, with six ways to acquire.
//! * [`ExclusiveGuard`] and [`SharedGuard`] are proof of holding; dropping one releases.
//! * [`LockManager`] makes the same locks, thousands of them on one connection.
//! * [`MultiLock`] holds several keys, all or none, and never in a deadlock with another.
//! * [`Semaphore`] lets up to so many in, each with a number of its own.
//! * [`Election`] makes one candidate the leader, tells it when it is not any more, and others who is.
//! * [`Key`] is what is locked: a number, a pair, or a name.
//! * [`LockOptions`] are the settings that have a good default.
//! * [`transaction`] has locks that end with a transaction of yours.
//! * [`inspect`] shows who holds and who waits, and ends a session.
//! * [`doctor`] tells whether locks mean anything on a server, and what to change there.
//! * [`Error`] is everything that can go wrong; each message names the key and says what to do.
//!
//! # Cancel safety
//!
//! Every future of this crate may be dropped at any await; those of [`transaction`] run on a connection
//! of yours, and [at a cost](transaction#cancel-safety). PostgreSQL has no way to withdraw one
//! statement without a word to the server, so a dropped future hands what it began to a task: an
//! answer that is on its way is read, a wait is cancelled through another connection, and a lock that
//! was granted meanwhile is given up. Then the connection returns to the pool. If any of that fails,
//! the connection is closed, and the server frees its locks with it. Each method says what dropping it
//! costs.
//!
//! The same goes for guards: they may be dropped on a thread without a runtime, after the runtime is
//! gone, or during a panic.
//!
//! # Loss
//!
//! The server frees a lock when its session ends, and a session can end without its client: killed by
//! an administrator, by a restart, by a network that fails. A guard whose session has ended is
//! *lost*, and says so: [`lost`](ExclusiveGuard::lost), [`is_lost`](ExclusiveGuard::is_lost), and an
//! [`Error::Lost`] from everything else.
//!
//! A hold of more than 40 ms is watched, by a task on the runtime of the acquire; if that is shut down,
//! its guards are lost. The task listens to the idle connection, so a closed one is noticed at once.
//! (For that it needs a connection of the pool for a moment; where none is to spare, it waits for one,
//! and until then the loss is noticed at a heartbeat.) And it asks the session at every
//! heartbeat, so a silent one is noticed after the [interval and the deadline](LockOptions::heartbeat).
//! The server is told to [give a silent client up](LockOptions::server_gives_up) only later, so a holder
//! that is cut off stops before anybody else begins. That holds over TCP, and where the server accepts
//! the settings.
//!
//! # What is sent to the server
//!
//! | | statements |
//! |---|---|
//! | a free lock acquired, or a `try_` of a busy one | 1 |
//! | a busy lock waited for | 1, and 1 for each [slice](LockOptions::wait_slice) |
//! | the first acquire of a process | 9 more, on two connections, to look for a pooler in transaction mode; 81 where there is a pooler, of whatever mode |
//! | the first acquire on a connection that others have used | 1 more, for the settings |
//! | a stacked guard acquired or released | 0 |
//! | locks of a [`LockManager`] acquired or released at once | 1 for up to 1,000 keys; 0 for one passed on in the process |
//! | several free locks acquired at once | 1; refused half-way, 1 more |
//! | a permit of a semaphore acquired | 3, and 1 for each second; for the first who waits, 1 each 20 ms |
//! | a leader elected | 2 more than a lock acquired |
//! | who leads, asked or observed | 1, or 1 each 500 ms |
//! | a lock held | 1 at each [heartbeat](LockOptions::heartbeat) |
//! | the last guard released | 1 |
//! | an exclusive guard released while shared ones stay | 1 |
//! | a free lock of a [`transaction`] acquired, or a `try_` of a busy one | 1 |
//! | a busy lock of a [`transaction`] waited for | 1, and 1 for each 5 s |
//! | a lock of a [`transaction`] released | 0 |
//! | locks [inspected](inspect), or a session ended | 1 |
//!
//! Nothing is installed in the database. `tcp_keepalives_idle`, `tcp_keepalives_interval`,
//! `tcp_keepalives_count`, `tcp_user_timeout` and `client_connection_check_interval` stay set on the
//! pooled connection; a role's `idle_session_timeout` is lifted while a lock is held, and put back. A
//! leader shows its name in `application_name`, and that is put back too.
//!
//! # Tracing
//!
//! Target `pglock`. In the normal path nothing is above `debug`.
//!
//! | | level | what | fields |
//! |---|---|---|---|
//! | span `acquire` | debug | one acquire | `key`, `name`, `mode`, `outcome` (`acquired`, `busy`, `failed`, `cancelled`), `waited_ms` |
//! | event | trace | the server confirmed a release | `backend_pid`, `what` |
//! | event | debug | an acquire was abandoned or failed, and is being given up | `key`, `mode`, `backend_pid`, `stage` |
//! | event | debug | an idle connection of the pool was dead, and another is taken | `key`, `error` |
//! | event | debug | a session can't be listened to, or not asked about | `backend_pid`, `error` |
//! | event | debug | no connection to cancel a wait that was given up; it is tried again | `backend_pid`, `error` |
//! | event | warn | the server refuses a setting by which it would notice a dead client | `error` |
//! | event | debug | a transaction left open on a lent connection was rolled back | `backend_pid` |
//! | event | debug | a runtime went down, and with it a session that held locks | `backend_pid`, `locks`, `reason` |
//! | event | warn | a connection was closed instead of returned to the pool | `backend_pid`, `locks`, `reason` |
//! | event | warn | a lock that was taken through a pooler in transaction mode could not be given up | `backend_pid`, `error` |
//! | event | warn | a campaign of [`Election::run`] failed; it is tried again | `key`, `error` |
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
pub mod doctor;
mod error;
mod held;
mod owner;
mod request;
mod session;
mod sql;
#[cfg(doc)]
pub mod guide;

pub use election::{Election, Leader, LeaderStatus, Leadership, Observer};
pub use error::{Error, Loss, Result};
pub use guard::{ExclusiveGuard, SharedGuard};
pub use key::Key;
pub use lock::Lock;
pub use manager::LockManager;
pub use mode::Mode;
pub use multi::{MultiGuard, MultiLock};
pub use options::LockOptions;
pub use semaphore::{Permit, Semaphore};
pub use session::lend::SessionConnection;

/// Compiles what the README shows.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
