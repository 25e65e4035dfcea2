//! A receiver of webhooks on loopback whose temper a test changes, and which remembers what came.
//!
//! One request per connection, `Content-Length` bodies only; what it gets is bounded. Must not be
//! taken for a web server.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::request::Request;

/// Between two bytes of an answer that drips.
const DRIP: Duration = Duration::from_millis(200);

/// How deliveries are received.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mood {
    /// 204.
    Take,
    /// This status.
    Refuse(u16),
    /// Nothing is answered, until the mood changes: then the connection is closed.
    Hang,
    /// An answer that never ends, byte by byte, until the mood changes.
    Drip,
    /// The events are taken, but the connection is closed instead of an answer.
    TakeInSilence,
    /// 307 to the path `/elsewhere`.
    Redirect,
}

/// A request as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delivery {
    /// With its query.
    pub path: String,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    /// The body.
    pub body: Vec<u8>,
    /// Whether the receiver keeps what it has.
    pub is_taken: bool,
}

impl Delivery {
    /// The value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(known, _)| known == name);
        found.map(|(_, value)| value.as_str())
    }
}

#[derive(Debug)]
struct Shared {
    mood: watch::Sender<Mood>,
    /// Connections that are open, and deliveries.
    open: watch::Sender<usize>,
    got: Mutex<Vec<Delivery>>,
    came: watch::Sender<usize>,
}

/// A running receiver. Dropping it ends its connections.
#[derive(Debug)]
pub struct HookReceiver {
    address: SocketAddr,
    shared: Arc<Shared>,
    stop: CancellationToken,
}

impl HookReceiver {
    /// Listens on 127.0.0.1, any free port, and takes everything.
    ///
    /// # Errors
    /// When the port cannot be had.
    pub async fn start() -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            mood: watch::Sender::new(Mood::Take),
            open: watch::Sender::new(0),
            got: Mutex::default(),
            came: watch::Sender::new(0),
        });
        let stop = CancellationToken::new();
        let serving = serve(listener, Arc::clone(&shared), stop.clone());
        let until = stop.clone();
        TaskTracker::new().spawn(async move { until.run_until_cancelled(serving).await });
        Ok(Self {
            address,
            shared,
            stop,
        })
    }

    /// The URL of this path.
    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// Receives so from now on; those that hang are let go.
    pub fn mood(&self, mood: Mood) {
        self.shared.mood.send_replace(mood);
    }

    /// What came so far, in order.
    pub fn got(&self) -> Vec<Delivery> {
        lock(&self.shared.got).clone()
    }

    /// Returns what came when it is so. Cancel-safe.
    pub async fn until(&self, so: impl Fn(&[Delivery]) -> bool) -> Vec<Delivery> {
        let mut came = self.shared.came.subscribe();
        loop {
            came.mark_unchanged();
            let got = self.got();
            if so(&got) {
                return got;
            }
            if came.changed().await.is_err() {
                // The sender is ours and lives as long as `self`.
                std::future::pending::<()>().await;
            }
        }
    }

    /// Returns when so many connections are open. Cancel-safe.
    pub async fn open(&self, count: usize) {
        let mut open = self.shared.open.subscribe();
        // The sender is ours and lives as long as `self`.
        open.wait_for(|now| *now == count).await.ok();
    }
}

impl Drop for HookReceiver {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

async fn serve(listener: TcpListener, shared: Arc<Shared>, stop: CancellationToken) {
    let tasks = TaskTracker::new();
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        };
        let (shared, stop) = (Arc::clone(&shared), stop.clone());
        tasks.spawn(async move {
            shared.open.send_modify(|open| *open += 1);
            // A sender that breaks off is part of the tests.
            if let Some(Err(error)) = stop.run_until_cancelled(receive(stream, &shared)).await {
                tracing::debug!(%error, "a delivery ended");
            }
            shared.open.send_modify(|open| *open -= 1);
        });
    }
}

async fn receive(mut stream: TcpStream, shared: &Shared) -> io::Result<()> {
    let request = Request::read(&mut stream).await?;
    let mut moods = shared.mood.subscribe();
    let mood = *moods.borrow_and_update();
    lock(&shared.got).push(Delivery {
        path: request.path,
        headers: request.headers,
        body: request.body,
        is_taken: matches!(mood, Mood::Take | Mood::TakeInSilence),
    });
    shared.came.send_modify(|came| *came += 1);
    let changed = async {
        // Ends with the receiver, too.
        moods.changed().await.ok();
    };
    let status = match mood {
        Mood::Take => "204 No Content\r\n".to_owned(),
        Mood::Refuse(status) => format!("{status} No\r\nContent-Length: 0\r\n"),
        Mood::Redirect => "307 There\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n".to_owned(),
        Mood::TakeInSilence => return Ok(()),
        Mood::Hang => {
            let mut more = [0; 1];
            tokio::select! {
                () = changed => {}
                // The sender has gone.
                _ = stream.read(&mut more) => {}
            }
            return Ok(());
        }
        Mood::Drip => {
            tokio::select! {
                () = changed => return Ok(()),
                ended = drip(&mut stream) => return ended,
            }
        }
    };
    let answer = format!("HTTP/1.1 {status}Connection: close\r\n\r\n");
    stream.write_all(answer.as_bytes()).await?;
    stream.shutdown().await
}

async fn drip(stream: &mut TcpStream) -> io::Result<()> {
    stream.write_all(b"HTTP/1.1 200 OK\r\nX-Slow: ").await?;
    loop {
        stream.write_all(b"x").await?;
        tokio::time::sleep(DRIP).await;
    }
}

/// A panic in a test must not hide the failure behind a poisoned lock.
fn lock<T>(state: &Mutex<T>) -> MutexGuard<'_, T> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}
