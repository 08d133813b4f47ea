//! A tour of the whole library: four processes, one PostgreSQL, one lock.
//!
//! `cargo run --example tour` needs nothing set up. The program starts the processes as copies of itself, and sends
//! them commands that stand for what your services would do on their own. The tour checks everything that it prints:
//! if a claim does not hold, it reports that and exits with 1.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a tour talks")]

use std::env;
use std::error::Error;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use pglock_testkit::{TestDb, advisory_locks};
use sqlx::PgPool;
use tokio::time::sleep;

use crate::actor::{Actor, Reply};
use crate::clock::now;
use crate::timeline::{Looks, Span};

/// Returns an error, and so ends the tour, unless the claim holds.
macro_rules! ensure {
    ($claim:expr, $($message:tt)+) => {
        if !$claim {
            return Err(format!($($message)+).into());
        }
    };
}

mod actor;
mod role;
mod timeline;
mod clock;

type Result<T, E = Box<dyn Error + Send + Sync>> = std::result::Result<T, E>;

/// How often each of the four adds 1 to the number.
const TIMES: usize = 50;
/// The final number if no addition is lost.
const ALL: i32 = 200;

#[tokio::main]
async fn main() -> ExitCode {
    let (played, what) = match env::args().nth(1).as_deref() {
        Some("actor") => (role::play().await, "an actor stumbled"),
        Some(_) => (Err("it takes no arguments".into()), "the tour did not start"),
        None => (tour().await, "the tour ended early"),
    };
    let Err(error) = played else { return ExitCode::SUCCESS };
    eprintln!("\n{what}: {error}");
    let mut cause = error.source();
    while let Some(error) = cause {
        eprintln!("  because: {error}");
        cause = error.source();
    }
    ExitCode::FAILURE
}

async fn tour() -> Result<()> {
    println!("A tour of pglock: four processes, one PostgreSQL, one lock\n");
    match env::var("DATABASE_URL") {
        Ok(url) if !url.is_empty() => println!("PostgreSQL is the one of DATABASE_URL."),
        _ => println!("First, a PostgreSQL is started for you. It goes away with the tour."),
    }
    let db = TestDb::new().await;
    let started = Instant::now();
    let stage = Stage { pool: db.pool(2).await };
    sqlx::raw_sql("CREATE TABLE tally (number int NOT NULL); INSERT INTO tally VALUES (0)")
        .execute(&stage.pool)
        .await?;

    let (mut ada, mut bob, mut cleo, mut dan) = tokio::try_join!(
        Actor::enter("Ada", db.url()),
        Actor::enter("Bob", db.url()),
        Actor::enter("Cleo", db.url()),
        Actor::enter("Dan", db.url()),
    )?;
    println!("\nOn stage, each a process of its own, with its own connections:\n");
    for actor in [&ada, &bob, &cleo, &dan] {
        println!("  {:<5} process {}", actor.name, actor.pid);
    }

    let mut four = [&mut ada, &mut bob, &mut cleo, &mut dan];
    stage.without_a_lock(&mut four).await?;
    stage.with_a_lock(&mut four).await?;
    stage.readers_and_a_writer(&mut four).await?;
    stage.no_and_not_in_time(&mut ada, &mut bob, &mut cleo).await?;
    stage.stacking(&mut ada, &mut bob).await?;
    stage.sudden_death(&mut ada, &mut dan).await?;

    for actor in [ada, bob, cleo] {
        actor.leave().await?;
    }
    let seconds = started.elapsed().as_secs_f64();
    println!("\nThe end, after {seconds:.1} s. All that was said was checked, and is so.");
    Ok(())
}

/// The main process, which directs the actors and looks into the database.
struct Stage {
    pool: PgPool,
}

impl Stage {
    async fn without_a_lock(&self, four: &mut [&mut Actor; 4]) -> Result<()> {
        title(1, "Everybody at once");
        println!(
            "There is a number in the database. Each of the four adds 1 to it, {TIMES} times:"
        );
        println!("read it, think for a moment, write it back. No lock protects it.\n");

        let number = self.count(four, "add").await?;
        timeline::draw(&seen(four), None);
        ensure!(number < ALL, "without a lock no addition was lost; that can happen, but rarely");
        let lost = ALL - number;
        println!("\n  {ALL} additions were made. The number says {number}: {lost} are lost.");
        Ok(())
    }

    async fn with_a_lock(&self, four: &mut [&mut Actor; 4]) -> Result<()> {
        title(2, "One at a time");
        println!("The same again, but each addition is made under the lock:\n");
        println!("  let guard = lock.acquire().await?;");
        println!("  let mut connection = guard.connection().await?;");
        println!("  add_one(&mut connection).await?;\n");

        let number = self.count(four, "add-locked").await?;
        let mut turns: Vec<_> = four.iter().flat_map(|actor| actor.spans.clone()).collect();
        turns.sort_by_key(|turn| turn.from);
        for pair in turns.windows(2) {
            let [one, next] = pair else { continue };
            ensure!(one.to <= next.from, "two held the lock at once: {one:?} and {next:?}");
        }
        ensure!(turns.len() == TIMES * 4, "{} turns were taken, not {ALL}", turns.len());
        ensure!(number == ALL, "under the lock, {ALL} additions made {number}");

        // The first and the last turns are untypical, so some from the middle are shown.
        let some: Vec<&Span> = turns.iter().skip(80).take(24).collect();
        let window = some.first().zip(some.last()).map(|(first, last)| (first.from, last.to));
        timeline::draw(&seen(four), window);
        let shown = some.len();
        println!("\n  That is {shown} of the {ALL} turns, magnified. No two of them overlap.");
        println!("  {ALL} additions were made. The number says {number}: none is lost.");
        Ok(())
    }

    /// Makes all four add to the number, and returns the final number.
    async fn count(&self, four: &mut [&mut Actor; 4], how: &str) -> Result<i32> {
        sqlx::query("UPDATE tally SET number = 0").execute(&self.pool).await?;
        for actor in four.iter_mut() {
            actor.spans.clear();
            actor.cue(&format!("{how} {TIMES}")).await?;
        }
        for actor in four.iter_mut() {
            let Reply { words, .. } = actor.reply().await?;
            for turn in words.split(' ') {
                let (from, to) = turn.split_once('-').ok_or("a turn is reported as from-to")?;
                let what = if how == "add" { Looks::Works } else { Looks::Holds };
                actor.spans.push(Span { from: from.parse()?, to: to.parse()?, what });
            }
        }
        Ok(sqlx::query_scalar("SELECT number FROM tally").fetch_one(&self.pool).await?)
    }

    async fn readers_and_a_writer(&self, four: &mut [&mut Actor; 4]) -> Result<()> {
        title(3, "Readers share, a writer waits");
        for actor in four.iter_mut() {
            actor.spans.clear();
        }
        let [ada, bob, cleo, dan] = four;
        println!("Ada and Bob only read, so they share the lock. Cleo wants to write, and waits");
        println!("for both. Dan wants to read too, but came after Cleo: he waits for her.\n");

        ada.does("acquire_shared").await?;
        pause(80).await;
        let bob_in = bob.does("acquire_shared").await?;
        pause(80).await;
        cleo.cue("acquire").await?;
        self.until_waiting(1).await?;
        pause(80).await;
        dan.cue("acquire_shared").await?;
        self.until_waiting(2).await?;
        pause(100).await;
        let ada_out = ada.does("release").await?;
        pause(100).await;
        let bob_out = bob.does("release").await?;
        let cleo_in = cleo.reply().await?;
        pause(150).await;
        let cleo_out = cleo.does("release").await?;
        let dan_in = dan.reply().await?;
        pause(100).await;
        dan.does("release").await?;

        timeline::draw(&[ada, bob, cleo, dan], None);
        ensure!(bob_in.to < ada_out.from, "Ada and Bob did not share");
        ensure!(cleo_in.to > ada_out.from.max(bob_out.from), "Cleo wrote while others read");
        ensure!(dan_in.to > cleo_out.from, "Dan read while Cleo wrote");
        println!("\n  Cleo waited {}, until the last reader had left.", took(cleo_in.took()));
        println!("  However many readers come, they cannot keep a writer out.");
        Ok(())
    }

    async fn no_and_not_in_time(
        &self,
        ada: &mut Actor,
        bob: &mut Actor,
        cleo: &mut Actor,
    ) -> Result<()> {
        title(4, "No for an answer");
        println!("Ada holds the lock. Bob tries, and goes on if he can't have it. Cleo would wait");
        println!("for it, but not for longer than 300 ms.\n");
        for actor in [&mut *ada, &mut *bob, &mut *cleo] {
            actor.spans.clear();
        }
        ada.does("acquire").await?;
        pause(100).await;
        let refused = bob.does("try_acquire").await?;
        pause(50).await;
        let gave_up = cleo.does("try_acquire_for 300").await?;
        pause(80).await;
        ada.does("release").await?;
        let granted = bob.does("try_acquire").await?;
        pause(100).await;
        bob.does("release").await?;

        timeline::draw(&[ada, bob, cleo], None);
        ensure!(refused.words == "no", "Bob was given a lock that Ada held");
        ensure!(gave_up.words == "no", "Cleo was given a lock that Ada held");
        ensure!(gave_up.took() >= 300_000, "Cleo gave up after {}", took(gave_up.took()));
        ensure!(granted.words == "yes", "Bob was refused a lock that was free");
        println!("\n  Bob had his no after {}, and did something else.", took(refused.took()));
        println!("  Cleo gave up after {}.", took(gave_up.took()));
        println!("  A no is not an error: it is the `None` of an `Option`.");
        Ok(())
    }

    async fn stacking(&self, ada: &mut Actor, bob: &mut Actor) -> Result<()> {
        title(5, "Twice is not once too often");
        println!("A function that holds the lock calls another that takes it as well:\n");
        let outer = ada.does("acquire").await?;
        let inner = ada.does("acquire").await?;
        let on_the_server = advisory_locks(&mut *self.pool.acquire().await?).await.len();
        ada.does("release").await?;
        let too_early = bob.does("try_acquire").await?;
        ada.does("release").await?;
        let at_last = bob.does("try_acquire").await?;
        bob.does("release").await?;

        ensure!(on_the_server == 1, "two guards made {on_the_server} locks on the server");
        ensure!(too_early.words == "no", "Bob got in while Ada still had a guard");
        ensure!(at_last.words == "yes", "Bob was refused after Ada's last guard had gone");
        let (first, again) = (took(outer.took()), took(inner.took()));
        println!("  Ada acquires                {first:>8}   1 guard");
        println!("  Ada acquires again          {again:>8}   2 guards, 1 lock on the server");
        println!("  Ada drops one guard                    1 guard");
        println!("  Bob tries                              no: it is still hers");
        println!("  Ada drops the other                    0 guards");
        println!("  Bob tries again                        yes");
        Ok(())
    }

    async fn sudden_death(&self, ada: &mut Actor, dan: &mut Actor) -> Result<()> {
        title(6, "A sudden death");
        println!("Dan holds the lock, and is in the middle of writing -1 over the number. Ada");
        println!("waits. Dan is killed: SIGKILL, no time for goodbyes.\n");
        for actor in [&mut *ada, &mut *dan] {
            actor.spans.clear();
        }
        dan.does("acquire").await?;
        dan.does("half").await?;
        pause(50).await;
        ada.cue("acquire").await?;
        self.until_waiting(1).await?;
        pause(150).await;
        let killed = now();
        dan.die().await?;
        let ada_in = ada.reply().await?;
        // With NOWAIT, the query fails if Dan's write is still pending, because then the row is locked.
        let number: i32 = sqlx::query_scalar("SELECT number FROM tally FOR UPDATE NOWAIT")
            .fetch_one(&self.pool)
            .await?;
        pause(100).await;
        ada.does("release").await?;

        timeline::draw(&[dan, ada], None);
        ensure!(ada_in.to > killed, "Ada had the lock while Dan was alive");
        let takeover = ada_in.to - killed;
        ensure!(number == ALL, "the number is {number}: the dead wrote it");
        println!("\n  {} after the kill, Ada had the lock.", took(takeover));
        println!("  No lease had to run out: PostgreSQL saw the connection close.");
        println!("  The number is {number}: what Dan had half written went with his lock.");
        Ok(())
    }

    /// Waits until `waiters` sessions queue for the lock.
    async fn until_waiting(&self, waiters: usize) -> Result<()> {
        let asked = Instant::now();
        let mut connection = self.pool.acquire().await?;
        loop {
            let locks = advisory_locks(&mut connection).await;
            if locks.iter().filter(|lock| !lock.granted).count() == waiters {
                return Ok(());
            }
            ensure!(asked.elapsed().as_secs() < 60, "{waiters} sessions should wait: {locks:?}");
            sleep(Duration::from_millis(2)).await;
        }
    }
}

fn seen<'a>(four: &'a [&mut Actor; 4]) -> [&'a Actor; 4] {
    four.each_ref().map(|actor| &**actor)
}

fn title(number: u32, title: &str) {
    println!("\n{number}. {title}\n{}\n", "-".repeat(title.len() + 3));
}

/// Lets some time pass, so that there is something to see in the timeline.
async fn pause(milliseconds: u64) {
    sleep(Duration::from_millis(milliseconds)).await;
}

/// Formats a number of microseconds for people.
fn took(micros: u64) -> String {
    match micros {
        0..1_000 => format!("{micros} µs"),
        1_000..10_000 => format!("{}.{} ms", micros / 1_000, micros % 1_000 / 100),
        _ => format!("{} ms", micros / 1_000),
    }
}
