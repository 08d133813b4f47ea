//! Targets of figures.

#![expect(clippy::print_stdout, reason = "a bench is there to print")]

/// Prints whether figures are at most a target. A missed target is not a failure, because the machine may be busy.
pub(crate) fn print_at_most(what: &str, figures: &[f64], most: f64) {
    let shown = figures.iter().map(|figure| format!("{figure:.3}"));
    let verdict = if figures.iter().all(|figure| *figure <= most) { "met" } else { "missed" };
    println!("{what} <= {most}: {verdict}, {}", shown.collect::<Vec<_>>().join(" "));
}
