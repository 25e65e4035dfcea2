//! The tracking hosts: whether links lead anywhere, and by a valid certificate.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use hyper::Uri;
use model::TrackingMode;
use mta::deliver::TlsConfigs;
use rustls::ClientConfig;
use rustls::pki_types::{ServerName, UnixTime};
use rustls::time_provider::TimeProvider;
use service::clock::{Clock as _, SystemClock};
use service::config::Config;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::Finding;
use super::names::Names;

const CHECK: &str = "tracking";
const PATIENCE: Duration = Duration::from_secs(10);
/// A certificate that ends sooner should have been renewed.
const RENEWED: Duration = Duration::from_secs(14 * 86_400);

/// A clock that is ahead: what ends until then is over.
#[derive(Debug)]
struct Ahead(Duration);

impl TimeProvider for Ahead {
    fn current_time(&self) -> Option<UnixTime> {
        let now = u64::try_from(SystemClock.now().seconds()).ok()?;
        Some(UnixTime::since_unix_epoch(
            Duration::from_secs(now) + self.0,
        ))
    }
}

/// A finding for each host that links point to.
pub(super) async fn tracking(config: &Config, names: &Names) -> Vec<Finding> {
    let used = config.accounts.iter().map(|account| &account.tracking);
    let used = used.filter(|of| of.mode != TrackingMode::Off);
    let bases: BTreeSet<&str> = used.map(|of| of.base_url.as_str()).collect();
    let mut found = Vec::new();
    for base in bases {
        found.push(host(config, names, base).await);
    }
    found
}

async fn host(config: &Config, names: &Names, base: &str) -> Finding {
    let Some((is_secure, host, port)) = parts(base) else {
        return Finding::fail(
            CHECK,
            format!("base_url {base:?} is not a URL"),
            "set [accounts.tracking] base_url",
        );
    };
    let loopback = "recipients cannot reach it: set [accounts.tracking] base_url to a public name of the tracker";
    let addresses = match host.parse() {
        Ok(ip) => vec![ip],
        Err(_) => match names.addresses(&host).await {
            Ok(addresses) => addresses,
            Err(why) => {
                return Finding::fail(
                    CHECK,
                    format!("address of {host}: {why}"),
                    "ask again later",
                );
            }
        },
    };
    let Some(first) = addresses.first() else {
        let advice = "publish its address: no link in mail that was sent works without";
        return Finding::fail(CHECK, format!("{host} has no address"), advice);
    };
    if first.is_loopback() && host.parse::<std::net::IpAddr>().is_ok() {
        return Finding::fail(CHECK, format!("links point to {base}"), loopback);
    }
    let reached = tokio::time::timeout(PATIENCE, TcpStream::connect((*first, port))).await;
    let stream = match reached {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            return Finding::fail(
                CHECK,
                format!("{host} ({first}) is not there: {error}"),
                "start the tracker, or what stands before it",
            );
        }
        Err(_) => {
            return Finding::fail(
                CHECK,
                format!("{host} ({first}) does not answer"),
                "start the tracker, or what stands before it",
            );
        }
    };
    if !is_secure {
        return Finding::warn(
            CHECK,
            format!("{base} answers, and is not encrypted"),
            "put it behind https: some mail programs warn of such links",
        );
    }
    secure(config, &host, port, *first, stream).await
}

async fn secure(
    config: &Config,
    host: &str,
    port: u16,
    ip: std::net::IpAddr,
    stream: TcpStream,
) -> Finding {
    let now = match handshake(config, host, stream, Duration::ZERO).await {
        Ok(()) => None,
        Err(error) => Some(format!("{error:#}")),
    };
    if let Some(why) = now {
        return Finding::fail(
            CHECK,
            format!("the certificate of {host} is not valid: {why}"),
            "every link in mail shows a warning until it is",
        );
    }
    let later = match tokio::time::timeout(PATIENCE, TcpStream::connect((ip, port))).await {
        Ok(Ok(stream)) => handshake(config, host, stream, RENEWED).await,
        _ => Ok(()),
    };
    match later {
        Ok(()) => Finding::ok(
            CHECK,
            format!("https://{host} answers, its certificate is valid for two weeks and more"),
        ),
        Err(_) => Finding::warn(
            CHECK,
            format!("the certificate of {host} ends within two weeks"),
            "renew it; see why that does not happen by itself",
        ),
    }
}

/// A TLS handshake as of so much later.
async fn handshake(config: &Config, host: &str, stream: TcpStream, ahead: Duration) -> Result<()> {
    let tls = TlsConfigs::new(config.smtp.ca_file.as_deref())?;
    let mut client: ClientConfig = (*tls.https()?).clone();
    client.time_provider = Arc::new(Ahead(ahead));
    let name = ServerName::try_from(host.to_owned()).context("not a name of a host")?;
    let connecting = TlsConnector::from(Arc::new(client)).connect(name, stream);
    tokio::time::timeout(PATIENCE, connecting)
        .await
        .context("no answer")??;
    Ok(())
}

/// Whether it is https, the host, the port.
fn parts(base: &str) -> Option<(bool, String, u16)> {
    let uri: Uri = base.parse().ok()?;
    let is_secure = match uri.scheme_str()? {
        "https" => true,
        "http" => false,
        _ => return None,
    };
    let host = uri.host()?.trim_start_matches('[').trim_end_matches(']');
    let port = uri.port_u16().unwrap_or(if is_secure { 443 } else { 80 });
    Some((is_secure, host.to_owned(), port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_base_url_has_a_host_and_a_port() {
        for (base, expected) in [
            ("https://t.example", Some((true, "t.example", 443))),
            ("http://127.0.0.1:8026", Some((false, "127.0.0.1", 8026))),
            ("https://[::1]:8443/x", Some((true, "::1", 8443))),
            ("ftp://t.example", None),
            ("t.example", None),
        ] {
            let expected = expected.map(|(secure, host, port)| (secure, host.to_owned(), port));
            assert_eq!(parts(base), expected, "{base}");
        }
    }
}
