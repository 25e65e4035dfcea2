//! Proxies that connect for others: SOCKS version 5, and a receiver of HAProxy's PROXY protocol.
//!
//! Owns listening, the first bytes and a record of who wanted to go where. What is carried
//! afterwards is passed on unchanged.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// One connection that was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Asked {
    /// From which address, where the protocol says so.
    pub from: Option<IpAddr>,
    /// Where to.
    pub to: SocketAddr,
}

/// What a proxy speaks.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Speech {
    Socks5 { login: Option<(String, String)> },
    HaProxy,
}

/// A running proxy. Dropping it cuts its connections.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    asked: Arc<Mutex<Vec<Asked>>>,
    stop: CancellationToken,
}

impl Proxy {
    /// A SOCKS proxy on `address`, for everybody or for who knows user and password.
    ///
    /// # Errors
    /// When the address cannot be had.
    pub async fn socks5(address: SocketAddr, login: Option<(&str, &str)>) -> io::Result<Self> {
        let login = login.map(|(user, password)| (user.to_owned(), password.to_owned()));
        Self::start(address, Speech::Socks5 { login }).await
    }

    /// A proxy on `address` that wants the PROXY header, version 2, and connects from the address
    /// that it names as the source.
    ///
    /// # Errors
    /// When the address cannot be had.
    pub async fn haproxy(address: SocketAddr) -> io::Result<Self> {
        Self::start(address, Speech::HaProxy).await
    }

    async fn start(address: SocketAddr, speech: Speech) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        let asked = Arc::<Mutex<Vec<Asked>>>::default();
        let stop = CancellationToken::new();
        let tasks = TaskTracker::new();
        let accepting = accept(
            listener,
            speech,
            Arc::clone(&asked),
            tasks.clone(),
            stop.clone(),
        );
        let stopped = stop.clone();
        tasks.spawn(async move { stopped.run_until_cancelled(accepting).await });
        Ok(Self {
            address,
            asked,
            stop,
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Connections that it was asked for, in order.
    pub fn asked(&self) -> Vec<Asked> {
        self.asked
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

async fn accept(
    listener: TcpListener,
    speech: Speech,
    asked: Arc<Mutex<Vec<Asked>>>,
    tasks: TaskTracker,
    stop: CancellationToken,
) {
    while let Ok((client, _)) = listener.accept().await {
        let (speech, asked, stop) = (speech.clone(), Arc::clone(&asked), stop.clone());
        tasks.spawn(async move {
            let serving = serve(client, &speech, &asked);
            // Its two ends see what becomes of a connection.
            stop.run_until_cancelled(serving).await.map(drop)
        });
    }
}

async fn serve(
    mut client: TcpStream,
    speech: &Speech,
    asked: &Mutex<Vec<Asked>>,
) -> io::Result<()> {
    let wish = match speech {
        Speech::Socks5 { login } => socks_wish(&mut client, login.as_ref()).await?,
        Speech::HaProxy => header_wish(&mut client).await?,
    };
    asked
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .push(wish);
    let connected = connect(wish).await;
    if matches!(speech, Speech::Socks5 { .. }) {
        let code = u8::from(connected.is_err()) * 5;
        client.write_all(&[5, code, 0, 1, 0, 0, 0, 0, 0, 0]).await?;
    }
    let mut server = connected?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    tokio::io::copy_bidirectional(&mut client, &mut server).await?;
    Ok(())
}

async fn connect(wish: Asked) -> io::Result<TcpStream> {
    let socket = match wish.to {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    if let Some(from) = wish.from {
        socket.bind(SocketAddr::new(from, 0))?;
    }
    socket.connect(wish.to).await
}

fn wrong(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

async fn take<const N: usize>(client: &mut TcpStream) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    client.read_exact(&mut bytes).await?;
    Ok(bytes)
}

/// The dialogue of RFC 1928, with user and password by RFC 1929.
async fn socks_wish(client: &mut TcpStream, login: Option<&(String, String)>) -> io::Result<Asked> {
    let [5, count] = take(client).await? else {
        return Err(wrong("not SOCKS 5"));
    };
    let mut methods = vec![0; usize::from(count)];
    client.read_exact(&mut methods).await?;
    let method = if login.is_some() { 2 } else { 0 };
    if !methods.contains(&method) {
        return client.write_all(&[5, 0xff]).await.and(Err(wrong("method")));
    }
    client.write_all(&[5, method]).await?;
    if let Some((user, password)) = login {
        let [_version] = take(client).await?;
        let shown = (take_text(client).await?, take_text(client).await?);
        let known = shown == (user.as_bytes().to_vec(), password.as_bytes().to_vec());
        client.write_all(&[1, u8::from(!known)]).await?;
        if !known {
            return Err(wrong("login"));
        }
    }
    let [5, 1, 0, kind] = take(client).await? else {
        return Err(wrong("not CONNECT"));
    };
    let to = take_address(client, kind == 4).await?;
    let [high, low] = take(client).await?;
    let to = SocketAddr::new(to, u16::from_be_bytes([high, low]));
    Ok(Asked { from: None, to })
}

async fn take_text(client: &mut TcpStream) -> io::Result<Vec<u8>> {
    let [length] = take(client).await?;
    let mut text = vec![0; usize::from(length)];
    client.read_exact(&mut text).await?;
    Ok(text)
}

async fn take_address(client: &mut TcpStream, is_v6: bool) -> io::Result<IpAddr> {
    Ok(if is_v6 {
        IpAddr::V6(Ipv6Addr::from(take::<16>(client).await?))
    } else {
        IpAddr::V4(Ipv4Addr::from(take::<4>(client).await?))
    })
}

async fn header_wish(client: &mut TcpStream) -> io::Result<Asked> {
    let signature = take::<12>(client).await?;
    let [version, family, _, _] = take(client).await?;
    if signature != *b"\r\n\r\n\0\r\nQUIT\n" || version != 0x21 {
        return Err(wrong("no PROXY header"));
    }
    let is_v6 = family == 0x21;
    let from = Some(take_address(client, is_v6).await?);
    let to = take_address(client, is_v6).await?;
    let [_, _, high, low] = take(client).await?;
    let to = SocketAddr::new(to, u16::from_be_bytes([high, low]));
    Ok(Asked { from, to })
}
