//! Replies that no rule knows: by enhanced status code (RFC 3463 and the IANA registry), else by
//! reply code (RFC 5321 §4.2.3).

use model::{Blame, Class};
use smtp::Reply;

/// What the codes alone say.
///
/// `x.7.1` is "delivery not authorised" and is used for everything from block lists to full disks:
/// it is a policy of the receiver, never the recipient's fault.
pub(super) fn by_codes(reply: &Reply) -> (Class, Blame) {
    let detail = reply.enhanced.map(|code| (code.subject, code.detail));
    match detail.and_then(by_enhanced) {
        Some(meaning) => meaning,
        None => by_code(reply.code),
    }
}

fn by_enhanced((subject, detail): (u16, u16)) -> Option<(Class, Blame)> {
    Some(match (subject, detail) {
        (1, 1 | 3 | 6) => (Class::InvalidMailbox, Blame::Recipient),
        // "Bad destination system address": the domain, as the receiving side sees it.
        (1, 2) => (Class::BadDomain, Blame::Recipient),
        (1, 10) => (Class::NoMx, Blame::Recipient),
        (1, 7 | 8) => (Class::DomainBlocked, Blame::SenderDomain),
        (1, _) => (Class::InvalidMailbox, Blame::Recipient),
        (2, 1) => (Class::InactiveMailbox, Blame::Recipient),
        (2, 2) => (Class::MailboxFull, Blame::Recipient),
        (2 | 3, 3 | 4) => (Class::TooLarge, Blame::Content),
        (3, 1) => (Class::MailboxFull, Blame::Destination),
        (4, 1 | 2) => (Class::ConnectFailure, Blame::Destination),
        (4, 3 | 4) => (Class::DnsFailure, Blame::Destination),
        (4, 7) => (Class::Expired, Blame::Destination),
        (5, _) => (Class::Protocol, Blame::Us),
        (6, _) => (Class::Policy, Blame::Content),
        (7, 20..=27 | 29 | 30) => (Class::AuthFailed, Blame::SenderDomain),
        (7, 28) => (Class::RateLimited, Blame::SenderIp),
        (7, _) => (Class::Policy, Blame::Destination),
        _ => return None,
    })
}

fn by_code(code: u16) -> (Class, Blame) {
    match code {
        421 | 450 | 451 | 454 => (Class::Other, Blame::Destination),
        // 452: too much for now (RFC 5321 §4.2.3).
        452 => (Class::MailboxFull, Blame::Destination),
        500..=504 | 555 => (Class::Protocol, Blame::Us),
        // 521 and 556 (RFC 7504): the host, or the domain, takes no mail.
        521 | 556 => (Class::NoMx, Blame::Recipient),
        530 | 535 => (Class::RelayDenied, Blame::Us),
        // Bare 550 says that the mailbox is unavailable, "e.g. not found, no access, or policy":
        // too little to stop writing to somebody.
        550 | 551 | 553 => (Class::Other, Blame::Recipient),
        552 => (Class::MailboxFull, Blame::Recipient),
        _ => (Class::Other, Blame::Destination),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_alone() {
        let table = [
            (550, "5.1.1 x", Class::InvalidMailbox, Blame::Recipient),
            (550, "5.7.1 x", Class::Policy, Blame::Destination),
            (550, "5.7.26 x", Class::AuthFailed, Blame::SenderDomain),
            (421, "4.7.28 x", Class::RateLimited, Blame::SenderIp),
            (452, "4.2.2 x", Class::MailboxFull, Blame::Recipient),
            (552, "5.3.4 x", Class::TooLarge, Blame::Content),
            (556, "5.1.10 x", Class::NoMx, Blame::Recipient),
            (550, "x", Class::Other, Blame::Recipient),
            (503, "x", Class::Protocol, Blame::Us),
            (599, "x", Class::Other, Blame::Destination),
        ];
        for (code, text, class, blame) in table {
            assert_eq!(
                by_codes(&Reply::new(code, text)),
                (class, blame),
                "{code} {text}"
            );
        }
    }
}
