//! Destinations at work: their connections per egress source, and what holds them back.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use service::config::TlsPolicy;
use service::config::shaping::{Limits, WarmUp};
use service::metrics::LimitKind;

use super::fair::Turns;
use super::job::{ConnId, Policy, Trouble};
use super::pace::Pace;
use super::state::Appetite;
use crate::resolve::Route;
use crate::shaping::{self, InForce, Kept, Limiter, Pacer, Part, SharedPacer, Warming};
use crate::tlspolicy::Security;

/// Messages that a connection has at a time: one whose reply is awaited, one whose envelope went
/// along, and one composed, so that its envelope leaves in one write with the content before.
pub const DEPTH: usize = 3;

/// How long before it may be sent a message is handed to a connection.
pub(super) const HORIZON: Duration = Duration::from_millis(500);

/// The longest back-off after a destination could not be reached.
pub(super) const BACKOFF_MAX: Duration = Duration::from_secs(1_800);
/// The longest wait after sessions that broke.
const BREAK_MAX: Duration = Duration::from_secs(60);
const BREAK_FIRST: Duration = Duration::from_millis(250);

/// A peer that has not let anything be reported for so long is slow.
const SLOW: Duration = Duration::from_secs(5);

/// What a message costs a source of weight 1.
const CHARGE: u64 = 1 << 20;

/// How far a source may be ahead of its share.
pub(super) const LEAD: u64 = 8 * CHARGE;

/// A destination with work or connections, or one that is being left alone.
#[derive(Debug)]
pub(super) struct Dest {
    pub(super) policy: Arc<Policy>,
    /// Whose messages wait, at which domains, and whose turn it is.
    pub(super) turns: Turns,
    /// How much it takes.
    pub(super) appetite: Appetite,
    /// One per egress source.
    pub(super) targets: Vec<Target>,
    /// Times in a row that it could not be reached.
    failures: u32,
    /// It is left alone until then.
    pub(super) hold_until: Option<Instant>,
    /// How fast messages were handed out lately.
    pub(super) pace: Pace,
    /// Why.
    pub(super) trouble: Option<Trouble>,
    /// It waits for a connection of the process to become free.
    pub(super) is_starved: bool,
}

/// A destination as one egress source sees it.
#[derive(Debug)]
pub(super) struct Target {
    /// Index of the source.
    pub(super) source: usize,
    /// What moves its limits, and those in force.
    pub(super) limiter: Limiter,
    /// What of them is this node's.
    part: Part,
    pub(super) in_force: InForce,
    /// When the next messages may start: a plan, which the permits enforce.
    pub(super) plan: Pacer,
    /// What its connections take from to begin a message.
    pub(super) permits: SharedPacer,
    /// When the next connection may be opened.
    opens: Pacer,
    /// Messages handed out and not reported.
    pub(super) out: u32,
    /// It may have changed since it was written down.
    pub(super) is_news: bool,
    /// The source is new here.
    pub(super) warming: Option<Warming>,
    /// Messages in a second that the warm-up leaves; infinite without one.
    warm_rate: f64,
    pub(super) conns: Vec<ConnId>,
    /// What was handed out, each message by the share that its pool gives the source.
    pub(super) charge: u64,
    /// No new connection before this.
    open_after: Option<Instant>,
    /// Sessions in a row that broke without having carried anything.
    breaks: u32,
}

/// A connection as the queue sees it.
#[derive(Debug)]
pub(super) struct Conn {
    pub(super) destination: shaping::Destination,
    /// Index of the target in its destination.
    pub(super) target: usize,
    /// Index of the source.
    pub(super) source: usize,
    pub(super) route: Arc<Route>,
    /// What it has to show; none until it is ready.
    pub(super) security: Option<Arc<Security>>,
    /// Asked to end.
    pub(super) closing: bool,
    pub(super) in_flight: usize,
    /// Handed to it, ever.
    pub(super) sent: u32,
    /// When it was opened, got ready, or reported something last.
    pub(super) heard_at: Instant,
}

impl Conn {
    /// Whether mail that goes by `route` may go over it, where the operator wants `floor`: to the
    /// hosts of its own route, for domains that ask no more than it has to show.
    pub(super) fn takes(&self, route: &Route, floor: TlsPolicy) -> bool {
        let shows = |security: &Arc<Security>| security.satisfies(route.asked(), floor);
        self.security.as_ref().is_some_and(shows) && self.goes_by(route)
    }

    /// Likewise; of one that is not ready yet that is hoped.
    pub(super) fn serves(&self, route: &Route, floor: TlsPolicy) -> bool {
        match self.is_ready() {
            true => self.takes(route, floor),
            false => self.goes_by(route),
        }
    }

    /// Whether it goes to the hosts of `route`.
    pub(super) fn goes_by(&self, route: &Route) -> bool {
        std::ptr::eq(&*self.route, route) || self.route.key() == route.key()
    }

    /// Whether it has nothing to do and could do something.
    pub(super) fn is_unused(&self) -> bool {
        self.is_ready() && !self.closing && self.in_flight == 0
    }

    /// Whether its peer has kept it waiting for long.
    pub(super) fn is_slow(&self, now: Instant) -> bool {
        let waits = !self.is_ready() || self.in_flight > 0;
        waits && now.saturating_duration_since(self.heard_at) >= SLOW
    }

    /// Whether it can be handed another message.
    pub(super) fn has_room(&self, messages_max: u32) -> bool {
        self.in_flight < DEPTH && self.has_urgent_room(messages_max)
    }

    /// Messages that it has carried to an end.
    pub(super) fn carried(&self) -> u32 {
        let in_flight = u32::try_from(self.in_flight).unwrap_or(u32::MAX);
        self.sent.saturating_sub(in_flight)
    }

    /// Whether it takes messages.
    pub(super) fn is_ready(&self) -> bool {
        self.security.is_some()
    }

    /// Whether it can be handed another transactional message, which goes before what it has.
    pub(super) fn has_urgent_room(&self, messages_max: u32) -> bool {
        self.is_ready() && !self.closing && self.in_flight <= DEPTH && self.sent < messages_max
    }
}

impl Dest {
    /// `started` is when this process began: what a former one sent is not known.
    pub(super) fn new(
        policy: Arc<Policy>,
        sources: &[usize],
        part: impl Fn(usize) -> Part,
        started: Instant,
        now: Instant,
    ) -> Self {
        let limits = &policy.limits;
        let target = |&source: &usize| Target {
            source,
            limiter: Limiter::new(limits, now),
            part: part(source),
            in_force: part(source).of(InForce::base(limits)),
            plan: Pacer::exhausted(limits.rate, started),
            permits: Arc::new(Mutex::new(Pacer::exhausted(limits.rate, started))),
            opens: Pacer::exhausted(opening(limits), started),
            out: 0,
            is_news: false,
            warming: None,
            warm_rate: f64::INFINITY,
            conns: Vec::new(),
            charge: 0,
            open_after: None,
            breaks: 0,
        };
        let targets = sources.iter().map(target).collect();
        Self {
            policy,
            turns: Turns::default(),
            appetite: Appetite::new(started),
            targets,
            failures: 0,
            hold_until: None,
            pace: Pace::new(now),
            trouble: None,
            is_starved: false,
        }
    }

    /// Other limits hold from now on.
    pub(super) fn change(&mut self, policy: Arc<Policy>, now: Instant) {
        for target in &mut self.targets {
            target.limiter.configure(&policy.limits, now);
            target.opens.change(opening(&policy.limits));
            target.take_over();
        }
        self.policy = policy;
    }

    /// Takes up what was kept of its limits, by source.
    pub(super) fn recall(
        &mut self,
        mut kept: impl FnMut(usize) -> Option<Kept>,
        now: super::state::Now,
    ) {
        for target in &mut self.targets {
            if let Some(kept) = kept(target.source) {
                target.limiter.restore(&kept, now.into());
                if let Some(warming) = &mut target.warming {
                    warming.restore(kept.held_days);
                }
                target.take_over();
            }
        }
    }

    /// Puts sources that are new here under their plans; one that has none (any more) is warm.
    pub(super) fn warm_up(
        &mut self,
        plan: impl Fn(usize) -> Option<WarmUp>,
        now: super::state::Now,
    ) {
        for target in &mut self.targets {
            let plan = plan(target.source);
            if target.warming.as_ref().map(|warming| &**warming.plan()) != plan.as_ref() {
                target.warming = plan.map(|plan| Warming::new(Arc::new(plan)));
            }
        }
        self.next_day(now);
    }

    /// The budgets of today hold. Whether any is another than before.
    pub(super) fn next_day(&mut self, now: super::state::Now) -> bool {
        let mut changed = false;
        for target in &mut self.targets {
            let rate = target
                .warming
                .as_ref()
                .map(|warming| warming.rate(now.wall));
            let rate = rate.unwrap_or(f64::INFINITY);
            if rate == target.warm_rate {
                continue;
            }
            target.warm_rate = rate;
            target.take_over();
            changed = true;
        }
        changed
    }

    /// Whether no source may send to it for what it answered.
    pub(super) fn is_paused(&self) -> bool {
        self.targets
            .iter()
            .all(|target| target.in_force.is_paused())
    }

    /// Whether it is left alone at `now`.
    pub(super) fn is_held(&self, now: Instant) -> bool {
        self.hold_until.is_some_and(|until| until > now)
    }

    /// Times in a row that it could not be reached.
    pub(super) fn failures(&self) -> u32 {
        self.failures
    }

    /// It answered.
    pub(super) fn reached(&mut self) {
        (self.failures, self.hold_until, self.trouble) = (0, None, None);
    }

    /// Whether it could not be reached when it was last tried.
    pub(super) fn is_failing(&self) -> bool {
        self.failures > 0
    }

    /// It could not be reached: leaves it alone for as long as its schedule says, and tells until
    /// when. `chance` is from 0 to 1.
    pub(super) fn not_reached(&mut self, chance: f64, now: Instant) -> Instant {
        let wait = back_off(&self.policy.limits.retry, self.failures, chance);
        self.failures = self.failures.saturating_add(1);
        *self.hold_until.insert(now + wait)
    }

    /// As a former run left it.
    pub(super) fn recall_hold(&mut self, failures: u32, trouble: Trouble, until: Instant) {
        self.failures = failures;
        (self.hold_until, self.trouble) = (Some(until), Some(trouble));
    }

    /// Targets, the one that has carried least first.
    pub(super) fn by_share(&self) -> Vec<usize> {
        let mut order: Vec<_> = (0..self.targets.len()).collect();
        order.sort_by_key(|&at| self.targets.get(at).map(|target| target.charge));
        order
    }

    /// The target of `source` is back after a while: it takes its share from now on, and does not
    /// make up for what the others carried meanwhile. All of that at once is what a receiver would
    /// take for an attack.
    pub(super) fn catches_up(&mut self, source: usize) {
        let others = self.targets.iter().filter(|target| target.source != source);
        let Some(level) = others.map(|target| target.charge).max() else {
            return;
        };
        for target in &mut self.targets {
            if target.source == source {
                target.charge = target.charge.max(level);
            }
        }
    }

    /// Connections of all sources.
    pub(super) fn open(&self) -> usize {
        self.targets.iter().map(|target| target.conns.len()).sum()
    }

    /// Whether nothing can happen to it before a connection of the process is free.
    pub(super) fn only_waits(&self) -> bool {
        self.is_starved && self.open() == 0
    }

    /// Whether anything about it has to be remembered.
    pub(super) fn is_idle(&self, now: Instant) -> bool {
        let quiet = |target: &Target| {
            target.conns.is_empty()
                && !target.is_news
                && target.limiter.is_at_rest(now)
                && target.warm_rate.is_infinite()
                && target.plan.is_fresh(now)
                && target.opens.is_fresh(now)
                && target.open_after.is_none_or(|at| at <= now)
        };
        // The count of failures outlives the hold, or back-off would never grow.
        let forgotten = self
            .hold_until
            .is_none_or(|until| until + BACKOFF_MAX <= now);
        self.turns.is_empty() && forgotten && self.targets.iter().all(quiet)
    }
}

/// How long to leave alone what failed so many times in a row before: as a message is retried,
/// with up to a fifth more or less, and never so long that its return would go unnoticed for hours.
pub(super) fn back_off(retry: &[Duration], failures: u32, chance: f64) -> Duration {
    let step = usize::try_from(failures).unwrap_or(usize::MAX);
    let wait = retry.get(step).or(retry.last()).copied();
    let wait = wait.unwrap_or(BACKOFF_MAX).min(BACKOFF_MAX);
    wait.mul_f64(0.8 + 0.4 * chance.clamp(0.0, 1.0))
}

impl Target {
    /// Whether what is transactional may be handed out: with a permit, or in place of something
    /// that was handed out for one.
    pub(super) fn takes_urgent(&self, limits: &Limits, now: Instant) -> bool {
        self.is_due(limits, now) || !self.in_force.is_paused() && self.plan.is_ahead(now)
    }

    /// Whether a message may be handed out now.
    pub(super) fn is_due(&self, limits: &Limits, now: Instant) -> bool {
        !self.in_force.is_paused()
            && limits.in_flight.is_none_or(|most| self.out < most)
            && self.plan.free_at(now) <= now + HORIZON
    }

    /// Whether a connection may be opened now as far as this target's past goes.
    pub(super) fn may_open(&self, now: Instant) -> bool {
        self.open_after.is_none_or(|at| at <= now) && self.opens.free_at(now) <= now
    }

    /// A connection is being opened.
    pub(super) fn opened(&mut self, conn: ConnId, now: Instant) {
        self.conns.push(conn);
        self.opens.reserve(now);
    }

    /// The limits of its limiter hold from now on.
    pub(super) fn take_over(&mut self) {
        self.is_news = true;
        self.enforce();
    }

    /// This much of its limits is this node's from now on; others used them until a moment ago if
    /// that is given.
    pub(super) fn set_part(&mut self, part: Part, used_until: Option<Instant>) {
        self.part = part;
        self.enforce();
        if let Some(at) = used_until {
            let mut permits = self.permits.lock().unwrap_or_else(PoisonError::into_inner);
            permits.use_up(at);
        }
    }

    /// What of its limits is this node's.
    pub(super) fn part(&self) -> Part {
        self.part
    }

    fn enforce(&mut self) {
        let mut whole = self.limiter.in_force();
        if self.warm_rate < whole.pace.per_second() {
            whole.pace = shaping::Pace::Even(self.warm_rate);
        }
        self.in_force = self.part.of(whole);
        let pace = self.in_force.pace;
        if self.plan.pace() != pace {
            self.plan.change(pace);
        }
        let mut permits = self.permits.lock().unwrap_or_else(PoisonError::into_inner);
        if permits.pace() != pace {
            permits.change(pace);
        }
    }

    /// A limit as a number; a paused rate is 0.
    pub(super) fn value(&self, kind: LimitKind) -> f64 {
        let limit = self.limiter.value(kind);
        match kind {
            LimitKind::Rate => limit.min(self.warm_rate),
            LimitKind::Connections | LimitKind::MessagesPerConnection => limit,
        }
    }

    /// Whether it is the warm-up that sets its pace.
    pub(super) fn warms(&self) -> bool {
        self.warm_rate < self.limiter.value(LimitKind::Rate)
    }

    /// What is to be kept over a restart.
    pub(super) fn kept(&self, now: super::state::Now) -> Option<Kept> {
        let held_days = self.warming.as_ref().map(Warming::held).unwrap_or_default();
        let kept = self.limiter.kept(now.into());
        if kept.is_none() && held_days.is_none() {
            return None;
        }
        let mut kept = kept.unwrap_or_default();
        kept.held_days = held_days;
        Some(kept)
    }

    /// Connections, as limits count them.
    pub(super) fn open(&self) -> u32 {
        u32::try_from(self.conns.len()).unwrap_or(u32::MAX)
    }

    /// When a connection may be opened again, if not now.
    pub(super) fn opens_after(&self, now: Instant) -> Option<Instant> {
        self.open_after.filter(|at| *at > now)
    }

    /// A message was handed to one of its connections; `most` is what any source has carried.
    pub(super) fn handed_out(&mut self, weight: u32, most: u64, now: Instant) {
        // Who could not work for an hour does not carry everything for the next.
        let charge = self.charge.max(most.saturating_sub(2 * LEAD));
        self.charge = charge + CHARGE / u64::from(weight.max(1));
        self.out += 1;
        self.plan.reserve(now);
    }

    /// A session carried something.
    pub(super) fn worked(&mut self) {
        (self.breaks, self.open_after) = (0, None);
    }

    /// A session broke, or could not be had while others can.
    pub(super) fn broke(&mut self, now: Instant) {
        let wait = BREAK_FIRST
            .saturating_mul(1 << self.breaks.min(16))
            .min(BREAK_MAX);
        self.breaks = self.breaks.saturating_add(1);
        self.open_after = Some(now + wait);
    }
}

/// Connections are opened one by one, whatever the unit of their rate.
fn opening(limits: &Limits) -> shaping::Pace {
    shaping::Pace::Even(limits.new_connections.per_second())
}
