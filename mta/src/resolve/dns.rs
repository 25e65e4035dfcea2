//! Questions to DNS, over hickory.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use async_trait::async_trait;
use hickory_resolver::config::{
    ConnectionConfig, NameServerConfig, ResolveHosts, ResolverConfig, ResolverOpts,
};
use hickory_resolver::lookup::Lookup;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::net::{DnsError as HickoryDnsError, NetError};
use hickory_resolver::proto::op::ResponseCode;
use hickory_resolver::proto::rr::{Name, RData, RecordType};
use hickory_resolver::{Resolver, TokioResolver};

/// Records and for how long they hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer<T> {
    /// Never empty.
    pub records: Vec<T>,
    /// The shortest TTL among them.
    pub ttl: Duration,
}

/// Why there are no records.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DnsError {
    /// NXDOMAIN; for how long that is known.
    NoDomain(Duration),
    /// The name exists and has none of that type; for how long that is known.
    NoRecords(Duration),
    /// SERVFAIL, no answer, nonsense.
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
}

/// Each question is sent this often, each time with this deadline.
const ATTEMPTS: usize = 2;
const TIMEOUT: Duration = Duration::from_secs(5);
/// Questions in flight per name server and transport.
const IN_FLIGHT: usize = 512;
/// How long is believed that nothing exists when there is no SOA.
const NEGATIVE_TTL: Duration = Duration::from_secs(30);

/// The configured name servers, or the system's.
pub struct SystemDns {
    resolver: TokioResolver,
    /// Names of the machine itself (its hosts file) are looked up the machine's way.
    uses_system: bool,
}

impl SystemDns {
    /// Asks `nameservers`; when there are none, those of the system.
    ///
    /// # Errors
    /// When the system's configuration cannot be read.
    pub fn new(nameservers: &[SocketAddr]) -> Result<Self, String> {
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
        // Answers are kept by `Resolver`, with failures; twice would only make them older.
        options.cache_size = 0;
        let mut builder = Resolver::builder_with_config(config, TokioRuntimeProvider::default());
        *builder.options_mut() = options;
        let resolver = builder.build().map_err(|error| error.to_string())?;
        Ok(Self {
            resolver,
            uses_system: nameservers.is_empty(),
        })
    }

    async fn lookup(&self, name: &str, kind: RecordType) -> Result<Lookup, DnsError> {
        let absolute = Name::from_ascii(format!("{name}."))
            .map_err(|error| DnsError::Temporary(error.to_string()))?;
        let lookup = self
            .resolver
            .lookup(absolute, kind)
            .await
            .map_err(failure)?;
        Ok(lookup)
    }

    async fn of_kind(&self, host: &str, kind: RecordType) -> Result<Answer<IpAddr>, DnsError> {
        let lookup = self.lookup(host, kind).await?;
        answer(&lookup, |data| match data {
            RData::A(address) => Some(IpAddr::V4(address.0)),
            RData::AAAA(address) => Some(IpAddr::V6(address.0)),
            _ => None,
        })
    }
}

fn server(at: &SocketAddr) -> NameServerConfig {
    let connections = [ConnectionConfig::udp(), ConnectionConfig::tcp()].map(|mut connection| {
        connection.port = at.port();
        connection
    });
    NameServerConfig::new(at.ip(), true, connections.to_vec())
}

fn answer<T>(lookup: &Lookup, pick: impl Fn(&RData) -> Option<T>) -> Result<Answer<T>, DnsError> {
    let ttl = lookup
        .answers()
        .iter()
        .map(|record| record.ttl)
        .min()
        .unwrap_or(0);
    let records: Vec<T> = lookup
        .answers()
        .iter()
        .filter_map(|record| pick(&record.data))
        .collect();
    match records.is_empty() {
        true => Err(DnsError::NoRecords(NEGATIVE_TTL)),
        false => Ok(Answer {
            records,
            ttl: Duration::from_secs(u64::from(ttl)),
        }),
    }
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
        let lookup = self.lookup(domain, RecordType::MX).await?;
        answer(&lookup, |data| match data {
            RData::MX(mx) => {
                let host = mx.exchange.to_ascii().to_ascii_lowercase();
                Some((mx.preference, host.trim_end_matches('.').to_owned()))
            }
            _ => None,
        })
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
                }),
            };
        }
        let (v4, v6) = tokio::join!(
            self.of_kind(host, RecordType::A),
            self.of_kind(host, RecordType::AAAA)
        );
        match (v4, v6) {
            (Ok(v4), Ok(v6)) => {
                let ttl = v4.ttl.min(v6.ttl);
                Ok(Answer {
                    records: v6.records.into_iter().chain(v4.records).collect(),
                    ttl,
                })
            }
            (Ok(one), Err(_)) | (Err(_), Ok(one)) => Ok(one),
            // What one family could not answer, the other cannot deny.
            (Err(DnsError::Temporary(why)), Err(_)) | (Err(_), Err(DnsError::Temporary(why))) => {
                Err(DnsError::Temporary(why))
            }
            (Err(none), Err(_)) => Err(none),
        }
    }
}
