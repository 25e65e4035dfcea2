//! The tracker: open pixels, click redirects, unsubscribes.
//!
//! Three rooms: `http` answers, `hits` writes what was answered into the journal, `ship` takes it
//! from there to the store. A token carries all that an answer needs, so an answer waits for the
//! journal's write and never for the store or the network. Must not depend on `mta`.
//!
//! Beside them `tls` has the certificates and `acme` fetches them.
//!
//! A proxy before the tracker passes on the client's `Host`, or is listed in
//! `trusted_proxies` and sends `X-Forwarded-Host`, `-For` and `-Proto`.
#![forbid(unsafe_code)]

mod acme;
pub mod daemon;
mod hits;
mod http;
mod keys;
mod ship;
mod tenants;
mod tls;

pub use keys::{KeysError, load as load_keys};
pub use tls::loaded::CertificateError;

use acme::Acme;
use acme::challenges::Challenges;
use arc_swap::ArcSwap;
use engagement::Rules;
use hits::Recorder;
use hits::visitor::Visitors;
use http::admin::Admin;
use http::server::{Answers, Client, Listening};
use http::{Answer, Keyed, Public};
use hyper::Request;
use hyper::body::Incoming;
use journal::{Journal, JournalConfig, OpenError, RealDisk};
use links::KeyRing;
use model::JournalId;
use service::clock::SharedClock;
use service::config::{Config, ReadFile};
use service::metrics::{Metrics, Portion};
use service::tasks::{Shutdown, Stage, Tasks};
use service::workers::Workers;
use ship::{Reported, Shipper};
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use store::Store;
use tenants::Tenants;
use tls::Certificates;
use tokio::net::TcpListener;

/// Connections of the public listener at a time; each costs some 10 KiB, at most 64 KiB and a
/// descriptor.
const MAX_CONNECTIONS: usize = 8192;
const MAX_ADMIN_CONNECTIONS: usize = 64;

/// What the tracker works with.
#[derive(Clone)]
pub struct Deps {
    /// Where hits go in the end.
    pub store: Arc<dyn Store>,
    /// Under `up` the same as the MTA's.
    pub metrics: Arc<Metrics>,
    /// The time.
    pub clock: SharedClock,
    /// Where its tasks live.
    pub tasks: Tasks,
    /// Ends it: with `Stage::Intake` it stops accepting, in `Transactions` it answers what it has
    /// begun, in `Journal` it ships what it has.
    pub shutdown: Shutdown,
}

impl std::fmt::Debug for Deps {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Deps").finish_non_exhaustive()
    }
}

/// Why the tracker did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// No tracking keys.
    #[error(transparent)]
    Keys(#[from] KeysError),
    /// The rules of engagement cannot be used.
    #[error("{0}")]
    Rules(String),
    /// No journal.
    #[error("the journal did not open")]
    Journal(#[from] OpenError),
    /// A certificate that cannot be used.
    #[error(transparent)]
    Certificate(#[from] CertificateError),
    /// TLS.
    #[error("TLS cannot be set up")]
    Tls(#[from] rustls::Error),
    /// A port that cannot be had.
    #[error("cannot listen on {address} ({what})")]
    Listen {
        /// `tracker.listen`, `tracker.admin_listen` or `tracker.tls.listen`.
        what: &'static str,
        /// The address.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// No chance, no threads: the system is at its end.
    #[error("the system refuses")]
    System(#[source] io::Error),
}

/// A running tracker.
#[derive(Debug)]
pub struct Tracker {
    addr: SocketAddr,
    admin_addr: SocketAddr,
    tls_addr: Option<SocketAddr>,
    certificates: Arc<Certificates>,
    journal: JournalId,
    key_file: PathBuf,
    rules_file: ReadFile,
    rules: Arc<ArcSwap<Rules>>,
    cookie_domain: Option<String>,
    public: Arc<Public>,
}

impl Tracker {
    /// Where the public listener is.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Where the admin listener is.
    pub fn admin_addr(&self) -> SocketAddr {
        self.admin_addr
    }

    /// Where the public listener for TLS is; `None`: it is off.
    pub fn tls_addr(&self) -> Option<SocketAddr> {
        self.tls_addr
    }

    /// The identity of its journal.
    pub fn journal_id(&self) -> JournalId {
        self.journal
    }

    /// Reads the key file, the rules of engagement and certificates again (SIGHUP). One that cannot be used
    /// changes nothing, and the log says why. Blocks on the disk for a moment.
    pub fn reload(&self) {
        match self.reload_keys() {
            Ok(()) => tracing::info!("tracking keys were read again"),
            Err(error) => tracing::error!(%error, "tracking keys stay as they were"),
        }
        match load_rules(&self.rules_file) {
            Ok(rules) => {
                tracing::info!(
                    version = rules.version,
                    "rules of engagement were read again"
                );
                self.rules.store(Arc::new(rules));
            }
            Err(error) => tracing::error!(%error, "rules of engagement stay as they were"),
        }
        self.certificates.reload();
    }

    /// Reads the key file again. Blocks on the disk for a moment.
    ///
    /// # Errors
    /// When it cannot be used; the keys stay as they were.
    pub fn reload_keys(&self) -> Result<(), KeysError> {
        let ring = keys::load(&self.key_file)?;
        let keyed = Keyed::new(ring, self.cookie_domain.clone());
        self.public.keyed.store(Arc::new(keyed));
        Ok(())
    }
}

impl Keyed {
    fn new(ring: KeyRing, cookie_domain: Option<String>) -> Self {
        let visitors = Visitors::new(&ring, cookie_domain);
        Self { ring, visitors }
    }
}

impl Answers for Public {
    async fn answer(&self, request: Request<Incoming>, client: Client) -> Answer {
        Self::answer(self, request, client).await
    }
}

/// Starts the tracker: keys, journal, both listeners, shipping. Links are answered when it
/// returns, whether the store is there or not. It ends with `deps.shutdown`.
///
/// # Errors
/// See [`StartError`]; nothing is left running.
pub async fn start(config: &Config, deps: Deps) -> Result<Tracker, StartError> {
    let settings = &config.tracker;
    let listener = listen("tracker.listen", settings.listen).await?;
    let admin_listener = listen("tracker.admin_listen", settings.admin_listen).await?;
    let tls_listener = match settings.tls_listen {
        Some(address) => Some(listen("tracker.tls.listen", address).await?),
        None => None,
    };
    let local = |listener: &TcpListener| listener.local_addr().map_err(StartError::System);
    let (addr, admin_addr) = (local(&listener)?, local(&admin_listener)?);
    let tls_addr = tls_listener.as_ref().map(local).transpose()?;
    let (ring, rules, certificates) = blocking({
        let (key_file, rules_file) = (
            settings.key_file.clone(),
            config.engagement.rules_file.clone(),
        );
        let files = settings.certificates.clone();
        let (clock, metrics) = (deps.clock.clone(), deps.metrics.clone());
        move || {
            Ok::<_, StartError>((
                keys::load(&key_file)?,
                load_rules(&rules_file)?,
                Certificates::read(files, clock, metrics)?,
            ))
        }
    })
    .await??;
    let journal = open_journal(config, &deps).await?;
    let cookie_domain = settings.cookie_domain.as_ref().map(ToString::to_string);
    let tenants = Arc::new(Tenants::new(&config.accounts));
    let rules = Arc::new(ArcSwap::from_pointee(rules));
    let public = Arc::new(Public {
        keyed: ArcSwap::from_pointee(Keyed::new(ring, cookie_domain.clone())),
        tenants: tenants.clone(),
        challenges: settings
            .acme
            .directory
            .is_some()
            .then(|| Arc::new(Challenges::new(deps.store.clone(), deps.clock.clone()))),
        recorder: Recorder {
            journal: journal.clone(),
            clock: deps.clock.clone(),
            metrics: deps.metrics.clone(),
            trusted_proxies: settings.trusted_proxies.clone(),
            rules: rules.clone(),
        },
        trusted_proxies: settings.trusted_proxies.clone(),
        clock: deps.clock.clone(),
        metrics: deps.metrics.clone(),
    });
    let tls = tls_listener.map(|listener| {
        let config = tls::server_config(certificates.clone())?;
        Ok::<_, rustls::Error>((listener, Arc::new(config)))
    });
    let tls = tls.transpose()?;
    let workers = Workers::start("tracker-worker", &deps.tasks, &deps.shutdown)
        .map_err(StartError::System)?;
    run(
        &deps,
        &public,
        &journal,
        listener,
        admin_listener,
        tls,
        &workers,
    );
    keep_certificates(config, &deps, &public, &certificates, journal.id());
    tracing::info!(%addr, %admin_addr, tls = ?tls_addr, journal = %journal.id(), "tracker is up");
    Ok(Tracker {
        addr,
        admin_addr,
        tls_addr,
        certificates,
        journal: journal.id(),
        key_file: settings.key_file.clone(),
        rules_file: config.engagement.rules_file.clone(),
        rules,
        cookie_domain,
        public,
    })
}

/// Starts the tasks.
fn run(
    deps: &Deps,
    public: &Arc<Public>,
    journal: &Journal,
    listener: TcpListener,
    admin_listener: TcpListener,
    tls: Option<(TcpListener, Arc<rustls::ServerConfig>)>,
    workers: &Workers,
) {
    let shipper = Shipper {
        journal: journal.clone(),
        clock: deps.clock.clone(),
        metrics: deps.metrics.clone(),
        shutdown: deps.shutdown.clone(),
        pending: Portion::of(&deps.metrics.journal_pending_records),
        reported: Reported::default(),
        store: deps.store.clone(),
    };
    let hold = deps.shutdown.hold(Stage::Journal);
    drop(deps.tasks.spawn("tracker-ship", shipper.run(hold)));
    let listening = |name, max_connections, until, connections_until| Listening {
        tls: None,
        name,
        max_connections,
        tasks: deps.tasks.clone(),
        workers: None,
        shutdown: deps.shutdown.clone(),
        until,
        connections_until,
    };
    let links = |name, tls| Listening {
        tls,
        workers: Some(workers.clone()),
        ..listening(name, MAX_CONNECTIONS, Stage::Intake, Stage::Transactions)
    };
    links("tracker", None).start(listener, public.clone());
    if let Some((listener, config)) = tls {
        links("tracker-tls", Some(config)).start(listener, public.clone());
    }
    let in_use = Arc::new(ArcSwap::default());
    let following = keys::follow(
        deps.store.clone(),
        deps.clock.clone(),
        Arc::clone(&in_use),
        deps.shutdown.clone(),
    );
    drop(deps.tasks.spawn("tracker-keys", following));
    let admin = Arc::new(Admin {
        store: deps.store.clone(),
        public: Arc::clone(public),
        keys_in_use: in_use,
        journal: journal.clone(),
        metrics: deps.metrics.clone(),
        shutdown: deps.shutdown.clone(),
    });
    // Until the very end: a drain is worth watching.
    listening(
        "tracker-admin",
        MAX_ADMIN_CONNECTIONS,
        Stage::Close,
        Stage::Close,
    )
    .start(admin_listener, admin);
}

/// Starts what follows the store, and what replaces certificates: files that change, and fetching.
fn keep_certificates(
    config: &Config,
    deps: &Deps,
    public: &Public,
    certificates: &Arc<Certificates>,
    node: JournalId,
) {
    let settings = &config.tracker;
    let (store, clock) = (deps.store.clone(), deps.clock.clone());
    let follow = public
        .tenants
        .clone()
        .follow(store, clock, deps.shutdown.clone());
    drop(deps.tasks.spawn("tracker-tenants", follow));
    if !settings.certificates.is_empty() {
        let watch = certificates.clone().watch(deps.shutdown.clone());
        drop(deps.tasks.spawn("tracker-certificates", watch));
    }
    if let (Some(directory), Some(challenges)) = (&settings.acme.directory, &public.challenges) {
        let acme = Acme {
            directory: directory.clone(),
            config: settings.acme.clone(),
            in_files: settings
                .certificates
                .iter()
                .map(|of| of.host.clone())
                .collect(),
            tenants: public.tenants.clone(),
            certificates: certificates.clone(),
            challenges: challenges.clone(),
            store: deps.store.clone(),
            clock: deps.clock.clone(),
            metrics: deps.metrics.clone(),
            node,
        };
        drop(
            deps.tasks
                .spawn("tracker-acme", acme.run(deps.shutdown.clone())),
        );
    }
}

fn load_rules(file: &ReadFile) -> Result<Rules, StartError> {
    file.parsed(Rules::shipped, Rules::parse)
        .map_err(StartError::Rules)
}

async fn listen(what: &'static str, address: SocketAddr) -> Result<TcpListener, StartError> {
    let bound = TcpListener::bind(address).await;
    bound.map_err(|source| StartError::Listen {
        what,
        address,
        source,
    })
}

async fn open_journal(config: &Config, deps: &Deps) -> Result<Journal, StartError> {
    let mut random = [0; 16];
    aws_lc_rs::rand::fill(&mut random)
        .map_err(|_| StartError::System(io::Error::other("no random bytes")))?;
    let fresh_id = JournalId::new(deps.clock.now(), u128::from_be_bytes(random));
    let directory: &Path = &config.journal.dir;
    let settings = JournalConfig {
        sync_interval: Some(config.journal.sync),
        max_bytes: config.journal.max_bytes,
        retain: config.store.journal_retained(),
        ..JournalConfig::new(directory, "tracker", fresh_id)
    };
    Ok(blocking(move || Journal::open(&settings, Arc::new(RealDisk))).await??)
}

async fn blocking<T: Send + 'static>(
    act: impl FnOnce() -> T + Send + 'static,
) -> Result<T, StartError> {
    let done = tokio::task::spawn_blocking(act).await;
    done.map_err(|error| StartError::System(io::Error::other(error)))
}
