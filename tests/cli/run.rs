//! `pglock run`: who gets the lock, what the command finds, and how both end.

use std::time::{Duration, Instant};

use pglock::Lock;
use pglock_testkit::{PgBouncer, Server, TestDb};
use sqlx::postgres::PgConnectOptions;

use crate::support::{PGLOCK, Running, hold, locks_are, pglock, run, url};

#[tokio::test]
async fn standard_input_and_output_are_the_commands() {
    let db = TestDb::new().await;
    let mut echo = Running::start(pglock(&db, &["run", "key", "--", "cat"]));
    echo.tell("one").await;
    echo.says("one").await;
    let ended = echo.finish().await;
    assert_eq!((ended.code(), &*ended.output, &*ended.errors), (Some(0), "", ""));
}

#[tokio::test]
async fn the_commands_exit_code_is_passed_through() {
    let db = TestDb::new().await;
    for (script, code) in [("exit 7", 7), ("exit 255", 255), ("kill -TERM $$", 128 + 15)] {
        let ended = run(&db, &["run", "key", "sh", "-c", script]).await;
        assert_eq!((ended.code(), &*ended.errors), (Some(code), ""), "{script}");
    }
}

#[tokio::test]
async fn a_command_that_cannot_be_run_has_the_codes_of_a_shell() {
    let db = TestDb::new().await;
    let missing = run(&db, &["run", "key", "--", "/no/such/command"]).await;
    assert_eq!(missing.code(), Some(127));
    assert!(missing.errors.contains("/no/such/command"), "{}", missing.errors);
    let refused = run(&db, &["run", "key", "--", "/etc/passwd"]).await;
    assert_eq!(refused.code(), Some(126));
}

#[tokio::test]
async fn the_command_finds_the_key_and_a_token_that_grows() {
    let db = TestDb::new().await;
    let args = ["run", "1,2", "--", "sh", "-c", "echo $PGLOCK_KEY; echo $PGLOCK_TOKEN"];
    let mut tokens = Vec::new();
    for _ in 0..3 {
        let ended = run(&db, &args).await;
        let (key, token) = ended.output.split_once('\n').unwrap();
        assert_eq!(key, "1,2");
        tokens.push(token.trim().parse::<u64>().unwrap());
    }
    assert!(tokens.is_sorted_by(|one, next| one < next), "{tokens:?}");
}

#[tokio::test]
async fn a_busy_lock_is_not_waited_for_or_not_for_longer() {
    let db = TestDb::new().await;
    let holder = hold(&db, &["run", "key"]).await;

    let ended = run(&db, &["run", "-n", "key", "--", "echo", "ran"]).await;
    assert_eq!((ended.code(), &*ended.output, &*ended.errors), (Some(1), "", ""));
    let ended = run(&db, &["run", "-n", "-E", "75", "key", "--", "echo", "ran"]).await;
    assert_eq!(ended.code(), Some(75));

    let started = Instant::now();
    // Long enough to connect, which counts.
    let ended = run(&db, &["run", "-w", "4.25", "key", "--", "echo", "ran"]).await;
    assert_eq!((ended.code(), &*ended.output), (Some(1), ""));
    assert!(started.elapsed() >= Duration::from_millis(4_250));

    // Another key is free, and so is the same name as a number.
    assert_eq!(run(&db, &["run", "-n", "other", "true"]).await.code(), Some(0));
    holder.finish().await;
    assert_eq!(run(&db, &["run", "-n", "key", "true"]).await.code(), Some(0));
}

#[tokio::test]
async fn a_busy_lock_is_waited_for() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let holder = hold(&db, &["run", "key"]).await;
    let mut waiter = Running::start(pglock(&db, &["run", "key", "--", "echo", "next"]));
    locks_are(&mut admin, 1, 1).await;
    assert_eq!(holder.finish().await.code(), Some(0));
    waiter.says("next").await;
    assert_eq!(waiter.finish().await.code(), Some(0));
    locks_are(&mut admin, 0, 0).await;
}

#[tokio::test]
async fn a_key_is_that_of_the_library() {
    let (db, pool) = TestDb::with_pool(4).await;
    for (written, mut lock) in [
        ("42", Lock::new(&pool, 42)),
        ("-42", Lock::new(&pool, -42)),
        ("1,2", Lock::new(&pool, (1, 2))),
        ("nightly-report", Lock::new(&pool, "nightly-report")),
        ("name:42", Lock::new(&pool, "42")),
    ] {
        let guard = lock.acquire().await.unwrap();
        assert_eq!(run(&db, &["run", "-n", written, "true"]).await.code(), Some(1), "{written}");
        guard.release().await.unwrap();
        assert_eq!(run(&db, &["run", "-n", written, "true"]).await.code(), Some(0), "{written}");
    }
}

#[tokio::test]
async fn sharers_exclude_only_others() {
    let db = TestDb::new().await;
    let reader = hold(&db, &["run", "--shared", "key"]).await;
    let another = run(&db, &["run", "-n", "--shared", "key", "--", "echo", "in"]).await;
    assert_eq!((another.code(), &*another.output), (Some(0), "in\n"));
    assert_eq!(run(&db, &["run", "-n", "key", "true"]).await.code(), Some(1));
    reader.finish().await;
    assert_eq!(run(&db, &["run", "-n", "key", "true"]).await.code(), Some(0));
}

#[tokio::test]
async fn a_permit_has_a_number_of_its_own() {
    let db = TestDb::new().await;
    let args = ["run", "--permits", "2", "key", "--", "sh", "-c", "echo $PGLOCK_SLOT; cat"];
    let mut first = Running::start(pglock(&db, &args));
    let mut second = Running::start(pglock(&db, &args));
    let mut slots = [first.line().await, second.line().await];
    slots.sort();
    assert_eq!(slots, ["0", "1"]);
    assert_eq!(run(&db, &["run", "--permits", "2", "-n", "key", "true"]).await.code(), Some(1));
    first.finish().await;
    assert_eq!(run(&db, &["run", "--permits", "2", "-n", "key", "true"]).await.code(), Some(0));
    // A larger semaphore has one more.
    assert_eq!(run(&db, &["run", "--permits", "3", "-n", "key", "true"]).await.code(), Some(0));
}

#[tokio::test]
async fn a_missing_database_is_an_error() {
    let unreachable = "postgres://postgres@127.0.0.1:1/postgres";
    for (url, code) in [(unreachable, 69), ("nonsense", 2)] {
        let mut command = tokio::process::Command::new(PGLOCK);
        command.args(["run", "--url", url, "key", "--", "echo", "ran"]).kill_on_drop(true);
        let ended = Running::start(command).finish().await;
        assert_eq!((ended.code(), &*ended.output), (Some(code), ""), "{url}");
        assert!(ended.errors.starts_with("pglock: "), "{}", ended.errors);
        assert_eq!(ended.errors.lines().count(), 1, "{}", ended.errors);
    }
}

#[tokio::test]
async fn without_a_url_the_variables_of_psql_say_where_the_database_is() {
    let db = TestDb::new().await;
    let options = db.options();
    let Some(socket) = options.get_socket() else { return };
    let mut echo = pglock(&db, &["run", "key", "--", "echo", "ran"]);
    echo.env("DATABASE_URL", "").env("PGHOST", socket).env("PGUSER", options.get_username());
    echo.env("PGPORT", options.get_port().to_string()).env("PGDATABASE", db.name());
    let ended = Running::start(echo).finish().await;
    assert_eq!((ended.code(), &*ended.output), (Some(0), "ran\n"), "{}", ended.errors);
}

#[tokio::test]
async fn a_lock_on_a_standby_is_refused() {
    let (primary, standby) = Server::options().start_with_standby();
    is_refused(&primary, standby.connect_options(), "standby").await;
}

#[tokio::test]
async fn a_lock_through_a_pooler_in_transaction_mode_is_refused() {
    let server = Server::start();
    let settings = [("pool_mode", "transaction")];
    let Some(pooler) = PgBouncer::start(&server, &settings) else { return };
    is_refused(&server, pooler.connect_options(), "pooler").await;
}

async fn is_refused(server: &Server, options: PgConnectOptions, word: &str) {
    let db = TestDb::on(server).await;
    let url = url(&options);
    let mut tries = 0;
    let ended = loop {
        tries += 1;
        // A key of its own: what was locked through a pooler may stay for a while.
        let key = format!("key-{tries}");
        let ended = run(&db, &["run", "--url", &url, &key, "--", "echo", "ran"]).await;
        // The command runs if the proof takes longer than an acquire waits for it.
        if ended.code() == Some(78) || tries == 20 {
            break ended;
        }
    };
    assert_eq!((ended.code(), &*ended.output), (Some(78), ""), "{}", ended.errors);
    assert!(ended.errors.contains(word), "{}", ended.errors);
}

#[tokio::test]
async fn a_wrong_command_line_is_an_error() {
    let db = TestDb::new().await;
    for args in [
        &["run", "key"][..],
        &["run", "--shared", "--permits", "2", "key", "true"],
        &["run", "-n", "-w", "1", "key", "true"],
        &["run", "-w", "soon", "key", "true"],
        &["run", "-w=-1", "key", "true"],
        &["run", "--typo", "key", "true"],
        &["run", "--permits", "0", "key", "true"],
        &["run", "-c", "true", "key", "true"],
        // Which a variable that is not set comes to, and a number of another database.
        &["run", "", "true"],
        &["run", "99999999999999999999", "true"],
        &["elect", "--json", "key", "true"],
        &["elect", "--hook", "true", "key", "true"],
    ] {
        assert_eq!(run(&db, args).await.code(), Some(2), "{args:?}");
    }
}
