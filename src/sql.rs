//! Every statement that is sent to the server. Only this file and the files below it spell `pg_`.
//!
//! Nearly all use the simple query protocol: one message, one answer, one round trip, and nothing is
//! left behind on the application's connection. The values in them are integers, written by
//! [`Display`](std::fmt::Display), or hexadecimal digits, so there is nothing to inject. A free acquire and
//! an awaited release are prepared once per connection, because the server would spend more time
//! on planning them than on the lock.
//!
//! Functions, relations and operators are qualified with `pg_catalog`, and types are keywords of the grammar. An
//! unqualified name can be resolved to an overload in any schema of the search path, which may belong to another role
//! (CVE-2018-1058). For the same reason, no statement contains `IN`, `CASE x WHEN`, `USING` or `IS DISTINCT FROM`,
//! because these look up an operator by its name.
//!
//! Statements that contain several keys pass them as one array, so that the number of entries in
//! `pg_stat_statements` does not depend on keys and timeouts.

pub(crate) mod backend;
pub(crate) mod batch;
pub(crate) mod doctor;
pub(crate) mod election;
pub(crate) mod inspect;
pub(crate) mod lock;
mod place;
pub(crate) mod proof;
mod quiet;
pub(crate) mod release;
pub(crate) mod semaphore;
pub(crate) mod settings;
pub(crate) mod transaction;
pub(crate) mod units;
pub(crate) mod wait;

use std::time::Duration;

use sqlx::postgres::{PgArguments, PgRow};
use sqlx::query::Query;
use sqlx::{AssertSqlSafe, PgConnection, Postgres};

use crate::key::KeyId;
use crate::mode::Mode;

/// Sends a statement by the simple protocol, and returns its only row.
async fn fetch(
    conn: &mut PgConnection,
    statement: impl Into<String>,
) -> Result<PgRow, sqlx::Error> {
    sqlx::raw_sql(AssertSqlSafe(statement.into())).fetch_one(conn).await
}

/// Returns a prepared statement with a key bound to its [`parameters`].
fn bind(statement: String, key: KeyId) -> Query<'static, Postgres, PgArguments> {
    let query = sqlx::query(AssertSqlSafe(statement));
    match key {
        KeyId::BigInt(number) => query.bind(number),
        KeyId::IntPair(first, second) => query.bind(first).bind(second),
    }
}

/// Returns the placeholders of a key, as arguments of a function in a prepared statement.
fn parameters(key: KeyId) -> &'static str {
    match key {
        KeyId::BigInt(_) => "$1",
        KeyId::IntPair(..) => "$1, $2",
    }
}

/// Returns a key as arguments of a function.
fn args(key: KeyId) -> String {
    match key {
        // Quoted, because the smallest numbers have no literal of their own.
        KeyId::BigInt(number) => format!("'{number}'::bigint"),
        KeyId::IntPair(first, second) => format!("'{first}'::integer, '{second}'::integer"),
    }
}

/// Packs a key into one number, of which the numbers of a pair are the halves.
fn packed(key: KeyId) -> i64 {
    match key {
        KeyId::BigInt(number) => number,
        KeyId::IntPair(first, second) => i64::from(first) << 32 | i64::from(second.cast_unsigned()),
    }
}

/// The two numbers of the pair that `k` packs, as arguments of a function.
macro_rules! pair {
    () => {
        "(k OPERATOR(pg_catalog.>>) 32)::integer, \
         (k OPERATOR(pg_catalog.<<) 32 OPERATOR(pg_catalog.>>) 32)::integer"
    };
}
use pair;

/// An expression that calls a function on the lock in a row of [`calls`].
macro_rules! call {
    ($function:literal) => {
        concat!(
            "CASE WHEN call OPERATOR(pg_catalog.=) 0 THEN pg_catalog.",
            $function,
            "(k) WHEN call OPERATOR(pg_catalog.=) 1 THEN pg_catalog.",
            $function,
            "_shared(k) WHEN call OPERATOR(pg_catalog.=) 2 THEN pg_catalog.",
            $function,
            "(",
            pair!(),
            ") ELSE pg_catalog.",
            $function,
            "_shared(",
            pair!(),
            ") END"
        )
    };
}
use call;

/// Returns the suffix that the name of a function has for a mode.
fn suffix(mode: Mode) -> &'static str {
    match mode {
        Mode::Exclusive => "",
        Mode::Shared => "_shared",
    }
}

/// Returns locks as a table `calls (k, call, n)`, in order. The number in `call` selects the variant of a function.
fn calls(locks: &[(KeyId, Mode)]) -> String {
    let keys: Vec<_> = locks.iter().map(|(key, _)| packed(*key).to_string()).collect();
    let call = |&(key, mode): &(KeyId, Mode)| {
        2 * u8::from(matches!(key, KeyId::IntPair(..))) + u8::from(mode == Mode::Shared)
    };
    let numbers: Vec<_> = locks.iter().map(|lock| call(lock).to_string()).collect();
    format!(
        "ROWS FROM (pg_catalog.unnest('{{{}}}'::bigint[]), pg_catalog.unnest('{{{}}}'::smallint[])) \
         WITH ORDINALITY AS calls (k, call, n)",
        keys.join(","),
        numbers.join(","),
    )
}

/// Converts a duration for a timeout of the server: at least 1, because 0 means no timeout.
fn milliseconds(duration: Duration) -> i32 {
    i32::try_from(duration.as_millis()).unwrap_or(i32::MAX).max(1)
}

#[cfg(test)]
mod hostile;
