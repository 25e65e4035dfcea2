//! What a reply leads to, and what is sent next.
//!
//! The branching of the client session is all here; what a transaction
//! remembers is in [`super::transaction`].

use bytes::Bytes;

use super::auth;
use super::transaction::{Progress, Transaction};
use super::{
    ClientSession, Event, Expect, Outcome, RefusedAt, SessionError, Stage, StartTls, State, TxId,
};
use crate::capabilities::Capabilities;
use crate::command::{self, Hello};
use crate::reply::Reply;

impl ClientSession {
    /// Takes one complete reply to where it belongs.
    pub(super) fn replied(&mut self, reply: Reply) {
        self.progress = self.progress.wrapping_add(1);
        let stage = self.waiting_for();
        let Some(&(expect, end)) = self.expected.front() else {
            return self.fail(closing_or_unexpected(Stage::Idle, reply));
        };
        if !self.outbox.has_written(end) {
            return self.replied_early(expect, stage, reply);
        }
        self.expected.pop_front();
        if reply.code == 421 && expect != Expect::Quit {
            if let Expect::FinalDot(id) = expect
                && let Some(tx) = self.transaction(id)
            {
                // Replies come in order: a peer that had accepted would have said so.
                tx.refuse(RefusedAt::FinalDot, reply.clone());
            }
            return self.fail(SessionError::Closing { stage, reply });
        }
        match expect {
            Expect::Greeting => self.greeted(reply),
            Expect::Hello(verb) => self.hello_replied(verb, reply),
            Expect::StartTls => self.starttls_replied(reply),
            Expect::Auth => self.auth_replied(reply),
            Expect::Quit => self.close(None),
            Expect::Rset if reply.is_positive() => {}
            Expect::Rset => self.fail(SessionError::Refused { stage, reply }),
            Expect::Data(id) => self.data_replied(id, reply),
            Expect::Mail(_) | Expect::Rcpt(_) | Expect::FinalDot(_) if reply.is_intermediate() => {
                // What was sent may have been taken for something else.
                self.fail(SessionError::UnexpectedReply { stage, reply });
            }
            Expect::Mail(id) => self.transaction_replied(id, |tx| tx.mail_replied(reply)),
            Expect::Rcpt(id) => self.transaction_replied(id, |tx| tx.rcpt_replied(reply)),
            Expect::FinalDot(id) => self.body_replied(id, reply),
        }
    }

    /// A reply before its command has left whole: to nothing, or to half of a
    /// message.
    fn replied_early(&mut self, expect: Expect, stage: Stage, reply: Reply) {
        if let Expect::FinalDot(id) = expect
            && stage == Stage::DataBlock
            && reply.code != 421
            && (reply.is_transient() || reply.is_permanent())
            && let Some(tx) = self.transaction(id)
        {
            // Refused before its end. The end is now never sent, since it is
            // unknown whether the peer still reads content or commands.
            tx.refuse(RefusedAt::FinalDot, reply.clone());
        }
        self.fail(closing_or_unexpected(stage, reply));
    }

    fn greeted(&mut self, reply: Reply) {
        let name = reply.lines().next().and_then(|line| line.split(' ').next());
        if reply.code == 220 && self.is_own_name(name.unwrap_or_default()) {
            self.fail(SessionError::Loop);
        } else if reply.code == 220 {
            self.say_hello(Hello::Ehlo);
        } else if reply.is_transient() || reply.is_permanent() {
            self.fail(SessionError::Refused {
                stage: Stage::Greeting,
                reply,
            });
        } else {
            self.fail(SessionError::UnexpectedReply {
                stage: Stage::Greeting,
                reply,
            });
        }
    }

    fn is_own_name(&self, name: &str) -> bool {
        let name = name.trim_end_matches('.');
        self.refuses_itself && name.eq_ignore_ascii_case(&self.ehlo_name)
    }

    pub(super) fn say_hello(&mut self, verb: Hello) {
        self.state = State::Hello;
        self.scratch.clear();
        match command::hello(&mut self.scratch, verb, &self.ehlo_name) {
            Ok(()) => {
                let line = self.scratch.split().freeze();
                self.send(line, Expect::Hello(verb));
            }
            Err(error) => self.fail(SessionError::Hello(error)),
        }
    }

    fn hello_replied(&mut self, verb: Hello, reply: Reply) {
        if reply.is_positive() {
            if verb == Hello::Ehlo {
                self.capabilities = Capabilities::parse(&reply);
            }
            if self.is_own_name(&self.capabilities.host) {
                return self.fail(SessionError::Loop);
            }
            self.decide_tls();
        } else if verb == Hello::Ehlo && reply.is_permanent() {
            // Servers refuse what they do not know with whatever code they like. One that refuses
            // us refuses HELO as well, and that reply counts.
            self.say_hello(Hello::Helo);
        } else if reply.is_intermediate() {
            self.fail(SessionError::UnexpectedReply {
                stage: Stage::Ehlo,
                reply,
            });
        } else {
            self.fail(SessionError::Refused {
                stage: Stage::Ehlo,
                reply,
            });
        }
    }

    fn decide_tls(&mut self) {
        match self.starttls {
            StartTls::Opportunistic | StartTls::Required
                if !self.tls && self.capabilities.starttls =>
            {
                self.state = State::StartTls;
                self.send(Bytes::from_static(b"STARTTLS\r\n"), Expect::StartTls);
            }
            StartTls::Required if !self.tls => self.fail(SessionError::TlsNotOffered),
            StartTls::Never | StartTls::Opportunistic | StartTls::Required => self.become_ready(),
        }
    }

    fn become_ready(&mut self) {
        if self.auth.is_some() {
            return self.authenticate();
        }
        self.state = State::Ready;
        self.events.push_back(Event::Ready);
    }

    fn starttls_replied(&mut self, reply: Reply) {
        if reply.code == 220 {
            self.state = State::Handshake;
            self.events.push_back(Event::HandshakeDue);
        } else if self.starttls == StartTls::Required {
            self.fail(SessionError::TlsRefused(reply));
        } else if reply.is_transient() || reply.is_permanent() {
            self.tls_refused = Some(reply);
            self.become_ready();
        } else {
            self.fail(SessionError::UnexpectedReply {
                stage: Stage::StartTls,
                reply,
            });
        }
    }

    /// Begins the AUTH dialogue (RFC 4954 §4).
    fn authenticate(&mut self) {
        let Some(auth) = self.auth.as_mut() else {
            return;
        };
        if !self.tls && !auth.in_plaintext {
            return self.fail(SessionError::AuthWithoutTls);
        }
        let Some(start) = auth.sasl.start(&self.capabilities.auth) else {
            return self.fail(SessionError::AuthNotOffered);
        };
        let line = match &start.initial {
            Some(response) => format!("AUTH {} {}\r\n", start.mechanism, auth::encoded(response)),
            None => format!("AUTH {}\r\n", start.mechanism),
        };
        self.state = State::Auth;
        self.send(Bytes::from(line), Expect::Auth);
    }

    fn auth_replied(&mut self, reply: Reply) {
        if reply.code == 235 {
            if !self.auth.take().is_some_and(|auth| auth.sasl.is_proven()) {
                return self.fail(SessionError::AuthUnproven);
            }
            self.become_ready();
        } else if reply.code == 334 {
            self.challenge = Some(reply);
            self.events.push_back(Event::ChallengeDue);
        } else if reply.is_transient() || reply.is_permanent() {
            self.fail(SessionError::AuthRefused(reply));
        } else {
            self.fail(SessionError::UnexpectedReply {
                stage: Stage::Auth,
                reply,
            });
        }
    }

    /// Answers a 334.
    pub(super) fn challenged(&mut self, challenge: &Reply) {
        let Some(auth) = self.auth.as_mut() else {
            return;
        };
        match auth.answer(challenge) {
            Some(line) => self.send(Bytes::from(line + "\r\n"), Expect::Auth),
            // Nothing to say: the dialogue is cancelled, and the refusal of that is what is told.
            None if auth.sasl.is_proven() => {
                self.send(Bytes::from_static(b"*\r\n"), Expect::Auth);
            }
            None => self.fail(SessionError::AuthUnproven),
        }
    }

    fn transaction(&mut self, id: TxId) -> Option<&mut Transaction> {
        self.transactions.iter_mut().find(|tx| tx.id == id)
    }

    /// Applies a reply to its transaction, and ends that if it is refused and
    /// nothing more of it is on the wire.
    fn transaction_replied(&mut self, id: TxId, apply: impl FnOnce(&mut Transaction)) {
        if let Some(tx) = self.transaction(id) {
            apply(tx);
            self.end_if_refused(id);
        }
    }

    fn end_if_refused(&mut self, id: TxId) {
        let outstanding = self
            .expected
            .iter()
            .any(|(expect, _)| expect.transaction() == Some(id));
        let Some(at) = self.transactions.iter().position(|tx| tx.id == id) else {
            return;
        };
        if outstanding
            || !self
                .transactions
                .get(at)
                .is_some_and(Transaction::is_refused)
        {
            return;
        }
        if let Some(tx) = self.transactions.remove(at) {
            self.dirty |= tx.is_open_at_server();
            if let Some((outcome, refused)) = tx.refusal() {
                self.report(id, outcome, refused);
            }
        }
    }

    /// Tells the end of a transaction, and takes back that its content is due.
    fn report(&mut self, id: TxId, outcome: Outcome, refused: Vec<(usize, Reply)>) {
        self.events.retain(|event| *event != Event::BodyDue(id));
        self.events.push_back(Event::TransactionDone {
            id,
            outcome,
            refused,
        });
    }

    fn data_replied(&mut self, id: TxId, reply: Reply) {
        if reply.is_positive() || (reply.is_intermediate() && reply.code != 354) {
            return self.fail(SessionError::UnexpectedReply {
                stage: Stage::Data,
                reply,
            });
        }
        let Some(tx) = self.transaction(id) else {
            return;
        };
        if !reply.is_intermediate() {
            tx.refuse(RefusedAt::Data, reply);
            return self.end_if_refused(id);
        }
        if tx.is_refused() {
            tx.progress = Progress::LoneDot;
            self.send(Bytes::from_static(b".\r\n"), Expect::FinalDot(id));
        } else {
            tx.progress = Progress::BodyDue;
            self.events.push_back(Event::BodyDue(id));
        }
    }

    fn body_replied(&mut self, id: TxId, reply: Reply) {
        let Some(at) = self.transactions.iter().position(|tx| tx.id == id) else {
            return;
        };
        let Some(mut tx) = self.transactions.remove(at) else {
            return;
        };
        // After a failed BDAT, and after content for nobody, what the server
        // remembers is its own affair (RFC 3030 §2).
        self.dirty |= tx.is_refused() || (tx.chunked && !reply.is_positive());
        let (outcome, refused) = if reply.is_positive() {
            tx.delivered(reply)
        } else {
            tx.refuse(RefusedAt::FinalDot, reply);
            match tx.refusal() {
                Some(ended) => ended,
                None => return,
            }
        };
        self.report(id, outcome, refused);
    }

    /// Queues whatever may be sent now.
    pub(super) fn pump(&mut self) {
        if !matches!(self.state, State::Ready | State::Quitting) {
            return;
        }
        let mut at = 0;
        while at < self.transactions.len() && self.pump_transaction(at) {
            at += 1;
        }
        if self.state == State::Quitting && self.transactions.is_empty() && self.expected.is_empty()
        {
            self.send(Bytes::from_static(b"QUIT\r\n"), Expect::Quit);
        }
    }

    /// Moves the transaction at `at` on; true if the next may follow it.
    fn pump_transaction(&mut self, at: usize) -> bool {
        let pipelining = self.capabilities.pipelining;
        loop {
            let clear = pipelining || self.expected.is_empty();
            let behind_bdat = at > 0 && self.transactions.front().is_some_and(|tx| tx.chunked);
            let Some(tx) = self.transactions.get_mut(at) else {
                return false;
            };
            match tx.progress {
                Progress::BodySent { .. } => return true,
                Progress::DataAsked | Progress::BodyDue | Progress::LoneDot => return false,
                // The reply that ended it is about to be acted on.
                Progress::Envelope if tx.is_refused() => return false,
                Progress::Envelope if !clear => return false,
                Progress::Envelope if tx.has_commands() => {
                    if !self.send_envelope(at, behind_bdat) {
                        return false;
                    }
                }
                Progress::Envelope => return self.ask_for_content(at),
            }
        }
    }

    /// Sends the next command of an envelope; false if it has to wait.
    fn send_envelope(&mut self, at: usize, behind_bdat: bool) -> bool {
        let Some(tx) = self.transactions.get_mut(at) else {
            return false;
        };
        let id = tx.id;
        if !tx.reset_sent && !tx.mail_sent && (self.dirty || behind_bdat) {
            // Without it, a MAIL after a failed BDAT would be refused as nested and
            // its RCPT would join the transaction before.
            tx.reset_sent = true;
            self.dirty = false;
            self.send(Bytes::from_static(b"RSET\r\n"), Expect::Rset);
            return true;
        }
        let Some(line) = tx.next_command() else {
            return false;
        };
        let expect = if tx.mail_sent {
            Expect::Rcpt(id)
        } else {
            Expect::Mail(id)
        };
        tx.mail_sent = true;
        self.send(line, expect);
        true
    }

    /// The envelope is out: asks for the content's turn. Never lets another follow.
    fn ask_for_content(&mut self, at: usize) -> bool {
        let reset_pending = self
            .expected
            .iter()
            .any(|(expect, _)| *expect == Expect::Rset);
        let Some(tx) = self.transactions.get_mut(at) else {
            return false;
        };
        let id = tx.id;
        if !tx.chunked {
            tx.progress = Progress::DataAsked;
            self.send(Bytes::from_static(b"DATA\r\n"), Expect::Data(id));
        } else if at == 0 && !reset_pending {
            // One content at a time: the message before it has its final reply.
            tx.progress = Progress::BodyDue;
            self.events.push_back(Event::BodyDue(id));
        }
        false
    }

    /// Ends the session by `error`, telling each transaction what that means.
    pub(super) fn fail(&mut self, error: SessionError) {
        if self.state == State::Closed {
            return;
        }
        // A peer that closes has answered, in order, whatever it accepted.
        let answered = matches!(error, SessionError::Closing { .. });
        while let Some(tx) = self.transactions.pop_front() {
            let end_left =
                matches!(tx.progress, Progress::BodySent { end } if self.outbox.has_written(end));
            let id = tx.id;
            let (outcome, refused) = tx.interrupted(error.clone(), end_left && !answered);
            self.report(id, outcome, refused);
        }
        self.close(Some(error));
    }

    pub(super) fn close(&mut self, error: Option<SessionError>) {
        if self.state != State::Closed {
            self.state = State::Closed;
            self.expected.clear();
            self.outbox.discard();
            self.events.push_back(Event::Closed(error));
        }
    }
}

fn closing_or_unexpected(stage: Stage, reply: Reply) -> SessionError {
    if reply.code == 421 {
        SessionError::Closing { stage, reply }
    } else {
        SessionError::UnexpectedReply { stage, reply }
    }
}
