//! Prints the results as tables.

#![expect(clippy::print_stdout, reason = "a bench is there to print")]

use sqlx::error::BoxDynError;

use crate::picture::Line;
use crate::table::Table;
use crate::who::Who;

/// Prints a table of rates.
pub(crate) fn print_rates(title: &str, lines: &[Line]) -> Result<(), BoxDynError> {
    print(None, title, lines, Who::name)
}

/// Publishes a table of numbers of connections. `name` is that of the table in the guide.
pub(crate) fn publish_connections(
    name: &'static str,
    title: &str,
    lines: &[Line],
) -> Result<(), BoxDynError> {
    print(Some(name), title, lines, Who::short_name)
}

fn print(
    name: Option<&'static str>,
    title: &str,
    lines: &[Line],
    name_of: fn(Who) -> &'static str,
) -> Result<(), BoxDynError> {
    let mut table = Table::new(name, title, heads(lines));
    for line in lines {
        table.row(name_of(line.who), line.points.iter().map(|(_, y)| format!("{y:.0}")));
    }
    table.publish()
}

/// Publishes a table of the ratios to the first line.
pub(crate) fn publish_ratios(
    name: impl Into<Option<&'static str>>,
    title: &str,
    lines: &[Line],
) -> Result<(), BoxDynError> {
    let mut table = Table::new(name, title, heads(lines));
    let first = lines.first().map_or(&[][..], |first| &first.points);
    for line in lines {
        let ratios = line.points.iter().zip(first).map(|((_, y), (_, one))| y / one);
        table.row(line.who.name(), ratios.map(|ratio| format!("{ratio:.2}")));
    }
    table.publish()
}

/// The heads of the columns: the numbers of tasks or locks.
fn heads(lines: &[Line]) -> impl Iterator<Item = u32> {
    lines.iter().take(1).flat_map(|line| line.points.iter().map(|(x, _)| *x))
}

/// Prints the targets beside the results. A missed target is not a failure, because the machine may be busy.
pub(crate) fn print_targets(many: u32, distinct: &[Line], one: &[Line], bytes_each: f64) {
    let of = |lines: &[Line], tasks, who| {
        let line = lines.iter().find(|line| line.who == who);
        let point = line.and_then(|line| line.points.iter().find(|(x, _)| *x == tasks));
        point.map_or(f64::NAN, |(_, y)| *y)
    };
    let title = "targets";
    println!("\n{title:<50}{:>12}{:>16}{:>16}", "at least", "dropped", "awaited");
    for (words, lines, tasks, than, least) in [
        ("1 task, a free key, × PgAdvisoryLock", distinct, 1, Who::Sqlx, 2.5),
        ("many tasks, a key each, × PgAdvisoryLock", distinct, many, Who::Sqlx, 15.0),
        ("many tasks, a key each, × bare batches", distinct, many, Who::Floor, 0.6),
        ("many tasks, one key, × PgAdvisoryLock", one, many, Who::Sqlx, 20.0),
    ] {
        let [dropped, awaited] = [Who::Manager, Who::ManagerAwaited]
            .map(|who| of(lines, tasks, who) / of(lines, tasks, than));
        println!("{words:<50}{least:>12.1}{:>16}{:>16}", met(dropped, least), met(awaited, least));
    }
    for tasks in [5000, 20_000] {
        let words = format!("{tasks} tasks, a key each, × {many} tasks");
        let [dropped, awaited] = [Who::Manager, Who::ManagerAwaited]
            .map(|who| of(distinct, tasks, who) / of(distinct, many, who));
        println!("{words:<50}{:>12.1}{:>16}{:>16}", 0.7, met(dropped, 0.7), met(awaited, 0.7));
    }
    let verdict = if bytes_each <= 600.0 { "met" } else { "missed" };
    println!("a held lock, at most 600 bytes: {bytes_each:.0}, {verdict}");
}

fn met(ratio: f64, least: f64) -> String {
    format!("{ratio:.2} {}", if ratio >= least { "met" } else { "missed" })
}
