//! The client side of an SMTP connection, without the connection.
//!
//! [`ClientSession`] owns the order of commands and the meaning of replies:
//! greeting, EHLO, STARTTLS, transactions, QUIT. With PIPELINING it sends a
//! whole envelope in one flight, and the next envelope right behind the end of
//! the content before it (RFC 2920); with CHUNKING the first message of a
//! connection is one flight in all (RFC 3030). At most one message at a time
//! has its end on the wire without a reply, so a lost connection leaves at most
//! one in doubt.
//!
//! It must not know batches, retries or time. The caller drives it:
//!
//! 1. hand what was read to [`ClientSession::receive`];
//! 2. drain [`ClientSession::poll_event`]; on [`Event::Ready`] and after each
//!    [`Event::TransactionDone`], [`ClientSession::begin`] the next one; on
//!    [`Event::BodyDue`] write the start record to the journal, then
//!    [`ClientSession::release`];
//! 3. write [`ClientSession::transmit`], tell [`ClientSession::advance`];
//! 4. wait for reading or writing, no longer than the deadline for
//!    [`ClientSession::waiting_for`], which starts anew whenever
//!    [`ClientSession::progress`] changes.

mod auth;
mod outbox;
mod outcome;
mod session;
mod transaction;

use std::collections::VecDeque;
use std::fmt;
use std::io::IoSlice;

use bytes::{Bytes, BytesMut};

use crate::body::Body;
use crate::capabilities::Capabilities;
use crate::command::{self, Hello};
use crate::reply::{Reply, ReplyParser};

use outbox::Outbox;
use transaction::{Progress, Transaction};

pub use auth::{Auth, Sasl, SaslStart};
pub use outcome::{BeginError, Interruption, Outcome, RefusedAt, Scope, SessionError};

/// Transactions a session holds: one whose final reply is awaited, and the next.
pub const TRANSACTIONS_MAX: usize = 2;

/// Command lines are cut from allocations of this many bytes.
const SCRATCH: usize = 1024;

/// The caller's name for a transaction, unique within a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TxId(pub u64);

/// From whom to whom (RFC 5321 §2.3.1). Borrowed: it is written at once.
#[derive(Debug, Clone, Copy)]
pub struct Envelope<'a> {
    /// Without angle brackets; empty is the null reverse-path.
    pub reverse_path: &'a str,
    /// Without angle brackets; at least one.
    pub recipients: &'a [&'a str],
    /// The headers need SMTPUTF8 (RFC 6531); addresses that need it are seen.
    pub smtp_utf8: bool,
}

/// Whether to upgrade the connection (RFC 3207).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum StartTls {
    /// Stay as the connection is: plaintext wanted, or TLS from the start.
    Never,
    /// When offered and granted.
    #[default]
    Opportunistic,
    /// Or end the session.
    Required,
}

/// What a session is waiting for; each has its own deadline
/// (RFC 5321 §4.5.3.2, in brackets what it asks for).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stage {
    /// The connection itself: before any session, so only callers name it.
    Connect,
    /// The peer's first word (5 min).
    Greeting,
    /// The reply to EHLO or HELO (5 min).
    Ehlo,
    /// The reply to STARTTLS, or the caller's handshake.
    StartTls,
    /// A reply of the AUTH dialogue (RFC 4954).
    Auth,
    /// The reply to MAIL, or to RSET before it (5 min).
    Mail,
    /// The reply to RCPT (5 min).
    Rcpt,
    /// The reply to DATA (2 min).
    Data,
    /// The peer to take more of the content (3 min for each write).
    DataBlock,
    /// The reply to the content (10 min).
    FinalDot,
    /// Nothing from the peer: it is the caller's turn.
    Idle,
    /// The reply to QUIT.
    Quit,
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Connect => "connect",
            Self::Greeting => "greeting",
            Self::Ehlo => "EHLO",
            Self::StartTls => "STARTTLS",
            Self::Auth => "AUTH",
            Self::Mail => "MAIL",
            Self::Rcpt => "RCPT",
            Self::Data => "DATA",
            Self::DataBlock => "content",
            Self::FinalDot => "end of content",
            Self::Idle => "idle",
            Self::Quit => "QUIT",
        })
    }
}

/// What the caller must know or do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// STARTTLS was granted: do the handshake, then call
    /// [`ClientSession::tls_established`], or [`ClientSession::interrupted`].
    HandshakeDue,
    /// AUTH asks for something: call [`ClientSession::answer_challenge`], off the threads that serve
    /// connections, as it may compute for a second.
    ChallengeDue,
    /// Transactions can begin; [`ClientSession::capabilities`] is final.
    Ready,
    /// The content of this transaction goes next, with its end. Journal first,
    /// then [`ClientSession::release`] it.
    BodyDue(TxId),
    /// The transaction is over.
    TransactionDone {
        /// Which.
        id: TxId,
        /// Applies to every recipient not in `refused`.
        outcome: Outcome,
        /// Recipients refused on their own, by index, with the reply.
        refused: Vec<(usize, Reply)>,
    },
    /// The session is over, close the connection; `None` after a QUIT.
    /// Every open transaction was reported before.
    Closed(Option<SessionError>),
}

/// Where the session as a whole stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Greeting,
    Hello,
    StartTls,
    /// The caller does the handshake; no SMTP byte may come.
    Handshake,
    Auth,
    Ready,
    Quitting,
    Closed,
}

/// What a reply will answer, in the order of sending.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expect {
    Greeting,
    Hello(Hello),
    StartTls,
    Auth,
    Rset,
    Mail(TxId),
    Rcpt(TxId),
    Data(TxId),
    FinalDot(TxId),
    Quit,
}

impl Expect {
    fn stage(self) -> Stage {
        match self {
            Self::Greeting => Stage::Greeting,
            Self::Hello(_) => Stage::Ehlo,
            Self::StartTls => Stage::StartTls,
            Self::Auth => Stage::Auth,
            Self::Rset | Self::Mail(_) => Stage::Mail,
            Self::Rcpt(_) => Stage::Rcpt,
            Self::Data(_) => Stage::Data,
            Self::FinalDot(_) => Stage::FinalDot,
            Self::Quit => Stage::Quit,
        }
    }

    fn transaction(self) -> Option<TxId> {
        match self {
            Self::Mail(id) | Self::Rcpt(id) | Self::Data(id) | Self::FinalDot(id) => Some(id),
            Self::Greeting
            | Self::Hello(_)
            | Self::StartTls
            | Self::Auth
            | Self::Rset
            | Self::Quit => None,
        }
    }
}

/// A client session; see the [module](self) for how to drive it.
#[derive(Debug)]
pub struct ClientSession {
    state: State,
    ehlo_name: String,
    starttls: StartTls,
    tls: bool,
    tls_refused: Option<Reply>,
    /// What is still to be done to be let in.
    auth: Option<Auth>,
    /// What AUTH asked for last, unanswered.
    challenge: Option<Reply>,
    refuses_itself: bool,
    capabilities: Capabilities,
    parser: ReplyParser,
    /// What replies will answer, each with the position at which its command ends.
    expected: VecDeque<(Expect, u64)>,
    transactions: VecDeque<Transaction>,
    /// Transactions begun on this connection, against MAILMAX.
    begun: u32,
    /// The server may hold an unfinished transaction: RSET goes first.
    dirty: bool,
    outbox: Outbox,
    scratch: BytesMut,
    events: VecDeque<Event>,
    progress: u64,
}

impl ClientSession {
    /// A session on a fresh connection, waiting for the greeting.
    ///
    /// A bad `ehlo_name` ends it when EHLO is due, with [`SessionError::Hello`].
    #[must_use]
    pub fn new(ehlo_name: &str, starttls: StartTls) -> Self {
        Self {
            state: State::Greeting,
            ehlo_name: ehlo_name.to_owned(),
            starttls,
            tls: false,
            tls_refused: None,
            auth: None,
            challenge: None,
            refuses_itself: false,
            capabilities: Capabilities::default(),
            parser: ReplyParser::new(),
            expected: VecDeque::from([(Expect::Greeting, 0)]),
            transactions: VecDeque::with_capacity(TRANSACTIONS_MAX),
            begun: 0,
            dirty: false,
            outbox: Outbox::default(),
            scratch: BytesMut::with_capacity(SCRATCH),
            events: VecDeque::new(),
            progress: 0,
        }
    }

    /// Says who we are before the first transaction, or ends the session (RFC 4954).
    #[must_use]
    pub fn with_auth(mut self, auth: Auth) -> Self {
        self.auth = Some(auth);
        self
    }

    /// The connection is encrypted from its first byte (RFC 8314): there is no STARTTLS.
    #[must_use]
    pub fn within_tls(mut self) -> Self {
        self.tls = true;
        self
    }

    /// Ends the session with [`SessionError::Loop`] when the server has our own name: mail that an
    /// MX record leads back to us would go round for ever. A name without a dot is nobody's own.
    #[must_use]
    pub fn refusing_itself(mut self) -> Self {
        self.refuses_itself = self.ehlo_name.contains('.');
        self
    }

    /// What the server offers; nothing before [`Event::Ready`].
    #[must_use]
    pub fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    /// Whether the connection was upgraded by STARTTLS.
    #[must_use]
    pub fn is_tls(&self) -> bool {
        self.tls
    }

    /// The reply that refused STARTTLS, when the session went on without.
    #[must_use]
    pub fn tls_refused(&self) -> Option<&Reply> {
        self.tls_refused.as_ref()
    }

    /// What the session is waiting for, hence which deadline applies.
    #[must_use]
    pub fn waiting_for(&self) -> Stage {
        match self.state {
            State::Handshake => return Stage::StartTls,
            State::Closed => return Stage::Idle,
            State::Greeting
            | State::Hello
            | State::StartTls
            | State::Auth
            | State::Ready
            | State::Quitting => {}
        }
        match self.expected.front() {
            Some((Expect::FinalDot(_), end)) if !self.outbox.has_written(*end) => Stage::DataBlock,
            Some((expect, _)) => expect.stage(),
            None => Stage::Idle,
        }
    }

    /// Changes whenever the deadline of [`Self::waiting_for`] starts anew: with
    /// each complete reply, and with each write of content.
    #[must_use]
    pub fn progress(&self) -> u64 {
        self.progress
    }

    /// Whether [`Self::begin`] has room for a transaction now.
    #[must_use]
    pub fn can_begin(&self) -> bool {
        self.room().is_ok()
    }

    /// Transactions begun and not reported yet.
    #[must_use]
    pub fn open_transactions(&self) -> usize {
        self.transactions.len()
    }

    /// Whether the session is over; the connection is to be closed.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.state == State::Closed
    }

    /// Whether the server takes no further transaction on this connection (MAILMAX, RFC 9422).
    #[must_use]
    pub fn is_exhausted(&self) -> bool {
        let max = self.capabilities.mail_max;
        max.is_some_and(|max| self.begun >= max)
    }

    fn room(&self) -> Result<(), BeginError> {
        if self.state != State::Ready {
            return Err(BeginError::NotReady);
        }
        if self.is_exhausted() {
            return Err(BeginError::Exhausted);
        }
        // Without PIPELINING nothing of the next can be sent before the last reply to this one: begun
        // now it would only be older when it is.
        let most = if self.capabilities.pipelining {
            TRANSACTIONS_MAX
        } else {
            1
        };
        if self.transactions.len() >= most {
            return Err(BeginError::Busy);
        }
        Ok(())
    }

    /// Whether the server, by what it offers, can take such a message; another host may.
    ///
    /// # Errors
    /// What [`Self::begin`] would say, the session's own state aside.
    pub fn check(&self, envelope: &Envelope<'_>, body: &Body) -> Result<(), BeginError> {
        transaction::check(envelope, body, &self.capabilities)
    }

    /// Begins a transaction, or queues it behind the one under way.
    ///
    /// The caller hears of it again by [`Event::BodyDue`] and, always, by
    /// [`Event::TransactionDone`].
    ///
    /// # Errors
    /// [`BeginError`]: nothing was sent and no event will come.
    pub fn begin(
        &mut self,
        id: TxId,
        envelope: &Envelope<'_>,
        body: Body,
    ) -> Result<(), BeginError> {
        self.room()?;
        debug_assert!(
            self.transactions.iter().all(|tx| tx.id != id),
            "transaction ids are unique"
        );
        let transaction =
            Transaction::new(id, envelope, body, &self.capabilities, &mut self.scratch)?;
        self.transactions.push_back(transaction);
        self.begun = self.begun.saturating_add(1);
        self.pump();
        Ok(())
    }

    /// Lets the content of a transaction go, after [`Event::BodyDue`].
    ///
    /// False if it is not due (any more): with CHUNKING a refusal may have come
    /// meanwhile. Its [`Event::TransactionDone`] tells.
    pub fn release(&mut self, id: TxId) -> bool {
        let due = |tx: &&mut Transaction| tx.id == id && tx.progress == Progress::BodyDue;
        let Some(tx) = self.transactions.iter_mut().find(due) else {
            return false;
        };
        let body = tx.take_body();
        let slices = if tx.chunked {
            self.scratch.clear();
            command::bdat_last(&mut self.scratch, body.size());
            self.outbox.push(self.scratch.split().freeze());
            body.into_slices()
        } else {
            body.into_stuffed()
        };
        for slice in slices {
            self.outbox.push(slice);
        }
        let end = self.outbox.end();
        tx.progress = Progress::BodySent { end };
        self.expected.push_back((Expect::FinalDot(id), end));
        self.pump();
        true
    }

    /// Ends the session with QUIT once the open transactions are done; at once,
    /// without a word, when it has not become ready.
    pub fn quit(&mut self) {
        match self.state {
            State::Ready => {
                self.state = State::Quitting;
                self.pump();
            }
            State::Quitting | State::Closed => {}
            State::Greeting | State::Hello | State::StartTls | State::Handshake | State::Auth => {
                self.close(None)
            }
        }
    }

    /// What the caller must know next.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// Whether there is anything to write.
    #[must_use]
    pub fn wants_write(&self) -> bool {
        !self.outbox.is_empty()
    }

    /// Fills `slices` with what is to be written next, in order, and returns
    /// how many it filled.
    pub fn transmit<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        self.outbox.slices(slices)
    }

    /// Tells that `count` bytes of [`Self::transmit`] were written.
    ///
    /// From then on they count as possibly seen by the peer: a final dot that
    /// was not advanced over cannot be ambiguous.
    pub fn advance(&mut self, count: usize) {
        self.outbox.advance(count);
        self.progress = self.progress.wrapping_add(1);
    }

    /// Takes bytes that were read, decrypted where TLS is on.
    ///
    /// Everything that follows from them is in [`Self::poll_event`] and
    /// [`Self::transmit`].
    pub fn receive(&mut self, mut input: &[u8]) {
        while !input.is_empty() && self.state != State::Closed {
            if self.state == State::Handshake {
                return self.fail(SessionError::PlaintextAfterStartTls);
            }
            match self.parser.feed(&mut input) {
                Ok(Some(reply)) => self.replied(reply),
                Ok(None) => break,
                Err(error) => return self.fail(error.into()),
            }
        }
        self.pump();
    }

    /// The handshake after [`Event::HandshakeDue`] succeeded: everything learnt
    /// in plaintext is forgotten and EHLO is said again (RFC 3207 §4.2).
    pub fn tls_established(&mut self) {
        if self.state == State::Handshake {
            self.tls = true;
            self.capabilities = Capabilities::default();
            self.say_hello(Hello::Ehlo);
        }
    }

    /// Answers what AUTH asked for, after [`Event::ChallengeDue`].
    pub fn answer_challenge(&mut self) {
        if let Some(challenge) = self.challenge.take().filter(|_| self.state == State::Auth) {
            self.challenged(&challenge);
        }
    }

    /// Whether the peer has answered the MAIL of a transaction: then it has read it. One that is over
    /// has been answered, or never will be.
    #[must_use]
    pub fn is_mail_answered(&self, id: TxId) -> bool {
        let open = self.transactions.iter().find(|tx| tx.id == id);
        open.is_none_or(Transaction::is_mail_answered)
    }

    /// Tells that the connection is lost, or that its deadline passed.
    ///
    /// After a QUIT that is as good as a reply.
    pub fn interrupted(&mut self, interruption: Interruption) {
        let stage = self.waiting_for();
        if self.state == State::Quitting && stage == Stage::Quit {
            return self.close(None);
        }
        self.fail(match interruption {
            Interruption::Disconnected => SessionError::Disconnected { stage },
            Interruption::TimedOut => SessionError::TimedOut { stage },
            Interruption::Io(kind) => SessionError::Io { stage, kind },
            Interruption::Tls(text) => SessionError::TlsFailed(text),
        });
    }

    fn send(&mut self, bytes: Bytes, expect: Expect) {
        self.outbox.push(bytes);
        self.expected.push_back((expect, self.outbox.end()));
    }
}

#[cfg(test)]
mod tests;
