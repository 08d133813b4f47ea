//! Checks that the history of processes that share locks breaks no rule, although everything that can fail does.
//!
//! `PGLOCK_SOAK_SECONDS` sets the duration (6 by default), and `PGLOCK_SOAK_SEED` repeats the random choices, though
//! not their timing.

#![expect(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    reason = "in a test, what cannot go on panics, and the message says why"
)]

mod checker;
mod worker;
mod chaos;
mod dice;
#[expect(dead_code, reason = "what only the other tests ask")]
#[path = "../it/support.rs"]
mod support;

use std::env;
use std::io::{Write, stdout};
use std::time::{Duration, SystemTime};

use pglock_testkit::{Server, TestDb, eventually};
use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row as _};

use chaos::Chaos;
use checker::{Kind, Row, Violation, check};
use support::locks_are;
use worker::{KEYS, SCHEMA};

/// How long the locks and sessions of killed workers may take to end.
const TIMEOUT: Duration = Duration::from_secs(20);

#[tokio::test]
async fn a_history_full_of_faults_breaks_no_rule() {
    let seconds = number("PGLOCK_SOAK_SECONDS").unwrap_or(6);
    let seed = number("PGLOCK_SOAK_SEED").unwrap_or_else(|| {
        u64::from(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().subsec_nanos())
    });
    tell(&format!("a history of {seconds} s; PGLOCK_SOAK_SEED={seed} repeats its choices"));

    // Committed rows must be there after a crash, because otherwise the history has gaps.
    let durable = Server::options().tcp().setting("synchronous_commit", "on");
    let server = durable.setting("full_page_writes", "on").start();
    let db = TestDb::on(&server).await;
    let mut admin = db.admin().await;
    sqlx::raw_sql(SCHEMA).execute(&mut admin).await.unwrap();
    let register = "INSERT INTO register SELECT key, 0 FROM generate_series(0, $1) AS key";
    sqlx::query(register).bind(KEYS - 1).execute(&mut admin).await.unwrap();
    drop(admin);

    let chaos = Chaos::start(&server, &db, seed).await;
    let faults = chaos.rage(Duration::from_secs(seconds)).await;

    let mut admin = db.admin().await;
    locks_are(&mut admin, 0, TIMEOUT).await;
    nothing_else_is_connected(&mut admin).await;
    let history = read(&mut admin).await;
    let count = |kind| history.iter().filter(|row| row.kind == kind).count();
    let (holds, losses, refused) = (count(Kind::Begin), count(Kind::Lost), count(Kind::Refused));
    tell(&format!(
        "{holds} holds ({} kept to the end, {losses} known to be lost), {} writes past the register \
         and {refused} refused; faults: {faults:?}",
        count(Kind::Released),
        count(Kind::Guarded),
    ));
    let violations = check(&history);
    assert!(violations.is_empty(), "{}", story(&history, &violations));
    // Otherwise the history proves nothing.
    assert!(holds > 5 * usize::try_from(seconds).unwrap(), "too few holds");
    assert!(losses > 0 && refused > 0, "too few losses");
}

fn number(variable: &str) -> Option<u64> {
    env::var(variable).ok().map(|number| number.parse().unwrap())
}

/// Prints a line, also if the test succeeds.
#[expect(clippy::explicit_write, reason = "the test runner keeps what `println!` prints to itself")]
fn tell(line: &str) {
    writeln!(stdout(), "\n{line}").unwrap();
}

async fn nothing_else_is_connected(admin: &mut PgConnection) {
    let admin = tokio::sync::Mutex::new(admin);
    let alone = async || {
        let others = sqlx::query_scalar(
            "SELECT count(*) = 0 FROM pg_stat_activity
             WHERE datname = current_database() AND pid <> pg_backend_pid()",
        );
        others.fetch_one(&mut **admin.lock().await).await.unwrap()
    };
    eventually("the workers' sessions are gone", TIMEOUT, alone).await;
}

async fn read(admin: &mut PgConnection) -> Vec<Row> {
    let rows = sqlx::query(
        "SELECT id, to_char(at, 'HH24:MI:SS.US'), key, token, kind, worker, pid
         FROM event ORDER BY id",
    );
    let rows = rows.fetch_all(admin).await.unwrap();
    let read = |row: &PgRow| Row {
        id: row.get(0),
        at: row.get(1),
        key: row.get(2),
        token: row.get(3),
        kind: Kind::named(row.get(4)).unwrap(),
        worker: row.get(5),
        pid: row.get(6),
    };
    rows.iter().map(read).collect()
}

/// Describes the rows that break a rule, and the events on their keys just before.
fn story(history: &[Row], violations: &[Violation<'_>]) -> String {
    let mut lines = vec![format!("{} rows break a rule", violations.len())];
    for Violation { rule, row } in violations.iter().take(5) {
        lines.push(format!("{rule:?} is broken by the last of these:"));
        let of_key = |before: &&Row| before.key == row.key && before.id <= row.id;
        let before: Vec<&Row> = history.iter().filter(of_key).collect();
        let shown = before.iter().skip(before.len().saturating_sub(15));
        lines.extend(shown.map(|row| format!("    {row}")));
    }
    lines.join("\n")
}
