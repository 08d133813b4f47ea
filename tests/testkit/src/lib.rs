//! Finds or starts a real PostgreSQL server, for the tests, examples and benches of `pglock`.
//!
//! [`pool`] is all that an example needs. A test takes a [`TestDb`], a database of its own, so
//! that tests run side by side with the same keys. A test that breaks the server takes a
//! [`Server`] of its own: it can be stopped, killed, paused and started again, have a hot standby that
//! is promoted, or a [`PgBouncer`], a [`Pgpool`] or a [`PinningPooler`] in front. [`Pglite`] is a
//! server of another kind.
//!
//! If `DATABASE_URL` is set, databases are made on that server, and dropped at the end. Otherwise one server is started
//! for the process, from binaries that are found on this machine, or fetched with `npm` or `apt-get` into a cache,
//! without installing them. The server ends with the process, even if the process is killed. As root, the server runs
//! under an unprivileged account.
//!
//! | variable | meaning |
//! |---|---|
//! | `DATABASE_URL` | make databases on this server; start none |
//! | `PGLOCK_PG_BIN` | a directory with `initdb` and `postgres` to start |
//! | `PGLOCK_PG_VERSION` | start this major version (12 to 18), fetched with `npm` |
//! | `PGLOCK_TEST_REQUIRE_ALL` | a test that is skipped, because the machine lacks something, fails |
//! | `PGLOCK_TEST_FULL` | tests that take long do all that they can, as in CI |
//! | `PGLOCK_TEST_ENVIRONMENT` | run in this row of [`ENVIRONMENTS`], on a server of the testkit |

#![expect(
    clippy::expect_used,
    clippy::missing_panics_doc,
    clippy::must_use_candidate,
    clippy::panic,
    reason = "in a test, what cannot go on panics, and the message says why"
)]

mod db;
mod environment;
mod locks;
mod hostile;
mod cancel;
mod role;
mod network;
mod proxy;
mod pinning;
mod clock;
mod server;
mod options;
mod pgbouncer;
mod pgpool;
mod pglite;
mod daemon;
mod data;
mod watchdog;
mod process;
mod account;
mod find;
mod npm;
mod apt;
mod skip;
mod amount;

pub use crate::amount::amount;
pub use crate::cancel::{cancel_after, eventually};
pub use crate::clock::{WallClock, monotonic};
pub use crate::db::{TestDb, pool};
pub use crate::environment::{ENVIRONMENTS, Environment, PLAIN, VARIABLE};
pub use crate::hostile::{HIJACKED, hostile_schema, replace_function};
pub use crate::locks::{AdvisoryLock, advisory_locks};
pub use crate::network::{Direction, Network};
pub use crate::options::ServerOptions;
pub use crate::pgbouncer::PgBouncer;
pub use crate::pglite::Pglite;
pub use crate::pgpool::Pgpool;
pub use crate::pinning::{Pinning, PinningPooler};
pub use crate::proxy::Proxy;
pub use crate::role::{Cues, Role, cues, say, stand_still};
pub use crate::server::{Server, Shutdown};
pub use crate::skip::{print_skipped, program, skip};
