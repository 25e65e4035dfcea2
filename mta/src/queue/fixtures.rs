//! What the tests of this room are made of.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use model::{BatchId, LotNumber, Partition, Place, Priority, Row, Timestamp, TrackingMode};
use service::config::shaping::{Limits, ShapingFile};
use service::config::{AmbiguousPolicy, StatusProfile};
use store::{BatchHead, LeasedRange, LeasedRecipient, RangeRef};

use super::QueueConfig;
use super::job::{Item, Policy};
use super::pool::{Pool, Pools};
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

/// Of a node with these sources, each with its weight, in one pool.
pub(crate) fn config(shaping: &str, sources: &[u32]) -> QueueConfig {
    let shaping = ShapingFile::parse(Path::new("shaping.toml"), shaping);
    QueueConfig {
        lease: Duration::from_secs(45),
        shaping: Arc::new(shaping.expect("a shaping file")),
        weights: HashMap::new(),
        profiles: HashMap::new(),
        source_names: (0..sources.len())
            .map(|n| format!("ip{n}").into())
            .collect(),
        pools: Pools::single(Pool::new(sources.iter().copied().enumerate().collect())),
        ambiguous: AmbiguousPolicy::Retry,
        ambiguous_after: Duration::from_secs(1_800),
    }
}

/// So many recipients of a domain that were never tried, all of them in the window.
pub(crate) fn leased(id: u64, domain: &str, rows: u32) -> LeasedRange {
    let email = format!("a@{domain}");
    let items = (0..rows).map(|offset| LeasedRecipient {
        place: Place {
            lot: LotNumber(u32::try_from(id).expect("few")),
            position: u16::try_from(offset).expect("few"),
        },
        offset,
        row: row(offset, &email),
        attempts: 0,
        maybe_started: false,
        ambiguous_before: false,
        variant: 0,
    });
    LeasedRange {
        range: range_ref(id),
        batch: Arc::new(head(1)),
        queue: domain.into(),
        items: items.collect(),
        window: rows,
        expires_at: Timestamp::from_millis(0),
    }
}
