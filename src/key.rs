//! The key of a lock: a number, a pair of numbers, or a name.

use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::str::FromStr;
use std::sync::Arc;

use sqlx::postgres::{PgAdvisoryLock, PgAdvisoryLockKey};

/// The key of an advisory lock: a number, a pair of numbers, or a name.
///
/// PostgreSQL has two kinds of key, which never conflict with each other: one `bigint`, and a pair of `int`. A name is
/// hashed to a `bigint`, and the key keeps the name, so that errors and logs can show it. Two keys are equal if they
/// are the same lock on the server, whatever their names.
///
/// Keys belong to a database: the same key in two databases of one server is two locks.
///
/// With the feature `serde`, a key is serialized to the text that its [`FromStr`] reads, and deserialized from it.
///
/// | made from | on the server | the same as |
/// |---|---|---|
/// | `i64`, `i32` | that `bigint` | `pg_advisory_lock(42)` |
/// | `(i32, i32)` | that pair of `int` | `pg_advisory_lock(1, 2)` |
/// | `&str`, `String` | its hash, a `bigint` | sqlx: `PgAdvisoryLock::new("name")` |
/// | [`interop`](crate::interop) | a hash of other libraries | what Go, SQL, Ruby, Python and PHP lock |
///
/// `Key::from("42")` is the *name* 42, and `"42".parse::<Key>()` the *number* 42, as for serde and the program. These
/// are different locks, so make a key in the same way everywhere.
///
/// # Examples
///
/// ```
/// use pglock::Key;
///
/// assert_eq!(Key::from(42).to_string(), "42");
/// assert_eq!(Key::from((1, 2)).to_string(), "(1, 2)");
///
/// let report = Key::from("nightly-report");
/// assert_eq!(report.name(), Some("nightly-report"));
/// assert_eq!(report.to_string(), "\"nightly-report\" (8797529593787444750)");
/// ```
#[derive(Clone)]
pub struct Key {
    id: KeyId,
    name: Option<Arc<str>>,
}

/// A key as the server knows it.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(crate) enum KeyId {
    BigInt(i64),
    IntPair(i32, i32),
}

impl Key {
    /// Returns the name that the key was made from.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::Key;
    ///
    /// assert_eq!(Key::from("invoice-17").name(), Some("invoice-17"));
    /// assert_eq!(Key::from(17).name(), None);
    /// ```
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// Returns the same key with this name.
    pub(crate) fn called(self, name: String) -> Self {
        Self { name: Some(name.into()), ..self }
    }

    /// Returns a key without a name.
    pub(crate) fn from_id(id: KeyId) -> Self {
        Self { id, name: None }
    }

    pub(crate) fn id(&self) -> KeyId {
        self.id
    }
}

impl From<&Self> for Key {
    fn from(key: &Self) -> Self {
        key.clone()
    }
}

impl From<i64> for Key {
    fn from(number: i64) -> Self {
        Self { id: KeyId::BigInt(number), name: None }
    }
}

impl From<i32> for Key {
    /// Makes the same key as the `i64` of that value.
    fn from(number: i32) -> Self {
        Self::from(i64::from(number))
    }
}

impl From<(i32, i32)> for Key {
    fn from((first, second): (i32, i32)) -> Self {
        Self { id: KeyId::IntPair(first, second), name: None }
    }
}

impl From<String> for Key {
    /// Hashes the name exactly as sqlx's [`PgAdvisoryLock::new`] does, so both exclude each other.
    fn from(name: String) -> Self {
        Self { name: Some(Arc::from(name.as_str())), ..Self::from(PgAdvisoryLock::new(name).key()) }
    }
}

impl From<&str> for Key {
    /// Hashes the name exactly as sqlx's [`PgAdvisoryLock::new`] does, so both exclude each other.
    fn from(name: &str) -> Self {
        Self::from(name.to_owned())
    }
}

impl From<&String> for Key {
    /// Hashes the name exactly as sqlx's [`PgAdvisoryLock::new`] does, so both exclude each other.
    fn from(name: &String) -> Self {
        Self::from(name.clone())
    }
}

impl FromStr for Key {
    type Err = ParseKeyError;

    /// Parses a key as it is written on a command line: a number, a pair (`1,2` or `1/2`), otherwise a name. `name:42`
    /// is the name `42`.
    ///
    /// The text that [`Display`](fmt::Display) writes for a key without a name is parsed as the same key.
    ///
    /// # Errors
    ///
    /// If the text is a whole number of more than 64 bits, or a pair of numbers of which one has more than 32.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::Key;
    ///
    /// assert_eq!("42".parse(), Ok(Key::from(42)));
    /// assert_eq!("1,2".parse(), Ok(Key::from((1, 2))));
    /// assert_eq!("name:42".parse(), Ok(Key::from("42")));
    /// assert_eq!("nightly-report".parse(), Ok(Key::from("nightly-report")));
    /// assert_eq!(Key::from((1, 2)).to_string().parse(), Ok(Key::from((1, 2))));
    /// assert!("9223372036854775808".parse::<Key>().is_err());
    /// ```
    fn from_str(text: &str) -> Result<Self, ParseKeyError> {
        if let Some(name) = text.strip_prefix("name:") {
            return Ok(Self::from(name));
        }
        if is_integer(text) {
            return text.parse::<i64>().map(Self::from).map_err(|_| ParseKeyError(()));
        }
        let displayed = text.strip_prefix('(').and_then(|text| text.strip_suffix(')'));
        let pair = match displayed {
            Some(displayed) => displayed.split_once(", "),
            None => text.split_once([',', '/']),
        };
        match pair.filter(|(first, second)| is_integer(first) && is_integer(second)) {
            Some((first, second)) => match (first.parse::<i32>(), second.parse::<i32>()) {
                (Ok(first), Ok(second)) => Ok(Self::from((first, second))),
                (Err(_), _) | (_, Err(_)) => Err(ParseKeyError(())),
            },
            None => Ok(Self::from(text)),
        }
    }
}

/// Whether a text is a whole number, of any size.
fn is_integer(text: &str) -> bool {
    let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
    !digits.is_empty() && digits.bytes().all(|digit| digit.is_ascii_digit())
}

/// A text was parsed as a [`Key`] that looks like a number, or a pair of numbers, but is too large.
///
/// # Examples
///
/// ```
/// use pglock::Key;
///
/// let error = "1,3000000000".parse::<Key>().unwrap_err();
/// assert!(error.to_string().contains("32 bits"));
/// ```
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[expect(missing_copy_implementations, reason = "it may say more later")]
#[error("not a number of 64 bits, or a pair of 32 bits; write name: before a name")]
pub struct ParseKeyError(());

impl From<PgAdvisoryLockKey> for Key {
    fn from(key: PgAdvisoryLockKey) -> Self {
        Self::from(&key)
    }
}

impl From<&PgAdvisoryLockKey> for Key {
    /// Converts sqlx's key.
    ///
    /// # Panics
    ///
    /// If sqlx adds a third kind of key, which PostgreSQL does not have.
    #[expect(
        clippy::panic,
        reason = "sqlx marks its enum as open, but PostgreSQL has just these two kinds of key"
    )]
    fn from(key: &PgAdvisoryLockKey) -> Self {
        match key {
            PgAdvisoryLockKey::BigInt(number) => Self::from(*number),
            PgAdvisoryLockKey::IntPair(first, second) => Self::from((*first, *second)),
            unknown => panic!("BUG: PostgreSQL has no advisory lock key like {unknown:?}"),
        }
    }
}

impl From<&Key> for PgAdvisoryLockKey {
    fn from(key: &Key) -> Self {
        match key.id {
            KeyId::BigInt(number) => Self::BigInt(number),
            KeyId::IntPair(first, second) => Self::IntPair(first, second),
        }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.name, self.id) {
            (Some(name), KeyId::BigInt(number)) => write!(f, "{name:?} ({number})"),
            (Some(name), pair @ KeyId::IntPair(..)) => write!(f, "{name:?} {pair}"),
            (None, id) => write!(f, "{id}"),
        }
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BigInt(number) => write!(f, "{number}"),
            Self::IntPair(first, second) => write!(f, "({first}, {second})"),
        }
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({self})")
    }
}

impl PartialEq for Key {
    fn eq(&self, other: &Self) -> bool {
        self.id == other.id
    }
}

impl Eq for Key {}

impl Ord for Key {
    /// Compares in the order in which a [`MultiLock`](crate::MultiLock) acquires keys.
    fn cmp(&self, other: &Self) -> Ordering {
        self.id.cmp(&other.id)
    }
}

impl PartialOrd for Key {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.id.hash(state);
    }
}
