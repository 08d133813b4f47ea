//! A pgpool-II in front of a primary and its hot standby, started by us and gone with us.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use sqlx::postgres::PgConnectOptions;

use crate::daemon::Daemon;
use crate::server::Server;
use crate::skip::program;

/// A part of the socket's name, in a directory of its own.
const PORT: u16 = 9999;

const CONF: &str = "pgpool.conf";

/// A pgpool-II in front of a primary and its hot standby, started by us and gone with us.
///
/// It is reached through a unix socket, and lets every client in to every database as the servers do. With its usual
/// settings, load balancing on among them, it sends to the standby what it takes for a query: the primary has no
/// weight.
///
/// # Drop
///
/// Stops it and removes its directory. The same happens, by way of a watchdog, when this process ends
/// in any other manner, SIGKILL included.
#[derive(Debug)]
pub struct Pgpool {
    daemon: Daemon,
}

impl Pgpool {
    /// Starts a pgpool-II in front of two servers, with these settings of `pgpool.conf`.
    ///
    /// `None`, and the test is skipped, if there is no pgpool-II on this machine. Panics, saying why, if
    /// it does not start.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use pglock_testkit::{Pgpool, Server};
    ///
    /// let (primary, standby) = Server::options().start_with_standby();
    /// let settings = [("load_balance_mode", "off")];
    /// let Some(pooler) = Pgpool::start(&primary, &standby, &settings) else { return };
    /// # let _ = pooler.connect_options();
    /// ```
    pub fn start(primary: &Server, standby: &Server, settings: &[(&str, &str)]) -> Option<Self> {
        match Self::launch(&Self::find()?, [primary, standby], settings) {
            Ok(pooler) => Some(pooler),
            Err(reason) => panic!("{reason}"),
        }
    }

    /// Returns the program. `None`, and the test is skipped, if there is none on this machine.
    pub fn find() -> Option<PathBuf> {
        program("pgpool", "pgpool2")
    }

    /// How to connect to the database `postgres`, through the pgpool-II.
    pub fn connect_options(&self) -> PgConnectOptions {
        PgConnectOptions::new_without_pgpass()
            .socket(self.daemon.dir())
            .port(PORT)
            .username("postgres")
            .database("postgres")
    }

    /// All that it has logged so far: among the rest, to which node each statement went.
    pub fn log(&self) -> String {
        self.daemon.log()
    }

    fn launch(
        program: &Path,
        servers: [&Server; 2],
        settings: &[(&str, &str)],
    ) -> Result<Self, String> {
        // It ends its children, and gives back its shared memory.
        let mut daemon = Daemon::place("pgpool", "QUIT")?;
        let conf = daemon.write(CONF, &conf(&daemon, servers, settings))?;
        // Files that are not there, in which it would look for passwords.
        let (pcp, hba) = (daemon.dir().join("pcp.conf"), daemon.dir().join("pool_hba.conf"));
        let mut command = daemon.command(program);
        command.arg("-n").arg("-f").arg(conf).arg("-F").arg(pcp).arg("-a").arg(hba);
        daemon.run(command, &format!(".s.PGSQL.{PORT}"))?;
        Ok(Self { daemon })
    }
}

/// The content of `pgpool.conf`. The last of two lines for one setting counts.
fn conf(daemon: &Daemon, servers: [&Server; 2], settings: &[(&str, &str)]) -> String {
    let (dir, pid_file) = (daemon.dir().display().to_string(), daemon.pid_file());
    let (pid_file, port) = (pid_file.display().to_string(), PORT.to_string());
    let usual = [
        ("backend_clustering_mode", "streaming_replication"),
        ("listen_addresses", ""),
        ("pcp_listen_addresses", ""),
        ("unix_socket_directories", &dir),
        // The same before pgpool-II 4.4.
        ("socket_dir", &dir),
        ("pcp_socket_dir", &dir),
        ("port", &port),
        ("pid_file_name", &pid_file),
        ("logdir", &dir),
        ("work_dir", &dir),
        ("num_init_children", "24"),
        ("sr_check_user", "postgres"),
        // It reserves the memory, although its cache is off.
        ("memqcache_total_size", "1MB"),
        ("log_per_node_statement", "on"),
        ("backend_weight0", "0"),
        ("backend_weight1", "1"),
    ];
    let mut conf = String::new();
    let mut set = |name: &str, value: &str| {
        writeln!(conf, "{name} = '{value}'").expect("a string takes what is written");
    };
    for (number, server) in servers.into_iter().enumerate() {
        set(&format!("backend_hostname{number}"), &server.socket_dir().display().to_string());
        set(&format!("backend_port{number}"), &server.port().to_string());
        set(&format!("backend_data_directory{number}"), &server.data_dir().display().to_string());
    }
    for (name, value) in usual.iter().chain(settings) {
        set(name, value);
    }
    conf
}
