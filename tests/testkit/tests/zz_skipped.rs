//! Prints which tests were skipped, at the end of a run: cargo runs test programs by name.

use std::env;

fn main() {
    // There is no test to list.
    if env::args().all(|arg| arg != "--list") {
        pglock_testkit::print_skipped();
    }
}
