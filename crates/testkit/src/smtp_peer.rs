//! Receiving mail servers with tempers: for tests, the demo's sandbox and the load test's sink.
//!
//! Owns the socket, one task per connection and the record of what was received. The protocol is
//! [`smtp::ServerSession`]'s; what to answer is the [`Temper`]'s. Must not parse messages.
//!
//! A message counts as received when the temper accepts it, before the reply is written: where the
//! reply is lost, the record here is the truth that a client cannot know.

mod connection;
mod record;
mod temper;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use connection::Connection;
use record::Record;

pub use record::{Copies, Counts, Keep, Received};
pub use temper::{Answer, Question, Temper};

/// How long [`SmtpPeer::wait_until`] is patient: long enough for a busy machine, short enough for
/// a test that would hang.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// What a connection of a peer is made of.
pub trait PeerStream: AsyncRead + AsyncWrite + Send + Unpin + 'static {
    /// Prepares it.
    ///
    /// # Errors
    /// When it is of no use.
    fn prepare(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// Makes its end a reset (RST).
    ///
    /// # Errors
    /// As the system gives them.
    fn reset(&mut self) -> io::Result<()>;
}

impl PeerStream for TcpStream {
    fn prepare(&mut self) -> io::Result<()> {
        self.set_nodelay(true)
    }

    fn reset(&mut self) -> io::Result<()> {
        self.set_zero_linger()
    }
}

/// A running server. Dropping it ends its connections too, without waiting for them.
#[derive(Debug)]
pub struct SmtpPeer {
    address: SocketAddr,
    shared: Arc<Shared>,
    tasks: TaskTracker,
}

/// What the connections share with the handle.
#[derive(Debug)]
struct Shared {
    temper: Mutex<Arc<Temper>>,
    keep: Keep,
    record: Mutex<Record>,
    counts: watch::Sender<Counts>,
    stop: CancellationToken,
}

impl SmtpPeer {
    /// Listens on 127.0.0.1, any free port.
    ///
    /// # Errors
    /// When the port cannot be had.
    pub async fn start(temper: Temper) -> io::Result<Self> {
        Self::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), temper).await
    }

    /// Listens on `address`, which may be any of the machine; port 0 is a free one.
    ///
    /// # Errors
    /// When the address cannot be had.
    pub async fn bind(address: SocketAddr, temper: Temper) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let peer = Self::detached(listener.local_addr()?, temper);
        let (shared, tasks) = (Arc::clone(&peer.shared), peer.tasks.clone());
        let stop = shared.stop.clone();
        let accept = accept(listener, shared, tasks);
        peer.tasks.spawn(async move {
            stop.run_until_cancelled(accept).await;
        });
        Ok(peer)
    }

    /// Listens nowhere: connections are brought by [`Self::serve`].
    pub fn detached(address: SocketAddr, temper: Temper) -> Self {
        Self {
            address,
            shared: Arc::new(Shared {
                keep: temper.keep,
                record: Mutex::default(),
                temper: Mutex::new(Arc::new(temper)),
                counts: watch::Sender::new(Counts::default()),
                stop: CancellationToken::new(),
            }),
            tasks: TaskTracker::new(),
        }
    }

    /// Serves a connection, as if it had been accepted.
    pub fn serve(&self, stream: impl PeerStream, from: SocketAddr) {
        serve(stream, from, &self.shared, &self.tasks);
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Changes the temper for connections that come from now on; what is kept stays as it was.
    pub fn set_temper(&self, temper: Temper) {
        *lock(&self.shared.temper) = Arc::new(temper);
    }

    /// What was counted so far.
    pub fn counts(&self) -> Counts {
        *self.shared.counts.borrow()
    }

    /// The messages received, in order, as far as [`Keep`] keeps them.
    pub fn messages(&self) -> Vec<Received> {
        lock(&self.shared.record).messages()
    }

    /// Copies by recipient, with [`Keep::PerRecipient`].
    pub fn copies(&self) -> HashMap<String, Copies> {
        lock(&self.shared.record).copies()
    }

    /// Waits until this many messages were received in all.
    ///
    /// # Errors
    /// As [`Self::wait_until`].
    pub async fn wait_for(&self, messages: u64) -> anyhow::Result<Counts> {
        self.wait_until(|counts| counts.messages >= messages).await
    }

    /// Waits until the counts are so.
    ///
    /// # Errors
    /// With the counts, when they are not within [`PATIENCE`].
    pub async fn wait_until(&self, mut so: impl FnMut(&Counts) -> bool) -> anyhow::Result<Counts> {
        let mut counts = self.shared.counts.subscribe();
        match tokio::time::timeout(PATIENCE, counts.wait_for(|counts| so(counts))).await {
            Ok(Ok(counts)) => Ok(*counts),
            // The sender lives as long as `self`, so only patience can end.
            Ok(Err(_)) | Err(_) => anyhow::bail!("waited in vain, counts: {:?}", self.counts()),
        }
    }

    /// Stops listening, ends every connection where it stands and waits for their tasks.
    pub async fn shutdown(self) {
        self.shared.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }
}

impl Drop for SmtpPeer {
    fn drop(&mut self) {
        self.shared.stop.cancel();
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>, tasks: TaskTracker) {
    loop {
        let Ok((stream, from)) = listener.accept().await else {
            // Out of descriptors, usually: a moment later some are free again.
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        };
        serve(stream, from, &shared, &tasks);
    }
}

fn serve(stream: impl PeerStream, from: SocketAddr, shared: &Arc<Shared>, tasks: &TaskTracker) {
    let temper = Arc::clone(&lock(&shared.temper));
    let connection = Connection::new(stream, from, temper, Arc::clone(shared));
    let stop = shared.stop.clone();
    tasks.spawn(async move {
        stop.run_until_cancelled(connection.run()).await;
    });
}

/// A panic in a test's closure must not hide the failure behind a poisoned lock.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
