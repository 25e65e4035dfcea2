//! From a route to a session that takes messages: hosts in turn, addresses in turn, STARTTLS.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use model::{Blame, Class};
use rustls::pki_types::ServerName;
use service::config::{Families, Source, TlsPolicy};
use service::metrics::{SmtpStage, TlsHandshake, TlsResult};
use service::tasks::blocking;
use smtp::client::{Event as Spoken, Interruption, StartTls};
use smtp::{ClientSession, SessionError, Stage};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::Deliver;
use super::auth::Relay;
use super::connect::ConnectError;
use super::io::{Stream, Wire};
use super::secure::Terms;
use super::tls::Observer;
use crate::classify::Peer;
use crate::queue::Event;
use crate::queue::job::{ConnId, Policy, Trouble};
use crate::resolve::{Addresses, Host, Route};
use crate::shaping::Destination;
use crate::tlspolicy::Security;
use crate::tlspolicy::tally::{Failure as TlsFailure, Flaw};
use crate::trace::Tap;

/// Addresses tried for one connection.
const ADDRESSES_MAX: usize = 8;

/// A session that takes messages.
#[derive(Debug)]
pub(super) struct Established {
    pub(super) wire: Wire,
    pub(super) session: ClientSession,
    /// How long connecting took: a packet there and back, or longer.
    pub(super) connect: Duration,
    /// Its name in the route.
    pub(super) name: Arc<str>,
    /// `mx1.x.example (192.0.2.1)`.
    pub(super) host: Box<str>,
    /// `mx1.x.example:25`.
    pub(super) host_key: Box<str>,
    /// Version, cipher, and how far the certificate was checked.
    pub(super) tls: Option<Box<str>>,
    /// What it has to show to the domains whose mail it may carry.
    pub(super) security: Security,
}

/// Where one connection goes.
struct Target<'a> {
    host: &'a Host,
    address: SocketAddr,
    source: &'a Source,
    terms: &'a Terms,
    route: &'a Route,
    /// Who we are to it, where it wants to know.
    relay: Option<&'a Relay>,
    /// Found by DNS, which may lead back to us.
    is_found: bool,
    /// For whoever reads along.
    conn: ConnId,
    destination: &'a Destination,
}

impl Target<'_> {
    fn label(&self) -> Box<str> {
        format!("{} ({})", self.host.name, self.address.ip()).into()
    }

    fn key(&self) -> String {
        format!("{}:{}", self.host.name, self.host.port)
    }

    fn session(&self, starttls: StartTls) -> ClientSession {
        let session = ClientSession::new(&self.source.ehlo, starttls);
        // A relay on this machine has our name with good reason; an MX host has not.
        let session = if self.is_found {
            session.refusing_itself()
        } else {
            session
        };
        match self.relay {
            Some(relay) => session.with_auth(relay.auth()),
            None => session,
        }
    }
}

/// Why there is no session.
#[derive(Debug)]
pub(super) enum DialError {
    /// The source can connect to nobody.
    Source,
    /// No host has an address that the source can reach.
    NoWay(Trouble),
    /// No host will have one.
    Hosts(Trouble),
    /// The connection was asked to end before there was one.
    Asked,
}

/// What went wrong with one address.
enum Failure {
    /// The source.
    Source(String),
    /// TLS failed where plaintext may do.
    TryPlain(String),
    /// Everything else.
    Session(SessionError),
}

impl From<ConnectError> for Failure {
    fn from(error: ConnectError) -> Self {
        match error {
            ConnectError::Source(why) => Self::Source(why),
            ConnectError::Host(error) => Self::Session(error),
        }
    }
}

impl From<SessionError> for Failure {
    fn from(error: SessionError) -> Self {
        Self::Session(error)
    }
}

impl Deliver {
    /// A session with the first host of `route` that will have one, but none in `avoided`.
    ///
    /// What a host says on refusing the connection is told to the queue; then the next is tried.
    pub(super) async fn dial(
        &self,
        conn: ConnId,
        route: &Route,
        policy: &Policy,
        source: &Source,
        avoided: &[Arc<str>],
    ) -> Result<Established, DialError> {
        let mut last = None;
        let mut tries = 0;
        let hosts = self.hosts_in_order(route).into_iter();
        for host in hosts.filter(|host| !avoided.contains(&host.name)) {
            let started = self.clock.instant();
            let relay = self.relay(&host, route);
            let floor = relay.map_or(policy.limits.tls, |relay| relay.config.tls);
            let found = self.look_up(&host, route, floor).await;
            self.measure(SmtpStage::Dns, started);
            let (addresses, terms) = match found {
                Ok((addresses, terms)) => {
                    (self.addresses_in_order(&host, &addresses, policy), terms)
                }
                Err(trouble) => {
                    last = Some(DialError::Hosts(trouble));
                    continue;
                }
            };
            for address in addresses
                .into_iter()
                .filter(|address| source.bind.reaches(*address))
            {
                if tries >= ADDRESSES_MAX {
                    break;
                }
                tries += 1;
                let target = Target {
                    host: &host,
                    address: SocketAddr::new(address, host.port),
                    source,
                    terms: &terms,
                    route,
                    relay,
                    is_found: !route.is_static(),
                    conn,
                    destination: &policy.destination,
                };
                match self.open(&target).await {
                    Ok(established) => {
                        self.came_up(&target);
                        return Ok(established);
                    }
                    Err(failure) => {
                        let peer = Peer {
                            host: &host.name,
                            destination: policy.destination.as_str(),
                        };
                        let failed = self.failed(conn, failure, &target, peer).await;
                        last = match (failed, last) {
                            // What a host said is more than that one of our addresses is gone.
                            (DialError::Source, Some(told @ DialError::Hosts(_))) => Some(told),
                            (failed, _) => Some(failed),
                        };
                    }
                }
            }
        }
        Err(last.unwrap_or_else(|| DialError::NoWay(no_address(source, self.families(policy)))))
    }

    /// Notes what went wrong with an address, and says what that means for the whole.
    async fn failed(
        &self,
        conn: ConnId,
        failure: Failure,
        target: &Target<'_>,
        peer: Peer<'_>,
    ) -> DialError {
        let error = match failure {
            // It says nothing about the host, and the source's other address may be there.
            Failure::Source(why) => {
                let source = &target.source.name;
                tracing::warn!(%source, %why, "an egress source cannot connect");
                return DialError::Source;
            }
            Failure::TryPlain(why) => SessionError::TlsFailed(why),
            Failure::Session(error) => error,
        };
        // A host that one domain does not trust is as good as ever to the others.
        if !is_about_tls(&error) {
            self.went_down(target);
        }
        self.notice(conn, &error, peer).await;
        DialError::Hosts(self.trouble(&error, target, peer))
    }

    /// The relay at a static route that wants to know who we are.
    fn relay(&self, host: &Host, route: &Route) -> Option<&Relay> {
        let mut relays = self.relays.iter();
        let fits = |known: &&Relay| {
            known.config.port == host.port && known.config.host.eq_ignore_ascii_case(&host.name)
        };
        relays.find(fits).filter(|_| route.is_static())
    }

    /// Those that did not answer lately come last.
    fn addresses_in_order(
        &self,
        host: &Host,
        addresses: &Addresses,
        policy: &Policy,
    ) -> Vec<IpAddr> {
        let families = self.families(policy);
        let mut ordered = addresses.in_order(families, &mut fastrand::Rng::new());
        let now = self.clock.instant();
        ordered.sort_by_key(|ip| {
            let at = SocketAddr::new(*ip, host.port);
            self.hosts.is_down(&at.to_string(), now)
        });
        ordered
    }

    /// The destination's own, else the node's.
    fn families(&self, policy: &Policy) -> Families {
        policy.limits.families.unwrap_or(self.families)
    }

    fn came_up(&self, target: &Target<'_>) {
        let now = self.clock.instant();
        self.hosts.came_up(&target.key(), now);
        self.hosts.came_up(&target.address.to_string(), now);
    }

    fn went_down(&self, target: &Target<'_>) {
        let now = self.clock.instant();
        self.hosts.went_down(&target.key(), now);
        self.hosts.went_down(&target.address.to_string(), now);
    }

    /// The addresses of a host, and on which terms it may be given what goes by `route`.
    async fn look_up(
        &self,
        host: &Host,
        route: &Route,
        floor: TlsPolicy,
    ) -> Result<(Addresses, Terms), Trouble> {
        let addresses = self.resolver.addresses(host, route).await?;
        let terms = self.terms(host, &addresses, route, floor);
        match terms.await {
            Ok(terms) => Ok((addresses, terms)),
            Err(trouble) => {
                self.metrics.tls.at(TlsResult::Refused).inc();
                Err(trouble)
            }
        }
    }

    /// By preference; those that did not answer lately come last.
    fn hosts_in_order(&self, route: &Route) -> Vec<Host> {
        let mut hosts = route.in_order(&mut fastrand::Rng::new());
        let now = self.clock.instant();
        hosts.sort_by_key(|host| {
            self.hosts
                .is_down(&format!("{}:{}", host.name, host.port), now)
        });
        hosts
    }

    async fn open(&self, target: &Target<'_>) -> Result<Established, Failure> {
        let starttls = target.terms.starttls;
        let opened = match self.establish(target, starttls).await {
            Err(Failure::TryPlain(why)) => {
                tracing::info!(host = %target.host.name, %why, "TLS failed, going on in plaintext");
                self.hosts.tls_broke(&target.key(), self.clock.instant());
                self.establish(target, StartTls::Never).await
            }
            opened => opened,
        };
        match opened {
            Ok(established) => {
                let encrypted = established.tls.is_some();
                let fallen_back = self.hosts.has_no_tls(&target.key(), self.clock.instant());
                let result = target.terms.result(encrypted, fallen_back);
                self.metrics.tls.at(result).inc();
                if result == TlsResult::NotOffered {
                    self.count_failure(target, Flaw::NoStarttls, "");
                }
                Ok(established)
            }
            Err(Failure::Session(error)) => {
                if is_about_tls(&error) {
                    self.metrics.tls.at(TlsResult::Refused).inc();
                }
                if let SessionError::TlsNotOffered | SessionError::TlsRefused(_) = &error {
                    self.count_failure(target, Flaw::NoStarttls, &error.to_string());
                }
                Err(Failure::Session(error))
            }
            Err(failure) => Err(failure),
        }
    }

    /// Counts a failure for the domain's TLS report.
    fn count_failure(&self, target: &Target<'_>, flaw: Flaw, why: &str) {
        let policy = target.terms.policy(target.host, target.route);
        let address = Some(target.address.ip());
        let failure = TlsFailure::new(flaw, &target.host.name, address, why);
        self.policies.count(target.route, policy, Some(failure));
    }

    async fn establish(
        &self,
        target: &Target<'_>,
        starttls: StartTls,
    ) -> Result<Established, Failure> {
        let started = self.clock.instant();
        let mut tap = self.tap(target);
        tap.dials();
        let stream = self.connect(target.source, target.address).await?;
        self.measure(SmtpStage::Connect, started);
        let connected = self.clock.instant();
        let connect = connected.saturating_duration_since(started);
        let mut wire = Wire::new(Stream::Plain(stream));
        wire.tap = Some(Box::new(tap));
        let mut session = target.session(starttls);
        let mut tls = None;
        if target.relay.is_some_and(Relay::is_implicit) {
            let encrypted = self.handshake(wire, target).await;
            let (encrypted, label) = encrypted.map_err(SessionError::TlsFailed)?;
            (wire, tls) = (encrypted, Some(label));
            session = session.within_tls();
            self.measure(SmtpStage::Tls, connected);
        }
        let connected = self.clock.instant();
        let mut greeted = false;
        loop {
            if !greeted && session.waiting_for() != Stage::Greeting {
                greeted = true;
                self.measure(SmtpStage::Greeting, connected);
            }
            match session.poll_event() {
                Some(Spoken::Ready) => {
                    return Ok(Established {
                        wire,
                        session,
                        connect,
                        name: Arc::clone(&target.host.name),
                        host: target.label(),
                        host_key: target.key().into(),
                        security: target.terms.security(target.host, tls.is_some()),
                        tls,
                    });
                }
                Some(Spoken::HandshakeDue) => {
                    let started = self.clock.instant();
                    match self.handshake(wire, target).await {
                        Ok((encrypted, label)) => {
                            (wire, tls) = (encrypted, Some(label));
                            session.tls_established();
                            self.measure(SmtpStage::Tls, started);
                        }
                        Err(why) if starttls == StartTls::Opportunistic => {
                            return Err(Failure::TryPlain(why));
                        }
                        Err(why) => return Err(Failure::Session(SessionError::TlsFailed(why))),
                    }
                }
                Some(Spoken::ChallengeDue) => {
                    session = answer_challenge(session).await?;
                }
                Some(Spoken::Closed(Some(error)))
                    if starttls == StartTls::Opportunistic && is_lost_at_starttls(&error) =>
                {
                    wire.hang_up().await;
                    return Err(Failure::TryPlain(error.to_string()));
                }
                Some(Spoken::Closed(error)) => {
                    wire.hang_up().await;
                    let stage = Stage::Greeting;
                    return Err(error.unwrap_or(SessionError::Disconnected { stage }).into());
                }
                // Nothing was begun.
                Some(Spoken::BodyDue(_) | Spoken::TransactionDone { .. }) => {}
                None => self.greet_turn(&mut wire, &mut session).await,
            }
        }
    }

    /// Who reads along on a connection to this address.
    fn tap(&self, target: &Target<'_>) -> Tap {
        let (conn, source) = (target.conn.0, &target.source.name);
        Tap::new(
            &self.traces,
            conn,
            target.destination,
            source,
            &target.label(),
        )
    }

    /// One exchange before the session is ready, within its deadline.
    async fn greet_turn(&self, wire: &mut Wire, session: &mut ClientSession) {
        let deadline = self.deadline(session.waiting_for());
        let interruption = match timeout(deadline, wire.turn(session)).await {
            Ok(Ok(true)) => return,
            Ok(Ok(false)) => Interruption::Disconnected,
            Ok(Err(error)) => Interruption::Io(error.kind()),
            Err(_) => Interruption::TimedOut,
        };
        session.interrupted(interruption);
    }

    async fn handshake(
        &self,
        mut wire: Wire,
        target: &Target<'_>,
    ) -> Result<(Wire, Box<str>), String> {
        let tap = wire.tap.take();
        let terms = target.terms;
        let setup = |error: rustls::Error| error.to_string();
        let (config, observer) = match terms.observes {
            true => {
                let (config, observer) = self.tls.observing().map_err(setup)?;
                (config, Some(observer))
            }
            false => {
                let config = self.tls.of(&target.source.name, &terms.demand);
                (config.map_err(setup)?, None)
            }
        };
        let name = match target.host.name.parse::<IpAddr>() {
            Ok(address) => ServerName::IpAddress(address.into()),
            Err(_) => ServerName::try_from(target.host.name.to_string())
                .map_err(|error| error.to_string())?,
        };
        let plain = wire
            .stream
            .into_plain()
            .ok_or_else(|| "STARTTLS within TLS".to_owned())?;
        let connecting = TlsConnector::from(config).connect(name, plain);
        let connected = timeout(self.timeouts.starttls, connecting.into_fallible()).await;
        let stream = match connected.map_err(|_| "timed out".to_owned())? {
            Ok(stream) => stream,
            Err((error, plain)) => {
                self.metrics.tls_handshakes.at(TlsHandshake::Failed).inc();
                let of_tls = error.get_ref().and_then(|inner| inner.downcast_ref());
                let flaw = of_tls.map_or(Flaw::Other, Flaw::of);
                self.count_failure(target, flaw, &error.to_string());
                Wire::new(Stream::Plain(plain)).hang_up().await;
                return Err(error.to_string());
            }
        };
        let (_, connection) = stream.get_ref();
        let kind = match connection.handshake_kind() {
            Some(rustls::HandshakeKind::Resumed) => TlsHandshake::Resumed,
            _ => TlsHandshake::Full,
        };
        self.metrics.tls_handshakes.at(kind).inc();
        let objection = observer.as_deref().and_then(Observer::objection);
        match objection {
            Some(objection) => {
                self.count_failure(target, Flaw::of(objection), &objection.to_string());
            }
            None => {
                let policy = terms.policy(target.host, target.route);
                self.policies.count(target.route, policy, None);
            }
        }
        if let Some(objection) = objection {
            tracing::info!(host = %target.host.name, %objection, "an MTA-STS policy in testing would refuse this host");
        }
        let label = format!("{}, {}", protocol(connection), terms.label()).into();
        let mut wire = Wire::new(Stream::Tls(Box::new(stream)));
        wire.tap = tap.inspect(|tap| tap.note(&format!("encrypted: {label}")));
        Ok((wire, label))
    }

    /// The same at one destination, which may have an idle time of its own.
    pub(super) fn deadline_at(&self, stage: Stage, policy: &Policy) -> Duration {
        let own = policy.limits.idle.filter(|_| stage == Stage::Idle);
        own.unwrap_or_else(|| self.deadline(stage))
    }

    /// How long a stage may take.
    pub(super) fn deadline(&self, stage: Stage) -> Duration {
        let timeouts = &self.timeouts;
        match stage {
            Stage::Connect => timeouts.connect,
            Stage::Greeting => timeouts.greeting,
            Stage::Ehlo => timeouts.ehlo,
            Stage::StartTls => timeouts.starttls,
            // As patient as with any other command that looks something up.
            Stage::Auth | Stage::Mail => timeouts.mail,
            Stage::Rcpt => timeouts.rcpt,
            Stage::Data => timeouts.data,
            Stage::DataBlock => timeouts.data_block,
            Stage::FinalDot => timeouts.final_dot,
            Stage::Idle => timeouts.idle,
            Stage::Quit => super::QUIT,
        }
    }

    pub(super) fn measure(&self, stage: SmtpStage, started: Instant) {
        let took = self.clock.instant().saturating_duration_since(started);
        self.metrics
            .smtp_stage_seconds
            .at(stage)
            .observe(took.as_secs_f64());
    }

    /// Tells the queue what the peer asks of the sender with the reply that ended a connection.
    pub(super) async fn notice(&self, conn: ConnId, error: &SessionError, peer: Peer<'_>) {
        if let SessionError::Refused { reply, .. } | SessionError::Closing { reply, .. } = error
            && let Some(notice) = self.rules.load().classify(reply, peer).notice(reply)
        {
            self.tell(Event::Noticed(conn, Box::new(notice), None))
                .await;
        }
    }

    fn trouble(&self, error: &SessionError, target: &Target<'_>, peer: Peer<'_>) -> Trouble {
        let (class, blame, reply) = match error {
            SessionError::Refused { reply, .. } | SessionError::Closing { reply, .. } => {
                let reading = self.rules.load().classify(reply, peer);
                (reading.class, reading.blame, Some(reply.clone()))
            }
            SessionError::TlsNotOffered
            | SessionError::TlsFailed(_)
            | SessionError::PlaintextAfterStartTls => (Class::TlsFailure, Blame::Destination, None),
            SessionError::TlsRefused(reply) => {
                (Class::TlsFailure, Blame::Destination, Some(reply.clone()))
            }
            SessionError::Loop | SessionError::Syntax(_) | SessionError::UnexpectedReply { .. } => {
                (Class::Protocol, Blame::Destination, None)
            }
            SessionError::AuthWithoutTls | SessionError::AuthNotOffered => {
                (Class::AuthFailed, Blame::Us, None)
            }
            SessionError::AuthUnproven => (Class::AuthFailed, Blame::Destination, None),
            SessionError::AuthRefused(reply) => (Class::AuthFailed, Blame::Us, Some(reply.clone())),
            SessionError::Disconnected { .. }
            | SessionError::TimedOut { .. }
            | SessionError::Io { .. } => (Class::ConnectFailure, Blame::Destination, None),
            SessionError::Hello(_) => (Class::Other, Blame::Us, None),
        };
        let because = match is_about_tls(error) {
            true => target.terms.because(),
            false => "",
        };
        let text = format!("{}: {error}{because}", target.label());
        Trouble {
            class,
            blame,
            text,
            reply,
            host: target.label(),
            is_final: false,
        }
    }
}

/// Answers what AUTH asks for; that may take a second of CPU.
async fn answer_challenge(mut session: ClientSession) -> Result<ClientSession, SessionError> {
    let answered = blocking(move || {
        session.answer_challenge();
        session
    });
    answered.await.map_err(|_| SessionError::Io {
        stage: Stage::Auth,
        kind: std::io::ErrorKind::Other,
    })
}

/// The connection broke between our STARTTLS and the handshake.
fn is_lost_at_starttls(error: &SessionError) -> bool {
    matches!(
        error,
        SessionError::Disconnected {
            stage: Stage::StartTls
        } | SessionError::TimedOut {
            stage: Stage::StartTls
        } | SessionError::Io {
            stage: Stage::StartTls,
            ..
        }
    )
}

fn is_about_tls(error: &SessionError) -> bool {
    matches!(
        error,
        SessionError::TlsNotOffered
            | SessionError::TlsFailed(_)
            | SessionError::TlsRefused(_)
            | SessionError::PlaintextAfterStartTls
    )
}

/// Version and cipher.
fn protocol(connection: &rustls::ClientConnection) -> String {
    let version = connection
        .protocol_version()
        .and_then(|version| version.as_str())
        .unwrap_or("TLS");
    let cipher = connection
        .negotiated_cipher_suite()
        .and_then(|suite| suite.suite().as_str())
        .unwrap_or_default();
    format!("{version} {cipher}")
}

fn no_address(source: &Source, families: Families) -> Trouble {
    let kind = match families {
        Families::PreferIpv4 | Families::PreferIpv6 => "address",
        Families::Ipv4 => "IPv4 address",
        Families::Ipv6 => "IPv6 address",
    };
    Trouble {
        class: Class::ConnectFailure,
        blame: Blame::Destination,
        text: format!(
            "no host has an {kind} that source {} can reach",
            source.name
        ),
        reply: None,
        host: "".into(),
        is_final: false,
    }
}
