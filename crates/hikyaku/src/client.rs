//! A small client of our own HTTP API.
//!
//! Owns one pooled connection set and the key. Must not know what the calls mean: paths and
//! bodies are the caller's.

use anyhow::{Context, Result, bail};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, USER_AGENT};
use hyper::{Method, Request, StatusCode};
use hyper_util::client::legacy::Client as Http;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde::de::DeserializeOwned;
use std::time::Duration;

/// The largest answer that is read.
const MAX_ANSWER: usize = 64 << 20;
/// How long one call may take; a long poll is shorter.
const TIMEOUT: Duration = Duration::from_secs(120);

/// What a service answered.
#[derive(Debug)]
pub struct Answer {
    /// The status.
    pub status: StatusCode,
    /// The header fields.
    pub headers: HeaderMap,
    /// The whole body, at most 64 MiB.
    pub body: Bytes,
}

impl Answer {
    /// The body as JSON.
    ///
    /// # Errors
    /// When it is not JSON of that shape; the message quotes its beginning.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T> {
        serde_json::from_slice(&self.body).with_context(|| {
            format!(
                "HTTP {}: {}",
                self.status,
                self.text().chars().take(400).collect::<String>()
            )
        })
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// Itself when the status is 2xx.
    ///
    /// # Errors
    /// Otherwise, with the status and the beginning of the body.
    pub fn ok(self) -> Result<Self> {
        if self.status.is_success() {
            return Ok(self);
        }
        bail!(
            "HTTP {}: {}",
            self.status,
            self.text().chars().take(400).collect::<String>()
        )
    }
}

/// A client of one service.
#[derive(Clone, Debug)]
pub struct Client {
    base: String,
    key: Option<String>,
    /// What it calls itself; none: nothing.
    agent: Option<&'static str>,
    http: Http<HttpConnector, Full<Bytes>>,
}

impl Client {
    /// For the service at `base` (`http://host:port`), with an API key when it wants one.
    pub fn new(base: impl Into<String>, key: Option<String>) -> Self {
        let base = base.into().trim_end_matches('/').to_owned();
        Self {
            base,
            key,
            agent: None,
            http: Http::builder(TokioExecutor::new()).build_http(),
        }
    }

    /// The same, calling itself so.
    #[must_use]
    pub fn named(&self, agent: &'static str) -> Self {
        Self {
            agent: Some(agent),
            ..self.clone()
        }
    }

    /// Asks for a path, or for a whole URL.
    ///
    /// # Errors
    /// When there is no answer within two minutes, or one over 64 MiB.
    pub async fn get(&self, path: &str) -> Result<Answer> {
        self.call(Method::GET, path, None, Bytes::new()).await
    }

    /// Posts JSON.
    ///
    /// # Errors
    /// As [`Client::get`].
    pub async fn post(&self, path: &str, json: &serde_json::Value) -> Result<Answer> {
        self.call(
            Method::POST,
            path,
            Some("application/json"),
            json.to_string().into(),
        )
        .await
    }

    /// Asks for a path whose answer comes bit by bit; `take` gets each as it comes, until it says
    /// false. What is no 2xx is given back whole, at its beginning.
    ///
    /// # Errors
    /// When there is no answer, or it breaks off.
    pub async fn follow(
        &self,
        path: &str,
        mut take: impl FnMut(&[u8]) -> Result<bool>,
    ) -> Result<Option<Answer>> {
        let url = format!("{}{path}", self.base);
        let mut request = Request::builder().uri(&url);
        if let Some(key) = &self.key {
            request = request.header(AUTHORIZATION, format!("Bearer {key}"));
        }
        let request = request
            .body(Full::new(Bytes::new()))
            .with_context(|| format!("{url} is not a URL"))?;
        let response = tokio::time::timeout(TIMEOUT, self.http.request(request))
            .await
            .with_context(|| format!("{url}: no answer within {TIMEOUT:?}"))?
            .with_context(|| format!("{url}: no answer"))?;
        let (parts, mut body) = response.into_parts();
        if !parts.status.is_success() {
            let body = Limited::new(body, MAX_ANSWER).collect().await;
            return Ok(Some(Answer {
                status: parts.status,
                headers: parts.headers,
                body: body.map_err(anyhow::Error::from_boxed)?.to_bytes(),
            }));
        }
        while let Some(frame) = body.frame().await {
            let frame = frame.with_context(|| format!("{url}: broke off"))?;
            if let Ok(bytes) = frame.into_data()
                && !take(&bytes)?
            {
                break;
            }
        }
        Ok(None)
    }

    /// Posts what takes effect once, however often it is posted under this key.
    ///
    /// # Errors
    /// As [`Client::get`].
    pub async fn once(
        &self,
        path: &str,
        content_type: &str,
        body: Bytes,
        key: &str,
    ) -> Result<Answer> {
        let request = Request::builder().header("idempotency-key", key);
        self.ask(Method::POST, path, Some(content_type), body, request)
            .await
    }

    /// Any call. `path` may be a whole URL, which is then taken as it is and gets no key.
    ///
    /// # Errors
    /// As [`Client::get`].
    pub async fn call(
        &self,
        method: Method,
        path: &str,
        content_type: Option<&str>,
        body: Bytes,
    ) -> Result<Answer> {
        self.ask(method, path, content_type, body, Request::builder())
            .await
    }

    async fn ask(
        &self,
        method: Method,
        path: &str,
        content_type: Option<&str>,
        body: Bytes,
        request: hyper::http::request::Builder,
    ) -> Result<Answer> {
        let whole = path.starts_with("http://") || path.starts_with("https://");
        let url = if whole {
            path.to_owned()
        } else {
            format!("{}{path}", self.base)
        };
        let mut request = request.method(method).uri(&url);
        if let Some(content_type) = content_type {
            request = request.header(CONTENT_TYPE, content_type);
        }
        if let Some(agent) = self.agent {
            request = request.header(USER_AGENT, agent);
        }
        if let (Some(key), false) = (&self.key, whole) {
            request = request.header(AUTHORIZATION, format!("Bearer {key}"));
        }
        let request = request
            .body(Full::new(body))
            .with_context(|| format!("{url} is not a URL"))?;
        let answer = async {
            let response = self.http.request(request).await?;
            let (parts, body) = response.into_parts();
            let body = Limited::new(body, MAX_ANSWER)
                .collect()
                .await
                .map_err(anyhow::Error::from_boxed)?
                .to_bytes();
            anyhow::Ok(Answer {
                status: parts.status,
                headers: parts.headers,
                body,
            })
        };
        tokio::time::timeout(TIMEOUT, answer)
            .await
            .with_context(|| format!("{url}: no answer within {TIMEOUT:?}"))?
            .with_context(|| format!("{url}: no answer"))
    }
}
