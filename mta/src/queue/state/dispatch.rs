//! Handing messages to connections, opening those, and taking back what they report.

use super::*;
use service::config::TlsPolicy;

use super::leasing::SHARE_MIN;
use crate::queue::control::Permission;
use crate::queue::decide::expires_at;
use crate::queue::fair::{Turn, Turns};
use crate::queue::job::Item;
use crate::queue::target::{LEAD, Target};

/// Domains of a destination that are looked at for one message.
const SCAN_MAX: usize = 64;

/// A connection that can take a message.
struct Seat {
    conn: ConnId,
    /// Index of its source.
    source: usize,
    /// Only a transactional one: the rate is used up, or it has enough of the others.
    urgent_only: bool,
    busy: usize,
    /// What its source has carried.
    charge: u64,
}

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

    /// Hands out the message whose turn it is, of those that can go; false when none can.
    fn hand_out(&mut self, key: &Destination, now: Now, out: &mut Vec<Action>) -> bool {
        let seats = self.seats(key, now.instant);
        let Some(dest) = self.dests.get_mut(key).filter(|_| !seats.is_empty()) else {
            return false;
        };
        // So it ends most of the time: they have enough, and nothing may go before that.
        if seats.iter().all(|seat| seat.urgent_only) && !dest.turns.has_urgent() {
            return false;
        }
        // Out of its place meanwhile, so that everything else may change.
        let mut turns = std::mem::take(&mut dest.turns);
        let sent = self.serve_next(key, &seats, &mut turns, now, out);
        if let Some(dest) = self.dests.get_mut(key) {
            dest.turns = turns;
        }
        sent
    }

    fn serve_next(
        &mut self,
        key: &Destination,
        seats: &[Seat],
        turns: &mut Turns,
        now: Now,
        out: &mut Vec<Action>,
    ) -> bool {
        let Some(first) = turns.next() else {
            return false;
        };
        if self.serve(key, &first, seats, turns, now, out) {
            return true;
        }
        let others = turns.order();
        others
            .iter()
            .filter(|turn| **turn != first)
            .any(|turn| self.serve(key, turn, seats, turns, now, out))
    }

    /// Hands out a message of a batch, if one can go.
    fn serve(
        &mut self,
        key: &Destination,
        turn: &Turn,
        seats: &[Seat],
        turns: &mut Turns,
        now: Now,
        out: &mut Vec<Action>,
    ) -> bool {
        let Some(pool) = self.batches.get(&turn.batch).map(|of| Arc::clone(&of.pool)) else {
            return false;
        };
        match self.paces.get(&turn.batch).map(Pace::next) {
            // Looked at again when this node has a share of its rate.
            Some(None) => return false,
            Some(Some(at)) if at > now.instant => {
                self.wakes.insert((at, key.clone()));
                return false;
            }
            Some(Some(_)) | None => {}
        }
        let is_urgent = turn.priority == Priority::Transactional;
        let Some(dest) = self.dests.get(key) else {
            return false;
        };
        let charge_max = self.charge_max(dest, &pool, now.instant);
        let fits = |seat: &&Seat| {
            pool.weight(seat.source).is_some()
                && (is_urgent || !seat.urgent_only && seat.charge <= charge_max)
        };
        let seats: Vec<_> = seats.iter().filter(fits).collect();
        if seats.is_empty() {
            return false;
        }
        for _ in 0..turns.domains_of(turn).count().min(SCAN_MAX) {
            let Some(name) = turns.next_domain(turn) else {
                break;
            };
            let taken = self.take_of_lane(&name, turn.batch, key, &seats, now, out);
            match &taken {
                Some(_) => turns.served(turn),
                None => turns.passed(turn),
            }
            if !self.keep_lane(&name, turn.batch, key, now.instant) {
                turns.remove(turn, &name);
            }
            if let Some((waiting, conn)) = taken {
                self.send(conn, key, waiting, now, out);
                return true;
            }
        }
        false
    }

    /// How much a source may have carried to go on: those of a pool do not run away from the one
    /// that is furthest behind and could carry more.
    fn charge_max(&self, dest: &Dest, pool: &Pool, now: Instant) -> u64 {
        if pool.len() == 1 {
            return u64::MAX;
        }
        let answers = |target: &Target| {
            let mut conns = target.conns.iter().filter_map(|id| self.conns.get(id));
            target.conns.is_empty() || conns.any(|conn| !conn.is_slow(now))
        };
        let able = dest.targets.iter().filter(|target| {
            pool.weight(target.source).is_some()
                && self.source_is_up(target.source, now)
                && target.is_due(&dest.policy.limits, now)
                && target.may_open(now)
                && answers(target)
        });
        let least = able.map(|target| target.charge).min();
        least.map_or(u64::MAX, |least| least + LEAD)
    }

    /// Has a domain looked up again when where its mail goes is no longer known; false: the batch
    /// does not wait there now.
    fn keep_lane(&mut self, name: &str, batch: BatchId, key: &Destination, now: Instant) -> bool {
        let Some(lane) = self.lanes.get_mut(name) else {
            return false;
        };
        if lane.is_empty() {
            return false;
        }
        match &lane.way {
            Way::Known { until, .. } if *until <= now => {
                // What DNS said has run out; ask again before more is sent by it.
                lane.way = Way::Asked;
                self.to_resolve.push_back(lane.domain.clone());
                false
            }
            Way::Known { destination, .. } => destination == key && lane.has_batch(batch),
            Way::Unknown | Way::Asked => false,
        }
    }

    /// Connections that may carry something now: by their source's share, least busy first.
    fn seats(&self, key: &Destination, now: Instant) -> Vec<Seat> {
        let Some(dest) = self.dests.get(key) else {
            return Vec::new();
        };
        let mut seats = Vec::new();
        for target in dest
            .by_share()
            .into_iter()
            .filter_map(|at| dest.targets.get(at))
        {
            let is_due = target.is_due(&dest.policy.limits, now);
            if !is_due && !target.takes_urgent(&dest.policy.limits, now) {
                continue;
            }
            let max = target.in_force.messages_per_connection;
            let first = seats.len();
            for id in &target.conns {
                let Some(conn) = self.conns.get(id).filter(|conn| conn.has_urgent_room(max)) else {
                    continue;
                };
                seats.push(Seat {
                    conn: *id,
                    source: conn.source,
                    urgent_only: !is_due || !conn.has_room(max),
                    busy: conn.in_flight,
                    charge: target.charge,
                });
            }
            if let Some(of_target) = seats.get_mut(first..) {
                of_target.sort_unstable_by_key(|seat| (seat.busy, seat.conn));
            }
        }
        seats
    }

    /// Takes the next message of a batch at a domain, and the connection that goes to its hosts.
    /// Whatever turns out not to be sendable on the way is ended or handed back.
    fn take_of_lane(
        &mut self,
        name: &str,
        batch: BatchId,
        key: &Destination,
        seats: &[&Seat],
        now: Now,
        out: &mut Vec<Action>,
    ) -> Option<(Waiting, ConnId)> {
        loop {
            let Self {
                lanes,
                ranges,
                batches,
                dests,
                conns,
                ..
            } = self;
            let lane = lanes.get_mut(name)?;
            let Way::Known {
                destination, route, ..
            } = &lane.way
            else {
                return None;
            };
            let policy = &dests.get(key)?.policy;
            let leads_there = |seat: &&&Seat| {
                let conn = conns.get(&seat.conn);
                conn.is_some_and(|conn| conn.takes(route, policy.limits.tls))
            };
            let conn = seats
                .iter()
                .find(leads_there)
                .filter(|_| destination == key)?
                .conn;
            let waiting = lane.take(batch, |item| may_start(ranges, batches, item, now.instant))?;
            let leased_at = ranges
                .get(&waiting.item.range)
                .map_or(now.instant, |range| range.leased_at);
            match self.view.permission(&waiting.item, leased_at) {
                Permission::Go if now.wall >= expires_at(&waiting.item, policy) => {
                    self.end_waiting(&waiting, Finding::TooLate(None), now, out);
                }
                // The store keeps it until the window opens again.
                Permission::Go if waiting.item.is_shut(now.wall) => {
                    let range = waiting.item.range;
                    self.lane(name).put_back(waiting);
                    self.return_range(range, None, now, out);
                }
                Permission::Go => return Some((waiting, conn)),
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
        self.unused.remove(&id);
        range.waiting = range.waiting.saturating_sub(1);
        range.out += 1;
        let batch = waiting.item.batch.id;
        let pool = self.batches.get(&batch).map(|batch| &batch.pool);
        let weight_of = |source| pool.and_then(|pool| pool.weight(source));
        let of_pool = dest
            .targets
            .iter()
            .filter(|of| weight_of(of.source).is_some());
        let most = of_pool.map(|target| target.charge).max().unwrap_or(0);
        if let Some(target) = dest.targets.get_mut(conn.target) {
            let weight = weight_of(conn.source).unwrap_or(1);
            target.handed_out(weight, most, now.instant);
        }
        self.thirst.handed_out(&mut dest.appetite, range.mixed);
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
        let Some(dest) = self
            .dests
            .get(key)
            .filter(|dest| !dest.is_held(now.instant))
        else {
            return;
        };
        if self.is_crowded(dest) && self.is_carried(dest, now.instant) {
            return;
        }
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
                && opening <= ready.saturating_sub(1);
            if !allowed {
                continue;
            }
            // Nothing could be changed for whoever is in need, so nobody looks for that: with all
            // connections at work this is each time something was delivered.
            let is_full = target.conns.len() >= limit;
            if match is_full {
                true => !dest.turns.has_urgent() && !self.has_unused(target),
                false => dest.is_starved && !self.has_connection_free() && self.unused.is_empty(),
            } {
                continue;
            }
            let Some((route, is_urgent)) = self.route_in_need(dest, target.source, now.instant)
            else {
                continue;
            };
            if is_full {
                let floor = dest.policy.limits.tls;
                if let Some(id) = self.dispensable(target, &route, (floor, is_urgent)) {
                    self.close(id, out);
                    return;
                }
                continue;
            }
            if !self.has_connection_free() {
                return self.starve(key, out);
            }
            return self.open(key.clone(), at, route, now, out);
        }
    }

    /// Whether a destination's connections are to be used to their end before it opens others:
    /// somebody waits for one of the process, or will when more is leased, and it has its first.
    fn is_crowded(&self, dest: &Dest) -> bool {
        let will_be = self.more && self.conns.len() >= CONNECTIONS_MAX / 2;
        !self.starved.is_empty() || will_be && dest.open() == 1
    }

    /// Whether the connections that a destination has will carry all that waits for it, one message
    /// after the other, and soon: where one carries thousands, they are not waited for.
    fn is_carried(&self, dest: &Dest, now: Instant) -> bool {
        let limits = &dest.policy.limits;
        let conns = || {
            let due = dest.targets.iter().filter(|of| of.is_due(limits, now));
            due.flat_map(|target| {
                let conns = target.conns.iter().filter_map(|id| self.conns.get(id));
                let open = conns.filter(|conn| !conn.closing);
                open.map(|conn| (conn, target.in_force.messages_per_connection))
            })
        };
        let left = |(conn, most): (&Conn, u32)| most.saturating_sub(conn.sent).min(SHARE_MIN);
        let room = conns().map(|of| u64::from(left(of))).sum();
        let waiting = dest.turns.each().try_fold(0, |before, (batch, name)| {
            let (lane, pool) = (self.lanes.get(name)?, &self.batches.get(&batch)?.pool);
            let Way::Known { route, .. } = &lane.way else {
                return Some(before);
            };
            let is_led = |(conn, _): (&Conn, u32)| {
                pool.weight(conn.source).is_some() && conn.serves(route, limits.tls)
            };
            let sum = before + lane.waiting_of(batch);
            (sum <= room && conns().any(is_led)).then_some(sum)
        });
        waiting.is_some() && !dest.turns.has_urgent()
    }

    fn open(
        &mut self,
        key: Destination,
        at: usize,
        route: Arc<Route>,
        now: Now,
        out: &mut Vec<Action>,
    ) {
        let id = ConnId(self.id());
        let Some(dest) = self.dests.get_mut(&key) else {
            return;
        };
        let policy = Arc::clone(&dest.policy);
        let Some(target) = dest.targets.get_mut(at) else {
            return;
        };
        target.opened(id, now.instant);
        let source = target.source;
        let permits = Arc::clone(&target.permits);
        let conn = Conn {
            destination: key.clone(),
            target: at,
            source,
            route: Arc::clone(&route),
            security: None,
            closing: false,
            in_flight: 0,
            sent: 0,
            heard_at: now.instant,
        };
        self.conns.insert(id, conn);
        out.extend(self.limited(&key, Vec::new()).map(Action::Limits));
        out.push(Action::Open {
            conn: id,
            route,
            policy,
            source,
            permits,
        });
    }

    fn close(&mut self, id: ConnId, out: &mut Vec<Action>) {
        if let Some(conn) = self.conns.get_mut(&id) {
            conn.closing = true;
            out.push(Action::Close(id));
        }
    }

    /// How many more connections the process may have. Those of whose peers nothing was heard for
    /// a while have room of their own: however many tarpits there are, others are served.
    fn connections_free(&self) -> usize {
        let all = self.conns.len();
        let quick = all.saturating_sub(self.slow);
        let of_quick = CONNECTIONS_MAX.saturating_sub(quick);
        of_quick.min(CONNECTIONS_ALL_MAX.saturating_sub(all))
    }

    fn has_connection_free(&self) -> bool {
        self.connections_free() > 0
    }

    /// Counts the connections whose peers are slow.
    pub(super) fn tick_conns(&mut self, now: Instant) {
        self.slow = self.conns.values().filter(|conn| conn.is_slow(now)).count();
        self.wake_starved(self.connections_free());
    }

    fn has_unused(&self, target: &Target) -> bool {
        let mut conns = target.conns.iter().filter_map(|id| self.conns.get(id));
        conns.any(Conn::is_unused)
    }

    /// A destination waits for a connection of the process; one without work makes room.
    fn starve(&mut self, key: &Destination, out: &mut Vec<Action>) {
        if let Some(dest) = self.dests.get_mut(key)
            && !std::mem::replace(&mut dest.is_starved, true)
        {
            self.starved.push_back(key.clone());
        }
        self.close_any_idle(out);
    }

    /// A connection of a source that makes way for one that can carry what none of them can: one
    /// without work, for what is transactional any.
    fn dispensable(
        &self,
        target: &Target,
        route: &Route,
        (floor, is_urgent): (TlsPolicy, bool),
    ) -> Option<ConnId> {
        let conns = || {
            let of_target = target.conns.iter();
            of_target.filter_map(|id| Some((*id, self.conns.get(id)?)))
        };
        if conns().any(|(_, conn)| conn.closing || conn.serves(route, floor)) {
            return None;
        }
        conns()
            .filter(|(_, conn)| conn.is_ready() && (is_urgent || conn.in_flight == 0))
            .min_by_key(|(id, conn)| (conn.in_flight, *id))
            .map(|(id, _)| id)
    }

    /// The route of a message that could start now if there were a connection from this source,
    /// and whether it is transactional.
    fn route_in_need(
        &self,
        dest: &Dest,
        source: usize,
        now: Instant,
    ) -> Option<(Arc<Route>, bool)> {
        let served = |route: &Arc<Route>, pool: &Pool| {
            let charge_max = self.charge_max(dest, pool, now);
            // A source that may not send now serves nobody.
            let limits = &dest.policy.limits;
            let fit = dest
                .targets
                .iter()
                .filter(|target| target.charge <= charge_max && target.is_due(limits, now));
            let mut conns = fit.flat_map(|target| {
                let max = target.in_force.messages_per_connection;
                let of_target = target.conns.iter();
                of_target.filter_map(move |id| Some((self.conns.get(id)?, max)))
            });
            conns.any(|(conn, max)| {
                conn.has_room(max)
                    && conn.takes(route, dest.policy.limits.tls)
                    && pool.weight(conn.source).is_some()
            })
        };
        let mut looks = SCAN_MAX;
        for turn in dest.turns.order() {
            let Some(batch) = self.batches.get(&turn.batch) else {
                continue;
            };
            if batch.pool.weight(source).is_none() || batch.content != Content::Ready {
                continue;
            }
            for name in dest.turns.domains_of(&turn) {
                looks = looks.checked_sub(1)?;
                let Some(lane) = self.lanes.get(name) else {
                    continue;
                };
                if let Way::Known {
                    route, destination, ..
                } = &lane.way
                    && *destination == dest.policy.destination
                    && !served(route, &batch.pool)
                    && lane.has(turn.batch, |item| {
                        may_start(&self.ranges, &self.batches, item, now)
                    })
                {
                    let is_urgent = turn.priority == Priority::Transactional;
                    return Some((Arc::clone(route), is_urgent));
                }
            }
        }
        None
    }

    /// When others wait for a connection of the process, one without work makes room.
    fn close_idle(&mut self, key: &Destination, out: &mut Vec<Action>) {
        if self.starved.is_empty() {
            return;
        }
        let Some(dest) = self.dests.get(key).filter(|dest| dest.turns.is_empty()) else {
            return;
        };
        for id in dest.targets.iter().flat_map(|target| &target.conns) {
            if let Some(conn) = self.conns.get_mut(id).filter(|conn| conn.is_unused()) {
                conn.closing = true;
                out.push(Action::Close(*id));
            }
        }
    }

    fn close_any_idle(&mut self, out: &mut Vec<Action>) {
        let Self {
            conns,
            dests,
            unused,
            ..
        } = self;
        let is_idle = |conn: &Conn| {
            let dest = dests.get(&conn.destination);
            conn.is_unused() && dest.is_none_or(|dest| dest.turns.is_empty())
        };
        let idle = unused.iter().find(|id| conns.get(id).is_some_and(is_idle));
        if let Some(id) = idle.copied() {
            self.close(id, out);
        }
    }

    pub(super) fn on_ready(
        &mut self,
        id: ConnId,
        security: Arc<Security>,
        now: Instant,
        out: &mut Vec<Action>,
    ) {
        let Some(conn) = self.conns.get_mut(&id) else {
            return;
        };
        conn.security = Some(security);
        conn.heard_at = now;
        self.unused.insert(id);
        let (key, source) = (conn.destination.clone(), conn.source);
        self.lift_hold(&key, now, out);
        self.source_works(source);
        self.dirty.insert(key);
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
        self.unused.remove(&id);
        let key = conn.destination.clone();
        let dest = self.dests.get_mut(&key);
        let has_others = dest.as_ref().is_some_and(|dest| dest.targets.len() > 1);
        if let Some(target) = dest.and_then(|dest| dest.targets.get_mut(conn.target)) {
            target.conns.retain(|other| *other != id);
            match end {
                ConnEnd::Unreachable(trouble) => self.not_reached(&conn, trouble, now, out),
                // Others carry on; a source that is alone has to tell the messages.
                ConnEnd::NoWay(_) if has_others => target.broke(now.instant),
                ConnEnd::NoWay(trouble) => self.not_reached(&conn, trouble, now, out),
                ConnEnd::SourceDown => self.source_failed(conn.source, now.instant),
                ConnEnd::Broken => target.broke(now.instant),
                ConnEnd::Planned => {}
            }
        }
        self.dirty.insert(key);
        self.wake_starved(1);
    }

    /// So many of those that wait for a connection of the process have their turn.
    fn wake_starved(&mut self, most: usize) {
        for key in self.starved.drain(..most.min(self.starved.len())) {
            if let Some(dest) = self.dests.get_mut(&key) {
                dest.is_starved = false;
            }
            self.dirty.insert(key);
        }
    }

    /// A connection could not be had. If there is no other, the destination is left alone for a
    /// while.
    fn not_reached(&mut self, conn: &Conn, trouble: &Trouble, now: Now, out: &mut Vec<Action>) {
        if trouble.class == model::Class::TlsFailure && conn.route.asked().is_anything() {
            return self.hold_like(conn, trouble, now, out);
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
        if !others {
            return self.hold_destination(key, trouble, now, out);
        }
        if let Some(target) = dest.targets.get_mut(conn.target) {
            target.broke(now.instant);
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
            Fate::Recorded { .. } => {
                let range = self.ranges.get_mut(&id);
                if range.is_some_and(Range::reported) {
                    out.push(Action::Hurry);
                }
            }
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
        conn.heard_at = now.instant;
        conn.in_flight = conn.in_flight.saturating_sub(1);
        if conn.in_flight == 0 {
            self.unused.insert(id);
        }
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
            if spent && conn.is_unused() {
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
        self.lane(&name).put_back(waiting);
        self.take_turns(&name);
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
