//! Tokens from outside: frozen bytes, mutations, other hosts, other keys.

use links::{Bad, Flags, KeyRing, Kind, MAX_TARGET, MAX_TOKEN, Token};
use model::{BatchId, TrackingMode};
use proptest::prelude::*;

const HOST: &str = "t.brand.example";

fn ring(bytes: &[u8]) -> KeyRing {
    let text: String = bytes
        .iter()
        .map(|&byte| KeyRing::file_text(&[byte; 32]))
        .collect();
    KeyRing::parse(&text).expect("keys")
}

fn sign(ring: &KeyRing, host: &str, token: &Token<'_>) -> String {
    let mut out = String::new();
    ring.signer(host, None)
        .expect("a signer")
        .sign(token, &mut out)
        .expect("a good target");
    out
}

fn click(target: &str) -> Token<'_> {
    Token {
        kind: Kind::Click,
        flags: Flags {
            mode: TrackingMode::Individual,
            proof: false,
        },
        batch: BatchId::from_bytes([0x11; 16]),
        index: 41,
        link: 3,
        target,
    }
}

/// The format is frozen: a link that was sent must work for years.
#[test]
fn golden_tokens() {
    let ring = ring(&[1]);
    let click = click("https://shop.example/a?b=c&d=é#f");
    let open = Token {
        kind: Kind::Open,
        index: u32::MAX,
        link: 0,
        target: "",
        ..click
    };
    let unsubscribe = Token {
        kind: Kind::Unsubscribe,
        flags: Flags {
            mode: TrackingMode::Off,
            proof: true,
        },
        index: 0,
        ..open
    };
    let golden = [
        (
            click,
            "AXLNAgMRERERERERERERERERERERKQNodHRwczovL3Nob3AuZXhhbXBsZS9hP2I9YyZkPcOpI2ZIKUe0MDypGBoU_50",
        ),
        (open, "AXLNAQMRERERERERERERERERERER_____w8A8Sy0zeurvdnzpz7T"),
        (
            unsubscribe,
            "AXLNAwQRERERERERERERERERERERAABq8n5n9qIkzsVkuhg",
        ),
    ];
    for (token, text) in golden {
        assert_eq!(sign(&ring, HOST, &token), text);
        assert_eq!(
            ring.verify(text, HOST).expect("a golden token").token(),
            token
        );
    }
}

#[test]
fn a_token_belongs_to_its_host() {
    let ring = ring(&[1]);
    let text = sign(&ring, "T.Brand.Example", &click("https://a.example/"));
    assert!(ring.verify(&text, "t.brand.EXAMPLE").is_ok());
    for other in [
        "t.brand.example.",
        "brand.example",
        "",
        "t.brand.example:8026",
        &"x".repeat(300),
    ] {
        assert_eq!(ring.verify(&text, other), Err(Bad::Signature), "{other}");
    }
    assert!(ring.signer(&"x".repeat(256), None).is_none());
}

#[test]
fn keys_rotate() {
    let (old, both, new) = (ring(&[1]), ring(&[2, 1]), ring(&[2]));
    let token = click("https://a.example/");
    let (by_old, by_both) = (sign(&old, HOST, &token), sign(&both, HOST, &token));
    assert!(both.verify(&by_old, HOST).is_ok() && both.verify(&by_both, HOST).is_ok());
    assert!(new.verify(&by_both, HOST).is_ok());
    assert_eq!(new.verify(&by_old, HOST), Err(Bad::UnknownKey));
    // What was released under the old key is signed with it as long as it is there.
    let id = old.ids().next().expect("an id");
    let mut again = String::new();
    both.signer(HOST, Some(id))
        .expect("the old key")
        .sign(&token, &mut again)
        .expect("a good target");
    assert_eq!(again, by_old);
    assert!(new.signer(HOST, Some(id)).is_none());
}

#[test]
fn ten_thousand_mutated_tokens_are_refused() {
    let ring = ring(&[1, 2, 3]);
    let text = sign(
        &ring,
        HOST,
        &click("https://shop.example/products/1?utm_source=mail&x=y"),
    );
    let alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_=+/.%\0\xc3";
    // A fixed sequence: each failure can be repeated.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = move |below: usize| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(state >> 33).expect("31 bits") % below
    };
    let mut refused = 0;
    while refused < 10_000 {
        let mut bytes = text.clone().into_bytes();
        for _ in 0..=next(3) {
            let at = next(bytes.len());
            match next(4) {
                0 => bytes[at] = alphabet[next(alphabet.len())],
                1 => bytes.insert(at, alphabet[next(alphabet.len())]),
                2 => bytes.truncate(at.max(1)),
                _ => {
                    let other = next(bytes.len());
                    bytes.swap(at, other);
                }
            }
        }
        let mutated = String::from_utf8_lossy(&bytes);
        if mutated == text {
            continue;
        }
        assert!(ring.verify(&mutated, HOST).is_err(), "{mutated}");
        refused += 1;
    }
}

#[test]
fn bounds_come_before_the_work() {
    let ring = ring(&[1]);
    let longest = format!("https://{}", "x".repeat(MAX_TARGET - 8));
    let token = Token {
        index: u32::MAX,
        link: u16::MAX,
        ..click(&longest)
    };
    let text = sign(&ring, HOST, &token);
    assert!(text.len() <= MAX_TOKEN);
    assert_eq!(
        ring.verify(&text, HOST).expect("the longest token").token(),
        token
    );
    assert_eq!(
        ring.verify(&"A".repeat(MAX_TOKEN + 1), HOST),
        Err(Bad::Malformed)
    );
    let mut out = String::from("kept");
    let signer = ring.signer(HOST, None).expect("a signer");
    assert!(
        signer
            .sign(&click(&format!("{longest}x")), &mut out)
            .is_err()
    );
    assert!(
        signer
            .sign(&click("javascript:alert(1)"), &mut out)
            .is_err()
    );
    assert_eq!(out, "kept");
}

proptest! {
    #[test]
    fn any_token_comes_back(
        batch: [u8; 16], index: u32, link: u16, kind in 0..3_u8, mode in 0..4_u8, proof: bool,
        path in "[^\\x00-\\x1f\\x7f]{0,60}", host in "[a-zA-Z0-9.:-]{0,80}",
    ) {
        let target = format!("https://x{path}");
        let kind = [Kind::Open, Kind::Click, Kind::Unsubscribe][usize::from(kind)];
        let mode = [TrackingMode::Off, TrackingMode::Aggregate, TrackingMode::LastDate, TrackingMode::Individual][usize::from(mode)];
        let target = if kind == Kind::Click { &target } else { "" };
        let token = Token { kind, flags: Flags { mode, proof }, batch: BatchId::from_bytes(batch), index, link, target };
        let ring = ring(&[9]);
        let text = sign(&ring, &host, &token);
        prop_assert!(text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_'));
        let verified = ring.verify(&text, &host).expect("our own");
        prop_assert_eq!(verified.token(), token);
    }

    #[test]
    fn no_text_panics_or_passes(text in "\\PC{0,200}", bytes: Vec<u8>) {
        let ring = ring(&[9]);
        prop_assert!(ring.verify(&text, HOST).is_err());
        prop_assert!(ring.verify(&String::from_utf8_lossy(&bytes), HOST).is_err());
    }

    /// Bytes that a holder of the key could have signed by mistake are still checked as a token.
    #[test]
    fn any_single_changed_bit_is_refused(bit in 0..400_usize) {
        use base64::Engine as _;
        let engine = base64::engine::general_purpose::URL_SAFE_NO_PAD;
        let ring = ring(&[9]);
        let text = sign(&ring, HOST, &click("https://shop.example/p"));
        let mut bytes = engine.decode(&text).expect("our own");
        let bit = bit % (bytes.len() * 8);
        bytes[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(ring.verify(&engine.encode(&bytes), HOST).is_err());
    }
}
