//! Facts: what happened, as a journal keeps it and the store takes it.
//!
//! A fact's identity is (journal, sequence). Stored with `postcard`: add variants and fields at
//! the end only, and raise [`Fact::FORM`] when an old form can no longer be read.

use crate::status::words;
use crate::{
    Blame, Class, JournalId, LotNumber, MessageId, SuppressionReason, Timestamp, TrackingMode,
    VisitorId,
};
use serde::{Deserialize, Serialize};
use std::fmt;

/// The place of a fact in its journal: from 1, without gaps while nothing was shed.
pub type Seq = u64;

/// The place of a recipient: a lot of its batch, and the position in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Place {
    /// The lot within the batch.
    pub lot: LotNumber,
    /// The position within the lot, below 500.
    pub position: u16,
}

/// An enhanced status code (RFC 3463): class, subject, detail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct EnhancedCode(pub u8, pub u16, pub u16);

impl fmt::Display for EnhancedCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

/// What an attempt came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum AttemptResult {
    /// The peer answered the final dot with 2yz.
    Delivered,
    /// To be tried again at this time.
    TemporaryError {
        /// When, jitter included; the store files it under this minute.
        retry_at: Timestamp,
        /// The final dot may have been sent and its reply was not seen: it may be there already.
        ambiguous: bool,
    },
    /// The receiving side refused it for good.
    Bounce,
    /// Ended without a refusal: expired, no such domain, our fault.
    Failed,
    /// Not sent: the recipient was suppressed when its turn came.
    Suppressed(SuppressionReason),
    /// Not sent: the batch was cancelled.
    Cancelled,
}

impl AttemptResult {
    /// Whether the recipient has the message, or may have it for all that is known.
    pub fn may_have_arrived(&self) -> bool {
        matches!(
            self,
            Self::Delivered
                | Self::TemporaryError {
                    ambiguous: true,
                    ..
                }
        )
    }
}

/// A rule that read a reply, and the version of the rules it stood in.
///
/// Stored as `name@version`; facts from before versions were kept have the name alone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuleRef(Box<str>);

impl RuleRef {
    /// The rule `name` of the rules of `version`, which may be empty. Neither has an `@`.
    pub fn new(name: &str, version: &str) -> Self {
        Self(if version.is_empty() {
            name.into()
        } else {
            format!("{name}@{version}").into()
        })
    }

    /// The rule's name.
    pub fn name(&self) -> &str {
        self.0.split_once('@').map_or(&self.0, |(name, _)| name)
    }

    /// The version of the rules, when it was kept.
    pub fn version(&self) -> Option<&str> {
        self.0.split_once('@').map(|(_, version)| version)
    }
}

/// The circumstances of an attempt. Text of a peer is sanitised and bounded before it gets here.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct AttemptDetail {
    /// The reply code (RFC 5321), when a reply came.
    pub smtp_code: Option<u16>,
    /// The enhanced status code (RFC 3463), when the reply had one.
    pub enhanced_code: Option<EnhancedCode>,
    /// What it means; none for a delivery.
    pub class: Option<Class>,
    /// Whose trouble it is; none for a delivery.
    pub blame: Option<Blame>,
    /// The peer's text, or ours when there was no reply; at most 1 KiB, printable.
    pub reply: Box<str>,
    /// The host and address spoken to, such as `mx1.x.example (192.0.2.1)`; empty when none was.
    pub host: Box<str>,
    /// The TLS version and cipher; none in plaintext.
    pub tls: Option<Box<str>>,
    /// The destination whose limits held.
    pub destination: Box<str>,
    /// The egress source.
    pub source: Box<str>,
    /// The rule of `bounce-rules.toml` that decided, when one did.
    pub rule: Option<RuleRef>,
    /// Milliseconds that the SMTP transaction took, from MAIL to the last reply.
    pub transaction_ms: u32,
}

/// One attempt to deliver one message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attempt {
    /// Which message.
    pub message: MessageId,
    /// Where its recipient stands.
    pub place: Place,
    /// Which attempt, from 1. A status moves only forward.
    pub number: u8,
    /// When the reply was read.
    pub at: Timestamp,
    /// When the final dot was sent, by this node's clock; tells machines from people later.
    pub dot_at: Option<Timestamp>,
    /// What it came to.
    pub result: AttemptResult,
    /// Its circumstances.
    pub detail: AttemptDetail,
    /// The address must not be written to again, and why.
    pub suppress: Option<SuppressionReason>,
}

words! {
    /// Who caused a hit.
    Actor {
        /// A person.
        Human = "human",
        /// A scanner, a prefetching proxy, a crawler.
        Machine = "machine",
        /// Cannot be told (yet).
        Unknown = "unknown",
    }
}

/// The judgement of a hit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// Who.
    pub actor: Actor,
    /// Why a machine, as short words; empty otherwise.
    pub machine_reasons: Vec<Box<str>>,
    /// The version of the rules that judged.
    pub rules: u16,
}

words! {
    /// What was asked of the tracker.
    HitKind {
        /// The pixel was fetched.
        Open = "open",
        /// A link was followed.
        Click = "click",
        /// The person unsubscribed.
        Unsubscribe = "unsubscribe",
        /// A HEAD request.
        Probe = "probe",
    }
}

/// One answered request to the tracker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hit {
    /// What was asked.
    pub kind: HitKind,
    /// For which message.
    pub message: MessageId,
    /// When it was answered, by this node's clock.
    pub at: Timestamp,
    /// The number of the link in the content, for a click.
    pub link: Option<u16>,
    /// Where the click led, at most 2 KiB.
    pub target: Option<Box<str>>,
    /// At most 256 bytes, printable.
    pub user_agent: Box<str>,
    /// The client's network, truncated (IPv4 /24, IPv6 /48).
    pub network: Box<str>,
    /// The browser, when it has or got a cookie.
    pub visitor: Option<VisitorId>,
    /// `one_click` or `page`, for an unsubscribe; [`Hit::OBJECTED`] for one of a browser that asks
    /// not to be followed.
    pub method: Option<Box<str>>,
    /// Person or machine.
    pub verdict: Verdict,
}

impl Hit {
    /// The method of an open or a click whose browser sent `Sec-GPC: 1`.
    pub const OBJECTED: &str = "gpc";

    /// The most that may be kept of it, whatever its message allows.
    pub fn allows(&self) -> TrackingMode {
        if self.method.as_deref() == Some(Self::OBJECTED) {
            TrackingMode::Aggregate
        } else {
            TrackingMode::Individual
        }
    }
}

/// The name of a fact: its journal and its place there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct FactId {
    /// Who saw it.
    pub journal: JournalId,
    /// Its place.
    pub seq: Seq,
}

impl fmt::Display for FactId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.journal, self.seq)
    }
}

impl std::str::FromStr for FactId {
    type Err = FactError;

    fn from_str(text: &str) -> Result<Self, FactError> {
        let (journal, seq) = text.split_once('-').ok_or(FactError::Damaged)?;
        Ok(Self {
            journal: journal.parse().map_err(|_| FactError::Damaged)?,
            seq: seq.parse().map_err(|_| FactError::Damaged)?,
        })
    }
}

/// A page with the tag was seen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageView {
    /// On whose site.
    pub account: Box<str>,
    /// When, by this node's clock.
    pub at: Timestamp,
    /// By which browser.
    pub visitor: VisitorId,
    /// At most 2 KiB.
    pub url: Box<str>,
    /// At most 2 KiB; empty: none.
    pub referrer: Box<str>,
    /// At most 256 bytes; empty: none.
    pub title: Box<str>,
    /// At most 256 bytes, printable.
    pub user_agent: Box<str>,
    /// The client's network, truncated.
    pub network: Box<str>,
    /// Person or machine.
    pub verdict: Verdict,
}

/// What several hits together told about one of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revision {
    /// The message that was hit.
    pub message: MessageId,
    /// When it was judged anew.
    pub at: Timestamp,
    /// Which hit.
    pub hit: FactId,
    /// When that was.
    pub hit_at: Timestamp,
    /// What it was.
    pub kind: HitKind,
    /// The verdict before.
    pub was: Actor,
    /// The verdict now.
    pub verdict: Verdict,
    /// Whether a person made another hit of this kind on the message.
    pub others: bool,
}

/// The person answered a message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    /// Which message.
    pub message: MessageId,
    /// When.
    pub at: Timestamp,
    /// What whoever told it says beside, as JSON.
    pub data: Box<str>,
}

/// The person called a message spam, and the provider told us or the caller.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Complaint {
    /// Which message.
    pub message: MessageId,
    /// When.
    pub at: Timestamp,
    /// What whoever told it says beside, as JSON.
    pub data: Box<str>,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Fact {
    /// An attempt to deliver.
    Attempt(Box<Attempt>),
    /// An answered request to the tracker.
    Hit(Box<Hit>),
    /// A page was seen.
    Page(Box<PageView>),
    /// A hit was judged anew.
    Revision(Box<Revision>),
    /// A message was answered.
    Reply(Box<Reply>),
    /// A message was called spam.
    Complaint(Box<Complaint>),
}

impl Fact {
    /// The version of the stored form, first byte of what [`Fact::write_to`] writes.
    pub const FORM: u8 = 1;

    /// The message it is about; none: it is about none.
    pub fn message(&self) -> Option<MessageId> {
        match self {
            Self::Attempt(attempt) => Some(attempt.message),
            Self::Hit(hit) => Some(hit.message),
            Self::Page(_) => None,
            Self::Revision(revision) => Some(revision.message),
            Self::Reply(reply) => Some(reply.message),
            Self::Complaint(complaint) => Some(complaint.message),
        }
    }

    /// When it happened, by the clock of whoever saw it.
    pub fn at(&self) -> Timestamp {
        match self {
            Self::Attempt(attempt) => attempt.at,
            Self::Hit(hit) => hit.at,
            Self::Page(page) => page.at,
            Self::Revision(revision) => revision.at,
            Self::Reply(reply) => reply.at,
            Self::Complaint(complaint) => complaint.at,
        }
    }

    /// The stored form, appended to `to`.
    pub fn write_to(&self, to: Vec<u8>) -> Vec<u8> {
        let mut to = to;
        to.push(Self::FORM);
        // A Vec grows and these types have no failing serializer: there is no error to have.
        postcard::to_extend(self, to).unwrap_or_default()
    }

    /// Reads a stored form.
    ///
    /// # Errors
    /// When the bytes are of another version or damaged.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, FactError> {
        match bytes.split_first() {
            Some((&Self::FORM, rest)) => postcard::from_bytes(rest).map_err(|_| FactError::Damaged),
            Some((&form, _)) => Err(FactError::Form(form)),
            None => Err(FactError::Damaged),
        }
    }
}

/// Why bytes are not a fact.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FactError {
    /// Written by another version of the program.
    #[error("a fact of form {0}, which this version cannot read")]
    Form(u8),
    /// Not what was written.
    #[error("a damaged fact")]
    Damaged,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BatchId;
    use proptest::prelude::*;

    #[test]
    fn a_fact_reads_back() {
        let fact = Fact::Attempt(Box::new(Attempt {
            message: MessageId {
                batch: BatchId::from_bytes([1; 16]),
                index: 9,
            },
            place: Place {
                lot: LotNumber(3),
                position: 4,
            },
            number: 1,
            at: Timestamp::from_millis(5),
            dot_at: None,
            result: AttemptResult::TemporaryError {
                retry_at: Timestamp::from_millis(9),
                ambiguous: false,
            },
            detail: AttemptDetail {
                enhanced_code: Some(EnhancedCode(5, 7, 515)),
                ..AttemptDetail::default()
            },
            suppress: Some(SuppressionReason::InvalidAddress),
        }));
        assert_eq!(Fact::from_bytes(&fact.write_to(Vec::new())), Ok(fact));
        assert_eq!(Fact::from_bytes(&[]), Err(FactError::Damaged));
        assert_eq!(Fact::from_bytes(&[9]), Err(FactError::Form(9)));
    }

    #[test]
    fn a_rule_has_a_name_and_mostly_a_version() {
        let rule = RuleRef::new("a", "0f");
        assert_eq!((rule.name(), rule.version()), ("a", Some("0f")));
        let old = RuleRef::new("a", "");
        assert_eq!((old.name(), old.version()), ("a", None));
    }

    #[test]
    fn a_facts_name_reads_back() {
        let id = FactId {
            journal: JournalId::from_bytes([7; 16]),
            seq: 42,
        };
        assert_eq!(id.to_string().parse(), Ok(id));
        for bad in ["", "-", "x-1", &format!("{}-", id.journal)] {
            assert!(bad.parse::<FactId>().is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes: Vec<u8>) {
            let _parsed = Fact::from_bytes(&bytes);
            let _parsed = Fact::from_bytes(&[&[Fact::FORM], bytes.as_slice()].concat());
        }
    }
}
