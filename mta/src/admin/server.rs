//! The listener of the API.
//!
//! Owns connections: how many there are, how long a caller may take over its request line and
//! headers, and how they end. When the process drains, no connection is accepted, and those that
//! are open end after the answer they are at.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use service::tasks::{Shutdown, Stage, Tasks};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Open connections at most; more wait in the kernel's queue.
const CONNECTIONS_MAX: usize = 1_024;
/// For the request line and headers, also of the next request on a connection.
pub(crate) const HEADERS_TIME: Duration = Duration::from_secs(30);
/// Bytes of request line and headers.
const HEADERS_MAX: usize = 64 << 10;
/// After an error of `accept`: mostly that there are no more file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves `router` on `listener` until the process drains; whoever takes longer than
/// `headers_time` over the headers of a request is let go.
pub(crate) fn serve(
    listener: TcpListener,
    router: Router,
    headers_time: Duration,
    tasks: &Tasks,
    shutdown: &Shutdown,
) {
    let (hold, accepting) = (shutdown.hold(Stage::Intake), shutdown.clone());
    let connections = tasks.clone();
    drop(tasks.spawn("api", async move {
        let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        while let Some((stream, place)) = next(&listener, &places, &accepting).await {
            let connection = Connection {
                router: router.clone(),
                headers_time,
                shutdown: accepting.clone(),
                _place: place,
            };
            drop(connections.spawn("api connection", connection.run(stream)));
        }
        drop(hold);
    }));
}

/// The next connection; none once the process drains.
async fn next(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
    shutdown: &Shutdown,
) -> Option<(TcpStream, OwnedSemaphorePermit)> {
    let accepted = async {
        // The semaphore is never closed.
        let place = Arc::clone(places).acquire_owned().await.ok()?;
        loop {
            match listener.accept().await {
                Ok((stream, _peer)) => return Some((stream, place)),
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection to the API");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    };
    tokio::select! {
        connection = accepted => connection,
        () = shutdown.begun() => None,
    }
}

struct Connection {
    router: Router,
    headers_time: Duration,
    shutdown: Shutdown,
    _place: OwnedSemaphorePermit,
}

impl Connection {
    async fn run(self, stream: TcpStream) {
        let _hold = self.shutdown.hold(Stage::Intake);
        // Answers are small and complete: waiting for more to send would only delay them.
        stream.set_nodelay(true).ok();
        let service = TowerToHyperService::new(self.router);
        let serving = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(self.headers_time)
            .max_buf_size(HEADERS_MAX)
            .serve_connection(TokioIo::new(stream), service);
        let mut serving = std::pin::pin!(serving);
        let ended = tokio::select! {
            ended = serving.as_mut() => ended,
            () = self.shutdown.begun() => {
                serving.as_mut().graceful_shutdown();
                serving.await
            }
        };
        if let Err(error) = ended {
            tracing::debug!(%error, "a connection to the API broke");
        }
    }
}

/// Where the listener stands, for whoever asked for port 0.
pub(crate) fn address(listener: &TcpListener, asked: SocketAddr) -> SocketAddr {
    listener.local_addr().unwrap_or(asked)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    #[tokio::test]
    async fn who_dawdles_over_the_headers_is_let_go() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let addr = listener.local_addr().expect("an address");
        let (tasks, shutdown) = (Tasks::new(), Shutdown::new());
        serve(
            listener,
            Router::new(),
            Duration::from_millis(50),
            &tasks,
            &shutdown,
        );
        let mut slow = TcpStream::connect(addr).await.expect("connected");
        slow.write_all(b"GET /healthz HTTP/1.1\r\nhos")
            .await
            .expect("sent");
        let mut silent = TcpStream::connect(addr).await.expect("connected");
        let mut answer = String::new();
        slow.read_to_string(&mut answer).await.expect("closed");
        assert!(!answer.contains(" 200 "), "{answer}");
        assert_eq!(silent.read(&mut [0; 1]).await.expect("closed"), 0);
        shutdown
            .drain(Duration::from_secs(10))
            .await
            .expect("drained");
        tasks.join().await.expect("no task was lost");
    }
}
