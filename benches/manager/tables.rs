//! Prints the results as tables.

#![expect(clippy::print_stdout, reason = "a bench is there to print")]

use crate::picture::Line;
use crate::who::Who;

pub(crate) fn print_table(title: &str, lines: &[Line]) {
    print_head(title, lines);
    for line in lines {
        print!("{:<50}", line.who.name());
        line.points.iter().for_each(|(_, y)| print!("{y:>12.0}"));
        println!();
    }
}

/// Prints a table of the ratios to the first line.
pub(crate) fn print_ratios(title: &str, lines: &[Line]) {
    print_head(title, lines);
    for line in lines {
        print!("{:<50}", line.who.name());
        let first = lines.first().map_or(&[][..], |first| &first.points);
        line.points.iter().zip(first).for_each(|((_, y), (_, one))| print!("{:>12.2}", y / one));
        println!();
    }
}

fn print_head(title: &str, lines: &[Line]) {
    print!("\n{title:<50}");
    lines.iter().take(1).flat_map(|line| &line.points).for_each(|(x, _)| print!("{x:>12}"));
    println!();
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
