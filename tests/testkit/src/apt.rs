//! Fetches PostgreSQL from Debian's or Ubuntu's own packages, for machines that have neither a server nor `npm`. The
//! packages are unpacked into a cache, not installed, so no privileges are needed.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Error;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::account::run;

/// The package that depends on the server of the release.
const PACKAGE: &str = "postgresql";

/// The directory in the cache in which packages are unpacked.
const DIR: &str = "apt";

/// Returns the directory of the programs, if the cache has them already.
pub(crate) fn cached(cache: &Path) -> Option<PathBuf> {
    let bin = cache.join(DIR).join("bin");
    bin.is_dir().then_some(bin)
}

/// Fetches the server, and the dependencies that the machine lacks. `apt-get` verifies the packages.
pub(crate) fn fetch(apt: &Path, path: &OsStr, cache: &Path) -> Result<PathBuf, String> {
    let failed = |error: Error| format!("cannot use {}: {error}", cache.display());
    fs::create_dir_all(cache).map_err(failed)?;
    // One process fetches at a time: the next one finds the work done.
    let lock = File::create(cache.join("lock")).map_err(failed)?;
    lock.lock().map_err(failed)?;
    if let Some(bin) = cached(cache) {
        return Ok(bin);
    }
    let work = cache.join(DIR).with_extension("part");
    if work.exists() {
        fs::remove_dir_all(&work).map_err(failed)?;
    }
    let unpacked = unpack(apt, path, &work);
    let moved = unpacked.and_then(|()| {
        let to = cache.join(DIR);
        fs::rename(work.join("files"), &to).map_err(failed)?;
        wrap(&to).map_err(failed)
    });
    if work.exists() {
        fs::remove_dir_all(&work).map_err(failed)?;
    }
    moved?;
    cached(cache).ok_or_else(|| format!("no server in the package {PACKAGE}"))
}

/// Unpacks all packages into `work`.
fn unpack(apt: &Path, path: &OsStr, work: &Path) -> Result<(), String> {
    let files = work.join("files");
    for dir in ["files", "lists/partial", "archives/partial"] {
        let failed = |error: Error| format!("cannot use {}: {error}", work.display());
        fs::create_dir_all(work.join(dir)).map_err(failed)?;
    }
    let apt_get = |arguments: &[&str]| {
        let set = |name: &str, to: &Path| format!("{name}={}", to.display());
        let mut apt_get = Command::new(apt);
        apt_get.arg("-qq").args(["-o", &set("Dir::State::Lists", &work.join("lists"))]);
        apt_get.args(["-o", &set("Dir::Cache", work)]);
        // As root, `apt-get` would fetch as the user `_apt`, which can't write to the cache.
        apt_get.args(["-o", "APT::Sandbox::User="]);
        // No lock is needed, because the database of the packages is only read.
        apt_get.args(["-o", "Debug::NoLocking=1"]);
        run(apt_get.args(arguments).env("PATH", path).env("DEBIAN_FRONTEND", "noninteractive"))
    };
    apt_get(&["update"])?;
    apt_get(&["install", "--download-only", "--no-install-recommends", "--yes", PACKAGE])?;
    let archives = fs::read_dir(work.join("archives")).into_iter().flatten().flatten();
    for archive in archives.map(|file| file.path()) {
        if archive.extension().is_some_and(|extension| extension == "deb") {
            run(Command::new("dpkg-deb").arg("--extract").arg(&archive).arg(&files))?;
        }
    }
    Ok(())
}

/// Makes a directory of wrapper scripts, which let the programs find the libraries that were unpacked with them.
fn wrap(files: &Path) -> Result<(), Error> {
    let servers = fs::read_dir(files.join("usr/lib/postgresql"))?;
    let Some(server) = servers.flatten().next() else { return Ok(()) };
    let libraries = fs::read_dir(files.join("usr/lib"))?.flatten().map(|entry| entry.path());
    let libraries = libraries
        .filter(|path| path.to_string_lossy().contains("-linux-"))
        .map(|path| path.display().to_string());
    let libraries = libraries.collect::<Vec<_>>().join(":");
    let wrappers = files.join("bin.part");
    fs::create_dir(&wrappers)?;
    for program in fs::read_dir(server.path().join("bin"))?.flatten() {
        let wrapper = wrappers.join(program.file_name());
        let program = program.path();
        let script = format!(
            "#!/bin/sh\nLD_LIBRARY_PATH='{libraries}' exec '{}' \"$@\"\n",
            program.display()
        );
        fs::write(&wrapper, script)?;
        fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755))?;
    }
    fs::rename(wrappers, files.join("bin"))
}
