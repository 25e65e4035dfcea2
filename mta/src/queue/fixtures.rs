//! What the tests of this room are made of.

use std::sync::Arc;
use std::time::Duration;

use model::{BatchId, LotNumber, Partition, Place, Priority, Row, Timestamp, TrackingMode};
use service::config::shaping::Limits;
use service::config::{AmbiguousPolicy, StatusProfile};
use store::{BatchHead, RangeRef};

use super::job::{Item, Policy};
use crate::shaping::Destination;

pub(crate) fn head(batch: u8) -> BatchHead {
    BatchHead {
        id: BatchId::from_bytes([batch; 16]),
        account: "default".into(),
        campaign: None,
        list: "default".into(),
        priority: Priority::Bulk,
        pool: None,
        rate: model::units::Rate::Unlimited,
        created_at: Timestamp::from_millis(0),
        release_at: Timestamp::from_millis(0),
        expires_at: None,
        tracking: TrackingMode::Individual,
        metadata: serde_json::Value::Null,
        held: false,
        window: None,
        guardrails: None,
        variants: None,
    }
}

pub(crate) fn row(index: u32, email: &str) -> Row {
    Row::new(index, email.parse().expect("an address"))
}

pub(crate) fn range_ref(id: u64) -> RangeRef {
    RangeRef {
        id,
        partition: Partition(0),
        token: 1,
    }
}

pub(crate) fn item(attempt: u8) -> Item {
    Item {
        range: range_ref(1),
        batch: Arc::new(head(1)),
        place: Place {
            lot: LotNumber(0),
            position: 0,
        },
        offset: 0,
        row: row(0, "a@x.example"),
        attempt,
        ambiguous_before: false,
        profile: StatusProfile::Default,
        shut_at: None,
        variant: 0,
    }
}

pub(crate) fn policy() -> Policy {
    Policy {
        destination: Destination::named("x.example"),
        limits: Limits::default(),
        ambiguous: AmbiguousPolicy::Retry,
        ambiguous_after: Duration::from_secs(1_800),
    }
}
