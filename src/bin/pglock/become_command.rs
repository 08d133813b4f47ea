//! The last step before a command runs: the process asks the kernel to kill it when its parent dies, and becomes the
//! command.
//!
//! Only the process itself can ask for that, between fork and exec, where no safe Rust code may run. So this
//! program is run once more, and replaces itself with the command, which keeps the setting.

use std::ffi::OsString;
use std::io;
use std::os::unix::process::{CommandExt, parent_id};
use std::path::Path;
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

/// Returns the process that the calling thread has to spawn to run `command` as its child.
pub(crate) fn of(command: &[OsString]) -> Command {
    // This path is still this program if another version was installed in its place.
    let mut this = Command::new("/proc/self/exe");
    this.arg0("pglock").arg("become").arg("--parent").arg(process::id().to_string());
    this.arg("--").args(command);
    this
}

/// Becomes the command. Returns only if that fails.
pub(crate) fn run(args: &BecomeArgs) -> Exit {
    #[cfg(target_os = "linux")]
    if let Err(error) = nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL) {
        say(format_args!("the command will continue if pglock is killed: {error}"));
    }
    // The parent may have died before the setting was made.
    if parent_id() != args.parent {
        return Exit::Code(126);
    }
    let Some((program, arguments)) = args.command.split_first() else { return Exit::Code(126) };
    let error = Command::new(program).args(arguments).exec();
    cannot_run(program, &error)
}

/// Reports a command that can't be run. Returns the exit code that a shell uses for that.
pub(crate) fn cannot_run(program: &OsString, error: &io::Error) -> Exit {
    let is_missing = error.kind() == io::ErrorKind::NotFound;
    let program = Path::new(program);
    if is_missing && program.components().count() == 1 {
        say(format_args!("{}: command not found", program.display()));
    } else {
        say(format_args!("cannot run {}: {error}", program.display()));
    }
    Exit::Code(if is_missing { 127 } else { 126 })
}
