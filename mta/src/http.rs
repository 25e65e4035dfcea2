//! One HTTP exchange with somebody else's server: MTA-STS policies are fetched by it, TLS reports
//! handed in and events pushed to webhooks.
//!
//! Certificates are verified, redirects are not followed, answers and times are bounded, and
//! addresses that a stranger's word must not lead to are not connected to: what was resolved is
//! judged and then connected to, without another look-up between.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::client::conn::http1;
use hyper::header::{CONTENT_TYPE, HOST, RETRY_AFTER, USER_AGENT};
use hyper::{HeaderMap, Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use ipnet::IpNet;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use crate::resolve::{Host, Resolver, Route, is_private};

/// Addresses that are tried, each for at most [`CONNECT`].
const ADDRESSES_MAX: usize = 4;
const CONNECT: Duration = Duration::from_secs(10);
/// A whole exchange, from the first lookup on.
pub(crate) const WHOLE: Duration = Duration::from_secs(30);
/// The largest answer.
const ANSWER_MAX: usize = 64 << 10;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// The server was not reached, or there was no end to it.
    #[error("{0}")]
    Unreachable(String),
    /// It has an address that must not be connected to.
    #[error("{0} is not public")]
    Private(String),
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

/// The way to HTTP servers.
pub struct HttpClient {
    resolver: Arc<Resolver>,
    config: Arc<ClientConfig>,
}

impl std::fmt::Debug for HttpClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HttpClient").finish_non_exhaustive()
    }
}

/// A good answer.
pub(crate) struct Answer {
    /// Lower case, without parameters; empty when the server named none.
    pub(crate) media_type: String,
    pub(crate) body: Bytes,
}

/// The first line of an answer, with what it says of another try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Told {
    pub(crate) status: StatusCode,
    /// Of a `Retry-After` in seconds.
    pub(crate) retry_after: Option<Duration>,
}

/// Which addresses may be connected to.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Reach<'a> {
    /// Those that mail may go to; the others of a name are left out.
    AsMail,
    /// Public ones and those of these networks; a name with any other is refused as a whole. Names
    /// that only this machine knows are looked up, too.
    Besides(&'a [IpNet]),
}

/// What is asked of which server.
pub(crate) struct Call<'a> {
    pub(crate) is_tls: bool,
    /// A name, or an address without brackets.
    pub(crate) host: &'a str,
    pub(crate) port: u16,
    pub(crate) method: Method,
    /// With its query, if it has one.
    pub(crate) path: &'a str,
    /// Beside `Host` and `User-Agent`.
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
    pub(crate) reach: Reach<'a>,
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

impl HttpClient {
    /// Over `resolver`, with certificates that `config` verifies.
    pub fn new(resolver: Arc<Resolver>, config: Arc<ClientConfig>) -> Self {
        Self { resolver, config }
    }

    /// The answer, if its status is one of success.
    pub(crate) async fn call(&self, call: Call<'_>) -> Result<Answer, HttpError> {
        let late = |_| HttpError::Unreachable(format!("{} took too long", call.host));
        timeout(WHOLE, self.exchange(&call, read))
            .await
            .map_err(late)?
    }

    /// The status of the answer, of which no more is read.
    pub(crate) async fn tell(&self, call: Call<'_>) -> Result<Told, HttpError> {
        let late = |_| {
            let seconds = WHOLE.as_secs();
            HttpError::Unreachable(format!("{} gave no answer in {seconds} s", call.host))
        };
        timeout(
            WHOLE,
            self.exchange(&call, async |answer| Ok(told(&answer))),
        )
        .await
        .map_err(late)?
    }

    /// The addresses of a host, if they may be connected to.
    pub(crate) async fn addresses(
        &self,
        name: &str,
        port: u16,
        reach: Reach<'_>,
    ) -> Result<Vec<IpAddr>, HttpError> {
        let host = Host {
            preference: 0,
            name: name.into(),
            port,
        };
        let by_caller = matches!(reach, Reach::Besides(_));
        let route = Route::new(vec![host.clone()], by_caller);
        let found = match is_localhost(name) && by_caller {
            // Name servers need not know it (RFC 6761 §6.3).
            true => vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()],
            false => {
                let found = self.resolver.addresses(&host, &route).await;
                let found = found.map_err(|trouble| HttpError::Unreachable(trouble.text))?;
                found.all().to_vec()
            }
        };
        if let Reach::Besides(nets) = reach {
            let may = |address: &IpAddr| {
                let address = address.to_canonical();
                !is_private(address) || nets.iter().any(|net| net.contains(&address))
            };
            // IPv6 may be missing where only IPv4 was allowed for it.
            let found: Vec<IpAddr> = match is_localhost(name) && found.iter().any(may) {
                true => found.into_iter().filter(may).collect(),
                false => found,
            };
            return match found.iter().find(|address| !may(address)) {
                Some(address) if address.to_string() == name => {
                    Err(HttpError::Private(name.to_owned()))
                }
                Some(address) => Err(HttpError::Private(format!("{name} ({address})"))),
                None => Ok(found),
            };
        }
        Ok(found)
    }

    async fn exchange<T>(
        &self,
        call: &Call<'_>,
        read: impl AsyncFnOnce(Response<hyper::body::Incoming>) -> Result<T, HttpError>,
    ) -> Result<T, HttpError> {
        let stream = self.connect(call).await?;
        let broken = |error: hyper::Error| HttpError::Answer(error.to_string());
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(broken)?;
        let mut request = Request::new(Full::new(call.body.clone()));
        *request.method_mut() = call.method.clone();
        let unfit = |error: &dyn std::fmt::Display| HttpError::Answer(error.to_string());
        *request.uri_mut() = call.path.parse().map_err(|error| unfit(&error))?;
        let host = authority(call).parse().map_err(|error| unfit(&error))?;
        let headers = request.headers_mut();
        headers.clone_from(&call.headers);
        headers.insert(HOST, host);
        let agent = concat!("hikyaku/", env!("CARGO_PKG_VERSION"));
        headers.insert(USER_AGENT, hyper::header::HeaderValue::from_static(agent));
        let answered = async { read(sender.send_request(request).await.map_err(broken)?).await };
        // The connection ends when it has handed over its last byte, maybe before that is read.
        let driven = async {
            if let Err(error) = connection.await {
                tracing::trace!(%error, "an HTTP connection broke");
            }
            std::future::pending().await
        };
        tokio::select! {
            answer = answered => answer,
            never = driven => never,
        }
    }

    async fn connect(&self, call: &Call<'_>) -> Result<Box<dyn Stream>, HttpError> {
        let addresses = self.addresses(call.host, call.port, call.reach).await?;
        let stream = dial(call, &addresses).await?;
        if !call.is_tls {
            return Ok(Box::new(stream));
        }
        let name = ServerName::try_from(call.host.to_owned())
            .map_err(|error| HttpError::Tls(error.to_string()))?;
        let connector = TlsConnector::from(Arc::clone(&self.config));
        match connector.connect(name, stream).await {
            Ok(stream) => Ok(Box::new(stream)),
            Err(error) => Err(HttpError::Tls(error.to_string())),
        }
    }
}

/// Tries addresses one after the other.
async fn dial(call: &Call<'_>, addresses: &[IpAddr]) -> Result<TcpStream, HttpError> {
    let mut last = HttpError::Unreachable(format!("{} has no address", call.host));
    for &address in addresses.iter().take(ADDRESSES_MAX) {
        let at = SocketAddr::new(address, call.port);
        match timeout(CONNECT, TcpStream::connect(at)).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => last = HttpError::Unreachable(format!("{at}: {error}")),
            Err(_) => last = HttpError::Unreachable(format!("{at}: no connection in time")),
        }
    }
    Err(last)
}

fn is_localhost(name: &str) -> bool {
    name == "localhost" || name.ends_with(".localhost")
}

/// The `Host` of a call.
fn authority(call: &Call<'_>) -> String {
    let host = match call.host.parse::<Ipv6Addr>() {
        Ok(address) => format!("[{address}]"),
        Err(_) => call.host.to_owned(),
    };
    match (call.is_tls, call.port) {
        (true, 443) | (false, 80) => host,
        (_, port) => format!("{host}:{port}"),
    }
}

fn told<T>(response: &Response<T>) -> Told {
    let seconds = response.headers().get(RETRY_AFTER);
    let seconds = seconds.and_then(|value| value.to_str().ok()?.trim().parse::<u32>().ok());
    Told {
        status: response.status(),
        retry_after: seconds.map(|seconds| Duration::from_secs(u64::from(seconds))),
    }
}

async fn read(response: Response<hyper::body::Incoming>) -> Result<Answer, HttpError> {
    if !response.status().is_success() {
        return Err(HttpError::Status(response.status()));
    }
    let media_type = response.headers().get(CONTENT_TYPE);
    let media_type = media_type.and_then(|value| value.to_str().ok());
    let media_type = media_type.and_then(|value| value.split(';').next());
    let media_type = media_type.unwrap_or_default().trim().to_ascii_lowercase();
    let body = Limited::new(response.into_body(), ANSWER_MAX)
        .collect()
        .await
        .map_err(|error| HttpError::Answer(error.to_string()))?;
    Ok(Answer {
        media_type,
        body: body.to_bytes(),
    })
}
