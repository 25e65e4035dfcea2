//! Ranges: what was leased comes in, waits in lanes, and ends reported, handed back or lost.

use super::*;
use crate::queue::job::{Item, Lease};
use crate::queue::lane::Ending;
use model::units::Rate;
use store::MIXED;

/// Between tries to renew when the store did not answer.
const RENEW_AGAIN: Duration = Duration::from_secs(1);

impl QueueState {
    pub(super) fn on_leased(
        &mut self,
        ranges: Vec<LeasedRange>,
        asked_at: Instant,
        now: Now,
        out: &mut Vec<Action>,
    ) {
        if self.asking == Asking::Leasing {
            self.asking = Asking::No;
        }
        if ranges.is_empty() {
            self.more = false;
        }
        for leased in ranges {
            if self.draining {
                out.push(Action::Release(Release {
                    range: leased.range,
                    due_at: None,
                    requeue: Vec::new(),
                }));
            } else {
                self.take_range(leased, asked_at, now, out);
            }
        }
        self.low_water = self.leased() / 2;
    }

    fn take_range(
        &mut self,
        leased: LeasedRange,
        asked_at: Instant,
        now: Now,
        out: &mut Vec<Action>,
    ) {
        let id = leased.range;
        let batch = leased.batch.id;
        out.push(Action::Register {
            range: id,
            batch,
            places: leased
                .items
                .iter()
                .map(|item| (item.place, item.offset))
                .collect(),
            window: leased.window,
        });
        let state = self.batches.entry(batch).or_insert_with(|| {
            out.push(Action::LoadContent(Arc::clone(&leased.batch)));
            BatchState {
                head: Arc::clone(&leased.batch),
                pool: Arc::clone(self.config.pools.of(leased.batch.pool.as_deref())),
                ranges: 0,
                content: Content::Loading,
            }
        });
        state.ranges += 1;
        if leased.batch.rate != Rate::Unlimited {
            let Self { paces, shares, .. } = self;
            paces.entry(batch).or_insert_with(|| {
                if let Some(shares) = shares.as_mut() {
                    shares.hurry(now.instant);
                }
                let part = shares::first_part(shares.as_ref(), &Limit::Batch(batch));
                Pace::new(leased.batch.rate, part, self.started)
            });
        }
        let mut range = Range {
            batch,
            mixed: &*leased.queue == MIXED,
            window: leased.window,
            len: u32::try_from(leased.items.len()).unwrap_or(u32::MAX),
            reported: 0,
            lease: Lease::new(asked_at, self.config.lease),
            leased_at: asked_at,
            learned_at: now.instant,
            domains: Vec::new(),
            waiting: leased.items.len(),
            out: 0,
            ending: None,
            requeue: Vec::new(),
        };
        let profiles = &self.config.profiles;
        let profile = profiles.get(&leased.batch.account).copied();
        let profile = profile.unwrap_or(StatusProfile::Default);
        let mut doubtful = Vec::new();
        for one in leased.items {
            let maybe_started = one.maybe_started;
            let zone = one.row.time_zone.as_deref();
            let window = leased.batch.window.as_ref();
            let shut_at = window.and_then(|window| window.closes_at(zone, now.wall));
            let item = Item {
                range: id,
                batch: Arc::clone(&leased.batch),
                place: one.place,
                offset: one.offset,
                row: one.row,
                attempt: one.attempts.saturating_add(1),
                ambiguous_before: one.ambiguous_before,
                profile,
                shut_at,
                variant: one.variant,
            };
            let waiting = Waiting {
                item: Arc::new(item),
                broken: 0,
            };
            if maybe_started {
                doubtful.push(waiting);
            } else {
                let domain = self.wait_in_lane(waiting);
                if range.domains.last() != Some(&domain) && !range.domains.contains(&domain) {
                    range.domains.push(domain);
                }
            }
        }
        let domains = range.domains.clone();
        self.ranges.insert(id, range);
        for waiting in doubtful {
            self.end_waiting(&waiting, Finding::InFlight, now, out);
        }
        for name in &domains {
            self.take_turns(name);
            self.respect_hold(name, now, out);
        }
        self.tidy_range(id, now, out);
    }

    /// Puts a message behind the others of its domain, and has the domain looked up if need be.
    fn wait_in_lane(&mut self, waiting: Waiting) -> Box<str> {
        let name: Box<str> = waiting.item.row.email.domain().into();
        self.lane(&name).push(waiting);
        name
    }

    /// The lane of a domain, made and looked up where there was none.
    pub(super) fn lane(&mut self, name: &str) -> &mut Lane {
        if !self.lanes.contains_key(name)
            && let Ok(domain) = name.parse::<Domain>()
        {
            let mut lane = Lane::new(domain.clone());
            lane.way = Way::Asked;
            self.lanes.insert(name.into(), lane);
            self.to_resolve.push_back(domain);
        }
        if let Some(Way::Known { destination, .. }) = self.lanes.get(name).map(|lane| &lane.way) {
            self.dirty.insert(destination.clone());
        }
        // An address's domain was parsed when it was accepted, so the lane is there.
        self.lanes
            .entry(name.into())
            .or_insert_with(|| Lane::new(fallback_domain()))
    }

    /// Ends a range that has nothing left to do here.
    pub(super) fn tidy_range(&mut self, id: RangeRef, now: Now, out: &mut Vec<Action>) {
        let Some(range) = self.ranges.get(&id) else {
            return;
        };
        if range.out > 0 || (range.waiting > 0 && range.ending.is_none()) {
            return;
        }
        let Some(range) = self.ranges.remove(&id) else {
            return;
        };
        match range.ending {
            Some(Ending::Return(until)) => {
                let due_at =
                    until.map(|until| now.wall + until.saturating_duration_since(now.instant));
                out.push(Action::Release(Release {
                    range: id,
                    due_at,
                    requeue: range.requeue,
                }));
            }
            None if !range.requeue.is_empty() => out.push(Action::Release(Release {
                range: id,
                due_at: None,
                requeue: range.requeue,
            })),
            // All reported: shipping ends it. Lost: another's.
            Some(Ending::Lost) | None => {}
        }
        if let Some(state) = self.batches.get_mut(&range.batch) {
            state.ranges = state.ranges.saturating_sub(1);
            if state.ranges == 0 {
                self.batches.remove(&range.batch);
            }
        }
    }

    /// Takes what waits of a range out of its lanes.
    fn withdraw_range(&mut self, id: RangeRef) -> Vec<Waiting> {
        let Some(range) = self.ranges.get(&id) else {
            return Vec::new();
        };
        let mut withdrawn = Vec::new();
        for name in &range.domains {
            if let Some(lane) = self.lanes.get_mut(name) {
                withdrawn.extend(lane.withdraw(id));
            }
        }
        withdrawn
    }

    /// Takes what waits of a batch out of its lanes; its ranges still count it.
    pub(super) fn withdraw_batch(&mut self, batch: BatchId) -> Vec<Waiting> {
        let ranges = self.ranges_of(batch);
        ranges
            .into_iter()
            .flat_map(|range| self.withdraw_range(range))
            .collect()
    }

    pub(super) fn ranges_of(&self, batch: BatchId) -> Vec<RangeRef> {
        self.ranges
            .iter()
            .filter(|(_, range)| range.batch == batch)
            .map(|(id, _)| *id)
            .collect()
    }

    /// Hands back what waits of a range, once nothing of it is out. Out of a mixed lot everybody
    /// goes to the queue of the own domain: whoever could not start in time must not wait inside a
    /// foreign lot.
    pub(super) fn return_range(
        &mut self,
        id: RangeRef,
        until: Option<Instant>,
        now: Now,
        out: &mut Vec<Action>,
    ) {
        let withdrawn = self.withdraw_range(id);
        let Some(range) = self.ranges.get_mut(&id) else {
            return;
        };
        range.waiting = 0;
        let moves_on = range.mixed && until.is_some();
        if moves_on {
            let own_queue =
                |waiting: &Waiting| (waiting.item.place, waiting.item.row.email.domain().into());
            range.requeue.extend(withdrawn.iter().map(own_queue));
        }
        // The others of a mixed lot have nothing to wait for.
        let until = until.filter(|_| !range.mixed);
        if range.ending != Some(Ending::Lost) {
            range.ending = Some(Ending::Return(until));
        }
        self.tidy_range(id, now, out);
    }

    /// Another node has the range now: nothing more of it starts here.
    fn lose_range(&mut self, id: RangeRef, out: &mut Vec<Action>) {
        self.overdue.remove(&id);
        self.withdraw_range(id);
        let Some(range) = self.ranges.get_mut(&id) else {
            return;
        };
        range.waiting = 0;
        range.ending = Some(Ending::Lost);
        let now = Now {
            instant: self.started,
            wall: Timestamp::default(),
        };
        self.tidy_range(id, now, out);
    }

    pub(super) fn on_renewed(
        &mut self,
        held: Option<Vec<RangeRef>>,
        asked_at: Instant,
        out: &mut Vec<Action>,
    ) {
        self.renewing = false;
        let Some(held) = held else {
            self.renew_at = self.renew_at.min(asked_at + RENEW_AGAIN);
            return;
        };
        let held: HashSet<_> = held.into_iter().collect();
        self.hand_back_strays(&held, out);
        let until = asked_at + self.config.lease;
        let mut lost = Vec::new();
        for (id, range) in &self.ranges {
            // A lease and a renewal overtake each other on their way. Of a range that was not known
            // here when the renewal was asked, its answer may still know nothing.
            let was_known = range.learned_at < asked_at;
            if held.contains(id) {
                range.lease.extend(until);
            } else if was_known && !self.overdue.contains(id) {
                lost.push(*id);
            }
        }
        for id in lost {
            self.lose_range(id, out);
        }
    }

    /// Hands back what the store has for this node though nobody here knows of it: the answer to a
    /// lease was lost, or a store has forgotten that it had it back. It would be renewed for ever.
    /// What is on its way here or back is seen once at most.
    fn hand_back_strays(&mut self, held: &HashSet<RangeRef>, out: &mut Vec<Action>) {
        if self.asking == Asking::Leasing {
            self.strays.clear();
            return;
        }
        let is_known = |id: &&RangeRef| self.ranges.contains_key(id) || self.overdue.contains(*id);
        let unknown: HashSet<_> = held.iter().filter(|id| !is_known(id)).copied().collect();
        for range in self.strays.intersection(&unknown) {
            out.push(Action::Release(Release {
                range: *range,
                due_at: None,
                requeue: Vec::new(),
            }));
        }
        self.strays = unknown;
    }

    pub(super) fn on_shipped(
        &mut self,
        windows: &[(RangeRef, u32)],
        lost: &[RangeRef],
        out: &mut Vec<Action>,
    ) {
        for (id, window) in windows {
            let Some(range) = self.ranges.get_mut(id) else {
                continue;
            };
            range.move_window(*window);
            for name in &range.domains {
                if let Some(Way::Known { destination, .. }) =
                    self.lanes.get(name).map(|lane| &lane.way)
                {
                    self.dirty.insert(destination.clone());
                }
            }
        }
        for id in lost {
            self.lose_range(*id, out);
        }
    }

    pub(super) fn mark_batch_dirty(&mut self, batch: BatchId) {
        for range in self.ranges.values().filter(|range| range.batch == batch) {
            for name in &range.domains {
                if let Some(Way::Known { destination, .. }) =
                    self.lanes.get(name).map(|lane| &lane.way)
                {
                    self.dirty.insert(destination.clone());
                }
            }
        }
    }

    pub(super) fn tick_ranges(&mut self, now: Now, out: &mut Vec<Action>) {
        let mut over = Vec::new();
        let mut late = Vec::new();
        for (id, range) in &self.ranges {
            if range.ending != Some(Ending::Lost) && range.lease.until() <= now.instant {
                over.push(*id);
            } else if range.waiting > 0
                && range.ending.is_none()
                && now.instant >= range.leased_at + PATIENCE
                && (range.mixed || self.has_barred(range, now))
            {
                // What waits for its batch's own rate is as well off in the store as it was.
                let until = Some(now.instant).filter(|_| !self.paces.contains_key(&range.batch));
                late.push((*id, until));
            }
        }
        for id in over {
            // Others may take it now. If nobody does before its facts are in the store, it is
            // handed back there with nobody in doubt.
            if self.overdue.insert(id) {
                self.return_range(id, None, now, out);
            }
        }
        for (id, until) in late {
            self.bar(id, now);
            self.return_range(id, until, now, out);
        }
    }
}

/// Stands in where a stored address has a domain that no longer parses; nothing resolves it.
#[expect(clippy::expect_used, reason = "a constant that a test parses")]
fn fallback_domain() -> Domain {
    "invalid.invalid".parse().expect("a domain")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::queue::fixtures::{config, leased, range_ref};
    use service::clock::{Clock as _, SystemClock};

    /// A queue, moment by moment.
    struct Moments {
        start: Instant,
        queue: QueueState,
    }

    impl Moments {
        fn new() -> Self {
            let start = SystemClock.instant();
            let view = Arc::new(ControlView::new(start));
            let queue = QueueState::new(config("", &[1]), view, 1, start);
            Self { start, queue }
        }

        fn after(&self, seconds: u64) -> Instant {
            self.start + Duration::from_secs(seconds)
        }

        /// A range of two, asked for and answered after so many seconds.
        fn leased(&mut self, id: u64, asked: u64, answered: u64) {
            let ranges = vec![leased(id, "x.example", 2)];
            let asked_at = self.after(asked);
            self.apply(Event::Leased { ranges, asked_at }, answered);
        }

        fn renewed(&mut self, held: &[u64], asked: u64, answered: u64) {
            let held = Some(held.iter().copied().map(range_ref).collect());
            let asked_at = self.after(asked);
            self.apply(Event::Renewed { held, asked_at }, answered);
        }

        fn apply(&mut self, event: Event, at: u64) {
            let now = Now {
                instant: self.after(at),
                wall: Timestamp::from_millis(0) + Duration::from_secs(at),
            };
            self.queue.apply([event], now);
        }
    }

    #[test]
    fn a_range_that_came_while_a_renewal_was_under_way_is_not_lost() {
        let mut at = Moments::new();
        at.leased(1, 0, 1);
        // Asked for before the renewal, given behind it, and answered before it.
        at.leased(2, 4, 6);
        at.renewed(&[1], 5, 7);
        assert_eq!(at.queue.leased(), 4);
        at.renewed(&[1], 10, 11);
        assert_eq!(at.queue.leased(), 2, "this one another node has taken");
    }
}
