//! The options with which a server is started.

use std::fmt::Write;
use std::net::TcpListener;
use std::process;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::server::Server;

/// The default settings. They are fast, because no data need to survive a power cut.
const SETTINGS: [(&str, &str); 12] = [
    // For tests that replace a function of the server. Before PostgreSQL 13, it can be set only at the start.
    ("allow_system_table_mods", "on"),
    ("fsync", "off"),
    ("synchronous_commit", "off"),
    ("full_page_writes", "off"),
    ("autovacuum", "off"),
    ("jit", "off"),
    ("wal_level", "minimal"),
    ("max_wal_senders", "0"),
    ("shared_buffers", "16MB"),
    ("max_connections", "500"),
    ("logging_collector", "off"),
    // Dynamic shared memory is in the data directory, so that nothing is left of it if the server is killed.
    ("dynamic_shared_memory_type", "mmap"),
];

/// The options with which a server is started. Made by [`Server::options`].
#[derive(Clone, Debug, Default)]
#[must_use = "nothing runs until `start`"]
pub struct ServerOptions {
    settings: Vec<(String, String)>,
    pub(crate) env: Vec<(String, String)>,
    hba: Vec<String>,
    pub(crate) listen: Option<String>,
}

impl ServerOptions {
    /// Listens on 127.0.0.1 too, on a free port.
    pub fn tcp(self) -> Self {
        self.listen("127.0.0.1")
    }

    /// Listens on `address` too, on a free port. Clients from everywhere are let in.
    pub fn listen(mut self, address: &str) -> Self {
        self.listen = Some(address.to_owned());
        self
    }

    /// Sets a parameter of `postgresql.conf`.
    pub fn setting(mut self, name: &str, value: &str) -> Self {
        self.settings.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Sets an environment variable of the server.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Adds a line to `pg_hba.conf`. The first call replaces the default, which trusts all clients. On the unix
    /// socket, clients that no line matches are still trusted, for [`Server::connect_options`].
    pub fn hba(mut self, line: &str) -> Self {
        self.hba.push(line.to_owned());
        self
    }

    /// Starts the server. Panics with the reason if that fails.
    pub fn start(self) -> Server {
        match Server::launch(&self) {
            Ok(server) => server,
            Err(reason) => panic!("{reason}"),
        }
    }

    /// Starts the server as a primary, and then a hot standby that follows it. Returns them in this order.
    ///
    /// Panics with the reason if that fails.
    pub fn start_with_standby(self) -> (Server, Server) {
        let options = self.setting("wal_level", "replica").setting("max_wal_senders", "2");
        let primary = options.clone().start();
        match primary.launch_standby(&options) {
            Ok(standby) => (primary, standby),
            Err(reason) => panic!("{reason}"),
        }
    }

    pub(crate) fn port(&self) -> Result<u16, String> {
        static NEXT: AtomicU32 = AtomicU32::new(0);

        // Without TCP the port is only a part of the socket's name.
        let Some(address) = &self.listen else { return Ok(5432) };
        // The port is below the range of outgoing connections, one of which could take it during a
        // restart. Each process starts at a place of its own, so that processes seldom collide.
        for _ in 0..1000 {
            let step = NEXT.fetch_add(1, Ordering::Relaxed).wrapping_mul(37);
            let port = 10_240 + process::id().wrapping_mul(101).wrapping_add(step) % 22_000;
            let port = u16::try_from(port).expect("below 32240");
            if TcpListener::bind((address.as_str(), port)).is_ok() {
                return Ok(port);
            }
        }
        Err(format!("no free port on {address}"))
    }

    /// Returns the lines to add to `postgresql.conf`. The last of two lines for one parameter counts.
    pub(crate) fn postgresql_conf(&self, socket_dir: &str, port: u16) -> String {
        let port = port.to_string();
        let listen = self.listen.as_deref().unwrap_or_default();
        let places = [
            ("unix_socket_directories", socket_dir),
            ("listen_addresses", listen),
            ("port", &port),
        ];
        let asked = self.settings.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        let mut conf = String::new();
        for (name, value) in SETTINGS.into_iter().chain(places).chain(asked) {
            let value = value.replace('\'', "''");
            writeln!(conf, "{name} = '{value}'").expect("a string takes what is written");
        }
        conf
    }

    pub(crate) fn pg_hba_conf(&self) -> String {
        let mut lines = self.hba.clone();
        if lines.is_empty() {
            lines.push("host all all all trust".to_owned());
        }
        lines.push("local all all trust".to_owned());
        lines.push("local replication all trust\n".to_owned());
        lines.join("\n")
    }
}
