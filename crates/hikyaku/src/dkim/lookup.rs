//! TXT records, from the configured name servers.

use anyhow::{Context as _, Result};
use hickory_resolver::TokioResolver;
use hickory_resolver::config::{ConnectionConfig, NameServerConfig, ResolverConfig};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::proto::rr::{Name, RData};
use service::config::Dns;

/// The TXT records of each name, each with its strings joined; an empty list where there are none.
///
/// # Errors
/// The outer one when there is no resolver to ask; each inner one when a name server did not answer
/// or said it cannot tell.
pub(super) fn texts(dns: &Dns, names: &[String]) -> Result<Vec<Result<Vec<String>>>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start")?;
    runtime.block_on(async {
        let resolver = resolver(dns)?;
        let mut answers = Vec::with_capacity(names.len());
        for name in names {
            answers.push(txt(&resolver, name).await);
        }
        Ok(answers)
    })
}

/// Asks the configured name servers, or the system's.
///
/// # Errors
/// When those cannot be read.
pub(crate) fn resolver(dns: &Dns) -> Result<TokioResolver> {
    let builder = if dns.nameservers.is_empty() {
        TokioResolver::builder_tokio().context("cannot read the system's name servers")?
    } else {
        let config = configured(dns);
        TokioResolver::builder_with_config(config, TokioRuntimeProvider::default())
    };
    builder.build().context("cannot make a resolver")
}

/// The configured name servers.
pub(crate) fn configured(dns: &Dns) -> ResolverConfig {
    let servers = dns.nameservers.iter().map(|at| {
        let mut connections = vec![ConnectionConfig::udp(), ConnectionConfig::tcp()];
        for connection in &mut connections {
            connection.port = at.port();
        }
        NameServerConfig::new(at.ip(), true, connections)
    });
    ResolverConfig::from_parts(None, Vec::new(), servers.collect())
}

/// The TXT records of a name, each with its strings joined; an empty list where there are none.
///
/// # Errors
/// When the name servers did not answer, or said that they cannot tell.
pub(crate) async fn txt(resolver: &TokioResolver, name: &str) -> Result<Vec<String>> {
    // The final dot keeps search lists out.
    let name = Name::from_ascii(format!("{name}.")).context("not a DNS name")?;
    let answer = match resolver.txt_lookup(name).await {
        Ok(answer) => answer,
        Err(error) if error.is_no_records_found() => return Ok(Vec::new()),
        Err(error) => return Err(error.into()),
    };
    let texts = answer
        .answers()
        .iter()
        .filter_map(|record| match &record.data {
            RData::TXT(txt) => Some(String::from_utf8_lossy(&txt.txt_data.concat()).into_owned()),
            _ => None,
        });
    Ok(texts.collect())
}
