//! A store in front of another: what happens to each call on its way, said once for all calls.
//!
//! Owns the passing on. Must not change what is asked or answered: a layer delays or refuses.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use model::{BatchId, JournalId, MessageId, Seq, Timestamp, TrackingMode};

#[allow(
    clippy::wildcard_imports,
    reason = "every type of the trait passes through here"
)]
use crate::types::*;
use crate::{EventPage, Piece, Result, SignPage, Store};

/// What stands in front of a store: a network that fails, a watch that measures.
///
/// Whoever implements it is a [`Store`]. Calls are named as the methods of [`Store`] are.
#[async_trait]
pub trait Layer: Send + Sync + 'static {
    /// The store behind.
    fn inner(&self) -> &dyn Store;

    /// Comes before each call that can fail; an error is its answer, and the store behind hears
    /// nothing.
    async fn before(&self, call: &'static str) -> Result<()> {
        let _ = call;
        Ok(())
    }

    /// Waits for the answer of the store behind. Here a layer may look at it, or decide where the
    /// work is done.
    async fn wait<'a, T: Send + 'static>(
        &'a self,
        call: &'static str,
        asked: Pin<Box<dyn Future<Output = Result<T>> + Send + 'a>>,
    ) -> Result<T> {
        let _ = call;
        asked.await
    }

    /// Stands for [`Store::changed`], which cannot fail.
    async fn until_changed(&self, after: FeedPlace<'_>, at_most: Duration) {
        self.inner().changed(after, at_most).await;
    }

    /// Stands for [`Store::partitions`].
    fn partitions_known(&self) -> u16 {
        self.inner().partitions()
    }

    /// Stands for [`Store::is_shared`].
    fn is_shared_known(&self) -> bool {
        self.inner().is_shared()
    }

    /// Stands for [`Store::shipment_size`].
    fn shipment_size_known(&self) -> usize {
        self.inner().shipment_size()
    }

    /// Stands for [`Store::is_open`].
    fn is_open_now(&self) -> bool {
        self.inner().is_open()
    }

    /// Stands for [`Store::caveat`].
    fn caveat_known(&self) -> Option<String> {
        self.inner().caveat()
    }

    /// Comes after each call that can fail; an error takes the place of its answer, as when a
    /// network loses it.
    async fn after(&self, call: &'static str) -> Result<()> {
        let _ = call;
        Ok(())
    }
}

/// `answer` is asked for only when it is awaited.
async fn around<'a, L: Layer, T: Send + 'static>(
    layer: &'a L,
    call: &'static str,
    asked: Pin<Box<dyn Future<Output = Result<T>> + Send + 'a>>,
) -> Result<T> {
    layer.before(call).await?;
    let answer = layer.wait(call, asked).await;
    layer.after(call).await?;
    answer
}

#[async_trait]
impl<L: Layer> Store for L {
    fn partitions(&self) -> u16 {
        self.partitions_known()
    }

    fn is_open(&self) -> bool {
        self.is_open_now()
    }

    async fn stage_lots(&self, batch: BatchId, lots: Vec<NewLot>) -> Result<()> {
        around(self, "stage_lots", self.inner().stage_lots(batch, lots)).await
    }

    async fn begin_call(&self, call: NewCall, now: Timestamp, ttl: Duration) -> Result<Begun> {
        around(self, "begin_call", self.inner().begin_call(call, now, ttl)).await
    }

    async fn drop_call(&self, key: CallKey, attempt: BatchId) -> Result<()> {
        around(self, "drop_call", self.inner().drop_call(key, attempt)).await
    }

    async fn commit_batch(&self, batch: NewBatch, now: Timestamp) -> Result<()> {
        around(self, "commit_batch", self.inner().commit_batch(batch, now)).await
    }

    async fn abandon_batch(&self, batch: BatchId) -> Result<()> {
        around(self, "abandon_batch", self.inner().abandon_batch(batch)).await
    }

    async fn begin_part(&self, part: NewPart, now: Timestamp, ttl: Duration) -> Result<PartTurn> {
        around(self, "begin_part", self.inner().begin_part(part, now, ttl)).await
    }

    async fn stage_part(
        &self,
        part: NewPart,
        lots: Vec<NewLot>,
        now: Timestamp,
        ttl: Duration,
    ) -> Result<bool> {
        let answer = self.inner().stage_part(part, lots, now, ttl);
        around(self, "stage_part", answer).await
    }

    async fn commit_part(&self, part: EndedPart, now: Timestamp) -> Result<PartEnd> {
        around(self, "commit_part", self.inner().commit_part(part, now)).await
    }

    async fn drop_part(&self, part: NewPart, now: Timestamp) -> Result<()> {
        around(self, "drop_part", self.inner().drop_part(part, now)).await
    }

    async fn part_hashes(&self, batch: BatchId, from: u32) -> Result<Vec<LotHashes>> {
        around(self, "part_hashes", self.inner().part_hashes(batch, from)).await
    }

    async fn lot_rows(&self, batch: BatchId, lot: model::LotNumber) -> Result<Vec<model::Row>> {
        around(self, "lot_rows", self.inner().lot_rows(batch, lot)).await
    }

    async fn backlog(
        &self,
        now: Timestamp,
        after: Option<&str>,
        limit: u32,
    ) -> Result<Vec<Backlog>> {
        around(self, "backlog", self.inner().backlog(now, after, limit)).await
    }

    async fn lease(&self, request: LeaseRequest) -> Result<Vec<LeasedRange>> {
        around(self, "lease", self.inner().lease(request)).await
    }

    async fn reclaim(
        &self,
        node: JournalId,
        now: Timestamp,
        ttl: Duration,
    ) -> Result<Vec<LeasedRange>> {
        around(self, "reclaim", self.inner().reclaim(node, now, ttl)).await
    }

    async fn renew(&self, node: JournalId, now: Timestamp, ttl: Duration) -> Result<Vec<RangeRef>> {
        around(self, "renew", self.inner().renew(node, now, ttl)).await
    }

    async fn release(&self, ranges: Vec<Release>, now: Timestamp) -> Result<()> {
        around(self, "release", self.inner().release(ranges, now)).await
    }

    async fn ship(&self, shipment: Shipment) -> Result<Shipped> {
        around(self, "ship", self.inner().ship(shipment)).await
    }

    fn shipment_size(&self) -> usize {
        self.shipment_size_known()
    }

    async fn high_water(&self, journal: JournalId) -> Result<Seq> {
        around(self, "high_water", self.inner().high_water(journal)).await
    }

    async fn change_batch(
        &self,
        batch: BatchId,
        change: BatchChange,
        now: Timestamp,
    ) -> Result<ChangeOutcome> {
        around(
            self,
            "change_batch",
            self.inner().change_batch(batch, change, now),
        )
        .await
    }

    async fn release_wave(
        &self,
        batch: BatchId,
        wave: u32,
        how: Wave,
        now: Timestamp,
    ) -> Result<u64> {
        let answer = self.inner().release_wave(batch, wave, how, now);
        around(self, "release_wave", answer).await
    }

    async fn control(&self, after: Option<ControlCursor>) -> Result<ControlPage> {
        around(self, "control", self.inner().control(after)).await
    }

    async fn changed(&self, after: FeedPlace<'_>, at_most: Duration) {
        self.until_changed(after, at_most).await;
    }

    async fn suppress(&self, entries: Vec<Suppression>, now: Timestamp) -> Result<()> {
        around(self, "suppress", self.inner().suppress(entries, now)).await
    }

    async fn unsuppress(
        &self,
        account: &str,
        email: &str,
        list: Option<&str>,
        now: Timestamp,
    ) -> Result<u32> {
        around(
            self,
            "unsuppress",
            self.inner().unsuppress(account, email, list, now),
        )
        .await
    }

    async fn set_consent(
        &self,
        account: &str,
        email: &str,
        mode: Option<TrackingMode>,
        now: Timestamp,
    ) -> Result<bool> {
        let answer = self.inner().set_consent(account, email, mode, now);
        around(self, "set_consent", answer).await
    }

    async fn consents(&self, account: &str, emails: Vec<String>) -> Result<Vec<Option<Consent>>> {
        around(self, "consents", self.inner().consents(account, emails)).await
    }

    async fn suspend(&self, suspension: Suspension, now: Timestamp) -> Result<()> {
        around(self, "suspend", self.inner().suspend(suspension, now)).await
    }

    async fn resume(&self, destination: &str, now: Timestamp) -> Result<bool> {
        around(self, "resume", self.inner().resume(destination, now)).await
    }

    async fn suspensions(&self, now: Timestamp) -> Result<Vec<Suspension>> {
        around(self, "suspensions", self.inner().suspensions(now)).await
    }

    async fn make_due(&self, scope: DueScope, now: Timestamp, dry_run: bool) -> Result<u64> {
        around(self, "make_due", self.inner().make_due(scope, now, dry_run)).await
    }

    async fn put_notes(&self, notes: Vec<Note>, now: Timestamp) -> Result<()> {
        around(self, "put_notes", self.inner().put_notes(notes, now)).await
    }

    async fn swap_note(
        &self,
        note: Note,
        before: Option<Box<[u8]>>,
        now: Timestamp,
    ) -> Result<bool> {
        around(self, "swap_note", self.inner().swap_note(note, before, now)).await
    }

    async fn notes(&self, kind: &str, now: Timestamp) -> Result<Vec<Note>> {
        around(self, "notes", self.inner().notes(kind, now)).await
    }

    async fn note(&self, kind: &str, key: &str, now: Timestamp) -> Result<Option<Note>> {
        around(self, "note", self.inner().note(kind, key, now)).await
    }

    async fn notes_after(
        &self,
        kind: &str,
        after: Option<&str>,
        limit: u32,
        now: Timestamp,
    ) -> Result<Page<Note>> {
        let page = self.inner().notes_after(kind, after, limit, now);
        around(self, "notes_after", page).await
    }

    async fn notes_by_key(
        &self,
        kind: &str,
        keys: Vec<Box<str>>,
        now: Timestamp,
    ) -> Result<Vec<Note>> {
        let notes = self.inner().notes_by_key(kind, keys, now);
        around(self, "notes_by_key", notes).await
    }

    async fn derive(
        &self,
        notes: Vec<Note>,
        news: Vec<Announcement>,
        now: Timestamp,
    ) -> Result<()> {
        around(self, "derive", self.inner().derive(notes, news, now)).await
    }

    async fn job_lease(
        &self,
        job: &str,
        node: JournalId,
        now: Timestamp,
        ttl: Duration,
    ) -> Result<Option<u64>> {
        around(
            self,
            "job_lease",
            self.inner().job_lease(job, node, now, ttl),
        )
        .await
    }

    async fn announce(&self, news: Vec<Announcement>, now: Timestamp) -> Result<()> {
        around(self, "announce", self.inner().announce(news, now)).await
    }

    async fn retire(&self, of: Retire, now: Timestamp) -> Result<Retired> {
        around(self, "retire", self.inner().retire(of, now)).await
    }

    async fn erase(&self, of: Erase, now: Timestamp) -> Result<Erased> {
        around(self, "erase", self.inner().erase(of, now)).await
    }

    async fn export(&self, to: tokio::sync::mpsc::Sender<Piece>, now: Timestamp) -> Result<()> {
        around(self, "export", self.inner().export(to, now)).await
    }

    async fn import(&self, piece: Piece, now: Timestamp) -> Result<()> {
        around(self, "import", self.inner().import(piece, now)).await
    }

    async fn batch(&self, batch: BatchId) -> Result<Option<Batch>> {
        around(self, "batch", self.inner().batch(batch)).await
    }

    async fn batches(&self, query: BatchQuery) -> Result<Page<Batch>> {
        around(self, "batches", self.inner().batches(query)).await
    }

    async fn content(&self, batch: BatchId) -> Result<Option<Arc<[u8]>>> {
        around(self, "content", self.inner().content(batch)).await
    }

    async fn recipients(&self, query: RecipientQuery) -> Result<Page<RecipientRow>> {
        around(self, "recipients", self.inner().recipients(query)).await
    }

    async fn message(&self, message: MessageId) -> Result<Option<MessageStory>> {
        around(self, "message", self.inner().message(message)).await
    }

    async fn messages(&self, messages: Vec<MessageId>) -> Result<Vec<MessageStory>> {
        around(self, "messages", self.inner().messages(messages)).await
    }

    async fn address(&self, account: &str, email: &str) -> Result<AddressStory> {
        around(self, "address", self.inner().address(account, email)).await
    }

    async fn suppressions(&self, query: SuppressionQuery) -> Result<Page<Suppression>> {
        around(self, "suppressions", self.inner().suppressions(query)).await
    }

    async fn events(&self, query: EventQuery) -> Result<EventPage> {
        around(self, "events", self.inner().events(query)).await
    }

    async fn signs(&self, query: EventQuery) -> Result<SignPage> {
        around(self, "signs", self.inner().signs(query)).await
    }

    async fn event_cursor(&self, at: Timestamp) -> Result<String> {
        around(self, "event_cursor", self.inner().event_cursor(at)).await
    }

    async fn work(
        &self,
        scope: WorkScope,
        now: Timestamp,
        limit: u32,
    ) -> Result<Option<Vec<Work>>> {
        around(self, "work", self.inner().work(scope, now, limit)).await
    }

    async fn totals(&self, now: Timestamp) -> Result<Totals> {
        around(self, "totals", self.inner().totals(now)).await
    }

    async fn setting(&self, key: &str, default: &str) -> Result<String> {
        around(self, "setting", self.inner().setting(key, default)).await
    }

    fn is_shared(&self) -> bool {
        self.is_shared_known()
    }

    async fn shares(&self, request: ShareRequest) -> Result<Vec<Share>> {
        around(self, "shares", self.inner().shares(request)).await
    }

    async fn upheavals(&self) -> Result<u64> {
        around(self, "upheavals", self.inner().upheavals()).await
    }

    async fn clock(&self) -> Result<Option<Timestamp>> {
        around(self, "clock", self.inner().clock()).await
    }

    async fn check(&self) -> Result<()> {
        around(self, "check", self.inner().check()).await
    }

    fn caveat(&self) -> Option<String> {
        self.caveat_known()
    }
}
