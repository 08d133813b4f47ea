//! The connection parameters of libpq, and what this program does with each.

use super::Value;
use crate::exit::Failure;

/// A connection parameter.
#[derive(Debug)]
pub(super) struct Parameter {
    pub(super) keyword: &'static str,
    /// The environment variable that sets it.
    pub(super) env: Option<&'static str>,
    use_: Use,
}

/// How the program treats the value of a parameter.
#[derive(Debug)]
enum Use {
    Honoured,
    /// Ignores the value, because it affects neither a lock nor the security of the connection.
    NoEffect,
    /// Accepts only these values, ignoring case, because they are what the program does anyway.
    Only(&'static [&'static str]),
}

use Use::{Honoured, NoEffect, Only};

const fn parameter(keyword: &'static str, env: &'static str, use_: Use) -> Parameter {
    Parameter { keyword, env: if env.is_empty() { None } else { Some(env) }, use_ }
}

/// All parameters of PostgreSQL 18, and those of a URL of sqlx.
pub(super) const PARAMETERS: [Parameter; 58] = [
    parameter("application_name", "PGAPPNAME", Honoured),
    parameter("connect_timeout", "PGCONNECT_TIMEOUT", Honoured),
    parameter("dbname", "PGDATABASE", Honoured),
    parameter("fallback_application_name", "", Honoured),
    parameter("host", "PGHOST", Honoured),
    parameter("hostaddr", "PGHOSTADDR", Honoured),
    parameter("options", "PGOPTIONS", Honoured),
    parameter("passfile", "PGPASSFILE", Honoured),
    parameter("password", "PGPASSWORD", Honoured),
    parameter("port", "PGPORT", Honoured),
    parameter("requiressl", "PGREQUIRESSL", Honoured),
    parameter("service", "PGSERVICE", Honoured),
    parameter("servicefile", "PGSERVICEFILE", Honoured),
    parameter("sslcert", "PGSSLCERT", Honoured),
    parameter("sslkey", "PGSSLKEY", Honoured),
    parameter("sslmode", "PGSSLMODE", Honoured),
    parameter("sslrootcert", "PGSSLROOTCERT", Honoured),
    parameter("target_session_attrs", "PGTARGETSESSIONATTRS", Honoured),
    parameter("user", "PGUSER", Honoured),
    parameter("channel_binding", "PGCHANNELBINDING", Only(&["disable", "prefer"])),
    parameter("client_encoding", "PGCLIENTENCODING", Only(&["auto", "unicode", "utf-8", "utf8"])),
    parameter("gssdelegation", "PGGSSDELEGATION", Only(&["0"])),
    parameter("gssencmode", "PGGSSENCMODE", Only(&["disable", "prefer"])),
    parameter("load_balance_hosts", "PGLOADBALANCEHOSTS", Only(&["disable"])),
    parameter("max_protocol_version", "PGMAXPROTOCOLVERSION", Only(&["3.0", "3.2", "latest"])),
    parameter("min_protocol_version", "PGMINPROTOCOLVERSION", Only(&["3.0"])),
    parameter("oauth_client_id", "", Only(&[])),
    parameter("oauth_client_secret", "", Only(&[])),
    parameter("oauth_issuer", "", Only(&[])),
    parameter("oauth_scope", "", Only(&[])),
    parameter("replication", "", Only(&["0", "false", "no", "off"])),
    parameter("require_auth", "PGREQUIREAUTH", Only(&[])),
    parameter("requirepeer", "PGREQUIREPEER", Only(&[])),
    parameter("scram_client_key", "", Only(&[])),
    parameter("scram_server_key", "", Only(&[])),
    parameter("sslcertmode", "PGSSLCERTMODE", Only(&["allow"])),
    parameter("sslcrl", "PGSSLCRL", Only(&[])),
    parameter("sslcrldir", "PGSSLCRLDIR", Only(&[])),
    parameter("sslkeylogfile", "", Only(&[])),
    parameter("ssl_max_protocol_version", "PGSSLMAXPROTOCOLVERSION", Only(&["tlsv1.3"])),
    parameter(
        "ssl_min_protocol_version",
        "PGSSLMINPROTOCOLVERSION",
        Only(&["tlsv1", "tlsv1.1", "tlsv1.2"]),
    ),
    parameter("sslnegotiation", "PGSSLNEGOTIATION", Only(&["postgres"])),
    parameter("sslpassword", "", Only(&[])),
    parameter("sslsni", "PGSSLSNI", Only(&["1"])),
    parameter("authtype", "", NoEffect),
    parameter("datestyle", "PGDATESTYLE", NoEffect),
    parameter("geqo", "PGGEQO", NoEffect),
    parameter("gsslib", "PGGSSLIB", NoEffect),
    parameter("keepalives", "", NoEffect),
    parameter("keepalives_count", "", NoEffect),
    parameter("keepalives_idle", "", NoEffect),
    parameter("keepalives_interval", "", NoEffect),
    parameter("krbsrvname", "PGKRBSRVNAME", NoEffect),
    parameter("sslcompression", "PGSSLCOMPRESSION", NoEffect),
    parameter("tcp_user_timeout", "", NoEffect),
    parameter("timezone", "PGTZ", NoEffect),
    parameter("tty", "", NoEffect),
    // This is a parameter of sqlx.
    parameter("statement-cache-capacity", "", NoEffect),
];

impl Parameter {
    pub(super) fn find(keyword: &str) -> Option<&'static Self> {
        // The aliases that sqlx accepts in a URL.
        let keyword = match keyword {
            "ssl-ca" | "ssl-root-cert" => "sslrootcert",
            "ssl-cert" => "sslcert",
            "ssl-key" => "sslkey",
            "ssl-mode" => "sslmode",
            keyword => keyword,
        };
        PARAMETERS.iter().find(|parameter| parameter.keyword == keyword)
    }

    /// Rejects a value that the program does not support.
    pub(super) fn check(&self, value: &Value) -> Result<(), Failure> {
        let Only(accepted) = self.use_ else { return Ok(()) };
        if value.text.is_empty() || accepted.contains(&&*value.text.to_ascii_lowercase()) {
            return Ok(());
        }
        let hint = match accepted {
            [] => "remove it".to_owned(),
            [only] => format!("remove it, or set it to {only}"),
            [others @ .., last] => {
                format!("remove it, or set it to {} or {last}", others.join(", "))
            }
        };
        let keyword = self.keyword;
        let is_secret =
            keyword.contains("secret") || keyword.contains("key") || keyword == "sslpassword";
        let text = if is_secret { "…" } else { &value.text };
        Err(Failure::Usage(format!("{}: {keyword}={text} is not supported; {hint}", value.source)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_help_names_every_parameter_and_variable() {
        let words: Vec<&str> =
            crate::args::PARAMETERS_HELP.split(|c: char| c.is_whitespace() || c == ',').collect();
        for Parameter { keyword, env, .. } in PARAMETERS {
            let is_internal = ["authtype", "tty"].contains(&keyword);
            assert!(is_internal || words.contains(&keyword), "{keyword}");
            assert!(env.is_none_or(|env| words.contains(&env)), "{env:?}");
        }
    }
}
