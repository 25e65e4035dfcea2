//! What a domain asks, what a connection has, and whether the one satisfies the other.

use std::sync::Arc;

use service::config::TlsPolicy;

use super::sts::{Mode, StsPolicy};

/// What a recipient domain asks of the connections that carry its mail, beside the operator's
/// `tls` for the destination. Nothing by default.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Asked {
    /// The MX records (of an implicit MX: the addresses) are validated by DNSSEC, so each host is
    /// asked for TLSA records (RFC 7672 §2.2).
    pub dane: bool,
    /// The MTA-STS policy (RFC 8461), if its mode is not `none`.
    pub sts: Option<Arc<StsPolicy>>,
}

impl Asked {
    /// The MTA-STS policy, if it is to be kept to and not only reported on.
    pub fn enforced(&self) -> Option<&StsPolicy> {
        self.sts
            .as_deref()
            .filter(|policy| policy.mode == Mode::Enforce)
    }

    /// Whether a connection that could not be had for one is as impossible for the other.
    pub fn is_like(&self, other: &Self) -> bool {
        let hosts = |asked: &Self| asked.enforced().map(|policy| policy.mx.clone());
        self.dane == other.dane && hosts(self) == hosts(other)
    }

    /// Whether it asks for anything that a connection may fail to have.
    pub fn is_anything(&self) -> bool {
        self.dane || self.enforced().is_some()
    }
}

/// How far a connection is protected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// Not at all.
    Plaintext,
    /// TLS with any certificate.
    Encrypted,
    /// TLS, and the certificate chains to a root and names the host.
    Verified,
    /// TLS, and the certificate matches a TLSA record of the host.
    Dane,
}

/// What a connection has to show.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Security {
    /// The MX host, as DNS named it.
    pub host: Arc<str>,
    /// How far it is protected.
    pub level: Level,
    /// The host was asked for TLSA records, and the connection keeps to what they want.
    pub dane_kept: bool,
    /// What a policy in testing would say to it was looked at, and reported.
    pub observed: bool,
}

impl Security {
    /// Whether whatever may go over `other` may go over this one, to another host, for certain: not
    /// where a policy may name the hosts.
    pub fn stands_for(&self, other: &Self) -> bool {
        let as_safe = match other.level {
            Level::Plaintext => true,
            Level::Encrypted => self.level != Level::Plaintext,
            Level::Verified | Level::Dane => false,
        };
        as_safe && (self.dane_kept || !other.dane_kept)
    }

    /// Whether mail of a domain that asks `asked` may go over it, where the operator wants
    /// `floor`. This is the one place that says so: connections are shared by destination, policy
    /// is the domain's own.
    pub fn satisfies(&self, asked: &Asked, floor: TlsPolicy) -> bool {
        let keeps_floor = match floor {
            TlsPolicy::None | TlsPolicy::Opportunistic => true,
            TlsPolicy::Require => self.level != Level::Plaintext,
            TlsPolicy::RequireVerified => matches!(self.level, Level::Verified | Level::Dane),
        };
        let keeps_dane = !asked.dane || self.dane_kept;
        // DANE goes before MTA-STS (RFC 8461 §2), for a domain whose MX records are validated.
        let is_dane = asked.dane && self.level == Level::Dane;
        let keeps_sts = is_dane
            || asked
                .enforced()
                .is_none_or(|policy| self.level == Level::Verified && policy.allows(&self.host));
        // A policy in testing refuses nothing, but its domain wants to know.
        let is_testing = asked
            .sts
            .as_ref()
            .is_some_and(|sts| sts.mode == Mode::Testing);
        let is_told = self.observed || matches!(self.level, Level::Verified | Level::Dane);
        keeps_floor && keeps_dane && keeps_sts && (!is_testing || is_told)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sts(mode: Mode, mx: &str) -> Option<Arc<StsPolicy>> {
        Some(Arc::new(StsPolicy::of(mode, &[mx])))
    }

    #[test]
    fn a_connection_carries_only_what_it_satisfies() {
        let has = |level, dane_kept| Security {
            host: "mx1.x.example".into(),
            level,
            dane_kept,
            observed: false,
        };
        let (plain, any) = (has(Level::Plaintext, false), has(Level::Encrypted, false));
        let (verified, dane) = (has(Level::Verified, false), has(Level::Dane, true));
        let no_tlsa = has(Level::Verified, true);
        let nothing = Asked::default();
        let enforced = Asked {
            dane: false,
            sts: sts(Mode::Enforce, "*.x.example"),
        };
        let elsewhere = Asked {
            dane: false,
            sts: sts(Mode::Enforce, "mx1.y.example"),
        };
        let testing = Asked {
            dane: false,
            sts: sts(Mode::Testing, "mx1.y.example"),
        };
        let signed = Asked {
            dane: true,
            sts: None,
        };
        let both = Asked {
            dane: true,
            sts: sts(Mode::Enforce, "mx1.y.example"),
        };
        let may = TlsPolicy::Opportunistic;
        let table = [
            (&nothing, may, [true, true, true, true, true]),
            (&testing, may, [false, false, true, true, true]),
            (&enforced, may, [false, false, true, false, true]),
            (&elsewhere, may, [false, false, false, false, false]),
            (&signed, may, [false, false, false, true, true]),
            (&both, may, [false, false, false, true, false]),
            (
                &nothing,
                TlsPolicy::Require,
                [false, true, true, true, true],
            ),
            (
                &nothing,
                TlsPolicy::RequireVerified,
                [false, false, true, true, true],
            ),
            (&nothing, TlsPolicy::None, [true, true, true, true, true]),
        ];
        for (asked, floor, wanted) in table {
            let seen =
                [&plain, &any, &verified, &dane, &no_tlsa].map(|s| s.satisfies(asked, floor));
            assert_eq!(seen, wanted, "{asked:?} {floor:?}");
        }
        let observed = Security {
            observed: true,
            ..plain
        };
        assert!(observed.satisfies(&testing, may) && !observed.satisfies(&enforced, may));
    }

    #[test]
    fn what_fails_for_one_domain_fails_for_those_that_ask_the_same() {
        let asks = |dane, sts| Asked { dane, sts };
        let one = asks(false, sts(Mode::Enforce, "a.example"));
        assert!(one.is_like(&asks(false, sts(Mode::Enforce, "a.example"))));
        assert!(!one.is_like(&asks(false, sts(Mode::Enforce, "b.example"))));
        assert!(!one.is_like(&Asked::default()));
        assert!(Asked::default().is_like(&asks(false, sts(Mode::Testing, "a.example"))));
        assert!(!asks(true, None).is_like(&Asked::default()));
    }
}
