//! The tasks that ask the store for the queue: work, time, and what must not be sent.
//!
//! Each call is made by a task of its own, so that a slow answer to one holds up no other.

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use model::JournalId;
use service::clock::SharedClock;
use service::metrics::Metrics;
use service::tasks::{Shutdown, Stage};
use store::{Backlog, Control, ControlCursor, FeedPlace, LeaseRequest, Store, StoreError, Want};
use tokio::sync::mpsc;

use super::SendingDeps;
use crate::queue::Event;
use crate::queue::control::ControlView;

/// Queues in one answer, and answers in one look.
const QUEUES: u32 = 1_000;
const PAGES: usize = 4;
/// The control feed is never older, as long as the store answers.
const CONTROL_AGE: Duration = Duration::from_millis(250);
/// Between tries when the store does not answer.
const AGAIN: Duration = Duration::from_millis(250);

/// What the queue may ask.
#[derive(Debug)]
pub(super) enum Question {
    Look,
    Lease(Vec<Want>),
}

/// The way to the asking tasks.
#[derive(Debug)]
pub(super) struct Asking {
    work: mpsc::Sender<Question>,
    renew: mpsc::Sender<()>,
}

struct Asker {
    store: Arc<dyn Store>,
    node: JournalId,
    ttl: Duration,
    clock: SharedClock,
    metrics: Arc<Metrics>,
    queue: mpsc::Sender<Event>,
    /// Where the next look begins, when the last did not see all queues.
    after: Option<Box<str>>,
}

impl Asking {
    /// Starts the tasks; they end with this.
    pub(super) fn start(deps: &SendingDeps, queue: &mpsc::Sender<Event>) -> Self {
        let asker = || Asker {
            store: Arc::clone(&deps.store),
            node: deps.journal.id(),
            ttl: deps.lease,
            clock: deps.clock.clone(),
            metrics: Arc::clone(&deps.metrics),
            queue: queue.clone(),
            after: None,
        };
        let (work, questions) = mpsc::channel(4);
        let (renew, renewals) = mpsc::channel(4);
        deps.tasks.spawn("lease", asker().answer(questions));
        deps.tasks.spawn("renew", asker().renew(renewals));
        Self { work, renew }
    }

    /// Asks for work. The queue has one such question open at a time, so there is room.
    pub(super) fn ask(&self, question: Question) -> bool {
        self.work.try_send(question).is_ok()
    }

    /// Asks for more time; likewise.
    pub(super) fn renew(&self) -> bool {
        self.renew.try_send(()).is_ok()
    }
}

impl Asker {
    async fn answer(mut self, mut questions: mpsc::Receiver<Question>) {
        while let Some(question) = questions.recv().await {
            let asked_at = self.clock.instant();
            let event = match question {
                Question::Look => Event::Backlog(self.look().await),
                Question::Lease(wants) => {
                    let request = LeaseRequest {
                        node: self.node,
                        now: self.clock.now(),
                        ttl: self.ttl,
                        wants,
                    };
                    let ranges = self
                        .timed("lease", self.store.lease(request))
                        .await
                        .unwrap_or_default();
                    Event::Leased { ranges, asked_at }
                }
            };
            if self.queue.send(event).await.is_err() {
                return;
            }
        }
    }

    async fn look(&mut self) -> Option<Vec<Backlog>> {
        let mut found: Vec<Backlog> = Vec::new();
        for _ in 0..PAGES {
            let after = self.after.take();
            let page = self
                .timed(
                    "backlog",
                    self.store
                        .backlog(self.clock.now(), after.as_deref(), QUEUES),
                )
                .await?;
            let is_last = page.len() < QUEUES as usize;
            let last = page.last().map(|backlog| backlog.queue.clone());
            found.extend(page);
            if is_last {
                break;
            }
            self.after = last;
        }
        Some(found)
    }

    async fn renew(self, mut renewals: mpsc::Receiver<()>) {
        while renewals.recv().await.is_some() {
            let asked_at = self.clock.instant();
            let held = self
                .timed(
                    "renew",
                    self.store.renew(self.node, self.clock.now(), self.ttl),
                )
                .await;
            if self
                .queue
                .send(Event::Renewed { held, asked_at })
                .await
                .is_err()
            {
                return;
            }
        }
    }

    async fn timed<T>(
        &self,
        op: &'static str,
        asked: impl Future<Output = Result<T, StoreError>>,
    ) -> Option<T> {
        let started: Instant = self.clock.instant();
        let answer = asked.await;
        let took = self.clock.instant().saturating_duration_since(started);
        self.metrics.store_seconds(op).observe(took.as_secs_f64());
        match answer {
            Ok(answer) => Some(answer),
            Err(error) => {
                tracing::warn!(%error, op, "the store did not answer");
                tokio::time::sleep(AGAIN).await;
                None
            }
        }
    }
}

/// Asks until there is an answer.
pub(super) async fn until_answered<T, F: Future<Output = Result<T, StoreError>>>(
    ask: impl Fn() -> F,
) -> T {
    let mut told = false;
    loop {
        match ask().await {
            Ok(answer) => return answer,
            Err(error) => {
                if !told {
                    tracing::warn!(%error, "waiting for the store");
                }
                told = true;
                tokio::time::sleep(AGAIN).await;
            }
        }
    }
}

/// Follows the control feed.
pub(super) struct Follower {
    pub(super) store: Arc<dyn Store>,
    pub(super) view: Arc<ControlView>,
    pub(super) clock: SharedClock,
    pub(super) queue: mpsc::Sender<Event>,
}

impl Follower {
    /// Follows from `cursor` until nothing more is sent.
    pub(super) async fn run(self, cursor: ControlCursor, shutdown: &Shutdown) {
        tokio::select! {
            biased;
            () = self.follow(cursor) => {}
            () = shutdown.reached(Stage::Journal) => {}
        }
    }

    async fn follow(&self, mut cursor: ControlCursor) {
        loop {
            match self.store.control(Some(cursor.clone())).await {
                Ok(page) => {
                    cursor = page.next;
                    if page.reset {
                        tracing::warn!(
                            "the control feed was not followed for too long; what is leased is leased again"
                        );
                        self.view.forget(self.clock.instant());
                    }
                    let more = !page.items.is_empty();
                    if !self.take(page.items).await
                        || page.reset && !self.look_at_suspensions().await
                    {
                        return;
                    }
                    if more {
                        continue;
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "the control feed cannot be read");
                    tokio::time::sleep(AGAIN).await;
                }
            }
            self.store
                .changed(FeedPlace::Control(&cursor), CONTROL_AGE)
                .await;
        }
    }

    /// Those that came and went while the feed was not followed.
    async fn look_at_suspensions(&self) -> bool {
        let all = until_answered(|| self.store.suspensions(self.clock.now())).await;
        self.queue.send(Event::Suspensions(all)).await.is_ok()
    }

    async fn take(&self, items: Vec<Control>) -> bool {
        for control in items {
            // The view first: connections look there before each message.
            self.view.learn(&control, self.clock.instant());
            if self.queue.send(Event::Control(control)).await.is_err() {
                return false;
            }
        }
        true
    }
}
