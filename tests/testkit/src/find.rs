//! Finds a PostgreSQL server on this machine.

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use crate::account::{Account, run};
use crate::{apt, npm};

/// The oldest version that `pglock` supports.
const OLDEST: u32 = 12;

/// The places where packages put their binaries: a directory, the start of the versions' names in it, and the directory
/// of the binaries in a version.
const WELL_KNOWN: [(&str, &str, &str); 6] = [
    ("usr/lib/postgresql", "", "bin"),
    ("usr", "pgsql-", "bin"),
    ("opt/homebrew/opt", "postgresql@", "bin"),
    ("usr/local/opt", "postgresql@", "bin"),
    ("home/linuxbrew/.linuxbrew/opt", "postgresql@", "bin"),
    ("Applications/Postgres.app/Contents/Versions", "", "bin"),
];

/// A directory with the server's binaries.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Installation {
    pub(crate) bin: PathBuf,
    pub(crate) version: String,
    pub(crate) major: u32,
}

impl Installation {
    /// Looks into `bin`, and asks the server there for its version.
    fn check(bin: &Path, account: &Account) -> Result<Self, String> {
        for program in ["initdb", "postgres"] {
            if !bin.join(program).is_file() {
                return Err(format!("no {program} in {}", bin.display()));
            }
        }
        let printed = run(account.command(bin.join("postgres")).arg("--version"))?;
        let version = printed.trim().rsplit_once("(PostgreSQL) ").map_or("", |(_, rest)| rest);
        let digits = version.find(|c: char| !c.is_ascii_digit()).unwrap_or(version.len());
        let major = version.split_at(digits).0.parse();
        let major = major.map_err(|_| format!("its version reads {:?}", printed.trim()))?;
        if major < OLDEST {
            return Err(format!("{} has version {major}, older than {OLDEST}", bin.display()));
        }
        Ok(Self { bin: bin.to_owned(), version: version.to_owned(), major })
    }
}

/// All that a search depends on.
#[derive(Clone, Debug)]
pub(crate) struct Search {
    pub(crate) account: Account,
    /// Whether `DATABASE_URL` is set. This is only for the report, because the search ignores that server.
    pub(crate) has_url: bool,
    pub(crate) bin: Option<OsString>,
    pub(crate) version: Option<OsString>,
    pub(crate) path: OsString,
    /// The directory under which the well-known places are: `/`, except in a test.
    pub(crate) root: PathBuf,
    /// The directory of fetched packages.
    pub(crate) cache: PathBuf,
}

impl Search {
    pub(crate) fn from_env(account: Account) -> Self {
        let set = |name| env::var_os(name).filter(|value| !value.is_empty());
        Self {
            account,
            has_url: set("DATABASE_URL").is_some(),
            bin: set("PGLOCK_PG_BIN"),
            version: set("PGLOCK_PG_VERSION"),
            path: set("PATH").unwrap_or_default(),
            root: PathBuf::from("/"),
            cache: npm::cache_dir(set("XDG_CACHE_HOME"), set("HOME")),
        }
    }

    /// Returns the first server that is found. If a variable names a server that can't be used, the search fails
    /// instead of continuing elsewhere.
    pub(crate) fn run(&self) -> Result<Installation, NotFound> {
        let mut refused = NotFound { places: Vec::new() };
        let url = if self.has_url { "set, but a server of our own is wanted" } else { "not set" };
        refused.add("DATABASE_URL", url);

        if let Some(bin) = &self.bin {
            let place = format!("PGLOCK_PG_BIN={}", bin.display());
            return self.bin(Path::new(bin)).map_err(|reason| refused.with(place, reason));
        }
        refused.add("PGLOCK_PG_BIN", "not set");

        if let Some(version) = &self.version {
            let place = format!("PGLOCK_PG_VERSION={}", version.display());
            return self.npm(Some(version)).map_err(|reason| refused.with(place, reason));
        }
        refused.add("PGLOCK_PG_VERSION", "not set");

        match self.initdb_on_path() {
            Ok(found) => return Ok(found),
            Err(reason) => refused.add("initdb on PATH", reason),
        }
        match self.pg_config() {
            Ok(found) => return Ok(found),
            Err(reason) => refused.add("pg_config --bindir", reason),
        }
        if let Some(found) = self.well_known(&mut refused) {
            return Ok(found);
        }
        match self.npm(None) {
            Ok(found) => return Ok(found),
            Err(reason) => refused.add("npm", reason),
        }
        self.apt().map_err(|reason| refused.with("apt-get".to_owned(), reason))
    }

    fn bin(&self, bin: &Path) -> Result<Installation, String> {
        let found = Installation::check(bin, &self.account)?;
        match &self.version {
            Some(version) if **version != *found.major.to_string() => Err(format!(
                "has version {}, but PGLOCK_PG_VERSION={}",
                found.major,
                version.display()
            )),
            _ => Ok(found),
        }
    }

    fn initdb_on_path(&self) -> Result<Installation, String> {
        let initdb = self.which("initdb").ok_or("not there")?;
        let initdb = initdb.canonicalize().map_err(|error| error.to_string())?;
        Installation::check(initdb.parent().ok_or("no directory")?, &self.account)
    }

    fn pg_config(&self) -> Result<Installation, String> {
        let pg_config = self.which("pg_config").ok_or("no pg_config on PATH")?;
        let bin = run(Command::new(pg_config).arg("--bindir").env("PATH", &self.path))?;
        Installation::check(Path::new(bin.trim()), &self.account)
    }

    /// Returns the newest server that works, of all the well-known places.
    fn well_known(&self, refused: &mut NotFound) -> Option<Installation> {
        let mut newest: Option<Installation> = None;
        for (dir, prefix, bin) in WELL_KNOWN {
            let dir = self.root.join(dir);
            let place = format!("{}/{prefix}*/{bin}", dir.display());
            let entries = fs::read_dir(&dir).into_iter().flatten().flatten();
            let versions = entries.filter(|entry| {
                entry.file_name().as_encoded_bytes().starts_with(prefix.as_bytes())
            });
            let mut none = true;
            for version in versions {
                none = false;
                match Installation::check(&version.path().join(bin), &self.account) {
                    Ok(found) if newest.as_ref().is_none_or(|best| best.major < found.major) => {
                        newest = Some(found);
                    }
                    Ok(_) => {}
                    Err(reason) => refused.add(place.clone(), reason),
                }
            }
            if none {
                refused.add(place, "nothing there");
            }
        }
        newest
    }

    fn npm(&self, major: Option<&OsString>) -> Result<Installation, String> {
        let package = npm::Package::find(major.map(|major| major.to_string_lossy()).as_deref())?;
        let bin = if let Some(bin) = package.cached(&self.cache) {
            bin
        } else {
            let npm =
                self.which("npm").ok_or_else(|| format!("no npm on PATH to fetch {package}"))?;
            package.fetch(&npm, &self.path, &self.cache)?
        };
        Installation::check(&bin, &self.account)
    }

    fn apt(&self) -> Result<Installation, String> {
        let bin = if let Some(bin) = apt::cached(&self.cache) {
            bin
        } else {
            let apt = self.which("apt-get").ok_or("no apt-get on PATH to fetch a server")?;
            apt::fetch(&apt, &self.path, &self.cache)?
        };
        Installation::check(&bin, &self.account)
    }

    fn which(&self, program: &str) -> Option<PathBuf> {
        let found = env::split_paths(&self.path).map(|dir| dir.join(program)).find(|p| p.is_file());
        found.filter(|program| program.is_absolute())
    }
}

/// The error if there is no server. It names the places that were searched, and what to do.
#[derive(Clone, Debug)]
pub(crate) struct NotFound {
    places: Vec<(String, String)>,
}

impl NotFound {
    fn add(&mut self, place: impl Into<String>, reason: impl Into<String>) {
        self.places.push((place.into(), reason.into()));
    }

    fn with(mut self, place: String, reason: String) -> Self {
        self.add(place, reason);
        self
    }
}

impl fmt::Display for NotFound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "no PostgreSQL server to test with. Looked at, in this order:")?;
        for (place, reason) in &self.places {
            writeln!(f, "  {place}: {reason}")?;
        }
        write!(
            f,
            "Any one of these will do:\n  \
             set DATABASE_URL to a server where databases may be created\n  \
             install your distribution's package, such as postgresql on Debian and Homebrew, \
             postgresql-server on Fedora\n  \
             run `docker compose up` in migrations-free-docker/, and set DATABASE_URL to that server"
        )
    }
}

impl std::error::Error for NotFound {}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;
    use std::process;

    use super::*;

    /// A machine made of directories and shell scripts. A search sees nothing of the real machine, except for
    /// `/bin/sh`.
    struct Machine {
        root: PathBuf,
        search: Search,
    }

    impl Machine {
        fn empty(name: &str) -> Self {
            let root = env::temp_dir().join(format!("pglock-find-{}-{name}", process::id()));
            let search = Search {
                account: Account::for_server().unwrap(),
                has_url: false,
                bin: None,
                version: None,
                path: root.join("path").into_os_string(),
                root: root.clone(),
                cache: root.join("cache"),
            };
            let machine = Self { root, search };
            machine.dir("path");
            machine
        }

        /// Makes a directory that every account can read, because the server may run under another one.
        fn dir(&self, path: &str) -> PathBuf {
            let dir = self.root.join(path);
            fs::create_dir_all(&dir).unwrap();
            for dir in dir.ancestors().take_while(|dir| dir.starts_with(&self.root)) {
                fs::set_permissions(dir, Permissions::from_mode(0o755)).unwrap();
            }
            dir
        }

        /// Makes a script. Another process writes it, because a program that any process has open for writing does
        /// not run (`ETXTBSY`), and a file that this process has open is for a moment open in each child that
        /// another test starts meanwhile.
        fn script(&self, path: &str, text: &str) {
            let (dir, name) = path.rsplit_once('/').unwrap();
            let file = self.dir(dir).join(name);
            let write = "printf '#!/bin/sh\\n%s\\n' \"$1\" >\"$2\" && chmod 755 \"$2\"";
            run(Command::new("sh").args(["-c", write, "sh", text]).arg(file)).unwrap();
        }

        fn server(&self, bin: &str, version: &str) -> PathBuf {
            self.script(&format!("{bin}/initdb"), "");
            let printed = format!("echo 'postgres (PostgreSQL) {version}'");
            self.script(&format!("{bin}/postgres"), &printed);
            self.root.join(bin)
        }

        fn found(&self) -> PathBuf {
            self.search.run().unwrap().bin
        }

        fn refused(&self) -> String {
            self.search.run().unwrap_err().to_string()
        }
    }

    impl Drop for Machine {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.root).unwrap();
        }
    }

    #[test]
    fn where_nothing_is_every_place_and_every_way_out_is_named() {
        let refused = Machine::empty("nothing").refused();
        let mut rest = refused.as_str();
        for expected in [
            "DATABASE_URL: not set",
            "PGLOCK_PG_BIN: not set",
            "PGLOCK_PG_VERSION: not set",
            "initdb on PATH: not there",
            "pg_config --bindir: no pg_config",
            "usr/lib/postgresql/*/bin: nothing there",
            "usr/pgsql-*/bin: nothing there",
            "opt/homebrew/opt/postgresql@*/bin: nothing there",
            "usr/local/opt/postgresql@*/bin: nothing there",
            "linuxbrew/opt/postgresql@*/bin: nothing there",
            "Postgres.app/Contents/Versions/*/bin: nothing there",
            "npm: no npm on PATH",
            "apt-get: no apt-get on PATH",
            "set DATABASE_URL",
            "distribution's package",
            "migrations-free-docker/",
        ] {
            let (_, after) = rest.split_once(expected).expect(expected);
            rest = after;
        }
    }

    #[test]
    fn what_comes_first_in_the_order_is_found() {
        let mut machine = Machine::empty("order");
        let package = npm::Package::find(None).unwrap();
        let cached = machine.search.cache.join(package.dir_name()).join("native/bin");
        let cached =
            machine.server(cached.strip_prefix(&machine.root).unwrap().to_str().unwrap(), "17.10");
        assert_eq!(machine.found(), cached);

        let old = machine.server("usr/lib/postgresql/9.6/bin", "9.6.24");
        assert_eq!(machine.found(), cached, "{} is too old", old.display());
        machine.server("usr/lib/postgresql/15/bin", "15.18 (Debian 15.18-0+deb12u1)");
        machine.server("usr/pgsql-16/bin", "16.14");
        let newest = machine.server("opt/homebrew/opt/postgresql@18/bin", "18beta1");
        assert_eq!(machine.found(), newest);

        let configured = machine.server("configured", "14.23");
        machine.script("path/pg_config", &format!("echo {}", configured.display()));
        assert_eq!(machine.found(), configured);

        let on_path = machine.server("linked", "13.23");
        std::os::unix::fs::symlink(on_path.join("initdb"), machine.root.join("path/initdb"))
            .unwrap();
        assert_eq!(machine.found(), on_path.canonicalize().unwrap());

        let asked = machine.server("asked", "12.22");
        machine.search.bin = Some(asked.clone().into_os_string());
        assert_eq!(
            machine.search.run().unwrap(),
            Installation { bin: asked, version: "12.22".to_owned(), major: 12 }
        );
    }

    #[test]
    fn a_requested_lock_is_not_replaced_by_another() {
        let mut machine = Machine::empty("asked");
        machine.server("path", "15.18");
        machine.search.bin = Some(machine.dir("nothing").into_os_string());
        assert!(machine.refused().contains("nothing: no initdb in"));

        machine.search.bin = Some(machine.root.join("path").into_os_string());
        machine.search.version = Some("17".into());
        assert!(machine.refused().contains("has version 15, but PGLOCK_PG_VERSION=17"));

        machine.search.bin = None;
        assert!(machine.refused().contains("PGLOCK_PG_VERSION=17: no npm on PATH"));
    }

    #[test]
    fn a_server_that_does_not_run_is_refused_with_what_it_printed() {
        let machine = Machine::empty("broken");
        machine.server("path", "15.18");
        machine.script("path/postgres", "echo 'no such library' >&2; exit 127");
        let refused = machine.refused();
        assert!(refused.contains("no such library"), "{refused}");
    }

    #[test]
    fn a_package_with_other_content_leaves_nothing_in_the_cache() {
        let machine = Machine::empty("forged");
        machine.script("path/npm", "echo forged > package.tgz");
        assert!(machine.refused().contains("is expected; the file: removed"));
        let left =
            fs::read_dir(&machine.search.cache).unwrap().map(|entry| entry.unwrap().file_name());
        assert_eq!(left.collect::<Vec<_>>(), ["lock"]);
    }
}
