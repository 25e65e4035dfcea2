//! The store goes away and comes back while mail leaves; so does the journal's room.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use model::{BatchId, JournalId, MessageId, Seq, Timestamp};
use store::{
    AddressStory, Announcement, Backlog, Batch, BatchChange, BatchQuery, Begun, CallKey,
    ChangeOutcome, ControlCursor, ControlPage, DueScope, EventPage, EventQuery, FeedPlace,
    LeaseRequest, LeasedRange, MessageStory, NewBatch, NewCall, NewLot, Note, Page, RangeRef,
    RecipientQuery, RecipientRow, Release, Result, Shipment, Shipped, Store, StoreError,
    Suppression, SuppressionQuery, Suspension, Totals,
};
use testkit::smtp_peer::{Keep, SmtpPeer, Temper};
use tokio::sync::watch;

use crate::station::{Station, people};

/// How a store that cannot be reached shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reach {
    Up,
    /// Calls fail.
    Refuses,
    /// Calls do not return before it is back, and then take effect.
    Hangs,
}

/// A store that can be cut off from the sender; the test itself goes on reading it.
struct Remote {
    inner: Arc<dyn Store>,
    reach: watch::Sender<Reach>,
}

impl Remote {
    /// Puts itself between a station and its store.
    fn before(station: &mut Station) -> Arc<Self> {
        let remote = Arc::new(Self {
            inner: Arc::clone(&station.store),
            reach: watch::Sender::new(Reach::Up),
        });
        station.store = remote.clone();
        remote
    }

    async fn reached(&self) -> Result<()> {
        let mut reach = self.reach.subscribe();
        let now = reach.wait_for(|now| *now != Reach::Hangs).await;
        match now.map(|now| *now) {
            Ok(Reach::Up) => Ok(()),
            Ok(Reach::Refuses | Reach::Hangs) | Err(_) => {
                Err(StoreError::Unavailable("cut off".to_owned()))
            }
        }
    }
}

#[async_trait]
impl Store for Remote {
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
        self.reached().await?;
        self.inner.backlog(now, after, limit).await
    }

    async fn lease(&self, request: LeaseRequest) -> Result<Vec<LeasedRange>> {
        self.reached().await?;
        self.inner.lease(request).await
    }

    async fn reclaim(
        &self,
        node: JournalId,
        now: Timestamp,
        ttl: Duration,
    ) -> Result<Vec<LeasedRange>> {
        self.reached().await?;
        self.inner.reclaim(node, now, ttl).await
    }

    async fn renew(&self, node: JournalId, now: Timestamp, ttl: Duration) -> Result<Vec<RangeRef>> {
        self.reached().await?;
        self.inner.renew(node, now, ttl).await
    }

    async fn release(&self, ranges: Vec<Release>, now: Timestamp) -> Result<()> {
        self.reached().await?;
        self.inner.release(ranges, now).await
    }

    async fn ship(&self, shipment: Shipment) -> Result<Shipped> {
        self.reached().await?;
        self.inner.ship(shipment).await
    }

    async fn high_water(&self, journal: JournalId) -> Result<Seq> {
        self.reached().await?;
        self.inner.high_water(journal).await
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
        self.reached().await?;
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
        self.reached().await?;
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

/// Shorter than by default; five seconds of it belong to what was begun.
const LEASE: Duration = Duration::from_secs(7);

/// Ambiguous attempts would come half an hour later, and the test would wait in vain.
async fn is_sent_once_in_spite_of(reach: Reach) {
    let temper = Temper::accepting()
        .keeping(Keep::PerRecipient(10_000))
        .slow_messages(Duration::from_millis(10));
    let peer = SmtpPeer::start(temper).await.expect("a peer");
    let mut station = Station::towards(&peer, "", "expire = \"1h\"").await;
    station.lease = LEASE;
    let remote = Remote::before(&mut station);
    let batch = station.submit(&people("x.example", 1_000)).await;
    let running = station.start().await;
    peer.wait_for(100).await.expect("some messages");
    remote.reach.send_replace(reach);

    // Wherever the windows end, the leases have ended by then.
    tokio::time::sleep(LEASE).await;
    let at_the_end = peer.counts();
    let known = station.counters(batch).await.delivered;
    assert!(
        known < at_the_end.messages,
        "what was begun went on: {known} known, {at_the_end:?}"
    );
    let more = peer.wait_until(|counts| counts.messages > at_the_end.messages);
    let more = tokio::time::timeout(Duration::from_secs(1), more).await;
    assert!(more.is_err(), "something began after the lease: {more:?}");

    remote.reach.send_replace(Reach::Up);
    let counters = station.finished(batch).await;
    running.drain().await;
    assert_eq!(counters.delivered, 1_000);
    let copies = peer.copies();
    assert_eq!(copies.len(), 1_000);
    assert!(copies.values().all(|copies| copies.count == 1));
}

#[tokio::test]
async fn a_store_that_refuses_for_longer_than_a_lease_costs_no_second_copy() {
    is_sent_once_in_spite_of(Reach::Refuses).await;
}

#[tokio::test]
async fn a_store_that_hangs_for_longer_than_a_lease_costs_no_second_copy() {
    is_sent_once_in_spite_of(Reach::Hangs).await;
}

#[tokio::test]
async fn a_short_outage_only_delays_what_is_known() {
    let peer = SmtpPeer::start(Temper::accepting().keeping(Keep::PerRecipient(10_000)))
        .await
        .expect("a peer");
    let mut station = Station::towards(&peer, "", "expire = \"1h\"").await;
    let remote = Remote::before(&mut station);
    let batch = station.submit(&people("x.example", 1_000)).await;
    let running = station.start().await;
    for (so_far, reach) in [(50, Reach::Refuses), (300, Reach::Hangs)] {
        peer.wait_for(so_far).await.expect("some messages");
        remote.reach.send_replace(reach);
        // As far as the window goes that the store knows of.
        let known = station.counters(batch).await.delivered;
        peer.wait_for(known + 1).await.expect("it goes on");
        remote.reach.send_replace(Reach::Up);
    }
    assert_eq!(station.finished(batch).await.delivered, 1_000);
    running.drain().await;
    assert!(peer.copies().values().all(|copies| copies.count == 1));
}

#[tokio::test]
async fn a_full_journal_stops_what_is_not_begun_and_loses_nothing() {
    let peer = SmtpPeer::start(Temper::accepting().keeping(Keep::PerRecipient(10_000)))
        .await
        .expect("a peer");
    let mut station = Station::towards(&peer, "", "expire = \"1h\"").await;
    // Room for some two hundred messages; the windows of ten lots would let 640 go.
    station.journal_bytes = Some(64 << 10);
    let remote = Remote::before(&mut station);
    let everybody: Vec<_> = (0..10)
        .flat_map(|n| people(&format!("d{n}.example"), 100))
        .collect();
    let batch = station.submit(&everybody).await;
    let running = station.start().await;
    peer.wait_for(20).await.expect("some messages");
    remote.reach.send_replace(Reach::Refuses);
    let mut so_far = 0;
    while let Ok(more) = tokio::time::timeout(
        Duration::from_secs(1),
        peer.wait_until(|counts| counts.messages > so_far),
    )
    .await
    {
        so_far = more.expect("counts").messages;
    }
    assert!(so_far < 500, "{so_far} messages went");
    assert!(!running.handle.has_failed());
    remote.reach.send_replace(Reach::Up);
    assert_eq!(station.finished(batch).await.delivered, 1_000);
    running.drain().await;
    let copies = peer.copies();
    assert_eq!(copies.len(), 1_000);
    assert!(copies.values().all(|copies| copies.count == 1));
}
