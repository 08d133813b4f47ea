//! The values of settings, as `SHOW` and `current_setting` print them.

/// Returns a time in milliseconds, or `None` if it is not printed as a time.
///
/// The server prints a time in the largest unit that gives an integer: `1s`, `1500ms`, `2min`. A bare
/// number is 0, or in the setting's own unit (the TCP settings): it is returned unchanged.
pub(crate) fn milliseconds(setting: &str) -> Option<i64> {
    let setting = setting.trim();
    let (number, unit) =
        setting.split_at(setting.find(char::is_alphabetic).unwrap_or(setting.len()));
    let number: i64 = number.trim().parse().ok()?;
    match unit {
        "us" => Some(number / 1000),
        "" | "ms" => Some(number),
        "s" => number.checked_mul(1000),
        "min" => number.checked_mul(60_000),
        "h" => number.checked_mul(3_600_000),
        "d" => number.checked_mul(86_400_000),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_unit_that_the_server_prints_is_converted() {
        for (printed, expected) in [
            ("0", Some(0)),
            ("200", Some(200)),
            ("1500ms", Some(1500)),
            ("1s", Some(1000)),
            ("-1", Some(-1)),
            ("2min", Some(120_000)),
            ("3h", Some(10_800_000)),
            ("24d", Some(2_073_600_000)),
            ("2500us", Some(2)),
            ("", None),
            ("on", None),
            ("1 fortnight", None),
        ] {
            assert_eq!(milliseconds(printed), expected, "{printed}");
        }
    }
}
