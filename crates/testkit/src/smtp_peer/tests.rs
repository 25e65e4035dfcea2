use std::io::IoSlice;

use bytes::Bytes;
use mail_send::SmtpClientBuilder;
use mail_send::smtp::message::Message as MailSendMessage;
use smtp::client::{Event, Interruption, StartTls};
use smtp::{Body, ClientSession, Envelope, Outcome, ServerEvent, SessionError, TxId};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::mpsc;

use super::*;
use crate::tls::SelfSigned;

trait Stream: AsyncRead + AsyncWrite + Unpin {}
impl<T: AsyncRead + AsyncWrite + Unpin> Stream for T {}

/// A plain client: one session, one recipient a message, to its end.
struct Client {
    session: ClientSession,
    recipients: Vec<String>,
    begun: usize,
    outcomes: Vec<Option<Outcome>>,
    closed: Option<SessionError>,
}

impl Client {
    fn new(recipients: &[&str], starttls: StartTls) -> Self {
        Self {
            session: ClientSession::new("client.example", starttls),
            recipients: recipients.iter().map(ToString::to_string).collect(),
            begun: 0,
            outcomes: vec![None; recipients.len()],
            closed: None,
        }
    }

    /// Runs the session against `peer`; what is not reported at the end is `None`.
    async fn run(mut self, peer: &SmtpPeer, tls: Option<&SelfSigned>) -> Self {
        let mut tcp = TcpStream::connect(peer.address()).await.expect("connect");
        let upgrade = self.talk(&mut tcp).await;
        if upgrade {
            let config = tls
                .expect("a certificate")
                .trusting_client_config()
                .expect("config");
            let name = "mx.example".try_into().expect("a name");
            let mut tls = tokio_rustls::TlsConnector::from(config)
                .connect(name, tcp)
                .await
                .expect("handshake");
            self.session.tls_established();
            self.talk(&mut tls).await;
        }
        self
    }

    /// True if a handshake is due, false at the end.
    async fn talk(&mut self, stream: &mut impl Stream) -> bool {
        let mut buffer = [0; 4096];
        loop {
            if self.turn() {
                return true;
            }
            while self.session.wants_write() {
                let mut slices = [IoSlice::new(b""); 8];
                let filled = self.session.transmit(&mut slices);
                let written = stream
                    .write_vectored(slices.get(..filled).unwrap_or_default())
                    .await;
                match written {
                    Ok(count) => self.session.advance(count),
                    Err(error) => self.session.interrupted(Interruption::Io(error.kind())),
                }
            }
            stream.flush().await.ok();
            if self.session.is_closed() {
                self.turn();
                return false;
            }
            match stream.read(&mut buffer).await {
                Ok(0) => self.session.interrupted(Interruption::Disconnected),
                Ok(count) => self
                    .session
                    .receive(buffer.get(..count).unwrap_or_default()),
                Err(error) => self.session.interrupted(Interruption::Io(error.kind())),
            }
        }
    }

    /// Handles events and begins what fits; true if a handshake is due.
    fn turn(&mut self) -> bool {
        loop {
            let Some(event) = self.session.poll_event() else {
                if !self.session.can_begin() {
                    return false;
                }
                if self.begun == self.recipients.len() {
                    self.session.quit();
                    return false;
                }
                self.begin();
                continue;
            };
            match event {
                Event::HandshakeDue => return true,
                Event::ChallengeDue => unreachable!("no AUTH here"),
                Event::Ready => {}
                Event::BodyDue(id) => assert!(self.session.release(id)),
                Event::TransactionDone { id, outcome, .. } => {
                    self.outcomes[usize::try_from(id.0).expect("small")] = Some(outcome);
                }
                Event::Closed(error) => self.closed = error,
            }
        }
    }

    fn begin(&mut self) {
        let recipient = self.recipients[self.begun].as_str();
        let envelope = Envelope {
            reverse_path: "bounce@client.example",
            recipients: &[recipient],
            smtp_utf8: false,
        };
        let body = Body::new(vec![Bytes::from(content(recipient))]).expect("clean");
        self.session
            .begin(TxId(self.begun as u64), &envelope, body)
            .expect("room");
        self.begun += 1;
    }

    fn codes(&self) -> Vec<u16> {
        let code = |outcome: &Option<Outcome>| match outcome {
            Some(Outcome::Delivered(reply) | Outcome::Refused { reply, .. }) => reply.code,
            Some(Outcome::Ambiguous(_)) => 1,
            Some(Outcome::NotStarted(_)) => 2,
            None => 0,
        };
        self.outcomes.iter().map(code).collect()
    }
}

fn content(recipient: &str) -> String {
    format!("To: {recipient}\r\nSubject: x\r\n\r\n.\r\n..dots\r\n")
}

async fn deliver(peer: &SmtpPeer, recipients: &[&str]) -> Client {
    Client::new(recipients, StartTls::Never)
        .run(peer, None)
        .await
}

async fn peer(temper: Temper) -> SmtpPeer {
    SmtpPeer::start(temper).await.expect("a port")
}

#[tokio::test]
async fn messages_arrive_whole_with_and_without_each_extension() {
    let all = Temper::accepting;
    for temper in [
        all(),
        all().without_chunking(),
        all().without_pipelining(),
        all()
            .without_pipelining()
            .without_chunking()
            .without_eight_bit(),
    ] {
        let peer = peer(temper).await;
        let recipients = ["a@x.example", "b@x.example", "c@x.example"];
        let client = deliver(&peer, &recipients).await;
        assert_eq!(client.codes(), [250, 250, 250]);
        assert_eq!(client.closed, None);
        let counts = peer
            .wait_until(|counts| counts.open == 0)
            .await
            .expect("closed");
        assert_eq!(
            (counts.messages, counts.connections, counts.sent_ahead),
            (3, 1, 0)
        );
        for (received, recipient) in peer.messages().iter().zip(recipients) {
            assert_eq!(received.recipients, [recipient]);
            assert_eq!(received.content, content(recipient));
            assert_eq!(received.reverse_path, "bounce@client.example");
            assert_eq!(
                (received.client.as_str(), received.tls, received.connection),
                ("client.example", false, 1)
            );
        }
        peer.shutdown().await;
    }
}

#[tokio::test]
async fn starttls_upgrades_and_says_ehlo_again() {
    let certificate = SelfSigned::new(&["mx.example"]).expect("a certificate");
    let peer = peer(Temper::accepting().with_tls(&certificate)).await;
    let client = Client::new(&["a@x.example"], StartTls::Required)
        .run(&peer, Some(&certificate))
        .await;
    assert_eq!(client.codes(), [250]);
    assert!(client.session.is_tls() && !client.session.capabilities().starttls);
    assert!(peer.messages().iter().all(|received| received.tls));
    assert_eq!((peer.counts().tls, peer.counts().tls_failed), (1, 0));
    // A client that does not trust it.
    let other = SelfSigned::new(&["mx.example"]).expect("a certificate");
    let mut tcp = TcpStream::connect(peer.address()).await.expect("connect");
    let mut client = Client::new(&[], StartTls::Required);
    assert!(client.talk(&mut tcp).await);
    let connector =
        tokio_rustls::TlsConnector::from(other.trusting_client_config().expect("config"));
    assert!(
        connector
            .connect("mx.example".try_into().expect("a name"), tcp)
            .await
            .is_err()
    );
    peer.wait_until(|counts| counts.tls_failed == 1)
        .await
        .expect("a failed handshake");
}

#[tokio::test]
async fn unknown_users_and_full_mailboxes_are_refused() {
    let temper = Temper::accepting()
        .full_mailboxes(false, |to| to.starts_with("full"))
        .full_mailboxes(true, |to| to.starts_with("burst"))
        .knowing(["A@x.example"]);
    let peer = peer(temper).await;
    let recipients = [
        "a@x.example",
        "b@x.example",
        "full@x.example",
        "burst@x.example",
        "A@X.example",
    ];
    assert_eq!(
        deliver(&peer, &recipients).await.codes(),
        [250, 550, 452, 552, 250]
    );
    let counts = peer.counts();
    assert_eq!(
        (counts.messages, counts.refused_recipients, counts.mails),
        (2, 3, 5)
    );
}

#[tokio::test]
async fn a_greylist_lifts_after_its_delay() {
    let lifted = peer(Temper::accepting().greylisting(Duration::ZERO)).await;
    assert_eq!(deliver(&lifted, &["a@x.example"]).await.codes(), [451]);
    assert_eq!(
        deliver(&lifted, &["a@x.example", "b@x.example"])
            .await
            .codes(),
        [250, 451]
    );
    let lasting = peer(Temper::accepting().greylisting(Duration::from_secs(3_600))).await;
    assert_eq!(
        deliver(&lasting, &["a@x.example", "a@x.example"])
            .await
            .codes(),
        [451, 451]
    );
}

#[tokio::test]
async fn a_connection_ends_after_its_messages_and_harms_none() {
    let peer = peer(Temper::accepting().closing_after(2)).await;
    let client = deliver(&peer, &["a@x", "b@x", "c@x", "d@x"]).await;
    assert_eq!(
        client.codes(),
        [250, 250, 2, 0],
        "the fourth was never begun"
    );
    assert!(matches!(client.closed, Some(SessionError::Closing { .. })));
}

#[tokio::test]
async fn lost_replies_are_ambiguous_whether_accepted_or_not() {
    for accepted in [true, false] {
        let peer = peer(Temper::accepting().resetting_after_dot(accepted)).await;
        assert_eq!(deliver(&peer, &["a@x"]).await.codes(), [1]);
        assert_eq!(peer.counts().messages, u64::from(accepted));
    }
}

#[tokio::test]
async fn connections_break_at_any_point() {
    let table = [
        (ServerEvent::Connected, 0),
        (ServerEvent::Hello, 0),
        (ServerEvent::Mail, 2),
        (ServerEvent::Rcpt, 2),
        (ServerEvent::Data, 2),
        (ServerEvent::Message, 1),
    ];
    for (at, code) in table {
        for answer in [Answer::Disconnect, Answer::Reset] {
            let peer = peer(Temper::accepting().without_chunking().answering(at, answer)).await;
            let client = deliver(&peer, &["a@x"]).await;
            assert_eq!(client.codes(), [code], "{at:?}");
            assert!(client.closed.is_some());
            assert_eq!(peer.counts().messages, 0);
        }
    }
}

#[tokio::test]
async fn an_answer_can_be_given_a_number_of_times() {
    let busy = Answer::reply(451, "4.3.0 busy");
    let peer = peer(Temper::accepting().answering_times(ServerEvent::Message, 2, busy)).await;
    assert_eq!(
        deliver(&peer, &["a@x", "b@x", "c@x"]).await.codes(),
        [451, 451, 250]
    );
    assert_eq!(peer.counts().refused_messages, 2);
    peer.set_temper(
        Temper::accepting().answering(ServerEvent::Mail, Answer::reply(550, "5.7.1 no")),
    );
    assert_eq!(deliver(&peer, &["d@x"]).await.codes(), [550]);
}

#[tokio::test]
async fn silence_lasts_until_the_client_leaves() {
    let peer = peer(Temper::accepting().never_greeting()).await;
    let mut tcp = TcpStream::connect(peer.address()).await.expect("connect");
    tcp.write_all(b"EHLO c\r\n").await.expect("write");
    peer.wait_until(|counts| counts.open == 1)
        .await
        .expect("open");
    drop(tcp);
    peer.wait_until(|counts| counts.open == 0)
        .await
        .expect("closed");
    assert_eq!((peer.counts().connections, peer.counts().peak), (1, 1));
}

#[tokio::test]
async fn a_shutdown_ends_silent_connections() {
    let peer = peer(Temper::accepting().never_greeting()).await;
    let mut tcp = TcpStream::connect(peer.address()).await.expect("connect");
    peer.wait_until(|counts| counts.open == 1)
        .await
        .expect("open");
    let address = peer.address();
    peer.shutdown().await;
    let mut byte = [0];
    assert!(matches!(tcp.read(&mut byte).await, Ok(0) | Err(_)));
    assert!(TcpStream::connect(address).await.is_err());
}

#[tokio::test]
async fn delays_are_kept() {
    let temper = Temper::accepting()
        .slow_greeting(Duration::from_millis(20))
        .slow_commands(Duration::from_millis(10))
        .slow_messages(Duration::from_millis(50));
    let peer = peer(temper).await;
    let before = tokio::time::Instant::now();
    assert_eq!(deliver(&peer, &["a@x"]).await.codes(), [250]);
    // Greeting, content, and EHLO, MAIL, RCPT, QUIT.
    assert!(before.elapsed() >= Duration::from_millis(20 + 50 + 4 * 10));
}

#[tokio::test]
async fn what_is_kept_is_bounded() {
    let recipients = ["a@x", "b@x", "a@x"];
    let kept = |keep| async move {
        let peer = peer(Temper::accepting().keeping(keep)).await;
        assert_eq!(deliver(&peer, &recipients).await.codes(), [250; 3]);
        (peer.counts(), peer.messages().len(), peer.copies())
    };
    let (counts, messages, _) = kept(Keep::Messages(2)).await;
    assert_eq!((counts.not_kept, messages), (1, 2));
    let (counts, messages, copies) = kept(Keep::PerRecipient(1)).await;
    assert_eq!((counts.not_kept, messages, copies.len()), (1, 0, 1));
    assert_eq!(
        copies.get("a@x").map(|copies| (copies.count, copies.same)),
        Some((2, true))
    );
    let (counts, messages, copies) = kept(Keep::Nothing).await;
    assert_eq!(
        (counts.messages, counts.digest, messages, copies.len()),
        (3, 0, 0, 0)
    );
    let sum = |texts: &[&str]| {
        texts
            .iter()
            .map(|to| record::digest(content(to).as_bytes()))
            .fold(0, u64::wrapping_add)
    };
    assert_eq!(kept(Keep::Digest).await.0.digest, sum(&recipients));
}

#[tokio::test]
async fn copies_that_differ_are_seen() {
    let mut record = Record::default();
    record.count_copies(&["a@x".to_owned()], 1, 10);
    record.count_copies(&["a@x".to_owned()], 2, 10);
    record.count_copies(&["a@x".to_owned()], 1, 10);
    let copies = record.copies().get("a@x").copied().expect("kept");
    assert_eq!((copies.count, copies.digest, copies.same), (3, 1, false));
}

#[tokio::test]
async fn messages_are_forwarded_or_refused() {
    let (to, mut forwarded) = mpsc::channel(1);
    let peer = peer(Temper::counting().forwarding(to)).await;
    let delivered = deliver(&peer, &["a@x", "b@x"]);
    let taken = async {
        let mut taken = Vec::new();
        for _ in 0..2 {
            taken.push(
                forwarded
                    .recv()
                    .await
                    .expect("a message")
                    .recipients
                    .concat(),
            );
        }
        taken
    };
    let (client, taken) = tokio::join!(delivered, taken);
    assert_eq!(
        (client.codes(), taken),
        (vec![250, 250], vec!["a@x".to_owned(), "b@x".to_owned()])
    );
    drop(forwarded);
    assert_eq!(deliver(&peer, &["c@x"]).await.codes(), [451]);
    assert_eq!(
        (peer.counts().messages, peer.counts().refused_messages),
        (2, 1)
    );
}

/// Somebody else's client, so that we do not only understand ourselves.
#[tokio::test]
async fn mail_send_delivers_here() {
    let certificate = SelfSigned::new(&["localhost"]).expect("a certificate");
    for (temper, tls) in [
        (Temper::accepting(), false),
        (
            Temper::accepting()
                .with_tls(&certificate)
                .knowing(["b@x.example"]),
            true,
        ),
    ] {
        let peer = peer(temper).await;
        // It ends the last line itself, whether that has an end or not.
        let text = content("b@x.example").trim_end().to_owned();
        let message =
            || MailSendMessage::new("a@x.example", ["b@x.example"], text.clone().into_bytes());
        let builder = SmtpClientBuilder::new("localhost", peer.address().port())
            .expect("a TLS configuration")
            .implicit_tls(false)
            .allow_invalid_certs();
        if tls {
            let mut client = builder.connect().await.expect("STARTTLS");
            client.send(message()).await.expect("accepted");
            client.send(message()).await.expect("accepted again");
            client.rset().await.expect("reset");
            let unknown = MailSendMessage::new("a@x.example", ["no@x.example"], b"x\r\n".to_vec());
            assert!(client.send(unknown).await.is_err());
        } else {
            let mut client = builder.connect_plain().await.expect("plain");
            client.send(message()).await.expect("accepted");
            client.send(message()).await.expect("accepted again");
        }
        peer.wait_for(2).await.expect("two messages");
        for received in peer.messages() {
            assert_eq!(received.content, content("b@x.example"));
            assert_eq!(
                (received.reverse_path.as_str(), received.tls),
                ("a@x.example", tls)
            );
        }
    }
}
