//! A world: it is made by a plan, disturbed for a while, left in peace, and judged.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use links::KeyRing;
use model::{
    Attempt, AttemptResult, BatchId, EventKind, MessageId, Priority, Status, SuppressionReason,
};
use service::clock::Clock as _;
use service::config::shaping::ShapingFile;
use service::config::{Config, Environment};
use service::metrics::MOST_DESTINATIONS;
use store::sqlite::{Role, SqliteOptions, SqliteStore};
use store::{
    BatchChange, BatchHead, EventQuery, NewBatch, RecipientQuery, RecipientRow, Store as _,
    Suppression, Suspension,
};
use testkit::smtp_peer::SmtpPeer;
use testkit::strand::Carriage;
use tokio::time::{Instant, sleep};

use super::network::{Door, Globe, Site, Zone};
use super::node::{Common, Node, WorldClock};
use super::peers::temper;
use super::plan::{Manner, Place, Plan};
use super::store::{Line, Reach, in_place};
use super::watch::{Bounds, Copy, Stop, Watch};
use crate::station;

/// Names a file for the whole story of a world that failed.
const STORY: &str = "HIKYAKU_SIMULATION_STORY";
/// A lease, shorter than by default, so that more of them end.
const LEASE: Duration = Duration::from_secs(20);
/// What is configured for the limited domain.
const LIMITED: Bounds = Bounds {
    connections: 2,
    messages: 5,
    rate: 4,
};
/// What a process does it counts within this, but while it does not reach the store.
const UNTOLD: Duration = Duration::from_secs(60);
/// When nothing disturbs it any more, mail to a host that takes it is out within this …
const SOON: Duration = Duration::from_secs(300);
/// … and everything has an end within this.
const AT_LAST: Duration = Duration::from_secs(1_200);

const CONFIG: &str = r#"
    [smtp]
    ehlo = "mta.brand.example"
    ambiguous_after = "10s"
    [smtp.timeouts]
    connect = "5s"
    greeting = "10s"
    ehlo = "30s"
    mail = "30s"
    rcpt = "30s"
    data = "30s"
    data_block = "30s"
    final_dot = "40s"
"#;

const SHAPING: &str = r#"
    [default]
    rate = "20/s"
    connections = 3
    messages_per_connection = 10
    retry = ["2s", "4s", "8s", "15s"]
    expire = "4m"
    [domain."limited.example"]
    rate = "4/s"
    connections = 2
    messages_per_connection = 5
    adaptive = false
"#;

/// What a world came to when all was well.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Summary {
    pub(super) recipients: usize,
    pub(super) transactions: u64,
    /// Copies beyond the first.
    pub(super) extra_copies: usize,
    /// Virtual time that passed.
    pub(super) took: Duration,
    /// When the last host that takes everything had its mail.
    pub(super) plain_done: Duration,
    /// Everything that happened.
    pub(super) story: Vec<String>,
}

/// A recipient of the world.
#[derive(Debug, Clone)]
struct Person {
    message: MessageId,
    place: usize,
    email: String,
}

pub(super) struct World {
    plan: Plan,
    random: fastrand::Rng,
    common: Common,
    nodes: Vec<Node>,
    people: Vec<Person>,
    batches: Vec<BatchId>,
    /// What is to happen when: see [`World::later`].
    later: BTreeMap<(Instant, u64), Later>,
    laters: u64,
    /// When the power went.
    cuts: Vec<Duration>,
    /// When a process ended without being asked.
    deaths: Vec<Duration>,
    /// Events by message, in their order.
    told: BTreeMap<MessageId, Vec<EventKind>>,
    /// Who was ended without anybody knowing whether an attempt was begun.
    doubted: BTreeSet<MessageId>,
    _dir: tempfile::TempDir,
}

/// The end of a trouble.
#[derive(Debug, Clone)]
enum Later {
    Start(usize),
    Thaw(usize),
    StoreUp,
    Door(std::net::IpAddr),
    Resume(BatchId),
    Lift(String),
}

impl World {
    /// Makes it and lets it live to its end.
    pub(super) async fn live(plan: Plan) -> Result<Summary, String> {
        let mut world = Self::new(plan).await;
        for node in 0..world.nodes.len() {
            world.nodes[node].start(&world.common).await;
        }
        let outcome = world.course().await;
        let watch = Arc::clone(&world.common.watch);
        let lines = |named: Option<&str>| watch.lines(named, 60);
        outcome.map_err(|why| {
            if let Some(file) = std::env::var_os(STORY) {
                std::fs::write(file, watch.story().join("\n")).expect("a file");
            }
            // A violation mostly names a message: what became of it says most.
            let named = why
                .split_whitespace()
                .find(|word| word.parse::<MessageId>().is_ok());
            let told = named.map_or_else(String::new, |name| {
                format!("\nof {name}:\n{}", lines(Some(name)))
            });
            format!("{why}{told}\nat last:\n{}", lines(None))
        })
    }

    async fn course(&mut self) -> Result<Summary, String> {
        let start = Instant::now();
        while start.elapsed() < self.plan.trouble_for {
            let time = Duration::from_millis(self.random.u64(20..1_500));
            self.pass(time).await;
            self.disturb().await;
            self.check()?;
        }
        self.heal().await;
        self.settle().await?;
        for node in &mut self.nodes {
            node.drain().await?;
        }
        self.tell();
        self.judge()
    }

    async fn new(plan: Plan) -> Self {
        let dir = directory();
        let options = SqliteOptions {
            path: dir.path().join("world.db"),
            partitions: 1,
            role: Role::Mta,
        };
        let store = Arc::new(in_place(SqliteStore::open(options)).expect("a store"));
        let bounds = BTreeMap::from([("limited.example".to_owned(), LIMITED)]);
        let watch = Arc::new(Watch::new(LEASE, bounds));
        let globe = Arc::new(globe(&plan, &watch));
        let config = dir.path().join("hikyaku.toml");
        std::fs::write(&config, CONFIG).expect("written");
        let environment: Environment = std::iter::empty::<(String, String)>().collect();
        let common = Common {
            clock: Arc::new(WorldClock::new()),
            store,
            line: Arc::new(Line {
                reach: Mutex::new(Reach::Up),
                random: Mutex::new(fastrand::Rng::with_seed(plan.seed ^ 1)),
            }),
            globe,
            watch,
            config: Config::load(Some(&config), &environment).expect("a configuration"),
            shaping: Arc::new(
                ShapingFile::parse(Path::new("shaping.toml"), SHAPING).expect("a shaping file"),
            ),
            ring: Arc::new(ArcSwap::from_pointee(
                KeyRing::parse(&KeyRing::file_text(&[7; 32])).expect("a ring"),
            )),
            lease: LEASE,
        };
        let mut world = Self {
            random: fastrand::Rng::with_seed(plan.seed ^ 2),
            nodes: (0..plan.nodes)
                .map(|number| Node::new(number, plan.seed))
                .collect(),
            plan,
            common,
            people: Vec::new(),
            batches: Vec::new(),
            later: BTreeMap::new(),
            laters: 0,
            cuts: Vec::new(),
            deaths: Vec::new(),
            told: BTreeMap::new(),
            doubted: BTreeSet::new(),
            _dir: dir,
        };
        for _ in 0..world.plan.batches {
            world.submit();
        }
        world
    }

    fn submit(&mut self) {
        let mut to = Vec::new();
        for (place, of) in self.plan.places.iter().enumerate() {
            for number in 0..of.people {
                to.push((place, format!("u{number}@{}", of.domain)));
            }
        }
        self.random.shuffle(&mut to);
        self.commit(to, Priority::Bulk);
    }

    /// A batch for these addresses, each with the number of its place.
    fn commit(&mut self, to: Vec<(usize, String)>, priority: Priority) -> BatchId {
        let now = self.common.clock.now();
        let id = BatchId::new(now, u128::from(self.random.u64(..)));
        let emails: Vec<_> = to.iter().map(|(_, email)| email.clone()).collect();
        let store = &self.common.store;
        in_place(store.stage_lots(id, station::lots(&emails))).expect("staged");
        let batch = NewBatch {
            head: BatchHead {
                priority,
                ..station::head(id, now)
            },
            content: station::content(&self.common.ring, &[]).into(),
            accepted: emails.len() as u64,
            rejected: 0,
            call: None,
        };
        in_place(store.commit_batch(batch, now)).expect("committed");
        for (index, (place, email)) in (0..).zip(to) {
            let message = MessageId { batch: id, index };
            self.people.push(Person {
                message,
                place,
                email,
            });
        }
        self.batches.push(id);
        id
    }

    /// While everybody waits for one host, so many are sent what must not wait, one after the
    /// other: how long each took from its acceptance until the host had it. The world ends there.
    pub(super) async fn urgent(plan: Plan, count: usize) -> Result<Vec<Duration>, String> {
        let mut world = Self::new(plan).await;
        world.nodes[0].start(&world.common).await;
        world.pass(Duration::from_secs(5)).await;
        let mut took = Vec::new();
        for number in 0..count {
            let wait = Duration::from_millis(world.random.u64(..2_000));
            world.pass(wait).await;
            let email = format!("urgent{number}@{}", world.plan.places[0].domain);
            let batch = world.commit(vec![(0, email)], Priority::Transactional);
            let message = MessageId { batch, index: 0 };
            let start = Instant::now();
            while world.common.watch.copies_of(message).is_empty() {
                if start.elapsed() > Duration::from_secs(60) {
                    return Err(world.common.watch.lines(None, 60));
                }
                world.pass(Duration::from_millis(10)).await;
            }
            took.push(start.elapsed());
            world.check()?;
        }
        Ok(took)
    }

    // ---- troubles -----------------------------------------------------------------------

    /// Lets time pass, and what is due happen.
    async fn pass(&mut self, time: Duration) {
        let until = Instant::now() + time;
        loop {
            let next = self.later.first_key_value().map(|(key, _)| *key);
            let Some(key) = next.filter(|(at, _)| *at <= until) else {
                break;
            };
            tokio::time::sleep_until(key.0).await;
            if let Some(later) = self.later.remove(&key) {
                self.end_trouble(later).await;
            }
        }
        tokio::time::sleep_until(until).await;
    }

    fn later(&mut self, within: std::ops::Range<u64>, what: Later) {
        let wait = Duration::from_millis(self.random.u64(within));
        self.laters += 1;
        self.later
            .insert((Instant::now() + wait, self.laters), what);
    }

    async fn end_trouble(&mut self, what: Later) {
        let watch = Arc::clone(&self.common.watch);
        match what {
            Later::Start(node) => {
                if !self.nodes[node].is_running() {
                    self.nodes[node].start(&self.common).await;
                }
            }
            Later::Thaw(node) => self.nodes[node].thaw(&watch),
            Later::StoreUp => self.reach(Reach::Up),
            Later::Door(address) => self.door(address, Door::Open),
            Later::Resume(batch) => self.change(batch, BatchChange::Resume),
            Later::Lift(domain) => {
                watch.go_on(&Stop::Domain(domain.clone()));
                let now = self.common.clock.now();
                in_place(self.common.store.resume(&domain, now)).expect("resumed");
            }
        }
    }

    /// Something happens, or not.
    async fn disturb(&mut self) {
        let troubles = self.plan.troubles;
        let node = self.random.usize(..self.nodes.len());
        match self.random.u8(..40) {
            0 if troubles.kills => {
                self.deaths.push(self.common.watch.age());
                self.nodes[node].kill(false, &self.common.watch).await;
                self.restart(node);
            }
            1 if troubles.power_cuts => {
                let since = self.nodes[node].frozen_since;
                let alive = since.map_or(Duration::ZERO, |since| since.elapsed());
                self.cuts
                    .push(self.common.watch.age().saturating_sub(alive));
                self.deaths.push(self.common.watch.age());
                self.nodes[node].kill(true, &self.common.watch).await;
                self.restart(node);
            }
            2 if troubles.freezes => {
                self.nodes[node].freeze(&self.common.watch);
                self.later(10..40_000, Later::Thaw(node));
            }
            3 if troubles.store => {
                let slow = Duration::from_millis(self.random.u64(100..5_000));
                let reach = [Reach::Down, Reach::Slow(slow)][self.random.usize(..2)];
                self.reach(reach);
                self.later(100..40_000, Later::StoreUp);
            }
            4..=8 if troubles.resets => {
                if let Some(strand) = self.common.globe.any_strand() {
                    self.common.watch.note("a connection breaks".to_owned());
                    strand.reset();
                }
            }
            9..=10 if troubles.stalls => {
                let how_long = self.random.u64(..120);
                let how_long = (how_long > 0).then(|| Duration::from_secs(how_long));
                if let Some(strand) = self.common.globe.any_strand() {
                    let line = format!("a connection stalls for {how_long:?}");
                    self.common.watch.note(line);
                    strand.stall(how_long);
                }
            }
            11 if troubles.hosts => {
                let sites = self.common.globe.sites.keys();
                let address = self.random.choice(sites).copied().expect("a site");
                let door = [Door::Shut, Door::Hole][self.random.usize(..2)];
                self.door(address, door);
                self.later(100..60_000, Later::Door(address));
            }
            12 if troubles.clock => {
                let millis = self.random.i64(-30_000..=30_000);
                self.common
                    .watch
                    .note(format!("the clock is set by {millis} ms"));
                self.common.clock.step(millis);
            }
            13..=15 if troubles.control => self.control(),
            _ => {}
        }
    }

    /// At once as by a supervisor, or when somebody has looked.
    fn restart(&mut self, node: usize) {
        let within = [1..500, 1..40_000][self.random.usize(..2)].clone();
        self.later(within, Later::Start(node));
    }

    fn reach(&self, reach: Reach) {
        self.common.watch.note(format!("the store is {reach:?}"));
        // Calls that are under way have the delay of before.
        (0..self.nodes.len()).for_each(|node| self.common.watch.troubled(node));
        let line = &self.common.line.reach;
        *line.lock().unwrap_or_else(PoisonError::into_inner) = reach;
    }

    fn door(&self, address: std::net::IpAddr, door: Door) {
        if let Some(site) = self.common.globe.sites.get(&address) {
            let line = format!("{} at {address} is {door:?}", site.domain);
            self.common.watch.note(line);
            *site.door.lock().unwrap_or_else(PoisonError::into_inner) = door;
        }
    }

    /// What users and operators do.
    fn control(&mut self) {
        let batch = self.batches[self.random.usize(..self.batches.len())];
        match self.random.u8(..10) {
            0..=2 => {
                self.change(batch, BatchChange::Pause);
                self.later(100..30_000, Later::Resume(batch));
            }
            3..=4 if self.random.bool() => self.change(batch, BatchChange::Cancel),
            5..=6 => self.suspend(),
            7..=9 => {
                let at = self.random.usize(..self.people.len());
                let person = self.people[at].clone();
                self.suppress(&person);
            }
            _ => {}
        }
    }

    fn change(&self, batch: BatchId, change: BatchChange) {
        let watch = &self.common.watch;
        let (stop, cancelled) = (Stop::Batch(batch), self.is_cancelled(batch));
        if cancelled {
            return;
        }
        watch.note(format!("{change:?} {batch}"));
        let now = self.common.clock.now();
        let outcome = in_place(self.common.store.change_batch(batch, change, now));
        let done = matches!(
            outcome.expect("an answer"),
            store::ChangeOutcome::Done { .. }
        );
        match change {
            BatchChange::Pause | BatchChange::Cancel if done => watch.stop(stop),
            BatchChange::Resume if done => watch.go_on(&stop),
            BatchChange::Start
            | BatchChange::Pause
            | BatchChange::PauseFor(_)
            | BatchChange::Resume
            | BatchChange::Cancel
            | BatchChange::Archive
            | BatchChange::Unarchive => {}
        }
    }

    fn is_cancelled(&self, batch: BatchId) -> bool {
        let batch = in_place(self.common.store.batch(batch)).expect("an answer");
        batch.expect("a batch").state == model::BatchState::Cancelled
    }

    fn suspend(&mut self) {
        // Only what has a section is a destination by that name.
        let domain = "limited.example".to_owned();
        let now = self.common.clock.now();
        let suspension = Suspension {
            destination: domain.as_str().into(),
            until: None,
            reason: "by hand".into(),
            by: "operator".into(),
            since: now,
        };
        in_place(self.common.store.suspend(suspension, now)).expect("suspended");
        self.common.watch.stop(Stop::Domain(domain.clone()));
        self.later(100..30_000, Later::Lift(domain));
    }

    fn suppress(&self, person: &Person) {
        let now = self.common.clock.now();
        let entry = Suppression {
            email: person.email.clone(),
            account: "default".to_owned(),
            list: None,
            reason: SuppressionReason::Manual,
            source: "api".to_owned(),
            created_at: now,
        };
        in_place(self.common.store.suppress(vec![entry], now)).expect("suppressed");
        for other in self.people.iter().filter(|of| of.email == person.email) {
            self.common.watch.stop(Stop::Message(other.message));
        }
    }

    /// Everything is well again, and stays so.
    async fn heal(&mut self) {
        self.common.watch.note("trouble ends".to_owned());
        while let Some((_, later)) = self.later.pop_first() {
            self.end_trouble(later).await;
        }
        for node in 0..self.nodes.len() {
            self.nodes[node].thaw(&self.common.watch);
        }
    }

    // ---- judgement ----------------------------------------------------------------------

    /// What holds at any moment.
    fn check(&self) -> Result<(), String> {
        if let Some(broken) = self.common.watch.broken().into_iter().next() {
            return Err(broken);
        }
        for node in &self.nodes {
            if let Some(fault) = node.fault() {
                return Err(fault);
            }
        }
        for id in &self.batches {
            let batch = in_place(self.common.store.batch(*id)).expect("an answer");
            let counters = batch.expect("a batch").counters;
            if counters.accepted != counters.statuses() {
                return Err(format!("{id} does not sum up: {counters:?}"));
            }
        }
        Ok(())
    }

    fn open(&self) -> u64 {
        let counters = |id: &BatchId| {
            let batch = in_place(self.common.store.batch(*id)).expect("an answer");
            batch.expect("a batch").counters.open()
        };
        self.batches.iter().map(counters).sum()
    }

    /// Waits until everybody has a final status.
    async fn settle(&mut self) -> Result<(), String> {
        let start = Instant::now();
        let mut looked = false;
        while self.open() > 0 {
            // One node is enough now; the others hand back what they hold.
            if let Some(node) = self.nodes.iter_mut().skip(1).find(|node| node.is_running())
                && start.elapsed() > LEASE * 2
            {
                node.drain().await?;
            }
            if start.elapsed() > SOON && !looked {
                looked = true;
                self.judge_progress()?;
            }
            if start.elapsed() > AT_LAST {
                let row = self
                    .rows()
                    .into_iter()
                    .find(|(_, row)| !row.status.is_final());
                return Err(match row {
                    Some((person, row)) => {
                        format!("{} has not ended, {:?}", person.message, row)
                    }
                    None => "counters say that somebody has not ended".to_owned(),
                });
            }
            sleep(Duration::from_secs(5)).await;
            self.check()?;
        }
        Ok(())
    }

    fn rows(&self) -> Vec<(&Person, RecipientRow)> {
        let mut rows = BTreeMap::new();
        for batch in &self.batches {
            let query = RecipientQuery {
                batch: *batch,
                from_index: 0,
                limit: 10_000,
                status: None,
                opened: None,
                clicked: None,
                domain: None,
                with_variant: false,
            };
            let mut query = query;
            loop {
                let page = in_place(self.common.store.recipients(query.clone()));
                let page = page.expect("an answer");
                let Some(last) = page.items.last() else {
                    break;
                };
                query.from_index = last.row.index + 1;
                for row in page.items {
                    let message = MessageId {
                        batch: *batch,
                        index: row.row.index,
                    };
                    rows.insert(message, row);
                }
            }
        }
        let row = |person: &Person| rows.get(&person.message).cloned().expect("a recipient");
        self.people
            .iter()
            .map(|person| (person, row(person)))
            .collect()
    }

    fn place(&self, person: &Person) -> &Place {
        &self.plan.places[person.place]
    }

    /// A host that takes everything has been given everything.
    fn judge_progress(&self) -> Result<(), String> {
        for (person, row) in self.rows() {
            if takes_all(self.place(person)) && !row.status.is_final() {
                let (message, status) = (person.message, row.status);
                let domain = &self.place(person).domain;
                return Err(format!(
                    "{message} waits for {domain}, which takes all: {status:?}, next {:?}",
                    row.next_attempt_at
                ));
            }
        }
        Ok(())
    }

    /// What must hold in the end.
    fn judge(&self) -> Result<Summary, String> {
        self.check()?;
        let (mut extra_copies, mut delivered) = (0, 0);
        let mut doubles = Doubles::default();
        let mut plain_done = Duration::ZERO;
        let rows = self.rows();
        self.judge_counters(&rows)?;
        for (person, row) in rows {
            let copies = self.common.watch.copies_of(person.message);
            let attempts = self.attempts(person.message);
            let results = attempts.iter().map(|attempt| attempt.result);
            delivered += results
                .filter(|result| *result == AttemptResult::Delivered)
                .count() as u64;
            self.judge_person(person, &row, &attempts)?;
            self.judge_event(person, &row, attempts.len())?;
            extra_copies += copies.len().saturating_sub(1);
            doubles.learn(&copies, &attempts, |at| self.is_untold(at));
            if let Some(copy) = copies.first().filter(|_| takes_all(self.place(person))) {
                plain_done = plain_done.max(copy.at);
            }
        }
        let counted: u64 = self.nodes.iter().map(Node::delivered).sum();
        // Where there are more destinations than labels, series come and go.
        let is_counted = self.deaths.is_empty() && self.plan.places.len() < MOST_DESTINATIONS;
        if is_counted && counted != delivered {
            return Err(format!(
                "{delivered} deliveries are kept, {counted} counted"
            ));
        }
        doubles.judge(self.nodes.iter().map(Node::duplicates).sum())?;
        if self.plan.is_sure() && extra_copies > 0 {
            return Err(format!("{extra_copies} copies too many, without any cause"));
        }
        Ok(Summary {
            recipients: self.people.len(),
            transactions: self.common.watch.mails(),
            extra_copies,
            took: self.common.watch.age(),
            plain_done,
            story: self.common.watch.story(),
        })
    }

    /// Somebody asked for it, or another message found out that the address does not exist.
    fn may_be_suppressed(&self, person: &Person) -> bool {
        let watch = &self.common.watch;
        let is_nowhere = matches!(self.place(person).zone, Zone::NoDomain | Zone::NullMx);
        let mut same = self.people.iter().filter(|of| of.email == person.email);
        is_nowhere
            || watch.was_stopped(&Stop::Message(person.message))
            || same.any(|of| watch.was_refused(of.message))
    }

    fn attempts(&self, message: MessageId) -> Vec<Attempt> {
        let story = in_place(self.common.store.message(message)).expect("an answer");
        story.expect("a message").attempts
    }

    /// What was done then may have been lost with the power.
    fn is_cut(&self, at: Duration) -> bool {
        let second = Duration::from_secs(1);
        let mut cuts = self.cuts.iter();
        cuts.any(|cut| at <= *cut + second && at + second >= *cut)
    }

    /// A process that did something then may have died before it could count or keep it.
    fn is_untold(&self, at: Duration) -> bool {
        let mut deaths = self.deaths.iter();
        self.is_cut(at) || deaths.any(|death| at <= *death && at + UNTOLD >= *death)
    }

    /// What became of a recipient in the end is told once, and as it was.
    fn judge_event(
        &self,
        person: &Person,
        row: &RecipientRow,
        attempts: usize,
    ) -> Result<(), String> {
        let message = person.message;
        let told = self.told.get(&message).cloned().unwrap_or_default();
        let ends = told
            .iter()
            .filter(|kind| **kind != EventKind::EmailTemporaryError);
        let ends: Vec<_> = ends.copied().collect();
        // A copy that came late overrules what was said before.
        let is_overruled = ends.len() == 2 && ends.last() == Some(&EventKind::EmailDelivered);
        if end_of(row.status) != ends.last().copied() || ends.len() > 1 && !is_overruled {
            return Err(format!(
                "{message} is {:?} and told as {told:?}",
                row.status
            ));
        }
        let tried = told.len() - ends.len();
        if tried > attempts {
            return Err(format!(
                "{message}: {tried} attempts are told of {attempts}"
            ));
        }
        Ok(())
    }

    /// The counters of each batch say what its recipients are.
    fn judge_counters(&self, rows: &[(&Person, RecipientRow)]) -> Result<(), String> {
        for id in &self.batches {
            let batch = in_place(self.common.store.batch(*id)).expect("an answer");
            let mut counters = batch.expect("a batch").counters;
            for status in Status::ALL.iter().copied() {
                let mine = rows
                    .iter()
                    .filter(|(person, _)| person.message.batch == *id);
                let real = mine.filter(|(_, row)| row.status == status).count() as u64;
                let counted = *counters.of(status);
                if counted != real {
                    return Err(format!("{id} counts {counted} {status:?} and has {real}"));
                }
            }
        }
        Ok(())
    }

    /// The events of all recipients, in their order.
    fn tell(&mut self) {
        let mut after = None;
        loop {
            let query = EventQuery {
                after: after.clone(),
                account: None,
                kinds: Vec::new(),
                batch: None,
                limit: 1_000,
            };
            let page = in_place(self.common.store.events(query)).expect("an answer");
            if page.events.is_empty() {
                return;
            }
            for event in page.events {
                if let Some(message) = event.message_id {
                    self.told.entry(message).or_default().push(event.kind);
                    // Ended by the store, since nobody was left who knew.
                    let unsent = [EventKind::EmailCancelled, EventKind::EmailSuppressed];
                    if unsent.contains(&event.kind) && event.data["ambiguous"] == true {
                        self.doubted.insert(message);
                    }
                }
            }
            after = Some(page.next);
        }
    }

    fn judge_person(
        &self,
        person: &Person,
        row: &RecipientRow,
        attempts: &[Attempt],
    ) -> Result<(), String> {
        let (message, watch) = (person.message, &self.common.watch);
        let wrong = |why: &str| Err(format!("{message} is {:?}: {why}", row.status));
        let copies = watch.copies_of(message);
        if copies
            .windows(2)
            .any(|pair| pair[0].digest != pair[1].digest)
        {
            return wrong("its copies differ");
        }
        let in_doubt = in_doubt(attempts) + usize::from(self.doubted.contains(&message));
        let unexcused = copies.iter().filter(|copy| !self.is_cut(copy.at)).count();
        let delivered = attempts
            .iter()
            .filter(|attempt| attempt.result == AttemptResult::Delivered)
            .count();
        if unexcused > delivered + in_doubt {
            return wrong(&format!(
                "{} copies, and {in_doubt} attempts in doubt: {attempts:?}",
                copies.len()
            ));
        }
        match row.status {
            Status::Delivered if copies.is_empty() => wrong("nobody got it"),
            Status::Bounce if !watch.was_refused(message) => wrong("nobody refused it"),
            Status::Suppressed if !self.may_be_suppressed(person) => wrong("nobody asked for that"),
            Status::Cancelled if !self.is_cancelled(message.batch) => {
                wrong("nobody asked for that")
            }
            Status::Failed if takes_all(self.place(person)) && in_doubt < 2 => {
                wrong(&format!("its host takes all: {attempts:?}"))
            }
            Status::Scheduled | Status::Queued | Status::TemporaryError => wrong("not final"),
            Status::Delivered
            | Status::Bounce
            | Status::Failed
            | Status::Suppressed
            | Status::Cancelled => Ok(()),
        }
    }
}

/// Attempts of which nobody knows whether they brought a copy.
fn in_doubt(attempts: &[Attempt]) -> usize {
    attempts
        .iter()
        .filter(|attempt| is_in_doubt(attempt))
        .count()
}

/// The event that tells of a final status.
fn end_of(status: Status) -> Option<EventKind> {
    match status {
        Status::Delivered => Some(EventKind::EmailDelivered),
        Status::Bounce => Some(EventKind::EmailBounced),
        Status::Failed => Some(EventKind::EmailFailed),
        Status::Suppressed => Some(EventKind::EmailSuppressed),
        Status::Cancelled => Some(EventKind::EmailCancelled),
        Status::Scheduled | Status::Queued | Status::TemporaryError => None,
    }
}

/// Second copies, as they were and as they may be counted.
#[derive(Debug, Default)]
struct Doubles {
    /// Messages that came more than once.
    real: u64,
    /// Of these, those of which a process may have died before it counted them.
    untold: u64,
    /// What may be counted at most: a sender in doubt counts what may have come, and the store what
    /// did come, and was told late.
    at_most: u64,
}

impl Doubles {
    fn learn(
        &mut self,
        copies: &[Copy],
        attempts: &[Attempt],
        is_untold: impl Fn(Duration) -> bool,
    ) {
        let extra = copies.len().saturating_sub(1);
        self.at_most += (extra + in_doubt(attempts)) as u64;
        if extra == 0 {
            return;
        }
        self.real += 1;
        // In doubt since its sender died, the last attempt is nobody's to count.
        let has_no_sender = attempts
            .last()
            .is_some_and(|last| last.detail.host.is_empty());
        let is_excused = has_no_sender || copies.iter().any(|copy| is_untold(copy.at));
        self.untold += u64::from(is_excused);
    }

    fn judge(&self, counted: u64) -> Result<(), String> {
        if counted + self.untold < self.real || counted > self.at_most {
            return Err(format!("{counted} second copies are counted: {self:?}"));
        }
        Ok(())
    }
}

fn is_in_doubt(attempt: &Attempt) -> bool {
    match attempt.result {
        AttemptResult::TemporaryError { ambiguous, .. } => ambiguous,
        // The second one in doubt: it is not tried again.
        AttemptResult::Failed => attempt.dot_at.is_some() && attempt.detail.smtp_code.is_none(),
        _ => false,
    }
}

/// Whether, once it is left in peace, a host takes everything at once.
fn takes_all(place: &Place) -> bool {
    let plain = matches!(place.manner, Manner::Plain | Manner::Old);
    plain && place.zone == Zone::Good
}

fn globe(plan: &Plan, watch: &Arc<Watch>) -> Globe {
    let mut random = fastrand::Rng::with_seed(plan.seed ^ 3);
    let zones: BTreeMap<_, _> = plan
        .places
        .iter()
        .map(|place| (place.domain.clone(), place.zone))
        .collect();
    let mut sites = BTreeMap::new();
    for place in &plan.places {
        let number = zones.keys().position(|domain| *domain == place.domain);
        let number = number.expect("a zone");
        for host in 1..=2 {
            let address = Globe::address(number, host);
            let carriage = match place.is_limited {
                true => Carriage {
                    delay: Duration::from_millis(20),
                    jitter: Duration::ZERO,
                    splits: false,
                },
                false => Carriage {
                    delay: Duration::from_millis(random.u64(1..80)),
                    jitter: Duration::from_millis(random.u64(..40)),
                    splits: true,
                },
            };
            let temper = temper(place.manner, random.u64(..), watch);
            sites.insert(
                address,
                Site {
                    domain: place.domain.clone(),
                    peer: SmtpPeer::detached((address, 25).into(), temper),
                    door: Mutex::new(Door::Open),
                    carriage,
                },
            );
        }
    }
    Globe::new(sites, zones, plan.seed ^ 4, watch)
}

/// In memory where the system has a place for that: what is durable is not the question here.
fn directory() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    let made = match memory.is_dir() {
        true => tempfile::tempdir_in(memory),
        false => tempfile::tempdir(),
    };
    made.expect("a directory")
}
