//! Questions to DNS, with answers that a person can read.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::Result;
use hickory_resolver::TokioResolver;
use hickory_resolver::net::NetError;
use hickory_resolver::proto::rr::{Name, RData, RecordType};
use service::config::Dns;

use crate::dkim::lookup;

/// How long one question may take, whatever the resolver tries meanwhile.
const PATIENCE: Duration = Duration::from_secs(8);

/// The name servers.
pub(super) struct Names(TokioResolver);

impl Names {
    /// Those of the configuration, or the system's.
    ///
    /// # Errors
    /// When the system's cannot be read.
    pub(super) fn new(dns: &Dns) -> Result<Self> {
        lookup::resolver(dns).map(Self)
    }

    /// Whether any name server answers at all, even that there is nothing.
    pub(super) async fn answer(&self, name: &str) -> Result<(), String> {
        self.records(name, RecordType::SOA).await.map(drop)
    }

    /// The texts of a name; empty where there are none. `Err`: nobody could tell, and why.
    pub(super) async fn txt(&self, name: &str) -> Result<Vec<String>, String> {
        let asked = tokio::time::timeout(PATIENCE, lookup::txt(&self.0, name)).await;
        asked
            .map_err(|_| silent())?
            .map_err(|error| format!("no answer: {error:#}"))
    }

    /// MX hosts, the preferred first; one without a name is a null MX.
    pub(super) async fn mx(&self, name: &str) -> Result<Vec<String>, String> {
        let mut hosts: Vec<_> = self
            .records(name, RecordType::MX)
            .await?
            .into_iter()
            .filter_map(|data| match data {
                RData::MX(mx) => Some((mx.preference, plain(&mx.exchange))),
                _ => None,
            })
            .collect();
        hosts.sort();
        Ok(hosts.into_iter().map(|(_, host)| host).collect())
    }

    /// Addresses of both kinds.
    pub(super) async fn addresses(&self, name: &str) -> Result<Vec<IpAddr>, String> {
        let mut found = Vec::new();
        for kind in [RecordType::A, RecordType::AAAA] {
            let records = self.records(name, kind).await?;
            found.extend(records.into_iter().filter_map(|data| match data {
                RData::A(a) => Some(IpAddr::V4(a.0)),
                RData::AAAA(aaaa) => Some(IpAddr::V6(aaaa.0)),
                _ => None,
            }));
        }
        Ok(found)
    }

    /// The names of an address.
    pub(super) async fn ptr(&self, address: IpAddr) -> Result<Vec<String>, String> {
        let name = Name::from(address).to_ascii();
        let records = self
            .records(name.trim_end_matches('.'), RecordType::PTR)
            .await?;
        let names = records.into_iter().filter_map(|data| match data {
            RData::PTR(name) => Some(plain(&name.0)),
            _ => None,
        });
        Ok(names.collect())
    }

    async fn records(&self, name: &str, kind: RecordType) -> Result<Vec<RData>, String> {
        // The final dot keeps search lists out.
        let name = Name::from_ascii(format!("{name}.")).map_err(|_| "not a DNS name".to_owned())?;
        let asked = tokio::time::timeout(PATIENCE, self.0.lookup(name, kind)).await;
        match asked.map_err(|_| silent())? {
            Ok(answer) => Ok(answer.answers().iter().map(|of| of.data.clone()).collect()),
            Err(error) if NetError::is_no_records_found(&error) => Ok(Vec::new()),
            Err(error) => Err(format!("no answer: {error}")),
        }
    }
}

fn silent() -> String {
    format!("no answer within {} s", PATIENCE.as_secs())
}

/// Lower case, without final dot.
fn plain(name: &Name) -> String {
    name.to_ascii().trim_end_matches('.').to_ascii_lowercase()
}
