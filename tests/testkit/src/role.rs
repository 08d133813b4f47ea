//! A process of its own that runs one ignored test of the program that starts it.

use std::env;
use std::fmt::Display;
use std::io::{self, Write, stdout};
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill, raise};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::time::timeout;

use crate::cancel::eventually;

/// How long a role may take to answer before a test fails.
const TIMEOUT: Duration = Duration::from_mins(1);

/// The mark before the answers of a role, which distinguishes them from the output of the test runner.
const MARK: &str = "» ";

/// A process of its own that runs one ignored test of the program that starts it.
///
/// The role reads commands on its standard input, a line each, and answers on its standard output. Its
/// standard error is inherited.
///
/// # Drop
///
/// Kills the process.
///
/// # Examples
///
/// ```no_run
/// use pglock_testkit::{Role, cues, say};
///
/// #[tokio::test]
/// #[ignore = "is a role: another test runs it as a process"]
/// async fn parrot() {
///     let mut cues = cues();
///     while let Some(cue) = cues.next_line().await.unwrap() {
///         say(cue);
///     }
/// }
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() {
/// let mut parrot = Role::start("parrot", &[("COLOUR", "green")]);
/// assert_eq!(parrot.ask("hello").await, "hello");
/// # }
/// ```
#[derive(Debug)]
pub struct Role {
    name: String,
    process: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
}

impl Role {
    /// Runs the ignored test `name`, which is its whole path, with these environment variables.
    pub fn start(name: &str, env: &[(&str, &str)]) -> Self {
        Self::start_under(&[], name, env)
    }

    /// Runs the test under another command, such as `["ip", "netns", "exec", "there"]`, which must replace
    /// itself with the program that it runs.
    pub fn start_under(command: &[&str], name: &str, env: &[(&str, &str)]) -> Self {
        let program = env::current_exe().expect("this program knows where it is");
        let mut words = command.iter().map(AsRef::as_ref).chain([program.as_os_str()]);
        let mut process = Command::new(words.next().expect("there is the program at least"))
            .args(words)
            .args([name, "--exact", "--ignored", "--nocapture"])
            .envs(env.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("this program runs once more");
        let input = process.stdin.take().expect("it was asked for");
        let output = process.stdout.take().expect("it was asked for");
        Self { name: name.to_owned(), process, input, output: BufReader::new(output).lines() }
    }

    /// Sends a command to the role. Panics if the process has ended.
    pub async fn tell(&mut self, cue: &str) {
        let told = self.input.write_all(format!("{cue}\n").as_bytes()).await;
        assert!(told.is_ok(), "{} ended before it was told {cue:?}", self.name);
    }

    /// Waits for the next answer of the role. Panics if its process ends instead, or does not answer for a minute.
    pub async fn answer(&mut self) -> String {
        let next = timeout(TIMEOUT, self.next());
        let Ok(next) = next.await else { panic!("{} says nothing", self.name) };
        next.unwrap_or_else(|| panic!("{} ended instead of an answer", self.name))
    }

    /// Waits for the next answer of the role, without a limit. `None` at the end of its process.
    pub async fn next(&mut self) -> Option<String> {
        loop {
            let line = self.output.next_line().await.expect("a pipe is readable")?;
            if let Some((_, words)) = line.split_once(MARK) {
                return Some(words.to_owned());
            }
        }
    }

    /// Sends a command to the role, and waits for the answer.
    pub async fn ask(&mut self, cue: &str) -> String {
        self.tell(cue).await;
        self.answer().await
    }

    /// Pauses the process.
    pub fn pause(&self) {
        crate::process::stop(self.pid());
    }

    /// Waits until the process has paused itself: see [`stand_still`].
    pub async fn stands_still(&self) {
        let still = || async { crate::process::stands_still(self.pid()) };
        eventually("the role stands still", TIMEOUT, still).await;
    }

    /// Resumes the process.
    pub fn resume(&self) {
        self.signal(Signal::SIGCONT);
    }

    /// Kills the process, and waits until it has ended.
    pub async fn kill(&mut self) {
        self.process.kill().await.expect("a child can be killed");
    }

    /// Returns whether the process has ended.
    pub fn has_ended(&mut self) -> bool {
        self.process.try_wait().expect("a child can be waited for").is_some()
    }

    /// Returns the ID of the process. Panics if it was killed.
    pub fn pid(&self) -> u32 {
        self.process.id().expect("the role is being played")
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid().cast_signed()), signal).expect("a child takes signals");
    }
}

/// Sends an answer from inside a role.
#[expect(clippy::print_stdout, reason = "that is where it is heard")]
pub fn say(words: impl Display) {
    // Begins a new line, because the test runner may have left one without an end.
    println!("\n{MARK}{words}");
    // A parent that has stopped listening ends the role anyway.
    drop(stdout().flush());
}

/// The commands for a role, inside its process: see [`cues`].
#[derive(Debug)]
pub struct Cues(UnboundedReceiver<io::Result<String>>);

/// Returns the commands for a role, inside its process. They end when standard input is closed.
///
/// A thread of its own reads them, because tokio's runtime, at its end, would wait for its own reader of standard
/// input, and a role that panics would not end.
pub fn cues() -> Cues {
    let (tell, told) = unbounded_channel();
    thread::spawn(move || {
        for line in io::stdin().lines() {
            if tell.send(line).is_err() {
                return;
            }
        }
    });
    Cues(told)
}

impl Cues {
    /// Waits for the next command. `None` when standard input is closed.
    ///
    /// # Errors
    ///
    /// If standard input can't be read.
    pub async fn next_line(&mut self) -> io::Result<Option<String>> {
        self.0.recv().await.transpose()
    }
}

/// Pauses this process, from inside a role, until [`Role::resume`] resumes it. Then the process continues with the code
/// after this call.
pub fn stand_still() {
    raise(Signal::SIGSTOP).expect("a process may stop itself");
}
