//! The limits of one destination as one egress source sees it, and what moves them.
//!
//! Owns which answer means what for which limit. Pure: times and answers come in, limits and
//! changes come out. Must not read replies: `classify` does.

use std::sync::Arc;
use std::time::{Duration, Instant};

use model::units::Rate;
use service::config::shaping::Limits;
use service::metrics::LimitKind;

use super::adaptive::{Adaptive, Bounds, Use};
use super::counts::{Counts, Tally};
use super::memory::{Kept, Moment};
use super::pacer::Pace;

/// The window in which deferrals are weighed against everything else.
const RATIO_WINDOW: Duration = Duration::from_secs(300);
/// Answers that it needs.
const RATIO_MIN: u32 = 20;
/// A signal when one in this many was put off.
const RATIO_SHARE: u32 = 5;
/// Deferrals alone do not push a rate below this share of its base: they may have other causes.
const RATIO_FLOOR: f64 = 0.1;
/// The window in which the pace of a flow is measured.
const PACE_WINDOW: Duration = Duration::from_secs(60);
/// A signal never counts as having come at less than this share of the limit: a flow that uses
/// little of it says little about it.
const CAME_SHARE: f64 = 0.25;
/// No rate falls below one message in this time.
const SLOWEST: Duration = Duration::from_secs(60);
/// Of the latest ten answers, this many blocks pause; one alone may be a recipient's own list.
const BLOCKS: u32 = 3;
const LATEST: u32 = 10;
/// After so long without an answer what was learnt is out of date.
const FORGOTTEN: Duration = Duration::from_secs(86_400);
/// The first pause; each further one in a row is twice as long, up to the longest.
const PAUSE_FIRST: Duration = Duration::from_secs(300);
const PAUSE_MAX: Duration = Duration::from_secs(4 * 3_600);
/// No pause lasts longer, whoever asks for it, and none that was kept: clocks may have been wrong.
const PAUSE_LONGEST: Duration = Duration::from_secs(86_400);
/// Answers in peace that end the probing after a pause.
const PROBES: u32 = 10;
/// What is left of a rate while it is probed, and after.
const PROBE_SHARE: f64 = 0.1;
const AFTER_PAUSE: f64 = 0.5;

/// What an answer says about limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sign {
    /// Nothing against the pace: taken, or refused for the recipient's or the message's sake.
    Peace,
    /// Put off, neither by greylisting nor for the recipient's sake. One alone means nothing.
    Deferred,
    /// Too fast.
    Rate,
    /// Too many connections.
    Connections,
    /// Too many messages over one connection, which had carried so many.
    MessagesPerConnection(u32),
    /// The source or sender is not wanted now; with the wait that the rule or reply names.
    Block(Option<Duration>),
}

/// One answer, as far as limits go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Heard {
    /// When what it answers was begun.
    pub began: Instant,
    /// What it says.
    pub sign: Sign,
    /// The rule that read it.
    pub rule: Option<Arc<str>>,
}

/// The limits in force.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct InForce {
    /// How often a message may start.
    pub pace: Pace,
    /// Open at once.
    pub connections: u32,
    /// Then the connection is closed.
    pub messages_per_connection: u32,
    /// Nothing starts before.
    pub paused_until: Option<Instant>,
}

impl InForce {
    /// As configured.
    pub fn base(limits: &Limits) -> Self {
        Self {
            pace: Pace::Configured(limits.rate),
            connections: limits.connections,
            messages_per_connection: limits.messages_per_connection,
            paused_until: None,
        }
    }

    /// Whether a block holds everything. It ends by [`Limiter::tick`], not by the clock, so that
    /// nothing slips through before one connection is to probe.
    pub fn is_paused(&self) -> bool {
        self.paused_until.is_some()
    }
}

/// Why a limit is what it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reason {
    /// A reply said that we are too fast.
    RateSignal,
    /// Too many messages were put off.
    DeferralRatio,
    /// A reply said that there are too many connections.
    ConnectionSignal,
    /// A reply said that a connection carried too many messages.
    MessagesSignal,
    /// Replies said that we are not wanted.
    BlockSignal,
    /// The time after a signal is over.
    HoldOver,
    /// The pause after a block is over: one connection tries.
    PauseOver,
    /// It was quiet, so more is tried.
    Probe,
    /// The source is new to the destination.
    WarmUp,
}

impl Reason {
    /// Whether the destination complained.
    pub const fn is_complaint(self) -> bool {
        match self {
            Self::RateSignal | Self::DeferralRatio | Self::BlockSignal => true,
            Self::ConnectionSignal
            | Self::MessagesSignal
            | Self::HoldOver
            | Self::PauseOver
            | Self::Probe
            | Self::WarmUp => false,
        }
    }
}

impl Reason {
    /// The word in events and snapshots.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::RateSignal => "rate_signal",
            Self::DeferralRatio => "deferral_ratio",
            Self::ConnectionSignal => "connection_signal",
            Self::MessagesSignal => "messages_signal",
            Self::BlockSignal => "block_signal",
            Self::HoldOver => "hold_over",
            Self::PauseOver => "pause_over",
            Self::Probe => "probe",
            Self::WarmUp => "warm_up",
        }
    }
}

/// A limit that changed.
#[derive(Debug, Clone, PartialEq)]
pub struct Change {
    /// Which.
    pub kind: LimitKind,
    /// What held: messages in a second, or a count. Infinite: no limit.
    pub from: f64,
    /// What holds; a rate of 0 is a pause.
    pub to: f64,
    /// Why.
    pub reason: Reason,
    /// The rule that read the reply.
    pub rule: Option<Arc<str>>,
    /// When it moves next by itself, if that is known.
    pub until: Option<Instant>,
}

/// Why a limit stands where it does, kept for whoever asks.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Because {
    /// Nothing: as configured.
    pub reason: Option<Reason>,
    /// The rule.
    pub rule: Option<Arc<str>>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Pause {
    until: Instant,
    /// What began before it says nothing new.
    began: Instant,
}

/// See the module.
#[derive(Debug, Clone)]
pub struct Limiter {
    adaptive: bool,
    configured: Rate,
    rate: Adaptive,
    connections: Adaptive,
    messages: Adaptive,
    counts: Counts,
    /// Deferrals are weighed from here on only.
    ratio: Counts,
    /// The latest answers, a bit each: set when it was a block.
    latest: u32,
    answers: u32,
    pause: Option<Pause>,
    /// Pauses in a row.
    pauses: u32,
    /// Answers in peace that are still to come before the limits are let go.
    probing: u32,
    open_most: u32,
    because: [Because; 3],
    heard_at: Instant,
}

impl Limiter {
    /// At its base, at `now`.
    pub fn new(limits: &Limits, now: Instant) -> Self {
        Self {
            adaptive: limits.adaptive,
            configured: limits.rate,
            rate: Adaptive::new(rate_bounds(limits), now),
            connections: Adaptive::new(
                count_bounds(limits.connections, limits.max_connections),
                now,
            ),
            messages: Adaptive::new(
                count_bounds(
                    limits.messages_per_connection,
                    limits.messages_per_connection,
                ),
                now,
            ),
            counts: Counts::default(),
            ratio: Counts::default(),
            latest: 0,
            answers: 0,
            pause: None,
            pauses: 0,
            probing: 0,
            open_most: 0,
            because: Default::default(),
            heard_at: now,
        }
    }

    /// Other limits are configured.
    pub fn configure(&mut self, limits: &Limits, now: Instant) {
        if !limits.adaptive {
            let pause = self.pause;
            *self = Self::new(limits, now);
            self.pause = pause;
            return;
        }
        self.adaptive = true;
        self.configured = limits.rate;
        self.rate.rebound(rate_bounds(limits), now);
        self.connections.rebound(
            count_bounds(limits.connections, limits.max_connections),
            now,
        );
        self.messages.rebound(
            count_bounds(
                limits.messages_per_connection,
                limits.messages_per_connection,
            ),
            now,
        );
    }

    /// The limits in force.
    pub fn in_force(&self) -> InForce {
        InForce {
            pace: self.pace(),
            connections: if self.probing > 0 {
                1
            } else {
                whole(self.connections.in_force())
            },
            messages_per_connection: whole(self.messages.in_force()),
            paused_until: self.pause.map(|pause| pause.until),
        }
    }

    fn pace(&self) -> Pace {
        let rate = self.rate_in_force();
        // As typed, not as a number: a rate of so many a second may use the second as it likes.
        if rate == self.configured.per_second() {
            Pace::Configured(self.configured)
        } else {
            Pace::Even(rate)
        }
    }

    fn rate_in_force(&self) -> f64 {
        let rate = self.rate.in_force();
        if self.probing > 0 && rate.is_finite() {
            (rate * PROBE_SHARE).max(slowest(self.configured))
        } else {
            rate
        }
    }

    /// A limit as a number; a paused rate is 0.
    pub fn value(&self, kind: LimitKind) -> f64 {
        match kind {
            LimitKind::Rate if self.pause.is_some() => 0.0,
            LimitKind::Rate => self.rate_in_force(),
            LimitKind::Connections => f64::from(self.in_force().connections),
            LimitKind::MessagesPerConnection => self.messages.in_force(),
        }
    }

    /// Why a limit stands where it does, and when it moves next by itself.
    pub fn because(&self, kind: LimitKind) -> (Because, Option<Instant>) {
        let (at, limit) = match kind {
            LimitKind::Rate => (0, &self.rate),
            LimitKind::Connections => (1, &self.connections),
            LimitKind::MessagesPerConnection => (2, &self.messages),
        };
        let pause = self.pause.filter(|_| kind == LimitKind::Rate);
        let until = pause
            .map(|pause| pause.until)
            .or(limit.held_until())
            .or(limit.probe_at());
        (self.because[at].clone(), until)
    }

    /// Whether it may be forgotten.
    pub fn is_at_rest(&self, now: Instant) -> bool {
        let limits = [&self.rate, &self.connections, &self.messages];
        let as_configured = limits.iter().all(|limit| limit.is_at_rest())
            && self.pause.is_none()
            && self.probing == 0;
        let silent = now.saturating_duration_since(self.heard_at);
        as_configured && silent >= RATIO_WINDOW || self.pause.is_none() && silent >= FORGOTTEN
    }

    /// What is to be kept of it over a restart; none when it is as configured.
    pub fn kept(&self, now: Moment) -> Option<Kept> {
        let kept = Kept {
            rate: self.rate.kept(now),
            connections: self.connections.kept(now),
            messages: self.messages.kept(now),
            paused_until: self.pause.map(|pause| now.wall_of(pause.until)),
            pauses: self.pauses,
            probing: self.probing,
            ..Kept::default()
        };
        let moved = kept.rate.is_some() || kept.connections.is_some() || kept.messages.is_some();
        (moved || kept.paused_until.is_some() || kept.probing > 0).then_some(kept)
    }

    /// Goes on where a former process, or another node, stopped.
    pub fn restore(&mut self, kept: &Kept, now: Moment) {
        if self.adaptive {
            let limits = [
                (&mut self.rate, &kept.rate),
                (&mut self.connections, &kept.connections),
                (&mut self.messages, &kept.messages),
            ];
            for (limit, kept) in limits {
                kept.iter().for_each(|kept| limit.restore(kept, now));
            }
            (self.pauses, self.probing) = (kept.pauses, kept.probing.min(PROBES));
        }
        let left = kept.paused_until.map(|until| now.until(until));
        if let Some(left) = left.filter(|left| !left.is_zero()) {
            self.pause = Some(Pause {
                until: now.instant + left.min(PAUSE_LONGEST),
                began: now.instant,
            });
            self.because[0].reason = Some(Reason::BlockSignal);
        }
        self.heard_at = now.instant;
    }

    /// Whether the rate is held down after a signal.
    pub fn is_held(&self) -> bool {
        self.rate.held_until().is_some()
    }

    /// An answer, with so many connections open.
    pub fn heard(&mut self, heard: &Heard, open: u32, now: Instant) -> Vec<Change> {
        self.heard_at = now;
        self.open_most = self.open_most.max(open);
        self.count(heard.sign, now);
        if !self.adaptive {
            return match heard.sign {
                Sign::Block(Some(wait)) => self.pause_for(Some(wait), heard, now),
                Sign::Block(None)
                | Sign::Peace
                | Sign::Deferred
                | Sign::Rate
                | Sign::Connections
                | Sign::MessagesPerConnection(_) => Vec::new(),
            };
        }
        match heard.sign {
            Sign::Peace | Sign::Deferred => {
                for limit in [&mut self.rate, &mut self.connections, &mut self.messages] {
                    limit.peace(heard.began);
                }
                let mut changes = self.deferral_ratio(heard, now);
                if heard.sign == Sign::Peace {
                    changes.extend(self.probe_answered(heard.began, now));
                }
                changes
            }
            Sign::Rate => self.rate_signal(Reason::RateSignal, heard, now),
            Sign::Connections => self.connection_signal(heard, open, now),
            Sign::MessagesPerConnection(carried) => self.messages_signal(carried, heard, now),
            Sign::Block(wait) => self.block(wait, heard, now),
        }
    }

    /// What the passing of time brings, with so many connections open.
    pub fn tick(&mut self, open: u32, now: Instant) -> Vec<Change> {
        self.open_most = self.open_most.max(open);
        let mut changes = self.end_pause(now);
        if self.pause.is_some() || self.probing > 0 {
            return changes;
        }
        if self.rate.is_due(now) {
            let usage = self.usage(now);
            changes.extend(self.moved(LimitKind::Rate, None, None, |me| me.rate.tick(usage, now)));
        }
        if self.connections.is_due(now) {
            let usage = Use {
                level: f64::from(self.open_most),
                ..self.usage(now)
            };
            let moved = self.moved(LimitKind::Connections, None, None, |me| {
                me.connections.tick(usage, now)
            });
            if moved.is_some() {
                self.open_most = open;
            }
            changes.extend(moved);
        }
        if self.messages.is_due(now) {
            let usage = Use {
                level: f64::INFINITY,
                ..self.usage(now)
            };
            changes.extend(
                self.moved(LimitKind::MessagesPerConnection, None, None, |me| {
                    me.messages.tick(usage, now)
                }),
            );
        }
        changes
    }

    // ---- signals ------------------------------------------------------------------------

    fn count(&mut self, sign: Sign, now: Instant) {
        let tally = Tally {
            judged: 1,
            taken: u32::from(sign == Sign::Peace),
            deferred: u32::from(sign == Sign::Deferred),
        };
        self.counts.note(now, tally);
        self.ratio.note(now, tally);
        let is_block = matches!(sign, Sign::Block(_));
        self.latest = (self.latest << 1 | u32::from(is_block)) & ((1 << LATEST) - 1);
        self.answers = self.answers.saturating_add(1);
    }

    fn rate_signal(&mut self, reason: Reason, heard: &Heard, now: Instant) -> Vec<Change> {
        let (came, usage) = (self.came(now), self.usage(now));
        let change = self.moved(LimitKind::Rate, Some(reason), heard.rule.clone(), |me| {
            me.rate.signal(came, usage, heard.began, now)
        });
        if change.is_some() {
            self.ratio.clear();
        }
        change.into_iter().collect()
    }

    /// The rate at which a signal came: the limit, or less if it is clear that less was used.
    fn came(&self, now: Instant) -> f64 {
        let steady = self.rate.steady();
        let peak = self.counts.peak(PACE_WINDOW, now);
        if steady.is_finite() {
            return peak.unwrap_or(steady).clamp(steady * CAME_SHARE, steady);
        }
        let lately = Duration::from_secs(5);
        let judged = f64::from(self.counts.over(lately, now).judged);
        peak.unwrap_or(judged / lately.as_secs_f64()).max(1.0)
    }

    fn deferral_ratio(&mut self, heard: &Heard, now: Instant) -> Vec<Change> {
        if heard.sign != Sign::Deferred {
            return Vec::new();
        }
        let Tally {
            judged, deferred, ..
        } = self.ratio.over(RATIO_WINDOW, now);
        let is_signal = judged >= RATIO_MIN && deferred * RATIO_SHARE >= judged;
        if !is_signal || self.rate.steady() <= self.configured.per_second() * RATIO_FLOOR {
            return Vec::new();
        }
        self.rate_signal(Reason::DeferralRatio, heard, now)
    }

    fn connection_signal(&mut self, heard: &Heard, open: u32, now: Instant) -> Vec<Change> {
        let usage = self.usage(now);
        let reason = Some(Reason::ConnectionSignal);
        let change = self.moved(LimitKind::Connections, reason, heard.rule.clone(), |me| {
            me.connections
                .signal(f64::from(open.max(1)), usage, heard.began, now)
        });
        change.into_iter().collect()
    }

    fn messages_signal(&mut self, carried: u32, heard: &Heard, now: Instant) -> Vec<Change> {
        let usage = self.usage(now);
        let reason = Some(Reason::MessagesSignal);
        let kind = LimitKind::MessagesPerConnection;
        let change = self.moved(kind, reason, heard.rule.clone(), |me| {
            // The one that was refused is the first beyond what is allowed.
            let came = f64::from(carried.saturating_add(1));
            me.messages.signal(came, usage, heard.began, now)
        });
        change.into_iter().collect()
    }

    // ---- blocks -------------------------------------------------------------------------

    fn block(&mut self, wait: Option<Duration>, heard: &Heard, now: Instant) -> Vec<Change> {
        // A wait was named by a rule or the peer itself; without one it takes more than one voice.
        let is_meant = wait.is_some() || self.latest.count_ones() >= BLOCKS || self.probing > 0;
        if is_meant {
            self.pause_for(wait, heard, now)
        } else {
            Vec::new()
        }
    }

    fn pause_for(&mut self, wait: Option<Duration>, heard: &Heard, now: Instant) -> Vec<Change> {
        if self.pause.is_some_and(|pause| heard.began < pause.until) {
            // In flight when the first such answer came.
            return Vec::new();
        }
        let doubled = PAUSE_FIRST.saturating_mul(1 << self.pauses.min(16));
        let length = wait.unwrap_or(doubled.min(PAUSE_MAX)).min(PAUSE_LONGEST);
        let from = self.value(LimitKind::Rate);
        self.pauses = self.pauses.saturating_add(1);
        self.pause = Some(Pause {
            until: now + length,
            began: now,
        });
        self.latest = 0;
        self.because[0] = Because {
            reason: Some(Reason::BlockSignal),
            rule: heard.rule.clone(),
        };
        vec![Change {
            kind: LimitKind::Rate,
            from,
            to: 0.0,
            reason: Reason::BlockSignal,
            rule: heard.rule.clone(),
            until: Some(now + length),
        }]
    }

    /// After a pause one connection tries, slowly; and the rate starts from half.
    fn end_pause(&mut self, now: Instant) -> Vec<Change> {
        if self.pause.is_none_or(|pause| pause.until > now) {
            return Vec::new();
        }
        self.pause = None;
        if !self.adaptive {
            self.because[0] = Because::default();
            return vec![self.pause_over(0.0)];
        }
        if self.probing == 0 {
            let half = match self.rate.steady() {
                steady if steady.is_finite() => steady * AFTER_PAUSE,
                _ => self.came(now) * AFTER_PAUSE,
            };
            self.rate.fall_to(half, now);
        }
        self.probing = PROBES;
        self.because[0].reason = Some(Reason::PauseOver);
        vec![self.pause_over(0.0)]
    }

    fn pause_over(&self, from: f64) -> Change {
        Change {
            kind: LimitKind::Rate,
            from,
            to: self.value(LimitKind::Rate),
            reason: Reason::PauseOver,
            rule: self.because[0].rule.clone(),
            until: None,
        }
    }

    fn probe_answered(&mut self, began: Instant, now: Instant) -> Option<Change> {
        if self.probing == 0 || self.pause.is_some_and(|pause| began < pause.began) {
            return None;
        }
        let from = self.value(LimitKind::Rate);
        self.probing -= 1;
        if self.probing > 0 {
            return None;
        }
        self.pauses = 0;
        let steady = self.rate.steady();
        self.rate.fall_to(steady, now);
        Some(self.pause_over(from))
    }

    // ---- helpers ------------------------------------------------------------------------

    /// Moves a limit with `change`, and tells of it if it moved.
    fn moved(
        &mut self,
        kind: LimitKind,
        reason: Option<Reason>,
        rule: Option<Arc<str>>,
        change: impl FnOnce(&mut Self) -> bool,
    ) -> Option<Change> {
        let from = self.value(kind);
        let moved = change(self);
        let to = self.value(kind);
        if !moved && from == to {
            return None;
        }
        let at = match kind {
            LimitKind::Rate => 0,
            LimitKind::Connections => 1,
            LimitKind::MessagesPerConnection => 2,
        };
        let (_, until) = self.because(kind);
        let (reason, rule) = match reason {
            Some(reason) => (reason, rule),
            // What passed by itself: a hold that went on or ended, or a probe.
            None if to < from => {
                let before = self.because[at].clone();
                (before.reason.unwrap_or(Reason::RateSignal), before.rule)
            }
            None if matches!(
                self.because[at].reason,
                Some(Reason::HoldOver | Reason::Probe | Reason::PauseOver) | None
            ) =>
            {
                (Reason::Probe, None)
            }
            None => (Reason::HoldOver, self.because[at].rule.clone()),
        };
        self.because[at] = Because {
            reason: Some(reason),
            rule: rule.clone(),
        };
        Some(Change {
            kind,
            from,
            to,
            reason,
            rule,
            until,
        })
    }

    fn usage(&self, now: Instant) -> Use {
        let quiet = Duration::from_secs(120);
        let lately = self.counts.over(quiet, now);
        let minute = self.counts.over(PACE_WINDOW, now);
        Use {
            level: f64::from(lately.judged) / quiet.as_secs_f64(),
            taken: lately.taken > 0,
            took: f64::from(minute.taken) / PACE_WINDOW.as_secs_f64(),
        }
    }
}

fn rate_bounds(limits: &Limits) -> Bounds {
    Bounds {
        base: limits.rate.per_second(),
        ceiling: limits.max_rate.per_second(),
        floor: slowest(limits.rate),
        grain: 0.0,
    }
}

fn slowest(base: Rate) -> f64 {
    (1.0 / SLOWEST.as_secs_f64()).min(base.per_second())
}

fn count_bounds(base: u32, ceiling: u32) -> Bounds {
    Bounds {
        base: f64::from(base),
        ceiling: f64::from(ceiling.max(base)),
        floor: 1.0,
        grain: 1.0,
    }
}

/// A count that a limit stands for, at least 1.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the cast saturates, and a limit that large is none"
)]
fn whole(limit: f64) -> u32 {
    limit.floor().max(1.0) as u32
}
