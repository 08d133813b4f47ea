//! The files that libpq reads: `pg_service.conf` and `.pgpass`.

use std::env;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::parameters::Parameter;
use crate::exit::{Failure, say};

/// The directories in which Debian, and PostgreSQL by default, keep the service file of a machine.
const SYSTEM: [&str; 2] = ["/etc/postgresql-common", "/usr/local/pgsql/etc"];

/// Parameters, in the order of the file.
pub(super) type Parameters = Vec<(&'static str, String)>;

/// Returns the parameters of a service, and the file that they are from.
///
/// A service in the user's own file takes precedence over one in the file of the machine.
pub(super) fn service(name: &str, file: Option<&str>) -> Result<(PathBuf, Parameters), Failure> {
    let named = file.map(PathBuf::from);
    let user = named.clone().or_else(|| home().map(|home| home.join(".pg_service.conf")));
    let system = match env::var_os("PGSYSCONFDIR") {
        Some(dir) => vec![PathBuf::from(dir)],
        None => SYSTEM.map(PathBuf::from).to_vec(),
    };
    let system = system.into_iter().map(|dir| dir.join("pg_service.conf"));
    for path in user.into_iter().chain(system) {
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            // Only a file that was named has to exist.
            Err(error)
                if error.kind() == io::ErrorKind::NotFound && named.as_ref() != Some(&path) =>
            {
                continue;
            }
            Err(error) => {
                return Err(Failure::Usage(format!("service file {}: {error}", path.display())));
            }
        };
        if let Some(parameters) = section(&text, name, &path)? {
            return Ok((path, parameters));
        }
    }
    let hint = match file {
        Some(file) => format!("add it to {file}"),
        None => "add it to ~/.pg_service.conf, or name its file in PGSERVICEFILE".to_owned(),
    };
    Err(Failure::Usage(format!("the service {name} is not defined; {hint}")))
}

/// Returns the parameters below the headline `[name]`.
fn section(text: &str, name: &str, path: &Path) -> Result<Option<Parameters>, Failure> {
    let wrong = |line: &str, why: &str| {
        Failure::Usage(format!("service {name} in {}: {line}: {why}", path.display()))
    };
    let headline = format!("[{name}]");
    let lines = (1..).zip(text.lines().map(str::trim));
    let mut lines = lines.skip_while(|(_, line)| *line != headline);
    if lines.next().is_none() {
        return Ok(None);
    }
    let mut parameters = Parameters::new();
    for (number, line) in lines.take_while(|(_, line)| !line.starts_with('[')) {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let Some((keyword, value)) = line.split_once('=') else {
            // The error does not quote the line, because it may contain a password.
            let place = format!("line {number}");
            return Err(wrong(&place, "not a line like host=db.example.com"));
        };
        let (keyword, value) = (keyword.trim(), value.trim());
        match Parameter::find(keyword).map(|parameter| parameter.keyword) {
            Some("service" | "servicefile") => {
                return Err(wrong(keyword, "a service can't refer to another one"));
            }
            Some(keyword) if parameters.iter().all(|(before, _)| *before != keyword) => {
                parameters.push((keyword, value.to_owned()));
            }
            // Like libpq, uses the first value of a parameter.
            Some(_) => {}
            None => return Err(wrong(keyword, "an unknown parameter")),
        }
    }
    Ok(Some(parameters))
}

/// The fields by which the password file is searched.
pub(super) struct Login<'l> {
    pub(super) host: &'l str,
    pub(super) port: u16,
    pub(super) dbname: &'l str,
    pub(super) user: &'l str,
}

/// Returns the password of a login from the password file.
///
/// Like libpq, ignores a file that other users have access to, and prints a warning.
pub(super) fn password(file: Option<&str>, login: &Login<'_>) -> Option<String> {
    let path = match file {
        Some(file) => PathBuf::from(file),
        None => home()?.join(".pgpass"),
    };
    let metadata = fs::metadata(&path).ok()?;
    if !metadata.is_file() {
        say(format_args!("the password file {} is ignored: not a plain file", path.display()));
        return None;
    }
    let mode = metadata.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        say(format_args!(
            "the password file {0} is ignored, because other users have access to it (mode {mode:04o}); \
             run chmod 600 {0}",
            path.display()
        ));
        return None;
    }
    let text = fs::read_to_string(&path)
        .map_err(|error| say(format_args!("the password file {}: {error}", path.display())))
        .ok()?;
    find(&text, login)
}

fn find(text: &str, login: &Login<'_>) -> Option<String> {
    let socket_dirs = ["", "/tmp", "/var/run/postgresql", "/run/postgresql"];
    let host = if socket_dirs.contains(&login.host) { "localhost" } else { login.host };
    let port = login.port.to_string();
    let wanted = [host, &port, login.dbname, login.user];
    text.lines().filter(|line| !line.starts_with('#')).find_map(|line| {
        let mut fields = fields(line).into_iter();
        let matches = wanted
            .iter()
            .all(|wanted| fields.next().is_some_and(|(raw, field)| raw == "*" || field == *wanted));
        let (_, password) = fields.next()?;
        matches.then_some(password)
    })
}

/// Splits a line at its colons. Returns each field as it is written, and without the backslashes of its escapes.
fn fields(line: &str) -> Vec<(String, String)> {
    let mut fields = vec![(String::new(), String::new())];
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        if c == ':' && fields.len() < 5 {
            fields.push(Default::default());
            continue;
        }
        let Some((raw, field)) = fields.last_mut() else { break };
        raw.push(c);
        if c == '\\'
            && let Some(escaped) = chars.next()
        {
            raw.push(escaped);
            field.push(escaped);
        } else {
            field.push(c);
        }
    }
    fields
}

pub(super) fn home() -> Option<PathBuf> {
    env::home_dir().filter(|home| !home.as_os_str().is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_line_that_matches_has_the_password() {
        let file =
            "# comment\nother:*:*:*:no\nlocalhost:5432:d\\:b:u:in\\:a\\\\b\n*:*:*:*:last:one\n";
        let login = |host, dbname| Login { host, port: 5432, dbname, user: "u" };
        assert_eq!(find(file, &login("/tmp", "d:b")).as_deref(), Some("in:a\\b"));
        assert_eq!(find(file, &login("other", "x")).as_deref(), Some("no"));
        assert_eq!(find(file, &login("h", "x")).as_deref(), Some("last:one"));
        assert_eq!(find("h:1:x:u:p", &login("h", "x")), None);
        assert_eq!(find("\\*:*:*:*:p", &login("h", "x")), None);
    }

    #[test]
    fn a_service_is_a_section_of_its_file() {
        let text = "[a]\nhost=one\n\n# b\n[b]\n host = two\nhost=three\nport=5433\n[c]\nwrong\n";
        let of = |name| section(text, name, Path::new("f")).map_err(|failure| failure.to_string());
        let two = vec![("host", "two".to_owned()), ("port", "5433".to_owned())];
        assert_eq!(of("b"), Ok(Some(two)));
        assert_eq!(of("d"), Ok(None));
        let error = of("c").unwrap_err();
        assert!(error.contains("service c in f: line 10:") && !error.contains("wrong"), "{error}");
    }
}
