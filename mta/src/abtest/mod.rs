//! A/B tests on their way: dealing, measuring, deciding, and releasing what was held back.
//!
//! Owns when a test is decided and what follows from it; what may be concluded from counts is
//! `engagement::abtest`'s. One node at a time does it, and every step may be repeated: a decision is
//! the first record that was written, and what is released is never held back again. Must not send
//! anything, and nothing that sends waits for it.

mod job;
pub(crate) mod kept;
pub(crate) mod layout;
pub(crate) mod measure;
#[cfg(test)]
mod tests;

use std::time::Duration;

pub(crate) use job::{Testing, TestingDeps};

use engagement::abtest::{Mode, Record};
use model::{About, BatchId, BatchState, EventKind, Timestamp, partition_hash};
use serde_json::json;
use store::{Announcement, Batch, Store, StoreError, Wave};

use crate::released::{Released, Test};
use kept::{Decided, HOLD, Kept, MANUAL};
use layout::{Layout, ROUNDS};
use measure::Look;

/// What of a test does not change.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) batch: BatchId,
    pub(crate) test: Test,
    pub(crate) layout: Layout,
    /// The variants.
    pub(crate) names: Vec<String>,
}

/// What came of a decision by hand.
#[derive(Debug)]
pub(crate) enum ByHand {
    /// This variant was or is decided.
    Done,
    /// Something else was decided before.
    Late,
}

impl Plan {
    /// The test of a batch; `None`: it has no variants, or is gone.
    pub(crate) async fn load(store: &dyn Store, batch: BatchId) -> store::Result<Option<Self>> {
        let Some(bytes) = store.content(batch).await? else {
            return Ok(None);
        };
        let released = Released::from_bytes(&bytes)
            .map_err(|error| StoreError::Damaged(format!("the content of {batch}: {error}")))?;
        let (Some(layout), Some(test)) = (Layout::of(&released), released.test) else {
            return Ok(None);
        };
        Ok(Some(Self {
            batch,
            test,
            layout,
            names: released.variants.into_iter().map(|of| of.name).collect(),
        }))
    }

    /// Whether something is decided at all.
    pub(crate) fn decides(&self) -> bool {
        self.test.mode != Mode::Split
    }

    /// Decisions that are made by the clock: one, or one for each round of a bandit.
    fn rounds(&self) -> u32 {
        match self.test.mode {
            Mode::Bandit if !self.layout.rest.is_empty() => ROUNDS,
            Mode::Winner | Mode::Bandit => 1,
            Mode::Split => 0,
        }
    }

    /// When it is decided, or its round of this number; paused time does not count. None: the batch
    /// was not started, and has no time at which it will be.
    pub(crate) fn decide_at(&self, batch: &Batch, round: u32, now: Timestamp) -> Option<Timestamp> {
        if batch.state == BatchState::Open || !self.decides() {
            return None;
        }
        let paused = batch.paused_at.map_or(Duration::ZERO, |at| now.since(at));
        let begins = self.layout.begins(released_at(batch));
        Some(begins + self.test.wait() * (round + 1) + batch.paused_for + paused)
    }

    /// When the part of the test with this variant leaves.
    pub(crate) fn variant_at(&self, batch: &Batch, name: &str) -> Option<Timestamp> {
        let place = self.names.iter().position(|of| of == name)?;
        let wave = self.layout.of_variant(place);
        let mut starts = self.layout.starts(released_at(batch));
        starts.find(|(of, _)| Some(*of) == wave).map(|(_, at)| at)
    }

    /// The shares by which everybody gets one variant.
    fn all_get(&self, variant: Option<&str>) -> Vec<f64> {
        let share = |name: &String| match variant {
            Some(chosen) => f64::from(u8::from(chosen == name)),
            None => 1.0,
        };
        self.names.iter().map(share).collect()
    }
}

/// When the mail of a batch began to leave, or will.
fn released_at(batch: &Batch) -> Timestamp {
    let head = batch.head.release_at;
    batch.started_at.map_or(head, |at| at.max(head))
}

/// Writes a decision, if nothing is decided yet or only that a person is to; whether it was.
async fn write_decision(
    store: &dyn Store,
    plan: &Plan,
    (kept, before): (&mut Kept, Option<Box<[u8]>>),
    decided: Decided,
    now: Timestamp,
) -> store::Result<bool> {
    debug_assert!(!kept.is_over(), "a decision is made once");
    tracing::info!(batch = %plan.batch, decision = decided.decision, variant = decided.variant, "a test was decided");
    kept.decisions.push(decided);
    kept.swap(store, plan.batch, before, now).await
}

/// Decides by hand.
///
/// # Errors
/// As the store gives them; what was decided then is carried out by the job.
pub(crate) async fn by_hand(
    store: &dyn Store,
    (plan, batch): (&Plan, &Batch),
    variant: &str,
    by: &str,
    now: Timestamp,
) -> store::Result<ByHand> {
    loop {
        let (mut kept, before) = Kept::load(store, plan.batch, now).await?;
        if kept.is_over() {
            let same = kept.variant() == Some(variant);
            carry_out(store, plan, batch, now).await?;
            return Ok(if same { ByHand::Done } else { ByHand::Late });
        }
        let look = measure::look(store, plan, batch, now).await?;
        let decided = Decided {
            decision: MANUAL.to_owned(),
            variant: Some(variant.to_owned()),
            at: now,
            by: by.to_owned(),
            fence: None,
            record: Record::conclude(look.inputs),
            seen: look.seen,
        };
        if write_decision(store, plan, (&mut kept, before), decided, now).await? {
            carry_out(store, plan, batch, now).await?;
            return Ok(ByHand::Done);
        }
        // Somebody else was faster: what they decided is looked at.
    }
}

/// Does what was decided: releases the rest, and tells of it. May be repeated.
async fn carry_out(
    store: &dyn Store,
    plan: &Plan,
    batch: &Batch,
    now: Timestamp,
) -> store::Result<()> {
    let (mut kept, mut before) = Kept::load(store, plan.batch, now).await?;
    if let Some(decided) = kept.decisions.last().filter(|of| of.decision != HOLD) {
        let shares = plan.all_get(decided.variant.as_deref());
        for wave in plan.layout.rest.clone() {
            let how = kept.round_of(plan, wave).unwrap_or_else(|| Wave {
                at: decided.at,
                shares: shares.clone(),
            });
            store.release_wave(plan.batch, wave, how, now).await?;
        }
    }
    while kept.told < kept.decisions.len() {
        if let Some(decided) = kept.decisions.get(kept.told) {
            let news = vec![announcement(plan, batch, kept.told, decided)];
            store.announce(news, now).await?;
        }
        kept.told += 1;
        if !kept.swap(store, plan.batch, before, now).await? {
            // Another does it too; one event has one id, whoever tells it.
            return Ok(());
        }
        (kept, before) = Kept::load(store, plan.batch, now).await?;
    }
    Ok(())
}

/// `abtest.decided`: the same event, with the same id, whenever it is told.
fn announcement(plan: &Plan, batch: &Batch, number: usize, decided: &Decided) -> Announcement {
    let identity = format!("{} abtest {number}", plan.batch);
    let half = |what: &str| partition_hash(what, &identity).to_be_bytes();
    let mut random = [0; 10];
    let bytes = half("event").into_iter().chain(half("event id"));
    random
        .iter_mut()
        .zip(bytes)
        .for_each(|(to, from)| *to = from);
    let millis = u64::try_from(decided.at.millis()).unwrap_or(0);
    let id = uuid::Builder::from_unix_timestamp_millis(millis, &random).into_uuid();
    Announcement {
        kind: EventKind::AbtestDecided,
        account: batch.head.account.as_str().into(),
        data: json!({
            "decision": decided.decision,
            "variant": decided.variant,
            "at": decided.at,
            "by": decided.by,
            "fence": decided.fence,
            "record": decided.record,
        })
        .into(),
        about: About {
            id: Some(id),
            occurred_at: Some(decided.at),
            campaign: batch.head.campaign.clone(),
            batch_id: Some(plan.batch),
            variant: decided.variant.clone(),
            metadata: batch.head.metadata.clone(),
            ..About::default()
        },
    }
}

/// The record of what was measured, as the clock decides on it.
fn conclude(look: Look, now: Timestamp, fence: u64) -> Decided {
    let record = Record::conclude(look.inputs);
    Decided {
        decision: record.decision.as_str().to_owned(),
        variant: record.variant.clone(),
        at: now,
        by: "service".to_owned(),
        fence: Some(fence),
        record,
        seen: look.seen,
    }
}
