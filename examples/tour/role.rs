//! The program of the other processes, which is the part of the tour that uses `pglock`.

use std::env;
use std::time::Duration;

use pglock::{ExclusiveGuard, Lock, SharedGuard};
use sqlx::postgres::PgPoolOptions;
use sqlx::{Connection, PgConnection};
use tokio::io::{AsyncBufReadExt, BufReader, stdin};
use tokio::time::sleep;

use crate::Result;
use crate::clock::now;

/// A guard of either kind.
enum Guard {
    Exclusive(ExclusiveGuard),
    Shared(SharedGuard),
}

/// Executes the commands on standard input, one per line, until it ends.
pub(crate) async fn play() -> Result<()> {
    let url = env::var("TOUR_DATABASE_URL")?;
    let pool = PgPoolOptions::new().max_connections(2).connect(&url).await?;
    let mut lock = Lock::new(&pool, "tour");
    let mut guards = Vec::new();
    let mut cues = BufReader::new(stdin()).lines();
    println!("{0} {0} here", now());

    while let Some(cue) = cues.next_line().await? {
        let from = now();
        let words = match cue.split(' ').collect::<Vec<_>>().as_slice() {
            ["acquire"] => {
                guards.push(Guard::Exclusive(lock.acquire().await?));
                "yes".to_owned()
            }
            ["acquire_shared"] => {
                guards.push(Guard::Shared(lock.acquire_shared().await?));
                "yes".to_owned()
            }
            ["try_acquire"] => {
                let guard = lock.try_acquire().await?;
                yes_or_no(guard, &mut guards)
            }
            ["try_acquire_for", ms] => {
                let limit = Duration::from_millis(ms.parse()?);
                let guard = lock.try_acquire_for(limit).await?;
                yes_or_no(guard, &mut guards)
            }
            ["release"] => {
                let guard = guards.pop().ok_or("there is no guard to release")?;
                match guard {
                    Guard::Exclusive(guard) => guard.release().await?,
                    Guard::Shared(guard) => guard.release().await?,
                }
                "released".to_owned()
            }
            ["add", times] => {
                let mut connection = pool.acquire().await?;
                let mut turns = Vec::new();
                for _ in 0..times.parse()? {
                    let from = now();
                    add_one(&mut connection).await?;
                    turns.push(format!("{from}-{}", now()));
                }
                turns.join(" ")
            }
            ["add-locked", times] => {
                let mut turns = Vec::new();
                for _ in 0..times.parse()? {
                    let guard = lock.acquire().await?;
                    let from = now();
                    add_one(&mut *guard.connection().await?).await?;
                    turns.push(format!("{from}-{}", now()));
                    guard.release().await?;
                }
                turns.join(" ")
            }
            ["half"] => {
                let Some(Guard::Exclusive(guard)) = guards.last() else {
                    return Err("half a write needs the whole lock".into());
                };
                let mut connection = guard.connection().await?;
                let mut transaction = connection.begin().await?;
                sqlx::query("UPDATE tally SET number = -1").execute(&mut *transaction).await?;
                println!("{from} {} written", now());
                // Never commits: the process is killed here, or otherwise its standard input ends.
                cues.next_line().await?;
                return Ok(());
            }
            _ => return Err(format!("no such cue: {cue}").into()),
        };
        println!("{from} {} {words}", now());
    }
    Ok(())
}

/// Adds 1 to the number, like a program that expects no other one to change it meanwhile.
async fn add_one(connection: &mut PgConnection) -> Result<()> {
    let number: i32 =
        sqlx::query_scalar("SELECT number FROM tally").fetch_one(&mut *connection).await?;
    // During this pause, the other processes can interfere.
    sleep(Duration::from_millis(1)).await;
    sqlx::query("UPDATE tally SET number = $1").bind(number + 1).execute(connection).await?;
    Ok(())
}

fn yes_or_no(guard: Option<ExclusiveGuard>, guards: &mut Vec<Guard>) -> String {
    let Some(guard) = guard else { return "no".to_owned() };
    guards.push(Guard::Exclusive(guard));
    "yes".to_owned()
}
