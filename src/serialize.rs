//! Serializes keys, locks and findings for other programs: the feature `serde`.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::key::{Key, KeyId};

impl Serialize for Key {
    /// Writes the text that [`FromStr`](std::str::FromStr) reads as this key: `42`, `1,2`, `nightly-report`, or
    /// `name:42` for a name that looks like a number.
    ///
    /// A name that was not hashed by [`Key::from`], but for example by [`interop`](crate::interop), can't be read
    /// back. For such a key, the number is written.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::{Key, interop};
    ///
    /// # fn main() -> serde_json::Result<()> {
    /// assert_eq!(serde_json::to_string(&Key::from("nightly-report"))?, r#""nightly-report""#);
    /// assert_eq!(serde_json::to_string(&Key::from((1, 2)))?, r#""1,2""#);
    /// assert_eq!(serde_json::to_string(&interop::hashtext("a"))?, r#""1075015857""#);
    /// # Ok(()) }
    /// ```
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&text(self))
    }
}

impl<'de> Deserialize<'de> for Key {
    /// Reads a text as [`FromStr`](std::str::FromStr) does.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::Key;
    ///
    /// # fn main() -> serde_json::Result<()> {
    /// let key: Key = serde_json::from_str(r#""nightly-report""#)?;
    /// assert_eq!(key.name(), Some("nightly-report"));
    /// # Ok(()) }
    /// ```
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

/// Returns the text that is read as this key; if possible, one from which the name is read too.
fn text(key: &Key) -> String {
    if let Some(name) = key.name() {
        for text in [name.to_owned(), format!("name:{name}")] {
            let read = text.parse();
            if read.is_ok_and(|read: Key| read == *key && read.name() == Some(name)) {
                return text;
            }
        }
    }
    match key.id() {
        KeyId::BigInt(number) => number.to_string(),
        KeyId::IntPair(first, second) => format!("{first},{second}"),
    }
}

/// Writes a key without its name, and then the name, as two fields of the struct that has this key.
pub(crate) fn key_and_name<S: Serializer>(key: &Key, serializer: S) -> Result<S::Ok, S::Error> {
    #[derive(Serialize)]
    struct Fields<'k> {
        key: Key,
        name: Option<&'k str>,
    }

    Fields { key: Key::from_id(key.id()), name: key.name() }.serialize(serializer)
}

/// Writes a time in seconds since 1970, with a fraction.
pub(crate) fn seconds<S: Serializer>(time: &SystemTime, serializer: S) -> Result<S::Ok, S::Error> {
    since_1970(time).serialize(serializer)
}

/// Writes a time that may not be known, as [`seconds`] does.
#[expect(clippy::ref_option, reason = "that is what serde passes")]
pub(crate) fn maybe_seconds<S: Serializer>(
    time: &Option<SystemTime>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    time.as_ref().map(since_1970).serialize(serializer)
}

/// Writes a time that is known to the second, in whole seconds since 1970.
#[expect(clippy::ref_option, reason = "that is what serde passes")]
pub(crate) fn whole_seconds<S: Serializer>(
    time: &Option<SystemTime>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    let since = time.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    since.map(|since| since.as_secs()).serialize(serializer)
}

fn since_1970(time: &SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::{Value, from_value, json, to_value};

    use super::*;
    use crate::doctor::{Finding, Severity};
    use crate::election::Leader;
    use crate::inspect::{LockInfo, Session};
    use crate::interop;
    use crate::mode::Mode;

    #[test]
    fn a_key_is_the_text_that_is_read_as_it() {
        for (key, text) in [
            (Key::from(-42), "-42"),
            (Key::from((1, -2)), "1,-2"),
            (Key::from("nightly-report"), "nightly-report"),
            (Key::from("42"), "name:42"),
            (Key::from("1,2"), "name:1,2"),
            (Key::from("(1, 2)"), "name:(1, 2)"),
            (Key::from("name:x"), "name:name:x"),
            (Key::from(""), ""),
        ] {
            assert_eq!(to_value(&key).unwrap(), text);
            let read: Key = from_value(json!(text)).unwrap();
            assert_eq!((&read, read.name()), (&key, key.name()));
        }
        // The name alone would be read as another key.
        assert_eq!(to_value(interop::with_advisory_lock("job")).unwrap(), "2077810936,0");
        assert!(from_value::<Key>(json!(42)).is_err());
    }

    #[test]
    fn a_mode_is_read_as_it_is_written() {
        for (mode, text) in [(Mode::Exclusive, "exclusive"), (Mode::Shared, "shared")] {
            assert_eq!(to_value(mode).unwrap(), text);
            assert_eq!(mode.to_string(), text);
            assert_eq!(from_value::<Mode>(json!(text)).unwrap(), mode);
        }
    }

    /// Other programs read these names.
    #[test]
    fn a_lock_has_the_fields_that_are_documented() {
        let at = |millis| UNIX_EPOCH + Duration::from_millis(millis);
        let session = Session {
            backend_pid: 17,
            started_at: Some(at(1_500)),
            user: Some("app".to_owned()),
            application_name: Some("node-7 5@1764000000".to_owned()),
            client_addr: None,
            state: Some("idle".to_owned()),
            state_since: Some(at(2_500)),
            transaction_since: None,
            query_since: Some(at(2_250)),
        };
        let leader = Leader {
            name: "node-7".to_owned(),
            term: Some(5),
            since: Some(at(1_764_000_000_000)),
            backend_pid: 17,
            client_addr: Some("10.0.0.1".to_owned()),
        };
        let lock = LockInfo {
            key: Key::from("42"),
            mode: Mode::Exclusive,
            held: true,
            waiting_since: None,
            blocked_by: vec![0, 3],
            session: Some(session),
            prepared: None,
            leader: Some(leader),
            seen_at: at(3_750),
        };
        let expected = json!({
            "key": Key::from_id(lock.key.id()),
            "name": "42",
            "mode": "exclusive",
            "held": true,
            "waiting_since": null,
            "blocked_by": [0, 3],
            "session": {
                "backend_pid": 17,
                "started_at": 1.5,
                "user": "app",
                "application_name": "node-7 5@1764000000",
                "client_addr": null,
                "state": "idle",
                "state_since": 2.5,
                "transaction_since": null,
                "query_since": 2.25,
            },
            "prepared": null,
            "leader": {
                "name": "node-7",
                "term": 5,
                "since": 1_764_000_000,
                "backend_pid": 17,
                "client_addr": "10.0.0.1",
            },
            "seen_at": 3.75,
        });
        assert_eq!(to_value(&lock).unwrap(), expected);
        let unnamed = LockInfo { key: Key::from((1, 2)), waiting_since: Some(at(500)), ..lock };
        let value = to_value(&unnamed).unwrap();
        assert_eq!([&value["key"], &value["name"]], [&json!("1,2"), &Value::Null]);
        assert_eq!(value["waiting_since"], 0.5);
    }

    #[test]
    fn a_finding_has_the_fields_that_are_documented() {
        let finding = Finding {
            check: "primary",
            severity: Severity::Broken,
            seen: "a hot standby".to_owned(),
            advice: None,
        };
        let expected = json!({
            "check": "primary", "severity": "broken", "seen": "a hot standby", "advice": null
        });
        assert_eq!(to_value(finding).unwrap(), expected);
        for severity in [Severity::Fine, Severity::Warning, Severity::Broken] {
            assert_eq!(to_value(severity).unwrap(), severity.to_string());
        }
    }
}
