//! The program as a process: what it says, and how it ends.

use std::fs;
use std::mem;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pglock_testkit::{TestDb, advisory_locks, eventually};
use sqlx::PgConnection;
use sqlx::postgres::PgConnectOptions;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command};
use tokio::sync::Mutex;
use tokio::time::timeout;

/// How long anything may take before a test fails, on a machine that has much else to do.
pub(crate) const LIMIT: Duration = Duration::from_mins(1);

/// Where the program is.
pub(crate) const PGLOCK: &str = env!("CARGO_BIN_EXE_pglock");

/// The program, to be run with these arguments on a database.
pub(crate) fn pglock(db: &TestDb, args: &[&str]) -> Command {
    let mut command = Command::new(PGLOCK);
    command.env("DATABASE_URL", db.url()).args(args).kill_on_drop(true);
    command
}

/// How to connect over a unix socket, as a URL.
pub(crate) fn url(options: &PgConnectOptions) -> String {
    let socket = options.get_socket().unwrap().to_str().unwrap().replace('/', "%2F");
    let (port, database) = (options.get_port(), options.get_database().unwrap());
    format!("postgres://postgres@localhost:{port}/{database}?host={socket}&sslmode=disable")
}

/// Runs the program, and returns how it ended, and what it said.
pub(crate) async fn run(db: &TestDb, args: &[&str]) -> Ended {
    Running::start(pglock(db, args)).finish().await
}

/// The program while it runs.
///
/// # Drop
///
/// Kills it.
#[derive(Debug)]
pub(crate) struct Running {
    process: Child,
    input: Option<ChildStdin>,
    output: Lines<BufReader<ChildStdout>>,
    errors: BufReader<ChildStderr>,
    /// What was read of its standard error.
    complained: String,
}

/// How the program ended, and what it said.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    /// On standard output, since the last line that was waited for.
    pub(crate) output: String,
    pub(crate) errors: String,
}

impl Running {
    pub(crate) fn start(mut command: Command) -> Self {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = command.spawn().unwrap();
        let output = BufReader::new(process.stdout.take().unwrap()).lines();
        let errors = BufReader::new(process.stderr.take().unwrap());
        let complained = String::new();
        Self { input: process.stdin.take(), process, output, errors, complained }
    }

    /// Writes a line to its standard input.
    pub(crate) async fn tell(&mut self, line: &str) {
        let input = self.input.as_mut().unwrap();
        input.write_all(format!("{line}\n").as_bytes()).await.unwrap();
    }

    /// The next line of its standard output.
    pub(crate) async fn line(&mut self) -> String {
        let line = timeout(LIMIT, self.output.next_line()).await;
        line.expect("a line in time").unwrap().expect("a line before the end")
    }

    /// Waits until it says this line, and nothing before.
    pub(crate) async fn says(&mut self, expected: &str) {
        assert_eq!(self.line().await, expected);
    }

    /// Waits until its standard error has this.
    pub(crate) async fn complains(&mut self, expected: &str) {
        let complained = async {
            while !self.complained.contains(expected) {
                let read = self.errors.read_line(&mut self.complained).await.unwrap();
                assert!(read > 0, "{expected:?} before the end: {}", self.complained);
            }
        };
        timeout(LIMIT, complained).await.expect("a complaint in time");
    }

    pub(crate) fn pid(&self) -> i32 {
        self.process.id().unwrap().cast_signed()
    }

    pub(crate) fn send(&self, signal: Signal) {
        send(self.pid(), signal);
    }

    /// Closes its standard input, and waits until it has ended, and all who write to its output.
    pub(crate) async fn finish(mut self) -> Ended {
        drop(self.input.take());
        let ending = async {
            let mut errors = mem::take(&mut self.complained);
            let mut output = String::new();
            let (read, ()) = tokio::join!(self.errors.read_to_string(&mut errors), async {
                while let Some(line) = self.output.next_line().await.unwrap() {
                    output.push_str(&line);
                    output.push('\n');
                }
            });
            read.unwrap();
            Ended { status: self.process.wait().await.unwrap(), output, errors }
        };
        timeout(LIMIT, ending).await.expect("an end in time")
    }
}

impl Ended {
    pub(crate) fn code(&self) -> Option<i32> {
        self.status.code()
    }

    pub(crate) fn signal(&self) -> Option<i32> {
        self.status.signal()
    }
}

/// A command that says `held`, and ends when its standard input does.
pub(crate) const HOLD: [&str; 4] = ["--", "sh", "-c", "echo held; cat"];

/// Starts the program with these arguments and [`HOLD`], and waits until it holds.
pub(crate) async fn hold(db: &TestDb, args: &[&str]) -> Running {
    let mut holder = Running::start(pglock(db, &[args, &HOLD].concat()));
    holder.says("held").await;
    holder
}

pub(crate) fn send(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).unwrap();
}

/// Whether a process runs, or could.
pub(crate) fn is_alive(pid: i32) -> bool {
    let stat = fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat"));
    // The name may hold brackets and spaces; the state comes after it.
    stat.is_ok_and(|stat| !stat.rsplit_once(')').unwrap().1.trim_start().starts_with(['Z', 'X']))
}

pub(crate) async fn is_gone(pid: i32) {
    eventually("the command is gone", LIMIT, || async { !is_alive(pid) }).await;
}

/// Waits until the server shows these numbers of advisory locks, held and waited for.
pub(crate) async fn locks_are(admin: &mut PgConnection, held: usize, waited_for: usize) {
    let admin = Mutex::new(admin);
    let known = async || {
        let locks = advisory_locks(&mut **admin.lock().await).await;
        let granted = locks.iter().filter(|lock| lock.granted).count();
        granted == held && locks.len() - granted == waited_for
    };
    eventually("the locks are what they should be", LIMIT, known).await;
}

/// Ends the session that holds a lock, as an administrator would.
pub(crate) async fn terminate_holder(admin: &mut PgConnection) {
    let locks = advisory_locks(admin).await;
    let holder = locks.iter().find(|lock| lock.granted).unwrap();
    let terminated: bool = sqlx::query_scalar("SELECT pg_terminate_backend($1)")
        .bind(holder.pid)
        .fetch_one(admin)
        .await
        .unwrap();
    assert!(terminated);
}
