//! Move money between two accounts, in any direction, without a deadlock.
//!
//! You want this when one step needs several locks, and only learns at run time which ones. If it took them
//! one after the other, a transfer from 1 to 2 and one from 2 to 1 could each hold the lock that the
//! other waits for. A `MultiLock` takes them in one order, whatever order they are given in.
//!
//! Work that fits in one transaction can also lock its rows, with `SELECT … ORDER BY … FOR UPDATE`. Advisory
//! locks also cover work outside the database, and work that takes several transactions.

#![expect(clippy::print_stdout, reason = "an example tells what it does")]

use std::error::Error;
use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use pglock::MultiLock;
use pglock_testkit::TestDb;
use sqlx::{Connection, PgConnection, PgPool};
use tokio::task::JoinSet;
use tokio::time::timeout;

const ACCOUNTS: u64 = 4;
/// The initial balance of each account.
const EACH: i64 = 1_000;
const CLERKS: u64 = 8;
const TRANSFERS: u64 = 25;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

#[tokio::main]
async fn main() -> Result<()> {
    // A database of the testkit. In your program, each pool is `PgPool::connect(&url).await?`.
    let db = TestDb::new().await;
    let pool = db.pool(4).await;
    sqlx::raw_sql("CREATE TABLE account (id bigint PRIMARY KEY, balance bigint NOT NULL)")
        .execute(&pool)
        .await?;
    sqlx::query("INSERT INTO account SELECT id, $2 FROM generate_series(1, $1) AS id")
        .bind(ACCOUNTS.cast_signed())
        .bind(EACH)
        .execute(&pool)
        .await?;

    // The clerks are on different machines, and send money back and forth. If two of them waited for each other, they
    // would never end.
    let mut clerks = JoinSet::new();
    for number in 1..=CLERKS {
        clerks.spawn(clerk(number, db.pool(2).await));
    }
    let mut made = 0;
    while let Some(clerk) = timeout(Duration::from_secs(40), clerks.join_next()).await? {
        made += clerk??;
    }

    let balances: Vec<(i64, i64)> =
        sqlx::query_as("SELECT id, balance FROM account ORDER BY id").fetch_all(&pool).await?;
    for (id, balance) in &balances {
        println!("account {id} has {balance}");
        assert!(*balance >= 0, "account {id} was overdrawn");
    }
    let sum: i64 = balances.iter().map(|(_, balance)| balance).sum();
    assert_eq!(sum, ACCOUNTS.cast_signed() * EACH, "money was lost, or made");
    println!("{made} transfers by {CLERKS} clerks, no deadlock, and the sum is still {sum}");
    Ok(())
}

/// Makes transfers between accounts picked at random. Returns for how many of them the accounts had the money.
async fn clerk(number: u64, pool: PgPool) -> Result<u64> {
    let random = RandomState::new();
    let mut made = 0;
    for transfer_number in 0..TRANSFERS {
        let dice = random.hash_one((number, transfer_number));
        let from = dice % ACCOUNTS + 1;
        let to = (from + dice / ACCOUNTS % (ACCOUNTS - 1)) % ACCOUNTS + 1;
        let amount = dice / 1_000 % 500 + 1;
        if transfer(&pool, from.cast_signed(), to.cast_signed(), amount.cast_signed()).await? {
            made += 1;
        }
    }
    println!("clerk {number} made {made} transfers");
    Ok(made)
}

/// Moves an amount, if the account has it. Returns whether it was moved.
async fn transfer(pool: &PgPool, from: i64, to: i64, amount: i64) -> Result<bool> {
    let account = |id| format!("account-{id}");
    let mut accounts = MultiLock::new(pool, [account(from), account(to)]);
    let guard = accounts.acquire().await?;

    // The transaction runs on the session that holds both locks: if the session breaks, the locks and the transaction
    // end together.
    let mut connection = guard.connection().await?;
    let mut transaction = connection.begin().await?;
    // Read, think, write: no other session does so with these two accounts.
    let has = balance(&mut transaction, from).await?;
    let other_has = balance(&mut transaction, to).await?;
    let enough = has >= amount;
    if enough {
        set_balance(&mut transaction, from, has - amount).await?;
        set_balance(&mut transaction, to, other_has + amount).await?;
    }
    transaction.commit().await?;
    drop(connection);
    guard.release().await?;
    Ok(enough)
}

async fn balance(connection: &mut PgConnection, id: i64) -> sqlx::Result<i64> {
    sqlx::query_scalar("SELECT balance FROM account WHERE id = $1")
        .bind(id)
        .fetch_one(connection)
        .await
}

async fn set_balance(connection: &mut PgConnection, id: i64, balance: i64) -> sqlx::Result<()> {
    sqlx::query("UPDATE account SET balance = $2 WHERE id = $1")
        .bind(id)
        .bind(balance)
        .execute(connection)
        .await?;
    Ok(())
}
