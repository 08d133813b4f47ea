//! One PostgreSQL server, which ends with the test process.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;
use sqlx::postgres::{PgConnectOptions, PgSslMode};
use tokio::sync::OnceCell;

use crate::account::{Account, run};
use crate::data::{Template, make_dir, write_settings};
use crate::environment::Environment;
use crate::find::{Installation, Search};
use crate::options::ServerOptions;
use crate::process;
use crate::watchdog::Watchdog;

/// The mode in which a server shuts down.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[expect(clippy::exhaustive_enums, reason = "PostgreSQL has exactly three ways to shut down")]
pub enum Shutdown {
    /// Disconnects all clients and shuts down in order (SIGINT).
    Fast,
    /// Ends everything at once, so that the next start begins with a crash recovery (SIGQUIT).
    Immediate,
    /// Waits until the last client has disconnected (SIGTERM).
    Smart,
}

/// One PostgreSQL server, which ends with the test process.
///
/// It lives in a directory of its own, and listens on a unix socket there. The superuser is
/// `postgres`, without a password.
///
/// # Drop
///
/// Stops the server at once and removes its directory. If the test process ends without this drop, even by
/// SIGKILL, a watchdog does the same.
#[derive(Debug)]
pub struct Server {
    installation: Installation,
    account: Account,
    dir: PathBuf,
    data: PathBuf,
    port: u16,
    listen: Option<String>,
    env: Vec<(String, String)>,
    running: Mutex<Running>,
    /// The database of which those of the tests are copies, once it has been made.
    template: OnceCell<Result<String, String>>,
}

/// The state that changes when a server is stopped and started.
#[derive(Debug)]
struct Running {
    postmaster: Option<Child>,
    watchdog: Watchdog,
}

impl Server {
    /// Returns the server of this process, which the first call starts.
    pub fn shared() -> &'static Self {
        static SHARED: OnceLock<Result<Server, String>> = OnceLock::new();

        match SHARED.get_or_init(|| Self::launch(&Self::options())) {
            Ok(server) => server,
            Err(reason) => panic!("{reason}"),
        }
    }

    /// Starts a server for one test alone.
    pub fn start() -> Self {
        Self::options().start()
    }

    /// Returns the options to start a server that is not as usual.
    pub fn options() -> ServerOptions {
        Environment::current().server_options(ServerOptions::default())
    }

    /// Returns the options to connect to the database `postgres`, through the unix socket.
    pub fn connect_options(&self) -> PgConnectOptions {
        self.any_options().socket(self.socket_dir())
    }

    /// Returns the options to connect to the database `postgres` over TCP. Panics if the server does not listen on TCP.
    pub fn tcp_options(&self) -> PgConnectOptions {
        let listen = self.listen.as_deref().expect("the server was started without `.tcp()`");
        let host = match listen {
            "*" | "0.0.0.0" => "127.0.0.1",
            address => address,
        };
        self.any_options().host(host)
    }

    /// Returns the name of the database to copy for a test, which the first call prepares.
    pub(crate) async fn template(&self, environment: &Environment) -> &str {
        if environment.is_plain() {
            return "template0";
        }
        let prepare = || async {
            let prepared = environment.prepare(self.connect_options(), self.version()).await;
            prepared.map_err(|error| error.to_string())
        };
        match self.template.get_or_init(prepare).await {
            Ok(template) => template,
            Err(error) => panic!("cannot prepare the environment {}: {error}", environment.name),
        }
    }

    fn any_options(&self) -> PgConnectOptions {
        // Everything is set here, so `PGHOST` and similar variables have no effect.
        PgConnectOptions::new_without_pgpass()
            .host("localhost")
            .port(self.port)
            .username("postgres")
            .password("")
            .database("postgres")
            .ssl_mode(PgSslMode::Disable)
    }

    /// Returns the port. Without TCP, it is only a part of the socket's name.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The directory of the unix socket.
    pub fn socket_dir(&self) -> &Path {
        &self.dir
    }

    /// The directory of the cluster.
    pub fn data_dir(&self) -> &Path {
        &self.data
    }

    /// The directory of the server's programs.
    pub fn bin_dir(&self) -> &Path {
        &self.installation.bin
    }

    /// The major version.
    pub fn version(&self) -> u32 {
        self.installation.major
    }

    /// Returns the pid of the postmaster, the parent of all other processes of this server. Panics if it is not
    /// running.
    pub fn postmaster_pid(&self) -> u32 {
        self.running().pid()
    }

    /// Shuts down the server, and waits until it has ended.
    ///
    /// Panics after a minute, because a smart shutdown never ends while a client stays connected.
    pub fn stop(&self, how: Shutdown) {
        let signal = match how {
            Shutdown::Fast => Signal::SIGINT,
            Shutdown::Immediate => Signal::SIGQUIT,
            Shutdown::Smart => Signal::SIGTERM,
        };
        let mut running = self.running();
        process::signal(running.pid(), signal).expect("the postmaster takes signals");
        process::wait_until("the server has shut down", || running.has_ended());
    }

    /// Crashes the server: kills the postmaster and all its children, and waits until they have ended.
    pub fn kill(&self) {
        let mut running = self.running();
        let pid = running.pid();
        // While the postmaster is stopped, it starts no further children.
        process::stop(pid);
        let children = process::children(pid);
        for pid in children.iter().chain([&pid]) {
            // A child that has ended meanwhile need not be killed.
            drop(process::signal(*pid, Signal::SIGKILL));
        }
        process::wait_until("the server is killed", || {
            running.has_ended() && children.iter().all(|child| process::is_gone(*child))
        });
    }

    /// Starts the server again, in the same place, after a fast shutdown if it is running. Waits until it is ready.
    pub fn restart(&self) {
        if self.running().postmaster.is_some() {
            self.stop(Shutdown::Fast);
        }
        if let Err(reason) = self.run() {
            panic!("{reason}");
        }
    }

    /// Makes a hot standby a primary, and waits until it is one. Its clients stay connected.
    pub fn promote(&self) {
        let mut promote = self.account.command(self.bin_dir().join("pg_ctl"));
        promote.arg("promote").arg("-D").arg(&self.data);
        if let Err(reason) = run(&mut promote) {
            panic!("{reason}");
        }
    }

    /// Starts the server again, as a hot standby of `primary`, from a copy of the primary's data. The primary is shut
    /// down during the copy. This server must be stopped, and its own data is lost.
    pub fn demote(&self, primary: &Self) {
        let demoted = self.follow(primary);
        if let Err(reason) = demoted {
            panic!("{reason}");
        }
    }

    /// Pauses the postmaster and all its children, as on a machine that hangs.
    pub fn pause(&self) {
        let pid = self.running().pid();
        process::stop(pid);
        for child in process::children(pid) {
            process::stop(child);
        }
    }

    /// Resumes the postmaster and all its children.
    pub fn resume(&self) {
        let pid = self.running().pid();
        for pid in process::children(pid).into_iter().chain([pid]) {
            // A child that was killed meanwhile need not be resumed.
            drop(process::signal(pid, Signal::SIGCONT));
        }
    }

    /// Returns all that the server has logged so far.
    pub fn log(&self) -> String {
        self.log_since(0)
    }

    /// Returns the length of the log, a mark for [`log_since`](Self::log_since).
    pub fn log_len(&self) -> usize {
        self.read_log().len()
    }

    /// Returns all that the server has logged since `mark`.
    pub fn log_since(&self, mark: usize) -> String {
        let log = self.read_log();
        String::from_utf8_lossy(log.get(mark..).unwrap_or_default()).into_owned()
    }

    fn read_log(&self) -> Vec<u8> {
        fs::read(self.dir.join("log")).expect("the log is readable")
    }

    pub(crate) fn launch(options: &ServerOptions) -> Result<Self, String> {
        raise_file_limit();
        let mut server = Self::place(options)?;
        let mut tries = 5;
        loop {
            server.port = options.port()?;
            tries -= 1;
            match server.set_up(options) {
                // Another process has taken the port first.
                Err(reason) if tries > 0 && reason.contains("Address already in use") => {
                    drop(fs::remove_dir_all(&server.data));
                    drop(fs::remove_file(server.dir.join("log")));
                }
                result => return result.map(|()| server),
            }
        }
    }

    /// Starts a hot standby, from a copy of this server's data. This server is shut down during the copy.
    pub(crate) fn launch_standby(&self, options: &ServerOptions) -> Result<Self, String> {
        let mut standby = Self::place(options)?;
        standby.port = options.port()?;
        standby.copy(self)?;
        standby.configure(options, &self.conninfo())?;
        standby.run_as_standby()?;
        Ok(standby)
    }

    fn follow(&self, primary: &Self) -> Result<(), String> {
        let conf = self.data.join("postgresql.conf");
        let mut text = fs::read_to_string(&conf).map_err(|error| error.to_string())?;
        text.push_str(&primary.conninfo());
        fs::remove_dir_all(&self.data).map_err(|error| error.to_string())?;
        self.copy(primary)?;
        write_settings(&self.account, &conf, &text)?;
        self.run_as_standby()
    }

    /// Copies the data of `primary`, which is shut down during the copy.
    fn copy(&self, primary: &Self) -> Result<(), String> {
        primary.stop(Shutdown::Fast);
        run(self.account.command("cp").arg("-a").arg(&primary.data).arg(&self.data))?;
        primary.run()
    }

    /// Returns the settings with which another server follows this one.
    fn conninfo(&self) -> String {
        format!(
            "primary_conninfo = 'host={} port={} user=postgres'\n\
             # It may look for the primary before that is there.\n\
             wal_retrieve_retry_interval = '50ms'\n",
            self.dir.display(),
            self.port
        )
    }

    fn run_as_standby(&self) -> Result<(), String> {
        write_settings(&self.account, &self.data.join("standby.signal"), "")?;
        self.run()
    }

    /// Makes the directory of a server, with no cluster in it yet.
    fn place(options: &ServerOptions) -> Result<Self, String> {
        let account = Account::for_server()?;
        let installation = Search::from_env(account).run().map_err(|error| error.to_string())?;
        let (dir, watchdog) = make_dir(&account, "data/postmaster.pid", "QUIT")?;
        Ok(Self {
            installation,
            account,
            data: dir.join("data"),
            dir,
            port: 0,
            listen: options.listen.clone(),
            env: options.env.clone(),
            running: Mutex::new(Running { postmaster: None, watchdog }),
            template: OnceCell::new(),
        })
    }

    /// Makes the cluster and runs the server for the first time.
    fn set_up(&self, options: &ServerOptions) -> Result<(), String> {
        let base = self.dir.parent().unwrap_or(&self.dir);
        let template = Template::of(&self.installation, &self.account, base);
        if template.copy_to(&self.data) {
            if self.configure(options, "").and_then(|()| self.run()).is_ok() {
                return Ok(());
            }
            // The template may be the reason, so the second attempt uses a fresh cluster.
            template.remove();
            drop(fs::remove_dir_all(&self.data));
        }
        template.initdb(&self.data)?;
        self.configure(options, "")?;
        self.run()
    }

    fn configure(&self, options: &ServerOptions, more: &str) -> Result<(), String> {
        let socket_dir = self.dir.to_str().ok_or("the temporary directory is not UTF-8")?;
        let conf = self.data.join("postgresql.conf");
        let mut text = fs::read_to_string(&conf).map_err(|error| error.to_string())?;
        text.push_str(&options.postgresql_conf(socket_dir, self.port));
        text.push_str(more);
        write_settings(&self.account, &conf, &text)?;
        write_settings(&self.account, &self.data.join("pg_hba.conf"), &options.pg_hba_conf())
    }

    /// Starts the server, and waits until it is ready for clients.
    fn run(&self) -> Result<(), String> {
        let log = File::options().create(true).append(true).open(self.dir.join("log"));
        let log = log.map_err(|error| format!("cannot write the log: {error}"))?;
        let errors = log.try_clone().map_err(|error| format!("cannot write the log: {error}"))?;
        let mut postgres = self.account.command(self.bin_dir().join("postgres"));
        // In a process group of its own, so that Ctrl-C does not reach it.
        postgres.arg("-D").arg(&self.data).stdout(log).stderr(errors).process_group(0);
        postgres.envs(self.env.iter().map(|(name, value)| (name, value)));

        let mut running = self.running();
        running.watchdog.tell("starting")?;
        let child = postgres.spawn().map_err(|error| format!("postgres does not run: {error}"))?;
        let pid = child.id();
        running.postmaster = Some(child);
        let start = Instant::now();
        while !self.is_ready(pid) {
            if running.has_ended() {
                return Err(format!("the server does not start:\n{}", self.log()));
            }
            if start.elapsed() > Duration::from_mins(1) {
                return Err(format!("the server is not ready after 60 s:\n{}", self.log()));
            }
            sleep(Duration::from_millis(1));
        }
        running.watchdog.tell("started")
    }

    /// Returns whether line 8 of `postmaster.pid` says that the postmaster `pid` is ready.
    fn is_ready(&self, pid: u32) -> bool {
        let file = fs::read_to_string(self.data.join("postmaster.pid")).unwrap_or_default();
        let mut lines = file.lines();
        // After a crash, the file of the previous postmaster is still there.
        lines.next() == Some(&pid.to_string()) && lines.nth(6).map(str::trim) == Some("ready")
    }

    fn running(&self) -> MutexGuard<'_, Running> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let running = self.running.get_mut().unwrap_or_else(PoisonError::into_inner);
        running.watchdog.release();
        if let Some(mut postmaster) = running.postmaster.take() {
            // The postmaster has ended already, unless the watchdog was killed.
            drop(postmaster.kill());
            drop(postmaster.wait());
        }
        drop(fs::remove_dir_all(&self.dir));
    }
}

impl Running {
    fn pid(&self) -> u32 {
        self.postmaster.as_ref().expect("the server is running").id()
    }

    /// Returns whether the postmaster has ended, and reaps it if so.
    fn has_ended(&mut self) -> bool {
        let Some(postmaster) = &mut self.postmaster else { return true };
        let ended = postmaster.try_wait().expect("a child can be waited for").is_some();
        if ended {
            self.postmaster = None;
        }
        ended
    }
}

/// Raises this process's limit on open files, which is 1,024 for most users: many tests at a time open more.
fn raise_file_limit() {
    const ENOUGH: u64 = 10_000;
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard.min(ENOUGH)
    {
        // If it fails, a test that opens too many says so.
        setrlimit(Resource::RLIMIT_NOFILE, hard.min(ENOUGH), hard).ok();
    }
}
