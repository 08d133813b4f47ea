//! Measures the hand-off of a busy lock from one process to another that waits for it.
//!
//! Each way to lock has two processes, copies of this program, that hold the lock in turns. They read
//! commands on their standard input, and answer on their standard output. The holder gets the command
//! to release only when the server shows that the waiter is in the queue. The benchmark measures the
//! time from just before the release in one process until the acquire has returned in the other, by
//! the clock that both have in common. Meanwhile this process sleeps.
//!
//! The others are compared with SQL by hand that waits as pglock does, in a statement that ends its own wait. Its
//! difference from a plain `SELECT pg_advisory_lock` is the cost of that statement; the rest is the cost of pglock.

#![expect(clippy::print_stdout, reason = "the parties answer there")]

mod contest;
mod support;
mod table;

use std::env;
use std::mem;
use std::process::Stdio;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pglock::{ExclusiveGuard, Lock, LockManager};
use pglock_testkit::{TestDb, advisory_locks};
use sqlx::error::BoxDynError;
use sqlx::{Connection, PgConnection, PgPool, Row};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines, stdin};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::time::{sleep, timeout};

use contest::{Contest, Contestant};

const KEY_OF_PGLOCK: i64 = 1;
const KEY_OF_SQL: i64 = 2;
const KEY_OF_MANAGER: i64 = 3;
const KEY_OF_SLICES: i64 = 4;

/// A statement that waits for [`KEY_OF_SLICES`] for at most 5 s, without an error in the server's log, and returns
/// whether the lock was granted.
const SLICE: &str = "SET LOCAL statement_timeout = 0; \
    DO $$ BEGIN \
      PERFORM set_config('bench.granted', pg_backend_pid()::text, true); \
      PERFORM set_config('lock_timeout', '5000', true); \
      BEGIN \
        PERFORM pg_advisory_lock(4); \
      EXCEPTION WHEN lock_not_available THEN \
        PERFORM set_config('bench.granted', '', true); \
      END; \
    END $$; \
    SHOW bench.granted";

fn main() -> Result<(), BoxDynError> {
    let mut arguments = env::args().skip(1);
    if arguments.next().as_deref() == Some("--party") {
        let key = arguments.next().unwrap_or_default().parse()?;
        let url = arguments.next().unwrap_or_default();
        return support::spawn(obey(key, url));
    }
    support::run(handover)
}

async fn handover(time: Duration) -> Result<(), BoxDynError> {
    let db = TestDb::new().await;
    let sql = Pair::start(&db, KEY_OF_SQL).await?;
    let slices = Pair::start(&db, KEY_OF_SLICES).await?;
    let pglock = Pair::start(&db, KEY_OF_PGLOCK).await?;
    let manager = Pair::start(&db, KEY_OF_MANAGER).await?;
    let mut contests = [
        Contest::new("SQL by hand that waits in a slice", slices),
        Contest::new("`SELECT pg_advisory_lock`", sql),
        Contest::new("`Lock`", pglock).target("<= 1.10", |ratio, _| ratio <= 1.1),
        Contest::new("`LockManager`", manager).target("<= 1.18", |ratio, _| ratio <= 1.18),
    ];
    contest::compete(&mut contests, time).await?;

    let title = "handover: a busy lock goes from one process to another, which waits for it";
    support::print_title(title, &db.pool(1).await).await?;
    contest::publish("handover", "release to acquired, median", 0.5, &contests)?;
    contest::publish(None, "release to acquired, 95th percentile", 0.95, &contests)
}

/// Two processes: one holds the lock, the other is in the server's queue for it.
struct Pair {
    key: i64,
    holder: Party,
    waiter: Party,
    /// The pid of the backend in which the waiter waits.
    queued: i32,
    admin: PgConnection,
}

impl Pair {
    async fn start(db: &TestDb, key: i64) -> Result<Self, BoxDynError> {
        let [mut holder, waiter] = [Party::start(db, key)?, Party::start(db, key)?];
        holder.ask("acquire").await?;
        let mut pair = Self { key, holder, waiter, queued: 0, admin: db.admin().await };
        timeout(Duration::from_secs(10), pair.queue()).await??;
        Ok(pair)
    }

    /// Makes the waiter wait, and returns when the server shows it in the queue.
    async fn queue(&mut self) -> Result<(), BoxDynError> {
        self.waiter.tell("acquire").await?;
        loop {
            let mut locks = advisory_locks(&mut self.admin).await;
            locks.retain(|lock| lock.objid == self.key);
            if let [held, awaited] = locks.as_slice()
                && held.granted
                && !awaited.granted
            {
                self.queued = awaited.pid;
                break;
            }
            sleep(Duration::from_millis(1)).await;
        }
        // Gives the machine time to come to rest.
        sleep(Duration::from_millis(3)).await;
        Ok(())
    }

    async fn hand_over(&mut self) -> Result<Duration, BoxDynError> {
        self.holder.tell("release").await?;
        let acquired = self.waiter.answer().await?;
        let released = self.holder.ask("released").await?;
        if acquired.backend_pid != self.queued {
            return Err("the lock went to another one than the waiter".into());
        }
        mem::swap(&mut self.holder, &mut self.waiter);
        self.queue().await?;
        Ok(acquired.at.saturating_sub(released.at))
    }
}

impl Contestant for Pair {
    async fn turn(&mut self) -> Result<Duration, BoxDynError> {
        timeout(Duration::from_secs(10), self.hand_over()).await?
    }
}

/// A handle to one of the two processes. The process ends when the handle is dropped, or with its standard input.
struct Party {
    _process: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
}

/// The time of an event since 1970, and the pid of its backend.
struct Answer {
    at: Duration,
    backend_pid: i32,
}

impl Party {
    fn start(db: &TestDb, key: i64) -> Result<Self, BoxDynError> {
        let mut process = Command::new(env::current_exe()?)
            .args(["--party", &key.to_string(), &db.url()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let input = process.stdin.take().ok_or("no standard input")?;
        let output = BufReader::new(process.stdout.take().ok_or("no standard output")?).lines();
        Ok(Self { _process: process, input, output })
    }

    async fn tell(&mut self, what: &str) -> Result<(), BoxDynError> {
        Ok(self.input.write_all(format!("{what}\n").as_bytes()).await?)
    }

    async fn answer(&mut self) -> Result<Answer, BoxDynError> {
        let line = self.output.next_line().await?.ok_or("a party has ended")?;
        let (nanos, backend_pid) = line.split_once(' ').ok_or("a party does not answer")?;
        Ok(Answer { at: Duration::from_nanos(nanos.parse()?), backend_pid: backend_pid.parse()? })
    }

    async fn ask(&mut self, what: &str) -> Result<Answer, BoxDynError> {
        self.tell(what).await?;
        self.answer().await
    }
}

/// Executes the commands, as one of the two processes.
async fn obey(key: i64, url: String) -> Result<(), BoxDynError> {
    let mut way = match key {
        KEY_OF_SQL | KEY_OF_SLICES => Way::by_hand(PgConnection::connect(&url).await?).await?,
        KEY_OF_MANAGER => {
            Way::ours(Lock::new(&LockManager::new(&PgPool::connect(&url).await?), key))
        }
        _ => Way::ours(Lock::new(&PgPool::connect(&url).await?, key)),
    };
    let mut released = Duration::ZERO;
    let mut input = BufReader::new(stdin()).lines();
    while let Some(told) = input.next_line().await? {
        match told.as_str() {
            "acquire" => {
                let backend_pid = way.acquire(key).await?;
                println!("{} {backend_pid}", now()?.as_nanos());
            }
            // Answers only to the next command, so that the other party has the machine for itself.
            "release" => {
                released = now()?;
                way.release(key).await?;
            }
            "released" => println!("{} 0", released.as_nanos()),
            _ => return Err(told.into()),
        }
    }
    Ok(())
}

fn now() -> Result<Duration, BoxDynError> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?)
}

/// How the lock is acquired and released.
enum Way {
    ByHand { connection: PgConnection, backend_pid: i32 },
    Pglock(Box<Lock>, Option<Box<ExclusiveGuard>>),
}

impl Way {
    async fn by_hand(mut connection: PgConnection) -> Result<Self, BoxDynError> {
        let backend_pid =
            sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(&mut connection).await?;
        Ok(Self::ByHand { connection, backend_pid })
    }

    fn ours(lock: Lock) -> Self {
        Self::Pglock(Box::new(lock), None)
    }

    async fn acquire(&mut self, key: i64) -> Result<i32, BoxDynError> {
        match self {
            Self::ByHand { connection, .. } if key == KEY_OF_SLICES => {
                let row = sqlx::raw_sql(SLICE).fetch_one(connection).await?;
                Ok(row.try_get::<&str, _>(0)?.parse()?)
            }
            Self::ByHand { connection, backend_pid } => {
                let acquire = sqlx::query("SELECT pg_advisory_lock($1)").bind(key);
                acquire.execute(connection).await?;
                Ok(*backend_pid)
            }
            Self::Pglock(lock, held) => {
                Ok(held.insert(Box::new(lock.acquire().await?)).backend_pid())
            }
        }
    }

    async fn release(&mut self, key: i64) -> Result<(), BoxDynError> {
        match self {
            Self::ByHand { connection, .. } => {
                let release = sqlx::query("SELECT pg_advisory_unlock($1)").bind(key);
                release.execute(connection).await?;
            }
            Self::Pglock(_, held) => {
                if let Some(guard) = held.take() {
                    guard.release().await?;
                }
            }
        }
        Ok(())
    }
}
