//! Wires the rooms of the daemon into one running service.
//!
//! Owns the order in which they start, and what a reload reaches. Must not contain what they do.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Context as _;
use arc_swap::ArcSwap;
use journal::{Journal, JournalConfig, RealDisk};
use links::KeyRing;
use model::JournalId;
use service::clock::SharedClock;
use service::config::Config;
use service::config::shaping::ShapingFile;
use service::metrics::Metrics;
use service::tasks::{Shutdown, Tasks};
use store::Store;
use tokio::net::TcpListener;

use crate::abtest::{Testing, TestingDeps};
use crate::admin::abtests::Looks;
use crate::admin::auth::Keys;
use crate::admin::report::Reports;
use crate::admin::{Api, Hooks, Probe, router, server};
use crate::classify::Rules;
use crate::explain::ask::Explainer;
use crate::intake::parts::Filling;
use crate::intake::receive::{Limits, Sizes};
use crate::intake::submit::Intake;
use crate::jobs::engagement::Engagement;
use crate::jobs::guardrails;
use crate::jobs::webhooks::{Registry, Webhooks, WebhooksDeps};
use crate::jobs::{Keeping, SigningKeys};
use crate::sending::{self, Reload, SendingDeps, SendingHandle};
use crate::tenants::Tenants;

/// What the daemon gets from whoever starts it; `up` shares it with the tracker.
#[derive(Clone)]
pub struct Deps {
    /// The shared state.
    pub store: Arc<dyn Store>,
    /// Where everything is counted.
    pub metrics: Arc<Metrics>,
    /// What time it is.
    pub clock: SharedClock,
    /// All tasks of the process.
    pub tasks: Tasks,
    /// The end of the process.
    pub shutdown: Shutdown,
}

impl std::fmt::Debug for Deps {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Deps").finish_non_exhaustive()
    }
}

/// A running daemon. It ends when the `shutdown` it was given drains.
pub struct Mta {
    addr: SocketAddr,
    config: Config,
    shared: Shared,
    sending: SendingHandle,
    tenants: Arc<Tenants>,
    metrics: Arc<Metrics>,
    tasks: Tasks,
}

/// What a reload replaces.
#[derive(Clone)]
struct Shared {
    rules: Arc<ArcSwap<Rules>>,
    tracking: Arc<ArcSwap<KeyRing>>,
    engagement: Arc<ArcSwap<engagement::Rules>>,
}

impl std::fmt::Debug for Mta {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mta")
            .field("addr", &self.addr)
            .finish_non_exhaustive()
    }
}

impl Mta {
    /// Where the API listens; with port 0 in the configuration, the port that it got.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Reads shaping, rules for replies, tracking keys and the weights of accounts and of sources in
    /// pools again. If one of them has a mistake, nothing changes, and the log says why. Blocks on
    /// the disk for a moment.
    pub fn reload(&self) {
        let read = || anyhow::Ok((Reloaded::read(&self.config)?, self.config.again()?));
        let is_good = match read() {
            Ok((read, config)) => {
                self.take(read, config);
                true
            }
            Err(error) => {
                tracing::error!(
                    error = format!("{error:#}"),
                    "shaping, rules, keys and weights stay as they were"
                );
                false
            }
        };
        self.metrics.reload_ok.set(i64::from(is_good));
    }

    fn take(&self, read: Reloaded, config: Config) {
        self.shared.rules.store(Arc::new(read.rules));
        self.shared.tracking.store(Arc::new(read.tracking));
        self.shared.engagement.store(Arc::new(read.engagement));
        let sending = self.sending.clone();
        self.tenants.configure(&config.accounts);
        let reload = Reload {
            shaping: Arc::new(read.shaping),
            accounts: self.tenants.accounts().to_vec(),
            pools: config.pools,
        };
        drop(self.tasks.spawn("reload", async move {
            sending.reload(reload).await;
            tracing::info!("shaping, rules, keys and weights were read again");
        }));
    }
}

/// Starts the daemon: files, journal, sending, API. It takes batches when this returns.
///
/// # Errors
/// When a file has mistakes, a key can be neither read nor made, the journal does not open, or the
/// address is taken; nothing is left running.
pub async fn start(config: &Config, deps: Deps) -> anyhow::Result<Mta> {
    let asked = config.api.listen;
    let listener = TcpListener::bind(asked)
        .await
        .with_context(|| format!("api.listen {asked}"))?;
    let addr = server::address(&listener, asked);
    let (read, fresh_id) = (config.clone(), fresh_journal_id(&deps)?);
    let files = tokio::task::spawn_blocking(move || Files::read(&read, fresh_id));
    let files = files.await.context("reading the files")??;
    let shared = Shared {
        rules: Arc::new(ArcSwap::from_pointee(files.reloaded.rules)),
        tracking: Arc::new(ArcSwap::from_pointee(files.reloaded.tracking)),
        engagement: Arc::new(ArcSwap::from_pointee(files.reloaded.engagement)),
    };
    let journal = files.journal;
    let sending = sending::start(sending_deps(
        config,
        &deps,
        &shared,
        journal.clone(),
        files.reloaded.shaping,
    ));
    let sending = sending.await.context("sending")?;
    end_when_lost(&sending, &deps);
    start_jobs(config, &deps, &shared, journal.id());
    let explainer = Explainer {
        store: Arc::clone(&deps.store),
        sending: sending.clone(),
        journal: journal.clone(),
        clock: deps.clock.clone(),
        sources: config
            .smtp
            .sources
            .iter()
            .map(|of| of.name.clone())
            .collect(),
        shaping_file: config.shaping.file.path.clone(),
    };
    let hooks = webhooks(config, &deps, journal.id(), &sending);
    let keys = follow_keys(&deps, &shared, journal.id());
    let probes = probes(journal, sending.clone(), keys);
    let tenants = Arc::new(Tenants::new(
        Arc::clone(&deps.store),
        deps.clock.clone(),
        Arc::clone(&files.keys),
        config.accounts.clone(),
    ));
    if let Err(error) = tenants.read().await {
        // The first reading that succeeds brings them.
        tracing::warn!(%error, "accounts and keys made over the API are not known yet");
    }
    tenants.keep_reading(&deps.tasks, &deps.shutdown);
    tell_of_accounts(&tenants, &sending, &deps);
    guardrails::start(
        Arc::clone(&deps.store),
        deps.clock.clone(),
        &deps.tasks,
        deps.shutdown.clone(),
    );
    let access = (files.keys, Arc::clone(&tenants));
    let api = api(config, &deps, access, &shared, probes, explainer, hooks);
    let router = router(Arc::new(api));
    server::serve(
        listener,
        router,
        server::HEADERS_TIME,
        &deps.tasks,
        &deps.shutdown,
    );
    tracing::info!(%addr, "the API is open");
    Ok(Mta {
        addr,
        config: config.clone(),
        shared,
        sending,
        tenants,
        metrics: Arc::clone(&deps.metrics),
        tasks: deps.tasks.clone(),
    })
}

/// What one node at a time does beside sending.
fn start_jobs(config: &Config, deps: &Deps, shared: &Shared, node: JournalId) {
    let keeping = Keeping {
        store: Arc::clone(&deps.store),
        clock: deps.clock.clone(),
        metrics: Arc::clone(&deps.metrics),
        node,
        retention: config.retention.clone(),
    };
    drop(
        deps.tasks
            .spawn("keeping", keeping.run(deps.shutdown.clone())),
    );
    let testing = Testing::new(TestingDeps {
        store: Arc::clone(&deps.store),
        clock: deps.clock.clone(),
        metrics: Arc::clone(&deps.metrics),
        node,
    });
    let run = testing.run(deps.shutdown.clone());
    drop(deps.tasks.spawn("abtests", run));
    let engagement = Engagement {
        store: Arc::clone(&deps.store),
        clock: deps.clock.clone(),
        metrics: Arc::clone(&deps.metrics),
        node,
        rules: Arc::clone(&shared.engagement),
        settle: config.tracker.settle,
    };
    let run = engagement.run(deps.shutdown.clone());
    drop(deps.tasks.spawn("engagement", run));
}

fn sending_deps(
    config: &Config,
    deps: &Deps,
    shared: &Shared,
    journal: Journal,
    shaping: ShapingFile,
) -> SendingDeps {
    SendingDeps {
        store: Arc::clone(&deps.store),
        journal,
        clock: deps.clock.clone(),
        tasks: deps.tasks.clone(),
        shutdown: deps.shutdown.clone(),
        metrics: Arc::clone(&deps.metrics),
        smtp: config.smtp.clone(),
        dns: config.dns.clone(),
        accounts: config.accounts.clone(),
        tls_reports: config.tls_reports.clone(),
        pools: config.pools.clone(),
        shaping: Arc::new(shaping),
        rules: Arc::clone(&shared.rules),
        ring: Arc::clone(&shared.tracking),
        dkim_dir: config.dkim.dir.clone(),
        lease: config.store.lease,
    }
}

/// Starts pushing events, and gives the API its hand in it.
fn webhooks(config: &Config, deps: &Deps, node: JournalId, sending: &SendingHandle) -> Hooks {
    let registry = Registry::new(Arc::clone(&deps.store), deps.clock.clone());
    let hooks = Hooks {
        registry: Arc::new(registry),
        http: Arc::clone(sending.http()),
        allow_private: config.webhooks.allow_private.as_slice().into(),
    };
    let pushing = Webhooks::new(WebhooksDeps {
        registry: Arc::clone(&hooks.registry),
        store: Arc::clone(&deps.store),
        http: Arc::clone(&hooks.http),
        allow_private: Arc::clone(&hooks.allow_private),
        clock: deps.clock.clone(),
        metrics: Arc::clone(&deps.metrics),
        node,
        tasks: deps.tasks.clone(),
    });
    drop(
        deps.tasks
            .spawn("webhooks", pushing.run(deps.shutdown.clone())),
    );
    hooks
}

/// Weights and status profiles of accounts hold for the next message, wherever they were changed.
fn tell_of_accounts(tenants: &Arc<Tenants>, sending: &SendingHandle, deps: &Deps) {
    let (tenants, sending, shutdown) =
        (Arc::clone(tenants), sending.clone(), deps.shutdown.clone());
    let mut changes = tenants.changes();
    // What was read before anybody listened counts too.
    changes.mark_changed();
    drop(deps.tasks.spawn("accounts", async move {
        loop {
            tokio::select! {
                () = shutdown.begun() => return,
                changed = changes.changed() => if changed.is_err() {
                    return;
                }
            }
            sending.change_accounts(&tenants.accounts()).await;
        }
    }));
}

/// A process that cannot keep outcomes must not send, and has nothing else to live for.
fn end_when_lost(sending: &SendingHandle, deps: &Deps) {
    let (sending, shutdown) = (sending.clone(), deps.shutdown.clone());
    drop(deps.tasks.spawn("sending watch", async move {
        tokio::select! {
            () = sending.failed() => {
                tracing::error!("ending, since outcomes can no longer be kept");
                shutdown.begin();
            }
            () = shutdown.begun() => {}
        }
    }));
}

/// A node that lacks a key with which others sign would answer their links with 404.
fn follow_keys(deps: &Deps, shared: &Shared, node: JournalId) -> Probe {
    let in_use = Arc::new(ArcSwap::default());
    let keys = SigningKeys {
        store: Arc::clone(&deps.store),
        node,
        clock: deps.clock.clone(),
        ring: Arc::clone(&shared.tracking),
        in_use: Arc::clone(&in_use),
    };
    let running = keys.run(deps.shutdown.clone());
    drop(deps.tasks.spawn("signing keys", running));
    let ring = Arc::clone(&shared.tracking);
    Probe {
        name: "tracking_keys",
        trouble: Box::new(move || ring.load().trouble(&in_use.load())),
    }
}

/// What `/readyz` asks besides the store.
fn probes(journal: Journal, sending: SendingHandle, keys: Probe) -> Vec<Probe> {
    let full = move || {
        (!journal.has_room())
            .then(|| "the journal is full: the store has not taken its facts".to_owned())
    };
    let lost = move || {
        sending
            .has_failed()
            .then(|| "an outcome could not be kept".to_owned())
    };
    vec![
        Probe {
            name: "journal",
            trouble: Box::new(full),
        },
        Probe {
            name: "sending",
            trouble: Box::new(lost),
        },
        keys,
    ]
}

fn fresh_journal_id(deps: &Deps) -> anyhow::Result<JournalId> {
    let mut random = [0; 16];
    aws_lc_rs::rand::fill(&mut random).context("random bytes")?;
    Ok(JournalId::new(
        deps.clock.now(),
        u128::from_be_bytes(random),
    ))
}

/// What is read at the start and again at a reload.
struct Reloaded {
    rules: Rules,
    tracking: KeyRing,
    engagement: engagement::Rules,
    shaping: ShapingFile,
}

impl Reloaded {
    fn read(config: &Config) -> anyhow::Result<Self> {
        Ok(Self {
            rules: read_rules(config)?,
            tracking: tracking_keys(config)?,
            engagement: engagement_rules(config)?,
            shaping: ShapingFile::load(config)?,
        })
    }
}

/// What is read, or made, at the start.
struct Files {
    keys: Arc<Keys>,
    reloaded: Reloaded,
    journal: Journal,
}

impl Files {
    fn read(config: &Config, fresh_id: JournalId) -> anyhow::Result<Self> {
        let data_dir = &config.data_dir;
        config.make_data_dir()?;
        Ok(Self {
            keys: Arc::new(Keys::load(&config.api.keys, &config.accounts, data_dir)?),
            reloaded: Reloaded::read(config)?,
            journal: journal(config, fresh_id)?,
        })
    }
}

fn journal(config: &Config, fresh_id: JournalId) -> anyhow::Result<Journal> {
    let settings = JournalConfig {
        sync_interval: Some(config.journal.sync),
        max_bytes: config.journal.max_bytes,
        retain: config.store.journal_retained(),
        boot: boot(),
        ..JournalConfig::new(&config.journal.dir, "mta", fresh_id)
    };
    Journal::open(&settings, Arc::new(RealDisk)).context("the journal")
}

/// What the kernel calls this run of the machine; none where it does not say.
fn boot() -> Option<String> {
    let name = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(name.trim().to_owned())
}

fn read_rules(config: &Config) -> anyhow::Result<Rules> {
    let file = &config.bounces.rules_file;
    Rules::load(file).map_err(|mistakes| {
        let lines: Vec<_> = mistakes.iter().map(ToString::to_string).collect();
        anyhow::anyhow!("{}: {}", file.path.display(), lines.join("; "))
    })
}

fn engagement_rules(config: &Config) -> anyhow::Result<engagement::Rules> {
    let file = &config.engagement.rules_file;
    let read = file.parsed(engagement::Rules::shipped, engagement::Rules::parse);
    read.map_err(anyhow::Error::msg)
}

/// The tracker may be started first or second: whoever comes first makes the key.
fn tracking_keys(config: &Config) -> anyhow::Result<KeyRing> {
    let path = &config.tracker.key_file;
    let text = service::secrets::load_or_create(path, || {
        let mut secret = [0; 32];
        aws_lc_rs::rand::fill(&mut secret).map_err(std::io::Error::other)?;
        Ok(KeyRing::file_text(&secret))
    })?;
    KeyRing::parse(&text).with_context(|| path.display().to_string())
}

fn api(
    config: &Config,
    deps: &Deps,
    (keys, tenants): (Arc<Keys>, Arc<Tenants>),
    shared: &Shared,
    probes: Vec<Probe>,
    explainer: Explainer,
    hooks: Hooks,
) -> Api {
    let intake = Intake {
        store: Arc::clone(&deps.store),
        clock: deps.clock.clone(),
        tasks: deps.tasks.clone(),
        shutdown: deps.shutdown.clone(),
        metrics: Arc::clone(&deps.metrics),
        tenants: Arc::clone(&tenants),
        pools: config.pools.clone(),
        dkim_dir: config.dkim.dir.clone(),
        bounce_domain: config.smtp.bounce_domain.clone(),
        tracking: Arc::clone(&shared.tracking),
        data_dir: config.data_dir.clone(),
        sizes: Sizes {
            document: config.api.max_body,
            stream: config.api.max_stream,
        },
        limits: Limits::default(),
        filling: Filling::default(),
    };
    Api {
        store: Arc::clone(&deps.store),
        clock: deps.clock.clone(),
        metrics: Arc::clone(&deps.metrics),
        shutdown: deps.shutdown.clone(),
        keys,
        tenants,
        reports: Reports::default(),
        looks: Looks::default(),
        intake: Arc::new(intake),
        rules: Arc::clone(&shared.rules),
        probes,
        explainer,
        hooks,
        engagement: Arc::clone(&shared.engagement),
        telling: tokio::sync::Semaphore::new(1),
    }
}
