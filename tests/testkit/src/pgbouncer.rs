//! A PgBouncer in front of a server, which ends with the test process.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use nix::sys::signal::Signal;
use sqlx::postgres::PgConnectOptions;

use crate::daemon::Daemon;
use crate::server::Server;
use crate::skip::program;

/// The port, which is only a part of the name of the socket. The socket is in a directory of its own.
const PORT: u16 = 6432;

/// A PgBouncer in front of a server, which ends with the test process.
///
/// Each has an address of its own, which was not used before. It listens on a unix socket,
/// and admits every client to every database as `postgres`.
///
/// # Drop
///
/// Stops the PgBouncer and removes its directory. If the test process ends without this drop, even by SIGKILL, a
/// watchdog does the same.
#[derive(Debug)]
pub struct PgBouncer {
    program: PathBuf,
    daemon: Daemon,
}

impl PgBouncer {
    /// Starts a PgBouncer in front of `server`, with these settings of `pgbouncer.ini`.
    ///
    /// Returns `None` and skips the test if there is no PgBouncer on this machine. Panics with the reason if the
    /// PgBouncer does not start.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use pglock_testkit::{PgBouncer, Server};
    ///
    /// let server = Server::start();
    /// let settings = [("pool_mode", "transaction")];
    /// let Some(pooler) = PgBouncer::start(&server, &settings) else { return };
    /// # let _ = pooler.connect_options();
    /// ```
    pub fn start(server: &Server, settings: &[(&str, &str)]) -> Option<Self> {
        Self::in_front_of(server.socket_dir(), server.port(), settings)
    }

    /// Returns the path of the program. Returns `None` and skips the test if there is none on this machine.
    pub fn find() -> Option<PathBuf> {
        program("pgbouncer", "pgbouncer")
    }

    /// Starts a PgBouncer in front of the server whose socket is in the directory `server`.
    pub(crate) fn in_front_of(server: &Path, port: u16, settings: &[(&str, &str)]) -> Option<Self> {
        match Self::launch(Self::find()?, server, port, settings) {
            Ok(pooler) => Some(pooler),
            Err(reason) => panic!("{reason}"),
        }
    }

    /// Returns the options to connect to the server's database `postgres`, through the PgBouncer.
    pub fn connect_options(&self) -> PgConnectOptions {
        PgConnectOptions::new_without_pgpass()
            .socket(self.daemon.dir())
            .port(PORT)
            .username("postgres")
            .database("postgres")
    }

    /// Returns all that the PgBouncer has logged so far.
    pub fn log(&self) -> String {
        self.daemon.log()
    }

    /// Kills the PgBouncer, and starts it again at the same address.
    pub fn restart(&mut self) {
        self.daemon.stop(Signal::SIGKILL);
        if let Err(reason) = self.run() {
            panic!("{reason}");
        }
    }

    fn launch(
        program: PathBuf,
        server: &Path,
        port: u16,
        settings: &[(&str, &str)],
    ) -> Result<Self, String> {
        // A PgBouncer has nothing to clean up, and ignores SIGQUIT if the parent of the test process does.
        let daemon = Daemon::place("pgbouncer", "KILL")?;
        daemon.write("pgbouncer.ini", &ini(server, port, &daemon, settings))?;
        let mut pooler = Self { program, daemon };
        pooler.run()?;
        Ok(pooler)
    }

    /// Starts the program, and waits until it accepts clients.
    fn run(&mut self) -> Result<(), String> {
        let mut command = self.daemon.command(&self.program);
        command.arg(self.daemon.dir().join("pgbouncer.ini"));
        self.daemon.run(command, &format!(".s.PGSQL.{PORT}"))
    }
}

/// Returns the content of `pgbouncer.ini`. The last of two lines for one setting counts.
fn ini(server: &Path, port: u16, daemon: &Daemon, settings: &[(&str, &str)]) -> String {
    let host = server.display();
    let port_of_ours = PORT.to_string();
    let (dir, pidfile) = (daemon.dir().display().to_string(), daemon.pid_file());
    let pidfile = pidfile.display().to_string();
    let usual = [
        ("listen_addr", ""),
        ("listen_port", &port_of_ours),
        ("unix_socket_dir", &dir),
        ("pidfile", &pidfile),
        ("auth_type", "any"),
        // sqlx sends this parameter, and PgBouncer refuses parameters that it does not know.
        ("ignore_startup_parameters", "extra_float_digits"),
    ];
    let mut ini =
        format!("[databases]\n* = host={host} port={port} user=postgres\n\n[pgbouncer]\n");
    for (name, value) in usual.iter().chain(settings) {
        writeln!(ini, "{name} = {value}").expect("a string takes what is written");
    }
    ini
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn the_watchdog_can_find_one_that_is_started() {
        let server = Server::shared();
        for _ in 0..10 {
            let Some(pooler) = PgBouncer::start(server, &[]) else { return };
            let pid = fs::read_to_string(pooler.daemon.pid_file()).unwrap();
            assert_eq!(pid.trim(), pooler.daemon.pid().to_string());
        }
    }

    #[test]
    fn a_process_that_does_not_start_reports_why() {
        let Some(program) = PgBouncer::find() else { return };
        let settings = [("pool_mode", "no such mode")];
        let reason = PgBouncer::launch(program, Path::new("/"), 1, &settings).unwrap_err();
        assert!(reason.contains("pgbouncer does not start:") && reason.contains("no such mode"));
    }
}
