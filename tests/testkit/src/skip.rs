//! Skips tests that need something that the machine lacks, and lists them at the end of the run.
//!
//! The test runner can't skip a test that is running already, so the test passes. Each skip is written to a
//! file of the run, which the last test program, `tests/zz_skipped.rs`, prints.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::{env, thread};

use nix::unistd::getppid;

/// The variable that makes a skip a failure.
const REQUIRE_ALL: &str = "PGLOCK_TEST_REQUIRE_ALL";

/// The directories in which distributions put programs, in case they are not on `PATH`.
const PLACES: [&str; 5] =
    ["/usr/sbin", "/usr/bin", "/usr/local/sbin", "/usr/local/bin", "/opt/homebrew/bin"];

/// Finds a program. Skips the test if the machine lacks it. `package` is the package of Debian that has it.
///
/// # Examples
///
/// ```no_run
/// let Some(tmux) = pglock_testkit::program("tmux", "tmux") else { return };
/// # drop(tmux);
/// ```
pub fn program(name: &str, package: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let mut places = env::split_paths(&path).chain(PLACES.map(PathBuf::from));
    let found = places.find_map(|dir| Some(dir.join(name)).filter(|program| program.is_file()));
    found.or_else(|| {
        skip(&format!("there is no program {name}"), &format!("apt-get install {package}"))
    })
}

/// Skips the test: returns `None`, upon which the test has to return, and lists the test at the end of the run under
/// `remedy`, which says what would make it run.
///
/// Panics instead if `PGLOCK_TEST_REQUIRE_ALL` is set.
pub fn skip<T>(reason: &str, remedy: &str) -> Option<T> {
    let all_is_required = env::var_os(REQUIRE_ALL).is_some_and(|value| !value.is_empty());
    assert!(!all_is_required, "{reason}; {remedy}, or unset {REQUIRE_ALL}");
    let test = current_test();
    // Written past the test runner, which hides the output of a test that passes.
    drop(writeln!(io::stderr(), "skipped {test}: {reason} ({remedy})"));
    Run::of(getppid().as_raw()).add(&test, reason, remedy);
    None
}

/// Prints which tests of this run were skipped, if any, and what would make them run.
pub fn print_skipped() {
    let list = Run::of(getppid().as_raw()).take();
    if !list.is_empty() {
        drop(writeln!(io::stderr(), "\n{list}"));
    }
}

/// Returns the name of the test program, and that of the test, as the test runner has it.
fn current_test() -> String {
    let program = env::current_exe().unwrap_or_default();
    let program = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
    // Removes the hash that cargo adds.
    let program = program.rsplit_once('-').map_or(&*program, |(name, _)| name);
    format!("{program}: {}", thread::current().name().unwrap_or("a thread"))
}

/// A run of the tests: all test programs that one process of cargo has started.
struct Run {
    /// A file with a line for each skip: the remedy, the reason and the test, with tabs in between.
    file: PathBuf,
}

impl Run {
    fn of(cargo: i32) -> Self {
        // The start time is in the name too, because process IDs are reused: in each new container, cargo's is the
        // same.
        let stat = fs::read_to_string(format!("/proc/{cargo}/stat")).unwrap_or_default();
        let started = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(19));
        let started = started.unwrap_or("0");
        Self { file: env::temp_dir().join(format!("pglock-skipped-{cargo}-{started}")) }
    }

    fn add(&self, test: &str, reason: &str, remedy: &str) {
        let file = File::options().create(true).append(true).open(&self.file);
        let line = format!("{remedy}\t{}\t{test}\n", reason.replace(['\n', '\t'], " "));
        // A failure is ignored, because the skip has been printed.
        drop(file.and_then(|mut file| file.write_all(line.as_bytes())));
    }

    /// Returns the list, and removes the file. The list is empty if no test was skipped.
    fn take(&self) -> String {
        let lines = fs::read_to_string(&self.file).unwrap_or_default();
        drop(fs::remove_file(&self.file));
        let mut tests = BTreeSet::new();
        let mut remedies: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
        for line in lines.lines() {
            let mut fields = line.splitn(3, '\t');
            let (Some(remedy), Some(reason), Some(test)) =
                (fields.next(), fields.next(), fields.next())
            else {
                continue;
            };
            tests.insert(test);
            remedies.entry((remedy, reason)).or_default().insert(test);
        }
        if tests.is_empty() {
            return String::new();
        }
        let mut list = format!("skipped, in whole or in part: {} tests\n", tests.len());
        for ((remedy, reason), tests) in remedies {
            writeln!(list, "\n  {remedy}    # {reason}").expect("a string takes what is written");
            for test in tests {
                writeln!(list, "    {test}").expect("a string takes what is written");
            }
        }
        list
    }
}

#[cfg(test)]
mod tests {
    use std::process::{self, Command, Output};

    use super::*;

    const NEEDY: &str = "skip::tests::needy";

    #[test]
    #[ignore = "is skipped: the tests below run it as a process"]
    fn needy() {
        let Some(_) = program("no-such-program", "no-such-package") else { return };
        unreachable!();
    }

    /// Runs the test that is skipped, with this process in the place of cargo.
    fn run(all_is_required: &str) -> Output {
        let mut runner = Command::new(env::current_exe().unwrap());
        runner.args([NEEDY, "--exact", "--ignored"]).env(REQUIRE_ALL, all_is_required);
        runner.output().unwrap()
    }

    #[test]
    fn a_skip_passes_and_is_printed_and_listed_unless_all_is_required() {
        let this = Run::of(process::id().cast_signed());
        let output = run("1");
        let printed = String::from_utf8_lossy(&output.stdout);
        let advice = "there is no program no-such-program; apt-get install no-such-package, or unset \
                      PGLOCK_TEST_REQUIRE_ALL";
        assert!(!output.status.success() && printed.contains(advice), "{printed}");
        assert_eq!(this.take(), "");

        let output = run("");
        assert!(output.status.success(), "{output:?}");
        let (list, errors) = (this.take(), String::from_utf8_lossy(&output.stderr));
        for word in
            [NEEDY, "there is no program no-such-program", "apt-get install no-such-package"]
        {
            assert!(list.contains(word) && errors.contains(word), "{word}: {list}{errors}");
        }
        assert_eq!(this.take(), "");
    }

    #[test]
    fn the_list_has_each_test_once_under_what_would_make_it_run() {
        let run = Run { file: env::temp_dir().join(format!("pglock-skip-{}", process::id())) };
        run.add("it: b", "there is no program nft", "apt-get install nftables");
        for test in ["it: b", "it: c", "it: a", "it: c"] {
            run.add(test, "there is\nno program ip", "apt-get install iproute2");
        }
        let list = "skipped, in whole or in part: 3 tests\n\
                    \n  apt-get install iproute2    # there is no program ip\
                    \n    it: a\n    it: b\n    it: c\n\
                    \n  apt-get install nftables    # there is no program nft\
                    \n    it: b\n";
        assert_eq!(run.take(), list);
        assert!(!run.file.exists());
    }
}
