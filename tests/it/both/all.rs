//! Tests of every kind of lock. Each test runs on the locks that [`super`] makes.

use super::{ALONE, LETS_GO_UNDRIVEN, new_lock, new_lock_with, sessions};

mod cancel;
mod clean;
mod drop;
mod errors;
mod go_pglock;
mod interop;
mod loss;
mod model;
mod tokens;
mod upgrade;
mod wait;
