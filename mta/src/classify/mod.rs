//! What a reply means: class, blame, whether to try again, whether to stop writing to the address.
//!
//! Owns the reading of replies by tested rules (`config/bounce-rules.toml`), then by enhanced code
//! (RFC 3463), then by reply code (RFC 5321 §4.2). Must not do I/O, and must not decide when an
//! attempt is repeated: that is `queue`'s.
//!
//! A refusal for reputation, content or policy never counts against a recipient.
#![warn(clippy::wildcard_enum_match_arm)]

#[cfg(test)]
mod corpus;
mod fallback;
mod form;
mod hint;
mod rules;

pub use rules::{RuleError, Rules};

use std::sync::Arc;
use std::time::Duration;

use model::{Blame, Class, RuleRef, SuppressionReason};
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

/// How far a refusal reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// This recipient; others may go on.
    Recipient,
    /// This message, whoever else it is for.
    Message,
    /// This connection: it takes no more, others may.
    Session,
    /// This host: another of the destination may take it.
    Host,
    /// Everything that the source sends to the destination.
    Destination,
}

impl Scope {
    /// The word of the rules file.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Recipient => "recipient",
            Self::Message => "message",
            Self::Session => "session",
            Self::Host => "host",
            Self::Destination => "destination",
        }
    }
}

/// What a reply asks of the sender beyond the message that it answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Signal {
    /// The destination wants a lower rate or fewer connections.
    Slow,
    /// The destination wants fewer messages over one connection; the next may go on.
    FewerMessages,
    /// The destination refuses the egress source for its reputation.
    Block {
        /// How long to leave it alone, as the peer says, else as the rule does.
        pause: Option<Duration>,
    },
}

impl Signal {
    /// The word of the rules file.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Slow => "slow",
            Self::FewerMessages => "fewer_messages",
            Self::Block { .. } => "block",
        }
    }
}

/// A [`Signal`], by whom it was given and how it was understood: what limits adapt to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notice {
    /// What is asked.
    pub signal: Signal,
    /// The rule that read it so; none when the codes did.
    pub rule: Option<Arc<str>>,
    /// The reply, printable and bounded.
    pub reply: Box<str>,
}

/// Who gave a reply. Rules for one provider match by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Peer<'a> {
    /// The host's name; empty when not known.
    pub host: &'a str,
    /// The destination: a provider of `shaping.toml`, a domain, or a set of hosts; empty when not
    /// known.
    pub destination: &'a str,
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
    /// How far it reaches.
    pub scope: Scope,
    /// What it asks of the sender.
    pub signal: Option<Signal>,
    /// The address must not be written to again.
    pub suppress: Option<SuppressionReason>,
    /// The rule that decided; none when the codes did.
    pub rule: Option<Arc<str>>,
    /// The version of the rules in force.
    pub rules_version: Arc<str>,
    /// When to come back at the earliest, as the peer says, else as the rule does.
    pub retry_after: Option<Duration>,
}

impl Classification {
    /// What the sender is asked beyond this message, for whoever adapts limits.
    pub fn notice(&self, reply: &Reply) -> Option<Notice> {
        self.signal.map(|signal| Notice {
            signal,
            rule: self.rule.clone(),
            reply: crate::queue::decide::bounded(&reply.to_string()),
        })
    }

    /// The rule that decided, as facts keep it.
    pub fn rule_ref(&self) -> Option<RuleRef> {
        let name = self.rule.as_deref()?;
        Some(RuleRef::new(name, &self.rules_version))
    }

    /// Whether the connection that got the reply should carry nothing more.
    pub fn ends_connection(&self) -> bool {
        matches!(self.scope, Scope::Session | Scope::Host)
            || matches!(self.signal, Some(Signal::Block { .. }))
    }
}

/// How far a refusal of this class reaches when its rule does not say.
fn scope_of(class: Class, blame: Blame) -> Scope {
    match class {
        Class::InvalidMailbox
        | Class::InactiveMailbox
        | Class::BadDomain
        | Class::NoMx
        | Class::Greylisted
        | Class::RelayDenied
        | Class::Expired
        | Class::AutoReply => Scope::Recipient,
        // The disk of the host, not the person's share of it.
        Class::MailboxFull if blame == Blame::Destination => Scope::Host,
        Class::MailboxFull => Scope::Recipient,
        Class::RateLimited | Class::IpBlocked if blame == Blame::Recipient => Scope::Recipient,
        Class::RateLimited | Class::IpBlocked => Scope::Destination,
        Class::ConnectFailure | Class::DnsFailure | Class::TlsFailure => Scope::Host,
        Class::DomainBlocked
        | Class::SpamContent
        | Class::AuthFailed
        | Class::Policy
        | Class::TooLarge
        | Class::Protocol
        | Class::Other => Scope::Message,
    }
}

/// What a refusal of this class asks of the sender when its rule does not say.
fn signal_of(class: Class, blame: Blame) -> Option<Signal> {
    // Too much for one mailbox is no word about the rest.
    if blame == Blame::Recipient {
        return None;
    }
    if class == Class::RateLimited {
        return Some(Signal::Slow);
    }
    (class == Class::IpBlocked).then_some(Signal::Block { pause: None })
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
    /// Reads a refusal that `peer` gave. A positive reply has no class of its own and reads as
    /// [`Class::Other`].
    pub fn classify(&self, reply: &Reply, peer: Peer<'_>) -> Classification {
        let text = reply.text().to_lowercase();
        let hint = reply
            .is_transient()
            .then(|| hint::retry_after(&text))
            .flatten();
        let rule = self.matching(reply, &text, peer);
        let (class, blame) = match rule {
            Some(rule) => (rule.class, rule.blame),
            None => fallback::by_codes(reply),
        };
        let action = rule
            .and_then(|rule| rule.action)
            .unwrap_or_else(|| by_code(reply));
        let scope = match rule.and_then(|rule| rule.scope) {
            Some(scope) => scope,
            None => scope_of(class, blame),
        };
        let signal = match rule.map(|rule| rule.signal) {
            Some(Some(stated)) => stated,
            Some(None) | None => signal_of(class, blame),
        };
        let signal = match signal {
            Some(Signal::Block { pause }) => Some(Signal::Block {
                pause: hint.or(pause),
            }),
            Some(Signal::Slow | Signal::FewerMessages) | None => signal,
        };
        let suppresses = rule.is_none_or(|rule| rule.suppress);
        let is_final = action == Action::Bounce && suppresses && blame == Blame::Recipient;
        Classification {
            class,
            blame,
            action,
            // The channel closes, whatever was asked (RFC 5321 §3.8).
            scope: if reply.code == 421 && scope != Scope::Destination {
                Scope::Session
            } else {
                scope
            },
            signal,
            suppress: suppression_for(class).filter(|_| is_final),
            rule: rule.map(|rule| Arc::clone(&rule.name)),
            rules_version: Arc::clone(self.version()),
            retry_after: hint
                .or_else(|| rule.and_then(|rule| rule.retry))
                .filter(|_| action == Action::Retry),
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

    fn rules(more: &str) -> Rules {
        let text = format!(
            "[[rule]]\nname = \"a\"\nany = [\"xyz\"]\nclass = \"ip_blocked\"\nblame = \"sender_ip\"\nsamples = [{{ reply = \"421 xyz\", source = \"test\" }}]\n{more}"
        );
        Rules::parse(&text).expect("a rules file")
    }

    #[test]
    fn scope_and_signal_follow_the_class_unless_a_rule_states_them() {
        let block = |pause| Some(Signal::Block { pause });
        let hour = Some(Duration::from_secs(3_600));
        let table = [
            ("", Scope::Destination, block(None), None),
            (
                "pause = \"1h\"\nsignal = \"block\"",
                Scope::Destination,
                block(hour),
                None,
            ),
            (
                "signal = \"slow\"\nretry = \"1h\"",
                Scope::Destination,
                Some(Signal::Slow),
                hour,
            ),
            (
                "signal = \"fewer_messages\"\nscope = \"session\"",
                Scope::Session,
                Some(Signal::FewerMessages),
                None,
            ),
            // The channel closes whatever the rule thinks.
            (
                "signal = \"none\"\nscope = \"message\"",
                Scope::Session,
                None,
                None,
            ),
        ];
        for (more, scope, signal, retry_after) in table {
            let read = rules(more).classify(&Reply::new(421, "xyz"), Peer::default());
            let found = (read.scope, read.signal, read.retry_after);
            assert_eq!(found, (scope, signal, retry_after), "{more}");
            let notice = read.notice(&Reply::new(421, "xyz"));
            assert_eq!(notice.is_some(), signal.is_some(), "{more}");
        }
        let wrong = "[[rule]]\nname = \"a\"\nany = [\"xyz\"]\nclass = \"other\"\nblame = \"us\"\npause = \"1h\"\nsamples = []\n";
        let errors = Rules::parse(wrong).expect_err("a pause of nothing");
        assert!(
            errors[0].to_string().contains("without signal"),
            "{errors:?}"
        );
    }

    #[test]
    fn a_block_lasts_as_long_as_the_peer_says_else_as_the_rule_does() {
        let minutes = |minutes: u64| Some(Duration::from_secs(60 * minutes));
        let rule = "pause = \"1h\"\nsignal = \"block\"";
        let table = [
            ("", 421, "xyz", None),
            ("", 421, "xyz, try again in 20 minutes", minutes(20)),
            (rule, 421, "xyz", minutes(60)),
            (rule, 421, "xyz, try again in 20 minutes", minutes(20)),
            // Whoever refuses for good does not name the time of a block.
            (rule, 550, "xyz, try again in 20 minutes", minutes(60)),
        ];
        for (more, code, text, pause) in table {
            let read = rules(more).classify(&Reply::new(code, text), Peer::default());
            assert_eq!(read.signal, Some(Signal::Block { pause }), "{more} {text}");
        }
    }

    #[test]
    fn codes_alone_have_a_scope_too() {
        let table = [
            (550, "5.1.1 x", Scope::Recipient, None),
            (452, "4.3.1 x", Scope::Host, None),
            (421, "x", Scope::Session, None),
            (421, "4.7.28 x", Scope::Destination, Some(Signal::Slow)),
            (554, "5.6.0 x", Scope::Message, None),
        ];
        for (code, text, scope, signal) in table {
            let read = Rules::default().classify(&Reply::new(code, text), Peer::default());
            assert_eq!((read.scope, read.signal), (scope, signal), "{code} {text}");
        }
    }

    #[test]
    fn a_rule_of_one_provider_is_for_its_hosts_only() {
        let rules = rules("host = [\".x.example\", \"gmail\"]");
        let read = |host, destination| {
            let peer = Peer { host, destination };
            rules.classify(&Reply::new(550, "xyz"), peer).rule.is_some()
        };
        assert!(read("mx.X.example", "") && read("", "gmail"));
        assert!(!read("mx.example", "") && !read("", "hotmail") && !read("example", ""));
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
