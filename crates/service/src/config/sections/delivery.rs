//! How mail leaves: SMTP and pools.

use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use model::Domain;

use super::egress::{self, Smarthost, Source};
use super::{name, unique};
use crate::config::Environment;
use crate::config::reader::Section;
use crate::config::values::{AmbiguousPolicy, Families, OrOff};

/// `[smtp]`
#[derive(Debug, Clone)]
pub struct Smtp {
    /// What we call ourselves, where a source says nothing else.
    pub ehlo: String,
    /// Port of destinations.
    pub port: u16,
    /// Domain of the reverse-path; `None`: the From domain.
    pub bounce_domain: Option<Domain>,
    /// What becomes of a recipient of whom it is not known whether the message arrived.
    pub ambiguous: AmbiguousPolicy,
    /// Not tried again before this.
    pub ambiguous_after: Duration,
    /// Extra roots in PEM.
    pub ca_file: Option<PathBuf>,
    /// Which addresses of hosts are used.
    pub families: Families,
    /// Whether MTA-STS policies are looked up and kept to.
    pub mta_sts: bool,
    /// Where policy hosts listen: 443 but for tests.
    pub mta_sts_port: u16,
    /// Networks that may be delivered to although they are private.
    pub allow_private_mx: Vec<IpNet>,
    /// Deadlines.
    pub timeouts: SmtpTimeouts,
    /// At least one; names are unique.
    pub sources: Vec<Source>,
    /// Relays that want to know who we are.
    pub smarthosts: Vec<Smarthost>,
}

/// `[smtp.timeouts]`: how long each step of a session may take (RFC 5321 section 4.5.3.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SmtpTimeouts {
    /// One TCP connection to one address.
    pub connect: Duration,
    /// The peer's first line.
    pub greeting: Duration,
    /// The reply to EHLO or HELO.
    pub ehlo: Duration,
    /// The reply to STARTTLS and the handshake.
    pub starttls: Duration,
    /// The reply to MAIL.
    pub mail: Duration,
    /// The reply to RCPT.
    pub rcpt: Duration,
    /// The reply to DATA.
    pub data: Duration,
    /// One write of the message.
    pub data_block: Duration,
    /// The reply to the final dot.
    pub final_dot: Duration,
    /// How long an open connection waits for its next message.
    pub idle: Duration,
}

/// One of `[[pools]]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pool {
    /// Unique.
    pub name: String,
    /// At least one; each exists.
    pub sources: Vec<WeightedSource>,
}

/// A source in a pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WeightedSource {
    /// Name of the source.
    pub name: String,
    /// Its share; at least 1.
    pub weight: u32,
}

const fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

pub(super) fn smtp(section: &mut Section<'_>, environment: &Environment) -> Smtp {
    let ehlo = section
        .checked("ehlo", ehlo_name)
        .unwrap_or_else(|| gethostname::gethostname().to_string_lossy().into_owned());
    let directory = section.directory();
    Smtp {
        port: section.checked("port", port).unwrap_or(25),
        bounce_domain: section.value("bounce_domain", OrOff(None)).0,
        ambiguous: section.value("ambiguous", AmbiguousPolicy::Retry),
        ambiguous_after: section.value("ambiguous_after", seconds(1_800)),
        ca_file: section
            .converted("ca_file", |OrOff(file): OrOff<String>| {
                file.map(|file| readable(directory.join(file))).transpose()
            })
            .flatten(),
        families: section.value("families", Families::PreferIpv4),
        mta_sts: section.value("mta_sts", true),
        mta_sts_port: section.checked("mta_sts_port", port).unwrap_or(443),
        allow_private_mx: section.list("allow_private_mx").unwrap_or_default(),
        timeouts: section.table("timeouts", timeouts),
        sources: egress::sources(section, &ehlo, environment),
        smarthosts: egress::smarthosts(section, environment),
        ehlo,
    }
}

fn port(port: &u16) -> Result<(), String> {
    match port {
        0 => Err("0 is not a port".to_owned()),
        _ => Ok(()),
    }
}

pub(super) fn readable(file: PathBuf) -> Result<PathBuf, String> {
    match std::fs::File::open(&file) {
        Ok(_) => Ok(file),
        Err(error) => Err(format!("{} cannot be read: {error}", file.display())),
    }
}

fn timeouts(section: &mut Section<'_>) -> SmtpTimeouts {
    let mut deadline = |key, default: u64| {
        let positive = |limit: &Duration| match limit.is_zero() {
            true => Err("0 would end every session".to_owned()),
            false => Ok(()),
        };
        section.checked(key, positive).unwrap_or(seconds(default))
    };
    SmtpTimeouts {
        connect: deadline("connect", 30),
        greeting: deadline("greeting", 300),
        ehlo: deadline("ehlo", 300),
        starttls: deadline("starttls", 120),
        mail: deadline("mail", 300),
        rcpt: deadline("rcpt", 300),
        data: deadline("data", 120),
        data_block: deadline("data_block", 180),
        final_dot: deadline("final_dot", 600),
        idle: deadline("idle", 15),
    }
}

pub(super) fn pools(root: &mut Section<'_>, sources: &[Source]) -> Vec<Pool> {
    let mut pools = root.tables("pools", |section| {
        let pool = Pool {
            name: section.checked("name", name).unwrap_or_default(),
            sources: section.tables("sources", |member| weighted(member, sources)),
        };
        if !section.has("name") {
            section.mistake("name", "is required".to_owned());
        }
        if pool.sources.is_empty() {
            section.mistake("sources", "a pool needs at least one source".to_owned());
        }
        pool
    });
    unique(
        pools.iter().map(|pool| pool.name.as_str()),
        |index, detail| {
            root.mistake(&format!("pools[{index}].name"), detail);
        },
    );
    if pools.is_empty() {
        let all = sources.iter().map(|source| WeightedSource {
            name: source.name.clone(),
            weight: 1,
        });
        pools.push(Pool {
            name: "default".to_owned(),
            sources: all.collect(),
        });
    }
    pools
}

fn weighted(section: &mut Section<'_>, sources: &[Source]) -> WeightedSource {
    let name = section.required("name", String::new());
    if section.has("name") && sources.iter().all(|source| source.name != name) {
        section.mistake(
            "name",
            format!("there is no source {name:?} in smtp.sources"),
        );
    }
    let weight = section.checked("weight", |weight| match weight {
        0 => Err("0 takes no share: leave the source out, or at least 1".to_owned()),
        _ => Ok(()),
    });
    WeightedSource {
        name,
        weight: weight.unwrap_or(1),
    }
}

/// A host name or an address literal (RFC 5321 section 4.1.3), as it will stand after EHLO.
pub(super) fn ehlo_name(text: &String) -> Result<(), String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.');
    let literal = |c: char| c.is_ascii_alphanumeric() || matches!(c, ':' | '.');
    let inside = text
        .strip_prefix('[')
        .and_then(|text| text.strip_suffix(']'));
    let fits = match inside {
        Some(address) => !address.is_empty() && address.chars().all(literal),
        None => !text.is_empty() && text.chars().all(plain),
    };
    match fits && text.len() <= 255 {
        true => Ok(()),
        false => Err(format!(
            "{text:?} is not a host name or an address in brackets"
        )),
    }
}
