//! A service that takes batches and says that they are on their way, then done.

use anyhow::Result;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

/// What the service was asked, and how it answers.
#[derive(Debug, Default)]
pub(crate) struct Service {
    pub(crate) batches: Mutex<Vec<Value>>,
    pub(crate) asked: Mutex<u64>,
    /// Recipients of each batch that are not delivered in the end.
    pub(crate) bounces: u64,
    /// Answered instead of 202.
    pub(crate) refusal: Option<(u16, &'static str)>,
}

impl Service {
    /// Listens on any port. It ends when what is returned is dropped.
    pub(crate) async fn start(self) -> Result<(SocketAddr, Arc<Self>, JoinSet<()>)> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let service = Arc::new(self);
        let answering = service.clone();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let service = answering.clone();
                connections.spawn(async move {
                    let answer = service_fn(|request| service.answer(request));
                    let served =
                        http1::Builder::new().serve_connection(TokioIo::new(stream), answer);
                    drop(served.await);
                });
            }
        });
        Ok((address, service, tasks))
    }

    async fn answer(&self, request: Request<Incoming>) -> Result<Response<Full<Bytes>>> {
        let (parts, body) = request.into_parts();
        let path = parts.uri.path().to_owned();
        let (status, answer) = if parts
            .headers
            .get("authorization")
            .is_none_or(|key| key != "Bearer k-1")
        {
            (401, json!({"code": "unauthorized"}))
        } else if parts.method == Method::POST && path == "/v1/batches" {
            let batch: Value = serde_json::from_slice(&body.collect().await?.to_bytes())?;
            self.submitted(batch)
        } else {
            self.progress(path.rsplit('/').next().unwrap_or_default())
        };
        let response = Response::builder().status(StatusCode::from_u16(status)?);
        Ok(response.body(Full::from(answer.to_string()))?)
    }

    fn submitted(&self, batch: Value) -> (u16, Value) {
        if let Some((status, detail)) = self.refusal {
            return (status, json!({"detail": detail}));
        }
        let accepted = batch["recipients"].as_array().map_or(0, Vec::len);
        let mut batches = self.batches.lock().unwrap_or_else(PoisonError::into_inner);
        let id = batches.len().to_string();
        batches.push(batch);
        (
            202,
            json!({"id": id, "state": "in_progress", "accepted": accepted, "rejected": [], "rejected_count": 0}),
        )
    }

    /// Every second question finds the batch completed.
    fn progress(&self, id: &str) -> (u16, Value) {
        let batches = self.batches.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(batch) = id.parse().ok().and_then(|id: usize| batches.get(id)) else {
            return (404, json!({"code": "not_found"}));
        };
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        *asked += 1;
        let done = asked.is_multiple_of(2);
        let accepted = batch["recipients"].as_array().map_or(0, Vec::len) as u64;
        let bounces = if done { self.bounces } else { 0 };
        let delivered = if done { accepted - bounces } else { 0 };
        let counters = json!({"accepted": accepted, "scheduled": 0, "queued": accepted - delivered - bounces,
            "temporary_error": 0, "delivered": delivered, "bounce": bounces, "failed": 0, "suppressed": 0, "cancelled": 0});
        let state = if done { "completed" } else { "in_progress" };
        (200, json!({"id": id, "state": state, "counters": counters}))
    }
}
