//! Bytes between a session and a socket, in plaintext or TLS.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use crate::trace::Tap;
use smtp::ClientSession;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::time::timeout;
use tokio_rustls::client::TlsStream;

use super::network::{Pulse, Socket};

/// Slices handed to the kernel in one write.
const SLICES: usize = 16;
/// What is read at a time: the replies to a whole flight fit many times.
const READ: usize = 16 * 1024;
/// How long the peer is given to close its side.
const FAREWELL: Duration = Duration::from_secs(2);

/// A connection's bytes.
#[derive(Debug)]
pub(super) enum Stream {
    Plain(Socket),
    Tls(Box<TlsStream<Socket>>),
}

impl Stream {
    fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self {
            Self::Plain(stream) => Pin::new(stream).poll_read(cx, buffer),
            Self::Tls(stream) => Pin::new(&mut **stream).poll_read(cx, buffer),
        }
    }

    fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self {
            Self::Plain(stream) => Pin::new(stream).poll_write_vectored(cx, slices),
            Self::Tls(stream) => Pin::new(&mut **stream).poll_write_vectored(cx, slices),
        }
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            // The kernel has it.
            Self::Plain(_) => Poll::Ready(Ok(())),
            Self::Tls(stream) => Pin::new(&mut **stream).poll_flush(cx),
        }
    }

    /// The plaintext stream, to be upgraded; `None` when it already was.
    pub(super) fn into_plain(self) -> Option<Socket> {
        match self {
            Self::Plain(stream) => Some(stream),
            Self::Tls(_) => None,
        }
    }
}

/// A stream and its read buffer.
#[derive(Debug)]
pub(super) struct Wire {
    pub(super) stream: Stream,
    buffer: Box<[u8]>,
    /// TLS holds bytes that it has not written.
    unflushed: bool,
    /// The peer has closed, or the connection is lost.
    gone: bool,
    /// Who reads along.
    pub(super) tap: Option<Box<Tap>>,
}

impl Wire {
    pub(super) fn new(stream: Stream) -> Self {
        Self {
            stream,
            buffer: vec![0; READ].into_boxed_slice(),
            unflushed: false,
            gone: false,
            tap: None,
        }
    }

    /// What the kernel holds of what the peer sent.
    pub(super) fn pulse(&self) -> Pulse {
        match &self.stream {
            Stream::Plain(stream) => stream.pulse(),
            Stream::Tls(stream) => stream.get_ref().0.pulse(),
        }
    }

    /// Moves bytes both ways until some were read, or all that was to be written is. `false` means
    /// that the peer has closed. Cancel-safe: what was moved is noted in the session.
    pub(super) async fn turn(&mut self, session: &mut ClientSession) -> io::Result<bool> {
        let moved = std::future::poll_fn(|cx| self.poll_turn(session, cx)).await;
        self.gone |= !matches!(moved, Ok(true));
        moved
    }

    /// Writes what can be written now, without a wait; tells whether that was anything.
    pub(super) async fn push(&mut self, session: &mut ClientSession) -> io::Result<bool> {
        let wrote = std::future::poll_fn(|cx| Poll::Ready(self.poll_writes(session, cx))).await;
        self.gone |= wrote.is_err();
        wrote
    }

    /// Closes, and waits a moment for the peer to close too: until then the peer counts this
    /// connection among those that are open, so the next one would be one too many.
    pub(super) async fn hang_up(mut self) {
        if self.gone {
            return;
        }
        let parted = timeout(FAREWELL, part(&mut self.stream, &mut self.buffer)).await;
        if !matches!(parted, Ok(Ok(()))) {
            tracing::trace!(?parted, "a connection ended without the peer's farewell");
        }
    }

    fn poll_turn(
        &mut self,
        session: &mut ClientSession,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<bool>> {
        let wrote = self.poll_writes(session, cx)?;
        let mut buffer = ReadBuf::new(&mut self.buffer);
        match self.stream.poll_read(cx, &mut buffer) {
            Poll::Ready(Ok(())) if buffer.filled().is_empty() => Poll::Ready(Ok(false)),
            Poll::Ready(Ok(())) => {
                if let Some(tap) = &mut self.tap {
                    tap.read(buffer.filled());
                }
                session.receive(buffer.filled());
                Poll::Ready(Ok(true))
            }
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Pending if wrote => Poll::Ready(Ok(true)),
            Poll::Pending => Poll::Pending,
        }
    }

    /// Writes what there is to write; tells whether that made any progress.
    fn poll_writes(
        &mut self,
        session: &mut ClientSession,
        cx: &mut Context<'_>,
    ) -> io::Result<bool> {
        let mut wrote = false;
        while session.wants_write() {
            let mut slices = [IoSlice::new(&[]); SLICES];
            let count = session.transmit(&mut slices);
            match self
                .stream
                .poll_write(cx, slices.get(..count).unwrap_or_default())
            {
                Poll::Ready(Ok(0)) => return Err(io::ErrorKind::WriteZero.into()),
                Poll::Ready(Ok(written)) => {
                    if let Some(tap) = &mut self.tap {
                        tap.wrote(slices.get(..count).unwrap_or_default(), written);
                    }
                    session.advance(written);
                    (wrote, self.unflushed) = (true, true);
                }
                Poll::Ready(Err(error)) => return Err(error),
                Poll::Pending => break,
            }
        }
        if self.unflushed
            && let Poll::Ready(flushed) = self.stream.poll_flush(cx)
        {
            flushed?;
            self.unflushed = false;
        }
        Ok(wrote)
    }
}

/// Closes our side, then reads what is left until the peer has closed its own.
///
/// After TLS the rest is read beside it: a peer may go on in plaintext (Exim does after 421), and
/// nobody wants to know what it says.
async fn part(stream: &mut Stream, buffer: &mut [u8]) -> io::Result<()> {
    let socket = match stream {
        Stream::Plain(stream) => {
            stream.shutdown().await?;
            stream
        }
        Stream::Tls(stream) => {
            stream.shutdown().await?;
            stream.get_mut().0
        }
    };
    while socket.read(buffer).await? > 0 {}
    Ok(())
}
