//! Quantiles of measured durations.

use std::time::Duration;

/// Returns, in microseconds, the sample that the fraction `q` of the samples does not exceed. Not a number if there are
/// no samples.
pub(crate) fn quantile(samples: &[Duration], q: f64) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_unstable();
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_precision_loss,
        clippy::cast_sign_loss,
        reason = "a fraction of a length is a length"
    )]
    let index = (q * sorted.len().saturating_sub(1) as f64) as usize;
    sorted.get(index).map_or(f64::NAN, |sample| sample.as_secs_f64() * 1e6)
}
