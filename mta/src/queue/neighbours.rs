//! Destinations beside each other, by a virtual clock: a quick one must not notice many that take
//! next to nothing, and many small ones share the connections that there are.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use model::Timestamp;
use service::clock::{Clock as _, SystemClock};
use store::{Backlog, LeasedRange, RangeRef, Want};

use super::control::ControlView;
use super::fixtures::{config, head, leased, range_ref};
use super::job::{ConnId, Fate};
use super::{Action, ConnEnd, Event, Now, QueueState};
use crate::resolve::{Host, Route};
use crate::tlspolicy::{Level, Security};

const SHAPING: &str = "[default]\nrate = \"100000/s\"\nmax_rate = \"100000/s\"\nconnections = 8\n";
const QUICK: &str = "quick.example";
/// How the names of the others begin.
const SLOW: &str = "slow";
/// What the quick one takes to answer a message; eight of them at a time.
const QUICK_ANSWER: Duration = Duration::from_millis(1);
/// What a tarpit takes.
const SLOW_ANSWER: Duration = Duration::from_secs(30);
/// What the store takes.
const STORE_ANSWER: Duration = Duration::from_millis(10);
/// Messages for the quick one: some seconds' worth.
const MESSAGES: u64 = 40_000;
/// What a connection carries.
const PER_CONNECTION: u64 = 50;

struct World {
    start: Instant,
    now: Instant,
    queue: QueueState,
    /// What waits in the store, by queue.
    due: BTreeMap<String, u64>,
    /// Where each connection leads, and until when it is busy.
    conns: HashMap<ConnId, (String, Instant)>,
    held: Vec<RangeRef>,
    later: BTreeMap<(Instant, u64), Event>,
    next: u64,
    looks: u32,
    /// Connections, ever.
    opened: u64,
    /// Messages that quick ones have taken.
    taken: u64,
}

impl World {
    fn new(due: impl IntoIterator<Item = (String, u64)>) -> Self {
        Self::with(SHAPING, due)
    }

    fn with(shaping: &str, due: impl IntoIterator<Item = (String, u64)>) -> Self {
        let start = SystemClock.instant();
        let view = Arc::new(ControlView::new(start));
        Self {
            start,
            now: start,
            queue: QueueState::new(config(shaping, &[1]), view, 1, start),
            due: due.into_iter().collect(),
            conns: HashMap::new(),
            held: Vec::new(),
            later: BTreeMap::new(),
            next: 0,
            looks: 0,
            opened: 0,
            taken: 0,
        }
    }

    fn clock(&self) -> Now {
        Now {
            instant: self.now,
            wall: self.wall(),
        }
    }

    fn wall(&self) -> Timestamp {
        Timestamp::from_millis(0) + (self.now - self.start)
    }

    /// How long it takes until so many messages are with quick ones.
    fn run(&mut self, messages: u64) -> Duration {
        let mut tick_at = self.start;
        while self.taken < messages {
            let event = self.later.first_key_value().map(|((at, _), _)| *at);
            let actions = match event.filter(|at| *at <= tick_at) {
                Some(at) => {
                    self.now = at;
                    let (_, event) = self.later.pop_first().expect("it is there");
                    self.queue.apply([event], self.clock())
                }
                None => {
                    self.now = tick_at;
                    tick_at += QueueState::TICK;
                    self.queue.tick(self.clock())
                }
            };
            assert!(
                self.now < self.start + Duration::from_secs(600),
                "it stands still"
            );
            actions.into_iter().for_each(|action| self.act(action));
        }
        self.now - self.start
    }

    fn tell(&mut self, event: Event, after: Duration) {
        self.next += 1;
        self.later.insert((self.now + after, self.next), event);
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Look => self.look(),
            Action::Ask(wants) => self.lease(&wants),
            Action::Renew => {
                let (held, asked_at) = (Some(self.held.clone()), self.now);
                self.tell(Event::Renewed { held, asked_at }, STORE_ANSWER);
            }
            Action::Release(release) => {
                self.held.retain(|range| *range != release.range);
                self.tell(Event::HandedBack(vec![release.range]), STORE_ANSWER);
            }
            Action::Resolve(domain) => {
                let host = Host {
                    preference: 0,
                    name: format!("mx.{}", domain.as_str()).as_str().into(),
                    port: 25,
                };
                let route = Arc::new(Route::new(vec![host], false));
                let answer = Ok((route, Duration::from_secs(86_400)));
                self.tell(Event::Resolved { domain, answer }, QUICK_ANSWER);
            }
            Action::LoadContent(head) => {
                let (batch, ready) = (head.id, Ok(()));
                self.tell(Event::Content { batch, ready }, STORE_ANSWER);
            }
            Action::Open { conn, policy, .. } => {
                let host = policy.destination.as_str().to_owned();
                let security = Arc::new(Security {
                    host: host.as_str().into(),
                    level: Level::Plaintext,
                    dane_kept: false,
                    observed: false,
                });
                self.opened += 1;
                self.conns.insert(conn, (host, self.now));
                self.tell(Event::Ready(conn, security), QUICK_ANSWER);
            }
            Action::Send(job) => {
                let (host, busy_until) = self.conns.get_mut(&job.conn).expect("a connection");
                let is_quick = !host.contains(SLOW);
                let answer = if is_quick { QUICK_ANSWER } else { SLOW_ANSWER };
                *busy_until = self.now.max(*busy_until) + answer;
                let after = *busy_until - self.now;
                self.taken += u64::from(is_quick);
                let fate = Fate::Recorded {
                    delivered: true,
                    heard: None,
                };
                self.tell(Event::Report(job.id, fate), after);
            }
            Action::Close(conn) => {
                self.conns.remove(&conn);
                self.tell(Event::Closed(conn, ConnEnd::Planned), QUICK_ANSWER);
            }
            Action::Hurry
            | Action::Register { .. }
            | Action::Record { .. }
            | Action::Throttled(..)
            | Action::Claim(_)
            | Action::Limits(_)
            | Action::Keep(_)
            | Action::KeepHold(..)
            | Action::Drained => {}
        }
    }

    fn look(&mut self) {
        self.looks += 1;
        // Somebody's retry comes due all the time.
        let next_due = Some(self.wall() + Duration::from_millis(30));
        let due = self.due.iter().filter(|(_, due)| **due > 0);
        let backlog = due.map(|(queue, due)| Backlog {
            queue: queue.as_str().into(),
            due: *due,
            next_due,
            transactional: false,
            batches: vec![head(1).id],
        });
        let told = Event::Backlog(Some(backlog.collect()));
        self.tell(told, STORE_ANSWER);
    }

    fn lease(&mut self, wants: &[Want]) {
        let ranges = wants.iter().map(|want| self.range(want)).collect();
        let asked_at = self.now;
        self.tell(Event::Leased { ranges, asked_at }, STORE_ANSWER);
    }

    fn range(&mut self, want: &Want) -> LeasedRange {
        self.next += 1;
        self.held.push(range_ref(self.next));
        let due = self.due.get_mut(&*want.queue).expect("a queue");
        let rows = want.rows.min(u32::try_from(*due).expect("few"));
        *due -= u64::from(rows);
        leased(self.next, &want.queue, rows)
    }
}

/// So many destinations, each with so many messages.
fn each(name: &str, count: usize, messages: u64) -> impl Iterator<Item = (String, u64)> {
    (0..count).map(move |number| (format!("{name}{number}.example"), messages))
}

#[test]
fn a_quick_destination_does_not_wait_for_slow_ones() {
    let quick = (QUICK.to_owned(), MESSAGES);
    let mut alone = World::new([quick.clone()]);
    let took = alone.run(MESSAGES);
    for slow in [3, 60] {
        let mut beside = World::new(each(SLOW, slow, 2_000).chain([quick.clone()]));
        let longer = beside.run(MESSAGES).as_secs_f64() / took.as_secs_f64();
        assert!(longer <= 1.05, "{longer:.3} times as long beside {slow}");
        assert!(beside.looks <= alone.looks * 3, "{} looks", beside.looks);
    }
}

#[test]
fn connections_are_used_to_their_end_while_others_wait_for_one() {
    let count = 2_000;
    let mut world = World::new(each("small", count, PER_CONNECTION));
    // As long as the store has more of them; who is left alone in the end takes what is free.
    let messages = count as u64 * PER_CONNECTION / 4 * 3;
    world.run(messages);
    let (used_up, at_work) = (messages / PER_CONNECTION, world.conns.len() as u64);
    let needless = world.opened.saturating_sub(used_up + at_work);
    assert!(needless <= used_up / 20, "{needless} beside {used_up}");
}

#[test]
fn who_is_alone_has_all_the_connections_that_it_may_have() {
    let shaping = format!("{SHAPING}messages_per_connection = 1000\n");
    let shaping = shaping.replace("connections = 8", "connections = 400");
    let mut world = World::with(&shaping, [(QUICK.to_owned(), MESSAGES)]);
    world.run(MESSAGES / 10);
    assert_eq!(world.opened, 400);
}
