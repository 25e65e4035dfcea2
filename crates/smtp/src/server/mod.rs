//! The server side of an SMTP connection, without the connection.
//!
//! [`ServerSession`] owns syntax, order of commands, limits and the end of
//! content; the caller decides each answer that is a matter of policy. It
//! serves the sandbox, the load test's sink and the inbound listener.
//!
//! The caller drives it: put what was read into [`ServerSession::receive`];
//! call [`ServerSession::poll_event`] and [`ServerSession::answer`] until there
//! is no event; write [`ServerSession::output`]; close when
//! [`ServerSession::is_closing`] and all is written. Answers to a pipelined
//! group collect in the output, so that one write serves them all.

mod auth;
mod commands;
mod content;

use std::sync::Arc;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use memchr::memchr;

use content::{Content, DataReader};

/// Bytes of a command line with its CRLF (RFC 5321 §4.5.3.1.4 asks for 512,
/// extensions for more).
pub const LINE_MAX: usize = 2 * 1024;

/// Errors after which a client is sent away.
const ERRORS_MAX: u32 = 20;

/// What a server offers and takes.
#[derive(Debug, Clone)]
pub struct ServerConfig {
    /// Its name, in greeting and EHLO.
    pub host: String,
    /// Offer PIPELINING (RFC 2920).
    pub pipelining: bool,
    /// Offer 8BITMIME (RFC 6152).
    pub eight_bit_mime: bool,
    /// Offer SMTPUTF8 (RFC 6531).
    pub smtp_utf8: bool,
    /// Offer CHUNKING (RFC 3030).
    pub chunking: bool,
    /// Offer STARTTLS (RFC 3207) while the connection is in plaintext.
    pub starttls: bool,
    /// Know EHLO at all.
    pub ehlo: bool,
    /// Take mail only from who can show this, by AUTH PLAIN or LOGIN (RFC 4954): user and password.
    pub login: Option<(String, String)>,
    /// Transactions of one connection; announced as LIMITS MAILMAX (RFC 9422), 421 beyond.
    pub mails_max: Option<u32>,
    /// Largest message in bytes; announced as SIZE (RFC 1870).
    pub message_max: usize,
    /// Recipients of one transaction.
    pub recipients_max: usize,
    /// Refuse content with a bare CR or LF (550 5.6.11). It never ends DATA.
    pub refuse_bare_newlines: bool,
    /// Ask for content although no recipient was accepted, as RFC 2920 §3.1
    /// warns that some servers do.
    pub data_without_recipients: bool,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            host: "localhost".to_owned(),
            pipelining: true,
            eight_bit_mime: true,
            smtp_utf8: true,
            chunking: true,
            starttls: false,
            ehlo: true,
            login: None,
            mails_max: None,
            message_max: 32 * 1024 * 1024,
            recipients_max: 1_000,
            refuse_bare_newlines: true,
            data_without_recipients: false,
        }
    }
}

/// A question for the caller, who must [`ServerSession::answer`] it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServerEvent {
    /// A client connected: answer with the greeting, `220 host`.
    Connected,
    /// EHLO or HELO, [`ServerSession::client_name`]. A 250 lists the extensions.
    Hello,
    /// STARTTLS. After a 220 is written do the handshake, then call
    /// [`ServerSession::tls_established`].
    StartTls,
    /// MAIL FROM [`ServerSession::reverse_path`].
    Mail,
    /// RCPT TO [`ServerSession::recipient`].
    Rcpt,
    /// DATA, with at least one recipient: answer 354, or refuse.
    Data,
    /// The content is complete: [`ServerSession::message`].
    Message,
    /// QUIT: answer 221.
    Quit,
}

/// What the stream holds next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Command,
    /// The rest of a line that was too long.
    LongLine,
    Data(DataReader),
    Bdat {
        left: u64,
        last: bool,
        /// False: refused already, the bytes only have to go.
        keep: bool,
    },
    /// The next line answers a challenge.
    Auth(auth::Step),
    Handshake,
    Closing,
}

/// A server session; see the [module](self) for how to drive it.
#[derive(Debug)]
pub struct ServerSession {
    config: Arc<ServerConfig>,
    mode: Mode,
    /// Asked and not answered.
    pending: Option<ServerEvent>,
    /// Event to hand out.
    event: Option<ServerEvent>,
    input: BytesMut,
    output: BytesMut,
    tls: bool,
    extended: bool,
    client_name: String,
    mail: bool,
    reverse_path: String,
    mail_size: u64,
    /// Strings are reused from message to message; the first `accepted` count.
    recipients: Vec<String>,
    accepted: usize,
    /// BDAT was used in this transaction.
    chunked: bool,
    content: Content,
    errors: u32,
    ahead: u64,
    /// MAIL commands taken.
    mails: u32,
    /// Who the client says to be, while it has not shown it.
    claimed: String,
    user: Option<String>,
}

impl ServerSession {
    /// A session on a fresh connection; its first event is [`ServerEvent::Connected`].
    #[must_use]
    pub fn new(config: Arc<ServerConfig>) -> Self {
        Self {
            config,
            mode: Mode::Command,
            pending: Some(ServerEvent::Connected),
            event: Some(ServerEvent::Connected),
            input: BytesMut::new(),
            output: BytesMut::new(),
            tls: false,
            extended: false,
            client_name: String::new(),
            mail: false,
            reverse_path: String::new(),
            mail_size: 0,
            recipients: Vec::new(),
            accepted: 0,
            chunked: false,
            content: Content::default(),
            errors: 0,
            ahead: 0,
            mails: 0,
            claimed: String::new(),
            user: None,
        }
    }

    /// Takes bytes that were read, decrypted where TLS is on.
    pub fn receive(&mut self, bytes: &[u8]) {
        if self.mode != Mode::Closing {
            self.input.put_slice(bytes);
        }
    }

    /// The buffer to read into, instead of [`Self::receive`]. Append only, and
    /// only after all events were answered: then at most one line is in it.
    pub fn input(&mut self) -> &mut BytesMut {
        &mut self.input
    }

    /// What is to be written; take from its front what was.
    pub fn output(&mut self) -> &mut BytesMut {
        &mut self.output
    }

    /// No more will be read: write the output, then close.
    #[must_use]
    pub fn is_closing(&self) -> bool {
        self.mode == Mode::Closing
    }

    /// STARTTLS was granted: write the output, then do the handshake.
    #[must_use]
    pub fn is_handshake_due(&self) -> bool {
        self.mode == Mode::Handshake
    }

    /// The client's name in EHLO or HELO.
    #[must_use]
    pub fn client_name(&self) -> &str {
        &self.client_name
    }

    /// Whether the connection was upgraded by STARTTLS.
    #[must_use]
    pub fn is_tls(&self) -> bool {
        self.tls
    }

    /// Who the client has shown to be by AUTH.
    #[must_use]
    pub fn user(&self) -> Option<&str> {
        self.user.as_deref()
    }

    /// The reverse-path of the transaction; empty is the null one.
    #[must_use]
    pub fn reverse_path(&self) -> &str {
        &self.reverse_path
    }

    /// The size that MAIL declared, bytes; 0 if it did not.
    #[must_use]
    pub fn declared_size(&self) -> u64 {
        self.mail_size
    }

    /// The recipient that [`ServerEvent::Rcpt`] asks about.
    #[must_use]
    pub fn recipient(&self) -> &str {
        self.recipients
            .get(self.accepted)
            .map_or("", String::as_str)
    }

    /// Recipients accepted so far.
    #[must_use]
    pub fn recipients(&self) -> &[String] {
        self.recipients.get(..self.accepted).unwrap_or_default()
    }

    /// The content that [`ServerEvent::Message`] asks about.
    #[must_use]
    pub fn message(&self) -> &[u8] {
        &self.content.bytes
    }

    /// Takes the content away without copying it.
    pub fn take_message(&mut self) -> Bytes {
        self.content.bytes.split().freeze()
    }

    /// Commands that came before the client may have sent them: without
    /// PIPELINING offered, or behind one that must end a group (RFC 2920 §3.1).
    #[must_use]
    pub fn sent_ahead(&self) -> u64 {
        self.ahead
    }

    /// The next question, if what was received holds one.
    pub fn poll_event(&mut self) -> Option<ServerEvent> {
        while self.pending.is_none() && self.step() {}
        self.event.take()
    }

    /// Answers the last event. Lines of `text` are separated by `\n` and may
    /// begin with an enhanced status code; control characters are dropped.
    ///
    /// 421 closes the session whatever was asked. Without a question it is an
    /// unsolicited reply, as a server sends that shuts down.
    pub fn answer(&mut self, code: u16, text: &str) {
        self.event = None;
        let pending = self.pending.take();
        let positive = (200..300).contains(&code);
        if pending == Some(ServerEvent::Hello) && positive && self.extended {
            self.list_extensions(code, text);
        } else {
            self.reply(code, text);
        }
        if code == 421 {
            return self.close();
        }
        match pending {
            Some(ServerEvent::Connected) if !positive => self.close(),
            Some(ServerEvent::StartTls) if code == 220 => self.mode = Mode::Handshake,
            Some(ServerEvent::Mail) => self.mail = positive,
            Some(ServerEvent::Rcpt) if positive => self.accepted += 1,
            Some(ServerEvent::Data) if code == 354 => self.mode = Mode::Data(DataReader::default()),
            Some(ServerEvent::Message) => self.reset(),
            Some(ServerEvent::Quit) => self.close(),
            Some(ServerEvent::Connected | ServerEvent::Hello | ServerEvent::StartTls)
            | Some(ServerEvent::Rcpt | ServerEvent::Data)
            | None => {}
        }
    }

    /// The handshake succeeded; the client starts over with EHLO (RFC 3207 §4.2).
    pub fn tls_established(&mut self) {
        if self.mode == Mode::Handshake {
            self.mode = Mode::Command;
            self.tls = true;
            self.extended = false;
            self.client_name.clear();
            self.reset();
        }
    }

    /// Reads one thing from the input; false if it needs more, or a question
    /// came up.
    fn step(&mut self) -> bool {
        match self.mode {
            Mode::Command | Mode::Auth(_) => self.read_line(),
            Mode::LongLine => self.skip_line(),
            Mode::Data(reader) => self.read_data(reader),
            Mode::Bdat { left, last, keep } => self.read_chunk(left, last, keep),
            Mode::Handshake | Mode::Closing => false,
        }
    }

    fn read_line(&mut self) -> bool {
        let end = memchr(b'\n', &self.input).map(|lf| lf + 1);
        match end {
            Some(end) if end <= LINE_MAX => {
                let line = self.input.split_to(end);
                match self.mode {
                    Mode::Auth(step) => self.challenge_answered(step, &line),
                    _ => self.command(&line),
                }
                true
            }
            None if self.input.len() < LINE_MAX => false,
            _ => {
                self.mode = Mode::LongLine;
                true
            }
        }
    }

    fn skip_line(&mut self) -> bool {
        let Some(lf) = memchr(b'\n', &self.input) else {
            self.input.clear();
            return false;
        };
        self.input.advance(lf + 1);
        self.mode = Mode::Command;
        self.refuse(500, "5.5.2 line too long");
        true
    }

    fn read_data(&mut self, mut reader: DataReader) -> bool {
        let (taken, done) = reader.feed(&self.input, &mut self.content, self.config.message_max);
        self.input.advance(taken);
        self.mode = Mode::Data(reader);
        if done {
            self.mode = Mode::Command;
            self.content_complete();
        }
        done
    }

    fn read_chunk(&mut self, left: u64, last: bool, keep: bool) -> bool {
        let taken = usize::try_from(left)
            .unwrap_or(usize::MAX)
            .min(self.input.len());
        if keep {
            let chunk = self.input.get(..taken).unwrap_or_default();
            self.content.push(chunk, self.config.message_max);
        }
        self.input.advance(taken);
        let left = left.saturating_sub(taken as u64);
        if left > 0 {
            self.mode = Mode::Bdat { left, last, keep };
            return false;
        }
        self.mode = Mode::Command;
        if !keep {
            self.refuse(503, "5.5.1 no valid recipients");
        } else if last || self.content.too_large {
            self.content.find_bare_newlines();
            self.content_complete();
        } else {
            self.reply(250, "2.0.0 chunk received");
        }
        true
    }

    fn content_complete(&mut self) {
        if self.content.too_large {
            self.reply(552, "5.3.4 message too large");
        } else if self.content.bare_newline && self.config.refuse_bare_newlines {
            self.reply(550, "5.6.11 bare CR or LF in the content");
        } else if self.accepted == 0 {
            self.reply(554, "5.5.1 no valid recipients");
        } else {
            return self.ask(ServerEvent::Message);
        }
        self.reset();
    }

    fn ask(&mut self, event: ServerEvent) {
        self.pending = Some(event);
        self.event = Some(event);
    }

    /// Forgets the transaction (RFC 5321 §4.1.1.5).
    fn reset(&mut self) {
        (self.mail, self.chunked) = (false, false);
        (self.accepted, self.mail_size) = (0, 0);
        self.reverse_path.clear();
        self.content.clear();
    }

    fn close(&mut self) {
        self.mode = Mode::Closing;
        self.pending = None;
        self.input.clear();
    }

    /// Replies to a client's mistake, and ends with one that makes too many.
    fn refuse(&mut self, code: u16, text: &str) {
        self.errors += 1;
        if self.errors > ERRORS_MAX {
            self.reply(421, "4.7.0 too many errors");
            return self.close();
        }
        self.reply(code, text);
    }

    fn reply(&mut self, code: u16, text: &str) {
        let mut lines = text.split('\n').peekable();
        while let Some(line) = lines.next() {
            self.reply_line(code, lines.peek().is_none(), line);
        }
    }

    fn reply_line(&mut self, code: u16, last: bool, text: &str) {
        for divisor in [100, 10, 1] {
            self.output
                .put_u8(b'0' + u8::try_from(code / divisor % 10).unwrap_or_default());
        }
        self.output.put_u8(if last { b' ' } else { b'-' });
        self.output
            .extend(text.bytes().filter(|b| !b.is_ascii_control()));
        self.output.put_slice(b"\r\n");
    }

    fn list_extensions(&mut self, code: u16, text: &str) {
        let config = Arc::clone(&self.config);
        self.reply_line(code, false, text);
        let offered = [
            (config.pipelining, "PIPELINING"),
            (config.eight_bit_mime, "8BITMIME"),
            (config.smtp_utf8, "SMTPUTF8"),
            (config.chunking, "CHUNKING"),
            (config.starttls && !self.tls, "STARTTLS"),
            (config.login.is_some(), "AUTH PLAIN LOGIN"),
            (true, "ENHANCEDSTATUSCODES"),
        ];
        for (_, keyword) in offered.iter().filter(|(on, _)| *on) {
            self.reply_line(code, false, keyword);
        }
        if let Some(max) = config.mails_max {
            self.reply_line(code, false, &format!("LIMITS MAILMAX={max}"));
        }
        self.reply_line(code, true, &format!("SIZE {}", config.message_max));
    }
}

#[cfg(test)]
mod tests;
