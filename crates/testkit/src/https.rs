//! An HTTPS server on loopback that answers by host and path and remembers what it was asked: a
//! policy host, a collector of reports.
//!
//! One request per connection, `Content-Length` bodies only; what it gets is bounded. Must not be
//! taken for a web server.

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustls::ServerConfig;
use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::request::Request;

/// How long a client may take.
const IDLE: Duration = Duration::from_secs(30);

/// What is answered to one host and path; status line, headers and body as they go out.
#[derive(Debug, Clone)]
pub struct Page {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

impl Page {
    /// 200 with `text/plain`.
    pub fn text(body: impl Into<Vec<u8>>) -> Self {
        Self {
            status: 200,
            headers: vec![("Content-Type".to_owned(), "text/plain".to_owned())],
            body: body.into(),
        }
    }

    /// Another status.
    #[must_use]
    pub fn status(mut self, status: u16) -> Self {
        self.status = status;
        self
    }

    /// A header, in place of one of that name.
    #[must_use]
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.retain(|(known, _)| known != name);
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }
}

/// A request as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    /// `GET`, `POST`.
    pub method: String,
    /// Of the `Host` field, without port.
    pub host: String,
    /// With its query.
    pub path: String,
    /// Of the body.
    pub media_type: String,
    /// The body.
    pub body: Vec<u8>,
}

#[derive(Debug, Default)]
struct State {
    pages: HashMap<(String, String), Page>,
    asked: Vec<Asked>,
}

type Shared = Arc<Mutex<State>>;

/// A running server. Dropping it ends its connections.
#[derive(Debug)]
pub struct HttpsServer {
    address: SocketAddr,
    state: Shared,
    stop: CancellationToken,
}

impl HttpsServer {
    /// Listens on 127.0.0.1, any free port; `tls` has the certificates of all its hosts.
    ///
    /// # Errors
    /// When the port cannot be had.
    pub async fn start(tls: Arc<ServerConfig>) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let (state, stop) = (Shared::default(), CancellationToken::new());
        let serving = serve(
            listener,
            TlsAcceptor::from(tls),
            Arc::clone(&state),
            stop.clone(),
        );
        let until = stop.clone();
        TaskTracker::new().spawn(async move { until.run_until_cancelled(serving).await });
        Ok(Self {
            address,
            state,
            stop,
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Answers this to `host` and `path` from now on; everything else is 404.
    pub fn put(&self, host: &str, path: &str, page: Page) {
        let key = (host.to_owned(), path.to_owned());
        lock(&self.state).pages.insert(key, page);
    }

    /// What it was asked so far, in order.
    pub fn asked(&self) -> Vec<Asked> {
        lock(&self.state).asked.clone()
    }
}

impl Drop for HttpsServer {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

async fn serve(listener: TcpListener, tls: TlsAcceptor, state: Shared, stop: CancellationToken) {
    let tasks = TaskTracker::new();
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        };
        let (tls, state, stop) = (tls.clone(), Arc::clone(&state), stop.clone());
        tasks.spawn(async move {
            let answered = tokio::time::timeout(IDLE, answer(stream, tls, state));
            // A client that breaks off, or does not trust us, is part of the tests.
            if let Some(Ok(Err(error))) = stop.run_until_cancelled(answered).await {
                tracing::debug!(%error, "an HTTPS connection ended");
            }
        });
    }
}

async fn answer(stream: TcpStream, tls: TlsAcceptor, state: Shared) -> io::Result<()> {
    let mut stream = tls.accept(stream).await?;
    let asked = Asked::from(Request::read(&mut stream).await?);
    let key = (asked.host.clone(), asked.path.clone());
    let page = {
        let mut state = lock(&state);
        state.asked.push(asked);
        state.pages.get(&key).cloned()
    };
    let page = page.unwrap_or_else(|| Page::text("not here").status(404));
    let mut head = format!("HTTP/1.1 {} -\r\nConnection: close\r\n", page.status);
    for (name, value) in &page.headers {
        head += &format!("{name}: {value}\r\n");
    }
    head += &format!("Content-Length: {}\r\n\r\n", page.body.len());
    stream
        .write_all(&[head.as_bytes(), &page.body].concat())
        .await?;
    stream.shutdown().await
}

impl From<Request> for Asked {
    fn from(request: Request) -> Self {
        let host = request.header("host").split(':').next();
        Self {
            host: host.unwrap_or_default().to_owned(),
            media_type: request.header("content-type").to_owned(),
            method: request.method,
            path: request.path,
            body: request.body,
        }
    }
}

/// A panic in a test must not hide the failure behind a poisoned lock.
fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}
