//! Wires the rooms of sending: store, queue, resolve, compose, deliver, journal, ship.
//!
//! Owns the tasks around the queue's state and their order at start and end. Must not decide
//! anything: that is the queue's.

mod asking;
mod executor;
mod limits;
mod shares;

use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use journal::Journal;
use links::KeyRing;
use model::BatchState;
use service::clock::SharedClock;
use service::config::shaping::ShapingFile;
use service::config::{Account, Dns as DnsConfig, Pool, Smtp, StatusProfile, TlsReports};
use service::metrics::Metrics;
use service::tasks::{Hold, Shutdown, Stage, Tasks, blocking};
use store::{Control, LeasedRange, Store};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::classify::Rules;
use crate::compose::{Composer, Contents, Threads};
use crate::deliver::{Deliver, DeliverDeps, Internet, Network, TlsConfigs, TlsSetupError};
use crate::explain::troubles::Troubles;
use crate::http::HttpClient;
use crate::jobs::TlsReporting;
use crate::queue::control::ControlView;
use crate::queue::pool::Pools;
use crate::queue::snapshot::{Scope, Snapshot};
use crate::queue::{Event, QueueConfig, QueueState, Shares};
use crate::resolve::{Dns, Resolver, SystemDns};
use crate::shaping::Destination;
use crate::ship::{Recorder, Recovered, ShipCommand, ShipDeps, Shipper, recover};
use crate::tlspolicy::{Policies, PoliciesDeps};
use crate::trace::Traces;
use asking::Asking;
use executor::{Executor, Parts};
use limits::LimitNotes;

/// Events that wait for the queue; connections wait when it is full.
const EVENTS_MAX: usize = 4_096;
/// Commands that wait for shipping; the queue keeps what does not fit.
const COMMANDS_MAX: usize = 1_024;

/// Questions of people that wait for the queue; beyond, they are told that it is busy.
const ASKS_MAX: usize = 32;
/// How long the queue may take to answer one.
const ASK_TIME: Duration = Duration::from_secs(2);
/// How long whoever suspends a destination waits for the queue to know: the control feed is at most a
/// quarter of a second behind while the store can be reached …
const KNOWN_WITHIN: Duration = Duration::from_secs(1);
/// … and how often the queue is asked.
const KNOWN_LOOK: Duration = Duration::from_millis(5);

/// What sending is made of.
pub struct SendingDeps {
    /// The shared state.
    pub store: Arc<dyn Store>,
    /// The local facts; sending ships them.
    pub journal: Journal,
    /// The time.
    pub clock: SharedClock,
    /// Tasks of the process.
    pub tasks: Tasks,
    /// The end of the process.
    pub shutdown: Shutdown,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// `[smtp]`.
    pub smtp: Smtp,
    /// `[dns]`.
    pub dns: DnsConfig,
    /// `[[accounts]]`: their shares.
    pub accounts: Vec<Account>,
    /// `[tls_reports]`
    pub tls_reports: TlsReports,
    /// `[[pools]]`
    pub pools: Vec<Pool>,
    /// `shaping.toml`.
    pub shaping: Arc<ShapingFile>,
    /// `bounce-rules.toml`; may be exchanged while running.
    pub rules: Arc<ArcSwap<Rules>>,
    /// Tracking keys; may be exchanged while running.
    pub ring: Arc<ArcSwap<KeyRing>>,
    /// `dkim.dir`.
    pub dkim_dir: PathBuf,
    /// `store.lease`.
    pub lease: Duration,
}

/// Why sending cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// TLS.
    #[error(transparent)]
    Tls(#[from] TlsSetupError),
    /// DNS.
    #[error("DNS cannot be asked: {0}")]
    Dns(String),
    /// No threads, or the journal cannot be read.
    #[error("sending cannot start")]
    Io(#[from] std::io::Error),
}

/// Sending, as it runs.
#[derive(Debug, Clone)]
pub struct SendingHandle {
    failed: CancellationToken,
    resolver: Arc<Resolver>,
    http: Arc<HttpClient>,
    queue: mpsc::Sender<Event>,
    asks: mpsc::Sender<Ask>,
    /// Indices of the egress sources in use.
    pool: Vec<usize>,
    /// The names of all, by index.
    sources: Arc<[Box<str>]>,
    shaping: Arc<ArcSwap<ShapingFile>>,
    troubles: Arc<Troubles>,
    traces: Arc<Traces>,
}

/// What a reload brings.
#[derive(Debug)]
pub struct Reload {
    /// `shaping.toml`.
    pub shaping: Arc<ShapingFile>,
    /// `[[accounts]]`: their weights and status profiles, with those that were made over the API.
    pub accounts: Vec<Account>,
    /// `[[pools]]`: the weights of their sources.
    pub pools: Vec<Pool>,
}

/// A person's question about the queue.
#[derive(Debug)]
struct Ask {
    scope: Scope,
    answer: oneshot::Sender<Snapshot>,
}

impl SendingHandle {
    /// A picture of the queue as it is now; none when it is too busy to answer, or has ended.
    pub async fn snapshot(&self, scope: Scope) -> Option<Snapshot> {
        let (answer, told) = oneshot::channel();
        self.asks.try_send(Ask { scope, answer }).ok()?;
        tokio::time::timeout(ASK_TIME, told).await.ok()?.ok()
    }

    /// Returns when the queue knows that a destination is suspended, or after a second: the
    /// control feed may be behind, and the queue too busy to answer. Cancel-safe.
    pub async fn knows_of_suspension(&self, destination: &Destination) {
        let scope = Scope::Named(vec![destination.clone()]);
        let known = async {
            loop {
                let seen = self.snapshot(scope.clone()).await;
                if seen.is_some_and(|seen| !seen.suspended.is_empty()) {
                    return;
                }
                tokio::time::sleep(KNOWN_LOOK).await;
            }
        };
        if tokio::time::timeout(KNOWN_WITHIN, known).await.is_err() {
            tracing::warn!(%destination, "the queue does not know yet that it is suspended");
        }
    }

    /// Where mail goes, with what is known of it.
    pub fn resolver(&self) -> &Arc<Resolver> {
        &self.resolver
    }

    /// The way to other people's HTTP servers.
    pub fn http(&self) -> &Arc<HttpClient> {
        &self.http
    }

    /// Indices of the egress sources in use.
    pub fn pool(&self) -> Vec<usize> {
        self.pool.clone()
    }

    /// The limits and routes in force.
    pub fn shaping(&self) -> Arc<ShapingFile> {
        self.shaping.load_full()
    }

    /// What is said on connections, live.
    pub fn traces(&self) -> &Arc<Traces> {
        &self.traces
    }

    /// What went wrong last, by destination.
    pub fn troubles(&self) -> &Troubles {
        &self.troubles
    }

    /// Returns when an outcome could not be kept: nothing more may be sent by this process, which
    /// has to end. Cancel-safe.
    pub async fn failed(&self) {
        self.failed.cancelled().await;
    }

    /// Limits, static routes and weights hold from the next message on. Once the queue has ended,
    /// nothing happens.
    ///
    /// A pool with a source that no pool had at the start leaves all pools as they were: connections
    /// are made from the sources of the start.
    pub async fn reload(&self, reload: Reload) {
        let shaping = reload.shaping;
        self.resolver.change_routes(shaping.routes.clone());
        self.shaping.store(Arc::clone(&shaping));
        let pools = pools(&reload.pools, &self.sources);
        let is_known = |pool: &Pool| {
            let mut names = pool.sources.iter().map(|member| member.name.as_str());
            names.all(|name| {
                self.pool
                    .iter()
                    .any(|at| self.sources.get(*at).is_some_and(|of| **of == *name))
            })
        };
        let may_change = reload.pools.iter().all(is_known);
        if !may_change {
            tracing::warn!("pools have other sources than at the start, so they stay as they were");
        }
        let shares = Shares {
            accounts: weights(&reload.accounts),
            profiles: profiles(&reload.accounts),
            pools: may_change.then_some(pools),
        };
        for event in [Event::Shares(shares), Event::Shaping(shaping)] {
            if self.queue.send(event).await.is_err() {
                tracing::debug!("the queue has ended before a reload");
            }
        }
    }

    /// Weights and status profiles of accounts hold from the next message on. Once the queue has
    /// ended, nothing happens.
    pub async fn change_accounts(&self, accounts: &[Account]) {
        let shares = Shares {
            accounts: weights(accounts),
            profiles: profiles(accounts),
            pools: None,
        };
        if self.queue.send(Event::Shares(shares)).await.is_err() {
            tracing::debug!("the queue has ended before accounts were changed");
        }
    }

    /// Whether that has happened.
    pub fn has_failed(&self) -> bool {
        self.failed.is_cancelled()
    }
}

/// Starts sending. Returns when its tasks run; taking back the leases of a former run and asking
/// for work goes on behind, as long as it takes the store to answer.
///
/// # Errors
/// See [`StartError`]; nothing runs then.
pub async fn start(deps: SendingDeps) -> Result<SendingHandle, StartError> {
    let surroundings = Surroundings {
        dns: dns(&deps)?,
        network: Arc::new(Internet),
        tls: Arc::new(TlsConfigs::new(deps.smtp.ca_file.as_deref())?),
        composing: Threads::Processors,
    };
    start_in(deps, surroundings).await
}

/// What lies around a process, beside its store and its disk.
pub struct Surroundings {
    /// How DNS is asked.
    pub dns: Arc<dyn Dns>,
    /// How hosts are reached.
    pub network: Arc<dyn Network>,
    /// Whom TLS trusts.
    pub tls: Arc<TlsConfigs>,
    /// On which threads messages are composed.
    pub composing: Threads,
}

/// As [`start`], in other surroundings than those of the machine.
///
/// # Errors
/// See [`StartError`]; nothing runs then.
pub async fn start_in(
    deps: SendingDeps,
    surroundings: Surroundings,
) -> Result<SendingHandle, StartError> {
    let Surroundings {
        dns,
        network,
        tls,
        composing,
    } = surroundings;
    let failed = CancellationToken::new();
    let now = deps.clock.instant();
    let resolver = resolver(&deps, Arc::clone(&dns));
    let http = Arc::new(HttpClient::new(Arc::clone(&resolver), tls.https()?));
    let policies = policies(&deps, dns, &http);
    let journal = deps.journal.clone();
    let starts = blocking(move || recover(&journal))
        .await
        .map_err(std::io::Error::other)??;

    let (queue, events) = mpsc::channel(EVENTS_MAX);
    let (ship, commands) = mpsc::channel(COMMANDS_MAX);
    let view = Arc::new(ControlView::new(now));
    let recorder = Arc::new(Recorder::new(
        deps.journal.clone(),
        Arc::clone(&deps.metrics),
        failed.clone(),
    ));
    let contents = contents(&deps);
    let composer = Composer::start(composing, &deps.tasks, &contents, &deps.metrics, &queue)?;
    let troubles = Arc::new(Troubles::default());
    let traces = Arc::new(Traces::new(deps.clock.clone()));
    let deliver = Arc::new(Deliver::new(DeliverDeps {
        resolver: Arc::clone(&resolver),
        recorder: Arc::clone(&recorder),
        contents: Arc::clone(&contents),
        rules: Arc::clone(&deps.rules),
        view: Arc::clone(&view),
        clock: deps.clock.clone(),
        network,
        metrics: Arc::clone(&deps.metrics),
        timeouts: deps.smtp.timeouts,
        sources: deps.smtp.sources.clone(),
        smarthosts: deps.smtp.smarthosts.clone(),
        tls,
        policies: Arc::clone(&policies),
        families: deps.smtp.families,
        queue: queue.clone(),
        troubles: Arc::clone(&troubles),
        traces: Arc::clone(&traces),
    }));
    let (asks, asked) = mpsc::channel(ASKS_MAX);
    let handle = SendingHandle {
        failed: failed.clone(),
        resolver: Arc::clone(&resolver),
        http,
        queue: queue.clone(),
        asks,
        pool: config(&deps).pools.sources(),
        sources: limits::names(&deps.smtp.sources),
        shaping: Arc::new(ArcSwap::new(Arc::clone(&deps.shaping))),
        troubles: Arc::clone(&troubles),
        traces,
    };
    let mut state = QueueState::new(config(&deps), Arc::clone(&view), fastrand::u64(..), now);
    if deps.store.is_shared() {
        state.share_limits();
    }
    let executor = Executor::new(Parts {
        state,
        events,
        asked,
        troubles,
        ship,
        asking: Asking::start(&deps, &queue),
        limits: limit_notes(&deps),
        sharing: shares::Sharing::start(&deps, &queue),
        queue: queue.clone(),
        resolver,
        policies,
        contents,
        composer,
        deliver,
        recorder,
        clock: deps.clock.clone(),
        metrics: Arc::clone(&deps.metrics),
        tasks: deps.tasks.clone(),
        shutdown: deps.shutdown.clone(),
        failed: failed.clone(),
    });
    let ship = ship_deps(&deps, commands, &queue);
    let tasks = deps.tasks.clone();
    // The end of the process waits for the whole of it, the beginning included.
    let hold = deps.shutdown.hold(Stage::Transactions);
    tasks.spawn(
        "sending",
        begin(deps, ship, starts, view, queue, executor, hold),
    );
    Ok(handle)
}

fn contents(deps: &SendingDeps) -> Arc<Contents> {
    Arc::new(Contents::new(
        Arc::clone(&deps.store),
        Arc::clone(&deps.ring),
        deps.dkim_dir.clone(),
        deps.smtp.bounce_domain.clone(),
    ))
}

fn limit_notes(deps: &SendingDeps) -> LimitNotes {
    LimitNotes::start(
        Arc::clone(&deps.store),
        deps.clock.clone(),
        &deps.smtp.sources,
        &deps.tasks,
        deps.shutdown.clone(),
    )
}

fn ship_deps(
    deps: &SendingDeps,
    commands: mpsc::Receiver<ShipCommand>,
    queue: &mpsc::Sender<Event>,
) -> ShipDeps<dyn Store> {
    ShipDeps {
        journal: deps.journal.clone(),
        store: Arc::clone(&deps.store),
        clock: deps.clock.clone(),
        metrics: Arc::clone(&deps.metrics),
        commands,
        queue: queue.clone(),
        shutdown: deps.shutdown.clone(),
    }
}

fn dns(deps: &SendingDeps) -> Result<Arc<dyn Dns>, StartError> {
    let dns = SystemDns::new(&deps.dns.nameservers, deps.dns.trust_ad);
    Ok(Arc::new(dns.map_err(StartError::Dns)?))
}

fn resolver(deps: &SendingDeps, dns: Arc<dyn Dns>) -> Arc<Resolver> {
    Arc::new(Resolver::new(
        dns,
        deps.clock.clone(),
        deps.shaping.routes.clone(),
        deps.smtp.port,
        deps.smtp.allow_private_mx.clone(),
    ))
}

fn policies(deps: &SendingDeps, dns: Arc<dyn Dns>, http: &Arc<HttpClient>) -> Arc<Policies> {
    let policies = Arc::new(Policies::new(PoliciesDeps {
        dns,
        http: Arc::clone(http),
        store: Arc::clone(&deps.store),
        node: deps.journal.id(),
        clock: deps.clock.clone(),
        metrics: Arc::clone(&deps.metrics),
        dane: deps.dns.dane,
        dane_test: deps.dns.dane_test.clone(),
        mta_sts: deps.smtp.mta_sts,
        mta_sts_port: deps.smtp.mta_sts_port,
        reports: deps.tls_reports.from.is_some(),
    }));
    let run = Arc::clone(&policies).run(deps.shutdown.clone());
    deps.tasks.spawn("tls policies", run);
    if let Some(reports) = TlsReporting::new(deps, Arc::clone(&policies)) {
        let run = reports.run(deps.shutdown.clone());
        deps.tasks.spawn("tls reports", run);
    }
    policies
}

fn config(deps: &SendingDeps) -> QueueConfig {
    QueueConfig {
        lease: deps.lease,
        shaping: Arc::clone(&deps.shaping),
        weights: weights(&deps.accounts),
        profiles: profiles(&deps.accounts),
        pools: pools(&deps.pools, &limits::names(&deps.smtp.sources)),
        source_names: limits::names(&deps.smtp.sources),
        ambiguous: deps.smtp.ambiguous,
        ambiguous_after: deps.smtp.ambiguous_after,
    }
}

/// Shares of accounts in a contended destination.
fn weights(accounts: &[Account]) -> HashMap<String, u32> {
    let weights = accounts.iter();
    weights
        .map(|account| (account.id.clone(), account.weight))
        .collect()
}

/// What a delivery status means for further mail, where that is not the default.
fn profiles(accounts: &[Account]) -> HashMap<String, StatusProfile> {
    let own = accounts.iter();
    let own = own.filter(|account| account.status_profile != StatusProfile::Default);
    own.map(|account| (account.id.clone(), account.status_profile))
        .collect()
}

fn pools(pools: &[Pool], sources: &[Box<str>]) -> Pools {
    Pools::configured(pools, |name| sources.iter().position(|of| **of == *name))
}

/// What comes before the first message: the control feed's cursor, the facts of the last run, its
/// leases. Then everything else starts.
async fn begin(
    deps: SendingDeps,
    ship: ShipDeps<dyn Store>,
    starts: Recovered,
    view: Arc<ControlView>,
    queue: mpsc::Sender<Event>,
    executor: Executor,
    hold: Hold,
) {
    let asked_before_leasing = async {
        let mark = asking::until_answered(|| deps.store.high_water(deps.journal.id())).await;
        let page = asking::until_answered(|| deps.store.control(None)).await;
        let limits = known_limits(&deps).await;
        let mut shipper = Shipper::new(ship, mark, starts);
        let back = shipper.catch_up(deps.lease).await;
        (page.next, limits, shipper, back)
    };
    let (cursor, mut events, shipper, back) = tokio::select! {
        biased;
        found = asked_before_leasing => found,
        () = deps.shutdown.begun() => {
            tracing::info!("ended before the store answered; facts of the last run stay in the journal");
            return;
        }
    };
    let (ranges, asked_at) = match back {
        Ok(back) => back,
        Err(error) => {
            tracing::error!(%error, "the journal cannot be read, nothing is sent");
            executor.fail();
            return;
        }
    };
    let stopped = stopped(&*deps.store, &ranges).await;
    for control in &stopped {
        view.learn(control, deps.clock.instant());
    }
    let follower = asking::Follower {
        store: Arc::clone(&deps.store),
        view,
        clock: deps.clock.clone(),
        queue,
    };
    let shutdown = deps.shutdown.clone();
    deps.tasks.spawn(
        "control",
        async move { follower.run(cursor, &shutdown).await },
    );
    deps.tasks.spawn("ship", shipper.run());
    events.push(Event::Leased { ranges, asked_at });
    events.extend(stopped.into_iter().map(Event::Control));
    executor.run(events).await;
    drop(hold);
}

/// The batches of what a restarted node got back that were paused or cancelled before its control
/// feed begins, as the feed would have told.
async fn stopped(store: &dyn Store, ranges: &[LeasedRange]) -> Vec<Control> {
    let batches: BTreeSet<_> = ranges.iter().map(|range| range.batch.id).collect();
    let mut stopped = Vec::new();
    for id in batches {
        let batch = asking::until_answered(|| store.batch(id)).await;
        stopped.extend(batch.and_then(|batch| match batch.state {
            BatchState::Paused => Some(Control::Paused(id)),
            BatchState::Cancelled => Some(Control::Cancelled(id)),
            BatchState::Open
            | BatchState::Scheduled
            | BatchState::InProgress
            | BatchState::Completed => None,
        }));
    }
    stopped
}

/// What is known of limits before the first message: those that former runs learnt, and the
/// suspensions of operators.
async fn known_limits(deps: &SendingDeps) -> Vec<Event> {
    let (store, sources) = (&*deps.store, &deps.smtp.sources);
    let remembered =
        asking::until_answered(|| limits::remembered(store, sources, deps.clock.now())).await;
    let holds = asking::until_answered(|| limits::remembered_holds(store, deps.clock.now())).await;
    let suspensions = asking::until_answered(|| store.suspensions(deps.clock.now())).await;
    let suspended = suspensions
        .into_iter()
        .map(|suspension| Event::Control(Control::DestinationSuspended(suspension)));
    [Event::Remembered(remembered), Event::RememberedHolds(holds)]
        .into_iter()
        .chain(suspended)
        .collect()
}
