//! Batches: submitting, reading, steering, the report.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use model::{BatchId, BatchState, Counters, Priority, Timestamp};
use serde::Serialize;
use service::config::Scope;
use store::{Batch, BatchChange, BatchQuery, ChangeOutcome, DueScope};

use super::auth::{Caller, CanRead, CanSubmit};
use super::params::{NoParams, Params, Segment, batch_id};
use super::problem::{Answer, Code, Refusal};
use super::{Api, List};
use crate::intake::decode::Encoding;
use crate::intake::once;
use crate::intake::receive::{Form, Media, drain};
use crate::intake::submit::{Submitted, Submitter};

/// `POST /v1/batches`
pub(super) async fn submit(
    State(api): State<Arc<Api>>,
    caller: Answer<CanSubmit>,
    mut params: Params,
    request: Request,
) -> Answer<Response> {
    let dry_run = params.flag("dry_run").unwrap_or(false);
    let (by, body) = submitter(caller, params, request, form).await?;
    if dry_run {
        let checked = api.intake.dry_run(body, by).await?;
        return Ok(Json(checked).into_response());
    }
    Ok(accepted(api.intake.submit(body, by).await?))
}

/// `POST /v1/messages`
pub(super) async fn submit_one(
    State(api): State<Arc<Api>>,
    caller: Answer<CanSubmit>,
    params: Params,
    request: Request,
) -> Answer<Response> {
    let (by, body) = submitter(caller, params, request, form_of_one).await?;
    Ok(accepted(api.intake.submit(body, by).await?))
}

/// `POST /v1/batches/{id}/recipients`: a part of a held batch.
pub(super) async fn add_part(
    State(api): State<Arc<Api>>,
    caller: Answer<CanSubmit>,
    Segment(id): Segment,
    params: Params,
    request: Request,
) -> Answer<Response> {
    let allowed = match caller {
        Ok(CanSubmit(caller)) => match visible(&api, &caller, &id).await {
            Ok(batch) if batch.state == BatchState::Open => Ok((CanSubmit(caller), batch)),
            Ok(batch) => {
                let detail = format!("the batch takes no parts: it is {}", batch.state);
                Err(Refusal::new(Code::InvalidState, detail))
            }
            Err(refusal) => Err(refusal),
        },
        Err(refusal) => Err(refusal),
    };
    let (caller, batch) = match allowed {
        Ok((caller, batch)) => (Ok(caller), Some(batch)),
        Err(refusal) => (Err(refusal), None),
    };
    let (by, body) = submitter(caller, params, request, form_of_part).await?;
    let batch = batch.ok_or_else(|| Refusal::not_found("batch"))?;
    Ok(accepted(api.intake.add_part(batch, body, by).await?))
}

/// Who submits what, once it is known that they may.
async fn submitter(
    caller: Answer<CanSubmit>,
    params: Params,
    request: Request,
    form: impl FnOnce(&HeaderMap) -> Answer<Form>,
) -> Answer<(Submitter, Body)> {
    let headers = request.headers();
    let waits = headers.contains_key(header::EXPECT);
    let allowed = caller.and_then(|CanSubmit(caller)| {
        params.finish()?;
        Ok(Submitter {
            account: caller.account.to_string(),
            any_account: caller.may(Scope::Admin),
            waits,
            form: form(headers)?,
            key: once::key(headers)?,
        })
    });
    let body = request.into_body();
    match allowed {
        Ok(by) => Ok((by, body)),
        Err(refusal) => {
            // Whoever is still writing would see a broken connection in place of the answer.
            if !waits {
                drain(body).await;
            }
            Err(refusal)
        }
    }
}

/// `202`, and whether it is told again.
fn accepted(submitted: Submitted) -> Response {
    let answer = Bytes::from_owner(submitted.answer);
    let mut response = (StatusCode::ACCEPTED, answer).into_response();
    let headers = response.headers_mut();
    let json = HeaderValue::from_static("application/json");
    headers.insert(header::CONTENT_TYPE, json);
    if submitted.is_replayed {
        headers.insert(once::REPLAYED, HeaderValue::from_static("true"));
    }
    response
}

/// The type of the body, without its parameters, and how it was compressed.
fn media_type(headers: &HeaderMap) -> Answer<(String, Encoding)> {
    let encoding = Encoding::of(headers)?;
    let text = headers.get(header::CONTENT_TYPE);
    let text = text.map_or("", |value| value.to_str().unwrap_or("?"));
    let media = text.split(';').next().unwrap_or_default().trim();
    Ok((media.to_ascii_lowercase(), encoding))
}

fn unsupported(found: &str, expected: &str) -> Refusal {
    let detail = format!("the body is {found:.80?}, expected {expected}");
    Refusal::new(Code::UnsupportedMedia, detail)
}

/// How the body is written, if that is one that is taken.
fn form(headers: &HeaderMap) -> Answer<Form> {
    let (media, encoding) = media_type(headers)?;
    let media = match media.as_str() {
        "application/json" => Media::Json,
        "application/x-ndjson" => Media::Lines,
        other => {
            return Err(unsupported(
                other,
                "application/json or application/x-ndjson",
            ));
        }
    };
    Ok(Form { media, encoding })
}

/// The same for a part of a batch.
fn form_of_part(headers: &HeaderMap) -> Answer<Form> {
    let (media, encoding) = media_type(headers)?;
    let media = match media.as_str() {
        "application/json" => Media::Part,
        "application/x-ndjson" => Media::PartLines,
        "text/csv" => Media::PartCsv,
        other => {
            let expected = "application/json, application/x-ndjson or text/csv";
            return Err(unsupported(other, expected));
        }
    };
    Ok(Form { media, encoding })
}

/// The same for one message.
fn form_of_one(headers: &HeaderMap) -> Answer<Form> {
    let form = form(headers)?;
    if form.media == Media::Lines {
        return Err(unsupported("application/x-ndjson", "application/json"));
    }
    Ok(Form {
        media: Media::Message,
        ..form
    })
}

/// A batch as the contract shows it.
#[derive(Debug, Serialize)]
pub(super) struct BatchView {
    id: BatchId,
    state: BatchState,
    account: String,
    campaign: Option<String>,
    list: String,
    priority: Priority,
    archived: bool,
    created_at: Timestamp,
    send_at: Option<Timestamp>,
    expires_at: Option<Timestamp>,
    started_at: Option<Timestamp>,
    completed_at: Option<Timestamp>,
    metadata: serde_json::Value,
    counters: Counters,
}

impl From<Batch> for BatchView {
    fn from(batch: Batch) -> Self {
        let head = batch.head;
        Self {
            id: head.id,
            state: batch.state,
            account: head.account,
            campaign: head.campaign,
            list: head.list,
            priority: head.priority,
            archived: batch.archived,
            created_at: head.created_at,
            send_at: (head.release_at > head.created_at).then_some(head.release_at),
            expires_at: head.expires_at,
            started_at: batch.started_at,
            completed_at: batch.completed_at,
            metadata: head.metadata,
            counters: batch.counters,
        }
    }
}

/// `GET /v1/batches`
pub(super) async fn list(
    State(api): State<Arc<Api>>,
    CanRead(caller): CanRead,
    mut params: Params,
) -> Answer<Json<List<BatchView>>> {
    let query = BatchQuery {
        account: Some(caller.account.to_string()),
        state: params.parsed("state"),
        campaign: params.text("campaign"),
        after: params.parsed("cursor"),
        limit: params.limit(),
    };
    params.finish()?;
    let page = api.store.batches(query).await?;
    Ok(Json(List {
        items: page.items.into_iter().map(Into::into).collect(),
        next_cursor: page.next,
    }))
}

/// The batch of a path, when the caller may see it.
pub(super) async fn visible(api: &Api, caller: &Caller, id: &str) -> Answer<Batch> {
    let found = api.store.batch(batch_id(id)?).await?;
    found
        .filter(|batch| caller.sees(&batch.head.account))
        .ok_or_else(|| Refusal::not_found("batch"))
}

/// `GET /v1/batches/{id}`
pub(super) async fn one(
    State(api): State<Arc<Api>>,
    CanRead(caller): CanRead,
    Segment(id): Segment,
    _: NoParams,
) -> Answer<Json<BatchView>> {
    Ok(Json(visible(&api, &caller, &id).await?.into()))
}

#[derive(Serialize)]
struct Changed {
    #[serde(flatten)]
    batch: BatchView,
    #[serde(flatten)]
    ended: Option<Ended>,
}

/// What a cancel adds.
#[derive(Serialize)]
struct Ended {
    cancelled: u64,
    in_flight: u64,
}

/// `POST /v1/batches/{id}/pause` and the other changes.
pub(super) async fn change(
    api: Arc<Api>,
    caller: Caller,
    id: String,
    change: BatchChange,
) -> Answer<Response> {
    let batch = visible(&api, &caller, &id).await?.head.id;
    let outcome = api
        .store
        .change_batch(batch, change, api.clock.now())
        .await?;
    match outcome {
        ChangeOutcome::Done {
            batch,
            cancelled,
            in_flight,
        } => {
            let ended = (change == BatchChange::Cancel).then_some(Ended {
                cancelled,
                in_flight,
            });
            Ok(Json(Changed {
                batch: (*batch).into(),
                ended,
            })
            .into_response())
        }
        ChangeOutcome::Impossible(state) => {
            let detail = format!("not possible: the batch is {state}");
            Err(Refusal::new(Code::InvalidState, detail))
        }
        ChangeOutcome::Unknown => Err(Refusal::not_found("batch")),
    }
}

/// A batch after its deferred mail was made due.
#[derive(Serialize)]
struct MadeDue {
    #[serde(flatten)]
    batch: BatchView,
    dry_run: bool,
    /// Whose next attempt is due now.
    retried: u64,
}

/// `POST /v1/batches/{id}/retry`: what is put off is due now.
pub(super) async fn retry(
    State(api): State<Arc<Api>>,
    CanSubmit(caller): CanSubmit,
    Segment(id): Segment,
    mut params: Params,
) -> Answer<Response> {
    let dry_run = params.flag("dry_run").unwrap_or(false);
    params.finish()?;
    let batch = visible(&api, &caller, &id).await?;
    if let state @ (BatchState::Completed | BatchState::Cancelled) = batch.state {
        let detail = format!("not possible: the batch is {state}");
        return Err(Refusal::new(Code::InvalidState, detail));
    }
    let (scope, now) = (DueScope::Batch(batch.head.id), api.clock.now());
    let retried = api.store.make_due(scope, now, dry_run).await?;
    Ok(Json(MadeDue {
        batch: visible(&api, &caller, &id).await?.into(),
        dry_run,
        retried,
    })
    .into_response())
}

/// The first form of the report: counters, and the rates that follow from them.
#[derive(Serialize)]
struct Report {
    #[serde(flatten)]
    batch: BatchView,
    rates: Rates,
}

/// Shares between 0 and 1; none where there is nothing to divide by.
#[derive(Debug, PartialEq, Serialize)]
struct Rates {
    /// Of the accepted.
    delivered: Option<f64>,
    bounce: Option<f64>,
    failed: Option<f64>,
    suppressed: Option<f64>,
    /// Of the delivered.
    opened: Option<f64>,
    opened_human: Option<f64>,
    clicked: Option<f64>,
    clicked_human: Option<f64>,
    unsubscribed: Option<f64>,
    complained: Option<f64>,
    replied: Option<f64>,
    /// Clicked of the opened.
    click_to_open: Option<f64>,
    click_to_open_human: Option<f64>,
}

impl From<Counters> for Rates {
    fn from(c: Counters) -> Self {
        let of_accepted = |count| share(count, c.accepted);
        let of_delivered = |count| share(count, c.delivered);
        Self {
            delivered: of_accepted(c.delivered),
            bounce: of_accepted(c.bounce),
            failed: of_accepted(c.failed),
            suppressed: of_accepted(c.suppressed),
            opened: of_delivered(c.opened_unique),
            opened_human: of_delivered(c.opened_unique_human),
            clicked: of_delivered(c.clicked_unique),
            clicked_human: of_delivered(c.clicked_unique_human),
            unsubscribed: of_delivered(c.unsubscribed),
            complained: of_delivered(c.complained),
            replied: of_delivered(c.replied),
            click_to_open: share(c.clicked_unique, c.opened_unique),
            click_to_open_human: share(c.clicked_unique_human, c.opened_unique_human),
        }
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "beyond 2^53 recipients a rate has other problems"
)]
fn share(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}

/// `GET /v1/batches/{id}/report`
pub(super) async fn report(
    State(api): State<Arc<Api>>,
    CanRead(caller): CanRead,
    Segment(id): Segment,
    _: NoParams,
) -> Answer<Response> {
    let batch = visible(&api, &caller, &id).await?;
    let rates = batch.counters.into();
    Ok(Json(Report {
        batch: batch.into(),
        rates,
    })
    .into_response())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_follow_from_counters() {
        let counters = Counters {
            accepted: 8,
            delivered: 4,
            bounce: 2,
            opened_unique: 2,
            clicked_unique: 1,
            ..Counters::default()
        };
        let rates = Rates::from(counters);
        assert_eq!(
            (rates.delivered, rates.bounce, rates.failed),
            (Some(0.5), Some(0.25), Some(0.0))
        );
        assert_eq!(
            (rates.opened, rates.clicked, rates.click_to_open),
            (Some(0.5), Some(0.25), Some(0.5))
        );
        assert_eq!(
            (
                rates.click_to_open_human,
                Rates::from(Counters::default()).delivered
            ),
            (None, None)
        );
    }
}
