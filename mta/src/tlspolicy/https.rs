//! One HTTPS exchange with a stranger's server: MTA-STS policies are fetched by it and TLS reports
//! handed in.
//!
//! Certificates are verified, redirects are not followed, answers and times are bounded, and
//! addresses that mail must not go to are not connected to either.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::client::conn::http1;
use hyper::header::{CONTENT_TYPE, HOST, USER_AGENT};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::resolve::{Host, Resolver, Route};

/// Addresses that are tried, each for at most [`CONNECT`].
const ADDRESSES_MAX: usize = 4;
const CONNECT: Duration = Duration::from_secs(10);
/// A whole exchange, from the first lookup on.
const WHOLE: Duration = Duration::from_secs(30);
/// The largest answer.
const ANSWER_MAX: usize = 64 << 10;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum HttpsError {
    /// The server was not reached, or there was no end to it.
    #[error("{0}")]
    Unreachable(String),
    /// The certificate is not good, or there is no TLS.
    #[error("TLS: {0}")]
    Tls(String),
    /// Not HTTP, or too much of it.
    #[error("no usable answer: {0}")]
    Answer(String),
    /// HTTP, but not what was asked for; redirects are among these.
    #[error("answered with status {0}")]
    Status(StatusCode),
}

/// The way to HTTPS servers.
pub struct Https {
    resolver: Arc<Resolver>,
    config: Arc<ClientConfig>,
}

/// A good answer.
pub(super) struct Answer {
    /// Lower case, without parameters; empty when the server named none.
    pub(super) media_type: String,
    pub(super) body: Bytes,
}

/// What is asked of which server.
pub(super) struct Call<'a> {
    pub(super) host: &'a str,
    pub(super) port: u16,
    pub(super) method: Method,
    /// With its query, if it has one.
    pub(super) path: &'a str,
    /// Of the body, when there is one.
    pub(super) media_type: Option<&'static str>,
    pub(super) body: Bytes,
}

impl Https {
    /// Over `resolver`, with certificates that `config` verifies.
    pub fn new(resolver: Arc<Resolver>, config: Arc<ClientConfig>) -> Self {
        Self { resolver, config }
    }

    /// The answer, if its status is one of success.
    pub(super) async fn call(&self, call: Call<'_>) -> Result<Answer, HttpsError> {
        let late = |_| HttpsError::Unreachable(format!("{} took too long", call.host));
        timeout(WHOLE, self.exchange(&call)).await.map_err(late)?
    }

    async fn exchange(&self, call: &Call<'_>) -> Result<Answer, HttpsError> {
        let tls = self.connect(call).await?;
        let broken = |error: hyper::Error| HttpsError::Answer(error.to_string());
        let (mut sender, connection) = http1::handshake(TokioIo::new(tls)).await.map_err(broken)?;
        let authority = match call.port {
            443 => call.host.to_owned(),
            port => format!("{}:{port}", call.host),
        };
        let mut request = Request::builder()
            .method(call.method.clone())
            .uri(call.path)
            .header(HOST, authority)
            .header(USER_AGENT, concat!("hikyaku/", env!("CARGO_PKG_VERSION")));
        if let Some(media_type) = call.media_type {
            request = request.header(CONTENT_TYPE, media_type);
        }
        let request = request
            .body(Full::new(call.body.clone()))
            .map_err(|error| HttpsError::Answer(error.to_string()))?;
        let answered = async { read(sender.send_request(request).await.map_err(broken)?).await };
        // The connection ends when it has handed over its last byte, maybe before that is read.
        let driven = async {
            if let Err(error) = connection.await {
                tracing::trace!(%error, "an HTTPS connection broke");
            }
            std::future::pending().await
        };
        tokio::select! {
            answer = answered => answer,
            never = driven => never,
        }
    }

    async fn connect(&self, call: &Call<'_>) -> Result<TlsStream<TcpStream>, HttpsError> {
        let host = Host {
            preference: 0,
            name: call.host.into(),
            port: call.port,
        };
        let route = Route::new(vec![host.clone()], false);
        let addresses = self.resolver.addresses(&host, &route).await;
        let addresses = addresses.map_err(|trouble| HttpsError::Unreachable(trouble.text))?;
        let name = ServerName::try_from(call.host.to_owned())
            .map_err(|error| HttpsError::Tls(error.to_string()))?;
        let mut last = HttpsError::Unreachable(format!("{} has no address", call.host));
        for &address in addresses.all().iter().take(ADDRESSES_MAX) {
            let at = SocketAddr::new(address, call.port);
            let stream = match timeout(CONNECT, TcpStream::connect(at)).await {
                Ok(Ok(stream)) => stream,
                Ok(Err(error)) => {
                    last = HttpsError::Unreachable(format!("{at}: {error}"));
                    continue;
                }
                Err(_) => {
                    last = HttpsError::Unreachable(format!("{at}: no connection in time"));
                    continue;
                }
            };
            let connector = TlsConnector::from(Arc::clone(&self.config));
            let connected = connector.connect(name.clone(), stream).await;
            return connected.map_err(|error| HttpsError::Tls(error.to_string()));
        }
        Err(last)
    }
}

async fn read(response: Response<hyper::body::Incoming>) -> Result<Answer, HttpsError> {
    if !response.status().is_success() {
        return Err(HttpsError::Status(response.status()));
    }
    let media_type = response.headers().get(CONTENT_TYPE);
    let media_type = media_type.and_then(|value| value.to_str().ok());
    let media_type = media_type.and_then(|value| value.split(';').next());
    let media_type = media_type.unwrap_or_default().trim().to_ascii_lowercase();
    let body = Limited::new(response.into_body(), ANSWER_MAX)
        .collect()
        .await
        .map_err(|error| HttpsError::Answer(error.to_string()))?;
    Ok(Answer {
        media_type,
        body: body.to_bytes(),
    })
}
