//! `pglock completions` and `pglock man`: print the files that a package installs beside the program.

use clap::{Args, CommandFactory};
use clap_complete::{Shell, generate};
use clap_mangen::Man;

use crate::args::Cli;
use crate::exit::{Exit, Failure, print, say};

/// Print a script that lets a shell complete the words of a command
///
/// For bash, in ~/.bashrc: source <(pglock completions bash)
#[derive(Args, Debug)]
pub(crate) struct CompletionsArgs {
    /// The shell
    shell: Shell,
}

pub(crate) fn completions(args: &CompletionsArgs) -> Result<Exit, Failure> {
    let mut script = Vec::new();
    generate(args.shell, &mut Cli::command(), "pglock", &mut script);
    print(&script)?;
    Ok(Exit::FINE)
}

/// Print the manual page of pglock, or of one of its commands
///
/// To read one: pglock man run | man -l -
#[derive(Args, Debug)]
pub(crate) struct ManArgs {
    /// The command; without one, pglock as a whole
    command: Option<String>,
}

pub(crate) fn man(args: &ManArgs) -> Result<Exit, Failure> {
    let mut command = Cli::command();
    command.build();
    if let Some(name) = &args.command {
        let Some(found) = command.find_subcommand(name) else {
            say(format_args!("there is no command {name}; see pglock --help"));
            return Ok(Exit::USAGE);
        };
        command = found.clone();
    }
    let mut page = Vec::new();
    let rendered = Man::new(command).render(&mut page);
    rendered.map_err(|error| Failure::System("cannot write the page", error))?;
    print(&page)?;
    Ok(Exit::FINE)
}
