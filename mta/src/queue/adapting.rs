//! The queue with endless mail for one destination that has limits of its own, by a virtual clock:
//! limits follow, suspensions hold, sources warm up.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use model::Timestamp;
use model::units::Rate;
use service::clock::{Clock as _, SystemClock};
use store::{Backlog, BatchHead, Control, LeasedRange, RangeRef, Suspension, Want};

use super::control::ControlView;
use super::fixtures::{config, head, leased, range_ref};
use super::job::{ConnId, Fate, Job, Trouble};
use super::pool::{Pool, Pools};
use super::snapshot::Scope;
use super::{Action, ConnEnd, Event, KeptHold, Limited, Now, QueueState, Remembered, Shares};
use crate::classify::{Notice, Signal};
use crate::resolve::{Host, Route};
use crate::shaping::{Change, Destination, Heard, Kept, Reason, SharedPacer, Sign};
use crate::tlspolicy::{Level, Security};

const DOMAIN: &str = "x.example";
const TICK: Duration = Duration::from_millis(100);
/// From `MAIL` to its answer.
const ANSWER: Duration = Duration::from_millis(60);

#[derive(Debug)]
struct Conn {
    source: usize,
    permits: SharedPacer,
    jobs: VecDeque<Job>,
    ready: bool,
    /// The message that is being answered, since when.
    busy: Option<(Job, Instant)>,
    begun: u32,
}

/// What the destination says to a message that begins.
type Judge = Box<dyn FnMut(usize, Instant) -> Option<Signal>>;

struct World {
    start: Instant,
    now: Instant,
    queue: QueueState,
    judge: Judge,
    /// What the destination takes over one connection; then it ends it.
    per_connection: u32,
    /// Of the batch.
    rate: Rate,
    conns: BTreeMap<ConnId, Conn>,
    held: Vec<RangeRef>,
    later: VecDeque<Event>,
    next: u64,
    /// Messages begun, by source, and those of them that were refused.
    begun: Vec<(usize, Instant)>,
    refused: usize,
    changes: Vec<Change>,
    kept: HashMap<(Destination, usize), Kept>,
    /// Nobody answers.
    unreachable: bool,
    kept_hold: Option<KeptHold>,
    opened: Vec<Instant>,
    /// The most messages at connections at a time.
    most_out: usize,
}

impl World {
    fn new(shaping: &str, sources: usize, start: Instant, judge: Judge) -> Self {
        let config = config(shaping, &vec![1; sources]);
        let view = Arc::new(ControlView::new(start));
        Self {
            start,
            now: start,
            queue: QueueState::new(config, view, 1, start),
            judge,
            per_connection: u32::MAX,
            rate: Rate::Unlimited,
            conns: BTreeMap::new(),
            held: Vec::new(),
            later: VecDeque::new(),
            next: 0,
            begun: Vec::new(),
            refused: 0,
            changes: Vec::new(),
            kept: HashMap::new(),
            unreachable: false,
            kept_hold: None,
            opened: Vec::new(),
            most_out: 0,
        }
    }

    fn clock(&self) -> Now {
        Now {
            instant: self.now,
            wall: wall(self.now - self.start),
        }
    }

    /// Lets `time` pass.
    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            let tick_at = self.now + TICK;
            while let Some(at) = self.next_move(tick_at) {
                self.now = self.now.max(at);
                self.move_conns();
                self.deliver_events();
            }
            self.now = tick_at;
            let actions = self.queue.tick(self.clock());
            self.carry_out(actions);
            self.deliver_events();
        }
    }

    /// When a connection has something to do before `until`.
    fn next_move(&self, until: Instant) -> Option<Instant> {
        let moves = self.conns.values().filter_map(|conn| match &conn.busy {
            Some((_, began)) => Some(*began + ANSWER),
            None if conn.jobs.is_empty() => None,
            None => {
                let permits = conn.permits.lock().unwrap_or_else(PoisonError::into_inner);
                Some(permits.free_at(self.now))
            }
        });
        moves.filter(|at| *at < until).min()
    }

    fn move_conns(&mut self) {
        let now = self.now;
        let mut ended = Vec::new();
        for (id, conn) in &mut self.conns {
            if let Some((job, began)) = conn.busy.take_if(|(_, began)| *began + ANSWER <= now) {
                let is_spent = conn.begun > self.per_connection;
                ended.extend(is_spent.then_some(*id));
                let signal = match is_spent {
                    true => Some(Signal::FewerMessages),
                    false => (self.judge)(conn.source, began),
                };
                self.refused += usize::from(signal.is_some());
                if let Some(signal) = signal {
                    let notice = Notice {
                        signal,
                        rule: Some("test".into()),
                        reply: "421 slow down".into(),
                    };
                    let noticed = Event::Noticed(*id, Box::new(notice), Some(began));
                    self.later.push_back(noticed);
                }
                let heard = signal.is_none().then_some(Heard {
                    began,
                    sign: Sign::Peace,
                    rule: None,
                });
                let delivered = signal.is_none();
                let fate = Fate::Recorded { delivered, heard };
                self.later.push_back(Event::Report(job.id, fate));
            }
            let may_begin = conn.ready && conn.busy.is_none() && !conn.jobs.is_empty();
            let mut permits = conn.permits.lock().unwrap_or_else(PoisonError::into_inner);
            if may_begin && permits.take(now).is_ok() {
                conn.busy = conn.jobs.pop_front().map(|job| (job, now));
                conn.begun += 1;
                self.begun.push((conn.source, now));
            }
        }
        for id in ended {
            self.act(Action::Close(id));
        }
    }

    fn deliver_events(&mut self) {
        while !self.later.is_empty() {
            let events: Vec<_> = self.later.drain(..).collect();
            let actions = self.queue.apply(events, self.clock());
            self.carry_out(actions);
        }
    }

    fn carry_out(&mut self, actions: Vec<Action>) {
        for action in actions {
            self.act(action);
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Look => self.later.push_back(Event::Backlog(Some(vec![Backlog {
                queue: DOMAIN.into(),
                due: 100_000,
                next_due: None,
                transactional: false,
                batches: vec![head(1).id],
            }]))),
            Action::Ask(wants) => self.lease(&wants),
            Action::Renew => self.later.push_back(Event::Renewed {
                held: Some(self.held.clone()),
                asked_at: self.now,
            }),
            Action::Release(release) => {
                self.held.retain(|range| *range != release.range);
                self.later.push_back(Event::HandedBack(vec![release.range]));
            }
            Action::Resolve(domain) => {
                let host = Host {
                    preference: 0,
                    name: "mx.x.example".into(),
                    port: 25,
                };
                let route = Arc::new(Route::new(vec![host], false));
                let answer = Ok((route, Duration::from_secs(1_000_000)));
                self.later.push_back(Event::Resolved { domain, answer });
            }
            Action::LoadContent(head) => self.later.push_back(Event::Content {
                batch: head.id,
                ready: Ok(()),
            }),
            Action::Open {
                conn,
                source,
                permits,
                ..
            } => self.open(conn, source, permits),
            Action::Send(job) => self.send(job),
            Action::Close(id) => self.close(id),
            Action::Limits(limited) => self.limited(*limited),
            Action::Keep(all) => {
                for (destination, source, kept) in all {
                    match kept {
                        Some(kept) => self.kept.insert((destination, source), kept),
                        None => self.kept.remove(&(destination, source)),
                    };
                }
            }
            Action::KeepHold(_, hold) => self.kept_hold = hold,
            // Ranges here are leased with all of them in the window, so nothing waits for shipping.
            Action::Hurry => panic!("there is no window to move"),
            Action::Register { .. }
            | Action::Record { .. }
            | Action::Throttled(..)
            | Action::Claim(_)
            | Action::Drained => {}
        }
    }

    fn open(&mut self, conn: ConnId, source: usize, permits: SharedPacer) {
        self.opened.push(self.now);
        if self.unreachable {
            let trouble = Trouble {
                class: model::Class::ConnectFailure,
                blame: model::Blame::Destination,
                text: "nobody answers".to_owned(),
                reply: None,
                host: "mx.x.example".into(),
                is_final: false,
            };
            let end = ConnEnd::Unreachable(trouble);
            self.later.push_back(Event::Closed(conn, end));
            return;
        }
        let made = Conn {
            source,
            permits,
            jobs: VecDeque::new(),
            ready: true,
            busy: None,
            begun: 0,
        };
        self.conns.insert(conn, made);
        let security = Arc::new(Security {
            host: "mx.x.example".into(),
            level: Level::Plaintext,
            dane_kept: false,
            observed: false,
        });
        self.later.push_back(Event::Ready(conn, security));
    }

    fn send(&mut self, job: Job) {
        let conn = self.conns.get_mut(&job.conn).expect("a connection");
        conn.jobs.push_back(job);
        let out = self
            .conns
            .values()
            .map(|conn| conn.jobs.len() + usize::from(conn.busy.is_some()));
        self.most_out = self.most_out.max(out.sum());
    }

    fn close(&mut self, id: ConnId) {
        let Some(conn) = self.conns.remove(&id) else {
            return;
        };
        let left = conn.jobs.into_iter().chain(conn.busy.map(|(job, _)| job));
        for job in left {
            let fate = Fate::Returned(super::job::Returned::Closed);
            self.later.push_back(Event::Report(job.id, fate));
        }
        self.later.push_back(Event::Closed(id, ConnEnd::Planned));
    }

    fn limited(&mut self, limited: Limited) {
        let changes = limited.changes.into_iter().map(|(_, change)| change);
        self.changes.extend(changes);
    }

    fn lease(&mut self, wants: &[Want]) {
        let ranges: Vec<_> = wants.iter().map(|want| self.range(want)).collect();
        self.later.push_back(Event::Leased {
            ranges,
            asked_at: self.now,
        });
    }

    fn range(&mut self, want: &Want) -> LeasedRange {
        self.next += 1;
        self.held.push(range_ref(self.next));
        let batch = BatchHead {
            release_at: wall(Duration::ZERO),
            expires_at: Some(Timestamp::from_millis(i64::MAX)),
            rate: self.rate,
            ..head(1)
        };
        LeasedRange {
            batch: Arc::new(batch),
            ..leased(self.next, DOMAIN, want.rows.min(want.largest).min(500))
        }
    }

    fn begun_since(&self, since: Instant) -> impl Iterator<Item = &(usize, Instant)> {
        self.begun.iter().filter(move |(_, at)| *at >= since)
    }
}

fn wall(since_start: Duration) -> Timestamp {
    // Noon, so that a day of the calendar ends within a run.
    Timestamp::parse("2026-03-01T12:00:00Z").expect("a time") + since_start
}

/// A receiver that allows so many in any second.
fn allows(count: usize) -> Judge {
    let mut log = VecDeque::new();
    Box::new(move |_, began| {
        while log
            .front()
            .is_some_and(|at| *at + Duration::from_secs(1) <= began)
        {
            log.pop_front();
        }
        if log.len() < count {
            log.push_back(began);
            return None;
        }
        Some(Signal::Slow)
    })
}

fn destination() -> Destination {
    Destination::named("mx.x.example")
}

#[test]
fn the_whole_queue_settles_at_what_a_destination_allows_and_a_restart_goes_on_there() {
    let start = SystemClock.instant();
    let mut world = World::new("[default]\nrate = \"50/s\"\n", 1, start, allows(10));
    world.run(Duration::from_secs(1_200));
    let (before, refused) = (world.begun.len(), world.refused);
    world.run(Duration::from_secs(1_200));
    let (sent, refused) = (world.begun.len() - before, world.refused - refused);
    assert!(refused * 100 < sent, "{refused} of {sent}");
    assert!(sent - refused > 10_800, "{sent} of 12,000");
    let reasons: Vec<_> = world.changes.iter().map(|change| change.reason).collect();
    assert_eq!(reasons.first(), Some(&Reason::RateSignal));
    assert!(reasons.contains(&Reason::HoldOver) && reasons.contains(&Reason::Probe));
    assert_eq!(world.changes[0].rule.as_deref(), Some("test"));

    // The next process begins where this one stopped, and with no burst.
    let kept = world.kept[&(destination(), 0)].clone();
    let mut again = World::new("[default]\nrate = \"50/s\"\n", 1, world.now, allows(10));
    let note = Kept::from_note(&kept.to_note()).expect("a note");
    again.later.push_back(Event::Remembered(vec![Remembered {
        destination: destination(),
        source: 0,
        kept: note,
    }]));
    again.run(Duration::from_secs(60));
    assert!(
        again.refused < 5 && again.begun.len() < 620,
        "{} refused",
        again.refused
    );
    assert!(again.begun.len() > 300, "{}", again.begun.len());
}

#[test]
fn a_block_pauses_and_one_connection_probes() {
    let start = SystemClock.instant();
    let until = start + Duration::from_secs(400);
    let blocked = move |_, began| {
        let is_blocked = began > start + Duration::from_secs(60) && began < until;
        is_blocked.then_some(Signal::Block { pause: None })
    };
    let mut world = World::new("[default]\nrate = \"10/s\"\n", 1, start, Box::new(blocked));
    world.run(Duration::from_secs(61));
    world.run(Duration::from_secs(290));
    let during = world.begun_since(start + Duration::from_secs(64)).count();
    assert_eq!(during, 0, "nothing starts in a pause");
    assert!(world.refused <= 20, "{}", world.refused);
    let views = world.queue.limits(&destination());
    assert_eq!(views[0].because.reason, Some(Reason::BlockSignal));
    assert!(views[0].in_force == 0.0 && views[0].until.is_some());
    // The first probe is blocked again; the pause after it is twice as long.
    world.run(Duration::from_secs(100));
    assert!(world.conns.len() <= 1, "{:?}", world.changes);
    let pauses = world.changes.iter().filter(|change| change.to == 0.0);
    assert_eq!(pauses.count(), 2);
    world.run(Duration::from_secs(900));
    let last = world
        .begun_since(world.now - Duration::from_secs(60))
        .count();
    assert!(
        last >= 200,
        "{last} in the last minute: half of the rate at least"
    );
    assert!(last <= 600);
}

#[test]
fn a_connection_carries_no_more_than_its_peer_wants() {
    let start = SystemClock.instant();
    let shaping = "[default]\nrate = \"20/s\"\nconnections = 2\nmessages_per_connection = 50\n";
    let mut world = World::new(shaping, 1, start, allows(1_000));
    world.per_connection = 10;
    world.run(Duration::from_secs(120));
    let limits = world.queue.limits(&destination());
    let carried = &limits[2];
    assert_eq!(world.changes[0].reason, Reason::MessagesSignal);
    assert!((5.0..=10.0).contains(&carried.in_force), "{carried:?}");
    assert_eq!(limits[0].in_force, 20.0, "its rate is not in question");
    let (before, refused) = (world.begun.len(), world.refused);
    world.run(Duration::from_secs(900));
    let (sent, refused) = (world.begun.len() - before, world.refused - refused);
    assert!(refused * 200 < sent, "{refused} of {sent}");
    assert!(sent > 16_000, "{sent} of 18,000");
}

#[test]
fn sources_share_by_weights_that_were_read_again() {
    let start = SystemClock.instant();
    let mut world = World::new("[default]\nrate = \"50/s\"\n", 2, start, allows(1_000));
    // Less than either can carry.
    world.rate = "20/s".parse().expect("a rate");
    let counts = |world: &World, since| {
        [0, 1].map(|source| {
            world
                .begun_since(since)
                .filter(|(of, _)| *of == source)
                .count()
        })
    };
    world.run(Duration::from_secs(60));
    let [first, second] = counts(&world, start);
    assert!(first.abs_diff(second) < 40, "{first} and {second}");
    world.later.push_back(Event::Shares(Shares {
        accounts: HashMap::new(),
        profiles: HashMap::new(),
        pools: Some(Pools::single(Pool::new(vec![(0, 1), (1, 3)]))),
    }));
    world.deliver_events();
    let changed_at = world.now + Duration::from_secs(10);
    world.run(Duration::from_secs(130));
    let [first, second] = counts(&world, changed_at);
    assert!(
        (first * 3).abs_diff(second) < second / 10,
        "{first} and {second}"
    );
}

#[test]
fn who_could_not_be_reached_is_left_alone_over_a_restart_and_is_asked_again_in_time() {
    let start = SystemClock.instant();
    let shaping = "[default]\nrate = \"20/s\"\n";
    let mut world = World::new(shaping, 1, start, allows(1_000));
    world.unreachable = true;
    world.run(Duration::from_secs(60));
    assert_eq!(world.opened.len(), 1);
    let kept = world.kept_hold.clone().expect("a note");
    assert_eq!(kept.failures, 1);

    // The next process knows of it from the note alone.
    let mut again = World::new(shaping, 1, world.start, allows(1_000));
    again.now = world.now;
    again.unreachable = true;
    let note = KeptHold::from_note(&kept.to_note()).expect("a note");
    let holds = Event::RememberedHolds(vec![(destination(), note)]);
    again.later.push_back(holds);
    again.run(Duration::from_secs(170));
    assert!(again.opened.is_empty(), "four minutes are not over");
    assert_eq!(again.queue.leased(), 0, "others may try");
    again.run(Duration::from_secs(140));
    assert_eq!(again.opened.len(), 1, "once, and then the longer wait");
    assert_eq!(again.kept_hold.as_ref().map(|kept| kept.failures), Some(2));
    again.unreachable = false;
    again.run(Duration::from_secs(800));
    assert!(again.begun.len() > 1_000);
    assert_eq!(again.kept_hold, None, "nothing is held any more");
}

#[test]
fn an_operator_suspends_and_resumes_at_once() {
    let start = SystemClock.instant();
    let mut world = World::new("[default]\nrate = \"20/s\"\n", 1, start, allows(1_000));
    world.run(Duration::from_secs(10));
    let suspension = Suspension {
        destination: "mx.x.example".into(),
        until: None,
        reason: "a talk with the postmaster".into(),
        by: "ops".into(),
        since: world.clock().wall,
    };
    world
        .later
        .push_back(Event::Control(Control::DestinationSuspended(suspension)));
    world.deliver_events();
    let suspended_at = world.now;
    world.run(Duration::from_secs(120));
    assert_eq!(world.begun_since(suspended_at + ANSWER).count(), 0);
    assert_eq!(world.queue.leased(), 0, "all is back in the store");
    let suspended = |world: &World| {
        let scope = Scope::Named(vec![Destination::named("mx.x.example")]);
        world.queue.snapshot(&scope, world.clock()).suspended.len()
    };
    assert_eq!(suspended(&world), 1);
    // It was lifted while the control feed was not followed.
    world.later.push_back(Event::Suspensions(Vec::new()));
    world.deliver_events();
    assert_eq!(suspended(&world), 0);
    let resumed_at = world.now;
    world.run(Duration::from_secs(3));
    assert!(world.begun_since(resumed_at).count() >= 20);
    let again = Suspension {
        destination: "mx.x.example".into(),
        until: None,
        reason: "again".into(),
        by: "ops".into(),
        since: world.clock().wall,
    };
    world.later.push_back(Event::Suspensions(vec![again]));
    world.deliver_events();
    let suspended_at = world.now;
    world.run(Duration::from_secs(20));
    assert_eq!(world.begun_since(suspended_at + ANSWER).count(), 0);
    let resumed = Control::DestinationResumed("mx.x.example".into());
    world.later.push_back(Event::Control(resumed));
    world.deliver_events();
    let resumed_at = world.now;
    world.run(Duration::from_secs(3));
    assert!(world.begun_since(resumed_at).count() >= 20);
}

#[test]
fn connections_are_opened_at_their_rate_and_no_more_in_flight_than_allowed() {
    let start = SystemClock.instant();
    let shaping = "[default]\nrate = \"unlimited\"\nconnections = 10\nnew_connections = \"12/m\"\nin_flight = 4\nmessages_per_connection = 1000000\n";
    let mut world = World::new(shaping, 1, start, allows(1_000_000));
    world.run(Duration::from_secs(60));
    for pair in world.opened.windows(2) {
        assert!(pair[1] - pair[0] >= Duration::from_secs(5));
    }
    assert!(
        (2..=10).contains(&world.opened.len()),
        "{:?}",
        world.opened.len()
    );
    assert_eq!(world.most_out, 4);
    let most = 60 * 4 * 17;
    assert!(
        world.begun.len() <= most && world.begun.len() > 1_000,
        "{}",
        world.begun.len()
    );
}

#[test]
fn a_cold_source_keeps_to_its_budget_and_the_rest_goes_over_the_warm_one() {
    let start = SystemClock.instant();
    let shaping = "[default]\nrate = \"5/s\"\n[[warmup]]\nsource = \"ip0\"\nstart = \"2026-03-01\"\nschedule = [2400, 4800]\n";
    let mut world = World::new(shaping, 2, start, allows(1_000));
    let count = |world: &World, source, since| {
        let of_source = world.begun_since(since).filter(|(of, _)| *of == source);
        of_source.count()
    };
    world.run(Duration::from_secs(900));
    let cold = count(&world, 0, start);
    assert!(
        (23..=26).contains(&cold),
        "{cold}: a 96th of the day's 2,400"
    );
    let warm = count(&world, 1, start);
    assert!(warm > 4_000, "{warm}: the warm source carries the rest");
    let limits = world.queue.limits(&destination());
    assert_eq!(limits[0].because.reason, Some(Reason::WarmUp));
    assert_eq!(limits[0].line, Some(4));
}
