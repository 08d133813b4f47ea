//! `pglock ls --watch` in a terminal.

use pglock_testkit::TestDb;

use crate::ls::sql;
use crate::terminal::Terminal;

#[tokio::test]
async fn it_fits_scrolls_and_leaves_the_screen_as_it_was() {
    let db = TestDb::new().await;
    let Some(terminal) = Terminal::open(&db).await else { return };
    let mut admin = db.admin().await;
    sql(&mut admin, "SELECT count(pg_advisory_lock(i)) FROM generate_series(1, 200) AS i").await;
    terminal.types("echo be\"\"fore; pglock ls --watch");
    terminal.shows("200 held, 0 waiting, by key").await;
    // The last row that fits.
    terminal.shows("\n48 ").await;
    let screen = terminal.screen();
    let lines: Vec<&str> = screen.lines().collect();
    assert!(!screen.contains("before") && lines[0].contains(" UTC  "), "{screen}");
    assert!(lines[1].starts_with("KEY ") && lines[2].starts_with("1 "), "{screen}");
    assert!(lines.len() <= 50 && screen.contains("rows 1 to 48"), "{screen}");

    terminal.presses("End");
    terminal.shows("rows 153 to 200").await;
    terminal.shows("\n200 ").await;
    terminal.presses("PageUp");
    terminal.shows("rows 106 to 153").await;
    terminal.presses("Home");
    terminal.presses("Down");
    terminal.shows("rows 2 to 49").await;
    terminal.presses("s");
    terminal.shows("longest wait first").await;
    terminal.presses("s");
    terminal.shows("oldest session first").await;

    terminal.presses("q");
    terminal.exit_code_is(0).await;
    let screen = terminal.screen();
    assert!(screen.contains("before") && !screen.contains("held"), "{screen}");
    // What is typed is shown again.
    terminal.types("echo vis\"\"ible");
    terminal.shows("\nvisible\n").await;
    assert!(terminal.screen().contains("echo vis"), "{}", terminal.screen());
}

#[tokio::test]
async fn a_signal_leaves_the_screen_too() {
    let db = TestDb::new().await;
    let Some(terminal) = Terminal::open(&db).await else { return };
    terminal.types("pglock ls --watch");
    terminal.shows("0 held").await;
    terminal.presses("C-z");
    terminal.shows("Stopped").await;
    assert!(!terminal.screen().contains("0 held"), "{}", terminal.screen());
    terminal.types("fg");
    terminal.shows("0 held").await;
    terminal.presses("C-c");
    terminal.exit_code_is(130).await;
    terminal.types("clear; echo; timeout --foreground -s TERM 1 pglock ls --watch; echo code-$?");
    terminal.shows("\ncode-124\n").await;
    assert!(!terminal.screen().contains("0 held"), "{}", terminal.screen());
}
