//! The test of a batch: how it stands, and a decision by hand.
//!
//! Must not measure or decide: `abtest` does.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use axum::Json;
use axum::extract::State;
use bytes::Bytes;
use engagement::abtest::{Breach, Decision, Fallback, Metric, Mode, Record};
use model::units::format_duration;
use model::{BatchId, BatchState, Timestamp};
use serde::Serialize;
use std::time::Duration;
use store::Batch;

use super::Api;
use super::auth::{CanRead, CanSubmit};
use super::batches::visible;
use super::params::{NoParams, Segment};
use super::problem::{Answer, Code, Refusal};
use crate::abtest::kept::{Decided, Kept, Round};
use crate::abtest::measure::{self, Look, Seen};
use crate::abtest::{ByHand, Plan, by_hand};
use crate::intake::fields::{Mistakes, string};
use crate::intake::variants::Promise;
use axum::extract::rejection::BytesRejection;

/// What the decision `none` means.
const NOTHING_TO_DECIDE_ON: &str = "there was nothing to decide on (nobody did it, the best are equal, or fewer than two variants were delivered): the first variant was sent";
/// For how long a look at a running test is shown again.
const FRESH: Duration = Duration::from_secs(2);
/// Looks that are kept.
const LOOKS: usize = 64;

/// Looks at tests that run, by batch.
#[derive(Debug, Default)]
pub(crate) struct Looks(Mutex<HashMap<BatchId, (Timestamp, Look)>>);

/// A test as it stands.
#[derive(Debug, Serialize)]
pub(super) struct TestView {
    mode: Mode,
    metric: Metric,
    test_fraction: f64,
    wait: String,
    min_confidence: f64,
    fallback: Fallback,
    variants: Vec<VariantView>,
    /// The age at which they are compared.
    age: String,
    machine_share: f64,
    sample_ratio: f64,
    warnings: Vec<String>,
    /// What a test of this size can show.
    plan: Option<Promise>,
    decide_at: Option<Timestamp>,
    /// What was shared out in each round of a bandit, in the order of the variants.
    rounds: Vec<Round>,
    decision: Option<String>,
    variant: Option<String>,
    at: Option<Timestamp>,
    by: Option<String>,
}

#[derive(Debug, Serialize)]
struct VariantView {
    name: String,
    #[serde(flatten)]
    seen: Seen,
    /// By the metric, of people, at equal age.
    rate: Option<f64>,
    /// Recipients that have this age.
    compared: u64,
    p_best: Option<f64>,
    expected_loss: Option<f64>,
    /// Where the rate lies with 95 %.
    interval: Option<(f64, f64)>,
    /// The guardrail that it broke.
    breach: Option<Breach>,
}

impl TestView {
    fn of(plan: &Plan, batch: &Batch, kept: Kept, look: Look, now: Timestamp) -> Self {
        let round = u32::try_from(kept.rounds.len()).unwrap_or(0);
        let decided = kept.decisions.last().cloned();
        let (record, seen) = match &decided {
            Some(Decided { record, seen, .. }) => (record.clone(), seen.clone()),
            None => (Record::conclude(look.inputs), look.seen),
        };
        let promise = Promise::of(Some(&plan.test), plan.names.len(), batch.counters.accepted);
        let undecided = promise.as_ref().filter(|_| decided.is_none());
        let small = undecided.and_then(Promise::warning);
        let undone = decided
            .as_ref()
            .filter(|of| of.decision == Decision::None.as_str());
        let undone = undone.map(|_| NOTHING_TO_DECIDE_ON.to_owned());
        let warnings = undone.into_iter().chain(small).chain(record.warnings);
        let inputs = record.inputs.variants.iter().enumerate();
        let variants = inputs.map(|(place, of)| VariantView {
            name: of.name.clone(),
            seen: seen.get(place).copied().unwrap_or_default(),
            rate: (of.human.trials > 0).then(|| of.human.successes as f64 / of.human.trials as f64),
            compared: of.human.trials,
            p_best: record.p_best.get(place).copied(),
            expected_loss: record.expected_loss.get(place).copied(),
            interval: record.interval.get(place).copied(),
            breach: record.breaches.get(place).copied().flatten(),
        });
        Self {
            mode: plan.test.mode,
            metric: plan.test.metric,
            test_fraction: plan.test.fraction,
            wait: format_duration(plan.test.wait()),
            min_confidence: plan.test.min_confidence,
            fallback: plan.test.fallback,
            variants: variants.collect(),
            age: format_duration(Duration::from_millis(record.inputs.age_ms)),
            machine_share: record.machine_share,
            sample_ratio: record.sample_ratio,
            warnings: warnings.collect(),
            plan: promise,
            decide_at: plan.decide_at(batch, round, now),
            rounds: kept.rounds,
            decision: decided.as_ref().map(|of| of.decision.clone()),
            variant: decided.as_ref().and_then(|of| of.variant.clone()),
            at: decided.as_ref().map(|of| of.at),
            by: decided.map(|of| of.by),
        }
    }
}

async fn plan(api: &Api, batch: BatchId) -> Answer<Plan> {
    let plan = Plan::load(&*api.store, batch).await?;
    plan.ok_or_else(|| Refusal::not_found("test of the batch"))
}

/// A look at a test, not older than it may be.
async fn look(api: &Api, plan: &Plan, batch: &Batch, now: Timestamp) -> Answer<Look> {
    let known = {
        let looks = api.looks.0.lock().unwrap_or_else(PoisonError::into_inner);
        looks.get(&plan.batch).cloned()
    };
    if let Some((_, look)) = known.filter(|(at, _)| now.since(*at) < FRESH) {
        return Ok(look);
    }
    let look = measure::look(&*api.store, plan, batch, now).await?;
    let mut looks = api.looks.0.lock().unwrap_or_else(PoisonError::into_inner);
    if looks.len() >= LOOKS {
        looks.retain(|_, (at, _)| now.since(*at) < FRESH);
    }
    if looks.len() < LOOKS {
        looks.insert(plan.batch, (now, look.clone()));
    }
    Ok(look)
}

async fn view(api: &Api, plan: &Plan, batch: &Batch) -> Answer<Json<TestView>> {
    let now = api.clock.now();
    let (kept, _) = Kept::load(&*api.store, plan.batch, now).await?;
    let look = look(api, plan, batch, now).await?;
    Ok(Json(TestView::of(plan, batch, kept, look, now)))
}

/// `GET /v1/batches/{id}/ab_test`
pub(super) async fn one(
    State(api): State<Arc<Api>>,
    CanRead(caller): CanRead,
    Segment(id): Segment,
    _: NoParams,
) -> Answer<Json<TestView>> {
    let batch = visible(&api, &caller, &id).await?;
    let plan = plan(&api, batch.head.id).await?;
    view(&api, &plan, &batch).await
}

/// `POST /v1/batches/{id}/ab_test/decide`
pub(super) async fn decide(
    State(api): State<Arc<Api>>,
    CanSubmit(caller): CanSubmit,
    Segment(id): Segment,
    _: NoParams,
    body: Result<Bytes, BytesRejection>,
) -> Answer<Json<TestView>> {
    let batch = visible(&api, &caller, &id).await?;
    let plan = plan(&api, batch.head.id).await?;
    let mut mistakes = Mistakes::default();
    let mut fields = super::body::object(body, &mut mistakes)?;
    let variant = fields.required("variant", |value| {
        let name = string(value)?;
        let known = plan.names.contains(&name);
        known
            .then_some(name)
            .ok_or_else(|| format!("is none of {}", plan.names.join(", ")))
    });
    fields.finish();
    let (Some(variant), true) = (variant, mistakes.is_empty()) else {
        return Err(Refusal::of_mistakes(mistakes.into_vec()));
    };
    let impossible = |detail: String| Err(Refusal::new(Code::InvalidState, detail));
    if !plan.decides() {
        return impossible("the variants are a split: nothing is decided".to_owned());
    }
    let now = api.clock.now();
    let (kept, _) = Kept::load(&*api.store, plan.batch, now).await?;
    let known = kept.is_over() && kept.variant() == Some(&variant);
    if !known && (batch.started_at.is_none() || batch.state == BatchState::Cancelled) {
        return impossible(format!("not possible: the batch is {}", batch.state));
    }
    match by_hand(&*api.store, (&plan, &batch), &variant, &caller.name, now).await? {
        ByHand::Done => view(&api, &plan, &batch).await,
        ByHand::Late => impossible("the test was decided before".to_owned()),
    }
}
