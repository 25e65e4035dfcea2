//! The rules file: lists of user agents and networks, how several hits are read together, points.
//!
//! Owns its form and its mistakes. Must not open it: the text comes in.

use crate::agents::{Agents, Lists, Texts};
use crate::prospect::Points;
use ipnet::IpNet;
use serde::Deserialize;
use std::net::IpAddr;
use std::time::Duration;

/// The shipped rules, for when no file is configured.
const SHIPPED: &str = include_str!("../../../config/engagement.toml");

/// The rules in force.
#[derive(Debug, Clone)]
pub struct Rules {
    /// Kept with every verdict.
    pub version: u16,
    pub(crate) agents: Agents,
    networks: Vec<(IpNet, NetworkKind)>,
    /// How several hits are read together.
    pub behaviour: Behaviour,
    /// What interest is worth.
    pub points: Points,
}

/// What comes out of a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum NetworkKind {
    Prefetcher,
    ImageProxy,
    Scanner,
}

/// When several hits together are a machine's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Behaviour {
    /// So long before the final dot, or the reply to it, a fetch is a gateway's.
    pub before_delivery: Duration,
    /// Two different links within this time.
    pub same_moment: Duration,
    /// So many different links …
    pub burst_links: usize,
    /// … within this time.
    pub burst: Duration,
    /// So many neighbouring links in order …
    pub order_links: usize,
    /// … within this time.
    pub order: Duration,
    /// One client at so many recipients …
    pub recipients: usize,
    /// … within this time …
    pub recipients_within: Duration,
    /// … each so soon after its delivery.
    pub recipients_fresh: Duration,
    /// What else a machine's client did with the same message.
    pub same_client: Duration,
}

/// What is wrong with a rules file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RulesError {
    /// Not TOML, or a field that is unknown, missing or of another type.
    #[error("{0}")]
    Syntax(String),
    /// A value that cannot be.
    #[error("{at}: {detail}")]
    Value {
        /// Where in the file.
        at: String,
        /// What is wrong.
        detail: String,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileForm {
    version: u16,
    #[serde(default)]
    agents: Vec<AgentsForm>,
    #[serde(default)]
    networks: Vec<NetworksForm>,
    behaviour: BehaviourForm,
    score: Points,
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum AgentKind {
    Prefetcher,
    ImageProxy,
    Automated,
    Person,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AgentsForm {
    kind: AgentKind,
    source: String,
    #[serde(default)]
    whole: Vec<String>,
    #[serde(default)]
    contains: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NetworksForm {
    kind: NetworkKind,
    source: String,
    networks: Vec<IpNet>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct BehaviourForm {
    before_delivery: String,
    same_moment: String,
    burst_links: usize,
    burst: String,
    order_links: usize,
    order: String,
    recipients: usize,
    recipients_within: String,
    recipients_fresh: String,
    same_client: String,
}

impl Rules {
    /// The rules that come with the program.
    pub fn shipped() -> Self {
        match Self::parse(SHIPPED) {
            Ok(rules) => rules,
            // A test reads them.
            Err(error) => unreachable!("the shipped rules are readable: {error}"),
        }
    }

    /// Reads a rules file.
    ///
    /// # Errors
    /// What is wrong with it, and where.
    pub fn parse(text: &str) -> Result<Self, RulesError> {
        let form: FileForm = toml::from_str(text)
            .map_err(|error| RulesError::Syntax(error.to_string().trim_end().to_owned()))?;
        Ok(Self {
            version: form.version,
            agents: agents(form.agents)?,
            networks: networks(form.networks)?,
            behaviour: behaviour(&form.behaviour)?,
            points: form.score,
        })
    }

    /// What is known of the network of an address.
    pub(crate) fn network(&self, address: IpAddr) -> Option<NetworkKind> {
        let found = self.networks.iter().find(|(net, _)| net.contains(&address));
        found.map(|(_, kind)| *kind)
    }
}

fn wrong(at: impl Into<String>, detail: impl Into<String>) -> RulesError {
    RulesError::Value {
        at: at.into(),
        detail: detail.into(),
    }
}

fn agents(forms: Vec<AgentsForm>) -> Result<Agents, RulesError> {
    let mut lists = Lists::default();
    for (number, form) in forms.into_iter().enumerate() {
        let at = format!("agents[{number}]");
        sourced(&at, &form.source)?;
        if let Some(short) = form.contains.iter().find(|part| part.trim().len() < 3) {
            return Err(wrong(
                at,
                format!("{short:?} is too short to mean anything"),
            ));
        }
        let lower = |list: Vec<String>| list.into_iter().map(|text| text.to_ascii_lowercase());
        let texts: &mut Texts = match form.kind {
            AgentKind::Prefetcher => &mut lists.prefetchers,
            AgentKind::ImageProxy => &mut lists.image_proxies,
            AgentKind::Automated => &mut lists.automated,
            AgentKind::Person => {
                lists.people.extend(lower(form.contains));
                continue;
            }
        };
        texts.whole.extend(lower(form.whole));
        texts.parts.extend(lower(form.contains));
    }
    Agents::new(lists).map_err(|error| wrong("agents", error.to_string()))
}

fn networks(forms: Vec<NetworksForm>) -> Result<Vec<(IpNet, NetworkKind)>, RulesError> {
    let mut networks = Vec::new();
    for (number, form) in forms.into_iter().enumerate() {
        let at = format!("networks[{number}]");
        sourced(&at, &form.source)?;
        for network in form.networks {
            if is_private(network.addr()) {
                return Err(wrong(at, format!("{network} is private: it is nobody's")));
            }
            networks.push((network, form.kind));
        }
    }
    Ok(networks)
}

fn sourced(at: &str, source: &str) -> Result<(), RulesError> {
    if source.trim().is_empty() {
        return Err(wrong(at, "names no source"));
    }
    Ok(())
}

fn behaviour(form: &BehaviourForm) -> Result<Behaviour, RulesError> {
    let time = |name: &str, text: &str| {
        model::units::parse_duration(text)
            .map_err(|error| wrong(format!("behaviour.{name}"), error.to_string()))
    };
    let many = |name: &str, number: usize| {
        let at = || format!("behaviour.{name}");
        (number >= 2)
            .then_some(number)
            .ok_or_else(|| wrong(at(), "has to be at least 2"))
    };
    Ok(Behaviour {
        before_delivery: time("before_delivery", &form.before_delivery)?,
        same_moment: time("same_moment", &form.same_moment)?,
        burst_links: many("burst_links", form.burst_links)?,
        burst: time("burst", &form.burst)?,
        order_links: many("order_links", form.order_links)?,
        order: time("order", &form.order)?,
        recipients: many("recipients", form.recipients)?,
        recipients_within: time("recipients_within", &form.recipients_within)?,
        recipients_fresh: time("recipients_fresh", &form.recipients_fresh)?,
        same_client: time("same_client", &form.same_client)?,
    })
}

/// Whether an address is one that says nothing about who is there.
pub(crate) fn is_private(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(v4) => {
            v4.is_loopback() || v4.is_private() || v4.is_link_local() || v4.is_unspecified()
        }
        IpAddr::V6(v6) => {
            v6.is_loopback()
                || v6.is_unspecified()
                || v6.is_unique_local()
                || v6.is_unicast_link_local()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_shipped_rules_are_readable() {
        let rules = Rules::parse(SHIPPED).expect("readable");
        assert!(rules.version >= 2);
        assert_eq!(rules.points.days, 90);
        let google = "66.249.80.1".parse().expect("an address");
        assert_eq!(rules.network(google), Some(NetworkKind::ImageProxy));
    }

    #[test]
    fn mistakes_say_where() {
        for (from, to, said) in [
            ("version = 2", "version = \"x\"", "version"),
            (
                "same_moment = \"1s\"",
                "same_moment = \"1x\"",
                "behaviour.same_moment",
            ),
            (
                "burst_links = 4",
                "burst_links = 1",
                "behaviour.burst_links",
            ),
            ("[score]", "[score]\nlove = 3", "love"),
            ("66.102.0.0/20", "10.0.0.0/8", "networks[0]"),
            ("\"yahoomailproxy\"", "\"y\"", "agents[3]"),
        ] {
            assert!(SHIPPED.contains(from), "{from}");
            let error = Rules::parse(&SHIPPED.replacen(from, to, 1)).expect_err(to);
            assert!(error.to_string().contains(said), "{error}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_rules_or_refused(text: String) {
            let _read = Rules::parse(&text);
        }
    }
}
