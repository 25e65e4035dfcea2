//! What an operator's machines ask: health, readiness, metrics, the specification.

use std::sync::Arc;

use axum::extract::State;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use model::Timestamp;
use service::http::{Check, Health};
use service::metrics;
use store::Totals;

use super::{Api, openapi};

fn answer(health: &Health) -> Response {
    let status = StatusCode::from_u16(health.status()).unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
    typed(status, "application/json", health.to_bytes())
}

fn typed(status: StatusCode, media: &'static str, body: impl IntoResponse) -> Response {
    let mut response = (status, body).into_response();
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static(media));
    response
}

/// `GET /healthz`: the process answers, and that is all.
pub(super) async fn live() -> Response {
    answer(&Health::of(Vec::new()))
}

/// `GET /readyz`: a batch could be accepted and sent now.
pub(super) async fn ready(State(api): State<Arc<Api>>) -> Response {
    let store = api.store.check().await;
    api.metrics.store_up.set(i64::from(store.is_ok()));
    let mut checks = vec![match store {
        Err(error) => check("store", Some(error.to_string())),
        // Ready, and honest about what a 202 means.
        Ok(()) => Check {
            name: "store",
            ok: true,
            detail: api.store.caveat().unwrap_or_default(),
        },
    }];
    checks.extend(
        api.probes
            .iter()
            .map(|probe| check(probe.name, (probe.trouble)())),
    );
    let ending = api
        .shutdown
        .has_begun()
        .then(|| "the process is ending".to_owned());
    checks.push(check("process", ending));
    answer(&Health::of(checks))
}

fn check(name: &'static str, trouble: Option<String>) -> Check {
    Check {
        name,
        ok: trouble.is_none(),
        detail: trouble.unwrap_or_default(),
    }
}

/// `GET /metrics`
pub(super) async fn metrics(State(api): State<Arc<Api>>) -> Response {
    let now = api.clock.now();
    match api.store.totals(now).await {
        Ok(totals) => gauge(&api.metrics, totals, now),
        // The page still has everything that is known here, and says that the store is away.
        Err(error) => {
            api.metrics.store_up.set(0);
            tracing::debug!(%error, "metrics without the store's totals");
        }
    }
    typed(StatusCode::OK, metrics::CONTENT_TYPE, api.metrics.render())
}

fn gauge(metrics: &metrics::Metrics, totals: Totals, now: Timestamp) {
    metrics.store_up.set(1);
    let recipients = |state, count: u64| {
        metrics
            .queue_recipients
            .at(state)
            .set(i64::try_from(count).unwrap_or(i64::MAX));
    };
    recipients(metrics::QueueState::Scheduled, totals.scheduled);
    recipients(metrics::QueueState::Queued, totals.queued);
    recipients(metrics::QueueState::TemporaryError, totals.temporary_error);
    let oldest = totals
        .oldest_due
        .map_or(0.0, |due| now.since(due).as_secs_f64());
    metrics.queue_oldest_seconds.set(oldest);
    let unreadable = i64::try_from(totals.unreadable).unwrap_or(i64::MAX);
    metrics.store_unreadable_ranges.set(unreadable);
}

/// `GET /openapi.json`
pub(super) async fn specification() -> Response {
    typed(StatusCode::OK, "application/json", openapi::DOCUMENT)
}
