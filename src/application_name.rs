//! The `application_name` of sessions, which is all that other clients see of a session without asking it.

use crate::key::Key;
use crate::request::{Need, Request};

/// The maximum length of `application_name`: `NAMEDATALEN` - 1.
const LONGEST: usize = 63;

/// How much of a name is kept beside a long suffix.
const SHORTEST: usize = 16;

/// Returns a name with a suffix. If both are too long together, the name is cut first.
///
/// Characters that are not printable ASCII are replaced. The server would replace them too, but since PostgreSQL 16
/// with four characters for each byte.
pub(crate) fn with_suffix(name: &str, suffix: &str) -> String {
    let room = LONGEST.saturating_sub(suffix.chars().count()).max(SHORTEST);
    shown(name.chars().take(room).chain(suffix.chars()))
}

/// As [`with_suffix`], followed by a rest that is cut before all else.
pub(crate) fn with_rest(name: &str, suffix: &str, rest: &str) -> String {
    shown(with_suffix(name, suffix).chars().chain(rest.chars()))
}

fn shown(text: impl Iterator<Item = char>) -> String {
    let printable = |c| if matches!(c, ' '..='~') { c } else { '?' };
    text.map(printable).take(LONGEST).collect()
}

/// Returns the `application_name` of a session for a request: the name that the application has chosen, and the key.
pub(crate) fn of(name: &str, request: &Request) -> String {
    match request.need {
        // Several locks will share the session.
        Need::Nothing => with_suffix(name, ""),
        Need::All | Need::Any => with_suffix(name, &format!(" {}", of_key(request.key()))),
    }
}

/// Returns the name of a key, or its number.
pub(crate) fn of_key(key: &Key) -> String {
    key.name().map_or_else(|| key.id().to_string(), ToOwned::to_owned)
}

/// Returns the parts of an `application_name` that may be the names of keys. Their hashes decide whether they are.
///
/// The program shows the name in the middle: `pglock run KEY COMMAND@HOST`, and the same with `elect`.
pub(crate) fn names(shown: &str) -> impl Iterator<Item = &str> {
    let suffixes = shown.match_indices(' ').filter_map(|(at, _)| shown.get(at + 1..));
    let program = shown.strip_prefix("pglock ").and_then(|rest| rest.split_once(' '));
    let program = program.and_then(|(_, rest)| rest.rsplit_once(' '));
    let names = program.map(|(key, _)| key).into_iter().chain(suffixes);
    names.flat_map(|name| {
        // The name of a semaphore, whose queue and permits have keys that are derived from its own.
        let semaphore = name.rsplit_once(", ").map(|(semaphore, _)| semaphore);
        [Some(name), semaphore].into_iter().flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_cut_before_what_follows_it() {
        let long = "x".repeat(100);
        assert_eq!(with_suffix("billing", " key"), "billing key");
        assert_eq!(with_suffix("größe", " 1"), "gr??e 1");
        assert_eq!(with_suffix(&long, " key"), format!("{} key", "x".repeat(59)));
        let both = with_suffix(&long, &format!(" {long}"));
        assert_eq!(both, format!("{} {}", "x".repeat(16), "x".repeat(46)));
    }

    #[test]
    fn a_name_is_found_behind_any_space() {
        let found = |shown| names(shown).collect::<Vec<_>>();
        assert_eq!(found("psql"), [""; 0]);
        assert_eq!(
            found("my app nightly report"),
            ["app nightly report", "nightly report", "report"]
        );
        assert_eq!(
            found("app printers, permit 2"),
            ["printers, permit 2", "printers", "permit 2", "2"]
        );
        assert!(found("pglock run nightly report sh@db-1").contains(&"nightly report"));
        assert!(found("pglock elect scheduler sh@db-1").contains(&"scheduler"));
        assert_eq!(found("pglock doctor"), ["doctor"]);
    }
}
