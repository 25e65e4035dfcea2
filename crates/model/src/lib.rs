//! The words every room shares: ids, addresses, statuses, facts, events, time.
//!
//! Owns the vocabulary of `CONTRACT.md` as types that are parsed once. Must not do I/O and must
//! not read a clock or a random source: both come in as arguments.
#![forbid(unsafe_code)]

mod address;
mod batch;
mod event;
mod fact;
mod id;
mod status;
mod time;
pub mod units;
mod window;

pub use address::{AddressError, Domain, EmailAddress};
pub use batch::{BatchState, Counters, Guardrails, Priority, Row, TrackingMode};
pub use event::{About, Event, EventKind, EventRecipient};
pub use fact::{
    Actor, Attempt, AttemptDetail, AttemptResult, Complaint, EnhancedCode, Fact, FactError, FactId,
    Hit, HitKind, PageView, Place, Reply, Revision, RuleRef, Seq, Verdict,
};
pub use id::{
    BatchId, IdError, JournalId, LotNumber, MessageId, Partition, VisitorId, WebhookId,
    partition_hash,
};
pub use status::{Blame, Class, DeliveryStatus, Status, SuppressionReason, UnknownName};
pub use time::Timestamp;
pub use window::{SendWindow, time_zone};
