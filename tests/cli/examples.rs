//! The examples that show no output: the scripts of the guide, and those of `--help`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nix::sys::signal::Signal;
use pglock_testkit::TestDb;
use tokio::process::Command;

use crate::support::{PGLOCK, Running};

/// The commands that the examples run.
const COMMANDS: [&str; 8] = [
    "backup.sh",
    "encode",
    "load.sh",
    "make",
    "report.sh",
    "route-to",
    "scheduler",
    "send-invoices",
];

/// A directory in which these commands are.
struct Place(PathBuf);

impl Place {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("pglock-{name}-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        for command in COMMANDS {
            let path = dir.join(command);
            fs::write(&path, format!("#!/bin/sh\necho ran {command}\n")).unwrap();
            fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        Self(dir)
    }

    /// Runs a script in this directory.
    fn run(&self, db: &TestDb, script: &str) -> Running {
        let file = self.0.join("script");
        fs::write(&file, script).unwrap();
        let mut shell = Command::new("bash");
        let programs = Path::new(PGLOCK).parent().unwrap().display();
        let path = format!("{programs}:{}:{}", self.0.display(), std::env::var("PATH").unwrap());
        shell.arg(file).current_dir(&self.0).env("PATH", path).env("POD_NAME", "pod-1");
        shell.env("DATABASE_URL", db.url()).kill_on_drop(true);
        Running::start(shell)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.0));
    }
}

#[tokio::test]
async fn the_scripts_of_the_guide_run() {
    let db = TestDb::new().await;
    let place = Place::new("scripts");
    let page =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/guide/program.md"));
    let page = page.unwrap();
    let scripts = page.split("\n```bash\n").skip(1);
    let scripts: Vec<&str> = scripts.map(|rest| rest.split_once("\n```").unwrap().0).collect();
    let expected = ["ran backup.sh", "publishing report-17, token ", "alone", "", "ran load.sh"];
    assert_eq!(scripts.len(), expected.len());
    for (script, expected) in scripts.into_iter().zip(expected) {
        let ended = place.run(&db, script).finish().await;
        assert_eq!((ended.code(), &*ended.errors), (Some(0), ""), "{script}");
        assert!(ended.output.contains(expected), "{script}\n{}", ended.output);
    }
}

/// A script that holds a lock in a coprocess is ended when the lock is lost.
#[tokio::test]
async fn a_part_of_a_script_ends_with_its_lock() {
    let db = TestDb::new().await;
    let place = Place::new("part");
    let page =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/guide/program.md"));
    let page = page.unwrap();
    let script = page.split("\n```bash\n").find(|script| script.contains("coproc LOCK")).unwrap();
    let script = script.split_once("\n```").unwrap().0;
    let working = "echo inside; while :; do sleep 0.1; done";
    let script = script.replace("count=$((count + 1))", working);
    let mut running = place.run(&db, &script);
    running.says("inside").await;
    crate::support::terminate_holder(&mut db.admin().await).await;
    let ended = running.finish().await;
    assert_eq!(ended.code(), Some(125), "{}", ended.errors);
}

#[tokio::test]
async fn the_examples_of_help_run() {
    let db = TestDb::new().await;
    let place = Place::new("help");
    let mut count = 0;
    for args in [&["-h"][..], &["run", "--help"], &["elect", "--help"]] {
        let help = std::process::Command::new(PGLOCK).args(args).output().unwrap();
        let help = String::from_utf8(help.stdout).unwrap();
        let (_, examples) = help.split_once("Examples:\n").unwrap();
        for line in examples.lines().take_while(|line| line.starts_with("  pglock ")) {
            count += 1;
            let command = line.trim().split("    ").next().unwrap();
            let mut running = place.run(&db, &format!("exec {command}"));
            if command.contains(" elect ") {
                while !running.line().await.starts_with("ran ") {}
                running.send(Signal::SIGTERM);
            }
            let ended = running.finish().await;
            assert!(matches!(ended.code(), Some(0 | 1 | 143)), "{command}: {ended:?}");
            assert!(!ended.errors.contains("error:"), "{command}: {}", ended.errors);
        }
    }
    assert_eq!(count, 11);
}
