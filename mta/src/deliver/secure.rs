//! How a host has to be spoken to: what the domain asks and what the operator wants, in one place.

use std::sync::Arc;

use model::{Blame, Class};
use service::config::TlsPolicy;
use service::metrics::TlsResult;
use smtp::client::StartTls;

use super::Deliver;
use super::tls::Demand;
use crate::queue::job::Trouble;
use crate::resolve::{Addresses, Host, Route};
use crate::tlspolicy::dane::TlsaSet;
use crate::tlspolicy::sts::{Mode, StsPolicy};
use crate::tlspolicy::tally::{Failure, Flaw, Policy, PolicyKind};
use crate::tlspolicy::{Level, Security};

/// By what a connection is bound; the word stands in the facts of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Bond {
    /// Nothing: TLS where it can be had.
    Opportunity,
    /// `tls` of the destination in `shaping.toml`.
    Operator,
    /// The domain's MTA-STS policy.
    Sts,
    /// The host's TLSA records.
    Dane,
}

/// The terms on which one host takes the mail of one domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Terms {
    pub(super) starttls: StartTls,
    pub(super) demand: Demand,
    pub(super) bond: Bond,
    /// The host was asked for TLSA records, and these terms keep to them.
    pub(super) dane_kept: bool,
    /// Looks at the certificate as a policy in testing would.
    pub(super) observes: bool,
}

impl Terms {
    /// What a connection on these terms has to show.
    pub(super) fn security(&self, host: &Host, encrypted: bool) -> Security {
        let level = match (&self.demand, encrypted) {
            (_, false) => Level::Plaintext,
            (Demand::Any, true) => Level::Encrypted,
            (Demand::Verified, true) => Level::Verified,
            (Demand::Dane(_), true) => Level::Dane,
        };
        Security {
            host: Arc::clone(&host.name),
            level,
            dane_kept: self.dane_kept,
            observed: self.observes,
        }
    }

    /// The policy that a report on `route` names.
    pub(super) fn policy(&self, host: &Host, route: &Route) -> Policy {
        match (&self.demand, &route.asked().sts) {
            (Demand::Dane(records), _) => Policy::new(
                PolicyKind::Tlsa,
                records.lines(),
                vec![(&*host.name).into()],
            ),
            _ if self.bond == Bond::Dane => {
                Policy::new(PolicyKind::Tlsa, Vec::new(), vec![(&*host.name).into()])
            }
            (_, Some(policy)) => sts_policy(policy),
            (_, None) => Policy::new(PolicyKind::NoPolicy, Vec::new(), Vec::new()),
        }
    }

    /// How it is counted.
    pub(super) fn result(&self, encrypted: bool, fallen_back: bool) -> TlsResult {
        match (encrypted, &self.demand) {
            (true, Demand::Dane(_)) => TlsResult::Dane,
            (true, Demand::Verified) => TlsResult::Verified,
            (true, Demand::Any) => TlsResult::Unverified,
            (false, _) if fallen_back => TlsResult::FallenBack,
            (false, _) if self.starttls == StartTls::Never => TlsResult::Off,
            (false, _) => TlsResult::NotOffered,
        }
    }

    /// Who wants it so, for people.
    pub(super) fn because(&self) -> &'static str {
        match self.bond {
            Bond::Opportunity => "",
            Bond::Operator => " (tls of the destination in shaping.toml)",
            Bond::Sts => " (the domain's MTA-STS policy is to be kept to)",
            Bond::Dane => " (the host has TLSA records: DANE)",
        }
    }

    /// What stands behind version and cipher in the facts of a message.
    pub(super) fn label(&self) -> &'static str {
        match (&self.demand, self.bond) {
            (Demand::Dane(_), _) => "DANE",
            (Demand::Verified, Bond::Sts) => "verified, MTA-STS",
            (Demand::Verified, _) => "verified",
            (Demand::Any, _) => "any certificate",
        }
    }
}

impl Deliver {
    /// On which terms `host` may be given what goes by `route`, where the operator wants `floor`.
    ///
    /// # Errors
    /// When it must not be given anything now.
    pub(super) async fn terms(
        &self,
        host: &Host,
        addresses: &Addresses,
        route: &Route,
        floor: TlsPolicy,
    ) -> Result<Terms, Trouble> {
        let asked = route.asked();
        let mut terms = self.operators(host, floor);
        if asked.dane {
            terms.dane_kept = true;
            if addresses.secure
                && let Some(records) = self.records(host, addresses, route).await?
            {
                (terms.starttls, terms.bond) = (StartTls::Required, Bond::Dane);
                if let Some(records) = records {
                    terms.demand = Demand::Dane(Arc::new(records));
                    return Ok(terms);
                }
            }
        }
        let Some(policy) = &asked.sts else {
            return Ok(terms);
        };
        match policy.mode {
            Mode::Enforce if !policy.allows(&host.name) => {
                let text = format!("the domain's MTA-STS policy does not name {}", host.name);
                let failure = Failure::new(Flaw::Other, &host.name, None, "not in the policy");
                self.policies
                    .count(route, sts_policy(policy), Some(failure));
                return Err(refused(text, host));
            }
            Mode::Enforce => {
                (terms.starttls, terms.demand) = (StartTls::Required, Demand::Verified);
                terms.bond = Bond::Sts;
            }
            Mode::Testing => terms.observes = terms.demand == Demand::Any,
            Mode::None => {}
        }
        Ok(terms)
    }

    fn operators(&self, host: &Host, floor: TlsPolicy) -> Terms {
        let is_broken = || {
            let key = format!("{}:{}", host.name, host.port);
            self.hosts.has_no_tls(&key, self.clock.instant())
        };
        let (starttls, demand, bond) = match floor {
            TlsPolicy::None => (StartTls::Never, Demand::Any, Bond::Operator),
            TlsPolicy::Opportunistic if is_broken() => {
                (StartTls::Never, Demand::Any, Bond::Opportunity)
            }
            TlsPolicy::Opportunistic => (StartTls::Opportunistic, Demand::Any, Bond::Opportunity),
            TlsPolicy::Require => (StartTls::Required, Demand::Any, Bond::Operator),
            TlsPolicy::RequireVerified => (StartTls::Required, Demand::Verified, Bond::Operator),
        };
        Terms {
            starttls,
            demand,
            bond,
            dane_kept: false,
            observes: false,
        }
    }

    /// The host's TLSA records: none at all, none that can be used (so any certificate does, but
    /// TLS is a must), or these (RFC 7672 §2.2). They stand at the name that an alias leads to, or
    /// else at the host's own (§2.2.2).
    async fn records(
        &self,
        host: &Host,
        addresses: &Addresses,
        route: &Route,
    ) -> Result<Option<Option<TlsaSet>>, Trouble> {
        let canonical = addresses.canonical.as_deref();
        for name in canonical.into_iter().chain([&*host.name]) {
            let records = self.resolver.tlsa(name, host.port).await;
            let records = records.map_err(|why| {
                let policy = Policy::new(PolicyKind::Tlsa, Vec::new(), vec![name.into()]);
                let failure = Failure::new(Flaw::DnssecInvalid, &host.name, None, &why);
                self.policies.count(route, policy, Some(failure));
                let text = format!("the TLSA records of {name} cannot be had: {why}");
                refused(text, host)
            })?;
            if !records.is_empty() {
                return Ok(Some(TlsaSet::of(&records, &[name, &host.name])));
            }
        }
        Ok(None)
    }
}

fn sts_policy(policy: &StsPolicy) -> Policy {
    Policy::new(PolicyKind::Sts, policy.lines(), policy.mx.clone())
}

fn refused(text: String, host: &Host) -> Trouble {
    Trouble {
        class: Class::TlsFailure,
        blame: Blame::Destination,
        text,
        reply: None,
        host: (&*host.name).into(),
        is_final: false,
    }
}
