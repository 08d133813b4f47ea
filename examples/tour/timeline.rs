//! Draws in text which process held the lock when: a row for each process, a column for each instant.

use crate::actor::Actor;
use crate::took;

const COLUMNS: u64 = 64;

/// An activity of an actor, with its start and its end in microseconds.
#[derive(Clone, Debug)]
pub(crate) struct Span {
    pub(crate) from: u64,
    pub(crate) to: u64,
    pub(crate) what: Looks,
}

/// How a span is drawn. Where two spans fall on one place, the later variant is shown.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum Looks {
    Works,
    Waits,
    Shares,
    Holds,
    GivesUp,
    Dies,
}

impl Looks {
    const ALL: [(Self, char, &str); 6] = [
        (Self::Works, '░', "works, without a lock"),
        (Self::Waits, '·', "waits"),
        (Self::Shares, '▒', "shares the lock"),
        (Self::Holds, '█', "has the lock alone"),
        (Self::GivesUp, 'x', "goes without"),
        (Self::Dies, '†', "is killed"),
    ];

    fn char(self) -> char {
        Self::ALL.iter().find(|(looks, ..)| *looks == self).map_or('?', |(_, char, _)| *char)
    }
}

/// Prints the spans of the actors, all or those within a window.
pub(crate) fn draw(actors: &[&Actor], window: Option<(u64, u64)>) {
    let spans = || actors.iter().flat_map(|actor| &actor.spans);
    let ends = || spans().flat_map(|span| [span.from, span.to]);
    let all = ends().min().zip(ends().max());
    let Some((from, to)) = window.or(all) else { return };
    let length = to.saturating_sub(from).max(1);

    let mut seen = Vec::new();
    for actor in actors {
        let row: String = (0..COLUMNS)
            .map(|column| {
                let first = from + length * column / COLUMNS;
                let last = from + length * (column + 1) / COLUMNS;
                let middle = first.midpoint(last);
                // A span with a length is shown if it covers the middle, so that one column is one instant for
                // all rows. A span without a length is shown wherever it falls.
                let looks = actor.spans.iter().filter(|span| {
                    let lasts = (span.from..span.to).contains(&middle);
                    let strikes = span.from == span.to
                        && (first..last).contains(&span.from.min(to.saturating_sub(1)));
                    lasts || strikes
                });
                let Some(looks) = looks.map(|span| span.what).max() else { return ' ' };
                seen.push(looks);
                looks.char()
            })
            .collect();
        println!("  {:<5} {}", actor.name, row.trim_end());
    }

    let end = took(length);
    let line = "─".repeat(usize::try_from(COLUMNS).unwrap_or_default() - 3 - end.chars().count());
    println!("        0 {line} {end}");
    let legend = Looks::ALL.iter().filter(|(looks, ..)| seen.contains(looks));
    let legend: Vec<_> = legend.map(|(_, char, meaning)| format!("{char} {meaning}")).collect();
    println!("        {}", legend.join("   "));
}
