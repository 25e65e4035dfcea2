//! The limiter and the pacer against receivers that count in their own ways, by a virtual clock:
//! days of mail in seconds.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use model::units::Rate;
use service::clock::{Clock as _, SystemClock};
use service::config::shaping::Limits;

use super::limiter::{Heard, Limiter, Sign};
use super::pacer::Pacer;

const HOUR: Duration = Duration::from_secs(3_600);
/// From us to the receiver; as long back.
const WAY: Duration = Duration::from_millis(40);

/// How a receiver counts what it allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Counting {
    /// So many in any second; what it refused does not count.
    SlidingSecond,
    /// So many in any second; what it refused counts too.
    StrictSecond,
    /// Sixty times as many from each full minute on.
    FixedMinute,
    /// Sixty times as many in any minute.
    SlidingMinute,
    /// A bucket that holds five seconds' worth.
    TokenBucket,
}

const COUNTINGS: [Counting; 5] = [
    Counting::SlidingSecond,
    Counting::StrictSecond,
    Counting::FixedMinute,
    Counting::SlidingMinute,
    Counting::TokenBucket,
];

#[derive(Debug, Clone)]
struct Receiver {
    counting: Counting,
    /// A second.
    allows: f64,
    start: Instant,
    log: VecDeque<Instant>,
    tokens: f64,
    filled_at: Instant,
}

impl Receiver {
    fn new(counting: Counting, allows: f64, start: Instant) -> Self {
        Self {
            counting,
            allows,
            start,
            log: VecDeque::new(),
            tokens: 5.0 * allows,
            filled_at: start,
        }
    }

    fn takes(&mut self, now: Instant) -> bool {
        let second = Duration::from_secs(1);
        match self.counting {
            Counting::SlidingSecond => self.window(second, 1.0, false, now),
            Counting::StrictSecond => self.window(second, 1.0, true, now),
            Counting::SlidingMinute => self.window(60 * second, 60.0, false, now),
            Counting::FixedMinute => {
                let minute = |at: Instant| (at - self.start).as_secs() / 60;
                if self
                    .log
                    .front()
                    .is_some_and(|at| minute(*at) != minute(now))
                {
                    self.log.clear();
                }
                self.room(60.0, now)
            }
            Counting::TokenBucket => {
                let gained = (now - self.filled_at).as_secs_f64() * self.allows;
                self.tokens = (self.tokens + gained).min(5.0 * self.allows);
                self.filled_at = now;
                let takes = self.tokens >= 1.0;
                self.tokens -= f64::from(u8::from(takes));
                takes
            }
        }
    }

    fn window(&mut self, length: Duration, seconds: f64, strict: bool, now: Instant) -> bool {
        while self.log.front().is_some_and(|at| *at + length <= now) {
            self.log.pop_front();
        }
        let takes = self.room(seconds, now);
        if strict && !takes {
            self.log.pop_front();
            self.log.push_back(now);
        }
        takes
    }

    fn room(&mut self, seconds: f64, now: Instant) -> bool {
        let takes =
            (u32::try_from(self.log.len()).map_or(f64::MAX, f64::from)) < self.allows * seconds;
        if takes {
            self.log.push_back(now);
        }
        takes
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct Sum {
    taken: u32,
    refused: u32,
}

/// One sender with endless mail and one receiver.
#[derive(Clone)]
struct World {
    now: Instant,
    limiter: Limiter,
    pacer: Pacer,
    receiver: Receiver,
    /// Begun at, whether it will be taken; answered two ways later.
    flying: VecDeque<(Instant, bool)>,
    tick_at: Instant,
    random: fastrand::Rng,
}

impl World {
    fn new(base: u32, max: u32, counting: Counting, allows: f64) -> Self {
        let start = SystemClock.instant();
        let limits = limits(base, max);
        Self {
            now: start,
            limiter: Limiter::new(&limits, start),
            pacer: Pacer::exhausted(limits.rate, start),
            receiver: Receiver::new(counting, allows, start),
            flying: VecDeque::new(),
            tick_at: start,
            random: fastrand::Rng::with_seed(u64::from(base)),
        }
    }

    /// Sends as fast as it may for `time`.
    fn run(&mut self, time: Duration) -> Sum {
        let end = self.now + time;
        let mut sum = Sum::default();
        while self.now < end {
            let answer_at = self
                .flying
                .front()
                .map_or(end, |(began, _)| *began + 2 * WAY);
            let permit_at = self.pacer.free_at(self.now);
            let next = answer_at.min(permit_at).min(self.tick_at).min(end);
            self.now = self.now.max(next);
            let mut changed = false;
            if self.tick_at <= self.now {
                self.tick_at = self.now + Duration::from_millis(500);
                changed |= !self.limiter.tick(1, self.now).is_empty();
            }
            if answer_at <= self.now
                && let Some((began, taken)) = self.flying.pop_front()
            {
                let sign = if taken { Sign::Peace } else { Sign::Rate };
                let heard = Heard {
                    began,
                    sign,
                    rule: None,
                };
                changed |= !self.limiter.heard(&heard, 1, self.now).is_empty();
            }
            if changed {
                self.pacer.change(self.limiter.in_force().pace);
            } else if self.pacer.take(self.now).is_ok() {
                let late = Duration::from_millis(self.random.u64(..4));
                let taken = self.receiver.takes(self.now + WAY + late);
                self.flying.push_back((self.now, taken));
                sum.taken += u32::from(taken);
                sum.refused += u32::from(!taken);
            }
        }
        sum
    }
}

fn per_second(count: u32) -> Rate {
    Rate::Limited {
        count,
        per: Duration::from_secs(1),
    }
}

fn limits(base: u32, max: u32) -> Limits {
    Limits {
        rate: per_second(base),
        max_rate: per_second(max),
        ..Limits::default()
    }
}

/// Sends from `base` for an hour and then for `hours`, and holds what must hold after the first.
fn against_ten_a_second(counting: Counting, base: u32, hours: u32) {
    let mut world = World::new(base, 4 * base, counting, 10.0);
    let first = world.run(HOUR);
    let rest = world.run(hours * HOUR);
    let refusals = f64::from(rest.refused) / f64::from(rest.taken + rest.refused);
    let throughput = f64::from(rest.taken) / (f64::from(hours) * 36_000.0);
    let story = format!(
        "{counting:?} from {base}/s: first hour {first:?}, then {:.3} % refused, {:.1} % of what is allowed",
        100.0 * refusals,
        100.0 * throughput
    );
    println!("{story}");
    assert!(refusals < 0.01 && throughput > 0.9, "{story}");
}

#[test]
fn a_day_against_ten_a_second_from_a_lower_base() {
    against_ten_a_second(Counting::SlidingSecond, 5, 23);
    against_ten_a_second(Counting::SlidingSecond, 10, 23);
}

#[test]
fn a_day_against_ten_a_second_from_a_higher_base() {
    for base in [20, 50, 100] {
        against_ten_a_second(Counting::SlidingSecond, base, 23);
    }
}

#[test]
fn hours_against_receivers_that_count_otherwise() {
    for counting in COUNTINGS {
        for base in [5, 20, 100] {
            against_ten_a_second(counting, base, 3);
        }
    }
}

/// In which minute after a lift from 10 to 100 a second 90 get through, at whatever moment of the
/// sender's rhythm it comes.
#[test]
fn a_lift_is_found_within_the_hour() {
    for counting in COUNTINGS {
        let mut before = World::new(10, 200, counting, 10.0);
        before.run(2 * HOUR);
        for moment in 0..8 {
            let mut world = before.clone();
            world.receiver = Receiver::new(counting, 100.0, world.now);
            let found = (1..=60).find(|_| world.run(HOUR / 60).taken >= 90 * 60);
            println!("{counting:?}, moment {moment}: minute {found:?}");
            assert!(found.is_some(), "{counting:?}, moment {moment}");
            before.run(Duration::from_secs(150));
        }
    }
}
