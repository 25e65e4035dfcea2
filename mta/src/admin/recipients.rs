//! The recipients of a batch: pages in JSON, or the whole list as NDJSON or CSV.
//!
//! Owns the row of the contract.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use model::{BatchId, Blame, Class, MessageId, Status, Timestamp};
use serde::Serialize;
use store::{RecipientQuery, RecipientRow, StoreError};

use super::auth::CanRead;
use super::batches::visible;
use super::params::{PAGE_MAX, Params, Segment};
use super::problem::Answer;
use super::rows::{self, Form, Table};
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
            variant: found.variant.map(String::from),
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
        with_variant: false,
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
        Form::Whole(table) => Ok(whole(&api, query, table)),
    }
}

/// Reads a cursor: an index, as it is written.
fn from_index(cursor: &str) -> Result<u32, String> {
    let digits = cursor.bytes().all(|byte| byte.is_ascii_digit());
    let index = digits.then(|| cursor.parse().ok()).flatten();
    index.ok_or_else(|| "is no cursor of recipients".to_owned())
}

fn whole(api: &Api, query: RecipientQuery, table: Table) -> Response {
    let store = Arc::clone(&api.store);
    rows::whole(table, query, move |mut query| {
        let store = Arc::clone(&store);
        async move {
            let page = store.recipients(query.clone()).await?;
            let rows = page.items.into_iter();
            let rows = rows.map(|row| RowView::of(query.batch, row)).collect();
            let next = page.next.and_then(|cursor| cursor.parse().ok());
            let next = next.filter(|at| *at > query.from_index).map(|at| {
                query.from_index = at;
                query
            });
            Ok::<(Vec<RowView>, _), StoreError>((rows, next))
        }
    })
}
