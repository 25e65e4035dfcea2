//! The suppression list of an account.

use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::http::StatusCode;
use model::{EmailAddress, SuppressionReason};
use store::{Suppression, SuppressionQuery};

use super::auth::{CanRead, CanSubmit};
use super::params::{NoParams, PAGE_MAX, Params, Segment};
use super::problem::{Answer, Code, Refusal, of_cursor};
use super::{Api, List};
use crate::intake::fields::Mistakes;

/// Addresses are compared without case.
pub(super) fn address(text: &str) -> Answer<String> {
    let address: Result<EmailAddress, _> = text.parse();
    address
        .map(|address| address.normalised())
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
    let list = fields.label("list", 128);
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
