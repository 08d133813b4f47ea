//! The program `pglock`: locks for a shell.
//!
//! One file per command; what several need is in files of its own. All that it knows of PostgreSQL, it
//! knows from the library.

mod args;
mod run;
mod elect;
mod ls;
mod who;
mod kill;
mod key;
mod doctor;
mod completions;
mod connect;
mod child;
mod become_command;
mod signals;
mod target;
mod show;
mod tree;
mod table;
mod exit;

use std::process::ExitCode;

use clap::Parser;
use tokio::runtime::Builder;

use args::{Cli, Command};
use exit::{Exit, Failure};

fn main() -> ExitCode {
    let Cli { url, command } = Cli::parse();
    // On this thread, for a child that is to end with its parent ends with the thread that made it.
    let runtime = match Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return Exit::from(Failure::System("cannot start", error)).leave(),
    };
    // An empty DATABASE_URL is none.
    let url = url.as_deref().filter(|url| !url.is_empty());
    let ended = runtime.block_on(async {
        match command {
            Command::Run(args) => run::run(args, url).await,
            Command::Elect(args) => elect::run(args, url).await,
            Command::Ls(args) => ls::run(args, url).await,
            Command::Who(args) => who::run(args, url).await,
            Command::Kill(args) => kill::run(args, url).await,
            Command::Key(args) => key::run(&args),
            Command::Doctor(args) => doctor::run(&args, url).await,
            Command::Completions(args) => completions::completions(&args),
            Command::Man(args) => completions::man(&args),
            Command::Become(args) => Ok(become_command::run(&args)),
        }
    });
    ended.unwrap_or_else(Exit::from).leave()
}
