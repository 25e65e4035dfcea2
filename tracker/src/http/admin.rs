//! The admin listener: health and metrics, for the operator's network only.

use super::server::{Answers, Client};
use super::{Answer, Public};
use arc_swap::ArcSwap;
use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use journal::Journal;
use service::http::{Check, Health};
use service::metrics::{self, Metrics};
use service::tasks::Shutdown;
use std::sync::Arc;
use store::Store;

/// What the admin listener shows.
pub(crate) struct Admin {
    pub(crate) store: Arc<dyn Store>,
    /// For its keys.
    pub(crate) public: Arc<Public>,
    /// The ids of the keys that any node signs with.
    pub(crate) keys_in_use: Arc<ArcSwap<Vec<u16>>>,
    pub(crate) journal: Journal,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) shutdown: Shutdown,
}

impl Answers for Admin {
    async fn answer(&self, request: Request<Incoming>, _client: Client) -> Answer {
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            let mut answer = text(StatusCode::METHOD_NOT_ALLOWED, "method not allowed\n");
            let headers = answer.headers_mut();
            headers.insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
            return answer;
        }
        match request.uri().path() {
            "/healthz" => health(&Health::of(Vec::new())),
            "/readyz" => health(&self.readiness().await),
            "/metrics" => {
                let page = self.metrics.render();
                with_type(StatusCode::OK, metrics::CONTENT_TYPE, page.into_bytes())
            }
            _ => text(StatusCode::NOT_FOUND, "not found\n"),
        }
    }
}

impl Admin {
    /// Ready is who can answer links, those of other nodes too, and keep hits. A store that has gone away has no say: hits wait
    /// in the journal, and taking the tracker out of service would break every link. Only one that
    /// has never seen its store yet is not ready, though it serves: whoever rolls out a wrong
    /// address sees it before the trackers that work are gone.
    async fn readiness(&self) -> Health {
        let check = |name, ok, detail: &str| Check {
            name,
            ok,
            detail: if ok { String::new() } else { detail.to_owned() },
        };
        let ending = self.shutdown.has_begun();
        let mut store = check("store", true, "");
        if !self.store.is_open() {
            let why = match self.store.check().await {
                Ok(()) => String::new(),
                Err(error) => error.to_string(),
            };
            let waiting = self.journal.pending_records();
            store.ok = false;
            store.detail = format!(
                "has not been reached since the start ({why}); links are answered, {waiting} hits wait in the journal"
            );
        } else if self.metrics.store_up.get() == 0 {
            let waiting = self.journal.pending_records();
            store.detail = format!("does not answer; {waiting} hits wait in the journal");
        }
        let trouble = self
            .public
            .keyed
            .load()
            .ring
            .trouble(&self.keys_in_use.load());
        Health::of(vec![
            check("running", !ending, "the process is ending"),
            check(
                "tracking_keys",
                trouble.is_none(),
                &trouble.unwrap_or_default(),
            ),
            check("journal", self.journal.has_room(), "is full or has failed"),
            store,
        ])
    }
}

fn health(health: &Health) -> Answer {
    let status = StatusCode::from_u16(health.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    with_type(status, "application/json", health.to_bytes())
}

fn text(status: StatusCode, body: &'static str) -> Answer {
    with_type(status, "text/plain; charset=utf-8", body.into())
}

fn with_type(status: StatusCode, media_type: &'static str, body: Vec<u8>) -> Answer {
    let mut answer = Response::new(Full::new(Bytes::from(body)));
    *answer.status_mut() = status;
    let headers = answer.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(media_type));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    answer
}
