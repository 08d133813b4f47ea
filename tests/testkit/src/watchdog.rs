//! The watchdog, a shell that outlives the test process, to end the server however the test process ends.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

#[derive(Debug)]
pub(crate) struct Watchdog {
    /// Its standard input is a pipe that is closed on exec, so only this process, and no child of it, keeps it open.
    shell: Child,
}

impl Watchdog {
    /// Starts a watchdog that makes `dir`, so that the directory is removed however early this process ends. It also
    /// watches over the server in the directory, which writes its pid to `pid_file` there, and is ended by `signal`.
    pub(crate) fn over(dir: &Path, pid_file: &str, signal: &str) -> Result<Self, String> {
        let mut shell = Command::new("/bin/sh")
            .args(["-c", include_str!("watchdog.sh"), "pglock-watchdog"])
            .arg(dir)
            .args([pid_file, signal])
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            // In a process group of its own, so that Ctrl-C does not reach it.
            .process_group(0)
            .spawn()
            .map_err(|error| format!("/bin/sh does not run: {error}"))?;
        let mut said = String::new();
        let heard = shell.stdout.take().map(|stdout| BufReader::new(stdout).read_line(&mut said));
        if said == "made\n" {
            return Ok(Self { shell });
        }
        drop(shell.wait());
        Err(format!("cannot make {}: {} ({heard:?})", dir.display(), said.trim_end()))
    }

    /// Sends the state of the server to the watchdog: `starting`, or `started`.
    pub(crate) fn tell(&mut self, state: &str) -> Result<(), String> {
        let pipe = self.shell.stdin.as_mut().expect("the pipe stays open until the end");
        writeln!(pipe, "{state}").map_err(|error| format!("the watchdog is gone: {error}"))
    }

    /// Makes the watchdog stop the server and remove the directory now, and waits for it.
    pub(crate) fn release(&mut self) {
        drop(self.shell.stdin.take());
        drop(self.shell.wait());
    }
}
