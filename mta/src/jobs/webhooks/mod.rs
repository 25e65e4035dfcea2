//! Pushes events to campaign systems (contract, section 5).
//!
//! Owns which webhook is served by which node: nodes tell each other by notes that they are alive, of
//! those a hash of both names gives each webhook its node, and a lease makes sure. Every node looks
//! for changes twice a second, so that a webhook that was deleted or disabled stops within that time.
//! Events are not kept here: each webhook has a cursor in the store. Must not be needed by anything
//! that sends mail.

mod course;
mod hook;
mod registry;
mod runner;
#[cfg(test)]
mod tests;

pub(crate) use course::Progress;
pub(crate) use hook::{Hook, Secret, Target};
pub(crate) use registry::{Change, HOOKS_MAX, NewHook, Registry};

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use aws_lc_rs::digest;
use ipnet::IpNet;
use model::{JournalId, WebhookId};
use service::clock::SharedClock;
use service::metrics::Metrics;
use service::tasks::{Shutdown, Stage, Task, Tasks};
use store::{Note, Result, Store};
use tokio_util::sync::CancellationToken;

use crate::http::HttpClient;
use runner::{Ended, LEASE, Runner, RunnerDeps, Waiting, job};

/// Between looks for changes.
const LOOK: Duration = Duration::from_millis(400);
/// Everything is read again so often, whether or not somebody said that it changed.
const READ_ALL: Duration = Duration::from_secs(60);
/// How often a node says that it is alive, and for how long that is believed.
const ALIVE_EVERY: Duration = Duration::from_secs(10);
const ALIVE_FOR: Duration = Duration::from_secs(40);
/// How often the nodes are counted, and a webhook that another one holds is tried again.
const AGAIN: Duration = Duration::from_secs(2);
/// What deliveries that are on their way get when the process ends.
const GRACE: Duration = Duration::from_secs(5);
/// The kind of note by which nodes know of each other.
const NODES: &str = "webhook-node";

/// What pushing is made of.
pub(crate) struct WebhooksDeps {
    pub(crate) registry: Arc<Registry>,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) http: Arc<HttpClient>,
    /// `webhooks.allow_private`
    pub(crate) allow_private: Arc<[IpNet]>,
    pub(crate) clock: SharedClock,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) node: JournalId,
    pub(crate) tasks: Tasks,
}

/// The job of one node; see the module.
pub(crate) struct Webhooks {
    deps: RunnerDeps,
    tasks: Tasks,
    hooks: BTreeMap<WebhookId, Hook>,
    /// What was read last, and when.
    edition: Option<(Box<[u8]>, Instant)>,
    nodes: BTreeSet<Box<str>>,
    counted_at: Option<Instant>,
    alive_at: Option<Instant>,
    running: BTreeMap<WebhookId, Running>,
    /// Editions that are parked: not to be tried before they change.
    parked: BTreeMap<WebhookId, u64>,
    refused_at: BTreeMap<WebhookId, Instant>,
}

/// A webhook that this node serves.
struct Running {
    edition: u64,
    task: Task<Ended>,
    leave: CancellationToken,
    waiting: Waiting,
}

impl Webhooks {
    pub(crate) fn new(deps: WebhooksDeps) -> Self {
        Self {
            deps: RunnerDeps {
                registry: deps.registry,
                store: deps.store,
                http: deps.http,
                allow_private: deps.allow_private,
                clock: deps.clock,
                metrics: deps.metrics,
                node: deps.node,
            },
            tasks: deps.tasks,
            hooks: BTreeMap::new(),
            edition: None,
            nodes: BTreeSet::new(),
            counted_at: None,
            alive_at: None,
            running: BTreeMap::new(),
            parked: BTreeMap::new(),
            refused_at: BTreeMap::new(),
        }
    }

    /// Runs until the end begins; then what is on its way has a moment to arrive.
    pub(crate) async fn run(mut self, shutdown: Shutdown) {
        let hold = shutdown.hold(Stage::Transactions);
        let registry = Arc::clone(&self.deps.registry);
        while !shutdown.has_begun() {
            if let Err(error) = self.look().await {
                // What runs goes on; it waits for the store by itself.
                tracing::debug!(%error, "changes of webhooks cannot be read");
            }
            tokio::select! {
                () = tokio::time::sleep(LOOK) => {}
                () = registry.changed.notified() => {}
                () = shutdown.begun() => {}
            }
        }
        self.end().await;
        drop(hold);
    }

    async fn look(&mut self) -> Result<()> {
        self.reap().await;
        let measured = self.measure();
        self.deps.metrics.webhook_lag_seconds.set(measured);
        self.read_changes().await?;
        self.stop_what_changed().await;
        if self.hooks.is_empty() {
            return Ok(());
        }
        self.count_nodes().await?;
        self.start_what_is_ours().await
    }

    // ---- what there is ------------------------------------------------------------------

    async fn read_changes(&mut self) -> Result<()> {
        let now = self.deps.clock.instant();
        let edition = self.deps.registry.edition().await?;
        let is_known = self.edition.as_ref().is_some_and(|(known, at)| {
            *known == edition && now.saturating_duration_since(*at) < READ_ALL
        });
        if is_known {
            return Ok(());
        }
        let all = if edition.is_empty() {
            Vec::new()
        } else {
            self.deps.registry.sweep().await?;
            self.deps.registry.all().await?
        };
        self.hooks = all.into_iter().map(|hook| (hook.id, hook)).collect();
        self.parked.retain(|id, _| self.hooks.contains_key(id));
        self.refused_at.retain(|id, _| self.hooks.contains_key(id));
        self.edition = Some((edition, now));
        Ok(())
    }

    /// Says that this node is alive, and learns who else is.
    async fn count_nodes(&mut self) -> Result<()> {
        let (now, wall) = (self.deps.clock.instant(), self.deps.clock.now());
        let due = |last: Option<Instant>, every| {
            last.is_none_or(|at| now.saturating_duration_since(at) >= every)
        };
        if due(self.alive_at, ALIVE_EVERY) {
            let alive = Note {
                expires_at: Some(wall + ALIVE_FOR),
                ..self.own_note(b"1")
            };
            self.deps.store.put_notes(vec![alive], wall).await?;
            self.alive_at = Some(now);
            self.counted_at = None;
        }
        if due(self.counted_at, AGAIN) {
            let notes = self.deps.store.notes(NODES, wall).await?;
            self.nodes = notes.into_iter().map(|note| note.key).collect();
            self.counted_at = Some(now);
        }
        Ok(())
    }

    fn own_note(&self, value: &[u8]) -> Note {
        Note {
            kind: NODES.into(),
            key: self.deps.node.to_string().into(),
            value: value.into(),
            expires_at: None,
        }
    }

    /// Whether this node is the one for it.
    fn is_ours(&self, id: WebhookId) -> bool {
        let me = self.deps.node.to_string();
        let others = self.nodes.iter().map(|node| &**node);
        server(others.chain([me.as_str()]), id) == Some(me.as_str())
    }

    // ---- who serves it ------------------------------------------------------------------

    /// Looks after those that have ended by themselves.
    async fn reap(&mut self) {
        let ended = self.running.iter().filter(|(_, of)| of.task.is_finished());
        let ended: Vec<WebhookId> = ended.map(|(id, _)| *id).collect();
        for id in ended {
            let Some(running) = self.running.remove(&id) else {
                continue;
            };
            match running.task.join().await {
                Ok(Ended::Parked) => {
                    self.parked.insert(id, running.edition);
                    self.give_up(id).await;
                }
                Ok(Ended::Left) => self.give_up(id).await,
                Ok(Ended::Lost) => tracing::info!(webhook = %id, "another node serves a webhook"),
                // It was counted and logged where tasks are.
                Err(error) => tracing::error!(webhook = %id, %error, "a webhook ended badly"),
            }
        }
    }

    /// Ends at once what was deleted, disabled or changed; lets others have what is theirs.
    async fn stop_what_changed(&mut self) {
        let mut stop = Vec::new();
        for (id, running) in &self.running {
            match self.hooks.get(id) {
                Some(hook) if hook.enabled && hook.edition == running.edition => {
                    if !self.is_ours(*id) {
                        running.leave.cancel();
                    }
                }
                Some(_) | None => stop.push(*id),
            }
        }
        for id in stop {
            if let Some(running) = self.running.remove(&id) {
                running.task.abort();
                // Before another one of it starts; how it ended does not matter.
                running.task.join().await.ok();
                if self.hooks.get(&id).is_none_or(|hook| !hook.enabled) {
                    self.give_up(id).await;
                }
            }
        }
    }

    async fn start_what_is_ours(&mut self) -> Result<()> {
        let wanted: Vec<Hook> = self
            .hooks
            .values()
            .filter(|hook| self.is_wanted(hook))
            .cloned()
            .collect();
        for hook in wanted {
            let leased = self.deps.clock.instant();
            if !self.lease(hook.id, LEASE).await? {
                self.refused_at.insert(hook.id, leased);
                continue;
            }
            self.start(hook, leased).await?;
        }
        Ok(())
    }

    fn is_wanted(&self, hook: &Hook) -> bool {
        let now = self.deps.clock.instant();
        let refused = self.refused_at.get(&hook.id);
        hook.enabled
            && !self.running.contains_key(&hook.id)
            && self.parked.get(&hook.id) != Some(&hook.edition)
            && refused.is_none_or(|at| now.saturating_duration_since(*at) >= AGAIN)
            && self.is_ours(hook.id)
    }

    async fn start(&mut self, hook: Hook, leased: Instant) -> Result<()> {
        let target = match Target::parse(&hook.url) {
            Ok(target) => target,
            Err(error) => {
                tracing::error!(webhook = %hook.id, %error, "the URL of a webhook cannot be read");
                self.parked.insert(hook.id, hook.edition);
                return Ok(());
            }
        };
        let progress = self.deps.registry.progress(&hook).await?;
        let (id, edition) = (hook.id, hook.edition);
        let (leave, waiting) = (CancellationToken::new(), Waiting::nothing());
        let runner = Runner::new(
            self.deps.clone(),
            (hook, target),
            progress,
            leave.clone(),
            leased,
            waiting.clone(),
        );
        let running = Running {
            edition,
            task: self.tasks.spawn("webhook", runner.run()),
            leave,
            waiting,
        };
        self.running.insert(id, running);
        Ok(())
    }

    /// Whether the webhook is this node's for so long.
    async fn lease(&self, id: WebhookId, ttl: Duration) -> Result<bool> {
        let (deps, job) = (&self.deps, job(id));
        let lease = deps.store.job_lease(&job, deps.node, deps.clock.now(), ttl);
        Ok(lease.await?.is_some())
    }

    async fn give_up(&self, id: WebhookId) {
        if let Err(error) = self.lease(id, Duration::ZERO).await {
            tracing::debug!(webhook = %id, %error, "the lease on a webhook ends by itself");
        }
    }

    /// The age of the oldest event that was not taken yet, in seconds.
    fn measure(&self) -> f64 {
        let now = self.deps.clock.now().millis();
        let oldest = self.running.values().map(|of| of.waiting.millis(now)).max();
        Duration::from_millis(oldest.unwrap_or(0).unsigned_abs()).as_secs_f64()
    }

    async fn end(mut self) {
        for running in self.running.values() {
            running.leave.cancel();
        }
        let all_ended = async {
            while !self.running.values().all(|of| of.task.is_finished()) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        if tokio::time::timeout(GRACE, all_ended).await.is_err() {
            tracing::info!("deliveries to webhooks are cut off; they come again");
        }
        for (id, running) in std::mem::take(&mut self.running) {
            running.task.abort();
            running.task.join().await.ok();
            self.give_up(id).await;
        }
        if self.alive_at.is_some() {
            let gone = self.own_note(b"");
            let now = self.deps.clock.now();
            if let Err(error) = self.deps.store.put_notes(vec![gone], now).await {
                tracing::debug!(%error, "others learn by themselves that this node has ended");
            }
        }
    }
}

/// Which of these nodes is the one for it: the one with the highest hash of both.
fn server<'n>(nodes: impl Iterator<Item = &'n str>, id: WebhookId) -> Option<&'n str> {
    let score = |node: &&str| {
        let text = format!("{node} {id}");
        let hash = digest::digest(&digest::SHA256, text.as_bytes());
        hash.as_ref().to_vec()
    };
    nodes.max_by_key(score)
}
