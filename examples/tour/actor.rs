//! The main process's handle to one of the other processes.

use std::env;
use std::fmt::Display;
use std::os::unix::process::ExitStatusExt;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::time::timeout;

use crate::Result;
use crate::clock::now;
use crate::timeline::{Looks, Span};

/// How long an actor may take for a command before the tour fails.
const TIMEOUT: Duration = Duration::from_mins(1);

/// A copy of this program, run as another process, that executes commands.
///
/// The process is killed when this handle is dropped. If the main process itself is killed, the standard input of the
/// actor ends, and the actor exits.
pub(crate) struct Actor {
    pub(crate) name: &'static str,
    pub(crate) pid: u32,
    /// The spans of this scene, for the timeline.
    pub(crate) spans: Vec<Span>,
    /// The last command that was sent.
    cue: String,
    process: Child,
    to: ChildStdin,
    from: Lines<BufReader<ChildStdout>>,
}

/// An actor's reply to a command: when the command began and ended, and its result.
pub(crate) struct Reply {
    pub(crate) from: u64,
    pub(crate) to: u64,
    pub(crate) words: String,
}

impl Actor {
    /// Starts the process, and waits until it is connected.
    pub(crate) async fn enter(name: &'static str, url: String) -> Result<Self> {
        let mut process = Command::new(env::current_exe()?)
            .arg("actor")
            // The URL is not an argument, because every user of the machine can read arguments.
            .env("TOUR_DATABASE_URL", url)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let pid = process.id().ok_or("a process that has just started has an id")?;
        let to = process.stdin.take().ok_or("standard input is a pipe")?;
        let from = process.stdout.take().ok_or("standard output is a pipe")?;
        let from = BufReader::new(from).lines();
        let cue = "enter".to_owned();
        let mut actor = Self { name, pid, spans: Vec::new(), cue, process, to, from };
        actor.reply().await?;
        Ok(actor)
    }

    /// Sends a command, and does not wait for the reply.
    pub(crate) async fn cue(&mut self, cue: &str) -> Result<()> {
        self.to.write_all(format!("{cue}\n").as_bytes()).await?;
        cue.clone_into(&mut self.cue);
        Ok(())
    }

    /// Waits for the reply to the last command.
    pub(crate) async fn reply(&mut self) -> Result<Reply> {
        let line = match timeout(TIMEOUT, self.from.next_line()).await {
            Ok(line) => line?.ok_or_else(|| self.complaint("fell off the stage"))?,
            Err(_) => return Err(self.complaint("took too long").into()),
        };
        let mut words = line.splitn(3, ' ');
        let mut word = || words.next().ok_or_else(|| self.complaint("mumbled"));
        let reply =
            Reply { from: word()?.parse()?, to: word()?.parse()?, words: word()?.to_owned() };
        self.remember(&reply);
        Ok(reply)
    }

    /// Sends a command, and waits for the reply.
    pub(crate) async fn does(&mut self, cue: &str) -> Result<Reply> {
        self.cue(cue).await?;
        self.reply().await
    }

    /// Kills the process, as the operating system would if memory ran out.
    pub(crate) async fn die(&mut self) -> Result<()> {
        self.process.start_kill()?;
        let killed = now();
        let status = timeout(TIMEOUT, self.process.wait()).await??;
        ensure!(status.signal() == Some(9), "{}", self.complaint(status));
        self.close_span(killed);
        self.spans.push(Span { from: killed, to: killed, what: Looks::Dies });
        Ok(())
    }

    /// Closes the standard input of the process, and checks that the process exits successfully.
    pub(crate) async fn leave(self) -> Result<()> {
        let Self { name, mut process, to, .. } = self;
        drop(to);
        let status: ExitStatus = timeout(TIMEOUT, process.wait()).await??;
        ensure!(status.success(), "{name} did not leave in peace: {status}");
        Ok(())
    }

    /// Records the spans that the timeline will show.
    fn remember(&mut self, reply: &Reply) {
        let Reply { from, to, .. } = *reply;
        let mode = if self.cue.contains("shared") { Looks::Shares } else { Looks::Holds };
        match (self.cue.split(' ').next().unwrap_or_default(), reply.words.as_str()) {
            ("acquire" | "acquire_shared" | "try_acquire" | "try_acquire_for", "yes") => {
                self.spans.push(Span { from, to, what: Looks::Waits });
                self.spans.push(Span { from: to, to: u64::MAX, what: mode });
            }
            ("try_acquire" | "try_acquire_for", "no") => {
                self.spans.push(Span { from, to, what: Looks::Waits });
                self.spans.push(Span { from: to, to, what: Looks::GivesUp });
            }
            ("release", _) => self.close_span(from),
            _ => {}
        }
    }

    fn close_span(&mut self, to: u64) {
        if let Some(open) = self.spans.iter_mut().rev().find(|span| span.to == u64::MAX) {
            open.to = to;
        }
    }

    fn complaint(&self, what: impl Display) -> String {
        format!("{} (process {}) at {:?}: {what}", self.name, self.pid, self.cue)
    }
}

impl Reply {
    /// Returns how long the command took, in microseconds.
    pub(crate) fn took(&self) -> u64 {
        self.to.saturating_sub(self.from)
    }
}
