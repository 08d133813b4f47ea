//! A process on stage, seen from the director's chair.

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

/// How long an actor may take for a cue, before the tour gives up.
const TIMEOUT: Duration = Duration::from_mins(1);

/// A copy of this program, run as another process, that executes commands.
///
/// It is killed when dropped. Should the director itself be killed, its standard input ends, and so
/// does it.
pub(crate) struct Actor {
    pub(crate) name: &'static str,
    pub(crate) pid: u32,
    /// What it did in this scene, for the timeline.
    pub(crate) spans: Vec<Span>,
    /// What it was told last, and has not answered.
    cue: String,
    process: Child,
    to: ChildStdin,
    from: Lines<BufReader<ChildStdout>>,
}

/// What an actor said of a cue it was given: from when to when, and how it ended.
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
            // Not an argument: those can be read by every user of the machine.
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

    /// Sends it a command, and does not wait until that is done.
    pub(crate) async fn cue(&mut self, cue: &str) -> Result<()> {
        self.to.write_all(format!("{cue}\n").as_bytes()).await?;
        cue.clone_into(&mut self.cue);
        Ok(())
    }

    /// Waits until it has done what it was told.
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

    /// Sends it a command, and waits until that is done.
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

    /// Lets the process end, and sees that it does so in peace.
    pub(crate) async fn leave(self) -> Result<()> {
        let Self { name, mut process, to, .. } = self;
        drop(to);
        let status: ExitStatus = timeout(TIMEOUT, process.wait()).await??;
        ensure!(status.success(), "{name} did not leave in peace: {status}");
        Ok(())
    }

    /// Notes what the timeline will show.
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
    /// How long it took, in microseconds.
    pub(crate) fn took(&self) -> u64 {
        self.to.saturating_sub(self.from)
    }
}
