//! Connections: dialling, sessions over sockets, one task each.
//!
//! Owns sockets and deadlines. A connection takes composed messages from its channel, journals a
//! start before each final dot and an outcome after, and reports. It must not decide what happens
//! to a message next: `queue::decide` does, by the policy that travels with the message.

mod auth;
mod connect;
mod connection;
mod dial;
mod hosts;
mod io;
mod network;
mod permit;
mod proxy;
mod scram;
mod secure;
mod tls;

pub use connect::{ConnectError, Internet};
pub use network::{Link, Network, Pulse, Socket};
pub use tls::{TlsConfigs, TlsSetupError};

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use service::clock::SharedClock;
use service::config::{Families, Smarthost, SmtpTimeouts, Source};
use service::metrics::Metrics;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::classify::Rules;
use crate::compose::{Composed, Contents};
use crate::explain::troubles::Troubles;
use crate::queue::control::ControlView;
use crate::queue::decide::{Finding, decide};
use crate::queue::job::{ConnId, Fate, Job, Policy, Returned, Trouble};
use crate::queue::{ConnEnd, Event};
use crate::resolve::{Resolver, Route};
use crate::shaping::SharedPacer;
use crate::ship::Recorder;
use crate::tlspolicy::Policies;
use crate::trace::Traces;
use auth::Relay;
use connection::{Served, Unfit};
use dial::{DialError, Established};
use hosts::HostMemory;

/// How long the reply to QUIT is waited for.
const QUIT: Duration = Duration::from_secs(5);
/// What connections share.
#[derive(Debug)]
pub struct Deliver {
    resolver: Arc<Resolver>,
    recorder: Arc<Recorder>,
    contents: Arc<Contents>,
    rules: Arc<ArcSwap<Rules>>,
    view: Arc<ControlView>,
    clock: SharedClock,
    network: Arc<dyn Network>,
    metrics: Arc<Metrics>,
    timeouts: SmtpTimeouts,
    sources: Vec<Source>,
    tls: Arc<TlsConfigs>,
    policies: Arc<Policies>,
    families: Families,
    relays: Vec<Relay>,
    hosts: HostMemory,
    queue: mpsc::Sender<Event>,
    troubles: Arc<Troubles>,
    traces: Arc<Traces>,
}

/// What [`Deliver`] is made of.
#[derive(Debug)]
pub struct DeliverDeps {
    /// Names to addresses.
    pub resolver: Arc<Resolver>,
    /// Facts into the journal.
    pub recorder: Arc<Recorder>,
    /// What messages are made of, for those that have to be made anew.
    pub contents: Arc<Contents>,
    /// How replies are read.
    pub rules: Arc<ArcSwap<Rules>>,
    /// What must not be sent (any more).
    pub view: Arc<ControlView>,
    /// The time.
    pub clock: SharedClock,
    /// How hosts are reached.
    pub network: Arc<dyn Network>,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// Deadlines.
    pub timeouts: SmtpTimeouts,
    /// Egress sources, by index.
    pub sources: Vec<Source>,
    /// Relays that want to know who we are.
    pub smarthosts: Vec<Smarthost>,
    /// TLS.
    pub tls: Arc<TlsConfigs>,
    /// What domains ask, and how it went.
    pub policies: Arc<Policies>,
    /// Which addresses of hosts are used.
    pub families: Families,
    /// Where reports go.
    pub queue: mpsc::Sender<Event>,
    /// What went wrong last, for people.
    pub troubles: Arc<Troubles>,
    /// Who reads along.
    pub traces: Arc<Traces>,
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
    /// What it takes from to begin a message.
    pub permits: SharedPacer,
    /// Messages for it.
    pub jobs: mpsc::Receiver<Composed>,
    /// Asks it to end when what it has begun is done.
    pub quit: CancellationToken,
}

impl Deliver {
    /// Shared state of connections.
    pub fn new(deps: DeliverDeps) -> Self {
        Self {
            resolver: deps.resolver,
            recorder: deps.recorder,
            contents: deps.contents,
            rules: deps.rules,
            view: deps.view,
            clock: deps.clock,
            network: deps.network,
            metrics: deps.metrics,
            timeouts: deps.timeouts,
            sources: deps.sources,
            relays: deps.smarthosts.into_iter().map(Relay::new).collect(),
            tls: deps.tls,
            policies: deps.policies,
            families: deps.families,
            hosts: HostMemory::default(),
            queue: deps.queue,
            troubles: deps.troubles,
            traces: deps.traces,
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
        let established = match self.call(plan, source, &[]).await {
            Ok(established) => established,
            Err(DialError::Asked) => return ConnEnd::Planned,
            Err(DialError::Source) => return ConnEnd::SourceDown,
            Err(DialError::NoWay(trouble)) => return ConnEnd::NoWay(trouble),
            Err(DialError::Hosts(trouble)) => return ConnEnd::Unreachable(trouble),
        };
        match connection::serve(self, plan, established, source).await {
            Served::Ended(end) => end,
            Served::Unfit(unfit) => self.take_elsewhere(plan, source, *unfit).await,
        }
    }

    async fn call(
        &self,
        plan: &Plan,
        source: &Source,
        avoided: &[Arc<str>],
    ) -> Result<Established, DialError> {
        tokio::select! {
            biased;
            dialled = self.dial(plan.conn, &plan.route, &plan.policy, source, avoided) => dialled,
            () = plan.quit.cancelled() => Err(DialError::Asked),
        }
    }

    /// Takes a message that one host cannot take to the others of the route, in the place of the
    /// connection that had it: the queue hands this one nothing more.
    async fn take_elsewhere(&self, plan: &mut Plan, source: &Source, unfit: Unfit) -> ConnEnd {
        let mut avoided = vec![unfit.host];
        let (mut composed, mut why) = (unfit.composed, unfit.why);
        while plan
            .route
            .hosts()
            .iter()
            .any(|host| !avoided.contains(&host.name))
        {
            let established = match self.call(plan, source, &avoided).await {
                Ok(established) => established,
                Err(DialError::Hosts(trouble) | DialError::NoWay(trouble)) => {
                    // It may be there at another time, and take the message.
                    why = trouble;
                    break;
                }
                Err(DialError::Asked | DialError::Source) => {
                    let fate = Fate::Returned(Returned::Closed);
                    self.tell(Event::Report(composed.job.id, fate)).await;
                    return ConnEnd::Planned;
                }
            };
            avoided.push(Arc::clone(&established.name));
            if !established.security.stands_for(&unfit.security) {
                established.wire.hang_up().await;
                continue;
            }
            match connection::carry_one(self, plan, established, source, composed).await {
                Served::Ended(_) => return ConnEnd::Planned,
                Served::Unfit(again) => (composed, why) = (again.composed, again.why),
            }
        }
        let fate = self.unreachable(&composed.job, why);
        self.tell(Event::Report(composed.job.id, fate)).await;
        ConnEnd::Planned
    }

    fn unreachable(&self, job: &Job, trouble: Trouble) -> Fate {
        let (now, chance) = (self.clock.now(), fastrand::f64());
        let finding = Finding::Unreachable(trouble);
        let attempt = decide(finding, &job.item, &job.policy, now, chance);
        self.recorder.outcome(attempt, job.item.release_at());
        Fate::Recorded {
            delivered: false,
            heard: None,
        }
    }

    /// Fails only when the queue is gone, and everything with it.
    async fn tell(&self, event: Event) {
        if self.queue.send(event).await.is_err() {
            tracing::debug!("the queue has ended before a connection");
        }
    }
}
