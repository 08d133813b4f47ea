//! Spread locks over several servers, and add a server without ever admitting two holders of a key.
//!
//! You want this when one server can't carry all locks any more. A key belongs to the server with the highest
//! score, a hash of the key and the server's name. This needs no table, and a server that is added takes its
//! share of the keys from the others, while no other key moves. While processes change from one list of servers
//! to the next, a key that moves is locked at its old place *and* at its new one.
//!
//! In this example, databases stand for servers, because a key belongs to one database.

#![expect(clippy::print_stdout, reason = "an example tells what it does")]

use std::error::Error;

use pglock::{ExclusiveGuard, Lock, LockManager};
use pglock_testkit::TestDb;

const KEYS: u32 = 100_000;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

#[tokio::main]
async fn main() -> Result<()> {
    let names = ["anna", "berta", "cilly", "dora", "emma", "frida"];
    let before = names.get(..5).unwrap_or_default();
    check_balance(before);
    check_moves(before, &names);

    // The calls below stand for processes in each stage of the change from two servers to three.
    // Databases of the testkit. In your program, each pool is `PgPool::connect(&url).await?`.
    let databases = [TestDb::new().await, TestDb::new().await, TestDb::new().await];
    let mut servers = Vec::new();
    for (name, database) in names.into_iter().zip(&databases) {
        servers.push(Server { name, locks: LockManager::new(&database.pool(4).await) });
    }
    let (two, three) = (servers.get(..2).unwrap_or_default(), servers.as_slice());
    let name_of_home = |key: &str, servers| home(key, servers).map(|server: &Server| server.name);
    let moves = |key: &String| name_of_home(key, two) != name_of_home(key, three);
    let key = (0..KEYS).map(invoice).find(moves).ok_or("no key moves")?;

    let first = try_acquire(&key, &[two]).await?.ok_or("it is held")?;
    let both = try_acquire(&key, &[two, three]).await?;
    assert!(both.is_none(), "a process that takes both places finds the old one held");
    // A process that locks only the new place is admitted. So no process may do that while others lock only the old
    // one.
    assert!(try_acquire(&key, &[three]).await?.is_some());
    release(first).await?;

    let second = try_acquire(&key, &[two, three]).await?.ok_or("it is held")?;
    assert!(
        try_acquire(&key, &[two]).await?.is_none(),
        "a process that knows only the old place is refused"
    );
    assert!(
        try_acquire(&key, &[three]).await?.is_none(),
        "and so is one that knows only the new place"
    );
    release(second).await?;
    println!("while {key} moves, both its places are locked, and no other process is admitted");
    Ok(())
}

struct Server {
    /// Stays the same when the server gets another address.
    name: &'static str,
    locks: LockManager,
}

impl AsRef<str> for Server {
    fn as_ref(&self) -> &str {
        self.name
    }
}

/// Returns the server that a key belongs to, which has the highest score. `None` if there are no servers.
fn home<'s, S: AsRef<str>>(key: &str, servers: &'s [S]) -> Option<&'s S> {
    servers.iter().max_by_key(|server| mix(fnv1a(server.as_ref()) ^ mix(fnv1a(key))))
}

/// Hashes a text to the same number in every program, on every machine. Never change this function while processes run.
fn fnv1a(text: &str) -> u64 {
    let step = |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    text.bytes().fold(0xcbf2_9ce4_8422_2325, step)
}

/// Makes every bit depend on every other (the last step of `SplitMix64`).
fn mix(mut bits: u64) -> u64 {
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

/// Locks a key at its home in each of the lists, all or none of them, in the same order in all processes.
async fn try_acquire(key: &str, lists: &[&[Server]]) -> Result<Option<Vec<ExclusiveGuard>>> {
    let mut places: Vec<&Server> = lists.iter().filter_map(|servers| home(key, servers)).collect();
    places.sort_by_key(|server| server.name);
    places.dedup_by_key(|server| server.name);
    let mut guards = Vec::new();
    for server in places {
        let Some(guard) = Lock::new(&server.locks, key).try_acquire().await? else {
            // Returning drops the guards acquired so far, which releases their locks.
            return Ok(None);
        };
        guards.push(guard);
    }
    Ok(Some(guards))
}

async fn release(guards: Vec<ExclusiveGuard>) -> Result<()> {
    for guard in guards {
        guard.release().await?;
    }
    Ok(())
}

fn invoice(number: u32) -> String {
    format!("invoice-{number}")
}

/// Checks that no server has far more keys than another.
fn check_balance(servers: &[&str]) {
    let expected = f64::from(KEYS) / f64::from(u32::try_from(servers.len()).unwrap_or(1));
    for server in servers {
        let keys = share_of(|key| home(key, servers) == Some(server)) * f64::from(KEYS);
        println!("{server} has {keys} of {KEYS} keys");
        assert!((keys / expected - 1.0).abs() < 0.02, "{server} is out of balance");
    }
}

/// Checks that a server that is added gets its share, and that no other key moves.
fn check_moves(before: &[&str], after: &[&str]) {
    let moved = share_of(|key| home(key, before) != home(key, after));
    println!("{:.1} % of the keys move when a sixth server is added", 100.0 * moved);
    assert!((moved - 1.0 / 6.0).abs() < 0.01);
    let newcomer = after.last();
    let to_it =
        share_of(|key| home(key, before) != home(key, after) && home(key, after) == newcomer);
    assert!((moved - to_it).abs() < f64::EPSILON, "a key moves between two servers that stay");

    let rest = |key: &str, servers: u64| fnv1a(key) % servers;
    let moved = share_of(|key| rest(key, 5) != rest(key, 6));
    println!("{:.1} % would move if the rest of a division told the server", 100.0 * moved);
    assert!((moved - 5.0 / 6.0).abs() < 0.01);
}

fn share_of(of_interest: impl Fn(&str) -> bool) -> f64 {
    let count = (0..KEYS).filter(|&number| of_interest(&invoice(number))).count();
    f64::from(u32::try_from(count).unwrap_or(u32::MAX)) / f64::from(KEYS)
}
