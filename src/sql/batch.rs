//! Many calls of a manager, in one statement.

use sqlx::{PgConnection, Row};

use super::{bind, packed, pair, parameters, suffix};
use crate::key::KeyId;
use crate::mode::Mode;

/// One call of one of the server's functions, with a key.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Call {
    TryLock(Mode),
    Unlock(Mode),
    /// Acquires the shared lock on a session that holds the key exclusively, so it never waits.
    LockShared,
    /// Whether another session waits for the key.
    IsWaitedFor,
}

impl Call {
    /// Returns the function to call, if a single call is enough.
    fn function(self) -> Option<String> {
        let (name, mode) = match self {
            Self::TryLock(mode) => ("pg_try_advisory_lock", mode),
            Self::Unlock(mode) => ("pg_advisory_unlock", mode),
            Self::LockShared | Self::IsWaitedFor => return None,
        };
        Some(format!("pg_catalog.{name}{}", suffix(mode)))
    }

    /// Returns the number of the call in [`call_all`]; one more for a pair of integers.
    fn number(self, key: KeyId) -> i16 {
        let number = match self {
            Self::TryLock(Mode::Exclusive) => 0,
            Self::Unlock(Mode::Exclusive) => 2,
            Self::TryLock(Mode::Shared) => 4,
            Self::Unlock(Mode::Shared) => 6,
            Self::LockShared => 8,
            Self::IsWaitedFor => 10,
        };
        number + i16::from(matches!(key, KeyId::IntPair(..)))
    }
}

/// The answer to [`call_all`].
pub(crate) struct Called {
    pub(crate) backend_pid: i32,
    pub(crate) answers: Vec<bool>,
}

/// Makes calls one after the other, in one prepared statement.
///
/// The keys and calls are bound as two arrays; a pair of integers as the halves of one key. The server
/// processes them in order, because it scans a function in order and aggregates without a sort. A
/// statement with arrays is planned on each execution, because the plan depends on their length, so a
/// single call is sent without them. The lock table is part of the statement only if a call reads it.
pub(crate) async fn call_all(
    conn: &mut PgConnection,
    calls: &[(KeyId, Call)],
) -> Result<Called, sqlx::Error> {
    macro_rules! call {
        ($number:literal, $function:literal, $arguments:expr) => {
            concat!(
                "WHEN call OPERATOR(pg_catalog.=) ",
                $number,
                " THEN pg_catalog.",
                $function,
                "(",
                $arguments,
                ")"
            )
        };
    }
    macro_rules! statement {
        ($other:expr) => {
            concat!(
                "SELECT pg_catalog.pg_backend_pid(), pg_catalog.string_agg(CASE WHEN CASE ",
                call!(0, "pg_try_advisory_lock", "k"), " ",
                call!(1, "pg_try_advisory_lock", pair!()), " ",
                call!(2, "pg_advisory_unlock", "k"), " ",
                call!(3, "pg_advisory_unlock", pair!()), " ",
                call!(4, "pg_try_advisory_lock_shared", "k"), " ",
                call!(5, "pg_try_advisory_lock_shared", pair!()), " ",
                call!(6, "pg_advisory_unlock_shared", "k"), " ",
                call!(7, "pg_advisory_unlock_shared", pair!()), " ",
                call!(8, "pg_advisory_lock_shared", "k"), " IS NOT NULL ",
                call!(9, "pg_advisory_lock_shared", pair!()), " IS NOT NULL ",
                $other,
                "END THEN '1' ELSE '0' END, '') FROM ROWS FROM (\
                 pg_catalog.unnest($1::bigint[]), pg_catalog.unnest($2::smallint[])) AS calls (k, call)"
            )
        };
    }
    if let &[(key, call)] = calls
        && let Some(function) = call.function()
    {
        let statement =
            format!("SELECT pg_catalog.pg_backend_pid(), {function}({})", parameters(key));
        let row = bind(statement, key).fetch_one(conn).await?;
        return Ok(Called { backend_pid: row.try_get(0)?, answers: vec![row.try_get(1)?] });
    }
    let statement = if calls.iter().any(|(_, call)| *call == Call::IsWaitedFor) {
        // The same condition as in `place`, for a key that is a column.
        statement!(
            "ELSE EXISTS (SELECT FROM pg_catalog.pg_lock_status() AS l \
             WHERE l.locktype OPERATOR(pg_catalog.=) 'advisory' AND NOT l.granted \
             AND l.database OPERATOR(pg_catalog.=) (SELECT d.oid FROM pg_catalog.pg_database AS d \
               WHERE d.datname OPERATOR(pg_catalog.=) pg_catalog.current_database()) \
             AND l.classid::bigint OPERATOR(pg_catalog.=) \
               ((k OPERATOR(pg_catalog.>>) 32) OPERATOR(pg_catalog.&) 4294967295) \
             AND l.objid::bigint OPERATOR(pg_catalog.=) (k OPERATOR(pg_catalog.&) 4294967295) \
             AND l.objsubid OPERATOR(pg_catalog.=) (call OPERATOR(pg_catalog.-) 9)) "
        )
    } else {
        statement!("")
    };
    let keys: Vec<i64> = calls.iter().map(|&(key, _)| packed(key)).collect();
    let numbers: Vec<i16> = calls.iter().map(|&(key, call)| call.number(key)).collect();
    let row = sqlx::query(statement).bind(keys).bind(numbers).fetch_one(conn).await?;
    let answers: &str = row.try_get(1)?;
    let answers = answers.bytes().map(|answer| answer == b'1').collect();
    Ok(Called { backend_pid: row.try_get(0)?, answers })
}
