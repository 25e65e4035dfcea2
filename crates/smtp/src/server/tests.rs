//! Tables of dialogues from the server's side.

use super::*;
use proptest::prelude::*;

/// Feeds `pieces` to a session whose caller takes everything.
fn talk_with(config: ServerConfig, pieces: &[&[u8]]) -> (String, Vec<String>, ServerSession) {
    let mut session = ServerSession::new(Arc::new(config));
    let mut messages = Vec::new();
    let mut replies = String::new();
    for piece in std::iter::once(&&b""[..]).chain(pieces) {
        session.receive(piece);
        while let Some(event) = session.poll_event() {
            match event {
                ServerEvent::Connected => session.answer(220, "mx"),
                ServerEvent::StartTls => session.answer(220, "go"),
                ServerEvent::Rcpt if session.recipient().starts_with("no") => {
                    session.answer(550, "5.1.1 no")
                }
                ServerEvent::Hello | ServerEvent::Mail | ServerEvent::Rcpt => {
                    session.answer(250, "ok")
                }
                ServerEvent::Data => session.answer(354, "go"),
                ServerEvent::Message => {
                    messages.push(format!(
                        "{}>{}:{}",
                        session.reverse_path(),
                        session.recipients().join(","),
                        String::from_utf8_lossy(session.message())
                    ));
                    session.answer(250, "taken");
                }
                ServerEvent::Quit => session.answer(221, "bye"),
            }
        }
        replies += &String::from_utf8_lossy(&session.output().split());
    }
    (replies, messages, session)
}

/// The codes of the replies after the greeting, EHLO said before.
fn codes(config: ServerConfig, lines: &str) -> Vec<u16> {
    let (replies, _, _) = talk_with(config, &[b"EHLO c\r\n", lines.as_bytes()]);
    let last_lines = replies
        .lines()
        .filter(|line| line.as_bytes().get(3) == Some(&b' '));
    last_lines
        .skip(2)
        .map(|line| {
            line.split(' ')
                .next()
                .and_then(|c| c.parse().ok())
                .expect("a code")
        })
        .collect()
}

#[test]
fn a_pipelined_session_is_answered_in_order() {
    let (replies, messages, session) = talk_with(
        ServerConfig { host: "mx".into(), ..ServerConfig::default() },
        &[
            b"EHLO c.example\r\n",
            b"MAIL FROM:<a@x>\r\nRCPT TO:<b@y>\r\nDATA\r\n",
            b"..hi\r\n.\r\nMAIL FROM:<> SIZE=5\r\nRCPT TO:<c@y>\r\nRCPT TO:<no@y>\r\nBDAT 2\r\n.mBDAT 2 LAST\r\n\r\nQUIT\r\n",
        ],
    );
    let codes: Vec<&str> = replies
        .lines()
        .map(|line| line.split([' ', '-']).next().unwrap_or_default())
        .collect();
    assert_eq!(
        codes.join(" "),
        "220 250 250 250 250 250 250 250 250 250 354 250 250 250 550 250 250 221"
    );
    assert_eq!(messages, ["a@x>b@y:.hi\r\n", ">c@y:.m\r\n"]);
    assert_eq!(
        (session.client_name(), session.sent_ahead()),
        ("c.example", 0)
    );
    assert!(session.is_closing());
}

#[test]
fn order_and_syntax() {
    let table: [(&str, &[u16]); 22] = [
        ("RCPT TO:<a@x>\r\n", &[503]),
        ("DATA\r\n", &[503]),
        ("MAIL FROM:<a@x>\r\nDATA\r\n", &[250, 554]),
        (
            "MAIL FROM:<a@x>\r\nMAIL FROM:<b@x>\r\nRSET\r\nMAIL FROM:<b@x>\r\n",
            &[250, 503, 250, 250],
        ),
        (
            "MAIL FROM:<a@x>\r\nRCPT TO:<no@x>\r\nBDAT 3 LAST\r\nabcNOOP\r\n",
            &[250, 550, 503, 250],
        ),
        ("BDAT 3 LAST\r\nabcNOOP\r\n", &[503, 250]),
        (
            "MAIL FROM:<a@x>\r\nRCPT TO:<b@x>\r\nBDAT 1\r\na",
            &[250, 250, 250],
        ),
        (
            "MAIL FROM:<a@x>\r\nRCPT TO:<b@x>\r\nBDAT 1\r\naDATA\r\n",
            &[250, 250, 250, 503],
        ),
        (
            "MAIL FROM:<a@x>\r\nRCPT TO:<b@x>\r\nBDAT 0 LAST\r\n",
            &[250, 250, 250],
        ),
        ("MAIL FROM:<a@x>\r\nRCPT TO:<>\r\n", &[250, 501]),
        ("MAIL FROM:<a@x>\r\nRCPT TO:<Postmaster>\r\n", &[250, 250]),
        ("MAIL FROM:a@x\r\n", &[501]),
        ("MAIL FROM:<a@x> FOO=1\r\n", &[555]),
        ("MAIL FROM:<a@x> SIZE=999999999\r\n", &[552]),
        ("MAIL FROM:<\u{e9}@x>\r\n", &[553]),
        ("MAIL FROM:<\u{e9}@x> SMTPUTF8\r\n", &[250]),
        (
            "NOOP\r\nVRFY a\r\nHELP\r\nEXPN a\r\nAUTH PLAIN AA==\r\n",
            &[250, 252, 214, 502, 502],
        ),
        ("FOO\r\n", &[500]),
        ("NOOP\n", &[500]),
        ("NO\rOP\r\n", &[500]),
        ("NOOP\0\r\n", &[500]),
        ("STARTTLS\r\n", &[502]),
    ];
    for (lines, want) in table {
        assert_eq!(codes(ServerConfig::default(), lines), want, "{lines:?}");
    }
}

#[test]
fn what_is_not_offered_is_refused() {
    let bare = ServerConfig {
        eight_bit_mime: false,
        smtp_utf8: false,
        chunking: false,
        ..ServerConfig::default()
    };
    let lines = "MAIL FROM:<a@x> BODY=8BITMIME\r\nMAIL FROM:<a@x> SMTPUTF8\r\nMAIL FROM:<a@x>\r\nRCPT TO:<b@x>\r\nBDAT 2 LAST\r\nabNOOP\r\n";
    assert_eq!(codes(bare.clone(), lines), [555, 555, 250, 250, 503, 250]);
    let old = ServerConfig {
        ehlo: false,
        ..bare
    };
    let (replies, _, session) = talk_with(old, &[b"EHLO c\r\n", b"HELO c\r\n"]);
    assert_eq!(
        replies,
        "220 mx\r\n502 5.5.1 command not implemented\r\n250 ok\r\n"
    );
    assert_eq!(session.client_name(), "c");
    let (replies, _, _) = talk_with(ServerConfig::default(), &[b"MAIL FROM:<a@x>\r\n"]);
    assert!(replies.contains("503"), "EHLO comes first");
}

#[test]
fn limits_hold() {
    let small = ServerConfig {
        message_max: 10,
        recipients_max: 1,
        ..ServerConfig::default()
    };
    let envelope = "MAIL FROM:<a@x>\r\nRCPT TO:<b@x>\r\n";
    let table = [
        (format!("{envelope}RCPT TO:<c@x>\r\n"), vec![250, 250, 452]),
        (
            format!("{envelope}DATA\r\n{}\r\n.\r\nNOOP\r\n", "x".repeat(9)),
            vec![250, 250, 354, 552, 250],
        ),
        (
            format!("{envelope}DATA\r\n{}\r\n.\r\n", "x".repeat(8)),
            vec![250, 250, 354, 250],
        ),
        (
            format!("{envelope}BDAT 11 LAST\r\n{}NOOP\r\n", "x".repeat(11)),
            vec![250, 250, 552, 250],
        ),
        (
            format!(
                "{envelope}BDAT 6\r\n{0}BDAT 6\r\n{0}BDAT 6 LAST\r\n{0}",
                "x".repeat(6)
            ),
            vec![250, 250, 250, 552, 503],
        ),
        (
            format!("{}\r\nNOOP\r\n", "x".repeat(LINE_MAX)),
            vec![500, 250],
        ),
        (
            format!("{}\r\nNOOP\r\n", "x".repeat(3 * LINE_MAX)),
            vec![500, 250],
        ),
    ];
    for (lines, want) in table {
        assert_eq!(codes(small.clone(), &lines), want, "{lines:?}");
    }
    let many = codes(ServerConfig::default(), &"FOO\r\n".repeat(30));
    assert_eq!((many.len(), many.last()), (21, Some(&421)));
    // However long a line is, it is not kept.
    let mut session = ServerSession::new(Arc::new(ServerConfig::default()));
    session.answer(220, "mx");
    for _ in 0..100 {
        session.receive(&[b'x'; LINE_MAX]);
        assert_eq!(session.poll_event(), None);
        assert!(session.input().len() < LINE_MAX);
    }
}

#[test]
fn bare_newlines_end_nothing_and_are_refused() {
    let smuggling = "MAIL FROM:<a@x>\r\nRCPT TO:<b@x>\r\nDATA\r\nhi\n.\nMAIL FROM:<evil@x>\r\nRCPT TO:<b@x>\r\nDATA\r\nevil\r\n.\r\n";
    assert_eq!(
        codes(ServerConfig::default(), smuggling),
        [250, 250, 354, 550]
    );
    let lenient = ServerConfig {
        refuse_bare_newlines: false,
        ..ServerConfig::default()
    };
    let (_, messages, _) = talk_with(lenient, &[b"EHLO c\r\n", smuggling.as_bytes()]);
    assert_eq!(messages.len(), 1, "still one message");
    assert_eq!(
        codes(
            ServerConfig::default(),
            "MAIL FROM:<a@x>\r\nRCPT TO:<b@x>\r\nBDAT 2 LAST\r\na\n"
        ),
        [250, 250, 550]
    );
}

#[test]
fn commands_sent_ahead_are_counted() {
    let serial = ServerConfig {
        pipelining: false,
        ..ServerConfig::default()
    };
    for (config, pieces, ahead) in [
        (
            serial.clone(),
            &[&b"EHLO c\r\n"[..], b"MAIL FROM:<a@x>\r\nRCPT TO:<b@x>\r\n"][..],
            1,
        ),
        (
            serial,
            &[b"EHLO c\r\n", b"MAIL FROM:<a@x>\r\n", b"RCPT TO:<b@x>\r\n"],
            0,
        ),
        (
            ServerConfig::default(),
            &[b"EHLO c\r\nMAIL FROM:<a@x>\r\n"],
            1,
        ),
        (
            ServerConfig::default(),
            &[
                b"EHLO c\r\n",
                b"MAIL FROM:<a@x>\r\nRCPT TO:<b@x>\r\nDATA\r\nhi\r\n.\r\n",
            ],
            1,
        ),
    ] {
        assert_eq!(
            talk_with(config, pieces).2.sent_ahead(),
            ahead,
            "{pieces:?}"
        );
    }
}

#[test]
fn starttls_starts_over() {
    let config = ServerConfig {
        starttls: true,
        ..ServerConfig::default()
    };
    let (replies, _, mut session) = talk_with(config.clone(), &[b"EHLO c\r\n", b"STARTTLS\r\n"]);
    assert!(replies.contains("250-STARTTLS\r\n") && replies.ends_with("220 go\r\n"));
    session.tls_established();
    session.receive(b"MAIL FROM:<a@x>\r\nEHLO c\r\n");
    assert_eq!(session.poll_event(), Some(ServerEvent::Hello));
    session.answer(250, "mx");
    let replies = String::from_utf8_lossy(session.output()).into_owned();
    assert!(replies.starts_with("503 ") && !replies.contains("STARTTLS") && session.is_tls());
    let (replies, _, session) = talk_with(config, &[b"EHLO c\r\nSTARTTLS\r\nEHLO c\r\n"]);
    assert!(replies.ends_with("421 4.7.0 plaintext after STARTTLS\r\n") && session.is_closing());
}

#[test]
fn answers_are_safe_and_can_have_lines() {
    let mut session = ServerSession::new(Arc::new(ServerConfig::default()));
    session.answer(554, "one\r\ntwo\x1b");
    assert_eq!(&session.output()[..], b"554-one\r\n554 two\r\n");
    assert!(session.is_closing());
}

proptest! {
    #[test]
    fn splitting_anywhere_changes_nothing(
        commands in prop::collection::vec(prop::sample::select(vec![
            "MAIL FROM:<a@x>\r\n", "RCPT TO:<b@x>\r\n", "RCPT TO:<no@x>\r\n", "DATA\r\n", ".\r\n", "..x\r\n", "hi\r\n", "a\nb\r\n",
            "BDAT 4\r\nab\r\n", "BDAT 2 LAST\r\n\r\n", "RSET\r\n", "NOOP\r\n", "FOO\r\n", "\r\n", "EHLO d\r\n",
        ]), 0..25),
        step in 1_usize..40,
    ) {
        let wire = commands.concat();
        let (whole, messages, _) = talk_with(ServerConfig::default(), &[b"EHLO c\r\n", wire.as_bytes()]);
        let mut pieces: Vec<&[u8]> = vec![b"EHLO c\r\n"];
        pieces.extend(wire.as_bytes().chunks(step));
        let (split, split_messages, _) = talk_with(ServerConfig::default(), &pieces);
        prop_assert_eq!(split, whole);
        prop_assert_eq!(split_messages, messages);
    }

    #[test]
    fn no_bytes_panic(bytes in prop::collection::vec(prop_oneof![any::<u8>(), Just(b'\r'), Just(b'\n'), Just(b'.')], 0..300)) {
        talk_with(ServerConfig::default(), &[b"EHLO c\r\n", &bytes]);
        talk_with(ServerConfig::default(), &[b"EHLO c\r\n", b"MAIL FROM:<a@x>\r\nRCPT TO:<b@x>\r\nDATA\r\n", &bytes]);
    }
}
