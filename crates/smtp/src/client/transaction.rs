//! One transaction of a client session: MAIL, RCPT, content (RFC 5321 §3.3).
//!
//! Keeps what the replies said so far; [`super::ClientSession`] decides what is
//! sent when.

use bytes::{Bytes, BytesMut};
use memchr::memchr;

use super::outcome::{BeginError, Outcome, RefusedAt, SessionError};
use super::{Envelope, TxId};
use crate::body::Body;
use crate::capabilities::Capabilities;
use crate::command::{self, CommandError, MailParameters};
use crate::reply::Reply;

/// Recipients of one transaction, whatever the server allows
/// (RFC 5321 §4.5.3.1.8 demands that it take 100).
pub(super) const RCPT_MAX: u32 = 1_000;

/// How far the sending of a transaction has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
    /// MAIL and RCPT commands are going out.
    Envelope,
    /// DATA was sent, its reply is awaited.
    DataAsked,
    /// The content may go; the caller has been told and has not released it.
    BodyDue,
    /// Content and its end are queued; the end stands before this position.
    BodySent {
        /// Position in the outbox just after the terminator.
        end: u64,
    },
    /// Every recipient was refused, yet the server asked for content: it gets
    /// an empty one (RFC 2920 §3.1).
    LoneDot,
}

#[derive(Debug)]
pub(super) struct Transaction {
    pub(super) id: TxId,
    pub(super) progress: Progress,
    /// BDAT instead of DATA.
    pub(super) chunked: bool,
    /// RSET was sent to clear the way.
    pub(super) reset_sent: bool,
    /// MAIL was sent; the commands left are RCPT.
    pub(super) mail_sent: bool,
    /// MAIL and RCPT lines that are not queued yet.
    commands: Bytes,
    body: Option<Body>,
    recipients: usize,
    answered: usize,
    accepted: usize,
    mail_accepted: bool,
    /// The first refusal of the whole transaction.
    refusal: Option<(RefusedAt, Reply)>,
    /// Recipients refused on their own.
    refused: Vec<(usize, Reply)>,
}

impl Transaction {
    /// Writes the envelope's commands and checks them against `offered`.
    pub(super) fn new(
        id: TxId,
        envelope: &Envelope<'_>,
        body: Body,
        offered: &Capabilities,
        scratch: &mut BytesMut,
    ) -> Result<Self, BeginError> {
        let size = body.size();
        check(envelope, &body, offered)?;
        let parameters = MailParameters {
            size: offered.size.then_some(size),
            eight_bit: body.is_eight_bit(),
            smtp_utf8: needs_smtp_utf8(envelope),
        };
        // Whatever a refused envelope left behind must not leave.
        scratch.clear();
        command::mail(scratch, envelope.reverse_path, parameters)?;
        for recipient in envelope.recipients {
            command::rcpt(scratch, recipient)?;
        }
        Ok(Self {
            id,
            progress: Progress::Envelope,
            chunked: offered.chunking,
            reset_sent: false,
            mail_sent: false,
            commands: scratch.split().freeze(),
            body: Some(body),
            recipients: envelope.recipients.len(),
            answered: 0,
            accepted: 0,
            mail_accepted: false,
            refusal: None,
            refused: Vec::new(),
        })
    }

    /// The next line: MAIL first, then each RCPT.
    pub(super) fn next_command(&mut self) -> Option<Bytes> {
        let end = memchr(b'\n', &self.commands)?.saturating_add(1);
        Some(self.commands.split_to(end.min(self.commands.len())))
    }

    pub(super) fn has_commands(&self) -> bool {
        !self.commands.is_empty()
    }

    pub(super) fn take_body(&mut self) -> Body {
        self.body.take().unwrap_or_default()
    }

    pub(super) fn mail_replied(&mut self, reply: Reply) {
        if reply.is_positive() {
            self.mail_accepted = true;
        } else {
            self.refuse(RefusedAt::Mail, reply);
        }
    }

    pub(super) fn rcpt_replied(&mut self, reply: Reply) {
        let index = self.answered;
        self.answered += 1;
        if reply.is_positive() {
            self.accepted += 1;
        } else if self.answered == self.recipients && self.accepted == 0 {
            self.refuse(RefusedAt::Rcpt, reply);
        } else if self.refusal.is_none() {
            self.refused.push((index, reply));
        }
    }

    /// Notes a refusal of the whole; only the first tells the cause.
    pub(super) fn refuse(&mut self, stage: RefusedAt, reply: Reply) {
        self.refusal.get_or_insert((stage, reply));
    }

    /// A reply to MAIL has come.
    pub(super) fn is_mail_answered(&self) -> bool {
        self.mail_accepted || self.refusal.is_some()
    }

    /// MAIL or every recipient was refused, or DATA.
    pub(super) fn is_refused(&self) -> bool {
        self.refusal.is_some()
    }

    /// The server has an open transaction of ours, so that the next MAIL would
    /// be refused as nested.
    pub(super) fn is_open_at_server(&self) -> bool {
        self.mail_accepted || self.accepted > 0
    }

    /// The final reply came and is positive.
    pub(super) fn delivered(self, reply: Reply) -> (Outcome, Vec<(usize, Reply)>) {
        // After `BDAT LAST` in one flight with a refused MAIL the reply decides:
        // with a recipient accepted, the peer has the message.
        match self.refusal {
            Some((stage, reply)) if self.accepted == 0 || self.progress == Progress::LoneDot => {
                (Outcome::Refused { stage, reply }, self.refused)
            }
            _ => (Outcome::Delivered(reply), self.refused),
        }
    }

    /// Ends with the refusal noted; `None` if there is none.
    pub(super) fn refusal(self) -> Option<(Outcome, Vec<(usize, Reply)>)> {
        let (stage, reply) = self.refusal?;
        Some((Outcome::Refused { stage, reply }, self.refused))
    }

    /// Ends with the session; `may_be_accepted` if the end of the content left
    /// and the peer can have acted on it.
    pub(super) fn interrupted(
        self,
        error: SessionError,
        may_be_accepted: bool,
    ) -> (Outcome, Vec<(usize, Reply)>) {
        let outcome = match self.refusal {
            Some((stage, reply)) => Outcome::Refused { stage, reply },
            None if may_be_accepted => Outcome::Ambiguous(error),
            None => Outcome::NotStarted(error),
        };
        (outcome, self.refused)
    }
}

fn needs_smtp_utf8(envelope: &Envelope<'_>) -> bool {
    envelope.smtp_utf8
        || !envelope.reverse_path.is_ascii()
        || envelope.recipients.iter().any(|r| !r.is_ascii())
}

/// Whether `offered` has room for such a message.
pub(super) fn check(
    envelope: &Envelope<'_>,
    body: &Body,
    offered: &Capabilities,
) -> Result<(), BeginError> {
    if envelope.recipients.is_empty() {
        return Err(CommandError::NoRecipient.into());
    }
    let max = offered.rcpt_max.map_or(RCPT_MAX, |max| max.min(RCPT_MAX));
    if envelope.recipients.len() as u64 > u64::from(max) {
        return Err(BeginError::TooManyRecipients { max });
    }
    if let Some(max) = offered.size_max.filter(|&max| body.size() > max) {
        return Err(BeginError::TooLarge {
            size: body.size(),
            max,
        });
    }
    // First, as it says more: such an address stands in a header, which is then 8-bit.
    if needs_smtp_utf8(envelope) && !offered.smtp_utf8 {
        return Err(BeginError::SmtpUtf8);
    }
    if body.is_eight_bit() && !offered.eight_bit_mime {
        return Err(BeginError::EightBit);
    }
    Ok(())
}
