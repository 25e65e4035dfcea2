//! TLS towards receiving servers: what is opportunistic falls back, what is asked for does not.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use mail_auth::report::tlsrpt::{PolicyType, ResultType, TlsReport};
use model::{BatchId, Class, Status};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use service::metrics::{TlsHandshake, TlsResult};
use testkit::dns::{Behaviour, DnsServer, RecordType, Zone};
use testkit::https::{HttpsServer, Page};
use testkit::smtp_peer::{SmtpPeer, Temper};
use testkit::tls::Issuer;

use crate::station::{Ahead, Station, people};

const SHAPING: &str = r#"
    [default]
    rate = "unlimited"
    connections = 4
    messages_per_connection = 50
    retry = ["30m"]
    expire = "3h"
"#;

/// A server that has no certificate for anybody: every handshake fails.
#[derive(Debug)]
struct NoCertificate;

impl ResolvesServerCert for NoCertificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        None
    }
}

fn builder() -> rustls::ConfigBuilder<rustls::ServerConfig, rustls::WantsVerifier> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
}

fn broken() -> Temper {
    let config = builder().with_no_client_auth();
    let config = config.with_cert_resolver(Arc::new(NoCertificate));
    Temper::accepting().with_tls_config(Arc::new(config))
}

/// Receiving servers on addresses of their own and one port, a name server that validates, a
/// policy host, and a certificate authority that the station trusts.
struct World {
    dns: DnsServer,
    https: HttpsServer,
    issuer: Issuer,
    peers: Vec<SmtpPeer>,
    dir: tempfile::TempDir,
}

impl World {
    async fn new(zone: Zone, policy_hosts: &[&str]) -> Self {
        let issuer = Issuer::new("Test Root").expect("an issuer");
        let certificate = issuer.issue(policy_hosts).expect("a certificate");
        let https = HttpsServer::start(certificate.server_config().expect("a configuration"));
        let https = https.await.expect("a server");
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::write(dir.path().join("ca.pem"), issuer.pem()).expect("written");
        let zone = zone.apex("signed.example").authentic(true);
        let zone = policy_hosts
            .iter()
            .fold(zone, |zone, host| zone.a(host, Ipv4Addr::LOCALHOST));
        Self {
            dns: DnsServer::start(zone).await.expect("a server"),
            https,
            issuer,
            peers: Vec::new(),
            dir,
        }
    }

    /// A server for `host`, which is added to DNS.
    async fn peer(&mut self, host: &str, temper: Temper) {
        let last = u8::try_from(self.peers.len() + 1).expect("few");
        let address = IpAddr::from([127, 0, 7, last]);
        let port = self.peers.first().map_or(0, |peer| peer.address().port());
        let peer = SmtpPeer::bind(SocketAddr::new(address, port), temper).await;
        self.peers.push(peer.expect("a peer"));
        self.dns.change(|zone| zone.a(host, address));
    }

    /// A temper with a certificate for `name` by the authority that the station trusts.
    fn trusted(&self, name: &str) -> Temper {
        let issued = self.issuer.issue(&[name]).expect("a certificate");
        Temper::accepting().with_tls_config(issued.server_config().expect("a configuration"))
    }

    /// Publishes an MTA-STS policy.
    fn policy(&self, domain: &str, mode: &str, mx: &str) {
        let text = format!("version: STSv1\nmode: {mode}\nmx: {mx}\nmax_age: 86400\n");
        let host = format!("mta-sts.{domain}");
        self.https
            .put(&host, "/.well-known/mta-sts.txt", Page::text(text));
        self.announce(domain, "1");
    }

    fn announce(&self, domain: &str, id: &str) {
        let name = format!("_mta-sts.{domain}");
        let text = format!("v=STSv1; id={id}");
        self.dns
            .change(|zone| zone.without(&name).txt(&name, &text));
    }

    fn mx(&self, domain: &str, host: &str) {
        self.dns.change(|zone| zone.mx(domain, 10, host));
    }

    async fn station(&self, shaping: &str) -> Station {
        self.station_with(shaping, "").await
    }

    async fn station_with(&self, shaping: &str, more: &str) -> Station {
        let config = format!(
            "[dns]\nnameservers = [\"{}\"]\ndane_test = \"signed.example\"\n[smtp]\nport = {}\n\
             mta_sts_port = {}\nallow_private_mx = [\"127.0.0.0/8\"]\nca_file = {:?}\n{more}",
            self.dns.addr(),
            self.peers[0].address().port(),
            self.https.address().port(),
            self.dir.path().join("ca.pem"),
        );
        Station::with(shaping, &config).await
    }
}

/// What became of the first attempts: status, class, and the TLS of the last message of the peer.
async fn ends(station: &Station, batch: BatchId, count: u32) -> Vec<(Status, Option<Class>)> {
    station.until(batch, |c| c.queued == 0).await;
    let mut ends = Vec::new();
    for index in 0..count {
        let row = station.row(batch, index).await;
        ends.push((row.status, row.class));
    }
    ends
}

const SENT: (Status, Option<Class>) = (Status::Delivered, None);
const REFUSED: (Status, Option<Class>) = (Status::TemporaryError, Some(Class::TlsFailure));

fn to(domains: &[&str]) -> Vec<String> {
    domains.iter().map(|domain| format!("a@{domain}")).collect()
}

#[tokio::test]
async fn a_broken_handshake_falls_back_on_a_new_connection_and_is_remembered() {
    let mut world = World::new(Zone::new(), &["unused.example"]).await;
    world.peer("mx.x.example", broken()).await;
    world.mx("x.example", "mx.x.example");
    let station = world.station(SHAPING).await;
    let running = station.start().await;
    for _ in 0..2 {
        let batch = station.submit(&people("x.example", 3)).await;
        assert_eq!(station.finished(batch).await.delivered, 3);
    }
    let counts = world.peers[0].counts();
    assert_eq!((counts.tls_failed, counts.tls, counts.messages), (1, 0, 6));
    assert!(counts.connections >= 2, "{counts:?}");
    let fallen_back = station.metrics.tls.at(TlsResult::FallenBack).get();
    assert_eq!(fallen_back, counts.connections - 1);
    assert_eq!(
        station
            .metrics
            .tls_handshakes
            .at(TlsHandshake::Failed)
            .get(),
        1
    );
    running.drain().await;
}

#[tokio::test]
async fn what_the_operator_requires_is_never_given_up() {
    let mut world = World::new(Zone::new(), &["unused.example"]).await;
    let self_signed = testkit::tls::SelfSigned::new(&["mx.self.example"]).expect("a certificate");
    let wrong_name = world.trusted("other.example");
    let expired = world
        .issuer
        .issue_expired(&["mx.old.example"])
        .expect("a certificate");
    let expired = expired.server_config().expect("a configuration");
    for (name, temper) in [
        ("broken", broken()),
        ("plain", Temper::accepting()),
        ("self", Temper::accepting().with_tls(&self_signed)),
        ("name", wrong_name),
        ("old", Temper::accepting().with_tls_config(expired)),
        ("good", world.trusted("mx.good.example")),
    ] {
        world.peer(&format!("mx.{name}.example"), temper).await;
        world.mx(&format!("{name}.example"), &format!("mx.{name}.example"));
    }
    let domains =
        ["broken", "plain", "self", "name", "old", "good"].map(|n| format!("{n}.example"));
    let domains: Vec<&str> = domains.iter().map(String::as_str).collect();
    for (policy, wanted) in [
        ("require", [REFUSED, REFUSED, SENT, SENT, SENT, SENT]),
        (
            "require-verified",
            [REFUSED, REFUSED, REFUSED, REFUSED, REFUSED, SENT],
        ),
        ("opportunistic", [SENT; 6]),
        ("none", [SENT; 6]),
    ] {
        let shaping = format!("{SHAPING}tls = \"{policy}\"\n");
        let station = world.station(&shaping).await;
        let running = station.start().await;
        let batch = station.submit(&to(&domains)).await;
        assert_eq!(ends(&station, batch, 6).await, wanted, "{policy}");
        let refused = wanted.iter().filter(|end| **end == REFUSED).count();
        let counted = station.metrics.tls.at(TlsResult::Refused).get();
        assert_eq!(counted, refused as u64, "{policy}");
        running.drain().await;
    }
}

#[tokio::test]
async fn mta_sts_is_the_domains_own_whoever_shares_its_hosts() {
    let hosts = ["keeps", "breaks", "tests", "none", "elsewhere", "gone"]
        .map(|name| format!("mta-sts.{name}.example"));
    let hosts: Vec<&str> = hosts.iter().map(String::as_str).collect();
    let mut world = World::new(Zone::new(), &hosts).await;
    // One host with a good certificate, one with TLS of its own making, which all may use that
    // have no policy or none in force.
    world
        .peer("mx.good.example", world.trusted("mx.good.example"))
        .await;
    let own = testkit::tls::SelfSigned::new(&["mx.own.example"]).expect("a certificate");
    world
        .peer("mx.own.example", Temper::accepting().with_tls(&own))
        .await;
    for (domain, mx) in [
        ("keeps.example", "mx.good.example"),
        ("breaks.example", "mx.own.example"),
        ("tests.example", "mx.own.example"),
        ("none.example", "mx.own.example"),
        ("free.example", "mx.own.example"),
        ("elsewhere.example", "mx.good.example"),
        ("gone.example", "mx.own.example"),
    ] {
        world.mx(domain, mx);
    }
    world.policy("keeps.example", "enforce", "*.good.example");
    world.policy("breaks.example", "enforce", "mx.own.example");
    world.policy("tests.example", "testing", "mx.own.example");
    world.policy("none.example", "none", "mx.own.example");
    world.policy("elsewhere.example", "enforce", "mx.elsewhere.example");
    // Announced, and the policy host has none: as if there were no policy.
    world.announce("gone.example", "1");
    let station = world.station(SHAPING).await;
    let running = station.start().await;
    let domains = [
        "keeps.example",
        "breaks.example",
        "tests.example",
        "none.example",
        "free.example",
        "elsewhere.example",
        "gone.example",
    ];
    let batch = station.submit(&to(&domains)).await;
    let wanted = [SENT, REFUSED, SENT, SENT, SENT, REFUSED, SENT];
    assert_eq!(ends(&station, batch, 7).await, wanted);
    let reply = station.row(batch, 1).await.reply.unwrap_or_default();
    assert!(reply.contains("MTA-STS"), "{reply}");
    let reply = station.row(batch, 5).await.reply.unwrap_or_default();
    assert_eq!(
        reply,
        "the domain's MTA-STS policy does not name mx.good.example"
    );
    let own: Vec<_> = world.peers[1].messages();
    assert!(own.iter().all(|message| message.tls), "opportunistic TLS");
    assert_eq!(own.len(), 4);
    let asked = world.https.asked();
    assert_eq!(asked.len(), 6, "once each: {asked:?}");
    running.drain().await;

    // The policy host is gone and the announcement with it: what was fetched holds, also for a
    // process that starts anew.
    world.dns.change(|zone| {
        zone.without("_mta-sts.breaks.example")
            .without("mta-sts.breaks.example")
    });
    let running = station.start().await;
    let batch = station
        .submit(&to(&["breaks.example", "free.example"]))
        .await;
    assert_eq!(ends(&station, batch, 2).await, [REFUSED, SENT]);
    running.drain().await;
}

#[tokio::test]
async fn a_policy_host_is_held_to_the_rules() {
    let names = ["redirect", "type", "big", "late", "wrong", "name"];
    let hosts = names.map(|name| format!("mta-sts.{name}.example"));
    let certified: Vec<&str> = hosts
        .iter()
        .map(String::as_str)
        .filter(|h| !h.contains(".name."))
        .collect();
    let mut world = World::new(Zone::new(), &certified).await;
    world
        .dns
        .change(|zone| zone.a("mta-sts.name.example", Ipv4Addr::LOCALHOST));
    world.peer("mx.own.example", Temper::accepting()).await;
    let good = "version: STSv1\nmode: enforce\nmx: mx.other.example\nmax_age: 86400\n";
    let long = format!("{good}{}", "x: y\n".repeat(20_000));
    for (name, page) in [
        (
            "redirect",
            Page::text(good)
                .status(301)
                .header("Location", "https://mta-sts.type.example/"),
        ),
        ("type", Page::text(good).header("Content-Type", "text/html")),
        ("big", Page::text(long)),
        ("late", Page::text("")),
        ("wrong", Page::text("version: STSv2\n")),
        // The certificate does not have this name.
        ("name", Page::text(good)),
    ] {
        world.mx(&format!("{name}.example"), "mx.own.example");
        world.announce(&format!("{name}.example"), "1");
        let host = format!("mta-sts.{name}.example");
        world.https.put(&host, "/.well-known/mta-sts.txt", page);
    }
    let station = world.station(SHAPING).await;
    let running = station.start().await;
    let domains = names.map(|name| format!("{name}.example"));
    let domains: Vec<&str> = domains.iter().map(String::as_str).collect();
    let batch = station.submit(&to(&domains)).await;
    // None of these is a policy, and without one mail goes as it always did.
    assert_eq!(ends(&station, batch, 6).await, [SENT; 6]);
    running.drain().await;
}

#[tokio::test]
async fn dane_holds_where_dnssec_does() {
    let mut world = World::new(Zone::new(), &["mta-sts.match.example"]).await;
    let own = testkit::tls::SelfSigned::new(&["whatever.example"]).expect("a certificate");
    let tls = || Temper::accepting().with_tls(&own);
    for (name, temper) in [
        ("match", tls()),
        ("differ", tls()),
        ("odd", tls()),
        ("oddplain", Temper::accepting()),
        ("plain", Temper::accepting()),
        ("bogus", tls()),
        ("unsigned", tls()),
        ("without", Temper::accepting()),
        ("half", tls()),
    ] {
        world.peer(&format!("mx.{name}.example"), temper).await;
        world.mx(&format!("{name}.example"), &format!("mx.{name}.example"));
    }
    let port = world.peers[0].address().port();
    let at = |name: &str| format!("_{port}._tcp.mx.{name}.example");
    let certificate = own.certificate().as_ref();
    world.dns.change(|zone| {
        zone.tlsa(&at("match"), (3, 0, 0), certificate)
            .tlsa(&at("differ"), (3, 1, 1), &[7; 32])
            .tlsa(&at("odd"), (1, 0, 0), certificate)
            .tlsa(&at("oddplain"), (1, 0, 0), certificate)
            .tlsa(&at("plain"), (3, 0, 0), certificate)
            .behave_for(&at("bogus"), RecordType::TLSA, Behaviour::ServFail)
            .tlsa(&at("unsigned"), (3, 1, 1), &[7; 32])
            .insecure("unsigned.example")
            // The MX records are validated, the host's zone is not signed.
            .tlsa(&at("half"), (3, 1, 1), &[7; 32])
            .insecure("mx.half.example")
    });
    // DANE goes before MTA-STS: this certificate has another name and no authority.
    world.policy("match.example", "enforce", "mx.match.example");
    let station = world.station(SHAPING).await;
    let running = station.start().await;
    let names = [
        "match", "differ", "odd", "oddplain", "plain", "bogus", "unsigned", "without", "half",
    ];
    let domains = names.map(|name| format!("{name}.example"));
    let domains: Vec<&str> = domains.iter().map(String::as_str).collect();
    let batch = station.submit(&to(&domains)).await;
    let wanted = [
        SENT, REFUSED, SENT, REFUSED, REFUSED, REFUSED, SENT, SENT, SENT,
    ];
    assert_eq!(ends(&station, batch, 9).await, wanted);
    assert_eq!(station.metrics.dane_available.get(), 1);
    assert_eq!(station.metrics.tls.at(TlsResult::Dane).get(), 1);
    let story = station.tls_of(batch, 0).await;
    assert!(story.ends_with(", DANE"), "{story}");
    running.drain().await;

    // The same by a name server that does not validate: nobody asks for TLSA records at all.
    world.dns.change(|zone| zone.authentic(false));
    let before = world.dns.queries_of(&at("differ"), RecordType::TLSA);
    let station = world.station(SHAPING).await;
    let running = station.start().await;
    let batch = station
        .submit(&to(&["differ.example", "bogus.example"]))
        .await;
    assert_eq!(ends(&station, batch, 2).await, [SENT, SENT]);
    assert_eq!(station.metrics.dane_available.get(), 0);
    assert_eq!(
        world.dns.queries_of(&at("differ"), RecordType::TLSA),
        before
    );
    running.drain().await;
}

#[tokio::test]
async fn a_domain_without_policy_may_ride_along_and_one_with_a_policy_may_not() {
    let mut world = World::new(Zone::new(), &["mta-sts.strict.example"]).await;
    let own = testkit::tls::SelfSigned::new(&["mx.own.example"]).expect("a certificate");
    world
        .peer("mx.own.example", Temper::accepting().with_tls(&own))
        .await;
    world.mx("strict.example", "mx.own.example");
    world.mx("free.example", "mx.own.example");
    world.policy("strict.example", "enforce", "mx.own.example");
    // One connection at a time, and a lot of mail that asks for nothing before and after.
    let shaping = SHAPING.replace("connections = 4", "connections = 1");
    let station = world.station(&shaping).await;
    let running = station.start().await;
    let mut everybody = people("free.example", 30);
    everybody.extend(people("strict.example", 3));
    everybody.extend((30..60).map(|n| format!("u{n}@free.example")));
    let batch = station.submit(&everybody).await;
    // One of the three is tried; the others wait for what is known then.
    let counters = station
        .until(batch, |c| c.delivered == 60 && c.temporary_error > 0)
        .await;
    assert_eq!(counters.queued + counters.temporary_error, 3);
    let recipients = world.peers[0]
        .messages()
        .into_iter()
        .flat_map(|m| m.recipients);
    assert!(
        recipients
            .into_iter()
            .all(|to| to.ends_with("@free.example"))
    );
    running.drain().await;
}

#[tokio::test]
async fn sessions_are_resumed_in_both_versions_of_tls() {
    for version in [&rustls::version::TLS13, &rustls::version::TLS12] {
        let mut world = World::new(Zone::new(), &["unused.example"]).await;
        let issued = world
            .issuer
            .issue(&["mx.x.example"])
            .expect("a certificate");
        let config = issued
            .server_config_with(&[version])
            .expect("a configuration");
        world
            .peer("mx.x.example", Temper::accepting().with_tls_config(config))
            .await;
        world.mx("x.example", "mx.x.example");
        let shaping = SHAPING
            .replace(
                "messages_per_connection = 50",
                "messages_per_connection = 1",
            )
            .replace("connections = 4", "connections = 1");
        let station = world.station(&shaping).await;
        let running = station.start().await;
        let batch = station.submit(&people("x.example", 5)).await;
        assert_eq!(station.finished(batch).await.delivered, 5);
        let handshakes = |kind| station.metrics.tls_handshakes.at(kind).get();
        assert_eq!(
            (
                handshakes(TlsHandshake::Full),
                handshakes(TlsHandshake::Resumed)
            ),
            (1, 4),
            "{version:?}"
        );
        running.drain().await;
    }
}

#[tokio::test]
async fn the_next_day_brings_a_report_to_those_who_want_one() {
    let hosts = ["mta-sts.wants.example", "collector.example"];
    let mut world = World::new(Zone::new(), &hosts).await;
    let own = testkit::tls::SelfSigned::new(&["mx.wants.example"]).expect("a certificate");
    world
        .peer("mx.wants.example", Temper::accepting().with_tls(&own))
        .await;
    world.peer("mx.others.example", Temper::accepting()).await;
    for (domain, host) in [
        ("wants.example", "mx.wants.example"),
        ("silent.example", "mx.wants.example"),
        ("plain.example", "mx.others.example"),
        ("reports.example", "mx.others.example"),
    ] {
        world.mx(domain, host);
    }
    world.policy("wants.example", "testing", "mx.wants.example");
    let port = world.https.address().port();
    let wanted =
        format!("v=TLSRPTv1;rua=mailto:tls@reports.example,https://collector.example:{port}/v1");
    world.dns.change(|zone| {
        zone.txt("_smtp._tls.wants.example", &wanted).txt(
            "_smtp._tls.plain.example",
            "v=TLSRPTv1; rua=mailto:tls@reports.example",
        )
    });
    world
        .https
        .put("collector.example", "/v1", Page::text("thanks"));
    let more = "[tls_reports]\nfrom = \"tls-reports@brand.example\"\norganization = \"Brand\"\n";
    let mut station = world.station_with(SHAPING, more).await;
    let running = station.start().await;
    let batch = station
        .submit(&to(&["wants.example", "silent.example", "plain.example"]))
        .await;
    assert_eq!(ends(&station, batch, 3).await, [SENT; 3]);
    running.drain().await;

    // More than a day later everybody has noted what was counted, and the time to report has come.
    for _ in 0..2 {
        station.clock = Arc::new(Ahead(Duration::from_secs(50 * 3_600)));
        let running = station.start().await;
        let counts = world.peers[1].wait_for(3).await.expect("reports");
        assert_eq!(
            counts.messages, 3,
            "the mail itself, and one report on each of two"
        );
        running.drain().await;
    }
    let reports: Vec<_> = world.peers[1].messages().into_iter().skip(1).collect();
    let read = |bytes: &[u8]| TlsReport::parse_rfc5322(bytes, 1 << 20).expect("a report");
    let mut by_domain = std::collections::BTreeMap::new();
    for message in &reports {
        assert_eq!(message.recipients, ["tls@reports.example"]);
        let text = String::from_utf8_lossy(&message.content).into_owned();
        for wanted in [
            "DKIM-Signature:",
            "multipart/report; report-type=tlsrpt",
            "TLS-Report-Submitter: brand.example",
        ] {
            assert!(text.contains(wanted), "{wanted} is not in {text}");
        }
        let report = read(&message.content);
        let [policy] = <[_; 1]>::try_from(report.policies).expect("one policy");
        by_domain.insert(policy.policy.policy_domain.clone(), policy);
    }
    let policy = &by_domain["wants.example"];
    assert_eq!(policy.policy.policy_type, PolicyType::Sts);
    assert_eq!(
        (policy.summary.total_success, policy.summary.total_failure),
        (0, 1)
    );
    let failure = &policy.failure_details[0];
    assert_eq!(failure.result_type, ResultType::CertificateNotTrusted);
    assert_eq!(
        failure.receiving_mx_hostname.as_deref(),
        Some("mx.wants.example")
    );
    let policy = &by_domain["plain.example"];
    assert_eq!(policy.policy.policy_type, PolicyType::NoPolicyFound);
    assert_eq!(
        policy.failure_details[0].result_type,
        ResultType::StartTlsNotSupported
    );
    let posted: Vec<_> = world
        .https
        .asked()
        .into_iter()
        .filter(|asked| asked.method == "POST")
        .collect();
    assert_eq!(posted.len(), 1, "{posted:?}");
    assert_eq!(posted[0].media_type, "application/tlsrpt+gzip");
    assert_eq!(posted[0].body.get(..2), Some(&[0x1f, 0x8b][..]));
}
