//! Clocks: the monotonic one that all processes share, and a wall clock that can be set.

use std::fs;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

use crate::skip::skip;

/// The directories in which Debian and others keep libfaketime.
const LIBRARIES: [&str; 3] = ["/usr/lib", "/usr/lib64", "/usr/local/lib"];

/// Returns the time of the monotonic clock, which all processes of this machine share, and which can't be set.
pub fn monotonic() -> Duration {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("this machine has a clock");
    Duration::from(now)
}

/// A wall clock that can be set, for a process that is started with it.
///
/// Timers and the monotonic clock are not affected, as when an administrator sets the clock. The clock uses
/// libfaketime.
///
/// # Drop
///
/// Sets the clock to the right time.
#[derive(Debug)]
pub struct WallClock {
    library: PathBuf,
    file: PathBuf,
}

impl WallClock {
    /// Makes a clock that shows the right time. Returns `None` and skips the test if there is no libfaketime.
    pub fn new() -> Option<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);

        let library = find_library()
            .or_else(|| skip("there is no libfaketime", "apt-get install faketime"))?;
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("pglock-{}-clock-{number}", process::id());
        let clock = Self { library, file: std::env::temp_dir().join(name) };
        clock.set(0);
        Some(clock)
    }

    /// Returns the environment variables of a process that uses this clock.
    pub fn env(&self) -> [(&str, &str); 4] {
        let [library, file] =
            [&self.library, &self.file].map(|path| path.to_str().expect("the path is UTF-8"));
        [
            ("LD_PRELOAD", library),
            ("FAKETIME_TIMESTAMP_FILE", file),
            // Makes libfaketime read the file each time.
            ("FAKETIME_NO_CACHE", "1"),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
        ]
    }

    /// Sets the clock off by a number of seconds, forward or backward.
    pub fn set(&self, seconds: i64) {
        // The file is replaced in one step, because a process may be reading it.
        let new = self.file.with_extension("new");
        fs::write(&new, format!("{seconds:+}\n")).expect("a file can be written");
        fs::rename(&new, &self.file).expect("a file can be renamed");
    }
}

impl Drop for WallClock {
    fn drop(&mut self) {
        drop(fs::remove_file(&self.file));
    }
}

/// Finds the library for programs with threads, in one of the usual places or a directory below.
fn find_library() -> Option<PathBuf> {
    let places = LIBRARIES.into_iter().map(PathBuf::from);
    let below = places.clone().flat_map(|place| {
        let entries = fs::read_dir(place).into_iter().flatten();
        entries.filter_map(|entry| Some(entry.ok()?.path()))
    });
    let library = Path::new("faketime/libfaketimeMT.so.1");
    places.chain(below).map(|place| place.join(library)).find(|library| library.exists())
}
