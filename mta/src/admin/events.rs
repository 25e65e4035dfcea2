//! Events by cursor: a page, a long poll, or a stream that does not end.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::stream;
use model::units::parse_duration;
use model::{Event, EventKind};
use serde::Serialize;
use store::{EventPage, EventQuery, FeedPlace};

use super::Api;
use super::auth::CanRead;
use super::params::Params;
use super::problem::{Answer, of_cursor};

/// The longest poll.
const WAIT_MAX: Duration = Duration::from_secs(30);

/// How often a stream without events shows that it is alive.
const BEAT: Duration = Duration::from_secs(15);
const STREAM: &str = "text/event-stream";

/// `GET /v1/events`
#[derive(Serialize)]
pub(super) struct Events {
    events: Vec<Event>,
    next: String,
}

pub(super) async fn list(
    State(api): State<Arc<Api>>,
    CanRead(caller): CanRead,
    headers: HeaderMap,
    mut params: Params,
) -> Answer<Response> {
    let streams = accepts_stream(&headers);
    let mut query = EventQuery {
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
    if streams {
        // A browser that comes back says where it was.
        let last = headers.get("last-event-id").and_then(|id| id.to_str().ok());
        query.after = last.map(str::to_owned).or(query.after);
        return stream(api, query).await;
    }
    let page = poll(&api, query, wait.unwrap_or_default().min(WAIT_MAX)).await?;
    let told = Events {
        events: page.events,
        next: page.next,
    };
    Ok(Json(told).into_response())
}

fn accepts_stream(headers: &HeaderMap) -> bool {
    let accept = headers
        .get(header::ACCEPT)
        .and_then(|value| value.to_str().ok());
    accept.is_some_and(|accept| accept.contains(STREAM))
}

/// Server-sent events: each page is one write, and its last event carries the cursor as its id, so
/// that whoever reconnects gets at least everything. Ends with the process.
async fn stream(api: Arc<Api>, query: EventQuery) -> Answer<Response> {
    // The first page is read here, while a bad cursor can still be answered.
    let first = poll(&api, query.clone(), Duration::ZERO).await?;
    let pages = stream::try_unfold((query, Some(first)), move |(mut query, page)| {
        let api = Arc::clone(&api);
        async move {
            let page = match page {
                Some(page) => page,
                None if api.shutdown.has_begun() => return Ok(None),
                None => poll(&api, query.clone(), BEAT)
                    .await
                    .map_err(|refusal| io::Error::other(refusal.0))?,
            };
            query.after = Some(page.next.clone());
            Ok::<_, io::Error>(Some((Bytes::from(server_sent(&page)), (query, None))))
        }
    });
    let mut response = Body::from_stream(pages).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(STREAM));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Ok(response)
}

/// A page as text; without events, a comment that shows that the line is alive.
fn server_sent(page: &EventPage) -> String {
    let Some((last, before)) = page.events.split_last() else {
        return ":\n\n".to_owned();
    };
    let one = |event: &Event| {
        // An event's JSON has no line break, and its types have no failing serializer.
        let json = serde_json::to_string(event).unwrap_or_default();
        format!("event: {}\ndata: {json}\n\n", event.kind)
    };
    let mut text: String = before.iter().map(one).collect();
    text.push_str(&format!("id: {}\n{}", page.next, one(last)));
    text
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
        let page = page.map_err(of_cursor("/after"))?;
        let left = wait.saturating_sub(api.clock.instant().saturating_duration_since(began));
        if !page.events.is_empty() || left.is_zero() || api.shutdown.has_begun() {
            return Ok(page);
        }
        tokio::select! {
            () = api.store.changed(FeedPlace::Events(&page.next), left) => {}
            () = api.shutdown.begun() => {}
        }
        // What was looked through and did not match is not looked through again.
        query.after = Some(page.next);
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
