//! What is left of a person who was erased: a name that only the store's key leads to, and rows and
//! facts that say nothing.
//!
//! Pure, and the same for every engine. Must not decide who is erased.

use crate::form::LogEntry;
use crate::{Result, StoreError, Suppression};
use aws_lc_rs::{hmac, rand};
use model::{
    Actor, Attempt, AttemptDetail, Complaint, EmailAddress, Fact, Hit, Reply, Revision, Row,
    SuppressionReason, Timestamp, Verdict,
};

/// The setting that holds the key: 32 bytes in hex.
pub(crate) const SETTING: &str = "erasure-key";
/// Where erased addresses are; nothing is ever delivered there (RFC 6761 §6.4).
const DOMAIN: &str = "erased.invalid";
/// Bytes of the keyed hash that are kept.
const HASH: usize = 16;

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Turns an address into a name that tells it only to whoever has the key and the address.
pub(crate) struct Eraser(hmac::Key);

impl Eraser {
    /// A new key, as it is kept.
    pub(crate) fn new_key() -> Result<String> {
        let mut key = [0; 32];
        rand::fill(&mut key).map_err(|_| StoreError::Unavailable("no random bytes".into()))?;
        Ok(hex(&key))
    }

    /// The eraser of a kept key.
    pub(crate) fn of(key: &str) -> Self {
        Self(hmac::Key::new(hmac::HMAC_SHA256, key.as_bytes()))
    }

    /// The name that stands for an address in an account.
    pub(crate) fn name(&self, account: &str, email: &str) -> String {
        let mut context = hmac::Context::with_key(&self.0);
        // Neither has a zero in it.
        for part in [account.as_bytes(), b"\0", email.as_bytes()] {
            context.update(part);
        }
        let tag = context.sign();
        let hash = tag.as_ref().get(..HASH).unwrap_or_default();
        format!("{}@{DOMAIN}", hex(hash))
    }

    /// The address under which a suppression is kept.
    pub(crate) fn kept_under(&self, entry: &Suppression) -> String {
        if entry.reason == SuppressionReason::Erased && !is_name(&entry.email) {
            self.name(&entry.account, &entry.email)
        } else {
            entry.email.clone()
        }
    }
}

/// Whether an address is such a name.
pub(crate) fn is_name(email: &str) -> bool {
    email
        .strip_suffix(DOMAIN)
        .is_some_and(|rest| rest.ends_with('@'))
}

/// What is left of a row: its index.
pub(crate) fn row(of: &Row) -> Row {
    let nobody: Option<EmailAddress> = format!("erased@{DOMAIN}").parse().ok();
    Row {
        tracking: of.tracking,
        ..Row::new(of.index, nobody.unwrap_or_else(|| of.email.clone()))
    }
}

/// Takes everything out of the entry of a log but its number; it then belongs to nobody. Entries
/// keep their places, since events refer to them.
pub(crate) fn blank(entry: &mut LogEntry) {
    entry.position = u16::MAX;
    let never = Timestamp::from_millis(0);
    entry.fact = match &entry.fact {
        Fact::Attempt(attempt) => Fact::Attempt(Box::new(Attempt {
            message: attempt.message,
            place: attempt.place,
            number: attempt.number,
            at: never,
            dot_at: None,
            result: attempt.result,
            detail: AttemptDetail::default(),
            suppress: None,
        })),
        Fact::Hit(hit) => Fact::Hit(Box::new(Hit {
            kind: hit.kind,
            message: hit.message,
            at: never,
            link: None,
            target: None,
            user_agent: "".into(),
            network: "".into(),
            visitor: None,
            method: None,
            verdict: Verdict {
                actor: Actor::Unknown,
                machine_reasons: Vec::new(),
                rules: hit.verdict.rules,
            },
        })),
        // These say nothing of the person beside the time, and of which hit they were.
        Fact::Revision(of) => Fact::Revision(Box::new(Revision {
            at: never,
            hit_at: never,
            ..(**of).clone()
        })),
        Fact::Reply(reply) => Fact::Reply(Box::new(Reply {
            message: reply.message,
            at: never,
            data: "{}".into(),
        })),
        Fact::Complaint(complaint) => Fact::Complaint(Box::new(Complaint {
            message: complaint.message,
            at: never,
            data: "{}".into(),
        })),
        // Belongs to no message, so it is in no log of one.
        Fact::Page(page) => Fact::Page(page.clone()),
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_needs_the_key_and_is_an_address() {
        let (a, b) = (Eraser::of(&Eraser::new_key().unwrap()), Eraser::of("x"));
        let name = a.name("acme", "a@x.example");
        assert!(
            name.parse::<EmailAddress>().is_ok() && is_name(&name),
            "{name}"
        );
        assert_eq!(name, a.name("acme", "a@x.example"));
        for other in [
            a.name("acme", "b@x.example"),
            a.name("other", "a@x.example"),
            b.name("acme", "a@x.example"),
        ] {
            assert_ne!(name, other);
        }
        assert!(!is_name("a@x.example") && !is_name("a@xerased.invalid"));
    }

    #[test]
    fn a_row_keeps_its_index_alone() {
        let before = Row {
            index: 7,
            email: "a@x.example".parse().unwrap(),
            name: Some("A".into()),
            prospect_id: Some("p".into()),
            vars: Some("{}".into()),
            metadata: Some("{}".into()),
            tracking: None,
            time_zone: Some("Asia/Tokyo".into()),
        };
        let text = format!("{:?}", row(&before));
        assert!(
            text.contains("index: 7") && !text.contains("x.example"),
            "{text}"
        );
        assert_eq!(row(&row(&before)), row(&before));
    }
}
