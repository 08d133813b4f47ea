//! What the program says of itself: `--help`, `pglock man`, `pglock completions`.

use std::process::Command;

use crate::support::PGLOCK;

/// What it prints, without any database.
fn says(args: &[&str]) -> String {
    let output = Command::new(PGLOCK).args(args).output().unwrap();
    assert!(output.status.success(), "{args:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

const COMMANDS: [&str; 7] = ["run", "elect", "ls", "who", "kill", "key", "doctor"];

#[test]
fn help_answers_without_a_manual() {
    let all = says(&["--help"]);
    for word in ["completions", "DATABASE_URL", "name:42", "125"].iter().chain(&COMMANDS) {
        assert!(all.contains(word), "{word}: {all}");
    }
    // How a command is replaced by another is an internal detail.
    assert!(!all.contains("become"), "{all}");
    for (command, word) in [
        ("run", "PGLOCK_TOKEN"),
        ("elect", "PGLOCK_TOKEN"),
        ("ls", "waiting_since"),
        ("who", "waiting_since"),
        ("kill", "pg_signal_backend"),
        ("doctor", "Exit codes:"),
    ] {
        assert!(says(&[command, "--help"]).contains(word), "{command}");
    }
}

#[test]
fn each_command_has_a_manual_page() {
    assert!(says(&["man"]).contains(".TH pglock 1"));
    for command in ["completions", "man"].iter().chain(&COMMANDS) {
        let page = says(&["man", command]);
        assert!(page.contains(&format!(".TH pglock-{command} 1")), "{page}");
    }
    let unknown = Command::new(PGLOCK).args(["man", "dance"]).output().unwrap();
    assert_eq!(unknown.status.code(), Some(2));
}

#[test]
fn each_shell_can_complete_the_commands() {
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let script = says(&["completions", shell]);
        assert!(script.contains("doctor") && script.contains("permits"), "{shell}");
    }
}

/// As `head` does when it has seen enough.
#[test]
fn output_that_is_not_read_is_no_failure() {
    for args in ["completions bash", "man run", "key name", "--help"] {
        let script = format!("\"$0\" {args} | true; echo ${{PIPESTATUS[0]}}");
        let output = Command::new("bash").args(["-c", &script, PGLOCK]).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), "0\n", "{args}");
        assert!(output.stderr.is_empty(), "{args}: {output:?}");
    }
}
