//! What a judgement is made from: plain data, gathered by `ask`.

use model::BatchState;
use model::{Blame, Class, Status, SuppressionReason, Timestamp};
use store::Held;

use super::Source;
use super::troubles::Noted;
use crate::queue::snapshot::{BatchView, DestinationView, ProcessView, Whereabouts};

/// What holds for the whole node.
#[derive(Debug, Clone)]
pub(crate) struct NodeFacts {
    pub(crate) now: Timestamp,
    /// None: the queue did not answer in time, or has ended.
    pub(crate) process: Option<ProcessView>,
    pub(crate) journal_full: bool,
    /// What the store said when it could not be asked.
    pub(crate) store_away: Option<String>,
}

/// A limit, as it holds.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Limit<T> {
    pub(crate) in_force: T,
    pub(crate) base: T,
    /// Why it is not what was configured.
    pub(crate) reason: Option<String>,
    /// When it moves next by itself.
    pub(crate) until: Option<Timestamp>,
    /// Where it is configured, in the file of the destination's limits.
    pub(crate) line: Option<u32>,
}

/// What one egress source may do at a destination.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct SourceLimits {
    pub(crate) source: String,
    /// In a second; infinite: no limit.
    pub(crate) rate: Limit<f64>,
    pub(crate) connections: Limit<u32>,
    pub(crate) messages_per_connection: Limit<u32>,
    /// Nothing leaves before: the destination said that we are not wanted.
    pub(crate) blocked_until: Option<Timestamp>,
}

/// What is known of a destination.
#[derive(Debug, Clone)]
pub(crate) struct DestinationFacts {
    pub(crate) name: String,
    /// Where its limits stand.
    pub(crate) configured: Source,
    /// One per egress source, in the order of the sources.
    pub(crate) limits: Vec<SourceLimits>,
    pub(crate) view: Option<DestinationView>,
    pub(crate) suspension: Option<Suspended>,
    pub(crate) trouble: Option<Noted>,
    /// Why nobody knows where its mail goes.
    pub(crate) dns: Option<String>,
}

/// A suspension, as an operator or rule has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Suspended {
    pub(crate) by: String,
    pub(crate) reason: String,
    pub(crate) since: Timestamp,
    pub(crate) until: Option<Timestamp>,
}

/// Unfinished recipients of one destination, or of a batch at one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Stock {
    pub(crate) due: u64,
    pub(crate) later: u64,
    pub(crate) next_due: Option<Timestamp>,
    /// Their batch has a send window, which they may wait for.
    pub(crate) has_window: bool,
    /// Of batches that do not send now, and why the first of them does not.
    pub(crate) stopped: u64,
    pub(crate) stopped_by: Option<(BatchState, Timestamp)>,
    /// Held by this node, not at a connection.
    pub(crate) leased: u64,
    /// At connections of this node.
    pub(crate) in_flight: u64,
    pub(crate) elsewhere: Vec<Held>,
}

impl Stock {
    /// All of them.
    pub(crate) fn unfinished(&self) -> u64 {
        let here = self.leased + self.in_flight;
        self.due + self.later + self.stopped + here + self.held_elsewhere()
    }

    pub(crate) fn held_elsewhere(&self) -> u64 {
        self.elsewhere.iter().map(|held| held.recipients).sum()
    }
}

/// What is known of a batch.
#[derive(Debug, Clone)]
pub(crate) struct BatchFacts {
    pub(crate) id: String,
    pub(crate) state: BatchState,
    pub(crate) release_at: Timestamp,
    pub(crate) completed_at: Option<Timestamp>,
    pub(crate) view: Option<BatchView>,
    /// Its parts by destination.
    pub(crate) parts: Vec<(DestinationFacts, Stock)>,
    /// Recipients in lots of several domains, whose destinations are not known.
    pub(crate) mixed: Stock,
    /// Everybody who is left is held back.
    pub(crate) held_back: Option<HeldBack>,
}

/// What holds recipients of a batch with variants back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HeldBack {
    /// The time of their variant comes then.
    Variant(Timestamp),
    /// The test is decided then, or a round of it.
    Test(Timestamp),
    /// A person is to decide.
    Person,
}

/// What is known of a message.
#[derive(Debug, Clone)]
pub(crate) struct MessageFacts {
    pub(crate) id: String,
    pub(crate) status: Status,
    pub(crate) next_attempt_at: Option<Timestamp>,
    /// The window of its batch is shut to its recipient until then.
    pub(crate) shut_until: Option<Timestamp>,
    pub(crate) expires_at: Timestamp,
    pub(crate) last: Option<LastAttempt>,
    pub(crate) suppressed_for: Option<SuppressionReason>,
    pub(crate) delivered_at: Option<Timestamp>,
    pub(crate) batch_state: BatchState,
    pub(crate) release_at: Timestamp,
    pub(crate) batch_view: Option<BatchView>,
    pub(crate) place: Whereabouts,
    pub(crate) destination: DestinationFacts,
    /// Of its batch, in the queue of its domain.
    pub(crate) stock: Stock,
    pub(crate) held_back: Option<HeldBack>,
}

/// The last attempt of a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LastAttempt {
    pub(crate) number: u8,
    pub(crate) at: Timestamp,
    pub(crate) ambiguous: bool,
    pub(crate) class: Option<Class>,
    pub(crate) blame: Option<Blame>,
    pub(crate) reply: String,
    pub(crate) host: String,
    pub(crate) rule: Option<String>,
}
