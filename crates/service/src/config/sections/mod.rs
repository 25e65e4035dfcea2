//! The sections of `hikyaku.toml`: what each key means and what it is when nobody types it.
//!
//! The default of a key stands here and in `config/hikyaku.toml`; a test holds the two together.

mod access;
mod delivery;
mod egress;
mod storage;
mod tracker;

use std::net::SocketAddr;
use std::path::{Component, Path, PathBuf};

use ipnet::IpNet;
use model::EmailAddress;

pub use access::{Account, Api, ApiKey, KeyMaterial, Tracking, base_url, link_target, page_origin};
pub use delivery::{Pool, Smtp, SmtpTimeouts, WeightedSource};
pub use egress::{Bind, Proxy, Smarthost, Source};
pub use storage::{Journal, Redis, RedisTopology, Retention, Store, StoreUrl};
pub use tracker::{Acme, Certificate, Tracker, https_host};

use super::reader::Section;
use super::values::{DanePolicy, NameServer, OrOff};
use super::{Environment, Origin, ReadFile};

/// What the operator means: every key of `hikyaku.toml` with its default filled in.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where everything that is written lies; relative to the working directory.
    pub data_dir: PathBuf,
    /// The shared state.
    pub store: Store,
    /// Local facts on their way to the store.
    pub journal: Journal,
    /// How long what is over is kept.
    pub retention: Retention,
    /// The API's listener and keys.
    pub api: Api,
    /// At least one; ids are unique.
    pub accounts: Vec<Account>,
    /// The tracker's listeners.
    pub tracker: Tracker,
    /// How mail is sent.
    pub smtp: Smtp,
    /// At least one; names are unique, and every source they name exists.
    pub pools: Vec<Pool>,
    /// Name servers.
    pub dns: Dns,
    /// DKIM keys.
    pub dkim: Dkim,
    /// The listener for bounces, complaints and replies.
    pub inbound: Inbound,
    /// Limits per destination.
    pub shaping: Shaping,
    /// Rules for replies.
    pub bounces: Bounces,
    /// `[engagement]`
    pub engagement: Engagement,
    /// Where events may be pushed to.
    pub webhooks: Webhooks,
    /// Daily reports to other domains on how TLS with them went.
    pub tls_reports: TlsReports,
    /// Where it was read.
    pub origin: Origin,
}

/// `[dns]`
#[derive(Debug, Clone)]
pub struct Dns {
    /// Empty: the system's.
    pub nameservers: Vec<SocketAddr>,
    /// Whether the AD bit of a name server that is not on loopback is believed.
    pub trust_ad: bool,
    /// Whether TLSA records are kept to.
    pub dane: DanePolicy,
    /// A name of a signed zone that is asked for at start: its answer has to come validated.
    pub dane_test: String,
}

/// `[tls_reports]` (RFC 8460)
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsReports {
    /// Who sends them; its domain signs. `None`: nothing is counted and nothing sent.
    pub from: Option<EmailAddress>,
    /// Whose they are; by default the domain of `from`.
    pub organization: String,
    /// Whom to ask about them; by default `from`.
    pub contact: String,
    /// The account that they are sent for.
    pub account: String,
}

/// `[dkim]`
#[derive(Debug, Clone)]
pub struct Dkim {
    /// Holds `DOMAIN/SELECTOR.pem`.
    pub dir: PathBuf,
}

/// `[inbound]`
#[derive(Debug, Clone)]
pub struct Inbound {
    /// `None`: off.
    pub listen: Option<SocketAddr>,
}

/// `[shaping]`
#[derive(Debug, Clone)]
pub struct Shaping {
    /// Read by [`super::shaping::ShapingFile::load`].
    pub file: ReadFile,
}

/// `[bounces]`
#[derive(Debug, Clone)]
pub struct Bounces {
    /// Read by the MTA's classifier.
    pub rules_file: ReadFile,
}

/// `[engagement]`
#[derive(Debug, Clone)]
pub struct Engagement {
    /// Who is a machine, and what interest is worth. Read by the tracker and by the MTA's job.
    pub rules_file: ReadFile,
}

/// `[webhooks]`
#[derive(Debug, Clone)]
pub struct Webhooks {
    /// Networks that may be pushed to although they are private.
    pub allow_private: Vec<IpNet>,
}

/// Reads the whole file.
pub(super) fn config(root: &mut Section<'_>, environment: &Environment) -> Config {
    let data_dir = PathBuf::from(root.value("data_dir", "data".to_owned()));
    let accounts = access::accounts(root);
    let account_ids: Vec<_> = accounts.iter().map(|account| account.id.clone()).collect();
    let smtp = root.table("smtp", |section| delivery::smtp(section, environment));
    let config = Config {
        store: root.table("store", |section| {
            storage::store(section, &data_dir, environment)
        }),
        journal: root.table("journal", |section| storage::journal(section, &data_dir)),
        retention: root.table("retention", storage::retention),
        api: root.table("api", |section| {
            access::api(section, &accounts, environment)
        }),
        tracker: root.table("tracker", |section| {
            tracker::tracker(section, &data_dir, &accounts)
        }),
        accounts,
        pools: delivery::pools(root, &smtp.sources),
        smtp,
        dns: root.table("dns", dns),
        dkim: root.table("dkim", |section| Dkim {
            dir: read_path(section, "dir", "../dkim-keys").path,
        }),
        inbound: root.table("inbound", |section| Inbound {
            listen: section.value("listen", OrOff(None)).0,
        }),
        shaping: root.table("shaping", |section| Shaping {
            file: read_path(section, "file", "shaping.toml"),
        }),
        bounces: root.table("bounces", |section| Bounces {
            rules_file: read_path(section, "rules_file", "bounce-rules.toml"),
        }),
        engagement: root.table("engagement", |section| Engagement {
            rules_file: read_path(section, "rules_file", "engagement.toml"),
        }),
        webhooks: root.table("webhooks", |section| Webhooks {
            allow_private: section.list("allow_private").unwrap_or_default(),
        }),
        tls_reports: root.table("tls_reports", |section| tls_reports(section, &account_ids)),
        data_dir,
        origin: Origin::default(),
    };
    one_listener_per_socket(root, &config);
    config
}

fn dns(section: &mut Section<'_>) -> Dns {
    let nameservers = section.list::<NameServer>("nameservers");
    Dns {
        nameservers: nameservers
            .unwrap_or_default()
            .into_iter()
            .map(|server| server.0)
            .collect(),
        trust_ad: section.value("trust_ad", false),
        dane: section.value("dane", DanePolicy::Auto),
        dane_test: section.value("dane_test", ".".to_owned()),
    }
}

fn tls_reports(section: &mut Section<'_>, accounts: &[String]) -> TlsReports {
    let OrOff(from) = section.value::<OrOff<EmailAddress>>("from", OrOff(None));
    let domain = from.as_ref().map(|from| from.domain().to_owned());
    let OrOff(organization) = section.value::<OrOff<String>>("organization", OrOff(None));
    let OrOff(contact) = section.value::<OrOff<String>>("contact", OrOff(None));
    let account = section.checked("account", |account: &String| {
        match accounts.contains(account) {
            true => Ok(()),
            false => Err(format!("there is no account {account:?}")),
        }
    });
    let first = || accounts.first().cloned().unwrap_or_default();
    TlsReports {
        organization: organization.or(domain).unwrap_or_default(),
        contact: contact
            .or_else(|| from.as_ref().map(ToString::to_string))
            .unwrap_or_default(),
        account: account.unwrap_or_else(first),
        from,
    }
}

/// A file or directory that is read: relative to the configuration file.
fn read_path(section: &mut Section<'_>, key: &'static str, default: &str) -> ReadFile {
    let typed = section.optional::<String>(key);
    ReadFile {
        named: typed.is_some(),
        path: beside(section.directory(), typed.as_deref().unwrap_or(default)),
    }
}

/// Joins, and takes each leading `..` together with the directory that it leaves, so that people
/// read `dkim-keys` and not `config/../dkim-keys`. Where that directory is a symbolic link the two
/// differ, and both stay.
fn beside(directory: &Path, file: &str) -> PathBuf {
    let mut base = directory.to_owned();
    let mut rest = Path::new(file);
    while let Ok(above) = rest.strip_prefix("..") {
        let named = matches!(base.components().next_back(), Some(Component::Normal(_)));
        if !named || base.is_symlink() {
            break;
        }
        base.pop();
        rest = above;
    }
    base.join(rest)
}

/// Under `up` all listeners are in one process; alone, two daemons share a machine as often.
fn one_listener_per_socket(root: &Section<'_>, config: &Config) {
    let listeners = [
        ("api.listen", Some(config.api.listen)),
        ("tracker.listen", Some(config.tracker.listen)),
        ("tracker.admin_listen", Some(config.tracker.admin_listen)),
        ("tracker.tls.listen", config.tracker.tls_listen),
        ("inbound.listen", config.inbound.listen),
    ];
    let bound = listeners
        .iter()
        .filter_map(|(key, at)| Some((*key, (*at)?)));
    let mut taken: Vec<(&str, SocketAddr)> = Vec::new();
    for (key, at) in bound.filter(|(_, at)| at.port() != 0) {
        match taken.iter().find(|(_, other)| *other == at) {
            Some((other, _)) => root.mistake(key, format!("{at} is already taken by {other}")),
            None => taken.push((key, at)),
        }
    }
}

/// Reports the second and further uses of a name; an empty one is missing and reported as that.
pub(super) fn unique<'n>(
    names: impl Iterator<Item = &'n str>,
    mut report: impl FnMut(usize, String),
) {
    let mut seen: Vec<&str> = Vec::new();
    for (index, name) in names.enumerate().filter(|(_, name)| !name.is_empty()) {
        if seen.contains(&name) {
            report(index, format!("{name:?} is taken by an earlier one"));
        }
        seen.push(name);
    }
}

/// Names that stand in URLs, metrics and file names: short, no surprises.
fn name(text: &String) -> Result<(), String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if (1..=64).contains(&text.len()) && text.chars().all(plain) {
        Ok(())
    } else {
        Err(format!(
            "{text:?} is not a name: 1 to 64 of letters, digits, - _ ."
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_beside_the_file_read_well_and_lead_to_the_same_place() {
        let beside = |directory: &str, file| beside(Path::new(directory), file);
        assert_eq!(beside("config", "../dkim-keys"), Path::new("dkim-keys"));
        assert_eq!(
            beside("/etc/hikyaku", "shaping.toml"),
            Path::new("/etc/hikyaku/shaping.toml")
        );
        assert_eq!(
            beside("/etc/hikyaku", "../../var/keys"),
            Path::new("/var/keys")
        );
        assert_eq!(beside("/etc/hikyaku", "/keys"), Path::new("/keys"));
        assert_eq!(beside("", "../keys"), Path::new("../keys"));
        assert_eq!(beside("../config", "../../keys"), Path::new("../../keys"));

        let folder = tempfile::tempdir().expect("a folder");
        let (real, link) = (folder.path().join("a/real"), folder.path().join("link"));
        std::fs::create_dir_all(&real).expect("a directory");
        std::os::unix::fs::symlink(&real, &link).expect("a link");
        let through = super::beside(&link, "../keys");
        assert_eq!(
            through,
            link.join("../keys"),
            "not {}/keys",
            folder.path().display()
        );
    }
}
