//! Asks the store what this node has of limits that all nodes keep together.
//!
//! A task of its own, so that a slow answer holds up nobody: what was last known holds meanwhile.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use service::metrics::Metrics;
use store::{Share, ShareClaim, ShareRequest};
use tokio::sync::mpsc;

use super::SendingDeps;
use super::limits::{key, names};
use crate::queue::{Claim, Event, Limit};

/// How long an answer may take; then what was last known holds.
const PATIENCE: Duration = Duration::from_secs(1);

/// The way to the task.
#[derive(Debug)]
pub(super) struct Sharing {
    asks: mpsc::Sender<Vec<Claim>>,
}

impl Sharing {
    /// Starts the task; it ends with this, and gives up what the node has.
    pub(super) fn start(deps: &SendingDeps, queue: &mpsc::Sender<Event>) -> Self {
        let (asks, inbox) = mpsc::channel(1);
        let task = Task {
            store: Arc::clone(&deps.store),
            metrics: Arc::clone(&deps.metrics),
            clock: deps.clock.clone(),
            node: deps.journal.id(),
            ttl: deps.lease,
            sources: names(&deps.smtp.sources),
            held: HashMap::new(),
        };
        deps.tasks.spawn("shares", task.run(inbox, queue.clone()));
        Self { asks }
    }

    /// Asks; gives the claims back when one question is open already.
    pub(super) fn ask(&self, claims: Vec<Claim>) -> Result<(), Vec<Claim>> {
        self.asks
            .try_send(claims)
            .map_err(|error| error.into_inner())
    }
}

struct Task {
    store: Arc<dyn store::Store>,
    metrics: Arc<Metrics>,
    clock: service::clock::SharedClock,
    node: model::JournalId,
    ttl: Duration,
    sources: Arc<[Box<str>]>,
    /// What the store has for this node.
    held: HashMap<Box<str>, ShareClaim>,
}

impl Task {
    async fn run(mut self, mut inbox: mpsc::Receiver<Vec<Claim>>, queue: mpsc::Sender<Event>) {
        while let Some(claims) = inbox.recv().await {
            let answers = self.ask(self.claims(&claims)).await;
            if queue
                .send(Event::LimitShares { claims, answers })
                .await
                .is_err()
            {
                break;
            }
        }
        let held = std::mem::take(&mut self.held).into_values();
        let given_up: Vec<_> = held
            .map(|claim| ShareClaim {
                wanted: false,
                ..claim
            })
            .collect();
        if !given_up.is_empty() {
            self.ask(given_up).await;
        }
    }

    /// The limit's name in the store. No destination begins with a star.
    fn key(&self, limit: &Limit) -> Box<str> {
        match limit {
            Limit::Destination(destination, source) => {
                let source = self.sources.get(*source).map_or("", |name| name);
                key(destination, source)
            }
            Limit::Batch(batch) => format!("*batch {batch}").into(),
        }
    }

    fn claims(&self, claims: &[Claim]) -> Vec<ShareClaim> {
        let one = |claim: &Claim| ShareClaim {
            key: self.key(&claim.limit),
            connections: claim.connections,
            permits: claim.permits,
            wanted: claim.wanted,
        };
        claims.iter().map(one).collect()
    }

    async fn ask(&mut self, claims: Vec<ShareClaim>) -> Option<Vec<Share>> {
        for claim in &claims {
            if claim.wanted {
                self.held.insert(claim.key.clone(), claim.clone());
            } else {
                self.held.remove(&claim.key);
            }
        }
        let request = ShareRequest {
            node: self.node,
            now: self.clock.now(),
            ttl: self.ttl,
            claims,
        };
        let began = self.clock.instant();
        let answer = tokio::time::timeout(PATIENCE, self.store.shares(request)).await;
        let took = self.clock.instant().saturating_duration_since(began);
        self.metrics
            .store_seconds("shares")
            .observe(took.as_secs_f64());
        match answer {
            Ok(Ok(shares)) => Some(shares),
            Ok(Err(error)) => {
                tracing::debug!(%error, "limits are kept as they were last shared");
                None
            }
            Err(_) => None,
        }
    }
}
