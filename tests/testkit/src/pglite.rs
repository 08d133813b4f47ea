//! A PGlite that accepts clients, with one session for all of them. It ends with the test process.

use std::env;
use std::fs::{self, File};
use std::io::Error;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use sqlx::postgres::{PgConnectOptions, PgSslMode};

use crate::account::run;
use crate::daemon::Daemon;
use crate::npm::cache_dir;
use crate::skip::{program, skip};

/// The port, which is only a part of the name of the socket. The socket is in a directory of its own.
const PORT: u16 = 5432;

/// The packages, each with its version and its SHA-512.
const PACKAGES: [(&str, &str); 2] = [
    ("package.json", include_str!("pglite/package.json")),
    ("package-lock.json", include_str!("pglite/package-lock.json")),
];

/// A PGlite that accepts clients, with one session for all of them. It ends with the test process.
///
/// It comes from npm, and is kept where the packages of PostgreSQL are.
///
/// # Drop
///
/// Stops the PGlite and removes its directory. If the test process ends without this drop, even by SIGKILL, a
/// watchdog does the same.
#[derive(Debug)]
pub struct Pglite {
    daemon: Daemon,
}

impl Pglite {
    /// Starts a PGlite that accepts this number of clients at a time.
    ///
    /// Returns `None` and skips the test if there is no Node.js or npm on this machine, or no network to fetch PGlite
    /// with. Panics with the reason if the PGlite does not start.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use pglock_testkit::Pglite;
    ///
    /// let Some(server) = Pglite::start(5) else { return };
    /// # let _ = server.connect_options();
    /// ```
    pub fn start(clients: usize) -> Option<Self> {
        let (node, npm) = (program("node", "nodejs")?, program("npm", "npm")?);
        let modules = match fetch(&npm) {
            Ok(modules) => modules,
            Err(reason) => {
                let reason = reason.lines().next().unwrap_or_default();
                let reason = format!("PGlite can't be fetched: {reason}");
                return skip(&reason, "connect the machine to registry.npmjs.org");
            }
        };
        match Self::launch(&node, &modules, clients) {
            Ok(server) => Some(server),
            Err(reason) => panic!("{reason}"),
        }
    }

    /// Returns the options to connect to the database.
    pub fn connect_options(&self) -> PgConnectOptions {
        PgConnectOptions::new_without_pgpass()
            .socket(self.daemon.dir())
            .port(PORT)
            .username("postgres")
            .database("postgres")
            .ssl_mode(PgSslMode::Disable)
    }

    fn launch(node: &Path, modules: &Path, clients: usize) -> Result<Self, String> {
        let mut daemon = Daemon::place("pglite", "KILL")?;
        let script = daemon.write("serve.mjs", include_str!("pglite/serve.mjs"))?;
        // The script looks for PGlite in this directory.
        let linked = symlink(modules, daemon.dir().join("node_modules"));
        linked.map_err(|error| format!("cannot link {}: {error}", modules.display()))?;
        let socket = format!(".s.PGSQL.{PORT}");
        let mut command = daemon.command(node);
        command.arg(script).arg(daemon.dir().join(&socket)).arg(daemon.pid_file());
        command.arg(clients.to_string());
        daemon.run(command, &socket)?;
        Ok(Self { daemon })
    }
}

/// Returns the directory with the packages, which are fetched with `npm` if the cache does not have them.
fn fetch(npm: &Path) -> Result<PathBuf, String> {
    let set = |name| env::var_os(name).filter(|value| !value.is_empty());
    let cache = cache_dir(set("XDG_CACHE_HOME"), set("HOME"));
    let failed = |error: Error| format!("cannot use {}: {error}", cache.display());
    fs::create_dir_all(&cache).map_err(failed)?;
    // One process fetches at a time: the next one finds the work done.
    let lock = File::create(cache.join("pglite.lock")).map_err(failed)?;
    lock.lock().map_err(failed)?;
    let place = cache.join("pglite");
    let is_here = PACKAGES.iter().all(|(file, content)| {
        fs::read_to_string(place.join(file)).is_ok_and(|there| there == *content)
    });
    if !is_here {
        let work = cache.join("pglite.part");
        for old in [&place, &work].into_iter().filter(|old| old.exists()) {
            fs::remove_dir_all(old).map_err(failed)?;
        }
        fs::create_dir(&work).map_err(failed)?;
        for (file, content) in PACKAGES {
            fs::write(work.join(file), content).map_err(failed)?;
        }
        let mut install = Command::new(npm);
        install.args(["ci", "--ignore-scripts", "--legacy-peer-deps", "--no-audit", "--no-fund"]);
        install.args(["--loglevel=error", "--fetch-retries=1"]);
        run(install.current_dir(&work))?;
        fs::rename(&work, &place).map_err(failed)?;
    }
    Ok(place.join("node_modules"))
}
