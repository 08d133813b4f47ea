//! A pooler that multiplexes transactions, and pins a client that changes the state of its session.

use std::collections::HashSet;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sqlx::postgres::{PgConnectOptions, PgSslMode};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;

use crate::server::Server;

/// A pooler that multiplexes transactions, and pins a client that changes the state of its session.
///
/// Each transaction gets a server connection that no other client uses, and the connection is free again after the
/// transaction. A pinned client keeps its server connection, which is closed when the pinned client disconnects.
///
/// # Drop
///
/// Closes all connections that go through the pooler.
#[derive(Debug)]
pub struct PinningPooler {
    address: SocketAddr,
    // Dropping the set ends the tasks.
    _tasks: JoinSet<()>,
}

/// What pins a client of a [`PinningPooler`], and for how long.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Pinning {
    /// As in RDS Proxy, the name of a lock function, `SET`, `set_config` or a named prepared statement pins the client,
    /// until it disconnects.
    UntilDisconnected,
    /// As in PgDog 0.1.56, a call of a lock function in a simple query, outside of `DO` blocks, pins the client until
    /// the same keys are unlocked, whether or not a lock was granted. Prepared statements and `SET` do not pin it.
    UntilUnlocked,
}

impl PinningPooler {
    /// Starts a pooler with room for this number of server connections.
    pub async fn start(server: &Server, connections: usize, pinning: Pinning) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port is free");
        let address = listener.local_addr().expect("a listener has an address");
        let socket = server.socket_dir().join(format!(".s.PGSQL.{}", server.port()));
        let backends = Arc::new(Backends {
            socket,
            room: Arc::new(Semaphore::new(connections)),
            idle: Mutex::default(),
        });
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut clients = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                let backends = Arc::clone(&backends);
                // An error of one side closes the other.
                clients.spawn(async move { drop(serve(client, &backends, pinning).await) });
            }
        });
        Self { address, _tasks: tasks }
    }

    /// Returns the options to connect to the server's database `postgres`, through the pooler.
    pub fn connect_options(&self) -> PgConnectOptions {
        PgConnectOptions::new_without_pgpass()
            .host(&self.address.ip().to_string())
            .port(self.address.port())
            .username("postgres")
            .database("postgres")
            .ssl_mode(PgSslMode::Disable)
    }
}

/// The server connections.
#[derive(Debug)]
struct Backends {
    socket: PathBuf,
    room: Arc<Semaphore>,
    idle: Mutex<Vec<Backend>>,
}

/// A server connection, and the messages by which it was opened.
#[derive(Debug)]
struct Backend {
    answers: Messages<OwnedReadHalf>,
    requests: OwnedWriteHalf,
    startup: Vec<u8>,
    greeting: Vec<u8>,
}

/// A server connection that one client uses.
///
/// # Drop
///
/// Closes the server connection.
#[derive(Debug)]
struct Assigned {
    backend: Backend,
    room: OwnedSemaphorePermit,
    /// Whether the client keeps it.
    pinned: bool,
    /// How many `ReadyForQuery` messages the server has yet to send.
    owed: usize,
}

impl Backends {
    /// Waits for a server connection that is free, for a client with this startup message.
    async fn assign(&self, startup: &[u8]) -> io::Result<Assigned> {
        let room = Arc::clone(&self.room).acquire_owned().await.map_err(io::Error::other)?;
        let known = {
            let mut idle = self.idle();
            let known = idle.iter().position(|backend| backend.startup == startup);
            known.map(|index| idle.swap_remove(index))
        };
        let backend = match known {
            Some(backend) => backend,
            None => Backend::open(&self.socket, startup).await?,
        };
        Ok(Assigned { backend, room, pinned: false, owed: 0 })
    }

    fn give_back(&self, assigned: Assigned) {
        self.idle().push(assigned.backend);
        // The room is given back last, so that the next client finds the idle connection.
        drop(assigned.room);
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Backend>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Backend {
    async fn open(socket: &Path, startup: &[u8]) -> io::Result<Self> {
        let (answers, mut requests) = UnixStream::connect(socket).await?.into_split();
        requests.write_all(startup).await?;
        let (mut answers, mut greeting) = (Messages::from(answers), Vec::new());
        loop {
            let message = answers.next().await?;
            greeting.extend_from_slice(&message);
            match message.first() {
                Some(b'Z') => break,
                Some(b'E') => return Err(io::ErrorKind::ConnectionRefused.into()),
                _ => {}
            }
        }
        Ok(Self { answers, requests, startup: startup.to_owned(), greeting })
    }
}

impl Assigned {
    /// Forwards a message of the client.
    async fn send(&mut self, message: &[u8], state: &mut State) -> io::Result<()> {
        self.owed += usize::from(matches!(message.first(), Some(b'Q' | b'S')));
        state.note(message);
        self.pinned = state.is_pinned();
        self.backend.requests.write_all(message).await
    }

    /// Returns a message of the server, and whether another client may use the server connection after it. Cancel
    /// safe.
    async fn receive(&mut self) -> io::Result<(Vec<u8>, bool)> {
        let message = self.backend.answers.next().await?;
        let is_ready = message.first() == Some(&b'Z');
        self.owed -= usize::from(is_ready);
        let is_in_transaction = message.last() != Some(&b'I');
        let is_free = is_ready && self.owed == 0 && !is_in_transaction && !self.pinned;
        Ok((message, is_free))
    }
}

/// Serves a client until it or its server disconnects.
async fn serve(mut client: TcpStream, backends: &Backends, pinning: Pinning) -> io::Result<()> {
    client.set_nodelay(true)?;
    let mut startup = vec![0; 4];
    client.read_exact(&mut startup).await?;
    let mut rest = vec![0; length(&startup).saturating_sub(4)];
    client.read_exact(&mut rest).await?;
    startup.append(&mut rest);
    let first = backends.assign(&startup).await?;
    client.write_all(&first.backend.greeting).await?;
    backends.give_back(first);

    let (requests, mut answers) = client.split();
    let mut requests = Messages::from(requests);
    let mut state = State::new(pinning);
    loop {
        let message = requests.next().await?;
        if is_goodbye(&message) {
            return Ok(());
        }
        let mut assigned = backends.assign(&startup).await?;
        assigned.send(&message, &mut state).await?;
        loop {
            tokio::select! {
                received = assigned.receive() => {
                    let (message, is_free) = received?;
                    answers.write_all(&message).await?;
                    if is_free {
                        break;
                    }
                }
                message = requests.next() => {
                    let message = message?;
                    if is_goodbye(&message) {
                        return Ok(());
                    }
                    assigned.send(&message, &mut state).await?;
                }
            }
        }
        backends.give_back(assigned);
    }
}

fn is_goodbye(message: &[u8]) -> bool {
    message.first() == Some(&b'X')
}

/// The state of a client's session, as far as the pooler tracks it.
#[derive(Debug)]
struct State {
    pinning: Pinning,
    /// The arguments of the lock functions that were called.
    locks: HashSet<String>,
    is_changed: bool,
}

impl State {
    fn new(pinning: Pinning) -> Self {
        Self { pinning, locks: HashSet::new(), is_changed: false }
    }

    fn is_pinned(&self) -> bool {
        match self.pinning {
            Pinning::UntilDisconnected => self.is_changed,
            Pinning::UntilUnlocked => !self.locks.is_empty(),
        }
    }

    /// Updates the state from a message of the client.
    fn note(&mut self, message: &[u8]) {
        // The text comes after the type and the length.
        let text = String::from_utf8_lossy(message.get(5..).unwrap_or_default());
        match message.first() {
            Some(b'Q') => {
                self.is_changed |= changes_state(&text);
                self.note_calls(&text);
            }
            Some(b'P') => {
                let (name, statement) = text.split_once('\0').unwrap_or_default();
                self.is_changed |= !name.is_empty() || changes_state(statement);
            }
            _ => {}
        }
    }

    /// Updates the state from the calls of lock functions in a statement.
    fn note_calls(&mut self, statement: &str) {
        // Every other part is the body of a `DO` block.
        for part in statement.split("$$").step_by(2) {
            for call in part.split("advisory_").skip(1) {
                let (function, rest) = call.split_once('(').unwrap_or_default();
                let key = rest.split(')').next().unwrap_or_default();
                match function {
                    "lock" | "lock_shared" => drop(self.locks.insert(key.to_owned())),
                    "unlock" | "unlock_shared" => drop(self.locks.remove(key)),
                    "unlock_all" => self.locks.clear(),
                    _ => {}
                }
            }
        }
    }
}

/// Returns whether a statement changes the state of its session, by the words in it.
fn changes_state(statement: &str) -> bool {
    let mut words = statement.split(|c: char| !c.is_alphanumeric() && c != '_');
    words.any(|word| {
        let word = word.to_ascii_lowercase();
        word == "set"
            || word == "set_config"
            || word.starts_with("pg_advisory")
            || word.starts_with("pg_try_advisory")
    })
}

/// Reads a stream as messages of the protocol.
#[derive(Debug)]
struct Messages<R> {
    stream: R,
    buffer: Vec<u8>,
}

impl<R: AsyncRead + Unpin> Messages<R> {
    fn from(stream: R) -> Self {
        Self { stream, buffer: Vec::new() }
    }

    /// Returns the next message. Cancel safe.
    async fn next(&mut self) -> io::Result<Vec<u8>> {
        loop {
            // A message begins with a type of one byte, and the length of the rest.
            let whole = self.buffer.get(1..5).map(|head| 1 + length(head));
            if let Some(whole) = whole.filter(|whole| *whole <= self.buffer.len()) {
                return Ok(self.buffer.drain(..whole).collect());
            }
            if self.stream.read_buf(&mut self.buffer).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}

/// Parses the length at the start of a message, which includes its own four bytes.
fn length(head: &[u8]) -> usize {
    let bytes = head.first_chunk().copied().unwrap_or_default();
    u32::from_be_bytes(bytes).try_into().unwrap_or_default()
}
