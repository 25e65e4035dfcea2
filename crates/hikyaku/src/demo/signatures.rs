//! Verifies the DKIM signatures of what the sandbox received, as a receiver would: with keys from
//! DNS and a verifier that is not our signer.

use anyhow::{Context, Result};
use bytes::Bytes;
use mail_auth::hickory_resolver::config::{
    ConnectionConfig, NameServerConfig, ResolverConfig, ResolverOpts,
};
use mail_auth::{AuthenticatedMessage, DkimResult, MessageAuthenticator};
use std::net::SocketAddr;

/// How many signatures verify; the first one that does not is an error.
pub(crate) async fn verify(dns: SocketAddr, mails: &[(String, Bytes)]) -> Result<u64> {
    let mut connection = ConnectionConfig::udp();
    connection.port = dns.port();
    let server = NameServerConfig::new(dns.ip(), true, vec![connection]);
    let config = ResolverConfig::from_parts(None, Vec::new(), vec![server]);
    let authenticator =
        MessageAuthenticator::new(config, ResolverOpts::default()).context("no resolver")?;
    let mut passed = 0;
    for (to, content) in mails {
        let message = AuthenticatedMessage::parse(content)
            .with_context(|| format!("the message for {to} is not one"))?;
        for output in authenticator.verify_dkim(&message).await {
            anyhow::ensure!(
                *output.result() == DkimResult::Pass,
                "a signature of the message for {to}: {:?}",
                output.result()
            );
            passed += 1;
        }
    }
    Ok(passed)
}
