//! Take payments over HTTP, on several machines: each invoice one at a time, and one leader.
//!
//! `cargo run --example web_app` runs a demo: two servers, which are processes of their own, one database,
//! and clients that get in each other's way. The demo checks everything that it prints: if a claim does not hold, it
//! reports that and exits with 1.
//!
//! To run the server by itself, on a database of yours:
//!
//! ```text
//! DATABASE_URL=postgres://… cargo run --example web_app serve 127.0.0.1:8080
//! psql "$DATABASE_URL" -c 'INSERT INTO invoice VALUES (17)'
//! curl -i -X POST http://127.0.0.1:8080/invoices/17/pay
//! curl -i http://127.0.0.1:8080/leader
//! curl -i http://127.0.0.1:8080/readyz # and /livez
//! curl -i http://127.0.0.1:8080/metrics # with `cargo run --features metrics`
//! ```

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "an example tells what it does")]

use std::env;
use std::error::Error;
use std::process::ExitCode;

/// Returns an error, and so ends the example, unless the claim holds.
macro_rules! ensure {
    ($claim:expr, $($message:tt)+) => {
        if !$claim {
            return Err(format!($($message)+).into());
        }
    };
}

mod service;
mod server;
mod bank;
mod http;
#[cfg(feature = "metrics")]
mod metrics;
mod process;
mod demo;

type Result<T, E = Box<dyn Error + Send + Sync>> = std::result::Result<T, E>;

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let ended = match words.as_slice() {
        [] => demo::play().await,
        ["serve", address] => server::serve(address).await,
        _ => Err("usage: web_app [serve ADDRESS]".into()),
    };
    let Err(error) = ended else { return ExitCode::SUCCESS };
    eprintln!("web_app: {error}");
    let mut cause = error.source();
    while let Some(error) = cause {
        eprintln!("  because: {error}");
        cause = error.source();
    }
    ExitCode::FAILURE
}
