//! What became of a transaction or a session, and how far that reaches.

use std::io;

use thiserror::Error;

use super::Stage;
use crate::command::CommandError;
use crate::reply::{Reply, ReplyError};

/// What became of a transaction, for every recipient that was not refused on
/// its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The peer took responsibility (RFC 5321 §4.2.5).
    Delivered(Reply),
    /// The peer refused; nothing was accepted.
    Refused {
        /// The command that was refused.
        stage: RefusedAt,
        /// How.
        reply: Reply,
    },
    /// The end of the content left and no reply came: the peer may have accepted.
    Ambiguous(SessionError),
    /// The session ended before the end of the content left: nothing was
    /// accepted, and nothing was said about this message. Try elsewhere.
    ///
    /// A peer that closes every session at the same command still costs a
    /// connection each time: the caller bounds that per host.
    NotStarted(SessionError),
}

/// The command with which a transaction was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RefusedAt {
    /// MAIL FROM.
    Mail,
    /// RCPT TO: every recipient, or the only one.
    Rcpt,
    /// DATA, before any content.
    Data,
    /// The content, after its end (final dot or `BDAT LAST`).
    FinalDot,
}

/// How far a failure reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scope {
    /// This recipient; others may go on.
    Recipient,
    /// This message; others may go on.
    Message,
    /// This connection; other connections may go on.
    Session,
}

impl Outcome {
    /// How far the failure reaches; `None` for a delivery.
    #[must_use]
    pub fn scope(&self) -> Option<Scope> {
        match self {
            Self::Delivered(_) => None,
            // RFC 5321 §3.8: the channel closes, whatever was asked.
            Self::Refused { reply, .. } if reply.code == 421 => Some(Scope::Session),
            Self::Refused {
                stage: RefusedAt::Rcpt,
                ..
            } => Some(Scope::Recipient),
            Self::Refused {
                stage: RefusedAt::Mail | RefusedAt::Data | RefusedAt::FinalDot,
                ..
            } => Some(Scope::Message),
            Self::Ambiguous(_) | Self::NotStarted(_) => Some(Scope::Session),
        }
    }

    /// Whether another attempt makes sense as far as the protocol tells.
    #[must_use]
    pub fn may_retry(&self) -> bool {
        match self {
            Self::Delivered(_) => false,
            Self::Refused { reply, .. } => !reply.is_permanent(),
            Self::Ambiguous(_) | Self::NotStarted(_) => true,
        }
    }
}

/// Why a session ended other than by our QUIT. Its scope is the session; what
/// that says of host and destination is the caller's judgement.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SessionError {
    /// The peer will not talk to us: greeting, EHLO or RSET refused.
    #[error("refused at {stage}: {reply}")]
    Refused {
        /// What was refused.
        stage: Stage,
        /// How.
        reply: Reply,
    },
    /// The peer closes the channel (421, RFC 5321 §3.8).
    #[error("the peer is closing the connection at {stage}: {reply}")]
    Closing {
        /// What was under way.
        stage: Stage,
        /// What the peer said.
        reply: Reply,
    },
    /// TLS is required and STARTTLS was not offered.
    #[error("the peer does not offer STARTTLS")]
    TlsNotOffered,
    /// TLS is required and STARTTLS was refused.
    #[error("STARTTLS refused: {0}")]
    TlsRefused(Reply),
    /// The handshake failed; the text is for operators.
    #[error("TLS handshake failed: {0}")]
    TlsFailed(String),
    /// The server has our own name: mail for others would come back to us.
    #[error("the peer has our own name: this is a loop")]
    Loop,
    /// Credentials are never shown in plaintext, and the session has no TLS.
    #[error("AUTH is due and the connection has no TLS")]
    AuthWithoutTls,
    /// No mechanism that we know is offered.
    #[error("the peer offers no AUTH mechanism that we know")]
    AuthNotOffered,
    /// The server was to prove that it knows the password, and did not.
    #[error("the peer did not prove in AUTH that it knows the password")]
    AuthUnproven,
    /// AUTH was refused.
    #[error("AUTH refused: {0}")]
    AuthRefused(Reply),
    /// Plaintext followed the reply to STARTTLS: somebody injects (CVE-2011-0411).
    #[error("plaintext after the reply to STARTTLS")]
    PlaintextAfterStartTls,
    /// Not an SMTP reply.
    #[error(transparent)]
    Syntax(#[from] ReplyError),
    /// A reply that cannot answer what was sent, or that answers nothing.
    #[error("unexpected reply at {stage}: {reply}")]
    UnexpectedReply {
        /// What was under way.
        stage: Stage,
        /// What came.
        reply: Reply,
    },
    /// The peer closed the connection without a word.
    #[error("the peer closed the connection at {stage}")]
    Disconnected {
        /// What was under way.
        stage: Stage,
    },
    /// A deadline passed (RFC 5321 §4.5.3.2).
    #[error("timed out at {stage}")]
    TimedOut {
        /// What was under way.
        stage: Stage,
    },
    /// Reading or writing failed.
    #[error("{kind} at {stage}")]
    Io {
        /// What was under way.
        stage: Stage,
        /// How.
        kind: io::ErrorKind,
    },
    /// The EHLO name given to us cannot be sent.
    #[error(transparent)]
    Hello(CommandError),
}

/// What happened to the connection outside of SMTP.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Interruption {
    /// End of stream.
    Disconnected,
    /// The deadline of [`super::ClientSession::waiting_for`] passed.
    TimedOut,
    /// A read or write failed.
    Io(io::ErrorKind),
    /// The TLS handshake failed.
    Tls(String),
}

/// Why a transaction cannot begin on this session. Nothing was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum BeginError {
    /// The session is not ready, is ending or has ended.
    #[error("the session is not ready for a transaction")]
    NotReady,
    /// As many transactions as fit are under way.
    #[error("the session has its transactions already")]
    Busy,
    /// The server's MAILMAX (RFC 9422) is reached: open another connection.
    #[error("the server takes no more transactions on this connection")]
    Exhausted,
    /// More recipients than the server's RCPTMAX (RFC 9422) or our own bound.
    #[error("the transaction has more than {max} recipients")]
    TooManyRecipients {
        /// The bound.
        max: u32,
    },
    /// Larger than the server's SIZE (RFC 1870).
    #[error("the message has {size} bytes, the server takes {max}")]
    TooLarge {
        /// Bytes of the message.
        size: u64,
        /// Bytes the server takes.
        max: u64,
    },
    /// The content has 8-bit bytes, the server has no 8BITMIME: encode it.
    #[error("the message is 8-bit and the server is not")]
    EightBit,
    /// An address is not ASCII, the server has no SMTPUTF8.
    #[error("the envelope needs SMTPUTF8 and the server lacks it")]
    SmtpUtf8,
    /// The envelope cannot be written.
    #[error(transparent)]
    Envelope(#[from] CommandError),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes() {
        let refused = |stage, code| Outcome::Refused {
            stage,
            reply: Reply::new(code, "x"),
        };
        let lost = SessionError::Disconnected {
            stage: Stage::FinalDot,
        };
        let table = [
            (Outcome::Delivered(Reply::new(250, "")), None, false),
            (refused(RefusedAt::Mail, 550), Some(Scope::Message), false),
            (refused(RefusedAt::Rcpt, 450), Some(Scope::Recipient), true),
            (refused(RefusedAt::Data, 451), Some(Scope::Message), true),
            (
                refused(RefusedAt::FinalDot, 554),
                Some(Scope::Message),
                false,
            ),
            (
                refused(RefusedAt::FinalDot, 421),
                Some(Scope::Session),
                true,
            ),
            (Outcome::Ambiguous(lost.clone()), Some(Scope::Session), true),
            (Outcome::NotStarted(lost), Some(Scope::Session), true),
        ];
        for (outcome, scope, retry) in table {
            assert_eq!(
                (outcome.scope(), outcome.may_retry()),
                (scope, retry),
                "{outcome:?}"
            );
        }
    }
}
