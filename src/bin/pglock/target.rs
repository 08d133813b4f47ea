//! Keys as they are written on the command line, and the application name of the session that locks them.

use std::error::Error;
use std::ffi::OsString;
use std::fmt;
use std::path::Path;
use std::str::FromStr;

use nix::unistd::gethostname;
use pglock::Key;

use crate::show;

/// A key as it is written on the command line.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    pub(crate) key: Key,
    /// The argument as the user wrote it.
    pub(crate) text: String,
}

impl FromStr for Target {
    type Err = Box<dyn Error + Send + Sync>;

    /// Rejects an empty argument, which is probably a mistake, as from a shell variable that is not set.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if matches!(text, "" | "name:") {
            return Err("a key can't be empty".into());
        }
        Ok(Self { key: text.parse()?, text: text.to_owned() })
    }
}

impl fmt::Display for Target {
    /// Writes the key as the user wrote it, followed by its number if that looks different.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let number = show::written(&self.key);
        if number == self.text {
            f.write_str(&number)
        } else {
            write!(f, "{:?} ({number})", self.text)
        }
    }
}

/// Returns the application name of a session, which shows what it is for: `pglock run nightly-report report.sh@db-1`.
pub(crate) fn application(verb: &str, key: &str, command: Option<&OsString>) -> String {
    /// The maximum lengths of the key, the command and the host: the server shows 63 bytes of the name.
    const LENGTHS: [usize; 3] = [22, 10, 14];

    let cut = |text: &str, length| -> String {
        // The server shows any other character as several bytes.
        let printable = |c| if matches!(c, ' '..='~') { c } else { '?' };
        text.chars().map(printable).take(length).collect()
    };
    let [key_length, command_length, host_length] = LENGTHS;
    let key = cut(key, key_length);
    let command = command.and_then(|command| Path::new(command).file_name());
    let command = cut(&command.unwrap_or_default().to_string_lossy(), command_length);
    let host = cut(&host(), host_length);
    format!("pglock {verb} {key} {command}@{host}")
}

/// The name of this machine.
pub(crate) fn host() -> String {
    let name = gethostname().ok().and_then(|name| name.into_string().ok());
    name.unwrap_or_else(|| format!("process-{}", std::process::id()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_is_named_within_the_servers_limit() {
        let long = "x".repeat(100);
        let name = application("observe", &long, Some(&format!("/bin/{long}").into()));
        assert!(name.len() <= 63, "{name}");
        let name = application("run", "größe", Some(&"./report.sh".into()));
        assert!(name.starts_with("pglock run gr??e report.sh@"), "{name}");
    }

    #[test]
    fn a_key_that_looks_like_a_mistake_is_refused() {
        for text in ["", "name:", "9223372036854775808"] {
            assert!(text.parse::<Target>().is_err(), "{text:?}");
        }
        for text in ["-", "2026-11-29", "1/2/3", "name:99999999999999999999", "-1,-2", "42"] {
            assert!(text.parse::<Target>().is_ok(), "{text:?}");
        }
    }
}
