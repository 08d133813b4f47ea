//! Checks the rules that no history may break. The check is pure: it takes rows, and returns violations.
//!
//! The insert of a row draws its number from a sequence. So if one insert ends before another one begins, the later
//! row has the greater number. A row that is written through a lock's own session is written while that session
//! holds the lock. So on one key, all rows that one hold wrote in that way have smaller numbers than all rows that
//! the next hold wrote. A begin, and a write that the register guards, draw their numbers while they have the
//! register's row locked. So these rows are numbered in the order in which the register saw them, whatever session
//! they came through.
//!
//! A hold of a manager writes nothing through the lock's session. All its writes are fenced: the register refuses
//! even its begin if the next hold has begun. That alone proves nothing about the lock, because the register keeps
//! the order; but a holder that was refused was not alone, so its release must not succeed.
//!
//! So the rules prove that between the begin of a hold that was released in order, and its last write, no
//! other hold of the key began, of whichever kind. They do not detect an overlap in which neither hold writes
//! any more, or one that is reported as a loss.

use std::collections::{HashMap, HashSet};
use std::fmt;

/// One row of the history.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Row {
    /// Drawn from a sequence inside the insert.
    pub(crate) id: i64,
    /// The time of the insert. It is only for the reader, because the rules don't trust clocks.
    pub(crate) at: String,
    pub(crate) key: i64,
    /// The fencing token, which identifies the hold.
    pub(crate) token: i64,
    pub(crate) kind: Kind,
    pub(crate) worker: i32,
    /// The pid of the backend that wrote the row.
    pub(crate) pid: i32,
}

/// The event that a row records.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Kind {
    /// A hold began, which raises the register to its token. Written through the lock's session, or admitted by the
    /// register.
    Begin,
    /// A hold was about to end. Written through the lock's session.
    End,
    /// The register admitted a write through a connection of the pool.
    Guarded,
    /// The loss of the hold was reported to the worker. Written through the pool.
    Lost,
    /// The register refused a write, or the begin. Written through the pool.
    Refused,
    /// The server confirmed that the hold was kept to its end. Written through the pool.
    Released,
    /// The holder wrote through the lock's session.
    Write,
}

/// A rule that every row must follow.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Rule {
    /// All rows of a hold come after its begin.
    Begun,
    /// The register admits no row of a hold after the next hold has begun.
    Fenced,
    /// Tokens grow from begin to begin.
    Growing,
    /// A holder that was refused has lost the lock, and its release reports that.
    Kept,
    /// All rows through the lock's session come before the end of the hold.
    NotEnded,
    /// All rows of a hold through the lock's session come from one session.
    OneSession,
    /// All rows through the lock's session come before the next hold begins.
    Alone,
    /// The register refuses a hold only if the next one has begun.
    RefusedWithReason,
    /// No two keys have a token in common.
    Unique,
}

/// A row that breaks a rule.
#[derive(Debug, Eq, PartialEq)]
pub(crate) struct Violation<'h> {
    pub(crate) rule: Rule,
    pub(crate) row: &'h Row,
}

/// Returns all violations in a history, whose rows are in the order of their numbers.
pub(crate) fn check(history: &[Row]) -> Vec<Violation<'_>> {
    let mut checker = Checker::default();
    let broken = |row| checker.broken_by(row).into_iter().map(move |rule| Violation { rule, row });
    history.iter().flat_map(broken).collect()
}

/// The state of the check after the rows so far.
#[derive(Debug, Default)]
struct Checker {
    /// The holds that have begun, by token.
    holds: HashMap<i64, Hold>,
    /// The token of the hold that began last, by key.
    latest: HashMap<i64, i64>,
    /// The tokens of the holds that were refused.
    refused: HashSet<i64>,
}

#[derive(Debug)]
struct Hold {
    key: i64,
    pid: i32,
    ended: bool,
}

impl Checker {
    /// Returns the rules that the next row breaks.
    fn broken_by(&mut self, row: &Row) -> Vec<Rule> {
        let Row { key, token, kind, pid, .. } = *row;
        let latest = self.latest.get(&key).copied();
        if kind == Kind::Begin {
            self.latest.insert(key, token);
            let before = self.holds.insert(token, Hold { key, pid, ended: false });
            return broken([
                (Rule::Growing, latest.is_none_or(|latest| latest < token)),
                (Rule::Unique, before.is_none_or(|before| before.key == key)),
            ]);
        }
        let was_refused = self.refused.contains(&token);
        if kind == Kind::Refused {
            self.refused.insert(token);
        }
        let Some(hold) = self.holds.get_mut(&token).filter(|hold| hold.key == key) else {
            return match kind {
                // The hold came too late to begin.
                Kind::Refused => {
                    let late = latest.is_some_and(|latest| latest > token);
                    broken([(Rule::RefusedWithReason, late)])
                }
                Kind::Released if was_refused => vec![Rule::Kept],
                Kind::Lost if was_refused => Vec::new(),
                Kind::Begin
                | Kind::End
                | Kind::Guarded
                | Kind::Lost
                | Kind::Released
                | Kind::Write => vec![Rule::Begun],
            };
        };
        let succeeded = latest != Some(token);
        match kind {
            Kind::Guarded => broken([(Rule::Fenced, !succeeded)]),
            Kind::Refused => broken([(Rule::RefusedWithReason, succeeded)]),
            Kind::Released => broken([(Rule::Kept, !was_refused)]),
            // A loss may be reported late, and proves nothing about the lock.
            Kind::Lost => Vec::new(),
            Kind::Begin | Kind::End | Kind::Write => {
                let ended = hold.ended;
                hold.ended |= kind == Kind::End;
                broken([
                    (Rule::Alone, !succeeded),
                    (Rule::NotEnded, !ended),
                    (Rule::OneSession, hold.pid == pid),
                ])
            }
        }
    }
}

fn broken<const RULES: usize>(rules: [(Rule, bool); RULES]) -> Vec<Rule> {
    rules.into_iter().filter_map(|(rule, holds)| (!holds).then_some(rule)).collect()
}

impl Kind {
    /// Returns the kind that has this name in the database.
    pub(crate) fn named(name: &str) -> Option<Self> {
        use Kind::{Begin, End, Guarded, Lost, Refused, Released, Write};
        let all = [Begin, End, Guarded, Lost, Refused, Released, Write];
        all.into_iter().find(|kind| kind.name() == name)
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Begin => "begin",
            Self::End => "end",
            Self::Guarded => "guarded",
            Self::Lost => "lost",
            Self::Refused => "refused",
            Self::Released => "released",
            Self::Write => "write",
        }
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { id, at, key, token, kind, worker, pid } = self;
        write!(f, "{id} at {at}: key {key}, token {token}, {}", kind.name())?;
        write!(f, " by worker {worker} through session {pid}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Makes a history of one key from the kind and the token of each row.
    fn history(rows: &[(Kind, i64)]) -> Vec<Row> {
        let numbered = (1..).zip(rows);
        numbered.map(|(id, &(kind, token))| row(id, 1, token, kind)).collect()
    }

    /// Makes a row of a hold that has a session and a worker of its own.
    fn row(id: i64, key: i64, token: i64, kind: Kind) -> Row {
        let own = i32::try_from(token).unwrap();
        Row { id, at: String::new(), key, token, kind, worker: own, pid: 100 + own }
    }

    /// Asserts that the last row breaks this rule, and that there is no other violation.
    #[track_caller]
    fn forged(history: &[Row], rule: Rule) {
        let row = history.last().unwrap();
        assert_eq!(check(history), [Violation { rule, row }]);
        assert_eq!(check(&history[..history.len() - 1]), []);
    }

    #[test]
    fn nothing_is_wrong_with_no_history() {
        assert_eq!(check(&[]), []);
    }

    #[test]
    fn nothing_is_wrong_with_holds_that_follow_each_other() {
        use Kind::{Begin, End, Guarded, Write};
        let history = [(Begin, 5), (Write, 5), (Guarded, 5), (End, 5), (Begin, 9), (End, 9)];
        assert_eq!(check(&self::history(&history)), []);
    }

    #[test]
    fn nothing_is_wrong_with_a_hold_that_was_lost_and_refused() {
        use Kind::{Begin, Guarded, Lost, Refused, Write};
        let history = [(Begin, 5), (Write, 5), (Begin, 9), (Refused, 5), (Lost, 5), (Guarded, 9)];
        assert_eq!(check(&self::history(&history)), []);
    }

    #[test]
    fn a_late_write_without_a_later_holder_is_accepted() {
        use Kind::{Begin, End, Guarded, Lost};
        let history = [(Begin, 5), (End, 5), (Lost, 5), (Guarded, 5), (Begin, 9)];
        assert_eq!(check(&self::history(&history)), []);
    }

    #[test]
    fn holds_of_two_keys_may_overlap_and_begin_in_any_order() {
        let begins = [row(1, 1, 9, Kind::Begin), row(2, 2, 5, Kind::Begin)];
        let ends = [row(3, 1, 9, Kind::End), row(4, 2, 5, Kind::End)];
        assert_eq!(check(&[begins, ends].concat()), []);
    }

    #[test]
    fn a_write_after_the_next_begin_is_found() {
        use Kind::{Begin, End, Write};
        forged(&history(&[(Begin, 5), (Begin, 9), (Write, 5)]), Rule::Alone);
        forged(&history(&[(Begin, 5), (Begin, 9), (End, 9), (End, 5)]), Rule::Alone);
    }

    #[test]
    fn a_guarded_write_after_the_next_begin_is_found() {
        use Kind::{Begin, Guarded};
        forged(&history(&[(Begin, 5), (Begin, 9), (Guarded, 5)]), Rule::Fenced);
    }

    #[test]
    fn a_token_that_does_not_grow_is_found() {
        use Kind::{Begin, End};
        forged(&history(&[(Begin, 9), (End, 9), (Begin, 5)]), Rule::Growing);
        forged(&history(&[(Begin, 9), (End, 9), (Begin, 9)]), Rule::Growing);
    }

    #[test]
    fn a_token_of_two_keys_is_found() {
        forged(&[row(1, 1, 5, Kind::Begin), row(2, 2, 5, Kind::Begin)], Rule::Unique);
    }

    #[test]
    fn a_write_without_a_begin_is_found() {
        use Kind::{Begin, Guarded, Write};
        forged(&history(&[(Begin, 5), (Write, 9)]), Rule::Begun);
        forged(&history(&[(Begin, 5), (Guarded, 9)]), Rule::Begun);
        forged(&[row(1, 1, 5, Begin), row(2, 2, 5, Write)], Rule::Begun);
    }

    #[test]
    fn a_write_after_the_end_is_found() {
        use Kind::{Begin, End, Write};
        forged(&history(&[(Begin, 5), (End, 5), (Write, 5)]), Rule::NotEnded);
    }

    #[test]
    fn a_write_through_another_session_is_found() {
        let elsewhere = Row { pid: 7, ..row(2, 1, 5, Kind::Write) };
        forged(&[row(1, 1, 5, Kind::Begin), elsewhere], Rule::OneSession);
    }

    #[test]
    fn a_write_that_was_refused_without_a_reason_is_found() {
        use Kind::{Begin, Refused};
        forged(&history(&[(Begin, 5), (Refused, 5)]), Rule::RefusedWithReason);
        forged(&history(&[(Begin, 5), (Begin, 9), (Refused, 9)]), Rule::RefusedWithReason);
    }

    #[test]
    fn nothing_is_wrong_with_a_hold_that_came_too_late_to_begin() {
        use Kind::{Begin, Lost, Refused, Released};
        let history = [(Begin, 9), (Refused, 5), (Lost, 5), (Refused, 5), (Released, 9)];
        assert_eq!(check(&self::history(&history)), []);
        forged(&self::history(&[(Begin, 5), (Refused, 9)]), Rule::RefusedWithReason);
    }

    #[test]
    fn a_hold_that_was_refused_and_kept_is_found() {
        use Kind::{Begin, Guarded, Refused, Released};
        let history = [(Begin, 5), (Guarded, 5), (Begin, 9), (Refused, 5), (Released, 5)];
        forged(&self::history(&history), Rule::Kept);
        forged(&self::history(&[(Begin, 9), (Refused, 5), (Released, 5)]), Rule::Kept);
    }

    #[test]
    fn a_release_without_a_begin_is_found() {
        forged(&history(&[(Kind::Released, 5)]), Rule::Begun);
    }

    #[test]
    fn a_kind_is_known_by_its_name() {
        assert_eq!(Kind::named("refused"), Some(Kind::Refused));
        assert_eq!(Kind::named("lost "), None);
    }
}
