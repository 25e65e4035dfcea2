//! How often: at most N in any window, with the time as an argument.
//!
//! Owns the arithmetic of a rate. Reads no clock, sleeps nowhere.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use model::units::Rate;

/// The most moments remembered per pacer: what a second holds beyond this is spread over parts of it.
const LOG_MAX: u32 = 1_024;

/// A second here is this much longer: the destination counts what arrives, and a command that took
/// longer on its way than one a second later would fall into the other's second.
const ON_THE_WAY: Duration = Duration::from_millis(50);

/// Permits for one rate.
///
/// A rate per second may burst: any N at once, but no window of a second holds more than N, there
/// neither. A rate
/// per minute, hour or day is spread evenly, so that `100/h` never means a hundred in one breath.
#[derive(Debug, Clone)]
pub struct Pacer {
    rate: Rate,
    /// How many a window holds; zero stands for no limit.
    count: usize,
    window: Duration,
    /// The latest permits, oldest first, at most `count`. They may lie in the future: reserved.
    taken: VecDeque<Instant>,
    /// Permits in use by commands of which nobody knows when the destination will read them.
    under_way: usize,
}

/// At most this part of a rate is given to commands that travel behind others.
const BEHIND_PART: usize = 4;

impl Pacer {
    /// A pacer whose last window, up to `now`, counts as used up: what this process sent before it
    /// was restarted is not known, and a restart must not double a rate.
    pub fn exhausted(rate: Rate, now: Instant) -> Self {
        let mut pacer = Self::new(rate);
        pacer.taken.extend(std::iter::repeat_n(now, pacer.count));
        pacer
    }

    /// A pacer that has given no permit.
    pub fn new(rate: Rate) -> Self {
        let (count, window) = shape(rate);
        Self {
            rate,
            count,
            window,
            taken: VecDeque::with_capacity(count),
            under_way: 0,
        }
    }

    /// The rate it keeps.
    pub fn rate(&self) -> Rate {
        self.rate
    }

    /// Keeps another rate from now on; permits given under the old one count.
    pub fn change(&mut self, rate: Rate) {
        self.rate = rate;
        (self.count, self.window) = shape(rate);
        let surplus = self.taken.len().saturating_sub(self.count);
        self.taken.drain(..surplus);
    }

    /// When the next permit is free; not before `now`.
    pub fn free_at(&self, now: Instant) -> Instant {
        let room = self.count.saturating_sub(self.under_way);
        if self.count == 0 || self.taken.len() < room {
            return now.max(self.taken.back().copied().unwrap_or(now));
        }
        // Sorted: with this one out of the window there is room for one more.
        let leaving = self.taken.get(self.taken.len() - room);
        now.max(leaving.copied().unwrap_or(now) + self.window)
    }

    /// Takes a permit for a command that the destination will read at an unknown time, when it is
    /// done with what was sent before. It counts as taken in every window from now until
    /// [`Self::arrived`], which must follow, and in the window after that. False if too much of the
    /// rate is in use: then the command has to wait until nothing is before it.
    pub fn take_behind(&mut self, now: Instant) -> bool {
        let is_free = self.count == 0
            || (self.under_way < self.count / BEHIND_PART && self.free_at(now) <= now);
        self.under_way += usize::from(is_free);
        is_free
    }

    /// What a permit of [`Self::take_behind`] was for has been read at the latest `now`.
    pub fn arrived(&mut self, now: Instant) {
        self.under_way = self.under_way.saturating_sub(1);
        let latest = self.taken.back().copied().unwrap_or(now);
        self.note(now.max(latest));
    }

    /// Whether no permit lies in the window that ends at `now`.
    pub fn is_fresh(&self, now: Instant) -> bool {
        let latest = self.taken.back();
        latest.is_none_or(|at| *at + self.window <= now)
    }

    /// Takes a permit if one is free at `now`.
    ///
    /// # Errors
    /// When to ask again.
    pub fn take(&mut self, now: Instant) -> Result<(), Instant> {
        match self.free_at(now) {
            at if at <= now => {
                self.note(now);
                Ok(())
            }
            at => Err(at),
        }
    }

    /// Takes the next permit, now or in the future, and says when it may be used.
    pub fn reserve(&mut self, now: Instant) -> Instant {
        let at = self.free_at(now);
        self.note(at);
        at
    }

    fn note(&mut self, at: Instant) {
        if self.count == 0 {
            return;
        }
        if self.taken.len() >= self.count {
            self.taken.pop_front();
        }
        self.taken.push_back(at);
    }
}

/// How many permits in which window keep `rate`.
fn shape(rate: Rate) -> (usize, Duration) {
    let second = Duration::from_secs(1);
    match rate {
        Rate::Unlimited => (0, Duration::ZERO),
        Rate::Limited { count, per } if per > second => (1, per / count),
        // k parts of a second, each with the k-th part: any second touches at most k whole ones.
        Rate::Limited { count, per } => {
            let parts = count.div_ceil(LOG_MAX);
            // Rounded up: a part too short by a nanosecond would let one too many in.
            (
                (count / parts) as usize,
                (per + ON_THE_WAY) / parts + Duration::from_nanos(u64::from(parts > 1)),
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use service::clock::{Clock, SystemClock};

    const SECOND: Duration = Duration::from_millis(1_050);

    fn rate(text: &str) -> Rate {
        text.parse().expect("a rate")
    }

    #[test]
    fn a_second_may_burst_and_an_hour_may_not() {
        let start = SystemClock.instant();
        let mut second = Pacer::new(rate("3/s"));
        for _ in 0..3 {
            assert_eq!(second.take(start), Ok(()));
        }
        assert_eq!(second.take(start), Err(start + SECOND));
        let mut hour = Pacer::new(rate("360/h"));
        assert_eq!(hour.reserve(start), start);
        assert_eq!(hour.reserve(start), start + Duration::from_secs(10));
        assert_eq!(hour.reserve(start), start + Duration::from_secs(20));
    }

    #[test]
    fn a_restart_does_not_double_a_rate() {
        let start = SystemClock.instant();
        let mut pacer = Pacer::exhausted(rate("3/s"), start);
        assert_eq!(pacer.take(start), Err(start + SECOND));
        let mut pacer = Pacer::exhausted(rate("6/m"), start);
        assert_eq!(pacer.take(start), Err(start + Duration::from_secs(10)));
        assert_eq!(Pacer::exhausted(Rate::Unlimited, start).take(start), Ok(()));
    }

    #[test]
    fn what_travels_behind_counts_until_it_has_arrived_and_a_second_longer() {
        let start = SystemClock.instant();
        let mut pacer = Pacer::new(rate("8/s"));
        assert!(pacer.take_behind(start) && pacer.take_behind(start));
        assert!(!pacer.take_behind(start), "a quarter of the rate");
        let later = start + Duration::from_secs(60);
        for _ in 0..6 {
            assert_eq!(pacer.take(later), Ok(()));
        }
        assert_eq!(pacer.take(later), Err(later + SECOND));
        let arrival = later + SECOND / 2;
        pacer.arrived(arrival);
        pacer.arrived(arrival);
        assert_eq!(pacer.take(arrival), Err(later + SECOND));
        for _ in 0..6 {
            assert_eq!(pacer.take(later + SECOND), Ok(()));
        }
        assert_eq!(pacer.take(later + SECOND), Err(arrival + SECOND));
        assert!(!Pacer::new(rate("3/s")).take_behind(start));
        let mut unlimited = Pacer::new(Rate::Unlimited);
        assert!((0..1_000).all(|_| unlimited.take_behind(start)));
    }

    #[test]
    fn a_changed_rate_holds_at_once() {
        let start = SystemClock.instant();
        let mut pacer = Pacer::new(rate("10/s"));
        for _ in 0..10 {
            assert_eq!(pacer.take(start), Ok(()));
        }
        pacer.change(rate("2/s"));
        assert_eq!(
            pacer.take(start + Duration::from_secs(1)),
            Err(start + SECOND)
        );
        pacer.change(Rate::Unlimited);
        assert_eq!(pacer.take(start), Ok(()));
    }

    proptest! {
        #[test]
        fn no_second_holds_more_than_the_rate(
            count in 1_u32..5_000, steps in proptest::collection::vec(0_u64..400, 1..200), greed in 1_usize..2_000,
        ) {
            let mut now = SystemClock.instant();
            let mut pacer = Pacer::new(Rate::Limited { count, per: Duration::from_secs(1) });
            let mut taken = VecDeque::new();
            for step in steps {
                now += Duration::from_millis(step);
                for _ in 0..greed {
                    if pacer.take(now).is_err() {
                        break;
                    }
                    taken.push_back(now);
                }
                while taken.front().is_some_and(|&at: &Instant| now - at >= SECOND) {
                    taken.pop_front();
                }
                prop_assert!(taken.len() <= count as usize, "{} in a second", taken.len());
            }
        }

        #[test]
        fn reservations_are_permits(count in 1_u32..50, asks in 1_usize..200) {
            let now = SystemClock.instant();
            let mut pacer = Pacer::new(Rate::Limited { count, per: Duration::from_secs(1) });
            let slots: Vec<_> = (0..asks).map(|_| pacer.reserve(now)).collect();
            for pair in slots.windows(count as usize + 1) {
                prop_assert!(pair[count as usize] - pair[0] >= SECOND);
            }
        }
    }
}
