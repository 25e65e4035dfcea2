//! What the store says of a test: every recipient that has a variant, counted at equal age.
//!
//! Owns the reading; the counting is `engagement::abtest`'s. Nothing is kept between two looks, so
//! whoever looks sees the same. Must not decide.

use std::collections::HashMap;

use engagement::abtest::{Inputs, Limits, Metric, Mode, Observation, VariantInput, measure};
use model::{EventKind, Status, Timestamp, TrackingMode};
use serde::{Deserialize, Serialize};
use store::{Batch, EventQuery, RecipientQuery, RecipientRow, Store};

use super::Plan;

/// Recipients and events read at once.
const PAGE: u32 = 1_000;

/// What was seen of a variant, whatever the age.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct Seen {
    pub(crate) recipients: u64,
    pub(crate) delivered: u64,
    pub(crate) bounced: u64,
    pub(crate) complained: u64,
    pub(crate) opened: u64,
    pub(crate) opened_human: u64,
    pub(crate) clicked: u64,
    pub(crate) clicked_human: u64,
}

/// A test as it stands.
#[derive(Debug, Clone)]
pub(crate) struct Look {
    pub(crate) inputs: Inputs,
    /// By variant.
    pub(crate) seen: Vec<Seen>,
}

/// Looks at a test.
pub(crate) async fn look(
    store: &dyn Store,
    plan: &Plan,
    batch: &Batch,
    now: Timestamp,
) -> store::Result<Look> {
    let mut seen = vec![Seen::default(); plan.names.len()];
    let mut observations = Vec::new();
    let converted = match plan.test.metric {
        Metric::Conversion => conversions(store, batch).await?,
        Metric::Clicks | Metric::Opens | Metric::ClickToOpen => HashMap::new(),
    };
    let mut query = RecipientQuery {
        batch: batch.head.id,
        from_index: 0,
        limit: PAGE,
        status: None,
        opened: None,
        clicked: None,
        domain: None,
        with_variant: true,
    };
    loop {
        let page = store.recipients(query.clone()).await?;
        for row in &page.items {
            let name = row.variant.as_deref();
            let Some(place) = plan.names.iter().position(|of| Some(&**of) == name) else {
                continue;
            };
            if let Some(seen) = seen.get_mut(place) {
                count(seen, row);
            }
            let variant = u8::try_from(place).unwrap_or(u8::MAX);
            let at = converted.get(&row.row.index).copied();
            observations.extend(observed(row, plan.test.metric, variant, at));
        }
        match page.next.and_then(|next| next.parse().ok()) {
            Some(next) => query.from_index = next,
            None => break,
        }
    }
    let inputs = inputs(plan, batch, &seen, &observations, now);
    Ok(Look { inputs, seen })
}

fn count(seen: &mut Seen, row: &RecipientRow) {
    seen.recipients += 1;
    let delivered = row.status == Status::Delivered;
    for (counter, did) in [
        (&mut seen.delivered, delivered),
        (&mut seen.bounced, row.status == Status::Bounce),
        (&mut seen.complained, row.complained_at.is_some()),
        (&mut seen.opened, row.opened_at.is_some()),
        (&mut seen.opened_human, row.opened_human_at.is_some()),
        (&mut seen.clicked, row.clicked_at.is_some()),
        (&mut seen.clicked_human, row.clicked_human_at.is_some()),
    ] {
        *counter += u64::from(did);
    }
}

/// What counts of a recipient; none: it was not delivered, cannot be watched, or, where those who
/// opened are asked, did not open.
fn observed(
    row: &RecipientRow,
    metric: Metric,
    variant: u8,
    converted: Option<Timestamp>,
) -> Option<Observation> {
    let delivered = row
        .delivered_at
        .filter(|_| row.status == Status::Delivered)?;
    let watched = row
        .row
        .tracking
        .is_none_or(|own| own == TrackingMode::Individual);
    let (since, human_at, any_at) = match metric {
        Metric::Clicks => (delivered, row.clicked_human_at, row.clicked_at),
        Metric::Opens => (delivered, row.opened_human_at, row.opened_at),
        Metric::ClickToOpen => (row.opened_human_at?, row.clicked_human_at, row.clicked_at),
        Metric::Conversion => {
            return Some(Observation {
                variant,
                since: delivered,
                human_at: converted,
                any_at: converted,
            });
        }
    };
    watched.then_some(Observation {
        variant,
        since,
        human_at,
        any_at,
    })
}

fn inputs(
    plan: &Plan,
    batch: &Batch,
    seen: &[Seen],
    observations: &[Observation],
    now: Timestamp,
) -> Inputs {
    let measured = measure(observations, seen.len(), now, plan.test.wait());
    // The rounds of a bandit are shared out unevenly on purpose.
    let share = |seen: &Seen| match plan.test.mode {
        Mode::Bandit => seen.recipients as f64,
        Mode::Winner | Mode::Split => 1.0,
    };
    let variants = plan.names.iter().zip(seen).enumerate();
    let variants = variants.map(|(place, (name, seen))| VariantInput {
        name: name.clone(),
        share: share(seen),
        assigned: seen.recipients,
        delivered: seen.delivered,
        bounced: seen.bounced,
        complained: seen.complained,
        human: measured.human.get(place).copied().unwrap_or_default(),
        any: measured.any.get(place).copied().unwrap_or_default(),
    });
    let limits = batch.head.guardrails.map(|of| Limits {
        bounce_rate: of.bounce_rate.unwrap_or(1.0),
        complaint_rate: of.complaint_rate.unwrap_or(1.0),
        min_delivered: of.min_delivered,
    });
    Inputs {
        variants: variants.collect(),
        metric: plan.test.metric,
        min_confidence: plan.test.min_confidence,
        fallback: plan.test.fallback,
        limits,
        age_ms: u64::try_from(measured.age.as_millis()).unwrap_or(u64::MAX),
    }
}

/// When each recipient of a batch first did what the caller reports, by index.
async fn conversions(store: &dyn Store, batch: &Batch) -> store::Result<HashMap<u32, Timestamp>> {
    let mut first: HashMap<u32, Timestamp> = HashMap::new();
    let mut query = EventQuery {
        after: Some(store.event_cursor(batch.head.created_at).await?),
        account: None,
        kinds: vec![EventKind::Conversion],
        batch: Some(batch.head.id),
        limit: PAGE,
    };
    loop {
        let page = store.events(query.clone()).await?;
        for event in &page.events {
            if let Some(message) = event.message_id {
                let at = first.entry(message.index).or_insert(event.occurred_at);
                *at = (*at).min(event.occurred_at);
            }
        }
        query.after = Some(page.next);
        if page.events.is_empty() {
            return Ok(first);
        }
    }
}
