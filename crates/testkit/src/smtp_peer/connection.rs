//! One connection of a peer: reading, asking the temper, writing.
//!
//! Replies to a pipelined group leave in one write, as late as they may: when there is nothing
//! more to answer, or before a delay.

use std::io;
use std::net::SocketAddr;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use smtp::{ServerEvent, ServerSession};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::time::Instant;
use tokio_rustls::TlsAcceptor;

use super::record::digest;
use super::{Answer, Counts, Keep, PeerStream, Question, Received, Shared, Temper, lock};

/// Room made in the input buffer for each read.
const READ_BYTES: usize = 64 * 1024;

/// How long a closing peer goes on reading, so that its last reply is not lost to a reset.
const LINGER: Duration = Duration::from_secs(1);

/// Why a stream is no longer served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// Close it.
    Close,
    /// Close it by RST.
    Reset,
    /// Do the TLS handshake.
    Upgrade,
}

pub(super) struct Connection<S> {
    stream: Option<S>,
    dialogue: Dialogue,
}

struct Dialogue {
    session: ServerSession,
    temper: Arc<Temper>,
    shared: Arc<Shared>,
    from: SocketAddr,
    number: u64,
    /// Counted among those that are open.
    open: bool,
    messages: u64,
    mail_at: Instant,
    ahead: u64,
}

impl<S: PeerStream> Connection<S> {
    pub(super) fn new(
        stream: S,
        from: SocketAddr,
        temper: Arc<Temper>,
        shared: Arc<Shared>,
    ) -> Self {
        let mut number = 0;
        shared.counts.send_modify(|counts| {
            counts.connections += 1;
            counts.open += 1;
            counts.peak = counts.peak.max(counts.open);
            number = counts.connections;
        });
        let session = ServerSession::new(Arc::new(temper.server.clone()));
        Self {
            stream: Some(stream),
            dialogue: Dialogue {
                session,
                temper,
                shared,
                from,
                number,
                open: true,
                messages: 0,
                mail_at: Instant::now(),
                ahead: 0,
            },
        }
    }

    /// Serves the connection to its end.
    pub(super) async fn run(mut self) {
        let Some(stream) = self.stream.take() else {
            return;
        };
        // What a peer does with its own connection's errors is of no interest to anybody.
        if let Err(error) = self.serve(stream).await {
            tracing::debug!(%error, from = %self.dialogue.from, "connection of a scripted peer ended");
        }
    }

    async fn serve(&mut self, mut stream: S) -> io::Result<()> {
        stream.prepare()?;
        let end = self.dialogue.talk(&mut stream).await?;
        if end != End::Upgrade {
            self.dialogue.closes();
        }
        match end {
            End::Close => close(&mut stream).await,
            End::Reset => stream.reset(),
            End::Upgrade => self.serve_tls(stream).await,
        }
    }

    async fn serve_tls(&mut self, stream: S) -> io::Result<()> {
        let Some(config) = self.dialogue.temper.tls.as_ref() else {
            return Ok(());
        };
        let acceptor = TlsAcceptor::from(Arc::clone(config));
        let mut stream = match acceptor.accept(stream).await {
            Ok(stream) => stream,
            Err(error) => {
                self.dialogue.count(|counts| counts.tls_failed += 1);
                return Err(error);
            }
        };
        self.dialogue.count(|counts| counts.tls += 1);
        self.dialogue.session.tls_established();
        let end = self.dialogue.talk(&mut stream).await?;
        self.dialogue.closes();
        match end {
            End::Close | End::Upgrade => close(&mut stream).await,
            End::Reset => stream.get_mut().0.reset(),
        }
    }
}

impl<S> Drop for Connection<S> {
    fn drop(&mut self) {
        self.dialogue.closes();
    }
}

impl Dialogue {
    async fn talk(
        &mut self,
        stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    ) -> io::Result<End> {
        loop {
            while let Some(event) = self.session.poll_event() {
                if let ControlFlow::Break(end) = self.handle(event, stream).await? {
                    return Ok(end);
                }
            }
            self.note_sent_ahead();
            self.flush(stream).await?;
            if self.session.is_closing() {
                return Ok(End::Close);
            }
            let input = self.session.input();
            input.reserve(READ_BYTES);
            if stream.read_buf(input).await? == 0 {
                return Ok(End::Close);
            }
        }
    }

    async fn flush(&mut self, stream: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
        let output = self.session.output();
        if output.is_empty() {
            return Ok(());
        }
        stream.write_all_buf(output).await?;
        stream.flush().await
    }

    async fn handle(
        &mut self,
        event: ServerEvent,
        stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    ) -> io::Result<ControlFlow<End>> {
        let answer = self.decide(event);
        let delay = self.temper.delay(event);
        if delay > Duration::ZERO {
            self.flush(stream).await?;
            tokio::time::sleep(delay).await;
        }
        let answer = self.receive(event, answer).await;
        match answer {
            Answer::Reply(code, text) => self.session.answer(code, &text),
            Answer::Disconnect | Answer::Reset | Answer::AcceptAndReset => {
                self.flush(stream).await?;
                let close = matches!(answer, Answer::Disconnect);
                return Ok(ControlFlow::Break(if close {
                    End::Close
                } else {
                    End::Reset
                }));
            }
            Answer::Silence => {
                self.flush(stream).await?;
                drain(stream).await?;
                return Ok(ControlFlow::Break(End::Close));
            }
        }
        if event == ServerEvent::StartTls && self.session.is_handshake_due() {
            self.flush(stream).await?;
            return Ok(ControlFlow::Break(End::Upgrade));
        }
        Ok(ControlFlow::Continue(()))
    }

    fn decide(&mut self, event: ServerEvent) -> Answer {
        if event == ServerEvent::Mail {
            self.mail_at = Instant::now();
        }
        let session = &self.session;
        let answer = self.temper.decide(&Question {
            event,
            reverse_path: session.reverse_path(),
            recipient: if event == ServerEvent::Rcpt {
                session.recipient()
            } else {
                ""
            },
            recipients: session.recipients(),
            content: if event == ServerEvent::Message {
                session.message()
            } else {
                &[]
            },
            connection: self.number,
            messages: self.messages,
        });
        match event {
            ServerEvent::Mail => self.count(|counts| counts.mails += 1),
            ServerEvent::Rcpt if !answer.accepts() => {
                self.count(|counts| counts.refused_recipients += 1);
            }
            ServerEvent::Message if !answer.accepts() => {
                self.count(|counts| counts.refused_messages += 1);
            }
            _ => {}
        }
        answer
    }

    /// Records an accepted message; the answer may change if it cannot be passed on.
    async fn receive(&mut self, event: ServerEvent, answer: Answer) -> Answer {
        if event != ServerEvent::Message || !answer.accepts() {
            return answer;
        }
        let bytes = self.session.message().len() as u64;
        let recipients = self.session.recipients().len() as u64;
        let Some((kept, digest)) = self.record().await else {
            self.count(|counts| counts.refused_messages += 1);
            return Answer::reply(451, "4.3.0 nobody takes it");
        };
        self.messages += 1;
        self.count(|counts| {
            counts.messages += 1;
            counts.recipients += recipients;
            counts.bytes += bytes;
            counts.not_kept += u64::from(!kept);
            counts.digest = counts.digest.wrapping_add(digest);
        });
        answer
    }

    /// Keeps what is to be kept: whether there was room, and the digest; `None` if the receiver of
    /// [`Temper::forwarding`] is gone.
    async fn record(&mut self) -> Option<(bool, u64)> {
        let keep = self.shared.keep;
        let sum = match keep {
            Keep::Digest | Keep::PerRecipient(_) => digest(self.session.message()),
            Keep::Messages(_) | Keep::Nothing => 0,
        };
        let forward = self.temper.forward.clone();
        let whole = forward.is_some() || matches!(keep, Keep::Messages(_));
        let received = whole.then(|| self.received());
        if let (Some(to), Some(received)) = (forward, &received) {
            to.send(received.clone()).await.ok()?;
        }
        let kept = match (keep, received) {
            (Keep::Messages(max), Some(received)) => lock(&self.shared.record).keep(received, max),
            (Keep::PerRecipient(max), _) => {
                lock(&self.shared.record).count_copies(self.session.recipients(), sum, max)
            }
            (Keep::Messages(_), None) | (Keep::Digest | Keep::Nothing, _) => true,
        };
        Some((kept, sum))
    }

    fn received(&mut self) -> Received {
        Received {
            reverse_path: self.session.reverse_path().to_owned(),
            recipients: self.session.recipients().to_vec(),
            client: self.session.client_name().to_owned(),
            tls: self.session.is_tls(),
            from: self.from,
            connection: self.number,
            mail_at: self.mail_at,
            content: self.session.take_message(),
        }
    }

    fn note_sent_ahead(&mut self) {
        let ahead = self.session.sent_ahead();
        if ahead > self.ahead {
            let more = ahead - self.ahead;
            self.ahead = ahead;
            self.count(|counts| counts.sent_ahead += more);
        }
    }

    /// Counts the connection as no longer open, before the client can see that it is: whoever
    /// waits for the end of one before the next never has more than one.
    fn closes(&mut self) {
        if std::mem::take(&mut self.open) {
            self.count(|counts| counts.open -= 1);
        }
    }

    fn count(&self, change: impl FnOnce(&mut Counts)) {
        self.shared.counts.send_modify(change);
    }
}

/// Closes in order: a close with bytes unread would be a reset, which takes the last reply along.
async fn close(stream: &mut (impl AsyncRead + AsyncWrite + Unpin)) -> io::Result<()> {
    stream.shutdown().await?;
    match tokio::time::timeout(LINGER, drain(stream)).await {
        Ok(drained) => drained,
        Err(_) => Ok(()),
    }
}

/// Reads and forgets until the client is gone.
async fn drain(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<()> {
    let mut bytes = [0; 4096];
    while stream.read(&mut bytes).await? > 0 {}
    Ok(())
}
