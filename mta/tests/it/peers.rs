//! What receiving servers do to a client, and what the client makes of it: one habit a test.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use model::{Blame, Class, Status};
use smtp::ServerEvent;
use testkit::dns::{DnsServer, Zone};
use testkit::proxy::Proxy;
use testkit::smtp_peer::{Answer, SmtpPeer, Temper};
use testkit::tls::SelfSigned;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};

use crate::station::{Station, people};

const ANY: (Ipv4Addr, u16) = (Ipv4Addr::LOCALHOST, 0);

async fn peer(temper: Temper) -> SmtpPeer {
    SmtpPeer::start(temper).await.expect("a peer")
}

/// Everybody's mail goes out and ends: the rows of the first `rows` recipients.
async fn sent(station: &Station, to: &[String]) -> Vec<store::RecipientRow> {
    let batch = station.submit(to).await;
    ended(station, batch, to).await
}

/// As [`sent`], of a batch that is there.
async fn ended(
    station: &Station,
    batch: model::BatchId,
    to: &[String],
) -> Vec<store::RecipientRow> {
    let running = station.start().await;
    station.finished(batch).await;
    running.drain().await;
    let mut rows = Vec::new();
    for index in 0..u32::try_from(to.len()).expect("few") {
        rows.push(station.row(batch, index).await);
    }
    rows
}

fn reply(row: &store::RecipientRow) -> &str {
    row.reply.as_deref().unwrap_or_default()
}

#[tokio::test]
async fn a_smarthost_learns_who_we_are() {
    let certificate = SelfSigned::new(&["relay.example"]).expect("a certificate");
    let secrets = tempfile::tempdir().expect("a directory");
    let file = secrets.path().join("password");
    let wanting = |password: &str, tls: bool| {
        let mut temper = Temper::accepting();
        temper.server.login = Some(("brand".to_owned(), password.to_owned()));
        if tls {
            temper.with_tls(&certificate)
        } else {
            temper
        }
    };
    std::fs::write(&file, "correct horse\n").expect("written");
    let config = |peer: &SmtpPeer, tls: &str| {
        let port = peer.address().port();
        format!(
            "[[smtp.smarthosts]]\nhost = \"127.0.0.1\"\nport = {port}\nusername = \"brand\"\n\
             password_file = {file:?}\ntls = \"{tls}\"\n"
        )
    };
    for (tls, policy) in [(true, "require"), (false, "none")] {
        let peer = peer(wanting("correct horse", tls)).await;
        let station = Station::towards(&peer, &config(&peer, policy), "").await;
        let rows = sent(&station, &people("x.example", 20)).await;
        assert!(rows.iter().all(|row| row.status == Status::Delivered));
        assert!(peer.messages().iter().all(|message| message.tls == tls));
    }
    // Without TLS, with a certificate that nobody vouches for, with another password: not a word.
    for (temper, policy, told, class) in [
        (
            wanting("correct horse", false),
            "require",
            "STARTTLS",
            Class::TlsFailure,
        ),
        (
            wanting("correct horse", true),
            "require-verified",
            "TLS",
            Class::TlsFailure,
        ),
        (
            wanting("another", true),
            "require",
            "535 5.7.8",
            Class::AuthFailed,
        ),
    ] {
        let peer = peer(temper).await;
        let station = Station::towards(&peer, &config(&peer, policy), "expire = \"1h\"").await;
        let batch = station.submit(&people("x.example", 1)).await;
        let running = station.start().await;
        station
            .until(batch, |counters| counters.temporary_error == 1)
            .await;
        let row = station.row(batch, 0).await;
        assert!(reply(&row).contains(told), "{row:?}");
        assert_eq!(row.class, Some(class), "{row:?}");
        if class == Class::AuthFailed {
            assert_eq!(row.blame, Some(Blame::Us));
        }
        running.drain().await;
        assert_eq!(peer.counts().mails, 0);
    }
}

const TWO: &str = "[[smtp.sources]]\nname = \"gone\"\nehlo = \"gone.example\"\nbind = \"192.0.2.77\"\n\
    [[smtp.sources]]\nname = \"here\"\nehlo = \"here.example\"\nbind = [\"127.0.0.3\", \"::1\"]\n";

/// Encrypts what goes to `peer` from its first byte on, as port 465 does.
async fn encrypting(peer: &SmtpPeer, certificate: &SelfSigned) -> SocketAddr {
    let acceptor = tokio_rustls::TlsAcceptor::from(certificate.server_config());
    let listener = TcpListener::bind(ANY).await.expect("a port");
    let (at, to) = (listener.local_addr().expect("an address"), peer.address());
    tokio::task::spawn_local(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::task::spawn_local(async move {
                let Ok(mut stream) = acceptor.accept(stream).await else {
                    return;
                };
                let mut inner = TcpStream::connect(to).await.expect("the peer");
                drop(tokio::io::copy_bidirectional(&mut stream, &mut inner).await);
            });
        }
    });
    at
}

#[tokio::test]
async fn a_smarthost_may_be_encrypted_from_the_first_byte() {
    let certificate = SelfSigned::new(&["127.0.0.1"]).expect("a certificate");
    let secrets = tempfile::tempdir().expect("a directory");
    let file = secrets.path().join("password");
    std::fs::write(&file, "correct horse\n").expect("written");
    let mut temper = Temper::accepting();
    temper.server.login = Some(("brand".to_owned(), "correct horse".to_owned()));
    let peer = peer(temper).await;
    let tasks = tokio::task::LocalSet::new();
    tasks
        .run_until(async {
            let at = encrypting(&peer, &certificate).await;
            let shaping = format!(
                "[default]\nrate = \"unlimited\"\nretry = [\"200ms\"]\nexpire = \"1s\"\n[mx]\n\"*\" = \"{at}\"\n"
            );
            let config = |port: u16, more: &str| {
                format!(
                    "[[smtp.smarthosts]]\nhost = \"127.0.0.1\"\nport = {port}\nusername = \"brand\"\n\
                     password_file = {file:?}\nimplicit_tls = true\n{more}"
                )
            };
            let any = config(at.port(), "tls = \"require\"\n");
            let station = Station::with(&shaping, &any).await;
            let rows = sent(&station, &people("x.example", 20)).await;
            assert!(rows.iter().all(|row| row.status == Status::Delivered));
            // A certificate that nobody vouches for, and a server that speaks first: not a word.
            let station = Station::with(&shaping, &config(at.port(), "")).await;
            let rows = sent(&station, &people("x.example", 1)).await;
            assert!(reply(&rows[0]).contains("TLS handshake failed"), "{rows:?}");
            let plain = config(peer.address().port(), "tls = \"require\"\n");
            let station = Station::towards(&peer, &plain, "expire = \"1s\"").await;
            let rows = sent(&station, &people("x.example", 1)).await;
            assert!(reply(&rows[0]).contains("TLS handshake failed"), "{rows:?}");
            assert_eq!(peer.counts().mails, 20);
        })
        .await;
}

#[tokio::test]
async fn a_server_that_knows_no_ehlo_gets_what_it_knows() {
    let old = Answer::reply(502, "5.5.1 what?");
    let peer = peer(Temper::accepting().answering_times(ServerEvent::Hello, 1, old)).await;
    let station = Station::towards(&peer, "", "connections = 1").await;
    let to = people("x.example", 5);
    let batch = station.submit_raw(&to, &eight_bit("mixed")).await;
    for row in ended(&station, batch, &to).await {
        assert_eq!(
            (row.status, row.attempts),
            (Status::Delivered, 1),
            "{row:?}"
        );
    }
    let counts = peer.counts();
    assert_eq!((counts.messages, counts.connections), (5, 1));
    assert_eq!(counts.sent_ahead, 0, "nothing was sent without waiting");
    assert!(
        peer.messages()
            .iter()
            .all(|message| message.content.is_ascii())
    );
}

#[tokio::test]
async fn a_source_whose_address_is_gone_is_left_out_and_nobody_pays_for_it() {
    let peer = peer(Temper::accepting()).await;
    let station = Station::towards(&peer, TWO, "").await;
    for row in sent(&station, &people("x.example", 60)).await {
        assert_eq!(
            (row.status, row.attempts),
            (Status::Delivered, 1),
            "{row:?}"
        );
    }
    for message in peer.messages() {
        assert_eq!(message.from.ip(), Ipv4Addr::new(127, 0, 0, 3));
        assert_eq!(message.client, "here.example");
    }
}

#[tokio::test]
async fn a_source_is_not_used_for_a_family_that_it_lacks() {
    let peer = peer(Temper::accepting()).await;
    let config = "[[smtp.sources]]\nname = \"six\"\nbind = \"::1\"\n[[smtp.sources]]\nname = \"four\"\nbind = \"127.0.0.4\"\n";
    let station = Station::towards(&peer, config, "").await;
    for row in sent(&station, &people("x.example", 30)).await {
        assert_eq!(
            (row.status, row.attempts),
            (Status::Delivered, 1),
            "{row:?}"
        );
    }
    let four = Ipv4Addr::new(127, 0, 0, 4);
    assert!(
        peer.messages()
            .iter()
            .all(|message| message.from.ip() == four)
    );
    // Alone it has to say so.
    let alone = "[[smtp.sources]]\nname = \"six\"\nbind = \"::1\"\n";
    let station = Station::towards(&peer, alone, "expire = \"1s\"").await;
    let rows = sent(&station, &people("x.example", 1)).await;
    assert_eq!(rows[0].status, Status::Failed);
    assert!(
        reply(&rows[0]).contains("source six can reach"),
        "{:?}",
        rows[0]
    );
}

#[tokio::test]
async fn a_destination_has_its_own_families() {
    let four = peer(Temper::accepting()).await;
    let port = four.address().port();
    let at = SocketAddr::from((std::net::Ipv6Addr::LOCALHOST, port));
    let six = SmtpPeer::bind(at, Temper::accepting())
        .await
        .expect("a peer");
    let mut zone = Zone::new();
    for domain in ["four", "six", "any"] {
        let host = format!("mx.{domain}.example");
        zone = zone
            .mx(&format!("{domain}.example"), 10, &host)
            .a(&host, Ipv4Addr::LOCALHOST)
            .a(&host, std::net::Ipv6Addr::LOCALHOST);
    }
    let zone = zone
        .mx("none.example", 10, "mx.none.example")
        .a("mx.none.example", Ipv4Addr::LOCALHOST);
    let dns = DnsServer::start(zone).await.expect("a DNS server");
    let shaping = "[default]\nrate = \"unlimited\"\nretry = [\"200ms\"]\nexpire = \"1s\"\n\
         [[provider]]\nname = \"six\"\nmx_suffix = [\".six.example\"]\nfamilies = \"prefer_ipv6\"\n\
         [domain.\"four.example\"]\nfamilies = \"ipv4\"\n[domain.\"none.example\"]\nfamilies = \"ipv6\"\n";
    let config = format!(
        "[dns]\nnameservers = [\"{}\"]\n[smtp]\nport = {port}\nallow_private_mx = [\"127.0.0.0/8\", \"::1/128\"]\n",
        dns.addr()
    );
    let station = Station::with(shaping, &config).await;
    let to = ["four", "six", "any", "none"].map(|domain| format!("a@{domain}.example"));
    let rows = sent(&station, &to).await;
    let came = |peer: &SmtpPeer| -> Vec<String> {
        let mut to: Vec<_> = peer
            .messages()
            .into_iter()
            .flat_map(|message| message.recipients)
            .collect();
        to.sort_unstable();
        to
    };
    assert_eq!(came(&four), ["a@any.example", "a@four.example"]);
    assert_eq!(came(&six), ["a@six.example"]);
    assert_eq!(rows[3].status, Status::Failed);
    assert!(reply(&rows[3]).contains("IPv6 address"), "{:?}", rows[3]);
}

#[tokio::test]
async fn a_dead_proxy_holds_the_mail_of_its_source_until_it_is_back() {
    let peer = peer(Temper::accepting()).await;
    let dying = TcpListener::bind(ANY).await.expect("a port");
    let address = dying.local_addr().expect("an address");
    let config = format!("[[smtp.sources]]\nname = \"p\"\nproxy = \"socks5://{address}\"\n");
    let station = Station::towards(&peer, &config, "expire = \"1h\"").await;
    let batch = station.submit(&people("x.example", 25)).await;
    let running = station.start().await;
    drop(dying.accept().await.expect("a client"));
    drop(dying);
    let proxy = Proxy::socks5(address, None).await.expect("a proxy");
    station.finished(batch).await;
    running.drain().await;
    for index in 0..25 {
        let row = station.row(batch, index).await;
        assert_eq!(
            (row.status, row.attempts),
            (Status::Delivered, 1),
            "{row:?}"
        );
    }
    assert!(proxy.asked().iter().all(|asked| asked.to == peer.address()));
}

#[tokio::test]
async fn proxies_connect_for_their_sources() {
    let at = SocketAddr::from(ANY);
    let secrets = tempfile::tempdir().expect("a directory");
    let file = secrets.path().join("password");
    std::fs::write(&file, "pw").expect("written");
    let socks = Proxy::socks5(at, Some(("u", "pw"))).await.expect("a proxy");
    let haproxy = Proxy::haproxy(at).await.expect("a proxy");
    let config = format!(
        "[[smtp.sources]]\nname = \"s\"\nproxy = \"socks5://{}\"\nproxy_username = \"u\"\nproxy_password_file = {file:?}\n\
         [[smtp.sources]]\nname = \"h\"\nproxy = \"haproxy://{}\"\nbind = \"127.0.0.5\"\n",
        socks.address(),
        haproxy.address()
    );
    let certificate = SelfSigned::new(&["mx.example"]).expect("a certificate");
    let peer = peer(Temper::accepting().with_tls(&certificate)).await;
    let station = Station::towards(&peer, &config, "messages_per_connection = 5").await;
    for row in sent(&station, &people("x.example", 60)).await {
        assert_eq!(
            (row.status, row.attempts),
            (Status::Delivered, 1),
            "{row:?}"
        );
    }
    for proxy in [&socks, &haproxy] {
        let asked = proxy.asked();
        assert!(asked.len() > 1, "both carry their share: {asked:?}");
        assert!(asked.iter().all(|asked| asked.to == peer.address()));
    }
    let from = Some(Ipv4Addr::new(127, 0, 0, 5).into());
    assert!(haproxy.asked().iter().all(|asked| asked.from == from));
}

#[tokio::test]
async fn a_host_behind_a_proxy_that_refuses_is_the_hosts_failure() {
    let proxy = Proxy::socks5(ANY.into(), None).await.expect("a proxy");
    let config = format!(
        "[[smtp.sources]]\nname = \"s\"\nproxy = \"socks5://{}\"\n",
        proxy.address()
    );
    let shaping = "[default]\nrate = \"unlimited\"\nretry = [\"100ms\"]\nexpire = \"1s\"\n[mx]\n\"*\" = \"127.0.0.1:1\"\n";
    let station = Station::with(shaping, &config).await;
    let rows = sent(&station, &people("x.example", 1)).await;
    assert_eq!(
        (rows[0].status, rows[0].class),
        (Status::Failed, Some(Class::Expired))
    );
    assert!(
        reply(&rows[0]).contains("connection refused at connect"),
        "{:?}",
        rows[0]
    );
}

#[tokio::test]
async fn a_server_that_says_how_many_it_takes_gets_no_more_on_a_connection() {
    let mut temper = Temper::accepting();
    temper.server.mails_max = Some(3);
    let peer = peer(temper).await;
    // An idle time that a test would not survive.
    let config = "[smtp.timeouts]\nidle = \"10m\"\n";
    let station = Station::towards(&peer, config, "connections = 2\nexpire = \"1h\"").await;
    for row in sent(&station, &people("x.example", 30)).await {
        assert_eq!(
            (row.status, row.attempts),
            (Status::Delivered, 1),
            "{row:?}"
        );
    }
    let counts = peer.counts();
    assert_eq!(counts.mails, 30, "none in vain: {counts:?}");
    assert!(counts.connections >= 10, "{counts:?}");
}

/// The most MAIL commands that the peer read in any second.
fn most_in_a_second(peer: &SmtpPeer) -> usize {
    let mut at: Vec<_> = peer.messages().iter().map(|m| m.mail_at).collect();
    at.sort();
    let within = |first: usize| {
        let end = at[first] + Duration::from_secs(1);
        at[first..]
            .iter()
            .take_while(|moment| **moment < end)
            .count()
    };
    (0..at.len()).map(within).max().unwrap_or_default()
}

#[tokio::test]
async fn a_rate_holds_behind_slow_replies() {
    let slow = Temper::accepting().slow_messages(Duration::from_millis(700));
    for temper in [slow.clone().without_chunking(), slow] {
        let peer = peer(temper).await;
        let limits = "rate = \"8/s\"\nconnections = 8\nexpire = \"1h\"";
        let station = Station::towards(&peer, "", limits).await;
        let rows = sent(&station, &people("x.example", 32)).await;
        assert!(rows.iter().all(|row| row.status == Status::Delivered));
        let most = most_in_a_second(&peer);
        assert!(most <= 8, "{most} MAIL commands within a second");
        // And the rate is used.
        assert!(most >= 6, "only {most} MAIL commands within a second");
    }
}

/// Peers on the same port of 127.0.0.1 and 127.0.0.2: the hosts of `x.example`, the first preferred.
async fn two_hosts(first: Temper, second: Temper) -> (SmtpPeer, SmtpPeer, DnsServer, Station) {
    let first = peer(first).await;
    let port = first.address().port();
    let at = SocketAddr::from((Ipv4Addr::new(127, 0, 0, 2), port));
    let second = SmtpPeer::bind(at, second).await.expect("a peer");
    let zone = Zone::new()
        .mx("x.example", 10, "one.x.example")
        .mx("x.example", 20, "two.x.example")
        .a("one.x.example", Ipv4Addr::LOCALHOST)
        .a("two.x.example", Ipv4Addr::new(127, 0, 0, 2));
    let dns = DnsServer::start(zone).await.expect("a DNS server");
    let shaping = "[default]\nrate = \"unlimited\"\nretry = [\"200ms\"]\nexpire = \"2s\"\n";
    let config = format!(
        "[dns]\nnameservers = [\"{}\"]\n[smtp]\nehlo = \"mta.brand.example\"\nport = {port}\nallow_private_mx = [\"127.0.0.0/8\"]\n",
        dns.addr()
    );
    let station = Station::with(shaping, &config).await;
    (first, second, dns, station)
}

#[tokio::test]
async fn what_one_host_cannot_take_goes_to_another() {
    let small = Temper::accepting().without_eight_bit();
    let (first, second, _dns, station) = two_hosts(small, Temper::accepting()).await;
    let mut to = people("x.example", 6);
    to.insert(3, "飛脚@x.example".to_owned());
    for row in sent(&station, &to).await {
        assert_eq!(
            (row.status, row.attempts),
            (Status::Delivered, 1),
            "{row:?}"
        );
    }
    assert_eq!(first.counts().messages, 6);
    let elsewhere = second.messages();
    assert_eq!(elsewhere.len(), 1);
    assert_eq!(elsewhere[0].recipients, ["飛脚@x.example"]);

    let mut small = Temper::accepting();
    small.server.message_max = 300;
    let (first, second, _dns, station) = two_hosts(small.clone(), Temper::accepting()).await;
    let rows = sent(&station, &people("x.example", 2)).await;
    assert!(rows.iter().all(|row| row.status == Status::Delivered));
    assert_eq!((first.counts().mails, second.counts().messages), (0, 2));

    // Nobody takes it: said before a byte of it is sent.
    let (first, second, _dns, station) = two_hosts(small.clone(), small).await;
    let rows = sent(&station, &people("x.example", 1)).await;
    assert_eq!(
        (rows[0].status, rows[0].class),
        (Status::Failed, Some(Class::TooLarge))
    );
    assert!(
        reply(&rows[0]).contains("the server takes 300"),
        "{:?}",
        rows[0]
    );
    assert_eq!((first.counts().mails, second.counts().mails), (0, 0));
}

#[tokio::test]
async fn addresses_beyond_ascii() {
    let peer = peer(Temper::accepting().without_eight_bit()).await;
    let station = Station::new(&peer).await;
    let to = ["a@bücher.example", "飛脚@x.example"].map(str::to_owned);
    let rows = sent(&station, &to).await;
    assert_eq!(rows[0].status, Status::Delivered, "{rows:?}");
    let messages = peer.messages();
    assert_eq!(messages.len(), 1);
    assert_eq!(messages[0].recipients, ["a@xn--bcher-kva.example"]);
    assert!(
        messages[0].content.is_ascii(),
        "a server without 8BITMIME gets seven bits"
    );
    // A local part is nobody's to change.
    assert_eq!(
        (rows[1].status, rows[1].class),
        (Status::Failed, Some(Class::Protocol))
    );
    assert!(reply(&rows[1]).contains("SMTPUTF8"), "{:?}", rows[1]);
    assert_eq!(peer.counts().mails, 1);
}

/// A complete message with bytes above 127 in one of its parts.
fn eight_bit(subtype: &str) -> Vec<u8> {
    format!(
        "From: News <news@brand.example>\r\nMIME-Version: 1.0\r\nMessage-ID: <own@brand.example>\r\n\
         Date: Mon, 1 Dec 2025 09:00:00 +0000\r\nContent-Type: multipart/{subtype}; boundary=b\r\n\r\n\
         --b\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: 8bit\r\n\r\nGrüße\r\n--b--\r\n"
    )
    .into_bytes()
}

#[tokio::test]
async fn a_server_of_seven_bits_gets_eight_encoded() {
    let seven = || Temper::accepting().without_eight_bit();
    let to = people("x.example", 3);
    let whole = eight_bit("mixed");
    // Chunked and not, in one transaction and in those behind it.
    for temper in [seven(), seven().without_chunking()] {
        let peer = peer(temper).await;
        let station = Station::new(&peer).await;
        let batch = station.submit_raw(&to, &whole).await;
        for row in ended(&station, batch, &to).await {
            assert_eq!(
                (row.status, row.attempts),
                (Status::Delivered, 1),
                "{row:?}"
            );
        }
        for message in peer.messages() {
            let text = String::from_utf8_lossy(&message.content);
            assert!(text.is_ascii() && text.starts_with("DKIM-Signature: "));
            let part = "quoted-printable\r\n\r\nGr=C3=BC=C3=9Fe\r\n--b--\r\n";
            assert!(text.ends_with(part), "{text}");
        }
    }

    // Where a signature would break, another host may do; it gets every byte as it was.
    let to = people("x.example", 1);
    let whole = eight_bit("signed");
    let (first, second, _dns, station) = two_hosts(seven(), Temper::accepting()).await;
    let batch = station.submit_raw(&to, &whole).await;
    let rows = ended(&station, batch, &to).await;
    assert_eq!(rows[0].status, Status::Delivered, "{rows:?}");
    assert_eq!(first.counts().mails, 0);
    assert!(second.messages()[0].content.ends_with(&whole));

    // Else that is the end, and says why.
    let peer = peer(seven()).await;
    let station = Station::new(&peer).await;
    let batch = station.submit_raw(&to, &whole).await;
    let rows = ended(&station, batch, &to).await;
    assert_eq!(
        (rows[0].status, rows[0].class),
        (Status::Failed, Some(Class::Protocol))
    );
    assert!(
        reply(&rows[0]).contains("multipart/signed"),
        "{:?}",
        rows[0]
    );
    assert_eq!(peer.counts().mails, 0);
}

#[tokio::test]
async fn what_is_too_large_for_one_host_is_encoded_for_another() {
    let mut small = Temper::accepting();
    small.server.message_max = 300;
    let seven = Temper::accepting().without_eight_bit();
    let (first, second, _dns, station) = two_hosts(small, seven).await;
    let to = people("x.example", 1);
    let batch = station.submit_raw(&to, &eight_bit("mixed")).await;
    let rows = ended(&station, batch, &to).await;
    assert_eq!(rows[0].status, Status::Delivered, "{rows:?}");
    assert_eq!((first.counts().mails, second.counts().messages), (0, 1));
    assert!(second.messages()[0].content.is_ascii());
}

#[tokio::test]
async fn a_host_with_our_own_name_is_a_loop() {
    let us = || Temper::accepting().named("mta.brand.example");
    let (first, second, _dns, station) = two_hosts(us(), us()).await;
    let rows = sent(&station, &people("x.example", 1)).await;
    assert_eq!(rows[0].status, Status::Failed);
    assert!(reply(&rows[0]).contains("this is a loop"), "{:?}", rows[0]);
    assert_eq!(first.counts().mails + second.counts().mails, 0);
    // By the operator's word, a relay on this machine may have the name of this machine.
    let relay = peer(us()).await;
    let config = "[smtp]\nehlo = \"mta.brand.example\"\n";
    let station = Station::towards(&relay, config, "").await;
    let rows = sent(&station, &people("x.example", 1)).await;
    assert_eq!(rows[0].status, Status::Delivered);
}

#[tokio::test]
async fn each_step_has_its_own_patience() {
    let steps = [
        (ServerEvent::Connected, "greeting", "timed out at greeting"),
        (ServerEvent::Hello, "ehlo", "timed out at EHLO"),
        (ServerEvent::Mail, "mail", "timed out at MAIL"),
        (ServerEvent::Rcpt, "rcpt", "timed out at RCPT"),
        (ServerEvent::Data, "data", "timed out at DATA"),
        (
            ServerEvent::Message,
            "final_dot",
            "timed out at end of content",
        ),
    ];
    for (event, key, told) in steps {
        let silent = Temper::accepting()
            .without_pipelining()
            .without_chunking()
            .answering(event, Answer::Silence);
        let peer = peer(silent).await;
        let config = format!("[smtp.timeouts]\n{key} = \"200ms\"\n");
        let station = Station::towards(&peer, &config, "expire = \"1h\"").await;
        let batch = station.submit(&people("x.example", 1)).await;
        let running = station.start().await;
        station
            .until(batch, |counters| counters.temporary_error == 1)
            .await;
        let row = station.row(batch, 0).await;
        assert!(reply(&row).contains(told), "{key}: {row:?}");
        running.drain().await;
    }
}

/// Takes one message, then does as it likes with the idle connection.
async fn take_one(stream: TcpStream, farewell: &str) -> String {
    let mut stream = BufReader::new(stream);
    stream.write_all(b"220 mx\r\n").await.expect("written");
    let (mut line, mut content) = (String::new(), None::<String>);
    loop {
        line.clear();
        if stream.read_line(&mut line).await.expect("read") == 0 {
            return content.unwrap_or_default();
        }
        let answer = match (&mut content, line.as_str()) {
            (Some(_), ".\r\n") => "250 taken\r\n".to_owned() + farewell,
            (Some(content), line) => {
                content.push_str(line);
                continue;
            }
            (None, "DATA\r\n") => {
                content = Some(String::new());
                "354 go\r\n".to_owned()
            }
            (None, _) => "250 ok\r\n".to_owned(),
        };
        stream.write_all(answer.as_bytes()).await.expect("written");
        if line == ".\r\n" {
            // The reply and the end in one segment, or as good as.
            stream.shutdown().await.expect("closed");
            return content.unwrap_or_default();
        }
    }
}

#[tokio::test]
async fn a_connection_that_ends_while_idle_costs_nothing() {
    for farewell in ["", "421 4.4.2 idle for too long\r\n", "250 what?\r\n"] {
        let listener = TcpListener::bind(ANY).await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let shaping = format!(
            "[default]\nrate = \"unlimited\"\nconnections = 1\nretry = [\"200ms\"]\n[mx]\n\"*\" = \"{address}\"\n"
        );
        let station = Station::with(&shaping, "").await;
        let running = station.start().await;
        for _ in 0..2 {
            let batch = station.submit(&people("x.example", 1)).await;
            let (stream, _) = listener.accept().await.expect("a client");
            let content = take_one(stream, farewell).await;
            assert!(content.contains("Subject: Hello"), "{content}");
            station.finished(batch).await;
            let row = station.row(batch, 0).await;
            assert_eq!(
                (row.status, row.attempts),
                (Status::Delivered, 1),
                "{row:?}"
            );
        }
        running.drain().await;
    }
}
