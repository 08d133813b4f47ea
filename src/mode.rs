//! How a lock is held: exclusively or shared.

use std::fmt;

/// How a lock is held.
///
/// An exclusive lock excludes all other holders; shared locks admit each other and exclude exclusive
/// ones. These are PostgreSQL's own words, and the only two modes that its [advisory locks] have.
///
/// [advisory locks]: https://www.postgresql.org/docs/current/explicit-locking.html#ADVISORY-LOCKS
///
/// # Examples
///
/// ```
/// use pglock::Mode;
///
/// assert_eq!(Mode::Exclusive.to_string(), "exclusive");
/// ```
#[expect(clippy::exhaustive_enums, reason = "PostgreSQL advisory locks have exactly two modes")]
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[cfg_attr(feature = "serde", derive(serde::Deserialize, serde::Serialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "lowercase"))]
pub enum Mode {
    /// One holder, and no other.
    Exclusive,
    /// Any number of holders, none of them exclusive.
    Shared,
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Exclusive => "exclusive",
            Self::Shared => "shared",
        })
    }
}

/// The modes in which the server has granted a key to a session.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Modes {
    pub(crate) exclusive: bool,
    pub(crate) shared: bool,
}

impl Modes {
    pub(crate) fn only(mode: Mode) -> Self {
        Self { exclusive: mode == Mode::Exclusive, shared: mode == Mode::Shared }
    }

    /// Whether locks in these modes cover one in `mode`. An exclusive lock covers a shared one too.
    pub(crate) fn covers(self, mode: Mode) -> bool {
        self.exclusive || self.shared && mode == Mode::Shared
    }

    pub(crate) fn iter(self) -> impl Iterator<Item = Mode> {
        let exclusive = self.exclusive.then_some(Mode::Exclusive);
        exclusive.into_iter().chain(self.shared.then_some(Mode::Shared))
    }
}
