//! How hosts are reached; comes in as an argument, so that a simulation can put another network
//! in the place of the machine's.
//!
//! Owns what a connection is to the rest: bytes both ways, and a look at whether it is still
//! there. Must not know what is said on it.

use std::fmt;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};

use async_trait::async_trait;
use service::config::Source;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use super::connect::{ConnectError, pulse};

/// What there is of a connection that nobody has read from for a while.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pulse {
    /// Nothing: it is as it was left.
    Quiet,
    /// Bytes that were not asked for.
    Unread,
    /// The peer has closed it, or it is lost.
    Gone,
}

/// How a connection is made.
#[async_trait]
pub trait Network: fmt::Debug + Send + Sync + 'static {
    /// A connection to `address` as `source`. The caller bounds the time.
    ///
    /// # Errors
    /// See [`ConnectError`].
    async fn connect(&self, source: &Source, address: SocketAddr) -> Result<Socket, ConnectError>;
}

/// A connection that is not the kernel's.
pub trait Link: AsyncRead + AsyncWrite + fmt::Debug + Send + Sync + Unpin + 'static {
    /// Whether it is still there; moves nothing.
    fn pulse(&self) -> Pulse;
}

/// A connection.
#[derive(Debug)]
pub enum Socket {
    /// The kernel's.
    Tcp(TcpStream),
    /// A simulation's.
    Link(Box<dyn Link>),
}

impl Socket {
    pub(super) fn pulse(&self) -> Pulse {
        match self {
            Self::Tcp(stream) => pulse(stream),
            Self::Link(link) => link.pulse(),
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_read(cx, buffer),
            Self::Link(link) => Pin::new(link).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write(cx, bytes),
            Self::Link(link) => Pin::new(link).poll_write(cx, bytes),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write_vectored(cx, slices),
            Self::Link(link) => Pin::new(link).poll_write_vectored(cx, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Tcp(stream) => stream.is_write_vectored(),
            Self::Link(link) => link.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_flush(cx),
            Self::Link(link) => Pin::new(link).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Link(link) => Pin::new(link).poll_shutdown(cx),
        }
    }
}
