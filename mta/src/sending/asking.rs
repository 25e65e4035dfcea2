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
        let mut after = self.after.take();
        let asker = &*self;
        let page_after = |after: Option<Box<str>>| async move {
            let asked = asker
                .store
                .backlog(asker.clock.now(), after.as_deref(), QUEUES);
            asker.timed("backlog", asked).await
        };
        let found = look_around(&mut after, page_after).await;
        self.after = after;
        found
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

/// What there is, in order of name: of so many queues that one look does not tell them all, those
/// behind where the last ended, and the first ones again. A look at the few that are left would
/// find nothing to lease where thousands wait.
async fn look_around<F: Future<Output = Option<Vec<Backlog>>>>(
    after: &mut Option<Box<str>>,
    page_after: impl Fn(Option<Box<str>>) -> F,
) -> Option<Vec<Backlog>> {
    let mut from_first = after.is_none();
    let mut found: Vec<Backlog> = Vec::new();
    for _ in 0..PAGES {
        let page = page_after(after.take()).await?;
        let is_last = page.len() < QUEUES as usize;
        let last = page.last().map(|backlog| backlog.queue.clone());
        *after = last.filter(|_| !is_last);
        found.extend(page);
        if is_last && from_first {
            break;
        }
        from_first |= is_last;
    }
    found.sort_unstable_by(|one, other| one.queue.cmp(&other.queue));
    found.dedup_by(|one, other| one.queue == other.queue);
    Some(found)
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

#[cfg(test)]
mod tests {
    use std::future::ready;

    use super::*;

    fn backlog(queue: &str) -> Backlog {
        Backlog {
            queue: queue.into(),
            due: 1,
            next_due: None,
            transactional: false,
            batches: Vec::new(),
        }
    }

    /// Looks `times` in a row at so many queues, and counts in how many looks each was told.
    async fn told(queues: usize, times: usize) -> (Vec<usize>, Vec<u32>) {
        let names: Vec<_> = (0..queues).map(|number| format!("q{number:05}")).collect();
        let mut after = None;
        let (mut sizes, mut seen) = (Vec::new(), vec![0; queues]);
        for _ in 0..times {
            let page_after = |after: Option<Box<str>>| {
                let first = names.partition_point(|name| Some(name.as_str()) <= after.as_deref());
                let page = names.iter().skip(first).take(QUEUES as usize);
                ready(Some(page.map(|name| backlog(name)).collect()))
            };
            let found = look_around(&mut after, page_after)
                .await
                .expect("an answer");
            assert!(found.is_sorted_by(|one, other| one.queue < other.queue));
            sizes.push(found.len());
            for one in &found {
                let at = names.iter().position(|name| **name == *one.queue);
                seen[at.expect("a name")] += 1;
            }
        }
        (sizes, seen)
    }

    #[tokio::test]
    async fn no_look_tells_only_the_few_that_the_last_one_left() {
        assert_eq!(told(3, 2).await.0, [3, 3]);
        assert_eq!(told(4_000, 2).await.0, [4_000, 3_000]);
        let (sizes, seen) = told(4_003, 9).await;
        assert!(sizes.iter().all(|size| *size >= 3_000), "{sizes:?}");
        let fewest = seen.iter().min().expect("some");
        assert!(*fewest >= 6, "told in {fewest} of nine looks");
        let (sizes, seen) = told(10_003, 6).await;
        assert!(sizes.iter().all(|size| *size >= 3_000), "{sizes:?}");
        assert!(seen.iter().all(|times| *times >= 2));
    }
}
