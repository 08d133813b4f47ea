//! Splits the URL of a database into connection parameters.

use percent_encoding::percent_decode_str;

use super::parameters::Parameter;
use crate::exit::Failure;

/// Splits `postgres://user:password@host:port/database?parameter=value` into parameters, as libpq does.
pub(super) fn parse(url: &str, source: &str) -> Result<Vec<(&'static str, String)>, Failure> {
    // The message does not contain the URL, because the URL may contain a password.
    let wrong = |what: String| Failure::Usage(format!("{source}: {what}"));
    let Some((scheme, rest)) = url.split_once("://") else {
        return Err(wrong(
            "not the URL of a database; it looks like postgres://user@host/database".to_owned(),
        ));
    };
    if !matches!(scheme, "postgres" | "postgresql") {
        return Err(wrong(format!(
            "{scheme}:// is not a PostgreSQL server; the URL looks like postgres://user@host/database"
        )));
    }
    let decode = |name: &str, text: &str| {
        let decoded = percent_decode_str(text).decode_utf8();
        decoded.map(String::from).map_err(|_| wrong(format!("the {name} is not UTF-8")))
    };
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, database) = rest.split_once('/').unwrap_or((rest, ""));
    if database.contains('@') {
        return Err(wrong(ENCODE.to_owned()));
    }
    let (login, address) = authority.rsplit_once('@').unwrap_or(("", authority));
    let (user, password) = login.split_once(':').unwrap_or((login, ""));
    if address.contains(',') {
        return Err(wrong(LIST.to_owned()));
    }
    let (host, port) = match address.strip_prefix('[').map(|rest| rest.split_once(']')) {
        Some(Some((host, ""))) if !host.is_empty() => (host, ""),
        Some(Some((host, port))) if !host.is_empty() && port.starts_with(':') => {
            (host, port.trim_start_matches(':'))
        }
        Some(_) => return Err(wrong(format!("cannot read the host and port {address:?}"))),
        None => address.rsplit_once(':').unwrap_or((address, "")),
    };
    let mut parameters = Vec::new();
    let parts = [
        ("user", user),
        ("password", password),
        ("host", host),
        ("port", port),
        ("dbname", database),
    ];
    for (name, text) in parts {
        if !text.is_empty() {
            parameters.push((name, decode(name, text)?));
        }
    }
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let Some((name, value)) = pair.split_once('=') else {
            return Err(wrong(hide(query, format!("the parameter {pair:?} has no value"))));
        };
        let (name, mut value) = (decode("parameter", name)?, decode(name, value)?);
        // sqlx has this syntax: options[name]=value.
        let option = name.strip_prefix("options[").and_then(|name| name.strip_suffix(']'));
        let name = if let Some(option) = option {
            let escaped = value.replace('\\', "\\\\").replace(' ', "\\ ");
            value = format!("-c {option}={escaped}");
            "options"
        } else {
            &*name
        };
        // JDBC and libpq accept ssl=true.
        let (name, value) = if (name, &*value) == ("ssl", "true") {
            ("sslmode", "require".to_owned())
        } else {
            (name, value)
        };
        let Some(known) = Parameter::find(name) else {
            let unknown = format!(
                "the parameter {name} is unknown; pglock --help lists those that are supported"
            );
            return Err(wrong(hide(query, unknown)));
        };
        match parameters.iter_mut().find(|(name, _)| *name == "options" && known.keyword == *name) {
            Some((_, options)) => *options = format!("{options} {value}"),
            None => parameters.push((known.keyword, value)),
        }
    }
    Ok(parameters)
}

/// The error for a URL in which a character that is not percent-encoded ends the password too early.
const ENCODE: &str = "percent-encode / ? @ in a password, and @ in the name of a database";

/// Returns the error for a part of the query, or [`ENCODE`] if the part may belong to a password.
fn hide(query: &str, what: String) -> String {
    if query.contains('@') { ENCODE.to_owned() } else { what }
}

/// Why a list of hosts is refused.
pub(super) const LIST: &str = "a list of hosts is not supported, because locks on two servers do not \
    exclude each other; name the primary";

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(url: &str) -> Result<String, String> {
        let parameters = parse(url, "--url").map_err(|failure| failure.to_string())?;
        let parameters: Vec<_> =
            parameters.iter().map(|(name, value)| format!("{name}={value}")).collect();
        Ok(parameters.join(" "))
    }

    #[test]
    fn a_url_is_split_into_its_parts() {
        for (url, parts) in [
            ("postgres://", ""),
            ("postgresql:///db", "dbname=db"),
            ("postgres://x@[::1]:5432/x", "user=x host=::1 port=5432 dbname=x"),
            ("postgres://[::1]/", "host=::1"),
            ("postgres://a:b%40c@h", "user=a password=b@c host=h"),
            ("postgres://%2Ftmp/d?host=/run", "host=/tmp dbname=d host=/run"),
            ("postgres://h?ssl-mode=require&user=u", "host=h sslmode=require user=u"),
            ("postgres://h?options=-c%20a=1&options[b]=x%20y", "host=h options=-c a=1 -c b=x\\ y"),
        ] {
            assert_eq!(parsed(url).as_deref(), Ok(parts), "{url}");
        }
    }

    #[test]
    fn what_is_wrong_with_a_url_is_named() {
        for (url, word) in [
            ("nonsense", "looks like"),
            ("host=x dbname=y", "looks like"),
            ("mysql://h/d", "mysql://"),
            ("postgres://a,b/d", "list of hosts"),
            ("postgres://h/d?sslmod=require", "sslmod is unknown"),
            ("postgres://h/d?sslmode", "has no value"),
            ("postgres://[::1]5432/d", "host and port"),
            ("postgres://[", "host and port"),
            ("postgres://u@[::1/d", "host and port"),
            ("postgres://[]:5432/d", "host and port"),
            ("postgres://%ff/d", "host is not UTF-8"),
            ("postgres://app:secret/word@h/d", "percent-encode"),
            ("postgres://app:se?cret@h/d", "percent-encode"),
            ("postgres://app:se?cret=word@h/d", "percent-encode"),
            ("postgres://app:se?cret&word@h/d", "percent-encode"),
            ("postgres://app:secret/?word=@h/d", "percent-encode"),
        ] {
            let error = parsed(url).unwrap_err();
            assert!(!error.contains("cret") && !error.contains("word@"), "{url}: {error}");
            assert!(error.starts_with("--url: ") && error.contains(word), "{url}: {error}");
        }
    }
}
