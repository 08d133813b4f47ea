//! A network of its own for processes, the far side, whose link can be cut.

use std::net::{Ipv4Addr, TcpListener};
use std::path::PathBuf;
use std::process::{self, Command};
use std::sync::atomic::{AtomicU32, Ordering};

use nix::unistd::geteuid;

use crate::account::run;
use crate::process::is_gone;
use crate::skip::{program, skip};

/// The prefix of the names of networks. The ID of the process that made the network follows.
const PREFIX: &str = "pglk";

/// The packages of Debian that have the programs.
const PACKAGES: &str = "iproute2 nftables";

/// The block of private addresses, of which each network takes four.
const BLOCK: [u8; 2] = [10, 213];

/// A network of its own, the far side, with one link to the network of this process.
///
/// A [`Role`](crate::Role) that is started under [`far_side`](Self::far_side) reaches a server that
/// listens on [`address`](Self::address), until the link is cut. Then packets vanish, and neither side is
/// notified. Only Linux supports this, and only root may do it.
///
/// # Drop
///
/// Removes the network and its link. If a killed process has left networks behind, the next process that makes a
/// network removes them.
///
/// # Examples
///
/// ```no_run
/// use pglock_testkit::{Direction, Network, Role, Server};
///
/// let Some(network) = Network::new() else { return };
/// let server = Server::options().listen(network.address()).start();
/// let port = server.port().to_string();
/// let role = Role::start_under(&network.far_side(), "behind_the_link", &[("PORT", &port)]);
/// network.cut(Direction::Both);
/// network.heal();
/// # drop(role);
/// ```
#[derive(Debug)]
pub struct Network {
    nft: PathBuf,
    /// The name of the namespace, and of the near end of the link.
    name: String,
    address: String,
}

/// The packets that a cut link loses.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[expect(clippy::exhaustive_enums, reason = "a link has exactly two directions")]
pub enum Direction {
    /// All packets.
    Both,
    /// The packets that come from the far side.
    FromFarSide,
    /// The packets that go to the far side.
    ToFarSide,
}

impl Network {
    /// Makes a network. Returns `None` and skips the test if that is not possible on this machine.
    pub fn new() -> Option<Self> {
        if !geteuid().is_root() {
            return skip("only root can make a network", "run the tests as root");
        }
        program("ip", PACKAGES)?;
        let nft = program("nft", PACKAGES)?;
        remove_leftovers();
        match Self::make(nft) {
            Ok(network) => Some(network),
            // In a container, root usually may not do this.
            Err(reason) => skip(&reason, "run the tests where root can make a network"),
        }
    }

    fn make(nft: PathBuf) -> Result<Self, String> {
        static NEXT: AtomicU32 = AtomicU32::new(0);

        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("{PREFIX}{}-{number}", process::id());
        let (near, far) = free_addresses(number)?;
        ip(&["netns", "add", &name])?;
        // From here on, dropping the network cleans up.
        let network = Self { nft, name, address: near.to_string() };
        let name = &network.name;
        ip(&["link", "add", name, "type", "veth", "peer", "name", "near", "netns", name])?;
        ip(&["addr", "add", &format!("{near}/30"), "dev", name])?;
        ip(&["link", "set", name, "up"])?;
        ip(&["-netns", name, "addr", "add", &format!("{far}/30"), "dev", "near"])?;
        ip(&["-netns", name, "link", "set", "near", "up"])?;
        ip(&["-netns", name, "link", "set", "lo", "up"])?;
        // Packets are dropped below IP, so that their sender is not notified.
        network.nft(
            "add table netdev cut; \
             add chain netdev cut to { type filter hook ingress device near priority 0; }; \
             add chain netdev cut from { type filter hook egress device near priority 0; }",
        )?;
        Ok(network)
    }

    /// Returns the address of this process's end of the link, as the far side sees it.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Returns the command under which a program runs on the far side.
    pub fn far_side(&self) -> [&str; 4] {
        ["ip", "netns", "exec", &self.name]
    }

    /// Drops all packets of a direction from now on. Neither side is notified.
    pub fn cut(&self, direction: Direction) {
        let chains: &[_] = match direction {
            Direction::Both => &["to", "from"],
            Direction::FromFarSide => &["from"],
            Direction::ToFarSide => &["to"],
        };
        let rules: Vec<_> = chains
            .iter()
            .map(|chain| format!("add rule netdev cut {chain} ip protocol tcp drop"))
            .collect();
        self.nft(&rules.join("; ")).expect("the link can be cut");
    }

    /// Drops, from now on, all packets of the connection that has this port on the far side.
    pub fn cut_connection(&self, port: u16) {
        self.nft(&format!(
            "add rule netdev cut to tcp dport {port} drop; \
             add rule netdev cut from tcp sport {port} drop"
        ))
        .expect("a connection can be cut");
    }

    /// Lets all packets pass again.
    pub fn heal(&self) {
        self.nft("flush table netdev cut").expect("the link can be healed");
    }

    fn nft(&self, commands: &str) -> Result<(), String> {
        let [ip, netns, exec, name] = self.far_side();
        run(Command::new(ip).args([netns, exec, name]).arg(&self.nft).arg(commands)).map(drop)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        remove(&self.name);
    }
}

fn ip(words: &[&str]) -> Result<String, String> {
    run(Command::new("ip").args(words))
}

fn remove(name: &str) {
    // The link is deleted explicitly, because a process on the far side would keep it alive with the namespace. Errors
    // are ignored, because the link may never have been made.
    drop(ip(&["link", "del", name]));
    drop(ip(&["netns", "del", name]));
}

/// Removes the networks of processes that have ended.
fn remove_leftovers() {
    let list = ip(&["netns", "list"]).unwrap_or_default();
    for name in list.lines().filter_map(|line| line.split_whitespace().next()) {
        let pid = name.strip_prefix(PREFIX).and_then(|rest| rest.split_once('-')?.0.parse().ok());
        if pid.is_some_and(is_gone) {
            remove(name);
        }
    }
}

/// Returns two addresses that are unused on this machine: the near side's, and the far side's.
fn free_addresses(number: u32) -> Result<(Ipv4Addr, Ipv4Addr), String> {
    // Each process starts at a place of its own, so that processes seldom collide.
    let start = process::id().wrapping_mul(101).wrapping_add(number);
    for step in 0..100_u32 {
        let index = start.wrapping_add(step.wrapping_mul(37)) % (1 << 14);
        let [.., high, low] = (index * 4).to_be_bytes();
        let [first, second] = BLOCK;
        let [near, far] = [1, 2].map(|host| Ipv4Addr::new(first, second, high, low + host));
        // Only an address that this machine has can be bound to.
        if TcpListener::bind((near, 0)).is_err() {
            return Ok((near, far));
        }
    }
    Err("no free addresses".to_owned())
}
