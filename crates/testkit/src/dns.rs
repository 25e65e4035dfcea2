//! An authoritative DNS server on loopback, UDP and TCP on one ephemeral port, with tempers.
//!
//! Owns its sockets and the zone it serves, which may change while it runs; counts what it is
//! asked. Must not resolve anything for real: what is not in the [`Zone`] does not exist. Encoding
//! is hickory's, so that what we test against is not our own reading of RFC 1035.

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{CNAME, MX, PTR, SOA, TLSA, TXT};
pub use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// Largest UDP answer without EDNS (RFC 1035 section 4.2.1).
const PLAIN_UDP_BYTES: u16 = 512;
/// Largest UDP answer whatever EDNS says: loopback carries it, and it is what servers choose.
const MAX_UDP_BYTES: u16 = 1232;
/// TCP connections and delayed answers at a time; beyond, connections are closed and answers lost.
const MAX_PENDING: usize = 512;
/// How long a TCP connection may be silent.
const TCP_IDLE: Duration = Duration::from_secs(10);
/// Names that are counted each for itself; beyond, only the total counts.
const MAX_COUNTED: usize = 65_536;
/// Links of a CNAME chain that are followed.
const MAX_CHAIN: usize = 8;

/// What a server does when asked for a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Behaviour {
    /// Answers as the zone says.
    Answer,
    /// The same, this much later.
    Delay(Duration),
    /// SERVFAIL.
    ServFail,
    /// REFUSED.
    Refused,
    /// Never answers.
    Silent,
    /// Over UDP an empty answer with the TC bit, over TCP the whole one.
    Truncate,
    /// Bytes that are no DNS message, under the right id.
    Garbage,
}

/// What a server knows. Names are written without a final dot and compared without case.
///
/// `*.x.example` is a wildcard as RFC 4592 has it; a bare `*` stands for every name that is not
/// there otherwise, also where an exact wildcard would not reach.
#[derive(Debug, Clone)]
pub struct Zone {
    records: BTreeMap<String, Vec<RData>>,
    behaviours: HashMap<(String, Option<RecordType>), Behaviour>,
    ttl: u32,
    negative_ttl: u32,
    authentic: bool,
    insecure: Vec<String>,
}

impl Default for Zone {
    fn default() -> Self {
        Self::new()
    }
}

impl Zone {
    /// Nothing exists; records live 60 seconds, the knowledge that there are none 30.
    pub fn new() -> Self {
        Self {
            records: BTreeMap::new(),
            behaviours: HashMap::new(),
            ttl: 60,
            negative_ttl: 30,
            authentic: false,
            insecure: Vec::new(),
        }
    }

    /// A mail exchanger.
    ///
    /// # Panics
    /// Like all builders here: when a name is not one, which is the test's mistake.
    #[must_use]
    pub fn mx(self, name: &str, preference: u16, host: &str) -> Self {
        self.record(name, RData::MX(MX::new(preference, absolute(host))))
    }

    /// A domain that takes no mail (RFC 7505).
    ///
    /// # Panics
    /// When `name` is not a name.
    #[must_use]
    pub fn null_mx(self, name: &str) -> Self {
        self.record(name, RData::MX(MX::new(0, Name::root())))
    }

    /// An address: A or AAAA.
    ///
    /// # Panics
    /// When `name` is not a name.
    #[must_use]
    pub fn a(self, name: &str, address: impl Into<IpAddr>) -> Self {
        let data = match address.into() {
            IpAddr::V4(v4) => RData::A(v4.into()),
            IpAddr::V6(v6) => RData::AAAA(v6.into()),
        };
        self.record(name, data)
    }

    /// A text, split into strings of 255 octets where it is longer.
    ///
    /// # Panics
    /// When `name` is not a name.
    #[must_use]
    pub fn txt(self, name: &str, text: &str) -> Self {
        let strings = if text.is_empty() {
            vec![&[][..]]
        } else {
            text.as_bytes().chunks(255).collect()
        };
        self.record(name, RData::TXT(TXT::from_bytes(strings)))
    }

    /// An alias.
    ///
    /// # Panics
    /// When a name is not one.
    #[must_use]
    pub fn cname(self, name: &str, target: &str) -> Self {
        self.record(name, RData::CNAME(CNAME(absolute(target))))
    }

    /// The name of an address.
    ///
    /// # Panics
    /// When `host` is not a name.
    #[must_use]
    pub fn ptr(self, address: IpAddr, host: &str) -> Self {
        let name = Name::from(address).to_ascii();
        self.record(&name, RData::PTR(PTR(absolute(host))))
    }

    /// A record of any type.
    ///
    /// # Panics
    /// When `name` is not a name.
    #[must_use]
    pub fn record(mut self, name: &str, data: RData) -> Self {
        self.records.entry(key_of(name)).or_default().push(data);
        self
    }

    /// How the server behaves for a name, whatever type is asked; `*` for names without their own.
    ///
    /// # Panics
    /// When `name` is not a name.
    #[must_use]
    pub fn behave(mut self, name: &str, behaviour: Behaviour) -> Self {
        self.behaviours.insert((key_of(name), None), behaviour);
        self
    }

    /// How the server behaves for one type of a name; goes before [`Zone::behave`].
    ///
    /// # Panics
    /// When `name` is not a name.
    #[must_use]
    pub fn behave_for(mut self, name: &str, asked: RecordType, behaviour: Behaviour) -> Self {
        self.behaviours
            .insert((key_of(name), Some(asked)), behaviour);
        self
    }

    /// Seconds that records, and the knowledge that there are none, may be kept.
    #[must_use]
    pub fn ttl(mut self, records: u32, negative: u32) -> Self {
        (self.ttl, self.negative_ttl) = (records, negative);
        self
    }

    /// Whether answers carry the AD bit, as those of a validating resolver do (RFC 4035).
    #[must_use]
    pub fn authentic(mut self, authentic: bool) -> Self {
        self.authentic = authentic;
        self
    }

    /// A name that no answer says is validated, as one of an unsigned zone; nor those below it.
    ///
    /// # Panics
    /// When `name` is not a name.
    #[must_use]
    pub fn insecure(mut self, name: &str) -> Self {
        self.insecure.push(key_of(name));
        self
    }

    /// The head of a zone, with an SOA record.
    ///
    /// # Panics
    /// When `name` is not a name.
    #[must_use]
    pub fn apex(self, name: &str) -> Self {
        let soa = self.soa().data;
        self.record(name, soa)
    }

    /// A TLSA record: usage, selector, matching type, data.
    ///
    /// # Panics
    /// When `name` is not a name.
    #[must_use]
    pub fn tlsa(self, name: &str, (usage, selector, matching): (u8, u8, u8), data: &[u8]) -> Self {
        let data = TLSA::new(
            usage.into(),
            selector.into(),
            matching.into(),
            data.to_vec(),
        );
        self.record(name, RData::TLSA(data))
    }

    fn is_authentic(&self, query: &Query) -> bool {
        let key = key_of_name(query.name());
        let is_at_or_below = |name: &String| {
            key.strip_suffix(name.as_str())
                .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
        };
        self.authentic && !self.insecure.iter().any(is_at_or_below)
    }

    /// Takes everything about a name away.
    ///
    /// # Panics
    /// When `name` is not a name.
    #[must_use]
    pub fn without(mut self, name: &str) -> Self {
        let key = key_of(name);
        self.behaviours.retain(|(of, _), _| *of != key);
        self.records.remove(&key);
        self
    }

    fn behaviour(&self, key: &str, asked: RecordType) -> Behaviour {
        [
            (key, Some(asked)),
            (key, None),
            ("*", Some(asked)),
            ("*", None),
        ]
        .into_iter()
        .find_map(|(name, kind)| self.behaviours.get(&(name.to_owned(), kind)))
        .copied()
        .unwrap_or(Behaviour::Answer)
    }

    /// The records of a name; `None` when it does not exist. An empty list is a name that exists
    /// because one below it does (RFC 8020).
    fn find(&self, key: &str) -> Option<&[RData]> {
        if let Some(records) = self.records.get(key) {
            return Some(records);
        }
        if self.is_ancestor(key) {
            return Some(self.records.get("*").map_or(&[], Vec::as_slice));
        }
        let mut rest = key;
        while let Some((_, parent)) = rest.split_once('.') {
            if let Some(records) = self.records.get(&format!("*.{parent}")) {
                return Some(records);
            }
            if self.records.contains_key(parent) || self.is_ancestor(parent) {
                break;
            }
            rest = parent;
        }
        self.records.get("*").map(Vec::as_slice)
    }

    fn is_ancestor(&self, key: &str) -> bool {
        let suffix = format!(".{key}");
        self.records.keys().any(|name| name.ends_with(&suffix))
    }

    /// Fills `answer` with what the zone says to `query`.
    fn answer(&self, query: &Query, answer: &mut Message) {
        let mut owner = query.name().clone();
        let mut found = None;
        for _ in 0..MAX_CHAIN {
            found = self.find(&key_of_name(&owner));
            let records = found.unwrap_or_default();
            for data in records.iter().filter(|data| fits(data, query.query_type())) {
                answer.add_answer(Record::from_rdata(owner.clone(), self.ttl, data.clone()));
            }
            let alias = records.iter().find_map(|data| match data {
                RData::CNAME(CNAME(target)) if query.query_type() != RecordType::CNAME => {
                    Some(target)
                }
                _ => None,
            });
            let Some(target) = alias else { break };
            answer.add_answer(Record::from_rdata(
                owner,
                self.ttl,
                RData::CNAME(CNAME(target.clone())),
            ));
            owner = target.clone();
        }
        if found.is_none() {
            answer.metadata.response_code = ResponseCode::NXDomain;
        }
        let final_records = answer
            .answers
            .iter()
            .any(|record| fits(&record.data, query.query_type()));
        if !final_records {
            answer.add_authority(self.soa());
        }
    }

    /// What tells a resolver for how long a name or type does not exist (RFC 2308).
    fn soa(&self) -> Record {
        let server = absolute("ns.testkit.invalid");
        let mailbox = absolute("hostmaster.testkit.invalid");
        let ttl = self.negative_ttl;
        let data = SOA::new(server, mailbox, 1, 3600, 600, 86_400, ttl);
        Record::from_rdata(Name::root(), ttl, RData::SOA(data))
    }
}

fn fits(data: &RData, asked: RecordType) -> bool {
    asked == RecordType::ANY || data.record_type() == asked
}

fn absolute(name: &str) -> Name {
    let mut name = Name::from_ascii(name).expect("the test writes a valid DNS name");
    name.set_fqdn(true);
    name
}

fn key_of(name: &str) -> String {
    if name == "*" {
        return name.to_owned();
    }
    key_of_name(&absolute(name))
}

fn key_of_name(name: &Name) -> String {
    name.to_ascii().trim_end_matches('.').to_ascii_lowercase()
}

#[derive(Debug, Default)]
struct Counts {
    total: u64,
    by_name: HashMap<(String, RecordType), u64>,
}

#[derive(Debug)]
struct Shared {
    zone: Mutex<Zone>,
    counts: Mutex<Counts>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Transport {
    Udp,
    Tcp,
}

/// What goes back, and when.
#[derive(Debug, PartialEq, Eq)]
struct Answer {
    bytes: Vec<u8>,
    after: Duration,
}

/// A running server. Dropping it closes its sockets and ends its tasks.
#[derive(Debug)]
pub struct DnsServer {
    addr: SocketAddr,
    shared: Arc<Shared>,
    stop: CancellationToken,
    tasks: JoinSet<()>,
}

impl DnsServer {
    /// Serves `zone` on an ephemeral port of 127.0.0.1. Inside a runtime.
    ///
    /// # Errors
    /// When no port could be had for both UDP and TCP.
    pub async fn start(zone: Zone) -> io::Result<Self> {
        Self::start_on(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), zone).await
    }

    /// Serves `zone` on `addr`; port 0 takes an ephemeral one. Inside a runtime.
    ///
    /// # Errors
    /// When the port could not be had for both UDP and TCP.
    pub async fn start_on(addr: SocketAddr, zone: Zone) -> io::Result<Self> {
        let (udp, tcp) = bind_both(addr).await?;
        let addr = udp.local_addr()?;
        let shared = Arc::new(Shared {
            zone: Mutex::new(zone),
            counts: Mutex::default(),
        });
        let stop = CancellationToken::new();
        let mut tasks = JoinSet::new();
        tasks.spawn(serve_udp(udp, shared.clone(), stop.clone()));
        tasks.spawn(serve_tcp(tcp, shared.clone(), stop.clone()));
        Ok(Self {
            addr,
            shared,
            stop,
            tasks,
        })
    }

    /// Where it listens, UDP and TCP alike.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Changes the zone; the next query sees it.
    pub fn change(&self, change: impl FnOnce(Zone) -> Zone) {
        let mut zone = lock(&self.shared.zone);
        let old = std::mem::take(&mut *zone);
        *zone = change(old);
    }

    /// How often `name` was asked for, over all types.
    ///
    /// # Panics
    /// When `name` is not a name.
    pub fn queries(&self, name: &str) -> u64 {
        let key = key_of(name);
        let counts = lock(&self.shared.counts);
        let of_name = counts.by_name.iter().filter(|((of, _), _)| *of == key);
        of_name.map(|(_, count)| count).sum()
    }

    /// How often `name` was asked for this type.
    ///
    /// # Panics
    /// When `name` is not a name.
    pub fn queries_of(&self, name: &str, asked: RecordType) -> u64 {
        let counts = lock(&self.shared.counts);
        let count = counts.by_name.get(&(key_of(name), asked));
        count.copied().unwrap_or_default()
    }

    /// How often it was asked for anything.
    pub fn total_queries(&self) -> u64 {
        lock(&self.shared.counts).total
    }

    /// Closes the sockets and waits for the tasks.
    pub async fn shutdown(mut self) {
        self.stop.cancel();
        while self.tasks.join_next().await.is_some() {}
    }
}

async fn bind_both(addr: SocketAddr) -> io::Result<(UdpSocket, TcpListener)> {
    // The TCP port of the same number may be another's: then another ephemeral port is tried.
    let mut tries = 32;
    loop {
        let udp = UdpSocket::bind(addr).await?;
        tries -= 1;
        match TcpListener::bind(udp.local_addr()?).await {
            Ok(tcp) => return Ok((udp, tcp)),
            Err(error) if addr.port() != 0 || tries == 0 => return Err(error),
            Err(_) => {}
        }
    }
}

async fn serve_udp(socket: UdpSocket, shared: Arc<Shared>, stop: CancellationToken) {
    let socket = Arc::new(socket);
    let mut delayed = JoinSet::new();
    let mut buffer = [0_u8; 4096];
    loop {
        let received = tokio::select! {
            () = stop.cancelled() => return,
            received = socket.recv_from(&mut buffer) => received,
        };
        // An error here is about an earlier datagram (a port that has closed), not the socket.
        let Ok((len, peer)) = received else { continue };
        let packet = buffer.get(..len).unwrap_or_default();
        let Some(answer) = answer(&shared, packet, Transport::Udp) else {
            continue;
        };
        if answer.after.is_zero() {
            drop(socket.send_to(&answer.bytes, peer).await);
            continue;
        }
        while delayed.try_join_next().is_some() {}
        if delayed.len() < MAX_PENDING {
            let socket = socket.clone();
            delayed.spawn(async move {
                tokio::time::sleep(answer.after).await;
                drop(socket.send_to(&answer.bytes, peer).await);
            });
        }
    }
}

async fn serve_tcp(listener: TcpListener, shared: Arc<Shared>, stop: CancellationToken) {
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        while connections.try_join_next().is_some() {}
        match accepted {
            Ok((stream, _)) if connections.len() < MAX_PENDING => {
                let shared = shared.clone();
                connections.spawn(async move { drop(serve_connection(stream, &shared).await) });
            }
            Ok(_) => {}
            // Out of descriptors, most likely: give others time to close some.
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

/// Messages with two bytes of length before each (RFC 1035 section 4.2.2), one at a time.
async fn serve_connection(mut stream: TcpStream, shared: &Shared) -> io::Result<()> {
    let mut packet = Vec::new();
    loop {
        let len = tokio::time::timeout(TCP_IDLE, stream.read_u16()).await??;
        packet.resize(usize::from(len), 0);
        tokio::time::timeout(TCP_IDLE, stream.read_exact(&mut packet)).await??;
        let Some(answer) = answer(shared, &packet, Transport::Tcp) else {
            continue;
        };
        tokio::time::sleep(answer.after).await;
        let Ok(len) = u16::try_from(answer.bytes.len()) else {
            continue;
        };
        let mut framed = len.to_be_bytes().to_vec();
        framed.extend_from_slice(&answer.bytes);
        stream.write_all(&framed).await?;
    }
}

/// The answer to a packet; `None` when there is to be none.
fn answer(shared: &Shared, packet: &[u8], transport: Transport) -> Option<Answer> {
    let id = u16::from_be_bytes(*packet.first_chunk()?);
    // The QR bit: answering answers would make two servers talk to each other for ever.
    if packet.get(2)? & 0x80 != 0 {
        return None;
    }
    let at_once = |message: &Message| Answer::new(message, Duration::ZERO);
    let request = match Message::from_vec(packet) {
        Ok(request) if request.metadata.message_type == MessageType::Query => request,
        _ => {
            return at_once(&Message::error_msg(
                id,
                OpCode::Query,
                ResponseCode::FormErr,
            ));
        }
    };
    let op_code = request.metadata.op_code;
    if op_code != OpCode::Query {
        return at_once(&Message::error_msg(id, op_code, ResponseCode::NotImp));
    }
    let [query] = request.queries.as_slice() else {
        return at_once(&Message::error_msg(id, op_code, ResponseCode::FormErr));
    };
    count(shared, query);
    reply(&lock(&shared.zone), &request, query, transport)
}

fn reply(zone: &Zone, request: &Message, query: &Query, transport: Transport) -> Option<Answer> {
    let mut message = Message::response(request.metadata.id, OpCode::Query);
    message.metadata.authoritative = true;
    message.metadata.recursion_desired = request.metadata.recursion_desired;
    message.metadata.authentic_data = zone.is_authentic(query);
    message.add_query(query.clone());
    if request.edns.is_some() {
        message.set_edns(Edns::new());
    }
    let mut after = Duration::ZERO;
    match zone.behaviour(&key_of_name(query.name()), query.query_type()) {
        Behaviour::Silent => return None,
        Behaviour::Garbage => {
            let mut bytes = request.metadata.id.to_be_bytes().to_vec();
            bytes.extend_from_slice(&[0x84, 0, 0xff, 0xff, 0xff, 0xff, 0xc0]);
            return Some(Answer { bytes, after });
        }
        Behaviour::ServFail => message.metadata.response_code = ResponseCode::ServFail,
        Behaviour::Refused => message.metadata.response_code = ResponseCode::Refused,
        Behaviour::Truncate if transport == Transport::Udp => message.metadata.truncation = true,
        Behaviour::Truncate | Behaviour::Answer => zone.answer(query, &mut message),
        Behaviour::Delay(delay) => {
            after = delay;
            zone.answer(query, &mut message);
        }
    }
    let answer = Answer::new(&message, after)?;
    let limit = match (transport, &request.edns) {
        (Transport::Tcp, _) => u16::MAX,
        (Transport::Udp, None) => PLAIN_UDP_BYTES,
        (Transport::Udp, Some(edns)) => edns.max_payload().clamp(PLAIN_UDP_BYTES, MAX_UDP_BYTES),
    };
    if answer.bytes.len() <= usize::from(limit) {
        Some(answer)
    } else {
        Answer::new(&message.truncate(), after)
    }
}

impl Answer {
    fn new(message: &Message, after: Duration) -> Option<Self> {
        let bytes = message.to_vec().ok()?;
        Some(Self { bytes, after })
    }
}

fn count(shared: &Shared, query: &Query) {
    let mut counts = lock(&shared.counts);
    counts.total += 1;
    let room = counts.by_name.len() < MAX_COUNTED;
    let key = (key_of_name(query.name()), query.query_type());
    match counts.by_name.get_mut(&key) {
        Some(count) => *count += 1,
        None if room => drop(counts.by_name.insert(key, 1)),
        None => {}
    }
}

#[cfg(test)]
mod tests;
