//! What is locked, as it is written on the command line.

use std::convert::Infallible;
use std::str::FromStr;

use pglock::Key;

/// A key as it is written on the command line.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    pub(crate) key: Key,
    /// As it was written.
    pub(crate) text: String,
}

impl FromStr for Target {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(Self { key: key(text), text: text.to_owned() })
    }
}

fn key(text: &str) -> Key {
    if let Some(name) = text.strip_prefix("name:") {
        return Key::from(name);
    }
    if let Ok(number) = text.parse::<i64>() {
        return Key::from(number);
    }
    if let Some((first, second)) = text.split_once([',', '/'])
        && let (Ok(first), Ok(second)) = (first.parse::<i32>(), second.parse::<i32>())
    {
        return Key::from((first, second));
    }
    Key::from(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_what_it_looks_like() {
        for (text, expected) in [
            ("42", Key::from(42)),
            ("-42", Key::from(-42)),
            ("9223372036854775807", Key::from(i64::MAX)),
            ("9223372036854775808", Key::from("9223372036854775808")),
            ("1,2", Key::from((1, 2))),
            ("-1,-2", Key::from((-1, -2))),
            ("1/2", Key::from((1, 2))),
            ("1/2/3", Key::from("1/2/3")),
            ("1, 2", Key::from("1, 2")),
            ("", Key::from("")),
            ("1,3000000000", Key::from("1,3000000000")),
            ("nightly-report", Key::from("nightly-report")),
            ("name:42", Key::from("42")),
            ("name:name:42", Key::from("name:42")),
        ] {
            assert_eq!(key(text), expected, "{text}");
        }
    }
}
