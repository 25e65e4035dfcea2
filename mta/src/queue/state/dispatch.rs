//! Handing messages to connections, opening those, and taking back what they report.

use super::*;
use service::config::TlsPolicy;

use crate::queue::control::Permission;
use crate::queue::decide::expires_at;
use crate::queue::job::Item;
use crate::queue::target::Carrier;

/// Domains of a destination that are looked at for one message.
const SCAN_MAX: usize = 64;

impl QueueState {
    /// Gives a destination's messages to its connections as far as its limits go.
    pub(super) fn pump(&mut self, key: &Destination, now: Now, out: &mut Vec<Action>) {
        if self.draining || self.is_paused(now.instant) || self.is_barred(key, now) {
            return;
        }
        while self.hand_out(key, now, out) {}
        self.open_more(key, now, out);
        self.close_idle(key, out);
    }

    /// Hands one message to the least busy connection; false when none can go.
    fn hand_out(&mut self, key: &Destination, now: Now, out: &mut Vec<Action>) -> bool {
        for id in self.conns_with_room(key, now.instant) {
            let Some(carrier) = self.conns.get(&id).and_then(Conn::carrier) else {
                continue;
            };
            if let Some(waiting) = self.take_for(key, &carrier, now, out) {
                self.send(id, key, waiting, now, out);
                return true;
            }
        }
        false
    }

    /// Connections that may carry something now: by their source's share, least busy first.
    fn conns_with_room(&self, key: &Destination, now: Instant) -> Vec<ConnId> {
        let Some(dest) = self.dests.get(key) else {
            return Vec::new();
        };
        let mut found = Vec::new();
        for target in dest
            .by_share()
            .into_iter()
            .filter_map(|at| dest.targets.get(at))
        {
            if !target.is_due(&dest.policy.limits, now) {
                continue;
            }
            let max = target.in_force.messages_per_connection;
            let conns = target
                .conns
                .iter()
                .filter_map(|id| Some((self.conns.get(id)?, *id)));
            let mut free: Vec<_> = conns
                .filter(|(conn, _)| conn.has_room(max))
                .map(|(conn, id)| (conn.in_flight, id))
                .collect();
            free.sort_unstable();
            found.extend(free.into_iter().map(|(_, id)| id));
        }
        found
    }

    /// Takes the next message of a destination that `carrier` may carry. Whatever turns
    /// out not to be sendable on the way is ended or handed back.
    fn take_for(
        &mut self,
        key: &Destination,
        carrier: &Carrier,
        now: Now,
        out: &mut Vec<Action>,
    ) -> Option<Waiting> {
        let floor = self.dests.get(key)?.policy.limits.tls;
        for _ in 0..SCAN_MAX.min(self.dests.get(key)?.lanes.len()) {
            let name = self.dests.get_mut(key)?.lanes.pop_front()?;
            let found = self.take_of_lane(&name, (carrier, floor), now, out);
            match self.lanes.get_mut(&name) {
                Some(lane) if lane.is_empty() => {
                    self.lanes.remove(&name);
                }
                Some(lane) if matches!(&lane.way, Way::Known { until, .. } if *until <= now.instant) =>
                {
                    // What DNS said has run out; ask again before more is sent by it.
                    lane.way = Way::Asked;
                    self.to_resolve.push_back(lane.domain.clone());
                }
                Some(_) => self.dests.get_mut(key)?.lanes.push_back(name),
                None => {}
            }
            if found.is_some() {
                return found;
            }
        }
        None
    }

    fn take_of_lane(
        &mut self,
        name: &str,
        (carrier, floor): (&Carrier, TlsPolicy),
        now: Now,
        out: &mut Vec<Action>,
    ) -> Option<Waiting> {
        loop {
            let Self {
                lanes,
                ranges,
                batches,
                paces,
                wakes,
                ..
            } = self;
            let lane = lanes.get_mut(name)?;
            let destination = match &lane.way {
                Way::Known {
                    route, destination, ..
                } if carrier.takes(route, floor) => destination.clone(),
                Way::Known { .. } | Way::Asked | Way::Unknown => return None,
            };
            let waiting = lane.take(|item| {
                let fits = may_start(ranges, batches, item, now.instant)
                    && batches
                        .get(&item.batch.id)
                        .is_some_and(|batch| batch.pool.weight(carrier.source).is_some());
                let planned = paces.get(&item.batch.id).map(|pace| pace.plan.next());
                let late = planned.filter(|at| fits && *at > now.instant);
                wakes.extend(late.map(|at| (at, destination.clone())));
                fits && late.is_none()
            })?;
            let leased_at = ranges
                .get(&waiting.item.range)
                .map_or(now.instant, |range| range.leased_at);
            match self.view.permission(&waiting.item, leased_at) {
                Permission::Go
                    if now.wall >= expires_at(&waiting.item, &self.policy_of(&waiting)) =>
                {
                    self.end_waiting(&waiting, Finding::TooLate, now, out);
                }
                Permission::Go => return Some(waiting),
                Permission::Suppressed(reason) => {
                    self.end_waiting(&waiting, Finding::Suppressed(reason), now, out)
                }
                Permission::Cancelled => self.end_waiting(&waiting, Finding::Cancelled, now, out),
                Permission::Paused | Permission::Stale => {
                    let range = waiting.item.range;
                    self.lane(name).put_back(waiting);
                    self.return_range(range, None, now, out);
                }
            }
        }
    }

    fn send(
        &mut self,
        id: ConnId,
        key: &Destination,
        waiting: Waiting,
        now: Now,
        out: &mut Vec<Action>,
    ) {
        let job = JobId(self.id());
        let (Some(conn), Some(dest), Some(range)) = (
            self.conns.get_mut(&id),
            self.dests.get_mut(key),
            self.ranges.get_mut(&waiting.item.range),
        ) else {
            return;
        };
        conn.in_flight += 1;
        conn.sent += 1;
        range.waiting = range.waiting.saturating_sub(1);
        range.out += 1;
        let batch = waiting.item.batch.id;
        if let Some(target) = dest.targets.get_mut(conn.target) {
            let pool = self.batches.get(&batch).map(|batch| &batch.pool);
            let weight = pool.and_then(|pool| pool.weight(conn.source));
            target.handed_out(weight.unwrap_or(1), now.instant);
        }
        let pace = self.paces.get_mut(&batch).map(|pace| {
            pace.plan.take(now.instant);
            Arc::clone(&pace.permits)
        });
        dest.pace.note(now.instant);
        out.push(Action::Send(Job {
            id: job,
            conn: id,
            item: Arc::clone(&waiting.item),
            policy: Arc::clone(&dest.policy),
            lease: range.lease.clone(),
            pace,
            leased_at: range.leased_at,
        }));
        self.jobs.insert(job, Out { waiting, conn: id });
    }

    // ---- connections --------------------------------------------------------------------

    /// Opens a connection if there is work that none of those there are can take.
    fn open_more(&mut self, key: &Destination, now: Now, out: &mut Vec<Action>) {
        let Some(dest) = self.dests.get(key) else {
            return;
        };
        for at in dest.by_share() {
            let Some(target) = dest.targets.get(at) else {
                continue;
            };
            let ready = target
                .conns
                .iter()
                .filter(|id| self.conns.get(id).is_some_and(Conn::is_ready))
                .count();
            let opening = target.conns.len() - ready;
            let limit = usize::try_from(target.in_force.connections).unwrap_or(usize::MAX);
            // The first tells whether anybody is there; then twice as many each time.
            let allowed = self.source_is_up(target.source, now.instant)
                && target.is_due(&dest.policy.limits, now.instant)
                && target.may_open(now.instant)
                && opening <= ready.saturating_sub(1)
                && target.conns.len() < limit;
            if !allowed {
                continue;
            }
            let Some(route) = self.route_in_need(key, target.source, now.instant) else {
                continue;
            };
            if self.conns.len() >= CONNECTIONS_MAX {
                if !self.starved.contains(key) {
                    self.starved.push_back(key.clone());
                }
                self.close_any_idle(out);
                return;
            }
            let (source, policy) = (target.source, Arc::clone(&dest.policy));
            let permits = Arc::clone(&target.permits);
            let id = ConnId(self.id());
            let conn = Conn {
                destination: key.clone(),
                target: at,
                source,
                route: Arc::clone(&route),
                security: None,
                closing: false,
                in_flight: 0,
                sent: 0,
            };
            self.conns.insert(id, conn);
            if let Some(target) = self
                .dests
                .get_mut(key)
                .and_then(|dest| dest.targets.get_mut(at))
            {
                target.opened(id, now.instant);
            }
            out.extend(self.limited(key, Vec::new()).map(Action::Limits));
            out.push(Action::Open {
                conn: id,
                route,
                policy,
                source,
                permits,
            });
            return;
        }
    }

    /// The route of a message that could start now if there were a connection from this source.
    fn route_in_need(&self, key: &Destination, source: usize, now: Instant) -> Option<Arc<Route>> {
        let dest = self.dests.get(key).filter(|dest| !dest.is_held(now))?;
        let served = |route: &Arc<Route>, pool: &Pool| {
            let mut conns = dest.targets.iter().flat_map(|target| {
                let max = target.in_force.messages_per_connection;
                let of_target = target.conns.iter();
                of_target.filter_map(move |id| Some((self.conns.get(id)?, max)))
            });
            conns.any(|(conn, max)| {
                let takes = |carrier: Carrier| carrier.takes(route, dest.policy.limits.tls);
                conn.has_room(max)
                    && conn.carrier().is_some_and(takes)
                    && pool.weight(conn.source).is_some()
            })
        };
        let needs = |item: &Item, route: &Arc<Route>| {
            let pool = self.batches.get(&item.batch.id).map(|batch| &batch.pool);
            may_start(&self.ranges, &self.batches, item, now)
                && pool.is_some_and(|pool| pool.weight(source).is_some() && !served(route, pool))
        };
        dest.lanes.iter().take(SCAN_MAX).find_map(|name| {
            let lane = self.lanes.get(name)?;
            let Way::Known { route, .. } = &lane.way else {
                return None;
            };
            lane.has(|item| needs(item, route))
                .then(|| Arc::clone(route))
        })
    }

    /// When others wait for a connection of the process, one without work makes room.
    fn close_idle(&mut self, key: &Destination, out: &mut Vec<Action>) {
        if self.starved.is_empty() {
            return;
        }
        let Some(dest) = self.dests.get(key).filter(|dest| dest.lanes.is_empty()) else {
            return;
        };
        for id in dest.targets.iter().flat_map(|target| &target.conns) {
            if let Some(conn) = self.conns.get_mut(id)
                && conn.is_ready()
                && !conn.closing
                && conn.in_flight == 0
            {
                conn.closing = true;
                out.push(Action::Close(*id));
            }
        }
    }

    fn close_any_idle(&mut self, out: &mut Vec<Action>) {
        let has_lanes = |dests: &HashMap<Destination, Dest>, of: &Destination| {
            dests.get(of).is_some_and(|dest| !dest.lanes.is_empty())
        };
        let Self { conns, dests, .. } = self;
        let idle = conns.iter_mut().find(|(_, conn)| {
            conn.is_ready()
                && !conn.closing
                && conn.in_flight == 0
                && !has_lanes(dests, &conn.destination)
        });
        if let Some((id, conn)) = idle {
            conn.closing = true;
            out.push(Action::Close(*id));
        }
    }

    pub(super) fn on_ready(&mut self, id: ConnId, security: Arc<Security>) {
        let Some(conn) = self.conns.get_mut(&id) else {
            return;
        };
        conn.security = Some(security);
        let (destination, source) = (conn.destination.clone(), conn.source);
        if let Some(dest) = self.dests.get_mut(&destination) {
            dest.reached();
        }
        self.source_works(source);
        self.dirty.insert(destination);
    }

    pub(super) fn on_closing(&mut self, id: ConnId) {
        if let Some(conn) = self.conns.get_mut(&id) {
            conn.closing = true;
        }
    }

    pub(super) fn on_closed(&mut self, id: ConnId, end: &ConnEnd, now: Now, out: &mut Vec<Action>) {
        let Some(conn) = self.conns.remove(&id) else {
            return;
        };
        let key = conn.destination.clone();
        if let Some(dest) = self.dests.get_mut(&key)
            && let Some(target) = dest.targets.get_mut(conn.target)
        {
            target.conns.retain(|other| *other != id);
            match end {
                ConnEnd::Unreachable(trouble) => self.not_reached(&conn, trouble, now, out),
                ConnEnd::SourceDown => self.source_failed(conn.source, now.instant),
                ConnEnd::Broken => target.broke(now.instant),
                ConnEnd::Planned => {}
            }
        }
        self.dirty.insert(key);
        if let Some(next) = self.starved.pop_front() {
            self.dirty.insert(next);
        }
    }

    /// A connection could not be had. If there is no other, the destination is left alone for a
    /// while, and what waits for it has had an attempt.
    fn not_reached(&mut self, conn: &Conn, trouble: &Trouble, now: Now, out: &mut Vec<Action>) {
        if trouble.class == model::Class::TlsFailure && conn.route.asked().is_anything() {
            return self.not_secured(conn, trouble, now, out);
        }
        let key = &conn.destination;
        let Self { dests, conns, .. } = self;
        let Some(dest) = dests.get_mut(key) else {
            return;
        };
        let others = dest
            .targets
            .iter()
            .flat_map(|target| &target.conns)
            .any(|id| conns.get(id).is_some_and(Conn::is_ready));
        if others {
            if let Some(target) = dest.targets.get_mut(conn.target) {
                target.broke(now.instant);
            }
            return;
        }
        let until = dest.not_reached(now.instant);
        let names: Vec<_> = dest.lanes.iter().cloned().collect();
        for name in names {
            let Some(lane) = self.lanes.get_mut(&name) else {
                continue;
            };
            if !matches!(&lane.way, Way::Known { route, .. } if route.key() == conn.route.key()) {
                continue;
            }
            self.held.insert(name, until);
            for waiting in lane.drain() {
                self.end_waiting(&waiting, Finding::Unreachable(trouble.clone()), now, out);
            }
        }
    }

    /// A connection did not satisfy what its domain asks: that is the trouble of the domains that
    /// ask the same, and of nobody else who sends to these hosts.
    fn not_secured(&mut self, conn: &Conn, trouble: &Trouble, now: Now, out: &mut Vec<Action>) {
        let Some(dest) = self.dests.get(&conn.destination) else {
            return;
        };
        let retry = dest.policy.limits.retry.first().copied();
        let until = now.instant + retry.unwrap_or(PATIENCE);
        let names: Vec<_> = dest.lanes.iter().cloned().collect();
        for name in names {
            let Some(lane) = self.lanes.get_mut(&name) else {
                continue;
            };
            let is_like = |route: &Route| {
                route.key() == conn.route.key() && route.asked().is_like(conn.route.asked())
            };
            if !matches!(&lane.way, Way::Known { route, .. } if is_like(route)) {
                continue;
            }
            let waiting = lane.drain();
            // Looked up again for the next attempt: the policy may have been what was wrong.
            self.lanes.remove(&name);
            self.held.insert(name, until);
            for one in waiting {
                self.end_waiting(&one, Finding::Unreachable(trouble.clone()), now, out);
            }
        }
    }

    // ---- reports ------------------------------------------------------------------------

    pub(super) fn on_report(&mut self, job: JobId, fate: Fate, now: Now, out: &mut Vec<Action>) {
        let Some(Out { mut waiting, conn }) = self.jobs.remove(&job) else {
            return;
        };
        self.conn_reported(conn, &fate, now, out);
        let id = waiting.item.range;
        if let Some(range) = self.ranges.get_mut(&id) {
            range.out = range.out.saturating_sub(1);
        }
        match fate {
            Fate::Recorded { .. } => {}
            Fate::Unmade(text) => return self.end_out(&waiting, Finding::Unmade(text), now, out),
            Fate::Returned(why) => {
                if let Returned::Broken(text) = &why {
                    waiting.broken = waiting.broken.saturating_add(1);
                    if waiting.broken >= BROKEN_MAX {
                        let finding = Finding::Unreachable(broken(text));
                        return self.end_out(&waiting, finding, now, out);
                    }
                }
                if why == Returned::JournalFull {
                    self.paused_until = Some(now.instant + JOURNAL_PAUSE);
                }
                if why == Returned::ContentGone
                    && let Some(batch) = self.batches.get_mut(&waiting.item.batch.id)
                    && batch.content == Content::Ready
                {
                    batch.content = Content::Wanted(now.instant);
                }
                self.wait_again(waiting);
            }
        }
        self.tidy_range(id, now, out);
    }

    fn conn_reported(&mut self, id: ConnId, fate: &Fate, now: Now, out: &mut Vec<Action>) {
        let Some(conn) = self.conns.get_mut(&id) else {
            return;
        };
        conn.in_flight = conn.in_flight.saturating_sub(1);
        if !matches!(fate, Fate::Recorded { .. }) {
            // It was not begun, so the connection does not count it either.
            conn.sent = conn.sent.saturating_sub(1);
        }
        let (key, at) = (conn.destination.clone(), conn.target);
        if let Some(dest) = self.dests.get_mut(&key)
            && let Some(target) = dest.targets.get_mut(at)
        {
            target.out = target.out.saturating_sub(1);
            let spent = conn.sent >= target.in_force.messages_per_connection;
            // By its own count it ends itself; a limit that fell meanwhile it does not know.
            if spent && conn.is_ready() && !conn.closing && conn.in_flight == 0 {
                conn.closing = true;
                out.push(Action::Close(id));
            }
            if let Fate::Recorded { .. } = fate {
                target.worked();
            }
        }
        if let Fate::Recorded {
            heard: Some(heard), ..
        } = fate
        {
            self.hear(&key, at, heard, now, out);
        }
        self.dirty.insert(key);
    }

    /// Ends a message that came back from a connection.
    fn end_out(&mut self, waiting: &Waiting, finding: Finding, now: Now, out: &mut Vec<Action>) {
        if let Some(range) = self.ranges.get_mut(&waiting.item.range) {
            range.waiting += 1;
        }
        self.end_waiting(waiting, finding, now, out);
    }

    /// A message that came back unsent goes first again, unless its range is on its way back.
    fn wait_again(&mut self, waiting: Waiting) {
        let Some(range) = self.ranges.get_mut(&waiting.item.range) else {
            return;
        };
        if range.ending.is_some() {
            return;
        }
        range.waiting += 1;
        let name: Box<str> = waiting.item.row.email.domain().into();
        let lane = self.lane(&name);
        let was_empty = lane.is_empty();
        lane.put_back(waiting);
        let Way::Known { destination, .. } = &lane.way else {
            return;
        };
        let destination = destination.clone();
        if was_empty
            && let Some(dest) = self.dests.get_mut(&destination)
            && !dest.lanes.contains(&name)
        {
            dest.lanes.push_front(name);
        }
    }
}

/// Whether a message may be started as far as its range and content go.
fn may_start(
    ranges: &HashMap<RangeRef, Range>,
    batches: &HashMap<BatchId, BatchState>,
    item: &Item,
    now: Instant,
) -> bool {
    let in_window = ranges.get(&item.range).is_some_and(|range| {
        item.offset < range.window && range.ending.is_none() && range.lease.allows_start(now)
    });
    in_window
        && batches
            .get(&item.batch.id)
            .is_some_and(|batch| batch.content == Content::Ready)
}

fn broken(text: &str) -> Trouble {
    Trouble {
        class: model::Class::ConnectFailure,
        blame: model::Blame::Destination,
        text: text.to_owned(),
        reply: None,
        host: "".into(),
        is_final: false,
    }
}
