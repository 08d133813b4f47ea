//! Tables of results, which a bench prints, and writes into the guide if `PGLOCK_BENCH_GUIDE` is 1.

#![expect(clippy::print_stdout, reason = "a bench is there to print")]

use std::env;
use std::fs;
use std::iter;

use sqlx::error::BoxDynError;

/// The page of the guide that shows the results.
const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/guide/cost.md");

pub(crate) struct Table {
    /// The name in the comment that precedes the table in the guide, if the table is there.
    name: Option<&'static str>,
    title: String,
    /// The heads of the columns after the first one, whose head is the title.
    heads: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn new<H: ToString>(
        name: impl Into<Option<&'static str>>,
        title: impl Into<String>,
        heads: impl IntoIterator<Item = H>,
    ) -> Self {
        let heads = heads.into_iter().map(|head| head.to_string()).collect();
        Self { name: name.into(), title: title.into(), heads, rows: Vec::new() }
    }

    pub(crate) fn row<C: ToString>(
        &mut self,
        name: impl Into<String>,
        cells: impl IntoIterator<Item = C>,
    ) {
        let cells = cells.into_iter().map(|cell| cell.to_string());
        self.rows.push(iter::once(name.into()).chain(cells).collect());
    }

    /// Prints the table, and writes it into the guide if that is wanted.
    pub(crate) fn publish(&self) -> Result<(), BoxDynError> {
        let width = |cell: &String| cell.chars().count();
        let first = self.rows.iter().filter_map(|row| row.first()).map(width).max();
        let first = first.unwrap_or(0).max(self.title.chars().count());
        let line = |cells: &[String]| {
            let (name, cells) = cells.split_first()?;
            let cells = cells.iter().zip(&self.heads).map(|(cell, head)| {
                let width = width(head).max(8) + 2;
                format!("{cell:>width$}")
            });
            Some(format!("{name:<first$}{}", cells.collect::<String>()))
        };
        println!();
        for row in iter::once(&self.head(&self.title)).chain(&self.rows) {
            println!("{}", line(row).unwrap_or_default());
        }
        self.name.map_or(Ok(()), |name| write(name, &self.markdown()))
    }

    fn head(&self, title: &str) -> Vec<String> {
        iter::once(title.to_owned()).chain(self.heads.iter().cloned()).collect()
    }

    fn markdown(&self) -> String {
        let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
        let rule = format!("|{}\n", "---|".repeat(self.heads.len() + 1));
        let rows = self.rows.iter().map(|row| line(row));
        iter::once(line(&self.head(""))).chain([rule]).chain(rows).collect()
    }
}

/// Whether the results are written into the guide.
pub(crate) fn is_for_guide() -> bool {
    env::var_os("PGLOCK_BENCH_GUIDE").is_some_and(|value| value == "1")
}

/// Writes lines into the guide, if that is wanted, in place of those between the comment with this name and the next
/// blank line.
pub(crate) fn write(name: &str, lines: &str) -> Result<(), BoxDynError> {
    if !is_for_guide() {
        return Ok(());
    }
    let page = fs::read_to_string(PAGE)?;
    let comment = format!("<!-- bench: {name} -->");
    let (before, rest) =
        page.split_once(&comment).ok_or_else(|| format!("no {comment} in {PAGE}"))?;
    let (_, after) =
        rest.split_once("\n\n").ok_or_else(|| format!("no blank line after {comment}"))?;
    Ok(fs::write(PAGE, format!("{before}{comment}\n{lines}\n{after}"))?)
}
