//! Batches: submitting, reading, steering, the report.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::rejection::BytesRejection;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use model::{BatchId, BatchState, Counters, EmailAddress, Priority, SendWindow, Timestamp};
use serde::Serialize;
use service::config::Scope;
use store::{Batch, BatchChange, BatchQuery, ChangeOutcome, DueScope};

use super::auth::{Caller, CanRead, CanSubmit};
use super::params::{NoParams, Params, Segment, batch_id};
use super::problem::{Answer, Code, Refusal};
use super::{Api, List};
use crate::intake::decode::Encoding;
use crate::intake::fields::{Mistakes, expected, string};
use crate::intake::once;
use crate::intake::proof::PROOFS_MAX;
use crate::intake::receive::{Form, Media, drain};
use crate::intake::submit::{Submitted, Submitter};
use crate::jobs::guardrails;

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
    let account = by.account.clone();
    let submitted = api.intake.submit(body, by).await;
    Ok(answered(&api, &account, submitted).await)
}

/// `POST /v1/messages`
pub(super) async fn submit_one(
    State(api): State<Arc<Api>>,
    caller: Answer<CanSubmit>,
    params: Params,
    request: Request,
) -> Answer<Response> {
    let (by, body) = submitter(caller, params, request, form_of_one).await?;
    let account = by.account.clone();
    let submitted = api.intake.submit(body, by).await;
    Ok(answered(&api, &account, submitted).await)
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
    let account = batch.head.account.clone();
    let added = api.intake.add_part(batch, body, by).await;
    Ok(answered(&api, &account, added).await)
}

/// The answer to what was submitted, with how the quota of the account stands after it.
async fn answered(api: &Api, account: &str, submitted: Answer<Submitted>) -> Response {
    let counts = match &submitted {
        Ok(_) => true,
        Err(refusal) => refusal.0.code() == Code::QuotaExceeded,
    };
    let mut response = submitted.map_or_else(IntoResponse::into_response, accepted);
    if counts && let Some(standing) = api.intake.quota_of(account).await {
        standing.write(response.headers_mut(), api.clock.now());
    }
    response
}

/// `POST /v1/batches/{id}/proof`
pub(super) async fn proof(
    State(api): State<Arc<Api>>,
    CanSubmit(caller): CanSubmit,
    Segment(id): Segment,
    _: NoParams,
    body: Result<Bytes, BytesRejection>,
) -> Answer<Response> {
    let batch = visible(&api, &caller, &id).await?;
    let mut mistakes = Mistakes::default();
    let mut fields = super::body::object(body, &mut mistakes)?;
    let to = fields.required("to", addresses);
    let as_recipient = fields.converted("as_recipient", |value| {
        let index = value.as_u64().and_then(|index| u32::try_from(index).ok());
        index.ok_or_else(|| expected(&value, "the index of a recipient"))
    });
    fields.finish();
    let (Some(to), true) = (to, mistakes.is_empty()) else {
        return Err(Refusal::of_mistakes(mistakes.into_vec()));
    };
    let proof = api.intake.proof(batch, to, as_recipient).await?;
    Ok((StatusCode::ACCEPTED, Json(proof)).into_response())
}

fn addresses(value: serde_json::Value) -> Result<Vec<EmailAddress>, String> {
    let serde_json::Value::Array(items) = value else {
        return Err(expected(&value, "an array of addresses"));
    };
    if items.is_empty() || items.len() > PROOFS_MAX {
        return Err(format!(
            "has {} addresses, expected 1 to {PROOFS_MAX}",
            items.len()
        ));
    }
    let address = |item| {
        let text = string(item)?;
        text.parse().map_err(|error| format!("{text:.80?} {error}"))
    };
    items.into_iter().map(address).collect()
}

/// Who submits what, once it is known that they may.
pub(super) async fn submitter(
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
pub(super) fn media_type(headers: &HeaderMap) -> Answer<(String, Encoding)> {
    let encoding = Encoding::of(headers)?;
    let text = headers.get(header::CONTENT_TYPE);
    let text = text.map_or("", |value| value.to_str().unwrap_or("?"));
    let media = text.split(';').next().unwrap_or_default().trim();
    Ok((media.to_ascii_lowercase(), encoding))
}

pub(super) fn unsupported(found: &str, expected: &str) -> Refusal {
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
    window: Option<WindowView>,
    started_at: Option<Timestamp>,
    completed_at: Option<Timestamp>,
    metadata: serde_json::Value,
    /// What a guardrail saw, where one paused the batch.
    pause_reason: Option<serde_json::Value>,
    counters: Counters,
}

/// A send window as it was submitted.
#[derive(Debug, Serialize)]
struct WindowView {
    from: String,
    to: String,
    time_zone: Box<str>,
}

impl From<SendWindow> for WindowView {
    fn from(of: SendWindow) -> Self {
        let clock = |minute: u16| format!("{:02}:{:02}", minute / 60, minute % 60);
        Self {
            from: clock(of.from),
            to: clock(of.to),
            time_zone: of.time_zone.unwrap_or_else(|| "UTC".into()),
        }
    }
}

impl Api {
    /// A batch as the contract shows it, with the reason when a guardrail holds it.
    pub(super) async fn view(&self, batch: Batch) -> Answer<BatchView> {
        let mut view = BatchView::from(batch);
        if view.state == BatchState::Paused {
            let key = view.id.to_string();
            let note = self
                .store
                .note(guardrails::NOTES, &key, self.clock.now())
                .await?;
            view.pause_reason = note.and_then(|note| serde_json::from_slice(&note.value).ok());
        }
        Ok(view)
    }
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
            window: head.window.map(WindowView::from),
            started_at: batch.started_at,
            completed_at: batch.completed_at,
            metadata: head.metadata,
            pause_reason: None,
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
    let batch = visible(&api, &caller, &id).await?;
    Ok(Json(api.view(batch).await?))
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
    body: Result<Bytes, BytesRejection>,
) -> Answer<Response> {
    let dry_run = params.flag("dry_run").unwrap_or(false);
    params.finish()?;
    super::body::nothing(body)?;
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
