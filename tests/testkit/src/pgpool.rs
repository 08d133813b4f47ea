//! A pgpool-II in front of a primary and its hot standby, which ends with the test process.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use sqlx::postgres::PgConnectOptions;

use crate::daemon::Daemon;
use crate::server::Server;
use crate::skip::program;

/// The port, which is only a part of the name of the socket. The socket is in a directory of its own.
const PORT: u16 = 9999;

const CONF: &str = "pgpool.conf";

/// A pgpool-II in front of a primary and its hot standby, which ends with the test process.
///
/// It listens on a unix socket, and admits every client to every database, as the servers do. With its usual settings,
/// which include load balancing, it sends statements that it takes for queries to the standby, because the primary has
/// no weight.
///
/// # Drop
///
/// Stops the pgpool-II and removes its directory. If the test process ends without this drop, even by SIGKILL, a
/// watchdog does the same.
#[derive(Debug)]
pub struct Pgpool {
    daemon: Daemon,
}

impl Pgpool {
    /// Starts a pgpool-II in front of two servers, with these settings of `pgpool.conf`.
    ///
    /// Returns `None` and skips the test if there is no pgpool-II on this machine. Panics with the reason if the
    /// pgpool-II does not start.
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

    /// Returns the path of the program. Returns `None` and skips the test if there is none on this machine.
    pub fn find() -> Option<PathBuf> {
        program("pgpool", "pgpool2")
    }

    /// Returns the options to connect to the database `postgres`, through the pgpool-II.
    pub fn connect_options(&self) -> PgConnectOptions {
        PgConnectOptions::new_without_pgpass()
            .socket(self.daemon.dir())
            .port(PORT)
            .username("postgres")
            .database("postgres")
    }

    /// Returns all that the pgpool-II has logged so far, which includes the node that each statement went to.
    pub fn log(&self) -> String {
        self.daemon.log()
    }

    fn launch(
        program: &Path,
        servers: [&Server; 2],
        settings: &[(&str, &str)],
    ) -> Result<Self, String> {
        // After this signal, pgpool-II ends its children, and frees its shared memory.
        let mut daemon = Daemon::place("pgpool", "QUIT")?;
        let conf = daemon.write(CONF, &conf(&daemon, servers, settings))?;
        // pgpool-II would look for passwords in these files, which do not exist.
        let (pcp, hba) = (daemon.dir().join("pcp.conf"), daemon.dir().join("pool_hba.conf"));
        let mut command = daemon.command(program);
        command.arg("-n").arg("-f").arg(conf).arg("-F").arg(pcp).arg("-a").arg(hba);
        daemon.run(command, &format!(".s.PGSQL.{PORT}"))?;
        Ok(Self { daemon })
    }
}

/// Returns the content of `pgpool.conf`. The last of two lines for one setting counts.
fn conf(daemon: &Daemon, servers: [&Server; 2], settings: &[(&str, &str)]) -> String {
    let (dir, pid_file) = (daemon.dir().display().to_string(), daemon.pid_file());
    let (pid_file, port) = (pid_file.display().to_string(), PORT.to_string());
    let usual = [
        ("backend_clustering_mode", "streaming_replication"),
        ("listen_addresses", ""),
        ("pcp_listen_addresses", ""),
        ("unix_socket_directories", &dir),
        // The name of that setting before pgpool-II 4.4.
        ("socket_dir", &dir),
        ("pcp_socket_dir", &dir),
        ("port", &port),
        ("pid_file_name", &pid_file),
        ("logdir", &dir),
        ("work_dir", &dir),
        ("num_init_children", "24"),
        ("sr_check_user", "postgres"),
        // pgpool-II reserves this memory, although its cache is off.
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
