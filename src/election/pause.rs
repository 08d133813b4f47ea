//! How long a candidate pauses between two terms.

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

/// A term that is shorter than this is followed by a pause.
const SHORT: Duration = Duration::from_secs(1);

/// The shortest pause, and the longest. A term that fails is followed by a pause unless it lasted for longer
/// than the longest one.
const SHORTEST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_mins(1);

/// Pauses that grow from term to term, until a term is neither short nor a failure.
#[derive(Default)]
pub(super) struct Pauses {
    /// The last pause, without its jitter.
    last: Option<Duration>,
}

impl Pauses {
    /// Returns the pause after a term. Pauses vary, so that candidates don't campaign in step.
    pub(super) fn after(&mut self, term: Duration, failed: bool) -> Option<Duration> {
        let limit = if failed { LONGEST } else { SHORT };
        if term >= limit {
            self.last = None;
            return None;
        }
        let least = self.last.map_or(SHORTEST, |last| last * 2).min(LONGEST);
        self.last = Some(least);
        let jitter = u32::try_from(RandomState::new().hash_one(0) % 1000).unwrap_or_default();
        Some((least + least / 1000 * jitter).min(LONGEST))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(2);

    #[test]
    fn short_terms_are_few_in_the_first_minute() {
        for _ in 0..1000 {
            let mut pauses = Pauses::default();
            let (mut elapsed, mut last, mut terms) = (Duration::ZERO, Duration::ZERO, 0);
            while elapsed < Duration::from_mins(1) {
                terms += 1;
                let pause = pauses.after(Duration::ZERO, false).unwrap();
                assert!(pause >= SHORTEST && pause <= LONGEST, "{pause:?}");
                assert!(pause >= last, "{pause:?} after {last:?}");
                last = pause;
                elapsed += pause;
            }
            assert!(terms <= 6, "{terms}");
        }
    }

    #[test]
    fn pauses_grow_to_the_longest_and_differ() {
        let mut pauses = Pauses::default();
        for _ in 0..100 {
            pauses.after(Duration::ZERO, false);
        }
        assert_eq!(pauses.after(Duration::ZERO, false), Some(LONGEST));
        let first = |_| Pauses::default().after(Duration::ZERO, true);
        let first: std::collections::BTreeSet<_> = (0..100).map(first).collect();
        assert!(first.len() > 10, "{first:?}");
    }

    #[test]
    fn a_long_term_ends_the_pauses_unless_it_failed() {
        let mut pauses = Pauses::default();
        pauses.after(Duration::ZERO, false);
        pauses.after(Duration::ZERO, true);
        assert!(pauses.after(LONG, true).unwrap() >= SHORTEST * 4);
        assert_eq!(pauses.after(LONG, false), None);
        assert!(pauses.after(LONG, true).unwrap() <= SHORTEST * 2);
        assert_eq!(pauses.after(LONGEST, true), None);
    }
}
