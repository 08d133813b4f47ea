//! A server in a process of its own.

use std::env;
use std::net::SocketAddr;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};
use tokio::time::timeout;

use crate::Result;
use crate::http::{self, Answer};
use crate::server::DRAIN_VARIABLE;

/// How long a process may take to start, or to end.
const TIMEOUT: Duration = Duration::from_secs(20);

/// A copy of this program that serves. Killed when dropped.
pub(crate) struct Process {
    pub(crate) name: &'static str,
    pub(crate) address: SocketAddr,
    child: Child,
    /// Kept open, so that the process can write to it.
    _output: Lines<BufReader<ChildStdout>>,
}

impl Process {
    /// Starts a server on a free port, and waits until it listens.
    pub(crate) async fn start(name: &'static str, url: &str, bank: SocketAddr) -> Result<Self> {
        let mut child = Command::new(env::current_exe()?)
            .args(["serve", "127.0.0.1:0"])
            .env("NODE", name)
            .env("DATABASE_URL", url)
            .env("BANK", bank.to_string())
            .env(DRAIN_VARIABLE, "1")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let output = child.stdout.take().ok_or("standard output is a pipe")?;
        let mut output = BufReader::new(output).lines();
        let line = timeout(TIMEOUT, output.next_line()).await??;
        let line = line.ok_or_else(|| format!("{name} ended before it listened"))?;
        let (_, address) = line.rsplit_once(' ').ok_or("it says where it listens")?;
        Ok(Self { name, address: address.parse()?, child, _output: output })
    }

    /// Sends a request to pay an invoice.
    pub(crate) async fn pay(&self, invoice: i64) -> Result<Answer> {
        Ok(http::post(self.address, &format!("/invoices/{invoice}/pay")).await?)
    }

    /// Asks the server for the name of the leader, and whether the server itself leads.
    pub(crate) async fn leader(&self) -> Result<(String, bool)> {
        let Answer { status, body, .. } = http::get(self.address, "/leader").await?;
        let leader = body.lines().find_map(|line| line.strip_prefix("leader: "));
        ensure!(status == 200, "{} does not say who leads: {status} {body}", self.name);
        let leader = leader.ok_or_else(|| format!("no leader is named: {body}"))?;
        Ok((leader.to_owned(), body.contains("leads: true")))
    }

    /// Checks that the server is alive, and that its readiness probe is answered with this status.
    pub(crate) async fn probes(&self, readyz: u16) -> Result<()> {
        let alive = http::get(self.address, "/livez").await?;
        ensure!(alive.status == 200, "{} is not alive: {}", self.name, alive.body);
        let ready = http::get(self.address, "/readyz").await?;
        ensure!(ready.status == readyz, "{}: {} {}", self.name, ready.status, ready.body);
        println!("GET /readyz on {}: {readyz} {}", self.name, ready.body.trim());
        Ok(())
    }

    /// Checks that the server exports this line of a metric.
    #[cfg(feature = "metrics")]
    pub(crate) async fn exports(&self, metric: &str) -> Result<()> {
        let Answer { body, .. } = http::get(self.address, "/metrics").await?;
        let is_exported = body.lines().any(|line| line == metric);
        ensure!(is_exported, "{} does not export {metric}: {body}", self.name);
        println!("GET /metrics on {}: {metric}", self.name);
        Ok(())
    }

    /// Sends SIGTERM to the process, as Kubernetes and systemd do.
    pub(crate) async fn terminate(&self) -> Result<()> {
        let pid = self.child.id().ok_or("it has ended already")?.to_string();
        let killed = Command::new("sh").args(["-c", "kill -TERM \"$0\"", &pid]).status().await?;
        ensure!(killed.success(), "{} can't be sent SIGTERM: {killed}", self.name);
        Ok(())
    }

    /// Waits until the process has exited, and checks that it did so successfully.
    pub(crate) async fn ended(mut self) -> Result<()> {
        let status = timeout(TIMEOUT, self.child.wait()).await;
        let status = status.map_err(|_| format!("{} does not end", self.name))??;
        ensure!(status.success(), "{} ended with {status}", self.name);
        Ok(())
    }
}
