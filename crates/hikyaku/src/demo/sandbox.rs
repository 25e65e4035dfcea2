//! Receiving mail servers with different tempers behind a DNS server of their own, all on
//! loopback: what the demo sends to. They speak real SMTP and count for themselves.

use crate::demo::report::Fate;
use anyhow::{Context, Result, bail};
use bytes::Bytes;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use testkit::dns::{DnsServer, Zone};
use testkit::smtp_peer::{Answer, SmtpPeer, Temper};
use testkit::tls::SelfSigned;

/// A provider of the sandbox: its name, how many domains it serves, how many of a thousand people
/// live in each, and what it is like.
struct Provider {
    name: &'static str,
    domains: usize,
    people: usize,
    character: &'static str,
}

const PROVIDERS: [Provider; 6] = [
    Provider {
        name: "open",
        domains: 12,
        people: 45,
        character: "accepts",
    },
    Provider {
        name: "tls",
        domains: 4,
        people: 40,
        character: "accepts, over STARTTLS",
    },
    Provider {
        name: "grey",
        domains: 3,
        people: 30,
        character: "greylists: come again in a second",
    },
    Provider {
        name: "strict",
        domains: 3,
        people: 30,
        character: "refuses unknown users",
    },
    Provider {
        name: "slow",
        domains: 2,
        people: 20,
        character: "takes its time for every message",
    },
    Provider {
        name: "full",
        domains: 1,
        people: 20,
        character: "some mailboxes are full",
    },
];
/// Domains without a server: one that does not exist, one that takes no mail (RFC 7505).
const UNREACHABLE: [(&str, usize); 2] = [("gone.example", 12), ("no-mail.example", 8)];

type Refused = Arc<Mutex<BTreeSet<String>>>;

/// The running sandbox.
pub(crate) struct Sandbox {
    dns: DnsServer,
    peers: Vec<SmtpPeer>,
    refused: Refused,
    port: u16,
}

impl Sandbox {
    /// Starts the servers and their DNS; `records` are further TXT records (DKIM keys).
    pub(crate) async fn start(records: &[(String, String)]) -> Result<Self> {
        let refused = Refused::default();
        let (mut peers, port) = (Vec::new(), free_port()?);
        let mut zone = Zone::new().null_mx(UNREACHABLE[1].0);
        for (at, provider) in (2_u8..).zip(&PROVIDERS) {
            let address = Ipv4Addr::new(127, 0, 0, at);
            let host = format!("mx.{}.example", provider.name);
            let peer = SmtpPeer::bind(
                SocketAddr::from((address, port)),
                temper(provider.name, &host, &refused)?,
            );
            peers.push(
                peer.await
                    .with_context(|| format!("the sandbox needs {address}:{port}"))?,
            );
            zone = zone.a(&host, address);
            for domain in domains(provider) {
                zone = zone.mx(&domain, 10, &host);
            }
        }
        for (name, text) in records {
            zone = zone.txt(name, text);
        }
        Ok(Self {
            dns: DnsServer::start(zone).await?,
            peers,
            refused,
            port,
        })
    }

    /// Where its DNS answers.
    pub(crate) fn dns(&self) -> SocketAddr {
        self.dns.addr()
    }

    /// The port of all its mail servers.
    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Messages that its servers accepted, second copies included.
    pub(crate) fn accepted(&self) -> u64 {
        self.peers.iter().map(|peer| peer.counts().messages).sum()
    }

    /// Every message accepted, with its recipient.
    pub(crate) fn mails(&self) -> Vec<(String, Bytes)> {
        self.new_mails(&mut Vec::new())
    }

    /// Those that came since it was asked with `seen` before, which notes how many each server had.
    pub(crate) fn new_mails(&self, seen: &mut Vec<u64>) -> Vec<(String, Bytes)> {
        seen.resize(self.peers.len(), 0);
        let messages = self.peers.iter().zip(seen).flat_map(|(peer, seen)| {
            let before = usize::try_from(*seen).unwrap_or(usize::MAX);
            if peer.counts().messages == *seen {
                return Vec::new();
            }
            let new: Vec<_> = peer.messages().into_iter().skip(before).collect();
            *seen += new.len() as u64;
            new
        });
        messages
            .flat_map(|message| {
                message
                    .recipients
                    .into_iter()
                    .map(move |to| (to, message.content.clone()))
            })
            .collect()
    }

    /// What its servers did for each of `people`.
    pub(crate) fn fates<'a>(
        &self,
        people: impl Iterator<Item = &'a str>,
    ) -> BTreeMap<String, Fate> {
        let accepted: BTreeSet<String> = self.mails().into_iter().map(|(to, _)| to).collect();
        let refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        let fate = |person: &str| {
            let domain = person.rsplit('@').next().unwrap_or_default();
            if accepted.contains(person) {
                Fate::Accepted
            } else if refused.contains(person) {
                Fate::Refused
            } else if UNREACHABLE
                .iter()
                .any(|(unreachable, _)| *unreachable == domain)
            {
                Fate::Unreachable
            } else {
                Fate::Unseen
            }
        };
        people
            .map(|person| (person.to_owned(), fate(person)))
            .collect()
    }

    /// What each provider is like, for a person to read.
    pub(crate) fn describe() -> String {
        let row = |provider: &Provider| {
            format!(
                "  {:<8}{:>3} domains  {}\n",
                provider.name, provider.domains, provider.character
            )
        };
        let mut text: String = PROVIDERS.iter().map(row).collect();
        text += "  and one domain that does not exist, one that takes no mail\n";
        text
    }
}

/// The domains of all people, each with its share of a thousand.
pub(crate) fn homes() -> Vec<(String, usize)> {
    let mut homes: Vec<_> = PROVIDERS
        .iter()
        .flat_map(|provider| domains(provider).map(|domain| (domain, provider.people)))
        .collect();
    homes.extend(UNREACHABLE.map(|(domain, people)| (domain.to_owned(), people)));
    homes
}

fn domains(provider: &Provider) -> impl Iterator<Item = String> {
    let name = provider.name;
    (1..=provider.domains).map(move |at| format!("{name}-{at}.example"))
}

fn temper(name: &str, host: &str, refused: &Refused) -> Result<Temper> {
    let temper = Temper::accepting().named(host);
    Ok(match name {
        "tls" => temper.with_tls(&SelfSigned::new(&[host])?),
        "grey" => temper.greylisting(Duration::from_secs(1)),
        "strict" => refusing(temper, refused, 550, "5.1.1 user unknown", |to| {
            to.starts_with("gone.")
        }),
        "full" => refusing(temper, refused, 552, "5.2.2 mailbox full", |to| {
            to.starts_with("gone.")
        }),
        "slow" => temper.slow_messages(Duration::from_millis(100)),
        _ => temper,
    })
}

/// Refuses recipients that are so, and notes each of them.
fn refusing(
    temper: Temper,
    refused: &Refused,
    code: u16,
    text: &'static str,
    so: fn(&str) -> bool,
) -> Temper {
    let noted = refused.clone();
    temper.refusing_recipients(Answer::reply(code, text), move |to| {
        if so(to) {
            noted
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .insert(to.to_owned());
        }
        so(to)
    })
}

/// A port that is free on every loopback address which the sandbox needs.
fn free_port() -> Result<u16> {
    for _ in 0..50 {
        let first = std::net::TcpListener::bind("127.0.0.2:0")
            .context("the sandbox needs 127.0.0.2 and its neighbours (Linux has them all)")?;
        let port = first.local_addr()?.port();
        let free = (3_u8..).zip(&PROVIDERS[1..]).all(|(at, _)| {
            std::net::TcpListener::bind((Ipv4Addr::new(127, 0, 0, at), port)).is_ok()
        });
        if free {
            return Ok(port);
        }
    }
    bail!("no port is free on 127.0.0.2 to 127.0.0.7")
}
