//! `pglock run` in a terminal: ^C for commands that are not in the foreground process group, and for a server that
//! does not answer.

use pglock_testkit::{TestDb, eventually};

use crate::support::{LIMIT, locks_are};
use crate::terminal::Terminal;

#[tokio::test]
async fn ctrl_c_ends_what_has_left_the_process_group() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let Some(terminal) = Terminal::open(&db).await else { return };
    for (command, code) in [
        // timeout(1) exits so when its command dies of SIGINT.
        ("timeout 300 sleep 1000", 130),
        ("setsid sleep 1000", 130),
        ("setsid sh -c 'sleep 1000; echo went-\"\"on'", 130),
        ("sh -c 'sleep 1000; echo went-\"\"on'", 130),
        ("sh -c 'sleep 1000 | cat'", 130),
    ] {
        terminal.types(&format!("clear; pglock run key -- {command}"));
        locks_are(&mut admin, 1, 0).await;
        // The lock is held before the command runs.
        let runs = || async { std::fs::read_dir("/proc").is_err() || runs("sleep 1000", &db) };
        eventually("the command runs", LIMIT, runs).await;
        terminal.presses("C-c");
        terminal.exit_code_is(code).await;
        assert!(!terminal.screen().contains("went-on"), "{}", terminal.screen());
        locks_are(&mut admin, 0, 0).await;
    }
}

/// Whether a process of this database has this command line.
fn runs(command: &str, db: &TestDb) -> bool {
    let wanted = format!("DATABASE_URL={}", db.url());
    let mut pids = std::fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
    pids.any(|path| {
        let line = std::fs::read(path.join("cmdline")).unwrap_or_default();
        let environment = std::fs::read(path.join("environ")).unwrap_or_default();
        line.split(|byte| *byte == 0).collect::<Vec<_>>().join(&b' ')
            == [command.as_bytes(), b" "].concat()
            && environment.split(|byte| *byte == 0).any(|variable| variable == wanted.as_bytes())
    })
}

#[tokio::test]
async fn a_second_ctrl_c_ends_a_wait_for_a_silent_server() {
    let (server, db) = TestDb::with_server().await;
    let Some(terminal) = Terminal::open(&db).await else { return };
    let mut admin = db.admin().await;
    let holder = crate::support::hold(&db, &["run", "key"]).await;
    terminal.types("pglock run key -- echo ran");
    locks_are(&mut admin, 1, 1).await;
    server.pause();
    terminal.presses("C-c");
    terminal.presses("C-c");
    terminal.exit_code_is(130).await;
    // One that connects ends with the first.
    terminal.types("pglock run key -- echo ran");
    terminal.runs("pglock").await;
    terminal.presses("C-c");
    terminal.exit_code_is(130).await;
    server.resume();
    drop(holder);
}
