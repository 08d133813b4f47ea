//! The account that the server runs as: that of the test process, or an unprivileged one if that is root.

use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::{env, io};

use nix::unistd::{Uid, User, getegid, geteuid};

/// The accounts that may stand in for root, which `initdb` and `postgres` refuse.
const STAND_INS: [&str; 3] = ["postgres", "nobody", "daemon"];

#[derive(Clone, Copy, Debug)]
pub(crate) struct Account {
    uid: u32,
    gid: u32,
    /// Whether this is another account than that of the test process.
    other: bool,
}

impl Account {
    pub(crate) fn for_server() -> Result<Self, String> {
        if !geteuid().is_root() {
            return Ok(Self { uid: geteuid().as_raw(), gid: getegid().as_raw(), other: false });
        }
        let user = STAND_INS
            .iter()
            .filter_map(|name| User::from_name(name).ok().flatten())
            .find(|user| user.uid != Uid::from_raw(0))
            .ok_or_else(|| {
                format!(
                    "PostgreSQL refuses to run as root, and there is none of the accounts {}",
                    STAND_INS.join(", ")
                )
            })?;
        Ok(Self { uid: user.uid.as_raw(), gid: user.gid.as_raw(), other: true })
    }

    pub(crate) fn uid(&self) -> u32 {
        self.uid
    }

    /// Returns a command that runs as this account, without the directory, locale and `PG*` variables of the caller.
    pub(crate) fn command(&self, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new(program.as_ref());
        command.current_dir("/").env("LC_ALL", "C").env("TZ", "UTC").stdin(Stdio::null());
        for (name, _) in env::vars_os() {
            if name.as_encoded_bytes().starts_with(b"PG") {
                command.env_remove(name);
            }
        }
        if self.other {
            command.uid(self.uid).gid(self.gid);
        }
        command
    }

    /// Makes `path` belong to this account.
    pub(crate) fn own(&self, path: &Path) -> io::Result<()> {
        if self.other { chown(path, Some(self.uid), Some(self.gid)) } else { Ok(()) }
    }
}

/// Runs `command` to its end, and returns its output. An error contains the name of the program and what it printed.
pub(crate) fn run(command: &mut Command) -> Result<String, String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|error| format!("{name} does not run: {error}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let printed = String::from_utf8_lossy(&output.stderr);
    Err(format!("{name} failed ({}): {}", output.status, printed.trim()))
}
