//! Who leads, for all who want to know.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::time::sleep;

use super::Election;
use crate::error::Result;
use crate::sql::election::Holder;

/// How often an observer looks.
const LOOK: Duration = Duration::from_millis(500);

/// Who leads, as the server shows it.
///
/// # Examples
///
/// As for [`Election::leader`].
#[derive(Clone, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub struct Leader {
    /// The name of the candidate.
    pub name: String,
    /// The term. `None` for a moment after the election, and if another program holds the lock.
    pub term: Option<u64>,
    /// Since when it leads, to the second, by the leader's clock. `None` as for the term.
    pub since: Option<SystemTime>,
    /// The process id of the server's backend for the leader's session.
    pub backend_pid: i32,
    /// The address of the leader. `None` over a unix socket, and where our role may not see it: that
    /// takes the leader's own role, or `pg_read_all_stats`.
    pub client_addr: Option<String>,
}

impl Leader {
    /// As it shows: the name, then term and time in a form that is short and can be read back.
    pub(super) fn show(name: &str, term: u64, since: SystemTime) -> String {
        // NAMEDATALEN - 1.
        const MOST: usize = 63;

        let since = since.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let suffix = format!(" {term}@{since}");
        // The server would do so too, but from PostgreSQL 16 on with four characters for each byte,
        // for which the suffix would be cut off.
        let printable = |c| if matches!(c, ' '..='~') { c } else { '?' };
        let room = MOST.saturating_sub(suffix.len());
        name.chars().map(printable).take(room).chain(suffix.chars()).collect()
    }

    fn read(shown: &str) -> Option<(String, u64, SystemTime)> {
        let (name, suffix) = shown.rsplit_once(' ')?;
        let (term, since) = suffix.split_once('@')?;
        let since = UNIX_EPOCH.checked_add(Duration::from_secs(since.parse().ok()?))?;
        Some((name.to_owned(), term.parse().ok()?, since))
    }
}

impl From<Holder> for Leader {
    fn from(holder: Holder) -> Self {
        let Holder { backend_pid, application_name, client_addr } = holder;
        let (name, term, since) = match Self::read(&application_name) {
            Some((name, term, since)) => (name, Some(term), Some(since)),
            None => (application_name, None, None),
        };
        Self { name, term, since, backend_pid, client_addr }
    }
}

/// Observes who leads: made by [`Election::observe`].
///
/// # Examples
///
/// As for [`Election::observe`].
#[derive(Debug)]
pub struct Observer {
    election: Election,
    /// Whether anything was told, and what last.
    told: bool,
    seen: Option<Leader>,
    /// What the last look saw.
    glimpsed: Option<Leader>,
}

impl Observer {
    pub(super) fn new(election: Election) -> Self {
        Self { election, told: false, seen: None, glimpsed: None }
    }

    /// Returns who leads, at once the first time, and from then on when it is somebody else, or
    /// nobody. Looks every half second; a leader that came and went in between is not seen.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: a change is told by the next call.
    ///
    /// # Errors
    ///
    /// As for [`Election::leader`]. The next call goes on.
    ///
    /// # Examples
    ///
    /// As for [`Election::observe`].
    pub async fn changed(&mut self) -> Result<Option<Leader>> {
        loop {
            let leader = self.election.leader().await?;
            // For a moment after the election, its name does not show. Another program's never does.
            let settled = leader.as_ref().is_none_or(|leader| leader.term.is_some())
                || self.glimpsed == leader;
            self.glimpsed.clone_from(&leader);
            if settled && !(self.told && self.seen == leader) {
                self.told = true;
                self.seen.clone_from(&leader);
                return Ok(leader);
            }
            sleep(LOOK).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_leader_is_read_back_as_it_was_shown() {
        let since = UNIX_EPOCH + Duration::from_secs(1_764_000_007);
        for (name, shown_name) in [
            ("node-7", "node-7"),
            ("two words", "two words"),
            ("", ""),
            (&"long-".repeat(20), &"long-".repeat(20)[..41]),
            ("café \n\0", "caf? ??"),
            (&"é".repeat(50), &"?".repeat(41)),
        ] {
            let shown = Leader::show(name, 4_711_000_000, since);
            assert!(shown.len() <= 63, "{shown}");
            let read = Leader::read(&shown);
            assert_eq!(read, Some((shown_name.to_owned(), 4_711_000_000, since)));
        }
        assert_eq!(Leader::read("psql"), None);
        assert_eq!(Leader::read("a b@c"), None);
    }
}
