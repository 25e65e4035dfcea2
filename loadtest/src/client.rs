//! The API as the load source uses it: submit, and ask how far it is.

use crate::batch::Generated;
use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt as _, Empty, Limited, StreamBody};
use hyper::body::Frame;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE};
use hyper::{Method, Request, StatusCode};
use hyper_util::client::legacy::Client as Http;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde::Deserialize;
use std::convert::Infallible;
use std::time::Duration;

/// The largest answer that is read: a thousand rejections.
const MAX_ANSWER: usize = 4 << 20;
/// How long a question may take; submitting has the time of its caller.
const PATIENCE: Duration = Duration::from_secs(60);

/// A client of one service on this machine.
#[derive(Debug, Clone)]
pub struct Client {
    base: String,
    key: String,
    http: Http<HttpConnector, BoxBody<Bytes, Infallible>>,
}

/// The answer to a submission.
#[derive(Debug, Clone, Deserialize)]
pub struct Accepted {
    /// The batch.
    pub id: String,
    /// Recipients that were accepted.
    pub accepted: u64,
    /// Recipients that were not.
    pub rejected_count: u64,
}

/// A batch as far as it matters here.
#[derive(Debug, Clone, Deserialize)]
pub struct Batch {
    /// `in_progress`, `completed` …
    pub state: String,
    /// How many are where.
    pub counters: Counters,
}

/// How many recipients of a batch have which status.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
pub struct Counters {
    /// In all.
    pub accepted: u64,
    /// Waiting.
    pub queued: u64,
    /// Waiting after an attempt.
    pub temporary_error: u64,
    /// Taken by the receiving side.
    pub delivered: u64,
    /// Refused for good.
    pub bounce: u64,
    /// Ended without a refusal.
    pub failed: u64,
}

impl Client {
    /// For the service at `base`, which the caller has checked to be on this machine.
    pub fn new(base: impl Into<String>, key: impl Into<String>) -> Self {
        Self {
            base: base.into(),
            key: key.into(),
            http: Http::builder(TokioExecutor::new()).build_http(),
        }
    }

    /// Whether the service says that it is ready; false when there is none yet.
    pub async fn is_ready(&self) -> bool {
        let asked = self.call(Method::GET, "/readyz", nothing()).await;
        asked.is_ok_and(|(status, _)| status.is_success())
    }

    /// The page of its metrics.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn metrics(&self) -> Result<String> {
        let (status, body) = self.call(Method::GET, "/metrics", nothing()).await?;
        ensure!(status.is_success(), "no metrics: {}", quoted(status, &body));
        Ok(String::from_utf8_lossy(&body).into_owned())
    }

    /// Submits a batch.
    ///
    /// # Errors
    /// When it is not accepted; the message quotes the answer.
    pub async fn submit(&self, body: Generated) -> Result<Accepted> {
        let answer = self.call(Method::POST, "/v1/batches", body.boxed());
        let (status, body) = answer.await.context("cannot submit")?;
        ensure!(
            status == StatusCode::ACCEPTED,
            "refused: {}",
            quoted(status, &body)
        );
        serde_json::from_slice(&body).with_context(|| quoted(status, &body))
    }

    /// Asks for a batch.
    ///
    /// # Errors
    /// When there is no such answer within a minute.
    pub async fn batch(&self, id: &str) -> Result<Batch> {
        let path = format!("/v1/batches/{id}");
        let asked = self.call(Method::GET, &path, nothing());
        let (status, body) = tokio::time::timeout(PATIENCE, asked)
            .await
            .with_context(|| format!("no answer about batch {id} within {PATIENCE:?}"))??;
        if !status.is_success() {
            bail!("cannot ask for batch {id}: {}", quoted(status, &body));
        }
        serde_json::from_slice(&body).with_context(|| quoted(status, &body))
    }

    /// Posts pieces of a body that is there already; the answer, which must be 2xx.
    ///
    /// # Errors
    /// When it is none; the message quotes it.
    pub async fn give(&self, path: &str, media: &str, body: &[Bytes]) -> Result<Bytes> {
        let frame = |piece: &Bytes| Ok::<_, Infallible>(Frame::data(piece.clone()));
        let pieces: Vec<_> = body.iter().map(frame).collect();
        let body = StreamBody::new(futures_util::stream::iter(pieces));
        let (status, answer) = self
            .call_as(Method::POST, path, media, body.boxed())
            .await?;
        ensure!(status.is_success(), "{path}: {}", quoted(status, &answer));
        Ok(answer)
    }

    async fn call(
        &self,
        method: Method,
        path: &str,
        body: BoxBody<Bytes, Infallible>,
    ) -> Result<(StatusCode, Bytes)> {
        self.call_as(method, path, "application/json", body).await
    }

    async fn call_as(
        &self,
        method: Method,
        path: &str,
        media: &str,
        body: BoxBody<Bytes, Infallible>,
    ) -> Result<(StatusCode, Bytes)> {
        let url = format!("{}{path}", self.base);
        let request = Request::builder()
            .method(method)
            .uri(&url)
            .header(AUTHORIZATION, format!("Bearer {}", self.key))
            .header(CONTENT_TYPE, media)
            .body(body)
            .context("the key cannot stand in a header")?;
        let response = self.http.request(request).await;
        let (parts, body) = response
            .with_context(|| format!("no answer from {url}"))?
            .into_parts();
        let body = Limited::new(body, MAX_ANSWER).collect().await;
        let body = body.map_err(anyhow::Error::from_boxed)?.to_bytes();
        Ok((parts.status, body))
    }
}

fn nothing() -> BoxBody<Bytes, Infallible> {
    Empty::new().boxed()
}

fn quoted(status: StatusCode, body: &[u8]) -> String {
    let text: String = String::from_utf8_lossy(body).chars().take(400).collect();
    // A service under test may answer anything, also what would move a terminal's cursor.
    format!("HTTP {status}: {}", text.escape_debug())
}
