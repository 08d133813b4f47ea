//! `pglock who`: who holds one lock.

use clap::Args;
use pglock::{Key, inspect};

use crate::connect::{connect, disconnect};
use crate::exit::{Exit, Failure, say};
use crate::show;
use crate::table;
use crate::target::Target;

/// Show who holds a lock, and who waits for it
///
/// Of a semaphore, its permits. The exit code is 0 if the lock is held, and 1 if it is free.
#[derive(Args, Debug)]
#[command(after_long_help = show::JSON)]
pub(crate) struct WhoArgs {
    /// Print JSON
    #[arg(long)]
    json: bool,

    /// Print nothing; the exit code says it
    #[arg(short, long, conflicts_with = "json")]
    quiet: bool,

    /// What is locked: a number, a pair like 1,2, or a name
    #[arg(allow_negative_numbers = true)]
    key: Target,
}

/// The lock is free.
const FREE: Exit = Exit::Code(1);

pub(crate) async fn run(args: WhoArgs, url: Option<&str>) -> Result<Exit, Failure> {
    let pool = connect(url).await?;
    let Target { key, text } = args.key;
    let mut locks = inspect::locks(&pool).await.map_err(Failure::Inspect)?;
    disconnect(pool).await;
    inspect::name_keys(&mut locks, [&key]);
    // What has a name now is of the key, or of its semaphore.
    locks.retain(|lock| lock.key == key || lock.key.name().is_some());
    let held = locks.iter().any(|lock| lock.held);
    if args.json {
        show::print(&format!("{:#}\n", show::json(&locks)))?;
    } else if !args.quiet && locks.is_empty() {
        say(format_args!("nobody holds {}", shown(&key, &text)));
    } else if !args.quiet {
        show::print(&show::table(&locks, table::width()))?;
    }
    Ok(if held { Exit::FINE } else { FREE })
}

/// The key as it was written, and as the number that it is, if that looks different.
fn shown(key: &Key, text: &str) -> String {
    let number = show::written(key);
    if number == text { number } else { format!("{text:?} ({number})") }
}
