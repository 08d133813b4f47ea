//! The program `pglock`: locks for a shell.
//!
//! Each command has a file of its own; code that several commands share is in separate files. The program accesses
//! PostgreSQL's locks only through the library.

mod args;
mod run;
mod acquire;
mod elect;
mod observe;
mod ready;
mod ls;
mod watch;
mod who;
mod kill;
mod key;
mod doctor;
mod completions;
mod database;
mod connection;
mod child;
mod guardian;
mod jobs;
mod descendants;
mod become_command;
mod signals;
mod target;
mod show;
mod known;
mod tree;
mod table;
mod log;
mod exit;

use std::process::ExitCode;

use clap::Parser;
use tokio::runtime::Builder;

use args::{Cli, Command};
use exit::{Exit, Failure};

fn main() -> ExitCode {
    let cli = Cli::parse();
    log::start(cli.verbose);
    // Uses a current-thread runtime, because the kernel kills a child with `PR_SET_PDEATHSIG` when the thread that
    // created it exits.
    let runtime = match Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return Exit::from(Failure::System("cannot start", error)).leave(),
    };
    let ended = runtime.block_on(start(cli));
    // Does not wait for a name server that does not answer.
    runtime.shutdown_background();
    ended.unwrap_or_else(Exit::from).leave()
}

async fn start(Cli { database, command, .. }: Cli) -> Result<Exit, Failure> {
    match command {
        Command::Run(args) => run::run(args, database).await,
        Command::Elect(args) => elect::run(args, database).await,
        Command::Ls(args) => ls::run(args, database).await,
        Command::Who(args) => who::run(args, database).await,
        Command::Kill(args) => kill::run(args, database).await,
        Command::Key(args) => key::run(&args),
        Command::Doctor(args) => doctor::run(&args, database).await,
        Command::Completions(args) => completions::completions(&args),
        Command::Man(args) => completions::man(&args),
        Command::Become(args) => Ok(become_command::run(&args)),
        Command::Guardian(args) => guardian::run(args).await,
    }
}
