//! What no sequence of answers, pauses, reloads, restarts and clock steps may do to the limits of a
//! destination, by a virtual clock: let through more than was allowed, leave their bounds, or stand
//! still for good.

use std::time::{Duration, Instant};

use model::Timestamp;
use model::units::Rate;
use proptest::prelude::*;
use service::clock::{Clock as _, SystemClock};
use service::config::shaping::{Limits, ShapingFile};
use service::metrics::LimitKind;

use super::limiter::{Heard, Limiter, Sign};
use super::memory::{Kept, Moment};
use super::pacer::{Pace, Pacer};

const SECOND: Duration = Duration::from_secs(1);
const KINDS: [LimitKind; 3] = [
    LimitKind::Rate,
    LimitKind::Connections,
    LimitKind::MessagesPerConnection,
];
/// The longest pause, and as long again for the clock that was wrong about it.
const PATIENCE: Duration = Duration::from_secs(86_400);

fn limits(of: &Typed) -> Limits {
    let text = format!(
        "[default]\nrate = \"{}\"\nmax_rate = \"{}\"\nconnections = {}\nmessages_per_connection = {}\nadaptive = {}\n",
        of.rate, of.max_rate, of.connections, of.messages, of.adaptive
    );
    let file = ShapingFile::parse(std::path::Path::new("shaping.toml"), &text);
    file.expect("a shaping file").default
}

/// What an operator may type.
#[derive(Debug, Clone)]
struct Typed {
    rate: String,
    max_rate: String,
    connections: u32,
    messages: u32,
    adaptive: bool,
}

fn typed() -> impl Strategy<Value = Typed> {
    let unit = prop_oneof![Just(("s", 50_u32)), Just(("m", 90)), Just(("h", 200))];
    let rate = unit.prop_flat_map(|(unit, most)| (1..=most, 1_u32..=4, Just(unit)));
    (rate, 1_u32..20, 1_u32..100, prop::bool::weighted(0.9)).prop_map(
        |((rate, times, unit), connections, messages, adaptive)| Typed {
            rate: format!("{rate}/{unit}"),
            max_rate: format!("{}/{unit}", rate * times),
            connections,
            messages,
            adaptive,
        },
    )
}

/// One thing that happens.
#[derive(Debug, Clone)]
enum Step {
    /// Messages begin as permits allow for so long; each is answered so after so long.
    Send(Duration, Sign, Duration),
    /// Nothing is sent.
    Rest(Duration),
    /// The file was read again.
    Reload(Typed),
    /// Killed, and up again after so long, with the wall clock moved by so many seconds.
    Restart(Duration, i64),
}

fn sign() -> impl Strategy<Value = Sign> {
    prop_oneof![
        4 => Just(Sign::Peace),
        1 => Just(Sign::Deferred),
        2 => Just(Sign::Rate),
        1 => Just(Sign::Connections),
        1 => (0_u32..60).prop_map(Sign::MessagesPerConnection),
        1 => Just(Sign::Block(None)),
        1 => (0_u64..400_000).prop_map(|wait| Sign::Block(Some(Duration::from_secs(wait)))),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let millis = |most: u64| (0..most).prop_map(Duration::from_millis);
    prop_oneof![
        6 => (millis(6_000), sign(), millis(90_000)).prop_map(|(time, sign, late)| Step::Send(time, sign, late)),
        2 => millis(900_000).prop_map(Step::Rest),
        1 => typed().prop_map(Step::Reload),
        1 => (millis(60_000), -200_000_i64..200_000).prop_map(|(down, by)| Step::Restart(down, by)),
    ]
}

/// One destination as one source sees it.
struct Side {
    limits: Limits,
    limiter: Limiter,
    permits: Pacer,
    now: Instant,
    wall: Timestamp,
    ticked_at: Instant,
    begun: Vec<Instant>,
    /// From when which pace held.
    paces: Vec<(Instant, f64)>,
}

impl Side {
    fn new(typed: &Typed) -> Self {
        let now = SystemClock.instant();
        let limits = limits(typed);
        let mut side = Self {
            limiter: Limiter::new(&limits, now),
            permits: Pacer::exhausted(limits.rate, now),
            limits,
            now,
            wall: Timestamp::from_millis(1_800_000_000_000),
            ticked_at: now,
            begun: Vec::new(),
            paces: Vec::new(),
        };
        side.take_over();
        side
    }

    /// As the queue does after every change.
    fn take_over(&mut self) {
        let pace = self.limiter.in_force().pace;
        if self.permits.pace() != pace {
            self.permits.change(pace);
        }
        self.paces.push((self.now, pace.per_second()));
    }

    fn moment(&self) -> Moment {
        Moment {
            instant: self.now,
            wall: self.wall,
        }
    }

    fn advance(&mut self, to: Instant) {
        let to = to.max(self.now);
        self.wall = self.wall + (to - self.now);
        self.now = to;
        if self.now >= self.ticked_at + SECOND {
            self.ticked_at = self.now;
            if !self.limiter.tick(1, self.now).is_empty() {
                self.take_over();
            }
        }
    }

    /// Begins a message now if nothing stands against it.
    fn begin(&mut self) -> bool {
        let goes = !self.limiter.in_force().is_paused() && self.permits.take(self.now).is_ok();
        if goes {
            self.begun.push(self.now);
        }
        goes
    }

    fn hear(&mut self, sign: Sign, began: Instant) {
        let heard = Heard {
            began,
            sign,
            rule: None,
        };
        if !self.limiter.heard(&heard, 1, self.now).is_empty() {
            self.take_over();
        }
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Send(time, sign, late) => self.send(*time, *sign, *late),
            Step::Rest(time) => {
                let end = self.now + *time;
                while self.now < end {
                    self.advance((self.now + 7 * SECOND).min(end));
                }
            }
            Step::Reload(typed) => {
                self.limits = limits(typed);
                self.limiter.configure(&self.limits, self.now);
                self.take_over();
            }
            Step::Restart(down, by) => self.restart(*down, *by),
        }
    }

    fn send(&mut self, time: Duration, sign: Sign, late: Duration) {
        let end = self.now + time;
        let mut open = std::collections::VecDeque::new();
        while self.now < end {
            while open.front().is_some_and(|began| *began + late <= self.now) {
                let began = open.pop_front().expect("it is there");
                self.hear(sign, began);
                self.check_bounds();
            }
            if self.begin() {
                open.push_back(self.now);
            }
            let next = self.permits.free_at(self.now);
            let soonest = self.now + Duration::from_millis(1);
            self.advance(next.clamp(soonest, soonest + SECOND).min(end));
        }
        for began in open {
            self.hear(sign, began);
        }
    }

    fn restart(&mut self, down: Duration, by: i64) {
        let kept = self.limiter.kept(self.moment());
        let note = kept.map(|kept| kept.to_note());
        self.now += down;
        let millis =
            self.wall.millis() + by * 1_000 + i64::try_from(down.as_millis()).expect("short");
        self.wall = Timestamp::from_millis(millis);
        self.limiter = Limiter::new(&self.limits, self.now);
        self.permits = Pacer::exhausted(self.limits.rate, self.now);
        if let Some(note) = note {
            let kept = Kept::from_note(&note).expect("what was written reads back");
            self.limiter.restore(&kept, self.moment());
        }
        self.ticked_at = self.now;
        self.take_over();
    }

    fn check_bounds(&self) {
        let Limits {
            rate,
            max_rate,
            connections,
            max_connections,
            messages_per_connection,
            ..
        } = &self.limits;
        let slowest = rate.per_second().min(1.0 / 60.0);
        let bounds = [
            (slowest, max_rate.per_second()),
            (1.0, f64::from(*max_connections.max(connections))),
            (1.0, f64::from(*messages_per_connection)),
        ];
        let in_force = self.limiter.in_force();
        for (kind, (floor, ceiling)) in KINDS.into_iter().zip(bounds) {
            let value = self.limiter.value(kind);
            let is_pause = kind == LimitKind::Rate && in_force.is_paused() && value == 0.0;
            assert!(
                is_pause || (floor..=ceiling).contains(&value),
                "{kind:?} {value} of {floor} to {ceiling}"
            );
        }
        assert!(in_force.connections >= 1 && in_force.messages_per_connection >= 1);
    }

    /// No second holds more than the highest pace that held in or just before it.
    fn check_seconds(&self) {
        let mut last = 0;
        for (at, first) in self.begun.iter().enumerate() {
            last = last.max(at);
            while self
                .begun
                .get(last)
                .is_some_and(|then| *then < *first + SECOND)
            {
                last += 1;
            }
            let held = |(from, to, pace): (Instant, Instant, f64)| {
                (from < *first + SECOND && to + SECOND > *first).then_some(pace)
            };
            let ends = self.paces.iter().skip(1).map(|(from, _)| *from);
            let spans = self.paces.iter().zip(ends.chain([self.now + SECOND]));
            let highest = spans
                .filter_map(|((from, pace), to)| held((*from, to, *pace)))
                .fold(0.0, f64::max);
            let count = f64::from(u32::try_from(last - at).expect("few"));
            assert!(count <= highest.ceil().max(1.0), "{count} at {highest}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn limits_stay_in_their_bounds_and_no_second_holds_too_much(
        file in typed(), steps in prop::collection::vec(step(), 1..30),
    ) {
        let mut side = Side::new(&file);
        for step in &steps {
            side.step(step);
            side.check_bounds();
        }
        side.check_seconds();
    }

    /// Whatever has happened: when the pause is over, if there is one, a message goes after what
    /// its slowest pace asks, and answers in peace bring the limits back up to what is configured.
    #[test]
    fn a_message_always_goes_in_the_end(
        file in typed(), steps in prop::collection::vec(step(), 1..30),
    ) {
        let mut side = Side::new(&file);
        steps.iter().for_each(|step| side.step(step));
        let asked_at = side.now;
        let slowest = side.limits.rate.per_second().min(1.0 / 60.0);
        let spread = Duration::from_secs_f64(2.0 / slowest) + 3 * SECOND;
        let most = asked_at + PATIENCE + spread;
        while !side.begin() {
            prop_assert!(side.now < most, "nothing goes after {:?}", side.now - asked_at);
            let paused = side.limiter.in_force().paused_until;
            let next = paused.unwrap_or_else(|| side.permits.free_at(side.now));
            side.advance(next.max(side.now + SECOND));
        }
        prop_assert!(side.permits.free_at(side.now) <= side.now + spread);
    }

    #[test]
    fn hours_of_peace_bring_every_limit_back(
        steps in prop::collection::vec(step(), 1..20), per_minute in 6_u32..20,
    ) {
        let typed = Typed {
            rate: format!("{per_minute}/m"),
            max_rate: format!("{per_minute}/m"),
            connections: 3,
            messages: 10,
            adaptive: true,
        };
        let mut side = Side::new(&typed);
        // What it is configured with stays the same, or there would be nothing to come back to.
        let steps = steps.iter().filter(|step| !matches!(step, Step::Reload(_)));
        steps.for_each(|step| side.step(step));
        let end = side.now + PATIENCE + Duration::from_secs(8 * 3_600);
        let is_back = |side: &Side| {
            let of_base = [f64::from(per_minute) / 60.0, 3.0, 10.0];
            KINDS.into_iter().zip(of_base).all(|(kind, base)| side.limiter.value(kind) >= base)
        };
        while !is_back(&side) {
            prop_assert!(side.now < end, "{:?}", KINDS.map(|kind| side.limiter.value(kind)));
            let paused = side.limiter.in_force().paused_until;
            if side.begin() {
                side.hear(Sign::Peace, side.now);
            }
            let next = paused.unwrap_or_else(|| side.permits.free_at(side.now));
            side.advance(next.max(side.now + SECOND));
        }
    }

    /// A rate of a longer unit is spread evenly, over restarts too.
    #[test]
    fn a_longer_unit_never_bunches(
        count in 1_u32..300, restarts in prop::collection::vec(1_u64..200, 0..10),
    ) {
        let rate = Rate::Limited { count, per: Duration::from_secs(60) };
        let apart = Duration::from_secs(60) / count;
        let mut now = SystemClock.instant();
        let mut permits = Pacer::exhausted(rate, now);
        let mut before: Option<Instant> = None;
        for wait in restarts.into_iter().map(Some).chain([None]) {
            for _ in 0..5 {
                now = now.max(permits.free_at(now));
                permits.take(now).expect("free by its own word");
                prop_assert!(before.is_none_or(|before| now >= before + apart));
                before = Some(now);
            }
            if let Some(wait) = wait {
                now += Duration::from_millis(wait);
                permits = Pacer::exhausted(rate, now);
            }
        }
        prop_assert_eq!(permits.pace(), Pace::Configured(rate));
    }
}
