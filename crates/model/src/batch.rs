//! What a batch is made of, as every room sees it.

use crate::status::words;
use crate::{EmailAddress, Status};
use serde::{Deserialize, Serialize};

words! {
    /// The state of a batch.
    BatchState {
        /// Held: parts may still come.
        Open = "open",
        /// Its `send_at` has not come.
        Scheduled = "scheduled",
        /// Being sent.
        InProgress = "in_progress",
        /// Stopped for now.
        Paused = "paused",
        /// Every recipient has a final status.
        Completed = "completed",
        /// Ended by the caller.
        Cancelled = "cancelled",
    }
}

words! {
    /// Which mail goes first.
    Priority {
        /// List mail.
        Bulk = "bulk",
        /// Mail that a person waits for.
        Transactional = "transactional",
    }
}

words! {
    /// How much of a person's engagement is recorded, least first: the most restrictive wins.
    TrackingMode {
        /// Nothing.
        Off = "off",
        /// Counts only.
        Aggregate = "aggregate",
        /// The last date of activity of a person.
        LastDate = "last_date",
        /// Everything.
        Individual = "individual",
    }
}

/// When a batch is paused by itself.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Guardrails {
    /// When more than this share of what was delivered or bounced did bounce (0 to 1).
    pub bounce_rate: Option<f64>,
    /// When more than this share of the delivered complained (0 to 1).
    pub complaint_rate: Option<f64>,
    /// Not before so many were delivered or bounced.
    pub min_delivered: u64,
}

/// One recipient as submitted: immutable from intake on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    /// Order of arrival in the batch, from 0; rejected recipients take one too.
    pub index: u32,
    /// Where to.
    pub email: EmailAddress,
    /// The name for the To header.
    pub name: Option<Box<str>>,
    /// The caller's name for the person.
    pub prospect_id: Option<Box<str>>,
    /// A JSON object, checked at intake.
    pub vars: Option<Box<str>>,
    /// A JSON value, at most 1 KiB, echoed in events.
    pub metadata: Option<Box<str>>,
    /// More restrictive than the batch's, when given.
    pub tracking: Option<TrackingMode>,
    /// Where the person's day begins: a name of the IANA database.
    pub time_zone: Option<Box<str>>,
}

impl Row {
    /// A recipient of whom nothing but the address is told.
    pub fn new(index: u32, email: EmailAddress) -> Self {
        Self {
            index,
            email,
            name: None,
            prospect_id: None,
            vars: None,
            metadata: None,
            tracking: None,
            time_zone: None,
        }
    }
}

/// The counters of a batch (contract, section 3). `accepted` is always the sum of the eight
/// status counters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names are the contract's")]
pub struct Counters {
    pub accepted: u64,
    pub scheduled: u64,
    pub queued: u64,
    pub temporary_error: u64,
    pub delivered: u64,
    pub bounce: u64,
    pub failed: u64,
    pub suppressed: u64,
    pub cancelled: u64,
    pub complained: u64,
    pub unsubscribed: u64,
    pub replied: u64,
    pub opened_unique: u64,
    pub opened_total: u64,
    pub clicked_unique: u64,
    pub clicked_total: u64,
    pub opened_unique_human: u64,
    pub opened_total_human: u64,
    pub clicked_unique_human: u64,
    pub clicked_total_human: u64,
}

impl Counters {
    /// The counter of a status.
    pub fn of(&mut self, status: Status) -> &mut u64 {
        match status {
            Status::Scheduled => &mut self.scheduled,
            Status::Queued => &mut self.queued,
            Status::TemporaryError => &mut self.temporary_error,
            Status::Delivered => &mut self.delivered,
            Status::Bounce => &mut self.bounce,
            Status::Failed => &mut self.failed,
            Status::Suppressed => &mut self.suppressed,
            Status::Cancelled => &mut self.cancelled,
        }
    }

    /// The sum of the eight status counters.
    pub fn statuses(mut self) -> u64 {
        Status::ALL.iter().map(|&status| *self.of(status)).sum()
    }

    /// Recipients without a final status.
    pub fn open(&self) -> u64 {
        self.scheduled + self.queued + self.temporary_error
    }
}
