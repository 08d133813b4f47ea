//! Checks of the source that a reviewer should not have to make.

use std::fs;
use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    let text = fs::read_to_string(root().join(path));
    assert!(text.is_ok(), "{path}: {}", text.unwrap_err());
    text.unwrap()
}

/// All Rust files in a directory of the crate and below.
pub(crate) fn rust_files(dir: &str) -> Vec<PathBuf> {
    files(dir, "rs")
}

/// All files with an extension in a directory of the crate and below. There is at least one.
fn files(dir: &str, extension: &str) -> Vec<PathBuf> {
    let mut dirs = vec![root().join(dir)];
    let mut files = Vec::new();
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                dirs.push(path);
            } else if path.extension().is_some_and(|found| found == extension) {
                files.push(path);
            }
        }
    }
    assert!(!files.is_empty(), "{dir} has no files of the type {extension}");
    files.sort();
    files
}

/// A value of `[package]` in Cargo.toml.
fn package(name: &str) -> String {
    let manifest = read("Cargo.toml");
    let (_, package) = manifest.split_once("[package]").unwrap();
    let mut lines = package.lines().take_while(|line| !line.starts_with('['));
    let value = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(" = "));
    assert!(value.is_some(), "Cargo.toml has no {name}");
    value.unwrap().trim_matches('"').to_owned()
}

#[test]
fn the_changelog_has_the_version() {
    let changelog = read("CHANGELOG.md");
    let version = package("version");
    let heading = changelog.lines().any(|line| {
        line.starts_with("## ") && line.split([' ', '[', ']']).any(|word| word == version)
    });
    assert!(heading, "no heading for {version}");
}

/// The numbers in the text that follow a word: `Rust 1.94`, `PostgreSQL 12 to 18`.
fn versions<'t>(text: &'t str, product: &str) -> Vec<&'t str> {
    let after = text.match_indices(product).filter_map(|(start, _)| {
        let rest = text.get(start + product.len()..)?.trim_start_matches(['*', '_', '`']);
        let rest = rest.strip_prefix(' ')?;
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        let version = rest.get(..end)?.trim_end_matches('.');
        (!version.is_empty()).then_some(version)
    });
    after.collect()
}

#[test]
fn the_readme_names_the_oldest_rust() {
    let readme = read("README.md");
    let named = versions(&readme, "Rust");
    assert!(!named.is_empty(), "the README does not say which Rust it needs");
    for version in named {
        assert_eq!(version, package("rust-version"));
    }
}

/// The testkit can start all versions that are supported, so its list and the README agree.
#[test]
fn the_readme_names_the_versions_of_postgresql() {
    let testkit = read("tests/testkit/src/npm.rs");
    let packages =
        testkit.lines().filter_map(|line| line.trim().strip_prefix('"')?.split_once('.'));
    let majors: Vec<u32> = packages.filter_map(|(major, _)| major.parse().ok()).collect();
    let oldest = majors.iter().min().unwrap();
    let newest = majors.iter().max().unwrap();
    let readme = read("README.md");
    assert!(readme.contains(&format!("PostgreSQL {oldest} to {newest}")), "{oldest} to {newest}");
}

/// A misspelt metric would only leave a panel empty, or an alert silent.
#[test]
fn the_dashboard_and_the_alerts_use_metrics_that_exist() {
    fn metrics(text: &str) -> impl Iterator<Item = &str> {
        let words = text.split(|c: char| c != '_' && !c.is_ascii_alphanumeric());
        words.filter(|word| word.starts_with("pglock_"))
    }

    let documented = read("src/metrics.rs");
    let documented: Vec<&str> = metrics(&documented).collect();
    for file in ["alerts.yaml", "alerts_test.yaml", "dashboard.json"] {
        let text = read(&format!("migrations-free-docker/monitoring/{file}"));
        assert!(metrics(&text).count() > 5, "{file}");
        for metric in metrics(&text) {
            // A histogram is exported as metrics with these suffixes.
            let ends = ["_bucket", "_sum", "_count"];
            let name = ends.iter().find_map(|end| metric.strip_suffix(end)).unwrap_or(metric);
            assert!(documented.contains(&name), "{file}: {metric}");
        }
    }
}

/// An example is a file, or a directory with a `main.rs`.
#[test]
fn every_example_is_listed_and_every_listed_one_exists() {
    let list = read("examples/README.md");
    let links = list.split("](").skip(1).filter_map(|rest| Some(rest.split_once(')')?.0));
    let is_rust = |link: &&str| Path::new(link).extension().is_some_and(|end| end == "rs");
    let mut listed: Vec<&str> = links.filter(is_rust).collect();
    listed.sort_unstable();
    let examples = root().join("examples");
    let is_example = |file: &&PathBuf| {
        file.parent() == Some(&examples) || file.file_name().is_some_and(|name| name == "main.rs")
    };
    let files = rust_files("examples");
    let files: Vec<&str> = files
        .iter()
        .filter(is_example)
        .filter_map(|file| file.strip_prefix(&examples).ok()?.to_str())
        .collect();
    assert_eq!(listed, files);
}

/// Statements are in one place, so that they can be read and reviewed together.
///
/// The messages of the command line mention `pg_locks` and the like. The command line itself sends no statement, except
/// for the query that libpq sends for `target_session_attrs`.
#[test]
fn only_sql_rs_spells_sql() {
    for file in rust_files("src") {
        let path = file.strip_prefix(root().join("src")).unwrap();
        if path == Path::new("sql.rs") || path.starts_with("sql") {
            continue;
        }
        let code = fs::read_to_string(&file).unwrap();
        if path.starts_with("bin") {
            let allowed = usize::from(path == Path::new("bin/pglock/connection.rs"));
            let statements = code.matches("sqlx::query").count() + code.matches("raw_sql").count();
            assert_eq!(statements, allowed, "{}", file.display());
            continue;
        }
        for literal in string_literals(&code) {
            assert!(!literal.contains("pg_"), "{}: {literal:?}", file.display());
        }
        let sends = |line: &&str| {
            !line.contains("//")
                && ["sqlx::query", "raw_sql"].iter().any(|call| line.contains(call))
        };
        assert_eq!(code.lines().find(sends), None, "{}", file.display());
    }
}

/// The contents of the string literals of a source, without those in comments.
fn string_literals(mut code: &str) -> Vec<&str> {
    let mut literals = Vec::new();
    while let Some(start) = code.find(['/', '"', '\'', 'r']) {
        let rest = code.get(start..).unwrap();
        let length = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            rest.find("*/").unwrap_or(rest.len())
        } else if rest.starts_with("'\"'") {
            3
        } else if let Some(hashes) = raw_string(rest) {
            let opening = 'r'.len_utf8() + hashes.len() + 1;
            let inside = rest.get(opening..).unwrap();
            let end = inside.find(&format!("\"{hashes}")).unwrap();
            literals.push(inside.get(..end).unwrap());
            opening + end + 1 + hashes.len()
        } else if let Some(inside) = rest.strip_prefix('"') {
            let mut escaped = false;
            let is_end = |c: char| {
                let end = c == '"' && !escaped;
                escaped = c == '\\' && !escaped;
                end
            };
            let end = inside.find(is_end).unwrap();
            literals.push(inside.get(..end).unwrap());
            end + 2
        } else {
            1
        };
        code = rest.get(length..).unwrap();
    }
    literals
}

/// The `#` of a raw string, if one starts here.
fn raw_string(code: &str) -> Option<&str> {
    let code = code.strip_prefix('r')?;
    let hashes = code.find(|c| c != '#')?;
    code.get(hashes..)?.starts_with('"').then(|| code.get(..hashes))?
}

#[test]
fn string_literals_are_distinguished_from_comments() {
    let code = r##"
        //! "no"
        /* "no" */ let a = "one"; // "no"
        let b = ('"', "t\"wo", r"th\ree", r#"fo"ur"#, b"five");
    "##;
    assert_eq!(string_literals(code), ["one", "t\\\"wo", "th\\ree", "fo\"ur", "five"]);
}

/// `tokio::spawn` needs a runtime on the calling thread, and a guard may be dropped anywhere.
#[test]
fn nothing_calls_tokio_spawn() {
    for file in rust_files("src") {
        let code = fs::read_to_string(&file).unwrap();
        assert!(!code.contains("tokio::spawn"), "{}", file.display());
    }
}

#[test]
fn every_file_begins_with_its_subject() {
    for file in rust_files("src") {
        let code = fs::read_to_string(&file).unwrap();
        assert!(code.starts_with("//! "), "{}", file.display());
    }
}

/// Words that hide which task, session or process does something, or stand for a usual term: in flight,
/// release, usually.
const AVOIDED: [&str; 9] = [
    "had enough",
    "let go",
    "lets go",
    "letting go",
    "mostly",
    "somebody",
    "under way",
    "whoever",
    "whomever",
];

#[test]
fn comments_and_pages_use_the_usual_terms() {
    let at = |file: &Path, (line, word)| format!("{}:{line}: {word}", file.display());
    let mut found = Vec::new();
    for dir in ["src", "tests", "examples", "benches"] {
        for file in rust_files(dir) {
            let code = fs::read_to_string(&file).unwrap();
            found.extend(avoided(&comments(&code)).into_iter().map(|hit| at(&file, hit)));
        }
    }
    let top = fs::read_dir(root()).unwrap().map(|entry| entry.unwrap().path());
    let top = top.filter(|path| path.extension().is_some_and(|extension| extension == "md"));
    for file in top.chain(files("src", "md")).chain(files("examples", "md")) {
        let page = fs::read_to_string(&file).unwrap();
        found.extend(avoided(&prose(&page)).into_iter().map(|hit| at(&file, hit)));
    }
    assert!(found.is_empty(), "{found:#?}");
}

/// The comments of a source, each with the number of its line.
fn comments(code: &str) -> Vec<(usize, &str)> {
    let lines = (1..).zip(code.lines()).filter_map(|(number, line)| {
        let line = line.trim_start();
        // The slashes of a URL have no space before them.
        let start = if line.starts_with("//") { 0 } else { line.find(" //")? };
        Some((number, line.get(start..)?))
    });
    lines.collect()
}

/// The lines of a page, without those of code blocks.
fn prose(page: &str) -> Vec<(usize, &str)> {
    let mut is_code = false;
    let lines = (1..).zip(page.lines()).filter(|(_, line)| {
        let is_fence = line.trim_start().starts_with("```");
        is_code ^= is_fence;
        !is_code && !is_fence
    });
    lines.collect()
}

/// The avoided words in some lines, which may be broken in between, each with the number of its line.
fn avoided(lines: &[(usize, &str)]) -> Vec<(usize, &'static str)> {
    let words: Vec<(usize, String)> = lines
        .iter()
        .flat_map(|&(number, line)| {
            let words = line.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty());
            words.map(move |word| (number, word.to_lowercase()))
        })
        .collect();
    let hits = AVOIDED.into_iter().flat_map(|avoided| {
        let parts: Vec<&str> = avoided.split(' ').collect();
        let is_it = |window: &[(usize, String)]| window.iter().map(|(_, word)| word).eq(&parts);
        let lines = words.windows(parts.len()).filter(|window| is_it(window));
        lines.filter_map(|window| Some((window.first()?.0, avoided))).collect::<Vec<_>>()
    });
    hits.collect()
}

#[test]
fn avoided_words_are_found_in_comments_and_in_pages() {
    // The comments are written with `#`, so that this file has none of them itself.
    let code = "#/ It lets\n#/ go.\nlet somebody = \"https:#whoever\"; # Mostly.\n#! whoever_asks";
    let code = code.replace('#', "//");
    let found = avoided(&comments(&code));
    assert_eq!(found, [(1, "lets go"), (3, "mostly"), (4, "whoever")]);
    let page = "Somebody\n```sh\nmostly\n```\nis under\nway, utmostly.";
    assert_eq!(avoided(&prose(page)), [(1, "somebody"), (5, "under way")]);
}

/// The modules of the library, from the bottom to the top. A line imports nothing from the lines below it; in a
/// line, the modules know each other.
const LAYERS: &[&[&str]] = &[
    &[
        "key",
        "mode",
        "options",
        "error",
        "request",
        "interop",
        "metrics",
        "application_name",
        "progress",
    ],
    &["sql"],
    &["session"],
    &["holdings", "owner", "source", "manager", "guard"],
    &["lock", "multi", "semaphore", "election", "transaction", "inspect", "doctor", "serialize"],
];

#[test]
fn imports_go_downwards() {
    let layer = |module: &str| LAYERS.iter().position(|layer| layer.contains(&module));
    let mut upward = Vec::new();
    for path in rust_files("src") {
        let file = path.strip_prefix(root().join("src")).unwrap().to_str().unwrap();
        let module = file.split(['/', '.']).next().unwrap();
        if ["bin", "lib", "guide"].contains(&module) {
            continue;
        }
        let own = layer(module);
        assert!(own.is_some(), "{file} is in no layer");
        let text = fs::read_to_string(&path).unwrap();
        let text = text.replace("#[cfg(doc)]\n", "// For a link in the documentation: ");
        for line in text.lines().filter(|line| !line.trim_start().starts_with("//")) {
            for path in line.split("crate::").skip(1) {
                let end = path.find(|c: char| !c.is_alphanumeric() && c != '_');
                let imported = path.split_at(end.unwrap_or(path.len())).0;
                if layer(imported) > own {
                    upward.push(format!("{file}: {}", line.trim()));
                }
            }
        }
    }
    assert!(upward.is_empty(), "{upward:#?}");
}
