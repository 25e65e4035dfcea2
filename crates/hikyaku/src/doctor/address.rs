//! The addresses that mail leaves from: SPF, PTR and EHLO, port 25.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use mail_auth::hickory_resolver::config::ResolverOpts;
use mail_auth::spf::verify::SpfParameters;
use mail_auth::{MessageAuthenticator, SpfResult};
use model::Domain;
use service::config::{Config, Dns};
use tokio::io::AsyncReadExt as _;
use tokio::net::{TcpSocket, TcpStream};

use super::Finding;
use super::names::Names;
use crate::dkim::lookup;

/// Whose mail host is tried when nobody names one: it is there, and takes connections from all.
const PROBE: &str = "gmail.com";
/// How long a connection and its greeting may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// An address and what it calls itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Address {
    ip: IpAddr,
    source: String,
    ehlo: String,
}

/// The addresses of all sources; where one is not known, a finding says so.
pub(super) async fn of_sources(
    config: &Config,
    given: &[IpAddr],
    found: &mut Vec<Finding>,
) -> Vec<Address> {
    let mut all = Vec::new();
    for source in &config.smtp.sources {
        let address = |ip| Address {
            ip,
            source: source.name.clone(),
            ehlo: source.ehlo.to_ascii_lowercase(),
        };
        let bound = [
            source.bind.v4.map(IpAddr::V4),
            source.bind.v6.map(IpAddr::V6),
        ];
        let known: Vec<IpAddr> = match given {
            [] => bound.into_iter().flatten().collect(),
            _ => given.to_vec(),
        };
        if !known.is_empty() {
            all.extend(known.into_iter().map(address));
            continue;
        }
        match own_address() {
            Some(ip) if is_public(ip) => all.push(address(ip)),
            seen => {
                let seen = seen.map_or("none that leads out".to_owned(), |ip| ip.to_string());
                let text = format!(
                    "source {:?} uses the system's address ({seen}), which is not the one that receivers see",
                    source.name
                );
                let advice = "name the public one: --address IP";
                found.push(Finding::warn("address", text, advice));
            }
        }
    }
    all
}

/// The address that the system would use outward. Nothing is sent for it.
fn own_address() -> Option<IpAddr> {
    let outward = [
        (
            SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
            SocketAddr::from(([192, 0, 2, 1], 25)),
        ),
        (
            SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)),
            SocketAddr::from(([0x2001, 0xdb8, 0, 0, 0, 0, 0, 1], 25)),
        ),
    ];
    outward.into_iter().find_map(|(from, to)| {
        let socket = UdpSocket::bind(from).ok()?;
        socket.connect(to).ok()?;
        Some(socket.local_addr().ok()?.ip())
    })
}

fn is_public(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => {
            let shared = ip.octets().starts_with(&[100]) && (64..128).contains(&ip.octets()[1]);
            !(ip.is_private()
                || ip.is_loopback()
                || ip.is_link_local()
                || ip.is_unspecified()
                || shared)
        }
        IpAddr::V6(ip) => {
            !(ip.is_loopback()
                || ip.is_unspecified()
                || ip.is_unique_local()
                || ip.is_unicast_link_local())
        }
    }
}

/// Whether the address may send for the reverse-path's domain (RFC 7208).
pub(super) async fn spf(dns: &Dns, address: &Address, bounces: &Domain) -> Finding {
    let Address { ip, source, ehlo } = address;
    let made = match dns.nameservers.is_empty() {
        true => MessageAuthenticator::new_system_conf(),
        false => MessageAuthenticator::new(lookup::configured(dns), ResolverOpts::default()),
    };
    let authenticator = match made {
        Ok(authenticator) => authenticator,
        Err(error) => {
            return Finding::fail(
                "spf",
                format!("DNS cannot be asked: {error}"),
                "check [dns]",
            );
        }
    };
    let sender = format!("bounce@{bounces}");
    let asked = SpfParameters::verify_mail_from(*ip, ehlo, ehlo, &sender);
    let result = authenticator.verify_spf(asked).await.result();
    spf_finding(result, *ip, source, bounces)
}

fn spf_finding(result: SpfResult, ip: IpAddr, source: &str, bounces: &Domain) -> Finding {
    let mechanism = if ip.is_ipv4() { "ip4" } else { "ip6" };
    let add = format!("add {mechanism}:{ip} to the SPF record of {bounces}");
    let who = format!("{ip} (source {source:?})");
    match result {
        SpfResult::Pass => Finding::ok("spf", format!("{who} may send for {bounces}")),
        SpfResult::Fail => Finding::fail("spf", format!("{bounces} forbids {who} to send"), add),
        SpfResult::SoftFail => Finding::fail(
            "spf",
            format!("{bounces} does not vouch for {who} (softfail)"),
            add,
        ),
        SpfResult::Neutral => Finding::warn(
            "spf",
            format!("{bounces} says nothing about {who} (neutral)"),
            add,
        ),
        SpfResult::None => Finding::fail(
            "spf",
            format!("{bounces} has no SPF record"),
            format!("publish as TXT: v=spf1 {mechanism}:{ip} -all"),
        ),
        SpfResult::PermError => Finding::fail(
            "spf",
            format!("the SPF record of {bounces} cannot be read"),
            "publish exactly one, with at most ten lookups in it (RFC 7208 section 4.6.4)",
        ),
        SpfResult::TempError => Finding::fail(
            "spf",
            format!("the SPF record of {bounces}, or one that it includes, could not be asked for"),
            "ask again later",
        ),
    }
}

/// Whether the address has the name that it calls itself, both ways.
pub(super) async fn ptr(names: &Names, address: &Address) -> Finding {
    let Address { ip, ehlo, .. } = address;
    let ask = "whoever gave you the address sets its PTR record";
    let found = match names.ptr(*ip).await {
        Ok(found) => found,
        Err(why) => return Finding::fail("ptr", format!("PTR of {ip}: {why}"), "ask again later"),
    };
    let Some(first) = found.first() else {
        let text = format!("{ip} has no name (PTR record): many receivers refuse its mail");
        return Finding::fail("ptr", text, format!("{ask}: to {ehlo}"));
    };
    if !found.contains(ehlo) {
        let text = format!("{ip} is {first}, and calls itself {ehlo}");
        let advice = format!("{ask}; or set ehlo = \"{first}\" for the source");
        return Finding::fail("ptr", text, advice);
    }
    match names.addresses(ehlo).await {
        Err(why) => Finding::fail(
            "ptr",
            format!("address of {ehlo}: {why}"),
            "ask again later",
        ),
        Ok(back) if back.contains(ip) => {
            Finding::ok("ptr", format!("{ip} is {ehlo}, which is {ip}"))
        }
        Ok(_) => Finding::fail(
            "ptr",
            format!("{ip} is {ehlo}, but {ehlo} is not {ip}"),
            format!("publish an address record of {ehlo}: {ip}"),
        ),
    }
}

/// Whether a mail host outside can be reached.
pub(super) async fn port_25(config: &Config, names: &Names, probe: Option<&str>) -> Finding {
    let (host, port) = match probe {
        None => match names.mx(PROBE).await {
            Ok(hosts) if !hosts.is_empty() => (hosts.into_iter().next().unwrap_or_default(), 25),
            Ok(_) => {
                return Finding::warn(
                    "port 25",
                    format!("{PROBE} has no mail host"),
                    "name another: --probe HOST",
                );
            }
            Err(why) => {
                return Finding::warn(
                    "port 25",
                    format!("the mail host of {PROBE}: {why}"),
                    "name another: --probe HOST",
                );
            }
        },
        Some(probe) => host_and_port(probe),
    };
    let addresses = match host.parse::<IpAddr>() {
        Ok(ip) => vec![ip],
        Err(_) => match names.addresses(&host).await {
            Ok(addresses) => addresses,
            Err(why) => {
                return Finding::warn(
                    "port 25",
                    format!("address of {host}: {why}"),
                    "name another: --probe HOST",
                );
            }
        },
    };
    let bind = config.smtp.sources.first().map(|source| source.bind);
    let bind = bind.unwrap_or_default();
    let Some(ip) = addresses.iter().find(|ip| bind.reaches(**ip)) else {
        return Finding::warn(
            "port 25",
            format!("{host} has no address that can be tried"),
            "name another: --probe HOST",
        );
    };
    match tokio::time::timeout(
        PATIENCE,
        greeting(bind.towards(*ip), SocketAddr::new(*ip, port)),
    )
    .await
    {
        Ok(Ok(said)) if said.starts_with("220") => {
            Finding::ok("port 25", format!("{host} answers: {said}"))
        }
        Ok(Ok(said)) => Finding::warn(
            "port 25",
            format!("{host} is reached, and does not welcome us: {said}"),
            "what it says is about the address; see spf and ptr, and blocklists",
        ),
        Ok(Err(error)) => blocked(&host, port, &error.to_string()),
        Err(_) => blocked(
            &host,
            port,
            &format!("no greeting within {} s", PATIENCE.as_secs()),
        ),
    }
}

fn blocked(host: &str, port: u16, why: &str) -> Finding {
    let advice = "most providers close port 25 outward until asked; or send through a smarthost ([mx] in shaping.toml)";
    Finding::fail(
        "port 25",
        format!("{host}, port {port}, cannot be reached: {why}"),
        advice,
    )
}

fn host_and_port(text: &str) -> (String, u16) {
    if let Ok(at) = text.parse::<SocketAddr>() {
        return (at.ip().to_string(), at.port());
    }
    match text
        .rsplit_once(':')
        .map(|(host, port)| (host, port.parse()))
    {
        Some((host, Ok(port))) if !host.contains(':') => (host.to_owned(), port),
        _ => (text.to_owned(), 25),
    }
}

/// The first line that the host says.
async fn greeting(bind: Option<IpAddr>, to: SocketAddr) -> std::io::Result<String> {
    let socket = if to.is_ipv4() {
        TcpSocket::new_v4()
    } else {
        TcpSocket::new_v6()
    }?;
    if let Some(bind) = bind {
        socket.bind(SocketAddr::new(bind, 0))?;
    }
    let mut stream: TcpStream = socket.connect(to).await?;
    let mut said = vec![0; 512];
    let count = stream.read(&mut said).await?;
    if count == 0 {
        return Err(std::io::Error::other("closed without a greeting"));
    }
    let text = String::from_utf8_lossy(said.get(..count).unwrap_or_default()).into_owned();
    Ok(crate::show::cut(
        text.lines().next().unwrap_or_default(),
        100,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Level;

    #[test]
    fn every_result_of_spf_has_its_level() {
        let bounces: Domain = "b.example".parse().expect("a domain");
        for (result, level) in [
            (SpfResult::Pass, Level::Ok),
            (SpfResult::Neutral, Level::Warn),
            (SpfResult::SoftFail, Level::Fail),
            (SpfResult::Fail, Level::Fail),
            (SpfResult::None, Level::Fail),
            (SpfResult::PermError, Level::Fail),
            (SpfResult::TempError, Level::Fail),
        ] {
            let finding = spf_finding(result, Ipv4Addr::LOCALHOST.into(), "ip1", &bounces);
            assert_eq!(finding.level, level, "{finding:?}");
        }
    }

    #[test]
    fn hosts_and_ports_are_told_apart() {
        for (text, host, port) in [
            ("mx.example", "mx.example", 25),
            ("mx.example:2525", "mx.example", 2525),
            ("127.0.0.1:2525", "127.0.0.1", 2525),
            ("[::1]:2525", "::1", 2525),
            ("::1", "::1", 25),
        ] {
            assert_eq!(host_and_port(text), (host.to_owned(), port));
        }
    }

    #[test]
    fn addresses_that_nobody_outside_sees_are_known() {
        for (ip, public) in [
            ("10.0.0.1", false),
            ("100.64.0.1", false),
            ("127.0.0.1", false),
            ("fd00::1", false),
            ("8.8.8.8", true),
            ("100.128.0.1", true),
        ] {
            assert_eq!(is_public(ip.parse().expect("an address")), public, "{ip}");
        }
    }
}
