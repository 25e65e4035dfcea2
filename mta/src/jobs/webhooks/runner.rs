//! Serves one webhook: reads events by cursor, hands them over, moves the cursor.
//!
//! A task of its own, so that a receiver that hangs keeps nobody waiting but itself; it holds one
//! page of events at most. What comes next is `course`'s. It starts no delivery that could outlast
//! its lease, so that never two nodes serve one webhook.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use hyper::Method;
use hyper::header::{CONTENT_TYPE, HeaderMap, HeaderValue};
use ipnet::IpNet;
use model::{Event, JournalId, WebhookId};
use serde::Serialize;
use service::clock::SharedClock;
use service::metrics::{Metrics, WebhookResult};
use store::{EventPage, EventQuery, FeedPlace, Store, StoreError};
use tokio_util::sync::CancellationToken;

use super::course::{Due, Failure, Progress};
use super::hook::{Hook, Target, delivery_id};
use super::registry::Registry;
use crate::http::{Call, HttpClient, Reach, WHOLE};

/// How long one node serves a webhook without asking again.
pub(super) const LEASE: Duration = Duration::from_secs(60);
/// What has to be left of it when a delivery starts.
const LEASE_LEFT: Duration = Duration::from_secs(WHOLE.as_secs() + 5);
/// The longest that a turn waits: the lease wants to be renewed.
const TURN: Duration = Duration::from_secs(15);
/// After the store did not answer.
const STORE_PAUSE: Duration = Duration::from_secs(1);
/// After an idle time, for what happens together to leave together.
const GATHER: Duration = Duration::from_millis(200);
/// How often the cursor is written when there is nothing to tell.
const IDLE_SAVE: Duration = Duration::from_secs(60);
/// How much is told again when the store no longer knows the cursor.
const OVERLAP: Duration = Duration::from_secs(600);

/// What a runner is made of.
#[derive(Clone)]
pub(super) struct RunnerDeps {
    pub(super) registry: Arc<Registry>,
    pub(super) store: Arc<dyn Store>,
    pub(super) http: Arc<HttpClient>,
    pub(super) allow_private: Arc<[IpNet]>,
    pub(super) clock: SharedClock,
    pub(super) metrics: Arc<Metrics>,
    pub(super) node: JournalId,
}

/// The task; see the module.
pub(super) struct Runner {
    deps: RunnerDeps,
    hook: Hook,
    target: Target,
    progress: Progress,
    /// When the progress was last written; what is newer has to be.
    saved: Progress,
    leave: CancellationToken,
    lease_until: Instant,
    waiting: Waiting,
}

/// When the oldest event that a webhook has not got was recorded, for whoever measures.
#[derive(Debug, Clone)]
pub(super) struct Waiting(Arc<AtomicI64>);

const NOTHING: i64 = i64::MIN;

impl Waiting {
    pub(super) fn nothing() -> Self {
        Self(Arc::new(AtomicI64::new(NOTHING)))
    }

    fn since(&self, events: &[Event]) {
        let at = events.first().map(|event| event.recorded_at.millis());
        self.0.store(at.unwrap_or(NOTHING), Ordering::Relaxed);
    }

    /// For how long, at this time in milliseconds.
    pub(super) fn millis(&self, now: i64) -> i64 {
        match self.0.load(Ordering::Relaxed) {
            NOTHING => 0,
            since => now.saturating_sub(since).max(0),
        }
    }
}

/// Why a runner ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    /// It was asked to.
    Left,
    /// Another node has the lease.
    Lost,
    /// Nothing is to be done until a person changes something.
    Parked,
}

/// What a turn came to.
enum Turn {
    GoOn,
    Pause(Duration),
    /// Until there are more events.
    Idle,
    End(Ended),
}

#[derive(Serialize)]
struct Delivery<'a> {
    events: &'a [Event],
}

impl Runner {
    /// For the holder of the lease since `leased`.
    pub(super) fn new(
        deps: RunnerDeps,
        (hook, target): (Hook, Target),
        progress: Progress,
        leave: CancellationToken,
        leased: Instant,
        waiting: Waiting,
    ) -> Self {
        let saved = progress.clone();
        let mut runner = Self {
            deps,
            hook,
            target,
            progress,
            saved,
            leave,
            lease_until: leased + LEASE,
            waiting,
        };
        let now = runner.deps.clock.now();
        runner.progress.adopt(&runner.hook, now);
        runner
    }

    /// Runs until it is asked to leave, loses its lease or patience. May be dropped at any moment:
    /// what was handed over and not noted is handed over again.
    pub(super) async fn run(mut self) -> Ended {
        loop {
            let turn = self.turn().await;
            let waited = async {
                match turn {
                    Turn::GoOn => None,
                    Turn::Pause(pause) => {
                        tokio::time::sleep(pause.min(TURN)).await;
                        None
                    }
                    Turn::Idle => {
                        let place = FeedPlace::Events(&self.progress.cursor);
                        self.deps.store.changed(place, TURN).await;
                        tokio::time::sleep(GATHER).await;
                        None
                    }
                    Turn::End(ended) => Some(ended),
                }
            };
            let ended = tokio::select! {
                biased;
                ended = waited => ended,
                () = self.leave.cancelled() => None,
            };
            if let Some(ended) = ended {
                return ended;
            }
        }
    }

    async fn turn(&mut self) -> Turn {
        if !self.save_if_due().await {
            // What was acknowledged is noted before more is sent.
            return match self.leave.is_cancelled() {
                true => Turn::End(Ended::Left),
                false => Turn::Pause(STORE_PAUSE),
            };
        }
        if self.leave.is_cancelled() {
            return Turn::End(Ended::Left);
        }
        match self.hold_lease().await {
            Ok(true) => {}
            Ok(false) => return Turn::End(Ended::Lost),
            Err(error) => {
                tracing::debug!(%error, "a webhook waits for the store");
                return Turn::Pause(STORE_PAUSE);
            }
        }
        match self.progress.due(self.deps.clock.now()) {
            Due::Parked => Turn::End(Ended::Parked),
            Due::Wait(wait) => Turn::Pause(wait),
            Due::Send(limit) => match self.page(limit).await {
                Ok(page) => self.take(page).await,
                Err(pause) => Turn::Pause(pause),
            },
        }
    }

    /// Writes the progress when it must be: at once after a delivery, now and then while nothing
    /// happens. False: the store did not take it.
    async fn save_if_due(&mut self) -> bool {
        let (now, then) = (&self.progress, &self.saved);
        let same = now.failure == then.failure
            && now.delivered_at == then.delivered_at
            && now.edition == then.edition
            && now.limit == then.limit;
        let long = now.moved_at.since(then.moved_at) >= IDLE_SAVE || self.leave.is_cancelled();
        if same && (now.cursor == then.cursor || !long) {
            return true;
        }
        match self.deps.registry.save(self.hook.id, &self.progress).await {
            Ok(()) => {
                self.saved = self.progress.clone();
                true
            }
            Err(error) => {
                tracing::debug!(%error, "how far a webhook is could not be noted");
                false
            }
        }
    }

    /// Whether the webhook is this node's for long enough.
    async fn hold_lease(&mut self) -> Result<bool, StoreError> {
        let clock = &self.deps.clock;
        let asked = clock.instant();
        if self.lease_until.saturating_duration_since(asked) >= LEASE_LEFT {
            return Ok(true);
        }
        let job = job(self.hook.id);
        let lease = self
            .deps
            .store
            .job_lease(&job, self.deps.node, clock.now(), LEASE);
        let held = lease.await?.is_some();
        self.lease_until = asked + LEASE;
        Ok(held)
    }

    /// Events after the cursor.
    async fn page(&mut self, limit: u32) -> Result<EventPage, Duration> {
        let query = EventQuery {
            after: Some(self.progress.cursor.clone()),
            account: Some(self.hook.account.clone()),
            kinds: self.hook.types.clone(),
            batch: None,
            limit,
        };
        match self.deps.store.events(query).await {
            Ok(page) => Ok(page),
            Err(StoreError::Refused(why)) => {
                self.begin_anew(&why).await;
                Err(STORE_PAUSE)
            }
            Err(StoreError::Unavailable(why)) => {
                tracing::debug!(%why, "a webhook waits for the store");
                Err(STORE_PAUSE)
            }
            Err(StoreError::Damaged(why)) => {
                tracing::error!(webhook = %self.hook.id, %why, "events cannot be read");
                Err(TURN)
            }
        }
    }

    /// The store is another one than the cursor was of, such as one that came from a backup: goes on
    /// by time, with some of it told again.
    async fn begin_anew(&mut self, why: &str) {
        let from = self.progress.moved_at - OVERLAP;
        tracing::warn!(webhook = %self.hook.id, why, %from, "the cursor of a webhook is not of this store: going on by time");
        if let Ok(cursor) = self.deps.registry.cursor_at(from).await {
            self.progress.cursor = cursor;
        }
    }

    /// Hands a page over.
    async fn take(&mut self, page: EventPage) -> Turn {
        self.waiting.since(&page.events);
        if page.events.is_empty() {
            let more = page.next != self.progress.cursor;
            let now = self.deps.clock.now();
            self.progress.skipped(page.next, now);
            return if more { Turn::GoOn } else { Turn::Idle };
        }
        let count = u32::try_from(page.events.len()).unwrap_or(u32::MAX);
        let id = delivery_id(self.hook.id, &page.events);
        let events = &page.events;
        let sent = match serde_json::to_vec(&Delivery { events }) {
            Ok(body) => {
                // A receiver that hangs holds no more than it has to.
                drop(page.events);
                self.send(id, body.into()).await
            }
            Err(error) => Err(own_fault(&error)),
        };
        self.note(sent, page.next, count);
        Turn::GoOn
    }

    /// Moves on, or not.
    fn note(&mut self, sent: Result<(), Failure>, next: String, events: u32) {
        let now = self.deps.clock.now();
        let results = &self.deps.metrics.webhook_deliveries;
        let Err(failure) = sent else {
            results.at(WebhookResult::Delivered).inc();
            self.waiting.since(&[]);
            self.progress.acknowledged(next, now);
            return;
        };
        let result = match failure.status {
            Some(_) => WebhookResult::Refused,
            None => WebhookResult::Failed,
        };
        results.at(result).inc();
        tracing::info!(webhook = %self.hook.id, events, reason = %failure.reason, "a webhook did not take its events");
        let jitter = 0.8 + 0.4 * fastrand::f64();
        self.progress.failed(failure, events, now, jitter);
        if self.progress.is_parked() {
            results.at(WebhookResult::Parked).inc();
            self.waiting.since(&[]);
            tracing::error!(webhook = %self.hook.id, account = %self.hook.account, "a webhook is parked: its receiver had no success for 72 hours");
        }
    }

    async fn send(&self, id: String, body: Bytes) -> Result<(), Failure> {
        let seconds = self.deps.clock.now().seconds();
        let signature = self.hook.secret.sign(&id, seconds, &body);
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        for (name, value) in [
            ("webhook-id", id),
            ("webhook-timestamp", seconds.to_string()),
            ("webhook-signature", signature),
        ] {
            let value = HeaderValue::try_from(value).map_err(|error| own_fault(&error))?;
            headers.insert(name, value);
        }
        let call = Call {
            is_tls: self.target.is_tls,
            host: &self.target.host,
            port: self.target.port,
            method: Method::POST,
            path: &self.target.path,
            headers,
            body,
            reach: Reach::Besides(&self.deps.allow_private),
        };
        match self.deps.http.tell(call).await {
            Ok(told) if told.status.is_success() => Ok(()),
            Ok(told) => Err(Failure {
                status: Some(told.status.as_u16()),
                reason: format!("answered with status {}", told.status),
                retry_after: told.retry_after,
            }),
            Err(error) => Err(Failure {
                status: None,
                reason: error.to_string(),
                retry_after: None,
            }),
        }
    }
}

fn own_fault(error: &dyn std::fmt::Display) -> Failure {
    Failure {
        status: None,
        reason: format!("the delivery cannot be written: {error}"),
        retry_after: None,
    }
}

/// The name of the lease on a webhook.
pub(super) fn job(id: WebhookId) -> String {
    format!("webhook:{id}")
}
