//! `pglock ls`: who holds and who waits.

use std::io::{IsTerminal, stdout};
use std::time::Duration;

use clap::Args;
use pglock::inspect;
use tokio::time::sleep;

use crate::connect::{connect, disconnect};
use crate::exit::{Exit, Failure, say};
use crate::show::{self, Names};
use crate::table;

/// List who holds and who waits for the advisory locks of the database
///
/// Those of all programs, not only of pglock. Waiters are below those that they wait for. STATE is what
/// the session does, and since when; SESSION is its age. PostgreSQL does not know since when a lock is
/// held, only that its session is no younger.
#[derive(Args, Debug)]
#[command(after_long_help = show::JSON)]
pub(crate) struct LsArgs {
    /// Go on, and show it again each so many seconds; with --json, a line each
    #[arg(short, long, value_name = "SECONDS", num_args = 0..=1, require_equals = true)]
    #[arg(default_missing_value = "1", value_parser = clap::value_parser!(u16).range(1..))]
    watch: Option<u16>,

    /// Print JSON
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    names: Names,
}

/// Moves to the upper left, and clears from there to the end.
const CLEAR: &str = "\x1b[H\x1b[J";

pub(crate) async fn run(args: LsArgs, url: Option<&str>) -> Result<Exit, Failure> {
    let pool = connect(url).await?;
    let clear = if stdout().is_terminal() && !args.json { CLEAR } else { "" };
    loop {
        let mut locks = inspect::locks(&pool).await.map_err(Failure::Inspect)?;
        inspect::name_keys(&mut locks, args.names.keys());
        let Some(watch) = args.watch else {
            let text = if args.json {
                format!("{:#}\n", show::json(&locks))
            } else if locks.is_empty() {
                say(format_args!("no advisory lock of this database is held or waited for"));
                String::new()
            } else {
                show::table(&locks, table::width())
            };
            show::print(&text)?;
            disconnect(pool).await;
            return Ok(Exit::FINE);
        };
        let text = if args.json {
            format!("{}\n", show::json(&locks))
        } else {
            format!("{clear}{}\n", show::table(&locks, table::width()))
        };
        if !show::print(&text)? {
            return Ok(Exit::FINE);
        }
        sleep(Duration::from_secs(watch.into())).await;
    }
}
