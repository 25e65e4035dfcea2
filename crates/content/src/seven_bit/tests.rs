use super::*;
use mail_parser::{MessageParser, MimeHeaders, PartType};
use proptest::prelude::*;

fn encoded(message: &[u8]) -> Result<Vec<u8>, NotEncodable> {
    let at = memmem::find(message, b"\r\n\r\n").expect("a header") + 2;
    let (headers, body) = message.split_at(at);
    let (headers, body) = encode(headers, &body[2..])?;
    Ok([&headers[..], b"\r\n", &body].concat())
}

fn text(message: &str) -> Result<String, NotEncodable> {
    encoded(message.as_bytes()).map(|bytes| String::from_utf8(bytes).expect("ASCII"))
}

#[test]
fn parts_with_eight_bits_are_encoded_and_the_rest_is_kept() {
    let message = "From: a@x.example\r\nMIME-Version: 1.0\r\nContent-Type: multipart/mixed;\r\n boundary=\"b 1\"\r\n\
        content-transfer-encoding: 8BIT\r\n\r\nvor à\r\n--b 1\r\nX-Odd:  y \r\nContent-Type: text/plain; charset=utf-8\r\n\
        Content-Transfer-Encoding:\r\n 8bit\r\n\r\nGrüße=\r\n--b 12\r\n--b 1 \t\r\n\r\nplain=\r\n--b 1\r\n\
        Content-Type: message/rfc822\r\nContent-Transfer-Encoding: 8bit\r\n\r\nSubject: in\r\n\r\né \r\n--b 1--\r\nnach à\r\n";
    let want = "From: a@x.example\r\nMIME-Version: 1.0\r\nContent-Type: multipart/mixed;\r\n boundary=\"b 1\"\r\n\
        Content-Transfer-Encoding: 7bit\r\n\r\nvor ??\r\n--b 1\r\nX-Odd:  y \r\nContent-Type: text/plain; charset=utf-8\r\n\
        Content-Transfer-Encoding: quoted-printable\r\n\r\nGr=C3=BC=C3=9Fe=3D\r\n=2D-b 12\r\n--b 1 \t\r\n\r\nplain=\r\n--b 1\r\n\
        Content-Type: message/rfc822\r\nContent-Transfer-Encoding: 7bit\r\n\r\nSubject: in\r\nMIME-Version: 1.0\r\n\
        Content-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\n=C3=A9=20\r\n\
        --b 1--\r\nnach ??\r\n";
    assert_eq!(text(message).as_deref(), Ok(want));
    let bare = encoded(b"From: a@x.example\r\n\r\n\xe9\r\n").map(|bytes| bytes[19..].to_vec());
    let want = "MIME-Version: 1.0\r\nContent-Type: text/plain; charset=unknown-8bit\r\n\
        Content-Transfer-Encoding: quoted-printable\r\n\r\n=E9\r\n";
    assert_eq!(bare.as_deref(), Ok(want.as_bytes()));
    let ascii = "Content-Type: multipart/signed\r\nContent-Transfer-Encoding: 8bit\r\n\r\nx\r\n";
    assert_eq!(text(ascii).as_deref(), Ok(ascii));
}

#[test]
fn a_digest_has_messages_and_what_is_cut_off_still_has_parts() {
    let message = "Content-Type: multipart/digest; boundary=b\r\nMIME-Version: 1.0\r\n\r\n--b\r\n\r\nSubject: x\r\n\
        Content-Type: text/plain\r\nMIME-Version: 1.0\r\n\r\né\r\n--b\r\n--b\r\n\r\nSubject: y\r\n\r\nz\r\n";
    let encoded = text(message).expect("encodable");
    assert!(
        encoded.contains("\r\n--b\r\n\r\nSubject: x\r\n"),
        "{encoded}"
    );
    assert!(encoded.contains("quoted-printable\r\n\r\n=C3=A9\r\n--b\r\n--b\r\n\r\nSubject: y"));
}

#[test]
fn a_broken_line_never_becomes_a_delimiter() {
    let line = format!("{}--b", "é".repeat(12) + "xxx");
    let message = format!(
        "MIME-Version: 1.0\r\nContent-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\n\r\n{line}\r\n--b--\r\n"
    );
    let encoded = text(&message).expect("encodable");
    assert_eq!(encoded.matches("\r\n--b").count(), 2, "{encoded}");
    assert!(encoded.contains("=\r\n=2D-b\r\n--b--"), "{encoded}");
}

#[test]
fn what_would_break_is_refused() {
    let leaf = |header: &str| format!("{header}\r\n\r\né\r\n");
    let nested: String = (0..40)
        .map(|n| format!("Content-Type: multipart/mixed; boundary=b{n}x\r\n\r\n--b{n}x\r\n"))
        .collect();
    let cases = [
        (leaf("Subject: é"), NotEncodable::Header),
        (
            leaf("Content-Type: multipart/signed; boundary=b\r\n"),
            NotEncodable::Signed,
        ),
        (
            leaf("Content-Transfer-Encoding: base64"),
            NotEncodable::Undeclared,
        ),
        (
            leaf("Content-Transfer-Encoding: quoted-printable"),
            NotEncodable::Undeclared,
        ),
        (
            leaf("Content-Transfer-Encoding: 8bit\r\nContent-Transfer-Encoding: 7bit"),
            NotEncodable::Undeclared,
        ),
        (
            leaf("Content-Type: text/plain\r\nContent-type : text/html"),
            NotEncodable::Undeclared,
        ),
        (
            leaf("Content-Type: message/delivery-status"),
            NotEncodable::Opaque,
        ),
        (leaf("Content-Type: multipart/mixed"), NotEncodable::NoParts),
        (
            leaf("Content-Type: multipart/mixed; boundary=b"),
            NotEncodable::NoParts,
        ),
        (
            leaf(
                "Content-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\nContent-Disposition: attachment; filename=é",
            ),
            NotEncodable::Header,
        ),
        (
            leaf("Content-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\né"),
            NotEncodable::Header,
        ),
        (leaf(nested.trim_end()), NotEncodable::TooDeep),
    ];
    for (message, why) in cases {
        let message = message.replace("\r\n\r\n\r\n", "\r\n\r\n");
        assert_eq!(text(&message), Err(why), "{message}");
    }
}

/// A part as an author's program makes it: header and body.
fn any_part() -> impl Strategy<Value = Vec<u8>> {
    let line = prop_oneof![
        "[ -~]{0,90}".prop_map(String::into_bytes),
        "(\\PC|[a-z =\t]){0,120}".prop_map(String::into_bytes),
        proptest::collection::vec(128_u8.., 0..40),
        // About as long as a line of the encoding, then nearly a delimiter: a whole one is taken for
        // one by this parser wherever it stands.
        "[a-zé]{20,80}--(oute|inne)(--)?".prop_map(String::into_bytes),
    ];
    let kinds = proptest::sample::select(vec![
        "",
        "Content-Type: text/plain; charset=utf-8\r\n",
        "Content-Type: TEXT/html; charset=utf-8\r\nContent-Transfer-Encoding: 8bit\r\n",
        "Content-Type: application/octet-stream\r\nContent-Transfer-Encoding: binary\r\nX-A: b\r\n",
        "content-transfer-encoding: 7BIT (what?)\r\nContent-Type: image/png\r\n",
    ]);
    (kinds, proptest::collection::vec(line, 0..8)).prop_map(|(header, lines)| {
        let body = lines.join(&b"\r\n"[..]);
        [header.as_bytes(), b"\r\n", &body].concat()
    })
}

fn joined(parts: &[Vec<u8>], boundary: &str, end: &str) -> Vec<u8> {
    let mut out = Vec::new();
    for part in parts {
        out.extend(format!("--{boundary}\r\n").bytes());
        out.extend_from_slice(part);
        out.extend(b"\r\n");
    }
    out.extend(format!("--{boundary}{end}\r\n").bytes());
    out
}

/// Every leaf as an independent parser reads it: its type, and its bytes.
fn leaves(message: &[u8]) -> Vec<(String, Vec<u8>)> {
    let parsed = MessageParser::new().parse(message).expect("a message");
    let mut found = Vec::new();
    collect(&parsed, &mut found);
    found
}

fn collect(message: &mail_parser::Message<'_>, found: &mut Vec<(String, Vec<u8>)>) {
    for part in &message.parts {
        match &part.body {
            PartType::Multipart(_) => {}
            PartType::Message(inner) => collect(inner, found),
            _ => {
                let media = part.content_type().map(|of| (of.ctype(), of.subtype()));
                found.push((format!("{media:?}"), part.contents().to_vec()));
            }
        }
    }
}

proptest! {
    #[test]
    fn every_leaf_keeps_its_bytes(
        outer in proptest::collection::vec(any_part(), 1..4),
        inner in proptest::collection::vec(any_part(), 1..3),
        forwarded in any_part(),
    ) {
        let alternative = [
            b"Content-Type: multipart/alternative; boundary=\"inner\"\r\nContent-Transfer-Encoding: 8bit\r\n\r\n",
            &joined(&inner, "inner", "--")[..],
        ].concat();
        let message = [
            b"Content-Type: message/rfc822\r\n\r\nMIME-Version: 1.0\r\nSubject: in\r\n",
            &forwarded[..],
        ].concat();
        let mut parts = outer;
        parts.extend([alternative, message]);
        let whole = [
            b"From: a@x.example\r\nMIME-Version: 1.0\r\nContent-Type: multipart/mixed; boundary=outer\r\n\r\n",
            &joined(&parts, "outer", "--")[..],
        ].concat();
        let seven = encoded(&whole).expect("encodable");
        prop_assert!(seven.is_ascii());
        for line in seven.split(|byte| *byte == b'\n') {
            prop_assert!(line.len() <= 999, "{}", line.len());
        }
        prop_assert_eq!(leaves(&seven), leaves(&whole), "{}", String::from_utf8_lossy(&seven));
        let again = encoded(&seven).expect("done");
        prop_assert_eq!(again, seven);
    }

    #[test]
    fn any_bytes_are_encoded_or_refused(
        pieces in proptest::collection::vec(prop_oneof![
            proptest::sample::select(vec![
                "--b", "--b--", "\r\n", "\r\n\r\n", "Content-Type: multipart/mixed; boundary=b\r\n", ": ", " ",
                "Content-Type: message/rfc822\r\n", "Content-Transfer-Encoding: 8bit\r\n", "é", "=", "boundary*0=b",
            ]).prop_map(|text| text.as_bytes().to_vec()),
            proptest::collection::vec(any::<u8>(), 0..6),
        ], 0..40),
        is_multipart: bool,
    ) {
        let header: &[u8] = if is_multipart { b"Content-Type: multipart/mixed; boundary=b\r\n" } else { b"" };
        if let Ok((headers, body)) = encode(header, &pieces.concat()) {
            prop_assert!(headers.is_ascii() && body.is_ascii());
            prop_assert!(headers.is_empty() || headers.ends_with(b"\r\n"));
        }
    }
}
