//! A table that fits a terminal.

use std::io::{IsTerminal, stdout};

use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

/// The space between two columns.
const GAP: &str = "  ";

/// The width below which no column is narrowed to fit the terminal.
const NARROWEST: usize = 6;

/// Returns the maximum width of a line. `None` if the output is not a terminal, because programs read whole lines.
pub(crate) fn width() -> Option<usize> {
    if !stdout().is_terminal() {
        return None;
    }
    let (width, _) = terminal_size::terminal_size_of(stdout())?;
    Some(usize::from(width.0)).filter(|&width| width > 0)
}

/// Lays out rows below a headline. Each line ends with a line feed, and has no trailing spaces.
///
/// If the rows are wider than `width`, narrows the widest columns first, and then truncates the lines.
pub(crate) fn lay_out<const N: usize>(
    headline: [&str; N],
    rows: &[[String; N]],
    width: Option<usize>,
) -> String {
    let clean = |row: &[String; N]| row.each_ref().map(|cell| printable(cell));
    let rows: Vec<[String; N]> =
        [headline.map(str::to_owned)].iter().chain(rows).map(clean).collect();
    let mut widths = [0; N];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.width());
        }
    }
    if let Some(width) = width {
        fit(&mut widths, width.saturating_sub(GAP.len() * N.saturating_sub(1)));
    }
    let mut text = String::new();
    for row in &rows {
        let cells = row.iter().zip(widths).map(|(cell, width)| pad(shorten(cell, width), width));
        let line = cells.collect::<Vec<_>>().join(GAP);
        text.push_str(shorten(line.trim_end(), width.unwrap_or(usize::MAX)).trim_end());
        text.push('\n');
    }
    text
}

/// Narrows the widest columns until all fit, but none below [`NARROWEST`].
fn fit(widths: &mut [usize], room: usize) {
    while widths.iter().sum::<usize>() > room
        && let Some(widest) = widths.iter_mut().max().filter(|widest| **widest > NARROWEST)
    {
        *widest -= 1;
    }
}

/// Replaces control characters, which could move the cursor or worse, with `?`.
fn printable(cell: &str) -> String {
    cell.chars().map(|c| if c.width().is_none() { '?' } else { c }).collect()
}

pub(crate) fn shorten(cell: &str, width: usize) -> String {
    if cell.width() <= width {
        return cell.to_owned();
    }
    let mut room = width.saturating_sub(1);
    let fits = |c: &char| match room.checked_sub(c.width().unwrap_or_default()) {
        Some(left) => {
            room = left;
            true
        }
        None => false,
    };
    let mut short: String = cell.chars().take_while(fits).collect();
    short.push('…');
    short
}

fn pad(mut cell: String, width: usize) -> String {
    cell.extend(std::iter::repeat_n(' ', width.saturating_sub(cell.width())));
    cell
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(width: Option<usize>) -> String {
        let rows =
            [["a very long name of a lock", "app"], ["漢字漢字漢字漢字漢字漢字", "x\u{1b}[31m\ny"]];
        lay_out(["KEY", "USER"], &rows.map(|row| row.map(str::to_owned)), width)
    }

    #[test]
    fn a_table_is_as_wide_as_it_needs_to_be() {
        let expected = "\
KEY                         USER
a very long name of a lock  app
漢字漢字漢字漢字漢字漢字    x?[31m?y
";
        assert_eq!(table(None), expected);
        assert_eq!(table(Some(36)), expected);
    }

    #[test]
    fn no_line_is_wider_than_the_terminal() {
        assert!(
            table(Some(30)).starts_with("KEY                   USER\na very long name of…  app\n")
        );
        for width in 0..40 {
            for line in table(Some(width)).lines() {
                assert!(line.width() <= width.max(1), "{line:?} in {width}");
            }
        }
    }
}
