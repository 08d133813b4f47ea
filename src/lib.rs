//! A lock you hold like a `MutexGuard`, shared by every machine that can reach your database.

mod lock;
mod guard;
mod key;
mod mode;
mod options;
mod error;
mod session;
mod sql;

pub use error::{Error, Loss, Result};
pub use guard::{ExclusiveGuard, SharedGuard};
pub use key::Key;
pub use lock::Lock;
pub use mode::Mode;
pub use options::LockOptions;
pub use session::lend::SessionConnection;
