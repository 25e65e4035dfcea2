//! Where mail for a domain goes: MX hosts, their addresses, and why there are none.
//!
//! Owns DNS and its memory: one lookup in flight per name, answers for as long as they say, and
//! failures for a moment (RFC 9520), so that a dead domain is not asked for at full rate. Must not
//! connect to what it finds, and decides no retry.
//!
//! RFC 5321 §5.1 (MX, implicit MX), RFC 7505 (null MX).

mod cache;
mod dns;
mod private;

pub use dns::{Answer, Dns, DnsError, SystemDns};
pub(crate) use private::is_private;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use ipnet::IpNet;
use model::{Blame, Class, Domain};
use service::clock::SharedClock;
use service::config::Families;
use service::config::shaping::Routes;

use crate::queue::job::Trouble;
use crate::tlspolicy::Asked;
use crate::tlspolicy::dane::Tlsa;
pub(crate) use cache::Cache;

/// Answers are kept at least this long, whatever their TTL, and at most a day.
const TTL: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(86_400));
/// That nothing exists is believed at most this long: domains come (back) to life.
const NEGATIVE_TTL_MAX: Duration = Duration::from_secs(300);
/// How long a failure to ask is remembered.
const FAILURE_TTL: Duration = Duration::from_secs(5);
/// Names remembered, of each kind.
const NAMES_MAX: usize = 100_000;
/// Hosts of one domain that are of any use.
const HOSTS_MAX: usize = 32;
/// Addresses of one host that are tried.
const ADDRESSES_MAX: usize = 16;

/// A host to connect to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Host {
    /// Lower is tried first.
    pub preference: u16,
    /// Lower case, without final dot; or an IP address of a static route.
    pub name: Arc<str>,
    /// The port.
    pub port: u16,
}

/// Where a domain's mail goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    hosts: Vec<Host>,
    key: Arc<str>,
    /// By the operator's word: not checked as private.
    is_static: bool,
    /// What names the hosts is validated by DNSSEC.
    is_secure: bool,
    asked: Asked,
    /// The domain that wants reports on how TLS with it goes.
    reported_for: Option<Arc<str>>,
}

impl Route {
    /// The route over `hosts`, in any order.
    pub fn new(mut hosts: Vec<Host>, is_static: bool) -> Self {
        hosts.sort();
        hosts.dedup();
        hosts.truncate(HOSTS_MAX);
        let parts: Vec<_> = hosts
            .iter()
            .map(|host| format!("{}:{}", host.name, host.port))
            .collect();
        Self {
            hosts,
            key: parts.join(",").into(),
            is_static,
            is_secure: false,
            asked: Asked::default(),
            reported_for: None,
        }
    }

    fn secure(mut self, is_secure: bool) -> Self {
        self.is_secure = is_secure;
        self
    }

    /// Whether the records that name the hosts are validated by DNSSEC.
    pub fn is_secure(&self) -> bool {
        self.is_secure
    }

    /// The same route, for a domain that asks this of its connections.
    #[must_use]
    pub fn asking(mut self, asked: Asked) -> Self {
        self.asked = asked;
        self
    }

    /// The same route, with the domain that wants reports on it.
    #[must_use]
    pub fn reported_for(mut self, domain: &str) -> Self {
        self.reported_for = Some(domain.into());
        self
    }

    /// The domain that wants reports on how TLS with it goes (RFC 8460).
    pub fn reports_to(&self) -> Option<&str> {
        self.reported_for.as_deref()
    }

    /// What the domain asks of the connections to these hosts. Other domains with the same hosts
    /// may ask something else: it is not part of [`Route::key`].
    pub fn asked(&self) -> &Asked {
        &self.asked
    }

    /// What tells routes apart: the same hosts and ports.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// Names of the destination: hosts, with the port where an operator gave one.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        let whole = self.is_static.then_some(&*self.key);
        let names = self
            .hosts
            .iter()
            .map(|host| &*host.name)
            .filter(move |_| whole.is_none());
        whole.into_iter().chain(names)
    }

    /// All of them, by preference.
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// Hosts in the order in which to try them: by preference, at random within one.
    pub fn in_order(&self, random: &mut fastrand::Rng) -> Vec<Host> {
        let mut hosts = self.hosts.clone();
        random.shuffle(&mut hosts);
        hosts.sort_by_key(|host| host.preference);
        hosts
    }

    /// Whether it is the operator's word.
    pub fn is_static(&self) -> bool {
        self.is_static
    }
}

/// The addresses of a host that may be connected to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Addresses {
    list: Arc<[IpAddr]>,
    /// Validated by DNSSEC.
    pub secure: bool,
    /// The name that they stand at, when the host is an alias for it.
    pub canonical: Option<Arc<str>>,
}

impl Addresses {
    fn literal(address: IpAddr) -> Self {
        Self {
            list: [address].into(),
            secure: false,
            canonical: None,
        }
    }

    /// At random within a family, so that all of them get their share, and the families as the
    /// operator wants them.
    pub fn in_order(&self, families: Families, random: &mut fastrand::Rng) -> Vec<IpAddr> {
        let wanted = |address: &&IpAddr| match families {
            Families::PreferIpv4 | Families::PreferIpv6 => true,
            Families::Ipv4 => address.is_ipv4(),
            Families::Ipv6 => address.is_ipv6(),
        };
        let mut list: Vec<_> = self.list.iter().filter(wanted).copied().collect();
        random.shuffle(&mut list);
        let v4_first = families == Families::PreferIpv4;
        list.sort_by_key(|address| address.is_ipv4() != v4_first);
        list
    }

    /// All of them.
    pub fn all(&self) -> &[IpAddr] {
        &self.list
    }
}

/// Routes and addresses, with their memory. Shared by reference.
pub struct Resolver {
    dns: Arc<dyn Dns>,
    clock: SharedClock,
    routes: ArcSwap<Routes>,
    port: u16,
    allowed_private: Vec<IpNet>,
    mx: Cache<Result<Arc<Route>, Trouble>>,
    addresses: Cache<Result<Addresses, Trouble>>,
    tlsa: Cache<Result<Arc<[Tlsa]>, String>>,
}

impl std::fmt::Debug for Resolver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Resolver")
            .field("routes", &self.routes)
            .finish_non_exhaustive()
    }
}

impl Resolver {
    /// A resolver over `dns`: `port` is that of hosts found by MX, `allowed_private` are networks
    /// that may be delivered to although they are private.
    pub fn new(
        dns: Arc<dyn Dns>,
        clock: SharedClock,
        routes: Routes,
        port: u16,
        allowed_private: Vec<IpNet>,
    ) -> Self {
        Self {
            dns,
            clock,
            routes: ArcSwap::from_pointee(routes),
            port,
            allowed_private,
            mx: Cache::new(NAMES_MAX),
            addresses: Cache::new(NAMES_MAX),
            tlsa: Cache::new(NAMES_MAX),
        }
    }

    /// Other static routes hold from now on.
    pub fn change_routes(&self, routes: Routes) {
        self.routes.store(Arc::new(routes));
    }

    /// Where mail for `domain` goes, and for how long that is known.
    ///
    /// # Errors
    /// Final: the domain does not exist ([`Class::BadDomain`]), or takes no mail ([`Class::NoMx`]).
    /// Otherwise DNS could not be asked.
    pub async fn route(&self, domain: &Domain) -> Result<(Arc<Route>, Duration), Trouble> {
        if let Some(route) = self.static_route(domain) {
            return Ok((Arc::new(route), TTL.1));
        }
        let (answer, until) = self
            .mx
            .get(domain.as_str(), self.clock.instant(), || {
                let (dns, port, clock, name) = (
                    Arc::clone(&self.dns),
                    self.port,
                    self.clock.clone(),
                    domain.as_str().to_owned(),
                );
                async move { from_now(find_route(&*dns, &name, port).await, &clock) }
            })
            .await;
        answer.map(|route| (route, until.saturating_duration_since(self.clock.instant())))
    }

    /// Where mail for `domain` went when it was last looked up, for people; asks nobody.
    pub fn last_known(&self, domain: &Domain) -> Option<Arc<Route>> {
        match self.static_route(domain) {
            Some(route) => Some(Arc::new(route)),
            None => self.mx.peek(domain.as_str())?.ok(),
        }
    }

    fn static_route(&self, domain: &Domain) -> Option<Route> {
        let routes = self.routes.load();
        let route = routes.of(domain)?;
        let host = Host {
            preference: 0,
            name: route.host.as_str().into(),
            port: route.port.unwrap_or(self.port),
        };
        Some(Route::new(vec![host], true))
    }

    /// The addresses of a host of `route`, those that may be connected to.
    ///
    /// # Errors
    /// When there are none: not final, as other hosts or another time may do.
    pub async fn addresses(&self, host: &Host, route: &Route) -> Result<Addresses, Trouble> {
        if let Ok(address) = host.name.parse::<IpAddr>() {
            return self.permitted(host, Addresses::literal(address), route);
        }
        let (answer, _) = self
            .addresses
            .get(&host.name, self.clock.instant(), || {
                let (dns, clock, name, is_static) = (
                    Arc::clone(&self.dns),
                    self.clock.clone(),
                    host.name.to_string(),
                    route.is_static,
                );
                async move { from_now(find_addresses(&*dns, &name, is_static).await, &clock) }
            })
            .await;
        self.permitted(host, answer?, route)
    }

    /// The TLSA records for `port` of `name`, validated by DNSSEC; empty when there are none, or
    /// none that are validated.
    ///
    /// # Errors
    /// Why there is no telling; mail for who asks for DANE must not go to this host now (RFC 7672
    /// §2.1.1).
    pub async fn tlsa(&self, name: &str, port: u16) -> Result<Arc<[Tlsa]>, String> {
        let name = format!("_{port}._tcp.{name}");
        let now = self.clock.instant();
        let asked = self.tlsa.get(&name, now, || {
            let (dns, clock, name) = (Arc::clone(&self.dns), self.clock.clone(), name.clone());
            async move {
                let answer = dns.tlsa(&name).await;
                let now = clock.instant();
                match answer {
                    Ok(answer) if answer.secure => {
                        (Ok(answer.records.into()), now + positive(answer.ttl))
                    }
                    Ok(answer) => (Ok(Arc::default()), now + positive(answer.ttl)),
                    Err(DnsError::NoRecords(ttl) | DnsError::NoDomain(ttl)) => {
                        (Ok(Arc::default()), now + negative(ttl))
                    }
                    Err(DnsError::Temporary(why)) => (Err(why), now + FAILURE_TTL),
                }
            }
        });
        asked.await.0
    }

    /// Leaves out what must not be connected to: an MX record is a stranger's word.
    fn permitted(
        &self,
        host: &Host,
        addresses: Addresses,
        route: &Route,
    ) -> Result<Addresses, Trouble> {
        let fits = |address: &&IpAddr| route.is_static || self.may_connect(**address);
        let permitted: Vec<IpAddr> = addresses
            .list
            .iter()
            .filter(fits)
            .copied()
            .take(ADDRESSES_MAX)
            .collect();
        if permitted.is_empty() {
            let text = format!("{} has only addresses that are not public", host.name);
            return Err(trouble(Class::Policy, Blame::Destination, text, false));
        }
        Ok(Addresses {
            list: permitted.into(),
            ..addresses
        })
    }

    /// Whether a stranger's DNS may lead us to this address.
    pub fn may_connect(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        let is_allowed = |net: &IpNet| net.contains(&address);
        !is_private(address) || self.allowed_private.iter().any(is_allowed)
    }
}

/// An answer, and for how long it holds from when it came.
type Kept<T> = (Result<T, Trouble>, Duration);

/// What never came took longer than it is remembered: only its end can be counted from.
fn from_now<T>((answer, ttl): Kept<T>, clock: &SharedClock) -> (Result<T, Trouble>, Instant) {
    (answer, clock.instant() + ttl)
}

async fn find_route(dns: &dyn Dns, domain: &str, port: u16) -> Kept<Arc<Route>> {
    let hosts = match dns.mx(domain).await {
        Ok(answer) => answer,
        Err(DnsError::NoRecords(ttl)) => return implicit_mx(dns, domain, port, ttl).await,
        Err(DnsError::NoDomain(ttl)) => {
            let text = format!("the domain {domain} does not exist");
            return (
                Err(trouble(Class::BadDomain, Blame::Recipient, text, true)),
                negative(ttl),
            );
        }
        Err(DnsError::Temporary(why)) => {
            return (Err(no_answer(domain, &why)), FAILURE_TTL);
        }
    };
    let (ttl, is_secure) = (positive(hosts.ttl), hosts.secure);
    // RFC 7505: a single MX of preference 0 and an empty name. Beside others the empty name means
    // nothing.
    let is_null = |(_, name): &&(u16, String)| name.is_empty();
    if !hosts.records.is_empty() && hosts.records.iter().all(|record| is_null(&record)) {
        let text = format!("the domain {domain} takes no mail (null MX)");
        return (Err(trouble(Class::NoMx, Blame::Recipient, text, true)), ttl);
    }
    let named = hosts.records.iter().filter(|record| !is_null(record));
    let hosts = named.map(|(preference, name)| Host {
        preference: *preference,
        name: name.as_str().into(),
        port,
    });
    let route = Route::new(hosts.collect(), false).secure(is_secure);
    (Ok(Arc::new(route)), ttl)
}

/// Without MX records the domain itself is the host, if it has an address (RFC 5321 §5.1).
async fn implicit_mx(dns: &dyn Dns, domain: &str, port: u16, ttl: Duration) -> Kept<Arc<Route>> {
    match dns.addresses(domain, false).await {
        Ok(found) => {
            let host = Host {
                preference: 0,
                name: domain.into(),
                port,
            };
            // One zone holds both: where its addresses are validated, so is that it has no MX.
            let route = Route::new(vec![host], false).secure(found.secure);
            (Ok(Arc::new(route)), positive(ttl))
        }
        Err(DnsError::NoRecords(_) | DnsError::NoDomain(_)) => {
            let text = format!("the domain {domain} has neither MX nor address records");
            (
                Err(trouble(Class::NoMx, Blame::Recipient, text, true)),
                negative(ttl),
            )
        }
        Err(DnsError::Temporary(why)) => (Err(no_answer(domain, &why)), FAILURE_TTL),
    }
}

async fn find_addresses(dns: &dyn Dns, host: &str, is_static: bool) -> Kept<Addresses> {
    match dns.addresses(host, is_static).await {
        Ok(answer) => {
            let addresses = Addresses {
                list: answer.records.into(),
                secure: answer.secure,
                canonical: answer.canonical.map(Into::into),
            };
            (Ok(addresses), positive(answer.ttl))
        }
        Err(DnsError::NoRecords(ttl) | DnsError::NoDomain(ttl)) => {
            let text = format!("the mail host {host} has no address");
            (
                Err(trouble(Class::DnsFailure, Blame::Destination, text, false)),
                negative(ttl),
            )
        }
        Err(DnsError::Temporary(why)) => (Err(no_answer(host, &why)), FAILURE_TTL),
    }
}

fn positive(ttl: Duration) -> Duration {
    ttl.clamp(TTL.0, TTL.1)
}

fn negative(ttl: Duration) -> Duration {
    ttl.clamp(TTL.0, NEGATIVE_TTL_MAX)
}

fn no_answer(name: &str, why: &str) -> Trouble {
    trouble(
        Class::DnsFailure,
        Blame::Destination,
        format!("DNS gave no answer about {name}: {why}"),
        false,
    )
}

fn trouble(class: Class, blame: Blame, text: String, is_final: bool) -> Trouble {
    Trouble {
        class,
        blame,
        text,
        reply: None,
        host: "".into(),
        is_final,
    }
}

#[cfg(test)]
mod tests;
