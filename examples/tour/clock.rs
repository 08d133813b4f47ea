//! The clock that all processes read.

use std::time::{SystemTime, UNIX_EPOCH};

/// Returns the time by the machine's clock, in microseconds. Only this clock means the same in every process.
pub(crate) fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}
