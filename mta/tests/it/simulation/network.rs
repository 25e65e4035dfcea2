//! The network and the DNS that simulated nodes see, and what is noticed on the way.

use std::collections::BTreeMap;
use std::io::{self, IoSlice};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use async_trait::async_trait;
use model::MessageId;
use mta::deliver::{ConnectError, Link, Network, Pulse, Socket};
use mta::resolve::{Answer, Dns, DnsError};
use mta::tlspolicy::dane::Tlsa;
use service::config::Source;
use testkit::smtp_peer::SmtpPeer;
use testkit::strand::{Carriage, End, Glance, Strand, strand};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::watch::Watch;

/// How a host answers a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Door {
    Open,
    /// Refuses.
    Shut,
    /// Says nothing, ever.
    Hole,
}

/// A host of a domain.
#[derive(Debug)]
pub(super) struct Site {
    /// Its domain, which is its destination here.
    pub(super) domain: String,
    pub(super) peer: SmtpPeer,
    pub(super) door: Mutex<Door>,
    pub(super) carriage: Carriage,
}

/// How a domain's DNS behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Zone {
    Good,
    /// Takes its time.
    Slow(Duration),
    /// Fails every so often, of 100.
    Failing(u8),
    NoDomain,
    NullMx,
    /// Changes its host every so often.
    Moving(Duration),
}

/// What all nodes share: hosts by address, zones by domain.
#[derive(Debug)]
pub(super) struct Globe {
    pub(super) sites: BTreeMap<IpAddr, Site>,
    pub(super) zones: BTreeMap<String, Zone>,
    /// Connections that are open, with the node of each.
    strands: Mutex<Vec<(usize, Strand, IpAddr)>>,
    random: Mutex<fastrand::Rng>,
    watch: Arc<Watch>,
}

impl Globe {
    pub(super) fn new(
        sites: BTreeMap<IpAddr, Site>,
        zones: BTreeMap<String, Zone>,
        seed: u64,
        watch: &Arc<Watch>,
    ) -> Self {
        Self {
            sites,
            zones,
            strands: Mutex::default(),
            random: Mutex::new(fastrand::Rng::with_seed(seed)),
            watch: Arc::clone(watch),
        }
    }

    /// The address of a domain's host: each has two names, `mx1` and `mx2`.
    pub(super) fn address(domain: usize, host: u8) -> IpAddr {
        let domain = u16::try_from(domain).expect("few").to_be_bytes();
        Ipv4Addr::new(11, domain[0], domain[1], host).into()
    }

    fn chance<T>(&self, ask: impl FnOnce(&mut fastrand::Rng) -> T) -> T {
        ask(&mut self.random.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Some open connection to a host that is disturbed; none where there is no such.
    pub(super) fn any_strand(&self) -> Option<Strand> {
        let mut strands = self.strands.lock().unwrap_or_else(PoisonError::into_inner);
        strands.retain(|(_, strand, _)| !strand.is_over());
        let steady = |ip: &IpAddr| self.sites.get(ip).is_none_or(|site| site.carriage.splits);
        let shaky: Vec<_> = strands.iter().filter(|(_, _, ip)| steady(ip)).collect();
        if shaky.is_empty() {
            return None;
        }
        let at = self.chance(|random| random.usize(..shaky.len()));
        shaky.get(at).map(|(_, strand, _)| strand.clone())
    }

    fn domain_number(&self, name: &str) -> Option<usize> {
        self.zones.keys().position(|domain| domain == name)
    }
}

/// The network as one node sees it.
#[derive(Debug)]
pub(super) struct NodeNetwork {
    pub(super) node: usize,
    pub(super) globe: Arc<Globe>,
}

#[async_trait]
impl Network for NodeNetwork {
    async fn connect(&self, _source: &Source, address: SocketAddr) -> Result<Socket, ConnectError> {
        let Some(site) = self.globe.sites.get(&address.ip()) else {
            return Err(ConnectError::host(io::ErrorKind::HostUnreachable));
        };
        tokio::time::sleep(site.carriage.delay).await;
        let door = *site.door.lock().unwrap_or_else(PoisonError::into_inner);
        match door {
            Door::Open => {}
            Door::Shut => return Err(ConnectError::host(io::ErrorKind::ConnectionRefused)),
            Door::Hole => std::future::pending().await,
        }
        let seed = self.globe.chance(|random| random.u64(..));
        let (here, there, strand) = strand(site.carriage, seed);
        let from = SocketAddr::from(([10, 0, 0, u8::try_from(self.node).expect("few")], 40_000));
        site.peer.serve(there, from);
        let mut strands = self
            .globe
            .strands
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        strands.push((self.node, strand, address.ip()));
        let id = self.globe.watch.opened(self.node, &site.domain);
        Ok(Socket::Link(Box::new(Watched {
            end: here,
            watch: Arc::clone(&self.globe.watch),
            node: self.node,
            domain: site.domain.clone(),
            id,
            line: Vec::new(),
            message: None,
            after_data: false,
        })))
    }
}

/// An end of a node, whose commands are read along.
#[derive(Debug)]
struct Watched {
    end: End,
    watch: Arc<Watch>,
    node: usize,
    domain: String,
    id: u64,
    line: Vec<u8>,
    /// Of the transaction whose content has not begun.
    message: Option<MessageId>,
    after_data: bool,
}

impl Watched {
    fn notice(&mut self, bytes: &[u8]) {
        for byte in bytes {
            if *byte != b'\n' {
                self.line.push(*byte);
                continue;
            }
            let line = std::mem::take(&mut self.line);
            self.read(&String::from_utf8_lossy(&line));
        }
    }

    /// Reads a line along: of content all but the first is nobody's business.
    fn read(&mut self, line: &str) {
        let is_next = line.starts_with("MAIL FROM:");
        let is_content = line.starts_with("BDAT ") || self.after_data && !is_next;
        self.after_data = line.starts_with("DATA");
        if is_next {
            self.message = self.watch.mail(self.node, &self.domain, self.id, line);
        } else if is_content && let Some(message) = self.message.take() {
            self.watch.content(self.node, message);
        }
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.watch.closed(self.node, &self.domain, self.id);
    }
}

impl Link for Watched {
    fn pulse(&self) -> Pulse {
        match self.end.glance() {
            Glance::Nothing => Pulse::Quiet,
            Glance::Bytes => Pulse::Unread,
            Glance::Over => Pulse::Gone,
        }
    }
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.end).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Watched {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let wrote = Pin::new(&mut self.end).poll_write(cx, bytes);
        if let Poll::Ready(Ok(count)) = wrote {
            self.notice(bytes.get(..count).unwrap_or_default());
        }
        wrote
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let all: Vec<u8> = slices.iter().flat_map(|slice| slice.to_vec()).collect();
        self.poll_write(cx, &all)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.end).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.end).poll_shutdown(cx)
    }
}

/// What names lead to, without a name server.
#[derive(Debug)]
pub(super) struct SimulatedDns(pub(super) Arc<Globe>);

const TTL: Duration = Duration::from_secs(60);

fn answer<T>(records: Vec<T>) -> Answer<T> {
    Answer {
        records,
        ttl: TTL,
        secure: false,
        canonical: None,
    }
}

impl SimulatedDns {
    /// Waits as the zone of `domain` does, and fails as it does.
    async fn ask(&self, domain: &str) -> Result<Zone, DnsError> {
        let zone = self.0.zones.get(domain).copied();
        let zone = zone.ok_or(DnsError::NoDomain(TTL))?;
        let mut delay = self.0.chance(|random| random.u64(1..=40));
        if let Zone::Slow(most) = zone {
            delay += self
                .0
                .chance(|random| random.u64(..=u64::try_from(most.as_millis()).expect("short")));
        }
        tokio::time::sleep(Duration::from_millis(delay)).await;
        if let Zone::Failing(percent) = zone
            && self.0.chance(|random| random.u8(..100)) < percent
        {
            return Err(DnsError::Temporary("SERVFAIL".to_owned()));
        }
        Ok(zone)
    }
}

#[async_trait]
impl Dns for SimulatedDns {
    async fn mx(&self, domain: &str) -> Result<Answer<(u16, String)>, DnsError> {
        let zone = self.ask(domain).await?;
        let host = |number: u8| format!("mx{number}.{domain}");
        Ok(answer(match zone {
            Zone::NoDomain => return Err(DnsError::NoDomain(TTL)),
            Zone::NullMx => vec![(0, String::new())],
            Zone::Moving(every) => {
                let turns = self.0.watch.age().as_secs() / every.as_secs().max(1);
                vec![(10, host(1 + u8::try_from(turns % 2).expect("0 or 1")))]
            }
            Zone::Good | Zone::Slow(_) | Zone::Failing(_) => vec![(10, host(1)), (20, host(2))],
        }))
    }

    async fn addresses(&self, host: &str, _locally: bool) -> Result<Answer<IpAddr>, DnsError> {
        let Some((number, domain)) = host
            .strip_prefix("mx")
            .and_then(|rest| rest.split_once('.'))
        else {
            return Err(DnsError::NoDomain(TTL));
        };
        self.ask(domain).await?;
        let number = number.parse().map_err(|_| DnsError::NoDomain(TTL))?;
        let domain = self.0.domain_number(domain);
        let domain = domain.ok_or(DnsError::NoDomain(TTL))?;
        Ok(answer(vec![Globe::address(domain, number)]))
    }

    async fn txt(&self, _name: &str) -> Result<Answer<Vec<u8>>, DnsError> {
        Err(DnsError::NoRecords(TTL))
    }

    async fn tlsa(&self, _name: &str) -> Result<Answer<Tlsa>, DnsError> {
        Err(DnsError::NoRecords(TTL))
    }

    async fn validates(&self, _name: &str) -> Result<bool, DnsError> {
        Ok(false)
    }
}
