//! Limits of a destination: which one a domain belongs to, what holds there, and the permits.
//!
//! Owns the arithmetic of limits. Must not resolve, dial, or decide which message is next. Limits
//! hold per destination *and* egress source, and follow what the destination answers.

mod adaptive;
mod counts;
#[cfg(test)]
mod laws;
mod limiter;
mod memory;
mod pacer;
mod part;
#[cfg(test)]
mod sample;
#[cfg(test)]
mod simulation;
mod spread;
mod warmup;

pub use limiter::{Because, Change, Heard, InForce, Limiter, Reason, Sign};
pub use memory::{Kept, Moment};
pub use pacer::{Pace, Pacer, Permit};
pub use part::{Part, units};
pub use spread::Spread;
pub use warmup::{HeldDays, Warming};

use std::fmt;
use std::sync::{Arc, Mutex};

use model::Domain;
use service::config::shaping::{Limits, ShapingFile};

/// Permits that several connections take from.
pub type SharedPacer = Arc<Mutex<Pacer>>;

/// Hosts that share limits: a domain with a section of its own, a provider, or a set of MX hosts.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Destination(Arc<str>);

/// How long a destination's name may be; beyond, a hash stands for the rest of its hosts.
const NAME_MAX: usize = 120;

impl Destination {
    /// The one called `name`.
    pub fn named(name: &str) -> Self {
        Self(name.into())
    }

    /// Its name, as metrics and facts carry it.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Debug for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The destination of `domain`, whose mail goes to `hosts` (lower case, without final dot, in any
/// order), and the limits that it starts with: its own section, else the first provider to which
/// *all* hosts belong, else the set of hosts.
pub fn destination_of(
    domain: &Domain,
    hosts: &[&str],
    shaping: &ShapingFile,
) -> (Destination, Limits) {
    if let Some(limits) = shaping.domains.get(domain) {
        return (Destination::named(domain.as_str()), limits.clone());
    }
    let of_all_hosts = |provider: &&service::config::shaping::Provider| {
        hosts.iter().all(|host| provider.has_host(host))
    };
    if let Some(provider) = shaping
        .providers
        .iter()
        .find(|p| !hosts.is_empty() && of_all_hosts(p))
    {
        return (Destination::named(&provider.name), provider.limits.clone());
    }
    if hosts.is_empty() {
        return (Destination::named(domain.as_str()), shaping.default.clone());
    }
    (Destination(set_name(hosts).into()), shaping.default.clone())
}

/// The sorted hosts, joined; a long list is cut and told apart by its hash.
fn set_name(hosts: &[&str]) -> String {
    let mut sorted = hosts.to_vec();
    sorted.sort_unstable();
    sorted.dedup();
    let whole = sorted.join(",");
    if whole.len() <= NAME_MAX {
        return whole;
    }
    let first = sorted.first().copied().unwrap_or_default();
    format!(
        "{first}+{}:{:016x}",
        sorted.len() - 1,
        model::partition_hash("", &whole)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shaping() -> ShapingFile {
        ShapingFile::parse(
            std::path::Path::new("shaping.toml"),
            r#"
            [[provider]]
            name = "gmail"
            mx_suffix = [".google.com", ".googlemail.com"]
            rate = "20/s"
            [domain."slow.example"]
            rate = "10/s"
            "#,
        )
        .expect("a shaping file")
    }

    #[test]
    fn own_section_beats_provider_beats_hosts() {
        let table = [
            (
                "slow.example",
                vec!["aspmx.l.google.com"],
                "slow.example",
                "10/s",
            ),
            (
                "a.example",
                vec!["aspmx.l.google.com", "alt1.googlemail.com"],
                "gmail",
                "20/s",
            ),
            (
                "a.example",
                vec!["aspmx.l.google.com", "mx.a.example"],
                "aspmx.l.google.com,mx.a.example",
                "5/s",
            ),
            (
                "a.example",
                vec!["mx2.x", "mx1.x", "mx2.x"],
                "mx1.x,mx2.x",
                "5/s",
            ),
            ("b.example", vec!["mx1.x", "mx2.x"], "mx1.x,mx2.x", "5/s"),
            ("b.example", vec![], "b.example", "5/s"),
        ];
        for (domain, hosts, name, rate) in table {
            let (destination, limits) =
                destination_of(&domain.parse().expect("a domain"), &hosts, &shaping());
            assert_eq!(
                (destination.as_str(), limits.rate.to_string().as_str()),
                (name, rate),
                "{domain} {hosts:?}"
            );
        }
    }

    #[test]
    fn a_long_set_of_hosts_has_a_short_name_of_its_own() {
        let hosts = |n: usize| {
            (0..n)
                .map(|i| format!("mx{i}.mail.provider.example"))
                .collect::<Vec<_>>()
        };
        let name =
            |hosts: &[String]| set_name(&hosts.iter().map(String::as_str).collect::<Vec<_>>());
        assert!(name(&hosts(60)).len() < NAME_MAX);
        assert_ne!(name(&hosts(60)), name(&hosts(61)));
    }
}
