//! Clocks: the one that all processes share, and one that is wrong.

use std::fs;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

use crate::skip::skip;

/// Where Debian and others keep libfaketime.
const LIBRARIES: [&str; 3] = ["/usr/lib", "/usr/lib64", "/usr/local/lib"];

/// The time since some moment, by a clock that all processes of this machine share, and that can't be
/// set.
pub fn monotonic() -> Duration {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("this machine has a clock");
    Duration::from(now)
}

/// A wall clock that can be set, for a process that is started with it.
///
/// Timers and the monotonic clock stay as they are, as when an administrator sets the clock. It is
/// made of libfaketime.
///
/// # Drop
///
/// Sets the clock right.
#[derive(Debug)]
pub struct WallClock {
    library: PathBuf,
    file: PathBuf,
}

impl WallClock {
    /// Makes a clock that goes right. `None`, and the test is skipped, if there is no libfaketime.
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

    /// The environment of a process that is to go by this clock.
    pub fn env(&self) -> [(&str, &str); 4] {
        let [library, file] =
            [&self.library, &self.file].map(|path| path.to_str().expect("the path is UTF-8"));
        [
            ("LD_PRELOAD", library),
            ("FAKETIME_TIMESTAMP_FILE", file),
            // It is looked at each time.
            ("FAKETIME_NO_CACHE", "1"),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
        ]
    }

    /// Sets the clock off by a number of seconds, forward or backward.
    pub fn set(&self, seconds: i64) {
        // In one step, because a process may be reading it.
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

/// The library for programs with threads, in one of the usual places or a directory below.
fn find_library() -> Option<PathBuf> {
    let places = LIBRARIES.into_iter().map(PathBuf::from);
    let below = places.clone().flat_map(|place| {
        let entries = fs::read_dir(place).into_iter().flatten();
        entries.filter_map(|entry| Some(entry.ok()?.path()))
    });
    let library = Path::new("faketime/libfaketimeMT.so.1");
    places.chain(below).map(|place| place.join(library)).find(|library| library.exists())
}
