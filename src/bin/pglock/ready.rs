//! Reports whether a candidate leads, to systemd and with a file.

use std::fs;
use std::path::PathBuf;

use sd_notify::NotifyState;

use crate::exit::{Failure, say};
use crate::target::Target;

/// Publishes the state of a candidate.
///
/// # Drop
///
/// Removes the file. If this process is killed, the guardian of the command does so.
#[derive(Debug)]
pub(crate) struct Readiness {
    file: Option<PathBuf>,
    key: String,
}

impl Readiness {
    /// Reports that the candidate waits, and removes a file that an earlier process has left.
    pub(crate) fn new(file: Option<PathBuf>, key: &Target) -> Self {
        let this = Self { file, key: key.text.clone() };
        this.waits();
        this
    }

    pub(crate) fn leads(&self, term: i64) -> Result<(), Failure> {
        let status = format!("leads {}, term {term}", self.key);
        notify(&[NotifyState::Ready, NotifyState::Status(&status)]);
        let Some(file) = &self.file else { return Ok(()) };
        fs::write(file, format!("{term}\n"))
            .map_err(|error| Failure::System("cannot write the file of --ready-file", error))
    }

    pub(crate) fn waits(&self) {
        notify(&[NotifyState::Status(&format!("waits to lead {}", self.key))]);
        self.remove();
    }

    fn remove(&self) {
        if let Some(file) = &self.file {
            fs::remove_file(file).ok();
        }
    }
}

impl Drop for Readiness {
    fn drop(&mut self) {
        self.remove();
    }
}

fn notify(state: &[NotifyState<'_>]) {
    // Without systemd, `sd_notify::notify` does nothing.
    if let Err(error) = sd_notify::notify(state) {
        say(format_args!("cannot notify systemd: {error}"));
    }
}
