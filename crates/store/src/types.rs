//! What goes into and comes out of the store.

use crate::{Result, StoreError};
use model::units::Rate;
use model::{
    About, Attempt, BatchId, BatchState, Blame, Class, Counters, EnhancedCode, EventKind, Fact,
    FactId, Hit, JournalId, LotNumber, MessageId, Place, Priority, Row, Seq, Status,
    SuppressionReason, Timestamp, TrackingMode,
};
use std::sync::Arc;
use std::time::Duration;

/// The most recipients in one lot.
pub const LOT_ROWS: usize = 500;

/// The most hits in a shipment, if the store says nothing else. Large, since what a lot costs the
/// store does not grow with the hits on it; bounded, since others wait for the store's writer meanwhile.
pub const SHIPMENT: usize = 4_000;

/// The most recipients that a holder may have started beyond what it has reported, per range.
pub const WINDOW: u32 = 64;

/// The queue of a lot whose recipients have several domains.
pub const MIXED: &str = "*";

/// A lot as intake hands it in: up to [`LOT_ROWS`] recipients of one partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewLot {
    /// Its number in the batch; the partition is part of it.
    pub number: LotNumber,
    /// The recipients' domain (lower case ASCII), or [`MIXED`].
    pub queue: Box<str>,
    /// The recipients in the order in which they are to be sent.
    pub rows: Vec<Row>,
    /// In a batch with variants: the number of each recipient's variant, from 1, or 0 where that is
    /// decided later. They wait until their wave is released. Empty in every other batch.
    pub variants: Vec<u8>,
}

/// A batch at its commit.
#[derive(Debug, Clone, PartialEq)]
pub struct NewBatch {
    /// What does not change.
    pub head: BatchHead,
    /// The content as submitted.
    pub content: Arc<[u8]>,
    /// Recipients accepted, which is the sum of the rows staged.
    pub accepted: u64,
    /// Recipients rejected; they have indices too.
    pub rejected: u64,
    /// The call that submits it, when that must take effect once: ended in the same step.
    pub call: Option<EndedCall>,
}

/// How long the answer to a call is kept at least; and no less than until its batch has ended.
pub const CALL_KEPT: Duration = Duration::from_secs(24 * 3_600);

/// A call that must take effect once, however often it is made: an idempotency key in its account.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct CallKey {
    /// Whose.
    pub account: String,
    /// The caller's name for the call.
    pub key: String,
}

/// A call that begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewCall {
    /// Its name.
    pub key: CallKey,
    /// A digest of what is asked for: the same call has the same.
    pub fingerprint: [u8; 32],
    /// Tells one try from another; beginning again with the same renews it.
    pub attempt: BatchId,
}

/// Whether a call may go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Begun {
    /// It is the first, or the one before it ended without an answer.
    Fresh,
    /// Another is on its way.
    Running,
    /// It took effect before, with this answer.
    Done(Arc<[u8]>),
    /// Its name was given to a call that asked for something else.
    Conflict,
}

/// A call that takes effect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndedCall {
    /// Its name.
    pub key: CallKey,
    /// Which try.
    pub attempt: BatchId,
    /// What was answered.
    pub answer: Arc<[u8]>,
}

/// What is fixed when a batch is accepted.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct BatchHead {
    /// The batch.
    pub id: BatchId,
    /// Whose.
    pub account: String,
    /// The caller's name for it.
    pub campaign: Option<String>,
    /// The list that an unsubscribe leaves.
    pub list: String,
    /// Which goes first.
    pub priority: Priority,
    /// The pool of egress sources, by name; none: the service's default.
    #[serde(default)]
    pub pool: Option<String>,
    /// How often a message of it may start on one node, over all destinations.
    #[serde(default)]
    pub rate: Rate,
    /// When it was accepted.
    pub created_at: Timestamp,
    /// When its mail may leave: `Date` and DKIM `t=` of every message.
    pub release_at: Timestamp,
    /// When attempts end; none: by the destination's `expire` after release.
    pub expires_at: Option<Timestamp>,
    /// How much is recorded.
    pub tracking: TrackingMode,
    /// Echoed in events: a JSON object.
    pub metadata: serde_json::Value,
    /// Open: parts may still come, and `release_at` is not decided before its start.
    #[serde(default)]
    pub held: bool,
    /// The hours of the recipient's day in which its mail may leave.
    #[serde(default)]
    pub window: Option<model::SendWindow>,
    /// What pauses it.
    #[serde(default)]
    pub guardrails: Option<model::Guardrails>,
    /// Its recipients get different contents.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variants: Option<Box<Variants>>,
}

/// The most waves of a batch.
pub const WAVES: u32 = 16;

/// The variants of a batch, and when the waves of its recipients leave.
///
/// Every lot belongs to one wave, said by the last digit of its number in base [`WAVES`]. What is in
/// a wave is `scheduled` until [`Store::release_wave`](crate::Store::release_wave).
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Variants {
    /// Their names, in order; 2 to 8.
    pub names: Vec<String>,
    /// How each wave was released; none: it was not yet.
    pub waves: Vec<Option<Wave>>,
}

/// How a wave was released. Never changed.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Wave {
    /// When: `Date` and DKIM `t=` of its messages.
    pub at: Timestamp,
    /// How those whose variant was not decided before are shared out among the variants, in any
    /// proportion.
    pub shares: Vec<f64>,
}

/// 2⁶⁴ divided by the golden ratio: steps of this size spread over the circle as evenly as can be.
const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

impl Wave {
    /// Tells the number, from 1, of the variant of whoever stands at a place of this lot: the
    /// shares are spread evenly over the lot. 0 when nothing has a share.
    pub(crate) fn in_lot(&self, batch: BatchId, lot: LotNumber) -> impl Fn(u16) -> u8 {
        let start = model::partition_hash("wave", &format!("{batch} {}", lot.0));
        let total: f64 = self.shares.iter().sum();
        move |position| {
            let point = start.wrapping_add(u64::from(position).wrapping_mul(GOLDEN));
            // 53 bits are what a share can tell apart.
            let point = (point >> 11) as f64 / (1_u64 << 53) as f64;
            let (mut sum, mut last) = (0.0, 0);
            for (number, share) in (1_u8..).zip(&self.shares) {
                if *share > 0.0 {
                    sum += share / total;
                    last = number;
                    if point < sum {
                        break;
                    }
                }
            }
            last
        }
    }
}

/// The wave of a lot, in a batch that has waves.
pub fn wave_of(lot: LotNumber) -> usize {
    usize::try_from(lot.0 % WAVES).unwrap_or(0)
}

impl BatchHead {
    /// When the mail of a lot may leave, as far as that is known.
    pub fn release_of(&self, lot: LotNumber) -> Timestamp {
        let wave = self
            .variants
            .as_ref()
            .and_then(|of| of.waves.get(wave_of(lot)));
        wave.and_then(Option::as_ref)
            .map_or(self.release_at, |wave| wave.at)
    }

    /// Whether its recipients leave in waves, each when that is released.
    pub(crate) fn is_in_waves(&self) -> bool {
        self.variants.is_some()
    }

    /// Whether it may still change: parts may come, or a wave is still to be released.
    pub(crate) fn may_change(&self) -> bool {
        let waits = |of: &Variants| of.waves.iter().any(Option::is_none);
        self.held || self.variants.as_deref().is_some_and(waits)
    }

    /// The name of a variant by its number, from 1.
    pub(crate) fn variant_name(&self, number: u8) -> Option<&str> {
        let place = usize::from(number).checked_sub(1)?;
        self.variants.as_ref()?.names.get(place).map(String::as_str)
    }
}

/// The due time of what waits for its wave: never.
pub(crate) const HELD_BACK: i64 = 1 << 52;

/// A part of an open batch that asks for its turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NewPart {
    /// Of this batch.
    pub batch: BatchId,
    /// Tells one try from another.
    pub part: BatchId,
    /// How many lots it may need: so many numbers are set aside.
    pub lots: u32,
}

/// Whether a part may be added now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PartTurn {
    /// It is its turn, until it ends or does nothing for as long as was asked.
    Begun {
        /// The index of its first recipient.
        first_index: u32,
        /// The running number of its first lot, the same in every partition.
        first_lot: u32,
    },
    /// Another part is being added.
    Busy,
    /// The batch takes no parts (any more).
    Impossible(BatchState),
    /// No such batch.
    Unknown,
}

/// A part that takes effect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndedPart {
    /// Of this batch.
    pub batch: BatchId,
    /// Which try.
    pub part: BatchId,
    /// Recipients accepted: the sum of the rows staged.
    pub accepted: u64,
    /// Recipients rejected; they have indices too.
    pub rejected: u64,
    /// The call that adds it, when that must take effect once: ended in the same step.
    pub call: Option<EndedCall>,
}

/// What the end of a part came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PartEnd {
    /// Its recipients belong to the batch.
    Done,
    /// It was not its turn any more: nothing was done.
    Lost,
    /// The batch was started or ended meanwhile: nothing was done.
    Impossible(BatchState),
}

/// The addresses of a lot: four bytes of hash for each, and the rows to be sure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LotHashes {
    /// Which lot.
    pub lot: LotNumber,
    /// [`address_hash`] of each recipient, in order.
    pub hashes: Vec<u32>,
}

/// Four bytes that find an address among those of a batch; the address is to be compared, too.
pub fn address_hash(normalised: &str) -> u32 {
    let [a, b, c, d, ..] = model::partition_hash("", normalised).to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

/// A batch as it is read.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    /// What does not change.
    pub head: BatchHead,
    /// Its state.
    pub state: BatchState,
    /// Tracking is switched off, for mail already sent too.
    pub archived: bool,
    /// When its mail began to leave.
    pub started_at: Option<Timestamp>,
    /// When the last recipient got a final status.
    pub completed_at: Option<Timestamp>,
    /// Since when it is paused, if its mail had begun to leave.
    pub paused_at: Option<Timestamp>,
    /// How long it was paused in all before that, since its mail began to leave.
    pub paused_for: Duration,
    /// `accepted` is the sum of the eight status counters.
    pub counters: Counters,
}

/// Due work of one queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backlog {
    /// A domain, or [`MIXED`].
    pub queue: Box<str>,
    /// Recipients in due, unleased ranges: none only when there are none. Not exact: of a batch
    /// no more are counted than a node may want at a time.
    pub due: u64,
    /// The earliest time at which more comes due.
    pub next_due: Option<Timestamp>,
    /// Whether some of it is transactional.
    pub transactional: bool,
    /// Batches with due bulk work, in no order; when there are [`BACKLOG_BATCHES`], there may be
    /// more.
    pub batches: Vec<BatchId>,
}

/// The most batches that a [`Backlog`] names.
pub const BACKLOG_BATCHES: usize = 32;

/// What a node wants to lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseRequest {
    /// Who.
    pub node: JournalId,
    /// The node's wall clock before it asks: the lease is counted from here.
    pub now: Timestamp,
    /// For how long.
    pub ttl: Duration,
    /// From which queues, how many recipients each. A range is never larger than what is left of
    /// its lot, and the last one may be cut.
    pub wants: Vec<Want>,
}

/// A wish for work of one queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Want {
    /// A domain, or [`MIXED`].
    pub queue: Box<str>,
    /// At most this many recipients, over all batches.
    pub rows: u32,
    /// At most this many in one range.
    pub largest: u32,
    /// At most this many of a batch that `of` does not name.
    pub per_batch: u32,
    /// At most this many of these batches.
    pub of: Vec<(BatchId, u32)>,
    /// Only what is transactional.
    pub urgent_only: bool,
}

impl Want {
    /// A wish for `rows` recipients of `queue`, whosever they are.
    pub fn of(queue: &str, rows: u32) -> Self {
        Self {
            queue: queue.into(),
            rows,
            largest: u32::MAX,
            per_batch: u32::MAX,
            of: Vec::new(),
            urgent_only: false,
        }
    }
}

/// Names a range and the lease on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RangeRef {
    /// The range; within a partition of the store.
    pub id: u64,
    /// The partition it lives in.
    pub partition: model::Partition,
    /// The fencing token: another lease of the same range has a higher one.
    pub token: u64,
}

/// A range that a node holds.
#[derive(Debug, Clone, PartialEq)]
pub struct LeasedRange {
    /// The range and the lease.
    pub range: RangeRef,
    /// The batch, shared by the ranges of one call.
    pub batch: Arc<BatchHead>,
    /// The queue it stood in.
    pub queue: Box<str>,
    /// The recipients to send to, in order: the item at `n` has the offset `n`.
    pub items: Vec<LeasedRecipient>,
    /// How many of the items, from the first, the holder may start before it moves the window.
    pub window: u32,
    /// Until when, by the clock in the request.
    pub expires_at: Timestamp,
}

/// A recipient in a leased range.
#[derive(Debug, Clone, PartialEq)]
pub struct LeasedRecipient {
    /// Where it stands.
    pub place: Place,
    /// Its offset in the range, which is its place among the items: windows count these.
    pub offset: u32,
    /// The recipient.
    pub row: Row,
    /// Attempts made so far; the next is this plus one.
    pub attempts: u8,
    /// A former holder may have started it and never reported: it may be delivered already.
    pub maybe_started: bool,
    /// An earlier attempt was already ambiguous.
    pub ambiguous_before: bool,
    /// The number of its variant, from 1; 0: its batch has none.
    pub variant: u8,
}

/// A range handed back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Release {
    /// The range and the lease.
    pub range: RangeRef,
    /// Not before this time; none: at once.
    pub due_at: Option<Timestamp>,
    /// The recipients, by place, to move to queues of their own (out of a mixed lot), with the
    /// queue of each; the rest of the range stays where it was.
    pub requeue: Vec<(Place, Box<str>)>,
}

/// Facts on their way into the store.
#[derive(Debug, Clone, PartialEq)]
pub struct Shipment {
    /// Whose facts.
    pub journal: JournalId,
    /// In order of sequence.
    pub facts: Vec<(Seq, Fact)>,
    /// Everything of the journal through here is in `facts` or was shipped before (or shed).
    pub through: Seq,
    /// Windows to move: the holder may now start items with an offset below `window`.
    pub windows: Vec<(RangeRef, u32)>,
    /// Ranges in which the holder believes every recipient reported; what is not stays leased.
    pub finished: Vec<RangeRef>,
    /// The caller's wall clock, `recorded_at` of the events.
    pub now: Timestamp,
}

/// What a shipment came to.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Shipped {
    /// Messages that were delivered a second time: the fact came after another *delivered*.
    pub duplicates: Vec<MessageId>,
    /// Facts about messages that the store does not know (erased, retired); dropped.
    pub unknown: u64,
    /// Facts at or below the high-water mark; skipped.
    pub repeated: u64,
    /// Leases in `windows` or `finished` that are no longer held.
    pub lost: Vec<RangeRef>,
    /// Batches completed by it.
    pub completed: Vec<BatchId>,
    /// The store has forgotten what it had acknowledged of this journal after this sequence: the
    /// journal is to be shipped again from there. What had to do with it was not done.
    pub behind: Option<Seq>,
}

/// What a node asks of limits that all nodes keep together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShareRequest {
    /// Who asks.
    pub node: JournalId,
    /// By the clock of the node.
    pub now: Timestamp,
    /// For how long it has what it gets; it asks again long before.
    pub ttl: Duration,
    /// Of which limits.
    pub claims: Vec<ShareClaim>,
}

/// A wish for a share of a limit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShareClaim {
    /// Which limit.
    pub key: Box<str>,
    /// How many connections it allows, over all nodes.
    pub connections: u32,
    /// How many permits its rate has, where a share of it is to be a whole number of them; 0: any.
    pub permits: u32,
    /// False: the node gives up what it has.
    pub wanted: bool,
}

/// What a node has of a limit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Share {
    /// Of the rate, from 0 to 1, in millionths, rounded down.
    pub rate: f64,
    /// How many of the connections.
    pub connections: u32,
    /// How many nodes want some of it.
    pub nodes: u32,
}

/// A change of a batch by its owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BatchChange {
    /// No new attempt starts.
    Pause,
    /// The same, by a guardrail: the event says which.
    PauseFor(PauseReason),
    /// Goes on.
    Resume,
    /// Takes no more parts; its mail may leave.
    Start,
    /// Ends what was not started.
    Cancel,
    /// Switches tracking off.
    Archive,
    /// Switches it on again.
    Unarchive,
}

/// Why a batch paused itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PauseReason {
    /// Too many bounced.
    BounceRate,
    /// Too many complained.
    ComplaintRate,
}

impl PauseReason {
    /// As events say it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::BounceRate => "bounce_rate",
            Self::ComplaintRate => "complaint_rate",
        }
    }
}

/// What a change came to.
#[derive(Debug, Clone, PartialEq)]
pub enum ChangeOutcome {
    /// Done, or it was so already: the batch after it, and for a cancel how many it ended now and
    /// how many of its recipients a node holds in a window.
    Done {
        /// After the change.
        batch: Box<Batch>,
        /// Ended by this cancel.
        cancelled: u64,
        /// May have been started.
        in_flight: u64,
    },
    /// Not possible in its state.
    Impossible(BatchState),
    /// No such batch.
    Unknown,
}

/// A place in the control feed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControlCursor(pub Vec<u64>);

/// A place in a feed that is waited at ([`Store::changed`](crate::Store::changed)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FeedPlace<'a> {
    /// In the control feed.
    Control(&'a ControlCursor),
    /// Among the events: the `next` of a page, whatever it was asked for.
    Events(&'a str),
}

/// A page of the control feed.
#[derive(Debug, Clone, PartialEq)]
pub struct ControlPage {
    /// What came after the cursor is no longer known in full, or the cursor is of another store:
    /// whoever follows must not believe what it leased or learned before it asked. `items` is
    /// empty and `next` is of this moment.
    pub reset: bool,
    /// In order.
    pub items: Vec<Control>,
    /// Where to go on.
    pub next: ControlCursor,
}

/// What every node must know within 250 ms.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Control {
    /// There is new work.
    Work,
    /// No new attempt of this batch.
    Paused(BatchId),
    /// It goes on.
    Resumed(BatchId),
    /// What was not started is cancelled.
    Cancelled(BatchId),
    /// Tracking is off.
    Archived(BatchId),
    /// Tracking is on again.
    Unarchived(BatchId),
    /// No further mail to this address.
    Suppressed(Suppression),
    /// Mail again.
    Unsuppressed {
        /// Whose.
        account: String,
        /// Normalised.
        email: String,
        /// Of one list, or all.
        list: Option<String>,
    },
    /// An operator keeps mail from a destination.
    DestinationSuspended(Suspension),
    /// The destination gets mail again.
    DestinationResumed(Box<str>),
}

impl Control {
    /// Whether it names an address of an account.
    pub(crate) fn is_about(&self, of: &str, person: &str) -> bool {
        match self {
            Self::Suppressed(entry) => entry.account == of && entry.email == person,
            Self::Unsuppressed { account, email, .. } => account == of && email == person,
            Self::Work
            | Self::Paused(_)
            | Self::Resumed(_)
            | Self::Cancelled(_)
            | Self::Archived(_)
            | Self::Unarchived(_)
            | Self::DestinationSuspended(_)
            | Self::DestinationResumed(_) => false,
        }
    }
}

/// The largest [`Note::value`].
pub const NOTE_BYTES: usize = 64 << 10;

/// A small record that all nodes share: what one learned, the others know (adapted limits, TLS
/// postures, policies, tallies). The store does not read it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    /// Which sort of record; many have the same.
    pub kind: Arc<str>,
    /// Which of its sort.
    pub key: Box<str>,
    /// At most [`NOTE_BYTES`]; empty: there is none.
    pub value: Box<[u8]>,
    /// From then on it is as if it were not there; none: until it is removed, as all of people
    /// ([`PEOPLE`]).
    pub expires_at: Option<Timestamp>,
}

/// An operator's word that a destination gets no mail now.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Suspension {
    /// Its name, as shaping gives it.
    pub destination: Box<str>,
    /// Until then; none: until it is lifted.
    pub until: Option<Timestamp>,
    /// In the operator's words.
    pub reason: Box<str>,
    /// Whose key it was.
    pub by: Box<str>,
    /// Since when.
    pub since: Timestamp,
}

impl Suspension {
    /// Whether it holds at `now`.
    pub fn holds(&self, now: Timestamp) -> bool {
        self.until.is_none_or(|until| until > now)
    }
}

impl Note {
    /// Refused: one that is too large, or of people ([`PEOPLE`]) and not for ever.
    pub(crate) fn check(&self) -> Result<()> {
        if self.value.len() > NOTE_BYTES {
            return Err(StoreError::Refused(format!(
                "a note of {} bytes, at most {NOTE_BYTES} are kept",
                self.value.len()
            )));
        }
        if self.expires_at.is_some() && self.kind.starts_with(PEOPLE) {
            return Err(StoreError::Refused("a note of people that expires".into()));
        }
        Ok(())
    }
}

/// What the kinds of [`Note`] begin with of which there are as many as people: an engine for many
/// machines spreads them, and does not look for those that have expired: they may not expire. The
/// account follows.
pub const PEOPLE: &str = "prospect/";

/// The kind of the [`Note`]s by which whoever follows the events says how far it has read: the key is
/// its name, the value the cursor. No event after the slowest of them is ever retired.
pub const EVENT_CURSORS: &str = "event-cursor";

/// The key of a [`Note`] whose value is a cursor of events, and the name of the field with one in a
/// value that is a JSON object. A store that is filled from another one makes such a cursor one
/// that is refused: the numbers of events are its own.
pub const CURSOR: &str = "cursor";

/// Whom to erase ([`Store::erase`](crate::Store::erase)).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Erase {
    /// In which account.
    pub account: String,
    /// The address, normalised.
    pub email: String,
    /// Where the step before this one ended; none: from the beginning.
    pub after: Option<String>,
}

/// What a step of an erasure came to.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Erased {
    /// Recipients that say no longer who they were.
    pub recipients: u64,
    /// Where to go on; none: that was all.
    pub next: Option<String>,
}

/// What is old enough to go ([`Store::retire`](crate::Store::retire)).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Retire {
    /// Events that were recorded before this time.
    pub events_before: Timestamp,
    /// Rows and statuses of batches that ended before this time.
    pub batches_before: Timestamp,
    /// Where the step before this one ended; none: from the beginning.
    pub after: Option<String>,
}

/// What a step of retention came to.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Retired {
    /// Events removed.
    pub events: u64,
    /// Recipients whose rows and statuses were removed.
    pub recipients: u64,
    /// Batches of which nothing is left but what they were and their counters.
    pub batches: u64,
    /// Where to go on; none: that was all.
    pub next: Option<String>,
}

/// The `data` of an event: a value, or its JSON as it will be kept. What is announced with every
/// click is written as text once, and not made of pieces first.
#[derive(Debug, Clone, PartialEq)]
pub enum Data {
    /// A value.
    Value(serde_json::Value),
    /// JSON.
    Json(String),
}

/// Most of what is told as JSON is not longer, in bytes.
const TOLD: usize = 512;

/// The same as [`serde_json::to_string`], in a piece of memory that mostly suffices. For numbers, texts
/// and the like, which have no failing serializer.
pub(crate) fn json_of(fields: &impl serde::Serialize) -> String {
    let mut text = Vec::with_capacity(TOLD);
    match serde_json::to_writer(&mut text, fields) {
        Ok(()) => String::from_utf8(text).unwrap_or_default(),
        Err(_) => String::new(),
    }
}

impl Data {
    /// What serializes to a JSON object.
    pub fn of(fields: &impl serde::Serialize) -> Self {
        Self::Json(json_of(fields))
    }

    pub(crate) fn into_json(self) -> String {
        match self {
            Self::Value(value) => value.to_string(),
            Self::Json(text) => text,
        }
    }
}

impl From<serde_json::Value> for Data {
    fn from(value: serde_json::Value) -> Self {
        Self::Value(value)
    }
}

/// What belongs into the event stream and to no recipient.
#[derive(Debug, Clone, PartialEq)]
pub struct Announcement {
    /// The type of the event.
    pub kind: EventKind,
    /// Whose.
    pub account: Box<str>,
    /// The event's `data`.
    pub data: Data,
    /// What else it says.
    pub about: About,
}

/// Whose next attempt is brought forward.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DueScope {
    /// The recipients of a batch.
    Batch(BatchId),
    /// The recipients in these queues.
    Domains(Vec<Box<str>>),
}

/// The most that a person lets be kept, whatever the mail to them was sent with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Consent {
    /// How much.
    pub mode: TrackingMode,
    /// Since when.
    pub since: Timestamp,
}

impl Consent {
    /// Binds a recipient who is about to be written to.
    pub(crate) fn bind(self, row: &mut Row) {
        row.tracking = Some(row.tracking.map_or(self.mode, |own| own.min(self.mode)));
    }
}

/// An entry of the suppression list.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Suppression {
    /// The address, normalised.
    pub email: String,
    /// Whose.
    pub account: String,
    /// Of this list; none: all mail that the reason stops.
    pub list: Option<String>,
    /// Why.
    pub reason: SuppressionReason,
    /// Who or what set it: `api`, `bounce`, `unsubscribe_page`, `one_click` ….
    pub source: String,
    /// Since when.
    pub created_at: Timestamp,
}

impl Suppression {
    /// Whether it stops mail of `priority` on `list`: an unsubscribe and a complaint never stop
    /// transactional mail (contract, section 6).
    pub fn stops(&self, list: &str, priority: Priority) -> bool {
        let kind = match self.reason {
            SuppressionReason::Complaint | SuppressionReason::Unsubscribed => {
                priority == Priority::Bulk
            }
            SuppressionReason::InvalidAddress
            | SuppressionReason::Inactive
            | SuppressionReason::Manual
            | SuppressionReason::Erased
            | SuppressionReason::Error
            | SuppressionReason::Spam => true,
        };
        kind && self.list.as_deref().is_none_or(|of| of == list)
    }
}

/// Which batches.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BatchQuery {
    /// Only of this account.
    pub account: Option<String>,
    /// Only in this state.
    pub state: Option<BatchState>,
    /// Only of this campaign.
    pub campaign: Option<String>,
    /// After this one (older).
    pub after: Option<BatchId>,
    /// At most.
    pub limit: u32,
}

/// Which recipients.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecipientQuery {
    /// Of this batch.
    pub batch: BatchId,
    /// From this index on.
    pub from_index: u32,
    /// At most.
    pub limit: u32,
    /// Only with this status.
    pub status: Option<Status>,
    /// Only opened, or not.
    pub opened: Option<bool>,
    /// Only clicked, or not.
    pub clicked: Option<bool>,
    /// Only of this domain.
    pub domain: Option<String>,
    /// Only whose variant is decided.
    pub with_variant: bool,
}

/// A recipient as it is read (contract, section 3).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecipientRow {
    /// The recipient as submitted.
    pub row: Row,
    /// The name of its variant, once that is decided.
    pub variant: Option<Box<str>>,
    /// Its status.
    pub status: Status,
    /// Attempts made.
    pub attempts: u8,
    /// When the next is due, for `temporary_error`.
    pub next_attempt_at: Option<Timestamp>,
    /// The reply code of the last attempt.
    pub smtp_code: Option<u16>,
    /// The enhanced status code of the last attempt.
    pub enhanced_code: Option<EnhancedCode>,
    /// What the last attempt's refusal means.
    pub class: Option<Class>,
    /// Whose trouble.
    pub blame: Option<Blame>,
    /// The last reply.
    pub reply: Option<String>,
    /// The last host.
    pub host: Option<String>,
    /// When the batch was accepted.
    pub accepted_at: Timestamp,
    /// When the attempt was made that made it what it is.
    pub decided_at: Option<Timestamp>,
    /// When.
    pub delivered_at: Option<Timestamp>,
    /// First.
    pub opened_at: Option<Timestamp>,
    /// First, by a person.
    pub opened_human_at: Option<Timestamp>,
    /// First.
    pub clicked_at: Option<Timestamp>,
    /// First, by a person.
    pub clicked_human_at: Option<Timestamp>,
    /// First.
    pub complained_at: Option<Timestamp>,
    /// First.
    pub unsubscribed_at: Option<Timestamp>,
    /// First.
    pub replied_at: Option<Timestamp>,
}

/// Everything about one message.
#[derive(Debug, Clone, PartialEq)]
pub struct MessageStory {
    /// Its batch.
    pub batch: Arc<BatchHead>,
    /// Its recipient and where it stands.
    pub recipient: RecipientRow,
    /// Attempts, oldest first.
    pub attempts: Vec<Attempt>,
    /// Hits, oldest first, with the verdict that holds now.
    pub hits: Vec<KeptHit>,
}

/// A hit and its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeptHit {
    /// Its fact.
    pub id: FactId,
    /// What it was, judged as it is now.
    pub hit: Hit,
}

/// What is known of an address.
#[derive(Debug, Clone, PartialEq)]
pub struct AddressStory {
    /// Its suppressions.
    pub suppressions: Vec<Suppression>,
    /// Its newest messages, newest first: the id and where each stands.
    pub messages: Vec<(Arc<BatchHead>, RecipientRow)>,
}

/// Which suppressions.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SuppressionQuery {
    /// Whose.
    pub account: String,
    /// Of this address.
    pub email: Option<String>,
    /// After this cursor.
    pub after: Option<String>,
    /// At most.
    pub limit: u32,
}

/// Which events.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct EventQuery {
    /// After this cursor; none: from the oldest kept.
    pub after: Option<String>,
    /// Only of this account.
    pub account: Option<String>,
    /// Only these; empty: all.
    pub kinds: Vec<EventKind>,
    /// Only of this batch.
    pub batch: Option<BatchId>,
    /// At most (1 to 1,000; of signs, to [`SIGNS`]).
    pub limit: u32,
}

/// Signs in a page, at most.
pub const SIGNS: u32 = 10_000;

/// A page of a list and the cursor after it, when there may be more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page<T> {
    /// In the order of the list.
    pub items: Vec<T>,
    /// Where to go on; none: that was all.
    pub next: Option<String>,
}

/// Whose unfinished work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WorkScope {
    /// Of a batch, by queue.
    Batch(BatchId),
    /// Of a queue, by batch.
    Queue(Box<str>),
}

/// Unfinished recipients of one batch in one queue. A range of which a part was reported counts
/// whole until its holder hands it back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Work {
    /// A domain, or [`MIXED`].
    pub queue: Box<str>,
    /// Whose.
    pub batch: BatchId,
    /// The state of the batch: only `in_progress` is sent.
    pub state: BatchState,
    /// When the batch's mail may leave.
    pub release_at: Timestamp,
    /// Held by nobody, and their own time has come.
    pub due: u64,
    /// Held by nobody, and it has not.
    pub later: u64,
    /// When the first of these is due.
    pub next_due: Option<Timestamp>,
    /// Held by a node.
    pub held: Vec<Held>,
}

/// What a node holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// Which node.
    pub node: JournalId,
    /// How many recipients, an upper bound.
    pub recipients: u64,
    /// When its lease ends, unless it is renewed.
    pub until: Timestamp,
}

/// Recipients by state, over all batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Totals {
    /// Their time has not come.
    pub scheduled: u64,
    /// Waiting for the first attempt.
    pub queued: u64,
    /// Waiting for another.
    pub temporary_error: u64,
    /// The due time that has passed longest ago, among unfinished recipients.
    pub oldest_due: Option<Timestamp>,
    /// Ranges that this process wanted to lease and could not read, each time it tried.
    pub unreadable: u64,
}
