//! Guardrails: a batch that goes wrong pauses itself.
//!
//! Looks at the counters of running batches that have guardrails, every second or so; whichever node
//! sees it first pauses the batch, once: whoever resumes it means it.

use std::sync::Arc;
use std::time::Duration;

use model::{BatchState, Counters, Guardrails, Timestamp};
use serde::Serialize;
use service::clock::SharedClock;
use service::tasks::{Shutdown, Tasks};
use store::{Batch, BatchChange, BatchQuery, Note, PauseReason, Store};

/// Why batches paused themselves.
pub(crate) const NOTES: &str = "guardrail";
const LOOK_EVERY: Duration = Duration::from_millis(1_000);
const KEPT: Duration = Duration::from_secs(90 * 24 * 3_600);

/// What a guardrail saw.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Seen {
    guardrail: &'static str,
    rate: f64,
    limit: f64,
    at: Timestamp,
}

/// Looks until the process ends.
pub(crate) fn start(store: Arc<dyn Store>, clock: SharedClock, tasks: &Tasks, shutdown: Shutdown) {
    drop(tasks.spawn("guardrails", async move {
        loop {
            tokio::select! {
                () = shutdown.begun() => return,
                () = tokio::time::sleep(LOOK_EVERY) => {}
            }
            if let Err(error) = look(&*store, clock.now()).await {
                tracing::debug!(%error, "guardrails were not looked at");
            }
        }
    }));
}

async fn look(store: &dyn Store, now: Timestamp) -> store::Result<()> {
    let mut query = BatchQuery {
        state: Some(BatchState::InProgress),
        limit: 1_000,
        ..BatchQuery::default()
    };
    loop {
        let page = store.batches(query.clone()).await?;
        for batch in &page.items {
            let guardrails = batch.head.guardrails.as_ref();
            if let Some((reason, seen)) = guardrails.and_then(|of| judge(of, &batch.counters, now))
            {
                pause(store, batch, reason, &seen, now).await?;
            }
        }
        match page.next.and_then(|cursor| cursor.parse().ok()) {
            Some(after) => query.after = Some(after),
            None => return Ok(()),
        }
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "beyond 2^53 recipients a rate has other problems"
)]
fn judge(of: &Guardrails, counters: &Counters, now: Timestamp) -> Option<(PauseReason, Seen)> {
    let tried = counters.delivered + counters.bounce;
    if tried < of.min_delivered.max(1) {
        return None;
    }
    let over = |reason: PauseReason, part: u64, whole: u64, limit: Option<f64>| {
        let (limit, rate) = (limit?, part as f64 / whole.max(1) as f64);
        (rate > limit).then(|| {
            let seen = Seen {
                guardrail: reason.as_str(),
                rate,
                limit,
                at: now,
            };
            (reason, seen)
        })
    };
    over(
        PauseReason::BounceRate,
        counters.bounce,
        tried,
        of.bounce_rate,
    )
    .or_else(|| {
        let (complained, delivered) = (counters.complained, counters.delivered);
        over(
            PauseReason::ComplaintRate,
            complained,
            delivered,
            of.complaint_rate,
        )
    })
}

async fn pause(
    store: &dyn Store,
    batch: &Batch,
    reason: PauseReason,
    seen: &Seen,
    now: Timestamp,
) -> store::Result<()> {
    let id = batch.head.id;
    let note = Note {
        kind: NOTES.into(),
        key: id.to_string().into(),
        value: serde_json::to_vec(seen).unwrap_or_default().into(),
        expires_at: Some(now + KEPT),
    };
    // There before: it did its work, and somebody resumed the batch all the same.
    if !store.swap_note(note, None, now).await? {
        return Ok(());
    }
    store
        .change_batch(id, BatchChange::PauseFor(reason), now)
        .await?;
    tracing::warn!(batch = %id, guardrail = seen.guardrail, rate = seen.rate, limit = seen.limit, "a batch paused itself");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guardrail_waits_for_enough_and_then_holds() {
        let of = Guardrails {
            bounce_rate: Some(0.05),
            complaint_rate: Some(0.01),
            min_delivered: 100,
        };
        let now = Timestamp::from_millis(1);
        let counters = |delivered, bounce, complained| Counters {
            delivered,
            bounce,
            complained,
            ..Counters::default()
        };
        let reason = |counters| judge(&of, &counters, now).map(|(reason, _)| reason);
        assert_eq!(reason(counters(49, 50, 0)), None);
        assert_eq!(reason(counters(0, 100, 0)), Some(PauseReason::BounceRate));
        assert_eq!(reason(counters(95, 5, 0)), None);
        assert_eq!(reason(counters(94, 6, 0)), Some(PauseReason::BounceRate));
        assert_eq!(
            reason(counters(100, 0, 2)),
            Some(PauseReason::ComplaintRate)
        );
    }
}
