//! The queue's state: what was leased, where it waits, who carries it.
//!
//! Pure: events and the time go in, actions come out. Nothing in here waits, so nothing moves
//! under it.

mod dispatch;
mod holds;
mod leasing;
mod limits;
mod paces;
mod ranges;
mod shares;
mod snapshot;
mod sources;

pub use holds::KeptHold;
pub use limits::{LimitView, Limited, Remembered};
pub use shares::{Claim, Limit};

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use model::units::Rate;
use model::{Attempt, BatchId, Domain, MessageId, Place, Priority, Timestamp};
use service::config::shaping::{ShapingFile, WarmUp};
use service::config::{AmbiguousPolicy, StatusProfile};
use service::metrics::ThrottleReason;
use store::{Backlog, BatchHead, Control, LeasedRange, RangeRef, Release, Suspension, Want};

pub(super) use leasing::Appetite;

use super::control::ControlView;
use super::decide::{Finding, decide};
use super::job::{ConnId, Fate, Job, JobId, Policy, Returned, Trouble};
use super::lane::{Lane, Range, Waiting, Way};
use super::pool::{Pool, Pools};
use super::target::{Conn, Dest};
use crate::classify::Notice;
use crate::resolve::Route;
use crate::shaping::{Destination, Kept, SharedPacer, destination_of};
use crate::tlspolicy::Security;
use holds::Hold;
use paces::Pace;

/// Lookups of domains under way.
const RESOLVES_MAX: usize = 128;
/// Connections of the process whose peers answer; beyond, idle ones make room.
const CONNECTIONS_MAX: usize = 500;
/// Connections of the process, with those whose peers are slow.
const CONNECTIONS_ALL_MAX: usize = 800;
/// Sessions that may break under one message before that counts as an attempt.
const BROKEN_MAX: u8 = 3;
/// What is handed back when it has waited this long in a lot of several domains.
const PATIENCE: Duration = Duration::from_secs(20);
/// Between tidying of lanes where nothing waits, of turns whose messages were withdrawn, and of
/// destinations of which nothing is left to remember: there may be ten thousand.
const TIDY: Duration = Duration::from_secs(1);
/// A lookup that takes longer makes room for others, as far as there may be so many.
const RESOLVE_SLOW: Duration = Duration::from_secs(2);
/// Lookups of domains under way, the slow ones included.
const RESOLVES_ALL_MAX: usize = 2_048;
/// The pause after the journal had no room.
const JOURNAL_PAUSE: Duration = Duration::from_secs(1);

/// What the state is made with.
#[derive(Debug, Clone)]
pub struct QueueConfig {
    /// The length of a lease.
    pub lease: Duration,
    /// Limits and static routes.
    pub shaping: Arc<ShapingFile>,
    /// Egress sources, by pool.
    pub pools: Pools,
    /// Shares of accounts in a contended destination; of one that is not here, 1.
    pub weights: HashMap<String, u32>,
    /// What a delivery status means for further mail, by account; of one that is not here, the
    /// default.
    pub profiles: HashMap<String, StatusProfile>,
    /// The names of egress sources, by index.
    pub source_names: Arc<[Box<str>]>,
    /// What becomes of an ambiguous attempt.
    pub ambiguous: AmbiguousPolicy,
    /// When it is repeated at the earliest.
    pub ambiguous_after: Duration,
}

impl QueueConfig {
    /// The plan by which a source becomes known to a destination, if it is new there.
    fn warm_up(&self, source: usize, destination: &str) -> Option<WarmUp> {
        let name = self.source_names.get(source)?;
        let mut plans = self.shaping.warmups.iter();
        plans.find(|plan| plan.is_for(name, destination)).cloned()
    }
}

/// The time, both ways.
#[derive(Debug, Clone, Copy)]
pub struct Now {
    /// Monotonic: deadlines.
    pub instant: Instant,
    /// Wall clock: what is stored.
    pub wall: Timestamp,
}

/// What the queue is told.
#[derive(Debug)]
pub enum Event {
    /// The store's answer to [`Action::Look`]; `None`: it did not answer.
    Backlog(Option<Vec<Backlog>>),
    /// The store's answer to [`Action::Ask`], or what a restarted node got back; the monotonic
    /// time is from before it was asked.
    Leased {
        /// Empty when there was nothing, or the store did not answer.
        ranges: Vec<LeasedRange>,
        /// From before the store was asked.
        asked_at: Instant,
    },
    /// The store's answer to [`Action::Renew`].
    Renewed {
        /// What is still held; none: the store did not answer.
        held: Option<Vec<RangeRef>>,
        /// From before the store was asked.
        asked_at: Instant,
    },
    /// Facts were shipped.
    Shipped {
        /// New windows.
        windows: Vec<(RangeRef, u32)>,
        /// Ranges that are no longer held.
        lost: Vec<RangeRef>,
    },
    /// The store's answer to [`Action::Claim`].
    LimitShares {
        /// What was asked.
        claims: Vec<Claim>,
        /// In their order; none: the store did not answer.
        answers: Option<Vec<store::Share>>,
    },
    /// The store has these ranges back.
    HandedBack(Vec<RangeRef>),
    /// DNS has answered, or has not.
    Resolved {
        /// About whom.
        domain: Domain,
        /// Where its mail goes and how long that is known.
        answer: Result<(Arc<Route>, Duration), Trouble>,
    },
    /// A batch's content is compiled, or cannot be: `Err` with the reason and whether that is final.
    Content {
        /// Of which batch.
        batch: BatchId,
        /// Whether its messages can be composed.
        ready: Result<(), (String, bool)>,
    },
    /// A connection takes messages, and this is what it has to show.
    Ready(ConnId, Arc<Security>),
    /// What became of a message.
    Report(JobId, Fate),
    /// A destination asks for less, or wants none of this source, by what it said on a connection.
    /// With when the message that it answers was begun, if it answers one.
    Noticed(ConnId, Box<Notice>, Option<Instant>),
    /// What is kept of limits from former runs, and by other nodes.
    Remembered(Vec<Remembered>),
    /// Destinations that former runs, and other nodes, left alone.
    RememberedHolds(Vec<(Destination, KeptHold)>),
    /// A connection takes no more messages and is about to be gone.
    Closing(ConnId),
    /// A connection is gone; all its messages have been reported, or will be.
    Closed(ConnId, ConnEnd),
    /// An entry of the control feed, already in the [`ControlView`].
    Control(Control),
    /// All suspensions that hold, after some may have been missed.
    Suspensions(Vec<Suspension>),
    /// `shaping.toml` was read again.
    Shaping(Arc<ShapingFile>),
    /// Weights were read again.
    Shares(Shares),
    /// No new transaction; everything is to be handed back.
    Drain,
}

/// Who gets how much of what is contended.
#[derive(Debug)]
pub struct Shares {
    /// Of a destination, by account; of one that is not here, 1.
    pub accounts: HashMap<String, u32>,
    /// What a delivery status means for further mail, by account.
    pub profiles: HashMap<String, StatusProfile>,
    /// Of the mail of a batch, by pool and source; none: as before. No source that was in no pool.
    pub pools: Option<Pools>,
}

/// How a connection ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConnEnd {
    /// No host could be spoken to.
    Unreachable(Trouble),
    /// No host has an address that the egress source can reach; another source may.
    NoWay(Trouble),
    /// The egress source cannot connect to anybody: its address or its proxy is gone.
    SourceDown,
    /// The session broke after it had been ready.
    Broken,
    /// As planned: idle, enough messages, asked to.
    Planned,
}

/// What the queue wants done.
#[derive(Debug)]
pub enum Action {
    /// Ask the store what is due.
    Look,
    /// Lease from these queues.
    Ask(Vec<Want>),
    /// Renew all leases.
    Renew,
    /// Take, renew or give up shares of limits.
    Claim(Vec<Claim>),
    /// Tell shipping of a range before anything of it is sent.
    Register {
        /// The range.
        range: RangeRef,
        /// Its batch.
        batch: BatchId,
        /// The recipients, by place, with their offsets.
        places: Vec<(Place, u32)>,
        /// What may be started already.
        window: u32,
    },
    /// Hand a range back once its facts are shipped.
    Release(Release),
    /// Ship what there is: half of what a window lets through has reported.
    Hurry,
    /// Look up where a domain's mail goes.
    Resolve(Domain),
    /// Compile a batch's content.
    LoadContent(Arc<BatchHead>),
    /// Open a connection.
    Open {
        /// Its name.
        conn: ConnId,
        /// Where to.
        route: Arc<Route>,
        /// Under which limits.
        policy: Arc<Policy>,
        /// From which source.
        source: usize,
        /// What it takes from to begin a message.
        permits: SharedPacer,
    },
    /// Compose a message and hand it to its connection.
    Send(Job),
    /// End a connection when what it has begun is done.
    Close(ConnId),
    /// Put a fact that needed no transaction into the journal.
    Record {
        /// The fact.
        attempt: Box<Attempt>,
        /// When its batch was released.
        released_at: Timestamp,
    },
    /// The limits of a destination as they hold now.
    Limits(Box<Limited>),
    /// A destination has work that this kept waiting lately.
    Throttled(Destination, ThrottleReason),
    /// To be kept over a restart; without a value there is nothing to keep any more.
    Keep(Vec<(Destination, usize, Option<Kept>)>),
    /// Likewise: a destination is left alone, or no longer.
    KeepHold(Destination, Option<KeptHold>),
    /// Everything is handed back and no connection is left.
    Drained,
}

/// What is known of a leased batch.
#[derive(Debug)]
struct BatchState {
    head: Arc<BatchHead>,
    pool: Arc<Pool>,
    ranges: usize,
    content: Content,
}

#[derive(Debug, PartialEq, Eq)]
enum Content {
    Loading,
    Ready,
    /// Asked for again then.
    Wanted(Instant),
}

/// A message that a connection has.
#[derive(Debug)]
struct Out {
    waiting: Waiting,
    conn: ConnId,
}

/// Whether the store is being asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asking {
    No,
    Looking,
    Leasing,
}

/// The state; see the module.
#[derive(Debug)]
pub struct QueueState {
    config: QueueConfig,
    view: Arc<ControlView>,
    random: fastrand::Rng,
    started: Instant,
    lanes: HashMap<Box<str>, Lane>,
    dests: HashMap<Destination, Dest>,
    ranges: HashMap<RangeRef, Range>,
    /// Ranges whose lease ran out here and that the store does not have back yet.
    overdue: HashSet<RangeRef>,
    batches: HashMap<BatchId, BatchState>,
    /// Of batches with a rate of their own; outlives the ranges, or the rate would begin anew.
    paces: HashMap<BatchId, Pace>,
    /// When destinations are to be looked at again before the next tick.
    wakes: BTreeSet<(Instant, Destination)>,
    conns: HashMap<ConnId, Conn>,
    jobs: HashMap<JobId, Out>,
    to_resolve: VecDeque<Domain>,
    /// Lookups under way, and since when.
    resolving: HashMap<Domain, Instant>,
    /// How many of them have just begun.
    resolving_new: usize,
    /// Destinations that may have something to do.
    dirty: HashSet<Destination>,
    /// Destinations that wait for a connection of the process to become free.
    starved: VecDeque<Destination>,
    /// Connections that may have nothing to do; all that have not are here.
    unused: BTreeSet<ConnId>,
    /// Connections whose peers were slow at the last tick.
    slow: usize,
    /// Domains that are left alone, or were lately, so that nothing is leased for them.
    held: HashMap<Box<str>, Hold>,
    /// The queue that was wanted last.
    last_want: Option<Box<str>>,
    /// When stale turns are put away.
    tidy_at: Instant,
    /// Egress sources that cannot connect, by index.
    sources_down: HashMap<usize, sources::Down>,
    /// Domains whose destination is suspended or paused, likewise.
    barred: HashMap<Box<str>, Destination>,
    /// By destination, in the words of operators.
    suspensions: HashMap<Box<str>, Suspension>,
    /// Limits of former runs, for destinations that have no work yet.
    remembered: HashMap<(Destination, usize), Kept>,
    /// What they left alone, likewise.
    remembered_holds: HashMap<Destination, KeptHold>,
    limits_at: Instant,
    keep_at: Instant,
    paused_until: Option<Instant>,
    asking: Asking,
    look_at: Instant,
    renew_at: Instant,
    renewing: bool,
    /// What the store has for this node and nobody here knows of.
    strays: HashSet<RangeRef>,
    /// None: limits are kept by this node alone.
    shares: Option<shares::LimitShares>,
    /// The store had more than was leased.
    more: bool,
    /// Leased rows at which to ask again.
    low_water: usize,
    thirst: leasing::Thirst,
    draining: bool,
    next_id: u64,
}

impl QueueState {
    /// An empty queue at `now`; `seed` is its only source of chance.
    pub fn new(config: QueueConfig, view: Arc<ControlView>, seed: u64, now: Instant) -> Self {
        Self {
            config,
            view,
            random: fastrand::Rng::with_seed(seed),
            started: now,
            lanes: HashMap::new(),
            dests: HashMap::new(),
            ranges: HashMap::new(),
            overdue: HashSet::new(),
            batches: HashMap::new(),
            paces: HashMap::new(),
            wakes: BTreeSet::new(),
            conns: HashMap::new(),
            jobs: HashMap::new(),
            to_resolve: VecDeque::new(),
            resolving: HashMap::new(),
            resolving_new: 0,
            dirty: HashSet::new(),
            starved: VecDeque::new(),
            unused: BTreeSet::new(),
            slow: 0,
            held: HashMap::new(),
            sources_down: HashMap::new(),
            barred: HashMap::new(),
            suspensions: HashMap::new(),
            remembered: HashMap::new(),
            remembered_holds: HashMap::new(),
            limits_at: now,
            keep_at: now,
            last_want: None,
            tidy_at: now,
            paused_until: None,
            asking: Asking::No,
            look_at: now,
            renew_at: now,
            renewing: false,
            strays: HashSet::new(),
            shares: None,
            more: false,
            low_water: 0,
            thirst: leasing::Thirst::new(now),
            draining: false,
            next_id: 0,
        }
    }

    /// Takes events, in order, and says what is to be done.
    pub fn apply(&mut self, events: impl IntoIterator<Item = Event>, now: Now) -> Vec<Action> {
        let mut out = Vec::new();
        for event in events {
            self.take(event, now, &mut out);
        }
        self.settle(now, &mut out);
        out
    }

    /// What the passing of time alone brings; to be called every [`QueueState::TICK`].
    pub fn tick(&mut self, now: Now) -> Vec<Action> {
        let mut out = Vec::new();
        self.tick_ranges(now, &mut out);
        self.tick_contents(now, &mut out);
        self.tick_limits(now, &mut out);
        self.tick_holds(now.instant);
        self.tick_resolves(now.instant);
        self.tick_conns(now.instant);
        let Self { paces, batches, .. } = self;
        paces.retain(|batch, pace| batches.contains_key(batch) || !pace.is_idle(now.instant));
        if now.instant >= self.tidy_at {
            self.tidy_at = now.instant + TIDY;
            let Self { dests, lanes, .. } = self;
            // Not as soon as they are empty: how much to lease next for a domain is judged by where
            // its mail goes. One that is being looked up is kept. Before the destinations, or one
            // would be forgotten to which a lane leads.
            lanes.retain(|_, lane| !lane.is_empty() || matches!(lane.way, Way::Asked));
            for dest in dests.values_mut() {
                dest.turns.retain(|batch, name| {
                    lanes.get(name).is_some_and(|lane| lane.has_batch(batch))
                });
            }
            self.dests.retain(|_, dest| !dest.is_idle(now.instant));
        }
        let with_work = self
            .dests
            .iter()
            .filter(|(_, dest)| !dest.turns.is_empty() && !dest.only_waits())
            .map(|(key, _)| key.clone());
        self.dirty.extend(with_work);
        self.settle(now, &mut out);
        out
    }

    /// When [`QueueState::wake`] is to be called, if that is before the next tick.
    pub fn wakes_at(&self) -> Option<Instant> {
        self.wakes.first().map(|(at, _)| *at)
    }

    /// Looks at what had to wait until now.
    pub fn wake(&mut self, now: Now) -> Vec<Action> {
        let mut out = Vec::new();
        while let Some((at, key)) = self.wakes.pop_first() {
            if at > now.instant {
                self.wakes.insert((at, key));
                break;
            }
            self.dirty.insert(key);
        }
        self.settle(now, &mut out);
        out
    }

    /// How often [`QueueState::tick`] is to be called.
    pub const TICK: Duration = Duration::from_millis(100);

    /// Recipients leased and not reported yet.
    pub fn leased(&self) -> usize {
        self.ranges
            .values()
            .map(|range| range.waiting + range.out)
            .sum()
    }

    /// Messages at connections.
    pub fn in_flight(&self) -> usize {
        self.jobs.len()
    }

    /// Batches with something leased.
    pub fn batches(&self) -> impl Iterator<Item = BatchId> + '_ {
        self.batches.keys().copied()
    }

    fn take(&mut self, event: Event, now: Now, out: &mut Vec<Action>) {
        match event {
            Event::Backlog(backlog) => self.on_backlog(backlog, now, out),
            Event::Leased { ranges, asked_at } => self.on_leased(ranges, asked_at, now, out),
            Event::Renewed { held, asked_at } => self.on_renewed(held, asked_at, out),
            Event::Shipped { windows, lost } => self.on_shipped(&windows, &lost, out),
            Event::HandedBack(ranges) => {
                for range in ranges {
                    self.overdue.remove(&range);
                }
            }
            Event::Resolved { domain, answer } => self.on_resolved(&domain, answer, now, out),
            Event::Content { batch, ready } => self.on_content(batch, ready, now, out),
            Event::Ready(conn, security) => self.on_ready(conn, security, now.instant, out),
            Event::Report(job, fate) => self.on_report(job, fate, now, out),
            Event::Noticed(conn, notice, began) => {
                self.on_notice(conn, &notice, began, now, out);
            }
            Event::Remembered(all) => self.on_remembered(all),
            Event::RememberedHolds(all) => self.on_remembered_holds(all),
            Event::Closing(conn) => self.on_closing(conn),
            Event::Closed(conn, end) => self.on_closed(conn, &end, now, out),
            Event::Control(control) => self.on_control(&control, now, out),
            Event::Suspensions(all) => self.on_suspensions(&all, now, out),
            Event::Shaping(shaping) => self.on_shaping(shaping),
            Event::Shares(shares) => self.on_shares(shares),
            Event::LimitShares { claims, answers } => {
                self.on_limit_shares(&claims, answers, now.instant, out)
            }
            Event::Drain => self.on_drain(out),
        }
    }

    /// Gives everything that may have something to do its turn.
    fn settle(&mut self, now: Now, out: &mut Vec<Action>) {
        let mut dirty = std::mem::take(&mut self.dirty);
        for destination in dirty.drain() {
            self.pump(&destination, now, out);
        }
        // Its room is of use again; whoever got dirty meanwhile has it in the next turn.
        dirty.extend(self.dirty.drain());
        self.dirty = dirty;
        self.start_resolves(now.instant, out);
        self.ask_store(now, out);
        self.ask_shares(now, out);
        if self.draining && self.jobs.is_empty() && self.conns.is_empty() && self.ranges.is_empty()
        {
            out.push(Action::Drained);
        }
    }

    // ---- domains ------------------------------------------------------------------------

    fn start_resolves(&mut self, now: Instant, out: &mut Vec<Action>) {
        while self.resolving_new < RESOLVES_MAX && self.resolving.len() < RESOLVES_ALL_MAX {
            let Some(domain) = self.to_resolve.pop_front() else {
                return;
            };
            self.resolving_new += 1;
            self.resolving.insert(domain.clone(), now);
            out.push(Action::Resolve(domain));
        }
    }

    /// Lookups that take long do not hold up the others.
    fn tick_resolves(&mut self, now: Instant) {
        let is_new = |at: &&Instant| now.saturating_duration_since(**at) < RESOLVE_SLOW;
        self.resolving_new = self.resolving.values().filter(is_new).count();
    }

    fn on_resolved(
        &mut self,
        domain: &Domain,
        answer: Result<(Arc<Route>, Duration), Trouble>,
        now: Now,
        out: &mut Vec<Action>,
    ) {
        self.resolving.remove(domain);
        self.resolving_new = self
            .resolving_new
            .saturating_sub(1)
            .min(self.resolving.len());
        let Some(lane) = self.lanes.get_mut(domain.as_str()) else {
            return;
        };
        match answer {
            Ok((route, ttl)) => {
                let names: Vec<&str> = route.names().collect();
                let (destination, limits) = destination_of(domain, &names, &self.config.shaping);
                lane.way = Way::Known {
                    destination: destination.clone(),
                    route,
                    until: now.instant + ttl,
                };
                let policy = Arc::new(policy(&self.config, destination.clone(), limits));
                let Self {
                    dests,
                    remembered,
                    config,
                    started,
                    shares,
                    ..
                } = self;
                let dest = dests.entry(destination.clone()).or_insert_with(|| {
                    let sources = config.pools.sources();
                    if let Some(shares) = shares.as_mut() {
                        shares.hurry(now.instant);
                    }
                    let part = |source| {
                        let limit = Limit::Destination(destination.clone(), source);
                        shares::first_part(shares.as_ref(), &limit)
                    };
                    let mut dest =
                        Dest::new(Arc::clone(&policy), &sources, part, *started, now.instant);
                    dest.warm_up(|source| config.warm_up(source, destination.as_str()), now);
                    dest.recall(
                        |source| remembered.remove(&(destination.clone(), source)),
                        now,
                    );
                    dest
                });
                if dest.policy.limits != policy.limits {
                    dest.change(policy, now.instant);
                }
                dest.warm_up(|source| config.warm_up(source, destination.as_str()), now);
                self.recall_hold(&destination, now);
                self.lift_domain(domain.as_str());
                self.take_turns(domain.as_str());
                self.dirty.insert(destination);
                self.respect_hold(domain.as_str(), now, out);
            }
            Err(trouble) if trouble.is_final => {
                lane.way = Way::Unknown;
                let waiting = lane.drain();
                self.lanes.remove(domain.as_str());
                for one in waiting {
                    self.end_waiting(&one, Finding::Unreachable(trouble.clone()), now, out);
                }
            }
            Err(trouble) => self.not_found(domain, &trouble, now, out),
        }
    }

    /// Lines up what waits at a domain for its destination.
    fn take_turns(&mut self, name: &str) {
        let Self {
            lanes,
            dests,
            config,
            ..
        } = self;
        let Some(lane) = lanes.get(name) else { return };
        if let Way::Known { destination, .. } = &lane.way
            && let Some(dest) = dests.get_mut(destination)
        {
            for (batch, _) in lane.batches() {
                let weight = config.weights.get(&batch.account).copied().unwrap_or(1);
                let account = (batch.account.as_str(), weight);
                dest.turns.add(batch.priority, account, batch.id, name);
            }
        }
    }

    fn weight_of_account(&self, account: &str) -> u32 {
        self.config.weights.get(account).copied().unwrap_or(1)
    }

    /// The policy for a domain whose destination is not known (yet).
    fn policy_of(&self, waiting: &Waiting) -> Arc<Policy> {
        let name = waiting.item.row.email.domain();
        if let Some(Way::Known { destination, .. }) = self.lanes.get(name).map(|lane| &lane.way)
            && let Some(dest) = self.dests.get(destination)
        {
            return Arc::clone(&dest.policy);
        }
        let limits = name
            .parse()
            .ok()
            .and_then(|domain: Domain| self.config.shaping.domains.get(&domain));
        let limits = limits.unwrap_or(&self.config.shaping.default).clone();
        Arc::new(policy(&self.config, Destination::named(name), limits))
    }

    // ---- facts without a transaction ----------------------------------------------------

    /// Ends a message that was taken out of its lane.
    fn end_waiting(
        &mut self,
        waiting: &Waiting,
        finding: Finding,
        now: Now,
        out: &mut Vec<Action>,
    ) {
        let policy = self.policy_of(waiting);
        let attempt = decide(finding, &waiting.item, &policy, now.wall, self.random.f64());
        let (attempt, released_at) = (Box::new(attempt), waiting.item.release_at());
        out.push(Action::Record {
            attempt,
            released_at,
        });
        if let Some(range) = self.ranges.get_mut(&waiting.item.range) {
            range.waiting = range.waiting.saturating_sub(1);
        }
        self.tidy_range(waiting.item.range, now, out);
    }

    // ---- content ------------------------------------------------------------------------

    fn on_content(
        &mut self,
        batch: BatchId,
        ready: Result<(), (String, bool)>,
        now: Now,
        out: &mut Vec<Action>,
    ) {
        let Some(state) = self.batches.get_mut(&batch) else {
            return;
        };
        match ready {
            Ok(()) => {
                state.content = Content::Ready;
                self.mark_batch_dirty(batch);
            }
            Err((_, false)) => {
                state.content = Content::Wanted(now.instant + Duration::from_secs(1))
            }
            Err((reason, true)) => {
                for waiting in self.withdraw_batch(batch) {
                    self.end_waiting(&waiting, Finding::Unmade(reason.clone()), now, out);
                }
            }
        }
    }

    fn tick_contents(&mut self, now: Now, out: &mut Vec<Action>) {
        for state in self.batches.values_mut() {
            if matches!(state.content, Content::Wanted(at) if at <= now.instant) {
                state.content = Content::Loading;
                out.push(Action::LoadContent(Arc::clone(&state.head)));
            }
        }
    }

    // ---- control ------------------------------------------------------------------------

    fn on_control(&mut self, control: &Control, now: Now, out: &mut Vec<Action>) {
        match control {
            Control::Work | Control::Resumed(_) => self.look_at = now.instant,
            Control::Paused(batch) => {
                for range in self.ranges_of(*batch) {
                    self.return_range(range, None, now, out);
                }
            }
            Control::Cancelled(batch) => {
                for waiting in self.withdraw_batch(*batch) {
                    self.end_waiting(&waiting, Finding::Cancelled, now, out);
                }
            }
            // Looked at when a message's turn comes.
            Control::Suppressed(_) | Control::Unsuppressed { .. } => {}
            // The tracker's.
            Control::Archived(_) | Control::Unarchived(_) => {}
            Control::DestinationSuspended(suspension) => self.on_suspended(suspension, now, out),
            Control::DestinationResumed(destination) => self.on_unsuspended(destination, now),
        }
    }

    /// New limits hold from the next message on: every domain is placed anew.
    fn on_shaping(&mut self, shaping: Arc<ShapingFile>) {
        self.config.shaping = shaping;
        for dest in self.dests.values_mut() {
            dest.turns.clear();
        }
        for lane in self.lanes.values_mut() {
            if matches!(lane.way, Way::Known { .. }) {
                lane.way = Way::Asked;
                self.to_resolve.push_back(lane.domain.clone());
            }
        }
    }

    /// New weights hold from the next message on.
    fn on_shares(&mut self, shares: Shares) {
        (self.config.weights, self.config.profiles) = (shares.accounts, shares.profiles);
        if let Some(pools) = shares.pools {
            for batch in self.batches.values_mut() {
                batch.pool = Arc::clone(pools.of(batch.head.pool.as_deref()));
            }
            self.config.pools = pools;
        }
        let names: Vec<_> = self.lanes.keys().cloned().collect();
        names.iter().for_each(|name| self.take_turns(name));
        self.dirty.extend(self.dests.keys().cloned());
    }

    fn on_drain(&mut self, out: &mut Vec<Action>) {
        self.draining = true;
        let all: Vec<_> = self.ranges.keys().copied().collect();
        let now = Now {
            instant: self.started,
            wall: Timestamp::default(),
        };
        for range in all {
            self.return_range(range, None, now, out);
        }
        for (id, conn) in &mut self.conns {
            conn.closing = true;
            out.push(Action::Close(*id));
        }
    }

    fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }
}

fn policy(
    config: &QueueConfig,
    destination: Destination,
    limits: service::config::shaping::Limits,
) -> Policy {
    Policy {
        destination,
        limits,
        ambiguous: config.ambiguous,
        ambiguous_after: config.ambiguous_after,
    }
}
