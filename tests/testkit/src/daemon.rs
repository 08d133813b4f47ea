//! A program other than a PostgreSQL server, such as a pooler, which ends with the test process.

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::account::Account;
use crate::data::{make_dir, write_settings};
use crate::process;
use crate::watchdog::Watchdog;

/// A program in a directory of its own, with the account of a server.
///
/// # Drop
///
/// Stops the program and removes its directory. If the test process ends without this drop, even by SIGKILL, a watchdog
/// does the same.
#[derive(Debug)]
pub(crate) struct Daemon {
    name: &'static str,
    account: Account,
    dir: PathBuf,
    watchdog: Watchdog,
    process: Option<Child>,
}

impl Daemon {
    /// Makes the directory. `signal` ends the program.
    pub(crate) fn place(name: &'static str, signal: &str) -> Result<Self, String> {
        let account = Account::for_server()?;
        let (dir, watchdog) = make_dir(&account, &pid_file(name), signal)?;
        Ok(Self { name, account, dir, watchdog, process: None })
    }

    /// The directory.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Returns the file that the program has to write its process ID to.
    pub(crate) fn pid_file(&self) -> PathBuf {
        self.dir.join(pid_file(self.name))
    }

    /// Returns the process ID of the program. Panics if the program does not run.
    #[cfg(test)]
    pub(crate) fn pid(&self) -> u32 {
        self.process.as_ref().expect("the program runs").id()
    }

    /// Returns all that the program has logged so far.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.dir.join("log")).expect("the log is readable")
    }

    /// Writes a file into the directory, for the program to read.
    pub(crate) fn write(&self, file: &str, content: &str) -> Result<PathBuf, String> {
        let path = self.dir.join(file);
        write_settings(&self.account, &path, content)?;
        Ok(path)
    }

    /// Returns a command that runs as the account. One of its arguments must be a file in the directory, by which the
    /// watchdog checks that a pid is still that of the program.
    pub(crate) fn command(&self, program: &Path) -> Command {
        self.account.command(program)
    }

    /// Starts a command, and waits until it accepts clients on `socket`, a file in the directory.
    pub(crate) fn run(&mut self, mut command: Command, socket: &str) -> Result<(), String> {
        let name = self.name;
        let log = File::options().create(true).append(true).open(self.dir.join("log"));
        let log = log.map_err(|error| format!("cannot write the log: {error}"))?;
        let output = log.try_clone().map_err(|error| format!("cannot write the log: {error}"))?;
        // In a process group of its own, so that Ctrl-C does not reach it.
        command.stdout(output).stderr(log).process_group(0);

        self.watchdog.tell("starting")?;
        let process = command.spawn();
        let process = process.map_err(|error| format!("{name} does not run: {error}"))?;
        let process = self.process.insert(process);
        // The watchdog reads the pid from this file.
        let pid_file = self.dir.join(pid_file(name));
        let pid = process.id().to_string();
        // pgpool-II writes a NUL after its process ID.
        let is_end = |c: char| c.is_whitespace() || c == '\0';
        let is_known =
            || fs::read_to_string(&pid_file).is_ok_and(|is| is.trim_end_matches(is_end) == pid);
        let socket = self.dir.join(socket);
        let start = Instant::now();
        while !is_known() || UnixStream::connect(&socket).is_err() {
            let ended = process.try_wait().map_err(|error| error.to_string())?.is_some();
            if ended || start.elapsed() > Duration::from_mins(1) {
                return Err(format!("{name} does not start:\n{}", self.log()));
            }
            sleep(Duration::from_millis(1));
        }
        self.watchdog.tell("started")
    }

    /// Ends the program by a signal, and waits until it has ended.
    pub(crate) fn stop(&mut self, signal: Signal) {
        let mut ended = self.process.take().expect("the program runs");
        process::signal(ended.id(), signal).expect("the program takes signals");
        process::wait_until("the program has ended", || {
            ended.try_wait().expect("a child can be waited for").is_some()
        });
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.watchdog.release();
        if let Some(mut process) = self.process.take() {
            // The process has ended already, unless the watchdog was killed.
            drop(process.kill());
            drop(process.wait());
        }
        drop(fs::remove_dir_all(&self.dir));
    }
}

fn pid_file(name: &str) -> String {
    format!("{name}.pid")
}
