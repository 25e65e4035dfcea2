//! Where mail leaves from and who else carries it: egress sources, their proxies, smarthosts.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::delivery::ehlo_name;
use super::unique;
use crate::config::reader::Section;
use crate::config::values::{Secret, TlsPolicy};
use crate::config::{Environment, sections::access};

/// One of `[[smtp.sources]]`: an egress source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// Unique.
    pub name: String,
    /// Local addresses, or those that its HAProxy connects from.
    pub bind: Bind,
    /// What it calls itself.
    pub ehlo: String,
    /// Who connects for it.
    pub proxy: Option<Proxy>,
}

/// The addresses of a source, at most one of each family. None at all: the system's choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Bind {
    /// For hosts with an IPv4 address.
    pub v4: Option<Ipv4Addr>,
    /// For hosts with an IPv6 address.
    pub v6: Option<Ipv6Addr>,
}

impl Bind {
    /// The address from which `target` is connected to: `None` if that is the system's choice.
    pub fn towards(&self, target: IpAddr) -> Option<IpAddr> {
        match target {
            IpAddr::V4(_) => self.v4.map(IpAddr::V4),
            IpAddr::V6(_) => self.v6.map(IpAddr::V6),
        }
    }

    /// Whether a source with these addresses can connect to `target` at all.
    pub fn reaches(&self, target: IpAddr) -> bool {
        *self == Self::default() || self.towards(target).is_some()
    }
}

/// A proxy that connects to destinations.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Proxy {
    /// SOCKS version 5 (RFC 1928); with user and password (RFC 1929) where given.
    Socks5 {
        /// Where it listens.
        address: SocketAddr,
        /// Who we are there.
        login: Option<(String, Secret)>,
    },
    /// HAProxy's PROXY protocol, version 2: the proxy connects from the address that the header
    /// names as the source to the one it names as the destination.
    HaProxy {
        /// Where it listens.
        address: SocketAddr,
    },
}

impl Proxy {
    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        match self {
            Self::Socks5 { address, .. } | Self::HaProxy { address } => *address,
        }
    }
}

/// One of `[[smtp.smarthosts]]`: a relay that wants to know who we are. Mail goes there by a static
/// route of `shaping.toml`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Smarthost {
    /// As in the route: a name or an address.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// User for AUTH.
    pub username: String,
    /// Password for AUTH.
    pub password: Secret,
    /// [`TlsPolicy::None`] only where the host is a loopback address.
    pub tls: TlsPolicy,
    /// TLS from the first byte (RFC 8314), not by STARTTLS; never with [`TlsPolicy::None`].
    pub implicit_tls: bool,
}

pub(super) fn sources(
    section: &mut Section<'_>,
    ehlo: &str,
    environment: &Environment,
) -> Vec<Source> {
    let mut sources = section.tables("sources", |source| Source {
        name: source.required("name", String::new()),
        ehlo: source
            .checked("ehlo", ehlo_name)
            .unwrap_or_else(|| ehlo.to_owned()),
        bind: bind(source),
        proxy: proxy(source, environment),
    });
    unique(
        sources.iter().map(|source| source.name.as_str()),
        |index, detail| {
            section.mistake(&format!("sources[{index}].name"), detail);
        },
    );
    if sources.is_empty() {
        sources.push(Source {
            name: "default".to_owned(),
            bind: Bind::default(),
            ehlo: ehlo.to_owned(),
            proxy: None,
        });
    }
    sources
}

fn bind(section: &mut Section<'_>) -> Bind {
    let mut bind = Bind::default();
    for address in section.list::<IpAddr>("bind").unwrap_or_default() {
        let taken = match address {
            IpAddr::V4(v4) => bind.v4.replace(v4).is_some(),
            IpAddr::V6(v6) => bind.v6.replace(v6).is_some(),
        };
        if taken {
            let detail = "has two addresses of one family: make a source of each".to_owned();
            section.mistake("bind", detail);
        }
    }
    bind
}

fn proxy(section: &mut Section<'_>, environment: &Environment) -> Option<Proxy> {
    let typed = section.converted("proxy", |text: String| {
        let wrong = || format!("{text:?} is not socks5://ADDRESS:PORT or haproxy://ADDRESS:PORT");
        let (kind, address) = text.split_once("://").ok_or_else(wrong)?;
        let address: SocketAddr = address.parse().map_err(|_| wrong())?;
        match kind {
            "socks5" => Ok((true, address)),
            "haproxy" => Ok((false, address)),
            _ => Err(wrong()),
        }
    });
    let username = section.optional::<String>("proxy_username");
    let keys = ["proxy_password_file", "proxy_password_env"];
    let password = password(section, keys, environment, username.is_some());
    let (is_socks, address) = typed?;
    let mistake = match (is_socks, section.has("bind"), &username) {
        (true, true, _) => Some(("bind", "is not used: a SOCKS proxy connects from its own")),
        (false, false, _) => Some(("bind", "is required: HAProxy is told what to connect from")),
        (false, true, Some(_)) => Some(("proxy_username", "is not used: HAProxy asks nobody")),
        _ => None,
    };
    if let Some((key, detail)) = mistake {
        section.mistake(key, detail.to_owned());
    }
    Some(match is_socks {
        true => Proxy::Socks5 {
            address,
            login: username.zip(password),
        },
        false => Proxy::HaProxy { address },
    })
}

pub(super) fn smarthosts(section: &mut Section<'_>, environment: &Environment) -> Vec<Smarthost> {
    let smarthosts = section.tables("smarthosts", |section| {
        let host = section.required("host", String::new());
        let is_loopback = host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback());
        let tls = section.checked("tls", |tls| match tls {
            TlsPolicy::None if is_loopback => Ok(()),
            TlsPolicy::None | TlsPolicy::Opportunistic => Err(format!(
                "{:?} would show the password to whoever listens: \"none\" is for loopback addresses, \
                 \"opportunistic\" for nobody",
                tls.as_str()
            )),
            TlsPolicy::Require | TlsPolicy::RequireVerified => Ok(()),
        });
        let port = section.value("port", 587);
        // RFC 8314 §7.3 gives it that port.
        let usual = port == 465 && tls != Some(TlsPolicy::None);
        let implicit_tls = section.value("implicit_tls", usual);
        if implicit_tls && tls == Some(TlsPolicy::None) {
            let detail = "contradicts tls = \"none\"".to_owned();
            section.mistake("implicit_tls", detail);
        }
        Smarthost {
            port,
            implicit_tls,
            username: section.required("username", String::new()),
            password: password(section, ["password_file", "password_env"], environment, true)
                .unwrap_or_else(|| Secret::new("")),
            tls: tls.unwrap_or(TlsPolicy::RequireVerified),
            host,
        }
    });
    let names: Vec<_> = smarthosts
        .iter()
        .map(|host| format!("{}:{}", host.host, host.port))
        .collect();
    unique(names.iter().map(String::as_str), |index, detail| {
        section.mistake(&format!("smarthosts[{index}].host"), detail);
    });
    smarthosts
}

/// A password from the file or the variable that one of the two keys names.
pub(super) fn password(
    section: &mut Section<'_>,
    [file, variable]: [&'static str; 2],
    environment: &Environment,
    wanted: bool,
) -> Option<Secret> {
    let directory = section.directory();
    let from_file = section.converted(file, |name: String| {
        access::secret_in(&directory.join(name))
    });
    let from_variable = section.converted(variable, |name: String| {
        access::secret_of(environment, &name)
    });
    let given = usize::from(section.has(file)) + usize::from(section.has(variable));
    if given != usize::from(wanted) {
        let detail = match wanted {
            true => format!("write one of {file} and {variable}"),
            false => "is for nobody: there is no user name".to_owned(),
        };
        section.mistake(
            if wanted || section.has(file) {
                file
            } else {
                variable
            },
            detail,
        );
    }
    from_file.or(from_variable)
}
