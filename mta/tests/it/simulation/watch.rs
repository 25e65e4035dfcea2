//! What is seen of the nodes from outside, and judged at once: the invariants.
//!
//! A broken one is kept, not thrown: it is met in tasks whose panics would be caught.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::fmt::Write as _;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use model::{BatchId, MessageId};
use store::{LeasedRange, RangeRef};
use tokio::time::Instant;

/// No transaction starts when less than this is left of its lease (DESIGN, Leases).
const LEASE_MARGIN: Duration = Duration::from_secs(5);
/// A pause, a cancel, a suspension takes hold within this (contract, section 3).
const TAKES_HOLD: Duration = Duration::from_secs(1);
/// Timers have milliseconds.
const TICK: Duration = Duration::from_millis(2);
/// Lines kept for whoever has to find out.
const LINES: usize = 200_000;

/// What must not be sent any more.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Stop {
    Batch(BatchId),
    Message(MessageId),
    Domain(String),
}

/// What a destination may be sent, as configured, without adaptation.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    pub(super) connections: usize,
    pub(super) messages: u32,
    /// In any second.
    pub(super) rate: usize,
}

/// A copy that a receiver has taken.
#[derive(Debug, Clone, Copy)]
pub(super) struct Copy {
    pub(super) at: Duration,
    pub(super) digest: u64,
}

#[derive(Debug)]
pub(super) struct Watch {
    start: Instant,
    lease: Duration,
    bounds: BTreeMap<String, Bounds>,
    seen: Mutex<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    broken: Vec<String>,
    log: VecDeque<String>,
    leases: HashMap<(usize, MessageId), Instant>,
    ranges: HashMap<RangeRef, Vec<MessageId>>,
    open: BTreeMap<(usize, String), usize>,
    mails_on: HashMap<u64, u32>,
    next: u64,
    recent: BTreeMap<(usize, String), VecDeque<Instant>>,
    stops: BTreeMap<Stop, (Instant, Option<Instant>)>,
    /// Until when what a node knows may be old.
    troubled: BTreeMap<usize, Instant>,
    thawed: BTreeMap<usize, Instant>,
    copies: BTreeMap<MessageId, Vec<Copy>>,
    refused: BTreeSet<MessageId>,
    mails: u64,
}

impl Watch {
    pub(super) fn new(lease: Duration, bounds: BTreeMap<String, Bounds>) -> Self {
        Self {
            start: Instant::now(),
            lease,
            bounds,
            seen: Mutex::default(),
        }
    }

    /// Since the world began.
    pub(super) fn age(&self) -> Duration {
        self.start.elapsed()
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // ---- what is noted ------------------------------------------------------------------

    pub(super) fn note(&self, line: String) {
        let at = self.age();
        self.seen().note(at, line);
    }

    pub(super) fn break_off(&self, why: String) {
        let at = self.age();
        let mut seen = self.seen();
        seen.note(at, format!("BROKEN {why}"));
        seen.broken
            .push(format!("at {:.3} s: {why}", at.as_secs_f64()));
    }

    /// A node did not run, or did not reach its store: what it must know may be old until a moment
    /// after.
    pub(super) fn troubled(&self, node: usize) {
        self.troubled_for(node, Duration::ZERO);
    }

    /// The same, for so long from now.
    pub(super) fn troubled_for(&self, node: usize, how_long: Duration) {
        let until = Instant::now() + how_long;
        let mut seen = self.seen();
        let known = seen.troubled.entry(node).or_insert(until);
        *known = until.max(*known);
    }

    /// A node that stood still goes on.
    pub(super) fn thawed(&self, node: usize) {
        self.troubled(node);
        self.seen().thawed.insert(node, Instant::now());
    }

    pub(super) fn leased(&self, node: usize, ranges: &[LeasedRange], asked_at: Instant) {
        for range in ranges {
            let message = |index| MessageId {
                batch: range.batch.id,
                index,
            };
            let messages: Vec<_> = range
                .items
                .iter()
                .map(|item| message(item.row.index))
                .collect();
            self.note(format!(
                "node {node} leases {:?} of {}: {:?}",
                range.range,
                range.queue,
                range
                    .items
                    .iter()
                    .map(|item| item.row.index)
                    .collect::<Vec<_>>()
            ));
            let mut seen = self.seen();
            for message in &messages {
                seen.leases.insert((node, *message), asked_at + self.lease);
            }
            seen.ranges.insert(range.range, messages);
        }
    }

    pub(super) fn renewed(&self, node: usize, ranges: &[RangeRef], asked_at: Instant) {
        let mut seen = self.seen();
        for range in ranges {
            for message in seen.ranges.get(range).cloned().unwrap_or_default() {
                if let Some(until) = seen.leases.get_mut(&(node, message)) {
                    *until = (*until).max(asked_at + self.lease);
                }
            }
        }
    }

    pub(super) fn stop(&self, what: Stop) {
        self.note(format!("stop {what:?}"));
        self.seen().stops.insert(what, (Instant::now(), None));
    }

    pub(super) fn go_on(&self, what: &Stop) {
        self.note(format!("go on {what:?}"));
        if let Some((_, until)) = self.seen().stops.get_mut(what) {
            *until = Some(Instant::now());
        }
    }

    /// Stopped at any time.
    pub(super) fn was_stopped(&self, what: &Stop) -> bool {
        self.seen().stops.contains_key(what)
    }

    pub(super) fn copy(&self, message: MessageId, content: &[u8]) {
        let mut hasher = DefaultHasher::new();
        content.hash(&mut hasher);
        let copy = Copy {
            at: self.age(),
            digest: hasher.finish(),
        };
        self.note(format!("taken {message}"));
        self.seen().copies.entry(message).or_default().push(copy);
    }

    pub(super) fn refused(&self, message: MessageId) {
        self.note(format!("refused {message}"));
        self.seen().refused.insert(message);
    }

    // ---- what is judged -----------------------------------------------------------------

    pub(super) fn opened(&self, node: usize, domain: &str) -> u64 {
        let mut seen = self.seen();
        seen.next += 1;
        let id = seen.next;
        let open = seen.open.entry((node, domain.to_owned())).or_default();
        *open += 1;
        let open = *open;
        drop(seen);
        self.note(format!("node {node} connects to {domain} ({id})"));
        if let Some(bounds) = self.bounds.get(domain)
            && open > bounds.connections
        {
            self.break_off(format!("node {node} has {open} connections to {domain}"));
        }
        id
    }

    pub(super) fn closed(&self, node: usize, domain: &str, id: u64) {
        self.note(format!("node {node} leaves {domain} ({id})"));
        let mut seen = self.seen();
        if let Some(open) = seen.open.get_mut(&(node, domain.to_owned())) {
            *open -= 1;
        }
    }

    /// A node begins a transaction; of the message, if it names one.
    pub(super) fn mail(&self, node: usize, domain: &str, id: u64, line: &str) -> Option<MessageId> {
        let now = Instant::now();
        let message = line
            .split_once("<bounce+")
            .and_then(|(_, rest)| rest.split_once('@'))
            .and_then(|(message, _)| message.parse::<MessageId>().ok());
        let Some(message) = message else {
            self.break_off(format!("a reverse-path that names no message: {line}"));
            return None;
        };
        self.note(format!("node {node} begins {message} at {domain} ({id})"));
        self.seen().mails += 1;
        // A node may have stood still between its look at the lease and the write: then no content
        // may follow.
        if self.seen().thawed.get(&node) != Some(&now) {
            self.judge_lease(node, message, "begins", now + LEASE_MARGIN);
        }
        self.judge_stops(node, message, domain, now);
        self.judge_bounds(node, domain, id, now);
        Some(message)
    }

    /// A node begins to send the content of a message.
    pub(super) fn content(&self, node: usize, message: MessageId) {
        self.judge_lease(node, message, "sends", Instant::now());
    }

    /// A node does something for a message that it must have until then.
    fn judge_lease(&self, node: usize, message: MessageId, does: &str, needs: Instant) {
        let until = self.seen().leases.get(&(node, message)).copied();
        if until.is_none_or(|until| needs > until + TICK) {
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            self.break_off(format!(
                "node {node} {does} {message} with {left:?} left of its lease"
            ));
        }
    }

    fn judge_stops(&self, node: usize, message: MessageId, domain: &str, now: Instant) {
        let stops = [
            Stop::Batch(message.batch),
            Stop::Message(message),
            Stop::Domain(domain.to_owned()),
        ];
        for stop in stops {
            let seen = self.seen();
            let Some((from, None)) = seen.stops.get(&stop).copied() else {
                continue;
            };
            let excused = seen.troubled.get(&node).copied().unwrap_or(from).max(from);
            drop(seen);
            if now > excused + TAKES_HOLD {
                self.break_off(format!(
                    "node {node} begins {message}, stopped for {:?}: {stop:?}",
                    now - from
                ));
            }
        }
    }

    fn judge_bounds(&self, node: usize, domain: &str, id: u64, now: Instant) {
        let Some(bounds) = self.bounds.get(domain) else {
            return;
        };
        let mut seen = self.seen();
        let mails = seen.mails_on.entry(id).or_default();
        *mails += 1;
        let mails = *mails;
        let recent = seen.recent.entry((node, domain.to_owned())).or_default();
        recent.push_back(now);
        while recent
            .front()
            .is_some_and(|first| *first + Duration::from_secs(1) <= now + TICK)
        {
            recent.pop_front();
        }
        let in_a_second = recent.len();
        drop(seen);
        if mails > bounds.messages {
            self.break_off(format!("{mails} messages on a connection to {domain}"));
        }
        if in_a_second > bounds.rate {
            self.break_off(format!(
                "node {node} begins {in_a_second} messages in a second at {domain}"
            ));
        }
    }

    // ---- what is asked ------------------------------------------------------------------

    pub(super) fn broken(&self) -> Vec<String> {
        self.seen().broken.clone()
    }

    pub(super) fn copies_of(&self, message: MessageId) -> Vec<Copy> {
        self.seen()
            .copies
            .get(&message)
            .cloned()
            .unwrap_or_default()
    }

    pub(super) fn was_refused(&self, message: MessageId) -> bool {
        self.seen().refused.contains(&message)
    }

    pub(super) fn mails(&self) -> u64 {
        self.seen().mails
    }

    /// Everything that happened.
    pub(super) fn story(&self) -> Vec<String> {
        self.seen().log.iter().cloned().collect()
    }

    /// The last lines, those about what is `named` if any is.
    pub(super) fn lines(&self, named: Option<&str>, most: usize) -> String {
        let seen = self.seen();
        let about = |line: &&String| named.is_none_or(|name| line.contains(name));
        let lines: Vec<_> = seen.log.iter().rev().filter(about).take(most).collect();
        lines.iter().rev().fold(String::new(), |mut text, line| {
            let _infallible = writeln!(text, "  {line}");
            text
        })
    }
}

impl Seen {
    fn note(&mut self, at: Duration, line: String) {
        if self.log.len() >= LINES {
            self.log.pop_front();
        }
        self.log
            .push_back(format!("{:9.3} {line}", at.as_secs_f64()));
    }
}
