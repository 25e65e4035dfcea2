//! Engagement: verdicts on hits together, whose browser it was, what a person did.
//!
//! One node at a time reads the events by cursor. Hits wait for company and are judged
//! ([`engagement::settle`]); what differs from the first verdict is shipped as a fact, so counters
//! and the event change in the step that takes it. What is made of events (prospects, browsers,
//! bindings) is written together with what it tells. A checkpoint stands before the oldest hit
//! that waits: what is read twice after a crash changes nothing twice, since a verdict is compared
//! with the one that holds, and a prospect knows its events. Bounces are shown to the watch over
//! full mailboxes, too. Must not decide what a hit means.

mod docs;
mod forget;
mod hit;
mod links;
mod people;
mod revise;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::jobs::{JobLease, mailboxes};
use ::engagement::Rules;
use ::engagement::settle::{Judge, Judged};
use arc_swap::ArcSwap;
use model::{Actor, Event, EventKind, FactId, HitKind, JournalId, Seq};
use rustc_hash::FxHashMap;
use service::clock::SharedClock;
use service::metrics::Metrics;
use service::tasks::Shutdown;
use store::{CURSOR, EventQuery, FeedPlace, Happened, Note, Sign, SignPage, Store, StoreError};

use hit::{Hit, Words};

pub(crate) use docs::{BINDINGS, PROSPECTS, kind_of, normalised};
pub(crate) use forget::forget;
pub(crate) use people::revocation;

/// The job's name.
const JOB: &str = "engagement";
/// The notes that keep where it is: `cursor`, and `reclassify` when somebody asked for it.
pub(crate) const NOTES: &str = "engagement";
pub(crate) const RECLASSIFY: &str = "reclassify";

/// How long the job is one node's.
const LEASE: Duration = Duration::from_secs(45);
/// Between tries to get the job, and after the store failed.
const PAUSE: Duration = Duration::from_secs(2);
/// Between turns: hits and deliveries come in numbers, and each turn is a step of the store …
const BREATH: Duration = Duration::from_millis(200);
/// … and between those that were full: a person's note is written once a turn.
const LONG_BREATH: Duration = Duration::from_secs(1);
/// A turn of so many events is full.
const FULL: usize = 50;
/// A checkpoint is written so often when nothing else is.
const CHECKPOINT: Duration = Duration::from_secs(5);
/// Events read at once.
const PAGE: u32 = 5_000;
/// Messages whose hits are judged at once: so many people are held in memory, each written once for all
/// that they did.
const MESSAGES: usize = 10_000;
/// Hits that wait; beyond, nothing more is read.
const WAITING: usize = 50_000;
/// Records of this process that are not in the store yet; beyond, they go first, …
const BEHIND: i64 = 50_000;
/// … until hardly more are left than are under way at any moment; …
const HARDLY_BEHIND: i64 = 10_000;
/// … engagement pauses before a turn, and after work so many times as long as that took, …
const STEP_BACK: u32 = 16;
/// … at most this long, …
const LONGEST_PAUSE: Duration = Duration::from_mins(3);
/// … and looks so often whether they still wait.
const LOOK: Duration = Duration::from_secs(1);

/// What is read.
const KINDS: &[EventKind] = &[
    EventKind::EmailDelivered,
    EventKind::EmailTemporaryError,
    EventKind::EmailBounced,
    EventKind::EmailFailed,
    EventKind::EmailOpened,
    EventKind::EmailClicked,
    EventKind::EmailUnsubscribed,
    EventKind::EmailComplained,
    EventKind::EmailReplied,
    EventKind::Conversion,
    EventKind::PageViewed,
    EventKind::IdentityRevoked,
];

/// The job; see the module.
pub(crate) struct Engagement {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) clock: SharedClock,
    pub(crate) metrics: Arc<Metrics>,
    /// Who runs it.
    pub(crate) node: JournalId,
    /// Replaced when they are read again.
    pub(crate) rules: Arc<ArcSwap<Rules>>,
    /// `tracker.settle`
    pub(crate) settle: Duration,
}

impl Engagement {
    /// Runs until the end begins.
    pub(crate) async fn run(self, shutdown: Shutdown) {
        let mut held = JobLease::new(JOB, LEASE, self.node, &self.store, &self.clock);
        let keep = async {
            loop {
                if let Err(error) = self.tenure(&mut held).await {
                    tracing::debug!(%error, "engagement goes on later");
                }
                tokio::time::sleep(PAUSE).await;
            }
        };
        tokio::select! {
            () = keep => {}
            () = shutdown.begun() => {}
        }
        held.give_up().await;
    }

    /// Works as long as the job is this node's.
    async fn tenure(&self, held: &mut JobLease) -> Result<(), StoreError> {
        if held.keep().await?.is_none() {
            return Ok(());
        }
        let mut worker = Worker::resume(self).await?;
        while held.keep().await?.is_some() {
            worker.turn(held).await?;
            if worker.asked_to_reclassify().await? {
                worker.reclassify(held).await?;
            }
            worker.wait().await;
        }
        Ok(())
    }
}

/// A page of events of which some hits still wait.
struct Open {
    before: Option<String>,
    waiting: usize,
}

/// One node's work on the job.
struct Worker<'a> {
    of: &'a Engagement,
    judge: Judge,
    links: links::Links,
    words: Words,
    /// Through where events were read.
    cursor: Option<String>,
    /// What was written last.
    checkpoint: Option<String>,
    written: Instant,
    /// Pages with hits that wait, by number.
    pages: BTreeMap<u64, Open>,
    page: u64,
    /// The hits that wait, and their page; named by us, like browsers and messages.
    hits: FxHashMap<FactId, (u64, Hit)>,
    /// Events and verdicts of the last turn.
    busy: usize,
    /// The journal of this tenure's verdicts.
    journal: JournalId,
    seq: Seq,
}

/// What a turn has to write.
#[derive(Default)]
struct Work {
    /// What is no hit, in order.
    told: Vec<Sign>,
    /// Hits with their verdicts, in order.
    judged: Vec<(Judged, Option<Hit>)>,
}

impl<'a> Worker<'a> {
    /// Goes on where the last one stopped.
    async fn resume(of: &'a Engagement) -> Result<Self, StoreError> {
        let now = of.clock.now();
        let known = of.store.note(NOTES, CURSOR, now).await?;
        let cursor = known.and_then(|note| String::from_utf8(note.value.into()).ok());
        Ok(Self {
            of,
            judge: Judge::new(of.settle),
            links: links::Links::default(),
            words: Words::default(),
            checkpoint: cursor.clone(),
            cursor,
            written: of.clock.instant(),
            pages: BTreeMap::new(),
            page: 0,
            hits: FxHashMap::default(),
            busy: 0,
            journal: JournalId::new(now, fastrand::u128(..)),
            seq: 0,
        })
    }

    /// Reads what is new, judges what is due, writes what follows.
    async fn turn(&mut self, held: &mut JobLease) -> Result<(), StoreError> {
        self.busy = 0;
        self.let_others_go_first(LONGEST_PAUSE, held).await?;
        loop {
            let mut work = Work::default();
            let mut caught_up = true;
            let mut began = self.of.clock.instant();
            let mut now = self.of.clock.now();
            if self.judge.waiting() < WAITING {
                let Some(page) = self.next_page().await? else {
                    return Ok(());
                };
                caught_up = page.signs.len() < usize::try_from(PAGE).unwrap_or(usize::MAX);
                let behind = page.signs.last().filter(|_| !caught_up);
                let lag = behind.map_or(0.0, |last| now.since(last.recorded_at()).as_secs_f64());
                self.of.metrics.engagement_lag_seconds.set(lag);
                if let Some(last) = behind {
                    // Who lags behind has not seen all the company that a hit had.
                    now = now.min(last.recorded_at());
                }
                self.busy += page.signs.len();
                self.learn(&page.signs).await?;
                self.take(page.signs, &mut work);
                self.cursor = Some(page.next);
            }
            loop {
                let judged = self.judge.some_due(&self.of.rules.load(), now, MESSAGES);
                self.busy += judged.len();
                work.judged.reserve_exact(judged.len());
                for judged in judged {
                    let hit = self.close(&judged.trace.id);
                    work.judged.push((judged, hit));
                }
                self.write(std::mem::take(&mut work), held).await?;
                let worked = self.of.clock.instant().saturating_duration_since(began);
                self.let_others_go_first(pause_after(worked), held).await?;
                began = self.of.clock.instant();
                if !self.judge.is_due(now) {
                    break;
                }
            }
            self.of
                .metrics
                .engagement_waiting
                .set(self.hits.len() as f64);
            if caught_up || held.keep().await?.is_none() {
                return Ok(());
            }
        }
    }

    /// Pauses while much of this process is not in the store: what was answered is worth more there than
    /// a verdict soon, where both want the same CPUs. The job stays this node's meanwhile.
    async fn let_others_go_first(
        &self,
        at_most: Duration,
        held: &mut JobLease,
    ) -> Result<(), StoreError> {
        let waiting = &self.of.metrics.journal_pending_records;
        let mut pause = StepBack::new(at_most);
        while let Some(part) = pause.next(waiting.get()) {
            tokio::time::sleep(part).await;
            if held.keep().await?.is_none() {
                break;
            }
        }
        Ok(())
    }

    /// The events after the cursor. None: it was one of another store, from which this one was
    /// filled, and what came from there was judged there; from now on it is one of this store.
    async fn next_page(&mut self) -> Result<Option<SignPage>, StoreError> {
        match self.read(self.cursor.clone()).await {
            Err(StoreError::Refused(why)) => {
                tracing::warn!(%why, "engagement goes on from now: its cursor is not of this store");
                let now = self.of.clock.now();
                self.cursor = Some(self.of.store.event_cursor(now).await?);
                Ok(None)
            }
            read => read.map(Some),
        }
    }

    async fn read(&self, after: Option<String>) -> Result<SignPage, StoreError> {
        let query = EventQuery {
            after,
            account: None,
            kinds: KINDS.to_vec(),
            batch: None,
            limit: PAGE,
        };
        self.of.store.signs(query).await
    }

    /// Finds out how many links the mails have that are clicked in.
    async fn learn(&mut self, signs: &[Sign]) -> Result<(), StoreError> {
        for sign in signs {
            if let Sign::Mail(mail) = sign
                && let Happened::Hit(of) = &mail.what
                && of.hit.kind == HitKind::Click
            {
                self.links
                    .learn(&*self.of.store, mail.message.batch)
                    .await?;
            }
        }
        Ok(())
    }

    /// Shows events to the judge; hits wait, everything else is work at once.
    fn take(&mut self, signs: Vec<Sign>, work: &mut Work) {
        let before = self.cursor.clone();
        self.page += 1;
        let mut waiting = 0;
        for sign in signs {
            show(&mut self.judge, &self.links, &mut self.words, &sign);
            match sign {
                Sign::Mail(mail) => match Hit::of(*mail, &mut self.words) {
                    Ok((id, hit)) => {
                        waiting += 1;
                        self.hits.insert(id, (self.page, hit));
                    }
                    Err(mail) => work.told.push(Sign::Mail(mail)),
                },
                other => work.told.push(other),
            }
        }
        if waiting > 0 {
            self.pages.insert(self.page, Open { before, waiting });
        }
    }

    /// A hit waits no longer.
    fn close(&mut self, id: &FactId) -> Option<Hit> {
        let (page, hit) = self.hits.remove(id)?;
        if let Some(open) = self.pages.get_mut(&page) {
            open.waiting -= 1;
            if open.waiting == 0 {
                self.pages.remove(&page);
            }
        }
        Some(hit)
    }

    /// Ships verdicts that changed, then writes what is made of events with the checkpoint.
    async fn write(&mut self, work: Work, held: &mut JobLease) -> Result<(), StoreError> {
        held.go_on().await?;
        let revised = self.revise(&work.judged, false).await?;
        held.go_on().await?;
        let now = self.of.clock.now();
        let mut docs = docs::Docs::new(&*self.of.store, now);
        docs.prefetch(people::wanted(&work, &revised)).await?;
        for sign in &work.told {
            people::told(&mut docs, sign).await?;
            if let Sign::Other(event) = sign {
                mailboxes::told(&*self.of.store, event, now).await?;
            }
        }
        for (judged, hit) in &work.judged {
            if let (false, Some(hit)) = (judged.again, hit) {
                people::judged(&mut docs, hit, judged).await?;
            }
        }
        for revised in &revised {
            people::revised(&mut docs, revised).await?;
        }
        let oldest = self.pages.first_key_value();
        let safe = oldest.map_or_else(|| self.cursor.clone(), |(_, open)| open.before.clone());
        let age = self
            .of
            .clock
            .instant()
            .saturating_duration_since(self.written);
        let moved = safe != self.checkpoint;
        if moved && (!docs.is_clean() || age >= CHECKPOINT) {
            let value = safe.clone().unwrap_or_default();
            docs.note(Note {
                kind: NOTES.into(),
                key: CURSOR.into(),
                value: value.into_bytes().into(),
                expires_at: None,
            });
            self.written = self.of.clock.instant();
            self.checkpoint = safe;
        }
        docs.write(Some(held)).await
    }

    /// Until there is something to do.
    async fn wait(&self) {
        let full = self.busy >= FULL;
        tokio::time::sleep(if full { LONG_BREATH } else { BREATH }).await;
        let now = self.of.clock.now();
        let due = self.judge.next_due().map(|due| {
            let millis = due.millis().saturating_sub(now.millis());
            Duration::from_millis(u64::try_from(millis).unwrap_or(0))
        });
        let at_most = due.unwrap_or(CHECKPOINT).min(CHECKPOINT);
        if let Some(cursor) = &self.cursor
            && !at_most.is_zero()
        {
            self.of
                .store
                .changed(FeedPlace::Events(cursor), at_most)
                .await;
        }
    }
}

/// A pause, part by part, while records wait for the store.
struct StepBack {
    left: Duration,
    /// No more than so many may wait for it to be over before its time.
    enough: i64,
}

impl StepBack {
    fn new(at_most: Duration) -> Self {
        Self {
            left: at_most,
            enough: BEHIND,
        }
    }

    /// The next part, while so many records wait. Once begun it lasts until hardly any do: else it would
    /// end with the last part of a backlog still there, and begin again.
    fn next(&mut self, waiting: i64) -> Option<Duration> {
        if self.left.is_zero() || waiting <= self.enough {
            return None;
        }
        self.enough = HARDLY_BEHIND;
        let part = self.left.min(LOOK);
        self.left -= part;
        Some(part)
    }
}

/// How long to pause after so much work while others go first.
fn pause_after(worked: Duration) -> Duration {
    (worked * STEP_BACK).min(LONGEST_PAUSE)
}

/// Shows an event to the judge.
fn show(judge: &mut Judge, links: &links::Links, words: &mut Words, sign: &Sign) {
    let mail = match sign {
        Sign::Mail(mail) => mail,
        Sign::Other(event) => {
            let deferred = event.kind == EventKind::EmailTemporaryError;
            if let Some(message) = event.message_id.filter(|_| deferred) {
                judge.deferred(message, event.recorded_at);
            }
            return;
        }
    };
    match &mail.what {
        Happened::Delivered { dot_at } => {
            judge.delivered(mail.message, *dot_at, mail.at, mail.recorded_at);
        }
        Happened::Hit(of) => {
            judge.hit(hit::trace(mail, of, words), false);
            if let Some(count) = links.of(mail.message.batch) {
                judge.links(mail.message, count);
            }
        }
    }
}

/// The verdict that an event was told with.
fn actor_of(event: &Event) -> Actor {
    let actor = event.data["actor"]
        .as_str()
        .and_then(|actor| actor.parse().ok());
    actor.unwrap_or(Actor::Unknown)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_waits_for_the_store_goes_first_for_a_while() {
        let second = Duration::from_secs(1);
        assert_eq!(pause_after(Duration::ZERO), Duration::ZERO);
        assert_eq!(pause_after(second), 16 * second);
        assert_eq!(pause_after(60 * second), LONGEST_PAUSE);
        // The lease is renewed in time: [`JobLease::keep`].
        assert!(LOOK < LEASE / 3);
    }

    #[test]
    fn a_backlog_goes_first_until_hardly_anything_waits() {
        let mut few = StepBack::new(LONGEST_PAUSE);
        assert_eq!(few.next(BEHIND), None);
        let mut many = StepBack::new(LONGEST_PAUSE);
        assert_eq!(many.next(BEHIND + 1), Some(LOOK));
        assert_eq!(many.next(HARDLY_BEHIND + 1), Some(LOOK));
        assert_eq!(many.next(HARDLY_BEHIND), None);
        let mut short = StepBack::new(LOOK + LOOK / 2);
        let parts: Vec<_> = std::iter::from_fn(|| short.next(i64::MAX)).collect();
        assert_eq!(parts, [LOOK, LOOK / 2]);
    }
}
