//! Connecting through another machine: SOCKS version 5 (RFC 1928, RFC 1929) and HAProxy's PROXY
//! protocol, version 2.
//!
//! Owns the first bytes on such a connection. Must not decide what a failure means beyond whose it
//! is: the proxy's, or that of the host behind it.

use std::io;
use std::net::{IpAddr, SocketAddr};

use service::config::Secret;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

/// Why there is no way through.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum ProxyError {
    /// The proxy itself: nobody gets through.
    #[error("the proxy {0}")]
    Proxy(String),
    /// The proxy could not connect to the host.
    #[error("{0:?} behind the proxy")]
    Host(io::ErrorKind),
}

fn broken(error: &io::Error) -> ProxyError {
    ProxyError::Proxy(format!("gave up: {error}"))
}

/// Asks a SOCKS proxy to connect to `target`. Reads not a byte beyond its answer.
pub(super) async fn socks5(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    target: SocketAddr,
    login: Option<&(String, Secret)>,
) -> Result<(), ProxyError> {
    let method = match login {
        None => 0x00,
        Some(_) => 0x02,
    };
    send(stream, &[5, 1, method]).await?;
    let [version, chosen] = receive(stream).await?;
    match (version, chosen) {
        (5, chosen) if chosen == method => {}
        (5, _) => return Err(ProxyError::Proxy("wants another way to log in".to_owned())),
        _ => return Err(ProxyError::Proxy("does not speak SOCKS 5".to_owned())),
    }
    if let Some((user, password)) = login {
        log_in(stream, user, password.reveal()).await?;
    }
    let mut request = vec![5, 1, 0];
    match target.ip() {
        IpAddr::V4(address) => {
            request.push(1);
            request.extend(address.octets());
        }
        IpAddr::V6(address) => {
            request.push(4);
            request.extend(address.octets());
        }
    }
    request.extend(target.port().to_be_bytes());
    send(stream, &request).await?;
    let [_, code, _, kind] = receive(stream).await?;
    if code != 0 {
        return Err(refusal(code));
    }
    // The address that it connects from; of no use to us.
    let rest = match kind {
        1 => 4 + 2,
        4 => 16 + 2,
        3 => usize::from(receive::<1>(stream).await?[0]) + 2,
        _ => return Err(ProxyError::Proxy("does not speak SOCKS 5".to_owned())),
    };
    let mut address = vec![0; rest];
    let read = stream.read_exact(&mut address).await;
    read.map(drop).map_err(|error| broken(&error))
}

async fn log_in(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    user: &str,
    password: &str,
) -> Result<(), ProxyError> {
    let mut request = vec![1];
    for text in [user, password] {
        let length = u8::try_from(text.len())
            .map_err(|_| ProxyError::Proxy("takes at most 255 bytes as a name".to_owned()))?;
        request.push(length);
        request.extend(text.as_bytes());
    }
    send(stream, &request).await?;
    match receive(stream).await? {
        [_, 0] => Ok(()),
        [_, _] => Err(ProxyError::Proxy("does not let us in".to_owned())),
    }
}

/// RFC 1928 §6.
fn refusal(code: u8) -> ProxyError {
    match code {
        2 => ProxyError::Proxy("does not allow the connection".to_owned()),
        3 => ProxyError::Host(io::ErrorKind::NetworkUnreachable),
        4 => ProxyError::Host(io::ErrorKind::HostUnreachable),
        5 => ProxyError::Host(io::ErrorKind::ConnectionRefused),
        6 => ProxyError::Host(io::ErrorKind::TimedOut),
        7 | 8 => ProxyError::Proxy("does not know the command".to_owned()),
        _ => ProxyError::Host(io::ErrorKind::Other),
    }
}

async fn send(stream: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> Result<(), ProxyError> {
    let sent = stream.write_all(bytes).await;
    sent.map_err(|error| broken(&error))
}

async fn receive<const N: usize>(
    stream: &mut (impl AsyncRead + Unpin),
) -> Result<[u8; N], ProxyError> {
    let mut bytes = [0; N];
    let read = stream.read_exact(&mut bytes).await;
    read.map(|_| bytes).map_err(|error| broken(&error))
}

/// Sends the header that tells HAProxy to connect from `from` to `to`.
pub(super) async fn header_v2_to(
    stream: &mut (impl AsyncWrite + Unpin),
    from: IpAddr,
    to: SocketAddr,
) -> Result<(), ProxyError> {
    send(stream, &header_v2(from, to)).await
}

/// The header that goes before everything else: connect from `from` to `to`, which are of one
/// family (<https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt>, section 2.2).
fn header_v2(from: IpAddr, to: SocketAddr) -> Vec<u8> {
    let mut header = b"\r\n\r\n\0\r\nQUIT\n".to_vec();
    // Version 2, command PROXY.
    header.push(0x21);
    let (family, addresses) = match (from, to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => (0x11, [from.octets(), to.octets()].concat()),
        (from, to) => (0x21, [octets_v6(from), octets_v6(to)].concat()),
    };
    header.push(family);
    let length = u16::try_from(addresses.len() + 4).unwrap_or(u16::MAX);
    header.extend(length.to_be_bytes());
    header.extend(addresses);
    // Any port to connect from.
    header.extend(0_u16.to_be_bytes());
    header.extend(to.port().to_be_bytes());
    header
}

fn octets_v6(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(text: &str) -> SocketAddr {
        text.parse().expect("an address")
    }

    #[test]
    fn headers_by_the_book() {
        let header = header_v2(
            "192.0.2.1".parse().expect("an address"),
            at("198.51.100.2:25"),
        );
        assert_eq!(header.len(), 16 + 12);
        assert_eq!(
            header.split_at(12).1,
            [
                0x21, 0x11, 0, 12, 192, 0, 2, 1, 198, 51, 100, 2, 0, 0, 0, 25
            ]
        );
        let header = header_v2(
            "2001:db8::1".parse().expect("an address"),
            at("[2001:db8::2]:25"),
        );
        assert_eq!((header.len(), header[13], header[15]), (16 + 36, 0x21, 36));
    }

    /// What a proxy that answers so makes of us, and what it hears.
    async fn asked(
        answers: &[u8],
        target: &str,
        login: Option<&(String, Secret)>,
    ) -> (Result<(), ProxyError>, Vec<u8>, Vec<u8>) {
        let (mut ours, theirs) = tokio::io::duplex(4_096);
        let (mut reader, mut writer) = tokio::io::split(theirs);
        writer.write_all(answers).await.expect("written");
        writer.shutdown().await.expect("shut down");
        let result = socks5(&mut ours, at(target), login).await;
        let mut left = Vec::new();
        ours.read_to_end(&mut left).await.expect("read");
        drop(ours);
        let mut heard = Vec::new();
        reader.read_to_end(&mut heard).await.expect("read");
        (result, heard, left)
    }

    #[tokio::test]
    async fn dialogues() {
        let greeting = b"220 mx\r\n";
        let yes = [&[5, 0][..], &[5, 0, 0, 1, 10, 0, 0, 1, 0, 80], greeting].concat();
        let (result, heard, left) = asked(&yes, "192.0.2.1:25", None).await;
        assert_eq!(result, Ok(()));
        assert_eq!(heard, [5, 1, 0, 5, 1, 0, 1, 192, 0, 2, 1, 0, 25]);
        assert_eq!(left, greeting, "what the host says is left for the session");

        let login = ("u".to_owned(), Secret::new("pw"));
        let yes = [5, 2, 1, 0, 5, 0, 0, 3, 1, b'x', 0, 80];
        let (result, heard, _) = asked(&yes, "[2001:db8::2]:25", Some(&login)).await;
        assert_eq!(result, Ok(()));
        assert!(heard.starts_with(&[5, 1, 2, 1, 1, b'u', 2, b'p', b'w', 5, 1, 0, 4, 0x20, 1]));

        for (answers, login, whose) in [
            (&[5, 255][..], None, "proxy"),
            (&[4, 0], None, "proxy"),
            (&[5], None, "proxy"),
            (&[5, 2, 1, 1], Some(&login), "proxy"),
            (&[5, 0, 5, 2, 0, 1], None, "proxy"),
            (&[5, 0, 5, 5, 0, 1], None, "host"),
            (&[5, 0, 5, 4, 0, 1], None, "host"),
        ] {
            let (result, _, _) = asked(answers, "192.0.2.1:25", login).await;
            let found = match result {
                Err(ProxyError::Proxy(_)) => "proxy",
                Err(ProxyError::Host(_)) => "host",
                Ok(()) => "nobody",
            };
            assert_eq!(found, whose, "{answers:?}");
        }
    }

    proptest! {
        #[test]
        fn no_answer_panics(answers in proptest::collection::vec(any::<u8>(), 0..64)) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
            drop(runtime.block_on(asked(&answers, "192.0.2.1:25", None)));
        }
    }
}
