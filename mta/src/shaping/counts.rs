//! What a destination answered lately: a window that slides in small steps.
//!
//! Owns counting. Decides nothing.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Answers are counted in steps of this length.
const STEP: Duration = Duration::from_secs(5);
/// Nothing older is kept.
pub(super) const REMEMBERED: Duration = Duration::from_secs(300);

/// What one step, or several, held.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Tally {
    /// Messages that were judged: every answer.
    pub(super) judged: u32,
    /// Taken by the destination, or refused for reasons of the recipient: nothing against our pace.
    pub(super) taken: u32,
    /// Put off, neither by greylisting nor for reasons of the recipient.
    pub(super) deferred: u32,
}

impl Tally {
    fn add(&mut self, other: Self) {
        self.judged = self.judged.saturating_add(other.judged);
        self.taken = self.taken.saturating_add(other.taken);
        self.deferred = self.deferred.saturating_add(other.deferred);
    }
}

/// Tallies of the last five minutes. Quiet destinations cost nothing: empty steps are not kept.
#[derive(Debug, Clone, Default)]
pub(super) struct Counts {
    /// Beginning of a step, counted in steps from `epoch`, oldest first.
    steps: VecDeque<(u64, Tally)>,
    epoch: Option<Instant>,
}

impl Counts {
    /// Counts one answer at `now`.
    pub(super) fn note(&mut self, now: Instant, tally: Tally) {
        let at = self.step_of(now);
        let oldest = at.saturating_sub(steps_in(REMEMBERED));
        while self.steps.front().is_some_and(|(step, _)| *step < oldest) {
            self.steps.pop_front();
        }
        match self.steps.back_mut() {
            // A clock that does not go back still gives late callers an older time.
            Some((step, sum)) if *step >= at => sum.add(tally),
            Some(_) | None => self.steps.push_back((at, tally)),
        }
    }

    /// The sum over the last `window` up to `now`, rounded to whole steps.
    pub(super) fn over(&self, window: Duration, now: Instant) -> Tally {
        let Some(epoch) = self.epoch else {
            return Tally::default();
        };
        let now = steps_in(now.saturating_duration_since(epoch));
        let oldest = (now + 1).saturating_sub(steps_in(window));
        let mut sum = Tally::default();
        self.steps
            .iter()
            .rev()
            .take_while(|(step, _)| *step >= oldest)
            .for_each(|(_, tally)| sum.add(*tally));
        sum
    }

    /// The most messages in a second that any whole step of the last `window` held; none when the
    /// flow is younger than half the window, and so says nothing about its pace.
    pub(super) fn peak(&self, window: Duration, now: Instant) -> Option<f64> {
        let epoch = self.epoch?;
        let now = steps_in(now.saturating_duration_since(epoch));
        let oldest = now.saturating_sub(steps_in(window));
        let recent = || self.steps.iter().filter(|(step, _)| *step >= oldest);
        let (first, _) = recent().next()?;
        if now - first < steps_in(window) / 2 {
            return None;
        }
        let most = recent().map(|(_, tally)| tally.judged).max()?;
        Some(f64::from(most) / STEP.as_secs_f64())
    }

    /// Forgets everything: what comes now is to be judged alone.
    pub(super) fn clear(&mut self) {
        self.steps.clear();
    }

    fn step_of(&mut self, now: Instant) -> u64 {
        let epoch = *self.epoch.get_or_insert(now);
        steps_in(now.saturating_duration_since(epoch))
    }
}

fn steps_in(time: Duration) -> u64 {
    time.as_secs() / STEP.as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use service::clock::{Clock, SystemClock};

    const TAKEN: Tally = Tally {
        judged: 1,
        taken: 1,
        deferred: 0,
    };

    #[test]
    fn a_window_slides() {
        let start = SystemClock.instant();
        let at = |secs| start + Duration::from_secs(secs);
        let mut counts = Counts::default();
        for second in 0..100 {
            counts.note(at(second), TAKEN);
        }
        assert_eq!(counts.over(Duration::from_secs(10), at(99)).taken, 10);
        assert_eq!(counts.over(Duration::from_secs(60), at(99)).taken, 60);
        assert_eq!(counts.over(Duration::from_secs(60), at(140)).taken, 15);
        assert_eq!(counts.over(Duration::from_secs(60), at(900)).taken, 0);
        assert_eq!(counts.peak(Duration::from_secs(60), at(99)), Some(1.0));
        assert_eq!(counts.peak(Duration::from_secs(60), at(900)), None);
        counts.note(at(2_000), TAKEN);
        assert_eq!(counts.steps.len(), 1);
        assert_eq!(counts.peak(Duration::from_secs(60), at(2_004)), None);
    }

    proptest! {
        #[test]
        fn memory_is_bounded_and_nothing_recent_is_lost(gaps in proptest::collection::vec(0_u64..20_000, 1..500)) {
            let mut now = SystemClock.instant();
            let mut counts = Counts::default();
            for gap in gaps {
                now += Duration::from_millis(gap);
                counts.note(now, TAKEN);
                prop_assert!(counts.steps.len() <= 61);
                prop_assert!(counts.over(Duration::from_secs(5), now).taken >= 1);
            }
        }
    }
}
