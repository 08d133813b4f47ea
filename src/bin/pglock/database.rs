//! Finds the database that a command works with, as libpq does.

mod files;
mod parameters;
mod url;

use std::collections::BTreeMap;
use std::env::{self, VarError};
use std::net::IpAddr;
use std::num::NonZeroU16;
use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use clap::Args;
use nix::unistd::{User, geteuid};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use sqlx::ConnectOptions;
use sqlx::postgres::{PgConnectOptions, PgSslMode};

use crate::exit::Failure;
use crate::run::{LONGEST, seconds};
use files::Login;
use parameters::{PARAMETERS, Parameter};

/// The arguments that say where the database is.
#[derive(Args, Debug)]
pub(crate) struct DatabaseArgs {
    #[arg(long, global = true, help_heading = "Database")]
    #[arg(help = "The database, as postgres://user@host/database", long_help = URL)]
    url: Option<String>,

    #[arg(
        help = "How long the server may take to accept a connection [default: PGCONNECT_TIMEOUT, or 10]"
    )]
    #[arg(long, global = true, help_heading = "Database")]
    #[arg(value_name = "SECONDS", value_parser = seconds)]
    connect_timeout: Option<Duration>,
}

const URL: &str = "\
The database, as postgres://user@host/database [default: DATABASE_URL, or PGHOST and others]

Other users can read the arguments of a process, so put a password into PGPASSWORD, ~/.pgpass or \
DATABASE_URL.";

/// A database, and how to connect to it.
#[derive(Clone, Debug)]
pub(crate) struct Database {
    pub(super) options: PgConnectOptions,
    /// How long connecting may take. `None` for no limit.
    pub(super) connect_timeout: Option<Duration>,
    /// Whether the server has to accept writes.
    pub(super) read_write: bool,
}

/// The value of a parameter, and its source for error messages.
#[derive(Clone, Debug)]
struct Value {
    text: String,
    source: String,
}

type Settings = BTreeMap<&'static str, Value>;

impl DatabaseArgs {
    /// Finds the database. `application` is the name of the sessions, unless the user has set one.
    pub(crate) fn database(self, application: &str) -> Result<Database, Failure> {
        let mut settings = settings(self.url)?;
        for (keyword, value) in &settings {
            if let Some(parameter) = Parameter::find(keyword) {
                parameter.check(value)?;
            }
        }
        settings.retain(|_, value| !value.text.is_empty());
        let connect_timeout = match self.connect_timeout {
            Some(limit) => Some(limit).filter(|limit| !limit.is_zero()),
            None => connect_timeout(settings.get("connect_timeout"))?,
        };
        let read_write = read_write(settings.get("target_session_attrs"))?;
        let options = options(&settings, application)?;
        Ok(Database { options, connect_timeout, read_write })
    }
}

/// How long the server may take to accept a connection by default.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Collects the parameters. Those of the URL take precedence over those of the service, and these over those of the
/// environment.
fn settings(url: Option<String>) -> Result<Settings, Failure> {
    let mut settings = Settings::new();
    let url = match url {
        // The argument was probably a shell variable that is not set.
        Some(url) if url.is_empty() => return Err(Failure::Usage("--url: it is empty".to_owned())),
        Some(url) => Some((url, "--url")),
        None => variable("DATABASE_URL")?.map(|url| (url, "DATABASE_URL")),
    };
    if let Some((url, source)) = url {
        for (keyword, text) in url::parse(&url, source)? {
            settings.insert(keyword, Value { text, source: source.to_owned() });
        }
    }
    let mut from_env = Settings::new();
    for Parameter { keyword, env, .. } in &PARAMETERS {
        if let Some(name) = env
            && let Some(text) = variable(name)?
        {
            from_env.insert(keyword, Value { text, source: (*name).to_owned() });
        }
    }
    let named = |keyword: &str| settings.get(keyword).or_else(|| from_env.get(keyword)).cloned();
    if let Some(service) = named("service") {
        let file = named("servicefile");
        let (path, parameters) =
            files::service(&service.text, file.as_ref().map(|file| &*file.text))?;
        let source = format!("service {} in {}", service.text, path.display());
        for (keyword, text) in parameters {
            settings.entry(keyword).or_insert_with(|| Value { text, source: source.clone() });
        }
    }
    for (keyword, value) in from_env {
        settings.entry(keyword).or_insert(value);
    }
    Ok(settings)
}

/// An environment variable, unless it is empty.
fn variable(name: &str) -> Result<Option<String>, Failure> {
    match env::var(name) {
        Ok(text) => Ok(Some(text).filter(|text| !text.is_empty())),
        Err(VarError::NotPresent) => Ok(None),
        Err(VarError::NotUnicode(_)) => Err(Failure::Usage(format!("{name}: it is not UTF-8"))),
    }
}

fn connect_timeout(value: Option<&Value>) -> Result<Option<Duration>, Failure> {
    let Some(value) = value else { return Ok(Some(CONNECT_TIMEOUT)) };
    let seconds: i64 = parse(value, "connect_timeout", "a whole number of seconds")?;
    let limit = u64::try_from(seconds).ok().filter(|seconds| *seconds > 0).map(Duration::from_secs);
    Ok(limit.map(|limit| limit.min(LONGEST)))
}

fn read_write(value: Option<&Value>) -> Result<bool, Failure> {
    match value.map(|value| (&*value.text, &value.source)) {
        None | Some(("any" | "prefer-standby", _)) => Ok(false),
        Some(("primary" | "read-write", _)) => Ok(true),
        Some((text @ ("read-only" | "standby"), source)) => Err(Failure::Usage(format!(
            "{source}: target_session_attrs={text} is not supported, because a lock on a standby \
             excludes nothing; name the primary"
        ))),
        Some((text, source)) => Err(Failure::Usage(format!(
            "{source}: target_session_attrs={text} is unknown; use read-write, primary or any"
        ))),
    }
}

fn options(settings: &Settings, application: &str) -> Result<PgConnectOptions, Failure> {
    let text = |keyword| settings.get(keyword).map(|value| &*value.text);
    let mut options = raw_options(settings)?;
    let port = match settings.get("port") {
        Some(port) if port.text.contains(',') => return Err(list(port)),
        Some(port) => parse::<NonZeroU16>(port, "port", "a number from 1 to 65535")?.get(),
        None => 5432,
    };
    let host = host(settings, port)?;
    let user = match text("user") {
        Some(user) => user.to_owned(),
        None => os_user()?,
    };
    let dbname = text("dbname").unwrap_or(&user);
    options = options.host(&host).port(port).username(&user).database(dbname);
    // Like libpq, looks up the password by the name of the host, even if `hostaddr` has the address.
    let login = Login { host: text("host").unwrap_or(&host), port, dbname, user: &user };
    let password = match text("password") {
        Some(password) => Some(password.to_owned()),
        None => files::password(text("passfile"), &login),
    };
    options = options.password(password.as_deref().unwrap_or_default());
    options = encryption(settings, options, &host)?;
    let name = text("application_name").or_else(|| text("fallback_application_name"));
    let name = name.unwrap_or(application);
    // Otherwise, sqlx logs the statements if the server is slow, and they are not the user's.
    Ok(options.application_name(name).disable_statement_logging())
}

/// Returns options with the parameter `options`, which sqlx reads only from a URL and from the environment.
fn raw_options(settings: &Settings) -> Result<PgConnectOptions, Failure> {
    let Some(value) = settings.get("options").filter(|value| value.source != "PGOPTIONS") else {
        return Ok(PgConnectOptions::new_without_pgpass());
    };
    if env::var_os("PGOPTIONS").is_some_and(|options| !options.is_empty()) {
        return Err(Failure::Usage(format!(
            "{}: options and PGOPTIONS are set both; unset one of them",
            value.source
        )));
    }
    let encoded = utf8_percent_encode(&value.text, NON_ALPHANUMERIC);
    // The URL has a password so that sqlx reads no password file. The caller replaces all parts of the URL.
    PgConnectOptions::from_str(&format!("postgres://x:x@localhost/x?options={encoded}"))
        .map_err(|error| Failure::Usage(format!("{}: options: {error}", value.source)))
}

fn host(settings: &Settings, port: u16) -> Result<String, Failure> {
    if let Some(address) = settings.get("hostaddr") {
        if address.text.contains(',') {
            return Err(list(address));
        }
        let _: IpAddr = parse(address, "hostaddr", "an IP address")?;
        return Ok(address.text.clone());
    }
    match settings.get("host") {
        Some(host) if host.text.contains(',') => Err(list(host)),
        Some(host) if host.text.starts_with('@') => Err(Failure::Usage(format!(
            "{}: a socket in the abstract namespace is not supported; use a directory",
            host.source
        ))),
        Some(host) => Ok(host.text.clone()),
        None => {
            let has_socket = |dir: &&str| Path::new(dir).join(format!(".s.PGSQL.{port}")).exists();
            let dirs = ["/var/run/postgresql", "/private/tmp", "/tmp"];
            Ok(dirs.into_iter().find(has_socket).unwrap_or("localhost").to_owned())
        }
    }
}

fn list(value: &Value) -> Failure {
    Failure::Usage(format!("{}: {}", value.source, url::LIST))
}

fn encryption(
    settings: &Settings,
    mut options: PgConnectOptions,
    host: &str,
) -> Result<PgConnectOptions, Failure> {
    let requires = settings.get("requiressl").is_some_and(|value| value.text == "1");
    let mode = settings.get("sslmode");
    let source = mode.map_or("PGREQUIRESSL", |mode| &*mode.source);
    let refuse = |why: &str| Err(Failure::Usage(format!("{source}: {why}")));
    // Returns the value of the parameter, or otherwise the default file of libpq if it exists.
    let found = |keyword: &str, name: &str| {
        if let Some(value) = settings.get(keyword) {
            return Some(value.text.clone());
        }
        let path = files::home()?.join(".postgresql").join(name);
        path.exists().then(|| path.display().to_string())
    };
    let root = found("sslrootcert", "root.crt");
    if root.as_deref() == Some("system") {
        let source = settings.get("sslrootcert").map_or(source, |root| &*root.source);
        return Err(Failure::Usage(format!(
            "{source}: sslrootcert=system is what sslmode=verify-full does here without sslrootcert"
        )));
    }
    // libpq has no encryption on a unix socket, whatever the mode.
    let default = if requires { "require" } else { "prefer" };
    let mode = match mode.map_or(default, |mode| &*mode.text) {
        "disable" => PgSslMode::Disable,
        "prefer" => PgSslMode::Prefer,
        "require" if root.is_some() => PgSslMode::VerifyCa,
        "require" => PgSslMode::Require,
        "verify-ca" if root.is_none() => {
            return refuse("sslmode=verify-ca needs sslrootcert, or ~/.postgresql/root.crt");
        }
        "verify-ca" => PgSslMode::VerifyCa,
        "verify-full" if settings.contains_key("hostaddr") => {
            return refuse("sslmode=verify-full can't be used with hostaddr; name the host only");
        }
        "verify-full" => PgSslMode::VerifyFull,
        "allow" => return refuse("sslmode=allow is not supported; use prefer"),
        unknown => {
            return refuse(&format!(
                "sslmode={unknown} is unknown; use disable, prefer, require, verify-ca or verify-full"
            ));
        }
    };
    if host.starts_with('/') {
        return Ok(options.ssl_mode(PgSslMode::Disable));
    }
    if let Some(root) = root {
        options = options.ssl_root_cert(root);
    }
    let certificate = found("sslcert", "postgresql.crt").zip(found("sslkey", "postgresql.key"));
    if let Some((certificate, key)) = certificate {
        options = options.ssl_client_cert(certificate).ssl_client_key(key);
    }
    Ok(options.ssl_mode(mode))
}

fn os_user() -> Result<String, Failure> {
    match User::from_uid(geteuid()) {
        Ok(Some(user)) => Ok(user.name),
        _ => Err(Failure::Usage("no user is named; set PGUSER, or name it in --url".to_owned())),
    }
}

fn parse<T: FromStr>(value: &Value, keyword: &str, what: &str) -> Result<T, Failure> {
    let Value { text, source } = value;
    let wrong = |_| Failure::Usage(format!("{source}: {keyword}={text} is not {what}"));
    text.trim().parse().map_err(wrong)
}
