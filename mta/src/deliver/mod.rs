//! Connections: dialling, sessions over sockets, one task each.
//!
//! Owns sockets and deadlines. A connection takes composed messages from its channel, journals a
//! start before each final dot and an outcome after, and reports. It must not decide what happens
//! to a message next: `queue::decide` does, by the policy that travels with the message.

mod connection;
mod dial;
mod hosts;
mod io;
mod secure;
mod tls;

pub use tls::{TlsConfigs, TlsSetupError};

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use service::clock::SharedClock;
use service::config::{Families, SmtpTimeouts, Source};
use service::metrics::Metrics;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::classify::Rules;
use crate::compose::Composed;
use crate::queue::control::ControlView;
use crate::queue::job::{ConnId, Policy};
use crate::queue::{ConnEnd, Event};
use crate::resolve::{Resolver, Route};
use crate::shaping::{Destination, Pacer, SharedPacer};
use crate::ship::Recorder;
use hosts::HostMemory;

/// How long the reply to QUIT is waited for.
const QUIT: Duration = Duration::from_secs(5);
/// Permits kept per destination and source; idle ones go first.
const PACERS_MAX: usize = 50_000;

/// A destination as one source, by its index, sees it.
type PacerKey = (Destination, usize);

/// What connections share.
#[derive(Debug)]
pub struct Deliver {
    resolver: Arc<Resolver>,
    recorder: Arc<Recorder>,
    rules: Arc<ArcSwap<Rules>>,
    view: Arc<ControlView>,
    clock: SharedClock,
    metrics: Arc<Metrics>,
    timeouts: SmtpTimeouts,
    sources: Vec<Source>,
    tls: Arc<TlsConfigs>,
    families: Families,
    hosts: HostMemory,
    queue: mpsc::Sender<Event>,
    started: Instant,
    pacers: Mutex<HashMap<PacerKey, SharedPacer>>,
}

/// What [`Deliver`] is made of.
#[derive(Debug)]
pub struct DeliverDeps {
    /// Names to addresses.
    pub resolver: Arc<Resolver>,
    /// Facts into the journal.
    pub recorder: Arc<Recorder>,
    /// How replies are read.
    pub rules: Arc<ArcSwap<Rules>>,
    /// What must not be sent (any more).
    pub view: Arc<ControlView>,
    /// The time.
    pub clock: SharedClock,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// Deadlines.
    pub timeouts: SmtpTimeouts,
    /// Egress sources, by index.
    pub sources: Vec<Source>,
    /// TLS.
    pub tls: Arc<TlsConfigs>,
    /// Which addresses of hosts are used.
    pub families: Families,
    /// Where reports go.
    pub queue: mpsc::Sender<Event>,
}

/// One connection to be made.
#[derive(Debug)]
pub struct Plan {
    /// Its name.
    pub conn: ConnId,
    /// Where to.
    pub route: Arc<Route>,
    /// Under which limits.
    pub policy: Arc<Policy>,
    /// From which source, by index.
    pub source: usize,
    /// Messages for it.
    pub jobs: mpsc::Receiver<Composed>,
    /// Asks it to end when what it has begun is done.
    pub quit: CancellationToken,
}

impl Deliver {
    /// Shared state of connections.
    pub fn new(deps: DeliverDeps) -> Self {
        Self {
            started: deps.clock.instant(),
            resolver: deps.resolver,
            recorder: deps.recorder,
            rules: deps.rules,
            view: deps.view,
            clock: deps.clock,
            metrics: deps.metrics,
            timeouts: deps.timeouts,
            sources: deps.sources,
            tls: deps.tls,
            families: deps.families,
            hosts: HostMemory::default(),
            queue: deps.queue,
            pacers: Mutex::default(),
        }
    }

    /// Makes a connection, carries its messages, reports its end.
    pub async fn run(self: Arc<Self>, mut plan: Plan) {
        let end = self.carry(&mut plan).await;
        self.tell(Event::Closed(plan.conn, end)).await;
    }

    async fn carry(&self, plan: &mut Plan) -> ConnEnd {
        let Some(source) = self.sources.get(plan.source) else {
            return ConnEnd::Planned;
        };
        let dialled = tokio::select! {
            dialled = self.dial(plan.conn, &plan.route, &plan.policy, source) => dialled,
            () = plan.quit.cancelled() => return ConnEnd::Planned,
        };
        match dialled {
            Ok(established) => connection::serve(self, plan, established, source).await,
            Err(trouble) => ConnEnd::Unreachable(trouble),
        }
    }

    /// The permits of a destination as one source sees it, shared by its connections.
    fn pacer(&self, policy: &Policy, source: usize) -> SharedPacer {
        let mut pacers = self.pacers.lock().unwrap_or_else(PoisonError::into_inner);
        if pacers.len() >= PACERS_MAX {
            let now = self.clock.instant();
            let in_use = |pacer: &SharedPacer| {
                Arc::strong_count(pacer) > 1
                    || pacer
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .free_at(now)
                        > now
            };
            pacers.retain(|_, pacer| in_use(pacer));
        }
        let key = (policy.destination.clone(), source);
        let made = || {
            Arc::new(Mutex::new(Pacer::exhausted(
                policy.limits.rate,
                self.started,
            )))
        };
        let pacer = Arc::clone(pacers.entry(key).or_insert_with(made));
        let mut permits = pacer.lock().unwrap_or_else(PoisonError::into_inner);
        if permits.rate() != policy.limits.rate {
            permits.change(policy.limits.rate);
        }
        drop(permits);
        pacer
    }

    /// Fails only when the queue is gone, and everything with it.
    async fn tell(&self, event: Event) {
        if self.queue.send(event).await.is_err() {
            tracing::debug!("the queue has ended before a connection");
        }
    }
}
