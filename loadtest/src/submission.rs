//! The same messages as a batch, submitted one by one over SMTP: for servers that take no batches.
//!
//! Each is made as the MTA makes it, personalised and with tracked links, so that what arrives at
//! the sink has the same size.

use crate::batch::Shape;
use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use content::{Content, RenderContext, Tracker};
use links::KeyRing;
use model::{BatchId, TrackingMode};
use service::clock::{Clock as _, SystemClock};
use smtp::client::{Event, StartTls};
use smtp::{Body, ClientSession, Envelope, Outcome, TxId};
use std::io::IoSlice;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

/// Where links lead; nothing listens there.
const TRACKER: &str = "http://127.0.0.1:8026";
/// Slices handed to the kernel in one write.
const SLICES: usize = 16;

/// What is submitted: made while it is sent, by whoever has a connection for it.
#[derive(Debug)]
struct Messages {
    shape: Shape,
    content: Content,
    context: RenderContext,
    next: AtomicU64,
}

/// Submits the recipients of `shape`, a message each, over this many connections at a time, each
/// kept to its end and pipelined as far as the server offers it.
///
/// # Errors
/// When the server refuses one, or a connection breaks.
pub async fn submit(server: SocketAddr, shape: &Shape, connections: usize) -> Result<()> {
    let messages = Arc::new(Messages::new(shape)?);
    let mut carriers = JoinSet::new();
    for _ in 0..connections {
        let messages = Arc::clone(&messages);
        carriers.spawn(async move { Carrier::new(server).await?.carry(&messages).await });
    }
    while let Some(ended) = carriers.join_next().await {
        ended.context("a connection's task died")??;
    }
    Ok(())
}

impl Messages {
    fn new(shape: &Shape) -> Result<Self> {
        let content = Content::compile(&shape.spec()?);
        let content = content.map_err(|errors| anyhow::anyhow!("our own content: {errors:?}"))?;
        let ring = KeyRing::parse(&KeyRing::file_text(&[7; 32]))?;
        let signer = ring.signer(Tracker::host(TRACKER), None);
        let tracker = Tracker::new(TRACKER, signer.context("the host is too long")?)?;
        Ok(Self {
            shape: shape.clone(),
            content,
            context: RenderContext {
                batch: BatchId::from_bytes([7; 16]),
                released_at: SystemClock.now(),
                tracker: Arc::new(tracker),
                mode: TrackingMode::Individual,
                proof: false,
            },
            next: AtomicU64::new(0),
        })
    }

    /// The number, recipient and body of the next message, until there is none.
    fn next(&self) -> Result<Option<(u64, String, Body)>> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        if number >= self.shape.recipients {
            return Ok(None);
        }
        let row = self.shape.row(number)?;
        let message = self.content.render(&row, &self.context)?;
        let body = Body::new(vec![Bytes::from(message.into_bytes())])?;
        Ok(Some((number, row.email.to_string(), body)))
    }
}

/// One connection.
struct Carrier {
    stream: TcpStream,
    session: ClientSession,
    ready: bool,
}

impl Carrier {
    async fn new(server: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect(server).await;
        let stream = stream.with_context(|| format!("cannot connect to {server}"))?;
        stream.set_nodelay(true)?;
        Ok(Self {
            stream,
            session: ClientSession::new("source.example", StartTls::Never),
            ready: false,
        })
    }

    async fn carry(mut self, messages: &Messages) -> Result<()> {
        let mut buffer = [0; 4096];
        loop {
            if self.hear()? {
                return Ok(());
            }
            self.begin(messages)?;
            self.write().await?;
            if self.session.wants_write() {
                continue;
            }
            let read = self.stream.read(&mut buffer).await?;
            ensure!(read > 0, "the server hung up");
            self.session.receive(buffer.get(..read).unwrap_or_default());
        }
    }

    /// Whether the session is over.
    fn hear(&mut self) -> Result<bool> {
        while let Some(event) = self.session.poll_event() {
            match event {
                Event::Ready => self.ready = true,
                Event::BodyDue(id) => drop(self.session.release(id)),
                Event::TransactionDone { outcome, .. } => match outcome {
                    Outcome::Delivered(_) => {}
                    other => bail!("a message was not taken: {other:?}"),
                },
                Event::Closed(None) => return Ok(true),
                Event::Closed(Some(error)) => return Err(error.into()),
                Event::HandshakeDue | Event::ChallengeDue => bail!("TLS or AUTH, unasked"),
            }
        }
        Ok(false)
    }

    fn begin(&mut self, messages: &Messages) -> Result<()> {
        while self.ready && self.session.can_begin() {
            let Some((number, recipient, body)) = messages.next()? else {
                self.ready = false;
                self.session.quit();
                break;
            };
            let envelope = Envelope {
                reverse_path: &messages.shape.from,
                recipients: &[&recipient],
                smtp_utf8: false,
            };
            self.session.begin(TxId(number), &envelope, body)?;
        }
        Ok(())
    }

    async fn write(&mut self) -> Result<()> {
        while self.session.wants_write() {
            let mut slices = [IoSlice::new(&[]); SLICES];
            let count = self.session.transmit(&mut slices);
            let some = slices.get(..count).unwrap_or_default();
            let written = self.stream.write_vectored(some).await?;
            ensure!(written > 0, "the server takes no more");
            self.session.advance(written);
        }
        Ok(())
    }
}
