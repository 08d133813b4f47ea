//! Fetches PostgreSQL from npm, for machines that have `npm` but no server. The packages are pinned, verified and
//! cached.

use std::env::consts::{ARCH, OS};
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::{self, File};
use std::io::Error;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use nix::unistd::geteuid;
use sha2::{Digest, Sha512};

use crate::account::run;

/// The version that is fetched by default.
const DEFAULT: &str = "17";

/// The packages, with the SHA-512 that each must have.
const PACKAGES: [Package; 10] = [
    Package::new(
        "linux-x64",
        "12.22.0-beta.15",
        "iG+VySdss+bA5SLDIRrowxKuV57GTc/ePu7NzN0Vnk4t+guX4bW3JP1h4t5MFzZ5SZEJ9tV+fDPjkwPTh2kzuw==",
    ),
    Package::new(
        "linux-x64",
        "13.23.0-beta.16",
        "0ipxynPYHBsr6aM8BS4yKdLNdYwWD08Xpu05JrvMkcLezmCr0hd0hA9Bq4mR+CdmY0flRKEtgkPbZhvhvDR4+w==",
    ),
    Package::new(
        "linux-x64",
        "14.23.0-beta.17",
        "WlG1LDcOwA+V0uYSdSGCwqk/aDPiMX/X23cgNdYY5YcBprXjOH3IFoeCrgeXsct4Ep8LL8UsBP9/Ho2mpoea1w==",
    ),
    Package::new(
        "linux-x64",
        "15.18.0-beta.17",
        "TC0kHcDMAusLbQXRc+9KMz1BLJY+ntfPNbwFP79f9IURSxPRgFLy0Ig8oF1J8Wy9Wnj0XdZkMItV3Nov/LwqhA==",
    ),
    Package::new(
        "linux-x64",
        "16.14.0-beta.17",
        "8fr7hEiI7XlbPDPsLZJ4RU1NR6jTIDWpf81Sfiwk3T845V0yJJGxjawjkQZmIWVgPW/qY/dMSv0o08FRWJ/zsg==",
    ),
    Package::new(
        "linux-x64",
        "17.10.0-beta.17",
        "hU4Sgna19ixDP/l3P/zkHhQ9B0JDV39qA97RNz55QcngeRjFC5/1G36LZjODVJ84kVJHUTQMmly7nzWO8js8kg==",
    ),
    Package::new(
        "linux-x64",
        "18.4.0-beta.17",
        "jVw/MdDtIX/vICH/DKIe6/mHpiCggdx6QVyza4vt/NbcZFsL0KhwglF6F1Koqx3gRBZ9XtN+vi63EsqSyqOSxA==",
    ),
    Package::new(
        "linux-arm64",
        "17.10.0-beta.17",
        "mC+bQvaBEf0WDD0nPWW3eGUXDUVzoyCzMtgl+Fw6Jy9DkQFK+jcPtzkzqhhrS/fGzn5telNpKInl8xPqDh71Ig==",
    ),
    Package::new(
        "darwin-arm64",
        "17.10.0-beta.17",
        "E2dxhSllrcyAJBHuvgTrBTx2BaPlX2vvjXClPKHxfwBezk+nTZ01uAEraKiRJMpzHSCyN8J1dTjKh4q/uTsBLQ==",
    ),
    Package::new(
        "darwin-x64",
        "17.10.0-beta.17",
        "gXk65MIyttD/PWo6NDSmu/n4vzPcqZQmxVWjEKuecwlyGmWO984AZ3Ljb7F0bwPvXhqcovH4FGN4ydr0fGeJxg==",
    ),
];

/// Returns the directory of the packages: in the user's cache folder, or for root in a place that others can read,
/// because the server runs as another account.
pub(crate) fn cache_dir(xdg_cache_home: Option<OsString>, home: Option<OsString>) -> PathBuf {
    let cache = if geteuid().is_root() {
        PathBuf::from("/var/cache")
    } else {
        let xdg = xdg_cache_home.map(PathBuf::from).filter(|dir| dir.is_absolute());
        xdg.unwrap_or_else(|| PathBuf::from(home.unwrap_or_default()).join(".cache"))
    };
    cache.join("pglock-testkit")
}

#[derive(Debug)]
pub(crate) struct Package {
    platform: &'static str,
    version: &'static str,
    sha512: &'static str,
}

impl Package {
    const fn new(platform: &'static str, version: &'static str, sha512: &'static str) -> Self {
        Self { platform, version, sha512 }
    }

    /// Returns the package for this machine, and for a major version if one is asked for.
    pub(crate) fn find(major: Option<&str>) -> Result<&'static Self, String> {
        let os = if OS == "macos" { "darwin" } else { OS };
        let arch = match ARCH {
            "x86_64" => "x64",
            "aarch64" => "arm64",
            other => other,
        };
        let platform = format!("{os}-{arch}");
        let major = major.unwrap_or(DEFAULT);
        let mut packages = PACKAGES.iter();
        packages
            .find(|package| package.platform == platform && package.major() == Some(major))
            .ok_or_else(|| format!("no package is known for version {major} on {platform}"))
    }

    fn major(&self) -> Option<&str> {
        self.version.split('.').next()
    }

    pub(crate) fn dir_name(&self) -> String {
        format!("{}-{}", self.platform, self.version)
    }

    /// Returns the directory of the binaries, if the cache has the package already.
    pub(crate) fn cached(&self, cache: &Path) -> Option<PathBuf> {
        let bin = cache.join(self.dir_name()).join("native/bin");
        bin.is_dir().then_some(bin)
    }

    /// Fetches the package with `npm`, checks it, and unpacks it into `cache`.
    pub(crate) fn fetch(&self, npm: &Path, path: &OsStr, cache: &Path) -> Result<PathBuf, String> {
        let failed = |error: Error| format!("cannot use {}: {error}", cache.display());
        fs::create_dir_all(cache).map_err(failed)?;
        // One process fetches at a time: the next one finds the work done.
        let lock = File::create(cache.join("lock")).map_err(failed)?;
        lock.lock().map_err(failed)?;
        if let Some(bin) = self.cached(cache) {
            return Ok(bin);
        }

        let work = cache.join(format!("{}.part", self.dir_name()));
        if work.exists() {
            fs::remove_dir_all(&work).map_err(failed)?;
        }
        fs::create_dir(&work).map_err(failed)?;
        let unpacked = self.unpack(npm, path, &work);
        let moved = unpacked
            .and_then(|package| fs::rename(package, cache.join(self.dir_name())).map_err(failed));
        fs::remove_dir_all(&work).map_err(failed)?;
        moved?;
        self.cached(cache).ok_or_else(|| format!("no native/bin in {self}"))
    }

    fn unpack(&self, npm: &Path, path: &OsStr, work: &Path) -> Result<PathBuf, String> {
        let mut pack = Command::new(npm);
        pack.args(["pack", "--ignore-scripts", "--loglevel=error", &self.to_string()]);
        run(pack.current_dir(work).env("PATH", path))?;
        let tarball = fs::read_dir(work).into_iter().flatten().flatten().map(|file| file.path());
        let tarball = tarball.last().ok_or_else(|| format!("npm pack left no file of {self}"))?;
        self.verify(&tarball)?;

        let mut tar = Command::new("tar");
        run(tar.arg("-xzf").arg(&tarball).arg("-C").arg(work).arg("--no-same-owner"))?;
        let package = work.join("package");
        link(&package).map_err(|error| format!("cannot link the libraries of {self}: {error}"))?;
        Ok(package)
    }

    /// Refuses and removes a file that is not the one pinned here.
    fn verify(&self, tarball: &Path) -> Result<(), String> {
        let content = fs::read(tarball).map_err(|error| format!("cannot read {self}: {error}"))?;
        let sha512 = BASE64_STANDARD.encode(Sha512::digest(content));
        if sha512 == self.sha512 {
            return Ok(());
        }
        let removed = fs::remove_file(tarball)
            .map_or_else(|error| error.to_string(), |()| "removed".to_owned());
        Err(format!(
            "{self} has the SHA-512 {sha512}, where {} is expected; the file: {removed}",
            self.sha512
        ))
    }
}

impl fmt::Display for Package {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "@embedded-postgres/{}@{}", self.platform, self.version)
    }
}

/// Makes the symbolic links that npm's packages cannot hold, without which no program starts.
fn link(package: &Path) -> Result<(), Error> {
    let list = fs::read(package.join("native/pg-symlinks.json"))?;
    let list: serde_json::Value = serde_json::from_slice(&list)?;
    for entry in list.as_array().into_iter().flatten() {
        let name = |key| entry.get(key).and_then(|name| name.as_str()).map(Path::new);
        let (Some(source), Some(target)) = (name("source"), name("target")) else { continue };
        // The links are relative, because the whole directory is moved afterwards.
        let up: PathBuf = target.parent().into_iter().flatten().map(|_| "..").collect();
        symlink(up.join(source), package.join(target))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::env;

    use super::*;

    #[test]
    fn a_package_that_is_not_the_pinned_one_is_refused_and_removed() {
        let package = Package::find(None).unwrap();
        let file = env::temp_dir().join(format!("pglock-npm-{}.tgz", std::process::id()));
        fs::write(&file, "something else").unwrap();
        let reason = package.verify(&file).unwrap_err();
        assert!(reason.contains(package.sha512) && reason.contains("removed"), "{reason}");
        assert!(!file.exists());
    }

    #[test]
    fn the_pinned_package_is_accepted() {
        let file = env::temp_dir().join(format!("pglock-npm-abc-{}.tgz", std::process::id()));
        fs::write(&file, "abc").unwrap();
        // The test vector of FIPS 180-4.
        let sha512 = "3a81oZNherrMQXNJriBBMRLm+k6JqX6iCp7u5ktV05ohkpkqJ0/BqDa6PCOj/uu9RU1EI2Q86A4qmslPpUyknw==";
        assert_eq!(Package::new("linux-x64", "0.0.0", sha512).verify(&file), Ok(()));
        fs::remove_file(&file).unwrap();
    }

    #[test]
    fn every_supported_version_is_pinned_for_the_usual_machine() {
        for major in 12..=18 {
            let versions = PACKAGES.iter().filter(|package| package.platform == "linux-x64");
            let versions = versions.filter(|package| package.major() == Some(&major.to_string()));
            assert_eq!(versions.count(), 1, "{major}");
        }
        let others = PACKAGES.iter().filter(|package| package.platform != "linux-x64");
        assert!(others.clone().count() == 3 && others.clone().all(|p| p.major() == Some(DEFAULT)));
        for package in &PACKAGES {
            assert_eq!(BASE64_STANDARD.decode(package.sha512).unwrap().len(), 64);
        }
    }

    #[test]
    fn an_unknown_version_has_no_package() {
        assert!(Package::find(Some("9")).unwrap_err().contains("version 9"));
    }
}
