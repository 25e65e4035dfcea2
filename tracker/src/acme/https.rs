//! HTTPS to the authority: a connection for each request, the system's roots and one file more.

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::header::{CONNECTION, HOST, HeaderValue};
use hyper::http::uri::PathAndQuery;
use hyper::{Request, Response, Uri};
use hyper_util::rt::TokioIo;
use instant_acme::{BodyWrapper, BytesResponse, Error, HttpClient};
use rustls::ClientConfig;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls_platform_verifier::Verifier;
use std::error::Error as StdError;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// How long a request may take, connecting included.
const REQUEST_TIME: Duration = Duration::from_secs(30);
/// The largest answer: a chain of certificates has a few KiB.
const MAX_ANSWER: usize = 256 * 1024;

type AnyError = Box<dyn StdError + Send + Sync>;

/// The authority did not answer.
#[derive(Debug, thiserror::Error)]
#[error("{host}: {source}")]
pub(crate) struct AwayError {
    host: String,
    source: AnyError,
}

/// The client.
pub(super) struct Https {
    tls: TlsConnector,
}

impl Https {
    /// Trusts the system's roots and those in `ca_file`. Blocks.
    ///
    /// # Errors
    /// When there are no roots at all, or the file has none.
    pub(super) fn new(ca_file: Option<&Path>) -> Result<Self, rustls::Error> {
        let unreadable = |error: &dyn std::fmt::Display| {
            rustls::Error::General(format!("tracker.acme.ca_file: {error}"))
        };
        let mut extra: Vec<CertificateDer<'static>> = Vec::new();
        if let Some(file) = ca_file {
            let read = CertificateDer::pem_file_iter(file).map_err(|error| unreadable(&error))?;
            for root in read {
                extra.push(root.map_err(|error| unreadable(&error))?);
            }
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let verifier = Verifier::new_with_extra_roots(extra, provider.clone())?;
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_no_client_auth();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self {
            tls: TlsConnector::from(Arc::new(config)),
        })
    }
}

impl HttpClient for Https {
    fn request(
        &self,
        request: Request<BodyWrapper<Bytes>>,
    ) -> Pin<Box<dyn Future<Output = Result<BytesResponse, Error>> + Send>> {
        let tls = self.tls.clone();
        Box::pin(async move {
            let host = request.uri().host().unwrap_or_default().to_owned();
            let asked = tokio::time::timeout(REQUEST_TIME, ask(tls, &host, request)).await;
            let answered = asked.unwrap_or_else(|_| Err("no answer in time".into()));
            match answered {
                Ok(response) => Ok(BytesResponse::from(response)),
                Err(source) => Err(Error::Other(Box::new(AwayError { host, source }))),
            }
        })
    }
}

async fn ask(
    tls: TlsConnector,
    host: &str,
    mut request: Request<BodyWrapper<Bytes>>,
) -> Result<Response<Full<Bytes>>, AnyError> {
    let uri = request.uri().clone();
    if uri.scheme_str() != Some("https") {
        return Err("only https is spoken".into());
    }
    let authority = uri.authority().map(hyper::http::uri::Authority::as_str);
    let named = HeaderValue::from_str(authority.unwrap_or_default())?;
    let path = uri.path_and_query().map_or("/", PathAndQuery::as_str);
    *request.uri_mut() = path.parse::<Uri>()?;
    request.headers_mut().insert(HOST, named);
    let close = HeaderValue::from_static("close");
    request.headers_mut().insert(CONNECTION, close);

    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let stream = TcpStream::connect((bare, uri.port_u16().unwrap_or(443))).await?;
    let name = ServerName::try_from(bare.to_owned())?;
    let stream = tls.connect(name, stream).await?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let answered = async {
        let (parts, body) = sender.send_request(request).await?.into_parts();
        let whole = Limited::new(body, MAX_ANSWER).collect().await?.to_bytes();
        Ok(Response::from_parts(parts, Full::new(whole)))
    };
    let driven = async {
        // How it ended is told to whoever waits for the answer.
        drop(connection.await);
        std::future::pending::<()>().await;
    };
    tokio::select! {
        answer = answered => answer,
        () = driven => Err("the connection ended".into()),
    }
}
