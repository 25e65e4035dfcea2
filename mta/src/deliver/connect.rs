//! One TCP connection to one address: from the source's address, through its proxy, in time.
//!
//! Owns the socket until a session has it. Tells a source that cannot connect anywhere from a host
//! that cannot be reached; what follows from either is decided elsewhere.

use std::io;
use std::mem::MaybeUninit;
use std::net::{IpAddr, SocketAddr};

use async_trait::async_trait;
use service::config::{Proxy, Source};
use smtp::{SessionError, Stage};
use socket2::SockRef;
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;

use super::Deliver;
use super::network::{Network, Pulse, Socket};
use super::proxy::{self, ProxyError};

/// Why there is no connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConnectError {
    /// The source: its address is not of this machine, or its proxy does not do its work.
    Source(String),
    /// The host.
    Host(SessionError),
}

impl From<ProxyError> for ConnectError {
    fn from(error: ProxyError) -> Self {
        match error {
            ProxyError::Proxy(_) => Self::Source(error.to_string()),
            ProxyError::Host(kind) => Self::Host(at_connect(kind)),
        }
    }
}

fn at_connect(kind: io::ErrorKind) -> SessionError {
    SessionError::Io {
        stage: Stage::Connect,
        kind,
    }
}

impl ConnectError {
    /// The host cannot be reached, for this reason.
    pub fn host(kind: io::ErrorKind) -> Self {
        Self::Host(at_connect(kind))
    }
}

impl Deliver {
    /// A connection to `address` as `source`.
    pub(super) async fn connect(
        &self,
        source: &Source,
        address: SocketAddr,
    ) -> Result<Socket, ConnectError> {
        let late = SessionError::TimedOut {
            stage: Stage::Connect,
        };
        timeout(
            self.timeouts.connect,
            self.network.connect(source, address),
        )
        .await
        // With a proxy it may be the host behind it that does not answer.
        .map_err(|_| ConnectError::Host(late))?
    }
}

/// The network of the machine.
#[derive(Debug, Clone, Copy, Default)]
pub struct Internet;

#[async_trait]
impl Network for Internet {
    async fn connect(&self, source: &Source, address: SocketAddr) -> Result<Socket, ConnectError> {
        let stream = match &source.proxy {
            None => direct(source.bind.towards(address.ip()), address).await,
            Some(proxy) => through(proxy, source, address).await,
        }?;
        // A flight is one write; waiting for more to send would only delay it.
        stream
            .set_nodelay(true)
            .map_err(|error| ConnectError::host(error.kind()))?;
        Ok(Socket::Tcp(stream))
    }
}

async fn direct(bind: Option<IpAddr>, address: SocketAddr) -> Result<TcpStream, ConnectError> {
    let host = |error: io::Error| ConnectError::Host(at_connect(error.kind()));
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4(),
        SocketAddr::V6(_) => TcpSocket::new_v6(),
    }
    .map_err(host)?;
    if let Some(bind) = bind {
        socket
            .bind(SocketAddr::new(bind, 0))
            .map_err(|error| ConnectError::Source(format!("{bind} cannot be used: {error}")))?;
    }
    socket.connect(address).await.map_err(host)
}

async fn through(
    proxy: &Proxy,
    source: &Source,
    address: SocketAddr,
) -> Result<TcpStream, ConnectError> {
    let at = proxy.address();
    let dead = |error: io::Error| ConnectError::Source(format!("the proxy at {at}: {error}"));
    let mut stream = TcpStream::connect(at).await.map_err(dead)?;
    match proxy {
        Proxy::Socks5 { login, .. } => {
            proxy::socks5(&mut stream, address, login.as_ref()).await?;
        }
        Proxy::HaProxy { .. } => {
            let Some(from) = source.bind.towards(address.ip()) else {
                let why = format!("{} has no address towards {address}", source.name);
                return Err(ConnectError::Source(why));
            };
            proxy::header_v2_to(&mut stream, from, address).await?;
        }
    }
    Ok(stream)
}

/// Asks the kernel itself: what the runtime knows may be a moment old.
pub(super) fn pulse(stream: &TcpStream) -> Pulse {
    match SockRef::from(stream).peek(&mut [MaybeUninit::uninit()]) {
        Ok(0) => Pulse::Gone,
        Ok(_) => Pulse::Unread,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Pulse::Quiet,
        Err(_) => Pulse::Gone,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt as _;

    #[tokio::test]
    async fn a_connection_has_a_pulse() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
            .await
            .expect("a port");
        let address = listener.local_addr().expect("an address");
        let (ours, theirs) = tokio::join!(TcpStream::connect(address), listener.accept());
        let (ours, (mut theirs, _)) = (ours.expect("ours"), theirs.expect("theirs"));
        assert_eq!(pulse(&ours), Pulse::Quiet);
        theirs.write_all(b"421 bye\r\n").await.expect("written");
        ours.readable().await.expect("readable");
        assert_eq!(pulse(&ours), Pulse::Unread);
        let mut buffer = [0; 64];
        assert_eq!(ours.try_read(&mut buffer).expect("read"), 9);
        drop(theirs);
        ours.readable().await.expect("readable");
        assert_eq!(pulse(&ours), Pulse::Gone);
    }
}
