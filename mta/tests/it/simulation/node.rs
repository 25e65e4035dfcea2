//! A sending process of the world: the real one, in simulated surroundings.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;

use arc_swap::ArcSwap;
use journal::fault::FaultDisk;
use journal::{Journal, JournalConfig};
use links::KeyRing;
use model::{JournalId, Timestamp};
use mta::classify::Rules;
use mta::compose::Threads;
use mta::deliver::TlsConfigs;
use mta::sending::{SendingDeps, SendingHandle, Surroundings, start_in};
use service::clock::{Clock, SharedClock};
use service::config::Config;
use service::config::shaping::ShapingFile;
use service::metrics::{DuplicateCause, Metrics};
use service::power::Power;
use service::tasks::{Shutdown, Tasks};
use store::sqlite::SqliteStore;
use tokio::time::Instant;

use super::network::{Globe, NodeNetwork, SimulatedDns};
use super::store::{Line, NodeStore};
use super::watch::Watch;

/// What a journal is synced after; less often than by default, so that more is lost with the power.
const SYNC: Duration = Duration::from_millis(100);
/// Where the journal lies on the simulated disk.
const JOURNAL: &str = "/journal";

/// The rules take a while to compile, and the roots of TLS to read.
static RULES: LazyLock<Arc<ArcSwap<Rules>>> =
    LazyLock::new(|| Arc::new(ArcSwap::from_pointee(Rules::shipped())));
static TLS: LazyLock<Arc<TlsConfigs>> =
    LazyLock::new(|| Arc::new(TlsConfigs::new(None).expect("TLS can be had")));

/// The clock of the machine that all nodes are on: virtual, and set by hand at times.
#[derive(Debug)]
pub(super) struct WorldClock {
    start: Instant,
    /// Milliseconds by which the wall clock was set.
    set: AtomicI64,
}

/// When every world begins.
const EPOCH: i64 = 1_800_000_000_000;

impl WorldClock {
    pub(super) fn new() -> Self {
        Self {
            start: Instant::now(),
            set: AtomicI64::new(0),
        }
    }

    /// Sets the wall clock, forward or back.
    pub(super) fn step(&self, millis: i64) {
        self.set.fetch_add(millis, Ordering::Relaxed);
    }
}

impl Clock for WorldClock {
    fn now(&self) -> Timestamp {
        let passed = i64::try_from(self.start.elapsed().as_millis()).expect("short");
        Timestamp::from_millis(EPOCH + passed + self.set.load(Ordering::Relaxed))
    }

    fn instant(&self) -> std::time::Instant {
        Instant::now().into_std()
    }
}

/// What all nodes have in common.
pub(super) struct Common {
    pub(super) clock: Arc<WorldClock>,
    pub(super) store: Arc<SqliteStore>,
    pub(super) line: Arc<Line>,
    pub(super) globe: Arc<Globe>,
    pub(super) watch: Arc<Watch>,
    pub(super) config: Config,
    pub(super) shaping: Arc<ShapingFile>,
    pub(super) ring: Arc<ArcSwap<KeyRing>>,
    pub(super) lease: Duration,
}

/// A node: its disk, and the process on it while there is one.
pub(super) struct Node {
    number: usize,
    disk: FaultDisk,
    /// How often its power went.
    boots: u64,
    process: Option<Process>,
    /// Counters of processes that are gone.
    duplicates: u64,
    delivered: u64,
    pub(super) frozen_since: Option<Instant>,
}

struct Process {
    power: Power,
    tasks: Tasks,
    shutdown: Shutdown,
    handle: SendingHandle,
    metrics: Arc<Metrics>,
}

impl Process {
    fn duplicates(&self) -> u64 {
        let causes = [DuplicateCause::ReplyLost, DuplicateCause::LostNode];
        let count = |cause| self.metrics.duplicates.at(cause).get();
        causes.into_iter().map(count).sum()
    }
}

impl Process {
    /// Deliveries that it has counted.
    fn delivered(&self) -> u64 {
        let text = self.metrics.render();
        let lines = text.lines().filter(|line| {
            line.starts_with("hikyaku_outcomes_total{") && line.contains("\"delivered\"")
        });
        let count = |line: &str| line.rsplit(' ').next()?.parse::<u64>().ok();
        lines.filter_map(count).sum()
    }
}

impl Node {
    pub(super) fn new(number: usize, seed: u64) -> Self {
        Self {
            number,
            disk: FaultDisk::new(seed ^ number as u64),
            boots: 0,
            process: None,
            duplicates: 0,
            delivered: 0,
            frozen_since: None,
        }
    }

    pub(super) fn is_running(&self) -> bool {
        self.process.is_some()
    }

    /// Starts the process with the journal that lies on the disk.
    pub(super) async fn start(&mut self, common: &Common) {
        common.watch.note(format!("node {} starts", self.number));
        common.watch.troubled(self.number);
        let power = Power::on();
        let (tasks, shutdown) = (Tasks::powered(&power), Shutdown::new());
        let fresh = JournalId::new(common.clock.now(), u128::from(fastrand::u64(..)));
        let journal = JournalConfig {
            // The thread that syncs lives in real time: here a task does it.
            sync_interval: None,
            boot: Some(self.boots.to_string()),
            ..JournalConfig::new(JOURNAL, "mta", fresh)
        };
        let journal = Journal::open(&journal, self.disk.mount()).expect("a journal");
        tasks.spawn("journal sync", sync(journal.clone()));
        let metrics = Arc::new(Metrics::new());
        let deps = self.deps(common, journal, &tasks, &shutdown, &metrics);
        let surroundings = Surroundings {
            dns: Arc::new(SimulatedDns(Arc::clone(&common.globe))),
            network: Arc::new(NodeNetwork {
                node: self.number,
                globe: Arc::clone(&common.globe),
            }),
            tls: Arc::clone(&TLS),
            composing: Threads::None,
        };
        let handle = start_in(deps, surroundings).await.expect("started");
        self.process = Some(Process {
            power,
            tasks,
            shutdown,
            handle,
            metrics,
        });
    }

    fn deps(
        &self,
        common: &Common,
        journal: Journal,
        tasks: &Tasks,
        shutdown: &Shutdown,
        metrics: &Arc<Metrics>,
    ) -> SendingDeps {
        let store = NodeStore {
            node: self.number,
            inner: Arc::clone(&common.store),
            line: Arc::clone(&common.line),
            watch: Arc::clone(&common.watch),
            began: Mutex::new(HashMap::new()),
        };
        let config = &common.config;
        let clock: SharedClock = Arc::clone(&common.clock) as SharedClock;
        SendingDeps {
            store: Arc::new(store),
            journal,
            clock,
            tasks: tasks.clone(),
            shutdown: shutdown.clone(),
            metrics: Arc::clone(metrics),
            smtp: config.smtp.clone(),
            dns: config.dns.clone(),
            accounts: config.accounts.clone(),
            tls_reports: config.tls_reports.clone(),
            pools: config.pools.clone(),
            shaping: Arc::clone(&common.shaping),
            rules: Arc::clone(&RULES),
            ring: Arc::clone(&common.ring),
            dkim_dir: PathBuf::from("/no-keys"),
            lease: common.lease,
        }
    }

    /// As `kill -9`, or as when the power goes.
    pub(super) async fn kill(&mut self, power_cut: bool, watch: &Watch) {
        let Some(process) = self.process.take() else {
            return;
        };
        let how = if power_cut {
            "loses power"
        } else {
            "is killed"
        };
        watch.note(format!("node {} {how}", self.number));
        self.duplicates += process.duplicates();
        process.power.kill();
        if power_cut {
            self.disk.power_cut();
            self.boots += 1;
        } else {
            self.disk.kill();
        }
        self.frozen_since = None;
        drop(process);
        // Its tasks go in the turns that follow, and its connections with them.
        tokio::time::sleep(Duration::from_millis(1)).await;
    }

    pub(super) fn freeze(&mut self, watch: &Watch) {
        if let Some(process) = self
            .process
            .as_ref()
            .filter(|_| self.frozen_since.is_none())
        {
            watch.note(format!("node {} stands still", self.number));
            process.power.freeze();
            self.frozen_since = Some(Instant::now());
        }
    }

    pub(super) fn thaw(&mut self, watch: &Watch) {
        if let Some(process) = self
            .process
            .as_ref()
            .filter(|_| self.frozen_since.is_some())
        {
            watch.note(format!("node {} goes on", self.number));
            watch.thawed(self.number);
            process.power.thaw();
            self.frozen_since = None;
        }
    }

    /// The first fault of the process itself, if any.
    pub(super) fn fault(&self) -> Option<String> {
        let process = self.process.as_ref()?;
        let panicked = futures_util::FutureExt::now_or_never(process.tasks.failed());
        let failed = process.handle.has_failed();
        let failed = || failed.then(|| "an outcome could not be kept".to_owned());
        panicked
            .map(|panicked| panicked.to_string())
            .or_else(failed)
    }

    /// Second copies that its processes have counted, whatever the cause.
    pub(super) fn duplicates(&self) -> u64 {
        let running = self.process.as_ref().map_or(0, Process::duplicates);
        self.duplicates + running
    }

    /// Deliveries that processes have counted which were drained.
    pub(super) fn delivered(&self) -> u64 {
        self.delivered
    }

    /// As SIGTERM does.
    pub(super) async fn drain(&mut self) -> Result<(), String> {
        let Some(process) = self.process.take() else {
            return Ok(());
        };
        let drained = process.shutdown.drain(Duration::from_secs(600)).await;
        self.duplicates += process.duplicates();
        self.delivered += process.delivered();
        drained.map_err(|error| format!("node {}: {error}", self.number))?;
        process.power.kill();
        Ok(())
    }
}

async fn sync(journal: Journal) {
    loop {
        tokio::time::sleep(SYNC).await;
        if journal.sync().is_err() {
            return;
        }
    }
}
