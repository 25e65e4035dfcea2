//! The recipients of a batch: pages in JSON, or the whole list as NDJSON or CSV.
//!
//! Owns the row of the contract. A whole list is streamed page by page: memory does not grow with
//! the batch.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::stream;
use model::{BatchId, Blame, Class, MessageId, Status, Timestamp};
use serde::Serialize;
use store::{RecipientQuery, RecipientRow, Store};

use super::auth::CanRead;
use super::batches::visible;
use super::params::{PAGE_MAX, Params, Segment};
use super::problem::{Answer, Refusal};
use super::{Api, List};

/// A recipient's row (contract, section 3).
#[derive(Debug, Serialize)]
pub(super) struct RowView {
    index: u32,
    message_id: MessageId,
    email: String,
    prospect_id: Option<String>,
    variant: Option<String>,
    status: Status,
    attempts: u8,
    next_attempt_at: Option<Timestamp>,
    smtp_code: Option<u16>,
    enhanced_code: Option<String>,
    class: Option<Class>,
    blame: Option<Blame>,
    reply: Option<String>,
    host: Option<String>,
    accepted_at: Timestamp,
    delivered_at: Option<Timestamp>,
    opened_at: Option<Timestamp>,
    clicked_at: Option<Timestamp>,
    complained_at: Option<Timestamp>,
    unsubscribed_at: Option<Timestamp>,
    replied_at: Option<Timestamp>,
}

impl RowView {
    pub(super) fn of(batch: BatchId, found: RecipientRow) -> Self {
        let row = found.row;
        Self {
            index: row.index,
            message_id: MessageId {
                batch,
                index: row.index,
            },
            email: row.email.to_string(),
            prospect_id: row.prospect_id.map(String::from),
            variant: None,
            status: found.status,
            attempts: found.attempts,
            next_attempt_at: found.next_attempt_at,
            smtp_code: found.smtp_code,
            enhanced_code: found.enhanced_code.map(|code| code.to_string()),
            class: found.class,
            blame: found.blame,
            reply: found.reply,
            host: found.host,
            accepted_at: found.accepted_at,
            delivered_at: found.delivered_at,
            opened_at: found.opened_at,
            clicked_at: found.clicked_at,
            complained_at: found.complained_at,
            unsubscribed_at: found.unsubscribed_at,
            replied_at: found.replied_at,
        }
    }
}

/// How the caller wants them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    Page,
    Ndjson,
    Csv,
}

impl Form {
    /// The first known type in `Accept`, which is how people write it.
    pub(super) fn wanted(headers: &HeaderMap) -> Self {
        let accept = headers
            .get(header::ACCEPT)
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default();
        let known = accept.split(',').find_map(|part| {
            match part.split(';').next().unwrap_or_default().trim() {
                "application/json" | "*/*" | "application/*" => Some(Self::Page),
                "application/x-ndjson" => Some(Self::Ndjson),
                "text/csv" => Some(Self::Csv),
                _ => None,
            }
        });
        known.unwrap_or(Self::Page)
    }
}

/// `GET /v1/batches/{id}/recipients`
pub(super) async fn list(
    State(api): State<Arc<Api>>,
    CanRead(caller): CanRead,
    Segment(id): Segment,
    headers: HeaderMap,
    mut params: Params,
) -> Answer<Response> {
    let batch = visible(&api, &caller, &id).await?.head.id;
    let form = Form::wanted(&headers);
    let limit = params.limit();
    let query = RecipientQuery {
        batch,
        from_index: params.read("cursor", from_index).unwrap_or(0),
        limit: if form == Form::Page { limit } else { PAGE_MAX },
        status: params.parsed("status"),
        opened: params.flag("opened"),
        clicked: params.flag("clicked"),
        domain: params
            .parsed::<model::Domain>("domain")
            .map(|domain| domain.to_string()),
    };
    params.finish()?;
    match form {
        Form::Page => {
            let page = api.store.recipients(query).await?;
            let items: Vec<_> = page
                .items
                .into_iter()
                .map(|row| RowView::of(batch, row))
                .collect();
            Ok(Json(List {
                items,
                next_cursor: page.next,
            })
            .into_response())
        }
        Form::Ndjson => Ok(whole(
            Arc::clone(&api.store),
            query,
            "application/x-ndjson",
            ndjson,
        )),
        Form::Csv => Ok(whole(
            Arc::clone(&api.store),
            query,
            "text/csv; charset=utf-8",
            csv,
        )),
    }
}

/// Reads a cursor: an index, as it is written.
fn from_index(cursor: &str) -> Result<u32, String> {
    let digits = cursor.bytes().all(|byte| byte.is_ascii_digit());
    let index = digits.then(|| cursor.parse().ok()).flatten();
    index.ok_or_else(|| "is no cursor of recipients".to_owned())
}

type Write = fn(&[RowView], first: bool) -> Result<Vec<u8>, Refusal>;

/// All of them, a page of the store at a time. An error on the way cuts the connection, so that
/// nobody takes a part for the whole.
fn whole(
    store: Arc<dyn Store>,
    query: RecipientQuery,
    media: &'static str,
    write: Write,
) -> Response {
    let first = query.from_index;
    let pages = stream::try_unfold(Some(query), move |next| {
        let store = Arc::clone(&store);
        async move {
            let Some(mut query) = next else {
                return Ok(None);
            };
            let begins = query.from_index == first;
            let page = store
                .recipients(query.clone())
                .await
                .map_err(std::io::Error::other)?;
            let rows: Vec<_> = page
                .items
                .into_iter()
                .map(|row| RowView::of(query.batch, row))
                .collect();
            let bytes = write(&rows, begins).map_err(|refusal| std::io::Error::other(refusal.0))?;
            let next = page
                .next
                .and_then(|cursor| cursor.parse().ok())
                .filter(|at| *at > query.from_index);
            let next = next.map(|at| {
                query.from_index = at;
                query
            });
            Ok::<_, std::io::Error>(Some((Bytes::from(bytes), next)))
        }
    });
    let mut response = Body::from_stream(pages).into_response();
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static(media));
    response
}

fn ndjson(rows: &[RowView], _first: bool) -> Result<Vec<u8>, Refusal> {
    let mut out = Vec::new();
    for row in rows {
        serde_json::to_writer(&mut out, row)
            .map_err(|error| Refusal::internal("ndjson", &error))?;
        out.push(b'\n');
    }
    Ok(out)
}

fn csv(rows: &[RowView], first: bool) -> Result<Vec<u8>, Refusal> {
    let mut writer = csv::WriterBuilder::new()
        .has_headers(first)
        .from_writer(Vec::new());
    for row in rows {
        writer
            .serialize(row)
            .map_err(|error| Refusal::internal("csv", &error))?;
    }
    writer
        .into_inner()
        .map_err(|error| Refusal::internal("csv", &error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_form_follows_accept() {
        for (accept, form) in [
            ("", Form::Page),
            ("text/html, */*;q=0.8", Form::Page),
            ("application/x-ndjson", Form::Ndjson),
            ("text/csv; q=0.9, application/json", Form::Csv),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(header::ACCEPT, HeaderValue::from_static(accept));
            assert_eq!(Form::wanted(&headers), form, "{accept}");
        }
    }
}
