//! How much to lease: no more than can be started in half a minute, from several queues at once.

use super::*;
use crate::queue::lane::Ending;
use store::MIXED;

/// For how long is leased.
const AHEAD: Duration = Duration::from_secs(30);
/// Leased recipients of the process.
const LEASED_MAX: usize = 20_000;
/// Of one destination, however fast.
const DESTINATION_MAX: usize = 5_000;
/// Out of lots of several domains.
const MIXED_MAX: usize = 4_096;
/// Rows in one range of a mixed lot: as many as its window, so that one slow domain does not stop
/// the others of its range.
const MIXED_RANGE: u32 = store::WINDOW;
/// Between looks when there was nothing.
const IDLE_LOOK: Duration = Duration::from_secs(1);
/// Between looks in any case.
const BUSY_LOOK: Duration = Duration::from_millis(20);
/// Wants in one request.
const WANTS_MAX: usize = 512;

impl QueueState {
    /// Asks the store for work, or for more time, when it is time to.
    pub(super) fn ask_store(&mut self, now: Now, out: &mut Vec<Action>) {
        if !self.renewing && !self.ranges.is_empty() && now.instant >= self.renew_at {
            self.renewing = true;
            self.renew_at = now.instant + self.config.lease / 4;
            out.push(Action::Renew);
        }
        if self.draining || self.asking != Asking::No || self.is_paused(now.instant) {
            return;
        }
        let hungry = self.more && self.leased() <= self.low_water;
        if now.instant >= self.look_at || hungry {
            self.asking = Asking::Looking;
            self.look_at = now.instant + IDLE_LOOK;
            out.push(Action::Look);
        }
    }

    /// Whether a lease runs out, or has run out and is not settled. Until then nothing is leased:
    /// this node would get its own range as one whose holder is gone, with everybody in the window
    /// in doubt, and knows better.
    fn has_overdue(&self, now: Instant) -> bool {
        let unsettled = |id| match self.ranges.get(id) {
            // On its way back behind its facts.
            None => true,
            // A peer that takes as long again to reply does not hold up everybody else.
            Some(range) => now < range.lease.until() + self.config.lease,
        };
        let ends = |(id, range): (&RangeRef, &Range)| {
            !range.lease.allows_start(now)
                && range.ending != Some(Ending::Lost)
                && !self.overdue.contains(id)
        };
        self.overdue.iter().any(unsettled) || self.ranges.iter().any(ends)
    }

    pub(super) fn is_paused(&self, now: Instant) -> bool {
        self.paused_until.is_some_and(|until| until > now)
    }

    pub(super) fn on_backlog(
        &mut self,
        backlog: Option<Vec<Backlog>>,
        now: Now,
        out: &mut Vec<Action>,
    ) {
        self.asking = Asking::No;
        let Some(backlog) = backlog else {
            // Asked again in its time, not at once.
            self.more = false;
            return;
        };
        if self.draining {
            return;
        }
        let soonest = backlog.iter().filter_map(|queue| queue.next_due).min();
        if let Some(due) = soonest {
            let at = now.instant + due.since(now.wall).max(BUSY_LOOK);
            self.look_at = self.look_at.min(at);
        }
        let wants = self.wants(&backlog, now);
        if wants.is_empty() || self.has_overdue(now.instant) {
            self.more = false;
            return;
        }
        self.asking = Asking::Leasing;
        out.push(Action::Ask(wants));
    }

    /// What to lease of what is due.
    fn wants(&mut self, backlog: &[Backlog], now: Now) -> Vec<Want> {
        let mut room = LEASED_MAX.saturating_sub(self.leased());
        let mut leased = self.leased_by_destination();
        let mut wants = Vec::new();
        let (first, then): (Vec<_>, Vec<_>) = backlog
            .iter()
            .filter(|queue| queue.due > 0)
            .partition(|queue| queue.transactional);
        self.more = false;
        for queue in first.into_iter().chain(then) {
            let due = usize::try_from(queue.due).unwrap_or(usize::MAX);
            let rows = self
                .room_for(&queue.queue, &mut leased, now)
                .min(room)
                .min(due);
            self.more |= rows < due && rows > 0 || rows == 0 && room == 0;
            room -= rows;
            wants.extend(split(&queue.queue, rows));
            if wants.len() >= WANTS_MAX {
                self.more = true;
                break;
            }
        }
        wants
    }

    /// How many more recipients of a queue can be started soon.
    fn room_for(&self, queue: &str, leased: &mut HashMap<Destination, usize>, now: Now) -> usize {
        if queue == MIXED {
            let held: usize = self
                .ranges
                .values()
                .filter(|range| range.mixed)
                .map(|range| range.waiting + range.out)
                .sum();
            return MIXED_MAX.saturating_sub(held);
        }
        let is_held = self
            .held
            .get(queue)
            .is_some_and(|until| *until > now.instant);
        if is_held || self.is_barred_queue(queue, now) {
            return 0;
        }
        let default = &self.config.shaping.default;
        let (key, rate) = match self.lanes.get(queue).map(|lane| &lane.way) {
            Some(Way::Known { destination, .. }) => match self.dests.get(destination) {
                Some(dest) if dest.is_held(now.instant) => return 0,
                Some(_) | None => (
                    destination.clone(),
                    self.rate_in_force(destination, now.instant)
                        .unwrap_or_else(|| self.rate_configured(default)),
                ),
            },
            Some(Way::Unknown | Way::Asked) | None => {
                let domain = queue.parse::<Domain>().ok();
                let own = domain.and_then(|domain| self.config.shaping.domains.get(&domain));
                (
                    Destination::named(queue),
                    self.rate_configured(own.unwrap_or(default)),
                )
            }
        };
        let held = leased.entry(key).or_default();
        let rows = startable(rate).saturating_sub(*held);
        *held += rows;
        rows
    }

    fn leased_by_destination(&self) -> HashMap<Destination, usize> {
        let mut leased = HashMap::new();
        for lane in self.lanes.values() {
            let key = match &lane.way {
                Way::Known { destination, .. } => destination.clone(),
                Way::Unknown | Way::Asked => Destination::named(lane.domain.as_str()),
            };
            *leased.entry(key).or_default() += lane.len();
        }
        leased
    }
}

/// Messages that can be started within [`AHEAD`] at so many in a second.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "between 1 and DESTINATION_MAX"
)]
fn startable(rate: f64) -> usize {
    let rows = (rate * AHEAD.as_secs_f64()).ceil();
    (rows as usize).clamp(1, DESTINATION_MAX)
}

fn split(queue: &str, rows: usize) -> Vec<Want> {
    let rows = u32::try_from(rows).unwrap_or(u32::MAX);
    if rows == 0 {
        return Vec::new();
    }
    let want = |rows| Want {
        queue: queue.into(),
        rows,
    };
    if queue != MIXED {
        return vec![want(rows)];
    }
    let whole = rows / MIXED_RANGE;
    let rest = Some(rows % MIXED_RANGE).filter(|rest| *rest > 0);
    std::iter::repeat_n(MIXED_RANGE, whole as usize)
        .chain(rest)
        .map(want)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::units::Rate;

    #[test]
    fn half_a_minute_at_the_rate_in_force() {
        let rows = |rate: &str| startable(rate.parse::<Rate>().expect("a rate").per_second());
        assert_eq!(rows("5/s"), 150);
        assert_eq!(rows("60/m"), 30);
        assert_eq!(rows("10/h"), 1);
        assert_eq!(rows("unlimited"), DESTINATION_MAX);
        assert_eq!(rows("100000/s"), DESTINATION_MAX);
    }

    #[test]
    fn mixed_lots_come_in_windows() {
        let rows = |queue, rows| {
            split(queue, rows)
                .iter()
                .map(|want| want.rows)
                .collect::<Vec<_>>()
        };
        assert_eq!(rows("x.example", 500), [500]);
        assert_eq!(rows(MIXED, 130), [64, 64, 2]);
        assert_eq!(rows(MIXED, 0), [0; 0]);
    }
}
