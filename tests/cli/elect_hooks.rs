//! `pglock elect`: what others notice of a leader, and a command that can't be run.

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::path::Path;

use nix::sys::signal::Signal;
use pglock_testkit::{TestDb, eventually};
use serde_json::Value;

use crate::support::{LIMIT, Running, locks_are, pglock, run, terminate_holder};

#[tokio::test]
async fn a_command_that_does_not_exist_is_not_tried_for_ever() {
    let db = TestDb::new().await;
    let ended = run(&db, &["elect", "key", "--", "/no/such/command"]).await;
    assert_eq!(ended.code(), Some(127), "{}", ended.errors);
    assert_eq!(ended.errors.matches("elected, term").count(), 3, "{}", ended.errors);
    let ended = run(&db, &["elect", "--once", "key", "--", "/etc/passwd"]).await;
    assert_eq!(ended.code(), Some(126));
}

#[tokio::test]
async fn the_file_is_there_while_it_leads() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let file = std::env::temp_dir().join(format!("pglock-ready-{}", std::process::id()));
    let script = "echo $PGLOCK_TOKEN; exec sleep 1000";
    let args = ["elect", "--ready-file", file.to_str().unwrap(), "key", "--", "sh", "-c", script];
    // Of a leader that was killed with all of its processes.
    fs::write(&file, "old").unwrap();
    let mut leader = Running::start(pglock(&db, &args));
    let mut term = leader.line().await;
    let is_there = async |term: &str| {
        let shown = || async { fs::read_to_string(&file).is_ok_and(|text| text.trim() == term) };
        eventually("the file shows the term", LIMIT, shown).await;
    };
    let is_gone = async || {
        let gone = || async { !file.exists() };
        eventually("the file is removed", LIMIT, gone).await;
    };
    is_there(&term).await;
    terminate_holder(&mut admin).await;
    term = leader.line().await;
    is_there(&term).await;
    leader.send(Signal::SIGTERM);
    assert_eq!(leader.finish().await.code(), Some(0));
    assert!(!file.exists());
    // A leader that is killed leaves the file to its guardian.
    let mut leader = Running::start(pglock(&db, &args));
    term = leader.line().await;
    is_there(&term).await;
    leader.send(Signal::SIGKILL);
    if cfg!(target_os = "linux") {
        is_gone().await;
    }
    drop(fs::remove_file(file));
}

#[tokio::test]
async fn a_command_does_not_start_if_the_file_cannot_be_written() {
    let db = TestDb::new().await;
    let args = ["elect", "--ready-file", "/no/such/directory/file", "key", "--", "echo", "started"];
    let ended = run(&db, &args).await;
    assert_eq!((ended.code(), &*ended.output), (Some(71), ""), "{}", ended.errors);
}

/// The command lines of the units and of the manifest, with a command that ends at once.
#[tokio::test]
async fn the_units_and_the_manifest_use_options_that_exist() {
    let db = TestDb::new().await;
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("migrations-free-docker");
    let read = |file: &str| fs::read_to_string(directory.join(file)).unwrap();
    let unit = |file: &str| {
        let unit = read(file);
        let start =
            unit.lines().find_map(|line| line.strip_prefix("ExecStart=/usr/local/bin/pglock "));
        start.unwrap().split(' ').map(str::to_owned).collect::<Vec<_>>()
    };
    let manifest = read("kubernetes/leader.yaml");
    let (_, manifest) = manifest.split_once("- pglock\n").unwrap();
    let manifest = manifest.lines().map_while(|line| line.trim().strip_prefix("- "));
    let manifest: Vec<_> = manifest.map(str::to_owned).collect();

    let file = std::env::temp_dir().join(format!("pglock-unit-{}", std::process::id()));
    for start in
        [unit("systemd/pglock-elect@.service"), unit("systemd/pglock-run@.service"), manifest]
    {
        let file = file.to_str().unwrap();
        let places = ["%t/pglock-elect-%i/leads", "/run/pglock/leads"];
        let there =
            |arg: &String| places.iter().fold(arg.clone(), |arg, place| arg.replace(place, file));
        let start: Vec<_> = start.iter().take_while(|arg| *arg != "--").map(there).collect();
        let mut args: Vec<&str> = start.iter().map(String::as_str).collect();
        if args.first() == Some(&"elect") {
            args.insert(1, "--once");
        }
        args.extend(["--", "true"]);
        let ended = run(&db, &args).await;
        assert_eq!(ended.code(), Some(0), "{args:?}: {}", ended.errors);
    }
}

#[tokio::test]
async fn a_start_that_fails_removes_the_file() {
    let db = TestDb::new().await;
    let file = std::env::temp_dir().join(format!("pglock-stale-{}", std::process::id()));
    let path = file.to_str().unwrap();
    for (url, code) in [("postgres://postgres@127.0.0.1:1/postgres", 69), ("nonsense", 2)] {
        // Of a leader that was killed with all of its processes.
        fs::write(&file, "old").unwrap();
        let ended = run(&db, &["elect", "--url", url, "--ready-file", path, "key", "true"]).await;
        assert_eq!(ended.code(), Some(code), "{}", ended.errors);
        assert!(!file.exists(), "{url}");
    }
}

#[tokio::test]
async fn systemd_is_notified() {
    let db = TestDb::new().await;
    let dir = std::env::temp_dir().join(format!("pglock-notify-{}", std::process::id()));
    fs::create_dir_all(&dir).unwrap();
    let path = dir.join("socket");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    let mut command = pglock(&db, &["elect", "billing", "--", "sh", "-c", "exec sleep 1000"]);
    command.env("NOTIFY_SOCKET", &path);
    let leader = Running::start(command);
    let next = || {
        let mut buffer = [0; 200];
        let length = socket.recv(&mut buffer).unwrap();
        String::from_utf8(buffer[..length].to_vec()).unwrap()
    };
    assert_eq!(next(), "STATUS=waits to lead billing\n");
    let leads = next();
    assert!(leads.starts_with("READY=1\nSTATUS=leads billing, term "), "{leads}");
    leader.send(Signal::SIGTERM);
    assert_eq!(next(), "STATUS=waits to lead billing\n");
    leader.finish().await;
    drop(fs::remove_dir_all(dir));
}

#[tokio::test]
async fn a_loss_runs_a_script() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let args = ["elect", "--once", "--on-lost", "echo lost $PGLOCK_KEY", "key", "--", "sh", "-c"];
    let mut leader =
        Running::start(pglock(&db, &[&args[..], &["echo led; exec sleep 1000"]].concat()));
    leader.says("led").await;
    terminate_holder(&mut admin).await;
    leader.says("lost key").await;
    assert_eq!(leader.finish().await.code(), Some(125));
}

#[tokio::test]
async fn an_observer_prints_each_change() {
    let db = TestDb::new().await;
    let mut admin = db.admin().await;
    let mut lines = Running::start(pglock(&db, &["elect", "--observe", "key"]));
    let hook = "echo \"hook <$PGLOCK_LEADER>\"";
    let args = ["elect", "--observe", "--json", "--hook", hook, "key"];
    let mut json = Running::start(pglock(&db, &args));
    assert!(lines.line().await.ends_with("UTC  no leader"));
    json.says("null").await;
    json.says("hook <>").await;

    let leads = ["elect", "--name", "node-7", "key", "--", "sh", "-c", "exec sleep 1000"];
    let leader = Running::start(pglock(&db, &leads));
    locks_are(&mut admin, 1, 0).await;
    let line = lines.line().await;
    assert!(line.contains("  node-7  term "), "{line}");
    let object: Value = serde_json::from_str(&json.line().await).unwrap();
    assert_eq!(object["name"], "node-7");
    assert!(object["term"].is_u64() && object["backend_pid"].is_i64() && object["since"].is_u64());
    json.says("hook <node-7>").await;

    leader.send(Signal::SIGTERM);
    leader.finish().await;
    json.says("null").await;
    lines.send(Signal::SIGTERM);
    assert_eq!(lines.finish().await.code(), Some(128 + 15));
    json.send(Signal::SIGINT);
    assert_eq!(json.finish().await.signal(), Some(2));
}
