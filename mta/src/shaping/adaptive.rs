//! One limit that follows what its destination says: halved on a signal, then back to 90 %, then
//! probing upward.
//!
//! Owns that arithmetic, for rates and counts alike. Reads no clock, sends nothing, knows no reply.
//! `docs/adr/0004-adaptive-limits.md` says why the figures are these.

use std::time::{Duration, Instant};

use super::memory::{KeptLimit, Moment};

/// How long a limit is held down after a signal.
const HOLD: Duration = Duration::from_secs(60);
/// Within a hold: how long after a cut it is seen whether that was enough.
const CHECK: Duration = Duration::from_secs(10);
/// Answers that a check needs to halve once more.
const CHECK_MIN: u32 = 3;
/// A quiet time after which is probed.
const QUIET: Duration = Duration::from_secs(300);
/// The same once probes go at full stride: nothing known stands in the way.
const QUIET_AT_STRIDE: Duration = Duration::from_secs(120);
/// The same just below where a signal came last: crossing that line costs a minute at half.
const PATIENCE: Duration = Duration::from_secs(720);
/// The first step upward, by which each success enlarges it, and the largest.
const STRIDE_FIRST: f64 = 0.05;
const STRIDE_MAX: f64 = 0.25;
/// What is left of the limit at which a signal came.
const RETURN: f64 = 0.9;
/// A limit counts as used from this share on.
const USED: f64 = 0.7;
/// This close to where a signal came, patience is in place.
const NEAR: f64 = 0.97;

/// Between what a limit may move.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Bounds {
    /// As configured; may be infinite.
    pub(super) base: f64,
    /// Never above.
    pub(super) ceiling: f64,
    /// Never below: so some message always goes, and may be taken.
    pub(super) floor: f64,
    /// The smallest step that makes a difference: 1 for counts, 0 for rates.
    pub(super) grain: f64,
}

/// How much a limit was used since it last changed.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Use {
    /// In the unit of the limit: messages in a second, connections.
    pub(super) level: f64,
    /// Something was taken.
    pub(super) taken: bool,
    /// What was taken over the last minute, in the unit of the limit.
    pub(super) took: f64,
}

/// Held down after a signal.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Hold {
    limit: f64,
    until: Instant,
    /// Answers to what was begun earlier say nothing about this limit.
    cut_at: Instant,
    judged: u32,
    refused: u32,
    /// It had to be halved again: the limit before it was far too high.
    was_far: bool,
    /// The most that was taken in a minute about the signal.
    took: f64,
}

/// One limit; see the module.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Adaptive {
    bounds: Bounds,
    /// What holds when nothing is held down.
    steady: f64,
    hold: Option<Hold>,
    /// Where a signal came last; none once that was crossed in peace.
    edge: Option<f64>,
    /// The highest that was used in peace below the edge.
    proven: Option<f64>,
    stride: f64,
    /// Neither changed nor signalled since.
    since: Instant,
    /// When `tick` has something to look at, at the earliest.
    look_at: Instant,
}

impl Adaptive {
    pub(super) fn new(bounds: Bounds, now: Instant) -> Self {
        Self {
            bounds,
            steady: bounds.base,
            hold: None,
            edge: None,
            proven: None,
            stride: STRIDE_FIRST,
            since: now,
            look_at: now + QUIET,
        }
    }

    /// The limit now.
    pub(super) fn in_force(&self) -> f64 {
        let limit = self.hold.map_or(self.steady, |hold| hold.limit);
        if self.bounds.grain > 0.0 {
            limit.floor().max(self.bounds.floor)
        } else {
            limit
        }
    }

    /// What is returned to, or held already.
    pub(super) fn steady(&self) -> f64 {
        self.steady
    }

    /// Until when it is held down.
    pub(super) fn held_until(&self) -> Option<Instant> {
        self.hold.map(|hold| hold.until)
    }

    /// Neither moved nor with anything to remember.
    pub(super) fn is_at_rest(&self) -> bool {
        self.hold.is_none() && self.edge.is_none() && self.steady == self.bounds.base
    }

    /// When the next probe is due if all stays quiet and the limit is used.
    pub(super) fn probe_at(&self) -> Option<Instant> {
        (self.hold.is_none() && self.steady < self.bounds.ceiling)
            .then(|| self.since + self.quiet_time())
    }

    /// Other bounds hold. What was learnt is kept as far as they allow it; a limit at rest follows.
    pub(super) fn rebound(&mut self, bounds: Bounds, now: Instant) {
        if bounds == self.bounds {
            return;
        }
        if self.is_at_rest() {
            *self = Self::new(bounds, now);
            return;
        }
        self.bounds = bounds;
        self.steady = self.steady.clamp(bounds.floor, bounds.ceiling);
        // What went well below the floor says nothing of where the limit may stand.
        let within = self.proven.filter(|proven| *proven >= bounds.floor);
        self.proven = within.map(|proven| proven.min(bounds.ceiling));
        if let Some(hold) = &mut self.hold {
            hold.limit = hold.limit.clamp(bounds.floor, bounds.ceiling);
        }
    }

    /// What is to be kept of it; none when it is at rest.
    pub(super) fn kept(&self, now: Moment) -> Option<KeptLimit> {
        (!self.is_at_rest()).then(|| KeptLimit {
            steady: self.steady,
            edge: self.edge,
            held_until: self.hold.map(|hold| now.wall_of(hold.until)),
        })
    }

    /// Goes on where a former process stopped, within the bounds of today.
    pub(super) fn restore(&mut self, kept: &KeptLimit, now: Moment) {
        let Bounds { floor, ceiling, .. } = self.bounds;
        let sound = |limit: &f64| limit.is_finite() && *limit > 0.0;
        if !sound(&kept.steady) {
            return;
        }
        self.steady = kept.steady.clamp(floor, ceiling);
        self.edge = kept.edge.filter(sound);
        let now_instant = now.instant;
        (self.since, self.look_at) = (now_instant, now_instant);
        let held_for = kept.held_until.map(|until| now.until(until).min(HOLD));
        if let Some(held_for) = held_for.filter(|held_for| !held_for.is_zero()) {
            let limit = self.halved(self.steady / RETURN);
            self.hold = Some(Hold::new(limit, now_instant, held_for, 0.0));
        }
    }

    /// A signal, at the limit `came`, about something begun at `began`. True when it made a
    /// difference: within a hold it is only counted.
    pub(super) fn signal(&mut self, came: f64, usage: Use, began: Instant, now: Instant) -> bool {
        if let Some(hold) = &mut self.hold {
            if began >= hold.cut_at {
                hold.judged += 1;
                hold.refused += 1;
            }
            return false;
        }
        if began < self.since && began + HOLD < now {
            // A reply that took longer than a whole hold says nothing about what holds now.
            return false;
        }
        let came = came.min(self.steady).max(self.bounds.floor);
        self.edge = Some(came);
        let below = self.proven.filter(|proven| *proven < came * 0.99);
        self.proven = below;
        self.steady = self.returned(came).min(below.unwrap_or(f64::INFINITY));
        self.stride = STRIDE_FIRST;
        self.hold = Some(Hold::new(self.halved(came), now, HOLD, usage.took));
        (self.since, self.look_at) = (now, now);
        true
    }

    /// An answer that is no signal, about something begun at `began`.
    pub(super) fn peace(&mut self, began: Instant) {
        if let Some(hold) = self.hold.as_mut().filter(|hold| began >= hold.cut_at) {
            hold.judged += 1;
        }
    }

    /// Falls to `limit` without a hold, to probe upward from there.
    pub(super) fn fall_to(&mut self, limit: f64, now: Instant) {
        self.hold = None;
        self.steady = limit.clamp(self.bounds.floor, self.steady.max(self.bounds.floor));
        (self.edge, self.proven, self.stride) = (None, None, STRIDE_FIRST);
        (self.since, self.look_at) = (now, now);
    }

    /// Whether [`Self::tick`] has something to look at.
    pub(super) fn is_due(&self, now: Instant) -> bool {
        now >= self.look_at && (self.hold.is_some() || self.steady < self.bounds.ceiling)
    }

    /// What the passing of time brings. True when the limit changed.
    pub(super) fn tick(&mut self, usage: Use, now: Instant) -> bool {
        if !self.is_due(now) {
            return false;
        }
        self.look_at = now + Duration::from_secs(1);
        match self.hold {
            Some(hold) => self.tick_hold(hold, usage, now),
            None => self.probe(usage, now),
        }
    }

    fn tick_hold(&mut self, mut hold: Hold, usage: Use, now: Instant) -> bool {
        hold.took = hold.took.max(usage.took);
        let before = self.in_force();
        let checked = now >= hold.cut_at + CHECK && hold.judged >= CHECK_MIN;
        let is_over = now >= hold.until;
        if checked && hold.refused * 2 > hold.judged {
            // Still far too much.
            (hold.limit, hold.was_far) = (self.halved(hold.limit), true);
            hold.cut_at = now;
            (hold.judged, hold.refused) = (0, 0);
            hold.until = hold.until.max(now + CHECK);
        } else if is_over && hold.refused * 10 > hold.judged {
            // What was held came to be too much itself.
            self.steady = self.steady.min(self.returned(hold.limit));
            self.edge = self.edge.map(|edge| edge.min(hold.limit));
            hold = Hold {
                was_far: hold.was_far,
                ..Hold::new(self.halved(hold.limit), now, HOLD, hold.took)
            };
        } else if is_over {
            if hold.was_far {
                // 90 % of far too much is still too much: what it took is the better guess.
                self.steady = self.steady.min(hold.took.max(hold.limit));
                self.edge = None;
            }
            self.hold = None;
            self.since = now;
            return before != self.in_force();
        } else if checked {
            // Only what came since the last look counts at the end.
            hold.cut_at = now;
            (hold.judged, hold.refused) = (0, 0);
        }
        self.hold = Some(hold);
        before != self.in_force()
    }

    fn probe(&mut self, usage: Use, now: Instant) -> bool {
        if now < self.since + self.quiet_time() {
            return false;
        }
        let is_used = usage.level >= self.steady * USED;
        // Up to its base a limit needs no proof but that mail is taken.
        if !(is_used || self.steady < self.bounds.base && usage.taken) {
            return false;
        }
        let before = self.in_force();
        if is_used {
            self.proven = Some(self.steady);
        }
        let raised = self.next_step();
        self.steady = raised.min(self.bounds.ceiling);
        self.since = now;
        before != self.in_force()
    }

    /// The limit to try next.
    fn next_step(&mut self) -> f64 {
        let plain = self.step(self.stride);
        match self.edge {
            Some(edge) if self.steady >= edge => {
                // Crossed in peace: it was lifted, and nobody knows how far.
                (self.edge, self.stride) = (None, STRIDE_MAX);
                self.step(STRIDE_MAX)
            }
            Some(edge) => {
                let careful = self.step(STRIDE_FIRST);
                match self.proven.filter(|proven| *proven > self.steady) {
                    // Up to what went well before, at once if that is near.
                    Some(proven) if proven <= careful * 1.02 => proven,
                    _ if self.step(self.stride) >= edge => careful,
                    _ => self.enlarge(plain),
                }
            }
            None => self.enlarge(plain),
        }
    }

    fn enlarge(&mut self, limit: f64) -> f64 {
        self.stride = (self.stride + STRIDE_FIRST).min(STRIDE_MAX);
        limit
    }

    fn step(&self, stride: f64) -> f64 {
        (self.steady * (1.0 + stride)).max(self.steady + self.bounds.grain)
    }

    fn quiet_time(&self) -> Duration {
        let crosses = |edge: f64| self.steady < edge && self.step(STRIDE_FIRST) >= edge * NEAR;
        // Until it is back where it was quiet before, the line is not in question.
        let is_back = self.proven.is_none_or(|proven| self.steady >= proven);
        if self.edge.is_some_and(crosses) && is_back {
            PATIENCE
        } else if self.stride >= STRIDE_MAX {
            QUIET_AT_STRIDE
        } else {
            QUIET
        }
    }

    fn halved(&self, limit: f64) -> f64 {
        let half = limit / 2.0;
        match self.bounds.grain > 0.0 {
            true => half.floor().max(self.bounds.floor),
            false => half.max(self.bounds.floor),
        }
    }

    fn returned(&self, came: f64) -> f64 {
        let back = came * RETURN;
        match self.bounds.grain > 0.0 {
            // A tenth of three connections is none: at least one has to go.
            true => back.floor().min(came - self.bounds.grain),
            false => back,
        }
        .max(self.bounds.floor)
    }
}

impl Hold {
    fn new(limit: f64, now: Instant, length: Duration, took: f64) -> Self {
        Self {
            limit,
            until: now + length,
            cut_at: now,
            judged: 0,
            refused: 0,
            was_far: false,
            took,
        }
    }
}

#[cfg(test)]
mod tests {
    use service::clock::{Clock as _, SystemClock};

    use super::*;

    fn per_hour(base: f64) -> Bounds {
        Bounds {
            base: base / 3_600.0,
            ceiling: 4.0 * base / 3_600.0,
            floor: (base / 3_600.0).min(1.0 / 60.0),
            grain: 0.0,
        }
    }

    #[test]
    fn what_was_proven_under_lower_bounds_does_not_pull_a_limit_below_its_floor() {
        let start = SystemClock.instant();
        let used = Use {
            level: 1.0,
            taken: true,
            took: 1.0,
        };
        let mut limit = Adaptive::new(per_hour(11.0), start);
        let probed_at = start + QUIET;
        assert!(limit.tick(used, probed_at), "a used limit is probed upward");

        let floor = per_hour(81.0).floor;
        limit.rebound(per_hour(81.0), probed_at);
        assert_eq!(limit.in_force(), floor);
        let refused_at = probed_at + CHECK;
        limit.signal(floor, used, refused_at, refused_at);
        limit.tick(used, refused_at + HOLD);
        assert_eq!(limit.in_force(), floor);
    }
}
