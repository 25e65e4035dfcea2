//! How fast messages went lately: a count for each ten seconds of the last minute.

use std::time::{Duration, Instant};

const SLOT: Duration = Duration::from_secs(10);
const SLOTS: usize = 6;

/// The memory; see the module.
#[derive(Debug, Clone)]
pub(super) struct Pace {
    since: Instant,
    /// The slot that was counted in last, by its number since then.
    last: u64,
    counts: [u32; SLOTS],
}

impl Pace {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            since: now,
            last: 0,
            counts: [0; SLOTS],
        }
    }

    /// One more at `now`, which never goes back.
    pub(super) fn note(&mut self, now: Instant) {
        self.turn(now);
        if let Some(count) = self.counts.first_mut() {
            *count = count.saturating_add(1);
        }
    }

    /// In a second, over the last minute or for as long as it is counted.
    pub(super) fn per_second(&self, now: Instant) -> f64 {
        let mut turned = self.clone();
        turned.turn(now);
        let into_slot =
            now.saturating_duration_since(self.since).as_secs_f64() % SLOT.as_secs_f64();
        let whole = turned.last.min(SLOTS as u64 - 1);
        let counted = into_slot + SLOT.as_secs_f64() * f64::from(u32::try_from(whole).unwrap_or(0));
        let sum: u32 = turned
            .counts
            .iter()
            .fold(0, |sum, count| sum.saturating_add(*count));
        // Within the first second there is no pace to speak of.
        f64::from(sum) / counted.max(1.0)
    }

    /// Makes the first slot that of `now`.
    fn turn(&mut self, now: Instant) {
        let slot = now.saturating_duration_since(self.since).as_secs() / SLOT.as_secs();
        let steps = usize::try_from(slot.saturating_sub(self.last))
            .unwrap_or(SLOTS)
            .min(SLOTS);
        if steps > 0 {
            self.counts.rotate_right(steps);
            self.counts
                .iter_mut()
                .take(steps)
                .for_each(|count| *count = 0);
            self.last = slot;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use service::clock::{Clock as _, SystemClock};

    #[test]
    fn the_pace_is_that_of_the_last_minute() {
        let start = SystemClock.instant();
        let at = |millis| start + Duration::from_millis(millis);
        let mut pace = Pace::new(start);
        assert!(pace.per_second(start).abs() < f64::EPSILON);
        // Ten in a second for two minutes, then silence.
        for n in 0..1_200 {
            pace.note(at(n * 100));
        }
        let now = pace.per_second(at(120_000));
        assert!((9.5..=10.5).contains(&now), "{now}");
        let fading = pace.per_second(at(150_000));
        assert!((3.5..=6.0).contains(&fading), "{fading}");
        assert!(pace.per_second(at(400_000)).abs() < f64::EPSILON);
    }

    #[test]
    fn a_first_moment_is_not_called_a_pace() {
        let start = SystemClock.instant();
        let mut pace = Pace::new(start);
        (0..3).for_each(|_| pace.note(start));
        assert!((pace.per_second(start) - 3.0).abs() < f64::EPSILON);
        let later = pace.per_second(start + Duration::from_secs(6));
        assert!((later - 0.5).abs() < f64::EPSILON, "{later}");
    }
}
