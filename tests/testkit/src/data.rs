//! A server's directory, and the cluster in it: copied from a template, or made by `initdb`.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::{env, process};

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use sha2::{Digest, Sha256};

use crate::account::{Account, run};
use crate::find::Installation;
use crate::watchdog::Watchdog;

/// A socket's path may have 103 bytes on macOS and 107 on Linux.
const LONGEST_DIR: usize = 103 - "/.s.PGSQL.65535".len();

/// Makes the directory that a server and its socket live in, with a watchdog over both.
pub(crate) fn make_dir(
    account: &Account,
    pid_file: &str,
    signal: &str,
) -> Result<(PathBuf, Watchdog), String> {
    let fallback = PathBuf::from("/tmp");
    let mut reasons = Vec::new();
    for base in [env::temp_dir(), fallback] {
        match make_dir_in(&base, account, pid_file, signal) {
            Ok(made) => return Ok(made),
            Err(reason) => reasons.push(format!("{}: {reason}", base.display())),
        }
    }
    Err(format!("no place for the server's directory ({})", reasons.join("; ")))
}

fn make_dir_in(
    base: &Path,
    account: &Account,
    pid_file: &str,
    signal: &str,
) -> Result<(PathBuf, Watchdog), String> {
    static NEXT: AtomicU32 = AtomicU32::new(0);

    let (dir, mut watchdog) = loop {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = base.join(format!("pglock-{}-{number}", process::id()));
        if dir.as_os_str().len() > LONGEST_DIR {
            return Err("too long a path for a unix socket".to_owned());
        }
        match Watchdog::over(&dir, pid_file, signal) {
            Ok(watchdog) => break (dir, watchdog),
            // Another process with the same process ID has left the directory, perhaps in another container.
            Err(_) if dir.exists() => {}
            Err(error) => return Err(error),
        }
    };
    let mut enter = account.command("/bin/sh");
    enter.args(["-c", "cd \"$0\""]).arg(&dir);
    let owned = account.own(&dir).map_err(|error| error.to_string());
    match owned.and_then(|()| run(&mut enter)) {
        Ok(_) => Ok((dir, watchdog)),
        Err(error) => {
            watchdog.release();
            Err(error)
        }
    }
}

/// A cluster fresh from `initdb`, kept to be copied.
#[derive(Debug)]
pub(crate) struct Template<'a> {
    installation: &'a Installation,
    account: &'a Account,
    path: PathBuf,
}

impl<'a> Template<'a> {
    /// Returns the template in `base`, where the servers' directories are.
    pub(crate) fn of(installation: &'a Installation, account: &'a Account, base: &Path) -> Self {
        let Installation { bin, version, major } = installation;
        let hash = Sha256::digest(format!("{version} {}", bin.display()));
        let hash = BASE64_URL_SAFE_NO_PAD.encode(hash.get(..6).unwrap_or_default());
        let name = format!("pglock-template-{}-{major}-{hash}", account.uid());
        Self { installation, account, path: base.join(name) }
    }

    /// Copies the template to `data`. Returns `false` if the template is not sound, or can't be copied.
    pub(crate) fn copy_to(&self, data: &Path) -> bool {
        if !self.is_sound() {
            return false;
        }
        let copied = self.copy(&self.path, data).is_ok();
        if !copied {
            drop(fs::remove_dir_all(data));
        }
        copied
    }

    /// Makes a cluster in `data` with `initdb`, and keeps a copy of it for the next server.
    pub(crate) fn initdb(&self, data: &Path) -> Result<(), String> {
        let mut initdb = self.account.command(self.installation.bin.join("initdb"));
        initdb.args(["--no-sync", "--username=postgres", "--auth=trust"]);
        // With small segments, there is less to copy.
        initdb.args(["--encoding=UTF8", "--locale=C", "--wal-segsize=1", "-D"]).arg(data);
        run(&mut initdb)?;

        if !self.is_sound() {
            self.remove();
            // The copy is made beside the data, where the watchdog cleans up, and then moved to its place in one step.
            // Only the speed of the next start depends on it.
            let copy = data.with_file_name("template");
            if self.copy(data, &copy).is_err() || fs::rename(&copy, &self.path).is_err() {
                drop(fs::remove_dir_all(&copy));
            }
        }
        Ok(())
    }

    /// Removes a template that no server starts from.
    pub(crate) fn remove(&self) {
        drop(fs::remove_dir_all(&self.path));
    }

    fn copy(&self, from: &Path, to: &Path) -> Result<String, String> {
        run(self.account.command("cp").arg("-a").arg(from).arg(to))
    }

    /// Returns whether the template is the account's own, private and whole. Temporary directories are shared, and
    /// programs clean them up.
    fn is_sound(&self) -> bool {
        let Ok(found) = fs::symlink_metadata(&self.path) else { return false };
        let version = fs::read_to_string(self.path.join("PG_VERSION")).unwrap_or_default();
        found.is_dir()
            && found.uid() == self.account.uid()
            && found.mode().trailing_zeros() >= 6
            && version.trim() == self.installation.major.to_string()
            && self.path.join("global/pg_control").is_file()
    }
}

/// Writes one of the cluster's settings files.
pub(crate) fn write_settings(account: &Account, path: &Path, content: &str) -> Result<(), String> {
    let written = fs::write(path, content)
        .and_then(|()| fs::set_permissions(path, Permissions::from_mode(0o600)))
        .and_then(|()| account.own(path));
    written.map_err(|error| format!("cannot write {}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::find::Search;

    #[test]
    fn a_directory_too_deep_for_a_socket_is_refused() {
        let account = Account::for_server().unwrap();
        let deep = PathBuf::from("/tmp").join("d".repeat(LONGEST_DIR));
        assert!(make_dir_in(&deep, &account, "pid", "TERM").unwrap_err().contains("too long"));
    }

    #[test]
    fn only_a_template_that_is_whole_private_and_ours_is_copied() {
        let account = Account::for_server().unwrap();
        let installation = Search::from_env(account).run().unwrap();
        let (base, mut watchdog) = make_dir(&account, "pid", "TERM").unwrap();
        let template = Template::of(&installation, &account, &base);
        let (fresh, copied) = (base.join("fresh"), base.join("copied"));
        assert!(!template.copy_to(&copied));

        template.initdb(&fresh).unwrap();
        assert!(template.copy_to(&copied));
        let found = fs::metadata(&copied).unwrap();
        assert_eq!((found.uid(), found.mode() & 0o777), (account.uid(), 0o700));
        assert!(copied.join("global/pg_control").is_file());

        fs::set_permissions(&template.path, Permissions::from_mode(0o770)).unwrap();
        assert!(!template.is_sound());
        fs::set_permissions(&template.path, Permissions::from_mode(0o700)).unwrap();
        assert!(template.is_sound());

        // A cleaner of temporary files may do this.
        fs::remove_file(template.path.join("global/pg_control")).unwrap();
        assert!(!template.is_sound());
        fs::remove_dir_all(&fresh).unwrap();
        template.initdb(&fresh).unwrap();
        assert!(template.is_sound());
        watchdog.release();
        assert!(!base.exists());
    }
}
