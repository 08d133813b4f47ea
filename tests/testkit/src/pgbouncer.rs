//! A PgBouncer in front of a server, started by us and gone with us.

use std::fmt::Write;
use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::thread::sleep;
use std::time::{Duration, Instant};

use sqlx::postgres::PgConnectOptions;

use crate::account::Account;
use crate::data::{make_dir, write_settings};
use crate::server::Server;
use crate::skip::program;
use crate::watchdog::Watchdog;

/// A part of the socket's name, in a directory of its own.
const PORT: u16 = 6432;

const PID_FILE: &str = "pgbouncer.pid";

/// A PgBouncer in front of a server, started by us and gone with us.
///
/// Each has an address of its own, which was not used before. It is reached through a unix socket,
/// and lets every client in to every database as `postgres`.
///
/// # Drop
///
/// Stops it and removes its directory. The same happens, by way of a watchdog, when this process ends
/// in any other manner, SIGKILL included.
#[derive(Debug)]
pub struct PgBouncer {
    account: Account,
    dir: PathBuf,
    watchdog: Watchdog,
    process: Option<Child>,
}

impl PgBouncer {
    /// Starts a PgBouncer in front of `server`, with these settings of `pgbouncer.ini`.
    ///
    /// `None`, and the test is skipped, if there is no PgBouncer on this machine. Panics, saying why, if
    /// it does not start.
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

    /// Returns the program. `None`, and the test is skipped, if there is none on this machine.
    pub fn find() -> Option<PathBuf> {
        program("pgbouncer", "pgbouncer")
    }

    /// Starts a PgBouncer in front of the server whose socket is there.
    pub(crate) fn in_front_of(server: &Path, port: u16, settings: &[(&str, &str)]) -> Option<Self> {
        match Self::launch(Self::find()?, server, port, settings) {
            Ok(pooler) => Some(pooler),
            Err(reason) => panic!("{reason}"),
        }
    }

    /// How to connect to the server's database `postgres`, through the PgBouncer.
    pub fn connect_options(&self) -> PgConnectOptions {
        PgConnectOptions::new_without_pgpass()
            .socket(&self.dir)
            .port(PORT)
            .username("postgres")
            .database("postgres")
    }

    /// All that it has logged so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.join("log")).expect("the log is readable")
    }

    fn launch(
        program: PathBuf,
        server: &Path,
        port: u16,
        settings: &[(&str, &str)],
    ) -> Result<Self, String> {
        let account = Account::for_server()?;
        let dir = make_dir(&account)?;
        // It has nothing to tidy, and ignores SIGQUIT if the process that started us does.
        let watchdog = Watchdog::over(&dir, PID_FILE, "KILL");
        let watchdog = watchdog.inspect_err(|_| drop(fs::remove_dir(&dir)))?;
        let mut pooler = Self { account, dir, watchdog, process: None };
        let ini = ini(server, port, &pooler.dir.display().to_string(), settings);
        pooler.run(program, &ini)?;
        Ok(pooler)
    }

    /// Runs it until it takes clients.
    fn run(&mut self, program: PathBuf, ini: &str) -> Result<(), String> {
        let path = self.dir.join("pgbouncer.ini");
        write_settings(&self.account, &path, ini)?;
        let log = File::create(self.dir.join("log"));
        let log = log.map_err(|error| format!("cannot write the log: {error}"))?;
        let mut command = self.account.command(program);
        // In a process group of its own: Ctrl-C is not for it.
        command.arg(&path).stderr(log).process_group(0);

        self.watchdog.tell("starting")?;
        let process = command.spawn();
        let process = process.map_err(|error| format!("pgbouncer does not run: {error}"))?;
        let process = self.process.insert(process);
        let socket = self.dir.join(format!(".s.PGSQL.{PORT}"));
        // It listens before it writes the file by which the watchdog knows it.
        let pid = format!("{}\n", process.id());
        let is_known = || fs::read_to_string(self.dir.join(PID_FILE)).is_ok_and(|is| is == pid);
        let start = Instant::now();
        while UnixStream::connect(&socket).is_err() || !is_known() {
            let ended = process.try_wait().map_err(|error| error.to_string())?.is_some();
            if ended || start.elapsed() > Duration::from_mins(1) {
                return Err(format!("pgbouncer does not start:\n{}", self.log()));
            }
            sleep(Duration::from_millis(1));
        }
        self.watchdog.tell("started")
    }
}

impl Drop for PgBouncer {
    fn drop(&mut self) {
        self.watchdog.release();
        if let Some(mut process) = self.process.take() {
            // Gone already, unless the watchdog was killed.
            drop(process.kill());
            drop(process.wait());
        }
        drop(fs::remove_dir_all(&self.dir));
    }
}

/// The content of `pgbouncer.ini`. The last of two lines for one setting counts.
fn ini(server: &Path, port: u16, dir: &str, settings: &[(&str, &str)]) -> String {
    let host = server.display();
    let port_of_ours = PORT.to_string();
    let pidfile = format!("{dir}/{PID_FILE}");
    let usual = [
        ("listen_addr", ""),
        ("listen_port", &port_of_ours),
        ("unix_socket_dir", dir),
        ("pidfile", &pidfile),
        ("auth_type", "any"),
        // sqlx sends it, and PgBouncer refuses what it does not know.
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
    use super::*;

    #[test]
    fn the_watchdog_can_find_one_that_is_started() {
        let server = Server::shared();
        for _ in 0..10 {
            let Some(pooler) = PgBouncer::start(server, &[]) else { return };
            let pid = fs::read_to_string(pooler.dir.join(PID_FILE)).unwrap();
            assert_eq!(pid.trim(), pooler.process.as_ref().unwrap().id().to_string());
        }
    }

    #[test]
    fn one_that_does_not_start_says_why() {
        let Some(program) = PgBouncer::find() else { return };
        let settings = [("pool_mode", "no such mode")];
        let reason = PgBouncer::launch(program, Path::new("/"), 1, &settings).unwrap_err();
        assert!(reason.contains("pgbouncer does not start:") && reason.contains("no such mode"));
    }
}
