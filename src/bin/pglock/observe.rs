//! `pglock elect --observe`: prints each change of the leader.

use std::time::SystemTime;

use clap::Args;
use pglock::{Election, Leader};
use serde_json::json;
use sqlx::PgPool;

use crate::acquire::clock;
use crate::child::start_hook;
use crate::exit::{Exit, Failure, complain, print, say};
use crate::signals::{Event, Signals};
use crate::target::Target;

/// What is done with each change of the leader.
#[derive(Args, Debug)]
pub(crate) struct ObserveArgs {
    /// With --observe: print JSON, a line each
    #[arg(long)]
    json: bool,

    /// With --observe: run this string in sh(1) after each change, and wait until it has ended
    #[arg(long, value_name = "STRING")]
    hook: Option<String>,
}

impl ObserveArgs {
    /// Returns whether one of these arguments is given. clap can't require --observe for them, because --observe
    /// conflicts with a command.
    pub(crate) fn is_given(&self) -> bool {
        self.json || self.hook.is_some()
    }
}

/// Prints each change until the program receives a signal, or the reader of standard output closes it.
pub(crate) async fn run(
    pool: &PgPool,
    signals: &mut Signals,
    key: &Target,
    args: &ObserveArgs,
) -> Result<Exit, Failure> {
    let mut observer = Election::new(pool, &key.key).observe();
    let mut failing = false;
    loop {
        let changed = tokio::select! {
            biased;
            received = signals.next() => return Ok(received.signal.into()),
            changed = observer.changed() => changed,
        };
        let leader = match changed {
            Ok(leader) => leader,
            Err(error) if error.is_transient() => {
                if !failing {
                    complain(&error);
                    say(format_args!("retrying"));
                }
                failing = true;
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        failing = false;
        let line =
            if args.json { format!("{}\n", json!(leader)) } else { as_line(leader.as_ref()) };
        if !print(line.as_bytes())? {
            return Ok(Exit::FINE);
        }
        if let Some(script) = &args.hook
            && let Some(signal) = run_hook(script, key, leader.as_ref(), signals).await
        {
            return Ok(signal);
        }
    }
}

/// Runs the hook. Returns the exit code if the program receives a signal meanwhile.
async fn run_hook(
    script: &str,
    key: &Target,
    leader: Option<&Leader>,
    signals: &mut Signals,
) -> Option<Exit> {
    let name = leader.map(|leader| leader.name.clone()).unwrap_or_default();
    let term = leader.and_then(|leader| leader.term).map(|term| term.to_string());
    let env = [
        ("PGLOCK_KEY", key.text.clone()),
        ("PGLOCK_LEADER", name),
        ("PGLOCK_TOKEN", term.unwrap_or_default()),
    ];
    let hook = start_hook(script, &env, signals)?;
    loop {
        match signals.event().await {
            Event::Ended(pid, exit) if pid == hook => {
                if !exit.is_success() {
                    say(format_args!("the hook ended with {exit}"));
                }
                return None;
            }
            Event::Received(received) => return Some(received.signal.into()),
            Event::Ended(..) | Event::NoChildren | Event::Stopped(_) | Event::UntilNow => {}
        }
    }
}

fn as_line(leader: Option<&Leader>) -> String {
    let now = clock(SystemTime::now());
    let Some(leader) = leader else { return format!("{now}  no leader\n") };
    let term = leader.term.map_or_else(|| "?".to_owned(), |term| term.to_string());
    let from = leader.client_addr.as_deref().unwrap_or("local");
    format!("{now}  {}  term {term}  {from}  pid {}\n", leader.name, leader.backend_pid)
}
