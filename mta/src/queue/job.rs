//! What `queue` hands out, and what comes back.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use model::{Blame, Class, MessageId, Place, Row, Timestamp};
use service::config::{AmbiguousPolicy, StatusProfile};

use service::config::shaping::Limits;
use smtp::Reply;
use store::{BatchHead, RangeRef};

use crate::shaping::{Destination, Heard, SharedPacer};

/// No transaction starts when less than this is left of the lease.
pub const LEASE_MARGIN: Duration = Duration::from_secs(5);

/// One leased recipient of a batch.
#[derive(Debug)]
pub struct Item {
    /// The range it was leased with.
    pub range: RangeRef,
    /// Its batch.
    pub batch: Arc<BatchHead>,
    /// Where it stands.
    pub place: Place,
    /// Its offset in the range.
    pub offset: u32,
    /// The recipient.
    pub row: Row,
    /// The number of the attempt that comes next, from 1.
    pub attempt: u8,
    /// An earlier attempt was ambiguous: it may be there already.
    pub ambiguous_before: bool,
    /// What the end of it means for further mail.
    pub profile: StatusProfile,
    /// From then on the window of its batch is shut to its recipient.
    pub shut_at: Option<Timestamp>,
    /// The number of its variant, from 1; 0: its batch has none.
    pub variant: u8,
}

impl Item {
    /// When its mail might leave: its batch's time, or that of its wave.
    pub fn release_at(&self) -> Timestamp {
        self.batch.release_of(self.place.lot)
    }

    /// The message's id.
    pub fn message(&self) -> MessageId {
        MessageId {
            batch: self.batch.id,
            index: self.row.index,
        }
    }

    /// Whether the recipient's hours are over, for now.
    pub fn is_shut(&self, now: Timestamp) -> bool {
        self.shut_at.is_some_and(|at| at <= now)
    }

    /// The first moment from `at` on that is within the recipient's hours.
    pub fn within_hours(&self, at: Timestamp) -> Timestamp {
        let window = self.batch.window.as_ref();
        window.map_or(at, |window| {
            window.opens_at(self.row.time_zone.as_deref(), at)
        })
    }
}

/// What holds for the attempts at one destination.
#[derive(Debug)]
pub struct Policy {
    /// Whose limits.
    pub destination: Destination,
    /// The limits.
    pub limits: Limits,
    /// What becomes of an ambiguous attempt.
    pub ambiguous: AmbiguousPolicy,
    /// When it is repeated at the earliest.
    pub ambiguous_after: Duration,
}

/// Until when a lease is held, by the monotonic clock; moved by renewals, read by connections.
#[derive(Debug, Clone)]
pub struct Lease {
    epoch: Instant,
    /// Milliseconds after `epoch`.
    until: Arc<AtomicU64>,
}

impl Lease {
    /// A lease of `ttl` counted from `asked_at`, the moment before the store was asked.
    pub fn new(asked_at: Instant, ttl: Duration) -> Self {
        let lease = Self {
            epoch: asked_at,
            until: Arc::new(AtomicU64::new(0)),
        };
        lease.extend(asked_at + ttl);
        lease
    }

    /// Moves the end; never back.
    pub fn extend(&self, until: Instant) {
        let millis = u64::try_from(until.saturating_duration_since(self.epoch).as_millis())
            .unwrap_or(u64::MAX);
        self.until.fetch_max(millis, Ordering::AcqRel);
    }

    /// When it ends.
    pub fn until(&self) -> Instant {
        self.epoch + Duration::from_millis(self.until.load(Ordering::Acquire))
    }

    /// Whether nobody else can have what is leased.
    pub fn is_held(&self, now: Instant) -> bool {
        now < self.until()
    }

    /// Whether a transaction may still start.
    pub fn allows_start(&self, now: Instant) -> bool {
        now + LEASE_MARGIN <= self.until()
    }
}

/// The queue's name for one handing-out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JobId(pub u64);

/// The queue's name for one connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnId(pub u64);

/// A message to be sent now.
#[derive(Debug, Clone)]
pub struct Job {
    /// This handing-out.
    pub id: JobId,
    /// Over which connection.
    pub conn: ConnId,
    /// To whom.
    pub item: Arc<Item>,
    /// By which rules.
    pub policy: Arc<Policy>,
    /// The lease on it.
    pub lease: Lease,
    /// What its batch needs to begin a message, if it asked for a rate.
    pub pace: Option<SharedPacer>,
    /// Since when it is leased: what is newer in the control feed may stop it.
    pub leased_at: Instant,
}

/// What became of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// The attempt is in the journal.
    Recorded {
        /// The destination took it.
        delivered: bool,
        /// What the answer says about limits, if there was one that says anything.
        heard: Option<Heard>,
    },
    /// Nothing was sent of it: judge it again.
    Returned(Returned),
    /// It cannot be made, for this recipient: our fault.
    Unmade(String),
}

/// Why a job comes back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Returned {
    /// The connection ended for reasons of its own (idle, enough messages, drain).
    Closed,
    /// Its batch or recipient was stopped, or the lease runs out.
    Stopped,
    /// The session broke before the message was out; bounded by the queue.
    Broken(String),
    /// The journal took no start record.
    JournalFull,
    /// The compiled content of its batch made room for others.
    ContentGone,
}

/// Why nothing can be sent to a domain or destination at all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trouble {
    /// What it means.
    pub class: Class,
    /// Whose trouble it is.
    pub blame: Blame,
    /// What happened, for people.
    pub text: String,
    /// What the peer said, when it said anything.
    pub reply: Option<Reply>,
    /// The host and address last tried; empty when there was none.
    pub host: Box<str>,
    /// Another try is of no use: no such domain, or one that takes no mail.
    pub is_final: bool,
}
