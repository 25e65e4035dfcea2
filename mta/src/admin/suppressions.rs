//! The suppression list of an account.

use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode};
use model::{EmailAddress, SuppressionReason, Timestamp};
use serde::{Deserialize, Serialize};
use store::{Suppression, SuppressionQuery};

use super::auth::{CanRead, CanSubmit};
use super::batches::{media_type, submitter, unsupported};
use super::params::{NoParams, PAGE_MAX, Params, Segment};
use super::problem::{Answer, Code, Refusal, of_cursor};
use super::{Api, List};
use crate::intake::fields::Mistakes;
use crate::intake::receive::{Form, Media};
use crate::intake::recipients::{REJECTIONS_MAX, reason};
use crate::intake::spool::SpoolReader;
use crate::intake::submit::blocking;

/// Lines taken at once.
const AT_ONCE: usize = 500;
const LIST_MAX: usize = 128;

/// Addresses are compared without case.
pub(super) fn address(text: &str) -> Answer<String> {
    let address: Result<EmailAddress, _> = text.parse();
    address
        .map(|address| address.normalised().into_owned())
        .map_err(|error| {
            let detail = format!("the address in the path {error}");
            Refusal::at(Code::InvalidField, "/email", detail)
        })
}

/// `GET /v1/suppressions`
pub(super) async fn list(
    State(api): State<Arc<Api>>,
    CanRead(caller): CanRead,
    mut params: Params,
) -> Answer<Json<List<Suppression>>> {
    let query = SuppressionQuery {
        account: caller.account.to_string(),
        email: None,
        after: params.text("cursor"),
        limit: params.limit(),
    };
    params.finish()?;
    let page = api.store.suppressions(query).await;
    let page = page.map_err(of_cursor("/cursor"))?;
    Ok(Json(List {
        items: page.items,
        next_cursor: page.next,
    }))
}

/// `GET /v1/suppressions/{email}`
pub(super) async fn one(
    State(api): State<Arc<Api>>,
    CanRead(caller): CanRead,
    Segment(email): Segment,
    _: NoParams,
) -> Answer<Json<List<Suppression>>> {
    let query = SuppressionQuery {
        account: caller.account.to_string(),
        email: Some(address(&email)?),
        after: None,
        limit: PAGE_MAX,
    };
    let page = api.store.suppressions(query).await?;
    if page.items.is_empty() {
        return Err(Refusal::not_found("suppression"));
    }
    Ok(Json(List {
        items: page.items,
        next_cursor: None,
    }))
}

/// `PUT /v1/suppressions/{email}`
pub(super) async fn put(
    State(api): State<Arc<Api>>,
    CanSubmit(caller): CanSubmit,
    Segment(email): Segment,
    _: NoParams,
    body: Result<Bytes, BytesRejection>,
) -> Answer<Json<Suppression>> {
    let email = address(&email)?;
    let mut mistakes = Mistakes::default();
    let mut fields = super::body::object(body, &mut mistakes)?;
    let reason = fields.parsed("reason").unwrap_or(SuppressionReason::Manual);
    if reason == SuppressionReason::Erased {
        fields.mistake("reason", "comes from erasing the person alone");
    }
    let list = fields.label("list", LIST_MAX);
    fields.finish();
    if !mistakes.is_empty() {
        return Err(Refusal::of_mistakes(mistakes.into_vec()));
    }
    let now = api.clock.now();
    let entry = Suppression {
        email,
        account: caller.account.to_string(),
        list,
        reason,
        source: "api".to_owned(),
        created_at: now,
    };
    api.store.suppress(vec![entry.clone()], now).await?;
    Ok(Json(entry))
}

/// What an import came to.
#[derive(Debug, Default, Serialize)]
pub(super) struct Imported {
    accepted: u64,
    /// The first 1,000.
    rejected: Vec<RejectedLine>,
    rejected_count: u64,
}

#[derive(Debug, Serialize)]
struct RejectedLine {
    /// From 0, the first line of a table not counted.
    index: u64,
    email: Option<String>,
    code: &'static str,
    detail: String,
}

/// A line of an import; a table has its further columns in `vars`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Line {
    email: Option<String>,
    reason: Option<String>,
    list: Option<String>,
    vars: Option<Columns>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Columns {
    reason: Option<String>,
    list: Option<String>,
}

/// `POST /v1/suppressions`: many at once, in lines or a table.
pub(super) async fn import(
    State(api): State<Arc<Api>>,
    caller: Answer<CanSubmit>,
    params: Params,
    request: Request,
) -> Answer<Json<Imported>> {
    let (by, body) = submitter(caller, params, request, form).await?;
    let received = api.intake.receive(body, &by).await?;
    let spool = received.spool.read();
    let mut spool = spool.map_err(|error| Refusal::disk(&error))?;
    let mut imported = Imported::default();
    let mut index = 0;
    loop {
        let (account, now) = (by.account.clone(), api.clock.now());
        let read = move || {
            let some = read_some(&mut spool, &mut index, &account, now);
            some.map(|some| (some, spool, index))
        };
        let (some, rest, next) = blocking(read).await?;
        (spool, index) = (rest, next);
        let Some((entries, rejected)) = some else {
            return Ok(Json(imported));
        };
        imported.accepted += entries.len() as u64;
        imported.rejected_count += rejected.len() as u64;
        let room = REJECTIONS_MAX.saturating_sub(imported.rejected.len());
        imported.rejected.extend(rejected.into_iter().take(room));
        if !entries.is_empty() {
            api.store.suppress(entries, now).await?;
        }
    }
}

fn form(headers: &HeaderMap) -> Answer<Form> {
    let (media, encoding) = media_type(headers)?;
    let media = match media.as_str() {
        "application/x-ndjson" => Media::PartLines,
        "text/csv" => Media::PartCsv,
        other => return Err(unsupported(other, "application/x-ndjson or text/csv")),
    };
    Ok(Form { media, encoding })
}

type Some = (Vec<Suppression>, Vec<RejectedLine>);

/// The next lines; `None`: there are no more. Blocks.
fn read_some(
    spool: &mut SpoolReader,
    index: &mut u64,
    account: &str,
    now: Timestamp,
) -> Answer<Option<Some>> {
    let (mut entries, mut rejected) = (Vec::new(), Vec::new());
    while entries.len() + rejected.len() < AT_ONCE
        && let Some(spooled) = spool.next_row().map_err(|error| Refusal::disk(&error))?
    {
        let line: Result<Line, String> = match spooled.json {
            None => Err("is too large".to_owned()),
            Some(json) => serde_json::from_slice(json).map_err(|error| reason(&error)),
        };
        let email = line.as_ref().ok().and_then(|line| line.email.clone());
        match line
            .map_err(|detail| ("malformed_body", detail))
            .and_then(|line| entry(line, account, now))
        {
            Ok(entry) => entries.push(entry),
            Err((code, detail)) => rejected.push(RejectedLine {
                index: *index,
                email: email.map(|email| email.chars().take(254).collect()),
                code,
                detail,
            }),
        }
        *index += 1;
    }
    Ok((!entries.is_empty() || !rejected.is_empty()).then_some((entries, rejected)))
}

fn entry(line: Line, account: &str, now: Timestamp) -> Result<Suppression, (&'static str, String)> {
    let columns = line.vars.unwrap_or_default();
    let filled = |text: Option<String>| text.filter(|text| !text.is_empty());
    let email: Result<EmailAddress, _> = line.email.unwrap_or_default().parse();
    let email = email.map_err(|error| ("invalid_address", format!("email {error}")))?;
    let reason = match filled(line.reason.or(columns.reason)) {
        None => SuppressionReason::Manual,
        Some(text) => text
            .parse()
            .map_err(|error| ("invalid_field", format!("reason {error}")))?,
    };
    if reason == SuppressionReason::Erased {
        let detail = "reason comes from erasing the person alone".to_owned();
        return Err(("invalid_field", detail));
    }
    let list = filled(line.list.or(columns.list));
    if list
        .as_ref()
        .is_some_and(|list| list.len() > LIST_MAX || list.chars().any(char::is_control))
    {
        let detail = format!("list is not 1 to {LIST_MAX} bytes without control characters");
        return Err(("invalid_field", detail));
    }
    Ok(Suppression {
        email: email.normalised().into_owned(),
        account: account.to_owned(),
        list,
        reason,
        source: "import".to_owned(),
        created_at: now,
    })
}

/// `DELETE /v1/suppressions/{email}`
pub(super) async fn delete(
    State(api): State<Arc<Api>>,
    CanSubmit(caller): CanSubmit,
    Segment(email): Segment,
    mut params: Params,
) -> Answer<StatusCode> {
    let email = address(&email)?;
    let list = params.filled("list");
    params.finish()?;
    api.store
        .unsuppress(&caller.account, &email, list.as_deref(), api.clock.now())
        .await?;
    Ok(StatusCode::NO_CONTENT)
}
