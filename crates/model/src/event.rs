//! Events: what campaign systems are told (contract, section 5).

use crate::status::words;
use crate::{BatchId, MessageId, Timestamp};
use serde::{Deserialize, Serialize};

words! {
    /// The types of event.
    EventKind {
        /// A batch was accepted: `first_index`, `count`, `rejected_count`.
        BatchAccepted = "batch.accepted",
        /// Its mail may leave.
        BatchStarted = "batch.started",
        /// Stopped for now.
        BatchPaused = "batch.paused",
        /// Goes on.
        BatchResumed = "batch.resumed",
        /// Ended by the caller.
        BatchCancelled = "batch.cancelled",
        /// Every recipient has a final status.
        BatchCompleted = "batch.completed",
        /// Accepted by the receiving side.
        EmailDelivered = "email.delivered",
        /// An attempt failed, more to come.
        EmailTemporaryError = "email.temporary_error",
        /// Refused for good.
        EmailBounced = "email.bounced",
        /// Ended without a refusal.
        EmailFailed = "email.failed",
        /// Not sent, with the reason.
        EmailSuppressed = "email.suppressed",
        /// Ended before it was started.
        EmailCancelled = "email.cancelled",
        /// Called spam by the person.
        EmailComplained = "email.complained",
        /// The person unsubscribed.
        EmailUnsubscribed = "email.unsubscribed",
        /// The pixel was fetched.
        EmailOpened = "email.opened",
        /// A link was followed.
        EmailClicked = "email.clicked",
        /// The person answered.
        EmailReplied = "email.replied",
        /// A cookie was bound to a prospect.
        IdentityBound = "identity.bound",
        /// A cookie that belongs to another prospect.
        IdentityConflict = "identity.conflict",
        /// A binding was undone.
        IdentityRevoked = "identity.revoked",
        /// A page with the tag was seen.
        PageViewed = "page.viewed",
        /// What the caller counts as success.
        Conversion = "conversion",
        /// A verdict was revised.
        EngagementReclassified = "engagement.reclassified",
        /// An A/B test was decided.
        AbtestDecided = "abtest.decided",
        /// An address gets no further mail.
        SuppressionAdded = "suppression.added",
        /// It does again.
        SuppressionRemoved = "suppression.removed",
        /// A destination's limit changed.
        DestinationLimitChanged = "destination.limit_changed",
    }
}

/// The recipient of an event about a message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventRecipient {
    /// The address.
    pub email: String,
    /// The caller's name for the person.
    pub prospect_id: Option<String>,
}

/// One event, as it goes out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// One per fact, the same whenever it is told.
    pub id: uuid::Uuid,
    /// Rises within a partition, may have gaps.
    pub seq: u64,
    /// What happened.
    #[serde(rename = "type")]
    pub kind: EventKind,
    /// When, by the clock of whoever saw it.
    pub occurred_at: Timestamp,
    /// When the store learned of it.
    pub recorded_at: Timestamp,
    /// Whose.
    pub account: String,
    /// The caller's name for the campaign.
    pub campaign: Option<String>,
    /// The batch, for `batch.*` and `email.*`.
    pub batch_id: Option<BatchId>,
    /// The message, for `email.*`.
    pub message_id: Option<MessageId>,
    /// The variant of an A/B test.
    pub variant: Option<String>,
    /// To whom, for `email.*`.
    pub recipient: Option<EventRecipient>,
    /// What the caller gave with the batch and the recipient.
    pub metadata: serde_json::Value,
    /// What is particular to the type.
    pub data: serde_json::Value,
}

/// What an event is about, where no fact of a recipient tells it.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct About {
    /// The event's own id; none: the store makes one.
    pub id: Option<uuid::Uuid>,
    /// When it happened; none: when the store learned of it.
    pub occurred_at: Option<Timestamp>,
    /// The caller's name for the campaign.
    pub campaign: Option<String>,
    /// The batch.
    pub batch_id: Option<BatchId>,
    /// The message.
    pub message_id: Option<MessageId>,
    /// The variant of an A/B test.
    pub variant: Option<String>,
    /// The person.
    pub recipient: Option<EventRecipient>,
    /// What the caller gave.
    pub metadata: serde_json::Value,
}
