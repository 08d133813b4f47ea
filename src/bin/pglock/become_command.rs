//! The last step before a command runs: the process that is to become it has itself killed if its
//! parent dies.
//!
//! A parent that is killed can't tell its child, and the lock is free at once. Only the child can ask
//! the kernel for that, between fork and exec, where no code of Rust may run that is safe. So this
//! program is run once more, and replaces itself by the command, which keeps what was asked for.

use std::env;
use std::ffi::OsString;
use std::io;
use std::os::unix::process::{CommandExt, parent_id};
use std::path::PathBuf;
use std::process::{self, Command};

use clap::Args;

use crate::exit::{Exit, say};

/// Become a command that is killed if its parent dies
#[derive(Args, Debug)]
pub(crate) struct BecomeArgs {
    #[arg(long)]
    parent: u32,

    #[arg(last = true, required = true)]
    command: Vec<OsString>,
}

/// What is to be run by the thread that is to be the parent, to run `command`.
pub(crate) fn of(command: &[OsString]) -> io::Result<Command> {
    let this = if cfg!(target_os = "linux") {
        // Still this program if another was installed in its place since.
        PathBuf::from("/proc/self/exe")
    } else {
        env::current_exe()?
    };
    let mut this = Command::new(this);
    this.arg0("pglock").arg("become").arg("--parent").arg(process::id().to_string());
    this.arg("--").args(command);
    Ok(this)
}

/// Becomes the command. Returns only if that fails.
pub(crate) fn run(args: &BecomeArgs) -> Exit {
    #[cfg(target_os = "linux")]
    if let Err(error) = nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL) {
        say(format_args!("the command will go on if pglock is killed: {error}"));
    }
    // It may have died before it was asked.
    if parent_id() != args.parent {
        return Exit::Code(126);
    }
    let Some((program, arguments)) = args.command.split_first() else { return Exit::Code(126) };
    let error = Command::new(program).args(arguments).exec();
    say(format_args!("cannot run {}: {error}", program.display()));
    Exit::Code(if error.kind() == io::ErrorKind::NotFound { 127 } else { 126 })
}
