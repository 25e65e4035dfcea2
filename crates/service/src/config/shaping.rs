//! The syntax of `shaping.toml`: limits by default, by provider and by domain, and static routes.
//!
//! Owns what is written there and how sections fill in for each other; which destination a domain
//! belongs to, and what the limits do, is decided by the MTA.

use std::collections::BTreeMap;
use std::time::Duration;

use model::units::Rate;
use model::{Domain, Timestamp};

use super::document::{FileConfig, Item, Mistake, Value};
use super::reader::{Meant, Reader, Section};
use super::{Config, Families, Mistakes, ReadFile, Source, TlsPolicy};

/// What `shaping.toml` says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ShapingFile {
    /// `[default]`: what holds where nothing else is said.
    pub default: Limits,
    /// `[[provider]]`, in the order of the file: the first that matches counts.
    pub providers: Vec<Provider>,
    /// `[domain."slow.example"]`: destinations of their own.
    pub domains: BTreeMap<Domain, Limits>,
    /// `[mx]`: where mail for a domain goes instead of its MX hosts.
    pub routes: Routes,
    /// `[[warmup]]`: egress sources that receivers do not know yet.
    pub warmups: Vec<WarmUp>,
}

/// One of `[[warmup]]`: what a new egress source may send to each destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WarmUp {
    /// The source's name.
    pub source: String,
    /// The beginning of the first day, in UTC.
    pub start: Timestamp,
    /// Messages to one destination on the first day, the second, and so on; never empty, none 0.
    /// After the last the source is warm.
    pub schedule: Vec<u32>,
    /// Destinations by name that this is for; empty: all.
    pub destinations: Vec<String>,
    /// The line of the file at which it was typed.
    pub line: Option<u32>,
}

impl WarmUp {
    /// Whether it is about this source and destination.
    pub fn is_for(&self, source: &str, destination: &str) -> bool {
        let named = |name: &String| name == destination;
        self.source == source
            && (self.destinations.is_empty() || self.destinations.iter().any(named))
    }
}

/// A day by day schedule that a sender published: 16 days from 50 to 100,000 messages, for each pair
/// of address and receiving domain.
/// <https://support.sitevibes.com/support/solutions/articles/47001271345-understanding-our-ip-warming-process>
const STANDARD: [u32; 16] = [
    50, 100, 250, 500, 1_000, 2_500, 5_000, 7_500, 10_000, 15_000, 20_000, 30_000, 40_000, 55_000,
    70_000, 100_000,
];

/// The limits of one destination per egress source, complete.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Open at once; at least 1.
    pub connections: u32,
    /// Ceiling of adaptation, never below `connections`.
    pub max_connections: u32,
    /// Then the connection is closed; at least 1.
    pub messages_per_connection: u32,
    /// Connections opened, evenly spread whatever the unit.
    pub new_connections: Rate,
    /// Messages begun and not answered, over all connections; `None`: as many as those carry.
    pub in_flight: Option<u32>,
    /// How long a connection without work is kept; `None`: `smtp.timeouts.idle`.
    pub idle: Option<Duration>,
    /// Which addresses of its hosts, and which first; `None`: `smtp.families`.
    pub families: Option<Families>,
    /// MAIL commands, to start with.
    pub rate: Rate,
    /// Ceiling of adaptation, never below `rate`.
    pub max_rate: Rate,
    /// Whether limits follow what the destination says.
    pub adaptive: bool,
    /// How much TLS.
    pub tls: TlsPolicy,
    /// Waits between attempts before jitter; the last repeats. Never empty.
    pub retry: Vec<Duration>,
    /// How long after release a recipient is given up.
    pub expire: Duration,
    /// Where each limit was typed.
    pub lines: Lines,
}

/// Lines of the file, from 1, at which limits were typed, in the section itself or the one that it
/// inherits from; `None`: a default of ours.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Lines {
    /// `connections`
    pub connections: Option<u32>,
    /// `messages_per_connection`
    pub messages_per_connection: Option<u32>,
    /// `new_connections`
    pub new_connections: Option<u32>,
    /// `in_flight`
    pub in_flight: Option<u32>,
    /// `rate`
    pub rate: Option<u32>,
    /// `max_rate`
    pub max_rate: Option<u32>,
}

/// One of `[[provider]]`: domains whose MX hosts all match share one destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Provider {
    /// The destination's name; unique.
    pub name: String,
    /// Ends of MX host names, lower case, each with its leading dot. A host matches when it ends in
    /// one of them, or is one of them without the dot.
    pub mx_suffix: Vec<String>,
    /// What holds for it.
    pub limits: Limits,
}

impl Provider {
    /// Whether this MX host (lower case, no final dot) is one of the provider's.
    pub fn has_host(&self, host: &str) -> bool {
        let is_below = |suffix: &String| {
            host.ends_with(suffix.as_str()) || suffix.strip_prefix('.') == Some(host)
        };
        self.mx_suffix.iter().any(is_below)
    }
}

/// `[mx]`: static routes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Routes {
    /// By domain.
    pub by_domain: BTreeMap<Domain, Route>,
    /// `"*"`: for every other domain.
    pub otherwise: Option<Route>,
}

impl Routes {
    /// The route of a domain, if it has one.
    pub fn of(&self, domain: &Domain) -> Option<&Route> {
        self.by_domain.get(domain).or(self.otherwise.as_ref())
    }
}

/// A host to connect to, by the operator's word.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Route {
    /// A name to look up, or an IP address without brackets.
    pub host: String,
    /// `None`: `smtp.port`.
    pub port: Option<u16>,
}

impl Default for Limits {
    fn default() -> Self {
        const fn minutes(minutes: u64) -> Duration {
            Duration::from_secs(60 * minutes)
        }
        Self {
            connections: 5,
            max_connections: 5,
            messages_per_connection: 50,
            new_connections: Rate::Unlimited,
            in_flight: None,
            idle: None,
            families: None,
            rate: per_second(5),
            max_rate: per_second(20),
            adaptive: true,
            tls: TlsPolicy::Opportunistic,
            retry: [5, 10, 20, 40, 60, 120, 240].map(minutes).to_vec(),
            expire: minutes(72 * 60),
            lines: Lines::default(),
        }
    }
}

impl ShapingFile {
    /// Reads the file that `config` names; without one that was not named either, defaults hold.
    ///
    /// # Errors
    /// Every mistake in it, what does not fit the rest of `config` too.
    pub fn load(config: &Config) -> Result<Self, Mistakes> {
        let file = &config.shaping.file;
        let read = match file.read() {
            Ok(Some(text)) => Self::parse(&file.path, &text)?,
            Ok(None) => Self::default(),
            Err(unreadable) => return Err(Mistakes(vec![unreadable])),
        };
        Mistakes::none_in(read.unknown_sources(file, &config.smtp.sources)).map(|()| read)
    }

    /// A source that is not there is not warmed up, and the one that was meant sends all it can.
    fn unknown_sources(&self, file: &ReadFile, sources: &[Source]) -> Vec<Mistake> {
        let warmups = self.warmups.iter().enumerate();
        let unknown = warmups.filter(|(_, warmup)| {
            let mut named = sources.iter().filter(|source| source.name == warmup.source);
            named.next().is_none()
        });
        let mistake = |(at, warmup): (usize, &WarmUp)| Mistake {
            file: Some(file.path.clone()),
            line: warmup.line,
            path: format!("warmup[{at}].source"),
            detail: format!("there is no source {:?} in smtp.sources", warmup.source),
        };
        unknown.map(mistake).collect()
    }

    /// Reads `text`, which stood in `file`.
    ///
    /// # Errors
    /// Every mistake in it.
    pub fn parse(file: &std::path::Path, text: &str) -> Result<Self, Mistakes> {
        let typed = FileConfig::parse(file, text).map_err(Mistakes)?;
        let reader = Reader::new(typed, Vec::new());
        let meant = reader.read(shaping);
        Mistakes::none_in(reader.finish()).map(|()| meant)
    }
}

pub(super) fn shaping(root: &mut Section<'_>) -> ShapingFile {
    let default = root.table("default", |section| limits(section, &Limits::default()));
    let providers = root.tables("provider", |section| Provider {
        name: section.required("name", String::new()),
        mx_suffix: suffixes(section),
        limits: limits(section, &default),
    });
    let names = providers.iter().map(|provider| provider.name.as_str());
    super::sections::unique(names, |index, detail| {
        root.mistake(&format!("provider[{index}].name"), detail);
    });
    let domains = root.named("domain", |section| limits(section, &default));
    let warmups = root.tables("warmup", warmup);
    ShapingFile {
        routes: routes(root),
        warmups,
        default,
        providers,
        domains,
    }
}

/// What this section says, the rest as in `outer`. A section that sets its rate or connections has
/// its own ceiling.
fn limits(section: &mut Section<'_>, outer: &Limits) -> Limits {
    let (rate, max_rate) = rates(section, outer);
    let (connections, max_connections) = connections(section, outer);
    let messages = section.checked("messages_per_connection", positive);
    let in_flight = section.optional::<Bound>("in_flight");
    let idle = section.checked("idle", |idle: &Duration| match idle.is_zero() {
        true => Err("0 would close connections under the messages that wait".to_owned()),
        false => Ok(()),
    });
    Limits {
        connections,
        max_connections,
        messages_per_connection: messages.unwrap_or(outer.messages_per_connection),
        new_connections: section.value("new_connections", outer.new_connections),
        in_flight: in_flight.map_or(outer.in_flight, |bound| bound.0),
        idle: idle.or(outer.idle),
        families: section.optional("families").or(outer.families),
        rate,
        max_rate,
        adaptive: section.value("adaptive", outer.adaptive),
        tls: section.value("tls", outer.tls),
        retry: retry(section).unwrap_or_else(|| outer.retry.clone()),
        expire: section.value("expire", outer.expire),
        lines: lines(section, &outer.lines),
    }
}

fn rates(section: &mut Section<'_>, outer: &Limits) -> (Rate, Rate) {
    let own = section.optional::<Rate>("rate");
    let rate = own.unwrap_or(outer.rate);
    let max_rate = section.checked("max_rate", |ceiling: &Rate| {
        match ceiling.per_second() >= rate.per_second() {
            true => Ok(()),
            false => Err(format!("{ceiling} is below the rate of {rate}")),
        }
    });
    (
        rate,
        max_rate.unwrap_or(own.map_or(outer.max_rate, four_times)),
    )
}

fn connections(section: &mut Section<'_>, outer: &Limits) -> (u32, u32) {
    let own = section.checked("connections", positive);
    let connections = own.unwrap_or(outer.connections);
    let most = section.checked("max_connections", |most: &u32| match *most >= connections {
        true => Ok(()),
        false => Err(format!("{most} is below the {connections} connections")),
    });
    (connections, most.or(own).unwrap_or(outer.max_connections))
}

fn retry(section: &mut Section<'_>) -> Option<Vec<Duration>> {
    let retry = section.list::<Duration>("retry");
    let is_empty = section.is_empty_list("retry");
    if is_empty || retry.iter().flatten().any(Duration::is_zero) {
        section.mistake("retry", "needs at least one wait, and none of 0".to_owned());
    }
    retry.filter(|waits| !waits.is_empty())
}

fn lines(section: &Section<'_>, outer: &Lines) -> Lines {
    Lines {
        connections: section.line("connections").or(outer.connections),
        messages_per_connection: section
            .line("messages_per_connection")
            .or(outer.messages_per_connection),
        new_connections: section.line("new_connections").or(outer.new_connections),
        in_flight: section.line("in_flight").or(outer.in_flight),
        rate: section.line("rate").or(outer.rate),
        max_rate: section.line("max_rate").or(outer.max_rate),
    }
}

/// A count, or `"unlimited"`.
struct Bound(Option<u32>);

impl Meant for Bound {
    fn meant(item: &Item) -> Result<Self, String> {
        if matches!(&item.value, Value::String(text) if text == "unlimited") {
            return Ok(Self(None));
        }
        let count = u32::meant(item).map_err(|wrong| format!("{wrong}, or \"unlimited\""))?;
        positive(&count).map(|()| Self(Some(count)))
    }
}

fn per_second(count: u32) -> Rate {
    Rate::Limited {
        count,
        per: Duration::from_secs(1),
    }
}

fn four_times(rate: Rate) -> Rate {
    match rate {
        Rate::Unlimited => Rate::Unlimited,
        Rate::Limited { count, per } => Rate::Limited {
            count: count.saturating_mul(4),
            per,
        },
    }
}

fn positive(count: &u32) -> Result<(), String> {
    match count {
        0 => Err("0 would hold all mail: suspend the destination instead".to_owned()),
        _ => Ok(()),
    }
}

fn warmup(section: &mut Section<'_>) -> WarmUp {
    let line = section.line("source");
    let source = section.required("source", String::new());
    if !section.has("start") {
        section.mistake("start", "is required".to_owned());
    }
    let start = section.converted("start", |text: String| {
        Timestamp::parse(&format!("{text}T00:00:00Z"))
            .map_err(|_| format!("{text:?} is not a day, such as \"2026-03-01\""))
    });
    let schedule = section.optional::<Schedule>("schedule");
    WarmUp {
        source,
        start: start.unwrap_or_default(),
        schedule: schedule.map_or_else(|| STANDARD.to_vec(), |schedule| schedule.0),
        destinations: section.list("destinations").unwrap_or_default(),
        line,
    }
}

/// A name, or messages day by day.
struct Schedule(Vec<u32>);

impl Meant for Schedule {
    fn meant(item: &Item) -> Result<Self, String> {
        let wanted = "\"standard\", \"conservative\" or a list such as [50, 100, 500]";
        match &item.value {
            Value::String(name) if name == "standard" => Ok(Self(STANDARD.to_vec())),
            Value::String(name) if name == "conservative" => {
                Ok(Self(STANDARD.iter().flat_map(|day| [*day, *day]).collect()))
            }
            Value::Array(days) if !days.is_empty() => {
                let days: Result<Vec<u32>, String> = days.iter().map(u32::meant).collect();
                let days = days?;
                if days.contains(&0) {
                    return Err("a day of 0 messages would hold all mail".to_owned());
                }
                Ok(Self(days))
            }
            Value::String(text) => Err(format!("{text:?} is not {wanted}")),
            other => Err(format!("is {}, expected {wanted}", other.kind())),
        }
    }
}

fn suffixes(section: &mut Section<'_>) -> Vec<String> {
    if section.has("mx_suffix") && !section.is_empty_list("mx_suffix") {
        let suffixes = section.list::<MxSuffix>("mx_suffix").unwrap_or_default();
        return suffixes.into_iter().map(|suffix| suffix.0).collect();
    }
    // Asked for, so that it is a known key even when it is missing.
    let none = section.list::<MxSuffix>("mx_suffix").unwrap_or_default();
    section.mistake(
        "mx_suffix",
        "a provider needs at least one, such as \".google.com\"".to_owned(),
    );
    none.into_iter().map(|suffix| suffix.0).collect()
}

struct MxSuffix(String);

impl Meant for MxSuffix {
    fn meant(item: &Item) -> Result<Self, String> {
        let text = String::meant(item)?;
        // With or without its dot, "google.com" never takes in "notgoogle.com".
        let name = text.strip_prefix('.').unwrap_or(&text).parse::<Domain>();
        name.map(|name| Self(format!(".{name}")))
            .map_err(|_| format!("{text:?} is not the end of a host name, such as \".google.com\""))
    }
}

impl Meant for Route {
    fn meant(item: &Item) -> Result<Self, String> {
        let text = match &item.value {
            Value::String(text) => text,
            other => {
                return Err(format!(
                    "is {}, expected \"HOST\" or \"HOST:PORT\"",
                    other.kind()
                ));
            }
        };
        route(text)
            .ok_or_else(|| format!("{text:?} is not HOST, HOST:PORT, IPv4[:PORT] or [IPv6]:PORT"))
    }
}

fn route(text: &str) -> Option<Route> {
    if let Ok(at) = text.parse::<std::net::SocketAddr>() {
        return Some(Route {
            host: at.ip().to_string(),
            port: Some(at.port()).filter(|port| *port != 0),
        });
    }
    if text.parse::<std::net::IpAddr>().is_ok() {
        return Some(Route {
            host: text.to_owned(),
            port: None,
        });
    }
    let (host, port) = match text.split_once(':') {
        Some((host, port)) => (host, Some(port.parse().ok().filter(|port| *port != 0)?)),
        None => (text, None),
    };
    let labels_fit = host.split('.').all(|label| {
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_');
        (1..=63).contains(&label.len()) && label.bytes().all(plain)
    });
    (labels_fit && host.len() <= 253).then(|| Route {
        host: host.to_ascii_lowercase(),
        port,
    })
}

fn routes(root: &mut Section<'_>) -> Routes {
    let mut routes = Routes::default();
    for (domain, route) in root.entries::<Option<Domain>, Route>("mx") {
        match domain {
            Some(domain) => {
                routes.by_domain.insert(domain, route);
            }
            None => routes.otherwise = Some(route),
        }
    }
    routes
}
