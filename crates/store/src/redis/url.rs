//! Where a Redis is, from `store.url`.
//!
//! `redis://[USER[:PASSWORD]@]HOST[:PORT][/DB]`, `redis+sentinel://…HOST[:PORT],…/NAME[/DB]`,
//! `redis+cluster://…HOST[:PORT],…`; with `rediss` instead of `redis` over TLS. A user and a
//! password are percent-encoded. Must not connect.

use crate::{Result, StoreError};

/// What stands behind the address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Topology {
    /// One server, perhaps with replicas that nobody fails over to.
    Single,
    /// Sentinels that know which server is the primary of this name.
    Sentinel {
        /// The name under which they watch it.
        name: String,
    },
    /// A Cluster.
    Cluster,
}

/// Where a Redis is and who asks.
#[derive(Clone, PartialEq, Eq)]
pub struct RedisUrl {
    /// What stands there.
    pub topology: Topology,
    /// Whether to speak TLS.
    pub tls: bool,
    /// The ACL user; none: `default`.
    pub user: Option<String>,
    /// Its password.
    pub password: Option<String>,
    /// Hosts and ports: the server, or some sentinels, or some nodes of the Cluster.
    pub hosts: Vec<(String, u16)>,
    /// The database; 0 on a Cluster.
    pub database: u32,
    /// PEM certificates to believe in place of the system's.
    pub roots: Option<Vec<u8>>,
    /// Whom sentinels are asked as; none: `default`.
    pub sentinel_user: Option<String>,
    /// And with which password; none: without.
    pub sentinel_password: Option<String>,
}

// A password is nobody's to read in a log.
impl std::fmt::Debug for RedisUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RedisUrl")
            .field("topology", &self.topology)
            .field("tls", &self.tls)
            .field("user", &self.user)
            .field("hosts", &self.hosts)
            .field("database", &self.database)
            .finish_non_exhaustive()
    }
}

fn refused(why: &str) -> StoreError {
    StoreError::Refused(format!("store.url: {why}"))
}

impl RedisUrl {
    /// Whether a store's address is of this engine.
    pub fn is_one(url: &str) -> bool {
        url.split_once("://")
            .is_some_and(|(scheme, _)| scheme.starts_with("redis"))
    }

    /// Reads an address.
    ///
    /// # Errors
    /// [`StoreError::Refused`] with what is wrong; it never repeats the password.
    pub fn parse(url: &str) -> Result<Self> {
        let (scheme, rest) = url
            .split_once("://")
            .ok_or_else(|| refused("is no address"))?;
        let (tls, kind) = match scheme.split_once('+').unwrap_or((scheme, "")) {
            ("redis", kind) => (false, kind),
            ("rediss", kind) => (true, kind),
            _ => return Err(refused("begins with redis:// or rediss://")),
        };
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let (login, hosts) = match authority.rsplit_once('@') {
            Some((login, hosts)) => (Some(login), hosts),
            None => (None, authority),
        };
        let (topology, database) = match kind {
            "" => (Topology::Single, path),
            "sentinel" => {
                let (name, database) = path.split_once('/').unwrap_or((path, ""));
                if name.is_empty() {
                    return Err(refused(
                        "needs the name of the primary behind the sentinels",
                    ));
                }
                let name = name.to_owned();
                (Topology::Sentinel { name }, database)
            }
            "cluster" if path.is_empty() => (Topology::Cluster, ""),
            "cluster" => return Err(refused("a Cluster has one database")),
            _ => return Err(refused("is neither single, sentinel nor cluster")),
        };
        let port = if matches!(topology, Topology::Sentinel { .. }) {
            26_379
        } else {
            6_379
        };
        let hosts = hosts
            .split(',')
            .map(|host| read_host(host, port))
            .collect::<Result<Vec<_>>>()?;
        if hosts.len() > 1 && topology == Topology::Single {
            return Err(refused("names several hosts of one server"));
        }
        let (user, password) = login.map_or(Ok((None, None)), read_login)?;
        let database = match database {
            "" => 0,
            number => number
                .parse()
                .map_err(|_| refused("the database is no number"))?,
        };
        Ok(Self {
            topology,
            tls,
            user,
            password,
            hosts,
            database,
            roots: None,
            sentinel_user: None,
            sentinel_password: None,
        })
    }

    /// Believes the certificates in this PEM file, and no others.
    ///
    /// # Errors
    /// [`StoreError::Refused`] when it cannot be read.
    pub fn believe(&mut self, file: &std::path::Path) -> Result<()> {
        let read = std::fs::read(file);
        let roots = read.map_err(|error| {
            StoreError::Refused(format!("store.ca_file: {}: {error}", file.display()))
        })?;
        self.roots = Some(roots);
        Ok(())
    }
}

fn read_host(host: &str, port: u16) -> Result<(String, u16)> {
    let bracketed = host
        .strip_prefix('[')
        .and_then(|inner| inner.split_once(']'));
    let (name, after) = match bracketed {
        Some((name, after)) => (name, after),
        None => match host.split_once(':') {
            Some((name, _)) => (name, host.strip_prefix(name).unwrap_or_default()),
            None => (host, ""),
        },
    };
    if name.is_empty() {
        return Err(refused("a host is missing"));
    }
    let port = match after.strip_prefix(':') {
        None if after.is_empty() => port,
        Some(number) => number
            .parse()
            .map_err(|_| refused("a port is no number below 65536"))?,
        None => return Err(refused("a host is not readable")),
    };
    Ok((name.to_owned(), port))
}

type Login = (Option<String>, Option<String>);

fn read_login(login: &str) -> Result<Login> {
    let (user, password) = login.split_once(':').unwrap_or((login, ""));
    let part = |text: &str| -> Result<Option<String>> {
        let text = decode(text).ok_or_else(|| refused("the user or password is not readable"))?;
        Ok((!text.is_empty()).then_some(text))
    };
    Ok((part(user)?, part(password)?))
}

/// Percent-decodes.
fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digit = |byte: Option<u8>| char::from(byte?).to_digit(16);
        let (high, low) = (digit(rest.next())?, digit(rest.next())?);
        bytes.push(u8::try_from(high * 16 + low).ok()?);
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_form_of_the_contract_is_read() {
        let one = RedisUrl::parse("rediss://app:p%40ss:w@cache.example:7000/3").unwrap();
        assert_eq!(
            (one.tls, one.user.as_deref(), one.password.as_deref()),
            (true, Some("app"), Some("p@ss:w"))
        );
        assert_eq!(one.hosts, [("cache.example".to_owned(), 7000)]);
        assert_eq!((one.topology.clone(), one.database), (Topology::Single, 3));
        assert!(!format!("{one:?}").contains("p@ss"));
        let sentinel = RedisUrl::parse("redis+sentinel://:pw@a,[::1]:5000/mail").unwrap();
        let name = "mail".to_owned();
        assert_eq!(sentinel.topology, Topology::Sentinel { name });
        assert_eq!(
            sentinel.hosts,
            [("a".to_owned(), 26_379), ("::1".to_owned(), 5000)]
        );
        assert_eq!(
            (sentinel.user, sentinel.password.as_deref()),
            (None, Some("pw"))
        );
        let cluster = RedisUrl::parse("redis+cluster://127.0.0.1:1,127.0.0.1:2").unwrap();
        assert_eq!(
            (cluster.topology, cluster.hosts.len()),
            (Topology::Cluster, 2)
        );
        assert!(RedisUrl::is_one("redis://x") && !RedisUrl::is_one("sqlite:redis://x"));
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        for url in [
            "redis",
            "http://x",
            "redis://",
            "redis://a,b",
            "redis://a:x",
            "redis://a/x",
            "redis://%zz@a",
            "redis+sentinel://a",
            "redis+cluster://a/1",
            "redis+ring://a",
            "redis://[::1",
        ] {
            let refused = RedisUrl::parse(url);
            assert!(
                matches!(&refused, Err(StoreError::Refused(_))),
                "{url}: {refused:?}"
            );
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in ".{0,40}", scheme in "rediss?(\\+(sentinel|cluster))?://") {
            let _read = RedisUrl::parse(&text);
            let _read = RedisUrl::parse(&format!("{scheme}{text}"));
        }
    }
}
