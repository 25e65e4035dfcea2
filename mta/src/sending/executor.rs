//! Carries out what the queue decides: the task that owns its state.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use model::Domain;
use service::clock::SharedClock;
use service::metrics::{Metrics, ThrottleReason};
use service::tasks::{Shutdown, Stage, Tasks};
use store::BatchHead;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::Ask;
use super::asking::{Asking, Question};
use super::limits::LimitNotes;
use super::shares::Sharing;
use crate::compose::{Composed, Composer, Contents, LoadError, Request};
use crate::deliver::{Deliver, Plan};
use crate::explain::troubles::Troubles;
use crate::queue::job::{ConnId, Fate, Job, Returned};
use crate::queue::{Action, ConnEnd, DEPTH, Event, Limited, Now, QueueState};
use crate::resolve::Resolver;
use crate::shaping::Destination;
use crate::ship::{Recorder, ShipCommand};
use crate::tlspolicy::Policies;

/// Events taken in one turn.
const EVENTS_PER_TURN: usize = 1_024;

/// What the executor is made of.
pub(super) struct Parts {
    pub(super) state: QueueState,
    pub(super) events: mpsc::Receiver<Event>,
    pub(super) asked: mpsc::Receiver<Ask>,
    pub(super) troubles: Arc<Troubles>,
    pub(super) queue: mpsc::Sender<Event>,
    pub(super) ship: mpsc::Sender<ShipCommand>,
    pub(super) asking: Asking,
    pub(super) limits: LimitNotes,
    pub(super) sharing: Sharing,
    pub(super) resolver: Arc<Resolver>,
    pub(super) policies: Arc<Policies>,
    pub(super) contents: Arc<Contents>,
    pub(super) composer: Composer,
    pub(super) deliver: Arc<Deliver>,
    pub(super) recorder: Arc<Recorder>,
    pub(super) clock: SharedClock,
    pub(super) metrics: Arc<Metrics>,
    pub(super) tasks: Tasks,
    pub(super) shutdown: Shutdown,
    pub(super) failed: CancellationToken,
}

/// The task; see the module.
pub(super) struct Executor {
    parts: Parts,
    /// Commands for which shipping had no room yet; no more than a few for each leased range.
    unsent: VecDeque<ShipCommand>,
    /// Messages of this turn.
    to_compose: Vec<Request>,
    /// What came of carrying out an action at once.
    at_once: Vec<Event>,
    conns: HashMap<ConnId, Wiring>,
    /// Egress sources as metrics show them.
    sources: Vec<(usize, bool)>,
    drained: bool,
}

/// The way to a connection.
struct Wiring {
    jobs: mpsc::Sender<Composed>,
    quit: CancellationToken,
    destination: Destination,
}

impl Executor {
    pub(super) fn new(parts: Parts) -> Self {
        Self {
            parts,
            unsent: VecDeque::new(),
            to_compose: Vec::new(),
            at_once: Vec::new(),
            conns: HashMap::new(),
            sources: Vec::new(),
            drained: false,
        }
    }

    /// Tells the process that sending cannot go on.
    pub(super) fn fail(&self) {
        self.parts.failed.cancel();
    }

    /// Runs until everything is handed back after the end was asked for, or the drain goes on
    /// without.
    pub(super) async fn run(mut self, first: Vec<Event>) {
        self.apply(first);
        let mut ticks = tokio::time::interval(QueueState::TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let shutdown = self.parts.shutdown.clone();
        let failed = self.parts.failed.clone();
        let mut draining = false;
        let mut events = Vec::with_capacity(EVENTS_PER_TURN);
        while !self.drained {
            let wake = self.parts.state.wakes_at();
            tokio::select! {
                // In this order: what comes seldom first, so that events, of which there are always
                // some, keep nothing waiting.
                biased;
                _ = ticks.tick() => self.tick(),
                () = until(wake), if wake.is_some() => self.wake(),
                Some(ask) = self.parts.asked.recv() => self.answer(ask),
                () = shutdown.begun(), if !draining => {
                    draining = true;
                    self.apply(vec![Event::Drain]);
                }
                () = failed.cancelled(), if !draining => {
                    draining = true;
                    self.apply(vec![Event::Drain]);
                }
                () = shutdown.reached(Stage::Journal) => break,
                _ = self.parts.events.recv_many(&mut events, EVENTS_PER_TURN) => {
                    self.gather(&mut events).await;
                    self.apply(std::mem::take(&mut events));
                }
            }
            while !self.at_once.is_empty() {
                let events = std::mem::take(&mut self.at_once);
                self.apply(events);
            }
        }
        self.finish().await;
    }

    /// Whoever asked may have gone: then nobody hears it.
    fn answer(&self, ask: Ask) {
        drop(
            ask.answer
                .send(self.parts.state.snapshot(&ask.scope, self.now())),
        );
    }

    /// Lets everybody who is ready tell what there is to tell, so that one turn serves all: a task
    /// that is woken runs before those that were ready before it, and would take each reply alone.
    async fn gather(&mut self, events: &mut Vec<Event>) {
        tokio::task::yield_now().await;
        while events.len() < EVENTS_PER_TURN
            && let Ok(event) = self.parts.events.try_recv()
        {
            events.push(event);
        }
    }

    async fn finish(self) {
        let Parts { events, ship, .. } = self.parts;
        // Whoever still has something to tell must not wait for an answer: shipping least of all.
        drop(events);
        for command in self.unsent.into_iter().chain([ShipCommand::Finish]) {
            if ship.send(command).await.is_err() {
                tracing::debug!("shipping has ended before the queue");
            }
        }
    }

    fn now(&self) -> Now {
        Now {
            instant: self.parts.clock.instant(),
            wall: self.parts.clock.now(),
        }
    }

    fn apply(&mut self, events: Vec<Event>) {
        for event in &events {
            if let Event::Closed(conn, end) = event
                && let Some(wiring) = self.conns.remove(conn)
                && let ConnEnd::Unreachable(trouble) = end
            {
                let (metrics, at) = (&self.parts.metrics, self.parts.clock.now());
                let label = metrics.destination(wiring.destination.as_str());
                metrics.throttled(&label, ThrottleReason::Backoff).inc();
                let troubles = &self.parts.troubles;
                troubles.unreachable(&wiring.destination, trouble, at);
            }
        }
        let now = self.now();
        let actions = self.parts.state.apply(events, now);
        self.carry_out(actions);
    }

    fn tick(&mut self) {
        let now = self.now();
        let actions = self.parts.state.tick(now);
        self.carry_out(actions);
        let sources = self.parts.state.sources();
        if sources != self.sources {
            self.show_sources(&sources);
            self.sources = sources;
        }
    }

    fn show_sources(&self, sources: &[(usize, bool)]) {
        for (index, is_up) in sources {
            if let Some(name) = self.parts.limits.source(*index) {
                self.parts.metrics.egress_source(name, *is_up);
            }
        }
    }

    fn wake(&mut self) {
        let now = self.now();
        let actions = self.parts.state.wake(now);
        self.carry_out(actions);
    }

    fn carry_out(&mut self, actions: Vec<Action>) {
        for action in actions {
            self.act(action);
        }
        // Shipping knows a range before anything of it can be reported.
        if !self.tell_shipping() {
            return;
        }
        for request in self.parts.composer.send(self.to_compose.drain(..)) {
            self.at_once.push(closed(&request.job));
        }
    }

    /// Hands over what shipping is to know; false when it has not taken all of it yet.
    fn tell_shipping(&mut self) -> bool {
        while let Some(command) = self.unsent.pop_front() {
            match self.parts.ship.try_send(command) {
                Ok(()) => {}
                Err(mpsc::error::TrySendError::Full(command)) => {
                    self.unsent.push_front(command);
                    return false;
                }
                Err(mpsc::error::TrySendError::Closed(_)) => {}
            }
        }
        true
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Look if !self.parts.recorder.has_room() => {
                tracing::warn!("the journal is full, no new work is taken");
                self.at_once.push(Event::Backlog(None));
            }
            Action::Look => {
                if !self.parts.asking.ask(Question::Look) {
                    self.at_once.push(Event::Backlog(None));
                }
            }
            Action::Ask(wants) => {
                if !self.parts.asking.ask(Question::Lease(wants)) {
                    self.at_once.push(Event::Leased {
                        ranges: Vec::new(),
                        asked_at: self.parts.clock.instant(),
                    });
                }
            }
            Action::Renew => {
                if !self.parts.asking.renew() {
                    self.at_once.push(Event::Renewed {
                        held: None,
                        asked_at: self.parts.clock.instant(),
                    });
                }
            }
            Action::Register {
                range,
                batch,
                places,
                window,
            } => {
                self.unsent.push_back(ShipCommand::Register {
                    range,
                    batch,
                    places,
                    window,
                });
            }
            Action::Release(release) => self.unsent.push_back(ShipCommand::Release(release)),
            Action::Hurry => self.unsent.push_back(ShipCommand::Hurry),
            Action::Resolve(domain) => self.resolve(domain),
            Action::LoadContent(head) => self.load(head),
            Action::Open {
                conn,
                route,
                policy,
                source,
                permits,
            } => {
                // One more than are handed out in turn: what is transactional goes before them.
                let (jobs, receiver) = mpsc::channel(DEPTH + 1);
                let quit = CancellationToken::new();
                self.open(
                    jobs,
                    Plan {
                        conn,
                        route,
                        policy,
                        source,
                        permits,
                        jobs: receiver,
                        quit,
                    },
                );
            }
            Action::Send(job) => self.send(job),
            Action::Close(conn) => {
                if let Some(wiring) = self.conns.get(&conn) {
                    wiring.quit.cancel();
                }
            }
            Action::Record {
                mut attempt,
                released_at,
            } => {
                let troubles = &self.parts.troubles;
                troubles.account_for(&mut attempt, released_at);
                self.parts.recorder.outcome(*attempt, released_at);
            }
            Action::Limits(limited) => self.show_limits(&limited),
            Action::Throttled(destination, reason) => {
                let label = self.parts.metrics.destination(destination.as_str());
                self.parts.metrics.throttled(&label, reason).inc();
            }
            Action::Claim(claims) => {
                if let Err(claims) = self.parts.sharing.ask(claims) {
                    let answers = None;
                    self.at_once.push(Event::LimitShares { claims, answers });
                }
            }
            Action::Keep(limits) => self.parts.limits.keep(limits, self.now()),
            Action::KeepHold(destination, hold) => {
                self.parts.limits.keep_hold(&destination, hold.as_ref());
            }
            Action::Drained => self.drained = true,
        }
    }

    fn open(&mut self, jobs: mpsc::Sender<Composed>, plan: Plan) {
        let wiring = Wiring {
            jobs,
            quit: plan.quit.clone(),
            destination: plan.policy.destination.clone(),
        };
        self.conns.insert(plan.conn, wiring);
        let run = Arc::clone(&self.parts.deliver).run(plan);
        self.parts.tasks.spawn("smtp", run);
    }

    /// Shows the limits of a destination, and tells what changed.
    fn show_limits(&self, limited: &Limited) {
        let metrics = &self.parts.metrics;
        let label = metrics.destination(limited.destination.as_str());
        for (kind, in_force, base) in limited.values {
            metrics.limit(&label, kind, in_force, base);
        }
        self.parts.limits.changed(limited, self.now());
    }

    fn send(&mut self, job: Job) {
        match self.conns.get(&job.conn) {
            Some(wiring) => self.to_compose.push(Request {
                job,
                to: wiring.jobs.clone(),
            }),
            None => self.at_once.push(closed(&job)),
        }
    }

    fn resolve(&self, domain: Domain) {
        let (resolver, queue) = (Arc::clone(&self.parts.resolver), self.parts.queue.clone());
        let policies = Arc::clone(&self.parts.policies);
        let shutdown = self.parts.shutdown.clone();
        self.parts.tasks.spawn("resolve", async move {
            let asked = async {
                let (route, ttl) = resolver.route(&domain).await?;
                Ok((policies.judge(&domain, route).await, ttl))
            };
            let answer = tokio::select! {
                biased;
                answer = asked => answer,
                // Nobody needs it any more, and a dead name server takes its time.
                () = shutdown.begun() => return,
            };
            if queue
                .send(Event::Resolved { domain, answer })
                .await
                .is_err()
            {
                tracing::debug!("the queue has ended before a lookup");
            }
        });
    }

    fn load(&self, head: Arc<BatchHead>) {
        let (contents, queue) = (Arc::clone(&self.parts.contents), self.parts.queue.clone());
        self.parts.tasks.spawn("load", async move {
            let batch = head.id;
            let ready = match contents.load(head).await {
                Ok(()) => Ok(()),
                Err(error @ LoadError::Store(_)) => {
                    tracing::warn!(%batch, %error, "the content of a batch cannot be loaded");
                    Err((error.to_string(), false))
                }
                Err(error @ LoadError::Keys(_)) => {
                    tracing::error!(%batch, %error, "a batch waits for its keys");
                    Err((error.to_string(), false))
                }
                Err(error @ LoadError::Final(_)) => {
                    tracing::error!(%batch, %error, "a batch cannot be sent");
                    Err((error.to_string(), true))
                }
            };
            if queue.send(Event::Content { batch, ready }).await.is_err() {
                tracing::debug!("the queue has ended before a content");
            }
        });
    }
}

/// Returns at `wake`; without one, never.
async fn until(wake: Option<Instant>) {
    match wake {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

/// A message that its connection cannot take.
fn closed(job: &Job) -> Event {
    Event::Report(job.id, Fate::Returned(Returned::Closed))
}
