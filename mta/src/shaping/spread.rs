//! A rate without bursts: one after the other, evenly spread, with the time as an argument.

use std::time::{Duration, Instant};

use model::units::Rate;

/// What was missed by less than this is caught up with, so that a late wake-up costs no throughput.
const CATCH_UP: Duration = Duration::from_millis(100);

/// Evenly spread moments for one rate.
#[derive(Debug, Clone)]
pub struct Spread {
    interval: Duration,
    next: Instant,
}

impl Spread {
    /// The first moment is one interval after `now`: what was sent before is not known.
    pub fn exhausted(rate: Rate, now: Instant) -> Self {
        let interval = rate.interval();
        Self {
            interval,
            next: now + interval,
        }
    }

    /// Another pace from now on, more than 0 in a second.
    pub fn change(&mut self, per_second: f64, now: Instant) {
        self.interval = Duration::try_from_secs_f64(per_second.recip()).unwrap_or(Duration::MAX);
        let soonest = now.checked_add(self.interval);
        self.next = soonest.map_or(self.next, |at| self.next.min(at));
    }

    /// The next moment.
    pub fn next(&self) -> Instant {
        self.next
    }

    /// Takes the next moment, which has come.
    pub fn take(&mut self, now: Instant) {
        let earliest = now.checked_sub(CATCH_UP).unwrap_or(now);
        self.next = self.next.max(earliest) + self.interval;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use service::clock::{Clock as _, SystemClock};

    proptest! {
        #[test]
        fn no_breath_holds_more_than_its_share(
            count in 1_u32..500, steps in proptest::collection::vec(0_u64..400, 1..20),
        ) {
            let mut now = SystemClock.instant();
            let rate = Rate::Limited { count, per: Duration::from_secs(1) };
            let mut spread = Spread::exhausted(rate, now);
            let mut taken = Vec::new();
            for step in steps {
                now += Duration::from_millis(step);
                while spread.next() <= now {
                    spread.take(now);
                    taken.push(now);
                }
            }
            // In any stretch: what the stretch and the catching up hold, and one at its beginning.
            for (n, from) in taken.iter().enumerate() {
                let held = taken.iter().skip(n).take_while(|at| **at <= *from + CATCH_UP).count();
                let share = (2 * CATCH_UP).as_secs_f64() * f64::from(count);
                prop_assert!(held as f64 <= share + 1.0, "{held} at once at {rate}");
            }
        }
    }

    #[test]
    fn punctual_use_gives_the_whole_rate() {
        let start = SystemClock.instant();
        let rate: Rate = "100/s".parse().expect("a rate");
        let mut spread = Spread::exhausted(rate, start);
        let mut sent = 0;
        for ms in 0..=1_000 {
            // Up to four milliseconds late.
            let now = start + Duration::from_millis(ms);
            while ms % 5 == 0 && spread.next() <= now {
                spread.take(now);
                sent += 1;
            }
        }
        assert_eq!(sent, 100);
    }
}
