//! A proxy in front of a server, which makes the link slow, frozen or broken.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

/// A proxy in front of a server, which makes the link slow, frozen or broken.
///
/// # Drop
///
/// Closes all connections that go through the proxy.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    link: watch::Sender<Link>,
    // Dropping the set ends the tasks.
    _tasks: JoinSet<()>,
}

/// The current state of the link.
#[derive(Clone, Copy, Debug)]
struct Link {
    /// The port that new connections go to.
    port: u16,
    delay: Duration,
    frozen: bool,
    resets: u32,
}

impl Proxy {
    /// Listens on a free port of 127.0.0.1, and forwards connections to `port` there, without delay.
    pub async fn to(port: u16) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port is free");
        let address = listener.local_addr().expect("a listener has an address");
        let (delay, frozen, resets) = (Duration::ZERO, false, 0);
        let link = watch::Sender::new(Link { port, delay, frozen, resets });
        let watched = link.subscribe();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                let link = watched.clone();
                // An error of one side closes the other.
                connections.spawn(async move { drop(pass(client, link).await) });
            }
        });
        Self { address, link, _tasks: tasks }
    }

    /// Returns the address that the proxy listens on.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Forwards new connections to another port, like a host name that moves. Open connections are not affected.
    pub fn move_to(&self, port: u16) {
        self.link.send_modify(|link| link.port = port);
    }

    /// Makes everything that is sent from now on arrive later by this delay.
    pub fn delay(&self, delay: Duration) {
        self.link.send_modify(|link| link.delay = delay);
    }

    /// Holds up everything that has not arrived yet, until [`thaw`](Self::thaw). The connections stay open.
    pub fn freeze(&self) {
        self.link.send_modify(|link| link.frozen = true);
    }

    /// Delivers everything that was held up.
    pub fn thaw(&self) {
        self.link.send_modify(|link| link.frozen = false);
    }

    /// Breaks all connections: both sides get a TCP reset.
    pub fn reset(&self) {
        self.link.send_modify(|link| link.resets += 1);
    }
}

/// Forwards data between a client and the server until one of them closes the connection, or the link breaks.
async fn pass(mut client: TcpStream, mut link: watch::Receiver<Link>) -> io::Result<()> {
    let Link { port, resets, .. } = *link.borrow();
    let mut server = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let (from_client, to_client) = client.split();
    let (from_server, to_server) = server.split();
    tokio::select! {
        passed = pump(from_client, to_server, link.clone()) => return passed,
        passed = pump(from_server, to_client, link.clone()) => return passed,
        // The sender lives as long as this task.
        _ = link.wait_for(|link| link.resets != resets) => {}
    }
    client.set_zero_linger()?;
    server.set_zero_linger()
}

/// Forwards data in one direction, each piece when it is due.
async fn pump(
    mut from: ReadHalf<'_>,
    mut to: WriteHalf<'_>,
    mut link: watch::Receiver<Link>,
) -> io::Result<()> {
    let (on_the_way, mut arriving) = mpsc::unbounded_channel();
    let delay = link.clone();
    let leave = async move {
        let mut buffer = vec![0; 16 * 1024];
        loop {
            let length = from.read(&mut buffer).await?;
            let piece = buffer.get(..length).unwrap_or_default().to_vec();
            let due = Instant::now() + delay.borrow().delay;
            if on_the_way.send((due, piece)).is_err() || length == 0 {
                return Ok::<_, io::Error>(());
            }
        }
    };
    let arrive = async move {
        while let Some((due, piece)) = arriving.recv().await {
            sleep_until(due).await;
            drop(link.wait_for(|link| !link.frozen).await);
            to.write_all(&piece).await?;
        }
        to.shutdown().await
    };
    tokio::try_join!(leave, arrive).map(drop)
}
