//! A terminal with a shell in it, and a person who types.

use std::path::PathBuf;
use std::process::{self, Command};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use std::{env, fs};

use pglock_testkit::{TestDb, eventually, program};
use tokio::time::{sleep, timeout};

use crate::support::{LIMIT, PGLOCK};

/// Whose prompt can be waited for.
const SHELL: &str = "PS1='[$?] shell> ' HISTFILE= exec bash --norc --noprofile -i";

/// A terminal of tmux(1), in which bash runs.
///
/// # Drop
///
/// Closes it.
#[derive(Debug)]
pub(crate) struct Terminal {
    tmux: PathBuf,
    dir: PathBuf,
}

impl Terminal {
    /// Opens one, where `pglock` is a command that finds the database. `None`, and the test is skipped, if there is
    /// no tmux.
    pub(crate) async fn open(db: &TestDb) -> Option<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);

        let tmux = program("tmux", "tmux")?;
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = env::temp_dir().join(format!("pglock-tmux-{}-{number}", process::id()));
        fs::create_dir(&dir).unwrap();
        let terminal = Self { tmux, dir };
        let path = env::var("PATH").unwrap();
        let programs = PathBuf::from(PGLOCK);
        let programs = programs.parent().unwrap().to_str().unwrap();
        let mut start = terminal.tmux(&["-f", "/dev/null", "new-session", "-d"]);
        start.args(["-x", "120", "-y", "50", SHELL]);
        start.env("PATH", format!("{programs}:{path}")).env("DATABASE_URL", db.url());
        // It runs that command in the user's shell, which may be one that rejects every login.
        start.env("SHELL", "/bin/sh").env_remove("PROMPT_COMMAND");
        assert!(start.status().unwrap().success());
        terminal.shows("shell>").await;
        Some(terminal)
    }

    /// A file of this terminal, which is removed with it.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Types a line.
    pub(crate) fn types(&self, line: &str) {
        assert!(self.tmux(&["send-keys", "-l", line]).status().unwrap().success());
        self.presses("Enter");
    }

    /// Presses a key, by the name that tmux has for it.
    pub(crate) fn presses(&self, key: &str) {
        assert!(self.tmux(&["send-keys", key]).status().unwrap().success());
    }

    /// Waits until the text is on the screen.
    pub(crate) async fn shows(&self, text: &str) {
        let shown = || async { self.screen().contains(text) };
        eventually(&format!("the terminal shows {text:?}"), LIMIT, shown).await;
    }

    /// Waits until the program is in the foreground, so that a key reaches it and not the shell.
    pub(crate) async fn runs(&self, program: &str) {
        let is_running = || async {
            let shown = ["display-message", "-p", "#{pane_current_command}"];
            self.tmux(&shown).output().unwrap().stdout.trim_ascii() == program.as_bytes()
        };
        eventually(&format!("{program} is in the foreground"), LIMIT, is_running).await;
    }

    /// What is on the screen.
    pub(crate) fn screen(&self) -> String {
        let captured = self.tmux(&["capture-pane", "-p", "-J"]).output().unwrap();
        String::from_utf8(captured.stdout).unwrap()
    }

    /// Waits until the shell prompts, with the exit code of what ran last. What is typed too early may be discarded.
    pub(crate) async fn exit_code_is(&self, code: u8) {
        let prompt = format!("[{code}] shell>");
        let prompts = async {
            while !self.screen().trim_end().ends_with(&prompt) {
                sleep(Duration::from_millis(20)).await;
            }
        };
        let prompted = timeout(LIMIT, prompts).await;
        assert!(prompted.is_ok(), "no {prompt:?}:\n{}", self.screen());
    }

    fn tmux(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.tmux);
        command.arg("-S").arg(self.dir.join("socket")).args(args);
        command
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        drop(self.tmux(&["kill-server"]).output());
        drop(fs::remove_dir_all(&self.dir));
    }
}
