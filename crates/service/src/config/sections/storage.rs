//! Where state lies: store, journal, retention.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::delivery::readable;
use super::egress;
use crate::config::Environment;
use crate::config::reader::Section;
use crate::config::values::{ByteSize, OrOff, Secret};

const DAY: Duration = Duration::from_secs(86_400);

/// `[store]`
#[derive(Debug, Clone)]
pub struct Store {
    /// Which engine, and where.
    pub url: StoreUrl,
    /// How long a lease lasts.
    pub lease: Duration,
    /// Into how many parts recipients are divided; fixed when the store is made.
    pub partitions: u16,
    /// Whether a Redis that may forget is refused.
    pub require_durable: bool,
    /// PEM roots to believe over `rediss`, in place of the system's.
    pub ca_file: Option<PathBuf>,
    /// Whom sentinels are asked as; the login in the URL is that of the servers.
    pub sentinel_username: Option<String>,
    /// And with which password.
    pub sentinel_password: Option<Secret>,
}

impl Store {
    /// How long journals keep what they have shipped: a Redis may forget what it acknowledged, a
    /// file does not.
    pub fn journal_retained(&self) -> Duration {
        match self.url {
            StoreUrl::Sqlite(_) => Duration::ZERO,
            StoreUrl::Redis(_) => SHIPPED_AGAIN,
        }
    }
}

/// The engine of the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreUrl {
    /// The embedded one: a file, resolved.
    Sqlite(PathBuf),
    /// Shared by many machines.
    Redis(Redis),
}

/// A Redis or Valkey.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Redis {
    /// How many, and who leads.
    pub topology: RedisTopology,
    /// The URL as typed; it may hold a password.
    pub url: Secret,
}

/// How Redis is set up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RedisTopology {
    /// One server.
    Single,
    /// Sentinels that know the primary by this name.
    Sentinel {
        /// The name.
        service: String,
    },
    /// A Cluster.
    Cluster,
}

/// `[journal]`
#[derive(Debug, Clone)]
pub struct Journal {
    /// Resolved; each process has its own directory in it.
    pub dir: PathBuf,
    /// How often it is synced.
    pub sync: Duration,
    /// When this many bytes wait for the store, the node stops sending.
    pub max_bytes: u64,
}

/// `[retention]`
#[derive(Debug, Clone)]
pub struct Retention {
    /// Events in the store's streams.
    pub events: Duration,
    /// Rows and statuses of batches that ended; counters stay.
    pub batches: Duration,
}

/// Longer than a failover takes, and than it takes to find it out.
const SHIPPED_AGAIN: Duration = Duration::from_mins(10);
/// A lease ends with 5 s in which nothing may start.
const SHORTEST_LEASE: Duration = Duration::from_secs(6);
const MOST_PARTITIONS: u16 = 256;

pub(super) fn store(
    section: &mut Section<'_>,
    data_dir: &Path,
    environment: &Environment,
) -> Store {
    let url = section
        .converted("url", |text: String| store_url(&text, data_dir))
        .unwrap_or_else(|| StoreUrl::Sqlite(data_dir.join("hikyaku.db")));
    let is_cluster =
        matches!(&url, StoreUrl::Redis(redis) if redis.topology == RedisTopology::Cluster);
    let directory = section.directory();
    let sentinel_username: Option<String> = section.optional("sentinel_username");
    let keys = ["sentinel_password_file", "sentinel_password_env"];
    let has_login = sentinel_username.is_some() || keys.iter().any(|key| section.has(key));
    Store {
        sentinel_password: egress::password(section, keys, environment, has_login),
        sentinel_username,
        ca_file: section
            .converted("ca_file", |OrOff(file): OrOff<String>| {
                file.map(|file| readable(directory.join(file))).transpose()
            })
            .flatten(),
        lease: section
            .checked("lease", |lease| at_least(*lease, SHORTEST_LEASE, "6s"))
            .unwrap_or(Duration::from_secs(45)),
        partitions: section
            .checked("partitions", |count| match *count {
                1..=MOST_PARTITIONS => Ok(()),
                count => Err(format!("{count} is not between 1 and {MOST_PARTITIONS}")),
            })
            .unwrap_or(if is_cluster { 16 } else { 1 }),
        require_durable: section.value("require_durable", true),
        url,
    }
}

pub(super) fn journal(section: &mut Section<'_>, data_dir: &Path) -> Journal {
    const SMALLEST: u64 = 1 << 20;
    Journal {
        dir: data_dir.join(section.value("dir", "journal".to_owned())),
        sync: section
            .checked("sync", |every| {
                at_least(*every, Duration::from_millis(1), "1ms")
            })
            .unwrap_or(Duration::from_millis(20)),
        max_bytes: section
            .checked("max_bytes", |size: &ByteSize| {
                let enough = size.0 >= SMALLEST;
                enough
                    .then_some(())
                    .ok_or_else(|| "is less than 1MiB".to_owned())
            })
            .map_or(8 << 30, |size| size.0),
    }
}

pub(super) fn retention(section: &mut Section<'_>) -> Retention {
    Retention {
        events: section.value("events", 30 * DAY),
        batches: section.value("batches", 90 * DAY),
    }
}

fn at_least(given: Duration, least: Duration, written: &str) -> Result<(), String> {
    if given >= least {
        Ok(())
    } else {
        Err(format!("is shorter than {written}"))
    }
}

/// The text of a wrong URL is not repeated: it may hold a password.
fn store_url(text: &str, data_dir: &Path) -> Result<StoreUrl, String> {
    const KNOWN: &str = "sqlite:FILE, redis://HOST, rediss://HOST, redis+sentinel://H1,H2/NAME \
                         or redis+cluster://H1,H2";
    let Some((scheme, rest)) = text.split_once(':') else {
        return Err(format!("is not a store: write {KNOWN}"));
    };
    if scheme == "sqlite" {
        return match rest {
            "" => Err("names no file: write sqlite:FILE".to_owned()),
            file => Ok(StoreUrl::Sqlite(data_dir.join(file))),
        };
    }
    let at = rest.strip_prefix("//").unwrap_or_default();
    let (authority, path) = at.split_once('/').unwrap_or((at, ""));
    let hosts = authority
        .rsplit_once('@')
        .map_or(authority, |(_, hosts)| hosts);
    let topology = match scheme {
        "redis" | "rediss" => RedisTopology::Single,
        "redis+cluster" | "rediss+cluster" => RedisTopology::Cluster,
        "redis+sentinel" | "rediss+sentinel" if path.is_empty() => {
            return Err("names no primary: write redis+sentinel://H1,H2/NAME".to_owned());
        }
        "redis+sentinel" | "rediss+sentinel" => RedisTopology::Sentinel {
            service: path.to_owned(),
        },
        _ => return Err(format!("has an unknown scheme: write {KNOWN}")),
    };
    if hosts.split(',').any(str::is_empty) {
        return Err(format!("names no host: write {KNOWN}"));
    }
    Ok(StoreUrl::Redis(Redis {
        topology,
        url: Secret::new(text),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn redis(text: &str) -> RedisTopology {
        match store_url(text, Path::new("data")) {
            Ok(StoreUrl::Redis(redis)) => redis.topology,
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn store_urls_are_told_apart() {
        let sqlite = |text| store_url(text, Path::new("data"));
        assert_eq!(
            sqlite("sqlite:a.db"),
            Ok(StoreUrl::Sqlite("data/a.db".into()))
        );
        assert_eq!(
            sqlite("sqlite:/var/a.db"),
            Ok(StoreUrl::Sqlite("/var/a.db".into()))
        );
        assert_eq!(
            redis("redis://:secret@127.0.0.1:6379/1"),
            RedisTopology::Single
        );
        assert_eq!(redis("rediss://cache.example"), RedisTopology::Single);
        assert_eq!(redis("redis+cluster://h1:7000,h2"), RedisTopology::Cluster);
        let service = "main".to_owned();
        assert_eq!(
            redis("redis+sentinel://h1,h2/main"),
            RedisTopology::Sentinel { service }
        );
    }

    #[test]
    fn a_wrong_store_url_is_refused_without_repeating_it() {
        for text in [
            "hikyaku.db",
            "sqlite:",
            "redis://",
            "redis:secret",
            "redis://u:secret@",
            "redis+sentinel://u:secret@h1,h2",
            "redis+cluster://h1,,h2",
            "postgres://u:secret@h1",
        ] {
            let refused = store_url(text, Path::new("data")).expect_err(text);
            assert!(!refused.contains("secret"), "{refused}");
        }
        let kept = store_url("redis://u:secret@h1", Path::new("data")).expect("a store");
        assert!(!format!("{kept:?}").contains("secret"), "{kept:?}");
    }
}
