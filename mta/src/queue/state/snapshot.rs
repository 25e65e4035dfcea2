//! What people are shown: nothing in here changes the state.

use super::*;
use crate::queue::job::Item;
use crate::queue::snapshot::{
    BatchView, Block, Blocked, ContentView, DOMAINS_MAX, DestinationView, LimitSight, ProcessView,
    Scope, Snapshot, SourceView, Whereabouts,
};
use crate::queue::target::Target;

/// Destinations in one picture, whatever is asked for.
const VIEWS_MAX: usize = 1_000;

impl QueueState {
    /// A picture of this moment.
    pub fn snapshot(&self, scope: &Scope, now: Now) -> Snapshot {
        let mut snapshot = Snapshot {
            at: now.wall,
            process: self.process(now),
            destinations: Vec::new(),
            destination_count: self.dests.len(),
            batch: None,
            message: Whereabouts::Absent,
            domain_waiting: 0,
            suspended: Vec::new(),
        };
        let shown: Vec<Destination> = match scope {
            Scope::Busiest(count) => self.busiest(self.dests.keys(), *count),
            Scope::Named(names) => {
                let is_suspended = |key: &&Destination| {
                    let suspension = self.suspension(key.as_str(), now.wall);
                    suspension.is_some()
                };
                snapshot.suspended = names.iter().filter(is_suspended).cloned().collect();
                names.iter().take(VIEWS_MAX).cloned().collect()
            }
            Scope::Batch(batch, names) => {
                snapshot.batch = self.batch_view(*batch, now);
                names.iter().take(VIEWS_MAX).cloned().collect()
            }
            Scope::Message(message, domain, destination) => {
                snapshot.batch = self.batch_view(message.batch, now);
                snapshot.message = self.whereabouts(*message, domain, now);
                vec![destination.clone()]
            }
            Scope::Domain(domain, destination) => {
                snapshot.domain_waiting = self.lanes.get(domain).map_or(0, Lane::len);
                vec![destination.clone()]
            }
        };
        let batch = match scope {
            Scope::Batch(batch, _) => Some(*batch),
            Scope::Message(message, ..) => Some(message.batch),
            Scope::Busiest(_) | Scope::Named(_) | Scope::Domain(..) => None,
        };
        let view = |key: &Destination| {
            let dest = self.dests.get(key)?;
            let share = batch.and_then(|batch| dest.turns.share_of(batch));
            let view = self.view_of(key, dest, now);
            Some(DestinationView { share, ..view })
        };
        snapshot.destinations = shown.iter().filter_map(view).collect();
        snapshot
    }

    fn process(&self, now: Now) -> ProcessView {
        let paused = self.paused_until.filter(|until| *until > now.instant);
        ProcessView {
            leased: self.leased(),
            in_flight: self.in_flight(),
            connections: self.conns.len(),
            connections_max: CONNECTIONS_MAX,
            resolving: self.resolving.len() + self.to_resolve.len(),
            paused_until: paused.map(|until| wall(now, until)),
            draining: self.draining,
        }
    }

    /// Those with the most mail here first; equal ones by name, so that a list stands still.
    fn busiest<'a>(
        &self,
        of: impl Iterator<Item = &'a Destination>,
        count: usize,
    ) -> Vec<Destination> {
        let mut by_size: Vec<_> = of
            .map(|key| (std::cmp::Reverse(self.mail_of(key)), key))
            .collect();
        by_size.sort_unstable();
        let kept = by_size.into_iter().take(count.min(VIEWS_MAX));
        kept.map(|(_, key)| key.clone()).collect()
    }

    /// Messages here for a destination: waiting and at connections.
    fn mail_of(&self, key: &Destination) -> usize {
        self.dests.get(key).map_or(0, |dest| {
            self.waiting_for(dest) + self.in_flight_of(dest.targets.iter().flat_map(|of| &of.conns))
        })
    }

    /// Where something waits for a destination.
    fn lanes_of<'a>(&'a self, dest: &Dest) -> impl Iterator<Item = (&'a Box<str>, &'a Lane)> {
        let names = dest.turns.names().into_iter();
        names.filter_map(|name| self.lanes.get_key_value(&name))
    }

    fn waiting_for(&self, dest: &Dest) -> usize {
        self.lanes_of(dest).map(|(_, lane)| lane.len()).sum()
    }

    fn busiest_domains(&self, dest: &Dest) -> Vec<(Box<str>, usize)> {
        let mut domains: Vec<_> = self
            .lanes_of(dest)
            .map(|(name, lane)| (std::cmp::Reverse(lane.len()), name))
            .collect();
        domains.sort_unstable();
        let kept = domains.into_iter().take(DOMAINS_MAX);
        kept.map(|(len, name)| (name.clone(), len.0)).collect()
    }

    fn in_flight_of<'a>(&self, conns: impl Iterator<Item = &'a ConnId>) -> usize {
        conns
            .filter_map(|id| Some(self.conns.get(id)?.in_flight))
            .sum()
    }

    fn view_of(&self, key: &Destination, dest: &Dest, now: Now) -> DestinationView {
        let sources: Vec<_> = dest
            .targets
            .iter()
            .map(|target| self.source_view(target, now))
            .collect();
        DestinationView {
            policy: Arc::clone(&dest.policy),
            domains: self.busiest_domains(dest),
            domain_count: self.lanes_of(dest).count(),
            waiting: self.waiting_for(dest),
            blocked: self.blocked(dest, now),
            in_flight: sources.iter().map(|source| source.in_flight).sum(),
            held_until: dest
                .hold_until
                .filter(|until| *until > now.instant)
                .map(|until| wall(now, until)),
            failures: dest.failures(),
            starved: dest.is_starved,
            pace: dest.pace.per_second(now.instant),
            sources,
            limits: self.limit_sights(key, now),
            share: None,
        }
    }

    fn limit_sights(&self, key: &Destination, now: Now) -> Vec<LimitSight> {
        let sight = |of: LimitView| LimitSight {
            source: of.source,
            kind: of.kind,
            in_force: of.in_force,
            base: of.base,
            reason: of.because.reason.map(|reason| reason.as_str()),
            rule: of.because.rule,
            until: of.until.map(|until| wall(now, until)),
            line: of.line,
        };
        self.limits(key).into_iter().map(sight).collect()
    }

    fn source_view(&self, target: &Target, now: Now) -> SourceView {
        let conns: Vec<_> = target
            .conns
            .iter()
            .filter_map(|id| self.conns.get(id))
            .collect();
        let max = target.in_force.messages_per_connection;
        let ready = conns.iter().filter(|conn| conn.is_ready()).count();
        let full = |conn: &&&Conn| conn.is_ready() && !conn.has_room(max);
        SourceView {
            source: target.source,
            ready,
            opening: conns.len() - ready,
            full: conns.iter().filter(full).count(),
            in_flight: conns.iter().map(|conn| conn.in_flight).sum(),
            next_permit_at: wall(now, target.plan.free_at(now.instant)),
            open_after: target.opens_after(now.instant).map(|at| wall(now, at)),
        }
    }

    /// What waits in the ranges of a destination's domains and may not start.
    fn blocked(&self, dest: &Dest, now: Now) -> Blocked {
        let mut blocked = Blocked::default();
        let lanes = self.lanes_of(dest).map(|(_, lane)| lane);
        for (item, count) in lanes.flat_map(Lane::fronts) {
            match self.block_of(item, now.instant) {
                Some(Block::Window) => blocked.by_window += count,
                Some(Block::Content) => blocked.by_content += count,
                Some(Block::Lease) => blocked.by_lease += count,
                Some(Block::Route) | None => {}
            }
        }
        blocked
    }

    fn block_of(&self, item: &Item, now: Instant) -> Option<Block> {
        let Some(range) = self.ranges.get(&item.range) else {
            return Some(Block::Lease);
        };
        if range.ending.is_some() || !range.lease.allows_start(now) {
            return Some(Block::Lease);
        }
        let batch = self.batches.get(&item.batch.id);
        if batch.is_none_or(|batch| batch.content != Content::Ready) {
            return Some(Block::Content);
        }
        (item.offset >= range.window).then_some(Block::Window)
    }

    fn batch_view(&self, batch: BatchId, now: Now) -> Option<BatchView> {
        let state = self.batches.get(&batch)?;
        let of_batch = || self.ranges.values().filter(|range| range.batch == batch);
        Some(BatchView {
            waiting: of_batch().map(|range| range.waiting).sum(),
            in_flight: of_batch().map(|range| range.out).sum(),
            content: match state.content {
                Content::Ready => ContentView::Ready,
                Content::Loading => ContentView::Loading,
                Content::Wanted(at) => ContentView::Failed(wall(now, at)),
            },
        })
    }

    fn whereabouts(&self, message: MessageId, domain: &str, now: Now) -> Whereabouts {
        let is_it = |waiting: &Waiting| waiting.item.message() == message;
        if self.jobs.values().any(|out| is_it(&out.waiting)) {
            return Whereabouts::InFlight;
        }
        let Some(lane) = self.lanes.get(domain) else {
            return Whereabouts::Absent;
        };
        let Some((ahead, item)) = lane.place_of(is_it) else {
            return Whereabouts::Absent;
        };
        let blocked = match lane.way {
            Way::Unknown | Way::Asked => Some(Block::Route),
            Way::Known { .. } => self.block_of(item, now.instant),
        };
        Whereabouts::Waiting { ahead, blocked }
    }
}

fn wall(now: Now, at: Instant) -> Timestamp {
    if at >= now.instant {
        now.wall + at.saturating_duration_since(now.instant)
    } else {
        now.wall - now.instant.saturating_duration_since(at)
    }
}
