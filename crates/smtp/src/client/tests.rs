//! Tables of dialogues: what we sent, what the peer said, what it meant.

use super::*;
use proptest::prelude::*;

/// Drives a session as a caller does, releasing every body at once.
struct Driver {
    session: ClientSession,
    sent: String,
    done: Vec<(u64, Outcome)>,
    refused: Vec<(u64, usize, u16)>,
    closed: Option<Option<SessionError>>,
    handshakes: u32,
    /// Bodies to hold back.
    hold: bool,
}

impl Driver {
    fn new(starttls: StartTls) -> Self {
        Self {
            session: ClientSession::new("us.example", starttls),
            sent: String::new(),
            done: Vec::new(),
            refused: Vec::new(),
            closed: None,
            handshakes: 0,
            hold: false,
        }
    }

    /// Greeting and an EHLO reply with these keywords.
    fn ready(keywords: &[&str]) -> Self {
        let mut driver = Self::new(StartTls::Never);
        driver.say("220 mx ESMTP\r\n");
        let mut ehlo = "250-mx".to_owned();
        for keyword in keywords {
            ehlo += &format!("\r\n250-{keyword}");
        }
        driver.say(&format!("{ehlo}\r\n250 HELP\r\n"));
        assert!(driver.session.can_begin());
        driver.sent.clear();
        driver
    }

    fn say(&mut self, bytes: &str) -> &mut Self {
        self.session.receive(bytes.as_bytes());
        self.turn();
        self
    }

    fn turn(&mut self) {
        while let Some(event) = self.session.poll_event() {
            match event {
                Event::HandshakeDue => self.handshakes += 1,
                Event::ChallengeDue => self.session.answer_challenge(),
                Event::Ready => {}
                Event::BodyDue(id) if self.hold => {
                    assert!(self.done.iter().all(|(done, _)| *done != id.0))
                }
                Event::BodyDue(id) => assert!(self.session.release(id)),
                Event::TransactionDone {
                    id,
                    outcome,
                    refused,
                } => {
                    self.done.push((id.0, outcome));
                    self.refused.extend(
                        refused
                            .into_iter()
                            .map(|(index, reply)| (id.0, index, reply.code)),
                    );
                }
                Event::Closed(error) => self.closed = Some(error),
            }
        }
        self.write(usize::MAX);
    }

    fn write(&mut self, mut limit: usize) {
        while limit > 0 && self.session.wants_write() {
            let mut slices = [IoSlice::new(b""); 4];
            let filled = self.session.transmit(&mut slices);
            let bytes: Vec<u8> = slices
                .iter()
                .take(filled)
                .flat_map(|s| s.iter().copied())
                .take(limit)
                .collect();
            self.sent
                .push_str(std::str::from_utf8(&bytes).expect("utf-8"));
            self.session.advance(bytes.len());
            limit = limit.saturating_sub(bytes.len());
        }
    }

    fn queue(&mut self, id: u64, recipients: &[&str], content: &str) {
        let body = Body::new(vec![Bytes::copy_from_slice(content.as_bytes())]).expect("clean");
        let envelope = Envelope {
            reverse_path: "b@us.example",
            recipients,
            smtp_utf8: false,
        };
        self.session.begin(TxId(id), &envelope, body).expect("room");
    }

    fn begin(&mut self, id: u64) -> &mut Self {
        self.queue(id, &[&format!("r{id}@x")], &format!("m{id}"));
        self.turn();
        self
    }

    fn take_sent(&mut self) -> String {
        std::mem::take(&mut self.sent)
    }

    fn outcome(&self, id: u64) -> Option<&Outcome> {
        let mut matching = self.done.iter().filter(|(done, _)| *done == id);
        let first = matching.next();
        assert!(matching.next().is_none(), "transaction {id} ended twice");
        first.map(|(_, outcome)| outcome)
    }

    fn refused_at(&self, id: u64) -> Option<(RefusedAt, u16)> {
        match self.outcome(id) {
            Some(Outcome::Refused { stage, reply }) => Some((*stage, reply.code)),
            _ => None,
        }
    }

    fn is_delivered(&self, id: u64) -> bool {
        matches!(self.outcome(id), Some(Outcome::Delivered(_)))
    }

    fn is_ambiguous(&self, id: u64) -> bool {
        matches!(self.outcome(id), Some(Outcome::Ambiguous(_)))
    }

    fn is_not_started(&self, id: u64) -> bool {
        matches!(self.outcome(id), Some(Outcome::NotStarted(_)))
    }

    fn error(&self) -> Option<&SessionError> {
        self.closed.as_ref()?.as_ref()
    }
}

const OK: &str = "250 2.0.0 ok\r\n";
const GO: &str = "354 go\r\n";

#[test]
fn without_extensions_one_command_at_a_time() {
    let mut d = Driver::ready(&[]);
    d.begin(1);
    for (expected, stage, answer) in [
        ("MAIL FROM:<b@us.example>\r\n", Stage::Mail, OK),
        ("RCPT TO:<r1@x>\r\n", Stage::Rcpt, OK),
        ("DATA\r\n", Stage::Data, GO),
        ("m1\r\n.\r\n", Stage::FinalDot, OK),
    ] {
        assert_eq!(d.take_sent(), expected);
        assert_eq!(d.session.waiting_for(), stage);
        d.say(answer);
    }
    assert!(d.is_delivered(1));
    assert_eq!(d.session.waiting_for(), Stage::Idle);
    d.session.quit();
    d.turn();
    assert_eq!(d.take_sent(), "QUIT\r\n");
    assert_eq!(d.session.waiting_for(), Stage::Quit);
    d.say("221 bye\r\n");
    assert_eq!(d.closed, Some(None));
}

#[test]
fn pipelining_sends_an_envelope_in_one_flight_and_the_next_behind_the_dot() {
    let mut d = Driver::ready(&["PIPELINING", "SIZE 1000"]);
    d.begin(1).begin(2);
    assert_eq!(
        d.take_sent(),
        "MAIL FROM:<b@us.example> SIZE=4\r\nRCPT TO:<r1@x>\r\nDATA\r\n"
    );
    d.say("250 ok\r\n250 ok\r\n354 go\r\n");
    assert_eq!(
        d.take_sent(),
        "m1\r\n.\r\nMAIL FROM:<b@us.example> SIZE=4\r\nRCPT TO:<r2@x>\r\nDATA\r\n"
    );
    assert_eq!(d.session.waiting_for(), Stage::FinalDot);
    d.say("250 first\r\n250 ok\r\n250 ok\r\n354 go\r\n");
    assert_eq!(d.take_sent(), "m2\r\n.\r\n");
    d.say("250 second\r\n");
    assert_eq!(
        d.outcome(1),
        Some(&Outcome::Delivered(Reply::new(250, "first")))
    );
    assert_eq!(
        d.outcome(2),
        Some(&Outcome::Delivered(Reply::new(250, "second")))
    );
}

#[test]
fn chunking_sends_a_whole_message_in_one_flight() {
    let mut d = Driver::ready(&["PIPELINING", "CHUNKING"]);
    d.queue(1, &["r1@x"], ".m1");
    d.turn();
    assert_eq!(
        d.take_sent(),
        "MAIL FROM:<b@us.example>\r\nRCPT TO:<r1@x>\r\nBDAT 5 LAST\r\n.m1\r\n"
    );
    d.begin(2);
    assert_eq!(
        d.take_sent(),
        "RSET\r\nMAIL FROM:<b@us.example>\r\nRCPT TO:<r2@x>\r\n",
        "one content at a time"
    );
    d.say("250 ok\r\n250 ok\r\n250 taken\r\n250 reset\r\n250 ok\r\n250 ok\r\n");
    assert_eq!(d.take_sent(), "BDAT 4 LAST\r\nm2\r\n");
    d.say(OK);
    assert!(d.is_delivered(1) && d.is_delivered(2));
    d.begin(3);
    assert!(
        d.take_sent().starts_with("MAIL"),
        "a clean server needs no RSET"
    );
}

#[test]
fn chunking_without_pipelining_goes_step_by_step() {
    let mut d = Driver::ready(&["CHUNKING"]);
    d.begin(1);
    for (expected, answer) in [
        ("MAIL FROM:<b@us.example>\r\n", OK),
        ("RCPT TO:<r1@x>\r\n", OK),
        ("BDAT 4 LAST\r\nm1\r\n", OK),
    ] {
        assert_eq!(d.take_sent(), expected);
        d.say(answer);
    }
    assert!(d.is_delivered(1));
}

#[test]
fn chunked_content_after_a_refusal_counts_nowhere_and_is_reset() {
    for bdat in ["503 no recipients\r\n", OK] {
        let mut d = Driver::ready(&["PIPELINING", "CHUNKING"]);
        d.begin(1).say("250 ok\r\n550 5.1.1 no\r\n").say(bdat);
        assert_eq!(d.refused_at(1), Some((RefusedAt::Rcpt, 550)));
        d.take_sent();
        d.begin(2);
        assert!(d.sent.starts_with("RSET\r\nMAIL"), "{}", d.sent);
        assert!(
            !d.sent.contains("BDAT"),
            "no content before the server is known to be clean"
        );
        d.take_sent();
        d.say("250 reset\r\n");
        assert_eq!(d.take_sent(), "BDAT 4 LAST\r\nm2\r\n");
    }
}

#[test]
fn chunked_content_that_reached_somebody_in_spite_of_a_refused_mail_is_delivered() {
    let mut d = Driver::ready(&["PIPELINING", "CHUNKING"]);
    d.begin(1).say("503 nested\r\n250 ok\r\n250 taken\r\n");
    assert!(d.is_delivered(1));
}

#[test]
fn refusals_at_each_stage_when_pipelined() {
    let table: [(&[&str], (RefusedAt, u16), bool); 5] = [
        (
            &["550 no\r\n503 no\r\n503 no\r\n"],
            (RefusedAt::Mail, 550),
            false,
        ),
        (
            &["250 ok\r\n550 no\r\n554 no\r\n"],
            (RefusedAt::Rcpt, 550),
            true,
        ),
        (
            &["250 ok\r\n250 ok\r\n451 no\r\n"],
            (RefusedAt::Data, 451),
            true,
        ),
        (
            &["250 ok\r\n250 ok\r\n354 go\r\n", "552 no\r\n"],
            (RefusedAt::FinalDot, 552),
            false,
        ),
        // The server wants content for nobody: it gets an empty one.
        (
            &["250 ok\r\n550 no\r\n354 go\r\n", "250 accepted nothing\r\n"],
            (RefusedAt::Rcpt, 550),
            true,
        ),
    ];
    for (answers, refused, reset) in table {
        let mut d = Driver::ready(&["PIPELINING"]);
        d.begin(1).take_sent();
        for answer in answers {
            d.say(answer);
        }
        assert_eq!(d.refused_at(1), Some(refused));
        if refused == (RefusedAt::Rcpt, 550) && reset && answers.len() == 2 {
            assert_eq!(d.take_sent(), ".\r\n");
        }
        d.take_sent();
        d.begin(2);
        assert_eq!(
            d.sent.starts_with("RSET\r\n"),
            reset,
            "{answers:?}: {}",
            d.sent
        );
        if reset {
            d.say(OK);
        }
        d.say("250 ok\r\n250 ok\r\n354 go\r\n").say(OK);
        assert!(d.is_delivered(2), "{answers:?}");
    }
}

#[test]
fn a_refused_mail_with_an_accepted_recipient_sends_no_content() {
    let mut d = Driver::ready(&["PIPELINING"]);
    d.begin(1).take_sent();
    d.say("451 no\r\n250 ok\r\n354 go\r\n");
    assert_eq!(d.take_sent(), ".\r\n");
    d.say(OK);
    assert_eq!(d.refused_at(1), Some((RefusedAt::Mail, 451)));
}

#[test]
fn refusals_without_pipelining_stop_there() {
    let mut d = Driver::ready(&[]);
    d.begin(1).say("250 ok\r\n").take_sent();
    d.say("550 no\r\n");
    assert_eq!(d.refused_at(1), Some((RefusedAt::Rcpt, 550)));
    assert_eq!(d.take_sent(), "");
    d.begin(2);
    assert_eq!(d.take_sent(), "RSET\r\n");
    d.say(OK);
    assert_eq!(d.take_sent(), "MAIL FROM:<b@us.example>\r\n");
    d.say("550 no\r\n");
    assert_eq!(d.refused_at(2), Some((RefusedAt::Mail, 550)));
    d.begin(3);
    assert_eq!(
        d.take_sent(),
        "MAIL FROM:<b@us.example>\r\n",
        "a refused MAIL leaves nothing to reset"
    );
}

#[test]
fn several_recipients_have_their_own_replies() {
    let mut d = Driver::ready(&["PIPELINING"]);
    d.queue(1, &["a@x", "b@x", "c@x"], "m");
    d.turn();
    d.say("250 ok\r\n250 ok\r\n550 no b\r\n450 no c\r\n354 go\r\n")
        .say(OK);
    assert!(d.is_delivered(1));
    assert_eq!(d.refused, [(1, 1, 550), (1, 2, 450)]);

    let mut d = Driver::ready(&["PIPELINING"]);
    d.queue(1, &["a@x", "b@x"], "m");
    d.turn();
    d.say("250 ok\r\n550 no a\r\n450 no b\r\n503 no\r\n");
    assert_eq!(
        (d.refused_at(1), d.refused.as_slice()),
        (Some((RefusedAt::Rcpt, 450)), [(1, 0, 550)].as_slice())
    );
}

#[test]
fn closing_421_anywhere_harms_only_what_it_answers() {
    // Before the dot: not started, and says so of the one behind it too.
    for answer in [
        "421 bye\r\n",
        "250 ok\r\n421 bye\r\n",
        "250 ok\r\n250 ok\r\n421 bye\r\n",
    ] {
        let mut d = Driver::ready(&["PIPELINING"]);
        d.begin(1).begin(2).say(answer);
        assert!(d.is_not_started(1) && d.is_not_started(2), "{answer:?}");
        assert!(matches!(d.error(), Some(SessionError::Closing { .. })));
    }
    // In place of the reply to the dot: refused, not ambiguous.
    let mut d = Driver::ready(&["PIPELINING"]);
    d.begin(1)
        .begin(2)
        .say("250 ok\r\n250 ok\r\n354 go\r\n")
        .say("421 4.7.28 rate\r\n250 stray\r\n");
    assert_eq!(d.refused_at(1), Some((RefusedAt::FinalDot, 421)));
    assert!(d.is_not_started(2));
    // After an acceptance: that one stands.
    let mut d = Driver::ready(&["PIPELINING"]);
    d.begin(1)
        .begin(2)
        .say("250 ok\r\n250 ok\r\n354 go\r\n")
        .say("250 ok\r\n421 enough\r\n");
    assert!(d.is_delivered(1) && d.is_not_started(2));
    // Idle, and to a whole BDAT flight.
    let mut d = Driver::ready(&[]);
    d.say("421 idle too long\r\n");
    assert!(matches!(
        d.error(),
        Some(SessionError::Closing {
            stage: Stage::Idle,
            ..
        })
    ));
    let mut d = Driver::ready(&["PIPELINING", "CHUNKING"]);
    d.begin(1).say("421 no\r\n");
    assert!(d.is_not_started(1));
}

#[test]
fn a_lost_connection_is_ambiguous_only_after_the_end_of_the_content_left() {
    for interruption in [
        Interruption::Disconnected,
        Interruption::TimedOut,
        Interruption::Io(std::io::ErrorKind::ConnectionReset),
    ] {
        let mut d = Driver::ready(&["PIPELINING"]);
        d.begin(1).begin(2).say("250 ok\r\n250 ok\r\n354 go\r\n");
        d.session.interrupted(interruption);
        d.turn();
        assert!(d.is_ambiguous(1) && d.is_not_started(2));
    }
    // All but the last byte of the dot.
    let mut d = Driver::ready(&["PIPELINING"]);
    d.hold = true;
    d.begin(1).say("250 ok\r\n250 ok\r\n354 go\r\n");
    assert!(d.session.release(TxId(1)));
    d.write("m1\r\n.\r".len());
    assert_eq!(d.session.waiting_for(), Stage::DataBlock);
    d.session.interrupted(Interruption::Disconnected);
    d.turn();
    assert!(d.is_not_started(1));
    // A whole BDAT flight without a word; and with the refusal already here.
    for (answer, ambiguous) in [
        ("", true),
        ("250 ok\r\n250 ok\r\n", true),
        ("250 ok\r\n550 no\r\n", false),
    ] {
        let mut d = Driver::ready(&["PIPELINING", "CHUNKING"]);
        d.begin(1).say(answer);
        d.session.interrupted(Interruption::Disconnected);
        d.turn();
        assert_eq!(
            (d.is_ambiguous(1), d.refused_at(1).is_some()),
            (ambiguous, !ambiguous),
            "{answer:?}"
        );
    }
}

#[test]
fn content_waits_for_its_release() {
    let mut d = Driver::ready(&["PIPELINING"]);
    d.hold = true;
    d.begin(1).say("250 ok\r\n250 ok\r\n354 go\r\n").take_sent();
    assert_eq!(d.session.waiting_for(), Stage::Idle);
    assert!(!d.session.wants_write());
    assert!(!d.session.release(TxId(2)));
    assert!(d.session.release(TxId(1)));
    assert!(!d.session.release(TxId(1)), "once");
    // With CHUNKING a refusal may overtake the release.
    let mut d = Driver::ready(&["PIPELINING", "CHUNKING"]);
    d.hold = true;
    d.begin(1).say("250 ok\r\n550 no\r\n");
    assert_eq!(d.refused_at(1), Some((RefusedAt::Rcpt, 550)));
    assert!(!d.session.release(TxId(1)));
}

#[test]
fn replies_out_of_place_end_the_session() {
    let table: [(&str, &str); 6] = [
        ("250 stray\r\n", ""),
        ("354 go\r\n", "begin"),
        ("250 ok\r\n354 go\r\n", "begin"),
        ("250 ok\r\n250 ok\r\n250 not a 354\r\n", "begin"),
        (
            "250 ok\r\n250 ok\r\n354 go\r\n250 accepted before it was sent\r\n",
            "begin",
        ),
        ("garbage\r\n", "begin"),
    ];
    for (answer, begin) in table {
        let mut d = Driver::ready(&["PIPELINING"]);
        if !begin.is_empty() {
            d.begin(1);
        }
        d.say(answer);
        assert!(
            matches!(
                d.error(),
                Some(SessionError::UnexpectedReply { .. } | SessionError::Syntax(_))
            ),
            "{answer:?}: {:?}",
            d.closed
        );
        assert!(begin.is_empty() || d.is_not_started(1), "{answer:?}");
        assert!(!d.session.wants_write());
    }
    let mut d = Driver::ready(&["PIPELINING"]);
    d.begin(1)
        .say("250 ok\r\n250 ok\r\n354 go\r\n")
        .say("354 again\r\n");
    assert!(d.is_ambiguous(1));
}

#[test]
fn a_refusal_in_the_middle_of_the_content_is_one() {
    let mut d = Driver::ready(&["PIPELINING"]);
    d.hold = true;
    d.begin(1).say("250 ok\r\n250 ok\r\n354 go\r\n");
    d.session.release(TxId(1));
    d.write(2);
    d.say("552 5.3.4 too big\r\n");
    assert_eq!(d.refused_at(1), Some((RefusedAt::FinalDot, 552)));
    assert!(d.session.is_closed());
}

#[test]
fn greeting_and_hello() {
    for (answers, stage) in [
        (&["554 go away\r\n"][..], Stage::Greeting),
        (&["220 mx\r\n", "450 not now\r\n"], Stage::Ehlo),
        (
            &["220 mx\r\n", "550 not you\r\n", "550 not you\r\n"],
            Stage::Ehlo,
        ),
        (
            &["220 mx\r\n", "502 what\r\n", "550 not you\r\n"],
            Stage::Ehlo,
        ),
    ] {
        let mut d = Driver::new(StartTls::Opportunistic);
        assert_eq!(d.session.waiting_for(), Stage::Greeting);
        for answer in answers {
            d.say(answer);
        }
        assert!(
            matches!(d.error(), Some(SessionError::Refused { stage: at, .. }) if *at == stage),
            "{answers:?}"
        );
    }
    let mut d = Driver::new(StartTls::Opportunistic);
    d.say("220-mx\r\n220 hello\r\n")
        .say("502 what\r\n")
        .say("250 mx\r\n");
    assert_eq!(d.take_sent(), "EHLO us.example\r\nHELO us.example\r\n");
    assert!(d.session.can_begin());
    // Talking before it is asked.
    let mut d = Driver::new(StartTls::Never);
    d.say("220 mx\r\n250 mx\r\n");
    assert!(matches!(
        d.error(),
        Some(SessionError::UnexpectedReply { .. })
    ));
    let mut d = Driver::new(StartTls::Never);
    d.session = ClientSession::new("bad name", StartTls::Never);
    d.say("220 mx\r\n");
    assert!(matches!(d.error(), Some(SessionError::Hello(_))));
}

#[test]
fn a_peer_with_our_own_name_is_a_loop() {
    let looping = |greeting: &str, ehlo: &str| {
        let mut d = Driver::new(StartTls::Never);
        d.session = ClientSession::new("us.example", StartTls::Never).refusing_itself();
        d.say(greeting).say(ehlo);
        d.error() == Some(&SessionError::Loop)
    };
    assert!(looping("220 US.Example ESMTP\r\n", ""));
    assert!(looping("220 us.example.\r\n", ""));
    assert!(looping("220 hello\r\n", "250-us.example\r\n250 HELP\r\n"));
    assert!(!looping("220 us.example.net\r\n", "250 bus.example\r\n"));
    // Every machine is called so.
    let mut d = Driver::new(StartTls::Never);
    d.session = ClientSession::new("localhost", StartTls::Never).refusing_itself();
    d.say("220 localhost\r\n").say("250 localhost\r\n");
    assert!(d.session.can_begin());
}

/// Says its lines, whatever is asked.
#[derive(Debug)]
struct Lines(&'static [&'static str]);

impl Sasl for Lines {
    fn start(&mut self, offered: &[String]) -> Option<SaslStart> {
        let initial = Some(b"me".to_vec());
        let mechanism = "PLAIN";
        offered
            .iter()
            .any(|name| name == mechanism)
            .then_some(SaslStart { mechanism, initial })
    }

    fn respond(&mut self, _: &[u8]) -> Option<Vec<u8>> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(first.as_bytes().to_vec())
    }
}

#[test]
fn credentials_are_shown_before_mail_and_never_in_plaintext_unasked() {
    let open = |in_plaintext, lines, keyword: &str| {
        let mut d = Driver::new(StartTls::Never);
        let auth = Auth::new(Box::new(Lines(lines)), in_plaintext);
        d.session = ClientSession::new("us.example", StartTls::Never).with_auth(auth);
        d.say("220 mx\r\n")
            .say(&format!("250-mx\r\n250 {keyword}\r\n"));
        d
    };
    let mut d = open(true, &["one", ""], "AUTH LOGIN PLAIN");
    assert_eq!(d.take_sent(), "EHLO us.example\r\nAUTH PLAIN bWU=\r\n");
    assert_eq!(d.session.waiting_for(), Stage::Auth);
    assert!(!d.session.can_begin());
    d.say("334 \r\n").say("334 YQ==\r\n");
    assert_eq!(d.take_sent(), "b25l\r\n\r\n");
    d.say("235 2.7.0 welcome\r\n");
    assert!(d.session.can_begin());

    let error = |in_plaintext, keyword| {
        let d = open(in_plaintext, &[], keyword);
        assert_eq!(d.sent, "EHLO us.example\r\n", "nothing is shown");
        d.error().cloned()
    };
    assert_eq!(
        error(false, "AUTH PLAIN"),
        Some(SessionError::AuthWithoutTls)
    );
    assert_eq!(error(true, "AUTH X"), Some(SessionError::AuthNotOffered));

    // A challenge that is none, and one too many: cancelled, and the reply to that counts.
    for (lines, challenge) in [(&["one"][..], "334 !\r\n"), (&[], "334 YQ==\r\n")] {
        let mut d = open(true, lines, "AUTH PLAIN");
        d.take_sent();
        d.say(challenge);
        assert_eq!(d.take_sent(), "*\r\n");
        d.say("501 cancelled\r\n");
        assert!(matches!(d.error(), Some(SessionError::AuthRefused(reply)) if reply.code == 501));
    }
    let mut d = open(true, &["x"; 20], "AUTH PLAIN");
    for _ in 0..9 {
        d.say("334 YQ==\r\n");
    }
    assert!(d.take_sent().ends_with("eA==\r\n*\r\n"), "bounded");
    let mut d = open(true, &[], "AUTH PLAIN");
    d.say("421 bye\r\n");
    assert!(matches!(
        d.error(),
        Some(SessionError::Closing {
            stage: Stage::Auth,
            ..
        })
    ));
}

/// Wants the server to say `proof`.
#[derive(Debug, Default)]
struct Wary(bool);

impl Sasl for Wary {
    fn start(&mut self, _: &[String]) -> Option<SaslStart> {
        let (mechanism, initial) = ("WARY", Some(Vec::new()));
        Some(SaslStart { mechanism, initial })
    }

    fn respond(&mut self, challenge: &[u8]) -> Option<Vec<u8>> {
        self.0 = challenge == b"proof";
        self.0.then(Vec::new)
    }

    fn is_proven(&self) -> bool {
        self.0
    }
}

#[test]
fn a_server_that_has_to_prove_itself_is_not_believed_before() {
    let open = || {
        let mut d = Driver::new(StartTls::Never);
        let auth = Auth::new(Box::new(Wary::default()), true);
        d.session = ClientSession::new("us.example", StartTls::Never).with_auth(auth);
        d.say("220 mx\r\n").say("250-mx\r\n250 AUTH WARY\r\n");
        assert!(d.take_sent().ends_with("AUTH WARY =\r\n"));
        d
    };
    let mut d = open();
    d.say("334 cHJvb2Y=\r\n");
    assert_eq!(d.take_sent(), "\r\n");
    d.say("235 welcome\r\n");
    assert!(d.session.can_begin());
    for said in ["235 welcome\r\n", "334 YQ==\r\n", "334 ?\r\n"] {
        let mut d = open();
        d.say(said);
        assert_eq!(d.error(), Some(&SessionError::AuthUnproven), "{said}");
        assert_eq!(d.take_sent(), "", "and nothing more is said");
    }
    // What is asked for while that is still to be answered answers nothing.
    let mut d = open();
    d.session.receive(b"334 YQ==\r\n334 YQ==\r\n");
    d.turn();
    assert!(matches!(
        d.error(),
        Some(SessionError::UnexpectedReply { .. })
    ));
}

#[test]
fn within_tls_there_is_no_starttls() {
    let mut d = Driver::new(StartTls::Required);
    let auth = Auth::new(Box::new(Lines(&[])), false);
    let session = ClientSession::new("us.example", StartTls::Required).within_tls();
    d.session = session.with_auth(auth);
    d.say("220 mx\r\n")
        .say("250-mx\r\n250-STARTTLS\r\n250 AUTH PLAIN\r\n");
    assert_eq!(d.take_sent(), "EHLO us.example\r\nAUTH PLAIN bWU=\r\n");
    d.say("235 welcome\r\n");
    assert!(d.session.can_begin());
}

#[test]
fn starttls() {
    const OFFER: &str = "250-mx\r\n250-PIPELINING\r\n250 STARTTLS\r\n";
    let mut d = Driver::new(StartTls::Required);
    d.say("220 mx\r\n").say(OFFER).take_sent();
    assert_eq!(d.session.waiting_for(), Stage::StartTls);
    d.say("220 go ahead\r\n");
    assert_eq!(
        (d.handshakes, d.session.waiting_for()),
        (1, Stage::StartTls)
    );
    assert!(!d.session.can_begin());
    d.session.tls_established();
    d.turn();
    assert_eq!(d.take_sent(), "EHLO us.example\r\n");
    assert_eq!(
        d.session.capabilities(),
        &Capabilities::default(),
        "what was said in plaintext is forgotten"
    );
    d.say("250-mx\r\n250 STARTTLS\r\n");
    assert!(d.session.can_begin() && d.session.is_tls());

    // Injected plaintext, in one segment and in the next.
    for answers in [
        &["220 go\r\n250 mx\r\n"][..],
        &["220 go\r\n2"],
        &["220 go\r\n", "250 mx\r\n"],
    ] {
        let mut d = Driver::new(StartTls::Opportunistic);
        d.say("220 mx\r\n").say(OFFER);
        for answer in answers {
            d.say(answer);
        }
        assert_eq!(
            d.error(),
            Some(&SessionError::PlaintextAfterStartTls),
            "{answers:?}"
        );
    }
    // Refused: opportunistic goes on, required ends.
    let mut d = Driver::new(StartTls::Opportunistic);
    d.say("220 mx\r\n").say(OFFER).say("454 not now\r\n");
    assert!(
        d.session.can_begin()
            && d.session.tls_refused().is_some()
            && d.session.capabilities().pipelining
    );
    let mut d = Driver::new(StartTls::Required);
    d.say("220 mx\r\n").say(OFFER).say("454 not now\r\n");
    assert!(matches!(d.error(), Some(SessionError::TlsRefused(_))));
    let mut d = Driver::new(StartTls::Required);
    d.say("220 mx\r\n").say("250 mx\r\n");
    assert_eq!(d.error(), Some(&SessionError::TlsNotOffered));
    let mut d = Driver::new(StartTls::Required);
    d.say("220 mx\r\n").say(OFFER).say("220 go\r\n");
    d.session
        .interrupted(Interruption::Tls("bad certificate".into()));
    d.turn();
    assert_eq!(
        d.error(),
        Some(&SessionError::TlsFailed("bad certificate".into()))
    );
}

#[test]
fn what_a_server_cannot_take_is_not_begun() {
    let mut d = Driver::ready(&["SIZE 3", "LIMITS RCPTMAX=1 MAILMAX=1"]);
    let body =
        |text: &'static str| Body::new(vec![Bytes::from_static(text.as_bytes())]).expect("clean");
    let one = Envelope {
        reverse_path: "",
        recipients: &["a@x"],
        smtp_utf8: false,
    };
    let many = Envelope {
        recipients: &["a@x", "b@x"],
        ..one
    };
    let none = Envelope {
        recipients: &[],
        ..one
    };
    let utf8 = Envelope {
        recipients: &["飛@x"],
        ..one
    };
    let injected = Envelope {
        recipients: &["a@x>\r\nDATA"],
        ..one
    };
    let table = [
        (one, "aa", Some(BeginError::TooLarge { size: 4, max: 3 })),
        (many, "a", Some(BeginError::TooManyRecipients { max: 1 })),
        (
            none,
            "a",
            Some(BeginError::Envelope(command::CommandError::NoRecipient)),
        ),
        (one, "é\r\n", Some(BeginError::TooLarge { size: 4, max: 3 })),
        (utf8, "a", Some(BeginError::SmtpUtf8)),
        (
            injected,
            "a",
            Some(BeginError::Envelope(
                command::CommandError::ForbiddenCharacter,
            )),
        ),
        (one, "a", None),
        (one, "a", Some(BeginError::Exhausted)),
    ];
    for (id, (envelope, text, error)) in table.into_iter().enumerate() {
        assert_eq!(
            d.session
                .begin(TxId(id as u64), &envelope, body(text))
                .err(),
            error,
            "{envelope:?}"
        );
    }
    d.turn();
    assert_eq!(
        d.take_sent(),
        "MAIL FROM:<> SIZE=3\r\n",
        "nothing of the refused ones leaves"
    );
    let mut d = Driver::ready(&[]);
    assert_eq!(
        d.session.begin(TxId(1), &one, body("é")),
        Err(BeginError::EightBit)
    );
    // One at a time, or two where the second can follow the first at once.
    for (keywords, room) in [(&[][..], 1), (&["PIPELINING"], 2)] {
        let mut d = Driver::ready(keywords);
        for id in 0..room {
            d.begin(id);
        }
        assert_eq!(
            d.session.begin(TxId(4), &one, body("a")),
            Err(BeginError::Busy)
        );
        d.session.quit();
        assert_eq!(
            d.session.begin(TxId(5), &one, body("a")),
            Err(BeginError::NotReady)
        );
        // QUIT waits for what was begun.
        for _ in 0..room {
            d.say(OK).say(OK).say(GO).say(OK);
        }
        assert!((0..room).all(|id| d.is_delivered(id)), "{keywords:?}");
        assert!(d.sent.ends_with("QUIT\r\n"));
    }
}

#[test]
fn eight_bit_and_utf8_are_declared() {
    let mut d = Driver::ready(&["8BITMIME", "SMTPUTF8", "PIPELINING"]);
    d.queue(1, &["飛@x"], "é");
    d.turn();
    assert!(
        d.take_sent()
            .starts_with("MAIL FROM:<b@us.example> BODY=8BITMIME SMTPUTF8\r\nRCPT TO:<飛@x>\r\n")
    );
}

#[test]
fn progress_changes_with_replies_and_not_with_their_parts() {
    let mut d = Driver::ready(&[]);
    d.begin(1);
    let before = d.session.progress();
    d.session.receive(b"25");
    d.session.receive(b"0 o");
    assert_eq!(
        d.session.progress(),
        before,
        "a trickle of bytes does not move the deadline"
    );
    d.session.receive(b"k\r\n");
    assert_ne!(d.session.progress(), before);
}

proptest! {
    /// A peer that says anything at any time: nothing panics, every transaction is reported once,
    /// and nothing is delivered whose content did not leave.
    #[test]
    fn whatever_a_peer_says_each_transaction_ends_once(
        keywords in prop::sample::subsequence(vec!["PIPELINING", "CHUNKING", "LIMITS MAILMAX=2"], 0..=3),
        says in prop::collection::vec(
            prop_oneof![
                6 => Just(b"250 ok\r\n".to_vec()),
                3 => Just(b"354 go\r\n".to_vec()),
                1 => Just(b"550 5.1.1 no\r\n".to_vec()),
                1 => Just(b"450-4.2.0 no\r\n450 no\r\n".to_vec()),
                1 => Just(b"421 bye\r\n".to_vec()),
                1 => prop::collection::vec(any::<u8>(), 0..12),
            ],
            0..30,
        ),
        room in 0_usize..60,
    ) {
        let mut d = Driver::ready(&keywords);
        let mut begun = 0;
        for bytes in says {
            if d.session.can_begin() {
                d.queue(begun, &["a@x", "b@x"], "content");
                begun += 1;
            }
            d.session.receive(&bytes);
            while let Some(event) = d.session.poll_event() {
                match event {
                    Event::BodyDue(id) => { d.session.release(id); }
                    Event::TransactionDone { id, outcome, .. } => d.done.push((id.0, outcome)),
                    Event::Closed(error) => d.closed = Some(error),
                    Event::HandshakeDue | Event::ChallengeDue | Event::Ready => {}
                }
            }
            d.write(room);
        }
        d.session.interrupted(Interruption::Disconnected);
        d.turn();
        prop_assert!(d.session.is_closed() && d.closed.is_some());
        let left = d.sent.matches("content\r\n").count();
        let delivered = d.done.iter().filter(|(_, outcome)| matches!(outcome, Outcome::Delivered(_))).count();
        let ambiguous = d.done.iter().filter(|(_, outcome)| matches!(outcome, Outcome::Ambiguous(_))).count();
        prop_assert!(ambiguous <= 1 && delivered + ambiguous <= left);
        for id in 0..begun {
            prop_assert!(d.outcome(id).is_some(), "transaction {id} was never reported");
        }
    }
}
