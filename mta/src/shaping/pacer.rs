//! How often: at most N in any window, with the time as an argument.
//!
//! Owns the arithmetic of a rate. Reads no clock, sleeps nowhere.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use model::units::Rate;

/// The most moments remembered per pacer: what a second holds beyond this is spread over parts of it.
const LOG_MAX: u32 = 1_024;

/// A second here is this much longer: the destination counts what arrives, and how long a command was
/// on its way is known from the reply to it, but for how it came back.
const ON_THE_WAY: Duration = Duration::from_millis(25);

/// A second of a part is this long on its way. Less than [`ON_THE_WAY`], since it is evenly spread:
/// what comes late is one or two, never all at once.
const PART_ON_THE_WAY: Duration = Duration::from_millis(10);

/// What a second may hold of a part is spread over this: 3 % less than the rate, so that a permit
/// that was taken late does not delay those after it, and 10 s still hold 95 % of the rate.
const PART_SPREAD: Duration = Duration::from_millis(1_030);

/// So much of a part that was missed is caught up with.
const PART_LATE: Duration = Duration::from_millis(100);

/// How soon whoever stood back asks again.
const YIELD: Duration = Duration::from_millis(5);

/// How soon is asked again when all permits are in use by commands that are overdue.
const OVERDUE: Duration = Duration::from_millis(50);

/// What is unanswered for so long counts as read then: a host that is silent must not hold up the
/// others of its destination.
const SILENT: Duration = Duration::from_secs(2);

/// Evenly spread permits come no more often than this: faster ones come several at a time.
const SLICE: f64 = 0.02;

/// How often something may happen, and how it is spread.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Pace {
    /// As an operator wrote it. `N/s` may burst: any N at once, but no window of a second holds
    /// more than N, at the destination neither. A rate per minute, hour or day is spread evenly,
    /// so that `100/h` never means a hundred in one breath.
    Configured(Rate),
    /// So many in a second, more than 0, evenly spread, so that a receiver that counts by windows
    /// of any kind finds the same in each. Infinite: no limit.
    Even(f64),
    /// A node's part of a rate that nodes keep together: evenly spread, what was missed by a moment
    /// is caught up with, and no window of a second holds more than so many, so that all parts
    /// together hold no more than the whole.
    Part(u32),
}

impl Pace {
    /// How many in a second; infinite when unlimited.
    pub fn per_second(self) -> f64 {
        match self {
            Self::Configured(rate) => rate.per_second(),
            Self::Even(rate) => rate,
            Self::Part(count) => f64::from(count) / PART_SPREAD.as_secs_f64(),
        }
    }
}

impl From<Rate> for Pace {
    fn from(rate: Rate) -> Self {
        Self::Configured(rate)
    }
}

/// Permits for one pace.
#[derive(Debug, Clone)]
pub struct Pacer {
    pace: Pace,
    /// How many a window holds; zero stands for no limit.
    count: usize,
    window: Duration,
    /// The latest permits, oldest first, at most `count`. They may lie in the future: reserved.
    taken: VecDeque<Instant>,
    /// Permits in use by commands of which nobody knows when the destination reads them, by when they
    /// were taken, and whether they travel behind other commands.
    under_way: VecDeque<(Instant, bool)>,
    /// How many of them do.
    behind: usize,
    /// No permit before: a pace that was left behind gave too many.
    not_before: Option<Instant>,
    /// When the next permit of a part is due.
    due: Option<Instant>,
    /// Who waits for a permit and goes before the others.
    claims: usize,
}

/// What a MAIL was begun with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Permit {
    /// Counted when it was taken.
    Counted,
    /// Counts as taken in every window until [`Pacer::arrived`], which must follow.
    UnderWay {
        /// When it was taken.
        since: Instant,
        /// Other commands go before the MAIL.
        is_behind: bool,
    },
}

/// At most this part of a rate is given to commands that travel behind others.
const BEHIND_PART: usize = 4;

impl Pacer {
    /// A pacer whose last window, up to `now`, counts as used up: what this process sent before it
    /// was restarted is not known, and a restart must not double a rate.
    pub fn exhausted(pace: impl Into<Pace>, now: Instant) -> Self {
        let mut pacer = Self::new(pace);
        pacer.taken.extend(std::iter::repeat_n(now, pacer.count));
        pacer
    }

    /// A pacer that has given no permit.
    pub fn new(pace: impl Into<Pace>) -> Self {
        let pace = pace.into();
        let (count, window) = shape(pace);
        Self {
            pace,
            count,
            window,
            taken: VecDeque::with_capacity(count),
            under_way: VecDeque::new(),
            behind: 0,
            not_before: None,
            due: None,
            claims: 0,
        }
    }

    /// Counts the last window, up to `now`, as used up: by others.
    pub fn use_up(&mut self, now: Instant) {
        self.taken.clear();
        self.taken.extend(std::iter::repeat_n(now, self.count));
    }

    /// The pace it keeps.
    pub fn pace(&self) -> Pace {
        self.pace
    }

    /// Keeps another pace from now on; permits given under the old one count.
    pub fn change(&mut self, pace: impl Into<Pace>) {
        let pace = pace.into();
        self.pace = pace;
        self.due = None;
        let was_full = self.taken.len() + self.under_way.len() >= self.count;
        (self.count, self.window) = shape(pace);
        let Some(last) = self.taken.back().copied() else {
            return;
        };
        self.not_before = self.not_before.max(self.paid_at(last));
        let surplus = self.taken.len().saturating_sub(self.count);
        self.taken.drain(..surplus);
        // A full log may have forgotten older ones: they count as given with its oldest.
        let oldest = self.taken.front().copied().filter(|_| was_full);
        while let Some(oldest) = oldest.filter(|_| self.taken.len() < self.count) {
            self.taken.push_front(oldest);
        }
    }

    /// When what the second up to `last` held is paid for at the new pace: counted from any of
    /// them on, they must fit into the time since. After a second nobody counts them any more.
    fn paid_at(&self, last: Instant) -> Option<Instant> {
        let second = Duration::from_secs(1) + ON_THE_WAY;
        let each = self.window / u32::try_from(self.count.max(1)).unwrap_or(1);
        let lately = self.taken.iter().rev().zip(1..);
        let owed = lately.take_while(|(at, _)| **at + second > last);
        let paid = owed
            .map(|(at, count)| *at + each.saturating_mul(count))
            .max()?;
        Some(paid.min(last + second))
    }

    /// When the next permit is free; not before `now`.
    pub fn free_at(&self, now: Instant) -> Instant {
        let now = match self.not_before.max(self.due) {
            Some(at) if self.count > 0 => now.max(at),
            Some(_) | None => now,
        };
        let room = self.count.saturating_sub(self.under_way.len());
        if self.count == 0 || self.taken.len() < room {
            return now.max(self.taken.back().copied().unwrap_or(now));
        }
        if room == 0 {
            let first = self.under_way.front().map_or(now, |(since, _)| *since);
            return (first + self.window).max(now + OVERDUE);
        }
        // Sorted: with this one out of the window there is room for one more.
        let leaving = self.taken.get(self.taken.len() - room);
        now.max(leaving.copied().unwrap_or(now) + self.window)
    }

    /// Takes a permit for a MAIL if one is free at `now`, and nobody has a claim where `is_urgent` is
    /// false. The destination counts it when it reads it, which is known with the reply; until then it
    /// counts as taken in every window. Where replies take as long as a window, that would only make
    /// the rate lower: then it counts as taken now.
    ///
    /// An even pace has no second to keep to: there it counts as taken now.
    ///
    /// # Errors
    /// When to ask again.
    pub fn begin(
        &mut self,
        now: Instant,
        is_urgent: bool,
        reply_takes: Duration,
    ) -> Result<Permit, Instant> {
        self.settle(now);
        match self.free_at(now) {
            at if at > now => Err(at),
            _ if self.claims > 0 && !is_urgent => Err(now + YIELD),
            _ if self.counts_arrivals() && reply_takes < self.window => Ok(self.hold(now, false)),
            _ => {
                self.note(now);
                self.is_used(now);
                Ok(Permit::Counted)
            }
        }
    }

    /// As [`Self::begin`], for a MAIL that the destination will read when it is done with what was sent
    /// before: as late as it likes. `None` if too much of the rate is in use by such: then it has to
    /// wait until nothing is before it.
    pub fn begin_behind(&mut self, now: Instant, is_urgent: bool) -> Option<Permit> {
        if self.count == 0 {
            return Some(Permit::Counted);
        }
        if self.claims > 0 && !is_urgent {
            return None;
        }
        if let Pace::Even(_) = self.pace {
            return self.take(now).ok().map(|()| Permit::Counted);
        }
        self.settle(now);
        let is_free = self.behind < self.count / BEHIND_PART && self.free_at(now) <= now;
        is_free.then(|| self.hold(now, true))
    }

    /// What a permit was for has been read, at the latest at `at`.
    pub fn arrived(&mut self, permit: Permit, at: Instant) {
        let Permit::UnderWay { since, is_behind } = permit else {
            return;
        };
        let ours = |entry: &(Instant, bool)| *entry == (since, is_behind);
        let Some(place) = self.under_way.iter().position(ours) else {
            return;
        };
        self.under_way.remove(place);
        self.behind = self.behind.saturating_sub(usize::from(is_behind));
        self.note(at.max(since));
    }

    /// Whether arrivals are counted in windows. A rate over a longer time is spread, and what one of
    /// its permits is late by is nothing against its window.
    fn counts_arrivals(&self) -> bool {
        match self.pace {
            Pace::Configured(Rate::Limited { per, .. }) => per <= Duration::from_secs(1),
            Pace::Part(_) => true,
            Pace::Configured(Rate::Unlimited) | Pace::Even(_) => false,
        }
    }

    fn settle(&mut self, now: Instant) {
        let is_silent = |entry: &&(Instant, bool)| entry.0 + SILENT <= now;
        let first = |under_way: &VecDeque<(Instant, bool)>| {
            let mut silent = under_way.iter().take_while(is_silent);
            silent.position(|(_, is_behind)| !is_behind)
        };
        while let Some((since, _)) = first(&self.under_way).and_then(|at| self.under_way.remove(at))
        {
            self.note(since + SILENT);
        }
    }

    fn hold(&mut self, now: Instant, is_behind: bool) -> Permit {
        let latest = self.under_way.back();
        let since = latest.map_or(now, |(latest, _)| now.max(*latest));
        self.under_way.push_back((since, is_behind));
        self.behind += usize::from(is_behind);
        self.is_used(now);
        Permit::UnderWay { since, is_behind }
    }

    /// Whether no permit lies in the window that ends at `now`.
    pub fn is_fresh(&self, now: Instant) -> bool {
        let latest = self.taken.back();
        let is_paid = self.not_before.is_none_or(|at| at <= now);
        self.under_way.is_empty() && is_paid && latest.is_none_or(|at| *at + self.window <= now)
    }

    /// Whether a permit is reserved that has not come yet.
    pub fn is_ahead(&self, now: Instant) -> bool {
        self.taken.back().is_some_and(|at| *at > now)
    }

    /// Takes a permit if one is free at `now`.
    ///
    /// # Errors
    /// When to ask again.
    pub fn take(&mut self, now: Instant) -> Result<(), Instant> {
        match self.free_at(now) {
            at if at <= now => {
                self.note(now);
                self.is_used(now);
                Ok(())
            }
            at => Err(at),
        }
    }

    /// Somebody who goes before the others waits for a permit.
    pub fn claim(&mut self) {
        self.claims += 1;
    }

    /// That has ended.
    pub fn unclaim(&mut self) {
        self.claims = self.claims.saturating_sub(1);
    }

    /// Takes the next permit, now or in the future, and says when it may be used.
    pub fn reserve(&mut self, now: Instant) -> Instant {
        let at = self.free_at(now);
        self.note(at);
        self.is_used(at);
        at
    }

    /// The next permit of a part is due after this one: counted from when this one was due, unless
    /// that is long ago.
    fn is_used(&mut self, at: Instant) {
        if let Pace::Part(count) = self.pace {
            let due = self.due.unwrap_or(at);
            let late = at.saturating_duration_since(due).saturating_sub(PART_LATE);
            self.due = Some(due + late + part(PART_SPREAD, count));
        }
    }

    fn note(&mut self, at: Instant) {
        if self.count == 0 {
            return;
        }
        // Most are the latest; what was read before others of which is known sooner is not.
        let place = self.taken.partition_point(|taken| *taken <= at);
        self.taken.insert(place, at);
        if self.taken.len() > self.count {
            self.taken.pop_front();
        }
    }
}

/// How many permits in which window keep `pace`.
fn shape(pace: Pace) -> (usize, Duration) {
    let second = Duration::from_secs(1);
    match pace {
        Pace::Configured(Rate::Unlimited) => (0, Duration::ZERO),
        Pace::Configured(Rate::Limited { count, per }) if per > second => (1, part(per, count)),
        Pace::Configured(Rate::Limited { count, per }) => in_parts(count, per + ON_THE_WAY),
        Pace::Part(count) => in_parts(count.max(1), second + PART_ON_THE_WAY),
        Pace::Even(rate) if rate.is_infinite() => (0, Duration::ZERO),
        Pace::Even(rate) => {
            let slice = whole(rate * SLICE);
            (slice as usize, lasts(f64::from(slice), rate))
        }
    }
}

/// k parts of a window, each with the k-th part: any window touches at most k whole ones.
fn in_parts(count: u32, window: Duration) -> (usize, Duration) {
    let parts = count.div_ceil(LOG_MAX);
    ((count / parts) as usize, part(window, parts))
}

/// One of so many parts of a time, rounded up: one too short by a nanosecond would let one too many
/// in.
fn part(of: Duration, parts: u32) -> Duration {
    let each = of / parts;
    each + Duration::from_nanos(u64::from(each * parts < of))
}

/// How long so many take, within what a [`Duration`] can hold.
fn lasts(count: f64, rate: f64) -> Duration {
    let nanos = count / rate.max(f64::MIN_POSITIVE) * 1e9;
    // Rounded up, as above.
    Duration::from_secs_f64(nanos.ceil().clamp(1.0, 3e18) / 1e9)
}

/// The next whole number, at least 1.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the cast saturates, and a rate that high is none"
)]
fn whole(rate: f64) -> u32 {
    rate.ceil().max(1.0) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use service::clock::{Clock, SystemClock};

    const SECOND: Duration = Duration::from_millis(1_025);

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
        let behind = [(); 2].map(|()| pacer.begin_behind(start, false).expect("a permit"));
        assert_eq!(
            pacer.begin_behind(start, true),
            None,
            "a quarter of the rate"
        );
        let later = start + Duration::from_secs(60);
        for _ in 0..6 {
            assert_eq!(pacer.take(later), Ok(()));
        }
        assert_eq!(pacer.take(later), Err(later + SECOND));
        let arrival = later + SECOND / 2;
        for permit in behind {
            pacer.arrived(permit, arrival);
        }
        assert_eq!(pacer.take(arrival), Err(later + SECOND));
        for _ in 0..6 {
            assert_eq!(pacer.take(later + SECOND), Ok(()));
        }
        assert_eq!(pacer.take(later + SECOND), Err(arrival + SECOND));
        assert_eq!(Pacer::new(rate("3/s")).begin_behind(start, true), None);
        let mut unlimited = Pacer::new(Rate::Unlimited);
        assert!((0..1_000).all(|_| unlimited.begin_behind(start, false) == Some(Permit::Counted)));
    }

    #[test]
    fn what_left_late_counts_from_when_it_was_read() {
        let start = SystemClock.instant();
        let quick = Duration::from_millis(2);
        let mut pacer = Pacer::new(rate("10/s"));
        let permits: Vec<_> = (0..10)
            .map(|_| pacer.begin(start, false, quick).expect("a permit"))
            .collect();
        assert_eq!(pacer.begin(start, false, quick), Err(start + SECOND));
        // Nothing of it has been heard of yet.
        let overdue = start + SECOND;
        assert_eq!(pacer.begin(overdue, false, quick), Err(overdue + OVERDUE));
        let read = overdue + Duration::from_millis(300);
        for permit in permits {
            pacer.arrived(permit, read);
        }
        assert_eq!(pacer.begin(read, false, quick), Err(read + SECOND));
        assert!(pacer.begin(read + SECOND, false, quick).is_ok());
        // One that says nothing holds up the others no longer than that.
        let mut silent = Pacer::new(rate("1/s"));
        let permit = silent.begin(start, false, quick).expect("a permit");
        let late = start + SILENT;
        assert_eq!(silent.begin(late, false, quick), Err(late + SECOND));
        silent.arrived(permit, late + SECOND);
        assert!(silent.begin(late + SECOND, false, quick).is_ok());
        // Whoever takes as long as a window to answer anything is counted from when it was sent.
        let mut slow = Pacer::new(rate("1/s"));
        assert_eq!(slow.begin(start, false, SECOND), Ok(Permit::Counted));
        assert_eq!(slow.begin(start, false, SECOND), Err(start + SECOND));
        let mut spread = Pacer::new(rate("60/m"));
        assert_eq!(spread.begin(start, false, quick), Ok(Permit::Counted));
    }

    #[test]
    fn an_even_pace_is_even_and_slices_are_short() {
        let start = SystemClock.instant();
        let mut pacer = Pacer::new(Pace::Even(9.5));
        let at: Vec<_> = (0..20).map(|_| pacer.reserve(start)).collect();
        for pair in at.windows(2) {
            assert_eq!((pair[1] - pair[0]).as_millis(), 105);
        }
        let mut fast = Pacer::new(Pace::Even(1_000.0));
        assert_eq!((0..20).filter(|_| fast.take(start).is_ok()).count(), 20);
        assert_eq!(fast.take(start), Err(start + Duration::from_millis(20)));
        assert_eq!(Pacer::new(Pace::Even(f64::INFINITY)).take(start), Ok(()));
        let mut behind = Pacer::new(Pace::Even(10.0));
        assert_eq!(behind.begin_behind(start, false), Some(Permit::Counted));
        assert_eq!(behind.begin_behind(start, false), None);
        behind.arrived(Permit::Counted, start + SECOND);
        let later = start + Duration::from_millis(100);
        assert!(behind.begin_behind(later, false).is_some());
        let slow = Pacer::exhausted(Pace::Even(1.0 / 60.0), start);
        assert_eq!(slow.free_at(start), start + Duration::from_secs(60));
    }

    #[test]
    fn a_part_catches_up_with_a_moment_and_not_with_more() {
        let start = SystemClock.instant();
        let mut pacer = Pacer::new(Pace::Part(10));
        let each = Duration::from_millis(103);
        assert_eq!(pacer.take(start), Ok(()));
        assert_eq!(pacer.take(start), Err(start + each));
        // One and a half too late: the next comes when it would have come.
        let late = start + each + Duration::from_millis(50);
        assert_eq!(pacer.take(late), Ok(()));
        assert_eq!(pacer.take(late), Err(start + each * 2));
        let idle = start + Duration::from_secs(60);
        assert_eq!(pacer.take(idle), Ok(()));
        let next = pacer.free_at(idle);
        assert_eq!(next, idle + Duration::from_millis(3));
        pacer.use_up(next);
        assert_eq!(pacer.free_at(next), next + Duration::from_millis(1_010));
    }

    #[test]
    fn whoever_has_a_claim_goes_first() {
        let start = SystemClock.instant();
        let mut pacer = Pacer::new(rate("1/s"));
        pacer.claim();
        let begin = |pacer: &mut Pacer, now, is_urgent| pacer.begin(now, is_urgent, SECOND).err();
        assert_eq!(begin(&mut pacer, start, false), Some(start + YIELD));
        assert_eq!(begin(&mut pacer, start, true), None);
        pacer.unclaim();
        assert_eq!(begin(&mut pacer, start, false), Some(start + SECOND));
        assert_eq!(begin(&mut pacer, start + SECOND, false), None);
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

        /// By the destination's clock, with writes that are held up, a network that is, and a
        /// destination that takes its time; and where nothing is, the rate is used.
        #[test]
        fn no_second_of_the_destination_holds_more_than_the_rate(
            count in 1_u32..40, round_trip in 1_u64..400, jitter in 0_u64..5, stalls: bool, parts: bool, seed: u64,
        ) {
            let millis = Duration::from_millis;
            let mut chance = fastrand::Rng::with_seed(seed);
            let mut late = |one_way: u64| {
                let stalled = if stalls && chance.u8(0..10) == 0 { chance.u64(0..700) } else { 0 };
                millis(one_way + stalled + chance.u64(0..=jitter))
            };
            let start = SystemClock.instant();
            let end = start + Duration::from_secs(30);
            let mut pacer = match parts {
                true => Pacer::new(Pace::Part(count)),
                false => Pacer::new(Rate::Limited { count, per: Duration::from_secs(1) }),
            };
            let (mut now, mut read, mut replies) = (start, Vec::new(), Vec::new());
            while now < end {
                let ask_at = match pacer.begin(now, false, millis(round_trip)) {
                    Ok(permit) => {
                        let read_at = now + late(round_trip / 2);
                        read.push(read_at);
                        replies.push((read_at + late(round_trip - round_trip / 2), permit));
                        now
                    }
                    Err(at) => at,
                };
                // What is heard before that.
                replies.sort_unstable_by_key(|(at, _)| *at);
                let heard = replies.partition_point(|(at, _)| *at <= ask_at);
                for (at, permit) in replies.drain(..heard) {
                    pacer.arrived(permit, at - millis(round_trip));
                }
                now = ask_at;
            }
            read.sort_unstable();
            for (first, at) in read.iter().enumerate() {
                let second = *at + Duration::from_secs(1);
                let within = read[first..].partition_point(|at| *at < second);
                prop_assert!(within <= count as usize, "{within} in a second of {count}");
            }
            if !stalls {
                let used = f64::from(u32::try_from(read.len()).expect("few")) / (f64::from(count) * 30.0);
                prop_assert!(used >= 0.95, "{used} of the rate");
            }
        }

        /// Whatever the changes, no second holds more than the highest pace that held in it.
        #[test]
        fn a_change_opens_no_gap(
            paces in proptest::collection::vec((1_u32..60, any::<bool>(), 100_u64..4_000), 1..12),
        ) {
            let second = Duration::from_secs(1);
            let mut now = SystemClock.instant();
            let mut pacer: Option<Pacer> = None;
            let mut taken: Vec<Instant> = Vec::new();
            let mut held: Vec<(Instant, Instant, f64)> = Vec::new();
            for (rate, even, millis) in paces {
                let pace = match even {
                    true => Pace::Even(f64::from(rate) - 0.5),
                    false => Pace::Configured(Rate::Limited { count: rate, per: second }),
                };
                match &mut pacer {
                    Some(pacer) => pacer.change(pace),
                    None => pacer = Some(Pacer::new(pace)),
                }
                let end = now + Duration::from_millis(millis);
                held.push((now, end, pace.per_second()));
                let permits = pacer.as_mut().expect("made");
                while now < end {
                    match permits.take(now) {
                        Ok(()) => taken.push(now),
                        Err(at) => now = at.min(end),
                    }
                }
            }
            for (at, first) in taken.iter().enumerate() {
                let count = taken[at..].iter().take_while(|then| **then < *first + second).count();
                // What a higher pace left behind just before is paid for in its own time.
                let about = held.iter().filter(|(from, to, _)| *from < *first + second && *to + second > *first);
                let highest = about.map(|(_, _, pace)| pace.ceil()).fold(0.0, f64::max);
                prop_assert!(f64::from(u32::try_from(count).expect("few")) <= highest + 1.0, "{count} at {highest}");
            }
        }

        /// Nodes that share a rate, each late by some milliseconds as a machine is, in virtual time.
        #[test]
        fn parts_of_a_rate_hold_it_from_both_sides(
            rate in 20_u32..200, nodes in 1_u32..5, late in 0_u64..15, seed: u64,
        ) {
            let start = SystemClock.instant();
            let end = start + Duration::from_secs(24);
            let mut chance = fastrand::Rng::with_seed(seed);
            let mut all = Vec::new();
            for node in 0..nodes {
                let count = rate / nodes + u32::from(node < rate % nodes);
                let mut pacer = Pacer::new(Pace::Part(count));
                let mut now = start + Duration::from_millis(chance.u64(0..200));
                while now < end {
                    match pacer.take(now) {
                        Ok(()) => all.push(now),
                        Err(at) => now = at + Duration::from_micros(chance.u64(0..=late * 1_000)),
                    }
                }
            }
            all.sort_unstable();
            let within = |from: Instant, long: Duration| {
                all.partition_point(|at| *at < from + long) - all.partition_point(|at| *at < from)
            };
            for from in &all {
                let second = within(*from, Duration::from_secs(1));
                prop_assert!(second <= rate as usize, "{second} in a second of {rate}");
            }
            let mut from = start + Duration::from_secs(1);
            while from + Duration::from_secs(10) < end {
                let ten = within(from, Duration::from_secs(10));
                // One of each node may stand just outside.
                let least = f64::from(rate) * 9.5 - f64::from(nodes);
                prop_assert!(f64::from(u32::try_from(ten).expect("few")) >= least, "{ten} in 10 s of {rate}");
                from += Duration::from_millis(37);
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
