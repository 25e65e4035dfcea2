//! Questions to DNS, over hickory.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use hickory_resolver::config::{
    ConnectionConfig, NameServerConfig, ResolveHosts, ResolverConfig, ResolverOpts,
};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::net::xfer::{DnsHandle as _, FirstAnswer as _};
use hickory_resolver::net::{DnsError as HickoryDnsError, NetError, RetryDnsHandle};
use hickory_resolver::proto::op::{
    DnsRequest, DnsRequestOptions, DnsResponse, Edns, Message, Query, ResponseCode,
};
use hickory_resolver::proto::rr::{Name, RData, RecordType};
use hickory_resolver::{NameServerPool, PoolContext, TlsConfig};

use crate::tlspolicy::dane::Tlsa;

/// Records and for how long they hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer<T> {
    /// Never empty.
    pub records: Vec<T>,
    /// The shortest TTL among them.
    pub ttl: Duration,
    /// Validated by DNSSEC, aliases on the way included, by a name server that is believed.
    pub secure: bool,
    /// The name that the records stand at, when aliases led there from another; lower case
    /// without final dot.
    pub canonical: Option<Box<str>>,
}

/// Why there are no records.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DnsError {
    /// NXDOMAIN; for how long that is known.
    NoDomain(Duration),
    /// The name exists and has none of that type; for how long that is known.
    NoRecords(Duration),
    /// SERVFAIL (also for what DNSSEC finds bogus), no answer, nonsense.
    Temporary(String),
}

/// How DNS is asked; comes in as an argument.
#[async_trait]
pub trait Dns: Send + Sync + 'static {
    /// MX records: preference and host, lower case without final dot. A null MX has an empty host.
    ///
    /// # Errors
    /// See [`DnsError`].
    async fn mx(&self, domain: &str) -> Result<Answer<(u16, String)>, DnsError>;

    /// A and AAAA records. `locally`: the machine's own names count too (static routes).
    ///
    /// # Errors
    /// See [`DnsError`].
    async fn addresses(&self, host: &str, locally: bool) -> Result<Answer<IpAddr>, DnsError>;

    /// TXT records, the strings of each joined.
    ///
    /// # Errors
    /// See [`DnsError`].
    async fn txt(&self, name: &str) -> Result<Answer<Vec<u8>>, DnsError>;

    /// TLSA records (RFC 6698).
    ///
    /// # Errors
    /// See [`DnsError`].
    async fn tlsa(&self, name: &str) -> Result<Answer<Tlsa>, DnsError>;

    /// Whether the name server says of `name`, whose SOA is asked for, that it is validated: the
    /// proof that DNSSEC works from here. False also where its word is not believed.
    ///
    /// # Errors
    /// When there is no telling now.
    async fn validates(&self, name: &str) -> Result<bool, DnsError>;
}

/// Each question is sent this often, each time with this deadline.
const ATTEMPTS: usize = 2;
const TIMEOUT: Duration = Duration::from_secs(5);
/// Questions in flight per name server and transport.
const IN_FLIGHT: usize = 512;
/// How long is believed that nothing exists when there is no SOA.
const NEGATIVE_TTL: Duration = Duration::from_secs(30);
/// Aliases that are followed one after the other, where the name server does not do it itself.
const ALIASES_MAX: usize = 8;

/// The configured name servers, or the system's.
pub struct SystemDns {
    servers: RetryDnsHandle<NameServerPool<TokioRuntimeProvider>>,
    options: DnsRequestOptions,
    /// Names of the machine itself (its hosts file) are looked up the machine's way.
    uses_system: bool,
    /// Whether the name servers are believed when they say that they validated.
    believes_ad: bool,
}

impl SystemDns {
    /// Asks `nameservers`; when there are none, those of the system. The AD bit is believed of
    /// name servers on loopback, to which nobody else has the way, or of any with `trust_ad`.
    ///
    /// # Errors
    /// When the system's configuration cannot be read.
    pub fn new(nameservers: &[SocketAddr], trust_ad: bool) -> Result<Self, String> {
        let system = || hickory_resolver::system_conf::read_system_conf();
        let (config, mut options) = match nameservers {
            [] => system()
                .map_err(|error| format!("cannot read the system's name servers: {error}"))?,
            servers => (
                ResolverConfig::from_parts(None, Vec::new(), servers.iter().map(server).collect()),
                ResolverOpts::default(),
            ),
        };
        options.timeout = TIMEOUT;
        options.attempts = ATTEMPTS;
        options.use_hosts_file = ResolveHosts::Never;
        options.max_active_requests = IN_FLIGHT;
        let believes_ad = trust_ad
            || config
                .name_servers
                .iter()
                .all(|server| server.ip.is_loopback());
        let mut request = DnsRequestOptions::default();
        request.use_edns = true;
        request.edns_payload_len = options.edns_payload_len;
        request.recursion_desired = true;
        // None of the servers is spoken to over TLS.
        let tls = TlsConfig::new().map_err(|error| error.to_string())?;
        let context = Arc::new(PoolContext::new(options, tls));
        let pool = NameServerPool::from_config(
            config.name_servers.iter().cloned(),
            context,
            TokioRuntimeProvider::default(),
        );
        Ok(Self {
            servers: RetryDnsHandle::new(pool, ATTEMPTS),
            options: request,
            uses_system: nameservers.is_empty(),
            believes_ad,
        })
    }

    async fn ask(&self, name: &Name, kind: RecordType) -> Result<DnsResponse, DnsError> {
        let mut message = Message::query();
        message.metadata.recursion_desired = true;
        // "Tell me whether you validated" (RFC 6840 §5.7), without the signatures themselves.
        message.metadata.authentic_data = true;
        message
            .edns
            .get_or_insert_with(Edns::new)
            .set_max_payload(self.options.edns_payload_len);
        message.queries.push(Query::query(name.clone(), kind));
        let request = DnsRequest::new(message, self.options);
        self.servers
            .send(request)
            .first_answer()
            .await
            .and_then(|response| HickoryDnsError::from_response(response).map_err(NetError::from))
            .map_err(failure)
    }

    async fn lookup<T>(
        &self,
        name: &str,
        kind: RecordType,
        pick: impl Fn(&RData) -> Option<T>,
    ) -> Result<Answer<T>, DnsError> {
        let mut at = absolute(name)?;
        let (mut secure, mut ttl, mut aliased) = (self.believes_ad, u32::MAX, false);
        for _ in 0..ALIASES_MAX {
            let response = self.ask(&at, kind).await?;
            secure &= response.metadata.authentic_data;
            let (target, seen) = follow(&response, &at);
            ttl = ttl.min(seen);
            aliased |= target != at;
            at = target;
            let at_target = response.answers.iter().filter(|record| record.name == at);
            let records: Vec<T> = at_target
                .inspect(|record| ttl = ttl.min(record.ttl))
                .filter_map(|record| pick(&record.data))
                .collect();
            if !records.is_empty() {
                return Ok(Answer {
                    records,
                    ttl: Duration::from_secs(u64::from(ttl)),
                    secure,
                    canonical: aliased.then(|| text_of(&at).into()),
                });
            }
            if seen == u32::MAX {
                return Err(DnsError::NoRecords(NEGATIVE_TTL));
            }
        }
        Err(DnsError::Temporary(format!(
            "{name} leads from alias to alias"
        )))
    }

    async fn of_kind(&self, host: &str, kind: RecordType) -> Result<Answer<IpAddr>, DnsError> {
        let pick = |data: &RData| match data {
            RData::A(address) => Some(IpAddr::V4(address.0)),
            RData::AAAA(address) => Some(IpAddr::V6(address.0)),
            _ => None,
        };
        self.lookup(host, kind, pick).await
    }
}

fn server(at: &SocketAddr) -> NameServerConfig {
    let connections = [ConnectionConfig::udp(), ConnectionConfig::tcp()].map(|mut connection| {
        connection.port = at.port();
        connection
    });
    NameServerConfig::new(at.ip(), true, connections.to_vec())
}

fn absolute(name: &str) -> Result<Name, DnsError> {
    Name::from_ascii(format!("{}.", name.trim_end_matches('.')))
        .map_err(|error| DnsError::Temporary(error.to_string()))
}

fn text_of(name: &Name) -> String {
    let text = name.to_ascii().to_ascii_lowercase();
    text.trim_end_matches('.').to_owned()
}

/// Where the aliases in an answer lead from `name`, and their shortest TTL.
fn follow(response: &DnsResponse, name: &Name) -> (Name, u32) {
    let (mut at, mut ttl) = (name.clone(), u32::MAX);
    // Each alias at most once: a ring of them ends.
    for _ in 0..response.answers.len().min(ALIASES_MAX) {
        let alias = response
            .answers
            .iter()
            .find_map(|record| match &record.data {
                RData::CNAME(target) if record.name == at => Some((record.ttl, target.0.clone())),
                _ => None,
            });
        let Some((seen, target)) = alias else { break };
        (at, ttl) = (target, ttl.min(seen));
    }
    (at, ttl)
}

fn failure(error: NetError) -> DnsError {
    match &error {
        NetError::Dns(HickoryDnsError::NoRecordsFound(none)) => {
            let ttl = none.negative_ttl.map_or(NEGATIVE_TTL, |seconds| {
                Duration::from_secs(u64::from(seconds))
            });
            match none.response_code {
                ResponseCode::NXDomain => DnsError::NoDomain(ttl),
                ResponseCode::NoError => DnsError::NoRecords(ttl),
                other => DnsError::Temporary(other.to_string()),
            }
        }
        _ => DnsError::Temporary(error.to_string()),
    }
}

#[async_trait]
impl Dns for SystemDns {
    async fn mx(&self, domain: &str) -> Result<Answer<(u16, String)>, DnsError> {
        let pick = |data: &RData| match data {
            RData::MX(mx) => Some((mx.preference, text_of(&mx.exchange))),
            _ => None,
        };
        self.lookup(domain, RecordType::MX, pick).await
    }

    async fn addresses(&self, host: &str, locally: bool) -> Result<Answer<IpAddr>, DnsError> {
        if locally && self.uses_system {
            let found = tokio::net::lookup_host((host, 0))
                .await
                .map_err(|error| DnsError::Temporary(error.to_string()))?;
            let records: Vec<_> = found.map(|at| at.ip()).collect();
            return match records.is_empty() {
                true => Err(DnsError::NoRecords(NEGATIVE_TTL)),
                false => Ok(Answer {
                    records,
                    ttl: NEGATIVE_TTL,
                    secure: false,
                    canonical: None,
                }),
            };
        }
        let (v4, v6) = tokio::join!(
            self.of_kind(host, RecordType::A),
            self.of_kind(host, RecordType::AAAA)
        );
        match (v4, v6) {
            (Ok(v4), Ok(v6)) => Ok(Answer {
                records: v6.records.into_iter().chain(v4.records).collect(),
                ttl: v4.ttl.min(v6.ttl),
                secure: v4.secure && v6.secure,
                canonical: v4.canonical.filter(|_| v4.secure && v6.secure),
            }),
            (Ok(one), Err(_)) | (Err(_), Ok(one)) => Ok(one),
            // What one family could not answer, the other cannot deny.
            (Err(DnsError::Temporary(why)), Err(_)) | (Err(_), Err(DnsError::Temporary(why))) => {
                Err(DnsError::Temporary(why))
            }
            (Err(none), Err(_)) => Err(none),
        }
    }

    async fn txt(&self, name: &str) -> Result<Answer<Vec<u8>>, DnsError> {
        let pick = |data: &RData| match data {
            RData::TXT(text) => Some(text.txt_data.concat()),
            _ => None,
        };
        self.lookup(name, RecordType::TXT, pick).await
    }

    async fn tlsa(&self, name: &str) -> Result<Answer<Tlsa>, DnsError> {
        let pick = |data: &RData| match data {
            RData::TLSA(tlsa) => Some(Tlsa {
                usage: tlsa.cert_usage.into(),
                selector: tlsa.selector.into(),
                matching: tlsa.matching.into(),
                data: tlsa.cert_data.as_slice().into(),
            }),
            _ => None,
        };
        self.lookup(name, RecordType::TLSA, pick).await
    }

    async fn validates(&self, name: &str) -> Result<bool, DnsError> {
        if !self.believes_ad {
            return Ok(false);
        }
        let response = self.ask(&absolute(name)?, RecordType::SOA).await?;
        Ok(response.metadata.authentic_data)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use testkit::dns::{Behaviour, DnsServer, Zone};

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    fn zone() -> Zone {
        Zone::new()
            .ttl(300, 30)
            .apex("signed.example")
            .mx("signed.example", 10, "MX.Signed.example")
            .a("mx.signed.example", ip("192.0.2.1"))
            .a("mx.signed.example", ip("2001:db8::1"))
            .cname("alias.signed.example", "mx.signed.example")
            .cname("out.signed.example", "mx.plain.example")
            .a("mx.plain.example", ip("192.0.2.2"))
            .insecure("plain.example")
            .cname("ring.signed.example", "gnir.signed.example")
            .cname("gnir.signed.example", "ring.signed.example")
            .cname("nowhere.signed.example", "gone.signed.example")
            .txt("signed.example", &"x".repeat(600))
            .tlsa("_25._tcp.mx.signed.example", (3, 1, 1), &[7; 32])
            .a("broken.signed.example", ip("192.0.2.3"))
            .behave("broken.signed.example", Behaviour::ServFail)
            .a("long.signed.example", ip("192.0.2.4"))
            .behave("long.signed.example", Behaviour::Truncate)
            .a("half.signed.example", ip("192.0.2.5"))
            .behave_for("half.signed.example", RecordType::AAAA, Behaviour::ServFail)
            .null_mx("null.signed.example")
    }

    #[tokio::test]
    async fn answers_say_what_they_are_and_whether_they_were_validated() {
        let server = DnsServer::start(zone().authentic(true))
            .await
            .expect("a server");
        let dns = SystemDns::new(&[server.addr()], false).expect("a resolver");
        let mx = dns.mx("signed.example").await.expect("records");
        assert_eq!(mx.records, [(10, "mx.signed.example".to_owned())]);
        assert!(mx.secure && mx.ttl == Duration::from_secs(300));
        let null = dns.mx("null.signed.example").await.expect("a record");
        assert_eq!(null.records, [(0, String::new())]);

        let both = dns
            .addresses("mx.signed.example", false)
            .await
            .expect("addresses");
        assert_eq!(both.records, [ip("2001:db8::1"), ip("192.0.2.1")]);
        assert_eq!((both.secure, both.canonical), (true, None));
        let alias = dns
            .addresses("alias.signed.example", false)
            .await
            .expect("addresses");
        assert_eq!(alias.canonical.as_deref(), Some("mx.signed.example"));
        assert!(alias.secure);
        for name in ["half.signed.example", "long.signed.example"] {
            assert_eq!(
                dns.addresses(name, false).await.expect(name).records.len(),
                1
            );
        }
        let unsigned = dns
            .addresses("mx.plain.example", false)
            .await
            .expect("addresses");
        assert!(!unsigned.secure);

        let text = dns.txt("signed.example").await.expect("a text");
        assert_eq!(text.records, [vec![b'x'; 600]]);
        let tlsa = dns
            .tlsa("_25._tcp.mx.signed.example")
            .await
            .expect("a record");
        let record = &tlsa.records[0];
        assert_eq!((record.usage, record.selector, record.matching), (3, 1, 1));
        assert_eq!((&*record.data, tlsa.secure), (&[7; 32][..], true));
        assert_eq!(dns.validates("signed.example").await, Ok(true));

        let none = |error| matches!(error, Err(DnsError::NoRecords(_)));
        assert!(none(
            dns.addresses("signed.example", false).await.map(|_| ())
        ));
        assert!(none(dns.mx("mx.signed.example").await.map(|_| ())));
        let gone = dns.mx("gone.example").await;
        assert_eq!(gone, Err(DnsError::NoDomain(Duration::from_secs(30))));
        let nowhere = dns.addresses("nowhere.signed.example", false).await;
        assert!(matches!(nowhere, Err(DnsError::NoDomain(_))), "{nowhere:?}");
        for name in ["broken.signed.example", "ring.signed.example"] {
            let broken = dns.addresses(name, false).await;
            assert!(broken.is_err(), "{name}: {broken:?}");
        }
        assert!(matches!(
            dns.mx("broken.signed.example").await,
            Err(DnsError::Temporary(_))
        ));
    }

    #[tokio::test]
    async fn who_does_not_validate_is_not_said_to() {
        let server = DnsServer::start(zone()).await.expect("a server");
        let dns = SystemDns::new(&[server.addr()], true).expect("a resolver");
        assert!(!dns.mx("signed.example").await.expect("records").secure);
        assert_eq!(dns.validates("signed.example").await, Ok(false));
        // A name server elsewhere is not believed, and not even asked, unless the operator says so.
        let elsewhere = "192.0.2.53:53".parse().expect("an address");
        let dns = SystemDns::new(&[server.addr(), elsewhere], false).expect("a resolver");
        assert_eq!(dns.validates("signed.example").await, Ok(false));
    }
}
