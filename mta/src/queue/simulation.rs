//! The queue against a store, a DNS and a world of its own making, from seeds: after each step it
//! is checked that nothing is sent that must not be, and at the end that nobody is missing.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use model::{AttemptResult, BatchId, Domain, LotNumber, Place, Timestamp};
use service::clock::{Clock as _, SystemClock};
use store::{Backlog, Control, LeasedRange, LeasedRecipient, MIXED, RangeRef, Release, Want};

use super::control::{ControlView, Permission};
use super::fixtures::{config, head, range_ref, row};
use super::job::{ConnId, Fate, Job, Returned, Trouble};
use super::target::DEPTH;
use super::{Action, ConnEnd, Event, Now, QueueConfig, QueueState};
use crate::resolve::{Host, Route};
use crate::tlspolicy::sts::{Mode, StsPolicy};
use crate::tlspolicy::{Asked, Level, Security};

/// Worlds in each test; more of them find more.
const SEEDS: u64 = 12;
const LEASE: Duration = Duration::from_secs(45);
const SHAPING: &str = r#"
    [default]
    rate = "50/s"
    connections = 3
    messages_per_connection = 7
    retry = ["1s", "2s", "4s"]
    expire = "10m"
    [domain."slow.example"]
    rate = "120/m"
    connections = 1
"#;
const DOMAINS: [&str; 5] = [
    "a.example",
    "b.example",
    "slow.example",
    "gone.example",
    "dead.example",
];

/// The hosts of two domains.
const SHARED: &str = "mx.shared.example";

/// What a domain asks of connections.
fn asked_by(domain: &str) -> Asked {
    let sts = || Arc::new(StsPolicy::of(Mode::Enforce, &[SHARED]));
    Asked {
        dane: false,
        sts: (domain == "b.example").then(sts),
    }
}

/// Where a recipient stands, as the store has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    /// Waits in this queue from this moment on.
    Waiting {
        due: Instant,
        own_queue: bool,
    },
    /// In a lease.
    Leased(RangeRef),
    Final,
}

#[derive(Debug, Clone)]
struct Person {
    batch: u8,
    place: Place,
    index: u32,
    email: String,
    attempts: u8,
    ambiguous: bool,
    maybe_started: bool,
    standing: Standing,
    /// Copies that the world has of the message.
    copies: u32,
}

#[derive(Debug)]
struct FakeRange {
    people: Vec<usize>,
    until: Instant,
    reported: HashSet<usize>,
    window: u32,
    started: HashSet<usize>,
}

#[derive(Debug)]
struct FakeConn {
    security: Security,
    ready: bool,
    jobs: Vec<Job>,
    sent: u32,
    domain_down: bool,
}

struct World {
    seed: u64,
    random: fastrand::Rng,
    start: Instant,
    now: Instant,
    view: Arc<ControlView>,
    queue: QueueState,
    people: Vec<Person>,
    by_place: HashMap<(BatchId, Place), usize>,
    ranges: HashMap<RangeRef, FakeRange>,
    conns: HashMap<ConnId, FakeConn>,
    paused: HashSet<u8>,
    cancelled: HashSet<u8>,
    later: BTreeMap<(Instant, u64), Event>,
    next: u64,
    chaos: bool,
    drained: bool,
    down: HashSet<&'static str>,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut random = fastrand::Rng::with_seed(seed);
        let start = SystemClock.instant();
        let view = Arc::new(ControlView::new(start));
        let config = QueueConfig {
            lease: LEASE,
            ambiguous_after: Duration::from_secs(5),
            ..config(SHAPING, &[1, 3])
        };
        let queue = QueueState::new(config, Arc::clone(&view), seed, start);
        let mut people = Vec::new();
        for batch in 1..=3_u8 {
            for index in 0..random.u32(20..150) {
                let domain = DOMAINS[random.usize(..DOMAINS.len())];
                let place = Place {
                    lot: LotNumber(index / 40),
                    position: u16::try_from(index % 40).expect("few"),
                };
                people.push(Person {
                    batch,
                    place,
                    index,
                    email: format!("u{index}@{domain}"),
                    attempts: 0,
                    ambiguous: false,
                    maybe_started: false,
                    standing: Standing::Waiting {
                        due: start,
                        own_queue: random.bool(),
                    },
                    copies: 0,
                });
            }
        }
        let by_place = people
            .iter()
            .enumerate()
            .map(|(at, person)| ((head(person.batch).id, person.place), at))
            .collect();
        Self {
            seed,
            random,
            start,
            now: start,
            view,
            queue,
            people,
            by_place,
            ranges: HashMap::new(),
            conns: HashMap::new(),
            paused: HashSet::new(),
            cancelled: HashSet::new(),
            later: BTreeMap::new(),
            next: 0,
            chaos: true,
            drained: false,
            down: HashSet::new(),
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

    fn instant(&self, wall: Timestamp) -> Instant {
        self.start + wall.since(Timestamp::from_millis(0))
    }

    fn soon(&mut self, event: Event, within_ms: u64) {
        let at = self.now + Duration::from_millis(self.random.u64(..=within_ms));
        self.next += 1;
        self.later.insert((at, self.next), event);
    }

    fn person(&self, batch: BatchId, place: Place) -> usize {
        self.by_place[&(batch, place)]
    }

    /// One step of time: what is due happens, and the queue's actions are carried out and judged.
    fn step(&mut self) {
        self.now += Duration::from_millis(self.random.u64(1..=100));
        self.expire_leases();
        if self.chaos {
            self.disturb();
        }
        let mut events = Vec::new();
        while let Some(entry) = self
            .later
            .first_entry()
            .filter(|entry| entry.key().0 <= self.now)
        {
            events.push(entry.remove());
        }
        for event in events {
            if let Event::Closed(conn, _) = &event {
                self.conns.remove(conn);
            }
            if let Event::Ready(conn, _) = &event {
                self.conns.get_mut(conn).expect("open").ready = true;
            }
            let actions = self.queue.apply([event], self.clock());
            self.carry_out(actions);
        }
        let actions = self.queue.tick(self.clock());
        self.carry_out(actions);
        self.work();
        self.check();
    }

    /// What users, operators, networks and other nodes do.
    fn disturb(&mut self) {
        match self.random.u32(..400) {
            0 => self.control_batch(true),
            1..=3 => self.control_batch(false),
            4 if self.random.u32(..10) == 0 => {
                let batch = self.random.u8(1..=3);
                self.cancelled.insert(batch);
                for at in 0..self.people.len() {
                    let person = &mut self.people[at];
                    if person.batch == batch && matches!(person.standing, Standing::Waiting { .. })
                    {
                        person.standing = Standing::Final;
                    }
                }
                self.tell(Control::Cancelled(head(batch).id));
            }
            5..=8 => {
                let domain = DOMAINS[self.random.usize(..2)];
                if !self.down.remove(domain) {
                    self.down.insert(domain);
                }
            }
            9 => self.lose_a_range(),
            10..=25 => self.break_a_connection(),
            _ => {}
        }
    }

    fn control_batch(&mut self, pause: bool) {
        let batch = self.random.u8(1..=3);
        let id = head(batch).id;
        if pause {
            self.paused.insert(batch);
            self.tell(Control::Paused(id));
        } else if self.paused.remove(&batch) {
            self.tell(Control::Resumed(id));
        }
    }

    fn tell(&mut self, control: Control) {
        self.view.learn(&control, self.now);
        let actions = self.queue.apply([Event::Control(control)], self.clock());
        self.carry_out(actions);
    }

    /// Another node has it: shipping tells.
    fn lose_a_range(&mut self) {
        let Some(range) = self.ranges.keys().copied().min_by_key(|range| range.id) else {
            return;
        };
        self.take_away(range);
        self.soon(
            Event::Shipped {
                windows: Vec::new(),
                lost: vec![range],
            },
            200,
        );
    }

    fn expire_leases(&mut self) {
        let over: Vec<_> = self
            .ranges
            .iter()
            .filter(|(_, range)| range.until <= self.now)
            .map(|(id, _)| *id)
            .collect();
        over.into_iter().for_each(|range| self.take_away(range));
    }

    /// The store gives a range to whoever asks next; who may have been started is in doubt.
    fn take_away(&mut self, id: RangeRef) {
        let Some(range) = self.ranges.remove(&id) else {
            return;
        };
        for (offset, at) in range.people.iter().enumerate() {
            if range.reported.contains(at) {
                continue;
            }
            let person = &mut self.people[*at];
            if person.standing == Standing::Leased(id) {
                person.maybe_started = u32::try_from(offset).expect("few") < range.window;
                person.standing = Standing::Waiting {
                    due: self.now,
                    own_queue: true,
                };
            }
        }
    }

    fn break_a_connection(&mut self) {
        let Some(id) = self
            .conns
            .iter()
            .filter(|(_, conn)| conn.ready)
            .map(|(id, _)| *id)
            .min()
        else {
            return;
        };
        let conn = self.conns.get_mut(&id).expect("there");
        conn.ready = false;
        for job in std::mem::take(&mut conn.jobs) {
            self.soon(
                Event::Report(job.id, Fate::Returned(Returned::Broken("reset".into()))),
                50,
            );
        }
        self.next += 1;
        self.later.insert(
            (self.now + Duration::from_millis(60), self.next),
            Event::Closed(id, ConnEnd::Broken),
        );
    }

    /// Connections send what they have.
    fn work(&mut self) {
        let mut ids: Vec<_> = self
            .conns
            .iter()
            .filter(|(_, conn)| conn.ready && !conn.jobs.is_empty())
            .map(|(id, _)| *id)
            .collect();
        ids.sort();
        for id in ids {
            if self.random.u32(..3) == 0 {
                let job = self.conns.get_mut(&id).expect("there").jobs.remove(0);
                self.finish_job(&job);
                self.close_if_spent(id);
            }
        }
    }

    /// A connection ends by itself when it has carried its messages.
    fn close_if_spent(&mut self, id: ConnId) {
        let conn = self.conns.get_mut(&id).expect("there");
        if conn.sent >= 7 && conn.jobs.is_empty() {
            conn.ready = false;
            self.soon(Event::Closed(id, ConnEnd::Planned), 20);
        }
    }

    fn finish_job(&mut self, job: &Job) {
        let roll = self.random.u32(..100);
        if self.chaos && roll < 5 {
            let why = [
                Returned::Closed,
                Returned::Stopped,
                Returned::ContentGone,
                Returned::JournalFull,
            ][self.random.usize(..4)]
            .clone();
            self.conns.get_mut(&job.conn).expect("there").sent -= 1;
            return self.soon(Event::Report(job.id, Fate::Returned(why)), 20);
        }
        let retry_at = self.wall() + Duration::from_secs(2);
        let result = match roll {
            5..=15 if self.chaos => AttemptResult::TemporaryError {
                retry_at,
                ambiguous: false,
            },
            16..=18 if self.chaos => AttemptResult::TemporaryError {
                retry_at,
                ambiguous: true,
            },
            19..=22 => AttemptResult::Bounce,
            _ => AttemptResult::Delivered,
        };
        let at = self.person(job.item.batch.id, job.item.place);
        if !matches!(
            result,
            AttemptResult::Bounce
                | AttemptResult::TemporaryError {
                    ambiguous: false,
                    ..
                }
        ) {
            self.people[at].copies += 1;
        }
        self.fact(at, job.item.attempt, result);
        self.soon(
            Event::Report(
                job.id,
                Fate::Recorded {
                    delivered: result == AttemptResult::Delivered,
                    heard: None,
                },
            ),
            20,
        );
    }

    /// The store takes a fact: forward only.
    fn fact(&mut self, at: usize, number: u8, result: AttemptResult) {
        let now = self.now;
        let due = match result {
            AttemptResult::TemporaryError { retry_at, .. } => self.instant(retry_at).max(now),
            AttemptResult::Delivered
            | AttemptResult::Bounce
            | AttemptResult::Failed
            | AttemptResult::Suppressed(_)
            | AttemptResult::Cancelled => now,
        };
        let person = &mut self.people[at];
        let leased = match person.standing {
            Standing::Leased(range) => Some(range),
            Standing::Waiting { .. } | Standing::Final => None,
        };
        if let Some(range) = leased.and_then(|id| self.ranges.get_mut(&id)) {
            range.reported.insert(at);
        }
        if person.standing == Standing::Final || number <= person.attempts {
            return;
        }
        match result {
            AttemptResult::TemporaryError { ambiguous, .. } => {
                (person.attempts, person.maybe_started) = (number, false);
                person.ambiguous |= ambiguous;
                person.standing = Standing::Waiting {
                    due,
                    own_queue: true,
                };
            }
            AttemptResult::Delivered | AttemptResult::Bounce | AttemptResult::Failed => {
                (person.attempts, person.standing) = (number, Standing::Final);
            }
            AttemptResult::Suppressed(_) | AttemptResult::Cancelled => {
                person.standing = Standing::Final
            }
        }
        self.move_windows();
    }

    fn move_windows(&mut self) {
        let mut windows = Vec::new();
        let mut done = Vec::new();
        for (id, range) in &mut self.ranges {
            let open = range
                .people
                .iter()
                .position(|at| !range.reported.contains(at));
            match open {
                Some(first) => {
                    let window = u32::try_from(first).expect("few") + 8;
                    if window > range.window {
                        range.window = window;
                        windows.push((*id, window));
                    }
                }
                None => done.push(*id),
            }
        }
        done.iter().for_each(|id| drop(self.ranges.remove(id)));
        windows.sort_unstable();
        if !windows.is_empty() {
            self.soon(
                Event::Shipped {
                    windows,
                    lost: Vec::new(),
                },
                60,
            );
        }
    }

    // ---- actions --------------------------------------------------------------------------

    fn carry_out(&mut self, actions: Vec<Action>) {
        for action in actions {
            self.act(action);
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Look => {
                let answer = if self.chaos && self.random.u32(..10) == 0 {
                    None
                } else {
                    Some(self.backlog())
                };
                self.soon(Event::Backlog(answer), 20);
            }
            Action::Ask(wants) => self.lease(&wants),
            Action::Renew => self.renew(),
            Action::Register { range, places, .. } => assert_eq!(
                self.ranges
                    .get(&range)
                    .map_or(places.len(), |of| of.people.len()),
                places.len()
            ),
            Action::Release(release) => self.release(&release),
            // Shipping here has its own pace.
            Action::Hurry | Action::KeepHold(..) => {}
            Action::Resolve(domain) => self.resolve(domain),
            Action::LoadContent(head) => {
                let ready = if self.chaos && self.random.u32(..5) == 0 {
                    Err(("not now".into(), false))
                } else {
                    Ok(())
                };
                self.soon(
                    Event::Content {
                        batch: head.id,
                        ready,
                    },
                    50,
                );
            }
            Action::Open { conn, route, .. } => self.open(conn, &route),
            Action::Send(job) => self.send(job),
            Action::Close(conn) => self.close(conn),
            Action::Record { attempt, .. } => {
                let at = self.person(attempt.message.batch, attempt.place);
                self.fact(at, attempt.number, attempt.result);
            }
            Action::Limits(_) | Action::Throttled(..) | Action::Keep(_) | Action::Claim(_) => {}
            Action::Drained => self.drained = true,
        }
    }

    fn queue_of(person: &Person, own_queue: bool) -> &str {
        if own_queue {
            person.email.rsplit('@').next().expect("a domain")
        } else {
            MIXED
        }
    }

    fn is_due(&self, person: &Person) -> Option<bool> {
        match person.standing {
            Standing::Waiting { due, own_queue }
                if due <= self.now && !self.paused.contains(&person.batch) =>
            {
                Some(own_queue)
            }
            Standing::Waiting { .. } | Standing::Leased(_) | Standing::Final => None,
        }
    }

    fn backlog(&self) -> Vec<Backlog> {
        let mut due = BTreeMap::<&str, (u64, BTreeSet<BatchId>)>::new();
        for person in &self.people {
            if let Some(own_queue) = self.is_due(person) {
                let (rows, batches) = due.entry(Self::queue_of(person, own_queue)).or_default();
                *rows += 1;
                batches.insert(head(person.batch).id);
            }
        }
        let entry = |(queue, (due, batches)): (&str, (u64, BTreeSet<BatchId>))| Backlog {
            queue: queue.into(),
            due,
            next_due: None,
            transactional: false,
            batches: batches.into_iter().collect(),
        };
        due.into_iter().map(entry).collect()
    }

    fn lease(&mut self, wants: &[Want]) {
        let asked_at = self.now;
        let mut leased = Vec::new();
        if !(self.chaos && self.random.u32(..10) == 0) {
            leased = wants.iter().flat_map(|want| self.lease_one(want)).collect();
        }
        self.soon(
            Event::Leased {
                ranges: leased,
                asked_at,
            },
            30,
        );
    }

    fn lease_one(&mut self, want: &Want) -> Vec<LeasedRange> {
        let mut by_batch = BTreeMap::<u8, Vec<usize>>::new();
        let mut rows = want.rows;
        let mut of: HashMap<BatchId, u32> = want.of.iter().copied().collect();
        for (at, person) in self.people.iter().enumerate() {
            let fits = self
                .is_due(person)
                .is_some_and(|own_queue| *Self::queue_of(person, own_queue) == *want.queue);
            let left = of.entry(head(person.batch).id).or_insert(want.per_batch);
            if fits && rows > 0 && *left > 0 && !want.urgent_only {
                rows -= 1;
                *left -= 1;
                by_batch.entry(person.batch).or_default().push(at);
            }
        }
        by_batch
            .into_iter()
            .map(|(batch, people)| self.lease_range(batch, people, &want.queue))
            .collect()
    }

    fn lease_range(&mut self, batch: u8, people: Vec<usize>, queue: &str) -> LeasedRange {
        self.next += 1;
        let id = range_ref(self.next);
        let items = people.iter().enumerate().map(|(offset, at)| {
            let person = &self.people[*at];
            LeasedRecipient {
                place: person.place,
                offset: u32::try_from(offset).expect("few"),
                row: row(person.index, &person.email),
                attempts: person.attempts,
                maybe_started: person.maybe_started,
                ambiguous_before: person.ambiguous,
                variant: 0,
            }
        });
        let range = LeasedRange {
            range: id,
            batch: Arc::new(head(batch)),
            queue: queue.into(),
            items: items.collect(),
            window: 8,
            expires_at: Timestamp::from_millis(0),
        };
        people
            .iter()
            .for_each(|at| self.people[*at].standing = Standing::Leased(id));
        let fake = FakeRange {
            people,
            until: self.now + LEASE,
            reported: HashSet::new(),
            window: 8,
            started: HashSet::new(),
        };
        self.ranges.insert(id, fake);
        range
    }

    fn renew(&mut self) {
        let asked_at = self.now;
        if self.chaos && self.random.u32(..3) == 0 {
            return self.soon(
                Event::Renewed {
                    held: None,
                    asked_at,
                },
                50,
            );
        }
        let held: Vec<_> = self.ranges.keys().copied().collect();
        self.ranges
            .values_mut()
            .for_each(|range| range.until = self.now + LEASE);
        self.soon(
            Event::Renewed {
                held: Some(held),
                asked_at,
            },
            50,
        );
    }

    fn release(&mut self, release: &Release) {
        self.soon(Event::HandedBack(vec![release.range]), 50);
        let Some(range) = self.ranges.remove(&release.range) else {
            return;
        };
        let requeue: HashSet<_> = release.requeue.iter().map(|(place, _)| *place).collect();
        let due = release.due_at.map_or(self.now, |at| self.instant(at));
        for at in range
            .people
            .iter()
            .filter(|at| !range.reported.contains(at))
        {
            assert!(
                !self.in_flight(*at),
                "seed {}: released while out",
                self.seed
            );
            let person = &mut self.people[*at];
            let own_queue = requeue.contains(&person.place);
            person.standing = Standing::Waiting { due, own_queue };
        }
    }

    fn resolve(&mut self, domain: Domain) {
        let trouble = |class, blame, is_final| Trouble {
            class,
            blame,
            text: "x".into(),
            reply: None,
            host: "".into(),
            is_final,
        };
        let answer = match domain.as_str() {
            "gone.example" => Err(trouble(
                model::Class::BadDomain,
                model::Blame::Recipient,
                true,
            )),
            _ if self.chaos && self.random.u32(..20) == 0 => Err(trouble(
                model::Class::DnsFailure,
                model::Blame::Destination,
                false,
            )),
            // Two domains share their hosts, and one asks for verified certificates.
            "a.example" | "b.example" => Ok(SHARED),
            other => Ok(other),
        };
        let answer = answer.map(|host| {
            let host = Host {
                preference: 0,
                name: host.into(),
                port: 25,
            };
            (
                Arc::new(Route::new(vec![host], false).asking(asked_by(domain.as_str()))),
                Duration::from_secs(self.random.u64(1..60)),
            )
        });
        self.soon(Event::Resolved { domain, answer }, 50);
    }

    fn open(&mut self, conn: ConnId, route: &Route) {
        let key = route.key().to_owned();
        let down = key.starts_with("dead")
            || (key.starts_with("mx.shared") && !self.down.is_empty() && self.chaos);
        let asks = route.asked().is_anything();
        let security = Security {
            host: SHARED.into(),
            level: if asks {
                Level::Verified
            } else {
                Level::Encrypted
            },
            dane_kept: false,
            observed: false,
        };
        let ready = Event::Ready(conn, Arc::new(security.clone()));
        let insecure = asks && self.chaos && self.random.u32(..4) == 0;
        self.conns.insert(
            conn,
            FakeConn {
                security,
                ready: false,
                jobs: Vec::new(),
                sent: 0,
                domain_down: down || insecure,
            },
        );
        if down || insecure {
            let trouble = Trouble {
                class: match insecure {
                    true => model::Class::TlsFailure,
                    false => model::Class::ConnectFailure,
                },
                blame: model::Blame::Destination,
                text: "refused".into(),
                reply: None,
                host: key.into(),
                is_final: false,
            };
            self.soon(Event::Closed(conn, ConnEnd::Unreachable(trouble)), 300);
        } else {
            self.soon(ready, 100);
        }
    }

    fn close(&mut self, id: ConnId) {
        let Some(conn) = self.conns.get_mut(&id) else {
            return;
        };
        if conn.domain_down {
            return;
        }
        conn.ready = false;
        self.later
            .retain(|_, event| !matches!(event, Event::Ready(other, _) if *other == id));
        for job in std::mem::take(&mut conn.jobs) {
            self.soon(Event::Report(job.id, Fate::Returned(Returned::Closed)), 20);
        }
        self.next += 1;
        self.later.insert(
            (self.now + Duration::from_millis(30), self.next),
            Event::Closed(id, ConnEnd::Planned),
        );
    }

    // ---- what must hold -------------------------------------------------------------------

    fn in_flight(&self, at: usize) -> bool {
        let person = &self.people[at];
        self.conns
            .values()
            .flat_map(|conn| &conn.jobs)
            .any(|job| job.item.place == person.place && job.item.batch.id == head(person.batch).id)
    }

    fn send(&mut self, job: Job) {
        let seed = self.seed;
        let at = self.person(job.item.batch.id, job.item.place);
        assert!(!self.in_flight(at), "seed {seed}: sent twice at a time");
        assert!(
            job.lease.allows_start(self.now),
            "seed {seed}: started at the end of a lease"
        );
        assert_eq!(
            self.view.permission(&job.item, job.leased_at),
            Permission::Go,
            "seed {seed}"
        );
        let person = &self.people[at];
        if let Some(range) = self.ranges.get_mut(&job.item.range) {
            // As long as the store has the lease: within the window, once, and not reported.
            assert_eq!(
                person.standing,
                Standing::Leased(job.item.range),
                "seed {seed}: sent though it is elsewhere"
            );
            assert!(
                job.item.offset < range.window,
                "seed {seed}: beyond the window"
            );
            assert!(
                !range.reported.contains(&at),
                "seed {seed}: sent though it has reported"
            );
            range.started.insert(at);
        }
        let Some(conn) = self.conns.get_mut(&job.conn).filter(|conn| conn.ready) else {
            // It has just ended, which the queue does not know yet.
            return self.soon(Event::Report(job.id, Fate::Returned(Returned::Closed)), 20);
        };
        conn.sent += 1;
        let asked = asked_by(job.item.row.email.domain());
        assert!(
            conn.security.satisfies(&asked, job.policy.limits.tls),
            "seed {seed}: {} over {:?}",
            job.item.row.email.domain(),
            conn.security
        );
        assert!(
            conn.jobs.len() < DEPTH && conn.sent <= 7,
            "seed {seed}: more than a connection takes"
        );
        conn.jobs.push(job);
    }

    fn check(&self) {
        let seed = self.seed;
        let shared = self.conns.len();
        // Two destinations of three connections, one of one, each from two sources.
        assert!(
            shared <= 2 * (3 + 3 + 1),
            "seed {seed}: {shared} connections"
        );
        assert!(
            self.queue.in_flight() <= shared * DEPTH + self.later.len(),
            "seed {seed}"
        );
    }

    fn open_people(&self) -> usize {
        self.people
            .iter()
            .filter(|person| person.standing != Standing::Final)
            .count()
    }
}

#[test]
fn nobody_is_lost_and_nothing_is_sent_that_must_not_be() {
    for seed in 0..SEEDS {
        let mut world = World::new(seed);
        for _ in 0..1_500 {
            world.step();
        }
        world.chaos = false;
        world.down.clear();
        for batch in std::mem::take(&mut world.paused) {
            world.tell(Control::Resumed(head(batch).id));
        }
        // Everybody but those of the dead domain, who expire after ten minutes.
        for _ in 0..40_000 {
            if world.open_people() == 0 {
                break;
            }
            world.step();
        }
        let open: Vec<_> = world
            .people
            .iter()
            .filter(|person| person.standing != Standing::Final)
            .collect();
        assert!(
            open.is_empty(),
            "seed {seed}: {} left, such as {:?}",
            open.len(),
            open.first()
        );
    }
}

#[test]
fn a_drain_hands_everything_back_wherever_it_comes() {
    for seed in 0..SEEDS {
        let mut world = World::new(seed);
        for _ in 0..world.random.usize(1..600) {
            world.step();
        }
        let actions = world.queue.apply([Event::Drain], world.clock());
        world.carry_out(actions);
        for _ in 0..3_000 {
            if world.drained {
                break;
            }
            world.step();
        }
        assert!(
            world.drained,
            "seed {seed}: {} out, {} leased",
            world.queue.in_flight(),
            world.queue.leased()
        );
        assert_eq!(
            (
                world.queue.in_flight(),
                world.queue.leased(),
                world.conns.len()
            ),
            (0, 0, 0),
            "seed {seed}"
        );
    }
}
