//! Events by cursor, with a long poll.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use model::units::parse_duration;
use model::{Event, EventKind};
use serde::Serialize;
use store::{EventPage, EventQuery, StoreError};

use super::Api;
use super::auth::CanRead;
use super::params::Params;
use super::problem::{Answer, Code, Refusal};

/// The longest poll.
const WAIT_MAX: Duration = Duration::from_secs(30);

/// `GET /v1/events`
#[derive(Serialize)]
pub(super) struct Events {
    events: Vec<Event>,
    next: String,
}

pub(super) async fn list(
    State(api): State<Arc<Api>>,
    CanRead(caller): CanRead,
    mut params: Params,
) -> Answer<Json<Events>> {
    let query = EventQuery {
        after: params.text("after"),
        account: Some(caller.account.to_string()),
        kinds: params.read("types", kinds).unwrap_or_default(),
        batch: params.parsed("batch"),
        limit: params.limit(),
    };
    let wait = params.read("wait", |text| {
        parse_duration(text).map_err(|error| error.to_string())
    });
    params.finish()?;
    let page = poll(&api, query, wait.unwrap_or_default().min(WAIT_MAX)).await?;
    Ok(Json(Events {
        events: page.events,
        next: page.next,
    }))
}

fn kinds(text: &str) -> Result<Vec<EventKind>, String> {
    let words = text
        .split(',')
        .map(str::trim)
        .filter(|word| !word.is_empty());
    words
        .map(|word| {
            word.parse()
                .map_err(|error: model::UnknownName| error.to_string())
        })
        .collect()
}

/// What there is, or what comes within `wait`; a process that ends does not keep anyone waiting.
async fn poll(api: &Api, mut query: EventQuery, wait: Duration) -> Answer<EventPage> {
    let began = api.clock.instant();
    loop {
        let timer = api.metrics.store_seconds("events").start_timer();
        let page = api.store.events(query.clone()).await;
        timer.observe_duration();
        let page = page.map_err(cursor_or_store)?;
        let left = wait.saturating_sub(api.clock.instant().saturating_duration_since(began));
        if !page.events.is_empty() || left.is_zero() || api.shutdown.has_begun() {
            return Ok(page);
        }
        // What was looked through and did not match is not looked through again.
        query.after = Some(page.next);
        tokio::select! {
            () = api.store.changed(left) => {}
            () = api.shutdown.begun() => {}
        }
    }
}

/// The one thing of a query that only the store can judge is its cursor.
fn cursor_or_store(error: StoreError) -> Refusal {
    match error {
        StoreError::Refused(detail) => Refusal::at(Code::InvalidField, "after", detail),
        StoreError::Unavailable(_) | StoreError::Damaged(_) => error.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_are_words_of_the_contract() {
        assert_eq!(
            kinds("batch.accepted, email.clicked,"),
            Ok(vec![EventKind::BatchAccepted, EventKind::EmailClicked])
        );
        assert!(kinds("email.lost").is_err());
    }
}
