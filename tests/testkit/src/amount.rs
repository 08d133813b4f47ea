//! The amount of work of long tests.

use std::env;

/// The variable that makes long tests do the full amount.
const FULL: &str = "PGLOCK_TEST_FULL";

/// Returns `usual`, or `full` if `PGLOCK_TEST_FULL` is set, as CI does.
///
/// # Examples
///
/// ```
/// let rounds = pglock_testkit::amount(1_000, 10_000);
/// assert!(rounds >= 1_000);
/// ```
pub fn amount<T>(usual: T, full: T) -> T {
    if env::var_os(FULL).is_some_and(|value| !value.is_empty()) { full } else { usual }
}
