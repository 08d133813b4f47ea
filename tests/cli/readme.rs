//! The examples of the README and the guide that show what the program prints, as it prints them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use nix::sys::signal::Signal;
use pglock_testkit::TestDb;
use tokio::process::Command;

use crate::support::{LIMIT, PGLOCK, Running, hold, locks_are, pglock};

/// What another process holds where the examples say so.
const KEY: &str = "nightly-report";

/// A line that a person types, and the lines that are printed.
struct Example {
    command: String,
    shown: Vec<String>,
}

#[tokio::test]
async fn the_examples_print_what_they_show() {
    // With a unix socket, which is where the tables say `local`.
    let (server, db) = TestDb::with_server().await;
    let pages = pages();
    let examples: Vec<Example> = pages.iter().flat_map(|page| examples(page)).collect();
    assert!(examples.len() >= 7, "there are examples");
    let mut numbers = BTreeMap::new();
    for example in &examples {
        let printed = play(&db, example).await;
        let mut shown = example.shown.join("\n");
        // Since when a waiter waits is known from there on.
        if server.version() < 14 {
            shown = shown.replace("waiting 1s", "waiting");
        }
        compare(example, &shown, &printed, &mut numbers);
    }
    let real: Vec<_> = numbers.values().collect();
    assert!(real.is_sorted_by(|one, next| one < next), "tokens grow: {numbers:?}");
}

/// The README, and the pages of the guide.
fn pages() -> Vec<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let guide = fs::read_dir(root.join("src/guide")).unwrap().map(|page| page.unwrap().path());
    let mut paths: Vec<PathBuf> = guide.collect();
    paths.sort();
    paths.insert(0, root.join("README.md"));
    paths.iter().map(|path| fs::read_to_string(path).unwrap()).collect()
}

fn examples(page: &str) -> Vec<Example> {
    let blocks = page.split("\n```console\n").skip(1);
    let blocks = blocks.map(|rest| rest.split_once("\n```").unwrap().0);
    let mut examples = Vec::new();
    for block in blocks {
        for line in block.lines() {
            if let Some(command) = line.strip_prefix("$ ") {
                examples.push(Example { command: command.to_owned(), shown: Vec::new() });
            } else {
                let example: &mut Example = examples.last_mut().expect("a line that is typed");
                example.shown.push(line.to_owned());
            }
        }
    }
    examples
}

/// Types the line where things are as its comment says. Returns what is printed.
async fn play(db: &TestDb, Example { command, shown }: &Example) -> String {
    let (typed, comment) = command.split_once(" # ").unwrap_or((command, ""));
    let (holds, waits) = match comment.trim() {
        "" => (false, false),
        "another machine holds it" => (true, false),
        "one holds it, another waits" => (true, true),
        unknown => unreachable!("when is that? {unknown}"),
    };
    let mut admin = db.admin().await;
    let holder = if holds { Some(hold(db, &["run", KEY]).await) } else { None };
    let waiter = waits.then(|| Running::start(pglock(db, &["run", KEY, "true"])));
    locks_are(&mut admin, holds.into(), waits.into()).await;

    let start = || {
        let mut shell = Command::new("bash");
        shell.args(["-c", &format!("exec 2>&1; {typed}")]).kill_on_drop(true);
        let programs = Path::new(PGLOCK).parent().unwrap().display();
        shell.env("PATH", format!("{programs}:{}", std::env::var("PATH").unwrap()));
        shell.env("DATABASE_URL", db.url());
        Running::start(shell)
    };
    let mut printed = String::new();
    if typed.starts_with("pglock elect ") {
        let mut shell = start();
        // It goes on for as long as it is let; what it says at the end is not shown.
        for _ in shown {
            printed.push_str(&shell.line().await);
            printed.push('\n');
        }
        shell.send(Signal::SIGTERM);
        assert_eq!(shell.finish().await.code(), Some(0), "{command}");
    } else {
        let until = Instant::now() + LIMIT;
        loop {
            printed = start().finish().await.output;
            // `ls` may show the proof of exclusion of the holder or the waiter as one more lock.
            if printed.lines().count() == shown.len() || Instant::now() > until {
                break;
            }
        }
    }
    for process in holder.into_iter().chain(waiter) {
        assert_eq!(process.finish().await.code(), Some(0));
    }
    printed
}

/// All is as it is shown, but for what is another number each time.
///
/// A token is the same number wherever the examples show the same one.
fn compare(example: &Example, shown: &str, printed: &str, numbers: &mut BTreeMap<u64, u64>) {
    let command = &example.command;
    let is_table = shown.starts_with("KEY ");
    let differ = || format!("$ {command}\nshown:\n{shown}\nprinted:\n{printed}");
    assert_eq!(shown.lines().count(), printed.lines().count(), "{}", differ());
    let mut before = "";
    let (shown_words, printed_words) = (shown.split_whitespace(), printed.split_whitespace());
    assert_eq!(shown_words.clone().count(), printed_words.clone().count(), "{}", differ());
    for (shown, printed) in shown_words.zip(printed_words) {
        // The name of the machine.
        let printed = printed
            .split_once('@')
            .map_or_else(|| printed.to_owned(), |(name, _)| format!("{name}@db-1"));
        if matches!(before, "token" | "term") {
            let (shown, printed): (u64, u64) = (shown.parse().unwrap(), printed.parse().unwrap());
            assert_eq!(*numbers.entry(shown).or_insert(printed), printed, "{}", differ());
        } else if is_table {
            assert_eq!(without_digits(shown), without_digits(&printed), "{}", differ());
        } else {
            assert_eq!(shown, printed, "{}", differ());
        }
        before = shown;
    }
}

/// Of a pid or an age, what is left.
fn without_digits(word: &str) -> String {
    word.replace(|c: char| c.is_ascii_digit(), "")
}
