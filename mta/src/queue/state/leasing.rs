//! How much to lease: no more than can be started in half a minute, from several queues at once,
//! and of no batch so much that the others of its destination have no room.

use super::*;
use crate::queue::job::LEASE_MARGIN;
use crate::queue::lane::Ending;
use model::units::Rate;
use store::{BACKLOG_BATCHES, MIXED};

/// For how long is leased.
const AHEAD: Duration = Duration::from_secs(30);
/// Of a batch with a rate of its own: well within the patience that its messages have here.
const AHEAD_PACED: Duration = Duration::from_secs(10);
/// The least that a destination gets when more want something than there is room for: what a
/// connection carries, so that it is not closed half used for the next.
pub(super) const SHARE_MIN: u32 = 50;
/// Leased recipients of the process: a share for every connection. What is transactional has room
/// beside them.
const LEASED_MAX: usize = CONNECTIONS_ALL_MAX * SHARE_MIN as usize;
/// Of one destination, however fast.
const DESTINATION_MAX: usize = 5_000;
/// Transactional ones of one destination.
const URGENT_MAX: usize = 500;
/// Out of lots of several domains.
const MIXED_MAX: usize = 4_096;
/// Rows in one range of a mixed lot: as many as its window, so that one slow domain does not stop
/// the others of its range.
const MIXED_RANGE: u32 = store::WINDOW;
/// The least that a batch gets of a destination, so that ranges do not become crumbs.
const RANGE_MIN: usize = 16;
/// What is leased for a destination that could not be reached when it was last tried, or that has
/// shown to take next to nothing.
const PROBE: usize = 16;
/// Between looks when there was nothing.
const IDLE_LOOK: Duration = Duration::from_secs(1);
/// Between looks in any case.
const BUSY_LOOK: Duration = Duration::from_millis(20);
/// Between looks for the sake of a few queues that ran low, unless [`WORTH`] says sooner.
const LOW_LOOK: Duration = Duration::from_millis(500);
/// Messages handed out for each queue that a look tells of: with fewer its cost would show.
const WORTH: usize = 5;
/// Wants in one request.
const WANTS_MAX: usize = 512;

/// What is leased for one destination, or out of mixed lots.
#[derive(Debug, Default)]
struct Holding {
    urgent: usize,
    bulk: usize,
    batches: HashMap<BatchId, usize>,
}

/// What is leased.
#[derive(Debug, Default)]
struct Holdings {
    destinations: HashMap<Destination, Holding>,
    mixed: Holding,
    /// How much more may be leased of batches with a rate of their own.
    paced: HashMap<BatchId, usize>,
}

/// How long after a renewal the next is asked for: a quarter of a lease, and of a short one, of which
/// nothing may begin in its last seconds, half of what is left. Or a part of each period would pass
/// with nothing begun.
fn renewed_after(lease: Duration) -> Duration {
    let usable = lease.saturating_sub(LEASE_MARGIN);
    (lease / 4).min(usable / 2)
}

impl Holding {
    fn add(&mut self, batch: &BatchHead, rows: usize) {
        match batch.priority {
            Priority::Transactional => self.urgent += rows,
            Priority::Bulk => {
                self.bulk += rows;
                *self.batches.entry(batch.id).or_default() += rows;
            }
        }
    }
}

impl QueueState {
    /// Asks the store for work, or for more time, when it is time to.
    pub(super) fn ask_store(&mut self, now: Now, out: &mut Vec<Action>) {
        if !self.renewing && !self.ranges.is_empty() && now.instant >= self.renew_at {
            self.renewing = true;
            self.renew_at = now.instant + renewed_after(self.config.lease);
            out.push(Action::Renew);
        }
        if self.draining || self.asking != Asking::No || self.is_paused(now.instant) {
            return;
        }
        let hungry = self.more && self.leased() <= self.low_water;
        if now.instant >= self.look_at || hungry || self.thirst.is_worth_a_look(now.instant) {
            self.asking = Asking::Looking;
            self.look_at = now.instant + IDLE_LOOK;
            self.thirst.looks(now.instant);
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
        self.thirst.told = backlog.len();
        let wants = self.wants(&backlog, now);
        if self.has_overdue(now.instant) {
            self.more = false;
            return;
        }
        if wants.is_empty() {
            // Everybody has enough for now, or nothing is due.
            self.low_water = self.leased() / 2;
            return;
        }
        self.asking = Asking::Leasing;
        out.push(Action::Ask(wants));
    }

    /// What to lease of what is due.
    fn wants(&mut self, backlog: &[Backlog], now: Now) -> Vec<Want> {
        let mut held = self.holdings();
        let mut due: Vec<_> = backlog.iter().filter(|queue| queue.due > 0).collect();
        // So many want something that nobody gets half a minute's worth.
        let share = (LEASED_MAX / due.len().max(1)).max(SHARE_MIN as usize);
        let mut wants: Vec<_> = due
            .iter()
            .filter(|queue| queue.transactional)
            .filter_map(|queue| self.urgent_want(&queue.queue, &held, now))
            .take(WANTS_MAX / 2)
            .collect();
        // Whoever came last the last time is not first again.
        let turn = due.partition_point(|queue| Some(&queue.queue) <= self.last_want.as_ref());
        let queues = due.len();
        due.rotate_left(turn % queues.max(1));
        let mut room = LEASED_MAX.saturating_sub(self.leased());
        self.more = false;
        for queue in due {
            if room == 0 || wants.len() >= WANTS_MAX {
                self.more = true;
                break;
            }
            let Some(mut want) = self.bulk_want(queue, share, &mut held, now) else {
                continue;
            };
            want.rows = want.rows.min(u32::try_from(room).unwrap_or(u32::MAX));
            room = room.saturating_sub(usize::try_from(want.rows).unwrap_or(room));
            self.more |= u64::from(want.rows) < queue.due;
            self.last_want = Some(queue.queue.clone());
            wants.push(want);
        }
        wants
    }

    /// What is transactional waits for no room.
    fn urgent_want(&self, queue: &str, held: &Holdings, now: Now) -> Option<Want> {
        let rows = if queue == MIXED {
            URGENT_MAX.saturating_sub(held.mixed.urgent)
        } else {
            if self.is_left_alone(queue, now.instant) || self.is_barred_queue(queue, now) {
                return None;
            }
            let (key, rate) = self.limits_of(queue);
            let urgent = held.destinations.get(&key).map_or(0, |of| of.urgent);
            startable(rate).min(URGENT_MAX).saturating_sub(urgent)
        };
        let rows = u32::try_from(rows).ok().filter(|rows| *rows > 0)?;
        Some(Want {
            largest: largest(queue),
            urgent_only: true,
            ..Want::of(queue, rows)
        })
    }

    fn bulk_want(
        &mut self,
        queue: &Backlog,
        share: usize,
        held: &mut Holdings,
        now: Now,
    ) -> Option<Want> {
        let name = &*queue.queue;
        let Holdings {
            destinations,
            mixed,
            paced,
        } = held;
        let mut destination = None;
        let (target, holding) = if name == MIXED {
            (MIXED_MAX, mixed)
        } else {
            if self.is_barred_queue(name, now) {
                return None;
            }
            if self.is_left_alone(name, now.instant) {
                return self.want_while_held(queue, now);
            }
            let (key, rate) = self.limits_of(name);
            let holding = destinations.entry(key.clone()).or_default();
            let most = startable(rate).min(share);
            let target = match self.dests.get_mut(&key) {
                Some(dest) if dest.is_failing() => most.min(PROBE),
                Some(dest) => dest.appetite.judge(holding.bulk, most, now.instant),
                None if self.held.contains_key(name) => most.min(PROBE),
                None => most.min(Appetite::FIRST),
            };
            destination = Some(key);
            (target, holding)
        };
        let want = self.shared_out(queue, target, holding, paced);
        let rows = want.as_ref().map_or(0, |want| want.rows);
        // What another queue of the same destination asks for in this turn comes on top of it.
        holding.bulk += usize::try_from(rows).unwrap_or(usize::MAX);
        if u64::from(rows) < queue.due && holding.bulk > 0 {
            self.more = true;
            let dest = destination.and_then(|key| self.dests.get_mut(&key));
            let gauge = dest.map_or(&mut self.thirst.mixed, |dest| &mut dest.appetite.gauge);
            gauge.fill(holding.bulk);
        }
        want
    }

    /// Shares what a destination takes out among the batches that wait for it.
    fn shared_out(
        &self,
        queue: &Backlog,
        target: usize,
        holding: &Holding,
        paced: &mut HashMap<BatchId, usize>,
    ) -> Option<Want> {
        let weights: Vec<_> = queue
            .batches
            .iter()
            .map(|batch| (*batch, u64::from(self.weight_of(*batch))))
            .collect();
        let total: u64 = weights.iter().map(|(_, weight)| weight).sum();
        let level = |weight: u64| {
            let exact = target as u64 * weight / total.max(1);
            usize::try_from(exact)
                .unwrap_or(target)
                .max(RANGE_MIN)
                .min(target)
        };
        let mut of = Vec::new();
        let mut rows = 0;
        let per_batch = level(1);
        for (batch, weight) in weights {
            let has = holding.batches.get(&batch).copied();
            let level = level(weight);
            // A third at a time, or there would be many ranges of a few.
            let mut more = match has {
                Some(has) if has > level * 2 / 3 => 0,
                Some(has) => level - has,
                None => level,
            };
            if let Some(left) = paced.get_mut(&batch) {
                more = more.min(*left);
                *left -= more;
            }
            rows += more;
            if has.is_some() || more != per_batch {
                of.push((batch, u32::try_from(more).unwrap_or(u32::MAX)));
            }
        }
        if queue.batches.len() >= BACKLOG_BATCHES {
            // Those that are not listed.
            rows += per_batch;
            let listed = |batch: &BatchId| queue.batches.contains(batch);
            let known = holding.batches.keys().filter(|batch| !listed(batch));
            of.extend(known.map(|batch| (*batch, 0)));
        }
        let most = (2 * target).saturating_sub(holding.bulk);
        let rows = u32::try_from(rows.min(most))
            .ok()
            .filter(|rows| *rows > 0)?;
        Some(Want {
            largest: largest(&queue.queue),
            per_batch: u32::try_from(per_batch).unwrap_or(u32::MAX),
            of,
            ..Want::of(&queue.queue, rows)
        })
    }

    /// The share of a batch: its account's weight; of one that is not known here, 1.
    fn weight_of(&self, batch: BatchId) -> u32 {
        let account = self.batches.get(&batch).map(|batch| &batch.head.account);
        account.map_or(1, |account| self.weight_of_account(account))
    }

    /// Which destination a domain's queue is for, as far as that is known, and how many messages
    /// it takes in a second.
    fn limits_of(&self, queue: &str) -> (Destination, f64) {
        if let Some(Way::Known { destination, .. }) = self.lanes.get(queue).map(|lane| &lane.way)
            && let Some(rate) = self.rate_in_force(destination)
        {
            return (destination.clone(), rate);
        }
        let domain = queue.parse::<Domain>().ok();
        let own = domain.and_then(|domain| self.config.shaping.domains.get(&domain));
        let limits = own.unwrap_or(&self.config.shaping.default);
        (Destination::named(queue), self.rate_configured(limits))
    }

    fn holdings(&self) -> Holdings {
        let mut held = Holdings::default();
        let mut all = HashMap::<BatchId, usize>::new();
        for lane in self.lanes.values() {
            let key = match &lane.way {
                Way::Known { destination, .. } => destination.clone(),
                Way::Unknown | Way::Asked => Destination::named(lane.domain.as_str()),
            };
            let holding = held.destinations.entry(key).or_default();
            for (batch, rows) in lane.batches() {
                holding.add(batch, rows);
            }
        }
        for range in self.ranges.values() {
            let rows = range.waiting + range.out;
            *all.entry(range.batch).or_default() += rows;
            if range.mixed
                && let Some(batch) = self.batches.get(&range.batch)
            {
                held.mixed.add(&batch.head, rows);
            }
        }
        for (batch, state) in &self.batches {
            if state.head.rate != Rate::Unlimited {
                let most = within(state.head.rate, AHEAD_PACED).max(1);
                let has = all.get(batch).copied().unwrap_or(0);
                held.paced.insert(*batch, most.saturating_sub(has));
            }
        }
        held
    }
}

/// How much a destination has shown to take: what is leased for one that takes nothing would only
/// be kept from others.
#[derive(Debug)]
pub(in crate::queue) struct Appetite {
    rows: usize,
    /// Handed out since it was judged.
    handed: usize,
    judged_at: Instant,
    gauge: Gauge,
}

/// Tells when half of what was leased is gone where the store had more.
#[derive(Debug, Default)]
struct Gauge {
    /// Until then so many; none: the store had no more, or it was told.
    left: usize,
}

impl Gauge {
    fn fill(&mut self, held: usize) {
        self.left = held.div_ceil(2);
    }

    /// One was handed out; true when that was the last of the half.
    fn falls_low(&mut self) -> bool {
        let was = self.left;
        self.left = was.saturating_sub(1);
        was == 1
    }
}

/// When to look at the backlog though much is leased: it may all be for destinations that take
/// little, while one that takes much has run low and would have to wait for them.
#[derive(Debug)]
pub(super) struct Thirst {
    mixed: Gauge,
    ran_low: bool,
    /// Handed out since the last look.
    handed: usize,
    /// Queues that it told of.
    told: usize,
    looked_at: Instant,
}

impl Thirst {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            mixed: Gauge::default(),
            ran_low: false,
            handed: 0,
            told: 0,
            looked_at: now,
        }
    }

    fn looks(&mut self, now: Instant) {
        (self.ran_low, self.handed, self.looked_at) = (false, 0, now);
    }

    /// A message for a destination was handed out, out of a mixed lot or not.
    pub(super) fn handed_out(&mut self, to: &mut Appetite, mixed: bool) {
        to.handed += 1;
        self.handed += 1;
        let has_little = to.gauge.falls_low();
        self.ran_low |= mixed && self.mixed.falls_low() || has_little;
    }

    fn is_worth_a_look(&self, now: Instant) -> bool {
        let is_cheap = self.handed >= self.told * WORTH;
        self.ran_low && (is_cheap || now.saturating_duration_since(self.looked_at) >= LOW_LOOK)
    }
}

impl Appetite {
    /// Of a destination about which nothing is known.
    const FIRST: usize = 128;
    /// The longest between judgements; whoever takes all of it sooner is leased more.
    const SPAN: Duration = Duration::from_secs(10);

    pub(in crate::queue) fn new(now: Instant) -> Self {
        Self {
            rows: Self::FIRST,
            handed: 0,
            judged_at: now,
            gauge: Gauge::default(),
        }
    }

    /// How many to lease in all for one that has `held` waiting and may take up to `most`.
    fn judge(&mut self, held: usize, most: usize, now: Instant) -> usize {
        let took_all = self.handed >= self.rows;
        if took_all || now.saturating_duration_since(self.judged_at) >= Self::SPAN {
            if self.handed * 4 < self.rows.min(held) {
                self.rows = (self.rows / 2).max(PROBE);
            }
            (self.handed, self.judged_at) = (0, now);
        }
        if took_all || held * 3 <= self.rows {
            self.rows = (self.rows * 2).clamp(PROBE, DESTINATION_MAX);
        }
        self.rows.min(most)
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

/// Messages that a rate allows in a time, rounded up.
fn within(rate: Rate, time: Duration) -> usize {
    match rate {
        Rate::Unlimited => usize::MAX,
        Rate::Limited { count, per } => {
            let exact = u128::from(count) * time.as_millis();
            let rows = exact.div_ceil(per.as_millis().max(1));
            usize::try_from(rows).unwrap_or(usize::MAX)
        }
    }
}

/// The most rows in one range.
fn largest(queue: &str) -> u32 {
    if queue == MIXED {
        MIXED_RANGE
    } else {
        u32::MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use service::clock::{Clock as _, SystemClock};

    #[test]
    fn a_lease_is_renewed_before_its_last_seconds() {
        for seconds in [6, 8, 45, 300] {
            let lease = Duration::from_secs(seconds);
            let until_next = renewed_after(lease) + QueueState::TICK;
            assert!(until_next + LEASE_MARGIN <= lease, "{seconds}");
        }
        assert_eq!(
            renewed_after(Duration::from_secs(40)),
            Duration::from_secs(10)
        );
    }

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
    fn whoever_takes_little_is_leased_little() {
        let mut now = SystemClock.instant();
        let mut slow = Appetite::new(now);
        for _ in 0..5 {
            now += Appetite::SPAN;
            slow.judge(100, DESTINATION_MAX, now);
            Thirst::new(now).handed_out(&mut slow, false);
        }
        assert_eq!(slow.judge(100, DESTINATION_MAX, now), PROBE);
        let mut fast = Appetite::new(now);
        for _ in 0..6 {
            fast.judge(0, DESTINATION_MAX, now);
        }
        assert_eq!(fast.judge(0, DESTINATION_MAX, now), DESTINATION_MAX);
        assert_eq!(fast.judge(0, 150, now), 150);
    }
}
