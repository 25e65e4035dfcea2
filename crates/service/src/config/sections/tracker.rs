//! `[tracker]`: listeners, certificates, what a hit waits for.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;
use model::Domain;

use super::{Account, beside, unique};
use crate::config::reader::Section;
use crate::config::values::OrOff;

/// `[tracker]`
#[derive(Debug, Clone)]
pub struct Tracker {
    /// Open to the world.
    pub listen: SocketAddr,
    /// Metrics and health.
    pub admin_listen: SocketAddr,
    /// Signs links; several lines are a rotation, the first signs. Made at first start.
    pub key_file: PathBuf,
    /// Whose `X-Forwarded-For` counts.
    pub trusted_proxies: Vec<IpNet>,
    /// How long a hit waits for others before it is judged.
    pub settle: Duration,
    /// A registrable domain for first-party page views.
    pub cookie_domain: Option<Domain>,
    /// Open to the world, over TLS; `None`: off.
    pub tls_listen: Option<SocketAddr>,
    /// Certificates in files, one for each host.
    pub certificates: Vec<Certificate>,
    /// Certificates that are fetched.
    pub acme: Acme,
}

/// One of `[[tracker.certificates]]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Certificate {
    /// The name by which clients ask for it.
    pub host: Domain,
    /// PEM: the certificate, then those that lead to the root.
    pub cert_file: PathBuf,
    /// PEM.
    pub key_file: PathBuf,
}

/// `[tracker.acme]` (RFC 8555)
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Acme {
    /// The directory of the authority; `None`: nothing is fetched.
    pub directory: Option<String>,
    /// Where the authority writes to.
    pub contact: Option<String>,
    /// Extra PEM roots for the authority itself.
    pub ca_file: Option<PathBuf>,
    /// For which hosts: those of this list and of the accounts' https `base_url`, less those that
    /// have a certificate in files. Accounts made over the API add theirs.
    pub hosts: Vec<Domain>,
    /// Where account and certificates are kept.
    pub dir: PathBuf,
}

pub(super) fn tracker(section: &mut Section<'_>, data_dir: &Path, accounts: &[Account]) -> Tracker {
    let tls_listen = section.table("tls", |section| section.value("listen", OrOff(None)).0);
    let read = section.tables("certificates", certificate);
    let names = read
        .iter()
        .map(|of| of.as_ref().map_or("", |of| of.host.as_str()));
    unique(names, |index, detail| {
        section.mistake(&format!("certificates[{index}].host"), detail);
    });
    let certificates: Vec<_> = read.into_iter().flatten().collect();
    let acme = section.table("acme", |section| {
        acme(section, data_dir, accounts, &certificates)
    });
    let useless = "needs tracker.tls.listen: nobody would be shown a certificate";
    if tls_listen.is_none() && !certificates.is_empty() {
        section.mistake("certificates", useless.to_owned());
    }
    if tls_listen.is_none() && acme.directory.is_some() {
        section.mistake("acme.directory", useless.to_owned());
    }
    Tracker {
        listen: section.value("listen", SocketAddr::from(([127, 0, 0, 1], 8026))),
        admin_listen: section.value("admin_listen", SocketAddr::from(([127, 0, 0, 1], 8027))),
        key_file: data_dir.join(section.value("key_file", "tracking.key".to_owned())),
        trusted_proxies: section.list("trusted_proxies").unwrap_or_default(),
        settle: section.value("settle", Duration::from_secs(15)),
        cookie_domain: section.value("cookie_domain", OrOff(None)).0,
        tls_listen,
        certificates,
        acme,
    }
}

/// `None`: there is a mistake.
fn certificate(section: &mut Section<'_>) -> Option<Certificate> {
    let directory = section.directory();
    let mut file = |key| beside(directory, &section.required(key, String::new()));
    let (cert_file, key_file) = (file("cert_file"), file("key_file"));
    let host = section.optional("host");
    if !section.has("host") {
        section.mistake("host", "is required".to_owned());
    }
    Some(Certificate {
        host: host?,
        cert_file,
        key_file,
    })
}

fn acme(
    section: &mut Section<'_>,
    data_dir: &Path,
    accounts: &[Account],
    certificates: &[Certificate],
) -> Acme {
    let OrOff(directory) = section.value::<OrOff<String>>("directory", OrOff(None));
    if let Some(url) = &directory
        && !url.starts_with("https://")
    {
        section.mistake("directory", format!("{url:?} does not begin with https://"));
    }
    let OrOff(ca_file) = section.value::<OrOff<String>>("ca_file", OrOff(None));
    let OrOff(contact) = section.value::<OrOff<String>>("contact", OrOff(None));
    let mut hosts: Vec<Domain> = section.list("hosts").unwrap_or_default();
    let of_accounts = accounts.iter();
    hosts.extend(of_accounts.filter_map(|account| https_host(&account.tracking.base_url)));
    hosts.sort_unstable_by(|a, b| a.as_str().cmp(b.as_str()));
    hosts.dedup();
    hosts.retain(|host| certificates.iter().all(|of| of.host != *host));
    Acme {
        directory,
        contact: contact.map(|contact| match contact.contains(':') {
            true => contact,
            false => format!("mailto:{contact}"),
        }),
        ca_file: ca_file.map(|file| beside(section.directory(), &file)),
        hosts,
        dir: data_dir.join("acme"),
    }
}

/// The name that a browser asks for when a link begins so; `None`: plain HTTP, or an address.
pub fn https_host(base_url: &str) -> Option<Domain> {
    let rest = base_url.strip_prefix("https://")?;
    let authority = rest.split('/').next()?;
    let name = match authority.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        Some(_) | None => authority,
    };
    let is_address = name.parse::<std::net::IpAddr>().is_ok();
    (!is_address).then(|| name.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_of_a_base_url() {
        for (url, host) in [
            ("https://t.brand.example", Some("t.brand.example")),
            ("https://T.Brand.example:8443/x", Some("t.brand.example")),
            ("http://t.brand.example", None),
            ("https://192.0.2.1/", None),
            ("https://[2001:db8::1]", None),
        ] {
            let found = https_host(url);
            assert_eq!(found.as_ref().map(Domain::as_str), host, "{url}");
        }
    }
}
