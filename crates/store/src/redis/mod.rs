//! The engine for many machines: Redis or Valkey, single, behind sentinels, or a Cluster.
//!
//! Any number of processes share it; none owns anything but its leases. What belongs to a
//! recipient lives in one partition, whose keys share a hash tag, and changes in one script
//! (`commit`), its events beside it (`news`). Key names, sizes and lifetimes: `docs/redis.md`.

mod apply;
mod batches;
mod books;
mod cache;
mod calls;
mod commit;
mod consent;
mod erase;
mod export;
mod feeds;
mod hand_out;
mod import;
mod keys;
mod lease;
mod link;
mod look;
mod news;
mod notes;
mod parts;
mod past;
mod pool;
mod read;
mod record;
mod retire;
mod server;
mod share;
mod shared;
mod ship;
mod stage;
mod suppress;
mod url;
mod waves;
mod work;

pub use server::Standing;
pub use url::{RedisUrl, Topology};

use crate::erased::Eraser;
use crate::sqlite::Role;
use crate::{
    AddressStory, Announcement, Backlog, Batch, BatchChange, BatchQuery, Begun, CallKey,
    ChangeOutcome, Consent, ControlCursor, ControlPage, DueScope, EndedPart, Erase, Erased,
    EventPage, EventQuery, FeedPlace, LeaseRequest, LeasedRange, LotHashes, MessageStory, NewBatch,
    NewCall, NewLot, NewPart, Note, Page, PartEnd, PartTurn, Piece, RangeRef, RecipientQuery,
    RecipientRow, Release, Result, Retire, Retired, Share, ShareRequest, Shipment, Shipped,
    SignPage, Store, StoreError, Suppression, SuppressionQuery, Suspension, Totals, Wave, Work,
    WorkScope,
};
use async_trait::async_trait;
use cache::Cache;
use commit::Scripts;
use link::Link;
use look::Turn;
use model::{BatchId, JournalId, MessageId, Partition, Seq, Timestamp, TrackingMode};
use past::Past;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError, RwLock};
use std::time::Duration;
use tokio::sync::{mpsc, watch};

/// How often another process's changes are looked for: each look wakes Redis, whose thread all nodes
/// share.
const POLL: Duration = Duration::from_millis(250);
/// Tries of a step that others keep changing under it.
const TRIES: u32 = 100;

/// By which clock leases run out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clock {
    /// The server's: clocks of nodes need not agree.
    Server,
    /// The one in each request. For tests, where time is not real.
    Caller,
}

/// How to open the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RedisOptions {
    /// Where it is.
    pub url: RedisUrl,
    /// In how many partitions recipients live (1 to 256), when the store is made. Later an MTA
    /// that asks for another number is refused.
    pub partitions: u16,
    /// Who opens it.
    pub role: Role,
    /// Refuse a server that may drop keys or loses everything when it ends.
    pub require_durable: bool,
    /// By which clock leases run out.
    pub clock: Clock,
}

/// What every call works with.
struct Inner {
    link: Link,
    partitions: u16,
    /// Notes of people stand in all partitions.
    spread: bool,
    clock: Clock,
    scripts: Scripts,
    /// Whether many events may be added beside a script.
    beside: bool,
    cache: Cache,
    /// Another one after an import, which brings its own.
    eraser: RwLock<Arc<Eraser>>,
    /// The batch served last, by queue and rank: the next lease begins after it.
    turns: Mutex<HashMap<Turn, BatchId>>,
    unreadable: AtomicU64,
    past: Past,
    standing: watch::Sender<Standing>,
    /// Counts what this process wrote.
    written: watch::Sender<u64>,
}

impl Inner {
    fn all_partitions(&self) -> impl Iterator<Item = Partition> + use<> {
        (0..=u8::MAX)
            .take(usize::from(self.partitions))
            .map(Partition)
    }

    fn count_unreadable(&self) {
        self.unreadable.fetch_add(1, Ordering::Relaxed);
    }

    fn unreadable(&self) -> u64 {
        self.unreadable.load(Ordering::Relaxed)
    }

    /// Wakes those who wait in this process.
    fn wrote(&self) {
        self.written.send_modify(|count| *count += 1);
    }

    fn eraser(&self) -> Arc<Eraser> {
        let eraser = self.eraser.read().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(&eraser)
    }

    fn tries(&self) -> Tries {
        Tries(0)
    }
}

/// Counts the tries of a step.
struct Tries(u32);

impl Tries {
    /// True, after a little while when it is not the first; an error when there were too many.
    async fn again(&mut self) -> Result<bool> {
        self.0 += 1;
        if self.0 > TRIES {
            return Err(StoreError::Unavailable(
                "redis: others keep changing what this step needs".into(),
            ));
        }
        if self.0 > 1 {
            let most = u64::from(self.0).min(20);
            let pause = Duration::from_millis(fastrand::u64(0..=most));
            tokio::time::sleep(pause).await;
        }
        Ok(true)
    }
}

/// The engine for many machines.
pub struct RedisStore {
    inner: Arc<Inner>,
}

impl std::fmt::Debug for RedisStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RedisStore")
            .field("partitions", &self.inner.partitions)
            .finish_non_exhaustive()
    }
}

impl RedisStore {
    /// Opens the store, and makes it when it is not there.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`] when the server cannot be reached; [`StoreError::Refused`] when
    /// it is too old, may drop keys or forgets everything when it ends, or the store has another
    /// number of partitions; [`StoreError::Damaged`] when a newer version made it.
    pub async fn open(options: RedisOptions) -> Result<Self> {
        if !(1..=256).contains(&options.partitions) {
            return Err(StoreError::Refused("partitions must be 1 to 256".into()));
        }
        let link = Link::open(&options.url).await?;
        let standing = server::standing(&link).await?;
        if options.require_durable {
            standing.must_be_durable()?;
        }
        import::must_be_whole(&link).await?;
        let made = server::made(&link, &options).await?;
        let of = (&*made.generation, made.before);
        let missing = past::settle(&link, made.partitions, of).await?;
        server::is_made(&link).await?;
        let eraser = server::eraser(&link).await?;
        let inner = Inner {
            beside: news::may_go_beside(&link).await?,
            link,
            partitions: made.partitions,
            spread: made.spread,
            clock: options.clock,
            scripts: Scripts::new(),
            cache: Cache::new(),
            eraser: RwLock::new(Arc::new(eraser)),
            turns: Mutex::new(HashMap::new()),
            unreadable: AtomicU64::new(0),
            past: Past::new(made.generation, missing),
            standing: watch::Sender::new(standing),
            written: watch::Sender::new(0),
        };
        inner.look_back().await?;
        if !made.before {
            inner.begin_history().await?;
        }
        if options.role == Role::Mta {
            let now = Timestamp::from_millis(inner.wall().await?);
            inner.abandon_leftovers(now).await?;
        }
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// How the server stands, as it was at the last [`Store::check`].
    pub fn standing(&self) -> Standing {
        self.inner.standing.borrow().clone()
    }
}

#[async_trait]
impl Store for RedisStore {
    fn partitions(&self) -> u16 {
        self.inner.partitions
    }

    async fn stage_lots(&self, batch: BatchId, lots: Vec<NewLot>) -> Result<()> {
        self.inner.stage(batch, lots).await
    }

    async fn begin_call(&self, call: NewCall, now: Timestamp, ttl: Duration) -> Result<Begun> {
        self.inner.begin_call(call, now, ttl).await
    }

    async fn drop_call(&self, key: CallKey, attempt: BatchId) -> Result<()> {
        self.inner.drop_call(key, attempt).await
    }

    async fn commit_batch(&self, batch: NewBatch, now: Timestamp) -> Result<()> {
        self.inner.commit(batch, now).await
    }

    async fn abandon_batch(&self, batch: BatchId) -> Result<()> {
        let now = Timestamp::from_millis(self.inner.wall().await?);
        self.inner.abandon(batch, now).await
    }

    async fn begin_part(&self, part: NewPart, now: Timestamp, ttl: Duration) -> Result<PartTurn> {
        self.inner.begin_part(part, now, ttl).await
    }

    async fn stage_part(
        &self,
        part: NewPart,
        lots: Vec<NewLot>,
        now: Timestamp,
        ttl: Duration,
    ) -> Result<bool> {
        self.inner.stage_part(part, lots, now, ttl).await
    }

    async fn commit_part(&self, part: EndedPart, now: Timestamp) -> Result<PartEnd> {
        self.inner.commit_part(part, now).await
    }

    async fn drop_part(&self, part: NewPart, _now: Timestamp) -> Result<()> {
        self.inner.drop_part(part).await
    }

    async fn part_hashes(&self, batch: BatchId, from: u32) -> Result<Vec<LotHashes>> {
        self.inner.part_hashes(batch, from).await
    }

    async fn lot_rows(&self, batch: BatchId, lot: model::LotNumber) -> Result<Vec<model::Row>> {
        self.inner.lot_rows(batch, lot).await
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
        self.inner.lease(&request).await
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

    async fn ship(&self, shipment: Shipment) -> Result<Shipped> {
        self.inner.ship(shipment).await
    }

    async fn high_water(&self, journal: JournalId) -> Result<Seq> {
        self.inner.high_water(journal).await
    }

    async fn change_batch(
        &self,
        batch: BatchId,
        change: BatchChange,
        now: Timestamp,
    ) -> Result<ChangeOutcome> {
        self.inner.change(batch, change, now).await
    }

    async fn release_wave(
        &self,
        batch: BatchId,
        wave: u32,
        how: Wave,
        now: Timestamp,
    ) -> Result<u64> {
        self.inner.release_wave(batch, wave, how, now).await
    }

    async fn control(&self, after: Option<ControlCursor>) -> Result<ControlPage> {
        self.inner.control_page(after).await
    }

    async fn changed(&self, after: FeedPlace<'_>, at_most: Duration) {
        let Some(place) = self.inner.place(after) else {
            return;
        };
        let looking = async {
            let mut here = self.inner.written.subscribe();
            loop {
                here.mark_unchanged();
                // A store that does not answer is a change: reading tells.
                if self.inner.is_ahead(&place).await.unwrap_or(true) {
                    return;
                }
                // What this process wrote is looked at when it was written, the rest soon.
                let _changed = tokio::time::timeout(POLL, here.changed()).await;
            }
        };
        let _ended = tokio::time::timeout(at_most, looking).await;
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

    async fn set_consent(
        &self,
        account: &str,
        email: &str,
        mode: Option<TrackingMode>,
        now: Timestamp,
    ) -> Result<bool> {
        self.inner.set_consent(account, email, mode, now).await
    }

    async fn consents(&self, account: &str, emails: Vec<String>) -> Result<Vec<Option<Consent>>> {
        self.inner.consents(account, &emails).await
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

    async fn swap_note(
        &self,
        note: Note,
        before: Option<Box<[u8]>>,
        now: Timestamp,
    ) -> Result<bool> {
        self.inner.swap_note(note, before.as_deref(), now).await
    }

    async fn notes(&self, kind: &str, now: Timestamp) -> Result<Vec<Note>> {
        self.inner.notes(kind, now).await
    }

    async fn note(&self, kind: &str, key: &str, now: Timestamp) -> Result<Option<Note>> {
        self.inner.note(kind, key, now).await
    }

    async fn notes_after(
        &self,
        kind: &str,
        after: Option<&str>,
        limit: u32,
        now: Timestamp,
    ) -> Result<Page<Note>> {
        self.inner.notes_after(kind, after, limit, now).await
    }

    async fn notes_by_key(
        &self,
        kind: &str,
        keys: Vec<Box<str>>,
        now: Timestamp,
    ) -> Result<Vec<Note>> {
        self.inner.notes_by_key(kind, keys, now).await
    }

    async fn derive(
        &self,
        notes: Vec<Note>,
        news: Vec<Announcement>,
        now: Timestamp,
    ) -> Result<()> {
        self.inner.derive(notes, news, now).await
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

    fn is_shared(&self) -> bool {
        true
    }

    fn shipment_size(&self) -> usize {
        ship::SHIPMENT
    }

    async fn shares(&self, request: ShareRequest) -> Result<Vec<Share>> {
        self.inner.shares(&request).await
    }

    async fn announce(&self, news: Vec<Announcement>, now: Timestamp) -> Result<()> {
        self.inner.announce(news, now).await
    }

    async fn retire(&self, of: Retire, now: Timestamp) -> Result<Retired> {
        self.inner.retire(&of, now).await
    }

    async fn erase(&self, of: Erase, now: Timestamp) -> Result<Erased> {
        self.inner.erase(&of, now).await
    }

    async fn export(&self, to: mpsc::Sender<Piece>, now: Timestamp) -> Result<()> {
        self.inner.export(&to, now).await
    }

    async fn import(&self, piece: Piece, now: Timestamp) -> Result<()> {
        self.inner.import(piece, now).await
    }

    async fn batch(&self, batch: BatchId) -> Result<Option<Batch>> {
        self.inner.batch(batch).await
    }

    async fn batches(&self, query: BatchQuery) -> Result<Page<Batch>> {
        self.inner.batches(&query).await
    }

    async fn content(&self, batch: BatchId) -> Result<Option<Arc<[u8]>>> {
        self.inner.content(batch).await
    }

    async fn recipients(&self, query: RecipientQuery) -> Result<Page<RecipientRow>> {
        self.inner.recipients(&query).await
    }

    async fn message(&self, message: MessageId) -> Result<Option<MessageStory>> {
        self.inner.message(message).await
    }

    async fn messages(&self, messages: Vec<MessageId>) -> Result<Vec<MessageStory>> {
        self.inner.messages(&messages).await
    }

    async fn address(&self, account: &str, email: &str) -> Result<AddressStory> {
        self.inner.address(account, email).await
    }

    async fn suppressions(&self, query: SuppressionQuery) -> Result<Page<Suppression>> {
        self.inner.suppression_page(&query).await
    }

    async fn events(&self, query: EventQuery) -> Result<EventPage> {
        self.inner.event_page(&query).await
    }

    async fn signs(&self, query: EventQuery) -> Result<SignPage> {
        self.inner.sign_page(&query).await
    }

    async fn event_cursor(&self, at: Timestamp) -> Result<String> {
        self.inner.event_cursor(at).await
    }

    async fn work(
        &self,
        scope: WorkScope,
        now: Timestamp,
        limit: u32,
    ) -> Result<Option<Vec<Work>>> {
        self.inner.work(scope, now, limit).await.map(Some)
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

    async fn clock(&self) -> Result<Option<Timestamp>> {
        let wall = self.inner.wall().await?;
        Ok(Some(Timestamp::from_millis(wall)))
    }

    async fn upheavals(&self) -> Result<u64> {
        match self.inner.look_again().await {
            // That is one of them.
            Ok(()) | Err(StoreError::Damaged(_)) => Ok(self.inner.past.upheavals()),
            Err(error) => Err(error),
        }
    }

    fn caveat(&self) -> Option<String> {
        let weakness = self.inner.standing.borrow().weakness();
        let quiet =
            self.inner.past.quiet_for().map(|left| {
                format!("the primary has changed: nothing is leased for another {left} s")
            });
        let both: Vec<String> = quiet.into_iter().chain(weakness).collect();
        (!both.is_empty()).then(|| both.join("; "))
    }
}
