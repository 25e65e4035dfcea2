//! Listening: connections, their bounds, their end.
//!
//! Slow and huge requests are shed here: a request head has its time and size, a connection its
//! lifetime, and there are so many connections and no more; who comes beyond waits in the kernel's
//! queue. HTTP/1.1 and HTTP/2, in plain (RFC 9113 section 3.3) or over TLS. Must not know what is
//! answered.

use super::Answer;
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use http_body_util::Full;
use hyper::body::{Body as _, Incoming};
use hyper::header::{CONTENT_LENGTH, HeaderValue};
use hyper::rt::Executor;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper::{Method, Request};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulConnection;
use rustls::ServerConfig;
use service::tasks::{Hold, Shutdown, Stage, Tasks};
use service::workers::Workers;
use std::convert::Infallible;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

/// From the connection, or the last answer, to the end of the next request's head; looked after by
/// [`Activity`], so that a request starts no timer.
const HEAD_TIME: Duration = Duration::from_secs(15);
/// A connection is looked at so often while `HEAD_TIME` passes: it gets that much and up to a look more.
const LOOKS: u32 = 3;
/// A request head: room for the longest token, and for the cookies of a whole site where the
/// tracker shares its domain. Of at most 100 headers: hyper has room for as many without asking for
/// memory, and for more it would fill it anew for each request.
const HEAD_BYTES: u32 = 64 * 1024;
/// After this a connection answers what it has begun and closes, so that none is kept for ever.
const LIFETIME: Duration = Duration::from_mins(5);
/// For answering what was begun, at the end of a connection's or the process's life.
const LAST_WORDS: Duration = Duration::from_secs(20);

/// For the whole of a TLS handshake.
const HANDSHAKE_TIME: Duration = Duration::from_secs(10);
/// Requests of one HTTP/2 connection at a time: a page of mail has a few images.
const MAX_STREAMS: u32 = 64;
/// Streams that the client takes back before they were begun, at a time, until the connection is
/// ended: answering what nobody waits for is how such a client spends our time.
const MAX_RESETS: usize = 32;
/// What a client may send before we take it: the longest body, and a few of them together.
const STREAM_WINDOW: u32 = 32 * 1024;
const CONNECTION_WINDOW: u32 = 128 * 1024;
/// How HTTP/2 begins (RFC 9113 section 3.4); no method of HTTP/1 does.
const HTTP2: &[u8] = b"PRI";

/// Who asks, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Client {
    pub(crate) address: IpAddr,
    /// Over our own TLS.
    pub(crate) tls: bool,
}

/// What answers requests.
pub(crate) trait Answers: Send + Sync + 'static {
    /// Answers one.
    fn answer(
        &self,
        request: Request<Incoming>,
        client: Client,
    ) -> impl Future<Output = Answer> + Send;
}

/// How a listener is run.
#[derive(Debug, Clone)]
pub(crate) struct Listening {
    /// How TLS is spoken; `None`: it is not.
    pub(crate) tls: Option<Arc<ServerConfig>>,
    /// The name of its task.
    pub(crate) name: &'static str,
    /// Connections at a time.
    pub(crate) max_connections: usize,
    pub(crate) tasks: Tasks,
    /// Who serves its connections; `None`: whatever thread is free.
    pub(crate) workers: Option<Workers>,
    pub(crate) shutdown: Shutdown,
    /// The stage in which it stops accepting.
    pub(crate) until: Stage,
    /// The stage in which its connections come to their end.
    pub(crate) connections_until: Stage,
}

impl Listening {
    /// Accepts connections until the process ends.
    pub(crate) fn start<A: Answers>(self, listener: TcpListener, answers: Arc<A>) {
        let hold = self.shutdown.hold(self.until);
        let tasks = self.tasks.clone();
        drop(tasks.spawn(self.name, self.accept(listener, answers, hold)));
    }

    async fn accept<A: Answers>(self, listener: TcpListener, answers: Arc<A>, _hold: Hold) {
        let permits = Arc::new(Semaphore::new(self.max_connections));
        loop {
            let next = async {
                let permit = permits.clone().acquire_owned().await;
                (permit, listener.accept().await)
            };
            let (permit, accepted) = tokio::select! {
                () = self.shutdown.reached(self.until) => return,
                next = next => next,
            };
            let Ok((stream, peer)) = accepted else {
                // Out of descriptors, most likely: closing connections gives some back.
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            };
            // Answers are one write each: waiting for more would only delay them.
            drop(stream.set_nodelay(true));
            let hold = self.shutdown.hold(self.connections_until);
            let serving = Serving {
                answers: answers.clone(),
                ended: self.shutdown.clone(),
                until: self.until,
                tasks: self.tasks.clone(),
            };
            let tls = self.tls.clone().map(TlsAcceptor::from);
            // Whoever serves it waits for it in a runtime of its own.
            let stream = stream.into_std();
            let connection = async move {
                match stream.and_then(TcpStream::from_std) {
                    Ok(stream) => serving.connection(stream, peer.ip(), tls).await,
                    Err(error) => tracing::debug!(%error, "connection could not be served"),
                }
                drop((permit, hold));
            };
            let name = "connection";
            match &self.workers {
                None => drop(self.tasks.spawn_small(name, connection)),
                Some(workers) => workers.spawn(&self.tasks, name, connection),
            }
        }
    }
}

/// A connection that can be read from.
enum Either {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// What one connection needs.
struct Serving<A> {
    answers: Arc<A>,
    ended: Shutdown,
    until: Stage,
    tasks: Tasks,
}

impl<A: Answers> Serving<A> {
    /// Serves one connection until the client ends it, or the process or its lifetime does.
    async fn connection(self, stream: TcpStream, address: IpAddr, tls: Option<TlsAcceptor>) {
        let client = |tls| Client { address, tls };
        let (plain, over_tls) = (client(false), client(true));
        // Whatever comes before the first request comes to nothing when the process ends.
        let ended = self.ended.clone();
        let before = async {
            match tls {
                None => tokio::time::timeout(HEAD_TIME, begins_as_http2(&stream))
                    .await
                    .map(|begun| begun.map(|is_http2| (is_http2, Either::Plain(stream)))),
                Some(tls) => tokio::time::timeout(HANDSHAKE_TIME, tls.accept(stream))
                    .await
                    .map(|shaken| {
                        shaken.map(|stream| {
                            let is_http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
                            (is_http2, Either::Tls(Box::new(stream)))
                        })
                    }),
            }
        };
        let (is_http2, stream) = tokio::select! {
            () = ended.reached(self.until) => return,
            before = before => match before {
                Ok(Ok(begun)) => begun,
                Ok(Err(error)) => return tracing::debug!(%error, "connection ended before a request"),
                Err(_) => return tracing::debug!("connection took too long to begin"),
            },
        };
        match (is_http2, stream) {
            (false, Either::Plain(stream)) => self.http1(stream, plain).await,
            (true, Either::Plain(stream)) => self.http2(stream, plain).await,
            (false, Either::Tls(stream)) => self.http1(stream, over_tls).await,
            (true, Either::Tls(stream)) => self.http2(stream, over_tls).await,
        }
    }

    async fn http1<S>(self, stream: S, client: Client)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let asked = Asked::of(&self.answers);
        let all = asked.clone();
        let service = service_fn(move |request| {
            let begun = Begun::of(&asked);
            async move {
                let answer = begun.0.answers.answer(request, client).await;
                drop(begun);
                Ok::<_, Infallible>(answer)
            }
        });
        let connection = http1::Builder::new()
            .header_read_timeout(None)
            .max_buf_size(HEAD_BYTES as usize)
            // Answers are a head and little more: one buffer.
            .writev(false)
            .serve_connection(TokioIo::new(stream), service);
        self.serve(connection, all, Silence::Drop).await;
    }

    async fn http2<S>(self, stream: S, client: Client)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let asked = Asked::of(&self.answers);
        let all = asked.clone();
        let service = service_fn(move |request| {
            let begun = Begun::of(&asked);
            async move {
                let is_head = request.method() == Method::HEAD;
                let answer = begun.0.answers.answer(request, client).await;
                drop(begun);
                Ok::<_, Infallible>(if is_head { headers_of(answer) } else { answer })
            }
        });
        let connection = http2::Builder::new(Streams(self.tasks.clone()))
            .timer(TokioTimer::new())
            .max_concurrent_streams(MAX_STREAMS)
            .max_pending_accept_reset_streams(MAX_RESETS)
            .max_local_error_reset_streams(MAX_RESETS)
            .max_header_list_size(HEAD_BYTES)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_send_buf_size(STREAM_WINDOW as usize)
            .keep_alive_interval(HEAD_TIME)
            .keep_alive_timeout(HEAD_TIME)
            .serve_connection(TokioIo::new(stream), service);
        self.serve(connection, all, Silence::Close).await;
    }

    /// Runs a connection to its end; one that is too old, or of a process that ends, answers what it
    /// has begun and closes (HTTP/2: with GOAWAY). On one on which nothing is asked, `silence` says
    /// what follows.
    async fn serve<C>(self, connection: C, asked: Arc<Asked<A>>, silence: Silence)
    where
        C: GracefulConnection,
        C::Error: std::fmt::Display,
    {
        tokio::pin!(connection);
        let ending = async {
            tokio::select! {
                () = self.ended.reached(self.until) => Silence::Close,
                () = tokio::time::sleep(LIFETIME) => Silence::Close,
                () = asked.activity.ceased() => silence,
            }
        };
        // Looked at only when it is woken itself, not with every request.
        let mut ending: FuturesUnordered<_> = [ending].into_iter().collect();
        tokio::select! {
            biased;
            served = connection.as_mut() => return log(served),
            ended = ending.next() => if ended == Some(Silence::Drop) {
                return tracing::debug!("no request for too long");
            }
        }
        connection.as_mut().graceful_shutdown();
        if let Ok(served) = tokio::time::timeout(LAST_WORDS, connection).await {
            log(served);
        }
    }
}

/// An answer to HEAD: the same headers without the body. For HTTP/1 hyper leaves it out itself; here
/// it would send it, which is an error of the protocol (RFC 9110 section 9.3.2).
fn headers_of(answer: Answer) -> Answer {
    let (mut parts, body) = answer.into_parts();
    if let Some(length) = body.size_hint().exact() {
        let length = HeaderValue::from(length);
        parts.headers.entry(CONTENT_LENGTH).or_insert(length);
    }
    Answer::from_parts(parts, Full::default())
}

/// Whether the client's first bytes are those of HTTP/2. They stay to be read.
async fn begins_as_http2(stream: &TcpStream) -> std::io::Result<bool> {
    let mut first = [0; HTTP2.len()];
    let mut pause = Duration::from_millis(5);
    loop {
        let count = stream.peek(&mut first).await?;
        let seen = first.get(..count).unwrap_or_default();
        if count == HTTP2.len() || count == 0 || !HTTP2.starts_with(seen) {
            return Ok(seen == HTTP2);
        }
        // A letter or two: the socket says that it can be read, and does not say when there is more.
        tokio::time::sleep(pause).await;
        pause *= 2;
    }
}

/// What becomes of a connection on which nothing is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Silence {
    /// The client is told that it ends.
    Close,
    /// It ends: HTTP/1 has no word for it, and half a head would be waited for.
    Drop,
}

/// Requests of a connection.
#[derive(Debug, Default)]
struct Activity {
    begun: AtomicU64,
    ended: AtomicU64,
}

/// A connection as its requests have it: one for each, so that threads that answer do not take the
/// line of memory from each other that counts who holds what all of them have.
struct Asked<A> {
    answers: Arc<A>,
    activity: Activity,
}

impl<A> Asked<A> {
    fn of(answers: &Arc<A>) -> Arc<Self> {
        Arc::new(Self {
            answers: answers.clone(),
            activity: Activity::default(),
        })
    }
}

/// A request that is being answered.
struct Begun<A>(Arc<Asked<A>>);

impl<A> Begun<A> {
    fn of(asked: &Arc<Asked<A>>) -> Self {
        asked.activity.begun.fetch_add(1, Ordering::Relaxed);
        Self(asked.clone())
    }
}

impl<A> Drop for Begun<A> {
    fn drop(&mut self) {
        self.0.activity.ended.fetch_add(1, Ordering::Relaxed);
    }
}

impl Activity {
    /// Resolves when nothing was asked for as long as a request's head may take.
    async fn ceased(&self) {
        let mut before = (0, 0);
        let mut still = 0;
        while still < LOOKS {
            tokio::time::sleep(HEAD_TIME / LOOKS).await;
            let now = (
                self.begun.load(Ordering::Relaxed),
                self.ended.load(Ordering::Relaxed),
            );
            let is_idle = before == now && now.0 == now.1;
            still = if is_idle { still + 1 } else { 0 };
            before = now;
        }
    }
}

/// Starts the streams of an HTTP/2 connection as tasks of this process.
#[derive(Clone)]
struct Streams(Tasks);

impl<F> Executor<F> for Streams
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    fn execute(&self, stream: F) {
        drop(self.0.spawn_small("stream", stream));
    }
}

/// What strangers do wrong is no news, but helps who debugs.
fn log<E: std::fmt::Display>(served: Result<(), E>) {
    if let Err(error) = served {
        tracing::debug!(%error, "connection ended");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::Instant;

    #[tokio::test(start_paused = true)]
    async fn a_connection_ends_when_nothing_was_asked_for_as_long_as_a_head_may_take() {
        let asked = Asked::of(&Arc::new(()));
        let start = Instant::now();
        asked.activity.ceased().await;
        assert_eq!(start.elapsed().as_secs(), HEAD_TIME.as_secs());

        let begun = Begun::of(&asked);
        let ceased = async {
            asked.activity.ceased().await;
            start.elapsed()
        };
        let answering = async {
            tokio::time::sleep(HEAD_TIME * 3).await;
            drop(begun);
            start.elapsed()
        };
        let (ceased, answered) = tokio::join!(ceased, answering);
        let waited = ceased.saturating_sub(answered);
        assert!(
            waited >= HEAD_TIME && waited <= HEAD_TIME + HEAD_TIME / LOOKS,
            "{waited:?}"
        );
    }
}
