//! A store that is away is not noticed by anyone who clicks.

use crate::harness::{Place, token, until};
use async_trait::async_trait;
use links::Kind;
use model::{BatchId, JournalId, MessageId, Seq, Timestamp};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use store::{
    AddressStory, Announcement, Backlog, Batch, BatchChange, BatchQuery, Begun, CallKey,
    ChangeOutcome, ControlCursor, ControlPage, DueScope, EventPage, EventQuery, FeedPlace,
    LeaseRequest, LeasedRange, MessageStory, NewBatch, NewCall, NewLot, Note, Page, RangeRef,
    RecipientQuery, RecipientRow, Release, Result, Shipment, Shipped, Store, StoreError,
    Suppression, SuppressionQuery, Suspension, Totals,
};

/// A real store behind a network that fails: before the call, or after it, when only the answer is
/// lost. What the tracker does not call passes through.
struct Faulty {
    inner: Arc<dyn Store>,
    away: AtomicBool,
    loses_answers: AtomicBool,
    failed: AtomicU64,
}

impl Faulty {
    fn away(inner: Arc<dyn Store>) -> Arc<Self> {
        Arc::new(Self {
            inner,
            away: AtomicBool::new(true),
            loses_answers: AtomicBool::new(false),
            failed: AtomicU64::new(0),
        })
    }

    fn cut<T>(&self, when: &AtomicBool) -> Option<Result<T>> {
        let cut = when.load(Ordering::SeqCst);
        cut.then(|| {
            self.failed.fetch_add(1, Ordering::SeqCst);
            Err(StoreError::Unavailable("the network is cut".into()))
        })
    }

    async fn fails_again(&self) {
        let before = self.failed.load(Ordering::SeqCst);
        until("another failure", async || {
            self.failed.load(Ordering::SeqCst) > before
        })
        .await;
    }
}

#[async_trait]
impl Store for Faulty {
    async fn ship(&self, shipment: Shipment) -> Result<Shipped> {
        if let Some(error) = self.cut(&self.away) {
            return error;
        }
        let shipped = self.inner.ship(shipment).await;
        self.cut(&self.loses_answers).unwrap_or(shipped)
    }
    async fn high_water(&self, journal: JournalId) -> Result<Seq> {
        match self.cut(&self.away) {
            Some(error) => error,
            None => self.inner.high_water(journal).await,
        }
    }

    fn partitions(&self) -> u16 {
        self.inner.partitions()
    }
    async fn stage_lots(&self, batch: BatchId, lots: Vec<NewLot>) -> Result<()> {
        self.inner.stage_lots(batch, lots).await
    }
    async fn commit_batch(&self, batch: NewBatch, now: Timestamp) -> Result<()> {
        self.inner.commit_batch(batch, now).await
    }
    async fn begin_call(&self, call: NewCall, now: Timestamp, ttl: Duration) -> Result<Begun> {
        self.inner.begin_call(call, now, ttl).await
    }

    async fn drop_call(&self, key: CallKey, attempt: BatchId) -> Result<()> {
        self.inner.drop_call(key, attempt).await
    }

    async fn abandon_batch(&self, batch: BatchId) -> Result<()> {
        self.inner.abandon_batch(batch).await
    }
    async fn backlog(
        &self,
        now: Timestamp,
        after: Option<&str>,
        limit: u32,
    ) -> Result<Vec<Backlog>> {
        self.inner.backlog(now, after, limit).await
    }
    async fn lease(&self, request: LeaseRequest) -> Result<Vec<LeasedRange>> {
        self.inner.lease(request).await
    }
    async fn reclaim(
        &self,
        node: JournalId,
        now: Timestamp,
        ttl: Duration,
    ) -> Result<Vec<LeasedRange>> {
        self.inner.reclaim(node, now, ttl).await
    }
    async fn renew(&self, node: JournalId, now: Timestamp, ttl: Duration) -> Result<Vec<RangeRef>> {
        self.inner.renew(node, now, ttl).await
    }
    async fn release(&self, ranges: Vec<Release>, now: Timestamp) -> Result<()> {
        self.inner.release(ranges, now).await
    }
    async fn change_batch(
        &self,
        batch: BatchId,
        change: BatchChange,
        now: Timestamp,
    ) -> Result<ChangeOutcome> {
        self.inner.change_batch(batch, change, now).await
    }
    async fn control(&self, after: Option<ControlCursor>) -> Result<ControlPage> {
        self.inner.control(after).await
    }
    async fn changed(&self, after: FeedPlace<'_>, at_most: Duration) {
        self.inner.changed(after, at_most).await;
    }
    async fn suppress(&self, entries: Vec<Suppression>, now: Timestamp) -> Result<()> {
        self.inner.suppress(entries, now).await
    }
    async fn unsuppress(
        &self,
        account: &str,
        email: &str,
        list: Option<&str>,
        now: Timestamp,
    ) -> Result<u32> {
        self.inner.unsuppress(account, email, list, now).await
    }
    async fn suspend(&self, suspension: Suspension, now: Timestamp) -> Result<()> {
        self.inner.suspend(suspension, now).await
    }
    async fn resume(&self, destination: &str, now: Timestamp) -> Result<bool> {
        self.inner.resume(destination, now).await
    }
    async fn suspensions(&self, now: Timestamp) -> Result<Vec<Suspension>> {
        self.inner.suspensions(now).await
    }
    async fn make_due(&self, scope: DueScope, now: Timestamp, dry_run: bool) -> Result<u64> {
        self.inner.make_due(scope, now, dry_run).await
    }
    async fn put_notes(&self, notes: Vec<Note>, now: Timestamp) -> Result<()> {
        self.inner.put_notes(notes, now).await
    }
    async fn notes(&self, kind: &str, now: Timestamp) -> Result<Vec<Note>> {
        self.inner.notes(kind, now).await
    }
    async fn note(&self, kind: &str, key: &str, now: Timestamp) -> Result<Option<Note>> {
        self.inner.note(kind, key, now).await
    }
    async fn job_lease(
        &self,
        job: &str,
        node: JournalId,
        now: Timestamp,
        ttl: Duration,
    ) -> Result<Option<u64>> {
        self.inner.job_lease(job, node, now, ttl).await
    }
    async fn announce(&self, news: Vec<Announcement>, now: Timestamp) -> Result<()> {
        self.inner.announce(news, now).await
    }
    async fn batch(&self, batch: BatchId) -> Result<Option<Batch>> {
        self.inner.batch(batch).await
    }
    async fn batches(&self, query: BatchQuery) -> Result<Page<Batch>> {
        self.inner.batches(query).await
    }
    async fn content(&self, batch: BatchId) -> Result<Option<Arc<[u8]>>> {
        self.inner.content(batch).await
    }
    async fn recipients(&self, query: RecipientQuery) -> Result<Page<RecipientRow>> {
        self.inner.recipients(query).await
    }
    async fn message(&self, message: MessageId) -> Result<Option<MessageStory>> {
        self.inner.message(message).await
    }
    async fn address(&self, account: &str, email: &str) -> Result<AddressStory> {
        self.inner.address(account, email).await
    }
    async fn suppressions(&self, query: SuppressionQuery) -> Result<Page<Suppression>> {
        self.inner.suppressions(query).await
    }
    async fn events(&self, query: EventQuery) -> Result<EventPage> {
        self.inner.events(query).await
    }
    async fn totals(&self, now: Timestamp) -> Result<Totals> {
        self.inner.totals(now).await
    }
    async fn setting(&self, key: &str, default: &str) -> Result<String> {
        self.inner.setting(key, default).await
    }
    async fn check(&self) -> Result<()> {
        self.inner.check().await
    }
}

async fn click_all(running: &crate::harness::Running, recipients: std::ops::Range<u32>) {
    for index in recipients {
        let answer = running
            .get(&format!("/c/{}", token(Kind::Click, index)))
            .await;
        assert_eq!(answer.status, 302, "{index}");
    }
}

#[tokio::test]
async fn links_and_unsubscribes_work_while_the_store_is_away_and_nothing_is_lost() {
    let place = Place::new(20).await;
    let store = Faulty::away(place.store.clone());
    let running = place.start_with(store.clone()).await;
    click_all(&running, 0..10).await;
    store.fails_again().await;
    let unsubscribe = format!("/u/{}", token(Kind::Unsubscribe, 3));
    assert_eq!(
        running.ask("POST", &unsubscribe, &[], b"").await.status,
        200
    );
    // It stays in service: without it every link would be dead.
    let ready = running.admin("/readyz").await;
    assert_eq!(ready.status, 200);
    assert!(
        ready.text().contains("hits wait in the journal"),
        "{}",
        ready.text()
    );
    assert!(
        running
            .admin("/metrics")
            .await
            .text()
            .contains("hikyaku_store_up 0")
    );
    assert_eq!(place.counters(|_| true).await.clicked_total, 0);

    store.away.store(false, Ordering::SeqCst);
    place
        .counters(|c| c.clicked_unique == 10 && c.unsubscribed == 1)
        .await;
    until("nothing is pending", async || {
        running
            .admin("/metrics")
            .await
            .text()
            .contains("hikyaku_journal_pending_records 0")
    })
    .await;
    click_all(&running, 10..20).await;
    running.drain().await;
    let counters = place.counters(|_| true).await;
    assert_eq!((counters.clicked_unique, counters.clicked_total), (20, 20));
}

#[tokio::test]
async fn a_lost_answer_of_the_store_counts_nothing_twice() {
    let place = Place::new(5).await;
    let store = Faulty::away(place.store.clone());
    store.away.store(false, Ordering::SeqCst);
    store.loses_answers.store(true, Ordering::SeqCst);
    let running = place.start_with(store.clone()).await;
    click_all(&running, 0..5).await;
    place.counters(|counters| counters.clicked_total == 5).await;
    store.fails_again().await;
    store.fails_again().await;
    store.loses_answers.store(false, Ordering::SeqCst);
    running.drain().await;
    assert_eq!(place.counters(|_| true).await.clicked_total, 5);
}

#[tokio::test]
async fn what_was_not_shipped_is_shipped_by_the_next_start() {
    let place = Place::new(5).await;
    let running = place.start_with(Faulty::away(place.store.clone())).await;
    let journal = running.tracker.journal_id();
    click_all(&running, 0..5).await;
    running.drain().await;
    assert_eq!(place.counters(|_| true).await.clicked_total, 0);
    let again = place.start().await;
    assert_eq!(again.tracker.journal_id(), journal);
    place.counters(|counters| counters.clicked_total == 5).await;
    again.drain().await;
    // And once more: the store knows how far it was.
    place.start().await.drain().await;
    assert_eq!(place.counters(|_| true).await.clicked_total, 5);
}
