//! A long way on one machine: connections whose bytes take their time, as over a network.
//!
//! Bytes are passed on unchanged and in order, each portion half a round trip after it came, however
//! many are under way: what is pipelined arrives together, what waits for an answer waits a whole
//! round trip. Must not look at what it carries.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Portions under way in one direction of a connection; more wait in the kernel.
const UNDER_WAY_MAX: usize = 1_024;
const PORTION: usize = 64 * 1024;

/// A running way to a server. Dropping it cuts its connections.
#[derive(Debug)]
pub struct Distance {
    address: SocketAddr,
    stop: CancellationToken,
}

impl Distance {
    /// Listens on any port of 127.0.0.1 and leads to `server`, `rtt` there and back.
    ///
    /// # Errors
    /// When the port cannot be had.
    pub async fn to(server: SocketAddr, rtt: Duration) -> io::Result<Self> {
        Self::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), server, rtt).await
    }

    /// Listens on `address`; otherwise as [`Self::to`].
    ///
    /// # Errors
    /// When the address cannot be had.
    pub async fn bind(address: SocketAddr, server: SocketAddr, rtt: Duration) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        let stop = CancellationToken::new();
        let tasks = TaskTracker::new();
        let stopped = stop.clone();
        let accepting = accept(listener, server, rtt / 2, tasks.clone(), stop.clone());
        tasks.spawn(async move { stopped.run_until_cancelled(accepting).await });
        Ok(Self { address, stop })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Distance {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

async fn accept(
    listener: TcpListener,
    server: SocketAddr,
    one_way: Duration,
    tasks: TaskTracker,
    stop: CancellationToken,
) {
    loop {
        let Ok((near, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        };
        let (stop, carrying) = (stop.clone(), carry(near, server, one_way));
        tasks.spawn(async move {
            // A connection that breaks is the business of its two ends, which see it.
            stop.run_until_cancelled(carrying).await.map(drop)
        });
    }
}

async fn carry(near: TcpStream, server: SocketAddr, one_way: Duration) -> io::Result<()> {
    // The handshake takes its round trip too; our side of it was answered by the kernel at once.
    tokio::time::sleep(one_way * 2).await;
    let far = TcpStream::connect(server).await?;
    near.set_nodelay(true)?;
    far.set_nodelay(true)?;
    let (near_read, near_write) = near.into_split();
    let (far_read, far_write) = far.into_split();
    let (there, back) = tokio::join!(
        pass(near_read, far_write, one_way),
        pass(far_read, near_write, one_way)
    );
    there.and(back)
}

/// One direction, until its end has come and gone.
async fn pass(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    one_way: Duration,
) -> io::Result<()> {
    let (enter, mut leave) = mpsc::channel::<(Instant, Bytes)>(UNDER_WAY_MAX);
    let entering = async move {
        let mut portion = vec![0; PORTION];
        loop {
            let read = from.read(&mut portion).await?;
            let bytes = portion.get(..read).unwrap_or_default();
            let due = Instant::now() + one_way;
            if enter
                .send((due, Bytes::copy_from_slice(bytes)))
                .await
                .is_err()
                || read == 0
            {
                return io::Result::Ok(());
            }
        }
    };
    let leaving = async move {
        while let Some((due, bytes)) = leave.recv().await {
            tokio::time::sleep_until(due).await;
            if bytes.is_empty() {
                break;
            }
            to.write_all(&bytes).await?;
        }
        to.shutdown().await
    };
    let (entered, left) = tokio::join!(entering, leaving);
    entered.and(left)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_travels_together_arrives_together_and_unchanged() {
        let server = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = server.local_addr().expect("an address");
        let rtt = Duration::from_millis(200);
        let way = Distance::to(address, rtt).await.expect("a way");
        let echo = async {
            let (mut stream, _) = server.accept().await.expect("a client");
            let (mut read, mut write) = stream.split();
            tokio::io::copy(&mut read, &mut write)
                .await
                .expect("echoed");
            write.shutdown().await.expect("ended");
        };
        let client = async {
            let mut stream = TcpStream::connect(way.address()).await.expect("connected");
            let sent: Vec<u8> = (0..=255).cycle().take(300_000).collect();
            let (mut read, mut write) = stream.split();
            // The way to the server is open before the clock runs.
            write.write_all(b"?").await.expect("written");
            read.read_u8().await.expect("read");
            let start = Instant::now();
            let mut back = Vec::new();
            let writing = async {
                for portion in sent.chunks(1_000) {
                    write.write_all(portion).await.expect("written");
                }
                write.shutdown().await.expect("ended");
            };
            let reading = read.read_to_end(&mut back);
            let (_, read) = tokio::join!(writing, reading);
            read.expect("read");
            (back == sent, start.elapsed())
        };
        let ((), (same, took)) = tokio::join!(echo, client);
        assert!(same);
        // 300 portions one after the other would take a minute.
        assert!(took >= rtt && took < 20 * rtt, "{took:?}");
    }
}
