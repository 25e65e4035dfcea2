//! The embedded engine: one file, opened by an MTA and a tracker together.
//!
//! One thread per process writes, with group commit (`writer`); a few connections read. The
//! file is in WAL mode with `synchronous=FULL`: what is answered is synced. A second MTA on the
//! same file is refused. All partitions are in the one file, so a step over several is one step.

mod books;
mod cache;
mod calls;
mod consent;
mod control;
#[cfg(test)]
mod damaged;
mod db;
mod due;
mod erase;
mod events;
mod export;
mod feeds;
mod ids;
mod import;
mod lease;
mod map;
mod parts;
mod range;
mod read;
mod readers;
mod record;
mod retire;
mod shared;
mod ship;
mod stage;
mod story;
mod suppress;
mod waves;
mod work;
mod writer;

use crate::{
    AddressStory, Announcement, Backlog, Batch, BatchChange, BatchQuery, Begun, CallKey,
    ChangeOutcome, Consent, ControlCursor, ControlPage, DueScope, EndedPart, Erase, Erased,
    EventPage, EventQuery, FeedPlace, LeaseRequest, LeasedRange, LotHashes, MessageStory, NewBatch,
    NewCall, NewLot, NewPart, Note, Page, PartEnd, PartTurn, Piece, RangeRef, RecipientQuery,
    RecipientRow, Release, Result, Retire, Retired, Shipment, Shipped, SignPage, Store, StoreError,
    Suppression, SuppressionQuery, Suspension, Totals, Wave, Work, WorkScope,
};
use async_trait::async_trait;
use books::Books;
use cache::Cache;
use model::{BatchId, JournalId, MessageId, Seq, Timestamp, TrackingMode};
use readers::Readers;
use rusqlite::OptionalExtension as _;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use writer::Writer;

/// How often another process's changes are looked for.
const POLL: Duration = Duration::from_millis(200);

/// Who opens the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Takes batches in and leases; one at a time.
    Mta,
    /// Ships hits.
    Tracker,
    /// Looks, exports.
    Tool,
}

/// How to open the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SqliteOptions {
    /// The file; made when it is not there. Its directory must be.
    pub path: PathBuf,
    /// In how many partitions recipients live (1 to 256), when the store is made. Later an MTA
    /// that asks for another number is refused.
    pub partitions: u16,
    /// Who opens it.
    pub role: Role,
}

/// The embedded engine. Dropping it waits for the step that is being written.
pub struct SqliteStore {
    partitions: u16,
    /// Taken out by `drop` alone, so that the thread sees that nobody will ask again.
    writer: Option<Writer>,
    thread: Mutex<Option<std::thread::JoinHandle<()>>>,
    readers: Readers,
    changes: Arc<writer::Changes>,
    /// Held as long as the store is open by an MTA.
    _lock: Option<std::fs::File>,
}

impl std::fmt::Debug for SqliteStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SqliteStore")
            .field("partitions", &self.partitions)
            .finish_non_exhaustive()
    }
}

impl Drop for SqliteStore {
    fn drop(&mut self) {
        self.writer = None;
        let thread = self
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the store's writer panicked");
        }
    }
}

impl SqliteStore {
    /// Opens the store, and makes it when it is not there.
    ///
    /// # Errors
    /// [`StoreError::Refused`] when another MTA has it open, the file cannot be made, or it has
    /// another number of partitions; [`StoreError::Damaged`] when a newer version wrote it.
    pub async fn open(options: SqliteOptions) -> Result<Self> {
        let open = tokio::task::spawn_blocking(move || Self::open_blocking(&options));
        open.await
            .map_err(|error| StoreError::Refused(error.to_string()))?
    }

    fn open_blocking(options: &SqliteOptions) -> Result<Self> {
        if !(1..=256).contains(&options.partitions) {
            return Err(StoreError::Refused("partitions must be 1 to 256".into()));
        }
        let lock = db::lock(options)?;
        let mut connection = db::open_writer(options)?;
        import::must_be_whole(&connection)?;
        let partitions = db::partitions(&connection)?;
        if options.role == Role::Mta {
            if partitions != options.partitions {
                return Err(StoreError::Refused(format!(
                    "it was made with {partitions} partitions, {} are configured",
                    options.partitions
                )));
            }
            stage::abandon_leftovers(&mut connection)?;
            calls::drop_leftovers(&connection)?;
        }
        let cache = Arc::new(Cache::new());
        let changes = Arc::new(watch::Sender::new(writer::Written::default()));
        let (writer, thread) = writer::start(connection, cache.clone(), changes.clone())?;
        Ok(Self {
            partitions,
            writer: Some(writer),
            thread: Mutex::new(Some(thread)),
            readers: Readers::new(options.path.clone(), cache),
            changes,
            _lock: lock,
        })
    }

    fn writer(&self) -> Result<&Writer> {
        // Only `drop` takes it away.
        self.writer
            .as_ref()
            .ok_or_else(|| StoreError::Unavailable("closed".into()))
    }

    /// Returns when the file has something after `place`, whoever wrote it.
    async fn changed_in_file(&self, place: feeds::Place) {
        loop {
            let ahead = self
                .readers
                .read(move |reading| feeds::is_ahead(reading.connection, place));
            // A store that does not answer is a change: reading tells.
            if ahead.await.unwrap_or(true) {
                return;
            }
            tokio::time::sleep(POLL).await;
        }
    }
}

#[async_trait]
impl Store for SqliteStore {
    fn partitions(&self) -> u16 {
        self.partitions
    }

    async fn stage_lots(&self, batch: BatchId, lots: Vec<NewLot>) -> Result<()> {
        let lots = stage::pack_all(lots).await?;
        self.writer()?
            .write_soft(move |step| stage::stage(step, batch, lots))
            .await
    }

    async fn begin_call(&self, call: NewCall, now: Timestamp, ttl: Duration) -> Result<Begun> {
        self.writer()?
            .write(move |step| calls::begin(step.connection, &call, now, ttl))
            .await
    }

    async fn drop_call(&self, key: CallKey, attempt: BatchId) -> Result<()> {
        self.writer()?
            .write(move |step| calls::drop_call(step.connection, &key, attempt))
            .await
    }

    async fn commit_batch(&self, batch: NewBatch, now: Timestamp) -> Result<()> {
        stage::commit(self.writer()?, batch, now).await
    }

    async fn abandon_batch(&self, batch: BatchId) -> Result<()> {
        stage::abandon(self.writer()?, batch).await
    }

    async fn begin_part(&self, part: NewPart, now: Timestamp, ttl: Duration) -> Result<PartTurn> {
        parts::begin(self.writer()?, part, now, ttl).await
    }

    async fn stage_part(
        &self,
        part: NewPart,
        lots: Vec<NewLot>,
        now: Timestamp,
        ttl: Duration,
    ) -> Result<bool> {
        let lots = stage::pack_all(lots).await?;
        let until = (now + ttl).millis();
        self.writer()?
            .write_soft(move |step| parts::stage(step, part, lots, until))
            .await
    }

    async fn commit_part(&self, part: EndedPart, now: Timestamp) -> Result<PartEnd> {
        self.writer()?
            .write(move |step| parts::commit(step, &part, now))
            .await
    }

    async fn drop_part(&self, part: NewPart, _now: Timestamp) -> Result<()> {
        parts::drop_part(self.writer()?, part).await
    }

    async fn part_hashes(&self, batch: BatchId, from: u32) -> Result<Vec<LotHashes>> {
        self.readers
            .read(move |reading| parts::hashes(reading, batch, from))
            .await
    }

    async fn lot_rows(&self, batch: BatchId, lot: model::LotNumber) -> Result<Vec<model::Row>> {
        self.readers
            .read(move |reading| parts::rows(reading, batch, lot))
            .await
    }

    async fn backlog(
        &self,
        now: Timestamp,
        after: Option<&str>,
        limit: u32,
    ) -> Result<Vec<Backlog>> {
        let after = after.map(str::to_owned);
        let survey = |after: Option<String>| {
            self.readers
                .read(move |reading| read::survey(reading, now, after.as_deref(), limit))
        };
        let found = survey(after.clone()).await?;
        if !found.release && found.sweep.is_empty() {
            return Ok(found.backlog);
        }
        self.writer()?
            .write(move |step| control::release_due(step, now))
            .await?;
        control::sweep(self.writer()?, found.sweep, now).await?;
        Ok(survey(after).await?.backlog)
    }

    async fn lease(&self, request: LeaseRequest) -> Result<Vec<LeasedRange>> {
        self.writer()?
            .write(move |step| lease::lease(step, &request))
            .await
    }

    async fn reclaim(
        &self,
        node: JournalId,
        now: Timestamp,
        ttl: Duration,
    ) -> Result<Vec<LeasedRange>> {
        self.writer()?
            .write(move |step| lease::reclaim(step, node, now, ttl))
            .await
    }

    async fn renew(&self, node: JournalId, now: Timestamp, ttl: Duration) -> Result<Vec<RangeRef>> {
        self.writer()?
            .write(move |step| lease::renew(step, node, now, ttl))
            .await
    }

    async fn release(&self, ranges: Vec<Release>, now: Timestamp) -> Result<()> {
        self.writer()?
            .write(move |step| lease::release(step, ranges, now))
            .await
    }

    async fn ship(&self, shipment: Shipment) -> Result<Shipped> {
        self.writer()?
            .write(move |step| ship::ship(step, shipment))
            .await
    }

    async fn high_water(&self, journal: JournalId) -> Result<Seq> {
        self.readers
            .read(move |reading| ship::high_water(reading.connection, journal))
            .await
    }

    async fn change_batch(
        &self,
        batch: BatchId,
        change: BatchChange,
        now: Timestamp,
    ) -> Result<ChangeOutcome> {
        control::change(self.writer()?, batch, change, now).await
    }

    async fn release_wave(
        &self,
        batch: BatchId,
        wave: u32,
        how: Wave,
        now: Timestamp,
    ) -> Result<u64> {
        waves::release(self.writer()?, batch, wave, how, now).await
    }

    async fn control(&self, after: Option<ControlCursor>) -> Result<ControlPage> {
        self.readers
            .read(move |reading| control::page(reading.connection, after))
            .await
    }

    async fn changed(&self, after: FeedPlace<'_>, at_most: Duration) {
        let Some(place) = feeds::Place::of(after) else {
            return;
        };
        // First listen, then look: what comes in between is heard.
        let mut here = self.changes.subscribe();
        let before = *here.borrow_and_update();
        tokio::select! {
            () = tokio::time::sleep(at_most) => {}
            // The sender lives as long as the store: an error cannot come.
            _changed = here.wait_for(|now| place.moved(before, *now)) => {}
            () = self.changed_in_file(place) => {}
        }
    }

    async fn suppress(&self, entries: Vec<Suppression>, now: Timestamp) -> Result<()> {
        self.writer()?
            .write(move |step| {
                let mut books = Books::open(step, now);
                suppress::put(&mut books, entries)?;
                books.close(None).map(drop)
            })
            .await
    }

    async fn unsuppress(
        &self,
        account: &str,
        email: &str,
        list: Option<&str>,
        now: Timestamp,
    ) -> Result<u32> {
        let (account, email, list) = (
            account.to_owned(),
            email.to_owned(),
            list.map(str::to_owned),
        );
        self.writer()?
            .write(move |step| {
                let mut books = Books::open(step, now);
                let removed = suppress::remove(&mut books, &account, &email, list.as_deref())?;
                books.close(None)?;
                Ok(removed)
            })
            .await
    }

    async fn set_consent(
        &self,
        account: &str,
        email: &str,
        mode: Option<TrackingMode>,
        now: Timestamp,
    ) -> Result<bool> {
        let (account, email) = (account.to_owned(), email.to_owned());
        let partitions = self.partitions;
        self.writer()?
            .write(move |step| {
                let person = (account.as_str(), email.as_str());
                consent::set(step.connection, partitions, person, mode, now)
            })
            .await
    }

    async fn consents(&self, account: &str, emails: Vec<String>) -> Result<Vec<Option<Consent>>> {
        let account = account.to_owned();
        self.readers
            .read(move |reading| consent::of(reading.connection, &account, &emails))
            .await
    }

    async fn suspend(&self, suspension: Suspension, now: Timestamp) -> Result<()> {
        self.writer()?
            .write(move |step| shared::suspend(step, suspension, now))
            .await
    }

    async fn resume(&self, destination: &str, now: Timestamp) -> Result<bool> {
        let destination = destination.to_owned();
        self.writer()?
            .write(move |step| shared::resume(step, &destination, now))
            .await
    }

    async fn suspensions(&self, now: Timestamp) -> Result<Vec<Suspension>> {
        self.readers
            .read(move |reading| shared::suspensions(reading.connection, now))
            .await
    }

    async fn make_due(&self, scope: DueScope, now: Timestamp, dry_run: bool) -> Result<u64> {
        due::make_due(self.writer()?, scope, now, dry_run).await
    }

    async fn put_notes(&self, notes: Vec<Note>, now: Timestamp) -> Result<()> {
        self.writer()?
            .write(move |step| shared::put_notes(step.connection, notes, now))
            .await
    }

    async fn swap_note(
        &self,
        note: Note,
        before: Option<Box<[u8]>>,
        now: Timestamp,
    ) -> Result<bool> {
        self.writer()?
            .write(move |step| shared::swap_note(step.connection, note, before.as_deref(), now))
            .await
    }

    async fn notes(&self, kind: &str, now: Timestamp) -> Result<Vec<Note>> {
        let kind = kind.to_owned();
        self.readers
            .read(move |reading| shared::notes(reading.connection, &kind, now))
            .await
    }

    async fn note(&self, kind: &str, key: &str, now: Timestamp) -> Result<Option<Note>> {
        let (kind, key) = (kind.to_owned(), key.to_owned());
        self.readers
            .read(move |reading| shared::note(reading.connection, &kind, &key, now))
            .await
    }

    async fn notes_after(
        &self,
        kind: &str,
        after: Option<&str>,
        limit: u32,
        now: Timestamp,
    ) -> Result<Page<Note>> {
        let (kind, after) = (kind.to_owned(), after.map(str::to_owned));
        self.readers
            .read(move |reading| {
                shared::notes_after(reading.connection, &kind, after.as_deref(), limit, now)
            })
            .await
    }

    async fn notes_by_key(
        &self,
        kind: &str,
        keys: Vec<Box<str>>,
        now: Timestamp,
    ) -> Result<Vec<Note>> {
        let kind = kind.to_owned();
        self.readers
            .read(move |reading| shared::notes_by_key(reading.connection, &kind, keys, now))
            .await
    }

    async fn derive(
        &self,
        notes: Vec<Note>,
        news: Vec<Announcement>,
        now: Timestamp,
    ) -> Result<()> {
        self.writer()?
            .write(move |step| {
                shared::put_notes(step.connection, notes, now)?;
                let mut books = Books::open(step, now);
                news.into_iter().for_each(|of| books.account_event(of));
                books.close(None).map(drop)
            })
            .await
    }

    async fn job_lease(
        &self,
        job: &str,
        node: JournalId,
        now: Timestamp,
        ttl: Duration,
    ) -> Result<Option<u64>> {
        let job = job.to_owned();
        self.writer()?
            .write(move |step| shared::job_lease(step.connection, &job, node, now, ttl))
            .await
    }

    async fn announce(&self, news: Vec<Announcement>, now: Timestamp) -> Result<()> {
        self.writer()?
            .write(move |step| {
                let mut books = Books::open(step, now);
                news.into_iter().for_each(|of| books.account_event(of));
                books.close(None).map(drop)
            })
            .await
    }

    async fn retire(&self, of: Retire, now: Timestamp) -> Result<Retired> {
        self.writer()?
            .write(move |step| retire::retire(step, &of, now))
            .await
    }

    async fn erase(&self, of: Erase, now: Timestamp) -> Result<Erased> {
        self.writer()?
            .write(move |step| erase::erase(step, &of, now))
            .await
    }

    async fn export(&self, to: mpsc::Sender<Piece>, now: Timestamp) -> Result<()> {
        let partitions = self.partitions;
        self.readers
            .read(move |reading| export::export(reading, partitions, &to, now))
            .await
    }

    async fn import(&self, piece: Piece, now: Timestamp) -> Result<()> {
        import::import(self.writer()?, self.partitions, piece, now).await
    }

    async fn batch(&self, batch: BatchId) -> Result<Option<Batch>> {
        self.readers
            .read(move |reading| read::batch(reading, batch))
            .await
    }

    async fn batches(&self, query: BatchQuery) -> Result<Page<Batch>> {
        self.readers
            .read(move |reading| read::batches(reading, &query))
            .await
    }

    async fn content(&self, batch: BatchId) -> Result<Option<Arc<[u8]>>> {
        self.readers
            .read(move |reading| read::content(reading, batch))
            .await
    }

    async fn recipients(&self, query: RecipientQuery) -> Result<Page<RecipientRow>> {
        self.readers
            .read(move |reading| story::recipients(reading, &query))
            .await
    }

    async fn message(&self, message: MessageId) -> Result<Option<MessageStory>> {
        self.readers
            .read(move |reading| story::message(reading, message))
            .await
    }

    async fn messages(&self, messages: Vec<MessageId>) -> Result<Vec<MessageStory>> {
        self.readers
            .read(move |reading| story::messages(reading, &messages))
            .await
    }

    async fn address(&self, account: &str, email: &str) -> Result<AddressStory> {
        let (account, email) = (account.to_owned(), email.to_owned());
        self.readers
            .read(move |reading| story::address(reading, &account, &email))
            .await
    }

    async fn suppressions(&self, query: SuppressionQuery) -> Result<Page<Suppression>> {
        self.readers
            .read(move |reading| suppress::page(reading.connection, &query))
            .await
    }

    async fn events(&self, query: EventQuery) -> Result<EventPage> {
        self.readers
            .read(move |reading| events::page(reading, &query))
            .await
    }

    async fn signs(&self, query: EventQuery) -> Result<SignPage> {
        self.readers
            .read(move |reading| events::signs(reading, &query))
            .await
    }

    async fn event_cursor(&self, at: Timestamp) -> Result<String> {
        self.readers
            .read(move |reading| events::cursor_at(reading.connection, at))
            .await
    }

    async fn work(
        &self,
        scope: WorkScope,
        now: Timestamp,
        limit: u32,
    ) -> Result<Option<Vec<Work>>> {
        self.readers
            .read(move |reading| work::work(reading, &scope, now, limit).map(Some))
            .await
    }

    async fn totals(&self, now: Timestamp) -> Result<Totals> {
        self.readers
            .read(move |reading| read::totals(reading, now))
            .await
    }

    async fn setting(&self, key: &str, default: &str) -> Result<String> {
        let (key, default) = (key.to_owned(), default.to_owned());
        let known = key.clone();
        let found: Option<String> = self
            .readers
            .read(move |reading| {
                let mut sql = reading
                    .connection
                    .prepare_cached("SELECT value FROM setting WHERE key=?1")?;
                Ok(sql.query_row([known], |row| row.get(0)).optional()?)
            })
            .await?;
        if let Some(found) = found {
            return Ok(found);
        }
        self.writer()?
            .write(move |step| {
                step.connection
                    .prepare_cached("INSERT INTO setting VALUES (?1, ?2) ON CONFLICT DO NOTHING")?
                    .execute([&key, &default])?;
                let mut sql = step
                    .connection
                    .prepare_cached("SELECT value FROM setting WHERE key=?1")?;
                Ok(sql.query_row([key], |row| row.get(0))?)
            })
            .await
    }

    async fn check(&self) -> Result<()> {
        self.writer()?
            .write(|step| {
                step.connection
                    .prepare_cached("INSERT INTO meta VALUES ('checks', 1) ON CONFLICT DO UPDATE SET value=value+1")?
                    .execute([])?;
                Ok(())
            })
            .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BatchHead, LeaseRequest, NewBatch, Want};
    use model::{LotNumber, Partition, Priority, Row};

    pub(super) const T0: Timestamp = Timestamp::from_millis(1_800_000_000_000);

    pub(super) fn lot(number: u32, count: u32) -> NewLot {
        let row = |index| Row {
            index: number * count + index,
            email: format!("n{index}@x.example").parse().unwrap(),
            name: None,
            prospect_id: None,
            // What does not compress fills a disk.
            vars: Some(format!("{:x}", fastrand::u128(..)).repeat(4).into()),
            metadata: None,
            tracking: None,
            time_zone: None,
        };
        NewLot {
            number: LotNumber::new(Partition(0), number).unwrap(),
            queue: "x.example".into(),
            rows: (0..count).map(row).collect(),
            variants: Vec::new(),
        }
    }

    pub(super) fn batch(id: BatchId, accepted: u64) -> NewBatch {
        let head = BatchHead {
            id,
            account: "acme".into(),
            campaign: None,
            list: "news".into(),
            priority: Priority::Bulk,
            pool: None,
            rate: model::units::Rate::Unlimited,
            created_at: T0,
            release_at: T0,
            expires_at: None,
            tracking: TrackingMode::Individual,
            metadata: serde_json::json!({}),
            held: false,
            window: None,
            guardrails: None,
            variants: None,
        };
        NewBatch {
            head,
            content: b"content".as_slice().into(),
            accepted,
            rejected: 0,
            call: None,
        }
    }

    async fn limit_pages(store: &SqliteStore, more: Option<i64>) {
        let limit = move |step: &mut writer::Step<'_>| {
            let pages: i64 = step
                .connection
                .query_row("PRAGMA page_count", [], |row| row.get(0))?;
            let limit = more.map_or(1 << 30, |more| pages + more);
            step.connection
                .query_row(&format!("PRAGMA max_page_count={limit}"), [], |_| Ok(()))?;
            Ok(())
        };
        store.writer().unwrap().write(limit).await.unwrap();
    }

    /// However little room is left, a step is done or not done, and room makes it go on.
    #[tokio::test]
    async fn a_full_disk_is_unavailable_and_nothing_is_half_done() {
        let directory = tempfile::tempdir().unwrap();
        let options = SqliteOptions {
            path: directory.path().join("store.db"),
            partitions: 1,
            role: Role::Mta,
        };
        let store = SqliteStore::open(options).await.unwrap();
        let (mut full, mut committed) = (0, 0_u64);
        for room in 0..40 {
            let id = BatchId::new(T0, room);
            limit_pages(&store, Some(i64::try_from(room % 20).unwrap() * 4)).await;
            let steps = async {
                store.stage_lots(id, vec![lot(0, 400), lot(1, 400)]).await?;
                store.commit_batch(batch(id, 800), T0).await?;
                let want = Want::of("x.example", 10);
                let ttl = Duration::from_secs(45);
                let node = JournalId::new(T0, room);
                store
                    .lease(LeaseRequest {
                        node,
                        now: T0,
                        ttl,
                        wants: vec![want],
                    })
                    .await
                    .map(drop)
            };
            match steps.await {
                Ok(()) => {}
                Err(StoreError::Unavailable(_)) => full += 1,
                Err(other) => panic!("{other:?}"),
            }
            let found = store.batch(id).await.unwrap();
            limit_pages(&store, None).await;
            store.check().await.unwrap();
            match found {
                Some(found) => assert_eq!(found.counters.statuses(), 800),
                None => store.abandon_batch(id).await.unwrap(),
            }
            committed += u64::from(store.batch(id).await.unwrap().is_some());
        }
        assert!(
            full > 3 && committed > 3,
            "{full} times full, {committed} times not"
        );
        assert_eq!(store.totals(T0).await.unwrap().queued, committed * 800);
        let integrity = |reading: &readers::Reading<'_>| {
            Ok(reading
                .connection
                .query_row("PRAGMA integrity_check", [], |row| row.get::<_, String>(0))?)
        };
        assert_eq!(store.readers.read(integrity).await.unwrap(), "ok");
    }
}
