//! `pglock run` in a terminal: keys that are signals, jobs, and programs that talk.

use std::fs;
use std::time::Duration;

use pglock_testkit::{TestDb, eventually};
use tokio::time::sleep;

use crate::support::{LIMIT, hold, locks_are, run};
use crate::terminal::Terminal;

#[tokio::test]
async fn ctrl_c_reaches_the_command_once() {
    let db = TestDb::new().await;
    let Some(terminal) = Terminal::open(&db).await else { return };
    terminal.types(
        "pglock run key -- sh -c 'trap \"echo got-\\$((1))\" INT; echo re\"\"ady; \
         while :; do read line && exit 5; done'",
    );
    terminal.shows("ready").await;
    for count in 1..=3 {
        terminal.presses("C-c");
        let caught = || async { terminal.screen().matches("got-1").count() >= count };
        eventually("it is caught", LIMIT, caught).await;
        // What came twice would show by then.
        sleep(Duration::from_millis(300)).await;
        assert_eq!(terminal.screen().matches("got-1").count(), count, "{}", terminal.screen());
    }
}

#[tokio::test]
async fn ctrl_c_ends_the_command_and_the_loop_around_it() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let Some(terminal) = Terminal::open(&db).await else { return };
    terminal.types("for i in 1 2; do echo turn-$i; pglock run key -- sleep 1000; done");
    terminal.shows("turn-1").await;
    locks_are(&mut admin, 1, 0).await;
    terminal.presses("C-c");
    terminal.exit_code_is(130).await;
    assert!(!terminal.screen().contains("turn-2"), "{}", terminal.screen());
    locks_are(&mut admin, 0, 0).await;
}

#[tokio::test]
async fn ctrl_c_ends_the_wait() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let Some(terminal) = Terminal::open(&db).await else { return };
    let holder = hold(&db, &["run", "key"]).await;
    terminal.types("pglock run key -- echo ran");
    locks_are(&mut admin, 1, 1).await;
    terminal.presses("C-c");
    terminal.exit_code_is(130).await;
    locks_are(&mut admin, 1, 0).await;
    holder.finish().await;
}

#[tokio::test]
async fn ctrl_z_stops_the_job_and_fg_goes_on() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let Some(terminal) = Terminal::open(&db).await else { return };
    // It may not stand still for long, which it does on a machine that has much else to do.
    for attempt in 1..=5 {
        let (before, after) = (format!("before-{attempt}"), format!("after-{attempt}"));
        terminal.types("pglock run key -- cat");
        locks_are(&mut admin, 1, 0).await;
        terminal.types(&before);
        terminal.shows(&format!("{before}\n{before}\n")).await;
        terminal.presses("C-z");
        terminal.shows("Stopped").await;
        locks_are(&mut admin, 1, 0).await;
        terminal.types("fg");
        let again = || async { terminal.screen().matches("pglock run key -- cat").count() == 3 };
        eventually("the shell says what goes on", LIMIT, again).await;
        terminal.types(&after);
        let answered = || async {
            let screen = terminal.screen();
            screen.contains(&format!("{after}\n{after}\n")) || screen.contains("is lost")
        };
        eventually("it goes on", LIMIT, answered).await;
        if !terminal.screen().contains("is lost") {
            break;
        }
        assert!(attempt < 5, "it always stood still for too long");
        terminal.exit_code_is(125).await;
        terminal.types("clear");
        let clear = || async { !terminal.screen().contains("Stopped") };
        eventually("the terminal is clear", LIMIT, clear).await;
    }
    assert_eq!(terminal.screen().matches("Stopped").count(), 1, "{}", terminal.screen());
    terminal.presses("C-d");
    terminal.exit_code_is(0).await;
    assert_eq!(run(&db, &["run", "-n", "key", "true"]).await.code(), Some(0));
}

#[tokio::test]
async fn a_job_that_was_stopped_for_too_long_has_lost_its_lock() {
    let db = TestDb::new().await;
    let Some(terminal) = Terminal::open(&db).await else { return };
    terminal.types("pglock run key -- sh -c 'echo re\"\"ady; exec sleep 1000'");
    terminal.shows("ready").await;
    terminal.presses("C-z");
    terminal.shows("Stopped").await;
    // Longer than the heartbeat's interval and deadline.
    sleep(Duration::from_millis(4_500)).await;
    terminal.types("fg");
    terminal.shows("the lock is lost").await;
    terminal.exit_code_is(125).await;
}

#[tokio::test]
async fn a_shell_in_it_has_the_terminal() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let Some(terminal) = Terminal::open(&db).await else { return };
    terminal.types("pglock run key -- bash --norc --noprofile -i");
    locks_are(&mut admin, 1, 0).await;
    terminal.types("tty > /dev/null && echo \"key=$PGLOCK_KEY\"");
    terminal.shows("\nkey=key\n").await;
    // It has job control of its own.
    terminal.types("sh -c 'echo sl\"\"eeping; exec sleep 1000'");
    terminal.shows("\nsleeping\n").await;
    terminal.presses("C-z");
    terminal.shows("Stopped").await;
    terminal.types("fg");
    let again = || async { terminal.screen().matches("exec sleep 1000").count() == 3 };
    eventually("the shell says what goes on", LIMIT, again).await;
    terminal.presses("C-c");
    terminal.exit_code_is(130).await;
    terminal.types("exit 3");
    terminal.exit_code_is(3).await;
    locks_are(&mut admin, 0, 0).await;
}

/// timeout(1) and setsid(1) leave the process group that ^Z stops.
#[tokio::test]
async fn ctrl_z_stops_what_has_left_the_group() {
    let db = TestDb::new().await;
    let Some(terminal) = Terminal::open(&db).await else { return };
    let file = terminal.file("tick");
    let ticks = || fs::read_to_string(&file).unwrap_or_default();
    let goes_on = async |since: String| {
        eventually("the command works", LIMIT, || async { ticks() != since }).await;
    };
    for before in ["timeout 1000", "setsid"] {
        let script = format!("while :; do date +%s%N >{}; sleep 0.02; done", file.display());
        terminal.types(&format!("pglock run key -- {before} sh -c '{script}'"));
        goes_on(ticks()).await;
        terminal.presses("C-z");
        terminal.shows("Stopped").await;
        // The guardian stops the command a moment after the shell has noticed.
        let still = || async {
            let now = ticks();
            sleep(Duration::from_millis(200)).await;
            now == ticks()
        };
        eventually("the command stands still", LIMIT, still).await;
        let stood_still = ticks();
        terminal.types("fg");
        let ended = || async { ticks() != stood_still || terminal.screen().contains("is lost") };
        eventually("it goes on, or it stood still for too long", LIMIT, ended).await;
        terminal.presses("C-c");
        let prompts = || async { terminal.screen().trim_end().ends_with("shell>") };
        eventually("it has ended", LIMIT, prompts).await;
        terminal.types("clear");
        let clear = || async { !terminal.screen().contains("Stopped") };
        eventually("the terminal is clear", LIMIT, clear).await;
    }
}

#[tokio::test]
async fn a_shell_in_it_that_suspends_itself_stops_the_job() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let Some(terminal) = Terminal::open(&db).await else { return };
    terminal.types("pglock run key -- bash --norc --noprofile -i");
    locks_are(&mut admin, 1, 0).await;
    terminal.types("echo \"inner=$PGLOCK_KEY\"; suspend");
    terminal.shows("\ninner=key\n").await;
    terminal.shows("Stopped").await;
    terminal.types("echo \"outer=$PGLOCK_KEY\"");
    terminal.shows("\nouter=\n").await;
    terminal.types("fg");
    let again = || async { terminal.screen().matches("bash --norc --noprofile -i").count() == 3 };
    eventually("the shell says what goes on", LIMIT, again).await;
    terminal.types("echo \"again=$PGLOCK_KEY\"");
    let answered = || async {
        let screen = terminal.screen();
        screen.contains("\nagain=key\n") || screen.contains("is lost")
    };
    eventually("it goes on, or it stood still for too long", LIMIT, answered).await;
    terminal.types("exit 3");
    locks_are(&mut admin, 0, 0).await;
}

#[tokio::test]
async fn ctrl_c_ends_what_the_command_has_left_behind() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let Some(terminal) = Terminal::open(&db).await else { return };
    terminal.types(
        "pglock run --wait-descendants key -- sh -c 'setsid -f sleep 1000; echo $$ st\"\"arted'",
    );
    terminal.shows(" started\n").await;
    locks_are(&mut admin, 1, 0).await;
    let screen = terminal.screen();
    let pid = screen.lines().find_map(|line| line.strip_suffix(" started")).unwrap();
    // Reaped, too: before that, the keys are for the command.
    let reaped = || async { fs::metadata(format!("/proc/{pid}")).is_err() };
    eventually("the command has ended", LIMIT, reaped).await;
    terminal.presses("C-c");
    locks_are(&mut admin, 0, 0).await;
    terminal.exit_code_is(0).await;
}
