//! Signatures, judged by an independent verifier.

use crate::common::{compile, context, html, row};
use content::dkim::{Algorithm, Key, generate};
use content::{Content, Message};
use mail_auth::common::parse::TxtRecordParser;
use mail_auth::common::verify::DomainKey;
use mail_auth::{
    AuthenticatedMessage, DkimResult, MessageAuthenticator, Parameters, ResolverCache, Txt,
};
use std::borrow::Borrow;
use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Arc;
use std::time::Instant;

/// The zone `brand.example`, as a cache that knows everything.
pub(crate) struct Zone(HashMap<Box<str>, Txt>);

impl ResolverCache<Box<str>, Txt> for Zone {
    fn get<Q>(&self, name: &Q) -> Option<Txt>
    where
        Box<str>: Borrow<Q>,
        Q: Hash + Eq + ?Sized,
    {
        self.0.get(name).cloned()
    }

    fn remove<Q>(&self, _: &Q) -> Option<Txt>
    where
        Box<str>: Borrow<Q>,
        Q: Hash + Eq + ?Sized,
    {
        None
    }

    fn insert(&self, _: Box<str>, _: Txt, _: Instant) {}
}

pub(crate) fn keys() -> (Vec<Key>, Zone) {
    let mut zone = HashMap::new();
    let mut keys = Vec::new();
    for (selector, algorithm) in [("s1", Algorithm::Rsa2048), ("s2", Algorithm::Ed25519)] {
        let key = Key::from_pem(selector, &generate(algorithm).expect("a key")).expect("our own");
        let record = key.public_record().expect("a record");
        let record = DomainKey::parse(record.as_bytes()).expect("a DKIM record");
        zone.insert(
            format!("{selector}._domainkey.brand.example.").into(),
            Txt::DomainKey(Arc::new(record)),
        );
        keys.push(key);
    }
    (keys, Zone(zone))
}

fn signed(content: &Content, keys: &[Key]) -> Message {
    let context = context();
    let mut message = content
        .render(&row(r#"{"points":3}"#), &context)
        .expect("renders");
    message
        .sign("brand.example", keys, context.released_at)
        .expect("signs");
    message
}

/// Whether each signature holds.
pub(crate) async fn verdicts(wire: &[u8], zone: &Zone) -> Vec<bool> {
    let resolver = MessageAuthenticator::new_cloudflare().expect("a resolver that is never asked");
    let message = AuthenticatedMessage::parse(wire).expect("a message");
    let parameters = Parameters::new(&message).with_txt_cache(zone);
    let outputs = resolver.verify_dkim(parameters).await;
    outputs
        .iter()
        .map(|output| matches!(output.result(), DkimResult::Pass))
        .collect()
}

#[tokio::test]
async fn both_signatures_hold_whatever_the_content() {
    let (keys, zone) = keys();
    let templates = [
        "<p>Hi</p>",
        "<p>飛脚 {{ name }}</p>",
        "a  b \t c  \n\n \n\t\n",
        "\n\n",
        "<a href=\"https://a.example/\">é</a>",
        &"<td>  x</td>\n".repeat(3000),
    ];
    for template in templates {
        let mut spec = html(template);
        spec.subject =
            "飛脚 for {{ name }} with a subject that goes on and on beyond the end of one line"
                .into();
        spec.reply_to = Some("help@brand.example".parse().expect("an address"));
        spec.headers
            .insert("List-Id".into(), "News <news.brand.example>".into());
        spec.headers.insert("X-Any".into(), "a \t b".into());
        for text in [None, Some("Hi {{ points }}\n \n".to_owned())] {
            spec.text = text;
            let wire = signed(&compile(&spec), &keys).into_bytes();
            assert_eq!(
                verdicts(&wire, &zone).await,
                [true, true],
                "{}",
                String::from_utf8_lossy(&wire)
            );
        }
    }
}

#[tokio::test]
async fn changes_break_them_and_white_space_does_not() {
    let (keys, zone) = keys();
    let wire = signed(&compile(&html("<p>Hi  there</p>\n")), &keys).into_bytes();
    let wire = String::from_utf8(wire).expect("ASCII");
    let harmless = [
        wire.replace("\r\nSubject: Hello Ann", "\r\nSUBJECT:  Hello\r\n  Ann  "),
        wire.replace("<p>Hi  there</p>", "<p>Hi \t there</p>"),
        format!("{wire}\r\n\r\n"),
        format!("Received: from x\r\n{wire}"),
    ];
    for changed in harmless {
        assert_ne!(changed, wire);
        assert_eq!(
            verdicts(changed.as_bytes(), &zone).await,
            [true, true],
            "{changed}"
        );
    }
    let mut harmful = vec![
        wire.replace("<p>Hi  there</p>", "<p>Hithere</p>"),
        wire.replace("/u/", "/v/"),
        wire.replace("One-Click", "Two-Click"),
        wire.replace("text/html", "text/plain"),
        wire.replace("\r\nMessage-ID: <0", "\r\nMessage-ID: <1"),
    ];
    // Nobody can add a second one of these, above or below.
    for field in [
        "From: a@b.example",
        "To: a@b.example",
        "Subject: x",
        "Date: x",
        "Reply-To: a@b.example",
    ] {
        harmful.push(format!("{field}\r\n{wire}"));
        harmful.push(wire.replacen("\r\n\r\n", &format!("\r\n{field}\r\n\r\n"), 1));
    }
    for changed in harmful {
        assert_ne!(changed, wire);
        assert_eq!(
            verdicts(changed.as_bytes(), &zone).await,
            [false, false],
            "{changed}"
        );
    }
}

#[test]
fn the_same_message_has_the_same_bytes() {
    let (keys, _) = keys();
    let content = compile(&html("<p>Hi</p>"));
    let first = signed(&content, &keys);
    assert_eq!(first, signed(&content, &keys));
    assert_eq!(first.size(), first.clone().into_bytes().len());
    // Signing again replaces, and without keys there is no signature.
    let mut again = first.clone();
    again
        .sign("brand.example", &[], context().released_at)
        .expect("nothing to do");
    let plain = content.render(&row("{}"), &context()).expect("renders");
    assert_eq!(again, plain);
}

#[test]
fn signatures_are_folded_and_say_what_they_cover() {
    let (keys, _) = keys();
    let wire = String::from_utf8(signed(&compile(&html("x")), &keys).into_bytes()).expect("ASCII");
    let (header, _) = wire.split_once("\r\n\r\n").expect("a header");
    assert!(
        header.split("\r\n").all(|line| line.len() <= 200),
        "{header}"
    );
    let unfolded = header.replace("\r\n\t", "");
    let signatures: Vec<_> = unfolded
        .split("\r\n")
        .filter(|line| line.starts_with("DKIM-Signature:"))
        .collect();
    assert_eq!(signatures.len(), 2);
    for (signature, tags) in signatures
        .iter()
        .zip(["a=rsa-sha256;", "a=ed25519-sha256;"])
    {
        assert!(
            signature.contains(tags) && signature.contains("t=1763712300;"),
            "{signature}"
        );
        let covered = signature
            .split("h=")
            .nth(1)
            .and_then(|rest| rest.split(';').next())
            .expect("h=");
        let count = |name: &str| {
            covered
                .split(':')
                .filter(|covered| *covered == name)
                .count()
        };
        let expected = [
            ("from", 2),
            ("to", 2),
            ("subject", 2),
            ("date", 2),
            ("reply-to", 1),
            ("message-id", 1),
            ("mime-version", 1),
            ("content-type", 1),
            ("content-transfer-encoding", 1),
            ("list-unsubscribe", 1),
            ("list-unsubscribe-post", 1),
        ];
        for (name, times) in expected {
            assert_eq!(count(name), times, "{name} in {covered}");
        }
    }
}
