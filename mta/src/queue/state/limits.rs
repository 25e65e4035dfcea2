//! What destinations answer moves their limits; operators and blocks suspend them.

use super::*;
use crate::classify::Signal;
use crate::queue::target::Target;
use crate::shaping::{Because, Change, Heard, Moment, Pace, Reason, Sign};
use service::metrics::LimitKind;

/// How often limits are looked at.
const LIMITS_TICK: Duration = Duration::from_secs(1);
/// How often what changed is written down.
const KEEP_TICK: Duration = Duration::from_secs(5);
/// Domains remembered as those of suspended or paused destinations; more are leased in vain.
const BARRED_MAX: usize = 100_000;
/// Limits of former runs that wait for their destination to have work.
const REMEMBERED_MAX: usize = 50_000;

/// Limits that were kept.
#[derive(Debug, Clone, PartialEq)]
pub struct Remembered {
    /// Whose.
    pub destination: Destination,
    /// From which source, by index.
    pub source: usize,
    /// The limits.
    pub kept: Kept,
}

/// The limits of a destination, for metrics and events.
#[derive(Debug, Clone, PartialEq)]
pub struct Limited {
    /// Whose.
    pub destination: Destination,
    /// In force and as configured, the lowest of its sources.
    pub values: [(LimitKind, f64, f64); 3],
    /// What changed, from which source, by index.
    pub changes: Vec<(usize, Change)>,
    /// Accounts with mail at hand, which are told.
    pub accounts: Vec<Box<str>>,
}

/// One limit as it stands, for whoever asks why mail waits.
#[derive(Debug, Clone, PartialEq)]
pub struct LimitView {
    /// From which source, by index.
    pub source: usize,
    /// Which limit.
    pub kind: LimitKind,
    /// Messages in a second, or a count; a rate of 0 is a pause.
    pub in_force: f64,
    /// As configured.
    pub base: f64,
    /// Why it differs.
    pub because: Because,
    /// When it moves next by itself, if that is known.
    pub until: Option<Instant>,
    /// The line of `shaping.toml` that configures it; none: a default of ours.
    pub line: Option<u32>,
}

const KINDS: [LimitKind; 3] = [
    LimitKind::Rate,
    LimitKind::Connections,
    LimitKind::MessagesPerConnection,
];

impl From<Now> for Moment {
    fn from(now: Now) -> Self {
        Self {
            instant: now.instant,
            wall: now.wall,
        }
    }
}

impl QueueState {
    /// The limits of a destination with work or a past; empty when nothing is known of it.
    pub fn limits(&self, destination: &Destination) -> Vec<LimitView> {
        let Some(dest) = self.dests.get(destination) else {
            return Vec::new();
        };
        let view = |target: &Target, kind| {
            let (because, until) = target.limiter.because(kind);
            let lines = &dest.policy.limits.lines;
            if let Some(warming) = target.warming.as_ref().filter(|_| target.warms())
                && kind == LimitKind::Rate
            {
                return LimitView {
                    source: target.source,
                    kind,
                    in_force: target.value(kind),
                    base: base(&dest.policy, kind),
                    because: Because {
                        reason: Some(Reason::WarmUp),
                        rule: None,
                    },
                    until: None,
                    line: warming.plan().line,
                };
            }
            LimitView {
                source: target.source,
                kind,
                in_force: target.value(kind),
                base: base(&dest.policy, kind),
                because,
                until,
                line: match kind {
                    LimitKind::Rate => lines.rate,
                    LimitKind::Connections => lines.connections,
                    LimitKind::MessagesPerConnection => lines.messages_per_connection,
                },
            }
        };
        let targets = dest.targets.iter();
        targets
            .flat_map(|target| KINDS.map(|kind| view(target, kind)))
            .collect()
    }

    /// The operator's suspension of a destination that holds at `now`.
    pub fn suspension(&self, destination: &str, now: Timestamp) -> Option<&Suspension> {
        let suspension = self.suspensions.get(destination);
        suspension.filter(|suspension| suspension.holds(now))
    }

    // ---- signals ------------------------------------------------------------------------

    /// What a destination asks of the sender.
    pub(super) fn on_notice(
        &mut self,
        id: ConnId,
        notice: &Notice,
        began: Option<Instant>,
        now: Now,
        out: &mut Vec<Action>,
    ) {
        let Self { conns, dests, .. } = self;
        let Some(conn) = conns.get(&id) else {
            return;
        };
        let Some(target) = dests
            .get_mut(&conn.destination)
            .and_then(|dest| dest.targets.get_mut(conn.target))
        else {
            return;
        };
        // The words with which a session ends repeat what a message was told.
        if conn.is_ready() && began.is_none() && target.limiter.is_held() {
            return;
        }
        tracing::info!(destination = %conn.destination, signal = ?notice.signal,
            rule = notice.rule.as_deref(), reply = %notice.reply, "the destination asks for less");
        let others = target
            .conns
            .iter()
            .any(|other| conns.get(other).is_some_and(Conn::is_ready));
        let sign = match notice.signal {
            Signal::Block { pause } => Sign::Block(pause),
            // Turned away at the door while others are inside: there are too many.
            Signal::Slow if !conn.is_ready() && others => Sign::Connections,
            Signal::Slow => Sign::Rate,
            Signal::FewerMessages => Sign::MessagesPerConnection(conn.carried()),
        };
        let heard = Heard {
            began: began.unwrap_or(now.instant),
            sign,
            rule: notice.rule.clone(),
        };
        let (key, at) = (conn.destination.clone(), conn.target);
        self.hear(&key, at, &heard, now, out);
    }

    /// Tells the limiter of one target what was answered.
    pub(super) fn hear(
        &mut self,
        key: &Destination,
        at: usize,
        heard: &Heard,
        now: Now,
        out: &mut Vec<Action>,
    ) {
        let Some(target) = self
            .dests
            .get_mut(key)
            .and_then(|dest| dest.targets.get_mut(at))
        else {
            return;
        };
        let changes = target.limiter.heard(heard, target.open(), now.instant);
        if changes.is_empty() {
            return;
        }
        if let Some(warming) = &mut target.warming
            && changes.iter().any(|change| change.reason.is_complaint())
            && warming.hold(now.wall)
        {
            tracing::info!(destination = %key, source = target.source, "a day of a warm-up is repeated");
        }
        target.take_over();
        let source = target.source;
        let changes = changes.into_iter().map(|change| (source, change)).collect();
        self.tell_limits(key, changes, out);
        self.close_surplus(key, at, out);
        self.dirty.insert(key.clone());
    }

    /// What passes by itself: holds and pauses end, probes begin.
    pub(super) fn tick_limits(&mut self, now: Now, out: &mut Vec<Action>) {
        if now.instant < self.limits_at {
            return;
        }
        self.limits_at = now.instant + LIMITS_TICK;
        self.suspensions
            .retain(|_, suspension| suspension.holds(now.wall));
        let mut changed = Vec::new();
        for (key, dest) in &mut self.dests {
            let mut changes = Vec::new();
            for target in &mut dest.targets {
                let moved = target.limiter.tick(target.open(), now.instant);
                if !moved.is_empty() {
                    target.take_over();
                    changes.extend(moved.into_iter().map(|change| (target.source, change)));
                }
            }
            if dest.next_day(now) || !changes.is_empty() {
                changed.push((key.clone(), changes));
            }
        }
        for (key, changes) in changed {
            self.tell_limits(&key, changes, out);
            let targets = self.dests.get(&key).map_or(0, |dest| dest.targets.len());
            (0..targets).for_each(|at| self.close_surplus(&key, at, out));
            self.dirty.insert(key);
        }
        let mut barred = std::mem::take(&mut self.barred);
        barred.retain(|_, destination| self.is_barred(destination, now));
        self.barred = barred;
        self.tell_throttled(now, out);
        self.keep_limits(now, out);
    }

    fn tell_limits(&self, key: &Destination, changes: Vec<(usize, Change)>, out: &mut Vec<Action>) {
        out.extend(self.limited(key, changes).map(Action::Limits));
    }

    /// The limits of a destination as they are to be shown.
    pub(super) fn limited(
        &self,
        key: &Destination,
        changes: Vec<(usize, Change)>,
    ) -> Option<Box<Limited>> {
        let dest = self.dests.get(key)?;
        let values = KINDS.map(|kind| {
            let in_force = dest.targets.iter().map(|target| target.value(kind));
            let base = base(&dest.policy, kind);
            (kind, in_force.fold(f64::INFINITY, f64::min), base)
        });
        let mut accounts: Vec<Box<str>> = Vec::new();
        if !changes.is_empty() {
            let all = self
                .batches
                .values()
                .map(|batch| batch.head.account.as_str());
            accounts = all.map(Into::into).collect();
            accounts.sort_unstable();
            accounts.dedup();
        }
        Some(Box::new(Limited {
            destination: key.clone(),
            values,
            changes,
            accounts,
        }))
    }

    /// Ends connections beyond the limit in force, those without work first.
    pub(super) fn close_surplus(&mut self, key: &Destination, at: usize, out: &mut Vec<Action>) {
        let Self { dests, conns, .. } = self;
        let Some(target) = dests.get(key).and_then(|dest| dest.targets.get(at)) else {
            return;
        };
        let limit = match target.in_force.is_paused() {
            true => 0,
            false => usize::try_from(target.in_force.connections).unwrap_or(usize::MAX),
        };
        let busy = |id: &ConnId| {
            conns
                .get(id)
                .filter(|conn| !conn.closing)
                .map(|conn| conn.in_flight)
        };
        let mut open: Vec<_> = target
            .conns
            .iter()
            .filter_map(|id| Some((busy(id)?, *id)))
            .collect();
        open.sort_unstable();
        let surplus = open.len().saturating_sub(limit);
        for (_, id) in open.into_iter().take(surplus) {
            if let Some(conn) = conns.get_mut(&id) {
                conn.closing = true;
                out.push(Action::Close(id));
            }
        }
    }

    // ---- suspensions --------------------------------------------------------------------

    pub(super) fn on_suspended(
        &mut self,
        suspension: &Suspension,
        now: Now,
        out: &mut Vec<Action>,
    ) {
        if !suspension.holds(now.wall) {
            return;
        }
        let key = Destination::named(&suspension.destination);
        self.suspensions
            .insert(suspension.destination.clone(), suspension.clone());
        for (id, conn) in &mut self.conns {
            if conn.destination == key && !conn.closing {
                conn.closing = true;
                out.push(Action::Close(*id));
            }
        }
        self.dirty.insert(key);
    }

    /// These hold, and no others.
    pub(super) fn on_suspensions(&mut self, all: &[Suspension], now: Now, out: &mut Vec<Action>) {
        let holds = |name: &str| all.iter().any(|of| *of.destination == *name);
        let known = self.suspensions.keys().cloned();
        let gone: Vec<_> = known.filter(|name| !holds(name)).collect();
        gone.iter().for_each(|name| self.on_unsuspended(name, now));
        all.iter().for_each(|of| self.on_suspended(of, now, out));
    }

    pub(super) fn on_unsuspended(&mut self, destination: &str, now: Now) {
        self.suspensions.remove(destination);
        let key = Destination::named(destination);
        self.barred.retain(|_, barred| *barred != key);
        self.look_at = now.instant;
        self.dirty.insert(key);
    }

    /// Whether nothing may start for a destination, by an operator's word or for a block.
    pub(super) fn is_barred(&self, destination: &Destination, now: Now) -> bool {
        let is_paused = || {
            let dest = self.dests.get(destination);
            dest.is_some_and(Dest::is_paused)
        };
        self.suspension(destination.as_str(), now.wall).is_some()
            || is_paused()
            || self.is_elsewhere(destination)
    }

    /// Whether a queue's mail is for a destination that gets none.
    pub(super) fn is_barred_queue(&self, queue: &str, now: Now) -> bool {
        let known = match self.lanes.get(queue).map(|lane| &lane.way) {
            Some(Way::Known { destination, .. }) => Some(destination),
            Some(Way::Unknown | Way::Asked) | None => self.barred.get(queue),
        };
        known.is_some_and(|destination| self.is_barred(destination, now))
    }

    /// Whether a range has mail for a destination that gets none.
    pub(super) fn has_barred(&self, range: &Range, now: Now) -> bool {
        range
            .domains
            .iter()
            .any(|name| self.is_barred_queue(name, now))
    }

    /// Remembers the domains of a range that goes back because their destinations get no mail, so
    /// that it is not leased again at once.
    pub(super) fn bar(&mut self, id: RangeRef, now: Now) {
        let Some(range) = self.ranges.get(&id) else {
            return;
        };
        let mut found = Vec::new();
        for name in &range.domains {
            if let Some(Way::Known { destination, .. }) = self.lanes.get(name).map(|lane| &lane.way)
                && self.is_barred(destination, now)
            {
                found.push((name.clone(), destination.clone()));
            }
        }
        let room = BARRED_MAX.saturating_sub(self.barred.len());
        self.barred.extend(found.into_iter().take(room));
    }

    fn tell_throttled(&self, now: Now, out: &mut Vec<Action>) {
        let waiting = self.dests.iter().filter(|(_, dest)| !dest.turns.is_empty());
        for (key, dest) in waiting {
            let limit = |target: &Target| target.open() >= target.in_force.connections;
            let reason =
                if self.is_elsewhere(key) {
                    ThrottleReason::Connections
                } else if self.is_barred(key, now) {
                    ThrottleReason::Suspended
                } else if dest.is_held(now.instant) {
                    ThrottleReason::Backoff
                } else if dest.targets.iter().all(limit)
                    && dest
                        .targets
                        .iter()
                        .any(|target| target.is_due(&dest.policy.limits, now.instant))
                {
                    ThrottleReason::Connections
                } else if dest.targets.iter().all(|target| {
                    target.warms() && !target.is_due(&dest.policy.limits, now.instant)
                }) {
                    ThrottleReason::WarmUp
                } else {
                    // The rate is counted where it holds a message back.
                    continue;
                };
            out.push(Action::Throttled(key.clone(), reason));
        }
    }

    // ---- over a restart -----------------------------------------------------------------

    pub(super) fn on_remembered(&mut self, all: Vec<Remembered>) {
        let all = all.into_iter().take(REMEMBERED_MAX);
        let entry = |of: Remembered| ((of.destination, of.source), of.kept);
        self.remembered.extend(all.map(entry));
    }

    fn keep_limits(&mut self, now: Now, out: &mut Vec<Action>) {
        if now.instant < self.keep_at {
            return;
        }
        self.keep_at = now.instant + KEEP_TICK;
        let mut news = Vec::new();
        for (key, dest) in &mut self.dests {
            for target in dest.targets.iter_mut().filter(|target| target.is_news) {
                target.is_news = false;
                news.push((key.clone(), target.source, target.kept(now)));
            }
        }
        if !news.is_empty() {
            out.push(Action::Keep(news));
        }
    }

    /// Messages in a second that a destination takes from all its sources now.
    pub(super) fn rate_in_force(&self, key: &Destination) -> Option<f64> {
        let dest = self.dests.get(key)?;
        let open = dest
            .targets
            .iter()
            .filter(|target| !target.in_force.is_paused() && !target.part().is_none());
        Some(open.map(|target| target.in_force.pace.per_second()).sum())
    }

    /// The same for a destination that nothing is known of yet.
    pub(super) fn rate_configured(&self, limits: &service::config::shaping::Limits) -> f64 {
        let sources = u32::try_from(self.config.pools.of(None).len()).unwrap_or(u32::MAX);
        Pace::Configured(limits.rate).per_second() * f64::from(sources)
    }
}

fn base(policy: &Policy, kind: LimitKind) -> f64 {
    match kind {
        LimitKind::Rate => policy.limits.rate.per_second(),
        LimitKind::Connections => f64::from(policy.limits.connections),
        LimitKind::MessagesPerConnection => f64::from(policy.limits.messages_per_connection),
    }
}
