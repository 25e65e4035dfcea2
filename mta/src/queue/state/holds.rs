//! Leaving alone what cannot be reached: one record for a destination or domain, and not a word
//! about its messages.
//!
//! What was leased goes back as it came, but for the one message that was really tried. While the
//! hold lasts nothing is leased for it, except whose time is over, and one recipient of each batch
//! that has newly come, from which is learnt when its time will be over.

use super::*;
use crate::queue::decide::expires_at;
use crate::queue::target::{BACKOFF_MAX, back_off};
use model::{Blame, Class};

/// Domains that are remembered as left alone.
const HELD_MAX: usize = 100_000;
/// Recipients of a batch whose time is over that are leased at a time, to be ended.
const EXPIRED_ROWS: u32 = 1_000;
/// Batches whose time is remembered per domain; others are looked at when the hold is over.
const BATCHES_MAX: usize = 1_000;

/// A destination that is left alone, as it is kept over a restart.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct KeptHold {
    /// Until then.
    pub until: Timestamp,
    /// Times in a row that it could not be reached.
    pub failures: u32,
    /// What it was that failed.
    pub class: Class,
    /// Whose trouble it is.
    pub blame: Blame,
    /// What happened, for people.
    pub text: String,
    /// The host and address last tried; empty when there was none.
    pub host: Box<str>,
}

impl KeptHold {
    /// As the value of a note.
    pub fn to_note(&self) -> Vec<u8> {
        // Words, numbers and a moment: there is no way to fail.
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// Reads a note.
    pub fn from_note(value: &[u8]) -> Option<Self> {
        serde_json::from_slice(value).ok()
    }

    /// When it is of no use to anybody any more.
    pub fn stale_at(&self) -> Timestamp {
        self.until + BACKOFF_MAX
    }

    fn trouble(&self) -> Trouble {
        Trouble {
            class: self.class,
            blame: self.blame,
            text: self.text.clone(),
            reply: None,
            host: self.host.clone(),
            is_final: false,
        }
    }
}

/// Why and how long nothing is sent to a domain.
#[derive(Debug)]
pub(super) struct Hold {
    until: Instant,
    /// Times in a row that it could not be looked up.
    failures: u32,
    trouble: Trouble,
    /// The destination that could not be reached; none: the domain could not be looked up.
    destination: Option<Destination>,
    /// Batches that wait for it, and when their time is over.
    batches: HashMap<BatchId, Timestamp>,
}

impl QueueState {
    /// Whether nothing is to be sent to a domain now, as far as is known.
    pub(super) fn is_left_alone(&self, name: &str, now: Instant) -> bool {
        self.hold_on(name, now).is_some()
    }

    /// Until when a domain, or its destination, is left alone.
    fn hold_on(&self, name: &str, now: Instant) -> Option<Instant> {
        let of_destination = match self.lanes.get(name).map(|lane| &lane.way) {
            Some(Way::Known { destination, .. }) => self.dests.get(destination),
            Some(Way::Unknown | Way::Asked) | None => None,
        };
        let until = of_destination.and_then(|dest| dest.hold_until);
        let of_domain = self.held.get(name).map(|hold| hold.until);
        until.max(of_domain).filter(|until| *until > now)
    }

    /// Hands back what waits for a domain that is left alone.
    pub(super) fn respect_hold(&mut self, name: &str, now: Now, out: &mut Vec<Action>) {
        let Some(until) = self.hold_on(name, now.instant) else {
            return;
        };
        let destination = match self.lanes.get(name).map(|lane| &lane.way) {
            Some(Way::Known { destination, .. }) => Some(destination.clone()),
            Some(Way::Unknown | Way::Asked) | None => None,
        };
        let before = self
            .held
            .get(name)
            .and_then(|hold| hold.destination.clone());
        let destination = destination.or(before);
        let known = destination.as_ref().and_then(|key| self.dests.get(key));
        let trouble = known
            .and_then(|dest| dest.trouble.clone())
            .or_else(|| self.held.get(name).map(|hold| hold.trouble.clone()));
        if let Some(trouble) = trouble {
            self.leave_alone(name, until, destination, &trouble);
            self.hand_back(name, now, out);
        }
    }

    /// DNS does not answer about a domain: what was looked up for has had an attempt, the others
    /// of the domain wait for its next.
    pub(super) fn not_found(
        &mut self,
        domain: &Domain,
        trouble: &Trouble,
        now: Now,
        out: &mut Vec<Action>,
    ) {
        let name = domain.as_str();
        let own = self.config.shaping.domains.get(domain);
        let retry = &own.unwrap_or(&self.config.shaping.default).retry;
        let failures = self.held.get(name).map_or(0, |hold| hold.failures);
        let until = now.instant + back_off(retry, failures, self.random.f64());
        self.leave_alone(name, until, None, trouble);
        if let Some(hold) = self.held.get_mut(name) {
            hold.failures = failures.saturating_add(1);
        }
        self.end_one_tried(name, trouble, now, out);
        self.hand_back(name, now, out);
    }

    /// A destination could not be reached from one of its routes, and no connection is left.
    pub(super) fn hold_destination(
        &mut self,
        key: &Destination,
        trouble: &Trouble,
        now: Now,
        out: &mut Vec<Action>,
    ) {
        let chance = self.random.f64();
        let Some(dest) = self.dests.get_mut(key) else {
            return;
        };
        let until = dest.not_reached(chance, now.instant);
        dest.trouble = Some(trouble.clone());
        let kept = KeptHold {
            until: now.wall + until.saturating_duration_since(now.instant),
            failures: dest.failures(),
            class: trouble.class,
            blame: trouble.blame,
            text: trouble.text.clone(),
            host: trouble.host.clone(),
        };
        out.push(Action::KeepHold(key.clone(), Some(kept)));
        let names = dest.turns.names();
        tracing::info!(destination = %key, trouble = %trouble.text, "the destination is left alone");
        let mut names = names.into_iter();
        if let Some(first) = names.next() {
            self.end_one_tried(&first, trouble, now, out);
            for name in std::iter::once(first).chain(names) {
                self.leave_alone(&name, until, Some(key.clone()), trouble);
                self.hand_back(&name, now, out);
            }
        }
    }

    /// A connection did not satisfy what its domain asks: that is the trouble of the domains that
    /// ask the same, and of nobody else who sends to these hosts.
    pub(super) fn hold_like(
        &mut self,
        conn: &Conn,
        trouble: &Trouble,
        now: Now,
        out: &mut Vec<Action>,
    ) {
        let Some(dest) = self.dests.get(&conn.destination) else {
            return;
        };
        let wait = back_off(&dest.policy.limits.retry, 0, self.random.f64());
        let is_like = |route: &Route| {
            route.key() == conn.route.key() && route.asked().is_like(conn.route.asked())
        };
        let mut names = dest.turns.names();
        names.retain(|name| {
            let way = self.lanes.get(name).map(|lane| &lane.way);
            matches!(way, Some(Way::Known { route, .. }) if is_like(route))
        });
        if let Some(first) = names.first() {
            self.end_one_tried(first, trouble, now, out);
        }
        for name in names {
            // Looked up again for the next attempt: the policy may have been what was wrong.
            self.leave_alone(&name, now.instant + wait, None, trouble);
            self.hand_back(&name, now, out);
        }
    }

    /// It was reached: nothing is held any more on its account.
    pub(super) fn lift_hold(&mut self, key: &Destination, now: Instant, out: &mut Vec<Action>) {
        let Some(dest) = self.dests.get_mut(key) else {
            return;
        };
        let was_failing = dest.is_failing();
        dest.reached();
        if was_failing {
            out.push(Action::KeepHold(key.clone(), None));
            self.held
                .retain(|_, hold| hold.destination.as_ref() != Some(key));
            self.look_at = now;
        }
    }

    /// It could be looked up again.
    pub(super) fn lift_domain(&mut self, name: &str) {
        if self
            .held
            .get(name)
            .is_some_and(|hold| hold.destination.is_none())
        {
            self.held.remove(name);
        }
    }

    /// What a former run, or another node, left alone.
    pub(super) fn on_remembered_holds(&mut self, all: Vec<(Destination, KeptHold)>) {
        self.remembered_holds.extend(all.into_iter().take(HELD_MAX));
    }

    /// Goes on leaving a destination alone that was left alone when it was last heard of.
    pub(super) fn recall_hold(&mut self, key: &Destination, now: Now) {
        let Some(kept) = self.remembered_holds.remove(key) else {
            return;
        };
        if let Some(dest) = self.dests.get_mut(key) {
            // No longer than any hold: clocks may have been wrong.
            let left = kept.until.since(now.wall).min(BACKOFF_MAX);
            dest.recall_hold(kept.failures, kept.trouble(), now.instant + left);
        }
    }

    pub(super) fn tick_holds(&mut self, now: Instant) {
        // How often it failed outlives the hold, or back-off would never grow.
        self.held.retain(|_, hold| hold.until + BACKOFF_MAX > now);
    }

    /// What to lease for a domain that is left alone.
    pub(super) fn want_while_held(&self, queue: &Backlog, now: Now) -> Option<Want> {
        let seen = self.held.get(&*queue.queue).map(|hold| &hold.batches);
        // What is transactional is not listed by batch: whatever has been seen may be of it.
        let others = seen.filter(|_| queue.transactional).into_iter().flatten();
        let others = others.map(|(batch, _)| batch);
        let unlisted = others.filter(|batch| !queue.batches.contains(batch));
        let (mut of, mut rows) = (Vec::new(), u32::from(queue.transactional));
        for batch in queue.batches.iter().chain(unlisted) {
            match seen.and_then(|seen| seen.get(batch)) {
                Some(over) if *over <= now.wall => {
                    of.push((*batch, EXPIRED_ROWS));
                    rows = rows.saturating_add(EXPIRED_ROWS);
                }
                Some(_) => of.push((*batch, 0)),
                None => rows = rows.saturating_add(1),
            }
        }
        (rows > 0).then(|| Want {
            per_batch: 1,
            of,
            ..Want::of(&queue.queue, rows)
        })
    }

    fn leave_alone(
        &mut self,
        name: &str,
        until: Instant,
        destination: Option<Destination>,
        trouble: &Trouble,
    ) {
        if self.held.len() >= HELD_MAX && !self.held.contains_key(name) {
            // Leased once more and handed back, that is all.
            return;
        }
        let hold = self.held.entry(name.into()).or_insert_with(|| Hold {
            until,
            failures: 0,
            trouble: trouble.clone(),
            destination: None,
            batches: HashMap::new(),
        });
        hold.until = until;
        hold.trouble = trouble.clone();
        hold.destination = destination;
    }

    /// The message that was really tried has had an attempt.
    fn end_one_tried(&mut self, name: &str, trouble: &Trouble, now: Now, out: &mut Vec<Action>) {
        let tried = self.lanes.get_mut(name).and_then(Lane::take_first);
        if let Some(tried) = tried {
            self.end_waiting(&tried, Finding::Unreachable(trouble.clone()), now, out);
        }
    }

    /// Hands back what waits for a domain: from its own lots whole ranges, out of mixed lots its
    /// recipients, to the queue of their domain. Whose time is over ends.
    fn hand_back(&mut self, name: &str, now: Now, out: &mut Vec<Action>) {
        let Some(lane) = self.lanes.get_mut(name) else {
            return;
        };
        let waiting = lane.drain();
        let policy = waiting.first().map(|first| self.policy_of(first));
        // Also when it is empty: its lookup has ended, and the next is for whoever comes next.
        self.lanes.remove(name);
        let Some(policy) = policy else { return };
        let trouble = self.held.get(name).map(|hold| hold.trouble.clone());
        let mut touched = Vec::new();
        for one in waiting {
            let (item, id) = (&one.item, one.item.range);
            let over = expires_at(item, &policy);
            if now.wall >= over {
                self.end_waiting(&one, Finding::TooLate(trouble.clone()), now, out);
                continue;
            }
            if let Some(hold) = self.held.get_mut(name)
                && (hold.batches.len() < BATCHES_MAX || hold.batches.contains_key(&item.batch.id))
            {
                hold.batches.insert(item.batch.id, over);
            }
            let Some(range) = self.ranges.get_mut(&id) else {
                continue;
            };
            if range.mixed {
                range.waiting = range.waiting.saturating_sub(1);
                range.requeue.push((item.place, name.into()));
            }
            if touched.last() != Some(&id) {
                touched.push(id);
            }
        }
        for id in touched {
            if self.ranges.get(&id).is_some_and(|range| !range.mixed) {
                self.return_range(id, None, now, out);
            } else {
                self.tidy_range(id, now, out);
            }
        }
    }
}
