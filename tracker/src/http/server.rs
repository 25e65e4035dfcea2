//! Listening: connections, their bounds, their end.
//!
//! Slow and huge requests are shed here: a request head has its time and size, a connection its
//! lifetime, and there are so many connections and no more; who comes beyond waits in the kernel's
//! queue. Must not know what is answered.

use super::Answer;
use hyper::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use service::tasks::{Hold, Shutdown, Stage, Tasks};
use std::convert::Infallible;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

/// From the connection, or the last answer, to the end of the next request's head.
const HEAD_TIME: Duration = Duration::from_secs(15);
/// A request head: room for the longest token, and for the cookies of a whole site where the
/// tracker shares its domain.
const HEAD_BYTES: usize = 64 * 1024;
const MAX_HEADERS: usize = 200;
/// After this a connection answers what it has begun and closes, so that none is kept for ever.
const LIFETIME: Duration = Duration::from_mins(5);
/// For answering what was begun, at the end of a connection's or the process's life.
const LAST_WORDS: Duration = Duration::from_secs(20);

/// What answers requests.
pub(crate) trait Answers: Send + Sync + 'static {
    /// Answers one.
    fn answer(
        &self,
        request: Request<Incoming>,
        peer: IpAddr,
    ) -> impl Future<Output = Answer> + Send;
}

/// How a listener is run.
#[derive(Debug, Clone)]
pub(crate) struct Listening {
    /// The name of its task.
    pub(crate) name: &'static str,
    /// Connections at a time.
    pub(crate) max_connections: usize,
    pub(crate) tasks: Tasks,
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
            let (answers, ending) = (answers.clone(), self.shutdown.clone());
            let until = self.until;
            let hold = ending.hold(self.connections_until);
            drop(self.tasks.spawn("connection", async move {
                let ended = async { ending.reached(until).await };
                serve(stream, peer.ip(), answers, ended).await;
                drop((permit, hold));
            }));
        }
    }
}

/// Serves one connection until the client ends it, or `ended` or its lifetime does.
async fn serve<A: Answers>(
    stream: TcpStream,
    peer: IpAddr,
    answers: Arc<A>,
    ended: impl Future<Output = ()>,
) {
    // Answers are one write each: waiting for more would only delay them.
    drop(stream.set_nodelay(true));
    let service = service_fn(|request| {
        let answers = answers.clone();
        async move { Ok::<_, Infallible>(answers.answer(request, peer).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME)
        .max_buf_size(HEAD_BYTES)
        .max_headers(MAX_HEADERS)
        .serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    let enough = async {
        tokio::select! {
            () = ended => {}
            () = tokio::time::sleep(LIFETIME) => {}
        }
    };
    tokio::select! {
        served = connection.as_mut() => return log(served),
        () = enough => {}
    }
    connection.as_mut().graceful_shutdown();
    if let Ok(served) = tokio::time::timeout(LAST_WORDS, connection).await {
        log(served);
    }
}

/// What strangers do wrong is no news, but helps who debugs.
fn log(served: hyper::Result<()>) {
    if let Err(error) = served {
        tracing::debug!(%error, "connection ended");
    }
}
