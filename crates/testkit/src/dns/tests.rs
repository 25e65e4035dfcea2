use super::*;
use hickory_proto::rr::rdata::NULL;
use proptest::prelude::*;

fn shop() -> Zone {
    Zone::new()
        .mx("shop.example", 10, "mx1.shop.example")
        .mx("shop.example", 20, "MX2.shop.example")
        .a("mx1.shop.example", Ipv4Addr::new(127, 0, 0, 2))
        .a("mx1.shop.example", std::net::Ipv6Addr::LOCALHOST)
        .null_mx("none.example")
        .cname("www.shop.example", "mx1.shop.example")
        .txt("long.example", &"x".repeat(700))
        .mx("*.wild.example", 10, "mx1.shop.example")
}

fn shared(zone: Zone) -> Shared {
    Shared {
        zone: Mutex::new(zone),
        counts: Mutex::default(),
    }
}

fn question(name: &str, asked: RecordType) -> Vec<u8> {
    let mut message = Message::new(7, MessageType::Query, OpCode::Query);
    message.add_query(Query::query(absolute(name), asked));
    message.to_vec().expect("a query encodes")
}

fn ask(zone: &Shared, name: &str, asked: RecordType) -> Message {
    let answer = answer(zone, &question(name, asked), Transport::Tcp).expect("an answer");
    Message::from_vec(&answer.bytes).expect("the answer decodes")
}

/// Response code, answers in text, and whether an SOA says that there is no more.
fn told(zone: &Shared, name: &str, asked: RecordType) -> (ResponseCode, Vec<String>, bool) {
    let message = ask(zone, name, asked);
    let mut answers: Vec<_> = message.answers.iter().map(|r| r.data.to_string()).collect();
    answers.sort();
    let soa = message
        .authorities
        .iter()
        .any(|r| r.record_type() == RecordType::SOA);
    (message.metadata.response_code, answers, soa)
}

#[test]
fn answers_what_the_zone_has() {
    use RecordType::{A, AAAA, MX, TXT};
    use ResponseCode::{NXDomain, NoError};
    let zone = shared(shop());
    let none: Vec<String> = Vec::new();
    let v4 = || vec!["127.0.0.2".to_owned()];
    let mx1 = || vec!["10 mx1.shop.example.".to_owned()];
    for (name, asked, expected) in [
        ("mx1.shop.example", A, (NoError, v4(), false)),
        (
            "mx1.SHOP.example",
            AAAA,
            (NoError, vec!["::1".to_owned()], false),
        ),
        ("mx1.shop.example", MX, (NoError, none.clone(), true)),
        ("example", A, (NoError, none.clone(), true)),
        ("wild.example", MX, (NoError, none.clone(), true)),
        ("nobody.example", MX, (NXDomain, none.clone(), true)),
        ("shopx.example", MX, (NXDomain, none.clone(), true)),
        ("none.example", MX, (NoError, vec!["0 .".to_owned()], false)),
        ("a.wild.example", MX, (NoError, mx1(), false)),
        ("a.b.wild.example", MX, (NoError, mx1(), false)),
        ("a.b.wild.example", TXT, (NoError, none.clone(), true)),
    ] {
        assert_eq!(told(&zone, name, asked), expected, "{name} {asked}");
    }
    assert_eq!(told(&zone, "shop.example", MX).1.len(), 2);
    let (_, chain, soa) = told(&zone, "www.shop.example", A);
    assert_eq!((chain.len(), soa), (2, false), "{chain:?}");
    assert!(ask(&zone, "nobody.example", MX).metadata.authoritative);
}

#[test]
fn a_bare_star_stands_for_all_others() {
    let zone = shared(
        shop()
            .mx("*", 5, "sink.example")
            .a("sink.example", Ipv4Addr::LOCALHOST),
    );
    for name in ["anything.test", "nobody.example", "below.mx1.shop.example"] {
        assert_eq!(
            told(&zone, name, RecordType::MX).1,
            ["5 sink.example."],
            "{name}"
        );
    }
    assert!(told(&zone, "mx1.shop.example", RecordType::MX).1.is_empty());
    assert_eq!(told(&zone, "shop.example", RecordType::MX).1.len(), 2);
}

#[test]
fn a_chain_in_a_circle_ends() {
    let zone = shared(
        Zone::new()
            .cname("a.example", "b.example")
            .cname("b.example", "a.example"),
    );
    assert_eq!(
        ask(&zone, "a.example", RecordType::A).answers.len(),
        MAX_CHAIN
    );
}

#[test]
fn behaves_as_told_for_all_types_or_one() {
    let zone = shared(
        shop()
            .behave("shop.example", Behaviour::ServFail)
            .behave_for("none.example", RecordType::A, Behaviour::Refused)
            .behave("mx1.shop.example", Behaviour::Silent)
            .behave("late.example", Behaviour::Delay(Duration::from_secs(3))),
    );
    let code = |name, asked| ask(&zone, name, asked).metadata.response_code;
    assert_eq!(code("shop.example", RecordType::MX), ResponseCode::ServFail);
    assert_eq!(code("none.example", RecordType::A), ResponseCode::Refused);
    assert_eq!(code("none.example", RecordType::MX), ResponseCode::NoError);
    let silent = question("mx1.shop.example", RecordType::A);
    assert_eq!(answer(&zone, &silent, Transport::Udp), None);
    let late = answer(
        &zone,
        &question("late.example", RecordType::A),
        Transport::Udp,
    );
    assert_eq!(late.expect("an answer").after, Duration::from_secs(3));
}

#[test]
fn what_does_not_fit_into_udp_is_cut() {
    let zone = shared(shop().behave("none.example", Behaviour::Truncate));
    for name in ["long.example", "none.example"] {
        let packet = question(name, RecordType::TXT);
        let cut = answer(&zone, &packet, Transport::Udp).expect("an answer");
        let cut = Message::from_vec(&cut.bytes).expect("decodes");
        assert!(cut.metadata.truncation && cut.answers.is_empty(), "{name}");
        assert!(
            !ask(&zone, name, RecordType::TXT).metadata.truncation,
            "{name}"
        );
    }
    let text = ask(&zone, "long.example", RecordType::TXT);
    let RData::TXT(text) = &text.answers[0].data else {
        panic!("not TXT")
    };
    assert_eq!(text.txt_data.concat().len(), 700);
}

#[test]
fn no_query_gets_no_or_an_error_answer() {
    let zone = shared(shop());
    let mut response = question("shop.example", RecordType::MX);
    response[2] |= 0x80;
    assert_eq!(answer(&zone, &response, Transport::Udp), None);
    assert_eq!(answer(&zone, &[1], Transport::Udp), None);
    let code = |packet: &[u8]| {
        let answer = answer(&zone, packet, Transport::Udp).expect("an answer");
        let message = Message::from_vec(&answer.bytes).expect("decodes");
        assert_eq!(
            message.metadata.id,
            u16::from_be_bytes([packet[0], packet[1]])
        );
        message.metadata.response_code
    };
    assert_eq!(code(&[1, 2, 3]), ResponseCode::FormErr);
    let mut notify = question("shop.example", RecordType::SOA);
    notify[2] = 4 << 3;
    assert_eq!(code(&notify), ResponseCode::NotImp);
    let none_asked = [0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    assert_eq!(code(&none_asked), ResponseCode::FormErr);
    assert_eq!(lock(&zone.counts).total, 0);
}

proptest! {
    #[test]
    fn any_bytes_are_answered_or_dropped(bytes: Vec<u8>, flip: (proptest::sample::Index, u8)) {
        let zone = shared(shop());
        let mut query = question("www.shop.example", RecordType::MX);
        let at = flip.0.index(query.len());
        query[at] = flip.1;
        for packet in [bytes, query] {
            for transport in [Transport::Udp, Transport::Tcp] {
                let answer = answer(&zone, &packet, transport);
                if let Some(answer) = answer {
                    prop_assert_eq!(answer.bytes.get(..2), packet.get(..2));
                    prop_assert!(Message::from_vec(&answer.bytes).is_ok());
                }
            }
        }
    }
}

async fn udp(server: &DnsServer, packet: &[u8]) -> Vec<u8> {
    let socket = UdpSocket::bind("127.0.0.1:0").await.expect("a socket");
    socket.send_to(packet, server.addr()).await.expect("sent");
    let mut buffer = vec![0; 4096];
    let (len, from) = socket.recv_from(&mut buffer).await.expect("received");
    assert_eq!(from, server.addr());
    buffer.truncate(len);
    buffer
}

#[tokio::test]
async fn serves_udp_and_tcp_counts_and_changes() {
    let server = DnsServer::start(shop()).await.expect("starts");
    let packet = question("shop.example", RecordType::MX);
    let first = Message::from_vec(&udp(&server, &packet).await).expect("decodes");
    assert_eq!(first.answers.len(), 2);

    let mut stream = TcpStream::connect(server.addr()).await.expect("connects");
    for _ in 0..2 {
        let len = u16::try_from(packet.len()).expect("short");
        stream.write_u16(len).await.expect("written");
        stream.write_all(&packet).await.expect("written");
        let len = stream.read_u16().await.expect("a length");
        let mut answer = vec![0; usize::from(len)];
        stream.read_exact(&mut answer).await.expect("an answer");
        let answer = Message::from_vec(&answer).expect("decodes");
        assert_eq!(answer.answers.len(), 2);
    }
    assert_eq!(server.queries("SHOP.example"), 3);
    assert_eq!(server.queries_of("shop.example", RecordType::MX), 3);
    assert_eq!(server.queries_of("shop.example", RecordType::A), 0);

    server.change(|zone| zone.without("shop.example").null_mx("shop.example"));
    let changed = Message::from_vec(&udp(&server, &packet).await).expect("decodes");
    assert_eq!(changed.answers.len(), 1);
    assert_eq!(server.total_queries(), 4);

    let addr = server.addr();
    server.shutdown().await;
    UdpSocket::bind(addr).await.expect("the port is free again");
}

#[tokio::test]
async fn delays_do_not_hold_up_others_and_garbage_is_no_message() {
    let zone = shop()
        .behave("slow.example", Behaviour::Delay(Duration::from_secs(3600)))
        .behave("soon.example", Behaviour::Delay(Duration::from_millis(5)))
        .behave("odd.example", Behaviour::Garbage)
        .record("null.example", RData::NULL(NULL::new()));
    let server = DnsServer::start(zone).await.expect("starts");
    let slow = UdpSocket::bind("127.0.0.1:0").await.expect("a socket");
    let packet = question("slow.example", RecordType::A);
    slow.send_to(&packet, server.addr()).await.expect("sent");
    let soon = udp(&server, &question("soon.example", RecordType::A)).await;
    assert!(Message::from_vec(&soon).is_ok());
    let odd = udp(&server, &question("odd.example", RecordType::A)).await;
    assert!(Message::from_vec(&odd).is_err());
    server.shutdown().await;
}
