//! All shared state behind one trait: batches, lots and leases, statuses, counters, suppressions,
//! events, the control feed.
//!
//! Owns what is stored and the rules by which it changes. Must not contain policy: when to retry,
//! whom to suppress, what is a machine come in with the facts.
//!
//! The rules, each with a test in the conformance suite:
//! - What belongs to one recipient lives in one [`Partition`](model::Partition) and changes in one step.
//! - A node leases a *range* of a lot (or of a retry lot). Its *window* bounds what it may have
//!   started; a successor treats the window's unreported recipients as maybe started, everything
//!   beyond as untouched.
//! - Fencing refuses reservations and schedule changes of a lost lease, never outcomes.
//! - A fact is (journal, sequence). One high-water mark per journal and partition, moved in the
//!   same step as the facts: a journal can be shipped anywhere, any number of times.
//! - A status moves only forward; a late *delivered* is always taken.
//! - `accepted` is the sum of the status counters at every read.
#![forbid(unsafe_code)]

pub mod backup;
mod clock;
mod columns;
#[cfg(feature = "conformance")]
pub mod conformance;
mod describe;
mod erased;
mod form;
mod hours;
pub mod late;
mod layer;
mod line;
mod recent;
pub mod redis;
mod signing;
mod signs;
pub mod sqlite;
mod tell;
pub mod transition;
mod types;

pub use backup::Piece;
pub use clock::clock_offset;
pub use layer::Layer;
pub use signing::{SIGNING_KEY_TOLD, signing_keys, tell_signing_key};
pub use signs::{Happened, HitSign, MailSign, Sign, SignPage};
pub use types::*;

use async_trait::async_trait;
use model::{BatchId, Event, JournalId, Seq, Timestamp, TrackingMode};

/// Why the store did not do what was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// It cannot be reached, or its disk is full: try again, nothing was changed.
    #[error("the store is not available: {0}")]
    Unavailable(String),
    /// What it holds cannot be read, or was written by a newer version: a person must look.
    #[error("the store is damaged or of another version: {0}")]
    Damaged(String),
    /// The configuration asks for what this engine cannot be.
    #[error("the store cannot be opened: {0}")]
    Refused(String),
}

/// The result of asking the store.
pub type Result<T> = std::result::Result<T, StoreError>;

/// All shared state. Every call is coarse: a batch of rows, of facts, of ranges.
///
/// `now` is the caller's wall clock in milliseconds; an engine with a clock of its own (Redis
/// `TIME`) uses that for leases. Calls are not cancel-safe unless they say so: a dropped future
/// may still take effect.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// In how many partitions recipients live (1 to 256); fixed when the store was made.
    fn partitions(&self) -> u16;

    /// Whether it has been reached since the process started. Only one that stands for a store
    /// which has not come yet says no ([`late`]): then [`Store::partitions`] is a guess by which
    /// nothing may be made. What is open stays so.
    fn is_open(&self) -> bool {
        true
    }

    // ---- intake -------------------------------------------------------------------------

    /// Writes lots of a batch that is not committed yet. Nothing of it is visible or durable. The
    /// same lot again changes nothing; another one under its number is refused.
    async fn stage_lots(&self, batch: BatchId, lots: Vec<NewLot>) -> Result<()>;

    /// Begins or renews a call that must take effect once; it counts as running for `ttl`. A try
    /// that ended in nothing, or whose time is over, makes room for the next.
    async fn begin_call(
        &self,
        call: NewCall,
        now: Timestamp,
        ttl: std::time::Duration,
    ) -> Result<Begun>;

    /// Ends a try that took no effect; without one nothing happens.
    async fn drop_call(&self, key: CallKey, attempt: BatchId) -> Result<()>;

    /// Makes the staged lots and the batch visible at once, with its counters, index map and
    /// `batch.accepted` (and, when started, `batch.started`) events, and ends its call. Durable
    /// when it returns. Unavailable, and nothing is done, when another try of the call took over.
    async fn commit_batch(&self, batch: NewBatch, now: Timestamp) -> Result<()>;

    /// Throws away what was staged; also done for leftovers when the engine is opened by an MTA.
    async fn abandon_batch(&self, batch: BatchId) -> Result<()>;

    // ---- parts of an open batch ---------------------------------------------------------

    /// Takes the turn of adding a part to an open batch, until nothing is staged for `ttl`: one at
    /// a time, so that indices have no holes and duplicates are found. What a part before it left
    /// is thrown away.
    async fn begin_part(
        &self,
        part: NewPart,
        now: Timestamp,
        ttl: std::time::Duration,
    ) -> Result<PartTurn>;

    /// Writes lots of the part whose turn it is, numbered from [`PartTurn::Begun`]'s `first_lot`;
    /// nothing of it is visible. False: it is not its turn any more, and nothing was written.
    async fn stage_part(
        &self,
        part: NewPart,
        lots: Vec<NewLot>,
        now: Timestamp,
        ttl: std::time::Duration,
    ) -> Result<bool>;

    /// Makes the recipients of a part belong to the batch, as `scheduled`, with an event
    /// `batch.accepted`, and ends its turn and its call. Durable when it returns.
    async fn commit_part(&self, part: EndedPart, now: Timestamp) -> Result<PartEnd>;

    /// Ends the turn of a part that comes to nothing, and throws away what it staged.
    async fn drop_part(&self, part: NewPart, now: Timestamp) -> Result<()>;

    /// The addresses of an open batch: of its lots with a running number from `from` on, those of
    /// committed parts alone.
    async fn part_hashes(&self, batch: BatchId, from: u32) -> Result<Vec<LotHashes>>;

    /// The rows of a lot of an open batch; none when there is no such lot.
    async fn lot_rows(&self, batch: BatchId, lot: model::LotNumber) -> Result<Vec<model::Row>>;

    // ---- leases -------------------------------------------------------------------------

    /// Due, unleased work by queue, after the queue `after` in order of name, at most `limit`
    /// queues. Expired leases count as unleased. Paused and unreleased batches do not count.
    async fn backlog(
        &self,
        now: Timestamp,
        after: Option<&str>,
        limit: u32,
    ) -> Result<Vec<Backlog>>;

    /// Leases ranges for the queues that `request` wants, transactional first, then the batches in
    /// turn. Recipients that must not be written to are ended `suppressed` in the same step and
    /// not handed out; ranges with nothing left are removed. Those to whom the batch's window is shut
    /// wait until it opens, or their batch expires. Splits ranges as wanted. What cannot
    /// be read is left where it is, for later, told in the log and by [`Store::totals`]: it keeps
    /// nobody else waiting.
    async fn lease(&self, request: LeaseRequest) -> Result<Vec<LeasedRange>>;

    /// Gives a restarted node its own leases back at once, as [`Store::lease`] would have, and those
    /// of paused batches, too: they are the node's to hand back. Of a cancelled batch it gets what
    /// is in its windows: it alone knows what of that was begun.
    async fn reclaim(
        &self,
        node: JournalId,
        now: Timestamp,
        ttl: std::time::Duration,
    ) -> Result<Vec<LeasedRange>>;

    /// Extends every lease of `node` that has not expired to `now + ttl`; tells which ranges it
    /// still holds.
    async fn renew(
        &self,
        node: JournalId,
        now: Timestamp,
        ttl: std::time::Duration,
    ) -> Result<Vec<RangeRef>>;

    /// Hands ranges back: what is unreported in them is untouched and free at once (or at
    /// `due_at`). All facts about them must have been shipped. A lost range is ignored.
    async fn release(&self, ranges: Vec<Release>, now: Timestamp) -> Result<()>;

    // ---- facts --------------------------------------------------------------------------

    /// Applies facts in order, at most once each: statuses, counters, events, retry lots,
    /// suppressions and the high-water mark in one step per partition; many hits in several, one
    /// after the other, each with its mark. Moves windows and removes finished ranges for leases
    /// still held. Durable as the engine gives it.
    async fn ship(&self, shipment: Shipment) -> Result<Shipped>;

    /// How many hits a shipment should have at most.
    fn shipment_size(&self) -> usize {
        SHIPMENT
    }

    /// Through which sequence every partition has this journal.
    async fn high_water(&self, journal: JournalId) -> Result<Seq>;

    // ---- control ------------------------------------------------------------------------

    /// Pauses, resumes, starts, cancels, archives or unarchives a batch, with its event.
    async fn change_batch(
        &self,
        batch: BatchId,
        change: BatchChange,
        now: Timestamp,
    ) -> Result<ChangeOutcome>;

    /// Lets the mail of a wave leave, of a batch of which the mail may leave: what is `scheduled` in
    /// it is `queued`, and has its variant for good. The first caller says how; who repeats it, after
    /// any crash, only ends what was begun. Goes in short steps, each of which moves some recipients
    /// whole. How many were moved now.
    async fn release_wave(
        &self,
        batch: BatchId,
        wave: u32,
        how: Wave,
        now: Timestamp,
    ) -> Result<u64>;

    /// What was changed by anyone after `after`, at most 1,000; what is about the same recipient,
    /// or about any batch or destination, in the order of the changes. `None`: nothing, only
    /// the cursor of this moment. One round trip; a node asks at least every 250 ms. The feed is
    /// kept for a day: where it no longer reaches back to `after`, the page says
    /// [`reset`](ControlPage::reset).
    async fn control(&self, after: Option<ControlCursor>) -> Result<ControlPage>;

    /// Returns when a feed has something after the place `after`, or when `at_most` has passed.
    /// What came between the reading that gave the place and this call ends it at once, so
    /// nothing is missed. A place that is none of this store's ends it too: reading there says
    /// so. Cancel-safe. May return early.
    async fn changed(&self, after: FeedPlace<'_>, at_most: std::time::Duration);

    /// Adds suppressions (replacing those of the same account, address and list), with events.
    async fn suppress(&self, entries: Vec<Suppression>, now: Timestamp) -> Result<()>;

    /// Removes those of an address: of one list, or all. Tells how many there were.
    async fn unsuppress(
        &self,
        account: &str,
        email: &str,
        list: Option<&str>,
        now: Timestamp,
    ) -> Result<u32>;

    /// Notes the most that a person lets be kept, of mail that was already sent too: it binds whatever
    /// is shipped or leased from now on. `None`: what was noted no longer holds. Whether something was
    /// noted before. Kept under a keyed hash of the address (normalised): it names nobody, and an
    /// erasure leaves it.
    async fn set_consent(
        &self,
        account: &str,
        email: &str,
        mode: Option<TrackingMode>,
        now: Timestamp,
    ) -> Result<bool>;

    /// The most that each of these people lets be kept, where that was noted, in their order.
    async fn consents(&self, account: &str, emails: Vec<String>) -> Result<Vec<Option<Consent>>>;

    /// The same of one person.
    async fn consent(&self, account: &str, email: &str) -> Result<Option<Consent>> {
        let found = self.consents(account, vec![email.to_owned()]).await?;
        Ok(found.into_iter().flatten().next())
    }

    /// Keeps mail from a destination, in place of a suspension that was there; every node hears of
    /// it in the control feed.
    async fn suspend(&self, suspension: Suspension, now: Timestamp) -> Result<()>;

    /// Lifts the suspension of a destination; every node hears of it. Whether there was one.
    async fn resume(&self, destination: &str, now: Timestamp) -> Result<bool>;

    /// The suspensions that hold at `now`, in order of destination.
    async fn suspensions(&self, now: Timestamp) -> Result<Vec<Suspension>>;

    /// Makes deferred recipients due now: those waiting for a time after `now` that nobody holds.
    /// How many there are; a `dry_run` counts only. Not one step: what another node leases
    /// meanwhile is left to it.
    async fn make_due(&self, scope: DueScope, now: Timestamp, dry_run: bool) -> Result<u64>;

    // ---- what nodes share ---------------------------------------------------------------

    /// Writes notes, each in place of the one of its kind and key: the last writer wins. An empty
    /// value removes the note. Refused: a value of more than [`NOTE_BYTES`], and a note of people
    /// ([`PEOPLE`]) that expires. Not one step where there are some of people.
    async fn put_notes(&self, notes: Vec<Note>, now: Timestamp) -> Result<()>;

    /// Writes a note if the one of its kind and key still has the value `before` (`None`: there is
    /// none, or it has expired). Whether it did.
    async fn swap_note(
        &self,
        note: Note,
        before: Option<Box<[u8]>>,
        now: Timestamp,
    ) -> Result<bool>;

    /// The notes of a kind that have not expired, in order of key.
    async fn notes(&self, kind: &str, now: Timestamp) -> Result<Vec<Note>>;

    /// One note, unless it has expired.
    async fn note(&self, kind: &str, key: &str, now: Timestamp) -> Result<Option<Note>>;

    /// The notes of a kind that have not expired, in order of key: those after `after`, at most
    /// `limit`. The cursor is the last key; a page that has one may be shorter.
    async fn notes_after(
        &self,
        kind: &str,
        after: Option<&str>,
        limit: u32,
        now: Timestamp,
    ) -> Result<Page<Note>>;

    /// Those of these notes that are there and have not expired, in no order.
    async fn notes_by_key(
        &self,
        kind: &str,
        keys: Vec<Box<str>>,
        now: Timestamp,
    ) -> Result<Vec<Note>>;

    /// Writes notes and puts events into the event stream, as one step: what is made of events
    /// changes together with what it tells. At most some thousand at a time. Notes of people
    /// ([`PEOPLE`]) are written before it, each by itself.
    async fn derive(&self, notes: Vec<Note>, news: Vec<Announcement>, now: Timestamp)
    -> Result<()>;

    /// Takes or renews the lease on a job that one node at a time is to run. The answer is a
    /// fencing token: the same while the holder renews in time, higher for every later lease;
    /// `None`: another node holds it. A `ttl` of zero gives it up.
    async fn job_lease(
        &self,
        job: &str,
        node: JournalId,
        now: Timestamp,
        ttl: std::time::Duration,
    ) -> Result<Option<u64>>;

    /// Puts events that belong to no recipient into the event stream, as one step.
    async fn announce(&self, news: Vec<Announcement>, now: Timestamp) -> Result<()>;

    /// Whether several nodes may send out of this store, so that they have to share limits.
    fn is_shared(&self) -> bool {
        false
    }

    /// Takes, renews or gives up shares of limits, in the order of the claims. The shares of all
    /// nodes are never more than the whole: whoever comes has nothing until the others, at their
    /// next claim, are content with less. One round trip.
    async fn shares(&self, request: ShareRequest) -> Result<Vec<Share>> {
        let whole = |claim: &ShareClaim| Share {
            rate: f64::from(u8::from(claim.wanted)),
            connections: if claim.wanted { claim.connections } else { 0 },
            nodes: 1,
        };
        Ok(request.claims.iter().map(whole).collect())
    }

    // ---- keeping ------------------------------------------------------------------------

    /// Takes one bounded step of retention: removes old events, then rows, statuses and contents of
    /// batches that ended long ago; what a batch was and its counters stay. Never an event that a
    /// consumer group (Redis) or a note of the kind [`EVENT_CURSORS`] says was not read yet.
    async fn retire(&self, of: Retire, now: Timestamp) -> Result<Retired>;

    /// Takes one bounded step of erasing a person: rows, variables, facts and events that name them
    /// go; statuses and counters keep their place. What is not sent yet ends `suppressed`. One
    /// suppression stays, as a keyed hash. Every step may be taken again, and so may the whole: what
    /// was written about the person meanwhile goes with it. Facts that come later are counted and
    /// leave no trace.
    async fn erase(&self, of: Erase, now: Timestamp) -> Result<Erased>;

    /// Gives away everything that the store holds, to be taken in by [`Store::import`] elsewhere,
    /// while others go on. Every recipient is given as it was at one moment; whom a node held and may
    /// have started says so. As slow as `to` is.
    async fn export(&self, to: tokio::sync::mpsc::Sender<Piece>, now: Timestamp) -> Result<()>;

    /// Takes in a piece of another store. The first is refused unless this one is empty and of as many
    /// partitions; until the last has come nobody else opens it. What was not ended is paused.
    async fn import(&self, piece: Piece, now: Timestamp) -> Result<()>;

    // ---- reading ------------------------------------------------------------------------

    /// One batch with its counters.
    async fn batch(&self, batch: BatchId) -> Result<Option<Batch>>;

    /// Batches, newest first.
    async fn batches(&self, query: BatchQuery) -> Result<Page<Batch>>;

    /// The content as it was submitted, which the store does not read.
    async fn content(&self, batch: BatchId) -> Result<Option<std::sync::Arc<[u8]>>>;

    /// Recipients of a batch in order of index.
    async fn recipients(&self, query: RecipientQuery) -> Result<Page<RecipientRow>>;

    /// One message with all its facts, oldest first.
    async fn message(&self, message: model::MessageId) -> Result<Option<MessageStory>>;

    /// The stories of those of these messages that are there, in no order: each lot's facts are read
    /// once for all of its messages. At most some thousand at a time.
    async fn messages(&self, messages: Vec<model::MessageId>) -> Result<Vec<MessageStory>>;

    /// What is known of an address in an account: its newest messages (at most 100).
    async fn address(&self, account: &str, email: &str) -> Result<AddressStory>;

    /// Suppressions of an account in order of address: of one address, or a page of all. A cursor
    /// that is none is refused.
    async fn suppressions(&self, query: SuppressionQuery) -> Result<Page<Suppression>>;

    /// Events after a cursor, oldest first. A cursor that is none of this store's is refused.
    async fn events(&self, query: EventQuery) -> Result<EventPage>;

    /// The same as signs: what is read of events by whoever follows people. A page may be of up to
    /// [`SIGNS`] of them.
    async fn signs(&self, query: EventQuery) -> Result<SignPage>;

    /// The cursor after which the first event is the oldest kept that was recorded at or after `at`;
    /// the end of the stream when there is none. By the clock that the store records by: where that
    /// was set back, some events of before may come too.
    async fn event_cursor(&self, at: Timestamp) -> Result<String>;

    /// Unfinished recipients of a batch by queue, or of a queue by batch, with who holds them; the
    /// most first, at most `limit`. For people, not for the way of a message: an engine that
    /// cannot tell says `None`.
    async fn work(
        &self,
        scope: WorkScope,
        now: Timestamp,
        limit: u32,
    ) -> Result<Option<Vec<Work>>> {
        let (_, _, _) = (scope, now, limit);
        Ok(None)
    }

    /// Recipients by state over all batches, and the oldest due time among the unfinished.
    async fn totals(&self, now: Timestamp) -> Result<Totals>;

    /// Adds facts that are not tied to a journal's queue, such as key ids in use; a small
    /// key-value table for settings that every node must agree on. First writer wins.
    async fn setting(&self, key: &str, default: &str) -> Result<String>;

    /// Proves that a durable write is possible now (health).
    async fn check(&self) -> Result<()>;

    /// What the store's own clock says. `None`: it has none but this machine's.
    async fn clock(&self) -> Result<Option<Timestamp>> {
        Ok(None)
    }

    /// How often the store was seen to change hands, or to come back without what it had, since it
    /// was opened. After each rise what was acknowledged may be missing: whoever ships asks
    /// [`Store::high_water`] again. To be asked every few seconds.
    async fn upheavals(&self) -> Result<u64> {
        Ok(0)
    }

    /// What an answered write may be lost by, where that is more than a disk that lies: in an
    /// operator's words, as it was at the last [`Store::check`]. `None`: it is synced.
    fn caveat(&self) -> Option<String> {
        None
    }
}

/// A page of events and the cursor after it.
#[derive(Debug, Clone, PartialEq)]
pub struct EventPage {
    /// Oldest first.
    pub events: Vec<Event>,
    /// Where to go on; opaque, also when no event came.
    pub next: String,
}
