//! What holds of every kind of lock: all of this runs on each, which [`super`] makes.

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
