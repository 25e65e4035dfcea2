//! What the queue shows of itself to people who ask why mail does not move: one moment, bounded.
//!
//! Owns the shapes only; the state fills them in. Must not decide anything.

use std::sync::Arc;

use model::{BatchId, MessageId, Timestamp};
use service::metrics::LimitKind;

use super::job::Policy;
use crate::shaping::Destination;

/// Domains told of a destination; of more there is a number.
pub const DOMAINS_MAX: usize = 20;

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scope {
    /// At most this many destinations, the busiest first.
    Busiest(usize),
    /// These.
    Named(Vec<Destination>),
    /// A batch, and these destinations.
    Batch(BatchId, Vec<Destination>),
    /// A message to this domain, and this destination.
    Message(MessageId, Box<str>, Destination),
    /// A domain, and this destination.
    Domain(Box<str>, Destination),
}

/// One moment of the queue.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Which moment.
    pub at: Timestamp,
    /// What holds for the whole process.
    pub process: ProcessView,
    /// As asked for; who has nothing waiting, no connection and no memory of trouble is not here.
    pub destinations: Vec<DestinationView>,
    /// How many destinations there are.
    pub destination_count: usize,
    /// The batch that was asked for, or the message's, when something of it is leased here.
    pub batch: Option<BatchView>,
    /// Where the message is.
    pub message: Whereabouts,
    /// What waits here for the domain that was asked for.
    pub domain_waiting: usize,
    /// Those of [`Scope::Named`] that an operator suspended, as far as the queue knows.
    pub suspended: Vec<Destination>,
}

/// What holds for the whole process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ProcessView {
    /// Recipients leased and not reported.
    pub leased: usize,
    /// Messages at connections.
    pub in_flight: usize,
    /// Connections, those being opened included.
    pub connections: usize,
    /// The most of them.
    pub connections_max: usize,
    /// Domains that wait for an answer of DNS.
    pub resolving: usize,
    /// Nothing is handed out until then: the journal had no room.
    pub paused_until: Option<Timestamp>,
    /// The process ends.
    pub draining: bool,
}

/// A destination as the queue sees it.
#[derive(Debug, Clone)]
pub struct DestinationView {
    /// Its name, limits and retry schedule.
    pub policy: Arc<Policy>,
    /// Domains with mail waiting here and how much, at most [`DOMAINS_MAX`].
    pub domains: Vec<(Box<str>, usize)>,
    /// How many there are.
    pub domain_count: usize,
    /// Leased, and not at a connection.
    pub waiting: usize,
    /// Of these, in ranges that may not start now.
    pub blocked: Blocked,
    /// At connections.
    pub in_flight: usize,
    /// It is left alone until then, since it could not be reached.
    pub held_until: Option<Timestamp>,
    /// How often in a row it could not be reached.
    pub failures: u32,
    /// It waits for a connection of the process to become free.
    pub starved: bool,
    /// Messages handed to its connections in a second, over the last minute.
    pub pace: f64,
    /// As each egress source sees it.
    pub sources: Vec<SourceView>,
    /// Its limits, of each source.
    pub limits: Vec<LimitSight>,
    /// What of it the batch that was asked about gets; none when nothing of that waits here.
    pub share: Option<Share>,
}

/// How a batch shares a destination with all else that waits there.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Share {
    /// Batches of its priority with something waiting, itself among them.
    pub batches: usize,
    /// Their accounts.
    pub accounts: usize,
    /// Its part of their turns, as long as all of them wait: from 0 to 1.
    pub part: f64,
    /// Something transactional goes before all of them.
    pub behind_urgent: bool,
}

/// A limit as it stands.
#[derive(Debug, Clone, PartialEq)]
pub struct LimitSight {
    /// Index of the source.
    pub source: usize,
    /// Which limit.
    pub kind: LimitKind,
    /// Messages in a second, or a count; a rate of 0 is a pause.
    pub in_force: f64,
    /// As configured.
    pub base: f64,
    /// Why it differs, in a word.
    pub reason: Option<&'static str>,
    /// The rule that read the reply which moved it.
    pub rule: Option<Arc<str>>,
    /// When it moves next by itself.
    pub until: Option<Timestamp>,
    /// The line of the shaping file.
    pub line: Option<u32>,
}

/// Why leased messages may not start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Blocked {
    /// The outcomes before them are not in the store yet.
    pub by_window: usize,
    /// The content of their batch is not compiled.
    pub by_content: usize,
    /// Their lease ends, or they are on their way back.
    pub by_lease: usize,
}

/// A destination as one egress source sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SourceView {
    /// Index of the source.
    pub source: usize,
    /// Connections that take messages.
    pub ready: usize,
    /// Connections being opened.
    pub opening: usize,
    /// Connections that have all the messages they can carry at a time.
    pub full: usize,
    /// At connections.
    pub in_flight: usize,
    /// When its rate lets the next message go.
    pub next_permit_at: Timestamp,
    /// No new connection before: sessions broke.
    pub open_after: Option<Timestamp>,
}

/// What is leased of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchView {
    /// Not at connections.
    pub waiting: usize,
    /// At connections.
    pub in_flight: usize,
    /// Whether its messages can be composed.
    pub content: ContentView,
}

/// The content of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ContentView {
    /// Compiled.
    Ready,
    /// Being read and compiled.
    Loading,
    /// It could not be, and is tried again then; the log has the reason.
    Failed(Timestamp),
}

/// Where a message is in this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whereabouts {
    /// Not here, or nobody asked.
    Absent,
    /// It waits for its turn.
    Waiting {
        /// For its domain, before it.
        ahead: usize,
        /// Why it may not start even in its turn.
        blocked: Option<Block>,
    },
    /// At a connection.
    InFlight,
}

/// What keeps a leased message from starting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Block {
    /// Where its domain's mail goes is being looked up.
    Route,
    /// See [`Blocked::by_window`].
    Window,
    /// See [`Blocked::by_content`].
    Content,
    /// See [`Blocked::by_lease`].
    Lease,
}
