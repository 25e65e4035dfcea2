//! What a reply means: class, blame, whether to try again, whether to stop writing to the address.
//!
//! Owns the reading of replies by tested rules (`config/bounce-rules.toml`), then by enhanced code
//! (RFC 3463), then by reply code (RFC 5321 §4.2). Must not do I/O, and must not decide when an
//! attempt is repeated: that is `queue`'s.
//!
//! A refusal for reputation, content or policy never counts against a recipient.
#![warn(clippy::wildcard_enum_match_arm)]

mod fallback;
mod hint;
mod rules;

pub use rules::{RuleError, Rules};

use std::sync::Arc;
use std::time::Duration;

use model::{Blame, Class, SuppressionReason};
use smtp::Reply;

/// What to do with the recipient.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// Try again by the destination's schedule.
    Retry,
    /// The refusal is final.
    Bounce,
}

impl Action {
    /// The word of the contract.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Retry => "retry",
            Self::Bounce => "bounce",
        }
    }
}

/// The reading of one reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Classification {
    /// What it means.
    pub class: Class,
    /// Whose trouble it is.
    pub blame: Blame,
    /// What to do.
    pub action: Action,
    /// The address must not be written to again.
    pub suppress: Option<SuppressionReason>,
    /// The rule that decided; none when the codes did.
    pub rule: Option<Arc<str>>,
    /// The peer said when to come back.
    pub retry_after: Option<Duration>,
}

/// Why no further mail goes to an address whose message ended with this class, under the status
/// profile `default` (contract, section 6). A full mailbox counts only when it repeats, which is
/// the store's to see.
pub fn suppression_for(class: Class) -> Option<SuppressionReason> {
    match class {
        Class::InvalidMailbox | Class::BadDomain | Class::NoMx => {
            Some(SuppressionReason::InvalidAddress)
        }
        Class::InactiveMailbox => Some(SuppressionReason::Inactive),
        Class::MailboxFull
        | Class::DnsFailure
        | Class::ConnectFailure
        | Class::TlsFailure
        | Class::Greylisted
        | Class::RateLimited
        | Class::IpBlocked
        | Class::DomainBlocked
        | Class::SpamContent
        | Class::AuthFailed
        | Class::Policy
        | Class::TooLarge
        | Class::RelayDenied
        | Class::Protocol
        | Class::Expired
        | Class::AutoReply
        | Class::Other => None,
    }
}

impl Rules {
    /// Reads a refusal. A positive reply has no class of its own and reads as [`Class::Other`].
    pub fn classify(&self, reply: &Reply) -> Classification {
        let text = reply.text().to_lowercase();
        let retry_after = reply
            .is_transient()
            .then(|| hint::retry_after(&text))
            .flatten();
        let (class, blame, action, suppresses, rule) = match self.matching(reply, &text) {
            Some(rule) => (
                rule.class,
                rule.blame,
                rule.action.unwrap_or_else(|| by_code(reply)),
                rule.suppress,
                Some(rule.name.clone()),
            ),
            None => {
                let (class, blame) = fallback::by_codes(reply);
                (class, blame, by_code(reply), true, None)
            }
        };
        let is_final = action == Action::Bounce && suppresses && blame == Blame::Recipient;
        let suppress = suppression_for(class).filter(|_| is_final);
        Classification {
            class,
            blame,
            action,
            suppress,
            rule,
            retry_after,
        }
    }
}

/// 5yz is final, 4yz is not (RFC 5321 §4.2.1) - save that 552 says nothing but "too much for now"
/// when it is about storage (§4.5.3.1.10).
fn by_code(reply: &Reply) -> Action {
    if reply.is_permanent() {
        Action::Bounce
    } else {
        Action::Retry
    }
}

/// Reads a reply as a person types it: `550 5.1.1 No such user`, with or without line breaks
/// (`550-…`). `None` when it does not begin with a reply code.
pub fn parse_reply(text: &str) -> Option<Reply> {
    let mut lines = text
        .trim()
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty());
    let split = |line: &str| -> Option<(u16, String)> {
        let (code, rest) = line.split_at_checked(3)?;
        let code: u16 = code.parse().ok().filter(|code| (200..600).contains(code))?;
        let rest = match rest.chars().next() {
            None => "",
            Some(' ' | '-') => rest.get(1..)?,
            Some(_) => return None,
        };
        Some((code, rest.to_owned()))
    };
    let (code, first) = split(lines.next()?)?;
    let rest = lines.map(|line| match split(line) {
        Some((_, rest)) => rest,
        None => line.to_owned(),
    });
    let text: Vec<String> = std::iter::once(first).chain(rest).collect();
    Some(Reply::new(code, &text.join("\n")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_as_people_type_them() {
        let reply =
            parse_reply("550-5.1.1 The account\r\n550 5.1.1 does not exist").expect("a reply");
        assert_eq!(reply.to_string(), "550 5.1.1 The account does not exist");
        for bad in ["", "55", "abc", "650 x", "5500 x", "199 x", "ü550"] {
            assert_eq!(parse_reply(bad), None, "{bad}");
        }
        assert_eq!(parse_reply("421").map(|reply| reply.code), Some(421));
    }

    #[test]
    fn only_a_recipients_own_fault_suppresses() {
        for &class in Class::ALL {
            let expected = matches!(
                class,
                Class::InvalidMailbox | Class::BadDomain | Class::NoMx | Class::InactiveMailbox
            );
            assert_eq!(suppression_for(class).is_some(), expected, "{class}");
        }
    }
}
